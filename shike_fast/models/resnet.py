"""Residual blocks, and the network of stages of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast.models.multi_expert import FeatureMap, MultiExpertNetwork, ResidualBlock
from shike_fast.models.recompute import DRAW_NOTHING


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut; the first convolution has the stride. Parameter names are torchvision's."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.channels_out = width
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(channels_in, width, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def before_last_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return out, x if self.downsample is None else self.downsample(x)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 has the stride (v1.5). Parameter names are torchvision's.

    Four times ``width`` channels leave the block; inside, it has ``groups * width * width_per_group / 64``.
    """

    def __init__(
        self, channels_in: int, width: int, stride: int, *, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        self.channels_out = 4 * width
        inner = groups * (width * width_per_group // 64)
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, self.channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.channels_out)
        self.downsample = _projection(channels_in, self.channels_out, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def before_last_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.conv3(F.relu(self.bn2(self.conv2(out)), inplace=True))
        return out, x if self.downsample is None else self.downsample(x)


Block = Callable[[int, int, int], BasicBlock | Bottleneck]


class MultiExpertResNet(MultiExpertNetwork):
    """A residual network whose K experts share all stages but the last; each expert has its own copy of the last stage.

    The M shared stages ``layer1`` ... give the maps that experts fuse; the chain of stage i (from 0) has M - i strided
    convolutions. Convolutions start Kaiming normal with PyTorch's defaults (``fan_in``, gain sqrt(2)); BatchNorm starts
    at weight 1, bias 0.

    Args:
        block: ``block(channels_in, width, stride)`` builds a block with the attribute ``channels_out``.
        blocks: the number of blocks in each stage, two stages or more.
        width: of the stem and of the blocks of the first stage; it doubles with every stage.
        large_stem: 7x7 convolution of stride 2 and max-pooling (for large images), instead of 3x3 of stride 1.
        options: ``num_classes``, ``num_experts``, ``in_channels``, ``fusion``, ``classifier``, ``scale``: see
            :func:`~shike_fast.models.create_model`.

    Raises:
        ValueError: an argument is out of range.

    Source: SHIKE (CVPR 2023) section 3; published code for the CIFAR form, inferred for the large form.
    """

    draw_nothing = (*DRAW_NOTHING, BasicBlock, Bottleneck)

    def __init__(self, block: Block, blocks: Sequence[int], *, width: int, large_stem: bool, **options: Any) -> None:
        if len(blocks) < 2 or min(blocks) < 1:
            raise ValueError(f"blocks must name two stages or more of at least one block each, got {tuple(blocks)}")
        shared = len(blocks) - 1
        # one pixel is left of the last map
        super().__init__(min_image_size=(4 if large_stem else 1) * 2**shared, **options)
        self.num_shared = shared
        self.branch_name = f"layer{shared + 1}"

        if large_stem:
            self.conv1 = nn.Conv2d(self.in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(self.in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large_stem else nn.Identity()

        channels, maps = width, {}
        for i, count in enumerate(blocks[:-1]):
            stage, channels = _stage(block, channels, width * 2**i, count, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
            maps[f"layer{i + 1}"] = FeatureMap(channels, halvings=shared - i)
        experts = [_stage(block, channels, width * 2**shared, blocks[-1], stride=2) for _ in range(self.num_experts)]
        self.add_experts([stage for stage, _ in experts], experts[0][1], maps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        x = self.run(self._stem, images, self.conv1, self.bn1, self.maxpool)
        maps = {}
        for i in range(self.num_shared):
            name = f"layer{i + 1}"
            maps[name] = x = self.run_stage(getattr(self, name), x)
        return maps

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))


def _projection(channels_in: int, channels_out: int, stride: int) -> nn.Sequential | None:
    """The shortcut where the block changes the shape: 1x1 convolution and BatchNorm; None for the identity."""
    if stride == 1 and channels_in == channels_out:
        return None
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
