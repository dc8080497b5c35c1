"""The multi-expert networks: structure, sizes, layouts, initial weights, tracing, errors."""

import copy
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from shike_fast import models, ops


def small(**options):
    return models.create_model("resnet8", **{"num_classes": 10, **options})


def count(model, prefix=""):
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # torchvision's counts without fc (for the CIFAR form: projection shortcuts)
        ("resnet20", 272_474 - 650),
        ("resnet50", 23_508_032),
        ("resnext50_32x4d", 22_979_904),
        ("resnet152", 58_143_808),
    ],
)
def test_one_expert_without_fusion_is_the_plain_network(name, parameters):
    with torch.device("meta"):
        model = models.create_model(name, num_classes=10, num_experts=1, fusion=False)
    assert count(model) - count(model, "classifiers.") - count(model, "rt_classifiers.") == parameters
    assert model.fusions is None


def test_large_form_shares_all_but_the_last_stage():
    with torch.device("meta"):
        model = models.create_model("resnet50", num_classes=1000)
    chains = [[conv.weight.shape[:2] for conv in fusion.convs] for fusion in model.fusions]
    assert chains == [[(512, 256), (1024, 512), (2048, 1024)], [(1024, 512), (2048, 1024)], [(2048, 1024)]]
    with torch.device("meta"):
        plain = models.create_model("resnet50", num_classes=1000, num_experts=1, fusion=False)
    assert count(model, "layer") == count(plain, "layer")
    assert count(model, "experts") == 3 * count(plain, "experts")
    assert model.classifiers.weight.shape == (3, 2048, 1000)


def test_bottleneck_has_its_stride_in_the_3x3_convolution():
    block = models.Bottleneck(16, 8, 2, groups=2, width_per_group=32)
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]
    assert block.conv2.weight.shape == (8, 4, 3, 3)
    assert block(torch.randn(2, 16, 8, 8)).shape == (2, 32, 4, 4)


def test_shallow_maps_alternate_over_the_experts():
    model = small(num_experts=5)
    assert [len(fusion.convs) for fusion in model.fusions] == [2, 1, 2, 1, 2]
    assert [fusion.convs[0].in_channels for fusion in model.fusions] == [16, 32, 16, 32, 16]


def test_features_without_fusion_are_pooled_deep_maps():
    model = small(fusion=False, num_experts=2).eval()
    images = torch.randn(2, 3, 16, 16)
    shared = model.layer2(model.layer1(F.relu(model.bn1(model.conv1(images)))))
    expected = torch.stack([expert(shared).mean((2, 3)) for expert in model.experts])
    torch.testing.assert_close(model.features(images), expected)


def test_forward_is_classify_of_features():
    model = small().eval()
    images = torch.randn(4, 3, 32, 32)
    features = model.features(images)
    assert features.shape == (3, 4, 64)
    for stage in (1, 2):
        assert torch.equal(model(images, stage=stage), model.classify(features, stage))
    assert not torch.allclose(model(images, stage=1), model(images, stage=2))


def test_stage2_parameters_are_the_retrained_classifiers():
    cosine, linear = small(), small(classifier="linear")
    assert [id(p) for p in cosine.stage2_parameters()] == [id(cosine.rt_classifiers.weight)]
    assert {id(p) for p in linear.stage2_parameters()} == {
        id(linear.rt_classifiers.weight),
        id(linear.rt_classifiers.bias),
    }


def test_stage2_reaches_only_its_classifiers_when_the_rest_is_frozen():
    model = small().requires_grad_(False)
    for parameter in model.stage2_parameters():
        parameter.requires_grad_(True)
    images = torch.randn(4, 3, 16, 16)
    assert not model.features(images).requires_grad  # nothing is stored for a backward pass
    model(images, stage=2).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["rt_classifiers.weight"]


