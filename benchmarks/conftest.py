"""What the op benchmarks share: contenders, rotation among input sets, bytes moved, the copy bandwidth of the same run.

Run them with ``pytest benchmarks/ --benchmark-only``, on an otherwise idle machine; ``--benchmark-json FILE`` keeps the
numbers together with a description of the machine, and ``python benchmarks/report.py`` makes
``docs/records/benchmarks.md`` of such files.

A benchmark names its operator, ``@pytest.mark.op("dkt_loss")``, and takes ``contender`` and ``device``: it runs for
every backend of the operator, and for torch.compile of the reference, on every device present. One that takes
``side_by_side`` times all its contenders in alternation, for work so long that other programs get in its way.
"""

import functools
import itertools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.benchmark
from torch.profiler import ProfilerActivity, profile

from shike_fast import ops
from shike_fast.ops._dispatch import OPERATORS

ROTATION_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # inputs in rotation: more than the last-level caches
MAX_SETS = 64
MOST_CYCLES = 2**32  # that a device is kept busy while a call is issued: some seconds
COMPILED = "compiled reference"

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks import what is beside them
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SERVES = {"reference": DEVICES, "cpu": ["cpu"], "triton": ["cuda"], "cuda": ["cuda"], COMPILED: DEVICES}


def pytest_xdist_auto_num_workers() -> int:
    """One process: others beside it would disturb what it times."""
    return 0


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Module | None:
    """Collect bench_*.py, which pytest on its own does only for files named on the command line."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize ``contender``, ``device`` and ``case``, as far as a benchmark takes them; a module's ``CASES`` holds
    the cases of each device."""
    names = [name for name in ("contender", "device", "case") if name in metafunc.fixturenames]
    if "device" not in names:
        return
    values = []
    for device in DEVICES:
        choices: dict[str, list[Any]] = {"device": [device]}
        if "contender" in names:
            op = metafunc.definition.get_closest_marker("op").args[0]
            present = ops.backends()
            contenders = [name for name in OPERATORS[op].backends if present[name]] + [COMPILED]
            choices["contender"] = [name for name in contenders if device in SERVES[name]]
        if "case" in names:
            choices["case"] = metafunc.module.CASES[device]
        values += list(itertools.product(*(choices[name] for name in names)))
    metafunc.parametrize(names, values, indirect=["device"], ids=lambda value: str(value).replace("torch.", ""))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Describe the hardware, not the host."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """Keep the statistics of each benchmark, not its thousands of single times."""
    for result in output_json["benchmarks"]:
        result["stats"].pop("data", None)
        result.pop("params", None)  # extra_info holds them readably
        result.pop("param", None)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def prepare():
    """``prepare(contender, call)``: the callable to time, where ``call`` takes the inputs and ``backend=``."""

    def make(contender: str, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if contender != COMPILED:
            return lambda *inputs: call(*inputs, backend=contender)
        torch._dynamo.reset()
        return torch.compile(lambda *inputs: call(*inputs, backend="reference"), fullgraph=True)

    return make


_copy_bandwidths: dict[str, float] = {}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a plain copy larger than any cache, reads and writes counted: the ceiling for memory-bound ops."""
    if device.type not in _copy_bandwidths:
        count = (1 if device.type == "cpu" else 4) * ROTATION_BYTES[device.type] // 4
        source = torch.randn(count, device=device)
        destination = torch.empty_like(source)
        timer = torch.utils.benchmark.Timer(
            "destination.copy_(source)",
            globals={"source": source, "destination": destination},
            num_threads=torch.get_num_threads(),
        )
        seconds = timer.blocked_autorange(min_run_time=0.5).median
        _copy_bandwidths[device.type] = 2 * 4 * count / seconds / 1e9
    return _copy_bandwidths[device.type]


def peak_extra_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Memory that a call has in use at its peak beyond what was in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    assert run.profiler is not None
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(in_use, default=0)


@functools.cache
def driver_version() -> str | None:
    """The driver's release, which PyTorch does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip() or None


def setting(device: torch.device) -> dict[str, Any]:
    """What a figure depends on, beside the machine that pytest-benchmark describes."""
    facts: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "driver": driver_version()}
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts


def launches(function: Callable[[], Any], device: torch.device) -> int:
    """Kernels, copies and fills that a call starts on a CUDA device."""
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        function()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in run.events())


def device_milliseconds(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Median over many calls of the time between events around one, and of the time that issuing it took the CPU.

    The device is kept busy until a call is issued, so that it finds all of it and no gap between launches is timed. A
    call that took longer to issue than that is made again, after twice the time.
    """
    device_times, cpu_times = [], []
    cycles = 1_000_000
    while len(device_times) < 100:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        begin = time.perf_counter()
        function()
        seconds = time.perf_counter() - begin
        end.record()
        issued_in_time = not start.query()  # the device still sleeps
        torch.cuda.synchronize(device)
        if not issued_in_time:
            cycles *= 2
            if cycles > MOST_CYCLES:
                raise RuntimeError("a call waits for the device, or takes seconds to issue: it cannot be timed alone")
            continue
        cpu_times.append(1e3 * seconds)
        device_times.append(start.elapsed_time(end))
    return statistics.median(device_times), statistics.median(cpu_times)


