"""Methods that see several views of an image, from the loader to the loss."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from shike_fast import models, ops
from shike_fast.data.loaders.loader import shard as share_of
from shike_fast.engine import trainer as trainer_module
from shike_fast.engine.config import resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.optimizer import set_lr
from shike_fast.engine.setup import _fewest_at_a_time, check_setting, make_loader
from shike_fast.engine.state import load_data
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals
from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage, at_least, option, registry

CPU = torch.device("cpu")
TRAINING = Stage("training", terms=("cross_entropy", "agreement"))
BALANCED = Stage("balanced", epochs="stage2_epochs", lr="stage2_lr", terms=TRAINING.terms, sampler="class-aware")


class Twins(Method):
    """Views of an image are to agree with its first one."""

    name = "twins"
    summary = "views that agree"
    stages = (TRAINING, BALANCED)

    copies: int = option(2, "views of an image", check=at_least(0))
    other: str = option("crop-flip", "augmentation of all views but the first")

    @classmethod
    def views(cls, settings):
        return (None, *[settings.other] * (settings.copies - 1))[: settings.copies]

    @classmethod
    def model_options(cls, settings):
        return {"classifier": "linear", "fusion": False}

    def loss(self, logits, target, *, stage=TRAINING, epoch=0, **inputs):
        assert logits.shape[1] == len(target) and len(target) % self.copies == 0
        self.target = target
        cross_entropy = ops.expert_cross_entropy(logits, target)
        log_p = logits.log_softmax(-1).unflatten(1, (self.copies, -1))  # [K, V, b, C]
        first = log_p[:, :1].exp().detach().expand_as(log_p)
        agreement = F.kl_div(log_p, first, reduction="sum") / len(target)
        return cross_entropy + agreement, {"cross_entropy": cross_entropy.detach(), "agreement": agreement.detach()}

    def phase(self, epoch):
        return 0


class LinearTwins(Twins):
    """The same for a linear layer on the pixels, which comes with the network and keeps what it was given."""

    name = "linear-twins"
    stages = (Stage("training", terms=TRAINING.terms, trains=lambda model: model.flat.parameters()),)

    @classmethod
    def extend_model(cls, model, settings):
        model.flat = nn.Linear(64, 10)

    def forward(self, model, images, stage):
        self.images = images
        return model.flat(images.flatten(1))[None]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register()


def register():
    for method in (Twins, LinearTwins):
        registry.register_method(method)


@pytest.fixture(scope="module")
def digits():
    return load_data(resolve({}))


def arguments(copies):
    small = ["--model", "resnet8", "--batch-size", 96, "--epochs", 2, "--stage2-epochs", 1, "--experts", 1]
    return ["--method", "twins", "--copies", copies, *small]


@pytest.mark.parametrize("copies", [2, 4])
def test_it_trains_and_resumes_bit_for_bit(runs, tmp_path, monkeypatch, copies):
    assert runs.train(*arguments(copies), "--output-dir", tmp_path / "whole") == 0
    rows = runs.metrics(tmp_path / "whole")
    assert rows[0]["train_agreement"] > 0
    plain = trainer_module.Trainer._step
    for steps in (2, 6):  # within the first epoch, and that of the second stage
        left = [steps]

        def counted(trainer, images, labels, left=left):
            assert len(images) == copies * len(labels)
            plain(trainer, images, labels)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module.Trainer, "_step", counted)
            assert runs.train(*arguments(copies), "--output-dir", tmp_path / str(steps)) == 128 + signal.SIGTERM
        assert runs.train("--resume", "--output-dir", tmp_path / str(steps)) == 0
        runs.assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / str(steps) / "last.pt")
        assert runs.reproducible_metrics(tmp_path / "whole") == runs.reproducible_metrics(tmp_path / str(steps))


def make_steps(processes=Processes(), **settings):  # noqa: B008  (immutable)
    torch.manual_seed(0)
    model = models.create_model("resnet8", num_classes=10, in_channels=1, num_experts=1, fusion=False)
    config = resolve({"method": "linear-twins", "epochs": 2, "batch_size": 12} | settings)
    LinearTwins.extend_model(model, config)
    counts, totals = torch.arange(1, 11), Totals(CPU)
    steps = StageSteps(model.double(), config, 1, class_counts=counts, processes=processes, totals=totals)
    set_lr(steps.optimizer, 0.5)
    return steps


def batch(views, count=11):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(views * count, 1, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


def test_what_the_method_gets_and_what_is_counted():
    steps = make_steps(copies=3)
    images, labels = batch(3)
    with torch.no_grad():
        first = steps.model.flat(images[:11].flatten(1)).argmax(-1)
    steps(images, labels)
    assert torch.equal(steps.method.images, images)
    assert torch.equal(steps.method.target, torch.cat([labels] * 3))
    _, correct, counted, cross_entropy, agreement = steps.totals.sums.tolist()
    assert counted == 11
    assert correct == (first == labels).sum()
    assert cross_entropy > 0 and agreement > 0


@pytest.mark.parametrize("copies", [1, 2, 4])
@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_keeps_the_views_of_an_image_together(copies, parts):
    images, labels = batch(copies)
    whole, split = make_steps(copies=copies), make_steps(copies=copies, accumulate=parts)
    for _ in range(3):
        whole(images, labels)
        split(images, labels)
    last = images.unflatten(0, (copies, 11)).tensor_split(parts, 1)[-1]
    assert torch.equal(split.method.images, last.flatten(0, 1))
    torch.testing.assert_close(split.model.flat.weight, whole.model.flat.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(split.totals.sums, whole.totals.sums, rtol=1e-6, atol=1e-6)


def test_the_layout_of_the_images_survives_the_parts():
    steps = make_steps(copies=2, accumulate=2)
    images = torch.randn(8, 4, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    steps(images, torch.arange(4))
    assert torch.equal(steps.method.images, images[[2, 3, 6, 7]])
    assert steps.method.images.is_contiguous(memory_format=torch.channels_last)
    assert steps.method.target.tolist() == [2, 3, 2, 3]


def two_processes_here():
    register()
    processes = Processes(dist.get_rank(), dist.get_world_size())
    images, labels = batch(2)
    share = share_of(np.arange(11), processes.rank, processes.world_size)
    steps = make_steps(processes, copies=2)
    for _ in range(3):
        steps(images.unflatten(0, (2, 11))[:, share].flatten(0, 1), labels[share], 11)
    return steps.model.flat.weight.detach(), processes.total(steps.totals.sums)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(two_processes):
    alone = make_steps(copies=2)
    for _ in range(3):
        alone(*batch(2))
    for weight, totals in two_processes(two_processes_here):
        torch.testing.assert_close(weight, alone.model.flat.weight.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(totals, alone.totals.sums, rtol=1e-6, atol=1e-6)


def test_a_view_without_a_name_is_of_the_runs_augmentation(digits):
    config = resolve({"method": "twins", "copies": 3})
    loader = make_loader(config, digits, CPU, train=True)
    assert [view.augmentation for view in loader.views] == ["shift", "crop-flip", "crop-flip"]
    assert make_loader(config, digits, CPU, train=False).views == (digits.test,)
    assert make_loader(resolve({}), digits, CPU, train=True).views == (digits.train,)


def test_a_slow_view_wants_workers(monkeypatch, digits):
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(3)))
    for other, workers in (("crop-flip", 0), ("cifar", 3)):
        config = resolve({"method": "twins", "other": other, "loader": "cpu"})
        assert make_loader(config, digits, CPU, train=True).num_workers == workers


def test_a_batch_counts_images_and_batch_norm_sees_all_views(digits):
    config = resolve({"method": "twins", "model": "resnet8", "batch_size": 382})
    images, labels = next(iter(make_loader(config, digits, CPU, train=True).epoch(0)))
    assert (len(images), len(labels)) == (764, 382)
    small = dataclasses.replace(digits, image_size=4)  # the last batch has one image, whose last maps are 1x1
    check_setting(config, small, CPU)
    with pytest.raises(ConfigError, match="the last batch holds 1, so that BatchNorm sees one alone"):
        check_setting(dataclasses.replace(config, copies=1), small, CPU)
    assert _fewest_at_a_time(7, dataclasses.replace(config, accumulate=3), Processes()) == 4


class Plain:
    """A data set that shows each of its images once an epoch."""

    def __init__(self, dataset):
        self.labels, self.seed, self.wants_workers = dataset.labels, 0, False

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, *, seed, epoch):
        return torch.zeros(len(indices), 1, 8, 8), torch.from_numpy(self.labels[indices])


def test_views_that_do_not_fit(runs, tmp_path, capsys, digits):
    for given, message in (
        (
            ["--other", "rrc"],
            "'twins' wants a view with the augmentation 'rrc', digits-lt has shift, none, ",
        ),
        (["--copies", 0], "'twins' takes no view of its images; at least one is needed"),
    ):
        assert runs.train("--method", "twins", *given, "--output-dir", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --method: {message}") and error.count("\n") == 1
        assert not (tmp_path / "run").exists()
    plain = dataclasses.replace(digits, train=Plain(digits.train))
    config = resolve({"method": "twins", "copies": 1})
    assert len(next(iter(make_loader(config, plain, CPU, train=True).epoch(0)))[0]) == 16
    with pytest.raises(ConfigError, match="wants a view with the augmentation 'crop-flip', digits-lt has "):
        make_loader(dataclasses.replace(config, copies=2), plain, CPU, train=True)
    same = type("Same", (Twins,), {"views": classmethod(lambda cls, settings: (None, None)), "name": "same"})
    registry.register_method(same)
    with pytest.raises(ConfigError, match=r"'same' takes 2 views of an image, but batch\(\) of digits-lt takes no"):
        make_loader(resolve({"method": "same"}), plain, CPU, train=True)
