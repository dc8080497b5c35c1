"""Triton kernels of ``dkt_loss``: every sample is a row, with the logits of all experts."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels.losses._batch import batch_of
from shike_fast.kernels.losses._dkt_block import (
    FLOOR,
    MASKED,
    SMALLEST,
    add_chunks,
    chunks_at,
    distances_of,
    first_state,
    gap_of,
    joined_lanes,
    largest_of,
    logits_at,
    masked,
    total_of,
)
from shike_fast.kernels.losses._dkt_rows import _end_kernel
from shike_fast.kernels.losses._rows import (
    Layout,
    before_chunks,
    class_offset,
    edge_classes,
    exp,
    expert_rows,
    first_chunk,
    gradient_arguments,
    kernel,
    layout_of,
    reduced,
)

_CLASSES_OF_A_LANE = 16  # in the backward, which spreads over them what it reads of a row


@triton.jit
def _hardest(rows, class_stride, y, start, last, largest, total, K: tl.constexpr, VECTOR: tl.constexpr):
    """The hardest negative h of the chunk from ``start`` on: h, its logits, and q and q · gap of the chunk's others."""
    i = tl.arange(0, VECTOR)
    c = start + i
    z = logits_at(rows, class_offset(c, class_stride), c <= last, MASKED)
    z = masked(z, c != y)
    # Clamped, because NaN equals no total.
    h = tl.min(tl.where(total_of(z) == total, c, last), 0)
    at_h = ()
    for k in tl.static_range(K):
        at_h += (tl.sum(tl.where(c == h, z[k], 0.0), 0),)
    q = exp(largest_of(z) - largest)
    others = tl.sum(tl.where(c == h, 0.0, q), 0)
    return h, at_h, others, tl.sum(tl.where(c == h, 0.0, q * largest_of(distances_of(z))), 0)


@triton.jit
def _with_own_pivots(rows, class_stride, classes, y, h, K: tl.constexpr, LANES: tl.constexpr):
    """The sums of a row with a pivot for every expert and for the teacher, for experts far apart: two more readings."""
    i = tl.arange(0, LANES)
    floor = tl.full([LANES], FLOOR, tl.float32)
    maxima = ()
    for _ in tl.static_range(K + 1):
        maxima += (floor,)
    for start in range(0, classes, LANES):
        c = start + i
        z = logits_at(rows, class_offset(c, class_stride), (c < classes) & (c != y), MASKED)
        values = z
        values += (tl.where(c == h, MASKED, largest_of(z)),)
        larger = ()
        for k in tl.static_range(K + 1):
            larger += (tl.maximum(maxima[k], values[k]),)
        maxima = larger
    pivots = ()
    for k in tl.static_range(K + 1):
        pivots += (tl.max(maxima[k], 0),)
    zero = tl.full([LANES], 0.0, tl.float32)
    sums = ()
    for _ in tl.static_range(2 * K + 2):
        sums += (zero,)
    for start in range(0, classes, LANES):
        c = start + i
        z = logits_at(rows, class_offset(c, class_stride), (c < classes) & (c != y), MASKED)
        x = ()
        for k in tl.static_range(K):
            x += (z[k] - pivots[k],)
        apart = distances_of(x)
        added = ()
        for k in tl.static_range(K):
            added += (sums[k] + exp(x[k]),)
        for k in tl.static_range(K):
            added += (sums[K + k] + exp(x[k]) * apart[k],)
        r = largest_of(z)
        q = exp(tl.where(c == h, MASKED, r) - pivots[K])
        added += (sums[2 * K] + q, sums[2 * K + 1] + q * gap_of(r, z))
        sums = added
    sums = reduced(sums, False)
    return pivots[:K], sums[:K], sums[K : 2 * K], pivots[K], sums[2 * K], sums[2 * K + 1]


