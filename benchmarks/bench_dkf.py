"""dkf_pool and dkf_bn_pool, forward and backward, channels-last.

Floor in passes over one map: dkf_pool reads both maps twice and writes two gradients (6); so does dkf_bn_pool, which
with ReLU reads the shallow map once more (7).
"""

import pytest
import torch

from shike_fast import ops

pytestmark = pytest.mark.benchmark(max_time=0.5)

# CIFAR ResNet-32; ResNet-50 with a small batch, on a GPU with a large one
CASES = {"cpu": [(128, 64, 8, 8), (16, 2048, 7, 7)], "cuda": [(128, 64, 8, 8), (256, 2048, 7, 7)]}


def feature_map(shape, device):
    return torch.randn(shape, device=device).to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.op("dkf_pool")
def test_dkf_pool(case, contender, device, prepare, rotate, measure):
    shape, map_bytes = case, 4 * torch.Size(case).numel()
    input_sets = rotate(lambda: (feature_map(shape, device), feature_map(shape, device)), 2 * map_bytes)
    measure(prepare(contender, ops.dkf_pool), input_sets, floor_bytes=6 * map_bytes)


@pytest.mark.op("dkf_bn_pool")
@pytest.mark.parametrize("relu", [False, True], ids=["affine", "relu"])
def test_dkf_bn_pool(case, relu, contender, device, prepare, rotate, measure):
    shape, channels, map_bytes = case, case[1], 4 * torch.Size(case).numel()
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def make():
        gamma = torch.rand(channels, device=device).requires_grad_()
        beta = torch.randn(channels, device=device).requires_grad_()
        return feature_map(shape, device), feature_map(shape, device), gamma, beta

    def call(deep, shallow, gamma, beta, *, backend):
        return ops.dkf_bn_pool(deep, shallow, gamma, beta, mean, var, training=True, relu=relu, backend=backend)

    measure(prepare(contender, call), rotate(make, 2 * map_bytes), floor_bytes=(7 if relu else 6) * map_bytes)
