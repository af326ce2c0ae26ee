"""How the vLLM client finds its routes, plans its requests, and spreads them over servers."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pytest
from fake_vllm import FakeTokenizer, FakeVllm, Reply, true_greedy, true_score
from hypothesis import given
from hypothesis import strategies as st

import scorer.vllm.client as client_module
from scorer.types import Greedy, Item, Score, ScorerError, Unscored
from scorer.vllm import VllmScorer
from scorer.vllm.asks import MAX_OPTIONS, Ask, Routes, plan
from scorer.vllm.probe import takes_rows
from scorer.vllm.replies import offset_logprobs

VOCABULARY = 32
BOTH = ("batch", "generate", "completions")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.0)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeVllm]]:
    """Starts servers, and stops them after the test."""
    started: list[FakeVllm] = []

    def start(paths: tuple[str, ...] = BOTH, version: str | None = "0.31.0", **options: Any) -> FakeVllm:
        started.append(FakeVllm(paths, version, **{"vocabulary": VOCABULARY} | options))
        return started[-1]

    yield start
    for fake in started:
        fake.stop()


def connect(*fakes: FakeVllm, **options: Any) -> VllmScorer:
    vocabulary = fakes[0].vocabulary
    scorer = VllmScorer([fake.url for fake in fakes], tokenizer=FakeTokenizer(vocabulary), **options)
    for fake in fakes:
        fake.bodies.clear()
        fake.paths_seen.clear()
    return scorer


def right(items: list[Item], vocabulary: int = VOCABULARY) -> list[Score]:
    return [Score(pytest.approx(true_score(item, vocabulary), abs=1e-9)) for item in items]


ITEM = Item((3, 1, 4), (1, 5))
ITEMS = [ITEM, Item((9, 2), (6, 5, 3)), Item((3, 1, 4), (15,)), Item((2, 7, 1, 8), (2, 8, 2))]


def groups_of_items(groups: int, traces: int = 4) -> list[Item]:
    """Questions of two tokens, which no others have, with traces that end differently and one answer."""
    return [Item((g // 16, g % 16, 7, t), (g % 5, 9), f"g{g}") for g in range(groups) for t in range(traces)]


def prompts_of(fake: FakeVllm) -> list[tuple[int, ...]]:
    """The prompts that came in, in order, whichever way they travelled."""
    found: list[tuple[int, ...]] = []
    for body in fake.bodies:
        requests = body.get("requests", [body] if "token_ids" in body else [])
        found += [tuple(request["token_ids"]) for request in requests]
        found += [tuple(ids) for ids in body.get("prompt", [])]
    return found


# Which route is taken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "version", "answers", "transport"),
    [
        (BOTH, "0.31.0", "offset_flat", "batch"),
        (("generate", "completions"), "0.31.0", "offset_flat", "generate"),
        (("batch", "completions"), "0.31.0", "offset_flat", "batch"),
        (("completions",), "0.31.0", "prompt_logprobs", "completions"),
        (BOTH, None, "prompt_logprobs", "batch"),
        (("generate", "completions"), None, "prompt_logprobs", "completions"),
        (BOTH, "0.32.0", "offset_rows", "batch"),
        (("generate", "completions"), "0.33.1.dev4+g0a1b2c", "offset_rows", "generate"),
        (("completions",), "0.33.0", "prompt_logprobs", "completions"),
    ],
)
def test_the_fastest_route_that_the_server_has_is_taken(
    serve: Callable, paths: tuple[str, ...], version: str | None, answers: str, transport: str
) -> None:
    """Fails if a server's fast way goes unused, or one is tried for every request that the server refuses."""
    fake = serve(paths, version)
    with connect(fake) as scorer:
        assert scorer.routes.answers == answers, scorer.notes
        assert scorer.score(ITEMS) == right(ITEMS)
        assert scorer.fingerprint["route"] == answers
        assert scorer.take_usage().faults == {}
    assert set(fake.paths_seen) == {transport}


