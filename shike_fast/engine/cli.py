"""What the commands share: one-line errors, exit statuses and the choice of a device."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import torch

from shike_fast._resources import is_out_of_memory, is_out_of_threads, keep_memory, out_of_threads
from shike_fast.errors import ConfigError, ShikeError

USAGE_ERROR = 2  # bad input: nothing was done
FAILURE = 1  # the work began and could not be finished

_HEAD_START = 3.0  # seconds that one process may start after another and still be the first to speak


class Terminated(BaseException):
    """SIGTERM came where there is nothing to save."""


class ArgumentParser(argparse.ArgumentParser):
    """Parser whose errors are one line and whose options cannot be abbreviated.

    Of several processes, which all get the same arguments, only the first one prints.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Print ``error: <message>`` and exit with status 2."""
        first = os.environ.get("RANK", "0") == "0"
        if not first:
            let_first_speak()
        self.exit(USAGE_ERROR, f"error: {message}; see {self.prog} --help\n" if first else None)


def let_first_speak() -> None:
    """Wait in a process that is about to end silently, because ``torchrun`` then stops the one that says why."""
    time.sleep(_HEAD_START)


def run_command(command: Callable[[], int]) -> int:
    """Call ``command``; print an error meant for the user as one line and return its exit status.

    2 means bad input; anything else that went wrong with files or memory is 1. Faults of the library itself keep their
    traceback.
    """
    try:
        with _sigterm_raises():
            return command()
    except ShikeError as error:
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail("stopped by SIGINT", 128 + signal.SIGINT)
    except Terminated:
        return _fail("stopped by SIGTERM", 128 + signal.SIGTERM)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _fail(_out_of_memory(error), FAILURE)
    except RuntimeError as error:
        # there are no types of their own for a full main memory, a thread that cannot start, a peer that has gone
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            return _fail(f"another process of the run has ended, or cannot be reached ({_one_line(error)})", FAILURE)
        if is_out_of_memory(error):
            return _fail(_out_of_memory(error), FAILURE)
        if is_out_of_threads(error):
            return _fail(str(out_of_threads("cannot go on")), FAILURE)
        raise
    except BrokenPipeError:  # whoever read the output has gone (… | head); nor may the flush at exit fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f" for {error.filename}" if error.filename else ""
            return _fail(f"the disk is full, there is no space left{where}; free some and repeat the command", FAILURE)
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot use file{where}: {error.strerror or _one_line(error)}", FAILURE)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    # Where Python allows no signal handlers, or the caller wants the signal to be ignored.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _out_of_memory(error: BaseException) -> str:
    return (
        f"out of memory ({_one_line(error) or 'no details'}); lower --batch-size, raise --accumulate or use --amp bf16"
    )


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def cores() -> int:
    """Processor cores that this process may use, which in a container may be few of many."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_workers() -> int:
    """Loader processes that are allowed: a typing error must not bring the machine down."""
    return max(32, 4 * cores())


def check_workers(workers: int | None) -> None:
    """Raise ConfigError for a ``--workers`` that is out of range; None is not given."""
    if workers is not None and not 0 <= workers <= most_workers():
        raise ConfigError(f"--workers: must be at least 0 and here at most {most_workers()}, got {workers}")


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``, or the best one present.

    Raises:
        ConfigError: if torch does not know it or this machine does not have it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device: '{name}' is no device; use cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"--device: '{name}' is not supported; use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f"--device: '{name}' is not on this machine, which has {count} CUDA devices; use --device cpu"
        )
    return device


def use_device(device: torch.device) -> None:
    """Prepare this process for work on a device: make a GPU the current one, keep the memory of a CPU's tensors.

    A GPU is current where graphs are recorded and memory statistics are read.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_memory()


def make_deterministic(deterministic: bool) -> None:
    """Let torch refuse operations without a deterministic form, or, on a GPU, choose the fastest convolutions.

    Call it before the first CUDA operation: cuBLAS reads its setting only once.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
