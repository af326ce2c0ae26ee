"""The vLLM client against a server that fails in every way that we could think of: it must not invent a score.

`Injector` makes the fake server fail, by a plan drawn from a seed, and writes down what it did. `audit` then compares
what the client returned and counted with what is true and with what was injected. The unit of counting is one ask
delivered once: a request of four asks that ends in HTTP 500 is four faults. The same audit is run on clients that are
broken on purpose, and has to find them out.
"""

import base64
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_vllm import FakeTokenizer, FakeVllm, HalfReply, Reply, Wire, encoded, true_score, unpacked
from hypothesis import example, given
from hypothesis import strategies as st

import scorer.vllm.asks as asks_module
import scorer.vllm.client as client_module
import scorer.vllm.http as http_module
import scorer.vllm.replies as replies_module
from context_rl.config import ContextConfig
from context_rl.questions import Questions, Reading
from context_rl.tasks import Example
from context_rl.training import LikelihoodReward, StopRun
from scorer.types import FAULTS, Item, Score, Unscored, Usage
from scorer.vllm import VllmScorer
from scorer.vllm.http import decoded
from scorer.vllm.replies import BadReply, answer_logprobs, check_value, offset_logprobs

VOCABULARY = 32
"""At least 20, so that the flat form of score-from-offset may name the ids that its probe tries."""
TIMEOUT_S = 1.5
PER_REQUEST = 4
STORM = 6
"""Times in a row that HTTP 429 is answered."""


@dataclass(frozen=True)
class Setting:
    """A server, and the route that its version makes the client take."""

    transport: str
    version: str | None
    route: str

    def serve(self) -> FakeVllm:
        paths = ("completions",) if self.transport == "completions" else (self.transport, "completions")
        return FakeVllm(paths, self.version, vocabulary=VOCABULARY)

    @property
    def size(self) -> int:
        """Asks in one request."""
        return 1 if self.transport == "generate" else PER_REQUEST


