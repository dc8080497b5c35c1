"""``huggingface``: a user's own images in a folder that Hugging Face ``datasets`` wrote, or in Parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shike_fast._util.optional import optional_library
from shike_fast.data.datasets.own import (
    PARTS,
    FileOptions,
    choose_column,
    find_parts,
    name_classes,
    number_classes,
    own_images,
)
from shike_fast.data.datasets.validation import build_parts
from shike_fast.data.images.decode import BrokenImageError, Picture, open_image
from shike_fast.data.images.files import ImagePart
from shike_fast.data.images.paths import PathTable
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
_IMAGE_COLUMNS = "image images img picture photo pixels imagebytes bytes jpg png".split()
_UNLABELLED = -1  # what a class label is where nobody may know it

INFO = own_images(
    "huggingface",
    "as Hugging Face datasets saves them, or in Parquet files",
    "--data-dir DIR that save_to_disk wrote, or with Parquet files that hold images and labels",
    FileOptions,
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Open the parts as memory-mapped Arrow files; Parquet becomes such files in the cache of the library first."""
    root = require_data_dir(info, options)
    own: FileOptions = options.own
    parts = _open_parts(root, own)
    train, train_labels, names = _read_part(root, "train", parts["train"], own)
    val_name = next((name for name in ("val", "test") if name in parts), None)
    val: _ArrowStore | None = None
    val_labels: list[Any] = []
    notes: tuple[str, ...] = ()
    if val_name is not None:
        val, val_labels, val_names = _read_part(root, val_name, parts[val_name], own)
        if val_names != names:
            raise DataError(f"{root}: {val_name} and train know different classes; save both with the same names")
        if set(val_labels) == {None}:
            val, val_labels, notes = None, [], (f"the {val_name} images have no labels and are not used",)
    for part, labels in (("train", train_labels), (val_name, val_labels)):
        if (empty := labels.count(None)) > 0:
            raise DataError(
                f"{root}: {part}: {empty:,} images have no label, number {labels.index(None)} for example; label or "
                "remove them"
            )
    if names is None:
        classes = number_classes(train_labels, val_labels, root)
    else:
        of_train, of_val = (np.array(labels, dtype=np.int64) for labels in (train_labels, val_labels))
        classes = name_classes(of_train, of_val, names, root)
    return build_parts(
        info,
        options,
        train=ImagePart(train, classes.train),
        test=None if val is None else ImagePart(val, classes.val),
        names=train.names,
        sizes=train.sizes,
        class_names=classes.names,
        source=root,
        notes=(*notes, *classes.notes),
    )


def _read_part(
    root: Path, name: str, part: Any, options: FileOptions
) -> tuple[_ArrowStore, list[Any], list[str] | None]:
    """The images of a part, their labels, and what these mean where the column says it."""
    source = f"{root}: {name}"
    image, label = _columns(part, options, source)
    return _ArrowStore(root, name, part, image), *_labels(part, label, source)


class _ArrowStore:
    """Images in a column of a memory-mapped Arrow table.

    Args:
        root: the data folder.
        part: what the part is called.
        dataset: the part.
        column: of the images.
    """

    def __init__(self, root: Path, part: str, dataset: Any, column: str) -> None:
        self._root = root
        self._column = column
        self._rows = _encoded(dataset.select_columns([column]), column)
        files, self.sizes = _files(self._rows, column)
        if None in files or len(set(files)) < len(files):
            files = [f"{number}{f' {file}' if file else ''}" for number, file in enumerate(files)]
        self.names = PathTable(f"{part}/{file}" for file in files)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> bytes:
        image = self._rows[index][self._column]
        content = image["bytes"] if isinstance(image, dict) else image
        if content is None:
            raise BrokenImageError("is not in the data set, which only names it; save it again with the images")
        return bytes(content)

    def open(self, index: int) -> Picture:
        return open_image(self.read(index))

    def name(self, index: int) -> str:
        return str(self._root / self.names[index])


