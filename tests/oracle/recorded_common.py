"""What the recorded cases share: leaves, methods by name, loss and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shike_fast import methods

Fields = dict[str, Tensor]
Hyper = dict[str, Any]
Case = Callable[[Fields, Hyper], Fields]


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def create(name: str, given: Fields, experts: int, **hyper: Any) -> methods.Method:
    """A method; for a loss without class counts any will do."""
    classes = given["logits"].shape[-1]
    counts = given.get("class_counts", torch.ones(classes, dtype=torch.int64))
    return methods.create_method(name, class_counts=counts, num_experts=experts, **hyper)


def hyper_of(hyper: Hyper, *names: str, **renamed: str) -> Hyper:
    """The hyper-parameters of these names that the case has; ``theirs=ours`` renames."""
    return {ours: hyper[theirs] for theirs, ours in ({n: n for n in names} | renamed).items() if theirs in hyper}


def one_expert(given: Fields, method: methods.Method, epoch: int = 0, **inputs: Any) -> tuple[Tensor, Fields]:
    """Loss and gradient of a method with one expert, for logits [B, C]."""
    z = leaf(given["logits"])
    loss, _ = method.loss(z.unsqueeze(0), given["target"], epoch=epoch, **inputs)
    loss.backward()
    return z, {"loss": loss, "grad": z.grad}


def several_experts(given: Fields, method: methods.Method, epoch: int = 0, **inputs: Any) -> tuple[Tensor, Fields]:
    """Likewise of several experts, for logits [K, B, C]."""
    z = leaf(given["logits"])
    loss, _ = method.loss(z, given["target"], epoch=epoch, **inputs)
    loss.backward()
    return z.detach(), {"loss": loss, "grad": z.grad}


def of_experts(experts: int, loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """What each expert adds to a loss that takes a weight for each, [K]."""
    return torch.stack([loss(like.new_zeros(experts).index_fill_(0, torch.tensor(k), 1)) for k in range(experts)])


def student(experts: int, rows: int) -> Callable[[int, Tensor], Tensor]:
    return lambda k, like: like.new_zeros(experts, rows).index_fill_(0, torch.tensor(k), 1)