@pytest.mark.parametrize("version", ["", "dev", "nightly-2026", "0.32rc1", "v0.31.0"])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_version_that_nobody_knows_gets_the_form_that_works(serve: Callable, version: str, by_row: bool) -> None:
    """Fails if the version's string decides alone: a build of one's own would fall to the slow route."""
    fake = serve(BOTH, version or "?")
    fake.by_row = by_row
    with connect(fake) as scorer:
        assert scorer.routes.answers == ("offset_rows" if by_row else "offset_flat")
        assert scorer.score(ITEMS) == right(ITEMS)


def test_versions_are_compared_as_numbers() -> None:
    """Fails if 0.9 counts as newer than 0.32, or an unknown version as a known one."""
    newest = ["0.32.0", "0.32", "0.33.1.dev4+g0a1b2c", "0.100.0", "1.0", "1.0.0+cu129"]
    assert [takes_rows(version) for version in newest] == [True] * 6
    assert [takes_rows(version) for version in ["nightly", ""]] == [None] * 2
    assert [takes_rows(version) for version in ["0.31.0", "0.31.0+cu129", "0.9.2", "0.31.1.dev3", "0.4"]] == [False] * 5


@pytest.mark.parametrize(("version", "answers"), [("0.31.0", "offset_flat"), ("0.33.0", "offset_rows")])
def test_a_route_whose_numbers_are_wrong_is_refused_and_the_exact_one_scores(
    serve: Callable, version: str, answers: str
) -> None:
    """Fails if a route that is half a nat off is used, or is left out without a word."""
    fake = serve(BOTH, version)
    fake.shift = -0.5
    with connect(fake) as scorer:
        assert scorer.routes.answers == "prompt_logprobs"
        [note] = [note for note in scorer.notes if note.startswith(answers)]
        assert scorer.score(ITEMS) == right(ITEMS)
    words = note.replace("(", " ").split()
    got, exact = float(words[words.index("log-prob") + 1]), float(words[words.index("gives") + 1])
    assert got == pytest.approx(exact - 0.5, abs=2e-4)


def test_a_route_that_is_wrong_only_with_a_warm_cache_is_refused(serve: Callable) -> None:
    """Fails if the probe scores its items once: a prefix cache that answers wrongly would not be seen."""
    fake, seen = serve(BOTH), Counter()

    def fault(body: dict, reply: dict) -> Reply:
        for request, result in zip(body.get("requests", []), reply.get("results", []), strict=True):
            key = tuple(request["token_ids"])
            if result.get("prompt_token_id_logprobs") and len(key) > 20:
                seen[key] += 1
                if seen[key] > 1:
                    rows = result["prompt_token_id_logprobs"]
                    result["prompt_token_id_logprobs"] = [[value - 1.0 for value in row] for row in rows]
        return 200, reply

    fake.fault = fault
    with connect(fake) as scorer:
        assert scorer.routes.answers == "prompt_logprobs"
    assert any("with a warm prefix cache" in note for note in scorer.notes)


def test_a_pinned_route_that_is_wrong_or_missing_is_an_error(serve: Callable) -> None:
    """Fails if a run that asked for one route is scored by another, or the error keeps the numbers to itself."""
    fake = serve()
    with connect(fake, route="offset_flat") as scorer:
        assert scorer.routes.answers == "offset_flat"
    with connect(fake, route="prompt_logprobs") as scorer:
        assert scorer.routes.answers == "prompt_logprobs"
        assert scorer.score(ITEMS) == right(ITEMS)
    with pytest.raises(ScorerError, match="'offset_rows' cannot be used here"):
        connect(fake, route="offset_rows")
    with pytest.raises(ScorerError, match="'offset_flat' cannot be used here"):
        connect(serve(("completions",)), route="offset_flat")
    fake.shift = -0.5
    with pytest.raises(ScorerError, match=r"log-prob -\d+\.\d+ where prompt_logprobs gives -\d+\.\d+"):
        connect(fake, route="offset_flat")


