"""The loop: what the base model is asked, what the reward function returns and writes, what GRPOTrainer trains on.

Most tests use a scorer that answers by arithmetic; the last ones are a real run of GRPOTrainer on the two tiny models.
"""

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from context_rl import prompts, runs
from context_rl.config import ConfigError, ContextConfig
from context_rl.questions import Questions
from context_rl.rewards import LOGGED
from context_rl.rollout import cut_at_stop, stop_strings
from context_rl.tasks import DataError, Example, Task, load_task
from context_rl.training import (
    LikelihoodReward,
    RunLog,
    StopRun,
    build_dataset,
    build_trainer,
    check_prompts_fit,
    check_reward_fits,
    check_trainer_settings,
)
from scorer.local import LocalScorer
from scorer.types import Item, Score, Unscored, Usage

EXAMPLES = [
    Example("s/0", "How many legs have 2 birds?", "4"),
    Example("s/1", "How many legs have 3 cats?", "12"),
    Example("s/2", "How many legs have 2 spiders and 1 bird?", "18"),
]


@pytest.fixture(scope="module")
def base_tokenizer(repository):
    return AutoTokenizer.from_pretrained(repository / "models" / "tiny-base")


@pytest.fixture(scope="module")
def context_tokenizer(repository):
    return AutoTokenizer.from_pretrained(repository / "models" / "tiny-context", padding_side="left")


class FakeScorer:
    """Implements `Scorer` by arithmetic on the prefix, and refuses every prefix whose text holds a word of `fails`."""

    def __init__(self, tokenizer, max_length: int = 1024):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.asked: list[Item] = []
        self.fails: set[str] = set()
        self.fingerprint = {"backend": "fake"}

    def text(self, item: Item) -> str:
        return self.tokenizer.decode(item.prefix_ids)

    def score(self, items, greedy=None):
        self.asked += items
        return [self.one(item) for item in items]

    def one(self, item: Item) -> Score | Unscored:
        broken = [word for word in sorted(self.fails) if word in self.text(item)]
        if broken:
            return Unscored(f"the server hates {broken[0]}")
        logprobs = tuple(-(sum(item.prefix_ids) % 50 + t) / 40 for t in range(len(item.answer_ids)))
        return Score(logprobs, greedy_text=str(len(item.prefix_ids) % 20))

    def take_usage(self):
        return Usage(items=2, distinct=1, seconds=0.5)

    def close(self):
        pass


def right(text: str, example: Example) -> bool:
    return text.strip() == example.answer


def grpo(folder: Path | str, **changes) -> GRPOConfig:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 24,
        "scale_rewards": "group",
        "seed": 1,
    }
    return GRPOConfig(**settings | changes)


class Loop:
    """A reward function with everything around it that GRPOTrainer would supply."""

    def __init__(self, folder: Path | None, scorer: FakeScorer, tokenizer, **changes):
        self.scorer, self.tokenizer, self.folder = scorer, tokenizer, folder
        self.config = ContextConfig(**{"reward": "logprob_mean"} | changes)
        self.questions = Questions(EXAMPLES, right, scorer, max_answer_tokens=6)
        self.reward = LikelihoodReward(self.questions, self.config, grpo("unused"), tokenizer, folder)
        self.metrics: dict[str, float] = {}

    def call(self, ids: list[str], traces: list[str], step: int = 0) -> list[float | None]:
        """One call as GRPOTrainer makes it, with whatever else it passes."""
        return self.reward(
            prompts=["..."] * len(ids),
            completions=traces,
            completion_ids=[self.tokenizer(trace)["input_ids"] for trace in traces],
            example_id=ids,
            trainer_state=SimpleNamespace(global_step=step, max_steps=10),
            log_metric=self.metrics.__setitem__,
            log_extra=lambda *_: None,
        )

    def rows(self) -> list[dict]:
        return [row for p in sorted((self.folder / "traces").iterdir()) for row in pq.read_table(p).to_pylist()]


@pytest.fixture
def scorer(base_tokenizer) -> FakeScorer:
    return FakeScorer(base_tokenizer)


@pytest.fixture
def loop(tmp_path, scorer, context_tokenizer) -> Loop:
    return Loop(tmp_path, scorer, context_tokenizer)


