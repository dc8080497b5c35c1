"""One record an operator (its name, schema, reference and other backends with what they refuse) and the choice of one.

A call goes from the public function, which checks its arguments, to :meth:`Operator.run` and from there to a backend:
the reference, or fused kernels by way of :class:`shike_fast.ops._autograd.Fused`. The choice is made in Python, before
PyTorch's dispatcher, so that it costs a few comparisons and traces under ``torch.compile``.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from shike_fast.ops import _verification
from shike_fast.ops._guards import has_tangent, may_be_transformed
from shike_fast.ops._native import native, native_error
from shike_fast.ops._verdicts import Verdicts

LIBRARY = torch.library.Library("shike_fast", "FRAGMENT")
OPERATORS: dict[str, "Operator"] = {}
MAX_EXPERTS = 8
_PREFERENCE = ("cuda", "triton", "cpu", "reference")
_SMALL, _MEDIUM = 2**16, 2**20  # elements of the first tensor
_NO_TANGENT = "it has no forward-mode derivative"


# ---- the record


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Both callables take the operator's arguments by position, as the public function passes them on.
    """

    function: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None  # why it cannot run, in one clause, or None; None: runs everywhere


class Operator:
    """An operator by name.

    With a schema, ``composite`` is registered as ``shike_fast::<name>``, and ``op`` is what to call. A composition of
    PyTorch operators needs no derivative or shape rule: autograd, ``torch.compile``, ``torch.export`` and
    ``torch.func`` see through it. ``Library.define`` and ``impl`` cost a fraction of the time of a call through
    ``torch.library.custom_op``.
    """

    def __init__(self, name: str, schema: str | None = None, composite: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.backends: dict[str, Backend] = {}  # in the order of _PREFERENCE
        self._orders: dict[tuple[torch.device, torch.dtype, str], tuple[str, ...]] = {}
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
    ) -> None:
        """Make ``function`` the implementation on ``backend``."""
        _check_name(self.name, backend)
        known = {**self.backends, backend: Backend(function, refuses)}
        self.backends = {name: known[name] for name in _PREFERENCE if name in known}

    def add_fused(self, function: Callable[..., Any], refuses: Callable[..., str | None]) -> None:
        """Make ``function(backend, *args)`` the implementation on the three backends beside the reference.

        ``refuses(backend, *args)`` says why the fused kernels do not take these arguments, or None.
        """
        for backend in ("cpu", "triton", "cuda"):
            self.add(backend, partial(function, backend), refuses=partial(refuses, backend))

    def run(self, backend: str | None, *args: Any) -> Any:
        """Call the implementation that ``backend`` names, or the fastest proven one that takes these arguments."""
        return self.backends[self.choose(backend, *args)].function(*args)

    def choose(self, backend: str | None, *args: Any) -> str:
        """The backend that ``run`` takes."""
        compiling = is_compiling()
        if backend is not None:
            _check_name(self.name, backend)
            if (reason := self._refusal(backend, args, compiling)) is not None:
                raise RuntimeError(f"{self.name}: backend {backend!r} cannot run: {reason}")
            return backend
        if _preferred is not None and self._refusal(_preferred, args, compiling) is None:
            return _preferred
        tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if compiling:
            order: Sequence[str] = _order_when_compiled(self.name, tensor.device, tensor.dtype).split(",")
        else:
            elements = tensor.numel()
            size = "small" if elements < _SMALL else "medium" if elements < _MEDIUM else "large"
            order = self._orders.get((tensor.device, tensor.dtype, size)) or self._learn(tensor, size)
        for name in order:
            if self._refusal(name, args, compiling) is None:
                return name
        raise RuntimeError(f"{self.name}: no backend can run with these arguments")

    def forget(self) -> None:
        """Ask for the verdicts again at the next call."""
        self._orders.clear()

    def _learn(self, tensor: Tensor, size: str) -> tuple[str, ...]:
        """The proven backends of the tensor's device, the fastest for its dtype and size first."""
        device = tensor.device
        if len(self.backends) > 1 and device.type in _verification.BACKENDS:
            known = _verification.known(device)
            if self._is_to_be_tried(device, known):
                if (reason := _verification.may_verify(tensor)) is None:
                    known = verify(device)
                    _verification.say(f"shike_fast: {_verification.describe(self.name, known, device)}\n")
                elif known is None:
                    _verification.tell_unknown(_verification.name_of(device), reason)
                    return ("reference",)
            known = known or {}
            proven = _verification.order(self.name, known, tensor.dtype, size)
            order = tuple(name for name in proven if name in self.backends)
            _verification.tell_fallback(self.name, known, _verification.name_of(device), order[0])
        else:
            order = tuple(self.backends)[-1:]  # the reference
        self._orders[device, tensor.dtype, size] = order
        return order

    def _is_to_be_tried(self, device: torch.device, known: Verdicts | None) -> bool:
        if known is None:
            return self.has_kernels_for(device)
        return any(self.name in names for names in _untried(device).values())

    def has_kernels_for(self, device: torch.device) -> bool:
        """Whether a backend of this kind of device implements the operator, besides the reference."""
        return any(backend in self.backends for backend in _verification.BACKENDS.get(device.type, ()))

    def _refusal(self, backend: str, args: tuple[Any, ...], compiling: bool) -> str | None:
        if backend not in self.backends:
            return "it does not implement this op"
        reason = None
        if not compiling and backend != "reference" and may_be_transformed():
            reason = _refuses_transforms(*args)
        refuses = self.backends[backend].refuses
        return reason if reason is not None or refuses is None else refuses(*args)


def _check_name(op: str, backend: str) -> None:
    if backend not in _PREFERENCE:
        names = ", ".join(repr(name) for name in reversed(_PREFERENCE))
        raise ValueError(f"{op}: backend must be None or one of {names}, got {backend!r}")


