"""All fidelities of a training in one compiled model; each molecule says which one it is evaluated in.

The parts are the models that would be compiled one by one, so results are theirs to the last bit. What they have in
common (all of the network but element types and readouts) exists once.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.interfaces import FidelityModel
from aimnet2mult.models.jit_wrapper import DeployableModel


def share_equal_tensors(models: Iterable[nn.Module]) -> int:
    """Let parameters and buffers that are equal to the last bit be one tensor; return how many were replaced.

    Files hold a tensor once, however many modules have it.
    """
    known: dict[tuple[str, tuple[int, ...], bytes], Tensor] = {}
    replaced = 0
    for model in models:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    content = tensor.detach().cpu().contiguous().numpy().tobytes()
                    first = known.setdefault((str(tensor.dtype), tuple(tensor.shape), content), tensor)
                    if first is not tensor and type(first) is type(tensor):
                        tensors[name] = first  # type: ignore[assignment]  # of the same type, as was asked above
                        replaced += 1
    return replaced


def share_backbone(models: Sequence[DeployableModel]) -> bool:
    """Tell whether models whose equal tensors are one (`share_equal_tensors`) differ in their readouts alone."""
    first, *others = ([*m.model.named_parameters(), *m.model.named_buffers()] for m in models)
    backbone = {name: tensor for name, tensor in first if not name.startswith("outputs.")}
    for tensors in others:
        other = {name: tensor for name, tensor in tensors if not name.startswith("outputs.")}
        if other.keys() != backbone.keys() or any(other[name] is not tensor for name, tensor in backbone.items()):
            return False
    return True


def without_fidelity(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as a model of one fidelity takes it: without the key ``fidelity``."""
    inputs: dict[str, Tensor] = {}
    for key, value in data.items():
        if key != "fidelity":
            inputs[key] = value
    return inputs


