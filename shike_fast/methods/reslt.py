"""ResLT: branches of one feature for all, for medium and rare, and for rare classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shike_fast import ops
from shike_fast._util.options import Check, option
from shike_fast.errors import ConfigError
from shike_fast.methods.base import Method, Stage
from shike_fast.methods.families import CIFAR, linear_heads, plain_network, rarest
from shike_fast.methods.registry import register_method
from shike_fast.nn import BranchClassifier

TERMS = ("independent", "fused")
TRAINING = Stage("training", terms=TERMS)
EPS = 1e-7  # within the logarithm of the probability, as published
_share = Check("in [0, 1]", lambda value: 0 <= value <= 1)


@register_method
class ResLt(Method):
    """Residual learning for long-tailed recognition; see :func:`reslt_loss`.

    Each branch learns the images of its share of the classes, those with the fewest images; all share a classifier, and
    the prediction is their sum. The branches split the pooled feature by a 1x1 convolution, BatchNorm and ReLU; whether
    the published network does so before or after pooling is not checked here. Published: the weights and shares below,
    for CIFAR-100 and CIFAR-10 those of factor 100 (0.99 and 0.72 for CIFAR-100 at factors 50 and 10, 0.998 and 0.96 for
    CIFAR-10). Its test divides the classifier's weights by a power of their length, which is not done here. Source: Cui
    et al., ResLT, TPAMI 2022; where its code and the paper differ, the code.
    """

    name = "reslt"
    summary = "branches for all, medium and rare, and rare classes, added up"
    source = "ResLT (TPAMI 2022)"
    stages = (TRAINING,)
    experts = 1
    recipes: ClassVar = {
        "cifar10-lt": CIFAR | {"step_factor": 0.1, "branch_weight": 0.998, "branch_shares": (1.0, 0.8, 0.6)},
        "cifar100-lt": CIFAR | {"step_factor": 0.1, "branch_weight": 0.995},
        "imagenet-lt": {
            "epochs": 180,
            "batch_size": 256,
            "lr": 0.1,
            "branch_weight": 0.99,
            "branch_shares": (1.0, 0.825, 0.22),
            "soft_sum": True,
        },
        "inat18": {
            "epochs": 200,
            "batch_size": 256,
            "lr": 0.1,
            "weight_decay": 1e-4,
            "branch_weight": 0.85,
            "branch_shares": (1.0, 0.8106),
        },
    }

    branch_weight: float = option(0.995, "weight of the branches, the rest is that of their sum", check=_share)
    branch_shares: tuple[float, ...] = option(
        (1.0, 0.65, 0.3),
        "share of the classes that each branch learns, the rarest ones",
        check=Check("in (0, 1]", lambda value: 0 < value <= 1),
    )
    branch_smoothing: float = option(0.0, "label smoothing of the branches", check=_share)
    soft_sum: bool = option(False, "the sum's loss has eps and smoothing too, as for ImageNet-LT")

    def __post_init__(self) -> None:
        classes = len(self.class_counts)
        self.seen = torch.stack([rarest(self.class_counts, max(1, round(s * classes))) for s in self.branch_shares])

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return plain_network(settings)

    @classmethod
    def extend_model(cls, model: nn.Module, settings: Any) -> None:
        heads = linear_heads(model, cls.name)
        model.classifiers = BranchClassifier(len(settings.branch_shares), heads.dim, heads.num_classes)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if logits.shape[0] != len(self.branch_shares):
            raise ConfigError(
                f"--branch-shares: name a share for each of the {logits.shape[0]} branches of the logits, got "
                f"{len(self.branch_shares)}"
            )
        independent, fused = reslt_loss(
            logits, target, self.seen, label_smoothing=self.branch_smoothing, soft_sum=self.soft_sum
        )
        independent, fused = self.branch_weight * independent, (1 - self.branch_weight) * fused
        return independent + fused, {"independent": independent.detach(), "fused": fused.detach()}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs

    def scores(self, logits: Tensor, *, stage: Stage) -> Tensor:
        return logits.sum(0)


def reslt_loss(
    logits: Tensor, target: Tensor, seen: Tensor, *, label_smoothing: float = 0.0, soft_sum: bool = False
) -> tuple[Tensor, Tensor]:
    """The two parts of ResLT's loss, beta I + (1 - beta) E.

        soft(x) = -sum_c t[c] log(softmax(x)[c] + 1e-7),    t = 1 - d at the label, d / (C - 1) elsewhere
        I = sum over branches and their images of soft(z_j), divided by the number of its summands
        E = mean CE(sum_j z_j, y),    with ``soft_sum`` mean soft(sum_j z_j)

    The 1e-7 caps the loss at 16.1: a row with p[y] far below it learns nothing from I.

    Args:
        logits: [J, B, C] of J branches.
        target: int64 [B].
        seen: bool [J, C], the classes whose images a branch learns.
        label_smoothing: d.
        soft_sum: see above.

    Returns:
        I and E, scalars.

    Source: Cui et al., ResLT, TPAMI 2022, section 3.
    """
    weight = seen[:, target].to(logits.dtype)  # [J, B]
    total = logits.sum(0, keepdim=True)
    rows = weight * _soft(logits, target, label_smoothing)
    independent = rows.sum() / weight.sum().clamp_min(1)
    fused = _soft(total, target, label_smoothing).mean() if soft_sum else ops.expert_loss(total, target)
    return independent, fused


def _soft(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """[J, B]"""
    if label_smoothing == 0:
        return -((-ops.expert_loss(logits, target, reduction="none")).exp() + EPS).log()
    terms = -(logits.softmax(2) + EPS).log()
    other = label_smoothing / (logits.shape[2] - 1)
    at_label = terms.gather(2, target.expand(logits.shape[0], -1).unsqueeze(2)).squeeze(2)
    return other * terms.sum(2) + (1 - label_smoothing - other) * at_label
