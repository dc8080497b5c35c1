"""What the DKT kernels do with classes: the sums of a row, kept by each lane for its own classes and joined at the end.

A lane's state is, of the classes it has seen, the largest logit M of all experts, Σ e_k and Σ e_k d_k of each expert
with e_k = exp(z_k − M) and d_k = Σ_i (z_k − z_i), and the teacher's Σ q and Σ q · gap with q = max_k e_k and
gap = max_k d_k. One pivot M for all experts makes a rescaling one factor, since d_k does not depend on it. The classes
that a lane takes at once are a chunk. The chunk with the largest Σ_k z_k of any class so far is held out of the
teacher's sums until the row ends, because there is nothing to subtract without cancellation.
"""

import triton
import triton.language as tl

from shike_fast.kernels.losses._rows import LN2, LOG2E, class_offset, reduced, times

# Classes that take no part in a row (the target; what lies beyond its end) carry a finite logit far below the floor of
# every pivot: their exponential is exactly 0, and no ∞ − ∞ or 0 · ∞ arises. Real logits lie above both.
MASKED = tl.constexpr(-1e30)
FLOOR = tl.constexpr(-1e29)
# Below this a sum has lost too many terms to the smallest float: the row is done again with a pivot for each expert.
SMALLEST = tl.constexpr(2.0**-80)


@triton.jit
def total_of(values):  # Σ_k values[k], the first two first: the order decides which class is the hardest negative
    total = values[0]
    for k in tl.static_range(1, len(values)):
        total = total + values[k]
    return total


@triton.jit
def largest_of(values):
    largest = values[0]
    for k in tl.static_range(1, len(values)):
        largest = tl.maximum(largest, values[k])
    return largest


@triton.jit
def gap_of(r, z):  # Σ_k (r − z_k); not K r − Σ_k z_k, which cancels
    gap = r - z[0]
    for k in tl.static_range(1, len(z)):
        gap += r - z[k]
    return gap


@triton.jit
def distances_of(z):  # K logits -> K times d_k = Σ_i (z_k − z_i), from differences: a common offset costs no digit
    apart = ()
    for k in tl.static_range(1, len(z)):
        apart += (z[k] - z[0],)
    distances = (tl.zeros_like(z[0]),)
    if len(z) > 1:
        total = total_of(apart)
        distances = (-total,)
        for k in tl.static_range(len(z) - 1):
            distances += (len(z) * apart[k] - total,)
    return distances


@triton.jit
def logits_at(rows, offset, valid, other):  # K pointers to z_k[0] -> K logits of one class, or of some classes
    z = ()
    for k in tl.static_range(len(rows)):
        loaded = tl.load(rows[k] + offset, mask=valid).to(tl.float32)
        z += (tl.where(valid, loaded, other),)  # after the conversion: float16 cannot hold MASKED
    return z


@triton.jit
def chunks_at(chunks, offset, class_stride, VECTOR: tl.constexpr):
    """The logits [LANES, VECTOR] of each expert, from pointers to its first whole chunk and each lane's offset."""
    c = offset[:, None] + tl.arange(0, VECTOR)[None, :]
    z = ()
    for k in tl.static_range(len(chunks)):
        z += (tl.load(chunks[k] + class_offset(c, class_stride)).to(tl.float32),)
    return z


@triton.jit
def masked(z, valid):
    kept = ()
    for k in tl.static_range(len(z)):
        kept += (tl.where(valid, z[k], MASKED),)
    return kept


@triton.jit
def parts_of(z, pivot, HARDEST: tl.constexpr, MUTUAL: tl.constexpr):
    """Of each class what the sums take: e_k, e_k d_k, and of the teacher q and q · gap. The pivot is in powers of 2."""
    e = ()
    for k in tl.static_range(len(z)):
        e += (tl.exp2(tl.fma(z[k], LOG2E, -pivot)),)
    parts = e
    if MUTUAL or HARDEST:
        distances = distances_of(z)
    if MUTUAL:
        for k in tl.static_range(len(z)):
            parts += (e[k] * distances[k],)
    if HARDEST:
        q = largest_of(e)
        parts += (q, q * largest_of(distances))
    return parts


@triton.jit
def first_state(z, c, valid, HARDEST: tl.constexpr, MUTUAL: tl.constexpr):
    """The state of lanes that have seen one class c each, or none; it is held out."""
    pivot = tl.maximum(largest_of(z) * LOG2E, FLOOR)  # not a bare product, which differences would take in unrounded
    sums = parts_of(z, pivot, HARDEST, MUTUAL)
    zero = tl.zeros_like(pivot)
    nothing = (zero, zero)
    held = nothing
    if HARDEST:
        held = sums[len(sums) - 2 :]
        sums = sums[: len(sums) - 2] + nothing
    best = tl.where(valid, total_of(z), -float("inf"))
    return pivot, sums, held, best, tl.where(valid, c, 0)


@triton.jit
def add_chunks(z, start, state, HARDEST: tl.constexpr, MUTUAL: tl.constexpr):
    """Add to each lane's state the logits [LANES, VECTOR] of its next chunk, whose first class is ``start``."""
    pivot, sums, held, best, held_start = state
    new_pivot = tl.maximum(pivot, tl.max(largest_of(z), 1) * LOG2E)
    parts = parts_of(z, new_pivot[:, None], HARDEST, MUTUAL)
    factor = tl.exp2(pivot - new_pivot)
    new_sums = ()
    students: tl.constexpr = len(parts) - 2 if HARDEST else len(parts)
    for i in tl.static_range(students):
        new_sums += (sums[i] * factor + tl.sum(parts[i], 1),)
    if HARDEST:
        largest_total = tl.max(total_of(z), 1)
        better = (largest_total > best) | ((largest_total == best) & (start < held_start))
        new_held = ()
        for i in tl.static_range(2):
            added = tl.sum(parts[students + i], 1)
            kept = held[i] * factor
            new_sums += (sums[students + i] * factor + tl.where(better, kept, added),)
            new_held += (tl.where(better, added, kept),)
        held = new_held
        best = tl.where(better, largest_total, best)
        held_start = tl.where(better, start, held_start)
    return new_pivot, new_sums, held, best, held_start


@triton.jit
def _better_of(pivot, best, start, other_pivot, other_best, other_start):
    other = (other_best > best) | ((other_best == best) & (other_start < start))
    return tl.maximum(pivot, other_pivot), tl.where(other, other_best, best), tl.where(other, other_start, start)


@triton.jit
def joined_lanes(state, HARDEST: tl.constexpr):
    """Join the lanes' states in two reductions: maxima, then sums. The best chunk of all remains held out.

    Returns the row's M, now as a logit, the sums relative to it, and the best chunk's largest Σ_k z_k and first class.
    """
    pivot, sums, held, best, start = state
    if HARDEST:
        largest, largest_total, held_start = tl.reduce((pivot, best, start), 0, _better_of)
        students: tl.constexpr = len(sums) - 2
        addends = sums[:students]
        for i in tl.static_range(2):
            addends += (sums[students + i] + tl.where(start == held_start, 0.0, held[i]),)
    else:
        largest, largest_total, held_start = tl.max(pivot, 0), 0.0, -1
        addends = sums
    logit = largest * LN2
    scale = tl.exp2((pivot - largest) - tl.fma(logit, LOG2E, -largest))  # the second difference: what was rounded
    scaled = ()
    for i in tl.static_range(len(addends)):
        scaled += (times(addends[i], scale),)
    return logit, reduced(scaled, False), largest_total, held_start
