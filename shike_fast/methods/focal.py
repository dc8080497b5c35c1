"""The focal loss: what is classified well already counts less."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import not_negative, option
from shike_fast.methods.base import Stage
from shike_fast.methods.families import CIFAR, Reweighted, plain_network
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")
_SMALLEST = 1e-30  # of the factor's base: its power has a derivative there for every gamma


@register_method
class Focal(Reweighted):
    """The focal loss, with class weights inside the focal factor, as in the code of LDAM-DRW.

        L = mean_b (1 - e^(-l))^gamma l,    l = w[y] CE(z_b, y)

    so that with weights the factor takes p[y]^w in place of p[y], and the mean is a plain one. Published: gamma 1 and
    the settings for CIFAR in that code. Source: Lin et al., "Focal Loss", ICCV 2017.
    """

    name = "focal"
    summary = "focal loss"
    source = "Focal Loss (ICCV 2017)"
    stages = (TRAINING,)
    defaults: ClassVar = {"num_experts": 1}
    recipes: ClassVar = {name: CIFAR | {"weight_decay": 2e-4} for name in ("cifar10-lt", "cifar100-lt")}

    train_rule: Literal["none", "reweight", "drw"] = option("none", "when classes are weighted")
    gamma: float = option(1.0, "power of the focal factor", check=not_negative)

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return plain_network(settings)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = ops.expert_loss(
            logits, target, class_weight=self.class_weight(logits, epoch), reduction="none"
        )  # [K, B]
        missing = (-torch.expm1(-rows)).clamp_min(_SMALLEST)  # 1 - p[y]^w
        return (missing**self.gamma * rows).mean(1).sum(), {}
