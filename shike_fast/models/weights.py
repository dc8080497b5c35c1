"""Weights from elsewhere: with torchvision's names (:func:`load_pretrained`), and of the published code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from shike_fast.errors import CheckpointError
from shike_fast.models.multi_expert import MultiExpertNetwork
from shike_fast.models.resnet import BasicBlock, MultiExpertResNet
from shike_fast.models.state_dicts import check_fit, count, plain_tensors, saved_tensors
from shike_fast.models.timm_networks import published_weights

_CONVERT = "convert_reference_state_dict"
DOWNLOAD = "timm"  # in place of a file: what timm publishes


@dataclass(frozen=True)
class PretrainedReport:
    """What :func:`load_pretrained` did.

    Attributes:
        loaded: entries of the model's state_dict that were set.
        untouched: entries of the model's state_dict left as they were (fusion, classifiers).
        ignored: entries of the file that were not used (the classifier ``fc``).
    """

    loaded: tuple[str, ...]
    untouched: tuple[str, ...]
    ignored: tuple[str, ...]


def load_pretrained(model: nn.Module, path: str | PathLike[str]) -> PretrainedReport:
    """Load weights of the plain network: the trunk's entries as they are, those of its one branch into every expert.

    A residual network of this package has torchvision's names: ``conv1``, ``bn1``, ``layer1`` ...; the last stage is
    the branch. One of timm has timm's. Another backbone says its names by
    :meth:`~shike_fast.models.MultiExpertNetwork.pretrained_name`.

    The whole file is checked before anything is loaded. The classifier (``fc``) is not used. Files without
    ``num_batches_tracked``, as torchvision's older ones, are complete. No pickle is executed (``weights_only=True``).

    Args:
        model: a :class:`~shike_fast.models.MultiExpertNetwork`, changed in place; its parameters keep their
            dtype and device.
        path: a ``.safetensors`` file, or anything else for a state_dict saved by ``torch.save`` (``.pth``, ``.pt``);
            ``"timm"`` for those that timm publishes for one of timm's networks, which it fetches unless it has them.

    Returns:
        The names of what was loaded, left alone and ignored.

    Raises:
        CheckpointError: the file cannot be read, or does not fit (lists missing and unknown keys and wrong shapes), or
            the model is of another class.
    """
    path = Path(path)
    if not isinstance(model, MultiExpertNetwork):
        raise CheckpointError(
            f"{path}: cannot be loaded into a {type(model).__name__}; only a MultiExpertNetwork says which "
            "weights of a plain network go where"
        )
    if model.adapters:
        raise CheckpointError(f"{path}: the network has adapters, the file has none; load it before add_adapters")
    file = plain_tensors(published_weights(model) if str(path) == DOWNLOAD else read_weights(path), str(path))
    try:
        given = model.adapt_pretrained(file)
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError) as error:  # of timm's conversion
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: weights of another network ({reason})") from error
    ignored = tuple(key for key in file if key not in given)

    target = model.state_dict()
    names = {key: model.pretrained_name(key) for key in target}
    source_of = {key: name for key, name in names.items() if name is not None}
    expected = {source: target[key].shape for key, source in source_of.items()}
    optional = [source for source in expected if source.endswith(".num_batches_tracked")]
    check_fit(given, expected, optional, str(path))

    loaded = {key: given[source] for key, source in source_of.items() if source in given}
    for key, tensor in loaded.items():
        target[key].copy_(tensor)
    return PretrainedReport(tuple(loaded), tuple(key for key in target if key not in loaded), ignored)


def require_weight_file(path: Path) -> None:
    """Refuse weights that are not there.

    Raises:
        CheckpointError: naming the file.
    """
    if str(path) != DOWNLOAD and not path.is_file():
        raise CheckpointError(f"--pretrained: {path} is not a file; name weights in .pth or .safetensors format")


def read_weights(path: Path) -> Any:
    """What a ``.safetensors`` file holds, or what ``torch.save`` wrote: tensors and plain values.

    Raises:
        CheckpointError: the file is missing or cannot be read, or holds more than that.
    """
    require_weight_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, or is no weight file; loading it could execute code. Save its state_dict"
        ) from error
    except Exception as error:  # on damaged bytes the two readers raise a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read as weights ({reason}); is the file complete?") from error


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
    given = saved_tensors(state_dict, _CONVERT)
    _check_kind(given)
    template = _published_network(given)
    published = {key: _published_names(key, template.num_experts) for key in template.state_dict()}
    expected = {}
    for key, tensor in template.state_dict().items():
        shape = tensor.shape[1:] if _is_classifier(key) else tensor.shape
        expected.update(dict.fromkeys(published[key], shape))
    check_fit(given, expected, (), _CONVERT)
    return {
        key: torch.stack([given[name] for name in names]) if _is_classifier(key) else given[names[0]]
        for key, names in published.items()
    }


def _check_kind(given: Mapping[str, Tensor]) -> None:
    """Refuse the published code's other networks, for which the lists of keys would be no help."""
    if any(re.match(r"(rt_)?classifiers\.\d+\.bias$", key) for key in given):
        raise CheckpointError(
            f"{_CONVERT}: a network with linear classifiers (use_norm=False); only one with normalised classifiers can "
            "be converted"
        )
    if any(key.startswith("layer3s.") for key in given) and not any(key.startswith("shallow_exps.") for key in given):
        raise CheckpointError(
            f"{_CONVERT}: a network of several experts without fusion (it has layer3s, but no shallow_exps); only one "
            "with fusion can be converted"
        )


def _published_network(given: Mapping[str, Tensor]) -> MultiExpertResNet:
    """The network, without storage, of as many experts, blocks, classes and image channels as the names say."""
    stages = (r"layer1\.(\d+)\.", r"layer2\.(\d+)\.", r"layer3s\.\d+\.(\d+)\.")
    with torch.device("meta"):
        return MultiExpertResNet(
            BasicBlock,
            [count(given, pattern) for pattern in stages],
            width=16,
            large_stem=False,
            num_classes=_size(given, "classifiers.0.weight", least=2),
            num_experts=count(given, r"layer3s\.(\d+)\."),
            in_channels=_size(given, "conv1.weight", least=1),
        )


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
