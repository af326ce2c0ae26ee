"""The reference scorer: transformers in this process. The embedded default, and what every other route must agree with.

Equal items are computed once. The others form a forest that is read from its roots, each level continuing the
key-value cache of the one before: what the prefixes of a group begin with (the question), the rest of each distinct
prefix (a trace), then its answers (the endings of a multiple-choice question) and the model's own greedy answer. Logits
exist only where they are needed: at the last prefix position and at the answer's positions.

Shape suffixes: N rows, K cached tokens, T tokens of a level, A answer tokens, M scored positions, V vocabulary.
"""

import copy
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from scorer.checks import check_items, weights_digest, why_not_loaded
from scorer.types import Greedy, Item, Score, ScorerError, Unscored, Usage

Ids = tuple[int, ...]

SHORTEST_ROOT = 32
"""Fewer tokens in common are not worth a forward pass of their own."""


@dataclass(frozen=True)
class Read:
    """Rows that the model has read. A row's tokens keep their order in the cache, with padding anywhere in between."""

    cache: Cache
    mask_NK: torch.Tensor
    last_NV: torch.Tensor
    """Logits after each row's last token."""


class LocalScorer:
    """Scores with a transformers causal language model.

    Args:
        model: hub id or folder, loaded with its tokenizer; nothing is downloaded for a folder.
        dtype: "float32", "bfloat16", "float16" or "auto" (as stored). Log-softmax is always float32.
        device: where the model lives; default the first GPU of this process, else the CPU.
        batch_tokens: padded tokens a forward pass reads and its cache holds, the knob for memory. Unset: 32,768 of each
            on a GPU; on a CPU 2,048 read, where small batches of similar length beat large ones with more padding
            (0.26 s against 0.42 s for 128 traces), and 32,768 held.

    Raises:
        ScorerError: the model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        revision: str | None = None,
        batch_tokens: int | None = None,
    ):
        self.name = model
        self.dtype = dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_tokens = batch_tokens or (2_048 if self.device.type == "cpu" else 32_768)
        self.cache_tokens = batch_tokens or 32_768
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, revision=revision)
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, revision=revision)
        except (OSError, ValueError, SafetensorError) as error:
            raise ScorerError(
                f"cannot load the base model {model!r} (--scorer_model): {why_not_loaded(model, error)}"
            ) from error
        self.model: PreTrainedModel = loaded.to(self.device).eval().requires_grad_(False)
        self.max_length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        self.stop_ids: dict[str, torch.Tensor] = {}
        self._usage = Usage()
        self._lock = threading.Lock()  # `_answers` hooks the model, which two threads must not do at once
        self._prefix_tokens = 0  # read by the call of `score` that holds the lock

    @property
    def fingerprint(self) -> dict[str, str]:
        return {
            "backend": "local",
            "model": self.name,
            "weights": weights_digest(self.name) or str(getattr(self.model.config, "_commit_hash", None)),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    def score(self, items: Sequence[Item], greedy: Greedy | None = None) -> list[Score | Unscored]:
        """See `scorer.types.Scorer.score`."""
        began = time.perf_counter()
        check_items(items, self.max_length, greedy)
        distinct = list(dict.fromkeys(items))
        results: dict[Item, Score | Unscored] = {}
        shares = self._can_share != "nothing"
        with self._lock, torch.inference_mode():
            self._prefix_tokens = 0
            for roots, tree in forest(distinct, self.cache_tokens, self._can_share):
                lengths = {item.prefix_ids: len(roots[at]) if roots else 0 for item, at in tree.items()}
                root = self._read(roots) if roots else None
                rest = sorted(tree, key=lambda item: (len(item.prefix_ids) - lengths[item.prefix_ids], item.prefix_ids))
                for batch in batches(rest, self.batch_tokens, self.vocabulary, self.cache_tokens, lengths, shares):
                    results |= zip(batch, self._score_batch(batch, greedy, root, tree, lengths), strict=True)
            computed = self._prefix_tokens
        prefix_tokens = sum(len(item.prefix_ids) for item in distinct)
        self._usage.add(
            Usage(
                items=len(items),
                distinct=len(distinct),
                prompt_tokens=prefix_tokens + sum(len(item.answer_ids) for item in distinct),
                cached_tokens=prefix_tokens - computed,
                seconds=time.perf_counter() - began,
                unscored=Counter(result.fault for result in results.values() if isinstance(result, Unscored)),
            )
        )
        return [results[item] for item in items]

    def take_usage(self) -> Usage:
        """See `scorer.types.Scorer.take_usage`."""
        taken, self._usage = self._usage, Usage()
        return taken

    def close(self) -> None:
        """Nothing to stop; the memory goes with the object."""

    @cached_property
    def vocabulary(self) -> int:
        """Logits a position, which a padded embedding makes more than the tokenizer has tokens."""
        return self.model.get_output_embeddings().weight.shape[0]

    @cached_property
    def _can_share(self) -> str:
        """What the model's cache allows: "nothing" for recurrent states; "prefixes" for a sliding window, which counts
        the padding behind a root as tokens; else "roots"."""
        with torch.inference_mode():
            layers = self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device)).past_key_values
        kinds = {type(layer) for layer in getattr(layers, "layers", [None])}
        if kinds <= {DynamicLayer}:
            return "roots"
        return "prefixes" if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else "nothing"

    def _read(self, rows: Sequence[Ids], past: Read | None = None) -> Read:
        """Rows of tokens read in one forward pass, each behind its row of `past`."""
        self._prefix_tokens += sum(map(len, rows))
        ids_NT, mask_NT = pad(rows, "left", self.device)
        before_NK = mask_NT[:, :0] if past is None else past.mask_NK
        mask_NK = torch.cat([before_NK, mask_NT], 1)
        out = self.model(
            input_ids=ids_NT,
            attention_mask=mask_NK,
            position_ids=(before_NK.sum(1, keepdim=True) + mask_NT.cumsum(1) - 1).clamp(min=0),
            past_key_values=None if past is None else past.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return Read(out.past_key_values, mask_NK, out.logits[:, -1])

    def _score_batch(
        self,
        batch: Sequence[Item],
        greedy: Greedy | None,
        root: Read | None,
        tree: Mapping[Item, int],
        lengths: Mapping[Ids, int],
    ) -> list[Score | Unscored]:
        """Items behind their roots; equal prefixes stand side by side and are read once."""
        shares = self._can_share != "nothing"
        rows: list[int] = []
        firsts: list[Item] = []
        for item in batch:
            if not (shares and firsts and firsts[-1].prefix_ids == item.prefix_ids):
                firsts.append(item)
            rows.append(len(firsts) - 1)
        past = None if root is None else branch(root, [tree[item] for item in firsts])
        read = self._read([item.prefix_ids[lengths[item.prefix_ids] :] for item in firsts], past)
        # The answers and the greedy answer both continue this cache: the answers get a branch of it where it is needed
        # again, the last one takes it as it is.
        logprobs = self._answers([item.answer_ids for item in batch], read, rows, keep=greedy is not None)
        texts = [None] * len(firsts) if greedy is None else self._greedy(greedy, read)
        return [to_score(values, texts[row]) for values, row in zip(logprobs, rows, strict=True)]

    def _answers(self, answers: Sequence[Ids], read: Read, rows: Sequence[int], keep: bool) -> list[list[float]]:
        """Log-probs of each answer behind row `rows[i]` of what was read; with `keep`, `read` can be used again."""
        # The answer's first token is predicted by the last prefix position, the others by the answer's own tokens.
        first = [answer[0] for answer in answers]
        found = logprobs_at(read.last_NV, torch.tensor(first, device=self.device), rows)
        values = [[value] for value in found.tolist()]
        if all(len(answer) == 1 for answer in answers):
            return values
        # Answers of one token are done, unless leaving them out would need rows of a cache that cannot be chosen.
        longer = [i for i, answer in enumerate(answers) if len(answer) > 1 or self._can_share == "nothing"]
        chosen = [rows[i] for i in longer]
        if keep or chosen != list(range(len(read.mask_NK))):
            read = branch(read, chosen)
        ids_NA, mask_NA = pad([answers[i][:-1] for i in longer], "right", self.device)
        real_NA = mask_NA.bool()
        # Through a hook, because the argument `logits_to_keep` chooses positions for all rows alike, and the logits of
        # padding are the dearest ones there are.
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][real_NA][None], *inputs[1:]))
        try:
            out = self.model(
                input_ids=ids_NA,
                attention_mask=torch.cat([read.mask_NK, mask_NA], 1),
                position_ids=read.mask_NK.sum(1, keepdim=True) + mask_NA.cumsum(1) - 1,
                past_key_values=read.cache,
                use_cache=True,
            )
        finally:
            hook.remove()
        targets_M = torch.tensor([token for i in longer for token in answers[i][1:]], device=self.device)
        rest = iter(logprobs_at(out.logits[0], targets_M).tolist())
        for i in longer:
            values[i] += [next(rest) for _ in answers[i][1:]]
        return values

    def _greedy(self, greedy: Greedy, read: Read) -> list[str]:
        """The model's own answers, continued from the prefixes' cache; rows that are done are carried along."""
        stops = self._stop_ids(greedy.stop)
        mask_NK, lengths_N, logits_NV = read.mask_NK, read.mask_NK.sum(1), read.last_NV
        tokens, done_N = [], torch.zeros(len(mask_NK), dtype=torch.bool, device=self.device)
        for step in range(greedy.max_new_tokens):
            next_N = logits_NV.argmax(-1)
            tokens.append(next_N)
            done_N |= torch.isin(next_N, stops)
            if done_N.all() or step == greedy.max_new_tokens - 1:
                break
            mask_NK = torch.cat([mask_NK, mask_NK.new_ones(len(mask_NK), 1)], 1)
            out = self.model(
                input_ids=next_N[:, None],
                attention_mask=mask_NK,
                position_ids=(lengths_N + step)[:, None],
                past_key_values=read.cache,
                use_cache=True,
            )
            logits_NV = out.logits[:, -1]
        return [self._text_before_stop(row, greedy.stop) for row in torch.stack(tokens, 1).tolist()]

    def _text_before_stop(self, ids: list[int], stop: str) -> str:
        # Cut before decoding: what a finished row was carried along with could change how the end of its text decodes.
        stops, eos = set(self._stop_ids(stop).tolist()), self._eos_ids()
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        kept = ids[:end] if end < len(ids) and ids[end] in eos else ids[: end + 1]
        return self.tokenizer.decode(kept, skip_special_tokens=True).partition(stop)[0]

    def _eos_ids(self) -> set[int]:
        eos = self.model.generation_config.eos_token_id
        listed = eos if isinstance(eos, list) else [eos]
        return {i for i in (*listed, self.tokenizer.eos_token_id) if i is not None}

    def _stop_ids(self, stop: str) -> torch.Tensor:
        """EOS and every token whose text contains `stop`, found once; one spread over two tokens ends no row early."""
        if stop not in self.stop_ids:
            pieces = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            ids = self._eos_ids() | {i for i, piece in enumerate(pieces) if stop in piece}
            self.stop_ids[stop] = torch.tensor(sorted(ids), device=self.device)
        return self.stop_ids[stop]


def to_score(token_logprobs: Sequence[float], greedy_text: str | None) -> Score | Unscored:
    """A `Score`, or `Unscored` where a value is no log-probability (NaN, infinite)."""
    for position, value in enumerate(token_logprobs):
        if not -float("inf") < value <= 1e-6:
            fault = "not_a_number" if value != value else "minus_infinity" if value < 0 else "impossible"
            return Unscored(f"answer token {position} has log-prob {value}", fault)
    return Score(tuple(min(value, 0.0) for value in token_logprobs), greedy_text)


def logprobs_at(logits_NV: torch.Tensor, ids_M: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
    """float32 log-prob [M] of each id, by the logits of row `rows[i]`, or of its own row.

    The normaliser is computed once a row, and the log-probs of all the other tokens are never written to memory.
    """
    at_M = torch.arange(len(ids_M), device=ids_M.device) if rows is None else torch.tensor(rows, device=ids_M.device)
    return logits_NV[at_M, ids_M].float() - logits_NV.float().logsumexp(-1)[at_M]


def branch(read: Read, rows: Sequence[int]) -> Read:
    """These rows of what was read, in this order and as often as named; continuing them leaves `read` as it is."""
    index = torch.tensor(rows, device=read.mask_NK.device)
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in getattr(read.cache, "layers", [None])):
        # These layers replace their tensors and never write into them, so a shallow copy is enough.
        cache = copy.copy(read.cache)
        cache.layers = [copy.copy(layer) for layer in read.cache.layers]
    else:
        cache = copy.deepcopy(read.cache)
    if rows != list(range(len(read.mask_NK))):
        cache.batch_select_indices(index)
    return Read(cache, read.mask_NK[index], read.last_NV[index])


def forest(items: Sequence[Item], cache_tokens: int, sharing: str) -> Iterator[tuple[list[Ids], dict[Item, int]]]:
    """Splits items into trees: (root tokens, item -> its root's number); items without a root come last, with none.

    The prefixes of one group (of all items without a group) that agree in their first `SHORTEST_ROOT` tokens have as
    root all that they agree in. Roots of one yield fit into a cache of `cache_tokens` padded tokens.
    """
    clusters: dict[tuple[str, Ids], list[Item]] = {}
    home: dict[Ids, tuple[str, Ids]] = {}  # one prefix, one cluster, whatever the groups of its items
    for item in items:
        key = home.setdefault(item.prefix_ids, (item.group, item.prefix_ids[:SHORTEST_ROOT]))
        clusters.setdefault(key, []).append(item)
    rooted: list[tuple[Ids, list[Item]]] = []
    alone: list[Item] = []
    for members in clusters.values():
        prefixes = {item.prefix_ids for item in members}
        root = common_beginning(prefixes) if sharing == "roots" and len(prefixes) > 1 else ()
        if len(root) >= SHORTEST_ROOT:
            rooted.append((root, members))
        else:
            alone += members
    roots: list[Ids] = []
    tree: dict[Item, int] = {}
    for root, members in sorted(rooted, key=lambda pair: len(pair[0])):
        if roots and (len(roots) + 1) * len(root) > cache_tokens:
            yield roots, tree
            roots, tree = [], {}
        tree |= dict.fromkeys(members, len(roots))
        roots.append(root)
    if roots:
        yield roots, tree
    if alone:
        yield [], dict.fromkeys(alone, 0)


def common_beginning(prefixes: set[Ids]) -> Ids:
    """What all of them begin with, short of the last token of each, whose logits each needs for itself."""
    low, high = min(prefixes), max(prefixes)  # what these two agree in, all between them do
    longest = min(len(prefix) for prefix in prefixes) - 1
    agree = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), longest)
    return low[: min(agree, longest)]


def batches(
    items: Sequence[Item],
    batch_tokens: int,
    vocabulary: int,
    cache_tokens: int | None = None,
    already: Mapping[Ids, int] | None = None,
    shares: bool = True,
) -> Iterator[list[Item]]:
    """Consecutive items whose padded tokens to read, cache rows and float32 logits stay within bounds.

    Args:
        items: sorted by what is left to read of their prefixes; equal prefixes side by side are read once.
        batch_tokens: bound of the prefixes' and the answers' tokens together.
        vocabulary: logits a position; at most 2^28 logits exist at once.
        cache_tokens: bound of the cached tokens, where each answer has its prefix to itself; default `batch_tokens`.
        already: prefix -> tokens of it that were read before.
        shares: False where equal prefixes are read once an item after all.
    """
    cache_tokens = batch_tokens if cache_tokens is None else cache_tokens
    batch: list[Item] = []
    prefixes = longest = whole = answer = 0
    for item in items:
        length = len(item.prefix_ids)
        left = length - (already or {}).get(item.prefix_ids, 0)
        new = not shares or not batch or batch[-1].prefix_ids != item.prefix_ids
        counts = (prefixes + new, max(longest, left), max(whole, length), max(answer, len(item.answer_ids)))
        rows = len(batch) + 1
        if batch and (
            counts[0] * counts[1] + rows * counts[3] > batch_tokens
            or rows * (counts[2] + counts[3]) > cache_tokens
            or rows * counts[3] * vocabulary > 2**28
        ):
            yield batch
            batch, counts = [], (1, left, length, len(item.answer_ids))
        prefixes, longest, whole, answer = counts
        batch.append(item)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, longest] and the mask of real ones; padding is id 0 behind the mask."""
    longest = max(len(row) for row in rows)
    filler = [[0] * (longest - len(row)) for row in rows]
    if side == "left":
        ids = [f + list(row) for f, row in zip(filler, rows, strict=True)]
        mask = [[0] * len(f) + [1] * len(row) for f, row in zip(filler, rows, strict=True)]
    else:
        ids = [list(row) + f for f, row in zip(filler, rows, strict=True)]
        mask = [[1] * len(row) + [0] * len(f) for f, row in zip(filler, rows, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
