"""Choice among the implementations of an op.

Every op has a reference implementation; faster ones register themselves under the same name when their module is
imported:

    register("dkt_loss", "cpu", function, refuses=reason_or_none)

Both callables take the op's arguments by position, in the order in which the public function passes them on.
``refuses`` returns ``None`` where the implementation can run and otherwise one clause saying why not. The choice is
made in Python, before PyTorch's dispatcher, so that it costs a dictionary look-up and traces under ``torch.compile``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_PREFERENCE = ("cuda", "triton", "cpu", "reference")  # fastest first


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    refuses: Callable[..., str | None] | None  # None: runs everywhere
    verified: bool


_implementations: dict[str, dict[str, _Implementation]] = {}  # op -> backend, fastest first
_missing: dict[str, Callable[[], str | None]] = {}  # backend -> asks why it cannot run in this process


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    *,
    refuses: Callable[..., str | None] | None = None,
    verified: bool = True,
) -> None:
    """Make ``function`` the implementation of ``op`` on ``backend``.

    An implementation that is not ``verified`` (it never passed its tests on such a device) runs only when it is asked
    for by name.
    """
    _check_name("register", backend)
    known = {**_implementations.get(op, {}), backend: _Implementation(function, refuses, verified)}
    _implementations[op] = {name: known[name] for name in _PREFERENCE if name in known}


def register_missing(backend: str, missing: Callable[[], str | None]) -> None:
    """Let ``missing`` tell, in one clause, why ``backend`` cannot run in this process; None: it can."""
    _check_name("register_missing", backend)
    _missing[backend] = missing


def run(op: str, backend: str | None, *args: Any) -> Any:
    """Call the implementation of ``op`` that ``backend`` names, or the fastest one that takes these arguments."""
    return _implementations[op][choose(op, backend, *args)].function(*args)


def choose(op: str, backend: str | None, *args: Any) -> str:
    """The backend that ``run`` takes."""
    if backend is not None:
        return _checked_backend(op, backend, args)
    for name, candidate in _implementations[op].items():
        if candidate.verified and (candidate.refuses is None or candidate.refuses(*args) is None):
            return name
    raise RuntimeError(f"{op}: no backend can run with these arguments")


def _checked_backend(op: str, backend: str, args: tuple[Any, ...]) -> str:
    _check_name(op, backend)
    implementation = _implementations[op].get(backend)
    if implementation is None:
        reason: str | None = "it does not implement this op"
    else:
        reason = None if implementation.refuses is None else implementation.refuses(*args)
    if implementation is None or reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    return backend


def _check_name(op: str, backend: str) -> None:
    if backend not in _PREFERENCE:
        names = ", ".join(repr(name) for name in reversed(_PREFERENCE))
        raise ValueError(f"{op}: backend must be None or one of {names}, got {backend!r}")


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
    reasons = {name: _missing[name]() for name in reversed(_PREFERENCE) if name in _missing}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def unverified(backend: str) -> list[str]:
    """The ops whose implementation on ``backend`` has not passed its tests on a device, and so runs by name only."""
    return [op for op, known in _implementations.items() if backend in known and not known[backend].verified]
