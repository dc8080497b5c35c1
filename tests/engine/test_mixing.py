"""``--mixup`` and ``--cutmix``: what is drawn, what becomes of images and loss, what methods get, what is refused."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shike_fast import methods, models, ops
from shike_fast.engine import steps as steps_module
from shike_fast.engine.averaging import WeightAverage
from shike_fast.engine.config import resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.mixing import Mixing, mix_images
from shike_fast.engine.optimizer import set_lr
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals
from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage, registry

SIZE = (6, 12, 10)  # images, height, width
CE = ["--method", "ce", "--model", "resnet8", "--batch-size", 64]


def mixing(mixup=0.0, cutmix=0.0, epochs=9, seed=0, rank=0):
    return Mixing(mixup=mixup, cutmix=cutmix, epochs=epochs, seed=seed, rank=rank)


def test_a_draw_is_a_function_of_seed_epoch_and_step():
    def values(epoch, step, **options):
        return [tensor.tolist() for tensor in mixing(0.7, 0.7, **options).draw(epoch, step, *SIZE)]

    first = values(2, 3)
    assert values(2, 3) == first
    for other in (values(3, 2), values(2, 4), values(2, 3, seed=1), values(2, 3, seed=2**64 - 1)):
        assert other[1][0] != first[1][0]
    order, kept = values(2, 3, rank=1)
    assert kept == first[1] and order != first[0]  # one lambda and one box, but each process mixes its own images
    assert sorted(order) == sorted(first[0]) == list(range(6))


def test_what_is_not_mixed():
    assert mixing().draw(0, 0, *SIZE) is None
    late = mixing(mixup=1.0, epochs=3)
    assert late.draw(2, 0, *SIZE) is not None and late.draw(3, 0, *SIZE) is None


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_are_beta(alpha):
    shares = np.array([float(mixing(mixup=alpha).draw(0, step, *SIZE)[1][0]) for step in range(2000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4 * math.sqrt(variance / len(shares))
    assert shares.var() == pytest.approx(variance, rel=0.15)


def test_a_box_is_what_lambda_says():
    lost = []
    for step in range(500):
        _, kept = mixing(cutmix=1.0).draw(0, step, *SIZE)
        assert set(kept[1:].tolist()) <= {0.0, 1.0}
        rows, columns = kept[1:13] == 0, kept[13:] == 0
        pasted = int(rows.sum()) * int(columns.sum())
        assert float(kept[0]) == np.float32(1 - pasted / 120)
        for line in (rows, columns):  # a box has no holes
            places = line.nonzero().flatten()
            assert not len(places) or int(places[-1] - places[0]) == len(places) - 1
        lost.append(pasted / 120)
    assert 0.25 < np.mean(lost) < 0.45  # half of the area, less what lies outside of the image


def test_both_take_turns_by_chance():
    both, kept = mixing(0.4, 0.4), []
    for step in range(1000):
        kept.append(both.draw(0, step, *SIZE)[1])
    cuts = sum(bool((values[1:] != values[0]).any()) for values in kept)
    assert abs(cuts - 500) < 4 * math.sqrt(250)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixup_of_images(layout, dtype):
    images = torch.randn(6, 3, 12, 10, dtype=dtype).contiguous(memory_format=layout)
    before = images.clone()
    order, kept = mixing(mixup=0.4).draw(0, 0, *SIZE)
    mixed = mix_images(images, order, kept)
    lam = float(kept[0])
    torch.testing.assert_close(mixed, lam * images + (1 - lam) * images[order])
    assert mixed.is_contiguous(memory_format=layout) and torch.equal(images, before)


def test_cutmix_of_images_moves_pixels_exactly():
    images = torch.randn(6, 3, 12, 10)
    for step in range(20):
        order, kept = mixing(cutmix=1.0).draw(0, step, *SIZE)
        box = torch.outer(kept[1:13] == 0, kept[13:] == 0)
        assert torch.equal(mix_images(images, order, kept), torch.where(box, images[order], images))
    assert box.any()


def test_views_are_mixed_each_with_its_own():
    images = torch.randn(12, 3, 12, 10)  # two views of six images
    order, kept = mixing(cutmix=1.0).draw(0, 3, *SIZE)
    mixed = mix_images(images, order, kept, views=2)
    for view in (slice(0, 6), slice(6, 12)):
        assert torch.equal(mixed[view], mix_images(images[view], order, kept))
    assert not torch.equal(mixed, images)


def make_steps(model, processes=None, record=False, average=None, **settings):
    config = resolve({"method": "ce", "model": "resnet8", "epochs": 3, "batch_size": 8} | settings)
    steps = StageSteps(
        model,
        config,
        1,
        class_counts=torch.arange(1, 6),
        processes=processes or Processes(),
        totals=Totals(torch.device("cpu")),
        record=record,
        average=average,
    )
    set_lr(steps.optimizer, 0.125)
    return steps


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randint(5, (8,))


def network():
    torch.manual_seed(0)
    return models.create_model("resnet8", num_classes=5, num_experts=1, fusion=False, classifier="linear").double()


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_a_step_learns_from_both_labels(batch, settings):
    images, labels = batch
    steps = make_steps(network(), **settings)
    steps.start_epoch(1)
    steps(images, labels, number=2)
    order, kept = Mixing(**{"mixup": 0.0, "cutmix": 0.0} | settings, epochs=3, seed=0).draw(1, 2, 8, 16, 16)
    lam, plain = float(kept[0]), network()
    logits = plain(mix_images(images, order, kept))[0]
    losses = [torch.nn.functional.cross_entropy(logits, target) for target in (labels, labels[order])]
    expected = lam * losses[0] + (1 - lam) * losses[1]
    assert float(steps.totals.sums[0]) / 8 == pytest.approx(expected.item(), rel=1e-12)
    assert float(steps.totals.sums[1]) == int((logits.argmax(-1) == labels).sum())  # of the first label
    expected.backward()
    for (name, ours), theirs in zip(steps.model.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")


def test_parts_are_mixed_as_the_whole(batch, monkeypatch):
    seen, plain = [], ops.expert_cross_entropy

    def loss(logits, target):
        seen.append(target)
        return plain(logits, target)

    monkeypatch.setattr(ops, "expert_cross_entropy", loss)
    for accumulate in (1, 2):
        make_steps(network(), mixup=1.0, accumulate=accumulate)(*batch)
    (first, second), parts = seen[:2], seen[2:]
    assert torch.equal(first, torch.cat(parts[::2])) and torch.equal(second, torch.cat(parts[1::2]))
    assert torch.equal(first, batch[1]) and not torch.equal(second, first)


class Recorded:
    """Calls the function with tensors that stay where they are, as a recording does."""

    def __init__(self, function, **_):
        self.function = function
        self.static = {}
        Recorded.last = self

    def __call__(self, *arguments):
        key = tuple((a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments)
        static = self.static.setdefault(key, [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments])
        for mine, given in zip(static, arguments, strict=True):
            if isinstance(given, torch.Tensor):
                mine.copy_(given)
        self.function(*static)


def test_a_recording_serves_all_mixed_steps(batch, monkeypatch):
    """What is drawn enters in tensors: two recordings, one mixed and one not, whichever way and share."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(steps_module, "CudaGraphRunner", Recorded)
    results = []
    for record in (False, True):
        model = network()
        average = WeightAverage(model, 0.5)
        steps = make_steps(model, record=record, average=average, mixup=0.5, cutmix=0.5, unmixed_epochs=1)
        set_lr(steps.optimizer, 0.125)
        for epoch in range(3):
            steps.start_epoch(epoch)
            for number in range(4):
                steps(*batch, number=number)
        results.append([*model.state_dict().values(), *average.network.state_dict().values()])
    assert len(Recorded.last.static) == 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def mixed_steps_here():
    processes = Processes(dist.get_rank(), dist.get_world_size())
    torch.manual_seed(processes.rank)
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randint(5, (4,))
    model = network()
    average = WeightAverage(model, 0.9)
    steps = make_steps(model, processes, average=average, mixup=0.4, cutmix=1.0)
    lams, plain = [], ops.expert_cross_entropy
    steps.method.loss = lambda logits, target, lam, **_: (lams.append(float(lam)), (plain(logits, target), {}))[1]
    for number in range(2):
        steps(images, labels, 8, number)
    return lams, dict(model.named_parameters()), dict(average.network.named_parameters())


