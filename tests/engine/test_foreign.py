"""``evaluate``, ``predict`` and ``load`` with weights of elsewhere."""

import csv
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import shike_fast
from shike_fast import data, models
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.evaluate import main as evaluate
from shike_fast.predict import main as predict


@pytest.fixture(scope="module")
def published(tmp_path_factory, golden):
    """What the published script saves: a CIFAR network of three experts."""
    recorded = golden("resnet8_moe")
    names = [key for key in recorded if key.startswith("state/")]
    weights = {f"module.{key.removeprefix('state/')}": torch.from_numpy(recorded[key]).float() for key in names}
    file = tmp_path_factory.mktemp("published") / "checkpoint.pth.tar"
    torch.save({"epoch": 200, "architecture": "resnet32", "state_dict": weights, "best_acc1": 50.0}, file)
    return file


def test_load(published, golden, capsys):
    model = shike_fast.load(published)
    recorded = golden("resnet8_moe")
    images = torch.from_numpy(recorded["images"]).float()
    one = shike_fast.load(published, stage=1)
    for network, key in ((model, "eval_logits_stage2"), (one, "eval_logits")):
        torch.testing.assert_close(network(images), torch.from_numpy(recorded[key]).float(), rtol=1e-4, atol=1e-4)
    assert model.class_names[:2] == ("class 0000", "class 0001") and model.transform.size == 32
    assert "the classifiers of stage 2 are used; --stage 1 takes the others" in capsys.readouterr().err


def test_predict(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("images/a.png")
    assert predict(["--checkpoint", str(published), "--images", "images", "--workers", "0", "--top", "1"]) == 0
    with open("predictions.csv", newline="") as file:
        row = next(csv.DictReader(file))
    found = shike_fast.load(published).predict(pixels)
    assert row["name_1"] == found.names[0] and float(row["probability_1"]) == pytest.approx(
        found.top(1)[0][0][1], abs=1e-5
    )


def test_evaluate_needs_a_data_set(published, capsys):
    assert evaluate(["--checkpoint", str(published)]) == 2
    assert "--dataset: " in capsys.readouterr().err


def test_torchvisions_names_on_digits(tmp_path, capsys):
    """A plain network of another program, by its weights alone, as .pth and as .safetensors."""
    model = models.create_model(
        "resnet8", num_experts=1, fusion=False, classifier="linear", num_classes=10, in_channels=1
    )
    state = model.state_dict()
    named = {plain: state[key] for key in state if (plain := model.pretrained_name(key)) is not None}
    named |= {"fc.weight": state["classifiers.weight"][0].t().contiguous(), "fc.bias": state["classifiers.bias"][0]}
    torch.save(named, tmp_path / "plain.pth")
    safetensors.torch.save_file({key: value.clone() for key, value in named.items()}, tmp_path / "plain.safetensors")
    digits = data.load_dataset("digits-lt")
    images = torch.stack([digits.test[i][0] for i in range(8)])
    for name in ("plain.pth", "plain.safetensors"):
        found = shike_fast.load(tmp_path / name, dataset=digits)
        assert found.class_names == digits.class_names and found.transform.size == 8
        torch.testing.assert_close(found(images)[0], model.eval()(images)[0], rtol=1e-4, atol=1e-4)
    options = ["--checkpoint", str(tmp_path / "plain.pth"), "--dataset", "digits-lt", "--imbalance-factor", "10"]
    assert evaluate([*options, "--csv", str(tmp_path / "a.csv"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    right = (
        model(torch.stack([digits.test[i][0] for i in range(600)]))[0].argmax(1).numpy() == digits.test.labels
    ).mean()
    assert result["top1"] == pytest.approx(100 * right) and result["test_images"] == 600


def test_what_does_not_fit(published, finished, tmp_path, capsys):
    assert evaluate(["--checkpoint", str(finished / "last.pt"), "--dataset", "digits-lt"]) == 2
    assert "says itself what it was trained on; leave it out" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="says itself what it was trained on"):
        shike_fast.load(finished / "last.pt", dataset=data.load_dataset("digits-lt"))
    assert evaluate(["--checkpoint", str(published), "--imbalance-factor", "3"]) == 2
    assert "--imbalance-factor: of which data set?" in capsys.readouterr().err
    other = data.load_dataset("digits-lt")
    hundred = type(other)(**{**vars(other), "class_names": tuple(map(str, range(100)))})
    with pytest.raises(CheckpointError, match=r"--dataset: digits-lt has 100 classes, the network of .* has 10"):
        shike_fast.load(published, dataset=hundred)
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"is no checkpoint of shike_fast, .* are read as well, but .* holds no"):
        shike_fast.load(tmp_path / "weights.pth")
    assert issubclass(CheckpointError, ValueError) and issubclass(ConfigError, ValueError)
