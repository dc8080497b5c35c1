"""Fetching a file over HTTP: checked, into a temporary file, with a progress bar."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from shike_fast.errors import DataError

_CHUNK = 1 << 18
_TIMEOUT = 30.0  # seconds without an answer or without data


def download(url: str, target: Path, md5: str) -> None:
    """Fetch ``url`` to ``target``, which appears only once it is complete and its checksum is right.

    Args:
        url: http or https address.
        target: file to create; its folder is created if need be.
        md5: expected MD5, hexadecimal.

    Raises:
        DataError: no network, an error answer, an incomplete transfer, a wrong checksum, or the file cannot be written.
    """
    advice = f"check the network, or get the file elsewhere and put it at {target}"
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sink = part.open("xb")
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
    try:
        with sink:
            received, expected, found = _transfer(url, sink.write)
            sink.flush()
            os.fsync(sink.fileno())
        if expected is not None and received != expected:
            raise DataError(f"download of {url}: incomplete, {received} of {expected} bytes arrived; {advice}")
        if found != md5:
            raise DataError(f"download of {url}: wrong checksum (MD5 {found}, expected {md5}); {advice}")
        part.rename(target)
    except urllib.error.HTTPError as error:
        raise DataError(f"download of {url}: the server answered {error.code} {error.reason}; {advice}") from error
    except urllib.error.URLError as error:
        raise DataError(f"download of {url}: cannot reach the server ({error.reason}); {advice}") from error
    except http.client.HTTPException as error:
        raise DataError(f"download of {url}: the answer is not HTTP ({type(error).__name__}); {advice}") from error
    except OSError as error:
        raise DataError(f"download of {url} to {target}: {error.strerror or error}; {advice}") from error
    finally:
        part.unlink(missing_ok=True)


def _transfer(url: str, write: Callable[[bytes], object]) -> tuple[int, int | None, str]:
    """Stream the body of ``url`` to ``write``: bytes received, bytes announced (if they were), MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, _progress() as progress:
        length = answer.headers.get("Content-Length")
        expected = int(length) if length is not None and length.isdecimal() else None
        bar = progress.add_task(url.rsplit("/", 1)[-1], total=expected)
        received = 0
        while chunk := answer.read(_CHUNK):
            write(chunk)
            digest.update(chunk)
            received += len(chunk)
            progress.update(bar, completed=received)
    return received, expected, digest.hexdigest()


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
