"""The real entry point, from the command line to result.json, on the shipped tiny models.

A failure here means that a user's first command does not work, although the parts may: settings that do not reach
the trainer, a run folder that lacks what it promises, a resumed run that is another run than the one killed, or a
mistake of the user's answered by a traceback or a half-made folder.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.dataset as ds
import pytest
import torch
import yaml
from safetensors.torch import load_file

from context_rl.rewards import grpo_advantages, no_spread_share
from context_rl.runs import read_jsonl
from eval.conditions import fixed
from recipes.train_context import main

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--per_device_train_batch_size", "16", "--num_generations", "4", "--max_completion_length", "24"),
    *("--train_questions", "64", "--eval_questions", "12", "--cpu_threads", "2"),
]
COLUMNS = {"step", "example_id", "trace", "token_logprobs", "baseline_logprobs", "base_answer", "correct", "unscored"}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def train(folder: Path, *flags: str) -> dict:
    """A small run in this process; its result."""
    assert main([*SMALL, "--output_dir", str(folder), *flags]) == 0
    return json.loads((folder / "result.json").read_text())


def trace_rows(folder: Path) -> list[dict]:
    rows = ds.dataset(folder / "traces").to_table().to_pylist()
    return sorted(rows, key=lambda row: (row["step"], row["example_id"], row["trace"]))


# --- the command of the README ---


def test_accelerate_launch_trains_and_leaves_everything_a_run_folder_promises(tmp_path):
    folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"),
        *("recipes/train_context.py", "recipes/symbolic.yaml", *SMALL, "--max_steps", "2", "--output_dir", str(folder)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Help against no help" in done.stdout
    assert "no trace" in done.stdout
    assert "2/2" in done.stderr, "the progress bar"

    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 2
    assert result["reward"] == "probability"
    assert 0 < result["scoring_share"] < 1
    assert result["peak_rss_gb"] > 0.1
    assert list(result["eval"]) == ["none", "untrained", "trained", "shuffled"]
    for by_decoding in result["eval"].values():
        for summary in by_decoding.values():
            low, high = summary["accuracy_ci"]
            assert summary["n"] == 12
            assert low <= summary["accuracy"] <= high
            assert summary["mean_logprob"] < 0

    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["settings"]["reward"] == "probability"
    assert settings["scorer"]["backend"] == "local"
    assert settings["versions"]["trl"]
    rows = trace_rows(folder)
    assert len(rows) == 2 * 16
    assert rows[0].keys() >= COLUMNS
    assert all(len(row["token_logprobs"]) == len(row["baseline_logprobs"]) for row in rows)
    for name in ("curves.png", "trainer_state.json", "context_model/model.safetensors", "metrics.jsonl"):
        assert (folder / name).stat().st_size > 0
    items = read_jsonl(folder / "eval/symbolic.trained.jsonl")
    assert len(items) == 2 * 12
    texts = {row["id"]: row["question"] for row in read_jsonl(folder / "held_out.jsonl")}
    assert len(texts) == 12
    watched = read_jsonl(folder / "eval/symbolic.halfway.jsonl")
    assert [row["id"] for row in watched] == fixed(texts, 8)
    assert {row["decoding"] for row in watched} == {"greedy"}


def test_looking_at_the_model_halfway_does_not_change_what_it_becomes(tmp_path):
    """Red: an evaluation within the training draws from its random numbers, or leaves the model in another mode."""
    looked, alone = tmp_path / "looked", tmp_path / "alone"
    train(looked, "--max_steps", "4")
    train(alone, "--max_steps", "4", "--no_evaluate")
    keys = ("step", "example_id", "trace", "reward", "advantage")
    assert [[row[k] for k in keys] for row in trace_rows(looked)] == [[r[k] for k in keys] for r in trace_rows(alone)]
    assert len(read_jsonl(looked / "eval/symbolic.halfway.jsonl")) == 8


def test_two_processes_share_a_group_and_agree_on_its_advantages(tmp_path):
    """Red: each process took its own rows for the whole group, or two processes wrote one file."""
    folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("recipes/train_context.py", *SMALL, "--use_cpu", "--ddp_backend", "gloo", "--max_steps", "1"),
        # 6 rows a process and groups of 4: the second group lies across the two.
        *("--per_device_train_batch_size", "6", "--eval_questions", "5", "--output_dir", str(folder)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    groups: dict[str, list[dict]] = {}
    for row in trace_rows(folder):
        groups.setdefault(row["example_id"], []).append(row)
    assert sorted(map(len, groups.values())) == [4, 4, 4]
    for rows in groups.values():
        expected = grpo_advantages([row["reward"] for row in rows], 4)
        assert [row["advantage"] for row in rows] == pytest.approx(expected, abs=1e-9)
    result = json.loads((folder / "result.json").read_text())
    assert {summary["n"] for by in result["eval"].values() for summary in by.values()} == {5}


def test_a_killed_run_resumes_to_what_an_uninterrupted_one_becomes(tmp_path):
    """Red: a resumed run draws other traces, forgets the window of a running quantile, or ends with other weights."""
    moving = "{threshold: {of: probability, tau: {quantile: 0.7, window: 4096}}}"
    flags = ["--max_steps", "6", "--save_steps", "2", "--no_evaluate", "--reward", moving]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "recipes/train_context.py", *SMALL, *flags, "--output_dir", str(killed)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(list((killed / "traces").glob("step-000003*.parquet"))) == 0:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result.json").exists()
    assert (killed / "checkpoint-2").exists()
    (killed / "checkpoint-4").mkdir(exist_ok=True)  # as if the kill had come while it was written

    resumed = train(killed, *flags, "--resume")
    uninterrupted = train(whole, *flags)
    assert resumed["resumed_from"] == "checkpoint-2"
    assert resumed["steps"] == uninterrupted["steps"] == 6
    keys = ("step", "example_id", "trace", "reward", "advantage")
    assert [[row[k] for k in keys] for row in trace_rows(killed)] == [[r[k] for k in keys] for r in trace_rows(whole)]
    lines, others = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (killed, whole)
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["reward_parts/tau"] for line in lines] == [line["reward_parts/tau"] for line in others]
    ours, theirs = (load_file(folder / "context_model/model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_refuses_other_questions(tmp_path, capfd):
    """Red: the second half of a run trains on another data set, and is evaluated against the first one's answers."""
    data, folder = tmp_path / "mine.jsonl", tmp_path / "run"
    flags = [*SMALL, "--task", "qa", "--data", str(data), "--max_steps", "1", "--output_dir", str(folder)]
    data.write_text("".join(f'{{"question": "What is {n}?", "answer": {n}}}\n' for n in range(20)))
    assert main(flags) == 0
    (folder / "result.json").unlink()  # as if it had been killed at its very end
    data.write_text(data.read_text().replace("What is", "What was"))
    assert main([*flags, "--resume"]) == 1
    assert "was begun with data" in capfd.readouterr().err


