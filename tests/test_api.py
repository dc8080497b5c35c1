"""``shike_fast.train`` and ``shike_fast.load``: the commands' work as Python functions."""

import copy
import json
import pickle
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from runs import Runs

import shike_fast
from shike_fast import api, data
from shike_fast.engine.signals import Interrupted
from shike_fast.errors import CheckpointError, ConfigError, DataError, RunError

SMALL = {"model": "resnet8", "batch_size": 64, "epochs": 3, "stage2_epochs": 1, "quiet": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return shike_fast.train("digits-lt", "shike", output_dir=tmp_path_factory.mktemp("api") / "run", **SMALL)


@pytest.fixture(scope="module")
def images(run):
    """The first test images, as the network takes them."""
    return torch.stack([run.dataset.test[i][0] for i in range(20)])


def test_a_run_holds_what_the_command_writes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        Runs(tmp_path, None).train(
            *("--model", "resnet8", "--batch-size", 64, "--epochs", 3, "--stage2-epochs", 1, "--output-dir", "command")
        )
        == 0
    )
    Runs.assert_same_weights(run.directory / "last.pt", tmp_path / "command" / "last.pt")
    assert run.history == Runs.metrics(run.directory) and run.metrics == run.history[-1]
    assert len(run.history) == 3 and run.best["top1"] == max(row["top1"] for row in run.history)
    assert json.loads((run.directory / "config.json").read_text()) == json.loads(json.dumps(run.config))
    assert (run.directory / "report.html").exists() and run.dataset.name == "digits-lt"


def test_the_process_is_as_before(tmp_path, capsys):
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    shike_fast.train(output_dir=tmp_path / "run", threads=2 if threads == 1 else 1, **SMALL)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), random)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capsys.readouterr().out == ""


def test_the_model_is_that_of_the_checkpoint(run, images):
    loaded = shike_fast.load(run.directory / "last.pt")
    assert loaded.class_names == run.model.class_names == tuple("0123456789")
    assert loaded.class_counts.tolist() == run.dataset.class_counts.tolist()
    assert torch.equal(loaded(images), run.model(images)) and run.model(images).shape == (3, 20, 10)
    second = run.model.network(images, stage=2)  # of the stage that was trained last
    assert torch.equal(loaded(images), second) and not torch.equal(loaded(images, stage=1), second)
    assert torch.equal(loaded(images, stage=1), run.model.network(images, stage=1))
    found = loaded.predict(images)
    assert torch.equal(found.probabilities, run.model(images).mean(0).softmax(1)) and len(found) == 20
    assert found.names == [str(label) for label in found.labels.tolist()]
    assert found.top(2)[3][0] == (found.names[3], found.probabilities[3].max().item())
    assert [len(top) for top in found.top(99)] == [10] * 20
    stage1 = shike_fast.load(run.directory / "last.pt", stage=1).predict(images)
    assert torch.equal(stage1.probabilities, run.model(images, stage=1).mean(0).softmax(1))


def test_images_of_every_kind_have_the_same_class(run, images, tmp_path):
    pixels = run.dataset.test.images[:20]  # uint8 [20, 1, 8, 8]
    model = run.model
    expected = model.predict(images).probabilities
    for i in range(3):
        Image.fromarray(pixels[i, 0]).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    kinds = {
        "array [B, 1, H, W]": pixels,
        "tensor [B, 1, H, W]": torch.from_numpy(pixels),
        "list of [H, W]": list(pixels[:, 0]),
        "generator of [H, W, 3]": (np.repeat(image.transpose(1, 2, 0), 3, 2) for image in pixels),
        "Pillow": [Image.fromarray(image[0]) for image in pixels],
        "paths": paths,
        "texts": [str(path) for path in paths],
    }
    for kind, given in kinds.items():
        found = model.predict(given, batch_size=7).probabilities
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-4, atol=1e-5, msg=kind)
        assert len(found) == (3 if kind in ("paths", "texts") else 20), kind
    for one in (pixels[0, 0], pixels[0], Image.fromarray(pixels[0, 0]), paths[0], images[0]):
        torch.testing.assert_close(model.predict(one).probabilities, expected[:1], rtol=1e-4, atol=1e-5)
    assert model.predict([]).probabilities.shape == (0, 10) and model.predict([]).names == []
    torch.testing.assert_close(model.transform(paths[1]), images[1])


