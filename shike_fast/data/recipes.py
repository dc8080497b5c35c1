"""The two recipes for data sets that come without one; each value can be overridden by a flag.

A recipe is a mapping of training settings by name: ``model``, ``epochs`` (of both stages), ``stage2_epochs`` (those of
them that re-train the classifiers), ``batch_size``, ``lr``, ``stage2_lr``, ``weight_decay``, and whatever differs from
the defaults of training: ``hardest_weight``, ``mutual_weight``, ``scale``, ``threads``, ``warmup_epochs``,
``stage2_start_lr_factor``, ``needs_pretrained``.

Only CIFAR's recipe was published for SHIKE. Those of the other data sets are inferred; the three large ones follow the
closest published recipes of several experts, with a learning rate of stage 2 of two thirds of that of stage 1, as for
CIFAR.
"""

from typing import Any

SMALL_IMAGES: dict[str, Any] = {
    "model": "resnet32",
    "epochs": 200,
    "stage2_epochs": 20,
    "batch_size": 128,
    "lr": 0.15,
    "stage2_lr": 0.1,
    "weight_decay": 5e-4,
}
"""For images of one small size: CIFAR's, as published."""

PHOTOGRAPHS: dict[str, Any] = {
    "model": "resnet50",
    "epochs": 200,
    "stage2_epochs": 20,
    "batch_size": 256,
    "lr": 0.1,
    "stage2_lr": 0.1,
    "weight_decay": 5e-4,
}
"""For image files of any size: that of ``imagefolder``."""

# The published weights 10 and 1 were chosen with 100 classes. Both divergences are divided by B·C, so the same weights
# press ten times as hard on ten classes; a tenth keeps the balance of the terms.
TEN_CLASSES: dict[str, Any] = {"hardest_weight": 1.0, "mutual_weight": 0.1}
"""What a recipe of ten classes adds."""
