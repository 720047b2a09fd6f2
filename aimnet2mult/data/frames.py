"""From structures, as text or as ASE has them, to arrays: which value is which label, and in what unit.

`FrameReader` finds the labels of a `Frame` and turns them into a row in the units of the package, as `FrameRules` (the
options of the command line) say. `Spool` collects rows into a temporary HDF5 file with a group per number of atoms, so
that memory does not grow with their number and each file is read once. The rules about units and multiplicities that
hold for arrays, too, stand at the top. Files are read elsewhere (`aimnet2mult.data.extxyz` and
`aimnet2mult.tools.convert_data`), and the temporary files joined and written in `aimnet2mult.data.convert`.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.data.extxyz import (
    ARRAYS_KEY,
    ATTRIBUTES_KEY,
    JSON_PREFIX,
    ArrayType,
    Frame,
    StructureError,
    check_name,
    parse_arrays,
    reals,
    truth,
)
from aimnet2mult.data.sgdataset import OPTIONAL_KEYS, REQUIRED_KEYS, UNIT_SUFFIX, expected_shape
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.utils.units import UNITS, unit_factor, unit_name

LAYOUT_KEYS = (*REQUIRED_KEYS, *OPTIONAL_KEYS)
"""Arrays whose shape the layout fixes."""

ATOM_KEYS = tuple(key for key in LAYOUT_KEYS if BATCH_KEYS[key].kind == "atom")
"""Those with a value for each atom."""

LABEL_KEYS = tuple(key for key in LAYOUT_KEYS if key not in ("coord", "numbers", "charge", "mult", "cell"))
"""Those that a molecule may lack."""

MAPPED_KEYS = ("charge", "mult", *LABEL_KEYS)
"""What a frame may hold under another name."""

DEFAULT_NAMES: dict[str, tuple[str, ...]] = {
    **{key: (key,) for key in LABEL_KEYS},
    "charge": ("charge", "total_charge"),
    "mult": ("mult", "multiplicity", "spin"),
}
"""Names under which a frame is searched for each key. ``spin`` is the multiplicity, as in MACE, fairchem and aimnet."""

UNIT_NAMES = {quantity: quantity + UNIT_SUFFIX for quantity in UNITS}
"""Names under which a file states its units."""

BUFFER_ATOMS = 2**17
"""Atoms of frames that are kept in memory before they go into the spool file."""

CHUNK_BYTES = 2**15
"""Size of the chunks of the spool file: small, since each array of each group takes at least one."""

WHOLE_CHARGE = 0.05
"""Charges of atoms must sum to a whole number within this, e."""


# --------------------------------------------------------------------------------------------------
# units and multiplicities
# --------------------------------------------------------------------------------------------------


def unit_factors(units: Mapping[str, str], keys: Collection[str]) -> dict[str, float]:
    """Factors to the units of the package, for those of ``keys`` that have a unit other than it.

    Parameters
    ----------
    units : mapping of str to str
        Units that are stated; what is not stated is in the unit of the package.
    keys : collection of str
        Arrays to convert.

    Raises
    ------
    ValueError
        Unknown units; forces whose unit is not stated although that of energy or length is another one than the
        package's; arrays that cannot be converted.
    """
    factors = {quantity: unit_factor(quantity, unit) for quantity, unit in units.items()}
    other = [f"{q} is in {unit_name(q, units[q])}" for q in ("coord", "energy") if factors.get(q, 1.0) != 1.0]
    if other and "forces" in keys and "forces" not in factors:
        raise ValueError(
            f"{other[0]}, but the unit of the forces is not stated. Give --force-unit, such as Hartree/Bohr or eV/Å."
        )
    if factors.get("coord", 1.0) != 1.0 and "dipole" in keys and "dipole" not in factors:
        raise ValueError(f"{other[0]}, but the unit of the dipole is not stated. Give --dipole-unit: e·Å or e·Bohr.")
    if other:
        for key in ("stress", "quadrupole", "hessian"):
            if key in keys:
                raise ValueError(f"{other[0]}; {key} cannot be converted. Leave it out with --drop {key}.")
    return {key: factor for key, factor in sorted(factors.items()) if key in keys and factor != 1.0}


def joined_units(stated: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """Units that a file states, and for the others those of the command line; a contradiction is an error."""
    units = dict(options)
    for quantity, unit in stated.items():
        name = unit_name(quantity, unit)
        if unit_name(quantity, units.get(quantity, name)) != name:
            option = f"the command line says {units[quantity]}"
            raise ValueError(f"{UNIT_NAMES[quantity]} is {name}, {option}. Leave the option out.")
        units[quantity] = name
    return units


def lowest_mult(numbers: np.ndarray, charge: np.ndarray) -> np.ndarray:
    """1 for an even number of electrons, 2 for an odd one; (..., N), (...) -> (...)."""
    electrons = numbers.sum(axis=-1) - np.rint(np.asarray(charge, np.float64))
    return 1.0 + electrons % 2.0


def filled_mult(numbers: np.ndarray, charge: np.ndarray, default: str | None) -> np.ndarray:
    """Multiplicities of molecules that do not state one.

    Parameters
    ----------
    numbers : numpy.ndarray
        (k, N) atomic numbers.
    charge : numpy.ndarray
        (k,) total charges, e.
    default : str or None
        ``lowest``, a number, or None: 1 for an even number of electrons.

    Raises
    ------
    RowError
        An odd number of electrons without a default, or a default that does not fit the number of electrons.
    """
    lowest = lowest_mult(numbers, charge)
    if default == "lowest":
        return lowest
    mult = np.full(len(numbers), 1.0 if default is None else float(default))
    wrong = (mult - lowest) % 2.0 == 1.0
    if wrong.any():
        row = int(np.argmax(wrong))
        electrons = int(numbers[row].sum() - np.rint(charge[row]))
        if default is None:
            raise RowError(
                row,
                f"no multiplicity, and {electrons} electrons cannot be a singlet. State it in the file, or give "
                "--default-mult lowest (1 or 2, as the electrons want).",
            )
        raise RowError(row, f"{electrons} electrons cannot have --default-mult {default}. Give --default-mult lowest.")
    return mult


class RowError(ValueError):
    """What is wrong with one row of an array."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


