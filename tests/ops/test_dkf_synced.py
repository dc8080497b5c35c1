"""The statistics of dkf_bn_pool and dkf_experts over the batches of two processes, which talk through Gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from shike_fast.nn.sync_batch_norm import SyncBatchNorm
from shike_fast.ops import BatchNormArguments, dkf_bn_pool, dkf_experts

EXPERTS, BATCH, CHANNELS = 2, 6, 5
SHAPE = (BATCH, CHANNELS, 4, 3)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2.0**-7}
SPLITS = {"halves": 3, "unequal": 4, "empty": 6}  # examples of the first process


class Case(NamedTuple):
    backend: str | None
    dtype: torch.dtype
    relu: bool
    form: str  # the operator, and whether the end of the residual block is folded into it
    split: str = "halves"
    tracked: bool = True
    affine: bool = True


CASES = [
    *(
        Case(backend, dtype, relu, form, split)
        for backend, dtype, relu, form, split in product(
            ("cpu", "reference"),
            (torch.float64, torch.float32),
            (False, True),
            ("bn_pool", "experts", "folded"),
            SPLITS,
        )
    ),
    *(Case(None, torch.bfloat16, True, form) for form in ("bn_pool", "experts", "folded")),
    *(Case(backend, torch.float64, True, "folded", tracked=False) for backend in ("cpu", "reference")),
    *(Case(backend, torch.float64, True, "folded", affine=False) for backend in ("cpu", "reference")),
]
CASE_NAMES = ["-".join(str(part) for part in case).replace("torch.", "") for case in CASES]


class Inputs(NamedTuple):
    maps: list[torch.Tensor]  # deep, shallow and perhaps shortcut maps of all experts
    weights: list[torch.Tensor]  # of all norms, then their biases; none if not affine
    running: list[torch.Tensor]  # mean and variance of each norm; none if not tracked
    incoming: torch.Tensor


def count_of(form: str) -> tuple[int, int]:
    """Experts and norms."""
    return {"bn_pool": (1, 1), "experts": (EXPERTS, EXPERTS), "folded": (EXPERTS, 2 * EXPERTS)}[form]


def inputs_of(case: Case, rows: slice) -> Inputs:
    """The same batch in every process, and of it the rows."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    experts, norms = count_of(case.form)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps = [random(*SHAPE) for _ in range(experts + norms)]
    maps = [(2 * map_ + random(CHANNELS, 1, 1)).to(case.dtype)[rows].clone().requires_grad_() for map_ in maps]
    wide = torch.promote_types(case.dtype, torch.float32)
    weights = [random(CHANNELS).to(wide).requires_grad_() for _ in range(2 * norms if case.affine else 0)]
    running = [random(CHANNELS).abs().to(wide) for _ in range(2 * norms if case.tracked else 0)]
    return Inputs(maps, weights, running, random(experts, BATCH, CHANNELS)[:, rows].to(case.dtype))


def norms_of(inputs: Inputs, count: int, training: bool = True) -> list[BatchNormArguments]:
    def of(members: list[torch.Tensor], index: int) -> torch.Tensor | None:
        return members[index] if members else None

    return [
        BatchNormArguments(
            of(inputs.weights, i),
            of(inputs.weights, count + i),
            of(inputs.running, 2 * i),
            of(inputs.running, 2 * i + 1),
            training,
            momentum=0.1 * (i + 1),
            eps=1e-3 * (i + 1),
        )
        for i in range(count)
    ]


def fuse(case: Case, inputs: Inputs, group: dist.ProcessGroup | None, training: bool = True) -> torch.Tensor:
    """f of the operator that the case names, [K, B, C]."""
    experts, norms = count_of(case.form)
    maps, arguments = inputs.maps, norms_of(inputs, norms, training)
    backend = None if maps[0].shape[0] == 0 else case.backend  # which takes no empty batch
    if case.form == "bn_pool":
        weight, bias, mean, var, training, momentum, eps = arguments[0]
        f = dkf_bn_pool(
            *(*maps, weight, bias, mean, var),
            training=training,
            momentum=momentum,
            eps=eps,
            relu=case.relu,
            backend=backend,
            process_group=group,
        )
        return f.unsqueeze(0)
    folded = case.form == "folded"
    return dkf_experts(
        maps[:experts],
        maps[experts : 2 * experts],
        arguments[:experts],
        relu=[case.relu, not case.relu],
        shortcut=maps[2 * experts :] if folded else None,
        deep_norms=arguments[experts:] if folded else None,
        backend=backend,
        process_group=group,
    )


class Outcome(NamedTuple):
    f: torch.Tensor
    maps: list[torch.Tensor]  # gradients
    weights: list[torch.Tensor]
    running: list[torch.Tensor]


def outcome(case: Case, rows: slice, group: dist.ProcessGroup | None) -> Outcome:
    inputs = inputs_of(case, rows)
    f = fuse(case, inputs, group)
    gradients = torch.autograd.grad(f, [*inputs.maps, *inputs.weights], inputs.incoming)
    return Outcome(f.detach(), [*gradients[: len(inputs.maps)]], [*gradients[len(inputs.maps) :]], inputs.running)


