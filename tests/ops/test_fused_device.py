"""The fused ops on a GPU: CUDA graphs, no waiting for the device, and a target out of range."""

import sys

import pytest
import torch

from shike_fast.ops import BatchNormArguments, dkf_experts, dkt_loss, expert_cross_entropy


def assert_capturable(step, leaves):
    """A captured step gives what the step itself gives, for new values of its inputs too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        for mine, theirs in zip(captured, step(), strict=True):
            assert torch.equal(mine, theirs)


def fusion(backend, channels=64):
    """A step of two experts with residual ends, and its leaves."""
    leaves = [torch.randn(16, channels, 8, 8, device="cuda").to(memory_format=torch.channels_last) for _ in range(6)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def step():
        norms = [  # made anew, for the same running statistics in every step
            BatchNormArguments(
                None, None, torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda"), training=True
            )
            for _ in range(4)
        ]
        f = dkf_experts(
            leaves[:2],
            leaves[2:4],
            norms[:2],
            relu=[True, False],
            shortcut=leaves[4:],
            deep_norms=norms[2:],
            backend=backend,
        )
        gradients = torch.autograd.grad(f, leaves, torch.ones_like(f))
        return f.detach(), *gradients, norms[0].running_mean, norms[3].running_var

    return step, leaves


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(3, 128, 100), (3, 8, 8142)], ids=str)
def test_cuda_graph_of_the_losses(backend, shape):
    logits = torch.randn(shape, device="cuda", requires_grad=True)
    target = torch.randint(shape[2], (shape[1],), device="cuda")

    def step():
        loss = dkt_loss(logits, target, backend=backend)
        (gradient,) = torch.autograd.grad(loss, logits)
        smooth = expert_cross_entropy(logits, target, label_smoothing=0.1, backend=backend)
        return loss.detach(), gradient, smooth.detach()

    assert_capturable(step, [logits])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_of_the_fusion(backend):
    assert_capturable(*fusion(backend))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_nothing_waits_for_the_device(backend):
    logits = torch.randn(3, 16, 100, device="cuda", requires_grad=True)
    target = torch.randint(100, (16,), device="cuda")
    step, _ = fusion(backend)
    dkt_loss(logits, target, backend=backend).backward()  # compiles
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dkt_loss(logits, target, backend=backend).backward()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["torch.nn.functional.cross_entropy(z[0], y)", "ops.dkt_loss(z, y, backend='cuda')"])
@pytest.mark.parametrize("bad", [-1, 5])
def test_a_target_out_of_range_on_a_gpu_is_a_device_side_assertion(programs, loss, bad):
    """It breaks the process's CUDA context, for the kernels as for PyTorch; so in a separate process."""
    code = (
        "import torch; from shike_fast import ops\n"
        f"z, y = torch.randn(3, 2, 5, device='cuda'), torch.tensor([0, {bad}], device='cuda')\n"
        f"{loss}\ntorch.cuda.synchronize()"
    )
    done = programs.run([sys.executable, "-c", code])
    assert done.returncode != 0 and "device-side assert triggered" in done.stderr
