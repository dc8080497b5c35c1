"""Files that survive a kill at any moment, and locks, on whatever file system there is.

A file is written under a temporary name, flushed to the disk and renamed, so a reader sees the old file or the new one,
never a part. Some file systems cannot lock files, flush folders or link: then it is done without; a missing lock is
reported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from shike_fast.errors import ConfigError, DataError, RunError, warn

# What a file system answers that does not flush folders, or lets nobody open them: it orders their changes itself.
_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOTTY, errno.EISDIR}
_NO_FLUSH |= {errno.EACCES, errno.EPERM}
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # all other answers to flock say that there are no locks
FULL = {errno.ENOSPC, errno.EDQUOT}
LOCK = ".lock"  # in a folder that one command at a time may write to
_PATIENCE = 5.0  # seconds that the workers of a killed command may take to notice
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class HeldElsewhereError(Exception):
    """Another process holds the lock."""


def temporary_of(path: Path) -> Path:
    """Where a write to ``path`` begins: one fixed name, so that a killed write leaves at most one file behind."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, keep_previous_as: Path | None = None, then: str = "") -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` at the end; after a failure nothing of it is left.

    Args:
        path: holds the old content or the new, whole, also after a crash.
        keep_previous_as: where the file that is replaced stays; at every moment one of the two is whole.
        then: what else to do after a failure, the end of its message.

    Raises:
        RunError: naming the file, if it cannot be made, flushed or renamed.
    """
    temporary = temporary_of(path)
    try:
        with naming(path, then):
            file = open(temporary, "wb")  # noqa: SIM115  (closed below, and after a failure without a second error)
        try:
            yield file
            with naming(path, then):
                _flush(file)
        finally:
            with contextlib.suppress(OSError):  # what is flushed is there, and what failed first is what to report
                file.close()
        with naming(path, then):
            if keep_previous_as is not None and path.exists():
                _keep(path, keep_previous_as)
            os.replace(temporary, path)
            _flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` so that after a crash it holds the old content or the new, whole.

    Raises:
        RunError: naming the file, if that fails; nothing is left behind.
    """
    with replacing(path) as file, naming(path):
        file.write(content)


def append(path: Path, content: bytes) -> None:
    """Add to a file and flush it to the disk.

    Raises:
        RunError: naming the file, if that fails.
    """
    with naming(path), open(path, "ab") as file:
        file.write(content)
        _flush(file)


@contextlib.contextmanager
def naming(path: Path, then: str = "") -> Iterator[None]:
    """Work that writes to ``path``: what the system says of a failed write or flush does not name the file.

    Raises:
        RunError: naming it, if the work raises OSError.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, then) from error


def cannot_write(path: Path, error: OSError, then: str = "") -> RunError:
    """The error for a file that cannot be written: its name, the reason and what helps, which ``then`` ends."""
    return RunError(f"cannot write {path}: {_reason(error)}; {advice(error)}{then}")


def advice(error: OSError) -> str:
    """What helps where a file cannot be written."""
    if error.errno in FULL:
        return "make room or choose another folder"
    if error.errno in _FORBIDDEN:
        return "choose a folder that can be written"
    return "see to the disk or choose another folder"


def lock(file: IO[Any], *, wait: bool = False) -> None:
    """Hold an open file for this process, until it is closed; where there are no locks, warn and continue.

    With ``wait``, until no other process holds it.

    Raises:
        HeldElsewhereError: another process holds it.
    """
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    except ImportError:
        reason = "no POSIX system"
    except OSError as error:
        if error.errno in _HELD:
            raise HeldElsewhereError(file.name) from error
        reason = _reason(error)
    warn(f"{file.name}: files cannot be locked here ({reason}); see to it that no other process writes to this folder")


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Making the first files or folders in a place: a failure is bad input.

    Raises:
        DataError: naming the folder, if the system refuses.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from packing into the same folder; it is made if need be.

    Raises:
        DataError: it cannot be made or written.
        RunError: another process still holds it after some seconds.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "wb")  # noqa: SIM115  (held over the yield below)
    with file:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                lock(file)
                break
            except HeldElsewhereError as error:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{folder}: another process is packing into this folder; wait for it or stop it"
                    ) from error
                time.sleep(0.05)
        yield


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder, which need not exist yet; None if one can. Nothing is written to find out.

    The reason is put as the system would put it.
    """
    existing = folder
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        if not existing.is_dir():
            return os.strerror(errno.ENOTDIR)
        if os.access(existing, os.W_OK | os.X_OK):
            return None
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        return os.strerror(errno.EROFS if read_only else errno.EACCES)
    except OSError as error:
        return _reason(error)


def check_output_file(option: str, path: Path, ours: Callable[[Path], bool], refusal: str) -> None:
    """Refuse, before the work, a file that cannot be written afterwards, or that no earlier command of the kind wrote.

    Args:
        option: the option that names it.
        path: the file.
        ours: whether an existing file may be replaced.
        refusal: what is said of any other: "is no table".

    Raises:
        ConfigError: naming the option, the file and the remedy.
    """
    if path.is_dir() or not path.name:
        raise ConfigError(f"{option}: {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: {path.parent} is not a folder; create it or name another file")
    if (reason := why_not_writable(path.parent)) is not None:
        raise ConfigError(f"{option}: {path} cannot be written ({reason}); name another file")
    if not path.exists():
        return
    if not path.is_file():
        raise ConfigError(f"{option}: {path} is no regular file; name one")
    try:
        if ours(path):
            return
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read ({_reason(error)}); name another file") from error
    raise ConfigError(f"{option}: {path} exists and {refusal}; name another file")


def _keep(path: Path, target: Path) -> None:
    """Make ``target`` another name of the file at ``path``, or a copy; ``path`` stays where it is throughout."""
    temporary = temporary_of(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        with replacing(target) as copy, naming(target), open(path, "rb") as source:
            shutil.copyfileobj(source, copy)
        return
    os.replace(temporary, target)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # the rename itself is durable only once the folder is
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split()) or type(error).__name__
