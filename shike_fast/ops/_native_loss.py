"""The expert losses in the compiled library, on the CPU and on CUDA devices.

The functions have the signatures that ``shike_fast.kernels.losses`` has in Triton. The logits come as a list of one
tensor [K, B, C] or of K tensors [B, C], the options as ``shike_fast::dkt_loss_fused`` takes them, the bias contiguous
and in the accumulation dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype, gradient_like
from shike_fast.ops._native import native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/common/dtype.h


def shape_of(logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """(K, B, C) of one tensor [K, B, C] or K tensors [B, C]."""
    shape = logits[0].shape
    return tuple(shape) if len(shape) == 3 else (len(logits), *shape)  # type: ignore[return-value]


def new_dkt_results(logits: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what ``dkt_forward`` returns."""
    experts, batch, _classes = shape_of(logits)
    first, dtype = logits[0], accumulation_dtype(logits[0].dtype)
    terms = first.new_empty(3, dtype=torch.float32)
    return first.new_empty((), dtype=dtype), terms, first.new_empty((batch, 5 * experts + 4), dtype=dtype)


def new_cross_entropy_results(logits: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    """Memory for what ``cross_entropy_forward`` returns."""
    experts, batch, _classes = shape_of(logits)
    first, dtype = logits[0], accumulation_dtype(logits[0].dtype)
    return first.new_empty((), dtype=dtype), first.new_empty((batch, 2 * experts), dtype=dtype)


def dkt_forward(
    logits: Sequence[Tensor], target: Tensor, factors: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [3] and what is saved for the backward."""
    loss, terms, saved = new_dkt_results(logits)
    call = _dkt_call(logits, target, saved, factors, *options)
    call["loss"], call["terms"] = loss, terms
    if loss.device.type == "cpu":
        call["threads"] = torch.get_num_threads()
        native().cpu_dkt_forward(**call)
    elif target.shape[0] == 0:
        loss.zero_()
        terms.zero_()
    else:
        size = native().cuda_dkt_workspace(*shape_of(logits), loss.device.index)
        native().cuda_dkt_forward(**call, workspace=loss.new_empty(size), **queue_of(loss))
    return loss, terms, saved


def dkt_backward(
    grad_output: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    factors: Tensor | None,
    saved: Tensor,
    *options: Any,
) -> Tensor:
    """Gradient [K, B, C] of the logits, times ``grad_output`` []."""
    gradient = gradient_like(logits)
    call = _dkt_call(logits, target, saved, factors, *options)
    call["gradient"], call["grad_output"] = [gradient], grad_output
    if gradient.device.type == "cpu":
        call["threads"] = torch.get_num_threads()
        native().cpu_dkt_backward(**call)
    elif gradient.numel() > 0:
        native().cuda_dkt_backward(**call, **queue_of(gradient))
    return gradient


def dkt_both(
    logits: Sequence[Tensor],
    target: Tensor,
    factors: Tensor | None,
    hardest_weight: float,
    mutual_weight: float,
    teacher_target_logit: float,
    student_target_logit: float,
    detach_teacher: bool,
) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """Loss [] and terms [3], and the gradient for a ``grad_output`` of 1, from one reading of the logits.

    None where that is no good: a gradient in low precision must be rounded after ``grad_output``, perhaps a loss scale,
    is multiplied in, and GPUs have no such kernel.
    """
    first = logits[0]
    dtype = first.dtype
    if not first.is_cpu or (dtype != torch.float32 and dtype != torch.float64):
        return None
    shape = shape_of(logits)
    scale = 1.0 / max(shape[1], 1)
    loss, terms, gradient = first.new_empty(()), first.new_empty(3, dtype=torch.float32), gradient_like(logits)
    native().cpu_dkt_both(  # without a dictionary of what the calls share: that costs two microseconds
        dtype=DTYPES[dtype],
        shape=shape,
        logits=logits,
        target=target,
        factors=factors,
        hardest_weight=hardest_weight * scale,
        mutual_weight=mutual_weight * scale,
        teacher_target_logit=teacher_target_logit,
        student_target_logit=student_target_logit,
        detach_teacher=detach_teacher,
        loss=loss,
        terms=terms,
        gradient=[gradient],
        threads=torch.get_num_threads(),
    )
    return (loss, terms), gradient


def cross_entropy_forward(
    logits: Sequence[Tensor], target: Tensor, bias: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss [] and what is saved for the backward."""
    loss, saved = new_cross_entropy_results(logits)
    call = {**_common(logits, target, saved), "bias": bias, "label_smoothing": label_smoothing, "loss": loss}
    if loss.device.type == "cpu":
        native().cpu_cross_entropy_forward(**call, threads=torch.get_num_threads())
    elif target.shape[0] == 0:
        loss.zero_()
    else:
        size = native().cuda_cross_entropy_workspace(*shape_of(logits), loss.device.index)
        native().cuda_cross_entropy_forward(**call, workspace=loss.new_empty(size), **queue_of(loss))
    return loss, saved


def cross_entropy_backward(
    grad_output: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Gradient [K, B, C] of the logits, times ``grad_output`` []."""
    gradient = gradient_like(logits)
    call = {
        **_common(logits, target, saved),
        "bias": bias,
        "label_smoothing": label_smoothing,
        "gradient": [gradient],
        "grad_output": grad_output,
    }
    if gradient.device.type == "cpu":
        native().cpu_cross_entropy_backward(**call, threads=torch.get_num_threads())
    elif gradient.numel() > 0:
        native().cuda_cross_entropy_backward(**call, **queue_of(gradient))
    return gradient


def cross_entropy_both(
    logits: Sequence[Tensor], target: Tensor, bias: Tensor | None, label_smoothing: float
) -> tuple[tuple[Tensor], Tensor] | None:
    """Loss [], and the gradient for a ``grad_output`` of 1; None as of ``dkt_both``."""
    first = logits[0]
    dtype = first.dtype
    if not first.is_cpu or (dtype != torch.float32 and dtype != torch.float64):
        return None
    loss, gradient = first.new_empty(()), gradient_like(logits)
    native().cpu_cross_entropy_both(
        dtype=DTYPES[dtype],
        shape=shape_of(logits),
        logits=logits,
        target=target,
        bias=bias,
        label_smoothing=label_smoothing,
        loss=loss,
        gradient=[gradient],
        threads=torch.get_num_threads(),
    )
    return (loss,), gradient


def _common(logits: Sequence[Tensor], target: Tensor, saved: Tensor) -> dict[str, Any]:
    """What every call takes."""
    return {
        "dtype": DTYPES[logits[0].dtype],
        "shape": shape_of(logits),
        "logits": logits,
        "target": target,
        "saved": saved,
    }


def _dkt_call(
    logits: Sequence[Tensor],
    target: Tensor,
    saved: Tensor,
    factors: Tensor | None,
    hardest_weight: float,
    mutual_weight: float,
    teacher_target_logit: float,
    student_target_logit: float,
    detach_teacher: bool,
) -> dict[str, Any]:
    """DktCall of csrc/losses/call.h. The callers add to it: merging dictionaries costs half a microsecond."""
    rows = max(target.shape[0], 1)
    scale = 1.0 / rows
    call = _common(logits, target, saved)
    call["factors"] = factors
    call["hardest_weight"] = hardest_weight * scale
    call["mutual_weight"] = mutual_weight * scale
    call["teacher_target_logit"] = teacher_target_logit
    call["student_target_logit"] = student_target_logit
    call["detach_teacher"] = detach_teacher
    return call


def queue_of(tensor: Tensor) -> dict[str, int]:
    """The device of a CUDA tensor and its current stream."""
    device = tensor.device.index
    return {"device": device, "stream": torch.cuda.current_stream(device).cuda_stream}
