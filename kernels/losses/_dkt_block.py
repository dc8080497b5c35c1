"""What the DKT kernels do with the logits of a block of classes: the online sums of a row and their parts."""

import triton
import triton.language as tl

from shike_fast.kernels._common import multiple
from shike_fast.kernels.losses._rows import class_offset, exp, expert_offset, reduced

# Classes that take no part in a row (the target; the padding of a block) carry a finite logit far below the floor of
# every pivot: their exponential is exactly 0, and no ∞ − ∞ or 0 · ∞ arises. Real logits lie above both.
MASKED = tl.constexpr(-1e30)
FLOOR = tl.constexpr(-1e29)


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0, accurate for small x: the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def total_of(values):  # Σ_k values[k], the first two first: the order decides which class is the hardest negative
    total = values[0]
    for k in tl.static_range(1, len(values)):
        total = total + values[k]
    return total


@triton.jit
def strongest_of(z):  # K logits -> r
    r = z[0]
    for k in tl.static_range(1, len(z)):
        r = tl.maximum(r, z[k])
    return r


@triton.jit
def gap_of(r, z):  # Σ_k (r − z_k); not K r − Σ_k z_k, which cancels
    gap = r - z[0]
    for k in tl.static_range(1, len(z)):
        gap += r - z[k]
    return gap


@triton.jit
def logits_at(rows, offset, valid, other):  # K pointers to z_k[0] -> K logits of one class, or of a block of classes
    z = ()
    for k in tl.static_range(len(rows)):
        loaded = tl.load(rows[k] + offset, mask=valid).to(tl.float32)
        z += (tl.where(valid, loaded, other),)  # after the conversion: float16 cannot hold MASKED
    return z


@triton.jit
def expert_rows(logits, offsets, offset, ALIGN: tl.constexpr):  # K pointers to z_k[0] of one sample
    rows = ()
    for k in tl.static_range(len(offsets)):
        rows += (logits + multiple(expert_offset(offsets, k) + offset, ALIGN),)
    return rows


@triton.jit
def add_block(
    rows,  # K pointers to z_k[0]
    class_stride,
    classes,
    y,  # the target
    start,  # the first class of this block
    sums,  # the row so far: M_k, s_k, v_k; best S, h; Tm, Ts, Tg
    K: tl.constexpr,
    HARDEST: tl.constexpr,
    MUTUAL: tl.constexpr,
    FIRST: tl.constexpr,  # nothing came before this block
    BLOCK: tl.constexpr,
):
    """Add one block of classes to the sums of a row."""
    pivots, exps, divergences, best, h, teacher_pivot, teacher_exps, teacher_gaps = sums
    c = start + tl.arange(0, BLOCK)
    loaded = logits_at(rows, class_offset(c, class_stride), c < classes, MASKED)
    z = ()  # the target's left out
    for k in tl.static_range(K):
        z += (tl.where(c == y, MASKED, loaded[k]),)

    candidates = z
    if HARDEST:
        candidates += (total_of(z),)
    maxima = reduced(candidates, True)
    new_pivots = ()
    for k in tl.static_range(K):
        new_pivots += (tl.maximum(pivots[k], maxima[k]),)

    x = ()
    e = ()
    for k in tl.static_range(K):
        x += (z[k] - new_pivots[k],)
        e += (exp(x[k]),)
    addends = e
    if MUTUAL:
        x_total = total_of(x)
        for k in tl.static_range(K):
            addends += (e[k] * (K * x[k] - x_total),)
    if HARDEST:
        # The lowest class that attains the largest sum over experts. Clamped, because it is an address later on and
        # NaN logits equal no maximum.
        first = tl.min(tl.where(total_of(z) == maxima[K], c, classes - 1), 0)
        better = maxima[K] > best  # also in the first block: with two classes or more it holds one that is no target
        held_out = tl.where(better, first, -1)
        r = strongest_of(z)
        gap = gap_of(r, z)
        r = tl.where(c == held_out, MASKED, r)
        new_teacher_pivot = tl.maximum(teacher_pivot, tl.max(r, 0))
        if not FIRST:  # a better candidate sends the one so far into the sums
            at_h = logits_at(rows, class_offset(h, class_stride), better & (h >= 0), MASKED)
            released = strongest_of(at_h)
            released_gap = gap_of(released, at_h)
            new_teacher_pivot = tl.maximum(new_teacher_pivot, released)
        q = exp(r - new_teacher_pivot)
        addends += (q, q * gap)

    added = reduced(addends, False)
    new_exps = ()
    new_divergences = ()
    if FIRST:
        for k in tl.static_range(K):
            new_exps += (added[k],)
            new_divergences += (added[K + k] if MUTUAL else divergences[k],)
    else:
        delta = ()  # ≤ 0: how far each pivot moved
        for k in tl.static_range(K):
            delta += (pivots[k] - new_pivots[k],)
        delta_total = total_of(delta)
        for k in tl.static_range(K):
            factor = exp(delta[k])
            new_exps += (factor * exps[k] + added[k],)
            if MUTUAL:
                shifted = divergences[k] + exps[k] * (K * delta[k] - delta_total)
                new_divergences += (factor * shifted + added[K + k],)
            else:
                new_divergences += (divergences[k],)
    if HARDEST:
        at: tl.constexpr = 2 * K if MUTUAL else K
        if FIRST:
            teacher_exps, teacher_gaps = added[at], added[at + 1]
        else:
            factor = exp(teacher_pivot - new_teacher_pivot)
            released_exp = exp(released - new_teacher_pivot)
            teacher_exps = factor * teacher_exps + (added[at] + released_exp)
            teacher_gaps = factor * teacher_gaps + (added[at + 1] + released_exp * released_gap)
        teacher_pivot = new_teacher_pivot
        h = tl.where(better, first, h)
        best = tl.maximum(best, maxima[K])
    return new_pivots, new_exps, new_divergences, best, h, teacher_pivot, teacher_exps, teacher_gaps
