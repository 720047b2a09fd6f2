"""Synthetic molecules with a known energy function, for tests, demonstrations and measurements of speed.

The energy of a molecule of charge Q is

    E = Σ_i s ε(Z_i) + ½ η Q² + w Σ_{i<j} D_ij [(1 - x_ij)² - 1],    x_ij = exp(-a (r_ij - r0_ij))

with self-energies ε(Z) = -13.6 eV · Z^2.4, which have the size of those of real atoms, a Morse potential between all
pairs whose minimum r0 is the sum of covalent radii, and two scales, s and w, that tell one "level of theory" from
another. Forces are its exact gradient. Charges flow from electropositive to electronegative neighbours and sum to Q;
spin sits on atoms with few neighbours and sums to 2S. A network that sees the neighbourhood of each atom can learn all
of it, and a test can compute any of it anew.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from tqdm import tqdm

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import ELEMENT_SYMBOLS
from aimnet2mult.utils.cli import user_errors

logger = logging.getLogger(__name__)


class _Element(NamedTuple):
    radius: float  # covalent radius, Å
    electronegativity: float  # Pauling's scale


ELEMENTS: dict[str, _Element] = {
    "H": _Element(0.31, 2.20),
    "Li": _Element(1.28, 0.98),
    "B": _Element(0.84, 2.04),
    "C": _Element(0.76, 2.55),
    "N": _Element(0.71, 3.04),
    "O": _Element(0.66, 3.44),
    "F": _Element(0.57, 3.98),
    "Na": _Element(1.66, 0.93),
    "Si": _Element(1.11, 1.90),
    "P": _Element(1.07, 2.19),
    "S": _Element(1.05, 2.58),
    "Cl": _Element(1.02, 3.16),
    "Br": _Element(1.20, 2.96),
    "I": _Element(1.39, 2.66),
}
"""Elements that synthetic molecules can have."""

LABELS = ("energy", "forces", "charges", "spin_charges")
"""Labels that can be written. Every dataset has energies."""

HYDROGEN_EV = 13.6
"""Scale of the self-energies, eV."""

SELF_ENERGY_POWER = 2.4
"""Power of Z in the self-energies: total energies of atoms grow about so."""

HARDNESS_EV = 8.0
"""η, eV/e²: what charging a molecule costs."""

MORSE_WIDTH = 2.0
"""a, 1/Å."""

WELL_DEPTH_EV = 0.8
"""Depth of the well of a pair per unit of the geometric mean of electronegativities, eV."""

CHARGE_FLOW = 0.15
"""Charge that flows along a bond at its equilibrium length per unit of electronegativity, e."""

BOND_SPREAD = 0.05
"""Standard deviation of bond lengths, relative to the minimum of the potential."""

CLOSEST = 1.25
"""Least distance of atoms that are not bonded, relative to the minimum of the potential."""

GROWTH = 1.05
"""Factor by which a bond is made longer each time that no place was found for an atom."""

CHUNK_ROWS = 4096
"""Molecules made at a time."""


def self_energies(elements: Sequence[str], sae_scale: float = 1.0) -> dict[int, float]:
    """Self-energies s ε(Z) of elements, atomic number -> eV."""
    numbers = [ELEMENT_SYMBOLS.index(symbol) for symbol in elements]
    return {z: -sae_scale * HYDROGEN_EV * z**SELF_ENERGY_POWER for z in numbers}


def create_fake_data(
    output: str | Path,
    n_molecules: int = 1000,
    sizes: tuple[int, int] = (2, 12),
    elements: Sequence[str] = ("H", "C", "N", "O"),
    labels: Sequence[str] = LABELS,
    seed: int = 0,
    sae_scale: float = 1.0,
    well_scale: float = 1.0,
    ions: float = 0.1,
    progress: bool = False,
) -> None:
    """Write a dataset of synthetic molecules.

    The same seed, number, sizes, elements and share of ions give the same geometries, whatever the labels and
    scales: two levels of theory for the same molecules.

    Parameters
    ----------
    output : str or Path
        HDF5 file to write.
    n_molecules : int
        Number of molecules.
    sizes : tuple of int
        Least and largest number of atoms; sizes are spread evenly.
    elements : sequence of str
        Symbols from `ELEMENTS`, all equally frequent.
    labels : sequence of str
        From `LABELS`; energies are always written.
    seed : int
        Seed of all that is random.
    sae_scale : float
        Scale s of the self-energies.
    well_scale : float
        Scale w of the binding energies.
    ions : float
        Share of molecules with a charge of +1 or -1.
    progress : bool
        Show a progress bar on a terminal.

    Raises
    ------
    ValueError
        An argument out of range, an unknown element or label.
    OSError
        The file cannot be written.
    """
    from aimnet2mult.data.sgdataset import dataset_writer  # imports torch, for which --help need not wait

    _check_arguments(n_molecules, sizes, elements, labels, seed, ions)
    low, high = sizes
    counts = np.random.default_rng([seed, 0]).multinomial(n_molecules, np.full(high - low + 1, 1.0 / (high - low + 1)))
    groups = {low + i: int(count) for i, count in enumerate(counts) if count}
    attributes = {
        "level": f"synthetic Morse potential, well_scale {well_scale}, sae_scale {sae_scale}",
        "program": "aimnet2mult.tools.create_fake_data",
        "units": "Angstrom, eV, eV/Angstrom, e",
    }
    numbers = np.array([ELEMENT_SYMBOLS.index(symbol) for symbol in elements])
    with (
        dataset_writer(output, groups, attributes) as writer,
        tqdm(total=n_molecules, unit="molecules", disable=None if progress else True) as bar,
    ):
        for n_atoms, first, rows in _pieces(groups):
            rng = np.random.default_rng([seed, n_atoms, first])
            inputs = random_molecules(rng, rows, n_atoms, numbers, ions)
            outputs = morse_labels(**inputs, sae_scale=sae_scale, well_scale=well_scale)
            writer.write(n_atoms, first, inputs | {key: outputs[key] for key in LABELS if key in (*labels, "energy")})
            bar.update(rows)


def _pieces(groups: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Yield (number of atoms, first row, rows) of pieces of at most `CHUNK_ROWS` molecules."""
    for n_atoms, n_molecules in groups.items():
        for first in range(0, n_molecules, CHUNK_ROWS):
            yield n_atoms, first, min(CHUNK_ROWS, n_molecules - first)


