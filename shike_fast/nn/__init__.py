"""Modules built on :mod:`shike_fast.ops`: the classifiers of all experts, depth-wise knowledge fusion, two losses.

:class:`SyncBatchNorm` takes batch statistics over all processes, on the CPU too.

Tensor layouts: ``K`` experts, ``B`` samples, ``C`` classes, ``D`` feature channels. Every module works in a user's
own network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast import ops
from shike_fast.nn.sync_batch_norm import SyncBatchNorm, arguments_of, convert_sync_batchnorm
from shike_fast.nn.sync_batch_norm import process_group_of as _process_group

__all__ = [
    "BalancedSoftmaxLoss",
    "CosineClassifier",
    "DKTLoss",
    "DepthwiseKnowledgeFusion",
    "LinearClassifier",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "fuse_experts",
]

NORMALIZE_EPS = 1e-12


class _ExpertClassifier(nn.Module):
    """What the classifiers share: one weight [K, D, C] for all experts, and arithmetic in float32 at least.

    Under autocast the product still runs in float32: near 30 a bfloat16 logit has a spacing of 0.125, so the best
    classes would tie, and a tie goes to the lower, more frequent class. The product is below a hundredth of a network's
    work.
    """

    def __init__(self, num_experts: int, dim: int, num_classes: int) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.num_experts, self.dim, self.num_classes = num_experts, dim, num_classes
        self.weight = nn.Parameter(torch.empty(num_experts, dim, num_classes))

    def _operands(self, features: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The checked features [K, B, D] and the weight, both in float32 or float64."""
        if not isinstance(features, Tensor):
            features = self._stacked(features)
        if features.dim() != 3 or features.shape[0] != self.num_experts or features.shape[2] != self.dim:
            expected = f"[K={self.num_experts}, B, D={self.dim}]"
            raise ValueError(f"{type(self).__name__}: features must be {expected}, got {list(features.shape)}")
        dtype = torch.promote_types(features.dtype, torch.float32)
        return features.to(dtype), self.weight.to(dtype)

    def _stacked(self, features: Sequence[Tensor]) -> Tensor:
        name, expected = type(self).__name__, f"[K={self.num_experts}, B, D={self.dim}]"
        if not isinstance(features, list | tuple) or not all(isinstance(expert, Tensor) for expert in features):
            raise TypeError(
                f"{name}: features must be a tensor {expected} or a list or tuple of K tensors [B, D], "
                f"got {type(features).__name__}"
            )
        shapes = [list(expert.shape) for expert in features]
        if len(shapes) == 0 or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"{name}: features must be {expected} or K tensors of one shape [B, D], got {shapes}")
        return torch.stack(list(features))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, dim={self.dim}, num_classes={self.num_classes}"


