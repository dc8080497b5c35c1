"""The registry: networks by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from torch import nn

from shike_fast.models.adapters import add_adapters
from shike_fast.models.multi_expert import MultiExpertNetwork

Builder = Callable[..., MultiExpertNetwork]
AnyBuilder = TypeVar("AnyBuilder", bound=Builder)

# Options that a builder gets only where they differ from these defaults: it need not know them.
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "expert_stages": (None, 1),
    "expert_width": (1.0,),
    "shortcut": ("projection",),
}
_BUILDERS: dict[str, Builder] = {}
_FAMILIES: dict[str, Builder] = {}


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


def register_model_family(prefix: str) -> Callable[[AnyBuilder], AnyBuilder]:
    """Decorator: make a builder available to :func:`create_model` under all names that begin with ``prefix:``.

    ``builder(name, **options)`` gets what follows the colon, and the options as for :func:`register_model`, but
    ``expert_stages`` wherever it is named, 1 included: what is usual there is the builder's matter.

    Raises:
        ValueError: the prefix is taken.
    """

    def register(builder: AnyBuilder) -> AnyBuilder:
        if prefix in _FAMILIES:
            raise ValueError(f"register_model_family: a family named {prefix!r} exists already")
        _FAMILIES[prefix] = builder
        return builder

    return register


def list_models() -> list[str]:
    """The names that :func:`create_model` accepts, in the order of registration; beside :func:`list_model_families`."""
    return list(_BUILDERS)


def list_model_families() -> list[str]:
    """The forms of further names that :func:`create_model` accepts, such as ``timm:NAME``."""
    return [f"{prefix}:NAME" for prefix in _FAMILIES]


def is_model(name: str) -> bool:
    """Whether the name is registered, or of a registered family, which need not know it."""
    family, colon, _ = name.partition(":")
    return name in _BUILDERS or (colon == ":" and family in _FAMILIES)


def create_model(
    name: str,
    *,
    num_classes: int,
    num_experts: int = 3,
    in_channels: int = 3,
    fusion: bool = True,
    classifier: str = "cosine",
    scale: float = 30.0,
    expert_stages: int | Literal["all"] | None = None,
    expert_width: float = 1.0,
    shortcut: Literal["projection", "pad"] = "projection",
    adapter: Mapping[str, Any] | None = None,
) -> MultiExpertNetwork:
    """Build a multi-expert network by name, with new random weights.

    ``create_model(**model.description)`` rebuilds a network like ``model``; the description holds plain values only.
    ``num_experts=1, fusion=False, classifier="linear"`` is the plain network, the usual baseline.

    Args:
        name: one of :func:`list_models`, or of a family (:func:`list_model_families`).
        num_classes: C, at least 2.
        num_experts: K, at least 1.
        in_channels: channels of the images.
        fusion: weigh each expert's deep map with a shallow one (DKF); without it features are pooled deep maps.
        classifier: ``"cosine"`` or ``"linear"``.
        scale: factor of the cosine logits; a linear classifier has none.
        expert_stages: how many of the last stages each expert has as its own copy: from 1 to all but the first, or
            ``"all"`` for K whole networks, which have no map to fuse. Of a vision transformer it is the number of
            blocks. None: the last stage, or the last quarter of the blocks.
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
    if not is_model(name):
        close = difflib.get_close_matches(str(name), _BUILDERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join([*_BUILDERS, *list_model_families()])
        raise ValueError(f"create_model: unknown model {name!r}, known: {known}{hint}")
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "num_experts": num_experts,
        "in_channels": in_channels,
        "fusion": fusion,
        "classifier": classifier,
        "scale": scale,
    }
    optional = {"expert_stages": expert_stages, "expert_width": expert_width, "shortcut": shortcut}
    options |= {key: value for key, value in optional.items() if value not in _OPTIONAL[key]}
    if name in _BUILDERS:
        builder = _BUILDERS[name]
    else:
        family, _, member = name.partition(":")
        builder = partial(_FAMILIES[family], member)
        options |= {} if expert_stages is None else {"expert_stages": expert_stages}
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
