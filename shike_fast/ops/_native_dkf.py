"""Depth-wise knowledge fusion in the compiled library, on the CPU and on CUDA devices.

The functions have the signatures that ``shike_fast.kernels.dkf`` has in Triton. ``csrc/dkf.h`` says what they compute.
"""

from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._dkf_arguments import DkfArguments
from shike_fast.ops._native import native
from shike_fast.ops._native_loss import DTYPES, address, stream


def dkf_forward(
    args: DkfArguments,
    normalisers: Tensor | None,  # [n, 3, C]; None: training
    eps: list[float],  # n
    running: list[Tensor],  # 2n: mean and variance of each normalisation, updated in place; or none
    momentum: list[float],  # n
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [K, B, C], sums [K, S, B, C], normalisers [n, 3, C] and, in training, statistics [n, 2, C]."""
    training = normalisers is None
    f, sums, new_normalisers, statistics = args.new_results(training)
    kept = new_normalisers if normalisers is None else normalisers
    common = _common(args, eps, running, momentum)
    call = (common, training, f.data_ptr(), (sums.data_ptr(), kept.data_ptr()), statistics.data_ptr())
    if f.device.type == "cpu":
        native().cpu_dkf_forward(*call, torch.get_num_threads())
    else:
        device = f.device.index
        workspace = args.new(native().cuda_dkf_workspace(common, training, device))
        native().cuda_dkf_forward(*call, workspace.data_ptr(), device, stream(device))
    return f, sums, kept, statistics


def dkf_statistics(maps: list[Tensor]) -> Tensor:
    """Leading part and rest of the mean, and the sum of squared distances from it: [maps, 3, C]."""
    first = maps[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    statistics = first.new_empty((len(maps), 3, first.shape[1]), dtype=dtype)
    call = (_shape(first), _layouts(maps))
    if first.device.type == "cpu":
        native().cpu_dkf_statistics(*call, statistics.data_ptr(), torch.get_num_threads())
    else:
        device = first.device.index
        workspace = statistics.new_empty(native().cuda_dkf_statistics_workspace(*call, device))
        native().cuda_dkf_statistics(*call, statistics.data_ptr(), workspace.data_ptr(), device, stream(device))
    return statistics


def dkf_vector_gradients(args: DkfArguments, incoming: Tensor, sums: Tensor) -> Tensor:
    """Gradients of weights and biases [n, 2, C]; ``incoming`` is [K, B, C], contiguous, in the maps' dtype."""
    vectors = args.new(args.norms, 2, sums.shape[3])
    call = (_common(args), incoming.data_ptr(), sums.data_ptr(), vectors.data_ptr())
    if vectors.device.type == "cpu":
        native().cpu_dkf_vector_gradients(*call, torch.get_num_threads())
    else:
        native().cuda_dkf_vector_gradients(*call, vectors.device.index, stream(vectors.device.index))
    return vectors


def dkf_map_gradients(
    args: DkfArguments, incoming: Tensor, normalisers: Tensor, vectors: Tensor, inverse_count: float
) -> list[Tensor]:
    """Gradients of the maps, in the order of ``args.maps``."""
    gradients = args.new_gradients()
    call = (
        _common(args),
        (0, normalisers.data_ptr()),
        incoming.data_ptr(),
        _layouts(gradients),
        vectors.data_ptr(),
        inverse_count,
    )
    if incoming.device.type == "cpu":
        native().cpu_dkf_map_gradients(*call, torch.get_num_threads())
    else:
        native().cuda_dkf_map_gradients(*call, incoming.device.index, stream(incoming.device.index))
    return gradients


def _common(
    args: DkfArguments, eps: list[float] | None = None, running: list[Tensor] | None = None, momentum: Any = None
) -> tuple[Any, ...]:
    """What every call begins with: Common of csrc/dkf.cpp."""
    vectors, numbers = [], []
    for i, (weight, bias) in enumerate(zip(args.weight, args.bias, strict=True)):
        kept = [tensor.data_ptr() for tensor in running[2 * i : 2 * i + 2]] if running else [0, 0]
        vectors += [address(weight), address(bias), *kept]
        numbers += [momentum[i], eps[i]] if eps is not None else [0.0, 1.0]
    return _shape(args.deep[0]), _layouts(args.maps), vectors, numbers, args.relu


def _shape(map_: Tensor) -> tuple[int, ...]:
    return DTYPES[map_.dtype], *map_.shape


def _layouts(maps: list[Tensor]) -> list[int]:
    """Address and strides of each map."""
    return [number for map_ in maps for number in (map_.data_ptr(), *map_.stride())]
