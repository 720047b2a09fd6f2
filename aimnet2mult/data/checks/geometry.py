"""Geometries compared at scale: numbers that do not change when a molecule is moved, turned or its atoms reordered.

Comparing every geometry with every other one is out of the question, so each molecule is boiled down to 20 bytes
(`Fingerprints`): a hash of its composition, charge and multiplicity, and three averages over its interatomic
distances. Molecules whose fingerprints agree are candidates (`neighbour_pairs`); whether they are the same geometry is
then decided by their distances themselves (`distance_mismatch`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from aimnet2mult.constants import MAX_ATOMIC_NUMBER

_RNG = np.random.default_rng(20240229)  # fixed: fingerprints of different files are compared

_ELEMENT_HASH = _RNG.integers(1, 2**63, MAX_ATOMIC_NUMBER + 1, dtype=np.uint64)
"""A random number for each element, so that sums over atoms tell compositions apart."""

_ELEMENT_WEIGHT = np.sqrt(_RNG.uniform(0.1, 1.0, (2, MAX_ATOMIC_NUMBER + 1))).astype(np.float32)
"""Weights of the elements in the second and third average of `geometry_averages`."""

PAIRS_PER_BLOCK = 2_000_000
"""Interatomic distances that are computed at a time; sets the memory of a piece of molecules."""

MOLECULES_PER_BLOCK = 500_000
"""Molecules whose fingerprints are compared at a time."""

SEPARATE_TYPES = 1e4
"""Å; added to distances once per type of atom pair, so that sorting keeps the types apart."""


class Fingerprints(NamedTuple):
    """What is kept of each molecule to find equal and similar geometries.

    Attributes
    ----------
    keys : numpy.ndarray
        (n,) uint64, hash of composition, charge and multiplicity.
    averages : numpy.ndarray
        (n, 3) float32, `geometry_averages`, Å.
    """

    keys: np.ndarray
    averages: np.ndarray


def rows_per_block(n_atoms: int) -> int:
    """Molecules of ``n_atoms`` atoms whose distances fit into `PAIRS_PER_BLOCK`."""
    return max(1, PAIRS_PER_BLOCK // max(1, n_atoms * (n_atoms - 1) // 2))


def pair_distances(coord: np.ndarray) -> np.ndarray:
    """Distances of all pairs i < j, in the order of ``numpy.triu_indices``.

    Parameters
    ----------
    coord : numpy.ndarray
        (k, N, 3), Å.

    Returns
    -------
    numpy.ndarray
        (N (N - 1) / 2, k) float32, Å: molecules last, so that each step works on long rows.
    """
    centred = coord - coord.mean(axis=1, keepdims=True, dtype=np.float64)
    x, y, z = np.ascontiguousarray(centred.transpose(2, 1, 0), np.float32)  # (N, k) each
    i, j = np.triu_indices(coord.shape[1], 1)
    squared = (x[i] - x[j]) ** 2
    squared += (y[i] - y[j]) ** 2
    squared += (z[i] - z[j]) ** 2
    return np.asarray(np.sqrt(squared, out=squared))


def molecule_keys(numbers: np.ndarray, charge: np.ndarray, mult: np.ndarray) -> np.ndarray:
    """Hashes that are equal for molecules of the same composition, charge and multiplicity.

    Parameters
    ----------
    numbers : numpy.ndarray
        (k, N) int, in any order. What is not an atomic number counts as padding.
    charge, mult : numpy.ndarray
        (k,), rounded to thousandths; NaN counts as 0, and what is beyond a million as a million.

    Returns
    -------
    numpy.ndarray
        (k,) uint64.
    """
    keys = _ELEMENT_HASH[_known(numbers)].sum(axis=1, dtype=np.uint64)
    for values in (charge, mult):
        # NaN, infinite and huge values are findings of the checks of rows; here they must only fit into an integer.
        thousandths = np.rint(1e3 * np.clip(np.nan_to_num(np.asarray(values, np.float64)), -1e6, 1e6))
        keys = _mixed(keys ^ thousandths.astype(np.int64).astype(np.uint64))
    return keys


def _known(numbers: np.ndarray) -> np.ndarray:
    """Atomic numbers, 0 for what is none."""
    return np.where((numbers >= 0) & (numbers <= MAX_ATOMIC_NUMBER), numbers, 0)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Finalizer of splitmix64 (doi:10.1145/2714064.2660195): each bit of the result depends on all of ``keys``."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(keys ^ (keys >> np.uint64(31)))


def geometry_averages(numbers: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Three averages over atom pairs: of d, of w_i w_j d, and of v_i v_j / (1 + d), with weights by element.

    If no distance changes by more than δ, none of the averages does.

    Parameters
    ----------
    numbers : numpy.ndarray
        (k, N) int.
    distances : numpy.ndarray
        (P, k), `pair_distances`, Å.

    Returns
    -------
    numpy.ndarray
        (k, 3) float32. A single atom has zeros.
    """
    averages = np.zeros((len(numbers), 3), np.float32)
    if not len(distances):
        return averages
    i, j = np.triu_indices(numbers.shape[1], 1)
    w, v = _ELEMENT_WEIGHT[:, _known(numbers).T]  # (N, k) each
    averages[:, 0] = distances.mean(axis=0)
    averages[:, 1] = (w[i] * w[j] * distances).mean(axis=0)
    averages[:, 2] = (v[i] * v[j] / (1.0 + distances)).mean(axis=0)
    return averages


