"""What all tests share: surroundings that are not the caller's, programs that end with their test, limits of time,
fixed seeds, a bounded number of threads, the golden arrays, a small image folder, skipping without a GPU, two processes
that talk to each other, and what nvcc makes of a source file."""

import importlib.util
import locale
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import settings
from limits import Limits
from PIL import Image
from programs import LIMIT, MARK, Programs
from ptx import readable

# For the tests and all programs that they start: what the caller's terminal, language, proxy, launcher or Python is set
# to would change what is printed, fetched or waited for.
for _name in (
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *(name for name in os.environ if name.startswith(("LC_", "LANG"))),
    *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *(name for name in os.environ if name.startswith("TORCHELASTIC_")),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PYTHONWARNINGS", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONCOERCECLOCALE", "PYTHON_COLORS"),
    *("PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONVERBOSE", "PYTHONINSPECT"),
):
    os.environ.pop(_name, None)
os.environ |= {"TERM": "xterm", "LC_ALL": "C.UTF-8", "GLOO_SOCKET_IFNAME": "lo"}  # processes meet on this machine
locale.setlocale(locale.LC_ALL, "")

# Verdicts on kernels are kept for all processes of these tests, and for nobody else.
if "PYTEST_XDIST_WORKER" not in os.environ and MARK not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="shike_fast-tests-")
    os.environ["SHIKE_FAST_CACHE"] = _cache.name
os.environ.pop("SHIKE_FAST_VERIFY", None)

# The same for signals: a script's background job ignores Ctrl-C, and so would all that it starts.
signal.pthread_sigmask(signal.SIG_SETMASK, ())
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)

GOLDEN = Path(__file__).parent / "golden"
CSRC = Path(__file__).parents[1] / "csrc"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\d+)'\n.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

# Reproducible anywhere: no clock, no memory of earlier runs.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


_programs = Programs()


def pytest_xdist_auto_num_workers() -> int:
    """A process a core that this one may use, as far as memory goes; one where they would share a GPU."""
    return 0 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), 8)


def pytest_configure(config: pytest.Config) -> None:
    limit = config.getoption("timeout", None)
    limit = float(config.getini("timeout")) if limit is None else limit
    if limit and not config.getoption("usepdb"):
        config.pluginmanager.register(Limits(limit, _programs.mark))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_device = pytest.mark.skip(reason="needs a CUDA device, and PyTorch finds none")
    no_nvcc = pytest.mark.skip(reason="needs nvcc")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_device)
        if "compile_cuda" in getattr(item, "fixturenames", ()) and NVCC is None:
            item.add_marker(no_nvcc)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, min(2, len(os.sched_getaffinity(0)) // processes)))


@pytest.fixture
def one_thread(_threads: None) -> Iterator[None]:
    """For maps so small that threads wait for each other longer than they work, and for equal rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _verified() -> None:
    """Not by the first call of a test, which may be one that must not start a process."""
    from shike_fast import ops

    ops.verify("cpu")


@pytest.fixture(scope="session", autouse=True)
def _full_float32() -> None:
    """Tests on a GPU compare float32, not TensorFloat-32 with its ten bits, PyTorch's default for convolutions."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def programs() -> Programs:
    """``programs.run(command)`` and ``programs.start(command)``, for every program that a test needs."""
    return _programs


@pytest.fixture(autouse=True)
def _no_program_outlives_its_test() -> Iterator[None]:
    yield
    _programs.end()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """``golden(name)``: the arrays of tests/golden/NAME.npz by key. Treat them as read-only."""
    cache: dict[str, dict[str, np.ndarray]] = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in cache:
            with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
                cache[name] = {key: archive[key] for key in archive.files}
        return cache[name]

    return load


@pytest.fixture(scope="session")
def interpret(programs: Programs) -> Callable[[str, list[str]], None]:
    """``interpret(file, checks)``: run these functions of a test file, and no other, with interpreted Triton kernels.

    Triton decides at its import whether it interprets, so they run in separate processes.
    """

    environment = os.environ | {"TRITON_INTERPRET": "1"}
    options = ["-v", "-n", "0", "-m", "", "-p", "no:cacheprovider", "-o", "python_functions=check_"]

    def run(file: str, checks: list[str]) -> None:
        def work(part: list[str]) -> None:
            command = [sys.executable, "-m", "pytest", *options, *(f"{file}::{name}" for name in part)]
            done = programs.run(command, env=environment)
            output = done.stdout + done.stderr
            assert done.returncode == 0, output[-6000:]
            missing = [name for name in part if f"::{name}" not in output]
            assert part and not missing and " skipped" not in output.splitlines()[-1], (missing, output[-2000:])

        # The interpreter uses one core: half of the checks in a process each, where there are two.
        halves = [checks[::2], checks[1::2]] if len(checks) > 1 else [checks]
        with ThreadPoolExecutor(len(halves)) as pool:
            list(pool.map(work, halves))

    return run


@pytest.fixture
def published_state(golden: Callable[[str], dict[str, np.ndarray]]) -> Callable[[str], dict[str, torch.Tensor]]:
    """``published_state("resnet8_moe")``: the recorded state_dict under the published names."""

    def load(name: str) -> dict[str, torch.Tensor]:
        arrays = golden(name)
        keys = [key for key in arrays if key.startswith("state/")]
        return {key.removeprefix("state/"): torch.from_numpy(arrays[key]) for key in keys}

    return load


@pytest.fixture(scope="session")
def two_processes(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[], Any]], list[Any]]:
    """``two_processes(work)``: what ``work()``, a function of a module, returns in each process of a Gloo group."""

    def run(work: Callable[[], Any]) -> list[Any]:
        folder = tmp_path_factory.mktemp("processes")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(pytestconfig.rootpath)  # the processes import the module of the function by its name
            spawned = mp.spawn(_work_in_a_group, (folder, work), nprocs=2, join=False)
        deadline = time.monotonic() + LIMIT
        try:
            while not spawned.join(timeout=max(deadline - time.monotonic(), 0)):
                assert time.monotonic() < deadline, f"two processes: no end of {work.__name__} after {LIMIT:g} s"
        finally:
            for process in spawned.processes:
                process.kill()
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

    return run


