"""The compiled Triton kernels of the expert losses, run by the interpreter against the float64 reference."""

import os
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
from machine import Order
from triton_host import ARCHITECTURES, IN_STEP, ORDERS, driver_of, on_the_interpreter

from shike_fast.kernels.losses import dkt
from shike_fast.ops import balanced_softmax_loss, dkt_loss, expert_cross_entropy

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)

# Everything is computed in float32; a low-precision gradient is rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OPS = {
    "dkt_loss": dkt_loss,
    "expert_cross_entropy": expert_cross_entropy,
    "balanced_softmax_loss": balanced_softmax_loss,
}
LAYOUTS = (
    *(
        "contiguous",
        "misaligned",
        "padded rows",
        "transposed",
        "every second",
        "classes outermost",
        "experts innermost",
    ),
    *("sequence", "misaligned sequence", "sequence of pitches", "sequence of all sorts"),
)
VALUES = ("normal", "extreme", "ends", "ties", "equal", "experts agree")


class Case(NamedTuple):
    op: str
    experts: int
    batch: int
    classes: int
    dtype: torch.dtype
    layout: str = "contiguous"
    values: str = "normal"
    order: Order = ORDERS[0]
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.experts}x{self.batch}x{self.classes} {dtype}, {self.layout}, {self.values}"

    def logits(self) -> torch.Tensor:
        """Values [K, B, C]."""
        shape = self.experts, self.batch, self.classes
        normal = 3 * torch.randn(shape)
        made = {
            "normal": normal,
            "extreme": (4e3 * torch.randn(shape)).clamp(-1e4, 1e4),
            "ends": torch.where(torch.rand(shape) < 0.5, 1e4, -1e4),
            "ties": torch.randint(-1, 2, shape).float(),
            "equal": torch.full(shape, 0.5),
            "experts agree": normal[:1].expand(shape),
        }
        return made[self.values].to(self.dtype)

    def options(self, rng: random.Random, target: torch.Tensor) -> dict:
        """Options of the operator."""
        if self.op == "dkt_loss":
            return {
                "hardest_weight": rng.choice((10.0, 10.0, 0.0, 0.3)),
                "mutual_weight": rng.choice((1.0, 1.0, 0.0, 2.0)),
                "kl_reduction": rng.choice(("mean", "batchmean")),
                "detach_teacher": rng.random() < 0.3,
                "teacher_target_logit": rng.choice((0.0, 1.5)),
                "student_target_logit": rng.choice((-30.0, -5.0)),
            }
        if self.op == "expert_cross_entropy":
            bias = rng.choice((None, torch.randn(self.classes), torch.randn(self.experts, self.classes)))
            return {"bias": bias, "label_smoothing": rng.choice((0.0, 0.1, 1.0))}
        counts = torch.randint(1, 100, (self.classes,))
        counts[next((c for c in range(self.classes) if c not in target), 0)] *= rng.randrange(2)  # 0: not trained on
        counts[target] = counts[target].clamp_min(1)
        return {"class_counts": counts}


def lay_out(arena, logits, layout, rng):
    """The same values in memory that the kernels may touch nowhere else: one tensor, or one an expert."""
    experts, batch, classes = logits.shape
    shift = rng.randrange(1, 8)
    strides = {
        "contiguous": (batch * classes, classes, 1),
        "misaligned": (batch * classes, classes, 1),
        "padded rows": (batch * (classes + shift), classes + shift, 1),
        "transposed": (classes * batch, 1, batch),
        "every second": (batch * classes * 2 + 1, classes * 2, 2),
        "classes outermost": (batch, 1, experts * batch),
        "experts innermost": (1, classes * experts, experts),
    }
    if layout in strides:
        return arena.place(logits, strides[layout], 0 if layout == "contiguous" else shift)
    of_expert = {
        "sequence": lambda k: ((classes, 1), 0),
        "misaligned sequence": lambda k: ((classes, 1), shift),
        "sequence of pitches": lambda k: ((classes + k, 1), k + shift),
        "sequence of all sorts": lambda k: ((classes, 1) if k % 2 else (1, batch), 0),
    }
    return [arena.place(logits[k], *of_expert[layout](k)) for k in range(experts)]


def leaves(logits):
    """The tensors, or the one, as leaves that want a gradient."""
    return logits.requires_grad_() if isinstance(logits, torch.Tensor) else [t.requires_grad_() for t in logits]


