import ase.units
import pytest

from aimnet2mult.utils.units import UNITS, scaled_unit, unit_factor, unit_name


@pytest.mark.parametrize(
    ("quantity", "unit", "name", "expected"),
    [
        ("energy", "hartree", "Hartree", ase.units.Hartree),
        ("energy", "Ha", "Hartree", ase.units.Hartree),
        ("energy", "Ry", "Rydberg", ase.units.Rydberg),
        ("energy", "kcal/mol", "kcal/mol", ase.units.kcal / ase.units.mol),
        ("energy", "kJ/mol", "kJ/mol", ase.units.kJ / ase.units.mol),
        ("coord", "Bohr", "Bohr", ase.units.Bohr),
        ("coord", "angstrom", "Å", 1.0),
        ("cell", "nm", "nm", ase.units.nm),
        ("forces", "Hartree/Bohr", "Hartree/Bohr", ase.units.Hartree / ase.units.Bohr),
        ("forces", "Eh/a0", "Hartree/Bohr", ase.units.Hartree / ase.units.Bohr),
        ("forces", "kcal/mol/Ang", "kcal/mol/Å", ase.units.kcal / ase.units.mol),
        ("forces", "kJ/mol/nm", "kJ/mol/nm", ase.units.kJ / ase.units.mol / ase.units.nm),
        ("forces", "meV/A", "meV/Å", 1e-3),
        ("dipole", "Debye", "Debye", ase.units.Debye),
        ("dipole", "e*Bohr", "e·Bohr", ase.units.Bohr),
    ],
)
def test_factors_and_spellings(quantity, unit, name, expected):
    assert unit_name(quantity, unit) == name
    assert unit_factor(quantity, unit) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("quantity", "name"), [(q, name) for q, units in UNITS.items() for name in units])
def test_every_name_is_a_spelling_of_itself(quantity, name):
    assert unit_name(quantity, name) == name


@pytest.mark.parametrize(
    ("quantity", "unit"),
    [("energy", "Bohr"), ("forces", "Hartree"), ("coord", "eV"), ("energy", "joule"), ("dipole", "e")],
)
def test_a_unit_of_something_else_is_refused(quantity, unit):
    with pytest.raises(ValueError, match=f"{unit!r} is not a unit of {quantity}; "):
        unit_factor(quantity, unit)


@pytest.mark.parametrize(
    ("unit", "scale", "expected"),
    [
        ("eV", 1, "eV"),
        ("eV/Å", 23.06, "kcal/mol/Å"),
        ("eV/Å³", 96.485, "kJ/mol/Å³"),
        ("eV", 1000.0, "meV"),
        ("e·Å", 4.803, "Debye"),
        ("e·Å²", 4.803, "0.2082 e·Å²"),
        ("e", 2, "0.5 e"),
        ("eV", 0.5, "2 eV"),
    ],
)
def test_unit_of_scaled_numbers(unit, scale, expected):
    assert scaled_unit(unit, scale) == expected
