"""The grid runner. A failure means that a grid trains something else than it says, trains it twice, or loses it.

Most tests replace `accelerate launch train_context.py` by a script of a few lines that writes what a run would.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from context_rl.config import ConfigError, parse
from recipes import ablate, ablate_run
from recipes.ablate_grid import equivalent_arms, read_grid, same_settings, shell
from recipes.ablate_run import by_server, command, estimate, last_error, locked, state

STUB = """
import json, os, pathlib, signal, subprocess, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--output_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
reward = words[words.index("--reward") + 1]
with (out / "words.jsonl").open("a") as file:
    file.write(json.dumps(words) + "\\n")
(out / "config.yaml").write_text("settings: {reward: %s}" % reward)
(out / "began").write_text(repr(time.time()))
if reward == "binary":
    print("Traceback ...\\nerror: the model is not there\\nsubprocess.CalledProcessError: 1", flush=True)
    sys.exit(1)
if reward == "gain":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "pids.tmp").write_text(json.dumps([os.getpid(), child.pid]))
    (out / "pids.tmp").rename(out / "pids")
    time.sleep(600)
time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
(out / "ended").write_text(repr(time.time()))
(out / "result.json").write_text(json.dumps({"seconds": 30, "resumed_from": None}))
"""


@pytest.fixture
def write(tmp_path: Path, repository: Path):
    """Writes a grid on top of the default recipe; returns its path."""

    def grid(text: str, name: str = "grid.yaml") -> Path:
        path = tmp_path / name
        base = "" if "base:" in text else f"base: {repository / 'recipes' / 'symbolic.yaml'}\n"
        path.write_text(base + text, encoding="utf-8")
        return path

    return grid


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of accelerate: `binary` fails, `gain` hangs with a child of its own, the others finish."""
    path = tmp_path / "stub.py"
    path.write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(ablate_run, "LAUNCHER", (sys.executable, str(path)))
    return path


def names(path: Path, **options) -> list[str]:
    return [run.name for run in read_grid(path, **options).runs]


