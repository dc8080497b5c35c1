"""The forward kernel of the generalised expert loss: a program streams the logits of a row, all experts' together.

The labels are left out of all sums and added at the end of the row. Each lane keeps, of the classes it has seen,

    cross-entropy:  M_k = max x_k,  Σ exp(x_k − M_k)
    divergence:     M_k = max d_k,  Σ f_k with f_k = exp(d_k − M_k), and M, Σ f of each teacher alike
    cross:          Σ f_k D_k, D_k = Σ_i v_i (x_k − x_i) with x_k = d_k − M_k here, among experts;
                    Σ f_teacher (x_teacher − x_k) with teachers

Each expert has its own pivot, and differences are taken relative to them, so that experts with a distance between them
lose nothing. Where d = x the cross-entropy takes the divergence's sums.
"""

import triton
import triton.language as tl

from shike_fast.kernels.losses._dkt_block import FLOOR, MASKED
from shike_fast.kernels.losses._expert_logits import (
    chunks_of,
    labels_at,
    numbers_of,
    sources_of,
    touches,
    values_at,
    weighted_distances,
)
from shike_fast.kernels.losses._rows import (
    ahead_of_chunks,
    before_chunks,
    class_offset,
    edge_classes,
    exp,
    kernel,
    reduced,
    times,
)

# Where the pivots of x start, which −∞ does not lower: no −∞ − −∞ arises. Divergence logits are MASKED at least.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _left_out(values, c, valid, labels, second, other):
    """The values of classes that are valid and no label; ``other`` in place of the rest."""
    kept = ()
    for k in tl.static_range(len(values)):
        here = valid
        if len(labels) > 0:
            here = here & (c != labels[k % len(labels)])
        if len(second) > 0:
            here = here & (c != second[k % len(second)])
        kept += (tl.where(here, values[k], other),)
    return kept


@triton.jit
def _lane_max(block):
    return tl.max(tl.max(block, 2), 0)


@triton.jit
def _lane_sum(block):
    return tl.sum(tl.sum(block, 2), 0)


@triton.jit
def _filled(count: tl.constexpr, value, LANES: tl.constexpr):
    """The same number in every lane, ``count`` times."""
    lanes = ()
    for _ in tl.static_range(count):
        lanes += (tl.full([LANES], value, tl.float32),)
    return lanes


@triton.jit
def _add_cross_entropy(x, pivots, exps):
    new_pivots = ()
    new_exps = ()
    for k in tl.static_range(len(x)):
        pivot = tl.maximum(pivots[k], _lane_max(x[k]))
        new_pivots += (pivot,)
        new_exps += (exps[k] * exp(pivots[k] - pivot) + _lane_sum(exp(x[k] - pivot[None, :, None])),)
    return new_pivots, new_exps


@triton.jit
def _moved(divergence, new_pivots, new_teacher_pivots, weights):
    """The divergence's sums relative to other pivots: all f get one factor, all differences in a cross one addend."""
    pivots, exps, crosses, teacher_pivots, teacher_exps = divergence
    moves = ()
    for k in tl.static_range(len(pivots)):
        moves += (pivots[k] - new_pivots[k],)
    teacher_moves = ()
    moved_teacher_exps = ()
    for k in tl.static_range(len(teacher_pivots)):
        teacher_moves += (teacher_pivots[k] - new_teacher_pivots[k],)
        moved_teacher_exps += (times(teacher_exps[k], exp(teacher_moves[k])),)
    moved_exps = ()
    moved_crosses = ()
    if len(pivots) > 0 and len(teacher_pivots) == 0:
        apart = weighted_distances(moves, weights)
    for k in tl.static_range(len(pivots)):
        factor = exp(moves[k])
        moved_exps += (times(exps[k], factor),)
        if len(teacher_pivots) == 0:
            moved_crosses += (times(crosses[k] + exps[k] * apart[k], factor),)
        else:
            drift = teacher_exps[k % len(teacher_pivots)] * (teacher_moves[k % len(teacher_pivots)] - moves[k])
            moved_crosses += (times(crosses[k] + drift, exp(teacher_moves[k % len(teacher_pivots)])),)
    return new_pivots, moved_exps, moved_crosses, new_teacher_pivots, moved_teacher_exps


