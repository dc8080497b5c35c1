"""Pack a data set of image files into a few large files, no larger than training needs.

Images are reduced to --short-side and kept as JPEG or as raw pixels; --data-dir OUT then trains from the pack. A killed
pack goes on when the same command is repeated. Images that are missing or cannot be decoded are left out, unless they
are too many. docs/data.md describes the format.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shike_fast._util.files import advice, atomic_write, temporary_of, why_not_writable
from shike_fast._util.processes import LOCK, Tell, locked, work
from shike_fast._util.progress import progress
from shike_fast.data.datasets.lists import printable
from shike_fast.data.images.decode import BrokenImageError
from shike_fast.data.images.files import ImageDataset, ImageStore
from shike_fast.data.images.paths import PathTable
from shike_fast.data.loaders.photo import most_broken
from shike_fast.data.pack import reader
from shike_fast.data.pack.format import (
    EXTENSIONS,
    MANIFEST,
    PARTS,
    UNFINISHED,
    VERSION,
    FileRecord,
    Index,
    LeftOut,
    Manifest,
    PartRecord,
    Settings,
    ShardWriter,
    decode_json,
    encode_image,
    encode_json,
    index_name,
    shard_name,
)
from shike_fast.data.types import BatchSource, LongTailData, datasets, fingerprint, load_dataset
from shike_fast.errors import ConfigError, DataError, RunError

QUALITY = 90  # of JPEG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pack``."""
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder of the pack: new, empty, or that of an unfinished pack")
    add("--dataset", required=True, metavar="NAME", help="a data set of image files")
    add("--data-dir", required=True, type=Path, metavar="DIR", help="folder with its files")
    add(
        "--short-side",
        type=_number(1),
        default=256,
        metavar="PX",
        help="reduce images to this short side (default 256)",
    )
    add("--format", choices=tuple(EXTENSIONS), default="jpeg", help="JPEG, or raw pixels, of ten times the size")
    add("--quality", type=_number(1, 100), metavar="Q", help=f"of JPEG that is encoded anew (default {QUALITY})")
    add("--workers", type=_number(1), metavar="N", help="processes; default: one for each CPU")
    add("--shard-images", type=_number(1), default=8192, metavar="N", help="images of a file (default 8192)")
    add("--strict", action="store_true", help="stop at the first image that cannot be read instead of leaving it out")
    add("--no-verify", action="store_true", help="accept any number of records in the source")


def run(arguments: argparse.Namespace) -> int:
    """Write the pack, or go on with it; returns the exit status."""
    if reader.is_pack(arguments.data_dir):
        raise DataError(f"--data-dir {arguments.data_dir}: a pack already; pack the files it was made from")
    if arguments.format == "raw" and arguments.quality is not None:
        raise ConfigError("--quality: raw pixels have none; leave it out, or use --format jpeg")
    if arguments.out.resolve().is_relative_to(arguments.data_dir.resolve()):
        raise ConfigError(f"{arguments.out}: lies within --data-dir {arguments.data_dir}; choose a place outside")
    info = datasets().get(arguments.dataset)
    if info is not None and not info.resizable:
        raise _in_memory(arguments.dataset)
    out: Path = arguments.out
    _check_place(out)
    data = load_dataset(arguments.dataset, data_dir=arguments.data_dir, verify=not arguments.no_verify)
    parts = zip(PARTS, (data.train, data.test), strict=True)
    sources = {part: _source(data, dataset, arguments.data_dir) for part, dataset in parts}
    settings = Settings(
        dataset=data.name,
        short_side=arguments.short_side,
        format=arguments.format,
        quality=(arguments.quality or QUALITY) if arguments.format == "jpeg" else None,
        shard_images=arguments.shard_images,
        source=_identity(data, sources),
    )
    # Once more behind the lock: another process, for which this one has waited, may have finished it.
    if _complete(out, settings, arguments.strict):
        return 0
    with locked(out):
        if _complete(out, settings, arguments.strict):
            return 0
        if not (out / UNFINISHED).is_file():
            atomic_write(out / UNFINISHED, encode_json(settings))
        job = _Job(out, sources, settings, arguments.strict)
        finished = job.finished()
        if arguments.strict:
            _none_left_out(out, "an unfinished pack", [image for images in finished.values() for image in images])
        tasks = [task for task in job.tasks() if task not in finished]
        workers = arguments.workers or len(os.sched_getaffinity(0))
        try:
            work(job.pack_shard, tasks, workers, _reporting(job, finished, sum(t.stop - t.start for t in tasks)))
        finally:
            for temporary in out.glob(".*.tmp"):
                temporary.unlink(missing_ok=True)
        manifest = _finish(job, data)
    print(_summary(out, manifest))
    return 0


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"{least} … {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {value}")
        return value

    parse.__name__ = "whole number"  # what argparse calls it: invalid whole number value
    return parse


