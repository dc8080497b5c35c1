"""Parts of a network that stay as they are: without gradients, and in eval mode."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shike_fast.models.multi_expert import BRANCHES, HEADS, MultiExpertNetwork

PARTS = ("off", "trunk", "all-but-classifiers")


def freeze(model: nn.Module, part: str = "trunk") -> None:
    """Freeze a part of a network: its parameters need no gradient, its modules stay in eval mode.

    So the statistics of its BatchNorm stay, it has no dropout, and no graph of it is stored. ``model.train()`` leaves
    it so. Adapters (:func:`~shike_fast.models.add_adapters`) are never frozen.

    Args:
        model: a :class:`~shike_fast.models.MultiExpertNetwork`, changed in place; ``model.frozen`` names what is
            frozen, which replaces what was frozen before.
        part: ``"trunk"``, everything but the branches, fusions and classifiers; ``"all-but-classifiers"``; or
            ``"off"``, nothing.

    Raises:
        ValueError: the network is of another class, the part is unknown, or there is nothing in it.
    """
    network = with_experts(model, "freeze")
    if part not in PARTS:
        raise ValueError(f"freeze: part must be one of {', '.join(PARTS)}, got {part!r}")
    free = (*HEADS, *BRANCHES) if part == "trunk" else HEADS

    def stays(name: str) -> bool:
        names = list(_ancestors(name))
        return names[-1] not in free and not any(one in network.adapters for one in names)

    frozen: set[str] = set()
    if part != "off":
        frozen = {name for name, _ in network.named_parameters() if stays(name)}
        if not frozen:
            raise ValueError(
                "freeze: the network has no trunk: its experts share nothing; freeze 'all-but-classifiers', or let "
                "them share a stage (expert_stages)"
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if frozen:
        frozen |= {name for name, _ in network.named_modules() if name and stays(name)}
    network.frozen = frozenset(frozen)
    network.train(network.training)


def with_experts(model: nn.Module, function: str) -> MultiExpertNetwork:
    """The network, if it says which part is which.

    Raises:
        ValueError: it is no :class:`~shike_fast.models.MultiExpertNetwork`.
    """
    if not isinstance(model, MultiExpertNetwork):
        raise ValueError(
            f"{function}: only a MultiExpertNetwork says what is its trunk, got {type(model).__name__}; "
            "let your network subclass it"
        )
    return model


def _ancestors(name: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``"""
    while name:
        yield name
        name = name.rpartition(".")[0]
