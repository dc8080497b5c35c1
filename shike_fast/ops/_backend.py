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
_unavailable: dict[str, str] = {}  # backend -> why none of its implementations is there


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
    _unavailable.pop(backend, None)


def mark_unavailable(backend: str, reason: str) -> None:
    """Record why a backend is missing: one clause, shown by ``backend_reasons`` and when the backend is asked for."""
    _check_name("mark_unavailable", backend)
    _unavailable[backend] = reason


def run(op: str, backend: str | None, *args: Any) -> Any:
    """Call the implementation of ``op`` that ``backend`` names, or the fastest one that takes these arguments."""
    implementations = _implementations[op]
    if backend is not None:
        return _named(op, backend, args)(*args)
    for candidate in implementations.values():
        if candidate.verified and (candidate.refuses is None or candidate.refuses(*args) is None):
            return candidate.function(*args)
    raise RuntimeError(f"{op}: no backend can run with these arguments")


def _named(op: str, backend: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    _check_name(op, backend)
    implementation = _implementations[op].get(backend)
    reason: str | None = None
    if implementation is None:
        reason = _unavailable.get(backend, "it does not implement this op")
    elif implementation.refuses is not None:
        reason = implementation.refuses(*args)
    if implementation is None or reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    return implementation.function


def _check_name(op: str, backend: str) -> None:
    if backend not in _PREFERENCE:
        names = ", ".join(repr(name) for name in reversed(_PREFERENCE))
        raise ValueError(f"{op}: backend must be None or one of {names}, got {backend!r}")


def backends() -> dict[str, bool]:
    """Tell which backends are present.

    Returns:
        ``{"reference": True, "cpu": ..., "triton": ..., "cuda": ...}``: whether at least one op has an implementation
        there. ``backend_reasons`` says why the others are missing.
    """
    return {name: name not in _unavailable for name in reversed(_PREFERENCE)}


def backend_reasons() -> dict[str, str]:
    """Tell why backends are missing.

    Returns:
        One clause for every backend that ``backends`` reports as ``False``.
    """
    return {name: _unavailable[name] for name in reversed(_PREFERENCE) if name in _unavailable}


for _name in ("cpu", "triton", "cuda"):
    mark_unavailable(_name, "this version of shike_fast has no kernels for it")
