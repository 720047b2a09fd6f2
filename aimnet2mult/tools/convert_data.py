"""Structures from extended XYZ, ASE databases, NPZ or HDF5 to a dataset, and back.

``python -m aimnet2mult.tools.convert_data train.xyz more/*.xyz train.h5 --key energy=REF_energy`` reads structures and
writes a dataset; ``... train.h5 train.xyz`` goes back; ``... a.h5 b.h5 joined.h5`` joins and repacks. The formats are
those of `aimnet2mult.data.sgdataset` (.h5), the same arrays as ``003/coord`` ... (.npz), text (.xyz) and ASE databases
(.db); any other file is given to ASE to read. Only this module and `aimnet2mult.calculators` know ASE.

What comes out:

- eV and Å, said so in attributes of the file, whatever the input's units are.
- Every array, value and type bit for bit as it went in, when no unit is converted. Structures from elsewhere get
  float64, which is what ASE and text hold (``--dtype float32`` halves the file).
- Within a group of one size, the order of the input; in files of structures, size by size.
- ``energy``, not ``free_energy``; forces as a calculator gave them, without constraints; results of a calculator before
  entries of ``info`` and ``arrays``.
- NaN for a label that some molecules of a group have and others lack, no array if none has it.

This module holds the command line, the choice of reader and writer, the report, and all that needs ASE. What the values
of a structure mean is decided in `aimnet2mult.data.frames`; `aimnet2mult.data.convert` joins the inputs and writes
arrays and text. Both are imported where they are used, so that ``--help`` is quick.
"""

from __future__ import annotations

import glob
import signal
import tempfile
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from aimnet2mult.config.builder import nearest
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np

    from aimnet2mult.data.convert import Merger, Part, Progress
    from aimnet2mult.data.extxyz import Frame
    from aimnet2mult.data.frames import FrameReader, FrameRules

OUTPUT_FORMATS = {".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz", ".xyz": "extxyz", ".extxyz": "extxyz", ".db": "db"}
"""Extension -> format that can be written."""

ARRAY_FORMATS = ("hdf5", "npz")
"""Formats that hold the layout's arrays; all others hold structures."""

DTYPES = ("float32", "float64")

COMPRESSIONS = ("gzip", "lzf")

DATABASE_ROWS = 1000
"""Structures that are taken from an ASE database at a time."""

DATABASE_RESULTS = ("energy", "forces", "charges", "dipole")
"""Arrays that go into an ASE database as results of a calculator; so does a symmetric stress."""

DATABASE_PAIRS = {"charge": "total_charge", "mult": "mult"}
"""Arrays that go into it as key-value pairs -> their names there; one named charge cannot be read back through ASE."""

PER_ATOM_RESULTS = ("forces", "charges", "magmoms", "energies", "stresses")
"""Results of ASE's calculators with a value for each atom."""


# --------------------------------------------------------------------------------------------------
# inputs
# --------------------------------------------------------------------------------------------------


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Files that names, patterns and folders stand for, in the order given; those of a pattern or folder sorted.

    Parameters
    ----------
    inputs : sequence of str or Path
        Files, patterns (``*``, ``**``), folders; of a folder all files but hidden ones, those of its folders too.

    Raises
    ------
    FileNotFoundError
        A name or pattern that matches nothing, or a folder without files.
    """
    files: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = (match.relative_to(path) for match in path.rglob("*") if match.is_file())
            matches = [path / match for match in inside if not any(part.startswith(".") for part in match.parts)]
        elif path.exists():
            matches = [path]
        else:
            matches = [match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file()]
        if not matches:
            what = "no files in this folder" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{path}: {what}")
        files.update(dict.fromkeys(sorted(matches)))
    unique = {file.resolve(): file for file in reversed(files)}  # the first of several names of a file counts
    return [file for file in files if unique[file.resolve()] == file]


Image: TypeAlias = tuple[str, Any, dict[str, Any]]
"""A structure of ASE: file and frame for messages, ``ase.Atoms``, values that are stored beside it."""


def _format(path: Path) -> str:
    """``hdf5``, ``npz``, ``extxyz``, ``db``, ``json`` (a database, too), or ``ase`` for whatever else."""
    return {**OUTPUT_FORMATS, ".json": "json"}.get(path.suffix.lower(), "ase")


def _ase(module: str, why: str) -> Any:
    """A module of ASE."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f'{why} needs ASE, which is not installed: pip install "aimnet2mult[ase]"') from error


