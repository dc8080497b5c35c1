"""A data set of image files in a few large ones: reading and checking a pack.

:mod:`shike_fast.data.pack.writer` writes it.
``load_dataset(name, data_dir=PACK)`` reads the images from memory maps: no system call for an image, no file for each.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from shike_fast._util.options import options_of
from shike_fast.data.images.decode import BrokenImageError, Picture, RawPicture, plain_jpeg, unreadable
from shike_fast.data.images.files import ImagePart, build_images
from shike_fast.data.pack.format import (
    AGAIN,
    MANIFEST,
    PARTS,
    UNFINISHED,
    VERSION,
    FileRecord,
    Index,
    LeftOut,
    Manifest,
    PartRecord,
    Split,
    decode_json,
    index_name,
    shard_name,
)
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, ValidationSplit, check_labels
from shike_fast.errors import DataError, warn


def is_pack(folder: Path) -> bool:
    """Whether a folder holds a pack, finished or not, or what is left of one."""
    return any((folder / name).is_file() for name in (MANIFEST, UNFINISHED, shard_name(PARTS[0], 0)))


def read_manifest(folder: Path) -> Manifest:
    """What a pack says of itself.

    Raises:
        DataError: it is unfinished, of another version, or its description is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file() and not (folder / UNFINISHED).is_file():
        raise DataError(f"{folder}: a pack without its {MANIFEST}; {AGAIN}")
    if not path.is_file():
        raise DataError(f"{folder}: an unfinished pack; repeat the command that makes it, which resumes the work")
    content = _read(path)
    try:
        version = decode_json(content, dict)["version"]
        manifest = decode_json(content, Manifest) if version == VERSION else None
        for image in [] if manifest is None else (*manifest.train.left_out, *manifest.test.left_out):
            os.fsencode(image.name + image.reason)  # what is to be printed one day can be
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: does not describe a pack ({error}); {AGAIN}") from error
    if manifest is None:
        raise DataError(f"{path}: a pack of version {version}, expected {VERSION}; pack the data set again")
    for part, record in zip(PARTS, (manifest.train, manifest.test), strict=True):
        names = [index_name(part), *(shard_name(part, i) for i in range(len(record.shards)))]
        for name, file in zip(names, (record.index, *record.shards), strict=True):
            if file.name != name:
                raise DataError(f"{path}: does not describe a pack (a file {file.name}, expected {name}); {AGAIN}")
    return manifest


def open_parts(folder: Path, manifest: Manifest) -> tuple[PackStore, PackStore]:
    """The training and the test images of a pack, after a check of the indices and of the sizes of all files.

    Raises:
        DataError: a file is missing, not as large as it was, or not what the description says.
    """
    raw = manifest.settings.format == "raw"
    classes = len(manifest.class_names)
    train, test = (
        PackStore(folder, record, _read_index(folder, record, classes, raw=raw), raw=raw)
        for record in (manifest.train, manifest.test)
    )
    return train, test


def load_pack(info: DatasetInfo, options: LoadOptions, folder: Path) -> LongTailData:
    """Load a data set from a pack of it.

    Raises:
        DataError: it is a pack of another data set, was packed with other options, is unfinished or damaged.
    """
    manifest = read_manifest(folder)
    if manifest.settings.dataset != info.name:
        raise DataError(
            f"{folder}: a pack of {manifest.settings.dataset}, not of {info.name}; "
            f"use --dataset {manifest.settings.dataset} or another --data-dir"
        )
    _require_packed(folder, options.own, manifest.settings.options)
    train, test = open_parts(folder, manifest)
    split = manifest.settings.split
    for part, store in (("training", train), ("test", test)):
        if store.left_out:
            warn(
                f"{folder}: {len(store.left_out)} of {len(store.left_out) + len(store)} {part} images could not be "
                "read when it was packed, and are not in it; python -m shike_fast.data check names them"
            )
    return build_images(
        info,
        options,
        train=ImagePart(train, train.labels),
        test=ImagePart(test, test.labels),
        class_names=manifest.class_names,
        mean=manifest.mean,
        std=manifest.std,
        identity=(b"pack", *train.names.arrays, train.index.crc32),
        validation=None if split is None else _validation(split, test),
    )


def _require_packed(folder: Path, own: Any, packed: Mapping[str, Any]) -> None:
    """Refuse an option of the data set that the pack was not made with: it has the images that were chosen then."""
    for name, one in ({} if own is None else options_of(type(own))).items():
        wanted, there = getattr(own, name), packed.get(name, one.default)
        there = tuple(there) if isinstance(there, list) else there
        if wanted not in (one.default, there):
            made = f"with {there}" if name in packed else "without it"
            raise DataError(f"{one.label}: {folder} was packed {made}, not with {wanted}; leave it out, or pack anew")


def _validation(split: Split, test: PackStore) -> ValidationSplit:
    return ValidationSplit(split.share, split.seed, tuple(map(test.names.raw, range(len(test)))), split.whole)


