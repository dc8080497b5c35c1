"""Triton kernels of the experts' cross-entropy with a bias and label smoothing: every sample is a row."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels.losses._batch import ROWS, add_rows, batch_of
from shike_fast.kernels.losses._rows import (
    LOGITS_OF_A_LANE,
    Layout,
    Tile,
    ahead_of_chunks,
    before_chunks,
    class_offset,
    edge_classes,
    exp,
    expert_rows,
    first_chunk,
    gradient_arguments,
    kernel,
    layout_of,
    loaded,
    none_if_unit,
    reduced,
    times,
)

# Where the pivots start: the lowest finite float, so that no −∞ − −∞ arises from a class that is masked out.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_CLASSES_OF_A_LANE = 8


@triton.jit
def _bias_rows(bias, bias_expert_stride, offset, SHARED: tl.constexpr, K: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to one place of the bias of each expert, or of all of them."""
    rows = ()
    if bias is not None:
        for k in tl.static_range(1 if SHARED else K):
            rows += (first_chunk(bias + k * bias_expert_stride, offset, VECTOR),)
    return rows


@triton.jit
def _biased(rows, biases, c, valid, class_stride, bias_class_stride, other):  # z_k[c] + bias_k[c]
    values = loaded(rows, c, valid, class_stride)
    added = loaded(biases, c, valid, bias_class_stride)
    z = ()
    for k in tl.static_range(len(rows)):
        value = values[k] + added[k % len(biases)] if len(biases) > 0 else values[k]
        z += (value if valid is None else tl.where(valid, value, other),)
    return z


@triton.jit
def _add(z, valid, state, reference, K: tl.constexpr, SMOOTHING: tl.constexpr):
    """Add to each lane's state the logits [UNROLL, LANES, VECTOR] of some chunks."""
    pivots, exps, distances = state
    new_pivots = ()
    new_exps = ()
    new_distances = ()
    for k in tl.static_range(K):
        pivot = tl.maximum(pivots[k], tl.max(tl.max(z[k], 2), 0))
        e = exp(z[k] - pivot[None, :, None])
        new_pivots += (pivot,)
        new_exps += (exps[k] * exp(pivots[k] - pivot) + tl.sum(tl.sum(e, 2), 0),)
        if SMOOTHING:
            distance = tl.where(valid[:, :, None], z[k] - reference[k], 0.0)
            new_distances += (distances[k] + tl.sum(tl.sum(distance, 2), 0),)
    return new_pivots, new_exps, new_distances


