"""Runs inside vLLM's own processes: score-from-offset at the speed of a plain prefill, and many requests in one.

This folder goes on the PYTHONPATH of a managed server (or on `sys.path` for `vllm.LLM`), where vLLM finds the two entry
points of context_rl_scoring-1.dist-info. Nothing of context_rl or scorer is imported: the server may live in another
environment. What a request means and what it returns does not change, only the cost:

- `speed_up` (a general plugin, in every process). vLLM 0.31 to 0.33 run the LM head once a request, each time reading
  the whole vocabulary matrix for a handful of rows: 0.15 ms a request for 1.5 B parameters, where the prefill of a
  cached prefix takes 0.5. Here the rows of all requests of a step go through the head together. And a prefix-cache hit
  that reaches past the first scored row, which makes vLLM drop the scores, is shortened to the rows before it.
- `BatchEndpoint` (an endpoint plugin, in the API server): POST /inference/v1/generate_batch takes what
  /inference/v1/generate takes, many at a time. One HTTP request for one item costs the front end 1.5 ms.

A vLLM whose code is not the one known here is left as it is; the client then measures, and does without.
"""

import asyncio
import base64
import inspect
import logging
import uuid
from typing import Any

logger = logging.getLogger("vllm.context_rl_scoring")

PATH = "/inference/v1/generate_batch"


# --- general plugin: every process ---


def speed_up() -> None:
    """Replaces two methods of vLLM by faster ones with the same results. Safe to call twice."""
    for patch in (batch_the_head, keep_scored_rows_out_of_the_cache):
        try:
            patch()
        except (ImportError, AttributeError, LookupError) as error:
            logger.warning("this vLLM is not patched (%s): %s", patch.__name__, error)


def batch_the_head() -> None:
    """One pass through the LM head for the scored rows of all requests in a step."""
    from vllm.v1.worker.gpu.sample import prompt_logprob

    worker = prompt_logprob.PromptLogprobsWorker
    one_by_one = worker.compute_prompt_token_id_logprobs
    if getattr(one_by_one, "batched", False):
        return
    wanted = ["self", "logits_fn", "hidden_states", "input_batch", "prompt_lens"]
    if list(inspect.signature(one_by_one).parameters) != wanted:
        raise LookupError("compute_prompt_token_id_logprobs has other parameters")

    import numpy as np
    import torch

    def whole_requests(self, input_batch, prompt_lens) -> list[tuple[str, Any, int, int]]:
        """(id, state, first row in the batch, rows) of requests whose scored rows all lie in this step."""
        found = []
        for i, req_id in enumerate(input_batch.req_ids):
            state = self.token_id_scores.get(req_id)
            if state is None or state.scores is not None:
                continue
            length = int(prompt_lens[input_batch.idx_mapping_np[i]])
            first = int(input_batch.num_computed_prefill_tokens_np[i])
            last = first + int(input_batch.num_scheduled_tokens[i])
            rows = length - 1 - state.start
            if first <= state.start and first < length <= last and length >= input_batch.prefill_len_np[i] and rows > 0:
                found.append((req_id, state, int(input_batch.query_start_loc_np[i]) + state.start - first, rows))
        return found

    def batched(self, logits_fn, hidden_states, input_batch, prompt_lens):
        whole = whole_requests(self, input_batch, prompt_lens) if self.token_id_scores else []
        if len(whole) < 2 or self.logprobs_mode != "raw_logprobs":
            return one_by_one(self, logits_fn, hidden_states, input_batch, prompt_lens)
        out = score_together(logits_fn, hidden_states, whole)
        for req_id in out:
            del self.token_id_scores[req_id]
        # Requests cut into several steps, and those that vLLM drops, go its own way.
        out.update(one_by_one(self, logits_fn, hidden_states, input_batch, prompt_lens))
        return out

    def score_together(logits_fn, hidden_states, whole) -> dict[str, Any]:
        """Scores [rows, ids] of each request, in pinned memory, which the GPU may still be writing."""
        device, pinned = hidden_states.device, hidden_states.is_cuda
        total = sum(rows for *_, rows in whole)
        width = max(state.token_ids.shape[-1] for _, state, _, _ in whole)
        padded = any(getattr(state, "pad", None) is not None for _, state, _, _ in whole)
        where = torch.from_numpy(np.concatenate([np.arange(first, first + rows) for _, _, first, rows in whole]))
        picked = hidden_states[(where.pin_memory() if pinned else where).to(device, non_blocking=True)]
        # Put together on the device: the same on the CPU, with one copy of all ids, was 10 % slower.
        ids = torch.zeros((total, width), dtype=torch.int64, device=device)
        absent = torch.zeros((total, width), dtype=torch.bool, device=device) if padded else None
        places, done = [], 0
        for req_id, state, _, rows in whole:
            place = slice(done, done + rows), slice(0, state.token_ids.shape[-1])
            ids[place] = state.token_ids  # [ids] in 0.31, [rows, ids] from 0.32 on
            if absent is not None:
                absent[place] = state.pad
            places.append((req_id, place))
            done += rows
        scores = torch.empty((total, width), dtype=torch.float32, pin_memory=pinned)
        for start in range(0, total, prompt_logprob.CHUNK_SIZE):
            end = min(start + prompt_logprob.CHUNK_SIZE, total)
            logits = logits_fn(picked[start:end])
            logprobs = prompt_logprob.compute_token_logprobs(logits, ids[start:end])
            if absent is not None:
                logprobs.masked_fill_(absent[start:end], float("-inf"))
            # vLLM waits for this stream before it reads what a step returns.
            scores[start:end].copy_(logprobs, non_blocking=True)
        return {req_id: scores[place] for req_id, place in places}

    batched.batched = True
    worker.compute_prompt_token_id_logprobs = batched


