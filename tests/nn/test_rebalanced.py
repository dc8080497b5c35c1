"""Classifiers that re-balance another one, or the features."""

import copy

import pytest
import torch
import torch.nn.functional as F

from shike_fast import nn


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.LinearClassifier(2, 5, 4).double()


@pytest.fixture
def features():
    torch.manual_seed(1)
    return torch.randn(2, 3, 5, dtype=torch.float64)


def test_scales_are_of_weight_and_bias(linear, features):
    scaled = nn.ScaledClassifier(linear)
    assert torch.equal(scaled(features), linear(features))
    with torch.no_grad():
        scaled.scales.uniform_(0.5, 2)
    for k in range(2):
        expected = F.linear(features[k], (linear.weight[k] * scaled.scales[k]).T, linear.bias[k] * scaled.scales[k])
        assert torch.allclose(scaled(features)[k], expected)
    assert list(scaled.state_dict()) == ["scales"] and list(dict(scaled.named_parameters())) == ["scales"]


def test_a_copy_scales_the_copied_classifier(linear, features):
    both = torch.nn.ModuleDict({"first": linear, "second": nn.ScaledClassifier(linear)})
    other = copy.deepcopy(both)
    with torch.no_grad():
        other["first"].weight.zero_()
        other["first"].bias.fill_(3)
    assert (other["second"](features) == 3).all() and not (both["second"](features) == 3).any()


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
def test_normalised_for_the_test_alone(features, tau):
    classifier = nn.NormalizedClassifier(2, 5, 4, tau=tau).double()
    assert torch.allclose(classifier(features), torch.baddbmm(classifier.bias[:, None], features, classifier.weight))
    classifier.eval()
    lengths = classifier.weight.pow(2).sum(1, keepdim=True).sqrt()
    assert torch.allclose(classifier(features), features @ (classifier.weight / lengths**tau))
    assert torch.equal(classifier(list(features)), classifier(features))
    with pytest.raises(ValueError, match="NormalizedClassifier: tau must be a number of at least 0, got -1"):
        nn.NormalizedClassifier(2, 5, 4, tau=-1)


def test_the_nearest_class_mean(features):
    classifier = nn.ClassMeanClassifier(2, 5, 4).double()
    assert not classifier(features).any()  # it has seen nothing
    target = torch.tensor([0, 2, 0])
    classifier.sums += classifier.sums_of(features, target, 4)
    unit = F.normalize(features, dim=2)
    for k in range(2):
        assert torch.allclose(classifier.sums[k, 0], unit[k, 0] + unit[k, 2])
        means = torch.stack([unit[k, 0] + unit[k, 2], unit[k, 1]])
        expected = 10 * unit[k] @ F.normalize(means, dim=1).T
        assert torch.allclose(classifier(features)[k][:, [0, 2]], expected)
    assert not classifier(features)[:, :, [1, 3]].any()  # classes without images
    assert list(dict(classifier.named_parameters())) == ["scale"]


def test_branches():
    torch.manual_seed(0)
    classifier = nn.BranchClassifier(3, 5, 4).double()
    features = torch.randn(1, 6, 5, dtype=torch.float64)
    logits = classifier(features)
    split = F.relu(classifier.norm(classifier.split(features[0]))).view(6, 3, 5)
    assert logits.shape == (3, 6, 4)
    for j in range(3):
        assert torch.allclose(logits[j], classifier.common(split[:, j]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier.float()(features.float()).dtype == torch.float32
