"""What the op benchmarks share: contenders, rotation among input sets, bytes moved, the copy bandwidth of the same run.

Run them with ``pytest benchmarks/ --benchmark-only``, on an otherwise idle machine; ``--benchmark-json FILE`` keeps the
numbers together with a description of the machine.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.utils.benchmark

from shike_fast import ops

ROTATION_BYTES = 64 * 2**20  # inputs in rotation: more than the last-level caches of the machines we measure on
MAX_SETS = 64
BACKENDS = [name for name, present in ops.backends().items() if present]
CONTENDERS = [*BACKENDS, "compiled reference"]


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Module | None:
    """Collect bench_*.py, which pytest on its own does only for files named on the command line."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session", params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=CONTENDERS)
def contender(request) -> str:
    """A backend of the ops, or torch.compile of the reference."""
    return request.param


@pytest.fixture
def prepare():
    """``prepare(contender, call)``: the callable to time, where ``call`` takes the inputs and ``backend=``."""

    def make(contender: str, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if contender != "compiled reference":
            return lambda *inputs: call(*inputs, backend=contender)
        torch._dynamo.reset()
        return torch.compile(lambda *inputs: call(*inputs, backend="reference"), fullgraph=True)

    return make


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.fixture(scope="session")
def copy_gigabytes_per_second(device) -> float:
    """Bandwidth of a plain copy larger than any cache, reads and writes counted: the ceiling for memory-bound ops."""
    source = torch.randn(ROTATION_BYTES // 4, device=device)
    destination = torch.empty_like(source)
    timer = torch.utils.benchmark.Timer(
        "destination.copy_(source)",
        globals={"source": source, "destination": destination},
        num_threads=torch.get_num_threads(),
    )
    return 2 * ROTATION_BYTES / timer.blocked_autorange(min_run_time=0.5).median / 1e9


@pytest.fixture
def measure(benchmark, device, copy_gigabytes_per_second):
    """``measure(function, input_sets, floor_bytes)``: time forward and backward, rotating among the input sets.

    ``floor_bytes`` is what an ideal kernel would have to move; GB/s and the share of the copy bandwidth are computed
    from it, so that they tell how far a contender is from that floor, whatever it really moves.
    """

    def run(function: Callable[..., torch.Tensor], input_sets: Sequence[tuple], floor_bytes: int) -> None:
        upcoming = itertools.cycle(input_sets)
        weight = torch.randn_like(function(*input_sets[0]))

        def forward_backward() -> None:
            inputs = next(upcoming)
            leaves = [t for t in inputs if t is not None and t.requires_grad]
            torch.autograd.grad(function(*inputs), leaves, weight)
            _synchronise(device)

        for _ in range(3):
            forward_backward()
        benchmark.extra_info.update(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            input_sets=len(input_sets),
            floor_bytes=floor_bytes,
            copy_gigabytes_per_second=round(copy_gigabytes_per_second, 2),
        )
        benchmark(forward_backward)
        if benchmark.stats is not None:  # None with --benchmark-disable
            achieved = floor_bytes / benchmark.stats.stats.median / 1e9
            benchmark.extra_info["floor_gigabytes_per_second"] = round(achieved, 3)
            benchmark.extra_info["share_of_copy"] = round(achieved / copy_gigabytes_per_second, 4)

    return run


@pytest.fixture
def rotate():
    """``rotate(make, bytes_of_one)``: enough independent input sets to exceed the caches."""

    def build(make: Callable[[], tuple], bytes_of_one: int) -> list[tuple]:
        return [make() for _ in range(min(MAX_SETS, 1 + ROTATION_BYTES // bytes_of_one))]

    return build


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same inputs for every contender."""
    torch.manual_seed(0)
