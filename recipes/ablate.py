"""Runs a grid of experiments: prints its commands by default, runs what is missing with --run.

    python -m recipes.ablate recipes/ablations/<name>.yaml [--only PATTERN] [--run] [--jobs N] [--slurm] [--out FOLDER]
                             [--key value ...]

What a grid is: `recipes.ablate_grid`. Every run has a folder of its own, OUT/<axis=value,...>/; OUT/logs/ holds what
they printed. A run is finished (result.json), cut (config.yaml alone; it is resumed) or missing. `--key value` holds
for all runs.

With --run, a run that fails does not stop the others; what failed is told at the end and in OUT/failures.json, and the
exit code is 1. Ctrl-C and SIGTERM end the runs under way, which the same command resumes. Two such commands at once
share the work: a run belongs to who holds its lock, OUT/logs/<run>.lock, which ends with its holders, however they end.

Runs with `scorer: vllm` and no scorer_url share one server, launched here; base models with other settings take turns.
With the local scorer there is nothing to share: every run loads its base model. Several jobs at once get an equal share
of the CPU's cores, and the GPUs in turn.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from context_rl import runs as folders
from context_rl.config import ConfigError, Options
from context_rl.rewards.equivalence import explain
from recipes.ablate_grid import Grid, equivalent_arms, read_grid, same_settings, shell
from recipes.ablate_run import command, estimate, execute, near, seconds_of, state, threads
from scorer.types import ScorerError


def show(grid: Grid, out: Path, states: dict[str, str], jobs: int) -> str:
    """What can be read, and pasted: every line that is no command begins with #."""
    counts = ", ".join(f"{list(states.values()).count(kind)} {kind}" for kind in ("finished", "cut", "missing"))
    lines = [f"# {near(grid.path)}: {len(states)} runs in {out}: {counts}"]
    for run in grid.runs:
        if states[run.name] == "finished":
            lines.append(f"# finished: {run.name}")
        else:
            words = command(grid, run, out, resume=states[run.name] == "cut", more=threads(run, jobs))
            lines.append(f"accelerate launch {shell(words)}")
    lines += [f"# one experiment under two names: {one} and {other}" for one, other in same_settings(grid.runs)]
    if verdicts := equivalent_arms(grid.runs):
        lines += ["#", "# Rewards that GRPO cannot tell apart, or only by their distances (order)."]
        lines += ["# By argument only, no data yet:"]
        lines += [f"# {line}" for line in explain(verdicts).splitlines()]
    left = [name for name, kind in states.items() if kind != "finished"]
    time_left = estimate(seconds_of(out, states), len(left), jobs) if left else "none"
    lines += ["#", f"# estimated time for {len(left)} runs, {jobs} at a time: {time_left}"]
    return "\n".join(lines)


# --- Slurm ---

SBATCH = """#!/bin/bash
# {count} runs, one a task: sbatch {file}   (add what your cluster asks for: --partition, --account, modules, ...)
#SBATCH --job-name=ablate-{name}
#SBATCH --array=1-{count}
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output={logs}/slurm-%A-%a.log
cd {cwd}
eval "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {commands})"
"""


def write_slurm(grid: Grid, states: dict[str, str], out: Path) -> str:
    """array.sbatch and commands.txt, a line for every run that is not finished; what to do with them, in words.

    A line calls this program again for its one run: it skips, resumes and locks by the state at that time.
    """
    names = [run.name for run in grid.runs if states[run.name] != "finished"]
    if not names:
        return f"nothing to do: all {len(states)} runs in {out} are finished"
    (out / "logs").mkdir(parents=True, exist_ok=True)
    start = [sys.executable, "-m", "recipes.ablate", near(grid.path)]
    lines = [shell([*start, "--run", "--out", str(out), "--only", name, *grid.extra]) for name in names]
    folders.write_atomically(out / "commands.txt", "\n".join(lines) + "\n")
    paths = {"file": out / "array.sbatch", "logs": out / "logs", "cwd": Path.cwd(), "commands": out / "commands.txt"}
    quoted = {key: shlex.quote(str(path)) for key, path in paths.items()}
    text = SBATCH.format(name=grid.path.stem, count=len(names), **quoted)
    folders.write_atomically(out / "array.sbatch", text)
    return f"written, not submitted: sbatch {quoted['file']} ({len(names)} runs, {out / 'commands.txt'})"


# --- the command line ---


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(Own options, the words for all runs)."""
    parser = Options(
        prog="python -m recipes.ablate",
        description="Prints the commands of a grid of runs, or runs what is missing. --key value holds for all runs.",
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=Path, help="a YAML such as recipes/ablations/rewards.yaml")
    parser.add_argument("--run", action="store_true", help="run what is missing, resume what was cut")
    parser.add_argument("--slurm", action="store_true", help="write OUT/array.sbatch, a job array over what is missing")
    parser.add_argument("--out", type=Path, help="folder of the runs; unset: runs/<name of the grid>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="runs whose name matches, such as '*,seed=1'"
    )
    options, extra = parser.parse_known_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    if options.run and options.slurm:
        parser.error("--run runs here, --slurm writes files for a cluster; choose one")
    return options, extra


def main(argv: Sequence[str] | None = None) -> int:
    """Prints, runs or writes the grid; an error that a user can mend is one line, and the exit code 1."""
    try:
        options, extra = parse_options(sys.argv[1:] if argv is None else argv)
        grid = read_grid(options.grid, extra, options.only or ())
        out = options.out or Path("runs") / options.grid.stem
        states = {run.name: state(run, out) for run in grid.runs}
        if options.run:
            return execute(grid, states, out, options.jobs)
        print(write_slurm(grid, states, out) if options.slurm else show(grid, out, states, options.jobs))
    except (ConfigError, ScorerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while a server starts; runs under way are ended by run_all
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
