"""Libraries that single options need, and nobody else: imported where such an option is used."""

from __future__ import annotations

import importlib
from types import ModuleType

from shike_fast.errors import ConfigError, ShikeError


def optional_library(
    module: str, what: str, *, package: str | None = None, otherwise: str = "", error: type[ShikeError] = ConfigError
) -> ModuleType:
    """Import a library that need not be installed.

    Args:
        module: what is imported.
        what: what needs it, the beginning of the message.
        package: what ``pip install`` calls it; default the module.
        otherwise: what else helps, the end of the message.
        error: the type of the error.

    Raises:
        ConfigError: it is not installed, or fails when it is imported: a torchvision of another PyTorch, for example.
    """
    package = package or module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as cause:
        if cause.name is None or (module != cause.name and not module.startswith(f"{cause.name}.")):
            raise error(f"{what} needs {package}, which cannot be imported ({cause})") from cause
        raise error(f"{what} needs {package}: pip install {package}{otherwise}") from cause
    except (ImportError, RuntimeError) as cause:
        reason = " ".join(str(cause).split())
        raise error(f"{what} needs {package}, which cannot be imported ({reason})") from cause