def my_rows(split: str = "halves") -> slice:
    first = SPLITS[split]
    return slice(0, first) if dist.get_rank() == 0 else slice(first, BATCH)


def outcomes_here() -> list[Outcome]:
    return [outcome(case, my_rows(case.split), dist.group.WORLD) for case in CASES]


@pytest.fixture(scope="module")
def outcomes(two_processes):
    return two_processes(outcomes_here)


def assert_close(mine, exact, tolerance, name):
    assert mine.shape == exact.shape, name
    worst = (mine.double() - exact.double()).abs().max()
    assert worst <= tolerance * exact.abs().max().clamp_min(1), f"{name}: {worst:.1e}"


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_two_processes_compute_what_one_computes_from_the_whole_batch(outcomes, case):
    parts = [of_process[CASES.index(case)] for of_process in outcomes]
    whole = outcome(case, slice(0, BATCH), None)
    tolerance = TOLERANCE[case.dtype]
    assert_close(torch.cat([part.f for part in parts], 1), whole.f, tolerance, "f")
    for i, (mine, theirs) in enumerate(zip(zip(*(p.maps for p in parts), strict=True), whole.maps, strict=True)):
        assert {gradient.dtype for gradient in mine} == {case.dtype}
        assert_close(torch.cat(mine), theirs, tolerance, f"gradient of map {i}")
    for i, theirs in enumerate(whole.weights):
        assert_close(parts[0].weights[i] + parts[1].weights[i], theirs, tolerance, f"gradient of vector {i}")
    for i, theirs in enumerate(whole.running):
        assert torch.equal(parts[0].running[i], parts[1].running[i])
        assert_close(parts[0].running[i], theirs, tolerance, f"running statistics {i}")


# ---- what is exchanged


