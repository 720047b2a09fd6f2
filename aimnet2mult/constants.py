"""Element data. Numbers in formulas live here or in `aimnet2mult.utils.units`, under a name."""

# fmt: off
ELEMENT_SYMBOLS: tuple[str, ...] = (
    "X",
    "H", "He",
    "Li", "Be", "B", "C", "N", "O", "F", "Ne",
    "Na", "Mg", "Al", "Si", "P", "S", "Cl", "Ar",
    "K", "Ca", "Sc", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se", "Br", "Kr",
    "Rb", "Sr", "Y", "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb", "Te", "I", "Xe",
    "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er", "Tm", "Yb", "Lu",
    "Hf", "Ta", "W", "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At", "Rn",
    "Fr", "Ra", "Ac", "Th", "Pa", "U", "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No", "Lr",
    "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og",
)
"""Symbol of each atomic number; 0 is the padding atom."""
# fmt: on

MAX_ATOMIC_NUMBER = len(ELEMENT_SYMBOLS) - 1
"""Heaviest element (Og, 118)."""

FIDELITY_OFFSET = 200
"""Default distance between the element types of neighbouring fidelities: type = Z + fidelity * offset."""

TYPES_PER_FIDELITY = 129
"""Rows that the last fidelity takes in an embedding table (row 0 is padding)."""


def element_names(numbers: list[int]) -> str:
    """Return atomic numbers as text for messages: ``[1, 35]`` -> ``"H (1), Br (35)"``."""
    names = (f"{ELEMENT_SYMBOLS[z]} ({z})" if 0 < z <= MAX_ATOMIC_NUMBER else f"Z={z}" for z in numbers)
    return ", ".join(names)
