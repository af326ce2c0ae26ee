"""The command line and the environment of a scoring server: flags that its scores need, and those it must not have."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scorer.types import ScorerError

PLUGIN_FOLDER = Path(__file__).with_name("plugin")
PLUGIN_NAME = "context_rl_scoring"

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch` and `torchrun` tell the trainer about itself. A server that inherits them takes itself for
one more rank of the training job."""

_LORA = "vLLM leaves an adapter's change of the LM head out of log-probs"
_SPECULATIVE = "speculative decoding changes the log-probs that vLLM reports"
REFUSED_FLAGS = {
    "--enable-lora": _LORA,
    "--lora-modules": _LORA,
    "--speculative-config": _SPECULATIVE,
    "-sc": _SPECULATIVE,
    "--spec-method": _SPECULATIVE,
    "--spec-model": _SPECULATIVE,
    "--spec-tokens": _SPECULATIVE,
    "--config": "what is in that file cannot be checked here: give the flags themselves",
}
"""Flags of `vllm serve` that a scoring server must not have, and why."""
REQUIRED_VALUES = {
    "--kv-cache-dtype": (
        ("auto", "bfloat16", "float16"),
        "a quantised key-value cache moves each log-prob by up to 0.5",
    ),
    "--logprobs-mode": (("raw_logprobs",), "scores are the model's own log-probs, before penalties and temperature"),
}
"""The values that these flags may have, and why no others."""


def serve_command(
    program: Sequence[str],
    model: str,
    *,
    served_name: str,
    port: int,
    dtype: str,
    seed: int,
    max_model_len: int | None = None,
    gpu_memory_utilization: float | None = None,
    api_server_count: int | None = None,
    enforce_eager: bool = False,
    extra_args: Sequence[str] = (),
) -> list[str]:
    """The command line of the scoring server.

    raw_logprobs and a neutral generation config, because the defaults of a model's generation_config.json (such as
    Qwen's repetition penalty) would otherwise shape its answers. 1,024 log-probs, because a route that names the
    answer's ids may name so many, and vLLM's default is 20. A float32 head takes the rounding of the logits out.

    Raises:
        ScorerError: `extra_args` has a flag that a scoring server must not have.
    """
    refuse_unsafe(extra_args)
    command = [*program, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", served_name]
    command += ["--logprobs-mode", "raw_logprobs", "--max-logprobs", "1024", "--generation-config", "vllm"]
    command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--enable-scale-out"]
    command += ["--dtype", dtype, "--seed", str(seed)]
    optional = {
        "--max-model-len": max_model_len,
        "--gpu-memory-utilization": gpu_memory_utilization,
        "--api-server-count": api_server_count,
    }
    for flag, value in optional.items():
        command += [] if value is None else [flag, str(value)]
    if enforce_eager:
        command.append("--enforce-eager")
    return [*command, *(extra_args if dtype in ("float32", "float") else with_float32_head(extra_args))]


def refuse_unsafe(extra_args: Sequence[str]) -> None:
    """Raises ScorerError, with flag and reason, for arguments of `vllm serve` that would change what is scored."""
    for i, argument in enumerate(extra_args):
        flag, value = split_argument(argument)
        for refused, why in REFUSED_FLAGS.items():
            if names(flag, refused):
                raise ScorerError(f"a scoring server cannot have {argument.partition('=')[0]} ({refused}): {why}")
        for restricted, (allowed, why) in REQUIRED_VALUES.items():
            if names(flag, restricted):
                value = "".join(extra_args[i + 1 : i + 2]) if value is None else value
                if value not in allowed:
                    raise ScorerError(
                        f"a scoring server cannot have {restricted} {value}, only {' or '.join(allowed)}: {why}"
                    )


def with_float32_head(extra_args: Sequence[str]) -> list[str]:
    """The arguments with `--hf-overrides` that also ask for a float32 LM head; the user's own head_dtype wins.

    vLLM takes one such flag, not several, hence the merge.
    """
    rest: list[str] = []
    overrides: dict[str, Any] = {"head_dtype": "float32"}
    arguments = iter(extra_args)
    for argument in arguments:
        flag, value = split_argument(argument)
        if not names(flag, "--hf-overrides"):
            rest.append(argument)
            continue
        text = next(arguments, "") if value is None else value
        try:
            if "." in argument.partition("=")[0]:  # vLLM would let --hf-overrides.KEY VALUE replace the whole object
                raise ValueError("vLLM does not merge the two spellings")
            overrides.update(json.loads(text))
        except (ValueError, TypeError) as error:
            raise ScorerError(f"--hf-overrides has to be one JSON object here, not {argument} {text}") from error
    return [*rest, "--hf-overrides", json.dumps(overrides)]


def split_argument(argument: str) -> tuple[str, str | None]:
    """Flag, as vLLM spells it (dashes, without the .key of a JSON flag), and value, None if it is not in there."""
    flag, equals, value = argument.partition("=")
    return flag.partition(".")[0].replace("_", "-"), value if equals else None


def names(flag: str, option: str) -> bool:
    """Whether argparse may take `flag` for `option`: it accepts the beginning of an option too."""
    return flag == option or (len(flag) > 2 and flag.startswith("--") and option.startswith(flag))


EXACT_FLOAT32 = ("TRITON_F32_DEFAULT", "ieee")
"""Triton's kernels, vLLM's float32 attention among them, otherwise multiply float32 as TF32: a thousandth of a nat off
per token. Models in bfloat16 are not affected."""


def server_environment(
    environ: Mapping[str, str], bin_dir: Path, *, device: str | None = None, plugin: bool = False
) -> dict[str, str]:
    """The server's environment: this one's, without what the trainer's launcher set, with CPU defaults where unset.

    OMP_NUM_THREADS goes too: it was meant for the trainer, and vLLM's front end and engine would keep to it. On CPU
    vLLM itself counts and pins its worker's threads; 4 unpinned ones on 4 busy cores made scoring 24 times slower.
    Where its choice does not fit, VLLM_CPU_OMP_THREADS_BIND is the variable to set.
    """
    dropped = (*LAUNCHER_VARIABLES, "OMP_NUM_THREADS")
    env = {k: v for k, v in environ.items() if k not in dropped and not k.startswith("TORCHELASTIC_")}
    env["PATH"] = os.pathsep.join([str(bin_dir), *filter(None, [env.get("PATH")])])
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; unset, vllm-cpu sizes its cache by 0.92 of the memory
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env.setdefault(*EXACT_FLOAT32)
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
    if plugin:
        env["PYTHONPATH"] = os.pathsep.join([str(PLUGIN_FOLDER), *filter(None, [env.get("PYTHONPATH")])])
        # vLLM loads a plugin with HTTP routes only if it is named here. Set, the variable shuts out all that it does
        # not name: a plugin of the user's (such as one for another accelerator) has to be named in it too.
        others = [name for name in env.get("VLLM_PLUGINS", "").split(",") if name not in ("", PLUGIN_NAME)]
        env["VLLM_PLUGINS"] = ",".join([*others, PLUGIN_NAME])
    return env
