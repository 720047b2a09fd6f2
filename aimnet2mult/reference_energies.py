"""Reference energies of a level of theory: what is taken off its energies before a network learns the rest.

For a molecule with n_Z atoms of element Z, total charge Q and multiplicity 2S+1,

    E_ref = Σ_Z n_Z ε_Z + Q ε_Q + 2S ε_S

with the self-atomic energies (SAE) ε_Z, and two optional terms: ε_Q per elementary charge and ε_S per unpaired
electron, which take up that levels of theory differ in the energy of an electron, above all between methods that count
all electrons and those that count valence electrons only. Every term is additive over fragments that are far apart:
atoms are counted, total charges add up, and so do unpaired electrons with their spins aligned. So the reference energy
of two distant molecules is the sum of theirs, which terms in |Q| or Q² would spoil (Na⁺ and Cl⁻ far apart are neutral
together). What is not linear is left to the network, which sees the charges of the atoms.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TERMS = {"charge": "eV per elementary charge", "spin": "eV per unpaired electron"}
"""Terms beside those of the elements, by the key that files have for them, and their units."""


@dataclass(frozen=True, eq=False)
class ReferenceEnergies(Mapping[int, float]):
    """Reference energies; as a mapping, the self-atomic energies alone: {Z: eV}.

    Equal to a mapping without terms if it has none itself.

    Attributes
    ----------
    elements : mapping of int to float
        Atomic number -> self-atomic energy ε_Z, eV, in ascending order.
    charge : float
        ε_Q, eV per elementary charge.
    spin : float
        ε_S, eV per unpaired electron.
    """

    elements: dict[int, float] = field(default_factory=dict)
    charge: float = 0.0
    spin: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "elements", {int(z): float(self.elements[z]) for z in sorted(self.elements)})

    @classmethod
    def from_table(cls, table: Mapping[Any, float]) -> "ReferenceEnergies":
        """Make them of {Z: eV} with optional entries ``charge`` and ``spin``, the inverse of `table`.

        Reference energies are returned as they are.
        """
        if isinstance(table, cls):
            return table
        terms = {name: float(table[name]) for name in TERMS if name in table}
        return cls({z: energy for z, energy in table.items() if z not in TERMS}, **terms)

    def table(self) -> dict[int | str, float]:
        """Return {Z: eV} with entries ``charge`` and ``spin`` for terms that are not zero, as files hold them."""
        return dict([*self.elements.items(), *self.terms.items()])

    @property
    def terms(self) -> dict[str, float]:
        """Terms that are not zero, by their names in `TERMS`."""
        return {name: value for name in TERMS if (value := getattr(self, name)) != 0.0}

    def restricted(self, elements: Iterable[int]) -> "ReferenceEnergies":
        """Those of some elements, with the same terms; a KeyError if one is not known."""
        return ReferenceEnergies({z: self.elements[z] for z in elements}, self.charge, self.spin)

    def __getitem__(self, z: int) -> float:
        return self.elements[z]

    def __iter__(self) -> Iterator[int]:
        return iter(self.elements)

    def __len__(self) -> int:
        return len(self.elements)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.table() == (other.table() if isinstance(other, ReferenceEnergies) else dict(other))
