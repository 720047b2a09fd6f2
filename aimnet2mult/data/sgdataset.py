"""Molecules on disk: one HDF5 file with a group per number of atoms, read as it is needed and written whole or not.

::

    file.h5
      003/  coord (n, 3, 3)  numbers (n, 3)  charge (n,)  energy (n,)  [mult (n,)  forces (n, 3, 3)  ...]
      012/  ...

The arrays are those of `aimnet2mult.nbops.BATCH_KEYS` with plain atomic numbers, total energies in eV and lengths in
Å. Opening a file looks at its structure only, so it takes the same time for a thousand molecules and for ten million.
Arrays that lie in the file in one piece (what `write_dataset` makes) are mapped into memory: reading a molecule costs
a look-up, and the operating system decides what stays in memory. Chunked or compressed arrays are kept in memory
when they are small, and are read chunk by chunk when they are not.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.utils.files import atomic_path

logger = logging.getLogger(__name__)

REQUIRED_KEYS = ("coord", "numbers", "charge", "energy")
"""Arrays that every group must have."""

OPTIONAL_KEYS = ("mult", "forces", "charges", "spin_charges", "dipole", "quadrupole", "cell", "stress")
"""Arrays that a group may have, and whose shape is checked. Further arrays need only the right number of rows."""

CACHE_BYTES = 256 * 2**20
"""Chunked or compressed arrays of a file are kept in memory when all of them together take at most this much."""

WINDOW_ROWS = 4096
"""Rows read at a time from arrays that are neither in one piece nor in chunks."""


class DatasetError(ValueError):
    """A dataset file that cannot be used; the message names file, group, array and remedy."""


class _Array(NamedTuple):
    """Where and how an array lies in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None  # in bytes from the start of the file; None: not in one piece, only HDF5 can read it
    chunk_rows: int  # rows that HDF5 reads at a time

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


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


