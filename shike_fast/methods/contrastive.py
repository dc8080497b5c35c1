"""Losses that contrast features with each other and with classes: PaCo, GPaCo and BCL.

They are functions for a training loop of your own; no method here trains with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12  # of the denominator, relative to its largest summand, as published


def parametric_contrast(
    logits: Tensor,
    target: Tensor,
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    queue_target: Tensor,
    *,
    bias: Tensor | None = None,
    both_views: bool = False,
    alpha: float = 0.05,
    beta: float = 1.0,
    gamma: float = 1.0,
    supt: float = 1.0,
    temperature: float = 0.2,
    base_temperature: float | None = None,
    smooth: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """PaCo's and GPaCo's loss: one softmax over the classes and the features of an anchor.

        u = (z + bias) / supt,  v_e = q x_e / T,  x = [queries, keys, queue] without the anchor itself
        Z = sum_c e^u + gamma sum_e e^v + 1e-12 e^max
        row = [beta (u[y] - log Z) + alpha sum_{e of the label} (v_e - log Z)] / (beta + alpha #)
        L = -(T / T_base) mean row

    where max is the row's largest u or v, the anchor's product with itself included. With ``smooth`` s the class target
    is 1 - s at the label and s / (C - 1) elsewhere.

    Args:
        logits: [B, C], or for ``both_views`` [2 B, C], queries first.
        target: int64 [B].
        query, key: [B, D], of length 1. Keys get a gradient only with ``both_views``.
        queue: [Q, D], earlier keys, without gradient.
        queue_target: int64 [Q].
        bias: [C], log(pi + 1e-9) as published; see :func:`~shike_fast.ops.class_bias`.
        both_views: GPaCo: the anchors are the queries and the keys.
        alpha, beta, gamma, supt, smooth: see above.
        temperature, base_temperature: T and T_base, default T.

    Returns:
        L, and the rows [anchors], detached.

    Source: Cui et al., PaCo, ICCV 2021, and GPaCo, TPAMI 2023.
    """
    key = key if both_views else key.detach()
    anchors = torch.cat([query, key]) if both_views else query
    entries = torch.cat([query, key, queue.detach()])
    labels = torch.cat([target, target]) if both_views else target
    entry_labels = torch.cat([target, target, queue_target])
    u = (logits if bias is None else logits + bias) / supt  # [A, C]
    v = anchors @ entries.T / temperature  # [A, E]
    own = torch.eye(*v.shape, dtype=torch.bool, device=v.device)
    largest = torch.maximum(u.amax(1), v.amax(1)).detach().unsqueeze(1)
    of_features = torch.where(own, 0, (v - largest).exp())
    log_z = largest + ((u - largest).exp().sum(1) + gamma * of_features.sum(1) + _TINY).log().unsqueeze(1)
    positive = (labels.unsqueeze(1) == entry_labels) & ~own
    other = smooth / (u.shape[1] - 1)
    at_label = u.gather(1, labels.unsqueeze(1)).squeeze(1)
    of_classes = other * u.sum(1) + (1 - smooth - other) * at_label - log_z.squeeze(1)
    of_positives = torch.where(positive, v - log_z, 0).sum(1)
    row = (beta * of_classes + alpha * of_positives) / (beta + alpha * positive.sum(1, dtype=v.dtype))
    return -(temperature / (base_temperature or temperature)) * row.mean(), row.detach()


def balanced_contrast(
    features: Tensor, target: Tensor, centers: Tensor, temperature: float = 0.07
) -> tuple[Tensor, Tensor]:
    """BCL's contrast: supervised contrast whose denominator counts every class once.

        Z_i = sum over classes of  mean over its entries e, without i, of  exp(f_i x_e / T)
        row_i = mean over the entries e of the label, without i, of  f_i x_e / T,  - log Z_i
        L = -mean row

    The entries x are the 2 B features and the C class centres.

    Args:
        features: [B, 2, D], of length 1, two views.
        target: int64 [B].
        centers: [C, D], of length 1.
        temperature: T.

    Returns:
        L, and the rows [2 B], detached; view 0 first.

    Source: Zhu et al., BCL, CVPR 2022, equation 6.
    """
    classes = len(centers)
    anchors = features.transpose(0, 1).flatten(0, 1)  # [2 B, D]
    labels = torch.cat([target, target])
    entry_labels = torch.cat([labels, torch.arange(classes, device=target.device)])
    v = anchors @ torch.cat([anchors, centers]).T / temperature  # [2 B, 2 B + C]
    own = torch.eye(*v.shape, dtype=torch.bool, device=v.device)
    of_class = (entry_labels.unsqueeze(1) == torch.arange(classes, device=target.device)).to(v.dtype)  # [E, C]
    mine = labels.unsqueeze(1) == entry_labels  # [2 B, E]
    members = of_class.sum(0)[entry_labels] - mine.to(v.dtype)  # of an entry's class, without the anchor
    largest = v.detach().amax(1, keepdim=True)
    shares = torch.where(own, 0, (v - largest).exp() / members.clamp_min(1))
    log_z = largest.squeeze(1) + shares.sum(1).log()
    positive = mine & ~own
    row = torch.where(positive, v, 0).sum(1) / positive.sum(1) - log_z
    return -row.mean(), row.detach()
