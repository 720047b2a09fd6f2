"""From inputs to one output, as arrays: the middle of `aimnet2mult.tools.convert_data`, without ASE.

Every input becomes arrays on disk first (`Part`): HDF5 files as they are, NPZ files and structures through a temporary
HDF5 file. `Merger` joins the parts and hands out the groups piece by piece, and a writer for each format stores them
under a temporary name first. Rows of a group keep the order of the inputs.

What a structure's values mean is left to `aimnet2mult.data.frames`, their text to `aimnet2mult.data.extxyz`, ASE
databases and the choice of reader and writer to the command line.
"""

import contextlib
import json
import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.data.extxyz import DIGITS, ArrayType, Frame, check_name, missing_rows, write_frames
from aimnet2mult.data.frames import (
    ATOM_KEYS,
    LABEL_KEYS,
    LAYOUT_KEYS,
    UNIT_NAMES,
    FrameReader,
    RowError,
    Spool,
    array_type,
    filled_mult,
    joined_units,
    unit_factors,
)
from aimnet2mult.data.sgdataset import DatasetError, DatasetWriter, SizeGroupedDataset, dataset_writer
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.utils.files import atomic_path
from aimnet2mult.utils.units import UNITS

logger = logging.getLogger(__name__)

PACKAGE_UNITS = {quantity: BATCH_KEYS[quantity].unit for quantity in UNITS}
"""Units in which everything is written."""

ASCII_UNITS = {
    UNIT_NAMES[quantity]: unit.replace("Å", "Angstrom").replace("·", "*") for quantity, unit in PACKAGE_UNITS.items()
}
"""Attributes that state them in text files."""

ATTRIBUTES_MEMBER = "attributes.npy"
"""Member of an NPZ file that holds the attributes as JSON."""

PIECE_ATOMS = 2**18
"""Atoms read and written at a time."""

CHUNK_CACHE_BYTES = 2**26
"""Memory for the decompressed chunks of an input."""


# --------------------------------------------------------------------------------------------------
# parts: inputs as arrays on disk
# --------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """An input as an HDF5 file with a group per number of atoms.

    Attributes
    ----------
    path : Path
        Where the arrays lie.
    name : str
        What the user calls it.
    sizes : dict of int to int
        Molecules for each number of atoms.
    groups : dict of int to str
        Names of the groups.
    arrays : dict of int to dict of str to ArrayType
        What is in them, in the file's units.
    attributes : dict
        About the dataset, without units.
    factors : dict of str to float
        To the units of the package.
    dropped : set of str
        Arrays of the file that are left out.
    """

    path: Path
    name: str
    sizes: dict[int, int]
    groups: dict[int, str]
    arrays: dict[int, dict[str, ArrayType]]
    attributes: dict[str, Any]
    factors: dict[str, float]
    dropped: set[str]

    def rows(self, n_atoms: int, keys: Sequence[str], step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the rows of a group, ``step`` at a time, in the units of the package; text as str."""
        with h5py.File(self.path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES) as file:
            group = file[self.groups[n_atoms]]
            for first in range(0, self.sizes[n_atoms], step):
                where = self.where(n_atoms, first)
                try:
                    piece = {key: group[key][first : first + step] for key in keys}
                except OSError as error:
                    raise DatasetError(f"{where}: cannot be read ({error}). Copy it anew.") from error
                yield {key: self._converted(key, values, where) for key, values in piece.items()}

    def _converted(self, key: str, values: np.ndarray, where: str) -> np.ndarray:
        """Values from the file as this machine and the package have them."""
        if values.dtype.kind in "OSU":
            try:
                texts = [text.decode() if isinstance(text, bytes) else str(text) for text in values.ravel().tolist()]
            except UnicodeDecodeError as error:
                raise DatasetError(f"{where} or later: {key} is not text in UTF-8") from error
            result = np.empty(values.size, object)
            result[:] = texts
            return result.reshape(values.shape)
        if key in self.factors:
            converted = values * np.float64(self.factors[key])
            return converted if key == "energy" or values.dtype.kind != "f" else converted.astype(values.dtype)
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def where(self, n_atoms: int, row: int) -> str:
        """Name of a molecule, for messages."""
        return f"{self.name}: group {self.groups[n_atoms]}: row {row}"


