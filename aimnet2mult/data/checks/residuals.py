"""Energies beside the sums of self-atomic energies: what is usual in a dataset, and which molecules are not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.data.checks.findings import Thresholds
from aimnet2mult.data.checks.rows import Marked, Molecules, RowCheck
from aimnet2mult.data.checks.sample import Sample
from aimnet2mult.data.sae import composition, fit_sae, terms_energy

MIN_OF_COMPOSITION = 3
"""Molecules of one composition, charge and multiplicity that are compared with one another."""

MIN_OF_CHARGE = 20
"""Molecules of one charge that are compared with one another where compositions are rare."""

MIN_COMPARED = 50
"""Molecules in groups of one composition that tell how far energies within such groups usually are."""

ION_ALLOWANCE = 15.0
"""eV per unit of charge that molecules of a rare charge may deviate more: about the first ionisation energy."""

MIN_OUTLIER = (1.0, 0.8)
"""eV, and eV per atom; smaller deviations are no outliers: so far apart can isomers and hot geometries be."""

MIN_SPREAD = 1e-3
"""eV; smallest usual deviation, for data that a sum over atoms describes exactly."""

MAX_REFITS = 8
"""Times that self-atomic energies are fitted without the outliers of the fit before."""

L1_STEPS = 25
"""Steps of the fit that finds gross errors, such as another unit, before all others."""

GROSS_CUT = 30.0
"""Usual deviations from that fit beyond which a molecule is left out of the first of the others."""

REFIT_CUT = 8.0
"""Usual deviations beyond which a molecule is left out of the next fit."""


class Rows(NamedTuple):
    """What residuals are judged by: counts (m, n_elements), energies, charges, numbers of atoms and keys, (m,) each."""

    counts: np.ndarray
    energies: np.ndarray
    charges: np.ndarray
    n_atoms: np.ndarray
    keys: np.ndarray

    def subset(self, mask: np.ndarray) -> "Rows":
        """Return some of the molecules."""
        return Rows(*(values[mask] for values in self))


@dataclass
class Residuals:
    """How far energies usually are from sums of self-atomic energies.

    A sum over atoms knows nothing of bonds and charges: O2 and O3 are off by 7 eV, cations by their ionisation energy.
    So a molecule is compared with the others of its composition, charge and multiplicity, where there are some, else
    with the others of its charge. Deviations grow as the square root of the number of atoms.

    Attributes
    ----------
    sae : numpy.ndarray
        (`MAX_ATOMIC_NUMBER` + 1,), eV; NaN for elements that are not known.
    reference : mapping
        The self-atomic energies with their terms in charge and spin, if there are any, which energies are compared
        without (`aimnet2mult.reference_energies`).
    keys, centres : numpy.ndarray
        (g,) uint64, sorted, `aimnet2mult.data.checks.geometry.molecule_keys` of the compositions that are frequent,
        and their median residuals, eV.
    spread : float
        Usual deviation (scaled median absolute deviation) over √N from the centre of the composition, eV.
    by_charge : dict of int to tuple of float
        Charge -> median residual and usual deviation from it over √N, eV.
    pooled : tuple of float
        The same for all molecules together.
    typical, per_atom : float
        Median of residual over number of atoms, and usual deviation from it, eV.
    """

    sae: np.ndarray
    reference: Mapping[int, float] = field(default_factory=dict)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    centres: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spread: float = np.inf
    by_charge: dict[int, tuple[float, float]] = field(default_factory=dict)
    pooled: tuple[float, float] = (0.0, np.inf)
    typical: float = 0.0
    per_atom: float = 0.0

    def sums(self, counts: np.ndarray, elements: list[int]) -> np.ndarray:
        """Sums of the self-atomic energies, (m,), eV, for molecules whose elements are known.

        For the others, which callers leave out, the sums lack the elements that are not.
        """
        # Unknown energies are NaN, and no atoms times NaN is not zero.
        return np.asarray(counts @ np.nan_to_num(self.sae[elements]))

    def measure(self, rows: Rows, residuals: np.ndarray) -> None:
        """Find out what is usual among some molecules."""
        root = np.sqrt(rows.n_atoms)
        centre = float(np.median(residuals))
        self.pooled = (centre, _spread((residuals - centre) / root))
        self.typical = float(np.median(residuals / rows.n_atoms))
        self.per_atom = _spread(residuals / rows.n_atoms - self.typical)
        for charge in np.unique(rows.charges).tolist():
            own = rows.charges == charge
            if own.sum() >= MIN_OF_CHARGE:
                centre = float(np.median(residuals[own]))
                self.by_charge[charge] = (centre, _spread((residuals[own] - centre) / root[own]))
        self._measure_compositions(rows.keys, residuals, root)

    def _measure_compositions(self, keys: np.ndarray, residuals: np.ndarray, root: np.ndarray) -> None:
        order = np.lexsort((residuals, keys))  # medians are in the middle of each group
        groups, first, count = np.unique(keys[order], return_index=True, return_counts=True)
        frequent = count >= MIN_OF_COMPOSITION
        lower, upper = first + (count - 1) // 2, first + count // 2
        self.keys = groups[frequent]
        self.centres = (0.5 * (residuals[order[lower]] + residuals[order[upper]]))[frequent]
        centres, known = self._centres_of_compositions(keys)
        if known.sum() >= MIN_COMPARED:
            self.spread = _spread(((residuals - centres) / root)[known])

    def _centres_of_compositions(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Median residual of each molecule's composition, and whether it is known, (m,) each."""
        if not len(self.keys):
            return np.zeros(len(keys)), np.zeros(len(keys), bool)
        position = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.centres[position], self.keys[position] == keys

    def deviations(
        self, residuals: np.ndarray, charges: np.ndarray, n_atoms: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How far molecules are from the centre of their like, in eV and in usual deviations, (m,) each."""
        centre, spread = self.pooled
        off = np.maximum(np.abs(residuals - centre) - ION_ALLOWANCE * np.abs(charges), 0.0)
        usual = np.full(len(residuals), spread)
        for charge, (centre, spread) in self.by_charge.items():
            own = charges == charge
            off[own], usual[own] = np.abs(residuals[own] - centre), spread
        centres, known = self._centres_of_compositions(keys)
        off[known] = np.abs(residuals - centres)[known]
        usual[known] = min(self.spread, self.pooled[1])
        return off, off / (np.maximum(usual, MIN_SPREAD) * np.sqrt(n_atoms))

    def mark(self, molecules: Molecules, limits: Thresholds) -> Marked:
        """Mark molecules whose energy is out of the ordinary; how bad: deviation from the others, eV."""
        residuals = np.asarray(molecules["energy"], np.float64) - self.sae[molecules["numbers"]].sum(axis=1)
        residuals -= terms_energy(self.reference, molecules["charge"], molecules.mult, len(molecules))
        charges = np.rint(molecules["charge"]).astype(int)
        n_atoms = np.full(len(molecules), molecules.n_atoms)
        known = np.isfinite(residuals)
        off, deviations = self.deviations(np.where(known, residuals, 0.0), charges, n_atoms, molecules.keys)
        far = off > MIN_OUTLIER[0] + MIN_OUTLIER[1] * molecules.n_atoms
        return known & (deviations > limits.outlier) & far, off


def fit_residuals(sample: Sample, sae: Mapping[int, float] | None = None) -> Residuals | None:
    """Fit self-atomic energies to a sample (or take ``sae``), without its outliers, and measure the residuals.

    Returns
    -------
    Residuals or None
        None where no molecule has an energy (and only elements of ``sae``).
    """
    if not len(sample):
        return None
    elements = sorted({int(z) for numbers in sample.numbers for z in np.unique(numbers)})
    counts = np.concatenate([composition(numbers, elements) for numbers in sample.numbers])
    rows = Rows(
        counts,
        np.concatenate(sample.energy)
        - terms_energy(sae or {}, np.concatenate(sample.charge), np.concatenate(sample.mult), len(sample)),
        np.rint(np.concatenate(sample.charge)).astype(int),
        counts.sum(axis=1),
        np.concatenate(sample.keys),
    )
    usable = np.isfinite(rows.energies)
    if sae is not None:
        usable &= ~(counts[:, [z not in sae for z in elements]] > 0).any(axis=1)
    if not usable.any():
        return None
    rows = rows.subset(usable)
    if sae is None:
        return _fit_without_outliers(rows, elements)
    result = Residuals(_sae_table(sae), sae)
    result.measure(rows, rows.energies - result.sums(rows.counts, elements))
    return result


def _fit_without_outliers(rows: Rows, elements: list[int]) -> Residuals:
    off = _least_absolute_residuals(rows) / np.sqrt(rows.n_atoms)
    kept = np.abs(off) <= GROSS_CUT * max(_spread(off), MIN_SPREAD)
    for _ in range(MAX_REFITS):
        used = rows.subset(kept)
        held = np.asarray((used.counts > 0).any(axis=0))
        columns = [z for z, there in zip(elements, held, strict=True) if there]
        result = Residuals(_sae_table(fit_sae(used.counts[:, held], used.energies, columns).sae))
        residuals = rows.energies - result.sums(rows.counts, elements)
        result.measure(used, residuals[kept])
        _, deviations = result.deviations(residuals, rows.charges, rows.n_atoms, rows.keys)
        inside = (deviations < REFIT_CUT) & ~(rows.counts[:, ~held] > 0).any(axis=1)
        if (inside == kept).all() or not inside.any():
            break
        kept = inside
    return result


def _least_absolute_residuals(rows: Rows) -> np.ndarray:
    """Residuals of the fit with the smallest sum of their sizes, (m,), eV: many wrong energies do not bend it."""
    residuals, weights = rows.energies, np.ones(len(rows.energies))
    for _ in range(L1_STEPS):
        fit = np.linalg.lstsq(rows.counts * weights[:, None], rows.energies * weights, rcond=None)[0]
        residuals = rows.energies - rows.counts @ fit
        weights = 1.0 / np.sqrt(np.maximum(np.abs(residuals), MIN_SPREAD))
    return residuals


def _sae_table(sae: Mapping[int, float]) -> np.ndarray:
    table = np.full(MAX_ATOMIC_NUMBER + 1, np.nan)
    table[list(sae)] = list(sae.values())
    return table


def _spread(deviations: np.ndarray) -> float:
    """Standard deviation of a normal distribution around zero with the same median of sizes."""
    return float(1.4826 * np.median(np.abs(deviations)))


def outlier_check(residuals: Residuals) -> RowCheck:
    """Row check for energies that do not go with fitted self-atomic energies."""
    return RowCheck(
        "energy_outlier",
        "warning",
        ("energy", "charge"),
        residuals.mark,
        "{molecules} whose energy is far from that of similar molecules (by up to {worst:.4g} eV, more than "
        "{outlier:g} usual deviations, after subtracting self-atomic energies). Broken or dissociated molecules, an "
        "unconverged calculation, another electronic state, another unit or a wrong row.",
    )
