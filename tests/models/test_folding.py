"""The end of each expert's last block, left to the fusion: the same network, whoever watches or replaces its parts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shike_fast import models, ops
from shike_fast.nn import DepthwiseKnowledgeFusion

BOTTLENECK = {"blocks": (1, 1, 2), "width": 4, "large_stem": False, "num_classes": 5}
NETWORKS = {
    "resnet8": lambda: models.create_model("resnet8", num_classes=5),
    "resnet20": lambda: models.create_model("resnet20", num_classes=5, num_experts=2),
    "bottleneck": lambda: models.MultiExpertResNet(models.Bottleneck, **BOTTLENECK),
    "large stem": lambda: models.MultiExpertResNet(models.BasicBlock, **BOTTLENECK | {"large_stem": True}),
}


def network(name="resnet8"):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model


def some_images():
    return torch.randn(4, 3, 20, 16, dtype=torch.float64)


def composed(model, images):
    """The features from plain modules, each called as a module."""
    x, shallow = model.maxpool(F.relu(model.bn1(model.conv1(images)))), []
    for i in range(model.num_shared):
        x = getattr(model, f"layer{i + 1}")(x)
        shallow.append(x)
    features = []
    for k, (expert, fusion) in enumerate(zip(model.experts, model.fusions, strict=True)):
        chain = shallow[k % model.num_shared]
        for i, (conv, norm) in enumerate(zip(fusion.convs, fusion.norms, strict=True)):
            chain = norm(conv(chain)) if i == 1 else F.relu(norm(conv(chain)))
        features.append((expert(x) * chain).mean((2, 3)))
    return torch.stack(features)


def steps(model, run, training):
    """Features, logits and gradients of two steps, and the buffers after them."""
    torch.manual_seed(1)
    results = []
    for _ in range(2):
        model.zero_grad()
        features = run(some_images())
        logits = model.classify(features)
        results += [features, logits]
        if training:
            (features.square().sum() + logits.square().sum()).backward()
            results += [p.grad for p in model.parameters() if p.grad is not None]
    return [*results, *model.buffers()]


def assert_same_network(model, reference, training=True):
    mine = steps(model, model.features, training)
    theirs = steps(reference, lambda images: composed(reference, images), training)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.fixture
def operator_calls(monkeypatch):
    """The names and options of all calls of the fusion's operators."""
    calls = []

    def record(name, operator):
        monkeypatch.setattr(
            ops, name, lambda *args, **options: calls.append((name, options)) or operator(*args, **options)
        )

    for name in ("dkf_experts", "dkf_bn_pool", "dkf_pool"):
        record(name, getattr(ops, name))
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_call_ends_all_experts(operator_calls, name, training):
    model = network(name).train(training)
    model(some_images())
    [(operator, options)] = operator_calls
    assert operator == "dkf_experts"
    assert len(options["shortcut"]) == len(options["deep_norms"]) == model.num_experts


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_equals_its_modules(name, training):
    model = network(name).train(training)
    assert_same_network(model, copy.deepcopy(model), training)


WATCHED = [
    "experts.1",
    "experts.1.0",
    "experts.1.0.conv2",
    "experts.1.0.bn2",
    "experts.0.0.downsample",
    "fusions.0",
    "fusions.0.convs.1",
    "fusions.0.norms.1",
]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("watched", WATCHED)
def test_hooks_are_called_and_change_nothing(watched, kind):
    model, reference = network(), network()
    calls = []
    getattr(model.get_submodule(watched), f"register_{kind}_hook")(lambda *_: calls.append(kind))
    assert_same_network(model, reference)
    assert calls == [kind, kind]


@pytest.mark.parametrize("watched", [name for name in WATCHED if name != "fusions.0"])
def test_hooks_may_change_what_they_see(watched):
    model, reference = network(), network()
    for one in (model, reference):
        one.get_submodule(watched).register_forward_hook(lambda *args: args[-1] + 1)
    assert_same_network(model, reference)


@pytest.mark.parametrize("watched", WATCHED)
def test_networks_fold_again_without_the_hook(operator_calls, watched):
    model = network()
    model.get_submodule(watched).register_forward_hook(lambda *_: None).remove()
    model(some_images())
    assert [options["shortcut"] is not None for _, options in operator_calls] == [True]


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class ShiftedBlock(models.BasicBlock):
    def forward(self, x):
        return super().forward(x) + 1