def gradient_of(logits):
    return logits.grad if isinstance(logits, torch.Tensor) else torch.stack([expert.grad for expert in logits])


def run(driver, case, order, logits, target, options, scale):
    """Loss and gradient of the kernels, which must do nothing that is not allowed."""
    driver.arena.clear()
    rng = random.Random(case.seed)
    leaf = leaves(lay_out(driver.arena, logits, case.layout, rng))
    labels = driver.arena.place(target, (rng.choice((1, 3)),))
    with on_the_interpreter(driver, order) as happened:
        loss = OPS[case.op](leaf, labels, backend="triton", **options)
        (scale * loss).backward()
    assert not happened.reports, happened.reports
    assert not happened.unwritten, happened.unwritten
    assert len(happened.launches) == 3
    return loss.detach().clone(), gradient_of(leaf).clone()


def check(case: Case, architecture: str) -> None:
    """Forward and backward against float64, and the same bits with the blocks in another order."""
    torch.manual_seed(case.seed)
    rng = random.Random(case.seed)
    logits, target = case.logits(), torch.randint(case.classes, (case.batch,))
    options, scale = case.options(rng, target), rng.choice((1.0, 2.5, -7.0))
    loss, gradient = run(driver_of(architecture), case, IN_STEP, logits, target, options, scale)
    again = run(driver_of(architecture), case, case.order, logits, target, options, scale)
    assert torch.equal(loss, again[0]) and torch.equal(gradient, again[1]), "the order of the blocks shows"

    exact = logits.double().requires_grad_()
    expected_loss = OPS[case.op](exact, target, backend="reference", **options)
    (scale * expected_loss).backward()
    # A log-probability carries the rounding of its logits, eps · max |z|; the divergences multiply it by their weights.
    largest, weight = logits.double().abs().max().item() + 30, 1.0
    if case.op == "dkt_loss":
        divisor = case.batch * (case.classes if options["kl_reduction"] == "mean" else 1)
        weight = (options["hardest_weight"] + options["mutual_weight"]) * 2 * case.experts / divisor + 1 / case.batch
    rounding = 8 * torch.finfo(torch.float32).eps * largest * weight
    assert abs(loss - expected_loss) <= 2e-6 * abs(expected_loss) + rounding * case.batch * case.experts
    assert gradient.dtype == case.dtype and gradient.shape == logits.shape
    limits = torch.finfo(case.dtype)
    error = (gradient.double().clamp(limits.min, limits.max) - exact.grad.clamp(limits.min, limits.max)).abs().max()
    allowed = TOLERANCE[case.dtype] * exact.grad.abs().max() + abs(scale) * rounding
    assert error <= allowed + limits.smallest_normal * limits.eps, (error.item(), allowed.item())


QUICK = (
    Case("dkt_loss", 3, 3, 101, torch.bfloat16, "misaligned", "normal", ORDERS[2]),
    Case("dkt_loss", 3, 2, 1000, torch.float32, "sequence", "ties", ORDERS[3]),
    Case("expert_cross_entropy", 2, 3, 100, torch.float16, "padded rows", "extreme", seed=1),
    Case("balanced_softmax_loss", 3, 5, 10, torch.bfloat16, "transposed", "normal", ORDERS[1]),
)


@pytest.mark.parametrize(("case", "architecture"), list(zip(QUICK, ARCHITECTURES * 2, strict=True)), ids=str)
def test_against_the_reference(case, architecture):
    check(case, architecture)


def matrix() -> Iterator[Case]:
    """Every operator with 1 to 8 experts in every dtype; the rest as it falls."""
    for number in range(8 * 3 * 3):
        rng = random.Random(number)
        experts, batch = 1 + number % 8, rng.choice((1, 2, 3, 33))
        classes = rng.choice((2, 3, 7, 10, 100, 101, 365, 1000, 5000))
        yield Case(
            list(OPS)[number % 3],
            experts,
            batch,
            min(classes, 40_000 // (experts * batch)),
            list(TOLERANCE)[number // 24],
            LAYOUTS[number % len(LAYOUTS)],
            VALUES[number % len(VALUES)] if number % 2 else rng.choice(VALUES),
            ORDERS[number % len(ORDERS)],
            number,
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_matrix(case):
    check(case, ARCHITECTURES[case.seed // 8 % 2])


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
