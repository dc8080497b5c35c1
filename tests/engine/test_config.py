import dataclasses

import pytest
import torch

from shike_fast import data
from shike_fast.engine.config import resolve, resume_config
from shike_fast.errors import CheckpointError, ConfigError


def test_defaults_are_the_recipe():
    config = resolve({})
    recipe = data.datasets()["digits-lt"].recipe
    assert recipe["threads"] == 1
    assert config.dataset == "digits-lt"
    assert config.method == "shike"
    assert config.num_experts == 3
    assert {name: getattr(config, name) for name in recipe} == recipe


def test_the_recipes_of_the_large_data_sets():
    inat = resolve({"dataset": "inat18", "epochs": 100})  # the preset of 100 epochs
    assert (inat.model, inat.stage1_epochs, inat.stage2_epochs) == ("resnet50", 90, 10)
    assert (inat.batch_size, inat.lr, inat.weight_decay, inat.augmentation) == (512, 0.2, 2e-4, "rrc-randaugment")
    imagenet = resolve({"dataset": "imagenet-lt"})
    assert (imagenet.stage1_epochs, imagenet.stage2_epochs) == (180, 20)
    assert (imagenet.batch_size, imagenet.augmentation) == (256, "rrc-jitter-randaugment")
    places = resolve({"dataset": "places-lt", "pretrained": "resnet152.pth"})
    assert (places.model, places.stage1_epochs, places.stage2_epochs) == ("resnet152", 30, 10)
    assert (places.lr, places.warmup_epochs, places.pretrained) == (0.02, 0, "resnet152.pth")
    assert places.lr_of(0) == 0.02
    assert resolve({"dataset": "places-lt", "pretrained": "none"}).pretrained is None
    with pytest.raises(ConfigError, match="begins with ImageNet weights of resnet152"):
        resolve({"dataset": "places-lt"})


def test_every_data_set_has_a_recipe():
    for info in data.datasets().values():
        assert info.recipe.keys() >= {"model", "epochs", "stage2_epochs", "batch_size", "lr", "stage2_lr"}


def test_data_settings_are_those_of_the_data_set():
    config = resolve({})
    assert (config.imbalance_factor, config.augmentation) == (20.0, "shift")
    assert resolve({"dataset": "imagefolder"}).imbalance_factor is None
    stored = dataclasses.asdict(config)
    assert resume_config(stored, {"imbalance_factor": 20.0, "augmentation": "shift"}, "last.pt") == config


def test_threads_are_settled_when_the_run_begins():
    assert resolve({"dataset": "cifar10-lt"}).threads == torch.get_num_threads()
    assert resolve({"dataset": "cifar10-lt", "threads": 3}).threads == 3


def test_published_cifar_recipe():
    config = resolve({"dataset": "cifar100-lt"})
    assert (config.model, config.stage1_epochs, config.stage2_epochs, config.batch_size) == ("resnet32", 180, 20, 128)
    assert (config.momentum, config.weight_decay) == (0.9, 5e-4)
    assert [config.lr_of(e) for e in (0, 4, 5, 180, 184, 185)] == pytest.approx(
        [0.025, 0.125, 0.15, 0.0375, 0.0875, 0.1]
    )
    assert (config.stage_of(179), config.stage_of(180)) == (1, 2)


def test_given_values_win():
    config = resolve({"epochs": 7, "lr": 0.3, "model": "resnet8"})
    assert (config.epochs, config.lr, config.model) == (7, 0.3, "resnet8")


def test_epochs_alone_keep_the_share_of_stage_2():
    cifar = {"dataset": "cifar10-lt"}
    assert resolve(cifar | {"epochs": 100}).stage2_epochs == 10
    assert resolve(cifar | {"epochs": 2}).stage2_epochs == 1
    assert resolve(cifar | {"epochs": 1}).stage2_epochs == 0
    assert resolve(cifar | {"epochs": 5, "stage2_epochs": 5}).stage1_epochs == 0


def test_a_warmup_never_fills_a_short_stage():
    config = resolve({"epochs": 3, "stage2_epochs": 1, "warmup_epochs": 5, "lr": 0.1, "stage2_lr": 0.2})
    assert [config.lr_of(e) for e in range(3)] == pytest.approx([0.05, 0.1, 0.2])


