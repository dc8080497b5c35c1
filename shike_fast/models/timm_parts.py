"""Networks of timm, and parts of them: modules under the names that they have there.

timm is imported where a network of it is wanted.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shike_fast._util.optional import optional_library

_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}  # of networks that else take images of one size
_HEADS = ("global_pool", "head", "head_drop", "head_fc", "fc", "classifier")  # where timm's networks begin to pool


def import_timm() -> Any:
    """timm, where it is installed.

    Raises:
        ConfigError: saying what helps.
    """
    return optional_library("timm", "a network of timm")


class TimmSource:
    """Makes a network of timm, without its classifier, as often as it is wanted."""

    def __init__(self, name: str, in_channels: int, options: Mapping[str, Any]) -> None:
        timm = import_timm()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"timm has no network {name!r}{hint}")
        self.name = name
        self.options = {"num_classes": 0, "in_chans": max(1, in_channels), **options}
        classes = type(self.template()).__mro__[:-1]  # one that hands its arguments on names none
        takes = {name for cls in classes for name in inspect.signature(cls).parameters}
        for option, value in _ANY_SIZE.items():
            if option in takes:
                self.options.setdefault(option, value)
                break

    def make(self, *, pretrained: bool = False) -> Any:
        """A new one, with random or with published weights."""
        timm = import_timm()
        try:
            return timm.create_model(self.name, pretrained=pretrained, **self.options)
        except Exception as error:  # whatever a network raises that does not take an option, or a tag that is none
            if pretrained:
                raise
            reason = " ".join(f"{error}".split())
            raise ValueError(f"timm cannot build {self.name!r}: {reason}") from error

    def template(self) -> Any:
        """One without storage."""
        with torch.device("meta"):
            return self.make()


class Part(nn.Module):
    """Some modules of a network of timm, under their names there.

    Args:
        net: the network, changed: it keeps these modules and what they lie in.
        names: dotted, in the order in which :meth:`forward` calls them.
        kept: more of them that are not called.
    """

    def __init__(self, net: nn.Module, names: Sequence[str], kept: Collection[str] = ()) -> None:
        super().__init__()
        _prune(net, {*names, *kept})
        self.net: Any = net
        self.names = tuple(names)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.net.get_submodule(name)(x)
        return x


class TransformerPart(nn.Module):
    """Blocks of a vision transformer of timm, and before or behind them what it has there.

    Args:
        net: the network, changed.
        blocks: which of its blocks are kept.
        embeds: whether the embedding of patches and positions is kept, so that images come in.
        ends: whether the last norm and the head are kept.
    """

    def __init__(self, net: Any, blocks: range, *, embeds: bool, ends: bool, pools: bool) -> None:
        super().__init__()
        kept = {f"blocks.{i}" for i in blocks}
        if embeds:
            kept |= {"patch_embed", "pos_drop", "patch_drop", "norm_pre", "rope"}
        if ends:
            kept |= {"norm", "fc_norm", "head_drop"}
        if ends and pools:
            kept.add("attn_pool")
        elif hasattr(net, "attn_pool"):
            net.attn_pool = None
        _prune(net, kept, parameters=embeds)
        self.net: Any = net

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, P+N, D], and rotary embeddings of the positions where the blocks want some."""
        net = self.net
        embedded = net._pos_embed(net.patch_embed(whole_patches(images, net.patch_embed.patch_size)))
        tokens, rope = embedded if isinstance(embedded, tuple) else (net.patch_drop(embedded), None)
        return net.norm_pre(tokens), rope

    def step(self, name: str, rope: Tensor | None, tokens: Tensor) -> Tensor:
        """One block."""
        block = self.net.blocks.get_submodule(name)
        if rope is None:
            return block(tokens)
        return block(tokens, rope=rope[int(name)] if getattr(self.net, "rope_mixed", False) else rope)

    def forward(self, tokens: Tensor, rope: Tensor | None = None) -> Tensor:
        """Tokens, or images where it embeds, through all blocks and the last norm."""
        if hasattr(self.net, "patch_embed"):
            tokens, rope = self.embed(tokens)
        for name in self.net.blocks._modules:
            tokens = self.step(name, rope, tokens)
        return self.net.norm(tokens)


def whole_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """The images, with zeros at the right and below up to whole patches."""
    right, below = -images.shape[3] % patch[1], -images.shape[2] % patch[0]
    return F.pad(images, (0, right, 0, below)) if right or below else images


def sections_of(net: nn.Module, features: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a network calls one after the other, by dotted names, and its head.

    A container of stages is taken apart; timm's own feature extraction relies on the same order.
    """
    sections: list[str] = []
    children = list(net._modules)
    heads = [name for name in children if name in _HEADS]
    before = children[: children.index(heads[0])] if heads else children
    for name in before:
        child = net._modules[name]
        if child is None:
            continue
        holds_stages = any(feature.startswith(f"{name}.") for feature in features)
        if holds_stages and type(child) in (nn.Sequential, nn.ModuleList):
            sections += [f"{name}.{inner}" for inner in child._modules]
        else:
            sections.append(name)
    return sections, children[len(before) :]


def _prune(module: nn.Module, kept: Collection[str], *, parameters: bool = False) -> None:
    """Leave of a module only the named descendants and what they lie in; of its direct parameters all, or none."""
    if not parameters:
        module._parameters.clear()
        module._buffers.clear()
    for name in list(module._modules):
        if name in kept:
            continue
        inner = {other.removeprefix(f"{name}.") for other in kept if other.startswith(f"{name}.")}
        child = module._modules[name]
        if inner and child is not None:
            _prune(child, inner, parameters=parameters)
        else:
            del module._modules[name]
