"""Checks of each molecule by itself: `ROW_CHECKS`, a table of functions that mark the molecules at fault."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import NamedTuple

import numpy as np

from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.data.base import INPUT_KEYS, MoleculeSource
from aimnet2mult.data.checks import geometry
from aimnet2mult.data.checks.findings import Finding, Thresholds, counted, locate
from aimnet2mult.data.checks.geometry import Fingerprints
from aimnet2mult.data.mixed import LABEL_KEYS

CHUNK_ROWS = 8192
"""Molecules read at a time."""


class LabelState(NamedTuple):
    """Masks (k,) of the molecules that have all of a label, only part of it, and infinities in it."""

    complete: np.ndarray
    half_missing: np.ndarray
    infinite: np.ndarray


class Molecules:
    """Some molecules of one size, read from a dataset.

    Parameters
    ----------
    indices : numpy.ndarray
        (k,) int, where they stand in the dataset.
    arrays : dict of str to numpy.ndarray
        (k, ...) for each key.

    Attributes
    ----------
    n_atoms : int
        Number N of atoms of each molecule.
    dtypes : dict of str to numpy.dtype
        Types of the arrays as they were read.
    """

    def __init__(self, indices: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        self.indices = indices
        self.dtypes = {key: values.dtype for key, values in arrays.items()}
        # Unsigned integers do not go below zero, and some functions of numpy do not take them.
        self.arrays = {**arrays, "numbers": arrays["numbers"].astype(np.int64, copy=False)}
        self.n_atoms = arrays["numbers"].shape[1]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def subset(self, rows: np.ndarray | slice) -> "Molecules":
        """Return some of the molecules."""
        return Molecules(self.indices[rows], {key: values[rows] for key, values in self.arrays.items()})

    @property
    def mult(self) -> np.ndarray:
        """Multiplicities, (k,), 1 where the data have none."""
        return np.asarray(self["mult"], np.float64) if "mult" in self else np.ones(len(self))

    @property
    def periodic(self) -> np.ndarray:
        """Mask (k,) of the molecules with a cell."""
        return np.asarray(self["cell"].any(axis=(1, 2))) if "cell" in self else np.zeros(len(self), bool)

    @property
    def keys(self) -> np.ndarray:
        """Hashes (k,) of composition, charge and multiplicity (`geometry.molecule_keys`)."""
        return geometry.molecule_keys(self["numbers"], self["charge"], self.mult)

    @property
    def fingerprints(self) -> Fingerprints:
        """What is kept to find equal and similar geometries."""
        return Fingerprints(self.keys, geometry.geometry_averages(self["numbers"], self.distances))

    @cached_property
    def distances(self) -> np.ndarray:
        """Distances of all pairs of atoms, (P, k), Å."""
        return geometry.pair_distances(self["coord"])

    @cached_property
    def shortest(self) -> np.ndarray:
        """Shortest distance of each molecule, (k,), Å; infinite for single atoms."""
        return np.asarray(self.distances.min(axis=0, initial=np.inf))

    @cached_property
    def electrons(self) -> np.ndarray:
        """Number of electrons, (k,): sum of the atomic numbers minus charge."""
        return np.asarray(self["numbers"].sum(axis=1) - np.asarray(self["charge"], np.float64))

    @cached_property
    def label_state(self) -> dict[str, LabelState]:
        """State of each label."""
        states = {}
        for key in LABEL_KEYS:
            if key in self:
                values = self[key].reshape(len(self), -1)
                missing, infinite = np.isnan(values), np.isinf(values)
                some = missing.any(axis=1)
                states[key] = LabelState(~some, some & ~missing.all(axis=1), infinite.any(axis=1))
        return states


def pieces(source: MoleculeSource, keys: Sequence[str] | None = None) -> Iterator[Molecules]:
    """Stream all molecules of a dataset, few enough at a time for all their distances; default inputs and labels."""
    for first, arrays in source.chunks(_keys(source) if keys is None else keys, CHUNK_ROWS):
        yield from _split(first + np.arange(len(arrays["numbers"])), arrays)


def read_pieces(source: MoleculeSource, indices: np.ndarray) -> Iterator[Molecules]:
    """As `pieces` for some molecules of a dataset."""
    for positions, arrays in source.read(indices, _keys(source)):
        yield from _split(indices[positions], arrays)


def _keys(source: MoleculeSource) -> list[str]:
    return [key for key in (*INPUT_KEYS, "cell", *LABEL_KEYS) if key in source.keys]


def _split(indices: np.ndarray, arrays: dict[str, np.ndarray]) -> Iterator[Molecules]:
    step = geometry.rows_per_block(arrays["numbers"].shape[1])
    for first in range(0, len(indices), step):
        rows = slice(first, first + step)
        yield Molecules(indices[rows], {key: values[rows] for key, values in arrays.items()})


Marked = tuple[np.ndarray, np.ndarray | None]
"""Mask (k,) of the molecules at fault, and how bad each molecule is (k,), or None where there are no degrees."""


class RowCheck(NamedTuple):
    """A check of each molecule by itself.

    Attributes
    ----------
    kind, severity
        As in `Finding`.
    needs : tuple of str
        Arrays without which there is nothing to check.
    mark : callable
        (`Molecules`, `Thresholds`) -> `Marked`.
    message : str
        With ``{molecules}`` (``3 of 200 molecules``), ``{worst}``, ``{minus_worst}`` and the thresholds by name.
    """

    kind: str
    severity: str
    needs: tuple[str, ...]
    mark: Callable[[Molecules, Thresholds], Marked]
    message: str


def _not_finite(key: str) -> Callable[[Molecules, Thresholds], Marked]:
    return lambda m, _: (~np.isfinite(m[key].reshape(len(m), -1)).all(axis=1), None)


def _infinite(key: str) -> Callable[[Molecules, Thresholds], Marked]:
    return lambda m, _: (m.label_state[key].infinite, None)


def _half_missing(key: str) -> Callable[[Molecules, Thresholds], Marked]:
    return lambda m, _: (m.label_state[key].half_missing, None)


def _fractional_charge(m: Molecules, _: Thresholds) -> Marked:
    off = np.abs(m["charge"] - np.rint(m["charge"]))
    return off > 1e-3, off


def _not_a_multiplicity(m: Molecules, _: Thresholds) -> Marked:
    mult = np.asarray(m["mult"], np.float64)
    return (mult < 0.999) | (np.abs(mult - np.rint(mult)) > 1e-3), None


def _wrong_parity(m: Molecules) -> np.ndarray:
    electrons, unpaired = np.rint(m.electrons), np.rint(m.mult) - 1
    integers = (np.abs(m.electrons - electrons) < 1e-3) & (np.abs(m.mult - 1 - unpaired) < 1e-3)
    return integers & (unpaired >= 0) & (np.mod(electrons - unpaired, 2) == 1)


COINCIDE = 0.01
"""Å; atoms closer than this are the same atom twice."""


def _close(m: Molecules, limits: Thresholds) -> Marked:
    return (m.shortest < limits.close) & (m.shortest >= COINCIDE), -m.shortest


def _far(m: Molecules, limits: Thresholds) -> Marked:
    gap = np.zeros(len(m))
    wide = np.asarray(m.distances.max(axis=0, initial=0.0) > limits.far)  # a gap is no wider than the molecule
    wide &= ~m.periodic
    gap[wide] = geometry.largest_gap(m["coord"][wide])
    return gap > limits.far, gap


SUM_IS_WRONG = 0.5
"""e; sums of charges that are off by more belong to another molecule or another quantity."""


def _sum_off(key: str, badly: bool) -> Callable[[Molecules, Thresholds], Marked]:
    def mark(m: Molecules, limits: Thresholds) -> Marked:
        expected = np.asarray(m["charge"], np.float64) if key == "charges" else m.mult - 1.0
        sums = m[key].sum(axis=1, dtype=np.float64)
        off = np.abs(sums - expected)
        if key == "spin_charges":  # beta minus alpha is no less right
            off = np.minimum(off, np.abs(sums + expected))
        limit = max(SUM_IS_WRONG, limits.charge_sum)
        return (off > limit) if badly else (off > limits.charge_sum) & (off <= limit), off

    return mark


NET_SHARE = 0.02
"""Share of the sum of the forces' sizes that their sum may reach by noise."""

