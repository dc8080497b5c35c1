"""The end of the DKT forward: a lane turns the sums of a row into its terms and into what the backward needs."""

import triton
import triton.language as tl

from shike_fast.kernels.losses._batch import ROWS, add_rows
from shike_fast.kernels.losses._dkt_block import distances_of, gap_of, total_of
from shike_fast.kernels.losses._rows import UNSPECIALIZED, exp, times_factor


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0, accurate for small x: the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _students(pivots, exps, divergences, at_target, MUTUAL: tl.constexpr):
    """CE_k, Σ_i KL(p_k ‖ p_i), and of the softmaxes A_k with p_k[c] = A_k exp(z_k[c] − M_k), 1 − p_k[y] and p_k[y].

    Also V_k = E_{p_k}[d_k] and the distance Σ_i log p_k[y] − log p_i[y]. Nothing is subtracted from 1.
    """
    losses = ()
    lses = ()  # log-sum-exp of expert k over all classes, relative to its pivot
    for k in tl.static_range(len(pivots)):
        distance = at_target[k] - pivots[k]
        smaller = exp(-tl.abs(distance))
        lse = tl.log(exps[k] + smaller)
        high = distance >= 0
        losses += (tl.where(high, log1p(exps[k] * smaller), lse - distance),)
        lses += (tl.where(high, distance + losses[k], lse),)
    scales = ()
    rests = ()
    for k in tl.static_range(len(pivots)):
        scales += (exp(-lses[k]),)
        rests += (exps[k] * scales[k],)
    mutual = ()
    means = ()
    through = ()  # what flows through the teachers at the target
    for k in tl.static_range(len(pivots)):
        if MUTUAL:
            log_ratio = len(pivots) * lses[k] - total_of(lses)
            difference = total_of(losses) - len(pivots) * losses[k]
            at_y = exp(-losses[k])
            mutual += (scales[k] * divergences[k] - rests[k] * log_ratio + at_y * difference,)
            means += (mutual[k] + log_ratio,)
            through += (at_y * (difference - mutual[k]),)
        else:
            zero = tl.zeros_like(pivots[k])
            mutual += (zero,)
            means += (zero,)
            through += (zero,)
    return losses, mutual, scales, rests, means, through


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _end_kernel(
    saved,  # float32 [5K + 4, B]; in: what the forward leaves of a row, out: what the backward needs
    loss,  # float32 []
    terms,  # float32 [3]
    partials,  # float32 [3, programs]
    ticket,  # int32 [], 0
    rows: tl.int32,
    inverse_batch,  # 1 / B
    attached,  # 0 if the teachers are detached, else 1
    factors,  # float64 [2] or None: of w and v, the weights of the two divergences with their divisor
    w,
    v,
    teacher_target_logit,
    student_target_logit,
    K: tl.constexpr,
    HARDEST: tl.constexpr,
    MUTUAL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    at = saved + row
    fields = ()
    for _ in tl.static_range(5):
        numbers = ()
        for _ in tl.static_range(K):
            numbers += (tl.load(at, valid, 0.0),)
            at += rows
        fields += (numbers,)
    pivots, exps, divergences, at_target, at_h = fields
    teacher_pivot = tl.load(at, valid, 0.0)
    teacher_exps = tl.load(at + rows, valid, 0.0)
    teacher_gaps = tl.load(at + 2 * rows, valid, 0.0)
    h = tl.load(at + 3 * rows, valid, 0.0)

    w = times_factor(w, factors, 0)
    v = times_factor(v, factors, 1)
    losses, divergence, scales, rests, means, through = _students(pivots, exps, divergences, at_target, MUTUAL)
    slopes = ()  # of exp(z_k − M_k) in the gradient
    shares = ()  # of it in what all experts' gradients have in common
    gradients = ()  # at the target
    for k in tl.static_range(K):
        slope = scales[k] * inverse_batch
        gradient = -rests[k] * inverse_batch
        share = tl.zeros_like(slope)
        if MUTUAL:
            share = v * scales[k]
            slope += share * (K - attached * means[k])
            gradient += v * (total_of(rests) - K * rests[k] + attached * through[k])
        slopes += (slope,)
        shares += (share,)
        gradients += (gradient,)

    zero = tl.zeros_like(exps[0])
    hardest = zero
    teacher_scale = zero
    expected_gap = zero
    gradients_at_h = at_h
    if HARDEST:
        mean = total_of(at_h) / K
        pivot = tl.maximum(tl.maximum(teacher_pivot, mean), teacher_target_logit)
        others = exp(teacher_pivot - pivot)
        q_at_h = exp(mean - pivot)
        q_at_y = exp(teacher_target_logit - pivot)
        t = teacher_exps * others + q_at_h + q_at_y
        gap_at_h = gap_of(mean, at_h)
        gap_at_y = K * (teacher_target_logit - student_target_logit)
        # E_q[Σ_k (r − ŝ_k's logit)]
        expected_gap = (teacher_gaps * others + q_at_h * gap_at_h + q_at_y * gap_at_y) / t
        hardest = expected_gap
        with_students = ()
        for k in tl.static_range(K):
            student_pivot = tl.maximum(pivots[k], student_target_logit)
            student_exps = exps[k] * exp(pivots[k] - student_pivot) + exp(student_target_logit - student_pivot)
            student_lse = (student_pivot - pivots[k]) + tl.log(student_exps)
            hardest -= (pivot - pivots[k]) + tl.log(t) - student_lse
            with_students += (slopes[k] + w * exp(-student_lse),)
        slopes = with_students
        teacher_pivot = pivot
        teacher_scale = w / t
        q = teacher_scale * q_at_h
        dr = attached * q * (gap_at_h - expected_gap)  # the mean at h hands its gradient to every expert
        x = ()
        common = q - dr / K
        for k in tl.static_range(K):
            x += (at_h[k] - pivots[k],)
            common += shares[k] * exp(x[k])
        apart = distances_of(x)
        gradients_at_h = ()
        for k in tl.static_range(K):
            gradients_at_h += (exp(x[k]) * (slopes[k] + attached * shares[k] * apart[k]) - common,)

    at = saved + row
    for i in tl.static_range(5):
        for k in tl.static_range(K):
            tl.store(at, (pivots, slopes, shares, gradients, gradients_at_h)[i][k], valid)
            at += rows
    tl.store(at, teacher_pivot, valid)
    tl.store(at + rows, teacher_scale, valid)
    tl.store(at + 2 * rows, expected_gap, valid)
    tl.store(at + 3 * rows, h, valid)

    values = (tl.where(valid, total_of(losses), 0.0),)
    values += (tl.where(valid, hardest, 0.0), tl.where(valid, total_of(divergence), 0.0))
    last, sums = add_rows(values, partials, ticket)
    if last:
        weights = (inverse_batch, w, v)
        total = tl.full((), 0.0, tl.float32)
        for i in tl.static_range(3):
            term = weights[i] * sums[i]
            tl.store(terms + i, term)
            total += term
        tl.store(loss, total)
