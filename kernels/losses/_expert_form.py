"""What a call of the generalised expert loss asks of the kernels: their arguments, and what they are compiled for."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shike_fast.kernels.losses._rows import LOGITS_OF_A_LANE, Layout, Tile, none_if_unit
from shike_fast.ops._expert_call import (
    GIVEN,
    MEAN,
    NO_TEACHER,
    OTHERS,
    VIEW,
    ExpertOptions,
    ExpertTensors,
    is_plain_divergence,
    kl_row_weights,
    row_weights,
)

_AT_ONCE = 8  # classes of a lane
_OF_A_LANE = 16  # in the backward, which spreads over them what it reads of a row


class Form:
    """A call, and what follows from it for both kernels and for the one between them."""

    def __init__(self, layout: Layout, tensors: ExpertTensors, options: ExpertOptions) -> None:
        self.layout, self.tensors, self.options = layout, tensors, options
        self.diverges = options.teacher != NO_TEACHER
        self.shared = options.cross_entropy and self.diverges and is_plain_divergence(tensors, options)
        self.adjusted = options.adjusted or self.shared
        self.ranked = options.gated or (options.rows and options.cross_entropy)
        # The divergence alone leaves a target out of its sums only to find out whether an answer is right.
        labelled = options.cross_entropy or options.gated
        self.target = tensors.target if labelled else None
        self.second = tensors.target_b if labelled else None
        self.mask = None if tensors.class_mask is None else tensors.class_mask.contiguous().view(torch.uint8)
        self.inverse_temperatures = None if tensors.temperature is None else tensors.temperature.reciprocal()
        self.images = layout.batch // 2 if options.teacher == VIEW else 0
        # Whether the divergence's rows are weighted by tensors, and whether these belong to students among experts.
        self.weighted = not (tensors.kl_weight is tensors.gate is tensors.temperature is None)
        self.by_student = options.teacher == OTHERS and options.by_student and self.weighted

    @cached_property
    def teachers(self) -> int:
        """How many teachers' logits a class has: one for all experts, or one each."""
        if self.options.teacher in (NO_TEACHER, OTHERS):
            return 0
        if self.options.teacher == MEAN:
            return 1
        if self.options.teacher == VIEW:
            return self.layout.experts
        assert self.tensors.teacher is not None
        of_experts = [self.tensors.bias, self.tensors.scale] if self.adjusted else []
        by_expert = self.tensors.teacher.dim() == 3 or any(t is not None and t.dim() == 2 for t in of_experts)
        return self.layout.experts if by_expert else 1

    @property
    def columns(self) -> int:
        """Of [K, B] numbers that the forward kernel leaves."""
        labels = (self.target is not None) + (self.second is not None)
        entropy = self.options.cross_entropy
        own = 2 * (entropy and not self.shared) + self.smoothing + self.ranked + labels * entropy
        of_teacher = self.teachers > 0
        return own + (3 + 2 * of_teacher + labels * (1 + of_teacher)) * self.diverges

    @property
    def smoothing(self) -> bool:
        return self.options.cross_entropy and self.options.label_smoothing != 0.0

    @property
    def flags(self) -> dict[str, Any]:
        """What both kernels are compiled for, beside the tile."""
        return {
            "K": self.layout.experts,
            "CROSS_ENTROPY": self.options.cross_entropy,
            "SHARED": self.shared,
            "SMOOTHING": self.smoothing,
            "TEACHER": self.options.teacher,
            "TEACHERS": self.teachers,
            "ADJUSTED": self.adjusted,
            "EXCLUDE": self.options.masked == "exclude",
        }

    @property
    def end_flags(self) -> dict[str, Any]:
        return {
            **{name: self.flags[name] for name in ("CROSS_ENTROPY", "SHARED", "SMOOTHING", "TEACHER")},
            "RANKED": self.ranked,
            "GATED": self.options.gated,
            "ATTACHED": not self.options.detach,
            "OUTPUTS": self.options.rows and self.options.cross_entropy,
            "BY_ROW": self.options.reduction == "none",
            "EXPERTS": 4 if self.layout.experts <= 4 else 8,
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """The first parameters of both kernels."""
        layout, tensors, options = self.layout, self.tensors, self.options
        teacher = tensors.teacher
        scale, inverse_temperature = options.scale, 1.0 / options.temperature
        return {
            "logits": layout.first,
            "offsets": layout.far_offsets,
            "row_stride": layout.row_stride,
            "class_stride": none_if_unit(layout.class_stride),
            "classes": layout.classes,
            **_labels(self.target, self.second),
            "scale": None if scale == 1.0 or tensors.scale is not None else scale,
            "scales": tensors.scale,
            "scale_expert_stride": _expert_stride(tensors.scale),
            "bias": tensors.bias,
            "bias_expert_stride": _expert_stride(tensors.bias),
            "mask": self.mask,
            "inverse_temperature": None if inverse_temperature == 1.0 else inverse_temperature,
            "inverse_temperatures": self.inverse_temperatures,
            "teacher": teacher,
            "teacher_expert_stride": teacher.stride(0) if teacher is not None and teacher.dim() == 3 else 0,
            "teacher_row_stride": 0 if teacher is None else teacher.stride(-2),
            "teacher_class_stride": self._teacher_class_stride,
            "images": self.images,
        }

    @property
    def end_arguments(self) -> dict[str, Any]:
        """Parameters of the kernel between them, beside tensors of results and the weights."""
        margin = self.tensors.margin
        labels = _labels(self.target, self.second)
        for name in ("target_expert_stride", "second_expert_stride"):
            labels[name] = labels[name] or 0
        return {
            **labels,
            "margin": margin,
            "margin_expert_stride": _expert_stride(margin) or 0,
            "lam": self.options.lam,
            "lams": self.tensors.lam,
            "label_smoothing": self.options.label_smoothing,
            "images": self.images,
        }

    def weights(self, like: Tensor) -> dict[str, Any]:
        """The weights of the rows, as tensors where the call has weights; ``like`` has their dtype and device."""
        tensors, options = self.tensors, self.options
        shape = self.layout.experts, self.layout.batch, self.layout.classes
        first, second = self._shares()
        firsts = seconds = divergences = None
        of_rows = tensors.class_weight, tensors.sample_weight, tensors.expert_weight, tensors.lam
        if options.cross_entropy and any(weight is not None for weight in of_rows):
            firsts, seconds = row_weights(tensors, options, shape, like.dtype)
            firsts, seconds = firsts.contiguous(), None if seconds is None else seconds.contiguous()
        rows = self.layout.batch - self.images
        divisor = max(rows, 1) * (shape[2] if options.kl_reduction == "mean" else 1)
        if self.diverges and self.weighted:
            divergences = kl_row_weights(tensors, options, like.flatten()[:1].expand(shape), None).contiguous()
        return {
            "first_weight": first,
            "first_weights": firsts,
            "second_weight": second,
            "second_weights": seconds,
            "divergence_weight": options.kl_weight * options.temperature**2 / divisor,
            "divergence_weights": divergences,
            "students": divergences if self.by_student else None,
        }

    def _shares(self) -> tuple[float, float]:
        """The weights of both labels where nothing but the reduction and a number weighs."""
        experts = self.layout.experts if self.options.reduction in ("mean/K", "global_weighted_mean") else 1
        whole = 1.0 if self.options.reduction == "none" else 1.0 / (self.layout.batch * experts)
        lam = self.options.lam if self.second is not None else 1.0
        return whole * lam, whole * (1.0 - lam)

    @property
    def _teacher_class_stride(self) -> int | None:
        if self.options.teacher == GIVEN:
            assert self.tensors.teacher is not None
            return none_if_unit(self.tensors.teacher.stride(-1))
        return none_if_unit(self.layout.class_stride)

    def forward_steps(self, tile: Tile) -> tuple[int, int]:
        """How many tiles a program takes at once, and how often."""
        return tile.steps(self.layout.classes, min(_AT_ONCE, LOGITS_OF_A_LANE // self._streams))

    def backward_steps(self, tile: Tile) -> tuple[int, int, int]:
        """How many tiles a program takes at once, how often, and how many programs a row has."""
        at_once, _ = self.forward_steps(tile)
        tiles, programs = tile.steps(self.layout.classes, _OF_A_LANE)
        return at_once, tiles // at_once, programs

    @property
    def _streams(self) -> int:
        """How many logits are read of a class."""
        return self.layout.experts + (self.teachers if self.options.teacher != MEAN else 0)

    def tile(self, gradient: Tensor | None = None) -> Tile:
        """The tile of a program; chunks start at multiples of their size in all that it reads."""
        layout, tensors = self.layout, self.tensors
        of_classes = [t for t in (tensors.scale, tensors.bias, self.inverse_temperatures) if t is not None]
        of_rows = [t for t in (self.mask, tensors.teacher) if t is not None]
        agree = _agreement(layout, of_classes, of_rows)
        if self.images:
            agree = math.gcd(agree, self.images * layout.row_stride)
            if self.mask is not None:
                agree = math.gcd(agree, self.images * layout.classes)
        return layout.tile(gradient, agree, self._streams)


def _agreement(layout: Layout, of_classes: Sequence[Tensor], of_rows: Sequence[Tensor]) -> int:
    """By how many classes chunks may be apart to start at multiples of them in all these tensors, too.

    A load takes 16 bytes at most.
    """
    size = layout.first.element_size()
    start = layout.first.data_ptr() // size
    agree = 16
    for vector in of_classes:  # each row of logits starts elsewhere against it
        width = vector.element_size()
        agree = math.gcd(agree, 16 // width, start, layout.row_stride, vector.data_ptr() // width)
        agree = math.gcd(agree, vector.stride(0) if vector.dim() == 2 else 0)
    for matrix in of_rows:
        width = matrix.element_size()
        apart = start - matrix.data_ptr() // width, layout.row_stride - matrix.stride(-2)
        agree = math.gcd(agree, 16 // width, *apart, matrix.stride(0) if matrix.dim() == 3 else 0)
        if matrix.stride(-1) != 1:
            return 1
    return agree


def _expert_stride(of_classes: Tensor | None) -> int | None:
    return of_classes.stride(0) if of_classes is not None and of_classes.dim() == 2 else None


def _labels(target: Tensor | None, second: Tensor | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, labels in (("target", target), ("second", second)):
        arguments[name] = labels
        arguments[f"{name}_expert_stride"] = _expert_stride(labels)
        arguments[f"{name}_stride"] = 0 if labels is None else labels.stride(-1)
    return arguments
