"""Which network weights of elsewhere are of: the published code's, or a plain one with torchvision's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shike_fast.errors import CheckpointError
from shike_fast.models.multi_expert import MultiExpertNetwork
from shike_fast.models.registry import create_model, list_models
from shike_fast.models.ride import convert_ride_state_dict, describe_ride_state_dict
from shike_fast.models.state_dicts import check_fit, saved_tensors
from shike_fast.models.weights import convert_reference_state_dict

READABLE = (
    "weights of the published code of SHIKE, RIDE, SADE, BalPoE or MDCS, or of a plain network in torchvision's names"
)

_HEAD = "fc."  # of a plain network


class Recognised(NamedTuple):
    """Weights of elsewhere, ready for a network of this package.

    Attributes:
        kind: ``shike``, ``ride`` or ``plain``.
        description: arguments of :func:`~shike_fast.models.create_model`.
        state_dict: what that network loads.
    """

    kind: str
    description: dict[str, Any]
    state_dict: dict[str, Tensor]


def recognise(saved: object, source: str) -> Recognised:
    """Find out what a file's content is by the names and shapes in it.

    Args:
        saved: a state_dict, or what a training script saves: a dict with a ``state_dict``.
        source: the file, for errors.

    Raises:
        CheckpointError: it is of no network that is known here.
    """
    given = saved_tensors(saved, source)
    if any(key.startswith("shallow_exps.") for key in given):
        return _published(given, source)
    if any("layer3s." in key or "layer4s." in key for key in given):
        description = describe_ride_state_dict(given)
        with torch.device("meta"):
            model = create_model(**description)
        return Recognised("ride", model.description, convert_ride_state_dict(given))
    if f"{_HEAD}weight" in given:
        return _plain(given, source)
    raise CheckpointError(f"{source}: holds no {READABLE}")


def _published(given: dict[str, Tensor], source: str) -> Recognised:
    state = convert_reference_state_dict(given)
    experts, _, classes = state["classifiers.weight"].shape
    options = {"num_classes": classes, "num_experts": experts, "in_channels": state["conv1.weight"].shape[1]}
    shapes = {key: tensor.shape for key, tensor in state.items()}
    for name in list_models():
        model = _without_storage(name, options)
        if model is not None and {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes:
            return Recognised("shike", model.description, state)
    raise CheckpointError(f"{source}: no registered network has as many blocks a stage; there are resnet8, 20 and 32")


def _plain(given: dict[str, Tensor], source: str) -> Recognised:
    """Torchvision's names: a trunk, its last stage, and ``fc``."""
    head, stem = given[f"{_HEAD}weight"], given.get("conv1.weight")
    if head.dim() != 2 or stem is None or stem.dim() != 4:
        raise CheckpointError(f"{source}: fc.weight must be [C, D], beside conv1.weight [C_out, C_in, 3 or 7, 3 or 7]")
    options = {
        "num_classes": head.shape[0],
        "num_experts": 1,
        "in_channels": stem.shape[1],
        "fusion": False,
        "classifier": "linear",
    }
    trunk = {key: tensor for key, tensor in given.items() if not key.startswith(_HEAD)}
    for name in list_models():
        model = _without_storage(name, options)
        if model is None or head.shape[1] != model.state_dict()["classifiers.weight"].shape[1]:
            continue
        entries = model.state_dict()
        sources = {key: plain for key in entries if (plain := model.pretrained_name(key)) is not None}
        expected = {plain: entries[key].shape for key, plain in sources.items()}
        try:
            check_fit(trunk, expected, [key for key in expected if key.endswith("num_batches_tracked")], source)
        except CheckpointError:  # that of another network
            continue
        state = {key: trunk.get(plain, torch.zeros((), dtype=torch.int64)) for key, plain in sources.items()}
        bias = given.get(f"{_HEAD}bias", torch.zeros(head.shape[0]))
        for heads in ("classifiers", "rt_classifiers"):
            state |= {f"{heads}.weight": head.t().unsqueeze(0).clone(), f"{heads}.bias": bias.unsqueeze(0).clone()}
        return Recognised("plain", model.description, state)
    raise CheckpointError(f"{source}: no registered network has the names and shapes of these weights ({len(given)})")


def _without_storage(name: str, options: Mapping[str, Any]) -> MultiExpertNetwork | None:
    """The network on the meta device, None where that name has no such options."""
    try:
        with torch.device("meta"):
            model = create_model(name, **options)
    except ValueError:
        return None
    return model if isinstance(model, MultiExpertNetwork) else None