class CombinedModel(nn.Module):
    """Several `DeployableModel` behind one: the key ``fidelity`` selects by index.

    Parameters
    ----------
    models : sequence of DeployableModel
        One for each fidelity, in the order of their numbers. Equal tensors become one.
    names : sequence of str
        Their names, all different.
    default_fidelity : int
        Which one is meant where a batch does not say.

    Attributes
    ----------
    fidelity_names, fidelity_species : list
        Name, and elements, of each fidelity.
    default_fidelity : int
        As above; may be set.
    species : list of int
        Elements that at least one fidelity knows.
    cutoff, cutoff_lr : float
        Largest of those of the fidelities, Å.
    compute_stress, compute_hessian, check_spin, dense_limit
        As in `DeployableModel`, for all fidelities; may be set.
    shared_backbone : bool
        The fidelities differ in their readouts alone, so that `all_fidelities` evaluates the network once.
    """

    def __init__(self, models: Sequence[DeployableModel], names: Sequence[str], default_fidelity: int = 0) -> None:
        super().__init__()
        if not models or len(models) != len(names) or not 0 <= default_fidelity < len(models):
            raise ValueError(
                f"{len(models)} models need as many names ({len(names)} given) and a default among them, "
                f"found {default_fidelity}"
            )
        share_equal_tensors(models)
        self.shared_backbone = share_backbone(models)
        self.models = nn.ModuleList(models)
        self.fidelity_names = list(names)
        self.fidelity_species = [list(model.species) for model in models]
        self.default_fidelity = int(default_fidelity)
        self.species = sorted({z for model in models for z in model.species})
        self.cutoff = max(model.cutoff for model in models)
        self.cutoff_lr = max(model.cutoff_lr for model in models)
        self.cutoff_lr_periodic = max(model.cutoff_lr_periodic for model in models)
        self.compute_stress, self.compute_hessian = models[0].compute_stress, models[0].compute_hessian
        self.check_spin, self.dense_limit = models[0].check_spin, models[0].dense_limit
        self.layout_keys = list(nbops.LAYOUT_KEYS)
        self.atom_keys = [name for name, key in nbops.BATCH_KEYS.items() if key.kind in ("atom", "pair")]

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results of each molecule in its fidelity.

        Parameters
        ----------
        data : dict
            As for `DeployableModel`, and ``fidelity``: index of the fidelity, one for all molecules or one for each
            (B,), int; without it, all are evaluated in ``default_fidelity``. Left as it is.

        Returns
        -------
        dict
            As of `DeployableModel`. Of molecules in several fidelities, ``stress`` is (B, 3, 3).

        Raises
        ------
        ValueError
            As `DeployableModel`; a fidelity that there is not.
        """
        inputs = without_fidelity(data)
        present = [self.default_fidelity]
        if "fidelity" in data:
            # Which parts are to run can only be decided here: one wait for the device.
            present = self.fidelities_of(data["fidelity"], inputs)
        for f in present:
            if f < 0 or f >= len(self.fidelity_names):
                raise ValueError(f"fidelity {f} is unknown: {self.known()}")
        if len(present) == 1:
            return self.evaluate(inputs, present[0])
        nbops.check_values(inputs)
        return self.evaluate_mixed(inputs, data["fidelity"].reshape(-1).to(inputs["coord"].device), present)

    @torch.jit.export
    def all_fidelities(self, data: dict[str, Tensor], forces: bool = False) -> dict[str, Tensor]:
        """Energies of each molecule in all F fidelities, and on request the forces.

        Where the fidelities differ in their readouts alone (``shared_backbone``), the network is evaluated once for all
        of them; the forces of large molecules and crystals, and results with a graph, are computed fidelity by
        fidelity all the same. A fidelity that lacks an element of a molecule gives NaN for it.

        Parameters
        ----------
        data : dict
            As for `DeployableModel`; the key ``fidelity`` does not matter. Left as it is.
        forces : bool
            Compute the forces, too.

        Returns
        -------
        dict
            ``energy`` (F, B) float64, eV, total; ``known`` (F, B) bool, whether a fidelity knows all elements of a
            molecule; ``forces`` (F, B, N, 3) or (F, A, 3), eV/Å. Detached unless ``coord`` (or ``cell``) requires grad
            and grad mode is on.

        Raises
        ------
        ValueError
            As `DeployableModel`; an element that no fidelity knows.
        """
        inputs = without_fidelity(data)
        known = self.known_molecules(inputs)
        n_mol = known.shape[1]
        keep_graph = torch.is_grad_enabled() and (
            inputs["coord"].requires_grad or ("cell" in inputs and inputs["cell"].requires_grad)
        )
        # One wait for the device.
        n_known: list[int] = known.sum(dim=1).tolist()
        complete: list[int] = []
        for f in range(len(n_known)):
            if n_known[f] == n_mol:
                complete.append(f)
        apart = keep_graph or inputs["numbers"].numel() == 0
        if forces and not apart:
            apart = nbops.is_flat(nbops.internal_layout(inputs, self.dense_limit))
        energies: dict[int, Tensor] = {}
        all_forces: dict[int, Tensor] = {}
        if not apart:
            energies, all_forces = self.evaluate_together(inputs, complete, forces)
        for f in range(len(n_known)):
            if f not in energies:
                energy, force = self.evaluate_known(inputs, f, known[f], n_known[f])
                energies[f] = energy
                all_forces[f] = force
        results = {"energy": torch.stack([energies[f] for f in range(len(n_known))]), "known": known}
        if forces:
            results["forces"] = torch.stack([all_forces[f] for f in range(len(n_known))])
        return results

    def evaluate_together(
        self, data: dict[str, Tensor], fidelities: list[int], forces: bool
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Energies of a batch in fidelities that know all its elements, and the forces if they are wanted."""
        energies: dict[int, Tensor] = {}
        all_forces: dict[int, Tensor] = {}
        for f in fidelities:
            model: FidelityModel = self.models[f]  # type: ignore[assignment]
            model.set_options(False, False, self.check_spin, self.dense_limit)
            model.check_input(data)
        inputs = data.copy()
        inputs["coord"] = nbops.leaf(data["coord"])
        grad_mode = torch.is_grad_enabled()
        # From here to the switch back nothing may raise: grad mode would stay as it is for the caller.
        torch.set_grad_enabled(forces)
        batch: dict[str, Tensor] = {}
        for f in fidelities:
            part: FidelityModel = self.models[f]  # type: ignore[assignment]
            if len(batch) == 0 or not self.shared_backbone:
                batch = part.encoded(inputs)
            energy = part.energy_of(batch, forces)
            if forces:
                (gradient,) = torch.autograd.grad([energy.sum()], [inputs["coord"]], retain_graph=self.shared_backbone)
                assert gradient is not None
                all_forces[f] = -gradient
            energies[f] = energy.detach()
        torch.set_grad_enabled(grad_mode)
        for f in fidelities:
            finite = energies[f].isfinite().all()
            if forces:
                finite = finite & all_forces[f].isfinite().all()
            if not bool(finite.item()):
                self.evaluate(data, f, False)  # which says why
        return energies, all_forces

    def evaluate_known(
        self, data: dict[str, Tensor], fidelity: int, known: Tensor, n_known: int
    ) -> tuple[Tensor, Tensor]:
        """Energies (B,) and forces of a batch in one fidelity; NaN but for the molecules that it knows, (B,) bool."""
        if n_known == known.shape[0]:
            whole = self.evaluate(data, fidelity, False)
            return whole["energy"], whole["forces"]
        energy = torch.full([known.shape[0]], float("nan"), dtype=torch.float64, device=known.device)
        forces = torch.full_like(data["coord"], float("nan"))
        if n_known == 0:
            return energy, forces
        chosen = torch.full([known.shape[0]], -1, dtype=torch.long, device=known.device)
        out = self.evaluate_mixed(data, chosen.masked_fill(known, fidelity), [fidelity], False)
        atoms = known
        if nbops.is_flat(data) and "mol_idx" in data:
            atoms = known[data["mol_idx"].long()]
        elif nbops.is_flat(data):
            atoms = known.expand([data["coord"].shape[0]])
        atoms = atoms.view([-1] + [1] * (data["coord"].dim() - 1))
        return torch.where(known, out["energy"], energy), torch.where(atoms, out["forces"], forces)

    def known_molecules(self, data: dict[str, Tensor]) -> Tensor:
        """Whether each fidelity knows all elements of each molecule, (F, B) bool.

        Raises
        ------
        ValueError
            A batch that is not one, or an element that no fidelity knows.
        """
        nbops.check_batch(data)
        nbops.check_values(data)
        numbers, n_mol = data["numbers"].long(), nbops.count_molecules(data)
        known: list[Tensor] = []
        for model in self.models:
            allowed: Tensor = model.allowed  # type: ignore[assignment]
            last = allowed.shape[0] - 1
            known.append(allowed[numbers.clamp(0, last)] & (numbers >= 0) & (numbers <= last))
        atoms = torch.stack(known)
        by_any = atoms.any(dim=0)
        if not bool(by_any.all().item()):
            unknown: list[int] = torch.unique(numbers[~by_any]).tolist()
            first: FidelityModel = self.models[0]  # type: ignore[assignment]
            verb = "is" if len(unknown) == 1 else "are"
            raise ValueError(
                f"{first.element_names(unknown)} {verb} not among the elements of any fidelity: "
                f"{first.element_names(self.species)}"
            )
        if not nbops.is_flat(data):
            return atoms.all(dim=2)
        unknown_atoms = torch.zeros([atoms.shape[0], n_mol], dtype=torch.long, device=numbers.device)
        mol_idx = data["mol_idx"].long() if "mol_idx" in data else torch.zeros_like(numbers)
        return unknown_atoms.index_add(1, mol_idx, (~atoms).long()) == 0

    def fidelities_of(self, fidelity: Tensor, data: dict[str, Tensor]) -> list[int]:
        """Return which fidelities are asked for; raise a ValueError if it cannot be told of which molecules."""
        nbops.check_batch(data)
        n_mol = nbops.count_molecules(data)
        if fidelity.is_floating_point():
            raise ValueError(f"fidelity must hold whole numbers: {self.known()}")
        if fidelity.numel() not in [1, n_mol]:
            raise ValueError(f"fidelity has {fidelity.numel()} entries for {n_mol} molecules: one, or one for each")
        present: list[int] = torch.unique(fidelity.long()).tolist()
        return present if n_mol > 0 else [self.default_fidelity]

    @torch.jit.export
    def set_coulomb_method(
        self, method: str, cutoff: float = 0.0, dsf_alpha: float = 0.2, ewald_accuracy: float = 1e-8
    ) -> None:
        """Choose how the Coulomb energy is summed, in all fidelities that have one; as in `DeployableModel`.

        Raises
        ------
        ValueError
            No fidelity has a Coulomb energy, or as in `DeployableModel`.
        """
        found = False
        for model in self.models:
            if model.coulomb_method != "none":
                model.set_coulomb_method(method, cutoff, dsf_alpha, ewald_accuracy)  # type: ignore[operator]
                found = True
        if not found:
            raise ValueError("this model has no Coulomb energy beyond the network")
        self.update_ranges()

    @torch.jit.export
    def set_dispersion_cutoff(self, cutoff: float, smoothing_fraction: float = 0.2) -> None:
        """Set the range of the D3 pairs, in all fidelities that have D3; as in `DeployableModel`.

        Raises
        ------
        ValueError
            No fidelity has D3, or as in `DeployableModel`.
        """
        found = False
        for model in self.models:
            if model.has_d3:
                model.set_dispersion_cutoff(cutoff, smoothing_fraction)  # type: ignore[operator]
                found = True
        if not found:
            raise ValueError("this model has no D3 dispersion, whose range could be set")
        self.update_ranges()

    def update_ranges(self) -> None:
        """Take the largest long-range cutoffs of the fidelities."""
        molecules: list[float] = []
        crystals: list[float] = []
        for model in self.models:
            molecules.append(model.cutoff_lr)  # type: ignore[arg-type]
            crystals.append(model.cutoff_lr_periodic)  # type: ignore[arg-type]
        self.cutoff_lr = max(molecules)
        self.cutoff_lr_periodic = max(crystals)

    def known(self) -> str:
        """``the model has the fidelities 0 (dft), 1 (xtb)``."""
        names: list[str] = []
        for f, name in enumerate(self.fidelity_names):
            names.append(f"{f} ({name})")
        return "the model has the fidelities " + ", ".join(names)

    def evaluate(self, data: dict[str, Tensor], fidelity: int, optional: bool = True) -> dict[str, Tensor]:
        """Results of a batch in one fidelity; ``optional``: with stress and Hessian, if they are wanted."""
        model: FidelityModel = self.models[fidelity]  # type: ignore[assignment]
        # What was set for all holds for the part.
        stress, hessian = self.compute_stress and optional, self.compute_hessian and optional
        model.set_options(stress, hessian, self.check_spin, self.dense_limit)
        return model.forward(data)

    def evaluate_mixed(
        self, data: dict[str, Tensor], fidelity: Tensor, present: list[int], optional: bool = True
    ) -> dict[str, Tensor]:
        """Results of a batch of molecules in several fidelities (B,): one part of the batch after the other."""
        flat = nbops.is_flat(data)
        if flat and self.compute_hessian and optional:
            raise ValueError("Hessians in several fidelities at once need a dense batch (B, N, 3)")
        n_mol, n_atoms = fidelity.shape[0], data["numbers"].shape[0]
        whole: dict[str, Tensor] = {}
        for f in present:
            molecules = torch.nonzero(fidelity == f).squeeze(1)
            atoms = molecules
            if flat:
                atoms = self.atoms_of(data, fidelity == f)
            out = self.evaluate(self.part(data, molecules, atoms), f, optional)
            for key, value in out.items():
                if key in self.layout_keys:
                    continue
                n_rows, places = n_mol, molecules
                if flat and key in self.atom_keys:
                    n_rows, places = n_atoms, atoms
                if key not in whole:
                    shape = [n_rows] + list(value.shape[1:])
                    whole[key] = torch.zeros(shape, dtype=value.dtype, device=value.device)
                whole[key] = whole[key].index_copy(0, places, value)
        if torch.jit.is_scripting():
            for key in self.layout_keys:
                if key in data:
                    whole[key] = data[key]
        return whole

    def atoms_of(self, data: dict[str, Tensor], chosen: Tensor) -> Tensor:
        """Atoms of chosen molecules (B,) bool of a flat batch; with neighbour matrices, the padding atom at the end."""
        kept = chosen[data["mol_idx"].long()]
        if "nbmat" in data:
            kept = torch.cat([kept[:-1], torch.ones_like(kept[-1:])])
        return torch.nonzero(kept).squeeze(1)

    def part(self, data: dict[str, Tensor], molecules: Tensor, atoms: Tensor) -> dict[str, Tensor]:
        """Batch of some molecules, of which in flat layout ``atoms`` are the atoms."""
        flat = nbops.is_flat(data)
        n_mol = nbops.count_molecules(data)
        part: dict[str, Tensor] = {}
        for key, value in data.items():
            if key in ["charge", "mult"]:
                part[key] = value.reshape(-1).index_select(0, molecules)
            elif key == "cell":
                part[key] = value.expand(n_mol, 3, 3).index_select(0, molecules)
            elif key in self.atom_keys:
                part[key] = value.index_select(0, atoms)
        if not flat:
            return part
        if "charge" not in part:  # the only thing that tells how many molecules there are, should some have no atoms
            part["charge"] = torch.zeros([molecules.shape[0]], dtype=data["coord"].dtype, device=atoms.device)
        number = torch.zeros([n_mol], dtype=torch.long, device=atoms.device)
        number = number.index_copy(0, molecules, torch.arange(molecules.shape[0], device=atoms.device))
        part["mol_idx"] = number[part["mol_idx"].long()]
        if "nbmat" in part:
            last = atoms.shape[0] - 1
            # The padding atom belongs to whichever molecule comes last.
            part["mol_idx"] = torch.cat([part["mol_idx"][:-1], torch.full_like(atoms[-1:], molecules.shape[0] - 1)])
            row = torch.full([data["numbers"].shape[0]], last, dtype=torch.long, device=atoms.device)
            row = row.index_copy(0, atoms, torch.arange(atoms.shape[0], device=atoms.device))
            for key in ["nbmat", "nbmat_lr"]:
                if key in part:
                    part[key] = row[part[key].long()]
        return part
