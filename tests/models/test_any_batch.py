"""One program for every batch size: torch.export with an open batch, and how often torch.compile compiles."""

import copy

import pytest
import torch
import torchvision_operators  # noqa: F401  (timm imports torchvision)
from torch._dynamo.testing import CompileCounterWithBackend

from shike_fast import models, nn

SIZES = (16, 15, 12, 9, 7, 6, 5, 4, 3, 2)


class Fusion(torch.nn.Module):
    """DepthwiseKnowledgeFusion of images: its shallow map, and a deep one made from it."""

    def __init__(self):
        super().__init__()
        self.fusion = nn.DepthwiseKnowledgeFusion(3, 6, 1)
        self.deep = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)

    def forward(self, images):
        return self.fusion(images, self.deep(images))


NETWORKS = {
    "fusion": (16, Fusion),
    "resnet8": (16, lambda: models.create_model("resnet8", num_classes=10, num_experts=3)),
    "timm:test_vit": (32, lambda: models.create_model("timm:test_vit", num_classes=10)),
    "timm:test_vit3 without fusion": (32, lambda: models.create_model("timm:test_vit3", num_classes=10, fusion=False)),
    "timm:test_convnext": (64, lambda: models.create_model("timm:test_convnext", num_classes=10)),
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name.startswith("timm:") else name for name in NETWORKS]
)
def network(request):
    if request.param.startswith("timm:"):
        pytest.importorskip("timm")
    torch._dynamo.reset()
    torch.manual_seed(0)
    side, build = NETWORKS[request.param]
    made = build()
    made.side = side
    return made


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_the_batch_open(network, strict):
    network.eval()
    side, batch = network.side, torch.export.Dim("batch", min=2)
    images = torch.randn(4, 3, side, side)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=strict)
    exported = program.module()
    for size in (2, 4, 7):
        images = torch.randn(size, 3, side, side)
        torch.testing.assert_close(exported(images), network(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compile_makes_two_graphs_at_most(network, training):
    network.train(training)
    eager = copy.deepcopy(network)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for size in SIZES:
        images = torch.randn(size, 3, network.side, network.side)
        logits, expected = compiled(images), eager(images)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        if training:
            logits.sum().backward()
    assert counter.frame_count <= 2
    for mine, theirs in zip(network.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
