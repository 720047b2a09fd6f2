"""Conversion factors, CODATA 2014 (the set that ASE uses), so that numbers agree with ASE to the last digit.

The package works in eV, Å, e throughout; these factors serve at its borders (files in other units, dispersion in
atomic units, metrics in kcal/mol).
"""

HARTREE_EV = 27.211386024367243
"""One Hartree in eV."""

BOHR_ANGSTROM = 0.5291772105638411
"""One Bohr in Å."""

COULOMB_EV_ANGSTROM = HARTREE_EV * BOHR_ANGSTROM
"""e²/(4πε₀) in eV·Å: the energy of two unit charges one Å apart."""

EV_KCAL_MOL = 23.060548012069493
"""One eV in kcal/mol."""

EV_KJ_MOL = 96.48533288249877
"""One eV in kJ/mol."""

DEBYE_E_ANGSTROM = 0.20819433442462576
"""One Debye in e·Å."""

ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": HARTREE_EV,
    "mHartree": 1e-3 * HARTREE_EV,
    "Rydberg": 0.5 * HARTREE_EV,
    "kcal/mol": 1.0 / EV_KCAL_MOL,
    "kJ/mol": 1.0 / EV_KJ_MOL,
}
"""Units of energy -> eV."""

LENGTH_UNITS = {"Å": 1.0, "Bohr": BOHR_ANGSTROM, "nm": 10.0, "pm": 0.01}
"""Units of length -> Å."""

FORCE_UNITS = {
    f"{energy}/{length}": factor / per
    for energy, factor in ENERGY_UNITS.items()
    for length, per in LENGTH_UNITS.items()
}
"""Units of force -> eV/Å."""

DIPOLE_UNITS = {"e·Å": 1.0, "Debye": DEBYE_E_ANGSTROM, "e·Bohr": BOHR_ANGSTROM}
"""Units of dipole moments -> e·Å."""

UNITS: dict[str, dict[str, float]] = {
    "coord": LENGTH_UNITS,
    "cell": LENGTH_UNITS,
    "energy": ENERGY_UNITS,
    "forces": FORCE_UNITS,
    "dipole": DIPOLE_UNITS,
}
"""Quantities that may come in other units -> the factors of these to the units of the package."""

SPELLINGS = {
    "ev": "eV",
    "mev": "meV",
    "ha": "Hartree",
    "eh": "Hartree",
    "hartree": "Hartree",
    "mha": "mHartree",
    "meh": "mHartree",
    "mhartree": "mHartree",
    "ry": "Rydberg",
    "rydberg": "Rydberg",
    "kcal/mol": "kcal/mol",
    "kj/mol": "kJ/mol",
    "å": "Å",
    "a": "Å",
    "ang": "Å",
    "angstrom": "Å",
    "bohr": "Bohr",
    "a0": "Bohr",
    "nm": "nm",
    "pm": "pm",
    "debye": "Debye",
    "d": "Debye",
}
"""Usual spellings of units, in small letters."""


SCALE_TOLERANCE = 1e-3
"""How far, relatively, a scale may be from the factor of the unit that it stands for."""


def scaled_unit(unit: str, scale: float) -> str:
    """Return the unit of numbers in ``unit`` that were multiplied: ``("eV/Å", 23.06)`` -> ``"kcal/mol/Å"``.

    Where no unit of energy or dipole fits, it is what a one then stands for: ``("e·Å²", 2.0)`` -> ``"0.5 e·Å²"``.
    """
    for base, known in (("eV", ENERGY_UNITS), ("e·Å", DIPOLE_UNITS)):
        if base in unit.split("/"):
            for name, factor in known.items():
                if abs(scale * factor - 1) < SCALE_TOLERANCE:
                    return unit.replace(base, name)
    return unit if scale == 1 else f"{1 / scale:.4g} {unit}"


def unit_name(quantity: str, unit: str) -> str:
    """Return the name of a unit as `UNITS` spells it: ``("forces", "kcal/mol/Ang")`` -> ``"kcal/mol/Å"``.

    Raises
    ------
    ValueError
        Not a unit of this quantity; the message lists those that are.
    """
    known = UNITS[quantity]
    spelt = unit.strip().replace(" ", "").lower()
    if spelt in SPELLINGS:
        name = SPELLINGS[spelt]
    elif quantity == "dipole":
        charge, _, length = spelt.replace("*", "·").partition("·")
        name = f"{charge}·{SPELLINGS.get(length, length)}"
    else:
        energy, _, length = spelt.rpartition("/")
        name = f"{SPELLINGS.get(energy, energy)}/{SPELLINGS.get(length, length)}"
    if name not in known:
        raise ValueError(f"{unit!r} is not a unit of {quantity}; known: {', '.join(known)}")
    return name


def unit_factor(quantity: str, unit: str) -> float:
    """Return what one ``unit`` of a quantity of `UNITS` is in the unit of the package.

    Raises
    ------
    ValueError
        As `unit_name`.
    """
    return UNITS[quantity][unit_name(quantity, unit)]
