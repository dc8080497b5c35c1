"""Cases of the expert losses: logits, their layouts, options, and the comparison with the float64 reference.

A host of the interpreter gives ``place``: a tensor of values, strides and offset beside which nothing is allocated.
"""

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
from outcomes import BOUND, DTYPES, LOCKSTEP, Outcome
from torch import Tensor

from shike_fast import ops

Logits = Tensor | list[Tensor]
Place = Callable[[Tensor, tuple[int, ...], int], Tensor]
OnDevice = Callable[[str, Callable[[str], Any]], Any]  # of an order, and what to evaluate with a backend

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


class LossCase(NamedTuple):
    op: str
    experts: int
    batch: int
    classes: int
    dtype: str
    layout: str
    values: str
    processors: int = 132  # of the device, where the host can choose
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


def laid_out(z: Tensor, layout: str, random: Random, place: Place) -> tuple[Logits, Tensor]:
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
        return [place(z[k], strides[k], offsets[k]) for k in range(experts)], z
    if layout in ("one row", "one expert"):  # for all
        few = (z[:, :1] if layout == "one row" else z[:1]).contiguous()
        return place(few, few.stride(), 0).expand(z.shape), few.expand(z.shape)
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
    return place(z, strides, offset), z


def options_of(case: LossCase, target: Tensor, random: Random, place: Place) -> dict[str, Any]:
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
            bias = place(bias, bias.stride(), 1 + random.randrange(3) if kind.endswith("unaligned") else 0)
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


def check(outcome: Outcome, case: LossCase, place: Place, on_device: OnDevice) -> None:
    """Against float64, and the same bits in other orders.

    No worse than some roundings, or four times the error of eager PyTorch in the same dtype.
    """
    random = Random(case.seed)
    torch.manual_seed(case.seed)
    logits, z = laid_out(values_of(case).to(DTYPES[case.dtype]), case.layout, random, place)
    target = torch.randint(0, case.classes, (case.batch,))
    target = place(target, (3 if random.random() < 0.3 else 1,), 0)
    options = options_of(case, target, random, place)
    scale = random.choice([1.0, 1.0, 2.5, -7.0, 1024.0 if case.dtype == "f16" else 7.0])

    def evaluated(backend: str) -> Results:
        return evaluate(case.op, logits, target, scale, backend, **options)

    mine = on_device(LOCKSTEP, evaluated)
    assert mine.gradient.dtype == z.dtype and mine.gradient.shape == z.shape
    exactly = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    exact = evaluate(case.op, z.double(), target, scale, "reference", **exactly)
    eager = evaluate(case.op, logits, target, scale, "reference", **options)
    compare(outcome, case, z, options, scale, mine, exact, eager)
    for order in case.orders:
        for name, one, other in zip(Results._fields, mine, on_device(order, evaluated), strict=True):
            outcome.same(f"{name}, {order}", one, other)


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

    floor = abs(scale) / case.batch * 1e-2
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
    return 8 * 2.0**-24 * case.experts * spread * abs(scale) * weight / count
