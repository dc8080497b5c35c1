"""The backward kernel of the generalised expert loss: element-wise, from the numbers of a row that are saved."""

import triton
import triton.language as tl

from shike_fast.kernels.losses._dkt_block import total_of
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
    first_chunk,
    kernel,
)


@triton.jit
def _gradients_of_x(x, pivots, slopes, constants):
    gradients = ()
    for k in tl.static_range(len(pivots)):
        gradient = exp(x[k] - pivots[k]) * slopes[k]
        gradients += (gradient - constants[k] if len(constants) > 0 else gradient,)
    return gradients


@triton.jit
def _gradients_of_d(d, u, numbers, constants):
    """With respect to d_k; where d = x with the cross-entropy's slopes in theirs, and its constants."""
    pivots, slopes, shares, bends, weights, teacher_pivots, teacher_slopes = numbers
    x = ()
    f = ()
    for k in tl.static_range(len(pivots)):
        x += (d[k] - pivots[k],)
        f += (exp(x[k]),)
    t = ()
    for j in tl.static_range(len(u)):
        t += (exp(u[j] - teacher_pivots[j]),)
    if len(bends) > 0:
        apart = weighted_distances(x, weights)
    products = ()
    for k in tl.static_range(len(shares)):
        products += (shares[k] * f[k],)
    if len(shares) > 0:
        common = total_of(products)  # what all experts' gradients have in common
    gradients = ()
    for k in tl.static_range(len(pivots)):
        gradient = f[k] * (slopes[k] + bends[k] * apart[k] if len(bends) > 0 else slopes[k])
        if len(shares) > 0:
            gradient -= weights[k] * common if len(weights) > 0 else common
        else:
            gradient -= teacher_slopes[k] * t[k % len(t)]
        gradients += (gradient - constants[k] if len(constants) > 0 else gradient,)
    return gradients


@triton.jit
def _corrected(gradients, c, labels, finished):
    """The gradients with the finished ones at the labels; without finished ones as they are."""
    results = ()
    for k in tl.static_range(len(gradients)):
        if len(finished) > 0:
            results += (tl.where(c == labels[k % len(labels)], finished[k], gradients[k]),)
        else:
            results += (gradients[k],)
    return results


@triton.jit
def _gradients_of_z(of_x, of_d, scales, temperatures, kept, ADJUSTED: tl.constexpr):
    """The chain rule; numbers that all classes share are in the gradients already."""
    gradients = ()
    for k in tl.static_range(len(of_x) if len(of_x) > 0 else len(of_d)):
        if len(of_d) == 0:
            gradient = of_x[k] * scales[k % len(scales)] if len(scales) > 0 else of_x[k]
        else:
            gradient = of_d[k] * temperatures[0] if len(temperatures) > 0 else of_d[k]
            if ADJUSTED and len(of_x) > 0:
                gradient += of_x[k]
            if ADJUSTED and len(scales) > 0:
                gradient *= scales[k % len(scales)]
            if not ADJUSTED and len(of_x) > 0:
                gradient += of_x[k] * scales[k % len(scales)] if len(scales) > 0 else of_x[k]
        gradients += (tl.where(kept[0], gradient, 0.0) if len(kept) > 0 else gradient,)
    return gradients


