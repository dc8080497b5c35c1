"""The compiled Triton kernels of the expert losses, run by the interpreter against the float64 reference."""

import os
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
import triton
from counts import Counts
from machine import Order
from triton_host import ARCHITECTURES, IN_STEP, ORDERS, Driver, driver_of, on_the_interpreter

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
WEIGHTS = (1.0, 1.0, 0.0, -30.0, False)  # options of dkt_forward: both weights, teacher's and student's target
FORWARD = "dkt_forward_kernel"


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
    # What a case of the generalised loss needs neither for its rows nor for the backward stays as it is.
    spare = {(4, case.experts, case.batch), (case.batch, case.experts, 12)} if case.op != "dkt_loss" else set()
    assert {shape for shape, _ in happened.unwritten} <= spare, happened.unwritten
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


class Counted(NamedTuple):
    """What dkt_loss computes, and what its forward kernel has done."""

    terms: torch.Tensor
    saved: torch.Tensor  # [5K + 4, B]
    gradient: torch.Tensor
    barriers: float  # that a warp came to
    shuffles: float


def counted(z: torch.Tensor, target: torch.Tensor, order: Order = IN_STEP) -> Counted:
    """``dkt_loss`` of one tensor, with weights that are not divided."""
    driver = driver_of("sm_90")
    driver.arena.clear()
    driver.machine.counts = counts = Counts()
    try:
        with on_the_interpreter(driver, order) as happened:
            logits, labels = [driver.arena.place(z)], driver.arena.place(target)
            _, terms, saved = dkt.dkt_forward(logits, labels, None, *WEIGHTS)
            gradient = dkt.dkt_backward(torch.ones(()), logits, labels, None, saved, *WEIGHTS)
    finally:
        driver.machine.counts = None
    assert not happened.reports, happened.reports
    entry = next(name for name in happened.launches if name.startswith(FORWARD))
    blocks = driver.machine.program(entry).blocks
    warps = counts.warps[entry, 0]  # all enter the kernel
    done = {
        what: sum(counts.warps[entry, n] for n, block in enumerate(blocks) for i in block if i.op[0] in what) / warps
        for what in (("bar", "barrier"), ("shfl",))
    }
    columns = saved.view(-1).view(-1, len(target)).clone()
    return Counted(terms.clone(), columns, gradient.clone(), *done.values())