def test_steps_that_reuse_a_generation_batch_are_logged_and_timed_once(tmp_path):
    """Red: half of the steps are missing from metrics.jsonl, or their scoring counts twice."""
    result = train(tmp_path / "run", "--num_iterations", "2", "--max_steps", "4", "--save_steps", "2", "--no_evaluate")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["reward" in line for line in lines] == [True, False, True, False]
    assert [line["seconds/scoring"] > 0 for line in lines] == [True, False, True, False]
    assert {row["step"] for row in trace_rows(tmp_path / "run")} == {1, 3}
    assert result["training_seconds"] == pytest.approx(sum(line["seconds/step"] for line in lines))


def test_a_run_that_logs_nothing_still_ends_with_a_result(tmp_path, capsys):
    """Red: a whole run is lost at its last line because a mean of no logged steps was taken."""
    result = train(tmp_path / "run", "--max_steps", "1", "--logging_strategy", "no")
    assert result["scoring_share"] is result["no_spread_share"] is None
    assert "scoring unknown" in capsys.readouterr().out


# --- other tasks, models, rewards: the same loop ---


def test_binary_reward_runs_through_the_same_loop_and_is_zero_or_one(tmp_path):
    result = train(tmp_path / "run", "--reward", "binary", "--max_steps", "2", "--no_evaluate")
    rows = trace_rows(tmp_path / "run")
    assert {row["reward"] for row in rows} <= {0.0, 1.0}
    assert all(row["reward"] == float(row["correct"]) for row in rows)
    assert all(row["rewards/probability"] is not None for row in rows), "every formula is logged, whichever trains"
    assert 0 <= result["no_spread_share"] <= 1


