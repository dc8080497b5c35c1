"""``--ema``: the average itself, and that it is what is tested, saved, resumed, evaluated and used."""

import json

import pytest
import torch

from shike_fast import methods, models, ops
from shike_fast.engine.averaging import WeightAverage
from shike_fast.engine.config import resolve
from shike_fast.engine.inference import load_trained
from shike_fast.errors import ConfigError
from shike_fast.evaluate import main as evaluate
from shike_fast.methods import Method, Stage, registry
from shike_fast.predict import main as predict

RUN = ["--method", "ce", "--model", "resnet8", "--batch-size", 64, "--epochs", 2, "--ema", 0.95]
SETTINGS = {"device": "cpu", "threads": 1, "amp": None}


class Small(torch.nn.Module):
    """Parameters of two types, one of them frozen, and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(2)
        self.exact = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.frozen = torch.nn.Parameter(torch.tensor([0.1, 0.7]), requires_grad=False)


def test_it_is_the_textbook_s():
    torch.manual_seed(0)
    model = Small()
    average = WeightAverage(model, 0.6)
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    expected = model.exact.detach().clone()
    for t in range(20):
        with torch.no_grad():
            model.exact.copy_(torch.randn(3, dtype=torch.float64))
            model.norm.running_mean += 1
            model.norm.num_batches_tracked += 1
        average.update()
        decay = min(0.6, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * model.exact.detach()
        torch.testing.assert_close(average.network.exact.data, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(average.network.frozen, model.frozen)
    assert average.network.norm.running_mean.tolist() == [20.0, 20.0] and average.network.norm.num_batches_tracked == 20
    assert int(average.steps) == 20
    average.restart()
    average.update()
    torch.testing.assert_close(average.network.exact.data, 0.1 * expected + 0.9 * model.exact.data)


def test_a_network_without_buffers():
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, 0.0)
    with torch.no_grad():
        model.weight.zero_()
    average.update()  # a decay of 0 forgets all
    assert not average.network.weight.any()


@pytest.mark.gpu
def test_it_can_be_captured():
    model = torch.nn.BatchNorm2d(4).cuda()
    average, again = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    average.update()
    again.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        average.update()
    for k in range(4):
        with torch.no_grad():
            model.weight.fill_(float(k))
            model.running_mean.fill_(float(k))
        graph.replay()
        again.update()
    assert int(average.steps) == int(again.steps) == 5
    assert torch.equal(average.network.weight, again.network.weight) and average.network.running_mean[0] == 3


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decays_that_are_refused(decay):
    with pytest.raises(ConfigError, match=r"--ema: must be in \[0, 1\), got"):
        resolve({"ema": decay})


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    from shike_fast.train import main

    directory = tmp_path_factory.mktemp("averaged") / "run"
    assert main([*map(str, RUN), "--output-dir", str(directory)]) == 0
    return directory


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_it_is_what_is_tested_and_saved(runs, averaged, capsys, tmp_path, name):
    state = runs.checkpoint(averaged / name)
    average = state["average"]["model"]
    different = [key for key, value in state["model"].items() if not torch.equal(average[key], value)]
    assert "conv1.weight" in different and "bn1.running_mean" not in different
    assert state["average"]["steps"] == 6 * state["epoch"]
    trained = load_trained(averaged / name, None, SETTINGS)
    assert all(torch.equal(value, average[key]) for key, value in trained.network.state_dict().items())
    arguments = ["--checkpoint", str(averaged / name), "--csv", str(tmp_path / "table.csv"), "--json"]
    assert evaluate(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["top1"] == runs.metrics(averaged)[state["epoch"] - 1]["top1"]


def test_the_weights_train_as_without_it(runs, averaged, tmp_path):
    assert runs.train(*RUN[:-2], "--output-dir", tmp_path / "plain") == 0
    weights, expected = (runs.checkpoint(folder / "last.pt")["model"] for folder in (averaged, tmp_path / "plain"))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    plain, ours = (runs.metrics(directory) for directory in (tmp_path / "plain", averaged))
    assert [row["train_loss"] for row in plain] == [row["train_loss"] for row in ours]
    assert [row["top1"] for row in plain] != [row["top1"] for row in ours]
    assert "average" not in runs.checkpoint(tmp_path / "plain" / "last.pt")


@pytest.mark.parametrize("damage", [None, {"model": {}}, {"steps": 3}])
def test_a_checkpoint_that_lacks_it(runs, averaged, tmp_path, capsys, damage):
    state = runs.checkpoint(averaged / "last.previous.pt")
    del state["average"]
    torch.save(state | ({} if damage is None else {"average": damage}), tmp_path / "last.pt")
    for again in (
        lambda: evaluate(["--checkpoint", str(tmp_path / "last.pt")]),
        lambda: runs.train("--resume", tmp_path / "last.pt", "--output-dir", tmp_path / "x"),
    ):
        assert again() == 2
        error = capsys.readouterr().err
        assert "lacks the average of the weights that --ema keeps" in error and error.count("\n") == 1


def test_an_average_of_another_model(runs, averaged, tmp_path, capsys):
    state = runs.checkpoint(averaged / "last.previous.pt")
    del state["average"]["model"]["conv1.weight"]
    torch.save(state, tmp_path / "last.pt")
    assert runs.train("--resume", tmp_path / "last.pt", "--output-dir", tmp_path / "x") == 2
    assert "do not fit its model" in capsys.readouterr().err


def test_predictions_are_those_of_the_average(runs, averaged, image_dir, tmp_path):
    """A checkpoint without ``--ema`` whose weights are the average predicts the same."""
    state = runs.checkpoint(averaged / "last.pt")
    state["model"] = state.pop("average")["model"]
    state["config"]["ema"] = 0.0
    torch.save(state, tmp_path / "plain.pt")
    tables = []
    for source in (averaged / "last.pt", tmp_path / "plain.pt"):
        output = tmp_path / f"{source.stem}.csv"
        arguments = ["--checkpoint", source, "--images", image_dir / "val", "--output", output, "--workers", 0]
        assert predict([str(argument) for argument in arguments]) == 0
        tables.append(output.read_text())
    assert tables[0] == tables[1]


@pytest.fixture
def own_methods(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


class Doubled(torch.nn.Module):
    """A network that a method derives from the one that it gets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, stage=1):
        return 2 * self.model(images, stage=stage)


