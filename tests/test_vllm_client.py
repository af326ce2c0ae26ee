"""The vLLM client against a small server in this process that answers like vLLM 0.31, or wrongly on request.

The fake model has 16 tokens and a log-prob anyone can compute again (`true_logprobs`), so every number is checked and
every fault has to end in `Unscored` or an error.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_vllm import (
    MAX_MODEL_LEN,
    NEWLINE,
    VOCABULARY,
    FakeTokenizer,
    FakeVllm,
    HalfReply,
    Reply,
    true_greedy,
    true_score,
)

import scorer.vllm.client as client_module
from scorer.types import Greedy, Item, Score, ScorerError, Unscored
from scorer.vllm import VllmScorer
from scorer.vllm.replies import (
    BadReply,
    answer_logprobs,
    check_prompt,
    greedy_answer,
    normalisation_fault,
    token_logprob,
)
from scorer.vllm.replies import Reply as VllmReply


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    server = FakeVllm()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.0)


def connect(fake: FakeVllm, **options: Any) -> VllmScorer:
    scorer = VllmScorer(fake.url, tokenizer=FakeTokenizer(), **options)
    fake.bodies.clear()
    return scorer


def edit_rows(edit: Callable[[list], list | None]) -> Callable[[dict, dict], Reply]:
    """A fault that changes the rows of every scoring result."""

    def fault(body: dict, reply: dict) -> Reply:
        for choice in reply["choices"]:
            if choice["prompt_logprobs"] is not None:
                choice["prompt_logprobs"] = edit(choice["prompt_logprobs"])
        return 200, reply

    return fault


ITEM = Item((3, 1, 4), (1, 5))
ITEMS = [ITEM, Item((9, 2), (6, 5, 3)), Item((3, 1, 4), (15,)), Item((2, 7, 1, 8), (2, 8))]


# What is right ----------------------------------------------------------------------------------------------------


def test_scores_are_the_answers_log_probs_in_the_order_of_the_items(fake: FakeVllm) -> None:
    """Fails if positions are off by one, if prefix tokens are counted in, or if results get mixed up over requests."""
    with connect(fake, prompts_per_request=2) as scorer:
        results = scorer.score([*ITEMS, ITEM])
    assert [r.token_logprobs for r in results] == [pytest.approx(true_score(i), abs=1e-12) for i in [*ITEMS, ITEM]]
    assert [r.greedy_text for r in results] == [None] * 5


def test_the_request_names_token_ids_and_every_setting_that_a_server_would_fill_in(fake: FakeVllm) -> None:
    """Fails if text goes out (other tokens could come of it), or a default of generation_config.json could apply."""
    with connect(fake) as scorer:
        scorer.score([ITEM])
    [body] = fake.bodies
    assert body["prompt"] == [[3, 1, 4, 1, 5]]
    assert body["model"] == "fake"
    assert {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "repetition_penalty": 1.0}.items() <= body.items()


def test_equal_items_and_equal_prefixes_are_asked_for_once(fake: FakeVllm) -> None:
    """Fails if the traces that a group shares are paid for several times."""
    with connect(fake) as scorer:
        scorer.score([ITEM, ITEM, ITEMS[2], ITEM], Greedy(4))
    scoring, generating = sorted(fake.bodies, key=lambda body: "stop" in body)
    assert scoring["prompt"] == [[3, 1, 4, 1, 5], [3, 1, 4, 15]]
    assert generating["prompt"] == [[3, 1, 4]]


def test_greedy_answers_end_before_the_stop_string_or_at_the_token_limit(fake: FakeVllm) -> None:
    """Fails if an answer belongs to another prefix, contains the stop string, or the score changes along with it."""
    with connect(fake, prompts_per_request=1) as scorer:
        results = scorer.score(ITEMS, Greedy(5))
    assert [r.greedy_text for r in results] == [true_greedy(i.prefix_ids, 5)[1] for i in ITEMS]
    assert [r.token_logprobs for r in results] == [pytest.approx(true_score(i)) for i in ITEMS]
    assert {true_greedy(i.prefix_ids, 5)[2] for i in ITEMS} == {"stop", "length"}, "the items no longer show both ends"


def test_results_out_of_order_are_put_back_by_their_index(fake: FakeVllm) -> None:
    """Fails if results are taken in the order of the reply: item 1 would get the score of item 4."""

    def fault(body: dict, reply: dict) -> Reply:
        reply["choices"].reverse()
        return 200, reply

    with connect(fake) as scorer:
        fake.fault = fault
        results = scorer.score(ITEMS)
    assert [r.token_logprobs for r in results] == [pytest.approx(true_score(i)) for i in ITEMS]


def test_a_log_prob_of_exactly_zero_with_rank_1_is_a_score(fake: FakeVllm) -> None:
    """Fails if certainty, which float32 rounds to 0.0, is taken for a fault: every well-trained model would be."""
    assert token_logprob({"7": {"logprob": 0.0, "rank": 1}}, 7) == 0.0
    assert token_logprob({"7": {"logprob": 3e-7, "rank": 1}}, 7) == 0.0


def test_hand_computed_rows() -> None:
    """Fails if the pure function takes a row too early or too late: the three values here are all different."""
    rows = [None, {"1": {"logprob": -0.25}}, {"4": {"logprob": -0.5}}, {"1": {"logprob": -1.5}}]
    assert answer_logprobs(rows, Item((3, 1), (4, 1))) == (-0.5, -1.5)
    assert answer_logprobs(rows, Item((3,), (1, 4, 1))) == (-0.25, -0.5, -1.5)


def test_nothing_is_sent_for_no_items(fake: FakeVllm) -> None:
    """Fails if an empty call reaches the server, which refuses an empty prompt list."""
    with connect(fake) as scorer:
        assert scorer.score([]) == []
    assert fake.bodies == []


def test_counters_and_fingerprint(fake: FakeVllm) -> None:
    """Fails if stored scores of two servers could be taken for one another, or failures go uncounted."""
    with connect(fake, prompts_per_request=2) as scorer:
        scorer.score(ITEMS)
        usage = scorer.take_usage()
        assert (usage.items, usage.distinct, usage.requests, usage.retries) == (4, 4, 2, 0)
        assert usage.prompt_tokens == sum(len(i.prefix_ids) + len(i.answer_ids) for i in ITEMS)
        fake.fault = edit_rows(lambda rows: None)
        scorer.score([ITEM, ITEM])
        usage = scorer.take_usage()
        assert (usage.items, usage.distinct, usage.requests, usage.retries) == (2, 1, 3, 2)
        assert usage.faults == {"missing": 3}
        assert usage.unscored == {"missing": 1}
        assert scorer.take_usage().items == 0
        assert scorer.fingerprint == {
            "backend": "vllm",
            "model": "models/fake",
            "weights": "unknown",
            "dtype": "unknown",
            "vllm": "0.31.0",
            "settings": "s",
            "route": "prompt_logprobs",
        }
        assert scorer.max_length == MAX_MODEL_LEN - 1


# Wrong numbers in an HTTP 200 ----------------------------------------------------------------------------------------


def in_last_row(**changes: Any) -> Callable[[list], list]:
    """Changes fields of the last row's entry; a field set to ... is removed."""

    def edit(rows: list) -> list:
        [(token_id, entry)] = rows[-1].items()
        kept = {k: v for k, v in {**entry, **changes}.items() if v is not ...}
        return [*rows[:-1], {token_id: kept}]

    return edit


