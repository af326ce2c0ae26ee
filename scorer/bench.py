"""How fast is the scorer, against what, and does it agree? Every ratio is measured in one run on one machine.

    python -m scorer.bench                                        # a toy on CPU, under 3 minutes
    python -m scorer.bench --arch qwen2.5-1.5b --python ENV/bin/python     # on a GPU

A model of a named architecture with random weights is made, and these score the same kind of items in turn:

- published: one transformers forward pass a sample, full logits, and the no-trace baseline computed again every time
- local: `scorer.local`
- engine: vLLM in a process; floor = prefill only (no scores), stock = prompt_logprobs, ours = the pinned route
- http: `vllm serve`; stock = prompt_logprobs through /v1/completions, ours = the pinned route

Each round has items of its own (in process: an emptied prefix cache), so no cache knows them; every part warms up on
others first. The parts run one after another in processes of their own, so that one's memory is free for the next.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from scorer.types import Item, Score

ARCHITECTURES = {
    "toy": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "intermediate_size": 4864,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "intermediate_size": 8960,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""Shapes of Qwen2 models, all with the vocabulary of the real ones: the LM head is what scoring can save."""
COMMON = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
PARTS = ("transformers", "engine", "http")
AGREEMENT_ITEMS = {"cuda": 32, "cpu": 12}
"""Items of each shape that every way scores once, to compare the numbers."""
PUBLISHED_SAMPLES = {"cuda": 64, "cpu": 8}
"""Samples of the published way in one round: it is too slow for all of them, and its rate does not depend on them."""


@dataclass(frozen=True)
class Shape:
    """Items of one kind: groups of traces, each trace followed by one or more endings; lengths in tokens."""

    name: str
    groups: int
    traces: int
    endings: int
    question: int
    trace: int
    answer: int

    @property
    def items(self) -> int:
        return self.groups * self.traces * self.endings

    @property
    def unique_tokens(self) -> int:
        """Tokens that have to be read if every shared beginning is read once."""
        return self.groups * (self.question + self.traces * (self.trace + self.endings * self.answer))

    def make(self, seed: int, vocabulary: int) -> list[Item]:
        """Random items; another seed shares no prefix with this one."""
        draw = random.Random(f"{self.name} {seed}")

        def ids(count: int) -> tuple[int, ...]:
            return tuple(draw.randrange(300, vocabulary - 300) for _ in range(count))

        made = []
        for group in range(self.groups):
            question, answers = ids(self.question), [ids(self.answer) for _ in range(self.endings)]
            for _ in range(self.traces):
                prefix = question + ids(self.trace)
                made += [Item(prefix, answer, f"{seed}/{group}") for answer in answers]
        return made


def shapes(scale: float) -> list[Shape]:
    """128 x 8 traces of GSM8K's lengths, and 64 x 8 x 4 of HellaSwag's, times `scale`."""
    return [
        Shape("gsm8k", max(1, round(128 * scale)), 8, 1, 100, 300, 8),
        Shape("hellaswag", max(1, round(64 * scale)), 8, 4, 80, 200, 24),
    ]


@dataclass
class Rate:
    """Scores a second of one way on one shape: the median, and each round's."""

    way: str
    shape: str
    per_second: float
    rounds: list[float]
    items: int


def measure(way: str, shape: Shape, vocabulary: int, rounds: int, run: Callable[[list[Item]], Any]) -> Rate:
    """Runs fresh items `rounds` times."""
    rates = []
    for seed in range(rounds):
        items = shape.make(1000 + seed, vocabulary)
        items = [Item(i.prefix_ids, i.answer_ids, f"{way} {i.group}") for i in items]
        began = time.perf_counter()
        run(items)
        rates.append(len(items) / (time.perf_counter() - began))
        print(f"{way:18} {shape.name:10} round {seed + 1} of {rounds}: {rates[-1]:.1f} scores/s", flush=True)
    return Rate(way, shape.name, statistics.median(rates), rates, shape.items)


# --- the parts: each runs in a process of its own and returns {"rates": [...], "scores": {way: [[...], ...]}} ---