def test_batch_scaling_counts_groups_without_gradient_by_group_and_warns_of_wide_rewards(tmp_path):
    """Red: "no gradient" is TRL's count of batches, always 0; or a reward that will train nothing starts in silence."""
    flags = ("--scale_rewards", "batch", "--reward", "gain", "--temperature", "0.01")
    result = train(tmp_path / "run", *flags, "--max_steps", "2", "--no_evaluate")
    rows = trace_rows(tmp_path / "run")
    shares = [no_spread_share([row["reward"] for row in rows if row["step"] == step], 4) for step in (1, 2)]
    assert result["no_spread_share"] == pytest.approx(sum(shares) / 2)
    assert result["no_spread_share"] > 0, "nearly greedy traces are the same, so that this can fail"
    assert any("gain ranges from -inf to inf" in note for note in result["notes"])


def test_ten_rows_of_a_users_own_train(tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"What is {n} plus {n}?", "target": 2 * n} for n in range(1, 11)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train(
        tmp_path / "run",
        *("--task", "qa", "--data", str(data), "--question_column", "prompt", "--answer_column", "target"),
        *("--max_steps", "2"),
    )
    assert result["eval"]["none"]["greedy"]["n"] == 2
    assert {row["example_id"].split(":")[0] for row in trace_rows(tmp_path / "run")} == {"mine.jsonl"}


def test_a_reasoning_gym_task_trains_by_name(tmp_path):
    options = ("--task", "rg:chain_sum", "--task_options", '{"max_terms": 3}')
    result = train(tmp_path / "run", *options, "--max_steps", "1")
    assert result["task"] == "rg:chain_sum"


@pytest.mark.skipif("CONTEXT_RL_DATA" not in os.environ, reason="CONTEXT_RL_DATA names no folder with gsm8k/")
def test_gsm8k_trains_twenty_steps_on_the_real_files(tmp_path):
    result = train(
        tmp_path / "run",
        *("--task", "gsm8k", "--data", os.environ["CONTEXT_RL_DATA"] + "/gsm8k", "--max_steps", "20"),
    )
    assert result["steps"] == 20
    for row in trace_rows(tmp_path / "run")[:5]:
        assert "####" not in row["trace"], "the reference solution is no part of what is trained on"


