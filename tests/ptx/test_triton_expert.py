"""The compiled Triton kernels of the generalised expert loss, run by the interpreter against the float64 reference."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
import figures
from machine import Order
from triton_host import ARCHITECTURES, IN_STEP, ORDERS, driver_of, on_the_interpreter

from shike_fast.ops import ExpertKL, expert_loss

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

# Everything is computed in float32; a low-precision gradient is rounded once.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SEEN = {"return_terms": True, "return_rows": True}


class Case(NamedTuple):
    kind: str  # of OPTIONS
    experts: int
    batch: int
    classes: int
    dtype: torch.dtype
    layout: str = "contiguous"
    order: Order = ORDERS[0]
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.experts}x{self.batch}x{self.classes} {dtype}, {self.layout}"

    def options(self, target: torch.Tensor) -> dict[str, Any]:
        return OPTIONS[self.kind](self, target)


def _second(target: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels of which the first is that of ``target``."""
    return torch.cat([target[:1], torch.randint(classes, target[1:].shape)])


def _mask(case: Case, *labels: torch.Tensor) -> torch.Tensor:
    mask = torch.rand(case.batch, case.classes) < 0.4
    for one in labels:
        mask.scatter_(1, one[:, None], True)
    half = case.batch // 2
    return mask if case.batch % 2 else (mask[:half] | mask[half:]).repeat(2, 1)


def _full(case: Case, target: torch.Tensor) -> dict[str, Any]:
    vector, of_experts = torch.rand(case.classes), torch.randn(case.experts, case.classes)
    return {
        **{"bias": of_experts, "margin": vector, "scale": vector + 0.5, "label_smoothing": 0.1},
        **{"target_b": _second(target, case.classes), "lam": torch.rand(case.batch), "class_weight": vector},
        "reduction": ("weighted_mean", "none")[case.seed % 2],
    }


def _others(case: Case, target: torch.Tensor) -> dict[str, Any]:
    weight = torch.rand(case.experts, case.batch) - 0.3
    student = "student" if case.seed % 2 else "teacher"
    return {"bias": torch.randn(case.classes), "kl": ExpertKL(weight=weight, weight_of=student)}


def _masked(case: Case, target: torch.Tensor) -> dict[str, Any]:
    second = _second(target, case.classes)
    return {
        **{"target_b": second, "lam": 0.3, "class_mask": _mask(case, target, second), "scale": 2.0},
        **{"masked": ("zero", "exclude")[case.seed % 2], "kl": ExpertKL(gate="teacher_correct", temperature=2.0)},
    }


def _mean(case: Case, target: torch.Tensor) -> dict[str, Any]:
    return {"kl": ExpertKL("mean", torch.rand(case.classes) + 0.5, adjusted=bool(case.seed % 2)), "scale": 1.5}


def _view(case: Case, target: torch.Tensor) -> dict[str, Any]:
    teacher = "view" if case.batch % 2 == 0 else 2 * torch.randn(case.experts, case.batch, case.classes)
    return {"class_mask": _mask(case, target), "kl": ExpertKL(teacher, temperature=2.0)}


def _given(case: Case, target: torch.Tensor) -> dict[str, Any]:
    teacher = (2 * torch.randn(case.batch, case.classes)).to(torch.bfloat16)
    return {"target_b": _second(target, case.classes), "lam": 0.7, "kl": ExpertKL(teacher)}


OPTIONS: dict[str, Callable[[Case, torch.Tensor], dict[str, Any]]] = {
    "plain": lambda case, target: {},
    **{"full": _full, "others": _others, "masked": _masked, "mean": _mean, "view": _view, "given": _given},
}


def lay_out(arena, logits, layout, rng):
    """The same values in memory that the kernels may touch nowhere else: one tensor, or one an expert."""
    _, batch, classes = logits.shape
    shift = rng.randrange(1, 8)
    strides = {
        "contiguous": (batch * classes, classes, 1),
        "misaligned": (batch * classes, classes, 1),
        "transposed": (classes * batch, 1, batch),
        "padded rows": (batch * (classes + shift), classes + shift, 1),
    }
    if layout in strides:
        return [arena.place(logits, strides[layout], 0 if layout == "contiguous" else shift)]
    return [arena.place(expert, (classes, 1), shift) for expert in logits]  # "sequence"


LAYOUTS = ("contiguous", "misaligned", "transposed", "padded rows", "sequence")


