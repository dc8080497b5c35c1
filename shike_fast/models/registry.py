"""The registry: networks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from shike_fast.models.adapters import add_adapters
from shike_fast.models.multi_expert import MultiExpertNetwork

Builder = Callable[..., MultiExpertNetwork]

# Options that a builder gets only where they differ from these defaults: it need not know them.
_OPTIONAL: dict[str, Any] = {"expert_stages": 1, "expert_width": 1.0, "shortcut": "projection"}
_BUILDERS: dict[str, Builder] = {}


def register_model(builder: Builder) -> Builder:
    """Decorator: make ``builder`` available to :func:`create_model` under its function name.

    ``builder(**options)`` gets the keyword arguments of :func:`create_model` but the name, ``expert_stages``,
    ``expert_width`` and ``shortcut`` only where they are not the defaults. It returns a
    :class:`~shike_fast.models.MultiExpertNetwork`, or any module with what
    ``shike_fast.models.multi_expert.TRAINABLE`` names. A plain convolutional network as a backbone::

        import torch
        from shike_fast import models

        def block(channels_in, channels_out, stride):
            return torch.nn.Sequential(
                torch.nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
                torch.nn.BatchNorm2d(channels_out),
                torch.nn.ReLU(),
            )

        class PlainCNN(models.MultiExpertNetwork):
            def __init__(self, **options):
                super().__init__(min_image_size=4, **options)
                self.fine = block(self.in_channels, 16, 1)
                self.coarse = block(16, 32, 2)
                branches = [block(32, 64, 2) for _ in range(self.num_experts)]
                maps = {"fine": models.FeatureMap(16, halvings=2), "coarse": models.FeatureMap(32, halvings=1)}
                self.add_experts(branches, 64, maps)

            def feature_maps(self, images):
                fine = self.run_stage(self.fine, images)
                return {"fine": fine, "coarse": self.run_stage(self.coarse, fine)}

        @models.register_model
        def plain_cnn(**options):
            return PlainCNN(**options)

        model = models.create_model("plain_cnn", num_classes=10)
        logits = model(torch.randn(8, 3, 32, 32))  # [3, 8, 10]

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"register_model: a model named {name!r} exists already")
    _BUILDERS[name] = builder
    return builder


def list_models() -> list[str]:
    """The names that :func:`create_model` accepts, in the order of registration."""
    return list(_BUILDERS)


def create_model(
    name: str,
    *,
    num_classes: int,
    num_experts: int = 3,
    in_channels: int = 3,
    fusion: bool = True,
    classifier: str = "cosine",
    scale: float = 30.0,
    expert_stages: int | Literal["all"] = 1,
    expert_width: float = 1.0,
    shortcut: Literal["projection", "pad"] = "projection",
    adapter: Mapping[str, Any] | None = None,
) -> MultiExpertNetwork:
    """Build a multi-expert network by name, with new random weights.

    ``create_model(**model.description)`` rebuilds a network like ``model``; the description holds plain values only.
    ``num_experts=1, fusion=False, classifier="linear"`` is the plain network, the usual baseline.

    Args:
        name: one of :func:`list_models`.
        num_classes: C, at least 2.
        num_experts: K, at least 1.
        in_channels: channels of the images.
        fusion: weigh each expert's deep map with a shallow one (DKF); without it features are pooled deep maps.
        classifier: ``"cosine"`` or ``"linear"``.
        scale: factor of the cosine logits; a linear classifier has none.
        expert_stages: how many of the last stages each expert has as its own copy: from 1 to all but the first, or
            ``"all"`` for K whole networks, which have no map to fuse.
        expert_width: factor of the width of those stages, such as 0.75; with ``"all"`` of the stem too.
        shortcut: where a basic block changes the shape: ``"projection"`` (1x1 convolution and BatchNorm) or ``"pad"``
            (option A: every second pixel, and zeros as new channels). A bottleneck has projections only.
        adapter: arguments of :func:`~shike_fast.models.add_adapters`, whose adapters the network then has.

    Returns:
        The network, in train mode, float32, on the current default device.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), an argument is out of range, arguments do
            not fit together, or what is registered under the name does not take the options or builds no module.
    """
    if name not in _BUILDERS:
        close = difflib.get_close_matches(str(name), _BUILDERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"create_model: unknown model {name!r}, known: {', '.join(_BUILDERS)}{hint}")
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "num_experts": num_experts,
        "in_channels": in_channels,
        "fusion": fusion,
        "classifier": classifier,
        "scale": scale,
    }
    optional = {"expert_stages": expert_stages, "expert_width": expert_width, "shortcut": shortcut}
    options |= {key: value for key, value in optional.items() if value != _OPTIONAL[key]}
    builder = _BUILDERS[name]
    try:
        inspect.signature(builder).bind(**options)
    except TypeError as error:
        raise ValueError(f"create_model: {name} must take the options {', '.join(options)}: {error}") from error
    model = builder(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"create_model: {name} must build a torch.nn.Module, got {type(model).__name__}")
    model.description = {"name": name, **options}
    if adapter is not None:
        add_adapters(model, **adapter)
    return model