FOUR = ["s/0", "s/0", "s/1", "s/1"]
TRACES = [" 2 birds have 4 legs.", " birds", " 3 cats have 12 legs.", " cats"]
MASKED = [(0, "birds have 4 legs", "birds have legs"), (2, "cats have 12 legs", "cats have legs")]
"""Traces that state their answer: what is cut out of them, and what remains."""
NOT_HERE = {"judge_soft", *(name for name in LOGGED if name.startswith("option"))}
"""No question here has options, and no judge is asked."""


# --- what the base model is asked ---------------------------------------------------------------------------------


def test_the_base_model_is_asked_for_the_answer_after_question_and_trace(loop, scorer, base_tokenizer):
    """Failure: another text is scored than the template's; every number of the run is of something else."""
    loop.call(FOUR, TRACES)
    asked = [(scorer.text(item), base_tokenizer.decode(item.answer_ids)) for item in scorer.asked]
    no_trace = [(f"Question: {e.question}\nAnswer:", f" {e.answer}\n") for e in EXAMPLES[:2]]
    with_trace = [
        (f"Question: {e.question}\nReasoning: {trace.strip()}\nAnswer:", f" {e.answer}\n")
        for e, trace in zip([EXAMPLES[0]] * 2 + [EXAMPLES[1]] * 2, TRACES, strict=True)
    ]
    masked = [(with_trace[n][0].replace(was, now), with_trace[n][1]) for n, was, now in MASKED]
    assert asked == no_trace + with_trace + masked


def test_without_masked_scores_traces_are_asked_once(tmp_path, scorer, context_tokenizer):
    """Failure: the option that halves the scoring of leaking traces does nothing, or invents their scores."""
    loop = Loop(tmp_path, scorer, context_tokenizer)
    loop.questions.masked = False
    loop.call(FOUR, TRACES)
    assert len(scorer.asked) == 2 + 4
    assert {row["masked_logprobs"] for row in loop.rows()} == {None}


def test_a_trace_that_does_not_state_the_answer_has_its_own_score_for_the_masked_one(loop, scorer):
    """Failure: masked rewards of honest traces are missing, or cost a second score."""
    loop.call(FOUR, TRACES)
    masked = {n: item for (n, *_), item in zip(MASKED, scorer.asked[6:], strict=True)}
    for n, row in enumerate(loop.rows()):
        own = row["token_logprobs"] if n not in masked else list(scorer.one(masked[n]).token_logprobs)
        assert row["masked_logprobs"] == own


def test_all_traces_of_a_question_are_scored_on_the_same_answer_ids(loop, scorer):
    """Failure: rewards inside a group are log-probs of different token sequences."""
    loop.call(FOUR, TRACES)
    assert len({item.answer_ids for item in scorer.asked}) == 2


def test_a_baseline_is_asked_once_a_question_over_the_whole_run(loop, scorer):
    """Failure: the no-trace score is computed again for every trace, a third of the scoring time."""
    for step in range(3):
        loop.call(FOUR, TRACES, step)
    baselines = [scorer.text(item) for item in scorer.asked if "Reasoning:" not in scorer.text(item)]
    assert sorted(baselines) == sorted(f"Question: {e.question}\nAnswer:" for e in EXAMPLES[:2])
    loop.call(["s/2", "s/2"], TRACES[:2])
    assert sum("Reasoning:" not in scorer.text(item) for item in scorer.asked) == 3


def test_a_baseline_that_failed_is_asked_again(loop, scorer):
    """Failure: one dropped request takes a question out of the training for good."""
    scorer.fails = {"birds?\nAnswer"}
    assert loop.call(FOUR, TRACES)[:2] == [None, None]
    scorer.fails = set()
    assert None not in loop.call(FOUR, TRACES)


def test_the_traces_are_read_from_the_sampled_ids(loop, scorer):
    """Failure: special tokens, or what q wrote after its stop string, reach the base model."""
    traces = [" 2 birds.\nAnswer: 4\nQuestion: next", " a<|endoftext|>", "", " \n b \n"]
    loop.call(["s/0"] * 4, traces)
    found = [scorer.text(item).split("Reasoning: ")[1].removesuffix("\nAnswer:") for item in scorer.asked[1:]]
    assert found == ["2 birds.", "a", "", "b"]
    assert [row["trace"] for row in loop.rows()] == found


