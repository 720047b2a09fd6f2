"""Checks of a sample of a dataset: units of coordinates and energies, the size of forces."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from aimnet2mult.data.checks import geometry
from aimnet2mult.data.checks.findings import Finding
from aimnet2mult.data.checks.rows import Molecules
from aimnet2mult.data.checks.units import COVALENT, FORCE_SCALE, EnergyGuess, energy_unit, length_unit

SAMPLE_MOLECULES = 20_000
"""Molecules that units and self-atomic energies are judged by."""

SAMPLE_BLOCK = 64
"""Consecutive molecules of a sample, which are read together."""

PER_ELEMENT = 50
"""Molecules with each element that a sample should hold."""


class Sample:
    """Molecules of a dataset that its units and self-atomic energies are judged by; only sound ones.

    Attributes
    ----------
    numbers, energy, charge, keys : list of numpy.ndarray
        (k, N), (k,), (k,) and (k,) `aimnet2mult.data.checks.geometry.molecule_keys` for the molecules of one piece.
    nearest : list of tuple of numpy.ndarray
        (m,) atomic numbers and distances of the atoms to their nearest neighbours, Å, for some molecules of a piece
        that hold `COVALENT` elements only.
    force_rms : list of numpy.ndarray
        (k,), root mean square force component, eV/Å.
    """

    def __init__(self) -> None:
        self.numbers: list[np.ndarray] = []
        self.energy: list[np.ndarray] = []
        self.charge: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.nearest: list[tuple[np.ndarray, np.ndarray]] = []
        self.force_rms: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self.energy))

    def add(self, molecules: Molecules) -> None:
        """Take in molecules."""
        if not len(molecules):
            return
        self.numbers.append(np.asarray(molecules["numbers"], np.int16))
        self.energy.append(np.asarray(molecules["energy"], np.float64))
        self.charge.append(np.asarray(molecules["charge"], np.float64))
        self.keys.append(molecules.keys)
        first = molecules.subset(slice(0, max(1, NEAREST_PAIRS // molecules.n_atoms**2)))
        first = first.subset(COVALENT[first["numbers"]].all(axis=1))
        self.nearest.append((first["numbers"].ravel(), geometry.nearest_distances(first["coord"]).ravel()))
        if "forces" in molecules and molecules.n_atoms > 1:  # none act on an atom alone
            forces = np.asarray(molecules["forces"], np.float64)
            self.force_rms.append(np.sqrt((forces**2).mean(axis=(1, 2))))

    @cached_property
    def energy_guess(self) -> EnergyGuess | None:
        """What the energies look like."""
        return energy_unit(self.numbers, self.energy) if self.energy else None

    @cached_property
    def length_guess(self) -> tuple[str, float] | None:
        """What the coordinates look like, and the median distance it rests on."""
        if not self.nearest:
            return None
        numbers, nearest = (np.concatenate(parts) for parts in zip(*self.nearest, strict=True))
        return length_unit(numbers, nearest)

    @cached_property
    def typical_force(self) -> float | None:
        """Median over the molecules of the root mean square force component, eV/Å."""
        rms = np.concatenate(self.force_rms) if self.force_rms else np.zeros(0)
        rms = rms[np.isfinite(rms)]
        return float(np.median(rms)) if len(rms) else None


NEAREST_PAIRS = 50_000
"""Pairs of atoms per piece that go into the distances of nearest neighbours."""


def check_length_unit(name: str, sample: Sample) -> Iterator[Finding]:
    """Coordinates in Bohr, nm or pm."""
    if sample.length_guess is None or sample.length_guess[0] == "Å":
        return
    unit, median = sample.length_guess
    yield Finding(
        "coord_unit",
        "warning",
        name,
        f"coordinates look like {unit}, not Å: atoms are {median:.3g} from their nearest neighbours (median). Convert "
        f'them, or set (or correct) the root attribute coord_unit = "{unit}" of the file.',
    )


def check_energy_unit(name: str, sample: Sample) -> Iterator[Finding]:
    """Energies in Hartree, kcal/mol, kJ/mol or Rydberg."""
    guess = sample.energy_guess
    if guess is None or guess.unit == "eV":
        return
    yield Finding(
        "energy_unit",
        "warning",
        name,
        f"energies look like {guess.unit}, not eV: in {guess.unit} they have the size of {guess.reference}. Convert "
        f'them, or set (or correct) the root attribute energy_unit = "{guess.unit}" of the file.',
    )


def check_force_scale(name: str, sample: Sample) -> Iterator[Finding]:
    """Forces that are too large for eV/Å, or all zero."""
    typical = sample.typical_force
    if typical is None:
        return
    if typical > FORCE_SCALE:
        yield Finding(
            "force_scale",
            "warning",
            name,
            f"forces are very large for eV/Å: half of the molecules have root mean square components above "
            f"{typical:.0f}. kcal/mol/Å or kJ/mol (divide by 23.06 or 96.49), or violent geometries.",
        )
    elif typical == 0.0:
        yield Finding(
            "zero_forces",
            "warning",
            name,
            "the forces of at least half of the molecules are exactly zero. Write NaN where forces are missing.",
        )


SAMPLE_CHECKS = (check_length_unit, check_energy_unit, check_force_scale)
"""Functions of (name, `Sample`) that give findings."""
