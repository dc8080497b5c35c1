"""What the settings mean on a machine: loaders, recorded steps, and one line for what cannot be done there."""

import dataclasses
import itertools
import json
import re
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from shike_fast import data
from shike_fast.data.loaders.loader import shard as share_of
from shike_fast.engine import steps as steps_module
from shike_fast.engine.config import CHANGEABLE, resolve
from shike_fast.engine.distributed import Processes
from shike_fast.engine.setup import _check_amp, _fewest_at_a_time, check_setting, make_loader, records
from shike_fast.engine.state import load_data
from shike_fast.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def digits():
    return load_data(resolve({}))


@pytest.fixture
def folder(tmp_path):
    """Files of four images in two classes: a data set that is not kept in memory."""
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (40, 40), (k, 0, 0)).save(tmp_path / "data" / part / label / f"{k}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, data.DeviceLoader),
        ({"loader": "device"}, data.DeviceLoader),
        ({"loader": "device", "workers": 3}, data.DeviceLoader),
        ({"loader": "cpu"}, data.Loader),
        ({"workers": 0}, data.Loader),
    ],
)
def test_images_in_memory_are_augmented_on_the_device_by_default(digits, given, kind):
    for train in (True, False):
        loader = make_loader(resolve(given), digits, CPU, train=train)
        assert type(loader) is kind
        assert loader.shuffle is train and loader.batch_size == (16 if train else 64)


def test_files_are_read_by_workers(folder, monkeypatch):
    config = resolve({"dataset": "imagefolder", "data_dir": str(folder), "batch_size": 2})
    dataset = load_data(config)
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(6)))
    assert make_loader(config, dataset, CPU, train=True).num_workers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert make_loader(config, dataset, CPU, train=True).num_workers == 3
    wanted = dataclasses.replace(config, loader="device")
    with pytest.raises(ConfigError, match="--loader: device holds images that fit in memory, imagefolder has files"):
        make_loader(wanted, dataset, CPU, train=True)


def test_processes_have_their_shards(digits):
    for loader_kind in ("cpu", "device"):
        config = resolve({"loader": loader_kind})
        loaders = [make_loader(config, digits, CPU, train=True, processes=Processes(rank, 2, rank)) for rank in (0, 1)]
        shares = [[len(labels) for _, labels in loader.epoch(0)] for loader in loaders]
        assert [sum(sizes) for sizes in zip(*shares, strict=True)] == [16] * 23 + [15]


def test_a_last_batch_too_small_for_the_processes_is_told(digits):
    with pytest.raises(
        ConfigError, match=r"--batch-size: .*the last batch of 383 samples in batches of 382 holds 1, too"
    ):
        make_loader(resolve({"batch_size": 382}), digits, CPU, train=True, processes=Processes(0, 2))


@pytest.mark.parametrize(
    ("given", "device", "side", "processes", "expected"),
    [
        ({}, CPU, 32, Processes(), False),
        ({}, GPU, 32, Processes(), True),
        ({}, GPU, 64, Processes(), True),
        ({}, GPU, 224, Processes(), False),
        ({}, GPU, 32, Processes(0, 2), False),
        ({"cuda_graph": True}, GPU, 224, Processes(0, 2), True),
        ({"cuda_graph": False}, GPU, 32, Processes(), False),
        ({"optimizer": "apex"}, GPU, 32, Processes(), False),
    ],
)
def test_steps_of_small_images_on_one_gpu_are_recorded(digits, given, device, side, processes, expected):
    dataset = dataclasses.replace(digits, image_size=side)
    assert records(resolve(given), dataset, device, processes) is expected


def test_a_graph_needs_a_gpu(runs, tmp_path, capsys):
    assert runs.train("--device", "cpu", "--cuda-graph", "--output-dir", tmp_path / "run") == 2
    expected = "error: --cuda-graph: needs a GPU, this run is on cpu; leave it out, or try --compile\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()