def test_lora_trains_adapters_only(tmp_path):
    train(tmp_path / "run", "--use_peft", "--lora_r", "4", "--max_steps", "1", "--no_evaluate")
    saved = {path.name for path in (tmp_path / "run/context_model").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved


def vllm_python() -> Path | None:
    """The interpreter of an environment with vLLM, as `make vllm-cpu` makes one."""
    path = Path(os.environ.get("CONTEXT_RL_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
    return path if path.exists() else None


@pytest.mark.skipif(vllm_python() is None, reason="no environment with vLLM: make vllm-cpu")
def test_a_run_behind_a_vllm_server_scores_as_the_local_one_does(tmp_path):
    """Red: the two back-ends of the same loop reward the same traces differently, or a server outlives its run."""
    flags = ["--max_steps", "1", "--no_evaluate"]
    server = ["--scorer", "vllm", "--scorer_python", str(vllm_python()), "--scorer_args=--enforce-eager --seed 0"]
    train(tmp_path / "local", *flags)
    train(tmp_path / "vllm", *flags, *server)
    pairs = list(zip(trace_rows(tmp_path / "local"), trace_rows(tmp_path / "vllm"), strict=True))
    for ours, theirs in pairs:
        assert (ours["trace"], ours["base_answer"]) == (theirs["trace"], theirs["base_answer"])
        assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-4)
        assert ours["advantage"] == pytest.approx(theirs["advantage"], abs=2e-2)
    running = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in running if "serve" in line and "models/tiny-base" in line]


# --- mistakes ---


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    contents = {
        "no_column.jsonl": '{"a": "x", "b": "y"}\n',
        "empty_answer.jsonl": '{"question": "Q1", "answer": "1"}\n{"question": "Q2", "answer": " "}\n',
        "no_hashes.jsonl": '{"question": "Q1", "answer": "it is 7"}\n',
        "long.jsonl": "".join(
            json.dumps({"question": f"{'word ' * 2000}{i}", "answer": "1"}) + "\n" for i in range(12)
        ),
        "text.jsonl": "".join(f'{{"question": "Capital {n}?", "answer": "Paris"}}\n' for n in range(10)),
        "unknown_key.yaml": "max_step: 3\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    return {name: str(tmp_path / name) for name in contents}


MISTAKES = {
    "a missing base model": (["--scorer_model", "no/such-folder"], ["no/such-folder", "--scorer_model"]),
    "a missing context model": (["--model_name_or_path", "nowhere"], ["nowhere", "--model_name_or_path"]),
    "a file without the column": (
        ["--task", "qa", "--data", "{no_column.jsonl}"],
        ["no_column.jsonl", "'a', 'b'", "--question_column"],
    ),
    "an empty answer": (["--task", "qa", "--data", "{empty_answer.jsonl}"], ["empty_answer.jsonl", "line 2"]),
    "a row the grader rejects": (["--task", "gsm8k", "--data", "{no_hashes.jsonl}"], ["no_hashes.jsonl", "line 1"]),
    "a prompt that does not fit": (["--task", "qa", "--data", "{long.jsonl}"], ["long.jsonl:", "does not fit"]),
    "a server nobody answers at": (
        ["--scorer", "vllm", "--scorer_url", "http://127.0.0.1:9"],
        ["http://127.0.0.1:9", "vllm serve"],
    ),
    "an unknown reward": (["--reward", "likelyhood"], ["likelyhood", "probability", "binary", "logprob_mean"]),
    "an unknown flag": (["--lerning_rate", "1"], ["lerning_rate", "learning_rate"]),
    "an unknown scaling": (["--scale_rewards", "grup"], ["--scale_rewards", "grup", "group, batch, none"]),
    "an unknown task": (["--task", "gsm9k"], ["gsm9k", "gsm8k"]),
    "a numeric reward of a text": (
        ["--task", "qa", "--data", "{text.jsonl}", "--reward", "soft_numeric"],
        ["text.jsonl:", "soft_numeric", "'Paris'"],
    ),
    "an answer longer than it may be": (
        ["--task", "qa", "--data", "{text.jsonl}", "--max_answer_tokens", "2"],
        ["text.jsonl:", "--max_answer_tokens 2"],
    ),
    "too few questions to evaluate": (["--eval_questions", "1"], ["1 held-out", "--no_evaluate"]),
    "a chat template that q lacks": (["--context_template", "chat"], ["--context_template", "tiny-context", "raw"]),
    "a chat template that the base model lacks": (["--scorer_template", "chat"], ["--scorer_template", "tiny-base"]),
    "resuming nothing": (["--resume"], ["--resume"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_and_leaves_no_folder(name, tmp_path, files, capfd):
    flags, expected = MISTAKES[name]
    flags = [files[f[1:-1]] if f.startswith("{") and f[1:-1] in files else f for f in flags]
    assert main([*SMALL, "--output_dir", str(tmp_path / "run"), *flags]) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in expected), errors[0]
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_the_recipe_names_key_and_file(files, capfd):
    assert main([files["unknown_key.yaml"]]) == 1
    message = capfd.readouterr().err
    assert all(part in message for part in ("max_step", "max_steps", "unknown_key.yaml"))


def test_an_answer_whose_token_boundary_is_ambiguous_names_the_row(tmp_path, capfd):
    # The tiny base model's tokenizer cannot make one; a tokenizer that merges across the colon can.
    model = merged_boundary_model(tmp_path / "model")
    assert main([*SMALL, "--output_dir", str(tmp_path / "run"), "--scorer_model", str(model)]) == 1
    message = capfd.readouterr().err
    assert "symbolic/train" in message
    assert "ambiguous token boundary" in message
    assert not (tmp_path / "run").exists()


def merged_boundary_model(folder: Path) -> Path:
    """A copy of the tiny base model whose tokenizer has the one token ": 1" across template and answer."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-base")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    space_digit = next(token for token in vocabulary if token == "Ġ1")
    vocabulary[":" + space_digit] = len(vocabulary)
    description["model"]["merges"].append([":", space_digit])
    backend = tokenizer.backend_tokenizer.from_str(json.dumps(description))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r": ?\p{N}| ?\p{L}+| ?\p{N}|\n| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer._tokenizer = backend
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny-base")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_finished_run_is_never_overwritten(tmp_path, capfd):
    folder = tmp_path / "run"
    train(folder, "--max_steps", "1", "--no_evaluate")
    before = (folder / "result.json").read_text()
    for flags in ([], ["--resume"]):
        assert main([*SMALL, "--output_dir", str(folder), "--max_steps", "1", *flags]) == 1
        assert "finished run" in capfd.readouterr().err
    assert (folder / "result.json").read_text() == before
