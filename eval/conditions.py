"""Help against no help: what the base model says on held-out questions with this or that in the trace's place.

Conditions: none (no trace at all), untrained and trained (q's traces before and after RL), shuffled (trained traces,
each moved to another question: what form and length alone would buy). Traces are decoded greedily and sampled at
temperature 1.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from context_rl import prompts
from context_rl.questions import Questions
from scorer.types import Unscored

DECODINGS = ("greedy", "sampled")


def fixed(ids: Iterable[str], count: int) -> list[str]:
    """`count` of the ids, the same few every time: those whose hashes are smallest."""
    return sorted(ids, key=lambda i: hashlib.sha256(i.encode()).digest())[:count]


@dataclass(frozen=True)
class Written:
    """A trace that a model has written; `finished` says that it ended it, by EOS or a stop string, within the limit."""

    text: str
    finished: bool


def generate_traces(*args: Any, **options: Any) -> list[str]:
    """The texts alone of what `write_traces` returns."""
    return [written.text for written in write_traces(*args, **options)]


@torch.inference_mode()
def write_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trace_prompts: Sequence[str | list[dict[str, str]]],
    *,
    sample: bool,
    max_new_tokens: int,
    stops: Sequence[str],
    seed: int,
    batch_size: int = 256,
    description: str = "traces",
) -> list[Written]:
    """q's traces in the order of the prompts: greedy, or sampled from its whole distribution at temperature 1.

    Prompts of similar length share a batch. The sampler's state outside is left as it was.
    """
    device = model.device
    texts = [
        p if isinstance(p, str) else tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
        for p in trace_prompts
    ]
    raw = all(isinstance(p, str) for p in trace_prompts)
    encoded = [tokenizer(text, add_special_tokens=raw)["input_ids"] for text in texts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    traces = [Written("", False)] * len(encoded)
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch", leave=False):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, padding_side="left", return_tensors="pt")
            ids = model.generate(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                max_new_tokens=max_new_tokens,
                do_sample=sample,
                pad_token_id=tokenizer.pad_token_id,
                **({"temperature": 1.0, "top_p": 1.0, "top_k": 0} if sample else {}),
            )
            for i, row in zip(chosen, ids[:, batch["input_ids"].shape[1] :], strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                ended = not ends.isdisjoint(row.tolist()) or any(stop in text for stop in stops)
                traces[i] = Written(prompts.parse_trace(text, stops), ended)
    model.train(training)
    return traces


def shuffle_between_questions(traces: Sequence[str], seed: int = 0) -> list[str]:
    """Every trace moved to another question: a random cycle through all of them. Needs at least two."""
    if len(traces) < 2:
        raise ValueError("one trace cannot be moved to another question")
    order = list(range(len(traces)))
    random.Random(seed).shuffle(order)
    moved = [""] * len(traces)
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        moved[there] = traces[here]
    return moved


def evaluate_condition(
    questions: Questions, ids: Sequence[str], traces: Sequence[str | None], decoding: str, description: str
) -> list[dict[str, Any]]:
    """One row an item: the trace, the answer's log-prob, the base model's own answer and whether it is right."""
    rows = []
    block = 250
    for start in tqdm(range(0, len(ids), block), desc=description, unit="block", leave=False):
        part = list(zip(ids[start : start + block], traces[start : start + block], strict=True))
        for (example_id, trace), reading in zip(part, questions.read(*zip(*part, strict=True)), strict=True):
            failed = isinstance(reading, Unscored)
            rows.append(
                {
                    "id": example_id,
                    "decoding": decoding,
                    "trace": trace,
                    "token_logprobs": None if failed else list(reading.score.token_logprobs),
                    "logprob": None if failed else math.fsum(reading.score.token_logprobs),
                    "base_answer": None if failed else reading.answer,
                    "correct": None if failed else reading.correct,
                    "unscored": reading.reason if failed else None,
                }
            )
    return rows