SETTINGS = {
    "batch": Setting("batch", "0.31.0", "offset_flat"),
    "batch by row": Setting("batch", "0.33.0", "offset_rows"),
    "generate": Setting("generate", "0.31.0", "offset_flat"),
    "completions": Setting("completions", None, "prompt_logprobs"),
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_S", 0.0)


def connect(fake: FakeVllm, **options: Any) -> VllmScorer:
    options = {"timeout_s": TIMEOUT_S, "prompts_per_request": PER_REQUEST} | options
    return VllmScorer(fake.url, tokenizer=FakeTokenizer(VOCABULARY), **options)


def make_items(count: int, seed: int) -> list[Item]:
    """Questions with eight traces each, which share the answer; no two items have the same tokens in all."""
    draw, items, seen = random.Random(seed), [], set()
    while len(items) < count:
        question = tuple(draw.choices(range(16), k=5))
        answer = tuple(draw.choices(range(16), k=draw.choice([1, 2, 3])))
        for _ in range(8):
            item = Item(question + tuple(draw.choices(range(16), k=draw.randint(3, 6))), answer, str(question))
            if item.prefix_ids + answer not in seen:
                seen.add(item.prefix_ids + answer)
                items.append(item)
    return items[:count]


# What is wrong with a reply ------------------------------------------------------------------------------------------

Rows = list
"""Of an offset reply: [row][column] of log-probs; of prompt_logprobs: None and {id: {"logprob", "rank"}}."""


@dataclass(frozen=True)
class Kind:
    """One way to fail.

    Attributes:
        fault: the name in `scorer.types.FAULTS` under which the client has to count it; "lost" where it has to ask
            again without the cache; None where it may not notice, because nothing is wrong with the scores.
        edit: of the result of one ask, in place: (result, item, setting) -> None; None for kinds that concern a
            request as a whole.
        final: no other attempt is made, so that the item stays Unscored.
        fits: whether it can be injected into this item.
    """

    fault: str | None
    edit: Callable[[dict, Item, Setting], None] | None = None
    final: bool = False
    fits: Callable[[Item], bool] = lambda item: True


def in_rows(edit: Callable[[Rows, Item], Any]) -> Callable[[dict, Item, Setting], None]:
    """An edit of one result's rows, in whichever form they travel."""

    def apply(result: dict, item: Item, setting: Setting) -> None:
        if setting.route == "prompt_logprobs":
            result["prompt_logprobs"] = edit(result["prompt_logprobs"], item)
            return
        rows = result["prompt_token_id_logprobs"]
        rows = edit(unpacked(rows) if setting.transport == "generate" else rows, item)
        result["prompt_token_id_logprobs"] = encoded(rows) if setting.transport == "generate" and rows else rows

    return apply


def in_cell(value: Any) -> Callable[[dict, Item, Setting], None]:
    """Sets the log-prob of the answer's last token."""

    def apply(result: dict, item: Item, setting: Setting) -> None:
        def edit(rows: Rows, item: Item) -> Rows:
            if setting.route == "prompt_logprobs":
                rows[-1][str(item.answer_ids[-1])]["logprob"] = value
            else:
                columns = asks_module.offset_columns(setting.route, item.answer_ids)
                rows[-1][list(columns[-1]).index(item.answer_ids[-1])] = value
            return rows

        in_rows(edit)(result, item, setting)

    return apply


def in_entry(**changes: Any) -> Callable[[dict, Item, Setting], None]:
    """Changes the fields of the answer's last token; one set to ... is removed."""

    def edit(rows: Rows, item: Item) -> Rows:
        entry = {**rows[-1][str(item.answer_ids[-1])], **changes}
        return [*rows[:-1], {str(item.answer_ids[-1]): {k: v for k, v in entry.items() if v is not ...}}]

    return in_rows(edit)


def set_field(name: str, change: Callable[[Any], Any]) -> Callable[[dict, Item, Setting], None]:
    def edit(result: dict, item: Item, setting: Setting) -> None:
        result[name] = change(result[name])

    return edit


def replace_by(new: dict) -> Callable[[dict, Item, Setting], None]:
    def edit(result: dict, item: Item, setting: Setting) -> None:
        result.clear()
        result.update(new)

    return edit


def rows_of_another_trace(rows: Rows, item: Item) -> Rows:
    """The rows of a trace with the same question and answer, and a first trace token that is another."""
    other = [None, *rows[1:]]
    at = len(item.prefix_ids) - 1
    [(token_id, entry)] = other[at].items()
    other[at] = {str((int(token_id) + 1) % 16): entry}
    return other


ANY_TRANSPORT = {
    "one row fewer": Kind("rows", in_rows(lambda rows, item: rows[:-1]), fits=lambda item: len(item.answer_ids) > 1),
    "one row more": Kind("rows", in_rows(lambda rows, item: [*rows, rows[-1]])),
    "NaN": Kind("not_a_number", in_cell(math.nan)),
    "-9999": Kind("minus_infinity", in_cell(-9999.0), final=True),
    "-Infinity": Kind("minus_infinity", in_cell(-math.inf), final=True),
    "above 0": Kind("impossible", in_cell(0.25)),
    "the prompt's last id is another": Kind("ids", set_field("prompt_token_ids", lambda ids: [*ids[:-1], 31])),
    "the prompt's first id is another": Kind("ids", set_field("prompt_token_ids", lambda ids: [31, *ids[1:]])),
    "no prompt ids": Kind("ids", set_field("prompt_token_ids", lambda ids: None)),
    "slow": Kind("timeout"),
    "drip": Kind("timeout"),
    "half": Kind("connection"),
    "reset": Kind("connection"),
    "storm": Kind("overloaded"),
    "HTTP 500": Kind("server_error"),
    "HTTP 503": Kind("server_error"),
    "HTTP 400": Kind("refused", final=True),
    "html": Kind("garbled"),
    "empty": Kind("garbled"),
    "list": Kind("garbled"),
    "null": Kind("garbled"),
    "other shape": Kind("garbled"),
}
JSON_ROWS = {
    '"nan"': Kind("not_a_number", in_cell("nan")),
    "null value": Kind("not_a_number", in_cell(None)),
    "a number as text": Kind("not_a_number", in_cell("-1.5")),
    "false": Kind("not_a_number", in_cell(False)),
    '"-inf"': Kind("minus_infinity", in_cell("-inf"), final=True),
}
OFFSET = {
    "one column more": Kind("rows", in_rows(lambda rows, item: [[*row, row[-1]] for row in rows])),
    "one column fewer": Kind("rows", in_rows(lambda rows, item: [row[:-1] for row in rows])),
    "lost to the cache": Kind("lost", in_rows(lambda rows, item: None)),
}
FLAT = {
    "all 0.0": Kind(
        "impossible",
        in_rows(lambda rows, item: [[0.0] * len(row) for row in rows]),
        fits=lambda item: len(set(item.answer_ids)) > 1,
    ),
}
BATCH = {
    "one result fewer": Kind("missing"),
    "one result more": Kind("missing"),
    "one result twice, one not at all": Kind("ids"),
    "out of order": Kind("ids"),
    "engine error for one": Kind("server_error", replace_by({"error": "engine died", "kind": "engine"})),
    "refusal of one": Kind("refused", replace_by({"error": "bad token", "kind": "refused"}), final=True),
    "result without fields": Kind("lost", replace_by({})),  # without rows either, which looks like a cache hit
    "one row has a column more": Kind("rows", in_rows(lambda rows, item: [*rows[:-1], [*rows[-1], -1.0]])),
    "a row is null": Kind("rows", in_rows(lambda rows, item: [*rows[:-1], None])),
    "rows are an object": Kind("garbled", in_rows(lambda rows, item: {"0": rows[0]})),
}
COMPLETIONS = {
    "one result fewer": Kind("missing"),
    "one result more": Kind("missing"),
    "one result twice, one not at all": Kind("missing"),
    "out of order": Kind(None),
    "indices exchanged": Kind("ids"),
    "rows exchanged": Kind("ids"),
    "rows of another trace": Kind("ids", in_rows(rows_of_another_trace)),
    "rows one too early": Kind("ids", in_rows(lambda rows, item: [None, {"31": {"logprob": -1.0}}, *rows[1:-1]])),
    "a row is null": Kind("missing", in_rows(lambda rows, item: [*rows[:-1], None])),
    "a row is empty": Kind("ids", in_rows(lambda rows, item: [*rows[:-1], {}])),
    "no rows": Kind("missing", in_rows(lambda rows, item: None)),
    "no log-prob": Kind("not_a_number", in_entry(logprob=...)),
    "0.0 of rank 0": Kind("impossible", in_entry(logprob=0.0, rank=0)),
    "0.0 of rank 3": Kind("impossible", in_entry(logprob=0.0, rank=3)),
}
KINDS: dict[str, dict[str, Kind]] = {
    "batch": ANY_TRANSPORT | JSON_ROWS | OFFSET | FLAT | BATCH,
    "batch by row": ANY_TRANSPORT | JSON_ROWS | OFFSET | BATCH,
    "generate": ANY_TRANSPORT | OFFSET | FLAT,
    "completions": ANY_TRANSPORT | JSON_ROWS | COMPLETIONS,
}


@dataclass(frozen=True)
class Injection:
    """One ask that was answered wrongly once."""

    prompt: tuple[int, ...]
    kind: str
    fault: str | None
    final: bool


class Injector:
    """Makes a `FakeVllm` fail by plan; its `fault`.

    Args:
        plan: by prompt, the kind of failure of the first request that holds it; of every one for `always`, and for
            kinds that are final.
    """

    def __init__(self, setting: Setting, items: Sequence[Item], plan: dict[Item, str], always: bool = False):
        self.setting, self.always = setting, always
        self.kinds = KINDS[next(name for name, one in SETTINGS.items() if one == setting)]
        self.items = {item.prefix_ids + item.answer_ids: item for item in items}
        self.plan = {item.prefix_ids + item.answer_ids: kind for item, kind in plan.items()}
        self.storms = {prompt: STORM for prompt, kind in self.plan.items() if kind == "storm"}
        self.injected: list[Injection] = []
        self.requests = 0
        self.lock = threading.Lock()

    def __call__(self, body: dict, reply: dict) -> Reply:
        with self.lock:
            self.requests += 1
            prompts = self.prompts(body)
            planned = {prompt: self.plan[prompt] for prompt in prompts if prompt in self.plan}
            if "HTTP 400" in planned.values():
                if len(prompts) == 1:  # in company, the client has to find out which it is, and loses none
                    self.note(prompts, "HTTP 400")
                return 400, {"error": {"message": "token out of vocabulary"}}
            whole = [prompt for prompt, kind in planned.items() if self.kinds[kind].edit is None]
            if whole:
                return self.fail_whole(planned[whole[0]], prompts, planned, reply)
            for prompt, kind in planned.items():
                self.kinds[kind].edit(self.results(reply)[prompts.index(prompt)], self.items[prompt], self.setting)
                self.note([prompt], kind)
                if not self.always and not self.kinds[kind].final:
                    del self.plan[prompt]
            return 200, reply

    def note(self, prompts: Sequence[tuple[int, ...]], kind: str) -> None:
        fault, final = self.kinds[kind].fault, self.kinds[kind].final or self.always
        self.injected += [Injection(prompt, kind, fault, final) for prompt in prompts]

    def prompts(self, body: dict) -> list[tuple[int, ...]]:
        if "requests" in body:
            return [tuple(request["token_ids"]) for request in body["requests"]]
        return [tuple(ids) for ids in (body["prompt"] if "prompt" in body else [body["token_ids"]])]

    def results(self, reply: dict) -> list[dict]:
        """One result a prompt, as the transport has them; they can be edited."""
        if self.setting.transport == "generate":
            return [reply]
        return reply["results" if self.setting.transport == "batch" else "choices"]

    def fail_whole(self, kind: str, prompts: list[tuple[int, ...]], planned: dict, reply: dict) -> Reply:
        """A failure of the request as a whole; what else was planned for its prompts is dropped."""
        for prompt in planned:
            if kind != "storm" or planned[prompt] != "storm" or self.storms[prompt] == 1:
                self.plan.pop(prompt)
            else:
                self.storms[prompt] -= 1
        status = {"storm": 429, "HTTP 500": 500, "HTTP 503": 503}.get(kind)
        if status:
            self.note(prompts, kind)
            return status, {"error": {"message": kind}}
        sent = {
            "slow": Wire.SLOW,
            "drip": Wire.DRIP,
            "reset": Wire.RESET,
            "half": HalfReply(json.dumps(reply)[:200]),
            "html": "<html><body>busy</body></html>",
            "empty": "",
            "list": [],
            "null": None,
            "other shape": {"object": "list", "data": []},
        }
        if kind in sent:
            self.note(prompts, kind)
            return 200, sent[kind]
        return 200, self.mix_up(kind, prompts, reply)

    def mix_up(self, kind: str, prompts: list[tuple[int, ...]], reply: dict) -> dict:
        """Results of a request that are missing, doubled or exchanged."""
        key = "results" if self.setting.transport == "batch" else "choices"
        results, last = reply[key], len(prompts) - 1
        wrong: Sequence[int]
        if kind == "one result fewer":
            mixed, wrong = results[:-1], range(len(prompts)) if key == "results" else [last]
        elif kind == "one result more":
            mixed, wrong = [*results, results[0]], range(len(prompts)) if key == "results" else [0]
        elif last == 0:
            return reply  # one result cannot be mixed up with itself
        elif kind == "one result twice, one not at all":
            mixed, wrong = [*results[:-1], results[0]], [last] if key == "results" else [0, last]
        elif kind == "indices exchanged":
            results[0]["index"], results[last]["index"] = last, 0
            mixed, wrong = results, [0, last]
        elif kind == "rows exchanged":
            a, b = results[0], results[last]
            a["prompt_logprobs"], b["prompt_logprobs"] = b["prompt_logprobs"], a["prompt_logprobs"]
            same = len(a["prompt_logprobs"]) == len(b["prompt_logprobs"])
            self.injected += [Injection(prompts[i], kind, "ids" if same else "rows", False) for i in (0, last)]
            mixed, wrong = results, []
        elif kind == "out of order":
            mixed = results[::-1]
            wrong = [i for i in range(len(prompts)) if i != last - i]
        else:
            raise AssertionError(kind)
        self.note([prompts[i] for i in wrong], kind)
        return {**reply, key: mixed}


def make_plan(name: str, items: Sequence[Item], failing: int, seed: int, kinds: Sequence[str] = ()) -> dict[Item, str]:
    """Kinds of failure for so many of the items, each kind about equally often, as far apart as can be."""
    draw = random.Random(seed)
    shuffled = draw.sample(items, len(items))
    one_a_group = {item.group: item for item in shuffled}.values()
    waiting = [kind for _ in range(failing) for kind in kinds or KINDS[name]]
    plan: dict[Item, str] = {}
    for item in list(dict.fromkeys([*one_a_group, *shuffled]))[:failing]:
        at = next(i for i, kind in enumerate(waiting) if KINDS[name][kind].fits(item))
        plan[item] = waiting.pop(at)
    return plan


# The audit -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    items: Sequence[Item]
    results: Sequence[Score | Unscored]
    injected: Sequence[Injection]
    usage: Usage
    seconds: float = field(default=0.0, compare=False)


def audit(
    items: Sequence[Item], results: Sequence[Score | Unscored], injected: Sequence[Injection], usage: Usage
) -> list[str]:
    """What is wrong with the results and the counts; nothing is, if the client is right.

    - A `Score` is the true one to 1e-9 in every token.
    - Exactly those items are `Unscored` into which a final failure was injected, with its name.
    - `usage.faults` counts, by name, each ask once for every time that it was answered wrongly; `usage.uncached` those
      whose scores a cache hit had cost; `usage.unscored` the items without a score.
    """
    if len(results) != len(items):
        return [f"{len(results)} results for {len(items)} items"]
    complaints = []
    final = {one.prompt: one.fault for one in injected if one.final}
    for item, result in zip(items, results, strict=True):
        fault, right = final.get(item.prefix_ids + item.answer_ids), true_score(item, VOCABULARY)
        if isinstance(result, Unscored):
            if fault is None:
                complaints.append(f"lost: {item} is {result}, but nothing final was injected")
            elif result.fault != fault:
                complaints.append(f"misnamed: {item} is {result}, but the fault was {fault}")
            continue
        values = result.token_logprobs
        if len(values) != len(right) or not all(abs(a - b) <= 1e-9 for a, b in zip(values, right, strict=True)):
            complaints.append(f"wrong score: {item} is {values}, but truly {right}")
        elif fault is not None:
            complaints.append(f"scored: {item}, into which {fault} was injected")
    seen = Counter(one.fault for one in injected if one.fault not in (None, "lost"))
    if usage.faults != seen:
        complaints.append(f"faults: counted {dict(usage.faults)}, injected {dict(seen)}")
    lost = sum(one.fault == "lost" for one in injected)
    if usage.uncached != lost:
        complaints.append(f"uncached: counted {usage.uncached}, injected {lost}")
    unscored = Counter(
        result.fault for result in dict(zip(items, results, strict=True)).values() if is_unscored(result)
    )
    if usage.unscored != unscored:
        complaints.append(f"unscored: counted {dict(usage.unscored)}, returned {dict(unscored)}")
    return complaints


def is_unscored(result: Score | Unscored) -> bool:
    return isinstance(result, Unscored)


def outcome_of(setting: Setting, injector: Injector, items: Sequence[Item]) -> Outcome:
    """Scores the items with the client as it is now, while the server fails by plan."""
    fake = setting.serve()
    try:
        with connect(fake) as scorer:
            assert scorer.routes.answers == setting.route, scorer.notes
            fake.fault = injector
            began = time.monotonic()
            results = scorer.score(items)
            return Outcome(items, results, injector.injected, scorer.take_usage(), time.monotonic() - began)
    finally:
        fake.stop()


def complaints_of(outcome: Outcome) -> list[str]:
    return audit(outcome.items, outcome.results, outcome.injected, outcome.usage)


ITEM, OTHER = Item((1, 2, 3), (4, 5)), Item((1, 2, 4), (4, 5))


def right(item: Item) -> Score:
    return Score(true_score(item, VOCABULARY))


def test_the_audit_has_nothing_to_say_about_right_results() -> None:
    """Fails if the audit complains about anything that is right, so that its other findings mean nothing."""
    refused = Injection((1, 2, 4, 4, 5), "HTTP 400", "refused", True)
    passing = Injection((1, 2, 3, 4, 5), "NaN", "not_a_number", False)
    usage = Usage(faults=Counter(refused=1, not_a_number=1), unscored=Counter(refused=1))
    assert audit([ITEM, OTHER], [right(ITEM), Unscored("HTTP 400", "refused")], [refused, passing], usage) == []
    assert audit([ITEM, ITEM], [right(ITEM)] * 2, [], Usage()) == []


@pytest.mark.parametrize(
    ("results", "usage", "complaint"),
    [
        ([Score((0.0, 0.0))], Usage(), "wrong score"),
        ([Score((0.0,))], Usage(), "wrong score"),
        ([Score(right(ITEM).token_logprobs[:1])], Usage(), "wrong score"),
        ([Score((*right(ITEM).token_logprobs, 0.0))], Usage(), "wrong score"),
        ([Score((math.nan, math.nan))], Usage(), "wrong score"),
        ([right(OTHER)], Usage(), "wrong score"),
        ([Score(tuple(value + 1e-8 for value in right(ITEM).token_logprobs))], Usage(), "wrong score"),
        ([], Usage(), "0 results for 1"),
        ([Unscored("timeout", "timeout")], Usage(unscored=Counter(timeout=1)), "lost"),
        ([right(ITEM)], Usage(faults=Counter(timeout=1)), "faults"),
        ([right(ITEM)], Usage(uncached=1), "uncached"),
        ([right(ITEM)], Usage(unscored=Counter(timeout=1)), "unscored"),
    ],
)
def test_the_audit_sees_every_wrong_result_and_every_wrong_count(results: list, usage: Usage, complaint: str) -> None:
    """Fails if the audit is blind to what it is there for, and the tests below could not fail."""
    [only] = audit([ITEM], results, [], usage)
    assert only.startswith(complaint)


def test_the_audit_sees_faults_that_were_hushed_up() -> None:
    """Fails if a client could score an item that was refused, or give a fault another name."""
    refused = Injection((1, 2, 3, 4, 5), "HTTP 400", "refused", True)
    counted = Usage(faults=Counter(refused=1))
    assert [c.split(":")[0] for c in audit([ITEM], [right(ITEM)], [refused], counted)] == ["scored"]
    found = audit([ITEM], [Unscored("?", "other")], [refused], Usage(unscored=Counter(other=1)))
    assert [c.split(":")[0] for c in found] == ["misnamed", "faults"]


# Passing faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_of_thousands_of_items_not_one_gets_a_wrong_score_while_requests_fail(name: str) -> None:
    """Fails if any failure of one request in twenty becomes a number, costs a score that a second attempt would have
    had, or goes uncounted."""
    setting, items = SETTINGS[name], make_items(3_400, seed=17)
    failing = len(items) // setting.size // 20
    injector = Injector(setting, items, make_plan(name, items, failing, seed=23))
    outcome = outcome_of(setting, injector, items)
    assert complaints_of(outcome) == []
    assert {one.kind for one in outcome.injected} | {"out of order"} >= set(KINDS[name]), "a kind was not injected"
    assert sum(isinstance(result, Score) for result in outcome.results) >= len(items) - failing
    named = sum(outcome.usage.faults.values()) + outcome.usage.uncached
    print(
        f"{name}: {len(items)} items, {injector.requests} requests, {failing} failures planned, "
        f"{named} asks answered wrongly, {outcome.usage.unscored.total()} unscored, {outcome.seconds:.1f} s"
    )


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
def test_every_failure_on_its_own_costs_what_it_must_and_nothing_else(
    name: str, kind: str, servers: dict[str, tuple[FakeVllm, VllmScorer]]
) -> None:
    """Fails if this very failure becomes a number, takes its neighbours' scores with it, or has another name."""
    fake, scorer = servers[name]
    setting, items = SETTINGS[name], make_items(8, seed=5)
    victim = next(item for item in items if KINDS[name][kind].fits(item) and len(set(item.answer_ids)) > 1)
    injector = Injector(setting, items, {victim: kind})
    fake.fault = injector
    results = scorer.score(items)
    assert audit(items, results, injector.injected, scorer.take_usage()) == []
    assert injector.injected or kind == "out of order" or setting.size == 1
    assert [i for i, item in enumerate(items) if item == victim] == [
        i for i, result in enumerate(results) if isinstance(result, Unscored)
    ] or not KINDS[name][kind].final


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, tuple[FakeVllm, VllmScorer]]]:
    """A server and a client of each setting, with a short timeout."""
    fakes = {name: setting.serve() for name, setting in SETTINGS.items()}
    clients = {name: connect(fake, timeout_s=1.5) for name, fake in fakes.items()}
    yield {name: (fakes[name], clients[name]) for name in SETTINGS}
    for name in SETTINGS:
        clients[name].close()
        fakes[name].stop()


