"""The ``.jpt`` as a file: a TorchScript program, what it says about itself, and cases that it must reproduce.

A ``.jpt`` is a zip archive. Beside the program it holds, as extra files, `METADATA_FILE` (YAML: format version,
fidelity, elements, units, dispersion, training, versions) and, from format version 2 on, `GOLDEN_FILE` (JSON: inputs
with the outputs that the model gave when it was compiled, `aimnet2mult.models.golden`). Both are read here without
PyTorch; `aimnet2mult.models.jit_wrapper.load_jit_model` runs the program.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

FORMAT_VERSION = 2
"""Version of the metadata of a compiled file; files of version 1 have no golden cases."""

METADATA_FILE = "metadata.yaml"
GOLDEN_FILE = "golden.json"
"""Names of the extra files inside the ``.jpt``."""

LICENCE_NOT_STATED = "not stated by whoever compiled the model"
"""What a file says about its licence if nothing else was said."""


class FileContent(NamedTuple):
    """What a compiled file holds besides the program.

    Attributes
    ----------
    metadata
        What it says about itself; empty for TorchScript files of other programs.
    golden
        Cases that it must reproduce, as `aimnet2mult.models.golden` writes them; None if there are none.
    """

    metadata: dict[str, Any]
    golden: dict[str, Any] | None


@contextmanager
def torchscript_deprecation_ignored() -> Iterator[None]:
    """Silence the announcement that TorchScript will be replaced one day, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".torch\.jit\.\w+. is (deprecated|not supported)")
        yield


def metadata_text(metadata: Mapping[str, Any]) -> str:
    """Return metadata as YAML: the text inside the ``.jpt``, and of the file beside it."""
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=120)


def parse_metadata(text: str, path: str | Path) -> dict[str, Any]:
    """Inverse of `metadata_text`; of an empty text, as in TorchScript files of other programs, an empty dictionary.

    Raises
    ------
    ValueError
        The file was written by a later version of this package.
    """
    metadata: dict[str, Any] = (yaml.safe_load(text) if text else None) or {}
    version = metadata.get("format_version", 1)
    if version > FORMAT_VERSION:
        raise ValueError(f"{path}: format {version} of compiled models is newer than this package; update aimnet2mult")
    return metadata


def save_jit_model(
    model: nn.Module, path: str | Path, metadata: Mapping[str, Any], golden: Mapping[str, Any] | None = None
) -> None:
    """Script a model and write it to ``path``, with its metadata and golden cases inside.

    Parameters
    ----------
    model : nn.Module
        `aimnet2mult.models.jit_wrapper.DeployableModel` or `aimnet2mult.models.combined.CombinedModel`. Its parameters
        require no gradients afterwards.
    path : str or Path
        The file. Tensors that parts of the model share are written once.
    metadata, golden : mapping
        As in `FileContent`; plain types.
    """
    import torch

    model = model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    extra = {METADATA_FILE: metadata_text(metadata)}
    if golden is not None:
        extra[GOLDEN_FILE] = json.dumps(golden)
    with torchscript_deprecation_ignored(), open(path, "wb") as file:
        # Given the name, torch would name the folder in the archive after it, and it may be a temporary one.
        torch.jit.save(torch.jit.script(model), file, _extra_files=extra)


def read_compiled_file(path: str | Path) -> FileContent:
    """Read what a compiled file says about itself, without loading the program.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a TorchScript file; written by a later version of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # The archive has one folder, whatever its name.
            texts = {
                key: archive.read(name).decode()
                for key in (METADATA_FILE, GOLDEN_FILE)
                for name in names
                if name.split("/", 1)[1:] == [f"extra/{key}"]
            }
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a compiled model (.jpt of tools.compile_jit): {error}") from error
    if any("/aotinductor/" in name or name.endswith("models/model.json") for name in names):
        raise ValueError(
            f"{path}: an exported model (.pt2): what it is says the _pt2_meta.yaml beside it; this is for the .jpt"
        )
    if not any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"{path}: not a compiled model (.jpt of tools.compile_jit): no TorchScript inside")
    golden = json.loads(texts[GOLDEN_FILE]) if GOLDEN_FILE in texts else None
    return FileContent(parse_metadata(texts.get(METADATA_FILE, ""), path), golden)
