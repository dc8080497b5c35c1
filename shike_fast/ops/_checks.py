"""Argument checks shared by the ops. Every message names the op and the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from shike_fast.ops._guards import PLAIN_TENSORS, holds_its_values
from shike_fast.ops._native import native, native_error

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = "float16, bfloat16, float32 or float64"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op computes: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(tensor: Tensor) -> str:
    """Dtype and shape, as in ``int32 [128]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_logits(op: str, logits: Tensor | Sequence[Tensor]) -> tuple[Tensor, tuple[int, int, int]]:
    """Check the logits; return one tensor that stands for their device and dtype, and (K, B, C)."""
    if isinstance(logits, Tensor):
        check_dense(op, "logits", logits)
        if logits.dim() != 3:
            raise ValueError(f"{op}: logits must be [K, B, C] or K tensors [B, C], got {describe(logits)}")
        first, shape = logits, (logits.shape[0], logits.shape[1], logits.shape[2])
    elif isinstance(logits, list | tuple):
        first, shape = _check_sequence(op, logits)
    else:
        raise TypeError(
            f"{op}: logits must be a tensor [K, B, C] or a list or tuple of K [B, C], got {type(logits).__name__}"
        )
    if first.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: logits must be {_FLOATS}, got {describe(first)}")
    if shape[0] < 1 or shape[2] < 2:
        raise ValueError(f"{op}: logits must have K >= 1 experts and C >= 2 classes, got [K, B, C] = {list(shape)}")
    return first, shape


def stacked(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """Checked logits as one tensor [K, B, C]; a copy where they came as a sequence."""
    return logits if isinstance(logits, Tensor) else torch.stack(list(logits))


def as_list(logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Checked logits as the fused kernels take them: a list of one tensor [K, B, C] or of K tensors [B, C]."""
    return [logits] if isinstance(logits, Tensor) else list(logits)


def gradient_like(logits: Sequence[Tensor]) -> Tensor:
    """Uninitialised memory for the gradient [K, B, C]: laid out as one tensor of logits, contiguous for a sequence."""
    first = logits[0]
    return torch.empty_like(first) if first.dim() == 3 else first.new_empty((len(logits), *first.shape))


def _check_sequence(op: str, logits: Sequence[Tensor]) -> tuple[Tensor, tuple[int, int, int]]:
    if len(logits) == 0:
        raise ValueError(f"{op}: logits must have K >= 1 experts, got an empty {type(logits).__name__}")
    first = logits[0]
    for k, expert in enumerate(logits):
        if not isinstance(expert, Tensor):
            raise TypeError(f"{op}: logits[{k}] must be a tensor [B, C], got {type(expert).__name__}")
        check_dense(op, f"logits[{k}]", expert)
        if expert.dim() != 2:
            raise ValueError(f"{op}: logits[{k}] must be [B, C], got {describe(expert)}")
        if expert.shape != first.shape:
            raise ValueError(f"{op}: logits[{k}] must be {list(first.shape)} as logits[0], got {describe(expert)}")
        if expert.dtype != first.dtype:
            raise TypeError(f"{op}: logits[{k}] must be {describe(first)} as logits[0], got {describe(expert)}")
        check_device(op, f"logits[{k}]", expert, first, "logits[0]")
    return first, (len(logits), first.shape[0], first.shape[1])


def check_target(op: str, target: object, first: Tensor, shape: tuple[int, int, int], name: str = "target") -> None:
    """Check the target; its values too where that needs no wait for a device and no tracer is at work."""
    _, batch, classes = shape
    if not isinstance(target, Tensor):
        hint = f"; pass torch.as_tensor({name})" if isinstance(target, list | tuple | np.ndarray) else ""
        raise TypeError(f"{op}: {name} must be an int64 tensor [B={batch}], got {type(target).__name__}{hint}")
    check_dense(op, name, target)
    if target.dtype != torch.int64 or target.dim() != 1 or target.shape[0] != batch:
        error = TypeError if target.dtype != torch.int64 else ValueError
        raise error(
            f"{op}: {name} must be int64 [B={batch}], got {describe(target)}{_target_hint(target, first, shape, name)}"
        )
    check_device(op, name, target, first, "logits")
    if values_are_readable(target) and batch > 0:
        if native_error() is None and holds_its_values(target):
            smallest, largest = native().extremes(values=target, count=batch)
        else:
            smallest, largest = (int(value) for value in torch.aminmax(target))
        if smallest < 0 or largest >= classes:
            raise IndexError(
                f"{op}: {name} must lie in 0..{classes - 1} (C={classes}), got {smallest if smallest < 0 else largest}"
            )


def is_soft(target: object) -> bool:
    """Whether a target is one of class probabilities: floating point [B, C] or [K, B, C]."""
    return isinstance(target, Tensor) and target.is_floating_point() and target.dim() > 1


def check_soft_target(op: str, target: Tensor, first: Tensor, shape: tuple[int, int, int]) -> None:
    """Check a target of class probabilities."""
    experts, batch, classes = shape
    check_dense(op, "target", target)
    if tuple(target.shape) not in (shape[1:], shape):
        raise ValueError(
            f"{op}: target must be int64 [B={batch}], or probabilities [B={batch}, C={classes}] or [K={experts}, B, C]"
            f", got {describe(target)}{_target_hint(target, first, shape)}"
        )
    check_device(op, "target", target, first, "logits")


def _target_hint(target: Tensor, first: Tensor, shape: tuple[int, int, int], name: str = "target") -> str:
    """What is likely to help with a target of another shape or dtype."""
    experts, batch, classes = shape
    if tuple(target.shape) == (batch, classes):
        soft = ", for probabilities take expert_cross_entropy or expert_loss(soft_target=...)"
        return f"; if it is one-hot, pass {name}.argmax(1){soft if target.is_floating_point() else ''}"
    if tuple(target.shape) in ((experts,), (experts, classes)) and experts != batch:
        if first.dim() == 3:
            return f"; logits {list(shape)} are read as [K, B, C], if they are [B, K, C] pass logits.transpose(0, 1)"
        return (
            "; a list of logits is read as K tensors [B, C], if yours are B tensors [K, C] pass torch.stack(logits, 1)"
        )
    return f"; pass {name}.long()" if target.dtype in INTEGER_DTYPES[:-1] and target.dim() == 1 else ""


def values_are_readable(tensor: Tensor) -> bool:
    """Whether a check may look at the values: no wait for a device, no tracer or functorch transform at work."""
    return (
        tensor.is_cpu
        and type(tensor) in PLAIN_TENSORS
        and not is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def check_device(op: str, name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """Check that two tensors share a device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on {other.device} as {other_name}, got {describe(tensor)} on {tensor.device}"
        )


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor has strides."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.").removeprefix("_")
        raise TypeError(f"{op}: {name} must be a dense tensor, got a {layout} one")


