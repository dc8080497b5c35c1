"""The generalised expert loss in plain PyTorch: what every other backend is compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype
from shike_fast.ops._expert_call import (
    GIVEN,
    MEAN,
    NO_TEACHER,
    OTHERS,
    VIEW,
    ExpertOptions,
    ExpertTensors,
    at_target,
    kl_row_weights,
    of_experts,
    row_weights,
    soft_rows,
    split,
)

# Only element-wise operators and reductions, on float32 or float64: none of them is in autocast's lower-precision list.


def composite_expert_loss(logits: Tensor, soft_target: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its terms [2] (cross-entropy, divergence) and the rows [4, K, B]; see ``ExpertRows``."""
    tensors, options = split(args)
    z = logits.to(accumulation_dtype(logits.dtype))  # [K, B, C]
    x = _masked(row_logits(z, tensors, options), tensors, options)
    target = None if tensors.target is None else _of_experts(tensors.target, x)
    cross_entropy = divergence = z.new_zeros(())
    loss = cross_entropy
    rows = [z.new_zeros(z.shape[:2])] * 4
    if options.cross_entropy:
        assert target is not None
        ends = _cross_entropy(x, target, soft_target, tensors, options)
        loss = ends.weighted if options.reduction == "none" else ends.weighted.sum()
        cross_entropy = ends.weighted.sum()
        log_sum = x.logsumexp(2)
        p_target = (x.gather(2, target.unsqueeze(2)).squeeze(2) - log_sum).exp()
        correct = x.argmax(2) == target
        rows = [ends.unweighted, log_sum, correct.to(z.dtype), p_target]
    if options.teacher != NO_TEACHER:
        of_rows = _divergence(x if options.adjusted else _masked(z, tensors, options), target, tensors, options)
        divergence = of_rows.sum()
        loss = loss + divergence
    terms = torch.stack([cross_entropy.detach(), divergence.detach()]).to(torch.float32)
    return loss, terms, torch.stack([row.detach() for row in rows])


def row_logits(z: Tensor, tensors: ExpertTensors, options: ExpertOptions) -> Tensor:
    """scale * z + bias, the margin left out."""
    if tensors.scale is not None:
        z = z * of_experts(tensors.scale, z.dtype).unsqueeze(1)
    elif options.scale != 1.0:
        z = z * options.scale
    return z if tensors.bias is None else z + of_experts(tensors.bias, z.dtype).unsqueeze(1)


def _masked(x: Tensor, tensors: ExpertTensors, options: ExpertOptions) -> Tensor:
    if tensors.class_mask is None or options.masked == "partial":
        return x
    return torch.where(tensors.class_mask, x, 0.0 if options.masked == "zero" else -torch.inf)


def _of_experts(target: Tensor, x: Tensor) -> Tensor:
    """[K, B]"""
    return (target if target.dim() == 2 else target.unsqueeze(0)).expand(x.shape[0], -1)


class _Ends(NamedTuple):
    unweighted: Tensor  # [K, B], with the shares of the two labels
    weighted: Tensor


def _cross_entropy(
    x: Tensor, target: Tensor, soft_target: Tensor | None, tensors: ExpertTensors, options: ExpertOptions
) -> _Ends:
    weight, weight_b = row_weights(tensors, options, tuple(x.shape), x.dtype)  # type: ignore[arg-type]
    if soft_target is not None:
        row = soft_rows(x.log_softmax(2), soft_target.to(x.dtype))
        return _Ends(row, weight * row)
    row = _row_loss(x, target, tensors, options)
    if tensors.target_b is None:
        return _Ends(row, weight * row)
    row_b = _row_loss(x, _of_experts(tensors.target_b, x), tensors, options)
    lam = options.lam if tensors.lam is None else tensors.lam.to(x.dtype)
    assert weight_b is not None
    return _Ends(lam * row + (1 - lam) * row_b, weight * row + weight_b * row_b)


def _row_loss(x: Tensor, target: Tensor, tensors: ExpertTensors, options: ExpertOptions) -> Tensor:
    """-(1 - s) log p[y] - s mean_c log p[c], where p has the margin at y, [K, B]."""
    if tensors.margin is not None:
        margin = at_target(of_experts(tensors.margin, x.dtype), target).unsqueeze(2)  # [K, B, 1]
        x = x.scatter(2, target.unsqueeze(2), x.gather(2, target.unsqueeze(2)) - margin)
    log_p = x.log_softmax(2)
    at_label = -log_p.gather(2, target.unsqueeze(2)).squeeze(2)
    smoothing = options.label_smoothing
    return at_label if smoothing == 0.0 else (1.0 - smoothing) * at_label - smoothing * log_p.mean(2)


def _divergence(x: Tensor, target: Tensor | None, tensors: ExpertTensors, options: ExpertOptions) -> Tensor:
    """The weighted divergences, [K, B] or for two views [K, B / 2]: rows of teachers, or of students."""
    temperature = options.temperature if tensors.temperature is None else tensors.temperature.to(x.dtype)
    images = x.shape[1] // 2
    if options.teacher == OTHERS:
        teacher, student = x, x
    elif options.teacher == MEAN:
        teacher, student = x.mean(0, keepdim=True), x
    elif options.teacher == VIEW:
        teacher, student = x[:, :images], x[:, images:]
        target = None if target is None else target[:, :images]
    else:
        assert options.teacher == GIVEN and tensors.teacher is not None
        teacher, student = tensors.teacher.to(x.dtype), x
        teacher = teacher if teacher.dim() == 3 else teacher.unsqueeze(0)
        teacher = row_logits(teacher, tensors, options) if options.adjusted else teacher
        teacher = _masked(teacher, tensors, options)
    correct = None
    if options.gated:
        assert target is not None
        correct = teacher.argmax(2) == target  # [K, B]; a teacher of all experts is asked once for each
    weight = kl_row_weights(tensors, options, x, correct)
    log_t = ((teacher.detach() if options.detach else teacher) / temperature).log_softmax(2)
    log_s = (student / temperature).log_softmax(2)
    if options.eps != 0.0:
        log_s = (log_s.exp() + options.eps).log()
    t = log_t.exp()
    counts = t != 0  # NaN counts
    if options.masked == "partial":
        assert tensors.class_mask is not None
        counts = counts & (tensors.class_mask[:images] if options.teacher == VIEW else tensors.class_mask)
    t = torch.where(counts, t, 0.0)
    log_t = torch.where(counts, log_t, 0.0)  # 0 log 0 = 0
    if options.teacher != OTHERS:
        return weight * (t * (log_t - torch.where(counts, log_s, 0.0))).sum(2)
    others = x.shape[0] - 1
    entropy = (t * log_t).sum(2)  # [K, B], negative
    if options.by_student:
        of_all = torch.where(counts.any(0), log_s, 0.0)
        return weight * (entropy.sum(0) - entropy - ((t.sum(0) - t) * of_all).sum(2))
    of_others = torch.where(counts, log_s.sum(0) - log_s, 0.0)
    return weight * (others * entropy - (t * of_others).sum(2))
