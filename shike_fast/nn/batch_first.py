"""Logits with the batch as the first dimension, for loops that join batches along it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class BatchFirst(nn.Module):
    """A network whose logits come as [B, K, C], for loops that join batches along dimension 0.

    Such loops are those of ``torch.nn.DataParallel`` and of the Hugging Face ``Trainer``. The losses take the logits as
    ``logits.transpose(0, 1)``: a view, as is what this module returns.

    ``forward`` takes the network's arguments. Args and parameters are those of ``network``, whose names in the
    state_dict begin with ``network.``.

    Args:
        network: returns [K, B, C], or a list or tuple of K tensors [B, C].

    Raises:
        TypeError, ValueError: in ``forward``, if the network returns something else.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **options: Any) -> Tensor:
        logits = self.network(*args, **options)
        if isinstance(logits, list | tuple) and logits and all(isinstance(one, Tensor) for one in logits):
            return torch.stack(list(logits), 1)
        if not isinstance(logits, Tensor):
            raise TypeError(f"BatchFirst: the network must return [K, B, C], got {type(logits).__name__}")
        if logits.dim() != 3:
            raise ValueError(f"BatchFirst: the network must return [K, B, C], got {list(logits.shape)}")
        return logits.transpose(0, 1)
