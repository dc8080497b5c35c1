"""``webdataset``: a user's own images in tar archives, each with its label beside it, as WebDataset writes them."""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shike_fast._util.text import printable
from shike_fast.data.datasets.archives import AGAIN
from shike_fast.data.datasets.imagefolder import EXTENSIONS
from shike_fast.data.datasets.own import FileOptions, choose_column, find_parts, number_classes, own_images
from shike_fast.data.datasets.validation import build_parts
from shike_fast.data.images.decode import BrokenImageError, Picture, open_image, unreadable
from shike_fast.data.images.files import ImagePart
from shike_fast.data.images.paths import PathTable
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

ENDINGS = (".tar",)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LABELS = ("cls", "json", "txt")  # extensions, the first that a sample has goes before the others
_MOST_BYTES = 2**24  # of a label

INFO = own_images(
    "webdataset",
    "in tar archives with a .cls, .json or .txt beside each",
    "--data-dir DIR with the archives, such as DIR/train-0000.tar and DIR/val-0000.tar",
    FileOptions,
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read where every image is, and its label; the archives are read once from end to end, without the images."""
    root = require_data_dir(info, options)
    own: FileOptions = options.own
    names = [path for path in sorted(root.rglob("*")) if path.name.lower().endswith((*ENDINGS, *_COMPRESSED))]
    only_compressed = names and not any(path.name.lower().endswith(ENDINGS) for path in names)
    endings = _COMPRESSED if only_compressed else ENDINGS
    train_files, val_files = find_parts(root, endings, own, "archive")
    for path in (*train_files, *val_files):
        if path.name.lower().endswith(_COMPRESSED):
            raise DataError(f"{path}: is compressed, so that no image can be read by itself; unpack it to .tar")
    train, val = _read_part(root, train_files, own), _read_part(root, val_files, own)
    classes = number_classes(train.labels, val.labels, root)
    return build_parts(
        info,
        options,
        train=ImagePart(train.store, classes.train),
        test=ImagePart(val.store, classes.val) if val_files else None,
        names=train.store.members,
        sizes=train.store.lengths,
        class_names=classes.names,
        source=root,
        notes=classes.notes,
    )


class TarStore:
    """Images in uncompressed tar archives, each read by itself where it is.

    Args:
        root: the folder of the archives.
        archives: their names relative to it.
        shards: int64 [N], the archive of each image.
        offsets, lengths: int64 [N], its bytes in there.
        members: ``ARCHIVE/MEMBER`` for each.
    """

    def __init__(
        self,
        root: Path,
        archives: PathTable,
        shards: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        members: PathTable,
    ) -> None:
        self.root = root
        self.members = members
        self.lengths = lengths
        self._archives = archives
        self._shards = shards
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, index: int) -> bytes:
        try:
            return _read_at(self._archive(index), int(self._offsets[index]), int(self.lengths[index]))
        except OSError as error:
            raise unreadable(error) from error

    def open(self, index: int) -> Picture:
        return open_image(self.read(index))

    def name(self, index: int) -> str:
        return str(self.root / self.members[index])

    def _archive(self, index: int) -> Path:
        return self.root / self._archives[int(self._shards[index])]


def _read_at(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a file. Opened anew each time: there may be more archives than files that a process may hold open."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
    if len(content) < length:
        raise BrokenImageError("the archive is shorter than it was")
    return content


@dataclass
class _Sample:
    """The members of an archive that have the same name up to its first dot: extension -> where."""

    key: str
    members: dict[str, tarfile.TarInfo]


@dataclass
class _Part:
    store: TarStore
    labels: list[str]


def _read_part(root: Path, files: Sequence[Path], options: FileOptions) -> _Part:
    archives = [os.path.relpath(path, root) for path in files]
    shards, offsets, lengths = array("q"), array("q"), array("q")
    names: list[str] = []
    labels: list[str] = []
    for shard, (path, archive) in enumerate(zip(files, archives, strict=True)):
        for sample in _samples(path):
            where = f"{path}: sample {printable(os.fsencode(sample.key))}"
            image = _image_of(sample, options.image_column, where)
            if image is None:
                continue
            labels.append(_label_of(sample, options.label_column, path, where))
            shards.append(shard)
            offsets.append(image.offset_data)
            lengths.append(image.size)
            names.append(f"{archive}/{image.name}")
    of, at, size = (np.array(column, dtype=np.int64) for column in (shards, offsets, lengths))
    return _Part(TarStore(root, PathTable(archives), of, at, size, PathTable(names)), labels)


def _samples(path: Path) -> Iterator[_Sample]:
    """The samples of an archive in its order; hidden files, folders and links are passed over.

    Raises:
        DataError: it is damaged, or a sample is in it twice.
    """
    seen = set[str]()
    sample: _Sample | None = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            whole = os.fstat(file.fileno()).st_size
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps all that it has read
                folder, _, name = member.name.rpartition("/")
                if not member.isreg() or member.issparse() or name.startswith("."):
                    continue
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError("unexpected end of data")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    if key in seen:
                        raise DataError(f"{path}: holds the sample {printable(os.fsencode(key))} twice; write it anew")
                    seen.add(key)
                    sample = _Sample(key, {})
                if extension.lower() in sample.members:
                    raise DataError(f"{path}: holds {printable(os.fsencode(member.name))} twice; write it anew")
                sample.members[extension.lower()] = member
        if sample is not None:
            yield sample
    except tarfile.TarError as error:
        raise DataError(f"{path}: truncated or damaged ({' '.join(str(error).split())}); {AGAIN}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _image_of(sample: _Sample, wanted: str | None, where: str) -> tarfile.TarInfo | None:
    """The image of a sample; None where it holds nothing but what other programs leave."""
    if wanted is not None:
        found = [member for extension, member in sample.members.items() if extension == wanted.lower().lstrip(".")]
    else:
        found = [member for extension, member in sample.members.items() if f".{extension}".endswith(EXTENSIONS)]
    if not found and wanted is None and not any(extension in _LABELS for extension in sample.members):
        return None
    if len(found) != 1:
        raise DataError(
            f"{where}: holds {len(found)} images, its members end in {', '.join(sample.members)}; name the image with "
            "--image-column"
        )
    return found[0]


def _label_of(sample: _Sample, wanted: str | None, path: Path, where: str) -> str:
    extension = wanted if wanted in sample.members else next((e for e in _LABELS if e in sample.members), None)
    if wanted is not None and extension != wanted:
        extension = "json" if "json" in sample.members else None  # a key in there
    if extension is None:
        raise DataError(
            f"{where}: has no label ({', '.join((wanted and [wanted]) or _LABELS)}), its members end in "
            f"{', '.join(sample.members)}; name the label with --label-column, or remove the sample"
        )
    member = sample.members[extension]
    if member.size > _MOST_BYTES:
        raise DataError(f"{where}: its .{extension} has {member.size:,} bytes, more than any label")
    content = _read_at(path, member.offset_data, member.size)
    if extension == "json":
        return _label_in(content, None if wanted == "json" else wanted, where)
    label = os.fsdecode(content).strip()
    if not label:
        raise DataError(f"{where}: has no label, its .{extension} is empty; write one, or remove the sample")
    return label


def _label_in(content: bytes, key: str | None, where: str) -> str:
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json is damaged ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: its .json must be an object with the label, got {type(fields).__name__}")
    name = list(fields)[choose_column(list(fields), key, f"{where}: .json")]
    if not isinstance(fields[name], str | int | float) or fields[name] == "":
        raise DataError(f"{where}: the label {name!r} in its .json must be a text or a number, got {fields[name]!r}")
    return str(fields[name]).strip()
