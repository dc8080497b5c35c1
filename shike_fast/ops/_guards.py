"""When the dispatcher may be bypassed: no tracer, mode, subclass or lazily computed value has to be resolved by it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would do nothing but call the kernel on these tensors.

    No tracer, functorch transform, mode or tensor subclass has to see the operation, and each tensor's memory holds its
    values.
    """
    if (
        is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return False
    for tensor in tensors:
        if tensor is not None and not holds_its_values(tensor):
            return False
    return forward_ad._current_level < 0 or not has_tangent(*tensors)


def holds_its_values(tensor: Tensor) -> bool:
    """False for subclasses, wrappers, sparse layouts, lazily negated views and ZeroTensors."""
    return (
        type(tensor) in PLAIN_TENSORS
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


def materialised(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a lazily negated view or a ZeroTensor, whose memory does not hold the values.

    The dispatcher does so with the arguments of an operator, but not within a ``Tensor?[]``, and a ZeroTensor becomes
    an expanded one, whatever layout the operator expects.
    """
    if is_compiling() or not (tensor.is_neg() or tensor._is_zerotensor()):
        return tensor
    return tensor.clone()


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work in eager mode."""
    return torch._C._are_functorch_transforms_active() and not is_compiling()


def may_be_transformed() -> bool:
    """False where neither a transform of ``torch.func`` nor forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_tangent(*tensors: Any) -> bool:
    """Whether forward-mode differentiation is at work and one of the tensors, lists of tensors included, takes part."""
    if forward_ad._current_level < 0:
        return False
    for tensor in tensors:
        if isinstance(tensor, list | tuple):
            if has_tangent(*tensor):
                return True
        elif isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
    return False


def forbid_tangents(name: str, *tensors: Any) -> None:
    """Raise where a tangent would get lost."""
    if has_tangent(*tensors):
        raise RuntimeError(f"{name}: it has no forward-mode derivative; backend='reference' has one")
