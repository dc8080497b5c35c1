"""The peers of the methods' networks, in plain eager PyTorch: a loop over experts that have one stage or more alone.

``peer.py`` has the network with knowledge fusion, and the blocks. Names of parameters are those of this package, but
for classifiers, each of which is a module, and shortcuts.
"""

import math
from typing import Any

import peer
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS, WIDTH = {"resnet8": (1, 1, 1), "resnet32": (5, 5, 5)}, 16


class Pad(nn.Module):
    """The shortcut without parameters: every second pixel, and zeros around the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


class PaddedBlock(peer.BasicBlock):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, stride)
        if stride != 1 or channels != width:
            self.shortcut = Pad((width - channels) // 2)


class CosineLinear(nn.Module):
    """The weight [D, C] holds a class a column."""

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(dim, num_classes).uniform_(-1, 1), dim=0))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(x, dim=1).mm(F.normalize(self.weight, dim=0))


class Branches(nn.Module):
    """ResLT's: the feature split in three by a 1x1 convolution, and one classifier for all."""

    def __init__(self, dim: int, num_classes: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.split = nn.Linear(dim, branches * dim, bias=False)
        self.norm = nn.BatchNorm1d(branches * dim)
        self.common = nn.Linear(dim, num_classes)
        nn.init.normal_(self.split.weight, std=math.sqrt(2 / dim))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.common(part) for part in F.relu(self.norm(self.split(x))).chunk(self.branches, dim=1)]


class Network(nn.Module):
    """Shared stages, the experts' copies of the others, and a classifier for each expert.

    Args:
        blocks: of each stage.
        num_classes, num_experts, classifier, scale, expert_stages, expert_width, shortcut: as of
            :func:`shike_fast.models.create_model`.
        branches: of ResLT, 0 for a classifier of each expert.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        num_classes: int,
        num_experts: int,
        classifier: str = "cosine",
        scale: float = 30.0,
        expert_stages: int | str = 1,
        expert_width: float = 1.0,
        shortcut: str = "projection",
        branches: int = 0,
    ) -> None:
        super().__init__()
        block = PaddedBlock if shortcut == "pad" else peer.BasicBlock
        self.shared = 0 if expert_stages == "all" else len(blocks) - int(expert_stages)
        channels = WIDTH
        if self.shared:
            self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(WIDTH)
        for i in range(self.shared):
            self.add_module(f"layer{i + 1}", peer.stage(block, channels, WIDTH * 2**i, blocks[i], min(i, 1) + 1))
            channels = WIDTH * 2**i
        self.experts = nn.ModuleList()
        for _ in range(num_experts):
            inside, own = channels, nn.Sequential()
            if not self.shared:
                own.add_module("stem", Stem())
            for i in range(self.shared, len(blocks)):
                width = round(expert_width * WIDTH * 2**i)
                own.add_module(f"layer{i + 1}", peer.stage(block, inside, width, blocks[i], min(i, 1) + 1))
                inside = width
            self.experts.append(own if len(own) > 1 else own[0])
        if branches:
            self.classifiers: nn.Module = Branches(inside, num_classes, branches)
        elif classifier == "cosine":
            self.classifiers = nn.ModuleList(CosineLinear(inside, num_classes, scale) for _ in range(num_experts))
        else:
            self.classifiers = nn.ModuleList(nn.Linear(inside, num_classes) for _ in range(num_experts))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The logits [B, C] of every expert, or branch."""
        x = images
        if self.shared:
            x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.shared):
            x = getattr(self, f"layer{i + 1}")(x)
        features = [F.adaptive_avg_pool2d(expert(x), 1).flatten(1) for expert in self.experts]
        if isinstance(self.classifiers, Branches):
            return self.classifiers(features[0])
        return [classifier(f) for classifier, f in zip(self.classifiers, features, strict=True)]


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


def make_network(
    name: str, *, num_classes: int, num_experts: int, fusion: bool = True, branches: int = 0, **options: Any
) -> nn.Module:
    """The peer of a network for small images.

    Args:
        name: ``resnet8`` or ``resnet32``.
        num_classes, num_experts, fusion, options: as of :func:`shike_fast.models.create_model`.
        branches: see :class:`Network`.
    """
    if fusion:
        return getattr(peer, name)(num_classes)  # three experts, scale 30
    return Network(BLOCKS[name], num_classes=num_classes, num_experts=num_experts, branches=branches, **options)