def neighbour_pairs(
    prints: Fingerprints, order: np.ndarray, window: float, max_neighbours: int
) -> Iterator[np.ndarray]:
    """Find pairs of molecules of the same key whose averages all agree within ``window``.

    Parameters
    ----------
    prints : Fingerprints
        Of n molecules. Averages that are not finite match nothing.
    order : numpy.ndarray
        Molecules in the order of `sorting`, or some of them; each is compared with the ones that follow.
    window : float
        Largest difference of each average.
    max_neighbours : int
        How many of those that follow a molecule within the window of the first average are looked at.

    Yields
    ------
    numpy.ndarray
        (m, 2) int64, indices of molecules; those of `MOLECULES_PER_BLOCK` molecules at a time.
    """
    for first in range(0, len(order), MOLECULES_PER_BLOCK):
        block = order[first : first + MOLECULES_PER_BLOCK + max_neighbours]
        keys, averages = prints.keys[block], prints.averages[block]
        active = np.arange(min(MOLECULES_PER_BLOCK, len(block)))
        for shift in range(1, max_neighbours + 1):
            active = active[active < len(block) - shift]
            after = active + shift
            # The last term is false for NaN.
            near = (keys[active] == keys[after]) & (averages[after, 0] - averages[active, 0] <= window)
            active, after = active[near], after[near]
            if not len(active):
                break
            alike = (np.abs(averages[active, 1:] - averages[after, 1:]) <= window).all(axis=1)
            yield np.stack([block[active[alike]], block[after[alike]]], axis=1)


def sorting(prints: Fingerprints) -> np.ndarray:
    """Order of molecules by key, then first average, (n,) int64."""
    return np.lexsort((prints.averages[:, 0], prints.keys))


def distance_mismatch(
    numbers_a: np.ndarray, coord_a: np.ndarray, numbers_b: np.ndarray, coord_b: np.ndarray
) -> np.ndarray:
    """Largest difference between the sorted distances of two molecules, for each pair of elements by itself.

    Zero for the same geometry, however it is moved, turned, mirrored or its atoms are numbered.

    Parameters
    ----------
    numbers_a, numbers_b : numpy.ndarray
        (k, N) int.
    coord_a, coord_b : numpy.ndarray
        (k, N, 3), Å.

    Returns
    -------
    numpy.ndarray
        (k,), Å; infinite where the compositions differ.
    """
    mismatch = np.empty(len(numbers_a))
    step = rows_per_block(numbers_a.shape[1])
    for first in range(0, len(numbers_a), step):
        block = slice(first, first + step)
        sorted_a = _sorted_distances(numbers_a[block], coord_a[block])
        sorted_b = _sorted_distances(numbers_b[block], coord_b[block])
        mismatch[block] = np.abs(sorted_a - sorted_b).max(axis=0, initial=0.0)
    same = (np.sort(numbers_a, axis=1) == np.sort(numbers_b, axis=1)).all(axis=1)
    return np.where(same, mismatch, np.inf)


def _sorted_distances(numbers: np.ndarray, coord: np.ndarray) -> np.ndarray:
    """Distances (P, k) float64 sorted within each type of atom pair, the types `SEPARATE_TYPES` apart, Å."""
    i, j = np.triu_indices(numbers.shape[1], 1)
    low, high = np.minimum(numbers[:, i], numbers[:, j]), np.maximum(numbers[:, i], numbers[:, j])
    types = (low.astype(np.float64) * (MAX_ATOMIC_NUMBER + 1) + high).T
    return np.sort(pair_distances(coord) + SEPARATE_TYPES * types, axis=0)


