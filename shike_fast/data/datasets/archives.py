"""Reading possibly compressed files, with errors that name the file and say what to do."""

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from shike_fast.errors import DataError

AGAIN = "obtain the file again"

_DAMAGED = (EOFError, zlib.error, tarfile.TarError, gzip.BadGzipFile)


def read_file(path: Path) -> bytes:
    """The content of a file, decompressed where its name ends in ``.gz``.

    Raises:
        DataError: it cannot be read, is truncated or damaged.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                return stream.read()
        return path.read_bytes()
    except _DAMAGED as error:
        raise DataError(f"{path}: truncated or damaged ({_one_line(error)}); {AGAIN}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_tar_members(path: Path, names: Collection[str], largest: int) -> dict[str, bytes]:
    """Some members of a compressed tar archive, read in memory; nothing is ever written to disk.

    Args:
        path: the archive.
        names: the wanted file names, without their folder.
        largest: the most bytes a member may have.

    Returns:
        The contents by name.

    Raises:
        DataError: the archive is damaged, or a wanted member is missing, no regular file, or too large.
    """
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in names:
                    continue
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    raise DataError(f"{path}: member {member.name} is not a regular file; {AGAIN}")
                if member.size > largest:
                    raise DataError(
                        f"{path}: member {member.name} has {member.size} bytes, expected at most {largest}; {AGAIN}"
                    )
                contents[name] = content.read()
            while stream.read(1 << 20):
                pass  # gzip's checksum stands at the very end, where tar has stopped reading
    except _DAMAGED as error:
        raise DataError(f"{path}: truncated or damaged ({_one_line(error)}); {AGAIN}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise DataError(f"{path}: the archive holds no {missing[0]}; {AGAIN}")
    return contents


def md5_of(path: Path) -> str:
    """MD5 of a file, as the publishers of these data sets state it (an integrity check, not a security one)."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_md5(path: Path, expected: str) -> None:
    """Raise DataError unless the file has the expected MD5."""
    found = md5_of(path)
    if found != expected:
        raise DataError(f"{path}: wrong checksum (MD5 {found}, expected {expected}); delete it and {AGAIN}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
