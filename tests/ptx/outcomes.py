"""What is wrong with a case: errors, other bits in other orders, reports. Without a host, so that all may use it."""

from typing import TYPE_CHECKING

import torch
from machine import Order
from torch import Tensor

if TYPE_CHECKING:
    import host

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BOUND = {"f32": 1e-5, "bf16": 2.0**-7, "f16": 2.0**-10}
LOCKSTEP = "lockstep"  # the usual order: all blocks together, ascending
OTHER_ORDERS = {
    "descending": Order("descending"),
    "random": Order("random", seed=7),
    "alone": Order(alone=True),
    "descending alone": Order("descending", alone=True),
    "random alone": Order("random", alone=True, seed=8),
}
ORDERS = {LOCKSTEP: Order(), **OTHER_ORDERS}


def error(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """The largest difference, relative to the largest magnitude of both others; NaN and infinities have to agree."""
    actual, expected = actual.double(), expected.double()
    if actual.numel() == 0:
        return 0.0
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, torch.zeros_like(actual), (actual - expected).abs())
    if not torch.isfinite(difference).all():
        return float("inf")
    finite = expected[torch.isfinite(expected)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    if scale is not None:
        largest = max(largest, scale.abs().max().item())
    return difference.max().item() / max(largest, 1e-30)


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = torch.int16 if one.element_size() == 2 else torch.int32
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


class Outcome:
    """What is wrong with a case: nothing, or a list of sentences; and the largest errors by kind."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.worst: dict[str, float] = {}

    def within(self, kind: str, value: float, bound: float) -> None:
        self.worst[kind] = max(self.worst.get(kind, 0.0), value)
        if not value <= bound:
            self.faults.append(f"{kind}: {value:.3g} beyond {bound:.3g}")

    def same(self, what: str, one: Tensor | None, other: Tensor | None) -> None:
        if one is not None and other is not None and not same_bits(one, other):
            self.faults.append(f"{what}: other bits")

    def seen(self, what: str, run: "host.cuda") -> None:
        """What the interpreter has reported."""
        self.faults += [f"{what}: {fault}" for fault in faults(run)]


def faults(run: "host.cuda") -> list[str]:
    """All that was wrong, as text."""
    found = [
        f"{report.kind} in {report.entry}, line {report.line}: {detail}" for report, (_, detail) in run.reports.items()
    ]
    return found + [f"never written: {what}" for what in run.unwritten]


def reported(run: "host.cuda") -> list[str]:
    """The kinds of reports, for a run that is meant to be wrong."""
    return sorted({report.kind for report in run.reports} | ({"never written"} if run.unwritten else set()))