@kernel
def _forward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    saved,  # float32 [5K + 4, B]
    ticket,  # int32 []
    K: tl.constexpr,
    HARDEST: tl.constexpr,
    MUTUAL: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row * target_stride)
    rows = expert_rows(logits, offsets, row * row_stride)
    lane = tl.arange(0, LANES)
    before = before_chunks(rows[0], VECTOR)
    count = (classes - before) // VECTOR  # of whole chunks, at least one
    chunks = ()
    for k in tl.static_range(K):
        chunks += (first_chunk(rows[k], class_offset(before, class_stride), VECTOR),)

    # The edge, a class a lane.
    c = edge_classes(lane, before, count, VECTOR)
    valid = (c < classes) & (c != y)
    lanes = first_state(logits_at(rows, class_offset(c, class_stride), valid, MASKED), c, valid, HARDEST, MUTUAL)
    for i in range(0, STEPS):
        # Lanes beyond the last chunk read it once more, so that no mask is needed, and leave it out.
        chunk = i * LANES + lane
        offset = tl.minimum(chunk, count - 1) * VECTOR
        z = chunks_at(chunks, offset, class_stride, VECTOR)
        start = before + offset
        first = before + i * LANES * VECTOR
        if (i == STEPS - 1) | ((y >= first) & (y < first + LANES * VECTOR)):
            is_target = start[:, None] + tl.arange(0, VECTOR)[None, :] == y.to(tl.int32)
            z = masked(z, (chunk < count)[:, None] & ~is_target)
        lanes = add_chunks(z, start, lanes, HARDEST, MUTUAL)
    pivot, sums, largest_total, start = joined_lanes(lanes, HARDEST)

    # NaN, so that it shows, if the target is out of range
    at_target = logits_at(rows, class_offset(y, class_stride), (y >= 0) & (y < classes), float("nan"))
    zero = tl.full((), 0.0, tl.float32)
    pivots = ()
    exps = ()
    divergences = ()
    at_h = ()
    smallest = sums[0]
    for k in tl.static_range(K):
        pivots += (pivot,)
        exps += (sums[k],)
        divergences += (sums[K + k] if MUTUAL else zero,)
        at_h += (zero,)
        smallest = tl.minimum(smallest, sums[k])
    teacher_pivot = pivot
    teacher_exps = zero
    teacher_gaps = zero
    h = tl.full((), -1, tl.int32)
    if HARDEST:
        whole = (start >= before) & (start < before + count * VECTOR)
        last = tl.where(whole, start + (VECTOR - 1), start)
        h, at_h, others, other_gaps = _hardest(rows, class_stride, y, start, last, pivot, largest_total, K, VECTOR)
        students: tl.constexpr = 2 * K if MUTUAL else K
        teacher_exps = sums[students] + others
        teacher_gaps = sums[students + 1] + other_gaps
    # The teacher's need no look: where those of all experts are large, the mean at h is, or what others add.
    if K > 1 and smallest < SMALLEST:
        pivots, exps, divergences, teacher_pivot, teacher_exps, teacher_gaps = _with_own_pivots(
            rows, class_stride, classes, y, h, K, LANES
        )

    batch = tl.num_programs(0)
    saved += row
    for fields in tl.static_range(5):
        for k in tl.static_range(K):
            tl.store(saved, (pivots, exps, divergences, at_target, at_h)[fields][k])
            saved += batch
    tl.store(saved, teacher_pivot)
    tl.store(saved + batch, teacher_exps)
    tl.store(saved + 2 * batch, teacher_gaps)
    tl.store(saved + 3 * batch, h.to(tl.float32))
    tl.store(ticket, 0, mask=row == 0)


@triton.jit
def _gradients(z, numbers, K: tl.constexpr, HARDEST: tl.constexpr, MUTUAL: tl.constexpr):
    """The K gradients at classes that are neither the target nor the hardest negative."""
    pivots, slopes, bends, shares, teacher = numbers
    teacher_pivot, teacher_scale, expected_gap, attached = teacher
    x = ()
    e = ()
    for k in tl.static_range(K):
        x += (z[k] - pivots[k],)
        e += (exp(x[k]),)
    common = tl.zeros_like(z[0])  # what all experts' gradients have in common, negated
    if MUTUAL:
        apart = distances_of(x)
        for k in tl.static_range(K):
            common += shares[k] * e[k]
    if HARDEST:
        r = largest_of(z)
        q = teacher_scale * exp(r - teacher_pivot)
        common += q
        of_winner = common - q * (attached * gap_of(r, z) - expected_gap)  # d(loss)/d r[c], to the first that attains r
        free = r == r
    gradients = ()
    for k in tl.static_range(K):
        slope = slopes[k] + bends[k] * apart[k] if MUTUAL else slopes[k]
        if HARDEST:
            gradients += (e[k] * slope - tl.where(free & (z[k] == r), of_winner, common),)
            free = free & (z[k] != r)
        else:
            gradients += (e[k] * slope - common,)
    return gradients


