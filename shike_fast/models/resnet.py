"""Multi-expert residual networks: shared early stages, a copy of the last stage per expert, depth-wise fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast.models._recompute import recomputed
from shike_fast.nn import (
    CosineClassifier,
    DepthwiseKnowledgeFusion,
    LinearClassifier,
    SyncBatchNorm,
    fuse_experts,
)
from shike_fast.nn.fusion import has_hooks, is_batch_norm


class BasicBlock(nn.Module):
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
        """What the last BatchNorm gets, and the shortcut that is added to what it gives."""
        out = self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return out, x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        return _end_of_block(self.last_norm, *self.before_last_norm(x))


class Bottleneck(nn.Module):
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
        """What the last BatchNorm gets, and the shortcut that is added to what it gives."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.conv3(F.relu(self.bn2(self.conv2(out)), inplace=True))
        return out, x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        return _end_of_block(self.last_norm, *self.before_last_norm(x))


Result = TypeVar("Result")
Block = Callable[[int, int, int], BasicBlock | Bottleneck]
_DRAW_NOTHING = (  # of other modules nobody knows whether they draw random numbers
    BasicBlock,
    Bottleneck,
    nn.Sequential,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    SyncBatchNorm,
    nn.MaxPool2d,
    nn.Identity,
)


class MultiExpertResNet(nn.Module):
    r"""A residual network whose K experts share all stages but the last.

    .. math:: f_k = \mathrm{GAP}(deep_k \odot S_k(shallow_{k \bmod M})), \qquad z_k = s \cos(f_k, W_k)

    M shared stages give the shallow maps; the chain of stage i (from 0) has M - i strided convolutions. Two
    classifiers stand on the features: ``classifiers`` (stage 1) and ``rt_classifiers`` (stage 2, re-trained with all
    else frozen). Convolutions start Kaiming normal with PyTorch's defaults (``fan_in``, gain sqrt(2)); BatchNorm
    starts at weight 1, bias 0.

    Attributes: ``conv1``, ``bn1``, ``layer1`` ... (shared), ``experts`` (K copies of the last stage), ``fusions`` (K
    chains), ``classifiers``, ``rt_classifiers``; ``description``, set by :func:`~shike_fast.models.create_model`,
    which rebuilds it; ``checkpoint_activations``, a switch, off at first: store only what enters the stem and each
    block, and compute their insides again in the backward pass (same results, less memory, more time; forward hooks
    in there are called twice).

    Args:
        block: ``block(channels_in, width, stride)`` builds a block that says its ``channels_out``.
        blocks: the number of blocks in each stage, two stages or more.
        width: of the stem and of the blocks of the first stage; it doubles with every stage.
        large_stem: 7x7 convolution of stride 2 and max-pooling (for large images), instead of 3x3 of stride 1.
        num_classes, num_experts, in_channels, fusion, classifier, scale: see :func:`~shike_fast.models.create_model`.

    Raises:
        ValueError: an argument is out of range.

    Source: SHIKE (CVPR 2023) section 3; published code for the CIFAR form, inferred for the large form.
    """

    description: dict[str, Any]

    def __init__(
        self,
        block: Block,
        blocks: Sequence[int],
        *,
        width: int,
        large_stem: bool,
        num_classes: int,
        num_experts: int = 3,
        in_channels: int = 3,
        fusion: bool = True,
        classifier: str = "cosine",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        _check_arguments(blocks, num_classes, num_experts, in_channels, classifier)
        self.description = {}
        self.checkpoint_activations = False
        self.in_channels = in_channels
        self.num_experts = num_experts
        self.num_shared = len(blocks) - 1
        self.min_image_size = (4 if large_stem else 1) * 2**self.num_shared  # one pixel is left of the last map

        if large_stem:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large_stem else nn.Identity()

        channels, shallow_channels = width, []
        for i, count in enumerate(blocks[:-1]):
            stage, channels = _stage(block, channels, width * 2**i, count, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
            shallow_channels.append(channels)
        experts = [
            _stage(block, channels, width * 2**self.num_shared, blocks[-1], stride=2) for _ in range(num_experts)
        ]
        self.experts = nn.ModuleList(stage for stage, _ in experts)
        dim = experts[0][1]
        self.fusions = None
        if fusion:
            sources = [k % self.num_shared for k in range(num_experts)]
            self.fusions = nn.ModuleList(
                DepthwiseKnowledgeFusion(shallow_channels[i], dim, depth=self.num_shared - i) for i in sources
            )
        self.classifiers = _classifier(classifier, num_experts, dim, num_classes, scale)
        self.rt_classifiers = _classifier(classifier, num_experts, dim, num_classes, scale)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor, stage: int = 1) -> Tensor:
        """Logits of every expert; their mean over K is the prediction.

        Args:
            images: [B, in_channels, H, W], floating, any strides (channels-last preferred), H and W at least
                ``min_image_size``; odd sizes are fine.
            stage: 1 for ``classifiers``, 2 for ``rt_classifiers``.

        Returns:
            [K, B, C], float32 (float64 for a float64 network), also under autocast.

        Raises:
            ValueError: the images have another shape, or stage is neither 1 nor 2.
        """
        return self.classify(self.features(images), stage)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of every expert: images [B, in_channels, H, W] -> [K, B, D]."""
        self._check_images(images)
        x = self._run(self._stem, images, self.conv1, self.bn1, self.maxpool)
        shallow = []
        for i in range(self.num_shared):
            x = self._run_stage(getattr(self, f"layer{i + 1}"), x)
            shallow.append(x)
        if self.fusions is None:
            return torch.stack([self._run_stage(expert, x).mean(dim=(2, 3)) for expert in self.experts])
        fusions = cast(list[DepthwiseKnowledgeFusion], list(self.fusions))
        sources = [shallow[k % self.num_shared] for k in range(self.num_experts)]
        if not all(type(fusion) is DepthwiseKnowledgeFusion and not has_hooks(fusion) for fusion in fusions):
            pairs = zip(fusions, sources, self.experts, strict=True)
            return torch.stack([fusion(source, self._run_stage(expert, x)) for fusion, source, expert in pairs])
        if not all(map(_foldable, self.experts)):
            return fuse_experts(fusions, sources, [self._run_stage(expert, x) for expert in self.experts])
        deep: list[Tensor] = []
        shortcut: list[Tensor] = []
        norms: list[nn.Module] = []
        for expert in self.experts:
            blocks, out = list(cast(nn.Sequential, expert)), x
            for block in blocks[:-1]:
                out = self._run(block, out, block)
            last = cast(BasicBlock | Bottleneck, blocks[-1])
            y, added = self._run(last.before_last_norm, out, last)
            deep.append(y)
            shortcut.append(added)
            norms.append(last.last_norm)
        return fuse_experts(fusions, sources, deep, shortcut=shortcut, deep_norms=norms)

    def classify(self, features: Tensor, stage: int = 1) -> Tensor:
        """Logits from features, [K, B, D] -> [K, B, C]: stage 1 by ``classifiers``, stage 2 by ``rt_classifiers``."""
        if stage == 1:
            return self.classifiers(features)
        if stage == 2:
            return self.rt_classifiers(features)
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")

    def stage2_parameters(self) -> list[nn.Parameter]:
        """The parameters of ``rt_classifiers``: stage 2 trains them and freezes all others, BatchNorm in train mode."""
        return list(self.rt_classifiers.parameters())

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))

    def _run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """``stage(x)``, block by block where nothing sees or replaces the stage as a whole."""
        if not self.checkpoint_activations or type(stage).forward is not nn.Sequential.forward or has_hooks(stage):
            return self._run(stage, x, stage)
        for block in cast(nn.Sequential, stage):
            x = self._run(block, x, block)
        return x

    def _run(self, function: Callable[[Tensor], Result], x: Tensor, *modules: nn.Module) -> Result:
        """``function(x)``, which calls these modules; what is stored of it is up to ``checkpoint_activations``."""
        if not (self.checkpoint_activations and self.training):
            return function(x)
        draws = not all(type(member) in _DRAW_NOTHING for module in modules for member in module.modules())
        return recomputed(function, x, modules, draws=draws)

    def _check_images(self, images: Tensor) -> None:
        least = self.min_image_size
        right_shape = images.dim() == 4 and images.shape[1] == self.in_channels
        if not right_shape or images.shape[2] < least or images.shape[3] < least or not images.is_floating_point():
            expected = f"floating [B, {self.in_channels}, H, W] with H and W at least {least}"
            raise ValueError(f"images must be {expected}, got {images.dtype} {list(images.shape)}")


def _check_arguments(
    blocks: Sequence[int], num_classes: int, num_experts: int, in_channels: int, classifier: str
) -> None:
    if len(blocks) < 2 or min(blocks) < 1:
        raise ValueError(f"blocks must name two stages or more of at least one block each, got {tuple(blocks)}")
    least_values = (("num_classes", num_classes, 2), ("num_experts", num_experts, 1), ("in_channels", in_channels, 1))
    for name, value, least in least_values:
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if classifier not in ("cosine", "linear"):
        raise ValueError(f"classifier must be 'cosine' or 'linear', got {classifier!r}")


def _projection(channels_in: int, channels_out: int, stride: int) -> nn.Sequential | None:
    """The shortcut where the block changes the shape: 1x1 convolution and BatchNorm; None for the identity."""
    if stride == 1 and channels_in == channels_out:
        return None
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
    )


def _end_of_block(norm: nn.Module, y: Tensor, shortcut: Tensor) -> Tensor:
    out = norm(y)
    out = out + shortcut if has_hooks(norm) else out.add_(shortcut)  # what backward hooks see must not change in place
    return F.relu(out, inplace=True)


def _foldable(expert: nn.Module) -> bool:
    """Whether the end of the expert's last block can be left to the fusion: nothing else sees or replaces it."""
    if type(expert).forward is not nn.Sequential.forward or has_hooks(expert):
        return False
    last = cast(nn.Sequential, expert)[-1]
    if not isinstance(last, BasicBlock | Bottleneck) or type(last).forward not in (
        BasicBlock.forward,
        Bottleneck.forward,
    ):
        return False
    return not has_hooks(last) and is_batch_norm(last.last_norm)


def _stage(block: Block, channels: int, width: int, count: int, stride: int) -> tuple[nn.Sequential, int]:
    """``count`` blocks, the first with the stride, and the channels that leave them."""
    members = []
    for i in range(count):
        members.append(block(channels, width, stride if i == 0 else 1))
        channels = members[i].channels_out
    return nn.Sequential(*members), channels


def _classifier(
    kind: str, num_experts: int, dim: int, num_classes: int, scale: float
) -> CosineClassifier | LinearClassifier:
    if kind == "cosine":
        return CosineClassifier(num_experts, dim, num_classes, scale)
    return LinearClassifier(num_experts, dim, num_classes)
