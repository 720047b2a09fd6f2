"""Files that are written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

    A block that raises (or is interrupted from the keyboard) leaves ``path`` as it was and no temporary file.

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
    temporary = final.with_name(f".{final.stem}.{os.getpid()}-{os.urandom(3).hex()}{final.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) whole or not at all; raises as `check_writable`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
