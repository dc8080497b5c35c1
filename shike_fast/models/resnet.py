"""Residual blocks, and the network of stages of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast.models.multi_expert import FeatureMap, MultiExpertNetwork, ResidualBlock, Stages
from shike_fast.models.recompute import DRAW_NOTHING

Shortcut = Literal["projection", "pad"]
ExpertStages = int | Literal["all"]


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut; the first convolution has the stride. Parameter names are torchvision's.

    Args:
        channels_in: of the input.
        width: channels that leave the block.
        stride: of the first convolution.
        shortcut: what changes the shape where it has to: ``"projection"``, a 1x1 convolution and BatchNorm, or
            ``"pad"``, :class:`PaddedShortcut`.

    Raises:
        ValueError: the shortcut is unknown, or zeros cannot pad the channels.
    """

    def __init__(self, channels_in: int, width: int, stride: int, *, shortcut: Shortcut = "projection") -> None:
        super().__init__()
        self.channels_out = width
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels_in, width, stride, shortcut)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def before_last_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return out, x if self.downsample is None else self.downsample(x)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 has the stride (v1.5). Parameter names are torchvision's.

    Four times ``width`` channels leave the block; inside, it has ``groups * width * width_per_group / 64``.

    Args:
        channels_in: of the input.
        width: a quarter of the channels that leave the block.
        stride: of the 3x3 convolution.
        groups: of the 3x3 convolution.
        width_per_group: channels of a group where ``width`` is 64.
        shortcut: ``"projection"``; a bottleneck has no other.

    Raises:
        ValueError: another shortcut is asked for, or a group would have no whole number of channels.
    """

    def __init__(
        self,
        channels_in: int,
        width: int,
        stride: int,
        *,
        groups: int = 1,
        width_per_group: int = 64,
        shortcut: Shortcut = "projection",
    ) -> None:
        super().__init__()
        if shortcut != "projection":
            raise ValueError(f"a bottleneck has the shortcut 'projection', got {shortcut!r}; 'pad' is of basic blocks")
        if width * width_per_group % 64:
            channels = width * width_per_group / 64
            raise ValueError(
                f"a bottleneck of width {width} would have {groups} groups of {channels:g} channels, no whole number; "
                "choose another expert_width"
            )
        self.channels_out = 4 * width
        inner = groups * (width * width_per_group // 64)
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, self.channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.channels_out)
        self.downsample = _shortcut(channels_in, self.channels_out, stride, shortcut)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def before_last_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.conv3(F.relu(self.bn2(self.conv2(out)), inplace=True))
        return out, x if self.downsample is None else self.downsample(x)


class PaddedShortcut(nn.Module):
    """Every ``stride``-th row and column of a map, between as many channels of zeros before and behind: no parameters.

    ``forward(x)``: [B, channels_in, H, W] -> [B, channels_out, ceil(H / stride), ceil(W / stride)].

    Raises:
        ValueError: ``channels_out - channels_in`` is negative or odd.

    Source: option A of He et al. (CVPR 2016) section 3.3, the zeros on both sides as in the published code of RIDE.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        if channels_out < channels_in or (channels_out - channels_in) % 2:
            raise ValueError(
                f"the shortcut 'pad' adds as many channels of zeros on either side: {channels_in} channels cannot "
                f"become {channels_out}; use 'projection' or another expert_width"
            )
        self.stride = stride
        self.channels = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.channels, self.channels))