def part_transformers(spec: dict[str, Any]) -> dict[str, Any]:
    """The published way and `scorer.local`; float32 scores as the reference of agreement."""
    from scorer.local import LocalScorer

    scorer = LocalScorer(spec["model"], dtype=spec["dtype"])
    model, device = scorer.model, scorer.device

    @torch.inference_mode()
    def forward(prefix: Sequence[int], answer: Sequence[int]) -> float:
        ids = torch.tensor([[*prefix, *answer]], device=device)
        logprobs = model(input_ids=ids).logits[0, len(prefix) - 1 : -1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, len(prefix) :, None]).sum().item()

    def published(items: list[Item]) -> None:
        question = spec_shape.question
        for item in items:
            forward(item.prefix_ids, item.answer_ids)
            forward(item.prefix_ids[:question], item.answer_ids)

    rates = []
    for spec_shape in map(lambda s: Shape(**s), spec["shapes"]):
        scorer.score(spec_shape.make(1, spec["vocabulary"])[: max(4, spec_shape.items // 8)])
        samples = PUBLISHED_SAMPLES[device.type]
        few = Shape(**{**asdict(spec_shape), "groups": samples // 8, "traces": 8, "endings": 1})
        published(few.make(2, spec["vocabulary"])[:2])
        rates.append(measure("published", few, spec["vocabulary"], spec["rounds"], published))
        rates.append(measure("local", spec_shape, spec["vocabulary"], spec["rounds"], scorer.score))
    scores = {"local": values(scorer.score(agreement_items(spec)))}
    if spec["dtype"] != "float32":
        del model
        scorer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        scores["reference"] = values(LocalScorer(spec["model"], dtype="float32").score(agreement_items(spec)))
    else:
        scores["reference"] = scores["local"]
    return {"rates": [asdict(rate) for rate in rates], "scores": scores, "tflops": matmul_tflops(spec["dtype"], device)}


def part_engine(spec: dict[str, Any]) -> dict[str, Any]:
    """vLLM in this process: prefill only, the stock route, ours."""
    from scorer.vllm.engine import EngineScorer

    rates, scores = [], {}
    with EngineScorer(spec["model"], dtype=spec["dtype"], max_model_len=2048, **spec["engine"]) as scorer:
        from vllm import SamplingParams, TokensPrompt

        ours, notes = scorer.routes, scorer.notes

        def floor(items: list[Item]) -> None:
            prompts = [TokensPrompt(prompt_token_ids=list(i.prefix_ids + i.answer_ids)) for i in items]
            params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, skip_clone=True)
            scorer.llm.generate(prompts, params, use_tqdm=False)

        ways = [("engine floor", ours, floor), ("engine stock", type(ours)(), scorer.score)]
        ways += [("engine ours", ours, scorer.score)]
        for way, routes, run in ways:
            scorer.routes = routes
            for shape in map(lambda s: Shape(**s), spec["shapes"]):
                run(shape.make(7, spec["vocabulary"])[: max(4, shape.items // 8)])
                scorer.llm.reset_prefix_cache()
                rates.append(measured_cold(way, shape, spec, run, scorer.llm.reset_prefix_cache))
            if run is not floor:
                scores[way] = values(scorer.score(agreement_items(spec)))
                scorer.llm.reset_prefix_cache()
        route = asdict(ours)
        version = scorer.fingerprint["vllm"]
    return {"rates": [asdict(r) for r in rates], "scores": scores, "route": route, "notes": notes, "vllm": version}


def measured_cold(way: str, shape: Shape, spec: dict[str, Any], run: Callable, forget: Callable) -> Rate:
    """`measure`, with an empty prefix cache before each round: all ways see the same items."""
    rates = []
    for _ in range(spec["rounds"]):
        forget()
        rates += measure(way, shape, spec["vocabulary"], 1, run).rounds
    return Rate(way, shape.name, statistics.median(rates), rates, shape.items)


def part_http(spec: dict[str, Any]) -> dict[str, Any]:
    """One server: the stock route, then ours."""
    from scorer.vllm import VllmScorer, open_vllm

    rates, scores = [], {}
    options = {key: spec["engine"][key] for key in ("gpu_memory_utilization",) if key in spec["engine"]}
    with open_vllm(
        spec["model"], python=spec["python"], dtype=spec["dtype"], max_model_len=2048, log_path=spec["log"], **options
    ) as ours:
        stock = VllmScorer(ours.url, ours.served_name, route="prompt_logprobs", transport="completions")
        with stock:
            for way, scorer in (("http stock", stock), ("http ours", ours)):
                for number, shape in enumerate(map(lambda s: Shape(**s), spec["shapes"])):
                    scorer.score(shape.make(7 + number, spec["vocabulary"])[: max(4, shape.items // 8)])
                    # The servers' cache cannot be emptied over HTTP, so each way has seeds of its own.
                    other = Shape(**{**asdict(shape), "name": f"{shape.name} {way}"})
                    rate = measure(way, other, spec["vocabulary"], spec["rounds"], scorer.score)
                    rates.append(Rate(way, shape.name, rate.per_second, rate.rounds, rate.items))
                scores[way] = values(scorer.score(agreement_items(spec)))
        usage = ours.take_usage().metrics()
        return {
            "rates": [asdict(r) for r in rates],
            "scores": scores,
            "route": asdict(ours.routes),
            "transport": ours.transport,
            "notes": ours.notes,
            "usage": {key: value for key, value in usage.items() if key.startswith(("cached", "latency", "retries"))},
        }


def agreement_items(spec: dict[str, Any]) -> list[Item]:
    """The items that every way scores once: of each shape the same number."""
    some: list[Item] = []
    for shape in spec["shapes"]:
        groups = {**shape, "groups": 1, "traces": min(8, shape["traces"])}
        some += Shape(**groups).make(99, spec["vocabulary"])[
            : AGREEMENT_ITEMS["cuda" if torch.cuda.is_available() else "cpu"]
        ]
    return some


def values(results: Sequence[Any]) -> list[list[float]]:
    """Log-probs of every item; the benchmark has no use for a failure."""
    bad = [result.reason for result in results if not isinstance(result, Score)]
    if bad:
        raise SystemExit(f"{len(bad)} items could not be scored, the first: {bad[0]}")
    return [list(result.token_logprobs) for result in results]


def matmul_tflops(dtype: str, device: torch.device) -> float:
    """Rate of a large matrix product here, in TFLOP/s: what the arithmetic bound is computed with."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


# --- the whole ---


def make_model(arch: str, folder: Path, dtype: str, seed: int) -> tuple[int, int]:
    """Saves a model with random weights and a tokenizer; returns its parameters outside and inside the embeddings."""
    torch.manual_seed(seed)
    options = {**COMMON, **ARCHITECTURES[arch]}
    config = Qwen2Config(**options, max_position_embeddings=32768, eos_token_id=0, bos_token_id=None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    # Any tokenizer will do, because the items are made of ids; the project's own small one is at hand.
    AutoTokenizer.from_pretrained(Path(__file__).resolve().parents[1] / "models" / "tiny-base").save_pretrained(folder)
    embedding = model.get_input_embeddings().weight.numel()
    copies = 1 if options["tie_word_embeddings"] else 2
    body = sum(p.numel() for p in model.parameters()) - copies * embedding
    del model
    torch.cuda.empty_cache()  # this process stays while the parts run: 14 GiB of a 7B model would be missing there
    return body, embedding


def bound(shape: Shape, body: int, head: int, tflops: float) -> float:
    """Scores a second if nothing but the matrix products of unique tokens and scored rows took time."""
    flops = 2 * body * shape.unique_tokens + 2 * head * shape.items * shape.answer
    return shape.items / (flops / (tflops * 1e12))


def distribution(scores: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> dict[str, float]:
    """Absolute differences per token, in nats."""
    pairs = [(a, b) for x, y in zip(scores, reference, strict=True) for a, b in zip(x, y, strict=True)]
    found = sorted(abs(a - b) for a, b in pairs)
    at = {f"p{q}": found[min(len(found) * q // 100, len(found) - 1)] for q in (50, 90, 99)}
    return {"tokens": len(found), "mean": statistics.fmean(found), **at, "max": found[-1]}


def run_part(part: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs one part in a process of its own; the engine's with the interpreter that has vLLM."""
    spec_path, result_path = folder / f"{part}.spec.json", folder / f"{part}.json"
    spec_path.write_text(json.dumps(spec))
    # Only this package goes to the other environment, not what lies beside it.
    link = folder / "path" / "scorer"
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(Path(__file__).resolve().parent, target_is_directory=True)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(link.parent), os.environ.get("PYTHONPATH")])))
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    python = spec["python"] if part == "engine" else sys.executable
    command = [python, "-m", "scorer.bench", "--part", part, "--spec", str(spec_path), "--out", str(result_path)]
    code = subprocess.run(command, env=env, check=False).returncode
    if code or not result_path.exists():
        return {"error": f"the part ended with exit code {code}", "rates": [], "scores": {}}
    return json.loads(result_path.read_text())


def report(results: dict[str, dict[str, Any]], spec: dict[str, Any], body: int, head: int) -> dict[str, Any]:
    """All figures and their ratios."""
    rates = [rate for result in results.values() for rate in result["rates"]]
    tflops = results.get("transformers", {}).get("tflops")
    reference = results.get("transformers", {}).get("scores", {}).get("reference")
    rows = []
    for shape in map(lambda s: Shape(**s), spec["shapes"]):
        found = {rate["way"]: rate for rate in rates if rate["shape"] == shape.name}
        for way, rate in found.items():
            stock, floor = found.get(f"{way.split()[0]} stock"), found.get("engine floor")
            rows.append(
                {
                    **rate,
                    "to_published": over(rate, found.get("published")),
                    "to_stock": over(rate, stock),
                    "of_floor": over(rate, floor),
                    "of_bound": rate["per_second"] / bound(shape, body, head, tflops) if tflops else None,
                }
            )
    agreement = {
        way: distribution(scores, reference)
        for result in results.values()
        for way, scores in result["scores"].items()
        if reference and way != "reference"
    }
    errors = {part: result["error"] for part, result in results.items() if "error" in result}
    routes = {part: result["route"] for part, result in results.items() if "route" in result}
    return {"rows": rows, "agreement": agreement, "errors": errors, "routes": routes, "matmul_tflops": tflops}


def over(rate: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """Ratio of two rates, None where there is no other."""
    return rate["per_second"] / other["per_second"] if other else None


def table(figures: dict[str, Any]) -> str:
    """The figures as two Markdown tables."""

    def cell(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.0%}" if unit == "%" else f"{value:.2f}x"

    lines = ["| shape | way | scores/s | rounds | to published | to stock | of the floor | of the bound |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in figures["rows"]:
        rounds = f"{min(row['rounds']):.0f} to {max(row['rounds']):.0f}"
        shares = [cell(row["to_published"], "x"), cell(row["to_stock"], "x")]
        shares += [cell(row["of_floor"], "%"), cell(row["of_bound"], "%")]
        lines.append(f"| {row['shape']} | {row['way']} | {row['per_second']:.1f} | {rounds} | {' | '.join(shares)} |")
    lines += ["", "| way | tokens | mean abs. difference to float32 transformers | median | 99 % | largest |"]
    lines.append("|---|---|---|---|---|---|")
    for way, d in figures["agreement"].items():
        lines.append(f"| {way} | {d['tokens']} | {d['mean']:.2g} | {d['p50']:.2g} | {d['p99']:.2g} | {d['max']:.2g} |")
    return "\n".join(lines)


def device_name() -> str:
    """What this machine computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores, {platform.machine()}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--arch", choices=ARCHITECTURES, default="qwen2.5-1.5b" if gpu else "toy")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--scale", type=float, default=1.0 if gpu else 1 / 64, help="share of 128 x 8 and 64 x 8 x 4")
    parser.add_argument("--rounds", type=int, default=3 if gpu else 1)
    parser.add_argument("--shapes", nargs="+", choices=("gsm8k", "hellaswag"), default=["gsm8k", "hellaswag"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--python", default=None, help="interpreter of the environment that has vLLM; unset: this one")
    parser.add_argument("--memory", type=float, default=None, help="share of the GPU's memory for vLLM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="file for the figures as JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.part:
        run = {"transformers": part_transformers, "engine": part_engine, "http": part_http}[args.part]
        args.out.write_text(json.dumps(run(json.loads(args.spec.read_text()))))
        return 0
    local_env = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"
    python = args.python or (str(local_env) if local_env.exists() else sys.executable)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scorer-bench-")))
        body, head = make_model(args.arch, folder / "model", args.dtype, args.seed)
        vocabulary = {**COMMON, **ARCHITECTURES[args.arch]}["vocab_size"]
        spec = {
            "model": str(folder / "model"),
            "dtype": args.dtype,
            "vocabulary": vocabulary,
            "rounds": args.rounds,
            "shapes": [asdict(shape) for shape in shapes(args.scale) if shape.name in args.shapes],
            "python": python,
            "log": str(args.out.with_suffix(".vllm.log") if args.out else folder / "vllm.log"),
            "engine": {} if args.memory is None else {"gpu_memory_utilization": args.memory},
        }
        results = {part: run_part(part, spec, folder) for part in args.parts}
    figures = report(results, spec, body, head)
    figures |= {
        "command": f"python -m scorer.bench {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
        "device": device_name(),
        "arch": args.arch,
        "dtype": args.dtype,
        "parameters": {"body": body, "head": head},
        "shapes": spec["shapes"],
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm": results.get("engine", {}).get("vllm"),
        },
        "parts": {part: {k: v for k, v in r.items() if k not in ("rates", "scores")} for part, r in results.items()},
        "seconds": time.perf_counter() - began,
    }
    print(table(figures))
    for part, error in figures["errors"].items():
        print(f"{part}: {error}", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1))
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
