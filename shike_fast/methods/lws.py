"""LWS: a factor for the weights of each class, learned on class-balanced samples."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from shike_fast.methods.decoupling import IMAGENET_LT, RETRAINING, TRAINING, Decoupled
from shike_fast.methods.families import linear_heads
from shike_fast.methods.registry import register_method
from shike_fast.nn import ScaledClassifier


@register_method
class LearnableWeightScaling(Decoupled):
    """Learnable weight scaling, L = CE(s[c] (W[c] f + b[c]), y) with everything but s frozen.

    The scale multiplies the bias too, as in the published code. Published: 90 + 5 epochs for ImageNet-LT. Source: as of
    :class:`~shike_fast.methods.decoupling.Decoupled`, section 4.
    """

    name = "lws"
    summary = "cross-entropy, then a factor for each class on class-balanced samples"
    stages = (TRAINING, RETRAINING)
    recipes: ClassVar = {"imagenet-lt": IMAGENET_LT | {"epochs": 95, "stage2_epochs": 5}}

    @classmethod
    def extend_model(cls, model: nn.Module, settings: Any) -> None:
        model.rt_classifiers = ScaledClassifier(linear_heads(model, cls.name))
