"""The generalised expert loss in the compiled library, on the CPU and on CUDA devices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype, gradient_like
from shike_fast.ops._expert_call import (
    GIVEN,
    KL_REDUCTIONS,
    MASKS,
    MEAN,
    NO_TEACHER,
    OTHERS,
    REDUCTIONS,
    VIEW,
    ExpertOptions,
    ExpertTensors,
    kl_row_weights,
    row_weights,
    split,
)
from shike_fast.ops._native import native
from shike_fast.ops._native_loss import DTYPES, queue_of, shape_of, workspace_of

SAVED = 12  # numbers an expert and row: ExpertSaved of csrc/losses/expert_row.h

# The enumerations of csrc/losses, by the option that names their values.
_ENUMERATIONS: dict[str, tuple[str, ...]] = {
    "reduction": REDUCTIONS,
    "masked": ("", *MASKS),
    "teacher": (NO_TEACHER, OTHERS, MEAN, GIVEN, VIEW),
    "kl_reduction": KL_REDUCTIONS,
}


def new_expert_results(logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what ``expert_forward`` returns."""
    _, options = split(args)
    experts, batch, _classes = shape_of(logits)
    first, dtype = logits[0], accumulation_dtype(logits[0].dtype)
    loss = first.new_empty((experts, batch) if options.reduction == "none" else (), dtype=dtype)
    terms = first.new_empty(2, dtype=torch.float32)
    rows = first.new_empty((4, experts, batch if options.rows else 0), dtype=dtype)
    return loss, terms, rows, first.new_empty((batch, experts, SAVED), dtype=dtype)


