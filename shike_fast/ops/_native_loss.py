"""The expert losses in the compiled library, on the CPU and on CUDA devices.

The functions have the signatures that ``shike_fast.kernels`` has in Triton. The logits come as a list of one tensor
[K, B, C] or of K tensors [B, C], the options as ``shike_fast::dkt_loss_fused`` takes them, the bias contiguous
and in the accumulation dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops._checks import accumulation_dtype, gradient_like
from shike_fast.ops._native import native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/dtype.h


def shape_of(logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """(K, B, C) of one tensor [K, B, C] or K tensors [B, C]."""
    first = logits[0]
    return (first.shape[0] if first.dim() == 3 else len(logits), first.shape[-2], first.shape[-1])


def new_floats(logits: Sequence[Tensor], *shape: int) -> Tensor:
    """Uninitialised memory in the accumulation dtype."""
    return logits[0].new_empty(shape, dtype=accumulation_dtype(logits[0].dtype))


def new_dkt_results(logits: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss, the terms and the state of ``dkt_forward``."""
    experts, batch, _classes = shape_of(logits)
    terms = logits[0].new_empty(3, dtype=torch.float32)
    return new_floats(logits), terms, new_floats(logits, batch, 5 * experts + 4)


def new_cross_entropy_results(logits: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    """Memory for the loss and the state of ``cross_entropy_forward``."""
    experts, batch, _classes = shape_of(logits)
    return new_floats(logits), new_floats(logits, batch, 2 * experts)


def dkt_forward(
    logits: Sequence[Tensor], target: Tensor, factors: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], terms [3] and the state of the backward."""
    loss, terms, state = new_dkt_results(logits)
    call = (_common(logits, target, state), (address(factors), *options), loss.data_ptr(), terms.data_ptr())
    if loss.device.type == "cpu":
        native().cpu_dkt_forward(*call, torch.get_num_threads())
    elif target.shape[0] == 0:
        loss.zero_()
        terms.zero_()
    else:
        device = loss.device.index
        size = native().cuda_dkt_workspace(*shape_of(logits), device)
        native().cuda_dkt_forward(*call, new_floats(logits, size).data_ptr(), device, stream(device))
    return loss, terms, state


def dkt_backward(
    incoming: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    factors: Tensor | None,
    state: Tensor,
    *options: Any,
) -> Tensor:
    """Gradient [K, B, C] of the logits, times the incoming gradient of the loss."""
    gradient = gradient_like(logits)
    call = (
        _common(logits, target, state),
        (address(factors), *options),
        _layout([gradient]),
        incoming.data_ptr(),
    )
    if gradient.device.type == "cpu":
        native().cpu_dkt_backward(*call, torch.get_num_threads())
    elif gradient.numel() > 0:
        native().cuda_dkt_backward(*call, gradient.device.index, stream(gradient.device.index))
    return gradient


def dkt_both(
    logits: Sequence[Tensor], target: Tensor, factors: Tensor | None, *options: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None:
    """What ``dkt_forward`` returns, and the gradient for an incoming gradient of 1, from one reading of the logits.

    None where that is no good: a gradient in low precision must be rounded after the incoming gradient, perhaps a loss
    scale, is multiplied in, and GPUs have no such kernel.
    """
    if logits[0].device.type != "cpu" or logits[0].dtype not in (torch.float32, torch.float64):
        return None
    loss, terms, state = new_dkt_results(logits)
    gradient = gradient_like(logits)
    native().cpu_dkt_both(
        _common(logits, target, state),
        (address(factors), *options),
        loss.data_ptr(),
        terms.data_ptr(),
        _layout([gradient]),
        torch.get_num_threads(),
    )
    return (loss, terms, state), gradient


def cross_entropy_forward(
    logits: Sequence[Tensor], target: Tensor, bias: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss [] and the state of the backward."""
    loss, state = new_cross_entropy_results(logits)
    call = (_common(logits, target, state), *_bias(bias), label_smoothing, loss.data_ptr())
    if loss.device.type == "cpu":
        native().cpu_cross_entropy_forward(*call, torch.get_num_threads())
    elif target.shape[0] == 0:
        loss.zero_()
    else:
        device = loss.device.index
        size = native().cuda_cross_entropy_workspace(*shape_of(logits), device)
        native().cuda_cross_entropy_forward(*call, new_floats(logits, size).data_ptr(), device, stream(device))
    return loss, state


def cross_entropy_backward(
    incoming: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    bias: Tensor | None,
    state: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Gradient [K, B, C] of the logits, times the incoming gradient of the loss."""
    gradient = gradient_like(logits)
    call = (
        _common(logits, target, state),
        *_bias(bias),
        label_smoothing,
        _layout([gradient]),
        incoming.data_ptr(),
    )
    if gradient.device.type == "cpu":
        native().cpu_cross_entropy_backward(*call, torch.get_num_threads())
    elif gradient.numel() > 0:
        native().cuda_cross_entropy_backward(*call, gradient.device.index, stream(gradient.device.index))
    return gradient


def _common(logits: Sequence[Tensor], target: Tensor, state: Tensor) -> tuple[Any, ...]:
    """What every call begins with: Common of csrc/expert_loss.cpp."""
    experts, batch, classes = shape_of(logits)
    return (
        DTYPES[logits[0].dtype],
        experts,
        _layout(logits),
        batch,
        classes,
        target.data_ptr(),
        target.stride(0),
        state.data_ptr(),
    )


def _layout(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses and strides: Layout of csrc/expert_loss.cpp."""
    first = tensors[0]
    if first.dim() == 3:
        return [first.data_ptr(), first.element_size(), *first.stride()]
    return [number for expert in tensors for number in (expert.data_ptr(), *expert.stride())]


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _bias(bias: Tensor | None) -> tuple[int, int]:
    """Address, and stride from expert to expert."""
    return address(bias), bias.shape[1] if bias is not None and bias.dim() == 2 else 0


def stream(device: int) -> int:
    """The current stream of a CUDA device."""
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream
