"""The fused losses in PyTorch: threads, memory, layouts of the gradient, and what autograd and the tracers see."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from shike_fast.ops import dkt_loss, expert_cross_entropy

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_threads_do_not_change_the_result(threads):
    logits, target = torch.randn(3, 301, 500, requires_grad=True), torch.randint(500, (301,))
    results = []
    former = torch.get_num_threads()
    for count in (former, threads):
        torch.set_num_threads(count)
        loss, terms = dkt_loss(logits, target, return_terms=True, backend="cpu")
        results.append((loss, terms, torch.autograd.grad(loss, logits)[0]))
    torch.set_num_threads(former)
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "sequence", "strided"])
def test_memory_is_one_gradient_and_a_few_numbers_a_row(layout):
    logits, target = torch.randn(3, 64, 2000), torch.randint(2000, (64,))
    if layout == "sequence":
        leaf = [expert.clone().requires_grad_() for expert in logits]
    else:  # strided: every third class of a larger tensor, rows padded
        leaf = torch.randn(3, 64, 6001)[:, :, :6000:3] if layout == "strided" else logits.clone()
        leaf.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        dkt_loss(leaf, target, backend="cpu").backward()
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    state = 4 * 64 * (5 * 3 + 4)
    assert allocated <= logits.numel() * 4 + state + 512


def test_a_sequence_gets_the_gradient_of_one_tensor():
    logits, target = torch.randn(3, 6, 9), torch.randint(9, (6,))
    leaves = [expert.clone().requires_grad_() for expert in logits]
    dkt_loss(leaves, target, backend="cpu").backward()
    whole = logits.clone().requires_grad_()
    dkt_loss(whole, target, backend="cpu").backward()
    assert all(torch.equal(leaf.grad, whole.grad[k]) for k, leaf in enumerate(leaves))
    first, second, third = (expert.clone() for expert in logits)
    first.requires_grad_()  # an expert that is frozen gets none
    dkt_loss([first, second, third], target, backend="cpu").backward()
    assert torch.equal(first.grad, whole.grad[0]) and second.grad is None


def test_the_gradient_keeps_the_layout_of_the_logits():
    logits = torch.randn(4, 7, 3, requires_grad=True)  # [B, C, K]
    (gradient,) = torch.autograd.grad(dkt_loss(logits.permute(2, 0, 1), torch.zeros(4, dtype=torch.int64)), logits)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("classes", [19, 70])  # one tile, and several
@pytest.mark.parametrize("loss", ["dkt", "cross-entropy"])
def test_gradcheck_of_the_float64_kernel(loss, classes):
    logits, target = torch.randn(3, 4, classes, dtype=torch.float64, requires_grad=True), torch.tensor([0, 18, 7, 7])

    def function(z):
        if loss == "dkt":
            return dkt_loss(z, target, kl_reduction="batchmean", backend="cpu")
        return expert_cross_entropy(z, target, label_smoothing=0.1, bias=torch.ones(classes), backend="cpu")

    assert torch.autograd.gradcheck(function, (logits,))
    assert torch.autograd.gradcheck(lambda *z: function(z), [expert.detach().requires_grad_() for expert in logits])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequence", [False, True])
def test_a_second_backward_gets_a_gradient_of_its_own(dtype, sequence):
    logits, target = torch.randn(3, 20, 300).to(dtype), torch.randint(300, (20,))
    leaves = [expert.clone().requires_grad_() for expert in logits] if sequence else [logits.clone().requires_grad_()]
    loss = dkt_loss(leaves if sequence else leaves[0], target, backend="cpu")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # as an optimizer may do in place
    doubled = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for mine, twice, theirs in zip(again, doubled, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(twice, 2 * theirs)
    scaled = dkt_loss(leaves if sequence else leaves[0], target, backend="cpu")
    for mine, theirs in zip(torch.autograd.grad(-0.5 * scaled, leaves), expected, strict=True):
        torch.testing.assert_close(mine, -0.5 * theirs)
        assert mine.dtype == dtype


def test_it_is_differentiable_once():
    logits, target = torch.randn(3, 4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    (gradient,) = torch.autograd.grad(dkt_loss(logits, target, backend="cpu"), logits, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(dkt_loss(logits, target), logits)[0])
    with pytest.raises(RuntimeError, match=r"^dkt_loss_fused: it can be differentiated once only; backend='reference'"):
        gradient.sum().backward()
    (twice,) = torch.autograd.grad(dkt_loss(logits, target, backend="reference"), logits, create_graph=True)
    twice.square().sum().backward()
    assert (logits.grad != 0).any()


@pytest.mark.filterwarnings("ignore")  # the tracer warns wherever Python looks at a shape
def test_jit_trace_sees_the_op():
    target = torch.zeros(3, dtype=torch.int64)
    traced = torch.jit.trace(lambda z: dkt_loss(z, target, backend="cpu"), torch.randn(2, 3, 4), check_trace=False)
    for classes in (4, 9):  # the divisor of the divergences is no constant of the trace
        other = torch.randn(2, 3, classes)
        assert torch.equal(traced(other), dkt_loss(other, target, backend="cpu"))


def test_a_subclass_goes_through_the_dispatcher():
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    logits = torch.randn(2, 3, 4).as_subclass(Logged)
    dkt_loss(logits, torch.zeros(3, dtype=torch.int64), backend="cpu")
    assert any("dkt_loss_fused" in name for name in seen)


def test_a_target_out_of_range_in_a_compiled_graph_harms_nothing_else():
    logits, target = torch.randn(3, 4, 5, requires_grad=True), torch.tensor([0, 1, -100, 5])
    compiled = torch.compile(lambda z, y: dkt_loss(z, y, backend="cpu"), fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(logits, target), logits)
    assert torch.isfinite(gradient[:, :2]).all()


def test_checkpoint_recomputes_the_same(kernels):
    backend, device = kernels
    logits, target = torch.randn(3, 6, 50, device=device, requires_grad=True), torch.zeros(6, dtype=torch.int64)

    def function(z):
        return dkt_loss(2.0 * z, target.to(device), backend=backend)

    (expected,) = torch.autograd.grad(function(logits), logits)
    (actual,) = torch.autograd.grad(checkpoint(function, logits, use_reentrant=False), logits)
    assert torch.equal(actual, expected)
