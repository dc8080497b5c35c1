"""The CUDA kernels of the losses in the interpreter, against the float64 reference."""

import itertools
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, NamedTuple

import torch
from common import BOUND, DTYPES, Outcome, strided, summary
from host import Order, cuda, native_loss, ops
from torch import Tensor

Logits = Tensor | list[Tensor]

LAYOUTS = (
    *("whole", "whole, unaligned", "padded rows", "transposed", "every other class", "classes first", "experts inner"),
    *("list", "list, unaligned", "list, each its own", "list, some transposed", "one row", "one expert"),
)
VALUES = ("normal", "normal", "large", "extreme", "ties", "equal", "agreed")
OPS: dict[str, Callable[..., Any]] = {
    "dkt": ops.dkt_loss,
    "cross-entropy": ops.expert_cross_entropy,
    "balanced": ops.balanced_softmax_loss,
}
ORDERS = {
    "descending": Order("descending"),
    "random": Order("random", seed=7),
    "alone": Order(alone=True),
    "descending alone": Order("descending", alone=True),
    "random alone": Order("random", alone=True, seed=8),
}


BATCH_MEAN = (1.0, 1.0, 0.0, -30.0, False)  # options of dkt_forward: both weights, teacher's and student's target


class LossCase(NamedTuple):
    op: str
    experts: int
    batch: int
    classes: int
    dtype: str
    layout: str
    values: str
    processors: int = 132
    orders: tuple[str, ...] = ()  # beside the usual one
    seed: int = 0


def values_of(case: LossCase) -> Tensor:
    """Logits [K, B, C] in float32."""
    shape = case.experts, case.batch, case.classes
    if case.values == "large":
        return (torch.randn(shape) * 4e3).clamp(-1e4, 1e4)
    if case.values == "extreme":
        return torch.where(torch.rand(shape) < 0.5, 1e4, -1e4)
    if case.values == "ties":
        return torch.randint(-1, 2, shape).float()
    if case.values == "equal":
        return torch.full(shape, 0.5)
    if case.values == "agreed":  # all experts
        return (torch.randn(1, *shape[1:]) * 3).expand(shape).contiguous()
    return torch.randn(shape) * 3


def laid_out(z: Tensor, layout: str, random: Random) -> tuple[Logits, Tensor]:
    """Logits in a layout, and as they are."""
    experts, batch, classes = z.shape
    some = random.randrange
    if layout.startswith("list"):
        strides, offsets = [(classes, 1)] * experts, [0] * experts
        if layout == "list, unaligned":
            offsets = [1 + some(7)] * experts
        elif layout == "list, each its own":
            strides, offsets = [(classes + k, 1) for k in range(experts)], [k + some(3) for k in range(experts)]
        elif layout == "list, some transposed":
            strides = [(classes, 1) if k % 2 else (1, batch) for k in range(experts)]
        return [strided(z[k], strides[k], offsets[k]) for k in range(experts)], z
    if layout in ("one row", "one expert"):  # for all
        z = (z[:, :1] if layout == "one row" else z[:1]).expand(z.shape)
        return z, z
    padded = classes + 1 + some(8)
    strides, offset = {
        "whole": ((batch * classes, classes, 1), 0),
        "whole, unaligned": ((batch * classes, classes, 1), 1 + some(7)),
        "padded rows": ((batch * padded, padded, 1), some(4)),
        "transposed": ((classes * batch, 1, batch), some(3)),
        "every other class": ((batch * classes * 2 + 1, classes * 2, 2), some(3)),
        "classes first": ((batch, 1, experts * batch), 0),
        "experts inner": ((1, classes * experts, experts), 0),
    }[layout]
    return strided(z, strides, offset), z


def options_of(case: LossCase, target: Tensor, random: Random) -> dict[str, Any]:
    """Options of the op, drawn."""
    if case.op == "dkt":
        return {
            "hardest_weight": random.choice([10.0, 10.0, 0.0, 0.3]),
            "mutual_weight": random.choice([1.0, 1.0, 0.0, 2.0]),
            "kl_reduction": random.choice(["mean", "batchmean"]),
            "detach_teacher": random.random() < 0.3,
            "teacher_target_logit": random.choice([0.0, 0.0, 1.5]),
            "student_target_logit": random.choice([-30.0, -30.0, -5.0]),
            "return_terms": True,
        }
    if case.op == "cross-entropy":
        bias = None
        if kind := random.choice([None, "one", "each", "one, unaligned", "each, unaligned"]):
            bias = torch.randn(case.classes) if kind.startswith("one") else torch.randn(case.experts, case.classes)
            bias = strided(bias, bias.stride(), 1 + random.randrange(3) if kind.endswith("unaligned") else 0)
        return {"bias": bias, "label_smoothing": random.choice([0.0, 0.1, 1.0])}
    counts = torch.randint(1, 100, (case.classes,))
    absent = [c for c in range(case.classes) if c not in target.tolist()]
    if absent and random.random() < 0.3:
        counts[absent[0]] = 0
    return {"class_counts": counts}


