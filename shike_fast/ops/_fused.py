"""The backends beside the reference: which kernels they run, and what they refuse."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shike_fast.ops import _backend
from shike_fast.ops._library import has_tangent
from shike_fast.ops._native import native, native_error

MAX_EXPERTS = 8
MAX_CLASSES = 2**24 - 1  # the kernels keep class numbers, and 2²⁴ for none, in float32
_NO_TANGENT = "it has no forward-mode derivative"


def _cuda_build_missing(native_missing: str | None) -> str | None:
    if native_missing is not None:
        return native_missing
    build = native().build_info()
    if build["cuda"] is None:
        return f"the compiled library was built without CUDA: {build['cuda_reason']}"
    return None if torch.version.hip is None else "this PyTorch is built for ROCm"


# Evaluated once: torch.compile traces the choice of a backend and must meet constants.
_NATIVE_ERROR = native_error()
_NATIVE_MISSING = None if _NATIVE_ERROR is None else f"the compiled library is missing: {_NATIVE_ERROR}"
_CUDA_BUILD_MISSING = _cuda_build_missing(_NATIVE_MISSING)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cpu_missing() -> str | None:
    """Why there is no C++ backend for the CPU, or None."""
    return _NATIVE_MISSING


def triton_missing() -> str | None:
    """Why the Triton backend cannot run in this process, or None."""
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    return None if _INTERPRETED or torch.cuda.is_available() else "PyTorch finds no GPU"


def cuda_missing(device: torch.device | None = None) -> str | None:
    """Why the CUDA backend cannot run on a device, by default the current one, or None."""
    if _CUDA_BUILD_MISSING is not None:
        return _CUDA_BUILD_MISSING
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    index = None if device is None else device.index
    return _failed_self_test(torch.cuda.current_device() if index is None else index)


_self_tests: dict[int, str | None] = {}  # device -> why it failed


@torch.compiler.assume_constant_result
def _failed_self_test(index: int) -> str | None:
    """Why a kernel of the library does not run on this GPU with this driver, or None.

    The library has code for some GPUs and a CUDA runtime of its own, so PyTorch may run where it does not. Tried once a
    device, since it waits for it; that and its allocation would spoil a CUDA graph that is being captured.
    """
    if index not in _self_tests:
        if torch.cuda.is_current_stream_capturing():
            return None
        try:
            native().cuda_self_test(index)
            _self_tests[index] = None
        except RuntimeError as error:
            _self_tests[index] = f"the compiled library does not run on cuda:{index}: {error}"
    return _self_tests[index]


_ROOMS = {"dkt": "losses", "cross_entropy": "losses", "dkf": "fusion"}  # folders of shike_fast.kernels


def kernels(stem: str, backend: str, native_kernels: ModuleType) -> ModuleType:
    """The module with the backend's ``<stem>_forward`` and so on."""
    if backend != "triton":
        return native_kernels
    try:
        return importlib.import_module(f"shike_fast.kernels.{_ROOMS[stem]}.{stem}")
    except Exception as error:  # a broken Triton raises anything; say whose failure it is
        raise RuntimeError(f"backend 'triton' cannot run: {type(error).__name__}: {error}") from error


def as_list(logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Checked logits as the fused ops take them."""
    return [logits] if isinstance(logits, Tensor) else list(logits)


def _nothing(*_: Any) -> None:
    return None


def register_fused(op: str, function: Callable[..., Any], refuses: Callable[..., str | None]) -> None:
    """Make ``function(*args, backend)`` the implementation of ``op`` on the three backends.

    ``refuses(backend, *args)`` says why the fused kernels do not take these arguments, or None.
    """
    # Neither has passed its tests on a device yet, so neither is the default there.
    for backend, verified in (("cpu", True), ("triton", False), ("cuda", False)):
        _backend.register(
            op,
            backend,
            lambda *args, _backend=backend: function(*args, _backend),
            refuses=lambda *args, _backend=backend: refuses(_backend, *args),
            verified=verified,
        )


def register_fused_loss(
    op: str,
    function: Callable[..., Any],
    refuses_more: Callable[..., str | None] = _nothing,
    *,
    any_number_of_experts: bool = False,
) -> None:
    """``register_fused`` for a loss whose first argument are the logits.

    ``refuses_more(*args)`` says what no fused kernel of this op takes, beside what follows from the logits. An op that
    takes ``any_number_of_experts`` gives the kernels eight at a time.
    """

    def refuses(backend: str, *args: Any) -> str | None:
        reason = _refuses_logits(backend, args[0], any_number_of_experts)
        return reason or refuses_transforms(*args) or refuses_more(*args)

    register_fused(op, function, refuses)


def _refuses_logits(backend: str, logits: Tensor | Sequence[Tensor], any_number_of_experts: bool) -> str | None:
    first, count = (logits, logits.shape[0]) if isinstance(logits, Tensor) else (logits[0], len(logits))
    if (reason := refuses_tensor(backend, first, "the logits are")) is not None:
        return reason
    if count > MAX_EXPERTS and not any_number_of_experts:
        return f"it takes at most {MAX_EXPERTS} experts, got {count}"
    if first.shape[-1] > MAX_CLASSES:
        return f"it takes at most {MAX_CLASSES} classes, got {first.shape[-1]}"
    return None


def refuses_tensor(backend: str, tensor: Tensor, what: str) -> str | None:
    """Why the backend cannot run on a tensor of this device and dtype, or None."""
    device = tensor.device.type
    if backend == "cpu":
        if device != "cpu":
            return f"{what} on {tensor.device}, not on the CPU"
        if _NATIVE_MISSING is not None:
            return _NATIVE_MISSING
    elif device != "cuda" and not (backend == "triton" and _INTERPRETED):
        return f"{what} on {tensor.device}, not on a GPU"
    elif (missing := triton_missing() if backend == "triton" else cuda_missing(tensor.device)) is not None:
        return missing
    elif tensor.dtype == torch.float64:
        return "it has no float64 kernels"
    return None


def refuses_transforms(*args: Any) -> str | None:
    """Why no fused kernel can run under what transforms these arguments, tensors and sequences of them, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        transforms = {level.key() for level in torch._C._functorch.get_interpreter_stack()}
        if torch._C._functorch.TransformType.Vmap in transforms:
            return "it has no rule for torch.func.vmap"
        if torch._C._functorch.TransformType.Jvp in transforms:
            return _NO_TANGENT
        if torch._C._functorch.TransformType.Functionalize in transforms:
            return "it has no rule for torch.func.functionalize"
    return _NO_TANGENT if has_tangent(*args) else None


_backend.register_missing("cpu", cpu_missing)
_backend.register_missing("triton", triton_missing)
_backend.register_missing("cuda", cuda_missing)
