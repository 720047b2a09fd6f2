"""A model beside a dataset: every molecule is predicted, and the errors are summed up."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from aimnet2mult.constants import ELEMENT_SYMBOLS, element_names
from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.checks.findings import Place, locate
from aimnet2mult.data.sgdataset import DatasetError
from aimnet2mult.evaluation.models import INPUTS, Predictor
from aimnet2mult.evaluation.properties import ENERGY_PER_ATOM, LABELS, PROPERTIES
from aimnet2mult.evaluation.statistics import Molecules, Outlier, PropertyErrors

READ_ATOMS = 200_000
"""Atoms that are read at a time."""

ATOMS_PER_CALL = {"cpu": 2_000, "cuda": 20_000}
"""Atoms in one call of the model, by type of device; other devices as the CPU."""


@dataclass(frozen=True)
class WorstMolecule:
    """A molecule with a large error, and where it lies.

    Attributes
    ----------
    outlier : Outlier
        The value that is furthest off.
    place : Place
        File, group and row.
    """

    outlier: Outlier
    place: Place

    @property
    def formula(self) -> str:
        """Hill formula (carbon, hydrogen, then the others by name), and the charge of an ion: ``H4N 1+``."""
        numbers = self.outlier.numbers
        symbols = [ELEMENT_SYMBOLS[z] for z in numbers]
        first = ["C", "H"] if "C" in symbols else []
        ordered = [*first, *sorted(set(symbols) - set(first))]
        counts = [(symbol, symbols.count(symbol)) for symbol in ordered]
        formula = "".join(symbol + (str(n) if n > 1 else "") for symbol, n in counts if n)
        charge = self.outlier.charge
        return f"{formula} {abs(charge):g}{'+' if charge > 0 else '−'}" if charge else formula

    @property
    def atom(self) -> str:
        """The atom whose value it is, ``O3`` for an oxygen that is the third atom; empty for a molecular property."""
        if self.outlier.atom is None:
            return ""
        return f"{ELEMENT_SYMBOLS[self.outlier.numbers[self.outlier.atom]]}{self.outlier.atom + 1}"


@dataclass
class Comparison:
    """Errors of one fidelity of a model on one dataset, in the units of the package.

    Attributes
    ----------
    model : str
        Where the model comes from.
    fidelity : int
        Number of the fidelity.
    name : str or None
        Its name.
    data : str
        What the dataset is called.
    molecules, available : int
        Molecules that were evaluated, and those that there are.
    errors : dict of str to PropertyErrors
        Property (of `PROPERTIES`, in its order) -> errors; only those with at least one label.
    worst : dict of str to list of WorstMolecule
        Property -> molecules, the largest error first.
    notes : list of str
        What a reader should know.
    """

    model: str
    fidelity: int
    name: str | None
    data: str
    molecules: int
    available: int
    errors: dict[str, PropertyErrors]
    worst: dict[str, list[WorstMolecule]]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What to call the fidelity: its name, or its number."""
        return self.name or f"fidelity {self.fidelity}"


def headings(comparisons: Sequence[Comparison]) -> list[str]:
    """Return what to call each comparison where the others stand beside it: its fidelity, and what else differs."""
    several_models = len({c.model for c in comparisons}) > 1
    several_data = len({(c.model, c.title) for c in comparisons}) < len(comparisons)
    return [
        ", ".join([c.title, *([c.model] if several_models else []), *([c.data] if several_data else [])])
        for c in comparisons
    ]


def check_elements(predictor: Predictor, source: MoleculeSource) -> None:
    """Refuse a dataset with elements that the model does not know.

    Raises
    ------
    ValueError
        Names the elements.
    """
    unknown = [z for z in source.elements if z not in predictor.species]
    if unknown:
        raise ValueError(
            f"{source.name}: holds {element_names(unknown)}, not among the elements of {predictor.title} of "
            f"{predictor.model}: {element_names(predictor.species)}. Take these molecules out."
        )