def as_tensor(value: object, device: torch.device) -> object:
    """A list, tuple or array of numbers as a float64 tensor; anything else as it is."""
    if not isinstance(value, list | tuple | np.ndarray) or _has_tensor(value):  # whose gradient would get lost
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iuf":
            return value
        value = np.array(value, dtype=np.float64)  # a copy: PyTorch takes no reversed or read-only array
    try:
        return torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError):  # not of numbers, or ragged: the check of the argument names its type
        return value


def _has_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensor, value)))


def check_finite(op: str, **values: object) -> list[float]:
    """Check finite numbers (Python's, NumPy's, or a tensor's or array's only element); returns them as floats."""
    compiling = is_compiling()
    numbers = []
    for name, value in values.items():
        if not isinstance(value, (int, float)):
            value = _number(op, name, value)
        # A number that changes between calls is symbolic to torch.compile, which cannot trace this test of its value.
        if not compiling and not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite, got {value}")
        numbers.append(float(value))
    return numbers


def _number(op: str, name: str, value: object) -> int | float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{op}: {name} must not require gradients, it is a constant")
    scalar = value.item() if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 else value
    if not isinstance(scalar, numbers.Real):
        kind = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a number, got {kind}")
    return float(scalar)


MAPS = "[B, C, H, W] or [B, N, C]"


def check_maps(op: str, deep: Tensor, shallow: Tensor, names: tuple[str, str] = ("deep", "shallow")) -> None:
    """Check a pair of feature maps, or of sequences of tokens."""
    for name, value in zip(names, (deep, shallow), strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor {MAPS}, got {type(value).__name__}")
        check_dense(op, name, value)
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be {_FLOATS}, got {describe(value)}")
        if value.dim() not in (3, 4):
            raise ValueError(f"{op}: {name} must be {MAPS}, got {describe(value)}")
    if shallow.shape != deep.shape:
        raise ValueError(f"{op}: {names[1]} must be {list(deep.shape)} as {names[0]}, got {describe(shallow)}")
    if 0 in deep.shape[1:]:
        sizes = "C, H, W" if deep.dim() == 4 else "N, C"
        raise ValueError(f"{op}: {names[0]} must have {sizes} >= 1, got {describe(deep)}")
    check_device(op, names[1], shallow, deep, names[0])


def as_map(value: Tensor) -> Tensor:
    """Checked tokens [B, N, C] as a map [B, C, N, 1], without a copy; a map as it is."""
    return value.transpose(1, 2).unsqueeze(3) if value.dim() == 3 else value


def check_channel_vector(op: str, name: str, value: Tensor | None, deep: Tensor) -> None:
    """Check an optional floating-point vector with one value a channel."""
    if value is None:
        return
    channels = deep.shape[1]
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be None or a tensor [C={channels}], got {type(value).__name__}")
    check_dense(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be {_FLOATS}, got {describe(value)}")
    if value.dim() != 1 or value.shape[0] != channels:
        raise ValueError(f"{op}: {name} must be [C={channels}], got {describe(value)}")
    check_device(op, name, value, deep, "deep")