def test_a_trace_that_does_not_fit_into_the_base_model_is_unscored_and_never_sent(tmp_path, base_tokenizer):
    """Failure: a cut trace is scored, or one long trace makes the scorer refuse the whole batch."""
    scorer = FakeScorer(base_tokenizer, max_length=40)
    loop = Loop(tmp_path, scorer, base_tokenizer)
    long = " cats" * 30
    rewards = loop.call(FOUR, [TRACES[0], long, long, TRACES[3]])
    assert [reward is None for reward in rewards] == [False, True, True, False]
    assert all(len(item.prefix_ids) + max(len(item.answer_ids), 6) <= 40 for item in scorer.asked)
    assert len(scorer.asked) == 2 + 2 + 1  # the first trace states its answer
    text = prompts.base_prefix(EXAMPLES[0].question, long.strip())
    needed = len(base_tokenizer(text)["input_ids"]) + 6
    assert loop.rows()[1]["unscored"] == f"s/0: prefix and answer take {needed} tokens, the base model has 40"


def test_a_trace_that_just_fits_is_sent(tmp_path, base_tokenizer):
    """Failure: the limit is off by one, or forgets the room for the greedy answer."""
    trace = "2 birds have 4 legs."
    needed = len(base_tokenizer(prompts.base_prefix(EXAMPLES[0].question, trace))["input_ids"]) + 6
    for room, fits in ((needed, True), (needed - 1, False)):
        questions = Questions(EXAMPLES[:1], right, FakeScorer(base_tokenizer, room), max_answer_tokens=6)
        assert isinstance(questions.ask(["s/0"], [trace])[0], Score) is fits


def test_a_question_that_does_not_fit_is_a_data_error_that_names_it(base_tokenizer):
    """Failure: a row that can never be scored is found out in the middle of the run."""
    long = Example("rows.jsonl:7", "How many legs " * 40 + "?", "4")
    with pytest.raises(DataError) as caught:
        Questions([EXAMPLES[0], long], right, FakeScorer(base_tokenizer, max_length=60))
    assert str(caught.value).startswith("rows.jsonl:7: the prompt does not fit: ")
    assert "\n" not in str(caught.value)


def test_an_ambiguous_answer_boundary_is_a_data_error_that_names_the_row():
    """Failure: the answer is scored on tokens that it never has in the text."""
    with pytest.raises(DataError) as caught:
        Questions([Example("rows.jsonl:3", "Answer", "3")], right, FakeScorer(tiny.merging_tokenizer()))
    assert str(caught.value).startswith("rows.jsonl:3: ambiguous token boundary between 'Answer:' and ' 3")
    assert "\n" not in str(caught.value)


