"""Work on the device for the next batch while the present one is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Prefetcher:
    """Works one batch ahead on its own stream: each is begun before the one before it is handed out.

    The stream is the same in all epochs: what PyTorch keeps of the memory used in one stream serves no other.

    Args:
        device: where the work is done. Without streams there, each batch is made when it is its turn.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, jobs: Iterator[Callable[[], tuple[Tensor, ...]]]) -> Iterator[Any]:
        """The results of ``jobs``."""
        if self._device.type != "cuda":
            for job in jobs:
                yield job()
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        waiting: tuple[tuple[Tensor, ...], torch.cuda.Event] | None = None
        for job in jobs:
            with torch.cuda.stream(self._stream):
                begun = job()
                event = self._stream.record_event()
            if waiting is not None:
                yield _handed_over(*waiting, self._device)
            waiting = begun, event
        if waiting is not None:
            yield _handed_over(*waiting, self._device)


def _handed_over(tensors: tuple[Tensor, ...], event: torch.cuda.Event, device: torch.device) -> tuple[Tensor, ...]:
    """Let the device's present stream wait for what made the tensors, and their memory live until it has used them."""
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in tensors:
        tensor.record_stream(current)
    return tensors
