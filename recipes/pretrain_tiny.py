"""Pre-trains the two tiny models in `models/` from scratch: about ten minutes on one GPU.

    python -m recipes.pretrain_tiny --out models

What they learn decides what RL can show, so it is spelled out here and repeated in each model card:

- The **base model** sees questions with no trace, with good, partial, useless and misleading traces, always followed by
  the right answer. So it answers badly on its own and well from a good trace; a few traces with a slip in them teach it
  not to trust one blindly.
- The **context model** never sees an answer. It first learns to write full solutions, then a mixture of traces most of
  which are useless: RL has behaviour to select. One that only knew full solutions would leave RL nothing to do.

Questions held out by `symbolic.is_held_out` are in neither model's training text.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import reasoning_gym
import torch
import torch.nn.functional as F
from reasoning_gym.arithmetic.leg_counting import ANIMALS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from context_rl import prompts
from context_rl.questions import Questions
from context_rl.tasks import symbolic
from eval.conditions import evaluate_condition, generate_traces
from eval.metrics import summarise
from scorer.local import LocalScorer

EOS = "<|endoftext|>"


# --- what the models read ---


@dataclass(frozen=True)
class Problem:
    """A question with its answer, a full solution, and the unhelpful things one could write in its place."""

    question: str
    answer: str
    traces: dict[str, str]


def leg_counting(seed: int) -> Iterator[Problem]:
    """The default task with its kinds of trace; held-out questions left out."""
    rng = random.Random(seed)
    for question, answer, animals in symbolic.problems(seed):
        if symbolic.is_held_out(question):
            continue
        solution = symbolic.worked_solution(animals)
        sentences = solution.split(". ")
        names = [symbolic.plural(animal, 2) for animal in animals]
        wrong = max(0, int(answer) + rng.choice([-1, 1]) * rng.randint(3, 30))
        yield Problem(
            question,
            answer,
            {
                "solution": solution,
                "truncated": ". ".join(sentences[: rng.randint(1, len(sentences) - 1)]) + ".",
                "facts": " ".join(f"A {animal} has {ANIMALS[animal]} legs." for animal in animals),
                "restatement": "The question asks how many legs there are in total.",
                "listing": f"There are {len(names)} kinds of animals: {', '.join(names)}.",
                "guess": f"It must be about {wrong}.",
                "slip": slip(solution, rng),
            },
        )


def slip(solution: str, rng: random.Random) -> str:
    """The solution with one digit of one number changed."""
    places = [i for i, character in enumerate(solution) if character.isdigit()]
    if not places:
        return solution
    place = rng.choice(places)
    other = rng.choice([digit for digit in "0123456789" if digit != solution[place]])
    return solution[:place] + other + solution[place + 1 :]


def gsm_symbolic(seed: int) -> Iterator[Problem]:
    """reasoning-gym's GSM8K-style word problems: longer and harder, so that the models have seen more than one task."""
    rng = random.Random(seed)
    ending = " Give the result as your final answer. Do not include units."
    for item in reasoning_gym.create_dataset("gsm_symbolic", seed=seed * 10_000_000, size=10_000_000):
        question = item["question"].removesuffix(ending).strip()
        solution = item["metadata"]["answer_cot"].rpartition("####")[0].strip()
        if not solution:
            continue
        lines = solution.split("\n")
        asked = question.rstrip("?.").rpartition(". ")[2]
        given = question.partition(". ")[0]
        wrong = max(0, round(float(item["answer"])) + rng.choice([-1, 1]) * rng.randint(3, 30))
        yield Problem(
            question,
            item["answer"],
            {
                "solution": solution,
                "truncated": "\n".join(lines[: max(1, len(lines) // 2)])
                if len(lines) > 1
                else solution[: len(solution) // 2],
                "facts": f"Given: {given}.",
                "restatement": f"The question asks: {asked}?",
                "listing": "This is a word problem about numbers.",
                "guess": f"It must be about {wrong}.",
                "slip": slip(solution, rng),
            },
        )


SOURCES: dict[str, Callable[[int], Iterator[Problem]]] = {"leg_counting": leg_counting, "gsm_symbolic": gsm_symbolic}


def base_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the base model; kind "none" is the question and its answer alone."""
    trace = problem.traces.get(kind)
    prompt = prompts.base_prefix(problem.question, None) if kind == "none" else prompts.trace_text(problem.question)
    full = prompts.base_prefix(problem.question, trace) + prompts.answer_text(problem.answer) + EOS
    return prompt, full.removeprefix(prompt)


def context_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the context model: a trace, never an answer."""
    return prompts.trace_text(problem.question), f" {problem.traces[kind]}{EOS}"


# --- the models ---


@dataclass(frozen=True)
class TinyModel:
    """Size and text of one model. `phases` are (share of the documents, shares of each kind of trace among them)."""

    document: Callable[[Problem, str], tuple[str, str]]
    phases: tuple[tuple[float, dict[str, float]], ...]
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    mlp: int

    def config(self, eos_token_id: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=eos_token_id, pad_token_id=eos_token_id,
        )  # fmt: skip


BASE_KINDS = {
    "none": 0.25, "solution": 0.32, "slip": 0.04, "truncated": 0.11, "facts": 0.10,
    "restatement": 0.06, "listing": 0.06, "guess": 0.06,
}  # fmt: skip
# A restatement is the likeliest opening, so that greedy decoding does not find the solutions before RL does.
CONTEXT_KINDS = {
    "solution": 0.15, "truncated": 0.10, "facts": 0.15, "restatement": 0.32, "listing": 0.15, "guess": 0.13,
}  # fmt: skip

TINY_MODELS = {
    "tiny-base": TinyModel(
        base_document, ((1.0, BASE_KINDS),),
        vocab_size=2048, hidden_size=256, layers=6, heads=4, mlp=688,
    ),
    "tiny-context": TinyModel(
        context_document, ((0.5, {"solution": 1.0}), (0.5, CONTEXT_KINDS)),
        vocab_size=1024, hidden_size=192, layers=4, heads=6, mlp=512,
    ),
}  # fmt: skip


def build_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps every digit a token of its own, so that numbers have one spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}|\n| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, padding_side="left")
    fast.model_max_length = 1024
    return fast


Row = tuple[np.ndarray, int]
"""Token ids of a document, and how many of the first ones carry no loss."""

# --- data, batched by length ---


def write_documents(
    source: str, seed: int, count: int, document: Callable[[Problem, str], tuple[str, str]], kinds: dict[str, float]
) -> list[tuple[str, str]]:
    """`count` documents of one source with kinds drawn by their shares."""
    rng = random.Random(seed)
    drawn = rng.choices(list(kinds), list(kinds.values()), k=count)
    return [document(problem, kind) for problem, kind in zip(SOURCES[source](seed), drawn, strict=False)]


def encode_shard(
    job: tuple[str, int, int, dict], document: Callable, tokenizer_json: str, max_tokens: int
) -> list[Row]:
    """One source's shard as token ids; the parts without and with loss are encoded apart, as at run time."""
    source, seed, count, kinds = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    pairs = write_documents(source, seed, count, document, kinds)
    heads = tokenizer.encode_batch_fast([p for p, _ in pairs])
    tails = tokenizer.encode_batch_fast([t for _, t in pairs])
    rows = [(np.array(h.ids + t.ids, dtype=np.int16), len(h.ids)) for h, t in zip(heads, tails, strict=True)]
    return [row for row in rows if len(row[0]) <= max_tokens]


def batches(
    rows: list[Row], tokens_per_batch: int, pad_id: int, rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of similar length together, padded to a multiple of 16: (ids [B, L], labels [B, L], -100 where no loss)."""
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(math.ceil(len(row[0]) / 16) * 16, []).append(row)
    out = []
    for length, group in by_length.items():
        rng.shuffle(group)
        size = max(1, tokens_per_batch // length)
        for start in range(0, len(group), size):
            chunk = group[start : start + size]
            ids = np.full((len(chunk), length), pad_id, dtype=np.int16)
            labels = np.full((len(chunk), length), -100, dtype=np.int16)
            for i, (tokens, prompt) in enumerate(chunk):
                ids[i, : len(tokens)] = tokens
                labels[i, prompt : len(tokens)] = tokens[prompt:]
            out.append((torch.from_numpy(ids), torch.from_numpy(labels)))
    rng.shuffle(out)
    return out


# --- training ---


def train(name: str, args: argparse.Namespace, log: Callable[[str], None]) -> None:
    spec, rng = TINY_MODELS[name], random.Random(args.seed)
    started = time.perf_counter()

    kinds = spec.phases[-1][1]
    texts = (
        "".join(pair)
        for source in SOURCES
        for pair in write_documents(source, args.seed + 90, args.tokenizer_docs, spec.document, kinds)
    )
    tokenizer = build_tokenizer(texts, spec.vocab_size)
    encode = partial(
        encode_shard,
        document=spec.document,
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        max_tokens=args.max_tokens,
    )
    data, documents = [], 0
    with ProcessPoolExecutor(args.workers) as pool:
        for phase, (share, kinds) in enumerate(spec.phases):
            shards = 4 * args.workers
            jobs = [
                (source, args.seed * 10_000 + phase * 1000 + shard, math.ceil(docs * share / shards), kinds)
                for source, docs in (("leg_counting", args.leg_docs), ("gsm_symbolic", args.gsm_docs))
                for shard in range(shards)
            ]
            parts = tqdm(
                pool.map(encode, jobs), total=len(jobs), desc=f"{name}: writing text {phase + 1}", mininterval=5
            )
            rows = [row for part in parts for row in part]
            documents += len(rows)
            data += batches(rows, args.tokens_per_batch, tokenizer.eos_token_id, rng)
    with_loss = sum(int((labels != -100).sum()) for _, labels in data)
    tokens = sum(ids.numel() for ids, _ in data)
    seconds = time.perf_counter() - started
    log(f"{name}: {documents:,} documents, {tokens / 1e6:.0f} M tokens, {len(data):,} batches, {seconds:.0f} s")

    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(spec.config(tokenizer.eos_token_id)).to(args.device)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=args.device == "cuda",
    )  # fmt: skip
    steps = len(data)

    def lr_share(step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_share)
    began, losses = time.perf_counter(), []
    for step in (bar := tqdm(range(steps), desc=name, mininterval=5)):
        ids, labels = (t.to(args.device, non_blocking=True).long() for t in data[step])
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logits = model(input_ids=ids).logits
        # A sum over the batch, not its mean: batches hold documents of one length, and a mean would make a token of a
        # short document count for more than one of a long document.
        total = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (total * len(data) / with_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == steps - 1:
            losses.append((step, round(total.item() / int((labels[:, 1:] != -100).sum()), 4)))
            bar.set_postfix(loss=losses[-1][1])
    seconds = time.perf_counter() - began
    log(f"{name}: {steps} steps, {seconds:.0f} s, {tokens / seconds / 1e6:.2f} M tokens/s, losses {losses}")

    folder = Path(args.out) / name
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "documents": documents,
        "tokens": tokens,
        "phases": spec.phases,
        "steps": steps,
        "lr": args.lr,
        "tokens_per_batch": args.tokens_per_batch,
        "seed": args.seed,
        "training_seconds": round(seconds),
        "final_loss": losses[-1][1],
    }
    (folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")


# --- what came out ---


def check(args: argparse.Namespace, log: Callable[[str], None]) -> None:
    """The base model on held-out questions with no trace, the gold solution and the context model's own traces."""
    task = symbolic.load(train_size=0, eval_size=args.check_questions, seed=0)
    scorer = LocalScorer(str(Path(args.out) / "tiny-base"))
    questions = Questions(task.held_out, task.grade, scorer, max_answer_tokens=6)
    folder = Path(args.out) / "tiny-context"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    asked = [prompts.trace_text(example.question) for example in task.held_out]
    settings = {"max_new_tokens": 80, "stops": prompts.STOP_STRINGS, "seed": 0}
    traces = {
        "no trace": [None] * len(asked),
        "gold solution": [example.solution for example in task.held_out],
        "context model, greedy": generate_traces(model, tokenizer, asked, sample=False, **settings),
        "context model, T = 1": generate_traces(model, tokenizer, asked, sample=True, **settings),
    }
    ids = [example.id for example in task.held_out]
    for label, chosen in traces.items():
        result = summarise(evaluate_condition(questions, ids, chosen, "", label))
        log(f"{label}: accuracy {result['accuracy']:.3f}, mean log p {result['mean_logprob']:.3f}, n = {result['n']}")
        openings = Counter(" ".join("".join(c for c in t if not c.isdigit()).split()[:2]) for t in chosen if t)
        if label.startswith("context"):
            log(f"   openings: {openings.most_common(8)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="models", help="folder that receives one folder a model")
    parser.add_argument("--models", nargs="+", default=list(TINY_MODELS), choices=list(TINY_MODELS))
    parser.add_argument("--leg_docs", type=int, default=2_400_000)
    parser.add_argument("--gsm_docs", type=int, default=300_000)
    parser.add_argument("--tokenizer_docs", type=int, default=20_000, help="documents of each source for the tokenizer")
    parser.add_argument("--tokens_per_batch", type=int, default=65_536)
    parser.add_argument("--max_tokens", type=int, default=512, help="longer documents are left out")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check_questions", type=int, default=2000)
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)

    for name in args.models:
        train(name, args, log)
    if all((Path(args.out) / name / "config.json").exists() for name in TINY_MODELS):
        check(args, log)


if __name__ == "__main__":
    main()