@kernel
def _backward_kernel(
    logits,  # the first parameters are those of the forward
    offsets,
    row_stride: tl.int64,
    class_stride,
    classes: tl.int32,
    target,
    target_expert_stride,
    target_stride: tl.int64,
    second,
    second_expert_stride,
    second_stride: tl.int64,
    scale,
    scales,
    scale_expert_stride,
    bias,
    bias_expert_stride,
    mask,
    inverse_temperature,
    inverse_temperatures,
    teacher,
    teacher_expert_stride: tl.int64,
    teacher_row_stride: tl.int64,
    teacher_class_stride,
    images: tl.int32,
    saved,  # float32 [columns, K, B]
    grad_output,  # float32 [] or [K, B]
    grad_expert_stride,  # None: of []
    grad_row_stride: tl.int64,
    gradient,  # [K, B, C]
    out_expert_stride: tl.int64,
    out_row_stride: tl.int64,
    out_class_stride,
    K: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    SHARED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    TEACHER: tl.constexpr,
    TEACHERS: tl.constexpr,
    ADJUSTED: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BY_STUDENT: tl.constexpr,
    ATTACHED: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    STEPS: tl.constexpr,  # of a program
    AHEAD: tl.constexpr,
):
    batch = tl.num_programs(0)
    row = (batch - 1 - tl.program_id(0)).to(tl.int64)  # the rows that the forward read last may be in the cache
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
    start = sources[0][0]
    before = before_chunks(start, VECTOR)
    count = (classes - before) // VECTOR
    chunks = chunks_of(sources, before, class_stride, teacher_class_stride, VECTOR)
    ahead = ahead_of_chunks(start + class_offset(before, class_stride), VECTOR) if AHEAD else 0
    y = labels_at(target, target_expert_stride, row * target_stride, classes, K)
    y2 = labels_at(second, second_expert_stride, row * second_stride, classes, K)

    # Of grad_output and the numbers of the chain rule, with respect to x and to d.
    of_x = ()
    of_d = ()
    for k in tl.static_range(1 if grad_expert_stride is None else K):
        place = grad_output if grad_expert_stride is None else grad_output + k * grad_expert_stride
        g = tl.load(place + row * grad_row_stride).to(tl.float32)
        of_x += (g if scale is None else g * scale,)
        g = of_x[k] if ADJUSTED else g
        of_d += (g if inverse_temperature is None else g * inverse_temperature,)
    saved += row
    step = K * batch
    pivots = ()
    slopes = ()
    constants = ()
    x_y = ()
    x_y2 = ()
    if CROSS_ENTROPY and not SHARED:
        pivots = numbers_of(saved, batch, (), K)
        slopes = numbers_of(saved + step, batch, of_x, K)
        saved += 2 * step
    if SMOOTHING:
        constants = numbers_of(saved, batch, of_x, K)
        saved += step
    if CROSS_ENTROPY:
        x_y = numbers_of(saved, batch, of_x, K)
        saved += step
        if second is not None:
            x_y2 = numbers_of(saved, batch, of_x, K)
            saved += step
    numbers = ((), (), (), (), (), (), ())
    d_y = x_y
    d_y2 = x_y2
    if TEACHER != "":
        d_pivots = numbers_of(saved, batch, (), K)
        d_slopes = numbers_of(saved + step, batch, of_d, K)
        shares = numbers_of(saved + 2 * step, batch, of_d, K)
        saved += 3 * step
        bends = ()
        weights = ()
        if TEACHER == "others":
            if ATTACHED:
                bends = numbers_of(saved, batch, of_d, K)
                saved += step
            if BY_STUDENT:
                weights = numbers_of(saved, batch, (), K)
                saved += step
            numbers = d_pivots, d_slopes, shares, bends, weights, (), ()
        else:
            numbers = d_pivots, d_slopes, (), (), (), numbers_of(saved, batch, (), K), shares
            saved += step
        if not SHARED:
            d_y = ()
            d_y2 = ()
            if target is not None:
                d_y = numbers_of(saved, batch, of_d, K)
            if second is not None:
                d_y2 = numbers_of(saved + step, batch, of_d, K)

    for i in range(0, STEPS):
        first = (tl.program_id(1) * STEPS + i) * UNROLL * LANES - ahead
        chunk = first + tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        c = (tl.minimum(tl.maximum(chunk, 0), count - 1) * VECTOR)[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
        x, d, u, scales_c, temperatures, kept = values_at(
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
        )
        dx = _gradients_of_x(x, pivots, slopes, () if SHARED else constants)
        dd = _gradients_of_d(d, u, numbers, constants if SHARED else ())
        first_class = before + first * VECTOR
        if touches(y, first_class, UNROLL * LANES * VECTOR) | touches(y2, first_class, UNROLL * LANES * VECTOR):
            dx = _corrected(_corrected(dx, before + c, y2, x_y2), before + c, y, x_y)
            dd = _corrected(_corrected(dd, before + c, y2, d_y2), before + c, y, d_y)
        dz = _gradients_of_z(dx, dd, scales_c, temperatures, kept, ADJUSTED)
        for k in tl.static_range(K):
            out = gradient + (k * out_expert_stride + row * out_row_stride)
            out = first_chunk(out, class_offset(before, out_class_stride), VECTOR) + class_offset(c, out_class_stride)
            tl.store(out, dz[k].to(gradient.dtype.element_ty), mask=((chunk >= 0) & (chunk < count))[:, :, None])
    if VECTOR > 1 and tl.program_id(1) == 0:
        edge = edge_classes(tl.arange(0, 2 * VECTOR), before, count, VECTOR)
        edge_x, edge_d, edge_u, edge_scales, edge_temperatures, edge_kept = values_at(
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
        )
        edge_dx = _gradients_of_x(edge_x, pivots, slopes, () if SHARED else constants)
        edge_dd = _gradients_of_d(edge_d, edge_u, numbers, constants if SHARED else ())
        edge_dx = _corrected(_corrected(edge_dx, edge, y2, x_y2), edge, y, x_y)
        edge_dd = _corrected(_corrected(edge_dd, edge, y2, d_y2), edge, y, d_y)
        edge_dz = _gradients_of_z(edge_dx, edge_dd, edge_scales, edge_temperatures, edge_kept, ADJUSTED)
        for k in tl.static_range(K):
            edge_out = gradient + (k * out_expert_stride + row * out_row_stride)
            tl.store(edge_out + edge, edge_dz[k].to(gradient.dtype.element_ty), mask=edge < classes)