def test_two_processes_mix_alike(two_processes):
    (lams, weights, averages), other = two_processes(mixed_steps_here)
    assert lams == other[0] and len(set(lams)) == 2
    for mine, theirs in ((weights, other[1]), (averages, other[2])):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert not torch.equal(weights["conv1.weight"], averages["conv1.weight"])


@pytest.fixture
def define(monkeypatch):
    """``define(loss, **content)``: a method that only this test knows."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def register(loss, **content):
        usual = {"name": "own", "summary": "a test", "stages": (Stage("one"),), "loss": loss, "mixes": True}
        return methods.register_method(type("Own", (Method,), usual | content))

    return register


def test_what_a_method_gets(define, runs, tmp_path):
    """Two labels and their weight while images are mixed, and nothing of it in the last epochs."""
    seen = []

    def loss(self, logits, target, *, stage=None, epoch=0, **inputs):
        seen.append((epoch, sorted(inputs)))
        if inputs:
            assert inputs["target_b"].dtype == torch.int64 and inputs["target_b"].shape == target.shape
            assert inputs["lam"].dtype == torch.float32 and inputs["lam"].shape == ()
        return ops.expert_cross_entropy(logits, target), {}

    define(loss)
    arguments = ["--method", "own", "--model", "resnet8", "--batch-size", 400, "--epochs", 3, "--mixup", 0.4]
    assert runs.train(*arguments, "--unmixed-epochs", 1, "--output-dir", tmp_path / "run") == 0
    assert seen == [(0, ["lam", "target_b"]), (1, ["lam", "target_b"]), (2, [])]


def test_the_views_of_a_step(define, batch):
    """All views of an image are mixed with those of one partner, and the second labels are repeated as the first."""
    seen = {}

    def forward(self, model, images, stage):
        seen["images"] = images
        return model(images, stage=stage.classifiers)

    def loss(self, logits, target, *, stage=None, epoch=0, target_b, lam):
        seen.update(target=target, target_b=target_b)
        return lam * ops.expert_cross_entropy(logits, target), {}

    define(loss, forward=forward, views=classmethod(lambda cls, settings: (None, None)))
    images, labels = batch
    both = torch.cat([images, images.flip(-1)])
    make_steps(network(), method="own", num_experts=1, cutmix=1.0)(both, labels, number=1)
    order, kept = Mixing(mixup=0.0, cutmix=1.0, epochs=3, seed=0).draw(0, 1, 8, 16, 16)
    for view, mine in zip(both.split(8), seen["images"].split(8), strict=True):
        assert torch.equal(mine, mix_images(view, order, kept))
    assert torch.equal(seen["target"], labels.repeat(2)) and torch.equal(seen["target_b"], labels[order].repeat(2))


def test_a_mixed_run(runs, tmp_path):
    arguments = [*CE, "--epochs", 2, "--mixup", 0.4, "--cutmix", 1, "--amp", "bf16"]
    assert runs.train(*arguments, "--output-dir", tmp_path / "mixed") == 0
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert (config["mixup"], config["cutmix"], config["unmixed_epochs"]) == (0.4, 1.0, 0)
    assert all(math.isfinite(row["train_loss"]) for row in runs.metrics(tmp_path / "mixed"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "shike", "mixup": 0.4}, "--mixup: the loss of method 'shike' takes no second label; .* do: ce"),
        ({"method": "shike", "cutmix": 0.4}, "--cutmix: the loss of method 'shike' takes no second label; .* do: ce"),
        ({"mixup": -1.0}, "--mixup: must be a number of at least 0, got -1.0"),
        ({"cutmix": float("nan")}, "--cutmix: must be a number of at least 0, got nan"),
        ({"unmixed_epochs": -1}, "--unmixed-epochs: must be at least 0, got -1"),
        (
            {"mixup": 0.4, "epochs": 5, "unmixed_epochs": 5},
            r"--unmixed-epochs: must be less than --epochs \(5\), got 5; to mix nothing leave --mixup out",
        ),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"method": "ce"} | given)
