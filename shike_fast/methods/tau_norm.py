"""Tau-normalisation: the weights of a trained classifier, made more equal in length for the test."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from shike_fast._util.options import not_negative, option
from shike_fast.methods.base import Stage
from shike_fast.methods.decoupling import IMAGENET_LT, TRAINING, Decoupled
from shike_fast.methods.families import linear_heads
from shike_fast.methods.registry import register_method
from shike_fast.nn import NormalizedClassifier


@register_method
class TauNormalization(Decoupled):
    """Tau-normalisation: trained by L = CE(W f + b, y), tested with the scores W[c] f / ||W[c]||^tau, without bias.

    Published: 90 epochs for ImageNet-LT; tau was chosen among 0, 0.1 ... 2 on validation images, which no recipe here
    does. Source: as of :class:`~shike_fast.methods.decoupling.Decoupled`, section 4.
    """

    name = "tau-norm"
    summary = "cross-entropy, tested with normalised weights"
    stages = (TRAINING,)
    recipes: ClassVar = {"imagenet-lt": IMAGENET_LT | {"epochs": 90}}

    tau: float = option(1.0, "power of the weights' length", check=not_negative)

    @classmethod
    def extend_model(cls, model: nn.Module, settings: Any) -> None:
        heads = linear_heads(model, cls.name)
        model.classifiers = NormalizedClassifier(heads.num_experts, heads.dim, heads.num_classes, settings.tau)

    def prior_of_scores(self, stage: Stage) -> Literal["train", "uniform"]:
        return "uniform"
