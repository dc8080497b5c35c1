"""Programs that tests start: each has a limit of its own, and neither it nor what it started outlives its test."""

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

LIMIT = 900.0  # seconds that only a program that hangs needs; a test may take longer

MARK = "SHIKE_FAST_TESTS"  # variable of the environment that a program hands on to all that it starts


class Programs:
    """Starts programs, each in a session of its own, with nothing to read and its output as text in pipes."""

    def __init__(self) -> None:
        self.mark = f"/{os.getpid()}:"
        self._numbers = itertools.count()
        self._started: list[tuple[str, subprocess.Popen]] = []

    def start(self, command: Iterable[object], **options: Any) -> subprocess.Popen:
        """A running program: what :meth:`finish` does not wait for, :meth:`end` kills when the test is over."""
        mark = f"{self.mark}{next(self._numbers)}/"
        # A pytest among the programs is no part of this one.
        environment = {k: v for k, v in options.pop("env", os.environ).items() if not k.startswith("PYTEST_")}
        environment[MARK] = environment.get(MARK, "") + mark
        defaults = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        defaults["start_new_session"] = True
        process = subprocess.Popen([str(word) for word in command], env=environment, **defaults | options)
        self._started.append((mark, process))
        return process

    def finish(self, process: subprocess.Popen, limit: float = LIMIT) -> subprocess.CompletedProcess:
        """Wait for the end of a program."""
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            kill_marked(next(mark for mark, started in self._started if started is process))
            output, errors = process.communicate()
            raise AssertionError(
                f"no end after {limit:g} s: {shlex.join(process.args)}\noutput: {output}\nerrors: {errors}"
            ) from None
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def run(self, command: Iterable[object], *, limit: float = LIMIT, **options: Any) -> subprocess.CompletedProcess:
        """Start a program and wait for its end."""
        return self.finish(self.start(command, **options), limit)

    def wait_until(self, condition: Callable[[], object], process: subprocess.Popen, limit: float = LIMIT) -> None:
        """Wait for what a program that goes on is to bring about."""
        deadline = time.monotonic() + limit
        while not condition():
            assert process.poll() is None, self.finish(process)
            assert time.monotonic() < deadline, f"{limit:g} s were not enough for: {shlex.join(process.args)}"
            time.sleep(0.02)

    def end(self) -> None:
        """Kill what is left of the programs and of all that they started."""
        if self._started:
            kill_marked(self.mark)
        for _, process in self._started:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._started.clear()


def kill_marked(mark: str) -> None:
    """Kill a program and all processes that it has started."""
    while found := list(marked(mark)):
        kill(found)
        time.sleep(0.01)


def marked(mark: str) -> Iterator[int]:
    """The processes that a program with this mark has started, and itself."""
    entry = f"{MARK}=".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or one that has just ended
            for variable in (process / "environ").read_bytes().split(b"\0"):
                if variable.startswith(entry) and mark.encode() in variable:
                    yield int(process.name)


def descendants(parent: int) -> list[int]:
    """The processes below one."""
    children = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                children.append(int(process.name))
    return [*children, *(below for child in children for below in descendants(child))]


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
