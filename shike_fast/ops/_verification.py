"""Trying backends in separate processes, and what this process knows of them.

A backend that writes where it must not, crashes or hangs ends its own process; the verdict says how.
"""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from shike_fast.ops import _verdicts
from shike_fast.ops._guards import PLAIN_TENSORS, is_plain
from shike_fast.ops._process import REPORT, python, run
from shike_fast.ops._verdicts import CRASHED, NOT_TRIED, PASSED, TIMED_OUT, Verdict, Verdicts

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # of a kind of device, besides the reference
SECONDS = 20.0  # for all backends of a device
CROWDED = 6  # times as long may trials on a CPU last, whose own time counts there: others may use the cores
MARGIN = 1.25  # times as fast must be what is preferred to a backend that stands before it
REFERENCE_MARGIN = 2.0  # and the reference: where it is nearly as fast, results shall not hang on a measurement
TRIALS = python("from shike_fast.ops._trials import main; main()")

_known: dict[str, Verdicts] = {}  # by device, as "cpu" or "cuda:0"
_told: set[str] = set()  # warnings that the user has had
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
    operators: Mapping[str, Sequence[str]],
    missing: Callable[[str, torch.device], str | None],
    *,
    again: bool = False,
    seconds: float = SECONDS,
) -> Verdicts:
    """The verdicts on all backends of a device, from the file or from trials now.

    Args:
        device: whose backends.
        operators: of each backend, their names.
        missing: says why a backend cannot run on the device at all, or None.
        again: try them whatever the file says.
        seconds: for all of them; one may take its share, and what those before it have left.
    """
    wanted = _verdicts.machine(device)
    with _verdicts.alone():  # the others of one launch find what the first one found
        found = {} if again else dict(_verdicts.load(wanted) or {})
        untried = unknown(found, device, operators)
        reasons = {backend: missing(backend, device) for backend in untried}
        for backend, reason in reasons.items():
            if reason is not None:
                found[backend] = {
                    **found.get(backend, {}),
                    **dict.fromkeys(untried[backend], Verdict(NOT_TRIED, reason)),
                }
        if None in reasons.values():
            with _progress(wanted["device"]):
                possible = [backend for backend in untried if reasons[backend] is None]
                end = time.monotonic() + seconds
                for number, backend in enumerate(possible):
                    share = seconds if device.type == "cpu" else (end - time.monotonic()) / (len(possible) - number)
                    now = tried(backend, device, untried[backend], seconds=share)
                    found[backend] = {**found.get(backend, {}), **now}
            if (failure := _verdicts.store(wanted, found)) is not None:
                _warn_once(f"shike_fast: what verification found cannot be kept: {failure}")
    _known[name_of(device)] = found
    return found


def unknown(verdicts: Verdicts, device: torch.device, operators: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The operators without a verdict, by backend of the device."""
    backends = BACKENDS.get(device.type, ())
    left = {b: [name for name in operators[b] if name not in verdicts.get(b, {})] for b in backends}
    return {backend: names for backend, names in left.items() if names}


@contextlib.contextmanager
def _progress(device: str) -> Iterator[None]:
    """A line on standard error, as it lasts a while: ``shike_fast: verifying kernels on NVIDIA H100, once: 14 s``."""
    started = time.monotonic()
    say(f"shike_fast: verifying kernels on {device}, once")
    try:
        yield
    finally:
        say(f": {time.monotonic() - started:.0f} s\n")


def say(text: str) -> None:
    """Write to standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # full or closed: nothing that a result depends on
            sys.stderr.write(text)
            sys.stderr.flush()


def tried(
    backend: str,
    device: torch.device,
    operators: Sequence[str],
    *,
    seconds: float = SECONDS,
    program: Sequence[str] | None = None,
) -> dict[str, Verdict]:
    """Try operators on a backend; one that ends its process costs the others nothing but a new process."""
    on_cpu = device.type == "cpu"
    deadline = time.monotonic() + seconds * (CROWDED if on_cpu else 1)
    verdicts: dict[str, Verdict] = {}
    remaining = list(operators)
    while remaining:
        found = _process(program or TRIALS, backend, device, remaining, deadline, seconds if on_cpu else None)
        if verdicts:  # it had less than the whole time
            found = {name: _untimely(verdict) for name, verdict in found.items()}
        verdicts |= found
        if not found:
            break
        remaining = [name for name in remaining if name not in found]
    return verdicts


def _untimely(verdict: Verdict) -> Verdict:
    """One that had not the whole time for itself may have done nothing wrong: Triton compiles, and keeps it."""
    return Verdict(NOT_TRIED, f"the time was over at {verdict.reason}") if verdict.status == TIMED_OUT else verdict


def _process(
    program: Sequence[str],
    backend: str,
    device: torch.device,
    operators: Sequence[str],
    deadline: float,
    processor_seconds: float | None,
) -> dict[str, Verdict]:
    """The verdicts up to the operator with which the process ended."""
    words = [json.dumps(sys.path), backend, name_of(device), REPORT, *operators]
    try:
        ended = run([*program, *words], deadline - time.monotonic(), processor_seconds=processor_seconds)
    except OSError as error:
        return {name: Verdict(NOT_TRIED, f"no process can be started: {error}") for name in operators}
    verdicts, begun = _read(ended.report)
    if begun is None and len(verdicts) < len(operators):
        begun = operators[len(verdicts)], "its start"
    if begun is not None:
        name, case = begun
        verdict = Verdict(TIMED_OUT if ended.timed_out else CRASHED, f"{case}: {ended.how()}")
        verdicts[name] = verdict if name == operators[0] else _untimely(verdict)
        if ended.timed_out:
            left = Verdict(NOT_TRIED, f"the time was over at {name}")
            verdicts |= {other: left for other in operators if other not in verdicts}
    return verdicts


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
    _warn_once(
        f"shike_fast: the reference runs on {device}, since its kernels have not been verified there and cannot be now "
        f"({reason}); run python -m shike_fast.verify"
    )


def tell_fallback(operator: str, verdicts: Verdicts, device: str, chosen: str) -> None:
    """Say once which backends were wanted and did not prove themselves; none that is slower, or missing beside another.

    Args:
        operator: its name.
        verdicts: what is known of the device.
        device: its name.
        chosen: the backend that runs.
    """
    for backend, of_ops in verdicts.items():
        verdict = of_ops.get(operator)
        if verdict is None or verdict.status == PASSED:
            continue
        if verdict.status != NOT_TRIED:
            said = f"{operator}: {backend} {verdict.status} on {device}: {verdict.reason}; {chosen} runs"
        elif not any(of.get(operator, verdict).status == PASSED for of in verdicts.values()):
            said = f"the reference runs on {device}: {backend} not tried: {verdict.reason}"
        else:
            continue
        _warn_once(f"shike_fast: {said}")


def _warn_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def describe(operator: str, verdicts: Verdicts, device: torch.device) -> str:
    """``dkt_loss: cuda (verified on this GPU, 6.2 times the reference)``, or why the reference runs."""
    where = "GPU" if device.type == "cuda" else "CPU"
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