def test_every_fault_of_a_reply_has_been_injected_somewhere() -> None:
    """Fails if a fault is added to the client's list that none of these tests provokes."""
    provoked = {kind.fault for kinds in KINDS.values() for kind in kinds.values()}
    elsewhere = {"not_sent", "other", "too_long"}  # not_sent: test_vllm_client; too_long: refused before it is sent
    assert set(FAULTS) - elsewhere == provoked - {None, "lost"}


# Clients that are broken on purpose ----------------------------------------------------------------------------------


def lenient_offset(missing: Any, drop_last: bool = False) -> Callable:
    """`offset_logprobs` that takes what it gets; `missing` fills what is not there."""

    def offset(rows: Any, columns: Sequence[Sequence[int]], answer_ids: Sequence[int]) -> tuple[float, ...]:
        values, rows = [], rows.tolist() if isinstance(rows, np.ndarray) else rows
        for row, ids, token_id in zip(rows or [[]] * len(answer_ids), columns, answer_ids, strict=False):
            row = dict(zip(ids, row or [], strict=False))
            value = row.get(token_id)
            is_number = isinstance(value, float) and not math.isnan(value)
            values.append(value if is_number else missing)
        return tuple(values[:-1] if drop_last else values)

    return offset


def lenient_answer(missing: Any, drop_last: bool = False) -> Callable:
    """`answer_logprobs` of the same kind: a row's first entry is the one, whatever its id."""

    def answer(rows: Any, item: Item) -> tuple[float, ...]:
        start, values = len(item.prefix_ids), []
        for row in (rows or [None] * (start + len(item.answer_ids)))[start:]:
            entry = next(iter(row.values()), {}) if row else {}
            value = entry.get("logprob")
            is_number = isinstance(value, float) and not math.isnan(value)
            values.append(value if is_number else missing)
        return tuple(values[:-1] if drop_last else values)

    return answer


