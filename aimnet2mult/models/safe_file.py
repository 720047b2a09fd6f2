"""Files of tensors, read without running anything that is in them and without believing their sizes."""

import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from aimnet2mult.utils.text import first_line

TORCHSCRIPT_ENTRY = "/constants.pkl"
"""What an archive of TorchScript holds, and one of tensors does not."""

MAX_ENTRIES = 100_000
"""Files inside the archive, one per tensor."""


SAFE_NAMES = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|meta_tensor_no_storage)"
    r"|torch \w+Storage|torch\.storage \w+Storage|torch Size"
    r"|torch (u?int|float|bfloat|complex)\w*|torch bool"
)
"""What a pickle may name: the parts of tensors. torch allows more, a ``bytearray`` of any size among it."""

NAMING = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
"""Instructions of pickles that name something, those that torch does not read among them."""

PICKLES = 5
"""Pickles one after the other in files of old versions of torch."""

MAX_SHARED = 8
"""Weights that may be one and the same tensor."""


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
    _check_names(path)
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except PermissionError:
        raise
    # Of damaged files, the unpickler raises whatever it stumbles over, such as KeyError(105).
    except Exception as error:
        raise CheckpointError(_not_whole(path, error)) from error
    _check_held(content, path)
    return content


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    """Files inside an archive; none if it is no archive."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # What zipfile raises for damaged directories, and for archives of kinds that it cannot read.
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


def _check_names(path: Path) -> None:
    """Refuse pickles that name anything but the parts of tensors, before they are loaded."""
    try:
        for asked in _asked(path):
            if not SAFE_NAMES.fullmatch(asked):
                dotted = asked.replace(" ", ".")
                raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely: it asks for {dotted:.80}")
    except (CheckpointError, PermissionError):
        raise
    # As above: of damaged files it raises whatever it stumbles over.
    except Exception as error:
        raise CheckpointError(_not_whole(path, error)) from error


def _not_whole(path: Path, error: Exception) -> str:
    """Say what came up in place of the content; the texts of these errors tell users nothing, or to trust the file."""
    return f"{path}: not a checkpoint that can be loaded safely; is it whole? ({type(error).__name__})"


def _asked(path: Path) -> Iterator[str]:
    """What the pickles of a file name, as ``module name``."""
    entries = [entry for entry in _entries(path) if entry.filename.endswith(".pkl")]
    if not entries:
        with open(path, "rb") as stream:
            for _ in range(PICKLES):
                yield from _named(stream)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in entries:
            yield from _named(io.BytesIO(archive.read(entry)))


def _named(stream: IO[bytes]) -> Iterator[str]:
    """What one pickle names."""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in NAMING:
            yield str(argument) if opcode.name in ("GLOBAL", "INST") else opcode.name


def check_weights(weights: Mapping[Any, Any], where: str) -> None:
    """Refuse what is not a plain tensor under a name, and tensors that show the same few numbers many times over.

    Copies of the latter would need any amount of memory.
    """
    shared: dict[int, int] = {}
    for key, value in weights.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{where}: a key of the type {type(key).__name__} is not the name of a weight")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {key:.80} is of the type {type(value).__name__}, expected a tensor")
        if value.is_meta:
            raise CheckpointError(f"{where}: {key:.80} has no numbers (meta)")
        storage, size = value.untyped_storage(), value.numel() * value.element_size()
        shared[storage.data_ptr()] = shared.get(storage.data_ptr(), 0) + size
        if size > storage.nbytes() or shared[storage.data_ptr()] > MAX_SHARED * storage.nbytes():
            raise CheckpointError(
                f"{where}: {key:.80} has the shape {tuple(value.shape)}, but the file holds fewer numbers for it"
            )


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