@pytest.mark.parametrize(("allowed", "found"), [(20, 20), (63, 20), (64, 64), (1024, 1024), (5000, 1024)])
def test_answers_with_more_ids_than_a_flat_request_takes_go_the_slow_way_and_are_right(
    serve: Callable, allowed: int, found: int
) -> None:
    """Fails if --max-logprobs is exceeded (HTTP 400, and the longest answers go unscored) or not used to the full."""
    fake = serve(BOTH, max_ids=allowed, vocabulary=1100, max_model_len=400)
    longest = min(found, 300)
    items = [Item((1, 2), tuple(range(3, 3 + n))) for n in (longest - 1, longest, longest + 1)]
    items.append(Item((1, 2), (5, 6) * 40))
    with connect(fake) as scorer:
        assert (scorer.routes.answers, scorer.routes.max_ids) == ("offset_flat", found)
        assert scorer.score(items) == right(items, 1100)
        assert scorer.take_usage().faults == {}
    sent = [request["sampling_params"] for body in fake.bodies for request in body["requests"]]
    slow = sum("prompt_logprobs" in params for params in sent)
    assert slow == (1 if found <= 300 else 0)


# Scores that a cache hit costs ---------------------------------------------------------------------------------------


def test_scores_that_a_cache_hit_cost_are_asked_for_once_more_without_the_cache(serve: Callable) -> None:
    """Fails if vLLM's dropped scores become Unscored, or the cache is avoided where it costs nothing."""
    fake = serve()
    fake.cache = set()
    with connect(fake) as scorer:
        assert scorer.routes.answers == "offset_flat", scorer.notes
        fake.cache.clear()
        assert scorer.score(ITEMS) == right(ITEMS)
        first = scorer.take_usage()
        assert scorer.score(ITEMS) == right(ITEMS)
        second = scorer.take_usage()
    assert (first.uncached, first.retries, first.faults) == (0, 0, {})
    assert (second.uncached, second.retries, second.faults, second.unscored) == (4, 0, {}, {})
    skips = [r["sampling_params"]["skip_reading_prefix_cache"] for body in fake.bodies for r in body["requests"]]
    assert skips == [False] * 8 + [True] * 4


def test_scores_that_stay_away_without_the_cache_too_are_missing(serve: Callable) -> None:
    """Fails if a server that never returns scores is asked without end, or an absent score becomes a number."""
    fake = serve()

    def fault(body: dict, reply: dict) -> Reply:
        for result in reply["results"]:
            result["prompt_token_id_logprobs"] = None
        return 200, reply

    with connect(fake) as scorer:
        fake.fault = fault
        [result] = scorer.score([ITEM])
        usage = scorer.take_usage()
    assert (type(result), result.fault) == (Unscored, "missing")
    assert (usage.uncached, usage.faults, usage.unscored, usage.requests) == (1, {"missing": 3}, {"missing": 1}, 4)


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [BOTH, ("completions",)])
def test_one_token_answers_of_one_prefix_are_one_request(serve: Callable, paths: tuple[str, ...]) -> None:
    """Fails if four options cost four requests, or one gets the log-prob of another."""
    fake = serve(paths)
    fake.options = True
    items = [Item((3, 1, 4), (token_id,), "q") for token_id in (4, 9, 2, 31)]
    with connect(fake) as scorer:
        assert scorer.routes.options, scorer.notes
        assert scorer.score(items) == right(items)
        usage = scorer.take_usage()
    assert (usage.requests, usage.distinct, usage.prompt_tokens) == (1, 4, 3)
    assert prompts_of(fake) == [(3, 1, 4)]


@pytest.mark.parametrize("paths", [BOTH, ("completions",)])
def test_options_whose_numbers_are_wrong_are_not_used(serve: Callable, paths: tuple[str, ...]) -> None:
    """Fails if options are taken on trust: in vLLM they take another way through the sampler than answers do."""
    fake = serve(paths)
    fake.options = True

    def fault(body: dict, reply: dict) -> Reply:
        for result in reply.get("results", []):
            for row in result["choices"][0]["logprobs"] or []:
                for entry in row.values():
                    entry["logprob"] -= 0.7
        for choice in reply.get("choices", []):
            for top in (choice["logprobs"] or {}).get("top_logprobs", []):
                top.update({key: value - 0.7 for key, value in top.items()})
        return 200, reply

    fake.fault = fault
    items = [Item((3, 1, 4), (token_id,)) for token_id in (4, 9)]
    with connect(fake) as scorer:
        assert not scorer.routes.options
        assert any(note.startswith("options") and "where prompt_logprobs gives" in note for note in scorer.notes)
        assert scorer.score(items) == right(items)


