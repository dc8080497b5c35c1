"""SGD with momentum in one launch for all parameters: PyTorch's fused step, or NVIDIA Apex's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage

OPTIMIZERS = ("sgd", "apex")
_FACTOR = "lr_factor"  # in a group of parameters


def make_optimizer(
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    lr_factors: Sequence[float] | None = None,
    changeable_lr: bool = False,
) -> torch.optim.Optimizer:
    """SGD, every step of one form, so that it can be recorded.

    The velocity starts as zeros, which gives the first step's ``v = g`` like any other ``v = momentum · v + g``. A step
    is ``w -= lr · v``, with Nesterov's momentum ``w -= lr · (g + momentum · v)``.

    Args:
        name: ``sgd``: ``torch.optim.SGD(fused=True)``; ``apex``: ``apex.optimizers.FusedSGD``, on a GPU.
        parameters: what to train, all on one device.
        momentum: share of the velocity that every step keeps.
        weight_decay: multiple of the parameter added to its gradient.
        nesterov: Nesterov's momentum.
        lr_factors: what :func:`set_lr` multiplies the learning rate of each parameter by; default 1. Parameters with
            the same one are a group of the optimizer.
        changeable_lr: keep the learning rate on the device, where a captured step reads it. Not with ``apex``.

    Raises:
        ConfigError: if ``apex`` is not there, is not NVIDIA's, or cannot do what is asked.
    """
    device = parameters[0].device
    options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    by_factor: dict[float, list[nn.Parameter]] = {}
    for parameter, factor in zip(parameters, lr_factors or [1.0] * len(parameters), strict=True):
        by_factor.setdefault(factor, []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": members, _FACTOR: factor} for factor, members in by_factor.items()]
    if name == "apex":
        require_apex(device)
        from apex.optimizers import FusedSGD

        return FusedSGD(groups, lr=0.0, **options)
    for group in groups:
        group["lr"] = torch.zeros((), device=device) if changeable_lr else 0.0
    optimizer = torch.optim.SGD(groups, fused=True, **options)
    if momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factors(
    named: Iterable[tuple[str, nn.Parameter]],
    method: Method,
    stage: Stage,
    *,
    trunk: float = 1.0,
    classifiers: Iterable[nn.Parameter] = (),
) -> list[float]:
    """What the learning rate of each parameter is multiplied by: what the method says, times that of the trunk.

    Args:
        named: the parameters by their names in the network.
        method: whose :meth:`~shike_fast.methods.Method.lr_factor` is asked.
        stage: of the method.
        trunk: factor of all but ``classifiers``.
        classifiers: parameters of the classifiers.

    Raises:
        ConfigError: if the method answers with anything but a number of at least 0.
    """
    of_classifiers = {id(parameter) for parameter in classifiers}
    factors = []
    for name, parameter in named:
        factor = method.lr_factor(name, stage)
        if not (math.isfinite(factor) and factor >= 0):
            raise ConfigError(f"method '{method.name}': lr_factor of {name} must be at least 0, got {factor}")
        factors.append(factor if id(parameter) in of_classifiers else factor * trunk)
    return factors


def require_apex(device: torch.device) -> None:
    """Check that NVIDIA Apex with its CUDA extensions is installed.

    Raises:
        ConfigError: if not, or if the package called apex is another one, or ``device`` is not a GPU.
    """
    if device.type != "cuda":
        raise ConfigError(f"--optimizer: apex needs a GPU, this run is on {device}; use --optimizer sgd")
    try:
        importlib.import_module("apex")
    except ImportError as error:
        raise ConfigError(
            "--optimizer: NVIDIA Apex is not installed; build it from github.com/NVIDIA/apex with its CUDA extensions "
            "(the PyPI package called apex is something else), or use --optimizer sgd"
        ) from error
    try:
        optimizers = importlib.import_module("apex.optimizers")
        optimizers.FusedSGD  # noqa: B018  (is it there?)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "--optimizer: the installed package apex is not NVIDIA Apex but the unrelated PyPI package of that name; "
            "pip uninstall apex and build github.com/NVIDIA/apex, or use --optimizer sgd"
        ) from error
    try:
        importlib.import_module("amp_C")
    except ImportError as error:
        raise ConfigError(
            "--optimizer: NVIDIA Apex was built without its CUDA extensions (amp_C); build it with them, or use "
            "--optimizer sgd"
        ) from error


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters, times their factor, in place where a captured step reads it."""
    for group in optimizer.param_groups:
        of_group = lr * group[_FACTOR]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(of_group)
        else:
            group["lr"] = of_group


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, the same whether the learning rate lies on the device or not."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over the momentum of :func:`optimizer_state`; options and the learning rate stay as they are.

    The momentum takes on the layout of its parameter: the fused steps read both side by side, and the layout may differ
    from that of the run that saved it.
    """
    groups = [
        {**theirs, **{name: value for name, value in mine.items() if name != "params"}}
        for theirs, mine in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, of_parameter in optimizer.state.items():
        velocity = of_parameter.get("momentum_buffer")
        if velocity is not None:
            of_parameter["momentum_buffer"] = torch.empty_like(parameter).copy_(velocity)
