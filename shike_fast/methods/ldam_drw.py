"""LDAM-DRW: larger margins for rarer classes, and classes weighted late in the run."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from shike_fast import ops
from shike_fast._util.options import not_negative, option, positive
from shike_fast.methods.base import Stage
from shike_fast.methods.families import CIFAR, Constant, Reweighted, cosine_heads, second_label
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")


@register_method
class LdamDrw(Reweighted):
    """Label-distribution-aware margins with deferred re-weighting.

        L = sum_b w[y] CE(s (z_b - m[y] e_y), y) / sum_b w[y],    m[c] = max_m n[c]^(-1/4) / max_j n[j]^(-1/4)

    z are cosines, m is taken off the label's, and w is 1 until epoch 160 of 200, then by the effective number of
    images. The network gives the cosines, the scores are s z. Published: s 30, max_m 0.5, beta 0.9999, and the settings
    for CIFAR, in the authors' code. Source: Cao et al., LDAM-DRW, NeurIPS 2019.
    """

    name = "ldam-drw"
    summary = "larger margins for rarer classes, then weighted classes"
    source = "LDAM-DRW (NeurIPS 2019)"
    stages = (TRAINING,)
    defaults: ClassVar = {"num_experts": 1}
    recipes: ClassVar = {name: CIFAR | {"weight_decay": 2e-4} for name in ("cifar10-lt", "cifar100-lt")}
    mixes = True

    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)
    max_m: float = option(0.5, "margin of the rarest class, as a cosine", metavar="M", check=not_negative)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.margin = Constant(self.scale * ops.class_margin(self.class_counts, self.max_m))

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return {"fusion": False, "classifier": "cosine", "scale": 1.0}

    @classmethod
    def extend_model(cls, model: nn.Module, settings: Any) -> None:
        cosine_heads(model, cls.name)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = ops.expert_loss(
            logits,
            target,
            scale=self.scale,
            margin=self.margin.of(logits),
            class_weight=self.class_weight(logits, epoch),
            reduction="weighted_mean",
            **second_label(inputs),
        )
        return loss, {}

    def scores(self, logits: Tensor, *, stage: Stage) -> Tensor:
        return self.scale * logits.mean(0)
