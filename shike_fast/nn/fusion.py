"""Depth-wise knowledge fusion of one or several experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast import ops
from shike_fast.nn.sync_batch_norm import SyncBatchNorm, arguments_of, process_group_of
from shike_fast.ops._checks import as_map


class DepthwiseKnowledgeFusion(nn.Module):
    r"""Depth-wise knowledge fusion (DKF): weigh an expert's deep feature map with a shallow one and pool.

    .. math:: f = \mathrm{mean}_{hw}\left( deep \odot S(shallow) \right)

    ``S`` repeats [3x3 convolution, stride 2, padding 1, no bias -> BatchNorm -> ReLU], doubling the channels each
    time (the last one goes to ``channels_out``). The convolution with index 1 has no ReLU, as published. For two maps
    of one size (``depth=0``) ``S`` is [1x1 convolution, no bias -> BatchNorm -> ReLU], on tokens a linear layer. The
    last BatchNorm, its ReLU, the product and the pooling are one operator, :func:`shike_fast.ops.dkf_experts`, so
    ``S(shallow)`` is never stored. :func:`fuse_experts` serves several experts with one call of it.

    ``convs`` and ``norms`` hold plain :class:`torch.nn.Conv2d` and :class:`torch.nn.BatchNorm2d`; the last norm keeps
    all of BatchNorm's behaviour (running statistics, ``momentum=None``, ``track_running_stats=False``, ``eval()``).
    Converted by :func:`convert_sync_batchnorm` or ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` it is fused too,
    with statistics over all processes of its group, on the CPU as well. Where it has hooks or was replaced by
    something else, it is called as a module and only the product and the pooling are fused.

    ``forward(shallow, deep)``: shallow [B, channels_in, H', W'] and deep [B, channels_out, H, W], floating, any
    strides (channels-last preferred), where H and W are H' and W' halved ``depth`` times, rounding up. With ``depth=0``
    also tokens [B, N, channels_in] and [B, N, channels_out]; class and register tokens, which have no position, are
    better left out of both. Returns [B, channels_out].

    Args:
        channels_in: channels of the shallow map.
        channels_out: channels of the deep map.
        depth: the number of strided convolutions; 0 for maps of one size.

    Raises:
        ValueError: an argument is out of range, or ``forward`` gets a deep map of another shape than ``S(shallow)``, or
            tokens where ``depth`` is not 0.

    Source: SHIKE (CVPR 2023) section 3.2; published code.
    """

    def __init__(self, channels_in: int, channels_out: int, depth: int) -> None:
        super().__init__()
        for name, value, least in (
            ("channels_in", channels_in, 1),
            ("channels_out", channels_out, 1),
            ("depth", depth, 0),
        ):
            if value < least:
                raise ValueError(f"DepthwiseKnowledgeFusion: {name} must be at least {least}, got {value}")
        self.depth = depth
        widths = [channels_in * 2**i for i in range(max(depth, 1))] + [channels_out]
        size, stride = (3, 2) if depth > 0 else (1, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, bias=False)
            for c_in, c_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    @property
    def relu(self) -> bool:
        """Whether ReLU follows the last BatchNorm."""
        return self._has_relu(len(self.convs) - 1)

    def convolve(self, shallow: Tensor) -> Tensor:
        """All of ``S`` but its last BatchNorm and ReLU; of tokens [B, N, C] as a map [B, channels_out, N, 1]."""
        if shallow.dim() == 3 and self.depth > 0:
            raise ValueError(
                f"DepthwiseKnowledgeFusion: tokens [B, N, C] have no rows to halve, which depth={self.depth} does "
                f"(shallow {list(shallow.shape)}); pass maps [B, C, H, W], or use depth=0"
            )
        x = as_map(shallow)
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
        shallow: K maps [B, channels_in, H', W'], or tokens [B, N, channels_in], as each module takes them.
        deep: K maps [B, channels_out, H, W], or tokens [B, N, channels_out].
        shortcut: K of the same shape.
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
    given, deep = deep, [as_map(map_) for map_ in deep]
    for fusion, x, map_, source, own in zip(fusions, convolved, deep, shallow, given, strict=True):
        if x.shape != map_.shape or source.dim() != own.dim():
            shape = list(x.shape) if source.dim() == 4 else [x.shape[0], x.shape[2], x.shape[1]]
            raise ValueError(
                f"DepthwiseKnowledgeFusion: deep must have the shape of the convolved shallow map, {shape}, "
                f"got {list(own.shape)} (shallow {list(source.shape)}, {fusion.depth} strided convolutions)"
            )
    shortcut = None if shortcut is None else [as_map(map_) for map_ in shortcut]
    norms = [fusion.norms[-1] for fusion in fusions]
    groups = {process_group_of(norm) for norm in (*norms, *(deep_norms or ()))}
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
    group = process_group_of(norm)
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
