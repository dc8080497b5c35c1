"""A method from outside, as a user writes one: three stages, two terms, own flags, hooks, a moving average."""

import copy
from typing import ClassVar

import torch
from torch.nn import functional as F

from shike_fast import ops
from shike_fast.methods import (
    Check,
    Method,
    Stage,
    at_least,
    not_negative,
    option,
    positive,
    register_method,
    second_classifiers,
)

TERMS = ("adjusted", "agreement")
WARM = Stage("warm", epochs=0.25, start_lr_factor=0.1, terms=TERMS)
MAIN = Stage("main", terms=TERMS)
POLISH = Stage(
    "polish",
    epochs="polish_epochs",
    lr="polish_lr",
    classifiers=2,
    trains=second_classifiers,
    frozen_features=True,
    terms=("adjusted",),
)


@register_method
class ThreeStages(Method):
    name = "three-stages"
    summary = "experts with a logit adjustment each, which agree more and more"
    source = "a test"
    stages = (WARM, MAIN, POLISH)
    defaults: ClassVar = {"num_experts": 2}
    recipes: ClassVar = {"digits-lt": {"batch_size": 64, "polish_lr": 0.05}}

    taus: tuple[float, ...] = option((0.0, 1.0), "weight of the log prior for each expert")
    agreement: float = option(0.5, "weight of the agreement", check=not_negative)
    polish_epochs: int = option(6, "epochs of the last stage", metavar="N", check=at_least(0))
    polish_lr: float = option(0.1, "highest learning rate of the last stage", check=positive)
    decay: float = option(0.9, "of the moving average", check=Check("in [0, 1)", lambda value: 0 <= value < 1))

    def __post_init__(self):
        prior = self.class_counts.float() / self.class_counts.sum()
        taus = torch.tensor(self.taus, device=prior.device)
        self.bias = taus[:, None] * prior.log()  # [K, C]
        self.weight = torch.zeros((), device=prior.device)
        self.average = None

    @classmethod
    def model_options(cls, settings):
        return {"classifier": "linear", "fusion": False}

    def loss(self, logits, target, *, stage=WARM, epoch=0, **inputs):
        adjusted = ops.expert_cross_entropy(logits, target, bias=self.bias)
        if stage is POLISH:
            return adjusted, {"adjusted": adjusted.detach()}
        mean = logits.mean(0).softmax(-1).detach()
        agreement = (
            self.weight * F.kl_div(logits.log_softmax(-1), mean.expand_as(logits), reduction="sum") / len(target)
        )
        return adjusted + agreement, {"agreement": agreement.detach(), "adjusted": adjusted.detach()}

    def phase(self, epoch):
        return 0  # what changes lies in a tensor

    def start_epoch(self, epoch, model, stage):
        self.weight.fill_(self.agreement * min(1.0, epoch / 2))

    def after_step(self, model):
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 1 - self.decay)
            for mine, theirs in zip(self.average.buffers(), model.buffers(), strict=True):
                mine.copy_(theirs)

    def evaluated(self, model):
        if self.average is None:
            self.average = copy.deepcopy(model)
        return self.average

    def scores(self, logits, *, stage):
        return logits.softmax(-1).mean(0).log()  # the mean of the probabilities

    def state(self):
        return {"average": self.average.state_dict()}

    def load_state(self, state):
        self.average.load_state_dict(state["average"])
