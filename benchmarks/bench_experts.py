"""Ways to run the last stages of K = 3 experts, which have one shape and read one map; forward and backward.

- ``separate``: one after the other, as the models do.
- ``first convolutions concatenated``: those that read the shared map, the first of the branch and the shortcut's, as
  one convolution to K times the channels, split afterwards.
- ``grouped``: one stage of K times the channels: the first convolutions concatenated, the others in K groups, one
  BatchNorm for all.
- ``batched 1x1`` (bottlenecks): the 1x1 convolutions of all experts as one batched matrix product.
- On a GPU ``separate in a graph`` (recorded as a CUDA graph), and ``streams``: in that graph each expert on a stream of
  its own.

Each way holds its parameters in the form it wants, and the maps end in the mean over their positions, which stands in
for the fusion. All give the same means and the same gradient of the shared map, which is checked first, in float32.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shike_fast import models
from shike_fast.engine.precision import make_autocast
from shike_fast.models.resnet import BasicBlock, Bottleneck

Way = Callable[[Tensor], Tensor]  # [B, C, H, W] -> [K, B, D]


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    shape: tuple[int, int, int, int]
    amp: str
    calls: int
    rounds: int

    def __str__(self) -> str:
        precision = "float32" if self.amp == "off" else f"{self.amp} autocast"
        return f"{self.model}, {self.shape}, {precision}"


# Relative errors of the means and of the shared map's gradient between two ways, in float32. Sums in another order
# differ by 1e-6; the gradient differs where a value that near to zero falls on the other side of a ReLU.
CHECK = (1e-5, 1e-2)
SMALL = (128, 32, 16, 16)
CASES = {
    "cpu": [
        Case("resnet32", SMALL, "off", calls=4, rounds=5),
        Case("resnet50", (8, 1024, 14, 14), "off", calls=1, rounds=5),
    ],
    "cuda": [
        Case("resnet32", SMALL, "off", calls=100, rounds=7),
        Case("resnet32", SMALL, "bf16", calls=100, rounds=7),
        Case("resnet50", (64, 1024, 14, 14), "bf16", calls=20, rounds=7),
    ],
}


def separate(stages: Sequence[nn.Sequential]) -> Way:
    return lambda x: torch.stack([positions_mean(stage(x)) for stage in stages])


def positions_mean(maps: Tensor) -> Tensor:
    return maps.mean(dim=(2, 3))


def first_concatenated(stages: Sequence[nn.Sequential]) -> Way:
    first = [stage[0] for stage in stages]
    conv1 = one_convolution([block.conv1 for block in first], groups=1)
    projection = one_convolution([block.downsample[0] for block in first], groups=1)

    def run(x: Tensor) -> Tensor:
        branches, shortcuts = (conv(x).chunk(len(stages), dim=1) for conv in (conv1, projection))
        means = []
        for stage, y, shortcut in zip(stages, branches, shortcuts, strict=True):
            out = block_after_first(stage[0], y, shortcut)
            for block in stage[1:]:
                out = block(out)
            means.append(positions_mean(out))
        return torch.stack(means)

    return run


def block_after_first(block: BasicBlock | Bottleneck, y: Tensor, shortcut: Tensor) -> Tensor:
    """The rest of a block, from what its first convolution and its shortcut's give."""
    out = block.conv2(F.relu(block.bn1(y), inplace=True))
    if isinstance(block, Bottleneck):
        out = block.conv3(F.relu(block.bn2(out), inplace=True))
    out = block.last_norm(out)
    out += block.downsample[1](shortcut)
    return F.relu(out, inplace=True)


def one_convolution(convs: Sequence[nn.Conv2d], groups: int) -> nn.Conv2d:
    """The convolutions of all experts in one: reading the same map (``groups`` = 1), or each its own (K)."""
    one = convs[0]
    conv = nn.Conv2d(
        groups * one.in_channels,
        len(convs) * one.out_channels,
        one.kernel_size,
        stride=one.stride,
        padding=one.padding,
        groups=groups,
        bias=False,
    )
    conv.weight = nn.Parameter(torch.cat([conv.weight.detach() for conv in convs]))
    return conv.to(memory_format=torch.channels_last)


