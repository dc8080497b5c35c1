"""Weights with timm's names into trunk and experts."""

import pytest
import safetensors.torch
import torch
import torchvision_operators  # noqa: F401  (timm imports torchvision)

from shike_fast import models
from shike_fast.errors import CheckpointError
from shike_fast.models import timm_parts

timm = pytest.importorskip("timm")


def published(name, **options):
    """What timm would publish: its network with a classifier."""
    torch.manual_seed(3)
    return timm.create_model(name, **{"num_classes": 1000, **options})


def save(weights, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def network(name, **options):
    torch.manual_seed(0)
    return models.create_model(f"timm:{name}", **{"num_classes": 5, **options})


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_convnext", "test_resnet", "test_efficientnet"])
def test_the_trunk_and_every_expert_get_them(tmp_path, name, file):
    theirs = published(name)
    model = network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = models.load_pretrained(model, save(theirs.state_dict(), tmp_path / file))
    after, weights = model.state_dict(), theirs.state_dict()
    for key in report.loaded:
        assert torch.equal(after[key], weights[model.pretrained_name(key)])
    assert {key.partition(".")[0] for key in report.untouched} == {"fusions", "classifiers", "rt_classifiers"}
    assert all(torch.equal(after[key], before[key]) for key in report.untouched)
    assert set(report.loaded) | set(report.untouched) == set(after)
    assert any(key.startswith("experts.2.") for key in report.loaded)
    unused = {key.split(".")[0] for key in report.ignored}
    assert unused <= {"head", "fc", "classifier", "attn_pool"} and report.ignored


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_without_fusion_the_experts_give_its_features(tmp_path, name):
    theirs = published(name).eval()
    model = network(name, fusion=False).eval()
    models.load_pretrained(model, save(theirs.state_dict(), tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 160, 160)
    expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.features(images), expected.expand(3, -1, -1), rtol=1e-4, atol=1e-4)


def test_position_embeddings_of_another_image_size_are_resampled(tmp_path):
    model = network("test_vit")  # 160 pixels
    report = models.load_pretrained(model, save(published("test_vit", img_size=64).state_dict(), tmp_path / "w.pth"))
    assert "trunk.net.pos_embed" in report.loaded
    assert model.trunk.net.pos_embed.shape == (1, 101, 64)


@pytest.mark.parametrize(("name", "first"), [("test_convnext", "stem.0"), ("test_vit", "patch_embed.proj")])
def test_weights_for_colours_fit_grey_images(tmp_path, name, first):
    theirs, model = published(name), network(name, in_channels=1)
    models.load_pretrained(model, save(theirs.state_dict(), tmp_path / "weights.pth"))
    colours = theirs.get_submodule(first).weight
    torch.testing.assert_close(model.trunk.net.get_submodule(first).weight, colours.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("blocks.5.norm1.weight"), "missing keys: blocks.5.norm1.weight"),
        (lambda weights: weights.update({"blocks.9.norm1.weight": torch.ones(64)}), "unknown keys: blocks.9.norm1"),
        (lambda weights: weights.update({"norm.weight": torch.ones(3)}), r"norm.weight is \[3\], expected \[64\]"),
        (lambda weights: weights.update({"pos_embed": torch.ones(3)}), "weights of another network"),
    ],
)
def test_other_weights_are_refused_whole(tmp_path, change, message):
    weights = dict(published("test_vit").state_dict())
    change(weights)
    model = network("test_vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        models.load_pretrained(model, save(weights, tmp_path / "weights.pth"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_timm_publishes_is_loaded(monkeypatch):
    theirs = published("test_convnext", num_classes=0)
    make = timm_parts.TimmSource.make
    monkeypatch.setattr(
        timm_parts.TimmSource,
        "make",
        lambda self, *, pretrained=False: theirs if pretrained else make(self),
    )
    model = network("test_convnext")
    report = models.load_pretrained(model, "timm")
    assert torch.equal(model.experts[2].net.stages[0].blocks[0].norm.weight, theirs.stages[3].blocks[0].norm.weight)
    assert report.ignored == ()


def test_without_a_network_it_is_one_line(monkeypatch):
    monkeypatch.setattr(timm_parts.import_timm(), "create_model", _fail(timm.create_model))
    with pytest.raises(CheckpointError) as caught:
        models.load_pretrained(network("test_vit"), "timm")
    message = str(caught.value)
    assert message.startswith("--pretrained: the weights that timm publishes for test_vit cannot be had (no route)")
    assert message.endswith("name their file: --pretrained FILE") and "\n" not in message
    with pytest.raises(
        CheckpointError, match="timm publishes weights of networks of timm alone; use --model timm:NAME"
    ):
        models.load_pretrained(models.create_model("resnet8", num_classes=5), "timm")


def _fail(create_model):
    def create(name, *, pretrained, **options):
        if pretrained:
            raise OSError("no route\nto the hub")
        return create_model(name, pretrained=pretrained, **options)

    return create
