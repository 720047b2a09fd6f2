"""Structures as text: extended XYZ, read and written so that every number comes back bit for bit.

::

    3
    Properties=species:S:1:pos:R:3:forces:R:3 energy=-2077.4 charge=0 mult=1 pbc="F F F"
    O 0 0 0.119 0 0 -0.021
    H 0 0.763 -0.477 0 -0.008 0.01
    H 0 -0.763 -0.477 0 0.008 0.01

Reading takes one frame at a time and leaves the values of the comment line as text: `aimnet2mult.data.frames` decides
what they mean. Writing takes arrays as `aimnet2mult.data.convert` hands them out and adds two entries that other
programs ignore: the types of the arrays (`ARRAYS_KEY`), since text does not tell 0.1 in single precision from 0.1 in
double precision, and the names of those entries that describe the whole dataset (`ATTRIBUTES_KEY`). ASE databases carry
both, too.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from aimnet2mult.constants import ELEMENT_SYMBOLS

ARRAYS_KEY = "aimnet2mult_arrays"
"""Entry of the comment line that lists the arrays of the structure: ``coord:float32 energy:float64 name:text ...``."""

ATTRIBUTES_KEY = "aimnet2mult_attributes"
"""Entry of the comment line that lists the names of entries that are attributes of the dataset."""

ATOMIC_NUMBERS = {symbol: z for z, symbol in enumerate(ELEMENT_SYMBOLS) if z}
"""Element symbol -> atomic number."""

STANDARD_COLUMNS = "species:S:1:pos:R:3"
"""Columns of a file that does not name them."""

NAMES_OF_COLUMNS = {"charge": "charges"}
"""Names of columns that ASE writes or reads under another name than the array's."""

DIGITS = {2: "%.5g", 4: "%.9g", 8: "%.17g"}
"""Bytes of a real number -> the format that gives each number of this type back exactly."""

_ENTRY = re.compile(
    r"""("(?:[^"\\]|\\.)*"|[^\s="']+)  # name
    (?:\s*=\s*(                        # value: "quoted", 'quoted', {braced}, [bracketed, also [nested]], or a word
        "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | \{[^{}]*\} | \[(?:[^\[\]]|\[[^\[\]]*\])*\] | \S*
    ))?""",
    re.VERBOSE,
)


class StructureError(ValueError):
    """A structure that cannot be used; the message names file and frame."""


class Frame(NamedTuple):
    """One structure as a file of structures holds it, in the units of the file.

    Attributes
    ----------
    where : str
        File and frame, for messages; frames count from 0.
    numbers : numpy.ndarray
        (N,) int, atomic numbers.
    coord : numpy.ndarray
        (N, 3) float64.
    info : dict
        Values of the structure by name: text, or what ASE made of it.
    arrays : dict of str to numpy.ndarray
        Values of the atoms by name, (N,) or (N, k).
    cell : numpy.ndarray or None
        (3, 3), lattice vectors in rows; None if the structure is not periodic.
    """

    where: str
    numbers: np.ndarray
    coord: np.ndarray
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]
    cell: np.ndarray | None


# --------------------------------------------------------------------------------------------------
# reading
# --------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    name: str
    kind: str  # R, I, S or L
    first: int
    width: int


def parse_comment(line: str) -> dict[str, str]:
    r"""Entries of a comment line: ``a=1 b="x y" c`` -> ``{"a": "1", "b": "x y", "c": "T"}``.

    Inside quotes ``\"`` is a quote and ``\\`` a backslash; any other backslash stands for itself, as in SMILES.
    """
    entries = {}
    for match in _ENTRY.finditer(line):
        name, value = match.groups()
        entries[_unquoted(name)] = "T" if value is None else _unquoted(value)
    return entries


def _unquoted(text: str) -> str:
    if len(text) >= 2 and text[0] + text[-1] in ('""', "''", "{}", "[]"):
        inner = text[1:-1]
        return re.sub(r'\\(["\'\\])', r"\1", inner) if "\\" in inner else inner
    return text


