"""Networks of timm with several experts: the last stage, or the last blocks of a vision transformer, once an expert.

timm is imported where such a network is built. Its modules keep their names, so that files of its weights fit.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import math
import re
import sys
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.models.multi_expert import FeatureMap, MultiExpertNetwork
from shike_fast.models.registry import register_model_family

_FAMILY = "timm"
_FITTING = "ResNet, ResNeXt, RegNet, EfficientNet, ConvNeXt and Swin, and vision transformers (vit_*, deit*, eva02_*)"
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}  # of networks that else take images of one size
_HEADS = ("global_pool", "head", "head_drop", "head_fc", "fc", "classifier")  # where timm's networks begin to pool
_EXPERT = re.compile(r"experts\.\d+\.net\.")
_FINEST = 4  # the smallest stride of a map that experts fuse: those of a stem are left out


@register_model_family(_FAMILY)
def timm_network(
    name: str,
    *,
    expert_stages: int | Literal["all"] | None = None,
    network_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> TimmNetwork:
    """A network of timm, such as ``convnext_tiny`` or ``vit_small_patch16_224.augreg_in1k``, with random weights.

    Args:
        name: of the network in timm, with a tag of published weights or without.
        expert_stages: how many of the last stages, or of a vision transformer's last blocks, each expert has as its own
            copy, or ``"all"``; default one stage, or a quarter of the blocks.
        network_options: what ``timm.create_model`` is given too, such as ``{"drop_path_rate": 0.1}``.
        options: ``num_classes``, ``num_experts``, ``in_channels``, ``fusion``, ``classifier``, ``scale`` as for
            :func:`~shike_fast.models.create_model`.

    Raises:
        ValueError: timm or the network is not there, it has another form, or an argument is out of range.
    """
    source = TimmSource(name, options.get("in_channels", 3), network_options or {})
    template = source.template()
    is_transformer = hasattr(template, "_pos_embed") and isinstance(getattr(template, "blocks", None), nn.Sequential)
    is_transformer = is_transformer or _has_rotary_blocks(template)
    kind = TimmTransformer if is_transformer else TimmStages
    return kind(source, template, expert_stages=expert_stages, **options)


def import_timm() -> Any:
    """timm, where it is installed.

    Raises:
        ConfigError: saying what helps.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise ConfigError(f"timm cannot be imported ({error})") from error
        raise ConfigError("timm is not installed; pip install timm") from error
    except (ImportError, RuntimeError) as error:  # a torchvision of another PyTorch, for example
        reason = " ".join(str(error).split())
        raise ConfigError(f"timm cannot be imported ({reason})") from error


class TimmSource:
    """Makes a network of timm, without its classifier, as often as it is wanted."""

    def __init__(self, name: str, in_channels: int, options: Mapping[str, Any]) -> None:
        timm = import_timm()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"timm has no network {name!r}{hint}")
        self.name = name
        self.options = {"num_classes": 0, "in_chans": max(1, in_channels), **options}
        takes = inspect.signature(type(self.template()).__init__).parameters
        for option, value in _ANY_SIZE.items():
            if option in takes:
                self.options.setdefault(option, value)
                break

    def make(self, *, pretrained: bool = False) -> Any:
        """A new one, with random or with published weights."""
        timm = import_timm()
        try:
            return timm.create_model(self.name, pretrained=pretrained, **self.options)
        except Exception as error:  # whatever a network raises that does not take an option, or a tag that is none
            if pretrained:
                raise
            reason = " ".join(f"{error}".split())
            raise ValueError(f"timm cannot build {self.name!r}: {reason}") from error

    def template(self) -> Any:
        """One without storage."""
        with torch.device("meta"):
            return self.make()


