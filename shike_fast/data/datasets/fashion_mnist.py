"""``fashion-mnist-lt``: Fashion-MNIST (Xiao et al., arXiv 1708.07747) from its IDX files."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shike_fast.data.datasets.archives import AGAIN, read_file
from shike_fast.data.images.arrays import build_arrays
from shike_fast.data.recipes import SMALL_IMAGES, TEN_CLASSES
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData, check_labels
from shike_fast.errors import DataError

SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
CLASS_NAMES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SIDE = 28

INFO = DatasetInfo(
    name="fashion-mnist-lt",
    description="clothing, 28x28 grey, 10 classes (60,000 images before the subset, 10,000 to test)",
    how_obtained="apt-get install dataset-fashion-mnist (Debian), or --data-dir DIR with the four IDX files",
    default_imbalance_factor=100.0,
    augmentations=("crop-flip", "none", "shift", "cifar"),
    recipe=SMALL_IMAGES | TEN_CLASSES | {"epochs": 100},
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read the four IDX files and take the long-tail subset."""
    folder = options.data_dir or SYSTEM_DIR
    return build_arrays(
        info,
        options,
        train=_read_part(folder, "train", 60_000 if options.verify else None),
        test=_read_part(folder, "t10k", 10_000 if options.verify else None),
        class_names=CLASS_NAMES,
        mean=(0.2860,),
        std=(0.3530,),
    )


def _read_part(folder: Path, part: str, expected: int | None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    image_file = _find(folder, f"{part}-images-idx3-ubyte")
    label_file = _find(folder, f"{part}-labels-idx1-ubyte")
    images = _read_idx(image_file, 3)
    labels = _read_idx(label_file, 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise DataError(
            f"{image_file}: images of {images.shape[1]}x{images.shape[2]} pixels, expected {SIDE}x{SIDE}; {AGAIN}"
        )
    if len(images) != len(labels):
        raise DataError(
            f"{label_file}: {len(labels)} labels for the {len(images)} images of {image_file.name}; {AGAIN}"
        )
    if expected is not None and len(images) != expected:
        raise DataError(f"{image_file}: {len(images)} images, expected {expected}; {AGAIN}")
    classes = labels.astype(np.int64)
    check_labels(classes, len(CLASS_NAMES), str(label_file))
    return images[:, None], classes


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"{INFO.name}: no {name} or {name}.gz in {folder}; {INFO.how_obtained}")


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: 0, 0, 8, number of dimensions, big-endian sizes, data."""
    content = read_file(path)
    magic = bytes((0, 0, 8, dimensions))
    header = 4 + 4 * dimensions
    if content[:4] != magic or len(content) < header:
        raise DataError(
            f"{path}: not an IDX file of {dimensions}-dimensional bytes (wrong magic number or no header); {AGAIN}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    size = int(np.prod(shape, dtype=object))  # Python integers: a corrupt header must not overflow
    if len(content) - header != size:
        raise DataError(
            f"{path}: {len(content) - header} bytes of data, expected {size} for shape {list(shape)}; {AGAIN}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
