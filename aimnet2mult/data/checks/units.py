"""Which units numbers are in, judged by the numbers alone.

A dataset says nothing about its units once they have been forgotten, but chemistry does: a C-H bond is 1.09 Å long, an
electron is bound in a hydrogen atom by half a Hartree, and energies change by minus the force times the displacement.
Each function here weighs one such piece of evidence and answers only when it is clear; None means that the data could
be anything. All arrays come in what the package takes for eV, Å and eV/Å.
"""

from typing import NamedTuple

import numpy as np

from aimnet2mult.constants import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER
from aimnet2mult.utils.units import ENERGY_UNITS, FORCE_UNITS, HARTREE_EV, LENGTH_UNITS

# --------------------------------------------------------------------------------------------------
# lengths
# --------------------------------------------------------------------------------------------------

BOND_RANGES = {1: (0.65, 1.55), 6: (0.95, 1.75)}
"""Where the median distance to the nearest atom lies, Å: of hydrogen (H-H 0.74 ... H-Si 1.48), of carbon."""

COVALENT = np.isin(ELEMENT_SYMBOLS, ("H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Br", "I"))
"""(`MAX_ATOMIC_NUMBER` + 1,) bool, elements that H and C have such bonds with (metals: longer ones)."""

MIN_ATOMS = 20
"""Fewer atoms of an element say nothing about bond lengths."""


def length_unit(numbers: np.ndarray, nearest: np.ndarray) -> tuple[str, float] | None:
    """Unit of the coordinates, from the distances of H (else C) atoms to their nearest neighbours.

    Parameters
    ----------
    numbers : numpy.ndarray
        (m,) int, atoms of many molecules.
    nearest : numpy.ndarray
        (m,), distance of each to the nearest atom of its molecule.

    Returns
    -------
    unit : str
        ``"Å"`` where the median is that of molecules in Å, else the one unit that would make it so, and the distances
        of four atoms in five as well: those of a bond that is stretched until it breaks are no bond lengths.
    median : float
        Median distance as it stands in the data.
    """
    for z, (shortest, longest) in BOND_RANGES.items():
        distances = nearest[(numbers == z) & np.isfinite(nearest)]
        if len(distances) < MIN_ATOMS:
            continue
        median = float(np.median(distances))
        if shortest < median < longest:
            return "Å", median
        low, high = np.percentile(distances, [10, 90])
        fitting = [unit for unit, factor in LENGTH_UNITS.items() if shortest < factor * low <= factor * high < longest]
        return (fitting[0], median) if len(fitting) == 1 else None
    return None


