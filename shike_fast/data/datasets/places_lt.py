"""``places-lt``: Places-LT (Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shike_fast.data.augment.photo import photo_augmentations
from shike_fast.data.datasets.layouts import Layout, Rewrite, build_listed
from shike_fast.data.datasets.lists import class_folders, read_lists, read_names
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import Counts, DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

TRAIN_LIST, VAL_LIST, TEST_LIST = "Places_LT_train.txt", "Places_LT_val.txt", "Places_LT_test.txt"
CATEGORIES = "categories_places365.txt"  # lines "/a/airfield 0"

_STANDARD = b"places365_standard"
_TRAIN_WITH_LETTER = (b"data_256", b"data_large")
_VAL = (b"val", b"val_256", b"val_large")

# Where images may be. {category} is apartment_building/outdoor, {joined} apartment_building-outdoor, {letter} a.
_TRAIN_FOLDERS = (
    "train/{category}",
    "train/{joined}",
    "data_256/{letter}/{category}",
    "data_large/{letter}/{category}",
    "places365_standard/train/{category}",
    "places365_standard/train/{joined}",
)
_VAL_FOLDERS = (
    "val_256",
    "val_large",
    "val",
    "val/{category}",
    "val/{joined}",
    "val_256/{category}",
    "places365_standard/val/{category}",
    "places365_standard/val/{joined}",
    "places365_standard/val",
)

INFO = DatasetInfo(
    name="places-lt",
    description="Places-LT: 62,500 training and 36,500 test photographs, 365 classes of 4980 to 5",
    how_obtained=(
        "--data-dir DIR with the images of Places365-Standard (places2.csail.mit.edu) and with the lists "
        f"{TRAIN_LIST}, {VAL_LIST}, {TEST_LIST} of OpenLongTailRecognition-OLTR"
    ),
    default_imbalance_factor=None,
    augmentations=photo_augmentations("rrc-jitter"),
    resizable=True,
    counts=Counts(365, {"train": 62_500, "val": 7_300, "test": 36_500}),
    recipe={
        "model": "resnet152",
        "epochs": 40,
        "stage2_epochs": 10,
        "batch_size": 256,
        "lr": 0.02,
        "stage2_lr": 0.02 * (2 / 3),
        "weight_decay": 4e-4,
        "warmup_epochs": 0,
        "needs_pretrained": True,
    },
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read the lists and find the images on disk. The list of the validation images is only checked."""
    root = require_data_dir(info, options)
    lists = read_lists(info, options, train=TRAIN_LIST, test=TEST_LIST, val=VAL_LIST)
    categories = class_folders(lists.train, lists.num_classes, lambda path: parse(path).category)
    class_names = _class_names(root, categories)
    return build_listed(info, options, lists, layouts=_layouts(categories), class_names=class_names)


class Place(NamedTuple):
    """What a path says: b"train", b"val" or neither; the category, where a folder names it; the file's own name."""

    part: bytes | None
    category: bytes | None
    file: bytes


def parse(path: bytes) -> Place:
    """Understand a path in any of the forms that lists and disks have."""
    *folders, file = path.split(b"/")
    if folders[:1] == [_STANDARD]:
        folders = folders[1:]
    if not folders:
        return Place(None, None, file)
    if folders[0] in _TRAIN_WITH_LETTER:
        part, inner = b"train", folders[2:]
    elif folders[0] == b"train":
        part, inner = b"train", folders[1:]
    elif folders[0] in _VAL:
        part, inner = b"val", folders[1:]
    else:
        return Place(None, None, file)
    # One form joins nested categories: apartment_building-outdoor. No category has a hyphen.
    return Place(part, b"/".join(inner).replace(b"-", b"/") or None, file)


def _layouts(categories: list[bytes | None]) -> list[Layout]:
    def rewrite(wanted: bytes, folder: str) -> Rewrite:
        before, _, field = folder.partition("{")
        prefix = before.encode()

        def rewritten(path: bytes, label: int) -> bytes | None:
            part, category, file = parse(path)
            if part != wanted:
                return None
            if not field:
                return prefix + b"/" + file
            category = category or categories[label]
            if category is None:
                return None
            if field.startswith("letter"):
                category = category[:1] + b"/" + category
            elif field.startswith("joined"):
                category = category.replace(b"/", b"-")
            return prefix + category + b"/" + file

        return rewritten

    train = [Layout("", rewrite(b"train", folder)) for folder in _TRAIN_FOLDERS]
    return [Layout(), *train, *(Layout("", rewrite(b"val", folder)) for folder in _VAL_FOLDERS)]


def _class_names(root: Path, categories: list[bytes | None]) -> tuple[str, ...]:
    """The categories of the training paths; where a path has none, that of the file of categories."""
    listed: dict[int, str] = {}
    path = root / CATEGORIES
    if path.exists():
        for line in read_names(path):
            name, _, label = line.rpartition(" ")
            if not name or not label.isdecimal():
                raise DataError(f"{path}: expected lines '/a/airfield 0', got {line[:100]!r}; obtain or remove it")
            listed[int(label)] = name[3:] if name[:1] == "/" and name[2:3] == "/" else name
    return tuple(
        listed.get(label, f"class {label:03d}") if category is None else category.decode("utf-8", "replace")
        for label, category in enumerate(categories)
    )
