"""What the commands share: one-line errors, exit statuses and the choice of a device."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import torch

from shike_fast.errors import ConfigError, ShikeError

USAGE_ERROR = 2  # bad input: nothing was done
FAILURE = 1  # the work began and could not be finished


class Terminated(BaseException):
    """SIGTERM came where there is nothing to save."""


class ArgumentParser(argparse.ArgumentParser):
    """Parser whose errors are one line and whose options cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Print ``error: <message>`` and exit with status 2."""
        self.exit(USAGE_ERROR, f"error: {message}; see {self.prog} --help\n")


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
        # torch has no types of their own for a full main memory and for a loader process that died
        if "DefaultCPUAllocator" in str(error):
            return _fail(_out_of_memory(error), FAILURE)
        if not str(error).startswith("DataLoader worker"):
            raise
        return _fail(f"{_one_line(error).rstrip('.')}; memory may have run out: use fewer --workers, or 0", FAILURE)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot use file{where}: {error.strerror or _one_line(error)}", FAILURE)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
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
    return f"out of memory ({_one_line(error) or 'no details'}); lower --batch-size or use --amp bf16"


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


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


def make_deterministic(deterministic: bool) -> None:
    """Let torch refuse operations without a deterministic form, or, on a GPU, choose the fastest convolutions.

    Call it before the first CUDA operation: cuBLAS reads its setting only once.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
