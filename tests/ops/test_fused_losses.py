"""The kernels of the expert losses against the float64 reference: a sweep over shapes, values, layouts and options."""

import functools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from shike_fast import ops
from shike_fast._native_loader import native
from shike_fast.ops import dkt_loss, expert_cross_entropy

OP = "dkt_loss"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the largest entry of the gradient. Both sides see the same logits; a low-precision gradient is rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LEVELS = native().cpu_levels()


@pytest.fixture(params=[*LEVELS, *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))])
def kernels(request):
    """A backend and a device: each instruction set of the CPU kernels, and each set of GPU kernels."""
    if request.param not in LEVELS:
        yield request.param, torch.device("cuda")
        return
    default = native().cpu_level()
    native().set_cpu_level(request.param)
    yield "cpu", torch.device("cpu")
    native().set_cpu_level(default)


@st.composite
def logits_and_target(draw):
    """Logits of 1-8 experts, 0-300 samples and 2-10,000 classes (at most 200,000 in all), and a target."""
    experts = draw(st.integers(1, 8))
    classes = draw(st.one_of(st.integers(2, 40), st.integers(41, 1025), st.integers(1026, 10_000)))
    batch = draw(st.integers(0, min(300, 200_000 // (experts * classes) + 1)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "equal", "dominated", "apart"]))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    logits = torch.randn(experts, batch, classes, generator=generator, dtype=torch.float64)
    if kind == "ties":  # few values, exact in every dtype and in every sum
        logits, scale = logits.round(), min(scale, 16.0)
    elif kind == "equal":
        logits = torch.ones_like(logits)
    elif kind == "dominated":
        logits[:, :, draw(st.integers(0, classes - 1))] += 8.0
    elif kind == "apart":  # experts far from each other, each on its own level
        logits += 3.0 * torch.arange(experts, dtype=torch.float64).reshape(-1, 1, 1)
    logits = (logits * scale).clamp(-1e4, 1e4).to(draw(st.sampled_from(DTYPES)))
    return logits, torch.randint(classes, (batch,), generator=generator)


LAYOUTS = st.sampled_from(["contiguous", "classes last but one", "strided", "sequence", "sequence of slices"])


def lay_out(logits, layout):
    """The same values as leaves in another layout; and the gradient of those leaves as one [K, B, C] tensor."""
    if layout == "contiguous":
        leaf = logits.clone()
    elif layout == "classes last but one":  # [B, C, K] in memory
        leaf = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif layout == "strided":  # every third class of a larger tensor, rows padded
        experts, batch, classes = logits.shape
        leaf = logits.new_full((experts, batch, 3 * classes + 1), float("nan"))[:, :, : 3 * classes : 3]
        leaf.copy_(logits)
    elif layout == "sequence":
        leaf = [expert.clone() for expert in logits]
    else:  # slices of one larger tensor, at any alignment
        wide = logits.new_zeros(logits.shape[1], logits.shape[0] * (logits.shape[2] + 1))
        leaf = list(wide.split(logits.shape[2] + 1, dim=1))
        leaf = [to[:, 1:].copy_(expert) for to, expert in zip(leaf, logits, strict=True)]
    if isinstance(leaf, list):
        leaf = [expert.detach().requires_grad_() for expert in leaf]
        return leaf, lambda: torch.stack([expert.grad for expert in leaf])
    leaf.requires_grad_()
    return leaf, lambda: leaf.grad


def run(loss_function, logits, target, layout):
    leaf, gradient_of = lay_out(logits, layout)
    result = loss_function(leaf, target)
    loss, terms = result if isinstance(result, tuple) else (result, None)
    loss.backward()
    return loss.detach(), terms, gradient_of()


def check(loss_function, kernels, logits, target, layout, weight):
    """Compare a loss, called with (logits, target, backend=...), with the reference in float64 on the CPU.

    ``weight`` bounds how strongly the loss takes up an error in one log-probability.
    """
    backend, device = kernels
    if device.type == "cuda" and logits.dtype == torch.float64:
        logits = logits.float()
    wide_loss, wide_terms, wide = run(
        functools.partial(loss_function, backend="reference"), logits.double(), target, "contiguous"
    )
    mine = functools.partial(loss_function, backend=backend)
    loss, terms, gradient = run(mine, logits.to(device), target.to(device), layout)
    again_loss, _, again = run(mine, logits.to(device), target.to(device), layout)
    assert torch.equal(loss, again_loss) and torch.equal(gradient, again)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape

    assert torch.isfinite(wide_loss) and torch.isfinite(loss) and torch.isfinite(gradient).all()
    # A log-probability carries the rounding of its logits, eps · max |z|; the divergences multiply it by their weights.
    eps, batch = torch.finfo(loss.dtype).eps, target.numel()
    largest_logit = logits.double().abs().max().item() if batch > 0 else 0.0
    rounding = 8 * eps * (largest_logit + 30) * weight
    assert abs(loss.item() - wide_loss.item()) <= 2e-6 * abs(wide_loss.item()) + rounding * max(batch, 1)
    if terms is not None:
        error = (terms.cpu().double() - wide_terms.double()).abs().max().item()
        assert error <= 4e-6 * wide_terms.abs().max().item() + 4 * rounding * max(batch, 1)
    if batch > 0:
        info = torch.finfo(gradient.dtype)
        error = (gradient.cpu().double() - wide).abs().max().item()
        assert error <= TOLERANCE[logits.dtype] * wide.abs().max().item() + rounding + info.smallest_normal * info.eps


def sweep(function, kernels, count, **strategies):
    """Try ``count`` examples; fewer with Triton, which compiles for every new number of experts, dtype and switch."""
    count = count // 8 if kernels[0] == "triton" else count
    settings(max_examples=count)(given(**strategies)(function))(kernels)


def compare_dkt(kernels, case, layout, kl_reduction, detach_teacher, weights, target_logits):
    logits, target = case
    options = {
        "kl_reduction": kl_reduction,
        "detach_teacher": detach_teacher,
        "hardest_weight": weights[0],
        "mutual_weight": weights[1],
        "teacher_target_logit": target_logits[0],
        "student_target_logit": target_logits[1],
        "return_terms": True,
    }
    batch = max(target.numel(), 1)
    divisor = batch * (logits.shape[2] if kl_reduction == "mean" else 1)
    weight = sum(weights) * 2 * logits.shape[0] / divisor + 1 / batch
    check(functools.partial(dkt_loss, **options), kernels, logits, target, layout, weight)


def test_dkt_loss(kernels):
    sweep(
        compare_dkt,
        kernels,
        count=250,
        case=logits_and_target(),
        layout=LAYOUTS,
        kl_reduction=st.sampled_from(["mean", "batchmean"]),
        detach_teacher=st.booleans(),
        weights=st.sampled_from([(10.0, 1.0), (0.0, 1.0), (10.0, 0.0), (0.0, 0.0), (0.5, 3.0)]),
        target_logits=st.sampled_from([(0.0, -30.0), (-4.5, 2.0), (40.0, 0.0)]),
    )


def compare_cross_entropy(kernels, case, layout, label_smoothing, bias_kind):
    logits, target = case
    experts, _, classes = logits.shape
    bias = None
    if bias_kind != "none":
        generator = torch.Generator().manual_seed(classes)
        shape = (experts, classes) if bias_kind == "per expert" else (classes,)
        bias = torch.randn(shape, generator=generator, dtype=torch.float64)
        if bias_kind == "masking":
            label_smoothing = 0.0  # with a masked class the smoothed loss is infinite
            masked = torch.rand(classes, generator=generator) < 0.5
            bias[masked & (torch.bincount(target, minlength=classes) == 0)] = -torch.inf

    def loss(z, y, backend):
        first = z if isinstance(z, torch.Tensor) else z[0]
        mine = None if bias is None else bias.to(first.device, first.dtype).double()  # the same values for everyone
        if mine is not None and first.dtype != torch.float64:
            mine = mine.float()
        return expert_cross_entropy(z, y, bias=mine, label_smoothing=label_smoothing, backend=backend)

    if bias is not None:
        bias = bias.to(logits.dtype).double()
    check(loss, kernels, logits, target, layout, weight=2 * experts / max(target.numel(), 1))


def test_expert_cross_entropy(kernels):
    sweep(
        compare_cross_entropy,
        kernels,
        count=100,
        case=logits_and_target(),
        layout=LAYOUTS,
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        bias_kind=st.sampled_from(["none", "shared", "per expert", "masking"]),
    )


def compare_balanced_softmax(kernels, case, layout):
    logits, target = case
    counts = torch.logspace(3, 0, logits.shape[2]).long() + torch.bincount(target, minlength=logits.shape[2])

    def loss(z, y, backend):
        return ops.balanced_softmax_loss(z, y, counts.to(y.device), backend=backend)

    check(loss, kernels, logits, target, layout, weight=2 * logits.shape[0] / max(target.numel(), 1))


def test_balanced_softmax_loss(kernels):
    sweep(compare_balanced_softmax, kernels, count=40, case=logits_and_target(), layout=LAYOUTS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["target", "hardest", "another", "everywhere"])
def test_a_logit_that_is_not_finite_makes_the_loss_nan(kernels, place, poison):
    backend, device = kernels
    logits = torch.randn(3, 5, 37)
    logits[:, :, 7] += 9.0
    classes = {"target": [3], "hardest": [7], "another": [30], "everywhere": list(range(37))}[place]
    logits[1, 2, classes] = poison
    target = torch.full((5,), 3)
    for loss in (dkt_loss, expert_cross_entropy):
        assert not torch.isfinite(loss(logits.to(device), target.to(device), backend=backend)), loss.__name__


def test_minus_infinity_masks_a_class_of_the_cross_entropy(kernels):
    backend, device = kernels
    logits, target = torch.randn(2, 4, 21), torch.tensor([0, 1, 20, 1])
    logits[:, :, 5:9] = -torch.inf
    leaf = logits.to(device).requires_grad_()
    loss = expert_cross_entropy(leaf, target.to(device), backend=backend)
    loss.backward()
    expected = expert_cross_entropy(logits, target, backend="reference")
    torch.testing.assert_close(loss.detach().cpu(), expected)
    assert (leaf.grad[:, :, 5:9] == 0).all() and torch.isfinite(leaf.grad).all()
    masked_target = torch.tensor([0, 6, 20, 1], device=device)
    assert expert_cross_entropy(logits.to(device), masked_target, backend=backend).item() == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e8])  # gradients that are subnormal in float16, and that overflow there
def test_low_precision_is_widened_and_rounded_exactly(kernels, dtype, scale):
    """The same kernel on the same values in float32 gives the gradient whose rounding is expected, bit for bit."""
    backend, device = kernels
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.abs() <= 100][::3].reshape(1, 1, -1)  # subnormals of both signs too
    target = torch.zeros(1, dtype=torch.int64, device=device)
    gradients = []
    for logits in (every, every.float()):
        leaf = logits.to(device).requires_grad_()
        loss = scale * expert_cross_entropy(leaf, target, backend=backend)
        gradients.append(torch.autograd.grad(loss, leaf)[0].cpu())
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_the_gradient_is_rounded_to_even(kernels, dtype, digits):
    backend, device = kernels
    target = torch.zeros(1, dtype=torch.int64, device=device)
    for odd in (1, 3, 5, 7):
        halfway = 1 + odd * 2.0**-digits  # between two numbers of the dtype; both probabilities are exactly 1/2
        logits = torch.zeros(1, 1, 2, dtype=dtype, device=device, requires_grad=True)
        loss = 2 * halfway * expert_cross_entropy(logits, target, backend=backend)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient.cpu().flatten(), torch.tensor([-halfway, halfway]).to(dtype))


