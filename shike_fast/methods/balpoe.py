"""BalPoE: a product of experts that are balanced together, with mixup."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import option, positive
from shike_fast.methods.base import Stage
from shike_fast.methods.families import RIDE_CIFAR, Adjusted, Constant, check_numbers, ride_network, second_label
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")
EPS = 1e-9  # within the logarithm of the prior, as published


@register_method
class BalPoe(Adjusted):
    """A balanced product of experts.

        L = 1/K sum_k CE(z_k + tau_k log(pi + 1e-9), y),    for mixed images  lam L(y) + (1 - lam) L(y_b)

    The taus are K numbers, or the two ends of K evenly spaced ones. Published: taus 0, 1, 2 for CIFAR, 0, 1.25, 2.5 for
    ImageNet-LT and -1, 1, 3 for iNaturalist; mixup with alpha 0.4 for CIFAR-100, 0.8 for CIFAR-10, 0.3 and 0.2; seven
    experts with the ends 0 and 2. The recipes are the standard runs; the long ones take 400 epochs, steps at 320 and
    360, ten of warm-up, and AutoAugment or RandAugment. Source: Aimar et al., BalPoE, CVPR 2023.
    """

    name = "balpoe"
    summary = "a product of experts, each for another prior, with mixup"
    source = "BalPoE (CVPR 2023)"
    stages = (TRAINING,)
    recipes: ClassVar = {
        "cifar10-lt": RIDE_CIFAR | {"mixup": 0.8},
        "cifar100-lt": RIDE_CIFAR | {"mixup": 0.4},
        "imagenet-lt": {
            "epochs": 180,
            "batch_size": 64,
            "lr": 0.025,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "nesterov": True,
            "mixup": 0.3,
            "taus": (0.0, 1.25, 2.5),
        },
        "inat18": {
            "epochs": 100,
            "batch_size": 512,
            "lr": 0.2,
            "weight_decay": 2e-4,
            "schedule": "cosine",
            "nesterov": True,
            "mixup": 0.2,
            "taus": (-1.0, 1.0, 3.0),
        },
    }
    mixes = True

    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)
    taus: tuple[float, ...] = option((0.0, 2.0), "weight of the log prior for each expert, or the first and the last")

    def __post_init__(self) -> None:
        taus = self.taus
        if len(taus) == 2 and self.num_experts > 2:
            taus = tuple(torch.linspace(*taus, self.num_experts, dtype=torch.float64).tolist())
        check_numbers(self, "taus", taus)
        self.bias = Constant(torch.stack([ops.class_bias(self.class_counts, tau, eps=EPS) for tau in taus]))  # [K, C]

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return ride_network(settings) | {"expert_width": 1.0}

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = ops.expert_loss(logits, target, bias=self.bias.of(logits), reduction="mean/K", **second_label(inputs))
        return loss, {}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs
