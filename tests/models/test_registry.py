"""Networks by name."""

import json

import pytest
import torch

from shike_fast import models
from shike_fast.models import registry


def test_list_models():
    cifar, large = ["resnet8", "resnet20", "resnet32"], ["resnet10", "resnet50", "resnext50_32x4d", "resnet152"]
    assert models.list_models() == cifar + large


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_runs_and_its_description_rebuilds_it(name):
    options = {"num_classes": 7, "num_experts": 2, "in_channels": 1, "fusion": True, "classifier": "linear"}
    with torch.device("meta"):
        model = models.create_model(name, **options)
        logits = model(torch.empty(2, 1, 64, 64), stage=2)
        description = json.loads(json.dumps(model.description))
        again = models.create_model(**description)
    assert logits.shape == (2, 2, 7)
    assert description == {"name": name, **options, "scale": 30.0}
    assert again.description == model.description
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_unknown_name_lists_the_known_ones_and_the_closest():
    with pytest.raises(ValueError, match=r"unknown model 'resnet-32', known: resnet8, .*; did you mean 'resnet32'\?"):
        models.create_model("resnet-32", num_classes=10)
    with pytest.raises(ValueError, match=r"unknown model 'vit', known: .*resnet152, timm:NAME$"):
        models.create_model("vit", num_classes=10)


def test_register_model(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @models.register_model
    def tiny(**options):
        return models.MultiExpertResNet(models.BasicBlock, (1, 1), width=4, large_stem=False, **options)

    assert "tiny" in models.list_models()
    model = models.create_model("tiny", num_classes=5, num_experts=2)
    assert model(torch.randn(3, 3, 8, 8)).shape == (2, 3, 5)
    assert model.description["name"] == "tiny"
    with pytest.raises(ValueError, match="a model named 'tiny' exists already"):
        models.register_model(tiny)


def test_what_is_registered_must_take_the_options_and_build_a_module(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @models.register_model
    def narrow(num_classes):
        return torch.nn.Linear(1, num_classes)

    @models.register_model
    def nothing(**options):
        return None

    with pytest.raises(ValueError, match=r"narrow must take the options num_classes, .*: got an unexpected keyword"):
        models.create_model("narrow", num_classes=5)
    with pytest.raises(ValueError, match=r"nothing must build a torch\.nn\.Module, got NoneType"):
        models.create_model("nothing", num_classes=5)
