"""Triton kernels of the experts' cross-entropy with a bias and label smoothing: every sample and expert is a row."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels._common import multiple
from shike_fast.kernels.losses._rows import (
    BACKWARD_BUDGET,
    FORWARD_BUDGET,
    UNSPECIALIZED,
    batch_sum,
    class_offset,
    exp,
    expert_offset,
    gradient_arguments,
    layout_of,
    none_if_unit,
    reduced,
)

# Where the pivots start: the lowest finite float, so that no −∞ − −∞ arises from a class that is masked out.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _expert_row(logits, offsets, expert, offset, ALIGN: tl.constexpr):  # pointer to z_k[0] of one sample, k at run time
    start = expert_offset(offsets, 0)
    for k in tl.static_range(1, len(offsets)):
        start = tl.where(expert == k, expert_offset(offsets, k), start)
    return logits + multiple(start + offset, ALIGN)


@triton.jit
def _biased(z_row, bias, c, valid, class_stride, bias_class_stride, other):  # z[c] + bias[c]
    z = tl.load(z_row + class_offset(c, class_stride), mask=valid, other=other).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + class_offset(c, bias_class_stride), mask=valid, other=0.0)
    return z


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    bias,  # float32 [C] (bias_expert_stride 0), [K, C] or None
    bias_expert_stride: tl.int64,
    bias_class_stride,
    label_smoothing,
    saved,  # float32 [B, 2K]
    losses,  # float32 [B, K]
    K: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # in a row
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1)
    classes = multiple(classes, ALIGN)
    z_row = _expert_row(logits, offsets, expert, row * row_stride, ALIGN)
    if bias is not None:
        bias += multiple(expert * bias_expert_stride, ALIGN)
    y = tl.load(target + row * target_stride)
    # NaN, so that it shows, if the target is out of range
    in_range = (y >= 0) & (y < classes)
    at_target = _biased(z_row, bias, y, in_range, class_stride, bias_class_stride, float("nan"))

    pivot = tl.full((), _LOWEST, tl.float32)
    exps = tl.full((), 0.0, tl.float32)  # Σ_c exp(z[c] − pivot)
    distances = tl.full((), 0.0, tl.float32)  # Σ_c (z[c] − pivot)
    for i in range(0, BLOCKS):
        c = i * BLOCK + tl.arange(0, BLOCK)
        z = _biased(z_row, bias, c, c < classes, class_stride, bias_class_stride, -float("inf"))
        new_pivot = tl.maximum(pivot, tl.max(z, 0))
        x = z - new_pivot
        delta = pivot - new_pivot
        if SMOOTHING:
            added_exps, added_distances = reduced((exp(x), tl.where(c < classes, x, 0.0)), False)
            distances += (i * BLOCK) * delta + added_distances
        else:
            added_exps = tl.sum(exp(x), 0)
        exps = exp(delta) * exps + added_exps
        pivot = new_pivot

    loss = tl.log(exps) - (1.0 - label_smoothing) * (at_target - pivot)
    if SMOOTHING:
        loss -= label_smoothing / classes * distances
    tl.store(losses + row * K + expert, loss)
    tl.store(saved + row * (2 * K) + expert, pivot)
    tl.store(saved + row * (2 * K) + K + expert, 1.0 / exps)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    logits,  # [K, B, C]: expert k at expert_offset(offsets, k), strides row_stride and class_stride
    target,  # int64 [B]
    offsets,
    row_stride: tl.int64,
    class_stride,
    target_stride: tl.int64,
    classes: tl.int32,
    bias,  # float32 [C] (bias_expert_stride 0), [K, C] or None
    bias_expert_stride: tl.int64,
    bias_class_stride,
    label_smoothing,
    saved,  # float32 [B, 2K]
    grad_output,  # float32 []
    inverse_batch,  # 1 / B
    gradient,  # [K, B, C]
    out_expert_stride: tl.int64,
    out_row_stride: tl.int64,
    out_class_stride,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1)
    classes = multiple(classes, ALIGN)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    z_row = _expert_row(logits, offsets, expert, row * row_stride, ALIGN)
    if bias is not None:
        bias += multiple(expert * bias_expert_stride, ALIGN)
    z = _biased(z_row, bias, c, c < classes, class_stride, bias_class_stride, -float("inf"))
    y = tl.load(target + row * target_stride)
    g = tl.load(grad_output).to(tl.float32) * inverse_batch
    saved += row * (2 * K) + expert
    p = exp(z - tl.load(saved)) * tl.load(saved + K)
    label = tl.where(c == y, 1.0 - label_smoothing, 0.0) + label_smoothing / classes
    dz = g * (p - label)  # d(loss)/d z_k[c]
    out = gradient + multiple(expert * out_expert_stride + row * out_row_stride, ALIGN)
    tl.store(out + class_offset(c, out_class_stride), dz.to(gradient.dtype.element_ty), mask=c < classes)


def _bias_strides(bias: Tensor | None) -> tuple[int, int | None]:
    if bias is None:
        return 0, None
    return (0 if bias.dim() == 1 else bias.stride(0)), none_if_unit(bias.stride(-1))


def cross_entropy_forward(
    logits: Sequence[Tensor], target: Tensor, bias: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute ``expert_cross_entropy`` and what its backward needs.

    Args:
        logits: one tensor [K, B, C], or K tensors [B, C]; float32, bfloat16 or float16, any strides, on one device.
        target: int64 [B]. A class out of range makes the loss NaN.
        bias: float32 [C] or [K, C], any strides, or ``None``; −∞ takes a class out.
        label_smoothing: ε in 0..1.

    Returns:
        The loss [] and saved [B, 2K], both float32: the maximum M of every row and expert, and 1 / Σ_c exp(z − M).
    """
    layout = layout_of(logits)
    experts, batch = layout.experts, layout.batch
    saved = layout.new_floats(batch, 2 * experts)
    if batch == 0:
        return layout.new_floats().zero_(), saved
    tile = layout.tile(1, FORWARD_BUDGET)
    losses = layout.new_floats(batch * experts, 1)
    bias_strides = _bias_strides(bias)
    with torch.cuda.device_of(layout.first):  # Triton launches on the current device
        _forward_kernel[(batch, experts)](
            *layout.arguments(target),
            bias,
            *bias_strides,
            label_smoothing,
            saved,
            losses,
            K=experts,
            SMOOTHING=label_smoothing != 0.0,
            ALIGN=layout.alignment(bias_strides[0]),
            BLOCK=tile.block,
            BLOCKS=triton.cdiv(layout.classes, tile.block),
            num_warps=tile.warps,
        )
        loss, _ = batch_sum(losses, (1.0 / batch, 0.0, 0.0))
    return loss, saved


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Compute the gradient [K, B, C] of ``expert_cross_entropy`` with respect to the logits, times ``grad_output`` [].

    The other arguments are those of ``cross_entropy_forward``, and what it saved. The gradient has the logits'
    dtype and the strides of a tensor [K, B, C]; for a sequence it is contiguous.
    """
    layout = layout_of(logits)
    experts, batch = layout.experts, layout.batch
    gradient = layout.new_gradient()
    if batch == 0:
        return gradient
    tile = layout.tile(1, BACKWARD_BUDGET)
    bias_strides = _bias_strides(bias)
    with torch.cuda.device_of(layout.first):
        _backward_kernel[(batch, experts, triton.cdiv(layout.classes, tile.block))](
            *layout.arguments(target),
            bias,
            *bias_strides,
            label_smoothing,
            saved,
            grad_output,
            1.0 / batch,
            *gradient_arguments(gradient),
            K=experts,
            ALIGN=layout.alignment(bias_strides[0], *gradient.stride()[:2]),
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return gradient
