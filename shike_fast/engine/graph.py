"""Capture what a function launches on a GPU once, then replay it: one launch in place of thousands."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from shike_fast.errors import RunError


@contextlib.contextmanager
def on_side_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on another stream, after all that was asked for before and before all that is asked for afterwards."""
    current = torch.cuda.current_stream(stream.device)  # that device need not be the current one
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


class CudaGraphRunner:
    """Calls ``function`` from a CUDA graph, one for every shape of its tensors and value of its other arguments.

    The first ``warm_up`` calls of a shape run as they are; the next one is captured, and it and all later ones are
    replayed. So no call is lost and none is made twice. ``function`` returns nothing, never waits for the device, and
    reads and changes tensors that stay where they are: its results are what it leaves in them.

    Args:
        function: takes tensors on one GPU and hashable values.
        warm_up: calls before a capture.
        stream: where warm-ups and captures happen, of the device of the tensors.

    Raises:
        RunError: if a call does something that cannot be captured.
    """

    def __init__(self, function: Callable[..., None], *, warm_up: int, stream: torch.cuda.Stream) -> None:
        self._function = function
        self._warm_up = warm_up
        self._calls: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()  # shared: the graphs are replayed one after the other

    def __call__(self, *arguments: Any) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        key = tuple((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in arguments)
        if key not in self._captured:
            if self._calls[key] < self._warm_up:
                self._calls[key] += 1
                self._call_on_side_stream(arguments)
                return
            self._captured[key] = self._capture(arguments)
        graph, inputs = self._captured[key]
        for static, given in zip(inputs, tensors, strict=True):
            static.copy_(given, non_blocking=True)
        graph.replay()

    def _call_on_side_stream(self, arguments: tuple[Any, ...]) -> None:
        """Call on the stream that captures use, so that what is kept lies in memory of that stream."""
        with on_side_stream(self._stream):
            self._function(*arguments)

    def _capture(self, arguments: tuple[Any, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        static = [a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) else a for a in arguments]
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a loader's thread may pin memory meanwhile, which a capture otherwise does not survive
        options: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with (
                torch.cuda.device(self._stream.device),  # a capture first waits for the current device
                torch.cuda.stream(self._stream),  # and, where it fails, leaves its stream the current one
                torch.cuda.graph(graph, **options),
            ):
                self._function(*static)
        except RuntimeError as error:
            # the end of a failed capture raises another error, over the one that says why
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().split("\n")[0]
            raise RunError(f"a step cannot be recorded as a CUDA graph ({reason}); use --no-cuda-graph") from error
        return graph, [argument for argument in static if isinstance(argument, Tensor)]