@lru_cache(maxsize=64)
def _columns(properties: str) -> tuple[tuple[_Column, ...], int]:
    """Columns that ``Properties`` names, and how many words a line has."""
    fields = properties.split(":")
    columns, first = [], 0
    if len(fields) % 3:
        raise ValueError(f"Properties={properties} is not a list of name:type:columns")
    for name, kind, width in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
        if kind not in ("R", "I", "S", "L") or not width.isdigit() or int(width) < 1:
            raise ValueError(
                f"Properties={properties}: {name}:{kind}:{width} is not name:type:columns with type R, I, S, L"
            )
        columns.append(_Column(name, kind, first, int(width)))
        first += int(width)
    names = [column.name for column in columns]
    if "pos" not in names or not {"species", "Z"}.intersection(names):
        raise ValueError(f"Properties={properties} names no {'species' if 'pos' in names else 'pos'}")
    if columns[names.index("pos")][1::2] != ("R", 3):
        raise ValueError(f"Properties={properties}: pos must be pos:R:3")
    return tuple(columns), first


TRUTH = {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}
"""Spellings of truth values, in small letters."""


def truth(word: str) -> bool:
    """Whether a word of `TRUTH` stands for true."""
    if word.lower() not in TRUTH:
        raise ValueError(f"{word!r} is neither T nor F")
    return TRUTH[word.lower()]


_CONVERTERS: dict[str, Callable[[str], Any]] = {"R": float, "I": int, "L": truth, "S": str}


def _element(word: str) -> int:
    """Atomic number of a symbol (``Cl``, ``CL``) or of a number."""
    z = int(word) if word.isdigit() else ATOMIC_NUMBERS.get(word.capitalize(), 0)
    if not 0 < z < len(ELEMENT_SYMBOLS):
        raise ValueError(f"{word!r} is not an element")
    return z


def _atoms(lines: Sequence[str], columns: Sequence[_Column], width: int) -> dict[str, np.ndarray]:
    """Arrays of the atoms by the names of their columns; `_AtomLineError` names a line that does not fit."""
    rows = [line.split() for line in lines]
    for i, row in enumerate(rows):
        if len(row) != width:
            raise _AtomLineError(
                i, f"has {len(row)} words, but Properties names {width} columns (without Properties: element, x, y, z)"
            )
    words = list(zip(*rows, strict=True))
    arrays = {}
    for name, kind, first, count in columns:
        part = words[first : first + count]
        try:
            if name in ("species", "Z"):
                values = np.array([ATOMIC_NUMBERS.get(word) or _element(word) for word in part[0]], np.int32)
            else:
                values = np.array([list(map(_CONVERTERS[kind], column)) for column in part])
                values = values[0] if count == 1 else values.T
        except ValueError as error:
            raise _AtomLineError(_first_wrong(part, name, kind), f"{name}: {error}") from error
        arrays[NAMES_OF_COLUMNS.get(name, name)] = values
    return arrays


class _AtomLineError(ValueError):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _first_wrong(part: Sequence[Sequence[str]], name: str, kind: str) -> int:
    convert = _element if name in ("species", "Z") else _CONVERTERS[kind]
    for i, words in enumerate(zip(*part, strict=True)):
        try:
            for word in words:
                convert(word)
        except ValueError:
            return i
    raise AssertionError("every word can be read")


def read_extxyz(path: str | Path) -> Iterator[Frame]:
    """Yield the frames of an (extended) XYZ file, one at a time.

    Parameters
    ----------
    path : str or Path
        The file, UTF-8. Plain XYZ files are read, too; their comment is split into words.

    Raises
    ------
    StructureError
        Not an XYZ file, or cut off, or a line that does not fit ``Properties``; the message names frame and line.
    """
    number = 0
    index = -1
    try:
        with open(path, encoding="utf-8-sig") as file:
            while line := file.readline():
                number += 1
                if not line.strip():
                    continue
                index += 1
                where = f"{path}: frame {index}"
                if not line.strip().isdecimal():
                    raise StructureError(
                        f"{where}: line {number} should be the number of atoms, found {line.strip()[:40]!r}"
                    )
                n_atoms = int(line)
                if n_atoms == 0:
                    raise StructureError(f"{where}: has 0 atoms. Remove the structure.")
                comment = file.readline()
                lines = list(islice(file, n_atoms))
                if len(lines) < n_atoms:
                    raise StructureError(f"{where}: the file ends after {len(lines)} of {n_atoms} atoms. Copy it anew.")
                yield _frame(where, comment, lines, number)
                number += 1 + n_atoms
    except UnicodeDecodeError as error:
        raise StructureError(f"{path}: not a text file in UTF-8 ({error.reason} near frame {index + 1})") from error
    if index < 0:
        raise StructureError(f"{path}: holds no structures")


