"""From items to requests to scores, whichever way the requests travel: over HTTP or to an engine in this process.

    items -> plan -> asks -> send (HTTP or engine) -> replies -> read -> scores

An ask is one request to vLLM. There are four kinds:

- offset: prefix + answer, log-probs from the answer's first token on. The LM head runs on the answer's rows alone, and
  the prefix may come from the cache. `prompt_logprob_token_ids` is one flat list of ids for all rows in vLLM 0.31, and
  one list a row from 0.32 on.
- prompt: prefix + answer, `prompt_logprobs=0`: a log-prob for every token. Every vLLM has it; slow, and the reference.
- options: the prefix alone, and the log-probs of several one-token answers at the first generated position.
- greedy: the prefix alone, continued to the model's own answer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from scorer.types import Greedy, Item, Score, Unscored, Usage
from scorer.vllm.replies import (
    BadReply,
    Prompt,
    Reply,
    answer_logprobs,
    check_prompt,
    greedy_answer,
    offset_logprobs,
    option_logprob,
)

NEUTRAL = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Greedy decoding without penalties, spelled out: a server fills what is left out from generation_config.json."""
MAX_OPTIONS = 128
"""Most ids in one options request (vLLM's MAX_LOGPROB_TOKEN_IDS)."""


@dataclass(frozen=True)
class Routes:
    """How answers are scored, as the probe found it.

    Attributes:
        answers: "offset_flat", "offset_rows" or "prompt_logprobs".
        options: one-token answers of one prefix go into one request.
        max_ids: most different ids in one flat request (the server's --max-logprobs); longer answers take the slow way.
    """

    answers: str = "prompt_logprobs"
    options: bool = False
    max_ids: int = 20


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        kind: "offset_flat", "offset_rows", "prompt_logprobs", "options" or "greedy".
        prompt: the token ids sent.
        params: vLLM's sampling parameters.
        items: what it scores; several for options, none for greedy.
        group: see `Item.group`.
    """

    kind: str
    prompt: Prompt
    params: Mapping[str, Any] = field(hash=False)
    items: tuple[Item, ...] = ()
    group: str = ""

    def without_cache(self) -> "Ask":
        """The same request, not reading the prefix cache."""
        return replace(self, params={**self.params, "skip_reading_prefix_cache": True})


Send = Callable[[Sequence[Ask], int], Iterable[tuple[int, Reply | Unscored]]]
"""Delivers requests, for the nth time (from 0): for each its position and a reply, or why there is none.

In any order, as they come: what is read here then costs no time that an engine in another process could not use.
"""

ATTEMPTS = 3
"""Times a request is sent at most. Scoring changes nothing on the server, so sending again is safe."""
ATTEMPTS_OVERLOADED = 8
"""The same where the server says that it has too much to do."""
FINAL = ("refused", "too_long", "minus_infinity")
"""Faults that another attempt would meet again."""


def offset_columns(kind: str, answer_ids: Sequence[int]) -> list[list[int]]:
    """The ids that the columns of each row of an offset reply stand for."""
    if kind == "offset_flat":
        ids = set(answer_ids)
        return [sorted(ids | {witness(answer_ids[0])} if len(ids) == 1 else ids)] * len(answer_ids)
    return [[token_id, witness(token_id)] for token_id in answer_ids]


def witness(token_id: int) -> int:
    """Another id, asked for along with this one: with rows that were never written both have probability 1."""
    return 1 if token_id == 0 else 0


def score_ask(item: Item, kind: str) -> Ask:
    """The request that scores one item."""
    params: dict[str, Any] = {**NEUTRAL, "max_tokens": 1}
    if kind == "prompt_logprobs":
        params["prompt_logprobs"] = 0
    else:
        columns = offset_columns(kind, item.answer_ids)
        params["prompt_logprob_token_ids"] = columns[0] if kind == "offset_flat" else columns
        params["prompt_logprob_start"] = len(item.prefix_ids) - 1
        params["skip_reading_prefix_cache"] = False  # vLLM's default is to skip it for these requests
    return Ask(kind, item.prefix_ids + item.answer_ids, params, (item,), item.group)


def options_ask(items: Sequence[Item]) -> Ask:
    """The request that scores one-token answers after one prefix."""
    ids = {item.answer_ids[0] for item in items}
    ids |= {witness(items[0].answer_ids[0])} if len(ids) == 1 else set()
    params = {**NEUTRAL, "max_tokens": 1, "logprob_token_ids": sorted(ids)}
    return Ask("options", items[0].prefix_ids, params, tuple(items), items[0].group)


def greedy_ask(prefix: Prompt, greedy: Greedy, group: str) -> Ask:
    """The request for the model's own answer."""
    params = {**NEUTRAL, "max_tokens": greedy.max_new_tokens, "stop": [greedy.stop]}
    return Ask("greedy", prefix, params, (), group)


