"""Batch statistics over all processes of a group: only vectors [C] are exchanged."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype


def synced_statistics(
    maps: list[Tensor], kernels: ModuleType, eps: list[float], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """What n normalisations of maps [B, C, H, W] use, keep and count, the same in every process.

    Takes one all-gather of 2nC + 1 numbers, in which every process takes part, with an empty batch too.

    Returns:
        The normalisers [n, 3, C] (mean, what its rounding left, 1/σ) in the accumulation dtype; mean and unbiased
        variance [n, 2, C] for the running statistics, in float64; the number of values [] of a channel, in float64.
    """
    mean, squares, total = _gather(maps, kernels, group)
    dtype = accumulation_dtype(maps[0].dtype)
    leading = mean.to(dtype)
    # numbers as they are: a tensor of them would be copied to a device, which waits for it
    rstd = torch.stack([(s / total + e).rsqrt() for s, e in zip(squares, eps, strict=True)])
    normalisers = torch.stack([leading, (mean - leading).to(dtype), rstd.to(dtype)], 1)
    return normalisers, torch.stack([mean, squares / (total - 1)], 1), total


def _gather(maps: list[Tensor], kernels: ModuleType, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [n, C], squared distances from it [n, C] and the number of values [] of all processes, in float64."""
    channels = maps[0].shape[1]
    values = maps[0].numel() // channels
    if values > 0:
        statistics = kernels.dkf_statistics(maps).double()
        mine = torch.stack([statistics[:, 0] + statistics[:, 1], statistics[:, 2]])
    else:
        mine = torch.zeros(2, len(maps), channels, dtype=torch.float64, device=maps[0].device)
    message = torch.cat([mine.flatten(), mine.new_full((1,), values)])
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(messages, message, group=group)
    everything = torch.stack(messages)  # in the order of the ranks, so that all add up in the same order
    counts = everything[:, -1].reshape(-1, 1, 1)
    means, squares = everything[:, :-1].unflatten(1, (2, len(maps), channels)).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0), total
