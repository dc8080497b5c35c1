"""The generalised expert loss: cross-entropy with margins, weights and two labels, and divergences between experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype, check_finite, check_logits, stacked
from shike_fast.ops._expert_call import MASKS, NO_TEACHER, REDUCTIONS, ExpertOptions, ExpertTensors, by_expert
from shike_fast.ops._expert_checks import (
    ExpertKL,
    Numbers,
    check_choice,
    check_labels,
    checked_mask,
    number_or,
    optional,
    with_divergence,
)
from shike_fast.ops._expert_fused import expert_operator

_NAME = "expert_loss"


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
        soft_target: [B, C] or [K, B, C], probabilities in place of ``target`` within the cross-entropy; the weights and
            ``correct`` still go by ``target``. Excludes a margin, smoothing and a second label. On the reference alone.
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
            kernels take no soft target, no gradient but that of the logits, and more than eight experts by groups.

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
    check_labels(_NAME, "target", target, first, shape)
    check_choice(_NAME, "reduction", reduction, REDUCTIONS)
    check_choice(_NAME, "masked", masked, MASKS)
    lam_number, lam_tensor = 1.0, None
    if (target_b is None) != (lam is None):
        raise ValueError(f"{_NAME}: target_b and lam come together, got one of them")
    if target_b is not None:
        check_labels(_NAME, "target_b", target_b, first, shape)
        lam_number, lam_tensor = number_or(_NAME, "lam", lam, first, ((), (shape[1],)), default=1.0)
    smoothing, scale_number, scale_tensor = 0.0, 1.0, None
    of_classes, of_rows = ((classes,), (experts, classes)), ((shape[1],), (experts, shape[1]))
    if label_smoothing != 0.0:
        (smoothing,) = check_finite(_NAME, label_smoothing=label_smoothing)
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"{_NAME}: label_smoothing must lie in 0..1, got {label_smoothing}")
    if not isinstance(scale, float) or scale != 1.0:
        scale_number, scale_tensor = number_or(_NAME, "scale", scale, first, of_classes, default=1.0)
    masked_kind = "" if class_mask is None else masked
    tensors = ExpertTensors(
        target,
        target_b,
        lam_tensor,
        optional(_NAME, "bias", bias, first, of_classes),
        scale_tensor,
        optional(_NAME, "margin", margin, first, of_classes),
        optional(_NAME, "class_weight", class_weight, first, of_classes),
        optional(_NAME, "sample_weight", sample_weight, first, of_rows),
        optional(_NAME, "expert_weight", expert_weight, first, ((experts,),)),
        None if class_mask is None else checked_mask(_NAME, class_mask, first, shape),
    )
    if soft_target is not None:
        soft_target = optional(_NAME, "soft_target", soft_target, first, (shape[1:], shape))
        if margin is not None or target_b is not None or smoothing != 0.0:
            raise ValueError(f"{_NAME}: soft_target excludes margin, target_b and label_smoothing")
    options = ExpertOptions(True, lam_number, scale_number, smoothing, reduction, masked_kind, rows=return_rows)
    if kl is not None:
        if reduction == "none":
            raise ValueError(f"{_NAME}: kl needs a reduction other than 'none'; expert_kl adds it to rows of your own")
        tensors, options = with_divergence(_NAME, kl, tensors, options, first, shape)
    if ensemble is not None:
        check_choice(_NAME, "ensemble", ensemble, ("mean", "sum"))
        (ensemble_weight,) = check_finite(_NAME, ensemble_weight=ensemble_weight)
        loss, terms, rows = _OPERATOR.run(backend, logits, soft_target, tensors, options)
        extra = _of_ensemble(ensemble, backend, logits, soft_target, tensors, options)
        loss, terms = (
            loss + ensemble_weight * extra,
            terms + terms.new_tensor([1.0, 0.0]) * (ensemble_weight * extra.detach()),
        )
    else:
        loss, terms, rows = _OPERATOR.run(backend, logits, soft_target, tensors, options)
    if not return_terms and not return_rows:
        return loss
    results: list[Any] = [loss]
    if return_terms:
        results.append(terms)
    if return_rows:
        row_loss, log_sum_exp, correct, p_target = rows.unbind(0)
        results.append(ExpertRows(row_loss, log_sum_exp, correct != 0, p_target))
    return tuple(results)


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
    of_one_row = ("scale", "class_weight", "sample_weight", "target", "target_b")
    of_each = [name for name in of_one_row if by_expert(name, getattr(tensors, name))]
    if soft_target is not None and soft_target.dim() == 3:
        of_each.append("soft_target")
    if of_each:
        raise ValueError(f"{_NAME}: ensemble has one row of all experts, got {', '.join(of_each)} by expert")
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
    of_options = options._replace(teacher=NO_TEACHER, rows=False)
    loss, _, _ = _OPERATOR.run(backend, one * share, soft_target, of_one, of_options)
    return loss


_OPERATOR = expert_operator(_NAME)
