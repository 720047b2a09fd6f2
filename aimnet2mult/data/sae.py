"""Self-atomic energies (SAE): what each atom adds to the energy of a molecule by its element alone.

The total energy of molecule m with n_{m,Z} atoms of element Z is split as

    E_m = Σ_Z n_{m,Z} ε_Z + Q_m ε_Q + 2S_m ε_S + ΔE_m

and the network learns ΔE; the terms in the total charge Q and in the number of unpaired electrons 2S are optional
(`aimnet2mult.reference_energies` says why these). The ε are fitted to a dataset by least squares (`fit_sae`), kept in a
YAML file ``{Z: eV}`` with optional keys ``charge`` and ``spin`` (`load_sae`, `save_sae`), and summed for molecules by
`sae_energy`. All of it is float64: all-electron energies reach -10⁵ eV, where float32 resolves no better than 8 meV.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from aimnet2mult.config.builder import load_yaml
from aimnet2mult.constants import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, element_names
from aimnet2mult.reference_energies import TERMS, ReferenceEnergies
from aimnet2mult.utils.files import write_text_atomic

TRIM = 0.02
"""Share of the molecules with the lowest, and with the highest, residuals that the second fit leaves out."""

MIN_PER_COEFFICIENT = 5
"""Molecules for each coefficient below which the report warns: a rule of thumb of regression."""

MAX_STANDARD_ERROR = 0.5
"""eV; standard errors above this are warned of. The residuals that a network learns are some eV."""

BLOCK_ROWS = 65536
"""Molecules that `fit_sae` turns into float64 at a time."""

RANK_TOLERANCE = 1e-11
"""Singular values below this share of the largest count as zero. Compositions are small integers, so that true zeros
come out near 1e-15 and the rest above 1e-8 (one molecule among 10¹²)."""


@dataclass(frozen=True)
class SAEFit:
    """Reference energies fitted to a dataset, and how well they describe it.

    Coefficients are the self-atomic energies, known by their atomic numbers, and the terms that were fitted, known by
    their names in `aimnet2mult.reference_energies.TERMS`. With weights, residuals are those of the molecules of weight
    one.

    Attributes
    ----------
    sae : ReferenceEnergies
        Atomic number -> self-atomic energy, eV, and the terms.
    n_molecules, n_used : int
        Molecules given, and those that the second (trimmed) fit kept.
    molecules : dict
        Coefficient -> number of molecules that hold the element, are charged, or have unpaired electrons.
    atoms : dict
        Atomic number -> number of its atoms.
    residual_std_all : float
        Standard deviation of the residuals of the first fit, to all molecules, eV.
    residual_std : float
        That of the second fit over the molecules it kept, eV.
    residual_rms, residual_max : float
        Root mean square and largest absolute residual of ``sae`` over all molecules, eV.
    residual_std_per_atom : float
        Standard deviation over all molecules of residual divided by number of atoms, eV.
    rank : int
        Rank of the design matrix; less than the number of coefficients when some cannot be separated.
    condition : float
        Condition number of the design matrix of the second fit with columns scaled to length one: its largest singular
        value over the smallest that is not zero. Relative errors of the data grow by up to so much.
    inseparable : list of list
        Groups of coefficients that the data do not determine one by one.
    standard_errors : dict
        Coefficient -> standard error, eV, from the variance of the residuals of all molecules, as if these were
        independent; NaN where the data do not determine it, or are too few to tell.
    n_full_weight : float
        Molecules that determine the coefficients, each counted by the square of its weight.
    anchor : str
        What was subtracted from the energies before the fit, in words; empty if nothing was.
    left_out : dict
        Term that was not fitted -> number of molecules that it would matter for, where they were counted.
    """

    sae: ReferenceEnergies
    n_molecules: int
    n_used: int
    molecules: dict[int | str, int]
    atoms: dict[int, int]
    residual_std_all: float
    residual_std: float
    residual_rms: float
    residual_max: float
    residual_std_per_atom: float
    rank: int
    condition: float
    inseparable: list[list[int | str]]
    standard_errors: dict[int | str, float]
    n_full_weight: float
    anchor: str
    left_out: dict[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """Return a table of the coefficients, the spread of the residuals and the warnings, as text."""
        lines = [f"{'element':<10}{'SAE / eV':>20}{'std. error':>12}{'molecules':>12}{'atoms':>12}"]
        for z, energy in self.sae.items():
            name = f"{ELEMENT_SYMBOLS[z]} ({z})"
            columns = f"{self._error(z)}{self.molecules[z]:>12d}{self.atoms[z]:>12d}"
            lines.append(f"{name:<10}{energy:>20.6f}{columns}")
        for name in self.terms:
            columns = f"{self._error(name)}{self.molecules[name]:>12d}"
            lines.append(f"{name:<10}{getattr(self.sae, name):>20.6f}{columns}  ({TERMS[name]})")
        counted = "molecules with a counterpart" if self.anchor else "all molecules"
        n_trimmed = self.n_molecules - self.n_used
        lines += [
            "",
            *([self.anchor] if self.anchor else []),
            f"Fit to all {self.n_molecules} molecules: standard deviation of the residuals "
            f"{self.residual_std_all:.4f} eV",
            f"Second fit, without {n_trimmed} molecules of lowest and highest residual: "
            f"standard deviation {self.residual_std:.4f} eV",
            f"Residuals of {counted}: RMS {self.residual_rms:.4f} eV, largest {self.residual_max:.4f} eV, "
            f"standard deviation per atom {self.residual_std_per_atom:.4f} eV",
            f"Rank {self.rank} for {len(self.molecules)} coefficients, condition number {self.condition:.3g}",
        ]
        lines += self.warnings()
        return "\n".join(lines)

    @property
    def terms(self) -> list[str]:
        """Names of the terms that were fitted."""
        return [name for name in TERMS if name in self.molecules]

    def _error(self, coefficient: int | str) -> str:
        error = self.standard_errors[coefficient]
        return f"{'-' if math.isnan(error) else f'{error:.4f}':>12}"

    def warnings(self) -> list[str]:
        """Return one sentence for each thing about the fit that a user should know."""
        sentences = []
        absent = [name for name in self.terms if self.molecules[name] == 0]
        for name in absent:
            what = {"charge": "is charged", "spin": "has unpaired electrons"}[name]
            sentences.append(f"Warning: no molecule {what}; the {name} term is 0.")
        for name, n_molecules in self.left_out.items():
            if n_molecules:
                what = {"charge": "charged", "spin": "open-shell"}[name]
                sentences.append(
                    f"Note: {n_molecules} molecules are {what}. Where several levels of theory are trained together, "
                    f"--{name}-term (for each of them) takes up what they differ by for these."
                )
        for group in self.inseparable:
            if group[0] in absent:
                continue
            if len(group) == 1:
                sentences.append(f"Warning: the data do not determine the energy of {_names(group)}.")
                continue
            sentences.append(
                f"Warning: the data cannot separate the energies of {_names(group)}: these occur only "
                "in fixed proportions. Sums over molecules like those of the data are right; single values are the "
                "smallest ones that fit, and molecules of other proportions need more data."
            )
        for coefficient, n_molecules in self.molecules.items():
            if n_molecules == 1:
                verb = "occurs" if isinstance(coefficient, int) else "is not zero"
                sentences.append(
                    f"Warning: {_names([coefficient])} {verb} in one molecule only, which alone sets its energy."
                )
        if self.n_full_weight < MIN_PER_COEFFICIENT * len(self.molecules):
            sentences.append(
                f"Warning: {self.n_full_weight:.4g} molecules for {len(self.molecules)} coefficients, fewer than "
                f"{MIN_PER_COEFFICIENT} for each; the energies follow the molecules rather than the level of theory."
            )
        vague = [c for c, error in self.standard_errors.items() if error > MAX_STANDARD_ERROR]
        if vague:
            sentences.append(
                f"Warning: the standard error of {_names(vague)} is above {MAX_STANDARD_ERROR:g} eV; anchor the fit on "
                "another level of theory (--anchor, --anchor-model), or add molecules."
            )
        return sentences


def _names(coefficients: Sequence[int | str]) -> str:
    """``[1, 35, "charge"]`` -> ``"H (1), Br (35), charge"``."""
    return ", ".join(element_names([c]) if isinstance(c, int) else c for c in coefficients)


# --------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------


def load_sae(path: str | Path) -> ReferenceEnergies:
    """Read self-atomic energies from a YAML file.

    Parameters
    ----------
    path : str or Path
        File with a line ``Z: energy`` per element, eV, and optional lines ``charge:`` (eV per elementary charge) and
        ``spin:`` (eV per unpaired electron).

    Returns
    -------
    ReferenceEnergies
        A mapping from atomic numbers, in ascending order, to energies in eV, with the terms as attributes.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not YAML, not a mapping, without elements, a key that is neither an atomic number nor a term, a key that occurs
        twice, or a value that is not a finite number. The message names the file.
    """
    path = Path(path)
    content = load_yaml(path)
    expected = "expected a line 'Z: energy in eV' per element, such as '1: -13.6'"
    if content is None or (isinstance(content, dict) and not content.keys() - TERMS.keys()):
        raise ValueError(f"{path}: no self-atomic energies in the file; {expected}")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a mapping; {expected}")
    for key, value in content.items():
        is_term = isinstance(key, str) and key in TERMS
        if not is_term and (not isinstance(key, int) or isinstance(key, bool) or not 1 <= key <= MAX_ATOMIC_NUMBER):
            raise ValueError(
                f"{path}: key {key!r} is not an atomic number from 1 to {MAX_ATOMIC_NUMBER}, nor {' or '.join(TERMS)}; "
                f"{expected}"
            )
        if not _is_finite_number(value):
            of = f"term {key} ({TERMS[key]})" if is_term else f"energy of {element_names([key])}"
            raise ValueError(f"{path}: the {of} is {value!r}, not a finite number; {expected}")
    _refuse_repeated_keys(path)
    return ReferenceEnergies.from_table(content)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_repeated_keys(path: Path) -> None:
    """Raise ValueError when a key occurs twice in a YAML mapping, of which the parser would keep the last."""
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            what = "term" if key.value in TERMS else "element"
            raise ValueError(f"{path}: {what} {key.value} occurs twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line


def save_sae(path: str | Path, sae: Mapping[int, float], comment: str = "") -> None:
    """Write self-atomic energies as YAML, sorted, each line with the symbol of its element, and terms after them.

    The file is written whole or not at all, and `load_sae` gives back exactly the same numbers. Terms that are zero
    are left out.

    Parameters
    ----------
    path : str or Path
        The file.
    sae : mapping
        Atomic number -> energy in eV, or `ReferenceEnergies`.
    comment : str
        Text for the head of the file, such as where the energies come from.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    lines = ["# Self-atomic energies in eV, by atomic number"]
    lines += [f"# {line}" for line in comment.splitlines()]
    for key, energy in ReferenceEnergies.from_table(sae).table().items():
        value = yaml.safe_dump(energy).split()[0]  # repr's "1e-07" would be read back as text
        lines.append(f"{key}: {value}  # {TERMS[key] if isinstance(key, str) else ELEMENT_SYMBOLS[key]}")
    write_text_atomic(path, "\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------
# sums
# --------------------------------------------------------------------------------------------------


def sae_energy(
    numbers: np.ndarray, sae: Mapping[int, float], charge: np.ndarray | None = None, mult: np.ndarray | None = None
) -> np.ndarray:
    """Sum of the self-atomic energies of molecules, and of the terms in charge and spin if there are any.

    Parameters
    ----------
    numbers : numpy.ndarray of int
        Atomic numbers (without fidelity offset), (n, N); 0 is padding.
    sae : mapping
        Atomic number -> energy in eV, or `ReferenceEnergies`.
    charge, mult : numpy.ndarray, optional
        Total charges (n,), e, and multiplicities (n,); needed where ``sae`` has the term.

    Returns
    -------
    numpy.ndarray
        (n,) float64, eV.

    Raises
    ------
    ValueError
        An element is not in ``sae``, a number is not an atomic number, or a term lacks what it multiplies.
    """
    numbers = np.asarray(numbers)
    reference = ReferenceEnergies.from_table(sae)
    return _atomic_sum(numbers, reference) + terms_energy(reference, charge, mult, len(numbers))


def reference_energy(arrays: Mapping[str, np.ndarray], sae: Mapping[int, float]) -> np.ndarray:
    """Reference energies of molecules as a dataset has them.

    Parameters
    ----------
    arrays : mapping
        ``numbers`` (n, N), and ``charge`` and ``mult`` (n,); 0 and 1 where they are absent, as for a model.
    sae : mapping
        As in `sae_energy`; empty: nothing is subtracted.

    Returns
    -------
    numpy.ndarray
        (n,) float64, eV.
    """
    numbers = arrays["numbers"]
    n_molecules = len(numbers)
    if not sae:
        return np.zeros(n_molecules)
    return sae_energy(
        numbers, sae, arrays.get("charge", np.zeros(n_molecules)), arrays.get("mult", np.ones(n_molecules))
    )


def terms_energy(
    sae: Mapping[int, float], charge: np.ndarray | None, mult: np.ndarray | None, n_molecules: int
) -> np.ndarray:
    """Terms of reference energies in charge and spin, Q ε_Q + 2S ε_S; arguments as in `sae_energy`.

    Returns
    -------
    numpy.ndarray
        (n_molecules,) float64, eV; zero for a mapping without terms.
    """
    reference = ReferenceEnergies.from_table(sae)
    energies = np.zeros(n_molecules)
    for term, values, key, none in ((reference.charge, charge, "charge", 0.0), (reference.spin, mult, "mult", 1.0)):
        if term == 0.0:
            continue
        if values is None:
            raise ValueError(f"these reference energies have a term that needs the {key} of each molecule")
        energies += term * (np.asarray(values, np.float64) - none)
    return energies


def _atomic_sum(numbers: np.ndarray, sae: Mapping[int, float]) -> np.ndarray:
    """Sum over the atoms of each molecule, (n,) float64, eV."""
    if numbers.size == 0:
        return np.zeros(numbers.shape[0])
    if numbers.min() < 0 or numbers.max() > MAX_ATOMIC_NUMBER:
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise ValueError(f"{wrong} is not an atomic number from 1 to {MAX_ATOMIC_NUMBER}")
    table = np.full(MAX_ATOMIC_NUMBER + 1, np.nan)
    table[0] = 0.0
    for z, energy in sae.items():
        table[z] = energy
    energies = table[numbers].sum(axis=1)
    if np.isnan(energies).any():
        present = np.unique(numbers)
        absent = [int(z) for z in present if z > 0 and z not in sae]
        verb = "is" if len(absent) == 1 else "are"
        raise ValueError(
            f"{element_names(absent)} {verb} not among the self-atomic energies: {element_names(sorted(sae))}"
        )
    return energies


def reference_difference(a: Mapping[int, float], b: Mapping[int, float], tolerance: float) -> tuple[str, str] | None:
    """Find the first entry in which reference energies differ by more than ``tolerance`` (eV).

    A term that one of them lacks is zero; an element that one of them lacks is a difference.

    Returns
    -------
    tuple of str or None
        What differs, and both values, in words; None if nothing does.
    """
    first, second = ReferenceEnergies.from_table(a), ReferenceEnergies.from_table(b)
    for z in sorted({*first, *second}):
        if z not in first or z not in second or abs(first[z] - second[z]) > tolerance:
            return f"energy of {element_names([z])}", f"{first.get(z, 'none')} against {second.get(z, 'none')} eV"
    for name, unit in TERMS.items():
        values = getattr(first, name), getattr(second, name)
        if abs(values[0] - values[1]) > tolerance:
            return f"{name} term", f"{values[0]} against {values[1]} {unit}"
    return None


def composition(numbers: np.ndarray, elements: Sequence[int]) -> np.ndarray:
    """Count the atoms of each element.

    Parameters
    ----------
    numbers : numpy.ndarray of int
        Atomic numbers, (n, N); 0 is padding.
    elements : sequence of int
        Atomic numbers to count.

    Returns
    -------
    numpy.ndarray
        (n, len(elements)) int32.
    """
    counts = np.empty((len(numbers), len(elements)), dtype=np.int32)
    for column, z in enumerate(elements):
        counts[:, column] = (numbers == z).sum(axis=1)
    return counts


# --------------------------------------------------------------------------------------------------
# fit
# --------------------------------------------------------------------------------------------------


class Design(NamedTuple):
    """Design matrix of a fit, row by row: weight times (atoms of each element, terms).

    Attributes
    ----------
    counts : numpy.ndarray
        (n, n_elements) int.
    terms : numpy.ndarray
        (n, n_terms) float64.
    weights : numpy.ndarray
        (n,) float64.
    """

    counts: np.ndarray
    terms: np.ndarray
    weights: np.ndarray

    @property
    def n_columns(self) -> int:
        """Number of coefficients."""
        return int(self.counts.shape[1] + self.terms.shape[1])

    def rows(self, block: slice) -> np.ndarray:
        """Rows without weights, (m, n_columns) float64."""
        return np.column_stack([self.counts[block].astype(np.float64), self.terms[block]])

    def blocks(self) -> Iterator[slice]:
        """Molecules in pieces of `BLOCK_ROWS`."""
        return (slice(start, start + BLOCK_ROWS) for start in range(0, len(self.counts), BLOCK_ROWS))

    def subset(self, mask: np.ndarray) -> "Design":
        """Some of the rows."""
        return Design(*(values[mask] for values in self))

    def holds(self, columns: np.ndarray) -> np.ndarray:
        """Mask (n,) of the molecules that have any of some columns (n_columns,) bool."""
        n_elements = self.counts.shape[1]
        in_counts = (self.counts[:, columns[:n_elements]] > 0).any(axis=1)
        return np.asarray(in_counts | (self.terms[:, columns[n_elements:]] != 0.0).any(axis=1))


class Solution(NamedTuple):
    """Least squares of weighted energies.

    Attributes
    ----------
    x : numpy.ndarray
        (n_columns,), eV, of minimum norm.
    rank : int
        Rank of the design matrix.
    null_space : numpy.ndarray
        Orthonormal changes of ``x`` that leave every energy as it is, (n_columns - rank, n_columns).
    inverse : numpy.ndarray
        Pseudoinverse of AᵀA, (n_columns, n_columns): times the variance of the residuals, the covariance of ``x``.
    condition : float
        `SAEFit.condition`.
    """

    x: np.ndarray
    rank: int
    null_space: np.ndarray
    inverse: np.ndarray
    condition: float


def fit_sae(
    counts: np.ndarray,
    energies: np.ndarray,
    elements: Sequence[int],
    terms: Mapping[str, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
    anchor: str = "",
) -> SAEFit:
    """Fit reference energies by least squares, then once more without the molecules that fit worst.

    The second fit leaves out the lowest and the highest 2 % of the residuals of the first, except molecules without
    which coefficients could no longer be told apart. With terms, these are the lowest and highest 2 % of the molecules
    of each charge and number of unpaired electrons (of fewer than 50, none): what is not linear in the charge moves all
    ions of a charge together, and they must not go wholesale. Where the data leave energies undetermined, the solution
    of minimum norm is taken and `SAEFit.inseparable` says so; a term without charged or open-shell molecules is zero.

    Parameters
    ----------
    counts : numpy.ndarray of int
        Atoms of each element in each molecule (`composition`), (n, n_elements).
    energies : numpy.ndarray
        Energies to describe, (n,) float64, eV: total energies, or what an anchor leaves of them.
    elements : sequence of int
        Atomic number of each column of ``counts``.
    terms : mapping, optional
        What terms multiply, (n,) each: ``charge``, total charges, e; ``spin``, numbers of unpaired electrons.
    weights : numpy.ndarray, optional
        (n,) factors in (0, 1] of the residuals whose squares are summed; default 1. Residuals are reported for
        molecules of weight one.
    anchor : str
        What was subtracted from the energies, for the report.

    Returns
    -------
    SAEFit
        Reference energies and report.

    Raises
    ------
    ValueError
        No molecules, an energy or a term that is not finite, or an element without an atom.
    """
    counts = np.asarray(counts)
    energies = np.asarray(energies, dtype=np.float64)
    columns = {name: np.asarray(values, np.float64) for name, values in (terms or {}).items()}
    weights = np.ones(len(energies)) if weights is None else np.asarray(weights, np.float64)
    molecules = _check_fit(counts, energies, elements, columns)
    design = Design(counts, np.stack([*columns.values()], axis=1) if columns else np.zeros((len(counts), 0)), weights)

    first = _least_squares(design, energies)
    residuals = _residuals(design, energies, first.x)
    kept = _trim(design, residuals, first.null_space)
    second = _least_squares(design.subset(kept), energies[kept])
    final = _residuals(design, energies, second.x)

    full = weights == 1.0
    free = float((weights**2).sum()) - first.rank
    variance = float(((weights * final) ** 2).sum()) / free if free > 0.0 else np.nan
    errors = np.sqrt(variance * np.diag(second.inverse))
    errors[_undetermined(first.null_space)] = np.nan
    names: list[int | str] = [*map(int, elements), *columns]
    by_name = dict(zip(names, second.x.tolist(), strict=True))
    return SAEFit(
        sae=ReferenceEnergies.from_table(by_name),
        n_molecules=len(energies),
        n_used=int(kept.sum()),
        molecules=dict(zip(names, molecules.tolist(), strict=True)),
        atoms={int(z): int(counts[:, i].sum(dtype=np.int64)) for i, z in enumerate(elements)},
        residual_std_all=float(residuals[full].std()),
        residual_std=float(final[kept & full].std()),
        residual_rms=float(np.sqrt(np.mean(final[full] ** 2))),
        residual_max=float(np.abs(final[full]).max()),
        residual_std_per_atom=float((final[full] / counts[full].sum(axis=1)).std()),
        rank=first.rank,
        condition=second.condition,
        inseparable=[_ordered(names[i] for i in group) for group in _coupled(first.null_space)],
        standard_errors=dict(zip(names, errors.tolist(), strict=True)),
        n_full_weight=float((weights**2).sum()),
        anchor=anchor,
    )


def _check_fit(
    counts: np.ndarray, energies: np.ndarray, elements: Sequence[int], terms: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Refuse input of `fit_sae` that cannot be fitted; returns molecules of each coefficient, (n_columns,)."""
    if len(energies) == 0:
        raise ValueError("self-atomic energies need at least one molecule, none were given")
    if counts.shape != (len(energies), len(elements)):
        raise ValueError(f"counts have shape {counts.shape}, expected {(len(energies), len(elements))}")
    for name, values in (("energy", energies), *terms.items()):
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name} of molecule {row} is {values[row]}, not a finite number")
    molecules = (counts > 0).sum(axis=0)
    if (molecules == 0).any():
        raise ValueError(
            f"no molecule holds {element_names([z for z, n in zip(elements, molecules, strict=True) if n == 0])}"
        )
    return np.array([*molecules, *(np.count_nonzero(values) for values in terms.values())])


def _ordered(coefficients: Iterable[int | str]) -> list[int | str]:
    """Elements in ascending order, then terms."""
    return sorted(coefficients, key=lambda c: (isinstance(c, str), c))


def _least_squares(design: Design, energies: np.ndarray) -> Solution:
    """Solve min ‖W(A·x - energies)‖ with minimum ‖x‖.

    Rows are folded block by block into the triangular factor of a QR decomposition: the memory is that of one block
    and, unlike with normal equations, the condition number is not squared.
    """
    k = design.n_columns
    triangle = np.zeros((0, k + 1))
    for block in design.blocks():
        rows = np.column_stack([design.rows(block), energies[block]]) * design.weights[block, None]
        triangle = np.asarray(np.linalg.qr(np.vstack([triangle, rows]), mode="r"))
    u, singular_values, vt = np.linalg.svd(triangle[:, :k], full_matrices=False)
    rank = int((singular_values > RANK_TOLERANCE * singular_values[0]).sum())
    scaled = vt[:rank] / singular_values[:rank, None]
    x = scaled.T @ (u[:, :rank].T @ triangle[:, k])
    return Solution(x, rank, _complement(vt[:rank]), scaled.T @ scaled, _condition(triangle[:, :k]))


def _condition(matrix: np.ndarray) -> float:
    """Largest singular value over the smallest that is not zero, of the columns scaled to length one."""
    lengths = np.linalg.norm(matrix, axis=0)
    values = np.linalg.svd(matrix[:, lengths > 0.0] / lengths[lengths > 0.0], compute_uv=False)
    return float(values[0] / values[values > RANK_TOLERANCE * values[0]].min())


def _complement(basis: np.ndarray) -> np.ndarray:
    """Orthonormal rows that complete the orthonormal rows of ``basis`` (r, k) to a full space: (k - r, k)."""
    return np.linalg.svd(basis, full_matrices=True)[2][len(basis) :]


def _residuals(design: Design, energies: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Energies minus reference energies, (n,), eV."""
    residuals = np.empty_like(energies)
    for block in design.blocks():
        residuals[block] = energies[block] - design.rows(block) @ x
    return residuals


def _trim(design: Design, residuals: np.ndarray, null_space: np.ndarray) -> np.ndarray:
    """Mask of the molecules that the second fit keeps, (n,) bool.

    Without the few molecules of a rare element the second fit would give it an energy of zero. Where the trimmed
    molecules determine fewer energies than all of them, those that hold an undetermined one come back.
    """
    kept = _without_tails(design, design.weights * residuals)
    null_space_kept = _least_squares(design.subset(kept), residuals[kept]).null_space
    if len(null_space_kept) == len(null_space):
        return kept
    return kept | design.holds(_undetermined(null_space_kept))


def _without_tails(design: Design, residuals: np.ndarray) -> np.ndarray:
    """Mask (n,) without the lowest and highest residuals: of all molecules, or with terms, of each value of these."""
    if not design.terms.shape[1]:
        low, high = np.quantile(residuals, [TRIM, 1.0 - TRIM])
        return np.asarray((residuals >= low) & (residuals <= high))
    order = np.lexsort((residuals, *design.terms.T))
    changes = (np.diff(design.terms[order], axis=0) != 0.0).any(axis=1)
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1, [len(order)]))
    kept = np.ones(len(residuals), bool)
    for first, last in itertools.pairwise(starts.tolist()):
        n_out = int(TRIM * (last - first))
        kept[order[first : first + n_out]] = False
        kept[order[last - n_out : last]] = False
    return kept


def _undetermined(null_space: np.ndarray) -> np.ndarray:
    """Mask of the coefficients whose own value the data do not determine, (n_columns,) bool."""
    return np.asarray((np.abs(null_space) > 1e-6).any(axis=0))


def _coupled(null_space: np.ndarray) -> list[list[int]]:
    """Find the groups of columns that the vectors of a null space (m, k) tie together, as lists of column indices."""
    projector = np.abs(null_space.T @ null_space) > 1e-6
    left = set(np.flatnonzero(_undetermined(null_space)).tolist())
    groups = []
    while left:
        group, border = set(), {min(left)}
        while border:
            group |= border
            border = {j for i in border for j in np.flatnonzero(projector[i]).tolist()} - group
        groups.append(sorted(group))
        left -= group
    return groups
