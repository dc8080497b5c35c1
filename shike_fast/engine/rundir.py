"""The directory of a run: made without overwriting anything, used by one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shike_fast._util.files import (
    HeldElsewhereError,
    append,
    atomic_write,
    lock,
    naming,
    temporary_of,
    why_not_writable,
)
from shike_fast.data.types import ValidationSplit
from shike_fast.engine.checkpoint import LAST
from shike_fast.errors import ConfigError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
VALIDATION = "validation.txt"
_LOCK = ".lock"


def default_directory(dataset: str, method: str) -> Path:
    """A directory under ``runs/`` that does not exist yet, named after the run and the time."""
    stem = f"{dataset}-{method}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path, copy = Path("runs") / stem, 1
    while path.exists():
        copy += 1
        path = Path("runs") / f"{stem}-{copy}"
    return path


def check_unused(path: Path, besides: Iterable[str] = ()) -> None:
    """Refuse a directory that holds anything, so that no run overwrites another, and one that cannot be written.

    Args:
        path: the directory, which need not exist.
        besides: names of what it may hold.

    Raises:
        ConfigError: if ``path`` is a file or a non-empty directory, or nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--output-dir: {path} is a file; name a directory")
    if (reason := why_not_writable(path)) is not None:
        raise ConfigError(f"--output-dir: cannot write to {path}: {reason}; name another")
    # a run that was killed before its first checkpoint leaves nothing but these
    leftovers = {_LOCK, temporary_of(path / LAST).name, *besides}
    try:
        used = path.is_dir() and any(entry.name not in leftovers for entry in path.iterdir())
    except OSError as error:
        raise ConfigError(f"--output-dir: cannot read {path}: {error.strerror}; name another") from error
    if used:
        raise ConfigError(
            f"--output-dir: {path} is not empty; add --resume to go on with the run in it, or name another"
        )


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[None]:
    """Create ``path`` and hold it for this process.

    Raises:
        ConfigError: if it cannot be created or another process is writing a run to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / _LOCK, "a")  # noqa: SIM115  (held over the yield below)
    except OSError as error:
        raise ConfigError(f"--output-dir: cannot write to {path}: {error.strerror}; name another") from error
    with file:
        try:
            lock(file)
        except HeldElsewhereError as error:
            raise ConfigError(
                f"--output-dir: another process is writing to {path}; wait for it or name another"
            ) from error
        yield


def sign(path: Path, launch: str) -> None:
    """Write into a directory that this process holds which launch it belongs to; :func:`signed_by` reads it."""
    with naming(path / _LOCK):
        (path / _LOCK).write_text(launch)


def signed_by(path: Path) -> str:
    """The launch that last wrote a run to the directory, "" for none that has a name."""
    try:
        return (path / _LOCK).read_text()
    except OSError:
        return ""


def write_config(path: Path, config: dict[str, Any], validation: ValidationSplit | None = None) -> None:
    """Write ``config.json`` and, where images were set aside for validation, ``validation.txt``: one name a line."""
    atomic_write(path / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    if validation is not None:
        atomic_write(path / VALIDATION, b"".join(name.replace(b"\n", b"\\n") + b"\n" for name in validation.names))


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Replace ``metrics.jsonl`` by the epochs that the checkpoint accounts for; a resumed run repeats later ones."""
    atomic_write(path / METRICS, b"".join(_line(row) for row in history))


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add the line of one epoch to ``metrics.jsonl``."""
    append(path / METRICS, _line(row))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs in ``metrics.jsonl``, none without that file; a last line that is there in part does not count."""
    try:
        lines = (path / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()
