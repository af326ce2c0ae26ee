"""Pre-trains the tiny models in `models/` from scratch: two to five minutes each on one GPU.

    python -m recipes.pretrain_tiny --out models [--models tiny-base tiny-context ...]

What they read decides what RL can show: `recipes/tiny_text.py`. Models of the same reading differ in size alone: they
read the same documents in the same order.
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
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from context_rl import prompts
from context_rl.questions import Questions
from context_rl.tasks import dialogue as dialogue_task
from context_rl.tasks import leg_talk, symbolic
from eval.conditions import evaluate_condition, generate_traces
from eval.metrics import summarise
from recipes.tiny_text import EOS, READINGS, judgement, write_documents
from scorer.local import LocalScorer

SHARDS = 64
"""Of a text, each with a seed of its own: the text is the same for any number of workers."""


# --- the models ---


@dataclass(frozen=True)
class TinyModel:
    """What a model reads (a name in `READINGS`) and its size."""

    reading: str
    hidden_size: int
    layers: int
    heads: int
    mlp: int

    def config(self, vocab_size: int, eos_token_id: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocab_size, hidden_size=self.hidden_size, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=eos_token_id, pad_token_id=eos_token_id,
        )  # fmt: skip


TINY_MODELS = {
    "tiny-base": TinyModel("base", hidden_size=256, layers=6, heads=4, mlp=688),
    "tiny-base-medium": TinyModel("base", hidden_size=128, layers=5, heads=4, mlp=344),
    "tiny-base-small": TinyModel("base", hidden_size=64, layers=3, heads=2, mlp=176),
    "tiny-context": TinyModel("context", hidden_size=192, layers=4, heads=6, mlp=512),
    "tiny-context-medium": TinyModel("context", hidden_size=128, layers=4, heads=4, mlp=344),
    "tiny-context-small": TinyModel("context", hidden_size=64, layers=3, heads=2, mlp=176),
    "tiny-dialogue-base": TinyModel("dialogue base", hidden_size=96, layers=3, heads=3, mlp=256),
    "tiny-dialogue-context": TinyModel("dialogue context", hidden_size=128, layers=5, heads=4, mlp=344),
    "tiny-judge": TinyModel("judge", hidden_size=128, layers=4, heads=4, mlp=344),
}


def build_tokenizer(texts: Iterator[str], vocab_size: int, chat_template: str | None) -> PreTrainedTokenizerFast:
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
    fast.chat_template = chat_template
    return fast


Row = tuple[np.ndarray, int]
"""Token ids of a document, and how many of the first ones carry no loss."""

# --- data, batched by length ---


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


Batches = list[tuple[torch.Tensor, torch.Tensor]]


def read(
    name: str, seed: int, args: argparse.Namespace, log: Callable[[str], None]
) -> tuple[PreTrainedTokenizerFast, Batches]:
    """The tokenizer and all batches of a reading, in the order of training."""
    reading, rng, started = READINGS[name], random.Random(seed), time.perf_counter()
    kinds = reading.phases[-1][1]
    texts = (
        "".join(pair)
        for source in reading.sources
        for pair in write_documents(source, seed + 90, args.tokenizer_docs, reading.document, kinds)
    )
    tokenizer = build_tokenizer(texts, reading.vocab_size, reading.chat_template)
    encode = partial(
        encode_shard,
        document=reading.document,
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        max_tokens=args.max_tokens,
    )
    data, documents = [], 0
    with ProcessPoolExecutor(args.workers) as pool:
        for phase, (share, kinds) in enumerate(reading.phases):
            jobs = [
                (
                    source,
                    seed * 10_000 + phase * 1000 + shard,
                    math.ceil(args.share * docs * share / SHARDS),
                    kinds,
                )
                for source, docs in reading.sources.items()
                for shard in range(SHARDS)
            ]
            parts = tqdm(
                pool.map(encode, jobs), total=len(jobs), desc=f"{name}: writing text {phase + 1}", mininterval=5
            )
            rows = [row for part in parts for row in part]
            documents += len(rows)
            data += batches(rows, args.tokens_per_batch, tokenizer.eos_token_id, rng)
    tokens = sum(ids.numel() for ids, _ in data)
    seconds = time.perf_counter() - started
    log(f"{name}: {documents:,} documents, {tokens / 1e6:.0f} M tokens, {len(data):,} batches, {seconds:.0f} s")
    return tokenizer, data


# --- training ---


def train(
    name: str,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    data: Batches,
    args: argparse.Namespace,
    log: Callable[[str], None],
) -> None:
    """One model on one reading, saved to its folder in float16."""
    spec = TINY_MODELS[name]
    reading = READINGS[spec.reading]
    with_loss = sum(int((labels != -100).sum()) for _, labels in data)
    tokens = sum(ids.numel() for ids, _ in data)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(spec.config(len(tokenizer), tokenizer.eos_token_id)).to(args.device)
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
        "documents": sum(len(ids) for ids, _ in data),
        "sources": reading.sources,
        "tokens": tokens,
        "phases": reading.phases,
        "steps": steps,
        "lr": args.lr,
        "tokens_per_batch": args.tokens_per_batch,
        "seed": seed,
        "training_seconds": round(seconds),
        "final_loss": losses[-1][1],
    }
    (folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")


# --- what came out ---


def load(folder: Path, device: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model as it was saved, in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def check(args: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Every base model that is there, on held-out questions with no trace, the gold solution and each q's traces."""
    for task in (
        symbolic.load(train_size=0, eval_size=args.check_questions, seed=0),
        dialogue_task.load(None, None, None, None, train_size=0, eval_size=args.check_questions, seed=0),
    ):
        kind = "dialogue " if task.name == "dialogue" else ""
        there = [name for name in TINY_MODELS if (Path(args.out) / name / "config.json").exists()]
        contexts = [name for name in there if TINY_MODELS[name].reading == f"{kind}context"]
        asked = [prompts.trace_text(example.question) for example in task.held_out]
        traces: dict[str, list[str | None]] = {
            "no trace": [None] * len(asked),
            "gold solution": [example.solution for example in task.held_out],
        }
        for name in contexts:
            model, tokenizer = load(Path(args.out) / name, args.device)
            for label, sample in (("greedy", False), ("T = 1", True)):
                traces[f"{name}, {label}"] = written = generate_traces(
                    model, tokenizer, asked, sample=sample, max_new_tokens=80, stops=prompts.STOP_STRINGS, seed=0
                )
                openings = Counter(" ".join("".join(c for c in t if not c.isdigit()).split()[:2]) for t in written)
                log(f"{name}, {label}: openings {openings.most_common(8)}")
        ids = [example.id for example in task.held_out]
        for name in there:
            if TINY_MODELS[name].reading == f"{kind}base":
                scorer = LocalScorer(str(Path(args.out) / name))
                questions = Questions(task.held_out, task.grade, scorer)
                for label, chosen in traces.items():
                    found = summarise(evaluate_condition(questions, ids, chosen, "", label))
                    log(
                        f"{name}: {label}: accuracy {found['accuracy']:.3f} {found['accuracy_ci']}, "
                        f"mean log p {found['mean_logprob']:.3f}, n = {found['n']}"
                    )
    if (Path(args.out) / "tiny-judge" / "config.json").exists():
        check_judge(args, log)


