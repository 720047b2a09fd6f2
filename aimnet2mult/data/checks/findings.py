"""What checks say and from where on they say it: `Finding`, `Summary`, `Report`, `Thresholds`."""

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.data.checks.units import ForceRelation
from aimnet2mult.data.sgdataset import DatasetError

SEVERITIES = ("error", "warning", "note")
"""``error``: cannot be right, or spoils the validation. ``warning``: probably wrong, look at it. ``note``: good to
know."""

TEXT_WIDTH = 110
"""Columns of the report."""


@dataclass(frozen=True)
class Thresholds:
    """From where on something is reported.

    Attributes
    ----------
    close : float
        Distance of two atoms, Å.
    far : float
        Gap between two parts of a molecule, Å.
    duplicate : float
        Two geometries are the same when no distance differs by more, Å.
    charge_sum : float
        Sum of atomic charges minus charge, and of atomic spins minus unpaired electrons, e.
    net_force : float
        Sum of the forces on a molecule, eV/Å.
    outlier : float
        Energies this many times the usual deviation from the sum of self-atomic energies.
    rare_element : int
        Molecules with an element, below which it is noted.
    max_examples : int
        Molecules that a finding names.
    """

    close: float = 0.5
    far: float = 15.0
    duplicate: float = 1e-3
    charge_sum: float = 0.05
    net_force: float = 0.3
    outlier: float = 10.0
    rare_element: int = 10
    max_examples: int = 5


@dataclass(frozen=True)
class Place:
    """A molecule in a file.

    Attributes
    ----------
    file : str
        Its name.
    group : str or None
        HDF5 group.
    row : int or None
        Row in the group, from 0.
    """

    file: str
    group: str | None = None
    row: int | None = None

    def __str__(self) -> str:
        return places_text((self,), 1)


@dataclass(frozen=True)
class Finding:
    """Something about a dataset that a user should know.

    Attributes
    ----------
    kind : str
        Short name of the fault, such as ``close_atoms``.
    severity : str
        One of `SEVERITIES`.
    fidelity : str
        Name of the dataset; several are joined by commas.
    message : str
        What is wrong, what it probably means and what to do.
    count : int or None
        Molecules concerned; None if it concerns the dataset as a whole.
    places : tuple of Place
        The first of these molecules, or the files.
    """

    kind: str
    severity: str
    fidelity: str
    message: str
    count: int | None = None
    places: tuple[Place, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.fidelity}: {self.message}"
        if self.places:
            text += f" ({places_text(self.places, self.count)})"
        return text


