"""Depth-wise knowledge fusion in the compiled library, on the CPU and on CUDA devices.

The functions have the signatures that ``shike_fast.kernels.fusion.dkf`` has in Triton. ``csrc/fusion/call.h`` says what
they compute.
"""

from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._dkf_arguments import DkfArguments
from shike_fast.ops._native import native
from shike_fast.ops._native_loss import DTYPES, queue_of


def dkf_forward(
    args: DkfArguments,
    mean_rstd: Tensor | None,  # [n, 3, C]; None: training
    eps: list[float],  # n
    running: list[Tensor],  # 2n: mean and variance of each normalisation, updated in place; or none
    momentum: list[float],  # n
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f [K, B, C], sums [K, S, B, C], mean and rstd [n, 3, C] and, in training, statistics [n, 2, C]."""
    training = mean_rstd is None
    f, sums, new_mean_rstd, statistics = args.new_results(training)
    kept = new_mean_rstd if mean_rstd is None else mean_rstd
    common = _common(args)
    call = {
        **common,
        "running_mean": running[::2],
        "running_var": running[1::2],
        "momentum": momentum,
        "eps": eps,
        "training": training,
        "f": f,
        "sums": sums,
        "mean_rstd": kept,
        "statistics": statistics,
    }
    if f.device.type == "cpu":
        native().cpu_dkf_forward(**call, threads=torch.get_num_threads())
    else:
        size = native().cuda_dkf_workspace(**common, training=training, device=f.device.index)
        native().cuda_dkf_forward(**call, workspace=args.new(size), **queue_of(f))
    return f, sums, kept, statistics


def dkf_statistics(maps: list[Tensor]) -> Tensor:
    """Leading part and rest of the mean, and the sum of squared distances from it: [maps, 3, C]."""
    first = maps[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    statistics = first.new_empty((len(maps), 3, first.shape[1]), dtype=dtype)
    call = {"dtype": DTYPES[first.dtype], "shape": first.shape, "maps": maps}
    if first.device.type == "cpu":
        native().cpu_dkf_statistics(**call, statistics=statistics, threads=torch.get_num_threads())
    else:
        size = native().cuda_dkf_statistics_workspace(**call, device=first.device.index)
        workspace = statistics.new_empty(size)
        native().cuda_dkf_statistics(**call, statistics=statistics, workspace=workspace, **queue_of(first))
    return statistics


def dkf_vector_gradients(args: DkfArguments, grad_output: Tensor, sums: Tensor) -> Tensor:
    """Gradients of weights and biases [n, 2, C]; ``grad_output`` is [K, B, C], contiguous, in the maps' dtype."""
    vectors = args.new(args.norms, 2, sums.shape[3])
    call = {**_common(args), "grad_output": grad_output, "sums": sums, "vectors": vectors}
    if vectors.device.type == "cpu":
        native().cpu_dkf_vector_gradients(**call, threads=torch.get_num_threads())
    else:
        native().cuda_dkf_vector_gradients(**call, **queue_of(vectors))
    return vectors


def dkf_map_gradients(
    args: DkfArguments, grad_output: Tensor, mean_rstd: Tensor, vectors: Tensor, inverse_count: float
) -> list[Tensor]:
    """Gradients of the maps, in the order of ``args.maps``."""
    gradients = args.new_gradients()
    experts = args.experts
    call = {
        **_common(args),
        "mean_rstd": mean_rstd,
        "grad_output": grad_output,
        "vectors": vectors,
        "inverse_count": inverse_count,
        "grad_deep": gradients[:experts],
        "grad_shallow": gradients[experts : 2 * experts],
        "grad_shortcut": gradients[2 * experts :],
    }
    if grad_output.device.type == "cpu":
        native().cpu_dkf_map_gradients(**call, threads=torch.get_num_threads())
    else:
        native().cuda_dkf_map_gradients(**call, **queue_of(grad_output))
    return gradients


def _common(args: DkfArguments) -> dict[str, Any]:
    """What every call takes: Fusion of csrc/fusion/call.h."""
    first = args.deep[0]
    return {
        "dtype": DTYPES[first.dtype],
        "shape": first.shape,
        "relu": args.relu,
        "deep": args.deep,
        "shallow": args.shallow,
        "shortcut": args.shortcut,
        "weight": args.weight,
        "bias": args.bias,
    }
