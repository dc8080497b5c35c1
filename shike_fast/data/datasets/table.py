"""``table``: a user's own images, named with their labels in a CSV, TSV or Parquet file."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from shike_fast._util.optional import optional_library
from shike_fast._util.options import option
from shike_fast._util.text import quoted
from shike_fast.data.datasets.archives import read_file
from shike_fast.data.datasets.layouts import Layout, find_files
from shike_fast.data.datasets.lists import BYTE_ORDER_MARK, ListedImages, path_fault
from shike_fast.data.datasets.own import (
    PARTS,
    FileOptions,
    choose_column,
    find_parts,
    number_classes,
    own_images,
    usual_columns,
)
from shike_fast.data.datasets.validation import build_parts
from shike_fast.data.images.files import ImagePart
from shike_fast.data.images.paths import PathTable
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

PARQUET = (".parquet", ".pq")
ENDINGS = (".csv", ".tsv", ".tab", *PARQUET)
_DELIMITERS = ",;\t|"
_PATH_COLUMNS = (
    "path paths file files filename filenames filepath filepaths image images imagename imagepath imagefile "
    "imagefilename img imgpath imgname imgfile"
).split()
_SPLIT_COLUMNS = "split splits partition subset dataset set".split()
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, kw_only=True)
class TableOptions(FileOptions):
    """Options of tables."""

    split_column: str | None = option(
        None, "column that says train, val or test", metavar="NAME", default_text="guessed, if there is one"
    )
    image_folder: str | None = option(
        None, "what the paths are relative to, below --data-dir", metavar="FOLDER", default_text="--data-dir"
    )


INFO = own_images(
    "table",
    "named with their labels in a CSV, TSV or Parquet file",
    "--data-dir DIR with the images and a table of their paths and labels",
    TableOptions,
)


class Row(NamedTuple):
    """An image that a table names: its line, or row, and what that says; no split where there is no such column."""

    line: int
    path: str
    label: str
    split: str


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read the table, or that of each part, and find the images on disk."""
    root = require_data_dir(info, options)
    own: TableOptions = options.own
    train_files, val_files = find_parts(root, ENDINGS, own, "table")
    for flag, files in (("--files", train_files), ("--val-files", val_files)):
        if len(files) > 1:
            listed = ", ".join(str(path.relative_to(root)) for path in files)
            raise DataError(f"{info.name}: several tables in {root}: {listed}; name one with {flag}")
    if val_files and own.split_column is not None:
        raise DataError(f"--split-column: {val_files[0]} holds the validation images; leave the option out")
    images = _Images(root, own)
    source, val_source = train_files[0], (val_files or train_files)[0]
    images.add(source, "train" if val_files else None)
    if val_files:
        images.add(val_source, "val")
    train, val = images.parts["train"], images.parts["val"] or images.parts["test"]
    classes = number_classes(list(train.values()), list(val.values()), source)
    paths = PathTable(train)
    return build_parts(
        info,
        options,
        train=_find(info, root, ListedImages(source, paths, classes.train)),
        test=_find(info, root, ListedImages(val_source, PathTable(val), classes.val)) if val else None,
        names=paths,
        class_names=classes.names,
        source=val_source,
        notes=(*images.notes, *classes.notes),
    )


def _find(info: DatasetInfo, root: Path, images: ListedImages) -> ImagePart:
    return find_files(info, root, images, [Layout()])