def test_more_options_than_one_request_takes_are_several_requests(serve: Callable) -> None:
    """Fails if a request names more ids than the server allows, or the last few options are lost."""
    fake = serve(BOTH)
    fake.options = True
    items = [Item((3, 1, 4), (token_id,)) for token_id in range(VOCABULARY)]
    with connect(fake) as scorer:
        assert scorer.score(items) == right(items)
    sizes = [len(r["sampling_params"]["logprob_token_ids"]) for body in fake.bodies for r in body["requests"]]
    assert sizes == [20, 12]


# The plan ------------------------------------------------------------------------------------------------------------

tokens = st.integers(0, 5)
some_items = st.lists(
    st.builds(
        Item,
        st.lists(tokens, min_size=1, max_size=3).map(tuple),
        st.lists(tokens, min_size=1, max_size=4).map(tuple),
        st.sampled_from(["", "a", "b", "c"]),
    ),
    max_size=30,
).map(lambda items: list(dict.fromkeys(items)))
some_routes = st.builds(
    Routes,
    st.sampled_from(["offset_flat", "offset_rows", "prompt_logprobs"]),
    st.booleans(),
    st.integers(1, 4),
)


def runs(values: list) -> list:
    return [value for value, _ in groupby(values)]


@given(some_items, some_routes, st.booleans())
def test_every_item_is_in_exactly_one_request_and_greedy_answers_come_last(
    items: list[Item], routes: Routes, with_greedy: bool
) -> None:
    """Fails if the plan loses an item, asks for one twice, or generates before the prefixes are cached."""
    asks = plan(items, Greedy(3) if with_greedy else None, routes)
    assert Counter(item for ask in asks for item in ask.items) == Counter(items)
    kinds = [ask.kind for ask in asks]
    assert "greedy" not in kinds[: len(kinds) - kinds.count("greedy")]
    greedy = [ask.prompt for ask in asks if ask.kind == "greedy"]
    assert Counter(greedy) == (Counter({item.prefix_ids for item in items}) if with_greedy else Counter())


@given(some_items, some_routes)
def test_each_request_is_for_the_tokens_of_its_items(items: list[Item], routes: Routes) -> None:
    """Fails if a request's prompt, offset or ids are those of another item, or of a kind that the server lacks."""
    for ask in plan(items, None, routes):
        if ask.kind == "options":
            assert routes.options
            assert {item.prefix_ids for item in ask.items} == {ask.prompt}
            ids = ask.params["logprob_token_ids"]
            assert {(token_id,) for token_id in ids} >= {item.answer_ids for item in ask.items}
            assert len(ids) <= min(MAX_OPTIONS, max(routes.max_ids, 2))  # one option comes with a witness
            continue
        [item] = ask.items
        assert ask.prompt == item.prefix_ids + item.answer_ids
        assert not (routes.options and len(item.answer_ids) == 1)
        too_many = routes.answers == "offset_flat" and len(set(item.answer_ids)) > routes.max_ids
        assert ask.kind == ("prompt_logprobs" if too_many else routes.answers)
        if ask.kind == "prompt_logprobs":
            assert ask.params["prompt_logprobs"] == 0
        else:
            ids = ask.params["prompt_logprob_token_ids"]
            rows = ids if ask.kind == "offset_rows" else [ids] * len(item.answer_ids)
            assert ask.params["prompt_logprob_start"] == len(item.prefix_ids) - 1
            assert all(token_id in row for token_id, row in zip(item.answer_ids, rows, strict=True))


@given(some_items, some_routes)
def test_groups_and_siblings_are_side_by_side(items: list[Item], routes: Routes) -> None:
    """Fails if the items of a group, or of one prefix within it, are torn apart: the cache would have dropped them."""
    asks = [ask for ask in plan(items, None, routes) if ask.kind != "options"]
    groups = runs([ask.group for ask in asks])
    assert len(groups) == len(set(groups))
    siblings = runs([(ask.group, ask.items[0].prefix_ids) for ask in asks])
    assert len(siblings) == len(set(siblings))


