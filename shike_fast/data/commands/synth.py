"""Generate a small long-tailed data set in the form of a published one, to try programs on it without the real one.

The photographs are generated patterns that a network can learn. They depend on --seed and the other options alone, not
on --workers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shike_fast._util.cli import cores, whole_number
from shike_fast._util.files import atomic_write, why_not_writable, writable
from shike_fast._util.processes import Tell, work
from shike_fast._util.progress import progress
from shike_fast.data.commands import synthetic_layouts as layouts
from shike_fast.data.commands.synthetic import image_sizes, render, style_of
from shike_fast.data.datasets.counts import SYNTHETIC_FILE, GeneratedSet
from shike_fast.data.random import check_seed
from shike_fast.errors import ConfigError, DataError, RunError

MOST_CLASSES = 9999  # folders and names have four digits
SHORT_SIDES = (8, 4096)
QUALITY = 88  # of the JPEGs

_CHUNK = 64  # images that a process takes at a time
_SIZES = 0  # streams of random numbers: a split's number is added to the other one
_PROFILE = 1
_IMAGES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``synth``."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="folder of the data set: new or empty")
    add("--like", required=True, choices=tuple(layouts.LAYOUTS), help="the data set whose form it takes")
    add("--classes", required=True, type=whole_number(1), metavar="N", help="number of classes")
    add("--images", required=True, type=whole_number(1), metavar="M", help="training images in all")
    add("--seed", type=int, default=0, help="default 0")
    add(
        "--test-per-class",
        type=whole_number(1),
        metavar="T",
        help="test images of each class (default: as published, up to 10)",
    )
    add("--short-side", type=whole_number(1), default=256, metavar="PX", help="of the images (default 256)")
    add("--workers", type=whole_number(1), metavar="N", help="processes; default: one for each CPU")


@dataclass(frozen=True)
class _Split:
    """The images of a split: where they go, their labels [N], widths and heights [N, 2]."""

    number: int
    paths: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]


def run(arguments: argparse.Namespace) -> int:
    """Write the data set; returns the exit status."""
    root: Path = arguments.directory
    _check(arguments)
    layout = layouts.LAYOUTS[arguments.like]
    splits = _plan(arguments, layout)
    folders = {os.path.dirname(path) for split in splits.values() for path in split.paths}
    with writable(root):
        for folder in sorted(folders):
            (root / folder).mkdir(parents=True, exist_ok=True)
    _write_images(root, list(splits.values()), arguments)
    listed = {
        name: layouts.Listed(split.paths, split.labels.tolist(), split.sizes.tolist()) for name, split in splits.items()
    }
    for name, content in layout.describe(listed, arguments.classes, arguments.seed).items():
        atomic_write(root / name, content)
    counts = GeneratedSet(
        like=arguments.like,
        classes=arguments.classes,
        images={name: len(split.labels) for name, split in splits.items()},
    )
    # The last file: without it, what an interrupted run left is no data set.
    atomic_write(root / SYNTHETIC_FILE, msgspec.json.format(msgspec.json.encode(counts)) + b"\n")
    sizes = ", ".join(f"{number:,} {name}" for name, number in counts.images.items())
    per_class = np.bincount(splits["train"].labels, minlength=arguments.classes)
    print(
        f"{root}: {sizes} images of {counts.classes:,} classes, {per_class.max():,} to {per_class.min():,} of a class"
    )
    print(f"use it with --dataset {arguments.like} --data-dir {root}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    root: Path = arguments.directory
    if not 2 <= arguments.classes <= MOST_CLASSES:
        raise ConfigError(f"--classes must be 2 … {MOST_CLASSES}, got {arguments.classes}")
    if arguments.images < arguments.classes:
        raise ConfigError(
            f"--images {arguments.images} are too few for {arguments.classes} classes; every class must have one"
        )
    if not SHORT_SIDES[0] <= arguments.short_side <= SHORT_SIDES[1]:
        raise ConfigError(f"--short-side must be {SHORT_SIDES[0]} … {SHORT_SIDES[1]}, got {arguments.short_side}")
    try:
        check_seed(arguments.seed)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: is not a folder; choose another place for the data set")
    if (reason := why_not_writable(root)) is not None:
        raise DataError(f"{root}: cannot be written ({reason}); choose another folder")
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{root}: is not empty; choose another folder, or remove what an interrupted run left")


def tail_counts(images: int, classes: int, imbalance_factor: float) -> NDArray[np.int64]:
    """Sizes of the classes of a long-tailed set, largest first: max(least, ⌊x · IF^(-c/(C-1))⌋), with the sum exact.

    ``least`` is 2 where there are enough images, and otherwise 1.

    Args:
        images: how many in all, at least ``classes``.
        classes: C, at least 2.
        imbalance_factor: IF, reached where there are enough images.
    """
    least = 2 if images >= 2 * classes else 1
    weights = imbalance_factor ** (-np.arange(classes) / (classes - 1))

    def counts(x: float) -> NDArray[np.int64]:
        return np.maximum(least, np.floor(x * weights).astype(np.int64))

    low, high = 0.0, float(images + 1)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if counts(middle).sum() <= images else (low, middle)
    result = counts(low)
    # What is left over because classes grow at the same x goes to the largest ones.
    more, rest = divmod(images - int(result.sum()), classes)
    result += more
    result[:rest] += 1
    return result


def _plan(arguments: argparse.Namespace, layout: layouts.Layout) -> dict[str, _Split]:
    """What is to be written, drawn before any process starts."""
    classes, seed = arguments.classes, arguments.seed
    random = np.random.default_rng((seed, _PROFILE))
    # As in the real sets, the number of a class says nothing of its size, nor its place in the file of its class.
    sizes = random.permutation(tail_counts(arguments.images, classes, layout.imbalance_factor))
    test = arguments.test_per_class or min(10, layout.test_per_class)
    labels = {"train": np.repeat(np.arange(classes), sizes)}
    if layout.has_val:
        labels["val"] = np.repeat(np.arange(classes), max(1, test // 2))
    labels["test"] = np.repeat(np.arange(classes), test)
    labels = {name: random.permutation(values) for name, values in labels.items()}
    paths = layout.paths(labels, classes, seed)
    random = np.random.default_rng((seed, _SIZES))
    return {
        name: _Split(number, paths[name], labels[name], image_sizes(len(labels[name]), arguments.short_side, random))
        for number, name in enumerate(labels)
    }


def _write_images(root: Path, splits: list[_Split], arguments: argparse.Namespace) -> None:
    seed = arguments.seed

    def write(task: tuple[_Split, range], tell: Tell) -> None:
        split, indices = task
        for index in indices:
            random = np.random.default_rng((seed, _IMAGES + split.number, index))
            width, height = split.sizes[index].tolist()
            pixels = render(style_of(int(split.labels[index])), width, height, random)
            path = root / split.paths[index]
            try:
                path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420"))
            except OSError as error:
                raise RunError(f"cannot write {path}: {error.strerror or error}") from error
            tell(1, [])

    tasks = [
        (split, range(start, min(start + _CHUNK, len(split.paths))))
        for split in splits
        for start in range(0, len(split.paths), _CHUNK)
    ]
    total = sum(len(split.paths) for split in splits)
    work(write, tasks, arguments.workers or cores(), _reporting(total))


def _reporting(total: int) -> Callable[[], contextlib.AbstractContextManager[Tell]]:
    @contextlib.contextmanager
    def report() -> Iterator[Tell]:
        with progress("generating", total) as advance:
            yield lambda count, lines: advance(count)

    return report
