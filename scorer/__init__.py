"""log p(answer | prefix) from a frozen language model. Knows nothing of tasks, rewards or trainers."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from scorer.types import Greedy, Item, Score, Scorer, ScorerError, Unscored

__all__ = ["Greedy", "Item", "Score", "Scorer", "ScorerError", "Unscored", "open_scorer"]

BACKENDS = ("local", "vllm", "vllm_engine")


def open_scorer(
    backend: str,
    *,
    model: str | None,
    dtype: str = "float32",
    url: str | Sequence[str] | None = None,
    python: str | None = None,
    server_args: str = "",
    memory: float | None = None,
    device: str | None = None,
    timeout_s: float = 120.0,
    log_path: str | Path | None = None,
) -> Scorer:
    """The scorer of a run.

    Args:
        backend: "local" (transformers), "vllm" (a server: those at `url`, or one launched and stopped by this process),
            or "vllm_engine" (vLLM in this process).
        memory: share of the GPU's memory for a vLLM of ours; None is vLLM's default, nearly all of it.
        device: GPUs for a launched server, such as "1".
        timeout_s: seconds for one request to a server.
        log_path: file for a launched server's output.

    Raises:
        ScorerError: the model cannot be loaded, or nobody answers at `url`; the message says what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no scorer is called {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "vllm" and url is not None:
        from scorer.vllm.client import VllmScorer

        return VllmScorer(url, model, timeout_s=timeout_s)
    if model is None:
        raise ScorerError("--scorer_model is not set: it names the frozen base model, a hub id or a folder")
    if backend == "local":
        from scorer.local import LocalScorer

        return LocalScorer(model, dtype=dtype)
    if backend == "vllm_engine":
        from scorer.vllm.engine import EngineScorer

        return EngineScorer(model, dtype=dtype, gpu_memory_utilization=memory)
    from scorer.vllm.client import open_vllm

    return open_vllm(
        model,
        dtype=dtype,
        python=python,
        extra_args=shlex.split(server_args),
        gpu_memory_utilization=memory,
        device=device,
        timeout_s=timeout_s,
        log_path=log_path,
    )
