"""What is done to a map: neither the values seen first nor those of some part may spoil its statistics."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

DISTURBANCES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda x: x,
    "the first value of all": lambda x: x[0, :, 0, 0].add_(300.0),
    "the first value of each sample": lambda x: x[:, :, 0, 0].add_(30.0),
    "the first row": lambda x: x[:, :, 0].sub_(5.0),
    "the first sample": lambda x: x[0].sub_(40.0),
    "one half": lambda x: x[len(x) // 2 :].add_(1000.0),
    "the mean": lambda x: x.add_(1000.0),
}