def test_apex_needs_a_gpu(runs, tmp_path, capsys):
    assert runs.train("--device", "cpu", "--optimizer", "apex", "--output-dir", tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: --optimizer: apex needs a GPU, this run is on cpu; use --optimizer sgd\n"
    assert not (tmp_path / "run").exists()


def test_a_dtype_that_the_device_cannot_convolve(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nand more")

    monkeypatch.setattr(torch, "conv2d", refuse)
    expected = r"--amp: cpu does not convolve in torch.float16 \(.* not implemented for 'Half'\); use --amp off"
    with pytest.raises(ConfigError, match=expected):
        _check_amp("fp16", CPU)
    _check_amp("off", CPU)


def test_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match="--amp: Tesla T4 does not compute in bfloat16; use --amp fp16 or off"):
        _check_amp("bf16", GPU)


def test_fewer_test_images_than_processes(digits):
    config = resolve({"batch_size": 3000})
    with pytest.raises(ConfigError, match="digits-lt has 600 test images for 601 processes"):
        check_setting(config, digits, CPU, Processes(0, 601))


@pytest.mark.parametrize("synced", [False, True])
def test_the_fewest_images_that_a_norm_sees(synced):
    """As the loaders share a batch, and the step cuts a share."""
    for images, world_size, accumulate in itertools.product(range(1, 20), (1, 2, 3), (1, 2, 5)):
        if images < world_size:
            continue
        parts = max(1, min(accumulate, images // world_size))
        shares = [share_of(np.arange(images), rank, world_size) for rank in range(world_size)]
        sizes = [[len(part) for part in torch.from_numpy(share).tensor_split(parts)] for share in shares]
        expected = min(map(sum, zip(*sizes, strict=True))) if synced else min(map(min, sizes))
        config = resolve({"batch_size": 64, "accumulate": accumulate, "sync_batch_norm": synced})
        assert _fewest_at_a_time(images, config, Processes(0, world_size)) == expected


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        (
            {"batch_size": 382},
            1,
            "of 383 images in batches of 382 the last .* holds 1, so .*; use --batch-size 381$",
        ),
        (
            {"batch_size": 2},
            1,
            "holds 1, so .* resnet8's last maps at 4x4 pixels .*; use --batch-size 3$",
        ),
        (
            {"batch_size": 127},
            2,
            "holds 2 for 2 processes, so .*; use --batch-size 126, or another number of p",
        ),
        ({"batch_size": 190, "accumulate": 2}, 1, "holds 3 with --accumulate 2, so .*; use --batch-size 189$"),
    ],
)
def test_a_last_batch_of_one_image(digits, given, processes, message):
    """The norms have nothing to do with a single value a channel: a map of 1x1 pixels of one image."""
    config = resolve({"model": "resnet8"} | given)
    check_setting(config, digits, CPU, Processes(0, processes))  # resnet8 keeps 2x2 of 8x8 pixels
    small = dataclasses.replace(digits, image_size=4)
    with pytest.raises(ConfigError, match=f"--batch-size: .*{message}"):
        check_setting(config, small, CPU, Processes(0, processes))
    if processes > 1:  # together they have more
        check_setting(dataclasses.replace(config, sync_batch_norm=True), small, CPU, Processes(0, processes))


def test_a_last_batch_of_one_image_is_found_before_the_run(runs, folder, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(folder / "train" / "a" / "more.png")
    arguments = ["--dataset", "imagefolder", "--data-dir", folder, "--model", "resnet8", "--workers", 0, "--epochs", 1]
    arguments += ["--batch-size", 4, "--method", "ce", "--output-dir"]
    assert runs.train(*arguments, tmp_path / "new", "--image-size", 4) == 2
    assert re.fullmatch("error: --batch-size: of 5 images .*; use --batch-size 3\n", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
    assert runs.train(*arguments, tmp_path / "fits", "--image-size", 4, "--batch-size", 3) == 0
    assert runs.train(*arguments, tmp_path / "larger maps", "--image-size", 16) == 0


@pytest.mark.parametrize("switches", [("--loader", "cpu"), ("--loader", "device", "--no-cuda-graph")])
def test_switches_that_promise_the_same_run(runs, tmp_path, finished, switches):
    assert runs.train(*runs.small, *switches, "--output-dir", tmp_path / "run") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")


def test_another_layout_trains_alike(runs, tmp_path):
    """It adds up in another order, which small steps do not magnify."""
    losses = []
    for switch in ("--channels-last", "--no-channels-last"):
        options = [*runs.small, "--epochs", 1, "--stage2-epochs", 0, "--lr", 0.001, switch]
        assert runs.train(*options, "--output-dir", tmp_path / switch) == 0
        losses.append(runs.metrics(tmp_path / switch)[0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("switch", [True, False])
def test_layout_of_weights_and_images(runs, tmp_path, monkeypatch, switch):
    seen = []
    step = steps_module.StageSteps._step

    def watch(self, images, *others):
        weight = self.network.model.layer2[0].conv2.weight
        seen.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in (images, weight)))
        step(self, images, *others)

    monkeypatch.setattr(steps_module.StageSteps, "_step", watch)
    # one channel is in either layout at once, hence images of three
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for k in range(4):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / label / f"{k}.png")
    layout = "--channels-last" if switch else "--no-channels-last"
    settings = ["--dataset", "imagefolder", "--data-dir", tmp_path / "data", "--model", "resnet8", "--batch-size", 4]
    settings += ["--epochs", 1, "--workers", 0, layout, "--output-dir", tmp_path / "run"]
    assert runs.train(*settings) == 0
    assert set(seen) == {(switch, switch)}


def test_compile_compiles_the_network_of_each_stage(runs, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        steps_module.StageNetwork, "compile", lambda self, **options: compiled.append((self.stage, options))
    )
    assert runs.train(*runs.small, "--compile", "--output-dir", tmp_path / "run") == 0
    assert compiled == [(1, {"dynamic": False}), (2, {"dynamic": False})]


def test_the_stage_before_is_freed_first(runs, tmp_path, monkeypatch):
    """Its recordings and its optimizer would stay in a GPU's memory beside those of the next one."""
    made, alive = [], []
    plain = steps_module.StageSteps.__init__

    def watch(self, *arguments, **options):
        alive.append([reference() is not None for reference in made])
        made.append(weakref.ref(self))
        plain(self, *arguments, **options)

    monkeypatch.setattr(steps_module.StageSteps, "__init__", watch)
    assert runs.train(*runs.small, "--output-dir", tmp_path / "run") == 0
    assert alive == [[], [False]]


def test_a_resumed_run_may_change_how_it_computes(runs, tmp_path):
    """Every switch for speed may change on resumption, and none that changes what is learned."""
    assert {"loader", "compile", "cuda_graph", "channels_last", "optimizer"} <= CHANGEABLE
    assert not {"accumulate", "sync_batch_norm", "amp", "batch_size", "lr"} & CHANGEABLE
    directory = tmp_path / "run"
    assert runs.train(*runs.small, "--output-dir", directory) == 0
    assert runs.train("--resume", "--output-dir", directory, "--loader", "cpu", "--no-cuda-graph") == 0
    assert json.loads((directory / "config.json").read_text())["loader"] == "cpu"


def test_accumulation_is_refused_on_resumption(runs, tmp_path, finished, capsys):
    assert runs.train("--resume", finished / "last.pt", "--accumulate", 2, "--output-dir", tmp_path / "run") == 2
    assert "accumulate is 1, the command line says 2" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("record", [False, True])
def test_a_step_allocates_nothing_after_warm_up(record):
    """No memory is asked of the driver any more; a recorded step takes none of PyTorch's allocator either."""
    from shike_fast import models
    from shike_fast.engine.totals import Totals

    config = resolve({"batch_size": 32, "amp": "bf16"})
    model = models.create_model("resnet8", num_classes=10).to("cuda", memory_format=torch.channels_last)
    steps = steps_module.StageSteps(
        model,
        config,
        1,
        class_counts=torch.ones(10, dtype=torch.int64, device="cuda"),
        processes=Processes(),
        totals=Totals(torch.device("cuda")),
        record=record,
    )
    images = torch.randn(32, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(10, (32,), device="cuda")
    for _ in range(10):
        steps(images, labels)
    torch.cuda.synchronize()
    counters = ["segment.all.allocated", "num_alloc_retries", "reserved_bytes.all.current"]
    counters += ["allocation.all.allocated"] if record else []
    before = torch.cuda.memory_stats()
    for _ in range(20):
        steps(images, labels)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert {name: after[name] for name in counters} == {name: before[name] for name in counters}


@pytest.mark.gpu
def test_a_recorded_run_learns_what_the_plain_one_does(runs, tmp_path, capsys):
    losses = []
    for number, switch in enumerate(("--cuda-graph", "--no-cuda-graph")):
        directory = tmp_path / str(number)
        assert runs.train(*runs.small, "--device", "cuda", switch, "--output-dir", directory) == 0
        losses.append([row["train_loss"] for row in runs.metrics(directory)])
        assert "device memory at its peak:" in capsys.readouterr().out
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