def test_a_rounded_mean_at_the_hardest_negative_cancels(kernels):
    """Where it dominates, teacher and students agree on it; the mean's rounding is 2e-4 here, and must not show."""
    backend, device = kernels
    logits = torch.zeros(3, 1, 40, device=device)
    logits[:, 0, 7] = torch.tensor([9999.3, 9999.7, 10000.1])
    target = torch.zeros(1, dtype=torch.int64, device=device)
    _, terms = dkt_loss(
        logits, target, hardest_weight=1.0, kl_reduction="batchmean", return_terms=True, backend=backend
    )
    assert abs(terms[1].item()) < 1e-6


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
    leaf, _ = lay_out(logits, layout)
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


@pytest.mark.parametrize("loss", ["dkt", "cross-entropy"])
def test_gradcheck_of_the_float64_kernel(kernels, loss):
    backend, device = kernels
    if device.type == "cuda":
        pytest.skip("there are no float64 kernels for GPUs")
    logits, target = torch.randn(3, 4, 19, dtype=torch.float64, requires_grad=True), torch.tensor([0, 18, 7, 7])

    def function(z):
        if loss == "dkt":
            return dkt_loss(z, target, kl_reduction="batchmean", backend=backend)
        return expert_cross_entropy(z, target, label_smoothing=0.1, bias=torch.ones(19), backend=backend)

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
    other = torch.randn(2, 3, 4)
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(3, 128, 100), (3, 8, 8142)], ids=str)
def test_cuda_graph(backend, shape):
    logits = torch.randn(shape, device="cuda", requires_grad=True)
    target = torch.randint(shape[2], (shape[1],), device="cuda")

    def step():
        loss = dkt_loss(logits, target, backend=backend)
        (gradient,) = torch.autograd.grad(loss, logits)
        smooth = expert_cross_entropy(logits, target, label_smoothing=0.1, backend=backend)
        return loss.detach(), gradient, smooth.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            logits.copy_(torch.randn(shape, device="cuda"))
        graph.replay()
        for mine, theirs in zip(captured, step(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_nothing_waits_for_the_device(backend):
    logits = torch.randn(3, 16, 100, device="cuda", requires_grad=True)
    target = torch.randint(100, (16,), device="cuda")
    dkt_loss(logits, target, backend=backend).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        dkt_loss(logits, target, backend=backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["torch.nn.functional.cross_entropy(z[0], y)", "ops.dkt_loss(z, y, backend='cuda')"])
@pytest.mark.parametrize("bad", [-1, 5])
def test_a_target_out_of_range_on_a_gpu_is_a_device_side_assertion(loss, bad):
    """It breaks the process's CUDA context, for the kernels as for PyTorch; so in a process of its own."""
    code = (
        "import torch; from shike_fast import ops\n"
        f"z, y = torch.randn(3, 2, 5, device='cuda'), torch.tensor([0, {bad}], device='cuda')\n"
        f"{loss}\ntorch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert triggered" in done.stderr
