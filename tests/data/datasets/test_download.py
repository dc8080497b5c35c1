"""The downloader against a server on this machine."""

import hashlib
import http.server
import socket
import threading
import time

import pytest

from shike_fast.data import load_dataset
from shike_fast.data.datasets import cifar
from shike_fast.data.datasets import download as _download
from shike_fast.data.datasets.archives import read_tar_members
from shike_fast.data.datasets.download import download

CONTENT = bytes(range(256)) * 3000  # more than one chunk
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        kind = self.path.rsplit("/", 1)[-1]
        if kind == "absent":
            self.send_error(404)
            return
        if kind == "garbage":
            self.wfile.write(b"\x00\x01\x02 nonsense\r\n\r\n")
            return
        if kind == "silent":
            time.sleep(1.5)
            return
        content = self.server.files.get(kind, CONTENT)
        self.send_response(200)
        if kind != "unmeasured":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if kind == "truncated":
            content = content[: len(content) // 2]
        if kind == "reset":
            self.wfile.write(content[:1000])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            self.connection.close()
            return
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as instance:
        instance.files = {}
        instance.handle_error = lambda *_: None
        instance.url = f"http://127.0.0.1:{instance.server_port}"
        thread = threading.Thread(target=instance.serve_forever, daemon=True)
        thread.start()
        yield instance
        instance.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["file.bin", "unmeasured"])
def test_a_good_transfer(server, kind, tmp_path, capsys):
    target = tmp_path / "new" / "folder" / "file.bin"
    download(f"{server.url}/{kind}", target, MD5)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert kind in captured.err  # the progress bar


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("absent", "the server answered 404"),
        ("truncated", f"incomplete, {len(CONTENT) // 2} of {len(CONTENT)} bytes arrived"),
        ("garbage", "the answer is not HTTP"),
        ("reset", "reset by peer"),
    ],
)
def test_a_bad_transfer_leaves_nothing(server, kind, text, tmp_path, data_error):
    with data_error(f"{server.url}/{kind}", text, "check the network", f"put it at {tmp_path / 'file.bin'}"):
        download(f"{server.url}/{kind}", tmp_path / "file.bin", MD5)
    assert list(tmp_path.iterdir()) == []


def test_wrong_checksum(server, tmp_path, data_error):
    with data_error("wrong checksum", MD5, "0" * 32, "put it at"):
        download(f"{server.url}/file.bin", tmp_path / "file.bin", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer(server, tmp_path, monkeypatch, data_error):
    monkeypatch.setattr(_download, "_TIMEOUT", 0.2)
    with data_error("timed out", "check the network"):
        download(f"{server.url}/silent", tmp_path / "file.bin", MD5)
    assert list(tmp_path.iterdir()) == []


def test_unreachable_server(tmp_path, data_error):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file.bin"  # bound, but nobody listens
        with data_error(url, "cannot reach the server", "Connection refused", "put it at"):
            download(url, tmp_path / "file.bin", MD5)
    assert list(tmp_path.iterdir()) == []


def test_unknown_host(tmp_path, data_error):
    with data_error("cannot reach the server", "put it at"):
        download("http://no-such-host.invalid/file.bin", tmp_path / "file.bin", MD5)


def test_a_folder_that_cannot_be_made(tmp_path, data_error):
    (tmp_path / "file").write_bytes(b"")
    with data_error(tmp_path / "file" / "x.bin", "cannot be written"):
        download("http://127.0.0.1:1/x.bin", tmp_path / "file" / "x.bin", MD5)


def test_interruption_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupt(url, write):
        write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(_download, "_transfer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/file.bin", tmp_path / "file.bin", MD5)
    assert list(tmp_path.iterdir()) == []


def test_load_dataset_fetches_the_binary_archive_once(server, tmp_path, monkeypatch, cifar_maker):
    import dataclasses

    maker = cifar_maker(100)
    made = tmp_path / "made"
    made.mkdir()
    archive = maker.archive(made, "binary", maker.binary(1000, 200))
    server.files[archive.name] = archive.read_bytes()
    form = dataclasses.replace(cifar.CIFAR100.forms[0], md5=hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "CIFAR100", dataclasses.replace(cifar.CIFAR100, forms=(form, cifar.CIFAR100.forms[1])))
    monkeypatch.setattr(cifar, "_BASE_URL", server.url)
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 1000)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 200)
    data_dir = tmp_path / "data"
    first = load_dataset("cifar100-lt", data_dir=data_dir, imbalance_factor=10, download=True)
    assert [path.name for path in data_dir.iterdir()] == ["cifar-100-binary.tar.gz"]
    monkeypatch.setattr(cifar, "download", lambda *_: pytest.fail("fetched twice"))
    again = load_dataset("cifar100-lt", data_dir=data_dir, imbalance_factor=10, download=True)
    assert again.fingerprint == first.fingerprint


def test_load_dataset_reports_a_failed_download(server, tmp_path, monkeypatch, data_error):
    monkeypatch.setattr(cifar, "_BASE_URL", server.url)
    with data_error("cifar-10-binary.tar.gz", "wrong checksum", f"put it at {tmp_path}"):
        load_dataset("cifar10-lt", data_dir=tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


def test_reading_an_archive_that_is_gone(tmp_path, data_error):
    with data_error(tmp_path / "gone.tar.gz", "cannot be read"):
        read_tar_members(tmp_path / "gone.tar.gz", ["x"], 10)
