"""A command that never outlives the process which asked for it. Standard library only: half of it runs as a program.

    this process --pipe--> supervisor (this file, its own session) --> the command and its children (one session)

The command has children of its own, which outlive a killed parent (vLLM's engine and workers do). So each of the two
processes above it ends the command's whole group, and each stands in for the other:

- The supervisor does when the pipe closes or its parent changes: on stop(), at any kind of exit, after a SIGKILL.
- After a SIGKILL of the supervisor the kernel sends the command SIGTERM (PR_SET_PDEATHSIG, Linux), on which vLLM ends
  its own children; `Supervised.stop` and the exit of this process end whatever did not listen.

PR_SET_PDEATHSIG alone would not do: it reaches one process, not the engine under it, and between this process and the
supervisor it would fire when the *thread* that started the server ends. The supervisor has one thread.
"""

import atexit
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

POLL_S = 0.2
KILL_PATIENCE_S = 5.0
SUPERVISOR_PATIENCE_S = 10.0
"""Seconds that the supervisor gets beyond those which it gives its command."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Supervised:
    """A running command under a supervisor, its output appended to a file.

    Attributes:
        pid: of the supervisor; every process of the command descends from it while it lives.
        group: process group of the command, None where the command could not be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log_path: Path, grace_s: float):
        """Starts `command`. `grace_s` is the time in seconds between the polite and the final signal at its end."""
        self.grace_s, self._owner = grace_s, os.getpid()
        pid_reader, pid_writer = os.pipe()
        arguments = [str(self._owner), str(grace_s), str(pid_writer), *command]
        try:
            with log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    # -I: the supervisor needs the standard library alone, whatever PYTHONPATH says.
                    [sys.executable, "-I", __file__, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(env),
                    pass_fds=(pid_writer,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(pid_reader)
            raise
        finally:
            os.close(pid_writer)
        with os.fdopen(pid_reader) as reader:
            line = reader.readline()
        self.pid, self.group = self._process.pid, int(line) if line else None
        atexit.register(self.stop)  # the supervisor sees our exit on its own, unless it was killed before

    def exit_code(self) -> int | None:
        """Exit code of the command, None while it runs; 128 + N where signal N ended it (or its supervisor)."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def stop(self) -> None:
        """Ends the command with all its processes and waits for that. Safe to call twice; a forked child has no say."""
        if os.getpid() != self._owner or self._process.stdin is None:
            return
        atexit.unregister(self.stop)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(self.grace_s + KILL_PATIENCE_S + SUPERVISOR_PATIENCE_S)
        except subprocess.TimeoutExpired:  # somebody stopped the supervisor (SIGSTOP)
            self._process.kill()
            self._process.wait()
        # A supervisor that ended by itself has ended the group first, and the number may be another group's by now.
        if self._process.returncode < 0 and self.group is not None:
            end_group(self.group, self.grace_s)
            self.group = None


def end_group(group: int, grace_s: float, reap: Callable[[], None] = lambda: None) -> None:
    """SIGTERM to all processes of a group, SIGKILL after `grace_s` seconds to those left; waits until they are gone.

    `reap` is called while it waits: a process whose end nobody has collected still counts as a member of its group.
    """
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILL_PATIENCE_S)):
        deadline = time.monotonic() + patience_s
        try:
            os.killpg(group, number)
            while time.monotonic() < deadline:
                reap()
                os.killpg(group, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def supervise(parent: int, grace_s: float, pid_writer: int, command: Sequence[str]) -> int:
    """The program: runs `command` until it ends, standard input closes, the parent changes, or SIGTERM comes.

    Returns the exit code of the command, after the last process of its group is gone.
    """
    asked_to_stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, frame: asked_to_stop.append(signum))
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    supervisor = os.getpid()

    def die_with_supervisor() -> None:
        if prctl:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != supervisor:  # it died before the kernel knew
            os._exit(1)

    if prctl:
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the command become our children: we can reap them
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_supervisor)
    with os.fdopen(pid_writer, "w") as writer:
        writer.write(f"{server.pid}\n")

    exit_code = 0
    while not asked_to_stop and os.getppid() == parent:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == server.pid:
            exit_code = os.waitstatus_to_exitcode(status)
            break
        # A forked child of the parent can hold the pipe open after the parent's death: hence getppid() above.
        readable, _, _ = select.select([0], [], [], 0.0 if pid else POLL_S)
        if readable and not os.read(0, 1):
            break
    end_group(server.pid, grace_s, reap_all)
    return exit_code if exit_code >= 0 else 128 - exit_code


def reap_all() -> None:
    """Collects every child that has ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
