"""Datasets of several fidelities as one: self-atomic energies subtracted, fidelities encoded, missing labels marked."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import FIDELITY_OFFSET, MAX_ATOMIC_NUMBER, element_names
from aimnet2mult.data.base import (
    FIDELITY_KEY,
    INPUT_KEYS,
    LabelCount,
    MoleculeSource,
    MultiFidelityDataset,
    Sample,
)
from aimnet2mult.data.sae import reference_energy
from aimnet2mult.data.sgdataset import DatasetError, open_dataset
from aimnet2mult.nbops import BATCH_KEYS, encode_fidelity
from aimnet2mult.reference_energies import ReferenceEnergies

LABEL_KEYS = tuple(
    key
    for key, meaning in BATCH_KEYS.items()
    if meaning.kind in ("atom", "molecule") and key not in (*INPUT_KEYS, FIDELITY_KEY, "mol_idx")
)
"""Quantities that can be labels."""

NUMPY_TYPES = {"float": np.float32, "float64": np.float64, "int": np.int64}
"""Types of samples and batches, for the words of `aimnet2mult.nbops.BATCH_KEYS`."""


class MixedFidelityDataset(MultiFidelityDataset):
    """The datasets of all fidelities, one after the other.

    One dataset is a special case: with fidelity 0 alone, atomic numbers stay as they are.

    Parameters
    ----------
    datasets : mapping of int to str, Path, sequence of these, or MoleculeSource
        Dataset of each fidelity 0 ... F-1: a file, several files or patterns of names (`open_dataset`), or a source.
    sae : mapping of int to mapping of int to float, optional
        Self-atomic energies of each fidelity, atomic number -> eV, or `ReferenceEnergies`, whose terms take charge and
        multiplicity from the dataset whether or not they are among ``x``. None leaves total energies.
    fidelity_offset : int
        Distance of the element types of neighbouring fidelities.
    x : sequence of str
        Inputs of the model, from ``coord, numbers, charge, mult``. ``mult`` is 1 where a file has none.
    y : sequence of str
        Labels. A molecule lacks a label if its group has no such array, or if the array is NaN there.

    Attributes
    ----------
    datasets : dict of int to MoleculeSource
        Dataset of each fidelity.
    starts : numpy.ndarray
        (F + 1,) int64, index of the first molecule of each fidelity, and the number of all molecules.

    Raises
    ------
    FileNotFoundError
        A file does not exist.
    DatasetError
        A file cannot be used.
    ValueError
        Fidelities are not 0 ... F-1, an unknown key in ``x`` or ``y``, or an element of a file that is not among
        the self-atomic energies of its fidelity.
    """

    def __init__(
        self,
        datasets: Mapping[int, str | Path | Sequence[str | Path] | MoleculeSource],
        sae: Mapping[int, Mapping[int, float]] | None = None,
        fidelity_offset: int = FIDELITY_OFFSET,
        x: Sequence[str] = INPUT_KEYS,
        y: Sequence[str] = ("energy", "forces", "charges", "spin_charges"),
    ) -> None:
        _check_fidelities("data.fidelity_datasets", list(datasets))
        _check_keys(x, y)
        if len(datasets) > 1 and fidelity_offset <= MAX_ATOMIC_NUMBER:
            raise ValueError(
                f"fidelity_offset: {fidelity_offset} makes element types of different fidelities coincide. "
                f"Choose more than {MAX_ATOMIC_NUMBER}, such as {FIDELITY_OFFSET}."
            )
        self.fidelity_offset = fidelity_offset
        self.x, self.y = tuple(x), tuple(y)
        self.datasets: dict[int, MoleculeSource] = {
            f: data if isinstance(data, MoleculeSource) else open_dataset(data) for f, data in sorted(datasets.items())
        }
        self.num_fidelities = len(self.datasets)
        lengths = [len(data) for data in self.datasets.values()]
        self.starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self.n_atoms = np.concatenate([data.n_atoms for data in self.datasets.values()])
        self.fidelities = np.repeat(np.arange(self.num_fidelities, dtype=np.int16), lengths)
        self.labels = {f: data.keys.intersection(self.y) for f, data in self.datasets.items()}
        self.species = {f: data.elements for f, data in self.datasets.items()}
        self.sae = None if sae is None else {f: ReferenceEnergies.from_table(t) for f, t in sorted(sae.items())}
        self._check_sae()

    def _check_sae(self) -> None:
        if self.sae is None:
            return
        if set(self.sae) != set(self.datasets):
            raise ValueError(
                f"data.sae.energy.files: found for fidelities {_listed(self.sae)}, but there are datasets for "
                f"{_listed(self.datasets)}. Give one SAE file for each dataset."
            )
        for f, data in self.datasets.items():
            absent = [z for z in data.elements if z not in self.sae[f]]
            if absent:
                raise ValueError(
                    f"{element_names(absent)} in {data.name} not among the self-atomic energies of fidelity {f}: "
                    f"{element_names(sorted(self.sae[f]))}. Fit them to this dataset (aimnet2mult.train.calc_sae)."
                )

    def where(self, index: int) -> str:
        """Return file, group and row of a molecule, for messages."""
        fidelity = int(self.fidelities[index])
        return self.datasets[fidelity].where(int(index - self.starts[fidelity]))

    def label_counts(self) -> dict[int, dict[str, LabelCount]]:
        """Count, for each fidelity and each of ``y``, the molecules that have the label (`MoleculeSource`)."""
        return {f: data.label_counts(self.y) for f, data in self.datasets.items()}

    def by_fidelity(self, indices: np.ndarray) -> dict[int, np.ndarray]:
        """Divide indices (m,) among the fidelities, in their order, each counted within its fidelity."""
        fidelities = self.fidelities[indices]
        return {f: indices[fidelities == f] - self.starts[f] for f in self.datasets}

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the samples of the given molecules, in their order.

        Raises
        ------
        DatasetError
            A coordinate, charge or multiplicity that is not finite, or an infinite label.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"molecule indices must be from 0 to {len(self) - 1}")
        samples: list[Sample] = [{}] * len(wanted)
        fidelities = self.fidelities[wanted]
        for f in np.unique(fidelities).tolist():
            places = np.flatnonzero(fidelities == f)
            for positions, arrays in self.datasets[f].read(wanted[places] - self.starts[f], self._arrays(f)):
                positions = places[positions]
                for position, sample in zip(positions, self._samples(f, wanted[positions], arrays), strict=True):
                    samples[position] = sample
        return samples

    def _arrays(self, fidelity: int) -> tuple[str, ...]:
        """Arrays to read: inputs, labels, and what the reference energies depend on."""
        with_terms = self.sae is not None and self.sae[fidelity].terms and "energy" in self.y
        return tuple(dict.fromkeys([*self.x, *self.y, *(("charge", "mult") if with_terms else ())]))

    def _samples(self, fidelity: int, indices: np.ndarray, arrays: dict[str, np.ndarray]) -> list[Sample]:
        """Samples of molecules of one fidelity and size, from their arrays (k, ...)."""
        n_molecules = len(indices)
        if "mult" in self.x and "mult" not in arrays:
            arrays["mult"] = np.ones(n_molecules, np.float32)
        for key in INPUT_KEYS:
            if key in arrays and key != "numbers" and not (finite := _finite_rows(arrays[key])).all():
                where = self.where(int(indices[np.argmin(finite)]))
                raise DatasetError(f"{where}: {key} is NaN or infinite. Remove the molecule or repair the file.")
        columns: dict[str, list[object]] = {FIDELITY_KEY: [fidelity] * n_molecules}
        for key in self.x:
            values = arrays[key]
            if key == "numbers":
                values = encode_fidelity(values.astype(np.int64), fidelity, self.fidelity_offset)
            columns[key] = list(values.astype(NUMPY_TYPES[BATCH_KEYS[key].dtype], copy=False))
        for key in self.y:
            if key not in arrays:
                columns[key] = [None] * n_molecules
                continue
            values = arrays[key].astype(NUMPY_TYPES[BATCH_KEYS[key].dtype], copy=False)
            if key == "energy" and self.sae is not None:
                values = values - reference_energy(arrays, self.sae[fidelity])
            columns[key] = self._label_rows(key, values, indices)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _label_rows(self, key: str, values: np.ndarray, indices: np.ndarray) -> list[object]:
        """Label of each molecule, None where it is NaN."""
        finite = _finite_rows(values)
        if finite.all():
            return list(values)
        infinite = np.isinf(values.reshape(len(values), -1)).any(axis=1)
        if infinite.any():
            where = self.where(int(indices[np.argmax(infinite)]))
            raise DatasetError(f"{where}: {key} is infinite. Repair the file; NaN would mark a missing label.")
        return [row if good else None for row, good in zip(values, finite, strict=True)]


def _finite_rows(values: np.ndarray) -> np.ndarray:
    """(k, ...) -> (k,) bool: all entries of the molecule are finite."""
    return np.isfinite(values).reshape(len(values), -1).all(axis=1)


def _listed(fidelities: Mapping[int, object]) -> str:
    return ", ".join(map(str, sorted(fidelities)))


def _check_fidelities(where: str, fidelities: list[int]) -> None:
    if not fidelities:
        raise ValueError(f"{where}: no datasets. Give at least one, as 0: path.")
    if any(isinstance(f, bool) or not isinstance(f, int) for f in fidelities):
        raise ValueError(f"{where}: fidelities must be integers, found {', '.join(map(repr, fidelities))}.")
    if sorted(fidelities) != list(range(len(fidelities))):
        found = ", ".join(map(str, sorted(fidelities)))
        raise ValueError(f"{where}: fidelities must be 0 to {len(fidelities) - 1}, found {found}. Number them anew.")


def _check_keys(x: Sequence[str], y: Sequence[str]) -> None:
    for name, keys, known in (("data.x", x, INPUT_KEYS), ("data.y", y, LABEL_KEYS)):
        for key in keys:
            if key not in known:
                raise ValueError(f"{name}: unknown key {key!r}; {nearest(str(key), known)}")
    for key in ("coord", "numbers"):
        if key not in x:
            raise ValueError(f"data.x: {key} is missing; the model needs it. Add {key}.")
