"""``--method NAME`` alone gives the published setting of a data set."""

import re

import pytest

from shike_fast import methods, models
from shike_fast.engine.config import resolve
from shike_fast.errors import ConfigError

RECIPES = [(name, dataset) for name in methods.list_methods() for dataset in methods.find_method(name).recipes]
CIFAR = {"model": "resnet32", "epochs": 200, "batch_size": 128, "lr": 0.1, "warmup_epochs": 5, "schedule": "step"}
CIFAR |= {"step_epochs": (160, 180), "step_factor": 0.01, "subset": "ldam", "augmentation": "crop-flip"}


def setting(name, dataset, **given):
    return resolve({"method": name, "dataset": dataset, "pretrained": "none"} | given)


@pytest.mark.parametrize(("name", "dataset"), RECIPES)
def test_a_recipe_is_what_the_run_gets(name, dataset):
    config = setting(name, dataset)
    for key, value in methods.find_method(name).recipes[dataset].items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize("dataset", ["digits-lt", "cifar10-lt", "cifar100-lt", "imagenet-lt", "inat18", "places-lt"])
@pytest.mark.parametrize("name", methods.list_methods())
def test_every_method_has_a_setting_for_every_data_set(name, dataset):
    config = setting(name, dataset)
    epochs = config.stage_epochs
    assert min(epochs) >= 1 and sum(epochs) == config.epochs
    if dataset != "digits-lt":
        return
    network = models.create_model(**config.model_arguments(), num_classes=10, in_channels=1)
    methods.find_method(name).extend_model(network, config)
    assert network.num_experts == config.num_experts


PUBLISHED = {
    ("ldam-drw", "cifar100-lt"): CIFAR | {"weight_decay": 2e-4, "nesterov": False, "num_experts": 1},
    ("ride", "cifar100-lt"): CIFAR
    | {"weight_decay": 5e-4, "nesterov": True, "num_experts": 3, "additional_diversity_factor": -0.45},
    ("ride", "imagenet-lt"): {"epochs": 100, "batch_size": 256, "step_epochs": (60, 80), "reweight_factor": 0.02},
    ("sade", "cifar100-lt"): CIFAR | {"step_factor": 0.1, "tau": 2.0},
    ("sade", "cifar10-lt"): {"lr": 0.05, "expert_width": 1.0},
    ("sade", "places-lt"): {"epochs": 30, "lr": 0.01, "trunk_lr": 0.001, "tau": 1.0, "warmup_epochs": 0},
    ("balpoe", "cifar100-lt"): CIFAR | {"mixup": 0.4, "taus": (0.0, 2.0), "num_experts": 3},
    ("balpoe", "cifar10-lt"): {"mixup": 0.8},
    ("balpoe", "inat18"): {"mixup": 0.2, "taus": (-1.0, 1.0, 3.0), "epochs": 100, "schedule": "cosine"},
    ("mdcs", "cifar100-lt"): {"epochs": 400, "batch_size": 64, "step_epochs": (200, 320, 380), "warmup_epochs": 20},
    ("ncl", "cifar100-lt"): {"epochs": 400, "batch_size": 64, "weight_decay": 2e-4, "step_epochs": (320, 360)},
    ("ncl", "places-lt"): {"hcm_n": 122, "lr": 0.02, "epochs": 30},
    ("ncl++", "cifar100-lt"): {"num_experts": 2, "intra_n": 4},
    ("reslt", "cifar100-lt"): {"branch_weight": 0.995, "branch_shares": (1.0, 0.65, 0.3)},
    ("los", "cifar100-lt"): {"stage_epochs": (200, 20), "lr": 0.01, "stage2_lr": 5e-4, "label_smoothing": 0.98},
    ("crt", "imagenet-lt"): {"stage_epochs": (90, 10), "batch_size": 512, "lr": 0.2, "model": "resnext50_32x4d"},
    ("lws", "imagenet-lt"): {"stage_epochs": (90, 5)},
    ("tau-norm", "imagenet-lt"): {"stage_epochs": (90,)},
}


@pytest.mark.parametrize("case", PUBLISHED, ids="-".join)
def test_published_settings(case):
    config = setting(*case)
    for key, value in PUBLISHED[case].items():
        assert getattr(config, key) == value, key


@pytest.mark.parametrize(
    ("name", "experts", "stages", "width", "classifier"),
    [
        ("ride", 3, 2, 0.75, "cosine"),
        ("sade", 3, 2, 0.75, "cosine"),
        ("mdcs", 3, 2, 0.75, "cosine"),
        ("balpoe", 3, 2, 1.0, "cosine"),
        ("ncl", 3, "all", 1.0, "linear"),
        ("ncl++", 2, "all", 1.0, "linear"),
        ("la", 1, 1, 1.0, "linear"),
    ],
)
def test_published_networks(name, experts, stages, width, classifier):
    config = setting(name, "cifar100-lt")
    network = models.create_model(**config.model_arguments(), num_classes=100)
    found = network.description
    assert (found["num_experts"], found["classifier"], found["fusion"]) == (experts, classifier, False)
    assert (found.get("expert_stages", 1), found.get("expert_width", 1.0)) == (stages, width)


def test_a_shorter_run_keeps_its_shares():
    config = setting("ride", "cifar100-lt", epochs=40)
    assert config.step_epochs == (32, 36)
    assert setting("mdcs", "cifar100-lt", epochs=40).step_epochs == (20, 32, 38)
    assert setting("los", "cifar100-lt", epochs=44).stage_epochs == (40, 4)


@pytest.mark.parametrize("name", ["la", "balanced-softmax", "sade", "balpoe", "mdcs", "ncl", "ncl++", "tcl"])
def test_a_sampler_that_does_not_fit(name):
    method = re.escape(name)
    message = (
        f"--sampler: the loss of method '{method}' corrects for .* 'class-aware' draws other .* --sampler instance"
    )
    with pytest.raises(ConfigError, match=message):
        setting(name, "digits-lt", sampler="class-aware")
    assert setting("ce", "digits-lt", sampler="class-aware").sampler == "class-aware"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sade", {"num_experts": 2}, "--experts: method 'sade' has 3 experts, got 2 experts"),
        ("reslt", {"num_experts": 3}, "--experts: method 'reslt' is a single plain network, got 3 experts"),
        ("la", {"stage2_epochs": 3}, "--stage2-epochs: method 'la' has no second stage, got 3"),
        ("mdcs", {"mixup": 0.4}, "--mixup: the loss of method 'mdcs' takes no second label; methods that do: .*balpoe"),
        ("ride", {"taus": [0.0, 1.0]}, "--taus: method 'ride' has no such setting, it belongs to 'balpoe'"),
    ],
)
def test_settings_that_do_not_fit(name, given, message):
    with pytest.raises(ConfigError, match=message):
        setting(name, "digits-lt", **given)
