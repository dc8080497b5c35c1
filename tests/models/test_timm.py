"""Networks of timm divided among experts, against timm's own modules."""

import copy
import json
import re
import sys

import pytest
import torch
import torchvision_operators  # noqa: F401  (timm imports torchvision)

from shike_fast import models
from shike_fast.errors import ConfigError
from shike_fast.models import timm_parts
from shike_fast.models.timm_networks import timm_network
from shike_fast.nn import convert_sync_batchnorm

timm = pytest.importorskip("timm")

TOKENS = ("test_vit", "test_vit2", "test_vit3", "test_vit4")  # class token; register, average; attention; no fc_norm
MAPS = ("test_convnext", "test_resnet", "test_efficientnet", "test_byobnet", "test_nfnet", "test_mambaout")
SMALL = (*TOKENS, *MAPS)
LARGER = (  # of the families that docs/models.md names
    *("resnet18", "regnetx_002", "convnextv2_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0", "densenet121"),
    "swinv2_cr_tiny_ns_224",
    *("mobilenetv3_small_050", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"),
    *("vit_xsmall_patch16_clip_224", "vit_base_patch16_siglip_224", "vit_small_patch16_rope_mixed_224"),
)


def network(name="test_vit", **options):
    torch.manual_seed(0)
    return models.create_model(f"timm:{name}", **{"num_classes": 5, **options})


def images_for(model, batch=3, sides=(2, 2)):
    side = model.min_image_size
    return torch.randn(batch, model.in_channels, sides[0] * side, sides[1] * side)


def plain_twin(model, name):
    """The network as timm makes it, with the weights of the trunk and of the first expert."""
    options = {"dynamic_img_size": True} if hasattr(model, "_prefix") else {}
    twin = timm.create_model(name, num_classes=0, in_chans=model.in_channels, **options)
    weights = {model.pretrained_name(key): value for key, value in reversed(model.state_dict().items())}
    weights |= {
        model.pretrained_name(key): value
        for key, value in model.state_dict().items()
        if key.startswith(("trunk.", "experts.0."))
    }
    weights.pop(None, None)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and all("attn_pool" in key for key in missing)
    return twin.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("stages", [None, 2, "all"])
@pytest.mark.parametrize("name", SMALL)
def test_one_expert_without_fusion_is_timms_network(name, stages):
    model = network(name, num_experts=1, fusion=False, classifier="linear", expert_stages=stages).double().eval()
    twin = plain_twin(model, name).eval()
    images = images_for(model).double()
    features = model.features(images)[0]
    expected = twin.forward_head(twin.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(features)
    mine = torch.autograd.grad(features, [p for p in model.parameters() if p.requires_grad], grad, allow_unused=True)
    theirs = torch.autograd.grad(expected, list(twin.parameters()), grad, allow_unused=True)
    names = {model.pretrained_name(key): value for (key, _), value in zip(model.named_parameters(), mine, strict=True)}
    for (key, _), gradient in zip(twin.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(names[key], gradient, rtol=1e-9, atol=1e-9)


def composed(model, twin, name, images, k):
    """Expert k by timm's own feature extraction and a plain product: of maps, or of the tokens of patches."""
    source = model.fused_maps[k]
    if name in TOKENS:
        index = int(source.partition(".")[2])
        deep, (shallow,) = twin.forward_intermediates(images, indices=[index], output_fmt="NLC")
        deep = deep[:, twin.num_prefix_tokens :].transpose(1, 2).unsqueeze(3)
        shallow = shallow.transpose(1, 2).unsqueeze(3)
    else:
        places = [entry["module"] for entry in twin.feature_info]
        deep, (shallow,) = twin.forward_intermediates(images, indices=[places.index(source)])
        deep = deep.permute(0, 3, 1, 2) if deep.shape[3] == twin.num_features else deep
    fusion = model.fusions[k]
    x = shallow
    for i, (conv, norm) in enumerate(zip(fusion.convs, fusion.norms, strict=True)):
        x = norm(conv(x))
        x = x if i == 1 else x.relu()
    pooled = (deep * x).mean((2, 3))
    if name in TOKENS:
        return twin.head_drop(twin.fc_norm(pooled))
    pixel = pooled[:, None, None] if getattr(twin, "output_fmt", "") == "NHWC" else pooled[:, :, None, None]
    return twin.forward_head(pixel, pre_logits=True)


@pytest.mark.parametrize("name", SMALL)
def test_fused_features_equal_a_composition_of_timms_modules(name):
    model = network(name, num_experts=3).double().eval()
    with torch.no_grad():  # experts of one network
        for expert in model.experts[1:]:
            expert.load_state_dict(model.experts[0].state_dict())
    twin = plain_twin(model, name).eval()
    # at its own size timm resamples no position embedding, for which it leaves float64
    images = images_for(model, sides=(10, 10) if name in TOKENS else (2, 2)).double()
    features = model.features(images)
    expected = torch.stack([composed(model, twin, name, images, k) for k in range(3)])
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(features)
    mine = dict(zip((k for k, _ in model.named_parameters()), _gradients(features, model, grad), strict=True))
    theirs = dict(zip((k for k, _ in twin.named_parameters()), _gradients(expected, twin, grad), strict=True))
    for key, gradient in mine.items():
        if key.startswith("trunk."):
            torch.testing.assert_close(gradient, theirs[model.pretrained_name(key)], rtol=1e-8, atol=1e-9)
        if key.startswith("experts.0."):
            own = [mine[key.replace("experts.0.", f"experts.{k}.")] for k in range(3)]
            torch.testing.assert_close(sum(own), theirs[model.pretrained_name(key)], rtol=1e-8, atol=1e-9)


def _gradients(value, module, grad):
    return torch.autograd.grad(value, list(module.parameters()), grad, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
@pytest.mark.parametrize("fusion", [True, False])
def test_every_parameter_is_trained(name, fusion):
    """As DistributedDataParallel wants it; with images of a size that no patch and no stride divides."""
    model = network(name, fusion=fusion)
    side = 2 * model.min_image_size + 1
    logits = model(torch.randn(3, 3, side, side + 3))
    assert logits.shape == (3, 3, 5) and logits.dtype == torch.float32
    logits.square().sum().backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None and weight.requires_grad]
    assert [name for name in lacking if not name.startswith("rt_classifiers.")] == []
    if fusion:
        assert len(model.fused_maps) == len(set(model.fused_maps)) == 3
        assert {fusion.depth for fusion in model.fusions} == ({0} if hasattr(model, "_prefix") else {3, 2, 1})


def test_what_is_shared():
    vit = network("test_vit3", num_experts=4)
    assert [*vit.trunk.net.blocks._modules] == [str(i) for i in range(7)]  # of nine; a quarter is the experts'
    assert [*vit.experts[1].net.blocks._modules] == ["7", "8"]
    assert vit.fused_maps == ("blocks.2", "blocks.4", "blocks.6", "blocks.2")
    assert not any("attn_pool" in key for key in vit.state_dict())  # fused tokens are pooled by their mean
    assert any("attn_pool" in key for key in network("test_vit3", fusion=False).state_dict())
    convnext = network("test_convnext", expert_stages=2)
    assert [*convnext.trunk.net.stages._modules] == ["0", "1"]
    assert convnext.fused_maps == ("stages.0", "stages.1", "stages.0")
    heads = [key for key in convnext.state_dict() if "head" in key]
    assert heads and all(key.startswith("experts.") for key in heads)
    whole = network("test_resnet", expert_stages="all", fusion=False, num_experts=2)
    assert whole.trunk is None and "experts.1.net.conv1.0.weight" in whole.state_dict()
    assert not torch.equal(*(expert.net.layer4[0].conv1.weight for expert in whole.experts))
    efficient = network("test_efficientnet")
    assert (efficient.classifiers.dim, efficient.fusions[0].norms[-1].num_features) == (256, 256)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_vit4"])
def test_the_description_rebuilds_it_without_storage_too(name):
    model = network(name, num_experts=2, in_channels=1, expert_stages=1, classifier="linear")
    description = json.loads(json.dumps(model.description))
    assert description["name"] == f"timm:{name}" and description["expert_stages"] == 1
    again = models.create_model(**description)
    again.load_state_dict(model.state_dict())
    with torch.device("meta"):
        empty = models.create_model(**description)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    images = images_for(model)
    assert torch.equal(again.eval()(images, 2), model.eval()(images, 2))


def test_building_it_draws_the_same_numbers_every_time():
    first, second = network("test_vit").state_dict(), network("test_vit").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    experts = [first[f"experts.{k}.net.blocks.5.mlp.fc1.weight"] for k in range(2)]
    assert not torch.equal(*experts)


def two_steps(model, amp=False):
    torch.manual_seed(1)
    results = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = model(images_for(model).contiguous(memory_format=torch.channels_last)).square().sum()
        loss.backward()
        results += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        results += [buffer.clone() for buffer in model.buffers()]
    return results


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_convnext", "test_resnet"])
def test_recomputation_changes_nothing_whatever_is_dropped(name, amp):
    dropping = {"drop_path_rate": 0.4, "drop_rate": 0.2}
    torch.manual_seed(0)
    model = timm_network(name, num_classes=5, network_options=dropping).to(memory_format=torch.channels_last)
    again = copy.deepcopy(model)
    again.checkpoint_activations = True
    expected, mine = two_steps(model, amp), two_steps(again, amp)
    assert len(mine) == len(expected) and all(map(torch.equal, mine, expected))
    assert not torch.equal(model(images := images_for(model)), model(images))  # it drops


def test_stage_2_trains_its_classifiers_alone():
    model = network("test_vit").requires_grad_(False)
    for weight in model.stage2_parameters():
        weight.requires_grad_(True)
    model(images_for(model), stage=2).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["rt_classifiers.weight"]


def test_a_hook_on_a_fusion_and_on_an_expert_is_called():
    model = network("test_convnext")
    seen = []
    for module in (model.fusions[1], model.experts[2]):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    images = images_for(model)
    model(images)
    assert seen == [model.experts[2], model.fusions[1]]


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet"])
def test_synchronised_batch_norm_keeps_the_activation(name):
    model = network(name)
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    images = images_for(model)
    assert torch.equal(converted(images), model(images))
    assert converted.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet8x", {}, r"timm has no network 'resnet8x'; did you mean resnet\w+"),
        ("test_vit.nosuch", {}, r"timm cannot build 'test_vit.nosuch': Invalid pretrained tag \(nosuch\)"),
        ("", {}, "timm has no network ''"),
        (
            "test_maxvit",
            {},
            "test_maxvit cannot be divided among experts: it fails at images of 64 pixels .*; ResNet, ",
        ),
        ("beit_base_patch16_224", {}, "beit_base_patch16_224 cannot be divided among experts: .* can$"),
        ("test_vit", {"expert_stages": 6}, "expert_stages must be from 1 to 5 blocks, or 'all', got 6"),
        ("test_convnext", {"expert_stages": 4}, "expert_stages must be from 1 to 3 stages, or 'all', got 4"),
        ("test_convnext", {"expert_stages": "all"}, r"no map that experts share and could fuse; take fusion=False"),
        ("test_convnext", {"expert_width": 0.5}, "TimmStages has no option expert_width"),
        ("test_vit", {"shortcut": "pad"}, "TimmTransformer has no option shortcut"),
        ("test_vit", {"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        network(name, **options)


def test_strides_of_another_ratio_are_refused(monkeypatch):
    make = timm_parts.TimmSource.make

    def thirds(self, **options):
        net = make(self, **options)
        for entry, reduction in zip(net.feature_info, (4, 12, 36, 108), strict=True):
            entry["reduction"] = reduction
        return net

    monkeypatch.setattr(timm_parts.TimmSource, "make", thirds)
    message = (
        r"strides of its maps, 4 and 108, have the ratio 27, no power of two, .* take fusion=False \(--no-fusion\)"
    )
    with pytest.raises(ValueError, match=message):
        network("test_convnext")


def test_a_network_that_does_something_between_its_modules_is_refused(monkeypatch):
    make = timm_parts.TimmSource.make

    def doubling(self, **options):
        net = make(self, **options)
        plain = net.forward_features
        net.forward_features = lambda x: 2 * plain(x)
        return net

    monkeypatch.setattr(timm_parts.TimmSource, "make", doubling)
    with pytest.raises(
        ValueError, match=r"test_resnet cannot be divided .*its modules are not called one after the other"
    ):
        network("test_resnet")


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"floating \[B, 3, H, W\] with H and W at least 32, got"):
        network("test_convnext")(torch.zeros(2, 3, 31, 40))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"^a network of timm needs timm: pip install timm$"):
        network()


def test_a_family_is_registered_once(monkeypatch):
    from shike_fast.models import registry

    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    assert models.list_model_families() == ["timm:NAME"] and models.is_model("timm:anything")
    assert not models.is_model("timm") and not models.is_model("vision:timm")

    @models.register_model_family("own")
    def own(name, **options):
        return timm_network(f"test_{name}", **options)

    assert network_of_family("own:vit") == "own:vit"
    with pytest.raises(ValueError, match="a family named 'own' exists already"):
        models.register_model_family("own")(own)
    with pytest.raises(ValueError, match=re.escape("unknown model 'other:vit', known: resnet8,")):
        models.create_model("other:vit", num_classes=3)


def network_of_family(name):
    return models.create_model(name, num_classes=3).description["name"]


def test_timm_is_imported_only_where_it_is_wanted(programs):
    code = "import sys, shike_fast.models as m; m.create_model('resnet8', num_classes=3); print('timm' in sys.modules)"
    assert programs.run([sys.executable, "-c", code]).stdout == "False\n"
