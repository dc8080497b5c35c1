"""What the commands share: one-line errors, exit statuses and the choice of a device."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from shike_fast.errors import ConfigError, ShikeError

USAGE_ERROR = 2  # bad input: nothing was done
FAILURE = 1  # the work began and could not be finished


class ArgumentParser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print ``error: <message>`` and exit with status 2."""
        self.exit(USAGE_ERROR, f"error: {message}; see {self.prog} --help\n")


def run_command(command: Callable[[], int]) -> int:
    """Call ``command``; print an error meant for the user as one line and return its exit status.

    2 means bad input; anything else that went wrong with files or memory is 1. Faults of the library itself keep their
    traceback.
    """
    try:
        return command()
    except ShikeError as error:
        return _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail("stopped by SIGINT; nothing to save", 128 + signal.SIGINT)
    except torch.OutOfMemoryError as error:
        return _fail(f"out of device memory ({_one_line(error)}); lower --batch-size or use --amp bf16", FAILURE)
    except RuntimeError as error:
        if not str(error).startswith(
            "DataLoader worker"
        ):  # torch has no type of its own for a loader process that died
            raise
        return _fail(f"{_one_line(error).rstrip('.')}; memory may have run out: use fewer --workers, or 0", FAILURE)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot use file{where}: {error.strerror or _one_line(error)}", FAILURE)


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
