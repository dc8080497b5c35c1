"""The CUDA kernels of the generalised expert loss in the interpreter, against the float64 reference."""

import itertools
from random import Random
from typing import Any

from common import run, run_all, summary
from expert_inputs import KINDS, check
from loss_inputs import LAYOUTS, VALUES, LossCase
from outcomes import DTYPES, OTHER_ORDERS


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
    return summary({str(tuple(case)): run(case, check) for case in cases})


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
    """Rows of one to 17 blocks."""
    random = Random(seed)
    sizes = itertools.cycle(((8142, 2), (20011, 1), (17000, 2), (33000, 1)))
    cases = []
    for experts, _ in itertools.product(range(1, 9), range(2)):
        classes, batch = next(sizes)
        op = random.choice([kind for kind in KINDS if kind != "view" or batch % 2 == 0])
        shape = op, experts, batch, classes, random.choice([*DTYPES]), random.choice(LAYOUTS), random.choice(VALUES)
        orders = (random.choice(["descending", "random", "descending alone", "alone"]),)
        cases.append(LossCase(*shape, random.choice([16, 264, 2000]), orders, random.randrange(10**6)))
    return run_all(cases, check)