# --------------------------------------------------------------------------------------------------
# frames -> rows
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameRules:
    """How to read frames.

    Attributes
    ----------
    names : mapping of str to str
        Key of the layout -> name in the frame, where it is not that of `DEFAULT_NAMES`. A minus before that of the
        forces means that it holds gradients.
    extras : mapping of str to bool
        Further values of the structures to carry over -> whether they are text whatever they look like.
    units : mapping of str to str
        Quantity of `UNITS` -> unit, where a frame does not state it.
    default_charge : float or None
        Charge of structures that do not state it, e; None: 0, unless there are initial charges.
    default_mult : str or None
        As in `filled_mult`.
    energy_optional : bool
        Structures without energy are kept; their energy is NaN.
    drop : frozenset of str
        Keys to leave out.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, bool] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    default_charge: float | None = None
    default_mult: str | None = None
    energy_optional: bool = False
    drop: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for key in self.names:
            if key not in MAPPED_KEYS:
                raise ValueError(f"--key {key}: not an array that can be mapped; {nearest(key, MAPPED_KEYS)}")
        name = self.names.get("forces", "")
        if "grad" in name.lower() and not name.startswith("-"):
            raise ValueError(f"--key forces={name}: forces are minus the gradient. Give --key forces=-{name}")
        for key in self.extras:
            if key in LAYOUT_KEYS:
                raise ValueError(f"--extra {key}: {key} is a key of the layout; use --key {key}=NAME")
            check_name(key)
        for quantity, unit in self.units.items():
            unit_name(quantity, unit)
        for key in self.drop:
            if key in REQUIRED_KEYS:
                raise ValueError(f"--drop {key}: every dataset needs {', '.join(REQUIRED_KEYS)}")
        if self.default_mult not in (None, "lowest") and not (self.default_mult or "").isdigit():
            raise ValueError(f"--default-mult {self.default_mult}: expected lowest or a whole number such as 1")


Row = dict[str, Any]
"""One molecule: key -> array (``(N, ...)`` or ``()``), or text."""


class FrameReader:
    """Turns frames into rows, and remembers what it has seen for the report.

    Parameters
    ----------
    rules : FrameRules
        How to read.

    Attributes
    ----------
    left_out : collections.Counter
        Names of values that were not taken -> structures that have them.
    left_out_of_atoms : set of str
        Those of them with a value for each atom.
    defaults : collections.Counter
        ``charge``, ``mult`` -> structures that got the default.
    converted : dict of str to float
        Arrays that were not in the unit of the package -> factor.
    dropped : set of str
        Keys that were left out because the rules say so.
    attributes : dict of str to str or None
        About the dataset, as far as all frames agree; None before the first frame.
    """

    def __init__(self, rules: FrameRules) -> None:
        self.rules = rules
        given = dict(rules.names)
        self.forces_are_gradients = given.get("forces", "").startswith("-")
        if self.forces_are_gradients:
            given["forces"] = given["forces"][1:]
        self.names = {**DEFAULT_NAMES, **{key: (name,) for key, name in given.items()}}
        self.left_out: Counter[str] = Counter()
        self.left_out_of_atoms: set[str] = set()
        self.defaults: Counter[str] = Counter()
        self.converted: dict[str, float] = {}
        self.dropped: set[str] = set()
        self.attributes: dict[str, str] | None = None
        self._found: set[str] = set()
        self._last: Frame | None = None
        self._used: set[str] = set()  # names in the last frame that have been taken

    def row(self, frame: Frame) -> Row:
        """Labels of a frame in the units of the package.

        Raises
        ------
        StructureError
            Names file and frame, what is missing or wrong, and what would be right.
        """
        try:
            return self._row(frame)
        except ValueError as error:
            raise StructureError(f"{frame.where}: {error}") from error

    def _row(self, frame: Frame) -> Row:
        self._last = frame
        types = parse_arrays(str(frame.info[ARRAYS_KEY])) if ARRAYS_KEY in frame.info else {}
        self._used = {ARRAYS_KEY, ATTRIBUTES_KEY}
        units = self._units(frame)
        self._collect_attributes(frame)
        _check_atoms(frame)
        row: Row = {"coord": frame.coord, "numbers": frame.numbers.astype(np.int32)}
        if frame.cell is not None:
            row["cell"] = frame.cell
        for key in LABEL_KEYS:
            value = self._label(frame, key)
            if value is not None:
                row[key] = value
        if "energy" not in row and not self.rules.energy_optional and "energy" not in types:
            raise ValueError(self._no_energy(frame))
        row["charge"] = self._charge(frame)
        mult = self._mult(frame, row["charge"], required="mult" in types or not types)
        if mult is not None:
            row["mult"] = mult
        self._drop(row)
        for key, factor in unit_factors(units, row).items():
            row[key] = row[key] * factor
            self.converted[key] = factor
        for key in row:
            if key in types:
                row[key] = np.asarray(row[key], types[key].dtype)
        self._add_extras(frame, row, types)
        self._add_blanks(frame, row, types)
        self.left_out.update(name for name in (*frame.info, *frame.arrays) if name not in self._used)
        self.left_out_of_atoms.update(frame.arrays.keys() - self._used)
        return row

    def _units(self, frame: Frame) -> Mapping[str, str]:
        """Units that the frame states, and for the others those of the rules."""
        stated = {q: str(frame.info[name]) for q, name in UNIT_NAMES.items() if name in frame.info}
        self._used.update(UNIT_NAMES[quantity] for quantity in stated)
        return joined_units(stated, self.rules.units) if stated else self.rules.units

    def _collect_attributes(self, frame: Frame) -> None:
        names = str(frame.info.get(ATTRIBUTES_KEY, "")).split()
        found = {name: str(frame.info[name]) for name in names if name in frame.info}
        self._used.update(found)
        if self.attributes is None:
            self.attributes = found
        elif found != self.attributes:
            self.attributes = {k: v for k, v in self.attributes.items() if found.get(k) == v}

    def _find(self, frame: Frame, key: str) -> tuple[str, Any] | None:
        """Name and value under which a frame holds a key."""
        stores = (frame.arrays, frame.info) if key in ATOM_KEYS else (frame.info, frame.arrays)
        hits = [(name, store[name]) for name in self.names[key] for store in stores if name in store]
        if not hits:
            return None
        self._found.add(key)
        self._used.update(name for name, _ in hits)
        for name, value in hits[1:]:
            if name != hits[0][0] and not np.array_equal(_real((name, value), None), _real(hits[0], None)):
                raise ValueError(
                    f"{hits[0][0]} is {hits[0][1]} and {name} is {value}; which is meant? Give --key {key}={name} "
                    f"or --key {key}={hits[0][0]}."
                )
        return hits[0]

    def _label(self, frame: Frame, key: str) -> np.ndarray | None:
        """Label in the unit of the file, None if it is missing."""
        found = self._find(frame, key)
        if found is None:
            return None
        shape = _row_shape(key, frame)
        values = _real(found, shape if key != "stress" else None)
        if key == "stress":
            values = _full_stress(found[0], values)
        if key == "forces" and self.forces_are_gradients:
            values = -values
        if key == "energy" and np.isinf(values):
            raise ValueError(f"{found[0]} is infinite. Remove the structure.")
        return None if np.isnan(values).all() else values

    def _charge(self, frame: Frame) -> np.ndarray:
        found = self._find(frame, "charge")
        if found is not None:
            return _per_molecule(found, frame)
        initial = float(np.sum(frame.arrays.get("initial_charges", 0.0)))
        if self.rules.default_charge is None and abs(initial) > WHOLE_CHARGE:
            raise ValueError(
                f"no charge, but initial_charges sum to {initial:g}. Give --key charge=initial_charges to take the "
                "sum, or --default-charge 0."
            )
        self.defaults["charge"] += 1
        return np.asarray(self.rules.default_charge or 0.0)

    def _mult(self, frame: Frame, charge: np.ndarray, required: bool) -> np.ndarray | None:
        found = self._find(frame, "mult")
        if found is None:
            return self._default_mult(frame, charge) if required or self.rules.default_mult is not None else None
        name = found[0]
        mult = _per_molecule(found, frame)
        if name in frame.arrays and name not in frame.info:
            mult = np.abs(mult) + 1.0  # magnetic moments of atoms: the sum is the number of unpaired electrons
        if mult < 1.0:
            raise ValueError(f"{name} is {mult:g}; expected the multiplicity 2S+1, which is at least 1")
        fits = (mult - lowest_mult(frame.numbers, charge)) % 2 == 0
        if name == "spin" and "mult" not in self.rules.names and not fits:
            raise ValueError(
                f"spin is {mult:g}, which is not a multiplicity 2S+1 of {int(frame.numbers.sum() - charge)} electrons. "
                "Give --key mult=spin to take it as multiplicity nevertheless, or correct the file."
            )
        return mult

    def _default_mult(self, frame: Frame, charge: np.ndarray) -> np.ndarray:
        """Multiplicity of a frame that does not state it."""
        initial = float(np.sum(frame.arrays.get("initial_magmoms", 0.0)))
        if self.rules.default_mult is None and abs(initial) > WHOLE_CHARGE:
            raise ValueError(
                f"no multiplicity, but initial_magmoms sum to {initial:g}. Give --key mult=initial_magmoms to take "
                "the sum as the number of unpaired electrons, or --default-mult lowest."
            )
        self.defaults["mult"] += 1
        return filled_mult(frame.numbers[None], charge[None], self.rules.default_mult)[0]

    def _add_extras(self, frame: Frame, row: Row, types: Mapping[str, ArrayType]) -> None:
        further = {key: kind for key, kind in types.items() if key not in LAYOUT_KEYS}
        for key in dict.fromkeys((*self.rules.extras, *further)):
            if key not in frame.info:
                if key in frame.arrays:
                    raise ValueError(f"--extra {key}: has a value for each atom; extras have one for each structure")
                continue
            self._used.add(key)
            self._found.add(key)
            value = frame.info[key]
            if key in self.rules.extras:
                row[key] = str(value) if self.rules.extras[key] else _guessed(key, value)
            else:
                row[key] = _typed(key, value, further[key])
        self._drop(row)

    def _add_blanks(self, frame: Frame, row: Row, types: Mapping[str, ArrayType]) -> None:
        """Add the arrays of its file that the frame does not state, since they are missing in this structure."""
        for key, kind in types.items():
            if key not in row and key not in self.rules.drop and key != "cell" and kind.dtype.kind in "fO":
                row[key] = _blank(kind if key not in LAYOUT_KEYS else kind._replace(trailing=_row_shape(key, frame)))

    def _drop(self, row: Row) -> None:
        for key in self.rules.drop & row.keys():
            del row[key]
            self.dropped.add(key)

    def _no_energy(self, frame: Frame) -> str:
        name = self.names["energy"][0]
        info = [n for n in frame.info if n not in (ARRAYS_KEY, ATTRIBUTES_KEY)]
        close = [n for n in info if "energy" in n.lower() and n != "free_energy"]
        advice = f"Give --key energy={close[0]}" if close else "Give --key energy=NAME"
        return (
            f"no energy under {name!r} (info has: {', '.join(info) or 'nothing'}). {advice}, or "
            "--allow-missing-energy to keep structures without it."
        )

    def check_found(self) -> None:
        """Refuse names on the command line that no structure has."""
        if self._last is None:
            return
        has = f"info has: {', '.join(self._last.info) or 'nothing'}; arrays: {', '.join(self._last.arrays) or 'none'}"
        for key, name in self.rules.names.items():
            if key not in self._found:
                raise StructureError(
                    f"--key {key}={name}: no structure has {self.names[key][0]} ({self._last.where}: {has})"
                )
        for key in self.rules.extras:
            if key not in self._found:
                raise StructureError(f"--extra {key}: no structure has {key} ({self._last.where}: {has})")


def _row_shape(key: str, frame: Frame) -> tuple[int, ...]:
    return expected_shape(key, 1, len(frame.numbers))[1:]


def _check_atoms(frame: Frame) -> None:
    """Refuse structures without atoms, without finite positions, or with atoms that are no elements."""
    if not len(frame.numbers):
        raise ValueError("has 0 atoms. Remove the structure.")
    finite = np.isfinite(frame.coord).all(axis=1)
    if not finite.all():
        raise ValueError(f"position of atom {int(np.argmin(finite))} is NaN or infinite. Remove the structure.")
    if frame.numbers.min() < 1 or frame.numbers.max() > MAX_ATOMIC_NUMBER:
        raise ValueError(f"atomic numbers must be 1 to {MAX_ATOMIC_NUMBER}. Remove ghost atoms.")


def _real(found: tuple[str, Any], shape: tuple[int, ...] | None) -> np.ndarray:
    """Real numbers from text or from what ASE gives, float64."""
    name, value = found
    try:
        values = reals(value) if isinstance(value, str) else np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} should be numbers, found {str(value)[:60]!r}") from error
    if shape is None:
        return values
    if values.size != math.prod(shape):
        raise ValueError(f"{name} has {values.size} numbers, expected {math.prod(shape)} {shape or ''}".rstrip())
    return values.reshape(shape)


def _full_stress(name: str, values: np.ndarray) -> np.ndarray:
    """(3, 3) from nine numbers, column by column, or six in Voigt's order xx, yy, zz, yz, xz, xy."""
    if values.shape == (3, 3):
        return values
    if values.size == 9:
        return values.reshape(3, 3).T
    if values.size != 6:
        raise ValueError(f"{name} has {values.size} numbers, expected 9, or 6 in Voigt's order")
    xx, yy, zz, yz, xz, xy = values.ravel()
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def _per_molecule(found: tuple[str, Any], frame: Frame) -> np.ndarray:
    """Charge or spin of a molecule: the value itself, or the sum over the atoms, which must be a whole number."""
    name, value = found
    if name in frame.info:
        total = _real(found, ())
        if not np.isfinite(total):
            raise ValueError(f"{name} is {total}")
        return total
    total = np.asarray(value, np.float64).sum()
    if not abs(total - np.rint(total)) <= WHOLE_CHARGE:
        raise ValueError(f"{name} sums to {total:g}, expected a whole number")
    return np.asarray(np.rint(total))