def rename_row(position: int) -> Callable[[list], list]:
    def edit(rows: list) -> list:
        [(token_id, entry)] = rows[position].items()
        return [*rows[:position], {str(int(token_id) + 1): entry}, *rows[position:][1:]]

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (rename_row(-1), "sent token id 5"),
        (rename_row(1), "sent token id 1"),
        (lambda rows: rows[:-1], "4 rows of log-probs for 5 tokens"),
        (lambda rows: [*rows, rows[-1]], "6 rows of log-probs for 5 tokens"),
        (lambda rows: [*rows[:-1], None], "no log-prob but None"),
        (lambda rows: [*rows[:-1], {}], "nothing"),
        (lambda rows: None, "no prompt_logprobs but None"),
        (in_last_row(logprob=None), "None"),
        (in_last_row(logprob=...), "None"),
        (in_last_row(logprob="-1.5"), "'-1.5'"),
        (in_last_row(logprob=False), "False"),
        (in_last_row(logprob=float("nan")), "nan"),
        (in_last_row(logprob=float("-inf")), "-inf"),
        (in_last_row(logprob=-9999.0), "minus infinity"),
        (in_last_row(logprob=0.25), "above 0"),
        (in_last_row(logprob=0.0, rank=3), "rank 3 contradicts"),
        (in_last_row(logprob=-1.0, rank=0), "rank 0 contradicts"),
    ],
)
def test_no_score_comes_of_a_wrong_row(fake: FakeVllm, edit: Callable[[list], list | None], reason: str) -> None:
    """Fails if a wrong or missing log-prob becomes a number, such as the 0.0 (probability 1) of a careless default."""
    with connect(fake) as scorer:
        assert scorer.score([ITEM]) == [Score(pytest.approx(true_score(ITEM)))]
        fake.fault = edit_rows(edit)
        [result] = scorer.score([ITEM])
    assert isinstance(result, Unscored)
    assert reason in result.reason


