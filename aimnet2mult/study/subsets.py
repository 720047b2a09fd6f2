"""The target's molecules: those that validate, and nested subsets of the others.

Structures of one molecule stay together. A molecule is what has the same ``mol_id``, where the files have this array,
else the same composition, charge and multiplicity. Compositions that validate are in no subset.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aimnet2mult.constants import MAX_ATOMIC_NUMBER, element_names
from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.sgdataset import DatasetError, write_dataset
from aimnet2mult.data.splits import composition_hashes, key_hashes

MOLECULE_KEY = "mol_id"
"""Array of the files that says which molecule a structure is of."""

BLANKS = {"mult": 1.0, "cell": 0.0}
"""What stands for an array that some of the files lack; labels are NaN."""

INDEPENDENT = (0.3, 0.03, 1e-6)
"""A molecule is independent of others if so much of its factors, relatively, is not in their span; the largest limit
that leaves enough molecules counts, so that they determine reference energies well."""

COMPOSITION_SEED = 0
"""Seed of the hashes by which compositions are told apart."""


def molecules(source: MoleculeSource) -> np.ndarray:
    """Return a number for the molecule of each structure, (n,) int64 from 0, in the order of first appearance.

    Raises
    ------
    ValueError
        Some structures have no ``mol_id`` and others do, or it is not an integer or a string for each.
    """
    if MOLECULE_KEY in source.keys:
        hashes, _ = key_hashes(source, MOLECULE_KEY, COMPOSITION_SEED)
        identity = hashes[:, None]
    else:
        charge, mult = _state(source)
        states = (charge.astype(np.int64) * 1000 + mult.astype(np.int64)).view(np.uint64)
        identity = np.stack([composition_hashes(source, COMPOSITION_SEED), states], axis=1)
    return _numbered(identity)


def _state(source: MoleculeSource) -> tuple[np.ndarray, np.ndarray]:
    """Charge and multiplicity of all structures, (n,) each."""
    charge, mult = np.zeros(len(source)), np.ones(len(source))
    for first, arrays in source.chunks(("charge", "mult")):
        rows = slice(first, first + len(arrays["charge"]))
        charge[rows] = np.round(arrays["charge"])
        if "mult" in arrays:
            mult[rows] = np.round(arrays["mult"])
    return charge, mult


def _numbered(identity: np.ndarray) -> np.ndarray:
    """Number equal rows alike, in the order of first appearance: (n, k) -> (n,) int64."""
    _, first, inverse = np.unique(identity, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return np.asarray(rank[inverse.reshape(-1)])


def reference_factors(source: MoleculeSource) -> np.ndarray:
    """What reference energies multiply: atoms of each element, total charge, unpaired electrons, (n, 121) int64."""
    charge, mult = _state(source)
    return np.column_stack([composition_table(source), charge, mult - 1.0]).astype(np.int64)


def composition_table(source: MoleculeSource) -> np.ndarray:
    """Count the atoms of each element in each structure, (n, 119) int32."""
    table = np.zeros((len(source), MAX_ATOMIC_NUMBER + 1), np.int32)
    for first, arrays in source.chunks(("numbers",)):
        rows = np.arange(first, first + len(arrays["numbers"]))
        np.add.at(table, (rows[:, None], arrays["numbers"]), 1)
    return table


def validation_structures(source: MoleculeSource, fraction: float, seed: int) -> np.ndarray:
    """Choose the structures that validate, whole compositions of them.

    A composition validates if its hash with the seed, in [0, 1), is below ``fraction``. If an element would then be
    in no other composition, the one with this element and the largest hash does not validate.

    Parameters
    ----------
    source : MoleculeSource
        All structures of the target.
    fraction : float
        About what share of the compositions validates.
    seed : int
        Seed of the choice.

    Returns
    -------
    numpy.ndarray
        (n,) bool.

    Raises
    ------
    ValueError
        No structure or all of them would validate.
    """
    hashes = composition_hashes(source, seed)
    validates = hashes < np.uint64(int(fraction * 2.0**64))
    elements = composition_table(source) > 0
    for z in np.flatnonzero(elements.any(axis=0)):
        having = elements[:, z]
        if not (having & ~validates).any():
            validates &= hashes != hashes[having].max()
    if not validates.any() or validates.all():
        side = "training" if validates.all() else "validation"
        raise ValueError(
            f"validation.fraction: with {fraction} and seed {seed}, none of the {len(np.unique(hashes))} compositions "
            f"of {source.name} is left for {side}; give another fraction or seed"
        )
    return validates


def molecule_order(molecule: np.ndarray, factors: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """Put molecules into the order in which subsets take them: those that tell elements apart first, then at random.

    Parameters
    ----------
    molecule : numpy.ndarray
        (n,) int, molecule of each structure, 0 to m - 1.
    factors : numpy.ndarray
        (n, k) int, `reference_factors` of each structure.
    seed : int
        Seed of the order.

    Returns
    -------
    order : numpy.ndarray
        (m,) int64, a permutation of the molecules.
    least : int
        How many of its first molecules have all elements together and determine the reference energies, with terms in
        charge and spin, as far as all molecules do: the rank of the factors.
    """
    order = np.random.default_rng(seed).permutation(int(molecule.max()) + 1)
    _, first = np.unique(molecule, return_index=True)
    chosen = _independent(factors[first][order])
    return np.concatenate([order[chosen], np.delete(order, chosen)]), len(chosen)


def _independent(factors: np.ndarray) -> np.ndarray:
    """Rows of (m, k) factors that span all of them: the first ones in order, but for those nearly dependent."""
    unit = factors / np.linalg.norm(factors, axis=1, keepdims=True)
    rank = np.linalg.matrix_rank(unit)
    left = unit.copy()  # what is not in the span of the rows that have been chosen
    chosen: list[int] = []
    for limit in INDEPENDENT:
        while len(chosen) < rank:
            norms = np.linalg.norm(left, axis=1)
            row = int(np.argmax(norms > limit))
            if norms[row] <= limit:
                break
            chosen.append(row)
            left -= np.outer(left @ left[row], left[row]) / norms[row] ** 2
    return np.array(chosen, np.int64)


def nested_subsets(
    molecule: np.ndarray, factors: np.ndarray, fractions: Sequence[float], seed: int
) -> dict[float, np.ndarray]:
    """Choose subsets of the structures, each within the next.

    Parameters
    ----------
    molecule, factors : numpy.ndarray
        As in `molecule_order`.
    fractions : sequence of float
        Shares of the molecules, each in (0, 1].
    seed : int
        Seed of the order.

    Returns
    -------
    dict of float to numpy.ndarray
        Fraction -> structures, (n,) bool. A subset has at least as many molecules as are needed for
        all elements and their reference energies.
    """
    order, least = molecule_order(molecule, factors, seed)
    sizes = {fraction: max(least, round(fraction * len(order)), 1) for fraction in fractions}
    return {fraction: np.isin(molecule, order[:size]) for fraction, size in sizes.items()}


def arrays_of(source: MoleculeSource, indices: np.ndarray) -> dict[int, dict[str, np.ndarray]]:
    """Read structures as `aimnet2mult.data.sgdataset.write_dataset` takes them: number of atoms -> arrays.

    Labels that some of the files lack are NaN for their structures.

    Raises
    ------
    DatasetError
        An array that is no number is in some of the files only.
    """
    pieces: dict[int, list[dict[str, np.ndarray]]] = {}
    for _, arrays in source.read(np.sort(indices), sorted(source.keys)):
        pieces.setdefault(arrays["numbers"].shape[1], []).append(arrays)
    return {n_atoms: _joined(parts, source) for n_atoms, parts in sorted(pieces.items())}


def _joined(parts: Sequence[Mapping[str, np.ndarray]], source: MoleculeSource) -> dict[str, np.ndarray]:
    examples = {key: values for part in parts for key, values in part.items()}
    joined = {}
    for key, example in examples.items():
        if example.dtype.kind != "f" and any(key not in part for part in parts):
            raise DatasetError(f"{source.name}: {key} is in some of the files only. Give it to all, or to none.")
        shape, blank = example.shape[1:], BLANKS.get(key, np.nan)
        joined[key] = np.concatenate(
            [part[key] if key in part else np.full((len(part["numbers"]), *shape), blank) for part in parts]
        )
    return joined


def write_structures(path: Path, source: MoleculeSource, indices: np.ndarray) -> None:
    """Write some structures of a dataset, (k,) int, as a dataset of its own in the units of the package."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(path, arrays_of(source, indices))


def missing_elements(known: Sequence[int], needed: Sequence[int]) -> str:
    """Name the elements of ``needed`` that are not among ``known``; empty if there are none."""
    absent = sorted(set(needed) - set(known))
    return element_names(absent) if absent else ""
