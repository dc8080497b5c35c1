"""The fused optimizers: which package is which, Nesterov's momentum, learning rates by group and on the device."""

import sys
import types

import pytest
import torch

from shike_fast import methods, models, ops
from shike_fast.engine.config import resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.optimizer import load_optimizer_state, make_optimizer, optimizer_state, require_apex, set_lr
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals
from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage, registry

GPU = torch.device("cuda")
ONE = Stage("one")


@pytest.fixture
def packages(monkeypatch):
    """``packages(name=module_or_None)``: what importing these names finds; None: not installed."""

    def install(**modules):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name.replace("__", "."), module)

    return install


def module(name, **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


def test_apex_needs_a_gpu():
    with pytest.raises(ConfigError, match="--optimizer: apex needs a GPU, this run is on cpu; use --optimizer sgd"):
        make_optimizer("apex", [torch.nn.Parameter(torch.zeros(2))], momentum=0.9, weight_decay=0.0)


def test_apex_is_not_installed(packages):
    packages(apex=None)
    with pytest.raises(ConfigError, match=r"NVIDIA Apex is not installed; build it from github\.com/NVIDIA/apex"):
        require_apex(GPU)


def test_the_other_package_called_apex_is_refused_by_name(packages):
    packages(apex=module("apex"), apex__optimizers=None)
    with pytest.raises(ConfigError, match="is not NVIDIA Apex but the unrelated PyPI package of that name; pip uninst"):
        require_apex(GPU)


def test_apex_without_its_extensions(packages):
    packages(apex=module("apex"), apex__optimizers=module("apex.optimizers", FusedSGD=object), amp_C=None)
    with pytest.raises(ConfigError, match=r"built without its CUDA extensions \(amp_C\)"):
        require_apex(GPU)


def test_apex_whole(packages):
    packages(apex=module("apex"), apex__optimizers=module("apex.optimizers", FusedSGD=object), amp_C=module("amp_C"))
    require_apex(GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"nesterov": True, "lr_factors": [1.0, 0.5, 1.0]}])
def test_apex_is_sgd(options):
    pytest.importorskip("amp_C", reason="needs NVIDIA Apex with its CUDA extensions")
    results = []
    for name in ("sgd", "apex"):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(40, 30, device="cuda")) for _ in range(3)]
        optimizer = make_optimizer(name, parameters, momentum=0.9, weight_decay=1e-2, **options)
        set_lr(optimizer, 0.1)
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = parameter.detach() ** 2
            optimizer.step()
        results.append(torch.stack([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(*results)


def test_a_learning_rate_on_the_device_is_changed_in_place():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer("sgd", [parameter], momentum=0.9, weight_decay=0.0, changeable_lr=True)
    rate = optimizer.param_groups[0]["lr"]
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((3,), 0.75))
    saved = optimizer_state(optimizer)
    assert saved["param_groups"][0]["lr"] == 0.25
    load_optimizer_state(optimizer, saved)
    kept = optimizer.param_groups[0]["lr"]
    assert isinstance(kept, torch.Tensor)
    plain = make_optimizer("sgd", [parameter], momentum=0.9, weight_decay=0.0)
    load_optimizer_state(plain, saved)
    assert plain.param_groups[0]["lr"] == 0.0
    assert torch.equal(plain.state[parameter]["momentum_buffer"], torch.ones(3))


def test_without_momentum_there_is_no_velocity():
    optimizer = make_optimizer("sgd", [torch.nn.Parameter(torch.ones(3))], momentum=0.0, weight_decay=0.0)
    assert not optimizer.state


def parameters_and_gradients(steps=4):
    torch.manual_seed(0)
    shapes = ((4, 3), (5,), (2, 2))
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return start, [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(steps)]


def after_steps(optimizer, parameters, gradients):
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("changeable_lr", [False, True])
def test_a_velocity_of_zeros_is_the_plain_beginning(nesterov, changeable_lr):
    start, gradients = parameters_and_gradients()
    options = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
    mine, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizer = make_optimizer("sgd", mine, changeable_lr=changeable_lr, **options)
    set_lr(optimizer, 0.125)  # exact in float32, in which a rate on the device is kept
    found = after_steps(optimizer, mine, gradients)
    plain = torch.optim.SGD(theirs, lr=0.125, foreach=False, **options)
    for value, expected in zip(found, after_steps(plain, theirs, gradients), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)


def test_nesterov_is_another_step():
    start, gradients = parameters_and_gradients(1)
    moved = []
    for nesterov in (False, True):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = make_optimizer("sgd", parameters, momentum=0.5, weight_decay=0.0, nesterov=nesterov)
        set_lr(optimizer, 1.0)
        moved.append([a - b for a, b in zip(start, after_steps(optimizer, parameters, gradients), strict=True)])
    for plain, ahead in zip(*moved, strict=True):
        torch.testing.assert_close(ahead, 1.5 * plain)


@pytest.mark.parametrize("changeable_lr", [False, True])
def test_groups_have_their_learning_rates(changeable_lr):
    start, gradients = parameters_and_gradients()
    mine, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    options = {"momentum": 0.9, "weight_decay": 1e-2}
    optimizer = make_optimizer("sgd", mine, lr_factors=[0.25, 1.0, 0.25], changeable_lr=changeable_lr, **options)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    rates = [group["lr"] for group in optimizer.param_groups]
    set_lr(optimizer, 0.5)
    if changeable_lr:
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.5]
    plain = torch.optim.SGD(
        [{"params": [theirs[0], theirs[2]], "lr": 0.125}, {"params": [theirs[1]], "lr": 0.5}], foreach=False, **options
    )
    expected = after_steps(plain, theirs, gradients)
    for value, other in zip(after_steps(optimizer, mine, gradients), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-13, atol=1e-15)

    saved = optimizer_state(optimizer)
    again = make_optimizer("sgd", mine, lr_factors=[0.25, 1.0, 0.25], changeable_lr=not changeable_lr, **options)
    load_optimizer_state(again, saved)
    set_lr(again, 1.0)
    assert [float(group["lr"]) for group in again.param_groups] == [0.25, 1.0]
    for parameter in mine:
        assert torch.equal(again.state[parameter]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])
    with pytest.raises(ValueError, match="shorter"):  # a run whose groups are others
        load_optimizer_state(make_optimizer("sgd", mine, **options), saved)


