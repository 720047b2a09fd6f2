"""What is kept of some molecules of a dataset to judge its units and self-atomic energies by."""

from functools import cached_property

import numpy as np

from aimnet2mult.data.checks import geometry
from aimnet2mult.data.checks.rows import Molecules
from aimnet2mult.data.checks.units import COVALENT, EnergyGuess, energy_unit, length_unit

SAMPLE_MOLECULES = 20_000
"""Molecules that units and self-atomic energies are judged by."""

SAMPLE_BLOCK = 64
"""Consecutive molecules of a sample, which are read together."""

PER_ELEMENT = 50
"""Molecules with each element that a sample should hold."""


NEAREST_PAIRS = 50_000
"""Pairs of atoms per piece that go into the distances of nearest neighbours."""


class Sample:
    """Molecules of a dataset that its units and self-atomic energies are judged by; only sound ones.

    Attributes
    ----------
    numbers, energy, charge, mult, keys : list of numpy.ndarray
        (k, N), and (k,) each, `aimnet2mult.data.checks.geometry.molecule_keys` among them, for the molecules of one
        piece.
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
        self.mult: list[np.ndarray] = []
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
        self.mult.append(molecules.mult)
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
