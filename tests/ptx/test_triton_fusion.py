"""The compiled Triton kernels of depth-wise knowledge fusion, run by the interpreter against the float64 reference."""

import os
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
from machine import Order
from triton_host import ARCHITECTURES, IN_STEP, ORDERS, driver_of, on_the_interpreter

from shike_fast.ops import BatchNormArguments, dkf_bn_pool, dkf_experts, dkf_pool

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

# Everything is computed in float32; a low-precision result is rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OPS = ("dkf_pool", "dkf_bn_pool", "dkf_experts", "folded")  # the last one: dkf_experts with the residual end
LAYOUTS = (
    *("NCHW", "channels last", "misaligned NCHW", "misaligned channels last", "some channels", "window"),
    *("window channels last", "batch innermost", "transposed"),
)
VALUES = ("normal", "far from 0", "constant channels", "large")


class Case(NamedTuple):
    op: str
    experts: int
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    layouts: tuple[str, ...] = ("channels last",)  # of the maps in turn
    training: bool = True
    values: str = "normal"
    order: Order = ORDERS[0]
    seed: int = 0

    def __str__(self) -> str:
        dtype, shape = str(self.dtype).removeprefix("torch."), "x".join(map(str, (self.experts, *self.shape)))
        training = "training" if self.training else "evaluation"
        return f"{self.op} {shape} {dtype}, {', '.join(self.layouts)}, {self.values}, {training}"

    def map_(self) -> torch.Tensor:
        """Values [B, C, H, W]."""
        channels, half = self.shape[1], self.dtype == torch.float16
        x, column = torch.randn(self.shape), torch.randn(channels, 1, 1)
        if self.values == "far from 0":
            x += column * (100 if self.dtype == torch.float32 else 8)
        elif self.values == "constant channels":
            x = column + x * (torch.arange(channels) % 2).view(-1, 1, 1)
        elif self.values == "large":
            x *= 30 if half else 1e3
        return x.to(self.dtype)

    def norms(self, rng: random.Random) -> list[list[torch.Tensor | None]]:
        """Weight, bias, running mean and variance [C] of every normalisation."""
        count = {"dkf_pool": 0, "dkf_bn_pool": 1, "dkf_experts": self.experts, "folded": 2 * self.experts}[self.op]
        channels, affine = self.shape[1], rng.choice(("both", "both", "neither", "weight"))
        running = not self.training or rng.random() < 0.8
        return [
            [
                torch.randn(channels) if affine != "neither" else None,
                0.5 * torch.randn(channels) if affine == "both" else None,
                torch.randn(channels) if running else None,
                0.2 + torch.rand(channels) if running else None,
            ]
            for _ in range(count)
        ]


def lay_out(arena, values, layout, shift):
    """The same values in memory that the kernels may touch nowhere else."""
    _, channels, height, width = values.shape
    size, wide = channels * height * width, channels + shift
    high, long = height + 1, width + 2
    strides = {
        "NCHW": (size, height * width, width, 1),
        "channels last": (size, 1, width * channels, channels),
        "some channels": (wide * height * width, 1, width * wide, wide),
        "window": (channels * high * long, high * long, long, 1),
        "window channels last": (channels * high * long, 1, long * channels, channels),
        "batch innermost": (1, len(values), channels * width * len(values), channels * len(values)),
        "transposed": (size, height * width, 1, height),
    }
    misaligned = layout.startswith("misaligned ") or layout == "some channels"
    return arena.place(values, strides[layout.removeprefix("misaligned ")], shift if misaligned else 0)


