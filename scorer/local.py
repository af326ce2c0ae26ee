"""The reference scorer: transformers in this process. The embedded default, and what every other route must agree with.

Work is shared three ways. Equal items are computed once. The prefixes of a batch are read once into a key-value cache
that serves both the answer's tokens and the model's own greedy answer. Logits exist only where they are needed: at the
last prefix position and at the answer's positions.

Shape suffixes: N rows, P prefix tokens, A answer tokens, V vocabulary.
"""

import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scorer.checks import check_items, weights_digest, why_not_loaded
from scorer.types import Greedy, Item, Score, ScorerError, Unscored, Usage


class LocalScorer:
    """Scores with a transformers causal language model.

    Args:
        model: hub id or folder, loaded with its tokenizer; nothing is downloaded for a folder.
        dtype: "float32", "bfloat16", "float16" or "auto" (as stored). Log-softmax is always float32.
        device: where the model lives; default the first GPU of this process, else the CPU.
        batch_tokens: padded tokens a forward pass, the knob for memory. Unset: 32,768 on a GPU; on a CPU 2,048, where
            small batches of similar length beat large ones with more padding (0.26 s against 0.42 s for 128 traces).

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
        distinct = sorted(set(items), key=lambda item: len(item.prefix_ids))
        results: dict[Item, Score | Unscored] = {}
        for batch in batches(distinct, self.batch_tokens, len(self.tokenizer)):
            results.update(zip(batch, self._score_batch(batch, greedy), strict=True))
        self._usage.add(
            Usage(
                items=len(items),
                distinct=len(distinct),
                prompt_tokens=sum(len(item.prefix_ids) + len(item.answer_ids) for item in distinct),
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

    @torch.inference_mode()
    def _score_batch(self, batch: list[Item], greedy: Greedy | None) -> list[Score | Unscored]:
        prefix_NP, mask_NP = pad([item.prefix_ids for item in batch], "left", self.device)
        answer_NA, answer_mask_NA = pad([item.answer_ids for item in batch], "right", self.device)
        lengths_N = mask_NP.sum(1)

        out = self.model(
            input_ids=prefix_NP,
            attention_mask=mask_NP,
            position_ids=(mask_NP.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        cache, first_N1V = out.past_key_values, out.logits[:, -1:].float()

        # The answer's first token is predicted by the last prefix position, the others by the answer's own tokens.
        logits_NAV = first_N1V
        fed = answer_NA.shape[1] - 1
        # The answer's tokens are taken off the cache again before the greedy answer; a sliding window cannot give back
        # what it has dropped, so there the greedy answer starts from a copy.
        untouched = copy.deepcopy(cache) if greedy and fed and any(cache.is_sliding) else None
        if fed:
            out = self.model(
                input_ids=answer_NA[:, :-1],
                attention_mask=torch.cat([mask_NP, answer_mask_NA[:, :-1]], 1),
                position_ids=lengths_N[:, None] + torch.arange(fed, device=self.device),
                past_key_values=cache,
                use_cache=True,
            )
            logits_NAV = torch.cat([first_N1V, out.logits.float()], 1)
        logprobs_NA = logits_NAV.log_softmax(-1).gather(-1, answer_NA[..., None])[..., 0]

        texts: list[str | None] = [None] * len(batch)
        if greedy is not None:
            if fed and untouched is None:
                cache.crop(-fed)
            texts = self._greedy(greedy, first_N1V, untouched or cache, mask_NP, lengths_N)
        return [
            to_score(row[: len(item.answer_ids)], text)
            for item, row, text in zip(batch, logprobs_NA.tolist(), texts, strict=True)
        ]

    def _greedy(self, greedy: Greedy, logits_N1V, cache, mask_NP, lengths_N) -> list[str]:
        """The model's own answers, continued from the prefixes' cache; rows that are done are carried along."""
        stops = self._stop_ids(greedy.stop)
        tokens, done_N = [], torch.zeros(len(mask_NP), dtype=torch.bool, device=self.device)
        for step in range(greedy.max_new_tokens):
            next_N = logits_N1V[:, -1].argmax(-1)
            tokens.append(next_N)
            done_N |= torch.isin(next_N, stops)
            if done_N.all() or step == greedy.max_new_tokens - 1:
                break
            mask_NP = torch.cat([mask_NP, mask_NP.new_ones(len(mask_NP), 1)], 1)
            out = self.model(
                input_ids=next_N[:, None],
                attention_mask=mask_NP,
                position_ids=(lengths_N + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits_N1V = out.logits
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


def batches(items: Sequence[Item], batch_tokens: int, vocabulary: int) -> Iterator[list[Item]]:
    """Consecutive items (sorted by prefix length) whose padded prefixes and float32 logits stay within bounds."""
    batch: list[Item] = []
    longest = answer = 0
    for item in items:
        longest = max(longest, len(item.prefix_ids))
        answer = max(answer, len(item.answer_ids))
        rows = len(batch) + 1
        if batch and (rows * (longest + answer) > batch_tokens or rows * answer * vocabulary > 2**28):
            yield batch
            batch, longest, answer = [], len(item.prefix_ids), len(item.answer_ids)
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
