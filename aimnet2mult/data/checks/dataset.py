"""A dataset (`Part`), and what is noted while it is read (`Examined`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from aimnet2mult.constants import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER
from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.checks.findings import Finding, Summary, Thresholds, locate
from aimnet2mult.data.checks.geometry import Fingerprints
from aimnet2mult.data.checks.pairs import FORCE_PAIRS_READ, close_pairs
from aimnet2mult.data.checks.residuals import Residuals, fit_residuals
from aimnet2mult.data.checks.rows import Molecules, RowTallies, pieces
from aimnet2mult.data.checks.sample import PER_ELEMENT, SAMPLE_BLOCK, SAMPLE_MOLECULES, Sample
from aimnet2mult.data.checks.units import contrary_pairs, force_relation


@dataclass
class Part:
    """Molecules of one source and what they are used for.

    Attributes
    ----------
    fidelity : str
        Level of theory.
    source : MoleculeSource
        Where the molecules are.
    validates : numpy.ndarray
        (n,) bool, molecules used for validation; all of them in separate validation data.
    """

    fidelity: str
    source: MoleculeSource
    validates: np.ndarray

    @property
    def only_validates(self) -> bool:
        """Whether all of the data is for validation."""
        return len(self.validates) > 0 and bool(self.validates.all())

    @property
    def name(self) -> str:
        """The fidelity, with a word where all of the data is for validation."""
        return f"{self.fidelity} (validation)" if self.only_validates else self.fidelity


class Examined:
    """A dataset while it is being read, and what is known of it then.

    Parameters
    ----------
    part : Part
        The dataset.
    limits : Thresholds
        From where on something is reported.
    sae : mapping of int to float, optional
        Self-atomic energies that training will subtract, eV; default fitted to a sample.

    Attributes
    ----------
    tallies : RowTallies
        What the checks of rows have found.
    sample : Sample
        Molecules for the checks of a sample.
    summary : Summary
        Facts.
    atoms, molecules : numpy.ndarray
        (`MAX_ATOMIC_NUMBER` + 1,) int64, atoms of each element and molecules that hold it.
    examples : dict of int to int
        Atomic number -> the first molecule that holds it.
    dtypes : dict of str to set of numpy.dtype
        Types of each array.
    largest_energy : float
        Of any molecule, without sign, eV.
    n_contrary : int
        Pairs of close geometries whose energies do not go with the forces although those of most pairs do.
    contrary : numpy.ndarray
        Molecules that occur in no other pairs.
    """

    def __init__(self, part: Part, limits: Thresholds, sae: Mapping[int, float] | None = None) -> None:
        self.part, self.limits, self.sae = part, limits, sae
        self.name, self.source = part.name, part.source
        self.tallies = RowTallies(part.name, part.source, limits)
        self.sample = Sample()
        self.summary = Summary([str(file) for file in part.source.files], len(part.source))
        sizes, counts = np.unique(part.source.n_atoms, return_counts=True)
        self.summary.sizes = dict(zip(sizes.tolist(), counts.tolist(), strict=True))
        self.atoms = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)
        self.molecules = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)
        self.examples: dict[int, int] = {}
        self.dtypes: dict[str, set[np.dtype[Any]]] = {}
        self.largest_energy = 0.0
        self.n_contrary = 0
        self.contrary = np.zeros(0, np.int64)
        self._stride = max(1, len(part.source) // SAMPLE_MOLECULES)  # of the blocks that are sampled
        self._sampled = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)  # molecules of the sample that hold each element

    def read(self, prints: Fingerprints, progress: "tqdm[Any]") -> None:
        """Read all molecules once, and fill ``prints``, the fingerprints of as many."""
        for molecules in pieces(self.source):
            sound = self.look_at(molecules)
            if len(sound):
                self._take_in(sound)
                prints.keys[sound.indices], prints.averages[sound.indices] = sound.fingerprints
            progress.update(len(molecules))
        self._summarise(prints)

    def look_at(self, molecules: Molecules) -> Molecules:
        """Apply the checks of rows; returns the molecules whose inputs are usable."""
        self._note_arrays(molecules)
        return self.tallies.add(molecules)

    def _note_arrays(self, molecules: Molecules) -> None:
        summary = self.summary
        for key, dtype in molecules.dtypes.items():
            self.dtypes.setdefault(key, set()).add(dtype)
        for key, state in molecules.label_state.items():
            summary.labels[key] = summary.labels.get(key, 0) + int(state.complete.sum())
        size = np.abs(molecules["energy"][np.isfinite(molecules["energy"])]).max(initial=0.0)
        self.largest_energy = max(self.largest_energy, float(size))

    def _take_in(self, sound: Molecules) -> None:
        numbers, summary = sound["numbers"], self.summary
        shortest = float(sound.shortest.min())
        if np.isfinite(shortest):
            summary.shortest = shortest if summary.shortest is None else min(summary.shortest, shortest)
        _count(summary.charges, sound["charge"])
        if "mult" in sound:
            _count(summary.mults, sound["mult"])
        self.atoms += np.bincount(numbers.ravel(), minlength=MAX_ATOMIC_NUMBER + 1)
        chosen = sound.indices // SAMPLE_BLOCK % self._stride == 0
        for z in np.flatnonzero(np.bincount(numbers.ravel())).tolist():
            holds = (numbers == z).any(axis=1)
            self.molecules[z] += int(holds.sum())
            self.examples.setdefault(z, int(sound.indices[holds][0]))
            if self._sampled[z] < PER_ELEMENT:
                chosen[np.flatnonzero(holds)[: PER_ELEMENT - self._sampled[z]]] = True
            self._sampled[z] += int((holds & chosen).sum())
        self.sample.add(sound.subset(chosen))

    def _summarise(self, prints: Fingerprints) -> None:
        summary, sample = self.summary, self.sample
        summary.elements = {
            ELEMENT_SYMBOLS[z]: {"atoms": int(self.atoms[z]), "molecules": int(self.molecules[z])}
            for z in np.flatnonzero(self.molecules).tolist()
        }
        summary.dtypes = {key: ", ".join(sorted(map(str, types))) for key, types in self.dtypes.items()}
        if sample.energy_guess is not None:
            summary.energy_looks_like = f"{sample.energy_guess.unit}, {sample.energy_guess.reference}"
        summary.typical_force = sample.typical_force
        if self.residuals is not None:
            summary.residual_per_atom = self.residuals.per_atom
        self.compare_forces(prints)

    def compare_forces(
        self, prints: Fingerprints, indices: np.ndarray | None = None, limit: int = FORCE_PAIRS_READ
    ) -> None:
        """Compare forces with energies between close geometries; arguments as in `close_pairs`."""
        if "forces" not in self.source.keys:
            return
        pairs = close_pairs(self.source, prints, indices, limit)
        relation = force_relation(*pairs[1:])
        self.summary.force_pairs = relation
        if relation is not None:
            agree, contrary = contrary_pairs(pairs.work, pairs.energy_change, relation.slope)
            self.n_contrary = int(contrary.sum())
            self.contrary = np.setdiff1d(pairs.indices[contrary], pairs.indices[agree])

    def finding(
        self, kind: str, severity: str, message: str, count: int | None = None, examples: Sequence[int] = ()
    ) -> Finding:
        """Finding about this dataset; ``examples`` are molecules by their index."""
        return Finding(kind, severity, self.name, message, count, tuple(locate(self.source, i) for i in examples))

    @cached_property
    def residuals(self) -> Residuals | None:
        """Energies beside self-atomic energies, fitted or given; None without energies."""
        return fit_residuals(self.sample, self.sae)

    @property
    def elements(self) -> set[int]:
        """Atomic numbers that occur."""
        return set(np.flatnonzero(self.molecules).tolist())


def _count(counts: dict[int, int], values: np.ndarray) -> None:
    for value, count in zip(*np.unique(np.rint(values), return_counts=True), strict=True):
        counts[int(value)] = counts.get(int(value), 0) + int(count)