def fills_with_zero(patch: pytest.MonkeyPatch) -> None:
    """A missing log-prob is 0.0, which is probability 1."""
    patch.setattr(asks_module, "offset_logprobs", lenient_offset(0.0))
    patch.setattr(asks_module, "answer_logprobs", lenient_answer(0.0))


def reads_what_is_no_number_as_zero(patch: pytest.MonkeyPatch) -> None:
    """The same, one level below: the checks of rows and ids are all there."""

    def check(value: object, token_id: int) -> float:
        try:
            return check_value(value, token_id)
        except BadReply as bad:
            if bad.fault == "not_a_number":
                return 0.0
            raise

    patch.setattr(replies_module, "check_value", check)


def pairs_by_position(patch: pytest.MonkeyPatch) -> None:
    """The nth result is the nth prompt's, and nobody compares ids."""

    def by_position(read: Callable) -> Callable:
        def reader(answer: Any, asks: Sequence) -> list:
            if isinstance(answer, dict) and isinstance(answer.get("choices"), list):
                choices = [{**choice, "index": i} for i, choice in enumerate(answer["choices"])]
                answer = {**answer, "choices": choices}
            return read(answer, asks)

        return reader

    patch.setattr(asks_module, "check_prompt", lambda reply, prompt: None)
    patch.setitem(http_module.READERS, "completions", by_position(http_module.READERS["completions"]))
    patch.setattr(asks_module, "answer_logprobs", lenient_answer(-1.0))


