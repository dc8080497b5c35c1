"""Fetching a file over HTTP: checked, into a temporary file, with a progress bar.

``torch.hub.download_url_to_file`` does not do: it knows no MD5, waits for a silent server for ever, takes half a file
for the whole, and does not say what went wrong.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from shike_fast._util.progress import progress
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
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        length = answer.headers.get("Content-Length")
        expected = int(length) if length is not None and length.isdecimal() else None
        received = 0
        with progress(url.rsplit("/", 1)[-1], expected, in_bytes=True) as advance:
            while chunk := answer.read(_CHUNK):
                write(chunk)
                digest.update(chunk)
                received += len(chunk)
                advance(len(chunk))
    return received, expected, digest.hexdigest()
