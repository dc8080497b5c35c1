"""Images that are in a data set more than once, by their content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shike_fast._util.cli import cores
from shike_fast._util.progress import progress
from shike_fast._util.resources import is_lacking, lacking
from shike_fast.data.images.arrays import ArrayDataset
from shike_fast.data.images.decode import BrokenImageError
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.stores import ImageStore, files_of, open_regular
from shike_fast.data.types import BatchSource, LongTailData

TRAINING, TEST = "training", "test"

_END = 4096  # bytes at the end of a file, in which files of one size nearly always differ
_CHUNK = 64  # images that a thread takes at a time

Key = Callable[[int], Hashable]  # of an image by number; raises OSError or BrokenImageError where it cannot be read
KeyOf = Callable[[BatchSource], Key | None]  # for the images of a part; None where there is none


@dataclass(frozen=True)
class Copy:
    """One of several images with the same content.

    Attributes:
        part: ``"training"`` or ``"test"``.
        index: its number there.
        label: its class.
        name: its file, or what else tells it.
    """

    part: str
    index: int
    label: int
    name: str


@dataclass(frozen=True)
class Duplicates:
    """Images with the same content.

    Attributes:
        groups: the images of each content that there is more than once, training images first.
        unreadable: images that could not be compared, because they are missing, empty or unreadable.
    """

    groups: tuple[tuple[Copy, ...], ...]
    unreadable: int

    @property
    def superfluous(self) -> int:
        """Images that would have to go for every content to be once in training and once in the test."""
        return sum(max(0, n - 1) for group in self.groups for n in (_of(group, TRAINING), _of(group, TEST)))

    @property
    def repeated(self) -> tuple[tuple[Copy, ...], ...]:
        """The groups that have more than one image of the same part."""
        return tuple(group for group in self.groups if _of(group, TRAINING) > 1 or _of(group, TEST) > 1)

    @property
    def leaked(self) -> int:
        """Test images that are training images as well."""
        return sum(_of(group, TEST) for group in self.leaking)

    @property
    def leaking(self) -> tuple[tuple[Copy, ...], ...]:
        """The groups of which some are training and some are test images."""
        return tuple(group for group in self.groups if _of(group, TRAINING) and _of(group, TEST))

    @property
    def contradictory(self) -> tuple[tuple[Copy, ...], ...]:
        """The groups whose images have different labels."""
        return tuple(group for group in self.groups if len({copy.label for copy in group}) > 1)


def _of(group: tuple[Copy, ...], part: str) -> int:
    return sum(copy.part == part for copy in group)


def find_duplicates(data: LongTailData) -> Duplicates | None:
    """Compare all images of a data set by the SHA-256 of their content; None where they cannot be compared.

    Files are compared by size first. Of those of one size the last 4 KiB are read, and whole files only where these are
    the same. Other encoded images are all read once. Images in memory are compared as pixels.

    Args:
        data: the data set, of image files, of images in another store, or in memory.
    """
    border = len(data.train)
    in_files = _in_files(data.train) and _in_files(data.test)
    groups = [list(range(border + len(data.test)))]
    unreadable = 0
    for what, key_of in _FILE_ROUNDS if in_files else _CONTENT_ROUNDS:
        train, test = key_of(data.train), key_of(data.test)
        if train is None or test is None:
            return None
        groups, lost = _refined(groups, _joined(train, test, border), what, cores() if in_files else 1)
        unreadable += lost
    return Duplicates(tuple(tuple(_copy(data, image) for image in group) for group in groups), unreadable)


def _joined(train: Key, test: Key, border: int) -> Key:
    """The key of an image whose number is that in training, or beyond ``border`` that in the test."""
    return lambda image: train(image) if image < border else test(image - border)


def _in_files(part: BatchSource) -> bool:
    return isinstance(part, ImageDataset) and files_of(part.store) is not None


def _of_file(read: Callable[[str], Hashable]) -> KeyOf:
    """What a file's name gives, for the images of a part."""

    def key_of(part: BatchSource) -> Key | None:
        name = part.store.name if isinstance(part, ImageDataset) else None
        return None if name is None else lambda index: read(name(index))

    return key_of


def _size(path: str) -> int:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise BrokenImageError("is empty, or no regular file")
    return status.st_size


def _end(path: str) -> bytes:
    with open_regular(path) as file:
        file.seek(-min(_END, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read()


def _digest(path: str) -> bytes:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content(part: BatchSource) -> Key | None:
    """SHA-256 of an image as it is kept, encoded or as pixels."""
    if isinstance(part, ImageDataset):
        store = part.store
        return lambda index: _stored(store, index)
    if isinstance(part, ArrayDataset):
        images = part.images
        return lambda index: hashlib.sha256(images[index].tobytes()).digest()
    return None


def _stored(store: ImageStore, index: int) -> bytes:
    data = store.read(index)
    if data is None:
        pixels = store.open(index).pixels()
        return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).digest()
    if len(data) == 0:
        raise BrokenImageError("is empty")
    return hashlib.sha256(data).digest()


_FILE_ROUNDS: tuple[tuple[str, KeyOf], ...] = (
    ("comparing sizes of files", _of_file(_size)),
    ("comparing ends of files", _of_file(_end)),
    ("comparing files", _of_file(_digest)),
)
_CONTENT_ROUNDS: tuple[tuple[str, KeyOf], ...] = (("comparing images", _content),)


def _refined(groups: list[list[int]], key: Key, what: str, threads: int) -> tuple[list[list[int]], int]:
    """Part groups of images by a further key; images that are alone then, or cannot be read, leave.

    Returns:
        The groups, and how many images could not be read.
    """
    members = [(number, image) for number, group in enumerate(groups) for image in group]
    parted: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
    with progress(what, len(members)) as advance:
        for (number, image), value in zip(members, _keys(key, [image for _, image in members], threads), strict=True):
            parted[number, value].append(image)
            advance(1)
    lost = sum(len(group) for (_, value), group in parted.items() if value is None)
    return [group for (_, value), group in parted.items() if value is not None and len(group) > 1], lost


def _keys(key: Key, images: list[int], threads: int) -> Iterator[Hashable]:
    """The key of each image in order, None where it cannot be read."""

    def of_chunk(start: int) -> list[Hashable]:
        return [_key(key, image) for image in images[start : start + _CHUNK]]

    starts = range(0, len(images), _CHUNK)
    if threads == 1:
        for start in starts:
            yield from of_chunk(start)
        return
    pool = ThreadPoolExecutor(threads)  # which wait for the disk and for hashes, both without Python's lock
    try:
        for chunk in pool.map(of_chunk, starts):
            yield from chunk
    finally:
        pool.shutdown(cancel_futures=True)


def _key(key: Key, image: int) -> Hashable:
    try:
        return key(image)
    except BrokenImageError:
        return None
    except OSError as error:
        if is_lacking(error):
            raise lacking("cannot compare images", error) from error
        return None


def _copy(data: LongTailData, image: int) -> Copy:
    border = len(data.train)
    part, dataset, index = (TRAINING, data.train, image) if image < border else (TEST, data.test, image - border)
    name = dataset.store.name(index) if isinstance(dataset, ImageDataset) else f"{part} image {index}"
    return Copy(part, index, int(dataset.labels[index]), name)
