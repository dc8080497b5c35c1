"""Experts of several stages, of another width, as whole networks, and shortcuts without parameters."""

import copy
import json

import pytest
import torch
from torch import nn

from shike_fast import models
from shike_fast.models import multi_expert, registry
from shike_fast.models.resnet import PaddedShortcut

RIDE = {"expert_stages": 2, "expert_width": 0.75, "shortcut": "pad"}


def build(name="resnet8", **options):
    torch.manual_seed(0)
    return models.create_model(name, **{"num_classes": 10, **options})


def count(model):
    """Parameters; of the two sets of heads one, as a published network has it."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("rt_classifiers."))


def on_meta(name, **options):
    with torch.device("meta"):
        return build(name, **options)


def test_experts_have_their_own_last_stages():
    model = build(expert_stages=2, num_experts=2)
    names = {name for name, _ in model.named_parameters() if name.startswith(("layer", "experts"))}
    assert {name.rsplit(".", 3)[0] for name in names if name.startswith("layer")} == {"layer1"}
    assert {".".join(name.split(".")[:3]) for name in names if name.startswith("experts")} == {
        "experts.0.layer2",
        "experts.0.layer3",
        "experts.1.layer2",
        "experts.1.layer3",
    }
    assert list(model.feature_maps(torch.zeros(1, 3, 8, 8))) == ["layer1"]
    large = on_meta("resnet50", expert_stages=2)
    assert set(dict(large.experts[0].named_children())) == {"layer3", "layer4"}
    assert on_meta("resnet50", expert_stages=3).num_shared == 1


def test_the_width_of_experts():
    model = build(**RIDE)
    first = model.experts[0].layer2[0].conv1
    assert first.weight.shape[:2] == (24, 16) and model.experts[2].layer3[0].conv2.weight.shape[:2] == (48, 48)
    assert model.classifiers.weight.shape == (3, 48, 10)
    large = on_meta("resnext50_32x4d", expert_stages=2, expert_width=0.75)
    assert large.experts[0].layer3[0].conv2.weight.shape == (384, 12, 3, 3)
    assert large.experts[0].layer4[2].conv3.weight.shape[:2] == (1536, 768)
    assert build(expert_width=1.5).classifiers.weight.shape == (3, 96, 10)
    whole = build(expert_stages="all", expert_width=0.5, fusion=False)
    assert whole.experts[1].stem.conv1.weight.shape[0] == 8


def basic_blocks(channels, width, number):
    """Parameters of a stage of basic blocks with shortcuts that have none: 3x3 convolutions, and two of each norm."""
    return 9 * (channels * width + (2 * number - 1) * width * width) + 2 * number * 2 * width


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [  # as published of the plain networks: 0.27 M and 0.46 M with option A, and ResNet-10
        ("resnet20", {"num_experts": 1, "classifier": "linear", "shortcut": "pad"}, 269_722),
        ("resnet32", {"num_experts": 1, "classifier": "linear", "shortcut": "pad"}, 464_154),
        ("resnet10", {"num_experts": 1, "classifier": "linear", "num_classes": 1000}, 5_418_792),
        # by arithmetic: RIDE's network, and BalPoE's, for CIFAR-100
        (
            "resnet32",
            {**RIDE, "num_classes": 100},
            464 + basic_blocks(16, 16, 5) + 3 * (basic_blocks(16, 24, 5) + basic_blocks(24, 48, 5) + 4800),
        ),
        (
            "resnet32",
            {**RIDE, "num_classes": 100, "expert_width": 1.0},
            464 + basic_blocks(16, 16, 5) + 3 * (basic_blocks(16, 32, 5) + basic_blocks(32, 64, 5) + 6400),
        ),
    ],
)
def test_published_numbers_of_parameters(name, options, parameters):
    assert count(on_meta(name, fusion=False, **options)) == parameters


def test_zeros_on_either_side():
    x = torch.randn(2, 16, 5, 4)
    out = PaddedShortcut(16, 24, 2)(x)
    assert out.shape == (2, 24, 3, 2)
    assert torch.equal(out[:, 4:20], x[:, :, ::2, ::2])
    assert not out[:, :4].any() and not out[:, 20:].any()
    block = models.BasicBlock(16, 24, 2, shortcut="pad")
    assert block(x).shape == (2, 24, 3, 2)
    assert not list(block.downsample.parameters())
    even = torch.randn(2, 16, 6, 4).contiguous(memory_format=torch.channels_last)
    channels_last = PaddedShortcut(16, 24, 2)(even)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert models.BasicBlock(16, 16, 1, shortcut="pad").downsample is None


@pytest.mark.parametrize("size", [4, 9, (17, 30)])
@pytest.mark.parametrize(
    "options",
    [RIDE, {"expert_stages": 2, "classifier": "linear"}, {"expert_stages": "all", "fusion": False, "shortcut": "pad"}],
)
def test_odd_sizes_and_gradients(options, size):
    height, width = size if isinstance(size, tuple) else (size, size)
    model = build(**options)
    logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (3, 2, 10)
    (logits.square().sum() + model(torch.randn(2, 3, 8, 8), stage=2).square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_whole_networks_are_plain_networks_side_by_side():
    model = build(expert_stages="all", fusion=False, num_experts=2, in_channels=1).double()
    assert model.num_shared == 0
    assert count(model) == 2 * count(build(num_experts=1, fusion=False, in_channels=1))
    images = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    logits = model(images)
    for k in range(2):
        plain = build(num_experts=1, fusion=False, in_channels=1).double()
        state = {}
        for key, value in model.state_dict().items():
            if key.startswith(f"experts.{k}."):
                name = key.split(".", 2)[2].removeprefix("stem.")
                state[name.replace("layer3.", "experts.0.", 1)] = value
            elif "classifiers" in key:
                state[key] = value[k : k + 1]
        for key in [key for key in state if "running" in key or "tracked" in key]:
            del state[key]
        plain.load_state_dict(state, strict=False)
        torch.testing.assert_close(plain(images)[0], logits[k], rtol=1e-12, atol=1e-12)
    logits[0].square().sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("experts.0.stem") for name in touched)
    assert not any(name.startswith("experts.1.") for name in touched)


@pytest.fixture
def ends(monkeypatch):
    """How many ends of residual blocks each call of the fusion computed."""
    calls = []
    plain = multi_expert.fuse_experts

    def counting(*args, **options):
        calls.append(len(options.get("deep_norms") or ()))
        return plain(*args, **options)

    monkeypatch.setattr(multi_expert, "fuse_experts", counting)
    return calls


@pytest.mark.parametrize("options", [RIDE, {"expert_stages": 2}, {"shortcut": "pad"}])
def test_fusion_of_the_maps_that_are_shared(ends, options):
    model = build(**options).double().eval()
    two = options.get("expert_stages") == 2
    assert model.fused_maps == (("layer1",) * 3 if two else ("layer1", "layer2", "layer1"))
    assert [len(fusion.convs) for fusion in model.fusions] == ([2, 2, 2] if two else [2, 1, 2])
    images = torch.randn(2, 3, 13, 13, dtype=torch.float64)
    maps = model.feature_maps(images)
    x = maps["layer1" if two else "layer2"]
    expected = torch.stack([model.fusions[k](maps[model.fused_maps[k]], model.experts[k](x)) for k in range(3)])
    torch.testing.assert_close(model.features(images), expected)
    assert ends == [3]  # the last block of each expert ends in the operator


def test_a_hook_in_a_stage_is_called(ends):
    model = build(expert_stages=2).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = model.features(images)
    seen = []
    model.experts[1].layer3.register_forward_hook(lambda *args: seen.append("stage"))
    model.experts[0].layer2[0].register_forward_hook(lambda *args: seen.append("block"))
    torch.testing.assert_close(model.features(images), expected)
    assert seen == ["block", "stage"] and ends == [3, 0]


@pytest.mark.parametrize("options", [RIDE, {"expert_stages": "all", "fusion": False, "shortcut": "pad"}])
def test_channels_last_gives_the_same(options):
    model = build(**options).double()
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    expected, logits = model(images), other(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    expected.square().sum().backward()
    logits.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if not name.startswith("rt_"):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_a_description_names_only_what_is_not_the_default():
    model = build(**RIDE, fusion=False)
    description = json.loads(json.dumps(model.description))
    assert {key: description[key] for key in RIDE} == RIDE
    again = models.create_model(**description)
    assert again.description == model.description
    again.load_state_dict(model.state_dict())
    assert not RIDE.keys() & build().description.keys()
    assert build(expert_stages=1, expert_width=1, shortcut="projection").description == build().description


def test_a_network_that_knows_no_such_option(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    class Plain(models.MultiExpertNetwork):
        def __init__(self, **options):
            super().__init__(min_image_size=1, **options)
            self.add_experts([nn.Conv2d(self.in_channels, 4, 1) for _ in range(self.num_experts)], 4, {})

        def feature_maps(self, images):
            return {"images": images}

    @models.register_model
    def plain(**options):
        return Plain(**options)

    @models.register_model
    def strict(*, num_classes, num_experts, in_channels, fusion, classifier, scale):
        return Plain(num_classes=num_classes, fusion=fusion)

    for name in ("plain", "strict"):
        build(name, fusion=False, expert_stages=1)
    with pytest.raises(ValueError, match="Plain has no option expert_stages, expert_width"):
        build("plain", fusion=False, expert_stages=2, expert_width=0.5)
    with pytest.raises(ValueError, match=r"strict must take the options num_classes, .*, shortcut: got an unexpected"):
        build("strict", fusion=False, shortcut="pad")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8", {"expert_stages": 0}, "expert_stages must be from 1 to 2, or 'all', got 0"),
        ("resnet8", {"expert_stages": 3}, "expert_stages must be from 1 to 2, or 'all', got 3"),
        ("resnet50", {"expert_stages": "two"}, "expert_stages must be from 1 to 3, or 'all', got 'two'"),
        ("resnet8", {"expert_stages": "all"}, r"no map that experts share and could fuse; take fusion=False"),
        ("resnet8", {"expert_width": 0.7}, r"whole number of channels: 64 \* 0.7 is 44.8"),
        ("resnet8", {"expert_width": 0.0}, r"whole number of channels: 64 \* 0 is 0"),
        ("resnet8", {"expert_width": float("nan")}, r"whole number of channels: 64 \* nan is nan"),
        ("resnet8", {"shortcut": "identity"}, "shortcut must be 'projection' or 'pad', got 'identity'"),
        ("resnet50", {"shortcut": "pad"}, "a bottleneck has the shortcut 'projection', got 'pad'; 'pad' is of basic"),
        ("resnet8", {"shortcut": "pad", "expert_width": 0.25}, "32 channels cannot become 16; use 'projection'"),
        ("resnet8", {"shortcut": "pad", "expert_width": 33 / 64}, "32 channels cannot become 33; use 'projection'"),
        (
            "resnext50_32x4d",
            {"expert_stages": 2, "expert_width": 136 / 256},
            "a bottleneck of width 136 would have 32 groups of 8.5 channels, no whole number; choose another",
        ),
    ],
)
def test_what_does_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        on_meta(name, **options)


@pytest.mark.parametrize("options", [{"expert_stages": 2}, {"expert_stages": "all", "fusion": False}])
def test_plain_weights_go_into_every_expert(tmp_path, options):
    plain = build(num_experts=1, fusion=False)
    weights = {
        key.replace("experts.0.", "layer3."): torch.randn_like(value) if value.is_floating_point() else value + 7
        for key, value in plain.state_dict().items()
        if "classifiers" not in key
    }
    torch.save(weights, tmp_path / "weights.pth")
    model = build(**options)
    report = models.load_pretrained(model, tmp_path / "weights.pth")
    assert all(key.startswith(("fusions.", "classifiers.", "rt_classifiers.")) for key in report.untouched)
    for expert in model.experts:
        assert torch.equal(expert.layer2[0].conv2.weight, weights["layer2.0.conv2.weight"])
        assert torch.equal(expert.layer3[0].bn1.running_var, weights["layer3.0.bn1.running_var"])
    stems = [model] if model.num_shared else [expert.stem for expert in model.experts]
    assert all(torch.equal(stem.conv1.weight, weights["conv1.weight"]) for stem in stems)
