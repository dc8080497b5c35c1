"""NCM: each image belongs to the class whose mean feature is nearest."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from shike_fast.methods.base import Stage
from shike_fast.methods.decoupling import IMAGENET_LT, RETRAINING, TRAINING, Decoupled
from shike_fast.methods.families import linear_heads, sum_over_processes
from shike_fast.methods.registry import register_method
from shike_fast.nn import ClassMeanClassifier

MEANS = dataclasses.replace(RETRAINING, name="means", sampler=None)


@register_method
class NearestClassMean(Decoupled):
    """Nearest class mean: the scores s cos(f, mu[c]) with the mean feature mu of each class.

    The second stage sums up the features of the training images, of length 1, in as many epochs as it has; one would
    do. It learns s, which changes no prediction, by cross-entropy. Features are those of the augmented images in
    training mode. Published: 90 epochs for ImageNet-LT before that. Source: as of
    :class:`~shike_fast.methods.decoupling.Decoupled`, section 4.
    """

    name = "ncm"
    summary = "cross-entropy, then the class whose mean feature is nearest"
    stages = (TRAINING, MEANS)
    recipes: ClassVar = {"imagenet-lt": IMAGENET_LT | {"epochs": 91, "stage2_epochs": 1}}

    def __post_init__(self) -> None:
        self.step_sums: Tensor | None = None  # [K, C, D], what a step adds

    @classmethod
    def extend_model(cls, model: nn.Module, settings: Any) -> None:
        heads = linear_heads(model, cls.name)
        model.rt_classifiers = ClassMeanClassifier(heads.num_experts, heads.dim, heads.num_classes)

    @classmethod
    def looks_at_images(cls, settings: Any) -> bool:
        return False

    def forward(self, model: Any, images: Tensor, stage: Stage) -> Tensor | dict[str, Tensor]:
        if stage is TRAINING:
            return super().forward(model, images, stage)
        with torch.no_grad():
            features = model.features(images)
        return {"logits": model.classify(features, stage.classifiers), "features": features.float()}

    def start_epoch(self, epoch: int, model: Any, stage: Stage) -> None:
        if stage is MEANS and self.step_sums is None:  # later the same one: a captured step adds to it
            self.step_sums = torch.zeros_like(model.rt_classifiers.sums)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.step_sums is not None:
            self.step_sums += ClassMeanClassifier.sums_of(inputs["features"], target, len(self.class_counts))
        return super().loss(logits, target, stage=stage, epoch=epoch, **inputs)

    def after_step(self, model: Any) -> None:
        if self.step_sums is not None:
            model.rt_classifiers.sums += sum_over_processes(self.step_sums)
            self.step_sums.zero_()

    def prior_of_scores(self, stage: Stage) -> Literal["train", "uniform"]:
        return "train" if stage is TRAINING else "uniform"