def check_judge(args: argparse.Namespace, log: Callable[[str], None]) -> None:
    """How often the judge says what the rule says, about dialogues that it has not read."""
    rng = random.Random(0)
    talks = islice(leg_talk.talks(symbolic.HELD_OUT_STREAM, held_out=True), args.check_questions)
    asked = [judgement(talk, rng) for talk in talks]
    model, tokenizer = load(Path(args.out) / "tiny-judge", args.device)
    messages = [[{"role": "user", "content": problem.question}] for problem in asked]
    said = generate_traces(model, tokenizer, messages, sample=False, max_new_tokens=4, stops=(), seed=0)
    for label, kinds in (("hard", ("yes", "no")), ("soft", ("0", "5", "10"))):
        pairs = [(p.answer, s) for p, s in zip(asked, said, strict=True) if p.answer in kinds]
        right = sum(answer == s for answer, s in pairs)
        wrong = Counter(pair for pair in pairs if pair[0] != pair[1]).most_common(5)
        log(f"tiny-judge, {label}: right {right} of {len(pairs)}; most frequent mistakes (should, said): {wrong}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="models", help="folder that receives one folder a model")
    parser.add_argument("--models", nargs="+", default=list(TINY_MODELS), choices=list(TINY_MODELS))
    parser.add_argument("--share", type=float, default=1.0, help="of the documents that each model reads")
    parser.add_argument("--tokenizer_docs", type=int, default=20_000, help="documents of each source for the tokenizer")
    parser.add_argument("--tokens_per_batch", type=int, default=65_536)
    parser.add_argument("--max_tokens", type=int, default=512, help="longer documents are left out")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, help="unset: those of the models in models/")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check_questions", type=int, default=2000, help="0 for no check")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)

    for reading in READINGS:
        if names := [name for name in args.models if TINY_MODELS[name].reading == reading]:
            seed = READINGS[reading].seed if args.seed is None else args.seed
            tokenizer, data = read(reading, seed, args, log)
            for name in names:
                train(name, seed, tokenizer, data, args, log)
    if args.check_questions:
        check(args, log)


if __name__ == "__main__":
    main()
