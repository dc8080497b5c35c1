"""A data set of image files in a few large ones: writing a pack, shard by shard, and resuming after a kill.

:mod:`shike_fast.data.pack.reader` reads what is written here.
"""

from __future__ import annotations

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

from shike_fast._util.files import LOCK, atomic_write, cannot_write, locked, replacing, temporary_of, why_not_writable
from shike_fast._util.processes import Tell, work
from shike_fast._util.progress import progress
from shike_fast._util.text import printable
from shike_fast.data.images.broken import most_broken
from shike_fast.data.images.decode import BrokenImageError
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import ImageStore
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
    decode_json,
    encode_json,
    index_name,
    shard_name,
)
from shike_fast.data.pack.shards import ShardWriter, encode_image
from shike_fast.data.types import LongTailData, fingerprint
from shike_fast.errors import DataError, RunError

_THEN = ", then repeat the command to go on"


@dataclass(frozen=True)
class Source:
    """The images of a part, before packing.

    Attributes:
        store: the images.
        labels: int64 [N].
        names: what the pack calls them.
    """

    store: ImageStore
    labels: NDArray[np.int64]
    names: PathTable

    @classmethod
    def of(cls, dataset: ImageDataset, folder: Path) -> Source:
        """The images of a data set, by their names relative to ``folder``.

        So a pack says nothing of the machine it was made on, and is the same wherever its source is.
        """
        prefix = f"{folder}{os.sep}"
        store = dataset.store
        return cls(store, dataset.labels, PathTable(store.name(i).removeprefix(prefix) for i in range(len(store))))


def identity(data: LongTailData, sources: dict[str, Source]) -> str:
    """Hash of the names and labels of all images: ``Settings.source``."""
    arrays = [array for source in sources.values() for array in (*source.names.arrays, source.labels)]
    return fingerprint(data.fingerprint.encode(), *arrays)


def write_pack(
    out: Path,
    data: LongTailData,
    sources: dict[str, Source],
    settings: Settings,
    *,
    description: str,
    strict: bool,
    workers: int,
) -> Manifest | None:
    """Write a pack, or what is missing of an unfinished one.

    Args:
        out: its folder: new, empty, or that of this pack.
        data: what is packed.
        sources: the images of each part.
        settings: what decides its bytes.
        description: of the data set, one line.
        strict: fail at an image that cannot be read instead of leaving it out.
        workers: processes.

    Returns:
        Its description; None where it was complete already.

    Raises:
        DataError: ``out`` holds something else, an image cannot be read and the pack is strict, or too many cannot.
        RunError: the pack cannot be written, or another process is writing it.
    """
    # Once more behind the lock: another process, for which this one has waited, may have finished it.
    if _is_complete(out, settings, strict):
        return None
    with locked(out):
        if _is_complete(out, settings, strict):
            return None
        if not (out / UNFINISHED).is_file():
            atomic_write(out / UNFINISHED, encode_json(settings))
        job = _Job(out, sources, settings, strict)
        finished = job.finished()
        if strict:
            _none_left_out(out, "an unfinished pack", [image for images in finished.values() for image in images])
        tasks = [task for task in job.tasks() if task not in finished]
        try:
            work(job.pack_shard, tasks, workers, _reporting(job, finished, sum(t.stop - t.start for t in tasks)))
        finally:
            for temporary in out.glob(".*.tmp"):
                temporary.unlink(missing_ok=True)
        return _finish(job, data, description)


def check_place(out: Path) -> None:
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


def _is_complete(out: Path, settings: Settings, strict: bool) -> bool:
    """Whether ``out`` holds the whole pack.

    Raises:
        DataError: it holds something else than this pack, finished or not, or not all images, where all are wanted.
    """
    check_place(out)
    if (out / MANIFEST).is_file():
        manifest = reader.read_manifest(out)
        _same(out, "a pack", manifest.settings, settings)
        if strict:
            _none_left_out(out, "a pack", [*manifest.train.left_out, *manifest.test.left_out])
        reader.open_parts(out, manifest)
        _tidy(out)
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
        if there == here or name in ("options", "split"):  # which count as far as they choose other images
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


@dataclass(frozen=True)
class _Task:
    """A shard: images ``start`` … ``stop - 1`` of a part."""

    part: str
    number: int
    start: int
    stop: int


def _reporting(
    job: _Job, finished: dict[_Task, list[LeftOut]], total: int
) -> Callable[[], contextlib.AbstractContextManager[Tell]]:
    """Takes how many more images are done, and a line ``part, tab, name: reason`` for each one left out."""

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
    sources: dict[str, Source]
    settings: Settings
    strict: bool

    def tasks(self) -> Iterator[_Task]:
        for part, source in self.sources.items():
            size = self.settings.shard_images
            for number, start in enumerate(range(0, len(source.labels), size)):
                yield _Task(part, number, start, min(start + size, len(source.labels)))

    def most_left_out(self, part: str) -> int:
        """As many images of a part may be left out as training tolerates."""
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
            with replacing(path, then=_THEN) as file:
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
        except OSError as error:
            raise cannot_write(path, error, _THEN) from error
        more = np.frombuffer(encode_json((record, left_out)), np.uint8)
        atomic_write(self._sidecar(task), Index.make(task.number, rows, names).encode(more=more))

    def _sidecar(self, task: _Task) -> Path:
        return self.out / f"{task.part}-{task.number:05d}.npz"


def _fails(cause: BaseException | None) -> bool:
    """Whether the system could not read a file that is there. What decoders raise has no number."""
    return isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT, errno.ENOTDIR)


def _finish(job: _Job, data: LongTailData, description: str) -> Manifest:
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
        description=description,
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
