"""What a case of ``golden/methods.npz`` records, computed through the public library from its inputs and its JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from shike_fast import ops

sys.path.append(str(Path(__file__).parent))  # of the files beside this one, where it is loaded by its path

import recorded_experts
import recorded_features
from recorded_common import Case, Fields, Hyper, create, hyper_of, leaf, one_expert

INPUTS = ("logits", "target", "class_counts")
_RULES = {"None": "none", "Reweight": "reweight", "DRW": "drw"}


def evaluate(
    method: str,
    fields: dict[str, np.ndarray],
    hyper: Hyper,
    *,
    backend: str | None = None,
    dtype: str = "float64",
) -> dict[str, np.ndarray]:
    """Compute the outputs of a case.

    Args:
        method: a loss of ``golden/methods.npz``, such as ``"ride"``.
        fields: the arrays of the case; outputs among them are not read.
        hyper: its JSON.
        backend: of the ops, None for the one that they choose.
        dtype: of the logits, features and weights.

    Returns:
        The outputs by their names in the archive: ``loss``, gradients, and whatever else the library gives.
    """
    given = {name: torch.from_numpy(np.array(value)) for name, value in fields.items() if value.dtype.kind in "bifu"}
    floats = {name: value.to(getattr(torch, dtype)) for name, value in given.items() if value.is_floating_point()}
    with ops.use_backend(backend):
        results = _CASES[method](given | floats, hyper)
    return {name: value.detach().numpy() for name, value in results.items()}


# ---- one expert


def _balanced_softmax(given: Fields, hyper: Hyper) -> Fields:
    method = create("balanced-softmax", given, 1)
    z, results = one_expert(given, method)
    rows = ops.expert_loss(z.unsqueeze(0), given["target"], bias=method.bias.of(z), reduction="none")
    return results | {"row_loss": rows[0]}


def _logit_adjustment(given: Fields, hyper: Hyper) -> Fields:
    method = create("la", given, 1, **hyper_of(hyper, "tau", "eps"))
    z, results = one_expert(given, method)
    after = create("la", given, 1, post_hoc=True, **hyper_of(hyper, "tau", "eps"))
    scores = after.scores(z.unsqueeze(0), stage=after.stages[0])
    return results | {"bias": method.bias.value, "posthoc_logits": scores}


def _logit_adjustment_no_eps(given: Fields, hyper: Hyper) -> Fields:
    bias = ops.class_bias(given["class_counts"], hyper["tau"])
    z = leaf(given["logits"])
    weight = given["class_weight"] if hyper["weighted"] else None
    reduction = "mean" if weight is None else "weighted_mean"
    loss = ops.expert_loss(z.unsqueeze(0), given["target"], bias=bias, class_weight=weight, reduction=reduction)
    loss.backward()
    return {"loss": loss, "grad": z.grad, "bias": bias}


def _los(given: Fields, hyper: Hyper) -> Fields:
    return one_expert(given, create("los", given, 1, **hyper_of(hyper, "label_smoothing")))[1]


def _reweighted(name: str) -> Callable[[Fields, Hyper], Fields]:
    def case(given: Fields, hyper: Hyper) -> Fields:
        own = hyper_of(hyper, "beta", "gamma", "max_m", drw_epoch="reweight_epoch", s="scale")
        method = create(name, given, 1, train_rule=_RULES[hyper["train_rule"]], **own)
        epoch = hyper.get("epoch", 0)
        z, results = one_expert(given, method, method.phase(epoch))
        if hyper["train_rule"] != "None":
            weight = method.class_weight(z, method.phase(epoch))
            results["class_weight"] = torch.ones_like(given["class_counts"]) if weight is None else weight
        if name == "ldam-drw":
            results["margin"] = method.margin.value / hyper["s"]
        return results

    return case


_CASES: dict[str, Case] = {
    "balanced_softmax": _balanced_softmax,
    "logit_adjustment": _logit_adjustment,
    "logit_adjustment_no_eps": _logit_adjustment_no_eps,
    "los": _los,
    "class_balanced": _reweighted("cb"),
    "ldam": _reweighted("ldam-drw"),
    "focal": _reweighted("focal"),
    **recorded_experts.CASES,
    **recorded_features.CASES,
}
