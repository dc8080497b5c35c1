"""The registry: methods by name."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from torch import Tensor

from shike_fast._util.options import options_of
from shike_fast.methods.base import Method, check_method

_METHODS: dict[str, type[Method]] = {}
_Class = TypeVar("_Class", bound=type[Method])


def register_method(method: _Class) -> _Class:
    """Decorator: make a subclass of :class:`Method` available under its ``name``.

    The commands know it when ``--plugin MODULE`` names the module that does so::

        import torch

        from shike_fast import ops
        from shike_fast.methods import Method, Stage, not_negative, option, register_method

        TRAINING = Stage("training", terms=("cross_entropy", "confidence"))


        @register_method
        class Cautious(Method):
            name = "cautious"
            summary = "logit adjustment, and a penalty on confidence"
            source = "an example"
            stages = (TRAINING,)

            tau: float = option(1.0, "weight of the log prior", check=not_negative)
            penalty: float = option(0.1, "weight of the negative entropy", check=not_negative)

            def __post_init__(self):
                counts = self.class_counts.float()
                self.bias = self.tau * (counts / counts.sum()).log()  # [C]

            def loss(self, logits, target, *, stage=TRAINING, epoch=0, **inputs):
                cross_entropy = ops.expert_cross_entropy(logits, target, bias=self.bias)
                log_p = logits.log_softmax(-1)
                confidence = self.penalty * (log_p.exp() * log_p).sum(-1).mean(-1).sum()
                terms = {"cross_entropy": cross_entropy.detach(), "confidence": confidence.detach()}
                return cross_entropy + confidence, terms

            def phase(self, epoch):
                return 0  # the loss is the same in all epochs

            def prior_of_scores(self, stage):
                return "uniform"  # the loss balances the classes

    Raises:
        TypeError: it is no such class, or lacks something.
        ValueError: the name is taken, or stages or terms contradict each other.
    """
    check_method(method)
    if method.name in _METHODS:
        raise ValueError(f"register_method: a method named {method.name!r} exists already")
    _METHODS[method.name] = method
    return method


def list_methods() -> list[str]:
    """The names of the methods, in the order of registration."""
    return list(_METHODS)


def find_method(name: str) -> type[Method]:
    """The class that is registered under a name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in _METHODS:
        close = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"create_method: unknown method {name!r}, known: {', '.join(_METHODS)}{hint}")
    return _METHODS[name]


def create_method(
    name: str, *, class_counts: Tensor, num_experts: int = 3, epochs: int = 200, **hyper_parameters: Any
) -> Method:
    """Make a method by name.

    Args:
        name: one of :func:`list_methods`.
        class_counts: int64 [C], training images of each class, on the device of the logits.
        num_experts: K.
        epochs: of the whole run.
        hyper_parameters: those that the method declares; default their defaults.

    Raises:
        ValueError: the name or a hyper-parameter is unknown, or a value is unusable.
    """
    method = find_method(name)
    options = options_of(method)
    unknown = hyper_parameters.keys() - options.keys()
    if unknown:
        raise ValueError(
            f"create_method: {name} has no {', '.join(sorted(unknown))}; it has {', '.join(options) or 'no settings'}"
        )
    checked = {key: options[key].check(value) for key, value in hyper_parameters.items()}
    return method(class_counts=class_counts, num_experts=num_experts, epochs=epochs, **checked)