@triton.jit
def _add_divergence(d, u, weights, divergence):
    old_pivots, _, _, old_teacher_pivots, _ = divergence
    new_pivots = ()
    x = ()
    for k in tl.static_range(len(d)):
        new_pivots += (tl.maximum(old_pivots[k], _lane_max(d[k])),)
        x += (d[k] - new_pivots[k][None, :, None],)
    new_teacher_pivots = ()
    t = ()
    for k in tl.static_range(len(u)):
        new_teacher_pivots += (tl.maximum(old_teacher_pivots[k], _lane_max(u[k])),)
        t += (u[k] - new_teacher_pivots[k][None, :, None],)
    pivots, exps, crosses, teacher_pivots, teacher_exps = _moved(divergence, new_pivots, new_teacher_pivots, weights)
    new_exps = ()
    new_crosses = ()
    new_teacher_exps = ()
    e = ()
    for k in tl.static_range(len(u)):
        e += (exp(t[k]),)
        new_teacher_exps += (teacher_exps[k] + _lane_sum(e[k]),)
    if len(d) > 0 and len(u) == 0:
        apart = weighted_distances(x, weights)
    for k in tl.static_range(len(d)):
        f = exp(x[k])
        new_exps += (exps[k] + _lane_sum(f),)
        if len(u) == 0:
            new_crosses += (crosses[k] + _lane_sum(f * apart[k]),)
        else:
            new_crosses += (crosses[k] + _lane_sum(e[k % len(u)] * (t[k % len(u)] - x[k])),)
    return pivots, new_exps, new_crosses, teacher_pivots, new_teacher_exps


@triton.jit
def _add_distances(x, valid, reference, distances):
    """Σ (x − reference) over all classes, for label smoothing."""
    new_distances = ()
    for k in tl.static_range(len(distances)):
        new_distances += (distances[k] + _lane_sum(tl.where(valid, x[k] - reference[k], 0.0)),)
    return new_distances


@triton.jit
def _add_beaten(x, c, valid, labels, at_label, beaten):
    """1 where a class beats the label: its logit is larger, or as large and the class lower."""
    new_beaten = ()
    for k in tl.static_range(len(beaten)):
        y = labels[k % len(labels)]
        better = ((c < y) & (x[k] >= at_label[k])) | ((c > y) & (x[k] > at_label[k]))
        new_beaten += (tl.maximum(beaten[k], _lane_max(tl.where(valid & better, 1.0, 0.0))),)
    return new_beaten


@triton.jit
def _joined_lanes(pivots, exps, distances, beaten, divergence, weights):
    """The same of the whole row: all maxima in one reduction, sums in one for each of the two losses."""
    d_pivots, _, _, teacher_pivots, _ = divergence
    maxima = reduced(pivots + d_pivots + teacher_pivots + beaten, True)
    row_pivots = maxima[: len(pivots)]
    maxima = maxima[len(pivots) :]
    row_d_pivots = maxima[: len(d_pivots)]
    maxima = maxima[len(d_pivots) :]
    row_teacher_pivots = maxima[: len(teacher_pivots)]
    row_beaten = maxima[len(teacher_pivots) : len(teacher_pivots) + len(beaten)]  # padding may follow
    addends = ()
    for k in tl.static_range(len(exps)):
        addends += (times(exps[k], exp(pivots[k] - row_pivots[k])),)
    addends += distances
    sums = reduced(addends, False) if len(addends) > 0 else ()
    row_exps = sums[: len(exps)]
    row_distances = sums[len(exps) : len(exps) + len(distances)]
    row_divergence = divergence
    K: tl.constexpr = len(d_pivots)
    if K > 0:
        _, moved_exps, moved_crosses, _, moved_teacher_exps = _moved(
            divergence, row_d_pivots, row_teacher_pivots, weights
        )
        sums = reduced(moved_exps + moved_crosses + moved_teacher_exps, False)
        row_divergence = (
            row_d_pivots,
            sums[:K],
            sums[K : 2 * K],
            row_teacher_pivots,
            sums[2 * K : 2 * K + len(teacher_pivots)],
        )
    return row_pivots, row_exps, row_distances, row_beaten, row_divergence


