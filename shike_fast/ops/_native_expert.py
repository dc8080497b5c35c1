"""The generalised expert loss in the compiled library, on the CPU and on CUDA devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype
from shike_fast.ops._expert_call import split
from shike_fast.ops._native_loss import shape_of

SAVED = 12  # numbers an expert and row: ExpertSaved of csrc/losses/expert_row.h


def new_expert_results(logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what ``expert_forward`` returns."""
    _, options = split(args)
    experts, batch, _classes = shape_of(logits)
    first, dtype = logits[0], accumulation_dtype(logits[0].dtype)
    loss = first.new_empty((experts, batch) if options.reduction == "none" else (), dtype=dtype)
    terms = first.new_empty(2, dtype=torch.float32)
    rows = first.new_empty((4, experts, batch), dtype=dtype)
    return loss, terms, rows, first.new_empty((batch, experts, SAVED), dtype=dtype)


def expert_forward(logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError


def expert_backward(grad_output: Tensor, logits: Sequence[Tensor], *args: Any) -> Tensor:
    raise NotImplementedError


def expert_both(logits: Sequence[Tensor], *args: Any) -> None:
    return None
