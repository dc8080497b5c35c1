"""Runs on image files: broken ones, the loaders' speed, and the options that only such data sets have."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from shike_fast import data, evaluate
from shike_fast._util.cli import most_workers
from shike_fast.data.images.gpu_decode import NoHardwareDecoderError
from shike_fast.data.loaders import gpu as gpu_loader
from shike_fast.data.loaders import photo
from shike_fast.data.loaders import workers as _workers
from shike_fast.data.loaders.photo import PhotoLoader
from shike_fast.engine.config import resolve
from shike_fast.engine.loading import loader_metrics, speed_note
from shike_fast.engine.setup import make_loader
from shike_fast.errors import ConfigError

ARGUMENTS = ["--dataset", "imagefolder", "--model", "resnet8", "--image-size", 32, "--epochs", 2, "--batch-size", 4]


@pytest.fixture
def train(image_dir, runs, tmp_path):
    """Train on the image folder, with further options; returns the exit status."""

    def run(*options, workers=0):
        settings = ["--data-dir", image_dir, "--output-dir", tmp_path / "run", "--workers", workers]
        return runs.train(*ARGUMENTS, *settings, *options)

    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_without_a_broken_image_and_says_so(image_dir, train, runs, tmp_path, capsys, workers):
    damaged = [image_dir / "train" / "cat" / "0.jpg", image_dir / "val" / "eel" / "0.jpg"]
    damaged[0].write_bytes(b"")
    damaged[1].write_bytes(damaged[1].read_bytes()[:-300])
    assert train(workers=workers) == 0
    captured = capsys.readouterr()
    assert captured.err.count(f"warning: {damaged[0]}: is empty; another image stands in for it\n") == 1
    assert captured.err.count(f"warning: {damaged[1]}: ") == captured.err.count("it is tested as plain grey\n") == 1
    assert captured.err.count("warning") == 2
    assert captured.out.count("loader: ") == 1 and "images/s; training took" in captured.out
    rows = runs.metrics(tmp_path / "run")
    assert [row["unreadable_images"] for row in rows] == [2, 2]
    assert all(row["loader_images_per_second"] > 0 for row in rows)

    assert evaluate.main(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--json", "--workers", "0"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["unreadable_images"], result["top1"]) == (1, rows[-1]["top1"])
    assert evaluate.main(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--workers", "0"]) == 0
    assert "tested as plain grey: 1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_signal_ends_a_run_that_waits_for_a_batch(train, runs, tmp_path, monkeypatch, capsys, part):
    """A file system that does not answer, for example."""
    main, pixels = os.getpid(), photo.pixels_of_views

    def hang(views, indices, draws):
        if os.getpid() != main and views[0].training == (part == "train") and len(views[0]) - 1 in indices:
            os.kill(main, signal.SIGTERM)
            time.sleep(3600)
        return pixels(views, indices, draws)

    monkeypatch.setattr(photo, "pixels_of_views", hang)
    monkeypatch.setattr(_workers, "_PATIENCE", 0.1)
    assert train(workers=2) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("stopped by SIGTERM; state saved in ")
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert (state["epoch"], state["batch"] == 3) == (0, part == "val")
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert train("--resume", workers=2) == 0


@pytest.mark.parametrize("part", ["train", "val"])
def test_strict_ends_the_run_at_a_broken_image(image_dir, train, capsys, part):
    path = image_dir / part / "cat" / "0.jpg"
    path.write_bytes(b"")
    assert train("--strict") == 1
    assert capsys.readouterr().err == f"error: {path}: is empty; replace or remove it\n"


def test_strict_may_be_given_to_a_resumed_run(train, runs, tmp_path, capsys):
    assert train() == 0
    assert runs.train("--output-dir", tmp_path / "run", "--resume", "--strict") == 0  # nothing was left to do
    assert train("--resume", "--image-size", 48) == 2
    assert "image_size is 32, the command line says 48" in capsys.readouterr().err


def test_the_image_size_is_the_runs_own(train, runs, tmp_path):
    assert train() == 0
    state = runs.checkpoint(tmp_path / "run" / "last.pt")
    assert state["config"]["image_size"] == state["data"]["image_size"] == 32
    assert state["data"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert state["data"]["margin"] == pytest.approx(256 / 224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loader", "gpu"), "--loader: gpu needs a GPU, this run is on cpu; use cpu or auto"),
        (("--loader", "device"), "--loader: device holds images that fit in memory, imagefolder has files"),
        (("--loader", "disk"), "--loader: must be one of auto, cpu, gpu, device, got 'disk'"),
        (("--workers", "5000"), "--workers: must be at least 0 and here at most "),
        (("--image-size", "0"), "--image-size: must be from 1 to 4096, got 0"),
        (("--augmentation", "cifar"), "unknown augmentation 'cifar'; choose one of rrc"),
    ],
)
def test_unusable_options(train, capsys, tmp_path, options, message):
    assert train("--device", "cpu", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_data_set_of_one_size_takes_no_other(runs, tmp_path, capsys):
    assert runs.train("--dataset", "fashion-mnist-lt", "--image-size", 32, "--output-dir", tmp_path / "run") == 2
    assert "fashion-mnist-lt: image_size cannot be chosen" in capsys.readouterr().err


def test_the_recipe_of_places_begins_with_weights(runs, image_dir, tmp_path, capsys):
    arguments = ["--dataset", "places-lt", "--data-dir", image_dir, "--output-dir", tmp_path / "run"]
    assert runs.train(*arguments) == 2
    error = capsys.readouterr().err
    assert "--pretrained: the recipe of places-lt begins with ImageNet weights of resnet152" in error
    assert "say 'none'" in error
    assert runs.train(*arguments, "--pretrained", "none") == 2
    assert "Places_LT_train.txt" in capsys.readouterr().err  # so far it comes now


def test_where_nothing_decodes_on_the_gpu(image_dir, monkeypatch):
    """On a machine with a GPU but without torchvision; and with both, the loader that decodes there."""

    def refuse(device):
        raise NoHardwareDecoderError("torchvision cannot be imported (no module)")

    dataset = data.load_dataset("imagefolder", data_dir=image_dir, image_size=32)
    config = resolve({"dataset": "imagefolder", "loader": "gpu", "batch_size": 4})
    monkeypatch.setattr(gpu_loader, "hardware_decoder", refuse)
    with pytest.raises(ConfigError, match=r"--loader: gpu cannot be used: torchvision cannot be imported .* use cpu"):
        make_loader(config, dataset, torch.device("cuda"), train=True)
    monkeypatch.setattr(gpu_loader, "hardware_decoder", lambda device: lambda encoded: [])
    loader = make_loader(config, dataset, torch.device("cuda"), train=False)
    assert isinstance(loader, gpu_loader.GpuPhotoLoader) and loader.batch_size == 4


def test_a_file_that_several_processes_cannot_read_is_counted_once(image_dir):
    """Shuffled, in time every process meets the same files."""

    class Two:
        def gather(self, value):
            return [value, [*value, 3]]

        def total(self, value):
            return 2 * value

    dataset = data.load_dataset("imagefolder", data_dir=image_dir, image_size=32)
    loaders = [PhotoLoader(part, batch_size=4, shuffle=False, device="cpu") for part in (dataset.train, dataset.test)]
    loaders[0].broken.messages.update({3: "x.jpg: is empty", 5: "y.jpg: is empty"})
    list(loaders[0].epoch(0))
    found = loader_metrics(*loaders, Two(), torch.device("cpu"))
    assert found["unreadable_images"] == 2 + 1
    assert found["loader_images_per_second"] == pytest.approx(2 * loaders[0].images_per_second)


@pytest.mark.parametrize(("loading", "advice"), [(100.0, True), (120.0, False)])
def test_a_loader_that_training_waits_for_is_told(loading, advice):
    note = speed_note({"loader_images_per_second": loading, "images_per_second": 100.0})
    assert note.startswith(f"loader: {loading:.0f} images/s; training took 100")
    assert ("pack the data set" in note) == advice
    assert speed_note({"images_per_second": 100.0}) is None


def test_a_checkpoint_of_a_larger_machine_says_more_workers_than_there_may_be(image_dir):
    dataset = data.load_dataset("imagefolder", data_dir=image_dir, image_size=32)
    config = resolve({"dataset": "imagefolder", "batch_size": 4, "workers": 1000})
    assert make_loader(config, dataset, torch.device("cpu"), train=True).num_workers == most_workers()


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["cpu", "gpu"])
def test_a_run_on_a_gpu(train, runs, tmp_path, loader):
    if loader == "gpu":
        pytest.importorskip("torchvision")
    assert train("--device", "cuda", "--loader", loader, "--amp", "bf16", workers=2) == 0
    assert runs.metrics(tmp_path / "run")[-1]["unreadable_images"] == 0
