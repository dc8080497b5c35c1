"""The end of the DKT forward: a lane turns the sums of a row into its terms and into what the backward needs."""

import triton
import triton.language as tl

from shike_fast.kernels.losses._batch import ROWS, add_rows
from shike_fast.kernels.losses._rows import exp, kernel, times_factor


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0, accurate for small x: the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def total(x):  # [EXPERTS, ROWS] -> [1, ROWS], to be subtracted from K times x
    return tl.sum(x, 0)[None, :]


@kernel
def _end_kernel(
    saved,  # float32 [5K + 4, B]; in: what the forward leaves of a row, out: what the backward needs
    loss,  # float32 []
    terms,  # float32 [3]
    partials,  # float32 [3, programs]
    ticket,  # int32 [], 0
    rows: tl.int32,
    experts: tl.int32,
    inverse_batch,  # 1 / B
    attached,  # 0 if the teachers are detached, else 1
    factors,  # float64 [2] or None: of w and v, the weights of the two divergences with their divisor
    w,
    v,
    teacher_target_logit,
    student_target_logit,
    HARDEST: tl.constexpr,
    MUTUAL: tl.constexpr,
    EXPERTS: tl.constexpr,  # 4 or 8, at least K
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)[:, None]
    valid = (row < rows)[None, :] & (expert < experts)  # numbers of others are 0, and so is what they add to a sum
    of_experts = saved + (expert.to(tl.int64) * rows + row[None, :])
    step = experts.to(tl.int64) * rows
    pivots = tl.load(of_experts, valid, 0.0)
    exps = tl.load(of_experts + step, valid, 0.0)
    divergences = tl.load(of_experts + 2 * step, valid, 0.0)
    at_target = tl.load(of_experts + 3 * step, valid, 0.0)
    at_h = tl.load(of_experts + 4 * step, valid, 0.0)
    of_teacher = saved + (5 * step + row)
    teacher_pivot = tl.load(of_teacher, row < rows, 0.0)[None, :]
    teacher_exps = tl.load(of_teacher + rows, row < rows, 0.0)[None, :]
    teacher_gaps = tl.load(of_teacher + 2 * rows, row < rows, 0.0)[None, :]
    w = times_factor(w, factors, 0)
    v = times_factor(v, factors, 1)

    # Of the students CE_k, A_k with p_k[c] = A_k exp(z_k[c] − M_k), and 1 − p_k[y], which nothing is subtracted for.
    distance = at_target - pivots
    smaller = exp(-tl.abs(distance))
    lses = tl.log(exps + smaller)  # log-sum-exp of expert k over all classes, relative to its pivot
    losses = tl.where(distance >= 0, log1p(exps * smaller), lses - distance)
    losses = tl.where(valid, losses, 0.0)
    lses = tl.where(valid, tl.where(distance >= 0, distance + losses, lses), 0.0)
    scales = tl.where(valid, exp(-lses), 0.0)
    rests = exps * scales
    slopes = scales * inverse_batch  # of exp(z_k − M_k) in the gradient
    shares = tl.zeros_like(scales)  # of it in what all experts' gradients have in common
    gradients = -rests * inverse_batch  # at the target
    mutual = tl.zeros_like(scales)  # Σ_i KL(p_k ‖ p_i)
    if MUTUAL:
        log_ratio = experts * lses - total(lses)
        difference = total(losses) - experts * losses  # Σ_i log p_k[y] − log p_i[y]
        at_y = exp(-losses)
        mutual = tl.where(valid, scales * divergences - rests * log_ratio + at_y * difference, 0.0)
        shares = v * scales
        slopes += shares * (experts - attached * (mutual + log_ratio))
        gradients += v * (total(rests) - experts * rests + attached * at_y * (difference - mutual))

    hardest = tl.zeros([1, ROWS], tl.float32)
    teacher_scale = hardest
    expected_gap = hardest
    gradients_at_h = at_h
    if HARDEST:
        mean = total(at_h) / experts
        pivot = tl.maximum(tl.maximum(teacher_pivot, mean), teacher_target_logit)
        others = exp(teacher_pivot - pivot)
        q_at_h = exp(mean - pivot)
        q_at_y = exp(teacher_target_logit - pivot)
        t = teacher_exps * others + q_at_h + q_at_y
        gap_at_h = total(tl.where(valid, mean - at_h, 0.0))
        gap_at_y = experts * (teacher_target_logit - student_target_logit)
        # E_q[Σ_k (r − ŝ_k's logit)]
        expected_gap = (teacher_gaps * others + q_at_h * gap_at_h + q_at_y * gap_at_y) / t
        student_pivots = tl.maximum(pivots, student_target_logit)
        student_exps = exps * exp(pivots - student_pivots) + exp(student_target_logit - student_pivots)
        student_lses = (student_pivots - pivots) + tl.log(student_exps)
        hardest = expected_gap - total(tl.where(valid, (pivot - pivots) + tl.log(t) - student_lses, 0.0))
        slopes += w * exp(-student_lses)
        teacher_pivot = pivot
        teacher_scale = w / t
        q = teacher_scale * q_at_h
        dr = attached * q * (gap_at_h - expected_gap)  # the mean at h hands its gradient to every expert
        x = tl.where(valid, at_h - pivots, 0.0)
        common = q - dr / experts + total(shares * exp(x))
        gradients_at_h = exp(x) * (slopes + attached * shares * (experts * x - total(x))) - common

    tl.store(of_experts + step, slopes, valid)
    tl.store(of_experts + 2 * step, shares, valid)
    tl.store(of_experts + 3 * step, gradients, valid)
    tl.store(of_experts + 4 * step, gradients_at_h, valid)
    of_teacher = of_teacher[None, :]
    tl.store(of_teacher, teacher_pivot, (row < rows)[None, :])
    tl.store(of_teacher + rows, teacher_scale, (row < rows)[None, :])
    tl.store(of_teacher + 2 * rows, expected_gap, (row < rows)[None, :])

    of_rows = (tl.sum(losses, 0), tl.where(row < rows, tl.sum(hardest, 0), 0.0), tl.sum(mutual, 0))
    last, sums = add_rows(of_rows, partials, ticket)
    if last:
        weights = (inverse_batch, w, v)
        whole = tl.full((), 0.0, tl.float32)
        for i in tl.static_range(3):
            tl.store(terms + i, weights[i] * sums[i])
            whole += weights[i] * sums[i]
        tl.store(loss, whole)
