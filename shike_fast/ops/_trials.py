"""The trials of a backend, in a process of their own: what it must compute rightly before it is used unasked.

    python -c "...; main()" BACKEND DEVICE REPORT OPERATOR...

Each operator runs its cases against the reference in float64. In every output the largest error may be four times that
of the reference in the dtype and on the device of the case, plus ``ROUNDINGS`` units of that dtype in the last place of
the largest entry. Memory that the backend allocates lies between guard zones and holds NaN at first. Every case runs
twice and must give equal bits. What passes is timed beside the reference.

``REPORT`` receives one JSON object a line, so that a reader knows where a process ended that died.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shike_fast._util.resources import is_out_of_memory
from shike_fast.ops._native import native
from shike_fast.ops._timings import timed
from shike_fast.ops._trial_cases import CASES, Case

TIMES_EAGER = 4
ROUNDINGS = 32
ZONE = 512  # bytes before and behind what is allocated
_FILL, _GUARD = 0xFF, 0xA5  # 0xFF in every byte is NaN in all floating dtypes
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


class Failure(Exception):
    """What is wrong, in one clause."""


def main(cpu_level: str | None = None) -> None:
    """Try the operators that the command line names, on an instruction set of the CPU or on the one in use."""
    if cpu_level is not None:
        native().set_cpu_level(cpu_level)
    backend, device, report, *names = sys.argv[1:]
    _die_with_the_parent()
    if device == "cpu":
        torch.set_num_threads(1)  # others may use the cores, and threads that wait for each other take seconds
    with open(report, "a", buffering=1, encoding="utf-8") as file:

        def tell(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")

        try:
            torch.empty(1, device=device)
        except Exception as error:  # another process has the device or its memory, or the driver is too old
            for name in names:
                tell(end=name, status="not tried", reason=_line(error))
            return
        for name in names:
            if name not in CASES:
                tell(end=name, status="not tried", reason="it has no trials")
                continue
            tell(begin=name, case="its first allocation")
            try:
                try_operator(name, backend, torch.device(device), lambda case: tell(begin=name, case=case))  # noqa: B023
                tell(end=name, status="passed", times=dict(timed(name, backend, torch.device(device))))
            except Failure as failure:
                tell(end=name, status="failed", reason=str(failure))
            except Exception as error:  # whatever a broken backend raises is the verdict
                if is_out_of_memory(error):
                    tell(end=name, status="not tried", reason=_line(error))
                else:
                    tell(end=name, status="failed", reason=f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _die_with_the_parent() -> None:
    """However it ends: a backend that hangs must not outlive who waits for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            sys.exit("the parent has ended")


def try_operator(name: str, backend: str, device: torch.device, tell: Callable[[str], None]) -> None:
    """Run all cases of an operator.

    Raises:
        Failure: naming the first case that is wrong.
    """
    for case in CASES[name](device):
        tell(case.name)
        try:
            _try_case(case, backend)
        except Failure as failure:
            raise Failure(f"{case.name}: {failure}") from None


def _try_case(case: Case, backend: str) -> None:
    with guarded() as check:
        mine = _results(case, backend)
        check()
        again = _results(case, backend)
        check()
    for number, (first, second) in enumerate(zip(mine, again, strict=True)):
        if not _equal_bits(first, second):
            raise Failure(f"two runs give different {_what(number)}")
    if mine[0].device.type == "cuda":
        _try_streams(case, backend, mine)
    eager, exact = _results(case, "reference"), _results(case, "reference", torch.float64)
    for number, (got, usual, truth) in enumerate(zip(mine, eager, exact, strict=True)):
        got, usual = got.double(), usual.double()
        if not case.values:
            if not torch.equal(got.isfinite(), usual.isfinite()):
                raise Failure(f"other {_what(number)} are finite than the reference's")
            continue
        if not torch.isfinite(got).all():
            raise Failure(f"{_what(number)} that are not finite")
        unit = torch.finfo(mine[number].dtype).eps
        size = float(truth.abs().max()) if truth.numel() else 0.0
        error = float((got - truth).abs().max()) if truth.numel() else 0.0
        allowed = TIMES_EAGER * (float((usual - truth).abs().max()) if truth.numel() else 0.0) + ROUNDINGS * unit * size
        if error > allowed:
            raise Failure(f"{_what(number)} err by {error:.2g} where {allowed:.2g} is allowed")


def _what(number: int) -> str:
    return "results" if number == 0 else f"gradients of input {number - 1}"


def _results(case: Case, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and the gradients of the leaves, for a grad_output that is no constant."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in _laid_out(case.leaves, dtype)]
    result = case.call(*leaves, backend=backend)
    count = max(result.numel(), 1)
    grad_output = torch.arange(1, result.numel() + 1, device=result.device).reshape(result.shape) / count - 0.3
    # A grad_output given to autograd itself makes PyTorch import sympy, which takes longer than all the rest.
    gradients = torch.autograd.grad((result * grad_output.to(result.dtype)).sum(), leaves)
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
    return [result.detach(), *gradients]


def _laid_out(leaves: Sequence[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    return leaves if dtype is None else [leaf.contiguous() for leaf in leaves]


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) and torch.equal(one.isnan(), other.isnan())


def _try_streams(case: Case, backend: str, expected: list[Tensor]) -> None:
    """On another stream, in a captured graph, and while another device is the current one."""
    device = expected[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        aside = _results(case, backend)
    torch.cuda.synchronize(device)
    if not all(map(_equal_bits, expected, aside)):
        raise Failure("another stream gives other bits")
    graph, inputs = torch.cuda.CUDAGraph(), [leaf.detach() for leaf in case.leaves]
    with torch.cuda.graph(graph):
        captured = case.call(*inputs, backend=backend)
    graph.replay()
    torch.cuda.synchronize(device)
    if not _equal_bits(captured, expected[0]):
        raise Failure("a captured graph gives other bits")
    if (count := torch.cuda.device_count()) > 1:
        with torch.cuda.device((expected[0].get_device() + 1) % count):
            elsewhere = _results(case, backend)
        if not all(map(_equal_bits, expected, elsewhere)):
            raise Failure("other bits while another device is the current one")


@contextmanager
def guarded() -> Iterator[Callable[[], None]]:
    """Allocations meanwhile hold NaN and lie between guard zones; the function that it gives looks at the zones."""
    taken: list[tuple[Tensor, int]] = []
    before = torch.empty, torch.empty_like, Tensor.new_empty

    def allocate(like: Tensor) -> Tensor:  # of the shape, strides, dtype and device of ``like``
        strides = zip(like.shape, like.stride(), strict=True)
        used = 0 if like.numel() == 0 else 1 + sum((n - 1) * stride for n, stride in strides)
        size = used * like.element_size()
        raw = before[0](ZONE + size + ZONE, dtype=torch.uint8, device=like.device).fill_(_GUARD)
        raw[ZONE : ZONE + size] = _FILL
        taken.append((raw, size))
        own = before[0](0, dtype=like.dtype, device=like.device)
        storage = raw.untyped_storage()
        return own.set_(storage, ZONE // like.element_size(), like.shape, like.stride())

    def check() -> None:
        for raw, size in taken:
            if not bool((raw[:ZONE] == _GUARD).all()) or not bool((raw[ZONE + size :] == _GUARD).all()):
                raise Failure("it writes outside its outputs")
        taken.clear()

    def replacing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: allocate(function(*args, **options))

    torch.empty, torch.empty_like = replacing(before[0]), replacing(before[1])
    Tensor.new_empty = replacing(before[2])  # type: ignore[method-assign]
    try:
        yield check
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = before  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