@triton.jit
def _at_labels(
    labels,
    sources,
    class_stride,
    teacher_class_stride,
    scale,
    inverse_temperature,
    K: tl.constexpr,
    TEACHER: tl.constexpr,
    ADJUSTED: tl.constexpr,
    EXCLUDE: tl.constexpr,
):
    """x_k, d_k and u at the labels, NaN where a label is out of range, so that it shows; none without labels."""
    x = ()
    d = ()
    u = ()
    for i in tl.static_range(len(labels)):
        y = labels[i]
        at_x, at_d, at_u = values_at(
            sources,
            y,
            y >= 0,
            class_stride,
            teacher_class_stride,
            scale,
            inverse_temperature,
            TEACHER,
            ADJUSTED,
            EXCLUDE,
        )[:3]
        if len(labels) == 1:
            for k in tl.static_range(K):
                x += (tl.where(y >= 0, at_x[k], float("nan")),)
            for k in tl.static_range(len(at_d)):
                d += (tl.where(y >= 0, at_d[k], float("nan")),)
            u = at_u
        else:
            x += (tl.where(y >= 0, at_x[i], float("nan")),)
    return x, d, u


@triton.jit
def _store(left, batch, numbers, count: tl.constexpr):
    """A number of each of ``count`` experts, or one for all; returns where the next column begins."""
    for k in tl.static_range(count):
        tl.store(left + k * batch, numbers[k % len(numbers)])
    return left + count * batch


