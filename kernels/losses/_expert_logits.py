"""What the kernels of the generalised expert loss know of classes: labels, and logits of experts and teachers.

Of a class there are the row logits x_k = s_k z_k + bias_k, the divergence logits d_k = x_k / T (or z_k / T), and the
logits u of the teachers: one of all experts, one each, or none where the experts teach each other.
"""

import triton
import triton.language as tl

from shike_fast.kernels.losses._dkt_block import MASKED, distances_of, total_of
from shike_fast.kernels.losses._rows import class_offset, expert_rows, first_chunk, loaded

# ---- where the numbers of a row are


@triton.jit
def labels_at(target, expert_stride, offset, classes, K: tl.constexpr):
    """The labels of a sample: none, one (an expert stride of None), or K; −1 where a label is out of range."""
    labels = ()
    if target is not None:
        for k in tl.static_range(1 if expert_stride is None else K):
            y = tl.load(target + offset if expert_stride is None else target + (k * expert_stride + offset))
            labels += (tl.where((y >= 0) & (y < classes), y, -1).to(tl.int32),)
    return labels


@triton.jit
def _of_experts(vector, expert_stride, K: tl.constexpr):
    """Pointers to class 0 of a vector: none, one for all experts, or K."""
    rows = ()
    if vector is not None:
        for k in tl.static_range(1 if expert_stride is None else K):
            rows += (vector if expert_stride is None else vector + k * expert_stride,)
    return rows


@triton.jit
def sources_of(
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
    K: tl.constexpr,
    TEACHER: tl.constexpr,
    TEACHERS: tl.constexpr,
):
    """Pointers to class 0: logits, teachers' logits, scales, biases, temperatures, and masks of student and teacher."""
    rows = expert_rows(logits, offsets, row * row_stride)
    teachers = ()
    masks = ()
    if mask is not None:
        masks = (mask + row * classes,)
    if TEACHER == "view":
        # An image of the first view is its own teacher, which adds nothing and reads nothing else.
        image = tl.where(row < images, row, row - images)
        teachers = expert_rows(logits, offsets, image * row_stride)
        if mask is not None:
            masks += (mask + image * classes,)
    elif TEACHER == "given":
        for k in tl.static_range(TEACHERS):
            teachers += (teacher + (k * teacher_expert_stride + row * teacher_row_stride),)
    scales_rows = _of_experts(scales, scale_expert_stride, K)
    bias_rows = _of_experts(bias, bias_expert_stride, K)
    return rows, teachers, scales_rows, bias_rows, _of_experts(inverse_temperatures, None, 1), masks


@triton.jit
def _moved(pointers, offset, VECTOR: tl.constexpr):
    moved = ()
    for k in tl.static_range(len(pointers)):
        moved += (first_chunk(pointers[k], offset, VECTOR),)
    return moved


@triton.jit
def chunks_of(sources, before, class_stride, teacher_class_stride, VECTOR: tl.constexpr):
    """The same pointers to class ``before``, which is a multiple of VECTOR elements in all of them."""
    rows, teachers, scales, biases, temperatures, masks = sources
    return (
        _moved(rows, class_offset(before, class_stride), VECTOR),
        _moved(teachers, class_offset(before, teacher_class_stride), VECTOR),
        _moved(scales, before, VECTOR),
        _moved(biases, before, VECTOR),
        _moved(temperatures, before, VECTOR),
        _moved(masks, before, VECTOR),
    )


# ---- the logits of classes


@triton.jit
def _row_logits(z, scale, scales, biases, kept, EXCLUDE: tl.constexpr):
    x = ()
    for k in tl.static_range(len(z)):
        value = z[k]
        if len(scales) > 0:
            factor = scales[k % len(scales)]
            value = tl.fma(value, factor, biases[k % len(biases)]) if len(biases) > 0 else value * factor
        elif scale is not None:
            value = tl.fma(value, scale, biases[k % len(biases)]) if len(biases) > 0 else value * scale
        elif len(biases) > 0:
            value += biases[k % len(biases)]
        if len(kept) > 0:
            value = tl.where(kept[0], value, -float("inf") if EXCLUDE else 0.0)
        x += (value,)
    return x


@triton.jit
def _divergence_logits(x, inverse_temperature, temperatures):
    d = ()
    for k in tl.static_range(len(x)):
        value = x[k]
        if len(temperatures) > 0:
            value *= temperatures[0]
        elif inverse_temperature is not None:
            value *= inverse_temperature
        d += (tl.maximum(value, MASKED, propagate_nan=tl.PropagateNan.ALL),)
    return d


@triton.jit
def values_at(
    sources,
    c,
    valid,
    class_stride,
    teacher_class_stride,
    scale,
    inverse_temperature,
    TEACHER: tl.constexpr,
    ADJUSTED: tl.constexpr,
    EXCLUDE: tl.constexpr,
):
    """Of some classes, or of one: x of each expert, d of each expert, u of each teacher, and what they are made of.

    The latter are scales, inverse temperatures, and which classes the masks of student and teacher keep.
    """
    rows, teachers, scale_rows, bias_rows, temperature_rows, mask_rows = sources
    z = loaded(rows, c, valid, class_stride)
    scales = loaded(scale_rows, c, valid, None)
    biases = loaded(bias_rows, c, valid, None)
    temperatures = loaded(temperature_rows, c, valid, None)
    kept = ()
    for k in tl.static_range(len(mask_rows)):
        kept += (tl.load(mask_rows[k] + c, mask=valid) != 0,)
    x = _row_logits(z, scale, scales, biases, kept[:1], EXCLUDE)
    d = ()
    u = ()
    if TEACHER != "":
        d = x if ADJUSTED else _row_logits(z, None, (), (), kept[:1], EXCLUDE)
        d = _divergence_logits(d, inverse_temperature, temperatures)
    if TEACHER == "mean":
        u = (total_of(d) / len(d),)
    elif len(teachers) > 0:
        t = loaded(teachers, c, valid, teacher_class_stride)
        of_teacher = kept[1:] if len(kept) > 1 else kept
        if ADJUSTED:
            t = _row_logits(t, scale, scales, biases, of_teacher, EXCLUDE)
        else:
            t = _row_logits(t, None, (), (), of_teacher, EXCLUDE)
        u = _divergence_logits(t, inverse_temperature, temperatures)
    return x, d, u, scales, temperatures, kept


@triton.jit
def touches(labels, first, count):
    """Whether one of the labels is among ``count`` classes from ``first`` on."""
    found = first != first  # False
    for k in tl.static_range(len(labels)):
        found = found | ((labels[k] >= first) & (labels[k] < first + count))
    return found


@triton.jit
def weighted_distances(d, weights):
    """D_k = Σ_i v_i (d_k − d_i); without weights all v are 1. From differences: a common offset costs no digit."""
    if len(weights) == 0:
        distances = distances_of(d)
    else:
        total = tl.zeros_like(d[0])
        whole = weights[0]
        for k in tl.static_range(1, len(d)):
            total += weights[k] * (d[k] - d[0])
            whole += weights[k]
        distances = (-total,)
        for k in tl.static_range(1, len(d)):
            distances += (whole * (d[k] - d[0]) - total,)
    return distances


# ---- columns of numbers [K, B]


@triton.jit
def numbers_of(saved, batch, factors, K: tl.constexpr):
    """A column of what is saved, of each expert, times a factor of each expert if there are factors."""
    numbers = ()
    for k in tl.static_range(K):
        number = tl.load(saved + k * batch)
        numbers += (number * factors[k % len(factors)] if len(factors) > 0 else number,)
    return numbers