def run(driver, case, order, logits, target, options, scale) -> list[torch.Tensor]:
    """Loss, gradient, terms and rows of the kernels, which must do nothing that is not allowed."""
    driver.arena.clear()
    rng = random.Random(case.seed)
    leaves = [one.requires_grad_() for one in lay_out(driver.arena, logits, case.layout, rng)]
    labels = driver.arena.place(target, (rng.choice((1, 3)),))
    with on_the_interpreter(driver, order) as happened:
        loss, terms, rows = expert_loss(
            leaves[0] if leaves[0].dim() == 3 else leaves, labels, backend="triton", **options, **SEEN
        )
        (scale * loss).sum().backward()
    assert not happened.reports, happened.reports
    # What a call does not need of what the backward is given stays as it is.
    saved = case.batch, case.experts, 12
    assert all(shape == saved for shape, _ in happened.unwritten), happened.unwritten
    gradient = leaves[0].grad if leaves[0].dim() == 3 else torch.stack([leaf.grad for leaf in leaves])
    return [loss.detach().clone(), gradient.clone(), terms.clone(), *(row.clone() for row in rows)]


def check(case: Case, architecture: str) -> None:
    """Forward and backward against float64, and the same bits with the blocks in another order."""
    torch.manual_seed(case.seed)
    logits = (3 * torch.randn(case.experts, case.batch, case.classes)).to(case.dtype)
    target = torch.randint(case.classes, (case.batch,))
    options, scale = case.options(target), random.Random(case.seed).choice((1.0, 2.5, -7.0))
    found = run(driver_of(architecture), case, IN_STEP, logits, target, options, scale)
    again = run(driver_of(architecture), case, case.order, logits, target, options, scale)
    assert all(map(torch.equal, found, again)), "the order of the blocks shows"

    leaf = logits.double().requires_grad_()
    loss, terms, rows = expert_loss(leaf, target, backend="reference", **options, **SEEN)
    (scale * loss).sum().backward()
    assert found[1].dtype == case.dtype and found[1].shape == logits.shape
    rounding = 16 * torch.finfo(torch.float32).eps * (1 + 6 * case.experts * ("kl" in options))
    for number, (got, exact) in enumerate(zip(found, [loss.detach(), leaf.grad, terms, *rows], strict=True)):
        if exact.dtype == torch.bool:
            assert torch.equal(got, exact)
            continue
        tolerance = TOLERANCE[case.dtype] if number == 1 else TOLERANCE[torch.float32]
        error, size = (got.double() - exact).abs().max(), exact.abs().max()
        assert error <= tolerance * size + abs(scale) * rounding, (number, error.item(), size.item())


QUICK = (
    Case("full", 2, 3, 101, torch.bfloat16, "misaligned", ORDERS[2], 1),
    Case("masked", 3, 4, 100, torch.float32, "sequence", ORDERS[3]),
    Case("view", 2, 4, 264, torch.float16, "padded rows", ORDERS[0]),
    Case("mean", 3, 2, 40, torch.bfloat16, "transposed", ORDERS[1]),
)


@pytest.mark.parametrize(("case", "architecture"), list(zip(QUICK, ARCHITECTURES * 2, strict=True)), ids=str)
def test_against_the_reference(case, architecture):
    check(case, architecture)


def matrix() -> Iterator[Case]:
    """Every kind of call in every dtype with 1 to 8 experts; the rest as it falls."""
    for number in range(3 * len(OPTIONS)):
        rng = random.Random(number)
        experts, batch = 1 + number % 8, rng.choice((1, 2, 4, 34))
        classes = min(rng.choice((2, 7, 10, 100, 101, 1000, 3000)), 30_000 // (experts * batch))
        kind, dtype = list(OPTIONS)[number % len(OPTIONS)], list(TOLERANCE)[number // len(OPTIONS)]
        yield Case(kind, experts, batch, classes, dtype, rng.choice(LAYOUTS), ORDERS[number % len(ORDERS)], number)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_matrix(case):
    check(case, ARCHITECTURES[case.seed % 2])


# ---- what the kernels cost

SHAPE = (3, 8, 8142)
BIAS = torch.linspace(-1, 1, 8142)
COSTS = {  # options, and the most instructions of an element, forward and backward
    "plain": ({}, 12, 13),
    "others": ({"bias": BIAS, "kl": ExpertKL()}, 22, 23),
    "view": ({"kl": ExpertKL("view", temperature=2.0)}, 41, 33),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["others", *(pytest.param(n, marks=pytest.mark.slow) for n in COSTS if n != "others")])
def test_figures(name, dtype):
    """Rows start anywhere: hardly more memory is touched than is asked for; and the instructions are bounded."""
    options, *most = COSTS[name]
    logits, target = torch.randn(SHAPE).to(dtype), torch.arange(SHAPE[1]) * 1000
    driver = driver_of("sm_90")

    def call(place, backend):
        expert_loss(place(logits).requires_grad_(), place(target), backend=backend, **options).backward()

    driver.arena.clear()
    case = figures.Case(name, logits.numel(), 0, call)
    with on_the_interpreter(driver) as happened:
        found = figures.measure(driver.machine, "triton", [case], lambda _: nullcontext(), driver.arena.place)
    assert not happened.reports
    forward, _, backward = found[name].kernels
    for kernel, limit in zip((forward, backward), most, strict=True):
        assert kernel.read_ratio <= 1.04 and kernel.written_ratio <= 1.04, kernel
        assert kernel.instructions <= limit, kernel