@kernel
def _forward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    bias,  # float32 [C] (SHARED), [K, C] or None
    bias_expert_stride: tl.int64,
    bias_class_stride,
    label_smoothing,
    saved,  # float32 [2K, B]
    labels,  # float32 [K, B]: E_label[z − M]
    ticket,  # int32 []
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,  # start at the beginning of a sector
):
    row = tl.program_id(0).to(tl.int64)
    rows = expert_rows(logits, offsets, row * row_stride)
    biases = _bias_rows(bias, bias_expert_stride, 0, SHARED, K, 1)
    y = tl.load(target + row * target_stride)
    # NaN, so that it shows, if the target is out of range
    in_range = (y >= 0) & (y < classes)
    at_target = _biased(rows, biases, y, in_range, class_stride, bias_class_stride, float("nan"))
    reference = ()  # of the distances whose mean label smoothing wants; near the pivots, so that little is rounded
    for k in tl.static_range(K):
        reference += (tl.where(tl.abs(at_target[k]) < float("inf"), at_target[k], 0.0),)

    lane = tl.arange(0, LANES)
    before = before_chunks(rows[0], VECTOR)
    count = (classes - before) // VECTOR  # of whole chunks, at least one
    chunks = ()
    for k in tl.static_range(K):
        chunks += (first_chunk(rows[k], class_offset(before, class_stride), VECTOR),)
    aligned: tl.constexpr = VECTOR if bias_class_stride is None else 1
    bias_chunks = _bias_rows(bias, bias_expert_stride, class_offset(before, bias_class_stride), SHARED, K, aligned)
    ahead = ahead_of_chunks(rows[0] + class_offset(before, class_stride), VECTOR) if AHEAD else 0

    edge_c = edge_classes(lane, before, count, VECTOR)
    edge = _biased(rows, biases, edge_c, edge_c < classes, class_stride, bias_class_stride, -float("inf"))
    pivots = ()
    exps = ()
    distances = ()
    for k in tl.static_range(K):
        pivots += (tl.maximum(edge[k], _LOWEST),)
        exps += (exp(edge[k] - pivots[k]),)
        if SMOOTHING:
            distances += (tl.where(edge_c < classes, edge[k] - reference[k], 0.0),)
    state = pivots, exps, distances
    for i in range(0, STEPS):
        # Lanes outside of the row read the nearest chunk, so that no mask is needed, and leave it out.
        chunk = (i * UNROLL + tl.arange(0, UNROLL))[:, None] * LANES + lane[None, :] - ahead
        valid = (chunk >= 0) & (chunk < count)
        c = (tl.minimum(tl.maximum(chunk, 0), count - 1) * VECTOR)[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
        z = _biased(chunks, bias_chunks, c, None, class_stride, bias_class_stride, 0.0)
        if (i == 0) | (i == STEPS - 1):
            inside = ()
            for k in tl.static_range(K):
                inside += (tl.where(valid[:, :, None], z[k], -float("inf")),)
            z = inside
        state = _add(z, valid, state, reference, K, SMOOTHING)

    pivots, exps, distances = state
    maxima = reduced(pivots, True)
    addends = ()
    for k in tl.static_range(K):
        addends += (times(exps[k], exp(pivots[k] - maxima[k])),)
    sums = reduced(addends + distances, False)
    batch = tl.num_programs(0)
    for k in tl.static_range(K):
        label = (1.0 - label_smoothing) * (at_target[k] - maxima[k])
        if SMOOTHING:
            label += label_smoothing * (sums[K + k] / classes + (reference[k] - maxima[k]))
        tl.store(saved + (k * batch + row), maxima[k])
        tl.store(saved + ((K + k) * batch + row), sums[k])
        tl.store(labels + (k * batch + row), label)
    tl.store(ticket, 0, mask=row == 0)


@kernel
def _end_kernel(
    saved,  # float32 [2, rows]; second in: Σ_c exp(z[c] − M), out: its inverse
    labels,  # float32 [rows]
    loss,  # float32 []
    partials,  # float32 [1, programs]
    ticket,  # int32 [], 0
    rows: tl.int32,  # with those of other experts
    scale,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    s = tl.load(saved + rows + row, valid, 1.0)
    losses = tl.where(valid, tl.log(s) - tl.load(labels + row, valid, 0.0), 0.0)
    tl.store(saved + rows + row, 1.0 / s, valid)
    last, sums = add_rows((losses,), partials, ticket)
    if last:
        tl.store(loss, scale * sums[0])


@kernel
def _backward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    bias,  # float32 [C] (SHARED), [K, C] or None
    bias_expert_stride: tl.int64,
    bias_class_stride,
    label_smoothing,
    saved,  # float32 [2K, B]
    grad_output,  # float32 []
    inverse_batch,  # 1 / B
    gradient,  # [K, B, C]
    out_expert_stride: tl.int64,
    out_row_stride: tl.int64,
    out_class_stride,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
):
    batch = tl.num_programs(0)
    row = (batch - 1 - tl.program_id(0)).to(tl.int64)  # the rows that the forward read last may be in the cache
    rows = expert_rows(logits, offsets, row * row_stride)
    before = before_chunks(rows[0], VECTOR)
    count = (classes - before) // VECTOR
    chunks = ()
    outs = ()
    out_chunks = ()
    for k in tl.static_range(K):
        chunks += (first_chunk(rows[k], class_offset(before, class_stride), VECTOR),)
        outs += (gradient + (k * out_expert_stride + row * out_row_stride),)
        out_chunks += (first_chunk(outs[k], class_offset(before, out_class_stride), VECTOR),)
    aligned: tl.constexpr = VECTOR if bias_class_stride is None else 1
    bias_chunks = _bias_rows(bias, bias_expert_stride, class_offset(before, bias_class_stride), SHARED, K, aligned)
    ahead = ahead_of_chunks(rows[0] + class_offset(before, class_stride), VECTOR) if AHEAD else 0
    y = tl.load(target + row * target_stride)
    g = tl.load(grad_output).to(tl.float32) * inverse_batch
    pivots = ()
    slopes = ()
    for k in tl.static_range(K):
        pivots += (tl.load(saved + (k * batch + row)),)
        slopes += (g * tl.load(saved + ((K + k) * batch + row)),)
    smoothed = g * (label_smoothing / classes)
    at_label = g * (1.0 - label_smoothing)

    first = tl.program_id(1) * UNROLL * LANES - ahead
    chunk = first + tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    c = (tl.minimum(tl.maximum(chunk, 0), count - 1) * VECTOR)[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
    z = _biased(chunks, bias_chunks, c, None, class_stride, bias_class_stride, 0.0)
    dz = ()
    for k in tl.static_range(K):
        dz += (exp(z[k] - pivots[k]) * slopes[k] - smoothed,)
    start = before + first * VECTOR
    if (y >= start) & (y < start + UNROLL * LANES * VECTOR):
        at_y = ()
        for k in tl.static_range(K):
            at_y += (tl.where(before + c == y, dz[k] - at_label, dz[k]),)
        dz = at_y
    for k in tl.static_range(K):
        out = out_chunks[k] + class_offset(c, out_class_stride)
        inside = ((chunk >= 0) & (chunk < count))[:, :, None]
        tl.store(out, dz[k].to(gradient.dtype.element_ty), mask=inside)
    if VECTOR > 1 and tl.program_id(1) == 0:
        edge = edge_classes(tl.arange(0, 2 * VECTOR), before, count, VECTOR)
        biases = _bias_rows(bias, bias_expert_stride, 0, SHARED, K, 1)
        edge_z = _biased(rows, biases, edge, edge < classes, class_stride, bias_class_stride, 0.0)
        for k in tl.static_range(K):
            edge_dz = exp(edge_z[k] - pivots[k]) * slopes[k] - smoothed
            edge_dz -= tl.where(edge == y, at_label, 0.0)
            tl.store(outs[k] + edge, edge_dz.to(gradient.dtype.element_ty), mask=edge < classes)


def _tile(layout: Layout, bias: Tensor | None, gradient: Tensor | None = None) -> Tile:
    """The tile of a program.

    Its chunks start at multiples of their size in the bias, too. Four of its floats fill the widest load.
    """
    agree = 16
    if bias is not None and bias.stride(-1) == 1:
        rows = layout.first.data_ptr() // layout.first.element_size(), layout.row_stride
        agree = math.gcd(4, *rows, bias.data_ptr() // 4, *bias.stride()[:-1])
    return layout.tile(gradient, agree)


def _bias_arguments(bias: Tensor | None) -> tuple[Tensor | None, int, int | None]:
    if bias is None:
        return None, 0, None
    return bias, (0 if bias.dim() == 1 else bias.stride(0)), none_if_unit(bias.stride(-1))


def cross_entropy_forward(
    logits: Sequence[Tensor], target: Tensor, bias: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute ``expert_cross_entropy`` and what its backward needs.

    Args:
        logits: one tensor [K, B, C], or K tensors [B, C]; float32, bfloat16 or float16, any strides, on one device.
        target: int64 [B]. A class out of range makes the loss NaN.
        bias: float32 [C] or [K, C], any strides, or ``None``; −∞ takes a class out.
        label_smoothing: ε in 0..1.

    Returns:
        The loss [] and saved [B, 2K], both float32. The memory of saved holds the maximum M of every expert and row,
        then 1 / Σ_c exp(z − M) of each, row after row.
    """
    layout = layout_of(logits)
    experts, batch = layout.experts, layout.batch
    saved, loss = layout.new_floats(batch, 2 * experts), layout.new_floats()
    if batch == 0:
        return loss.zero_(), saved
    tile = _tile(layout, bias)
    unroll, steps = tile.steps(layout.classes, min(_CLASSES_OF_A_LANE, LOGITS_OF_A_LANE // layout.experts))
    end = batch_of(experts * batch, 1, loss.device)
    labels = layout.new_floats(experts, batch)
    with torch.cuda.device_of(layout.first):  # Triton launches on the current device
        _forward_kernel[(batch,)](
            *layout.arguments(target),
            *_bias_arguments(bias),
            label_smoothing,
            saved,
            labels,
            end.ticket,
            K=experts,
            SHARED=bias is None or bias.dim() == 1,
            SMOOTHING=label_smoothing != 0.0,
            VECTOR=tile.vector,
            LANES=tile.lanes,
            UNROLL=unroll,
            STEPS=steps,
            AHEAD=layout.has_room(tile, unroll * steps),
            num_warps=tile.warps,
        )
        _end_kernel[(end.programs,)](
            saved,
            labels,
            loss,
            end.partials,
            end.ticket,
            end.rows,
            1.0 / batch,
            num_warps=1,
        )
    return loss, saved


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Compute the gradient [K, B, C] of ``expert_cross_entropy`` with respect to the logits, times ``grad_output`` [].

    The other arguments are those of ``cross_entropy_forward``, and what it saved. The gradient has the logits'
    dtype and the strides of a tensor [K, B, C]; for a sequence it is contiguous.
    """
    layout = layout_of(logits)
    gradient = layout.new_gradient()
    if layout.batch == 0:
        return gradient
    tile = _tile(layout, bias, gradient)
    unroll, programs = tile.steps(layout.classes, min(_CLASSES_OF_A_LANE, LOGITS_OF_A_LANE // layout.experts))
    with torch.cuda.device_of(layout.first):
        _backward_kernel[(layout.batch, programs)](
            *layout.arguments(target),
            *_bias_arguments(bias),
            label_smoothing,
            saved,
            grad_output,
            1.0 / layout.batch,
            *gradient_arguments(gradient),
            K=layout.experts,
            SHARED=bias is None or bias.dim() == 1,
            VECTOR=tile.vector,
            LANES=tile.lanes,
            UNROLL=unroll,
            AHEAD=layout.has_room(tile, unroll * programs),
            num_warps=tile.warps,
        )
    return gradient