class Results(NamedTuple):
    loss: Tensor
    terms: Tensor | None
    gradient: Tensor  # [K, B, C]


def evaluate(op: str, logits: Logits, target: Tensor, scale: float, backend: str, **options: Any) -> Results:
    """The loss, and the gradient of ``scale`` times it."""
    leaves = [t.detach().requires_grad_() for t in (logits if isinstance(logits, list) else [logits])]
    given = leaves if isinstance(logits, list) else leaves[0]
    result = OPS[op](given, target, backend=backend, **options)
    loss, terms = result if isinstance(result, tuple) else (result, None)
    gradients = torch.autograd.grad(loss * scale, leaves)
    return Results(loss.detach(), terms, torch.stack(gradients) if isinstance(logits, list) else gradients[0])


def run(case: LossCase, ulps: int = 0) -> Outcome:
    """Against float64: no worse than some roundings, or four times the error of eager PyTorch in the same dtype."""
    outcome, random = Outcome(), Random(case.seed)
    torch.manual_seed(case.seed)
    logits, z = laid_out(values_of(case).to(DTYPES[case.dtype]), case.layout, random)
    target = torch.randint(0, case.classes, (case.batch,))
    if random.random() < 0.2:
        target = strided(target, (3,))
    options = options_of(case, target, random)
    scale = random.choice([1.0, 1.0, 2.5, 1024.0 if case.dtype == "f16" else 7.0])

    with cuda(case.processors, ulps=ulps) as device:
        mine = evaluate(case.op, logits, target, scale, "cpu", **options)
    outcome.seen("lockstep", device)
    exactly = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    exact = evaluate(case.op, z.double(), target, scale, "reference", **exactly)
    eager = evaluate(case.op, logits, target, scale, "reference", **options)
    compare(outcome, case, z, options, scale, mine, exact, eager)
    for order in case.orders:
        with cuda(case.processors, ORDERS[order], ulps) as device:
            again = evaluate(case.op, logits, target, scale, "cpu", **options)
        outcome.seen(order, device)
        for name, one, other in zip(Results._fields, mine, again, strict=True):
            outcome.same(f"{name}, {order}", one, other)
    return outcome


def compare(
    outcome: Outcome,
    case: LossCase,
    z: Tensor,
    options: dict[str, Any],
    scale: float,
    mine: Results,
    exact: Results,
    eager: Results,
) -> None:
    size = max(abs(exact.loss.item()), 1e-3)

    def of_loss(result: Results) -> float:
        return abs(result.loss.double() - exact.loss).item() / size

    outcome.within(f"loss, {case.op}", of_loss(mine), max(1e-5, 4 * of_loss(eager)))
    if exact.terms is not None:
        sizes = exact.terms.abs().clamp_min(size * 1e-2 + 1e-4)

        def of_terms(result: Results) -> float:
            assert result.terms is not None
            return ((result.terms.double() - exact.terms).abs() / sizes).max().item()

        outcome.within("terms", of_terms(mine), max(1e-4, 4 * of_terms(eager)))

    too_large = exact.gradient.abs() > 65500.0 if case.dtype == "f16" else torch.zeros_like(z, dtype=torch.bool)

    def of_gradient(result: Results) -> Tensor:
        gradient = result.gradient.double()
        overflowed = (gradient.abs() >= 65400) & (gradient.sign() == exact.gradient.sign())
        wrong = torch.where(overflowed, 0.0, torch.inf).double()
        return torch.where(too_large, wrong, (gradient - exact.gradient).abs())

    floor = scale / case.batch * 1e-2
    rows = exact.gradient.abs().amax(2, keepdim=True).clamp_min(floor)
    largest, allowed = rows.max().item(), of_one_pass(case, z, options, scale)
    error, usual = of_gradient(mine), of_gradient(eager)
    bound = max(BOUND[case.dtype], min(4 * usual.max().item() / largest, 1e-2), allowed / largest)
    outcome.within(f"gradient, {case.op}, {case.dtype}", error.max().item() / largest, bound)
    bound = max(BOUND[case.dtype], 4 * (usual / rows).max().item(), (allowed / rows).max().item())
    outcome.within(f"gradient of a row, {case.op}, {case.dtype}", (error / rows).max().item(), bound)


