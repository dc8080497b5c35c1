"""Check a data set: its lists, and that every image file is there and whole.

By default the first 64 KiB and the end of each file are read: JPEG and PNG files that are missing, empty, no images or
truncated are found (files of other formats are decoded). --decode decodes every image, which also finds damage in the
middle that the decoder cannot go on with. No check finds damage that only shows as wrong pixels, as most damage to the
compressed data of a JPEG does. Of a pack the SHA-256 of every file is compared, with --decode or without, and images
that were left out when it was made are named. Exit status: 0 all is well, 1 there are faults or images left out, 2 bad
input.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from shike_fast._util.cli import cores, whole_number
from shike_fast._util.files import naming, why_not_writable
from shike_fast._util.options import add_owned
from shike_fast._util.processes import Tell, work
from shike_fast._util.progress import progress
from shike_fast._util.text import printable
from shike_fast.data.datasets.counts import expected_counts
from shike_fast.data.images.decode import BrokenImageError, open_image
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.stores import FileStore, ImageStore, open_regular
from shike_fast.data.pack.format import LeftOut
from shike_fast.data.registry import dataset_options, datasets, load_dataset, named_options
from shike_fast.data.shots import SHOTS, shot_masks
from shike_fast.data.types import Counts, LongTailData
from shike_fast.errors import DataError

MISSING, EMPTY, UNREADABLE, DAMAGED = "missing", "empty", "unreadable", "truncated or damaged"
LEFT_OUT = "left out when packed"
SHOWN = 20  # faulty files of a kind that a terminal shows

_HEAD = 2**16  # bytes in which nearly all JPEGs have said how large they are
_TAIL = 64  # bytes in which a whole file has its end marker
_ENDS = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND"))  # how files begin, and how they end then
_WIDTH = 22  # of the column of names
_CHUNK = 512  # images that a process takes at a time, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``check``."""
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="name of the data set")
    add("--data-dir", type=Path, metavar="DIR", help="folder with its files")
    add("--decode", action="store_true", help="decode every image file; finds what the decoder cannot go on with")
    add("--workers", type=whole_number(1), metavar="N", help="processes; default: one for each CPU")
    add("--no-verify", action="store_true", help="accept any number of records")
    add("--all", action="store_true", help=f"show all files, not just {SHOWN} of a kind")
    add("--report", type=Path, metavar="FILE", help="write all faulty files to FILE, one a line: kind, file, reason")
    add_owned(parser.add_argument_group("data sets of your own"), dataset_options())


