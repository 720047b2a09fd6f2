"""The dispersion ledger: what dispersion the labels of a fidelity contain, and its exact removal before training.

A network that sees a few Å learns D3 badly and at great cost, and can have it for nothing. So the books are kept: each
fidelity states what dispersion its labels contain (`DispersionLabel`); a known D3(BJ) energy is subtracted from
energies and forces as they are read (`CorrectedSource`); the checkpoint keeps the statement, and
`aimnet2mult.tools.compile_jit` embeds the very same correction. Then

    E(label) - E(D3) = E(SAE) + E(network),    E(compiled) = E(network) + E(SAE) + E(D3),

whatever the self-atomic energies are: those fitted to the labels as they are in the file serve as well as any.

The correction is arithmetic on arrays with parameters from a table. It is that of `aimnet2mult.dispersion`, the one
thing in ``data`` that knows physics, because what is subtracted here must be what is added there.
"""

import hashlib
import json
import logging
import math
import mmap
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tqdm import tqdm

from aimnet2mult import nbops
from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import element_names
from aimnet2mult.data.base import LABEL_COUNT_BYTES, LabelCount, MoleculeSource
from aimnet2mult.data.sgdataset import DatasetError, JoinedDataset
from aimnet2mult.dispersion import DFTD3
from aimnet2mult.dispersion_params import d3bj_parameters, normalized
from aimnet2mult.utils.files import atomic_path, check_writable

logger = logging.getLogger(__name__)

METHODS = {"none": "no dispersion", "d3bj": "D3(BJ)", "d4": "D4", "vv10": "VV10", "unknown": "unknown dispersion"}
"""What labels may be said to contain, and its name in messages."""

D3_KEYS = ("s6", "s8", "a1", "a2")
"""Damping parameters of D3(BJ); a2 in Bohr."""

CORRECTION_VERSION = 1
"""To be raised when `D3Correction` gives other numbers than before: caches on disk are then made anew."""

PAIRS_PER_CALL = 40_000
"""Pairs of atoms in one evaluation of the correction: some 10 MB, which fits the processor's cache."""

ROWS_PER_PIECE = 4096
"""Molecules whose correction is written to a cache at a time."""

SAMPLED_MOLECULES = 16
"""Molecules whose structure tells one data file from another, in addition to size and time of the file."""

CACHES = ("disk", "none")
"""Ways to have the correction: computed once and kept beside the data, or computed whenever molecules are read."""

CACHE_OPTION = "data.dispersion_cache"
"""The setting by which a user chooses, for messages."""


