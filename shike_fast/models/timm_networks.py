"""Networks of timm with several experts: the last stage, or the last blocks of a vision transformer, once an expert.

The modules keep their names, so that files of timm's weights fit.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
import sys
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shike_fast.errors import CheckpointError
from shike_fast.models.multi_expert import FeatureMap, MultiExpertNetwork
from shike_fast.models.registry import register_model_family
from shike_fast.models.timm_parts import Part, TimmSource, TransformerPart, sections_of, whole_patches

_FAMILY = "timm"
_FITTING = "ResNet, ResNeXt, RegNet, EfficientNet, ConvNeXt and Swin, and vision transformers (vit_*, deit*, eva02_*)"
_TRANSFORMER = ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "num_prefix_tokens")
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
    kind = TimmTransformer if all(hasattr(template, part) for part in _TRANSFORMER) else TimmStages
    return kind(source, template, expert_stages=expert_stages, **options)


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
    def _run_branch(self, expert: Any, maps: Mapping[str, Tensor]) -> Tensor:
        """What comes before the pooling in timm's network."""

    @abstractmethod
    def _pairs(self, maps: Mapping[str, Tensor], deep: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Shallow and deep maps or tokens as they are fused."""

    @abstractmethod
    def _finish(self, net: Any, fused: Tensor) -> Tensor:
        """What timm's head does with pooled features before its classifier."""

    def expert_features(self, maps: Mapping[str, Tensor]) -> Tensor:
        deep = [self._run_branch(expert, maps) for expert in self.experts]
        networks: list[Any] = [expert.net for expert in self.experts]
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
        return ValueError(f"timm's {self.source.name} cannot be divided among experts: {reason}; {_FITTING} can")

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
            raise self._unfit(f"its head makes {pooled.shape[1]} features, of fused ones {features.shape[2]}")


class TimmStages(TimmNetwork):
    """A network of stages of maps, each smaller than the one before."""

    def _divide(self, template: Any, expert_stages: Any) -> dict[str, FeatureMap]:
        info = [dict(entry) for entry in getattr(template, "feature_info", ())]
        sections, self._tail = sections_of(template, [str(entry["module"]) for entry in info])
        stages = [entry for entry in info if entry["module"] in sections]
        if len(stages) < 2:
            raise self._unfit("it has no feature maps")
        own = _own(1 if expert_stages is None else expert_stages, len(stages), "stages")
        ends = [sections.index(entry["module"]) + 1 for entry in stages]
        start = 0 if own == len(stages) else ends[-1 - own]
        self._shared, self._own_sections = tuple(sections[:start]), tuple(sections[start:])
        last = stages[-1]["reduction"]
        self.min_image_size = last
        self._patch: tuple[int, int] = getattr(getattr(template, "patch_embed", None), "patch_size", (1, 1))
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
            return {"images": whole_patches(images, self._patch)}
        x, maps = whole_patches(images, self._patch), {}
        for names in self._steps():
            members = [self.trunk.net.get_submodule(name) for name in names]
            x = self.run_stage(members[0], x) if len(names) == 1 else self.run(partial(_chain, members), x, *members)
            if names[-1] in self.fused_maps:
                maps[names[-1]] = self._as_map(x)
        return maps | {"last": x}

    def _steps(self) -> list[list[str]]:
        """The shared modules as they are recomputed: a sequence of blocks alone, what lies between two at once.

        An activation that works in place may not get what was stored to be recomputed from.
        """
        steps: list[list[str]] = []
        open_step = False
        for name in self._shared:
            is_stage = _is_sequence_of_blocks(self.trunk.net.get_submodule(name))
            if open_step and not is_stage:
                steps[-1].append(name)
            else:
                steps.append([name])
            open_step = not is_stage and name not in self.fused_maps
        return steps

    def _run_branch(self, expert: Any, maps: Mapping[str, Tensor]) -> Tensor:
        return self.run(expert, list(maps.values())[-1], expert)

    def _pairs(self, maps: Mapping[str, Tensor], deep: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
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

    def _run_branch(self, expert: Any, maps: Mapping[str, Tensor]) -> Tensor:
        rope = maps["rope"][0] if "rope" in maps else None
        return self.run(partial(expert, rope=rope), list(maps.values())[-1], expert)

    def _pairs(self, maps: Mapping[str, Tensor], deep: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [maps[name] for name in self.fused_maps], [tokens[:, self._prefix :] for tokens in deep]

    def _finish(self, net: Any, fused: Tensor) -> Tensor:
        return net.head_drop(net.fc_norm(fused))


def published_weights(model: MultiExpertNetwork) -> dict[str, Tensor]:
    """The state_dict of the network that timm publishes under this one's name.

    Raises:
        CheckpointError: it is no network of timm, or the weights are not here and cannot be fetched.
    """
    if not isinstance(model, TimmNetwork):
        raise CheckpointError("--pretrained: timm publishes weights of networks of timm alone; use --model timm:NAME")
    try:
        return model.source.make(pretrained=True).state_dict()
    except Exception as error:  # of timm, of the hub, and of whatever that uses to fetch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"--pretrained: the weights that timm publishes for {model.source.name} cannot be had ({reason}); fetch "
            "them where there is a network, and name their file: --pretrained FILE"
        ) from error


def _chain(members: list[nn.Module], x: Tensor) -> Tensor:
    for member in members:
        x = member(x)
    return x


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and all(list(block.children()) for block in module)


def _own(expert_stages: Any, count: int, what: str) -> int:
    """How many of the stages, or blocks, are an expert's own."""
    if expert_stages == "all":
        return count
    if not isinstance(expert_stages, int) or not 1 <= expert_stages < count:
        raise ValueError(f"expert_stages must be from 1 to {count - 1} {what}, or 'all', got {expert_stages!r}")
    return expert_stages