class Stem(nn.Module):
    """What precedes the first stage: 7x7 convolution of stride 2, BatchNorm, ReLU and max-pooling, or a plain 3x3."""

    def __init__(self, channels_in: int, width: int, *, large: bool) -> None:
        super().__init__()
        size, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(channels_in, width, size, stride=stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return _through_stem(self, images)


Block = Callable[..., BasicBlock | Bottleneck]


class MultiExpertResNet(MultiExpertNetwork):
    """A residual network whose K experts share the first stages; each expert has its own copy of the others.

    The M shared stages ``layer1`` ... give the maps that experts fuse. Convolutions start Kaiming normal with PyTorch's
    defaults (``fan_in``, gain sqrt(2)); BatchNorm starts at weight 1, bias 0.

    Args:
        block: ``block(channels_in, width, stride)`` builds a block with the attribute ``channels_out``; it gets
            ``shortcut="pad"`` as well where that is asked for.
        blocks: the number of blocks in each stage, two stages or more.
        width: of the stem and of the blocks of the first stage; it doubles with every stage.
        large_stem: 7x7 convolution of stride 2 and max-pooling (for large images), instead of 3x3 of stride 1.
        expert_stages, expert_width, shortcut: see :func:`~shike_fast.models.create_model`.
        options: ``num_classes``, ``num_experts``, ``in_channels``, ``fusion``, ``classifier``, ``scale``: likewise.

    Raises:
        ValueError: an argument is out of range, or they do not fit together.

    Source: SHIKE (CVPR 2023) section 3; published code for the CIFAR form, inferred for the large form. Two stages and
    3/4 of the width in each expert: the published code of RIDE (ICLR 2021).
    """

    draw_nothing = (*DRAW_NOTHING, BasicBlock, Bottleneck, PaddedShortcut, Stem, Stages)

    def __init__(
        self,
        block: Block,
        blocks: Sequence[int],
        *,
        width: int,
        large_stem: bool,
        expert_stages: ExpertStages = 1,
        expert_width: float = 1.0,
        shortcut: Shortcut = "projection",
        **options: Any,
    ) -> None:
        if len(blocks) < 2 or min(blocks) < 1:
            raise ValueError(f"blocks must name two stages or more of at least one block each, got {tuple(blocks)}")
        if shortcut not in ("projection", "pad"):
            raise ValueError(f"shortcut must be 'projection' or 'pad', got {shortcut!r}")
        last = len(blocks) - 1
        # one pixel is left of the last map
        super().__init__(min_image_size=(4 if large_stem else 1) * 2**last, **options)
        self.num_shared = shared = len(blocks) - _own_stages(expert_stages, len(blocks))
        self.branch_name = f"layer{last + 1}"
        if shared == 0 and self.fusion:
            raise ValueError(
                "expert_stages='all' leaves no map that experts share and could fuse; take fusion=False "
                "(--no-fusion), or let them share a stage"
            )
        if shortcut == "pad":
            block = partial(block, shortcut=shortcut)

        channels, maps = width, {}
        if shared > 0:
            stem = Stem(self.in_channels, width, large=large_stem)
            self.conv1, self.bn1, self.maxpool = stem.conv1, stem.bn1, stem.maxpool
        for i in range(shared):
            stage, channels = _stage(block, channels, width * 2**i, blocks[i], stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
            maps[f"layer{i + 1}"] = FeatureMap(channels, halvings=last - i)

        own_widths = {i: _own_width(width * 2**i, expert_width) for i in range(shared, len(blocks))}
        branches = []
        for _ in range(self.num_experts):
            stages: OrderedDict[str, nn.Module] = OrderedDict()
            leaving = channels
            if shared == 0:
                leaving = own_widths[0]
                stages["stem"] = Stem(self.in_channels, leaving, large=large_stem)
            for i, own in own_widths.items():
                stage, leaving = _stage(block, leaving, own, blocks[i], stride=1 if i == 0 else 2)
                stages[f"layer{i + 1}"] = stage
            branches.append(stage if shared == last else Stages(stages))
        self.add_experts(branches, leaving, maps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        if self.num_shared == 0:
            return {"images": images}
        x = self.run(self._stem, images, self.conv1, self.bn1, self.maxpool)
        maps = {}
        for i in range(self.num_shared):
            name = f"layer{i + 1}"
            maps[name] = x = self.run_stage(getattr(self, name), x)
        return maps

    def pretrained_name(self, key: str) -> str | None:
        if key.startswith("experts.") and isinstance(self.experts[0], Stages):
            return key.split(".", 2)[2].removeprefix("stem.")
        return super().pretrained_name(key)

    def _stem(self, images: Tensor) -> Tensor:
        return _through_stem(self, images)


def _through_stem(stem: MultiExpertResNet | Stem, images: Tensor) -> Tensor:
    return stem.maxpool(F.relu(stem.bn1(stem.conv1(images)), inplace=True))


def _own_stages(expert_stages: ExpertStages, stages: int) -> int:
    """The number of stages that each expert has as its own copy."""
    if expert_stages == "all":
        return stages
    if not isinstance(expert_stages, int) or not 1 <= expert_stages < stages:
        raise ValueError(f"expert_stages must be from 1 to {stages - 1}, or 'all', got {expert_stages!r}")
    return expert_stages


def _own_width(width: int, factor: float) -> int:
    """The width of a stage of an expert."""
    own = width * factor
    if not (math.isfinite(own) and round(own) >= 1 and math.isclose(own, round(own))):
        raise ValueError(
            f"expert_width must be a factor that leaves a whole number of channels: {width} * {factor:g} is {own:g}"
        )
    return round(own)


def _shortcut(channels_in: int, channels_out: int, stride: int, shortcut: Shortcut) -> nn.Module | None:
    """The shortcut where the block changes the shape; None for the identity."""
    if stride == 1 and channels_in == channels_out:
        return None
    if shortcut == "pad":
        return PaddedShortcut(channels_in, channels_out, stride)
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
    )


def _stage(block: Block, channels: int, width: int, count: int, stride: int) -> tuple[nn.Sequential, int]:
    """``count`` blocks, the first with the stride, and the channels that leave them."""
    members = []
    for i in range(count):
        members.append(block(channels, width, stride if i == 0 else 1))
        channels = members[i].channels_out
    return nn.Sequential(*members), channels
