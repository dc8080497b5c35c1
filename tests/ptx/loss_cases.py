"""The CUDA kernels of the losses in the interpreter, against the float64 reference."""

import itertools
from random import Random
from typing import Any

import torch
from common import run, run_all, strided, summary
from host import cuda, native_loss
from loss_inputs import LAYOUTS, OPS, VALUES, LossCase, check, evaluate, laid_out, values_of
from outcomes import DTYPES, OTHER_ORDERS, Outcome
from torch import Tensor

BATCH_MEAN = (1.0, 1.0, 0.0, -30.0, False)  # options of dkt_forward: both weights, teacher's and student's target


# ---- the hardest negative


def difficult_rows() -> dict[str, tuple[Tensor, Tensor, int]]:
    """Logits of three experts, targets and multiprocessors."""
    torch.manual_seed(0)
    found = {}
    pairs = [(5, 2999), (1023, 1024), (7, 8), (40, 2048), (255, 2600)]
    for classes, processors in ((3000, 132), (3000, 1), (20011, 2000)):
        z = torch.zeros(3, len(pairs), classes)
        for row, (low, high) in enumerate(pairs):
            z[:, row, [low, high * classes // 3000]] = 2.0
            z[1:, row, low] += torch.tensor([1.0, -1.0])  # other logits, the same sum
        found[f"ties of {classes} classes, {processors}"] = z, torch.zeros(len(pairs), dtype=torch.int64), processors
    for scale in (1e-3, 1.0, 30.0, 1e4):
        z, target = torch.randn(3, 4, 1501), torch.tensor([0, 700, 1500, 3])
        z[:, 0, 900] += 8.0
        z[:, 1, 700] += 8.0  # the target
        z[:, 2] = z[:, 2] * 0.1 + torch.linspace(0, 4, 1501)  # every chunk moves the maxima and replaces the negative
        z[:, 3] = 1.0
        found[f"one class above all, a ramp, equal ones, times {scale}"] = z * scale, target, 132
    return found


def hardest_negatives() -> dict[str, Outcome]:
    """Saved are the hardest negative, the lowest of tied classes, and what makes probabilities of logits."""
    outcomes = {}
    for name, (z, target, processors) in difficult_rows().items():
        outcome = outcomes[name] = Outcome()
        with cuda(processors) as device:
            _, terms, saved = native_loss.dkt_forward([z], target, None, *BATCH_MEAN)
            gradient = native_loss.dkt_backward(torch.ones(()), [z], target, None, saved, *BATCH_MEAN)
        outcome.seen("lockstep", device)
        places = target.view(1, -1, 1)
        total = (z[0] + z[1] + z[2]).scatter(1, places[0], -torch.inf)
        pivot, scale = (saved.double().T[first : first + 3, :, None] for first in (0, 3))
        others = torch.ones_like(z, dtype=torch.bool).scatter(2, places.expand(3, -1, 1), False)
        p = (scale * (z.double() - pivot).exp())[others], z.double().softmax(2)[others]
        outcome.within("probability", (p[0] - p[1]).abs().max().item(), 2e-6)
        outcome.same("hardest negative", saved[:, -1], torch.from_numpy(total.numpy().argmax(1)).float())
        options = {"hardest_weight": 1.0, "mutual_weight": 1.0, "kl_reduction": "batchmean", "return_terms": True}
        exact = evaluate("dkt", z.double(), target, 1.0, "reference", **options)
        assert exact.terms is not None
        rounding = 24 * 2.0**-23 * (z.abs().max().item() + 30)  # of a log-probability: that of its logits
        outcome.within(
            "terms", ((terms.double() - exact.terms).abs() - 4e-6 * exact.terms.abs()).max().item(), rounding
        )
        largest = exact.gradient.abs().max().item()
        allowed = (2 * rounding + 4e-6 * largest) / len(target)
        outcome.within("gradient", (gradient.double() - exact.gradient).abs().max().item(), allowed)
    return outcomes


def terms_that_are_off() -> dict[str, Outcome]:
    """They are zero, and a class that no expert may choose does no harm."""
    outcomes = {}
    for name, masked in (("finite", 0.0), ("a logit of minus infinity", -torch.inf)):
        outcome = outcomes[f"terms that are off, {name}"] = Outcome()
        torch.manual_seed(0)
        z, target = torch.randn(3, 2, 100), torch.tensor([1, 99])
        z[0, :, 5] += masked
        with cuda() as device:
            _, terms, saved = native_loss.dkt_forward([z], target, None, 0.0, 0.0, *BATCH_MEAN[2:])
        outcome.seen("lockstep", device)
        exact = evaluate("cross-entropy", z.double(), target, 1.0, "reference")
        outcome.within("cross-entropy", abs(terms[0].item() - exact.loss.item()), 1e-5 * exact.loss.item())
        if masked == 0.0:
            outcome.same("divergences", terms[1:], torch.zeros(2))
            outcome.within("saved, not finite", float((~saved.isfinite()).sum()), 0.0)
    return outcomes


# ---- one pivot for all experts


def apart(distance: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of three experts, one far below the others, and one class far above the others; and the targets."""
    torch.manual_seed(int(distance))
    z = 2 * torch.randn(3, 6, 700)
    z[1] -= distance
    z[:, 2, 40] += distance  # the teacher's other classes are far below its pivot
    z[:2, 3, 50] += distance
    z[2, 4, 30] += 3 * distance
    return z.to(dtype), torch.tensor([0, 700 - 1, 5, 50, 300, 40])


def experts_apart() -> dict[str, Outcome]:
    """Their exponentials vanish beside the others', so that some rows are computed in the general way."""
    outcomes = {}
    options = {"kl_reduction": "batchmean", "return_terms": True}
    for distance, keeps in itertools.product((20, 30, 50, 60, 100, 1000, 9000), (False, True)):
        outcome = outcomes[f"experts {distance} apart, {'kept' if keeps else 'read twice'}"] = Outcome()
        z, target = apart(distance)
        with cuda(132, keeps=keeps) as device:
            mine = evaluate("dkt", z, target, 1.0, "cpu", **options)
        outcome.seen("lockstep", device)
        exact = evaluate("dkt", z.double(), target, 1.0, "reference", **options)
        eager = evaluate("dkt", z, target, 1.0, "reference", **options)
        for name in ("loss", "terms", "gradient"):
            one, expected, other = (getattr(results, name).double() for results in (mine, exact, eager))
            size = expected.abs().max().item()
            worst, of_eager = ((values - expected).abs().max().item() / size for values in (one, other))
            outcome.within(f"{name}, {distance} apart", worst, max(3e-5, 2 * of_eager))
    return outcomes


def kept_gradients() -> dict[str, Outcome]:
    """One reading of the logits gives every bit that two readings give, whatever grad_output is and was expected."""
    outcomes = {}
    options = (0.3, 2.0, 0.0, -30.0, False)
    for dtype, layout in itertools.product(DTYPES, ("whole", "list, each its own", "transposed")):
        outcome = outcomes[f"kept, {dtype}, {layout}"] = Outcome()
        case = LossCase("dkt", 3, 5, 1003, dtype, layout, "normal")
        torch.manual_seed(1)
        values = values_of(case)
        values[1, 3] -= 200  # in the general way
        logits, _ = laid_out(values.to(DTYPES[dtype]), layout, Random(0), strided)
        target = torch.tensor([0, 1002, 5, 9, 500])
        given = (logits if isinstance(logits, list) else [logits], target, None)
        native_loss._EXPECTED.clear()
        with cuda() as device:
            for number, grad_output in enumerate((1.0, 1.0, 0.25, 0.25, 1.0, float("inf"))):
                results, kept = native_loss._cuda_dkt_both(*given, *options)
                expected = kept.expected.item()
                finished = kept.rows == expected
                outcome.same(f"rows, {number}", finished.int(), torch.tensor([1, 1, 1, 0, 1]).int())
                left = kept.gradient.clone()
                gradient = native_loss.dkt_backward(torch.tensor(grad_output), *given, results[2], *options, kept=kept)
                if grad_output == expected:
                    outcome.same(f"a gradient that was finished, {number}", gradient[:, :3], left[:, :3])
                again = native_loss.dkt_backward(torch.tensor(grad_output), *given, results[2], *options)
                outcome.same(f"gradient, {number}", gradient, again)
                after = grad_output if grad_output < float("inf") else expected
                outcome.same(f"expected, {number}", kept.expected, torch.tensor(after))
        outcome.seen("lockstep", device)
    return outcomes


# ---- what the tests ask for


def quick() -> dict[str, Any]:
    """Every kernel, layout and kind of values; rows of one block and of several; difficult rows."""
    layouts, values = (itertools.cycle(names) for names in (LAYOUTS, VALUES[1:]))
    halves = itertools.cycle(("bf16", "f16"))
    cases = []
    for experts, wide in itertools.product(range(1, 9), (True, False)):
        orders = ("descending", "random") if experts == 3 else ("descending alone",)
        for seed in (0, 1) if experts <= 4 else (0,):  # read once, and read twice
            where = "f32" if wide else next(halves), next(layouts), next(values)
            cases.append(LossCase("dkt", experts, 3, 101, *where, orders=orders, seed=seed))
    of_cross_entropy = [("cross-entropy", seed) for seed in range(24)]  # with and without bias and smoothing
    for op, seed in of_cross_entropy + [("balanced", seed) for seed in range(6)]:
        where = "f32" if seed % 2 else next(halves), next(layouts), next(values)
        cases.append(LossCase(op, 1 + seed % 8, 3, 101, *where, orders=("descending alone",), seed=seed))
    cases.append(LossCase("dkt", 3, 1, 20011, "bf16", "whole, unaligned", "normal", 2000, ("random alone",)))
    cases.append(
        LossCase("cross-entropy", 2, 1, 33000, "f32", "list, unaligned", "normal", 2000, ("descending alone",))
    )
    outcomes = {str(tuple(case)): run(case, check) for case in cases}
    more = (hardest_negatives(), terms_that_are_off(), experts_apart(), kept_gradients())
    return summary(outcomes | {name: outcome for group in more for name, outcome in group.items()})


def matrix(experts: int, seed: int) -> dict[str, Any]:
    random = Random(1000 * seed + experts)
    cases = []
    for batch, classes in itertools.product((1, 3, 33), (2, 3, 7, 10, 100, 101, 365, 1000)):
        for dtype, op in itertools.product(DTYPES, ("dkt", random.choice(["cross-entropy", "balanced"]))):
            orders = (random.choice([*OTHER_ORDERS]),) if random.random() < 0.25 else ()
            shape = op, experts, batch, classes, dtype, random.choice(LAYOUTS), random.choice(VALUES)
            cases.append(LossCase(*shape, random.choice([132, 132, 1, 16, 264]), orders, random.randrange(10**6)))
    return run_all(cases, check)


def sample(count: int, seed: int, ulps: int = 0) -> dict[str, Any]:
    """Some of the matrix, for another compiler or architecture."""
    random = Random(seed)
    cases = []
    for _ in range(count):
        op, experts, batch = random.choice([*OPS]), random.randint(1, 8), random.choice([1, 2, 3, 33])
        classes, dtype = random.choice([2, 3, 7, 10, 100, 101]), random.choice([*DTYPES])
        shape = op, experts, batch, classes, dtype, random.choice(LAYOUTS), random.choice(VALUES)
        orders = ("descending", "random")
        cases.append(LossCase(*shape, random.choice([132, 132, 1, 16, 264]), orders, random.randrange(10**6)))
    return run_all(cases, check, ulps)


def long_rows(seed: int) -> dict[str, Any]:
    """Rows over 1 to 17 blocks."""
    random = Random(seed)
    sizes = itertools.cycle(((8142, 1), (20011, 1), (8142, 3), (20000, 2), (66001, 1), (8142, 2), (40003, 1)))
    cases = []
    for experts, op, _ in itertools.product(range(1, 9), ("dkt", "cross-entropy"), range(3)):
        classes, batch = next(sizes)
        shape = op, experts, batch, classes, random.choice([*DTYPES]), random.choice(LAYOUTS), random.choice(VALUES)
        orders = ("descending", "random") if random.random() < 0.7 else ("alone",)
        processors = random.choice([132, 264, 264, 2000, 16])
        cases.append(LossCase(*shape, processors, orders, random.randrange(10**6)))
    return run_all(cases, check)


def shared_rows(seed: int) -> dict[str, Any]:
    """Rows that 2 to 32 blocks share, in four more orders of the blocks."""
    random = Random(seed)
    cases = []
    for experts in range(1, 9):
        for op, classes in (
            ("dkt", 17000 if experts % 2 else 33000),
            ("cross-entropy", 33000 if experts % 3 == 0 else 20011),
        ):
            shape = op, experts, random.choice([1, 2]), classes, random.choice([*DTYPES])
            orders = ("descending alone", "random alone", "descending", random.choice(["alone", "random"]))
            where = random.choice(LAYOUTS), random.choice(VALUES), 2000
            cases.append(LossCase(*shape, *where, orders, random.randrange(10**6)))
    return run_all(cases, check)


def tall() -> dict[str, Any]:
    """Many rows of few classes."""
    sizes = ((3, 1000, 10), (2, 5000, 7), (8, 2000, 2), (1, 4097, 3), (4, 600, 100))
    cases = (
        LossCase(op, *size, dtype, "whole", "normal", processors, seed=sum(size))
        for size, dtype, (op, processors) in itertools.product(
            sizes, DTYPES, (("dkt", 132), ("cross-entropy", 1), ("balanced", 4))
        )
    )
    return run_all(cases, check)
