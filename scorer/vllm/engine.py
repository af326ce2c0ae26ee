"""The scorer with vLLM in this process: the same requests and checks as over HTTP, without a front end between.

For one machine, where the base model fits beside the context model (`gpu_memory_utilization`) or has a device of its
own. vLLM has to be installed in this environment.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from scorer.checks import check_items, first_line, revision, weights_digest, why_not_loaded
from scorer.types import Greedy, Item, Score, ScorerError, Unscored, Usage
from scorer.vllm.asks import Ask, score_items
from scorer.vllm.command import EXACT_FLOAT32, LAUNCHER_VARIABLES, PLUGIN_FOLDER, PLUGIN_NAME
from scorer.vllm.probe import PROBE_TEXT, check_exact_route, choose_routes
from scorer.vllm.replies import Reply

MANY = 1000
"""Requests in one call from which on a progress bar is shown."""


class EngineScorer:
    """Scores with `vllm.LLM`. See `scorer.types.Scorer` for what the methods promise.

    Attributes:
        tokenizer, max_length, routes, notes: as of `scorer.vllm.client.VllmScorer`.
        llm: the engine, for whoever wants to measure it.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        gpu_memory_utilization: float | None = None,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        seed: int = 0,
        plugin: bool = True,
        route: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ):
        """Loads the model and finds the fastest exact route.

        Args:
            model: hub id or folder.
            dtype: as vLLM spells it; the head is float32 in any case.
            gpu_memory_utilization: share of the GPU's memory, None for vLLM's default (nearly all of it).
            plugin: let `scorer/vllm/plugin` speed up vLLM's score-from-offset.
            route: the only route to consider, see `scorer.vllm.probe.choose_routes`.
            engine_args: further arguments of `vllm.LLM`.

        Raises:
            ScorerError: there is no vLLM here, the model cannot be loaded, or it does not score as it should.
        """
        self._lock, self._usage, self._closed = threading.Lock(), Usage(), False
        self._model, self._dtype = str(model), dtype
        with engine_environment(plugin):
            try:
                import vllm
            except ImportError as error:
                raise ScorerError(
                    f"there is no vLLM in this environment ({first_line(error)}): install the 'vllm' extra, or use "
                    "--scorer vllm with --scorer_python"
                ) from error
            self._vllm = vllm
            from vllm import exceptions
            from vllm.inputs import tokens_input
            from vllm.sampling_params import RequestOutputKind

            self._final_only, self._as_input = RequestOutputKind.FINAL_ONLY, tokens_input
            self._client_error = getattr(exceptions, "VLLMClientError", ValueError)
            options: dict[str, Any] = {
                "dtype": dtype,
                "seed": seed,
                "logprobs_mode": "raw_logprobs",
                "max_logprobs": 1024,
                "generation_config": "vllm",
                "enable_prefix_caching": True,
                "enforce_eager": enforce_eager,
                "disable_log_stats": True,
                "hf_overrides": {"head_dtype": "float32"},
            }
            optional = {"gpu_memory_utilization": gpu_memory_utilization, "max_model_len": max_model_len}
            options |= {key: value for key, value in optional.items() if value is not None}
            try:
                self.llm = vllm.LLM(self._model, **{**options, **(engine_args or {})})
            except (OSError, ValueError, RuntimeError) as error:
                raise ScorerError(
                    f"vLLM cannot load the base model {model!r}: {why_not_loaded(self._model, error)}"
                ) from error
        try:
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(self._model)
            self.max_length = int(self.llm.llm_engine.model_config.max_model_len) - 1
            ids = tuple(self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])[: self.max_length]
            send = functools.partial(self._send, usage=Usage())
            check_exact_route(ids, send, "vLLM in this process")
            probe = choose_routes(ids, self.max_length, send, vllm.__version__, dtype=dtype, pinned=route)
            self.routes, self.notes = probe.routes, probe.notes
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> dict[str, str]:
        """Back-end, model, weights, dtype, vLLM version, route."""
        return {
            "backend": "vllm_engine",
            "model": self._model,
            "weights": weights_digest(self._model) or revision(self._model) or "unknown",
            "dtype": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "vllm": self._vllm.__version__,
            "route": self.routes.answers,
        }

    def score(self, items: Sequence[Item], greedy: Greedy | None = None) -> list[Score | Unscored]:
        """See `scorer.types.Scorer.score`."""
        check_items(items, self.max_length, greedy)
        if self._closed:
            raise ScorerError("this scorer was closed")
        began, usage = time.perf_counter(), Usage()
        send = functools.partial(self._send, usage=usage)
        results = score_items(items, greedy, self.routes, send, usage, self.tokenizer)
        usage.seconds = time.perf_counter() - began
        with self._lock:
            self._usage.add(usage)
        return results

    def take_usage(self) -> Usage:
        """See `scorer.types.Scorer.take_usage`."""
        with self._lock:
            taken, self._usage = self._usage, Usage()
        return taken

    def close(self) -> None:
        """Ends the engine's processes. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.llm.llm_engine.engine_core.shutdown()

    def __enter__(self) -> "EngineScorer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _send(self, asks: Sequence[Ask], attempt: int, usage: Usage) -> Iterator[tuple[int, Reply | Unscored]]:
        """See `scorer.vllm.asks.Send`. A request that vLLM refuses costs the others nothing."""
        if not asks:
            return
        began = time.perf_counter()
        with self._lock:  # one engine, one caller at a time
            refusal = self._add(asks)
            if refusal is None:
                yield from self._results(asks)
                usage.requests += len(asks)
                usage.latencies.append(time.perf_counter() - began)
                return
        if len(asks) == 1:
            yield 0, Unscored(f"vLLM refuses: {first_line(refusal)}", "refused")
            return
        half = len(asks) // 2  # one bad request among many is found by halves
        yield from self._send(asks[:half], attempt, usage)
        for position, reply in self._send(asks[half:], attempt, usage):
            yield half + position, reply

    def _add(self, asks: Sequence[Ask]) -> Exception | None:
        """Hands the requests to the engine, which begins with the first; or none of them, and vLLM's refusal."""
        engine = self.llm.llm_engine
        try:
            for index, ask in enumerate(asks):
                engine.add_request(str(index), self._as_input(list(ask.prompt)), self._parameters(ask))
        except (ValueError, TypeError, self._client_error) as refusal:
            self._abort(len(asks))
            return refusal
        except BaseException:
            self._abort(len(asks))
            raise
        return None

    def _results(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply | Unscored]]:
        """Replies as they come, through vLLM's step loop.

        `LLM.generate` would do as well. Here the engine's process computes while this one already reads replies, which
        is worth 10 % where requests are small.
        """
        engine, missing = self.llm.llm_engine, set(range(len(asks)))
        show = len(asks) >= MANY and sys.stderr.isatty()
        try:
            with tqdm(total=len(asks), desc="scoring", unit="request", leave=False, disable=not show) as bar:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            missing.discard(int(output.request_id))
                            yield int(output.request_id), as_reply(output)
                            bar.update()
        except Exception as error:
            raise ScorerError(f"vLLM in this process failed: {first_line(error)}") from error
        finally:
            if engine.has_unfinished_requests():  # whoever reads has given up
                self._abort(len(asks))
        for index in sorted(missing):
            yield index, Unscored("vLLM returned no result for this request", "missing")

    def _abort(self, count: int) -> None:
        engine = self.llm.llm_engine
        engine.abort_request([str(index) for index in range(count)])
        while engine.has_unfinished_requests():
            engine.step()

    def _parameters(self, ask: Ask) -> Any:
        return self._vllm.SamplingParams(
            **ask.params,
            detokenize=ask.kind == "greedy",
            output_kind=self._final_only,
            skip_clone=True,  # made for this request: a deep copy of it costs 0.1 ms
        )


