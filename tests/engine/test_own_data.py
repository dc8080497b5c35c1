"""Data sets with options of their own: how these reach a run, are kept by it, and come back from its checkpoint."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import torchvision_operators  # noqa: F401  (torchmetrics imports torchvision where it is installed)
from PIL import Image

from shike_fast import data
from shike_fast.data.__main__ import main as prepare
from shike_fast.data.longtail import PROFILES
from shike_fast.engine.config import options_for, resolve, resume_config, stored_config
from shike_fast.engine.options import own_options
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.evaluate import main as evaluate

COUNTS = (12, 8, 5)
SMALL = ["--model", "resnet8", "--image-size", 32, "--batch-size", 8, "--workers", 0, "--device", "cpu"]


def images():
    """Name, label and encoded content of 25 images of three classes."""
    random = np.random.default_rng(0)
    for label, count in enumerate(COUNTS):
        for number in range(count):
            pixels = random.integers(0, 60, (36, 44, 3), dtype=np.uint8)
            pixels[..., label] += 150
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield f"{label}_{number:02d}", label, buffer.getvalue()


def make_folder(root):
    for name, label, content in images():
        path = root / f"kind {label}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return []


def make_table(root):
    root.mkdir()
    lines = ["where;kind"]
    for name, label, content in images():
        (root / f"{name}.png").write_bytes(content)
        lines.append(f"{name}.png;kind {label}")
    (root / "own.csv").write_text("\n".join(lines))
    (root / "other.csv").write_text("x")
    return ["--files", "own.csv", "--image-column", "where", "--label-column", "kind"]


def make_archives(root):
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as archive:
        for name, label, content in images():
            for extension, data_of in (("png", content), ("json", json.dumps({"kind": f"kind {label}"}).encode())):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(data_of)
                archive.addfile(member, io.BytesIO(data_of))
    return ["--label-column", "kind"]


def make_hugging_face(root):
    hf = pytest.importorskip("datasets")
    hf.disable_progress_bars()
    found = list(images())
    table = {
        "image": [{"bytes": content, "path": f"{name}.png"} for name, _, content in found],
        "kind": [label for _, label, _ in found],
    }
    classes = hf.ClassLabel(names=[f"kind {label}" for label in range(3)])
    hf.Dataset.from_dict(table, features=hf.Features({"image": hf.Image(), "kind": classes})).save_to_disk(root)
    return []


MAKERS = {
    "imagefolder": make_folder,
    "table": make_table,
    "webdataset": make_archives,
    "huggingface": make_hugging_face,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_the_whole_path(name, runs, tmp_path, capsys, failed):
    """Trained on files, resumed, tested from the checkpoint, checked, packed, and trained on the pack."""
    root, run = tmp_path / "own", tmp_path / "run"
    own = [*MAKERS[name](root), "--val-share", 0.2]
    source = ["--dataset", name, "--data-dir", root]
    assert runs.train(*source, *own, *SMALL, "--epochs", 2, "--stage2-epochs", 1, "--output-dir", run) == 0
    printed = capsys.readouterr().out
    assert (
        "5 of 25 images set aside (--val-share 0.2 of each class, --split-seed 0), named in validation.txt" in printed
    )
    named = (run / "validation.txt").read_text().splitlines()
    assert len(named) == 5 and all(label in "".join(named) for label in ("0_", "1_", "2_"))
    config = json.loads((run / "config.json").read_text())
    assert (config["val_share"], config["split_seed"]) == (0.2, 0)
    state = runs.checkpoint(run / "last.pt")
    assert state["data"]["class_names"] == ["kind 0", "kind 1", "kind 2"]
    assert state["data"]["class_counts"].tolist() == [10, 6, 4]

    assert evaluate(["--checkpoint", str(run / "last.pt"), "--json", "--workers", "0", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["test_images"], result["top1"]) == (5, runs.metrics(run)[-1]["top1"])
    assert runs.train("--resume", "--output-dir", run) == 0
    assert runs.train("--resume", "--output-dir", run, "--val-share", 0.3) == 2
    assert "val_share is 0.2, the command line says 0.3" in capsys.readouterr().err

    arguments = [*map(str, (*source, *own))]
    assert prepare(["check", *arguments, "--decode", "--workers", "1"]) == 0
    assert "5 of 25 images set aside" in capsys.readouterr().out
    pack = tmp_path / "pack"
    assert prepare(["pack", *arguments, "--short-side", "36", "--workers", "1", str(pack)]) == 0
    packed = data.load_dataset(name, data_dir=pack, image_size=32)
    assert packed.class_counts.tolist() == [10, 6, 4]
    assert (packed.validation.share, packed.validation.whole) == (0.2, 25)
    assert sorted(packed.validation.names) == sorted(line.encode() for line in named)
    source[-1] = pack
    assert runs.train(*source, *SMALL, "--epochs", 1, "--stage2-epochs", 0, "--output-dir", tmp_path / "packed") == 0
    assert sorted((tmp_path / "packed" / "validation.txt").read_text().splitlines()) == sorted(named)
    capsys.readouterr()
    status = runs.train(*source, "--val-share", 0.3, *SMALL, "--output-dir", tmp_path / "other")
    failed(status, f"--val-share: {pack} was packed with 0.2, not with 0.3; leave it out, or pack anew")
    assert evaluate(["--checkpoint", str(run / "last.pt"), "--data-dir", str(pack), "--workers", "0"]) == 0


def test_a_raw_pack_has_the_very_test_images(tmp_path, capsys):
    make_table(tmp_path / "own")
    named = {"files": "own.csv", "image_column": "where", "label_column": "kind"}
    arguments = [text for name, value in named.items() for text in (f"--{name.replace('_', '-')}", value)]
    source = ["--dataset", "table", "--data-dir", str(tmp_path / "own"), *arguments]
    raw = ["--format", "raw", "--short-side", "36", "--workers", "1", str(tmp_path / "pack")]
    assert prepare(["pack", *source, *raw]) == 0
    files = data.load_dataset("table", data_dir=tmp_path / "own", image_size=32, **named)
    pack = data.load_dataset("table", data_dir=tmp_path / "pack", image_size=32)
    for part in ("train", "test"):
        one, other = (getattr(of, part).batch(np.arange(2), seed=0, epoch=0) for of in (files, pack))
        assert (one[0] == other[0]).all() and (one[1] == other[1]).all()


def test_an_option_of_another_data_set_is_refused(runs, tmp_path, capsys, failed):
    failed(
        runs.train("--image-column", "x", "--output-dir", tmp_path / "run"),
        "--image-column: data set 'digits-lt' has no such setting, it belongs to 'table', 'huggingface', 'webdataset'",
    )
    failed(
        runs.train("--dataset", "table", "--val-share", 1.5), "--val-share: must be a number between 0 and 1, got 1.5"
    )
    failed(prepare(["check", "--dataset", "digits-lt", "--val-share", "0.5"]), "digits-lt: has no option val_share")
    with pytest.raises(data.table.DataError, match="table: --val-share: must be a number between 0 and 1"):
        data.load_dataset("table", data_dir=tmp_path, val_share=0)


def test_settings_of_a_data_set_are_those_of_its_run(tmp_path):
    given = {"dataset": "table", "files": "own.csv", "val_share": 0.25}
    config = resolve(given)
    assert (config.files, config.val_share, config.split_seed, config.image_folder) == ("own.csv", 0.25, 0, None)
    assert not hasattr(resolve({}), "files")
    stored = vars(config)
    assert stored_config(stored, "last.pt") == config
    assert resume_config(stored, given, "last.pt") == config
    with pytest.raises(CheckpointError, match=r"files is 'own\.csv', the command line says 'x\.csv'"):
        resume_config(stored, {"files": "x.csv"}, "last.pt")
    with pytest.raises(ConfigError, match="--files: data set 'digits-lt' has no such setting"):
        resolve({"dataset": "digits-lt", "files": "x"})
    assert {"files", "val_share"} <= options_for("ce", "table").keys() - options_for("ce").keys()
    assert [name for name, _ in own_options()["split_seed"]] == ["imagefolder", "table", "huggingface", "webdataset"]


def test_options_of_a_data_set_of_ones_own(monkeypatch, runs, tmp_path, failed):
    monkeypatch.setattr(data.registry, "_REGISTRY", dict(data.registry._REGISTRY))
    digits, load_digits = data.registry._REGISTRY["digits-lt"]
    seen = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        region: str | None = data.option(None, "only digits of this region", metavar="NAME")
        inverted: bool = data.option(False, "black on white")

    @data.register_dataset(dataclasses.replace(digits, name="mine", options=Options))
    def load(info, options):
        seen.append(options.own)
        return load_digits(info, options)

    small = [*runs.small, "--epochs", 1, "--stage2-epochs", 0, "--output-dir", tmp_path / "run"]
    assert runs.train("--dataset", "mine", "--region", "north", "--inverted", *small) == 0
    assert evaluate(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--workers", "0"]) == 0
    assert prepare(["check", "--dataset", "mine"]) == 0
    assert seen == [Options(region="north", inverted=True)] * 2 + [Options()]
    failed(runs.train("--inverted"), "--inverted: data set 'digits-lt' has no such setting, it belongs to 'mine'")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Taken:
        epochs: int = data.option(1, "of rock")

    data.register_dataset(dataclasses.replace(digits, name="other", options=Taken))(load)
    with pytest.raises(ConfigError, match="data set 'other': another option is called epochs or --epochs; rename"):
        own_options()


def test_a_checkpoint_of_a_data_set_that_is_not_registered(monkeypatch):
    """Its own settings are left out: ``predict`` needs none of them."""
    stored = vars(resolve({"dataset": "table", "files": "own.csv"}))
    without = {name: entry for name, entry in data.registry._REGISTRY.items() if name != "table"}
    monkeypatch.setattr(data.registry, "_REGISTRY", without)
    assert stored_config(stored, "last.pt").dataset == "table"


def test_a_file_of_settings_serves_several_data_sets(runs, tmp_path, capsys, failed):
    (tmp_path / "own.toml").write_text(
        'files = "x.csv"\nval-share = 0.5\nepochs = 1\nbatch_size = 64\nmodel = "resnet8"\n'
    )
    settings = ["--config", tmp_path / "own.toml", "--output-dir", tmp_path / "run"]
    (tmp_path / "own").mkdir()
    failed(runs.train("--dataset", "table", "--data-dir", tmp_path / "own", *settings), "--files: no file in")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_run_with_either_tail(profile, runs, tmp_path):
    arguments = [*runs.small, "--epochs", 1, "--stage2-epochs", 0, "--imbalance-factor", 57, "--long-tail", profile]
    assert runs.train(*arguments, "--output-dir", tmp_path / "run") == 0
    counts = runs.checkpoint(tmp_path / "run" / "last.pt")["data"]["class_counts"].tolist()
    assert (counts[:5] == [114] * 5, counts[-1]) == (profile == "step", 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["long_tail"] == profile
