"""``python -m shike_fast.info`` and the loader that keeps the exception of a failed import."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import shike_fast
from shike_fast import info, ops
from shike_fast.ops import _native
from shike_fast.ops._dispatch import OPERATORS
from shike_fast.ops._native import native, native_error
from shike_fast.ops._verdicts import plain


@pytest.fixture
def fresh_loader():
    """Forgets what was loaded, before and after the test."""
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


@pytest.fixture
def library(monkeypatch, fresh_loader):
    """Puts a stand-in, or None for a library that cannot be imported, in the place of shike_fast._native."""

    def library(module):
        monkeypatch.setitem(sys.modules, "shike_fast._native", module)

    return library


def build(**changes):
    return {
        "version": shike_fast.__version__,
        "cuda": None,
        "cuda_reason": "none here",
        "cuda_architectures": [],
    } | changes


def stand_in(**functions):
    return SimpleNamespace(**{"build_info": build, "cpu_level": lambda: "generic"} | functions)


def test_native_library_is_loaded():
    assert native_error() is None
    assert native() is importlib.import_module("shike_fast._native")


def test_failed_import_is_kept(library):
    library(None)
    error = native_error()
    assert isinstance(error, ImportError)
    with pytest.raises(RuntimeError, match=r"^shike_fast\._native is not available: ModuleNotFoundError: ") as caught:
        native()
    assert caught.value.__cause__ is error
    assert native_error() is error


def test_library_of_another_version_is_refused(library):
    library(SimpleNamespace(build_info=lambda: build(version="0.0.1")))
    with pytest.raises(RuntimeError, match=rf"built for shike_fast 0\.0\.1, this is {shike_fast.__version__}: install"):
        native()


def test_collect():
    found = info.collect()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"versions", "threads", "devices", "native", "images", "backends", "registered"}
    assert found["images"]["jpeg"].startswith("simplejpeg ")
    assert torch.cuda.is_available() or found["images"]["gpu_decoder"]
    assert found["versions"]["shike_fast"] == shike_fast.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"]["torch_intra_op"] == torch.get_num_threads()
    assert found["native"] == {"available": True, "error": None, "build": native().build_info()}
    assert {name: backend["available"] for name, backend in found["backends"].items()} == ops.backends()
    for name, backend in found["backends"].items():
        assert backend["reason"] == ops.backend_reasons().get(name)
        assert backend["available"] != bool(backend["reason"])
        known = {device: plain(found)[name] for device, found in ops.verdicts().items() if name in found}
        assert backend["verdicts"] == known
    assert found["devices"]["cpu"]["kernels"] == native().cpu_level()
    for view in found["devices"]["cuda"].values():
        assert bool(view["devices"]) != bool(view["reason"])


def test_text_shows_every_value():
    ops.verify("cpu")
    text = info.render(info.collect())
    for wanted in (shike_fast.__version__, torch.__version__, native().build_info()["compiler"], "reference"):
        assert wanted in text
    for name, reason in ops.backend_reasons().items():
        assert any(line.split(maxsplit=1) == [name, f"missing: {reason}"] for line in text.splitlines())
    assert "gpu decoder  " in text
    (row,) = [line for line in text.splitlines() if "on cpu, passed: " in line]
    assert row.split(": ")[1].split(", ") == [name for name in OPERATORS if "cpu" in OPERATORS[name].backends]


def test_missing_library_is_reported(library, capsys):
    library(None)
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert "missing  ModuleNotFoundError: " in text
    assert "cpu kernels    missing\n" in text
    assert "cuda, native   none: shike_fast._native is not available: ModuleNotFoundError: " in text
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)["native"]
    assert (found["available"], found["build"]) == (False, None)
    assert found["error"].startswith("ModuleNotFoundError: ")


def test_library_without_cuda_gives_its_reason(library):
    def cuda_devices():
        raise RuntimeError("shike_fast was built without CUDA: none here")

    library(stand_in(cuda_devices=cuda_devices))
    lines = info.render(info.collect()).splitlines()
    assert "  cuda, native   none: shike_fast was built without CUDA: none here" in lines
    assert "  cuda     none: none here" in lines


def test_cuda_devices_of_the_library(library):
    device = {
        "compute_capability": (9, 0),
        "memory_bytes": 2**37,
        "driver_version": (13, 0),
        "runtime_version": (12, 9),
    }

    def cuda_self_test(index):
        if index == 1:
            raise RuntimeError("no kernel image")

    library(
        stand_in(
            build_info=lambda: build(cuda="12.9.1", cuda_reason=None, cuda_architectures=["80-real", "90"]),
            cuda_devices=lambda: [{"name": "First", **device}, {"name": "Second", **device}],
            cuda_self_test=cuda_self_test,
        )
    )
    found = info.collect()
    assert json.loads(json.dumps(found)) == found
    assert [each["self_test"] for each in found["devices"]["cuda"]["native"]["devices"]] == [None, "no kernel image"]
    text = info.render(found)
    rest = "compute capability 9.0, 128.0 GiB, driver for CUDA 13.0, runtime 12.9, self test"
    assert f"cuda:0, native  First, {rest} passed\n" in text
    assert f"cuda:1, native  Second, {rest} failed: no kernel image\n" in text
    assert "cuda_architectures  80-real, 90\n" in text


def test_library_that_sees_no_device(library):
    library(stand_in(cuda_devices=list))
    assert "cuda, native   none: no device\n" in info.render(info.collect())


def test_cuda_devices_of_torch(monkeypatch):
    properties = SimpleNamespace(name="Some GPU", major=8, minor=6, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert "cuda:0, torch  Some GPU, compute capability 8.6, 24.0 GiB\n" in info.render(info.collect()).replace(
        "   ", "  "
    )


def test_torch_with_cuda_but_no_driver(monkeypatch):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    view = info.collect()["devices"]["cuda"]["torch"]
    assert view == {"version": "13.0", "devices": [], "reason": "Found no NVIDIA driver on your system."}


def test_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info.collect()["devices"]["cuda"]["torch"]["reason"] == "this PyTorch was built without CUDA"


def test_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    assert info.collect()["versions"]["triton"] == "3.6.0"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert info.collect()["versions"]["triton"].startswith("missing: ModuleNotFoundError: ")


def test_processor_without_a_name_in_cpuinfo(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(info, "Path", lambda name: cpuinfo)
    monkeypatch.setattr(info.platform, "processor", lambda: "")
    monkeypatch.setattr(info.platform, "machine", lambda: "riscv64")
    assert info.collect()["devices"]["cpu"]["name"] == "riscv64"  # no such file
    cpuinfo.write_text("processor : 0\nisa : rv64\n")
    assert info.collect()["devices"]["cpu"]["name"] == "riscv64"  # no such line
    cpuinfo.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert info.collect()["devices"]["cpu"]["name"] == "Some CPU @ 2 GHz"


def test_command_from_another_directory(programs, tmp_path):
    command = [sys.executable, "-m", "shike_fast.info", "--json"]
    done = programs.run(command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["versions"]["shike_fast"] == shike_fast.__version__


def test_unknown_argument(capsys):
    assert info.main(["--xml"]) == 2
    assert "unrecognized arguments: --xml" in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(programs):
    done = programs.run([sys.executable, "-m", "shike_fast"])
    assert done.returncode == 2 and done.stderr == ""
    listed = [line.split()[2].removeprefix("shike_fast.") for line in done.stdout.splitlines()[1:]]
    assert listed == ["train", "evaluate", "predict", "export", "data", "info"]