@pytest.fixture
def measure(benchmark, device, request):
    """``measure(function, input_sets, floor_bytes)``: time forward and backward, rotating among the input sets.

    ``floor_bytes`` is what an ideal kernel would have to move; GB/s and the share of the copy bandwidth are computed
    from it, so that they tell how far a contender is from that floor, whatever it really moves. On a GPU they follow
    from the time between device events, ``device_ms``; the benchmark's own figures include waiting for the device.
    """

    def run(function: Callable[..., torch.Tensor], input_sets: Sequence[tuple], floor_bytes: int) -> None:
        upcoming = itertools.cycle(input_sets)
        result = function(*input_sets[0])
        # A loss gets the incoming gradient of loss.backward(), a feature any.
        weight = torch.ones_like(result) if result.dim() == 0 else torch.randn_like(result)

        def forward_backward() -> tuple[torch.Tensor, ...]:
            inputs = next(upcoming)
            leaves = [t for t in inputs if t is not None and t.requires_grad]
            return torch.autograd.grad(function(*inputs), leaves, weight)

        def and_wait() -> None:
            forward_backward()
            torch.cuda.synchronize(device)

        for _ in range(3):
            forward_backward()
        info = benchmark.extra_info
        params = {name: str(value).replace("torch.", "") for name, value in request.node.callspec.params.items()}
        info.update(
            op=request.node.get_closest_marker("op").args[0],
            contender=params.pop("contender", None) or params.pop("variant", "peer"),
            case=", ".join(value for name, value in params.items() if name != "device"),
            **setting(device),
            input_sets=len(input_sets),
            floor_bytes=floor_bytes,
            copy_gigabytes_per_second=round(copy_bandwidth(device), 2),
            peak_extra_bytes=peak_extra_bytes(forward_backward, device),
        )
        if device.type == "cuda":
            info["launches"] = launches(forward_backward, device)
            info["device_ms"], info["cpu_ms"] = device_milliseconds(forward_backward, device)
        benchmark(and_wait if device.type == "cuda" else forward_backward)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = info["device_ms"] / 1e3 if device.type == "cuda" else benchmark.stats.stats.median
        info["floor_gigabytes_per_second"] = round(floor_bytes / seconds / 1e9, 3)
        info["share_of_copy"] = round(floor_bytes / seconds / 1e9 / copy_bandwidth(device), 4)

    return run


@pytest.fixture
def clock(device):
    """``clock()``: seconds, when the device has done all its work."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


@pytest.fixture
def peak_memory(device):
    """``peak_memory(function)``: the bytes that a call has in use at its peak beyond what was in use before."""
    return functools.partial(peak_extra_bytes, device=device)


@pytest.fixture
def side_by_side(benchmark, device, clock, request):
    """``side_by_side(contenders, calls=..., rounds=..., facts=...)``: time them in alternation, so that whatever else
    the machine does hits all alike.

    In every round each contender, a callable, is called once for nothing (its data comes back to the caches) and then
    ``calls`` times, undisturbed: only the end waits for the device. The seconds of a call in each round go into
    ``extra_info["contenders"]``, with what else ``facts`` says of each contender. ``images`` is what a call handles,
    for a column of images/s. ``compact`` makes a table with a line a case.
    """

    def run(
        contenders: dict[str, Callable[[], Any]],
        *,
        calls: int,
        rounds: int,
        facts: dict[str, dict[str, Any]],
        images: int | None = None,
        compact: bool = False,
    ) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}

        def one_round() -> None:
            for name, call in contenders.items():
                call()
                begin = clock()
                for _ in range(calls):
                    call()
                seconds[name].append((clock() - begin) / calls)

        benchmark.pedantic(one_round, rounds=rounds)
        benchmark.extra_info.update(
            op=request.node.get_closest_marker("op").args[0],
            case=str(request.node.callspec.params["case"]),
            **setting(device),
            calls=calls,
            contenders={name: {"seconds": seconds[name], **facts[name]} for name in contenders},
        )
        if images is not None:
            benchmark.extra_info["images"] = images
        if compact:
            benchmark.extra_info["compact"] = True

    return run


@pytest.fixture
def rotate(device):
    """``rotate(make, bytes_of_one)``: enough independent input sets to exceed the caches."""

    def build(make: Callable[[], tuple], bytes_of_one: int) -> list[tuple]:
        return [make() for _ in range(min(MAX_SETS, 1 + ROTATION_BYTES[device.type] // bytes_of_one))]

    return build


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same inputs for every contender."""
    torch.manual_seed(0)
