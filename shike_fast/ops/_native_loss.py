"""The loss ``dkt_loss`` in the compiled library, on the CPU and on CUDA devices.

The functions have the signatures that ``shike_fast.kernels.losses`` has in Triton. The logits come as a list of one
tensor [K, B, C] or of K tensors [B, C], the options as ``shike_fast::dkt_loss_fused`` takes them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype, gradient_like
from shike_fast.ops._native import native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/common/dtype.h


class Kept(NamedTuple):
    """A gradient that a CUDA kernel wrote before ``grad_output`` was known."""

    gradient: Tensor
    rows: Tensor  # float32 [B]: for which grad_output; NaN: the row has no gradient yet
    expected: Tensor  # float32 [], of the device: the grad_output of the last backward, which the next one may have too


# By the number of the device. The value lies on the device, because nothing here may wait for it.
_EXPECTED: dict[int, Tensor] = {}


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
        size = native().cuda_dkt_workspace(call["dtype"], *call["shape"], loss.device.index)
        native().cuda_dkt_forward(**call, workspace=workspace_of(loss, size), **queue_of(loss))
    return loss, terms, saved


def dkt_backward(
    grad_output: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    factors: Tensor | None,
    saved: Tensor,
    *options: Any,
    kept: Kept | None = None,
) -> Tensor:
    """Gradient [K, B, C] of the logits, times ``grad_output`` []; ``kept`` is what ``dkt_both`` has left of it."""
    gradient = gradient_like(logits) if kept is None else kept.gradient
    call = _dkt_call(logits, target, saved, factors, *options)
    call["gradient"], call["grad_output"] = [gradient], grad_output
    if gradient.is_cpu:
        call["threads"] = torch.get_num_threads()
        native().cpu_dkt_backward(**call)
    elif gradient.numel() > 0:
        rows, expected = (None, None) if kept is None else kept[1:]
        native().cuda_dkt_backward(**call, kept=rows, expected=expected, **queue_of(gradient))
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
) -> tuple[tuple[Tensor, ...], Tensor | Kept] | None:
    """Results of ``dkt_forward`` and the gradient, from one reading of the logits; None where there is no such kernel.

    On the CPU: loss [] and terms [3], and the gradient for a ``grad_output`` of 1. Not in low precision: there a
    gradient must be rounded after ``grad_output``, perhaps a loss scale, is multiplied in.
    On CUDA devices, where rows fit into shared memory: loss, terms and saved, and ``Kept`` for ``dkt_backward``.
    """
    first = logits[0]
    dtype = first.dtype
    if first.is_cuda:
        options = hardest_weight, mutual_weight, teacher_target_logit, student_target_logit, detach_teacher
        return _cuda_dkt_both(logits, target, factors, *options)
    if dtype != torch.float32 and dtype != torch.float64:
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


def _cuda_dkt_both(
    logits: Sequence[Tensor], target: Tensor, factors: Tensor | None, *options: Any
) -> tuple[tuple[Tensor, ...], Kept] | None:
    shape, queue = shape_of(logits), queue_of(logits[0])
    size = native().cuda_dkt_both_workspace(DTYPES[logits[0].dtype], *shape, queue["device"]) if shape[1] else 0
    expected = _expected(logits[0], queue["device"]) if size else None
    if expected is None:
        return None
    loss, terms, saved = new_dkt_results(logits)
    kept = Kept(gradient_like(logits), loss.new_empty(shape[1]), expected)
    call = _dkt_call(logits, target, saved, factors, *options)
    call["loss"], call["terms"], call["gradient"] = loss, terms, [kept.gradient]
    call["kept"], call["expected"], call["workspace"] = kept.rows, expected, workspace_of(loss, size)
    native().cuda_dkt_both(**call, **queue)
    return (loss, terms, saved), kept


def _expected(like: Tensor, device: int) -> Tensor | None:
    """What backwards on a device were given; None while a graph is recorded, to whose memory it would belong."""
    if device not in _EXPECTED:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        _EXPECTED[device] = like.new_ones((), dtype=torch.float32)
    return _EXPECTED[device]


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


def workspace_of(tensor: Tensor, floats: int) -> Tensor:
    """Memory for a kernel beside a tensor."""
    return tensor.new_empty(floats, dtype=torch.float32)


def queue_of(tensor: Tensor) -> dict[str, int]:
    """The device of a CUDA tensor and its current stream."""
    device = tensor.device.index
    return {"device": device, "stream": torch.cuda.current_stream(device).cuda_stream}
