"""Triton kernels for the statistics of a BatchNorm over maps.

Programs each reduce a few samples of a block of channels, relative to the mean of the first positions they meet; then
one program a block of channels merges their results, always in the same order. Where an expert has no ReLU, the first
pass also reads its deep map, relative to the mean of each sample's first positions, and the merging program, which
knows the mean, finishes the sums and f: one reading of the maps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels._common import multiple
from shike_fast.kernels.fusion._maps import (
    PROGRAMS,
    UNSPECIALIZED,
    bits,
    channel_offsets,
    choose_tile,
    extent_of,
    groups,
    load_tile,
    packed,
    pick,
    row_tile,
    sample,
    slot_of,
    vector,
    vectors_or_none,
)


@triton.jit
def _first_mean(maps, strides, i, b, p, rows, c, channels, width, ALIGN: tl.constexpr):
    """The mean [C] of a sample's first tile. It is exact where all values are the same."""
    at = sample(maps, strides, i, b, ALIGN) + channel_offsets(strides, c, ALIGN)
    first = tl.load(at, mask=c < tl.where(rows > 0, channels, 0), other=0.0).to(tl.float32)
    inside = (p < rows)[:, None] & (c < channels)[None, :]
    x = load_tile(maps, strides, i, b, p, c, width, inside, ALIGN)
    count = tl.maximum(tl.minimum(rows, p.shape[0]), 1)
    return first + tl.sum(tl.where(inside, x - first[None, :], 0.0), 0) / count


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _partial_kernel(
    maps,  # of one launch: pointers to [B, C, H, W]
    map_strides,
    deep,  # the deep maps of the same experts, or None
    deep_strides,
    slots: tl.int64,  # the maps' numbers
    flags: tl.int32,  # bit i: S1 and S2 of map i are wanted
    batch: tl.int32,
    channels: tl.int32,
    positions: tl.int32,  # H · W
    width: tl.int32,
    partials,  # float32 [n, 3, chunks, C]: s near the mean; of the chunk's values − s, mean and squared distances
    sums,  # float32 [K, 2, B, C]: S1 = Σ deep · (x − r), S2 = Σ deep
    references,  # float32 [K, B, C]: r, near the mean
    ALIGN: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,  # of positions, in a sample
    SAMPLES: tl.constexpr,  # in a chunk
):
    channels = multiple(channels, ALIGN_C)
    positions = multiple(positions, ALIGN_P)
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = tl.program_id(0) // blocks
    chunks = tl.num_programs(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    p = tl.arange(0, BLOCK_P)
    i = tl.program_id(1)
    slot = slot_of(slots, i)
    first = chunk.to(tl.int64) * SAMPLES
    shift = _first_mean(maps, map_strides, i, first, p, positions, c, channels, width, ALIGN)

    # Welford's recurrence in every lane of the tile: it cancels nothing, and its cost hides behind the loads.
    count = tl.zeros([BLOCK_P], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for j in range(0, SAMPLES):
        b = first + j
        rows = tl.where(b < batch, positions, 0)  # not a mask of a scalar: Triton 3.9 interprets none
        if deep is not None:
            in_sums = c < tl.where((b < batch) & (((flags >> i) & 1) != 0), channels, 0)
            s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            reference = _first_mean(maps, map_strides, i, b, p, rows, c, channels, width, ALIGN)
        for block in range(0, BLOCKS):
            q = block * BLOCK_P + p
            in_p = q < rows
            inside = in_p[:, None] & in_c[None, :]
            x = load_tile(maps, map_strides, i, b, q, c, width, inside, ALIGN)
            if deep is not None:
                d = load_tile(deep, deep_strides, i, b, q, c, width, in_p[:, None] & in_sums[None, :], ALIGN)
                s1 += d * (x - reference[None, :])
                s2 += d
            count += tl.where(in_p, 1.0, 0.0)
            distance = tl.where(inside, (x - shift[None, :]) - mean, 0.0)
            step = distance * (1.0 / tl.maximum(count, 1.0))[:, None]
            mean += step
            squares += distance * (distance - step)
        if deep is not None:
            tl.store(references + (slot * batch + b) * channels + c, reference, mask=in_sums)
            at = sums + (slot * 2 * batch + b) * channels + c
            tl.store(at, tl.sum(s1, 0), mask=in_sums)
            tl.store(at + batch.to(tl.int64) * channels, tl.sum(s2, 0), mask=in_sums)

    total = tl.minimum(SAMPLES, batch - first).to(tl.float32) * positions
    weight = count / total
    # The condition keeps the product and the first addition apart: fused, they would leave the lanes a bit apart.
    mean_of_all = tl.sum(tl.where(count[:, None] > 0, mean * weight[:, None], 0.0), 0)
    apart = mean - mean_of_all[None, :]
    squares += count[:, None] * apart * apart
    at = partials + (slot * 3 * chunks + chunk) * channels + c
    tl.store(at, shift, mask=in_c)
    tl.store(at + chunks.to(tl.int64) * channels, mean_of_all, mask=in_c)
    tl.store(at + 2 * chunks.to(tl.int64) * channels, tl.sum(squares, 0), mask=in_c)


@triton.jit
def _two_sum(a, b):  # the sum and what rounding took from it
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


@triton.jit
def _chunk_mean(partials, chunk, c, inside, chunks, channels, mean, rest, batch, SAMPLES: tl.constexpr):
    """Of chunks [R] and channels [C]: the share of the batch [R, 1], the mean less mean + rest [C], the offsets."""
    offsets = chunk.to(tl.int64)[:, None] * channels + c[None, :]
    shift = tl.load(partials + offsets, mask=inside, other=0.0)
    distance = tl.load(partials + chunks * channels + offsets, mask=inside, other=0.0)
    distance = tl.where(inside, ((shift - mean[None, :]) - rest[None, :]) + distance, 0.0)
    samples = tl.minimum(SAMPLES, batch - chunk * SAMPLES).to(tl.float32)
    return (samples / batch)[:, None], distance, offsets


@triton.jit
def _finish(
    references,
    batch,
    channels,
    positions,
    norm,  # 3 x [1, C]: the mean in two parts, rstd
    flags,
    weight,
    bias,
    sums,
    f,
    i,
    c,
    in_c,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Turn S1 and S2 of expert i into M1, M2 and f, where its flag is set."""
    if ((flags >> i) & 1) != 0:
        gamma = vector(weight, i, c, in_c, 1.0)[None, :]
        beta = vector(bias, i, c, in_c, 0.0)[None, :]
        for block in range(0, BLOCKS):
            b = block * ROWS + tl.arange(0, ROWS)
            inside = (b < batch)[:, None] & in_c[None, :]
            plane = i.to(tl.int64) * batch
            reference = tl.load(references + (plane + b)[:, None] * channels + c[None, :], mask=inside, other=0.0)
            at = sums + (2 * plane + b)[:, None] * channels + c[None, :]
            m2 = tl.load(at + batch * channels, mask=inside, other=0.0)  # S2
            m1 = tl.load(at, mask=inside, other=0.0)  # S1
            m1 = norm[2] * (m1 - ((norm[0] - reference) + norm[1]) * m2)
            tl.store(at, m1, mask=inside)
            at = f + (plane + b)[:, None] * channels + c[None, :]
            tl.store(at, ((gamma * m1 + beta * m2) / positions).to(f.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _merge_kernel(
    partials,  # float32 [n, 3, chunks, C]
    chunks: tl.int32,
    batch: tl.int32,
    channels: tl.int32,
    positions: tl.int32,
    mean_rstd,  # float32 [n, 3, C]: leading part of the mean, rest of it, rstd
    eps,  # floats [n], or None: the squared distances are wanted in place of rstd, and nothing else
    momentum,  # floats [n], or None: no running statistics are kept
    running_mean,  # float32 [n] x [C]
    running_var,
    statistics,  # float32 [n, 2, C]: mean, unbiased variance
    flags: tl.int32,  # bit k: S1 and S2 of expert k are there, to be finished
    weight,  # float32 [K] x [C], or None
    bias,
    sums,  # float32 [K, 2, B, C]: S1, S2; then M1, M2
    references,  # float32 [K, B, C]: of S1
    f,  # [K, B, C]
    SAMPLES: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
    BATCH_BLOCKS: tl.constexpr,  # 0: no flag is set
):
    i = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_c = c < multiple(channels, ALIGN_C)
    r = tl.arange(0, ROWS)
    channels = multiple(channels.to(tl.int64), ALIGN_C)
    partials += i * 3 * chunks * channels

    # The mean of the chunks' means, twice: relative to the first shift, then to the result, which leaves roundings.
    start = tl.load(partials + c, mask=in_c, other=0.0)
    nothing = tl.zeros([BLOCK], tl.float32)
    moved = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(0, CHUNK_BLOCKS):
        chunk = block * ROWS + r
        inside = (chunk < chunks)[:, None] & in_c[None, :]
        share, distance, _ = _chunk_mean(partials, chunk, c, inside, chunks, channels, start, nothing, batch, SAMPLES)
        moved += share * distance
    mean, rest = _two_sum(start, tl.sum(moved, 0))
    moved = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(0, CHUNK_BLOCKS):
        chunk = block * ROWS + r
        inside = (chunk < chunks)[:, None] & in_c[None, :]
        share, distance, offsets = _chunk_mean(partials, chunk, c, inside, chunks, channels, mean, rest, batch, SAMPLES)
        moved += share * distance
        squares += tl.load(partials + 2 * chunks * channels + offsets, mask=inside, other=0.0)
        squares += share * batch * positions * distance * distance
    mean, rest = _two_sum(mean, rest + tl.sum(moved, 0))
    squares_total = tl.sum(squares, 0)

    at = mean_rstd + i * 3 * channels + c
    tl.store(at, mean, mask=in_c)
    tl.store(at + channels, rest, mask=in_c)
    if eps is None:
        tl.store(at + 2 * channels, squares_total, mask=in_c)
    else:
        values = batch.to(tl.float32) * positions
        rstd = 1.0 / tl.sqrt_rn(squares_total / values + pick(eps, i))
        tl.store(at + 2 * channels, rstd, mask=in_c)
        variance = squares_total / (values - 1.0)
        at = statistics + i * 2 * channels + c
        tl.store(at, mean, mask=in_c)
        tl.store(at + channels, variance, mask=in_c)
        if momentum is not None:
            new = pick(momentum, i)
            at = pick(running_mean, i) + c
            tl.store(at, new * mean + (1.0 - new) * tl.load(at, mask=in_c), mask=in_c)
            at = pick(running_var, i) + c
            tl.store(at, new * variance + (1.0 - new) * tl.load(at, mask=in_c), mask=in_c)
        if BATCH_BLOCKS > 0:
            norm = (mean[None, :], rest[None, :], rstd[None, :])
            of_all = (references, batch, channels, positions, norm, flags, weight, bias, sums, f)
            _finish(*of_all, i, c, in_c, ROWS, BATCH_BLOCKS)


class Partials(NamedTuple):
    """What the first pass found in n maps: ``values`` [n, 3, chunks, C], a chunk being ``samples`` samples.

    ``references`` [n, B, C]: what S1 is relative to, where it is wanted of any map.
    """

    values: Tensor
    samples: int
    references: Tensor | None


class Training(NamedTuple):
    """What a training forward makes of the statistics: arguments and results as in ``dkf_forward``."""

    eps: Sequence[float]
    momentum: Sequence[float]
    running: Sequence[Tensor]
    statistics: Tensor
    one_pass: Sequence[bool]  # [n]: finish M1, M2 and f of this expert
    weight: Sequence[Tensor | None]
    bias: Sequence[Tensor | None]
    sums: Tensor
    f: Tensor


# Samples that a program of the first pass takes at most, one after the other: what it writes is then about 1 % of what
# it reads, for 7 × 7 positions.
_SAMPLES = 8


def reduce_maps(
    maps: Sequence[Tensor], deep: Sequence[Tensor] = (), one_pass: Sequence[bool] = (), sums: Tensor | None = None
) -> Partials:
    """Run the first pass. Where ``one_pass`` is set it also reads the deep map and leaves S1 and S2 in ``sums``."""
    extent = extent_of(maps[0])
    batch, channels, positions, _ = extent
    tile = choose_tile(maps[0], len(maps))
    blocks = triton.cdiv(channels, tile.channels)
    samples = 1
    while samples < _SAMPLES and batch * len(maps) * blocks >= 4 * samples * PROGRAMS:
        samples *= 2
    chunks = triton.cdiv(batch, samples)
    partials = maps[0].new_empty((len(maps), 3, chunks, channels), dtype=torch.float32)
    references = partials.new_empty((len(maps), batch, channels)) if any(one_pass) else None
    for group in groups(range(len(maps)), maps, deep if any(one_pass) else ()):
        reads_deep = len(group.strides) > 1
        _partial_kernel[(blocks * chunks, len(group.slots))](
            group.pick(maps),
            group.strides[0],
            group.pick(deep) if reads_deep else None,
            group.strides[1] if reads_deep else None,
            packed(group.slots),
            bits(group.pick(one_pass)) if reads_deep else 0,
            *extent,
            partials,
            sums if reads_deep else None,
            references,
            **group.constants(extent, tile),
            BLOCKS=triton.cdiv(positions, tile.positions),
            SAMPLES=samples,
        )
    return Partials(partials, samples, references)


def merge(partials: Partials, batch: int, positions: int, mean_rstd: Tensor, training: Training | None = None) -> None:
    """Fill ``mean_rstd`` [n, 3, C]; without ``training``, with sums of squared distances in place of rstd."""
    norms, _, chunks, channels = partials.values.shape
    finish = training is not None and any(training.one_pass)
    tile = row_tile(batch if finish else chunks)
    given: tuple[Any, ...] = (None,) * 5
    finished: tuple[Any, ...] = (0, *(None,) * 5)
    if training is not None:
        running = tuple(training.running)
        kept = (tuple(map(float, training.momentum)), running[::2], running[1::2]) if running else (None,) * 3
        given = (tuple(map(float, training.eps)), *kept, training.statistics)
        if finish:
            vectors = (vectors_or_none(training.weight, 1.0), vectors_or_none(training.bias, 0.0))
            finished = (bits(training.one_pass), *vectors, training.sums, partials.references, training.f)
    _merge_kernel[(triton.cdiv(channels, tile.channels), norms)](
        partials.values,
        chunks,
        batch,
        channels,
        positions,
        mean_rstd,
        *given,
        *finished,
        SAMPLES=partials.samples,
        **tile.constants(channels),
        CHUNK_BLOCKS=tile.blocks(chunks),
        BATCH_BLOCKS=tile.blocks(batch) if finish else 0,
    )
