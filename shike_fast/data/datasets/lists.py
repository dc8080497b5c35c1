"""List files of the long-tailed data sets: one ``relative/path label`` a line."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shike_fast._util.text import quoted
from shike_fast.data.datasets.archives import AGAIN, read_file
from shike_fast.data.datasets.counts import check_classes, check_count, expected_counts
from shike_fast.data.images.paths import PathTable
from shike_fast.data.types import DatasetInfo, LoadOptions, require_data_dir
from shike_fast.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before the first line
_LARGEST = 10**6  # classes, where nothing says how many there are: more would only be a damaged file
_DIGITS = 10  # of a label


@dataclass(frozen=True)
class ListedImages:
    """Images that a file names, in its order.

    Attributes:
        source: the file.
        paths: where the images are, as the file says it, relative to some folder.
        labels: int64 [N].
    """

    source: Path
    paths: PathTable
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def read_list(path: Path, num_classes: int | None = None) -> ListedImages:
    """Read a list file: lines ``relative/path label``, where a path may hold spaces and any bytes but NUL.

    Args:
        path: the file.
        num_classes: C; labels are below it. None: any number from 0 is a label.

    Raises:
        DataError: the file cannot be read, is empty, or a line of it is not what it should be.
    """
    content = bytearray()
    bounds, labels = array("q", [0]), array("q")
    most = _LARGEST if num_classes is None else num_classes
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                fields = line.rsplit(None, 1)
                if not fields:
                    continue  # a blank line
                if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > _DIGITS:
                    raise DataError(
                        f"{path}: line {number}: expected 'relative/path label', got {quoted(line.rstrip())}; {AGAIN}"
                    )
                name, label = fields[0], int(fields[1])
                if label >= most:
                    raise DataError(f"{path}: line {number}: label {label} is outside 0 … {most - 1}; {AGAIN}")
                if (fault := path_fault(name)) is not None:
                    raise DataError(
                        f"{path}: line {number}: the path {quoted(name)} {fault}, where one below the data folder is "
                        f"expected; {AGAIN}"
                    )
                content += name
                bounds.append(len(content))
                labels.append(label)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not labels:
        raise DataError(f"{path}: names no images; {AGAIN}")
    table = PathTable.from_arrays(np.frombuffer(content, np.uint8), np.frombuffer(bounds, np.int64))
    return ListedImages(path, table, np.frombuffer(labels, np.int64))


class Lists(NamedTuple):
    """What the lists of a data set say.

    Attributes:
        train, test: the images.
        num_classes: C, the number that the data set states; without verification as many as occur.
    """

    train: ListedImages
    test: ListedImages
    num_classes: int


def read_lists(info: DatasetInfo, options: LoadOptions, *, train: str, test: str, val: str | None = None) -> Lists:
    """Read the list files of a data set and check them against its counts.

    Args:
        info: the data set.
        options: how it is loaded.
        train, test: names of the lists.
        val: name of a list that no part of this program uses: checked where it is there.

    Raises:
        DataError: a list is missing or damaged, or holds other numbers of images or classes.
    """
    root = require_data_dir(info, options)
    for name in (train, test):
        if not (root / name).exists():
            raise DataError(f"{info.name}: no {root / name}; {info.how_obtained}")
    counts = expected_counts(info, root)
    if not options.verify:
        counts = None
    known = None if counts is None else counts.classes
    train_images, test_images = (read_list(root / name, known) for name in (train, test))
    num_classes = known or max(2, *(int(images.labels.max()) + 1 for images in (train_images, test_images)))
    if counts is not None:
        check_count(counts, "train", len(train_images), root / train)
        check_classes(counts, train_images.labels, root / train)
        check_count(counts, "test", len(test_images), root / test)
        if val is not None and (root / val).exists():
            check_count(counts, "val", len(read_list(root / val, num_classes)), root / val)
    return Lists(train_images, test_images, num_classes)


def path_fault(name: bytes) -> str | None:
    """Why a path must not be used: it leads out of the data folder or is none at all; None where it may be used."""
    if not name.strip():
        return "is empty"
    if b"\0" in name:
        return "holds a NUL byte"
    if name.startswith(b"/"):
        return "is absolute"
    if b".." in name and b".." in name.split(b"/"):
        return "holds '..'"
    return None


def class_folders(
    images: ListedImages, num_classes: int, folder_of: Callable[[bytes], bytes | None]
) -> list[bytes | None]:
    """The folder of each class, as the paths of its training images have it; None where they have none.

    Args:
        images: the training images.
        num_classes: C.
        folder_of: the class folder in a path, or None.

    Raises:
        DataError: images of one class lie in several folders, or those of several classes in one.
    """
    folders: list[bytes | None] = [None] * num_classes
    for index, label in enumerate(images.labels.tolist()):
        path = images.paths.raw(index)
        folder = folder_of(path)
        if folder is None or folder == folders[label]:
            continue
        if folders[label] is not None:
            raise DataError(
                f"{images.source}: {quoted(path)} has label {label}, whose other images are in the folder "
                f"{quoted(folders[label] or b'')}; paths and labels do not belong together: {AGAIN}"
            )
        folders[label] = folder
    named = [folder for folder in folders if folder is not None]
    if len(set(named)) < len(named):
        folder = next(folder for folder in named if named.count(folder) > 1)
        twice = [label for label, other in enumerate(folders) if other == folder]
        raise DataError(
            f"{images.source}: the folder {quoted(folder)} holds images of label {twice[0]} and of label {twice[1]}; "
            f"paths and labels do not belong together: {AGAIN}"
        )
    return folders


def read_names(path: Path) -> list[str]:
    """The lines of a text file of class names, blank ones left out.

    Raises:
        DataError: it cannot be read.
    """
    text = read_file(path).removeprefix(BYTE_ORDER_MARK).decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()]
