"""Running a grid: commands, states of run folders, locks, processes, a shared scoring server. See `recipes.ablate`."""

import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from context_rl import runs as folders
from context_rl.config import ConfigError
from context_rl.experiment import usable_cores
from recipes.ablate_grid import Grid, Run, flags, other_setting, shell
from scorer.types import ScorerError

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = (sys.executable, "-m", "accelerate.commands.launch")
"""What starts a run, before its words; as a reader would type it, `accelerate launch`."""
POLL_S, GRACE_S = 0.2, 20.0
SCORER_KEYS = ("scorer_model", "scorer_dtype", "scorer_python", "scorer_args", "scorer_memory", "scorer_device")


# --- commands and states ---


def command(grid: Grid, run: Run, out: Path, *, resume: bool = False, more: Sequence[str] = ()) -> list[str]:
    """The words after `accelerate launch`; paths are relative where that is shorter to read."""
    fixed = ["--quiet", "--config_file", near(REPOSITORY / "accelerate_config.yaml")]
    script = [near(REPOSITORY / "recipes" / "train_context.py"), near(grid.base)]
    going_on = ["--resume"] if resume else []
    return [*fixed, *script, *flags(run.settings), *grid.extra, *more, "--output_dir", str(out / run.name), *going_on]


def near(path: Path) -> str:
    """A path as seen from the current folder, if it lies in there."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def state(run: Run, out: Path) -> str:
    """finished, cut or missing.

    Raises:
        ConfigError: the folder holds a run of other settings.
    """
    folder = out / run.name
    begun = settings_begun(folder)
    if begun and (other := other_setting(run, begun)):
        raise ConfigError(f"{folder} holds a run with {other}; choose another --out, or move the folder away")
    if folders.is_finished(folder):
        return "finished"
    return "cut" if begun is not None else "missing"


def settings_begun(folder: Path, part: str = "settings") -> dict[str, Any] | None:
    """A part of the run's config.yaml; None where there is no such file."""
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, yaml.YAMLError):
        return {}
    return (content.get(part) or {}) if isinstance(content, dict) else {}


def seconds_of(out: Path, names: Iterable[str]) -> list[float]:
    """How long the finished runs took; those that were resumed count for their last part only and are left out."""
    found = []
    for name in names:
        with suppress(OSError, ValueError, KeyError, TypeError):
            result = json.loads((out / name / "result.json").read_text(encoding="utf-8"))
            if not result.get("resumed_from"):
                found.append(float(result["seconds"]))
    return found


def estimate(seconds: Sequence[float], left: int, jobs: int) -> str:
    """Time for `left` runs as long as those of `seconds` on average."""
    return as_time(sum(seconds) / len(seconds) * math.ceil(left / jobs)) if seconds else "unknown"