def test_duplicates_are_sent_once_and_answered_each(serve: Callable) -> None:
    """Fails if what GRPO repeats is paid for again, or a repetition gets no score."""
    fake = serve()
    items = [*ITEMS, ITEM, Item(ITEM.prefix_ids, ITEM.answer_ids, "another group"), *ITEMS]
    with connect(fake) as scorer:
        assert scorer.score(items) == right(items)
        usage = scorer.take_usage()
    assert (usage.items, usage.distinct) == (10, 4)
    assert usage.metrics()["duplicates"] == 0.6
    assert Counter(prompts_of(fake)) == Counter(item.prefix_ids + item.answer_ids for item in ITEMS)


# Replicas ------------------------------------------------------------------------------------------------------------


def places(*fakes: FakeVllm) -> list[Counter]:
    """How often each server was asked about each question (its first two tokens)."""
    return [Counter(prompt[:2] for prompt in prompts_of(fake)) for fake in fakes]


def test_a_group_stays_with_its_server_and_servers_get_equally_many(serve: Callable) -> None:
    """Fails if a group's shared prefix is computed on every replica, or one replica does the work of two."""
    a, b = serve(), serve()
    items = groups_of_items(20)
    with connect(a, b) as scorer:
        for _ in range(3):
            assert scorer.score(items) == right(items)
        assert scorer.score(items[::-1]) == right(items[::-1])
    at_a, at_b = places(a, b)
    assert not set(at_a) & set(at_b)
    assert (len(at_a), len(at_b)) == (10, 10)
    assert set(at_a.values()) == set(at_b.values()) == {16}


def test_groups_of_a_dead_server_move_to_the_other(serve: Callable) -> None:
    """Fails if half of the scores are lost with one of two servers, or groups go on waiting for the dead one."""
    a, b = serve(), serve()
    items = groups_of_items(20)
    with connect(a, b) as scorer:
        assert scorer.score(items) == right(items)
        b.stop()
        a.bodies.clear()
        assert scorer.score(items) == right(items)
        usage = scorer.take_usage()
        assert set(usage.faults) == {"connection"}
        assert usage.unscored == {}
        assert scorer.score(items) == right(items)
        assert scorer.take_usage().faults == {}, "the dead server was asked again"
    assert len(places(a)[0]) == 20


def test_what_a_dead_server_leaves_is_sent_to_the_other_at_once(serve: Callable) -> None:
    """Fails if the second attempt goes to the server that has just failed: with one that hangs, another timeout."""
    a, b = serve(), serve()
    items = groups_of_items(20)
    with connect(a, b) as scorer:
        scorer.score(items)
        scorer.take_usage()
        b.stop()
        assert scorer.score(items) == right(items)
        assert scorer.take_usage().faults == {"connection": 40}


def test_requests_that_one_server_fails_succeed_on_the_other(serve: Callable) -> None:
    """Fails if a server in trouble is asked three times while another is well."""
    a, b = serve(), serve()
    items = groups_of_items(8)
    with connect(a, b) as scorer:
        b.fault = lambda body, reply: (500, {"error": {"message": "out of memory"}})
        assert scorer.score(items) == right(items)
        usage = scorer.take_usage()
    assert (usage.faults, usage.retries, usage.unscored) == ({"server_error": 16}, 16, {})


def test_servers_of_different_models_are_refused_at_the_start(serve: Callable) -> None:
    """Fails if half of the rewards come from another model."""
    a, b = serve(), serve()
    with connect(a, b) as scorer:
        assert scorer.routes.answers == "offset_flat"
    b.model = 1
    with pytest.raises(ScorerError, match=f"{b.url} holds another model than {a.url}: log-prob -.* gives -"):
        connect(a, b)


