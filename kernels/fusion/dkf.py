"""Triton kernels of depth-wise knowledge fusion: f[k, b, c] = 1/(H W) Σ_hw D A for K experts.

A is the shallow map, or its normalisation γ x̂ + β with or without ReLU; D the deep map, or (folded) the ReLU of its
normalisation plus a shortcut. Neither is ever stored: the forward leaves sums over the positions, [B, C], and the
backward recomputes what it needs from the maps, element by element. Every stage is one launch for all experts whose
maps have the same strides; docs/kernels.md derives the sums and gradients.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels._common import multiple
from shike_fast.kernels.fusion._backward import dkf_map_gradients, dkf_vector_gradients
from shike_fast.kernels.fusion._experts import expert_arguments, load_norm, place, relative
from shike_fast.kernels.fusion._maps import UNSPECIALIZED, choose_tile, extent_of, groups, load_tile, slot_of
from shike_fast.kernels.fusion._statistics import Training, merge, reduce_maps
from shike_fast.ops._dkf_arguments import DkfArguments

__all__ = ["dkf_forward", "dkf_map_gradients", "dkf_statistics", "dkf_vector_gradients"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pool_kernel(
    deep,  # of the experts of one launch: pointers to [B, C, H, W]
    deep_strides,
    shallow,
    shallow_strides,
    shortcut,  # or None: not folded
    shortcut_strides,
    weight,  # float32 [C] each, or None; these are of the shallow maps
    bias,
    deep_weight,
    deep_bias,
    slots: tl.int64,  # the experts' numbers k
    flags: tl.int32,  # bit i: with ReLU
    batch: tl.int32,
    channels: tl.int32,
    positions: tl.int32,  # H · W
    width: tl.int32,
    mean_rstd,  # float32 [n, 3, C], or None: not normalised
    sums,  # float32 [K, S, B, C]
    f,  # [K, B, C]
    K: tl.constexpr,  # of all launches
    ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,  # of positions, in a sample
):
    channels = multiple(channels, ALIGN_C)
    positions = multiple(positions, ALIGN_P)
    b, c = place(channels, BLOCK_C)
    b = b.to(tl.int64)
    in_c = c < channels
    i = tl.program_id(1)
    slot = slot_of(slots, i)
    relu = ((flags >> i) & 1) != 0
    if mean_rstd is not None:
        mean, _, _, slope, offset = load_norm(mean_rstd, slot, weight, bias, i, c, in_c, channels)
    if shortcut is not None:
        deep_mean, _, _, deep_slope, deep_offset = load_norm(
            mean_rstd, K + slot, deep_weight, deep_bias, i, c, in_c, channels
        )
    # The sums M1, M2, P1 and P2, with x or y less the mean's leading part in place of x̂ and ŷ; Σ D x if not normalised
    m1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    p1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    p2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for block in range(0, BLOCKS):
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < positions)[:, None] & in_c[None, :]
        d = load_tile(deep, deep_strides, i, b, p, c, width, inside, ALIGN)
        x = load_tile(shallow, shallow_strides, i, b, p, c, width, inside, ALIGN)
        if mean_rstd is not None:
            x -= mean[None, :]
            a = slope[None, :] * x + offset[None, :]
            dropped = (a <= 0) & relu  # by ReLU, which does not drop NaN
            if shortcut is not None:
                y = d - deep_mean[None, :]
                d = deep_slope[None, :] * y + deep_offset[None, :]
                d += load_tile(shortcut, shortcut_strides, i, b, p, c, width, inside, ALIGN)
                off = (d <= 0) | ~inside
                d = tl.where(off, 0.0, d)
                a = tl.where(off | dropped, 0.0, a)
                p1 += a * y
                p2 += a
            d = tl.where(dropped, 0.0, d)
            m2 += d
        m1 += d * x
    row = slot * batch + b
    total = tl.sum(m1, 0)
    if mean_rstd is None:
        pooled = total
    else:
        plane = batch.to(tl.int64) * channels
        at = sums + slot * (2 if shortcut is None else 4) * plane + b * channels + c
        total_2 = tl.sum(m2, 0)
        tl.store(at, relative(total, total_2, mean_rstd, slot, c, in_c, channels), mask=in_c)
        tl.store(at + plane, total_2, mask=in_c)
        if shortcut is not None:
            total_4 = tl.sum(p2, 0)
            total_3 = relative(tl.sum(p1, 0), total_4, mean_rstd, K + slot, c, in_c, channels)
            tl.store(at + 2 * plane, total_3, mask=in_c)
            tl.store(at + 3 * plane, total_4, mask=in_c)
        pooled = slope * total + offset * total_2
    tl.store(f + row * channels + c, (pooled / positions).to(f.dtype.element_ty), mask=in_c)


def _pool(args: DkfArguments, slots: Sequence[int], mean_rstd: Tensor, sums: Tensor, f: Tensor) -> None:
    """Compute the sums and f of the experts ``slots``."""
    extent = extent_of(args.deep[0])
    tile = choose_tile(args.deep[0], len(slots))
    for group in groups(slots, args.deep, args.shallow, args.shortcut):
        _pool_kernel[(extent.batch * triton.cdiv(extent.channels, tile.channels), len(group.slots))](
            *expert_arguments(args, group),
            mean_rstd if args.normalised else None,
            sums,
            f,
            K=args.experts,
            **group.constants(extent, tile, args.normalised),
            BLOCKS=triton.cdiv(extent.positions, tile.positions),
        )


def dkf_forward(
    args: DkfArguments,
    mean_rstd: Tensor | None,
    eps: Sequence[float],
    running: Sequence[Tensor],
    momentum: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool the products of K experts' maps, and what the backward needs.

    Args:
        args: the maps (float32, bfloat16 or float16, any strides, B at least 1) and vectors.
        mean_rstd: float32 [n, 3, C], the mean in two parts and 1/σ; or ``None``, to take them from the batch.
        eps, momentum: of the n normalisations. Only used without ``mean_rstd``, like ``running``.
        running: running mean and variance [C] of every normalisation in turn, updated in place; or none at all.

    Returns:
        f [K, B, C] in the maps' dtype; and in float32 the sums [K, S, B, C], the mean_rstd, and the statistics
        [n, 2, C] (mean, unbiased variance), which are empty if the mean_rstd were given.
    """
    training = mean_rstd is None and args.normalised
    f, sums, new_mean_rstd, statistics = args.new_results(training)
    one_pass = [training and not args.folded and not relu for relu in args.relu]
    with torch.cuda.device_of(f):  # Triton launches on the current device
        if training:
            wanted = one_pass + [False] * (args.norms - args.experts)
            maps = args.shallow + (args.deep if args.folded else [])
            partials = reduce_maps(maps, args.deep, wanted, sums)
            results = Training(eps, momentum, running, statistics, wanted, args.weight, args.bias, sums, f)
            merge(partials, f.shape[1], extent_of(args.deep[0]).positions, new_mean_rstd, results)
        if mean_rstd is None:
            mean_rstd = new_mean_rstd
        slots = [expert for expert in range(args.experts) if not one_pass[expert]]
        if slots:
            _pool(args, slots, mean_rstd, sums, f)
    return f, sums, mean_rstd, statistics


def dkf_statistics(maps: Sequence[Tensor]) -> Tensor:
    """Compute, for maps of one shape, the mean in two parts and the sum of squared distances from it: [n, 3, C]."""
    batch, channels, positions, _ = extent_of(maps[0])
    result = maps[0].new_empty((len(maps), 3, channels), dtype=torch.float32)
    with torch.cuda.device_of(result):
        merge(reduce_maps(maps), batch, positions, result)
    return result