def as_reply(output: Any) -> Reply:
    """A `vllm.RequestOutput` in our form."""
    choice = output.outputs[0]
    rows = output.prompt_logprobs
    return Reply(
        prompt_ids=list(output.prompt_token_ids),
        prompt_logprobs=rows
        and [
            row and {str(i): {"logprob": entry.logprob, "rank": entry.rank} for i, entry in row.items()} for row in rows
        ],
        offset_logprobs=getattr(output, "prompt_token_id_logprobs", None),
        token_ids=list(choice.token_ids),
        finish_reason=choice.finish_reason,
        first_logprobs=choice.logprobs and {str(i): entry.logprob for i, entry in choice.logprobs[0].items()},
        cached_tokens=output.num_cached_tokens,
    )


@contextlib.contextmanager
def engine_environment(plugin: bool) -> Iterator[None]:
    """The environment in which vLLM is imported and its processes start; what was set before is set again after.

    Without what `accelerate launch` says of the training job (the engine would take itself for one of its ranks), with
    float32 products that are float32, and with our plugin where vLLM looks for plugins: on `sys.path`, which the
    engine's process inherits.
    """
    before = dict(os.environ)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.setdefault(*EXACT_FLOAT32)
    if plugin:
        if str(PLUGIN_FOLDER) not in sys.path:
            sys.path.append(str(PLUGIN_FOLDER))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGIN_FOLDER), before.get("PYTHONPATH")]))
        if "VLLM_PLUGINS" in before:
            os.environ["VLLM_PLUGINS"] = f"{before['VLLM_PLUGINS']},{PLUGIN_NAME}"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
