"""NCL: whole networks that teach each other, on all classes and on the hardest ones."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import at_least, not_negative, option, positive
from shike_fast.errors import ConfigError
from shike_fast.methods.base import Stage
from shike_fast.methods.families import CIFAR, Adjusted, Constant
from shike_fast.methods.registry import register_method

TERMS = ("cross_entropy", "mutual", "hard_cross_entropy", "hard_mutual")
TRAINING = Stage("training", terms=TERMS)
EPS = 1e-9  # within the logarithm of the student's probability, as published
CIFAR_RECIPE = {name: value for name, value in CIFAR.items() if name != "subset"} | {
    "epochs": 400,
    "batch_size": 64,
    "weight_decay": 2e-4,
    "step_epochs": (320, 360),
    "augmentation": "cifar",
}


class Nested(Adjusted):
    """What NCL and NCL++ share: K whole networks and the hardest classes of a row.

    a_k = z_k + log n. The hard set M is the label and the hcm_n - 1 other classes with the largest logits z of network
    0. h_k is a_k on M; elsewhere it is 0 as published (``hard_classes zero``), or left out of the softmax as in the
    paper (``exclude``).
    """

    ce_ratio: float = option(1.0, "weight of the cross-entropy of all classes", check=not_negative)
    hcm_ratio: float = option(1.0, "weight of the cross-entropy of the hardest classes", check=not_negative)
    diversity_factor: float = option(0.6, "weight of the divergences on all classes", check=not_negative)
    hcm_n: int | None = option(
        None, "number of hardest classes", metavar="N", default_text="three tenths of them", check=at_least(1)
    )
    hard_classes: Literal["zero", "exclude"] = option("zero", "logits of the others: 0, or out of the softmax")

    def __post_init__(self) -> None:
        classes = len(self.class_counts)
        self.hardest = max(1, classes * 3 // 10) if self.hcm_n is None else self.hcm_n
        if self.hardest > classes:
            raise ConfigError(f"--hcm-n: must be at most the number of classes, {classes}, got {self.hcm_n}")
        self.bias = Constant(ops.class_bias(self.class_counts, kind="counts"))
        self.ratios = Constant(
            self.bias.value.new_tensor([[self.ce_ratio], [self.hcm_ratio]]).expand(2, self.num_experts)
        )

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return {"fusion": False, "classifier": "linear", "expert_stages": "all"}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs


@register_method
class Ncl(Nested):
    """Nested collaborative learning.

        L = sum_k [ce_ratio CE(a_k) + hcm_ratio CE(h_k)]
            + 1/(K-1) sum_{i != j} [diversity_factor D(a_j, a_i) + diversity_factor_hcm D(h_j, h_i)]
        D(t, s) = mean_b sum_c softmax(t) (log softmax(t) - log(softmax(s) + 1e-9))

    with a, h of :class:`Nested`, and gradients through the teachers. For K = 1 there are no divergences. Published:
    the settings below, for CIFAR-100 of factor 100; 64 images for each of its GPUs for ImageNet-LT, whose recipe leaves
    the batch to the data set's. The optional contrast of its momentum branch is :func:`queue_contrast`, which gets
    ``query``, ``key`` and ``queue`` from a forward of your own; the branch itself is not built here. Source: Li et al.,
    NCL, CVPR 2022; where its code and the paper differ, the code.
    """

    name = "ncl"
    summary = "whole networks that teach each other, on all and on the hardest classes"
    source = "NCL (CVPR 2022)"
    stages = (TRAINING,)
    recipes: ClassVar = {
        "cifar10-lt": CIFAR_RECIPE,
        "cifar100-lt": CIFAR_RECIPE,
        "imagenet-lt": {
            "epochs": 200,
            "lr": 0.2,
            "weight_decay": 2e-4,
            "schedule": "cosine",
            "classifier": "cosine",
            "scale": 16.0,
        },
        "inat18": {"epochs": 400, "lr": 0.2, "schedule": "cosine", "classifier": "cosine", "scale": 32.0},
        "places-lt": {
            "model": "resnet152",
            "epochs": 30,
            "lr": 0.02,
            "schedule": "step",
            "step_epochs": (10, 20),
            "classifier": "cosine",
            "scale": 16.0,
            "hcm_n": 122,
        },
    }

    diversity_factor_hcm: float = option(0.6, "weight of the divergences on the hardest classes", check=not_negative)
    con_ratio: float = option(1.0, "weight of the contrast with a queue, where a forward gives one", check=not_negative)
    contrast_temperature: float = option(0.2, "its temperature", check=positive)
    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return super().model_options(settings) | {"scale": settings.scale}

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        bias, ratios = self.bias.of(logits), self.ratios.of(logits)
        hard = ops.hardest_classes(logits[0], target, self.hardest)
        loss, parts = ops.expert_loss(
            logits,
            target,
            bias=bias,
            expert_weight=ratios[0],
            kl=self._mutual(self.diversity_factor),
            return_terms=True,
        )
        of_hard, hard_parts = ops.expert_loss(
            logits,
            target,
            bias=bias,
            expert_weight=ratios[1],
            class_mask=hard,
            masked=self.hard_classes,
            kl=self._mutual(self.diversity_factor_hcm),
            return_terms=True,
        )
        total = loss + of_hard
        if "queue" in inputs:
            contrast = queue_contrast(inputs["query"], inputs["key"], inputs["queue"], self.contrast_temperature)
            total = total + self.con_ratio * contrast.sum()
        return total, dict(zip(TERMS, (*parts.unbind(), *hard_parts.unbind()), strict=True))

    def _mutual(self, factor: float) -> ops.ExpertKL | None:
        if self.num_experts == 1:
            return None
        return ops.ExpertKL("others", weight=factor / (self.num_experts - 1), eps=EPS)


def queue_contrast(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """The contrast of each network's queries with their keys, among a queue of others.

        mean_b CE([q key, q queue] / T, label 0)

    Args:
        query, key: floating [K, B, D]; both are brought to length 1, and only the query gets a gradient.
        queue: floating [K, D, Q], as it is.
        temperature: T.

    Returns:
        [K], one loss a network.

    Source: He et al., MoCo, CVPR 2020, equation 1; Li et al., NCL, CVPR 2022, section 3.5.
    """
    query, key = F.normalize(query, dim=2), F.normalize(key, dim=2).detach()
    positive = (query * key).sum(2, keepdim=True)
    logits = torch.cat([positive, query @ queue.detach()], dim=2) / temperature  # [K, B, 1 + Q]
    return -logits.log_softmax(2)[:, :, 0].mean(1)
