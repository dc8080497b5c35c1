"""SGD with momentum in one launch for all parameters: PyTorch's fused step, or NVIDIA Apex's."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shike_fast.errors import ConfigError

OPTIMIZERS = ("sgd", "apex")


def make_optimizer(
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    momentum: float,
    weight_decay: float,
    changeable_lr: bool = False,
) -> torch.optim.Optimizer:
    """SGD without Nesterov momentum, every step of one form, so that it can be recorded.

    The momentum starts as zeros, which gives the first step's ``v = g`` like any other ``v = momentum · v + g``.

    Args:
        name: ``sgd``: ``torch.optim.SGD(fused=True)``; ``apex``: ``apex.optimizers.FusedSGD``, on a GPU.
        parameters: what to train, all on one device.
        momentum: share of the velocity that every step keeps.
        weight_decay: multiple of the parameter added to its gradient.
        changeable_lr: keep the learning rate on the device, where a recorded step reads it. Not with ``apex``.

    Raises:
        ConfigError: if ``apex`` is not there, is not NVIDIA's, or cannot do what is asked.
    """
    device = parameters[0].device
    options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay}
    if name == "apex":
        require_apex(device)
        from apex.optimizers import FusedSGD

        return FusedSGD(parameters, lr=0.0, **options)
    lr = torch.zeros((), device=device) if changeable_lr else 0.0
    optimizer = torch.optim.SGD(parameters, lr=lr, fused=True, **options)
    if momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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
    """Set the learning rate of all parameters, in place where a recorded step reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


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