def test_a_reply_to_another_trace_with_the_same_answer_is_no_score(fake: FakeVllm) -> None:
    """Fails if only the answer's ids are compared: the traces of a group share them, so swapped scores would pass."""
    first, second = Item((3, 1, 4), (1, 5)), Item((3, 9, 4), (1, 5))

    def swap_everything_but_index(body: dict, reply: dict) -> Reply:
        a, b = reply["choices"]
        a["index"], b["index"] = 1, 0
        return 200, reply

    def swap_rows(body: dict, reply: dict) -> Reply:
        a, b = reply["choices"]
        a["prompt_logprobs"], b["prompt_logprobs"] = b["prompt_logprobs"], a["prompt_logprobs"]
        return 200, reply

    with connect(fake) as scorer:
        for fault in (swap_everything_but_index, swap_rows):
            fake.fault = fault
            assert [type(r) for r in scorer.score([first, second])] == [Unscored, Unscored]


def drop_last(choices: list) -> list:
    return choices[:-1]


@pytest.mark.parametrize(
    ("edit", "scored"),
    [
        (drop_last, [True, False, True, True]),
        (lambda choices: [choices[0], *choices[:-1]], [True, False, True, False]),
        (lambda choices: [{**c, "index": c["index"] + 1} for c in choices], [False] * 4),
        (lambda choices: [{k: v for k, v in c.items() if k != "index"} for c in choices], [False] * 4),
        (lambda choices: {"0": choices[0]}, [False] * 4),
        (lambda choices: None, [False] * 4),
    ],
)
def test_missing_and_doubled_results_leave_their_items_unscored(
    fake: FakeVllm, edit: Callable[[list], Any], scored: list[bool]
) -> None:
    """Fails if results are paired with items by counting: with one missing, the rest would move up by one."""
    with connect(fake) as scorer:
        fake.fault = lambda body, reply: (200, {**reply, "choices": edit(reply["choices"])})
        results = scorer.score(ITEMS)
    assert [isinstance(r, Score) for r in results] == scored
    for result, item in zip(results, ITEMS, strict=True):
        assert isinstance(result, Unscored) or result.token_logprobs == pytest.approx(true_score(item))


