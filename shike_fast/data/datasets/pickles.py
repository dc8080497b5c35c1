"""Reading a pickled dictionary of NumPy arrays without ever running code from it.

A pickle names the functions that rebuild its objects. Only the names that arrays of numbers use are known here, and
each stands for a small callable of this module: not even NumPy's own rebuilding functions, which trust their arguments,
are reached. The callables have no attributes, so nothing in a pickle can alter them.
"""

import io
import pickle
import re
from typing import Any

import numpy as np

from shike_fast.errors import DataError

_NUMBERS = re.compile(r"[<>|=]?[biuf][1248]")


class _Type:
    """A data type under construction: created from its code, then given its byte order."""

    def __init__(self, code: str | bytes) -> None:
        if not _NUMBERS.fullmatch(_text(code)):
            raise pickle.UnpicklingError(f"it holds an array of type {_text(code)!r}")
        self.value = np.dtype(_text(code))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if _text(state[1]) == ">":
            self.value = self.value.newbyteorder(">")


class _Array:
    """An array under construction: created empty, then given its shape, type and bytes."""

    def __init__(self) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, fortran_order, content = state
        self.value = np.frombuffer(content, kind.value).reshape(shape, order="F" if fortran_order else "C")


class _MakeType:
    __slots__ = ()

    def __call__(self, code: str | bytes, *_flags: object) -> _Type:
        return _Type(code)


class _MakeArray:
    __slots__ = ()

    def __call__(self, *_arguments: object) -> _Array:
        return _Array()


class _MakeArrayFromBuffer:
    """How pickle protocol 5 stores an array."""

    __slots__ = ()

    def __call__(self, content: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> _Array:
        array = _Array()
        array.__setstate__((1, shape, kind, order == "F", content))
        return array


class _EncodeLatin1:
    """How Python 3 stores bytes in the old protocols."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str | bytes) -> bytes:
        if _text(encoding) not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it holds bytes encoded as {encoding!r}")
        return text.encode("latin1")


def _text(text: str | bytes) -> str:
    return text.decode("latin1") if isinstance(text, bytes) else text


# NumPy 2 renamed the package numpy.core to numpy._core; pickles of both are about.
_KNOWN: dict[str, object] = {
    "numpy.ndarray": "ndarray",  # only ever an argument of _reconstruct, which ignores it here
    "numpy.dtype": _MakeType(),
    "numpy.core.multiarray._reconstruct": _MakeArray(),
    "numpy._core.multiarray._reconstruct": _MakeArray(),
    "numpy.core.numeric._frombuffer": _MakeArrayFromBuffer(),
    "numpy._core.numeric._frombuffer": _MakeArrayFromBuffer(),
    "_codecs.encode": _EncodeLatin1(),
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _KNOWN[f"{module}.{name}"]


def load_dictionary(content: bytes, source: str) -> dict[str, Any]:
    """Unpickle a dictionary of NumPy arrays and built-in values.

    Args:
        content: the pickle; strings written by Python 2 come back as bytes, its keys as text.
        source: what to call it in an error.

    Raises:
        DataError: the pickle names anything but arrays of numbers and built-in containers, or is damaged.
    """
    try:
        loaded = _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(loaded, dict):
            raise pickle.UnpicklingError(f"it holds a {type(loaded).__name__}, not a dictionary")
        return {_text(key): value.value if isinstance(value, _Array) else value for key, value in loaded.items()}
    except Exception as error:  # a damaged pickle fails in any way: EOFError, KeyError, TypeError, MemoryError, …
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{source}: not a pickled dictionary of arrays ({reason}); do not trust this file, obtain it again"
        ) from error