def test_servers_of_different_abilities_are_used_by_what_they_have_in_common(serve: Callable) -> None:
    """Fails if one replica's route is taken on another that lacks it."""
    a, b = serve(), serve(("completions",), None)
    a.options = True
    items = groups_of_items(8)
    with connect(a, b) as scorer:
        assert scorer.routes == Routes("prompt_logprobs", False, 20)
        assert scorer.score(items) == right(items)
    assert (set(a.paths_seen), set(b.paths_seen)) == ({"batch"}, {"completions"})


def test_an_answer_that_only_one_server_can_give_is_not_asked_of_the_other(serve: Callable) -> None:
    """Fails if a smaller --max-logprobs of the second replica is overlooked."""
    a, b = (serve(max_ids=n, vocabulary=1100, max_model_len=400) for n in (1024, 20))
    items = [Item((g, 2), tuple(range(3, 43)), f"g{g}") for g in range(6)]
    with connect(a, b) as scorer:
        assert scorer.routes.max_ids == 20
        assert scorer.score(items) == right(items, 1100)
        assert scorer.take_usage().faults == {}


def test_two_dead_servers_are_an_error(serve: Callable) -> None:
    """Fails if a run goes on without any scorer."""
    a, b = serve(), serve()
    with connect(a, b) as scorer:
        scorer.score(ITEMS)
        a.stop()
        b.stop()
        with pytest.raises(ScorerError, match="no vLLM server answers"):
            scorer.score(groups_of_items(8))


# Counting, and several callers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [("batch", "completions"), ("generate", "completions"), ("completions",)])
def test_cached_tokens_requests_and_latencies_are_counted(serve: Callable, paths: tuple[str, ...]) -> None:
    """Fails if the log's cached share, request count or latency is made up: 2 tokens of each prompt were cached."""
    fake = serve(paths)
    fake.cached_tokens = 2
    with connect(fake, prompts_per_request=2) as scorer:
        scorer.take_usage()
        assert scorer.score(ITEMS) == right(ITEMS)
        usage = scorer.take_usage()
    tokens_sent = sum(len(item.prefix_ids) + len(item.answer_ids) for item in ITEMS)
    requests = 4 if "generate" in paths else 2
    assert (usage.prompt_tokens, usage.cached_tokens, usage.requests) == (tokens_sent, 8, requests)
    assert len(usage.latencies) == requests == len(fake.bodies)
    assert all(0 < latency <= usage.seconds for latency in usage.latencies)
    metrics = usage.metrics()
    assert metrics["cached_share"] == 8 / tokens_sent
    assert metrics["latency_p50"] <= metrics["latency_p95"] == max(usage.latencies)
    assert (metrics["unscored"], metrics["duplicates"], metrics["items"]) == (0.0, 0.0, 4)


def test_a_latency_is_that_of_its_request(serve: Callable) -> None:
    """Fails if a slow server shows as a fast one."""
    fake = serve()
    with connect(fake) as scorer:
        scorer.take_usage()
        fake.fault = lambda body, reply: (time.sleep(0.2), (200, reply))[1]
        scorer.score(ITEMS)
        usage = scorer.take_usage()
    assert 0.2 <= usage.latencies[0] <= usage.seconds


