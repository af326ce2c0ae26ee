"""Pre-trains the tiny models in `models/` from scratch: two to five minutes each on one GPU.

    python -m recipes.pretrain_tiny --out models [--models tiny-base tiny-context ...]

What they learn decides what RL can show, so it is spelled out here and repeated in each model card:

- The **base model** sees questions with no trace, with good, partial, useless and misleading traces, always followed by
  the right answer. So it answers badly on its own and well from a good trace; a few traces with a slip in them teach it
  not to trust one blindly.
- The **context model** never sees an answer. It first learns to write full solutions, then a mixture of traces most of
  which are useless: RL has behaviour to select. One that only knew full solutions would leave RL nothing to do.
- The **judge** of the dialogues sees a question, a reference and a reply in its chat template, and answers by the rule
  of `leg_talk.share_right`.

Questions held out by `symbolic.is_held_out` are in no model's training text. Models of the same reading, made by one
command, differ in size alone: they read the same documents in the same order.
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
import reasoning_gym
import torch
import torch.nn.functional as F
from reasoning_gym.arithmetic.leg_counting import ANIMALS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from context_rl import prompts
from context_rl.questions import Questions
from context_rl.tasks import dialogue as dialogue_task
from context_rl.tasks import leg_talk, symbolic
from eval.conditions import evaluate_condition, generate_traces
from eval.metrics import summarise
from scorer.local import LocalScorer

EOS = "<|endoftext|>"
SHARDS = 64
"""Of a text, each with a seed of its own: the text is the same for any number of workers."""


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
        if not symbolic.is_held_out(question):
            traces = leg_traces(symbolic.worked_solution(animals), int(answer), animals, rng)
            yield Problem(question, answer, traces)


def dialogue(seed: int) -> Iterator[Problem]:
    """Dialogues about legs with free-form replies, with the same kinds of trace; none about a held-out problem."""
    rng = random.Random(seed)
    for talk in leg_talk.talks(seed, held_out=False):
        yield Problem(talk.question, talk.reply, leg_traces(talk.solution, talk.total, talk.animals, rng))


def leg_traces(solution: str, total: int, animals: dict[str, int], rng: random.Random) -> dict[str, str]:
    """Kind -> trace."""
    sentences = solution.split(". ")
    names = [symbolic.plural(animal, 2) for animal in animals]
    wrong = max(0, total + rng.choice([-1, 1]) * rng.randint(3, 30))
    return {
        "solution": solution,
        "truncated": ". ".join(sentences[: rng.randint(1, len(sentences) - 1)]) + ".",
        "facts": " ".join(f"A {animal} has {ANIMALS[animal]} legs." for animal in animals),
        "restatement": "The question asks how many legs there are in total.",
        "listing": f"There are {len(names)} kinds of animals: {', '.join(names)}.",
        "guess": f"It must be about {wrong}.",
        "slip": slip(solution, rng),
    }


def judgements(seed: int) -> Iterator[Problem]:
    """What the judge is asked about a reply, hard or soft, and what it should say; none about a held-out problem."""
    rng = random.Random(seed)
    for talk in leg_talk.talks(seed, held_out=False):
        yield judgement(talk, rng)


def judgement(talk: leg_talk.Talk, rng: random.Random) -> Problem:
    """One question to the judge: the reply is right in another wording, wrong in one fact or two, or cut short."""
    kind = rng.choices(["right", "total", "most", "both", "cut"], [40, 25, 15, 12, 8])[0]
    total, most = talk.total, talk.most
    if kind in ("total", "both"):
        total = wrong_number(total, rng)
    if kind in ("most", "both"):
        others = [animal for animal in (talk.animals if rng.random() < 0.7 else ANIMALS)]
        most = rng.choice([name for name in (symbolic.plural(animal, 2) for animal in others) if name != talk.most])
    reply = leg_talk.say(rng, total, most)
    if kind == "cut":
        words = reply.split()
        reply = " ".join(words[: rng.randint(1, len(words) - 1)])
    share = leg_talk.share_right(reply, talk.total, talk.most)
    how = rng.choice(["hard", "soft"])
    verdict = ("yes" if share == 1 else "no") if how == "hard" else str(round(10 * share))
    return Problem(prompts.judge_messages(how, talk.question, talk.reply, reply)[0]["content"], verdict, {})


def wrong_number(number: int, rng: random.Random) -> int:
    """Another number: near it, of other digits in one place, or any."""
    digits = list(str(number))
    digits[rng.randrange(len(digits))] = rng.choice("0123456789")
    other = rng.choice([number + rng.choice([-1, 1]) * rng.randint(1, 12), int("".join(digits)), rng.randint(0, 400)])
    return other if other >= 0 and other != number else number + 2


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


SOURCES: dict[str, Callable[[int], Iterator[Problem]]] = {
    "leg_counting": leg_counting,
    "gsm_symbolic": gsm_symbolic,
    "dialogue": dialogue,
    "judgements": judgements,
}


def base_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the base model; kind "none" is the question and its answer alone."""
    trace = problem.traces.get(kind)
    prompt = prompts.base_prefix(problem.question, None) if kind == "none" else prompts.trace_text(problem.question)
    full = prompts.base_prefix(problem.question, trace) + prompts.answer_text(problem.answer) + EOS
    return prompt, full.removeprefix(prompt)


