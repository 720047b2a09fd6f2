"""How the fidelities of a model differ from each other: all of them on the molecules of a dataset, without its labels.

With E_f the total energy of a fidelity and E_ref,f its reference energy (self-atomic energies, and terms in charge and
spin where it has them), the differences are

    ΔE = (E_f - E_ref,f) - (E_r - E_ref,r)        ΔF = F_f - F_r (each component)

for each fidelity f against the reference r. What reference energies say about a molecule is out of ΔE; how well they
were fitted is not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from aimnet2mult.data.base import MoleculeSource
from aimnet2mult.evaluation.compare import ATOMS_PER_CALL, check_inputs, choose_molecules, pieces
from aimnet2mult.evaluation.models import INPUTS, Together

KEYS = ("energy", "forces")
"""Properties that are compared, of `properties.PROPERTIES`."""


@dataclass
class Moments:
    """Mean and standard deviation of numbers that come in parts; those that are not finite are left out.

    Attributes
    ----------
    count : int
        Numbers so far.
    mean : float
        Their mean.
    square : float
        Sum of squared deviations from it.
    """

    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Take further numbers, any shape (Chan, Golub, LeVeque, 10.1080/00031305.1983.10483115)."""
        values = values[np.isfinite(values)]
        if not values.size:
            return
        count, mean = self.count + values.size, float(values.mean())
        shift = mean - self.mean
        self.square += float(((values - mean) ** 2).sum()) + shift**2 * self.count * values.size / count
        self.mean += shift * values.size / count
        self.count = count

    @property
    def std(self) -> float:
        """Standard deviation, of the population; NaN without numbers."""
        return math.sqrt(self.square / self.count) if self.count else math.nan


@dataclass
class Difference:
    """One fidelity of a model less another one, on the molecules of a dataset; in the units of the package.

    Attributes
    ----------
    model, data : str
        What they are called.
    fidelity, reference : str
        Names of the fidelities; the reference is subtracted.
    molecules : int
        Molecules that both of them know.
    moments : dict of str to Moments
        Of each of `KEYS`.
    """

    model: str
    data: str
    fidelity: str
    reference: str
    molecules: int = 0
    moments: dict[str, Moments] = field(default_factory=lambda: {key: Moments() for key in KEYS})

    @property
    def title(self) -> str:
        """``gfn2 - dft``."""
        return f"{self.fidelity} - {self.reference}"


@dataclass
class AllEnergies:
    """Total energies of the molecules of a dataset in all F fidelities of a model.

    Attributes
    ----------
    model, data : str
        What they are called.
    names : list of str
        The fidelities.
    index, n_atoms : ndarray
        (n,) int: place in the dataset, and number of atoms, of each molecule.
    energy : ndarray
        (F, n), eV; NaN where a fidelity lacks an element.
    """

    model: str
    data: str
    names: list[str]
    index: np.ndarray
    n_atoms: np.ndarray
    energy: np.ndarray


def differences(
    model: Together,
    source: MoleculeSource,
    data: str,
    reference: int,
    indices: np.ndarray | None = None,
    *,
    max_molecules: int | None = None,
    seed: int = 0,
    atoms_per_call: int = ATOMS_PER_CALL["cpu"],
) -> tuple[list[Difference], AllEnergies]:
    """Evaluate all fidelities of a model on molecules of a dataset.

    Parameters
    ----------
    model : Together
        The model.
    source, data, indices, max_molecules, seed, atoms_per_call
        As in `compare.compare`, which takes the same molecules.
    reference : int
        Number of the fidelity that is subtracted from the others.

    Returns
    -------
    list of Difference, AllEnergies
        Of each other fidelity, in their order; energies in the order of the dataset.

    Raises
    ------
    DatasetError, ValueError
        As `compare.compare`; an element that no fidelity knows.
    """
    asked = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    chosen = choose_molecules(asked, max_molecules, seed)
    others = [f for f in range(len(model.names)) if f != reference]
    found = {f: Difference(model.model, data, model.names[f], model.names[reference]) for f in others}
    energies = np.full((len(model.names), len(chosen)), np.nan)
    with tqdm(total=len(chosen), desc=f"{data}, all", unit="molecule", unit_scale=True, disable=None) as progress:
        for rows, arrays in pieces(source, chosen, list(INPUTS), atoms_per_call):
            check_inputs(source, rows, arrays)
            inputs = {key: arrays[key] for key in INPUTS if key in arrays}
            try:
                out = model.predict(inputs)
            except ValueError as error:
                raise ValueError(f"{source.where(int(rows[0]))} and {len(rows) - 1} more molecules: {error}") from error
            energies[:, np.searchsorted(chosen, rows)] = out["energy"]
            relative = {"energy": out["energy"] - model.references(inputs), "forces": out["forces"]}
            for f, difference in found.items():
                difference.molecules += int(np.isfinite(relative["energy"][f] - relative["energy"][reference]).sum())
                for key, moments in difference.moments.items():
                    moments.add(relative[key][f] - relative[key][reference])
            progress.update(len(rows))
    n_atoms = np.asarray(source.n_atoms)[chosen]
    return list(found.values()), AllEnergies(model.model, data, model.names, chosen, n_atoms, energies)


def energies_csv(tables: Sequence[AllEnergies]) -> str:
    """Total energies of molecules in all fidelities as CSV: ``model, data, index, atoms, fidelity, energy`` (eV)."""
    lines = ["model,data,index,atoms,fidelity,energy_eV"]
    for table in tables:
        head = f"{_quoted(table.model)},{_quoted(table.data)}"
        for i, (index, n_atoms) in enumerate(zip(table.index, table.n_atoms, strict=True)):
            for name, energy in zip(table.names, table.energy[:, i], strict=True):
                value = repr(float(energy)) if math.isfinite(energy) else ""
                lines.append(f"{head},{index},{n_atoms},{_quoted(name)},{value}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text


def numbers(difference: Difference, factors: Mapping[str, float]) -> dict[str, dict[str, float | int | None]]:
    """Mean, standard deviation and count of each property, times a factor; None where there are no numbers."""
    return {
        key: {
            "mean": factors[key] * moments.mean if moments.count else None,
            "std": factors[key] * moments.std if moments.count else None,
            "count": moments.count,
        }
        for key, moments in difference.moments.items()
    }