def expert_forward(logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, terms [2], rows [4, K, B] and what is saved for the backward."""
    if logits[0].is_cuda:
        return cuda_expert_forward(logits, *args)
    loss, terms, rows, saved = new_expert_results(logits, *args)
    tensors, options = split(args)
    native().cpu_expert_forward(
        **_call(logits, tensors, options),
        saved=saved,
        loss=loss,
        terms=terms,
        rows=rows if options.rows else None,
        threads=torch.get_num_threads(),
    )
    return loss, terms, rows, saved


def expert_backward(grad_output: Tensor, logits: Sequence[Tensor], *args: Any) -> Tensor:
    """Gradient [K, B, C] of the logits, times ``grad_output``, which has the shape of the loss."""
    count = len(ExpertTensors._fields)
    saved = args[count]
    tensors, options = split((*args[:count], *args[count + 1 :]))
    if logits[0].is_cuda:
        return cuda_expert_backward(grad_output, logits, tensors, options, saved)
    gradient = gradient_like(logits)
    native().cpu_expert_backward(
        **_call(logits, tensors, options),
        saved=saved,
        gradient=[gradient],
        grad_output=grad_output.contiguous(),
        threads=torch.get_num_threads(),
    )
    return gradient


def expert_both(logits: Sequence[Tensor], *args: Any) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Results of the forward but the last, and the gradient for a ``grad_output`` of 1; None as of ``dkt_both``."""
    first = logits[0]
    dtype = first.dtype
    tensors, options = args[:_TENSORS], args[_TENSORS : _TENSORS + _OPTIONS]
    if not first.is_cpu or (dtype != torch.float32 and dtype != torch.float64) or options[_REDUCTION] == "none":
        return None
    shape = shape_of(logits)
    loss, terms, gradient = first.new_empty(()), first.new_empty(2, dtype=torch.float32), gradient_like(logits)
    rows = first.new_empty((4, *shape[:2])) if options[_ROWS] else None
    teacher = tensors[_TEACHER]
    native().cpu_expert_both(  # without a dictionary of what the calls share: that costs two microseconds
        dtype=DTYPES[dtype],
        shape=shape,
        logits=logits,
        tensors=tensors,
        options=_numbers(options),
        teacher_dtype=DTYPES[dtype if teacher is None else teacher.dtype],
        loss=loss,
        terms=terms,
        rows=rows,
        gradient=[gradient],
        threads=torch.get_num_threads(),
    )
    return (loss, terms, terms if rows is None else rows), gradient


_TENSORS, _OPTIONS = len(ExpertTensors._fields), len(ExpertOptions._fields)
_TEACHER = ExpertTensors._fields.index("teacher")
_REDUCTION, _ROWS = (ExpertOptions._fields.index(name) for name in ("reduction", "rows"))


def _call(logits: Sequence[Tensor], tensors: ExpertTensors, options: ExpertOptions) -> dict[str, Any]:
    """ExpertCall of csrc/losses/call.h, on the CPU with the weights of rows."""
    teacher = tensors.teacher
    return {
        "dtype": DTYPES[logits[0].dtype],
        "shape": shape_of(logits),
        "logits": logits,
        "tensors": tensors,
        "options": _numbers(options),
        "teacher_dtype": DTYPES[logits[0].dtype if teacher is None else teacher.dtype],
    }


@functools.lru_cache(maxsize=256)
def _numbers(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """The options with the numbers of enumerations in the place of names."""
    numbers = ExpertOptions(*options)._asdict()
    for name, known in _ENUMERATIONS.items():
        numbers[name] = known.index(numbers[name])
    return tuple(numbers.values())


# ---- on CUDA devices


def cuda_expert_forward(logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``expert_forward``; the weights of rows are numbers, or small tensors where the caller gave any."""
    loss, terms, rows, saved = new_expert_results(logits, *args)
    tensors, options = split(args)
    shape = shape_of(logits)
    if shape[1] == 0:
        loss.zero_()
        terms.zero_()
        return loss, terms, rows, saved
    call = _call(logits, tensors, options)
    queue = queue_of(logits[0])
    size = native().cuda_expert_workspace(call["dtype"], *shape, options.teacher != NO_TEACHER, queue["device"])
    native().cuda_expert_forward(
        **call,
        **_row_weights(tensors, options, shape, terms),
        saved=saved,
        loss=loss,
        terms=terms,
        rows=rows if options.rows else None,
        workspace=workspace_of(loss, size),
        **queue,
    )
    return loss, terms, rows, saved


def cuda_expert_backward(
    grad_output: Tensor, logits: Sequence[Tensor], tensors: ExpertTensors, options: ExpertOptions, saved: Tensor
) -> Tensor:
    """As ``expert_backward``."""
    gradient = gradient_like(logits)
    if gradient.numel() > 0:
        native().cuda_expert_backward(
            **_call(logits, tensors, options),
            saved=saved,
            gradient=[gradient],
            grad_output=grad_output.contiguous(),
            **queue_of(logits[0]),
        )
    return gradient


def _row_weights(
    tensors: ExpertTensors, options: ExpertOptions, shape: tuple[int, int, int], like: Tensor
) -> dict[str, Any]:
    """What rows are multiplied by: numbers where nothing was given, which costs no launch; else [K, B] by PyTorch."""
    experts, batch, classes = shape
    found: dict[str, Any] = dict.fromkeys(("weight_a", "weight_b", "kl_weight"))
    found |= dict.fromkeys(("weight_number", "weight_b_number", "kl_number"), 1.0)
    of_rows = (tensors.lam, tensors.class_weight, tensors.sample_weight, tensors.expert_weight)
    if options.cross_entropy and all(value is None for value in of_rows):
        over_experts = experts if options.reduction in ("mean/K", "global_weighted_mean") else 1
        share = 1.0 if options.reduction == "none" else 1.0 / (batch * over_experts)
        lam = 1.0 if tensors.target_b is None else options.lam
        found["weight_number"], found["weight_b_number"] = share * lam, share * (1.0 - lam)
    elif options.cross_entropy:
        weight_a, weight_b = row_weights(tensors, options, shape, torch.float32)
        found["weight_a"] = weight_a.contiguous()
        found["weight_b"] = None if weight_b is None else weight_b.contiguous()
    if options.teacher == NO_TEACHER:
        return found
    if tensors.kl_weight is None and tensors.gate is None and tensors.temperature is None:
        rows = max(batch // 2, 1) if options.teacher == VIEW else batch
        divisor = rows * (classes if options.kl_reduction == "mean" else 1)
        found["kl_number"] = options.kl_weight * options.temperature**2 / divisor
    else:
        found["kl_weight"] = kl_row_weights(tensors, options, like[0].expand(shape), None).contiguous()
    return found