class _Images:
    """The images that tables name: path -> label of each part, in their order.

    Args:
        root: the data folder.
        options: which columns say what.
    """

    def __init__(self, root: Path, options: TableOptions) -> None:
        self.parts: dict[str, dict[bytes, str]] = {"train": {}, "val": {}, "test": {}}
        self._options = options
        self._seen: dict[bytes, tuple[str, str]] = {}  # label, and where it was said first
        self._roots = {os.fsencode(path) for path in (os.path.abspath(root), os.path.realpath(root))}
        self._folder = os.fsencode(options.image_folder or "")
        self._repeated = 0
        if options.image_folder is not None and (fault := path_fault(self._folder)) is not None:
            raise DataError(
                f"--image-folder: {quoted(self._folder)} {fault}, where a folder below --data-dir is expected"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over, and what is in both parts."""
        notes = []
        if self._repeated:
            notes.append(f"rows that repeat another one, and are passed over: {self._repeated:,}")
        if both := len(self.parts["train"].keys() & (self.parts["val"] or self.parts["test"]).keys()):
            notes.append(f"images in both parts, which flatters the accuracy: {both:,}")
        return tuple(notes)

    def add(self, source: Path, part: str | None) -> None:
        """Read a table; without a part, a column may say the part of each image.

        Raises:
            DataError: naming the table, and the row if one is to blame.
        """
        empty: list[int] = []
        for row in _rows(source, self._options, with_split=part is None):
            where = f"{source}: line {row.line}"
            if not row.label:
                empty.append(row.line)
                continue
            path = self._relative(row.path, where)
            label, first = self._seen.setdefault(path, (row.label, where))
            if label != row.label:
                raise DataError(
                    f"{where}: {quoted(path)} has the label {_quoted(row.label)}, and the label "
                    f"{_quoted(label)} in {first}; keep one of them"
                )
            images = self.parts[part or _part_of(row.split, where)]
            self._repeated += path in images
            images[path] = row.label
        if empty:
            raise DataError(
                f"{source}: {len(empty):,} row{'s have' if len(empty) > 1 else ' has'} no label, line {empty[0]} for "
                "example; fill in the labels or remove the rows"
            )
        if not any(self.parts.values()):
            raise DataError(f"{source}: names no images")

    def _relative(self, text: str, where: str) -> bytes:
        """A path as it is below the data folder, which is also where an absolute one must lie."""
        path = os.fsencode(text)
        inside = next((path[len(root) :].lstrip(b"/") for root in self._roots if path.startswith(root + b"/")), None)
        relative = path if inside is None else inside
        if (fault := path_fault(relative)) is not None:
            raise DataError(
                f"{where}: the path {quoted(path)} {fault}, where one below the data folder is expected; a table opens "
                "nothing outside --data-dir"
            )
        return posixpath.normpath(posixpath.join(self._folder, relative) if inside is None else relative)


def _part_of(split: str, where: str) -> str:
    if split.lower() not in PARTS:
        raise DataError(f"{where}: the split must be one of {', '.join(PARTS)}, got {_quoted(split)}")
    return PARTS[split.lower()]


def _quoted(text: str) -> str:
    return quoted(os.fsencode(text))


def _rows(source: Path, options: TableOptions, *, with_split: bool) -> Iterator[Row]:
    """The rows of a table, without blanks around what they say; without a column for it all are for training."""

    def places(columns: Sequence[str]) -> list[int | None]:
        path = choose_column(
            columns, options.image_column, source, usual=_PATH_COLUMNS, what="paths", flag="--image-column"
        )
        label = choose_column(columns, options.label_column, source)
        split = None
        if options.split_column is not None or (with_split and usual_columns(columns, _SPLIT_COLUMNS)):
            split = choose_column(
                columns, options.split_column, source, usual=_SPLIT_COLUMNS, what="split", flag="--split-column"
            )
        return [path, label, split]

    if source.name.lower().endswith(PARQUET):
        names, read = _open_parquet(source)
        chosen = places(names)
        columns = [None if place is None else read(names[place]) for place in chosen]
        rows = zip(*(repeat("train") if column is None else column for column in columns), strict=False)
        for number, row in enumerate(rows, 1):
            yield Row(number, *map(str.strip, row))
        return
    lines = _lines(source)
    number, header = next(lines, (1, []))
    if not header:
        raise DataError(f"{source}: is empty; its first line must name the columns")
    width = len(header)
    while not header[width - 1].strip():  # what a spreadsheet leaves behind the last column
        width -= 1
    chosen = places([name.strip() for name in header[:width]])
    for number, fields in lines:
        while len(fields) > width and not fields[-1].strip():
            fields.pop()
        if len(fields) != width:
            raise DataError(
                f"{source}: line {number} has {len(fields):,} field{'s' if len(fields) != 1 else ''}, the first line "
                f"names {width:,}; put a text that holds the delimiter into double quotes"
            )
        path, label, split = ("train" if place is None else fields[place].strip() for place in chosen)
        yield Row(number, path, label, split)


def _lines(source: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a text table as fields, each with its number; blank ones are passed over.

    What is not UTF-8 comes back as it was when a path is encoded for the file system.
    """
    content = read_file(source)
    if content[:2] in _UTF_16:
        text = content.decode("utf-16", "replace")  # what a spreadsheet calls Unicode
    else:
        text = content.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "surrogateescape")
    first = text.partition("\n")[0]
    tabbed = source.name.lower().endswith((".tsv", ".tab"))
    delimiter = "\t" if tabbed else max(_DELIMITERS, key=first.count)  # of none the first one, a comma
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for fields in lines:
            if any(map(str.strip, fields)):
                yield lines.line_num, fields
    except csv.Error as error:  # a quotation mark without its other one, which swallows the rest of the file
        raise DataError(f"{source}: line {lines.line_num}: not a table of fields ({error})") from error


def _open_parquet(source: Path) -> tuple[list[str], Callable[[str], list[str]]]:
    """The columns of a Parquet file, and what reads one of them as texts; "" where there is no value.

    Raises:
        DataError: the library is lacking, the file is damaged or a column holds something else than texts or numbers.
    """
    lacking = {"package": "pyarrow", "otherwise": ", or write it as CSV"}
    pyarrow, parquet = (
        optional_library(name, f"{source}: Parquet", **lacking, error=DataError)
        for name in ("pyarrow", "pyarrow.parquet")
    )
    try:
        file = parquet.ParquetFile(source)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{source}: cannot be read as Parquet ({' '.join(str(error).split())})") from error

    def read(name: str) -> list[str]:
        values = file.read([name]).column(name).to_pylist()
        return [_as_text(value, f"{source}: column {name!r}") for value in values]

    return list(file.schema_arrow.names), read


def _as_text(value: object, where: str) -> str:
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(
        f"{where} holds a {type(value).__name__}, where a text or a number is expected; images inside Parquet are read "
        "by --dataset huggingface"
    )