@pytest.mark.parametrize(("channel", "weight"), [(0, 0.299), (1, 0.587), (2, 0.114)])
def test_a_network_of_grey_images_sees_the_luma(run, channel, weight):
    """ITU-R 601-2, as Pillow's conversion to grey."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., channel] = 255
    expected = (weight - run.dataset.mean[0]) / run.dataset.std[0]
    torch.testing.assert_close(run.model.transform(pixels), torch.full((1, 8, 8), expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.png", r"^nowhere.png: cannot be read \(No such file or directory\)"),
        ([np.zeros((4, 4))], r"^image 0: pixels must be uint8, got float64 \[4, 4\]; images that are normalised"),
        ([np.zeros((4, 4, 2), np.uint8)], r"^image 0: pixels must be \[H, W\], .* got \[4, 4, 2\]$"),
        ([np.zeros((0, 4), np.uint8)], r"^image 0: pixels must be .* got \[0, 4\]$"),
        (7, r"^images: must be one image or several, got int$"),
        (None, r"^images: must be one image or several, got NoneType$"),
        ([7], r"^image 0: must be a path, a Pillow image or uint8 pixels, got int$"),
    ],
)
def test_what_is_no_image_is_an_error(run, given, message):
    with pytest.raises(DataError, match=message):
        run.model.predict(given)


def test_a_network_of_another_dtype_predicts(run, images):
    model = copy.deepcopy(run.model).double()
    found = model.predict(images).probabilities
    torch.testing.assert_close(found.float(), run.model.predict(images).probabilities, rtol=1e-4, atol=1e-5)


def test_a_run_has_a_short_name(run):
    assert repr(run) == f"Run('{run.directory}', 'digits-lt', 'shike', top1={run.metrics['top1']:.2f})"


def test_a_broken_file_is_named(run, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"cut.jpg: "):
        run.model.predict(tmp_path / "cut.jpg")


def test_a_loaded_data_set_is_taken_as_it_is(tmp_path):
    small = data.load_dataset("digits-lt", imbalance_factor=10, augmentation="none")
    run = shike_fast.train(small, output_dir=tmp_path / "run", **SMALL)
    assert run.dataset is small and run.config["imbalance_factor"] == 10 and run.config["augmentation"] == "none"
    assert data.load_dataset("digits-lt").imbalance_factor == 20  # the name means what it meant before
    for name, value in (("data_dir", "x"), ("imbalance_factor", 5.0), ("augmentation", "shift")):
        with pytest.raises(ConfigError, match=f"^{name}: says how a data set is loaded, but digits-lt is passed"):
            shike_fast.train(small, **{name: value}, **SMALL)


def test_a_data_set_that_nobody_registered(tmp_path):
    digits = data.load_dataset("digits-lt")
    own = type(digits)(**{**vars(digits), "name": "own"})
    run = shike_fast.train(own, output_dir=tmp_path / "run", **SMALL | {"epochs": 2})
    assert "own" not in data.datasets()
    assert shike_fast.load(run.directory / "last.pt").predict(digits.test[0][0]).names
    with pytest.raises(ConfigError, match="unknown data set 'own'"):
        shike_fast.train("own", **SMALL)
    state = torch.load(run.directory / "last.pt", weights_only=True)
    assert state["epoch"] == 2 and state["data"]["name"] == "own"
    again = shike_fast.train(own, output_dir=run.directory, resume=True, quiet=True)  # has nothing left to do
    assert again.history == run.history


def test_in_a_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(shike_fast.train("digits-lt", "ce", output_dir=tmp_path / "run", **SMALL_CE))
    )
    thread.start()
    thread.join()
    assert results[0].metrics["epoch"] == 1


SMALL_CE = {"model": "resnet8", "epochs": 1, "quiet": True}


def test_one_run_at_a_time(monkeypatch, tmp_path):
    def during(given, processes, *, quiet):
        with pytest.raises(ConfigError, match=r"^train: another run is under way in this process"):
            shike_fast.train("digits-lt")
        raise RunError("seen")

    monkeypatch.setattr(api, "train_run", during)
    with pytest.raises(RunError, match="seen"):
        shike_fast.train("digits-lt")
    monkeypatch.undo()
    assert shike_fast.train("digits-lt", "ce", output_dir=tmp_path / "run", **SMALL_CE).metrics


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dataset": "nowhere"}, ConfigError, "unknown data set 'nowhere'"),
        ({"method": "magic"}, ConfigError, "--method: must be one of"),
        ({"dataset": 7}, ConfigError, r"^dataset: must be a name, .* got int; data.from_dataset takes"),
        ({"dataset": [(0, 0)]}, ConfigError, r"^dataset: must be a name, .* got list; data.from_dataset takes"),
        ({"epoch": 3}, ConfigError, r"^unknown setting 'epoch'; did you mean epochs\?$"),
        ({"lr": "fast"}, ConfigError, "--lr: must be a number, got 'fast'"),
        ({"seeds": 3}, ConfigError, "^seeds: belongs to the command"),
        ({"experts": 2, "num_experts": 3}, ConfigError, "names num_experts twice"),
        ({"resume": True}, ConfigError, "--resume: say which run"),
        ({"resume": "nowhere.pt"}, CheckpointError, "checkpoint nowhere.pt does not exist"),
        ({"config": "nowhere.toml"}, ConfigError, "--config: nowhere.toml cannot be read"),
        ({"plugins": ("no_such_module",)}, ConfigError, "there is no module 'no_such_module'"),
    ],
)
def test_bad_input_is_an_exception(given, error, message):
    with pytest.raises(error, match=message):
        shike_fast.train(**given)


def test_options_by_the_names_of_the_flags_and_a_file_of_settings(tmp_path):
    (tmp_path / "own.toml").write_text('model = "resnet8"\nepochs = 1\nexperts = 2\nseed = 4\n')
    run = shike_fast.train(
        "digits-lt", "ride", config=tmp_path / "own.toml", output_dir=tmp_path / "run", seed=np.int64(5), quiet=True
    )
    assert (run.config["num_experts"], run.config["seed"], run.config["method"]) == (2, 5, "ride")


def test_an_interrupted_run_is_a_keyboard_interrupt_and_resumes(monkeypatch, tmp_path):
    trainer = api.train_run

    def stopped(given, processes, *, quiet):
        trainer(given | {"epochs": 3}, processes, quiet=quiet)
        raise Interrupted(signal.SIGINT, tmp_path / "run" / "last.pt")

    monkeypatch.setattr(api, "train_run", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped by SIGINT; state saved in .*; go on with") as stop:
        shike_fast.train(output_dir=tmp_path / "run", **SMALL)
    assert isinstance(stop.value, api.RunInterrupted)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_resumes(programs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, shike_fast\n"
        "options = dict(model='resnet8', batch_size=64, epochs=40, output_dir='run')\n"
        "try:\n"
        "    run = shike_fast.train('digits-lt', resume='auto', **options)\n"
        "except KeyboardInterrupt as stop:\n"
        "    print('caught', stop)\n"
        "    sys.exit(7)\n"
        "print('top-1', run.metrics['top1'])\n"
    )
    process = programs.start([sys.executable, script], cwd=tmp_path)
    programs.wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGINT)
    done = programs.finish(process)
    assert done.returncode == 7 and "caught stopped by SIGINT; state saved in run/last.pt" in done.stdout
    done = programs.run([sys.executable, script], cwd=tmp_path)
    assert done.returncode == 0 and "top-1" in done.stdout, done.stderr
    assert len(Runs.metrics(tmp_path / "run")) == 40


def test_load_says_what_is_wrong(tmp_path, run):
    with pytest.raises(CheckpointError, match="does not exist"):
        shike_fast.load(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="which has no stage 3"):
        shike_fast.load(run.directory / "last.pt", stage=3)
    with pytest.raises(ConfigError, match="--device: 'gpu' is no device"):
        shike_fast.load(run.directory / "last.pt", device="gpu")


def test_loading_leaves_the_process_alone(run):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        shike_fast.load(run.directory / "last.pt")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_predictions_can_be_pickled(run, images):
    found = run.model.predict(images)
    assert torch.equal(pickle.loads(pickle.dumps(found)).probabilities, found.probabilities)


def test_a_data_set_of_pytorch(tmp_path):
    """The split that was made for it is in the settings, and the run resumes where it is passed again."""
    random = np.random.default_rng(0)
    labels = [0] * 12 + [1] * 8 + [2] * 4
    samples = [(Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)), label) for label in labels]
    own = data.from_dataset(samples, labels=labels, name="own", image_size=16, val_share=0.25)
    options = {"model": "resnet8", "epochs": 2, "batch_size": 6, "workers": 0, "quiet": True}
    run = shike_fast.train(own, "ce", output_dir=tmp_path / "run", **options)
    settings = {name: run.config[name] for name in ("dataset", "image_size", "val_share", "split_seed")}
    assert settings == {"dataset": "own", "image_size": 16, "val_share": 0.25, "split_seed": 0}
    assert len(run.model.predict([image for image, _ in samples])) == 24
    assert shike_fast.train(own, output_dir=run.directory, resume=True, quiet=True).history == run.history
    other = data.from_dataset(samples, labels=labels, name="own", image_size=16, val_share=0.5)
    with pytest.raises(CheckpointError, match=r"val_share is 0\.25"):
        shike_fast.train(other, output_dir=run.directory, resume=True, quiet=True)
