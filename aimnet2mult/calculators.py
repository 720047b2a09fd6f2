"""ASE calculators for models of any format. Only this module and `tools.convert_data` know ASE.

``atoms.calc = AIMNet2Calculator("model_fid0.jpt")``, then optimise, run MD, compute vibrations. Total charge and
spin multiplicity come from the arguments, else from ``atoms.info["charge"]`` and ``atoms.info["spin"]``. Without ASE,
`aimnet2mult.models.loading.load_potential` gives the same results for batches.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from aimnet2mult.config.builder import nearest
from aimnet2mult.models.all_fidelities import evaluate_all, load_all_fidelities
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.loading import load_potential
from aimnet2mult.models.potential import D3_CUTOFF, D3_SMOOTHING, Potential

FIDELITY_FILE = re.compile(r"_fid(\d+)\.jpt$")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _integer(value: Any, what: str) -> int:
    # Numbers of numpy and of files too, but neither text nor None, which is no default but something left unfinished.
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or int(value) != value:
        raise ValueError(f"{what} must be a whole number, found {value!r}")
    return int(value)


def check_parity(numbers: np.ndarray, charge: int, mult: int) -> None:
    """Raise a ValueError if ``mult`` - 1 unpaired electrons are impossible for this number of electrons."""
    if mult < 1:
        raise ValueError(f"spin multiplicity must be at least 1, found {mult}")
    electrons = int(numbers.sum()) - charge
    if electrons < mult - 1:
        raise ValueError(f"multiplicity {mult} needs {mult - 1} unpaired electrons, the molecule has {electrons}")
    if (electrons - (mult - 1)) % 2 != 0:
        kind = "odd" if electrons % 2 else "even"
        raise ValueError(
            f"{electrons} electrons (charge {charge}) cannot have the multiplicity {mult}: an {kind} number of "
            f"electrons needs an {'even' if electrons % 2 else 'odd'} one; set mult or atoms.info['spin'], or charge"
        )


class AIMNet2Calculator(Calculator):
    """Energy, forces, stress and charges of a model.

    Properties: ``energy`` and ``free_energy`` (eV, the same number), ``forces`` (eV/Å), ``charges`` (e), for
    molecules ``dipole`` of the charges about the centre of mass (e·Å), for crystals ``stress`` (eV/Å³, Voigt order),
    and ``magmoms`` (spin charges) if the model gives them.

    Parameters
    ----------
    model : str, Path or Potential
        A model file of any format (`aimnet2mult.models.loading.load_potential`): compiled or legacy ``.jpt``, format-2
        ``.pt``, checkpoint of one fidelity. Or a loaded one.
    charge : int, optional
        Total charge, e; default ``atoms.info["charge"]``, else 0.
    mult : int, optional
        Spin multiplicity 2S+1; default ``atoms.info["spin"]`` or ``["mult"]``, else 1.
    device : str, optional
        Default: a GPU if there is one.
    nb_threshold : int, optional
        Molecules of up to so many atoms are evaluated in dense layout, larger ones with lists of neighbours; default as
        in the file, 120.

    Raises
    ------
    ValueError
        At calculation: an element that the model does not know, a multiplicity that does not fit the number of
        electrons, a system periodic in some directions only.
    """

    # ASE compares atoms with those of the last calculation; the model sees neither of these two.
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012 - ASE declares it like this

    def __init__(
        self,
        model: str | Path | Potential,
        charge: int | None = None,
        mult: int | None = None,
        device: str | None = None,
        nb_threshold: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.device = device or _default_device()
        self.model = model if isinstance(model, Potential) else load_potential(model, self.device)
        if nb_threshold is not None:
            self.model.nb_threshold = nb_threshold
        self.charge = None if charge is None else _integer(charge, "charge")
        self.mult = None if mult is None else _integer(mult, "mult")
        self._state: tuple[int, int] | None = None
        self.implemented_properties = ["energy", "free_energy", "forces", "stress", "charges", "dipole"]
        if self.model.spin_resolved:
            self.implemented_properties.append("magmoms")

    def charge_and_mult(self, atoms: Atoms) -> tuple[int, int]:
        """Total charge and multiplicity that a calculation of ``atoms`` uses."""
        charge, mult = self.charge, self.mult
        if charge is None:
            charge = _integer(atoms.info.get("charge", 0), "atoms.info['charge']")
        if mult is None:
            key = "spin" if "spin" in atoms.info else "mult"
            mult = _integer(atoms.info.get(key, 1), f"atoms.info['{key}']")
        return charge, mult

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """List what changed since the last calculation; ``atoms.info``, which ASE does not look at, included."""
        # ASE compares within ``tol``, which takes longer and is asked two or three times in a step of a simulation.
        same = self.atoms is not None and _same_geometry(atoms, self.atoms)
        changes = [] if same else super().check_state(atoms, tol=tol)
        if self._state is not None and self.charge_and_mult(atoms) != self._state:
            changes.append("info")
        return changes

    def batch(self, atoms: Atoms) -> dict[str, torch.Tensor]:
        """The batch of one molecule that the model is called with."""
        charge, mult = self.charge_and_mult(atoms)
        check_parity(atoms.numbers, charge, mult)
        pbc = atoms.get_pbc()
        data = {
            "coord": torch.as_tensor(atoms.get_positions()[None], dtype=torch.float64),
            "numbers": torch.as_tensor(atoms.numbers[None], dtype=torch.long),
            "charge": torch.tensor([float(charge)], dtype=torch.float64),
            "mult": torch.tensor([float(mult)], dtype=torch.float64),
        }
        if pbc.any():
            if not pbc.all():
                raise ValueError(f"periodic in some directions only (pbc = {pbc.tolist()}): all or none is supported")
            data["cell"] = torch.as_tensor(atoms.get_cell().array[None], dtype=torch.float64)
        return {key: value.to(self.device) for key, value in data.items()}

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill ``results``; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        assert atoms is not None
        self._state = self.charge_and_mult(atoms)
        data = self.batch(atoms)
        with_stress = "stress" in properties
        if with_stress and "cell" not in data:
            raise PropertyNotImplementedError("a molecule without a cell has no stress")
        out = {key: value[0].cpu().numpy() for key, value in _results(self.model, data, with_stress).items()}
        if with_stress and "stress" not in out:  # files of format 1 know no stress, whatever is asked of them
            raise PropertyNotImplementedError(
                "this file was compiled by an earlier version, without stress: compile the model again"
            )
        energy = float(out["energy"])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": out["forces"].astype(np.float64),
            "charges": out["charges"].astype(np.float64),
        }
        if not atoms.get_pbc().any():
            positions = atoms.get_positions() - (atoms.get_center_of_mass() if len(atoms) else 0.0)
            self.results["dipole"] = self.results["charges"] @ positions
        if with_stress:
            self.results["stress"] = full_3x3_to_voigt_6_stress(out["stress"].astype(np.float64))
        if "spin_charges" in out:
            self.results["magmoms"] = out["spin_charges"].astype(np.float64)

    def set_lrcoulomb_method(
        self, method: str, cutoff: float = 0.0, dsf_alpha: float = 0.2, ewald_accuracy: float = 1e-8
    ) -> None:
        """Choose how Coulomb energies are summed (`aimnet2mult.models.potential.Potential.set_lrcoulomb_method`).

        Parameters
        ----------
        method : str
            ``simple`` (all pairs; molecules only), ``dsf`` or ``ewald``.
        cutoff : float
            Of ``dsf``, or of the real-space sum of ``ewald``, Å; 0 for 15 Å, or for the cheapest one.
        dsf_alpha : float
            Damping of ``dsf``, 1/Å.
        ewald_accuracy : float
            Relative size of the terms that ``ewald`` leaves out.

        Raises
        ------
        ValueError
            A model without Coulomb energy, an unknown method, values that make no sense.

        Warns
        -----
        UserWarning
            The energy is inside a TorchScript file; nothing is changed.
        """
        self.model.set_lrcoulomb_method(method, cutoff, dsf_alpha, ewald_accuracy)
        self.reset()

    def set_dftd3_cutoff(self, cutoff: float = D3_CUTOFF, smoothing_fraction: float = D3_SMOOTHING) -> None:
        """Set the range of D3 pairs, Å, and the fraction of it over which they are switched off.

        Raises
        ------
        ValueError
            A model without D3, values that make no sense.

        Warns
        -----
        UserWarning
            The energy is inside a TorchScript file; nothing is changed.
        """
        self.model.set_dftd3_cutoff(cutoff, smoothing_fraction)
        self.reset()

    def get_spin_charges(self, atoms: Atoms | None = None) -> np.ndarray:
        """Spin charges (N,), e, of a model that resolves spin.

        Raises
        ------
        PropertyNotImplementedError
            Of one that does not; what ASE expects of a calculator that lacks a property.
        """
        if not self.model.spin_resolved:
            raise PropertyNotImplementedError("this model has one charge channel and no spin charges")
        return self.get_property("magmoms", atoms)

    def get_hessian(self, atoms: Atoms | None = None, method: str = "autograd") -> np.ndarray:
        """Second derivatives of the energy, (3N, 3N), eV/Å² (`Potential.hessian`)."""
        atoms = atoms if atoms is not None else self.atoms
        if atoms is None:
            raise ValueError("get_hessian needs atoms: none were given and none were calculated before")
        size = 3 * len(atoms)
        return self.model.hessian(self.batch(atoms), method)[0].cpu().numpy().reshape(size, size)


class MultiFidelityCalculator(AIMNet2Calculator):
    """All fidelities of a training in one calculator; one of them is active.

    Parameters
    ----------
    models : str or Path
        Folder with one ``<prefix>_fid<N>.jpt`` per fidelity, or one file of all: ``compile_jit --combined``, or a
        checkpoint.
    fidelity : int or str, optional
        Active fidelity, by number or by name; default that of the file, or the lowest number.
    charge, mult, device, nb_threshold
        As in `AIMNet2Calculator`.

    Raises
    ------
    FileNotFoundError, ValueError
        No folder, no or ambiguous files in it, a file of one fidelity, unknown fidelity.
    """

    def __init__(
        self,
        models: str | Path,
        fidelity: int | str | None = None,
        charge: int | None = None,
        mult: int | None = None,
        device: str | None = None,
        nb_threshold: int | None = None,
        **kwargs: Any,
    ) -> None:
        path = Path(models)
        device = device or _default_device()
        self.combined = path.is_file()
        if self.combined:
            self.models, self.names, first = _models_of_file(path, device)
        else:
            self.models, self.names = _models_of_folder(path, device)
            first = min(self.models)
        self.fidelity = self._level(first if fidelity is None else fidelity)
        if nb_threshold is not None:
            for model in self.models.values():
                model.nb_threshold = nb_threshold
        super().__init__(self.models[self.fidelity], charge, mult, device, **kwargs)

    def _level(self, fidelity: int | str) -> int:
        if isinstance(fidelity, str):
            for level, name in self.names.items():
                if name == fidelity:
                    return level
        elif isinstance(fidelity, (int, np.integer)) and not isinstance(fidelity, bool) and fidelity in self.models:
            return int(fidelity)
        known = [f"{level}" if name == str(level) else f"{level} ({name})" for level, name in self.names.items()]
        raise ValueError(f"fidelity {fidelity!r}: {nearest(str(fidelity), known)}")

    def batch(self, atoms: Atoms) -> dict[str, torch.Tensor]:
        """The batch of one molecule that the model of the active fidelity is called with."""
        return self._at(super().batch(atoms), self.fidelity)

    def _at(self, data: dict[str, torch.Tensor], fidelity: int) -> dict[str, torch.Tensor]:
        return {**data, "fidelity": torch.tensor(fidelity, device=self.device)} if self.combined else data

    def set_fidelity(self, fidelity: int | str) -> None:
        """Make another fidelity the active one; results of the former are forgotten."""
        self.fidelity = self._level(fidelity)
        self.model = self.models[self.fidelity]
        self.reset()

    def energies(self, atoms: Atoms) -> dict[int, float]:
        """Total energy of ``atoms`` in every fidelity, eV; the active one and ``results`` stay as they are.

        One call of a file of all fidelities, or of a checkpoint, in which the network is evaluated once if its
        fidelities share their embedding. They are not among ``results``: ASE's ``energies`` are those of the atoms.

        Raises
        ------
        ValueError
            An element that no fidelity knows. One that some fidelities lack gives NaN for these.
        """
        data = super().batch(atoms)
        if self.combined and hasattr(self.model.module, "all_fidelities"):
            return dict(enumerate(evaluate_all(self.model, data)["energy"][:, 0].tolist()))
        energies = dict.fromkeys(self.models, math.nan)
        able = [level for level, model in self.models.items() if set(atoms.numbers.tolist()) <= set(model.species)]
        for level in able or self.models:  # the first one says what is missing if all of them lack something
            energies[level] = float(_results(self.models[level], self._at(data, level))["energy"])
        return energies

    def energy_differences(self, atoms: Atoms, reference: int | str | None = None) -> dict[int, float]:
        """Total energy of ``atoms`` in every fidelity less that in one of them, eV.

        Parameters
        ----------
        atoms : Atoms
            The molecule or crystal.
        reference : int or str, optional
            Number or name of the fidelity that is subtracted; default the active one.

        Raises
        ------
        ValueError
            As `energies`; an unknown fidelity.
        """
        level = self.fidelity if reference is None else self._level(reference)
        energies = self.energies(atoms)
        return {f: energy - energies[level] for f, energy in energies.items()}


def _same_geometry(atoms: Atoms, others: Atoms) -> bool:
    """Whether positions, elements and cell are the same numbers."""
    return (
        np.array_equal(atoms.positions, others.positions)
        and np.array_equal(atoms.numbers, others.numbers)
        and np.array_equal(atoms.cell.array, others.cell.array)
        and np.array_equal(atoms.pbc, others.pbc)
    )


def _results(model: Potential, data: dict[str, torch.Tensor], with_stress: bool = False) -> dict[str, torch.Tensor]:
    """Results of a batch, without what the file would compute in every call and nobody asks for here."""
    model.module.compute_stress, model.module.compute_hessian = with_stress, False
    return model(data)


def _models_of_file(path: Path, device: str) -> tuple[dict[int, Potential], dict[int, str], int]:
    """The one model of a file under the number of each of its fidelities, their names, and the file's default."""
    model = load_all_fidelities(path, device)
    names = dict(enumerate(model.fidelity_names))
    return dict.fromkeys(names, model), names, int(model.module.default_fidelity)


def _models_of_folder(folder: Path, device: str) -> tuple[dict[int, Potential], dict[int, str]]:
    """Models of one fidelity by number, and their names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files: dict[int, Path] = {}
    for path in sorted(folder.glob("*.jpt")):
        match = FIDELITY_FILE.search(path.name)
        if match is None:
            continue
        level = int(match.group(1))
        if level in files:
            raise ValueError(f"{folder}: two files for fidelity {level}: {files[level].name} and {path.name}")
        files[level] = path
    if not files:
        raise FileNotFoundError(f"{folder}: no compiled models named <prefix>_fid<N>.jpt")
    models = {level: load_jit_model(files[level], device) for level in sorted(files)}
    return models, {level: str(m.metadata.get("fidelity_name") or level) for level, m in models.items()}