def open_part(path: Path, name: str, units: Mapping[str, str], drop: frozenset[str] = frozenset()) -> Part:
    """Look at an HDF5 file.

    Parameters
    ----------
    path, name : Path, str
        The file, and what the user calls it.
    units : mapping of str to str
        Units of a file that does not state them.
    drop : frozenset of str
        Arrays to leave out.

    Raises
    ------
    DatasetError
        Not a dataset, or its units are unknown or contradict ``units``.
    """
    try:
        sizes = SizeGroupedDataset(path, cache_bytes=2**63).sizes  # checks the structure; reads no data
    except (DatasetError, FileNotFoundError) as error:
        raise type(error)(str(error).replace(str(path), name)) from error
    groups: dict[int, str] = {}
    arrays: dict[int, dict[str, ArrayType]] = {}
    dropped: set[str] = set()
    with h5py.File(path, "r") as file:
        attributes = dict(file.attrs)
        for group_name in file:
            n_atoms = int(group_name)
            if n_atoms in sizes:
                groups[n_atoms] = group_name
                found = {key: array_type(dataset) for key, dataset in file[group_name].items()}
                arrays[n_atoms] = {key: kind for key, kind in found.items() if key not in drop}
                dropped.update(drop & found.keys())
    named = {q: attribute_text(attributes.pop(name)) for q, name in UNIT_NAMES.items() if name in attributes}
    try:
        stated = joined_units(named, units)
        factors = unit_factors(stated, {key for group in arrays.values() for key in group})
    except ValueError as error:
        raise DatasetError(f"{name}: {error}") from error
    if factors:
        attributes.pop("units", None)  # words about units that are no longer true
    return Part(path, name, sizes, groups, arrays, attributes, factors, dropped)


def attribute_text(value: Any) -> str:
    """An attribute of HDF5 as text."""
    return value.decode() if isinstance(value, bytes) else str(value)


def spool_frames(frames: Iterable[Frame], reader: FrameReader, path: Path, name: str) -> Part:
    """Read frames into the temporary file ``path``, a few at a time; ``name`` is what the user calls the input."""
    with h5py.File(path, "w") as file:
        spool = Spool(file)
        for frame in frames:
            spool.add(frame.where, reader.row(frame))
        spool.finish()
    return open_part(path, name, {})


def spool_npz(source: Path, path: Path, units: Mapping[str, str], drop: frozenset[str]) -> Part:
    """Unpack an NPZ file with members such as ``003/coord`` into a temporary HDF5 file.

    Raises
    ------
    DatasetError
        Not such a file, or an array does not fit its group.
    """
    try:
        with zipfile.ZipFile(source) as archive, h5py.File(path, "w") as file:
            _unpack(archive, file, source)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DatasetError(f"{source}: not an NPZ file, or damaged ({error}). Copy it anew.") from error
    return open_part(path, str(source), units, drop)


def _unpack(archive: zipfile.ZipFile, file: h5py.File, source: Path) -> None:
    if ATTRIBUTES_MEMBER in archive.namelist():
        with archive.open(ATTRIBUTES_MEMBER) as stream:
            file.attrs.update(json.loads(str(np.lib.format.read_array(stream))))
    for n_atoms, keys in _members(archive, source).items():
        with contextlib.ExitStack() as stack:
            arrays = {k: _Stream(stack.enter_context(archive.open(m)), f"{source}: {m}") for k, m in keys.items()}
            n_molecules = arrays["numbers"].rows
            for key, array in arrays.items():
                if array.rows != n_molecules:
                    raise DatasetError(
                        f"{source}: group {n_atoms:03d}: {key} has {array.rows} rows, numbers {n_molecules}"
                    )
            if not n_molecules:
                continue
            writer = DatasetWriter(file, source, {n_atoms: n_molecules}, None)
            step = piece_rows(n_atoms)
            for first in range(0, n_molecules, step):
                count = min(step, n_molecules - first)
                writer.write(n_atoms, first, {key: array.read(count) for key, array in arrays.items()})


def _members(archive: zipfile.ZipFile, source: Path) -> dict[int, dict[str, str]]:
    """Number of atoms -> key -> member, for all members but the attributes."""
    members: dict[int, dict[str, str]] = {}
    for member in archive.namelist():
        name = member.removesuffix(".npy")
        group, _, key = name.partition("/")
        if group.isdigit() and int(group) > 0 and key and "/" not in key:
            members.setdefault(int(group), {})[key] = member
        elif member != ATTRIBUTES_MEMBER:
            raise DatasetError(f"{source}: {name}: expected names such as 003/coord")
    for n_atoms, keys in members.items():
        if "numbers" not in keys:
            raise DatasetError(f"{source}: group {n_atoms:03d}: numbers missing")
    return members