@pytest.mark.parametrize("body", ["<html>busy</html>", "", '{"choices": [', "null", "[]", '{"object": "error"}'])
def test_a_200_that_is_no_completion_is_no_score(fake: FakeVllm, body: str) -> None:
    """Fails if a proxy's error page or half a reply raises something unexpected, or is read as a score."""
    with connect(fake) as scorer:
        fake.fault = lambda request, reply: (200, body)
        results = scorer.score(ITEMS)
    assert [type(r) for r in results] == [Unscored] * 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": None}, "token ids None"),
        ({"token_ids": ["5"]}, "token ids ['5']"),
        ({"token_ids": [5, 6], "finish_reason": "stop"}, "ended before"),
        ({"finish_reason": "abort"}, "'abort'"),
        ({"finish_reason": None}, "None"),
        ({"finish_reason": "length", "token_ids": [1, 2]}, "cut at 2 tokens"),
        ({"prompt_token_ids": [3, 1, 5]}, "another prompt"),
    ],
)
def test_a_failed_greedy_answer_takes_the_score_with_it(fake: FakeVllm, changes: dict, reason: str) -> None:
    """Fails if half an answer is graded as the model's own: accuracy would be wrong while the score is right."""

    def fault(body: dict, reply: dict) -> Reply:
        if "stop" in body:
            reply["choices"][0].update(changes)
        return 200, reply

    with connect(fake) as scorer:
        fake.fault = fault
        [result] = scorer.score([ITEM], Greedy(5))
    assert isinstance(result, Unscored)
    assert "greedy answer" in result.reason
    assert reason in result.reason


def test_a_greedy_answer_is_decoded_from_its_ids_and_cut_at_the_stop_string(fake: FakeVllm) -> None:
    """Fails if the server's own text is graded: vLLM 0.31 puts the prompt in front of it where that is no UTF-8."""
    reply = VllmReply([7], finish_reason="stop", token_ids=[1, 2, NEWLINE, 3])
    assert greedy_answer(reply, Greedy(5), FakeTokenizer()) == "bc"

    def fault(body: dict, reply: dict) -> Reply:
        for choice in reply["choices"]:
            choice["text"] = "the prompt's text\n" + choice["text"]
        return 200, reply

    with connect(fake) as scorer:
        fake.fault = fault
        [result] = scorer.score([ITEM], Greedy(5))
    assert result.greedy_text == true_greedy(ITEM.prefix_ids, 5)[1]


def test_no_prompt_is_taken_for_another() -> None:
    """Fails if the pure function stops comparing prompts."""
    check_prompt(VllmReply([1, 2]), (1, 2))
    for prompt_ids in ([1, 3], [1], None, "12"):
        with pytest.raises(BadReply, match="another prompt"):
            check_prompt(VllmReply(prompt_ids), (1, 2))


# Requests that fail --------------------------------------------------------------------------------------------------


def test_one_refused_prompt_does_not_take_the_others_with_it(fake: FakeVllm) -> None:
    """Fails if a 400 for one item costs the whole request's scores."""

    def fault(body: dict, reply: dict) -> Reply:
        bad = [9, 2, 6, 5, 3] in body["prompt"]
        return (400, {"error": {"message": "token out of vocabulary"}}) if bad else (200, reply)

    with connect(fake) as scorer:
        fake.fault = fault
        results = scorer.score(ITEMS)
        usage = scorer.take_usage()
        assert (usage.requests, usage.retries, usage.faults) == (5, 0, {"refused": 1})
    assert [type(r) for r in results] == [Score, Unscored, Score, Score]
    assert results[1].reason == "HTTP 400: token out of vocabulary"
    assert [results[i].token_logprobs for i in (0, 2, 3)] == [pytest.approx(true_score(ITEMS[i])) for i in (0, 2, 3)]


def test_one_refused_option_does_not_take_its_siblings_with_it(fake: FakeVllm) -> None:
    """Fails if an ending that the model has no token for costs the other endings of its question their scores."""
    fake.options = True
    siblings = [Item((3, 1, 4), (answer,)) for answer in (1, 5, 9)]

    def fault(body: dict, reply: dict) -> Reply:
        refused = 5 in body.get("logprob_token_ids", [])
        return (400, {"error": {"message": "out of vocabulary"}}) if refused else (200, reply)

    with connect(fake) as scorer:
        fake.fault = fault
        results = scorer.score(siblings)
    assert [type(r) for r in results] == [Score, Unscored, Score]
    assert [results[i].token_logprobs for i in (0, 2)] == [pytest.approx(true_score(siblings[i])) for i in (0, 2)]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_error_is_tried_again(fake: FakeVllm, status: int) -> None:
    """Fails if one hiccup of the server costs scores, or the repeated request returns something else."""
    answers = iter([status, status])

    def fault(body: dict, reply: dict) -> Reply:
        failing = next(answers, None)
        return (failing, {"error": {"message": "busy"}}) if failing else (200, reply)

    with connect(fake) as scorer:
        fake.fault = fault
        assert scorer.score([ITEM])[0].token_logprobs == pytest.approx(true_score(ITEM))
        usage = scorer.take_usage()
        assert (usage.requests, usage.retries) == (3, 2)