class CosineClassifier(_ExpertClassifier):
    r"""One cosine classifier per expert, as one batched matrix product.

    .. math:: z_k = s \frac{f_k}{\max(\|f_k\|, \epsilon)} \frac{W_k}{\max(\|W_k\|, \epsilon)}, \quad \epsilon = 10^{-12}

    with the norm of a column (one class) of ``W_k`` over D. ``forward(features)`` takes [K, B, D] (or a list or tuple
    of K tensors [B, D]), floating, any strides, and returns [K, B, C] in float32 (float64 for float64 features), also
    under autocast: half precision would make the best classes tie. The weight starts uniform in (-1, 1) with columns of
    length 1.

    Args:
        num_experts: K, at least 1.
        dim: D, the number of feature channels.
        num_classes: C.
        scale: s, a positive number; the published value is 30.

    Raises:
        ValueError: an argument is out of range, or ``forward`` gets features of another shape.

    Source: the published code's normalised linear layer and its factor 30.
    """

    def __init__(self, num_experts: int, dim: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__(num_experts, dim, num_classes)
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"CosineClassifier: scale must be a positive number, got {scale}")
        self.scale = float(scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew: uniform in (-1, 1), every column scaled to length 1."""
        with torch.no_grad():
            self.weight.uniform_(-1, 1)
            self.weight.copy_(F.normalize(self.weight, dim=1, eps=NORMALIZE_EPS))

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        features, weight = self._operands(features)
        with _without_autocast(features.device):
            # The scale goes with the features' norms, [K, B, 1]; the weight's norms, [K, 1, C], divide the product: a
            # normalised weight is a copy of [K, D, C], and so are the gradients through it.
            scaled = features * (self.scale / _norm(features, dim=2))
            return torch.bmm(scaled, weight) / _norm(weight, dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


class LinearClassifier(_ExpertClassifier):
    r"""One linear classifier per expert, as one batched product: :math:`z_k = f_k W_k + b_k`.

    ``forward(features)`` takes [K, B, D] (or a list or tuple of K tensors [B, D]), floating, any strides, and returns
    [K, B, C] in float32 (float64 for float64 features), also under autocast. The weight [K, D, C] starts Kaiming normal
    (standard deviation sqrt(2/D)), the bias [K, C] uniform in (-1/sqrt(D), 1/sqrt(D)), as in the published code.

    Args:
        num_experts: K, at least 1.
        dim: D, the number of feature channels.
        num_classes: C.

    Raises:
        ValueError: an argument is below 1, or ``forward`` gets features of another shape.
    """

    def __init__(self, num_experts: int, dim: int, num_classes: int) -> None:
        super().__init__(num_experts, dim, num_classes)
        self.bias = nn.Parameter(torch.empty(num_experts, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.dim))
        nn.init.uniform_(self.bias, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        features, weight = self._operands(features)
        with _without_autocast(features.device):
            return torch.baddbmm(self.bias.to(weight.dtype).unsqueeze(1), features, weight)


class DepthwiseKnowledgeFusion(nn.Module):
    r"""Depth-wise knowledge fusion (DKF): weigh an expert's deep feature map with a shallow one and pool.

    .. math:: f = \mathrm{mean}_{hw}\left( deep \odot S(shallow) \right)

    ``S`` repeats [3x3 convolution, stride 2, padding 1, no bias -> BatchNorm -> ReLU], doubling the channels each
    time (the last one goes to ``channels_out``). The convolution with index 1 has no ReLU, as published. The last
    BatchNorm, its ReLU, the product and the pooling are one operator, :func:`shike_fast.ops.dkf_experts`, so
    ``S(shallow)`` is never stored. :func:`fuse_experts` serves several experts with one call of it.

    ``convs`` and ``norms`` hold plain :class:`torch.nn.Conv2d` and :class:`torch.nn.BatchNorm2d`; the last norm keeps
    all of BatchNorm's behaviour (running statistics, ``momentum=None``, ``track_running_stats=False``, ``eval()``).
    Converted by :func:`convert_sync_batchnorm` or ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` it is fused too,
    with statistics over all processes of its group, on the CPU as well. Where it has hooks or was replaced by
    something else, it is called as a module and only the product and the pooling are fused.

    ``forward(shallow, deep)``: shallow [B, channels_in, H', W'] and deep [B, channels_out, H, W], floating, any
    strides (channels-last preferred), where H and W are H' and W' halved ``depth`` times, rounding up. Returns [B,
    channels_out].

    Args:
        channels_in: channels of the shallow map.
        channels_out: channels of the deep map.
        depth: the number of strided convolutions, at least 1.

    Raises:
        ValueError: an argument is below 1, or ``forward`` gets a deep map of another shape than ``S(shallow)``.

    Source: SHIKE (CVPR 2023) section 3.2; published code.
    """

    def __init__(self, channels_in: int, channels_out: int, depth: int) -> None:
        super().__init__()
        for name, value in (("channels_in", channels_in), ("channels_out", channels_out), ("depth", depth)):
            if value < 1:
                raise ValueError(f"DepthwiseKnowledgeFusion: {name} must be at least 1, got {value}")
        widths = [channels_in * 2**i for i in range(depth)] + [channels_out]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False) for c_in, c_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    @property
    def relu(self) -> bool:
        """Whether ReLU follows the last BatchNorm."""
        return self._has_relu(len(self.convs) - 1)

    def convolve(self, shallow: Tensor) -> Tensor:
        """All of ``S`` but its last BatchNorm and ReLU."""
        x = shallow
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            if i < last:
                x = norm(x)
                if self._has_relu(i):
                    x = F.relu(x, inplace=True)
        return x

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        return fuse_experts([self], [shallow], [deep])[0]

    @staticmethod
    def _has_relu(index: int) -> bool:
        return index != 1  # the second convolution of a chain stays linear, as published


def fuse_experts(
    fusions: Sequence[DepthwiseKnowledgeFusion],
    shallow: Sequence[Tensor],
    deep: Sequence[Tensor],
    *,
    shortcut: Sequence[Tensor] | None = None,
    deep_norms: Sequence[nn.Module] | None = None,
) -> Tensor:
    r"""Depth-wise knowledge fusion of K experts, all in one operator: :func:`shike_fast.ops.dkf_experts`.

    .. math:: f_k = \mathrm{mean}_{hw}(deep_k \odot S_k(shallow_k))

    With ``shortcut`` and ``deep_norms``, the deep map of expert k is ``relu(deep_norms[k](deep[k]) + shortcut[k])``:
    the end of a residual block, which then is not stored either.

    Args:
        fusions: K modules, whose last norm works as described there.
        shallow: K maps [B, channels_in, H', W'], as each module takes them.
        deep: K maps [B, channels_out, H, W].
        shortcut: K maps of the same shape.
        deep_norms: K BatchNorm modules.

    Returns:
        [K, B, channels_out].

    Raises:
        ValueError: a deep map has another shape than the convolved shallow map, the numbers of members differ, or only
            one of ``shortcut`` and ``deep_norms`` is given.
    """
    if (shortcut is None) != (deep_norms is None):
        raise ValueError("fuse_experts: shortcut and deep_norms must both be given or both be None")
    convolved = [fusion.convolve(map_) for fusion, map_ in zip(fusions, shallow, strict=True)]
    for fusion, x, map_, source in zip(fusions, convolved, deep, shallow, strict=True):
        if x.shape != map_.shape:
            raise ValueError(
                f"DepthwiseKnowledgeFusion: deep must have the shape of the convolved shallow map, {list(x.shape)}, "
                f"got {list(map_.shape)} (shallow {list(source.shape)}, {len(fusion.convs)} strided convolutions)"
            )
    norms = [fusion.norms[-1] for fusion in fusions]
    groups = {_process_group(norm) for norm in (*norms, *(deep_norms or ()))}
    # compared, not hashed: a size that torch.export or torch.compile keeps open has no hash
    same_shapes = all((x.shape, x.device) == (deep[0].shape, deep[0].device) for x in (*deep, *(shortcut or ())))
    if all(map(is_batch_norm, (*norms, *(deep_norms or ())))) and len(groups) == 1 and same_shapes:
        return ops.dkf_experts(
            deep,
            convolved,
            [arguments_of(norm) for norm in norms],
            relu=[fusion.relu for fusion in fusions],
            shortcut=shortcut,
            deep_norms=None if deep_norms is None else [arguments_of(norm) for norm in deep_norms],
            process_group=groups.pop(),
        )
    if shortcut is not None and deep_norms is not None:
        deep = [F.relu(norm(y) + s) for norm, y, s in zip(deep_norms, deep, shortcut, strict=True)]
    return torch.stack(
        [
            _bn_product_pool(norm, x, y, fusion.relu)
            for fusion, norm, x, y in zip(fusions, norms, convolved, deep, strict=True)
        ]
    )


class DKTLoss(nn.Module):
    """Stage-1 loss (dynamic knowledge transfer): :func:`shike_fast.ops.dkt_loss` with its options fixed.

    ``forward(logits, target)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B], and returns a scalar. Args and
    Raises are those of the operator.
    """

    def __init__(
        self,
        *,
        hardest_weight: float = 10.0,
        mutual_weight: float = 1.0,
        kl_reduction: str = "mean",
        teacher_target_logit: float = 0.0,
        student_target_logit: float = -30.0,
        detach_teacher: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hardest_weight = hardest_weight
        self.mutual_weight = mutual_weight
        self.kl_reduction = kl_reduction
        self.teacher_target_logit = teacher_target_logit
        self.student_target_logit = student_target_logit
        self.detach_teacher = detach_teacher
        self.backend = backend

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        return ops.dkt_loss(
            logits,
            target,
            hardest_weight=self.hardest_weight,
            mutual_weight=self.mutual_weight,
            kl_reduction=self.kl_reduction,
            teacher_target_logit=self.teacher_target_logit,
            student_target_logit=self.student_target_logit,
            detach_teacher=self.detach_teacher,
            backend=self.backend,
        )


class BalancedSoftmaxLoss(nn.Module):
    """Stage-2 loss (classifier re-training): :func:`shike_fast.ops.balanced_softmax_loss` with its class counts.

    ``forward(logits, target)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B], and returns a scalar. The counts
    follow ``.to(device)`` and stay out of the state_dict: they belong to the training set.

    Args:
        class_counts: int64 [C], training samples of each class, each at least 1.
        backend: as for the operator.
    """

    class_counts: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], *, backend: str | None = None) -> None:
        super().__init__()
        self.register_buffer("class_counts", torch.as_tensor(class_counts).clone(), persistent=False)
        self.backend = backend

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        return ops.balanced_softmax_loss(logits, target, self.class_counts, backend=self.backend)


def _norm(vectors: Tensor, dim: int) -> Tensor:
    """max(|v|, ε), the dimension kept."""
    return torch.linalg.vector_norm(vectors, dim=dim, keepdim=True).clamp_min(NORMALIZE_EPS)


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    # autocast rejects devices it does not know (meta), even when asked to be off
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether an operator can do the module's work: a BatchNorm2d or a SyncBatchNorm that nothing watches."""
    own = type(norm).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    return isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm | SyncBatchNorm) and own and not has_hooks(norm)


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to see the module's forward or backward."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return "forward" in module.__dict__ or bool(own) or bool(nn.modules.module._has_any_global_hook())


def _bn_product_pool(norm: nn.Module, x: Tensor, deep: Tensor, relu: bool) -> Tensor:
    """mean_hw(deep * [relu](norm(x))), fused with the norm's arithmetic where an operator can do its work."""
    if not is_batch_norm(norm):
        x = norm(x)
        return ops.dkf_pool(deep, F.relu(x) if relu else x)
    group = _process_group(norm)
    weight, bias, mean, var, training, momentum, eps = arguments_of(norm)
    return ops.dkf_bn_pool(
        deep,
        x,
        weight,
        bias,
        mean,
        var,
        training=training,
        momentum=momentum,
        eps=eps,
        relu=relu,
        process_group=group,
    )