_preferred: str | None = None  # of use_backend


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Prefer a backend within a ``with`` block, in all threads of the process.

    A call that names none takes this one, verified or not, where it takes the arguments; else it chooses as usual.

    Args:
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None for no preference.

    Raises:
        ValueError: there is no backend of this name.
    """
    global _preferred
    if backend is not None:
        _check_name("use_backend", backend)
    before, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = before


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


def verify(device: torch.device | str, *, again: bool = False, seconds: float = _verification.SECONDS) -> Verdicts:
    """Try the backends of a device, each in a separate process; the fastest that passes runs where none is named.

    The first eager call of an operator on a device does the same. What was found is kept on the disk.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        again: try them although there are verdicts on this device, driver, library, PyTorch and Triton.
        seconds: for all backends.

    Returns:
        backend -> operator -> verdict with ``status`` (``passed``, ``failed``, ``crashed``, ``timed out`` or ``not
        tried``), ``reason`` and ``times``.
    """
    device = torch.device(device)
    found = _verification.verify(device, _implemented(), _missing_on, again=again, seconds=seconds)
    for operator in OPERATORS.values():
        operator.forget()
    return found


def needs_verification(device: torch.device | str) -> bool:
    """Whether something of the device's backends is still unknown, and this is a moment to find out."""
    device = torch.device(device)
    return bool(_untried(device)) and _verification.may_verify(torch.empty(0, device=device)) is None


def _untried(device: torch.device) -> dict[str, list[str]]:
    """The operators of which nothing is known, by the backends that might run."""
    untried = _verification.unknown(_verification.known(device) or {}, device, _implemented())
    return {backend: names for backend, names in untried.items() if _missing_on(backend, device) is None}


def _implemented() -> dict[str, list[str]]:
    """The operators of each backend."""
    return {
        backend: [name for name, operator in OPERATORS.items() if backend in operator.backends]
        for backend in _PREFERENCE
    }


def verdicts() -> dict[str, Verdicts]:
    """What is known of the backends of this machine's devices, by device: ``cpu``, ``cuda:0`` and so on."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    found = {_verification.name_of(device): _verification.known(device) for device in devices}
    return {name: known for name, known in found.items() if known is not None}


def what_runs(device: torch.device | str) -> list[str]:
    """A line an operator that has kernels for a device: the backend that runs where none is named, and why."""
    device = torch.device(device)
    known = _verification.known(device) or {}
    with_kernels = (name for name, operator in OPERATORS.items() if operator.has_kernels_for(device))
    return [_verification.describe(name, known, device) for name in with_kernels]


def _missing_on(backend: str, device: torch.device) -> str | None:
    return cuda_missing(device) if backend == "cuda" else _MISSING[backend]()


def _order_when_compiled(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """What :meth:`Operator._order` finds, for all sizes; a compiler must not start a process."""
    if not OPERATORS[operator].has_kernels_for(device):
        return "reference"
    known = _verification.known(device)
    if known is None:
        _verification.tell_unknown(_verification.name_of(device), "a compiler is at work")
        return "reference"
    order = _verification.order(operator, known, dtype, "large")
    _verification.tell_fallback(operator, known, _verification.name_of(device), order[0])
    return ",".join(order)


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
for _constant in (_failed_self_test, _order_when_compiled):
    setattr(_constant, "_dynamo_marked_constant", True)  # noqa: B010  # functions have no such attribute to mypy


_ROOMS = {
    "dkt": "losses",
    "expert": "losses",
    "dkf": "fusion",
    "logits": "classifiers",
}  # of shike_fast.kernels


def kernels(stem: str, backend: str, native_kernels: ModuleType) -> ModuleType:
    """The module with the backend's ``<stem>_forward`` and so on."""
    return triton_kernels(stem) if backend == "triton" else native_kernels


def triton_kernels(stem: str) -> ModuleType:
    """The module of ``shike_fast.kernels`` with ``<stem>_forward`` and so on."""
    try:
        return importlib.import_module(f"shike_fast.kernels.{_ROOMS[stem]}.{stem}")
    except Exception as error:  # a broken Triton raises anything; say whose failure it is
        raise RuntimeError(f"backend 'triton' cannot run: {type(error).__name__}: {error}") from error


# ---- what the fused kernels refuse


def refuses_tensor(backend: str, tensor: Tensor, what: str) -> str | None:
    """Why the backend cannot run on a tensor of this device and dtype, or None."""
    if backend == "cpu":
        if not tensor.is_cpu:
            return f"{what} on {tensor.device}, not on the CPU"
        if _NATIVE_MISSING is not None:
            return _NATIVE_MISSING
    elif tensor.device.type != "cuda" and not (backend == "triton" and _INTERPRETED):
        return f"{what} on {tensor.device}, not on a GPU"
    elif (missing := triton_missing() if backend == "triton" else cuda_missing(tensor.device)) is not None:
        return missing
    elif tensor.dtype == torch.float64:
        return "it has no float64 kernels"
    return None


def _refuses_transforms(*args: Any) -> str | None:
    """Why no fused kernel can run under what transforms these arguments, tensors and sequences of them, or None."""
    if torch._C._are_functorch_transforms_active():
        transforms = {level.key() for level in torch._C._functorch.get_interpreter_stack()}
        if torch._C._functorch.TransformType.Vmap in transforms:
            return "it has no rule for torch.func.vmap"
        if torch._C._functorch.TransformType.Jvp in transforms:
            return _NO_TANGENT
        if torch._C._functorch.TransformType.Functionalize in transforms:
            return "it has no rule for torch.func.functionalize"
    return _NO_TANGENT if has_tangent(*args) else None