def _as_ase_reads(path: Path, images: Iterator[Image]) -> Iterator[Image]:
    """Structures as ASE gives them, the file named in the message where it cannot."""
    from aimnet2mult.data.extxyz import StructureError

    try:
        yield from images
    except MemoryError:
        raise
    except Exception as error:  # its readers raise anything on files that they do not understand
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StructureError(
            f"{path}: ASE cannot read it ({type(error).__name__}: {reason}). If it should not be read at all, name the "
            "files that should, such as folder/*.xyz."
        ) from error


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the structures of a file, one at a time if its format allows."""
    from aimnet2mult.data.extxyz import StructureError, read_extxyz

    kind = _format(path)
    if kind == "extxyz":
        yield from read_extxyz(path)
        return
    if kind == "ase":
        images = _file_images(path, _ase("ase.io", f"{path}: this format"))
    else:
        images = _database_images(
            path, _ase("ase.db", f"{path}: an ASE database"), DATABASE_ROWS if kind == "db" else None
        )
    empty = True
    for image in _as_ase_reads(path, images):
        yield atoms_frame(*image)
        empty = False
    if empty:
        raise StructureError(f"{path}: holds no structures")


def _file_images(path: Path, ase_io: Any) -> Iterator[Image]:
    """Structures of a file that ASE reads: where, the structure, nothing beside it."""
    for index, atoms in enumerate(ase_io.iread(str(path), ":")):
        yield f"{path}: frame {index}", atoms, {}


def _database_images(path: Path, ase_db: Any, window: int | None) -> Iterator[Image]:
    """Structures of an ASE database, with what is stored beside them; ``window`` rows in memory at a time."""
    from aimnet2mult.data.extxyz import ATTRIBUTES_KEY

    database = ase_db.connect(str(path), use_lock_file=False)
    attributes = database.metadata.get(ATTRIBUTES_KEY, {})
    about = {ATTRIBUTES_KEY: " ".join(attributes), **attributes} if attributes else {}
    last = 0
    while rows := list(database.select(f"id>{last}", sort="id", limit=window)):
        for row in rows:
            # A pair named charge is stored, but ASE answers with the sum of the initial charges: look beneath.
            pairs = {key: vars(row)[key] for key in row.key_value_pairs}
            yield f"{path}: id {row.id}", row.toatoms(), {**about, **row.data, **pairs}
        last = rows[-1].id


def atoms_frame(where: str, atoms: Any, info: Mapping[str, Any] | None = None) -> Frame:
    """An ASE ``Atoms`` as a frame.

    Parameters
    ----------
    where : str
        File and frame, for messages.
    atoms : ase.Atoms
        The structure, with the results of its calculator, if any.
    info : mapping of str, optional
        Further values of the structure.

    Raises
    ------
    StructureError
        Periodic in some directions only, or a calculator's result that contradicts ``info``.
    """
    import numpy as np

    from aimnet2mult.data.extxyz import Frame, StructureError, check_periodic

    everything = {**atoms.info, **(info or {})}
    arrays = {name: values for name, values in atoms.arrays.items() if name not in ("numbers", "positions")}
    for name, value in getattr(atoms.calc, "results", {}).items():
        if value is None:
            continue
        store = arrays if name in PER_ATOM_RESULTS else everything
        if name in store and not np.array_equal(store[name], value):
            raise StructureError(
                f"{where}: {name} of the calculator and {name} in {'arrays' if store is arrays else 'info'} differ. "
                "Remove one of them."
            )
        store[name] = value
    cell = None
    if atoms.pbc.any():
        try:
            check_periodic([bool(direction) for direction in atoms.pbc])
        except ValueError as error:
            raise StructureError(f"{where}: {error}") from error
        cell = np.array(atoms.cell.array, np.float64)
    elif atoms.cell.array.any():
        everything.setdefault("Lattice", atoms.cell.array)  # listed among what is left out
    return Frame(where, np.array(atoms.numbers), np.array(atoms.positions, np.float64), everything, arrays, cell)


# --------------------------------------------------------------------------------------------------
# ASE databases as output
# --------------------------------------------------------------------------------------------------


def write_database(merger: Merger, output: Path, progress: Progress) -> None:
    """Write an ASE database: labels as a calculator's results, charge and multiplicity as key-value pairs."""
    from aimnet2mult.data.convert import brief_types, text_attributes
    from aimnet2mult.data.extxyz import ARRAYS_KEY, ATTRIBUTES_KEY, describe_arrays
    from aimnet2mult.utils.files import atomic_path

    connect = _ase("ase.db", f"{output}: an ASE database").connect
    with atomic_path(output) as temporary:
        database = connect(str(temporary), use_lock_file=False)
        with database:
            for n_atoms in merger.sizes:
                about = {ARRAYS_KEY: describe_arrays(brief_types(merger.types[n_atoms]))}
                for _, arrays in merger.pieces(n_atoms):
                    for atoms, pairs, data in _database_rows(arrays):
                        database.write(atoms, key_value_pairs=pairs, data={**data, **about})
                    progress(len(arrays["numbers"]))
        database.metadata = {ATTRIBUTES_KEY: text_attributes(merger, line_breaks=True)}