@pytest.mark.usefixtures("own_methods")
def test_a_method_s_network_is_made_of_the_average(runs, averaged, tmp_path):
    @methods.register_method
    class Own(Method):
        name = "own"
        summary = "ce, tested by a separate network"
        stages = (Stage("training"),)
        experts = 1

        @classmethod
        def model_options(cls, settings):
            return {"fusion": False, "classifier": "linear"}

        def loss(self, logits, target, *, stage=None, epoch=0, **inputs):
            return ops.expert_cross_entropy(logits, target), {}

        def evaluated(self, model):
            return Doubled(model)

    assert runs.train("--method", "own", *RUN[2:], "--output-dir", tmp_path / "run") == 0
    assert [row["top1"] for row in runs.metrics(tmp_path / "run")] == [row["top1"] for row in runs.metrics(averaged)]
    trained = load_trained(tmp_path / "run" / "last.pt", None, SETTINGS)
    average = runs.checkpoint(averaged / "last.pt")["average"]["model"]
    assert torch.equal(trained.network.model.state_dict()["conv1.weight"], average["conv1.weight"])


def test_each_stage_begins_anew(runs, tmp_path):
    """Two stages of 12 and 6 steps: the count of the average is that of the second one."""
    assert runs.train(*runs.small, "--ema", 0.9, "--output-dir", tmp_path / "run") == 0
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert (state["stage"], state["average"]["steps"]) == (2, 6)
    weights, average = state["model"], state["average"]["model"]
    torch.testing.assert_close(average["conv1.weight"], weights["conv1.weight"], rtol=1e-2, atol=1e-4)  # frozen
    assert models.create_model(**state["model_description"]).load_state_dict(average)
