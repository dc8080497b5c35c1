"""``--freeze``, ``--adapter`` and ``--init-classifier`` in runs: what is trained, saved, resumed, refused and used."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision_operators  # noqa: F401  (peft imports torchvision)
from backbones import register_backbones
from PIL import Image

from shike_fast import models
from shike_fast.engine import signals, trainer
from shike_fast.engine.config import resolve, resume_config
from shike_fast.engine.distributed import Processes
from shike_fast.engine.state import build_model, load_data
from shike_fast.engine.steps import StageSteps
from shike_fast.engine.totals import Totals
from shike_fast.engine.trainer import Trainer
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.evaluate import main as evaluate
from shike_fast.methods import Method, Stage, registry
from shike_fast.predict import main as predict
from shike_fast.train import main as train

SMALL = {"model": "resnet8", "batch_size": 64, "epochs": 2, "stage2_epochs": 1, "threads": 1, "device": "cpu"}
RUN = ["--batch-size", 64, "--epochs", 2, "--stage2-epochs", 1, "--threads", 1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    register_backbones(monkeypatch)


def trainer_of(folder, **settings):
    config = resolve(SMALL | settings)
    return Trainer(config, load_data(config), folder, device=CPU)


def steps_of(model, config, stage=1, processes=Processes()):  # noqa: B008  (immutable)
    counts = torch.arange(1, 11)
    return StageSteps(model, config, stage, class_counts=counts, processes=processes, totals=Totals(CPU))


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 4}, "--lora-rank: is a matter of --adapter lora; add that, or leave --lora-rank out"),
        ({"adapter": "lora", "adaptformer_width": 4}, "--adaptformer-width: is a matter of --adapter adaptformer"),
        ({"adapter": "lora", "freeze": "off"}, "--freeze: --adapter trains within a frozen trunk; use --freeze trunk"),
        ({"freeze": "all-but-classifiers", "trunk_lr": 0.1}, "--trunk-lr: .* of which --freeze .* trains nothing"),
        ({"lora_rank": 0}, "--lora-rank: must be at least 1, got 0"),
        ({"adapter": "lora", "lora_dropout": 1.0}, r"--lora-dropout: must be in \[0, 1\)"),
        ({"freeze": "head"}, "--freeze: must be one of off, trunk, all-but-classifiers, got 'head'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(settings)


def test_settings_that_go_together():
    assert resolve({"adapter": "adaptformer"}).freeze == "trunk"
    assert resolve({"adapter": "lora", "freeze": "all-but-classifiers", "trunk_lr": 0.1}).trunk_lr == 0.1
    assert resolve({"freeze": "trunk", "trunk_lr": 0.1}).freeze == "trunk"
    stored = dataclasses.asdict(resolve({"freeze": "trunk"}))
    with pytest.raises(CheckpointError, match="freeze is 'trunk', the command line says 'off'"):
        resume_config(stored, {"freeze": "off"}, "last.pt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora"}, "--adapter: the trunk has no linear layer for LoRA"),
        ({"adapter": "adaptformer"}, "--adapter: the trunk has no MLP of linear layers"),
        ({"freeze": "trunk", "expert_stages": "all", "fusion": False}, "--freeze: resnet8: the network has no trunk"),
        (
            {"method": "reslt", "stage2_epochs": 0, "init_classifier": "class-means"},
            "--init-classifier: class-means needs .* BranchClass",
        ),
    ],
)
def test_networks_that_do_not_fit(settings, message):
    config = resolve(SMALL | settings)
    with pytest.raises(ConfigError, match=message):
        build_model(config, load_data(config), pretrained=False)


def test_networks_of_another_class(monkeypatch):
    class Other(torch.nn.Module):
        min_image_size = 1
        features = classify = stage2_parameters = None
        checkpoint_activations = False

    monkeypatch.setattr(models, "create_model", lambda **options: Other())
    config = resolve(SMALL | {"freeze": "trunk"})
    with pytest.raises(ConfigError, match="--freeze: resnet8: only a MultiExpertNetwork says what is"):
        build_model(config, load_data(config), pretrained=False)


def test_a_stage_that_would_train_nothing(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @registry.register_method
    class Warming(Method):
        name = "warming"
        summary = "trains the trunk first"
        stages = (
            Stage("trunk", epochs=0.5, trains=lambda model: model.layer1.parameters()),
            Stage("all"),
        )

        def loss(self, logits, target, *, stage=None, epoch=0, **inputs):
            return logits.sum(), {}

    config = resolve(SMALL | {"method": "warming", "freeze": "trunk", "stage2_epochs": 0})
    with pytest.raises(ConfigError, match="--freeze: trunk leaves nothing to train to stage trunk of method 'warming'"):
        build_model(config, load_data(config), pretrained=False)


# ---- steps


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_frozen_has_no_gradient_and_no_momentum(stage):
    config = resolve(SMALL | {"freeze": "trunk", "checkpoint_activations": True})
    model = build_model(config, load_data(config), pretrained=False).train()
    steps = steps_of(model, config, stage)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for group in steps.optimizer.param_groups:
        group["lr"] = 0.1
    steps(torch.randn(8, 1, 8, 8), torch.arange(8))
    trained = {id(parameter) for parameter in steps.optimizer.state}
    names = {name.partition(".")[0] for name, parameter in model.named_parameters() if id(parameter) in trained}
    assert names == ({"classifiers", "experts", "fusions"} if stage == 1 else {"rt_classifiers"})
    state = model.state_dict()
    moved = {name.partition(".")[0] for name in state if not torch.equal(state[name], before[name])}
    assert moved == ({"classifiers", "experts", "fusions"} if stage == 1 else {"experts", "fusions", "rt_classifiers"})
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in model.frozen)


@pytest.mark.slow
def test_a_compiled_step_is_the_same():
    config = resolve(SMALL | {"freeze": "trunk"})
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(config, load_data(config), pretrained=False).train()
        steps = steps_of(model, config)
        if compiled:
            steps.network.compile(backend="aot_eager", dynamic=False)
        for group in steps.optimizer.param_groups:
            group["lr"] = 0.01
        for _ in range(2):
            steps(images, labels)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


def steps_here():
    """Weights and statistics after steps of each stage of two processes, with a frozen trunk."""
    processes = Processes(dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    config = resolve(SMALL | {"freeze": "trunk"})
    model = models.create_model("resnet8", num_classes=10, in_channels=1)
    models.freeze(model)
    for stage in (1, 2):
        steps = steps_of(model, config, stage, processes)
        for group in steps.optimizer.param_groups:
            group["lr"] = 0.01
        torch.manual_seed(1 + processes.rank)
        for _ in range(2):
            steps(torch.randn(4, 1, 8, 8), torch.randint(10, (4,)), 8)
    return dict(model.named_parameters())


@pytest.mark.slow
def test_two_processes_train_the_same_weights(two_processes):
    one, other = two_processes(steps_here)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- runs


def test_a_run_with_frozen_trunk_averaged_and_resumed(runs, tmp_path, monkeypatch, capsys):
    settings = ["--model", "small_transformer", *RUN, "--freeze", "trunk", "--ema", 0.9]
    assert runs.train(*settings, "--output-dir", tmp_path / "whole") == 0
    assert "--freeze trunk without --pretrained: what is frozen has random weights" in capsys.readouterr().out
    last = runs.checkpoint(tmp_path / "whole" / "last.pt")
    config = resolve({"model": "small_transformer", "seed": 0})
    torch.manual_seed(0)
    begun = build_model(config, load_data(config), pretrained=False).state_dict()
    for weights in (last["model"], last["average"]["model"]):
        moved = {name.partition(".")[0] for name in begun if not torch.equal(begun[name], weights[name])}
        assert moved == {"classifiers", "experts", "fusions", "rt_classifiers"}
    _stop_after(monkeypatch, 4)
    assert runs.train(*settings, "--output-dir", tmp_path / "run") == 143
    monkeypatch.undo()
    register_backbones(monkeypatch)
    capsys.readouterr()
    assert runs.train("--output-dir", tmp_path / "run", "--resume", "--checkpoint-activations") == 0
    assert "without --pretrained" not in capsys.readouterr().out
    runs.assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt")


def _stop_after(monkeypatch, count):
    """A signal comes with step ``count``."""
    steps = iter(range(1, 1000))
    plain = trainer.Trainer._step

    def step(self, images, labels):
        plain(self, images, labels)
        if next(steps) == count:
            signals.signal.raise_signal(signals.signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "_step", step)


@pytest.mark.parametrize("kind", ["lora", "adaptformer"])
def test_a_run_with_adapters(runs, tmp_path, monkeypatch, capsys, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    settings = ["--model", "small_transformer", *RUN, "--adapter", kind, "--freeze", "all-but-classifiers"]
    settings += ["--lora-rank", 2, "--lora-dropout", 0.1] if kind == "lora" else ["--adaptformer-width", 3]
    assert runs.train(*settings, "--output-dir", tmp_path / "whole") == 0
    _stop_after(monkeypatch, 4)
    assert runs.train(*settings, "--output-dir", tmp_path / "run") == 143
    monkeypatch.undo()
    register_backbones(monkeypatch)
    assert runs.train("--output-dir", tmp_path / "run", "--resume") == 0
    runs.assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "run" / "last.pt")
    last = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert last["model_description"]["adapter"]["branches"] is True
    added = {name for name in last["model"] if ".lora_" in name or ".adapter." in name}
    assert {name.partition(".")[0] for name in added} == {"blocks", "experts"}
    capsys.readouterr()
    assert evaluate(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    assert top1 == pytest.approx(runs.metrics(tmp_path / "run")[-1]["top1"])
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "images" / "digit.png")
    command = ["--checkpoint", tmp_path / "run" / "last.pt", "--images", tmp_path / "images"]
    assert predict([*map(str, command), "--output", str(tmp_path / "classes.csv")]) == 0
    assert "digit.png" in (tmp_path / "classes.csv").read_text()


def test_pretrained_weights_are_loaded_before_adapters_are_put_in(tmp_path):
    torch.manual_seed(3)
    plain = models.create_model("small_transformer", num_classes=10, num_experts=1, in_channels=1, fusion=False)
    weights = {
        name.replace("experts.0.", "expert."): value
        for name, value in plain.state_dict().items()
        if "class" not in name
    }
    torch.save(weights, tmp_path / "plain.pth")
    settings = {"model": "small_transformer", "adapter": "adaptformer", "pretrained": str(tmp_path / "plain.pth")}
    config = resolve(SMALL | settings)
    model = build_model(config, load_data(config), pretrained=True)
    assert torch.equal(model.blocks[0].mlp.base_layer.fc1.weight, plain.blocks[0].mlp.fc1.weight)
    assert "blocks.0.mlp.base_layer.fc1.weight" in model.frozen


# ---- class means


@pytest.mark.parametrize(("method", "second"), [("shike", True), ("crt", True), ("ce", False)])
def test_the_classifiers_of_a_run_begin_as_class_means(tmp_path, method, second):
    settings = {"method": method, "init_classifier": "class-means"}
    if method == "ce":
        settings["stage2_epochs"] = 0
    begun = trainer_of(tmp_path, **settings)
    model = begun.model
    again = trainer_of(tmp_path, **settings).model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    dataset = begun.dataset
    train = dataset.train.augmented_by("none")
    images, labels = train.batch(np.arange(len(train)), seed=0, epoch=0)
    with torch.no_grad():
        features = model.eval().features(images)
        means = torch.stack([features[:, labels == c].mean(1) for c in range(10)], dim=1)
        if method == "shike":
            features = torch.nn.functional.normalize(features, dim=2)
            means = torch.stack([features[:, labels == c].mean(1) for c in range(10)], dim=1)
            expected = (features @ torch.nn.functional.normalize(means, dim=2).transpose(1, 2)).argmax(2)
        else:
            expected = torch.cdist(features, means).argmin(2)
        agree = (model.classify(features).argmax(2) == expected).double().mean()
    assert agree > 0.99  # but for ties within rounding
    random = build_model(begun.config, dataset, pretrained=False)
    assert torch.equal(model.classifiers.weight, model.rt_classifiers.weight) is second
    assert model.rt_classifiers.weight.shape == random.rt_classifiers.weight.shape


def test_a_set_without_a_test_transform_is_taken_as_in_its_first_epoch(tmp_path):
    config = resolve(SMALL | {"init_classifier": "class-means"})
    dataset = load_data(config)

    class Plain:
        labels, seed, wants_workers = dataset.train.labels, 0, False

        def __len__(self):
            return len(self.labels)

        def batch(self, indices, *, seed, epoch, repeats=None):
            assert epoch == 0
            return dataset.test.batch(indices % 10, seed=seed, epoch=epoch)[0], torch.from_numpy(self.labels[indices])

    begun = Trainer(config, dataclasses.replace(dataset, train=Plain()), tmp_path, device=CPU)
    torch.testing.assert_close(begun.model.classifiers.weight.norm(dim=1), torch.ones(3, 10))


def test_a_resumed_run_does_not_repeat_it(tmp_path, monkeypatch):
    settings = ["--model", "resnet8", *RUN, "--init-classifier", "class-means", "--output-dir", tmp_path / "run"]
    assert train([str(one) for one in settings]) == 0
    monkeypatch.setattr(trainer, "init_from_class_means", None)
    assert train(["--output-dir", str(tmp_path / "run"), "--resume"]) == 0


def classifiers_here():
    processes = Processes(dist.get_rank(), dist.get_world_size())
    config = resolve(SMALL | {"init_classifier": "class-means"})
    return Trainer(config, load_data(config), None, device=CPU, processes=processes).model.state_dict()


@pytest.mark.slow
def test_two_processes_find_the_same_class_means(two_processes, tmp_path):
    one, other = two_processes(classifiers_here)
    alone = trainer_of(tmp_path, init_classifier="class-means").model.state_dict()
    for name, value in alone.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value)
