"""SADE: three experts for three test distributions: as in training, uniform, and reversed."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from shike_fast import ops
from shike_fast._util.options import not_negative, option, positive
from shike_fast.methods.base import Stage
from shike_fast.methods.families import RIDE_CIFAR, Adjusted, Constant, ride_network, second_label
from shike_fast.methods.registry import register_method

TRAINING = Stage("training")
EPS = 1e-9  # within the logarithm of the prior, as published


@register_method
class Sade(Adjusted):
    """Skill-diverse experts.

        L = sum_k CE(z_k + b_k, y),    b_1 = 0,  b_2 = log(pi + 1e-9),  b_3 = log(pi + 1e-9) - tau log(rev + 1e-9)

    rev is the prior in reverse order, see :func:`~shike_fast.ops.class_bias`. The prediction is the mean; ``evaluate
    --test-time-weights`` learns others on the unlabelled test images. Published: the settings below, those of CIFAR-10
    (rate 0.05, full width) in a thread of its repository. Source: Zhang et al., SADE, NeurIPS 2022, equation 6.
    """

    name = "sade"
    summary = "three experts, for the training, the uniform and the reversed prior"
    source = "SADE (NeurIPS 2022)"
    stages = (TRAINING,)
    experts = 3
    recipes: ClassVar = {
        "cifar10-lt": RIDE_CIFAR | {"step_factor": 0.1, "lr": 0.05, "expert_width": 1.0},
        "cifar100-lt": RIDE_CIFAR | {"step_factor": 0.1},
        "imagenet-lt": {
            "model": "resnext50_32x4d",
            "epochs": 180,
            "batch_size": 64,
            "lr": 0.025,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "nesterov": True,
        },
        "inat18": {
            "epochs": 100,
            "batch_size": 512,
            "lr": 0.2,
            "weight_decay": 2e-4,
            "schedule": "step",
            "step_epochs": (60, 80),
            "nesterov": True,
            "tau": 1.0,
        },
        "places-lt": {
            "model": "resnet152",
            "epochs": 30,
            "batch_size": 128,
            "lr": 0.01,
            "trunk_lr": 0.001,
            "weight_decay": 4e-4,
            "schedule": "step",
            "step_epochs": (10, 20),
            "warmup_epochs": 0,
            "nesterov": True,
            "expert_width": 1.0,
            "tau": 1.0,
        },
    }
    mixes = True

    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)
    tau: float = option(2.0, "weight of the reversed log prior", check=not_negative)

    def __post_init__(self) -> None:
        prior = ops.class_bias(self.class_counts, eps=EPS)
        reverse = ops.class_bias(self.class_counts, self.tau, eps=EPS, kind="reverse")
        self.bias = Constant(torch.stack([torch.zeros_like(prior), prior, prior - reverse]))  # [K, C]

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        return ride_network(settings)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return ops.expert_loss(logits, target, bias=self.bias.of(logits), **second_label(inputs)), {}

    def phase(self, epoch: int) -> int:
        return 0  # the loss is the same in all epochs
