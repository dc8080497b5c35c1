"""What a case of ``golden/methods.npz`` records, computed through the public library from its inputs and its JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shike_fast import methods, nn, ops
from shike_fast.methods.contrastive import balanced_contrast, parametric_contrast
from shike_fast.methods.ncl import queue_contrast
from shike_fast.methods.reslt import reslt_loss
from shike_fast.methods.ride import router_loss, router_targets

Fields = dict[str, Tensor]
Hyper = dict[str, Any]

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


def _leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def _create(name: str, given: Fields, experts: int, **hyper: Any) -> methods.Method:
    """A method; for a loss without class counts any will do."""
    classes = given["logits"].shape[-1]
    counts = given.get("class_counts", torch.ones(classes, dtype=torch.int64))
    return methods.create_method(name, class_counts=counts, num_experts=experts, **hyper)


def _of(hyper: Hyper, *names: str, **renamed: str) -> Hyper:
    """The hyper-parameters of these names that the case has; ``theirs=ours`` renames."""
    return {ours: hyper[theirs] for theirs, ours in ({n: n for n in names} | renamed).items() if theirs in hyper}


def _one(given: Fields, method: methods.Method, epoch: int = 0, **inputs: Any) -> tuple[Tensor, Fields]:
    """Loss and gradient of a method with one expert, for logits [B, C]."""
    z = _leaf(given["logits"])
    loss, _ = method.loss(z.unsqueeze(0), given["target"], epoch=epoch, **inputs)
    loss.backward()
    return z, {"loss": loss, "grad": z.grad}


def _several(given: Fields, method: methods.Method, epoch: int = 0, **inputs: Any) -> tuple[Tensor, Fields]:
    """Likewise of several experts, for logits [K, B, C]."""
    z = _leaf(given["logits"])
    loss, _ = method.loss(z, given["target"], epoch=epoch, **inputs)
    loss.backward()
    return z.detach(), {"loss": loss, "grad": z.grad}


def _of_experts(experts: int, loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """What each expert adds to a loss that takes a weight for each, [K]."""
    return torch.stack([loss(like.new_zeros(experts).index_fill_(0, torch.tensor(k), 1)) for k in range(experts)])


def _student(experts: int, rows: int) -> Callable[[int, Tensor], Tensor]:
    return lambda k, like: like.new_zeros(experts, rows).index_fill_(0, torch.tensor(k), 1)


# ---- one expert


def _balanced_softmax(given: Fields, hyper: Hyper) -> Fields:
    method = _create("balanced-softmax", given, 1)
    z, results = _one(given, method)
    rows = ops.expert_loss(z.unsqueeze(0), given["target"], bias=method.bias.of(z), reduction="none")
    return results | {"row_loss": rows[0]}


def _logit_adjustment(given: Fields, hyper: Hyper) -> Fields:
    method = _create("la", given, 1, **_of(hyper, "tau", "eps"))
    z, results = _one(given, method)
    after = _create("la", given, 1, post_hoc=True, **_of(hyper, "tau", "eps"))
    scores = after.scores(z.unsqueeze(0), stage=after.stages[0])
    return results | {"bias": method.bias.value, "posthoc_logits": scores}


def _logit_adjustment_no_eps(given: Fields, hyper: Hyper) -> Fields:
    bias = ops.class_bias(given["class_counts"], hyper["tau"])
    z = _leaf(given["logits"])
    weight = given["class_weight"] if hyper["weighted"] else None
    reduction = "mean" if weight is None else "weighted_mean"
    loss = ops.expert_loss(z.unsqueeze(0), given["target"], bias=bias, class_weight=weight, reduction=reduction)
    loss.backward()
    return {"loss": loss, "grad": z.grad, "bias": bias}


def _los(given: Fields, hyper: Hyper) -> Fields:
    return _one(given, _create("los", given, 1, **_of(hyper, "label_smoothing")))[1]


def _reweighted(name: str) -> Callable[[Fields, Hyper], Fields]:
    def case(given: Fields, hyper: Hyper) -> Fields:
        own = _of(hyper, "beta", "gamma", "max_m", drw_epoch="reweight_epoch", s="scale")
        method = _create(name, given, 1, train_rule=_RULES[hyper["train_rule"]], **own)
        epoch = hyper.get("epoch", 0)
        z, results = _one(given, method, method.phase(epoch))
        if hyper["train_rule"] != "None":
            weight = method.class_weight(z, method.phase(epoch))
            results["class_weight"] = torch.ones_like(given["class_counts"]) if weight is None else weight
        if name == "ldam-drw":
            results["margin"] = method.margin.value / hyper["s"]
        return results

    return case


# ---- several experts


def _ride_method(given: Fields, hyper: Hyper) -> tuple[methods.Method, int]:
    own = _of(
        hyper,
        "max_m",
        "reweight_epoch",
        "reweight_factor",
        "base_loss_factor",
        "additional_diversity_factor",
        "base_diversity_temperature",
        "uses_class_counts",
        "ride_loss_factor",
        "additional_distill_loss_factor",
        "distill_temperature",
        s="scale",
    )
    method = _create("ride", given, given["logits"].shape[0], **own)
    return method, method.phase(hyper["epoch"] - 1)


def _ride_constants(method: methods.Method, epoch: int) -> Fields:
    if not method.uses_class_counts:
        return {}
    constants = {"margin": method.margin.value / method.scale}
    if epoch >= method.begin:
        constants |= {"class_weight": method.weight.value, "temperature": method.temperature.value}
    return constants


def _ride(given: Fields, hyper: Hyper) -> Fields:
    method, epoch = _ride_method(given, hyper)
    z, results = _several(given, method, epoch)
    late = "class_weight" in (constants := _ride_constants(method, epoch))
    experts, batch, _ = z.shape
    collaborative = hyper["additional_diversity_factor"] == 0
    seen = z.mean(0, keepdim=True).expand_as(z) if collaborative else z
    margin = method.margin.of(z) if method.uses_class_counts else None
    ce = _of_experts(
        experts,
        lambda chosen: ops.expert_loss(
            seen,
            given["target"],
            margin=margin,
            class_weight=method.weight.of(z) if late else None,
            expert_weight=chosen,
            reduction="weighted_mean",
        ),
        z,
    )
    temperature = method.temperature.of(z) if late else torch.tensor(hyper["base_diversity_temperature"]).to(z)
    factor = temperature.mean() ** 2
    kl = _of_experts(
        experts,
        lambda chosen: ops.expert_kl(
            z, "mean", temperature=temperature, weight=chosen[:, None].expand(experts, batch) / factor
        ),
        z,
    )
    return results | constants | {"ce": ce, "kl": kl}


def _ride_distill(given: Fields, hyper: Hyper) -> Fields:
    method, epoch = _ride_method(given, hyper)
    _, results = _several(given, method, epoch, teacher_logits=given["teacher_logits"])
    alone, _ = method.loss(given["logits"], given["target"], epoch=epoch)
    mean = given["logits"].mean(0, keepdim=True)
    distill = ops.expert_kl(mean, given["teacher_logits"], temperature=hyper["distill_temperature"])
    return results | _ride_constants(method, epoch) | {"ride_loss": alone, "distill_kl": distill}


def _ride_router(given: Fields, hyper: Hyper) -> Fields:
    router = _leaf(given["router_logits"])
    loss = router_loss(router, given["logits"], given["target"], hyper["pos_weight"])
    loss.backward()
    return {
        "loss": loss,
        "grad": router.grad,
        "router_target": router_targets(given["logits"], given["target"]),
        "ensemble_logits": given["logits"].mean(0),
    }


def _sade(given: Fields, hyper: Hyper) -> Fields:
    method = _create("sade", given, 3, **_of(hyper, "tau"))
    z, results = _several(given, method)
    bias = method.bias.of(z)
    rows = ops.expert_loss(z, given["target"], bias=bias, reduction="none")
    reverse = ops.class_bias(given["class_counts"], kind="reverse").exp()
    return results | {"ce": rows.mean(1), "bias": method.bias.value, "reverse_prior": reverse}


def _sade_tta(given: Fields, hyper: Hyper) -> Fields:
    from shike_fast.engine.test_time import ExpertWeights

    views = list(zip(given["logits_view0"], given["logits_view1"], strict=True))
    learned = ExpertWeights(
        views[0][0].shape[0],
        **_of(hyper, "lr", "momentum", "nesterov", "weight_decay"),
        dtype=views[0][0].dtype,
    )
    grads, weights = [], []
    for first, second in views:
        loss = learned.step(first, second)
        grads.append(learned.free.grad.clone())
        weights.append(learned.free.detach().clone())
    return {
        "loss": loss,
        "weight_grads": torch.stack(grads),
        "weights": torch.stack(weights),
        "final_softmax": learned.weights,
    }


def _balpoe(given: Fields, hyper: Hyper) -> Fields:
    method = _create("balpoe", given, given["logits"].shape[0], taus=[float(tau) for tau in hyper["tau"]])
    mixed = {name: given[name] for name in ("target_b", "lam") if name in given}
    z, results = _several(given, method, **mixed)
    bias = method.bias.of(z)
    results |= {
        "bias": method.bias.value,
        "expert_loss": ops.expert_loss(z, given["target"], bias=bias, reduction="none", **mixed).mean(1),
    }
    if mixed:
        for name, target in (("ce_a", "target"), ("ce_b", "target_b")):
            results[name] = ops.expert_loss(z, given[target], bias=bias, reduction="none").mean(1)
    return results


def _mdcs(given: Fields, hyper: Hyper) -> Fields:
    own = _of(hyper, "kl_factor", warmup="kl_warmup") | {"exponents": [float(e) for e in hyper["exponents"]]}
    method = _create("mdcs", given, given["logits"].shape[0], **own)
    epoch = method.phase(hyper["epoch"] - 1)
    z, results = _several(given, method, epoch)
    experts, images = z.shape[0], z.shape[1] // 2
    bias, target = method.bias.of(z), given["target"]
    loss, rows = ops.expert_loss(z, target, bias=bias, reduction="none", return_rows=True)
    adjusted = z + bias.unsqueeze(1)
    kl = _of_experts(
        experts,
        lambda chosen: ops.expert_kl(
            adjusted,
            "view",
            target=target,
            gate="teacher_correct",
            reduction="gated_mean",
            weight=chosen[:, None].expand(experts, images).contiguous(),
        ),
        z,
    )
    weight = torch.tensor(method.consistency_weight(epoch), dtype=torch.float64)
    return results | {
        "bias": method.bias.value,
        "ce": loss.mean(1),
        "gate": rows.correct[:, :images],
        "kl": kl,
        "kl_weight": weight,
    }


def _ncl_method(given: Fields, hyper: Hyper) -> methods.Method:
    own = _of(
        hyper, "ce_ratio", "hcm_ratio", "diversity_factor", "diversity_factor_hcm", "hcm_n", "con_ratio",
        temperature="contrast_temperature",
    )  # fmt: skip
    return _create("ncl", given, given["logits"].shape[0], **own)


def _hard(given: Fields, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """The hard classes as a mask [B, C], and their numbers [B, N]."""
    mask = ops.hardest_classes(given["logits"][0], given["target"], hyper["hcm_n"])
    return mask, mask.nonzero()[:, 1].view(len(mask), -1).to(torch.int32)


def _pairs(x: Tensor, eps: float, **masks: Any) -> Tensor:
    """The divergence of each student i from each teacher j, [K, K]."""
    experts = x.shape[0]
    result = x.new_zeros(experts, experts)
    for i in range(experts):
        for j in range(experts):
            if i != j:
                only = x.new_zeros(2, x.shape[1])
                only[1] = 1  # the second one teaches the first
                result[i, j] = ops.expert_kl(x[[i, j]], weight=only, eps=eps, **masks)
    return result


def _ncl(given: Fields, hyper: Hyper) -> Fields:
    method = _ncl_method(given, hyper)
    z, results = _several(given, method)
    mask, numbers = _hard(given, hyper)
    target, bias = given["target"], method.bias.of(z)
    masked = {"class_mask": mask, "masked": "zero"}
    adjusted = z + bias
    return results | {
        "ce": ops.expert_loss(z, target, bias=bias, reduction="none").mean(1),
        "hcm_ce": ops.expert_loss(z, target, bias=bias, reduction="none", **masked).mean(1),
        "hard_classes": numbers,
        "kl": _pairs(adjusted, hyper["eps"]),
        "hcm_kl": _pairs(torch.where(mask, adjusted, 0), hyper["eps"]),
    }


def _ncl_moco(given: Fields, hyper: Hyper) -> Fields:
    method = _ncl_method(given, hyper)
    query = _leaf(given["query"])
    z, results = _several(given, method, query=query, key=given["key"], queue=given["queue"])
    alone, _ = method.loss(z, given["target"])
    contrast = queue_contrast(query, given["key"], given["queue"], hyper["temperature"])
    return results | {"grad_query": query.grad, "ncl_loss": alone, "contrast_ce": contrast}


def _ncl_plus(given: Fields, hyper: Hyper) -> Fields:
    experts, rows, classes = given["logits"].shape
    own = _of(hyper, "ce_ratio", "hcm_ratio", "diversity_factor", "hcm_n", "intra_n")
    method = _create("ncl++", given, experts, **own)
    z, results = _several(given, method)
    mask, numbers = _hard(given, hyper)
    target, bias = given["target"], method.bias.of(z)
    adjusted, copies = z + bias, hyper["intra_n"]

    def divergences(x: Tensor, subset: Tensor) -> tuple[Tensor, Tensor]:
        weight = method.weight_of(len(x))
        full = ops.expert_kl(x, weight=weight, eps=hyper["eps"])
        return full, ops.expert_kl(x, weight=weight, eps=hyper["eps"], class_mask=subset, masked="partial")

    inter = divergences(adjusted, mask)
    images = rows // copies
    intra = [divergences(one.view(copies, images, classes), mask[:images]) for one in adjusted]
    return results | {
        "ce": ops.expert_loss(z, target, bias=bias, reduction="none").mean(1),
        "hcm_ce": ops.expert_loss(z, target, bias=bias, reduction="none", class_mask=mask, masked="zero").mean(1),
        "hard_classes": numbers,
        "inter_full": inter[0],
        "inter_partial": inter[1],
        "intra_full": torch.stack([full for full, _ in intra]),
        "intra_partial": torch.stack([partial for _, partial in intra]),
    }


def _reslt(given: Fields, hyper: Hyper) -> Fields:
    z = _leaf(given["logits"])
    classes = torch.arange(z.shape[-1])
    seen = torch.stack([(classes >= low) & (classes < high) for low, high in hyper["branch_classes"]])
    parts = [
        reslt_loss(
            branches,
            given["target"],
            seen,
            label_smoothing=hyper["label_smoothing"],
            soft_sum=hyper["fused_uses_eps_and_smoothing"],
        )
        for branches in z.view(-1, *z.shape[-3:])
    ]
    independent, fused = (torch.stack(part) for part in zip(*parts, strict=True))
    loss = (hyper["beta"] * independent + (1 - hyper["beta"]) * fused).sum()
    loss.backward()
    shape = () if z.dim() == 3 else (-1,)
    return {
        "loss": loss,
        "grad": z.grad,
        "independent": independent.reshape(shape),
        "fused_ce": fused.reshape(shape),
        "branch_weight": seen[:, given["target"]].to(torch.int64),
    }


# ---- features and classifiers


def _paco(both_views: bool) -> Callable[[Fields, Hyper], Fields]:
    def case(given: Fields, hyper: Hyper) -> Fields:
        z, query, key = (_leaf(given[name]) for name in ("logits", "query", "key"))
        bias = None
        if hyper["uses_class_counts"]:
            bias = ops.class_bias(given["class_counts"], eps=hyper["eps_prior"]).to(z)
        own = _of(hyper, "alpha", "beta", "gamma", "supt", "temperature", "base_temperature", "smooth")
        loss, rows = parametric_contrast(
            z, given["target"], query, key, given["queue"], given["queue_target"], bias=bias,
            both_views=both_views, **own,
        )  # fmt: skip
        loss.backward()
        results = {"loss": loss, "grad": z.grad, "grad_query": query.grad, "row_mean_log_prob": rows}
        return results | ({"grad_key": key.grad} if both_views else {})

    return case


def _bcl(given: Fields, hyper: Hyper) -> Fields:
    z, features, centers = (_leaf(given[name]) for name in ("logits", "features", "centers"))
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
    features = _leaf(given["features"])
    logits = scaled(features.unsqueeze(0))
    counts = {"logits": logits, "class_counts": torch.ones(logits.shape[-1], dtype=torch.int64)}
    method = _create("lws", counts, 1)
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
    "balanced_softmax": _balanced_softmax,
    "logit_adjustment": _logit_adjustment,
    "logit_adjustment_no_eps": _logit_adjustment_no_eps,
    "los": _los,
    "class_balanced": _reweighted("cb"),
    "ldam": _reweighted("ldam-drw"),
    "focal": _reweighted("focal"),
    "ride": _ride,
    "ride_distill": _ride_distill,
    "ride_router": _ride_router,
    "sade": _sade,
    "sade_tta": _sade_tta,
    "balpoe": _balpoe,
    "mdcs": _mdcs,
    "ncl": _ncl,
    "ncl_plus": _ncl_plus,
    "ncl_moco": _ncl_moco,
    "reslt": _reslt,
    "paco": _paco(both_views=False),
    "gpaco": _paco(both_views=True),
    "bcl": _bcl,
    "lws": _lws,
    "tau_norm": _tau_norm,
}