class _Stream:
    """Rows of a member of an NPZ file, one after the other."""

    def __init__(self, stream: Any, where: str) -> None:
        try:
            version = np.lib.format.read_magic(stream)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            self.shape, fortran, self.dtype = read_header[version](stream)
        except (ValueError, KeyError) as error:
            raise DatasetError(f"{where}: not an array of numpy ({error})") from error
        if self.dtype.kind not in "biufSU" or not self.shape or (fortran and len(self.shape) > 1):
            raise DatasetError(
                f"{where}: {self.dtype} {self.shape}{' in Fortran order' if fortran else ''} cannot be read. Save "
                "numbers or text (not objects), one row per molecule, in C order."
            )
        self.rows = self.shape[0]
        self._stream, self._where = stream, where

    def read(self, count: int) -> np.ndarray:
        shape = (count, *self.shape[1:])
        wanted = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        data = self._stream.read(wanted)
        if len(data) != wanted:
            raise DatasetError(f"{self._where}: is cut off. Copy the file anew.")
        return np.frombuffer(data, self.dtype).reshape(shape)


# --------------------------------------------------------------------------------------------------
# parts -> joined groups
# --------------------------------------------------------------------------------------------------


def piece_rows(n_atoms: int) -> int:
    """Molecules of a size that are handled at a time."""
    return max(1, PIECE_ATOMS // n_atoms)


class Merger:
    """The molecules of several parts as one dataset, piece by piece.

    Rows of a group are those of the first part, then those of the second, and so on.

    Parameters
    ----------
    parts : sequence of Part
        The inputs, in their order.
    default_mult : str or None
        As in `filled_mult`; used where a group has multiplicities of some molecules only, or if it is given.
    dtype : str or None
        Type for all real numbers of the layout except energies; None keeps that of the input.
    attributes : mapping of str to str
        Attributes that the user gives.

    Attributes
    ----------
    sizes : dict of int to int
        Molecules for each number of atoms, ascending.
    types : dict of int to dict of str to ArrayType
        Arrays of each group; axes beyond the first are given in full.
    attributes : dict
        Of the user, of all parts as far as they agree, and the units.
    dropped_attributes : list of str
        Names of attributes that the parts do not agree on.
    labels : collections.Counter
        Label -> molecules that have it, counted as the pieces are handed out; each array should be asked for once.
    filled_mults : int
        Molecules that have been given a multiplicity, counted likewise.

    Raises
    ------
    DatasetError
        Parts that cannot be joined.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        default_mult: str | None = None,
        dtype: str | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        self.parts = list(parts)
        self.default_mult = default_mult
        self.labels: Counter[str] = Counter()
        self.filled_mults = 0
        sizes: Counter[int] = Counter()
        for part in parts:
            sizes.update(part.sizes)
        self.sizes = dict(sorted(sizes.items()))
        self.types = {n_atoms: self._joined_types(n_atoms, dtype) for n_atoms in self.sizes}
        given = dict(attributes or {})
        common = [k for k, v in parts[0].attributes.items() if all(_same(p.attributes.get(k), v) for p in parts)]
        everywhere = {name for part in parts for name in part.attributes}
        self.dropped_attributes = sorted(everywhere.difference(common, given))
        keys = {key for group in self.types.values() for key in group}
        units = {UNIT_NAMES[quantity]: unit for quantity, unit in PACKAGE_UNITS.items() if quantity in keys}
        self.attributes = {**{name: parts[0].attributes[name] for name in common}, **given, **units}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def _joined_types(self, n_atoms: int, dtype: str | None) -> dict[str, ArrayType]:
        parts = [part for part in self.parts if n_atoms in part.sizes]
        keys = dict.fromkeys(key for part in parts for key in part.arrays[n_atoms])
        if self.default_mult is not None:
            keys["mult"] = None
        types = {}
        for key in keys:
            kind = _joined_type(key, n_atoms, parts)
            if dtype is not None and key in LAYOUT_KEYS and key != "energy" and kind.dtype.kind == "f":
                kind = kind._replace(dtype=np.dtype(dtype))
            types[key] = kind
        return types

    def pieces(self, n_atoms: int, keys: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield the first row and the arrays (k, ...) of each piece of a group.

        Parameters
        ----------
        n_atoms : int
            The group.
        keys : sequence of str, optional
            Arrays wanted; default: all.
        """
        types = self.types[n_atoms]
        keys = list(types) if keys is None else list(keys)
        first = 0
        for part in self.parts:
            if n_atoms not in part.sizes:
                continue
            wanted = dict.fromkeys((*keys, "numbers", *(("charge",) if "mult" in keys else ())))
            begin = first
            present = [key for key in wanted if key in part.arrays[n_atoms]]
            for piece in part.rows(n_atoms, present, piece_rows(n_atoms)):
                self._check(part, n_atoms, first - begin, piece)
                arrays = {}
                for key in keys:
                    if key == "mult":
                        values = self._mult(part, n_atoms, first - begin, piece)
                    else:
                        values = piece[key] if key in piece else _blanks(len(piece["numbers"]), types[key])
                    arrays[key] = values.astype(types[key].dtype, copy=False)
                    if key in LABEL_KEYS:
                        self.labels[key] += int((~missing_rows(arrays[key])).sum())
                yield first, arrays
                first += len(piece["numbers"])

    def _mult(self, part: Part, n_atoms: int, first: int, piece: Mapping[str, np.ndarray]) -> np.ndarray:
        mult = np.array(piece.get("mult", np.full(len(piece["numbers"]), np.nan)), np.float64)
        missing = np.isnan(mult)
        if not missing.any():
            return mult
        try:
            mult[missing] = filled_mult(piece["numbers"][missing], piece["charge"][missing], self.default_mult)
            self.filled_mults += int(missing.sum())
        except RowError as error:
            row = int(np.flatnonzero(missing)[error.row])
            raise DatasetError(f"{part.where(n_atoms, first + row)}: {error}") from error
        return mult

    @staticmethod
    def _check(part: Part, n_atoms: int, first: int, piece: Mapping[str, np.ndarray]) -> None:
        """Refuse what must not be in a dataset."""
        checks = {
            "coord": (lambda x: np.isfinite(x), "is NaN or infinite. Remove the molecule."),
            "numbers": (lambda x: (x >= 1) & (x <= MAX_ATOMIC_NUMBER), f"must be 1 to {MAX_ATOMIC_NUMBER}."),
            "energy": (lambda x: ~np.isinf(x), "is infinite. Remove the molecule."),
        }
        for key, (is_good, message) in checks.items():
            if key in piece:
                good = is_good(piece[key]).reshape(len(piece[key]), -1).all(axis=1)
                if not good.all():
                    raise DatasetError(f"{part.where(n_atoms, first + int(np.argmin(good)))}: {key} {message}")


def _joined_type(key: str, n_atoms: int, parts: Sequence[Part]) -> ArrayType:
    """Type of an array that holds the rows of all parts of a group, in the units of the package.

    A label that a part lacks becomes NaN there, and a multiplicity is filled in; anything else must be everywhere.
    """
    have = [part for part in parts if key in part.arrays[n_atoms]]
    if not have:
        return ArrayType(np.dtype(np.float64))
    kinds = [part.arrays[n_atoms][key] for part in have]
    lacking = [part for part in parts if key not in part.arrays[n_atoms]]
    where = f"{have[0].name}: group {n_atoms:03d}: {key}"
    for part, kind in zip(have, kinds, strict=True):
        if (kind.is_text, kind.trailing) != (kinds[0].is_text, kinds[0].trailing):
            raise DatasetError(
                f"{where} ({kinds[0].dtype}, {kinds[0].trailing}) does not fit that of {part.name} "
                f"({kind.dtype}, {kind.trailing}). Leave it out: --drop {key}"
            )
    joined = kinds[0].dtype if kinds[0].is_text else np.result_type(*(kind.dtype for kind in kinds))
    if lacking and key == "cell":
        raise DatasetError(f"{where} is there, but not in {lacking[0].name}. Convert periodic structures apart.")
    if lacking and joined.kind in "biu" and key != "mult":
        if key not in LABEL_KEYS:
            raise DatasetError(
                f"{where} is there, but not in {lacking[0].name}, and {joined} cannot be missing. "
                f"Leave it out: --drop {key}"
            )
        joined = np.dtype(np.float64)
    if (key == "energy" or joined.kind in "iu") and any(key in part.factors for part in have):
        joined = np.dtype(np.float64)
    return ArrayType(joined, kinds[0].trailing)


def _same(a: Any, b: Any) -> bool:
    return a is not None and bool(np.array_equal(a, b))


def _blanks(count: int, kind: ArrayType) -> np.ndarray:
    return np.full((count, *kind.trailing), "" if kind.is_text else np.nan, kind.dtype)


# --------------------------------------------------------------------------------------------------
# joined groups -> files
# --------------------------------------------------------------------------------------------------


Progress: TypeAlias = Callable[[int], object]
"""Called with the number of molecules that have just been written."""


def write_hdf5(merger: Merger, output: Path, progress: Progress, compression: str | None = None) -> None:
    """Write a dataset file; arrays in one piece unless they are compressed."""
    with dataset_writer(output, merger.sizes, merger.attributes, compression) as writer:
        for n_atoms in merger.sizes:
            for first, arrays in merger.pieces(n_atoms):
                writer.write(n_atoms, first, arrays)
                progress(len(arrays["numbers"]))


def write_npz(merger: Merger, output: Path, progress: Progress) -> None:
    """Write an NPZ file with members ``003/coord`` ..., and ``attributes`` as JSON."""
    attributes = {name: _json_value(value) for name, value in merger.attributes.items()}
    with atomic_path(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(ATTRIBUTES_MEMBER, "w") as stream:
            np.lib.format.write_array(stream, np.array(json.dumps(attributes)))
        for n_atoms, n_molecules in merger.sizes.items():
            for key, kind in merger.types[n_atoms].items():
                pieces = merger.pieces(n_atoms, (key,))
                dtype = kind.dtype
                if kind.is_text:  # numpy wants to know the longest one first
                    texts = np.concatenate([arrays[key] for _, arrays in pieces]).astype(str)
                    dtype, pieces = texts.dtype, iter([(0, {key: texts})])
                with archive.open(f"{n_atoms:03d}/{key}.npy", "w", force_zip64=True) as stream:
                    descr, shape = np.lib.format.dtype_to_descr(dtype), (n_molecules, *kind.trailing)
                    header = {"descr": descr, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                    for _, arrays in pieces:
                        stream.write(arrays[key].tobytes())
            progress(n_molecules)


def write_extxyz(merger: Merger, output: Path, progress: Progress) -> None:
    """Write extended XYZ, ordered by number of atoms, then row; labels that a molecule lacks are left out."""
    attributes = text_attributes(merger, line_breaks=False)
    with atomic_path(output) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for n_atoms in merger.sizes:
            types = brief_types(merger.types[n_atoms])
            for first, arrays in merger.pieces(n_atoms):
                write_frames(file, arrays, ATOM_KEYS, types, attributes, f"{output}: group {n_atoms:03d}", first)
                progress(len(arrays["numbers"]))


def brief_types(types: Mapping[str, ArrayType]) -> dict[str, ArrayType]:
    """Types of a group as a frame states them; refuses what a frame cannot hold.

    Raises
    ------
    ValueError
        Names with blanks or signs, complex numbers, text with more than one entry for each molecule.
    """
    for key, kind in types.items():
        check_name(key)
        if kind.dtype.kind not in "biufO" or (kind.dtype.kind == "f" and kind.dtype.itemsize not in DIGITS):
            raise ValueError(f"{key} holds {kind.dtype}, which files of structures cannot. Leave it out: --drop {key}")
        if kind.is_text and kind.trailing:
            raise ValueError(f"{key} holds several texts for each molecule. Leave it out: --drop {key}")
    return {key: kind._replace(trailing=()) if key in LAYOUT_KEYS else kind for key, kind in types.items()}


def text_attributes(merger: Merger, line_breaks: bool) -> dict[str, str]:
    """Attributes as text, as a frame can hold them; a warning names those that it cannot."""
    arrays = {key for group in merger.types.values() for key in group}
    attributes = {}
    for name, value in merger.attributes.items():
        text = ASCII_UNITS.get(name, attribute_text(value))
        try:
            check_name(name)
        except ValueError:
            logger.warning(f"attribute {name!r} is not written: blanks and signs in its name")
            continue
        if name in arrays or (not line_breaks and len(text.splitlines()) > 1):
            reason = "the name of an array" if name in arrays else "a line break"
            logger.warning(f"attribute {name} is not written: it has {reason}")
            continue
        attributes[name] = text
    return attributes


def _json_value(value: Any) -> Any:
    """An attribute of HDF5 as JSON knows it."""
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
