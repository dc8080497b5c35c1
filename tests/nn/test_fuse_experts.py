"""fuse_experts: all experts in one operator, against a call of DepthwiseKnowledgeFusion for each."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn

from shike_fast import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def experts_case(residual):
    """Fusions of depths 3, 2 and 1 as in a network, their shallow and deep maps, and the ends of the deep branches."""
    torch.manual_seed(0)
    fusions = torch_nn.ModuleList(nn.DepthwiseKnowledgeFusion(c, 8, depth) for c, depth in ((2, 3), (3, 2), (5, 1)))
    deep_norms = torch_nn.ModuleList(torch_nn.BatchNorm2d(8) for _ in range(3))
    experts = torch_nn.ModuleDict({"fusions": fusions, "deep_norms": deep_norms}).double()
    for module in experts.modules():
        if isinstance(module, torch_nn.BatchNorm2d):
            torch_nn.init.normal_(module.weight)
            torch_nn.init.normal_(module.bias)
            torch_nn.init.uniform_(module.running_var, 0.5, 2.0)
    shapes = [(4, 2, 17, 24), (4, 3, 9, 12), (4, 5, 5, 6)] + [(4, 8, 3, 3)] * (6 if residual else 3)
    maps = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return experts, maps


def fuse_one_by_one(experts, shallow, deep, shortcut):
    if shortcut:
        deep = [F.relu(norm(y) + s) for norm, y, s in zip(experts["deep_norms"], deep, shortcut, strict=True)]
    return torch.stack([fusion(x, y) for fusion, x, y in zip(experts["fusions"], shallow, deep, strict=True)])


def fuse_at_once(experts, shallow, deep, shortcut):
    ends = {"shortcut": shortcut, "deep_norms": experts["deep_norms"]} if shortcut else {}
    return nn.fuse_experts(experts["fusions"], shallow, deep, **ends)


def leave_all(norms):
    pass


def freeze_one(norms):
    norms[1].eval()


def freeze_all(norms):
    for norm in norms:
        norm.eval()


def average_one(norms):
    norms[0].momentum = None


def untrack_one(norms):
    norms[2].track_running_stats = False


def watch_one(norms):
    norms[1].register_forward_hook(lambda *_: None)


def replace_one(norms):
    norms[0] = torch_nn.GroupNorm(2, 8).double()


def change_shallow_norms(experts, change):
    norms = [fusion.norms[-1] for fusion in experts["fusions"]]
    change(norms)
    for fusion, norm in zip(experts["fusions"], norms, strict=True):
        fusion.norms[-1] = norm


def change_deep_norms(experts, change):
    change(experts["deep_norms"])


CHANGES = [leave_all, freeze_one, freeze_all, average_one, untrack_one, watch_one, replace_one]


@pytest.mark.parametrize(
    ("side", "residual"), [(change_shallow_norms, False), (change_shallow_norms, True), (change_deep_norms, True)]
)
@pytest.mark.parametrize("change", CHANGES)
def test_experts_fused_at_once_equal_experts_fused_one_by_one(residual, change, side):
    experts, maps = experts_case(residual)
    side(experts, change)
    twin = copy.deepcopy(experts)
    for _ in range(2):
        results = []
        for module, fuse in ((experts, fuse_at_once), (twin, fuse_one_by_one)):
            f = fuse(module, maps[:3], maps[3:6], maps[6:])
            parameters = [p for name, p in module.named_parameters() if residual or "deep_norms" not in name]
            results.append([f, *torch.autograd.grad(f.square().sum(), [*maps, *parameters])])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close([*experts.buffers()], [*twin.buffers()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
def test_evaluation_leaves_the_running_statistics(residual):
    experts, maps = experts_case(residual)
    before = copy.deepcopy(experts.eval().state_dict())
    results = [fuse(experts, maps[:3], maps[3:6], maps[6:]) for fuse in (fuse_at_once, fuse_one_by_one)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())


def test_experts_with_maps_of_different_sizes_are_fused_one_by_one():
    experts, maps = experts_case(residual=False)
    maps[2], maps[5] = torch.randn(4, 5, 8, 8).double(), torch.randn(4, 8, 4, 4).double()
    arguments = maps[:3], maps[3:6], []
    torch.testing.assert_close(fuse_at_once(experts, *arguments), fuse_one_by_one(experts, *arguments))


def test_experts_may_share_a_fusion():
    experts, maps = experts_case(residual=False)
    experts["fusions"][1] = experts["fusions"][0]
    twin, shallow = copy.deepcopy(experts), [maps[0], 3 * maps[0], maps[2]]
    results = [fuse(e, shallow, maps[3:6], []) for e, fuse in ((experts, fuse_at_once), (twin, fuse_one_by_one))]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([*experts.buffers()], [*twin.buffers()], rtol=1e-12, atol=1e-12)
    assert int(experts["fusions"][0].norms[-1].num_batches_tracked) == 2


def test_experts_reject_sequences_of_different_lengths():
    experts, maps = experts_case(residual=True)
    for arguments in (
        (maps[:2], maps[3:6], maps[6:]),
        (maps[:3], maps[3:5], maps[6:]),
        (maps[:3], maps[3:6], maps[7:]),
    ):
        with pytest.raises(ValueError):
            fuse_at_once(experts, *arguments)
