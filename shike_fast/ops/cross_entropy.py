"""Cross-entropy summed over experts, with a bias on the logits and label smoothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shike_fast.ops._checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    accumulation_dtype,
    as_list,
    as_tensor,
    check_dense,
    check_device,
    check_finite,
    check_logits,
    check_soft_target,
    check_target,
    describe,
    is_soft,
)
from shike_fast.ops._dispatch import MAX_EXPERTS
from shike_fast.ops._expert_call import ExpertOptions, ExpertTensors, soft_rows
from shike_fast.ops._expert_fused import groups_of, run_expert_loss
from shike_fast.ops._guards import materialised
from shike_fast.ops._losses import loss_operator

if TYPE_CHECKING:
    import numpy as np

_NAME = "expert_cross_entropy"


def expert_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    bias: "Tensor | Sequence[float] | np.ndarray | None" = None,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Compute the cross-entropy of K experts, summed over the experts and averaged over the batch.

        L = Σ_k mean_b [ (1 − ε)·(−log p_k[y]) + ε/C · Σ_c (−log p_k[c]) ],     p_k = softmax(z_k + bias_k)

    float16 and bfloat16 logits are computed in float32, and only the finished gradient is rounded; autocast does not
    change the result.

    Args:
        logits: float16, bfloat16, float32 or float64 [K, B, C], or a list or tuple of K tensors [B, C]; any strides.
            K ≥ 1, C ≥ 2; B = 0 gives a loss of 0. The fused kernels take eight experts at a time.
        target: int64 [B], classes in 0..C-1. A value out of range raises on the CPU in eager mode; elsewhere it is as
            undefined as for ``torch.nn.functional.cross_entropy``. Or class probabilities t, floating point [B, C] or
            [K, B, C], as mixed images have: then −Σ_c t[c] log p_k[c] takes the place of −log p_k[y], on the reference
            alone.
        bias: floating point or integer [C] (the same for every expert) or [K, C], added to the logits in the
            accumulation dtype. A value of −inf takes the class out of the softmax; then ``label_smoothing`` must be 0
            for a finite loss. A list, tuple or array is copied to the device of the logits in every call.
        label_smoothing: ε in 0..1.
        backend: ``None`` (the fastest that can run), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        The loss, a scalar (float64 for float64 logits, else float32), differentiable with respect to the logits, the
        bias and probabilities.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device, ``label_smoothing`` or backend name.
        IndexError: a target out of range (CPU, eager).
        RuntimeError: the named backend cannot run.

    Source: with a bias of ``τ log n`` the logit-adjusted loss of Menon et al., "Long-tail learning via logit
    adjustment", ICLR 2021.
    """
    first, shape = check_logits(_NAME, logits)
    check_either_target(_NAME, target, first, shape)
    checked_bias = None if bias is None else _checked_bias(as_tensor(bias, first.device), first, shape)
    (smoothing,) = check_finite(_NAME, label_smoothing=label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"{_NAME}: label_smoothing must lie in 0..1, got {label_smoothing}")
    loss: Tensor = _OPERATOR.run(backend, logits, target, checked_bias, smoothing)
    return loss


def check_either_target(op: str, target: Tensor, first: Tensor, shape: tuple[int, int, int]) -> None:
    """Check a target of class numbers or of class probabilities."""
    check = check_soft_target if is_soft(target) else check_target
    check(op, target, first, shape)


def _checked_bias(bias: object, first: Tensor, shape: tuple[int, int, int]) -> Tensor:
    experts, _, classes = shape
    expected = f"[C={classes}] or [K={experts}, C={classes}]"
    if not isinstance(bias, Tensor):
        kind = type(bias).__name__
        raise TypeError(f"{_NAME}: bias must be None or a tensor, list or array of numbers {expected}, got {kind}")
    check_dense(_NAME, "bias", bias)
    if bias.dtype not in FLOAT_DTYPES and bias.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{_NAME}: bias must be floating point or integer {expected}, got {describe(bias)}")
    if tuple(bias.shape) not in ((classes,), (experts, classes)):
        raise ValueError(f"{_NAME}: bias must be {expected}, got {describe(bias)}")
    check_device(_NAME, "bias", bias, first, "logits")
    return bias


# ---- the reference


def composite_cross_entropy(
    logits: Tensor,  # [K, B, C]
    target: Tensor,  # [B], or probabilities [B, C] or [K, B, C]
    bias: Tensor | None,  # [C] or [K, C]
    label_smoothing: float,
) -> Tensor:
    """The reference computation, also behind ``balanced_softmax_loss``."""
    # Only element-wise operators and reductions, on float32 or float64: none of them is in autocast's lower-precision
    # list.
    z = logits.to(accumulation_dtype(logits.dtype))
    experts, batch, classes = z.shape
    if bias is not None:
        z = z + (bias.to(z.dtype) if bias.dim() == 1 else bias.to(z.dtype).unsqueeze(1))
    log_p = z.log_softmax(2)
    if is_soft(target):
        soft = (1.0 - label_smoothing) * target.to(z.dtype) + label_smoothing / classes
        return soft_rows(log_p, soft).sum() / max(batch, 1)
    loss = -(1.0 - label_smoothing) * log_p.gather(2, target.unsqueeze(1).expand(experts, -1, -1)).sum()
    if label_smoothing != 0.0:
        loss = loss - (label_smoothing / classes) * log_p.sum()
    return loss / max(batch, 1)  # an empty batch sums to 0


# ---- the fused kernels


def fused_cross_entropy(
    backend: str, logits: Tensor | Sequence[Tensor], target: Tensor, bias: Tensor | None, label_smoothing: float
) -> Tensor:
    """The fused computation, also behind ``balanced_softmax_loss``; the bias counts as a constant.

    The kernels take eight experts at most, so more go in groups: the loss is a sum over the experts.
    """
    experts, options = as_list(logits), ExpertOptions(True, label_smoothing=label_smoothing)
    if bias is not None:
        bias = materialised(bias.to(accumulation_dtype(experts[0].dtype))).contiguous()
    tensors = ExpertTensors(target, bias=bias)
    if len(logits) <= MAX_EXPERTS:
        return run_expert_loss(backend, experts, tensors, options)[0]
    groups = groups_of(logits)
    biases = bias.split(MAX_EXPERTS) if bias is not None and bias.dim() == 2 else [bias] * len(groups)
    parts = (
        run_expert_loss(backend, as_list(group), tensors._replace(bias=bias), options)[0]
        for group, bias in zip(groups, biases, strict=True)
    )
    return torch.stack([*parts]).sum()


def refuses_soft_target(backend: str, logits: object, target: Tensor, *_: object) -> str | None:
    """Why the kernels do not take a target of class probabilities; None for one of class numbers."""
    return "soft targets are a matter of the reference" if is_soft(target) else None


def _refuses(
    backend: str, logits: Tensor | Sequence[Tensor], target: Tensor, bias: Tensor | None, label_smoothing: float
) -> str | None:
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "the bias requires a gradient, which only the reference computes"
    return refuses_soft_target(backend, logits, target)


# ---- the record

_OPERATOR = loss_operator(
    _NAME,
    "(Tensor logits, Tensor target, Tensor? bias, float label_smoothing) -> Tensor",
    composite_cross_entropy,
    fused=fused_cross_entropy,
    refuses=_refuses,
    any_number_of_experts=True,
)
