"""What the files of a pack are: its description, the index of its images, the archives they are in.

A pack is a folder::

    pack.json            what is packed, how, and the size and SHA-256 of every other file
    train.npz test.npz   one entry an image: where it is, its label, size, CRC-32 and original name
    train-00000.tar …    the images, ``LABEL/NUMBER.jpg``, or ``.ppm`` where they are kept decoded

docs/data.md describes it.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from shike_fast._util.text import printable
from shike_fast.data.images.paths import PathTable
from shike_fast.data.types import ValidationSplit

T = TypeVar("T")

VERSION = 1
MANIFEST = "pack.json"
UNFINISHED = "unfinished.json"
PARTS = ("train", "test")
EXTENSIONS = {"jpeg": "jpg", "raw": "ppm"}

AGAIN = "copy it again from where it is whole, or pack the data set again"


class FileRecord(msgspec.Struct, frozen=True):
    """What a file of the pack must be."""

    name: str
    bytes: int
    sha256: str


class LeftOut(msgspec.Struct, frozen=True):
    """An image that could not be read when the pack was made."""

    name: str
    reason: str

    @property
    def line(self) -> str:
        """What a message says of it."""
        return printable(os.fsencode(f"{self.name}: {self.reason}"))


class PartRecord(msgspec.Struct, frozen=True):
    """The training or the test part of a pack."""

    images: int
    index: FileRecord
    shards: list[FileRecord]
    left_out: list[LeftOut]


class Split(msgspec.Struct, frozen=True):
    """How the test images were set aside: see :class:`shike_fast.data.types.ValidationSplit`."""

    share: float
    seed: int
    whole: int

    @classmethod
    def of(cls, split: ValidationSplit) -> Split:
        """What a pack keeps of it: the names are in the index."""
        return cls(split.share, split.seed, split.whole)


class Settings(msgspec.Struct, frozen=True, omit_defaults=True):
    """What decides every byte of a pack.

    Attributes:
        dataset: name of the data set.
        short_side: side that larger images are reduced to, in pixels.
        format: of the images.
        quality: of JPEG; None for raw pixels.
        shard_images: images of the source that a shard is made of.
        source: hash of the names and labels of all images of the source.
        options: those of the data set alone that it was packed with.
        split: its test images were set aside from the training images.
    """

    dataset: str
    short_side: int
    format: Literal["jpeg", "raw"]
    quality: int | None
    shard_images: int
    source: str
    options: dict[str, Any] = {}
    split: Split | None = None


class Manifest(msgspec.Struct, frozen=True):
    """The content of ``pack.json``.

    Attributes:
        version: of the format.
        settings: what the pack was made from and how.
        description: of the data set.
        source_fingerprint: the fingerprint of the training set that was packed.
        class_names, mean, std: as in :class:`shike_fast.data.LongTailData`.
        class_counts: training images of each class.
        train, test: the two parts.
    """

    version: int
    settings: Settings
    description: str
    source_fingerprint: str
    class_names: tuple[str, ...]
    class_counts: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: PartRecord
    test: PartRecord


def encode_json(value: object) -> bytes:
    """JSON for people to read; file names that are not UTF-8 come back as they were."""
    return json.dumps(msgspec.to_builtins(value), indent=2).encode() + b"\n"


def decode_json(content: bytes, kind: type[T]) -> T:
    """``content`` as a value of a type. Raises ValueError: it is none."""
    try:
        return msgspec.convert(json.loads(content), kind)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@dataclass(frozen=True)
class Index:
    """Where each of N images is and what is known of it.

    Attributes:
        shard: uint32 [N], number of its archive.
        offset, length: int64 [N], its bytes in there.
        label: int64 [N].
        width, height: int32 [N], in pixels, as packed.
        crc32: uint32 [N], of its bytes.
        name_bytes, name_bounds: the arrays of the :class:`PathTable` of the names in the source.
    """

    shard: NDArray[np.uint32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    crc32: NDArray[np.uint32]
    name_bytes: NDArray[np.uint8]
    name_bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def make(cls, shard: int, rows: Sequence[tuple[int, int, int, int, int, int]], names: Sequence[bytes]) -> Index:
        """The index of one shard; a row holds offset, length, label, width, height and CRC-32."""
        columns = np.array(rows, np.int64).reshape(-1, 6).T
        offset, length, label, width, height, crc32 = columns.copy()
        sizes = (width.astype(np.int32), height.astype(np.int32))
        number = np.full(len(rows), shard, np.uint32)
        return cls(number, offset, length, label, *sizes, crc32.astype(np.uint32), *PathTable(names).arrays)

    @classmethod
    def join(cls, parts: Sequence[Index]) -> Index:
        """One index after the other."""
        names = PathTable(table.raw(i) for table in (part.names for part in parts) for i in range(len(table)))
        columns = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)[:-2]}
        return cls(**columns, name_bytes=names.arrays[0], name_bounds=names.arrays[1])

    @property
    def names(self) -> PathTable:
        """The images' names in the source."""
        return PathTable.from_arrays(self.name_bytes, self.name_bounds)

    def encode(self, **more: NDArray[Any]) -> bytes:
        """The bytes of an ``.npz`` file, the same for the same arrays; ``more`` arrays are kept beside them."""
        buffer = io.BytesIO()
        np.savez(
            buffer, allow_pickle=False, **{field.name: getattr(self, field.name) for field in fields(self)}, **more
        )
        return buffer.getvalue()

    @classmethod
    def decode(cls, content: bytes, *more: str) -> tuple[Index, tuple[NDArray[Any], ...]]:
        """The index and the arrays kept beside it. Raises ValueError: these are no such bytes."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                columns = {field.name: arrays[field.name] for field in fields(cls)}
                for name, column in columns.items():
                    if column.ndim != 1 or column.dtype != _DTYPES[name]:
                        raise ValueError(f"{name} is {column.dtype} {list(column.shape)}, expected {_DTYPES[name]} [N]")
                return cls(**columns), tuple(arrays[name] for name in more)
        except (OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(str(error)) from error


_DTYPES = {
    "shard": np.dtype(np.uint32),
    "offset": np.dtype(np.int64),
    "length": np.dtype(np.int64),
    "label": np.dtype(np.int64),
    "width": np.dtype(np.int32),
    "height": np.dtype(np.int32),
    "crc32": np.dtype(np.uint32),
    "name_bytes": np.dtype(np.uint8),
    "name_bounds": np.dtype(np.int64),
}


def shard_name(part: str, number: int) -> str:
    """File name of a shard."""
    return f"{part}-{number:05d}.tar"


def index_name(part: str) -> str:
    """File name of the index of a part."""
    return f"{part}.npz"