def places_text(places: Sequence[Place], count: int | None) -> str:
    """Name molecules, those of one group together: ``a.h5: group 003: rows 1, 5; group 007: row 2; and 88 more``."""
    parts, file, rows = [], None, dict[tuple[str, str | None], list[int]]()
    for place in places:
        rows.setdefault((place.file, place.group), []).extend([] if place.row is None else [place.row])
    for (name, group), numbers in rows.items():
        words = [] if name == file else [short_path(name)]
        words += [] if group is None else [f"group {group}"]
        words += [f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"] if numbers else []
        parts.append(": ".join(words))
        file = name
    if count is not None and count > len(places):
        parts.append(f"and {count - len(places)} more")
    return "; ".join(parts)


def short_path(path: str) -> str:
    """Return a path relative to the working directory where it lies below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def locate(source: MoleculeSource, index: int) -> Place:
    """Return where a molecule lies."""
    where = source.where(int(index))
    match = re.fullmatch(r"(.*): group (\S+): row (\d+)", where)
    return Place(where) if match is None else Place(match[1], match[2], int(match[3]))


def unreadable(name: str, error: DatasetError) -> Finding:
    """Finding for a dataset that cannot be opened or read."""
    pattern = r"(?P<file>.+?)(: group (?P<group>[^\s:]+))?(: row (?P<row>\d+))?: (?P<rest>.*)"
    match = re.fullmatch(pattern, str(error), re.DOTALL)
    if match is None:
        return Finding("unreadable", "error", name, str(error))
    place = Place(match["file"], match["group"], None if match["row"] is None else int(match["row"]))
    return Finding("unreadable", "error", name, match["rest"], None, (place,))


def counted(number: int, noun: str) -> str:
    """Return ``1 molecule``, ``2 molecules``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass
class Summary:
    """Facts about a dataset.

    Attributes
    ----------
    files : list of str
        Where it lies.
    molecules : int
        Number of molecules.
    sizes : dict of int to int
        Number of atoms -> molecules of that size, ascending.
    elements : dict of str to dict of str to int
        Symbol -> ``atoms`` and ``molecules`` that hold it.
    labels : dict of str to int
        Label -> molecules that have it.
    charges, mults : dict of int to int
        Charge, multiplicity -> molecules. ``mults`` is empty where the data have none.
    dtypes : dict of str to str
        Array -> its type.
    shortest : float or None
        Shortest distance of two atoms, Å.
    energy_looks_like : str or None
        Unit and reference of the energies, as far as their size tells.
    residual_per_atom : float or None
        Usual deviation of the energy per atom from the sum of self-atomic energies, eV.
    typical_force : float or None
        Median over molecules of the root mean square force component, eV/Å.
    force_pairs : ForceRelation or None
        How energy changes between close geometries compare with the forces.
    """

    files: list[str]
    molecules: int
    sizes: dict[int, int] = field(default_factory=dict)
    elements: dict[str, dict[str, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    charges: dict[int, int] = field(default_factory=dict)
    mults: dict[int, int] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    shortest: float | None = None
    energy_looks_like: str | None = None
    residual_per_atom: float | None = None
    typical_force: float | None = None
    force_pairs: ForceRelation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain data for JSON."""
        pairs = None if self.force_pairs is None else self.force_pairs._asdict()
        return {**asdict(self), "force_pairs": pairs}

    def text(self, name: str) -> str:
        """Return the facts for people."""
        files = short_path(self.files[0]) + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")
        sizes = " to ".join(str(size) for size in sorted({min(self.sizes), max(self.sizes)}))
        lines = [f"{name}: {counted(self.molecules, 'molecule')} of {sizes} atoms in {files}"]
        columns = [f"{symbol} {n['molecules']}" for symbol, n in self.elements.items()]
        lines.append(f"  elements   {', '.join(columns)} (molecules that hold them)")
        full = [key for key, n in self.labels.items() if n == self.molecules]
        part = [f"{key} ({n} molecules)" for key, n in self.labels.items() if n != self.molecules]
        lines.append(f"  labels     {', '.join(full + part)}")
        states = [f"charge {_by_count(self.charges, '+d')}"]
        states += [f"multiplicity {_by_count(self.mults, 'd')}" if self.mults else "no mult: closed shells"]
        lines.append(f"  states     {'; '.join(states)}")
        energies = [self.energy_looks_like or "size tells neither unit nor reference"]
        if self.residual_per_atom is not None:
            energies.append(f"{self.residual_per_atom:.3g} eV per atom around self-atomic energies")
        lines.append(f"  energies   {'; '.join(energies)}")
        if self.typical_force is not None:
            lines.append(f"  forces     {self._forces()}")
        if self.shortest is not None:
            lines.append(f"  distances  shortest {self.shortest:.3f} Å")
        return "\n".join(lines)

    def _forces(self) -> str:
        size = f"typically {self.typical_force:.3g} eV/Å"
        if self.force_pairs is None:
            return f"{size}; too few pairs of close geometries to compare with energies"
        pairs = self.force_pairs
        return (
            f"{size}; ΔE / (F·Δx) = {pairs.slope:.3g} (should be 1, {pairs.n_pairs} pairs of close geometries, "
            f"r = {pairs.correlation:.3f})"
        )


def _by_count(counts: Mapping[int, int], form: str) -> str:
    """``0 (917), -1 (117)``: most frequent first, the six most frequent."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    words = [f"{value:{form if value else 'd'}} ({count})" for value, count in ranked[:6]]
    return ", ".join(words) + (" ..." if len(ranked) > 6 else "")


@dataclass
class Report:
    """What `check` returns.

    Attributes
    ----------
    summaries : dict of str to Summary
        Name of each dataset -> facts about it.
    findings : list of Finding
        Worst first.
    """

    summaries: dict[str, Summary]
    findings: list[Finding]

    def count(self, severity: str) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "datasets": {name: summary.to_dict() for name, summary in self.summaries.items()},
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def text(self) -> str:
        """Return the report for people."""
        blocks = [summary.text(name) for name, summary in self.summaries.items()]
        for finding in self.findings:
            text = f"{finding.severity.upper()}  {finding.fidelity}: {finding.message} [{finding.kind}]"
            places = f"\n{_wrapped(f'  {places_text(finding.places, finding.count)}')}" if finding.places else ""
            blocks.append(_wrapped(text) + places)
        blocks.append(", ".join(counted(self.count(severity), severity) for severity in SEVERITIES))
        return "\n\n".join(blocks)


def _wrapped(text: str) -> str:
    """Text in lines of `TEXT_WIDTH`, those after the first indented; paths stay in one piece."""
    indent = "    " if text.startswith(" ") else "  "
    return textwrap.fill(text, TEXT_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