TORQUE_SHARE = 0.05
"""The same for torques."""


def _net_force(m: Molecules, limits: Thresholds) -> Marked:
    forces = np.asarray(m["forces"], np.float64)
    net = np.linalg.norm(forces.sum(axis=1), axis=1)
    sizes = np.linalg.norm(forces, axis=2).sum(axis=1)
    return (net > limits.net_force) & (net > NET_SHARE * sizes), net


def _torque(m: Molecules, limits: Thresholds) -> Marked:
    forces = np.asarray(m["forces"], np.float64)
    lever = m["coord"] - m["coord"].mean(axis=1, keepdims=True, dtype=np.float64)
    torques = np.cross(lever, forces - forces.mean(axis=1, keepdims=True))
    net = np.linalg.norm(torques.sum(axis=1), axis=1)
    sizes = (np.linalg.norm(lever, axis=2) * np.linalg.norm(forces, axis=2)).sum(axis=1)
    radius = np.sqrt((lever**2).sum(axis=(1, 2)) / m.n_atoms)
    # A lever of 1 Å at least, so that diatomics are judged like the others.
    return ~m.periodic & (net > limits.net_force * np.maximum(radius, 1.0)) & (net > TORQUE_SHARE * sizes), net


ESSENTIAL_CHECKS = (
    RowCheck(
        "bad_numbers",
        "error",
        ("numbers",),
        lambda m, _: (np.any((m["numbers"] < 1) | (m["numbers"] > MAX_ATOMIC_NUMBER), axis=1), None),
        f"{{molecules}} with atomic numbers outside 1 to {MAX_ATOMIC_NUMBER}. Files hold plain atomic numbers, no "
        "padding and no fidelity offset.",
    ),
    *(
        RowCheck(f"bad_{key}", "error", (key,), _not_finite(key), f"{{molecules}} with {fault}")
        for key, fault in (
            ("coord", "NaN or infinite coordinates. Remove them from the file."),
            ("charge", "a charge that is NaN or infinite. Fill in the total charge, 0 for neutral molecules."),
            ("mult", "a multiplicity that is NaN or infinite. Fill in 2S+1, 1 for closed shells."),
        )
    ),
)
"""Molecules marked here are not looked at further."""

