"""Weights of the published code of RIDE and of what grew from it: SADE, BalPoE and MDCS name their networks alike."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shike_fast.errors import CheckpointError
from shike_fast.models.registry import create_model, list_models
from shike_fast.models.resnet import BasicBlock, Bottleneck, MultiExpertResNet
from shike_fast.models.state_dicts import check_fit, count, saved_tensors, shorten, without_prefix

# Of RIDE's second stage, which decides how many experts see an image, and heads in MDCS's network that nothing uses.
_LEFT_OUT = re.compile(r"expert_help_pred|linear_head\.|linear_few\.|mlp\.")
_HEADS = re.compile(r"(?:rt_)?classifiers\.(weight|bias)$")
_SCALE = 30.0  # of the cosine classifiers in all of these repositories; a state_dict does not hold it


def describe_ride_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`~shike_fast.models.create_model` for the network that a RIDE-family state_dict is of.

    Args:
        state_dict: as for :func:`convert_ride_state_dict`.

    Returns:
        ``name``, ``num_classes``, ``num_experts``, ``in_channels``, ``fusion=False``, ``classifier``, ``scale`` (30,
        as published: a state_dict does not hold it), ``expert_stages``, ``expert_width`` and ``shortcut``.

    Raises:
        CheckpointError: it is of another kind of network, or none of :func:`~shike_fast.models.list_models` has its
            blocks and widths.
    """
    source = describe_ride_state_dict.__name__
    given, _ = _read(state_dict, source)
    form = _form_of(given, source)
    shapes = _shapes(_checked(given, form, source))
    for name in list_models():
        try:
            with torch.device("meta"):
                model = create_model(name, **form.options)
        except ValueError:  # that network does not have these options
            continue
        if _shapes(model) == shapes:
            return {"name": name, **form.options}
    raise CheckpointError(
        f"{source}: no registered network has blocks of this kind, {form.blocks} a stage; register one by "
        "register_model, or build a MultiExpertResNet"
    )


def convert_ride_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a state_dict of the published code of RIDE, SADE, BalPoE or MDCS for this package.

    The result loads into ``create_model(**describe_ride_state_dict(state_dict))``. The heads of the experts are
    stacked, linear ones transposed; ``rt_classifiers``, which the published networks do not have, start as a copy of
    them. Experts may have one or two stages of their own, of any width, cosine or linear heads, in the CIFAR form or
    the large one.

    A warning names what has no place here: the router of RIDE's second stage (``expert_help_pred...``), which chooses
    how many experts see an image, and heads of MDCS that its network does not use.

    Args:
        state_dict: names to tensors, also with ``backbone.`` or DataParallel's ``module.`` before every name, or what
            the published scripts save: a dict with such a ``state_dict``.

    Returns:
        A new dict.

    Raises:
        CheckpointError: it is not the state_dict of such a network; says which kind it is, or lists missing and unknown
            keys and wrong shapes.
    """
    source = convert_ride_state_dict.__name__
    given, left_out = _read(state_dict, source)
    form = _form_of(given, source)
    network = _checked(given, form, source)
    if left_out:
        warnings.warn(f"{source}: left out {shorten(left_out)}", stacklevel=2)
    converted = {}
    for key in network.state_dict():
        tensors = [given[name] for name in form.published_names(key)]
        if _HEADS.match(key):
            converted[key] = torch.stack([head.t() if form.is_linear else head for head in tensors])
        else:
            converted[key] = tensors[0]
    return converted


@dataclass(frozen=True)
class _Form:
    """What the names and sizes of a state_dict say of its network.

    Attributes:
        options: of ``create_model``.
        blocks: in each stage.
        width: of the first stage.
        is_large: the stem is 7x7.
        is_bottleneck: the blocks have three convolutions.
        groups, width_per_group: of a bottleneck.
    """

    options: dict[str, Any]
    blocks: tuple[int, ...]
    width: int
    is_large: bool
    is_bottleneck: bool
    groups: int
    width_per_group: int

    @property
    def is_linear(self) -> bool:
        return self.options["classifier"] == "linear"

    def network(self) -> MultiExpertResNet:
        """The network, without storage."""
        block: Any = BasicBlock
        if self.is_bottleneck:
            block = partial(Bottleneck, groups=self.groups, width_per_group=self.width_per_group)
        with torch.device("meta"):
            return MultiExpertResNet(block, self.blocks, width=self.width, large_stem=self.is_large, **self.options)

    def published_names(self, key: str) -> list[str]:
        """The names in the published code of one entry here: one, or one per expert for the heads."""
        if head := _HEADS.match(key):
            return [f"linears.{k}.{head[1]}" for k in range(self.options["num_experts"])]
        if self.options["expert_stages"] == 1:
            key = re.sub(r"^experts\.", f"layer{len(self.blocks)}s.", key)
        else:
            key = re.sub(r"^experts\.(\d+)\.(layer\d+)\.", r"\2s.\1.", key)
        return [key if self.is_large else key.replace(".downsample.", ".shortcut.")]


def _read(state_dict: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The entries without prefixes, and the names of what is left out of them."""
    given = without_prefix(saved_tensors(state_dict, source), "backbone.")
    left_out = [key for key in given if _LEFT_OUT.match(key)]
    return {key: tensor for key, tensor in given.items() if key not in left_out}, left_out