def test_a_lasting_error_leaves_items_unscored_with_the_servers_words(fake: FakeVllm) -> None:
    """Fails if retries never end, or the cause is lost."""
    with connect(fake) as scorer:
        fake.fault = lambda body, reply: (500, {"error": {"message": "engine is dead"}})
        [result] = scorer.score([ITEM])
    assert result == Unscored("HTTP 500: engine is dead (3 attempts)", "server_error")
    assert len(fake.bodies) == 3


def test_a_server_that_hangs_becomes_unscored_after_the_timeout(fake: FakeVllm) -> None:
    """Fails if a hanging request blocks training for good, or times out into a number."""
    with connect(fake, timeout_s=0.2) as scorer:
        fake.fault = lambda body, reply: (time.sleep(1.0), (200, reply))[1]
        start = time.monotonic()
        [result] = scorer.score([ITEM])
    assert result == Unscored("timeout after 0.2 s (3 attempts)", "timeout")
    assert time.monotonic() - start < 3


def test_a_hanging_request_does_not_take_other_requests_with_it(fake: FakeVllm) -> None:
    """Fails if one timeout loses the scores that did arrive."""

    def fault(body: dict, reply: dict) -> Reply:
        if [9, 2, 6, 5, 3] in body["prompt"]:
            time.sleep(1.0)
        return 200, reply

    with connect(fake, timeout_s=0.2, prompts_per_request=1) as scorer:
        fake.fault = fault
        results = scorer.score(ITEMS)
    assert [type(r) for r in results] == [Score, Unscored, Score, Score]


