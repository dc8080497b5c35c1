"""Weights of elsewhere: which network they are of, by their names and shapes."""

import pytest
import torch

from shike_fast import models
from shike_fast.errors import CheckpointError
from shike_fast.models.recognise import recognise


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_published_code_of_shike(published_state, golden, wrapped):
    saved = published_state("resnet8_moe")
    if wrapped:
        saved = {"epoch": 200, "state_dict": {f"module.{key}": value for key, value in saved.items()}}
    found = recognise(saved, "published.pth.tar")
    assert found.kind == "shike"
    assert found.description == models.create_model("resnet8", num_classes=10).description
    model = models.create_model(**found.description).double().eval()
    model.load_state_dict(found.state_dict)
    recorded = golden("resnet8_moe")
    for stage, key in ((1, "eval_logits"), (2, "eval_logits_stage2")):
        logits = model(torch.from_numpy(recorded["images"]).double(), stage)
        torch.testing.assert_close(logits, torch.from_numpy(recorded[key]), rtol=1e-9, atol=1e-9)


def test_more_blocks(published_state):
    assert recognise(published_state("resnet32_moe"), "x").description["name"] == "resnet32"


def plain(name, **options):
    """The state_dict of a plain network under torchvision's names, and that network here."""
    model = models.create_model(name, num_experts=1, fusion=False, classifier="linear", num_classes=7, **options)
    state = model.state_dict()
    named = {plain: state[key] for key in state if (plain := model.pretrained_name(key)) is not None}
    return named | {"fc.weight": state["classifiers.weight"][0].t(), "fc.bias": state["classifiers.bias"][0]}, model


@pytest.mark.parametrize(("name", "size"), [("resnet8", 16), ("resnet32", 16), ("resnet10", 64), ("resnet50", 64)])
def test_torchvisions_names(name, size):
    saved, model = plain(name)
    found = recognise(saved, "x.pth")
    assert found.kind == "plain" and found.description["name"] == name and found.description["num_classes"] == 7
    again = models.create_model(**found.description)
    again.load_state_dict(found.state_dict)
    images = torch.randn(2, 3, size, size)
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert torch.equal(again(images, stage=2), again(images, stage=1))


def test_without_counters_and_bias_and_in_grey():
    saved, _ = plain("resnet8", in_channels=1)
    saved = {key: value for key, value in saved.items() if not key.endswith(("num_batches_tracked", "fc.bias"))}
    found = recognise(saved, "x.pth")
    assert found.description["in_channels"] == 1
    models.create_model(**found.description).load_state_dict(found.state_dict)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: {"weight": torch.zeros(3)}, "x.pth: holds no weights of the published code of SHIKE, RIDE"),
        (lambda saved: {}, "expected a state_dict"),
        (lambda saved: saved | {"fc.weight": torch.zeros(7)}, r"fc.weight must be \[C, D\], beside conv1.weight"),
        (lambda saved: saved | {"fc.weight": torch.zeros(7, 65)}, "no registered network has the names and shapes"),
        (lambda saved: saved | {"layer9.0.weight": torch.zeros(7)}, "no registered network has the names and shapes"),
    ],
)
def test_what_is_not_known(change, message):
    saved, _ = plain("resnet8")
    with pytest.raises(CheckpointError, match=message):
        recognise(change(saved), "x.pth")


def test_a_published_network_of_another_depth(published_state):
    saved = published_state("resnet8_moe")
    deeper = {
        key.replace("layer1.0.", "layer1.1."): value for key, value in saved.items() if key.startswith("layer1.0.")
    }
    with pytest.raises(CheckpointError, match="x: no registered network has as many blocks a stage"):
        recognise(saved | deeper, "x")