def test_ce_is_one_plain_network_without_a_second_stage():
    config = resolve({"method": "ce"})
    assert (config.num_experts, config.stage2_epochs, config.epochs) == (1, 0, resolve({}).epochs)
    assert config.model_arguments() == {
        "name": config.model,
        "num_experts": 1,
        "fusion": False,
        "classifier": "linear",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "mnist"}, "--dataset: unknown data set 'mnist'; choose from .*digits-lt"),
        ({"method": "sgd"}, "--method: must be one of shike, ce, .*, got 'sgd'"),
        ({"model": "vgg"}, "--model: must be one of .*resnet32.*got 'vgg'"),
        ({"amp": "fp8"}, "--amp: must be one of auto, off, bf16, fp16, got 'fp8'"),
        ({"kl_reduction": "sum"}, "--kl-reduction: must be one of mean, batchmean, got 'sum'"),
        ({"epochs": -1}, "--epochs: must be at least 1, got -1"),
        ({"epochs": 0}, "--epochs: must be at least 1, got 0"),
        ({"stage2_epochs": -1}, "--stage2-epochs: must be at least 0, got -1"),
        ({"epochs": 3, "stage2_epochs": 4}, r"--stage2-epochs: must be at most --epochs.*\(3\), got 4"),
        ({"batch_size": 1}, "--batch-size: must be at least 2, got 1"),
        ({"num_experts": 0}, "--experts: must be at least 1, got 0"),
        ({"method": "ce", "num_experts": 3}, "--experts: method 'ce' is a single plain network, got 3"),
        ({"method": "ce", "stage2_epochs": 3}, "--stage2-epochs: method 'ce' has no second stage, got 3"),
        ({"lr": 0.0}, "--lr: must be a positive number, got 0.0"),
        ({"lr": float("nan")}, "--lr: must be a positive number, got nan"),
        ({"scale": 0.0}, "--scale: must be a positive number, got 0.0"),
        ({"stage2_lr": -1.0}, "--stage2-lr: must be a positive number, got -1.0"),
        ({"weight_decay": -1.0}, "--weight-decay: must be a number of at least 0, got -1.0"),
        ({"hardest_weight": float("inf")}, "--hardest-weight: must be a number of at least 0, got inf"),
        ({"mutual_weight": -0.5}, "--mutual-weight: must be a number of at least 0, got -0.5"),
        ({"momentum": 1.0}, r"--momentum: must be in \[0, 1\), got 1.0"),
        ({"warmup_epochs": -1}, "--warmup-epochs: must be at least 0, got -1"),
        ({"threads": 0}, "--threads: must be at least 1, got 0"),
        ({"threads": 10**12}, "--threads: must be at most 1024, got 1000000000000"),
        ({"workers": -1}, "--workers: must be at least 0, got -1"),
        ({"save_every": -1}, "--save-every: must be at least 0, got -1"),
        ({"seed": -1}, "--seed: must be at least 0, got -1"),
        ({"colour": "red"}, "unknown setting colour"),
    ],
)
def test_bad_values_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve(given)


def test_resume_takes_the_checkpoint_and_what_may_change():
    stored = dataclasses.asdict(resolve({"epochs": 9, "seed": 4}))
    config = resume_config(stored, {"workers": 3, "data_dir": "/elsewhere", "epochs": 9}, "last.pt")
    assert (config.epochs, config.seed, config.workers, config.data_dir) == (9, 4, 3, "/elsewhere")


def test_resume_takes_a_list_that_repeats_the_checkpoint_s():
    stored = dataclasses.asdict(resolve({"schedule": "step", "epochs": 9, "step_epochs": [3, 6]}))
    given = {"step_epochs": [3, 6]}  # as the command line has it
    assert resume_config(stored, given, "last.pt").step_epochs == (3, 6)
    with pytest.raises(CheckpointError, match=r"step_epochs is \(3, 6\), the command line says \[3, 5\]"):
        resume_config(stored, {"step_epochs": [3, 5]}, "last.pt")


def test_resume_refuses_another_run():
    stored = dataclasses.asdict(resolve({"model": "resnet8"}))
    with pytest.raises(CheckpointError, match=r"last.pt belongs to another run: model is 'resnet8', .* 'resnet32'"):
        resume_config(stored, {"model": "resnet32"}, "last.pt")


def test_resume_checks_what_may_change():
    stored = dataclasses.asdict(resolve({}))
    with pytest.raises(ConfigError, match="--workers: must be at least 0"):
        resume_config(stored, {"workers": -2}, "last.pt")


def test_resume_refuses_settings_of_the_wrong_type():
    stored = dataclasses.asdict(resolve({})) | {"epochs": "2"}
    with pytest.raises(CheckpointError, match=r"last\.pt was written by another version of shike_fast"):
        resume_config(stored, {}, "last.pt")


def test_resume_refuses_settings_of_another_version():
    stored = dataclasses.asdict(resolve({})) | {"colour": "red"}
    with pytest.raises(CheckpointError, match=r"last\.pt was written by another version of shike_fast"):
        resume_config(stored, {}, "last.pt")
