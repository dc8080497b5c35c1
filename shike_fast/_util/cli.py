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

from shike_fast._util.files import FULL
from shike_fast._util.output import forgiving_streams
from shike_fast._util.resources import is_out_of_memory, is_out_of_threads, keep_memory, out_of_threads
from shike_fast.errors import ConfigError, ShikeError

USAGE_ERROR = 2  # bad input: nothing was done
FAILURE = 1  # the work began and could not be finished

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
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
        first = _is_first()
        if not first:
            let_first_speak()
        self.exit(USAGE_ERROR, f"error: {message}; see {self.prog} --help\n" if first else None)


def _is_first() -> bool:
    """Whether no process with a lower rank was started with this one, as far as the environment is right."""
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return not (rank.isdecimal() and world_size.isdecimal() and 0 < int(rank) < int(world_size))


def let_first_speak() -> None:
    """Wait in a process that is about to end silently, because ``torchrun`` then stops the one that says why."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends this one once the first has spoken
    time.sleep(_HEAD_START)


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Of several processes that all meet with the same error in here, only the first one prints it."""
    try:
        yield
    except ShikeError as error:
        if _is_first():
            raise
        let_first_speak()
        raise SystemExit(error.exit_status) from error


def run_command(command: Callable[[], int], *, prints_result: bool = True) -> int:
    """Call ``command``; print an error meant for the user as one line and return its exit status.

    2 means bad input, also where ``command`` parses the command line; anything else that went wrong with files or
    memory is 1. Faults of the library itself keep their traceback. What printing meets with never ends the command, and
    what it sets for the whole process is as before when it has ended.

    Args:
        command: returns the exit status.
        prints_result: what it prints is what it is for, so that a full disk under standard output is a failure.
    """
    with forgiving_streams() as output, settings_kept():
        status = _status_of(command)
        sys.stdout.flush()
        if status == 0 and prints_result and output.failure is not None:
            reason = output.failure.strerror
            return _fail(f"standard output cannot be written: {reason}; what was printed is not complete", FAILURE)
        return status


def _status_of(command: Callable[[], int]) -> int:
    try:
        with _sigterm_raises():
            return command()
    except SystemExit as end:  # of the parser, for --help or a bad option
        if not isinstance(end.code, int):
            raise
        return end.code
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
    except OSError as error:
        return _fail(_of_the_system(error), FAILURE)


def _of_the_system(error: OSError) -> str:
    reason = error.strerror or _one_line(error)
    where = f" for {error.filename}" if error.filename else ""
    if error.errno in FULL:
        what = "the disk is full, there is" if error.errno == errno.ENOSPC else "by the disk quota there is"
        return f"{what} no space left{where}; free some and repeat the command"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many open files{where}; use fewer --workers, or raise the limit (ulimit -n)"
    return f"cannot use file {error.filename}: {reason}" if error.filename else f"the system refuses a call: {reason}"


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


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """What a command sets for the whole process is as before when it ends: its caller may be a notebook."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    workspace = os.environ.get(_CUBLAS_WORKSPACE)
    random = torch.get_rng_state()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    device_random = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_CUBLAS_WORKSPACE, None)
        torch.set_rng_state(random)
        if device is not None:
            torch.cuda.set_device(device)
            torch.cuda.set_rng_state_all(device_random)


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


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """What argparse reads an option with that takes a whole number of at least ``least`` and at most ``most``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"{least} … {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {value}")
        return value

    parse.__name__ = "whole number"  # what argparse calls it: invalid whole number value
    return parse


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
        os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
