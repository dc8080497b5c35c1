"""Checkpoints that survive a kill at any moment.

A file is written under a temporary name, flushed to the disk and renamed, so a reader sees the old file or the new one,
never a part. The last checkpoint but one stays as ``last.previous.pt``. Reading checks the CRC of every record first
and never executes a pickle (``weights_only=True``).
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shike_fast.errors import CheckpointError

FORMAT = 1
LAST = "last.pt"
BEST = "best.pt"


def atomic_write(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that after a crash it holds the old content or the new, whole."""
    temporary = temporary_of(path)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def save_checkpoint(state: dict[str, Any], path: Path, *, keep_previous: bool = True) -> None:
    """Write ``state`` to ``path``.

    At every moment ``path`` or, with ``keep_previous``, its predecessor is a whole checkpoint.

    Args:
        state: tensors and plain Python values only (what ``torch.load(weights_only=True)`` accepts).
        path: the checkpoint file.
        keep_previous: keep the replaced file as ``<stem>.previous.pt``.
    """
    temporary = temporary_of(path)
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    if keep_previous and path.exists():
        _link(path, previous_of(path))
    os.replace(temporary, path)
    _sync_directory(path.parent)


def previous_of(path: Path) -> Path:
    """Where :func:`save_checkpoint` keeps the file that ``path`` replaced."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, holds anything but tensors and plain values, or is no
            checkpoint of this library.
    """
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path} does not exist; name an existing file such as RUN/{LAST} or RUN/{BEST}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"checkpoint {path} is damaged (wrong CRC in record {damaged}); use another checkpoint"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or truncated ({_first_line(error)}); use another checkpoint"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors and plain values, loading it could execute code"
        ) from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise CheckpointError(f"{path} is no checkpoint of shike_fast; for plain weights use --pretrained")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, this version of shike_fast reads format {FORMAT}; "
            "use the version that wrote it"
        )
    return state


def find_resumable(
    directory: Path, warn: Callable[[str], object] = warnings.warn
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run directory, or None if there never was one.

    Falls back to the previous checkpoint where the newest is missing or damaged, and says so to ``warn``.

    Raises:
        CheckpointError: if there are checkpoints but none can be read.
    """
    if not has_checkpoint(directory):
        return None
    last = directory / LAST
    try:
        return last, load_checkpoint(last)
    except CheckpointError as error:
        previous = previous_of(last)
        if not previous.exists():
            raise
        state = load_checkpoint(previous)
        warn(f"{error}; going on from {previous}")
        return previous, state


def has_checkpoint(directory: Path) -> bool:
    """Whether a run in ``directory`` ever saved its state."""
    return (directory / LAST).exists() or previous_of(directory / LAST).exists()


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files of a write that was cut short."""
    for path in directory.glob(".*.tmp"):
        path.unlink()


def _link(path: Path, target: Path) -> None:
    """Make ``target`` another name of the file at ``path``, which stays where it is throughout."""
    temporary = temporary_of(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, target)


def temporary_of(path: Path) -> Path:
    """Where a write to ``path`` begins: one fixed name, so that a killed write leaves at most one file behind."""
    return path.with_name(f".{path.name}.tmp")


def _sync_directory(directory: Path) -> None:
    # the rename itself is durable only once the directory is
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
