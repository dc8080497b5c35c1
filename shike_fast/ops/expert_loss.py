"""The generalised expert loss: cross-entropy with margins, weights and two labels, and divergences between experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from shike_fast.ops._checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    accumulation_dtype,
    as_tensor,
    check_dense,
    check_device,
    check_finite,
    check_logits,
    check_target,
    describe,
    stacked,
)
from shike_fast.ops._expert_call import (
    GIVEN,
    KL_REDUCTIONS,
    MASKS,
    MEAN,
    NO_TEACHER,
    OPTIONS,
    OTHERS,
    REDUCTIONS,
    TENSORS,
    VIEW,
    ExpertOptions,
    ExpertTensors,
)
from shike_fast.ops._expert_fused import fused_expert_loss, refuses_expert_loss
from shike_fast.ops._expert_reference import composite_expert_loss
from shike_fast.ops._losses import loss_operator

if TYPE_CHECKING:
    import numpy as np

Numbers: TypeAlias = "Tensor | Sequence[float] | Sequence[Sequence[float]] | np.ndarray"
_NAME = "expert_loss"
_KL_NAME = "expert_kl"


class ExpertRows(NamedTuple):
    """What a pass knows of every row, detached; float32 [K, B], float64 for float64 logits.

    The row logits are x = scale * z + bias, without margin.

    Attributes:
        loss: the row's cross-entropy with its margin, smoothing and two labels, without weights and reduction.
        log_sum_exp: log sum_c exp(x[c]).
        correct: bool, whether the largest x, the lowest class of several, is at ``target``.
        p_target: softmax(x) at ``target``.
    """

    loss: Tensor
    log_sum_exp: Tensor
    correct: Tensor
    p_target: Tensor


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


@overload
def expert_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    bias: Numbers | None = ...,
    margin: Numbers | None = ...,
    scale: float | Numbers = ...,
    target_b: Tensor | None = ...,
    lam: float | Tensor | None = ...,
    label_smoothing: float = ...,
    class_weight: Numbers | None = ...,
    sample_weight: Tensor | None = ...,
    expert_weight: Numbers | None = ...,
    reduction: str = ...,
    soft_target: Tensor | None = ...,
    ensemble: Literal["mean", "sum"] | None = ...,
    ensemble_weight: float = ...,
    class_mask: Tensor | None = ...,
    masked: Literal["zero", "exclude", "partial"] = ...,
    kl: ExpertKL | None = ...,
    return_terms: bool = ...,
    return_rows: Literal[False] = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def expert_loss(
    logits: Tensor | Sequence[Tensor], target: Tensor, *, return_rows: Literal[True], **options: Any
) -> Any: ...
def expert_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    bias: Numbers | None = None,
    margin: Numbers | None = None,
    scale: float | Numbers = 1.0,
    target_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weight: Numbers | None = None,
    sample_weight: Tensor | None = None,
    expert_weight: Numbers | None = None,
    reduction: str = "mean",
    soft_target: Tensor | None = None,
    ensemble: Literal["mean", "sum"] | None = None,
    ensemble_weight: float = 1.0,
    class_mask: Tensor | None = None,
    masked: Literal["zero", "exclude", "partial"] = "zero",
    kl: ExpertKL | None = None,
    return_terms: bool = False,
    return_rows: bool = False,
    backend: str | None = None,
) -> Any:
    """Compute the generalised cross-entropy of K experts, and a divergence between them from the same pass.

        x_k[c]  = scale_k[c] z_k[c] + bias_k[c]                                   row logits
        l_k(t)  = -(1 - s) log softmax(x_k - margin_k[t] e_t)[t] - s mean_c log softmax(x_k - margin_k[t] e_t)[c]
        L       = sum_k expert_weight_k reduce_b( lam w_kb(y) l_k(y) + (1 - lam) w_kb(y_b) l_k(y_b) )  [+ KL]

    with w_kb(t) = class_weight_k[t] sample_weight_kb, and e_t 1 at the label t. The reductions:

    - ``"mean"``: mean over the batch, sum over the experts;
    - ``"mean/K"``: that, divided by K;
    - ``"weighted_mean"``: sum_b w l / sum_b w for each expert and label, as ``F.cross_entropy(weight=...)`` does;
    - ``"global_weighted_mean"``: sum over experts and rows of W l, divided by the sum of W = expert_weight w;
    - ``"none"``: the weighted rows [K, B].

    Weights that add up to 0 give 0. float16 and bfloat16 logits are computed in float32, and only the finished gradient
    is rounded; autocast does not change the result.

    Args:
        logits: float16, bfloat16, float32 or float64 [K, B, C], or a list or tuple of K tensors [B, C]; any strides.
        target: int64 [B], or [K, B] for a label an expert, in 0..C-1. A value out of range raises on the CPU in eager
            mode; elsewhere it is undefined.
        bias, margin: [C] or [K, C], floating or integer; a bias of -inf takes the class out.
        scale: a number, [C] or [K, C].
        target_b, lam: a second label and the weight of the first, a number, [] or [B] (mixup, cutmix). Both or neither.
        label_smoothing: s in 0..1. A class weight is that of the label, as of the whole row.
        class_weight: [C] or [K, C]; sample_weight: [B] or [K, B]; expert_weight: [K].
        soft_target: [B, C], probabilities in place of ``target`` within the cross-entropy; the weights and ``correct``
            still go by ``target``. Excludes a margin, smoothing and a second label. On the reference alone.
        ensemble: adds ``ensemble_weight`` times the loss of the mean or the sum of the experts' row logits and margins,
            as one more expert of weight 1; a bias, margin, scale or weight by expert excludes ``scale`` [K, C].
        class_mask: bool [B, C], such as :func:`hardest_classes` finds; the targets are among the classes it keeps.
        masked: what becomes of the other classes: ``"zero"``: their row logit is 0, without gradient, as in the
            published NCL; ``"exclude"``: they are out of every softmax; ``"partial"``: only the sum over classes of the
            divergence leaves them out, as in NCL++.
        kl: a divergence to add.
        return_terms: also return float32 [2], detached: the cross-entropy and the divergence, weights applied.
        return_rows: also return :class:`ExpertRows`.
        backend: ``None`` (the fastest that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``. The fused
            kernels take at most eight experts, no soft target, and no gradient but that of the logits.

    Returns:
        The loss, a scalar or [K, B] (float64 for float64 logits, else float32), differentiable with respect to the
        logits; on the reference also to bias, margin, scale, weights and a teacher that is not detached. With
        ``return_terms`` and ``return_rows`` a tuple (loss, terms, rows) of what is asked for.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device, name or combination of arguments.
        IndexError: a target out of range (CPU, eager).
        RuntimeError: the named backend cannot run.

    Source: the losses of LDAM-DRW, logit adjustment, RIDE, SADE, BalPoE, MDCS, NCL, ResLT and others are cases of this
    one; ``docs/methods.md`` names them.
    """
    first, shape = check_logits(_NAME, logits)
    experts, _, classes = shape
    _check_target(_NAME, "target", target, first, shape)
    _check_choice(_NAME, "reduction", reduction, REDUCTIONS)
    _check_choice(_NAME, "masked", masked, MASKS)
    lam_number, lam_tensor = 1.0, None
    if (target_b is None) != (lam is None):
        raise ValueError(f"{_NAME}: target_b and lam come together, got one of them")
    if target_b is not None:
        _check_target(_NAME, "target_b", target_b, first, shape)
        lam_number, lam_tensor = _number_or(_NAME, "lam", lam, first, ((), (shape[1],)), default=1.0)
    smoothing, scale_number, scale_tensor = 0.0, 1.0, None
    of_classes, of_rows = ((classes,), (experts, classes)), ((shape[1],), (experts, shape[1]))
    if label_smoothing != 0.0:
        (smoothing,) = check_finite(_NAME, label_smoothing=label_smoothing)
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"{_NAME}: label_smoothing must lie in 0..1, got {label_smoothing}")
    if not isinstance(scale, float) or scale != 1.0:
        scale_number, scale_tensor = _number_or(_NAME, "scale", scale, first, of_classes, default=1.0)
    masked_kind = "" if class_mask is None else masked
    tensors = ExpertTensors(
        target,
        target_b,
        lam_tensor,
        _optional(_NAME, "bias", bias, first, of_classes),
        scale_tensor,
        _optional(_NAME, "margin", margin, first, of_classes),
        _optional(_NAME, "class_weight", class_weight, first, of_classes),
        _optional(_NAME, "sample_weight", sample_weight, first, of_rows),
        _optional(_NAME, "expert_weight", expert_weight, first, ((experts,),)),
        None if class_mask is None else _checked_mask(_NAME, class_mask, first, shape),
    )
    if soft_target is not None:
        soft_target = _optional(_NAME, "soft_target", soft_target, first, (shape[1:],))
        if margin is not None or target_b is not None or smoothing != 0.0:
            raise ValueError(f"{_NAME}: soft_target excludes margin, target_b and label_smoothing")
    options = ExpertOptions(True, lam_number, scale_number, smoothing, reduction, masked_kind, rows=return_rows)
    if kl is not None:
        if reduction == "none":
            raise ValueError(f"{_NAME}: kl needs a reduction other than 'none'; expert_kl adds it to rows of your own")
        tensors, options = _with_divergence(_NAME, kl, tensors, options, logits, first, shape)
    if ensemble is not None:
        _check_choice(_NAME, "ensemble", ensemble, ("mean", "sum"))
        (ensemble_weight,) = check_finite(_NAME, ensemble_weight=ensemble_weight)
        loss, terms, rows = _run(_OPERATOR, backend, logits, soft_target, tensors, options)
        extra = _of_ensemble(ensemble, backend, logits, soft_target, tensors, options)
        loss, terms = (
            loss + ensemble_weight * extra,
            terms + terms.new_tensor([1.0, 0.0]) * (ensemble_weight * extra.detach()),
        )
    else:
        loss, terms, rows = _run(_OPERATOR, backend, logits, soft_target, tensors, options)
    if not return_terms and not return_rows:
        return loss
    results: list[Any] = [loss]
    if return_terms:
        results.append(terms)
    if return_rows:
        row_loss, log_sum_exp, correct, p_target = rows.unbind(0)
        results.append(ExpertRows(row_loss, log_sum_exp, correct != 0, p_target))
    return tuple(results)


def expert_kl(
    logits: Tensor | Sequence[Tensor],
    teacher: str | Tensor | Sequence[Tensor] = OTHERS,
    *,
    temperature: float | Numbers = 1.0,
    detach: bool | None = None,
    weight: float | Tensor = 1.0,
    gate: Literal["teacher_correct"] | Tensor | None = None,
    reduction: str = "batchmean",
    weight_of: Literal["teacher", "student"] = "teacher",
    target: Tensor | None = None,
    class_mask: Tensor | None = None,
    masked: Literal["zero", "exclude", "partial"] = "zero",
    eps: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Compute the divergences between teachers and the K experts, as students.

        L = sum over teachers t and students k of  reduce_b  w g T^2 KL(softmax(t / T) || softmax(z_k / T))

    where T^2 is the square of the mean temperature. All pairs of experts cost O(K). Reductions: ``"batchmean"`` divides
    by B, ``"mean"`` by B C, ``"gated_mean"`` by the sum of the gates of a teacher or student, expert by expert, and
    gives 0 where that is 0.

    Args:
        logits: as of :func:`expert_loss`.
        teacher: ``"others"``: every other expert; ``"mean"``: the mean of the experts' logits; ``"view"``: the batch
            holds two views of B / 2 images, one after the other, and every expert's first view teaches its second; or
            logits [B, C] or [K, B, C] (or K tensors [B, C]) of another network, an average or a view.
        temperature: T, a positive number, or [C] for one a class.
        detach: whether the teacher is a constant. Default: only ``"others"`` gets a gradient. Any other teacher gets one
            on the reference alone.
        weight: a number of either sign, [], [B] or [K, B]; with two views [B / 2] or [K, B / 2].
        gate: numbers or bool of these shapes, which also count in ``"gated_mean"``; or ``"teacher_correct"``: 1 where
            the largest of the teacher's row logits is at ``target``, else 0.
        weight_of: to whom rows of weights and gates [K, B] belong among ``"others"``; elsewhere they are the student's.
        target: int64 [B], for ``gate="teacher_correct"``.
        class_mask, masked: as of :func:`expert_loss`.
        eps: added to a student's probability within the logarithm, as in the published NCL (1e-9); ``"others"`` with a
            gradient through the teacher on the CPU backend and the reference, else on the reference alone.
        backend: as of :func:`expert_loss`.

    Returns:
        The loss, a scalar (float64 for float64 logits, else float32), differentiable with respect to the logits.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`expert_loss`.

    Source: Wang et al., RIDE, ICLR 2021 (mean); Li et al., NCL, CVPR 2022 (others); Zhao et al., MDCS, ICCV 2023
    (view).
    """
    first, shape = check_logits(_KL_NAME, logits)
    _check_choice(_KL_NAME, "masked", masked, MASKS)
    if target is not None:
        _check_target(_KL_NAME, "target", target, first, shape)
    tensors = ExpertTensors(
        target, class_mask=None if class_mask is None else _checked_mask(_KL_NAME, class_mask, first, shape)
    )
    options = ExpertOptions(False, masked="" if class_mask is None else masked)
    kl = ExpertKL(teacher, temperature, detach, weight, gate, reduction, weight_of, eps)  # type: ignore[arg-type]
    tensors, options = _with_divergence(_KL_NAME, kl, tensors, options, logits, first, shape)
    loss, _, _ = _run(_KL_OPERATOR, backend, logits, None, tensors, options)
    return loss


def _with_divergence(
    op: str,
    kl: ExpertKL,
    tensors: ExpertTensors,
    options: ExpertOptions,
    logits: Tensor | Sequence[Tensor],
    first: Tensor,
    shape: tuple[int, int, int],
) -> tuple[ExpertTensors, ExpertOptions]:
    """The call with the divergence added, checked."""
    experts, batch, classes = shape
    teacher: Tensor | None = None
    if isinstance(kl.teacher, str):
        _check_choice(op, "teacher", kl.teacher, (OTHERS, MEAN, VIEW))
        kind = kl.teacher
    else:
        kind, teacher = GIVEN, _checked_teacher(op, kl.teacher, first, shape)
    if kind == VIEW and batch % 2:
        raise ValueError(f"{op}: teacher 'view' needs an even batch, two views of the same images, got B={batch}")
    _check_choice(op, "reduction of the divergence", kl.reduction, KL_REDUCTIONS)
    _check_choice(op, "weight_of", kl.weight_of, ("teacher", "student"))
    (eps,) = check_finite(op, eps=kl.eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    rows = batch // 2 if kind == VIEW else batch
    of_rows = ((rows,), (experts, rows))
    temperature, of_classes = _number_or(op, "temperature", kl.temperature, first, ((classes,),), default=1.0)
    if temperature <= 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    weight, weight_tensor = _number_or(op, "weight", kl.weight, first, ((), *of_rows), default=1.0)
    gated = isinstance(kl.gate, str)
    if gated:
        _check_choice(op, "gate", kl.gate, ("teacher_correct",))
        if tensors.target is None:
            raise ValueError(f"{op}: gate 'teacher_correct' needs a target")
        if kind == OTHERS and kl.weight_of == "student":
            raise ValueError(f"{op}: gate 'teacher_correct' needs weight_of='teacher' among others")
    gate = None if gated or kl.gate is None else _optional(op, "gate", _as_numbers(kl.gate), first, of_rows)
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


def _of_ensemble(
    kind: str,
    backend: str | None,
    logits: Tensor | Sequence[Tensor],
    soft_target: Tensor | None,
    tensors: ExpertTensors,
    options: ExpertOptions,
) -> Tensor:
    """The loss of the mean or the sum of the experts' row logits, as of a single expert."""
    experts = logits.shape[0] if isinstance(logits, Tensor) else len(logits)
    by_expert = [name for name in ("scale", "class_weight", "sample_weight") if _by_expert(getattr(tensors, name))]
    if by_expert or (tensors.target is not None and tensors.target.dim() == 2):
        raise ValueError(
            f"{_NAME}: ensemble has one row of all experts, got {', '.join(by_expert) or 'target'} by expert"
        )
    if options.reduction == "none":
        raise ValueError(f"{_NAME}: ensemble needs a reduction other than 'none'")
    share = 1.0 / experts if kind == "mean" else 1.0

    def joined(value: Tensor | None) -> Tensor | None:
        """What the experts add up to, of a value that they share or that each has."""
        if value is None:
            return None
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return wide.sum(0) * share if value.dim() == 2 else wide * (experts * share)

    of_all = stacked(logits)
    one = of_all.to(accumulation_dtype(of_all.dtype)).sum(0, keepdim=True)
    of_one = tensors._replace(
        bias=joined(tensors.bias),
        margin=joined(tensors.margin),
        expert_weight=None,
        teacher=None,
        temperature=None,
        kl_weight=None,
        gate=None,
    )
    loss, _, _ = _run(
        _OPERATOR, backend, one * share, soft_target, of_one, options._replace(teacher=NO_TEACHER, rows=False)
    )
    return loss


def _by_expert(value: Tensor | None) -> bool:
    return value is not None and value.dim() == 2


# ---- checks


def _check_choice(op: str, name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_target(op: str, name: str, target: object, first: Tensor, shape: tuple[int, int, int]) -> None:
    if isinstance(target, Tensor) and target.dim() == 2 and target.shape == shape[:2]:
        check_target(
            op,
            target.flatten() if target.is_contiguous() else target.reshape(-1),
            first,
            (1, target.numel(), shape[2]),
            name=name,
        )
    else:
        check_target(op, target, first, shape, name=name)  # type: ignore[arg-type]


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in shapes)


def _as_numbers(value: object) -> object:
    """A bool tensor as the numbers 0 and 1."""
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype == torch.bool else value


def _optional(op: str, name: str, value: object, first: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor | None:
    """A tensor of one of these shapes; lists and arrays are copied to the device of the logits."""
    if value is None:
        return None
    tensor = as_tensor(value, first.device)
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise TypeError(f"{op}: {name} must be a tensor, list or array of numbers {_shapes(shapes)}, got {kind}")
    check_dense(op, name, tensor)
    if tensor.dtype not in FLOAT_DTYPES and tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{op}: {name} must be floating point or integer {_shapes(shapes)}, got {describe(tensor)}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{op}: {name} must be {_shapes(shapes)}, got {describe(tensor)}")
    check_device(op, name, tensor, first, "logits")
    return tensor


def _number_or(
    op: str, name: str, value: object, first: Tensor, shapes: Sequence[tuple[int, ...]], *, default: float
) -> tuple[float, Tensor | None]:
    """A number, or the default and a tensor of one of these shapes."""
    if isinstance(value, (int, float)) or (not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0):
        (number,) = check_finite(op, **{name: value})
        return number, None
    if isinstance(value, Tensor) and value.dim() == 0 and () not in shapes:
        shapes, value = (*shapes, (1,)), value.reshape(1)
        tensor = _optional(op, name, value, first, shapes)
        assert tensor is not None
        return default, tensor.expand(shapes[0])
    return default, _optional(op, name, value, first, shapes)


def _checked_mask(op: str, mask: object, first: Tensor, shape: tuple[int, int, int]) -> Tensor:
    expected = f"bool [B={shape[1]}, C={shape[2]}]"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: class_mask must be a tensor {expected}, got {type(mask).__name__}")
    check_dense(op, "class_mask", mask)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape[1:]:
        error = TypeError if mask.dtype != torch.bool else ValueError
        raise error(f"{op}: class_mask must be {expected}, got {describe(mask)}")
    check_device(op, "class_mask", mask, first, "logits")
    return mask


def _checked_teacher(op: str, teacher: object, first: Tensor, shape: tuple[int, int, int]) -> Tensor:
    experts, batch, classes = shape
    expected = f"[B={batch}, C={classes}], [K={experts}, B, C] or K tensors [B, C]"
    if isinstance(teacher, list | tuple) and all(isinstance(one, Tensor) and one.dim() == 2 for one in teacher):
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


# ---- the records


def _run(
    operator: Any,
    backend: str | None,
    logits: Tensor | Sequence[Tensor],
    soft_target: Tensor | None,
    tensors: ExpertTensors,
    options: ExpertOptions,
) -> Any:
    return operator.run(backend, logits, soft_target, tensors, options)


_SCHEMA = f"(Tensor logits, Tensor? soft_target, {TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)"


def _flat(soft_target: Tensor | None, tensors: ExpertTensors, options: ExpertOptions) -> Sequence[Any]:
    return (soft_target, *tensors, *options)


_OPERATOR, _KL_OPERATOR = (
    loss_operator(
        name, _SCHEMA, composite_expert_loss, fused=fused_expert_loss, refuses=refuses_expert_loss, flat=_flat
    )
    for name in (_NAME, _KL_NAME)
)