def choose_molecules(molecules: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """At most ``limit`` of some molecules (n,), drawn at random, ascending."""
    if limit is None or len(molecules) <= limit:
        return np.sort(molecules)
    return np.sort(np.random.default_rng(seed).choice(molecules, limit, replace=False))


def compare(
    predictor: Predictor,
    source: MoleculeSource,
    data: str,
    indices: np.ndarray | None = None,
    *,
    labels: Collection[str] = LABELS,
    max_molecules: int | None = None,
    seed: int = 0,
    atoms_per_call: int = ATOMS_PER_CALL["cpu"],
) -> Comparison:
    """Evaluate a model on molecules of a dataset.

    Labels that are absent, and NaN, are left out; a property without any label is absent from the result.

    Parameters
    ----------
    predictor : Predictor
        The model.
    source : MoleculeSource
        The dataset.
    data : str
        What to call it.
    indices : ndarray, optional
        (n,) which of its molecules; default all.
    labels : collection of str
        Labels to compare.
    max_molecules : int, optional
        Evaluate no more than this, drawn at random.
    seed : int
        Seed of that choice, and of the samples for pictures.
    atoms_per_call : int
        Atoms in one call of the model.

    Raises
    ------
    DatasetError
        A coordinate, charge or multiplicity that is not finite, or an infinite label.
    ValueError
        Too many atoms for the memory of the device, or what the model itself refuses.
    """
    asked = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    chosen = choose_molecules(asked, max_molecules, seed)
    rng = np.random.default_rng(seed)
    errors = {key: PropertyErrors(PROPERTIES[key].atomic, rng) for key in PROPERTIES}
    labelled = [key for key in LABELS if key in source.keys and key in labels]
    not_predicted: set[str] = set()
    with tqdm(total=len(chosen), desc=data, unit="molecule", unit_scale=True, disable=None) as progress:
        for rows, arrays in pieces(source, chosen, [*INPUTS, *labelled], atoms_per_call):
            present = [key for key in labelled if key in arrays and _has_labels(source, key, rows, arrays[key])]
            if present:
                check_inputs(source, rows, arrays)
                predicted = _predicted(predictor, source, rows, arrays, present)
                molecules = Molecules(rows, arrays["numbers"], arrays["charge"])
                not_predicted.update(key for key in present if key not in predicted)
                if "energy" in present:
                    arrays["energy"] = arrays["energy"] - predictor.reference(arrays)
                for key in present:
                    if key in predicted:
                        _add(errors, key, molecules, arrays[key], predicted[key])
            progress.update(len(rows))
    found = {key: sums for key, sums in errors.items() if sums.molecules}
    worst = {
        key: [WorstMolecule(outlier, locate(source, outlier.index)) for outlier in sums.worst.sorted()]
        for key, sums in found.items()
    }
    comparison = Comparison(
        predictor.model, predictor.fidelity, predictor.name, data, len(chosen), len(asked), found, worst
    )
    comparison.notes = [*predictor.notes, *_notes(comparison, sorted(not_predicted), seed)]
    return comparison


def pieces(
    source: MoleculeSource, chosen: np.ndarray, keys: list[str], atoms_per_call: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Indices (k,) and arrays (k, ...) of molecules of one size, enough for one call of the model."""
    block = np.cumsum(source.n_atoms[chosen], dtype=np.int64) // READ_ATOMS
    for read in np.split(chosen, np.flatnonzero(np.diff(block)) + 1):
        for positions, arrays in source.read(read, [key for key in keys if key in source.keys]):
            step = max(1, atoms_per_call // arrays["numbers"].shape[1])
            for first in range(0, len(positions), step):
                part = slice(first, first + step)
                yield read[positions[part]], {key: values[part] for key, values in arrays.items()}


def _has_labels(source: MoleculeSource, key: str, rows: np.ndarray, values: np.ndarray) -> bool:
    """Tell whether any of the molecules has the label; refuse infinite ones."""
    values = values.reshape(len(values), -1)
    infinite = np.isinf(values).any(axis=1)
    if infinite.any():
        where = source.where(int(rows[np.argmax(infinite)]))
        raise DatasetError(f"{where}: {key} is infinite. Repair the file; NaN would mark a missing label.")
    return not bool(np.isnan(values).any(axis=1).all())


def check_inputs(source: MoleculeSource, rows: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    """Raise a DatasetError that says where, if an input of molecules is not finite."""
    for key in INPUTS:
        if key in arrays:
            finite = np.isfinite(arrays[key]).reshape(len(rows), -1).all(axis=1)
            if not finite.all():
                where = source.where(int(rows[np.argmin(finite)]))
                raise DatasetError(f"{where}: {key} is NaN or infinite. Remove the molecule or repair the file.")


def _predicted(
    predictor: Predictor, source: MoleculeSource, rows: np.ndarray, arrays: dict[str, np.ndarray], keys: list[str]
) -> dict[str, np.ndarray]:
    try:
        return predictor.predict({key: arrays[key] for key in INPUTS if key in arrays}, keys)
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"{arrays['numbers'].size} atoms in one call are too many for the memory of the device; give fewer with "
            "--atoms-per-call"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source.where(int(rows[0]))} and {len(rows) - 1} more molecules: {error}") from error


def _add(
    errors: dict[str, PropertyErrors],
    key: str,
    molecules: Molecules,
    label: np.ndarray,
    predicted: np.ndarray,
) -> None:
    """Add a property of some molecules; the energy, relative to the reference energies, per atom, too."""
    if key == "energy":
        n_atoms = molecules.numbers.shape[1]
        errors[ENERGY_PER_ATOM].add(molecules, label / n_atoms, predicted / n_atoms)
    errors[key].add(molecules, label, predicted)


def _notes(comparison: Comparison, not_predicted: list[str], seed: int) -> list[str]:
    notes = []
    if comparison.molecules < comparison.available:
        notes.append(
            f"{comparison.title}: {comparison.molecules} of the {comparison.available} molecules of {comparison.data}, "
            f"drawn at random (seed {seed})."
        )
    if not comparison.errors:
        notes.append(
            f"{comparison.title}: no molecule of {comparison.data} has a label that {comparison.model} predicts."
        )
    for key in not_predicted:
        notes.append(f"{comparison.title}: {comparison.data} has labels for {key}, which the model does not predict.")
    for key, sums in comparison.errors.items():
        if sums.not_finite:
            notes.append(
                f"{comparison.title}: the predicted {PROPERTIES[key].title} of {sums.not_finite} molecules of "
                f"{comparison.data} is NaN or infinite; these are in no mean, and lead the worst molecules."
            )
    return notes
