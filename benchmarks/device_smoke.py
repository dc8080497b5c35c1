"""Run every CUDA kernel of the expert losses on small inputs of every kind: what the memory checkers watch.

    python benchmarks/device_smoke.py [BACKEND [DEVICE]]        by default cuda cuda

The shapes make every path run: few and many classes, rows that begin at any alignment, several experts in one tensor
or in several, strided classes, rows shared by several blocks.
"""

import sys

import torch

from shike_fast import ops

SHAPES = [(1, 2, 2), (3, 33, 100), (3, 5, 1001), (4, 2, 8142), (8, 3, 257), (3, 1, 20_011)]


def layouts(logits: torch.Tensor) -> list:
    """The same values as one tensor, as a sequence of unaligned slices, and with strided classes."""
    experts, batch, classes = logits.shape
    slices = logits.new_zeros(batch, experts * (classes + 1)).split(classes + 1, dim=1)
    strided = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return [logits, [piece[:, 1:].copy_(expert) for piece, expert in zip(slices, logits, strict=True)], strided]


def main(backend: str = "cuda", device: str = "cuda") -> None:
    for experts, batch, classes in SHAPES:
        target = torch.randint(classes, (batch,), device=device)
        counts = torch.randint(1, 100, (classes,), device=device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for logits in layouts(torch.randn(experts, batch, classes, device=device).to(dtype)):
                leaves = [logits] if isinstance(logits, torch.Tensor) else logits
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                argument = leaves[0] if isinstance(logits, torch.Tensor) else leaves
                loss = (
                    ops.dkt_loss(argument, target, backend=backend)
                    + ops.balanced_softmax_loss(argument, target, counts, backend=backend)
                    + ops.expert_cross_entropy(argument, target, label_smoothing=0.1, backend=backend)
                )
                gradients = torch.autograd.grad(loss, leaves)
                if not all(torch.isfinite(result).all() for result in (loss, *gradients)):
                    sys.exit(f"not finite: {backend}, {dtype}, [K, B, C] = {[experts, batch, classes]}")
    print("every kernel ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
