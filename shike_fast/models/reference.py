"""Weights of the published SHIKE code, in the layout of this package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shike_fast.errors import CheckpointError
from shike_fast.models._state_dict import check_fit, plain_tensors
from shike_fast.models.resnet import BasicBlock, MultiExpertResNet

_SOURCE = "convert_reference_state_dict"


def convert_reference_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a state_dict of the published CIFAR network (``ResNet_MoE`` with normalised classifiers) for this package.

    The result loads into ``create_model("resnet32", num_classes=C)`` (or resnet8, resnet20, as many blocks a stage as
    the state_dict has, and as many experts). Every key is used; the classifiers of the experts, [D, C] each, are
    stacked.

    Args:
        state_dict: names to tensors, also with the ``module.`` of DataParallel before every name, or what the published
            script saves: a dict with such a ``state_dict``.

    Returns:
        A new dict; all tensors but the stacked ones are those given.

    Raises:
        CheckpointError: it is not the state_dict of such a network; says which kind it is, or lists missing and unknown
            keys and wrong shapes.
    """
    saved = state_dict.get("state_dict") if isinstance(state_dict, Mapping) else None
    given = plain_tensors(saved if saved and isinstance(saved, Mapping) else state_dict, _SOURCE)
    _check_kind(given)
    template = _published_network(given)
    published = {key: _published_names(key, template.num_experts) for key in template.state_dict()}
    expected = {}
    for key, tensor in template.state_dict().items():
        shape = tensor.shape[1:] if _is_classifier(key) else tensor.shape
        expected.update(dict.fromkeys(published[key], shape))
    check_fit(given, expected, (), _SOURCE)
    return {
        key: torch.stack([given[name] for name in names]) if _is_classifier(key) else given[names[0]]
        for key, names in published.items()
    }


def _check_kind(given: Mapping[str, Tensor]) -> None:
    """Refuse the published code's other networks, for which the lists of keys would be no help."""
    if any(re.match(r"(rt_)?classifiers\.\d+\.bias$", key) for key in given):
        raise CheckpointError(
            f"{_SOURCE}: a network with linear classifiers (use_norm=False); only one with normalised classifiers can "
            "be converted"
        )
    if any(key.startswith("layer3s.") for key in given) and not any(key.startswith("shallow_exps.") for key in given):
        raise CheckpointError(
            f"{_SOURCE}: a network of several experts without fusion (it has layer3s, but no shallow_exps); only one "
            "with fusion can be converted"
        )


def _published_network(given: Mapping[str, Tensor]) -> MultiExpertResNet:
    """The network, without storage, of as many experts, blocks, classes and image channels as the names say."""
    stages = (r"layer1\.(\d+)\.", r"layer2\.(\d+)\.", r"layer3s\.\d+\.(\d+)\.")
    with torch.device("meta"):
        return MultiExpertResNet(
            BasicBlock,
            [_count(given, pattern) for pattern in stages],
            width=16,
            large_stem=False,
            num_classes=_size(given, "classifiers.0.weight", least=2),
            num_experts=_count(given, r"layer3s\.(\d+)\."),
            in_channels=_size(given, "conv1.weight", least=1),
        )


def _count(given: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand at the group of the pattern: with a gap, check_fit names what is missing."""
    return max(1, len({match[1] for key in given if (match := re.match(pattern, key))}))


def _size(given: Mapping[str, Tensor], key: str, least: int) -> int:
    """The second size of an entry ([D, C], or [out, in, kh, kw]), if there is one."""
    tensor = given.get(key)
    return max(least, tensor.shape[1]) if tensor is not None and tensor.dim() > 1 else least


def _is_classifier(key: str) -> bool:
    return key in ("classifiers.weight", "rt_classifiers.weight")


def _published_names(key: str, num_experts: int) -> list[str]:
    """The names in the published code of one entry here: one, or one per expert for a classifier."""
    if _is_classifier(key):
        prefix = key.removesuffix("weight")
        return [f"{prefix}{k}.weight" for k in range(num_experts)]
    key = re.sub(r"^experts\.", "layer3s.", key).replace(".downsample.", ".shortcut.")
    key = re.sub(r"^fusions\.(\d+)\.convs\.(\d+)\.", r"shallow_exps.\1.convs.StridedConv\2.conv.0.", key)
    key = re.sub(r"^fusions\.(\d+)\.norms\.(\d+)\.", r"shallow_exps.\1.convs.StridedConv\2.conv.1.", key)
    return [key]
