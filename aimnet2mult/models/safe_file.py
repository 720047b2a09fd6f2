"""Files of tensors, read without running anything that is in them and without believing their sizes."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from aimnet2mult.utils.text import first_line

TORCHSCRIPT_ENTRY = "/constants.pkl"
"""What an archive of TorchScript holds, and one of tensors does not."""

MAX_ENTRIES = 100_000
"""Files inside the archive, one per tensor."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or one that does not fit the model."""


def is_torchscript(path: str | Path) -> bool:
    """Tell whether a file is a TorchScript program, by its content."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(TORCHSCRIPT_ENTRY) for name in archive.namelist())


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read what ``torch.save`` wrote: tensors in dictionaries and lists of plain types, nothing else.

    Parameters
    ----------
    path : str or Path
        The file.
    device : str or torch.device
        Where the tensors go.

    Raises
    ------
    FileNotFoundError, CheckpointError
        No such file; truncated, compressed (it could be of any size once unpacked), or holding objects other than
        tensors and plain types. The message names the file, and none of what it holds was run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    _check_archive(path)
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        # Of files that are no pickles at all, the unpickler says nothing that helps.
        reason = f" ({first_line(error)})" if str(error) else ""
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely{reason}") from error
    # What torch and the unpickler raise for damaged files; of files that are no pickles, things like KeyError(105).
    except (RuntimeError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely; is it whole?") from error


def _check_archive(path: Path) -> None:
    """Refuse a damaged archive, and one that grows when it is read. Files of old versions of torch are no archives."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({first_line(error)})") from error
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"{path}: {len(entries)} files inside, more than any model has tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: compressed inside, which torch.save never does; not a checkpoint")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: what is inside claims to be larger than the file; damaged, or made to harm")
