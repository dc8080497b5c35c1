"""Recorded calls: on a device against the calls themselves; without one, with a stand-in for PyTorch's graphs."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch

from shike_fast.engine.graph import CudaGraphRunner, on_side_stream
from shike_fast.errors import RunError


class StandIn:
    """Records the function with its arguments, and calls it when replayed; counts both."""

    recordings = replays = 0

    def replay(self):
        StandIn.replays += 1
        self.function(*self.arguments)


@pytest.fixture
def graphs(monkeypatch):
    """``graphs(function)``: a CudaGraphRunner of it that works without a device."""
    StandIn.recordings = StandIn.replays = 0
    stream = SimpleNamespace(wait_stream=lambda other: None, device=torch.device("cuda", 0))
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda device: stream,
        "device": lambda _: contextlib.nullcontext(),
        "stream": lambda _: contextlib.nullcontext(),
        "graph_pool_handle": lambda: None,
        "CUDAGraph": StandIn,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recording: list = []

    @contextlib.contextmanager
    def capture(graph, **_):
        StandIn.recordings += 1
        recording.append(graph)
        yield
        recording.pop()

    monkeypatch.setattr(torch.cuda, "graph", capture)

    def make(function):
        def call(*arguments):
            if recording:  # a recording executes nothing
                recording[-1].function, recording[-1].arguments = function, arguments
            else:
                function(*arguments)

        return CudaGraphRunner(call, warm_up=2, stream=stream)

    return make


def test_streams_and_waits_are_those_of_the_stream_s_device(graphs, monkeypatch):
    """The current device is another one than that of the tensors."""
    waits, devices = [], []

    def stand_in(name, device):
        return SimpleNamespace(name=name, device=device, wait_stream=lambda other: waits.append((name, other.name)))

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=first: stand_in(f"current of {device}", device))
    with on_side_stream(stand_in("side", second)):
        pass
    assert waits == [("side", "current of cuda:1"), ("current of cuda:1", "side")]

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(devices.append(device)))
    calls = CudaGraphRunner(lambda: None, warm_up=0, stream=stand_in("side", second))
    monkeypatch.setattr(StandIn, "replay", lambda self: None)
    calls()
    assert devices == [second]


def test_every_call_happens_once(graphs):
    seen = []
    calls = graphs(lambda x, factor: seen.append((factor * x).tolist()))
    for k in range(6):
        calls(torch.tensor([float(k)]), 2)
    assert seen == [[2.0 * k] for k in range(6)]
    assert (StandIn.recordings, StandIn.replays) == (1, 4)


def test_shapes_layouts_and_values_have_recordings_of_their_own(graphs):
    seen = []
    calls = graphs(lambda x, factor: seen.append((tuple(x.shape), x.stride(), factor, x.sum().item())))
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    variants = [
        (image, 1),
        (image, 2),
        (image[..., :2].contiguous(), 1),
        (image.to(memory_format=torch.channels_last), 1),
    ]
    for _ in range(4):
        for variant in variants:
            calls(*variant)
    expected = [(tuple(x.shape), x.stride(), factor, x.sum().item()) for x, factor in variants]
    assert seen == expected * 4
    assert StandIn.recordings == 4 and StandIn.replays == 8


def test_inputs_are_copied(graphs):
    seen = []
    calls = graphs(lambda x: seen.append(x))
    inputs = [torch.full((2,), float(k)) for k in range(4)]
    for x in inputs:
        calls(x)
    assert seen[2] is seen[3] and seen[3].tolist() == [3.0, 3.0]
    assert inputs[2].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing\nand more"), None])
def test_what_cannot_be_recorded_is_told_in_a_line(graphs, monkeypatch, error):
    calls = graphs(lambda x: None)
    for _ in range(2):
        calls(torch.zeros(1))

    @contextlib.contextmanager
    def fail(graph, **_):
        try:
            yield
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        finally:  # as PyTorch does: ending the recording fails too
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    if error is None:  # the command has a line of its own for it
        with pytest.raises(torch.OutOfMemoryError):
            calls(torch.zeros(1))
        return
    with pytest.raises(RunError) as caught:
        calls(torch.zeros(1))
    expected = "a step cannot be recorded as a CUDA graph (operation not permitted when stream is capturing); use --no"
    assert str(caught.value).startswith(expected)


WAITING = """
import torch
from shike_fast.engine.graph import CudaGraphRunner
from shike_fast.errors import RunError

calls = CudaGraphRunner(lambda x: x.sum().item(), warm_up=1, stream=torch.cuda.Stream())
x = torch.ones(3, device="cuda")
calls(x)
try:
    calls(x)
except RunError as error:
    print(error)
"""


@pytest.mark.gpu
def test_on_a_device_a_wait_is_told_in_a_line(programs):
    """In a separate process: some versions of PyTorch record nothing more after a recording that failed."""
    printed = programs.run([sys.executable, "-c", WAITING]).stdout
    assert printed.startswith("a step cannot be recorded as a CUDA graph (") and printed.endswith("--no-cuda-graph\n")


@pytest.mark.gpu
def test_on_a_device():
    total = torch.zeros((), device="cuda", dtype=torch.float64)

    def add(x, factor):
        total.add_((x * factor).sum())

    calls = CudaGraphRunner(add, warm_up=3, stream=torch.cuda.Stream())
    for k in range(10):
        calls(torch.full((5,), float(k), device="cuda"), 2)
        calls(torch.full((3,), float(k), device="cuda"), 1)
    assert total.item() == sum(5 * 2 * k + 3 * k for k in range(10))