def test_after_a_round_of_unanswered_requests_the_rest_is_not_sent(fake: FakeVllm) -> None:
    """Fails if a hanging server holds a batch of 20 requests for 20 times the timeout, a matter of hours."""
    items = [Item((i % VOCABULARY, i // VOCABULARY, 1), (1,)) for i in range(20)]
    with connect(fake, timeout_s=0.1, prompts_per_request=1, concurrency=2) as scorer:
        fake.fault = lambda body, reply: (time.sleep(0.5), (200, reply))[1]
        results = scorer.score(items)
        assert scorer.take_usage().requests < 20
    assert {type(r) for r in results} == {Unscored}
    assert sum("not sent" in r.reason for r in results) >= 14


def test_a_server_that_is_gone_is_an_error_naming_the_url(fake: FakeVllm) -> None:
    """Fails if a run goes on without a scorer, every item Unscored, instead of stopping with the cause."""
    with connect(fake, prompts_per_request=1) as scorer:
        scorer.score(ITEMS)
        fake.stop()
        with pytest.raises(ScorerError, match=fake.url):
            scorer.score(ITEMS)


def test_a_connection_that_breaks_within_a_reply_is_no_score(fake: FakeVllm) -> None:
    """Fails if the first half of a reply is read as a whole one."""
    with connect(fake, prompts_per_request=1) as scorer:
        fake.fault = lambda body, reply: (200, HalfReply(json.dumps(reply)) if body["prompt"][0][0] == 9 else reply)
        results = scorer.score(ITEMS)
    assert [type(r) for r in results] == [Score, Unscored, Score, Score]
    assert "connection lost" in results[1].reason


def test_a_server_that_now_has_another_model_is_an_error(fake: FakeVllm) -> None:
    """Fails if a restarted server with another model goes on scoring the run."""
    with connect(fake) as scorer:
        fake.fault = lambda body, reply: (404, {"error": {"message": "The model `fake` does not exist."}})
        with pytest.raises(ScorerError, match="does not exist"):
            scorer.score(ITEMS)


# Items that cannot be scored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "greedy", "message"),
    [
        (Item((), (1,)), None, "item 1 has 0 prefix"),
        (Item((1,), ()), None, "item 1 has 1 prefix and 0 answer"),
        (Item((1,) * 60, (1,) * 4), None, "item 1 has 64 tokens, but the model takes 63"),
        (Item((1,) * 60, (1,)), Greedy(4), "item 1 needs 64 tokens"),
        (Item((1,), (1,)), Greedy(0), "at least one token"),
        (Item((1,), (1,)), Greedy(3, stop=""), "a stop string"),
    ],
)
def test_items_that_do_not_fit_are_refused_before_anything_is_sent(
    fake: FakeVllm, item: Item, greedy: Greedy | None, message: str
) -> None:
    """Fails if a prompt is truncated, or half a batch is scored before the error."""
    with connect(fake) as scorer, pytest.raises(ValueError, match=message):
        scorer.score([ITEM, item], greedy)
    assert fake.bodies == []


def test_an_item_of_exactly_the_longest_length_is_scored(fake: FakeVllm) -> None:
    """Fails if the limit is off by one: vLLM refuses max_model_len tokens, for it has to generate one more."""
    item = Item((1, 2) * 30, (3, 4, 5))
    with connect(fake) as scorer:
        assert scorer.score([item])[0].token_logprobs == pytest.approx(true_score(item))


# The start -----------------------------------------------------------------------------------------------------------


def test_nobody_at_the_url_is_an_error_that_says_what_to_do() -> None:
    """Fails if a wrong URL shows as a stack of library errors."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(ScorerError, match=rf"no vLLM server answers at {url}.*vllm serve MODEL"):
        VllmScorer(url, tokenizer=FakeTokenizer())


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((200, "<html>hello</html>"), "not as vLLM does"),
        ((404, {"detail": "Not Found"}), "not as vLLM does"),
        ((200, {"models": []}), "not with a list of models"),
        ((200, {"data": []}), "does not serve None but nothing"),
        ((200, {"data": [{"id": "fake", "root": "m"}]}), "max_model_len"),
        ((200, {"data": [{"id": "a", "root": "m"}, {"id": "b", "root": "n"}]}), "several models; say which: a, b"),
        ((200, {"data": [{"id": "a", "root": "m", "parent": "base", "max_model_len": 9}]}), "LoRA"),
    ],
)
def test_something_else_at_the_url_is_refused(fake: FakeVllm, models: Reply, message: str) -> None:
    """Fails if another kind of server, or the wrong one of several models, would be taken for the frozen model."""
    fake.models = models
    with pytest.raises(ScorerError, match=message):
        VllmScorer(fake.url, tokenizer=FakeTokenizer())


def test_the_model_is_found_by_served_name_or_by_path(fake: FakeVllm) -> None:
    """Fails if a model that is not served is silently replaced by the one that is."""
    for name in ("fake", "models/fake", None):
        with connect(fake, model=name) as scorer:
            assert scorer.served_name == "fake"
    with pytest.raises(ScorerError, match="does not serve 'other' but fake"):
        connect(fake, model="other")


def test_a_tokenizer_of_another_model_is_refused(fake: FakeVllm) -> None:
    """Fails if ids of another vocabulary are sent: they score without any error, as other words."""
    fake.shift_tokenizer = 1
    with pytest.raises(ScorerError, match="tokenizer is not that of the model"):
        connect(fake)


def test_a_tokenizer_that_cannot_be_loaded_is_an_error_that_names_the_way_out(fake: FakeVllm, tmp_path) -> None:
    """Fails if a path that only the server's machine has ends in a library's error."""
    fake.models[1]["data"][0]["root"] = str(tmp_path / "elsewhere")
    with pytest.raises(ScorerError, match="pass tokenizer="):
        VllmScorer(fake.url)


def test_logits_in_place_of_log_probs_are_refused(fake: FakeVllm) -> None:
    """Fails if a server started with --logprobs-mode raw_logits is accepted: its numbers are no probabilities."""
    fake.logits = True
    with pytest.raises(ScorerError, match=r"no log-probs.*raw_logprobs"):
        connect(fake)


def test_processed_log_probs_are_refused(fake: FakeVllm) -> None:
    """Fails if a policy's server, whose log-probs are those after temperature and biases, is accepted."""
    fake.processed = True
    with pytest.raises(ScorerError, match=r"processed log-probs.*raw_logprobs"):
        connect(fake)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda body, reply: (500, {"error": {"message": "out of memory"}}), "out of memory"),
        (edit_rows(lambda rows: None), "no prompt_logprobs"),
        (edit_rows(lambda rows: [None] * len(rows)), "no log-prob but None"),
    ],
)
def test_a_server_that_answers_but_cannot_score_is_refused_at_the_start(
    fake: FakeVllm, fault: Any, message: str
) -> None:
    """Fails if the first batch of a run finds out what one request at the start could have told."""
    fake.fault = fault
    with pytest.raises(ScorerError, match=message):
        VllmScorer(fake.url, tokenizer=FakeTokenizer())