def context_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the context model: a trace, never an answer."""
    return prompts.trace_text(problem.question), f" {problem.traces[kind]}{EOS}"


def judge_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the judge: its chat template and its verdict."""
    return JUDGE_PROMPT.format(content=problem.question), f" {problem.answer}{EOS}"


JUDGE_PROMPT = "user: {content}\nassistant:"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Writes one user message as `JUDGE_PROMPT` does."""


# --- the models ---


@dataclass(frozen=True)
class Reading:
    """What a model reads.

    Attributes:
        document: (problem, kind of trace) -> (text without loss, text with loss).
        phases: (share of the documents, shares of each kind of trace among them), one after the other.
        sources: name in `SOURCES` -> documents.
    """

    document: Callable[[Problem, str], tuple[str, str]]
    phases: tuple[tuple[float, dict[str, float]], ...]
    sources: dict[str, int]
    vocab_size: int
    chat_template: str | None = None


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


BASE_KINDS = {
    "none": 0.25, "solution": 0.32, "slip": 0.04, "truncated": 0.11, "facts": 0.10,
    "restatement": 0.06, "listing": 0.06, "guess": 0.06,
}  # fmt: skip
# A restatement is the likeliest opening, so that greedy decoding does not find the solutions before RL does.
CONTEXT_KINDS = {
    "solution": 0.15, "truncated": 0.10, "facts": 0.15, "restatement": 0.32, "listing": 0.15, "guess": 0.13,
}  # fmt: skip
FOR_A_BASE = ((1.0, BASE_KINDS),)
FOR_A_CONTEXT = ((0.5, {"solution": 1.0}), (0.5, CONTEXT_KINDS))

MATHEMATICS = {"leg_counting": 2_400_000, "gsm_symbolic": 300_000}
READINGS = {
    "base": Reading(base_document, FOR_A_BASE, MATHEMATICS, 2048),
    "context": Reading(context_document, FOR_A_CONTEXT, MATHEMATICS, 1024),
    "dialogue base": Reading(base_document, FOR_A_BASE, {"dialogue": 1_500_000}, 1024),
    "dialogue context": Reading(context_document, FOR_A_CONTEXT, {"dialogue": 1_500_000}, 1024),
    "judge": Reading(judge_document, ((1.0, {"": 1.0}),), {"judgements": 2_500_000}, 1024, CHAT_TEMPLATE),
}
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


Batches = list[tuple[torch.Tensor, torch.Tensor]]


def read(name: str, args: argparse.Namespace, log: Callable[[str], None]) -> tuple[PreTrainedTokenizerFast, Batches]:
    """The tokenizer and all batches of a reading, in the order of training."""
    reading, rng, started = READINGS[name], random.Random(args.seed), time.perf_counter()
    kinds = reading.phases[-1][1]
    texts = (
        "".join(pair)
        for source in reading.sources
        for pair in write_documents(source, args.seed + 90, args.tokenizer_docs, reading.document, kinds)
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
                    args.seed * 10_000 + phase * 1000 + shard,
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
    torch.manual_seed(args.seed)
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
        "seed": args.seed,
        "training_seconds": round(seconds),
        "final_loss": losses[-1][1],
    }
    (folder / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")


# --- what came out ---


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
            folder = Path(args.out) / name
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
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
    folder, rng = Path(args.out) / "tiny-judge", random.Random(0)
    talks = islice(leg_talk.talks(symbolic.HELD_OUT_STREAM, held_out=True), args.check_questions)
    asked = [judgement(talk, rng) for talk in talks]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
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
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check_questions", type=int, default=2000, help="0 for no check")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)

    for reading in READINGS:
        if names := [name for name in args.models if TINY_MODELS[name].reading == reading]:
            tokenizer, data = read(reading, args, log)
            for name in names:
                train(name, tokenizer, data, args, log)
    if args.check_questions:
        check(args, log)


if __name__ == "__main__":
    main()
