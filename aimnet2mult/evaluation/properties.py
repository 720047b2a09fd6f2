"""What is compared, what it is called, and the units in which errors are shown."""

from typing import NamedTuple

from aimnet2mult.config.builder import nearest
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.utils.units import ENERGY_UNITS

ENERGY_PER_ATOM = "energy_per_atom"
"""Energy of a molecule divided by its number of atoms; derived from ``energy``."""

LABELS = ("energy", "forces", "charges", "spin_charges", "dipole", "quadrupole")
"""Labels that are compared with predictions, keys of `aimnet2mult.nbops.BATCH_KEYS`."""

DISPLAY_UNITS = ("eV", "meV", "kcal/mol", "kJ/mol")
"""Units of energy in which errors can be shown."""


class Property(NamedTuple):
    """A property whose errors are reported.

    Attributes
    ----------
    title
        Its name in tables.
    unit
        Unit in the package.
    atomic
        One value (or vector) per atom; else per molecule.
    axis
        What the axes of a parity plot show, without unit.
    """

    title: str
    unit: str
    atomic: bool
    axis: str


def _property(key: str) -> Property:
    title = key.replace("_", " ")
    meaning = BATCH_KEYS[key]
    return Property(title, meaning.unit, meaning.kind == "atom", "energy − SAE" if key == "energy" else title)


PROPERTIES: dict[str, Property] = {
    "energy": _property("energy"),
    ENERGY_PER_ATOM: Property("energy per atom", "eV/atom", False, "(energy − SAE) / atoms"),
    **{key: _property(key) for key in LABELS if key != "energy"},
}
"""Everything that is reported, in the order of the tables."""


class Units:
    """Units of a report: those of the package, but energies (and what has them in its unit) in another if wished.

    Parameters
    ----------
    energy : str
        One of `DISPLAY_UNITS`.

    Raises
    ------
    ValueError
        Another unit.
    """

    def __init__(self, energy: str = "eV") -> None:
        if energy not in DISPLAY_UNITS:
            raise ValueError(f"unit {energy!r} is not one for errors: {nearest(energy, DISPLAY_UNITS)}")
        self.energy = energy

    def name(self, key: str) -> str:
        """Return the unit of a property: ``meV/Å``."""
        return PROPERTIES[key].unit.replace("eV", self.energy)

    def factor(self, key: str) -> float:
        """Return how many of the displayed units make one unit of the package."""
        return 1.0 / ENERGY_UNITS[self.energy] if "eV" in PROPERTIES[key].unit else 1.0
