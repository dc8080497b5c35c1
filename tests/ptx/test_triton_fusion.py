"""The compiled Triton kernels of depth-wise knowledge fusion, run by the interpreter against the float64 reference."""

import os
import random
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="needs Triton, which is not installed")
from fusion_inputs import CHANNELS, LAYOUTS, OPS, SIZES, VALUES, FusionCase, check
from outcomes import DTYPES, OTHER_ORDERS
from triton_host import ARCHITECTURES, run

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)


def interpreted(case: FusionCase, architecture: str) -> None:
    outcome, runs, setting = run(case, check, architecture)
    # What the sums of experts without ReLU are relative to [K, B, C]: the others' part is neither written nor read.
    partly = [(case.experts, *case.shape[:2])] if any(setting.relu) and not all(setting.relu) else []
    for happened in runs:
        assert happened.launches
        assert all(shape in partly for shape, _ in happened.unwritten), happened.unwritten
    assert not outcome.faults, outcome.faults


LAST = ("last",)
QUICK = (
    FusionCase("pool", 1, (2, 17, 3, 3), "f16", ("last, unaligned", "first"), True, "normal", orders=("random",)),
    FusionCase("bn", 1, (2, 40, 4, 4), "f32", ("first",), True, "normal", orders=("descending alone",)),
    FusionCase("bn", 1, (3, 8, 7, 7), "bf16", LAST, False, "shifted", orders=("descending",)),
    FusionCase("folded", 2, (2, 16, 4, 4), "bf16", LAST, True, "normal", orders=("alone",), seed=3),
)


@pytest.mark.parametrize(("case", "architecture"), list(zip(QUICK, ARCHITECTURES * 2, strict=True)), ids=str)
def test_against_the_reference(case, architecture):
    interpreted(case, architecture)


def matrix() -> Iterator[FusionCase]:
    """Every operator in every dtype with 1 to 8 experts, in training and not; the rest as it falls."""
    for number in range(4 * 3 * 8):
        rng = random.Random(number)
        op = OPS[number % 4]
        experts = 1 + number // 12 if op in ("experts", "folded") else 1
        height, width = rng.choice(SIZES)
        batch, channels = rng.choice((2, 3, 5, 9)), rng.choice(CHANNELS)
        channels = min(channels, max(30_000 // (experts * batch * height * width), 1))
        yield FusionCase(
            op,
            experts,
            (batch, channels, height, width),
            list(DTYPES)[number // 4 % 3],
            rng.choice((LAYOUTS[number % len(LAYOUTS) :][:1], tuple(rng.sample(LAYOUTS, 4)))),
            rng.random() < 0.7,
            rng.choice(VALUES),
            orders=(list(OTHER_ORDERS)[number // 3 % len(OTHER_ORDERS)],),
            seed=number,
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_matrix(case):
    interpreted(case, ARCHITECTURES[case.seed // 12 % 2])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 40, 4, 4), "last"),
        ((2, 8, 3, 3), "first"),
        pytest.param((2, 8, 3, 3), "last", marks=pytest.mark.slow),
        pytest.param((3, 3, 7, 7), "last", marks=pytest.mark.slow),
        pytest.param((3, 3, 7, 7), "first", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lanes_agree_about_the_statistics(shape, layout):
    """Small maps, where the lanes of a warp that hold one channel once stored sums that differed in the last bit."""
    interpreted(FusionCase("bn", 1, shape, "f32", (layout,), True, "normal", orders=("descending",)), "sm_90")
