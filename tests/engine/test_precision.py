"""``--amp auto`` and the word before a slow bfloat16; what a processor is like is made up, no test depends on it."""

import json
import types

import pytest
import torch

from shike_fast import evaluate
from shike_fast.engine import precision
from shike_fast.engine.config import resolve, resume_config
from shike_fast.engine.precision import settle_amp

CPU = torch.device("cpu")
TINY = ("--method", "ce", "--epochs", "1", "--threads", "1")


@pytest.fixture
def ratio(monkeypatch):
    """Decide how long bfloat16 takes."""
    return lambda value: monkeypatch.setattr(precision, "bf16_time_ratio", lambda: value)


def test_auto_takes_the_faster_on_a_cpu(ratio):
    ratio(0.4)
    assert settle_amp("auto", CPU) == (
        "bf16",
        "--amp auto: bf16 (bfloat16 takes 0.40 times as long as float32 on this processor)",
    )
    ratio(1.52)
    assert settle_amp("auto", CPU) == (
        "off",
        "--amp auto: off (bfloat16 takes 1.52 times as long as float32 on this processor)",
    )


def test_bf16_is_kept_and_its_slowness_told(ratio):
    ratio(1.52)
    chosen, note = settle_amp("bf16", CPU)
    assert chosen == "bf16"
    assert note == (
        "--amp bf16: bfloat16 takes 1.52 times as long as float32 on this processor; --amp off is faster here"
    )
    ratio(1.04)  # noise
    assert settle_amp("bf16", CPU) == ("bf16", None)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_nothing_is_measured_for_the_others(amp, monkeypatch):
    monkeypatch.delattr(precision, "bf16_time_ratio")
    assert settle_amp(amp, CPU) == (amp, None)


@pytest.mark.parametrize(
    ("capability", "chosen"), [((6, 1), "off"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_auto_on_a_gpu_goes_by_its_capability(monkeypatch, capability, chosen):
    cuda = types.SimpleNamespace(
        get_device_capability=lambda device: capability, get_device_name=lambda device: "NVIDIA Test"
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    amp, note = settle_amp("auto", torch.device("cuda", 0))
    major, minor = capability
    assert (amp, note) == (chosen, f"--amp auto: {chosen} (NVIDIA Test, capability {major}.{minor})")
    assert settle_amp("bf16", torch.device("cuda", 0)) == ("bf16", None)


def test_the_measurement_is_a_positive_number_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    assert 0 < precision.bf16_time_ratio.__wrapped__() < 1000
    assert torch.get_num_threads() == threads


def test_a_run_keeps_what_auto_came_to(ratio):
    ratio(0.5)
    config = resolve({"amp": "auto", "device": "cpu"})
    assert config.amp == "bf16"
    ratio(2.0)  # another processor: the run goes on as it began
    assert resume_config({**vars(config)}, {"amp": "auto"}, "last.pt").amp == "bf16"


def test_the_command_says_what_it_chose(runs, ratio, tmp_path, capsys):
    ratio(1.25)
    told = "--amp auto: off (bfloat16 takes 1.25 times as long as float32 on this processor)"
    assert runs.train(*TINY, "--amp", "auto", "--output-dir", tmp_path / "run") == 0
    assert told in capsys.readouterr().out.splitlines()
    assert runs.checkpoint(tmp_path / "run" / "last.pt")["config"]["amp"] == "off"

    arguments = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--amp", "auto", "--json"]
    assert evaluate.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [told]
    assert json.loads(captured.out)["test_images"] == 600
