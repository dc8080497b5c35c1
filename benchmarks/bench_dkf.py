"""dkf_pool, dkf_bn_pool and dkf_experts, forward and backward, channels-last.

Floor in passes over one map: dkf_pool reads both maps twice and writes two gradients (6); so does dkf_bn_pool, which
with ReLU reads the shallow map once more (7). dkf_experts with the residual end of the deep branch reads the deep and
the shallow map three times and the shortcut twice, and writes three gradients (11). Its peer, PyTorch's own operators
for that end and then dkf_experts without it, moves twice as much.
"""

import pytest
import torch
from torch.nn import functional as F

from shike_fast import ops

pytestmark = pytest.mark.benchmark(max_time=0.5)

# The last stage of CIFAR ResNet-32 and of ResNet-50 at 224 and 448 pixels.
CIFAR, IMAGENET = (128, 64, 8, 8), (32, 2048, 7, 7)
CASES = {
    "cpu": [(shape, torch.float32) for shape in (CIFAR, IMAGENET)],
    "cuda": [
        (CIFAR, torch.float32),
        *((shape, torch.bfloat16) for shape in (CIFAR, (256, 2048, 7, 7), (256, 2048, 14, 14))),
    ],
}
RELU = [False, True, False]  # of three experts: chains of two, one and two convolutions


@pytest.fixture
def feature_map(case, device):
    """Makes a random map; and the bytes of one."""
    shape, dtype = case

    def make():
        values = torch.randn(shape, device=device).to(dtype)
        return values.to(memory_format=torch.channels_last).requires_grad_()

    return make, torch.Size(shape).numel() * dtype.itemsize


@pytest.fixture
def norm(case, device):
    """Makes the arguments of a BatchNorm in training."""
    channels = case[0][1]

    def make():
        gamma, beta = torch.rand(channels, device=device), torch.randn(channels, device=device)
        statistics = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        return ops.BatchNormArguments(gamma.requires_grad_(), beta.requires_grad_(), *statistics, training=True)

    return make


@pytest.mark.op("dkf_pool")
def test_dkf_pool(feature_map, contender, prepare, rotate, measure):
    make, map_bytes = feature_map
    input_sets = rotate(lambda: (make(), make()), 2 * map_bytes)
    measure(prepare(contender, ops.dkf_pool), input_sets, floor_bytes=6 * map_bytes)


@pytest.mark.op("dkf_bn_pool")
@pytest.mark.parametrize("relu", [False, True], ids=["affine", "relu"])
def test_dkf_bn_pool(feature_map, norm, relu, contender, prepare, rotate, measure):
    make, map_bytes = feature_map

    def call(deep, shallow, gamma, beta, mean, var, *, backend):
        return ops.dkf_bn_pool(deep, shallow, gamma, beta, mean, var, training=True, relu=relu, backend=backend)

    input_sets = rotate(lambda: (make(), make(), *norm()[:4]), 2 * map_bytes)
    measure(prepare(contender, call), input_sets, floor_bytes=(7 if relu else 6) * map_bytes)


def expert_inputs(make, norm, kinds):
    """Maps and norms of three experts as one flat tuple: deep and shallow (kinds = 2), and shortcuts (3)."""
    return *(make() for _ in range(3 * kinds)), *(vector for _ in range(3 * kinds - 3) for vector in norm()[:4])


def expert_arguments(inputs, kinds):
    """Deep maps, shallow maps, shortcuts, norms of the shallow maps, norms of the deep ones."""
    maps, vectors = inputs[: 3 * kinds], inputs[3 * kinds :]
    norms = [ops.BatchNormArguments(*vectors[i : i + 4], training=True) for i in range(0, len(vectors), 4)]
    return maps[:3], maps[3:6], maps[6:], norms[:3], norms[3:]


@pytest.mark.op("dkf_experts")
def test_dkf_experts(feature_map, norm, contender, prepare, rotate, measure):
    make, map_bytes = feature_map

    def call(*inputs, backend):
        deep, shallow, _, norms, _ = expert_arguments(inputs, kinds=2)
        return ops.dkf_experts(deep, shallow, norms, relu=RELU, backend=backend)

    input_sets = rotate(lambda: expert_inputs(make, norm, kinds=2), 6 * map_bytes)
    measure(prepare(contender, call), input_sets, floor_bytes=(3 * 6 + sum(RELU)) * map_bytes)


@pytest.mark.op("dkf_experts")
@pytest.mark.parametrize("end", ["residual end"])
def test_dkf_experts_with_residual_end(feature_map, norm, end, contender, prepare, rotate, measure):
    make, map_bytes = feature_map

    def call(*inputs, backend):
        deep, shallow, shortcut, norms, deep_norms = expert_arguments(inputs, kinds=3)
        return ops.dkf_experts(
            deep, shallow, norms, relu=RELU, shortcut=shortcut, deep_norms=deep_norms, backend=backend
        )

    input_sets = rotate(lambda: expert_inputs(make, norm, kinds=3), 9 * map_bytes)
    measure(prepare(contender, call), input_sets, floor_bytes=3 * 11 * map_bytes)


@pytest.mark.op("dkf_experts")
@pytest.mark.parametrize("end", ["residual end"])
def test_peer_residual_end_apart(feature_map, norm, end, device, rotate, measure):
    """PyTorch's BatchNorm, residual and ReLU, then dkf_experts on the deep maps: what folding them in saves."""
    make, map_bytes = feature_map

    def peer(*inputs):
        deep, shallow, shortcut, norms, deep_norms = expert_arguments(inputs, kinds=3)
        ends = []
        for y, added, (weight, bias, mean, var, *_) in zip(deep, shortcut, deep_norms, strict=True):
            out = F.batch_norm(y, mean, var, weight, bias, training=True)
            out += added
            ends.append(F.relu(out, inplace=True))
        return ops.dkf_experts(ends, shallow, norms, relu=RELU)

    input_sets = rotate(lambda: expert_inputs(make, norm, kinds=3), 9 * map_bytes)
    measure(peer, input_sets, floor_bytes=3 * 11 * map_bytes)