def _check_arguments(
    n_molecules: int, sizes: tuple[int, int], elements: Sequence[str], labels: Sequence[str], seed: int, ions: float
) -> None:
    if n_molecules < 1:
        raise ValueError(f"molecules: {n_molecules} is not positive. Give the number of molecules.")
    if not 1 <= sizes[0] <= sizes[1]:
        raise ValueError(f"sizes: {sizes[0]} to {sizes[1]} atoms is no range. Give the least and the largest number.")
    if seed < 0:
        raise ValueError(f"seed: {seed} is negative. Give 0 or a positive integer.")
    if not 0.0 <= ions <= 1.0:
        raise ValueError(f"ions: {ions} is not a share from 0 to 1.")
    for name, words, known in (("elements", elements, tuple(ELEMENTS)), ("labels", labels, LABELS)):
        if not words:
            raise ValueError(f"{name}: none given; known: {', '.join(known)}")
        for word in words:
            if word not in known:
                raise ValueError(f"{name}: unknown {word!r}; {nearest(word, known)}")


# --------------------------------------------------------------------------------------------------
# molecules
# --------------------------------------------------------------------------------------------------


def random_molecules(
    rng: np.random.Generator, n_molecules: int, n_atoms: int, elements: np.ndarray, ions: float
) -> dict[str, np.ndarray]:
    """Make molecules by adding atom after atom at bond distance from a random one, away from all others.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    n_molecules, n_atoms : int
        Number n of molecules, and N of atoms in each.
    elements : numpy.ndarray
        (k,) int, atomic numbers to choose from.
    ions : float
        Share of molecules with a charge of +1 or -1.

    Returns
    -------
    dict of str to numpy.ndarray
        ``coord`` (n, N, 3) float32 in Å, ``numbers`` (n, N) int32, ``charge`` (n,) and ``mult`` (n,) float32, the
        multiplicity being 1 for an even number of electrons and 2 for an odd one.
    """
    numbers = rng.choice(elements, (n_molecules, n_atoms)).astype(np.int32)
    radius = _property(numbers, "radius")
    coord = np.zeros((n_molecules, n_atoms, 3))
    for atom in range(1, n_atoms):
        todo, stretch = np.arange(n_molecules), 1.0
        while len(todo):
            parent = rng.integers(atom, size=len(todo))
            direction = rng.normal(size=(len(todo), 3))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            minimum = radius[todo, atom, None] + radius[todo, :atom]
            spread = np.clip(rng.normal(scale=BOND_SPREAD, size=len(todo)), -3.0 * BOND_SPREAD, 3.0 * BOND_SPREAD)
            bond = stretch * (1.0 + spread) * np.take_along_axis(minimum, parent[:, None], 1)[:, 0]
            place = coord[todo, parent] + bond[:, None] * direction
            relative = np.linalg.norm(coord[todo, :atom] - place[:, None], axis=2) / minimum
            np.put_along_axis(relative, parent[:, None], np.inf, axis=1)
            found = (relative > CLOSEST).all(axis=1)
            coord[todo[found], atom] = place[found]
            todo, stretch = todo[~found], stretch * GROWTH
    charge = rng.choice([-1, 0, 1], n_molecules, p=[ions / 2.0, 1.0 - ions, ions / 2.0])
    mult = 1 + (numbers.sum(axis=1) - charge) % 2
    return {
        "coord": coord.astype(np.float32),
        "numbers": numbers,
        "charge": charge.astype(np.float32),
        "mult": mult.astype(np.float32),
    }


