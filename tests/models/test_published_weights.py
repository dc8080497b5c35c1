"""Weights of the published code under its own names."""

import pytest
import torch

from shike_fast import models
from shike_fast.errors import CheckpointError


@pytest.fixture
def published(published_state):
    return published_state("resnet8_moe")


def test_every_value_arrives(published):
    converted = models.convert_reference_state_dict(published)
    assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in published.values())
    assert list(converted) == list(models.create_model("resnet8", num_classes=10).state_dict())
    assert torch.equal(converted["experts.1.0.downsample.0.weight"], published["layer3s.1.0.shortcut.0.weight"])
    name = "shallow_exps.2.convs.StridedConv1.conv.1.running_mean"
    assert torch.equal(converted["fusions.2.norms.1.running_mean"], published[name])
    for k in range(3):
        assert torch.equal(converted["rt_classifiers.weight"][k], published[f"rt_classifiers.{k}.weight"])


def test_dataparallel_prefix(published):
    prefixed = {f"module.{key}": value for key, value in published.items()}
    converted, expected = (models.convert_reference_state_dict(state) for state in (prefixed, published))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_the_published_script_saves(published, tmp_path, prefix):
    weights = {f"{prefix}{key}": value for key, value in published.items()}
    saved = {"epoch": 200, "architecture": "resnet32", "state_dict": weights, "best_acc1": 50.0}
    torch.save(saved, tmp_path / "published.pth.tar")
    converted = models.convert_reference_state_dict(torch.load(tmp_path / "published.pth.tar", weights_only=True))
    expected = models.convert_reference_state_dict(published)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_another_network_of_the_published_code_is_named(published):
    plain = {key: value for key, value in published.items() if not key.startswith("shallow_exps.")}
    with pytest.raises(CheckpointError, match=r"several experts without fusion .*; only one with fusion"):
        models.convert_reference_state_dict(plain)
    with pytest.raises(CheckpointError, match=r"linear classifiers \(use_norm=False\); only one with normalised"):
        models.convert_reference_state_dict(published | {"classifiers.0.bias": torch.zeros(10)})


def test_the_random_state_is_left_alone(published):
    before = torch.get_rng_state()
    models.convert_reference_state_dict(published)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_and_unknown_keys_are_listed(published):
    del published["layer1.0.bn1.weight"], published["classifiers.0.weight"]
    published["layer9.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        models.convert_reference_state_dict(published)
    message = str(error.value)
    assert "missing keys: classifiers.0.weight, layer1.0.bn1.weight;" in message
    assert "unknown keys: layer9.extra" in message
    assert "\n" not in message


def test_wrong_shapes_are_listed(published):
    published["rt_classifiers.1.weight"] = torch.zeros(64, 11)
    published["conv1.weight"] = torch.zeros(16)
    with pytest.raises(CheckpointError, match=r"rt_classifiers.1.weight is \[64, 11\], expected \[64, 10\]") as error:
        models.convert_reference_state_dict(published)
    assert "conv1.weight is [16], expected [16, 1, 3, 3]" in str(error.value)


def test_a_gap_in_the_blocks_names_the_block(published):
    gap = {key.replace("layer2.0.", "layer2.7."): value for key, value in published.items()}
    with pytest.raises(CheckpointError, match=r"missing keys: layer2\.0\.bn1.*unknown keys: layer2\.7\.bn1"):
        models.convert_reference_state_dict(gap)


def test_another_network_gives_a_short_list():
    with torch.device("meta"):
        other = models.create_model("resnet152", num_classes=10).state_dict()
    with pytest.raises(CheckpointError, match=r"missing keys: .* and \d+ more; unknown keys: .* and \d+ more"):
        models.convert_reference_state_dict(other)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "got an empty dict"),
        ([torch.zeros(1)], "got of type list"),
        ({"state_dict": {}}, "'state_dict' is an empty dict"),
        ({"epoch": 3}, "'epoch' is of type int"),
    ],
)
def test_not_a_state_dict(state, message):
    with pytest.raises(CheckpointError, match=message):
        models.convert_reference_state_dict(state)