class PackStore:
    """The images of one part of a pack, in memory maps of its shards.

    A shard is opened once in a process, when the first of its images is read.

    Attributes:
        labels: int64 [N].
        names: the images' names in the source.
        index: where they are.
        left_out: the images of the source that could not be read when the pack was made.
    """

    def __init__(self, folder: Path, record: PartRecord, index: Index, *, raw: bool) -> None:
        self.labels = index.label
        self.names = index.names
        self.index = index
        self.left_out: Sequence[LeftOut] = record.left_out
        self._folder = folder
        self._record = record
        self._raw = raw
        self._maps: dict[int, memoryview] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_maps": {}}  # another process opens its own

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return f"{self._folder / self._record.shards[self.index.shard[index]].name}: {self.names[index]}"

    def read(self, index: int) -> memoryview | None:
        return None if self._raw else self._content(index)

    def open(self, index: int) -> Picture:
        content = self._content(index)
        height, width = int(self.index.height[index]), int(self.index.width[index])
        if not self._raw:
            return plain_jpeg(content, width, height)
        pixels = np.frombuffer(content, np.uint8, offset=len(content) - 3 * height * width)
        return RawPicture(pixels.reshape(height, width, 3))

    def verify(self, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
        """Compare the SHA-256 of every file; yields the path of each that is not what it was, and why it is not.

        Args:
            advance: called with the number of images in each file that has been read.
        """
        images = np.bincount(self.index.shard, minlength=len(self._record.shards))
        for file, count in zip((self._record.index, *self._record.shards), (0, *images), strict=True):
            path = self._folder / file.name
            reason = _fault_of(path, file) or _changed(path, file)
            if reason is not None:
                yield str(path), reason
            advance(int(count))

    def _content(self, index: int) -> memoryview:
        shard = int(self.index.shard[index])
        offset = int(self.index.offset[index])
        archive = self._maps.get(shard)
        if archive is None:
            archive = self._maps[shard] = self._map(shard)
        content = archive[offset : offset + int(self.index.length[index])]
        if zlib.crc32(content) != self.index.crc32[index]:
            raise BrokenImageError(f"the bytes in {self._record.shards[shard].name} are damaged (wrong CRC-32)")
        return content

    def _map(self, shard: int) -> memoryview:
        file = self._record.shards[shard]
        path = self._folder / file.name
        try:
            with path.open("rb") as stream:
                # Reading beyond the end of a file that has shrunk would end the process.
                if os.fstat(stream.fileno()).st_size != file.bytes:
                    raise BrokenImageError(f"{file.name} is not the {file.bytes} bytes long that it was")
                return memoryview(mmap.mmap(stream.fileno(), file.bytes, access=mmap.ACCESS_READ))
        except OSError as error:
            raise unreadable(error, file.name) from error


def _read_index(folder: Path, record: PartRecord, classes: int, *, raw: bool) -> Index:
    path = folder / record.index.name
    for file in (record.index, *record.shards):
        reason = _fault_of(folder / file.name, file)
        if reason is not None:
            raise DataError(f"{folder / file.name}: {reason}")
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != record.index.sha256:
        raise DataError(f"{path}: damaged (its SHA-256 is not that of {MANIFEST}); {AGAIN}")
    try:
        index, _ = Index.decode(content)
    except ValueError as error:
        raise DataError(f"{path}: not the index of a pack ({error}); {AGAIN}") from error
    # A file of the right checksum may still have been written by another program: nothing may reach beyond a shard.
    bounds = index.name_bounds
    consistent = (
        {len(getattr(index, field.name)) for field in fields(Index)[:-2]} == {record.images} == {len(bounds) - 1}
        and (index.shard < len(record.shards)).all()
        and (index.offset >= 0).all()
        and (index.length > 0).all()
        and (index.width > 0).all()
        and (index.height > 0).all()
        and (np.diff(bounds) >= 0).all()
        and (bounds[0], bounds[-1]) == (0, len(index.name_bytes))
        # Neither sum nor product of what is in there may wrap around: length > 3 · width · height, for example.
        and (index.offset <= np.array([f.bytes for f in record.shards], np.int64)[index.shard] - index.length).all()
        and not (raw and ((index.length - 1) // 3 < index.width.astype(np.int64) * index.height).any())
    )
    if not consistent:
        raise DataError(f"{path}: does not fit the shards of the pack; {AGAIN}")
    check_labels(index.label, classes, str(path))
    return index


def _fault_of(path: Path, file: FileRecord) -> str | None:
    """Why a file cannot be what it was, as far as that is seen without reading it."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return _unreadable(error)
    return None if size == file.bytes else f"has {size} bytes, expected {file.bytes}; {AGAIN}"


def _changed(path: Path, file: FileRecord) -> str | None:
    """Why the content of a file is not what it was."""
    try:
        with path.open("rb", buffering=0) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return _unreadable(error)
    return None if digest == file.sha256 else f"damaged (SHA-256 {digest}, expected {file.sha256}); {AGAIN}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {_unreadable(error)}") from error


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error}); {AGAIN}"
