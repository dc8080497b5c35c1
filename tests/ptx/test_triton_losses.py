"""The compiled Triton kernels of the expert losses, run by the interpreter against the float64 reference."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
from loss_inputs import LAYOUTS, OPS, VALUES, LossCase, check
from outcomes import DTYPES, OTHER_ORDERS
from triton_host import ARCHITECTURES, driver_of, on_the_interpreter, run

from shike_fast.kernels.losses import dkt

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)


def interpreted(case: LossCase, architecture: str) -> None:
    outcome, runs, _ = run(case, check, architecture)
    for happened in runs:
        assert not happened.unwritten, happened.unwritten
        assert len(happened.launches) == 3
    assert not outcome.faults, outcome.faults


QUICK = (
    LossCase("dkt", 3, 3, 101, "bf16", "whole, unaligned", "normal", orders=("random",)),
    LossCase("dkt", 3, 2, 1000, "f32", "list", "ties", orders=("descending alone",)),
    LossCase("cross-entropy", 2, 3, 100, "f16", "padded rows", "large", orders=("descending",), seed=1),
    LossCase("balanced", 3, 5, 10, "bf16", "transposed", "normal", orders=("alone",)),
)


@pytest.mark.parametrize(("case", "architecture"), list(zip(QUICK, ARCHITECTURES * 2, strict=True)), ids=str)
def test_against_the_reference(case, architecture):
    interpreted(case, architecture)


def matrix() -> Iterator[LossCase]:
    """Every operator with 1 to 8 experts in every dtype; the rest as it falls."""
    for number in range(8 * 3 * 3):
        rng = random.Random(number)
        experts, batch = 1 + number % 8, rng.choice((1, 2, 3, 33))
        classes = rng.choice((2, 3, 7, 10, 100, 101, 365, 1000, 5000))
        yield LossCase(
            list(OPS)[number % 3],
            experts,
            batch,
            min(classes, 40_000 // (experts * batch)),
            list(DTYPES)[number // 24],
            LAYOUTS[number % len(LAYOUTS)],
            VALUES[number % len(VALUES)] if number % 2 else rng.choice(VALUES),
            orders=(list(OTHER_ORDERS)[number % len(OTHER_ORDERS)],),
            seed=number,
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_matrix(case):
    interpreted(case, ARCHITECTURES[case.seed // 8 % 2])


@pytest.mark.parametrize("value", [-1, 7, 2**40])
def test_a_target_out_of_range_touches_nothing_outside(value):
    """On a GPU the operator cannot look at the target first."""
    driver, options = driver_of("sm_90"), (10.0, 1.0, 0.0, -30.0, False)
    driver.arena.clear()
    logits, target = [driver.arena.place(torch.randn(3, 2, 7))], driver.arena.place(torch.tensor([3, value]))
    with on_the_interpreter(driver) as happened:
        loss, _, saved = dkt.dkt_forward(logits, target, None, *options)
        gradient = dkt.dkt_backward(torch.ones(()), logits, target, None, saved, *options)
    assert not happened.reports and loss.isnan() and torch.isfinite(gradient[:, 0]).all()
