"""log p(answer | prefix) from a frozen language model. Knows nothing of tasks, rewards or trainers."""

import shlex

from scorer.types import Greedy, Item, Score, Scorer, ScorerError, Unscored

__all__ = ["Greedy", "Item", "Score", "Scorer", "ScorerError", "Unscored", "open_scorer"]


def open_scorer(
    backend: str,
    *,
    model: str | None,
    dtype: str = "float32",
    url: str | None = None,
    python: str | None = None,
    server_args: str = "",
) -> Scorer:
    """The scorer of a run: "local", or "vllm" at `url`, launched and stopped by this process where `url` is None.

    Raises:
        ScorerError: the model cannot be loaded, or nobody answers at `url`; the message says what to do.
    """
    if backend == "local":
        from scorer.local import LocalScorer

        if model is None:
            raise ScorerError("--scorer_model is not set: it names the frozen base model, a hub id or a folder")
        return LocalScorer(model, dtype=dtype)
    if backend == "vllm":
        from scorer.vllm import VllmScorer, open_vllm

        if url is not None:
            return VllmScorer(url, model)
        if model is None:
            raise ScorerError("--scorer_model is not set: it names the model that the vLLM server shall serve")
        return open_vllm(model, dtype=dtype, python=python, extra_args=shlex.split(server_args))
    raise ValueError(f"no scorer is called {backend!r}; there are local and vllm")
