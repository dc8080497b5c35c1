"""``inat18``: iNaturalist 2018 (Van Horn et al., "The iNaturalist Species Classification and Detection Dataset")."""

from __future__ import annotations

from pathlib import Path

from shike_fast.data.augment.photo import photo_augmentations
from shike_fast.data.datasets.coco import read_categories, read_images
from shike_fast.data.datasets.counts import check_classes, check_count, expected_counts
from shike_fast.data.datasets.layouts import Layout, build_listed, numbered_names
from shike_fast.data.datasets.lists import Lists, read_lists
from shike_fast.data.recipes import PHOTOGRAPHS
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import Counts, DatasetInfo, LoadOptions, LongTailData, require_data_dir
from shike_fast.errors import DataError

TRAIN_JSON, VAL_JSON = "train2018.json", "val2018.json"
TRAIN_LIST, VAL_LIST = "iNaturalist18_train.txt", "iNaturalist18_val.txt"
CATEGORIES = "categories.json"  # the species' names: the first form of the two files above had none
ANNOTATIONS = "annotations"  # folder in which the JSON files may be
IMAGES = "train_val2018"

MEAN = (0.466, 0.471, 0.380)
STD = (0.195, 0.194, 0.192)


INFO = DatasetInfo(
    name="inat18",
    description="iNaturalist 2018: 437,513 training and 24,426 test photographs, 8142 species of 1000 to 2",
    how_obtained=(
        f"--data-dir DIR with {TRAIN_JSON}, {VAL_JSON} (or {TRAIN_LIST}, {VAL_LIST}) and {IMAGES}/ of the "
        "iNaturalist 2018 competition (visipedia/inat_comp)"
    ),
    default_imbalance_factor=None,
    augmentations=photo_augmentations("rrc-randaugment"),
    resizable=True,
    counts=Counts(8142, {"train": 437_513, "test": 24_426}),
    recipe=PHOTOGRAPHS
    | {"batch_size": 512, "lr": 0.2, "stage2_lr": 0.2 * (2 / 3), "weight_decay": 2e-4},  # --epochs 100 is 90 + 10
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Read the JSON files, or else the lists; the validation images are the test set."""
    root = require_data_dir(info, options)
    folder = next((folder for folder in (root, root / ANNOTATIONS) if (folder / TRAIN_JSON).exists()), None)
    names: tuple[str, ...] | None = None
    if folder is not None:
        lists, names = _read_json(info, options, root, folder)
    elif (root / TRAIN_LIST).exists():
        lists = read_lists(info, options, train=TRAIN_LIST, test=VAL_LIST)
    else:
        raise DataError(
            f"{info.name}: neither {root / TRAIN_JSON} nor {root / ANNOTATIONS / TRAIN_JSON} nor {root / TRAIN_LIST} "
            f"is there; {info.how_obtained}"
        )
    layouts = [Layout(), Layout(IMAGES)]
    class_names = _class_names(root, lists.num_classes, names)
    return build_listed(info, options, lists, layouts=layouts, class_names=class_names, mean=MEAN, std=STD)


def _read_json(info: DatasetInfo, options: LoadOptions, root: Path, folder: Path) -> tuple[Lists, tuple[str, ...]]:
    train_path, val_path = folder / TRAIN_JSON, folder / VAL_JSON
    if not val_path.exists():
        raise DataError(f"{info.name}: no {val_path}; {info.how_obtained}")
    counts = expected_counts(info, root)
    if not options.verify:
        counts = None
    train, names = read_images(train_path)
    test, test_names = read_images(val_path, names)
    if test_names != names:
        raise DataError(f"{val_path}: its categories are not those of {train_path}; obtain both files again")
    if counts is not None:
        if len(names) != counts.classes:
            raise DataError(
                f"{train_path}: expected {counts.classes:,} categories ({counts.kind}), got {len(names):,}; "
                "obtain the file again, or accept it as it is with --no-verify"
            )
        check_count(counts, "train", len(train), train_path)
        check_classes(counts, train.labels, train_path)
        check_count(counts, "test", len(test), val_path)
    return Lists(train, test, len(names)), names


def _class_names(root: Path, num_classes: int, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of categories.json, if it is there."""
    path = next((path for path in (root / CATEGORIES, root / ANNOTATIONS / CATEGORIES) if path.exists()), None)
    if path is None:
        return names or numbered_names(num_classes)
    found = read_categories(path)
    if len(found) < num_classes:
        raise DataError(
            f"{path}: expected {num_classes:,} categories, got {len(found):,}; obtain the file again or remove it"
        )
    return found[:num_classes]