def may_be_equal(
    numbers_a: np.ndarray, coord_a: np.ndarray, numbers_b: np.ndarray, coord_b: np.ndarray, tolerance: float
) -> np.ndarray:
    """Whether `distance_mismatch` can be within ``tolerance``, from N distances to the centre instead of all N².

    With r_i² = mean_j d_ij² - ½ mean_jk d_jk², no r_i² changes by more than 3 δ max(d) + 1.5 δ² where no distance
    changes by more than δ, and max(d) is at most 2 max(r).

    Parameters
    ----------
    numbers_a, numbers_b, coord_a, coord_b
        As in `distance_mismatch`.
    tolerance : float
        δ, Å.

    Returns
    -------
    numpy.ndarray
        (k,) bool.
    """
    delta = tolerance + 1e-5  # coordinates are in single precision
    sorted_a, largest_a = _sorted_squared_radii(numbers_a, coord_a)
    sorted_b, largest_b = _sorted_squared_radii(numbers_b, coord_b)
    bound = 6.0 * delta * np.sqrt(np.maximum(largest_a, largest_b)) + 1.5 * delta**2
    return np.asarray(np.abs(sorted_a - sorted_b).max(axis=1) <= bound)


def _sorted_squared_radii(numbers: np.ndarray, coord: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances to the centre (k, N) float64 sorted within each element, and the largest (k,), Å²."""
    squared = ((coord - coord.mean(axis=1, keepdims=True, dtype=np.float64)) ** 2).sum(axis=2)
    order = np.lexsort((squared, numbers), axis=1)
    return np.take_along_axis(squared, order, axis=1), squared.max(axis=1)


_LATTICE_SUMS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])


def cell_mismatch(cell_a: np.ndarray, cell_b: np.ndarray) -> np.ndarray:
    """Largest difference between the lengths of a, b, c, a + b, b + c and c + a of two cells (k, 3, 3): (k,), Å.

    Zero for the same cell, however it is turned. Cells of zeros are those of molecules that are not periodic.
    """
    lengths_a, lengths_b = (np.linalg.norm(_LATTICE_SUMS @ cell, axis=2) for cell in (cell_a, cell_b))
    return np.asarray(np.abs(lengths_a - lengths_b).max(axis=1))


def largest_gap(coord: np.ndarray) -> np.ndarray:
    """Widest gap that has to be bridged to connect all atoms of a molecule (longest edge of its spanning tree).

    Parameters
    ----------
    coord : numpy.ndarray
        (k, N, 3), Å.

    Returns
    -------
    numpy.ndarray
        (k,), Å.
    """
    x = np.asarray(coord, np.float64)
    rows, gap = np.arange(len(x)), np.zeros(len(x))
    to_tree = np.linalg.norm(x - x[:, :1], axis=-1)  # (k, N), distance of each atom to those connected so far
    outside = np.ones(to_tree.shape, bool)
    outside[:, 0] = False
    for _ in range(x.shape[1] - 1):
        nearest = np.where(outside, to_tree, np.inf).argmin(axis=1)
        gap = np.maximum(gap, to_tree[rows, nearest])
        outside[rows, nearest] = False
        to_tree = np.minimum(to_tree, np.linalg.norm(x - x[rows, nearest][:, None], axis=-1))
    return gap


def nearest_distances(coord: np.ndarray) -> np.ndarray:
    """Distance of each atom to the nearest other one, (k, N), Å; infinite for a single atom."""
    n_atoms = coord.shape[1]
    i, j = np.triu_indices(n_atoms, 1)
    square = np.full((n_atoms, n_atoms, len(coord)), np.inf, np.float32)
    square[i, j] = square[j, i] = pair_distances(coord)
    return square.min(axis=0).T


def superpose(coord: np.ndarray, onto: np.ndarray, periodic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move and turn molecules onto others so that the atoms' displacements are smallest (Kabsch).

    Parameters
    ----------
    coord, onto : numpy.ndarray
        (k, N, 3), Å, atoms in the same order.
    periodic : numpy.ndarray
        (k,) bool, those that must not be turned, since their cell does not turn along.

    Returns
    -------
    moved : numpy.ndarray
        (k, N, 3) float64, ``coord`` superposed on ``onto``, Å.
    rotations : numpy.ndarray
        (k, 3, 3), proper; ``vectors @ rotations`` turns row vectors, such as forces, along.

    Notes
    -----
    doi:10.1107/S0567739476001873
    """
    target = onto.mean(axis=1, keepdims=True, dtype=np.float64)
    a = coord - coord.mean(axis=1, keepdims=True, dtype=np.float64)
    u, _, vt = np.linalg.svd(a.transpose(0, 2, 1) @ (onto - target))
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    rotations = np.where(periodic[:, None, None], np.eye(3), u @ vt)
    return a @ rotations + target, rotations
