"""``digits-lt``: the 8×8 digits bundled with scikit-learn, resized if wanted; nothing to download."""

import numpy as np

from shike_fast.data.images.arrays import build_arrays
from shike_fast.data.random import permutation
from shike_fast.data.recipes import TEN_CLASSES
from shike_fast.data.registry import register_dataset
from shike_fast.data.types import DatasetInfo, LoadOptions, LongTailData

CLASSES = 10
# A class has 174 … 183 images. The same number of test images for each keeps per-class accuracies comparable, and the
# same number left to train on keeps the counts of the long-tail formula exact.
TEST_PER_CLASS = 60
TRAIN_PER_CLASS = 114
_SPLIT_SEED = 1797  # fixed: the split is part of the data set, it never follows the run's seed

INFO = DatasetInfo(
    name="digits-lt",
    description="handwritten digits, 8x8 grey, 10 classes (383 training images at imbalance factor 20, 600 to test)",
    how_obtained="bundled with scikit-learn, nothing to download",
    default_imbalance_factor=20.0,
    augmentations=("shift", "none", "crop-flip", "cifar"),
    resizable=True,
    # 383 images of 8x8: too small to share among threads, and at the published scale 30 learned by heart at once
    recipe=TEN_CLASSES
    | {
        "model": "resnet8",
        "epochs": 60,
        "stage2_epochs": 12,
        "batch_size": 16,
        "lr": 0.1,
        "stage2_lr": 0.1,
        "weight_decay": 5e-3,
        "scale": 16.0,
        "threads": 1,
    },
)


@register_dataset(INFO)
def load(info: DatasetInfo, options: LoadOptions) -> LongTailData:
    """Split off 60 test images of each class, then take the long-tail subset of 114 training images of each."""
    from sklearn.datasets import load_digits  # takes a second to import: only when these digits are wanted

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # grey levels 0 … 16
    train, test = [], []
    for c in range(CLASSES):
        members = np.flatnonzero(labels == c)
        shuffled = members[permutation(_SPLIT_SEED, c, len(members))]
        test.append(shuffled[:TEST_PER_CLASS])
        train.append(np.sort(shuffled[TEST_PER_CLASS : TEST_PER_CLASS + TRAIN_PER_CLASS]))  # back in file order
    train_indices, test_indices = np.concatenate(train), np.sort(np.concatenate(test))
    return build_arrays(
        info,
        options,
        train=(images[train_indices], labels[train_indices]),
        test=(images[test_indices], labels[test_indices]),
        class_names=tuple(str(c) for c in range(CLASSES)),
        mean=(0.305,),
        std=(0.376,),
    )
