"""What the forms of a user's own data have in common: files by pattern, columns by name, labels of any kind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from shike_fast._util.options import option
from shike_fast._util.text import printable
from shike_fast.data.augment.photo import photo_augmentations
from shike_fast.data.datasets.lists import path_fault
from shike_fast.data.datasets.validation import SplitOptions
from shike_fast.data.recipes import PHOTOGRAPHS
from shike_fast.data.types import DatasetInfo
from shike_fast.errors import DataError

PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What people call the parts of a data set; where there is both, val goes before test."""

_LABEL_COLUMNS = (
    "label labels class classes classname classlabel labelname category categories categoryname target species y "
    "classid labelid categoryid diagnosis finelabel"
).split()
_SHOWN = 20  # columns, or files, that an error names
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0+)?")  # "3.0" is what becomes of 3 in a column with gaps


@dataclass(frozen=True, kw_only=True)
class FileOptions(SplitOptions):
    """Which files hold the images of a data set, or name them, and what in them does."""

    files: str | None = option(
        None,
        "the files of the training images, as a pattern below --data-dir, such as 'train-*.tar' or labels.csv",
        metavar="PATTERN",
        default_text="by their names",
    )
    val_files: str | None = option(
        None,
        "those of the validation images",
        metavar="PATTERN",
        default_text="by their names",
    )
    image_column: str | None = option(
        None,
        "column of the images or their paths; of WebDataset the extension, such as jpg",
        metavar="NAME",
        default_text="guessed",
    )
    label_column: str | None = option(
        None,
        "column of the labels; of WebDataset the extension, such as cls, or the key in .json",
        metavar="NAME",
        default_text="guessed",
    )


def own_images(name: str, form: str, how_obtained: str, options: type[SplitOptions]) -> DatasetInfo:
    """The description of a kind of a user's own images: they differ in how they are kept, in nothing else.

    Args:
        name: on the command line.
        form: how they are kept, the end of the description.
        how_obtained, options: as in the description.
    """
    return DatasetInfo(
        name=name,
        description=f"your own images, 224x224 colour crops, {form}",
        how_obtained=how_obtained,
        default_imbalance_factor=None,
        augmentations=photo_augmentations("rrc"),
        resizable=True,
        recipe=PHOTOGRAPHS,
        options=options,
    )


def find_parts(root: Path, endings: Sequence[str], options: FileOptions, what: str) -> tuple[list[Path], list[Path]]:
    """The files of the training images and those of the validation images, if any; each in alphabetical order.

    Without patterns, the names of the files and of their folders tell them apart (:data:`PARTS`); files that say
    nothing are for training where none says so.

    Args:
        root: the data folder.
        endings: of their names, in small letters.
        options: the patterns.
        what: what an error calls such a file.

    Raises:
        DataError: there are none, or they cannot be told apart.
    """
    if options.files is not None or options.val_files is not None:
        val = [] if options.val_files is None else _matching(root, "--val-files", options.val_files)
        if options.files is not None:
            train = _matching(root, "--files", options.files)
        else:
            train = [path for path in _all(root, endings) if path not in val]
        both = sorted(set(train) & set(val))
        if both:
            raise DataError(f"--val-files: {both[0]} is one of --files as well; name each file once")
        if not train:
            raise DataError(f"{root}: holds no {what} beside those of --val-files")
        return train, val
    found: dict[str | None, list[Path]] = {}
    for path in _all(root, endings):
        found.setdefault(part_of(path.relative_to(root)), []).append(path)
    if not found:
        raise DataError(f"{root}: holds no {what} ({', '.join(endings)}); name the files with --files")
    val = found.get("val") or found.get("test") or []
    train = found.get("train") or found.get(None) or []
    if not train or ("train" in found and None in found):
        odd = found.get(None) or val
        raise DataError(
            f"{root}: which {what} holds the training images? There is {_some(p.relative_to(root) for p in odd)}; name "
            "them with --files, and those of the validation images with --val-files"
        )
    return train, val


def part_of(path: PurePath) -> str | None:
    """Which part of a data set a file's name, or else a folder's, speaks of; None: neither does."""
    for name in reversed(path.parts):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in PARTS:
                return PARTS[word]
    return None


def _all(root: Path, endings: Sequence[str]) -> list[Path]:
    """Every file below a folder that ends so; hidden ones and those in hidden folders are passed over."""
    found = []
    for directory, folders, names in os.walk(root, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(directory, name) for name in names if name.lower().endswith(tuple(endings)) and name[0] != "."]
    return sorted(path for path in found if path.is_file())


def _fail(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror or error})") from error


def _matching(root: Path, flag: str, pattern: str) -> list[Path]:
    if (fault := path_fault(os.fsencode(pattern))) is not None:
        raise DataError(f"{flag}: {pattern!r} {fault}, where a pattern below --data-dir is expected")
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    if not found:
        folder = " (a folder has that name)" if (root / pattern).is_dir() else ""
        raise DataError(f"{flag}: no file in {root} matches {pattern!r}{folder}")
    return found