def as_time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def threads(run: Run, jobs: int) -> list[str]:
    """The CPU's cores shared out, where several runs train on it and nobody has said otherwise."""
    if jobs == 1 or "cpu_threads" in run.explicit or torch.cuda.is_available():
        return []
    return ["--cpu_threads", str(max(1, usable_cores() // jobs))]


def environment(slot: int, jobs: int) -> dict[str, str]:
    """Of several GPUs, the one for this slot."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    names = visible or [str(number) for number in range(count)]
    return {**os.environ} | ({"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if jobs > 1 and count > 1 else {})


# --- running ---


@contextmanager
def locked(path: Path) -> Iterator[IO[str] | None]:
    """The lock of a run with this process's id in it; None where somebody else holds it.

    The kernel holds it for the open file, which the run inherits: a file that a dead process left behind locks nothing,
    and a run whose `ablate` was killed keeps its lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


@dataclass
class Job:
    """A run under way: its process (which leads a group of its own), its log and where in it this attempt begins."""

    run: Run
    process: subprocess.Popen[bytes]
    log: Path
    begins: int
    slot: int
    lock: ExitStack
    since: float = field(default_factory=time.monotonic)


@dataclass
class Outcome:
    """What became of the runs: names, for the failed ones with the last error line."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def begin(grid: Grid, run: Run, out: Path, slot: int, jobs: int, url: Sequence[str], outcome: Outcome) -> Job | None:
    """Starts a run; None if another process has it, or finished it since."""
    lock, log = ExitStack(), out / "logs" / f"{run.name}.log"
    file = lock.enter_context(locked(out / "logs" / f"{run.name}.lock"))
    now = state(run, out) if file else "elsewhere"
    if file is None or now == "finished":
        (outcome.finished if now == "finished" else outcome.elsewhere).append(run.name)
        lock.close()
        return None
    words = [*LAUNCHER, *command(grid, run, out, resume=now == "cut", more=[*threads(run, jobs), *url])]
    with log.open("ab") as sink:
        begins = sink.tell()
        sink.write(f"$ {shell(words)}\n".encode())
        sink.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(slot, jobs),
            start_new_session=True,
            pass_fds=[file.fileno()],
        )
    return Job(run, process, log, begins, slot, lock)


def end(jobs: Sequence[Job], grace_s: float = GRACE_S) -> None:
    """Ends the runs with all their processes: asked first, killed after `grace_s` seconds."""
    for number, until in ((signal.SIGTERM, time.monotonic() + grace_s), (signal.SIGKILL, math.inf)):
        for job in jobs:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(job.process.pid, number)
        while any(job.process.poll() is None for job in jobs) and time.monotonic() < until:
            time.sleep(POLL_S / 4)
    for job in jobs:
        job.lock.close()


def last_error(text: str) -> str:
    """The line of a log that says why a run failed."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip() and not line.startswith("$ ")]
    for pattern in (r"error: ", r"[\w.]*(Error|Exception|Interrupt|Killed|StopRun)\b"):
        if found := [line for line in lines if re.match(pattern, line)]:
            return found[-1]
    return lines[-1] if lines else "it printed nothing"


def settle(job: Job, out: Path, outcome: Outcome) -> str:
    """Books a run that has ended; one line about it."""
    took = time.monotonic() - job.since
    with suppress(ProcessLookupError, PermissionError):  # where the launcher alone was killed, for want of memory say
        os.killpg(job.process.pid, signal.SIGKILL)
    job.lock.close()
    if folders.is_finished(out / job.run.name):
        outcome.finished.append(job.run.name)
        outcome.seconds.append(took)
        return f"finished in {as_time(took)}: {job.run.name}"
    code = job.process.returncode
    printed = job.log.read_bytes()[job.begins :].decode("utf-8", "replace")
    why = f"{last_error(printed)} ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
    outcome.failed[job.run.name] = why
    return f"failed after {as_time(took)}: {job.run.name}: {why}"


def run_all(
    grid: Grid, todo: Sequence[Run], out: Path, jobs: int, url: Sequence[str], outcome: Outcome, asked: list[int]
) -> None:
    """Runs them, `jobs` at once, until all have ended or `asked` holds a signal."""
    waiting, under_way = list(todo), []
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (BarColumn(), TextColumn("{task.description}", markup=False))
    known = seconds_of(out, (run.name for run in grid.runs))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(todo))
        try:
            while (waiting or under_way) and not asked:
                for job in [job for job in under_way if job.process.poll() is not None]:
                    under_way.remove(job)
                    line = settle(job, out, outcome)
                    console.print(f"[{len(todo) - len(waiting) - len(under_way)}/{len(todo)}] {line}", markup=False)
                while waiting and len(under_way) < jobs:
                    slot = min(set(range(jobs)) - {job.slot for job in under_way})
                    job = begin(grid, waiting.pop(0), out, slot, jobs, url, outcome)
                    under_way += [job] if job else []
                left = len(waiting) + len(under_way)
                counts = f"{len(outcome.finished)} done, {len(outcome.failed)} failed, {len(under_way)} running"
                time_left = estimate(outcome.seconds or known, left, jobs)
                progress.update(bar, completed=len(todo) - left, description=f"{counts}, time left {time_left}")
                time.sleep(POLL_S)
        finally:
            end(under_way)
            for job in under_way:
                done = folders.is_finished(out / job.run.name)
                (outcome.finished if done else outcome.stopped).append(job.run.name)


@contextmanager
def signals(asked: list[int]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal are written down, so that no run starts unseen between two lines.

    What is ignored, as under nohup, stays so.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def by_server(runs: Sequence[Run], out: Path) -> list[tuple[dict[str, Any] | None, list[Run]]]:
    """(Settings of a server to share, its runs); None where a run needs none, or was begun with one of its own.

    Of a server given by URL a run cannot tell the weights: a run that began with its own server knows them, and would
    refuse to go on without.
    """
    groups: dict[str, tuple[dict[str, Any] | None, list[Run]]] = {}
    for run in runs:
        wants = run.resolved["scorer"] == "vllm" and run.resolved["scorer_url"] is None
        begun = settings_begun(out / run.name, "scorer") or {}
        shares = wants and begun.get("weights", "unknown") == "unknown"
        settings = {key: run.resolved[key] for key in SCORER_KEYS} if shares else None
        groups.setdefault(json.dumps(settings), (settings, []))[1].append(run)
    return list(groups.values())


@contextmanager
def shared_server(settings: dict[str, Any] | None, log: Path) -> Iterator[list[str]]:
    """The words that point a run to one server for all; none where there is nothing to share."""
    if settings is None:
        yield []
        return
    from scorer.vllm.server import launch

    if settings["scorer_model"] is None:
        raise ConfigError("scorer_model is not set: it names the frozen base model, a hub id or a folder")
    log.parent.mkdir(parents=True, exist_ok=True)
    with launch(
        settings["scorer_model"],
        dtype=settings["scorer_dtype"],
        python=settings["scorer_python"],
        extra_args=shlex.split(settings["scorer_args"]),
        gpu_memory_utilization=settings["scorer_memory"],
        device=settings["scorer_device"],
        log_path=log,
    ) as server:
        yield ["--scorer_url", server.url]


def execute(grid: Grid, states: dict[str, str], out: Path, jobs: int) -> int:
    """Runs what is not finished; the exit code."""
    todo = [run for run in grid.runs if states[run.name] != "finished"]
    if not todo:
        print(f"nothing to do: all {len(states)} runs of {near(grid.path)} in {out} are finished")
        return 0
    (out / "logs").mkdir(parents=True, exist_ok=True)
    outcome, asked = Outcome(), []
    for settings, runs in by_server(todo, out):
        try:
            with shared_server(settings, out / "logs" / "scorer.log") as url, signals(asked):
                run_all(grid, runs, out, jobs, url, outcome, asked)
        except ScorerError as error:
            outcome.failed |= {run.name: f"error: {first_line(error)}" for run in runs}
        if asked:
            break
    failures = out / "failures.json"
    failures.unlink(missing_ok=True)
    if outcome.failed:
        folders.write_atomically(failures, json.dumps(outcome.failed, indent=1) + "\n")
    for name, why in outcome.failed.items():
        print(f"failed: {name}: {why}\n    {out / 'logs' / name}.log", file=sys.stderr)
    for name in outcome.elsewhere:
        print(f"left to the process that holds {out / 'logs' / name}.lock", file=sys.stderr)
    print(f"{len(outcome.finished)} finished, {len(outcome.failed)} failed of {len(todo)} runs in {out}")
    if asked:
        print(f"interrupted; {len(outcome.stopped)} runs were stopped, the same command goes on", file=sys.stderr)
        return 128 + asked[0]
    return 1 if outcome.failed else 0


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
