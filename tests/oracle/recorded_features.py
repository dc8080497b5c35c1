"""Recorded cases of losses on features and of re-balanced classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from recorded_common import Case, Fields, Hyper, create, hyper_of, leaf

from shike_fast import nn, ops
from shike_fast.methods.contrastive import balanced_contrast, parametric_contrast

# ---- features and classifiers


def _paco(both_views: bool) -> Callable[[Fields, Hyper], Fields]:
    def case(given: Fields, hyper: Hyper) -> Fields:
        z, query, key = (leaf(given[name]) for name in ("logits", "query", "key"))
        bias = None
        if hyper["uses_class_counts"]:
            bias = ops.class_bias(given["class_counts"], eps=hyper["eps_prior"]).to(z)
        own = hyper_of(hyper, "alpha", "beta", "gamma", "supt", "temperature", "base_temperature", "smooth")
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


CASES: dict[str, Case] = {
    "paco": _paco(both_views=False),
    "gpaco": _paco(both_views=True),
    "bcl": _bcl,
    "lws": _lws,
    "tau_norm": _tau_norm,
}