@triton.jit
def _numbers(saved, batch, factor, K: tl.constexpr):
    """What is saved of each expert, times a factor."""
    numbers = ()
    for k in tl.static_range(K):
        numbers += (factor * tl.load(saved + k * batch),)
    return numbers


@triton.jit
def _corrected(gradients, c, at, finished):
    """The gradients with the finished ones at one class."""
    corrected = ()
    for k in tl.static_range(len(gradients)):
        corrected += (tl.where(c == at, finished[k], gradients[k]),)
    return corrected


@kernel
def _backward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    attached,  # 0 if the teachers are detached, else 1
    saved,  # float32 [5K + 4, B]
    grad_output,  # float32 []
    gradient,  # [K, B, C]
    out_expert_stride: tl.int64,
    out_row_stride: tl.int64,
    out_class_stride,
    K: tl.constexpr,
    HARDEST: tl.constexpr,
    MUTUAL: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
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
    y = tl.load(target + row * target_stride)
    g = tl.load(grad_output).to(tl.float32)

    saved += row
    pivots = _numbers(saved, batch, 1.0, K)
    slopes = _numbers(saved + K * batch, batch, g, K)
    shares = _numbers(saved + 2 * K * batch, batch, g, K)
    at_target = _numbers(saved + 3 * K * batch, batch, g, K)
    at_h = _numbers(saved + 4 * K * batch, batch, g, K)
    saved += 5 * K * batch
    bends = ()
    for k in tl.static_range(K):
        bends += (attached * shares[k],)
    teacher = tl.load(saved), g * tl.load(saved + batch), attached * tl.load(saved + 2 * batch), attached
    numbers = pivots, slopes, bends, shares, teacher
    h = tl.load(saved + 3 * batch).to(tl.int32)  # −1 without

    lane = tl.arange(0, LANES)
    for i in range(0, STEPS):
        chunk = (tl.program_id(1) * STEPS + i) * LANES + lane
        offset = tl.minimum(chunk, count - 1) * VECTOR
        dz = _gradients(chunks_at(chunks, offset, class_stride, VECTOR), numbers, K, HARDEST, MUTUAL)
        c = offset[:, None] + tl.arange(0, VECTOR)[None, :]
        first = before + (tl.program_id(1) * STEPS + i) * LANES * VECTOR
        last = first + (LANES * VECTOR - 1)
        if ((y >= first) & (y <= last)) | ((h >= first) & (h <= last)):
            dz = _corrected(_corrected(dz, before + c, h, at_h), before + c, y, at_target)
        for k in tl.static_range(K):
            out = out_chunks[k] + class_offset(c, out_class_stride)
            tl.store(out, dz[k].to(gradient.dtype.element_ty), mask=(chunk < count)[:, None])
    if VECTOR > 1 and tl.program_id(1) == 0:
        edge = edge_classes(tl.arange(0, 2 * VECTOR), before, count, VECTOR)
        edge_gradients = _gradients(logits_at(rows, edge, edge < classes, MASKED), numbers, K, HARDEST, MUTUAL)
        edge_gradients = _corrected(_corrected(edge_gradients, edge, h, at_h), edge, y, at_target)
        for k in tl.static_range(K):
            tl.store(outs[k] + edge, edge_gradients[k].to(gradient.dtype.element_ty), mask=edge < classes)


def _weights(layout: Layout, hardest_weight: float, mutual_weight: float) -> tuple[float, float, dict[str, bool]]:
    """The weights of the two divergences, divided by B, and which of them the kernels compute at all."""
    # A single expert has nobody to agree with: its mutual term is 0.
    terms = {"HARDEST": hardest_weight != 0.0, "MUTUAL": mutual_weight != 0.0 and layout.experts > 1}
    return hardest_weight / layout.batch, mutual_weight / layout.batch, terms