def test_normalisation_by_hand() -> None:
    """Fails if the check lets logits pass, or refuses log-probs: p = 1/2, 1/4, 1/8, 1/8 is a distribution of four."""
    halves = [math.log(p) for p in (1 / 2, 1 / 4, 1 / 8, 1 / 8)]
    assert normalisation_fault(halves, 4) is None
    assert normalisation_fault(halves[:2], 4, top=2) is None  # 3/4, and two others of at most 1/4
    assert "sum up to probability 0.7" in normalisation_fault([v - 0.3 for v in halves], 0)
    assert "sum up to probability 1.2" in normalisation_fault([v + 0.2 for v in halves], 4)
    assert "the largest of them is 0.3" in normalisation_fault([v + 1 for v in halves], 4)
    assert "too much for the rest" in normalisation_fault([-33.0, -35.0, -36.0, -37.0], 50_000)


def test_close_twice_and_score_after_close(fake: FakeVllm) -> None:
    """Fails if a run's clean-up raises, or a closed scorer fails with a library's error."""
    scorer = connect(fake)
    scorer.close()
    scorer.close()
    with pytest.raises(ScorerError, match="was closed"):
        scorer.score([ITEM])


# A server of our own that dies --------------------------------------------------------------------------------------


class Restartable:
    """A `ManagedServer` whose second start is another fake."""

    dtype = "float32"

    def __init__(self, first: FakeVllm, second: FakeVllm) -> None:
        self.fakes, self.generation, self.dead, self.log_path = [first, second], 0, False, "no.log"
        self.served_name = "fake"

    @property
    def url(self) -> str:
        return self.fakes[self.generation].url

    def exit_code(self) -> int | None:
        return 137 if self.dead else None

    def log_tail(self) -> str:
        return "killed"

    def restart_once(self, seen_generation: int, timeout_s: float) -> bool:
        if self.generation > seen_generation:
            return True
        if self.generation:
            raise ScorerError("vLLM died twice")
        self.generation, self.dead = 1, False
        return True

    def close(self) -> None:
        self.dead = True


def test_scoring_goes_on_after_the_managed_server_died_and_stops_when_it_dies_again(fake: FakeVllm) -> None:
    """Fails if a server that ran out of memory once ends the run, or one that always does keeps it waiting."""
    second = FakeVllm()
    server = Restartable(fake, second)
    with VllmScorer(server.url, tokenizer=FakeTokenizer(), server=server) as scorer:
        fake.stop()
        server.dead = True
        assert [r.token_logprobs for r in scorer.score(ITEMS)] == [pytest.approx(true_score(i)) for i in ITEMS]
        assert scorer.url == second.url
        second.stop()
        server.dead = True
        with pytest.raises(ScorerError, match="died twice"):
            scorer.score(ITEMS)
