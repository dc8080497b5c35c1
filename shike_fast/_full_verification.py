"""What ``python -m shike_fast.verify --full`` does beside the trials of backends, in parts of less than eight minutes.

``trials``: every instruction set of a CPU, as the trials of each backend have run before. ``timings``: the operators
beside ``torch.compile`` of the reference. ``tests``, ``triton``: the device tests, those that compile Triton's kernels
apart. ``sanitizer``: NVIDIA's memory checkers, on this library's kernels alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shike_fast import ops
from shike_fast.ops._native import native, native_error
from shike_fast.ops._process import REPORT, Ended, python, run
from shike_fast.ops._verdicts import FAILED, NOT_TRIED, PASSED, TIMED_OUT
from shike_fast.ops._verification import tried

PARTS = ("trials", "timings", "tests", "sanitizer", "triton")
SECONDS = 400.0  # of a part, which may have to build or to try the backends first
CHECKERS = (("memcheck", "float32"), ("racecheck", "bfloat16"), ("synccheck", "bfloat16"), ("initcheck", "float16"))
TESTS = (*("-m", "pytest", "tests", "-n", "0", "-m", "gpu"), *("-q", "-o", "timeout=200", "--durations=15"))
CHECKOUT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """One thing that was tried."""

    name: str
    status: str  # passed, failed, timed out or not tried
    reason: str
    seconds: float
    results: list[dict[str, Any]]  # lines of timings

    def text(self) -> str:
        """For a terminal."""
        reason = f": {self.reason}" if self.reason else ""
        lines = [f"{self.name}: {self.status}{reason} ({self.seconds:.0f} s)"]
        for line in self.results:
            times = ", ".join(f"{name} {value:.3g} ms" for name, value in line["milliseconds"].items())
            lines.append(f"  {line['operator']:<21} {line['case']:<15} {times}")
        return "\n".join(lines)


def run_parts(parts: Sequence[str], devices: Sequence[torch.device], folder: Path, seconds: float) -> Iterator[Part]:
    """Run some of :data:`PARTS`.

    Args:
        parts: their names.
        devices: what they run on.
        folder: for what the programs print; made where it is missing.
        seconds: for all operators of a backend in the trials.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gpu = any(device.type == "cuda" for device in devices)
    for name in parts:
        if name == "trials":
            yield from _levels(devices, seconds)
        elif name == "timings":
            yield from map(_timings, devices)
        elif not gpu:
            yield Part(name, NOT_TRIED, "there is no GPU", 0, [])
        elif not (CHECKOUT / "tests").is_dir():
            yield Part(name, NOT_TRIED, "tests and benchmarks are in a checkout only", 0, [])
        elif name == "sanitizer":
            yield from _sanitizer(folder)
        else:
            yield _tests(name, folder)


def _levels(devices: Sequence[torch.device], seconds: float) -> Iterator[Part]:
    """The instruction sets that the kernels do not use by themselves here."""
    if all(device.type != "cpu" for device in devices) or native_error() is not None:
        return
    device = torch.device("cpu")
    library = native()
    for level in library.cpu_levels():
        if level == library.cpu_level():
            continue
        started = time.monotonic()
        program = python(f"from shike_fast.ops._trials import main; main({level!r})")
        found = tried("cpu", device, list(ops.verify(device)["cpu"]), seconds=seconds, program=program)
        bad = [(op, verdict) for op, verdict in found.items() if verdict.status != PASSED]
        reason = "; ".join(f"{op} {verdict.status}: {verdict.reason}" for op, verdict in bad)
        yield Part(f"trials on {level}", bad[0][1].status if bad else PASSED, reason, time.monotonic() - started, [])


def _timings(device: torch.device) -> Part:
    verdicts = ops.verify(device)
    operators = {op for of_ops in verdicts.values() for op in of_ops}
    words = []
    for op in sorted(operators):
        passed = [name for name, of_ops in verdicts.items() if op in of_ops and of_ops[op].status == PASSED]
        words.append(f"{op}={','.join(passed)}")
    command = [*python("from shike_fast.ops._timings import main; main()"), json.dumps(sys.path), str(device), REPORT]
    started = time.monotonic()
    ended = run([*command, *words], SECONDS)
    results = [json.loads(line) for line in ended.report if line.endswith("}")]
    return _part(f"timings on {device}", ended, started, results)


def _tests(name: str, folder: Path) -> Part:
    command = [sys.executable, *TESTS, "-k", "triton" if name == "triton" else "not triton"]
    command.append(f"--junitxml={(folder / name).absolute()}.xml")
    started = time.monotonic()
    return _part(name, run(command, SECONDS, output=folder / f"{name}.txt", cwd=CHECKOUT), started, [])


def _sanitizer(folder: Path) -> Iterator[Part]:
    """Only kernels whose names contain "shike": the others would take most of the time, and are not ours."""
    if (checker := shutil.which("compute-sanitizer")) is None:
        yield Part("sanitizer", NOT_TRIED, "compute-sanitizer is not on PATH", 0, [])
        return
    start = time.monotonic()
    for tool, dtype in CHECKERS:
        command = [checker, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=shike"]
        command += ["--leak-check", "no"] if tool == "memcheck" else []
        program = [sys.executable, "benchmarks/device_smoke.py", "cuda", "cuda", dtype]
        started = time.monotonic()
        limit = min(150.0, SECONDS - (started - start))
        ended = run([*command, *program], limit, output=folder / f"{tool}.txt", cwd=CHECKOUT)
        yield _part(f"{tool}, {dtype}", ended, started, [])


def _part(name: str, ended: Ended, started: float, results: list[dict[str, Any]]) -> Part:
    status = PASSED if ended.status == 0 else TIMED_OUT if ended.timed_out else FAILED
    return Part(name, status, "" if status == PASSED else ended.how(), time.monotonic() - started, results)
