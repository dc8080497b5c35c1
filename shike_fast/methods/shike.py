"""SHIKE: experts that teach each other what is hardest, then new classifiers for all of them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import not_negative, option, positive
from shike_fast.methods.base import Method, Stage, second_classifiers
from shike_fast.methods.registry import register_method

TERMS = ("cross_entropy", "hardest", "mutual")
EXPERTS = Stage("experts", terms=TERMS)
CLASSIFIERS = Stage(
    "classifiers",
    epochs="stage2_epochs",
    lr="stage2_lr",
    start_lr_factor="stage2_start_lr_factor",
    classifiers=2,
    trains=second_classifiers,
    frozen_features=True,
)


@register_method
class Shike(Method):
    r"""Self-heterogeneous integration with knowledge excavation.

    ``experts`` learns by :func:`~shike_fast.ops.dkt_loss`, ``classifiers`` by
    :func:`~shike_fast.ops.balanced_softmax_loss` on frozen features.
    """

    name = "shike"
    summary = "several experts with knowledge fusion and transfer"
    source = "SHIKE (CVPR 2023)"
    stages = (EXPERTS, CLASSIFIERS)

    hardest_weight: float = option(10.0, "weight of the hardest-negative term", metavar="ALPHA", check=not_negative)
    mutual_weight: float = option(1.0, "weight of the mutual term", metavar="BETA", check=not_negative)
    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)
    kl_reduction: Literal["mean", "batchmean"] = option("mean", "divide both terms by B*C or by B")

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return {"scale": settings.scale}

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = EXPERTS, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if stage is CLASSIFIERS:
            return ops.balanced_softmax_loss(logits, target, self.class_counts), {}
        loss, terms = ops.dkt_loss(
            logits,
            target,
            hardest_weight=self.hardest_weight,
            mutual_weight=self.mutual_weight,
            kl_reduction=self.kl_reduction,
            return_terms=True,
        )
        return loss, dict(zip(TERMS, terms.unbind(), strict=True))

    def prior_of_scores(self, stage: Stage) -> Literal["train", "uniform"]:
        return "uniform" if stage is CLASSIFIERS else "train"

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs
