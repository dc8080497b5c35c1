"""Triton kernels of ``dkt_loss``: every sample is a row, with the logits of all experts."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels._common import multiple
from shike_fast.kernels.losses._dkt_block import (
    FLOOR,
    MASKED,
    add_block,
    expert_rows,
    gap_of,
    log1p,
    logits_at,
    total_of,
)
from shike_fast.kernels.losses._rows import (
    BACKWARD_BUDGET,
    FORWARD_BUDGET,
    UNSPECIALIZED,
    Layout,
    batch_sum,
    class_offset,
    exp,
    gradient_arguments,
    layout_of,
    times_factor,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    inverse_batch,  # 1 / B
    attached,  # 0 if the teachers are detached, else 1
    factors,  # float64 [2] or None: of w and v, the weights of the two divergences with their divisor
    v,
    teacher_target_logit,
    student_target_logit,
    saved,  # float32 [B, 5K + 4]
    terms,  # float32 [B, 3]: Σ_k CE_k, D_h, Σ_k KL_k
    K: tl.constexpr,
    HARDEST: tl.constexpr,
    MUTUAL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # in a row
):
    row = tl.program_id(0).to(tl.int64)
    classes = multiple(classes, ALIGN)
    y = tl.load(target + row * target_stride)
    rows = expert_rows(logits, offsets, row * row_stride, ALIGN)
    # NaN, so that it shows, if the target is out of range
    at_target = logits_at(rows, class_offset(y, class_stride), (y >= 0) & (y < classes), float("nan"))

    zero = tl.full((), 0.0, tl.float32)
    floor = tl.full((), FLOOR, tl.float32)
    zeros = ()
    floors = ()
    for _ in tl.static_range(K):
        zeros += (zero,)
        floors += (floor,)
    sums = (floors, zeros, zeros, tl.full((), -float("inf"), tl.float32), tl.full((), -1, tl.int32), floor, zero, zero)
    if BLOCKS == 1:
        sums = add_block(rows, class_stride, classes, y, 0, sums, K, HARDEST, MUTUAL, True, BLOCK)
    else:
        for i in range(0, BLOCKS):
            sums = add_block(rows, class_stride, classes, y, i * BLOCK, sums, K, HARDEST, MUTUAL, False, BLOCK)
    pivots, exps, divergences, _, h, teacher_pivot, teacher_exps, teacher_gaps = sums

    saved += row * (5 * K + 4)
    terms += row * 3
    lses = ()  # l_k: log-sum-exp of expert k over all classes, relative to its pivot
    losses = ()  # CE_k
    scales = ()  # Ak: p_k[c] = Ak exp(z_k[c] − M_k)
    rests = ()  # 1 − p_k[y]
    for k in tl.static_range(K):
        distance = at_target[k] - pivots[k]
        smaller = exp(-tl.abs(distance))
        lse = tl.log(exps[k] + smaller)
        high = distance >= 0
        loss = tl.where(high, log1p(exps[k] * smaller), lse - distance)
        losses += (loss,)
        lses += (tl.where(high, distance + loss, lse),)
        scales += (exp(-lses[k]),)
        rests += (exps[k] * scales[k],)
    loss_total = total_of(losses)
    lse_total = total_of(lses)
    rest_total = total_of(rests)
    v = times_factor(v, factors, 1)
    mutual = zero
    for k in tl.static_range(K):
        gradient = -rests[k] * inverse_batch  # d(cross-entropy)/d z_k[y]
        value = zero
        if MUTUAL:
            at_y = exp(-losses[k])  # p_k[y]
            log_ratio = K * lses[k] - lse_total
            loss_difference = loss_total - K * losses[k]
            # Σ_i KL(p_k ‖ p_i)
            divergence = scales[k] * divergences[k] - rests[k] * log_ratio + at_y * loss_difference
            mutual += divergence
            value = divergence + log_ratio
            gradient += v * (rest_total - K * rests[k] + attached * at_y * (loss_difference - divergence))
        tl.store(saved + k, pivots[k])
        tl.store(saved + K + k, scales[k])
        tl.store(saved + 3 * K + k, value)
        tl.store(saved + 4 * K + k, gradient)
    tl.store(terms, loss_total)
    tl.store(terms + 2, mutual)

    hardest = zero
    if HARDEST:
        z = logits_at(rows, class_offset(h, class_stride), h >= 0, MASKED)
        mean = total_of(z) / K
        pivot = tl.maximum(tl.maximum(teacher_pivot, mean), teacher_target_logit)
        others = exp(teacher_pivot - pivot)
        at_h = exp(mean - pivot)
        at_y = exp(teacher_target_logit - pivot)
        t = teacher_exps * others + at_h + at_y
        gap_at_y = K * (teacher_target_logit - student_target_logit)
        # E_q[Σ_k (r − ŝ_k's logit)]
        expected_gap = (teacher_gaps * others + at_h * gap_of(mean, z) + at_y * gap_at_y) / t
        log_t = tl.log(t)
        hardest = expected_gap
        for k in tl.static_range(K):
            student_pivot = tl.maximum(pivots[k], student_target_logit)
            student_exps = exps[k] * exp(pivots[k] - student_pivot) + exp(student_target_logit - student_pivot)
            student_lse = (student_pivot - pivots[k]) + tl.log(student_exps)
            hardest -= (pivot - pivots[k]) + log_t - student_lse
            tl.store(saved + 2 * K + k, exp(-student_lse))
        tl.store(saved + 5 * K, pivot)
        tl.store(saved + 5 * K + 1, 1.0 / t)
        tl.store(saved + 5 * K + 2, expected_gap)
        tl.store(saved + 5 * K + 3, h.to(tl.float32))
    else:  # nothing reads them; defined all the same, so that two runs leave identical bits
        for k in tl.static_range(K):
            tl.store(saved + 2 * K + k, 0.0)
        for i in tl.static_range(4):
            tl.store(saved + 5 * K + i, 0.0)
    tl.store(terms + 1, hardest)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    inverse_batch,  # 1 / B
    attached,  # 0 if the teachers are detached, else 1
    factors,  # float64 [2] or None: of w and v, the weights of the two divergences with their divisor
    w,
    v,
    saved,  # float32 [B, 5K + 4]
    grad_output,  # float32 []
    gradient,  # [K, B, C]
    out_expert_stride: tl.int64,
    out_row_stride: tl.int64,
    out_class_stride,
    K: tl.constexpr,
    HARDEST: tl.constexpr,
    MUTUAL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    classes = multiple(classes, ALIGN)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = expert_rows(logits, offsets, row * row_stride, ALIGN)
    z = logits_at(rows, class_offset(c, class_stride), c < classes, MASKED)
    y = tl.load(target + row * target_stride)
    g = tl.load(grad_output).to(tl.float32)
    w = times_factor(w, factors, 0)
    v = times_factor(v, factors, 1)
    saved += row * (5 * K + 4)

    x = ()
    e = ()
    for k in tl.static_range(K):
        x += (z[k] - tl.load(saved + k),)
        e += (exp(x[k]),)
    common = tl.full([BLOCK], 0.0, tl.float32)  # what all experts' gradients have in common, negated
    if MUTUAL:
        x_total = total_of(x)
        for k in tl.static_range(K):
            common += (g * v * tl.load(saved + K + k)) * e[k]
    if HARDEST:
        h = tl.load(saved + 5 * K + 3).to(tl.int32)
        mean = total_of(logits_at(rows, class_offset(h, class_stride), (h >= 0) & (h < classes), MASKED)) / K
        r = z[0]
        winner = tl.full([BLOCK], 0, tl.int32)  # the first expert that attains the maximum
        for k in tl.static_range(1, K):
            winner = tl.where(z[k] > r, k, winner)
            r = tl.maximum(r, z[k])
        r = tl.where(c == h, mean, r)
        q = (g * w) * exp(r - tl.load(saved + 5 * K)) * tl.load(saved + 5 * K + 1)
        dr = attached * q * (gap_of(r, z) - tl.load(saved + 5 * K + 2))  # d(loss)/d r[c]
        common += q - tl.where(c == h, dr / K, 0.0)  # the mean at h hands its gradient to every expert
        winner = tl.where(c == h, -1, winner)

    for k in tl.static_range(K):
        scale = tl.load(saved + K + k)
        slope = scale * inverse_batch
        if HARDEST:
            slope += w * tl.load(saved + 2 * K + k)
        if MUTUAL:
            slope += scale * v * (K - attached * tl.load(saved + 3 * K + k))
            dz = e[k] * (g * slope + (g * attached * v * scale) * (K * x[k] - x_total)) - common
        else:
            dz = e[k] * (g * slope) - common
        if HARDEST:
            dz += tl.where(winner == k, dr, 0.0)
        dz = tl.where(c == y, g * tl.load(saved + 4 * K + k), dz)
        out = gradient + multiple(k * out_expert_stride + row * out_row_stride, ALIGN)
        tl.store(out + class_offset(c, out_class_stride), dz.to(gradient.dtype.element_ty), mask=c < classes)


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
        The loss [], its terms [3] (cross-entropy, hardest, mutual) and saved [B, 5K + 4], all float32. Row b of saved
        holds, for every expert, the pivot M_k, Ak = exp(M_k − lse_k), Bk (the same of the student with its target
        replaced), the divergence V_k and the finished gradient at the target; then the teacher's pivot, 1/t,
        E_q[Σ_k (r − z_k)] and the hardest negative h (exact up to C = 2²⁴).
    """
    layout = layout_of(logits)
    experts, batch = layout.experts, layout.batch
    saved = layout.new_floats(batch, 5 * experts + 4)
    if batch == 0:
        return layout.new_floats().zero_(), layout.new_floats(3).zero_(), saved
    w, v, computed = _weights(layout, hardest_weight, mutual_weight)
    tile = layout.tile(experts, FORWARD_BUDGET)
    row_terms = layout.new_floats(batch, 3)
    with torch.cuda.device_of(layout.first):  # Triton launches on the current device
        _forward_kernel[(batch,)](
            *layout.arguments(target),
            1.0 / batch,
            0.0 if detach_teacher else 1.0,
            factors,
            v,
            teacher_target_logit,
            student_target_logit,
            saved,
            row_terms,
            K=experts,
            **computed,
            ALIGN=layout.alignment(),
            BLOCK=tile.block,
            BLOCKS=triton.cdiv(layout.classes, tile.block),
            num_warps=tile.warps,
        )
        loss, terms = batch_sum(row_terms, (1.0 / batch, w, v), factors)
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
    experts, batch = layout.experts, layout.batch
    gradient = layout.new_gradient()
    if batch == 0:
        return gradient
    w, v, computed = _weights(layout, hardest_weight, mutual_weight)
    tile = layout.tile(experts, BACKWARD_BUDGET)
    with torch.cuda.device_of(layout.first):
        _backward_kernel[(batch, triton.cdiv(layout.classes, tile.block))](
            *layout.arguments(target),
            1.0 / batch,
            0.0 if detach_teacher else 1.0,
            factors,
            w,
            v,
            saved,
            grad_output,
            *gradient_arguments(gradient),
            K=experts,
            **computed,
            ALIGN=layout.alignment(*gradient.stride()[:2]),
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return gradient