def morse_labels(
    coord: np.ndarray,
    numbers: np.ndarray,
    charge: np.ndarray,
    mult: np.ndarray,
    sae_scale: float = 1.0,
    well_scale: float = 1.0,
) -> dict[str, np.ndarray]:
    """Labels of molecules from the equations at the top of this module.

    Parameters
    ----------
    coord, numbers, charge, mult : numpy.ndarray
        (n, N, 3) in Å, (n, N), (n,) in e, (n,).
    sae_scale, well_scale : float
        s and w.

    Returns
    -------
    dict of str to numpy.ndarray
        ``energy`` (n,) float64 in eV, ``forces`` (n, N, 3) in eV/Å, ``charges`` and ``spin_charges`` (n, N) in e, these
        three float32.
    """
    n_atoms = numbers.shape[1]
    radius, chi = _property(numbers, "radius"), _property(numbers, "electronegativity")
    vectors = coord[:, None, :].astype(np.float64) - coord[:, :, None]  # from i to j
    distance = np.linalg.norm(vectors, axis=3) + np.eye(n_atoms)  # an atom with itself is masked by `between`
    between = 1.0 - np.eye(n_atoms)
    minimum = radius[:, :, None] + radius[:, None]
    depth = well_scale * WELL_DEPTH_EV * np.sqrt(chi[:, :, None] * chi[:, None]) * between

    x = np.exp(-MORSE_WIDTH * (distance - minimum))
    pair_energy = depth * ((1.0 - x) ** 2 - 1.0)
    slope = 2.0 * depth * MORSE_WIDTH * (1.0 - x) * x  # dE/dr
    self_energy = -sae_scale * HYDROGEN_EV * (numbers.astype(np.float64) ** SELF_ENERGY_POWER).sum(axis=1)
    energy = self_energy + 0.5 * HARDNESS_EV * charge.astype(np.float64) ** 2 + 0.5 * pair_energy.sum(axis=(1, 2))
    forces = ((slope / distance)[..., None] * vectors).sum(axis=2)

    contact = between * np.minimum(x, 1.0)
    flow = CHARGE_FLOW * contact * (chi[:, None] - chi[:, :, None])
    charges = charge[:, None] / n_atoms + flow.sum(axis=2)
    unsaturated = np.exp(-contact.sum(axis=2))
    spin_charges = (mult - 1.0)[:, None] * unsaturated / unsaturated.sum(axis=1, keepdims=True)
    return {
        "energy": energy,
        "forces": forces.astype(np.float32),
        "charges": charges.astype(np.float32),
        "spin_charges": spin_charges.astype(np.float32),
    }


def _property(numbers: np.ndarray, name: str) -> np.ndarray:
    """Property of `ELEMENTS` for each atom, shape of ``numbers``."""
    table = np.zeros(len(ELEMENT_SYMBOLS))
    for symbol, element in ELEMENTS.items():
        table[ELEMENT_SYMBOLS.index(symbol)] = getattr(element, name)
    return table[numbers]


# --------------------------------------------------------------------------------------------------
# command line
# --------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--molecules", default=1000, show_default=True, help="Number of molecules.")
@click.option("--sizes", nargs=2, type=int, default=(2, 12), show_default=True, help="Least and largest atom count.")
@click.option("--elements", default="H,C,N,O", show_default=True, help=f"Symbols, from {', '.join(ELEMENTS)}.")
@click.option("--labels", default=",".join(LABELS), show_default=True, help="Labels; energy is always written.")
@click.option("--seed", default=0, show_default=True, help="Seed; it fixes molecules and geometries.")
@click.option("--sae-scale", default=1.0, show_default=True, help="Scale of the self-energies of atoms.")
@click.option("--well-scale", default=1.0, show_default=True, help="Scale of the binding energies.")
@click.option("--ions", default=0.1, show_default=True, help="Share of molecules with charge +1 or -1.")
@user_errors
def main(
    output: Path,
    molecules: int,
    sizes: tuple[int, int],
    elements: str,
    labels: str,
    seed: int,
    sae_scale: float,
    well_scale: float,
    ions: float,
) -> None:
    """Write OUTPUT, an HDF5 dataset of synthetic molecules with a known energy function.

    Another --sae-scale or --well-scale with the same seed gives another level of theory for the same molecules.
    """
    create_fake_data(
        output,
        n_molecules=molecules,
        sizes=sizes,
        elements=_words(elements),
        labels=_words(labels),
        seed=seed,
        sae_scale=sae_scale,
        well_scale=well_scale,
        ions=ions,
        progress=True,
    )
    click.echo(f"{output}: {molecules} molecules of {sizes[0]} to {sizes[1]} atoms")


if __name__ == "__main__":
    main()
