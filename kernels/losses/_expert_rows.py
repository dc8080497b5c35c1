"""The end of the generalised expert loss: a lane turns a row's sums into its losses and into the gradient's numbers.

The sums are of the classes that are no label. A label's exponential is added to them, never taken out: 1 − p[y] is the
sum of the others, to full relative precision, where p[y] rounds to 1. All formulas are in ``docs/kernels.md``.
"""

import triton
import triton.language as tl

from shike_fast.kernels.losses._batch import ROWS, add_rows
from shike_fast.kernels.losses._dkt_rows import log1p, total
from shike_fast.kernels.losses._rows import exp, kernel


@triton.jit
def _label(target, expert_stride, stride, expert, row, valid):  # [E, R] -> int64 [E, R]
    return tl.load(target + (expert * expert_stride + row * stride), valid, 0)


@triton.jit
def _weight(number, pointer, place, valid):
    """A number, or the entries of a tensor; 0 where there is no row."""
    return tl.where(valid, number if pointer is None else tl.load(pointer + place, valid, 0.0), 0.0)


@triton.jit
def _margin(margin, expert_stride, expert, y, classes, valid):
    inside = valid & (y >= 0) & (y < classes)
    return tl.load(margin + (expert * expert_stride + y), inside, 0.0)


@triton.jit
def _end_of(own, other, pivot, exps):
    """A label's end of the cross-entropy, from its logit with the margin and the other label's without.

    Returns:
        The loss; p at both labels, that of the label itself as 1 − p; the factor that turns exp(x − pivot) into p; and
        log Σ exp(x) in two parts, the largest logit and the rest.
    """
    top = tl.maximum(tl.maximum(pivot, own), other)
    scale = exp(pivot - top)
    at_other = exp(other - top)
    others = exps * scale + at_other
    sum_of_all = others + exp(own - top)
    log_sum = tl.log(sum_of_all)
    loss = tl.where(own >= top, log1p(others), log_sum + (top - own))
    return loss, others / sum_of_all, at_other / sum_of_all, scale / sum_of_all, top, log_sum


@triton.jit
def _probabilities(pivot, exps, first, second, LABELS: tl.constexpr):
    """A softmax of sums over the other classes and of up to two labels' logits; a label that is absent has −1e30.

    Returns:
        log Σ exp(d) in two parts, the largest logit and the rest; the factor that turns exp(d − pivot) into p; and of
        each label p, 1 − p and log p.
    """
    top = pivot
    if LABELS > 0:
        top = tl.maximum(top, first)
    if LABELS > 1:
        top = tl.maximum(top, second)
    scale = exp(pivot - top)
    rest = exps * scale
    zero = tl.zeros_like(rest)
    at_first = exp(first - top) if LABELS > 0 else zero
    at_second = exp(second - top) if LABELS > 1 else zero
    sum_of_all = rest + at_first + at_second
    log_sum = tl.log(sum_of_all)
    labels = (at_first / sum_of_all, (rest + at_second) / sum_of_all, zero)
    labels_2 = (at_second / sum_of_all, (rest + at_first) / sum_of_all, zero)
    if LABELS > 0:
        labels = labels[0], labels[1], tl.where(first >= top, -log1p(rest + at_second), (first - top) - log_sum)
    if LABELS > 1:
        labels_2 = labels_2[0], labels_2[1], tl.where(second >= top, -log1p(rest + at_first), (second - top) - log_sum)
    return top, log_sum, scale / sum_of_all, labels, labels_2