@kernel
def _forward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    offsets,
    row_stride: tl.int64,
    class_stride,
    classes: tl.int32,
    target,  # int64 [B], [K, B] or None
    target_expert_stride,  # None: of [B]
    target_stride: tl.int64,
    second,  # the second label, alike
    second_expert_stride,
    second_stride: tl.int64,
    scale,  # a number, or None for 1
    scales,  # float32 [C], [K, C] or None
    scale_expert_stride,  # None: of [C]
    bias,  # float32 [C], [K, C] or None
    bias_expert_stride,
    mask,  # uint8 [B, C] or None
    inverse_temperature,  # a number, or None for 1
    inverse_temperatures,  # float32 [C] or None
    teacher,  # [B, C], [K, B, C] or None
    teacher_expert_stride: tl.int64,
    teacher_row_stride: tl.int64,
    teacher_class_stride,
    images: tl.int32,  # of a view
    students,  # float32 [K, B] or None: the weights v
    left,  # float32 [columns, K, B]
    ticket,  # int32 []
    K: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SHARED: tl.constexpr,  # d = x: one exponential serves both losses
    SMOOTHING: tl.constexpr,
    RANKED: tl.constexpr,  # whether the answers are right is wanted
    TEACHER: tl.constexpr,  # "", "others", "mean", "given", "view"
    TEACHERS: tl.constexpr,  # how many logits of teachers a class has
    ADJUSTED: tl.constexpr,
    EXCLUDE: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,  # start at the beginning of a sector
):
    row = tl.program_id(0).to(tl.int64)
    batch = tl.num_programs(0)
    sources = sources_of(
        row,
        logits,
        offsets,
        row_stride,
        classes,
        scales,
        scale_expert_stride,
        bias,
        bias_expert_stride,
        mask,
        inverse_temperatures,
        teacher,
        teacher_expert_stride,
        teacher_row_stride,
        images,
        K,
        TEACHER,
        TEACHERS,
    )
    first = sources[0][0]
    before = before_chunks(first, VECTOR)
    count = (classes - before) // VECTOR  # of whole chunks, at least one
    chunks = chunks_of(sources, before, class_stride, teacher_class_stride, VECTOR)
    ahead = ahead_of_chunks(first + class_offset(before, class_stride), VECTOR) if AHEAD else 0

    y = labels_at(target, target_expert_stride, row * target_stride, classes, K)
    y2 = labels_at(second, second_expert_stride, row * second_stride, classes, K)
    x_y, d_y, u_y = _at_labels(
        y, sources, class_stride, teacher_class_stride, scale, inverse_temperature, K, TEACHER, ADJUSTED, EXCLUDE
    )
    x_y2, d_y2, u_y2 = _at_labels(
        y2, sources, class_stride, teacher_class_stride, scale, inverse_temperature, K, TEACHER, ADJUSTED, EXCLUDE
    )
    reference = ()  # of the distances whose mean label smoothing wants; near the pivots, so that little is rounded
    if SMOOTHING:
        for k in tl.static_range(K):
            reference += (tl.where(tl.abs(x_y[k]) < float("inf"), x_y[k], 0.0),)
    weights = ()
    if students is not None:
        weights = numbers_of(students + row, batch, (), K)

    own: tl.constexpr = K if CROSS_ENTROPY and not SHARED else 0
    shared: tl.constexpr = K if TEACHER != "" else 0
    pivots = _filled(own, _LOWEST, LANES)
    exps = _filled(own, 0.0, LANES)
    distances = _filled(K if SMOOTHING else 0, 0.0, LANES)
    beaten = _filled(K if RANKED else 0, 0.0, LANES)
    zeros = _filled(shared, 0.0, LANES)
    divergence = (
        _filled(shared, FLOOR, LANES),
        zeros,
        zeros,
        _filled(TEACHERS, FLOOR, LANES),
        _filled(TEACHERS, 0.0, LANES),
    )
    if VECTOR > 1:
        edge = edge_classes(tl.arange(0, LANES), before, count, VECTOR)[None, :, None]
        edge_x, edge_d, edge_u = values_at(
            sources,
            edge,
            edge < classes,
            class_stride,
            teacher_class_stride,
            scale,
            inverse_temperature,
            TEACHER,
            ADJUSTED,
            EXCLUDE,
        )[:3]
        distances = _add_distances(edge_x, edge < classes, reference, distances)
        beaten = _add_beaten(edge_x, edge, edge < classes, y, x_y, beaten)
        pivots, exps = _add_cross_entropy(
            _left_out(edge_x[:own], edge, edge < classes, y, y2, -float("inf")), pivots, exps
        )
        edge_d = _left_out(edge_d, edge, edge < classes, y, y2, MASKED)
        edge_u = _left_out(edge_u, edge, edge < classes, y, y2, MASKED)
        divergence = _add_divergence(edge_d, edge_u, weights, divergence)
    for i in range(0, STEPS):
        # Lanes outside of the row read the nearest chunk, so that no mask is needed, and leave it out.
        chunk = (i * UNROLL + tl.arange(0, UNROLL))[:, None] * LANES + tl.arange(0, LANES)[None, :] - ahead
        inside = ((chunk >= 0) & (chunk < count))[:, :, None]
        c = (tl.minimum(tl.maximum(chunk, 0), count - 1) * VECTOR)[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
        x, d, u = values_at(
            chunks,
            c,
            None,
            class_stride,
            teacher_class_stride,
            scale,
            inverse_temperature,
            TEACHER,
            ADJUSTED,
            EXCLUDE,
        )[:3]
        distances = _add_distances(x, inside, reference, distances)
        beaten = _add_beaten(x, before + c, inside, y, x_y, beaten)
        x = x[:own]
        start = before + (i * UNROLL * LANES - ahead) * VECTOR
        rare = touches(y, start, UNROLL * LANES * VECTOR) | touches(y2, start, UNROLL * LANES * VECTOR)
        if (i == 0) | (i == STEPS - 1) | rare:
            x = _left_out(x, before + c, inside, y, y2, -float("inf"))
            d = _left_out(d, before + c, inside, y, y2, MASKED)
            u = _left_out(u, before + c, inside, y, y2, MASKED)
        pivots, exps = _add_cross_entropy(x, pivots, exps)
        divergence = _add_divergence(d, u, weights, divergence)

    pivots, exps, distances, beaten, divergence = _joined_lanes(pivots, exps, distances, beaten, divergence, weights)
    d_pivots, d_exps, crosses, teacher_pivots, teacher_exps = divergence
    left += row
    if own > 0:
        left = _store(left, batch, pivots, K)
        left = _store(left, batch, exps, K)
    if SMOOTHING:
        of_mean = ()
        for k in tl.static_range(K):
            of_mean += (distances[k] / classes,)
        left = _store(left, batch, of_mean, K)
    if RANKED:
        left = _store(left, batch, beaten, K)
    if CROSS_ENTROPY:
        left = _store(left, batch, x_y, K)
        if second is not None:
            left = _store(left, batch, x_y2, K)
    if TEACHER != "":
        left = _store(left, batch, d_pivots, K)
        left = _store(left, batch, d_exps, K)
        left = _store(left, batch, crosses, K)
        if TEACHERS > 0:
            left = _store(left, batch, teacher_pivots, K)
            left = _store(left, batch, teacher_exps, K)
        if target is not None:
            left = _store(left, batch, d_y, K)
            if TEACHERS > 0:
                left = _store(left, batch, u_y, K)
        if second is not None:
            left = _store(left, batch, d_y2, K)
            if TEACHERS > 0:
                left = _store(left, batch, u_y2, K)
    tl.store(ticket, 0, mask=row == 0)