class Part(nn.Module):
    """Some modules of a network of timm, under their names there.

    Args:
        net: the network, changed: it keeps these modules and what they lie in.
        names: dotted, in the order in which :meth:`forward` calls them.
        kept: more of them that are not called.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], kept: Collection[str] = ()) -> None:
        super().__init__()
        _prune(net, {*names, *kept})
        self.net: Any = net
        self.names = tuple(names)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.net.get_submodule(name)(x)
        return x


class TimmNetwork(MultiExpertNetwork):
    """What both forms share: building from timm, fused features through timm's own head, weights by timm's names.

    Attributes:
        trunk: the shared modules, in a network of timm without the others; None where experts share nothing.
        experts: each a network of timm with its own modules, as ``net``.
        source: what builds the network of timm.
        normalisation: mean and standard deviation of the images that its published weights were made for.
    """

    def __init__(self, source: TimmSource, template: Any, *, expert_stages: Any, **options: Any) -> None:
        super().__init__(min_image_size=1, **options)
        self.source = source
        config = template.pretrained_cfg
        self.normalisation = tuple(config["mean"]), tuple(config["std"])
        maps = self._divide(template, expert_stages)
        if self.fusion and not maps:
            raise ValueError(
                "expert_stages='all' leaves no map that experts share and could fuse; take fusion=False "
                "(--no-fusion), or let them share a stage"
            )
        if template.num_features < 1:
            raise self._unfit("it has no features")
        networks = [source.make() for _ in range(self.num_experts)]
        shared = copy.deepcopy(networks[0])
        whole = self._whole_features(networks[0])
        branches = [self._branch(net) for net in networks]
        self.trunk = self._trunk(shared)
        self.add_experts(branches, template.num_features, maps, head_dim=template.head_hidden_size)
        if whole is not None:
            self._check_division(*whole)

    @abstractmethod
    def _divide(self, template: Any, expert_stages: Any) -> dict[str, FeatureMap]:
        """Find out what is shared and which maps are fused; set ``min_image_size``."""

    @abstractmethod
    def _trunk(self, net: Any) -> Any:
        """What is left of a network of timm as the trunk."""

    @abstractmethod
    def _branch(self, net: Any) -> nn.Module:
        """What is left of a network of timm as a branch."""

    @abstractmethod
    def _run_branch(self, expert: Any, maps: dict[str, Tensor]) -> Tensor:
        """What comes before the pooling in timm's network."""

    @abstractmethod
    def _pairs(self, maps: dict[str, Tensor], deep: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Shallow and deep maps or tokens as they are fused."""

    @abstractmethod
    def _finish(self, net: Any, fused: Tensor) -> Tensor:
        """What timm's head does with pooled features before its classifier."""

    def expert_features(self, maps: dict[str, Tensor]) -> Tensor:
        deep = [self._run_branch(expert, maps) for expert in self.experts]
        networks = [expert.net for expert in self.experts]
        if self.fusions is None:
            return torch.stack([net.forward_head(y, pre_logits=True) for net, y in zip(networks, deep, strict=True)])
        fused = self.fuse(*self._pairs(maps, deep))
        return torch.stack([self._finish(net, f) for net, f in zip(networks, fused, strict=True)])

    def pretrained_name(self, key: str) -> str | None:
        if key.startswith("trunk."):
            return key.removeprefix("trunk.net.")
        return _EXPERT.sub("", key, count=1) if _EXPERT.match(key) else None

    def adapt_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """By timm's own conversion for the network: position embeddings of another image size, names of others."""
        template = self.source.template()
        config = template.pretrained_cfg
        convert = getattr(sys.modules[type(template).__module__], "checkpoint_filter_fn", None)
        weights = dict(weights if convert is None else convert(dict(weights), template))
        first = f"{config.get('first_conv')}.weight"
        if first in weights and weights[first].dim() == 4 and weights[first].shape[1] != self.in_channels:
            adapt = importlib.import_module("timm.models").adapt_input_conv
            weights[first] = adapt(self.in_channels, weights[first])
        own = {self.pretrained_name(key) for key in self.state_dict()}
        heads = config.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        unused = template.state_dict().keys() - own  # such as the pooling of a transformer whose tokens are fused
        return {key: value for key, value in weights.items() if key not in unused and not key.startswith(heads)}

    def _unfit(self, reason: str) -> ValueError:
        return ValueError(f"timm's {self.source.name} has another form than what can be divided: {reason}; {_FITTING} fit")

    def _some_images(self) -> Tensor:
        """Two images, the same ones every time, without a random number."""
        side = 2 * self.min_image_size
        values = torch.arange(2 * self.in_channels * side * side, dtype=torch.get_default_dtype())
        return torch.sin(values).reshape(2, self.in_channels, side, side)

    @torch.no_grad()
    def _whole_features(self, net: Any) -> tuple[Tensor, Tensor] | None:
        """What the undivided network makes of some images: before and after its pooling. None without storage."""
        if any(weight.is_meta for weight in net.parameters()):
            return None
        training = net.training
        try:
            deep = net.eval().forward_features(self._some_images())
            return deep, net.forward_head(deep, pre_logits=True)
        except Exception as error:  # whatever a network raises at images of another size than its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self._unfit(f"it fails at images of {2 * self.min_image_size} pixels ({reason})") from error
        finally:
            net.train(training)

    @torch.no_grad()
    def _check_division(self, deep: Tensor, pooled: Tensor) -> None:
        """Check that trunk and first expert do what the undivided network did."""
        training = self.training
        try:
            maps = self.eval().feature_maps(self._some_images())
            mine = self._run_branch(self.experts[0], maps)
            features = self.expert_features(maps)
        except Exception as error:  # modules that cannot be called one after the other
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self._unfit(reason) from error
        finally:
            self.train(training)
        if mine.shape != deep.shape or not torch.allclose(mine, deep, rtol=1e-3, atol=1e-4):
            raise self._unfit("its modules are not called one after the other")
        if features.shape[1:] != pooled.shape:
            raise self._unfit(f"its head makes {list(pooled.shape[1:])} features, of fused ones {list(features.shape[2:])}")


class TimmStages(TimmNetwork):
    """A network of stages of maps, each smaller than the one before."""

    def _divide(self, template: Any, expert_stages: Any) -> dict[str, FeatureMap]:
        info = [dict(entry) for entry in getattr(template, "feature_info", ())]
        sections, self._tail = _sections(template, [str(entry["module"]) for entry in info])
        stages = [entry for entry in info if entry["module"] in sections]
        if len(stages) < 2:
            raise self._unfit("it has no feature maps")
        own = _own(1 if expert_stages is None else expert_stages, len(stages), "stages")
        ends = [sections.index(entry["module"]) + 1 for entry in stages]
        start = 0 if own == len(stages) else ends[-1 - own]
        self._shared, self._own_sections = tuple(sections[:start]), tuple(sections[start:])
        last = stages[-1]["reduction"]
        self.min_image_size = last
        shared = stages[: len(stages) - own]
        coarse = [entry for entry in shared if entry["reduction"] >= _FINEST] or shared
        return {entry["module"]: self._map(entry, last) for entry in coarse}

    def _map(self, entry: Mapping[str, Any], last: int) -> FeatureMap:
        ratio = last / entry["reduction"]
        halvings = math.log2(ratio)
        if not halvings.is_integer() or halvings < 0:
            raise self._unfit(
                f"the strides of its maps, {entry['reduction']} and {last}, have the ratio {ratio:g}, no power of two, "
                "so that a fusion cannot halve the one to the other; take fusion=False (--no-fusion)"
            )
        return FeatureMap(entry["num_chs"], int(halvings))

    def _trunk(self, net: Any) -> nn.Module | None:
        return Part(net, self._shared) if self._shared else None

    def _branch(self, net: Any) -> nn.Module:
        self._channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        return Part(net, self._own_sections, self._tail)

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        if self.trunk is None:
            return {"images": images}
        x, maps = images, {}
        for name in self._shared:
            x = self.run_stage(self.trunk.net.get_submodule(name), x)
            if name in self.fused_maps:
                maps[name] = self._as_map(x)
        return maps | {"last": x}

    def _run_branch(self, expert: Any, maps: dict[str, Tensor]) -> Tensor:
        return self.run(expert, list(maps.values())[-1], expert)

    def _pairs(self, maps: dict[str, Tensor], deep: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        deep = [self._as_map(y) for y in deep]
        height, width = deep[0].shape[2:]
        shallow = []
        for name, fusion in zip(self.fused_maps, self._fusions, strict=True):
            halvings = getattr(fusion, "depth", 0)
            # a stage that rounds down leaves out the last row and column: so does the fusion
            shallow.append(maps[name][:, :, : height << halvings, : width << halvings])
        return shallow, deep

    def _finish(self, net: Any, fused: Tensor) -> Tensor:
        pixel = fused[:, None, None] if self._channels_last else fused[:, :, None, None]
        return net.forward_head(pixel, pre_logits=True)

    def _as_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self._channels_last else x


class TransformerPart(nn.Module):
    """Blocks of a vision transformer of timm, and before or behind them what it has there.

    Args:
        net: the network, changed.
        blocks: which of its blocks are kept.
        embeds: whether the embedding of patches and positions is kept, so that images come in.
        ends: whether the last norm and the head are kept.
    """

    def __init__(self, net: Any, blocks: range, *, embeds: bool, ends: bool, pools: bool) -> None:
        super().__init__()
        kept = {f"blocks.{i}" for i in blocks}
        if embeds:
            kept |= {"patch_embed", "pos_drop", "patch_drop", "norm_pre", "rope"}
        if ends:
            kept |= {"norm", "fc_norm", "head_drop"}
        if ends and pools:
            kept.add("attn_pool")
        elif hasattr(net, "attn_pool"):
            net.attn_pool = None
        _prune(net, kept, parameters=embeds)
        self.net: Any = net

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, P+N, D], and rotary embeddings of the positions where the blocks want some."""
        net = self.net
        height, width = net.patch_embed.patch_size
        images = F.pad(images, (0, -images.shape[3] % width, 0, -images.shape[2] % height))
        embedded = net._pos_embed(net.patch_embed(images))
        tokens, rope = embedded if isinstance(embedded, tuple) else (net.patch_drop(embedded), None)
        return net.norm_pre(tokens), rope

    def step(self, name: str, rope: Tensor | None, tokens: Tensor) -> Tensor:
        """One block."""
        block = self.net.blocks.get_submodule(name)
        if rope is None:
            return block(tokens)
        return block(tokens, rope=rope[int(name)] if getattr(self.net, "rope_mixed", False) else rope)

    def forward(self, tokens: Tensor, rope: Tensor | None = None) -> Tensor:
        """Tokens, or images where it embeds, through all blocks and the last norm."""
        if hasattr(self.net, "patch_embed"):
            tokens, rope = self.embed(tokens)
        for name in self.net.blocks._modules:
            tokens = self.step(name, rope, tokens)
        return self.net.norm(tokens)


class TimmTransformer(TimmNetwork):
    """A vision transformer: tokens of one width and number in all blocks.

    Without fusion features are pooled as in timm. Fused and pooled are the tokens of patches alone: class and register
    tokens have no position, and take part by attention.
    """

    def _divide(self, template: Any, expert_stages: Any) -> dict[str, FeatureMap]:
        depth = len(template.blocks)
        own = _own(max(1, depth // 4) if expert_stages is None else expert_stages, depth, "blocks")
        self._depth, self._shared = depth, depth - own
        self._prefix = template.num_prefix_tokens
        self.min_image_size = max(template.patch_embed.patch_size)
        thirds = {math.ceil(self._shared * i / 3) - 1 for i in (1, 2, 3)} if self._shared else set()
        return {f"blocks.{i}": FeatureMap(template.num_features, halvings=0) for i in sorted(thirds)}

    def _trunk(self, net: Any) -> nn.Module | None:
        if not self._shared:
            return None
        return TransformerPart(net, range(self._shared), embeds=True, ends=False, pools=False)

    def _branch(self, net: Any) -> nn.Module:
        own = range(self._shared, self._depth)
        return TransformerPart(net, own, embeds=not self._shared, ends=True, pools=not self.fusion)

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        if self.trunk is None:
            return {"images": images}
        tokens, rope = self.trunk.embed(images)
        maps = {}
        for name, block in self.trunk.net.blocks.named_children():
            tokens = self.run(partial(self.trunk.step, name, rope), tokens, block)
            if f"blocks.{name}" in self.fused_maps:
                maps[f"blocks.{name}"] = tokens[:, self._prefix :]
        if rope is not None:
            maps["rope"] = rope.expand(len(tokens), *rope.shape)  # as all maps: images first
        return maps | {"tokens": tokens}

    def _run_branch(self, expert: Any, maps: dict[str, Tensor]) -> Tensor:
        rope = maps["rope"][0] if "rope" in maps else None
        return self.run(partial(expert, rope=rope), list(maps.values())[-1], expert)

    def _pairs(self, maps: dict[str, Tensor], deep: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [maps[name] for name in self.fused_maps], [tokens[:, self._prefix :] for tokens in deep]

    def _finish(self, net: Any, fused: Tensor) -> Tensor:
        return net.head_drop(net.fc_norm(fused))


def published_weights(model: MultiExpertNetwork) -> dict[str, Tensor]:
    """The state_dict of the network that timm publishes under this one's name.

    Raises:
        CheckpointError: it is no network of timm, or the weights are not here and cannot be fetched.
    """
    if not isinstance(model, TimmNetwork):
        raise CheckpointError("--pretrained: timm publishes weights of its own networks alone; use --model timm:NAME")
    try:
        return model.source.make(pretrained=True).state_dict()
    except Exception as error:  # of timm, of the hub, and of whatever that uses to fetch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"--pretrained: the weights that timm publishes for {model.source.name} cannot be had ({reason}); fetch "
            "them where there is a network, and name their file: --pretrained FILE"
        ) from error


# ---- division


def _has_rotary_blocks(template: Any) -> bool:
    return all(hasattr(template, name) for name in ("_pos_embed", "blocks", "rope", "norm_pre", "num_prefix_tokens"))


def _own(expert_stages: Any, count: int, what: str) -> int:
    """How many of the stages, or blocks, are an expert's own."""
    if expert_stages == "all":
        return count
    if not isinstance(expert_stages, int) or not 1 <= expert_stages < count:
        raise ValueError(f"expert_stages must be from 1 to {count - 1} {what}, or 'all', got {expert_stages!r}")
    return expert_stages


def _sections(net: nn.Module, features: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a network calls one after the other, by dotted names, and its head.

    A container of stages is taken apart; timm's own feature extraction relies on the same order.
    """
    sections: list[str] = []
    children = list(net._modules)
    heads = [name for name in children if name in _HEADS]
    before = children[: children.index(heads[0])] if heads else children
    for name in before:
        child = net._modules[name]
        if child is None:
            continue
        if any(feature.startswith(f"{name}.") for feature in features) and type(child) in (nn.Sequential, nn.ModuleList):
            sections += [f"{name}.{inner}" for inner in child._modules]
        else:
            sections.append(name)
    return sections, children[len(before) :]


def _prune(module: nn.Module, kept: Collection[str], *, parameters: bool = False) -> None:
    """Leave of a module only the named descendants and what they lie in; of its own parameters all, or none."""
    if not parameters:
        module._parameters.clear()
        module._buffers.clear()
    for name in list(module._modules):
        if name in kept:
            continue
        inner = {other.removeprefix(f"{name}.") for other in kept if other.startswith(f"{name}.")}
        child = module._modules[name]
        if inner and child is not None:
            _prune(child, inner, parameters=parameters)
        else:
            del module._modules[name]