def keep_scored_rows_out_of_the_cache() -> None:
    """A prefix-cache hit ends before the first row that a request wants scored."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    original = KVCacheManager.get_computed_blocks
    if getattr(original, "capped", False):
        return

    def get_computed_blocks(self, request, *args, **kwargs):
        params = request.sampling_params
        if params is None or getattr(params, "prompt_logprob_token_ids", None) is None:
            return original(self, request, *args, **kwargs)
        coordinator = self.coordinator
        self.coordinator = _Capped(coordinator, params.prompt_logprob_start or 0)
        try:
            return original(self, request, *args, **kwargs)
        finally:
            self.coordinator = coordinator

    get_computed_blocks.capped = True
    KVCacheManager.get_computed_blocks = get_computed_blocks


class _Capped:
    """A cache coordinator whose hits are at most `limit` tokens long."""

    def __init__(self, coordinator, limit: int):
        self._coordinator, self._limit = coordinator, limit

    def __getattr__(self, name: str):
        return getattr(self._coordinator, name)

    def find_longest_cache_hit(self, block_hashes, max_cache_hit_length: int):
        return self._coordinator.find_longest_cache_hit(block_hashes, min(max_cache_hit_length, self._limit))


# --- endpoint plugin: the API server ---


class BatchEndpoint:
    """POST /inference/v1/generate_batch.

    Body: {"model": NAME, "requests": [{"token_ids": [int, ...], "sampling_params": {...}}, ...]}
    Reply: {"results": [{"prompt_token_ids", "prompt_logprobs", "prompt_token_id_logprobs", "choices",
    "num_cached_tokens"} or {"error": TEXT, "kind": "refused" or "engine"}, ...]}, in the order of the requests. Fields
    are those of vLLM's /inference/v1/generate, but the scores come `packed`, and a choice also has "text" and
    "logprobs" ({id: {"logprob", "rank"}} a token).
    """

    name = "context_rl_scoring"
    required_tasks = ("generate",)

    def attach_router(self, app) -> None:
        from fastapi import Request, Response

        async def generate_batch(request: Request) -> Response:
            status, body = await answer(request.app.state, await request.body())
            return Response(body, status_code=status, media_type="application/json")

        app.add_api_route(PATH, generate_batch, methods=["POST"])

    async def init_state(self, engine_client, state, args) -> None:
        """Nothing to prepare: routes read the engine from the application's state."""


async def answer(state, body: bytes) -> tuple[int, bytes]:
    """HTTP status and JSON for one batch."""
    import msgspec

    def error(status: int, message: str) -> tuple[int, bytes]:
        return status, msgspec.json.encode({"error": {"message": message, "code": status}})

    try:
        asked = msgspec.json.decode(body)
        model, requests = asked["model"], asked["requests"]
        prompts = [request["token_ids"] for request in requests]
        params = [request["sampling_params"] for request in requests]
    except (msgspec.DecodeError, LookupError, TypeError) as problem:
        return error(400, f"not a batch of requests: {problem!r}")
    if not state.openai_serving_models.is_base_model(model):
        return error(404, f"the model {model!r} is not served here")
    engine = state.engine_client
    if engine.errored:
        return error(503, f"the engine is dead: {engine.dead_error}")
    results = await asyncio.gather(*(generate(engine, *one) for one in zip(prompts, params, strict=True)))
    return 200, msgspec.json.encode({"results": results})


async def generate(engine, token_ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
    """One request through the engine; a refusal or a failure is said in its own result, not for the whole batch."""
    from vllm import exceptions
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError

    final = None
    try:
        # skip_clone: vLLM would deep-copy parameters that were made for this request alone, 0.1 ms each.
        sampling = SamplingParams(**{**params, "output_kind": RequestOutputKind.FINAL_ONLY, "skip_clone": True})
        async for output in engine.generate(tokens_input(token_ids), sampling, f"batch-{uuid.uuid4().hex}"):
            final = output
    except EngineDeadError as problem:
        return {"kind": "engine", "error": f"the engine died: {problem}"}
    except (ValueError, TypeError, getattr(exceptions, "VLLMClientError", ValueError)) as problem:
        return {"kind": "refused", "error": str(problem)[:300]}
    except Exception as problem:
        logger.exception("a request of a batch failed")
        return {"kind": "engine", "error": f"{type(problem).__name__}: {problem}"[:300]}
    return as_json(final)


def as_json(output) -> dict[str, Any]:
    """A RequestOutput as the fields of /inference/v1/generate; the scores are `packed`."""
    scores = getattr(output, "prompt_token_id_logprobs", None)
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": output.prompt_logprobs and [position(row) for row in output.prompt_logprobs],
        "prompt_token_id_logprobs": scores if scores is None else packed(scores),
        "num_cached_tokens": output.num_cached_tokens,
        "choices": [
            {
                "token_ids": list(choice.token_ids),
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "logprobs": choice.logprobs and [position(row) for row in choice.logprobs],
            }
            for choice in output.outputs
        ],
    }


def packed(scores) -> dict[str, Any]:
    """An array as its shape and the base64 of its float32 values, little end first.

    Twenty-four endings' tokens make 576 numbers an item: as JSON they would be the dearest part of the reply.
    """
    return {"shape": list(scores.shape), "float32": base64.b64encode(scores.astype("<f4").tobytes()).decode()}


def position(row) -> dict[str, dict[str, Any]] | None:
    """vLLM's log-probs at one position: {id: {"logprob", "rank"}}."""
    return row and {str(i): {"logprob": number(entry.logprob), "rank": entry.rank} for i, entry in row.items()}


def number(value: float) -> float | str:
    """JSON has no NaN and no infinity, and a null could be taken for something else: these become their names."""
    return value if value - value == 0 else repr(float(value))