def _frame(where: str, comment: str, lines: Sequence[str], number: int) -> Frame:
    """The frame whose first line is line ``number`` of its file."""
    info: dict[str, Any] = parse_comment(comment)
    try:
        columns, width = _columns(info.pop("Properties", STANDARD_COLUMNS))
        arrays = _atoms(lines, columns, width)
        cell = periodic_cell(info)
    except _AtomLineError as error:
        raise StructureError(f"{where}: line {number + 2 + error.line}: {error}") from error
    except ValueError as error:
        raise StructureError(f"{where}: line {number + 1}: {error}") from error
    numbers = arrays.pop("Z", None)
    species = arrays.pop("species", None)
    numbers = species if numbers is None else numbers
    assert numbers is not None
    return Frame(where, numbers, arrays.pop("pos"), info, arrays, cell)


def periodic_cell(info: dict[str, Any]) -> np.ndarray | None:
    """Take ``Lattice`` and ``pbc`` out of the entries; (3, 3) lattice vectors, None if not periodic.

    A lattice without periodicity stays among the entries.
    """
    periodic = info.pop("pbc", "T" if "Lattice" in info else "F").replace(",", " ").split()
    directions = [truth(word) for word in (periodic * 3 if len(periodic) == 1 else periodic)]
    if not any(directions):
        return None
    vectors = reals(info.pop("Lattice", ""))
    if vectors.size != 9:
        raise ValueError(f"a periodic structure needs a Lattice of 9 numbers, found {vectors.size}")
    check_periodic(directions)
    return vectors.reshape(3, 3)


def check_periodic(directions: Sequence[bool]) -> None:
    """Refuse structures that are periodic in one or two directions only."""
    if not all(directions):
        found = " ".join("T" if direction else "F" for direction in directions)
        raise ValueError(f"pbc is {found}; only structures that are periodic in all directions or none are supported")


JSON_PREFIX = "_JSON "
"""How ASE marks lists and nested arrays."""


def reals(text: str) -> np.ndarray:
    """Numbers in a text, separated by blanks or commas, (k,) float64, or as JSON."""
    try:
        if text.startswith(JSON_PREFIX):
            return np.asarray(json.loads(text.removeprefix(JSON_PREFIX)), np.float64)
        return np.array([float(word) for word in text.replace(",", " ").split()], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text[:60]!r} should be numbers") from error


# --------------------------------------------------------------------------------------------------
# types of arrays as text
# --------------------------------------------------------------------------------------------------


class ArrayType(NamedTuple):
    """Type of an array, and its axes beyond that of the molecules unless the key alone tells them."""

    dtype: np.dtype[Any]  # object: text
    trailing: tuple[int, ...] = ()

    @property
    def is_text(self) -> bool:
        """One string for each molecule."""
        return self.dtype.kind == "O"


def describe_arrays(arrays: Mapping[str, ArrayType]) -> str:
    """Text for `ARRAYS_KEY`: ``coord:float32 mol_id:text moments:float64:4x3``."""
    words = []
    for key, kind in arrays.items():
        shape = "x".join(map(str, kind.trailing))
        words.append(f"{key}:{'text' if kind.is_text else kind.dtype.name}" + (f":{shape}" if shape else ""))
    return " ".join(words)


@lru_cache(maxsize=1024)
def parse_arrays(text: str) -> dict[str, ArrayType]:
    """Undo `describe_arrays`."""
    arrays = {}
    for word in text.split():
        key, name, shape = (*word.split(":"), "", "")[:3]
        try:
            dtype = np.dtype(object if name == "text" else name)
            arrays[key] = ArrayType(dtype, tuple(map(int, shape.split("x"))) if shape else ())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{ARRAYS_KEY}: {word!r} is not name:type or name:type:shape") from error
    return arrays


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------


