"""The fused kernels of the generalised expert loss as an operator, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops import _native_expert, _triton_expert
from shike_fast.ops._checks import accumulation_dtype, as_list
from shike_fast.ops._dispatch import MAX_EXPERTS, Operator
from shike_fast.ops._expert_call import (
    GIVEN,
    MEAN,
    NO_TEACHER,
    OPTIONS,
    OTHERS,
    TENSORS,
    VIEW,
    ExpertOptions,
    ExpertTensors,
    by_expert,
    row_weights,
    share_of,
)
from shike_fast.ops._expert_reference import composite_expert_loss, row_logits
from shike_fast.ops._guards import is_plain, materialised
from shike_fast.ops._losses import fused_loss, loss_operator


def _kernels(backend: str) -> ModuleType:
    return _triton_expert if backend == "triton" else _native_expert


_FUSED = fused_loss(
    "expert_loss_fused",
    TENSORS,
    OPTIONS,
    shown=2,
    forward=lambda *args: _kernels(args[-1]).expert_forward(*args[:-1]),
    backward=lambda *args, **kept: _kernels(args[-1]).expert_backward(*args[:-1], **kept),
    both=lambda *args: _native_expert.expert_both(*args[:-1]) if args[-1] == "cpu" else None,
    fake_forward=_native_expert.new_expert_results,
)
# The fields of numbers: all but labels, mask and teacher.
_NUMBERS = ExpertTensors._fields[2:9] + ExpertTensors._fields[11:]


def fused_expert_loss(
    backend: str,
    logits: Tensor | Sequence[Tensor],
    soft_target: None,
    tensors: ExpertTensors,
    options: ExpertOptions,
) -> Sequence[Tensor]:
    """The loss, its terms and the rows; all tensors beside the logits count as constants."""
    experts = as_list(logits)
    if len(logits) > MAX_EXPERTS:
        return _by_groups(backend, logits, tensors, options)
    dtype = accumulation_dtype(experts[0].dtype)
    ready: dict[str, Tensor] = {}
    for name, value in zip(_NUMBERS, tensors[2:9] + tensors[11:], strict=True):
        if value is None or (
            value.dtype == dtype
            and not value.requires_grad
            and value.dim() > 0
            and value.is_contiguous()
            and materialised(value) is value
        ):
            continue
        value = value.detach().to(dtype)
        if value.dim() == 0:  # one number for all rows, on the device
            halves = 2 if name == "kl_weight" and options.teacher == VIEW else 1
            value = value.expand(experts[0].shape[-2] // halves)
        ready[name] = materialised(value).contiguous()
    if tensors.class_mask is not None:
        ready["class_mask"] = materialised(tensors.class_mask).contiguous()
    if tensors.teacher is not None:
        teacher = tensors.teacher.detach()
        ready["teacher"] = teacher.to(dtype) if torch.float64 in (dtype, teacher.dtype) else teacher
    if ready:
        tensors = tensors._replace(**ready)
    if options.teacher == NO_TEACHER:
        return run_expert_loss(backend, experts, tensors, options)
    in_pass = options.teacher == OTHERS and options.kl_reduction != "gated_mean" and options.adjusted
    if options.gated and not in_pass:
        tensors, options = _with_gate(backend, experts, tensors, options)
    return run_expert_loss(backend, experts, tensors, options)


def groups_of(logits: Tensor | Sequence[Tensor]) -> list[Tensor | Sequence[Tensor]]:
    """The experts by groups that the kernels take."""
    if isinstance(logits, Tensor):
        return list(logits.split(MAX_EXPERTS))  # whose derivative joins the gradients in one copy
    return [logits[i : i + MAX_EXPERTS] for i in range(0, len(logits), MAX_EXPERTS)]


def _by_groups(
    backend: str, logits: Tensor | Sequence[Tensor], tensors: ExpertTensors, options: ExpertOptions
) -> Sequence[Tensor]:
    """The loss of more experts than the kernels take, each group with what belongs to its experts.

    The loss is a sum over the experts, and so is every divergence whose teacher is known before; what is not a sum,
    a mean over the experts, becomes a weight of each expert.
    """
    count = len(logits)
    dtype = accumulation_dtype(as_list(logits)[0].dtype)
    if options.teacher == MEAN:
        teacher = logits.to(dtype).mean(0) if isinstance(logits, Tensor) else torch.stack([*logits]).to(dtype).mean(0)
        tensors, options = tensors._replace(teacher=teacher.detach()), options._replace(teacher=GIVEN)
    if options.reduction in ("mean/K", "global_weighted_mean"):
        tensors = tensors._replace(expert_weight=_weight_of_experts(count, dtype, tensors, options))
        options = options._replace(reduction="mean" if options.reduction == "mean/K" else "weighted_mean")
    parts = []
    for i, group in enumerate(groups_of(logits)):
        span = slice(i * MAX_EXPERTS, i * MAX_EXPERTS + len(group))
        named = zip(tensors._fields, tensors, strict=True)
        own = {name: value[span] for name, value in named if value is not None and by_expert(name, value)}
        parts.append(fused_expert_loss(backend, group, None, tensors._replace(**own), options))
    losses, terms, rows = zip(*parts, strict=True)
    loss = torch.cat(losses) if options.reduction == "none" and options.cross_entropy else torch.stack(losses).sum()
    return loss, torch.stack(terms).sum(0), torch.cat(rows, 1) if options.rows else rows[0]


def _weight_of_experts(count: int, dtype: torch.dtype, tensors: ExpertTensors, options: ExpertOptions) -> Tensor:
    """What a mean over the experts makes of the weight of each, [K], where each has its sum or weighted mean."""
    assert tensors.target is not None
    if options.reduction == "mean/K":
        share = torch.full((count,), 1.0 / count, dtype=dtype, device=tensors.target.device)
        return share if tensors.expert_weight is None else share * tensors.expert_weight.to(dtype)
    shape = count, tensors.target.shape[-1], 0
    one_label = tensors._replace(target_b=None, lam=None)
    weight, _ = row_weights(one_label, options._replace(reduction="none"), shape, dtype)
    return share_of(weight.sum(1), weight.sum()).detach()


def run_expert_loss(
    backend: str, experts: list[Tensor], tensors: ExpertTensors, options: ExpertOptions
) -> Sequence[Tensor]:
    """The kernels, for at most eight experts and tensors as they take them: loss, terms and rows."""
    run = _FUSED.direct if is_plain(*experts, *tensors) else _FUSED.dispatched
    return run((experts, *tensors), (*options, backend))[:3]


def _with_gate(
    backend: str, experts: list[Tensor], tensors: ExpertTensors, options: ExpertOptions
) -> tuple[ExpertTensors, ExpertOptions]:
    """The call with the answers of the teachers, which a pass over these finds, as a gate."""
    target = tensors.target
    assert target is not None
    count, batch = (experts[0].shape[0] if experts[0].dim() == 3 else len(experts)), target.shape[-1]
    alone = ExpertTensors(target, *[None] * (len(ExpertTensors._fields) - 1))
    plain = options._replace(
        cross_entropy=True,
        lam=1.0,
        label_smoothing=0.0,
        reduction="mean",
        masked="" if options.masked == "partial" else options.masked,
        teacher=NO_TEACHER,
        gated=False,
        rows=True,
    )
    if plain.masked:
        alone = alone._replace(class_mask=tensors.class_mask)
    if options.adjusted:
        alone = alone._replace(bias=tensors.bias, scale=tensors.scale)
    else:
        plain = plain._replace(scale=1.0)
    asked: list[Tensor]
    if options.teacher == MEAN:
        wide = (experts[0] if experts[0].dim() == 3 else torch.stack(experts)).to(accumulation_dtype(experts[0].dtype))
        asked = [row_logits(wide, alone, plain).mean(0, keepdim=True)]
        alone, plain = alone._replace(bias=None, scale=None), plain._replace(scale=1.0)
    elif options.teacher == VIEW:
        images = batch // 2
        asked = [one[..., :images, :] for one in experts]
        mask = alone.class_mask
        alone = alone._replace(target=target[:images], class_mask=None if mask is None else mask[:images])
    elif options.teacher == OTHERS:
        asked = experts
    else:
        assert tensors.teacher is not None
        asked = [tensors.teacher.expand(count, *tensors.teacher.shape[-2:])]
    with torch.no_grad():
        asked = [one.detach() for one in asked]
        correct = run_expert_loss(backend, asked, alone, plain)[2][2]
    gate = correct.expand(count, -1)
    if tensors.gate is not None:
        gate = gate * tensors.gate
    return tensors._replace(gate=gate.contiguous()), options._replace(gated=False)


def refuses_expert_loss(
    backend: str,
    logits: Tensor | Sequence[Tensor],
    soft_target: Tensor | None,
    tensors: ExpertTensors,
    options: ExpertOptions,
) -> str | None:
    """Why the fused kernels of a backend do not take a call, or None."""
    if soft_target is not None:
        return "soft targets are a matter of the reference"
    if len(logits) > MAX_EXPERTS and (reason := _refuses_groups(tensors, options)) is not None:
        return f"more than {MAX_EXPERTS} experts with {reason} are a matter of the reference"
    if torch.is_grad_enabled():
        for i, value in enumerate(tensors):
            if value is not None and value.requires_grad and not (value is tensors.teacher and options.detach):
                return f"{tensors._fields[i]} requires a gradient, which only the reference computes"
    if options.teacher != NO_TEACHER:
        if tensors.target is not None and (
            tensors.target.dim() == 2 or (tensors.target_b is not None and tensors.target_b.dim() == 2)
        ):
            return "a divergence with a target an expert is a matter of the reference"
        if options.teacher != OTHERS and not options.detach:
            return "a gradient through this teacher is a matter of the reference"
        if options.eps != 0.0 or options.masked == "partial":
            if backend != "cpu":
                return "eps and masked='partial' are matters of the CPU backend and the reference"
            if options.teacher != OTHERS or options.by_student or options.gated:
                return "eps and masked='partial' with this teacher are a matter of the reference"
    if options.masked and options.label_smoothing != 0.0:
        return "label smoothing with a class mask is a matter of the reference"
    return None


def _refuses_groups(tensors: ExpertTensors, options: ExpertOptions) -> str | None:
    """What cannot be computed group by group, or None."""
    if options.teacher == OTHERS:
        return "a divergence between them"
    if (
        options.teacher == MEAN
        and options.adjusted
        and (by_expert("bias", tensors.bias) or by_expert("scale", tensors.scale))
    ):
        return "their mean as a teacher and a bias or scale by expert"
    if options.reduction == "global_weighted_mean" and None not in (tensors.target_b, tensors.class_weight):
        return "a global weighted mean over two labels"
    return None


_SCHEMA = f"(Tensor logits, Tensor? soft_target, {TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)"


def expert_operator(name: str) -> Operator:
    """The record of a public function that takes these arguments."""
    return loss_operator(
        name,
        _SCHEMA,
        composite_expert_loss,
        fused=fused_expert_loss,
        refuses=refuses_expert_loss,
        any_number_of_experts=True,
        flat=_flat,
    )


def _flat(soft_target: Tensor | None, tensors: ExpertTensors, options: ExpertOptions) -> Sequence[Any]:
    return (soft_target, *tensors, *options)
