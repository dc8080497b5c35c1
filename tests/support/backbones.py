"""Backbones that only tests need: a transformer, and a trunk whose arithmetic does not depend on the batch."""

import torch
import torch.nn.functional as F
from torch import nn

from shike_fast import models


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A block of a transformer, named as timm does, for maps [B, C, H, W]."""

    def __init__(self, dim, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim), Mlp(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop(self.attn(self.norm1(tokens)))
        tokens = tokens + self.drop(self.mlp(self.norm2(tokens)))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class SmallTransformer(models.MultiExpertNetwork):
    """Two shared blocks with dropout on patches of 2x2 pixels; a branch is one more block on half as many pixels."""

    def __init__(self, **options):
        super().__init__(min_image_size=4, **options)
        self.patches = nn.Conv2d(self.in_channels, 16, 2, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, 1, 1))
        self.blocks = nn.Sequential(Block(16, 0.1), Block(16, 0.1))
        branches = [nn.Sequential(nn.Conv2d(16, 24, 2, stride=2), Block(24, 0.1)) for _ in range(self.num_experts)]
        self.add_experts(branches, 24, {"blocks": models.FeatureMap(16, halvings=1)})

    def feature_maps(self, images):
        return {"blocks": self.run_stage(self.blocks, self.norm(self.patches(images)) + self.position)}


class Elementwise(models.MultiExpertNetwork):
    """A trunk without sums over pixels or channels: an image's maps do not depend on the others, bit for bit."""

    def __init__(self, **options):
        super().__init__(min_image_size=4, **options)
        self.norm = nn.BatchNorm2d(self.in_channels)
        self.factor = nn.Parameter(torch.randn(8, self.in_channels, 1, 1))
        self.drop = nn.Dropout(0.1)
        branches = [nn.Conv2d(8, 16, 4, stride=4) for _ in range(self.num_experts)]
        maps = {"fine": models.FeatureMap(8, halvings=2), "coarse": models.FeatureMap(8, halvings=1)}
        self.add_experts(branches, 16, maps)

    def feature_maps(self, images):
        fine = (self.factor[:, 0] * self.drop(self.norm(images))[:, :1]).relu()
        coarse = fine[:, :, ::2, ::2].contiguous()
        return {"fine": fine, "coarse": coarse, "unused": coarse, "last": fine + 1}


def register_backbones(monkeypatch):
    """Make both known, until the end of the test, as ``small_transformer`` and ``elementwise``."""
    monkeypatch.setattr(models.registry, "_BUILDERS", dict(models.registry._BUILDERS))

    @models.register_model
    def small_transformer(**options):
        return SmallTransformer(**options)

    @models.register_model
    def elementwise(**options):
        return Elementwise(**options)
