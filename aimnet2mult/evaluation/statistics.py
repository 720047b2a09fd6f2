"""Errors summed up as molecules come by, in memory that does not grow with their number.

    MAE = Σ|e| / n        RMSE = √(Σe² / n)        n = number of values that have a label

A value is one energy, one component of one force, one charge. Sums are kept for each number of atoms, each number of
different elements and, for atomic properties, each element; a random sample of the values serves for pictures, and
the molecules with the largest errors are kept.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SAMPLE_VALUES = 20_000
"""Values of a property that are kept for pictures, drawn at random where there are more."""

WORST_MOLECULES = 20
"""Molecules with the largest errors that are kept for each property."""

SIZE_LIMITS = (5, 10, 15, 20, 30, 40, 60, 100, 200)
"""Largest numbers of atoms of the ranges in which errors are reported; the same for all data, to be comparable."""


@dataclass
class Sums:
    """Sums over the errors e of some values.

    Attributes
    ----------
    count : int
        Number of values.
    absolute, squares, largest : float
        Σ|e|, Σe² and max|e|.
    """

    count: int = 0
    absolute: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, errors: np.ndarray) -> None:
        """Add errors, any shape, finite."""
        if errors.size:
            size = np.abs(errors)
            self.include(Sums(errors.size, float(size.sum()), float((size**2).sum()), float(size.max())))

    def include(self, other: "Sums") -> None:
        """Add what was summed elsewhere."""
        self.count += other.count
        self.absolute += other.absolute
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)

    @property
    def mae(self) -> float:
        """Mean absolute error."""
        return self.absolute / self.count

    @property
    def rmse(self) -> float:
        """Root mean square error."""
        return math.sqrt(self.squares / self.count)


def total(groups: Mapping[int, Sums]) -> Sums:
    """Sums over all groups."""
    result = Sums()
    for sums in groups.values():
        result.include(sums)
    return result


def size_ranges(by_size: Mapping[int, Sums]) -> dict[str, Sums]:
    """Sums of ranges of the number of atoms, ``"1–5"``, ``"6–10"`` ...; those that are empty are left out."""
    ranges: dict[str, Sums] = {}
    for n_atoms in sorted(by_size):
        ranges.setdefault(size_range(n_atoms), Sums()).include(by_size[n_atoms])
    return ranges


def size_range(n_atoms: int) -> str:
    """Name of the range of `SIZE_LIMITS` that a number of atoms belongs to."""
    first = 1
    for last in SIZE_LIMITS:
        if n_atoms <= last:
            return f"{first}–{last}"
        first = last + 1
    return f"{first} or more"


class Sample:
    """A uniform random sample of a stream of pairs (label, prediction).

    Each pair gets a random number, and those with the smallest numbers are kept.

    Parameters
    ----------
    size : int
        Pairs to keep.
    rng : numpy.random.Generator
        Where the random numbers come from.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        self.seen = 0
        self._rng = rng
        self._limit = 1.0
        self._keys = np.empty(0)
        self._pairs = np.empty((2, 0))

    def add(self, label: np.ndarray, predicted: np.ndarray) -> None:
        """Add values (n,)."""
        self.seen += len(label)
        keys = self._rng.random(len(label))
        taken = keys < self._limit
        if not taken.any():
            return
        self._keys = np.concatenate([self._keys, keys[taken]])
        self._pairs = np.concatenate([self._pairs, [label[taken], predicted[taken]]], axis=1)
        if len(self._keys) > self.size:
            kept = np.argpartition(self._keys, self.size)[: self.size]
            self._keys, self._pairs = self._keys[kept], self._pairs[:, kept]
            self._limit = self._keys.max(initial=0.0)

    @property
    def label(self) -> np.ndarray:
        """Labels of the sample, (m,)."""
        return self._pairs[0]

    @property
    def predicted(self) -> np.ndarray:
        """Predictions of the sample, (m,)."""
        return self._pairs[1]


class Molecules(NamedTuple):
    """Molecules of one size.

    Attributes
    ----------
    indices
        (k,) which molecules of the dataset.
    numbers
        (k, N) atomic numbers.
    charge
        (k,) total charges, e.
    """

    indices: np.ndarray
    numbers: np.ndarray
    charge: np.ndarray

    def where(self, mask: np.ndarray) -> "Molecules":
        """Those of a mask (k,)."""
        return Molecules(self.indices[mask], self.numbers[mask], self.charge[mask])


@dataclass(frozen=True)
class Outlier:
    """A molecule with a large error, and the value that is furthest off.

    Attributes
    ----------
    index : int
        Which molecule of the dataset.
    label, predicted : float
        The value; NaN or infinite where the prediction is no number.
    numbers : tuple of int
        Atomic numbers of the molecule.
    charge : float
        Its total charge, e.
    atom : int or None
        Which atom (from 0) the value belongs to; None for a property of the molecule.
    """

    index: int
    label: float
    predicted: float
    numbers: tuple[int, ...]
    charge: float
    atom: int | None

    @property
    def error(self) -> float:
        """Prediction minus label."""
        return self.predicted - self.label