@kernel
def _end_kernel(
    left,  # float32 [columns, K, B]: what the forward leaves of a row
    saved,  # float32 [columns, K, B]: what the backward needs
    loss,  # float32 [], or [K, B] without a reduction
    terms,  # float32 [2]
    outputs,  # float32 [4, K, B], written if OUTPUTS
    partials,  # float32 [2, programs]
    ticket,  # int32 [], 0
    rows: tl.int32,
    experts: tl.int32,
    classes: tl.int32,
    target,  # int64 [B] or [K, B], or None
    target_expert_stride: tl.int64,
    target_stride: tl.int64,
    second,
    second_expert_stride: tl.int64,
    second_stride: tl.int64,
    margin,  # float32 [C] or [K, C], or None
    margin_expert_stride: tl.int64,
    lam,  # the first label's share in a row's loss, a number
    lams,  # or float32 [B]
    label_smoothing,
    images: tl.int32,  # of a view: how many rows teach; else 0
    first_weight,  # of the rows' cross-entropy, a number
    first_weights,  # or float32 [K, B]
    second_weight,
    second_weights,
    divergence_weight,
    divergence_weights,  # or float32 [K, B - images]
    students,  # `divergence_weights`, where they are those of students among experts, or None
    CROSS_ENTROPY: tl.constexpr,
    SHARED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    RANKED: tl.constexpr,
    GATED: tl.constexpr,
    TEACHER: tl.constexpr,
    ATTACHED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BY_ROW: tl.constexpr,  # without a reduction
    EXPERTS: tl.constexpr,  # 4 or 8, at least K
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :]
    expert = tl.arange(0, EXPERTS)[:, None].to(tl.int64)
    valid = (row < rows) & (expert < experts)  # numbers of others are 0, and so is what they add to a sum
    place = expert * rows + row
    step = experts.to(tl.int64) * rows
    left += place
    saved += place
    zero = tl.zeros([EXPERTS, ROWS], tl.float32)
    LABELS: tl.constexpr = 0 if target is None else 1 if second is None else 2
    if LABELS > 0:
        y = _label(target, target_expert_stride, target_stride, expert, row, valid)
    if LABELS > 1:
        y2 = _label(second, second_expert_stride, second_stride, expert, row, valid)
        apart = y != y2  # else there is one label, with both weights

    pivots = zero
    exps = zero
    of_mean = zero
    correct = zero
    x_y = zero
    x_y2 = tl.full([EXPERTS, ROWS], -float("inf"), tl.float32)
    if CROSS_ENTROPY and not SHARED:
        pivots = tl.load(left, valid, 0.0)
        exps = tl.load(left + step, valid, 1.0)
        left += 2 * step
    if SMOOTHING:
        of_mean = tl.load(left, valid, 0.0)
        left += step
    if RANKED:
        correct = 1.0 - tl.load(left, valid, 0.0)
        left += step
    if CROSS_ENTROPY:
        x_y = tl.load(left, valid, 0.0)
        left += step
        if LABELS > 1:
            x_y2 = tl.where(apart, tl.load(left, valid, 0.0), x_y2)
            left += step
    if TEACHER != "":
        d_pivots = tl.load(left, valid, 0.0)
        d_exps = tl.load(left + step, valid, 1.0)
        crosses = tl.load(left + 2 * step, valid, 0.0)
        left += 3 * step
        if SHARED:
            pivots = d_pivots
            exps = d_exps
        absent = tl.full([EXPERTS, ROWS], -1e30, tl.float32)
        d_y = absent
        d_y2 = absent
        u_y = absent
        u_y2 = absent
        if TEACHER != "others":
            u_pivots = tl.load(left, valid, 0.0)
            u_exps = tl.load(left + step, valid, 1.0)
            left += 2 * step
        if LABELS > 0:
            d_y = tl.load(left, valid, 0.0)
            left += step
            if TEACHER != "others":
                u_y = tl.load(left, valid, 0.0)
                left += step
        if LABELS > 1:
            d_y2 = tl.where(apart, tl.load(left, valid, 0.0), absent)
            left += step
            if TEACHER != "others":
                u_y2 = tl.where(apart, tl.load(left, valid, 0.0), absent)

    # The cross-entropy: its rows, and its numbers of the gradient with respect to x.
    losses = zero
    slopes = zero
    constants = zero
    at_y = zero
    at_y2 = zero
    if CROSS_ENTROPY:
        w = _weight(first_weight, first_weights, place, valid)
        own = x_y
        margin_y = zero
        if margin is not None:
            margin_y = _margin(margin, margin_expert_stride, expert, y, classes, valid)
            own -= margin_y
        row_losses, rest, p_other, slope, top, log_sum = _end_of(own, x_y2, pivots, exps)
        if SMOOTHING:
            reference = tl.where(tl.abs(x_y) < float("inf"), x_y, 0.0)  # as in the forward
            uniform = (top - reference) + (log_sum - (of_mean - margin_y / classes))
            row_losses = (1.0 - label_smoothing) * row_losses + label_smoothing * uniform
        smoothed = label_smoothing / classes if SMOOTHING else 0.0
        at_own = (label_smoothing - smoothed) - rest if SMOOTHING else -rest
        unweighted = row_losses
        if LABELS > 1:
            w2 = _weight(second_weight, second_weights, place, valid)
            w += tl.where(apart, 0.0, w2)
            w2 = tl.where(apart, w2, 0.0)
            own2 = tl.where(apart, x_y2, x_y)
            margin_y2 = zero
            if margin is not None:
                margin_y2 = _margin(margin, margin_expert_stride, expert, y2, classes, valid)
                own2 -= margin_y2
            other2 = tl.where(apart, x_y, -float("inf"))
            row_losses2, rest2, p_other2, slope2, top, log_sum = _end_of(own2, other2, pivots, exps)
            if SMOOTHING:
                uniform = (top - reference) + (log_sum - (of_mean - margin_y2 / classes))
                row_losses2 = (1.0 - label_smoothing) * row_losses2 + label_smoothing * uniform
            at_own2 = (label_smoothing - smoothed) - rest2 if SMOOTHING else -rest2
            losses = tl.where(apart, w2 * row_losses2, 0.0)
            slopes = w2 * slope2
            at_y = w2 * (p_other2 - smoothed)
            at_y2 = w2 * at_own2 + w * (p_other - smoothed)
            constants = w2 * smoothed
            if OUTPUTS:
                share = lam if lams is None else tl.load(lams + row, row < rows, 0.0)
                unweighted = share * row_losses + (1.0 - share) * row_losses2
        losses += w * row_losses
        slopes += w * slope
        at_y += w * at_own
        constants += w * smoothed
        losses = tl.where(valid, losses, 0.0)
        if BY_ROW:
            tl.store(loss + place, losses, valid)
        if OUTPUTS:
            loss_of_y, _, _, _, top, log_sum = _end_of(x_y, x_y2, pivots, exps)  # without the margin
            tl.store(outputs + place, unweighted, valid)
            tl.store(outputs + (step + place), top + log_sum, valid)
            tl.store(outputs + (2 * step + place), correct, valid)
            tl.store(outputs + (3 * step + place), exp(-loss_of_y), valid)
        if not SHARED:
            tl.store(saved, pivots, valid)
            tl.store(saved + step, slopes, valid)
            saved += 2 * step
        if SMOOTHING:
            tl.store(saved, constants, valid)
            saved += step

    # The divergence, with respect to d.
    divergences = zero
    d_at_y = zero
    d_at_y2 = zero
    if TEACHER != "":
        taught = valid & (row >= images)
        w = _weight(divergence_weight, divergence_weights, expert * (rows - images) + (row - images), taught)
        if GATED:
            w *= correct
        top, log_sum, scale, of_y, of_y2 = _probabilities(d_pivots, d_exps, d_y, d_y2, LABELS)
        p_y, q_y, r_y = of_y
        p_y2, q_y2, r_y2 = of_y2
        scale = tl.where(valid, scale, 0.0)
        log_sums = tl.where(valid, log_sum + (top - d_pivots), 0.0)
        if TEACHER == "others":
            v = tl.where(valid, 1.0, 0.0)
            if students is not None:
                v = w
                w = tl.where(valid, 1.0, 0.0)
            whole = total(v)
            off = tl.where(valid, whole * log_sums - total(v * log_sums), 0.0)
            divergences = scale * (crosses - d_exps * off)
            shares = w * scale
            teachers = total(w)
            if LABELS > 0:
                apart_y = tl.where(valid, whole * r_y - total(v * tl.where(valid, r_y, 0.0)), 0.0)
                divergences += p_y * apart_y
                d_at_y = v * (total(w * tl.where(valid, q_y, 0.0)) - teachers * q_y)
            if LABELS > 1:
                apart_y2 = tl.where(valid & apart, whole * r_y2 - total(v * tl.where(valid & apart, r_y2, 0.0)), 0.0)
                divergences += p_y2 * apart_y2
                d_at_y2 = v * (total(w * tl.where(valid, q_y2, 0.0)) - teachers * q_y2)
            divergences = tl.where(valid, divergences, 0.0)
            d_slopes = scale * (v * teachers)
            if ATTACHED:
                d_slopes -= shares * (off + divergences)
                if LABELS > 0:
                    d_at_y += w * p_y * (apart_y - divergences)
                if LABELS > 1:
                    d_at_y2 += w * p_y2 * (apart_y2 - divergences)
            others = shares
        else:
            u_top, u_log_sum, u_scale, of_y, of_y2 = _probabilities(u_pivots, u_exps, u_y, u_y2, LABELS)
            t_y, n_y, s_y = of_y
            t_y2, n_y2, s_y2 = of_y2
            off = (u_log_sum + (u_top - u_pivots)) - log_sums
            divergences = u_scale * (crosses - u_exps * off)
            d_slopes = w * scale
            others = w * u_scale
            if LABELS > 0:
                divergences += t_y * (s_y - r_y)
                d_at_y = w * (n_y - q_y)
            if LABELS > 1:
                divergences += tl.where(apart, t_y2 * (s_y2 - r_y2), 0.0)
                d_at_y2 = w * (n_y2 - q_y2)
        divergences = tl.where(taught, w * divergences, 0.0)

    if CROSS_ENTROPY:
        tl.store(saved, at_y + d_at_y if SHARED else at_y, valid)
        saved += step
        if LABELS > 1:
            tl.store(saved, at_y2 + d_at_y2 if SHARED else at_y2, valid)
            saved += step
    if TEACHER != "":
        tl.store(saved, d_pivots, valid)
        tl.store(saved + step, slopes + d_slopes if SHARED else d_slopes, valid)
        tl.store(saved + 2 * step, others, valid)
        saved += 3 * step
        if TEACHER == "others":
            if ATTACHED:
                tl.store(saved, shares, valid)
                saved += step
            if students is not None:
                tl.store(saved, v, valid)
                saved += step
        else:
            tl.store(saved, u_pivots, valid)
            saved += step
        if not SHARED:
            if LABELS > 0:
                tl.store(saved, d_at_y, valid)
            if LABELS > 1:
                tl.store(saved + step, d_at_y2, valid)

    last, sums = add_rows((tl.sum(losses, 0), tl.sum(divergences, 0)), partials, ticket)
    if last:
        tl.store(terms, sums[0])
        tl.store(terms + 1, sums[1])
        if not BY_ROW:
            tl.store(loss, sums[0] + sums[1])