def plan(items: Sequence[Item], greedy: Greedy | None, routes: Routes) -> list[Ask]:
    """The requests for distinct items, in the order that lets them share cached prefixes.

    Items of one group come together, and within it those of one prefix, so that the engine finds in its cache what the
    request before has computed. Greedy answers come last, when their prefixes are there.
    """
    groups = {group: index for index, group in enumerate(dict.fromkeys(item.group for item in items))}
    ordered = sorted(items, key=lambda item: (groups[item.group], item.prefix_ids))
    asks, options = [], {}
    for item in ordered:
        if routes.options and len(item.answer_ids) == 1:
            options.setdefault(item.prefix_ids, []).append(item)
        elif routes.answers == "offset_flat" and len(set(item.answer_ids)) > routes.max_ids:
            asks.append(score_ask(item, "prompt_logprobs"))
        else:
            asks.append(score_ask(item, routes.answers))
    most = min(MAX_OPTIONS, routes.max_ids)
    for same_prefix in options.values():
        asks += [options_ask(same_prefix[start : start + most]) for start in range(0, len(same_prefix), most)]
    if greedy:
        prefixes = {item.prefix_ids: item.group for item in ordered}
        asks += [greedy_ask(prefix, greedy, group) for prefix, group in prefixes.items()]
    return asks