def _locate(dataset: h5py.Dataset, user_block: int) -> int | None:
    """Offset in bytes of an array that lies in one piece and in numpy's own format, else None."""
    properties = dataset.id.get_create_plist()
    in_one_piece = properties.get_layout() == h5py.h5d.CONTIGUOUS and properties.get_external_count() == 0
    if not in_one_piece or user_block or dataset.dtype.kind not in "iuf":
        return None
    if not dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype)):
        return None
    offset = dataset.id.get_offset()
    return None if offset is None else int(offset)


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

    Raises
    ------
    FileNotFoundError
        No such file.
    DatasetError
        Not HDF5, a group whose name is not an atom count, a required array is missing, arrays of a group disagree
        in length or do not fit the atom count, no molecules at all.
    """

    def __init__(self, path: str | Path, cache_bytes: int = CACHE_BYTES) -> None:
        self.path = Path(path).absolute()
        self.files = (self.path,)
        self._groups, self._names = _read_structure(self.path)
        self.sizes = {n: group["numbers"].shape[0] for n, group in self._groups.items()}
        self.keys = {key for group in self._groups.values() for key in group}
        self.n_atoms = np.repeat(np.array(list(self.sizes), np.int32), list(self.sizes.values()))
        self._starts = np.concatenate(([0], np.cumsum(list(self.sizes.values()), dtype=np.int64)))
        unmapped = sum(a.nbytes for group in self._groups.values() for a in group.values() if a.offset is None)
        self._use_cache = unmapped <= cache_bytes
        if not self._use_cache:
            logger.warning(
                f"{self.path}: {unmapped / 2**30:.1f} GiB of chunked or compressed arrays: random reading is "
                "slow. Write the file anew with uncompressed arrays (aimnet2mult.data.sgdataset.write_dataset)."
            )
        self._elements: list[int] | None = None
        self._forget_handles()

    def _forget_handles(self) -> None:
        self._file: h5py.File | None = None
        self._file_pid = -1
        self._map: np.memmap[Any, Any] | None = None
        self._cache: dict[tuple[int, str], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_file_pid": -1, "_map": None, "_cache": {}}

    def __repr__(self) -> str:
        sizes = f"{min(self.sizes)} to {max(self.sizes)}"
        return f"SizeGroupedDataset({str(self.path)!r}: {len(self)} molecules of {sizes} atoms)"

    def where(self, index: int) -> str:
        """Return file, group and row of a molecule, for messages."""
        n_atoms = int(self.n_atoms[index])
        row = index - int(self._starts[list(self.sizes).index(n_atoms)])
        return f"{self.path}: group {self._names[n_atoms]}: row {row}"

    @property
    def elements(self) -> list[int]:
        """Sorted atomic numbers in the file.

        The first call streams ``numbers`` and ``energy`` once, and so is where their values are checked.

        Raises
        ------
        DatasetError
            An atomic number outside 1 to 118, or an energy that is NaN or infinite.
        """
        if self._elements is None:
            self._elements = self._scan()
        return self._elements

    def _scan(self) -> list[int]:
        seen = np.zeros(MAX_ATOMIC_NUMBER + 1, bool)
        for first, arrays in self.chunks(("numbers", "energy")):
            numbers, finite = arrays["numbers"], np.isfinite(arrays["energy"])
            if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
                row, atom = np.argwhere((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))[0]
                raise DatasetError(
                    f"{self.where(first + int(row))}: numbers has {numbers[row, atom]}, expected atomic numbers from 1 "
                    f"to {MAX_ATOMIC_NUMBER}. Files hold plain atomic numbers, no padding and no fidelity offset."
                )
            if not finite.all():
                row = int(np.argmin(finite))
                energy = arrays["energy"][row]
                raise DatasetError(f"{self.where(first + row)}: energy is {energy}. Remove molecules without energy.")
            seen[numbers] = True
        return [int(z) for z in np.flatnonzero(seen)]

    def read(self, indices: np.ndarray, keys: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """As `MoleculeSource.read`, one size group after the other."""
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.path}: molecule indices must be from 0 to {len(self) - 1}")
        order = np.argsort(indices, kind="stable")  # ascending rows are kind to the page cache
        ascending = indices[order]
        bounds = np.searchsorted(ascending, self._starts)
        for group, n_atoms in enumerate(self.sizes):
            first, last = bounds[group], bounds[group + 1]
            if first == last:
                continue
            rows = ascending[first:last] - self._starts[group]
            present = [key for key in keys if key in self._groups[n_atoms]]
            yield order[first:last], {key: self._rows(n_atoms, key, rows) for key in present}

    def chunks(self, keys: Sequence[str], max_rows: int = 65536) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """As `MoleculeSource.chunks`; a piece holds molecules of one size."""
        for start, (n_atoms, n_molecules) in zip(self._starts.tolist(), self.sizes.items(), strict=False):
            present = [key for key in keys if key in self._groups[n_atoms]]
            for first in range(0, n_molecules, max_rows):
                rows = slice(first, min(first + max_rows, n_molecules))
                yield start + first, {key: np.array(self._source(n_atoms, key)[rows]) for key in present}

    def _rows(self, n_atoms: int, key: str, rows: np.ndarray) -> np.ndarray:
        """Rows (ascending) of an array."""
        array, source = self._groups[n_atoms][key], self._source(n_atoms, key)
        if isinstance(source, np.ndarray):
            return source[rows]
        result = np.empty((len(rows), *array.shape[1:]), array.dtype)
        chunk_of_row = rows // array.chunk_rows
        starts = np.flatnonzero(np.diff(chunk_of_row, prepend=-1))
        for lo, hi in zip(starts, [*starts[1:], len(rows)], strict=True):
            begin = int(chunk_of_row[lo]) * array.chunk_rows
            window = self._from_hdf5(source, n_atoms, key, slice(begin, int(rows[hi - 1]) + 1))
            result[lo:hi] = window[rows[lo:hi] - begin]
        return result

    def _source(self, n_atoms: int, key: str) -> Any:
        """Array in memory or mapped into it, else the HDF5 dataset; all can be sliced by rows."""
        array = self._groups[n_atoms][key]
        if array.offset is not None:
            if self._map is None:
                self._map = np.memmap(self.path, np.uint8, "r")
            if array.offset + array.nbytes > len(self._map):
                raise DatasetError(f"{self.path}: group {self._names[n_atoms]}: {key} is cut off. Copy the file anew.")
            return np.ndarray(array.shape, array.dtype, self._map, array.offset)
        if (n_atoms, key) in self._cache:
            return self._cache[n_atoms, key]
        if self._file is None or self._file_pid != os.getpid():  # a handle must not be shared across a fork
            self._file, self._file_pid = h5py.File(self.path, "r"), os.getpid()
        dataset = self._file[self._names[n_atoms]][key]
        if not self._use_cache:
            return dataset
        self._cache[n_atoms, key] = self._from_hdf5(dataset, n_atoms, key, slice(None))
        return self._cache[n_atoms, key]

    def _from_hdf5(self, dataset: h5py.Dataset, n_atoms: int, key: str, rows: slice) -> np.ndarray:
        try:
            return np.asarray(dataset[rows])
        except OSError as error:
            raise DatasetError(
                f"{self.path}: group {self._names[n_atoms]}: {key} cannot be read ({error}). Copy the file anew."
            ) from error


def _read_structure(path: Path) -> tuple[dict[int, dict[str, _Array]], dict[int, str]]:
    """Arrays and group name for each number of atoms, ascending; everything checked that needs no data."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file() or not h5py.is_hdf5(path):
        raise DatasetError(f"{path}: not an HDF5 file, expected a dataset with one group per number of atoms")
    groups: dict[int, dict[str, _Array]] = {}
    names: dict[int, str] = {}
    try:
        with h5py.File(path, "r") as file:
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
    return dict(sorted(groups.items())), names


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
        arrays[key] = _Array(dataset.shape, dataset.dtype, _locate(dataset, user_block), chunk_rows)
    if group["energy"].dtype.itemsize < 8:
        logger.warning(
            f"{where}: energy is stored as {group['energy'].dtype}, which rounds total energies of heavy molecules by "
            "more than 1 meV. Store float64."
        )
    return arrays


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
        Words about the file (level of theory, program), stored with it.
    compression : str, optional
        ``"gzip"`` makes small files for distribution; None makes files that are fast to read at random.

    Yields
    ------
    DatasetWriter
        Its method ``write`` takes the pieces in any order.

    Raises
    ------
    DatasetError
        An array is missing, does not fit its group, or has not been written to its end.
    OSError
        The file cannot be written (`aimnet2mult.utils.files.check_writable`).
    """
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
