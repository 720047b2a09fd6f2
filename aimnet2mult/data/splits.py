"""Which molecules are trained on and which validate, and the record of it.

Conformers of one molecule, or the same molecule at several levels of theory, are so alike that a model validated on
some and trained on the others seems better than it is. So molecules can be kept together by composition (the elements
and how many atoms of each) or by a key of the files. Then a group goes where a number says that follows from the seed
and from the group alone: h(seed, group) in [0, 1) validates if it is below the fraction asked for. Such a split is the
same in all fidelities, processes and orders of the files, and stays what it was when data are added.
"""

import hashlib
import json
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.utils.files import atomic_path

logger = logging.getLogger(__name__)

BY_MOLECULE, BY_COMPOSITION = "molecule", "composition"

HASH_ROWS = 16384
"""Molecules whose groups are computed at a time."""

MAX_CHANGES = 100
"""Groups that are moved, or considered at a time, to give every fidelity molecules on both sides."""

SPLIT_FORMAT = 1
"""Version of the file that `save_split` writes."""

DAMAGE = (
    *(LookupError, TypeError, AttributeError, ValueError),  # archives of something else
    *(OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error),  # bytes that have changed
)
"""What reading raises where a file is not, or no longer, one that `save_split` wrote."""


def split_indices(
    dataset: MixedFidelityDataset,
    val_fraction: float,
    seed: int,
    by: str = BY_MOLECULE,
    fidelities: Sequence[int] | None = None,
    names: Mapping[int, str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Divide the molecules into training and validation.

    The split follows from the data and the seed alone, so it is the same in every process and after a restart.

    Parameters
    ----------
    dataset : MixedFidelityDataset
        The molecules.
    val_fraction : float
        Share of validation molecules, 0 to below 1. Above 0, every fidelity that has at least two molecules (or
        groups) has at least one for validation and one for training; a single one is for training.
    seed : int
        Seed of the split.
    by : str
        ``"molecule"``: at random, each fidelity by itself, the number of molecules as exact as can be.
        ``"composition"``: molecules of the same elements in the same numbers (whatever their charge) stay together, in
        all fidelities. Else the name of an array of the files, one integer or string per molecule, such as ``mol_id``
        or ``smiles``: molecules with the same value stay together. Groups are not divided, so that the share of a
        fidelity with few or very uneven ones may differ much from ``val_fraction`` (`validation_counts`).
    fidelities : sequence of int, optional
        Those to divide; default all. The molecules of the others are for training, whatever their group.
    names : mapping of int to str, optional
        Names of the fidelities for messages; default "fidelity 0", "fidelity 1" ...

    Returns
    -------
    train, val : numpy.ndarray
        Ascending indices of molecules, int64.

    Raises
    ------
    ValueError
        ``val_fraction`` is out of range, or files lack the array ``by``, or it holds neither integers nor strings.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"data.val_fraction: {val_fraction} is not a share from 0 to below 1, such as 0.1.")
    divided = sorted(range(dataset.num_fidelities) if fidelities is None else fidelities)
    validates = np.zeros(len(dataset), bool)
    if val_fraction > 0.0 and by == BY_MOLECULE:
        for f in divided:
            validates[dataset.fidelities == f] = _random_choice(dataset, f, val_fraction, seed)
    elif val_fraction > 0.0:
        names = {f: (names or {}).get(f, f"fidelity {f}") for f in divided}
        groups = _groups_by_fidelity(dataset, by, seed, names)
        for f, chosen in _chosen_groups(groups, val_fraction, names, by).items():
            validates[dataset.fidelities == f] = chosen
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def validation_counts(dataset: MixedFidelityDataset, val: np.ndarray) -> dict[int, tuple[int, int]]:
    """Count for each fidelity the validation molecules and all molecules."""
    held_out = np.bincount(dataset.fidelities[val], minlength=dataset.num_fidelities)
    return {f: (int(held_out[f]), len(source)) for f, source in dataset.datasets.items()}


def _random_choice(dataset: MixedFidelityDataset, fidelity: int, val_fraction: float, seed: int) -> np.ndarray:
    """Validation molecules of a fidelity, (n,) bool, chosen at random."""
    n_molecules = int(np.count_nonzero(dataset.fidelities == fidelity))
    n_val = min(max(round(val_fraction * n_molecules), 1), n_molecules - 1)
    chosen = np.zeros(n_molecules, bool)
    chosen[np.random.default_rng([seed, fidelity]).permutation(n_molecules)[:n_val]] = True
    return chosen


# --------------------------------------------------------------------------------------------------
# groups of molecules that stay together
# --------------------------------------------------------------------------------------------------


def mix64(values: np.ndarray) -> np.ndarray:
    """Scatter 64-bit numbers over all 64-bit numbers, one to one (the last steps of the generator splitmix64).

    Steele, Lea and Flood, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195. Unlike numpy's generators, whose
    streams may change from one version to the next, it gives the same numbers for ever.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hashed(values: np.ndarray, seed: int) -> np.ndarray:
    """Hash integers with a seed: (n,) int -> (n,) uint64."""
    start = mix64(np.full(1, seed + 1, np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return mix64(mix64(values.astype(np.uint64)) + start)


def composition_hashes(source: MoleculeSource, seed: int) -> np.ndarray:
    """Hash the compositions of all molecules: equal for equal numbers of all elements, (n,) uint64."""
    element = _hashed(np.arange(MAX_ATOMIC_NUMBER + 1), seed)  # a random number for each element; a sum has no order
    hashes = np.empty(len(source), np.uint64)
    for first, arrays in source.chunks(("numbers",), HASH_ROWS):
        numbers = arrays["numbers"]
        hashes[first : first + len(numbers)] = mix64(element[numbers].sum(axis=1, dtype=np.uint64))
    return hashes


def key_hashes(source: MoleculeSource, key: str, seed: int) -> tuple[np.ndarray, str]:
    """Hash an array with one value per molecule: equal for equal values.

    Returns
    -------
    hashes : numpy.ndarray
        (n,) uint64.
    kind : str
        What the values are, ``"integers"`` or ``"strings"``.

    Raises
    ------
    ValueError
        Some molecules lack the array, or it does not hold one integer or string for each.
    """
    hashes = np.empty(len(source), np.uint64)
    kinds: set[str] = set()
    for first, arrays in source.chunks((key,), HASH_ROWS):
        where = source.where(first)
        if key not in arrays:
            raise ValueError(f"{where}: no array {key}. All groups need it to be split by.")
        values = arrays[key]
        kind = _kind(values)
        if not kind:
            raise ValueError(
                f"{where}: {key} holds {values.dtype} values in an array of shape {values.shape}; to split by it, it "
                "must hold one integer or string per molecule."
            )
        kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError(f"{where}: {key} holds {kind}, unlike groups before it. Make all of them one kind.")
        rows = slice(first, first + len(values))
        hashes[rows] = _hashed(values, seed) if kind == "integers" else _text_hashes(values, seed)
    return hashes, kinds.pop()


def _kind(values: np.ndarray) -> str:
    """Return "integers" or "strings" where an array holds one of them per molecule, else an empty word."""
    if values.ndim != 1:
        return ""
    if values.dtype.kind == "O":
        return "strings" if all(isinstance(value, str | bytes) for value in values.tolist()) else ""
    return {"i": "integers", "u": "integers", "S": "strings", "U": "strings"}.get(values.dtype.kind, "")


def _text_hashes(values: np.ndarray, seed: int) -> np.ndarray:
    """Hash strings, whether they come as text or as UTF-8."""
    salt = seed.to_bytes(8, "little")
    encoded = (value if isinstance(value, bytes) else str(value).encode() for value in values.tolist())
    digests = (hashlib.blake2b(text, digest_size=8, key=salt).digest() for text in encoded)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _groups_by_fidelity(
    dataset: MixedFidelityDataset, by: str, seed: int, names: Mapping[int, str]
) -> dict[int, np.ndarray]:
    """Group of each molecule of the fidelities, (n,) uint64."""
    if by == BY_COMPOSITION:
        return {f: composition_hashes(dataset.datasets[f], seed) for f in names}
    for f, name in names.items():
        if by not in dataset.datasets[f].keys:
            arrays = ", ".join(sorted(dataset.datasets[f].keys))
            raise ValueError(
                f"data.val_split_by: no array {by} in the files of {name} ({dataset.datasets[f].name}); "
                f"they have {arrays}. Name one of these, or {BY_MOLECULE} or {BY_COMPOSITION}."
            )
    hashed = {f: key_hashes(dataset.datasets[f], by, seed) for f in names}
    if len({kind for _, kind in hashed.values()}) > 1:
        found = ", ".join(f"{kind} for {names[f]}" for f, (_, kind) in hashed.items())
        raise ValueError(f"data.val_split_by: {by} holds {found}. Make all of them one kind.")
    return {f: hashes for f, (hashes, _) in hashed.items()}


def _chosen_groups(
    groups: Mapping[int, np.ndarray], val_fraction: float, names: Mapping[int, str], by: str
) -> dict[int, np.ndarray]:
    """Molecules of each fidelity whose group validates, (n,) bool.

    Groups change sides, in all fidelities, until each fidelity has both sides, or training alone if it has one group.
    """
    limit = np.uint64(int(val_fraction * 2.0**64))
    chosen = {f: hashes < limit for f, hashes in groups.items()}
    if all(map(_is_divided, chosen.values())):  # the usual case, in which sorting millions of groups is spared
        return chosen
    present = {f: np.unique(hashes) for f, hashes in groups.items()}
    sides = {f: hashes < limit for f, hashes in present.items()}
    changed: list[int] = []
    while (one_sided := [f for f in sides if not _is_divided(sides[f])]) and len(changed) < MAX_CHANGES:
        group = _group_to_change(present, sides, one_sided[0], changed)
        sides = _after_change(present, sides, group)
        changed.append(group)
    moved = [group for group, times in Counter(changed).items() if times % 2]
    if one_sided:
        listed = ", ".join(names[f] for f in one_sided)
        logger.warning(f"split by {by}: too few groups to have training and validation molecules of {listed}.")
    elif moved:
        logger.info(f"split by {by}: groups that changed sides, so that each fidelity has both: {len(moved)}")
    return {f: chosen[f] ^ np.isin(hashes, np.array(moved, np.uint64)) for f, hashes in groups.items()}


def _is_divided(side: np.ndarray) -> bool:
    """Whether groups, (k,) bool True for validation, are on both sides, or a single one in training."""
    return not side.all() and bool(side.any() or len(side) == 1)


def _after_change(
    present: Mapping[int, np.ndarray], sides: Mapping[int, np.ndarray], group: int
) -> dict[int, np.ndarray]:
    """Sides of the groups of each fidelity after one group has changed its side in all of them."""
    return {f: side ^ (present[f] == np.uint64(group)) for f, side in sides.items()}


def _group_to_change(
    present: Mapping[int, np.ndarray], sides: Mapping[int, np.ndarray], fidelity: int, changed: Sequence[int]
) -> int:
    """Group that gives a fidelity its other side: the first, from the limit on, after which more fidelities have both.

    If there is none, it is the one after which most have, and of these the one that changed longest ago.
    """
    n_divided = sum(map(_is_divided, sides.values()))
    nearest_first = present[fidelity][::-1] if sides[fidelity].all() else present[fidelity]
    candidates = nearest_first[:MAX_CHANGES].tolist()
    rank: dict[int, tuple[int, int]] = {}
    for group in candidates:
        n_after = sum(map(_is_divided, _after_change(present, sides, group).values()))
        if n_after > n_divided:
            return group
        age = changed[::-1].index(group) if group in changed else len(changed)
        rank[group] = (n_after, age)
    return max(candidates, key=rank.__getitem__)


# --------------------------------------------------------------------------------------------------
# the record of a split
# --------------------------------------------------------------------------------------------------


def save_split(
    path: str | Path,
    dataset: MixedFidelityDataset,
    val: np.ndarray,
    *,
    val_fraction: float,
    seed: int,
    by: str = BY_MOLECULE,
    names: Mapping[int, str] | None = None,
) -> None:
    """Write down which molecules validate, as a NumPy archive (``.npz``).

    It has an array ``val/NAME`` for each fidelity, the indices of its validation molecules counted within the fidelity,
    and ``record``, JSON text: how the split was made, and for each fidelity the numbers of molecules and a digest of
    their sizes.

    Parameters
    ----------
    path : str or Path
        The file to write. Its folder must exist.
    dataset : MixedFidelityDataset
        The molecules that were divided.
    val : numpy.ndarray
        Indices of those for validation, as `split_indices` gives them.
    val_fraction, seed, by
        What `split_indices` was given.
    names : mapping of int to str, optional
        Names of the fidelities; default "fidelity 0", "fidelity 1" ...

    Raises
    ------
    OSError
        The file cannot be written (`aimnet2mult.utils.files.check_writable`).
    """
    arrays, fidelities = {}, {}
    for f, inside in dataset.by_fidelity(val).items():
        name = (names or {}).get(f, f"fidelity {f}")
        arrays[f"val/{name}"] = np.sort(inside).astype(np.int64)
        fidelities[name] = {**_identity(dataset.datasets[f]), "validation": len(inside)}
    record = {
        "format": SPLIT_FORMAT,
        "by": by,
        "val_fraction": val_fraction,
        "seed": seed,
        "fidelities": fidelities,
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, record=np.array(json.dumps(record)), **arrays)  # type: ignore[arg-type]


def load_split(
    path: str | Path, dataset: MixedFidelityDataset, names: Mapping[int, str] | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Read a split that `save_split` wrote.

    Parameters
    ----------
    path : str or Path
        The file.
    dataset : MixedFidelityDataset
        The molecules; the numbers of each fidelity and the order of their sizes must be those that were divided.
    names : mapping of int to str, optional
        Names of the fidelities, as for `save_split`. Their order may differ.

    Returns
    -------
    train, val : numpy.ndarray
        Ascending indices of molecules, int64.
    record : dict
        How the split was made: ``by``, ``val_fraction``, ``seed``, ``fidelities``.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a split, or one of other data; the message names the fidelity.
    """
    record, arrays = _read_split(Path(path))
    names = {f: (names or {}).get(f, f"fidelity {f}") for f in dataset.datasets}
    if unused := [name for name in record["fidelities"] if name not in names.values()]:
        raise ValueError(
            f"{path}: the split has {', '.join(unused)}, which the data have not: {', '.join(names.values())}. "
            "Give the same fidelities, or divide the data anew."
        )
    validates = np.zeros(len(dataset), bool)
    for f, source in dataset.datasets.items():
        name = names[f]
        if name not in record["fidelities"]:
            raise ValueError(
                f"{path}: no split of {name} (there is one of {', '.join(record['fidelities'])}). "
                "Give the same fidelities, or divide the data anew."
            )
        saved, now = record["fidelities"][name], _identity(source)
        if saved["molecules"] != now["molecules"]:
            raise ValueError(
                f"{path}: {name} had {saved['molecules']} molecules when it was divided, now {now['molecules']} "
                f"({source.name}). Give the same files, or divide the data anew."
            )
        if saved["sizes"] != now["sizes"]:
            raise ValueError(
                f"{path}: the molecules of {name} had other sizes or another order when they were divided "
                f"({source.name}). Give the same files, or divide the data anew."
            )
        inside = arrays[f"val/{name}"]
        if len(inside) and not 0 <= inside.min() <= inside.max() < len(source):
            raise ValueError(f"{path}: damaged, {name} has indices beyond its {len(source)} molecules.")
        validates[dataset.starts[f] + inside] = True
    return np.flatnonzero(~validates), np.flatnonzero(validates), record


def _read_split(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Record and arrays of a file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        record = json.loads(str(arrays.pop("record")))
        if set(arrays) != {f"val/{name}" for name in record["fidelities"]} or record["format"] != SPLIT_FORMAT:
            raise KeyError("format")
    except DAMAGE as error:
        raise ValueError(f"{path}: not a split of molecules, expected what save_split writes ({error}).") from error
    return record, arrays


def _identity(source: MoleculeSource) -> dict[str, Any]:
    """What a split must fit: number of molecules, and digest of their sizes in order."""
    sizes = np.ascontiguousarray(source.n_atoms, "<i4")
    return {"molecules": len(source), "sizes": hashlib.blake2b(sizes.data, digest_size=8).hexdigest()}