class ShiftedStage(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


class ShiftedFusion(DepthwiseKnowledgeFusion):
    def forward(self, shallow, deep):
        return super().forward(shallow, deep) + 1


def replace(model, name, module):
    parent, _, member = name.rpartition(".")
    setattr(model.get_submodule(parent), member, module.double())


REPLACEMENTS = {
    "identity": ("experts.1.0.bn2", nn.Identity),
    "group norm": ("experts.1.0.bn2", lambda: nn.GroupNorm(4, 64)),
    "own batch norm": ("experts.1.0.bn2", lambda: ShiftedNorm(64)),
    "own batch norm in the fusion": ("fusions.0.norms.1", lambda: ShiftedNorm(64)),
    "group norm in the fusion": ("fusions.0.norms.1", lambda: nn.GroupNorm(4, 64)),
    "own block": ("experts.1.0", lambda: ShiftedBlock(32, 64, 2)),
    "other block": ("experts.1.0", lambda: nn.Conv2d(32, 64, 3, stride=2, padding=1)),
    "own stage": ("experts.1", lambda: ShiftedStage(models.BasicBlock(32, 64, 2))),
    "other stage": ("experts.1", lambda: nn.Conv2d(32, 64, 3, stride=2, padding=1)),
    "bottleneck": ("experts.1.0", lambda: models.Bottleneck(32, 16, 2)),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_replaced_modules_are_called(replacement):
    model = network()
    name, module = REPLACEMENTS[replacement]
    replace(model, name, module())
    assert_same_network(model, copy.deepcopy(model))


def own_class(model):
    fusion = ShiftedFusion(16, 64, 2).double()
    fusion.load_state_dict(model.fusions[2].state_dict())
    model.fusions[2] = fusion.train(model.training)


def own_object(model):
    model.fusions[2].forward = lambda *maps, fusion=model.fusions[2]: type(fusion).forward(fusion, *maps) + 1


def own_hook(model):
    model.fusions[2].register_forward_hook(lambda *args: args[-1] + 1)


@pytest.mark.parametrize("change", [own_class, own_object, own_hook])
def test_what_a_fusion_gives_can_be_changed(change):
    model, images = network().eval(), some_images()
    expected = model.features(images) + torch.tensor([0.0, 0.0, 1.0])[:, None, None]
    change(model)
    torch.testing.assert_close(model.features(images), expected)


@pytest.mark.parametrize("name", ["experts.1", "experts.1.0", "experts.1.0.bn2", "fusions.0.norms.1"])
def test_a_forward_of_one_object_is_called(name):
    model = network()
    for one in (model, reference := copy.deepcopy(model)):
        module = one.get_submodule(name)
        module.forward = lambda x, module=module: type(module).forward(module, x) + 1
    assert_same_network(model, reference)


def average(norm):
    norm.momentum = None


def stop_tracking(norm):
    norm.track_running_stats = False


def freeze(norm):
    norm.eval()


@pytest.mark.parametrize("experts", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("change", [average, stop_tracking, freeze])
def test_last_norms_behave_as_batch_norm(change, experts):
    model = network()
    for k in experts:
        change(model.experts[k][-1].last_norm)
    reference = copy.deepcopy(model)
    assert_same_network(model, reference)
    for one in (model, reference):
        one.experts[0].eval()
        one.fusions[2].eval()
    assert_same_network(model, reference)
    assert_same_network(model.eval(), reference.eval(), training=False)
    tracked = [int(expert[-1].bn2.num_batches_tracked) for expert in model.experts]
    still = change is not average
    assert tracked == [0 if still and k in experts else 2 if k == 0 else 4 for k in range(3)]


@pytest.mark.parametrize("training", [True, False])
def test_last_norms_without_statistics_use_those_of_the_batch(training):
    model = network()
    for expert in model.experts:
        expert[-1].bn2 = nn.BatchNorm2d(64, track_running_stats=False).double()
    model.train(training)
    assert_same_network(model, copy.deepcopy(model), training)


def test_folding_changes_no_names():
    model, watched = network(), network()
    watched.experts[0].register_forward_hook(lambda *_: None)
    names = list(model.state_dict())
    for one in (model, watched):
        one(some_images())
        assert list(one.state_dict()) == names
    last = [name for name in names if name.startswith("experts.0.0.bn2.")]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert last == [f"experts.0.0.bn2.{part}" for part in parts]
