"""Small modules that are trained beside frozen layers."""

from __future__ import annotations

import math

from torch import Tensor, nn


class AdaptFormer(nn.Module):
    r"""A bottleneck beside the MLP of a transformer's block.

    .. math:: y = \mathrm{MLP}(x) + s \, \mathrm{ReLU}(x W_{down} + b_{down}) \, W_{up} + b

    where b is s times the bias of the second layer. x is what the MLP gets, which most blocks have normalised.
    ``W_down`` starts Kaiming uniform, ``W_up`` and both biases as zeros, so that at first y = MLP(x). A block that
    scales the output of its MLP (LayerScale) scales this one too.

    ``forward(x)`` takes and returns [..., dim], as the MLP does.

    Args:
        base_layer: the MLP.
        dim: of its input and output.
        width: of the bottleneck, at least 1.
        scale: s.

    Raises:
        ValueError: an argument is out of range.

    Source: Chen et al., "AdaptFormer", NeurIPS 2022, equations 2 and 3; its code for the initialisation.
    """

    def __init__(self, base_layer: nn.Module, dim: int, width: int = 64, scale: float = 0.1) -> None:
        super().__init__()
        if dim < 1 or width < 1:
            raise ValueError(f"AdaptFormer: dim and width must be at least 1, got {dim} and {width}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"AdaptFormer: scale must be a positive number, got {scale}")
        self.base_layer = base_layer
        self.adapter = nn.Sequential(down := nn.Linear(dim, width), nn.ReLU(), up := nn.Linear(width, dim))
        self.scale = float(scale)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.scale * self.adapter(x)
        return out

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