def error(path: Path, *extra: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_grid(path, extra)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def words_of(folder: Path) -> list[list[str]]:
    """What each start of the run was given."""
    return [json.loads(line) for line in (folder / "words.jsonl").read_text().splitlines()]


# --- expansion ----------------------------------------------------------------------------------------------------


def test_axes_make_a_product_in_their_order(write):
    """Failure: a cell of the grid is left out, or stands under another's name."""
    path = write("axes: {reward: [gain, binary], seed: [1, 2]}\n")
    assert names(path) == ["reward=gain,seed=1", "reward=gain,seed=2", "reward=binary,seed=1", "reward=binary,seed=2"]
    assert [(run.settings["reward"], run.settings["seed"]) for run in read_grid(path).runs] == [
        ("gain", 1),
        ("gain", 2),
        ("binary", 1),
        ("binary", 2),
    ]


def test_labels_stand_for_values_or_for_several_settings(write):
    """Failure: a label is taken for the value, or a value's second key is lost."""
    path = write(
        "settings: {max_steps: 9}\n"
        "axes:\n"
        "  reward:\n    cut: {threshold: {tau: 0.5}}\n    bare: {reward: gain, scale_rewards: none}\n"
        "  size:\n    small: {max_completion_length: 8}\n    large: {max_completion_length: 16, max_steps: 3}\n"
    )
    runs = {run.name: run for run in read_grid(path).runs}
    assert list(runs) == [f"reward={r},size={s}" for r in ("cut", "bare") for s in ("small", "large")]
    large = runs["reward=bare,size=large"].resolved
    assert [large[key] for key in ("reward", "scale_rewards", "max_completion_length", "max_steps")] == [
        "gain",
        "none",
        16,
        3,
    ]
    small = runs["reward=cut,size=small"].resolved
    assert (small["reward"], small["max_steps"]) == ({"threshold": {"tau": 0.5}}, 9)
    assert small["learning_rate"] == 1e-4, "the recipe holds where the grid says nothing"


def test_excluded_combinations_are_left_out(write):
    """Failure: an exclude with two axes drops everything that matches one of them, or nothing."""
    axes = "axes: {reward: [gain, binary, probability], scale_rewards: [group, none]}\n"
    found = names(write(axes + "exclude: [{reward: [gain, binary], scale_rewards: none}]\n"))
    assert found == [
        "reward=gain,scale_rewards=group",
        "reward=binary,scale_rewards=group",
        "reward=probability,scale_rewards=group",
        "reward=probability,scale_rewards=none",
    ]


@pytest.mark.parametrize(
    "arms",
    [
        "arms: {plain: {reward: gain}, cut: {reward: tiers, max_steps: 3}}\n",
        "arms: [{name: plain, reward: gain}, {name: cut, reward: tiers, max_steps: 3}]\n",
    ],
)
def test_named_arms_replace_the_product_and_may_be_seeded(write, arms):
    """Failure: arms are multiplied with each other, or not with the seeds."""
    assert names(write(arms)) == ["plain", "cut"]
    grid = read_grid(write(arms + "axes: {seed: [1, 2]}\n"))
    assert [run.name for run in grid.runs] == ["plain,seed=1", "plain,seed=2", "cut,seed=1", "cut,seed=2"]
    assert grid.runs[3].resolved["max_steps"] == 3


def test_only_chooses_by_name(write):
    path = write("axes: {reward: [gain, binary], seed: [1, 2]}\n")
    assert names(path, only=["*,seed=2"]) == ["reward=gain,seed=2", "reward=binary,seed=2"]
    with pytest.raises(ConfigError, match="no run is called nothing"):
        read_grid(path, only=["nothing"])


def test_names_are_safe_and_unique(write):
    """Failure: two runs share a folder, or a folder leaves the grid's."""
    path = write(
        "axes:\n"
        "  reward: [{threshold: {tau: 0.5}}, {threshold: {tau: -0.5}}]\n"
        "  stop_strings:\n    a/b: ['\\n']\n    a b: ['\\n\\n']\n    '..': [x]\n    A-B: [y]\n"
        f"    {'long' * 40}: [z]\n"
    )
    found = names(path)
    assert len({name.casefold() for name in found}) == len(found) == 10
    for name in found:
        assert len(name) < 230
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,=_+-")
    assert found == names(path), "a name must be the same tomorrow"
    assert "reward=threshold-tau-0.5," in found[0]
    assert names(write("arms: {logs: {seed: 1}}\n")) == ["logs-run"], "logs/ holds the logs"


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("settings: {max_step: 3}\naxes: {seed: [1]}\n", ["settings", "unknown key 'max_step'", "max_steps"]),
        ("axes: {sede: [1, 2]}\n", ["sede", "mapping of recipe keys", "seed"]),
        ("axes: {size: {small: {max_length_: 3}}}\n", ["size: small", "unknown key 'max_length_'"]),
        ("axes: {reward: [gain, prob]}\n", ["reward: prob", "no reward is called 'prob'"]),
        ("axes: {reward: {x: {threshold: {tua: 1}}}}\n", ["reward: x", "takes no 'tua'"]),
        ("axes: {seed: [one]}\n", ["seed=one", "invalid int value"]),
        ("axes: {scorer: [remote]}\n", ["scorer=remote", "local or vllm"]),
        ("axes: {seed: [1, 1]}\n", ["seed has one value twice"]),
        ("axes: {seed: []}\n", ["seed must be a list"]),
        ("axes: {seed: [1], more: {a: {seed: 2}}}\n", ["seed and more both set seed"]),
        ("axes: {output_dir: [a, b]}\n", ["output_dir", "--out"]),
        ("axes: {seed: [1]}\nexclude: [{seed: 4}]\n", ["exclude: seed: 4"]),
        ("axes: {seed: [1]}\nexclude: [{seed: 1}]\n", ["everything is excluded"]),
        ("axis: {seed: [1]}\n", ["no 'axis'"]),
        ("", ["neither axes nor arms"]),
        ("base: nothing.yaml\naxes: {seed: [1]}\n", ["nothing.yaml", "No such file"]),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(write, text, parts):
    """Failure: a typing error trains another grid, or shows after a night."""
    message = error(write(text))
    assert all(part in message for part in parts), message
    assert "grid.yaml" in message or "nothing.yaml" in message


def test_flags_that_the_grid_cannot_give_to_all_are_refused(write, capsys):
    """Failure: `--seed 3` makes five runs of one seed, under five names."""
    path = write("axes: {seed: [1, 2]}\n")
    assert "choose runs with --only" in error(path, "--seed", "3")
    assert "use --out" in error(path, "--output_dir", "x")
    assert "unknown key 'max_step' in the command line" in error(path, "--max_step", "3")
    assert ablate.main([str(path), "--jobs", "0"]) == 1
    assert capsys.readouterr().err == "error: --jobs is 0; it must be at least 1\n"


# --- commands -----------------------------------------------------------------------------------------------------


def test_printed_commands_parse_to_the_intended_settings(write, tmp_path, capsys):
    """Failure: a pasted command trains something else than the grid says. bash itself splits the words here."""
    path = write(
        "settings: {learning_rate: 1.0e-5, task_options: {a: [1, 'x y']}, evaluate: false, run_name: --odd}\n"
        "axes:\n  reward: {cut: {threshold: {of: gain, tau: -0.5}}}\n"
        '  stop_strings: {two: ["\\nIt\'s", "$HOME\\\\d\\n"]}\n'
    )
    assert ablate.main([str(path), "--out", str(tmp_path / "o u t"), "--max_steps", "7", "--no_masked_score"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) == 1
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    spoken = f'accelerate() {{ {shell([sys.executable, "-c", show])} "$@"; }}\n{lines[0]}\n'
    words = json.loads(subprocess.run(["bash", "-c", spoken], capture_output=True, text=True, check=True).stdout)
    script = next(place for place, word in enumerate(words) if word.endswith("train_context.py"))
    assert words[:3] == ["launch", "--quiet", "--config_file"]
    config, args, model = parse([*words[script + 1 :], "--use_cpu", "true"], Path("none.yaml"))
    assert config.reward == {"threshold": {"of": "gain", "tau": -0.5}}
    assert config.stop_strings == ["\nIt's", "$HOME\\d\n"]
    assert config.task_options == {"a": [1, "x y"]}
    assert (config.evaluate, config.masked_score) == (False, False)
    assert (args.learning_rate, args.max_steps, args.run_name) == (1e-5, 7, "--odd")
    assert args.output_dir == str(tmp_path / "o u t" / "reward=cut,stop_strings=two")
    assert model.model_name_or_path == "models/tiny-context"


def test_the_state_of_a_folder(write, tmp_path):
    """Failure: a finished run is trained again, a cut one is not resumed, or another experiment's is taken for ours."""
    [run] = read_grid(write("axes: {reward: [{threshold: {tau: 0.5}}]}\n")).runs
    folder = tmp_path / run.name
    assert state(run, tmp_path) == "missing"
    folder.mkdir()
    assert state(run, tmp_path) == "missing"
    begun = {"reward": {"threshold": {"tau": 0.5}}, "seed": 1, "scale_rewards": "group", "warmup_steps": 0.0}
    (folder / "config.yaml").write_text(yaml.safe_dump({"settings": begun}))
    assert state(run, tmp_path) == "cut"
    (folder / "result.json").write_text("{}")
    assert state(run, tmp_path) == "finished"
    (folder / "config.yaml").write_text(yaml.safe_dump({"settings": begun | {"max_steps": 2}}))
    with pytest.raises(ConfigError, match="max_steps = 2, not 60"):
        state(run, tmp_path)


def test_the_plan_counts_and_resumes(write, tmp_path, capsys):
    """Failure: the list of commands starts a cut run anew, or shows finished ones as still to do."""
    path = write("axes: {seed: [1, 2, 3, 4, 5]}\n")
    for seed in (1, 2):
        (tmp_path / "out" / f"seed={seed}").mkdir(parents=True)
        (tmp_path / "out" / f"seed={seed}" / "config.yaml").write_text("settings: {}")
    (tmp_path / "out" / "seed=1" / "result.json").write_text('{"seconds": 90}')
    assert ablate.main([str(path), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "5 runs in" in out
    assert "1 finished, 1 cut, 3 missing" in out
    commands = [line for line in out.splitlines() if line.startswith("accelerate launch")]
    assert [line.endswith("--resume") for line in commands] == [True, False, False, False]
    assert "# estimated time for 4 runs, 2 at a time: 3 min" in out


def test_time_is_unknown_until_something_has_finished():
    assert estimate([], 3, 1) == "unknown"
    assert estimate([60.0, 120.0], 5, 2) == "4 min"
    assert estimate([3600.0], 3, 1) == "3 h 00 min"


def test_arms_that_grpo_cannot_tell_apart_are_named(write, capsys):
    """Failure: hours go into one experiment under two names; or arms are compared that differ otherwise too."""
    text = (
        "axes: {reward: [gain, logprob_mean, binary], scale_rewards: [group, batch], seed: [1, 2]}\n"
        "exclude: [{reward: logprob_mean, scale_rewards: batch}]\n"
    )
    verdicts = equivalent_arms(read_grid(write(text)).runs)
    assert [(*verdict[:3], verdict[3].kind) for verdict in verdicts] == [("gain", "logprob_mean", "group", "identical")]
    assert ablate.main([str(write(text))]) == 0
    assert "By argument only, no data yet" in capsys.readouterr().out
    other = "arms: {one: {reward: gain, max_steps: 3}, two: {reward: logprob_mean, max_steps: 4}}\n"
    assert equivalent_arms(read_grid(write(other)).runs) == []


def test_one_run_under_two_names_is_told(write):
    """Failure: a label that changes nothing doubles the cost and looks like a second seed."""
    arms = "arms: {a: {reward: gain, scale_rewards: group}, b: {reward: gain}, c: {reward: gain, seed: 9}}\n"
    assert same_settings(read_grid(write(arms)).runs) == [("a", "b")]


@pytest.mark.parametrize(
    ("name", "count"), [("rewards", 60), ("scaling", 75), ("leaks", 20), ("sizes", 45), ("judge", 30), ("dialogue", 15)]
)
def test_shipped_grids_expand_and_print(repository, tmp_path, capsys, name, count):
    """Failure: a grid of the repository does not start."""
    path = repository / "recipes" / "ablations" / f"{name}.yaml"
    assert ablate.main([str(path), "--out", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert out.count("accelerate launch") == count
    assert "one experiment under two names" not in out
    assert not (tmp_path / name).exists(), "printing writes nothing"


# --- running ------------------------------------------------------------------------------------------------------


def test_run_does_what_is_missing_resumes_what_was_cut_and_then_nothing(write, stub, tmp_path, capsys):
    """Failure: a killed grid loses or repeats runs."""
    path, out = write("axes: {reward: [probability, tiers, logprob_sum]}\n"), tmp_path / "out"
    for reward in ("probability", "tiers"):
        (out / f"reward={reward}").mkdir(parents=True)
        (out / f"reward={reward}" / "config.yaml").write_text(f"settings: {{reward: {reward}}}")
    (out / "reward=probability" / "result.json").write_text("{}")
    assert ablate.main([str(path), "--run", "--out", str(out)]) == 0
    assert not (out / "reward=probability" / "words.jsonl").exists()
    [resumed], [fresh] = words_of(out / "reward=tiers"), words_of(out / "reward=logprob_sum")
    assert resumed[-1] == "--resume"
    assert "--resume" not in fresh
    assert "2 finished, 0 failed of 2 runs" in capsys.readouterr().out
    assert ablate.main([str(path), "--run", "--out", str(out)]) == 0
    assert "nothing to do: all 3 runs" in capsys.readouterr().out
    assert len(words_of(out / "reward=tiers")) == 1


def test_a_failing_run_stops_no_other_and_is_told_at_the_end(write, stub, tmp_path, capsys):
    """Failure: one bad arm costs the night, or goes unseen."""
    path, out = write("axes: {reward: [binary, probability]}\n"), tmp_path / "out"
    assert ablate.main([str(path), "--run", "--out", str(out)]) == 1
    assert state(read_grid(path).runs[1], out) == "finished"
    why = "error: the model is not there (exit code 1)"
    captured = capsys.readouterr()
    assert f"failed: reward=binary: {why}" in captured.err
    assert json.loads((out / "failures.json").read_text()) == {"reward=binary": why}
    assert "the model is not there" in (out / "logs" / "reward=binary.log").read_text()


def test_two_jobs_really_run_at_once_with_half_the_cores_each(write, stub, tmp_path, monkeypatch):
    """Failure: --jobs 2 takes as long as one, or both fight for all cores."""
    monkeypatch.setenv("STUB_SECONDS", "1.5")
    path, out = write("axes: {reward: [probability, tiers]}\n"), tmp_path / "out"
    assert ablate.main([str(path), "--run", "--jobs", "2", "--out", str(out)]) == 0
    folders = [out / "reward=probability", out / "reward=tiers"]
    began, ended = ([float((folder / name).read_text()) for folder in folders] for name in ("began", "ended"))
    assert max(began) < min(ended)
    words = words_of(folders[0])[0]
    assert int(words[words.index("--cpu_threads") + 1]) >= 1


def test_sigterm_ends_every_process_and_leaves_a_run_to_resume(write, stub, tmp_path):
    """Failure: a cancelled grid trains on in the background, and the next one meets it."""
    path, out = write("axes: {reward: [gain, probability]}\n"), tmp_path / "out"
    driver = (
        "import sys\nfrom recipes import ablate, ablate_run\n"
        f"ablate_run.LAUNCHER = (sys.executable, {str(stub)!r})\nsys.exit(ablate.main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", driver, str(path), "--run", "--out", str(out)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    pids_file, until = out / "reward=gain" / "pids", time.monotonic() + 120
    while not pids_file.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    pids = json.loads(pids_file.read_text())
    with locked(out / "logs" / "reward=gain.lock") as file:
        assert file is None, "the run is under way"
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "1 runs were stopped, the same command goes on" in printed
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
    assert not (out / "reward=probability").exists(), "nothing is started after the signal"
    assert state(read_grid(path).runs[0], out) == "cut"
    with locked(out / "logs" / "reward=gain.lock") as file:
        assert file is not None


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_that_another_process_holds_is_left_to_it(write, stub, tmp_path, capsys):
    """Failure: two commands at once write into one run folder; or a lock of a dead process blocks a run for ever."""
    path, out = write("axes: {reward: [probability, tiers]}\n"), tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "logs" / "reward=tiers.lock").write_text("999999999\n")  # left behind by a process that is no more
    with (out / "logs" / "reward=probability.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ablate.main([str(path), "--run", "--out", str(out)]) == 0
    assert "left to the process that holds" in capsys.readouterr().err
    assert not (out / "reward=probability").exists()
    assert state(read_grid(path).runs[1], out) == "finished"
    assert (out / "logs" / "reward=tiers.lock").read_text() == f"{os.getpid()}\n"


def test_the_last_error_line_is_the_one_that_helps():
    text = "$ command\nloading\r 10%\r 20%\nerror: no such model\nsubprocess.CalledProcessError: status 1\n"
    assert last_error(text) == "error: no such model"
    assert last_error("a\ntorch.OutOfMemoryError: CUDA\nbye\n") == "torch.OutOfMemoryError: CUDA"
    assert last_error("a\nKilled process 3\n") == "Killed process 3"
    assert last_error("$ command\n") == "it printed nothing"


# --- one scorer for several runs, Slurm ---------------------------------------------------------------------------


def test_runs_share_a_server_by_the_settings_of_their_base_model(write, tmp_path):
    """Failure: a server a run, or one base model's scores for another's."""
    text = "settings: {scorer: vllm}\naxes: {scorer_model: [a, b], seed: [1, 2]}\n"
    runs = read_grid(write(text)).runs
    own = tmp_path / runs[0].name
    own.mkdir()
    own.joinpath("config.yaml").write_text("settings: {}\nscorer: {weights: abc}\n")
    groups = by_server(runs, tmp_path)
    assert [(settings and settings["scorer_model"], len(group)) for settings, group in groups] == [
        (None, 1),  # began with a server of its own, whose weights it knows
        ("a", 1),
        ("b", 2),
    ]
    assert [settings for settings, _ in by_server(read_grid(write("axes: {seed: [1, 2]}\n")).runs, tmp_path)] == [None]
    given = read_grid(write(text), ["--scorer_url", "http://127.0.0.1:1"]).runs
    assert [settings for settings, _ in by_server(given[1:], tmp_path)] == [None]


def test_the_shared_server_reaches_every_run_and_is_closed(write, stub, tmp_path, monkeypatch):
    """Failure: runs launch servers of their own beside the shared one, or it is left behind."""
    events = []

    class Server:
        url = "http://127.0.0.1:12345"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            events.append("closed")

    def launch(model, **options):
        events.append((model, options["dtype"], options["extra_args"]))
        return Server()

    monkeypatch.setattr("scorer.vllm.server.launch", launch)
    path = write(
        "settings: {scorer: vllm, scorer_args: --max-model-len 512}\naxes: {reward: [probability, tiers]}\n", "v.yaml"
    )
    assert ablate.main([str(path), "--run", "--out", str(tmp_path / "out")]) == 0
    assert events == [("models/tiny-base", "float32", ["--max-model-len", "512"]), "closed"]
    for reward in ("probability", "tiers"):
        [words] = words_of(tmp_path / "out" / f"reward={reward}")
        assert words[words.index("--scorer_url") + 1] == Server.url


def test_slurm_gets_one_line_a_run_that_is_missing(write, tmp_path, capsys):
    """Failure: a cluster trains finished runs again, or the array has another length than the list."""
    path, out = write("axes: {reward: [probability, tiers, gain]}\n"), tmp_path / "o ut"
    (out / "reward=tiers").mkdir(parents=True)
    (out / "reward=tiers" / "result.json").write_text("{}")
    assert ablate.main([str(path), "--slurm", "--out", str(out), "--max_steps", "3"]) == 0
    assert "written, not submitted" in capsys.readouterr().out
    lines = (out / "commands.txt").read_text().splitlines()
    assert len(lines) == 2
    assert "--only reward=gain --max_steps 3" in lines[1]
    script = (out / "array.sbatch").read_text()
    assert "#SBATCH --array=1-2\n" in script
    said = subprocess.run(
        ["bash", "-c", script.replace('eval "', 'echo "')],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == lines[1]


# --- the real thing -----------------------------------------------------------------------------------------------


def test_a_grid_of_two_real_runs_then_nothing_to_do(write, tmp_path, repository, monkeypatch, capsys):
    """Failure: the commands do not start the trainer, or a finished run's own config.yaml is taken for another's."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    path, out = write("axes:\n  reward: {plain: probability, cut: {threshold: {tau: 0.5}}}\n"), tmp_path / "out"
    small = "--max_steps 2 --no_evaluate --per_device_train_batch_size 8 --train_questions 16 --eval_questions 4"
    words = [str(path), "--run", "--jobs", "2", "--out", str(out), *small.split(), "--max_completion_length", "8"]
    assert ablate.main([*words, "--scorer_cache", str(tmp_path / "scores")]) == 0, capsys.readouterr().err
    results = [json.loads((out / f"reward={name}" / "result.json").read_text()) for name in ("plain", "cut")]
    assert [result["reward_spec"] for result in results] == ["probability", {"threshold": {"tau": 0.5}}]
    assert [result["steps"] for result in results] == [2, 2]
    assert ablate.main([*words, "--scorer_cache", str(tmp_path / "scores")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert ablate.main([str(path), "--out", str(out)]) == 1, "the grid without those flags is another experiment"
    assert "choose another --out" in capsys.readouterr().err
    (out / "reward=cut" / "result.json").unlink()
    [grid] = [read_grid(path, words[6:])]
    assert command(grid, grid.runs[1], out, resume=True)[-1] == "--resume"
    assert state(grid.runs[1], out) == "cut"
