"""Activation checkpointing: the same steps bit for bit, statistics that see a batch once, and less that is stored."""

import copy

import pytest
import torch
from torch import nn

from shike_fast import models
from shike_fast.models import recompute
from shike_fast.nn import convert_sync_batchnorm

SMALL = {"width": 4, "num_classes": 5}
NETWORKS = {
    "resnet8": lambda: models.create_model("resnet8", num_classes=5),
    "resnet50": lambda: models.MultiExpertResNet(models.Bottleneck, (3, 4, 6, 3), large_stem=True, **SMALL),
    "tiny": lambda: models.MultiExpertResNet(models.BasicBlock, (1, 1), large_stem=False, num_experts=1, **SMALL),
    "without fusion": lambda: models.MultiExpertResNet(
        models.BasicBlock, (1, 2, 2), large_stem=False, fusion=False, classifier="linear", **SMALL
    ),
    "two stages each": lambda: models.create_model("resnet8", num_classes=5, expert_stages=2, shortcut="pad"),
    "whole networks": lambda: models.create_model(
        "resnet8", num_classes=5, expert_stages="all", fusion=False, num_experts=2
    ),
}


def average(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def stop_some(model):
    model.layer1.eval()
    model.experts[0].eval()


def watch(model):
    model.layer2.register_forward_hook(lambda *args: args[-1] + 1)
    model.experts[1].register_full_backward_hook(lambda *_: None)


def watch_a_fusion(model):
    model.fusions[0].register_forward_hook(lambda *args: args[-1] + 1)


class Replaced(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def replace(model):
    model.layer2 = Replaced(*model.layer2)
    model.experts[1] = Replaced(*model.experts[1])


def drop(model):
    model.layer1[0].conv1 = nn.Sequential(model.layer1[0].conv1, nn.Dropout(0.5))
    model.experts[0][-1].conv1 = nn.Sequential(model.experts[0][-1].conv1, nn.Dropout(0.5))


CHANGES = {
    "as it is": lambda model: None,
    "SyncBatchNorm": convert_sync_batchnorm,
    "PyTorch's SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "cumulative averages": average,
    "some norms in eval mode": stop_some,
    "hooks": watch,
    "a hook on a fusion": watch_a_fusion,
    "replaced stages": replace,
    "dropout": drop,
}


def network(name="resnet8", change="as it is", stage=1):
    torch.manual_seed(0)
    model = NETWORKS[name]().train()
    CHANGES[change](model)
    if stage == 2:
        model.requires_grad_(False)
        for parameter in model.stage2_parameters():
            parameter.requires_grad_(True)
    return model


def some_images():
    return torch.randn(4, 3, 36, 33)


def two_steps(model, stage=1, amp=False):
    """Losses, gradients and buffers of two steps."""
    torch.manual_seed(1)
    results = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = model(some_images().to(next(model.parameters()).dtype), stage).square().sum()
        loss.backward()
        results += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        results += [buffer.clone() for buffer in model.buffers()]
    return results


def assert_same_bits(mine, theirs):
    assert len(mine) == len(theirs)
    assert all(map(torch.equal, mine, theirs))


def assert_changes_nothing(model, **settings):
    plain = two_steps(copy.deepcopy(model), **settings)
    model.checkpoint_activations = True
    assert_same_bits(two_steps(model, **settings), plain)


@pytest.fixture
def recomputations(monkeypatch):
    """What every checkpoint was told."""
    calls = []
    plain = recompute.checkpoint
    monkeypatch.setattr(
        recompute, "checkpoint", lambda *args, **options: calls.append(options) or plain(*args, **options)
    )
    return calls


def stored_bytes(model, stage=1):
    """Bytes that autograd keeps of a forward pass, parameters excepted; a checkpoint keeps its input."""
    stored = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        stored[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(some_images().to(next(model.parameters()).dtype), stage)
    assert logits.requires_grad
    return sum(t.nbytes for pointer, t in stored.items() if pointer not in parameters)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_steps_bit_for_bit(name, stage):
    assert_changes_nothing(network(name, stage=stage), stage=stage)


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "as it is"])
def test_the_same_steps_whatever_the_modules(change):
    assert_changes_nothing(network("resnet8", change))


def test_the_same_steps_under_autocast():
    assert_changes_nothing(network("resnet50"), amp=True)


def a_graph_break(model):
    """In a block, as SyncBatchNorm of several processes has it."""
    model.layer1[0].conv2.register_forward_hook(torch.compiler.disable(lambda *args: args[-1] + 0))


@pytest.mark.parametrize("change", [None, a_graph_break])
def test_the_same_steps_compiled(change):
    torch._dynamo.reset()
    model = network("tiny").double()
    if change is not None:
        change(model)
    plain = copy.deepcopy(model)
    model.checkpoint_activations = True
    model.compile(backend="aot_eager_decomp_partition", fullgraph=change is None, dynamic=False)
    torch.testing.assert_close(two_steps(model), two_steps(plain), rtol=1e-9, atol=1e-9)
    assert {int(buffer) for buffer in model.buffers() if buffer.dtype == torch.int64} == {2}
    assert stored_bytes(model) < 0.6 * stored_bytes(plain)


def test_two_backward_passes_through_one_graph():
    results = []
    for checkpointing in (False, True):
        model = network()
        model.checkpoint_activations = checkpointing
        torch.manual_seed(1)
        loss = model(some_images()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([*(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("name", "share"), [("resnet8", 0.6), ("resnet50", 0.5), ("two stages each", 0.6), ("whole networks", 0.6)]
)
def test_less_is_stored(name, share):
    model = network(name)
    before = stored_bytes(model)
    model.checkpoint_activations = True
    assert stored_bytes(model) < share * before


@pytest.mark.parametrize(
    ("name", "parts"),
    [("resnet50", 1 + 3 + 4 + 6 + 3 * 3), ("two stages each", 1 + 1 + 3 * 2), ("whole networks", 2 * (1 + 3))],
)
def test_every_block_and_the_stem_are_computed_again(recomputations, name, parts):
    model = network(name)
    model.checkpoint_activations = True
    model(some_images())
    assert len(recomputations) == parts
    # the states of generators take time to keep, and a recorded CUDA graph has none
    assert not any(options["preserve_rng_state"] for options in recomputations)


def test_random_numbers_are_drawn_again_where_there_are_some(recomputations):
    model = network("resnet8", "dropout")
    model.checkpoint_activations = True
    model(some_images())
    assert sum(options["preserve_rng_state"] for options in recomputations) == 2


def test_what_needs_no_gradient_is_not_computed_again(recomputations):
    model = network()
    model.checkpoint_activations = True
    with torch.no_grad():
        model(some_images())
    model.eval()(some_images())
    frozen = network(stage=2)
    frozen.checkpoint_activations = True
    frozen(some_images(), 2)
    assert recomputations == []
    model.train()
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    model(some_images())
    assert len(recomputations) == 1 + 3  # layer2 and the experts


def test_evaluation_stays_as_it_is():
    model = network().eval()
    images = some_images()
    expected, before = model(images), stored_bytes(model)
    model.checkpoint_activations = True
    assert torch.equal(model(images), expected)
    assert stored_bytes(model) == before


def test_checkpoints_are_interchangeable():
    model = models.create_model("resnet8", num_classes=5)
    assert model.checkpoint_activations is False
    names, description = list(model.state_dict()), dict(model.description)
    model.checkpoint_activations = True
    buffers = dict(model.named_buffers())
    two_steps(model)
    assert list(model.state_dict()) == names
    assert model.description == description
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    models.create_model(**model.description).load_state_dict(model.state_dict())


class Failure(Exception):
    pass


def test_a_failure_in_the_backward_pass_leaves_the_buffers_in_place():
    model = network()
    model.checkpoint_activations = True
    buffers = dict(model.named_buffers())
    loss = model(some_images()).sum()
    values = [buffer.clone() for buffer in model.buffers()]

    def fail(*_):
        raise Failure

    model.layer2[0].bn2.register_forward_hook(fail)
    with pytest.raises(Failure):
        loss.backward()
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert_same_bits([*model.buffers()], values)