def drops_the_last_row(patch: pytest.MonkeyPatch) -> None:
    """An off-by-one at the end."""
    patch.setattr(asks_module, "offset_logprobs", lenient_offset(-1.0, drop_last=True))
    patch.setattr(asks_module, "answer_logprobs", lenient_answer(-1.0, drop_last=True))


def is_content_with_fewer_rows(patch: pytest.MonkeyPatch) -> None:
    """Where a row is missing, the sum over the others is the score: too high."""
    patch.setattr(asks_module, "offset_logprobs", lenient_offset(-1.0))
    patch.setattr(asks_module, "answer_logprobs", lenient_answer(-1.0))


def takes_9999_for_a_value(patch: pytest.MonkeyPatch) -> None:
    """vLLM's stand-in for minus infinity is a finite number like any other."""

    def check(value: object, token_id: int) -> float:
        return float(value) if value == -9999.0 else check_value(value, token_id)

    patch.setattr(replies_module, "check_value", check)


def gives_up_at_once(patch: pytest.MonkeyPatch) -> None:
    """No second attempt: nothing is invented, but scores are lost."""
    patch.setattr(asks_module, "FINAL", FAULTS)


BROKEN = {
    fills_with_zero: "wrong score",
    reads_what_is_no_number_as_zero: "wrong score",
    pairs_by_position: "wrong score",
    drops_the_last_row: "wrong score",
    is_content_with_fewer_rows: "wrong score",
    takes_9999_for_a_value: "wrong score",
    gives_up_at_once: "lost",
}
"""What the audit has to say about them."""
SHOWN_BY_COUNTS = {("generate", pairs_by_position), ("completions", reads_what_is_no_number_as_zero)}
"""Broken clients whose scores are right all the same: a request of one prompt can be paired with no other, and the
fake's ranks, of which none is 1, contradict every 0.0. That the faults go uncounted or get another name shows them."""


