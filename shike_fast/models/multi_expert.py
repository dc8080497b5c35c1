"""The contract of a multi-expert network: a trunk with named feature maps, K branches, K fusions, two sets of K heads.

A backbone subclasses :class:`MultiExpertNetwork`, builds its trunk and its branches, and says which maps the trunk has.
Fusion, heads, the stages' parameters, and activation checkpointing come from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast.models.recompute import DRAW_NOTHING, recomputed
from shike_fast.nn import (
    CosineClassifier,
    DepthwiseKnowledgeFusion,
    LinearClassifier,
    fuse_experts,
)
from shike_fast.nn.fusion import has_hooks, is_batch_norm

# What the commands use of a network besides ``forward(images, stage=…)``; any module that has it can be trained.
TRAINABLE = ("min_image_size", "features", "classify", "stage2_parameters", "checkpoint_activations")

BRANCHES = ("experts", "fusions")  # what follows the trunk, by the names of its attributes
HEADS = ("classifiers", "rt_classifiers")
_NEW_PARTS = ("fusions.", "classifiers.", "rt_classifiers.")  # what a plain network does not have
Result = TypeVar("Result")


@dataclass(frozen=True)
class FeatureMap:
    """A map of the trunk that experts fuse with their own.

    Attributes:
        channels: its channels.
        halvings: how often a branch's map is smaller than this one by a factor of two, rounding up; 0 where both are of
            one size, as those of a transformer, which may be tokens [B, N, C].
    """

    channels: int
    halvings: int


class ResidualBlock(nn.Module, ABC):
    """A block that ends in a BatchNorm, a shortcut and ReLU: ``relu(last_norm(y) + shortcut)``.

    Where a branch is an :class:`torch.nn.Sequential` that ends in one, its end and the fusion are one operator.
    """

    @property
    @abstractmethod
    def last_norm(self) -> nn.Module:
        """The BatchNorm at the end."""

    @abstractmethod
    def before_last_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the last BatchNorm, and the shortcut that is added to its output."""

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.before_last_norm(x)
        norm = self.last_norm
        out = norm(y)
        out = out + shortcut if has_hooks(norm) else out.add_(shortcut)  # a backward hook's tensor must not change
        return F.relu(out, inplace=True)


class Stages(nn.Sequential):
    """Several stages in a row, as a branch: their blocks are recomputed, and the last one fused, as those of one stage.

    Args:
        stages: plain :class:`torch.nn.Sequential` of blocks, or single modules, in an :class:`collections.OrderedDict`
            by their names in the plain network.
    """


