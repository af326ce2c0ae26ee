"""What stands in the trace's place at evaluation. A failure means that two conditions that are compared differ by more
than their name says."""

from collections import Counter

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from context_rl.prompts import STOP_STRINGS
from context_rl.questions import Reading
from eval.conditions import evaluate_condition, generate_traces, shuffle_between_questions
from scorer.types import Score, Unscored

PROMPTS = [f"Question: how many {'legs and ' * (i % 7)}legs have {i} birds?\nReasoning:" for i in range(12)]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = tiny.tokenizer_of("llama")
    return tiny.random_model("llama", tokenizer), tokenizer


def traces(model_and_tokenizer, prompts=PROMPTS, **changes) -> list[str]:
    settings = {"sample": False, "max_new_tokens": 12, "stops": STOP_STRINGS, "seed": 0} | changes
    return generate_traces(*model_and_tokenizer, prompts, **settings)


# --- shuffling ----------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.integers(0, 5))
def test_shuffling_leaves_no_trace_in_its_place_and_loses_none(n, seed):
    """Failure: "shuffled" contains a question's own trace, which makes the trained traces look useless."""
    own = [f"trace {i}" for i in range(n)]
    moved = shuffle_between_questions(own, seed)
    assert sorted(moved) == sorted(own)
    assert all(a != b for a, b in zip(own, moved, strict=True))


@given(st.lists(st.sampled_from(["", "a", "b"]), min_size=2))
def test_equal_traces_are_all_kept(own):
    assert Counter(shuffle_between_questions(own)) == Counter(own)


def test_the_shuffle_is_random_but_the_same_every_time():
    own = [str(i) for i in range(30)]
    assert shuffle_between_questions(own) == shuffle_between_questions(own)
    assert shuffle_between_questions(own, 1) != shuffle_between_questions(own, 0)
    shifts = {(int(moved) - i) % 30 for i, moved in enumerate(shuffle_between_questions(own))}
    assert len(shifts) > 5, "neighbours would share their length, and with it the trace's form"


@pytest.mark.parametrize("own", [[], ["only"]])
def test_one_trace_cannot_be_moved(own):
    with pytest.raises(ValueError, match="cannot be moved"):
        shuffle_between_questions(own)


