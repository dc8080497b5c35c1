"""cRT: a new classifier on frozen features, trained on as many images of each class."""

from __future__ import annotations

from typing import ClassVar

from shike_fast.methods.decoupling import IMAGENET_LT, RETRAINING, TRAINING, Decoupled
from shike_fast.methods.registry import register_method


@register_method
class ClassifierRetraining(Decoupled):
    """Classifier re-training, L = CE(z, y) in both stages.

    The second stage freezes the features and trains a new linear classifier on class-aware samples. Published: 90 + 10
    epochs for ImageNet-LT, 90 + 30 for iNaturalist; the rate of the second stage is the recipe's. Source: as of
    :class:`~shike_fast.methods.decoupling.Decoupled`, section 4.
    """

    name = "crt"
    summary = "cross-entropy, then a new classifier on class-balanced samples"
    stages = (TRAINING, RETRAINING)
    recipes: ClassVar = {
        "imagenet-lt": IMAGENET_LT | {"epochs": 100, "stage2_epochs": 10},
        "inat18": {"epochs": 120, "stage2_epochs": 30},
    }
