"""A backbone that is no residual network and not of this package: from the contract to a trained, evaluated run."""

import copy
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision_operators  # noqa: F401  (timm imports torchvision)
from torch import nn

from shike_fast import methods, models, ops
from shike_fast.data.images.augmented import AugmentedDataset
from shike_fast.errors import CheckpointError
from shike_fast.evaluate import main as evaluate
from shike_fast.models import registry
from shike_fast.train import main as train


class Mixer(nn.Module):
    """Mixes the pixels of a map, then its channels, as an MLP-Mixer does; no convolution, no residual block."""

    def __init__(self, channels, pixels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.pixels = nn.Linear(pixels, pixels)
        self.channels = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = x + self.pixels(self.norm(x).flatten(2)).unflatten(2, x.shape[2:])
        return self.channels(tokens.movedim(1, -1)).movedim(-1, 1).relu()


class PatchNetwork(models.MultiExpertNetwork):
    """Patch embeddings of two sizes for 8x8 images; a branch embeds once more."""

    branch_name = "head"

    def __init__(self, **options):
        super().__init__(min_image_size=8, **options)
        self.fine = nn.Sequential(nn.Conv2d(self.in_channels, 8, 2, stride=2), Mixer(8, 16))
        self.coarse = nn.Sequential(nn.Conv2d(8, 16, 2, stride=2), Mixer(16, 4))
        branches = [nn.Sequential(nn.Conv2d(16, 24, 2, stride=2), Mixer(24, 1)) for _ in range(self.num_experts)]
        maps = {"fine": models.FeatureMap(8, halvings=2), "coarse": models.FeatureMap(16, halvings=1)}
        self.add_experts(branches, 24, maps)

    def feature_maps(self, images):
        fine = self.run_stage(self.fine, images)
        return {"fine": fine, "coarse": self.run_stage(self.coarse, fine)}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @models.register_model
    def patches(**options):
        return PatchNetwork(**options)


def network(**options):
    torch.manual_seed(0)
    return models.create_model("patches", **{"num_classes": 5, **options})


def some_images():
    return torch.randn(4, 3, 8, 8)


def test_it_is_trained_and_evaluated_by_the_commands(tmp_path):
    run = tmp_path / "run"
    options = ["--model", "patches", "--epochs", "2", "--stage2-epochs", "1", "--batch-size", "64"]
    assert train([*options, "--output-dir", str(run)]) == 0
    assert evaluate(["--checkpoint", str(run / "last.pt")]) == 0
    best, last = (torch.load(run / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert last["stage"] == 2 and last["model_description"]["num_experts"] == 3
    assert last["model"]["fusions.1.convs.0.weight"].shape == (24, 16, 3, 3)
    torch.manual_seed(0)
    untrained = network(num_classes=10, in_channels=1, scale=last["model_description"]["scale"]).state_dict()
    assert untrained.keys() == last["model"].keys() == best["model"].keys()
    moved = {name for name, value in untrained.items() if not torch.equal(value, last["model"][name])}
    assert {"experts.2.0.weight", "fine.0.weight", "fusions.0.norms.1.running_mean", "rt_classifiers.weight"} <= moved


def test_a_run_with_activation_checkpointing_is_the_same_bit_for_bit(tmp_path):
    options = ["--model", "patches", "--epochs", "2", "--stage2-epochs", "1", "--batch-size", "64", "--threads", "1"]
    states = []
    for name, more in (("plain", []), ("again", ["--checkpoint-activations"])):
        assert train([*options, *more, "--output-dir", str(tmp_path / name)]) == 0
        states.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["model"])
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


def test_every_expert_fuses_its_map():
    model = network().eval()
    images = some_images()
    maps = model.feature_maps(images)
    assert model.fused_maps == ("fine", "coarse", "fine")
    deep = [expert(maps["coarse"]) for expert in model.experts]
    expected = torch.stack([model.fusions[k](maps[model.fused_maps[k]], deep[k]) for k in range(3)])
    torch.testing.assert_close(model.features(images), expected)
    assert torch.equal(model(images, stage=2), model.classify(model.features(images), 2))
    plain = network(fusion=False, num_experts=1, classifier="linear").eval()
    shared = plain.feature_maps(images)["coarse"]
    torch.testing.assert_close(plain.features(images)[0], plain.experts[0](shared).mean((2, 3)))


def test_stage2_trains_its_classifiers_only():
    model = network().requires_grad_(False)
    parameters = model.stage2_parameters()
    assert [id(parameter) for parameter in parameters] == [id(model.rt_classifiers.weight)]
    parameters[0].requires_grad_(True)
    model(some_images(), stage=2).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["rt_classifiers.weight"]


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    model = network().double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    images, target = some_images().double(), torch.tensor([0, 1, 2, 3])
    for run in (model, compiled):
        ops.dkt_loss(run(images), target).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_of_the_plain_network_go_into_every_expert(tmp_path):
    model, plain = network(), network(num_experts=1, fusion=False)
    weights = {
        key.replace("experts.0.", "head."): torch.randn_like(value)
        for key, value in plain.state_dict().items()
        if "classifiers" not in key
    }
    safetensors.torch.save_file(weights, tmp_path / "plain.safetensors")
    report = models.load_pretrained(model, tmp_path / "plain.safetensors")
    assert torch.equal(model.fine[1].pixels.weight, weights["fine.1.pixels.weight"])
    for expert in model.experts:
        assert torch.equal(expert[1].channels.bias, weights["head.1.channels.bias"])
    assert all(key.startswith(("fusions.", "classifiers.", "rt_classifiers.")) for key in report.untouched)
    with pytest.raises(CheckpointError, match=r"cannot be loaded into a Linear; only a MultiExpertNetwork says which"):
        models.load_pretrained(nn.Linear(1, 1), tmp_path / "plain.safetensors")


def test_what_a_backbone_does_wrong_is_named():
    class Wrong(PatchNetwork):
        def add_experts(self, branches, dim, maps):
            super().add_experts(*self.change(branches, dim, maps))

    for change, message in (
        (lambda branches, dim, maps: (branches[:2], dim, maps), "Wrong: expected 3 branches, got 2"),
        (lambda branches, dim, maps: (branches, dim, {}), "Wrong: fusion needs a feature map of the trunk, got none"),
    ):
        Wrong.change = staticmethod(change)
        with pytest.raises(ValueError, match=message):
            Wrong(num_classes=5)
    with pytest.raises(ValueError, match=r"floating \[B, 3, H, W\] with H and W at least 8"):
        network()(torch.zeros(2, 3, 4, 4))


def test_the_example_of_register_model():
    text = textwrap.dedent(inspect.getdoc(models.register_model))
    example = re.search(r"::\n\n((?:    .*\n|\n)+)", text)[1]
    names = {}
    exec(textwrap.dedent(example), names)  # the documentation's own code
    assert names["logits"].shape == (3, 8, 10)
    assert "plain_cnn" in models.list_models()
    names["logits"].sum().backward()
    assert names["model"].fine[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("title", "model"), [("A network of your own", "plain_cnn"), ("Networks of timm", "dropping_vit")]
)
def test_the_example_of_the_documentation(title, model):
    """It is complete, and what it registers trains a step."""
    if model == "dropping_vit":
        pytest.importorskip("timm")
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    section = page[page.index(f"## {title}\n") :]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {}
    exec(example, names)  # the documentation's own code
    network = models.create_model(model, num_classes=4)
    logits = network(torch.randn(6, 3, 32, 32))
    ops.dkt_loss(logits, torch.arange(6) % 4).backward()
    lacking = [name for name, weight in network.named_parameters() if weight.grad is None]
    assert lacking == ["rt_classifiers.weight"]
    assert model != "plain_cnn" or names["logits"].shape == (3, 8, 10)


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        (models.MultiExpertNetwork, "feature_maps"),
        (models.ResidualBlock, "before_last_norm, last_norm|before_last_norm.*last_norm"),
        (methods.Method, "loss"),
        (AugmentedDataset, "batch"),
    ],
)
def test_what_a_subclass_must_define_is_named_when_it_is_made(base, missing):
    with pytest.raises(TypeError, match=f"abstract method.*({missing})"):
        type("Unfinished", (base,), {})()
