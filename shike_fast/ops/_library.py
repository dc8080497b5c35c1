"""Registration with the PyTorch dispatcher, in the namespace ``shike_fast``."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("shike_fast", "FRAGMENT")


def define_composite(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``function`` as ``shike_fast::<name>`` and return the op.

    The function is a composition of PyTorch operators, so autograd, ``torch.compile``, ``torch.export`` and
    ``torch.func`` see through it and it needs no derivative or shape rule of its own. ``Library.define`` and ``impl``
    cost a fraction of the time of a call through ``torch.library.custom_op``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.shike_fast, name).default
