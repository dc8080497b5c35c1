"""RIDE: diverse experts with margins, and distillation from a larger network."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast import models, ops
from shike_fast._util.options import not_negative, option, positive
from shike_fast.errors import ConfigError
from shike_fast.methods.base import Method, Stage
from shike_fast.methods.families import (
    RIDE_CIFAR,
    Constant,
    beta_option,
    check_counts,
    reweight_epoch_option,
    ride_network,
    second_label,
)
from shike_fast.methods.registry import find_method, register_method

TERMS = ("cross_entropy", "diversity", "distillation")
TRAINING = Stage("training", terms=TERMS)
_CIFAR = RIDE_CIFAR | {"additional_diversity_factor": -0.45, "reweight_factor": 0.05}


@register_method
class Ride(Method):
    """Routing diverse experts, its first stage.

        L = sum_k [base_loss_factor CE_w(z_k - s m[y] e_y, y) + lambda T~^2 KL(sg softmax(z~ / T) || softmax(z_k / T))]

    CE_w is the weighted mean, m are LDAM's margins, lambda is ``additional_diversity_factor``, usually negative, z~ the
    mean of the experts' logits and T~ that of T. In the first ``reweight_epoch`` epochs w is 1 and T is
    ``base_diversity_temperature``. After them w is the effective number of images, and T falls with the class count:
    T[c] ~ C pi[c] rf + 1 - rf with the maximum ``base_diversity_temperature``, where rf is ``reweight_factor``. With
    lambda = 0 every CE takes z~.

    With ``teacher`` the loss is K [ride_loss_factor L + additional_distill_loss_factor T_d^2 KL(softmax(teacher / T_d)
    || softmax(z~ / T_d))], as the published code repeats the complete loss for each expert; the teacher gives the
    mean of its experts' logits. Published: the settings for CIFAR, ImageNet-LT and iNaturalist 2018; a warm-up of 20
    epochs with a teacher, a RIDE of six experts. The second stage, which assigns experts, is not trained here; its loss
    is :func:`router_loss`. Source: Wang et al., RIDE, ICLR 2021; where its code and the paper differ, the code.
    """

    name = "ride"
    summary = "diverse experts with margins; with --teacher also distillation"
    source = "RIDE (ICLR 2021)"
    stages = (TRAINING,)
    recipes: ClassVar = {
        "cifar10-lt": _CIFAR,
        "cifar100-lt": _CIFAR,
        "imagenet-lt": {
            "epochs": 100,
            "batch_size": 256,
            "lr": 0.1,
            "weight_decay": 2e-4,
            "schedule": "step",
            "step_epochs": (60, 80),
            "nesterov": True,
            "reweight_factor": 0.02,
        },
        "inat18": {
            "epochs": 100,
            "batch_size": 512,
            "lr": 0.2,
            "weight_decay": 2e-4,
            "schedule": "step",
            "step_epochs": (60, 80),
            "nesterov": True,
            "reweight_factor": 0.015,
        },
    }
    mixes = True

    scale: float = option(30.0, "factor of the cosine classifiers", metavar="S", check=positive)
    max_m: float = option(0.5, "margin of the rarest class, as a cosine", metavar="M", check=not_negative)
    beta: float = beta_option()
    reweight_epoch: int | None = reweight_epoch_option()
    reweight_factor: float = option(0.05, "how much lower temperatures of rare classes are", check=not_negative)
    base_loss_factor: float = option(1.0, "weight of the cross-entropy", check=not_negative)
    additional_diversity_factor: float = option(
        -0.2, "weight of the divergence from the mean; negative: experts become diverse; 0: their mean learns"
    )
    base_diversity_temperature: float = option(1.0, "its temperature, of the most frequent class", check=positive)
    uses_class_counts: bool = option(True, "margins, weights and temperatures by the class counts")
    teacher: str | None = option(None, "checkpoint of a trained network that teaches this one", metavar="FILE")
    ride_loss_factor: float = option(1.0, "weight of the rest beside the distillation", check=not_negative)
    additional_distill_loss_factor: float = option(1.0, "weight of the distillation", check=not_negative)
    distill_temperature: float = option(1.5, "temperature of the distillation", check=positive)

    def __post_init__(self) -> None:
        if self.uses_class_counts:
            check_counts(self)
        late = round(0.8 * self.epochs) if self.reweight_epoch is None else self.reweight_epoch
        self.begin = late if self.uses_class_counts else None  # the first epoch with weights
        counts = self.class_counts if self.uses_class_counts else torch.ones_like(self.class_counts)
        self.margin = Constant(self.scale * ops.class_margin(counts, self.max_m))
        self.weight = Constant(ops.class_weight(counts, self.beta))
        prior = counts.double() / counts.sum()
        temperature = len(prior) * prior * self.reweight_factor + 1 - self.reweight_factor
        self.temperature = Constant(self.base_diversity_temperature * temperature / temperature.max())
        self.factor = Constant(torch.full_like(prior[:1], self.base_loss_factor).expand(self.num_experts))
        self.network: nn.Module | None = None  # the teacher

    @classmethod
    def model_options(cls, settings: Any) -> dict[str, Any]:
        if settings.teacher is not None:
            load_teacher(settings.teacher)  # a file that does not fit shows before the run begins
        return ride_network(settings)

    @classmethod
    def looks_at_images(cls, settings: Any) -> bool:
        return settings.teacher is not None

    def forward(self, model: Any, images: Tensor, stage: Stage) -> Tensor | dict[str, Tensor]:
        logits: Tensor = model(images, stage=stage.classifiers)
        if self.network is None:
            return logits
        with torch.no_grad():
            return {"logits": logits, "teacher_logits": self.network(images).mean(0)}

    def start_epoch(self, epoch: int, model: nn.Module, stage: Stage) -> None:
        if self.teacher is not None and self.network is None:
            self.network = load_teacher(self.teacher, len(self.class_counts)).to(self.class_counts.device)

    def loss(
        self, logits: Tensor, target: Tensor, *, stage: Stage = TRAINING, epoch: int = 0, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        late = self.begin is not None and epoch >= self.begin
        collaborative = self.additional_diversity_factor == 0
        seen = logits.mean(0, keepdim=True).expand_as(logits) if collaborative else logits
        loss, parts = ops.expert_loss(
            seen,
            target,
            margin=self.margin.of(logits) if self.uses_class_counts else None,
            class_weight=self.weight.of(logits) if late else None,
            expert_weight=None if self.base_loss_factor == 1 else self.factor.of(logits),
            reduction="weighted_mean",
            kl=None if collaborative else self.diversity(logits, late),
            return_terms=True,
            **second_label(inputs),
        )
        cross_entropy, diversity = parts.unbind()
        teacher: Tensor | None = inputs.get("teacher_logits")
        if teacher is None:
            return loss, dict(zip(TERMS, (cross_entropy, diversity, torch.zeros_like(diversity)), strict=True))
        rest = self.num_experts * self.ride_loss_factor
        distillation = ops.expert_kl(
            logits.mean(0, keepdim=True),
            teacher,
            temperature=self.distill_temperature,
            weight=self.num_experts * self.additional_distill_loss_factor,
        )
        terms = (rest * cross_entropy, rest * diversity, distillation.detach())
        return rest * loss + distillation, dict(zip(TERMS, terms, strict=True))

    def diversity(self, logits: Tensor, late: bool) -> ops.ExpertKL:
        """The divergence of the experts from their mean."""
        return ops.ExpertKL(
            "mean",
            temperature=self.temperature.of(logits) if late else self.base_diversity_temperature,
            weight=self.additional_diversity_factor,
        )

    def phase(self, epoch: int) -> int:
        return self.begin if self.begin is not None and epoch >= self.begin else 0

    def prior_of_scores(self, stage: Stage) -> Literal["train", "uniform"]:
        return "uniform" if self.uses_class_counts else "train"


def load_teacher(file: str, classes: int | None = None) -> nn.Module:
    """The network of a checkpoint, in eval mode and frozen: images -> logits [K, B, C].

    Raises:
        ConfigError: it cannot be read, or has not so many classes.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        config = SimpleNamespace(**state["config"])
        method = find_method(config.method)
        network: nn.Module = models.create_model(**state["model_description"])
        method.extend_model(network, config)
        network.load_state_dict(state["model"])
        stage = method.stages[state["stage"] - 1].classifiers
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"--teacher: {file} is no checkpoint of a trained network, such as last.pt of a run ({reason})"
        ) from error
    if classes is not None and network.num_classes != classes:
        raise ConfigError(f"--teacher: the network of {file} has {network.num_classes} classes, the data {classes}")
    return _Teacher(network, stage).eval().requires_grad_(False)


