"""The cosine classifiers of all experts, forward and backward: one batched product against K separate ones.

``batched`` is what runs where no backend is named, ``reference`` PyTorch's product and division. On a GPU ``triton``
and ``triton, TF32`` are the kernels by name, and ``reference, TF32`` is PyTorch with TF32 allowed.

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


def separate(features, weight):
    """As the published code does it: normalise, multiply and scale, expert by expert."""
    logits = [F.normalize(f, dim=1) @ F.normalize(w, dim=0) * 30.0 for f, w in zip(features, weight, strict=True)]
    return torch.stack(logits)


SEPARATE = ("K calls", "compiled K calls")
BATCHED = {"batched": {}, "reference": {"backend": "reference"}}
ON_GPU = {  # those that a CPU has not, or takes no notice of
    "triton": {"backend": "triton"},
    "triton, TF32": {"backend": "triton", "precision": "high"},
    "reference, TF32": {"backend": "reference"},
}


@pytest.fixture
def allowed(variant):
    """TF32 for PyTorch's products, in the variants that say so."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or variant == "reference, TF32"
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.op("CosineClassifier")
@pytest.mark.parametrize("variant", [*BATCHED, *SEPARATE, *ON_GPU])
@pytest.mark.usefixtures("allowed")
def test_cosine_classifier(variant, case, device, rotate, measure):
    if variant in ON_GPU and device.type == "cpu":
        pytest.skip("a variant for GPUs")
    experts, batch, dim, classes = case
    classifier = nn.CosineClassifier(experts, dim, classes, **(BATCHED | ON_GPU).get(variant, {})).to(device)
    call = separate
    if variant == "compiled K calls":
        torch._dynamo.reset()
        call = torch.compile(separate, fullgraph=True)
    elif variant not in SEPARATE:
        call = lambda f, w: torch.func.functional_call(classifier, {"weight": w}, (f,))  # noqa: E731

    def make():
        features = torch.rand(experts, batch, dim, device=device)
        return features.requires_grad_(), classifier.weight.detach().clone().requires_grad_()

    features, weights, logits = experts * batch * dim, experts * dim * classes, experts * batch * classes
    measure(call, rotate(make, 4 * (features + weights)), floor_bytes=4 * (3 * features + 3 * weights + 3 * logits))