class MultiExpertNetwork(nn.Module, ABC):
    r"""Base of all multi-expert networks: K branches share a trunk, and two sets of K classifiers share the features.

    .. math:: f_k = \mathrm{GAP}(deep_k \odot S_k(shallow_{k \bmod M})), \qquad z_k = s \cos(f_k, W_k)

    A backbone calls ``super().__init__(min_image_size=…, **options)``, builds its trunk, ends its ``__init__`` with
    :meth:`add_experts`, and implements :meth:`feature_maps`. :func:`~shike_fast.models.register_model` shows a whole
    one.

    Attributes:
        experts: K branches.
        fusions: K chains :math:`S_k`, or None.
        classifiers: the K heads of stage 1.
        rt_classifiers: the K heads of stage 2, re-trained with all else frozen.
        description: set by :func:`~shike_fast.models.create_model`, which rebuilds the network from it.
        checkpoint_activations: a switch, off at first. When it is on, only the inputs of what :meth:`run` runs are
            stored, and the backward pass computes the rest again: same results, less memory, more time. Forward hooks
            in there are called twice.
        frozen: names of the parameters and modules that :func:`~shike_fast.models.freeze` keeps as they are.
        adapters: names of the modules that :func:`~shike_fast.models.add_adapters` has put in.

    Args:
        min_image_size: the smallest height and width of an image.
        num_classes, num_experts, in_channels, fusion, classifier, scale: see :func:`~shike_fast.models.create_model`.

    Raises:
        ValueError: an argument is out of range, or the backbone passed on an option that it should have handled itself.

    Source: SHIKE (CVPR 2023) section 3.
    """

    description: dict[str, Any]
    draw_nothing: ClassVar[tuple[type[nn.Module], ...]] = DRAW_NOTHING
    """Types of modules that draw no random numbers; generator states are kept for the others when recomputing."""
    branch_name: str = "expert"
    """What the plain network with one branch calls the branch in its state_dict (for :meth:`pretrained_name`)."""

    def __init__(
        self,
        *,
        min_image_size: int,
        num_classes: int,
        num_experts: int = 3,
        in_channels: int = 3,
        fusion: bool = True,
        classifier: str = "cosine",
        scale: float = 30.0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("num_experts", num_experts, 1),
            ("in_channels", in_channels, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if classifier not in ("cosine", "linear"):
            raise ValueError(f"classifier must be 'cosine' or 'linear', got {classifier!r}")
        self.description = {}
        self.checkpoint_activations = False
        self.frozen: frozenset[str] = frozenset()
        self.adapters: frozenset[str] = frozenset()
        self.min_image_size = min_image_size
        self.num_classes = num_classes
        self.num_experts = num_experts
        self.in_channels = in_channels
        self.fusion = fusion
        self.classifier = classifier
        self.scale = scale

    def add_experts(
        self,
        branches: Sequence[nn.Module],
        dim: int,
        maps: Mapping[str, FeatureMap],
        *,
        head_dim: int | None = None,
    ) -> None:
        """Add the branches, the fusions and the heads to the trunk.

        Args:
            branches: K modules; each takes the trunk's last map and returns the expert's map [B, D, H, W].
            dim: D.
            maps: the maps that experts fuse, by their names in :meth:`feature_maps`; expert k fuses number k modulo
                their number.
            head_dim: the features of an expert, where :meth:`expert_features` makes others of the D pooled ones.

        Raises:
            ValueError: there are not K branches, or no map to fuse.
        """
        if len(branches) != self.num_experts:
            raise ValueError(f"{type(self).__name__}: expected {self.num_experts} branches, got {len(branches)}")
        if self.fusion and not maps:
            raise ValueError(f"{type(self).__name__}: fusion needs a feature map of the trunk, got none")
        self.experts = nn.ModuleList(branches)
        self.fusions: nn.ModuleList | None = None
        self.fused_maps: tuple[str, ...] = ()
        if self.fusion:
            names = list(maps)
            self.fused_maps = tuple(names[k % len(names)] for k in range(self.num_experts))
            self.fusions = nn.ModuleList(
                DepthwiseKnowledgeFusion(maps[name].channels, dim, depth=maps[name].halvings)
                for name in self.fused_maps
            )
        self.classifiers = self._heads(head_dim or dim)
        self.rt_classifiers = self._heads(head_dim or dim)

    def _heads(self, dim: int) -> CosineClassifier | LinearClassifier:
        if self.classifier == "cosine":
            return CosineClassifier(self.num_experts, dim, self.num_classes, self.scale)
        return LinearClassifier(self.num_experts, dim, self.num_classes)

    @abstractmethod
    def feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """The trunk: images [B, in_channels, H, W] -> maps [B, C, H', W'] by name; the last one enters the branches."""

    def pretrained_name(self, key: str) -> str | None:
        """The name in a file of weights of the plain network for an entry of the state_dict, None where it has none."""
        if key.startswith(_NEW_PARTS):
            return None
        if key.startswith("experts."):
            return f"{self.branch_name}.{key.split('.', 2)[2]}"
        return key

    def adapt_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a file of weights of the plain network is to be loaded, by the names of :meth:`pretrained_name`."""
        return {key: tensor for key, tensor in weights.items() if not key.startswith("fc.")}

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
        return self.expert_features(self.feature_maps(images))

    def expert_features(self, maps: Mapping[str, Tensor]) -> Tensor:
        """What the experts make of the trunk's maps, of which :meth:`needed_maps` will do: [K, B, D]."""
        x = list(maps.values())[-1]
        if self.fusions is None:
            return torch.stack([self.run_stage(expert, x).mean(dim=(2, 3)) for expert in self.experts])
        sources = [maps[name] for name in self.fused_maps]
        branches = [_blocks(expert) for expert in self.experts]
        if not (self._plain_fusions and all(map(_ends_in_residual_block, branches))):
            return self.fuse(sources, [self.run_stage(expert, x) for expert in self.experts])
        deep: list[Tensor] = []
        shortcut: list[Tensor] = []
        norms: list[nn.Module] = []
        for blocks in branches:
            out = x
            for block in blocks[:-1]:
                out = self.run(block, out, block)
            last = cast(ResidualBlock, blocks[-1])
            y, added = self.run(last.before_last_norm, out, last)
            deep.append(y)
            shortcut.append(added)
            norms.append(last.last_norm)
        return fuse_experts(self._fusions, sources, deep, shortcut=shortcut, deep_norms=norms)

    def fuse(self, shallow: Sequence[Tensor], deep: Sequence[Tensor]) -> Tensor:
        """The deep map of every expert weighed with its shallow one, and pooled: [K, B, D]."""
        if self._plain_fusions:
            return fuse_experts(self._fusions, shallow, deep)
        return torch.stack([fusion(*pair) for fusion, *pair in zip(self._fusions, shallow, deep, strict=True)])

    @property
    def _fusions(self) -> list[DepthwiseKnowledgeFusion]:
        return cast(list[DepthwiseKnowledgeFusion], list(self.fusions or ()))

    @property
    def _plain_fusions(self) -> bool:
        """Whether one operator can do the work of all fusions: nothing else observes or replaces them."""
        return all(type(fusion) is DepthwiseKnowledgeFusion and not has_hooks(fusion) for fusion in self._fusions)

    def needed_maps(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the trunk's maps that branches and fusions take."""
        last = list(maps)[-1]
        return {name: one for name, one in maps.items() if name in (*self.fused_maps, last)}

    def train(self, mode: bool = True) -> Self:
        """As of any module, but what is frozen stays in eval mode."""
        super().train(mode)
        for name, module in self.named_modules() if mode and self.frozen else ():
            module.training = name not in self.frozen
        return self

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

    def classifier_parameters(self) -> list[nn.Parameter]:
        """The parameters of both sets of classifiers; all others are the trunk's (``--trunk-lr``)."""
        return [*self.classifiers.parameters(), *self.rt_classifiers.parameters()]

    def run(self, function: Callable[[Tensor], Result], x: Tensor, *modules: nn.Module) -> Result:
        """``function(x)``, which calls these modules; with ``checkpoint_activations`` only ``x`` is stored of it."""
        if not (self.checkpoint_activations and self.training):
            return function(x)
        draws = not all(type(member) in self.draw_nothing for module in modules for member in module.modules())
        return recomputed(function, x, modules, draws=draws)

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """``stage(x)``, block by block if it is a plain :class:`torch.nn.Sequential` without hooks."""
        for block in _blocks(stage) if self.checkpoint_activations else [stage]:
            x = self.run(block, x, block)
        return x

    def _check_images(self, images: Tensor) -> None:
        least = self.min_image_size
        right_shape = images.dim() == 4 and images.shape[1] == self.in_channels
        if not right_shape or images.shape[2] < least or images.shape[3] < least or not images.is_floating_point():
            expected = f"floating [B, {self.in_channels}, H, W] with H and W at least {least}"
            raise ValueError(f"images must be {expected}, got {images.dtype} {list(images.shape)}")


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """What a stage calls one after another: its members if it is a plain Sequential without hooks, else itself."""
    if type(stage).forward is not nn.Sequential.forward or has_hooks(stage):
        return [stage]
    members = list(cast(nn.Sequential, stage))
    return [block for member in members for block in _blocks(member)] if isinstance(stage, Stages) else members


def _ends_in_residual_block(blocks: Sequence[nn.Module]) -> bool:
    """Whether the fusion can compute the end of the last block: nothing else observes or replaces it."""
    last = blocks[-1]
    if not isinstance(last, ResidualBlock) or type(last).forward is not ResidualBlock.forward:
        return False
    return not has_hooks(last) and is_batch_norm(last.last_norm)
