"""Batch statistics over all processes of a group: only vectors [C] are exchanged.

Every process takes part, with an empty batch too: one all-gather of 2nC + 1 numbers forward for n normalisations and,
where a normalised map needs a gradient, one all-reduce of 2nC numbers backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shike_fast.ops._autograd import Fused
from shike_fast.ops._checks import accumulation_dtype
from shike_fast.ops._dkf_arguments import BatchNormArguments, DkfArguments
from shike_fast.ops._fused_dkf import gradients_of_maps_and_vectors, kernels_of, update_running, vectors_of
from shike_fast.ops._guards import is_plain, materialised

Statistics = Callable[[list[Tensor]], Tensor]  # maps [B, C, H, W] -> mean, its rest, squared distances: [n, 3, C]


class _Sync(NamedTuple):
    """What is no tensor in a call."""

    norms: list[BatchNormArguments]
    group: dist.ProcessGroup
    refusal: str  # the message where all processes together have one value a channel
    statistics_of: Statistics
    exchange: bool  # whether the backward needs the sums of all processes

    def all_reduced(self, vectors: Tensor) -> Tensor:
        everywhere = vectors.clone()
        if self.exchange:
            dist.all_reduce(everywhere, group=self.group)
        return everywhere


# ---- the fusion


@torch._disable_dynamo
def fuse_synced(
    op: str,
    deep: list[Tensor],
    shallow: list[Tensor],
    shortcut: list[Tensor],
    norms: list[BatchNormArguments],
    relu: list[bool],
    group: dist.ProcessGroup,
    backend: str,
) -> Tensor:
    """f [K, B, C] of this process, normalised with the statistics of all processes of the group."""
    dtype = functools.reduce(torch.promote_types, (map_.dtype for map_ in (*deep, *shallow, *shortcut)))
    deep, shallow, shortcut = ([materialised(map_.to(dtype)) for map_ in maps] for maps in (deep, shallow, shortcut))
    refusal = (
        f"{op}: Expected more than 1 value per channel when training, got input size {shallow[0].shape} and no value "
        "in any other process"
    )
    vectors, normalised = vectors_of(norms, accumulation_dtype(dtype)), [*shallow, *deep][: len(norms)]
    if backend == "reference" or not is_plain(*deep, *shallow, *shortcut, *vectors):
        wide = [map_.to(accumulation_dtype(dtype)) for map_ in normalised]
        return _pooled(deep, normalise(op, wide, norms, group, plain_statistics, refusal), shortcut, relu)
    exchange = any(map_.requires_grad for map_ in normalised)
    sync = _Sync(norms, group, refusal, kernels_of(backend).dkf_statistics, exchange)
    fused = Fused(op, forward=_forward, backward=_backward, gradients=gradients_of_maps_and_vectors, differentiable=5)
    groups = deep, shallow, shortcut, vectors[: len(norms)], vectors[len(norms) :]
    return fused.direct(groups, (relu, backend, sync))[0]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, relu, backend, sync = args
    arguments = DkfArguments._make((*tensors, relu))
    mean_rstd, total = _synced_mean_rstd([*arguments.shallow, *arguments.deep][: arguments.norms], sync)
    f, sums, *_ = kernels_of(backend).dkf_forward(
        arguments, mean_rstd, [norm.eps for norm in sync.norms], [], [0.0] * arguments.norms
    )
    return f, sums, mean_rstd, total


def _backward(grad_output: Tensor, *args: Any) -> tuple[list[Tensor], Tensor]:
    *tensors, sums, mean_rstd, total, relu, backend, sync = args
    arguments, kernels = DkfArguments._make((*tensors, relu)), kernels_of(backend)
    grad_output = materialised(grad_output.to(arguments.deep[0].dtype)).contiguous()
    vectors = kernels.dkf_vector_gradients(arguments, grad_output, sums)
    everywhere = sync.all_reduced(vectors) / total
    return kernels.dkf_map_gradients(arguments, grad_output, mean_rstd, everywhere, 1.0), vectors


def _pooled(deep: list[Tensor], normalised: Sequence[Tensor], shortcut: list[Tensor], relu: list[bool]) -> Tensor:
    """The rest of the fusion in PyTorch's operators, for every device, tensor and batch."""
    pooled = []
    for k, map_ in enumerate(deep):
        factor = normalised[k].relu() if relu[k] else normalised[k]
        weighed = (normalised[len(deep) + k] + shortcut[k]).relu() if shortcut else map_.to(factor.dtype)
        pooled.append((weighed * factor).mean((2, 3)))
    return torch.stack(pooled).to(deep[0].dtype)


# ---- normalisation alone


def normalise(
    name: str,
    maps: list[Tensor],  # [B, C, ...], of one shape and dtype
    norms: list[BatchNormArguments],
    group: dist.ProcessGroup,
    statistics_of: Statistics,
    refusal: str,
) -> Sequence[Tensor]:
    """Each map with mean 0 and variance 1 over all processes, times weight, plus bias, in its dtype.

    Running statistics are updated. ``refusal`` is the message where all processes together have one value a channel.
    """
    vectors = vectors_of(norms, accumulation_dtype(maps[0].dtype))
    sync = _Sync(norms, group, refusal, statistics_of, any(map_.requires_grad for map_ in maps))
    fused = Fused(name, forward=_normalise_forward, backward=_normalise_backward, differentiable=3)
    result = fused.direct((maps, vectors[: len(norms)], vectors[len(norms) :]), (sync,))[0]
    return [result] if len(maps) == 1 else result.unbind(0)