@dataclass(frozen=True)
class _Source:
    """The images of a part, before packing."""

    store: ImageStore
    labels: NDArray[np.int64]
    names: PathTable


@dataclass(frozen=True)
class _Task:
    """A shard: images ``start`` … ``stop - 1`` of a part."""

    part: str
    number: int
    start: int
    stop: int


def _in_memory(name: str) -> DataError:
    return DataError(f"{name}: its images are kept in memory as they are, so there is nothing to pack")


def _source(data: LongTailData, dataset: BatchSource, data_dir: Path) -> _Source:
    if not isinstance(dataset, ImageDataset):
        raise _in_memory(data.name)
    # Relative names: a pack says nothing of the machine it was made on, and is the same wherever its source lies.
    prefix = f"{data_dir}{os.sep}"
    store = dataset.store
    return _Source(store, dataset.labels, PathTable(store.name(i).removeprefix(prefix) for i in range(len(store))))


def _identity(data: LongTailData, sources: dict[str, _Source]) -> str:
    arrays = [array for source in sources.values() for array in (*source.names.arrays, source.labels)]
    return fingerprint(data.fingerprint.encode(), *arrays)


def _check_place(out: Path) -> None:
    """Refuse a place for the pack that cannot be written or that holds something else; nothing is written for that.

    Raises:
        DataError: naming it and the remedy.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder; choose another place for the pack")
    if (out / MANIFEST).is_file():  # finished: nothing is to be written
        return
    if (reason := why_not_writable(out)) is not None:
        raise DataError(f"{out}: cannot be written ({reason}); choose another folder")
    unfinished = out / UNFINISHED
    known = (LOCK, temporary_of(unfinished).name)
    if out.exists() and not unfinished.is_file() and any(entry.name not in known for entry in out.iterdir()):
        raise DataError(f"{out}: is not empty and holds no pack; choose a new folder")


def _complete(out: Path, settings: Settings, strict: bool) -> bool:
    """Whether ``out`` holds the pack already; says so.

    Raises:
        DataError: it holds something else than this pack, finished or not, or not all images, where all are wanted.
    """
    _check_place(out)
    if (out / MANIFEST).is_file():
        manifest = reader.read_manifest(out)
        _same(out, "a pack", manifest.settings, settings)
        if strict:
            _none_left_out(out, "a pack", [*manifest.train.left_out, *manifest.test.left_out])
        reader.open_parts(out, manifest)
        _tidy(out)
        print(f"{out}: complete already")
        return True
    path = out / UNFINISHED
    if path.is_file():
        try:
            found = decode_json(path.read_bytes(), Settings)
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); delete {out} and pack again") from error
        _same(out, "an unfinished pack", found, settings)
    return False


def _same(out: Path, what: str, found: Settings, wanted: Settings) -> None:
    for name in Settings.__struct_fields__:
        there, here = getattr(found, name), getattr(wanted, name)
        if there == here:
            continue
        if name == "source":
            raise DataError(f"{out}: {what} of other images than those of --data-dir; choose another folder")
        option = f"--{name.replace('_', '-')}"
        raise DataError(f"{out}: {what} with {option} {there}, not {here}; choose another folder or the same settings")


def _none_left_out(out: Path, what: str, left_out: Sequence[LeftOut]) -> None:
    """Raise DataError, naming the first one, if images were left out where all are wanted."""
    if left_out:
        raise DataError(
            f"{out}: {what} without {left_out[0].line}: it was left out without --strict; replace it and pack into "
            "another folder, or repeat the command without --strict"
        )


def _tidy(out: Path) -> None:
    """Remove what a complete pack has no use for."""
    for pattern in ("*-[0-9]*.npz", UNFINISHED, LOCK):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _reporting(
    job: _Job, finished: dict[_Task, list[LeftOut]], total: int
) -> Callable[[], contextlib.AbstractContextManager[Tell]]:
    """What workers tell: how many more images are done, and a line ``part, tab, name: reason`` for each left out."""

    @contextlib.contextmanager
    def report() -> Iterator[Tell]:
        left_out: dict[str, list[str]] = {part: [] for part in PARTS}
        for task, images in finished.items():
            left_out[task.part] += [image.line for image in images]
        with progress("packing", total) as advance:

            def tell(count: int, broken: list[str]) -> None:
                for part, _, line in (text.partition("\t") for text in broken):
                    print(f"left out: {line}", file=sys.stderr)
                    left_out[part].append(line)
                    if len(left_out[part]) > job.most_left_out(part):
                        raise DataError(
                            f"{len(left_out[part])} of {len(job.sources[part].labels)} {part} images could not be read "
                            f"so far, the first one being {left_out[part][0]}; look into it with: "
                            "python -m shike_fast.data check, then repeat the command"
                        )
                advance(count)

            yield tell

    return report


@dataclass(frozen=True)
class _Job:
    """What every worker process has to know."""

    out: Path
    sources: dict[str, _Source]
    settings: Settings
    strict: bool

    def tasks(self) -> Iterator[_Task]:
        for part, source in self.sources.items():
            size = self.settings.shard_images
            for number, start in enumerate(range(0, len(source.labels), size)):
                yield _Task(part, number, start, min(start + size, len(source.labels)))

    def most_left_out(self, part: str) -> int:
        """As many images of a part may be left out as training puts up with."""
        return most_broken(len(self.sources[part].labels))

    def finished(self) -> dict[_Task, list[LeftOut]]:
        """The shards that are there with what describes them, and which images each leaves out.

        If those of a part leave out too many, the ones that leave out any are to be made again: nothing could come of
        them, and the images may be readable now.
        """
        found: dict[_Task, list[LeftOut]] = {}
        for task in self.tasks():
            with contextlib.suppress(OSError, ValueError):
                _, record, left_out = self.read_sidecar(task)
                if (self.out / record.name).stat().st_size == record.bytes:
                    found[task] = left_out
        lost = Counter(task.part for task, images in found.items() for _ in images)
        vain = [part for part in PARTS if lost[part] > self.most_left_out(part)]
        return {task: images for task, images in found.items() if not (images and task.part in vain)}

    def read_sidecar(self, task: _Task) -> tuple[Index, FileRecord, list[LeftOut]]:
        index, (more,) = Index.decode(self._sidecar(task).read_bytes(), "more")
        record, left_out = decode_json(more.tobytes(), tuple[FileRecord, list[LeftOut]])
        return index, record, left_out

    def pack_shard(self, task: _Task, tell: Tell) -> None:
        """Write a shard and, when it is whole, what describes it.

        Raises:
            DataError: an image cannot be read, and that is to be an error.
            RunError: the shard cannot be written, or the source fails otherwise than by a missing or broken file.
        """
        source = self.sources[task.part]
        extension = EXTENSIONS[self.settings.format]
        path = self.out / shard_name(task.part, task.number)
        rows: list[tuple[int, int, int, int, int, int]] = []
        names: list[bytes] = []
        left_out: list[LeftOut] = []
        try:
            with open(temporary_of(path), "wb") as file:
                writer = ShardWriter(file)
                for i in range(task.start, task.stop):
                    label = int(source.labels[i])
                    try:
                        content, width, height = encode_image(source.store, i, self.settings)
                    except BrokenImageError as error:
                        line = printable(os.fsencode(f"{source.store.name(i)}: {error}"))
                        if _fails(error.__cause__):
                            raise RunError(f"{line}; see to it, then repeat the command to go on") from error
                        if self.strict:
                            raise DataError(f"{line}; replace or remove it") from error
                        left_out.append(LeftOut(source.names[i], str(error)))
                        tell(1, [f"{task.part}\t{line}"])
                        continue
                    offset = writer.add(f"{label:05d}/{i:09d}.{extension}", content)
                    rows.append((offset, len(content), label, width, height, zlib.crc32(content)))
                    names.append(source.names.raw(i))
                    tell(1, [])
                record = writer.close(path.name)
            self._sidecar(task).unlink(missing_ok=True)  # of an earlier shard: it must not describe this one
            os.replace(temporary_of(path), path)
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror or error}; {advice(error)}, then repeat the command to go on"
            ) from error
        more = np.frombuffer(encode_json((record, left_out)), np.uint8)
        atomic_write(self._sidecar(task), Index.make(task.number, rows, names).encode(more=more))

    def _sidecar(self, task: _Task) -> Path:
        return self.out / f"{task.part}-{task.number:05d}.npz"


def _fails(cause: BaseException | None) -> bool:
    """Whether the system could not read a file that is there. What decoders raise has no number."""
    return isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT, errno.ENOTDIR)


def _finish(job: _Job, data: LongTailData) -> Manifest:
    """Join the descriptions of the shards and write that of the pack, which makes it complete."""
    records: dict[str, PartRecord] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for part, source in job.sources.items():
        shards = [job.read_sidecar(task) for task in job.tasks() if task.part == part]
        index = Index.join([entries for entries, _, _ in shards])
        content = index.encode()
        counts[part] = np.bincount(index.label, minlength=data.num_classes)
        before = np.bincount(source.labels, minlength=data.num_classes)
        lost = np.flatnonzero((before > 0) & (counts[part] == 0))
        if len(lost) and (part == "train" or len(index) == 0):
            raise DataError(
                f"{data.name}: none of the {before[lost[0]]} {part} images of class {data.class_names[lost[0]]} can be "
                f"read; repair them, delete {job.out} and pack again"
            )
        atomic_write(job.out / index_name(part), content)
        file = FileRecord(index_name(part), len(content), hashlib.sha256(content).hexdigest())
        records[part] = PartRecord(
            images=len(index),
            index=file,
            shards=[record for _, record, _ in shards],
            left_out=[image for _, _, images in shards for image in images],
        )
    manifest = Manifest(
        version=VERSION,
        settings=job.settings,
        description=datasets()[data.name].description,
        source_fingerprint=data.fingerprint,
        class_names=data.class_names,
        class_counts=counts["train"].tolist(),
        mean=data.mean,
        std=data.std,
        **records,
    )
    atomic_write(job.out / MANIFEST, encode_json(manifest))
    _tidy(job.out)
    return manifest


def _summary(out: Path, manifest: Manifest) -> str:
    parts = (manifest.train, manifest.test)
    size = sum(file.bytes for part in parts for file in (part.index, *part.shards))
    files = sum(len(part.shards) for part in parts)
    lost = sum(len(part.left_out) for part in parts)
    left_out = f"; {lost} left out, listed in {out / MANIFEST}" if lost else ""
    images = f"{manifest.train.images:,} training and {manifest.test.images:,} test images"
    return f"{out}: {images} in {files} shards, {size / 1e6:,.1f} MB{left_out}"
