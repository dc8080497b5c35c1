"""SyncBatchNorm on the CPU: two processes, which talk through Gloo, against one with the joint batch."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shike_fast import models, ops
from shike_fast.nn import SyncBatchNorm, arguments_of, convert_sync_batchnorm, sync_batch_norm
from shike_fast.nn.fusion import is_batch_norm
from shike_fast.nn.sync_batch_norm import process_group_of

BATCH, CHANNELS = 6, 5
SPLITS = {"halves": 3, "unequal": 4, "empty": 6}  # examples of the first process
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Case(NamedTuple):
    dtype: torch.dtype = torch.float64
    positions: tuple[int, ...] = (4, 3)
    split: str = "halves"
    momentum: float | None = 0.1
    affine: bool = True
    bias: bool = True
    tracked: bool = True
    channels_last: bool = False
    offset: float = 0.0
    half_module: bool = False
    native: bool = True
    along: bool = False  # incoming gradients along the input, so that dγ/N, which is small otherwise, is near 1


CASES = {
    **{
        f"{len(p) + 2}-D {split}": Case(positions=p, split=split)
        for p in ((), (7,), (4, 3), (2, 3, 2))
        for split in SPLITS
    },
    "float32": Case(torch.float32),
    "float32 unequal": Case(torch.float32, split="unequal"),
    "float32 far from 0": Case(torch.float32, offset=1000.0),
    "float32 along the input far from 0": Case(torch.float32, offset=10_000.0, along=True),
    "bfloat16": Case(torch.bfloat16),
    "float16": Case(torch.float16),
    "float16 with float16 parameters": Case(torch.float16, half_module=True),
    "cumulative average": Case(split="unequal", momentum=None),
    "not affine": Case(affine=False),
    "no bias": Case(bias=False),
    "not tracked": Case(tracked=False),
    "channels-last": Case(channels_last=True),
    "channels-last 3-D": Case(positions=(2, 3, 2), channels_last=True),
    "no compiled library": Case(native=False),
    "no compiled library float32": Case(torch.float32, native=False),
}


def memory_format(case: Case) -> torch.memory_format:
    if not case.channels_last:
        return torch.contiguous_format
    return torch.channels_last if len(case.positions) == 2 else torch.channels_last_3d


def module_of(case: Case) -> nn.Module:
    """The BatchNorm of one process: SyncBatchNorm where there are several."""
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(case.positions)]
    norm = kind(CHANNELS, 1e-3, case.momentum, case.affine, case.tracked)
    if case.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if not case.bias:
        norm.bias = None
    return norm.to(case.dtype) if case.half_module or case.dtype == torch.float64 else norm


class Outcome(NamedTuple):
    y: list[torch.Tensor]
    inputs: list[torch.Tensor]  # gradients, as the following ones
    parameters: list[torch.Tensor]
    buffers: list[torch.Tensor]
    kept_layout: bool = True


def two_steps(case: Case, rows: slice, exact: bool = False) -> Outcome:
    """Of SyncBatchNorm on the rows; if exact, of BatchNorm in float64."""
    torch.manual_seed(0)
    norm, layout = module_of(case), memory_format(case)
    norm = norm.double() if exact else convert_sync_batchnorm(norm)
    y, inputs, kept = [], [], True
    for step in range(2):
        x, incoming = (torch.randn(BATCH, CHANNELS, *case.positions, dtype=torch.float64) for _ in range(2))
        incoming += x if case.along else 0.0
        x = (x * (1 + step) + torch.randn(CHANNELS, *[1] * len(case.positions)) + case.offset).to(case.dtype)[rows]
        x = (x.double() if exact else x).clone(memory_format=layout).requires_grad_()
        incoming = incoming.to(case.dtype)[rows].to(x.dtype).contiguous(memory_format=layout)
        out = norm(x)
        out.backward(incoming)
        kept &= out.is_contiguous(memory_format=layout) and x.grad.is_contiguous(memory_format=layout)
        kept &= out.dtype == x.dtype
        y.append(out.detach())
        inputs.append(x.grad)
    return Outcome(y, inputs, [p.grad for p in norm.parameters()], [*norm.buffers()], kept)


def rows_of(split: str, rank: int) -> slice:
    first = SPLITS[split]
    return slice(0, first) if rank == 0 else slice(first, BATCH)


def outcomes_here() -> dict[str, Outcome]:
    outcomes = {}
    for name, case in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            if not case.native:
                patch.setattr(sync_batch_norm, "cpu_missing", lambda: "the compiled library is missing")
                patch.setattr(sync_batch_norm, "kernels_of", None)
            outcomes[name] = two_steps(case, rows_of(case.split, dist.get_rank()))
    return outcomes


# ---- what else happens in the processes


@contextmanager
def messages() -> Iterator[list[tuple[str, int]]]:
    """The name and the number of elements of everything this process sends."""
    sent: list[tuple[str, int]] = []
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def gather(received, message, **options):
        sent.append(("all_gather", message.numel()))
        return all_gather(received, message, **options)

    def reduce(message, **options):
        sent.append(("all_reduce", message.numel()))
        return all_reduce(message, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", gather)
        patch.setattr(dist, "all_reduce", reduce)
        yield sent


def my_batch(requires_grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(3, CHANNELS, 4, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def exchanges_here() -> dict[str, list[tuple[str, int]]]:
    modules = {
        "training": SyncBatchNorm(CHANNELS),
        "frozen input": SyncBatchNorm(CHANNELS),
        "evaluation": SyncBatchNorm(CHANNELS).eval(),
        "evaluation without running statistics": SyncBatchNorm(CHANNELS, track_running_stats=False).eval(),
        "group of one": SyncBatchNorm(CHANNELS, process_group=[dist.new_group([r]) for r in range(2)][dist.get_rank()]),
    }
    sent, equal = {}, {}
    for name, module in modules.items():
        plain = nn.BatchNorm1d(CHANNELS, track_running_stats=module.track_running_stats).train(module.training).double()
        with messages() as sent[name]:
            y = module.double()(my_batch(name != "frozen input"))
            y.sum().backward()
        state = plain(my_batch()), plain.state_dict()
        equal[name] = torch.equal(y, state[0]) and all(
            torch.equal(value, state[1][key]) for key, value in module.state_dict().items()
        )
    return {"sent": sent, "equal to BatchNorm": equal}


def refusal(call, *args) -> str:
    try:
        call(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def errors_here() -> dict[str, str]:
    first = dist.get_rank() == 0
    norm = SyncBatchNorm(3)
    x = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    errors = {
        "one value": refusal(norm, torch.zeros(1 if first else 0, 3)),
        "one value each": refusal(norm, torch.zeros(1, 3)),
        "channels": refusal(norm, torch.zeros(2, 4)),
        "no channels": refusal(norm, torch.zeros(2, 0)),
        "dimensions": refusal(norm, torch.zeros(3)),
        "integers": refusal(norm, torch.zeros(2, 3, dtype=torch.int64)),
        "another device": refusal(SyncBatchNorm(3, device="meta"), torch.zeros(2, 3, device="meta")),
        "second derivative": refusal(lambda: gradient.sum().backward()),
        "no values": refusal(SyncBatchNorm(3), torch.zeros(0, 3)),
    }
    before = norm.running_mean.clone()
    norm(torch.zeros(0, 3))
    return errors | {"running statistics without values": "kept" if torch.equal(norm.running_mean, before) else "lost"}


def compiled_here() -> tuple[torch.Tensor, torch.Tensor]:
    norm = SyncBatchNorm(CHANNELS).double()
    return norm(my_batch()).detach(), torch.compile(norm, backend="eager")(my_batch()).detach()


# ---- a network


def network() -> models.MultiExpertResNet:
    torch.manual_seed(0)
    model = models.create_model("resnet8", num_classes=10).double()
    model.rt_classifiers.requires_grad_(False)  # stage 1 has no gradient for them
    return model


def train(model: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        target = torch.randint(10, (BATCH,), generator=generator)
        optimizer.zero_grad()
        ops.dkt_loss(model(images[rows]), target[rows]).backward()
        optimizer.step()


def network_here() -> dict[str, Any]:
    model, groups, fused = convert_sync_batchnorm(network()), [], ops.dkf_experts

    def counted(*args, **options):
        groups.append((options["process_group"] is dist.group.WORLD, options["deep_norms"] is not None))
        return fused(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "dkf_experts", counted)
        train(DistributedDataParallel(model, broadcast_buffers=False), rows_of("halves", dist.get_rank()))
    return {"state": model.state_dict(), "fused with the group": groups}


def everything_here() -> dict[str, Any]:
    works = (outcomes_here, exchanges_here, errors_here, compiled_here, network_here)
    return {work.__name__: work() for work in works}


@pytest.fixture(scope="module")
def processes(two_processes):
    return two_processes(everything_here)


def assert_close(mine, exact, tolerance, name):
    assert mine.shape == exact.shape, name
    worst = (mine.double() - exact.double()).abs().max()
    assert worst <= tolerance * exact.abs().max().clamp_min(1), f"{name}: {worst:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_computes_from_the_joint_batch(processes, name):
    case, parts = CASES[name], [process["outcomes_here"][name] for process in processes]
    whole = two_steps(case, slice(0, BATCH), exact=True)
    tolerance = TOLERANCE[case.dtype]
    # float16 gradients of either step and running statistics are rounded, added and rounded again
    of_vectors = 2 * tolerance if case.half_module else TOLERANCE[torch.promote_types(case.dtype, torch.float32)]
    for field in ("y", "inputs"):
        for *mine, exact in zip(*(getattr(part, field) for part in (*parts, whole)), strict=True):
            assert {part.dtype for part in mine} == {case.dtype}
            assert_close(torch.cat(mine), exact, tolerance, field)
    for first, second, exact in zip(parts[0].parameters, parts[1].parameters, whole.parameters, strict=True):
        assert_close(first.double() + second.double(), exact, of_vectors, "parameters")
    for first, second, exact in zip(parts[0].buffers, parts[1].buffers, whole.buffers, strict=True):
        assert torch.equal(first, second)
        assert_close(first, exact, of_vectors, "buffers")
    assert all(part.kept_layout for part in parts)


def test_only_channel_vectors_are_exchanged_and_only_where_they_are_needed(processes):
    forward, backward = ("all_gather", 2 * CHANNELS + 1), ("all_reduce", 2 * CHANNELS)
    for process in processes:
        sent = process["exchanges_here"]["sent"]
        assert sent.pop("training") == [forward, backward]
        assert sent.pop("frozen input") == [forward]
        assert len(sent) == 3 and not any(sent.values())


def test_without_an_exchange_it_is_batch_norm(processes):
    for process in processes:
        equal = process["exchanges_here"]["equal to BatchNorm"]
        assert {name for name, same in equal.items() if not same} == {"training", "frozen input"}


def test_errors(processes):
    one_value = "ValueError: Expected more than 1 value per channel when training, got input size torch.Size([{}, 3])"
    for rank, process in enumerate(processes):
        errors = process["errors_here"]
        assert errors["one value"] == one_value.format(1 - rank)
        assert errors["one value each"] == errors["no values"] == "none"
        assert errors["running statistics without values"] == "kept"
        assert errors["channels"] == "ValueError: SyncBatchNorm: input must be [B, C=3, ...], got float32 [2, 4]"
        assert errors["no channels"].startswith("ValueError: SyncBatchNorm number of input channels should be non-zero")
        assert errors["dimensions"] == "ValueError: expected at least 2D input (got 1D input)"
        assert errors["integers"] == "TypeError: SyncBatchNorm: input must be floating, got int64 [2, 3]"
        assert errors["another device"].startswith("ValueError: SyncBatchNorm expected input tensor to be on GPU")
        assert errors["second derivative"].startswith("RuntimeError: SyncBatchNorm: it can be differentiated once only")


def test_one_value_raises_as_in_torch_without_other_processes():
    message = r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3\]\)"
    for norm in (nn.BatchNorm1d(3), SyncBatchNorm(3)):
        with pytest.raises(ValueError, match=message):
            norm(torch.zeros(1, 3))


def test_arguments_are_those_of_torch():
    arguments = (3, 1e-3, None, True, False, None, "meta", torch.float64)
    for options in ({}, {"bias": False}):
        ours, theirs = SyncBatchNorm(*arguments, **options), nn.SyncBatchNorm(*arguments, **options)
        assert repr(ours) == repr(theirs)
        assert (ours.weight.dtype, ours.weight.device) == (theirs.weight.dtype, theirs.weight.device)
        assert ours(torch.empty(2, 3, dtype=torch.float64, device="meta")).shape == (2, 3)


def test_compiled_modules_synchronise_too(processes):
    for process in processes:
        eager, compiled = process["compiled_here"]
        assert torch.equal(eager, compiled)


def test_a_parallel_network_trains_as_one_process_with_the_joint_batch(processes):
    model = network()
    train(model, slice(0, BATCH))
    for process in processes:
        state = process["network_here"]["state"]
        assert [*state] == [*model.state_dict()]
        for name, exact in model.state_dict().items():
            torch.testing.assert_close(state[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(model.conv1.weight, network().conv1.weight)


def test_a_converted_network_keeps_its_fused_operators(processes):
    for process in processes:
        assert process["network_here"]["fused with the group"] == [(True, True)] * 3
    norm = SyncBatchNorm(3)
    assert is_batch_norm(norm) and process_group_of(norm) is None
    norm.register_forward_hook(lambda *_: None)
    assert not is_batch_norm(norm)


# ---- conversion


def test_conversion_keeps_tensors_flags_and_names():
    model = nn.Sequential(
        nn.BatchNorm1d(3, eps=0.5, momentum=None),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False).eval(), nn.BatchNorm3d(3)),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.SyncBatchNorm(3),
        SyncBatchNorm(3),
    )
    model[1][2].weight.requires_grad_(False)
    model[1][2].bias = None
    own, old, before = model[4], dict(model.named_modules()), model.state_dict(keep_vars=True)
    assert convert_sync_batchnorm(model) is model
    after = model.state_dict(keep_vars=True)
    assert [*after] == [*before] and all(after[name] is before[name] for name in before)
    assert not model[1][2].weight.requires_grad and model[4] is own
    for name, module in model.named_modules():
        if isinstance(old[name], nn.modules.batchnorm._BatchNorm):
            assert type(module) is SyncBatchNorm
            for field in ("training", "eps", "momentum", "num_features", "affine", "track_running_stats"):
                assert getattr(module, field) == getattr(old[name], field), (name, field)
        else:
            assert module is old[name]


def test_conversion_of_the_root():
    norm = nn.BatchNorm2d(3)
    converted = convert_sync_batchnorm(norm)
    assert type(converted) is SyncBatchNorm and converted.weight is norm.weight
    assert convert_sync_batchnorm(converted) is converted


def test_conversion_keeps_one_module_in_two_places_one_module():
    norm = nn.BatchNorm1d(3)
    converted = convert_sync_batchnorm(nn.ModuleList([norm, norm, nn.ModuleList([norm])]))
    assert type(converted[0]) is SyncBatchNorm and converted[0] is converted[1] is converted[2][0]


def test_conversion_sets_the_group():
    given, old = object(), object()
    assert convert_sync_batchnorm(nn.BatchNorm1d(3)).process_group is None
    assert convert_sync_batchnorm(nn.BatchNorm1d(3), given).process_group is given
    assert convert_sync_batchnorm(nn.SyncBatchNorm(3, process_group=old)).process_group is old
    assert convert_sync_batchnorm(nn.SyncBatchNorm(3, process_group=old), given).process_group is given


def test_pickles_copies_and_state_dicts():
    norm = convert_sync_batchnorm(module_of(Case()))
    norm(torch.randn(4, CHANNELS, 2, 2, dtype=torch.float64))
    for twin in (pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm), SyncBatchNorm(CHANNELS).double()):
        assert type(twin) is SyncBatchNorm
        twin.load_state_dict(norm.state_dict())
        assert all(torch.equal(value, norm.state_dict()[name]) for name, value in twin.state_dict().items())
    plain = nn.BatchNorm2d(CHANNELS, norm.eps).double()
    plain.load_state_dict(norm.state_dict())
    assert [*plain.state_dict()] == [*norm.state_dict()]
    x = torch.randn(4, CHANNELS, 2, 2, dtype=torch.float64)
    assert torch.equal(plain(x), norm(x)) and torch.equal(plain.eval()(x), norm.eval()(x))


def test_arguments_of_a_norm():
    norm, deep, shallow = torch.nn.BatchNorm2d(4), torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    expected = (deep * torch.nn.functional.batch_norm(shallow, None, None, training=True)).mean((2, 3))
    pooled = ops.dkf_bn_pool(deep, shallow, **arguments_of(norm)._asdict())
    torch.testing.assert_close(pooled, expected)
    assert norm.num_batches_tracked == 1 and (norm.running_mean != 0).all()
    with pytest.raises(TypeError, match=r"^arguments_of: norm must be a BatchNorm2d or SyncBatchNorm, got LayerNorm$"):
        arguments_of(torch.nn.LayerNorm(4))
