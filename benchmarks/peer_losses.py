"""The peers of the methods' losses: their published formulations in plain eager PyTorch.

Written from the formulas the way the published scripts are: a loop over the experts, ``F.cross_entropy`` and
``F.kl_div`` on logits that are made for it, each a module that keeps what depends on the class counts. They are kinder
to the clock than those scripts in that nothing is moved between devices and nothing waits. All are in the phase of the
last epochs of a run: classes are weighted, ramps have ended. A method of one expert sums over those that it is given,
as a plain loop would. ``tests/benchmarks/test_peer_losses.py`` holds each against the method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import peer
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Logits = Sequence[Tensor]  # [B, C] of each expert
BETA, SCALE, MAX_MARGIN = 0.9999, 30.0, 0.5


def effective_weights(counts: Tensor) -> Tensor:
    """Class weights by the effective number of images, with the sum C."""
    weights = (1 - BETA) / (1 - BETA**counts)
    return weights / weights.sum() * len(counts)


def margins(counts: Tensor) -> Tensor:
    """LDAM's, with the largest MAX_MARGIN."""
    margin = 1 / counts.sqrt().sqrt()
    return margin * (MAX_MARGIN / margin.max())


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Of logits, the mean over the rows."""
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")


def kl_eps(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """As in NCL, with eps in the student's logarithm; with a mask over its classes alone."""
    p_student, p_teacher = F.softmax(student, dim=1), F.softmax(teacher, dim=1)
    terms = F.kl_div(torch.log(p_student + 1e-9), p_teacher, reduction="none")
    if mask is not None:
        terms = terms * mask
    return terms.sum(1).mean()


