"""The registered networks."""

from __future__ import annotations

from functools import partial
from typing import Any

from shike_fast.models.registry import register_model
from shike_fast.models.resnet import BasicBlock, Bottleneck, MultiExpertResNet


@register_model
def resnet8(**options: Any) -> MultiExpertResNet:
    """CIFAR form, one block a stage: small enough for tests and for the embedded data set."""
    return MultiExpertResNet(BasicBlock, (1, 1, 1), width=16, large_stem=False, **options)


@register_model
def resnet20(**options: Any) -> MultiExpertResNet:
    """CIFAR form, three blocks a stage."""
    return MultiExpertResNet(BasicBlock, (3, 3, 3), width=16, large_stem=False, **options)


@register_model
def resnet32(**options: Any) -> MultiExpertResNet:
    """CIFAR form, five blocks a stage: the published network for CIFAR-LT."""
    return MultiExpertResNet(BasicBlock, (5, 5, 5), width=16, large_stem=False, **options)


@register_model
def resnet10(**options: Any) -> MultiExpertResNet:
    """Large form of four basic blocks, for ImageNet-LT."""
    return MultiExpertResNet(BasicBlock, (1, 1, 1, 1), width=64, large_stem=True, **options)


@register_model
def resnet50(**options: Any) -> MultiExpertResNet:
    """Large form, for ImageNet-LT and iNaturalist 2018."""
    return MultiExpertResNet(Bottleneck, (3, 4, 6, 3), width=64, large_stem=True, **options)


@register_model
def resnext50_32x4d(**options: Any) -> MultiExpertResNet:
    """Large form with 32 groups of width 4, for ImageNet-LT."""
    block = partial(Bottleneck, groups=32, width_per_group=4)
    return MultiExpertResNet(block, (3, 4, 6, 3), width=64, large_stem=True, **options)


@register_model
def resnet152(**options: Any) -> MultiExpertResNet:
    """Large form, for Places-LT from ImageNet-pretrained weights."""
    return MultiExpertResNet(Bottleneck, (3, 8, 36, 3), width=64, large_stem=True, **options)
