"""The CUDA kernels of the generalised expert loss in the interpreter, against the float64 reference."""

import itertools
from random import Random
from typing import Any

import torch
from common import run, run_all, summary
from expert_inputs import KINDS, check
from host import cuda, ops
from loss_inputs import LAYOUTS, VALUES, LossCase
from outcomes import DTYPES, OTHER_ORDERS, Outcome


def quick() -> dict[str, Any]:
    """Every kernel and kind of call; rows of one block and of several."""
    layouts, values = (itertools.cycle(names) for names in (LAYOUTS, VALUES))
    halves, between, kinds = (itertools.cycle(names) for names in (("bf16", "f16"), ("others", "mean"), KINDS[1:]))
    cases = []
    for experts, wide in itertools.product(range(1, 9), (True, False)):
        for op, batch in ((next(between), 3), (next(kinds), 2), ("plain", 3)):
            where = "f32" if wide else next(halves), next(layouts), next(values)
            orders = ("descending alone",) if op != "plain" else ()
            cases.append(LossCase(op, experts, batch, 101, *where, orders=orders, seed=len(cases)))
    for op, experts in itertools.product(KINDS[1:], (2, 5)):
        cases.append(LossCase(op, experts, 4, 60, "f32", next(layouts), "normal", seed=len(cases)))
    for op, experts in (("others", 3), ("given", 2), ("cross-entropy", 2)):
        cases.append(LossCase(op, experts, 1, 33000, "f32", "whole, unaligned", "normal", 2000, ("random alone",)))
    outcomes = {str(tuple(case)): run(case, check) for case in cases}
    return summary(outcomes | {"an empty batch": empty_batch(), "equal labels": equal_labels()})


def empty_batch() -> Outcome:
    """The sums over no rows are 0."""
    outcome = Outcome()
    with cuda():
        for kl in (None, ops.ExpertKL(temperature=2.0)):
            leaf = torch.randn(3, 0, 10).requires_grad_()
            target = torch.zeros(0, dtype=torch.int64)
            loss, terms = ops.expert_loss(leaf, target, kl=kl, return_terms=True, backend="cpu")
            loss.backward()
            outcome.same("loss", loss.detach(), torch.zeros(()))
            outcome.same("terms", terms, torch.zeros(2))
            assert leaf.grad is not None and leaf.grad.shape == leaf.shape
    return outcome


def equal_labels() -> Outcome:
    """Two labels that are the same class, for all rows, are one label; where these are all classes, nothing is left."""
    outcome = Outcome()
    torch.manual_seed(0)
    z, target = torch.randn(3, 5, 40), torch.tensor([0, 39, 7, 8, 3])
    with cuda() as device:
        found = []
        for second in ({}, {"target_b": target.clone(), "lam": 0.25}):
            leaf = z.clone().requires_grad_()
            loss = ops.expert_loss(leaf, target, **second, kl=ops.ExpertKL(), backend="cpu")
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        results = {}
        for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
            leaf = z[:, :2, :2].to(dtype).contiguous().requires_grad_()
            options = {"target_b": torch.tensor([1, 0]), "lam": 0.3, "label_smoothing": 0.1, "kl": ops.ExpertKL()}
            loss = ops.expert_loss(leaf, torch.tensor([0, 1]), **options, backend=backend)
            results[backend] = torch.cat([loss.detach().reshape(1), torch.autograd.grad(loss, leaf)[0].flatten()])
    for name, one, other in zip(("loss", "gradient"), *found, strict=True):
        outcome.within(f"one label, {name}", (one - other).abs().max().item(), 1e-6)
    outcome.within("two classes", (results["cpu"] - results["reference"]).abs().max().item(), 1e-6)
    outcome.seen("lockstep", device)
    return outcome


def matrix(experts: int, seed: int, count: int = 40) -> dict[str, Any]:
    random = Random(1000 * seed + experts)
    cases = []
    for _ in range(count):
        batch, classes = random.choice([1, 2, 3, 33, 34]), random.choice([2, 3, 7, 10, 100, 101, 365])
        op = random.choice([kind for kind in KINDS if kind != "view" or batch % 2 == 0])
        orders = (random.choice([*OTHER_ORDERS]),) if random.random() < 0.25 else ()
        shape = op, experts, batch, classes, random.choice([*DTYPES]), random.choice(LAYOUTS), random.choice(VALUES)
        cases.append(LossCase(*shape, random.choice([132, 132, 1, 16]), orders, random.randrange(10**6)))
    return run_all(cases, check)


def shared_rows(seed: int) -> dict[str, Any]:
    """Rows of several blocks."""
    random = Random(seed)
    sizes = itertools.cycle(((8142, 2), (17000, 1), (20011, 1)))
    cases = []
    for experts, op in zip((1, 2, 3, 4, 6, 8, 2, 3), (*KINDS, "others"), strict=True):
        classes, batch = (8142, 2) if op == "view" else next(sizes)
        shape = op, experts, batch, classes, random.choice([*DTYPES]), random.choice(LAYOUTS), "normal"
        orders = (random.choice(["descending", "random", "alone"]),)
        cases.append(LossCase(*shape, random.choice([264, 2000]), orders, random.randrange(10**6)))
    return run_all(cases, check)
