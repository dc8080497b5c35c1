"""Fast, tested multi-expert long-tail training (SHIKE, CVPR 2023).

``shike_fast.ops`` holds the loss and fusion operators, ``shike_fast.nn`` the modules built on them,
``shike_fast.models`` the networks, ``shike_fast.methods`` the training methods. ``shike_fast.data`` and
``shike_fast.engine`` load long-tailed data sets and train; the commands are ``python -m shike_fast.train``,
``python -m shike_fast.evaluate`` and ``python -m shike_fast.info``.

``import shike_fast`` registers ``torch.ops.shike_fast.*``; the other subpackages are imported when they are first used.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from shike_fast import ops
from shike_fast._version import __version__

if TYPE_CHECKING:
    from shike_fast import data, engine, methods, models, nn

_LAZY = ("data", "engine", "methods", "models", "nn")

__all__ = ["__version__", "data", "engine", "methods", "models", "nn", "ops"]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"shike_fast.{name}")
    raise AttributeError(f"module 'shike_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
