"""What several methods share: their networks, published settings, weights of classes by epoch, second labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shike_fast import ops
from shike_fast._util.options import Check, at_least, option
from shike_fast.errors import ConfigError
from shike_fast.methods.base import Method, Stage
from shike_fast.nn import CosineClassifier, LinearClassifier

# ---- networks


def plain_network(settings: Any) -> dict[str, Any]:
    """The backbone as it is, with a linear classifier."""
    return {"fusion": False, "classifier": "linear"}


def ride_network(settings: Any) -> dict[str, Any]:
    """Cosine classifiers on experts that have the last two stages as their own, at three quarters of the width."""
    return {
        "fusion": False,
        "classifier": "cosine",
        "scale": settings.scale,
        "expert_stages": 2,
        "expert_width": 0.75,
    }


def linear_heads(model: Any, method: str) -> LinearClassifier:
    """The first classifiers of a network, which must be linear.

    Raises:
        ConfigError: saying what fits.
    """
    heads = getattr(model, "classifiers", None)
    if not isinstance(heads, LinearClassifier):
        raise ConfigError(
            f"--method: '{method}' needs a network with linear classifiers, got {type(heads).__name__}; use one of "
            "this package without --classifier cosine"
        )
    return heads


def cosine_heads(model: Any, method: str) -> None:
    """Check that the first classifiers of a network are cosine classifiers.

    Raises:
        ConfigError: saying what fits.
    """
    heads = getattr(model, "classifiers", None)
    if not isinstance(heads, CosineClassifier):
        raise ConfigError(
            f"--method: '{method}' needs a network with cosine classifiers, got {type(heads).__name__}; use one of "
            "this package without --classifier linear"
        )


def first_classifiers(model: Any) -> list[nn.Parameter]:
    """The parameters of the first classifiers of a network, for a stage that trains these alone."""
    return list(model.classifiers.parameters())


# ---- published settings

# LDAM-DRW, and with other values RIDE and what follows its code
CIFAR: dict[str, Any] = {
    "model": "resnet32",
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "warmup_epochs": 5,
    "schedule": "step",
    "step_epochs": (160, 180),
    "step_factor": 0.01,
    "subset": "ldam",
    "augmentation": "crop-flip",
}
RIDE_CIFAR: dict[str, Any] = CIFAR | {"weight_decay": 5e-4, "nesterov": True, "shortcut": "pad"}


# ---- what fits a method


class Adjusted(Method):
    """Base of methods whose loss takes the classes to be as frequent as in the training set."""

    @classmethod
    def check_settings(cls, settings: Any) -> None:
        if settings.sampler != "instance":
            raise ConfigError(
                f"--sampler: the loss of method '{cls.name}' corrects for the class counts of the training set, and "
                f"'{settings.sampler}' draws other shares; use --sampler instance, or a method without correction such "
                "as ce"
            )

    def prior_of_scores(self, stage: Stage) -> Literal["train", "uniform"]:
        return "uniform"


def check_counts(method: Method) -> None:
    """Check that every class has training images.

    Raises:
        ConfigError: saying what fits.
    """
    if bool((method.class_counts < 1).any()):
        first = int((method.class_counts < 1).nonzero()[0])
        raise ConfigError(
            f"--method: '{method.name}' weighs classes by their training images, class {first} has none; leave it out "
            "of the data, or use a method without weights such as ce"
        )


def check_numbers(method: Method, name: str, numbers: tuple[float, ...], *, count: int | None = None) -> None:
    """Check that an option has a number for each expert.

    Raises:
        ConfigError: saying what fits.
    """
    count = method.num_experts if count is None else count
    if len(numbers) != count:
        raise ConfigError(
            f"--{name.replace('_', '-')}: method '{method.name}' needs a number for each of its {count} experts, got "
            f"{len(numbers)}; name {count}, or train with --experts {len(numbers)}"
        )


# ---- losses


class Constant:
    """Numbers that a loss needs in every step, computed once in float64.

    Args:
        value: float64, on the device of the run.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._float32 = value.to(torch.float32)

    def of(self, logits: Tensor) -> Tensor:
        """The numbers in the dtype in which a loss of these logits is computed."""
        return self.value if logits.dtype == torch.float64 else self._float32


def second_label(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`~shike_fast.ops.expert_loss` for images that are mixed, none for others."""
    return {name: inputs[name] for name in ("target_b", "lam") if name in inputs}


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of what all processes have, in place; a collective, which does not wait for the device."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


_share = Check("in [0, 1)", lambda value: 0 <= value < 1)


def beta_option() -> Any:
    return option(0.9999, "of the effective number of images: weights (1 - b) / (1 - b^n)", check=_share)


def reweight_epoch_option() -> Any:
    return option(
        None,
        "epochs after which classes are weighted",
        metavar="N",
        default_text="4/5 of the run",
        check=at_least(0),
    )


class Reweighted(Method):
    """Base of methods that weight classes by the effective number of their images: never, always, or late in the run.

    With ``drw`` (deferred re-weighting) all weights are 1 in the first ``reweight_epoch`` epochs, by default in four
    fifths of the run. Source: Cui et al., "Class-Balanced Loss", CVPR 2019; Cao et al., LDAM-DRW, NeurIPS 2019.
    """

    train_rule: Literal["none", "reweight", "drw"] = option("drw", "when classes are weighted")
    beta: float = beta_option()
    reweight_epoch: int | None = reweight_epoch_option()

    def __post_init__(self) -> None:
        check_counts(self)
        late = round(0.8 * self.epochs) if self.reweight_epoch is None else self.reweight_epoch
        self.begin = {"none": None, "reweight": 0, "drw": late}[self.train_rule]  # the first epoch with weights
        self.weight = Constant(ops.class_weight(self.class_counts, self.beta))

    def class_weight(self, logits: Tensor, epoch: int) -> Tensor | None:
        """The weights [C] of an epoch, None for equal ones."""
        return None if self.begin is None or epoch < self.begin else self.weight.of(logits)

    def phase(self, epoch: int) -> int:
        return 0 if self.begin is None or epoch < self.begin else self.begin

    def prior_of_scores(self, stage: Stage) -> Literal["train", "uniform"]:
        return "train" if self.begin is None else "uniform"


def rarest(class_counts: Tensor, count: int) -> Tensor:
    """bool [C]: the classes with the fewest images, of equal ones the lowest."""
    chosen = class_counts.argsort(stable=True)[:count]
    return torch.zeros(len(class_counts), dtype=torch.bool, device=class_counts.device).index_fill_(0, chosen, True)
