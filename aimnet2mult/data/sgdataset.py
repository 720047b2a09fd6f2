"""Molecules on disk: HDF5 files with a group per number of atoms, read as they are needed and written whole or not.

::

    file.h5
      003/  coord (n, 3, 3)  numbers (n, 3)  charge (n,)  energy (n,)  [mult (n,)  forces (n, 3, 3)  ...]
      012/  ...

The arrays are those of `aimnet2mult.nbops.BATCH_KEYS` with plain atomic numbers and total energies. Lengths are in Å
and energies in eV, unless attributes of the file say otherwise: ``energy_unit = "Hartree"`` and the like, one for each
quantity of `aimnet2mult.utils.units.UNITS`. What is read is in eV and Å in any case.

`open_dataset` opens one file, or several as one. Opening looks at the structure only, so it takes the same time for a
thousand molecules and for ten million. Arrays that lie in the file in one piece (what `write_dataset` makes) are read
from their place in the file, row by row: the memory of the process does not grow with the file, and the operating
system keeps in its own cache what is used often. Chunked or compressed arrays are kept in memory when they are small,
and are read chunk by chunk when they are not.
"""

import contextlib
import glob
import hashlib
import logging
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.data.base import LABEL_COUNT_BYTES, LabelCount, MoleculeSource
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.utils.files import atomic_path
from aimnet2mult.utils.units import UNITS, unit_factor

logger = logging.getLogger(__name__)

REQUIRED_KEYS = ("coord", "numbers", "charge", "energy")
"""Arrays that every group must have."""

OPTIONAL_KEYS = ("mult", "forces", "charges", "spin_charges", "dipole", "quadrupole", "cell", "stress")
"""Arrays that a group may have, and whose shape is checked. Further arrays need only the right number of rows."""

CACHE_BYTES = 256 * 2**20
"""Chunked or compressed arrays of a dataset are kept in memory, in each process that reads it, up to this size."""

WINDOW_ROWS = 4096
"""Rows read at a time from arrays that are neither in one piece nor in chunks."""

PIECE_BYTES = 64 * 2**20
"""Size of an array up to which `SizeGroupedDataset.chunks` reads it in one piece."""

READ_COST_BYTES = 16 * 2**10
"""Reading a row by itself takes about as long as copying so much: rows less far apart are read in one go."""

MAX_OPEN_FILES = 128
"""Files that a dataset of several files keeps open at a time. Systems allow a process 1024 or so."""

FINGERPRINT_ROWS = 64
"""Molecules, evenly spaced, whose arrays go into the fingerprint of a file."""

UNIT_SUFFIX = "_unit"


class DatasetError(ValueError):
    """A dataset file that cannot be used; the message names file, group, array and remedy."""