def test_in_a_chat_the_answer_ends_in_eos_and_follows_the_templates_prompt():
    """Failure: a chat model is asked for a line end that it would never write, or reads two BOS."""
    tokenizer = tiny.metaspace_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %} >{% endif %}"
    )
    scorer = FakeScorer(tokenizer)
    Questions(EXAMPLES[:1], right, scorer, chat=True).ask(["s/0"], ["some legs"])
    (item,) = scorer.asked
    assert tokenizer.convert_ids_to_tokens(item.answer_ids) == ["▁4", "</s>"]
    text = prompts.base_chat_prefix(tokenizer, EXAMPLES[0].question, "some legs")
    assert list(item.prefix_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert item.prefix_ids.count(tokenizer.bos_token_id) == 1


# --- what the reward function returns and writes ------------------------------------------------------------------


def test_rewards_and_rows_are_those_of_the_scores(loop, scorer):
    """Failure: rewards of one trace are given to another, or a formula gets the baseline in the score's place."""
    rewards = loop.call(FOUR, TRACES, step=6)
    baselines = [scorer.one(item).token_logprobs for item in (scorer.asked[0], scorer.asked[0], *[scorer.asked[1]] * 2)]
    scores = [scorer.one(item) for item in scorer.asked[2:6]]
    assert rewards == pytest.approx([sum(s.token_logprobs) / len(s.token_logprobs) for s in scores], rel=1e-12)
    rows = loop.rows()
    assert [row["example_id"] for row in rows] == FOUR
    for row, trace, score, baseline, reward in zip(rows, TRACES, scores, baselines, rewards, strict=True):
        assert row["step"] == 7
        assert row["trace"] == trace.strip()
        assert row["trace_tokens"] == len(loop.tokenizer(trace)["input_ids"])
        assert row["token_logprobs"] == list(score.token_logprobs)
        assert row["baseline_logprobs"] == list(baseline)
        assert row["base_answer"] == score.greedy_text
        assert row["correct"] == right(score.greedy_text, loop.questions.by_id[row["example_id"]].example)
        assert row["reward"] == row["rewards/logprob_mean"] == reward
        assert row["rewards/gain"] == pytest.approx(reward - sum(baseline) / len(baseline), rel=1e-12)
        assert row["rewards/binary"] == float(row["correct"])
        assert row["unscored"] is None
    assert {key for key in rows[0] if key.startswith("rewards/")} == {f"rewards/{name}" for name in LOGGED}


def test_an_unscored_row_returns_none_and_stands_in_the_table_with_its_reason(loop, scorer):
    """Failure: a failed score trains the policy, or vanishes without a reason."""
    scorer.fails = {"have 12"}
    rewards = loop.call(FOUR, TRACES)
    assert [reward is None for reward in rewards] == [False, False, True, False]
    row = loop.rows()[2]
    assert row["unscored"] == "the server hates have 12"
    assert (row["trace"], row["advantage"]) == (TRACES[2].strip(), 0.0)
    for key in ("reward", "token_logprobs", "base_answer", "correct", *(f"rewards/{name}" for name in LOGGED)):
        assert row[key] is None, key
    assert loop.metrics["unscored"] == 0.25


def test_an_unscored_first_row_leaves_the_others_columns_alone(loop, scorer):
    """Failure: the table's columns are taken from a row that has none."""
    scorer.fails = {"have 4"}
    loop.call(FOUR, TRACES)
    rows = loop.rows()
    assert rows[0]["rewards/gain"] is None
    assert all(row["rewards/gain"] is not None for row in rows[1:])


def test_a_row_without_a_baseline_stands_in_the_table_with_the_baselines_reason(loop, scorer):
    """Failure: rows without a reward and without a word why."""
    scorer.fails = {"birds?\nAnswer"}
    assert loop.call(FOUR, TRACES)[0] is None
    assert loop.rows()[0]["reward"] is None
    assert loop.rows()[0]["unscored"] == "the server hates birds?\nAnswer"


def test_every_formulas_mean_is_logged_over_the_scored_rows(loop, scorer):
    """Failure: a curve is missing, or an unscored row pulls a mean towards zero."""
    scorer.fails = {"have 12"}
    loop.call(FOUR, TRACES)
    rows = [row for row in loop.rows() if row["unscored"] is None]
    assert len(rows) == 3
    for name in LOGGED:
        if name in NOT_HERE:
            assert f"rewards/{name}" not in loop.metrics
            continue
        expected = math.fsum(row[f"rewards/{name}"] for row in rows) / 3
        assert loop.metrics[f"rewards/{name}"] == pytest.approx(expected, rel=1e-12), name
    assert loop.metrics["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / 3, rel=1e-12)
    helped = [sum(row["token_logprobs"]) > sum(row["baseline_logprobs"]) for row in rows]
    assert loop.metrics["help_rate"] == pytest.approx(sum(helped) / 3, rel=1e-12)
    assert loop.metrics["trace_tokens"] == sum(row["trace_tokens"] for row in loop.rows()) / 4
    assert loop.metrics["time/scoring"] >= 0


def test_a_batch_without_a_single_score_logs_that_and_no_mean(loop, scorer):
    """Failure: a division by zero, or an accuracy of 0."""
    scorer.fails = {"Question"}
    assert loop.call(FOUR, TRACES) == [None] * 4
    of_rewards = {name for name in loop.metrics if not name.startswith("scoring/")}
    assert of_rewards == {"time/scoring", "unscored", "no_spread", "trace_tokens"}
    assert loop.metrics["scoring/duplicates"] == 0.5
    assert loop.metrics["unscored"] == loop.metrics["no_spread"] == 1


def test_two_generation_batches_of_one_step_are_two_files(loop):
    """Failure: with gradient accumulation the second batch overwrites the first."""
    for step in (0, 0, 1):
        loop.call(FOUR, TRACES, step)
    names = sorted(path.name for path in (loop.folder / "traces").iterdir())
    assert names == [f"step-{name}.parquet" for name in ("000001-000-00", "000001-000-01", "000002-000-00")]


def test_without_a_folder_nothing_is_written(scorer, context_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert None not in Loop(None, scorer, context_tokenizer).call(FOUR, TRACES)
    assert list(tmp_path.iterdir()) == []


def test_the_reward_that_trains_is_the_one_with_its_parameters(tmp_path, scorer, context_tokenizer):
    """Failure: the configured parameters reach the log only, or the log's defaults reach the training."""
    loop = Loop(tmp_path, scorer, context_tokenizer, reward={"threshold": {"tau": -1e9}})
    assert loop.call(FOUR, TRACES) == [1.0] * 4
    assert {row["rewards/threshold"] for row in loop.rows()} != {1.0}


# --- too many unscored rows ---------------------------------------------------------------------------------------


def test_too_many_unscored_rows_stop_the_run_with_the_last_reason(loop, scorer):
    """Failure: a dead server trains nothing for hours, and nobody hears of it."""
    scorer.fails = {"have 4", "have 12"}
    bad = [TRACES[0], TRACES[0], TRACES[2], TRACES[2]]
    for _ in range(2):
        assert loop.call(FOUR, bad) == [None] * 4
    rewards = loop.call(FOUR, [TRACES[0], TRACES[2], " fine", " fine"])
    assert [reward is None for reward in rewards] == [True, True, False, False]
    assert loop.reward.unscored == 10, "10 of the first 1,000 are allowed"
    with pytest.raises(StopRun) as caught:
        loop.call(FOUR, [TRACES[0], " fine", TRACES[2], " fine"])
    message = str(caught.value)
    assert message.startswith("12 of 16 traces could not be scored (--max_unscored 0.01)")
    assert message.endswith("the last reason: the server hates have 12")
    assert loop.rows()[-2]["unscored"] == "the server hates have 12", "the rows that stopped the run are written"


def test_a_few_unscored_rows_of_many_do_not_stop_the_run(loop, scorer):
    """Failure: the share is taken of the last batch in place of the whole run."""
    scorer.fails = {"have 4"}
    loop.reward.seen, loop.reward.unscored = 4996, 49
    loop.call(FOUR, TRACES)
    assert (loop.reward.seen, loop.reward.unscored) == (5000, 50)
    with pytest.raises(StopRun, match="51 of 5004"):
        loop.call(FOUR, TRACES)


def test_with_a_share_of_zero_the_first_unscored_row_stops_the_run(tmp_path, scorer, context_tokenizer):
    loop = Loop(tmp_path, scorer, context_tokenizer, max_unscored=0.0)
    loop.call(FOUR, TRACES)
    scorer.fails = {"have 4"}
    with pytest.raises(StopRun, match="1 of 8"):
        loop.call(FOUR, TRACES)


def test_a_failed_baseline_counts_and_names_its_reason(tmp_path, scorer, context_tokenizer):
    loop = Loop(tmp_path, scorer, context_tokenizer, max_unscored=0.0)
    scorer.fails = {"cats?\nAnswer"}
    with pytest.raises(StopRun, match=r"2 of 4 traces .* the last reason: the server hates cats"):
        loop.call(FOUR, TRACES)


# --- where a trace ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        (" 2 birds.\nAnswer: 4", ("\nAnswer:",), " 2 birds.\nAnswer:"),
        (" 2 birds.\nAnswer: 4\nAnswer: 5", ("\nAnswer:",), " 2 birds.\nAnswer:"),
        (" a\nQuestion: b\nAnswer: 4", ("\nAnswer:", "\nQuestion:"), " a\nQuestion:"),
        (" 2 birds have legs", ("\nAnswer:",), " 2 birds have legs"),
        (" 2 birds have legs", (), " 2 birds have legs"),
    ],
)
def test_ids_are_cut_behind_the_token_that_completes_the_stop_string(context_tokenizer, text, stops, kept):
    """Failure: the policy is trained on tokens after its trace's end, or not on the token that ends it."""
    ids = context_tokenizer(text)["input_ids"]
    cut = cut_at_stop(ids, context_tokenizer, stops)
    assert cut == ids[: len(cut)]
    assert context_tokenizer.decode(cut) == kept


def test_a_stop_string_inside_a_token_keeps_the_whole_token(context_tokenizer):
    """Failure: a token that was sampled is replaced by a part of it."""
    ids = context_tokenizer(" birds have legs")["input_ids"]
    (have,) = context_tokenizer(" have")["input_ids"]
    cut = cut_at_stop(ids, context_tokenizer, ("av",))
    assert cut == ids[: ids.index(have) + 1]


def test_cutting_ids_and_parsing_text_agree_on_the_trace(context_tokenizer):
    """Failure: the policy is trained on other tokens than its reward was given for."""
    for text in (" a\nAnswer: 4", " a\nQuestion: x\nAnswer: 4", " a", "\nAnswer: 4", " 1, 2\n3\nAnswer:"):
        ids = context_tokenizer(text)["input_ids"]
        cut = context_tokenizer.decode(cut_at_stop(ids, context_tokenizer, prompts.STOP_STRINGS))
        assert prompts.parse_trace(cut) == prompts.parse_trace(text)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, prompts.STOP_STRINGS),
        ({"context_template": "chat"}, ()),
        ({"stop_strings": ["."]}, (".",)),
        ({"stop_strings": []}, ()),
        ({"stop_strings": ["."], "context_template": "chat"}, (".",)),
    ],
)
def test_stop_strings_are_those_asked_for_or_the_templates_own(settings, expected):
    """Failure: an explicit empty list means the defaults, or a chat is cut at words of the raw template."""
    assert stop_strings(ContextConfig(**settings)) == expected


