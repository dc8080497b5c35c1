"""Cross-entropy with classes weighted by the effective number of their images."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import option
from shike_fast.methods.base import Stage
from shike_fast.methods.families import CIFAR, Reweighted, plain_network, second_label
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")


@register_method
class ClassBalanced(Reweighted):
    """The class-balanced loss.

        L = sum_b w[y] CE(z_b, y) / sum_b w[y],    w[c] ~ (1 - beta) / (1 - beta^n[c])

    Published: the code of LDAM-DRW (``Reweight`` from the start, ``DRW`` from epoch 160 of 200), which gives the
    settings for CIFAR. Source: Cui et al., "Class-Balanced Loss", CVPR 2019.
    """

    name = "cb"
    summary = "class-balanced loss: classes weighted by the effective number of their images"
    source = "Class-Balanced Loss (CVPR 2019)"
    stages = (TRAINING,)
    defaults: ClassVar = {"num_experts": 1}
    recipes: ClassVar = {name: CIFAR | {"weight_decay": 2e-4} for name in ("cifar10-lt", "cifar100-lt")}
    mixes = True

    train_rule: Literal["none", "reweight", "drw"] = option("reweight", "when classes are weighted")

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return plain_network(settings)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = ops.expert_loss(
            logits,
            target,
            class_weight=self.class_weight(logits, epoch),
            reduction="weighted_mean",
            **second_label(inputs),
        )
        return loss, {}