class _Array(NamedTuple):
    """Where and how an array lies in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None  # in bytes from the start of the file; None: not in one piece, only HDF5 can read it
    chunk_rows: int  # rows that HDF5 reads at a time
    row_bytes: int

    @property
    def to_cache(self) -> bool:
        """Text is not: its size in memory is not known beforehand, and training does not read it."""
        return self.offset is None and self.dtype.kind in "iuf"


class _Structure(NamedTuple):
    """What a file holds, without its data."""

    groups: dict[int, dict[str, _Array]]  # number of atoms, ascending -> arrays
    names: dict[int, str]  # number of atoms -> name of the group
    factors: dict[str, float]  # quantity -> its unit in that of the package, where it is not 1
    identity: tuple[int, int]  # inode and size: tells a file from another that has taken its name


def expected_shape(key: str, n_molecules: int, n_atoms: int) -> tuple[int, ...]:
    """Shape of an array in the group of ``n_atoms`` atoms: (n, N, ...) per atom, (n, ...) per molecule."""
    meaning = BATCH_KEYS[key]
    per_atom = (n_atoms,) if meaning.kind == "atom" else ()
    return (n_molecules, *per_atom, *meaning.trailing)


def _check_array(
    where: str, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], n_molecules: int, n_atoms: int
) -> None:
    """Refuse an array whose shape or type does not fit its group."""
    if key in REQUIRED_KEYS or key in OPTIONAL_KEYS:
        expected = expected_shape(key, n_molecules, n_atoms)
        if shape != expected:
            raise DatasetError(
                f"{where}: {key} has shape {shape}, expected {expected} "
                f"for {n_molecules} molecules (as in numbers) of {n_atoms} atoms. Rewrite the group."
            )
        kinds, wanted = ("iu", "integers") if key == "numbers" else ("iuf", "real numbers")
        if dtype.kind not in kinds:
            raise DatasetError(f"{where}: {key} holds {dtype}, expected {wanted}. Convert the array.")
    elif not shape or shape[0] != n_molecules:
        raise DatasetError(
            f"{where}: {key} has shape {shape}, expected {n_molecules} rows, one per molecule. Rewrite the group."
        )


def _unit_factors(path: Path, attributes: Mapping[str, Any]) -> dict[str, float]:
    """Quantities whose unit, by the attributes of a file, is not that of the package, and the factor to it."""
    factors = {}
    for name, unit in attributes.items():
        if not name.endswith(UNIT_SUFFIX):
            continue
        quantity = name.removesuffix(UNIT_SUFFIX)
        text = unit.decode() if isinstance(unit, bytes) else unit
        if quantity in UNITS:
            try:
                factors[quantity] = unit_factor(quantity, str(text))
            except ValueError as error:
                raise DatasetError(f"{path}: attribute {name}: {error}") from error
        elif quantity not in BATCH_KEYS:
            known = [key + UNIT_SUFFIX for key in UNITS]
            raise DatasetError(f"{path}: attribute {name}: there is no such quantity; {nearest(name, known)}")
        elif text != BATCH_KEYS[quantity].unit:
            raise DatasetError(
                f"{path}: attribute {name}: {text!r} cannot be converted. "
                f"Store {quantity} in {BATCH_KEYS[quantity].unit or 'plain numbers'}."
            )
    return {quantity: factor for quantity, factor in factors.items() if factor != 1.0}


def _locate(dataset: h5py.Dataset, user_block: int) -> int | None:
    """Offset in bytes of an array that lies in one piece and in numpy's own format, else None."""
    properties = dataset.id.get_create_plist()
    in_one_piece = properties.get_layout() == h5py.h5d.CONTIGUOUS and properties.get_external_count() == 0
    if not in_one_piece or user_block or dataset.dtype.kind not in "iuf" or not hasattr(os, "preadv"):
        return None
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype)):
        return None
    offset = dataset.id.get_offset()
    return None if offset is None else int(offset)


# --------------------------------------------------------------------------------------------------
# one file
# --------------------------------------------------------------------------------------------------


