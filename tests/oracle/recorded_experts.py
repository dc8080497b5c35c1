"""The recorded cases of several experts, and what all cases need of their fields and hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shike_fast import methods, ops
from shike_fast.engine.test_time import ExpertWeights
from shike_fast.methods.ncl import queue_contrast
from shike_fast.methods.reslt import reslt_loss
from shike_fast.methods.ride import router_loss, router_targets

Fields = dict[str, Tensor]
Hyper = dict[str, Any]


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def create(name: str, given: Fields, experts: int, **hyper: Any) -> methods.Method:
    """A method; for a loss without class counts any will do."""
    classes = given["logits"].shape[-1]
    counts = given.get("class_counts", torch.ones(classes, dtype=torch.int64))
    return methods.create_method(name, class_counts=counts, num_experts=experts, **hyper)


def chosen(hyper: Hyper, *names: str, **renamed: str) -> Hyper:
    """The hyper-parameters of these names that the case has; ``theirs=ours`` renames."""
    return {ours: hyper[theirs] for theirs, ours in ({n: n for n in names} | renamed).items() if theirs in hyper}


def of_one(given: Fields, method: methods.Method, epoch: int = 0, **inputs: Any) -> tuple[Tensor, Fields]:
    """Loss and gradient of a method with one expert, for logits [B, C]."""
    z = leaf(given["logits"])
    loss, _ = method.loss(z.unsqueeze(0), given["target"], epoch=epoch, **inputs)
    loss.backward()
    return z, {"loss": loss, "grad": z.grad}


def several(given: Fields, method: methods.Method, epoch: int = 0, **inputs: Any) -> tuple[Tensor, Fields]:
    """Likewise of several experts, for logits [K, B, C]."""
    z = leaf(given["logits"])
    loss, _ = method.loss(z, given["target"], epoch=epoch, **inputs)
    loss.backward()
    return z.detach(), {"loss": loss, "grad": z.grad}


def of_experts(experts: int, loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """What each expert adds to a loss that takes a weight for each, [K]."""
    return torch.stack([loss(like.new_zeros(experts).index_fill_(0, torch.tensor(k), 1)) for k in range(experts)])


# ---- several experts


def _ride_method(given: Fields, hyper: Hyper) -> tuple[methods.Method, int]:
    own = chosen(
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
    method = create("ride", given, given["logits"].shape[0], **own)
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
    z, results = several(given, method, epoch)
    late = "class_weight" in (constants := _ride_constants(method, epoch))
    experts, batch, _ = z.shape
    collaborative = hyper["additional_diversity_factor"] == 0
    seen = z.mean(0, keepdim=True).expand_as(z) if collaborative else z
    margin = method.margin.of(z) if method.uses_class_counts else None
    ce = of_experts(
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
    kl = of_experts(
        experts,
        lambda chosen: ops.expert_kl(
            z, "mean", temperature=temperature, weight=chosen[:, None].expand(experts, batch) / factor
        ),
        z,
    )
    return results | constants | {"ce": ce, "kl": kl}


def _ride_distill(given: Fields, hyper: Hyper) -> Fields:
    method, epoch = _ride_method(given, hyper)
    _, results = several(given, method, epoch, teacher_logits=given["teacher_logits"])
    alone, _ = method.loss(given["logits"], given["target"], epoch=epoch)
    mean = given["logits"].mean(0, keepdim=True)
    distill = ops.expert_kl(mean, given["teacher_logits"], temperature=hyper["distill_temperature"])
    return results | _ride_constants(method, epoch) | {"ride_loss": alone, "distill_kl": distill}


def _ride_router(given: Fields, hyper: Hyper) -> Fields:
    router = leaf(given["router_logits"])
    loss = router_loss(router, given["logits"], given["target"], hyper["pos_weight"])
    loss.backward()
    return {
        "loss": loss,
        "grad": router.grad,
        "router_target": router_targets(given["logits"], given["target"]),
        "ensemble_logits": given["logits"].mean(0),
    }


def _sade(given: Fields, hyper: Hyper) -> Fields:
    method = create("sade", given, 3, **chosen(hyper, "tau"))
    z, results = several(given, method)
    bias = method.bias.of(z)
    rows = ops.expert_loss(z, given["target"], bias=bias, reduction="none")
    reverse = ops.class_bias(given["class_counts"], kind="reverse").exp()
    return results | {"ce": rows.mean(1), "bias": method.bias.value, "reverse_prior": reverse}


def _sade_tta(given: Fields, hyper: Hyper) -> Fields:
    views = list(zip(given["logits_view0"], given["logits_view1"], strict=True))
    learned = ExpertWeights(
        views[0][0].shape[0],
        **chosen(hyper, "lr", "momentum", "nesterov", "weight_decay"),
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
    method = create("balpoe", given, given["logits"].shape[0], taus=[float(tau) for tau in hyper["tau"]])
    mixed = {name: given[name] for name in ("target_b", "lam") if name in given}
    z, results = several(given, method, **mixed)
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
    own = chosen(hyper, "kl_factor", warmup="kl_warmup") | {"exponents": [float(e) for e in hyper["exponents"]]}
    method = create("mdcs", given, given["logits"].shape[0], **own)
    epoch = method.phase(hyper["epoch"] - 1)
    z, results = several(given, method, epoch)
    experts, images = z.shape[0], z.shape[1] // 2
    bias, target = method.bias.of(z), given["target"]
    loss, rows = ops.expert_loss(z, target, bias=bias, reduction="none", return_rows=True)
    adjusted = z + bias.unsqueeze(1)
    kl = of_experts(
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
    own = chosen(
        hyper, "ce_ratio", "hcm_ratio", "diversity_factor", "diversity_factor_hcm", "hcm_n", "con_ratio",
        temperature="contrast_temperature",
    )  # fmt: skip
    return create("ncl", given, given["logits"].shape[0], **own)


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
    z, results = several(given, method)
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
    query = leaf(given["query"])
    z, results = several(given, method, query=query, key=given["key"], queue=given["queue"])
    alone, _ = method.loss(z, given["target"])
    contrast = queue_contrast(query, given["key"], given["queue"], hyper["temperature"])
    return results | {"grad_query": query.grad, "ncl_loss": alone, "contrast_ce": contrast}


def _ncl_plus(given: Fields, hyper: Hyper) -> Fields:
    experts, rows, classes = given["logits"].shape
    own = chosen(hyper, "ce_ratio", "hcm_ratio", "diversity_factor", "hcm_n", "intra_n")
    method = create("ncl++", given, experts, **own)
    z, results = several(given, method)
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
    z = leaf(given["logits"])
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


SEVERAL_EXPERTS: dict[str, Callable[[Fields, Hyper], Fields]] = {
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
}