def plan_for_broken_clients(name: str, items: Sequence[Item]) -> dict[Item, str]:
    """Every kind of failure of single results and of their order."""
    mixed = ("one result fewer", "one result more", "one result twice, one not at all", "indices exchanged")
    mixed += ("rows exchanged", "out of order")
    kinds = [kind for kind, one in KINDS[name].items() if one.edit or kind in mixed]
    return make_plan(name, items, 45, 31, kinds)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_client_as_it_is_passes_what_broken_ones_are_found_out_by(name: str) -> None:
    """Fails if the tests of broken clients find something that is in the client as it is."""
    items = make_items(400, seed=29)
    injector = Injector(SETTINGS[name], items, plan_for_broken_clients(name, items))
    assert complaints_of(outcome_of(SETTINGS[name], injector, items)) == []


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_client_that_is_broken_on_purpose_is_found_out(
    name: str, breaks: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the audit is no proof: a client that does invent scores would pass it."""
    setting, items = SETTINGS[name], make_items(400, seed=29)
    fake, injector = setting.serve(), Injector(setting, items, plan_for_broken_clients(name, items))
    with connect(fake) as scorer, monkeypatch.context() as patch:
        breaks(patch)  # after the probe, which would have found out some of them
        fake.fault = injector
        complaints = audit(items, scorer.score(items), injector.injected, scorer.take_usage())
    fake.stop()
    assert complaints, f"{breaks.__name__} passed"
    found = {complaint.split(":")[0] for complaint in complaints}
    assert BROKEN[breaks] in found or (name, breaks) in SHOWN_BY_COUNTS, complaints


# Lasting faults ------------------------------------------------------------------------------------------------------


def train_on(results: Sequence[Score | Unscored], rows_a_step: int = 64) -> LikelihoodReward:
    """Feeds results step by step through the judgement of traces and the counting of failures, as a run does."""
    example = Example("s/0", "How many?", "5")
    questions = SimpleNamespace(by_id={"s/0": SimpleNamespace(example=example)}, masked=False)
    config = ContextConfig(reward="logprob_mean")
    reward = LikelihoodReward(questions, config, None, None, None)
    for start in range(0, len(results), rows_a_step):
        rows = []
        for one in results[start : start + rows_a_step]:
            reading = one if isinstance(one, Unscored) else Reading(one, "5", True)
            baseline = Score((-1.0,) * length_of(one))
            rows.append(Questions._assessed(questions, "s/0", "trace", 3, True, reading, baseline, None))
        reward.count(rows)
    return reward


def length_of(result: Score | Unscored) -> int:
    return len(result.token_logprobs) if isinstance(result, Score) else 1


@settings
@pytest.mark.parametrize(
    ("kind", "fault", "reason"),
    [
        ("HTTP 400", "refused", r"HTTP 400: token out of vocabulary"),
        ("NaN", "not_a_number", r"log-prob of token id \d+ is nan \(3 attempts\)"),
    ],
)
def test_a_share_of_lasting_faults_stops_the_run_and_a_smaller_share_does_not(
    setting: Setting, kind: str, fault: str, reason: str
) -> None:
    """Fails if items that can never be scored are counted wrongly, train something, or are swept under the carpet."""
    items = make_items(1_200, seed=41)
    failing = random.Random(43).sample(items, 24)
    injector = Injector(setting, items, dict.fromkeys(failing, kind), always=True)
    outcome = outcome_of(setting, injector, items)
    assert complaints_of(outcome) == []
    assert outcome.usage.unscored == {fault: 24}
    unscored = {item for item, result in zip(items, outcome.results, strict=True) if isinstance(result, Unscored)}
    assert unscored == set(failing)
    # 2 % of them: above --max_unscored, once a thousand were seen or more than 10 failed.
    with pytest.raises(StopRun, match=rf"^1\d of \d+ traces could not be scored \(--max_unscored 0.01\).*{reason}"):
        train_on(outcome.results)
    # 0.5 % of them.
    few = set(failing[:6])
    kept = [result for item, result in zip(items, outcome.results, strict=True) if item not in unscored - few]
    reward = train_on(kept)
    assert (reward.unscored, reward.seen) == (6, 1_182)


def test_a_storm_does_not_use_up_the_attempts_that_another_fault_has(
    servers: dict[str, tuple[FakeVllm, VllmScorer]],
) -> None:
    """Fails if one passing fault after three answers of "too much to do" costs a score: faults come together when a
    server is overloaded, and a fault of another kind is worth its own attempts."""
    fake, scorer = servers["batch"]
    answers = iter([429, 429, 429, 500])

    def fault(body: dict, reply: dict) -> Reply:
        status = next(answers, 200)
        return (status, reply) if status == 200 else (status, {"error": {"message": "busy"}})

    fake.fault = fault
    results = scorer.score([ITEM])
    scorer.take_usage()
    assert results == [Score(pytest.approx(true_score(ITEM, VOCABULARY)))]


# What cannot be told from a score unless something else is asked for -------------------------------------------------


def zeros(rows: Rows, item: Item) -> Rows:
    return [[0.0] * len(row) for row in rows]


def whole_zeros(rows: Rows, item: Item) -> Rows:
    return [[0] * len(row) for row in rows]


@pytest.mark.parametrize("name", ["batch", "batch by row", "generate"])
@pytest.mark.parametrize("answer", [(5,), (5, 5), (5, 6)], ids=["one token", "one token twice", "two tokens"])
@pytest.mark.parametrize("edit", [zeros, whole_zeros], ids=["0.0", "0"])
def test_rows_that_were_never_written_are_no_score(
    name: str, answer: tuple[int, ...], edit: Callable, servers: dict[str, tuple[FakeVllm, VllmScorer]]
) -> None:
    """Fails if rows of zeros, the memory that no kernel wrote to, become probability 1: the largest reward there is.
    A row of one column cannot show it; one more id a row can."""
    fake, scorer = servers[name]
    item = Item((1, 2, 3), answer)

    def fault(body: dict, reply: dict) -> Reply:
        for result in reply.get("results", [reply]):
            in_rows(edit)(result, item, SETTINGS[name])
        return 200, reply

    fake.fault = fault
    [result] = scorer.score([item])
    scorer.take_usage()
    assert isinstance(result, Unscored)


@pytest.mark.parametrize("paths", [("completions",), ("batch", "completions")])
@pytest.mark.parametrize("zero", [0.0, 0])
def test_options_that_were_never_written_are_no_score(paths: tuple[str, ...], zero: float) -> None:
    """Fails if three options of one prefix can have probability 1 each."""
    fake = FakeVllm(paths, None, vocabulary=VOCABULARY)
    fake.options = True
    items = [Item((1, 2, 3), (token_id,)) for token_id in (4, 5, 6)]

    def fault(body: dict, reply: dict) -> Reply:
        for choice in reply["choices"] if "choices" in reply else [one["choices"][0] for one in reply["results"]]:
            if "results" in reply:
                choice["logprobs"] = [{key: {"logprob": zero, "rank": 1} for key in choice["logprobs"][0]}]
            else:
                [top] = choice["logprobs"]["top_logprobs"]
                choice["logprobs"]["top_logprobs"] = [dict.fromkeys(top, zero)]
        return 200, reply

    with connect(fake) as scorer:
        assert scorer.routes.options
        assert scorer.score(items) == [Score(pytest.approx(true_score(item, VOCABULARY))) for item in items]
        fake.fault = fault
        results = scorer.score(items)
    fake.stop()
    assert [type(result) for result in results] == [Unscored] * 3


# The pure functions, given anything ----------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([0, 0.0, -9999, -9999.0, 10**400, -(10**400), "nan", "-inf", "", "0.0"])
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["4", "5", "logprob", "rank"]), inner),
    max_leaves=8,
)


@given(json_values)
@example(10**400)
@example(True)
def test_no_json_value_but_a_log_prob_is_one(value: Any) -> None:
    """Fails if something else passes for a log-prob, or ends a run by an exception that nobody expects."""
    try:
        result = check_value(value, 4)
    except BadReply:
        return
    assert type(value) in (int, float)
    assert -9999 < value <= replies_module.ROUNDING
    assert result == min(value, 0)


@given(st.lists(json_values | st.lists(json_values, max_size=3), max_size=3) | json_values)
@example([[-1.0, -1], [-2, -1.0]])
@example([[10**400, -1.0], [-1.0, 10**400]])
@example([None, {"5": {"logprob": -1.0, "rank": 10**400}}, {"4": {"logprob": -1, "rank": 1}}])
@example([None, {"5": {"logprob": -1.0, "rank": 1}}, {"4": {"logprob": -1, "rank": 1}}])
def test_rows_of_anything_give_their_own_values_or_none(rows: Any) -> None:
    """Fails if a value comes from anywhere but its own place, or a strange reply ends the run."""
    result = offset_logprobs(rows, [[4, 5], [4, 5]], (5, 4))
    if not isinstance(result, Unscored):
        assert result == (min(rows[0][1], 0), min(rows[1][0], 0))
    entries = answer_logprobs(rows, Item((1,), (5, 4)))
    if not isinstance(entries, Unscored):
        assert entries == (min(rows[1]["5"]["logprob"], 0), min(rows[2]["4"]["logprob"], 0))


@pytest.mark.parametrize(
    "scores",
    ["UEsDBAoAAAA=", "UEsFBgAAAAAAAAAAAAAAAAAAAAAAAA==", "gASVAAAA", "k05VTVBZ", "é", "", "A", 5, {}, True],
)
def test_scores_that_are_no_array_are_garbled(scores: Any, servers: dict[str, tuple[FakeVllm, VllmScorer]]) -> None:
    """Fails if base64 of something else (a ZIP file, a pickle, half a header) ends the run, or is read."""
    fake, scorer = servers["generate"]
    fake.fault = lambda body, reply: (200, {**reply, "prompt_token_id_logprobs": scores})
    [result] = scorer.score([ITEM])
    scorer.take_usage()
    assert (type(result), result.fault) == (Unscored, "garbled")


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"results": ' + "[" * 100_000, "1" * 5_000], ids=["[", "results", "1"]
)
def test_json_that_python_cannot_read_is_garbled(body: str, servers: dict[str, tuple[FakeVllm, VllmScorer]]) -> None:
    """Fails if a body that Python's JSON reader gives up on ends the run by a RecursionError."""
    fake, scorer = servers["batch"]
    fake.fault = lambda request, reply: (200, body)
    [result] = scorer.score([ITEM])
    scorer.take_usage()
    assert (type(result), result.fault) == (Unscored, "garbled")


def packed(values: Any, **changes: Any) -> dict[str, Any]:
    """Rows as our plugin sends them."""
    array = np.array(values, dtype="<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()} | changes


COLUMNS = [[4, 9]] * 2


def test_packed_rows_by_hand() -> None:
    """Fails if a packed array is read in another order, type or shape; the values are exact in float32."""
    rows = decoded(packed([[-3.0, -0.25], [-0.5, -2.0]]))
    assert offset_logprobs(rows, COLUMNS, (9, 4)) == (-0.25, -0.5)


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (packed([[-3.0, math.nan], [-0.5, -2.0]]), "not_a_number"),
        (packed([[-3.0, -9999.0], [-0.5, -2.0]]), "minus_infinity"),
        (packed([[-3.0, -math.inf], [-0.5, -2.0]]), "minus_infinity"),
        (packed([[-3.0, 0.25], [-0.5, -2.0]]), "impossible"),
        (packed([[0.0, 0.0], [-0.5, -2.0]]), "impossible"),
        (packed([[-3.0, -0.25]]), "rows"),
        (packed([[-3.0, -0.25]] * 3), "rows"),
        (packed([[-3.0], [-0.5]]), "rows"),
        (packed([-3.0, -0.25, -0.5, -2.0]), "rows"),
        (packed([[-3.0, -0.25], [-0.5, -2.0]], shape=[3, 2]), "garbled"),
        (packed([[-3.0, -0.25], [-0.5, -2.0]], shape="22"), "garbled"),
        (packed([[-3.0, -0.25], [-0.5, -2.0]], float32="AAAA"), "garbled"),
        (packed([[-3.0, -0.25], [-0.5, -2.0]], float32=None), "garbled"),
        ({"float32": "AAAAAA=="}, "garbled"),
    ],
)
def test_packed_rows_that_do_not_fit_are_no_score(scores: Any, fault: str) -> None:
    """Fails if the fast check of arrays lets through what the slow one of lists refuses."""
    try:
        rows = decoded(scores)
    except ValueError:
        assert fault == "garbled"
        return
    result = offset_logprobs(rows, COLUMNS, (9, 4))
    assert (type(result), result.fault) == (Unscored, fault)
