"""Pairs of molecules: the same geometry twice, and close geometries, between which forces do work."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.checks import geometry
from aimnet2mult.data.checks.findings import Thresholds
from aimnet2mult.data.checks.geometry import Fingerprints

FORCE_WINDOW = 0.05
"""Å; averages of the distances of two geometries that may be close."""

FORCE_NEIGHBOURS = 4
"""Geometries that each one is compared with to find close ones."""

FORCE_CANDIDATES = 100_000
"""Molecules that are searched for close pairs."""

FORCE_BLOCK = 64
"""Molecules next to one another in the order of their fingerprints, which are searched together."""

FORCE_PAIRS = 1500
"""Pairs of close geometries that are compared, those with the smallest displacements first."""

FORCE_PAIRS_READ = 8000
"""Pairs that are read to find those with small displacements."""

PAIRS_PER_READ = 8192
"""Pairs of molecules that are read at a time."""

ATOMS_PER_READ = 2**18
"""Atoms in them."""

DISPLACEMENTS = (1e-3, 0.15)
"""Å; root mean square displacement per atom of a pair of close geometries. Below, energies change too little."""

SAME_CELL = 1e-4
"""Å; cells that differ by more do work, too, which forces do not tell."""


class ClosePairs(NamedTuple):
    """Pairs of close geometries of the same molecule: indices (m, 2) int64, and (m,) each in eV, eV and eV/Å².

    `aimnet2mult.data.checks.units.force_relation` takes the last three.
    """

    indices: np.ndarray
    work: np.ndarray
    energy_change: np.ndarray
    stiffness: np.ndarray


NO_PAIRS = np.zeros((0, 2), np.int64)


def close_pairs(
    source: MoleculeSource, prints: Fingerprints, indices: np.ndarray | None = None, limit: int = FORCE_PAIRS_READ
) -> ClosePairs:
    """Energy changes and work of the forces between pairs of close geometries of the same molecule.

    Parameters
    ----------
    source : MoleculeSource
        A dataset with forces.
    prints : Fingerprints
        Of all its molecules, or of some of them.
    indices : numpy.ndarray, optional
        (n,) int, which molecules ``prints`` are of; default: all.
    limit : int
        Pairs to read.
    """
    order = evenly(geometry.sorting(prints), FORCE_CANDIDATES, FORCE_BLOCK)
    pairs = np.concatenate([NO_PAIRS, *geometry.neighbour_pairs(prints, order, FORCE_WINDOW, FORCE_NEIGHBOURS)])
    pairs = evenly(pairs if indices is None else indices[pairs], limit)
    found = [(NO_PAIRS, *[np.zeros(0)] * 4)]
    for block in _blocks_of_one_size(pairs, source.n_atoms[pairs[:, 0]]):
        a, b = (_gather([source], np.array([0]), block[:, side], ("forces",)) for side in (0, 1))
        comparable = (a["numbers"] == b["numbers"]).all(axis=1)
        comparable &= np.isfinite(a["forces"]).all(axis=(1, 2)) & np.isfinite(b["forces"]).all(axis=(1, 2))
        comparable &= np.isfinite(a["energy"]) & np.isfinite(b["energy"])
        comparable &= geometry.cell_mismatch(a["cell"], b["cell"]) < SAME_CELL
        if comparable.any():
            found.append((block[comparable], *_steps(_rows(a, comparable), _rows(b, comparable))))
    compared, displacement, *values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    chosen = np.flatnonzero((displacement > DISPLACEMENTS[0]) & (displacement < DISPLACEMENTS[1]))
    chosen = chosen[np.argsort(displacement[chosen], kind="stable")[:FORCE_PAIRS]]
    return ClosePairs(compared[chosen], *(array[chosen] for array in values))


def _steps(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """From geometries ``a`` to ``b``: displacement per atom (Å), work, energy change (eV), stiffness (eV/Å²)."""
    moved, rotations = geometry.superpose(a["coord"], b["coord"], np.abs(a["cell"]).max(axis=(1, 2)) > 0.0)
    step = b["coord"] - moved
    forces = a["forces"] @ rotations
    size = np.sqrt((step**2).sum(axis=(1, 2)))
    work = -0.5 * ((forces + b["forces"]) * step).sum(axis=(1, 2))
    change = np.sqrt(((b["forces"] - forces) ** 2).sum(axis=(1, 2)))
    stiffness = change / np.maximum(size, 1e-12)
    return size / np.sqrt(step.shape[1]), work, b["energy"] - a["energy"], stiffness


def evenly(items: np.ndarray, limit: int, block: int = 1) -> np.ndarray:
    """At most ``limit`` of the items (but one block), in evenly spaced blocks; order is kept."""
    if len(items) <= limit:
        return items
    block = min(block, len(items))
    starts = np.linspace(0, len(items) - block, max(1, limit // block)).astype(np.int64)
    return np.asarray(items[(starts[:, None] + np.arange(block)).ravel()])


def _blocks_of_one_size(pairs: np.ndarray, n_atoms: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs (m, 2) of molecules in blocks of the same number of atoms, few enough to be read at a time."""
    for size in np.unique(n_atoms).tolist():
        of_size = pairs[n_atoms == size]
        step = min(PAIRS_PER_READ, max(1, ATOMS_PER_READ // size))
        for first in range(0, len(of_size), step):
            yield of_size[first : first + step]


def owners_of(starts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Which source holds each of some molecules, by their number among all; shape of ``indices``."""
    return np.asarray(np.searchsorted(starts, indices, side="right") - 1)


def _gather(
    sources: Sequence[MoleculeSource], starts: np.ndarray, indices: np.ndarray, labels: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Read molecules of one size by their number among all sources, ``starts`` (len(sources),) of which is the first.

    Returns ``numbers``, ``coord``, ``energy``, ``cell`` and per-atom labels (k, N, 3) in the order of ``indices``;
    where a source does not have them, cells are zero, and labels NaN.
    """
    owners = owners_of(starts, indices)
    result: dict[str, np.ndarray] = {}
    for owner in np.unique(owners).tolist():
        mine = np.flatnonzero(owners == owner)
        wanted = indices[mine] - starts[owner]
        for positions, arrays in sources[owner].read(wanted, ("numbers", "coord", "energy", "cell", *labels)):
            if not result:
                coord = arrays["coord"]
                result["numbers"] = np.zeros((len(indices), coord.shape[1]), np.int64)
                result["energy"] = np.full(len(indices), np.nan)
                result["cell"] = np.zeros((len(indices), 3, 3))
                for key in ("coord", *labels):
                    result[key] = np.full((len(indices), *coord.shape[1:]), np.nan)
            for key, values in arrays.items():
                result[key][mine[positions]] = values
    return result


def _rows(arrays: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    return {key: values[mask] for key, values in arrays.items()}


class EqualPairs(NamedTuple):
    """Pairs of molecules with the same geometry, charge and multiplicity.

    Attributes
    ----------
    indices : numpy.ndarray
        (m, 2) int64, numbers among the molecules of all datasets, ascending in each row.
    mismatch : numpy.ndarray
        (m,), `aimnet2mult.data.checks.geometry.distance_mismatch`, Å.
    energy_change : numpy.ndarray
        (m,), energy of the second minus that of the first, eV; NaN where one is missing.
    complete : bool
        Whether all candidates have been compared.
    """

    indices: np.ndarray
    mismatch: np.ndarray
    energy_change: np.ndarray
    complete: bool


MAX_NEIGHBOURS = 64
"""Molecules with nearly the same averages of distances that each one is compared with."""

ROUNDING = 2e-6
"""Å; how far averages of the distances of copies, moved or turned and stored as float32, are apart."""

MAX_CANDIDATES = 200_000
"""Pairs of candidates for the same geometry that are read and compared distance by distance."""

DIATOMIC_SHARE = 0.1
"""Of the threshold for duplicates, for two atoms: scans of a single distance are dense, coincidences usual."""


def _candidates(prints: Fingerprints, tolerance: float) -> tuple[np.ndarray, bool]:
    """Pairs (m, 2) that may have the same geometry, ascending in each row, and whether these are all such pairs.

    Dense data (a long trajectory of one molecule) have too many similar geometries to compare all of them; then only
    the more similar ones are; true copies are the most similar of all, neighbours in the order of `sorting`.
    """
    order = geometry.sorting(prints)
    window = tolerance + ROUNDING  # no average differs by more than the distances do
    similar, complete = _limited(prints, order, window)
    everything = complete
    while not everything and window > ROUNDING:
        window = max(0.1 * window, ROUNDING)
        similar, everything = _limited(prints, order, window)
    return np.sort(similar, axis=1), complete


def _limited(prints: Fingerprints, order: np.ndarray, window: float) -> tuple[np.ndarray, bool]:
    """Neighbours (m, 2) up to `MAX_CANDIDATES`, and whether these are all."""
    found, count = [NO_PAIRS], 0
    for pairs in geometry.neighbour_pairs(prints, order, window, MAX_NEIGHBOURS):
        found.append(pairs)
        count += len(pairs)
        if count > MAX_CANDIDATES:
            break
    return evenly(np.concatenate(found), MAX_CANDIDATES), count <= MAX_CANDIDATES


def equal_geometries(
    sources: Sequence[MoleculeSource], starts: np.ndarray, prints: Fingerprints, limits: Thresholds
) -> EqualPairs:
    """Find the molecules of all datasets that have the same geometry.

    Parameters
    ----------
    sources : sequence of MoleculeSource
        The datasets.
    starts : numpy.ndarray
        (len(sources),) int64, number of the first molecule of each among all.
    prints : Fingerprints
        Of all molecules.
    limits : Thresholds
        Its ``duplicate`` says what the same is.
    """
    candidates, complete = _candidates(prints, limits.duplicate)
    n_atoms = np.concatenate([source.n_atoms for source in sources])[candidates[:, 0]]
    found = [(NO_PAIRS, np.zeros(0), np.zeros(0))]
    for block in _blocks_of_one_size(candidates, n_atoms):
        a, b = (_gather(sources, starts, block[:, side]) for side in (0, 1))
        likely = geometry.may_be_equal(a["numbers"], a["coord"], b["numbers"], b["coord"], limits.duplicate)
        likely &= geometry.cell_mismatch(a["cell"], b["cell"]) <= limits.duplicate
        block, a, b = block[likely], _rows(a, likely), _rows(b, likely)
        mismatch = geometry.distance_mismatch(a["numbers"], a["coord"], b["numbers"], b["coord"])
        share = DIATOMIC_SHARE if a["numbers"].shape[1] <= 2 else 1.0
        same = mismatch <= share * limits.duplicate
        found.append((block[same], mismatch[same], (b["energy"] - a["energy"])[same]))
    indices, mismatch, change = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((indices[:, 1], indices[:, 0]))
    return EqualPairs(indices[order], mismatch[order], change[order], complete)
