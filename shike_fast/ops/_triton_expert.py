"""The generalised expert loss in Triton: what the kernels are given beside the tensors and options of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._dispatch import triton_kernels
from shike_fast.ops._expert_call import (
    NO_TEACHER,
    VIEW,
    ExpertOptions,
    ExpertTensors,
    is_plain_divergence,
    kl_row_weights,
    row_weights,
    split,
)
from shike_fast.ops._native_loss import shape_of


def expert_forward(logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, terms [2], rows [4, K, B] and what is saved for the backward."""
    tensors, options = split(args)
    shared, weights = _shared(tensors, options), _weights(logits, tensors, options)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = triton_kernels("expert").expert_forward(
        logits, tensors, options, shared, weights
    )
    return results


def expert_backward(grad_output: Tensor, logits: Sequence[Tensor], *args: Any) -> Tensor:
    """Gradient [K, B, C] of the logits, times ``grad_output``, which has the shape of the loss."""
    count = len(ExpertTensors._fields)
    saved = args[count]
    tensors, options = split((*args[:count], *args[count + 1 :]))
    shared = _shared(tensors, options)
    gradient: Tensor = triton_kernels("expert").expert_backward(grad_output, logits, tensors, options, shared, saved)
    return gradient


def _shared(tensors: ExpertTensors, options: ExpertOptions) -> bool:
    """Whether one exponential of a logit serves the cross-entropy and the divergence."""
    return options.cross_entropy and options.teacher != NO_TEACHER and is_plain_divergence(tensors, options)


def _weights(logits: Sequence[Tensor], tensors: ExpertTensors, options: ExpertOptions) -> dict[str, Any]:
    """The weights of the rows as numbers, and as tensors [K, B] by small operators where the call has such weights."""
    shape = experts, batch, classes = shape_of(logits)
    whole = 1.0
    if options.reduction != "none":
        whole = 1.0 / max(batch * (experts if options.reduction in ("mean/K", "global_weighted_mean") else 1), 1)
    lam = options.lam if tensors.target_b is not None else 1.0
    rows = batch // 2 if options.teacher == VIEW else batch
    divisor = max(rows * (classes if options.kl_reduction == "mean" else 1), 1)
    weights: dict[str, Any] = {
        "first_weight": whole * lam,
        "first_weights": None,
        "second_weight": whole * (1.0 - lam),
        "second_weights": None,
        "divergence_weight": options.kl_weight * options.temperature**2 / divisor,
        "divergence_weights": None,
    }
    of_rows = tensors.class_weight, tensors.sample_weight, tensors.expert_weight, tensors.lam
    if options.cross_entropy and any(weight is not None for weight in of_rows):
        first, second = row_weights(tensors, options, shape, torch.float32)
        weights["first_weights"] = first.contiguous()
        weights["second_weights"] = None if second is None else second.contiguous()
    of_divergence = tensors.kl_weight, tensors.gate, tensors.temperature
    if options.teacher != NO_TEACHER and any(weight is not None for weight in of_divergence):
        like = logits[0].new_zeros((), dtype=torch.float32).expand(shape)
        weights["divergence_weights"] = kl_row_weights(tensors, options, like, None).contiguous()
    return weights