def _typed(key: str, value: Any, kind: ArrayType) -> Any:
    """A further value whose type is known."""
    if kind.is_text:
        return str(value)
    converters: dict[str, Callable[[str], Any]] = {"b": truth, "i": int, "u": int}
    convert = converters.get(kind.dtype.kind, float)
    try:
        if isinstance(value, str):
            value = [convert(word) for word in value.split()]
        return np.asarray(value).astype(kind.dtype).reshape(kind.trailing)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} should hold {kind.dtype} {kind.trailing}, found {str(value)[:60]!r}") from error


def _guessed(key: str, value: Any) -> Any:
    """A further value whose type is not known: whole numbers, real numbers, truth values, or else text."""
    if isinstance(value, str) and value.startswith(JSON_PREFIX):
        value = reals(value)
    if not isinstance(value, str):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"--extra {key}: {type(value).__name__} cannot be stored. Give --extra {key}:text.")
        return array
    words = value.replace(",", " ").split()
    if not words or any("_" in word or (word.isdigit() and word[0] == "0" and word != "0") for word in words):
        return value  # identifiers such as 0012 and 12_3, which Python would read as numbers
    for convert in (int, float):
        try:
            numbers = [convert(word) for word in words]
        except ValueError:
            continue
        return np.asarray(numbers[0] if len(numbers) == 1 else numbers)
    if all(word in ("T", "F") for word in words):
        truths = [word == "T" for word in words]
        return np.asarray(truths[0] if len(truths) == 1 else truths)
    return value


