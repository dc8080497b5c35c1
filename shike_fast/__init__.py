"""Fast, tested multi-expert long-tail training (SHIKE, CVPR 2023).

``shike_fast.ops`` holds the loss and fusion operators, ``shike_fast.nn`` the modules built on them,
``shike_fast.models`` the networks, ``shike_fast.methods`` the training methods. ``shike_fast.data`` and
``shike_fast.engine`` load long-tailed data sets and train. ``shike_fast.train(...)`` trains from Python, and
``shike_fast.load(checkpoint)`` gives a network that classifies; the commands are ``python -m shike_fast.train``,
``python -m shike_fast.evaluate``, ``python -m shike_fast.predict`` and others.

``import shike_fast`` registers ``torch.ops.shike_fast.*``; the other subpackages are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from shike_fast import ops
from shike_fast._version import __version__

if TYPE_CHECKING:
    from shike_fast import data, engine, methods, models, nn, train
    from shike_fast.api import load

_LAZY = ("data", "engine", "methods", "models", "nn", "train")  # the module train can be called: it is api.train

__all__ = ["__version__", "data", "engine", "load", "methods", "models", "nn", "ops", "train"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"shike_fast.{name}")
    if name == "load":
        return importlib.import_module("shike_fast.api").load
    raise AttributeError(f"module 'shike_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "load"})
