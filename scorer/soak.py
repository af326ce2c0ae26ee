"""Does scoring hold its memory? Scores until so many tokens are through, and watches.

    python -m scorer.soak --tokens 24e6                            # vllm_engine, on a GPU
    python -m scorer.soak --backend local --arch toy --tokens 2e5  # on a CPU

One process, one scorer, random items of GSM8K's lengths, never the same twice. Memory is that of this process and all
its children (resident) and of the GPU, taken after every call. The first quarter is warm-up; over the rest the memory
must not grow by more than `--allow` MB, or the exit code is 1.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from scorer import BACKENDS, open_scorer
from scorer.bench import ARCHITECTURES, COMMON, device_name, make_model, shapes
from scorer.types import Score


def memory_mb() -> dict[str, float]:
    """Resident memory of this process and its children, and what is taken of the GPU, in MB."""
    me = psutil.Process()
    resident = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            resident += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    found = {"resident": resident / 1e6}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["gpu"] = (total - free) / 1e6
    return found


def soak(scorer: Any, tokens: float, per_call: int, vocabulary: int) -> list[dict[str, float]]:
    """Scores fresh items until `tokens` prefix and answer tokens are through; one line a call."""
    shape = replace(shapes(1.0)[0], groups=max(1, per_call // 8))
    lines: list[dict[str, float]] = []
    done, seed, began = 0, 0, time.perf_counter()
    with tqdm(total=int(tokens), unit="token", unit_scale=True, desc="soak") as bar:
        while done < tokens:
            items = shape.make(10_000 + seed, vocabulary)
            results = scorer.score(items)
            failed = [result for result in results if not isinstance(result, Score)]
            if failed:
                raise SystemExit(f"{len(failed)} items could not be scored, the first: {failed[0]}")
            new = sum(len(item.prefix_ids) + len(item.answer_ids) for item in items)
            done, seed = done + new, seed + 1
            bar.update(new)
            lines.append({"tokens": done, "seconds": time.perf_counter() - began, **memory_mb()})
    return lines


def growth(lines: Sequence[dict[str, float]], key: str) -> float:
    """MB by which the last quarter's mean exceeds the second quarter's."""
    quarter = max(1, len(lines) // 4)
    early = [line[key] for line in lines[quarter : 2 * quarter]] or [lines[0][key]]
    late = [line[key] for line in lines[-quarter:]]
    return sum(late) / len(late) - sum(early) / len(early)


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="qwen2.5-1.5b" if gpu else "toy")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--backend", choices=BACKENDS, default="vllm_engine" if gpu else "local")
    parser.add_argument("--python", default=None, help="vllm: interpreter of the server's environment")
    parser.add_argument("--tokens", type=float, default=24e6 if gpu else 2e5)
    parser.add_argument("--per-call", type=int, default=1024 if gpu else 64, help="items in one call")
    parser.add_argument("--memory", type=float, default=None, help="share of the GPU's memory for vLLM")
    parser.add_argument("--allow", type=float, default=200.0, help="MB of growth that pass")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    vocabulary = {**COMMON, **ARCHITECTURES[args.arch]}["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="scorer-soak-") as folder:
        make_model(args.arch, Path(folder) / "model", args.dtype, 0)
        scorer = open_scorer(
            args.backend,
            model=str(Path(folder) / "model"),
            dtype=args.dtype,
            python=args.python,
            server_args="--max-model-len 2048" if args.backend == "vllm" else "",
            memory=args.memory,
        )
        try:
            lines = soak(scorer, args.tokens, args.per_call, vocabulary)
            usage = scorer.take_usage().metrics()
        finally:
            scorer.close()
    grown = {key: growth(lines, key) for key in ("resident", "gpu") if key in lines[0]}
    result = {
        "command": f"python -m scorer.soak {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
        "device": device_name(),
        "tokens": lines[-1]["tokens"],
        "seconds": lines[-1]["seconds"],
        "calls": len(lines),
        "memory_mb": {key: {"first": lines[0][key], "last": lines[-1][key]} for key in grown},
        "growth_mb": grown,
        "usage": usage,
        "shape": asdict(shapes(1.0)[0]),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "shape"}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result | {"lines": lines}, indent=1))
    return 0 if all(value <= args.allow for value in grown.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