def results(case, maps, vectors, grad_output, relu, eps, momentum, backend):
    """All that an operator computes, by name: its result, the gradients, the running statistics."""
    leaves = [[map_.requires_grad_() for map_ in group] for group in maps]
    given = [
        [None if v is None else v.clone().requires_grad_(i < 2) for i, v in enumerate(vectors_of_norm)]
        for vectors_of_norm in vectors
    ]
    norms = [BatchNormArguments(*of_norm, case.training, momentum, eps) for of_norm in given]
    deep, shallow, *shortcut = leaves
    if case.op == "dkf_pool":
        f = dkf_pool(deep[0], shallow[0], backend=backend)
    elif case.op == "dkf_bn_pool":
        options = {"training": case.training, "momentum": momentum, "eps": eps, "relu": relu[0], "backend": backend}
        f = dkf_bn_pool(deep[0], shallow[0], *given[0], **options)
    elif shortcut:
        ends = {"shortcut": shortcut[0], "deep_norms": norms[case.experts :]}
        f = dkf_experts(deep, shallow, norms[: case.experts], relu=relu, backend=backend, **ends)
    else:
        f = dkf_experts(deep, shallow, norms, relu=relu, backend=backend)
    f.backward(grad_output.to(f.dtype).view_as(f))
    found = {"f": f.detach()}
    for name, group in zip(("deep", "shallow", "shortcut"), leaves, strict=False):
        found |= {f"gradient of {name} {k}": map_.grad for k, map_ in enumerate(group)}
    for i, of_norm in enumerate(given):
        for name, vector in zip(("weight", "bias"), of_norm[:2], strict=True):
            found |= {} if vector is None else {f"gradient of {name} {i}": vector.grad}
        if case.training and of_norm[2] is not None:
            found |= {f"running mean {i}": of_norm[2], f"running variance {i}": of_norm[3]}
    return {name: tensor.clone() for name, tensor in found.items()}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest entry."""
    assert torch.isfinite(actual).all()
    largest = expected.abs().max().clamp_min(1e-30)
    return ((actual.double() - expected).abs().max() / largest).item()


def check(case: Case, architecture: str) -> None:
    """Forward and backward against float64, and the same bits with the blocks in another order."""
    torch.manual_seed(case.seed)
    rng, driver = random.Random(case.seed), driver_of(architecture)
    values = [[case.map_() for _ in range(case.experts)] for _ in range(3 if case.op == "folded" else 2)]
    vectors, relu = case.norms(rng), [rng.random() < 0.5 for _ in range(case.experts)]
    grad_output = torch.randn(case.experts, *case.shape[:2]).to(case.dtype)
    rest = grad_output, relu, rng.choice((1e-5, 1e-3)), rng.choice((0.1, 1.0, 0.03))
    shift, found = rng.randrange(1, 8), []
    for order in (IN_STEP, case.order):
        driver.arena.clear()
        layouts = iter(case.layouts * 3 * case.experts)
        maps = [[lay_out(driver.arena, map_, next(layouts), shift) for map_ in group] for group in values]
        with on_the_interpreter(driver, order) as happened:
            found.append(results(case, maps, vectors, *rest, "triton"))
        assert happened.launches and not happened.reports, happened.reports
        # What the sums of experts without ReLU are relative to [K, B, C]: the others' part is neither written nor read.
        partly = [(case.experts, *case.shape[:2])] if any(relu) and not all(relu) else []
        assert all(shape in partly for shape, _ in happened.unwritten), happened.unwritten
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]), "the order of the blocks shows"

    def plain(dtype):
        converted = [[None if v is None else v.to(dtype) for v in of_norm] for of_norm in vectors]
        return results(case, [[m.to(dtype) for m in group] for group in values], converted, *rest, "reference")

    exact, eager = plain(torch.float64), plain(torch.float32)
    assert exact.keys() == found[0].keys()
    for name, expected in exact.items():
        rounding = TOLERANCE[torch.float32 if name.startswith("running") else found[0][name].dtype]
        wrong, allowed = error(found[0][name], expected), rounding + 4 * error(eager[name], expected)
        assert wrong <= allowed, (name, wrong, allowed)


QUICK = (
    Case("dkf_pool", 1, (2, 17, 3, 3), torch.float16, ("misaligned channels last", "NCHW"), order=ORDERS[2]),
    Case("dkf_bn_pool", 1, (2, 40, 4, 4), torch.float32, ("NCHW",), order=ORDERS[3]),
    Case("dkf_bn_pool", 1, (3, 8, 7, 7), torch.bfloat16, values="far from 0", training=False),
    Case("folded", 2, (2, 16, 4, 4), torch.bfloat16, order=ORDERS[1], seed=3),
)


@pytest.mark.parametrize(("case", "architecture"), list(zip(QUICK, ARCHITECTURES * 2, strict=True)), ids=str)
def test_against_the_reference(case, architecture):
    check(case, architecture)


def matrix() -> Iterator[Case]:
    """Every operator in every dtype with 1 to 8 experts, in training and not; the rest as it falls."""
    for number in range(4 * 3 * 8):
        rng = random.Random(number)
        op = OPS[number % 4]
        experts = 1 + number // 12 if op in ("dkf_experts", "folded") else 1
        height, width = rng.choice(((1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (7, 7), (8, 8), (14, 14)))
        batch, channels = rng.choice((2, 3, 5, 9)), rng.choice((1, 2, 3, 5, 8, 16, 17, 31, 32, 40, 64, 100, 256))
        channels = min(channels, max(30_000 // (experts * batch * height * width), 1))
        yield Case(
            op,
            experts,
            (batch, channels, height, width),
            list(TOLERANCE)[number // 4 % 3],
            rng.choice((LAYOUTS[number % len(LAYOUTS) :][:1], tuple(rng.sample(LAYOUTS, 4)))),
            rng.random() < 0.7,
            rng.choice(VALUES),
            ORDERS[number // 3 % len(ORDERS)],
            number,
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_matrix(case):
    check(case, ARCHITECTURES[case.seed // 12 % 2])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 40, 4, 4), "channels last"),
        ((2, 8, 3, 3), "NCHW"),
        pytest.param((2, 8, 3, 3), "channels last", marks=pytest.mark.slow),
        pytest.param((3, 3, 7, 7), "channels last", marks=pytest.mark.slow),
        pytest.param((3, 3, 7, 7), "NCHW", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lanes_agree_about_the_statistics(shape, layout):
    """Small maps, where the lanes of a warp that hold one channel once stored sums that differed in the last bit."""
    check(Case("dkf_bn_pool", 1, shape, torch.float32, (layout,)), "sm_90")
