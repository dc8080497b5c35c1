"""Import of the compiled library ``shike_fast._native``, with the exception kept when it fails.

A library built for another Python, or one that lacks a system library, must not take the pure-PyTorch part of the
package down with it. So it is imported on first use, and a failure is kept for ``shike_fast.info`` and for the backends
that need the library.
"""

import functools
import importlib
from types import ModuleType

from shike_fast._version import __version__


@functools.cache
def _load() -> tuple[ModuleType | None, Exception | None]:
    """The module and no error, or no module and the error."""
    try:
        module = importlib.import_module("shike_fast._native")
        built = module.build_info()["version"]
        if built != __version__:  # an editable checkout that moved on: its functions may have other arguments
            raise ImportError(f"it was built for shike_fast {built}, this is {__version__}: install the package again")
    except Exception as error:  # compiled code: whatever its import raises is a reason, kept and reported
        return None, error
    return module, None


def native() -> ModuleType:
    """Return the compiled library.

    Returns:
        The module ``shike_fast._native``.

    Raises:
        RuntimeError: It cannot be imported; the message and ``__cause__`` say why.
    """
    module, error = _load()
    if module is None:
        raise RuntimeError(f"shike_fast._native is not available: {type(error).__name__}: {error}") from error
    return module


def native_error() -> Exception | None:
    """Return the exception with which importing the compiled library failed, or None if it is available."""
    return _load()[1]
