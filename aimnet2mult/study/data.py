"""The data files of a study: subsets of the target, its validation molecules, differences to another level."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.sgdataset import fingerprint, open_dataset, write_dataset
from aimnet2mult.data.splits import composition_hashes
from aimnet2mult.study.geometries import difference_data
from aimnet2mult.study.settings import DELTA, StudyConfig
from aimnet2mult.study.subsets import (
    COMPOSITION_SEED,
    composition_table,
    missing_elements,
    molecules,
    nested_subsets,
    reference_factors,
    validation_structures,
    write_structures,
)
from aimnet2mult.utils.files import write_text_atomic

logger = logging.getLogger(__name__)

FOLDER, RECORD, VALIDATION = "data", "record.json", "data/validation.h5"

UNSEEN = f"{FOLDER}/unseen_{{}}.h5"
"""Dataset of another fidelity without the compositions of test and validation, to be formatted with its name."""

FORMAT = 4
"""Version of the files: others are written anew."""


@dataclass(frozen=True)
class Subset:
    """Structures of the target to train on.

    Attributes
    ----------
    fraction : float
        Share of the molecules of the pool that was asked for.
    order : int
        Number of the order of the molecules.
    file : str
        Its dataset, relative to the folder of the study.
    validation : str
        The dataset to validate with while training.
    structures, molecules : int
        What it holds.
    missing : str
        Elements of the pool that it lacks, or "geometries" if it holds none; empty: nothing.
    """

    fraction: float
    order: int
    file: str
    validation: str
    structures: int
    molecules: int
    missing: str = ""


@dataclass
class StudyData:
    """What was written.

    Attributes
    ----------
    subsets : list of Subset
        Of the target.
    differences : dict of str to list of Subset
        Other fidelity -> for each subset of the target, the geometries that this fidelity has too.
    structures, molecules : int
        The pool.
    validation_structures : int
        Structures that validate.
    test_structures : int
        Structures for the test.
    others : dict of str to int
        Other fidelity -> number of its structures.
    """

    subsets: list[Subset]
    differences: dict[str, list[Subset]]
    structures: int
    molecules: int
    validation_structures: int
    test_structures: int
    others: dict[str, int]

    @property
    def sizes(self) -> dict[tuple[float, int], int]:
        """Number of molecules of each subset of the target, by fraction and order."""
        return {(subset.fraction, subset.order): subset.molecules for subset in self.subsets}

    def subset(self, fraction: float, order: int, low: str | None = None) -> Subset:
        """Return the subset of a fraction and an order, or its differences to another fidelity."""
        found = self.subsets if low is None else self.differences[low]
        return next(subset for subset in found if (subset.fraction, subset.order) == (fraction, order))


def prepare(study: StudyConfig, folder: Path) -> StudyData:
    """Write the data files of a study, unless they are there already.

    Parameters
    ----------
    study : StudyConfig
        The study.
    folder : Path
        Its folder.

    Raises
    ------
    ValueError
        Too few compositions; test molecules with elements that are not in the pool; delta learning without common
        geometries; a folder that holds files but no study.
    """
    record = folder / FOLDER / RECORD
    if not record.is_file():
        if any(folder.iterdir()):
            raise ConfigError(f"{folder}: holds files, but no study; --output needs a new or an empty folder")
        record.parent.mkdir()
        write_text_atomic(record, json.dumps({"key": "not complete"}))
    target, test = open_dataset(study.fidelities[study.target].files), open_dataset(study.test)
    others = {name: open_dataset(study.fidelities[name].files) for name in study.others}
    delta = {study.low(name) for name in study.protocols if study.kind(name) == DELTA}
    lows = {name: source for name, source in others.items() if name in delta}
    read = others if study.unseen else lows
    orders = {fraction: _orders(study, fraction) for fraction in study.all_fractions()}
    wanted: dict[str, Any] = {
        "format": FORMAT,
        "sources": [_contents(source) for source in (target, test, *read.values())],
        "structures": {name: len(source) for name, source in others.items()},
        "validation": asdict(study.validation),
        "orders": [[fraction, count] for fraction, count in orders.items()],
        "lows": list(lows),
        "unseen": study.unseen,
    }
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    known = _read_record(folder, key, study.others if study.unseen else [])
    if known is not None:
        return known
    logger.info("writing the data of the study to %s", folder / FOLDER)
    data = _write(study, folder, target, test, lows, orders)
    data.others = {name: len(source) for name, source in others.items()}
    if study.unseen:
        data.others = _write_unseen(folder, others, (test, open_dataset(folder / VALIDATION)))
    write_text_atomic(record, json.dumps({"key": key, **asdict(data)}, indent=1) + "\n")
    return data


def _orders(study: StudyConfig, fraction: float) -> int:
    """Number of orders that a fraction is needed with."""
    return 1 + max(order for order, _ in study.replicates(fraction))


def _contents(source: MoleculeSource) -> list[str]:
    return [str(file["sha256"]) for file in fingerprint(source)]


def _read_record(folder: Path, key: str, unseen: Sequence[str]) -> StudyData | None:
    """What is in the folder, if it is what is wanted and complete."""
    path = folder / FOLDER / RECORD
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.pop("key") != key:
        return None
    subsets = [Subset(**entry) for entry in record.pop("subsets")]
    differences = {low: [Subset(**entry) for entry in entries] for low, entries in record.pop("differences").items()}
    data = StudyData(subsets, differences, **record)
    every = [*subsets, *(subset for found in differences.values() for subset in found)]
    files = [file for subset in every if not subset.missing for file in (subset.file, subset.validation)]
    files += [UNSEEN.format(name) for name in unseen]
    return data if all((folder / file).is_file() for file in files) else None


def _write(
    study: StudyConfig,
    folder: Path,
    target: MoleculeSource,
    test: MoleculeSource,
    lows: dict[str, MoleculeSource],
    orders: dict[float, int],
) -> StudyData:
    """Write all files."""
    validates = validation_structures(target, study.validation.fraction, study.validation.seed)
    pool = np.flatnonzero(~validates)
    _, molecule = np.unique(molecules(target)[pool], return_inverse=True)
    factors = reference_factors(target)
    elements = composition_table(target) > 0
    if absent := missing_elements(np.flatnonzero(elements[pool].any(axis=0)).tolist(), test.elements):
        raise ConfigError(f"test: molecules of {test.name} have {absent}, which no molecule to train on has")
    write_structures(folder / VALIDATION, target, np.flatnonzero(validates))
    n_molecules, n_validation = int(molecule.max()) + 1, int(validates.sum())
    data = StudyData([], {low: [] for low in lows}, len(pool), n_molecules, n_validation, len(test), {})
    for order in range(max(orders.values())):
        fractions = [fraction for fraction, count in orders.items() if order < count]
        for fraction, rows in nested_subsets(molecule, factors[pool], fractions, order).items():
            file = f"{FOLDER}/f{fraction:g}_s{order}.h5"
            write_structures(folder / file, target, pool[rows])
            n_molecules = len(np.unique(molecule[rows]))
            data.subsets.append(Subset(fraction, order, file, VALIDATION, int(rows.sum()), n_molecules))
            for low, source in lows.items():
                differences = _Differences(target, source, elements, folder, f"{FOLDER}/f{fraction:g}_s{order}_{low}")
                found = differences.write(pool[rows], molecule[rows], np.flatnonzero(validates))
                data.differences[low].append(Subset(fraction, order, *found))
    _check_differences(study.target, data)
    return data


def _write_unseen(folder: Path, others: Mapping[str, MoleculeSource], seen: Sequence[MoleculeSource]) -> dict[str, int]:
    """Write the structures of the other fidelities whose compositions are not among those of ``seen``; count them."""
    counts = {}
    hashes = np.concatenate([composition_hashes(source, COMPOSITION_SEED) for source in seen])
    for name, source in others.items():
        left = np.flatnonzero(~np.isin(composition_hashes(source, COMPOSITION_SEED), hashes))
        if not len(left):
            raise ConfigError(f"unseen: all compositions of {name} are among those of test and validation")
        logger.info("%s: %d of %d structures are of other compositions", name, len(left), len(source))
        write_structures(folder / UNSEEN.format(name), source, left)
        counts[name] = len(left)
    return counts


@dataclass
class _Differences:
    """Writes the geometries of the target that another level has too; ``name`` is how the files' names begin."""

    target: MoleculeSource
    low: MoleculeSource
    elements: np.ndarray
    folder: Path
    name: str

    def write(self, train: np.ndarray, molecule: np.ndarray, validation: np.ndarray) -> tuple[str, str, int, int, str]:
        """Write those among structures to train on and to validate; return what `Subset` has after the order.

        Geometries with elements that are not trained on do not validate.
        """
        groups, found = difference_data(self.target, train, self.low)
        known = self.elements[found].any(axis=0)
        validation = validation[~(self.elements[validation] & ~known).any(axis=1)]
        checks, _ = difference_data(self.target, validation, self.low)
        files = f"{self.name}.h5", f"{self.name}_validation.h5"
        if not groups or not checks:
            return *files, 0, 0, "geometries"
        for file, content in zip(files, (groups, checks), strict=True):
            write_dataset(self.folder / file, content)
        n_molecules = len(np.unique(molecule[np.isin(train, found)]))
        wanted = np.flatnonzero(self.elements[train].any(axis=0)).tolist()
        return *files, len(found), n_molecules, missing_elements(np.flatnonzero(known).tolist(), wanted)


def _check_differences(target: str, data: StudyData) -> None:
    for low, found in data.differences.items():
        if not any(subset.structures for subset in found):
            raise ConfigError(
                f"protocols: {target} and {low} have no geometries in common (same order of the atoms, coordinates "
                "equal to 0.001 Å) to train on and to validate; a delta protocol learns from such geometries alone"
            )
