"""``python -m shike_fast.export``: what is in the files, and that they say what the network says."""

import csv
import json
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import shike_fast
from shike_fast import data
from shike_fast.engine import programs as making
from shike_fast.errors import CheckpointError, ConfigError
from shike_fast.evaluate import main as evaluate
from shike_fast.export import main as export
from shike_fast.predict import main as predict
from shike_fast.train import main as train

BATCHES = (1, 2, 7)


def write(checkpoint, kind, output, *options):
    return export([str(argument) for argument in ("--checkpoint", checkpoint, "--format", kind, output, *options)])


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The finished run as a program of PyTorch and as a folder of weights."""
    folder = tmp_path_factory.mktemp("exported")
    assert write(finished / "last.pt", "torch", folder / "model.pt2") == 0
    assert write(finished / "last.pt", "safetensors", folder / "hub") == 0
    return folder


@pytest.fixture(scope="module")
def model(finished):
    return shike_fast.load(finished / "last.pt")


def pixels(batch, size=8):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def expected(model, images):
    return model.predict(list(images)).probabilities


@pytest.mark.parametrize("batch", BATCHES)
def test_a_program_says_what_the_network_says(exported, model, batch):
    images = pixels(batch)
    program = torch.export.load(exported / "model.pt2").module()
    torch.testing.assert_close(program(images), expected(model, images), rtol=1e-5, atol=1e-6)


def test_a_program_needs_nothing_of_this_package(exported, model, programs):
    images = pixels(7)
    torch.save({"images": images, "expected": expected(model, images)}, exported / "case.pt")
    code = (
        "import sys, json, torch\n"
        "files = {'shike_fast.json': ''}\n"
        "program = torch.export.load('model.pt2', extra_files=files).module()\n"
        "case = torch.load('case.pt')\n"
        "torch.testing.assert_close(program(case['images']), case['expected'], rtol=1e-5, atol=1e-6)\n"
        "assert not [name for name in sys.modules if name.startswith('shike_fast')]\n"
        "described = json.loads(files['shike_fast.json'])\n"
        "print(*described['class_names'], described['transform']['resized'], described['input']['shape'])\n"
    )
    done = programs.run([sys.executable, "-c", code], cwd=exported)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "0 1 2 3 4 5 6 7 8 9 8 ['batch', 3, 8, 8]"


def test_no_operator_of_this_package_is_inside(exported):
    graph = torch.export.load(exported / "model.pt2").graph
    assert not [node for node in graph.nodes if "shike_fast" in str(node.target)]


def test_the_folder_is_for_the_hub(exported, finished, model):
    folder = exported / "hub"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    state = model.network.state_dict()
    assert weights.keys() == state.keys() and all(torch.equal(weights[name], state[name]) for name in state)
    described = json.loads((folder / "config.json").read_text())
    assert described["class_names"] == list(model.class_names) and described["stage"] == 2
    assert not {"data_dir", "device", "pretrained"} & described["config"].keys()  # nothing of the machine
    card = (folder / "README.md").read_text()
    front = card.split("---")[1]
    yaml = pytest.importorskip("yaml").safe_load(front)
    assert yaml["pipeline_tag"] == "image-classification" and "shike" in yaml["tags"]
    best = max(json.loads(line)["top1"] for line in (finished / "metrics.jsonl").read_text().splitlines())
    value = yaml["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == pytest.approx(best / 100, abs=1e-4) and f"{best:.2f}" in card


def test_weights_are_read_again(exported, model, finished, capsys):
    images = torch.stack([data.load_dataset("digits-lt").test[i][0] for i in range(9)])
    for source in (exported / "hub", exported / "hub" / "model.safetensors"):
        again = shike_fast.load(source)
        assert torch.equal(again(images), model(images)) and again.class_names == model.class_names
        assert torch.equal(again(images, stage=1), model(images, stage=1))
    assert evaluate(["--checkpoint", str(exported / "hub"), "--csv", str(exported / "a.csv"), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert evaluate(["--checkpoint", str(finished / "last.pt"), "--csv", str(exported / "b.csv"), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert {key for key in first if first[key] != second[key]} == {"checkpoint", "csv"}


def test_predict_runs_from_every_file(exported, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(5):
        size = (40 + i, 60) if i % 2 else (8, 8)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"images/{i}.png")
    (tmp_path / "images" / "9.png").write_bytes(b"")
    tables = []
    for source in (finished / "last.pt", exported / "model.pt2", exported / "hub"):
        assert predict(["--checkpoint", str(source), "--images", "images", "--workers", "0"]) == 1  # one is broken
        with open("predictions.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    for row, *others in zip(*tables, strict=True):
        for other in others:
            assert [row[f"class_{k}"] for k in range(1, 6)] == [other[f"class_{k}"] for k in range(1, 6)]
            assert row["error"] == other["error"]
            if not row["error"]:
                assert float(row["probability_1"]) == pytest.approx(float(other["probability_1"]), abs=2e-6)


def test_a_program_classifies_from_python(exported, model):
    program = shike_fast.load(exported / "model.pt2")
    images = [np.random.default_rng(i).integers(0, 256, (20 + i, 33, 3), dtype=np.uint8) for i in range(4)]
    found = program.predict(images)
    assert found.names == model.predict(images).names and program.class_names == model.class_names
    torch.testing.assert_close(found.probabilities, expected(model, images), rtol=1e-5, atol=1e-6)
    assert program.metadata["epoch"] == 3 and program.transform(images[0]).dtype == torch.uint8
    for name, value in (("stage", 1), ("amp", "off")):
        with pytest.raises(ConfigError, match=f"^{name}: settled in an exported program"):
            shike_fast.load(exported / "model.pt2", **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ce", "ride", "tcl", "tau-norm", "ncm", "lws"])
def test_other_methods(method, tmp_path):
    """Other ways to vote, other classifiers, and methods that keep a state."""
    run = ["--model", "resnet8", "--epochs", 2, "--method", method, "--output-dir", tmp_path / "run"]
    assert train([str(argument) for argument in run]) == 0
    for kind, name in (("torch", "model.pt2"), ("safetensors", "hub")):
        assert write(tmp_path / "run" / "best.pt", kind, tmp_path / name) == 0
    model = shike_fast.load(tmp_path / "run" / "best.pt")
    images = [np.random.default_rng(i).integers(0, 256, (20 + i, 33), dtype=np.uint8) for i in range(4)]
    for name in ("model.pt2", "hub"):
        found = shike_fast.load(tmp_path / name).predict(images).probabilities
        torch.testing.assert_close(found, expected(model, images), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_averaged_weights_are_what_is_exported(tmp_path):
    run = ["--model", "resnet8", "--epochs", "2", "--ema", "0.9", "--output-dir", str(tmp_path / "run")]
    assert train(run) == 0
    assert write(tmp_path / "run" / "last.pt", "safetensors", tmp_path / "hub") == 0
    assert write(tmp_path / "run" / "last.pt", "torch", tmp_path / "model.pt2") == 0
    model, images = shike_fast.load(tmp_path / "run" / "last.pt"), pixels(3)
    for name in ("hub", "model.pt2"):
        found = shike_fast.load(tmp_path / name).predict(list(images)).probabilities
        torch.testing.assert_close(found, expected(model, images), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_stage_that_is_named(finished, tmp_path):
    assert write(finished / "last.pt", "torch", tmp_path / "one.pt2", "--stage", 1) == 0
    assert write(finished / "last.pt", "safetensors", tmp_path / "one", "--stage", 1) == 0
    images = pixels(4)
    wanted = expected(shike_fast.load(finished / "last.pt", stage=1), images)
    for name in ("one.pt2", "one"):
        found = shike_fast.load(tmp_path / name).predict(list(images)).probabilities
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_colour_photographs(image_dir, tmp_path):
    run = ["--dataset", "imagefolder", "--data-dir", image_dir, "--model", "resnet8", "--image-size", 16]
    run += ["--epochs", 2, "--batch-size", 6, "--workers", 0, "--output-dir", tmp_path / "run"]
    assert train([str(argument) for argument in run]) == 0
    assert write(tmp_path / "run" / "last.pt", "torch", tmp_path / "model.pt2") == 0
    program, model = shike_fast.load(tmp_path / "model.pt2"), shike_fast.load(tmp_path / "run" / "last.pt")
    files = sorted((image_dir / "val").rglob("*.*"))
    torch.testing.assert_close(
        program.predict(files).probabilities, model.predict(files).probabilities, rtol=1e-5, atol=1e-6
    )
    assert str(image_dir) not in json.dumps(program.metadata)


def test_a_program_that_differs_is_not_kept(finished, tmp_path, monkeypatch, capsys):
    make = making.make_program

    def broken(deployed, size):
        scale, deployed.scale = deployed.scale, 1.5 * deployed.scale
        program = make(deployed, size)
        deployed.scale = scale
        return program

    monkeypatch.setattr("shike_fast.export.make_program", broken)
    assert write(finished / "last.pt", "torch", tmp_path / "model.pt2") == 1
    assert "differ from the network's by" in capsys.readouterr().err and not (tmp_path / "model.pt2").exists()


def test_an_older_export_is_replaced(finished, tmp_path):
    for _ in range(2):
        assert write(finished / "last.pt", "safetensors", tmp_path / "hub") == 0
        assert write(finished / "last.pt", "safetensors", tmp_path / "m.safetensors") == 0


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        ("torch", "model.onnx", "OUT: a file of --format torch must end with .pt2, got"),
        ("onnx", "model.pt2", "OUT: a file of --format onnx must end with .onnx, got"),
        ("torch", "other.pt2", "other.pt2 exists and is no export; name another file"),
        ("safetensors", "other.pt2", "other.pt2 is a file; name a folder"),
        ("safetensors", "occupied", "README.md exists and was not written by this command"),
        ("safetensors", "a_run", "a_run holds other files than an export, such as config.json; name a new folder"),
        ("torch", "nowhere/model.pt2", "nowhere is not a folder; create it"),
        ("safetensors", "nowhere/hub", "nowhere is not a folder; create it"),
    ],
)
def test_where_it_cannot_be_written(finished, tmp_path, capsys, monkeypatch, kind, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.pt2").write_bytes(b"another")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "README.md").write_text("mine")
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert write(finished / "last.pt", kind, output) == 2
    assert message in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_without_the_libraries_of_onnx(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert write(finished / "last.pt", "onnx", tmp_path / "model.onnx") == 2
    assert "error: --format onnx needs onnx: pip install onnx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    assert predict(["--checkpoint", str(tmp_path / "model.onnx"), "--images", str(tmp_path)]) == 2
    assert "running it needs onnxruntime: pip install onnxruntime" in capsys.readouterr().err


def test_a_network_too_large_for_a_file(finished, tmp_path, capsys, monkeypatch):
    for module in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, sys)
    monkeypatch.setattr("shike_fast.export._MOST_ONNX", 1000)
    assert write(finished / "last.pt", "onnx", tmp_path / "model.onnx") == 2
    assert "more than the 2 that one such file holds; use --format torch" in capsys.readouterr().err


def test_files_that_are_no_exports(exported, tmp_path, capsys):
    (tmp_path / "damaged.pt2").write_bytes((exported / "model.pt2").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"damaged.pt2: cannot be read as a program"):
        shike_fast.load(tmp_path / "damaged.pt2")
    with pytest.raises(CheckpointError, match="does not exist"):
        shike_fast.load(tmp_path / "nowhere.pt2")
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(4, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(CheckpointError, match=r"other.pt2: was not written by shike_fast.export"):
        shike_fast.load(tmp_path / "other.pt2")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", {"shike_fast": "{}"})
    with pytest.raises(CheckpointError, match=r"other.safetensors: what it says of its network cannot be read"):
        shike_fast.load(tmp_path / "other.safetensors")
    assert evaluate(["--checkpoint", str(exported / "model.pt2")]) == 2
    assert "is a program, which says nothing of its experts" in capsys.readouterr().err
    assert predict(["--checkpoint", str(exported / "model.pt2"), "--images", str(tmp_path), "--stage", "1"]) == 2
    assert "--stage: is settled in an exported program" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx(finished, model, exported, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert write(finished / "last.pt", "onnx", tmp_path / "model.onnx") == 0
    onnx.checker.check_model(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 8, 8] and session.get_inputs()[0].type == "tensor(uint8)"
    assert session.get_outputs()[0].shape == ["batch", 10]
    described = json.loads(session.get_modelmeta().custom_metadata_map["shike_fast"])
    assert described["class_names"] == list(model.class_names)
    for batch in BATCHES:
        images = pixels(batch)
        found = torch.from_numpy(session.run(None, {"pixels": images.numpy()})[0])
        torch.testing.assert_close(found, expected(model, images), rtol=0, atol=1e-4)
    images = [np.random.default_rng(i).integers(0, 256, (20 + i, 33, 3), dtype=np.uint8) for i in range(4)]
    found = shike_fast.load(tmp_path / "model.onnx").predict(images)
    torch.testing.assert_close(found.probabilities, expected(model, images), rtol=0, atol=1e-4)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cut.onnx: cannot be read as an ONNX file"):
        shike_fast.load(tmp_path / "cut.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_large_networks(name, image_dir, tmp_path):
    run = ["--dataset", "imagefolder", "--data-dir", image_dir, "--model", name, "--image-size", 64]
    run += ["--epochs", 2, "--batch-size", 6, "--lr", 1e-3, "--workers", 0, "--output-dir", tmp_path / "run"]
    assert train([str(argument) for argument in run]) == 0
    kinds = {"torch": "model.pt2"} | ({"onnx": "model.onnx"} if _has_onnx() else {})
    model, files = shike_fast.load(tmp_path / "run" / "last.pt"), sorted((image_dir / "val").rglob("*.*"))
    for kind, file in kinds.items():
        assert write(tmp_path / "run" / "last.pt", kind, tmp_path / file) == 0
        found = shike_fast.load(tmp_path / file).predict(files).probabilities
        torch.testing.assert_close(found, model.predict(files).probabilities, rtol=0, atol=1e-4)
    assert zipfile.is_zipfile(tmp_path / "model.pt2")


def _has_onnx():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