def read(
    ask: Ask, reply: Reply | Unscored, greedy: Greedy | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[tuple[float, ...] | str | Unscored]:
    """What a reply says: the values of each of the ask's items, or the one greedy text."""
    count = max(1, len(ask.items))
    if isinstance(reply, Unscored):
        return [reply] * count
    try:
        check_prompt(reply, ask.prompt)
    except BadReply as bad:
        return [bad.unscored()] * count
    if ask.kind == "greedy":
        assert greedy is not None, "a greedy ask without its parameters"
        assert tokenizer is not None, "a greedy ask without a tokenizer"
        return [greedy_answer(reply, greedy, tokenizer)]
    if ask.kind == "options":
        return [option_logprob(reply.first_logprobs, item.answer_ids[0]) for item in ask.items]
    [item] = ask.items
    if ask.kind == "prompt_logprobs":
        return [answer_logprobs(reply.prompt_logprobs, item)]
    columns = offset_columns(ask.kind, item.answer_ids)
    return [offset_logprobs(reply.offset_logprobs, columns, item.answer_ids)]


def lost_to_the_cache(ask: Ask, reply: Reply | Unscored) -> bool:
    """Whether a cache hit past the answer's start has cost the scores: vLLM then returns none at all."""
    return (
        ask.kind.startswith("offset")
        and not ask.params["skip_reading_prefix_cache"]
        and isinstance(reply, Reply)
        and reply.offset_logprobs is None
    )


def score_items(
    items: Sequence[Item],
    greedy: Greedy | None,
    routes: Routes,
    send: Send,
    usage: Usage,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pause: Callable[[int], None] = lambda attempt: None,
) -> list[Score | Unscored]:
    """One result an item, in order; equal items are asked for once. What it took is added to `usage`.

    A request whose answer is missing or does not hold is sent again, `ATTEMPTS` times in all; one whose scores a cache
    hit has cost is sent once more without the cache. What remains is `Unscored`.

    Args:
        tokenizer: of the model; needed for greedy answers alone.
        pause: waits before the nth attempt.
    """
    distinct = list(dict.fromkeys(items))
    everything = [Pending(ask) for ask in plan(distinct, greedy, routes)]
    todo, attempt = everything, 0
    while todo:
        again: list[Pending] = []
        waits = False
        for position, reply in send([pending.ask for pending in todo], attempt):
            pending = todo[position]
            if isinstance(reply, Reply):
                usage.prompt_tokens += len(pending.ask.prompt)
                usage.cached_tokens += reply.cached_tokens if isinstance(reply.cached_tokens, int) else 0
            if lost_to_the_cache(pending.ask, reply):
                usage.uncached += 1
                pending.ask = pending.ask.without_cache()
                again.append(pending)
                continue
            fault = pending.take(read(pending.ask, reply, greedy, tokenizer))
            if fault is None:
                continue
            usage.faults[fault] += 1
            if fault == "refused" and len(pending.ask.items) > 1:
                # One bad option among several: asked for alone, the others get their score.
                alone = [Pending(options_ask([item])) for item in pending.ask.items]
                everything = [one for one in everything if one is not pending] + alone
                again += alone
            elif fault not in FINAL and pending.has_another_attempt(fault):
                usage.retries += 1
                waits = True
                again.append(pending)
        todo, attempt = again, attempt + 1
        if waits:
            pause(attempt)

    values: dict[Item, tuple[float, ...] | Unscored] = {}
    texts: dict[Prompt, str | Unscored] = {}
    for pending in everything:
        results = [after(result, pending.tries) for result in pending.results]
        if pending.ask.kind == "greedy":
            [texts[pending.ask.prompt]] = results
        else:
            values.update(zip(pending.ask.items, results, strict=True))
    scores = {item: joined(values[item], texts.get(item.prefix_ids)) for item in distinct}
    usage.items += len(items)
    usage.distinct += len(distinct)
    usage.unscored.update(score.fault for score in scores.values() if isinstance(score, Unscored))
    return [scores[item] for item in items]


@dataclass
class Pending:
    """A request on its way: how often it was answered, how often with "too much to do", and the last reading."""

    ask: Ask
    tries: int = 0
    overloaded: int = 0
    results: list[Any] = field(default_factory=list)

    def take(self, results: list[Any]) -> str | None:
        """Keeps what a reply says; returns the name of the fault in it."""
        self.results = results
        self.tries += 1
        fault = next((result.fault for result in results if isinstance(result, Unscored)), None)
        self.overloaded += fault == "overloaded"
        return fault

    def has_another_attempt(self, fault: str) -> bool:
        """A storm of "too much to do" is waited out for longer, and uses up no other fault's attempts."""
        if fault == "overloaded":
            return self.overloaded < ATTEMPTS_OVERLOADED
        return self.tries - self.overloaded < ATTEMPTS


def after(result: Any, tries: int) -> Any:
    """A failure that says how often it was tried."""
    if isinstance(result, Unscored) and tries > 1:
        return replace(result, reason=f"{result.reason} ({tries} attempts)")
    return result


def joined(values: tuple[float, ...] | Unscored, text: str | Unscored | None) -> Score | Unscored:
    """A score with its greedy answer, if one was asked for; without one of the two there is neither."""
    if isinstance(values, Unscored):
        return values
    if isinstance(text, Unscored):
        return text if text.reason.startswith("greedy") else replace(text, reason=f"greedy answer: {text.reason}")
    return Score(values, text)
