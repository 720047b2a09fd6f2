"""Geometries that two levels of theory have in common, and the difference of their labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.study.subsets import arrays_of

SAME = 1e-3
"""Å; structures whose coordinates differ by no more than this are the same geometry."""

DIFFERENCES = ("energy", "forces")
"""Labels whose difference is learned."""

BLOCK = 2**22
"""Coordinates that are compared at a time."""


def difference_data(
    target: MoleculeSource, indices: np.ndarray, low: MoleculeSource
) -> tuple[dict[int, dict[str, np.ndarray]], np.ndarray]:
    """Return the structures of the target that another level has too, with the difference of the labels.

    The same are structures with the same atoms in the same order, charge and multiplicity, and coordinates that
    differ by at most `SAME`; a copy that was moved or turned is not found.

    Parameters
    ----------
    target : MoleculeSource
        The level that is the better one.
    indices : numpy.ndarray
        (k,) int, its structures to look at.
    low : MoleculeSource
        The other level.

    Returns
    -------
    groups : dict of int to dict of str to numpy.ndarray
        As `aimnet2mult.data.sgdataset.write_dataset` takes them. ``energy`` (eV) and ``forces`` (eV/Å) are those of the
        target minus those of the other level, forces NaN where one of the two lacks them.
    found : numpy.ndarray
        (m,) int64, which structures of the target they are.
    """
    sizes = np.unique(target.n_atoms[indices])
    candidates = np.flatnonzero(np.isin(low.n_atoms, sizes))
    groups: dict[int, dict[str, np.ndarray]] = {}
    found = [np.zeros(0, np.int64)]
    for n_atoms in sizes.tolist():
        mine, others = indices[target.n_atoms[indices] == n_atoms], candidates[low.n_atoms[candidates] == n_atoms]
        if not len(others):
            continue
        a, b = (arrays_of(*part)[n_atoms] for part in ((target, mine), (low, others)))
        pairs = _equal(_comparable(a), a["coord"], _comparable(b), b["coord"])
        if len(pairs):
            groups[n_atoms] = _difference(a, b, pairs)
            found.append(np.sort(mine)[pairs[:, 0]])
    return groups, np.concatenate(found)


def _comparable(arrays: Mapping[str, Any]) -> np.ndarray:
    """Atoms, charge and multiplicity as one row per structure, (n, N + 2) int64."""
    n = len(arrays["numbers"])
    state = np.stack([arrays["charge"], arrays.get("mult", np.ones(n))], axis=1)
    return np.concatenate([arrays["numbers"], np.round(state)], axis=1).astype(np.int64)


def _equal(atoms_a: np.ndarray, coord_a: np.ndarray, atoms_b: np.ndarray, coord_b: np.ndarray) -> np.ndarray:
    """Pairs (m, 2) of equal structures, each of the first set at most once, with the nearest of the second."""
    _, label = np.unique(np.concatenate([atoms_a, atoms_b]), axis=0, return_inverse=True)
    label = label.reshape(-1)
    label_a, label_b = label[: len(atoms_a)], label[len(atoms_a) :]
    pairs = []
    for kind in np.intersect1d(label_a, label_b):
        rows_a, rows_b = np.flatnonzero(label_a == kind), np.flatnonzero(label_b == kind)
        step = max(1, BLOCK // coord_b[rows_b].size)
        for first in range(0, len(rows_a), step):
            part = rows_a[first : first + step]
            distance = np.abs(coord_a[part, None] - coord_b[None, rows_b]).max(axis=(2, 3))
            nearest = distance.argmin(axis=1)
            same = distance[np.arange(len(part)), nearest] <= SAME
            pairs.append(np.stack([part[same], rows_b[nearest[same]]], axis=1))
    joined = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    return joined[np.argsort(joined[:, 0], kind="stable")]


def _difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], pairs: np.ndarray) -> dict[str, np.ndarray]:
    """Structures of the first set with the labels that differ from those of the second."""
    first, second = pairs.T
    arrays = {key: a[key][first] for key in ("coord", "numbers", "charge", "mult", "cell") if key in a}
    for key in DIFFERENCES:
        if key in a and key in b:
            difference = a[key][first].astype(np.float64) - b[key][second].astype(np.float64)
            arrays[key] = difference if key == "energy" else difference.astype(np.float32)
    return arrays
