"""Checks of all of a dataset: what is noted while it is read (`Examined`), and `FIDELITY_CHECKS` on that."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from aimnet2mult.constants import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, element_names
from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.checks.findings import Finding, Summary, Thresholds, locate
from aimnet2mult.data.checks.geometry import Fingerprints
from aimnet2mult.data.checks.pairs import FORCE_PAIRS_READ, close_pairs
from aimnet2mult.data.checks.residuals import Residuals, fit_residuals, outlier_check
from aimnet2mult.data.checks.rows import Molecules, RowTallies, pieces
from aimnet2mult.data.checks.sample import (
    PER_ELEMENT,
    SAMPLE_BLOCK,
    SAMPLE_CHECKS,
    SAMPLE_MOLECULES,
    Sample,
)
from aimnet2mult.data.checks.units import STIFFEST, contrary_pairs, force_relation, units_of_ratio


class Examined:
    """A dataset while it is being read, and what is known of it then.

    Parameters
    ----------
    name : str
        Its name.
    source : MoleculeSource
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
    examples : dict of int to list of int
        Atomic number -> the first molecules that hold it.
    dtypes : dict of str to set of numpy.dtype
        Types of each array.
    largest_energy : float
        Of any molecule, without sign, eV.
    n_contrary : int
        Pairs of close geometries whose energies do not go with the forces although those of most pairs do.
    contrary : numpy.ndarray
        Molecules that occur in no other pairs.
    """

    def __init__(
        self, name: str, source: MoleculeSource, limits: Thresholds, sae: Mapping[int, float] | None = None
    ) -> None:
        self.name, self.source, self.limits, self.sae = name, source, limits, sae
        self.tallies = RowTallies(name, source, limits)
        self.sample = Sample()
        self.summary = Summary([str(file) for file in source.files], len(source))
        sizes, counts = np.unique(source.n_atoms, return_counts=True)
        self.summary.sizes = dict(zip(sizes.tolist(), counts.tolist(), strict=True))
        self.atoms = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)
        self.molecules = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)
        self.examples: dict[int, list[int]] = {}
        self.largest_energy = 0.0
        self.dtypes: dict[str, set[np.dtype[Any]]] = {}
        self._stride = max(1, len(source) // SAMPLE_MOLECULES)
        self.n_contrary = 0
        self.contrary = np.zeros(0, np.int64)
        self._sampled = np.zeros(MAX_ATOMIC_NUMBER + 1, np.int64)

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
            examples = self.examples.setdefault(z, [])
            examples += sound.indices[holds][: self.limits.max_examples - len(examples)].tolist()
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


def check_rows(data: Examined) -> Iterator[Finding]:
    """What the checks of rows have marked."""
    yield from data.tallies.findings()


def check_sample(data: Examined) -> Iterator[Finding]:
    """What the sample says about units."""
    for function in SAMPLE_CHECKS:
        yield from function(data.name, data.sample)


def check_types(data: Examined) -> Iterator[Finding]:
    """Arrays stored with too few digits."""
    largest = data.largest_energy
    if any(dtype.kind == "f" and dtype.itemsize < 8 for dtype in data.dtypes.get("energy", ())):
        lost = float(np.spacing(np.float32(largest)))
        yield Finding(
            "energy_type",
            "warning" if lost > 1e-4 else "note",
            data.name,
            f"energy is stored as {data.summary.dtypes['energy']}: at {largest:.0f} eV neighbouring numbers are "
            f"{1e3 * lost:.2g} meV apart. Store float64.",
        )
    for key in ("coord", "forces", "charges"):
        if any(dtype.kind != "f" or dtype.itemsize < 4 for dtype in data.dtypes.get(key, ())):
            yield Finding(
                f"{key}_type",
                "warning",
                data.name,
                f"{key} is stored as {data.summary.dtypes[key]}, which rounds it too much. Store float32 or float64.",
            )


def check_coverage(data: Examined) -> Iterator[Finding]:
    """Labels that some molecules lack."""
    total = len(data.source)
    labels = data.summary.labels
    if not any(labels.values()):
        yield Finding("no_labels", "error", data.name, "no molecule has any label. Every one is NaN.")
    for key, count in labels.items():
        if 0 < count < total:
            yield Finding(
                "missing_labels",
                "note",
                data.name,
                f"{total - count} of {total} molecules lack {key}; training leaves them out of its loss.",
            )
        elif not count and any(labels.values()):
            yield Finding("missing_labels", "warning", data.name, f"the file has {key}, but it is NaN everywhere.")


def check_rare_elements(data: Examined) -> Iterator[Finding]:
    """Elements that too few molecules hold to learn them."""
    limit = min(data.limits.rare_element, len(data.source))
    rare = [z for z in sorted(data.elements) if data.molecules[z] < limit]
    if rare:
        examples = sorted({data.examples[z][0] for z in rare})[: data.limits.max_examples]
        listed = ", ".join(f"{ELEMENT_SYMBOLS[z]} ({data.molecules[z]})" for z in rare)
        yield Finding(
            "rare_element",
            "note",
            data.name,
            f"elements in fewer than {limit} molecules: {listed}. Do not expect them to be learnt from this dataset.",
            None,
            tuple(locate(data.source, index) for index in examples),
        )


def check_forces(data: Examined) -> Iterator[Finding]:
    """Forces that are not minus the gradient of the energies."""
    pairs = data.summary.force_pairs
    if pairs is None:
        return
    if pairs.related and data.n_contrary:
        examples = data.contrary[: data.limits.max_examples]
        yield Finding(
            "forces_of_some",
            "warning",
            data.name,
            f"in {data.n_contrary} of {pairs.n_pairs} pairs of close geometries energies do not go with the forces, as "
            "they do in the others. Some energies or forces have another sign or unit, or are of another molecule or "
            "electronic state. Have several files been joined?",
            None,
            tuple(locate(data.source, index) for index in examples.tolist()),
        )
    if pairs.related and pairs.consistent:
        if pairs.stiffness > STIFFEST and data.sample.energy_guess is None:
            yield Finding(
                "energy_and_forces_unit",
                "warning",
                data.name,
                f"energies and forces go together, but neither is likely in units of eV: forces change by "
                f"{pairs.stiffness:.0f} eV/Å for each Å of displacement (bonds: 5 to 100). kcal/mol or kJ/mol?",
            )
        return
    seen = f"between {pairs.n_pairs} pairs of close geometries, energies change by {pairs.slope:.3g} times the work"
    if not pairs.related:
        yield Finding(
            "forces_unrelated",
            "warning",
            data.name,
            f"forces do not go with the energies ({seen} of the forces, but with no clear relation: "
            f"r = {pairs.correlation:.2f}). Forces of other molecules, another order of atoms, another method, or "
            "very noisy ones.",
        )
        return
    positive = pairs.slope > 0.0
    if not positive:
        yield Finding(
            "forces_sign",
            "error",
            data.name,
            f"forces have the wrong sign: {seen} of the forces, where +1 is right. "
            + (
                "These are gradients; multiply them by -1."
                if data.sample.energy_guess is not None
                else "Either these are gradients, or the energies have the wrong sign (binding energies, positive for "
                "what is bound). Multiply one of the two by -1."
            ),
        )
    if abs(abs(pairs.slope) - 1.0) > 0.3:
        guess = data.sample.energy_guess
        length = data.sample.length_guess[0] if data.sample.length_guess else "Å"
        units = units_of_ratio(pairs.slope, length, None if guess is None else guess.unit)
        words = " or ".join(f"energies in {energy} with forces in {force}" for energy, force in units)
        yield Finding(
            "forces_unit",
            "warning",
            data.name,
            f"forces are not minus the gradient of the energies: {seen} of the forces, where 1 is right. "
            + (f"That is the factor of {words}. " if words else "That is no usual factor between units. ")
            + "Convert them, or set (or correct) the root attributes energy_unit and forces_unit of the file.",
        )
    elif positive:
        yield Finding(
            "forces_inexact",
            "warning",
            data.name,
            f"forces are roughly, but not exactly minus the gradient of the energies: {seen} of the forces, where 1 is "
            "right. Energies and forces of different settings (dispersion in only one of them, another basis)?",
        )


STATE_KEYS = ("numbers", "energy", "charge", "mult")
"""What outliers of the energy are found by."""

OFF_SAE = 5.0
"""eV per atom; self-atomic energies that miss the energies by more are those of another dataset."""


def check_energies(data: Examined) -> Iterator[Finding]:
    """Energies that do not go with the self-atomic energies."""
    if data.sae is not None:
        absent = sorted(data.elements.difference(data.sae))
        if absent:
            yield Finding(
                "sae_elements",
                "error",
                data.name,
                f"{element_names(absent)} not among the self-atomic energies. Fit them to this dataset "
                "(python -m aimnet2mult.train.calc_sae).",
            )
    if data.residuals is None:
        return
    if data.sae is not None and abs(data.residuals.typical) > OFF_SAE:
        yield Finding(
            "sae_mismatch",
            "warning",
            data.name,
            f"self-atomic energies leave {data.residuals.typical:.4g} eV per atom: they are of another method or unit. "
            "Fit them to this dataset (python -m aimnet2mult.train.calc_sae).",
        )
    yield from check_outliers(data, pieces(data.source, STATE_KEYS))


def check_outliers(data: Examined, molecules: Iterator[Molecules]) -> Iterator[Finding]:
    """Molecules whose energies are far from the sum of their self-atomic energies."""
    assert data.residuals is not None
    tallies = RowTallies(data.name, data.source, data.limits, [outlier_check(data.residuals)])
    for piece in molecules:
        tallies.add(piece)
    yield from (finding for finding in tallies.findings() if finding.kind == "energy_outlier")


FIDELITY_CHECKS: tuple[Callable[[Examined], Iterator[Finding]], ...] = (
    check_rows,
    check_sample,
    check_types,
    check_forces,
    check_energies,
    check_coverage,
)
"""Functions of an `Examined` dataset that give findings."""
