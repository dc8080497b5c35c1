"""The fused optimizers: which package is which, and the learning rate on the device."""

import sys
import types

import pytest
import torch

from shike_fast.engine.optimizer import load_optimizer_state, make_optimizer, optimizer_state, require_apex, set_lr
from shike_fast.errors import ConfigError

GPU = torch.device("cuda")


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
def test_apex_is_sgd():
    pytest.importorskip("amp_C", reason="needs NVIDIA Apex with its CUDA extensions")
    results = []
    for name in ("sgd", "apex"):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(40, 30, device="cuda")) for _ in range(3)]
        optimizer = make_optimizer(name, parameters, momentum=0.9, weight_decay=1e-2)
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