class Loss(nn.Module):
    """A loss: ``forward(logits, target)`` -> scalar.

    Args:
        counts: float64 [C], training images of each class.
        experts: K.
    """

    def __init__(self, counts: Tensor, experts: int) -> None:
        super().__init__()
        self.num_classes = len(counts)
        self.prepare(counts, experts)

    def prepare(self, counts: Tensor, experts: int) -> None:
        """Make the buffers."""

    def keep(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.register_buffer(name, value)


class CrossEntropy(Loss):
    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        loss = 0.0
        for z in logits:
            loss = loss + F.cross_entropy(z, target)
        return loss


class ClassBalanced(Loss):
    def prepare(self, counts: Tensor, experts: int) -> None:
        self.keep(weight=effective_weights(counts))

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        loss = 0.0
        for z in logits:
            loss = loss + F.cross_entropy(z, target, weight=self.weight)
        return loss


class Focal(Loss):
    gamma = 1.0

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        loss = 0.0
        for z in logits:
            rows = F.cross_entropy(z, target, reduction="none")
            p = torch.exp(-rows)
            loss = loss + ((1 - p) ** self.gamma * rows).mean()
        return loss


class LdamDrw(Loss):
    """Of cosines."""

    def prepare(self, counts: Tensor, experts: int) -> None:
        self.keep(margin=margins(counts), weight=effective_weights(counts))

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        loss = 0.0
        for z in logits:
            is_target = F.one_hot(target, self.num_classes).bool()
            lowered = torch.where(is_target, z - self.margin[target].unsqueeze(1), z)
            loss = loss + F.cross_entropy(SCALE * lowered, target, weight=self.weight)
        return loss


class Adjusted(Loss, ABC):
    """Cross-entropy of logits with a bias [K, C] added."""

    @abstractmethod
    def biases(self, counts: Tensor, experts: int) -> list[Tensor]:
        """A bias [C] for each expert."""

    def prepare(self, counts: Tensor, experts: int) -> None:
        self.keep(bias=torch.stack(self.biases(counts, experts)))

    def adjusted(self, logits: Logits) -> list[Tensor]:
        return [z + self.bias[k] for k, z in enumerate(logits)]

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        loss = 0.0
        for z in self.adjusted(logits):
            loss = loss + F.cross_entropy(z, target)
        return loss


class LogitAdjustment(Adjusted):
    tau = 1.0

    def biases(self, counts: Tensor, experts: int) -> list[Tensor]:
        return [torch.log((counts / counts.sum()) ** self.tau + 1e-12)] * experts


class BalancedSoftmax(Adjusted):
    def biases(self, counts: Tensor, experts: int) -> list[Tensor]:
        return [torch.log(counts)] * experts


class LabelOverSmoothing(Loss):
    """Of the second stage."""

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        loss = 0.0
        for z in logits:
            loss = loss + F.cross_entropy(z, target, label_smoothing=0.98)
        return loss


class Shike(Loss):
    """Of the first stage."""

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        return peer.dkt_loss(logits, target)


class Ride(Loss):
    diversity_factor, reweight_factor = -0.2, 0.05

    def prepare(self, counts: Tensor, experts: int) -> None:
        prior = counts / counts.sum()
        temperature = self.num_classes * prior * self.reweight_factor + 1 - self.reweight_factor
        temperature = temperature / temperature.max()
        self.keep(margin=margins(counts), weight=effective_weights(counts), temperature=temperature)
        self.factor = self.diversity_factor * float(temperature.mean()) ** 2

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        mean = torch.stack(list(logits)).mean(0)
        loss = 0.0
        for z in logits:
            is_target = F.one_hot(target, self.num_classes).to(z.dtype)
            lowered = z - SCALE * is_target * self.margin[target].unsqueeze(1)
            loss = loss + F.cross_entropy(lowered, target, weight=self.weight)
            with torch.no_grad():
                teacher = F.softmax(mean / self.temperature, dim=1)
            student = F.log_softmax(z / self.temperature, dim=1)
            loss = loss + self.factor * F.kl_div(student, teacher, reduction="batchmean")
        return loss


class Sade(Adjusted):
    tau = 2.0

    def biases(self, counts: Tensor, experts: int) -> list[Tensor]:
        prior = counts / counts.sum()
        order = torch.argsort(prior, stable=True)
        reverse = torch.empty_like(prior)
        reverse[order] = prior[order].flip(0)
        adjustment = torch.log(prior + 1e-9)
        return [0 * prior, adjustment, adjustment - self.tau * torch.log(reverse + 1e-9)]


class BalPoe(Adjusted):
    def biases(self, counts: Tensor, experts: int) -> list[Tensor]:
        prior = counts / counts.sum()
        return [tau * torch.log(prior + 1e-9) for tau in torch.linspace(0, 2, experts).tolist()]

    def forward(self, logits: Logits, target: Tensor, target_b: Tensor | None = None, lam: float = 1.0) -> Tensor:
        loss = 0.0
        for z in self.adjusted(logits):
            if target_b is None:
                loss = loss + F.cross_entropy(z, target)
            else:
                loss = loss + lam * F.cross_entropy(z, target) + (1 - lam) * F.cross_entropy(z, target_b)
        return loss / len(logits)


class Mdcs(Adjusted):
    """The first half of the rows are weak views, the second half strong ones of the same images."""

    kl_factor = 0.6

    def biases(self, counts: Tensor, experts: int) -> list[Tensor]:
        return [torch.log(counts**power + 1e-9) for power in (-0.5, 1.0, 2.5)]

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        images = len(target) // 2
        loss = 0.0
        for z in self.adjusted(logits):
            loss = loss + F.cross_entropy(z, target)
            weak, strong = z[:images], z[images:]
            right = (weak.argmax(1) == target[:images]).to(z.dtype)
            with torch.no_grad():
                teacher = F.softmax(weak, dim=1)
            rows = F.kl_div(F.log_softmax(strong, dim=1), teacher, reduction="none").sum(1)
            loss = loss + self.kl_factor * (rows * right).sum() / right.sum().clamp(min=1)
        return loss


class Ncl(BalancedSoftmax):
    diversity_factor = 0.6

    def hardest(self, logits: Logits, target: Tensor) -> Tensor:
        """1 for the label and the others of the largest logits of the first network, else 0: [B, C]."""
        first = logits[0].detach()
        is_target = F.one_hot(target, self.num_classes).bool()
        chosen = first.masked_fill(is_target, torch.inf).topk(self.num_classes * 3 // 10, dim=1).indices
        return torch.zeros_like(first).scatter_(1, chosen, 1.0)

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        mask = self.hardest(logits, target)
        everything = self.adjusted(logits)
        hard = [z * mask for z in everything]
        loss = 0.0
        for z, h in zip(everything, hard, strict=True):
            loss = loss + F.cross_entropy(z, target) + F.cross_entropy(h, target)
        for members in (everything, hard):
            for i, student in enumerate(members):
                for j, teacher in enumerate(members):
                    if i != j:
                        loss = loss + self.diversity_factor / (len(members) - 1) * kl_eps(student, teacher)
        return loss


class NclPlus(Ncl):
    """Rows are four views of the same images, one after the other."""

    views = 4

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        mask = self.hardest(logits, target)
        everything = self.adjusted(logits)
        loss = 0.0
        for z in everything:
            loss = loss + F.cross_entropy(z, target) + F.cross_entropy(z * mask, target)
        loss = loss + self.mutual(everything, mask)
        for z in everything:
            loss = loss + self.mutual(z.chunk(self.views), mask.chunk(self.views)[0])
        return loss

    def mutual(self, members: Logits, mask: Tensor) -> Tensor:
        pairs = len(members) * (len(members) - 1) / 2
        loss = 0.0
        for i, student in enumerate(members):
            for j, teacher in enumerate(members):
                if i != j:
                    loss = loss + self.diversity_factor / pairs * kl_eps(student, teacher)
                    loss = loss + self.diversity_factor / pairs * kl_eps(student, teacher, mask)
        return loss


class ResLt(Loss):
    """Logits of three branches: for all classes, and for the shares with the fewest images."""

    branch_weight, shares = 0.995, (1.0, 0.65, 0.3)

    def prepare(self, counts: Tensor, experts: int) -> None:
        rarest = torch.argsort(counts, stable=True)
        seen = torch.zeros(len(self.shares), self.num_classes, dtype=counts.dtype)
        for branch, share in enumerate(self.shares):
            seen[branch, rarest[: round(share * self.num_classes)]] = 1
        self.keep(seen=seen)

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        total, count = 0.0, 0.0
        for z, seen in zip(logits, self.seen, strict=True):
            wanted = seen[target]
            log_p = torch.log(F.softmax(z, dim=1) + 1e-7)
            total = total - (wanted * log_p.gather(1, target.unsqueeze(1)).squeeze(1)).sum()
            count = count + wanted.sum()
        fused = F.cross_entropy(sum(logits), target)
        return self.branch_weight * total / count.clamp(min=1) + (1 - self.branch_weight) * fused


class Tcl(Adjusted):
    """From secondary sources, as the method: no code is published. The accuracies stay at their start, 0."""

    consensus_weight, silenced = 0.02, -30.0

    def biases(self, counts: Tensor, experts: int) -> list[Tensor]:
        return [delta * torch.log(counts / counts.sum()) for delta in (0.9, 1.0, 1.1)]

    def prepare(self, counts: Tensor, experts: int) -> None:
        super().prepare(counts, experts)
        self.keep(accuracy=torch.zeros_like(counts), images=torch.zeros_like(counts), right=torch.zeros_like(counts))

    def forward(self, logits: Logits, target: Tensor) -> Tensor:
        lack = torch.sqrt(1 - self.accuracy)
        weight = (self.num_classes * lack / lack.sum())[target]
        is_target = F.one_hot(target, self.num_classes).bool()
        with torch.no_grad():
            mean = torch.stack(list(logits)).mean(0)
            above = (mean > mean.gather(1, target.unsqueeze(1))) & ~is_target
            common = (mean * above).sum(1, keepdim=True) / above.sum(1, keepdim=True).clamp(min=1)
            consensus = F.softmax(torch.where(above, common, mean).masked_fill(is_target, self.silenced), dim=1)
            misled = above.any(1).to(mean.dtype)
        loss = 0.0
        for k, (z, adjusted) in enumerate(zip(logits, self.adjusted(logits), strict=True)):
            loss = loss + F.cross_entropy(adjusted, target)
            right = (z.argmax(1) == target).to(z.dtype)
            for j, student in enumerate(logits):
                if j != k:
                    rows = F.kl_div(F.log_softmax(student, dim=1), F.softmax(z, dim=1), reduction="none").sum(1)
                    loss = loss + (weight * right * rows).mean()
            silent = F.log_softmax(z.masked_fill(is_target, self.silenced), dim=1)
            rows = F.kl_div(silent, consensus, reduction="none").sum(1)
            loss = loss + self.consensus_weight * (misled * rows).mean()
            self.images.index_add_(0, target, torch.ones_like(right) / len(logits))
            self.right.index_add_(0, target, right / len(logits))
        return loss


PEERS: dict[str, Callable[[Tensor, int], Loss]] = {
    "shike": Shike,
    "ce": CrossEntropy,
    "balanced-softmax": BalancedSoftmax,
    "balpoe": BalPoe,
    "cb": ClassBalanced,
    "crt": CrossEntropy,
    "focal": Focal,
    "la": LogitAdjustment,
    "ldam-drw": LdamDrw,
    "los": LabelOverSmoothing,
    "lws": CrossEntropy,
    "mdcs": Mdcs,
    "ncl": Ncl,
    "ncl++": NclPlus,
    "ncm": CrossEntropy,
    "reslt": ResLt,
    "ride": Ride,
    "sade": Sade,
    "tau-norm": CrossEntropy,
    "tcl": Tcl,
}
"""By the method's name; ``crt``, ``lws``, ``ncm`` and ``tau-norm`` learn by cross-entropy in both stages."""
