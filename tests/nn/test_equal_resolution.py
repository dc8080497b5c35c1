"""DepthwiseKnowledgeFusion of maps of one size, and of tokens [B, N, C]."""

import copy

import pytest
import torch
import torch.nn.functional as F

from shike_fast import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def fusion(channels_in=5, channels_out=6):
    module = nn.DepthwiseKnowledgeFusion(channels_in, channels_out, depth=0).double()
    torch.nn.init.normal_(module.norms[0].weight)
    torch.nn.init.normal_(module.norms[0].bias)
    return module


def plain(module, shallow, deep):
    """On tokens, in plain PyTorch: a linear layer, BatchNorm over batch and positions, ReLU, product, mean."""
    x = F.linear(shallow, module.convs[0].weight.flatten(1)).transpose(1, 2)
    norm = module.norms[0]
    arguments = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training
    return (deep * F.batch_norm(x, *arguments).relu().transpose(1, 2)).mean(1)


@pytest.mark.parametrize("training", [True, False])
def test_tokens_equal_their_plain_composition(training):
    module = fusion().train(training)
    twin = copy.deepcopy(module)
    inputs = [torch.randn(4, 7, channels).double().requires_grad_() for channels in (5, 6)]
    results = []
    for run, own in ((module, module), (lambda *pair: plain(twin, *pair), twin)):
        f = run(*inputs)
        results.append([f, *torch.autograd.grad(f.square().sum(), [*inputs, *own.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.norms[0].running_var, twin.norms[0].running_var)


def test_a_map_is_its_pixels_as_tokens():
    module, twin = fusion(), fusion()
    twin.load_state_dict(module.state_dict())
    maps = [torch.randn(4, channels, 3, 5).double() for channels in (5, 6)]
    torch.testing.assert_close(module(*maps), twin(*(x.flatten(2).transpose(1, 2) for x in maps)))


def test_experts_with_maps_of_other_and_of_the_same_size_are_one_operator():
    fusions = [nn.DepthwiseKnowledgeFusion(c, 6, depth).double() for c, depth in ((3, 1), (5, 0))]
    twins = copy.deepcopy(fusions)
    shallow = [torch.randn(4, 3, 6, 10).double(), torch.randn(4, 5, 3, 5).double()]
    deep = [torch.randn(4, 6, 3, 5).double() for _ in range(2)]
    expected = torch.stack([module(*pair) for module, *pair in zip(twins, shallow, deep, strict=True)])
    torch.testing.assert_close(nn.fuse_experts(fusions, shallow, deep), expected)


def test_where_the_last_norm_is_replaced_tokens_are_fused_too():
    module = fusion()
    module.norms[0] = torch.nn.GroupNorm(2, 6).double()
    shallow, deep = torch.randn(4, 7, 5).double(), torch.randn(4, 7, 6).double()
    x = module.norms[0](F.linear(shallow, module.convs[0].weight.flatten(1)).transpose(1, 2))
    torch.testing.assert_close(module(shallow, deep), (deep * x.relu().transpose(1, 2)).mean(1))


def test_under_autocast_and_in_one_graph():
    torch._dynamo.reset()
    module = nn.DepthwiseKnowledgeFusion(5, 6, 0)
    shallow, deep = torch.randn(4, 7, 5), torch.randn(4, 7, 6)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(shallow, deep), module(shallow, deep))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(shallow, deep), module.float()(shallow, deep))


@pytest.mark.parametrize(
    ("depth", "shapes", "message"),
    [
        (-1, None, "depth must be at least 0, got -1"),
        (1, ((4, 9, 5), (4, 3, 6)), r"tokens \[B, N, C\] have no rows to halve, which depth=1 does .*or use depth=0"),
        (
            0,
            ((4, 9, 5), (4, 8, 6)),
            r"convolved shallow map, \[4, 9, 6\], got \[4, 8, 6\] \(shallow \[4, 9, 5\], 0 strided",
        ),
        (0, ((4, 5, 9, 1), (4, 9, 6)), r"convolved shallow map, \[4, 6, 9, 1\], got \[4, 9, 6\]"),
    ],
)
def test_errors(depth, shapes, message):
    with pytest.raises(ValueError, match=f"^DepthwiseKnowledgeFusion: .*{message}"):
        nn.DepthwiseKnowledgeFusion(5, 6, depth)(*map(torch.randn, shapes))
