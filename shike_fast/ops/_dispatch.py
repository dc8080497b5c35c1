"""One record an operator (its name, schema, reference and other backends with what they refuse) and the choice of one.

A call goes from the public function, which checks its arguments, to :meth:`Operator.run` and from there to a backend:
the reference, or fused kernels by way of :class:`shike_fast.ops._autograd.Fused`. The choice is made in Python, before
PyTorch's dispatcher, so that it costs a few comparisons and traces under ``torch.compile``.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from shike_fast.ops._guards import has_tangent
from shike_fast.ops._native import native, native_error

LIBRARY = torch.library.Library("shike_fast", "FRAGMENT")
OPERATORS: dict[str, "Operator"] = {}
MAX_EXPERTS = 8
_PREFERENCE = ("cuda", "triton", "cpu", "reference")  # fastest first
_NO_TANGENT = "it has no forward-mode derivative"


# ---- the record


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Both callables take the operator's arguments by position, as the public function passes them on.
    """

    function: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None  # why it cannot run, in one clause, or None; None: runs everywhere
    verified: bool = True  # False: it never passed its tests on such a device, and runs only when asked for by name


class Operator:
    """An operator by name.

    With a schema, ``composite`` is registered as ``shike_fast::<name>``, and ``op`` is what to call. A composition of
    PyTorch operators needs no derivative or shape rule: autograd, ``torch.compile``, ``torch.export`` and
    ``torch.func`` see through it. ``Library.define`` and ``impl`` cost a fraction of the time of a call through
    ``torch.library.custom_op``.
    """

    def __init__(self, name: str, schema: str | None = None, composite: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.backends: dict[str, Backend] = {}  # fastest first
        if schema is not None and composite is not None:
            LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            LIBRARY.impl(name, composite, "CompositeImplicitAutograd")
            self.op = getattr(torch.ops.shike_fast, name).default
        OPERATORS[name] = self

    def add(
        self,
        backend: str,
        function: Callable[..., Any],
        *,
        refuses: Callable[..., str | None] | None = None,
        verified: bool = True,
    ) -> None:
        """Make ``function`` the implementation on ``backend``."""
        _check_name(self.name, backend)
        known = {**self.backends, backend: Backend(function, refuses, verified)}
        self.backends = {name: known[name] for name in _PREFERENCE if name in known}

    def add_fused(self, function: Callable[..., Any], refuses: Callable[..., str | None]) -> None:
        """Make ``function(backend, *args)`` the implementation on the three backends beside the reference.

        ``refuses(backend, *args)`` says why the fused kernels do not take these arguments, or None.
        """
        # Neither of the last two has passed its tests on a device yet, so neither is the default there.
        for backend, verified in (("cpu", True), ("triton", False), ("cuda", False)):
            self.add(backend, partial(function, backend), refuses=partial(refuses, backend), verified=verified)

    def run(self, backend: str | None, *args: Any) -> Any:
        """Call the implementation that ``backend`` names, or the fastest one that takes these arguments."""
        return self.backends[self.choose(backend, *args)].function(*args)

    def choose(self, backend: str | None, *args: Any) -> str:
        """The backend that ``run`` takes."""
        if backend is not None:
            _check_name(self.name, backend)
            if (reason := self._refusal(backend, args)) is not None:
                raise RuntimeError(f"{self.name}: backend {backend!r} cannot run: {reason}")
            return backend
        for name, candidate in self.backends.items():
            if candidate.verified and (candidate.refuses is None or candidate.refuses(*args) is None):
                return name
        raise RuntimeError(f"{self.name}: no backend can run with these arguments")

    def _refusal(self, backend: str, args: tuple[Any, ...]) -> str | None:
        if backend not in self.backends:
            return "it does not implement this op"
        refuses = self.backends[backend].refuses
        return None if refuses is None else refuses(*args)


def _check_name(op: str, backend: str) -> None:
    if backend not in _PREFERENCE:
        names = ", ".join(repr(name) for name in reversed(_PREFERENCE))
        raise ValueError(f"{op}: backend must be None or one of {names}, got {backend!r}")


# ---- which backends there are


def backends() -> dict[str, bool]:
    """Tell which backends can run in this process.

    Returns:
        ``{"reference": True, "cpu": ..., "triton": ..., "cuda": ...}``. ``backend_reasons`` says why the others cannot.
    """
    reasons = backend_reasons()
    return {name: name not in reasons for name in reversed(_PREFERENCE)}


def backend_reasons() -> dict[str, str]:
    """Tell why backends cannot run in this process.

    Returns:
        One clause for every backend that ``backends`` reports as ``False``.
    """
    reasons = {name: missing() for name, missing in _MISSING.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def unverified(backend: str) -> list[str]:
    """The operators whose implementation on ``backend`` has not passed its tests on a device: it runs by name only."""
    return [
        name
        for name, operator in OPERATORS.items()
        if backend in operator.backends and not operator.backends[backend].verified
    ]


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


_MISSING = {"cpu": cpu_missing, "triton": triton_missing, "cuda": cuda_missing}
_self_tests: dict[int, str | None] = {}  # device -> why it failed


def _failed_self_test(index: int) -> str | None:
    """Why a kernel of the library does not run on this GPU with this driver, or None.

    The library has code for some GPUs and its own CUDA runtime, so PyTorch may run where it does not. Tried once a
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


# All that torch.compiler.assume_constant_result does, but that imports torch._dynamo, which takes longer than PyTorch.
_failed_self_test._dynamo_marked_constant = True  # type: ignore[attr-defined]


_ROOMS = {"dkt": "losses", "cross_entropy": "losses", "dkf": "fusion"}  # folders of shike_fast.kernels


def kernels(stem: str, backend: str, native_kernels: ModuleType) -> ModuleType:
    """The module with the backend's ``<stem>_forward`` and so on."""
    if backend != "triton":
        return native_kernels
    try:
        return importlib.import_module(f"shike_fast.kernels.{_ROOMS[stem]}.{stem}")
    except Exception as error:  # a broken Triton raises anything; say whose failure it is
        raise RuntimeError(f"backend 'triton' cannot run: {type(error).__name__}: {error}") from error


# ---- what the fused kernels refuse


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
    if is_compiling():
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
