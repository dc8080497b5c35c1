"""Networks on two processes: SyncBatchNorm in the fusion, on the CPU too, and DistributedDataParallel."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shike_fast import models
from shike_fast.nn import DepthwiseKnowledgeFusion, fuse_experts

ROWS = (slice(0, 4), slice(4, 6))
VARIANTS = ("fusion", "fusion of depth 2", "residual end", "frozen deep norms", "cumulative average")


def sync(module: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if dist.is_initialized() else module


class Ends(nn.Module):
    """Two fusions and the norms of the two deep branches that they end."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(VARIANTS.index(variant))
        self.depth = 2 if variant == "fusion of depth 2" else 1
        self.residual = variant in ("residual end", "frozen deep norms")
        self.fusions = nn.ModuleList(DepthwiseKnowledgeFusion(3, 8, self.depth) for _ in range(2))
        self.deep_norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        last_norms = [*self.deep_norms, *(fusion.norms[-1] for fusion in self.fusions)]
        for norm in last_norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        if variant == "cumulative average":
            for norm in last_norms:
                norm.momentum = None
        self.double()
        for fusion in self.fusions:  # PyTorch has no SyncBatchNorm for the CPU: only the operator can stand in for one
            fusion.norms[-1] = sync(fusion.norms[-1])
        if self.depth == 1:
            sync(self)
        if variant == "frozen deep norms":
            self.deep_norms.eval()

    def forward(self, shallow: torch.Tensor, deep: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        if not self.residual:
            return torch.stack([fusion(shallow, deep) for fusion in self.fusions])
        pairs = [[map_, 2 * map_] for map_ in (shallow, deep, shortcut)]
        return fuse_experts(self.fusions, *pairs[:2], shortcut=pairs[2], deep_norms=self.deep_norms)


def two_steps(variant: str, rows: slice) -> dict[str, list[torch.Tensor]]:
    ends = Ends(variant)
    size = 16 // 2**ends.depth
    shapes = ((6, 3, 15, 16), (6, 8, size, size), (6, 8, size, size))
    results = {"f": [], "maps": [], "parameters": [], "buffers": []}
    for _ in range(2):
        maps = [torch.randn(shape, dtype=torch.float64)[rows].clone().requires_grad_() for shape in shapes]
        incoming = torch.randn(2, 6, 8, dtype=torch.float64)[:, rows]
        f = ends(*maps)
        f.backward(incoming)
        results["f"].append(f.detach().transpose(0, 1))
        results["maps"] += [map_.grad for map_ in maps if map_.grad is not None]
    results["parameters"] = [p.grad for p in ends.parameters() if p.grad is not None]
    results["buffers"] = [*ends.buffers()]
    return results


def two_steps_here() -> dict[str, dict[str, list[torch.Tensor]]]:
    return {variant: two_steps(variant, ROWS[dist.get_rank()]) for variant in VARIANTS}


@pytest.fixture(scope="module")
def processes(two_processes):
    return two_processes(two_steps_here)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "fusion of depth 2"])
def test_synchronised_fusion_equals_one_process_with_the_whole_batch(processes, variant):
    parts, whole = [process[variant] for process in processes], two_steps(variant, slice(0, 6))
    joined = {
        "f": map(torch.cat, zip(*(part["f"] for part in parts), strict=True)),
        "maps": map(torch.cat, zip(*(part["maps"] for part in parts), strict=True)),
        "parameters": map(torch.add, *(part["parameters"] for part in parts)),
    }
    for field, mine in joined.items():
        for ours, theirs in zip(mine, whole[field], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, f=field: f"{f}: {m}")
    for part in parts:
        torch.testing.assert_close(part["buffers"], whole["buffers"], rtol=1e-12, atol=1e-12)


def test_only_the_last_norm_of_a_chain_needs_to_be_synchronised(processes):
    first, second = (process["fusion of depth 2"]["buffers"] for process in processes)
    names = [name for name, _ in Ends("fusion of depth 2").named_buffers()]
    equal = {name for name, a, b in zip(names, first, second, strict=True) if torch.equal(a, b)}
    assert {"fusions.0.norms.1.running_mean", "fusions.1.norms.1.running_var"} <= equal
    assert not {"fusions.0.norms.0.running_mean", "fusions.1.norms.0.running_var"} & equal


# ---- a network


def network() -> models.MultiExpertResNet:
    torch.manual_seed(0)
    model = models.create_model("resnet8", num_classes=10).double()
    model.rt_classifiers.requires_grad_(False)  # stage 1 has no gradient for them
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(10, (6,))


def gradients_of(model: nn.Module, images: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits.flatten(0, 1), target.repeat(len(logits))).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def train_here() -> dict[str, list]:
    model, rows = network(), ROWS[dist.get_rank()]
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    alone, together = [], []
    for _ in range(2):
        images, target = batch()
        alone.append(gradients_of(copy.deepcopy(model), images[rows], target[rows]))
        together.append(gradients_of(parallel, images[rows], target[rows]))
        optimizer.step()
    return {"alone": alone, "together": together, "parameters": [*model.parameters()], "buffers": model.state_dict()}


@pytest.fixture(scope="module")
def trained(two_processes):
    return two_processes(train_here)


def test_parallel_networks_keep_the_same_parameters(trained):
    first, second = (process["parameters"] for process in trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], network().conv1.weight)


def test_parallel_gradients_are_means_of_what_the_processes_compute_alone(trained):
    for step in range(2):
        means = [(a + b) / 2 for a, b in zip(*(process["alone"][step] for process in trained), strict=True)]
        for process in trained:
            torch.testing.assert_close(process["together"][step], means, rtol=1e-12, atol=1e-14)


def test_parallel_networks_have_running_statistics_of_their_own(trained):
    first, second = (process["buffers"] for process in trained)
    for name in first:
        if "running" in name:
            assert not torch.equal(first[name], second[name]), name
        if "num_batches_tracked" in name:
            assert first[name] == second[name] == 2, name


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_without_a_process_group_is_batch_norm(training):
    plain = network().train(training)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synchronised.experts[0][-1].bn2, nn.SyncBatchNorm)
    images, target = batch()
    expected, actual = (gradients_of(model, images, target) for model in (plain, synchronised))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in synchronised.state_dict().items())
    assert torch.equal(synchronised(images), plain(images))
