"""Files of tensors, read without running anything that is in them and without believing their sizes."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimnet2mult.utils.text import first_line

TORCHSCRIPT_ENTRY = "/constants.pkl"
"""What an archive of TorchScript holds, and one of tensors does not."""

MAX_ENTRIES = 100_000
"""Files inside the archive, one per tensor."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or one that does not fit the model."""


def is_torchscript(path: str | Path) -> bool:
    """Tell whether a file is a TorchScript program, by its content."""
    return any(entry.filename.endswith(TORCHSCRIPT_ENTRY) for entry in _entries(Path(path)))


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
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        # Of files that are no pickles at all, the unpickler says nothing that helps.
        reason = f" ({first_line(error)})" if str(error) else ""
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely{reason}") from error
    # Of damaged files, the unpickler raises whatever it stumbles over, such as KeyError(105).
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely; is it whole?") from error
    _check_held(content, path)
    return content


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    """Files inside an archive; none if it is no archive."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({first_line(error)})") from error


def _check_archive(path: Path) -> None:
    """Refuse a damaged archive, and one that grows when it is read. Files of old versions of torch are no archives."""
    entries = _entries(path)
    if len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"{path}: {len(entries)} files inside, more than any model has tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: compressed inside, which torch.save never does; not a checkpoint")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: what is inside claims to be larger than the file; damaged, or made to harm")


def _check_held(content: Any, path: Path) -> None:
    """Refuse tensors that have more memory than the file can have filled, as files of old versions of torch can ask."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    queue = [content]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized:
                raise CheckpointError(f"{path}: holds a tensor that is not a plain one ({value.layout}, {value.dtype})")
            if not value.is_meta:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            seen.add(id(value))
            queue += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            seen.add(id(value))
            queue += value
    if sum(storages.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: asks for more memory than the file has numbers for; damaged, or made to harm")