# --- checks before a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "save_steps", "multiple"),
    [
        (1, 1, 1, 7, None),
        (1, 4, 1, 8, None),
        (1, 4, 1, 6, 4),
        (1, 4, 2, 12, 8),
        (2, 4, 1, 3, 2),
        (2, 4, 1, 4, None),
        (4, 4, 1, 1, None),
        (2, 2, 3, 2, 3),
    ],
)
def test_a_checkpoint_inside_a_generation_window_is_refused(
    tmp_path, accumulation, per_generation, iterations, save_steps, multiple
):
    """Failure: a resumed run draws traces that the uninterrupted one had reused, and becomes another run."""
    args = grpo(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        save_strategy="steps",
        save_steps=save_steps,
    )
    if multiple is None:
        check_trainer_settings(args)
    else:
        with pytest.raises(ConfigError, match=f"--save_steps {save_steps} falls .* multiple of {multiple} steps"):
            check_trainer_settings(args)


def test_without_checkpoints_any_window_will_do(tmp_path):
    check_trainer_settings(grpo(tmp_path, steps_per_generation=4, save_strategy="no", save_steps=3))


def test_a_prompt_that_leaves_no_room_for_a_trace_is_named(context_tokenizer):
    """Failure: generation runs past the context model's last position."""
    config = ContextConfig()
    tokens = [len(context_tokenizer(prompts.trace_text(e.question))["input_ids"]) for e in EXAMPLES]
    assert max(tokens) == tokens[2] > max(tokens[:2])
    check_prompts_fit(EXAMPLES, config, context_tokenizer, room=tokens[2] + 20, trace_tokens=20)
    with pytest.raises(DataError, match=f"s/2: the prompt does not fit: {tokens[2]} tokens and a trace of up to 20"):
        check_prompts_fit(EXAMPLES, config, context_tokenizer, room=tokens[2] + 19, trace_tokens=20)


