"""Depth-wise knowledge fusion with statistics over all processes: only vectors [C] are exchanged."""

import functools
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shike_fast.ops import _reference_dkf
from shike_fast.ops._checks import accumulation_dtype
from shike_fast.ops._dkf_arguments import BatchNormArguments, DkfArguments
from shike_fast.ops._fused_dkf import kernels_of, update_running, vectors_of
from shike_fast.ops._library import differentiable_once, is_plain, materialised
from shike_fast.ops._synced_statistics import synced_statistics


@torch.compiler.disable
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
    """f [K, B, C] of this process, normalised in training with the statistics of all processes of the group.

    Every process takes part, with an empty batch too. One all-gather of [n, 2, C] numbers forward and one all-reduce
    of [n, 2, C] backward.
    """
    dtype = functools.reduce(torch.promote_types, (map_.dtype for map_ in (*deep, *shallow, *shortcut)))
    deep, shallow, shortcut = ([materialised(map_.to(dtype)) for map_ in maps] for maps in (deep, shallow, shortcut))
    vectors = vectors_of(norms, accumulation_dtype(deep[0].dtype))
    fused = backend != "reference" and is_plain(*deep, *shallow, *shortcut, *vectors)
    kernels = kernels_of(backend) if fused else _reference_dkf
    count = (len(deep), len(norms))
    f: Tensor = _Synced.apply(op, kernels, group, count, norms, relu, *deep, *shallow, *shortcut, *vectors)
    return f


class _Synced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        kernels: ModuleType,
        group: dist.ProcessGroup,
        count: tuple[int, int],
        norms: list[BatchNormArguments],
        relu: list[bool],
        *tensors: Tensor | None,
    ) -> Tensor:
        args = _arguments(count, relu, tensors)
        maps = [*args.shallow, *args.deep][: args.norms]
        normalisers, statistics, total = synced_statistics(maps, kernels, [norm.eps for norm in norms], group)
        if args.values <= 1 and total.item() == 1:  # elsewhere nothing waits for the device
            raise ValueError(
                f"{op}: Expected more than 1 value per channel when training, got input size "
                f"{args.shallow[0].shape} and no value in any other process"
            )
        if args.values > 0 or total.item() > 0:
            update_running(norms, statistics)
        batch, channels = args.deep[0].shape[:2]
        if batch == 0:
            f, sums = (
                args.deep[0].new_empty((args.experts, 0, channels)),
                args.new(args.experts, args.sums, 0, channels),
            )
        else:
            f, sums, *_ = kernels.dkf_forward(args, normalisers, [n.eps for n in norms], [], [0.0] * args.norms)
        ctx.save_for_backward(*tensors, sums, normalisers)
        ctx.call = op, kernels, group, count, relu, total.to(normalisers.dtype)
        return f

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        op, kernels, group, count, relu, total = ctx.call
        *tensors, sums, normalisers = ctx.saved_tensors
        args = _arguments(count, relu, tensors)
        incoming = materialised(incoming.to(args.deep[0].dtype)).contiguous()
        empty = args.deep[0].shape[0] == 0
        vectors = (
            args.new(args.norms, 2, sums.shape[3]).zero_()
            if empty
            else kernels.dkf_vector_gradients(args, incoming, sums)
        )
        everywhere = vectors.clone()
        dist.all_reduce(everywhere, group=group)
        gradients: list[Tensor | None] = [
            *(
                args.new_gradients()
                if empty
                else kernels.dkf_map_gradients(args, incoming, normalisers, everywhere / total, 1.0)
            ),
            *(None if weight is None else pair[0] for weight, pair in zip(args.weight, vectors, strict=True)),
            *(None if bias is None else pair[1] for bias, pair in zip(args.bias, vectors, strict=True)),
        ]
        if torch.is_grad_enabled():
            present = [tensor for tensor in tensors if tensor is not None]
            gradients = [None if g is None else differentiable_once(op, g, incoming, *present) for g in gradients]
        return *[None] * 6, *gradients


def _arguments(count: tuple[int, int], relu: list[bool], tensors: Any) -> DkfArguments:
    """Maps, weights and biases in their places."""
    experts, norms = count
    tensors = list(tensors)
    maps = len(tensors) - 2 * norms
    return DkfArguments(
        tensors[:experts],
        tensors[experts : 2 * experts],
        tensors[2 * experts : maps],
        tensors[maps : maps + norms],
        tensors[maps + norms :],
        relu,
    )
