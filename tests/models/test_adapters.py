"""Adapters: at first nothing changes, then they alone learn within the trunk, and the description rebuilds them."""

import copy
import sys

import pytest
import torch
import torchvision_operators  # noqa: F401  (peft imports torchvision)
from backbones import register_backbones
from torch import nn

from shike_fast import models
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.models import adapters

KINDS = ["lora", "adaptformer"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register_backbones(monkeypatch)


def network(name="small_transformer", **options):
    torch.manual_seed(0)
    return models.create_model(name, num_classes=5, **options)


def add(model, kind, **options):
    if kind == "lora":
        pytest.importorskip("peft")
    models.add_adapters(model, kind, **options)
    return model


class Holder(models.MultiExpertNetwork):
    """Some module of another library as the trunk."""

    def __init__(self, trunk, dim, branch=nn.Identity):
        super().__init__(min_image_size=8, num_classes=5, fusion=False)
        self.trunk = trunk
        self.dim = dim
        self.add_experts([branch() for _ in range(3)], dim, {})

    def feature_maps(self, images):
        return {"trunk": self.trunk(images).view(len(images), self.dim, 1, 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", [False, True])
def test_at_first_the_network_is_the_same_bit_for_bit(kind, branches):
    model = network().eval()
    images = torch.randn(4, 3, 8, 8)
    expected = model(images)
    assert torch.equal(add(model, kind, branches=branches)(images), expected)
    assert any(name.startswith("experts.") for name in model.adapters) is branches


@pytest.mark.parametrize("kind", KINDS)
def test_they_learn_and_the_rest_of_the_trunk_stays(kind):
    model = add(network(), kind, **({"dropout": 0.5} if kind == "lora" else {}))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):  # in the first step what begins as zeros lets no gradient through
        model(torch.randn(4, 3, 8, 8))[..., 0].sum().backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    inside = {key for key in moved if not key.startswith(("experts.", "fusions.", "classifiers."))}
    expected = {key for key in before if key.startswith(tuple(f"{name}." for name in model.adapters))}
    assert inside == expected != set()
    training = {name for name, module in model.named_modules() if module.training and name.startswith("blocks")}
    assert model.adapters <= training and "blocks.0.drop" not in training and "blocks.0.mlp" not in training


def test_lora_s_usual_layers():
    model = add(network(), "lora")
    layers = {name.rpartition(".lora_")[0] for name in model.adapters}
    assert layers == {
        f"blocks.{k}.{name}" for k in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    only = Holder(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6)), 6)
    add(only, "lora")
    assert {name.rpartition(".lora_")[0] for name in only.adapters} == {"trunk.1", "trunk.3"}
    named = add(network(), "lora", targets=("qkv", "0.mlp.fc1"))
    layers = {name.rpartition(".lora_")[0] for name in named.adapters}
    assert layers == {"blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0.mlp.fc1"}


def test_lora_of_convolutions_by_name():
    model = add(network("resnet8").eval(), "lora", targets=("layer1.0.conv1", "layer2.0.conv1"))
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(model(images), network("resnet8").eval()(images))
    assert len([name for name in model.adapters if name.endswith("lora_A")]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_description_rebuilds_them(kind, tmp_path):
    options = {"rank": 2, "alpha": 4.0, "targets": ("qkv",)} if kind == "lora" else {"width": 3, "scale": 0.5}
    model = add(network(), kind, **options)
    torch.save({"description": model.description, "model": model.state_dict()}, tmp_path / "file.pt")
    state = torch.load(tmp_path / "file.pt", weights_only=True)
    again = models.create_model(**state["description"])
    again.load_state_dict(state["model"])
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert again.frozen == model.frozen and again.adapters == model.adapters


def test_lora_s_formula_and_its_merging():
    model = network().eval()
    images = torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(model)
    add(model, "lora", rank=2, alpha=6.0, targets=("fc1",))
    with torch.no_grad():
        for block, before in zip(model.blocks, plain.blocks, strict=True):
            layer = block.mlp.fc1
            layer.lora_B["default"].weight.normal_()
            before.mlp.fc1.weight += 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = plain(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    models.merge_adapters(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys() and "adapter" not in model.description
    assert not model.frozen and type(model.blocks[0].mlp.fc1) is nn.Linear
    models.create_model(**model.description).load_state_dict(model.state_dict())


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match="merge_adapters: the network has no adapters"):
        models.merge_adapters(network())
    with pytest.raises(ConfigError, match="merge_adapters: adaptformer is not linear"):
        models.merge_adapters(add(network(), "adaptformer"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vision_transformer_of_timm(kind):
    timm = pytest.importorskip("timm")
    settings = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 12, "num_heads": 2, "num_classes": 0}
    model = Holder(timm.create_model("vit_tiny_patch16_224", **settings), 12).eval()
    images = torch.randn(3, 3, 8, 8)
    expected = model(images)
    assert torch.equal(add(model, kind)(images), expected)
    first = {name.removeprefix("trunk.blocks.0.") for name in model.adapters if name.startswith("trunk.blocks.0.")}
    layers = {name.rpartition(".")[0] for name in first}
    assert layers == ({"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"} if kind == "lora" else {"mlp"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_vision_transformer_of_torchvision(kind):
    """Its attention is PyTorch's own, which LoRA leaves alone."""
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    settings = {"image_size": 8, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 12, "mlp_dim": 24}
    trunk = vision.VisionTransformer(**settings)
    trunk.heads = nn.Identity()
    model = Holder(trunk, 12).eval()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():  # with gradients its attention computes in another way
        expected = model(images)
        assert torch.equal(add(model, kind)(images), expected)
    assert all(".mlp." in name for name in model.adapters) and model.adapters
    if kind == "lora":
        with pytest.raises(ConfigError, match="called out_proj; a MultiheadAttention of PyTorch"):
            models.add_adapters(Holder(trunk, 12), "lora", targets=("out_proj",))


@pytest.mark.parametrize(
    ("name", "kind", "options", "message"),
    [
        ("resnet8", "lora", {}, "the trunk has no linear layer for LoRA; adapters fit transformers"),
        ("resnet8", "adaptformer", {}, "the trunk has no MLP of linear layers for AdaptFormer to be beside"),
        ("resnet8", "adaptformer", {"branches": True}, "the network has no MLP of linear layers"),
        ("small_transformer", "lora", {"targets": ("qkv", "gate")}, "no layer of the trunk .* is called gate"),
        ("small_transformer", "lora", {"targets": ("blocks.0",)}, "--lora-targets: Target module"),
        ("small_transformer", "prefix", {}, "kind must be one of lora, adaptformer, got 'prefix'"),
        ("small_transformer", "lora", {"width": 3}, "lora has no option width, it has rank, alpha, dropout, targets"),
        ("small_transformer", "lora", {"rank": 0}, "rank must be at least 1, got 0"),
        ("small_transformer", "lora", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("small_transformer", "adaptformer", {"width": 0}, "dim and width must be at least 1, got 16 and 0"),
        ("small_transformer", "adaptformer", {"scale": 0.0}, "scale must be a positive number, got 0.0"),
    ],
)
def test_what_is_refused(name, kind, options, message):
    with pytest.raises(ValueError, match=message):
        add(network(name), kind, **options)


def test_more_that_is_refused(tmp_path, monkeypatch):
    model = add(network(), "adaptformer")
    with pytest.raises(ValueError, match="the network has adapters already"):
        models.add_adapters(model, "adaptformer")
    with pytest.raises(CheckpointError, match="the network has adapters, the file has none; load it before"):
        models.load_pretrained(model, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="add_adapters: only a MultiExpertNetwork"):
        models.add_adapters(nn.Linear(1, 1), "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="--adapter: lora needs peft: pip install peft, or use adapt"):
        models.add_adapters(network(), "lora")


def test_adaptformer_s_formula():
    torch.manual_seed(0)
    mlp = nn.Linear(6, 6)
    layer = adapters.AdaptFormer(mlp, 6, 3, 0.5)
    x = torch.randn(2, 4, 6)
    assert torch.equal(layer(x), mlp(x)) and "scale=0.5" in repr(layer)
    down, _, up = layer.adapter
    nn.init.normal_(up.weight)
    nn.init.normal_(up.bias)
    expected = mlp(x) + 0.5 * ((x @ down.weight.T + down.bias).clamp(min=0) @ up.weight.T + up.bias)
    torch.testing.assert_close(layer(x), expected)
