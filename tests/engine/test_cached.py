"""``--cache-features``: the same run, from what was computed once."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision_operators  # noqa: F401  (reports import torchvision)
from backbones import Elementwise, register_backbones

from shike_fast import methods, models
from shike_fast._util.resources import free_memory
from shike_fast.engine import cached, signals, trainer
from shike_fast.engine.config import resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.state import load_data
from shike_fast.engine.trainer import Trainer
from shike_fast.errors import ConfigError
from shike_fast.methods import Method, Stage, registry

CPU = torch.device("cpu")
SETTINGS = {"batch_size": 64, "epochs": 2, "stage2_epochs": 1, "threads": 1, "device": "cpu", "augmentation": "none"}
RUN = ["--batch-size", 64, "--epochs", 3, "--stage2-epochs", 1, "--threads", 1, "--augmentation", "none"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register_backbones(monkeypatch)


def trainer_of(folder, **settings):
    config = resolve(SETTINGS | {"model": "elementwise", "freeze": "trunk"} | settings)
    return Trainer(config, load_data(config), folder, device=CPU)


def weights_after_two_epochs(**settings):
    """Of each stage one; and what the tests found."""
    begun = trainer_of(None, **settings)
    for epoch in range(2):
        if begun.config.stage_of(epoch) != begun.stage:
            begun._leave_stage()
            begun._enter_stage(begun.config.stage_of(epoch))
        trainer.set_lr(begun.steps.optimizer, begun.config.lr_of(epoch))
        begun.steps.start_epoch(epoch)
        begun.model.train()
        for images, labels in begun.train_loader.epoch(epoch):
            begun.steps(images, labels)
    result = begun.evaluator(begun.test_loader.epoch(0))
    return begun.model.state_dict(), result.correct


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fusion": False, "accumulate": 2},
        {"method": "crt", "sampler": "progressive", "amp": "bf16"},
        {"ema": 0.9, "checkpoint_activations": True, "channels_last": False},
        {"init_classifier": "class-means", "workers": 0},
        {"method": "ncm"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_trunk_is_computed_once_and_the_steps_are_the_same_bit_for_bit(settings, monkeypatch):
    plain, correct = weights_after_two_epochs(**settings)
    calls = []
    monkeypatch.setattr(models.MultiExpertNetwork, "features", _counted(models.MultiExpertNetwork.features, calls))
    again, correct_again = weights_after_two_epochs(cache_features=True, **settings)
    assert calls == []
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    assert torch.equal(correct, correct_again)


def _counted(function, calls):
    def counted(self, images):
        calls.append(len(images))
        return function(self, images)

    return counted


@pytest.mark.parametrize("model", ["resnet8", "small_transformer"])
@pytest.mark.parametrize("freeze", ["trunk", "all-but-classifiers"])
def test_where_the_batch_changes_the_rounding_the_steps_differ_by_that(model, freeze):
    settings = {"model": model, "freeze": freeze, "init_classifier": "class-means"}
    plain, _ = weights_after_two_epochs(**settings)
    again, _ = weights_after_two_epochs(cache_features=True, **settings)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-4)


def test_pooled_features_are_those_of_the_network():
    begun = trainer_of(None, model="resnet8", freeze="all-but-classifiers", cache_features=True)
    images, _ = begun.dataset.test.batch(np.arange(20), seed=0, epoch=0)
    places, labels = next(iter(begun.test_loader.epoch(0)))
    assert places.shape[1:] == (1, 1, 1) and int(places[0]) == len(begun.dataset.train)
    assert labels[:20].tolist() == begun.dataset.test.labels[:20].tolist()
    network = begun.cache.network(begun.model)
    with torch.no_grad():
        expected = begun.model.eval().features(images)
    torch.testing.assert_close(network.features(places[:20]), expected)
    torch.testing.assert_close(network(places[:20], stage=2), begun.model.classify(expected, 2))


def test_a_whole_run_stopped_and_resumed_with_it(runs, tmp_path, monkeypatch, capsys):
    settings = ["--model", "elementwise", *RUN, "--freeze", "trunk"]
    assert runs.train(*settings, "--output-dir", tmp_path / "plain") == 0
    steps = iter(range(1, 1000))
    plain = trainer.Trainer._step

    def step(self, images, labels):
        plain(self, images, labels)
        if next(steps) == 8:
            signals.signal.raise_signal(signals.signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    assert runs.train(*settings, "--output-dir", tmp_path / "run") == 143
    capsys.readouterr()
    assert runs.train("--output-dir", tmp_path / "run", "--resume", "--cache-features") == 0
    assert "the features of 983 images are computed once and kept: 0.00422 GiB" in capsys.readouterr().out
    runs.assert_same_weights(tmp_path / "plain" / "last.pt", tmp_path / "run" / "last.pt")
    assert runs.reproducible_metrics(tmp_path / "plain") == runs.reproducible_metrics(tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_image_files_are_decoded_once(image_dir, workers):
    settings = {"dataset": "imagefolder", "data_dir": str(image_dir), "image_size": 32, "batch_size": 5}
    settings |= {"workers": workers, "init_classifier": "class-means"}
    plain, correct = weights_after_two_epochs(**settings)
    again, correct_again = weights_after_two_epochs(cache_features=True, **settings)
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
    assert torch.equal(correct, correct_again)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "off"}, "--cache-features: the trunk is trained, so that its features change; add --freeze trunk"),
        ({"adapter": "lora"}, "--cache-features: the adapters in the trunk are trained"),
        ({"method": "ce", "stage2_epochs": 0, "mixup": 0.2}, "--cache-features: --mixup makes new images"),
        ({"method": "ce", "stage2_epochs": 0, "cutmix": 0.2}, "--cache-features: --cutmix makes new images"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(SETTINGS | {"freeze": "trunk", "cache_features": True} | settings)


def test_augmented_images_are_refused():
    with pytest.raises(
        ConfigError, match=r"digits-lt shows an image differently in every epoch \(--augmentation shift\)"
    ):
        trainer_of(None, cache_features=True, augmentation="shift")
    config = resolve(SETTINGS | {"freeze": "trunk", "cache_features": True})
    dataset = load_data(config)
    with pytest.raises(ConfigError, match="--cache-features: digits-lt shows an image differently"):
        Trainer(config, dataclasses.replace(dataset, train=Outside(dataset.train)), None, device=CPU)


class Outside:
    """A set of the user's own, of whose transforms nothing is known."""

    seed, wants_workers = 0, False

    def __init__(self, inner):
        self.inner = inner
        self.labels = inner.labels

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, *, seed, epoch, repeats=None):
        return self.inner.batch(indices, seed=seed, epoch=epoch)