ROW_CHECKS = (
    *(
        RowCheck(
            f"infinite_{key}",
            "error",
            (key,),
            _infinite(key),
            f"{{molecules}} with infinite {key}. Write NaN where a label is missing, or remove the molecules.",
        )
        for key in LABEL_KEYS
    ),
    *(
        RowCheck(
            f"half_missing_{key}",
            "warning",
            (key,),
            _half_missing(key),
            f"{{molecules}} with {key} that are NaN in part. Training leaves out the {key} of these molecules "
            "altogether; a failed calculation or a slip in writing the file is likely.",
        )
        for key in LABEL_KEYS
    ),
    RowCheck(
        "fractional_charge",
        "warning",
        ("charge",),
        _fractional_charge,
        "{molecules} with a total charge that is not an integer (off by up to {worst:.3f} e). charge is the charge of "
        "the molecule, not a sum of rounded atomic charges.",
    ),
    RowCheck(
        "not_a_multiplicity",
        "error",
        ("mult",),
        _not_a_multiplicity,
        "{molecules} with a multiplicity that is not 1, 2, 3 ... mult is 2S+1: 1 for a singlet, not the number of "
        "unpaired electrons or S.",
    ),
    RowCheck(
        "no_electrons",
        "error",
        ("charge",),
        lambda m, _: (m.electrons < -1e-3, None),
        "{molecules} with a charge larger than the sum of the atomic numbers. Check units and sign of charge.",
    ),
    RowCheck(
        "parity",
        "error",
        ("mult", "charge"),
        lambda m, _: (_wrong_parity(m), None),
        "{molecules} with a multiplicity that its number of electrons does not allow (even number: 1, 3 ...; odd: "
        "2, 4 ...). Charge, multiplicity or an atom is wrong.",
    ),
    RowCheck(
        "parity_without_mult",
        "warning",
        ("charge",),
        lambda m, _: (_wrong_parity(m) & ("mult" not in m), None),
        "{molecules} with an odd number of electrons, and the file has no mult, so that 1 (closed shell) is assumed. "
        "Add mult, or check the charges.",
    ),
    RowCheck(
        "too_many_unpaired",
        "error",
        ("mult", "charge"),
        lambda m, _: (m.mult - 1 > m.electrons + 1e-3, None),
        "{molecules} with more unpaired electrons (mult - 1) than electrons. Check mult and charge.",
    ),
    RowCheck(
        "coinciding_atoms",
        "error",
        ("coord",),
        lambda m, _: (m.shortest < COINCIDE, None),
        f"{{molecules}} with two atoms in one place (less than {COINCIDE} Å apart). Remove the double atom or the "
        "molecule.",
    ),
    RowCheck(
        "close_atoms",
        "warning",
        ("coord",),
        _close,
        "{molecules} with atoms closer than {close} Å (shortest {minus_worst:.3f} Å). No bond is that short: broken "
        "geometries, or coordinates in another unit.",
    ),
    RowCheck(
        "far_fragments",
        "note",
        ("coord",),
        _far,
        "{molecules} with parts more than {far} Å from the rest (widest gap {worst:.1f} Å), beyond any cutoff. "
        "Intended only for dissociated systems; else a stray atom or a molecule broken by periodic wrapping.",
    ),
    RowCheck(
        "charges_sum",
        "error",
        ("charges", "charge"),
        _sum_off("charges", badly=True),
        "{molecules} whose atomic charges do not sum to the charge (off by up to {worst:.3g} e). The charges are of "
        "another molecule or state, or charge is wrong; a model that conserves charge cannot learn them.",
    ),
    RowCheck(
        "charges_sum_rounded",
        "warning",
        ("charges", "charge"),
        _sum_off("charges", badly=False),
        "{molecules} whose atomic charges miss the total charge by more than {charge_sum} e (up to {worst:.3g} e). "
        "Rounded or unnormalised charges; rescale them or take another population analysis.",
    ),
    RowCheck(
        "spin_charges_sum",
        "error",
        ("spin_charges", "mult"),
        _sum_off("spin_charges", badly=True),
        "{molecules} whose spin_charges do not sum to mult - 1 (off by up to {worst:.3g} e). mult is wrong, or these "
        "are the spins of another state.",
    ),
    RowCheck(
        "spin_charges_sum_rounded",
        "warning",
        ("spin_charges", "mult"),
        _sum_off("spin_charges", badly=False),
        "{molecules} whose spin_charges miss mult - 1 by more than {charge_sum} e (up to {worst:.3g} e). Rounded or "
        "unnormalised spin populations.",
    ),
    RowCheck(
        "net_force",
        "warning",
        ("forces",),
        _net_force,
        "{molecules} whose forces do not add up to zero (net force up to {worst:.3g} eV/Å). An atom's force is "
        "missing, an external field acts, or the calculation is noisy; no potential can reproduce it.",
    ),
    RowCheck(
        "torque",
        "warning",
        ("forces", "coord"),
        _torque,
        "{molecules} whose forces would spin them (net torque up to {worst:.3g} eV). Coordinates and forces are likely "
        "in different orientations (a program's standard orientation), or the order of the atoms differs.",
    ),
)
"""Checks of single molecules. Rows whose label is missing never count: comparisons with NaN are false."""


