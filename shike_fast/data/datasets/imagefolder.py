"""``imagefolder``: a user's own images, one folder a class."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shike_fast._util.text import printable
from shike_fast.data.datasets.own import own_images
from shike_fast.data.datasets.validation import SplitOptions, build_parts
from shike_fast.data.images.files import ImagePart
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

INFO = own_images(
    "imagefolder",
    "one folder a class",
    "--data-dir DIR with the images in DIR/train/CLASS and DIR/val/CLASS (or DIR/test/CLASS), or all in DIR/CLASS",
    SplitOptions,
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """List the files of train/CLASS and val/CLASS (without a val: test/CLASS); classes in alphabetical order.

    Without a val and a test some training images are set aside. Without a train as well all images are in DIR/CLASS.
    """
    root = require_data_dir(info, options)
    train_dir = root / "train"
    test_dir = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if not train_dir.is_dir():
        if test_dir is not None:
            raise DataError(f"{info.name}: no folder {train_dir}; {info.how_obtained}")
        train_dir = root
    folders = _class_folders(train_dir)
    if len(folders) < 2:
        raise DataError(f"{train_dir}: holds one class, {folders[0]}; there must be two class folders or more")
    paths, labels, sizes = _list_part(root, train_dir, folders)
    test = None
    if test_dir is not None:
        for name in _class_folders(test_dir):
            if name not in folders:
                raise DataError(
                    f"{test_dir / name}: a class without a folder in {train_dir}; add its training images or remove it"
                )
        test_paths, test_labels, _ = _list_part(root, test_dir, folders)
        test = ImagePart(FileStore(root, test_paths), test_labels)
    return build_parts(
        info,
        options,
        train=ImagePart(FileStore(root, paths), labels),
        test=test,
        names=paths,
        sizes=sizes,
        class_names=tuple(printable(os.fsencode(name)) for name in folders),
        source=root,
    )


def _class_folders(part: Path) -> tuple[str, ...]:
    with _reading(part):
        names = sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(
            f"{part}: no class folders; put the images of each class into a folder of its own, {part}/CLASS"
        )
    return tuple(names)


def _list_part(
    root: Path, part: Path, folders: tuple[str, ...]
) -> tuple[PathTable, NDArray[np.int64], NDArray[np.int64]]:
    """Paths relative to ``root``, labels and sizes in bytes of the images of a part, sorted by class and name."""
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(folders):
        folder = part / name
        if not folder.is_dir():
            continue  # a class without test images: it counts in no test average
        with _reading(folder):
            files = sorted(image_files(folder))
            sizes += [_size(path) for path in files]
        if not files:
            raise DataError(
                f"{folder}: no images of this class ({', '.join(EXTENSIONS)}); add some or remove the folder"
            )
        paths += [os.path.relpath(path, root) for path in files]
        labels += [label] * len(files)
    return PathTable(paths), np.array(labels, dtype=np.int64), np.array(sizes, dtype=np.int64)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:  # a link to nowhere: an image that cannot be read, like others
        return 0


def image_files(folder: Path) -> list[str]:
    """The images in a folder and all folders below it, by their extensions, in no order.

    Names that begin with a dot are passed over, of files and of folders: Jupyter leaves ``.ipynb_checkpoints`` with
    copies of images, macOS ``._x.jpg`` beside ``x.jpg``.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it cannot list

    found = []
    for directory, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk goes into those that are left
        found += [os.path.join(directory, n) for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(".")]
    # Opening a pipe or a device would wait for ever. A link to nowhere stays, to be named as unreadable.
    return [path for path in found if os.path.isfile(path) or not os.path.exists(path)]


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn a failure to list ``folder`` into a DataError that names what cannot be read."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error
