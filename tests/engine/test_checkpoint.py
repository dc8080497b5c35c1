import os
import pickle
import sys

import pytest
import torch

from shike_fast._util import files
from shike_fast.engine import checkpoint
from shike_fast.engine.checkpoint import find_resumable, load_checkpoint, previous_of, save_checkpoint
from shike_fast.errors import CheckpointError, RunError


def state(value: float = 1.0) -> dict:
    model = {"config": {}, "data": {}, "model_description": {}, "model": {"weight": torch.full((300,), value)}}
    run = {"batch": 0, "sums": [], "optimizer": {}, "scaler": {}, "rng": {}}
    return model | run | {"stage": 1, "epoch": 3, "history": [{"top1": 50.0, "few": None}]}


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(state(), path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["weight"], torch.ones(300))
    assert loaded["history"] == [{"top1": 50.0, "few": None}]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.pt"]


def test_the_replaced_checkpoint_is_kept(tmp_path):
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(state(value), path)
    assert load_checkpoint(path)["model"]["weight"][0] == 3
    assert load_checkpoint(previous_of(path))["model"]["weight"][0] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_without_hard_links_the_replaced_checkpoint_is_kept_too(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "last.pt"
    for value in (1.0, 2.0):
        save_checkpoint(state(value), path)
    assert load_checkpoint(previous_of(path))["model"]["weight"][0] == 1
    assert load_checkpoint(path)["model"]["weight"][0] == 2


def test_without_keep_previous_only_the_new_one_stays(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(state(1.0), path, keep_previous=False)
    save_checkpoint(state(2.0), path, keep_previous=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.pt"]


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pt does not exist"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "last.pt"
    save_checkpoint(state(), path)
    size = path.stat().st_size
    os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or truncated"):
        load_checkpoint(path)


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(state(), path)
    content = bytearray(path.read_bytes())
    position = content.index(torch.ones(300).numpy().tobytes()) + 600
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong CRC in record"):
        load_checkpoint(path)


def test_a_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "evil.pt"
    torch.save({"format": checkpoint.FORMAT, "model": Evil()}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="is damaged or truncated"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_weight_file_is_no_checkpoint(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(
        CheckpointError,
        match=r"weights.pt is no checkpoint of shike_fast, which last.pt and best.pt of a run are$",
    ):
        load_checkpoint(tmp_path / "weights.pt")


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    save_checkpoint(state(), tmp_path / "last.pt")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"last.pt cannot be read \(Input/output error\); see to the file"):
        load_checkpoint(tmp_path / "last.pt")

    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_checkpoint(tmp_path / "last.pt")


def test_another_format(tmp_path):
    torch.save({"format": 99, "model": {}}, tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match="has format 99, this version of shike_fast reads format 1"):
        load_checkpoint(tmp_path / "future.pt")


def test_find_resumable_in_an_empty_directory(tmp_path):
    assert find_resumable(tmp_path) is None
    assert find_resumable(tmp_path / "absent") is None


def test_find_resumable_prefers_the_newest(tmp_path):
    save_checkpoint(state(1.0), tmp_path / "last.pt")
    save_checkpoint(state(2.0), tmp_path / "last.pt")
    path, found = find_resumable(tmp_path)
    assert path == tmp_path / "last.pt"
    assert found["model"]["weight"][0] == 2


def test_find_resumable_falls_back_to_the_previous(tmp_path):
    save_checkpoint(state(1.0), tmp_path / "last.pt")
    save_checkpoint(state(2.0), tmp_path / "last.pt")
    os.truncate(tmp_path / "last.pt", 50)
    with pytest.warns(UserWarning, match=r"last.pt is damaged.*; going on from .*last.previous.pt"):
        path, found = find_resumable(tmp_path)
    assert path == previous_of(tmp_path / "last.pt")
    assert found["model"]["weight"][0] == 1


def test_find_resumable_without_the_newest(tmp_path):
    save_checkpoint(state(1.0), tmp_path / "last.pt")
    os.replace(tmp_path / "last.pt", previous_of(tmp_path / "last.pt"))
    with pytest.warns(UserWarning, match=r"last\.pt does not exist.*; going on from .*last\.previous\.pt"):
        _, found = find_resumable(tmp_path)
    assert found["model"]["weight"][0] == 1


def test_find_resumable_never_starts_over_silently(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged"):
        find_resumable(tmp_path)


def test_a_write_cut_short_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(state(1.0), path)

    def cut_short(content, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(RunError, match=r"cannot write .*last\.pt: No space left on device; make room") as error:
        save_checkpoint(state(2.0), path)
    assert error.value.exit_status == 1
    monkeypatch.undo()
    assert load_checkpoint(path)["model"]["weight"][0] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """torch turns a failed write into an error of its own archive writer, which says nothing of the disk."""
    monkeypatch.setattr(files, "temporary_of", lambda path: tmp_path / "full")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*last\.pt: No space left on device"):
        save_checkpoint(state(), tmp_path / "last.pt")


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    save_checkpoint(state(), tmp_path / "last.pt")
    (tmp_path / ".last.pt.tmp").write_bytes(b"half")
    checkpoint.remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder; name the file, such as .*last\.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "to_resume", "message"),
    [
        ("config", None, False, "config must be dict, got nothing"),
        ("data", 3, False, "data must be dict, got int"),
        ("model", "weights", False, "model must be dict, got str"),
        ("stage", "one", False, "stage must be int, got str"),
        ("batch", None, True, "batch must be int, got nothing"),
        ("optimizer", None, True, "holds a model but no training state; resume from last.pt"),
        ("rng", [], True, "rng must be dict, got list"),
    ],
)
def test_incomplete_checkpoints(tmp_path, name, value, to_resume, message):
    content = {"format": checkpoint.FORMAT} | state() | {name: value}
    if value is None and name != "model":
        del content[name]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pt", to_resume=to_resume)


_WRITE_FOREVER = """
import sys, torch
from pathlib import Path
from shike_fast.engine.checkpoint import save_checkpoint
value = 0
state = {"config": {}, "data": {}, "model_description": {}, "stage": 1}
state |= {"batch": 0, "sums": [], "optimizer": {}, "scaler": {}, "history": [], "rng": {}}
while True:
    value += 1
    state["model"] = {"weight": torch.full((200_000,), float(value))}
    save_checkpoint(state | {"epoch": value}, Path(sys.argv[1]))
    print(value, flush=True)
"""


@pytest.mark.slow
def test_killed_while_writing(programs, tmp_path):
    """Ten kills into an endless series of writes: what is found is whole and no older than the last finished write."""
    for kill in range(10):
        directory = tmp_path / str(kill)
        directory.mkdir()
        process = programs.start([sys.executable, "-c", _WRITE_FOREVER, directory / "last.pt"])
        written = 0
        for _ in range(2 + kill):
            written = int(process.stdout.readline())
        process.kill()
        written = int(([written, *process.stdout.read().split()])[-1])
        process.wait()
        _, found = find_resumable(directory)
        assert found["epoch"] >= written
        assert torch.equal(found["model"]["weight"], torch.full((200_000,), float(found["epoch"])))
