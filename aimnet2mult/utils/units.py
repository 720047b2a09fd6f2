"""Conversion factors, CODATA 2014 (the set that ASE uses), so that numbers agree with ASE to the last digit.

The package works in eV, Å, e throughout; these factors serve at its borders (dispersion in atomic units,
metrics in kcal/mol).
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