# --- generation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_greedy(model, tokenizer, prompt: str, limit: int) -> str:
    """The reference: argmax after argmax, without padding, cache or `generate`."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + limit and ids[-1] != tokenizer.eos_token_id:
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return min((text.split(stop)[0] for stop in STOP_STRINGS), key=len).strip()


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_greedy_traces_come_in_the_order_of_the_prompts_whatever_the_batch(model_and_tokenizer, batch_size):
    """Failure: traces are scored on other questions, or padding is read as text."""
    expected = [plain_greedy(*model_and_tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) > 6
    assert traces(model_and_tokenizer, batch_size=batch_size) == expected
    backwards = traces(model_and_tokenizer, PROMPTS[::-1], batch_size=batch_size)
    assert backwards == expected[::-1]


def test_a_trace_ends_at_its_stop_string(model_and_tokenizer):
    """Failure: evaluation cuts traces elsewhere than training does."""
    whole = traces(model_and_tokenizer)
    stop = next(text[3] for text in whole if len(text) > 6)
    cut = traces(model_and_tokenizer, stops=(stop,))
    assert cut == [text.split(stop)[0].strip() for text in whole]
    assert cut != whole


def test_sampling_is_reproducible_by_its_seed(model_and_tokenizer):
    """Failure: two evaluations of one model differ, or all seeds are the same one."""
    first = traces(model_and_tokenizer, sample=True, seed=3)
    assert traces(model_and_tokenizer, sample=True, seed=3) == first
    assert traces(model_and_tokenizer, sample=True, seed=4) != first
    assert traces(model_and_tokenizer) != first


def test_sampling_is_from_the_models_whole_distribution(model_and_tokenizer):
    """Failure: generate's own top-k of 50 or a temperature is in force, and another policy than q is evaluated."""
    model, tokenizer = model_and_tokenizer
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])).logits[0, -1]
    rank = logits.argsort(descending=True).argsort()
    n = 3000
    drawn = traces(model_and_tokenizer, [PROMPTS[0]] * n, sample=True, max_new_tokens=1, stops=(), batch_size=n)
    shares = Counter(drawn)
    beyond = logits.softmax(-1)[rank >= 50].sum().item()
    assert beyond > 0.02, "the model has too little beyond its 50 likeliest tokens to test this"
    likely = {tokenizer.decode([i], skip_special_tokens=True).strip() for i in (rank < 50).nonzero()[:, 0].tolist()}
    seen_beyond = sum(count for text, count in shares.items() if text not in likely) / n
    # A rare token whose text is that of a likely one cannot be told from it, and counts on neither side.
    unlikely = (rank >= 50).nonzero()[:, 0].tolist()
    expected = sum(
        logits.softmax(-1)[i].item()
        for i in unlikely
        if tokenizer.decode([i], skip_special_tokens=True).strip() not in likely
    )
    assert seen_beyond == pytest.approx(expected, abs=5 * (expected / n) ** 0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sample", [True, False])
def test_the_random_state_and_the_models_mode_are_left_as_they_were(model_and_tokenizer, training, sample):
    """Failure: a run that evaluates trains on other samples than one that does not."""
    model, _ = model_and_tokenizer
    model.train(training)
    try:
        torch.manual_seed(11)
        expected = torch.rand(5)
        torch.manual_seed(11)
        traces(model_and_tokenizer, sample=sample)
        assert torch.equal(torch.rand(5), expected)
        assert model.training is training
    finally:
        model.eval()


def test_dropout_is_off_while_traces_are_made():
    """Failure: evaluation reads another model than the one that is saved."""
    tokenizer = tiny.tokenizer_of("llama")
    model = tiny.random_model("llama", tokenizer)
    expected = traces((model, tokenizer))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert traces((model, tokenizer)) == expected


def test_chat_prompts_go_through_the_template_without_a_second_bos():
    """Failure: the template's special tokens are added twice, or its generation prompt is missing."""
    tokenizer = tiny.metaspace_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} so{% endif %}"
    )
    model = tiny.random_model("neox", tokenizer)
    fed = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        traces((model, tokenizer), [[{"role": "user", "content": "how many legs?"}]], max_new_tokens=1)
        traces((model, tokenizer), ["how many legs? so"], max_new_tokens=1)
    finally:
        hook.remove()
    ids = [tokenizer.bos_token_id, *tokenizer("how many legs? so", add_special_tokens=False)["input_ids"]]
    assert fed[1] == ids
    assert fed[0].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(fed[0], skip_special_tokens=True).strip() == "how many legs? so"


# --- scoring a condition ------------------------------------------------------------------------------------------


class FakeQuestions:
    """Answers with the number of words in a trace, and has no score for the trace "bad"."""

    def read(self, ids, traces):
        return [
            Unscored("too long")
            if t == "bad"
            else Reading(Score((-0.5, -len((t or "").split()))), answer=f"{i}!", correct=i == "q1")
            for i, t in zip(ids, traces, strict=True)
        ]


def test_every_item_has_a_row_with_its_own_score():
    """Failure: rows are mixed up between blocks, or an unscored one gets a number."""
    ids = ["q0", "q1", "q2"] + [f"x{i}" for i in range(600)]
    own = ["one two", None, "bad"] + ["w " * (i % 5) for i in range(600)]
    found = evaluate_condition(FakeQuestions(), ids, own, "greedy", "test")
    assert [row["id"] for row in found] == ids
    assert [row["trace"] for row in found] == own
    assert found[0] == {
        "id": "q0",
        "decoding": "greedy",
        "trace": "one two",
        "token_logprobs": [-0.5, -2],
        "logprob": -2.5,
        "base_answer": "q0!",
        "correct": False,
        "unscored": None,
    }
    assert (found[1]["logprob"], found[1]["correct"]) == (-0.5, True)
    unscored = {"token_logprobs": None, "logprob": None, "base_answer": None, "correct": None, "unscored": "too long"}
    assert found[2] == {"id": "q2", "decoding": "greedy", "trace": "bad"} | unscored
    assert [row["logprob"] for row in found[3:]] == [-0.5 - i % 5 for i in range(600)]
