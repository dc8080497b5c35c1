"""Lets torchvision, and so timm, be imported beside a build of PyTorch that its binary operators do not fit.

torchvision describes its operators to PyTorch when it is imported, which fails where they could not be loaded. Here
they are declared first, without code. A program that a test starts does this with ``--plugin torchvision_operators``.
"""

import importlib.util
import re
from pathlib import Path

import torch

_NAME = re.compile(r'register_meta\("(\w+)"|register_fake\("torchvision::(\w+)"')
_library: torch.library.Library | None = None  # holds the declarations as long as it lives


def declare() -> None:
    """Declare the operators, unless torchvision is not installed, or brings its own."""
    global _library
    found = importlib.util.find_spec("torchvision")
    if _library is not None or found is None or not found.submodule_search_locations or torch.version.cuda is not None:
        return
    text = (Path(found.submodule_search_locations[0]) / "_meta_registrations.py").read_text(encoding="utf-8")
    _library = torch.library.Library("torchvision", "DEF")
    for name in sorted({first or second for first, second in _NAME.findall(text)}):
        _library.define(f"{name}(Tensor self) -> Tensor")


declare()
