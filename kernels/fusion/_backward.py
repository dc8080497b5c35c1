"""Triton kernels of the gradients of depth-wise knowledge fusion."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels._common import multiple
from shike_fast.kernels.fusion._experts import expert_arguments, load_norm, place, pointers
from shike_fast.kernels.fusion._maps import (
    UNSPECIALIZED,
    choose_tile,
    extent_of,
    groups,
    load_tile,
    row_tile,
    slot_of,
    store_tile,
)
from shike_fast.ops._dkf_arguments import DkfArguments


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _vector_kernel(
    grad_output,  # [K, B, C]
    sums,  # float32 [K, S, B, C]
    vectors,  # float32 [n, 2, C]
    batch: tl.int32,
    channels: tl.int32,
    positions: tl.int32,
    K: tl.constexpr,
    S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_c = c < multiple(channels, ALIGN_C)
    channels = multiple(channels.to(tl.int64), ALIGN_C)
    number = tl.program_id(1)
    expert = number % K
    plane = batch * channels
    grad_output += expert * plane
    sums += (expert * S + number // K * 2) * plane
    scale = tl.zeros([ROWS, BLOCK], tl.float32)
    offset = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(0, BLOCKS):
        b = block * ROWS + tl.arange(0, ROWS)
        inside = (b < batch)[:, None] & in_c[None, :]
        at = b.to(tl.int64)[:, None] * channels + c[None, :]
        g = tl.load(grad_output + at, mask=inside, other=0.0).to(tl.float32)
        scale += g * tl.load(sums + at, mask=inside, other=0.0)
        offset += g * tl.load(sums + plane + at, mask=inside, other=0.0)
    at = vectors + number * 2 * channels + c
    tl.store(at, tl.sum(scale, 0) / positions, mask=in_c)  # d(loss)/dγ
    tl.store(at + channels, tl.sum(offset, 0) / positions, mask=in_c)  # d(loss)/dβ


@triton.jit
def _through_statistics(vectors, number, norm, inverse_count, c, in_c, channels):  # 2 x [C]
    """p and q in d(loss)/dx = γ · rstd · d(loss)/d(γ x̂ + β) − (p + q (x − leading part of the mean)).

    d(loss)/dx = γ · rstd · (d(loss)/d(γ x̂ + β) − dβ / N − x̂ dγ / N), x̂ = rstd · (x − leading part − rest).
    """
    at = vectors + number.to(tl.int64) * 2 * channels + c
    through_variance = norm[3] * norm[2] * (tl.load(at, mask=in_c, other=0.0) * inverse_count)
    through_mean = norm[3] * (tl.load(at + channels, mask=in_c, other=0.0) * inverse_count)
    return through_mean - norm[1] * through_variance, through_variance


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gradient_kernel(
    deep,
    deep_strides,
    shallow,
    shallow_strides,
    shortcut,
    shortcut_strides,
    weight,
    bias,
    deep_weight,
    deep_bias,
    slots: tl.int64,
    flags: tl.int32,
    batch: tl.int32,
    channels: tl.int32,
    positions: tl.int32,
    width: tl.int32,
    mean_rstd,
    grad_output,  # [K, B, C]
    vectors,  # float32 [n, 2, C]
    inverse_count,  # 1 / N; 0 for constant statistics
    d_deep,  # pointers to [B, C, H, W], like those above
    d_deep_strides,
    d_shallow,
    d_shallow_strides,
    d_shortcut,
    d_shortcut_strides,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,  # of positions, in a part
    PARTS: tl.constexpr,  # of a sample, a program each
):
    channels = multiple(channels, ALIGN_C)
    positions = multiple(positions, ALIGN_P)
    part, c = place(channels, BLOCK_C)
    b = (part // PARTS).to(tl.int64)
    in_c = c < channels
    i = tl.program_id(1)
    slot = slot_of(slots, i)
    relu = ((flags >> i) & 1) != 0
    at = grad_output + (slot * batch + b) * channels + c
    u = (tl.load(at, mask=in_c, other=0.0).to(tl.float32) / positions)[None, :]
    if mean_rstd is not None:
        norm = load_norm(mean_rstd, slot, weight, bias, i, c, in_c, channels)
        mean, _, _, slope, offset = norm
        constant, linear = _through_statistics(vectors, slot, norm, inverse_count, c, in_c, channels)
    if shortcut is not None:
        deep_norm = load_norm(mean_rstd, K + slot, deep_weight, deep_bias, i, c, in_c, channels)
        deep_mean, _, _, deep_slope, deep_offset = deep_norm
        deep_constant, deep_linear = _through_statistics(vectors, K + slot, deep_norm, inverse_count, c, in_c, channels)
    for block in range(0, BLOCKS):
        p = (part % PARTS * BLOCKS + block) * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < positions)[:, None] & in_c[None, :]
        d = load_tile(deep, deep_strides, i, b, p, c, width, inside, ALIGN)
        x = load_tile(shallow, shallow_strides, i, b, p, c, width, inside, ALIGN)
        if mean_rstd is None:
            d_d = u * x  # d(loss)/dD
            d_x = u * d
        else:
            x -= mean[None, :]
            a = slope[None, :] * x + offset[None, :]
            dropped = (a <= 0) & relu
            d_d = u * tl.where(dropped, 0.0, a)
            if shortcut is not None:
                y = d - deep_mean[None, :]
                d = deep_slope[None, :] * y + deep_offset[None, :]
                d += load_tile(shortcut, shortcut_strides, i, b, p, c, width, inside, ALIGN)
                d_d = tl.where(d <= 0, 0.0, d_d)
                d = tl.where(d <= 0, 0.0, d)
                store_tile(d_shortcut, d_shortcut_strides, i, b, p, c, width, inside, d_d, ALIGN)
                d_d = deep_slope[None, :] * d_d - (deep_constant[None, :] + deep_linear[None, :] * y)  # d(loss)/dy
            d_a = tl.where(dropped, 0.0, u * d)
            d_x = slope[None, :] * d_a - (constant[None, :] + linear[None, :] * x)
        store_tile(d_deep, d_deep_strides, i, b, p, c, width, inside, d_d, ALIGN)
        store_tile(d_shallow, d_shallow_strides, i, b, p, c, width, inside, d_x, ALIGN)


# Tiles that a program of the backward takes of a sample, one after the other, before another program takes over.
_BLOCKS_IN_PART = 4


def dkf_vector_gradients(args: DkfArguments, grad_output: Tensor, sums: Tensor) -> Tensor:
    """Compute the gradients [n, 2, C] of the weights and biases from those of f, ``grad_output`` [K, B, C]."""
    batch, channels, positions, _ = extent_of(args.deep[0])
    vectors = args.new(args.norms, 2, channels)
    if args.normalised:
        tile = row_tile(batch)
        with torch.cuda.device_of(vectors):
            _vector_kernel[(triton.cdiv(channels, tile.channels), args.norms)](
                grad_output,
                sums,
                vectors,
                batch,
                channels,
                positions,
                K=args.experts,
                S=args.sums,
                **tile.constants(channels),
                BLOCKS=tile.blocks(batch),
            )
    return vectors


def dkf_map_gradients(
    args: DkfArguments, grad_output: Tensor, mean_rstd: Tensor, vectors: Tensor, inverse_count: float
) -> list[Tensor]:
    """Compute the gradients of all maps, in the order of ``args.maps``.

    Args:
        args: as for ``dkf_forward``.
        grad_output: d(loss)/d(f), [K, B, C], contiguous, in the maps' dtype.
        mean_rstd: float32 [n, 3, C], as returned by ``dkf_forward``.
        vectors: float32 [n, 2, C], as returned by ``dkf_vector_gradients`` (their sum, for synchronised statistics).
        inverse_count: 1 / N, N the number of values of a channel; 0 if the statistics were constants.
    """
    gradients = args.new_gradients()
    extent = extent_of(args.deep[0])
    experts = args.experts
    outputs = (gradients[:experts], gradients[experts : 2 * experts], gradients[2 * experts :])
    tile = choose_tile(args.deep[0], experts)
    blocks = triton.cdiv(extent.positions, tile.positions)
    in_part = min(blocks, _BLOCKS_IN_PART)
    parts = triton.cdiv(blocks, in_part)
    programs = extent.batch * parts * triton.cdiv(extent.channels, tile.channels)
    roles = 2 + args.folded
    with torch.cuda.device_of(grad_output):
        for group in groups(range(experts), args.deep, args.shallow, args.shortcut, *outputs):
            _gradient_kernel[(programs, len(group.slots))](
                *expert_arguments(args, group),
                mean_rstd if args.normalised else None,
                grad_output,
                vectors if args.normalised else None,
                float(inverse_count),
                *pointers(group, outputs, group.strides[roles:]),
                K=experts,
                **group.constants(extent, tile, args.normalised),
                BLOCKS=in_part,
                PARTS=parts,
            )
    return gradients