def test_convolutions_start_kaiming_normal():
    model = models.create_model("resnet20", num_classes=10)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            values = module.weight.detach()
            std = math.sqrt(2 / values[0].numel())
            assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel())), name
            assert values.abs().max() > 2.2 * std, name  # not the uniform distribution, which ends at 1.73


@pytest.mark.parametrize("size", [4, 8, 28, 33, (17, 30)])
@pytest.mark.parametrize("fusion", [True, False])
def test_odd_sizes(size, fusion):
    height, width = size if isinstance(size, tuple) else (size, size)
    logits = small(fusion=fusion)(torch.randn(2, 3, height, width))
    assert logits.shape == (3, 2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [32, 33, 97])
def test_odd_sizes_of_the_large_form(size):
    with torch.device("meta"):
        model = models.create_model("resnet50", num_classes=10)
        assert model(torch.empty(2, 3, size, size)).shape == (3, 2, 10)


def test_channels_last_gives_the_same():
    model = small().double()
    images = torch.randn(4, 3, 20, 20, dtype=torch.float64)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    expected, logits = model(images), other(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    expected.square().sum().backward()
    logits.square().sum().backward()
    torch.testing.assert_close(other.conv1.weight.grad, model.conv1.weight.grad, rtol=1e-9, atol=1e-9)


def test_deepcopy_is_independent():
    model = small()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv1.weight.zero_()
    assert model.conv1.weight.abs().sum() > 0
    assert twin.description == model.description


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_state_dict_survives_a_file_without_pickled_code(tmp_path, kind):
    model = small(classifier="linear")
    model(torch.randn(4, 3, 16, 16))  # moves the running statistics
    file = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(model.state_dict(), file)
        state = torch.load(file, weights_only=True)
    else:
        safetensors.torch.save_file(model.state_dict(), file)
        state = safetensors.torch.load_file(file)
    again = models.create_model(**model.description)
    again.load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(images), model.eval()(images))


@pytest.mark.parametrize("stage", [1, 2])
def test_compiles_as_one_graph(stage):
    model = small(num_experts=2).double()
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, backend="aot_eager", fullgraph=True)
    images, target = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    losses = []
    for network, run in ((model, model), (compiled_model, compiled)):
        losses.append(ops.dkt_loss(run(images, stage=stage), target))
        losses[-1].backward()
        assert int(network.fusions[0].norms[-1].num_batches_tracked) == 1
    torch.testing.assert_close(losses[1], losses[0])
    for (name, p), q in zip(model.named_parameters(), compiled_model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-8)
    for (name, b), c in zip(model.named_buffers(), compiled_model.buffers(), strict=True):
        torch.testing.assert_close(c, b, msg=lambda message, name=name: f"{name}: {message}")


def test_compiles_under_autocast():
    model = small(num_experts=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = compiled(torch.randn(4, 3, 16, 16))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert model.conv1.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(dtype):
    model = small().eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", dtype=dtype):
            logits = model(images)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 30 * 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 32, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 3, 3, 32),
        torch.zeros(2, 3, 32, 3),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    ],
    ids=["channels", "dimensions", "height", "width", "dtype"],
)
def test_unusable_images(images):
    expected = r"images must be floating \[B, 3, H, W\] with H and W at least 4, got torch\.\w+ \[.*\]"
    with pytest.raises(ValueError, match=expected):
        small()(images)


@pytest.mark.parametrize("stage", [0, 3, "2", None])
def test_unknown_stage(stage):
    with pytest.raises(ValueError, match="stage must be 1 or 2, got"):
        small()(torch.zeros(2, 3, 8, 8), stage=stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"classifier": "euclid"}, "classifier must be 'cosine' or 'linear', got 'euclid'"),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("blocks", [(1,), (1, 0), ()])
def test_a_network_needs_two_stages(blocks):
    with pytest.raises(ValueError, match="two stages or more of at least one block each"):
        models.MultiExpertResNet(models.BasicBlock, blocks, width=4, large_stem=False, num_classes=5)