class Tally:
    """Molecules that one check has marked: how many, the first few, the worst."""

    def __init__(self, check: RowCheck, limits: Thresholds) -> None:
        self.check, self.limits = check, limits
        self.count = 0
        self.examples: list[int] = []
        self.worst = -math.inf

    def add(self, molecules: Molecules) -> np.ndarray:
        """Check molecules, count those that are marked, and return their mask (k,)."""
        if not len(molecules) or any(key not in molecules for key in self.check.needs):
            return np.zeros(len(molecules), bool)
        mask, badness = self.check.mark(molecules, self.limits)
        if mask.any():
            self.count += int(mask.sum())
            self.examples += molecules.indices[mask][: self.limits.max_examples - len(self.examples)].tolist()
            if badness is not None:
                self.worst = max(self.worst, float(badness[mask].max()))
        return mask


class RowTallies:
    """What checks of rows have marked in one dataset.

    Parameters
    ----------
    name : str
        The dataset's name.
    source : MoleculeSource
        The dataset.
    limits : Thresholds
        From where on molecules are marked.
    checks : sequence of RowCheck, optional
        What sound molecules are checked for, beside `ESSENTIAL_CHECKS`.
    """

    def __init__(
        self, name: str, source: MoleculeSource, limits: Thresholds, checks: Sequence[RowCheck] = ROW_CHECKS
    ) -> None:
        self.name, self.source, self.limits = name, source, limits
        self.total = 0
        self.essential = [Tally(check, limits) for check in ESSENTIAL_CHECKS]
        self.others = [Tally(check, limits) for check in checks]

    def add(self, molecules: Molecules) -> Molecules:
        """Check molecules; returns the sound ones, whose numbers, coordinates, charge and mult are usable."""
        self.total += len(molecules)
        faulty = np.zeros(len(molecules), bool)
        for tally in self.essential:
            faulty |= tally.add(molecules)
        sound = molecules.subset(~faulty) if faulty.any() else molecules
        for tally in self.others:
            tally.add(sound)
        return sound

    def findings(self) -> Iterator[Finding]:
        """Findings of the checks that have marked molecules."""
        for tally in (*self.essential, *self.others):
            if tally.count:
                message = tally.check.message.format(
                    molecules=f"{tally.count} of {counted(self.total, 'molecule')}",
                    worst=tally.worst,
                    minus_worst=-tally.worst,
                    **asdict(self.limits),
                )
                places = tuple(locate(self.source, index) for index in tally.examples)
                yield Finding(tally.check.kind, tally.check.severity, self.name, message, tally.count, places)