def _form_of(given: Mapping[str, Tensor], source: str) -> _Form:
    stages = _stages(given)
    own = [stage for stage in stages if stage.endswith("s")]
    if not own or "linears.0.weight" not in given:
        kind = "a network of one expert (it has linear.weight)" if "linear.weight" in given else "another network"
        raise CheckpointError(
            f"{source}: {kind}; only one of several experts, with layer3s or layer4s and linears, can be converted"
        )
    for name, sizes in (("conv1.weight", 4), ("layer1.0.conv2.weight", 4), ("linears.0.weight", 2)):
        if name not in given or given[name].dim() != sizes or given[name].numel() == 0:
            raise CheckpointError(f"{source}: weights of another network, it has no {name} of {sizes} sizes")
    width, in_channels, stem, _ = given["conv1.weight"].shape
    inner, group, _, _ = given["layer1.0.conv2.weight"].shape
    is_linear = "linears.0.bias" in given
    num_classes, features = given["linears.0.weight"].shape[:: 1 if is_linear else -1]
    is_bottleneck = "layer1.0.conv3.weight" in given
    last_width = width * 2 ** (len(stages) - 1) * (4 if is_bottleneck else 1)
    is_projected = any(re.search(r"\.(shortcut|downsample)\.", key) for key in given)
    options = {
        "num_classes": num_classes,
        "num_experts": count(given, rf"{own[-1]}\.(\d+)\."),
        "in_channels": in_channels,
        "fusion": False,
        "classifier": "linear" if is_linear else "cosine",
        "scale": _SCALE,
        "expert_stages": len(own),
        "expert_width": features / last_width,
        "shortcut": "projection" if is_projected else "pad",
    }
    return _Form(
        options,
        blocks=tuple(
            count(given, rf"{stage}\.\d+\.(\d+)\." if stage in own else rf"{stage}\.(\d+)\.") for stage in stages
        ),
        width=width,
        is_large=stem == 7,
        is_bottleneck=is_bottleneck,
        groups=inner // group,
        width_per_group=64 * group // width,
    )


def _stages(given: Mapping[str, Tensor]) -> list[str]:
    """The stages one after another: ``layer1`` ... those that experts share, ``layer3s`` ... those that they own."""
    names = {key.partition(".")[0] for key in given}
    stages: list[str] = []
    while found := {f"layer{len(stages) + 1}", f"layer{len(stages) + 1}s"} & names:
        stages.append(min(found))
    return stages


def _checked(given: Mapping[str, Tensor], form: _Form, source: str) -> MultiExpertResNet:
    """The network of the form, of which ``given`` holds every entry and no other."""
    try:
        network = form.network()
    except ValueError as error:
        raise CheckpointError(f"{source}: a network that cannot be built here: {error}") from error
    expected = {}
    for key, tensor in network.state_dict().items():
        shape = list(tensor.shape)
        if head := _HEADS.match(key):
            shape = shape[:0:-1] if form.is_linear and head[1] == "weight" else shape[1:]
        expected.update(dict.fromkeys(form.published_names(key), shape))
    check_fit(given, expected, (), source)
    return network


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in network.state_dict().items()}
