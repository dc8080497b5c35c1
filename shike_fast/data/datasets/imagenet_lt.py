"""``imagenet-lt``: ImageNet-LT (Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019)."""

from __future__ import annotations

from pathlib import Path

from shike_fast.data.augment.photo import photo_augmentations
from shike_fast.data.datasets.layouts import Layout, build_listed
from shike_fast.data.datasets.lists import class_folders, read_lists, read_names
from shike_fast.data.recipes import PHOTOGRAPHS
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import Counts, DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

TRAIN_LIST, VAL_LIST, TEST_LIST = "ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt"
SYNSETS = "LOC_synset_mapping.txt"  # of the Kaggle form of ImageNet: "n01440764 tench, Tinca tinca"
KAGGLE = "ILSVRC/Data/CLS-LOC"  # where that form keeps train/ and val/

_KAGGLE_PREFIX = f"{KAGGLE}/".encode()

INFO = DatasetInfo(
    name="imagenet-lt",
    description="ImageNet-LT: 115,846 training and 50,000 test photographs, 1000 classes of 1280 to 5",
    how_obtained=(
        "--data-dir DIR with train/ and val/ of ImageNet (ILSVRC 2012, image-net.org, after registration) and with the "
        f"lists {TRAIN_LIST}, {VAL_LIST}, {TEST_LIST} of OpenLongTailRecognition-OLTR"
    ),
    default_imbalance_factor=None,
    augmentations=photo_augmentations("rrc-jitter-randaugment"),
    resizable=True,
    counts=Counts(1000, {"train": 115_846, "val": 20_000, "test": 50_000}),
    recipe=PHOTOGRAPHS | {"stage2_lr": 0.1 * (2 / 3)},
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read the lists and find the images on disk. The list of the validation images is only checked."""
    root = require_data_dir(info, options)
    lists = read_lists(info, options, train=TRAIN_LIST, test=TEST_LIST, val=VAL_LIST)
    folders = class_folders(lists.train, lists.num_classes, _class_folder)
    class_names = _class_names(root, folders)
    return build_listed(info, options, lists, layouts=_layouts(folders), class_names=class_names)


def _class_folder(path: bytes) -> bytes | None:
    """n01440764 of train/n01440764/X.JPEG."""
    parts = path.split(b"/")
    return parts[-2] if len(parts) > 2 else None


def _layouts(folders: list[bytes | None]) -> list[Layout]:
    """Lists and disks have val/n01440764/X.JPEG or val/X.JPEG; the class folder follows from the label."""

    def plain(path: bytes, label: int) -> bytes:
        return path.removeprefix(_KAGGLE_PREFIX)

    def flat(path: bytes, label: int) -> bytes | None:
        part, _, rest = plain(path, label).partition(b"/")
        return part + b"/" + rest.rpartition(b"/")[2] if part == b"val" else None

    def in_class_folder(path: bytes, label: int) -> bytes | None:
        part, _, rest = plain(path, label).partition(b"/")
        folder = folders[label]
        if part != b"val" or folder is None:
            return None
        return b"/".join((part, folder, rest.rpartition(b"/")[2]))

    as_listed = [Layout(), Layout(KAGGLE)]
    return as_listed + [Layout(folder, form) for folder in ("", KAGGLE) for form in (plain, flat, in_class_folder)]


def _class_names(root: Path, folders: list[bytes | None]) -> tuple[str, ...]:
    """WordNet ids, or what they stand for where the folder holds the file that says it."""
    readable: dict[str, str] = {}
    path = root / SYNSETS
    if path.exists():
        for line in read_names(path):
            synset, _, words = line.partition(" ")
            if not words:
                raise DataError(f"{path}: expected lines 'n01440764 name', got {line[:100]!r}; obtain or remove it")
            readable[synset] = words
    names = (
        f"class {label:04d}" if folder is None else folder.decode("utf-8", "replace")
        for label, folder in enumerate(folders)
    )
    return tuple(readable.get(name, name) for name in names)
