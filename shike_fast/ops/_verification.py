"""Trying backends in processes of their own, and what this process knows of them.

A backend that writes where it must not, crashes or hangs ends its own process; the verdict says how.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from shike_fast.ops import _verdicts
from shike_fast.ops._guards import PLAIN_TENSORS, is_plain
from shike_fast.ops._verdicts import CRASHED, NOT_TRIED, PASSED, TIMED_OUT, Verdict, Verdicts

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # of a kind of device, besides the reference
SECONDS = 20.0  # for all operators of a backend
CROWDED = 6  # times as long may trials on a CPU last, whose own time counts there: others may use the cores
MARGIN = 1.25  # times as fast must be what is preferred to a backend that stands before it
REFERENCE_MARGIN = 2.0  # and the reference: where it is nearly as fast, results shall not hang on a measurement
COMMAND = (  # arguments follow; the search path comes first, so that the same package is tried
    sys.executable or "python",
    "-c",
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from shike_fast.ops._trials import main; main()",
)

_known: dict[str, Verdicts] = {}  # by device, as "cpu" or "cuda:0"
_untold: set[str] = set()  # devices of which nothing is known and of which the user has been told
_forked = False


def _in_a_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_in_a_fork)


def name_of(device: torch.device) -> str:
    """``cpu``, or ``cuda:N`` with its number."""
    if device.type != "cuda":
        return device.type
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def known(device: torch.device) -> Verdicts | None:
    """What is known already, in this process or in the file."""
    name = name_of(device)
    if name not in _known and (found := _verdicts.load(_verdicts.machine(device))) is not None:
        _known[name] = found
    return _known.get(name)


def verify(
    device: torch.device,
    operators: Iterable[str],
    missing: Callable[[str, torch.device], str | None],
    *,
    again: bool = False,
    seconds: float = SECONDS,
) -> Verdicts:
    """The verdicts on all backends of a device, from the file or from trials now.

    Args:
        device: whose backends.
        operators: their names.
        missing: says why a backend cannot run on the device at all, or None.
        again: try them whatever the file says.
        seconds: for all operators of one backend.
    """
    wanted = _verdicts.machine(device)
    with _verdicts.alone():  # the others of one launch find what the first one found
        found = None if again else _verdicts.load(wanted)
        if found is None:
            names = list(operators)
            found = {}
            for backend in BACKENDS.get(device.type, ()):
                reason = missing(backend, device)
                if reason is None:
                    found[backend] = tried(backend, device, names, seconds=seconds)
                else:
                    found[backend] = {name: Verdict(NOT_TRIED, reason) for name in names}
            _verdicts.store(wanted, found)
    _known[name_of(device)] = found
    return found


def tried(
    backend: str,
    device: torch.device,
    operators: Sequence[str],
    *,
    seconds: float = SECONDS,
    command: Sequence[str] | None = None,
) -> dict[str, Verdict]:
    """Try operators on a backend; one that ends its process costs the others nothing but a new process."""
    on_cpu = device.type == "cpu"
    deadline = time.monotonic() + seconds * (CROWDED if on_cpu else 1)
    verdicts: dict[str, Verdict] = {}
    remaining = list(operators)
    while remaining:
        found = _process(command or COMMAND, backend, device, remaining, deadline, seconds if on_cpu else None)
        verdicts |= found
        if not found:
            break
        remaining = [name for name in remaining if name not in found]
    return verdicts


def _process(
    command: Sequence[str],
    backend: str,
    device: torch.device,
    operators: Sequence[str],
    deadline: float,
    processor_seconds: float | None,
) -> dict[str, Verdict]:
    """The verdicts up to the operator with which the process ended."""
    with tempfile.TemporaryDirectory(prefix="shike_fast-") as folder:
        report, errors = Path(folder) / "report", Path(folder) / "errors"
        report.touch()
        arguments = [json.dumps(sys.path), backend, name_of(device), str(report), *operators]
        try:
            with errors.open("wb") as file:
                process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    start_new_session=True,
                )
        except OSError as error:
            return {name: Verdict(NOT_TRIED, f"no process can be started: {error}") for name in operators}
        timed_out = False
        try:
            if processor_seconds is not None:
                _limit(process.pid, processor_seconds)
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
        lines = report.read_text(encoding="utf-8").splitlines()
        last_words = errors.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2][:300]
    timed_out = timed_out or process.returncode == -signal.SIGXCPU
    verdicts, begun = _read(lines)
    if begun is None and len(verdicts) < len(operators):
        begun = operators[len(verdicts)], "its start"
    if begun is not None:
        name, case = begun
        if timed_out:
            verdicts[name] = Verdict(TIMED_OUT, f"{case}: no end within the time for this backend")
        elif process.returncode < 0:
            verdicts[name] = Verdict(CRASHED, f"{case}: {signal.Signals(-process.returncode).name}")
        else:
            verdicts[name] = Verdict(CRASHED, f"{case}: status {process.returncode}: {last_words or 'without a word'}")
        if timed_out:
            left = Verdict(TIMED_OUT, f"{name} took the time for this backend")
            verdicts |= {other: left for other in operators if other not in verdicts}
    return verdicts


def _limit(pid: int, seconds: float) -> None:
    """SIGXCPU ends a process that has used so much of the processors; elsewhere than on Linux nothing does."""
    if sys.platform == "linux":
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            resource.prlimit(pid, resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and of all that it started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.wait()


def _read(lines: Sequence[str]) -> tuple[dict[str, Verdict], tuple[str, str] | None]:
    """What was found, and the operator and case that began last without an end."""
    verdicts: dict[str, Verdict] = {}
    begun: tuple[str, str] | None = None
    for line in lines:
        try:
            fields: dict[str, Any] = json.loads(line)
        except ValueError:
            break  # a line that its writer did not end
        if "begin" in fields:
            begun = fields["begin"], fields["case"]
        else:
            times = {name: (own, other) for name, (own, other) in fields.get("times", {}).items()}
            verdicts[fields["end"]] = Verdict(fields["status"], fields.get("reason", ""), times)
            begun = None
    return verdicts, begun


# ---- the choice


def order(operator: str, verdicts: Verdicts, dtype: torch.dtype, size: str) -> tuple[str, ...]:
    """The backends that passed, the fastest first, and the reference where it belongs."""
    passed = {b: of_ops[operator] for b, of_ops in verdicts.items() if operator in of_ops}
    passed = {backend: verdict for backend, verdict in passed.items() if verdict.status == PASSED}
    kind = str(dtype).removeprefix("torch.")
    ranked: list[tuple[str, float | None]] = []
    reference = None
    for backend, verdict in passed.items():
        times = _times(verdict, kind, size)
        ranked.append((backend, None if times is None else times[0]))
        reference = times[1] if times is not None else reference
    ranked.append(("reference", reference))
    # What stands earlier is preferred, unless a later one is clearly faster.
    result: list[str] = []
    while ranked:
        first = ranked[0]
        for other in ranked[1:]:
            margin = REFERENCE_MARGIN if other[0] == "reference" else MARGIN
            if first[1] is not None and other[1] is not None and other[1] * margin < first[1]:
                first = other
        result.append(first[0])
        ranked.remove(first)
    return tuple(result)


def _times(verdict: Verdict, kind: str, size: str) -> tuple[float, float] | None:
    """Of this dtype and size, or of the nearest size that was timed; None for a dtype that was not."""
    sizes = ("small", "medium", "large")
    for nearest in sorted(sizes, key=lambda other: abs(sizes.index(other) - sizes.index(size))):
        if (times := verdict.times.get(f"{kind} {nearest}")) is not None:
            return times
    return None


def may_verify(tensor: torch.Tensor) -> str | None:
    """Why this is no moment to start a process, or None."""
    if os.environ.get("SHIKE_FAST_VERIFY", "").lower() == "off":
        return "SHIKE_FAST_VERIFY=off"
    if _forked:
        return "this is a forked process"
    if not is_plain() or type(tensor) not in PLAIN_TENSORS:
        return "a compiler or a tracer is at work"
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def tell_unknown(device: str, reason: str) -> None:
    """Say once a device that the reference runs there."""
    if device not in _untold:
        _untold.add(device)
        warnings.warn(
            f"shike_fast: the reference runs on {device}, since its kernels have not been verified there and cannot be "
            f"now ({reason}); run python -m shike_fast.verify",
            RuntimeWarning,
            stacklevel=2,
        )


def describe(operator: str, verdicts: Verdicts, where: str) -> str:
    """``dkt_loss: cuda (verified on this GPU, 6.2 times the reference)``, or why the reference runs."""
    if not verdicts:
        return f"{operator}: reference (not verified on this {where}; run python -m shike_fast.verify)"
    (first, *_) = order(operator, verdicts, torch.float32, "large")
    if first != "reference":
        gain = verdicts[first][operator].gain()
        return f"{operator}: {first} (verified on this {where}" + (
            f", {gain:.1f} times the reference)" if gain is not None else ")"
        )
    reasons = [
        f"{backend} is slower"
        if of_ops[operator].status == PASSED
        else f"{backend} {of_ops[operator].status}: {of_ops[operator].reason}"
        for backend, of_ops in verdicts.items()
        if operator in of_ops
    ]
    return f"{operator}: reference ({'; '.join(reasons) or 'no other backend'})"
