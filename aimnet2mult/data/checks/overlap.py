"""The same geometries in several places: repeats, fidelities in common, validation data that is trained on."""

from collections.abc import Iterator, Sequence

import numpy as np

from aimnet2mult.data.checks.dataset import Part
from aimnet2mult.data.checks.findings import Finding, Place, Thresholds, counted, locate
from aimnet2mult.data.checks.geometry import Fingerprints
from aimnet2mult.data.checks.pairs import equal_geometries, owners_of

SAME_ENERGY = 1e-3
"""eV; repeats of a geometry may differ by this much."""

STEEPEST = 50.0
"""eV/Å; what energies may change by where geometries are the same only within the threshold."""

MANY = 0.01
"""Share of the molecules from where on repeats are a warning, and leaks an error."""


class Overlap:
    """Equal geometries among datasets, asked for by dataset.

    Parameters
    ----------
    parts : sequence of Part
        The datasets.
    prints : Fingerprints
        Of all their molecules, one dataset after the other.
    limits : Thresholds
        From where on geometries differ, and how many examples are named.
    """

    def __init__(self, parts: Sequence[Part], prints: Fingerprints, limits: Thresholds) -> None:
        self.parts = parts
        lengths = [len(part.source) for part in parts]
        self.starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        self.max_examples = limits.max_examples
        self.pairs = equal_geometries([part.source for part in parts], self.starts, prints, limits)
        self.owners = owners_of(self.starts, self.pairs.indices)
        validates = np.concatenate([part.validates for part in parts])
        self.validates = validates[self.pairs.indices]

    def places(self, indices: np.ndarray) -> tuple[Place, ...]:
        """Where the first of some molecules lie."""
        chosen = indices[: self.max_examples]
        return tuple(
            locate(self.parts[owner].source, index - self.starts[owner])
            for index, owner in zip(chosen.tolist(), owners_of(self.starts, chosen).tolist(), strict=True)
        )

    @property
    def at_least(self) -> str:
        """Word before a count."""
        return "" if self.pairs.complete else "at least "

    def repeats(self) -> Iterator[Finding]:
        """Geometries that occur more than once in a dataset."""
        for number, part in enumerate(self.parts):
            inside = (self.owners == number).all(axis=1)
            if not inside.any():
                continue
            purpose = "validation" if part.only_validates else "training"
            later, first = self._later(inside)
            share = len(later) / len(part.source)
            yield Finding(
                "duplicates",
                "warning" if share > MANY else "note",
                part.name,
                f"{self.at_least}{counted(len(later), 'molecule')} ({100 * share:.2g} %) with a geometry that is there "
                f"before (the first repeats {first}). They count more than once in {purpose}"
                + (", as if a file had been joined with itself." if share > 0.4 else "."),
                len(later),
                self.places(later),
            )
            change = np.abs(self.pairs.energy_change)
            differ = inside & (change > SAME_ENERGY + STEEPEST * self.pairs.mismatch)
            if differ.any():
                later, first = self._later(differ)
                yield Finding(
                    "contradictory_duplicates",
                    "warning",
                    part.name,
                    f"{self.at_least}{counted(len(later), 'molecule')} with the geometry, charge and multiplicity of "
                    f"another one, but another energy (by up to {change[differ].max():.3g} eV; the first against "
                    f"{first}). One of the two is another electronic state or level of theory; keep one.",
                    len(later),
                    self.places(later),
                )

    def _later(self, chosen: np.ndarray) -> tuple[np.ndarray, Place]:
        """The later molecules of some pairs, and where the one lies that the first of them repeats."""
        later, pair = np.unique(self.pairs.indices[chosen, 1], return_index=True)
        return later, self.places(self.pairs.indices[chosen, 0][pair[:1]])[0]

    def shared(self) -> Iterator[Finding]:
        """Geometries that several fidelities have."""
        between = (self.owners[:, 0] != self.owners[:, 1]) & ~self.validates.any(axis=1)
        for a, b in np.unique(self.owners[between], axis=0).tolist():
            chosen = between & (self.owners == (a, b)).all(axis=1)
            names = f"{self.parts[a].name}, {self.parts[b].name}"
            molecules = np.unique(self.pairs.indices[chosen, 0])
            found = f"{self.at_least}{counted(len(molecules), 'molecule')} of the same geometry in both"
            change = self.pairs.energy_change[chosen]
            same = np.abs(change) < 1e-6
            if same.sum() >= max(3, 0.5 * np.isfinite(change).sum()):
                kind, severity = "same_energies", "error"
                message = (
                    f"{found}, {int(same.sum())} of them with the same energy to 1e-6 eV. The same data is given for "
                    "two levels of theory."
                )
            else:
                kind, severity = "shared_geometries", "note"
                message = f"{found}, which is good for learning their difference."
            yield Finding(kind, severity, names, message, len(molecules), self.places(molecules))

    def leaks(self) -> Iterator[Finding]:
        """Validation molecules whose geometry is trained on, in their fidelity or in another one."""
        rows = np.flatnonzero(self.validates[:, 0] != self.validates[:, 1])
        column = np.where(self.validates[rows, 0], 0, 1)
        held, trained = self.pairs.indices[rows, column], self.pairs.indices[rows, 1 - column]
        held_by, trained_by = self.owners[rows, column], self.owners[rows, 1 - column]
        for number in np.unique(held_by).tolist():
            fidelity = self.parts[number].fidelity
            same = np.array([self.parts[owner].fidelity == fidelity for owner in trained_by.tolist()], bool)
            for chosen, kind in ((same, "leak"), (~same, "leak_across")):
                mine = chosen & (held_by == number)
                if mine.any():
                    yield self._leak(kind, number, held[mine], trained[mine])

    def _leak(self, kind: str, number: int, held: np.ndarray, trained: np.ndarray) -> Finding:
        """Finding for validation molecules ``held`` of one dataset that equal training molecules ``trained``."""
        part = self.parts[number]
        molecules, first = np.unique(held, return_index=True)
        total = int(part.validates.sum())
        example = self.places(trained[first[:1]])[0]
        count = f"{self.at_least}{len(molecules)} of {counted(total, 'validation molecule')}"
        severity = "warning"
        if kind == "leak":
            severity = "error" if len(molecules) > MANY * total else "warning"
            message = (
                f"{count} of which the geometry is trained on (the first is {example}): validation errors come out "
                "too small. Take them out of one of the two."
            )
        else:
            owners = owners_of(self.starts, trained)
            others = ", ".join(
                f"{self.parts[owner].fidelity} ({len(np.unique(held[owners == owner]))})"
                for owner in np.unique(owners).tolist()
            )
            message = (
                f"{count} of which the geometry is trained on in another fidelity: {others}; the first is {example}. "
                "Validation errors are then not those of unseen molecules, which is fine if it is meant."
            )
        return Finding(kind, severity, part.name, message, len(molecules), self.places(molecules))
