"""One program for every batch size: torch.export with an open batch, and how often torch.compile compiles."""

import copy

import pytest
import torch
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
    "fusion": Fusion,
    "resnet8": lambda: models.create_model("resnet8", num_classes=10, num_experts=3),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return NETWORKS[request.param]()


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_the_batch_open(network, strict):
    network.eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (torch.randn(4, 3, 16, 16),), dynamic_shapes=({0: batch},), strict=strict)
    exported = program.module()
    for size in (2, 4, 7):
        images = torch.randn(size, 3, 16, 16)
        torch.testing.assert_close(exported(images), network(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compile_makes_two_graphs_at_most(network, training):
    network.train(training)
    eager = copy.deepcopy(network)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for size in SIZES:
        images = torch.randn(size, 3, 16, 16)
        logits, expected = compiled(images), eager(images)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        if training:
            logits.sum().backward()
    assert counter.frame_count <= 2
    for mine, theirs in zip(network.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
