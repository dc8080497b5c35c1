"""The CUDA kernels of depth-wise knowledge fusion in the interpreter, against the float64 reference."""

import itertools
from random import Random
from typing import Any

import host
from common import run_all, strided
from counts import Counts
from fusion_inputs import CHANNELS, FAR, LAYOUTS, OPS, SIZES, VALUES, FusionCase, check, evaluate, setting_of
from outcomes import DTYPES, OTHER_ORDERS


def drawn(random: Random) -> FusionCase:
    op = random.choice(OPS)
    experts = 1 if op in ("pool", "bn") else random.choice([1, 2, 3, 4, 5, 8])
    (height, width), batch, channels = random.choice(SIZES), random.choice([1, 2, 3, 5, 8, 9]), random.choice(CHANNELS)
    training = random.random() < 0.6
    if training and batch * height * width == 1:
        batch = 2
    if experts * batch * channels * height * width > 120_000:
        experts, channels = min(experts, 2), min(channels, 64)
    layouts = (random.choice(LAYOUTS),) if random.random() < 0.7 else LAYOUTS
    orders = (random.choice([*OTHER_ORDERS]),) if random.random() < 0.3 else ()
    return FusionCase(
        op,
        experts,
        (batch, channels, height, width),
        random.choice([*DTYPES]),
        layouts,
        training,
        random.choice(VALUES),
        random.choice([132, 1, 16, 264]),
        orders,
        random.randrange(10**6),
    )


# ---- what the tests ask for


def quick() -> dict[str, Any]:
    """Every kernel: of each dtype and op, with vectors of channels and with single ones; layouts, kinds of values."""
    layouts, values, sizes = (itertools.cycle(names) for names in (LAYOUTS, VALUES[1:], SIZES[2:5]))
    cases = []
    for dtype in DTYPES:
        for number, (op, training) in enumerate(
            [("pool", True), *itertools.product(OPS[1:], (True, False))],
        ):
            experts = {"pool": 1, "bn": 1, "experts": 3, "folded": 2}[op]
            vectors = number // 2 % 2 == 0
            shape = 3, 32 if vectors else 19, *next(sizes)
            layout = ("last",) if vectors else (next(layouts),)
            orders = ("random",) if number == 5 else ("descending alone",)
            cases.append(FusionCase(op, experts, shape, dtype, layout, training, next(values), 16, orders, len(cases)))
    far = itertools.product(("bn", "experts", "folded"), (True, False), ("last", "first"))
    for seed, (op, training, where) in enumerate(far):
        cases.append(FusionCase(op, 1, (4, 24, 7, 7), "f32", (where,), training, FAR, 4, (), seed))
    return run_all(cases, check)


def matrix(count: int, seed: int) -> dict[str, Any]:
    random = Random(seed)
    return run_all((drawn(random) for _ in range(count)), check)


def wide(seed: int) -> dict[str, Any]:
    """Large batches and many channels; each shape with every op, and with every dtype."""
    random = Random(seed)
    shapes = [(130, 8, 1, 1), (33, 32, 7, 7), (4, 512, 4, 4), (2, 2048, 7, 1), (128, 64, 2, 2)]
    cases, dtypes = [], itertools.cycle(DTYPES)
    for number, (shape, op) in enumerate(itertools.product(shapes, OPS)):
        experts, training, dtype = 2 if op in ("experts", "folded") else 1, number % 3 != 0, next(dtypes)
        layout, values = (random.choice(["last", "last", "first"]),), random.choice(VALUES)
        where = random.choice([132, 1, 16]), (random.choice([*OTHER_ORDERS]),), random.randrange(10**6)
        cases.append(FusionCase(op, experts, shape, dtype, layout, training, values, *where))
    return run_all(cases, check)


def large_planes() -> dict[str, Any]:
    shapes = [(2, 8, 56, 56), (1, 3, 60, 60), (2, 5, 33, 31), (4, 2048, 7, 7)]
    cases = (
        FusionCase(op, 1, shape, dtype, (layout,), training, "normal", 132, (), sum(shape))
        for shape, layout in zip(shapes, ("last", "first", "last", "last"), strict=True)
        for dtype, op, training in itertools.product(DTYPES, ("bn", "folded"), (True, False))
    )
    return run_all(cases, check)


def ends(op: str, batch: int) -> dict[str, list[int]]:
    """Of the kernels over maps, one thread for each plane: samples of a block; barriers that its warps meet, and their
    requests to shared memory."""
    channels, counts = 256, Counts()
    case = FusionCase(op, 1, (batch, channels, 7, 7), "bf16", ("last",), True, "normal", 1)
    setting = setting_of(case, Random(0), strided)._replace(relu=[True])
    host.M.launches.clear()
    host.M.counts = counts
    try:
        with host.cuda(case.processors):
            evaluate(case, setting, setting.maps, "cpu")
    finally:
        host.M.counts = None
    found = {}
    for name, grid, _ in host.M.launches:
        if name.startswith(("dkf_pooling", "dkf_gradient")):
            blocks = enumerate(host.M.program(name).blocks)
            barriers = sum(counts.warps[name, n] for n, block in blocks for i in block if i.op[0] == "bar")
            requests = sum(banks.requests for access, banks in counts.shared.items() if access[0] == name)
            found[name] = [batch // grid[0], barriers // grid[0], requests // grid[0]]
    return found


def missing_channels() -> dict[str, Any]:
    """Channels that are no multiple of what the lanes of a block serve."""
    cases = (
        FusionCase(op, 1, (1, channels, 5, 4), "f32", ("last",), True, "normal")
        for op in ("pool", "bn", "folded")
        for channels in (2, 36, 132)
    )
    return run_all(cases, check)
