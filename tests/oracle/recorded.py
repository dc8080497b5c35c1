"""What a case of ``golden/methods.npz`` records, computed through the public library from its inputs and its JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shike_fast import nn, ops
from shike_fast.methods.contrastive import balanced_contrast, parametric_contrast

sys.path.append(str(Path(__file__).parent))  # however this file is loaded
from recorded_experts import SEVERAL_EXPERTS, Fields, Hyper, chosen, create, leaf, of_one

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
    z, results = of_one(given, method)
    rows = ops.expert_loss(z.unsqueeze(0), given["target"], bias=method.bias.of(z), reduction="none")
    return results | {"row_loss": rows[0]}


def _logit_adjustment(given: Fields, hyper: Hyper) -> Fields:
    method = create("la", given, 1, **chosen(hyper, "tau", "eps"))
    z, results = of_one(given, method)
    after = create("la", given, 1, post_hoc=True, **chosen(hyper, "tau", "eps"))
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
    return of_one(given, create("los", given, 1, **chosen(hyper, "label_smoothing")))[1]


def _reweighted(name: str) -> Callable[[Fields, Hyper], Fields]:
    def case(given: Fields, hyper: Hyper) -> Fields:
        own = chosen(hyper, "beta", "gamma", "max_m", drw_epoch="reweight_epoch", s="scale")
        method = create(name, given, 1, train_rule=_RULES[hyper["train_rule"]], **own)
        epoch = hyper.get("epoch", 0)
        z, results = of_one(given, method, method.phase(epoch))
        if hyper["train_rule"] != "None":
            weight = method.class_weight(z, method.phase(epoch))
            results["class_weight"] = torch.ones_like(given["class_counts"]) if weight is None else weight
        if name == "ldam-drw":
            results["margin"] = method.margin.value / hyper["s"]
        return results

    return case


# ---- features and classifiers


def _paco(both_views: bool) -> Callable[[Fields, Hyper], Fields]:
    def case(given: Fields, hyper: Hyper) -> Fields:
        z, query, key = (leaf(given[name]) for name in ("logits", "query", "key"))
        bias = None
        if hyper["uses_class_counts"]:
            bias = ops.class_bias(given["class_counts"], eps=hyper["eps_prior"]).to(z)
        own = chosen(hyper, "alpha", "beta", "gamma", "supt", "temperature", "base_temperature", "smooth")
        loss, rows = parametric_contrast(
            z, given["target"], query, key, given["queue"], given["queue_target"], bias=bias,
            both_views=both_views, **own,
        )  # fmt: skip
        loss.backward()
        results = {"loss": loss, "grad": z.grad, "grad_query": query.grad, "row_mean_log_prob": rows}
        return results | ({"grad_key": key.grad} if both_views else {})

    return case


def _bcl(given: Fields, hyper: Hyper) -> Fields:
    z, features, centers = (leaf(given[name]) for name in ("logits", "features", "centers"))
    bias = ops.class_bias(given["class_counts"], hyper["tau"])
    ce = ops.expert_loss(z.unsqueeze(0), given["target"], bias=bias)
    contrast, rows = balanced_contrast(features, given["target"], centers, hyper["temperature"])
    loss = hyper["ce_weight"] * ce + hyper["contrast_weight"] * contrast
    loss.backward()
    return {
        "loss": loss,
        "ce": ce,
        "contrast": contrast,
        "row_mean_log_prob": rows,
        "grad": z.grad,
        "grad_features": features.grad,
        "grad_centers": centers.grad,
    }


def _linear(given: Fields, kind: type[nn.LinearClassifier] = nn.LinearClassifier, **options: Any) -> Any:
    """The classifier of weight [C, D] and, if the case has one, bias [C]."""
    classes, dim = given["weight"].shape
    classifier = kind(1, dim, classes, **options).to(given["weight"].dtype)
    with torch.no_grad():
        classifier.weight.copy_(given["weight"].T)
        if "bias" in given:
            classifier.bias.copy_(given["bias"])
    return classifier


def _lws(given: Fields, hyper: Hyper) -> Fields:
    scaled = nn.ScaledClassifier(_linear(given))
    with torch.no_grad():
        scaled.scales.copy_(given["scales"])
    features = leaf(given["features"])
    logits = scaled(features.unsqueeze(0))
    counts = {"logits": logits, "class_counts": torch.ones(logits.shape[-1], dtype=torch.int64)}
    method = create("lws", counts, 1)
    loss, _ = method.loss(logits, given["target"], stage=method.stages[1])
    loss.backward()
    return {
        "loss": loss,
        "logits": logits[0],
        "grad_scales": scaled.scales.grad[0],
        "grad_features": features.grad,
    }


def _tau_norm(given: Fields, hyper: Hyper) -> Fields:
    classifiers = [_linear(given, nn.NormalizedClassifier, tau=tau).eval() for tau in hyper["tau"]]
    features = given["features"].unsqueeze(0)
    return {
        "weights": torch.stack([one.normalized_weight()[0].T for one in classifiers]),
        "logits": torch.stack([one(features)[0] for one in classifiers]),
    }


_CASES: dict[str, Callable[[Fields, Hyper], Fields]] = {
    **SEVERAL_EXPERTS,
    "balanced_softmax": _balanced_softmax,
    "logit_adjustment": _logit_adjustment,
    "logit_adjustment_no_eps": _logit_adjustment_no_eps,
    "los": _los,
    "class_balanced": _reweighted("cb"),
    "ldam": _reweighted("ldam-drw"),
    "focal": _reweighted("focal"),
    "paco": _paco(both_views=False),
    "gpaco": _paco(both_views=True),
    "bcl": _bcl,
    "lws": _lws,
    "tau_norm": _tau_norm,
}
