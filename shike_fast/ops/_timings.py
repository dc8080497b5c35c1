"""The time of operators, forward and backward, on a backend, on the reference and under ``torch.compile``.

    python -c "...; main()" DEVICE REPORT OPERATOR=BACKEND[,BACKEND]...

``REPORT`` receives one JSON object a line: ``operator``, ``case`` and ``milliseconds`` by backend, the reference and
``torch.compile`` of it among them.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from shike_fast.ops._trial_cases import Case, timed_cases

Call = Callable[..., Tensor]


def _milliseconds(call: Call, case: Case) -> float:
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
    on_gpu = leaves[0].device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(leaves[0].device)
    start = time.perf_counter()
    result = call(*leaves)
    torch.autograd.grad(result if result.dim() == 0 else result.sum(), leaves)
    if on_gpu:
        torch.cuda.synchronize(leaves[0].device)
    return 1e3 * (time.perf_counter() - start)


def _on(case: Case, backend: str) -> Call:
    return lambda *leaves: case.call(*leaves, backend=backend)


def _fastest(calls: dict[str, Call], case: Case, rounds: int) -> dict[str, float]:
    """The shortest of some rounds, in each of which every call has its turn."""
    times = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name] = min(times[name], _milliseconds(call, case))
    return times


def timed(operator: str, backend: str, device: torch.device) -> Iterator[tuple[str, tuple[float, float]]]:
    """By case the milliseconds of a backend and of the reference."""
    for case in timed_cases(operator, device):
        calls = {name: _on(case, name) for name in (backend, "reference")}
        times = _fastest(calls, case, 12 if device.type == "cuda" else 5)
        yield case.name, (times[backend], times["reference"])


def compared(operator: str, backends: Sequence[str], device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """By case the milliseconds of backends, of the reference and of ``torch.compile`` of the reference.

    The smallest and the largest case of each dtype: compiling takes seconds a case.
    """
    by_dtype: dict[torch.dtype, list[Case]] = {}
    for case in timed_cases(operator, device):
        by_dtype.setdefault(case.leaves[0].dtype, []).append(case)
    for case in (case for cases in by_dtype.values() for case in (cases[0], cases[-1])):
        torch.compiler.reset()  # code for the very shape, as for the first that a program has
        calls = {name: _on(case, name) for name in (*backends, "reference")}
        calls["torch.compile"] = torch.compile(_on(case, "reference"), dynamic=False)
        yield case.name, _fastest(calls, case, 20)


def main() -> None:
    """Time what the command line names."""
    device, report, *operators = sys.argv[1:]
    with open(report, "a", buffering=1, encoding="utf-8") as file:
        for words in operators:
            operator, _, backends = words.partition("=")
            for case, times in compared(operator, backends.split(",") if backends else (), torch.device(device)):
                file.write(json.dumps({"operator": operator, "case": case, "milliseconds": times}) + "\n")