def _normalise_forward(
    maps: list[Tensor], weights: list[Tensor | None], biases: list[Tensor | None], sync: _Sync
) -> tuple[Tensor, Tensor, Tensor]:
    mean_rstd, total = _synced_mean_rstd([_as_map(x) for x in maps], sync)
    results = []
    for x, weight, bias, (mean, rest, rstd) in zip(maps, weights, biases, mean_rstd, strict=True):
        # γ (x − mean − rest)/σ + β, with the rest moved into the offset
        scale = rstd if weight is None else weight * rstd
        offset = -rest * scale if bias is None else bias - rest * scale
        distance = x - _column(mean, x)
        results.append(torch.addcmul(_column(offset, x), distance, _column(scale, x), out=distance).to(x.dtype))
    return results[0] if len(maps) == 1 else torch.stack(results), mean_rstd, total


@torch.no_grad()
def _normalise_backward(
    grad_output: Tensor,
    maps: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    mean_rstd: Tensor,
    total: Tensor,
    sync: _Sync,
) -> list[Tensor | None]:
    """Gradients of the maps, weights and biases; the latter two of this process alone."""
    positions = [dim for dim in range(maps[0].dim()) if dim != 1]
    grads = [grad.to(mean_rstd.dtype) for grad in ([grad_output] if len(maps) == 1 else grad_output)]
    distances = [x - _column(mean, x) for x, (mean, _, _) in zip(maps, mean_rstd, strict=True)]
    pairs = []
    for grad, distance, (_, rest, rstd) in zip(grads, distances, mean_rstd, strict=True):
        # dβ = Σ dy, dγ = Σ dy x̂ with x̂ = (x − mean − rest)/σ
        d_bias = grad.sum(positions)
        pairs.append(torch.stack([((grad * distance).sum(positions) - rest * d_bias) * rstd, d_bias]))
    vectors = torch.stack(pairs)  # [n, 2, C]
    d_maps: list[Tensor | None] = [None] * len(maps)
    if sync.exchange:
        everywhere = sync.all_reduced(vectors) / total
        for i, (x, grad, distance, weight) in enumerate(zip(maps, grads, distances, weights, strict=True)):
            # dx = γ/σ (dy − dβ/N − x̂ dγ/N), with dγ and dβ of all processes
            (_, rest, rstd), (mean_weight, mean_bias) = mean_rstd[i], everywhere[i]
            scale = rstd if weight is None else weight * rstd
            slope = -scale * rstd * mean_weight
            offset = -scale * mean_bias - slope * rest
            dx = torch.addcmul(_column(offset, x), distance, _column(slope, x), out=distance)
            d_maps[i] = dx.addcmul_(grad, _column(scale, x)).to(x.dtype)
    return [*d_maps, *vectors[:, 0].unbind(0), *vectors[:, 1].unbind(0)]


def _as_map(x: Tensor) -> Tensor:
    """[B, C, ...] as [B, C, H, W], without a copy where x is contiguous or channels-last."""
    return x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, x.shape[2:].numel())


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """[C] over the positions of x."""
    return vector.view(-1, *[1] * (x.dim() - 2))


# ---- the statistics


def plain_statistics(maps: list[Tensor]) -> Tensor:
    """What ``dkf_statistics`` of the kernels computes, in PyTorch's operators."""
    rows = []
    for map_ in maps:
        wide = map_.to(accumulation_dtype(map_.dtype))
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        rows += [mean, torch.zeros_like(mean), var * (map_.numel() // map_.shape[1])]
    return torch.stack(rows).unflatten(0, (len(maps), 3))


def _synced_mean_rstd(maps: list[Tensor], sync: _Sync) -> tuple[Tensor, Tensor]:
    """Mean, what its rounding left and 1/σ [n, 3, C], and the number of values [] of a channel, the same everywhere.

    Updates running statistics; raises where there is one value a channel.
    """
    mean, squares, total = _gather(maps, sync.statistics_of, sync.group)
    values = maps[0].numel() // maps[0].shape[1]
    if values <= 1 and total.item() == 1:  # elsewhere nothing waits for the device
        raise ValueError(sync.refusal)
    if values > 0 or total.item() > 0:
        update_running(sync.norms, torch.stack([mean, squares / (total - 1)], 1))
    dtype = accumulation_dtype(maps[0].dtype)
    leading = mean.to(dtype)
    # eps as it is: a tensor of numbers would be copied to a device, which waits for it
    rstd = torch.stack([(s / total + norm.eps).rsqrt() for s, norm in zip(squares, sync.norms, strict=True)])
    return torch.stack([leading, (mean - leading).to(dtype), rstd.to(dtype)], 1), total.to(dtype)


def _gather(maps: list[Tensor], statistics_of: Statistics, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [n, C], squared distances from it [n, C] and the number of values [] of all processes, in float64."""
    channels = maps[0].shape[1]
    values = maps[0].numel() // channels
    if values > 0:
        statistics = statistics_of(maps).double()
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
