"""The peer of the training benchmarks: network, loss, optimizer and data path in plain eager PyTorch.

Written the way the published SHIKE code is: one loop over the experts, a module for every step, images augmented one by
one with Pillow in the worker processes of a DataLoader, maps in NCHW. Its parameters have the published names. It is
kinder to the clock than that code in three points: labels are int64 and the loss runs in the logits' precision (it had
float64 one-hot labels, so a loss in float64), no step waits for the device to report its loss, and the workers stay
from epoch to epoch.
"""

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from shike_fast.data.augment.autoaugment import CIFAR10_POLICY

sys.path.append(str(Path(__file__).parents[1] / "tests" / "oracle"))
from pillow_operations import apply_step

SCALE = 30.0
HARDEST_WEIGHT, MUTUAL_WEIGHT, TARGET_LOGIT = 10.0, 1.0, -30.0
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; four times ``width`` channels leave the block."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = projection(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out)


def projection(channels: int, channels_out: int, stride: int) -> nn.Sequential:
    """The shortcut: a 1x1 convolution and BatchNorm where the shape changes, else nothing."""
    if stride == 1 and channels == channels_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out))


class StridedConv(nn.Module):
    """A convolution that halves a map, BatchNorm, and possibly ReLU."""

    def __init__(self, channels: int, channels_out: int, relu: bool) -> None:
        super().__init__()
        members = [nn.Conv2d(channels, channels_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels_out)]
        self.conv = nn.Sequential(*members, *([nn.ReLU()] if relu else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ShallowExpert(nn.Module):
    """The chain that brings a shallow map to the shape of the deep ones; its second convolution has no ReLU."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.Sequential()
        for i in range(depth):
            self.convs.add_module(f"StridedConv{i}", StridedConv(channels * 2**i, channels * 2 ** (i + 1), relu=i != 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class NormedLinear(nn.Module):
    """A cosine classifier: the weight [D, C] holds a class a column."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(dim, num_classes).uniform_(-1, 1), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * F.normalize(x, dim=1).mm(F.normalize(self.weight, dim=0))


class PeerNetwork(nn.Module):
    """Shared stages ``layer1`` ..., the experts' copies of the last one in ``layerNs``, and their classifiers."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        *,
        width: int,
        num_classes: int,
        num_experts: int = 3,
        in_channels: int = 3,
        large_stem: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_shared = len(blocks) - 1
        if large_stem:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if large_stem else nn.Identity()
        channels, shallow = width, []
        for i, count in enumerate(blocks[:-1]):
            self.add_module(f"layer{i + 1}", stage(block, channels, width * 2**i, count, stride=1 if i == 0 else 2))
            channels = block.expansion * width * 2**i
            shallow.append(channels)
        last = [stage(block, channels, width * 2**self.num_shared, blocks[-1], stride=2) for _ in range(num_experts)]
        self.add_module(f"layer{len(blocks)}s", nn.ModuleList(last))
        sources = [k % self.num_shared for k in range(num_experts)]
        self.shallow_exps = nn.ModuleList(ShallowExpert(shallow[i], depth=self.num_shared - i) for i in sources)
        dim = block.expansion * width * 2**self.num_shared
        self.classifiers = nn.ModuleList(NormedLinear(dim, num_classes) for _ in range(num_experts))
        self.rt_classifiers = nn.ModuleList(NormedLinear(dim, num_classes) for _ in range(num_experts))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor, stage: int = 1) -> list[Tensor]:
        """The logits [B, C] of every expert."""
        x = self.pool(F.relu(self.bn1(self.conv1(images))))
        shallow = []
        for i in range(self.num_shared):
            x = getattr(self, f"layer{i + 1}")(x)
            shallow.append(x)
        experts = getattr(self, f"layer{self.num_shared + 1}s")
        classifiers = self.classifiers if stage == 1 else self.rt_classifiers
        logits = []
        for k in range(self.num_experts):
            fused = experts[k](x) * self.shallow_exps[k](shallow[k % self.num_shared])
            features = F.adaptive_avg_pool2d(fused, 1).flatten(1)
            logits.append(classifiers[k](features))
        return logits


def stage(
    block: type[BasicBlock] | type[Bottleneck], channels: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """``count`` blocks, the first with the stride."""
    members = [block(channels, width, stride)]
    members += [block(block.expansion * width, width, 1) for _ in range(count - 1)]
    return nn.Sequential(*members)


def resnet8(num_classes: int, in_channels: int = 3) -> PeerNetwork:
    return PeerNetwork(BasicBlock, [1, 1, 1], width=16, num_classes=num_classes, in_channels=in_channels)


def resnet32(num_classes: int, in_channels: int = 3) -> PeerNetwork:
    return PeerNetwork(BasicBlock, [5, 5, 5], width=16, num_classes=num_classes, in_channels=in_channels)


def resnet50(num_classes: int) -> PeerNetwork:
    return PeerNetwork(Bottleneck, [3, 4, 6, 3], width=64, num_classes=num_classes, large_stem=True)


def dkt_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    hardest_weight: float = HARDEST_WEIGHT,
    mutual_weight: float = MUTUAL_WEIGHT,
) -> Tensor:
    """Cross-entropy, hardest negatives and mutual distillation; no teacher is detached, both KL divide by B·C."""
    is_target = F.one_hot(target, logits[0].shape[1]).to(logits[0].dtype)
    stacked = torch.stack(list(logits))
    mean = stacked.mean(0)
    hardest = (mean - 1e4 * is_target).argmax(1)
    is_hardest = F.one_hot(hardest, mean.shape[1]).to(mean.dtype)
    teacher = stacked.max(0).values * (1 - is_hardest) + mean * is_hardest
    teacher = F.softmax(teacher * (1 - is_target), dim=1)
    loss = torch.zeros((), device=target.device)
    for z in logits:
        loss = loss + F.cross_entropy(z, target)
        student = F.log_softmax(z * (1 - is_target) + TARGET_LOGIT * is_target, dim=1)
        loss = loss + hardest_weight * F.kl_div(student, teacher, reduction="none").mean()
    for i, j in itertools.permutations(range(len(logits)), 2):
        divergence = F.kl_div(F.log_softmax(logits[i], dim=1), F.softmax(logits[j], dim=1), reduction="none")
        loss = loss + mutual_weight * divergence.mean()
    return loss


def balanced_softmax_loss(logits: Sequence[Tensor], target: Tensor, class_counts: Tensor) -> Tensor:
    """Of the second stage, which trains ``rt_classifiers`` alone."""
    prior = class_counts.log()
    return sum((F.cross_entropy(z + prior, target) for z in logits), start=torch.zeros((), device=target.device))


def make_optimizer(network: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


Transform = Callable[[Image.Image], Image.Image]


def random_crop(image: Image.Image) -> Image.Image:
    """A window of the old size from the image padded with 4 zeros on every side."""
    left, top = random.randrange(9), random.randrange(9)
    return ImageOps.expand(image, 4).crop((left, top, left + image.width, top + image.height))


def random_flip(image: Image.Image) -> Image.Image:
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def auto_augment(image: Image.Image) -> Image.Image:
    for step in random.choice(CIFAR10_POLICY):
        if random.random() < step.probability:
            image = apply_step(image, step, random.choice((-1, 1)))
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def cutout(image: Tensor) -> Tensor:
    """Zero a hole of 16 x 16 pixels, or what of it is within the image."""
    height, width = image.shape[1:]
    y, x = random.randrange(height), random.randrange(width)
    mask = np.ones((height, width), np.float32)
    mask[max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0.0
    return image * torch.from_numpy(mask)


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Images uint8 [N, H, W, 3] and labels int64 [N], each image augmented by itself."""

    transforms: tuple[Transform, ...] = (random_crop, random_flip, auto_augment)

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index])
        for transform in self.transforms:
            image = transform(image)
        return cutout(to_tensor(image)).sub_(self.mean).div_(self.std), int(self.labels[index])


def batches(
    dataset: AugmentedImages, *, batch_size: int, workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of one epoch after the other, without end; to close the iterator ends the workers."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader
