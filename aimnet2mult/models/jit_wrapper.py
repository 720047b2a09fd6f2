"""The deployable model: one fidelity, energies complete, forces inside, in one TorchScript file.

`DeployableModel` is what is compiled (by `aimnet2mult.tools.compile_jit`); it needs nothing but PyTorch to run.
`load_jit_model` reads the file back for Python.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.constants import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER
from aimnet2mult.interfaces import Pairs, PairSource
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.legacy import compiled_metadata, is_compiled_model, open_torchscript
from aimnet2mult.models.potential import Potential
from aimnet2mult.utils.devices import chosen_device

DENSE_LIMIT = 120
"""Molecules of up to so many atoms are evaluated in dense layout, larger ones with a list of neighbours; where the two
take the same time on a CPU (``benchmarks/compiled.py``)."""


class DeployableModel(nn.Module):
    """A network with all its energy terms, as a function of what a user has: positions and atomic numbers.

    Batches of small molecules are evaluated in dense layout. Large molecules and crystals get a list of neighbours, in
    time and memory linear in the number of atoms; pairs of long-range terms are taken block by block.

    Parameters
    ----------
    model : AIMNet2
        One fidelity; self-atomic energies and dispersion are among its readouts.
    species : sequence of int
        Elements that it may be used for; others are refused.
    label : str
        What to call the model in messages, for instance ``fidelity 1``.
    compute_stress, compute_hessian : bool
        Options, see below.

    Attributes
    ----------
    cutoff, cutoff_lr, cutoff_lr_periodic : float
        Range of the network, and of the long-range terms for molecules and for crystals, Å; a caller's own neighbour
        matrices must reach so far.
    species : list of int
        As above.
    compute_stress : bool
        Return ``stress`` of batches with a cell. May be set on a loaded model, as all options.
    compute_hessian : bool
        Return ``hessian`` of dense batches, or of one molecule or crystal.
    check_spin : bool
        Refuse multiplicities that are impossible for the number of electrons, if the model resolves spin. Off for data
        whose labels leave the multiplicity out.
    dense_limit : int
        Largest number of atoms of the dense layout.
    coulomb_method : str
        ``simple``, ``dsf``, ``ewald`` or, of a model without Coulomb energy, ``none``; see `set_coulomb_method`.
    """

    allowed: Tensor
    pair_source: PairSource

    def __init__(
        self,
        model: AIMNet2,
        species: Sequence[int],
        label: str = "this model",
        compute_stress: bool = False,
        compute_hessian: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.pair_source = Pairs()
        self.block_pairs = nbops.BLOCK_PAIRS
        self.cutoff = model.cutoff
        self.cutoff_lr = model.cutoff_lr
        self.cutoff_lr_periodic = model.cutoff_lr_periodic
        self.species = [int(z) for z in sorted(species)]
        self.label = label
        self.compute_stress, self.compute_hessian = compute_stress, compute_hessian
        self.check_spin = True
        self.dense_limit = DENSE_LIMIT
        self.coulomb_method = next((str(m.method) for m in model.readouts() if hasattr(m, "method")), "none")
        self.has_d3 = any(hasattr(m, "set_cutoff") for m in model.readouts())
        self.molecules_only = next((type(m).__name__ for m in model.readouts() if hasattr(m, "molecules_only")), "")
        self.spin_resolved = model.num_charge_channels == 2
        self.atom_keys = [name for name, key in nbops.BATCH_KEYS.items() if key.kind == "atom" and name != "hessian"]
        self.symbols = list(ELEMENT_SYMBOLS)
        self.input_keys = list(nbops.INPUT_KEYS)
        self.layout_keys = list(nbops.LAYOUT_KEYS)
        self.result_keys = [key for key in nbops.RESULT_KEYS if key not in ("stress", "hessian")]
        allowed = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.bool)
        allowed[[0, *self.species]] = True
        self.register_buffer("allowed", allowed)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Energy, forces and charges of a batch.

        Parameters
        ----------
        data : dict
            ``coord`` and ``numbers`` (plain atomic numbers), optional ``charge, mult, mol_idx, cell`` and
            neighbour matrices; layouts and units as in `aimnet2mult.nbops.BATCH_KEYS`. Left as it is.

        Returns
        -------
        dict
            ``energy`` (B,) float64, eV, total; ``forces``, eV/Å; ``charges`` (``spin_charges``), e; ``stress``
            (B, 3, 3), or (3, 3) of one system whose cell is so given, eV/Å³; ``hessian`` (B, N, 3, N, 3), or
            (A, 3, A, 3) of one molecule in flat layout, eV/Å². Results are detached unless ``coord`` (or ``cell``)
            requires grad and grad mode is on; then the graph is kept. Compiled, also the caller's own
            `aimnet2mult.nbops.LAYOUT_KEYS`.

        Raises
        ------
        ValueError
            Shapes that do not fit, positions in half precision, elements that the model was not trained on, coordinates
            that are not finite, atoms on top of each other, an impossible multiplicity, a singular cell, a cell with a
            model whose Coulomb method has infinite range (from TorchScript: ``torch.jit.Error``).
        """
        self.check_input(data)
        inputs: dict[str, Tensor] = {}
        for key in self.input_keys:
            if key in data:
                # Tensors made under inference mode cannot be differentiated by, their copies can.
                inputs[key] = data[key].clone() if data[key].is_inference() else data[key]
        if data["numbers"].numel() == 0:
            return self.with_layout(self.nothing(inputs), data)
        grad_mode = torch.is_grad_enabled()
        keep_graph = grad_mode and (data["coord"].requires_grad or ("cell" in data and data["cell"].requires_grad))
        batch = nbops.internal_layout(inputs, self.dense_limit)
        if nbops.is_flat(batch) and "nbmat" not in batch:
            batch = self.pair_source.neighbors(batch, self.cutoff)

        # From here to the switch back nothing may raise: grad mode would stay on for the caller.
        torch.set_grad_enabled(True)
        results = self.evaluate(batch, keep_graph, "nbmat" in data)
        torch.set_grad_enabled(grad_mode)

        if not bool((results["energy"].isfinite().all() & results["forces"].isfinite().all()).item()):
            raise ValueError(self.why_not_finite(batch))
        out: dict[str, Tensor] = {}
        for key, value in results.items():
            if key in self.atom_keys:
                value = nbops.restored(value, batch, inputs)
            elif key == "stress" and data["cell"].dim() == 2 and value.shape[0] == 1:
                value = value[0]
            elif key == "hessian" and "_restore_idx" in batch:
                places = batch["_restore_idx"]
                value = value[0][places][:, :, places]
                if not nbops.is_flat(inputs):
                    value = value.unsqueeze(0)
            out[key] = value if keep_graph else value.detach()
        return self.with_layout(out, data)

    def with_layout(self, out: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the caller's own `nbops.LAYOUT_KEYS` to results, if this is a compiled file."""
        if torch.jit.is_scripting():
            for key in self.layout_keys:
                if key in data:
                    out[key] = data[key]
        return out

    def evaluate(self, batch: dict[str, Tensor], keep_graph: bool, own_neighbors: bool) -> dict[str, Tensor]:
        """Results of an internal batch, in its layout; grad mode must be on.

        ``own_neighbors``: the caller gave neighbour matrices, which need not hold each pair in both orders.
        """
        with_stress = self.compute_stress and "cell" in batch
        flat = nbops.is_flat(batch)
        if flat and not (keep_graph or self.compute_hessian or own_neighbors) and self.model.one_length:
            out, coord_gradient, cell_gradient = self.model.first_derivatives(batch)
        else:
            by = [batch["coord"] if keep_graph and batch["coord"].requires_grad else nbops.leaf(batch["coord"])]
            batch["coord"] = by[0]
            if with_stress:
                by.append(batch["cell"] if keep_graph and batch["cell"].requires_grad else nbops.leaf(batch["cell"]))
                batch["cell"] = by[1]
            batch = self.model.encode(batch)
            if not (flat or keep_graph or self.compute_hessian):
                batch["_first_order"] = batch["charge"]
            out = self.model.readout(batch)
            found = torch.autograd.grad([out["energy"].sum()], by, create_graph=keep_graph or self.compute_hessian)
            coord_gradient, cell_gradient = found[0], found[-1]
        assert coord_gradient is not None
        results: dict[str, Tensor] = {"forces": -coord_gradient}
        for key in self.result_keys:
            if key in out and key != "forces":
                results[key] = out[key]
        if with_stress:
            assert cell_gradient is not None
            results["stress"] = nbops.stress(coord_gradient, cell_gradient, batch)
        if self.compute_hessian:
            results["hessian"] = nbops.second_derivatives(coord_gradient, batch["coord"], keep_graph)
        return results

    def nothing(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results of a batch without atoms."""
        coord = data["coord"]
        n_mol = nbops.count_molecules(data)
        out = {
            "energy": torch.zeros([n_mol], dtype=torch.float64, device=coord.device),
            "forces": torch.zeros_like(coord),
            "charges": torch.zeros_like(coord[..., 0]),
        }
        if self.spin_resolved:
            out["spin_charges"] = out["charges"]
        if self.compute_stress and "cell" in data:
            out["stress"] = coord.new_zeros(data["cell"].shape if n_mol == 1 else [n_mol, 3, 3])
        if self.compute_hessian:
            out["hessian"] = coord.new_zeros(coord.shape + coord.shape[-2:])
        return out

    @torch.jit.export
    def encoded(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make an internal batch with features and charges, which `energy_of` takes, of a batch that was checked."""
        batch = nbops.internal_layout(data, self.dense_limit)
        if nbops.is_flat(batch) and "nbmat" not in batch:
            batch = self.pair_source.neighbors(batch, self.cutoff)
        return self.model.encode(batch)

    @torch.jit.export
    def energy_of(self, batch: dict[str, Tensor], first_order: bool) -> Tensor:
        """Total energies (B,), eV, of a batch of `encoded`; ``first_order``: their gradient will be asked for."""
        batch = batch.copy()
        if first_order:
            batch["_first_order"] = batch["charge"]
        return self.model.readout(batch)["energy"]

    @torch.jit.export
    def check_input(self, data: dict[str, Tensor]) -> None:
        """Raise a ValueError if the model cannot or must not be evaluated for this batch."""
        nbops.check_batch(data)
        nbops.check_values(data)
        if "cell" in data and self.cutoff_lr_periodic == float("inf"):
            raise ValueError(
                "this model sums Coulomb pairs without a cutoff (method simple) and cannot be used with a cell; choose "
                "dsf or ewald: compile_jit --coulomb ewald, or set_coulomb_method of the loaded model; convert legacy "
                "TorchScript files first (tools.convert)"
            )
        if "cell" in data and len(self.molecules_only) > 0:
            raise ValueError(
                f"{self.molecules_only} is for molecules: leave the cell out, or compile the model with D3"
            )
        if "fidelity" in data:
            raise ValueError("this model is of one fidelity and has no choice: leave the key fidelity out")
        if self.compute_hessian and nbops.is_flat(data) and nbops.count_molecules(data) > 1:
            raise ValueError("a Hessian needs a dense batch (B, N, 3), or one molecule or crystal")
        if self.compute_hessian and "cell" in data and nbops.count_molecules(data) > 1:
            raise ValueError("the Hessian of a crystal is computed for one at a time")
        numbers = data["numbers"].long()
        n_known = self.allowed.shape[0]
        known = (numbers >= 0) & (numbers < n_known)
        known = known & self.allowed[numbers.clamp(0, n_known - 1)]
        finite = torch.isfinite(data["coord"]).all()
        # A tensor made here tells whether the caller is in inference mode.
        if finite.is_inference():
            raise ValueError("forces cannot be computed under torch.inference_mode(): use torch.no_grad()")
        for key in ["charge", "mult", "cell"]:
            if key in data:
                finite = finite & torch.isfinite(data[key]).all().to(finite.device)
        possible = nbops.possible_multiplicities(data)
        # One wait for the device, for all questions.
        checked = self.check_spin and self.spin_resolved
        if bool((known.all() & finite & (possible.all() | (not checked))).item()):
            return
        if not bool(known.all().item()):
            unknown: list[int] = torch.unique(numbers[~known]).tolist()
            verb = "is" if len(unknown) == 1 else "are"
            raise ValueError(
                f"{self.element_names(unknown)} {verb} not among the elements of {self.label}: "
                f"{self.element_names(self.species)}"
            )
        if not bool(finite.item()):
            for key in ["coord", "charge", "mult", "cell"]:
                if key in data and not bool(torch.isfinite(data[key]).all().item()):
                    raise ValueError(f"{key} holds NaN or infinite values")
        wrong = int(torch.nonzero(~possible)[0].item())
        raise ValueError(
            f"molecule {wrong}: its multiplicity (mult, 1 if left out) is impossible for its number of electrons; give "
            "mult = 2S+1 and charge, or set check_spin to False if the model was trained like this"
        )

    def why_not_finite(self, batch: dict[str, Tensor]) -> str:
        """Say which atoms of an internal batch are on top of each other, if that is why the energy is not finite."""
        numbers, real = batch["numbers"], batch["_real_idx"]
        molecule_of = torch.arange(numbers.numel(), device=real.device).div(numbers.shape[-1], rounding_mode="floor")
        if "mol_idx" in batch:
            molecule_of = batch["mol_idx"]
        pairs = self.pair_source.search(batch, 0.05, self.block_pairs)
        for k in range(pairs.n_blocks):
            block = self.pair_source.block(batch, pairs, k)
            shape = block.d_ij.shape
            found = torch.nonzero(block.mask.expand(shape).flatten())
            if found.shape[0] > 0:
                i, j = block.i.expand(shape).flatten()[found[0]], block.j.expand(shape).flatten()[found[0]]
                molecule = molecule_of[i]
                real = real[molecule_of[real] == molecule]
                places: list[int] = [int((real < i).sum().item()), int((real < j).sum().item())]
                atoms = f"atoms {min(places)} and {max(places)} (from 0)"
                return f"molecule {molecule.item()}: {atoms} are on top of each other"
        return "energy or forces are not finite, although the input is: positions or a weight out of all proportion"

    @torch.jit.export
    def set_options(self, compute_stress: bool, compute_hessian: bool, check_spin: bool, dense_limit: int) -> None:
        """Set the attributes of these names."""
        self.compute_stress, self.compute_hessian = compute_stress, compute_hessian
        self.check_spin, self.dense_limit = check_spin, dense_limit

    @torch.jit.export
    def set_coulomb_method(
        self, method: str, cutoff: float = 0.0, dsf_alpha: float = 0.2, ewald_accuracy: float = 1e-8
    ) -> None:
        """Choose how the Coulomb energy beyond the short range of the network is summed.

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
        """
        if self.coulomb_method == "none":
            raise ValueError("this model has no Coulomb energy beyond the network")
        for module in self.model.outputs.values():
            if hasattr(module, "set_method"):
                module.set_method(method, cutoff, dsf_alpha, ewald_accuracy)  # type: ignore[operator]
        self.coulomb_method = method
        self.update_ranges()

    @torch.jit.export
    def set_dispersion_cutoff(self, cutoff: float, smoothing_fraction: float = 0.2) -> None:
        """Set the range of the D3 pairs (Å), and the fraction of it over which they are switched off.

        Raises
        ------
        ValueError
            A model without D3, values that make no sense.
        """
        if not self.has_d3:
            raise ValueError("this model has no D3 dispersion, whose range could be set")
        for module in self.model.outputs.values():
            if hasattr(module, "set_cutoff"):
                module.set_cutoff(cutoff, smoothing_fraction)  # type: ignore[operator]
        self.update_ranges()

    def update_ranges(self) -> None:
        """Take the long-range cutoffs from the readouts."""
        self.cutoff_lr = 0.0
        self.cutoff_lr_periodic = 0.0
        for module in self.model.outputs.values():
            if hasattr(module, "cutoff_lr"):
                # nn.Module says that attributes are tensors or modules.
                cutoff: float = module.cutoff_lr  # type: ignore[assignment]
                cutoff_periodic: float = module.cutoff_lr_periodic  # type: ignore[assignment]
                self.cutoff_lr = max(self.cutoff_lr, cutoff)
                self.cutoff_lr_periodic = max(self.cutoff_lr_periodic, cutoff_periodic)

    @torch.jit.export
    def element_names(self, numbers: list[int]) -> str:
        """``[1, 35]`` -> ``"H (1), Br (35)"``."""
        names: list[str] = []
        for z in numbers:
            names.append(f"{self.symbols[z]} ({z})" if z > 0 and z < len(self.symbols) else f"Z={z}")
        return ", ".join(names)


def load_jit_model(path: str | Path, device: str | torch.device = "cpu") -> Potential:
    """Load a compiled model for Python.

    Parameters
    ----------
    path : str or Path
        A ``.jpt`` file. TorchScript files are programs: load only what you trust.
    device : str or torch.device
        Where to put it.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a TorchScript file, or one of a later version of this package; a device that
        cannot be used here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    module, metadata = open_torchscript(path, chosen_device(device))
    if not is_compiled_model(module, metadata):
        raise ValueError(f"{path}: TorchScript, but not a model of tools.compile_jit; try load_potential")
    return Potential(module, metadata, compiled_metadata(module, metadata))
