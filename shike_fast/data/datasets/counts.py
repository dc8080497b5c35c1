"""The check of what was read against the counts that a data set, or a generated one, states."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from shike_fast.data.datasets.archives import AGAIN, read_file
from shike_fast.data.types import Counts, DatasetInfo
from shike_fast.errors import DataError

SYNTHETIC_FILE = "synthetic.json"  # in the folder of a generated set: its own counts


class GeneratedSet(msgspec.Struct, frozen=True, kw_only=True):
    """What a generated set says of itself.

    Attributes:
        like: name of the data set whose form it has.
        classes, images: as in :class:`Counts`.
        generated: for readers of the file.
    """

    like: str
    classes: int
    images: dict[str, int]
    generated: bool = True


def expected_counts(info: DatasetInfo, folder: Path) -> Counts | None:
    """The counts of a data set, or those of the generated set in ``folder``; None where any counts will do.

    Raises:
        DataError: the file that describes the generated set is damaged or belongs to another data set.
    """
    path = folder / SYNTHETIC_FILE
    if info.counts is None or not path.exists():
        return info.counts
    try:
        generated = msgspec.json.decode(read_file(path), type=GeneratedSet)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{path}: does not describe a generated data set ({error}); generate the set again") from error
    if generated.like != info.name:
        raise DataError(f"{path}: {folder} holds a generated set like {generated.like}; use --dataset {generated.like}")
    if generated.classes < 2 or not {"train", "test"} <= generated.images.keys():
        raise DataError(
            f"{path}: does not describe a generated data set (2 classes or more, counts of train and test expected); "
            "generate the set again"
        )
    return Counts(generated.classes, generated.images, kind="generated")


def check_count(counts: Counts, split: str, found: int, source: Path) -> None:
    """Raise DataError unless ``source`` holds as many images as the split has."""
    expected = counts.images.get(split, found)
    if found != expected:
        raise DataError(
            f"{source}: expected {expected:,} images ({counts.kind}), got {found:,}; "
            f"{AGAIN}, or accept it as it is with --no-verify"
        )


def check_classes(counts: Counts, labels: NDArray[np.int64], source: Path) -> None:
    """Raise DataError if a class has no training image."""
    missing = np.flatnonzero(np.bincount(labels, minlength=counts.classes) == 0)
    if len(missing):
        raise DataError(
            f"{source}: expected images of {counts.classes:,} classes ({counts.kind}), got none of class {missing[0]}; "
            f"{AGAIN}, or accept it as it is with --no-verify"
        )
