"""BatchFirst: logits [B, K, C] as views, for loops that join batches along dimension 0."""

import pytest
import torch

from shike_fast import models, nn, ops


class Lists(torch.nn.Module):
    def forward(self, images, *, scale=1.0):
        return [scale * images, 2 * scale * images, 3 * scale * images]


def test_it_turns_the_logits_without_a_copy():
    network = models.create_model("resnet8", num_classes=4, num_experts=3).eval()
    images = torch.randn(5, 3, 16, 16)
    expected, logits = network(images), nn.BatchFirst(network)(images)
    assert logits.shape == (5, 3, 4) and torch.equal(logits.transpose(0, 1), expected)
    assert logits.transpose(0, 1).is_contiguous()
    assert nn.BatchFirst(network).state_dict().keys() == {f"network.{name}" for name in network.state_dict()}
    target = torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(ops.dkt_loss(logits.transpose(0, 1), target), ops.dkt_loss(expected, target))


def test_a_list_of_experts():
    images = torch.randn(5, 4)
    logits = nn.BatchFirst(Lists())(images, scale=2.0)
    assert torch.equal(logits, torch.stack([2 * images, 4 * images, 6 * images], 1))
    both = torch.cat([nn.BatchFirst(Lists())(part) for part in images.split(3)])  # batches of 3 and of 2
    assert torch.equal(both, nn.BatchFirst(Lists())(images))


@pytest.mark.parametrize(
    ("output", "error", "got"),
    [(torch.zeros(2, 3), ValueError, r"\[2, 3\]"), ({"logits": 1}, TypeError, "dict"), ([], TypeError, "list")],
)
def test_other_outputs(output, error, got):
    class Network(torch.nn.Module):
        def forward(self):
            return output

    with pytest.raises(error, match=rf"^BatchFirst: the network must return \[K, B, C\], got {got}$"):
        nn.BatchFirst(Network())()
