"""Adapters: a few new weights that are trained within a frozen trunk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from shike_fast._util.optional import optional_library
from shike_fast.errors import ConfigError
from shike_fast.models.freezing import freeze, with_experts
from shike_fast.models.multi_expert import BRANCHES, HEADS, MultiExpertNetwork
from shike_fast.nn import AdaptFormer

# The linear layers of attention and MLPs, as timm, torchvision and transformers call them.
_ATTENTION = "qkv kv q k v proj q_proj k_proj v_proj out_proj o_proj query key value"
_MLP = "fc1 fc2 w12 w3 linear1 linear2 mlp.0 mlp.3"
_USUAL_TARGETS = tuple(f"{_ATTENTION} {_MLP}".split())
_MLP_NAMES = ("mlp", "ffn", "feed_forward")
_FITS = "adapters fit transformers and other networks whose blocks have an MLP of linear layers (ViT, ConvNeXt)"


def add_adapters(model: nn.Module, kind: str, *, branches: bool = False, **options: Any) -> None:
    r"""Put adapters into the trunk of a network and freeze the rest of it. At first the network computes what it did.

    ``model.description`` names them, so that ``create_model(**model.description)`` builds a network with adapters as
    well. Weights of a network without them must be loaded before.

    Args:
        model: a :class:`~shike_fast.models.MultiExpertNetwork`, changed in place.
        kind: ``"lora"``, weights :math:`W + \frac{alpha}{rank} B A` of linear layers, made by the library peft;
            or ``"adaptformer"``, :class:`shike_fast.nn.AdaptFormer` beside the MLP of each block.
        branches: adapt the experts' branches as well, and freeze everything but the classifiers.
        options: of ``lora``: ``rank`` (8), ``alpha`` (the rank), ``dropout`` (0) of its input, and ``targets``, names
            of layers or the ends of such; default the linear layers that attention and MLPs have, or where there are
            none, every linear layer. Of ``adaptformer``: ``width`` (64) of the bottleneck and ``scale`` (0.1).

    Raises:
        ValueError: the kind or an option is unknown or out of range, or the network is of another class or has adapters
            already.
        ConfigError: no layer fits, or peft is not installed.

    Source: Hu et al., "LoRA", ICLR 2022; Chen et al., "AdaptFormer", NeurIPS 2022.
    """
    network = with_experts(model, "add_adapters")
    if kind not in _KINDS:
        raise ValueError(f"add_adapters: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if network.adapters:
        raise ValueError("add_adapters: the network has adapters already; merge_adapters takes LoRA's out")
    defaults, inject = _KINDS[kind]
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise ValueError(
            f"add_adapters: {kind} has no option {', '.join(sorted(unknown))}, it has {', '.join(defaults)}"
        )
    chosen = defaults | options
    network.adapters = inject(network, branches, **chosen)
    network.description = network.description | {"adapter": {"kind": kind, "branches": branches, **chosen}}
    freeze(network, "all-but-classifiers" if branches else "trunk")


def merge_adapters(model: nn.Module) -> None:
    """Add what LoRA has learned to the weights, and take the adapters out: plain layers, of the same function.

    The network is no longer frozen.

    Raises:
        ValueError: it has no adapters.
        ConfigError: they are no LoRA.
    """
    network = with_experts(model, "merge_adapters")
    if not network.adapters:
        raise ValueError("merge_adapters: the network has no adapters")
    kind = network.description["adapter"]["kind"]
    if kind != "lora":
        raise ConfigError(f"merge_adapters: {kind} is not linear, so that no plain layer does the same; keep it")
    lora = _peft().tuners.lora
    layers: list[tuple[str, Any]] = [pair for pair in network.named_modules() if isinstance(pair[1], lora.LoraLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        _replace(network, name, layer.get_base_layer())
    del network.peft_config  # by which peft knew them
    network.adapters = frozenset()
    network.description = {key: value for key, value in network.description.items() if key != "adapter"}
    freeze(network, "off")


def _inject_lora(
    model: MultiExpertNetwork,
    branches: bool,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    targets: Sequence[str] | None,
) -> frozenset[str]:
    if rank < 1:
        raise ValueError(f"add_adapters: rank must be at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"add_adapters: dropout must be in [0, 1), got {dropout}")
    names = _lora_targets(model, branches, targets)
    peft = _peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="|".join(map(re.escape, names)),  # matches whole names, of these layers alone
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"--lora-targets: {' '.join(str(error).split())}") from error
    return frozenset(
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
        for child, _ in module.named_children()
        if child != "base_layer"
    )


def _peft() -> Any:
    return optional_library("peft", "--adapter: lora", otherwise=", or use adaptformer")


def _lora_targets(model: MultiExpertNetwork, branches: bool, targets: Sequence[str] | None) -> list[str]:
    """The layers to adapt.

    PyTorch's MultiheadAttention is left out, as torchvision's transformers have it: it reads the weights of its layers
    without calling them, and what peft makes of it changes its frozen weights by rounding at every call.
    """
    modules = dict(_adaptable(model, branches))
    opaque = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    outside = {
        name: module for name, module in modules.items() if name not in opaque and name.rpartition(".")[0] not in opaque
    }
    if targets is not None:
        found = [name for name in outside if _ends_in(name, targets)]
        missing = [target for target in targets if not any(_ends_in(name, [target]) for name in found)]
        if missing:
            raise ConfigError(
                f"--lora-targets: no layer of the trunk that LoRA can adapt is called {', '.join(missing)}; a "
                "MultiheadAttention of PyTorch and what is in it are none"
            )
        return found
    linear = [name for name, module in outside.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"--adapter: the {'network' if branches else 'trunk'} has no linear layer for LoRA; {_FITS}; for "
            "convolutions name the layers (--lora-targets conv1 conv2)"
        )
    return [name for name in linear if _ends_in(name, _USUAL_TARGETS)] or linear


def _inject_adaptformer(model: MultiExpertNetwork, branches: bool, *, width: int, scale: float) -> frozenset[str]:
    found: dict[str, int] = {}  # name and dim of each MLP
    for name, module in _adaptable(model, branches):
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        is_mlp = name.rpartition(".")[2] in _MLP_NAMES or (hasattr(module, "fc1") and hasattr(module, "fc2"))
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if is_mlp and not inside and len(linear) > 1 and linear[0].in_features == linear[-1].out_features:
            found[name] = linear[0].in_features
    if not found:
        raise ConfigError(
            f"--adapter: the {'network' if branches else 'trunk'} has no MLP of linear layers for AdaptFormer to be "
            f"beside; {_FITS}"
        )
    for name, dim in found.items():
        layer = model.get_submodule(name)
        weight = next(layer.parameters())
        _replace(model, name, AdaptFormer(layer, dim, width, scale).to(weight.device, weight.dtype))
    return frozenset(f"{name}.adapter" for name in found)


_KINDS: dict[str, tuple[dict[str, Any], Callable[..., frozenset[str]]]] = {
    "lora": ({"rank": 8, "alpha": None, "dropout": 0.0, "targets": None}, _inject_lora),
    "adaptformer": ({"width": 64, "scale": 0.1}, _inject_adaptformer),
}


def _adaptable(model: nn.Module, branches: bool) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the trunk, or with ``branches`` of the experts' branches as well, by their names."""
    others = ("fusions", *HEADS) if branches else (*BRANCHES, *HEADS)
    for name, module in model.named_modules():
        if name and name.partition(".")[0] not in others:
            yield name, module


def _ends_in(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
