"""Cases of the generalised expert loss: its options, drawn, and the comparison with the float64 reference."""

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
from loss_inputs import LossCase, OnDevice, Place, laid_out, values_of
from outcomes import BOUND, DTYPES, LOCKSTEP, Outcome
from torch import Tensor

from shike_fast import ops

KINDS = ("plain", "cross-entropy", "others", "mean", "given", "view", "kl")  # a case's op; "kl" is expert_kl


class Results(NamedTuple):
    loss: Tensor
    terms: Tensor | None
    gradient: Tensor  # [K, B, C]
    rows: Tensor | None  # loss, log_sum_exp and p_target [3, K, B]
    correct: Tensor | None  # [K, B]


class Call(NamedTuple):
    """A drawn call: of which operator, and with what."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def exactly(self) -> "Call":
        """With float64 numbers."""
        return Call(self.function, tuple(map(_double, self.args)), {k: _double(v) for k, v in self.options.items()})


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, ops.ExpertKL):
        return ops.ExpertKL(**{name: _double(given) for name, given in vars(value).items()})
    return value


class Draw:
    """Arguments for K experts, B rows and C classes, in the kernels' memory."""

    def __init__(self, case: LossCase, random: Random, place: Place) -> None:
        self.case, self.random, self.place = case, random, place
        self.experts, self.rows, self.classes = case.experts, case.batch, case.classes

    def chance(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    def numbers(self, *shape: int, low: float = 0.2, high: float = 2.0) -> Tensor:
        values = low + (high - low) * torch.rand(shape)
        return self.place(values, values.stride(), self.random.choice([0, 0, 1, 2, 3]))

    def of_classes(self, **limits: float) -> Tensor:
        """[C] or [K, C]"""
        return self.numbers(*((self.classes,) if self.chance() else (self.experts, self.classes)), **limits)

    def of_rows(self, rows: int, **limits: float) -> Tensor:
        """[B] or [K, B]"""
        return self.numbers(*((rows,) if self.chance() else (self.experts, rows)), **limits)

    def labels(self, *shape: int) -> Tensor:
        values = torch.randint(0, self.classes, shape)
        return self.place(values, values.stride(), 0)

    def cross_entropy(self, target: Tensor, divergence: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"reduction": self.random.choice(["mean", "mean/K"])}
        if self.chance():
            options["bias"] = self.of_classes(low=-1.0, high=1.0)
            if not divergence and self.chance(0.2):  # a class that takes no part
                absent = [c for c in range(self.classes) if not (target == c).any()]
                options["bias"][..., absent[:1]] = -torch.inf
        if self.chance(0.4):
            options["scale"] = self.random.choice([0.5, 2.0]) if self.chance() else self.of_classes()
        if self.chance(0.4):
            options["margin"] = self.of_classes(high=5.0)
        if self.chance(0.3):
            options["label_smoothing"] = self.random.choice([0.1, 1.0])
        elif self.chance(0.4):
            mask = torch.rand(self.rows, self.classes) < 0.6
            rows = target if target.dim() == 2 else target.unsqueeze(0)
            mask.scatter_(1, rows.T.contiguous(), True)
            if self.case.op == "view":  # a class that only the student leaves out is infinitely far away
                mask |= mask.roll(self.rows // 2, 0)
            if "bias" in options:
                options["bias"].clamp_(min=-1.0)
            options["class_mask"] = self.place(mask, mask.stride(), self.random.choice([0, 1, 3]))
            options["masked"] = self.random.choice(["zero", "exclude"])
        if self.chance(0.4) and "class_mask" not in options and not torch.isinf(options.get("bias", target)).any():
            same = torch.rand(self.rows) < 0.3
            each = target.dim() == 2 or (not divergence and self.chance())
            other = self.labels(self.experts, self.rows) if each else self.labels(self.rows)
            options["target_b"] = other.copy_(torch.where(same, target, other))
            options["lam"] = self.random.choice([0.3, self.numbers(high=0.9), self.numbers(self.rows, high=0.9)])
        if self.chance(0.4):
            options["reduction"] = self.random.choice(["weighted_mean", "global_weighted_mean"])
            names = [("class_weight", self.of_classes()), ("sample_weight", self.of_rows(self.rows))]
            options |= {name: value for name, value in names if self.chance(0.7)}
            options |= {"expert_weight": self.numbers(self.experts)} if self.chance() else {}
        if self.chance(0.2) and not divergence:
            options["reduction"] = "none"
        return options

    def divergence(self, kind: str, with_target: bool) -> dict[str, Any]:
        """The arguments of ``expert_kl`` beside the logits, the mask and the target."""
        rows = self.rows // 2 if kind == "view" else self.rows
        options: dict[str, Any] = {"teacher": kind, "reduction": self.random.choice(["batchmean", "mean"])}
        if kind == "given":
            shape = (self.rows, self.classes) if self.chance() else (self.experts, self.rows, self.classes)
            dtype = self.random.choice([DTYPES[self.case.dtype], torch.float32])
            values = (3 * torch.randn(shape)).to(dtype)
            strides = values.stride() if self.chance(0.7) else values.transpose(-1, -2).contiguous().mT.stride()
            options["teacher"] = self.place(values, strides, self.random.choice([0, 1, 2]))
        if self.chance():
            options["temperature"] = self.random.choice([0.5, 3.0]) if self.chance() else self.numbers(self.classes)
        if self.chance(0.4):
            options["weight"] = 0.3 if self.chance() else self.of_rows(rows)
        if self.chance(0.3):
            options["weight_of"] = "student"
        if self.chance(0.3):
            options["gate"] = self.of_rows(rows).round()
            options["reduction"] = self.random.choice(["batchmean", "gated_mean"])
        elif with_target and self.chance(0.4) and "weight_of" not in options:
            options["gate"] = "teacher_correct"
        if kind == "others" and self.chance(0.3):
            options["detach"] = True
        return options


def call_of(case: LossCase, random: Random, place: Place) -> Call:
    draw = Draw(case, random, place)
    kind = case.op
    if kind == "kl":
        kinds = ["others", "others", "mean", "given"] + (["view"] if case.batch % 2 == 0 else [])
        with_target = draw.chance()
        options = draw.divergence(random.choice(kinds), with_target)
        if with_target:
            options["target"] = draw.labels(case.batch)
        return Call(ops.expert_kl, (options.pop("teacher"),), options)
    divergence = kind in ("others", "mean", "given", "view")
    target = draw.labels(case.experts, case.batch) if not divergence and draw.chance(0.2) else draw.labels(case.batch)
    if kind == "plain":
        bias = draw.of_classes(low=-1.0, high=1.0) if draw.chance(0.7) else None
        return Call(ops.expert_loss, (target,), {"bias": bias, "return_terms": True})
    options = draw.cross_entropy(target, divergence) | {"return_terms": True, "return_rows": draw.chance(0.4)}
    if divergence:
        options["kl"] = ops.ExpertKL(**draw.divergence(kind, True), adjusted=draw.chance(0.7))
    return Call(ops.expert_loss, (target,), options)


def evaluate(call: Call, logits: Tensor | list[Tensor], scale: float, backend: str) -> Results:
    """The loss, and the gradient of ``scale`` times it, or times the rows' numbers 1 .. K B / K B."""
    leaves = [t.detach().requires_grad_() for t in (logits if isinstance(logits, list) else [logits])]
    found = call.function(
        leaves if isinstance(logits, list) else leaves[0], *call.args, backend=backend, **call.options
    )
    loss, *more = found if isinstance(found, tuple) else (found,)
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape) / loss.numel()
    gradients = torch.autograd.grad(loss, leaves, weights * scale)
    rows = more[1] if len(more) > 1 else None
    return Results(
        loss.detach(),
        more[0] if more else None,
        torch.stack(gradients) if isinstance(logits, list) else gradients[0],
        None if rows is None else torch.stack([rows.loss, rows.log_sum_exp, rows.p_target]),
        None if rows is None else rows.correct,
    )


def check(outcome: Outcome, case: LossCase, place: Place, on_device: OnDevice) -> None:
    """Against float64, and the same bits in other orders.

    No worse than some roundings, or four times the error of eager PyTorch in the same dtype.
    """
    random = Random(case.seed)
    torch.manual_seed(case.seed)
    logits, z = laid_out(values_of(case).to(DTYPES[case.dtype]), case.layout, random, place)
    call = call_of(case, random, place)
    scale = random.choice([1.0, 1.0, 2.5, -7.0])
    mine = on_device(LOCKSTEP, lambda backend: evaluate(call, logits, scale, backend))
    exact = evaluate(call.exactly(), z.double(), scale, "reference")
    eager = evaluate(call, logits, scale, "reference")
    compare(outcome, case, z, scale, mine, exact, eager)
    for order in case.orders:
        again = on_device(order, lambda backend: evaluate(call, logits, scale, backend))
        for name, one, other in zip(Results._fields, mine, again, strict=True):
            if name != "correct":
                outcome.same(f"{name}, {order}", one, other)


def compare(
    outcome: Outcome, case: LossCase, z: Tensor, scale: float, mine: Results, exact: Results, eager: Results
) -> None:
    # What one pass over a row may cost, of all pairs: V x_k minus the sum of all v x cancels.
    spread = (z.double().amax(2) - z.double().amin(2)).max().item()
    divergence = case.op not in ("plain", "cross-entropy")
    cancelled = 16 * 2.0**-24 * case.experts**2 * (1 + spread) if divergence else 0.0
    for name in ("loss", "terms", "rows"):
        one, expected, other = (getattr(results, name) for results in (mine, exact, eager))
        if expected is None:
            continue
        infinite = ~torch.isfinite(expected)
        outcome.within(f"{name}, not finite", float((torch.isfinite(one) & infinite).sum()), 0.0)
        size = expected[~infinite].abs().max().clamp_min(1e-3).item() if (~infinite).any() else 1.0
        error, usual = (
            torch.where(infinite, 0.0, (values.double() - expected).abs()).max().item() / size
            for values in (one, other)
        )
        outcome.within(f"{name}, {case.op}", error, max(1e-5, 4 * usual, cancelled / size))
    if exact.correct is not None:
        assert mine.correct is not None and eager.correct is not None
        outcome.within("answers", float((mine.correct != eager.correct).sum()), 0.0)
    rows = exact.gradient.abs().amax(2, keepdim=True).clamp_min(abs(scale) / case.batch * 1e-2)
    error_of = [(results.gradient.double() - exact.gradient).abs() for results in (mine, eager)]
    usual = (error_of[1] / rows).max().item()
    allowed = rows * max(2 * BOUND[case.dtype], 4 * usual) + cancelled * abs(scale) / case.batch
    outcome.within(f"gradient, {case.op}, {case.dtype}", (error_of[0] / rows).max().item(), float("inf"))
    outcome.within(f"gradient beside what is allowed, {case.op}", (error_of[0] / allowed).max().item(), 1.0)