def _work_in_a_group(rank: int, folder: Path, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT / 2))
    torch.save(work(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class CompiledKernels(NamedTuple):
    """By name, such as ``dkt_forward_kernel<3>``; a dtype and a bool among the template's arguments are numbers."""

    resources: dict[str, dict[str, str]]  # the groups of RESOURCES
    code: dict[str, str]  # SASS


@pytest.fixture(scope="session")
def compile_cuda(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], CompiledKernels]:
    """``compile_cuda(name, architecture)``: the kernels of csrc/NAME for, say, sm_90."""

    def output_of(command: list[str]) -> str:
        done = programs.run(command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def compiled(name: str, architecture: str) -> CompiledKernels:
        assert NVCC is not None
        cubin = tmp_path_factory.mktemp("cuda") / "kernels.cubin"
        options = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{CSRC}", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
        report = output_of([NVCC, *options, str(CSRC / name), "-o", str(cubin)])
        tool = _cuobjdump(Path(NVCC).parent)
        assert tool is not None, "nvcc brings cuobjdump along, and so does Triton"
        functions = [text.partition("\n") for text in output_of([tool, "-sass", str(cubin)]).split("Function : ")[1:]]
        return CompiledKernels(
            {readable(match["name"]): match.groupdict() for match in RESOURCES.finditer(report)},
            {readable(mangled.strip()): code for mangled, _, code in functions},
        )

    return compiled


def _cuobjdump(folder: Path) -> str | None:
    """CUDA's disassembler: nvcc's companion in ``folder``, or the one that Triton brings."""
    found = shutil.which("cuobjdump", path=str(folder)) or shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return found


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """An image folder: train/{cat,dog,eel} with 6, 4, 2 images of assorted sizes and formats, val with 2 each."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(5)
    for part, counts in (("train", (6, 4, 2)), ("val", (2, 2, 2))):
        for label, (name, count) in enumerate(zip(("cat", "dog", "eel"), counts, strict=True)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(24, 60, 2)
                pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
                pixels[..., label] += 150
                extension = (".jpg", ".png", ".JPEG")[i % 3]
                Image.fromarray(pixels).save(folder / f"{i}{extension}")
    return root


@pytest.fixture
def failed(capsys):
    """``failed(status, "a", "b")``: whether the command printed one line of an error that holds these texts."""

    def check(status, *texts, expected=2):
        error = capsys.readouterr().err
        assert status == expected, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        for text in texts:
            assert str(text) in error

    return check
