"""The benchmarks' peers of the losses compute what the methods compute."""

import importlib.util
from pathlib import Path

import pytest
import torch

from shike_fast import methods, ops

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EXPERTS, ROWS, CLASSES = 3, 16, 20
COUNTS = torch.logspace(2.7, 0.7, CLASSES).long()[torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))]


@pytest.fixture(scope="module")
def peer_losses():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # it imports what is beside it
        specification = importlib.util.spec_from_file_location("peer_losses", BENCHMARKS / "peer_losses.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        yield module


def inputs(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(EXPERTS, ROWS, CLASSES, dtype=torch.float64, generator=generator)
    target = torch.randint(CLASSES, (ROWS // 4,), generator=generator).repeat(4)  # as of four views, or of two
    easy = torch.rand(EXPERTS, ROWS, generator=generator) < 0.5
    logits.scatter_add_(2, target.expand(EXPERTS, -1).unsqueeze(2), 2.0 * scale * easy.double().unsqueeze(2))
    return logits, target


def ours(name, logits, target, **given):
    """Loss and gradient of a method in the last epoch of its first stage; los in its second one."""
    method = methods.create_method(name, class_counts=COUNTS, num_experts=EXPERTS)
    z = logits.clone().requires_grad_()
    with ops.use_backend("reference"):
        loss, _ = method.loss(z, target, epoch=method.phase(method.epochs - 1), **given)
    return loss.detach(), *torch.autograd.grad(loss, z)


def theirs(module, logits, target, **given):
    experts = [z.clone().requires_grad_() for z in logits]
    loss = module(experts, target, **given)
    return loss.detach(), torch.stack(torch.autograd.grad(loss, experts))


def assert_same(one, other):
    for value, expected in zip(one, other, strict=True):
        assert (value - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_every_method_has_a_peer(peer_losses):
    assert set(peer_losses.PEERS) == set(methods.list_methods())


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", methods.list_methods())
def test_a_peer_is_its_method(peer_losses, name, scale):
    logits, target = inputs(int(scale), scale / 30 if name == "ldam-drw" else scale)
    expected = ours(name, logits, target)
    assert expected[1].abs().max() > 0
    module = peer_losses.PEERS[name](COUNTS.double(), EXPERTS)
    assert_same(theirs(module, logits, target), expected)


def test_two_labels_of_a_mixed_image(peer_losses):
    logits, target = inputs(3, 2.0)
    mixed = {"target_b": target.flip(0), "lam": torch.tensor(0.3, dtype=torch.float64)}
    module = peer_losses.PEERS["balpoe"](COUNTS.double(), EXPERTS)
    assert_same(theirs(module, logits, target, **mixed), ours("balpoe", logits, target, **mixed))


def test_peers_in_single_precision(peer_losses):
    """As they are timed: nothing is computed in float64."""
    logits, target = inputs(4, 2.0)
    for name, make in peer_losses.PEERS.items():
        loss, gradient = theirs(make(COUNTS.double(), EXPERTS).float(), logits.float(), target)
        assert (loss.dtype, gradient.dtype) == (torch.float32, torch.float32), name


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.list_methods())
def test_a_peer_compiles_as_one_graph(peer_losses, name):
    """So that torch.compile, which it is timed under, has all of it."""
    logits, target = inputs(5, 0.1)
    torch._dynamo.reset()
    make = peer_losses.PEERS[name]
    compiled = torch.compile(make(COUNTS.double(), EXPERTS), backend="eager", fullgraph=True)
    assert_same(theirs(compiled, logits, target), theirs(make(COUNTS.double(), EXPERTS), logits, target))
