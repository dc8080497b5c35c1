"""What is known of the backends on this machine: a verdict for each operator, kept from run to run in one JSON file."""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs
import torch

from shike_fast._util.files import atomic_write, lock
from shike_fast.errors import ShikeError
from shike_fast.ops._native import native, native_error

PASSED, FAILED, CRASHED, TIMED_OUT, NOT_TRIED = "passed", "failed", "crashed", "timed out", "not tried"
STATUSES = (PASSED, FAILED, CRASHED, TIMED_OUT, NOT_TRIED)
FORMAT = 1
MOST_ENTRIES = 32  # machines in the file; the oldest go first


@dataclass(frozen=True)
class Verdict:
    """What became of an operator on one backend.

    ``times`` are milliseconds of forward and backward, (this backend, the reference) by ``"float32 small"`` and so on.
    """

    status: str
    reason: str = ""  # the worst case, the signal, what was missing
    times: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def gain(self) -> float | None:
        """Times the reference, at the largest size that was timed in float32."""
        timed = [own_and_reference for name, own_and_reference in self.times.items() if name.startswith("float32")]
        return timed[-1][1] / timed[-1][0] if timed else None


Verdicts = Mapping[str, Mapping[str, Verdict]]  # backend -> operator -> verdict


def cache_folder() -> Path:
    """``SHIKE_FAST_CACHE``, or the user's folder for what can be made anew."""
    named = os.environ.get("SHIKE_FAST_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("shike_fast", appauthor=False)


def verdict_file() -> Path:
    """The file of all verdicts."""
    return cache_folder() / "verdicts.json"


def machine(device: torch.device) -> dict[str, str]:
    """All that a verdict depends on: device, driver, and what the kernels were made of."""
    found = {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "library": _library(),
        "sources": _sources(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        found["driver"] = _driver()
    else:
        found["device"] = f"{_processor()}, {native().cpu_level() if native_error() is None else 'no kernels'}"
    return found


def load(wanted: Mapping[str, str]) -> Verdicts | None:
    """What the file says of this machine; None where it says nothing, or nothing that can be understood."""
    return next((verdicts for known, verdicts in _entries() if known == wanted), None)


def store(wanted: Mapping[str, str], verdicts: Verdicts) -> str | None:
    """Put the verdicts of a machine into the file; returns why that was not possible.

    What could not be tried may be possible another time and is not kept.
    """
    kept = {
        backend: {op: verdict for op, verdict in of_ops.items() if verdict.status != NOT_TRIED}
        for backend, of_ops in verdicts.items()
    }
    entries = [(known, of_machine) for known, of_machine in _entries() if known != wanted]
    entries = [*entries[-MOST_ENTRIES + 1 :], (dict(wanted), kept)]
    content = {
        "format": FORMAT,
        "entries": [{"machine": known, "verdicts": plain(of_machine)} for known, of_machine in entries],
    }
    try:
        verdict_file().parent.mkdir(parents=True, exist_ok=True)
        atomic_write(verdict_file(), json.dumps(content, indent=1).encode())
    except (OSError, ShikeError) as error:
        return str(error)
    return None


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process verifies; where no file can be made there is nothing to wait for."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        file = open(cache_folder() / "verdicts.lock", "ab")  # noqa: SIM115  # closed below
    except OSError:
        yield
        return
    with file:
        lock(file, wait=True)
        yield


def _entries() -> list[tuple[dict[str, str], Verdicts]]:
    try:
        content = json.loads(verdict_file().read_bytes())
        if content["format"] != FORMAT:
            return []
        return [(entry["machine"], _verdicts(entry["verdicts"])) for entry in content["entries"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged, of another version, or not there: verified anew


def _verdicts(content: Any) -> Verdicts:
    verdicts: dict[str, dict[str, Verdict]] = {}
    for backend, of_ops in content.items():
        verdicts[backend] = {}
        for op, fields in of_ops.items():
            times = {str(name): (float(own), float(other)) for name, (own, other) in fields["times"].items()}
            verdict = Verdict(fields["status"], str(fields["reason"]), times)
            if verdict.status not in STATUSES or any(t <= 0 for pair in times.values() for t in pair):
                raise ValueError(f"{op}: {fields}")
            verdicts[backend][op] = verdict
    return verdicts


def plain(verdicts: Verdicts) -> dict[str, Any]:
    """What JSON can hold."""

    def fields(verdict: Verdict) -> dict[str, Any]:
        times = {name: list(pair) for name, pair in verdict.times.items()}
        return {"status": verdict.status, "reason": verdict.reason, "times": times}

    return {backend: {op: fields(verdict) for op, verdict in ops.items()} for backend, ops in verdicts.items()}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _driver() -> str:
    """The driver's own version where Linux shows it, else that of CUDA which it is for."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        version = getattr(torch._C, "_cuda_getDriverVersion", None)  # of builds for CUDA
        return "unknown" if version is None else f"CUDA {version()}"


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _library() -> str:
    """The build of the compiled library, or why there is none."""
    if (error := native_error()) is not None:
        return f"{type(error).__name__}: {error}"
    status = os.stat(str(native().__file__))
    return f"{native().build_info()['version']}, {status.st_size} bytes of {status.st_mtime_ns}"


@functools.cache
def _sources() -> str:
    """A digest of the Python files that run or are kernels."""
    digest = hashlib.sha256()
    triton_kernels = importlib.util.find_spec("shike_fast.kernels")
    found = triton_kernels.submodule_search_locations if triton_kernels is not None else None
    folders = [Path(__file__).parent, *map(Path, found or ())]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