def _open_parts(root: Path, options: FileOptions) -> dict[str, Any]:
    """The parts "train" and perhaps "val" and "test".

    Raises:
        DataError: the library is lacking, or there is nothing that it can read.
    """
    datasets: Any = optional_library("datasets", "--dataset huggingface", error=DataError)
    saved = any((root / name).is_file() for name in _SAVED)
    named = next((flag for flag, at in (("--files", options.files), ("--val-files", options.val_files)) if at), None)
    if saved and named is not None:
        raise DataError(f"{named}: names Parquet files, {root} is a folder that save_to_disk wrote; leave it out")
    files: dict[str, list[str]] = {}
    if not saved:
        train, val = find_parts(root, (".parquet", ".pq"), options, "saved data set, nor a Parquet file")
        files = {name: list(map(str, paths)) for name, paths in (("train", train), ("val", val)) if paths}
    try:
        loaded = datasets.load_from_disk(str(root)) if saved else datasets.load_dataset("parquet", data_files=files)
    except Exception as error:  # whatever that library and Arrow raise at a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{root}: cannot be read by Hugging Face datasets ({reason})") from error
    if not isinstance(loaded, Mapping):
        return {"train": loaded}
    parts = {PARTS.get(str(name).lower(), str(name)): part for name, part in loaded.items() if len(part)}
    if len(parts) == 1:
        return {"train": next(iter(parts.values()))}
    if "train" not in parts:
        raise DataError(f"{root}: has no part called train, there is {', '.join(map(str, loaded))}")
    return parts


def _columns(part: Any, options: FileOptions, source: str) -> tuple[str, str]:
    """The columns of the images and of their labels: as named, else by their types, else by their names."""
    import datasets

    names = list(part.column_names)

    def typed(kind: type) -> list[str]:
        return [name for name in names if isinstance(part.features[name], kind)]

    images, labels = typed(datasets.Image), typed(datasets.ClassLabel)
    image = images[0] if len(images) == 1 and options.image_column is None else None
    label = labels[0] if len(labels) == 1 and options.label_column is None else None
    if image is None:
        wanted = options.image_column
        chosen = choose_column(names, wanted, source, usual=_IMAGE_COLUMNS, what="images", flag="--image-column")
        image = names[chosen]
    if label is None:
        label = names[choose_column(names, options.label_column, source)]
    return image, label


def _encoded(part: Any, column: str) -> Any:
    """The column of images as they are encoded: bytes, or {bytes, path}.

    Raises:
        DataError: it holds something else.
    """
    import datasets

    feature = part.features[column]
    if isinstance(feature, datasets.Image):
        return part.cast_column(column, datasets.Image(decode=False))
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if is_bytes or (isinstance(feature, Mapping) and "bytes" in feature):
        return part
    raise DataError(f"huggingface: column {column!r} holds {feature}, where encoded images are expected")


def _files(part: Any, column: str) -> tuple[list[str | None], NDArray[np.int64]]:
    """What the files of the images were called, where the column says so, and their sizes; no image is read."""
    import pyarrow.compute as compute
    from pyarrow import types

    files: list[str | None] = []
    sizes = [np.zeros(0, np.int64)]
    for chunk in part.with_format("arrow")[:].column(column).chunks:
        structured = types.is_struct(chunk.type)
        content = chunk.field("bytes") if structured else chunk
        sizes.append(compute.fill_null(compute.binary_length(content), 0).to_numpy().astype(np.int64))
        named = structured and chunk.type.get_field_index("path") >= 0
        files += chunk.field("path").to_pylist() if named else [None] * len(chunk)
    return files, np.concatenate(sizes)


def _labels(part: Any, column: str, source: str) -> tuple[list[Any], list[str] | None]:
    """The label of every image, None where it has none, and what numbers mean where the column says it."""
    import datasets

    feature = part.features[column]
    values = part.with_format("arrow").select_columns([column])[:].column(column).to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        return [None if value == _UNLABELLED else value for value in values], list(feature.names)
    if not isinstance(feature, datasets.Value) or feature.dtype.endswith("binary"):
        raise DataError(f"{source}: column {column!r} holds {feature}, where labels are expected; see --label-column")
    return [
        None if value is None or str(value).strip() in ("", "nan") else str(value).strip() for value in values
    ], None
