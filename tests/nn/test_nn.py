"""The modules: classifiers, depth-wise knowledge fusion, losses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn

from shike_fast import nn, ops


@pytest.mark.parametrize("scale", [30.0, 5])
def test_cosine_classifier_matches_its_formula(scale):
    classifier = nn.CosineClassifier(3, 5, 4, scale=scale).double()
    features = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    logits = classifier(features)
    assert logits.shape == (3, 2, 4)
    for k in range(3):
        for b in range(2):
            for c in range(4):
                cosine = F.cosine_similarity(features[k, b], classifier.weight[k, :, c], dim=0)
                assert logits[k, b, c].item() == pytest.approx(scale * cosine.item(), abs=1e-12)
    assert torch.autograd.gradcheck(classifier, (features,))


def test_cosine_classifier_starts_with_columns_of_length_one():
    weight = nn.CosineClassifier(2, 400, 30).weight.detach()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(2, 30))
    # uniform in (-1, 1) before the scaling: the largest entry is sqrt(3) times the standard deviation
    assert (weight.abs().max() / weight.std()).item() == pytest.approx(math.sqrt(3), rel=0.1)
    assert weight.min() < 0 < weight.max()


def test_cosine_classifier_of_zero_features_is_zero():
    classifier = nn.CosineClassifier(1, 4, 3)
    features = torch.zeros(1, 2, 4, requires_grad=True)
    logits = classifier(features)
    assert torch.equal(logits, torch.zeros(1, 2, 3))
    logits.sum().backward()
    assert features.grad.isfinite().all()


def published_cosine(features, weight, scale):
    return scale * F.normalize(features, dim=2) @ F.normalize(weight, dim=1)


def cosine_case(dtype=torch.float64):
    """A classifier with a zero column, and features of which one vector is zero."""
    classifier = nn.CosineClassifier(3, 16, 7).to(dtype)
    with torch.no_grad():
        classifier.weight.mul_(torch.rand(3, 1, 7) + 0.5)
        classifier.weight[1, :, 2] = 0.0
    features = torch.randn(3, 5, 16, dtype=dtype)
    features[2, 3] = 0.0
    return classifier, features.requires_grad_()


def test_cosine_classifier_equals_the_published_expression():
    classifier, features = cosine_case()
    logits, expected = classifier(features), published_cosine(features, classifier.weight, 30.0)
    torch.testing.assert_close(logits, expected, rtol=1e-13, atol=1e-13)
    assert not logits[1, :, 2].any() and not logits[2, 3].any()
    incoming, inputs = torch.randn_like(logits), (features, classifier.weight)
    gradients, theirs = (torch.autograd.grad(z, inputs, incoming) for z in (logits, expected))
    torch.testing.assert_close(gradients, theirs, rtol=1e-12, atol=1e-12)


def test_cosine_classifier_passes_gradcheck_in_features_and_weight():
    classifier = nn.CosineClassifier(2, 4, 3).double()
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def logits(features, weight):
        return torch.func.functional_call(classifier, {"weight": weight}, (features,))

    assert torch.autograd.gradcheck(logits, (features, classifier.weight))
    assert torch.autograd.gradgradcheck(logits, (features, classifier.weight))


def test_cosine_classifier_under_autocast_is_exact_on_rounded_features():
    classifier, features = cosine_case(torch.float32)
    rounded = features.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(rounded)
    exact = published_cosine(rounded.double(), classifier.weight.double(), 30.0)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5
    logits.square().sum().backward()
    assert rounded.grad.dtype == torch.bfloat16 and classifier.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("of_weight", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("of_features", [1e-20, 1.0, 1e15])
def test_cosine_classifier_takes_vectors_of_any_length(of_features, of_weight):
    classifier, features = cosine_case(torch.float32)
    features = (of_features * features.detach()).requires_grad_()
    with torch.no_grad():
        classifier.weight.mul_(of_weight)
    logits = classifier(features)
    exact = published_cosine(features.double(), classifier.weight.double(), 30.0)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    for gradient in torch.autograd.grad(logits.square().sum(), (features, classifier.weight)):
        assert gradient.isfinite().all()


def test_linear_classifier_is_k_linear_layers():
    classifier = nn.LinearClassifier(3, 50, 40).double()
    features = torch.randn(3, 7, 50, dtype=torch.float64)
    for k, logits in enumerate(classifier(features)):
        torch.testing.assert_close(logits, F.linear(features[k], classifier.weight[k].T, classifier.bias[k]))
    assert classifier.weight.std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.1)
    assert 0.9 / math.sqrt(50) < classifier.bias.abs().max() <= 1 / math.sqrt(50)


@pytest.mark.parametrize("kind", [nn.CosineClassifier, nn.LinearClassifier])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_classifiers_work_in_float32_on_half_precision_features(kind, dtype):
    classifier = kind(2, 64, 10)
    features = (1000 * torch.randn(2, 3, 64)).to(dtype)  # in float16 the square of a norm would overflow
    expected = classifier(features.float())
    with torch.autocast("cpu", dtype=dtype):
        logits = classifier(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert classifier(features).dtype == torch.float32
    half = copy.deepcopy(classifier).to(dtype)(features)
    assert half.dtype == torch.float32
    assert half.isfinite().all()


@pytest.mark.parametrize("kind", [nn.CosineClassifier, nn.LinearClassifier])
def test_classifiers_take_a_sequence_of_features(kind):
    classifier = kind(2, 8, 10)
    features = torch.randn(2, 3, 8)
    for sequence in (list(features), tuple(features)):
        assert torch.equal(classifier(sequence), classifier(features))
    name = kind.__name__
    for bad, error, message in (
        (list(features)[:1], ValueError, rf"{name}: features must be \[K=2, B, D=8\], got \[1, 3, 8\]"),
        ([features[0], features[1, :2]], ValueError, rf"{name}: features must be .* got \[\[3, 8\], \[2, 8\]\]"),
        ([], ValueError, rf"{name}: features must be .* got \[\]"),
        ([features[0], None], TypeError, rf"{name}: features must be a tensor .* got list"),
        (features.numpy(), TypeError, rf"{name}: features must be a tensor .* got ndarray"),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            classifier(bad)


@pytest.mark.parametrize("kind", [nn.CosineClassifier, nn.LinearClassifier])
def test_classifiers_reject_bad_input(kind):
    classifier = kind(2, 8, 10)
    for shape in ((2, 8), (3, 4, 8), (2, 4, 9)):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: features must be \[K=2, B, D=8\], got"):
            classifier(torch.zeros(shape))
    for arguments, name in (((0, 8, 10), "num_experts"), ((2, 0, 10), "dim"), ((2, 8, 0), "num_classes")):
        with pytest.raises(ValueError, match=f"{kind.__name__}: {name} must be at least 1, got 0"):
            kind(*arguments)
    assert "num_experts=2, dim=8, num_classes=10" in repr(classifier)


def test_cosine_classifier_shows_and_checks_its_scale():
    assert "scale=12.0" in repr(nn.CosineClassifier(1, 2, 3, scale=12))
    assert nn.CosineClassifier(1, 2, 3, scale=torch.tensor(12.0)).scale == 12.0
    with pytest.raises(TypeError, match=r"^CosineClassifier: scale must be a number, got str$"):
        nn.CosineClassifier(1, 2, 3, scale="12")
    for scale in (0, -1.0, math.nan, math.inf, torch.ones((), requires_grad=True)):
        with pytest.raises(
            ValueError, match=r"^CosineClassifier: scale must (be a positive number|be finite|not requ)"
        ):
            nn.CosineClassifier(1, 2, 3, scale=scale)


@pytest.mark.parametrize("kind", [nn.CosineClassifier, nn.LinearClassifier])
def test_classifiers_hand_their_options_to_the_operator(kind, monkeypatch):
    calls = []
    real = ops.expert_logits
    monkeypatch.setattr(ops, "expert_logits", lambda *args, **options: calls.append(options) or real(*args, **options))
    features = torch.randn(2, 3, 8)
    for options in ({}, {"precision": "high"}, {"backend": "reference"}):
        classifier = kind(2, 8, 10, **options)
        classifier(features)
        given = {"precision": "highest", "backend": None} | options
        assert {name: calls[-1][name] for name in given} == given
        assert f"precision='{given['precision']}'" in repr(classifier)
    assert set(classifier.state_dict()) == ({"weight"} if kind is nn.CosineClassifier else {"weight", "bias"})
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: precision must be 'highest' or 'high', got 'tf32'$"):
        kind(2, 8, 10, precision="tf32")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: the features are on cpu, not on a GPU"):
        kind(2, 8, 10, backend="triton")(features)


@pytest.mark.parametrize("kind", [nn.CosineClassifier, nn.LinearClassifier])
def test_classifiers_of_sixty_experts_compile(kind):
    classifier, features = kind(60, 8, 5), torch.randn(60, 2, 8)
    compiled = torch.compile(classifier, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), classifier(features))
    assert classifier.to("meta")(features.to("meta")).shape == (60, 2, 5)


def plain_fusion(fusion, shallow, deep):
    """The same with plain modules, as published: ReLU after every convolution but the one with index 1."""
    x = shallow
    for i, (conv, norm) in enumerate(zip(fusion.convs, fusion.norms, strict=True)):
        x = norm(conv(x))
        if i != 1:
            x = x.relu()
    return (deep * x).mean((2, 3))


def fusion_case(depth, size=13, channels_out=None):
    torch.manual_seed(depth)
    channels_out = channels_out or 4 * 2**depth
    fusion = nn.DepthwiseKnowledgeFusion(4, channels_out, depth).double()
    for norm in fusion.norms:
        torch_nn.init.uniform_(norm.weight, 0.5, 2.0)
        torch_nn.init.normal_(norm.bias)
    shallow = torch.randn(5, 4, size, size, dtype=torch.float64, requires_grad=True)
    small = math.ceil(size / 2**depth)
    deep = torch.randn(5, channels_out, small, small, dtype=torch.float64, requires_grad=True)
    return fusion, shallow, deep


@pytest.mark.parametrize(
    "variant", ["default", "eval", "cumulative", "untracked", "untracked eval", "tracking off", "not affine"]
)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_fusion_matches_plain_modules(depth, variant):
    fusion, shallow, deep = fusion_case(depth)
    if variant == "cumulative":
        for norm in fusion.norms:
            norm.momentum = None
    elif variant == "tracking off":  # after construction: the buffers are there, and stay as they are
        for norm in fusion.norms:
            norm.track_running_stats = False
    elif variant.startswith("untracked"):
        fusion.norms = torch_nn.ModuleList(
            torch_nn.BatchNorm2d(norm.num_features, track_running_stats=False).double() for norm in fusion.norms
        )
    elif variant == "not affine":
        fusion.norms[-1] = torch_nn.BatchNorm2d(fusion.norms[-1].num_features, affine=False).double()
    plain = copy.deepcopy(fusion)
    if variant != "default":  # statistics other than the initial ones
        with torch.no_grad():
            for factor in (1.0, 3.0):
                fusion(factor * shallow, deep)
                plain_fusion(plain, factor * shallow, deep)
    if variant.endswith("eval"):
        fusion.eval()
        plain.eval()

    pooled, expected = fusion(shallow, deep), plain_fusion(plain, shallow, deep)
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)
    inputs = (shallow, deep)
    grad = torch.randn_like(pooled)
    for ours, theirs in zip(
        torch.autograd.grad(pooled, (*inputs, *fusion.parameters()), grad),
        torch.autograd.grad(expected, (*inputs, *plain.parameters()), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for (name, ours), theirs in zip(fusion.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("depth", "relu"), [(1, True), (2, False), (3, True)])
def test_fusion_runs_the_last_norm_inside_the_operator(monkeypatch, depth, relu):
    fusion, shallow, deep = fusion_case(depth)
    calls = []
    monkeypatch.setattr(
        ops, "dkf_experts", lambda *args, **options: calls.append((args, options)) or torch.zeros(1, 5, 4 * 2**depth)
    )
    assert torch.equal(fusion(shallow, deep), torch.zeros(5, 4 * 2**depth))
    [((deep_maps, _, [norm]), options)] = calls
    assert deep_maps[0] is deep and norm.weight is fusion.norms[-1].weight
    assert options["relu"] == [relu] and options["shortcut"] is None


@pytest.mark.parametrize("depth", [1, 2])
def test_fusion_after_conversion_to_sync_batchnorm(depth):
    fusion, shallow, deep = fusion_case(depth)
    converted = torch_nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fusion))
    assert isinstance(converted.norms[-1], torch_nn.SyncBatchNorm)
    torch.testing.assert_close(converted(shallow, deep), fusion(shallow, deep))
    assert int(converted.norms[-1].num_batches_tracked) == 1
    assert converted.state_dict().keys() == fusion.state_dict().keys()


def test_fusion_freezes_one_norm_on_its_own():
    fusion, shallow, deep = fusion_case(1)
    fusion.norms[0].eval()
    fusion(shallow, deep)
    assert torch.equal(fusion.norms[0].running_mean, torch.zeros(8, dtype=torch.float64))
    assert int(fusion.norms[0].num_batches_tracked) == 0


def test_fusion_takes_any_number_of_deep_channels():
    fusion, shallow, deep = fusion_case(2, channels_out=10)
    assert [tuple(conv.weight.shape[:2]) for conv in fusion.convs] == [(8, 4), (10, 8)]
    assert fusion(shallow, deep).shape == (5, 10)


def test_fusion_rejects_bad_input():
    fusion, shallow, deep = fusion_case(1)
    expected = r"deep must have the shape of the convolved shallow map, \[5, 8, 7, 7\], got \[5, 8, 6, 6\]"
    with pytest.raises(ValueError, match=expected):
        fusion(shallow, deep[:, :, 1:, 1:])
    for arguments, name in (((0, 8, 1), "channels_in"), ((4, 0, 1), "channels_out")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            nn.DepthwiseKnowledgeFusion(*arguments)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.DepthwiseKnowledgeFusion(4, 8, 1)(torch.zeros(1, 4, 2, 2), torch.zeros(1, 8, 1, 1))


def test_fusion_supports_cumulative_averages_when_compiled():
    fusion, shallow, deep = fusion_case(2)
    expected = copy.deepcopy(fusion)(shallow, deep)
    torch.testing.assert_close(torch.compile(fusion, backend="aot_eager", fullgraph=True)(shallow, deep), expected)
