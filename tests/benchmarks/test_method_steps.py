"""The benchmark of the methods' steps: both contenders train one function, from the same weights to the same loss."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from shike_fast import methods, ops

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
FUSION = ("shike", "tcl")  # the network of test_peer.py


@pytest.fixture(scope="module")
def steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # it imports what is beside it
        specification = importlib.util.spec_from_file_location("bench_method_step", BENCHMARKS / "bench_method_step.py")
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, "bench_method_step", module)  # where its dataclass looks for itself
        specification.loader.exec_module(module)
        yield module


@pytest.fixture(autouse=True)
def _reference():
    with ops.use_backend("reference"):  # kernels are held by tests/ops
        yield


def published_names(state, linear):
    """The state of a network of this package under the names of its peer."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("rt_classifiers."):
            continue
        if key in ("classifiers.weight", "classifiers.bias"):
            of_expert = (w.T if linear and w.dim() == 2 else w for w in value)
            renamed |= {key.replace(".", f".{k}."): w for k, w in enumerate(of_expert)}
        else:
            renamed[key.replace(".downsample.", ".shortcut.")] = value
    return renamed


def take_weights(peer, ours):
    arguments = ours.steps.config.model_arguments()
    state = published_names(ours.network.state_dict(), arguments.get("classifier") == "linear")
    peer.network.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", [name for name in methods.list_methods() if name not in FUSION])
def test_both_train_one_function(steps, name, monkeypatch):
    monkeypatch.setattr(steps, "SIDE", 8)
    case = steps.Case(name, 4, "resnet8")
    ours, peer = steps.ShikeFast(case, CPU), steps.Peer(case, CPU)
    take_weights(peer, ours)
    if name == "balpoe":  # the shares of mixed images are drawn by either
        peer.mixup = 0.0
        ours.steps._mixing.draw = lambda *_: None
    for _ in range(2):  # the second one by the weights that the first has made
        ours.totals.track(ours.totals.terms)
        expected = float(peer())
        ours()
        loss = float(ours.totals.sums[0] / ours.totals.sums[2])
        assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [*FUSION, "balpoe"])
def test_both_learn(steps, name, monkeypatch):
    monkeypatch.setattr(steps, "SIDE", 8)
    case = steps.Case(name, 4, "resnet8")
    for contender in (steps.ShikeFast(case, CPU), steps.Peer(case, CPU)):
        before = [parameter.clone() for parameter in contender.network.parameters()]
        contender()
        after = list(contender.network.parameters())
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_every_method_has_a_case(steps):
    for device in ("cpu", "cuda"):
        for compiled in (False, True):
            cases = [case.method for case in steps.CASES[device] if case.compiled == compiled]
            assert cases == methods.list_methods()
