"""``imagefolder``: a user's own images, one folder a class."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from shike_fast.data._random import STREAM_AUGMENTATION, draw_words
from shike_fast.data.augment import Normalise
from shike_fast.data.base import (
    DatasetInfo,
    LoadOptions,
    LongTailData,
    count_classes,
    fingerprint,
    register_dataset,
    require_data_dir,
)
from shike_fast.data.image_transforms import IMAGENET_MEAN, IMAGENET_STD, WORDS, evaluation_transform, train_transform
from shike_fast.data.longtail import long_tail_indices
from shike_fast.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
DEFAULT_SIZE = 224

INFO = DatasetInfo(
    name="imagefolder",
    description="your own images, 224x224 colour crops, one folder a class",
    how_obtained="--data-dir DIR with the images in DIR/train/CLASS and DIR/val/CLASS (or DIR/test/CLASS)",
    default_imbalance_factor=None,
    augmentations=("rrc", "rrc-jitter", "none"),
    resizable=True,
)


class PathTable:
    """File names in two arrays instead of a list of strings: workers share the memory, and sending them is one copy."""

    def __init__(self, paths: list[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._bounds = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._bounds[index] : self._bounds[index + 1]].tobytes())

    def take(self, indices: NDArray[np.int64]) -> "PathTable":
        """The table of some of the names."""
        return PathTable([self[i] for i in indices])


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Image files, decoded and transformed one by one.

    Attributes:
        root: folder that the paths are relative to.
        paths: file names of the samples.
        labels: int64 [N].
        augmentation: "none" (resize the short side to size · 256/224, centre crop), "rrc" or "rrc-jitter".
        size: side of the images in pixels.
        seed: seed of the augmentation where the caller names no other.
        one_by_one: worker processes pay off.
    """

    def __init__(
        self, root: Path, paths: PathTable, labels: NDArray[np.int64], *, augmentation: str, size: int, seed: int = 0
    ) -> None:
        self.root = root
        self.paths = paths
        self.labels = labels
        self.augmentation = augmentation
        self.size = size
        self.seed = seed
        self.one_by_one = True
        self._normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(np.array([range(len(self))[index]]), seed=self.seed, epoch=0)
        return images[0], int(labels[0])

    def batch(self, indices: NDArray[np.int64], *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [B, C, H, W] and int64 labels [B]; a row depends on (seed, epoch, index) alone.

        Raises:
            DataError: an image cannot be decoded; names the file.
        """
        words = draw_words(seed, epoch, indices, WORDS, STREAM_AUGMENTATION)
        pixels = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        for b, index in enumerate(indices):
            image = self._decode(self.root / self.paths[index])
            if self.augmentation == "none":
                image = evaluation_transform(image, self.size)
            else:
                image = train_transform(image, self.size, words[b], jitter=self.augmentation == "rrc-jitter")
            pixels[b] = np.asarray(image).transpose(2, 0, 1)
        return self._normalise(pixels), torch.from_numpy(self.labels[indices])

    @staticmethod
    def _decode(path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many types on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{path}: cannot be decoded as an image ({reason}); replace or remove it") from error


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """List the files of train/CLASS and val/CLASS (without a val: test/CLASS); classes in alphabetical order."""
    root = require_data_dir(info, options)
    train_dir = root / "train"
    test_dir = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if not train_dir.is_dir():
        raise DataError(f"{info.name}: no folder {train_dir}; {info.how_obtained}")
    if test_dir is None:
        raise DataError(f"{info.name}: neither {root / 'val'} nor {root / 'test'} is a folder; {info.how_obtained}")
    class_names = _class_names(train_dir)
    if len(class_names) < 2:
        raise DataError(f"{train_dir}: holds one class, {class_names[0]}; there must be two class folders or more")
    for name in _class_names(test_dir):
        if name not in class_names:
            raise DataError(
                f"{test_dir / name}: a class without a folder in {train_dir}; add its training images or remove it"
            )
    paths, labels, sizes = _list_part(root, train_dir, class_names)
    if options.imbalance_factor is not None:
        kept = long_tail_indices(labels, len(class_names), options.imbalance_factor)
        paths, labels, sizes = paths.take(kept), labels[kept], sizes[kept]
    test_paths, test_labels, _ = _list_part(root, test_dir, class_names)
    size = options.image_size or DEFAULT_SIZE
    return LongTailData(
        name=info.name,
        train=FolderDataset(root, paths, labels, augmentation=options.augmentation, size=size, seed=options.seed),
        test=FolderDataset(root, test_paths, test_labels, augmentation="none", size=size),
        class_names=class_names,
        class_counts=count_classes(labels, len(class_names)),
        in_channels=3,
        image_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        imbalance_factor=options.imbalance_factor,
        augmentation=options.augmentation,
        fingerprint=fingerprint(
            "\0".join(paths[i] for i in range(len(paths))).encode("utf-8", "surrogateescape"), sizes, labels
        ),
    )


def _class_names(part: Path) -> tuple[str, ...]:
    with _reading(part):
        names = sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(
            f"{part}: no class folders; put the images of each class into a folder of its own, {part}/CLASS"
        )
    return tuple(names)


def _list_part(
    root: Path, part: Path, class_names: tuple[str, ...]
) -> tuple[PathTable, NDArray[np.int64], NDArray[np.int64]]:
    """Paths relative to ``root``, labels and sizes in bytes of the images of a part, sorted by class and name."""
    paths: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    for label, name in enumerate(class_names):
        folder = part / name
        if not folder.is_dir():
            continue  # a class without test images: it counts in no test average
        with _reading(folder):
            files = sorted(_image_files(folder))
            sizes += [os.path.getsize(path) for path in files]
        if not files:
            raise DataError(
                f"{folder}: no images of this class ({', '.join(EXTENSIONS)}); add some or remove the folder"
            )
        paths += [os.path.relpath(path, root) for path in files]
        labels += [label] * len(files)
    return PathTable(paths), np.array(labels, dtype=np.int64), np.array(sizes, dtype=np.int64)


def _image_files(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it cannot list

    found = []
    for directory, _, names in os.walk(folder, onerror=fail):
        # Names that start with a dot are no images: macOS leaves "._x.jpg" beside "x.jpg".
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