class SizeGroupedDataset(MoleculeSource):
    """The molecules of one HDF5 file.

    Molecules are numbered in the order of ascending atom count, then of rows. The object can be pickled and used
    after a fork: each process opens the file for itself when it first reads.

    Parameters
    ----------
    path : str or Path
        The file.
    cache_bytes : int
        Memory that chunked or compressed arrays may take; beyond it they are read from the file each time.

    Attributes
    ----------
    path : Path
        The file, as an absolute path.
    keys : set of str
        Arrays that at least one group has.
    sizes : dict of int to int
        Number of molecules for each number of atoms, ascending.
    n_atoms : numpy.ndarray
        (n,) int32, number of atoms of each molecule.
    packed_bytes : int
        Size in memory of chunked or compressed arrays.
    cached : bool
        They are kept in memory once they have been read.
    rounded : bool
        Energies are not stored as float64.

    Raises
    ------
    FileNotFoundError
        No such file.
    DatasetError
        Not HDF5, a group whose name is not an atom count, a required array is missing, arrays of a group disagree
        in length or do not fit the atom count, a unit is unknown, no molecules at all.
    """

    def __init__(self, path: str | Path, cache_bytes: int = CACHE_BYTES) -> None:
        self.path = Path(path).absolute()
        self.files = (self.path,)
        self._structure = _read_structure(self.path)
        self._groups = self._structure.groups
        self.sizes = {n: group["numbers"].shape[0] for n, group in self._groups.items()}
        self.keys = {key for group in self._groups.values() for key in group}
        self.n_atoms = np.repeat(np.array(list(self.sizes), np.int32), list(self.sizes.values()))
        self._starts = np.concatenate(([0], np.cumsum(list(self.sizes.values()), dtype=np.int64)))
        arrays = [array for group in self._groups.values() for array in group.values() if array.to_cache]
        self.packed_bytes = sum(array.shape[0] * array.row_bytes for array in arrays)
        self.cached = self.packed_bytes <= cache_bytes
        self.rounded = any(group["energy"].dtype.itemsize < 8 for group in self._groups.values())
        self._elements: list[int] | None = None
        self._cache: dict[tuple[int, str], np.ndarray] = {}
        self._forget_handles()

    def _forget_handles(self) -> None:
        self._raw: _RawFile | None = None
        self._file: h5py.File | None = None
        self._file_pid = -1

    def close(self) -> None:
        """As `MoleculeSource.close`."""
        self._forget_handles()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_raw": None, "_file": None, "_file_pid": -1, "_cache": {}}

    def __repr__(self) -> str:
        sizes = f"{min(self.sizes)} to {max(self.sizes)}"
        return f"SizeGroupedDataset({str(self.path)!r}: {len(self)} molecules of {sizes} atoms)"

    def where(self, index: int) -> str:
        """Return file, group and row of a molecule, for messages."""
        n_atoms = int(self.n_atoms[index])
        row = index - int(self._starts[list(self.sizes).index(n_atoms)])
        return f"{self.path}: group {self._structure.names[n_atoms]}: row {row}"

    @property
    def elements(self) -> list[int]:
        """Sorted atomic numbers in the file.

        The first call streams ``numbers`` and ``energy`` once, and so is where their values are checked.

        Raises
        ------
        DatasetError
            An atomic number outside 1 to 118, or an infinite energy. (NaN marks a missing one.)
        """
        if self._elements is None:
            self._elements = self._scan()
        return self._elements

    def _scan(self) -> list[int]:
        seen = np.zeros(MAX_ATOMIC_NUMBER + 1, bool)
        for first, arrays in self.chunks(("numbers", "energy")):
            numbers, infinite = arrays["numbers"], np.isinf(arrays["energy"])
            if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
                row, atom = np.argwhere((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))[0]
                raise DatasetError(
                    f"{self.where(first + int(row))}: numbers has {numbers[row, atom]}, expected atomic numbers from 1 "
                    f"to {MAX_ATOMIC_NUMBER}. Files hold plain atomic numbers, no padding and no fidelity offset."
                )
            if infinite.any():
                row = int(np.argmax(infinite))
                raise DatasetError(
                    f"{self.where(first + row)}: energy is {arrays['energy'][row]}. "
                    "Repair the file; NaN would mark a missing energy."
                )
            seen[numbers] = True
        return [int(z) for z in np.flatnonzero(seen)]

    def read(self, indices: np.ndarray, keys: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """As `MoleculeSource.read`, one size group after the other."""
        indices = _checked_indices(self, indices)
        order = np.argsort(indices, kind="stable")  # ascending rows are kind to the disk
        ascending = indices[order]
        bounds = np.searchsorted(ascending, self._starts)
        for group, n_atoms in enumerate(self.sizes):
            first, last = bounds[group], bounds[group + 1]
            if first == last:
                continue
            rows = ascending[first:last] - self._starts[group]
            present = [key for key in keys if key in self._groups[n_atoms]]
            yield order[first:last], {key: self._in_our_units(key, self._rows(n_atoms, key, rows)) for key in present}

    def chunks(self, keys: Sequence[str], max_rows: int = 65536) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """As `MoleculeSource.chunks`; a piece holds molecules of one size."""
        for start, (n_atoms, n_molecules) in zip(self._starts[:-1].tolist(), self.sizes.items(), strict=True):
            arrays = {key: self._groups[n_atoms][key] for key in keys if key in self._groups[n_atoms]}
            widest = max((array.row_bytes for array in arrays.values()), default=1)
            n_rows = max(1, min(max_rows, PIECE_BYTES // max(widest, 1)))
            for first in range(0, n_molecules, n_rows):
                last = min(first + n_rows, n_molecules)
                yield (
                    start + first,
                    {key: self._in_our_units(key, self._window(n_atoms, key, first, last)) for key in arrays},
                )

    def _in_our_units(self, key: str, values: np.ndarray) -> np.ndarray:
        """Values of the file in eV and Å: computed in float64, and energies left so."""
        factor = self._structure.factors.get(key)
        if factor is None:
            return values
        converted = values.astype(np.float64) * factor
        return converted.astype(values.dtype) if key != "energy" and values.dtype.kind == "f" else converted

    def _rows(self, n_atoms: int, key: str, rows: np.ndarray) -> np.ndarray:
        """Rows (ascending) of an array, as stored."""
        array = self._groups[n_atoms][key]
        first, last = int(rows[0]), int(rows[-1]) + 1
        if array.to_cache and self.cached:
            return self._cached_array(n_atoms, key)[rows]
        if array.offset is None:
            return self._rows_by_chunk(n_atoms, key, rows)
        if (last - first) * array.row_bytes <= len(rows) * (array.row_bytes + READ_COST_BYTES):
            return self._window(n_atoms, key, first, last)[rows - first]
        result = np.empty((len(rows), *array.shape[1:]), array.dtype)
        into = result.reshape(-1).view(np.uint8).data
        raw, size = self._raw_file(), array.row_bytes
        for i, offset in enumerate((array.offset + rows * size).tolist()):
            raw.read(into[i * size : (i + 1) * size], offset)
        return result

    def _rows_by_chunk(self, n_atoms: int, key: str, rows: np.ndarray) -> np.ndarray:
        """Rows (ascending) of an array that only HDF5 can read; each of its chunks is read once."""
        array = self._groups[n_atoms][key]
        result = np.empty((len(rows), *array.shape[1:]), array.dtype)
        dataset = self._hdf5(n_atoms, key)
        chunk_of_row = rows // array.chunk_rows
        starts = np.flatnonzero(np.diff(chunk_of_row, prepend=-1))
        for lo, hi in zip(starts, [*starts[1:], len(rows)], strict=True):
            begin = int(chunk_of_row[lo]) * array.chunk_rows
            result[lo:hi] = self._from_hdf5(dataset, begin, int(rows[hi - 1]) + 1)[rows[lo:hi] - begin]
        return result

    def _window(self, n_atoms: int, key: str, first: int, last: int) -> np.ndarray:
        """Rows ``first`` to before ``last`` of an array, as stored; a copy."""
        array = self._groups[n_atoms][key]
        if array.to_cache and self.cached:
            return self._cached_array(n_atoms, key)[first:last].copy()
        if array.offset is None:
            return self._from_hdf5(self._hdf5(n_atoms, key), first, last)
        result = np.empty((last - first, *array.shape[1:]), array.dtype)
        self._raw_file().read(result.reshape(-1).view(np.uint8).data, array.offset + first * array.row_bytes)
        return result

    def _cached_array(self, n_atoms: int, key: str) -> np.ndarray:
        if (n_atoms, key) not in self._cache:
            self._cache[n_atoms, key] = self._from_hdf5(self._hdf5(n_atoms, key), 0, self.sizes[n_atoms])
        return self._cache[n_atoms, key]

    def _hdf5(self, n_atoms: int, key: str) -> h5py.Dataset:
        if self._file is None or self._file_pid != os.getpid():  # a handle must not be shared across a fork
            self._check_identity(os.stat(self.path))
            self._file, self._file_pid = h5py.File(self.path, "r"), os.getpid()
        return self._file[self._structure.names[n_atoms]][key]

    def _from_hdf5(self, dataset: h5py.Dataset, first: int, last: int) -> np.ndarray:
        try:
            return np.asarray(dataset[first:last])
        except OSError as error:
            group, key = dataset.name.strip("/").split("/")
            raise DatasetError(
                f"{self.path}: group {group}: {key} cannot be read ({error}). Copy the file anew."
            ) from error

    def _raw_file(self) -> "_RawFile":
        if self._raw is None:
            raw = _RawFile(self.path)
            self._check_identity(os.fstat(raw.descriptor))
            self._raw = raw
        return self._raw

    def _check_identity(self, status: os.stat_result) -> None:
        """Refuse to read a file that is not the one whose structure is known."""
        if _identity(status) != self._structure.identity:
            raise DatasetError(f"{self.path}: the file has been replaced since it was opened. Start again.")


class _RawFile:
    """The bytes of a file. Reading leaves no position behind, so that threads and forked processes may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from ``offset`` on."""
        try:
            while (n_read := os.preadv(self.descriptor, [into], offset)) < len(into):  # one call gives 2 GiB at most
                if n_read == 0:
                    raise DatasetError(f"{self.path}: the file ends before its data. Copy the file anew.")
                into, offset = into[n_read:], offset + n_read
        except OSError as error:
            raise DatasetError(f"{self.path}: cannot be read ({error}). Copy the file anew.") from error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_size


def _checked_indices(source: MoleculeSource, indices: np.ndarray) -> np.ndarray:
    indices = np.asarray(indices, np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= len(source)):
        raise IndexError(f"{source.name}: molecule indices must be from 0 to {len(source) - 1}")
    return indices


def _read_structure(path: Path) -> _Structure:
    """Structure of a file, everything checked that needs no data."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise DatasetError(f"{path}: not an HDF5 file, expected a dataset with one group per number of atoms")
    groups: dict[int, dict[str, _Array]] = {}
    names: dict[int, str] = {}
    try:
        identity = _identity(os.stat(path))
        with h5py.File(path, "r") as file:
            factors = _unit_factors(path, file.attrs)
            for name in file:
                where = f"{path}: group {name}"
                if not isinstance(file.get(name), h5py.Group):
                    raise DatasetError(f"{path}: {name} is not a group. Put arrays into a group per number of atoms.")
                if not (name.isascii() and name.isdigit() and int(name) > 0):
                    raise DatasetError(
                        f"{where}: the name is not a number of atoms, such as 3 or 003. Rename the group."
                    )
                n_atoms = int(name)
                if n_atoms in groups:
                    raise DatasetError(f"{where}: group {names[n_atoms]} is for {n_atoms} atoms, too. Merge the two.")
                arrays = _read_group(file[name], where, n_atoms, file.userblock_size)
                if arrays["numbers"].shape[0]:
                    groups[n_atoms], names[n_atoms] = arrays, name
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read as HDF5 ({error}). Copy the file anew.") from error
    if not groups:
        raise DatasetError(f"{path}: no molecules in the file, expected one group per number of atoms")
    return _Structure(dict(sorted(groups.items())), names, factors, identity)


def _read_group(group: h5py.Group, where: str, n_atoms: int, user_block: int) -> dict[str, _Array]:
    missing = [key for key in REQUIRED_KEYS if key not in group]
    if missing:
        raise DatasetError(
            f"{where}: {', '.join(missing)} missing. Every group needs {', '.join(REQUIRED_KEYS)} (found: "
            f"{', '.join(group) or 'nothing'})."
        )
    n_molecules = group["numbers"].shape[0] if group["numbers"].shape else -1
    arrays = {}
    for key in group:
        dataset = group.get(key)
        if not isinstance(dataset, h5py.Dataset):
            raise DatasetError(f"{where}: {key} is not an array. Remove it.")
        _check_array(where, key, dataset.shape, dataset.dtype, n_molecules, n_atoms)
        chunk_rows = dataset.chunks[0] if dataset.chunks else WINDOW_ROWS
        row_bytes = math.prod(dataset.shape[1:]) * dataset.dtype.itemsize
        arrays[key] = _Array(dataset.shape, dataset.dtype, _locate(dataset, user_block), chunk_rows, row_bytes)
    return arrays


# --------------------------------------------------------------------------------------------------
# several files
# --------------------------------------------------------------------------------------------------


class JoinedDataset(MoleculeSource):
    """The molecules of several sources, such as the files of one level of theory, as one dataset.

    Molecules are numbered source after source.

    Parameters
    ----------
    parts : sequence of MoleculeSource
        The sources, at least one.

    Attributes
    ----------
    parts : tuple of MoleculeSource
        The sources.
    """

    def __init__(self, parts: Sequence[MoleculeSource]) -> None:
        self.parts = tuple(parts)
        self.files = tuple(file for part in self.parts for file in part.files)
        self.keys = set().union(*(part.keys for part in self.parts))
        self.n_atoms = np.concatenate([part.n_atoms for part in self.parts])
        self._starts = np.concatenate(([0], np.cumsum([len(part) for part in self.parts], dtype=np.int64)))
        self._last_read: dict[int, None] = {}  # files that are open, the one read last at the end

    def __repr__(self) -> str:
        return f"JoinedDataset({self.name}: {len(self)} molecules)"

    @property
    def elements(self) -> list[int]:
        """Sorted atomic numbers of all parts."""
        return sorted(set().union(*(self._opened(i).elements for i in range(len(self.parts)))))

    def where(self, index: int) -> str:
        """Return file, group and row of a molecule, for messages."""
        part = self._part_of(index)
        return self.parts[part].where(int(index - self._starts[part]))

    def read(self, indices: np.ndarray, keys: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """As `MoleculeSource.read`, one part after the other."""
        indices = _checked_indices(self, indices)
        part_of_index = self._part_of(indices)
        for part in np.unique(part_of_index).tolist():
            places = np.flatnonzero(part_of_index == part)
            for positions, arrays in self._opened(part).read(indices[places] - self._starts[part], keys):
                yield places[positions], arrays

    def chunks(self, keys: Sequence[str], max_rows: int = 65536) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """As `MoleculeSource.chunks`; a piece holds molecules of one part."""
        for part, start in enumerate(self._starts[:-1].tolist()):
            for first, arrays in self._opened(part).chunks(keys, max_rows):
                yield start + first, arrays

    def label_counts(self, keys: Sequence[str], max_bytes: int = LABEL_COUNT_BYTES) -> dict[str, LabelCount]:
        """As `MoleculeSource.label_counts`, summed over the parts."""
        limit = max_bytes if self.label_bytes(keys) <= max_bytes else 0
        counts = [self._opened(i).label_counts(keys, limit) for i in range(len(self.parts))]
        return {
            key: LabelCount(
                molecules=sum(count[key].molecules for count in counts),
                missing=sum(count[key].missing for count in counts),
                exact=all(count[key].exact for count in counts),
            )
            for key in keys
        }

    def close(self) -> None:
        """Close all files until they are read again."""
        for part in self.parts:
            part.close()

    def _part_of(self, index: Any) -> Any:
        return np.searchsorted(self._starts, index, side="right") - 1

    def _opened(self, part: int) -> MoleculeSource:
        """A part that is going to be read; of the files, those read longest ago are closed."""
        self._last_read.pop(part, None)
        self._last_read[part] = None
        if len(self._last_read) > MAX_OPEN_FILES:
            oldest = next(iter(self._last_read))
            del self._last_read[oldest]
            self.parts[oldest].close()
        return self.parts[part]


def expand_files(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that names and patterns (``*``, ``?``, ``[...]``, ``**``) stand for, sorted, none twice.

    Raises
    ------
    FileNotFoundError
        A name or pattern that matches no file.
    DatasetError
        A name is that of a folder, or nothing was given.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    if not patterns:
        raise DatasetError("no dataset files given. Name at least one file or pattern.")
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            raise DatasetError(f"{path}: is a folder. Name the files in it, such as {path / '*.h5'}.")
        if path.exists() or not glob.has_magic(str(path)):  # a file's name may hold brackets
            matches = [path] if path.exists() else []
        else:
            matches = [match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file()]
        if not matches:
            what = "no file matches" if glob.has_magic(str(path)) else "no such file"
            raise FileNotFoundError(f"{path}: {what}")
        files.update(match.absolute() for match in matches)
    return sorted(files)


def open_dataset(files: str | Path | Sequence[str | Path], cache_bytes: int = CACHE_BYTES) -> MoleculeSource:
    """Open one dataset file, or several as one dataset.

    Parameters
    ----------
    files : str, Path or sequence of them
        Names or patterns of files (`expand_files`). Molecules are numbered in the sorted order of the files.
    cache_bytes : int
        Memory, in each process that reads, for chunked or compressed arrays of all files together. Files are kept in
        memory, in their order, as long as they fit; the others are read chunk by chunk each time.

    Returns
    -------
    MoleculeSource
        A `SizeGroupedDataset`, or a `JoinedDataset` of several.

    Raises
    ------
    FileNotFoundError, DatasetError
        As `expand_files` and `SizeGroupedDataset`.
    """
    parts: list[SizeGroupedDataset] = []
    for path in expand_files(files):
        parts.append(SizeGroupedDataset(path, cache_bytes))
        cache_bytes -= parts[-1].packed_bytes if parts[-1].cached else 0
    dataset = JoinedDataset(parts) if len(parts) > 1 else parts[0]
    slow, rounded = [part for part in parts if not part.cached], [part for part in parts if part.rounded]
    if slow:
        n_bytes = sum(part.packed_bytes for part in slow)
        logger.warning(
            f"{_listed(slow)}: {n_bytes / 2**30:.1f} GiB of chunked or compressed arrays are more than is kept in "
            "memory, and reading them at random is slow. Write them anew, uncompressed, with "
            f"`python -m aimnet2mult.tools.convert_data {slow[0].path.name} new.h5`."
        )
    if rounded:
        logger.warning(
            f"{_listed(rounded)}: energies are stored in single precision, which rounds total energies of heavy "
            "molecules by more than 1 meV. Store float64."
        )
    return dataset


def _listed(parts: Sequence[SizeGroupedDataset]) -> str:
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    return f"{parts[0].path}{more}"


def fingerprint(source: MoleculeSource) -> list[dict[str, Any]]:
    """Describe the files of a dataset so that a later run can tell whether they are the same.

    Parameters
    ----------
    source : MoleculeSource
        The dataset.

    Returns
    -------
    list of dict
        For each file ``path``, ``bytes``, ``molecules`` and ``sha256``: a hash of names, shapes, types and units of
        all arrays, and of the values of `FINGERPRINT_ROWS` evenly spaced molecules. How arrays are laid out in the
        file, compressed or not, does not matter to the hash.
    """
    return [_fingerprint(path) for path in source.files]


def _fingerprint(path: Path) -> dict[str, Any]:
    dataset = SizeGroupedDataset(path, cache_bytes=0)
    structure = [
        (n_atoms, key, array.shape, array.dtype.str)
        for n_atoms, group in dataset._groups.items()
        for key, array in sorted(group.items())
    ]
    digest = hashlib.sha256(repr((structure, sorted(dataset._structure.factors.items()))).encode())
    rows = np.unique(np.linspace(0, len(dataset) - 1, FINGERPRINT_ROWS).astype(np.int64))
    for _, arrays in dataset.read(rows, sorted(dataset.keys)):
        for values in arrays.values():
            digest.update(repr(values.tolist()).encode() if values.dtype.kind == "O" else values.tobytes())
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "molecules": len(dataset),
        "sha256": digest.hexdigest(),
    }


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------


class DatasetWriter:
    """What `dataset_writer` gives: writes rows of groups whose sizes are known beforehand.

    Parameters
    ----------
    file : h5py.File
        The file, open for writing.
    path : Path
        Its final name, for messages.
    sizes : mapping of int to int
        Number of molecules for each number of atoms.
    compression : str or None
        Filter of HDF5, such as ``"gzip"``.
    """

    def __init__(self, file: h5py.File, path: Path, sizes: Mapping[int, int], compression: str | None) -> None:
        self._file = file
        self._path = path
        self._sizes = dict(sizes)
        self._filters = {"compression": compression, "shuffle": True} if compression else {}
        self._rows_written: dict[tuple[int, str], int] = {}

    def write(self, n_atoms: int, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write rows ``first``, ``first`` + 1 ... of the group of ``n_atoms`` atoms; arrays (k, ...).

        Text (one string per molecule in a further array) is stored as UTF-8 of any length.
        """
        where = f"{self._path}: group {n_atoms:03d}"
        missing = [key for key in REQUIRED_KEYS if key not in arrays]
        if missing:
            raise DatasetError(f"{where}: {', '.join(missing)} missing. Every group needs {', '.join(REQUIRED_KEYS)}.")
        group, rows = self._file.require_group(f"{n_atoms:03d}"), len(arrays["numbers"])
        for key, values in arrays.items():
            values = np.asarray(values)
            _check_array(where, key, values.shape, values.dtype, rows, n_atoms)
            if values.dtype.kind in "OU":
                values = values.astype(h5py.string_dtype())
            if key not in group:
                group.create_dataset(key, (self._sizes[n_atoms], *values.shape[1:]), values.dtype, **self._filters)
            group[key][first : first + rows] = values
            self._rows_written[n_atoms, key] = self._rows_written.get((n_atoms, key), 0) + rows

    def check_complete(self) -> None:
        """Refuse a file of which a part has not been written."""
        for n_atoms, n_molecules in self._sizes.items():
            keys = {key for n, key in self._rows_written if n == n_atoms}.union(REQUIRED_KEYS)
            for key in sorted(keys):
                rows = self._rows_written.get((n_atoms, key), 0)
                if rows != n_molecules:
                    where = f"{self._path}: group {n_atoms:03d}"
                    raise DatasetError(f"{where}: {key} has {rows} of {n_molecules} rows. Write all of them.")


@contextlib.contextmanager
def dataset_writer(
    path: str | Path,
    sizes: Mapping[int, int],
    attributes: Mapping[str, str] | None = None,
    compression: str | None = None,
) -> Iterator[DatasetWriter]:
    """Write a dataset piece by piece; the file appears under its name when all of it has been written.

    An error inside the block leaves nothing behind, and a file of that name stays as it was.

    Parameters
    ----------
    path : str or Path
        The file to write. Its folder must exist.
    sizes : mapping of int to int
        Number of molecules (at least one) for each number of atoms.
    attributes : mapping of str to str, optional
        Words about the file (level of theory, program), stored with it. ``{quantity}_unit`` says that an array is not
        in the unit of the package, and which it is in; arrays are written as they are given.
    compression : str, optional
        ``"gzip"`` makes small files for distribution; None makes files that are fast to read at random.

    Yields
    ------
    DatasetWriter
        Its method ``write`` takes the pieces in any order.

    Raises
    ------
    DatasetError
        An unknown unit; an array that is missing, does not fit its group, or has not been written to its end.
    OSError
        The file cannot be written (`aimnet2mult.utils.files.check_writable`).
    """
    _unit_factors(Path(path).absolute(), attributes or {})
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(attributes or {})
        writer = DatasetWriter(file, Path(path).absolute(), sizes, compression)
        yield writer
        writer.check_complete()


def write_dataset(
    path: str | Path,
    groups: Mapping[int, Mapping[str, np.ndarray]],
    attributes: Mapping[str, str] | None = None,
    compression: str | None = None,
) -> None:
    """Write molecules to a dataset file, under a temporary name first.

    Parameters
    ----------
    path : str or Path
        The file to write. Its folder must exist.
    groups : mapping of int to mapping of str to numpy.ndarray
        For each number of atoms N the arrays of its n molecules: ``coord`` (n, N, 3) in Å, ``numbers`` (n, N),
        ``charge`` (n,), ``energy`` (n,) in eV, and optional ones, each stored in its own type.
    attributes, compression
        As in `dataset_writer`.

    Raises
    ------
    DatasetError
        No molecules, or an array is missing or does not fit its group.
    OSError
        The file cannot be written (`aimnet2mult.utils.files.check_writable`).
    """
    filled = {n_atoms: arrays for n_atoms, arrays in sorted(groups.items()) if any(map(len, arrays.values()))}
    if not filled:
        raise DatasetError(f"{path}: no molecules to write. Give the arrays of at least one group.")
    sizes = {n_atoms: max(map(len, arrays.values())) for n_atoms, arrays in filled.items()}
    with dataset_writer(path, sizes, attributes, compression) as writer:
        for n_atoms, arrays in filled.items():
            writer.write(n_atoms, 0, arrays)