def _database_rows(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[Any, dict[str, float], dict[str, Any]]]:
    """Yield the structure, the key-value pairs and the further data of each molecule."""
    import numpy as np

    from aimnet2mult.data.extxyz import missing_rows

    atoms_class = _ase("ase", "an ASE database").Atoms
    calculator_class = _ase("ase.calculators.singlepoint", "an ASE database").SinglePointCalculator
    missing = {key: missing_rows(values) for key, values in arrays.items()}
    for row in range(len(arrays["numbers"])):
        values = {key: column[row] for key, column in arrays.items() if not missing[key][row]}
        cell = values.pop("cell", None)
        atoms = atoms_class(values.pop("numbers"), values.pop("coord"), cell=cell, pbc=cell is not None)
        results = {key: _plain(values.pop(key)) for key in DATABASE_RESULTS if key in values}
        stress = values.get("stress")
        if stress is not None and np.array_equal(stress, stress.T):
            results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]  # Voigt: xx, yy, zz, yz, xz, xy
            del values["stress"]
        if results:
            atoms.calc = calculator_class(atoms, **results)
        pairs = {name: float(values.pop(key)) for key, name in DATABASE_PAIRS.items() if key in values}
        yield atoms, pairs, {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Single numbers as Python has them; arrays and text as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


# --------------------------------------------------------------------------------------------------
# the conversion
# --------------------------------------------------------------------------------------------------


def convert(
    inputs: Sequence[str | Path],
    output: str | Path,
    rules: FrameRules | None = None,
    *,
    dtype: str | None = None,
    attributes: Mapping[str, str] | None = None,
    compression: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Read all inputs and write them as one file; nothing is written if anything is wrong.

    Parameters
    ----------
    inputs : sequence of str or Path
        Files, patterns and folders, as in `expand_inputs`.
    output : str or Path
        File to write; its extension tells the format (`OUTPUT_FORMATS`).
    rules : FrameRules, optional
        How to read structures; its units, ``drop`` and ``default_mult`` hold for all inputs.
    dtype : str, optional
        ``float32`` or ``float64`` for all real numbers of the layout but energies; default: as in the input.
    attributes : mapping of str to str, optional
        Words about the dataset to store with it, such as ``level``.
    compression : str, optional
        Filter for HDF5: ``gzip`` or ``lzf``. Such files are slow to train on.
    overwrite : bool
        Replace an existing output.

    Returns
    -------
    list of str
        Lines that say what has been written, what was assumed and what was left out.

    Raises
    ------
    ValueError, OSError
        What is wrong, where, and what would be right.
    """
    from tqdm import tqdm

    from aimnet2mult.data.convert import Merger, write_extxyz, write_hdf5, write_npz
    from aimnet2mult.data.frames import UNIT_NAMES, FrameReader, FrameRules

    rules = rules or FrameRules()
    output = Path(output)
    files = expand_inputs(inputs)
    kind = _check_output(output, files, compression, overwrite)
    for name in attributes or {}:
        if name in UNIT_NAMES.values():
            raise ValueError(
                f"attribute {name}: is set by the conversion. State the unit of the input with its option."
            )
    if all(_format(file) in ARRAY_FORMATS for file in files):
        _check_no_frame_options(rules)
    writers: dict[str, Callable[[Merger, Path, Progress], None]] = {
        "hdf5": partial(write_hdf5, compression=compression),
        "npz": write_npz,
        "extxyz": write_extxyz,
        "db": write_database,
    }
    reader = FrameReader(rules)
    with tempfile.TemporaryDirectory(prefix=f".{output.stem}.", dir=output.parent.resolve()) as folder:
        parts = _open_parts(files, reader, Path(folder))
        merger = Merger(parts, rules.default_mult, dtype, attributes)
        with tqdm(total=len(merger), desc=f"writing {output.name}", unit="structure", disable=None) as bar:
            writers[kind](merger, output, bar.update)
    return _report(merger, reader)


def _check_output(output: Path, files: Sequence[Path], compression: str | None, overwrite: bool) -> str:
    """Format of the output, after all that can be checked before reading."""
    from aimnet2mult.utils.files import check_writable

    kind = _format(output)
    if kind not in OUTPUT_FORMATS.values():
        known = ", ".join(OUTPUT_FORMATS)
        raise ValueError(f"{output}: the extension of the output must be one of {known}. The output is named last.")
    if compression is not None and kind != "hdf5":
        raise ValueError(f"--compression {compression}: only .h5 files can be compressed")
    if output.resolve() in {file.resolve() for file in files}:
        raise ValueError(f"{output}: is among the inputs. The output is named last; give it another name.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists. Give --overwrite to replace it; the output is named last.")
    check_writable(output)
    if kind == "db" or any(_format(file) in ("db", "json", "ase") for file in files):
        _ase("ase", "reading or writing other files than .h5, .npz and .xyz")
    return kind


def _check_no_frame_options(rules: FrameRules) -> None:
    """Refuse options that have no effect on inputs that are all arrays."""
    given = {
        "--key": rules.names,
        "--extra": rules.extras,
        "--default-charge": rules.default_charge is not None,
        "--allow-missing-energy": rules.energy_optional,
    }
    for option, value in given.items():
        if value:
            raise ValueError(
                f"{option}: has no effect on .h5 and .npz files, all of whose arrays are taken as they are"
            )


def _open_parts(files: Sequence[Path], reader: FrameReader, folder: Path) -> list[Part]:
    """The inputs as arrays on disk, in their order; consecutive files of structures are one part."""
    from aimnet2mult.data.convert import open_part, spool_frames, spool_npz

    rules = reader.rules
    parts: list[Part] = []
    of_frames: list[Part] = []
    for is_array, group in groupby(files, lambda file: _format(file) in ARRAY_FORMATS):
        if is_array:
            for file in group:
                if _format(file) == "npz":
                    parts.append(spool_npz(file, folder / f"{len(parts)}.h5", rules.units, rules.drop))
                else:
                    parts.append(open_part(file, str(file), rules.units, rules.drop))
            continue
        paths = list(group)
        name = str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        of_frames.append(spool_frames(_all_frames(paths), reader, folder / f"{len(parts)}.h5", name))
        parts.append(of_frames[-1])
    reader.check_found()
    for key in rules.drop:
        if key not in set(reader.dropped).union(*(part.dropped for part in parts)):
            raise ValueError(f"--drop {key}: no input has it")
    for part in of_frames:
        part.attributes = dict(reader.attributes or {})
    return parts


def _all_frames(paths: Iterable[Path]) -> Iterator[Frame]:
    """Yield the structures of all files, and show how many have been read."""
    from tqdm import tqdm

    with tqdm(desc="reading", unit="structure", disable=None) as bar:
        for path in paths:
            for frame in read_frames(path):
                yield frame
                bar.update()


def _report(merger: Merger, reader: FrameReader) -> list[str]:
    """What has been written, assumed and left out, in words."""
    from aimnet2mult.data.frames import LABEL_KEYS

    sizes = list(merger.sizes)
    counts = ", ".join(f"{key} {merger.labels[key]}" for key in LABEL_KEYS if key in merger.labels)
    lines = [f"structures: {len(merger)}, of {sizes[0]} to {sizes[-1]} atoms; labels: {counts}"]
    factors = dict(reader.converted)
    for part in merger.parts:
        factors.update(part.factors)
    if factors:
        lines.append("converted to eV and Å: " + ", ".join(f"{key} x {factor:.9g}" for key, factor in factors.items()))
    defaults = reader.defaults + Counter(mult=merger.filled_mults)
    for key, count in defaults.items():
        value = reader.rules.default_charge or 0 if key == "charge" else reader.rules.default_mult or 1
        lines.append(f"{key}: not stated by {count} of {len(merger)} structures; {value} was taken")
    if merger.dropped_attributes:
        lines.append(f"attributes that differ between files are left out: {', '.join(merger.dropped_attributes)}")
    if reader.left_out:
        names = ", ".join(f"{name} ({count})" for name, count in reader.left_out.most_common())
        lines.append(f"left out (structures): {names}. {_advice(reader)}")
    return lines


def _advice(reader: FrameReader) -> str:
    """How to take what was left out; values of atoms cannot be extras."""
    of_atoms = ", ".join(name for name in reader.left_out if name in reader.left_out_of_atoms)
    if not of_atoms:
        return "Take them with --key or --extra."
    return f"Take them with --key or --extra; those with a value for each atom ({of_atoms}) with --key only."


# --------------------------------------------------------------------------------------------------
# command line
# --------------------------------------------------------------------------------------------------


def _pairs(option: str, given: Iterable[str]) -> dict[str, str]:
    """``NAME=VALUE`` options as a dictionary."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} {text}: expected NAME=VALUE")
        if name in pairs:
            raise ValueError(f"{option} {name}: given twice")
        pairs[name] = value
    return pairs


def _extras(given: Iterable[str]) -> dict[str, bool]:
    """``NAME`` or ``NAME:text`` -> whether it is text."""
    extras = {}
    for text in given:
        name, colon, kind = text.partition(":")
        if colon and kind != "text":
            raise ValueError(f"--extra {text}: expected NAME or NAME:text")
        extras[name] = bool(colon)
    return extras


def _choice(option: str, value: str | None, known: Sequence[str]) -> str | None:
    if value is not None and value not in known:
        raise ValueError(f"{option} {value}: {nearest(value, known)}")
    return value


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise, as Ctrl-C does, so that no temporary file stays behind; exit status 143, as without it."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.argument("output", type=click.Path())
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="KEY=NAME",
    help="Name of a label in the structures, e.g. energy=REF_energy; may be given again for forces, charges, "
    "spin_charges, dipole, quadrupole, stress, charge, mult. forces=-NAME: gradients, whose sign is changed.",
)
@click.option(
    "--extra",
    "extras",
    multiple=True,
    metavar="NAME[:text]",
    help="Further value of each structure to keep, e.g. mol_id; :text keeps 007 as it is.",
)
@click.option("--drop", multiple=True, metavar="KEY", help="Array to leave out, e.g. stress.")
@click.option("--energy-unit", metavar="UNIT", help="Unit of energies in the input  [default: eV]")
@click.option("--force-unit", metavar="UNIT", help="Unit of forces in the input  [default: eV/Å]")
@click.option("--length-unit", metavar="UNIT", help="Unit of positions and cells in the input  [default: Å]")
@click.option("--dipole-unit", metavar="UNIT", help="Unit of dipoles in the input  [default: e·Å]")
@click.option("--default-charge", type=float, help="Charge of structures that do not state it  [default: 0]")
@click.option(
    "--default-mult",
    metavar="lowest|N",
    help="Multiplicity of structures that do not state it: lowest is 1 or 2, as the electrons want  [default: "
    "1 for an even number of electrons, an error for an odd one]",
)
@click.option("--allow-missing-energy", is_flag=True, help="Keep structures without energy (NaN).")
@click.option(
    "--dtype",
    metavar="float32|float64",
    help="Type of real numbers other than energies  [default: as in the input; float64 for structures]",
)
@click.option("--level", metavar="TEXT", help='Level of theory, stored with the data, e.g. "wB97M-V/def2-TZVPP".')
@click.option("--attribute", "attributes", multiple=True, metavar="NAME=TEXT", help="Further words about the data.")
@click.option("--compression", metavar="gzip|lzf", help="Compress an .h5 file, for distribution; slow to train on.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@user_errors
def main(
    inputs: tuple[str, ...],
    output: str,
    keys: tuple[str, ...],
    extras: tuple[str, ...],
    drop: tuple[str, ...],
    energy_unit: str | None,
    force_unit: str | None,
    length_unit: str | None,
    dipole_unit: str | None,
    default_charge: float | None,
    default_mult: str | None,
    allow_missing_energy: bool,
    dtype: str | None,
    level: str | None,
    attributes: tuple[str, ...],
    compression: str | None,
    overwrite: bool,
) -> None:
    """Convert INPUTS (files, "patterns", folders) to OUTPUT, named last: .h5, .npz, .xyz or .db (ASE).

    Inputs are .h5, .npz, .xyz/.extxyz, .db, and whatever else ASE reads; several are joined. The output holds eV and Å.
    Charge is read from charge or total_charge of a structure, multiplicity from mult, multiplicity or spin (2S+1).
    """
    from aimnet2mult.data.frames import FrameRules

    units = {
        "energy": energy_unit,
        "forces": force_unit,
        "coord": length_unit,
        "cell": length_unit,
        "dipole": dipole_unit,
    }
    rules = FrameRules(
        names=_pairs("--key", keys),
        extras=_extras(extras),
        units={quantity: unit for quantity, unit in units.items() if unit is not None},
        default_charge=default_charge,
        default_mult=default_mult,
        energy_optional=allow_missing_energy,
        drop=frozenset(drop),
    )
    words = _pairs("--attribute", attributes)
    if level is not None:
        words["level"] = level
    with _sigterm_raises():
        lines = convert(
            inputs,
            output,
            rules,
            dtype=_choice("--dtype", dtype, DTYPES),
            attributes=words,
            compression=_choice("--compression", compression, COMPRESSIONS),
            overwrite=overwrite,
        )
    for line in lines:
        click.echo(line, err=True)
    click.echo(output)


if __name__ == "__main__":
    main()
