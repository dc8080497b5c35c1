"""COCO-style JSON files: images, and annotations that give one category to each."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from numpy.typing import NDArray

from shike_fast._util.text import quoted
from shike_fast.data.datasets.archives import AGAIN, read_file
from shike_fast.data.datasets.lists import ListedImages, path_fault
from shike_fast.data.images.paths import PathTable
from shike_fast.errors import DataError

Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
T = TypeVar("T")


class _Image(Struct, gc=False):
    id: Id
    file_name: str


class _Annotation(Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id


class _Category(Struct, gc=False):
    id: Id
    name: str


class _File(Struct):
    # Undecoded: the parts are taken one after the other, so that no two of them are objects at the same time.
    images: Raw
    annotations: Raw
    categories: Raw = Raw()


class _Categories(Struct):
    categories: list[_Category]


def read_images(path: Path, names: tuple[str, ...] | None = None) -> tuple[ListedImages, tuple[str, ...]]:
    """Read the images of a file, in its order, and join them with their annotations by the image's id.

    Args:
        path: the file.
        names: of the categories, for a file that has none; None: it must have some.

    Returns:
        The images, and the names of the categories by id.

    Raises:
        DataError: the file is damaged, an id occurs twice, is unknown or missing, or a category is out of range.
    """
    with _mapped(path) as buffer:
        file = _decode(path, "", buffer, _File)
        if memoryview(file.categories).nbytes:
            names = _names(path, _decode(path, "categories", file.categories, list[_Category]))
        if names is None:
            raise DataError(f"{path}: has no 'categories'; {AGAIN}")
        ids, paths = _read_paths(path, _decode_and_drop(path, "images", buffer, file.images, list[_Image]))
        records = _decode_and_drop(path, "annotations", buffer, file.annotations, list[_Annotation])
        labels = _join(path, records, ids, len(names))
        # Raw parts look into the mapped file, which can be closed without them only.
        del file
    return ListedImages(path, paths, labels), names


def read_categories(path: Path) -> tuple[str, ...]:
    """The names of a file of categories by id: a list of them, or an object that has such a list.

    Raises:
        DataError: the file is damaged, or the ids are not 0 … C-1.
    """
    content = read_file(path)
    if content.lstrip()[:1] == b"{":
        return _names(path, _decode(path, "", content, _Categories).categories)
    return _names(path, _decode(path, "", content, list[_Category]))


def _names(path: Path, categories: list[_Category]) -> tuple[str, ...]:
    """Names in the order of ids, which must be 0 … C-1."""
    if not categories:
        raise DataError(f"{path}: 'categories' is empty; {AGAIN}")
    ordered = sorted(categories, key=lambda category: category.id)
    for label, category in enumerate(ordered):
        if category.id != label:
            fault = f"{category.id} occurs twice" if category.id == label - 1 else f"{label} is missing"
            if category.id < 0:
                fault = f"{category.id} is negative"
            raise DataError(f"{path}: expected the category ids 0 … {len(ordered) - 1}, but {fault}; {AGAIN}")
    return tuple(category.name for category in ordered)


def _read_paths(path: Path, records: list[_Image]) -> tuple[NDArray[np.int64], PathTable]:
    if not records:
        raise DataError(f"{path}: 'images' is empty; {AGAIN}")
    ids = np.fromiter((record.id for record in records), np.int64, len(records))
    twice = _repeated(ids)
    if twice is not None:
        raise DataError(f"{path}: two images have the id {twice}; {AGAIN}")
    for record in records:
        name = record.file_name.encode()
        if (fault := path_fault(name)) is not None:
            raise DataError(
                f"{path}: image {record.id}: the file_name {quoted(name)} {fault}, where one below the data folder is "
                f"expected; {AGAIN}"
            )
    return ids, PathTable(record.file_name for record in records)


def _join(path: Path, records: list[_Annotation], image_ids: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """The label of each image."""
    targets = np.fromiter((record.image_id for record in records), np.int64, len(records))
    categories = np.fromiter((record.category_id for record in records), np.int64, len(records))
    order = np.argsort(image_ids, kind="stable")
    places = order[np.minimum(np.searchsorted(image_ids, targets, sorter=order), len(order) - 1)]
    unknown = np.flatnonzero(image_ids[places] != targets)
    if len(unknown):
        record = records[unknown[0]]
        raise DataError(f"{path}: annotation {record.id} is of image {record.image_id}, which is unknown; {AGAIN}")
    twice = _repeated(targets)
    if twice is not None:
        raise DataError(f"{path}: image {twice} has two annotations, expected one; {AGAIN}")
    labels = np.full(len(image_ids), -1, np.int64)
    wrong = np.flatnonzero((categories < 0) | (categories >= num_classes))
    if len(wrong):
        record = records[wrong[0]]
        raise DataError(
            f"{path}: annotation {record.id} gives image {record.image_id} the category {record.category_id}, "
            f"expected 0 … {num_classes - 1}; {AGAIN}"
        )
    labels[places] = categories
    without = np.flatnonzero(labels < 0)
    if len(without):
        raise DataError(f"{path}: image {image_ids[without[0]]} has no annotation, expected one; {AGAIN}")
    return labels


def _repeated(ids: NDArray[np.int64]) -> int | None:
    """A number that occurs twice."""
    ordered = np.sort(ids)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    return int(ordered[twice[0]]) if len(twice) else None


def _decode(path: Path, part: str, content: Raw | bytes | mmap.mmap, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        where = f" in '{part}'" if part else ""
        raise DataError(f"{path}: damaged or not in COCO's form{where} ({error}); {AGAIN}") from error


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, of which only what is looked at takes memory."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                yield b""  # nothing can be mapped
                return
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        yield content
    finally:
        with contextlib.suppress(BufferError):  # an error on its way holds parts of it; they close it later
            content.close()


def _decode_and_drop(path: Path, part: str, buffer: mmap.mmap | bytes, content: Raw, kind: type[T]) -> T:
    """Decode a part of a mapped file, then let the system take back the memory of what was looked at."""
    decoded = _decode(path, part, content, kind)
    if isinstance(buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        buffer.madvise(mmap.MADV_DONTNEED)
    return decoded
