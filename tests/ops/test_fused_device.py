"""The fused losses on a GPU: CUDA graphs, no waiting for the device, and a target out of range."""

import subprocess
import sys

import pytest
import torch

from shike_fast.ops import dkt_loss, expert_cross_entropy


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