def write_frames(
    file: TextIO,
    arrays: Mapping[str, np.ndarray],
    atom_keys: Sequence[str],
    types: Mapping[str, ArrayType],
    attributes: Mapping[str, str],
    where: str,
    first: int = 0,
) -> None:
    """Append molecules of one size to a file; labels that are NaN are left out.

    Parameters
    ----------
    file : TextIO
        The file, open for writing.
    arrays : mapping of str to numpy.ndarray
        (k, ...) for each key; ``coord`` (k, N, 3) and ``numbers`` (k, N) among them.
    atom_keys : sequence of str
        Those that hold values of atoms; they become columns.
    types : mapping of str to ArrayType
        Types of all arrays.
    attributes : mapping of str to str
        About the dataset; written with each frame, so that frames may be moved to other files.
    where, first : str, int
        File and group, and number of the first row, for messages.

    Raises
    ------
    StructureError
        Text with a line break, which a frame cannot hold.
    """
    numbers, n_atoms = arrays["numbers"], arrays["numbers"].shape[1]
    of_atoms = ["coord", *(key for key in atom_keys if key in arrays and key not in ("coord", "numbers"))]
    of_frames = [key for key in arrays if key not in ("coord", "numbers", "cell", *atom_keys)]
    for key in of_frames:
        if arrays[key].dtype.kind == "O":
            _check_lines(key, arrays[key].tolist(), where, first)
    about = [f"{ARRAYS_KEY}={_quoted(describe_arrays(types))}"]
    if attributes:
        about.append(f"{ATTRIBUTES_KEY}={_quoted(' '.join(attributes))}")
        about += [f"{name}={_quoted(value)}" for name, value in attributes.items()]
    missing = {key: missing_rows(values) for key, values in arrays.items()}
    for row in range(len(numbers)):
        present = {key: values[row] for key, values in arrays.items() if not missing[key][row]}
        columns = {key: present[key].reshape(n_atoms, -1) for key in of_atoms if key in present}
        entries = [f"Properties={_properties(columns)}"]
        entries += [f"{key}={_entry(key, present[key])}" for key in of_frames if key in present]
        entries.append(f'Lattice="{_as_words(arrays["cell"][row])}" pbc="T T T"' if "cell" in arrays else 'pbc="F F F"')
        file.write(f"{n_atoms}\n{' '.join(entries + about)}\n")
        line = " ".join(["%s", *(_number_format(x) for x in columns.values() for _ in range(x.shape[1]))]) + "\n"
        symbols = [ELEMENT_SYMBOLS[z] for z in numbers[row].tolist()]
        atoms = zip(symbols, *(words for column in columns.values() for words in column.T.tolist()), strict=True)
        file.write("".join([line % atom for atom in atoms]))


def _check_lines(key: str, texts: Sequence[str], where: str, first: int) -> None:
    """Refuse text that does not fit on one line."""
    for row, text in enumerate(texts):
        if "\n" in text or "\r" in text:
            raise StructureError(
                f"{where}: row {first + row}: {key} has a line break, which extxyz cannot hold. Write .npz or .db, or "
                f"leave it out: --drop {key}"
            )


def _properties(columns: Mapping[str, np.ndarray]) -> str:
    """``species:S:1:pos:R:3:charges:R:1`` for columns (N, k) of numbers; positions are the standard ones."""
    further = [
        f":{key}:{'R' if values.dtype.kind == 'f' else 'I'}:{values.shape[1]}"
        for key, values in columns.items()
        if key != "coord"
    ]
    return STANDARD_COLUMNS + "".join(further)


def check_name(name: str) -> None:
    """Refuse names of arrays and attributes that a comment line cannot hold."""
    if not name or any(c.isspace() or c in "=:\"'\\{}[]," for c in name) or name in ("Properties", "Lattice", "pbc"):
        raise ValueError(f"{name!r} cannot be the name of an array or attribute. Use letters, digits, _ and -.")


def missing_rows(values: np.ndarray) -> np.ndarray:
    """(k, ...) -> (k,) bool: real numbers all NaN, or empty text."""
    if values.dtype.kind == "f":
        return np.isnan(values).reshape(len(values), -1).all(axis=1)
    if values.dtype.kind == "O":
        return np.array([text == "" for text in values], bool)
    return np.zeros(len(values), bool)


def _number_format(values: np.ndarray) -> str:
    return DIGITS[values.dtype.itemsize] if values.dtype.kind == "f" else "%d"


def _as_words(values: np.ndarray) -> str:
    flat = values.ravel()
    return " ".join([_number_format(flat)] * flat.size) % tuple(flat.tolist())


def _entry(key: str, value: Any) -> str:
    """Value of one molecule as text for the comment line."""
    if isinstance(value, str):
        return _quoted(value)
    array = np.asarray(value)
    if key == "stress":
        array = array.T  # column by column, as the format wants it of this key
    text = " ".join("FT"[x] for x in array.ravel().tolist()) if array.dtype.kind == "b" else _as_words(array)
    return text if array.size == 1 else _quoted(text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