def _blank(kind: ArrayType) -> Any:
    return "" if kind.is_text else np.full(kind.trailing, np.nan, kind.dtype)


# --------------------------------------------------------------------------------------------------
# rows -> a temporary file
# --------------------------------------------------------------------------------------------------


class Spool:
    """Rows of growing groups in a temporary HDF5 file, chunked; missing values are NaN or empty text.

    Parameters
    ----------
    file : h5py.File
        Open for writing.
    """

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._rows: dict[int, list[tuple[str, Row]]] = {}
        self._buffered_atoms = 0
        self._counts: Counter[int] = Counter()
        self._lacking: dict[tuple[int, str], str] = {}  # the first structure without the array
        self._first: dict[int, str] = {}

    def add(self, where: str, row: Row) -> None:
        """Append a molecule to its group."""
        n_atoms = len(row["numbers"])
        self._first.setdefault(n_atoms, where)
        self._rows.setdefault(n_atoms, []).append((where, row))
        self._buffered_atoms += n_atoms
        if self._buffered_atoms >= BUFFER_ATOMS:
            self.flush()

    def flush(self) -> None:
        """Move the rows from memory into the file."""
        for n_atoms, rows in self._rows.items():
            group = self._file.require_group(f"{n_atoms:03d}")
            for key in dict.fromkeys((*(key for _, row in rows for key in row), *group)):
                self._append(group, n_atoms, key, rows)
            self._counts[n_atoms] += len(rows)
        self._rows.clear()
        self._buffered_atoms = 0

    def _append(self, group: h5py.Group, n_atoms: int, key: str, rows: Sequence[tuple[str, Row]]) -> None:
        """Append one array of the rows; what they or the rows before lack becomes NaN or empty text."""
        count = self._counts[n_atoms]
        present = [(where, row[key]) for where, row in rows if key in row]
        if key not in group and count:
            self._lacking.setdefault((n_atoms, key), self._first[n_atoms])
        if len(present) < len(rows):
            self._lacking.setdefault((n_atoms, key), next(where for where, row in rows if key not in row))
        if key not in group:
            _growing(group, key, count, self._kind(key, present))
        elif present:
            self._widen(group, key, self._kind(key, present), present[0][0])
        dataset = group[key]
        kind = array_type(dataset)
        if (n_atoms, key) in self._lacking and (kind.dtype.kind not in "fO" or key == "cell"):
            has = present[0][0] if present else self._first[n_atoms]
            raise StructureError(self._not_everywhere(key, self._lacking[n_atoms, key], has, n_atoms))
        dataset.resize(count + len(rows), axis=0)
        if present:
            values = [row[key] if key in row else _blank(kind) for _, row in rows]
            dataset[count:] = np.array(values, object if kind.is_text else kind.dtype)

    @staticmethod
    def _not_everywhere(key: str, lacking: str, has: str, n_atoms: int) -> str:
        if key == "cell":
            return (
                f"{lacking}: is not periodic, but {has} is and has {n_atoms} atoms, too. Convert periodic structures "
                "and molecules into files of their own."
            )
        return (
            f"{lacking}: no {key}, but {has} has it. Whole numbers cannot be missing in a group ({n_atoms} atoms). "
            f"Take them as text: --extra {key}:text, or leave them out: --drop {key}"
        )

    @staticmethod
    def _kind(key: str, present: Sequence[tuple[str, Any]]) -> ArrayType:
        """Type that holds all the given values."""
        texts = [isinstance(value, str) for _, value in present]
        if any(texts):
            if not all(texts):
                where = present[texts.index(not texts[0])][0]
                raise StructureError(_text_and_numbers(key, where))
            return ArrayType(np.dtype(object))
        shape = np.shape(present[0][1])
        for where, value in present:
            if np.shape(value) != shape:
                raise StructureError(
                    f"{where}: {key} has shape {np.shape(value)}, in {present[0][0]} {shape}. "
                    f"Leave it out: --drop {key}"
                )
        return ArrayType(np.result_type(*{value.dtype for _, value in present}), shape)

    @staticmethod
    def _widen(group: h5py.Group, key: str, kind: ArrayType, where: str) -> None:
        """Make the array of a group anew if its type cannot hold what comes; refuse what no type holds."""
        dataset = group[key]
        known = array_type(dataset)
        if known.is_text != kind.is_text:
            raise StructureError(_text_and_numbers(key, where))
        if known.trailing != kind.trailing:
            raise StructureError(
                f"{where}: {key} has shape {kind.trailing}, in earlier structures {known.trailing}. "
                f"Leave it out: --drop {key}"
            )
        wide = np.result_type(known.dtype, kind.dtype)
        if wide == known.dtype:
            return
        group.move(key, f"{key}_narrow")
        widened = _growing(group, key, len(dataset), ArrayType(wide, known.trailing))
        for first in range(0, len(dataset), dataset.chunks[0]):
            widened[first : first + dataset.chunks[0]] = dataset[first : first + dataset.chunks[0]]
        del group[f"{key}_narrow"]

    def finish(self) -> None:
        """Write what is left, and an energy of NaN where no structure of a group has one."""
        self.flush()
        for n_atoms, count in self._counts.items():
            group = self._file[f"{n_atoms:03d}"]
            if "energy" not in group:
                _growing(group, "energy", count, ArrayType(np.dtype(np.float64)))


def _text_and_numbers(key: str, where: str) -> str:
    return f"{where}: {key} is a number in some structures and text in others. Take it as text: --extra {key}:text"


def _growing(group: h5py.Group, key: str, count: int, kind: ArrayType) -> h5py.Dataset:
    """An array of ``count`` rows that can grow; rows that are not written are NaN or empty."""
    row_bytes = max(1, int(np.prod(kind.trailing)) * kind.dtype.itemsize)
    dtype = h5py.string_dtype() if kind.is_text else kind.dtype
    fill = np.nan if kind.dtype.kind == "f" else None
    chunks = (max(1, CHUNK_BYTES // row_bytes), *kind.trailing)
    shape = (count, *kind.trailing)
    return group.create_dataset(key, shape, dtype, maxshape=(None, *kind.trailing), chunks=chunks, fillvalue=fill)


def array_type(dataset: h5py.Dataset) -> ArrayType:
    """Type of an array on disk in the byte order of this machine; all kinds of text are one."""
    dtype = dataset.dtype
    return ArrayType(np.dtype(object) if dtype.kind in "OSU" else dtype.newbyteorder("="), dataset.shape[1:])