# --------------------------------------------------------------------------------------------------
# energies
# --------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What energies may be counted from.

    Attributes
    ----------
    name : str
        In words.
    atoms : numpy.ndarray
        (`MAX_ATOMIC_NUMBER` + 1,) typical energy of an atom of each element in a molecule, eV; NaN where not known.
    tolerance : float
        How far, as a logarithm, molecules may be from the sum of their atoms.
    """

    name: str
    atoms: np.ndarray
    tolerance: float


def _all_electron() -> np.ndarray:
    """Energies of neutral atoms with all electrons, eV: -0.7687 Z^(7/3) + Z²/2 - 0.2699 Z^(5/3) Hartree.

    The statistical atom with the corrections of Scott and Schwinger, doi:10.1103/PhysRevA.24.2353; right to 8 % for H,
    to 1 % from C on.
    """
    z = np.arange(MAX_ATOMIC_NUMBER + 1.0)
    energies: np.ndarray = HARTREE_EV * (-0.7687 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3))
    return energies


def _table(**energies: float) -> np.ndarray:
    return np.array([energies.get(symbol, np.nan) for symbol in ELEMENT_SYMBOLS])


REFERENCES = (
    Reference("total energies with all electrons", _all_electron(), 0.06),
    # Sums of the ionisation energies of the valence electrons (NIST Atomic Spectra Database).
    Reference(
        "total energies of the valence electrons (pseudopotentials)",
        _table(H=-13.6, B=-71, C=-148, N=-267, O=-433, F=-659, Si=-103, P=-177, S=-276, Cl=-409, Br=-368, I=-318),
        0.12,
    ),
    # Self-atomic energies fitted to GFN2-xTB energies of small molecules.
    Reference(
        "total energies of the valence electrons (tight binding)",
        _table(H=-13.4, B=-33, C=-58, N=-79, O=-111, F=-129, Si=-48, P=-70, S=-88, Cl=-124, Br=-111, I=-104),
        0.15,
    ),
    # What an atom contributes to the atomisation energy of organic molecules; methane -18.2, water -10.1 eV.
    Reference(
        "energies relative to free atoms",
        _table(H=-2.4, B=-6, C=-7.5, N=-5.5, O=-5.2, F=-3.3, Si=-5, P=-4.5, S=-4, Cl=-2.5, Br=-2.2, I=-1.8),
        0.3,
    ),
)
"""Kinds of energies that can be told apart by their size."""

DATA_ENERGY_UNITS = ("eV", "Hartree", "kcal/mol", "kJ/mol", "Rydberg")
"""Units that energies are considered to be in, likeliest first."""

CLEAR_MISFIT = 1.5
"""A guess must fit better than this many tolerances. Another unit than eV must fit within one, and better than
other guesses by this many: enthalpies of formation in eV have about the size of atomisation energies in Hartree."""


class EnergyGuess(NamedTuple):
    """What energies look like: their unit and what they are counted from."""

    unit: str
    reference: str


def energy_unit(numbers: list[np.ndarray], energies: list[np.ndarray]) -> EnergyGuess | None:
    """Unit of total or atomisation energies, from their ratio to the sum over typical atoms.

    The right unit and reference make the logarithm of that ratio small for all molecules at once; a wrong one misses
    by the logarithm of a unit factor (3.3 for Hartree), or by different amounts for different compositions.

    Parameters
    ----------
    numbers : list of numpy.ndarray
        (k, N) int each, molecules of one size at a time.
    energies : list of numpy.ndarray
        (k,) each.

    Returns
    -------
    EnergyGuess or None
        None: no reference fits (formation energies, residuals ...), or more than one unit does.
    """
    misfit: dict[EnergyGuess, float] = {}
    for reference in REFERENCES:
        expected = np.concatenate([reference.atoms[n].sum(axis=1) for n in numbers])
        found = np.concatenate(energies)
        usable = np.isfinite(expected) & np.isfinite(found)
        if usable.sum() < 0.5 * len(found) or not usable.any():
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = found[usable] / expected[usable]
            logarithms = np.where(ratios > 0, np.log(np.abs(ratios)), 10.0)
        for unit in DATA_ENERGY_UNITS:
            # Some molecules may be wrong, the file as a whole is judged here; but most of them have to fit.
            off = np.percentile(np.abs(logarithms + np.log(ENERGY_UNITS[unit])), 75)
            misfit[EnergyGuess(unit, reference.name)] = float(off) / reference.tolerance
    if not misfit:
        return None
    best = min(misfit, key=misfit.__getitem__)
    others = [value for guess, value in misfit.items() if guess.unit != best.unit]
    if best.unit == "eV":
        clear = misfit[best] < min(CLEAR_MISFIT, *others)
    else:
        clear = misfit[best] < min(1.0, min(others) - CLEAR_MISFIT)
    return best if clear else None


# --------------------------------------------------------------------------------------------------
# forces
# --------------------------------------------------------------------------------------------------

MIN_PAIRS = 10
"""Fewer pairs of close geometries do not settle the unit of forces."""

ENERGY_NOISE = 2e-3
"""eV; pairs with less work and less change of energy say nothing (two relaxed geometries, say)."""

SLOPE_TOLERANCE = 0.1
"""The ratio of energy change to work may be off by this much beyond its statistical error: displacements are finite."""

MAX_SCATTER = 0.6
"""Quartile distance of the ratio over its median beyond which forces do not go with the energies."""


class ForceRelation(NamedTuple):
    """How energy changes between close geometries compare with the work of the forces.

    Attributes
    ----------
    n_pairs : int
        Pairs of close geometries of the same molecule.
    slope : float
        Median of ΔE / (F·Δx) over the half of the pairs with most work; 1 is right.
    scatter : float
        Quartile distance of that ratio over its median; small is good.
    correlation : float
        Of ΔE and F·Δx.
    stiffness : float
        Median of |ΔF| / |Δx|, eV/Å².
    """

    n_pairs: int
    slope: float
    scatter: float
    correlation: float
    stiffness: float

    @property
    def consistent(self) -> bool:
        """Whether forces are minus the gradient of the energies, as far as the pairs tell."""
        return abs(self.slope - 1.0) <= SLOPE_TOLERANCE + self.scatter / float(np.sqrt(self.n_pairs))

    @property
    def related(self) -> bool:
        """Whether energies follow the forces at all, in whatever unit and with whatever sign."""
        return self.scatter <= MAX_SCATTER


def force_relation(work: np.ndarray, energy_change: np.ndarray, stiffness: np.ndarray) -> ForceRelation | None:
    """Compare energy changes with the work of the mean force, ½ (F₁ + F₂)·(x₁ - x₂) = ΔE + O(Δx³).

    Parameters
    ----------
    work, energy_change, stiffness : numpy.ndarray
        (m,) each, one entry per pair of close geometries: eV, eV and eV/Å².

    Returns
    -------
    ForceRelation or None
        None with fewer than `MIN_PAIRS` pairs that have work or a change of energy.
    """
    above_noise = np.maximum(np.abs(work), np.abs(energy_change)) > ENERGY_NOISE
    work, energy_change, stiffness = work[above_noise], energy_change[above_noise], stiffness[above_noise]
    if len(work) < MIN_PAIRS or not np.any(work) or not np.any(energy_change):
        return None
    telling = np.abs(work) >= np.median(np.abs(work))
    telling &= work != 0.0
    low, slope, high = np.percentile(energy_change[telling] / work[telling], [25, 50, 75])
    spread = work.std() * energy_change.std()
    correlation = ((work - work.mean()) * (energy_change - energy_change.mean())).mean() / spread if spread else 0.0
    scatter = float((high - low) / max(abs(slope), 1e-300))
    return ForceRelation(len(work), float(slope), scatter, float(correlation), float(np.median(stiffness)))


CONTRARY_FACTOR = 3.0
"""A ratio of energy change to work this far from that of most pairs, or of the other sign, is of a wrong molecule."""

MAX_CONTRARY = (4, 0.02)
"""Pairs, and share of the pairs, that may be so: steps over a barrier."""


def contrary_pairs(work: np.ndarray, energy_change: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs of close geometries go with the forces as most do, and which clearly do not.

    Parameters
    ----------
    work, energy_change : numpy.ndarray
        (m,) each, as in `force_relation`.
    slope : float
        `ForceRelation.slope`.

    Returns
    -------
    agree, contrary : numpy.ndarray
        (m,) bool each; neither for pairs with little work. ``contrary`` is empty where chance explains it.
    """
    telling = (np.abs(work) > ENERGY_NOISE) & (np.abs(work) >= np.median(np.abs(work)))
    ratio = np.divide(energy_change, slope * work, out=np.ones(len(work)), where=telling & (slope * work != 0.0))
    agree = telling & (ratio > 1.0 / CONTRARY_FACTOR) & (ratio < CONTRARY_FACTOR)
    contrary = telling & ~agree
    if contrary.sum() <= max(MAX_CONTRARY[0], MAX_CONTRARY[1] * telling.sum()):
        contrary[:] = False
    return agree, contrary


def units_of_ratio(slope: float, length: str, energy: str | None) -> list[tuple[str, str]]:
    """Units of energies and forces that would explain a ratio of energy change to work other than 1.

    Parameters
    ----------
    slope : float
        `ForceRelation.slope`, its size.
    length : str
        Unit of the coordinates.
    energy : str or None
        Unit of the energies, if it is known.

    Returns
    -------
    list of tuple of str
        (unit of energies, unit of forces), likeliest first; at most two.
    """
    found = []
    for unit in [energy] if energy is not None else DATA_ENERGY_UNITS:
        for force, factor in FORCE_UNITS.items():
            expected = factor * LENGTH_UNITS[length] / ENERGY_UNITS[unit]
            of_energy, _, of_length = force.rpartition("/")
            usual = of_energy in DATA_ENERGY_UNITS and of_length != "pm"
            if usual and abs(np.log(abs(slope) / expected)) < SLOPE_TOLERANCE:
                found.append((unit, force))
    likely = ("eV/Å", "Hartree/Bohr", "kcal/mol/Å", "kJ/mol/nm", "kJ/mol/Å")
    found.sort(key=lambda pair: likely.index(pair[1]) if pair[1] in likely else len(likely))
    return found[:2]
