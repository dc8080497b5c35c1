"""The cosine classifiers of all experts, forward and backward: one batched product against K separate ones.

Floor: features and weights are read twice, their gradients and the logits written once, the logits' gradient read
twice.
"""

import pytest
import torch
from torch.nn import functional as F

from shike_fast import nn

pytestmark = pytest.mark.benchmark(max_time=0.5)

# [K, B, D] x [K, D, C] of CIFAR-100-LT, ImageNet-LT and iNaturalist 2018
CIFAR, IMAGENET, INATURALIST = (3, 128, 64, 100), (3, 64, 2048, 1000), (3, 64, 2048, 8142)
CASES = {"cpu": [CIFAR, IMAGENET, INATURALIST], "cuda": [CIFAR, (3, 256, 2048, 1000), (3, 256, 2048, 8142)]}


def batched(classifier):
    return classifier


def separate(classifier):
    """As the published code does it: normalise, multiply and scale, expert by expert."""

    def run(features, weight):
        logits = [F.normalize(f, dim=1) @ F.normalize(w, dim=0) * 30.0 for f, w in zip(features, weight, strict=True)]
        return torch.stack(logits)

    return run


def compiled_separate(classifier):
    torch._dynamo.reset()
    return torch.compile(separate(classifier), fullgraph=True)


VARIANTS = {"batched": batched, "K calls": separate, "compiled K calls": compiled_separate}


@pytest.mark.op("CosineClassifier")
@pytest.mark.parametrize("variant", VARIANTS)
def test_cosine_classifier(variant, case, device, rotate, measure):
    experts, batch, dim, classes = case
    classifier = nn.CosineClassifier(experts, dim, classes).to(device)
    call = VARIANTS[variant](lambda f, w: torch.func.functional_call(classifier, {"weight": w}, (f,)))

    def make():
        features = torch.rand(experts, batch, dim, device=device)
        return features.requires_grad_(), classifier.weight.detach().clone().requires_grad_()

    features, weights, logits = experts * batch * dim, experts * dim * classes, experts * batch * classes
    measure(call, rotate(make, 4 * (features + weights)), floor_bytes=4 * (3 * features + 3 * weights + 3 * logits))
