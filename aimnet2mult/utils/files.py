"""Files that are written whole or not at all, and that are still there after a power failure."""

import errno
import functools
import hashlib
import logging
import os
import platform
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

ABANDONED_AFTER = 3600.0
"""Age from which a temporary file of another machine (or container) counts as left behind, s since its last change."""

_TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{6}(\.[^.]*)?", re.DOTALL)


def check_writable(path: str | Path) -> Path:
    """Make sure that a file can be written at ``path``, without writing it; call it before long work.

    Parameters
    ----------
    path : str or Path
        Name of the file to be written. It may exist; its folder must.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        The folder does not exist, or is not a folder.
    IsADirectoryError
        ``path`` itself is a folder.
    PermissionError
        The folder, or the file that is there, cannot be written.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; the name of a file is expected")
    if not folder.exists():
        raise FileNotFoundError(f"{path}: cannot be written, the folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: cannot be written, {folder} is not a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: the file is write-protected")
    try:
        # Only a real attempt tells: os.access says yes to root on file systems that refuse everyone.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"{path}: the folder {folder} cannot be written ({error.strerror})") from error
    return path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path``; what was written there is moved to ``path`` when the block succeeds.

    A block that raises (or is interrupted from the keyboard) leaves ``path`` as it was and no temporary file; a process
    that is killed leaves ``path`` as it was and a file for `remove_stale`. When the block is done, the content and its
    name are on disk.

    Parameters
    ----------
    path : str or Path
        Final name of the file. A symbolic link is followed.

    Yields
    ------
    Path
        The temporary name, in the same folder and with the same suffix.

    Raises
    ------
    OSError
        As `check_writable`.
    """
    final = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    check_writable(final)
    temporary = final.with_name(f".{final.stem}.{_place()}-{os.getpid()}-{os.urandom(3).hex()}{final.suffix}")
    _being_written.add(temporary.name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        _being_written.discard(temporary.name)
    sync_folder(final.parent)


_being_written: set[str] = set()
"""Temporary files of this process, by name."""


@functools.cache
def _place() -> str:
    """Eight digits for where process numbers have the same meaning: this machine since its start, or this container."""
    parts = [platform.node()]
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and processes.exists():
        parts += [boot.read_text(), os.readlink(processes)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def sync_folder(folder: str | Path) -> None:
    """Make sure that what was created, renamed and removed in a folder is on disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # file systems without folders to sync
            raise
    finally:
        os.close(descriptor)


def remove_stale(folder: str | Path) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder.

    Only files named by `atomic_path` are looked at. One goes if its process is known to be gone (it ran on this
    machine, and no process has its number), or, where that cannot be known, if it was not changed for
    `ABANDONED_AFTER` seconds.

    Parameters
    ----------
    folder : str or Path
        The folder; those inside it are left alone.

    Returns
    -------
    list of Path
        What was removed. A file that could not be removed is named in a warning.
    """
    removed = []
    for path in sorted(Path(folder).iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or path.name in _being_written:
            continue
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and _is_stale(match["place"], int(match["process"]), status.st_mtime):
                path.unlink()
                removed.append(path)
        except FileNotFoundError:  # its process has just finished it
            continue
        except OSError as error:
            logger.warning("%s: left behind by a process that was killed, cannot be removed (%s)", path, error.strerror)
    return removed


def _is_stale(place: str, process: int, changed: float) -> bool:
    if place != _place() or os.name != "posix":
        return time.time() - changed > ABANDONED_AFTER
    return process == os.getpid() or not _is_running(process)  # not of this process: it knows its own


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all; raises as `check_writable`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