def exact(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms and gradient of the reference in float64."""
    leaf = z.double().requires_grad_()
    options = {"hardest_weight": 1.0, "mutual_weight": 1.0, "kl_reduction": "batchmean", "return_terms": True}
    loss, terms = dkt_loss(leaf, target, backend="reference", **options)
    loss.backward()
    return terms, leaf.grad


@pytest.mark.parametrize("apart", [0.0, 30.0, 50.0, 60.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_apart(dtype, apart):
    """One pivot serves all experts up to some 55; farther apart each has its own."""
    torch.manual_seed(0)
    z = (3 * torch.randn(3, 2, 301) + apart * torch.tensor([0.0, 1.0, -1.0])[:, None, None] / 2).to(dtype)
    target = torch.tensor([7, 300])
    now = counted(z, target)
    pivots = now.saved[:3]
    assert (pivots == pivots[:1]).all().item() == (apart <= 50.0)
    terms, gradient = exact(z, target)
    error = (now.terms - terms).abs() / terms.abs().clamp_min(1.0)
    assert error.max() <= 3e-5 * max(1.0, apart / 60), error
    rounding = 8 * torch.finfo(torch.float32).eps * (apart + 40) * 3
    allowed = TOLERANCE[dtype] * gradient.abs().max() + rounding
    assert (now.gradient.double() - gradient).abs().max() <= allowed


@pytest.mark.parametrize(("height", "own"), [(50.0, False), (100.0, True), (190.0, True)])
def test_the_teacher_far_below_the_pivot(height, own):
    """The hardest negative has the largest logit, and its mean lies far below, as all other classes do."""
    torch.manual_seed(0)
    z, target = torch.randn(3, 1, 40), torch.tensor([5])
    z[0, 0, 20], z[1:, 0, 20] = height, (height - 90.0) / 4
    z -= 40.0  # and what the teacher has at the target is above
    now = counted(z, target)
    terms, gradient = exact(z, target)
    assert (now.saved[0] != now.saved[1]).item() == own and now.saved[-1] == 20
    torch.testing.assert_close(now.terms, terms, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(now.gradient.double(), gradient, rtol=1e-5, atol=2e-5)


def test_the_lowest_of_tied_classes_wins():
    """Wherever the others lie: in the edge of a row, in another lane, in a later step."""
    classes = 1501
    pairs = [(0, 1500), (1, 2), (2, 700), (513, 1400), (600, 640), (3, 1027), (5, 1029), (1030, 1031)]
    z, target = torch.zeros(3, len(pairs), classes), torch.full((len(pairs),), 900)
    for row, (low, high) in enumerate(pairs):
        z[:, row, [low, high]] = 2.0
        z[1:, row, low] += torch.tensor([1.0, -1.0])  # other logits, the same sum
    for dtype in TOLERANCE:
        now = counted(z.to(dtype), target)
        assert now.saved[-1].tolist() == [low for low, _ in pairs]
        terms, gradient = exact(z.to(dtype), target)
        torch.testing.assert_close(now.terms, terms, rtol=2e-6, atol=1e-6)
        assert (now.gradient.double() - gradient).abs().max() <= TOLERANCE[dtype] * gradient.abs().max() + 1e-6


def test_a_row_is_reduced_twice():
    """However long it is. Maxima, with three barriers for the numbers that move together, and sums, with two."""
    found = {}
    for classes in (1504, 8144):
        now = counted(torch.randn(3, 2, classes), torch.tensor([3, 1500]))
        found[classes] = now.barriers, now.shuffles
    assert found[1504] == found[8144] and found[8144][0] <= 5, found
    apart = counted(torch.randn(3, 1, 1504) + 100 * torch.arange(3)[:, None, None], torch.tensor([3]))
    assert apart.barriers > found[1504][0]  # the slow way reduces more often


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("op", "classes"),
    [*((op, 8142) for op in OPS), ("dkt_loss", 1001), ("expert_cross_entropy", 1001)],  # a bias shifts against odd rows
)
def test_sectors(op, classes, dtype):
    """Rows start anywhere, those of all experts alike: hardly more memory is touched than is asked for."""
    driver, counts = driver_of("sm_90"), Counts()
    driver.arena.clear()
    driver.machine.counts = counts
    try:
        with on_the_interpreter(driver) as happened:
            logits = driver.arena.place(torch.randn(3, 8, classes).to(dtype)).requires_grad_()
            options = {"class_counts": torch.ones(classes)} if op == "balanced_softmax_loss" else {}
            OPS[op](logits, driver.arena.place(torch.arange(8)), backend="triton", **options).backward()
    finally:
        driver.machine.counts = None
    assert not happened.reports
    for kernel in happened.launches:
        for kind in ("ld", "st"):
            traffic = [t for access, t in counts.memory.items() if access[0] == kernel and access[2] == kind]
            touched, least = sum(t.sectors for t in traffic), sum(t.least for t in traffic)
            assert touched <= 1.06 * least, (kernel, kind, touched, least)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_instructions_of_a_class(dtype, programs, tmp_path):
    """Of the loops over a row, as ptxas makes them, with what only the blocks of the target and of the ends run."""
    driver = Driver("sm_90", assemble=True)
    with on_the_interpreter(driver):
        logits = driver.arena.place(torch.randn(3, 1, 8142).to(dtype)).requires_grad_()
        dkt_loss(logits, torch.tensor([3]), backend="triton").backward()
    vector = 16 // dtype.itemsize
    for kernel, most in ((FORWARD, 50), ("dkt_backward_kernel", 70)):
        (code,) = (code for name, code in driver.binaries.items() if name.startswith(kernel))
        (tmp_path / "kernel.cubin").write_bytes(code)
        done = programs.run([triton.knobs.nvidia.nvdisasm.path, "-hex", str(tmp_path / "kernel.cubin")])
        loops = loops_of(done.stdout)
        assert done.returncode == 0 and loops, done.stderr
        assert loops[0] / vector <= most, (kernel, loops)


def loops_of(sass: str) -> list[int]:
    """The instructions of each loop, first to last."""
    labels, branches, count = {}, [], 0
    for line in sass.split("\n"):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            if (to := re.search(r"\bBRA\b.*?(\.L_\w+)", instruction[1])) and to[1] in labels:
                branches.append((labels[to[1]], count))
            count += 1
    return [last - first + 1 for first, last in sorted(branches) if last > first]
