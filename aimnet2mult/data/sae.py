"""Self-atomic energies (SAE): what each atom adds to the energy of a molecule by its element alone.

The total energy of molecule m with n_{m,Z} atoms of element Z is split as

    E_m = Σ_Z n_{m,Z} ε_Z + ΔE_m

and the network learns ΔE. The ε_Z are fitted to a dataset by least squares (`fit_sae`), kept in a YAML file
``{Z: eV}`` (`load_sae`, `save_sae`), and summed for molecules by `sae_energy`. All of it is float64: all-electron
energies reach -10⁵ eV, where float32 resolves no better than 8 meV.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from aimnet2mult.config.builder import load_yaml
from aimnet2mult.constants import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, element_names
from aimnet2mult.utils.files import write_text_atomic

TRIM = 0.02
"""Share of the molecules with the lowest, and with the highest, residuals that the second fit leaves out."""

BLOCK_ROWS = 65536
"""Molecules that `fit_sae` turns into float64 at a time."""

RANK_TOLERANCE = 1e-11
"""Singular values below this share of the largest count as zero. Compositions are small integers, so that true zeros
come out near 1e-15 and the rest above 1e-8 (one molecule among 10¹²)."""


@dataclass(frozen=True)
class SAEFit:
    """Self-atomic energies fitted to a dataset, and how well they describe it.

    Attributes
    ----------
    sae : dict
        Atomic number -> self-atomic energy, eV.
    n_molecules, n_used : int
        Molecules given, and those that the second (trimmed) fit kept.
    molecules, atoms : dict
        Atomic number -> number of molecules that hold the element, number of its atoms.
    residual_std_all : float
        Standard deviation of the residuals of the first fit, to all molecules, eV.
    residual_std : float
        That of the second fit over the molecules it kept, eV.
    residual_rms, residual_max : float
        Root mean square and largest absolute residual of ``sae`` over all molecules, eV.
    residual_std_per_atom : float
        Standard deviation over all molecules of residual divided by number of atoms, eV.
    rank : int
        Rank of the composition matrix; less than the number of elements when some cannot be separated.
    inseparable : list of list of int
        Groups of elements whose energies the data do not determine one by one.
    """

    sae: dict[int, float]
    n_molecules: int
    n_used: int
    molecules: dict[int, int]
    atoms: dict[int, int]
    residual_std_all: float
    residual_std: float
    residual_rms: float
    residual_max: float
    residual_std_per_atom: float
    rank: int
    inseparable: list[list[int]]

    def report(self) -> str:
        """Return a table of the elements, the spread of the residuals and the warnings, as text."""
        lines = [f"{'element':<10}{'SAE / eV':>20}{'molecules':>12}{'atoms':>12}"]
        for z, energy in self.sae.items():
            name = f"{ELEMENT_SYMBOLS[z]} ({z})"
            lines.append(f"{name:<10}{energy:>20.6f}{self.molecules[z]:>12d}{self.atoms[z]:>12d}")
        n_trimmed = self.n_molecules - self.n_used
        lines += [
            "",
            f"Fit to all {self.n_molecules} molecules: standard deviation of the residuals "
            f"{self.residual_std_all:.4f} eV",
            f"Second fit, without {n_trimmed} molecules of lowest and highest residual: "
            f"standard deviation {self.residual_std:.4f} eV",
            f"Residuals of all molecules: RMS {self.residual_rms:.4f} eV, largest {self.residual_max:.4f} eV, "
            f"standard deviation per atom {self.residual_std_per_atom:.4f} eV",
        ]
        lines += self.warnings()
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """Return one sentence for each thing about the fit that a user should know."""
        sentences = []
        for group in self.inseparable:
            if len(group) == 1:
                sentences.append(f"Warning: the data do not determine the energy of {element_names(group)}.")
                continue
            sentences.append(
                f"Warning: the data cannot separate the energies of {element_names(group)}: these elements occur only "
                "in fixed proportions. Sums over molecules like those of the data are right; single values are the "
                "smallest ones that fit, and molecules of other proportions need more data."
            )
        for z, n_molecules in self.molecules.items():
            if n_molecules == 1:
                sentences.append(
                    f"Warning: {element_names([z])} occurs in one molecule only, which alone sets its energy."
                )
        return sentences


# --------------------------------------------------------------------------------------------------
# files
# --------------------------------------------------------------------------------------------------


def load_sae(path: str | Path) -> dict[int, float]:
    """Read self-atomic energies from a YAML file.

    Parameters
    ----------
    path : str or Path
        File with a line ``Z: energy`` per element, eV.

    Returns
    -------
    dict
        Atomic number -> energy in eV, in ascending order.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not YAML, not a mapping, empty, a key that is not an atomic number, an element that occurs twice, or a value
        that is not a finite number. The message names the file.
    """
    path = Path(path)
    content = load_yaml(path)
    expected = "expected a line 'Z: energy in eV' per element, such as '1: -13.6'"
    if content is None or (isinstance(content, dict) and not content):
        raise ValueError(f"{path}: no self-atomic energies in the file; {expected}")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a mapping; {expected}")
    for key, value in content.items():
        if not isinstance(key, int) or isinstance(key, bool) or not 1 <= key <= MAX_ATOMIC_NUMBER:
            raise ValueError(f"{path}: key {key!r} is not an atomic number from 1 to {MAX_ATOMIC_NUMBER}; {expected}")
        if not _is_finite_number(value):
            raise ValueError(
                f"{path}: the energy of {element_names([key])} is {value!r}, not a finite number; {expected}"
            )
    _refuse_repeated_keys(path)
    return {z: float(content[z]) for z in sorted(content)}


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
            raise ValueError(f"{path}: element {key.value} occurs twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line


def save_sae(path: str | Path, sae: Mapping[int, float], comment: str = "") -> None:
    """Write self-atomic energies as YAML, sorted, each line with the symbol of its element.

    The file is written whole or not at all, and `load_sae` gives back exactly the same numbers.

    Parameters
    ----------
    path : str or Path
        The file.
    sae : mapping
        Atomic number -> energy in eV.
    comment : str
        Text for the head of the file, such as where the energies come from.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    lines = ["# Self-atomic energies in eV, by atomic number"]
    lines += [f"# {line}" for line in comment.splitlines()]
    for z in sorted(sae):
        value = yaml.safe_dump(float(sae[z])).split()[0]  # repr's "1e-07" would be read back as text
        lines.append(f"{int(z)}: {value}  # {ELEMENT_SYMBOLS[z]}")
    write_text_atomic(path, "\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------
# sums
# --------------------------------------------------------------------------------------------------


def sae_energy(numbers: np.ndarray, sae: Mapping[int, float]) -> np.ndarray:
    """Sum of the self-atomic energies of molecules.

    Parameters
    ----------
    numbers : numpy.ndarray of int
        Atomic numbers (without fidelity offset), (n, N); 0 is padding.
    sae : mapping
        Atomic number -> energy in eV.

    Returns
    -------
    numpy.ndarray
        (n,) float64, eV.

    Raises
    ------
    ValueError
        An element is not in ``sae``, or a number is not an atomic number.
    """
    numbers = np.asarray(numbers)
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


def fit_sae(counts: np.ndarray, energies: np.ndarray, elements: Sequence[int]) -> SAEFit:
    """Fit self-atomic energies by least squares, then once more without the molecules that fit worst.

    The second fit leaves out the lowest and the highest 2 % of the residuals of the first, except molecules without
    which elements could no longer be told apart. Where the data leave energies undetermined, the solution of minimum
    norm is taken and `SAEFit.inseparable` says so.

    Parameters
    ----------
    counts : numpy.ndarray of int
        Atoms of each element in each molecule (`composition`), (n, n_elements).
    energies : numpy.ndarray
        Total energies, (n,) float64, eV.
    elements : sequence of int
        Atomic number of each column of ``counts``.

    Returns
    -------
    SAEFit
        Energies and report.

    Raises
    ------
    ValueError
        No molecules, an energy that is not finite, or an element without an atom.
    """
    counts = np.asarray(counts)
    energies = np.asarray(energies, dtype=np.float64)
    if len(energies) == 0:
        raise ValueError("self-atomic energies need at least one molecule, none were given")
    if counts.shape != (len(energies), len(elements)):
        raise ValueError(f"counts have shape {counts.shape}, expected {(len(energies), len(elements))}")
    if not np.isfinite(energies).all():
        row = int(np.flatnonzero(~np.isfinite(energies))[0])
        raise ValueError(f"energy of molecule {row} is {energies[row]}, not a finite number")
    molecules = (counts > 0).sum(axis=0)
    if (molecules == 0).any():
        raise ValueError(
            f"no molecule holds {element_names([z for z, n in zip(elements, molecules, strict=True) if n == 0])}"
        )

    first, rank, null_space = _least_squares(counts, energies)
    residuals = _residuals(counts, energies, first)
    kept = _trim(counts, residuals, null_space)
    second, _, _ = _least_squares(counts[kept], energies[kept])
    final = _residuals(counts, energies, second)
    return SAEFit(
        sae={int(z): float(second[i]) for i, z in sorted(enumerate(elements), key=lambda item: item[1])},
        n_molecules=len(energies),
        n_used=int(kept.sum()),
        molecules={int(z): int(molecules[i]) for i, z in enumerate(elements)},
        atoms={int(z): int(counts[:, i].sum(dtype=np.int64)) for i, z in enumerate(elements)},
        residual_std_all=float(residuals.std()),
        residual_std=float(final[kept].std()),
        residual_rms=float(np.sqrt(np.mean(final**2))),
        residual_max=float(np.abs(final).max()),
        residual_std_per_atom=float((final / counts.sum(axis=1)).std()),
        rank=rank,
        inseparable=[sorted(int(elements[i]) for i in group) for group in _coupled(null_space)],
    )


def _least_squares(counts: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """Solve min ‖counts·x - energies‖ with minimum ‖x‖.

    Rows are folded block by block into the triangular factor of a QR decomposition: the memory is that of one block
    and, unlike with normal equations, the condition number is not squared.

    Returns
    -------
    solution : numpy.ndarray
        (n_elements,), eV.
    rank : int
        Rank of ``counts``.
    null_space : numpy.ndarray
        Orthonormal compositions that leave every energy unchanged, (n_elements - rank, n_elements).
    """
    n_elements = counts.shape[1]
    triangle = np.zeros((0, n_elements + 1))
    for start in range(0, len(energies), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        rows = np.column_stack([counts[block].astype(np.float64), energies[block]])
        triangle = np.asarray(np.linalg.qr(np.vstack([triangle, rows]), mode="r"))
    u, singular_values, vt = np.linalg.svd(triangle[:, :n_elements], full_matrices=False)
    rank = int((singular_values > RANK_TOLERANCE * singular_values[0]).sum())
    solution = vt[:rank].T @ ((u[:, :rank].T @ triangle[:, n_elements]) / singular_values[:rank])
    return solution, rank, _complement(vt[:rank])


def _complement(basis: np.ndarray) -> np.ndarray:
    """Orthonormal rows that complete the orthonormal rows of ``basis`` (r, k) to a full space: (k - r, k)."""
    return np.linalg.svd(basis, full_matrices=True)[2][len(basis) :]


def _residuals(counts: np.ndarray, energies: np.ndarray, solution: np.ndarray) -> np.ndarray:
    """Energies minus sums of self-atomic energies, (n,), eV."""
    residuals = np.empty_like(energies)
    for start in range(0, len(energies), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        residuals[block] = energies[block] - counts[block] @ solution
    return residuals


def _trim(counts: np.ndarray, residuals: np.ndarray, null_space: np.ndarray) -> np.ndarray:
    """Mask of the molecules that the second fit keeps, (n,) bool.

    Without the few molecules of a rare element the second fit would give it an energy of zero. Where the trimmed
    molecules determine fewer energies than all of them, those that hold an undetermined element come back.
    """
    low, high = np.quantile(residuals, [TRIM, 1.0 - TRIM])
    kept = (residuals >= low) & (residuals <= high)
    _, _, null_space_kept = _least_squares(counts[kept], residuals[kept])
    if len(null_space_kept) == len(null_space):
        return kept
    undetermined = _undetermined(null_space_kept)
    return kept | (counts[:, undetermined] > 0).any(axis=1)


def _undetermined(null_space: np.ndarray) -> np.ndarray:
    """Mask of the elements whose own energy the data do not determine, (n_elements,) bool."""
    return (np.abs(null_space) > 1e-6).any(axis=0)


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
