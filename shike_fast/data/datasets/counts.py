"""How many images and classes the published data sets have, and the check of what was read against it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from shike_fast.data.datasets.archives import read_file
from shike_fast.errors import DataError

SYNTHETIC_FILE = "synthetic.json"  # in the folder of a generated set: its own counts


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a data set.

    Attributes:
        like: name of the data set.
        classes: number of classes.
        images: images of each split: "train", "test" and perhaps "val".
        generated: it is a generated set in the form of the published one.
    """

    like: str
    classes: int
    images: dict[str, int]
    generated: bool = False

    @property
    def kind(self) -> str:
        """Who says so."""
        return "generated" if self.generated else "published"


def _published(like: str, classes: int, **images: int) -> Counts:
    return Counts(like=like, classes=classes, images=images)


PUBLISHED: Mapping[str, Counts] = {
    counts.like: counts
    for counts in (
        _published("inat18", 8142, train=437_513, test=24_426),
        _published("imagenet-lt", 1000, train=115_846, val=20_000, test=50_000),
        _published("places-lt", 365, train=62_500, val=7_300, test=36_500),
    )
}


def expected_counts(name: str, folder: Path) -> Counts:
    """The published counts of data set ``name``, or those of the generated set in ``folder``.

    Raises:
        DataError: the file that describes the generated set is damaged or belongs to another data set.
    """
    path = folder / SYNTHETIC_FILE
    if not path.exists():
        return PUBLISHED[name]
    try:
        counts = msgspec.json.decode(read_file(path), type=Counts)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{path}: does not describe a generated data set ({error}); generate the set again") from error
    if counts.like != name:
        raise DataError(f"{path}: {folder} holds a generated set like {counts.like}; use --dataset {counts.like}")
    if counts.classes < 2 or not {"train", "test"} <= counts.images.keys():
        raise DataError(
            f"{path}: does not describe a generated data set (2 classes or more, counts of train and test expected); "
            "generate the set again"
        )
    return msgspec.structs.replace(counts, generated=True)


def check_count(counts: Counts, split: str, found: int, source: Path) -> None:
    """Raise DataError unless ``source`` holds as many images as the split has."""
    expected = counts.images.get(split, found)
    if found != expected:
        raise DataError(
            f"{source}: expected {expected:,} images ({counts.kind}), got {found:,}; "
            "obtain the file again, or accept it as it is with --no-verify"
        )


def check_classes(counts: Counts, labels: NDArray[np.int64], source: Path) -> None:
    """Raise DataError if a class has no training image."""
    missing = np.flatnonzero(np.bincount(labels, minlength=counts.classes) == 0)
    if len(missing):
        raise DataError(
            f"{source}: expected images of {counts.classes:,} classes ({counts.kind}), got none of class {missing[0]}; "
            "obtain the file again, or accept it as it is with --no-verify"
        )
