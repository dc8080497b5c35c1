"""What a call of the generalised expert loss consists of, and what follows from it for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("mean", "mean/K", "weighted_mean", "global_weighted_mean", "none")
KL_REDUCTIONS = ("batchmean", "mean", "gated_mean")
MASKS = ("zero", "exclude", "partial")
NO_TEACHER, OTHERS, MEAN, GIVEN, VIEW = "", "others", "mean", "given", "view"


class ExpertTensors(NamedTuple):
    """The tensors of a call beside the logits, checked; K experts, B rows, C classes."""

    target: Tensor | None = None  # int64 [B] or [K, B]; None: no cross-entropy, and no gate by the teacher's answer
    target_b: Tensor | None = None  # int64 [B] or [K, B], the second label
    lam: Tensor | None = None  # [] or [B], the weight of `target`; 1 - lam is that of `target_b`
    bias: Tensor | None = None  # [C] or [K, C]
    scale: Tensor | None = None  # [C] or [K, C]; None: `ExpertOptions.scale`
    margin: Tensor | None = None  # [C] or [K, C]
    class_weight: Tensor | None = None  # [C] or [K, C]
    sample_weight: Tensor | None = None  # [B] or [K, B]
    expert_weight: Tensor | None = None  # [K]
    class_mask: Tensor | None = None  # bool [B, C]
    teacher: Tensor | None = None  # [B, C] or [K, B, C]
    temperature: Tensor | None = None  # [C]; None: `ExpertOptions.temperature`
    kl_weight: Tensor | None = None  # [], [B] or [K, B]
    gate: Tensor | None = None  # [B] or [K, B], numbers


class ExpertOptions(NamedTuple):
    """The numbers and names of a call."""

    cross_entropy: bool  # False: the divergence alone
    lam: float = 1.0
    scale: float = 1.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    masked: str = ""  # of MASKS
    teacher: str = NO_TEACHER
    temperature: float = 1.0
    kl_weight: float = 1.0
    kl_reduction: str = "batchmean"
    by_student: bool = False  # whom a weight or gate [K, B] belongs to; else to the teacher
    gated: bool = False  # by whether the teacher's answer is right
    detach: bool = True
    adjusted: bool = True  # the divergence takes scale * z + bias, else z
    eps: float = 0.0  # within the logarithm of a student's probability
    rows: bool = False  # what is known of the rows is wanted


TENSORS = "Tensor? target, " + ", ".join(f"Tensor? {name}" for name in ExpertTensors._fields[1:])
OPTIONS = (
    "bool cross_entropy, float lam_number, float scale_number, float label_smoothing, str reduction, str masked, "
    "str teacher_kind, float temperature_number, float kl_factor, str kl_reduction, bool by_student, bool gated, "
    "bool detach, bool adjusted, float eps, bool rows"
)


def split(args: Sequence[Any]) -> tuple[ExpertTensors, ExpertOptions]:
    """The tensors and the options of a call from one sequence of arguments, as operators pass it."""
    count = len(ExpertTensors._fields)
    return ExpertTensors(*args[:count]), ExpertOptions(*args[count : count + len(ExpertOptions._fields)])


def by_expert(name: str, value: Tensor | None) -> bool:
    """Whether a field of :class:`ExpertTensors` has a part for each expert."""
    shared = {"expert_weight": 0, "class_mask": 2, "teacher": 2}.get(name, 1)  # dimensions of what all share
    return value is not None and value.dim() > shared


def of_experts(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] or [K, C] (or [B] or [K, B]) as [K or 1, ...] in the accumulation dtype."""
    value = value.to(dtype)
    return value if value.dim() == 2 else value.unsqueeze(0)


def soft_rows(log_p: Tensor, soft: Tensor) -> Tensor:
    """-sum_c soft[c] log p[c], where 0 log 0 = 0, [K, B], from log p [K, B, C] and soft [B, C] or [K, B, C]."""
    return -(soft * torch.where((soft == 0) & (log_p == -torch.inf), 0.0, log_p)).sum(2)


