"""``--config``: settings from a file, and what is wrong with a file."""

import json

import pytest

from shike_fast.engine.config import resolve
from shike_fast.engine.config_file import settings_from
from shike_fast.errors import ConfigError
from shike_fast.train import main

TOML = """
dataset = "cifar10-lt"
epochs = 9
lr = 1
experts = 2
kl-reduction = "batchmean"
amp = "off"
download = true
"""
YAML = """
dataset: cifar10-lt  # a comment
epochs: 9
lr: 1e0
experts: 2
kl-reduction: batchmean
amp: off
download: true
image_size: null
"""
EXPECTED = {
    "dataset": "cifar10-lt",
    "epochs": 9,
    "lr": 1.0,
    "num_experts": 2,
    "kl_reduction": "batchmean",
    "amp": "off",
    "download": True,
}


def write(path, text):
    path.write_text(text)
    return path


def test_toml(tmp_path):
    found = settings_from(write(tmp_path / "run.toml", TOML), {})
    assert found == EXPECTED and type(found["lr"]) is float


@pytest.mark.parametrize("name", ["run.yaml", "run.yml"])
def test_yaml(tmp_path, name):
    pytest.importorskip("yaml")
    found = settings_from(write(tmp_path / name, YAML), {})
    assert found == EXPECTED and type(found["lr"]) is float


def test_json_and_flags_that_override_it(tmp_path):
    path = write(tmp_path / "run.json", json.dumps(EXPECTED))
    given = {"epochs": 3, "output_dir": tmp_path, "resume": "auto"}
    assert settings_from(path, given) == EXPECTED | given


def test_settings_of_other_methods_are_left_out(tmp_path):
    path = write(tmp_path / "run.json", json.dumps({"hardest_weight": 3, "lr": 0.2}))
    assert settings_from(path, {}) == {"hardest_weight": 3.0, "lr": 0.2}
    assert settings_from(path, {"method": "ce"}) == {"lr": 0.2, "method": "ce"}


def test_a_run_that_began_at_random_does_so_again(tmp_path):
    """The recipe of this data set asks for weights; null in the file says that there were none."""
    path = write(tmp_path / "config.json", json.dumps({"dataset": "places-lt", "pretrained": None}))
    assert resolve(settings_from(path, {})).pretrained is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"epochs": 3,', "{} is no json file: Expecting property name"),
        ("a.json", "[1]", "{} must hold settings by name, got list"),
        ("a.toml", "epochs = ", "{} is no toml file: Invalid value"),
        ("a.toml", "[training]\nepochs = 3", "{}: unknown setting 'training'"),
        ("a.ini", "epochs = 3", "{} must end with .json, .toml, .yaml, .yml, which says how to read it"),
        ("a.json", '{"epoch": 3}', "{}: unknown setting 'epoch'; did you mean epochs?"),
        ("a.json", '{"output_dir": "x"}', "{}: output_dir is no setting of a run; name it on the command line"),
        ("a.json", '{"epochs": "ten"}', "{}: --epochs: must be a whole number, got 'ten'"),
        ("a.json", '{"epochs": 2.5}', "{}: --epochs: must be a whole number, got 2.5"),
        ("a.json", '{"epochs": true}', "{}: --epochs: must be a whole number, got True"),
        ("a.json", '{"epochs": null}', "{}: --epochs: must be a whole number, got None"),
        ("a.json", '{"lr": "fast"}', "{}: --lr: must be a number, got 'fast'"),
        ("a.json", '{"lr": NaN}', "{}: --lr: must be a positive number, got nan"),
        ("a.json", '{"download": 1}', "{}: --download: must be true or false, got 1"),
        ("a.json", '{"dataset": 7}', "{}: --dataset: must be a text, got 7"),
        ("a.json", '{"model": "vgg"}', "{}: --model: must be one of resnet8"),
        ("a.json", '{"epochs": 0}', "{}: --epochs: must be at least 1, got 0"),
        ("a.json", '{"experts": 2, "num_experts": 3}', "{}: names num_experts twice"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, monkeypatch, capsys, name, text, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / name, text)
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --config: {message.replace('{}', str(path), 1)}") and error.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_files_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"--config: .*gone.json cannot be read: No such file"):
        settings_from(tmp_path / "gone.json", {})
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"--config: .*folder.toml cannot be read: Is a directory"):
        settings_from(tmp_path / "folder.toml", {})
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin.toml is no toml file: 'utf-8' codec can't decode"):
        settings_from(tmp_path / "latin.toml", {})
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"run.yaml needs PyYAML; pip install pyyaml, or write the file as .toml"):
        settings_from(write(tmp_path / "run.yaml", YAML), {})


def test_yaml_that_is_none(tmp_path):
    pytest.importorskip("yaml")
    with pytest.raises(ConfigError, match=r"run\.yaml is no yaml file: .*line 1"):
        settings_from(write(tmp_path / "run.yaml", "epochs: [3"), {})


def test_a_config_reproduces_its_run(runs, tmp_path, finished):
    """All that the recipe gave counts as given, so that another recipe would change nothing."""
    assert runs.train("--config", finished / "config.json", "--output-dir", tmp_path / "run") == 0
    runs.assert_same_weights(finished / "last.pt", tmp_path / "run" / "last.pt")
    assert runs.reproducible_metrics(finished) == runs.reproducible_metrics(tmp_path / "run")
    assert (finished / "config.json").read_text() == (tmp_path / "run" / "config.json").read_text()


def test_a_config_on_resumption_must_be_that_of_the_run(runs, tmp_path, finished, capsys):
    own = ["--resume", finished / "last.pt", "--output-dir", tmp_path / "run", "--config"]
    assert runs.train(*own, finished / "config.json") == 0
    other = write(tmp_path / "other.json", '{"lr": 0.7}')
    assert runs.train("--resume", finished / "last.pt", "--output-dir", tmp_path / "x", "--config", other) == 2
    assert "belongs to another run: lr is 0.1, the command line says 0.7" in capsys.readouterr().err