def one_norm(norms: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(sum(norm.num_features for norm in norms)).to(norms[0].weight)
    norm.load_state_dict(
        {
            name: values if values.dim() == 0 else torch.cat([norm.state_dict()[name] for norm in norms])
            for name, values in norms[0].state_dict().items()
        }
    )
    return norm


def grouped(stages: Sequence[nn.Sequential]) -> Way:
    whole = copy.deepcopy(stages[0])
    for name, module in stages[0].named_modules():
        members = [stage.get_submodule(name) for stage in stages]
        if isinstance(module, nn.Conv2d):
            reads_shared = name in ("0.conv1", "0.downsample.0")
            whole.set_submodule(name, one_convolution(members, groups=1 if reads_shared else len(stages)))
        elif isinstance(module, nn.BatchNorm2d):
            whole.set_submodule(name, one_norm(members))

    return lambda x: positions_mean(whole(x)).view(len(x), len(stages), -1).transpose(0, 1)


def batched_1x1(stages: Sequence[nn.Sequential]) -> Way:
    """Maps as rows, [K, B·H·W, C], which channels-last maps are without a copy; put side by side they are copied."""
    levels = list(zip(*stages, strict=True))  # the blocks of all experts, one after the other
    weights = [
        {
            name: nn.Parameter(torch.stack([one_by_one(block.get_submodule(name)) for block in blocks]))
            for name in ("conv1", "conv3", "downsample.0")
            if name != "downsample.0" or blocks[0].downsample is not None
        }
        for blocks in levels
    ]

    def level(blocks: Sequence[Bottleneck], weight: dict[str, Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        shortcuts = list(maps)
        if "downsample.0" in weight:
            stride = blocks[0].downsample[0].stride[0]
            strided = [x[:, :, ::stride, ::stride] for x in maps[:1]]  # the shared map
            products = multiply(strided, weight["downsample.0"])
            shortcuts = [block.downsample[1](y) for block, y in zip(blocks, products, strict=True)]
        outs = multiply(maps, weight["conv1"])
        outs = [F.relu(block.bn1(y), inplace=True) for block, y in zip(blocks, outs, strict=True)]
        outs = [block.bn2(block.conv2(y)) for block, y in zip(blocks, outs, strict=True)]
        outs = multiply([F.relu(y, inplace=True) for y in outs], weight["conv3"])
        ends = [block.bn3(y).add_(s) for block, y, s in zip(blocks, outs, shortcuts, strict=True)]
        return [F.relu(y, inplace=True) for y in ends]

    def run(x: Tensor) -> Tensor:
        maps = [x]
        for blocks, weight in zip(levels, weights, strict=True):
            maps = level(blocks, weight, maps)
        return torch.stack([positions_mean(y) for y in maps])

    return run


def one_by_one(conv: nn.Conv2d) -> Tensor:
    """The weight of a 1x1 convolution as a matrix [C_in, C_out]."""
    return conv.weight.detach().flatten(1).t().contiguous()


def multiply(maps: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """1x1 convolutions: K maps, or one for all, times weight [K, C_in, C_out] -> K maps."""
    batch, channels, height, width = maps[0].shape
    rows = [x.permute(0, 2, 3, 1).reshape(-1, channels) for x in maps]
    operand = torch.stack(rows) if len(rows) > 1 else rows[0].expand(len(weight), -1, -1)
    products = torch.bmm(operand, weight)
    return [y.view(batch, height, width, -1).permute(0, 3, 1, 2) for y in products]


def on_streams(stages: Sequence[nn.Sequential]) -> Way:
    streams = [torch.cuda.Stream() for _ in stages]

    def run(x: Tensor) -> Tensor:
        here = torch.cuda.current_stream()
        means = []
        for stage, stream in zip(stages, streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                means.append(positions_mean(stage(x)))
        for stream, mean in zip(streams, means, strict=True):
            here.wait_stream(stream)
            mean.record_stream(here)
        return torch.stack(means)

    return run


def ways(stages: Sequence[nn.Sequential], device: torch.device) -> dict[str, tuple[Way, bool]]:
    """Each way, and whether it is recorded as a CUDA graph. They share no parameters."""

    def own() -> list[nn.Sequential]:
        return [copy.deepcopy(stage) for stage in stages]

    named = {
        "separate": (separate(own()), False),
        "first convolutions concatenated": (first_concatenated(own()), False),
        "grouped": (grouped(own()), False),
    }
    if isinstance(stages[0][0], Bottleneck):
        named["batched 1x1"] = (batched_1x1(own()), False)
    if device.type == "cuda":
        named["separate in a graph"] = (separate(own()), True)
        named["streams"] = (on_streams(own()), True)
    return named


def forward_backward(way: Way, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The means and the gradient of the shared map; those of the parameters are added up in them."""
    means = way(x)
    means.backward(gradient)
    assert x.grad is not None
    result, x.grad = x.grad, None
    return means.detach(), result


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    """``call`` from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


@contextlib.contextmanager
def full_float32():
    """Without TensorFloat-32, which rounds to ten bits."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.op("last stages of three experts")
def test_experts(case, device, peak_memory, side_by_side):
    model = models.create_model(case.model, num_classes=10).to(device)
    stages = [stage.to(memory_format=torch.channels_last) for stage in model.experts]
    x = torch.rand(case.shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        gradient = torch.randn_like(separate([copy.deepcopy(stage) for stage in stages])(x))
    autocast = make_autocast(case.amp, device)
    calls, facts, expected = {}, {}, None
    for name, (way, in_graph) in ways(stages, device).items():
        with full_float32():
            results = forward_backward(way, x, gradient)
        expected = expected or results
        for got, wanted, most in zip(results, expected, CHECK, strict=True):
            error = (torch.linalg.vector_norm(got - wanted) / torch.linalg.vector_norm(wanted)).item()
            assert error <= most, (name, error)

        def call(way: Way = way) -> None:
            with autocast():
                means = way(x)
            means.backward(gradient.to(means.dtype))
            x.grad = None

        facts[name] = {"peak_extra_bytes": peak_memory(call)}
        calls[name] = recorded(call) if in_graph else call
    side_by_side(calls, images=case.shape[0], calls=case.calls, rounds=case.rounds, facts=facts)