def of_one_pass(case: LossCase, z: Tensor, options: dict[str, Any], scale: float) -> float:
    """What one pass over a row may cost: K x_k minus the sum of all x cancels, and their mean has been rounded."""
    if case.op != "dkt":
        return 0.0
    spread = (z.double().amax(2) - z.double().amin(2)).max().item()
    weight = max(options["mutual_weight"], options["hardest_weight"])
    count = case.batch if options["kl_reduction"] == "batchmean" else case.batch * case.classes
    return 8 * 2.0**-24 * case.experts * spread * scale * weight / count


def run_all(cases: Iterable[LossCase], ulps: int = 0) -> dict[str, Any]:
    return summary({str(tuple(case)): run(case, ulps) for case in cases})


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
    """Saved are the largest logits and the hardest negative, the lowest of tied classes, both exactly."""
    outcomes = {}
    for name, (z, target, processors) in difficult_rows().items():
        outcome = outcomes[name] = Outcome()
        with cuda(processors) as device:
            _, terms, saved = native_loss.dkt_forward([z], target, None, *BATCH_MEAN)
            gradient = native_loss.dkt_backward(torch.ones(()), [z], target, None, saved, *BATCH_MEAN)
        outcome.seen("lockstep", device)
        places = target.view(1, -1, 1)
        maxima = z.scatter(2, places.expand(3, -1, 1), -torch.inf).amax(2)
        total = (z[0] + z[1] + z[2]).scatter(1, places[0], -torch.inf)
        outcome.same("maxima", saved[:, :3], maxima.T)
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


# ---- what the tests ask for


def quick() -> dict[str, Any]:
    """Every number of experts, dtype, layout and kind of values; rows of one block and of several; difficult rows."""
    layouts, values, dtypes = (itertools.cycle(names) for names in (LAYOUTS, VALUES[1:], DTYPES))
    cases = []
    for experts in range(1, 9):
        for op in ("dkt", "cross-entropy") if experts % 2 else ("dkt", "balanced"):
            sizes = (next(dtypes), next(layouts), next(values))
            orders = ("descending", "random") if experts == 3 else ("descending alone",)
            cases.append(LossCase(op, experts, 3, 101, *sizes, orders=orders, seed=experts))
    cases.append(LossCase("dkt", 3, 1, 20011, "bf16", "whole, unaligned", "normal", 2000, ("random alone",)))
    cases.append(
        LossCase("cross-entropy", 2, 1, 33000, "f32", "list, unaligned", "normal", 2000, ("descending alone",))
    )
    outcomes = {str(tuple(case)): run(case) for case in cases}
    return summary(outcomes | hardest_negatives() | terms_that_are_off())


def matrix(experts: int, seed: int) -> dict[str, Any]:
    random = Random(1000 * seed + experts)
    cases = []
    for batch, classes in itertools.product((1, 3, 33), (2, 3, 7, 10, 100, 101, 365, 1000)):
        for dtype, op in itertools.product(DTYPES, ("dkt", random.choice(["cross-entropy", "balanced"]))):
            orders = (random.choice([*ORDERS]),) if random.random() < 0.25 else ()
            shape = op, experts, batch, classes, dtype, random.choice(LAYOUTS), random.choice(VALUES)
            cases.append(LossCase(*shape, random.choice([132, 132, 1, 16, 264]), orders, random.randrange(10**6)))
    return run_all(cases)


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
    return run_all(cases, ulps)


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
    return run_all(cases)


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
    return run_all(cases)


def tall() -> dict[str, Any]:
    """Many rows of few classes."""
    sizes = ((3, 1000, 10), (2, 5000, 7), (8, 2000, 2), (1, 4097, 3), (4, 600, 100))
    return run_all(
        LossCase(op, *size, dtype, "whole", "normal", processors, seed=sum(size))
        for size, dtype, (op, processors) in itertools.product(
            sizes, DTYPES, (("dkt", 132), ("cross-entropy", 1), ("balanced", 4))
        )
    )
