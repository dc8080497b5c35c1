"""Activation checkpointing: the backward pass computes parts of a network again instead of finding them stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shike_fast.nn import SyncBatchNorm

DRAW_NOTHING = (  # modules known to draw no random numbers
    nn.Sequential,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    SyncBatchNorm,
    nn.MaxPool2d,
    nn.Identity,
    nn.ReLU,
)
Result = TypeVar("Result")


def recomputed(function: Callable[[Tensor], Result], x: Tensor, modules: Sequence[nn.Module], *, draws: bool) -> Result:
    """``function(x)``, of which only ``x`` and the result are stored: the backward pass computes the rest again.

    The second computation leaves the buffers of the modules alone, so running statistics see a batch once. Where
    nothing needs a gradient the function is just called.

    Args:
        function: what to compute; it does the same when it is called again.
        x: its input, which nothing changes in place afterwards.
        modules: the modules that it calls.
        draws: whether it draws random numbers; both computations then draw the same ones.
    """
    trains = x.requires_grad or any(weight.requires_grad for module in modules for weight in module.parameters())
    if not (trains and torch.is_grad_enabled()):
        return function(x)
    again = False

    def compute(x: Tensor) -> Result:
        nonlocal again
        if torch.compiler.is_compiling():  # a compiled backward repeats operations, but no change of a buffer
            return function(x)
        if again:
            with _buffers_unchanged(modules):
                return function(x)
        again = True
        return function(x)

    result: Result = checkpoint(compute, x, use_reentrant=False, preserve_rng_state=draws)
    return result


@contextlib.contextmanager
def _buffers_unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules in train mode work with copies of their buffers; without any, autograd would store fewer tensors."""
    training = [member for module in modules for member in module.modules() if member.training]
    kept = [(member._buffers, dict(member._buffers)) for member in training if member._buffers]
    try:
        for buffers, own in kept:
            buffers.update({name: None if value is None else value.clone() for name, value in own.items()})
        yield
    finally:
        for buffers, own in kept:
            buffers.update(own)
