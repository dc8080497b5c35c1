"""MDCS: experts for different priors, each of which teaches its strongly augmented view by the weak one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import at_least, not_negative, option, positive
from shike_fast.methods.base import Stage
from shike_fast.methods.families import RIDE_CIFAR, Adjusted, Constant, check_numbers, ride_network
from shike_fast.methods.registry import register_method

TERMS = ("cross_entropy", "consistency")
TRAINING = Stage("training", terms=TERMS)
EPS = 1e-9  # within the logarithm of the counts' power, as published
_CIFAR = RIDE_CIFAR | {
    "epochs": 400,
    "batch_size": 64,
    "warmup_epochs": 20,
    "step_epochs": (200, 320, 380),
    "step_factor": 0.1,
    "augmentation": "cifar",
    "weak_augmentation": "crop-flip",
}


@register_method
class Mdcs(Adjusted):
    """More diverse experts with consistency self-distillation.

        a_k = z_k + log(n^e_k + 1e-9)
        L   = sum_k [mean CE(a_k, y) + v mean KL(sg softmax(a_k of the weak view) || softmax(a_k of the strong view))]
        v   = kl_factor min(epoch / kl_warmup, 1)

    The batch shows each image twice, first weakly, then strongly augmented; the cross-entropy is over both. The
    divergence is the mean over those images whose weak view the expert's a_k classify rightly, 0 if there are none;
    epochs count from 1. Published: exponents -0.5, 1, 2.5 and the settings below; the strong augmentation here is the
    data set's. Source: Zhao et al., MDCS, ICCV 2023; where its code and the paper differ, the code.
    """

    name = "mdcs"
    summary = "experts for different priors, taught by weak views of the images"
    source = "MDCS (ICCV 2023)"
    stages = (TRAINING,)
    recipes: ClassVar = {
        "cifar10-lt": _CIFAR,
        "cifar100-lt": _CIFAR,
        "imagenet-lt": {
            "epochs": 400,
            "batch_size": 256,
            "lr": 0.1,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "nesterov": True,
            "weak_augmentation": "rrc",
        },
        "inat18": {
            "epochs": 400,
            "batch_size": 512,
            "lr": 0.2,
            "weight_decay": 2e-4,
            "schedule": "step",
            "step_epochs": (200, 300, 380),
            "nesterov": True,
            "weak_augmentation": "rrc",
        },
        "places-lt": {
            "model": "resnet152",
            "epochs": 30,
            "batch_size": 64,
            "lr": 0.01,
            "trunk_lr": 0.001,
            "weight_decay": 4e-4,
            "nesterov": True,
            "expert_width": 1.0,
            "weak_augmentation": "rrc",
        },
    }

    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)
    exponents: tuple[float, ...] = option((-0.5, 1.0, 2.5), "power of the class counts for each expert")
    kl_factor: float = option(0.6, "weight of the divergence between views", check=not_negative)
    kl_warmup: int = option(20, "epochs in which that weight rises", metavar="N", check=at_least(1))
    weak_augmentation: str | None = option(
        None, "augmentation of the view that teaches", metavar="NAME", default_text="that of --augmentation"
    )

    def __post_init__(self) -> None:
        check_numbers(self, "exponents", self.exponents)
        biases = [ops.class_bias(self.class_counts, e, eps=EPS, kind="counts", power=True) for e in self.exponents]
        self.bias = Constant(torch.stack(biases))  # [K, C]

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return ride_network(settings)

    @classmethod
    def views(cls, settings: Any) -> tuple[str | None, ...]:
        return settings.weak_augmentation, None

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        consistency = ops.ExpertKL(
            "view",
            weight=self.consistency_weight(epoch),
            gate="teacher_correct",
            reduction="gated_mean",
        )
        loss, parts = ops.expert_loss(logits, target, bias=self.bias.of(logits), kl=consistency, return_terms=True)
        return loss, dict(zip(TERMS, parts.unbind(), strict=True))

    def consistency_weight(self, epoch: int) -> float:
        """v in the 0-based epoch."""
        return self.kl_factor * min((epoch + 1) / self.kl_warmup, 1.0)

    def phase(self, epoch: int) -> int:
        return min(epoch, self.kl_warmup - 1)
