"""Networks and data sets of the user's own, registered in the process that trains."""

import dataclasses

import pytest
import torch

from shike_fast import data, models
from shike_fast.data import registry as base
from shike_fast.data.recipes import PHOTOGRAPHS, SMALL_IMAGES
from shike_fast.engine.config import resolve
from shike_fast.errors import ConfigError
from shike_fast.evaluate import main as evaluate
from shike_fast.models import registry
from shike_fast.models.multi_expert import TRAINABLE
from shike_fast.predict import main as predict

OWN = ["--model", "pixels", "--epochs", 2, "--stage2-epochs", 1, "--batch-size", 64, "--output-dir"]


class Pixels(torch.nn.Module):
    """No residual network: linear classifiers on the pixels, with what training needs and nothing else."""

    min_image_size = 8
    checkpoint_activations = False

    def __init__(self, num_experts, num_classes):
        super().__init__()
        self.num_experts = num_experts
        self.heads = torch.nn.ModuleList(torch.nn.Linear(64, num_experts * num_classes) for _ in range(2))

    def features(self, images):
        return images.flatten(1).expand(self.num_experts, -1, -1)

    def classify(self, features, stage=1):
        logits = self.heads[stage - 1](features[0])
        return logits.unflatten(1, (self.num_experts, -1)).transpose(0, 1)

    def forward(self, images, stage=1):
        return self.classify(self.features(images), stage)

    def stage2_parameters(self):
        return list(self.heads[1].parameters())


@pytest.fixture
def own(monkeypatch):
    """A network and a data set that only this test knows."""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @models.register_model
    def pixels(*, num_experts, num_classes, **_):
        return Pixels(num_experts, num_classes)

    digits = data.datasets()["digits-lt"]

    @base.register_dataset(dataclasses.replace(digits, name="mine", resizable=False, recipe={}))
    def load(info, options):
        return dataclasses.replace(base._REGISTRY["digits-lt"][1](digits, options), name="mine")


@pytest.mark.usefixtures("own")
def test_a_network_and_a_data_set_of_ones_own(runs, tmp_path, capsys):
    assert runs.train(*OWN, tmp_path / "run", "--dataset", "mine") == 0
    assert evaluate(["--checkpoint", str(tmp_path / "run" / "last.pt")]) == 0
    del registry._BUILDERS["pixels"]
    capsys.readouterr()
    last = tmp_path / "run" / "last.pt"
    for again in (
        lambda: runs.train("--resume", "--output-dir", tmp_path / "run"),
        lambda: evaluate(["--checkpoint", str(last)]),
        lambda: predict(["--checkpoint", str(last), "--images", str(tmp_path), "--output", str(tmp_path / "x.csv")]),
    ):
        assert again() == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: checkpoint {last} holds the network 'pixels', which is not registered in this")
        assert "import the module that registers it first" in error and error.count("\n") == 1
    registry._BUILDERS["pixels"] = lambda **options: Pixels(options["num_experts"], options["num_classes"])
    del base._REGISTRY["mine"]
    assert evaluate(["--checkpoint", str(last)]) == 2
    assert "error: the data set 'mine' is not registered in this process; import" in capsys.readouterr().err


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", TRAINABLE)
def test_what_a_network_lacks_is_named(runs, tmp_path, monkeypatch, capsys, name):
    monkeypatch.delattr(Pixels, name)
    assert runs.train(*OWN, tmp_path / "run") == 2
    assert f"error: --model: pixels cannot be trained, it has no {name}; docs/models.md says" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("own")
def test_the_recipe_of_a_data_set_of_ones_own():
    info = data.datasets()["mine"]
    assert info.recipe == data.datasets()["cifar100-lt"].recipe == SMALL_IMAGES
    data.register_dataset(dataclasses.replace(info, name="photographs", resizable=True, recipe={}))(lambda *_: None)
    photographs = data.datasets()["photographs"]
    assert photographs.recipe == data.datasets()["imagefolder"].recipe == PHOTOGRAPHS
    data.register_dataset(dataclasses.replace(info, name="own", recipe={"epochs": 30, "scale": 16.0}))(lambda *_: None)
    assert data.datasets()["own"].recipe == SMALL_IMAGES | {"epochs": 30, "scale": 16.0}
    config = resolve({"dataset": "mine"})
    assert (config.model, config.hardest_weight, config.scale, config.warmup_epochs) == ("resnet32", 10.0, 30.0, 5)
    config = resolve({"dataset": "own"})
    assert (config.model, config.epochs, config.scale, config.stage2_start_lr_factor) == ("resnet32", 30, 16.0, 0.25)


@pytest.mark.usefixtures("own")
def test_an_unknown_setting_in_a_recipe_is_named():
    info = dataclasses.replace(data.datasets()["mine"], name="misspelt", recipe={"epoch": 3})
    data.register_dataset(info)(lambda *_: None)
    with pytest.raises(ConfigError, match="--dataset: the recipe of misspelt has the unknown setting epoch"):
        resolve({"dataset": "misspelt"})
