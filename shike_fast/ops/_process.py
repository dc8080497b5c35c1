"""A separate process, with a limit of time, for what may crash or hang."""

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPORT = "REPORT"  # among the words of a command: the file for the lines that its program finds
_PATH = "import json, os, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "


class Ended(NamedTuple):
    """What has become of a process: its status, the lines of its report, and the last one on standard error."""

    status: int
    timed_out: bool
    report: list[str]
    last_words: str

    def how(self) -> str:
        """One clause."""
        if self.timed_out:
            return "no end within its time"
        if self.status < 0:
            return signal.Signals(-self.status).name
        return f"status {self.status}: {self.last_words or 'without a word'}"


def python(program: str) -> tuple[str, ...]:
    """The command that runs a program; the first word after it is ``sys.path`` as JSON, so that it finds the same code.

    It ends without tidying up, which takes PyTorch half a second.
    """
    return (sys.executable or "python", "-c", f"{_PATH}{program}; sys.stderr.flush(); os._exit(0)")


def run(
    command: Sequence[str],
    seconds: float,
    *,
    processor_seconds: float | None = None,
    output: Path | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Run a command, and end it and all that it started when its time is over.

    Args:
        command: its words.
        seconds: by the clock.
        processor_seconds: of the processors' time, on Linux.
        output: the file for what it prints, otherwise nobody reads it.
        cwd: the folder it runs in.

    Raises:
        OSError: no process can be started, or a file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="shike_fast-") as folder:
        report, errors = Path(folder) / "report", output or Path(folder) / "errors"
        report.touch()
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [str(report) if word == REPORT else word for word in command],
                stdin=subprocess.DEVNULL,
                stdout=file if output else subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                cwd=cwd,
            )
        timed_out = False
        try:
            if processor_seconds is not None:
                _limit(process.pid, processor_seconds)
            process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
        lines = report.read_text(encoding="utf-8").splitlines()
        last_words = errors.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2][:300]
    status = process.returncode
    return Ended(status, timed_out or status == -signal.SIGXCPU, lines, last_words)


def _limit(pid: int, seconds: float) -> None:
    """SIGXCPU ends a process that has used so much of the processors; elsewhere than on Linux nothing does."""
    if sys.platform == "linux":
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            resource.prlimit(pid, resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and of all that it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.wait()
