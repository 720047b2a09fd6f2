"""What a training run left in its folder, as far as an evaluation needs it: the model, the validation molecules."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sgdataset import fingerprint, open_dataset
from aimnet2mult.data.splits import load_split
from aimnet2mult.utils.run_files import BEST_NAME, DATA, LAST_NAME, MODEL, SPLIT


class Validation(NamedTuple):
    """Molecules with which a run validated one fidelity.

    Attributes
    ----------
    name
        Name of the fidelity.
    source
        The dataset.
    indices
        (n,) which of its molecules.
    """

    name: str
    source: MoleculeSource
    indices: np.ndarray


def checkpoint_of_run(folder: Path) -> Path:
    """Return the model that the run saved, else the checkpoint with the best score, without scores the newest one.

    Raises
    ------
    FileNotFoundError
        No checkpoint in the folder.
    """
    if (folder / MODEL).is_file():
        return folder / MODEL
    ranked: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.pt"):
        best = BEST_NAME.fullmatch(path.name)
        if match := best or LAST_NAME.fullmatch(path.name):
            iteration, score = int(match["iteration"]), best and best["score"]
            ranked.append((float(score), iteration, path) if score else (np.inf, -iteration, path))
    if not ranked:
        raise FileNotFoundError(f"{folder}: no checkpoint of a training run; name a checkpoint or a compiled model")
    return min(ranked)[2]


def validation_molecules(folder: Path) -> list[Validation]:
    """Return the molecules with which a run validated, in the order of its fidelities.

    Raises
    ------
    FileNotFoundError, ValueError
        ``data.json`` or ``split.npz`` is missing or damaged, the files of the data are not where they were, or are
        others now.
    """
    hint = "name the datasets with --data"
    recorded = _data_record(folder, hint)
    ordered = sorted(recorded.items(), key=lambda item: item[1]["fidelity"])
    names = {f: name for f, (name, _) in enumerate(ordered)}
    sources = {f: _opened(folder, entry["files"], hint) for f, (_, entry) in enumerate(ordered)}
    _, held_out, _ = load_split(folder / SPLIT, dataset := MixedFidelityDataset(sources), names)
    found = []
    for f, inside in dataset.by_fidelity(held_out).items():
        files = ordered[f][1].get("val_files")
        if files:
            source = _opened(folder, files, hint)
            found.append(Validation(names[f], source, np.arange(len(source))))
        elif len(inside):
            found.append(Validation(names[f], sources[f], inside))
    if not found:
        raise ValueError(f"{folder}: the run had no validation molecules; {hint}")
    return found


def _data_record(folder: Path, hint: str) -> Mapping[str, Mapping[str, Any]]:
    path = folder / DATA
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the validation molecules of the run are not known, {hint}")
    try:
        fidelities = json.loads(path.read_text(encoding="utf-8"))["fidelities"]
        for entry in fidelities.values():
            _ = entry["fidelity"], [file["path"] for file in entry["files"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the record of a run's data ({error}); {hint}") from error
    return fidelities


def _opened(folder: Path, files: list[dict[str, Any]], hint: str) -> MoleculeSource:
    """Open files of a run and make sure that they are what they were."""
    paths = [file["path"] for file in files]
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file, but the run in {folder} validated with it; {hint}")
    source = open_dataset(paths)
    known = {file["path"]: file["sha256"] for file in files}
    for file in fingerprint(source):
        if known.get(file["path"], file["sha256"]) != file["sha256"]:
            raise ValueError(f"{file['path']}: not the data of the run in {folder} any more; {hint}")
    return source