def test_a_state_of_one_group_without_factors_still_loads():
    """As versions before wrote it."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer("sgd", [parameter], momentum=0.9, weight_decay=0.0)
    saved = optimizer_state(optimizer)
    saved["param_groups"] = [{name: saved["param_groups"][0][name] for name in ("lr", "momentum", "params")}]
    saved["state"][0]["momentum_buffer"] = torch.full((3,), 2.0)
    load_optimizer_state(optimizer, saved)
    set_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5 and not optimizer.param_groups[0]["nesterov"]
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.full((3,), 2.0))


def test_nesterov_needs_momentum():
    with pytest.raises(ConfigError, match="--nesterov: there is no momentum to look ahead with; set --momentum"):
        resolve({"nesterov": True, "momentum": 0.0})
    assert resolve({"nesterov": True}).nesterov


@pytest.fixture
def steps_of(monkeypatch):
    """``steps_of(stages, stage, **content, settings)``: the steps of a stage of a method that only this test knows."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def make(stages=(ONE,), stage=1, settings=None, **content):
        def loss(self, logits, target, *, stage=None, epoch=0, **inputs):
            return ops.expert_cross_entropy(logits, target), {}

        usual = {"name": "own", "summary": "a test", "stages": stages, "loss": loss}
        registry._METHODS.pop("own", None)
        methods.register_method(type("Own", (Method,), usual | content))
        config = resolve({"method": "own", "model": "resnet8", "num_experts": 2, "epochs": 2} | (settings or {}))
        model = models.create_model("resnet8", num_classes=5, num_experts=2)
        steps = StageSteps(
            model,
            config,
            stage,
            class_counts=torch.arange(1, 6),
            processes=Processes(),
            totals=Totals(torch.device("cpu")),
        )
        set_lr(steps.optimizer, 0.5)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return steps, {
            names[id(parameter)]: group for group in steps.optimizer.param_groups for parameter in group["params"]
        }

    return make


def test_the_trunk_has_a_learning_rate(steps_of):
    _, groups = steps_of(settings={"lr": 0.1, "trunk_lr": 0.01})
    assert {name for name, group in groups.items() if group["lr"] == 0.5} == {"classifiers.weight"}
    assert {round(group["lr"], 12) for name, group in groups.items() if name != "classifiers.weight"} == {0.05}
    steps, groups = steps_of()
    assert len(steps.optimizer.param_groups) == 1 and groups["conv1.weight"]["lr"] == 0.5


def test_a_method_has_learning_rates_by_name_and_stage(steps_of):
    def lr_factor(self, name, stage):
        return 0.0 if name.startswith("conv1") else 2.0 if stage.name == "two" else 1.0

    stages = (
        Stage("one", weight_decay=0.25),
        Stage("two", epochs=0.5, weight_decay="stage2_lr"),
        Stage("x", epochs=0.0),
    )
    settings = {"trunk_lr": 0.05, "lr": 0.1, "stage2_lr": 0.3, "weight_decay": 0.125}
    steps, groups = steps_of(stages, lr_factor=lr_factor, settings=settings)
    assert (groups["conv1.weight"]["lr"], groups["bn1.weight"]["lr"]) == (0.0, 0.25)
    assert groups["classifiers.weight"]["lr"] == 0.5 and {group["weight_decay"] for group in groups.values()} == {0.25}
    before = {name: value.clone() for name, value in steps.model.state_dict().items()}
    steps(torch.randn(8, 3, 16, 16), torch.randint(5, (8,)))
    after = steps.model.state_dict()
    assert torch.equal(after["conv1.weight"], before["conv1.weight"])
    assert not torch.equal(after["bn1.weight"], before["bn1.weight"])

    _, groups = steps_of(stages, 2, lr_factor=lr_factor, settings=settings)
    assert (groups["bn1.weight"]["lr"], groups["classifiers.weight"]["lr"]) == (0.5, 1.0)
    assert {group["weight_decay"] for group in groups.values()} == {0.3}
    _, groups = steps_of(stages, 3, settings=settings)
    assert {group["weight_decay"] for group in groups.values()} == {0.125}


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
def test_a_factor_that_is_none(steps_of, factor):
    with pytest.raises(ConfigError, match=r"method 'own': lr_factor of conv1\.weight must be at least 0, got"):
        steps_of(lr_factor=lambda self, name, stage: factor)


def test_a_network_that_does_not_know_its_classifiers(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(models.MultiExpertNetwork, "classifier_parameters")
    assert runs.train(*runs.small, "--trunk-lr", 0.01, "--output-dir", tmp_path / "run") == 2
    assert "error: --trunk-lr: resnet8 does not say which parameters are its classifiers'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
