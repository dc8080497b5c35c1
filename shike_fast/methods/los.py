"""LOS: a classifier that is re-trained with nearly equal labels."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import Check, option
from shike_fast.methods.base import Stage
from shike_fast.methods.decoupling import TRAINING, Decoupled
from shike_fast.methods.families import first_classifiers, second_label
from shike_fast.methods.registry import register_method

SMOOTHING = Stage(
    "classifiers",
    epochs="stage2_epochs",
    lr="stage2_lr",
    schedule="cosine",
    weight_decay=0.0,
    trains=first_classifiers,
    frozen_features=True,
)


@register_method
class LabelOverSmoothing(Decoupled):
    """Label over-smoothing: after plain training the classifier learns on alone, with labels smoothed by s.

        L = (1 - s) CE(z, y) + s mean_c(-log softmax(z)[c])

    so that the label's own share is 1 - s + s/C; no class prior, no sampler. Published, in the authors' code: s 0.98,
    rate 5e-4 and no weight decay in the second stage, 200 + 20 epochs for CIFAR-100, with ResNet-34 there. Source: LOS,
    "Rethinking Classifier Re-Training in Long-Tailed Recognition", ICLR 2025.
    """

    name = "los"
    summary = "cross-entropy, then the classifier alone with nearly equal labels"
    source = "LOS (ICLR 2025)"
    stages = (TRAINING, SMOOTHING)
    recipes: ClassVar = {
        "cifar100-lt": {
            "epochs": 220,
            "stage2_epochs": 20,
            "batch_size": 64,
            "lr": 0.01,
            "weight_decay": 5e-3,
            "stage2_lr": 5e-4,
            "schedule": "cosine",
        }
    }

    label_smoothing: float = option(
        0.98, "share of the label that all classes get in stage 2", check=Check("in [0, 1]", lambda s: 0 <= s <= 1)
    )

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = SMOOTHING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        smoothing = self.label_smoothing if stage is SMOOTHING else 0.0
        return ops.expert_loss(logits, target, label_smoothing=smoothing, **second_label(inputs)), {}
