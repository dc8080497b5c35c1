"""Run every CUDA kernel of the expert losses once on small inputs of every kind: what the memory checkers watch.

The shapes make every path run: few and many classes, rows that begin at any alignment, several experts in one tensor
or in several, strided classes, rows shared by several blocks.
"""

import torch

from shike_fast import ops

SHAPES = [(1, 2, 2), (3, 33, 100), (3, 5, 1001), (4, 2, 8142), (8, 3, 257), (3, 1, 20_011)]


def layouts(logits: torch.Tensor) -> list:
    """The same values as one tensor, as a sequence of unaligned slices, and with strided classes."""
    experts, batch, classes = logits.shape
    slices = logits.new_zeros(batch, experts * (classes + 1)).split(classes + 1, dim=1)
    strided = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return [logits, [piece[:, 1:].copy_(expert) for piece, expert in zip(slices, logits, strict=True)], strided]


def main() -> None:
    for experts, batch, classes in SHAPES:
        target = torch.randint(classes, (batch,), device="cuda")
        counts = torch.randint(1, 100, (classes,), device="cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for logits in layouts(torch.randn(experts, batch, classes, device="cuda").to(dtype)):
                leaves = [logits] if isinstance(logits, torch.Tensor) else logits
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                argument = leaves[0] if isinstance(logits, torch.Tensor) else leaves
                loss = (
                    ops.dkt_loss(argument, target, backend="cuda")
                    + ops.balanced_softmax_loss(argument, target, counts, backend="cuda")
                    + ops.expert_cross_entropy(argument, target, label_smoothing=0.1, backend="cuda")
                )
                gradients = torch.autograd.grad(loss, leaves)
                assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