class Worst:
    """The molecules with the largest errors of a stream; of equal ones the first.

    Parameters
    ----------
    size : int
        Molecules to keep.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: list[tuple[float, Outlier]] = []  # with their errors, the largest first

    def add(self, molecules: Molecules, label: np.ndarray, predicted: np.ndarray, atomic: bool) -> None:
        """Add molecules of one size.

        Parameters
        ----------
        molecules : Molecules
            The molecules.
        label, predicted : ndarray
            (k, m) all values of each molecule, those of an atom one after the other.
        atomic : bool
            The values belong to atoms.
        """
        errors = np.abs(predicted - label)
        errors[~np.isfinite(errors)] = np.inf
        place = errors.argmax(axis=1)
        size = errors[np.arange(len(errors)), place]
        least = self._kept[-1][0] if len(self._kept) == self.size else -1.0
        candidates = np.flatnonzero(size > least)
        # Sorting is stable here and below, so that the order in which equal ones came decides.
        for i in candidates[np.argsort(-size[candidates], kind="stable")][: self.size].tolist():
            at = int(place[i])
            numbers = tuple(molecules.numbers[i].tolist())
            atom = at // (label.shape[1] // len(numbers)) if atomic else None
            values = float(label[i, at]), float(predicted[i, at])
            outlier = Outlier(int(molecules.indices[i]), *values, numbers, float(molecules.charge[i]), atom)
            self._kept.append((float(size[i]), outlier))
        self._kept = sorted(self._kept, key=lambda entry: -entry[0])[: self.size]

    def sorted(self) -> list[Outlier]:
        """Return them, the largest error first."""
        return [outlier for _, outlier in self._kept]


class PropertyErrors:
    """Errors of one property over a dataset.

    Parameters
    ----------
    atomic : bool
        One value (or vector) per atom; else per molecule.
    rng : numpy.random.Generator
        For the sample.

    Attributes
    ----------
    molecules : int
        Molecules that have the label.
    not_finite : int
        Those among them whose prediction is NaN or infinite; they are in no sum and lead the worst ones.
    by_size, by_n_elements, by_element : dict of int to Sums
        Number of atoms, number of different elements, and (atomic properties) atomic number -> sums.
    sample : Sample
        Labels and predictions for pictures.
    worst : Worst
        Molecules with the largest errors.
    """

    def __init__(self, atomic: bool, rng: np.random.Generator) -> None:
        self.atomic = atomic
        self.molecules = 0
        self.not_finite = 0
        self.by_size: dict[int, Sums] = defaultdict(Sums)
        self.by_n_elements: dict[int, Sums] = defaultdict(Sums)
        self.by_element: dict[int, Sums] = defaultdict(Sums)
        self.sample = Sample(SAMPLE_VALUES, rng)
        self.worst = Worst(WORST_MOLECULES)

    def add(self, molecules: Molecules, label: np.ndarray, predicted: np.ndarray) -> None:
        """Add molecules of one size; those with NaN in their label lack it and are left out.

        Parameters
        ----------
        molecules : Molecules
            The molecules.
        label, predicted : ndarray
            (k, ...) or, for an atomic property, (k, N, ...).
        """
        label = label.reshape(len(label), -1).astype(np.float64)
        known = ~np.isnan(label).any(axis=1)
        if not known.any():
            return
        molecules, label = molecules.where(known), label[known]
        predicted = predicted.reshape(len(predicted), -1)[known].astype(np.float64)
        self.molecules += len(label)
        self.worst.add(molecules, label, predicted, self.atomic)
        finite = np.isfinite(predicted).all(axis=1)
        if not finite.all():
            self.not_finite += int(np.count_nonzero(~finite))
            molecules, label, predicted = molecules.where(finite), label[finite], predicted[finite]
        if not len(label):
            return
        errors, numbers = predicted - label, molecules.numbers
        self.by_size[numbers.shape[1]].add(errors)
        _add_by(self.by_n_elements, count_elements(numbers), errors)
        if self.atomic:
            _add_by(self.by_element, numbers.ravel(), errors.reshape(numbers.size, -1))
        self.sample.add(label.ravel(), predicted.ravel())

    @property
    def total(self) -> Sums:
        """Sums over all molecules."""
        return total(self.by_size)


def _add_by(groups: dict[int, Sums], keys: np.ndarray, errors: np.ndarray) -> None:
    """Add errors (n, m) to the sums of the groups that their rows belong to, keys (n,)."""
    for key in np.unique(keys).tolist():
        groups[key].add(errors[keys == key])


def count_elements(numbers: np.ndarray) -> np.ndarray:
    """Count the different elements of molecules: (k, N) -> (k,)."""
    ordered = np.sort(numbers, axis=1)
    return 1 + np.count_nonzero(np.diff(ordered, axis=1), axis=1)