def test_a_numeric_reward_of_a_textual_answer_is_refused_before_the_run():
    """Failure: the run dies at the first batch that holds such a row."""
    task = Task("qa", [EXAMPLES[0], Example("qa:9", "Which animal?", "a cat")], [], right)
    check_reward_fits(task, ContextConfig(reward="probability"))
    with pytest.raises(DataError, match=r"^qa:9: .*'a cat'\)?; choose another --reward"):
        check_reward_fits(task, ContextConfig(reward="soft_numeric"))


def test_the_data_set_holds_the_prompt_and_the_id_and_never_the_answer():
    """Failure: the context model is shown what it is to find, or rows lose their example."""
    task = Task("symbolic", EXAMPLES, [], right)
    assert build_dataset(task, ContextConfig()).to_list() == [
        {"prompt": f"Question: {e.question}\nReasoning:", "example_id": e.id} for e in EXAMPLES
    ]
    chat = build_dataset(task, ContextConfig(context_template="chat")).to_list()
    assert [row["prompt"] for row in chat] == [prompts.trace_messages(e.question) for e in EXAMPLES]


# --- the log ------------------------------------------------------------------------------------------------------


def test_the_log_has_a_line_for_rewards_and_none_for_other_logs_or_processes(tmp_path):
    """Failure: transformers' closing statistics, or a second process, put lines among the steps."""
    log = RunLog(tmp_path, SimpleNamespace(seconds=2.5))
    main = SimpleNamespace(is_world_process_zero=True, global_step=3)
    log.on_log(None, main, None, logs={"loss": 0.1, "reward": -0.5, "accuracy": None})
    log.on_log(None, main, None, logs={"train_runtime": 10.0})
    log.on_log(None, main, None, logs=None)
    log.on_log(None, SimpleNamespace(is_world_process_zero=False, global_step=4), None, logs={"loss": 1.0})
    line = {"step": 3, "loss": 0.1, "reward": -0.5, "accuracy": None, "seconds/step": 0.0, "seconds/scoring": 2.5}
    assert runs.read_metrics(tmp_path) == [line]
    log.on_log(None, main, None, logs={"loss": 0.2})
    assert runs.read_metrics(tmp_path)[1]["seconds/scoring"] == 0.0, "seconds are counted once"
    RunLog(None, SimpleNamespace(seconds=0.0)).on_log(None, main, None, logs={"loss": 1.0})