@pytest.mark.parametrize("paths", [BOTH, ("generate", "completions"), ("completions",)])
def test_threads_that_score_at_once_get_their_own_results(serve: Callable, paths: tuple[str, ...]) -> None:
    """Fails if callers share anything but connections: one would be paid with another's scores."""
    a, b = serve(paths), serve(paths)
    lots = [
        [Item((caller, i // 16, i % 16), ((caller + i) % 16, caller), f"{caller}/{i // 4}") for i in range(30)]
        for caller in range(8)
    ]
    start = threading.Barrier(len(lots))

    def call(items: list[Item]) -> list:
        start.wait()
        return [scorer.score(items, Greedy(4)) for _ in range(2)]

    with connect(a, b, prompts_per_request=8) as scorer, ThreadPoolExecutor(len(lots)) as pool:
        scorer.take_usage()
        found = list(pool.map(call, lots))
        usage = scorer.take_usage()
    for items, rounds in zip(lots, found, strict=True):
        truth = [
            Score(one.token_logprobs, true_greedy(i.prefix_ids, 4)[1])
            for one, i in zip(right(items), items, strict=True)
        ]
        assert rounds == [truth, truth]
    assert (usage.items, usage.distinct, usage.faults) == (480, 480, {})
    assert usage.requests == len(a.bodies) + len(b.bodies) == len(usage.latencies)


# Hand-computed rows --------------------------------------------------------------------------------------------------


def test_flat_rows_by_hand() -> None:
    """Fails if a column or a row is taken for its neighbour: all six values here are different.

    The answer is 9 4 9, so the columns are 4 and 9; the answer's own values stand in columns 2, 1 and 2.
    """
    rows = [[-3.0, -0.25], [-0.5, -2.0], [-4.0, -1.5]]
    assert offset_logprobs(rows, [[4, 9]] * 3, (9, 4, 9)) == (-0.25, -0.5, -1.5)
    assert offset_logprobs(rows, [[9, 4]] * 3, (9, 4, 9)) == (-3.0, -2.0, -4.0)


def test_by_row_values_by_hand() -> None:
    """Fails if a row is taken for its neighbour, or one id a row is read as a list of ids for all rows."""
    rows = [[-0.25], [-0.5], [-1.5]]
    assert offset_logprobs(rows, [[9], [4], [9]], (9, 4, 9)) == (-0.25, -0.5, -1.5)
    assert offset_logprobs([[-0.25, -7.0], [-0.5, -8.0]], [[9, 0], [0, 4]], (9, 4)) == (-0.25, -8.0)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (None, "missing"),
        ({"0": [-1.0, -2.0]}, "missing"),
        ([], "rows"),
        ([[-1.0, -2.0]], "rows"),
        ([[-1.0, -2.0]] * 3, "rows"),
        ([[-1.0, -2.0], [-1.0]], "rows"),
        ([[-1.0, -2.0], [-1.0, -2.0, -3.0]], "rows"),
        ([[-1.0, -2.0], None], "rows"),
        ([[-1.0, -2.0], -1.0], "rows"),
        ([[-1.0, -2.0], [math.nan, -2.0]], "not_a_number"),
        ([[-1.0, -2.0], [None, -2.0]], "not_a_number"),
        ([[-1.0, -2.0], [-9999.0, -2.0]], "minus_infinity"),
        ([[-1.0, -2.0], [-math.inf, -2.0]], "minus_infinity"),
        ([[-1.0, -2.0], [0.5, -2.0]], "impossible"),
        ([[-1.0, -2.0], [-2.0, 0.5]], "impossible"),
        ([[-0.6, -0.6], [-1.0, -2.0]], "impossible"),  # 0.549 + 0.549 > 1
        ([[0.0, 0.0], [0.0, 0.0]], "impossible"),
    ],
)
def test_rows_that_do_not_fit_by_hand(rows: Any, fault: str) -> None:
    """Fails if one of these becomes a number. The answer is 9 4; the columns are 4 and 9."""
    result = offset_logprobs(rows, [[4, 9]] * 2, (9, 4))
    assert (type(result), result.fault) == (Unscored, fault)


def test_a_neighbours_minus_infinity_costs_nothing() -> None:
    """Fails if a column that nobody asked about takes a good score with it: 9 is impossible here, 4 is certain."""
    assert offset_logprobs([[0.0, -math.inf]], [[4, 9]], (4,)) == (0.0,)
    assert offset_logprobs([[0.0, -9999.0]], [[4, 9]], (4,)) == (0.0,)


def test_an_ask_without_the_cache_differs_in_nothing_else() -> None:
    """Fails if the repeated request asks for something else than the first."""
    ask = Ask("offset_flat", (1, 2, 3), {"prompt_logprob_start": 1, "skip_reading_prefix_cache": False}, (ITEM,), "g")
    again = ask.without_cache()
    assert again.params == {"prompt_logprob_start": 1, "skip_reading_prefix_cache": True}
    assert (again.kind, again.prompt, again.items, again.group) == ("offset_flat", (1, 2, 3), (ITEM,), "g")
    assert ask.params["skip_reading_prefix_cache"] is False