@runtime_checkable
class Verifiable(Protocol):
    """A store that knows how to check itself: packs have checksums, and know what was left out of them."""

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """The images of the source that are not in it."""
        ...

    def verify(self, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
        """Yield path and reason of each faulty file; ``advance`` is called with how many more images were read."""
        ...


@dataclass(frozen=True)
class Fault:
    """A file that is not what it should be."""

    kind: str
    name: str
    reason: str


def run(arguments: argparse.Namespace) -> int:
    """Check and print what was found; returns the exit status."""
    _check_report(arguments.report)
    own = named_options(vars(arguments))
    data = load_dataset(arguments.dataset, data_dir=arguments.data_dir, verify=not arguments.no_verify, **own)
    faults: list[Fault] = []
    for part, dataset in (("training", data.train), ("test", data.test)):
        if isinstance(dataset, ImageDataset):
            faults += _check_part(part, dataset.store, arguments)
    if arguments.report is not None:
        _write_report(arguments.report, faults)
    _print(data, faults, arguments)
    return 1 if faults else 0


def _check_report(path: Path | None) -> None:
    """Refuse a report that cannot be written before the work, which may take an hour; nothing is written for that.

    Raises:
        DataError: naming it and the reason.
    """
    if path is None:
        return
    reason = None
    if path.is_dir():
        reason = os.strerror(errno.EISDIR)
    elif not path.exists():
        reason = why_not_writable(path.parent) if path.parent.exists() else os.strerror(errno.ENOENT)
    elif not os.access(path, os.W_OK):
        reason = os.strerror(errno.EACCES)
    if reason is not None:
        raise DataError(f"--report {path}: cannot be written ({reason})")


def _write_report(path: Path, faults: list[Fault]) -> None:
    with naming(path), path.open("w", encoding="utf-8") as file:
        for fault in faults:
            file.write(f"{fault.kind}\t{_shown(fault.name)}\t{_shown(fault.reason)}\n")


def _check_part(part: str, store: ImageStore, arguments: argparse.Namespace) -> list[Fault]:
    if isinstance(store, Verifiable):
        with progress(f"checking {part} images", len(store)) as advance:
            faults = [Fault(DAMAGED, path, reason) for path, reason in store.verify(advance)]
        return faults + [Fault(LEFT_OUT, image.name, image.reason) for image in store.left_out]
    found: list[tuple[int, str, str]] = []

    def look(chunk: range, tell: Tell) -> None:
        for index in chunk:
            fault = find_fault(store, index, decode=arguments.decode)
            tell(1, [] if fault is None else [f"{index}\t{fault[0]}\t{fault[1]}"])

    @contextlib.contextmanager
    def reporting() -> Iterator[Tell]:
        with progress(f"checking {part} images", len(store)) as advance:

            def tell(count: int, lines: list[str]) -> None:
                for line in lines:
                    index, kind, reason = line.split("\t", 2)
                    found.append((int(index), kind, reason))
                advance(count)

            yield tell

    workers = arguments.workers or cores()
    size = max(1, min(_CHUNK, len(store) // (4 * workers)))
    chunks = [range(start, min(start + size, len(store))) for start in range(0, len(store), size)]
    work(look, chunks, workers, reporting)
    return [Fault(kind, store.name(index), reason) for index, kind, reason in sorted(found)]


def find_fault(store: ImageStore, index: int, *, decode: bool) -> tuple[str, str] | None:
    """What is wrong with an image: its kind and the reason; None for a good one.

    Args:
        store: the images.
        index: which one.
        decode: decode it whatever its beginning and its end look like.
    """
    if not decode and isinstance(store, FileStore) and _looks_whole(store.name(index)):
        return None
    try:
        data = store.read(index)
    except BrokenImageError as error:
        gone = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOENT, errno.ENOTDIR)
        return MISSING if gone else UNREADABLE, str(error)
    if data is not None and len(data) == 0:
        return EMPTY, "is empty"
    try:
        picture = store.open(index) if data is None else open_image(data)
    except BrokenImageError as error:
        return UNREADABLE, str(error)
    try:
        picture.pixels()
    except BrokenImageError as error:
        return DAMAGED, str(error)
    return None


def _looks_whole(path: str) -> bool:
    """Whether a file begins as an image and ends as a whole one; False where only decoding it can tell."""
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
            end = next((end for start, end in _ENDS if head.startswith(start)), None)
            if end is None:
                return False
            size = os.fstat(file.fileno()).st_size
            if size <= len(head):
                tail = head[-_TAIL:]
            else:
                file.seek(-_TAIL, os.SEEK_END)
                tail = file.read(_TAIL)
        open_image(head)
    except (OSError, BrokenImageError):
        return False
    return end in tail


def _shown(text: str) -> str:
    return printable(os.fsencode(text))


def _print(data: LongTailData, faults: list[Fault], arguments: argparse.Namespace) -> None:
    train, test = data.train, data.test
    in_files = isinstance(train, ImageDataset) and isinstance(test, ImageDataset)
    verified = isinstance(train, ImageDataset) and isinstance(train.store, Verifiable)
    counts = None if verified else _expected(data, arguments.data_dir)
    print(f"{data.name}{f' in {arguments.data_dir}' if arguments.data_dir else ''}")
    _row("training images", len(train), counts, lambda known: known.images.get("train"))
    _row("test images", len(test), counts, lambda known: known.images.get("test"))
    _row("classes", data.num_classes, counts, lambda known: known.classes)
    shots = [f"{int(mask.sum()):,}" for mask in shot_masks(data.class_counts).values()]
    print(f"  {' / '.join(SHOTS):<{_WIDTH}} {' / '.join(shots)} classes")
    images = len(train) + len(test)
    for note in data.notes if data.validation is None else (*data.notes, data.validation.sentence):
        print(f"  {note}")
    if not in_files:
        print(f"  {'images':<{_WIDTH}} kept in memory: reading them was the check")
    elif not verified:
        print(f"  {'files OK':<{_WIDTH}} {images - len(faults):,} of {images:,}")
    elif all(fault.kind == LEFT_OUT for fault in faults):
        print(f"  {'files':<{_WIDTH}} as they were written")
    for kind, count in Counter(fault.kind for fault in faults).most_common():
        print(f"{kind}: {count:,}")
        lines = [f"{_shown(fault.name)}: {_shown(fault.reason)}" for fault in faults if fault.kind == kind]
        _print_some(lines, arguments, "--all shows them, --report FILE writes them to a file")
    if shared := _shared_files(data):
        print(f"listed more than once: {len(shared):,}; no fault, but mind images that are in both parts")
        _print_some([_shown(name) for name in shared], arguments, "--all shows them")
    if faults:
        remedy = "pack the data set again" if verified else datasets()[data.name].how_obtained
        if any(fault.kind == LEFT_OUT for fault in faults):
            remedy = "replace in the source what was left out, and pack the data set again"
        print(f"faults in all: {len(faults):,}; to obtain the files again: {remedy}")


def _print_some(lines: list[str], arguments: argparse.Namespace, remedy: str) -> None:
    for line in lines if arguments.all else lines[:SHOWN]:
        print(f"  {line}")
    if len(lines) > SHOWN and not arguments.all:
        print(f"  … and {len(lines) - SHOWN:,} more; {remedy}")


def _shared_files(data: LongTailData) -> list[str]:
    """The names of files that more than one image of the data set has, in order."""
    seen = set[str]()
    shared = dict[str, None]()
    for dataset in (data.train, data.test):
        if isinstance(dataset, ImageDataset) and isinstance(dataset.store, FileStore):
            for index in range(len(dataset.store)):
                name = dataset.store.name(index)
                if name in seen:
                    shared[name] = None
                seen.add(name)
    return list(shared)


def _row(label: str, found: int, counts: Counts | None, of: Callable[[Counts], int | None]) -> None:
    expected = None if counts is None else of(counts)
    note = "" if counts is None or expected is None else f"  ({counts.kind}: {expected:,})"
    print(f"  {label:<{_WIDTH}} {found:,}{note}")


def _expected(data: LongTailData, folder: Path | None) -> Counts | None:
    return None if folder is None else expected_counts(datasets()[data.name], folder)