@contextmanager
def messages() -> Iterator[list[tuple[str, int]]]:
    """The name and the number of elements of everything this process sends."""
    sent = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def all_gather(received, message, **options):
        sent.append(("all_gather", message.numel()))
        return originals["all_gather"](received, message, **options)

    def all_reduce(message, **options):
        sent.append(("all_reduce", message.numel()))
        return originals["all_reduce"](message, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        yield sent
    finally:
        dist.all_gather, dist.all_reduce = originals["all_gather"], originals["all_reduce"]


SHORT_CASES = [
    CASES[CASES.index(Case(backend, torch.float64, True, form))]
    for backend in ("cpu", "reference")
    for form in ("bn_pool", "experts", "folded")
]
SHORT_NAMES = [f"{case.backend}-{case.form}" for case in SHORT_CASES]


def exchanged(case: Case, group: dist.ProcessGroup | None, training: bool) -> list[tuple[str, int]]:
    inputs = inputs_of(case, my_rows())
    with messages() as sent:
        fuse(case, inputs, group, training).backward(inputs.incoming)
    return sent


def exchanges_here() -> dict[str, list]:
    own_group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    return {
        "training": [exchanged(case, dist.group.WORLD, True) for case in SHORT_CASES],
        "evaluation": [exchanged(case, dist.group.WORLD, False) for case in SHORT_CASES],
        "no group": [exchanged(case, None, True) for case in SHORT_CASES],
        "outcomes without a group": [outcome(case, my_rows(), None) for case in SHORT_CASES],
        "outcomes in a group of one": [outcome(case, my_rows(), own_group) for case in SHORT_CASES],
    }


@pytest.fixture(scope="module")
def exchanges(two_processes):
    return two_processes(exchanges_here)


@pytest.mark.parametrize("case", SHORT_CASES, ids=SHORT_NAMES)
def test_only_channel_vectors_are_exchanged(exchanges, case):
    numbers = 2 * count_of(case.form)[1] * CHANNELS
    for process in exchanges:
        assert process["training"][SHORT_CASES.index(case)] == [("all_gather", numbers + 1), ("all_reduce", numbers)]


def test_nothing_is_exchanged_in_evaluation_nor_without_a_group(exchanges):
    for process in exchanges:
        assert process["evaluation"] == process["no group"] == [[] for _ in SHORT_CASES]


@pytest.mark.parametrize("group", ["outcomes without a group", "outcomes in a group of one"])
@pytest.mark.parametrize("case", SHORT_CASES, ids=SHORT_NAMES)
def test_processes_outside_the_group_do_not_matter(exchanges, case, group):
    for process, rows in zip(exchanges, (slice(0, 3), slice(3, BATCH)), strict=True):
        mine, alone = process[group][SHORT_CASES.index(case)], outcome(case, rows, None)
        assert_close(mine.f, alone.f, 1e-12, "f")
        for field in ("maps", "weights", "running"):
            for ours, theirs in zip(getattr(mine, field), getattr(alone, field), strict=True):
                assert_close(ours, theirs, 1e-12, field)


# ---- the edges


def maps_of_zeros(batch: int, count: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(batch, CHANNELS, 1, 1, dtype=dtype) for _ in range(count)]


def refusal(call, *args, **options) -> str:
    try:
        call(*args, **options)
    except ValueError as error:
        return str(error)
    return "none"


def bn_pool(deep: torch.Tensor, shallow: torch.Tensor, *running: torch.Tensor, **options) -> torch.Tensor:
    mean, var = running or (None, None)
    group = dist.group.WORLD
    return dkf_bn_pool(deep, shallow, None, None, mean, var, training=True, process_group=group, **options)


def one_value(values: tuple[int, int], backend: str) -> str:
    """What is raised where the processes have so many values in a channel."""
    mine = values[dist.get_rank()]
    return refusal(bn_pool, *maps_of_zeros(mine), backend=backend if mine else None)


def mixed_modes() -> tuple[str, list]:
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    norms = [BatchNormArguments(None, None, mean, var, training) for training in (True, False)]
    with messages() as sent:
        deep, shallow = maps_of_zeros(4), maps_of_zeros(4)
        refused = refusal(dkf_experts, deep, shallow, norms, relu=[True, True], process_group=dist.group.WORLD)
    return refused, sent


def empty_everywhere() -> list[torch.Tensor]:
    running = [torch.full((CHANNELS,), 0.25), torch.full((CHANNELS,), 1.5)]
    return [bn_pool(*maps_of_zeros(0), *running), *running]


def far_apart(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Maps whose mean is large, and another in the second process."""
    generator = torch.Generator().manual_seed(0)
    deep, shallow = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    shallow[:3] += 1000.0
    shallow[3:] += 1001.0
    return [map_.float().to(dtype) for map_ in (deep, shallow)]


def edges_here() -> dict[str, object]:
    backends = ("cpu", "reference")
    deep, shallow = maps_of_zeros(2)
    far = [map_[my_rows()] for map_ in far_apart()]
    return {
        "one value": [one_value((1, 0), backend) for backend in backends],
        "one value in each": [one_value((1, 1), backend) for backend in backends],
        "mixed modes": mixed_modes(),
        "empty everywhere": empty_everywhere(),
        "promoted": [bn_pool(deep.bfloat16(), shallow).dtype, bn_pool(deep, shallow.double()).dtype],
        "far apart": [bn_pool(*far, backend=backend) for backend in backends],
    }


@pytest.fixture(scope="module")
def edges(two_processes):
    return two_processes(edges_here)


def test_one_value_per_channel_is_refused_in_every_process(edges):
    for process in edges:
        for message in process["one value"]:
            assert message.startswith(
                "dkf_bn_pool: Expected more than 1 value per channel when training, got input size"
            )


def test_one_value_in_each_process_is_enough(edges):
    assert [process["one value in each"] for process in edges] == [["none", "none"]] * 2


def test_norms_that_do_not_all_train_are_refused_before_any_exchange(edges):
    for process in edges:
        assert process["mixed modes"] == ("dkf_experts: process_group needs norms that all train, or none", [])


def test_running_statistics_stay_where_every_batch_is_empty(edges):
    for process in edges:
        f, mean, var = process["empty everywhere"]
        assert f.shape == (0, CHANNELS)
        assert torch.equal(mean, torch.full((CHANNELS,), 0.25)) and torch.equal(var, torch.full((CHANNELS,), 1.5))


def test_maps_of_two_dtypes_are_promoted(edges):
    assert [process["promoted"] for process in edges] == [[torch.float32, torch.float64]] * 2


def test_large_means_that_differ_between_the_processes(edges):
    deep, shallow = far_apart(dtype=torch.float64)
    exact = dkf_bn_pool(deep, shallow, None, None, None, None, training=True)
    for per_backend in zip(*(process["far apart"] for process in edges), strict=True):
        assert_close(torch.cat(per_backend), exact, 2e-4, "f")


def negated_views_here():
    """What each process computes from maps and gradients as they are, and from lazily negated views of them."""
    torch.manual_seed(dist.get_rank())
    maps, incoming = torch.randn(2, *SHAPE), torch.randn(BATCH, CHANNELS)
    norm = SyncBatchNorm(CHANNELS)
    results = []
    for view in (lambda x: x, lambda x: torch._neg_view(-x)):
        deep, shallow = (map_.clone().requires_grad_() for map_ in maps)
        f = dkf_bn_pool(
            view(deep), view(shallow), None, None, None, None, training=True, process_group=dist.group.WORLD
        )
        gradients = torch.autograd.grad(f, (deep, shallow), view(incoming))
        y = norm(view(shallow))
        results.append([f.detach(), *gradients, y.detach(), *torch.autograd.grad(y, shallow, view(maps[0]))])
    return results


def test_negated_views_count_with_their_values(two_processes):
    for plain, negated in two_processes(negated_views_here):
        torch.testing.assert_close(negated, plain)
