"""What the re-training methods share: plain training, then a stage with frozen features."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from shike_fast import ops
from shike_fast.methods.base import Method, Stage, second_classifiers
from shike_fast.methods.families import plain_network, second_label

TRAINING = Stage("training")
RETRAINING = Stage(
    "classifiers",
    epochs="stage2_epochs",
    lr="stage2_lr",
    classifiers=2,
    trains=second_classifiers,
    frozen_features=True,
    sampler="class-aware",
)

# Stage 1 of Kang et al.; their accuracies are those of ResNeXt-50.
IMAGENET_LT: dict[str, Any] = {
    "model": "resnext50_32x4d",
    "batch_size": 512,
    "lr": 0.2,
    "weight_decay": 5e-4,
    "schedule": "cosine",
}


class Decoupled(Method):
    """Base of methods that train a plain network by cross-entropy first.

    Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020; its code
    gives the settings.
    """

    source = "Decoupling (ICLR 2020)"
    defaults: ClassVar = {"num_experts": 1}
    mixes = True

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return plain_network(settings)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return ops.expert_loss(logits, target, **second_label(inputs)), {}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs
