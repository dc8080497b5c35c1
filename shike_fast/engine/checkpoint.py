"""Checkpoints that survive a kill at any moment.

They are written as :mod:`shike_fast._util.files` writes files. The last checkpoint but one stays as
``last.previous.pt``. Reading checks the CRC of every record first and never executes a pickle (``weights_only=True``).
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shike_fast._util.files import naming, replacing
from shike_fast.errors import CheckpointError

FORMAT = 1
LAST = "last.pt"
BEST = "best.pt"


def save_checkpoint(state: dict[str, Any], path: Path, *, keep_previous: bool = True) -> None:
    """Write ``state`` to ``path``.

    At every moment ``path`` or, with ``keep_previous``, its predecessor is a whole checkpoint.

    Args:
        state: tensors and plain Python values only (what ``torch.load(weights_only=True)`` accepts).
        path: the checkpoint file.
        keep_previous: keep the replaced file as ``<stem>.previous.pt``.
    """
    with replacing(path, keep_previous_as=previous_of(path) if keep_previous else None) as file, naming(path):
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides it behind an error of its archive writer
                raise error.__context__ from error
            raise


def previous_of(path: Path) -> Path:
    """Where :func:`save_checkpoint` keeps the file that ``path`` replaced."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: the file.
        to_resume: it must hold the state of a run, not just a model.

    Raises:
        CheckpointError: if the file is missing, damaged, holds anything but tensors and plain values, or is no
            checkpoint of this library.
    """
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder; name the file, such as {path / LAST}")
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
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error.strerror or _first_line(error)}); see to the file and its disk"
        ) from error
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        if "DefaultCPUAllocator" in str(error):
            raise  # the memory's fault, not the file's
        raise CheckpointError(
            f"checkpoint {path} is damaged or truncated ({_first_line(error)}); use another checkpoint"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors and plain values, loading it could execute code"
        ) from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise CheckpointError(f"{path} is no checkpoint of shike_fast, which {LAST} and {BEST} of a run are")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, this version of shike_fast reads format {FORMAT}; "
            "use the version that wrote it"
        )
    _check_content(state, path, to_resume)
    return state


_MODEL_CONTENT = {
    "config": dict,
    "data": dict,
    "model_description": dict,
    "model": dict,
    "stage": int,
    "epoch": int,
}
_RUN_CONTENT = {"batch": int, "sums": list, "optimizer": dict, "scaler": dict, "history": list, "rng": dict}


def _check_content(state: dict[str, Any], path: Path, to_resume: bool) -> None:
    if to_resume and "optimizer" not in state:
        raise CheckpointError(
            f"checkpoint {path} holds a model but no training state; resume from {LAST}, use {path.name} with "
            "shike_fast.evaluate"
        )
    for name, kind in (_MODEL_CONTENT | _RUN_CONTENT if to_resume else _MODEL_CONTENT).items():
        if not isinstance(state.get(name), kind):
            got = type(state[name]).__name__ if name in state else "nothing"
            raise CheckpointError(
                f"checkpoint {path} is incomplete: {name} must be {kind.__name__}, got {got}; use another checkpoint"
            )


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
        return last, load_checkpoint(last, to_resume=True)
    except CheckpointError as error:
        previous = previous_of(last)
        if not previous.exists():
            raise
        state = load_checkpoint(previous, to_resume=True)
        warn(f"{error}; going on from {previous}")
        return previous, state


def has_checkpoint(directory: Path) -> bool:
    """Whether a run in ``directory`` ever saved its state."""
    return (directory / LAST).exists() or previous_of(directory / LAST).exists()


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files of a write that was cut short."""
    for path in directory.glob(".*.tmp"):
        path.unlink()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
