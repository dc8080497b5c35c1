"""The compiled Triton kernels of the classifiers, run by the interpreter against the float64 reference."""

import os
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
from machine import Order
from triton_host import ARCHITECTURES, IN_STEP, ORDERS, driver_of, on_the_interpreter

from shike_fast.ops import expert_logits

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

# Relative to |x| |w|. A factor loses 2⁻¹² when it is rounded to TF32 and 2⁻¹⁰ when the unit leaves its last bits out.
ERRORS = {"highest": 2.0**-20, "high": 2.0**-9}
REST = 1 + 2.0**-11 - 2.0**-23


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # K, B, D, C
    values: str = "normal"
    scale: float | None = 30.0
    precision: str = "highest"
    order: Order = ORDERS[0]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.values}, {self.scale}, {self.precision}"

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and weight."""
        experts, batch, dim, classes = self.shape
        x, w = torch.randn(experts, batch, dim), torch.randn(experts, dim, classes)
        if self.values == "alike":  # all roundings of the sums in one direction
            return x.abs() + 1, w.abs() + 1
        if self.values == "rests":  # what a TF32 number leaves of these is at its largest
            return x.sign() * REST, w.sign() * REST
        if self.values == "alike rests":
            return torch.full_like(x, REST), torch.full_like(w, REST)
        if self.values == "spread":
            return x * 10.0 ** torch.randint(-4, 5, x.shape), w * 10.0 ** torch.randint(-4, 5, w.shape)
        return x, w


def run(architecture, case, order, x, w, bias, g):
    """The logits and the gradients of x, w and bias; the kernels must do nothing that is not allowed."""
    driver = driver_of(architecture)
    driver.arena.clear()
    leaves = [driver.arena.place(t).requires_grad_() for t in (x, w, *bias)]
    with on_the_interpreter(driver, order) as happened:
        z = expert_logits(*leaves, cosine_scale=case.scale, precision=case.precision, backend="triton")
        gradients = torch.autograd.grad(z, leaves, driver.arena.place(g))
    assert not happened.reports, happened.reports
    assert not happened.unwritten, happened.unwritten
    assert len(happened.launches) == (3 if case.scale is None else 4)
    return [t.detach().clone() for t in (z, *gradients)]


def check(case: Case, architecture: str) -> None:
    """Forward and backward against float64, and the same bits with the blocks in another order."""
    torch.manual_seed(0)
    (x, w), (experts, batch, _, classes) = case.factors(), case.shape
    bias = [] if case.scale is not None else [torch.randn(experts, classes)]
    g = torch.rand(experts, batch, classes) - 0.5
    found = run(architecture, case, IN_STEP, x, w, bias, g)
    again = run(architecture, case, case.order, x, w, bias, g)
    assert all(map(torch.equal, found, again)), "the order of the blocks shows"

    exact = [t.double().requires_grad_() for t in (x, w, *bias)]
    z = expert_logits(*exact, cosine_scale=case.scale, backend="reference")
    expected = [z.detach(), *torch.autograd.grad(z, exact, g.double())]
    for got, exact_one, bound in zip(found, expected, sizes(case, *(t.double() for t in (x, w, g))), strict=False):
        error = ((got - exact_one).abs() / bound).max()
        assert error < ERRORS[case.precision], error.item()
    if bias:
        torch.testing.assert_close(found[3].double(), expected[3], rtol=1e-5, atol=1e-5)


def sizes(case, x, w, g):
    """What errors are relative to: |x| |w| of each product, and for a gradient the share of the norm beside it."""
    r, c = 1 / x.norm(dim=2, keepdim=True), 1 / w.norm(dim=1, keepdim=True)
    if case.scale is None:
        r, c = torch.ones_like(r), torch.ones_like(c)
    else:
        g = g * case.scale
    yield (case.scale or 1.0) * (x.norm(dim=2, keepdim=True) * r) * (w.norm(dim=1, keepdim=True) * c)
    size = (g * c).norm(dim=2, keepdim=True) * w.norm(dim=2).unsqueeze(1)
    yield r * (size + (x.abs() * r * g.abs().sum(2, keepdim=True) if case.scale is not None else 0))
    size = (x * r).norm(dim=1).unsqueeze(2) * g.norm(dim=1, keepdim=True)
    yield c * (size + (w.abs() * c * g.abs().sum(1, keepdim=True) if case.scale is not None else 0))


QUICK = (
    (Case((1, 65, 33, 67)), "sm_80"),
    (Case((1, 3, 100, 5), "alike rests", order=ORDERS[2]), "sm_90"),
)


@pytest.mark.parametrize(("case", "architecture"), QUICK, ids=str)
def test_against_the_reference(case, architecture):
    check(case, architecture)


MATRIX = (
    *(Case((1, 3, 2048, 5), values, order=ORDERS[1]) for values in ("alike", "alike rests")),
    *(Case((1, 3, 300, 5), values, order=ORDERS[3]) for values in ("normal", "rests", "spread")),
    *(Case((2, 65, 33, 67), values, order=ORDERS[2]) for values in ("normal", "spread")),
    Case((1, 3, 500, 5), "alike rests", precision="high"),
    Case((2, 70, 130, 66), precision="high", order=ORDERS[2]),
    Case((2, 70, 36, 20), scale=None, order=ORDERS[2]),
    Case((1, 1, 1, 1)),
    Case((60, 2, 9, 3)),
    Case((1, 600, 4, 130)),  # more rows of tiles than a group has
)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix(case, architecture):
    check(case, architecture)
