"""``models.init_classifiers``: the class with the largest logit is that of the nearest class mean."""

import pytest
import torch

from shike_fast import models
from shike_fast.errors import ConfigError
from shike_fast.nn import BranchClassifier, ClassMeanClassifier

CLASSES = 6


def some_data(count=40):
    torch.manual_seed(1)
    labels = torch.arange(count) % (CLASSES - 1)  # the last class has no images
    return torch.randn(count, 3, 8, 8) + labels.view(-1, 1, 1, 1), labels


def network(classifier):
    torch.manual_seed(0)
    return models.create_model("resnet8", num_classes=CLASSES, classifier=classifier)


def batches(size=16):
    images, labels = some_data()
    return list(zip(images.split(size), labels.split(size), strict=True))


def all_features(model):
    with torch.no_grad():
        return model.eval().features(some_data()[0])


def test_cosine_classifiers():
    model = network("cosine")
    features = all_features(model)
    model.train()
    random = model.classifiers.weight.detach().clone()
    models.init_classifiers(model, batches())
    assert model.training
    expected = ClassMeanClassifier(3, 64, CLASSES)
    expected.sums += ClassMeanClassifier.sums_of(features, some_data()[1], CLASSES)
    seen = slice(CLASSES - 1)
    logits = expected(features)[..., seen] * 3
    torch.testing.assert_close(model.classify(features)[..., seen], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.classifiers.weight.norm(dim=1), torch.ones(3, CLASSES))
    assert torch.equal(model.classifiers.weight[..., -1], random[..., -1])
    assert torch.equal(model.classifiers.weight[..., seen], model.rt_classifiers.weight[..., seen])


def test_linear_classifiers():
    model = network("linear")
    features = all_features(model)
    labels = some_data()[1]
    untouched = [model.classifiers.bias[:, -1].clone(), model.rt_classifiers.weight.clone()]
    models.init_classifiers(model, batches(), second=False)
    means = torch.stack([features[:, labels == c].mean(1) for c in range(CLASSES - 1)], dim=1)  # [K, C - 1, D]
    distance = torch.cdist(features.double(), means.double())
    logits = model.classify(features)[..., : CLASSES - 1].double()
    spread = (features - features.mean(1, keepdim=True)).square().sum(2).mean(1).double().view(3, 1, 1)
    expected = (features.double().square().sum(2, keepdim=True) / spread - distance.square() / spread) / 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(2), distance.argmin(2))
    assert torch.equal(model.classifiers.bias[:, -1], untouched[0])
    assert torch.equal(model.rt_classifiers.weight, untouched[1])


def test_features_that_are_all_the_same():
    model = network("linear")
    models.init_classifiers(model, batches(), features=lambda images: torch.ones(3, len(images), 64))
    assert model.classifiers.weight.isfinite().all() and model.classifiers.bias.isfinite().all()


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_two_halves_make_a_whole(classifier):
    whole, half = network(classifier), network(classifier)
    models.init_classifiers(whole, batches(20))
    sums = []
    models.init_classifiers(network(classifier), batches(20)[1:], total=lambda values: sums.append(values) or values)
    models.init_classifiers(half, batches(20)[:1], total=lambda values: values + sums.pop(0))
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_other_classifiers_are_refused():
    model = network("linear")
    model.classifiers = BranchClassifier(2, 64, CLASSES)
    with pytest.raises(ConfigError, match="needs cosine or linear classifiers, the network has BranchClassifier; use"):
        models.init_classifiers(model, batches())
    del model.classifiers
    with pytest.raises(ConfigError, match="the network has none"):
        models.init_classifiers(model, batches())
