"""Triton kernels of ``expert_loss`` and ``expert_kl``: every sample is a row, with the logits of all experts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shike_fast.kernels.losses._batch import batch_of
from shike_fast.kernels.losses._expert_backward import _backward_kernel
from shike_fast.kernels.losses._expert_form import Form
from shike_fast.kernels.losses._expert_forward import _forward_kernel
from shike_fast.kernels.losses._expert_rows import _end_kernel
from shike_fast.kernels.losses._rows import gradient_arguments, layout_of
from shike_fast.ops._expert_call import ExpertTensors, split

_GRADIENT = ("gradient", "out_expert_stride", "out_row_stride", "out_class_stride")


def expert_forward(logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``expert_loss`` or ``expert_kl`` and what the backward needs.

    Args:
        logits: one tensor [K, B, C], or K tensors [B, C]; float32, bfloat16 or float16, any strides, on one device.
        args: ``ExpertTensors`` and ``ExpertOptions``; numbers as contiguous float32, the teacher as one tensor. A
            target out of range makes the loss NaN.

    Returns:
        The loss [] or [K, B], its terms [2] (cross-entropy, divergence), the rows [4, K, B] (loss, log-sum-exp,
        correct, p_target), unwritten unless asked for, and saved [B, K, 12]; all float32. The memory of saved holds
        columns [K, B], those that the call needs: the end kernel writes them in the order in which the backward reads.
    """
    tensors, options = split(args)
    layout = layout_of(logits)
    form = Form(layout, tensors, options)
    loss = layout.new_floats(*((layout.experts, layout.batch) if options.reduction == "none" else ()))
    terms, outputs = layout.new_floats(2), layout.new_floats(4, layout.experts, layout.batch)
    saved = layout.new_floats(layout.batch, layout.experts, 12)
    if layout.batch == 0:
        return loss.zero_(), terms.zero_(), outputs, saved
    tile = form.tile()
    unroll, steps = form.forward_steps(tile)
    left = layout.new_floats(form.columns, layout.experts, layout.batch)
    end = batch_of(layout.batch, 2, loss.device)
    with torch.cuda.device_of(layout.first):  # Triton launches on the current device
        weights = form.weights(terms)
        _forward_kernel[(layout.batch,)](
            **form.arguments,
            students=weights["students"],
            left=left,
            ticket=end.ticket,
            **form.flags,
            RANKED=form.ranked,
            VECTOR=tile.vector,
            LANES=tile.lanes,
            UNROLL=unroll,
            STEPS=steps,
            AHEAD=layout.has_room(tile, unroll * steps),
            num_warps=tile.warps,
        )
        _end_kernel[(end.programs,)](
            left=left,
            saved=saved,
            loss=loss,
            terms=terms,
            outputs=outputs,
            partials=end.partials,
            ticket=end.ticket,
            rows=end.rows,
            experts=layout.experts,
            classes=layout.classes,
            **form.end_arguments,
            **weights,
            **form.end_flags,
            num_warps=1,
        )
    return loss, terms, outputs, saved


def expert_backward(grad_output: Tensor, logits: Sequence[Tensor], *args: Any) -> Tensor:
    """Compute the gradient [K, B, C] of the loss with respect to the logits, times ``grad_output`` [] or [K, B].

    The other arguments are ``ExpertTensors``, what ``expert_forward`` saved, and ``ExpertOptions``. The gradient has
    the logits' dtype and the strides of a tensor [K, B, C]; for a sequence it is contiguous.
    """
    count = len(ExpertTensors._fields)
    saved = args[count]
    tensors, options = split(args[:count] + args[count + 1 :])
    layout = layout_of(logits)
    gradient = layout.new_gradient()
    if layout.batch == 0:
        return gradient
    form = Form(layout, tensors, options)
    tile = form.tile(gradient)
    unroll, steps, programs = form.backward_steps(tile)
    by_row = grad_output.dim() == 2
    with torch.cuda.device_of(layout.first):
        _backward_kernel[(layout.batch, programs)](
            **form.arguments,
            saved=saved,
            grad_output=grad_output,
            grad_expert_stride=grad_output.stride(0) if by_row else None,
            grad_row_stride=grad_output.stride(1) if by_row else 0,
            **dict(zip(_GRADIENT, gradient_arguments(gradient), strict=True)),
            **form.flags,
            BY_STUDENT=form.by_student,
            ATTACHED=not options.detach,
            VECTOR=tile.vector,
            LANES=tile.lanes,
            UNROLL=unroll,
            STEPS=steps,
            AHEAD=layout.has_room(tile, unroll * steps * programs),
            num_warps=tile.warps,
        )
    return gradient