class _Teacher(nn.Module):
    def __init__(self, network: nn.Module, stage: int) -> None:
        super().__init__()
        self.network = network
        self.stage = stage

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images, stage=self.stage)
        return logits


def router_targets(logits: Tensor, target: Tensor) -> Tensor:
    """Whether router i should ask a further expert: the sum of the first i is wrong, that of some more is right.

    Args:
        logits: [K, B, C].
        target: int64 [B].

    Returns:
        bool [B, K - 1].
    """
    right = logits.cumsum(0).argmax(2) == target  # [K, B], of the first 1 ... K experts
    later = right.flip(0).cumsum(0).flip(0) > 0  # of these, or of some more
    return (~right[:-1] & later[1:]).T


def router_loss(router_logits: Tensor, logits: Tensor, target: Tensor, pos_weight: float = 100.0) -> Tensor:
    """The loss of RIDE's second stage, which learns when to ask a further expert.

        L = mean_i mean_b BCE-with-logits(r_i, t_i), positives weighted by pos_weight

    Args:
        router_logits: r, floating [B, K - 1].
        logits: [K, B, C] of the frozen experts.
        target: int64 [B].
        pos_weight: the weight of images for which a further expert should be asked.

    Returns:
        A scalar, differentiable with respect to ``router_logits``.

    Source: Wang et al., RIDE, ICLR 2021, section 3.3.
    """
    wanted = router_targets(logits, target).to(router_logits.dtype)
    return F.binary_cross_entropy_with_logits(router_logits, wanted, pos_weight=router_logits.new_full((), pos_weight))