def test_methods_that_do_more_with_images_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    class Own(Method):
        summary = "an example"
        stages = (Stage("training"),)

        def loss(self, logits, target, *, stage=None, epoch=0, **inputs):
            return logits.sum(), {}

    @registry.register_method
    class Looking(Own):
        name = "looking"

        def forward(self, model, images, stage):
            return model(images * 2)

    @registry.register_method
    class Viewing(Own):
        name = "viewing"

        @classmethod
        def views(cls, settings):
            return None, "shift"

    @registry.register_method
    class Another(Own):
        name = "another"

        def evaluated(self, model):
            return torch.nn.Sequential(model)

    settings = SETTINGS | {"stage2_epochs": 0, "freeze": "trunk", "cache_features": True}
    with pytest.raises(ConfigError, match=r"'looking' does more with images than .* \(looks_at_images\)"):
        resolve(settings | {"method": "looking"})
    with pytest.raises(ConfigError, match="method 'viewing' wants views with the augmentation 'shift', which differ"):
        resolve(settings | {"method": "viewing"})
    with pytest.raises(ConfigError, match="the method tests a Sequential in place of the network"):
        trainer_of(None, stage2_epochs=0, method="another", cache_features=True)
    ride = methods.find_method("ride")
    assert not ride.looks_at_images(resolve({"method": "ride", "stage2_epochs": 0}))
    assert ride.looks_at_images(dataclasses.replace(resolve({"method": "ride", "stage2_epochs": 0}), teacher="a.pt"))


def test_networks_with_features_of_their_own_are_refused(monkeypatch):
    monkeypatch.setattr(Elementwise, "features", lambda self, images: images, raising=False)
    with pytest.raises(ConfigError, match=r"--cache-features: elementwise overrides features\(\)"):
        trainer_of(None, cache_features=True)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            "trunk",
            "features of 983 images take 0.00422 GiB, of .* GiB that are free at most 80% .*; use --freeze",
        ),
        ("all-but-classifiers", "may be taken; leave it out"),
    ],
)
def test_features_that_do_not_fit_in_memory_are_refused(monkeypatch, freeze, message):
    monkeypatch.setattr(cached, "free_memory", lambda device: 20_000)
    with pytest.raises(ConfigError, match=message):
        trainer_of(None, freeze=freeze, cache_features=True)


def test_memory_that_is_free(tmp_path, monkeypatch):
    from shike_fast._util import resources

    assert 2**20 < free_memory(CPU) < 2**50
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    5000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(resources, "_text", lambda path: files.get(path, ""))
    assert free_memory(CPU) == 5000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "3000000\n", "/sys/fs/cgroup/memory.current": "1000000\n"}
    assert free_memory(CPU) == 2_000_000
    files["/sys/fs/cgroup/memory.current"] = "4000000"
    assert free_memory(CPU) == 0
    files.clear()
    assert free_memory(CPU) > 0


# ---- several processes


def cache_here():
    """What a process has of the images: all of it; and what its loaders hand over."""
    with pytest.MonkeyPatch.context() as patch:
        register_backbones(patch)
        config = resolve(SETTINGS | {"model": "elementwise", "freeze": "trunk", "cache_features": True})
        processes = Processes(dist.get_rank(), dist.get_world_size())
        begun = Trainer(config, load_data(config), None, device=CPU, processes=processes)
        places = [images.flatten() for images, _ in begun.train_loader.epoch(0)]
        return begun.cache._rows, begun.cache.labels, torch.cat(places)


@pytest.mark.slow
def test_two_processes_share_the_work(two_processes):
    one, other = two_processes(cache_here)
    alone = trainer_of(None, cache_features=True)
    for rows, labels, _ in (one, other):
        assert torch.equal(labels, alone.cache.labels)
        assert all(torch.equal(rows[name], value) for name, value in alone.cache._rows.items())
    places = torch.cat([one[2], other[2]])
    assert places.sort().values.tolist() == list(range(len(alone.dataset.train)))