# --- a real run of GRPOTrainer ------------------------------------------------------------------------------------

STOP = " legs"
STEPS = 3


class FlakyScorer(LocalScorer):
    """The real scorer, which loses the third trace of every call that is no baseline."""

    def score(self, items, greedy=None):
        results = super().score(items, greedy)
        if len(items) == 8:
            results[2] = Unscored("lost")
        return results


@pytest.fixture(scope="module")
def real_run(tmp_path_factory, repository, context_tokenizer):
    """Three steps on the tiny models: 2 questions x 4 traces, each cut at " legs", one trace a step unscored."""
    folder = tmp_path_factory.mktemp("run")
    config = ContextConfig(reward="logprob_mean", stop_strings=[STOP])
    task = load_task("symbolic", train_size=8, eval_size=1, seed=1)
    scorer = FlakyScorer(str(repository / "models" / "tiny-base"), device="cpu")
    args = grpo(folder, per_device_train_batch_size=8, num_generations=4, max_steps=STEPS, learning_rate=1e-4, beta=0.0)
    model = AutoModelForCausalLM.from_pretrained(repository / "models" / "tiny-context", dtype=torch.float32)
    questions = Questions(task.train, task.grade, scorer, max_answer_tokens=6)
    reward = LikelihoodReward(questions, config, args, context_tokenizer, folder)
    trainer = build_trainer(model, context_tokenizer, build_dataset(task, config), reward, args, None, folder)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    advantages, batches = [], []
    generate, loss = trainer._generate_and_score_completions, trainer._compute_loss

    def generate_and_keep(inputs):
        output = generate(inputs)
        advantages.append(list(trainer._logs["advantages"])[-8:])
        return output

    def loss_and_keep(model, inputs):
        batches.append({key: inputs[key].clone() for key in ("completion_ids", "completion_mask", "advantages")})
        return loss(model, inputs)

    trainer._generate_and_score_completions, trainer._compute_loss = generate_and_keep, loss_and_keep
    trainer.train()
    steps = [pq.read_table(path).to_pylist() for path in sorted((folder / "traces").iterdir())]
    moved = max((a - b).abs().max().item() for a, b in zip(before, trainer.model.parameters(), strict=True))
    return SimpleNamespace(folder=folder, steps=steps, advantages=advantages, batches=batches, moved=moved)


def completions(batch) -> list[list[int]]:
    """The ids that the loss is taken over, without padding."""
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(*(batch[f"completion_{k}"] for k in ("ids", "mask")), strict=True)
    ]