def dkt_forward(
    logits: Sequence[Tensor],
    target: Tensor,
    factors: Tensor | None,
    hardest_weight: float,
    mutual_weight: float,
    teacher_target_logit: float,
    student_target_logit: float,
    detach_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``dkt_loss`` and what its backward needs.

    Args:
        logits: one tensor [K, B, C], or K tensors [B, C]; float32, bfloat16 or float16, any strides, on one device.
        target: int64 [B]. A class out of range makes the loss NaN.
        factors: float64 [2] on the same device, multiplied into ``hardest_weight`` and ``mutual_weight`` there, or
            ``None``. A weight of 0 leaves its term out, a factor of 0 does not.
        hardest_weight, mutual_weight: with the divisor beside B that ``kl_reduction`` asks for.
        teacher_target_logit, student_target_logit, detach_teacher: as for ``shike_fast.ops.dkt_loss``.

    Returns:
        The loss [], its terms [3] (cross-entropy, hardest, mutual) and saved [B, 5K + 4], all float32. The memory of
        saved holds B numbers of each kind: for every expert the pivot M_k, the slope of exp(z_k − M_k) in the gradient,
        its share in what the gradients have in common, and the finished gradients at the target and at the hardest
        negative h, all without ``grad_output``; then the teacher's pivot, w/t, E_q[Σ_k (r − z_k)] and h (exact up to
        C = 2²⁴, −1 without).
    """
    layout = layout_of(logits)
    experts, batch = layout.experts, layout.batch
    saved = layout.new_floats(batch, 5 * experts + 4)
    loss, terms = layout.new_floats(), layout.new_floats(3)
    if batch == 0:
        return loss.zero_(), terms.zero_(), saved
    w, v, computed = _weights(layout, hardest_weight, mutual_weight)
    tile = layout.tile()
    end = batch_of(batch, 3, loss.device)
    with torch.cuda.device_of(layout.first):  # Triton launches on the current device
        _forward_kernel[(batch,)](
            *layout.arguments(target),
            saved,
            end.ticket,
            K=experts,
            **computed,
            VECTOR=tile.vector,
            LANES=tile.lanes,
            STEPS=triton.cdiv(layout.classes, tile.classes),
            num_warps=tile.warps,
        )
        _end_kernel[(end.programs,)](
            saved,
            loss,
            terms,
            end.partials,
            end.ticket,
            end.rows,
            experts,
            1.0 / batch,
            0.0 if detach_teacher else 1.0,
            factors,
            w,
            v,
            teacher_target_logit,
            student_target_logit,
            **computed,
            EXPERTS=4 if experts <= 4 else 8,
            num_warps=1,
        )
    return loss, terms, saved


def dkt_backward(
    grad_output: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    factors: Tensor | None,
    saved: Tensor,
    hardest_weight: float,
    mutual_weight: float,
    teacher_target_logit: float,
    student_target_logit: float,
    detach_teacher: bool,
) -> Tensor:
    """Compute the gradient [K, B, C] of ``dkt_loss``, in the logits' dtype, times ``grad_output`` [].

    The other arguments are those of ``dkt_forward``, and what it saved. The gradient has the strides of a
    tensor [K, B, C]; for a sequence it is contiguous.
    """
    layout = layout_of(logits)
    gradient = layout.new_gradient()
    if layout.batch == 0:
        return gradient
    _, _, computed = _weights(layout, hardest_weight, mutual_weight)
    tile = layout.tile(gradient)
    steps, programs = tile.steps(layout.classes, _CLASSES_OF_A_LANE)
    with torch.cuda.device_of(layout.first):
        _backward_kernel[(layout.batch, programs)](
            *layout.arguments(target),
            0.0 if detach_teacher else 1.0,
            saved,
            grad_output,
            *gradient_arguments(gradient),
            K=layout.experts,
            **computed,
            VECTOR=tile.vector,
            LANES=tile.lanes,
            STEPS=steps,
            num_warps=tile.warps,
        )
    return gradient