def at_target(of_classes: Tensor, target: Tensor) -> Tensor:
    """The entries of [K or 1, C] at the targets [K or 1, B], as [K or 1, B]."""
    if of_classes.shape[0] == target.shape[0]:
        return of_classes.gather(1, target)
    experts = max(of_classes.shape[0], target.shape[0])
    return of_classes.expand(experts, -1).gather(1, target.expand(experts, -1))


def row_weights(
    tensors: ExpertTensors, options: ExpertOptions, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """What the rows' losses of either label are multiplied by, each [K, B]; their sum is the loss.

    With ``reduction="none"`` they are without the reduction.
    """
    experts, batch, _ = shape
    assert tensors.target is not None
    one = torch.ones((), dtype=dtype, device=tensors.target.device)
    lam: Tensor | None = None
    if tensors.target_b is not None:
        lam = one * options.lam if tensors.lam is None else tensors.lam.to(dtype)

    def reduced(target: Tensor, share: Tensor | None) -> Tensor:
        weight = one
        if tensors.class_weight is not None:
            labels = target if target.dim() == 2 else target.unsqueeze(0)
            weight = weight * at_target(of_experts(tensors.class_weight, dtype), labels)
        if tensors.sample_weight is not None:
            weight = weight * of_experts(tensors.sample_weight, dtype)
        weight = weight.expand(experts, batch)
        if options.reduction == "global_weighted_mean":
            weight = weight if tensors.expert_weight is None else weight * tensors.expert_weight.to(dtype).unsqueeze(1)
            weight = share_of(weight, weight.sum())
        elif options.reduction == "weighted_mean":
            weight = share_of(weight, weight.sum(1, keepdim=True))
        elif options.reduction in ("mean", "mean/K"):
            weight = weight / (max(batch, 1) * (experts if options.reduction == "mean/K" else 1))
        if tensors.expert_weight is not None and options.reduction != "global_weighted_mean":
            weight = weight * tensors.expert_weight.to(dtype).unsqueeze(1)
        return weight if share is None else weight * share

    weight_a = reduced(tensors.target, lam)
    weight_b = None if tensors.target_b is None or lam is None else reduced(tensors.target_b, 1 - lam)
    return weight_a, weight_b


def share_of(weight: Tensor, total: Tensor) -> Tensor:
    """weight / total, and 0 where the total is 0."""
    return torch.where(total == 0, torch.zeros_like(weight), weight / torch.where(total == 0, 1, total))


def kl_row_weights(tensors: ExpertTensors, options: ExpertOptions, logits: Tensor, correct: Tensor | None) -> Tensor:
    """What the divergences are multiplied by, [K, B], with the square of the temperature; their sum is the loss.

    A row is one of a teacher, or of a student. Of two views it is an image: [K, B / 2].

    Args:
        logits: [K, B, C] in the accumulation dtype; its shape, dtype and device count.
        correct: bool, likewise: whether the teacher's answer is right, if ``options.gated``.
    """
    experts, batch, classes = logits.shape
    rows = batch // 2 if options.teacher == VIEW else batch
    gate = None if tensors.gate is None else of_experts(tensors.gate, logits.dtype).expand(experts, rows)
    if correct is not None:
        gate = correct.to(logits.dtype) if gate is None else gate * correct.to(logits.dtype)
    weight = logits.new_full((), options.kl_weight)
    if tensors.kl_weight is not None:
        weight = weight * tensors.kl_weight.to(logits.dtype)
    weight = (weight if gate is None else weight * gate).expand(experts, rows)
    if options.kl_reduction == "gated_mean" and gate is not None:
        weight = share_of(weight, gate.sum(1, keepdim=True))
    else:
        weight = weight / (max(rows, 1) * (classes if options.kl_reduction == "mean" else 1))
    mean = options.temperature if tensors.temperature is None else tensors.temperature.to(logits.dtype).mean()
    return weight * (mean * mean)


def is_plain_divergence(tensors: ExpertTensors, options: ExpertOptions) -> bool:
    """Whether the divergence takes the very logits of the cross-entropy, so that both share their exponentials."""
    same_logits = options.adjusted or (tensors.bias is None and tensors.scale is None and options.scale == 1.0)
    return same_logits and tensors.temperature is None and options.temperature == 1.0