def _some(names: Iterable[object]) -> str:
    shown = [printable(os.fsencode(str(name))) for name in names]
    more = f" and {len(shown) - _SHOWN:,} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def choose_column(
    columns: Sequence[str],
    wanted: str | None,
    source: object,
    *,
    usual: Sequence[str] = _LABEL_COLUMNS,
    what: str = "labels",
    flag: str = "--label-column",
) -> int:
    """The number of the column that is named, or of the only one with a usual name.

    Args:
        columns: what they are called.
        wanted: the name; None to guess.
        source: the file.
        usual: names that it may have, in small letters and without what lies between the words.
        what: what it holds.
        flag: the option that names it.

    Raises:
        DataError: there is none, or more than one; the message lists the columns.
    """
    if wanted is not None:
        found = [i for i, name in enumerate(columns) if name == wanted]
        found = found or [i for i, name in enumerate(columns) if _plain(name) == _plain(wanted)]
        reason = f"{'two columns are' if found else 'no column is'} called {wanted!r}"
    else:
        found = usual_columns(columns, usual)
        reason = f"{'more than one column may hold' if found else 'no column has a usual name for'} the {what}"
    if len(found) == 1:
        return found[0]
    raise DataError(f"{source}: {reason}; name one with {flag}, there is {_some(columns)}")


def usual_columns(columns: Sequence[str], usual: Sequence[str]) -> list[int]:
    """The numbers of the columns that have one of the usual names."""
    return [i for i, name in enumerate(columns) if _plain(name) in usual]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


@dataclass(frozen=True)
class Classes:
    """Labels of any kind as classes.

    Attributes:
        names: one a class, in class-id order.
        train, val: int64, the class of every image.
        notes: what is to be said of them.
    """

    names: tuple[str, ...]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    notes: tuple[str, ...] = ()


def number_classes(train: Sequence[str], val: Sequence[str], source: object) -> Classes:
    """Number the classes that occur among the training images.

    Labels that are all whole numbers are put in the order of the numbers, others in that of the alphabet. A label is
    the name of its class.

    Args:
        train, val: a label an image.
        source: what an error calls the data.

    Raises:
        DataError: there is one class alone, or a class has validation images and none to train on.
    """
    if not train:
        raise DataError(f"{source}: has no training images")
    distinct = set(train)
    numbers: dict[str, int] | None = None
    if all(_WHOLE_NUMBER.fullmatch(label) for label in distinct.union(val)):
        numbers = {label: int(label.partition(".")[0]) for label in distinct.union(val)}
        train, val = ([str(numbers[label]) for label in part] for part in (train, val))
        distinct = set(train)
    names = sorted(distinct) if numbers is None else sorted(distinct, key=int)
    if len(names) < 2:
        raise DataError(f"{source}: holds one class, {_shown(names[0])}; there must be two or more")
    ids = {name: number for number, name in enumerate(names)}
    for label in val:
        if label not in ids:
            raise DataError(
                f"{source}: the class {_shown(label)} has validation images and none to train on; add some, or remove "
                "those"
            )
    notes: tuple[str, ...] = ()
    if numbers is not None and names != [str(number) for number in range(len(names))]:
        notes = (
            f"labels are {len(names):,} of the numbers {names[0]} to {names[-1]}: classes are numbered 0 to "
            f"{len(names) - 1} in their order, and keep the label as name",
        )
    of_train, of_val = (np.array([ids[label] for label in part], dtype=np.int64) for part in (train, val))
    return Classes(tuple(map(_shown, names)), of_train, of_val, notes)


def _shown(label: str) -> str:
    return printable(os.fsencode(label))


def name_classes(train: NDArray[np.int64], val: NDArray[np.int64], names: Sequence[str], source: object) -> Classes:
    """Number anew the classes that occur among the training images, of labels that are numbers of names.

    Args:
        train, val: int64, the label of every image, below the number of names.
        names: what they mean.
        source: what an error calls the data.

    Raises:
        DataError: as :func:`number_classes`.
    """
    present = np.flatnonzero(np.bincount(train, minlength=len(names)))
    if len(present) == 0:
        raise DataError(f"{source}: has no training images")
    if len(present) == 1:
        raise DataError(f"{source}: holds one class, {_shown(names[present[0]])}; there must be two or more")
    lacking = np.setdiff1d(val, present)
    if len(lacking):
        raise DataError(
            f"{source}: the class {_shown(names[lacking[0]])} has validation images and none to train on; add some, or "
            "remove those"
        )
    notes: tuple[str, ...] = ()
    if len(present) < len(names):
        notes = (f"{len(names) - len(present):,} of {len(names):,} classes have no images and are left out",)
    train, val = (np.searchsorted(present, part).astype(np.int64) for part in (train, val))
    return Classes(tuple(_shown(names[label]) for label in present.tolist()), train, val, notes)
