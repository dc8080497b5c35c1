"""``models.freeze``: what is frozen has no gradient, no graph and no training mode, and all else has."""

import copy

import pytest
import torch
from backbones import register_backbones
from torch import nn

from shike_fast import models
from shike_fast.nn import convert_sync_batchnorm


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register_backbones(monkeypatch)


def network(name="resnet8", **options):
    torch.manual_seed(0)
    return models.create_model(name, num_classes=5, **options)


def parts(names):
    return {name.partition(".")[0] for name in names}


NEW = {"classifiers", "experts", "fusions", "rt_classifiers"}


@pytest.mark.parametrize("name", ["resnet8", "small_transformer"])
def test_a_frozen_trunk(name):
    model = network(name)
    models.freeze(model, "trunk")
    assert parts(key for key, parameter in model.named_parameters() if parameter.requires_grad) == NEW
    before = copy.deepcopy(model.state_dict())
    stored = []
    images = torch.randn(4, 3, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(0) or tensor, lambda tensor: tensor):
        maps = model.feature_maps(images)
    assert stored == [] and not any(one.requires_grad for one in maps.values())
    assert torch.equal(model.feature_maps(images)[list(maps)[-1]], list(maps.values())[-1])  # no dropout
    model(images).sum().backward()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and parts(changed) <= {"experts", "fusions"}  # statistics of BatchNorm


def test_train_leaves_it_in_eval_mode():
    model = network("small_transformer")
    models.freeze(model)
    for again in (model, copy.deepcopy(model), convert_sync_batchnorm(copy.deepcopy(model))):
        again.eval().train()
        assert again.training
        assert parts(key for key, module in again.named_modules() if module.training and key) == NEW
        assert not any(module.training for module in again.eval().modules())


def test_all_but_the_classifiers():
    model = network()
    models.freeze(model, "all-but-classifiers")
    heads = {"classifiers.weight", "rt_classifiers.weight"}
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == heads
    images = torch.randn(4, 3, 8, 8)
    features = model.features(images)
    assert not features.requires_grad
    assert torch.equal(features, model.eval().features(images))


def test_it_can_be_taken_back():
    model = network()
    models.freeze(model, "all-but-classifiers")
    models.freeze(model, "trunk")
    assert model.experts.training and model.experts[0][0].conv1.weight.requires_grad
    models.freeze(model, "off")
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_frozen():
    with pytest.raises(ValueError, match="only a MultiExpertNetwork says what is its trunk, got Linear"):
        models.freeze(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="part must be one of off, trunk, all-but-classifiers, got 'head'"):
        models.freeze(network(), "head")
    whole = network(expert_stages="all", fusion=False)
    with pytest.raises(ValueError, match="has no trunk: its experts share nothing"):
        models.freeze(whole, "trunk")
    models.freeze(whole, "all-but-classifiers")
    assert not whole.experts.training


def test_features_need_these_maps_alone():
    model = network("elementwise").eval()
    images = torch.randn(4, 3, 8, 8)
    maps = model.feature_maps(images)
    assert list(model.needed_maps(maps)) == ["fine", "coarse", "last"]
    assert torch.equal(model.expert_features(model.needed_maps(maps)), model.features(images))
    plain = network("elementwise", fusion=False)
    assert list(plain.needed_maps(maps)) == ["last"]
