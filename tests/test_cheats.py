"""Planted cheats, judged by the real tiny base model: what each of them earns, and which safeguard takes it away.

A failure here means that a policy can be paid for something that is no reasoning without anybody seeing it in the logs.
"""

from pathlib import Path

import pytest

from context_rl.questions import Questions
from context_rl.rewards import Reward, RewardInputs
from context_rl.tasks import load_task
from scorer.local import LocalScorer

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-base"
GUARDED = {
    "gated": {
        "of": {"hybrid": {"probability": 1.0, "early_leak": -1.0, "clip": [0, 1]}},
        "gate": ["well_formed", {"length_band": {"low": 4, "high": 200, "soft": 100}}],
    }
}


@pytest.fixture(scope="module")
def questions() -> Questions:
    task = load_task("symbolic", train_size=12, eval_size=2, seed=5)
    return Questions(task.train, task.grade, LocalScorer(str(MODEL), device="cpu"))


def judged(questions: Questions, write) -> list[RewardInputs]:
    """The inputs of one trace a question, as `write` makes it from the example; 2,000 tokens is a cut trace."""
    examples = [prepared.example for prepared in questions.by_id.values()]
    traces = [write(example) for example in examples]
    tokens = [len(trace.split()) for trace in traces]
    rows = questions.assess([e.id for e in examples], traces, tokens, [n < 2000 for n in tokens])
    return [row.inputs for row in rows if row.inputs is not None]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_stating_the_answer_pays_in_likelihood_and_neither_masked_nor_guarded(questions):
    """The obvious hack: without these it would be the best trace there is, and look like one."""
    cheats = judged(questions, lambda e: f"1 dog has 4 legs, {e.answer} so far.")
    nothing = judged(questions, lambda e: "1 dog has 4 legs, so far.")
    probability, masked = Reward("probability"), Reward("masked")
    assert mean(map(probability.of, cheats)) > 1.5 * mean(map(probability.of, nothing))  # it does pay
    assert [masked.of(x) for x in cheats] == pytest.approx([probability.of(x) for x in nothing], rel=1e-5)
    assert mean(Reward("leak").of(x) for x in cheats) == 1.0
    assert all(x.leak.exact for x in cheats)


def test_guessing_first_pays_nothing_behind_the_guard(questions):
    """The penalty for an early answer would not outweigh what the answer pays."""
    cheats = judged(questions, lambda e: f"{e.answer} legs. So the total number of legs in all is what was asked for.")
    assert {Reward("early_leak").of(x) for x in cheats} == {1.0}
    assert max(Reward(GUARDED).of(x) for x in cheats) == 0.0


def test_copying_the_question_is_seen(questions):
    """A trace that says nothing new would pass as reasoning."""
    cheats = judged(questions, lambda e: e.question)
    assert {Reward("copied").of(x) for x in cheats} == {1.0}
    own = Reward({"gated": {"of": "probability", "gate": {"hybrid": {"copied": -1, "well_formed": 1, "clip": [0, 1]}}}})
    assert {own.of(x) for x in cheats} == {0.0}


def test_an_empty_trace_is_gated(questions):
    """Saying nothing would be worth whatever the base model knows by itself."""
    cheats = judged(questions, lambda e: "")
    assert max(Reward("probability").of(x) for x in cheats) > 0
    assert {Reward({"gated": {"of": "probability"}}).of(x) for x in cheats} == {0.0}


def test_two_thousand_tokens_of_filler_are_gated_or_too_long_to_score(questions):
    """Length would be paid, or a trace longer than the base model reads would be cut and scored."""
    long = judged(questions, lambda e: "Let me think. " * 667)
    assert long == []  # over the tiny base model's 1,024 tokens: unscored, with a reason
    within = judged(questions, lambda e: "Let me think. " * 150)
    assert len(within) == 12
    assert min(Reward("repetition").of(x) for x in within) > 0.9
    assert {Reward(GUARDED).of(x) for x in within} == {0.0}
