"""The checks of the arguments of the generalised expert loss, and its divergence as the caller describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from shike_fast.ops._checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    as_tensor,
    check_dense,
    check_device,
    check_finite,
    check_target,
    describe,
    values_are_readable,
)
from shike_fast.ops._expert_call import (
    GIVEN,
    KL_REDUCTIONS,
    MEAN,
    OTHERS,
    VIEW,
    ExpertOptions,
    ExpertTensors,
)

if TYPE_CHECKING:
    import numpy as np

Numbers: TypeAlias = "Tensor | Sequence[float] | Sequence[Sequence[float]] | np.ndarray"


@dataclass(frozen=True, eq=False)
class ExpertKL:
    """A divergence that :func:`expert_loss` adds from the same pass; the arguments are those of :func:`expert_kl`.

    Attributes:
        adjusted: the divergence compares softmax(scale * z + bias), of a given teacher too; else softmax(z). A margin
            counts in the cross-entropy alone.
    """

    teacher: str | Tensor | Sequence[Tensor] = OTHERS
    temperature: float | Tensor = 1.0
    detach: bool | None = None
    weight: float | Tensor = 1.0
    gate: Literal["teacher_correct"] | Tensor | None = None
    reduction: str = "batchmean"
    weight_of: Literal["teacher", "student"] = "teacher"
    eps: float = 0.0
    adjusted: bool = True


def with_divergence(
    op: str,
    kl: ExpertKL,
    tensors: ExpertTensors,
    options: ExpertOptions,
    first: Tensor,
    shape: tuple[int, int, int],
) -> tuple[ExpertTensors, ExpertOptions]:
    """The call with the divergence added, checked."""
    experts, batch, classes = shape
    teacher: Tensor | None = None
    if isinstance(kl.teacher, str):
        check_choice(op, "teacher", kl.teacher, (OTHERS, MEAN, VIEW))
        kind = kl.teacher
    else:
        kind, teacher = GIVEN, checked_teacher(op, kl.teacher, first, shape)
    if kind == VIEW and batch % 2:
        raise ValueError(f"{op}: teacher 'view' needs an even batch, two views of the same images, got B={batch}")
    check_choice(op, "reduction of the divergence", kl.reduction, KL_REDUCTIONS)
    check_choice(op, "weight_of", kl.weight_of, ("teacher", "student"))
    (eps,) = check_finite(op, eps=kl.eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    rows = batch // 2 if kind == VIEW else batch
    of_rows = ((rows,), (experts, rows))
    temperature, of_classes = number_or(op, "temperature", kl.temperature, first, ((classes,),), default=1.0)
    least = temperature
    if of_classes is not None and values_are_readable(of_classes):
        least = of_classes.detach().min().item()  # NaN counts
    if not least > 0:
        raise ValueError(f"{op}: temperature must be positive, got {least}")
    weight, weight_tensor = number_or(op, "weight", kl.weight, first, ((), *of_rows), default=1.0)
    gated = isinstance(kl.gate, str)
    if gated:
        check_choice(op, "gate", kl.gate, ("teacher_correct",))
        if tensors.target is None:
            raise ValueError(f"{op}: gate 'teacher_correct' needs a target")
        if kind == OTHERS and kl.weight_of == "student":
            raise ValueError(f"{op}: gate 'teacher_correct' needs weight_of='teacher' among others")
    gate = None if gated or kl.gate is None else optional(op, "gate", as_numbers(kl.gate), first, of_rows)
    detach = kind != OTHERS if kl.detach is None else bool(kl.detach)
    tensors = tensors._replace(teacher=teacher, temperature=of_classes, kl_weight=weight_tensor, gate=gate)
    return tensors, options._replace(
        teacher=kind,
        temperature=temperature,
        kl_weight=weight,
        kl_reduction=kl.reduction,
        by_student=kl.weight_of == "student",
        gated=gated,
        detach=detach,
        adjusted=kl.adjusted,
        eps=eps,
    )


def check_choice(op: str, name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_labels(op: str, name: str, target: object, first: Tensor, shape: tuple[int, int, int]) -> None:
    if (
        isinstance(target, Tensor)
        and target.layout is torch.strided
        and not target.is_nested
        and target.dtype == torch.int64
        and target.shape == shape[:2]
    ):
        check_target(
            op,
            target.flatten() if target.is_contiguous() else target.reshape(-1),
            first,
            (1, target.numel(), shape[2]),
            name=name,
        )
    else:
        check_target(op, target, first, shape, name=name)


def text_of(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def as_numbers(value: object) -> object:
    """A bool tensor as the numbers 0 and 1."""
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype == torch.bool else value


def optional(op: str, name: str, value: object, first: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor | None:
    """A tensor of one of these shapes; lists and arrays are copied to the device of the logits."""
    if value is None:
        return None
    tensor = as_tensor(value, first.device)
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a tensor, list or array of numbers {text_of(shapes)}, got {kind}")
    check_dense(op, name, tensor)
    if tensor.dtype not in FLOAT_DTYPES and tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{op}: {name} must be floating point or integer {text_of(shapes)}, got {describe(tensor)}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{op}: {name} must be {text_of(shapes)}, got {describe(tensor)}")
    check_device(op, name, tensor, first, "logits")
    return tensor


def number_or(
    op: str, name: str, value: object, first: Tensor, shapes: Sequence[tuple[int, ...]], *, default: float
) -> tuple[float, Tensor | None]:
    """A number, or the default and a tensor of one of these shapes."""
    if isinstance(value, (int, float)) or (not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0):
        (number,) = check_finite(op, **{name: value})
        return number, None
    if isinstance(value, Tensor) and value.dim() == 0 and () not in shapes:
        shapes, value = (*shapes, (1,)), value.reshape(1)
        tensor = optional(op, name, value, first, shapes)
        assert tensor is not None
        return default, tensor.expand(shapes[0])
    return default, optional(op, name, value, first, shapes)


def checked_mask(op: str, mask: object, first: Tensor, shape: tuple[int, int, int]) -> Tensor:
    expected = f"bool [B={shape[1]}, C={shape[2]}]"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: class_mask must be a tensor {expected}, got {type(mask).__name__}")
    check_dense(op, "class_mask", mask)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape[1:]:
        error = TypeError if mask.dtype != torch.bool else ValueError
        raise error(f"{op}: class_mask must be {expected}, got {describe(mask)}")
    check_device(op, "class_mask", mask, first, "logits")
    return mask


def checked_teacher(op: str, teacher: object, first: Tensor, shape: tuple[int, int, int]) -> Tensor:
    experts, batch, classes = shape
    expected = f"[B={batch}, C={classes}], [K={experts}, B, C] or K tensors [B, C]"
    if isinstance(teacher, list | tuple) and teacher and all(isinstance(one, Tensor) for one in teacher):
        if any(one.shape != teacher[0].shape or one.dim() != 2 for one in teacher):
            raise ValueError(f"{op}: teacher must be {expected}, got {', '.join(map(describe, teacher))}")
        teacher = torch.stack(list(teacher))
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"{op}: teacher must be 'others', 'mean', 'view' or logits {expected}, got {type(teacher).__name__}"
        )
    check_dense(op, "teacher", teacher)
    if teacher.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: teacher must be floating point {expected}, got {describe(teacher)}")
    if tuple(teacher.shape) not in (shape[1:], shape):
        raise ValueError(f"{op}: teacher must be {expected}, got {describe(teacher)}")
    check_device(op, "teacher", teacher, first, "logits")
    return teacher
