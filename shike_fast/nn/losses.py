"""The losses of :mod:`shike_fast.ops` as modules, with their options fixed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shike_fast import ops
from shike_fast.ops._checks import as_tensor, describe


class _Loss(nn.Module):
    """A loss with its options fixed; a call may give any of them anew.

    Tensors, lists and arrays among the options become buffers that follow ``.to(device)`` and stay out of the
    state_dict: they belong to the training set. An ``nn.Parameter`` is learned.
    """

    _loss: ClassVar[Callable[..., Any]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, *, loss: Callable[..., Any], of_a_call: Sequence[str] = ("logits", "target")) -> None:
        """Take the options from those of ``loss``, all but the arguments ``of_a_call``."""
        super().__init_subclass__()
        cls._loss = staticmethod(loss)
        parameters = inspect.signature(loss).parameters.values()
        cls.__signature__ = inspect.Signature([one for one in parameters if one.name not in of_a_call])

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        try:
            given = self.__signature__.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        given.apply_defaults()
        self._names = tuple(given.arguments)
        self._of_kl: tuple[str, ...] = ()
        for name, value in given.arguments.items():
            setattr(self, name, value)
            if isinstance(value, ops.ExpertKL):
                fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
                self._of_kl = tuple(field for field in fields if self._fix(f"{name}_{field}", fields[field]))
            else:
                self._fix(name, value)

    def _fix(self, name: str, value: object) -> bool:
        """Whether a value was one of tensors, lists and arrays of numbers, which now is a buffer."""
        tensor = as_tensor(value, torch.device("cpu"))
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
            return False
        if tensor.requires_grad:
            raise ValueError(f"{type(self).__name__}: {name} must not require gradients; to learn it, pass a Parameter")
        vars(self).pop(name, None)
        self.register_buffer(name, tensor.clone(), persistent=False)
        return True

    def _options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in self._names}
        if self._of_kl:
            fixed = {field: getattr(self, f"kl_{field}") for field in self._of_kl}
            options["kl"] = dataclasses.replace(options["kl"], **fixed)
        return options

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor, **options: Any) -> Any:
        return type(self)._loss(logits, target, **{**self._options(), **options})

    def extra_repr(self) -> str:
        usual = self.__signature__.parameters
        values = {name: getattr(self, name) for name in self._names}
        named = {name: value for name, value in values.items() if not _is(value, usual[name].default)}
        return ", ".join(
            f"{name}={describe(value) if isinstance(value, Tensor) else repr(value)}" for name, value in named.items()
        )


def _is(value: object, default: object) -> bool:
    return value is default or (isinstance(value, int | float | str) and value == default)


class DKTLoss(_Loss, loss=ops.dkt_loss):
    """Stage-1 loss (dynamic knowledge transfer): :func:`shike_fast.ops.dkt_loss` with its options fixed.

    ``forward(logits, target)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B], and returns a scalar. Args and
    Raises are those of the operator.
    """


class BalancedSoftmaxLoss(_Loss, loss=ops.balanced_softmax_loss):
    """Stage-2 loss (classifier re-training): :func:`shike_fast.ops.balanced_softmax_loss` with its class counts.

    ``forward(logits, target)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B], and returns a scalar. The counts
    follow ``.to(device)`` and stay out of the state_dict: they belong to the training set.

    Args:
        class_counts: [C], training samples of each class: a tensor, list or array.
        backend: as for the operator.
    """


class ExpertCrossEntropyLoss(_Loss, loss=ops.expert_cross_entropy):
    """Cross-entropy of the experts: :func:`shike_fast.ops.expert_cross_entropy` with its options fixed.

    ``forward(logits, target)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B], or class probabilities, and returns
    a scalar. Args and Raises are those of the operator. A ``bias`` follows ``.to(device)`` and stays out of the
    state_dict; an ``nn.Parameter`` is learned.
    """


class ExpertLoss(_Loss, loss=ops.expert_loss):
    """The generalised cross-entropy: :func:`shike_fast.ops.expert_loss` with its options fixed.

    ``forward(logits, target, **options)`` takes [K, B, C] (or K tensors [B, C]) and int64 [B] or [K, B], and what
    belongs to a batch (``target_b``, ``lam``, ``sample_weight``, ``class_mask``, ``soft_target``) or changes from call
    to call. It returns what the operator does. Args and Raises are those of the operator. Numbers of classes and
    experts, those of ``kl`` too, follow ``.to(device)`` and stay out of the state_dict; an ``nn.Parameter`` is learned.
    """


class ExpertKLLoss(_Loss, loss=ops.expert_kl, of_a_call=("logits",)):
    """Divergences between teachers and experts: :func:`shike_fast.ops.expert_kl` with its options fixed.

    ``forward(logits, teacher=None, **options)`` takes [K, B, C] (or K tensors [B, C]), the logits of a teacher if it is
    another network, and what belongs to a batch (``target``, ``gate``, ``class_mask``); it returns a scalar. Args and
    Raises are those of the operator.
    """

    def forward(  # type: ignore[override]  # the operator's second argument is no target
        self, logits: Tensor | Sequence[Tensor], teacher: Any = None, **options: Any
    ) -> Any:
        given = options if teacher is None else {**options, "teacher": teacher}
        return ops.expert_kl(logits, **{**self._options(), **given})