# --------------------------------------------------------------------------------------------------
# the statement
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DispersionLabel:
    """What dispersion the labels of a fidelity contain.

    Attributes
    ----------
    method : str
        One of `METHODS`.
    functional : str, optional
        Name of the functional (or method) whose parameters it has.
    parameters : dict, optional
        D3(BJ): s6, s8, a1, a2 (Bohr), always; D4 and VV10: what was stated.
    """

    method: str = "unknown"
    functional: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """For messages: ``D3(BJ) of b3lyp``, ``no dispersion``."""
        name = METHODS[self.method]
        if self.functional is not None:
            return f"{name} of {self.functional}"
        if self.parameters:
            return f"{name} ({', '.join(f'{key} {value}' for key, value in self.parameters.items())})"
        return name

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain types, for checkpoints, YAML and JSON."""
        parameters = None if self.parameters is None else dict(self.parameters)
        return {"method": self.method, "functional": self.functional, "parameters": parameters}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "DispersionLabel":
        """Inverse of `to_dict`."""
        parameters = entry["parameters"]
        return cls(entry["method"], entry["functional"], None if parameters is None else dict(parameters))


def parse_dispersion(value: Any, where: str) -> DispersionLabel:
    """Read what a configuration says about the dispersion in the labels.

    Parameters
    ----------
    value
        ``none``, ``unknown`` (also null), ``vv10``, ``d4``, or one method with its parameters: ``{d3bj: b3lyp}``,
        ``{d3bj: {s8: 1.99, a1: 0.40, a2: 4.42}}`` (s6 is 1 if left out), ``{d4: gfn2}``.
    where : str
        Dotted path of the entry, for messages.

    Raises
    ------
    ValueError
        Begins with ``where``, and says what would be right.
    """
    if value is None:
        return DispersionLabel()
    if isinstance(value, Mapping) and len(value) == 1:
        ((method, detail),) = value.items()
    elif isinstance(value, str):
        method, detail = value, None
    else:
        raise ValueError(f"{where}: expected one of {', '.join(METHODS)}, such as {{d3bj: b3lyp}}, found {value!r}")
    name = normalized(str(method))
    if name not in METHODS:
        raise ValueError(
            f"{where}: dispersion {method!r} is not known: {nearest(name, list(METHODS))}; "
            "write unknown for labels with any other dispersion"
        )
    if name in ("none", "unknown"):
        if isinstance(value, Mapping):
            raise ValueError(f"{where}: {name} has no functional and no parameters; write {name} alone")
        return DispersionLabel(name)
    if name == "d3bj":
        return _parse_d3bj(detail, where)
    if detail is None:
        return DispersionLabel(name)
    if isinstance(detail, str):
        return DispersionLabel(name, functional=detail)
    if isinstance(detail, Mapping) and all(isinstance(v, int | float | str) for v in detail.values()):
        return DispersionLabel(name, parameters={str(key): v for key, v in detail.items()})
    raise ValueError(f"{where}.{method}: expected the name of a functional, or parameters, found {detail!r}")


def _parse_d3bj(detail: Any, where: str) -> DispersionLabel:
    where = f"{where}.d3bj"
    if isinstance(detail, str):
        try:
            found = d3bj_parameters(detail)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return DispersionLabel("d3bj", detail, {key: float(getattr(found, key)) for key in D3_KEYS})
    if not isinstance(detail, Mapping):
        found_text = "nothing" if detail is None else repr(detail)
        raise ValueError(
            f"{where}: say with which functional's parameters, as {{d3bj: b3lyp}}, or give them, as "
            f"{{d3bj: {{s8: 1.9889, a1: 0.3981, a2: 4.4211}}}} (found {found_text})"
        )
    if "s9" in detail:
        raise ValueError(
            f"{where}.s9: only the two-body energy is subtracted and added again; leave s9 out, and a three-body "
            "energy in the labels stays in them"
        )
    for key, number in detail.items():
        if key not in D3_KEYS:
            raise ValueError(f"{where}: unknown parameter {key!r}; {nearest(str(key), D3_KEYS)}")
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{where}.{key}: expected a number, found {number!r}")
    given = {"s6": 1.0, **detail}
    missing = [key for key in D3_KEYS if key not in given]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing; D3(BJ) needs s8, a1 and a2 (Bohr), and s6 if not 1")
    return DispersionLabel("d3bj", None, {key: float(given[key]) for key in D3_KEYS})


# --------------------------------------------------------------------------------------------------
# the correction
# --------------------------------------------------------------------------------------------------


class D3Correction:
    """Two-body D3(BJ) energies and forces of molecules given as arrays, in float64.

    What `aimnet2mult.dispersion.DFTD3` gives with the same parameters, a few molecules at a time. Nothing is
    differentiated automatically, so that it can be used in processes that were forked for reading data.

    Parameters
    ----------
    parameters : mapping of str to float
        s6, s8, a1, a2 (Bohr).
    """

    def __init__(self, parameters: Mapping[str, float]) -> None:
        self.parameters = {key: float(parameters[key]) for key in D3_KEYS}
        p = self.parameters
        self._d3 = DFTD3(s6=p["s6"], s8=p["s8"], a1=p["a1"], a2=p["a2"])
        self.max_element = self._d3.max_element

    @property
    def key(self) -> str:
        """``d3bj-`` and eight digits that stand for the parameters and the arithmetic, for names of files."""
        content = json.dumps([CORRECTION_VERSION, self.parameters], sort_keys=True)
        return f"d3bj-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def energy(self, coord: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Energies (n,) float64, eV, of molecules (n, N, 3), Å, with atomic numbers (n, N)."""
        energies = np.empty(len(coord))
        for rows, batch in self._batches(coord, numbers):
            with torch.no_grad():
                energies[rows] = self._d3(batch)["energy"].numpy()
        return energies

    def energy_and_forces(self, coord: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies (n,), eV, and forces (n, N, 3), eV/Å, float64, of molecules (n, N, 3), Å, with numbers (n, N)."""
        energies, forces = np.empty(len(coord)), np.empty(np.shape(coord))
        for rows, batch in self._batches(coord, numbers):
            with torch.no_grad():
                energy, force = self._d3.energy_and_forces(batch)
            if "_restore_idx" in batch:  # large molecules are evaluated in flat layout
                force = force[batch["_restore_idx"]].reshape(forces[rows].shape)
            energies[rows], forces[rows] = energy.numpy(), force.numpy()
        return energies, forces

    def _batches(self, coord: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """Internal batches of at most `PAIRS_PER_CALL` pairs (of one molecule at least), and their rows."""
        n_molecules, n_atoms = numbers.shape
        step = max(1, PAIRS_PER_CALL // n_atoms**2)
        for first in range(0, n_molecules, step):
            rows = slice(first, first + step)
            data = {
                "coord": torch.tensor(coord[rows], dtype=torch.float64),
                "numbers": torch.tensor(numbers[rows], dtype=torch.long),
            }
            yield rows, nbops.internal_batch(data, self._d3.cutoff_lr)


def subtraction(label: DispersionLabel, where: str) -> D3Correction:
    """Return the correction that takes the dispersion out of labels.

    Parameters
    ----------
    label : DispersionLabel
        What the labels contain.
    where : str
        Dotted path of the wish to subtract, such as ``data.fidelities.dft.subtract_dispersion``.

    Raises
    ------
    ValueError
        The labels contain nothing that can be subtracted; begins with ``where``.
    """
    if label.method == "d3bj":
        assert label.parameters is not None
        return D3Correction(label.parameters)
    if label.method == "none":
        reason = "the labels contain no dispersion, so there is nothing to subtract. Remove one of the two statements."
    elif label.method == "unknown":
        reason = "it is not stated which dispersion the labels contain. State it, such as dispersion: {d3bj: b3lyp}."
    else:
        reason = f"the labels contain {label.text}; only D3(BJ) can be subtracted. Set it to false."
    raise ValueError(f"{where}: {reason}")


# --------------------------------------------------------------------------------------------------
# molecules without it
# --------------------------------------------------------------------------------------------------


class CorrectedSource(MoleculeSource):
    """The molecules of a file with the correction subtracted from their energies and forces.

    Energies are float64, forces keep their type, missing labels (NaN) stay missing, and forces that nobody asks for
    are not computed. With ``cache="none"`` the correction is computed whenever molecules are read, in the process
    that reads them. With ``cache="disk"`` it is computed once by `prepare` and kept beside the data in an HDF5 file,
    ``<name of the data file>.d3bj-<key>.cache``, with the data's groups and in them ``energy`` (n,) float64 and
    ``forces`` (n, N, 3) float32, in one piece each, which are mapped into memory. Of several processes that share the
    data, one calls `prepare` while the others wait; afterwards all of them read. The name does not end like that of a
    dataset, so that patterns for datasets pass it over.

    Parameters
    ----------
    source : MoleculeSource
        One file.
    correction : D3Correction
        What to subtract.
    cache : str
        One of `CACHES`.

    Raises
    ------
    ValueError
        The source is periodic or has labels other than energy and forces that depend on dispersion.
    """

    def __init__(self, source: MoleculeSource, correction: D3Correction, cache: str = "none") -> None:
        if cache not in CACHES:
            raise ValueError(f"{CACHE_OPTION}: {cache!r} is not one of {', '.join(CACHES)}")
        affected = [key for key in ("cell", "stress", "hessian") if key in source.keys]
        if affected:
            raise ValueError(
                f"{source.name}: has {', '.join(affected)}; dispersion can be subtracted from the energies and forces "
                "of molecules only. Subtract it from the file beforehand, or remove the array."
            )
        assert cache == "none" or len(source.files) == 1
        self.source = source
        self.correction = correction
        self.cache = cache
        self.files, self.keys, self.n_atoms = source.files, source.keys, source.n_atoms
        self.cache_path = source.files[0].with_name(f"{source.files[0].name}.{correction.key}.cache")
        self._map: _CacheMap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def __repr__(self) -> str:
        return f"CorrectedSource({self.source!r}, {self.correction.key}, cache={self.cache!r})"

    @property
    def elements(self) -> list[int]:
        """Sorted atomic numbers of all molecules.

        Raises
        ------
        DatasetError
            Elements without D3 reference data, or as the source raises.
        """
        elements = self.source.elements
        without = [z for z in elements if z > self.correction.max_element]
        if without:
            raise DatasetError(
                f"{self.name}: no D3 reference data for {element_names(without)}. Remove these molecules, or do not "
                "subtract the dispersion."
            )
        return elements

    def where(self, index: int) -> str:
        """Return file, group and row of a molecule, for messages."""
        return self.source.where(index)

    def close(self) -> None:
        """Close data and cache until they are read again."""
        self._map = None
        self.source.close()

    def label_counts(self, keys: Sequence[str], max_bytes: int = LABEL_COUNT_BYTES) -> dict[str, LabelCount]:
        """As `MoleculeSource.label_counts`; a correction neither adds nor removes labels."""
        return self.source.label_counts(keys, max_bytes)

    def read(self, indices: np.ndarray, keys: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """As `MoleculeSource.read`, corrected.

        Raises
        ------
        DatasetError
            A molecule whose correction is not a number, or a cache that does not belong to the data.
        """
        indices = np.asarray(indices, np.int64)
        for positions, arrays in self.source.read(indices, self._needed(keys)):
            yield positions, self._corrected(indices[positions], arrays, keys)

    def chunks(self, keys: Sequence[str], max_rows: int = 65536) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """As `MoleculeSource.chunks`, corrected; raises as `read`."""
        for first, arrays in self.source.chunks(self._needed(keys), max_rows):
            rows = len(next(iter(arrays.values()), ()))
            yield first, self._corrected(np.arange(first, first + rows), arrays, keys)

    def _needed(self, keys: Sequence[str]) -> list[str]:
        """Arrays to read from the source for those that are asked for."""
        computes = self.cache == "none" and ("energy" in keys or "forces" in keys)
        return list(dict.fromkeys([*keys, *(("coord", "numbers") if computes else ())]))

    def _corrected(
        self, indices: np.ndarray, arrays: dict[str, np.ndarray], keys: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Arrays (k, ...) of molecules of one size with the correction subtracted, those of ``keys`` only."""
        if "energy" in arrays or "forces" in arrays:
            if self.cache == "none":
                energy, forces = self._computed(indices, arrays["coord"], arrays["numbers"], "forces" in arrays)
            else:
                energy, forces = self._cached(indices, "forces" in arrays)
            if "energy" in arrays:
                arrays["energy"] = arrays["energy"].astype(np.float64) - energy
            if forces is not None:
                arrays["forces"] = (arrays["forces"] - forces).astype(arrays["forces"].dtype)
        return {key: arrays[key] for key in keys if key in arrays}

    def _computed(
        self, indices: np.ndarray, coord: np.ndarray, numbers: np.ndarray, with_forces: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        forces = None
        if with_forces:
            energy, forces = self.correction.energy_and_forces(coord, numbers)
            finite = np.isfinite(energy) & np.isfinite(forces).all(axis=(1, 2))
        else:
            energy = self.correction.energy(coord, numbers)
            finite = np.isfinite(energy)
        if not finite.all():
            # As NaN it would pass for a missing label.
            raise DatasetError(
                f"{self.where(int(indices[np.argmin(finite)]))}: the dispersion correction is not a number: coord is "
                "NaN or infinite, or two atoms are at the same place. Remove the molecule."
            )
        return energy, forces

    # ----------------------------------------------------------------------------------------------
    # the cache on disk
    # ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check the elements and make the cache on disk, unless one is there that belongs to the data.

        Must have run in one process before any process reads. The file appears when it is complete; processes that
        make it at the same time do not disturb each other.

        Raises
        ------
        DatasetError
            The source cannot be corrected.
        ValueError, PermissionError
            No place or no right to write beside the data.
        """
        _ = self.elements
        if self.cache == "none":
            return
        reason = self._unusable()
        if reason is None:
            logger.info("%s: dispersion from %s", self.name, self.cache_path.name)
            return
        with_forces = "forces" in self.keys
        self._check_room(with_forces)
        logger.info("%s: computing the dispersion of %d molecules (cache: %s)", self.name, len(self), reason)
        identity = self._identity()
        sizes, starts, counts = np.unique(self.n_atoms, return_index=True, return_counts=True)
        first_of = dict(zip(sizes.tolist(), starts.tolist(), strict=True))
        with atomic_path(self.cache_path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs.update(identity)
            for n_atoms, count in zip(sizes.tolist(), counts.tolist(), strict=True):
                group = file.create_group(f"{n_atoms:03d}")
                group.create_dataset("energy", (count,), np.float64)
                if with_forces:
                    group.create_dataset("forces", (count, n_atoms, 3), np.float32)
            with tqdm(total=len(self), unit="molecule", unit_scale=True, desc="D3(BJ)", disable=None) as progress:
                for first, arrays in self.source.chunks(("coord", "numbers"), ROWS_PER_PIECE):
                    n_molecules, n_atoms = arrays["numbers"].shape
                    indices = np.arange(first, first + n_molecules)
                    energy, forces = self._computed(indices, arrays["coord"], arrays["numbers"], with_forces)
                    group, row = file[f"{n_atoms:03d}"], first - first_of[n_atoms]
                    group["energy"][row : row + n_molecules] = energy
                    if forces is not None:
                        group["forces"][row : row + n_molecules] = forces
                    progress.update(n_molecules)
        self._map = None
        logger.info("%s written", self.cache_path)

    def _check_room(self, with_forces: bool) -> None:
        hint = f"Set {CACHE_OPTION}: none, which computes the correction while reading."
        try:
            check_writable(self.cache_path)
        except OSError as error:
            raise PermissionError(f"{error}. {hint}") from error
        needed = 8 * len(self) + (12 * int(self.n_atoms.sum(dtype=np.int64)) if with_forces else 0)
        free = shutil.disk_usage(self.cache_path.parent).free
        if free < needed:
            raise ValueError(
                f"{self.cache_path}: needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free. {hint}"
            )

    def _identity(self) -> dict[str, Any]:
        """What a cache says about the data and the correction that it belongs to."""
        status = self.files[0].stat()
        return {
            "correction": json.dumps(self.correction.parameters, sort_keys=True),
            "correction_version": CORRECTION_VERSION,
            "molecules": len(self),
            "forces": "forces" in self.keys,
            "data_bytes": status.st_size,
            "data_mtime_ns": status.st_mtime_ns,
            "data_sample_sha256": self._sample_hash(),
        }

    def _sample_hash(self) -> str:
        """Hash of the structures of a few molecules, from the first to the last."""
        indices = np.unique(np.linspace(0, len(self) - 1, SAMPLED_MOLECULES).astype(np.int64))
        rows: list[bytes] = [b""] * len(indices)
        for positions, arrays in self.source.read(indices, ("coord", "numbers")):
            for position, coord, numbers in zip(positions, arrays["coord"], arrays["numbers"], strict=True):
                rows[position] = coord.tobytes() + numbers.tobytes()
        return hashlib.sha256(b"".join(rows)).hexdigest()

    def _unusable(self) -> str | None:
        """Why the cache cannot be used; None if it belongs to the data as they are now."""
        if not self.cache_path.is_file():
            return "none yet"
        try:
            with h5py.File(self.cache_path, "r") as file:
                found = dict(file.attrs)
        except OSError:
            return "damaged"
        for key, value in self._identity().items():
            if key not in found or found[key] != value:
                return f"of other data, {key} differs"
        return None

    def _cached(self, indices: np.ndarray, with_forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        if self._map is None:
            reason = self._unusable()
            if reason is not None:
                raise DatasetError(f"{self.cache_path}: {reason}. Call prepare() in one process, then read.")
            self._map = _CacheMap(self.cache_path, self.n_atoms)
        return self._map.rows(int(self.n_atoms[indices[0]]), indices, with_forces)


class _CacheMap:
    """Energies and forces of a cache, mapped into memory; what has been read does not stay in the process."""

    def __init__(self, path: Path, n_atoms: np.ndarray) -> None:
        with open(path, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sizes, starts = np.unique(n_atoms, return_index=True)
        self._starts: dict[int, int] = dict(zip(sizes.tolist(), starts.tolist(), strict=True))
        self._arrays: dict[tuple[int, str], np.ndarray] = {}
        with h5py.File(path, "r") as file:
            for n in self._starts:
                for key, array in file[f"{n:03d}"].items():
                    self._arrays[n, key] = np.ndarray(array.shape, array.dtype, self._memory, array.id.get_offset())

    def rows(self, n_atoms: int, indices: np.ndarray, with_forces: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Energies (k,) and forces (k, N, 3) of molecules of one size."""
        rows = indices - self._starts[n_atoms]
        energy = self._arrays[n_atoms, "energy"][rows]
        forces = self._arrays[n_atoms, "forces"][rows] if with_forces else None
        if hasattr(mmap, "MADV_DONTNEED"):
            # Pages that were touched count as memory of this process, and over an epoch they are the whole file.
            self._memory.madvise(mmap.MADV_DONTNEED)
        return energy, forces


# --------------------------------------------------------------------------------------------------
# datasets of one or more files
# --------------------------------------------------------------------------------------------------


def subtract_dispersion(source: MoleculeSource, correction: D3Correction, cache: str = "none") -> MoleculeSource:
    """Return a dataset with the correction subtracted; each of its files has a cache of its own.

    Parameters
    ----------
    source : MoleculeSource
        What `aimnet2mult.data.sgdataset.open_dataset` gives.
    correction : D3Correction
        As `subtraction` gives it.
    cache : str
        One of `CACHES`.

    Raises
    ------
    ValueError
        As `CorrectedSource`.
    """
    if isinstance(source, JoinedDataset):
        return JoinedDataset([CorrectedSource(part, correction, cache) for part in source.parts])
    return CorrectedSource(source, correction, cache)


def prepare_caches(source: MoleculeSource) -> None:
    """Call `CorrectedSource.prepare` for each file of a dataset; one process does so while the others wait."""
    for part in source.parts if isinstance(source, JoinedDataset) else (source,):
        if isinstance(part, CorrectedSource):
            part.prepare()