def test_the_loss_is_taken_over_nothing_behind_the_stop_string(real_run, context_tokenizer):
    """Failure: q is trained on text that the base model never saw, or on an EOS that was never sampled."""
    stopped = 0
    for ids in (ids for batch in real_run.batches for ids in completions(batch)):
        text = context_tokenizer.decode(ids)
        if STOP in text:
            stopped += 1
            assert STOP not in context_tokenizer.decode(ids[:-1])
            assert context_tokenizer.eos_token_id not in ids
        else:
            assert len(ids) == 24 or ids[-1] == context_tokenizer.eos_token_id
    assert stopped > 12, "too few traces reach the stop string to test this"


def test_what_was_trained_on_is_what_was_scored_and_written_down(real_run, context_tokenizer):
    """Failure: TRL's shuffle, or the cut, parts a completion from its own reward."""
    assert len(real_run.batches) == len(real_run.steps) == STEPS
    for batch, rows, advantages in zip(real_run.batches, real_run.steps, real_run.advantages, strict=True):
        texts = [context_tokenizer.decode(ids, skip_special_tokens=True) for ids in completions(batch)]
        traces = [prompts.parse_trace(text, [STOP]) for text in texts]
        trained = zip(traces, map(len, completions(batch)), batch["advantages"].tolist(), strict=True)
        written = [(row["trace"], row["trace_tokens"], a) for row, a in zip(rows, advantages, strict=True)]
        assert sorted(trained) == sorted(written)


def test_the_advantages_in_the_table_are_the_trainers_own(real_run):
    """Failure: a group is cut elsewhere, an unscored row counts, or the scaling is another one."""
    assert len(real_run.advantages) == STEPS
    for rows, theirs in zip(real_run.steps, real_run.advantages, strict=True):
        assert max(map(abs, theirs)) > 0.5
        for start in (0, 4):
            group = rows[start : start + 4]
            rewards = [row["reward"] for row in group if row["reward"] is not None]
            # TRL computes in float32: rounding of the rewards, over what they are divided by.
            tolerance = 2**-22 * max(map(abs, rewards)) / (statistics.stdev(rewards) + 1e-4) + 1e-6
            assert [row["advantage"] for row in group] == pytest.approx(theirs[start : start + 4], abs=tolerance)


def test_an_unscored_trace_has_no_advantage_in_the_trainer(real_run):
    """Failure: None became reward 0, the best log-prob there is."""
    for rows, advantages in zip(real_run.steps, real_run.advantages, strict=True):
        assert [row["unscored"] for row in rows] == [None, None, "lost", *[None] * 5]
        assert rows[2]["reward"] is None
        assert advantages[2] == rows[2]["advantage"] == 0.0


def test_the_run_log_has_one_line_a_step_with_every_formulas_mean(real_run):
    """Failure: curves with missing or doubled steps, or means of other rows than the table's."""
    lines = [json.loads(line) for line in (real_run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, rows in zip(lines, real_run.steps, strict=True):
        scored = [row for row in rows if row["unscored"] is None]
        for name in LOGGED:
            if name in NOT_HERE:
                continue
            mean = math.fsum(row[f"rewards/{name}"] for row in scored) / len(scored)
            assert line[f"rewards/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-7), name
        assert line["reward"] == pytest.approx(line["rewards/logprob_mean"], rel=1e-5)
        assert line["unscored"] == 1 / 8
        assert line["trace_tokens"] == pytest.approx(line["completions/mean_length"], rel=1e-6)


def test_the_step_changes_the_policy(real_run):
    """Failure: everything above is logged, and nothing is trained."""
    assert real_run.moved > 1e-5


def test_without_stop_strings_the_trainers_own_generation_is_used(tmp_path, scorer, context_tokenizer, repository):
    """Failure: `stop_strings: []` does not switch the stop strings off."""
    config, args = ContextConfig(stop_strings=[]), grpo(tmp_path)
    reward = LikelihoodReward(Questions(EXAMPLES, right, scorer), config, args, context_tokenizer, None)
    model = AutoModelForCausalLM.from_pretrained(repository / "models" / "tiny-context", dtype=torch.float32)
    data = build_dataset(Task("symbolic", EXAMPLES, [], right), config)
    trainer = build_trainer(model, context_tokenizer, data, reward, args, None, None)
    assert trainer.rollout_func is None
    assert trainer.reward_func_names == ["reward"]
