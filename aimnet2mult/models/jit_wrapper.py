"""The deployable model: one fidelity, energies complete, forces inside, in one TorchScript file.

`DeployableModel` is what is compiled (by `aimnet2mult.tools.compile_jit`); it needs nothing but PyTorch to run.
`load_jit_model` reads the file back for Python and adds second derivatives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.constants import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.compiled_file import METADATA_FILE, parse_metadata, torchscript_deprecation_ignored


class DeployableModel(nn.Module):
    """A network with all its energy terms, as a function of what a user has: positions and atomic numbers.

    Parameters
    ----------
    model : AIMNet2
        One fidelity; self-atomic energies and dispersion are among its readouts.
    species : sequence of int
        Elements that it may be used for; others are refused.
    label : str
        What to call the model in messages, for instance ``fidelity 1``.

    Attributes
    ----------
    cutoff, cutoff_lr : float
        Range of the network and of the long-range terms, Å; a caller's own neighbour matrices must reach so far.
    species : list of int
        As above.
    """

    allowed: Tensor

    def __init__(self, model: AIMNet2, species: Sequence[int], label: str = "this model") -> None:
        super().__init__()
        self.model = model
        self.cutoff = model.cutoff
        self.cutoff_lr = model.cutoff_lr
        self.cutoff_lr_periodic = model.cutoff_lr_periodic
        self.species = [int(z) for z in sorted(species)]
        self.label = label
        self.symbols = list(ELEMENT_SYMBOLS)
        self.input_keys = list(nbops.INPUT_KEYS)
        self.result_keys = [key for key in nbops.RESULT_KEYS if key != "forces"]
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
            ``energy`` (B,) float64, eV, total; ``forces``, eV/Å; ``charges`` (``spin_charges``), e. Results are
            detached unless ``coord`` requires grad and grad mode is on; then the graph is kept.

        Raises
        ------
        ValueError
            Shapes that do not fit, elements that the model was not trained on, coordinates that are not finite, a
            cell with a model whose Coulomb method has infinite range (from TorchScript: ``torch.jit.Error``).
        """
        self.check_input(data)
        inputs: dict[str, Tensor] = {}
        for key in self.input_keys:
            if key in data:
                inputs[key] = data[key]
        coord = data["coord"]
        grad_mode = torch.is_grad_enabled()
        keep_graph = grad_mode and coord.requires_grad
        if not keep_graph:
            coord = coord.detach().clone()
            if coord.is_inference():
                raise ValueError("forces cannot be computed under torch.inference_mode(): use torch.no_grad()")
            coord.requires_grad_(True)
        inputs["coord"] = coord

        # From here to the switch back nothing may raise: grad mode would stay on for the caller.
        torch.set_grad_enabled(True)
        out = self.model(inputs)
        gradient = torch.autograd.grad([out["energy"].sum()], [coord], create_graph=keep_graph)[0]
        torch.set_grad_enabled(grad_mode)
        assert gradient is not None

        results: dict[str, Tensor] = {"forces": -gradient}
        for key in self.result_keys:
            if key in out:
                results[key] = out[key] if keep_graph else out[key].detach()
        return results

    def check_input(self, data: dict[str, Tensor]) -> None:
        """Raise a ValueError if the model cannot or must not be evaluated for this batch."""
        nbops.check_batch(data)
        nbops.check_values(data)
        if "cell" in data and self.cutoff_lr_periodic == float("inf"):
            raise ValueError(
                "this model sums Coulomb pairs without a cutoff (method simple) and cannot be used with a cell; "
                "train or compile it with the Coulomb method dsf or ewald"
            )
        numbers = data["numbers"].long()
        n_known = self.allowed.shape[0]
        known = (numbers >= 0) & (numbers < n_known)
        known = known & self.allowed[numbers.clamp(0, n_known - 1)]
        # One wait for the device, for both questions.
        if not bool((known.all() & torch.isfinite(data["coord"]).all()).item()):
            if bool(known.all().item()):
                raise ValueError("coord holds NaN or infinite values")
            unknown: list[int] = torch.unique(numbers[~known]).tolist()
            verb = "is" if len(unknown) == 1 else "are"
            raise ValueError(
                f"{self.element_names(unknown)} {verb} not among the elements of {self.label}: "
                f"{self.element_names(self.species)}"
            )

    def element_names(self, numbers: list[int]) -> str:
        """``[1, 35]`` -> ``"H (1), Br (35)"``."""
        names: list[str] = []
        for z in numbers:
            names.append(f"{self.symbols[z]} ({z})" if z > 0 and z < len(self.symbols) else f"Z={z}")
        return ", ".join(names)


def load_jit_model(path: str | Path, device: str | torch.device = "cpu") -> "JitModel":
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
        No such file; not a TorchScript file, or one of a later version of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    extra = {METADATA_FILE: ""}
    try:
        with torchscript_deprecation_ignored():
            module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a compiled model (.jpt of tools.compile_jit): {reason}") from error
    return JitModel(module, parse_metadata(extra[METADATA_FILE], path))


class JitModel:
    """A compiled model in Python: call it with a batch, ask it for Hessians.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The compiled model.
    metadata : dict
        What the file says about itself.
    """

    def __init__(self, module: Any, metadata: dict[str, Any]) -> None:
        self.module = module
        self.metadata = metadata
        self.cutoff = float(module.cutoff)
        self.cutoff_lr = float(getattr(module, "cutoff_lr", self.cutoff))
        self.species: list[int] = list(getattr(module, "species", []))

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate a batch, as `DeployableModel.forward`; its errors come as a ValueError of one line."""
        # The optimising executor costs half a second in the first calls of a process and gains nothing later.
        with torch.jit.optimized_execution(False):
            try:
                return self.module(data)
            except torch.jit.Error as error:
                message = str(error).strip().split("\n")[-1]
                if "ValueError: " not in message:
                    raise
                raise ValueError(message.partition("ValueError: ")[2]) from error

    def hessian(self, data: dict[str, Tensor], method: str = "autograd", step: float = 5e-3) -> Tensor:
        """Second derivatives of the energy.

        Parameters
        ----------
        data : dict
            A dense batch (B, N, 3), or one molecule (N, 3); not periodic.
        method : str
            ``autograd``, or ``finite_difference``: central differences of the forces.
        step : float
            Displacement of the finite differences, Å.

        Returns
        -------
        Tensor
            (B, N, 3, N, 3) or (N, 3, N, 3), eV/Å², symmetrised.

        Raises
        ------
        ValueError
            Unknown method; a flat batch of several molecules.
        """
        nbops.check_batch(data)
        if "nbmat" in data or "cell" in data:
            raise ValueError("hessian takes molecules without a cell and without neighbour matrices")
        if data["coord"].dim() == 2:
            if "mol_idx" in data and data["mol_idx"].unique().numel() > 1:
                raise ValueError("hessian needs a dense batch (B, N, 3), or one molecule (N, 3)")
            single = {key: data[key].unsqueeze(0) for key in ("coord", "numbers")}
            for key in ("charge", "mult"):
                if key in data:
                    single[key] = data[key].reshape(1)
            return self.hessian(single, method, step)[0]
        if method == "autograd":
            hessian = self._hessian_autograd(data)
        elif method == "finite_difference":
            hessian = self._hessian_differences(data, step)
        else:
            raise ValueError(f"hessian method {method!r} is not one of autograd, finite_difference")
        return 0.5 * (hessian + hessian.permute(0, 3, 4, 1, 2))

    def _hessian_autograd(self, data: dict[str, Tensor]) -> Tensor:
        n_mol, n_atoms = data["numbers"].shape
        with torch.inference_mode(False), torch.enable_grad():
            coord = data["coord"].detach().clone().requires_grad_(True)
            forces = self({**data, "coord": coord})["forces"]
            rows = [
                torch.autograd.grad(-forces[:, i, k].sum(), coord, retain_graph=True)[0]
                for i in range(n_atoms)
                for k in range(3)
            ]
        return torch.stack(rows, dim=1).view(n_mol, n_atoms, 3, n_atoms, 3)

    def _hessian_differences(self, data: dict[str, Tensor], step: float) -> Tensor:
        n_mol, n_atoms = data["numbers"].shape
        rows = []
        for i in range(n_atoms):
            for k in range(3):
                forces = []
                for sign in (1.0, -1.0):
                    coord = data["coord"].detach().clone()
                    coord[:, i, k] += sign * step
                    forces.append(self({**data, "coord": coord})["forces"])
                rows.append((forces[1] - forces[0]) / (2.0 * step))
        return torch.stack(rows, dim=1).view(n_mol, n_atoms, 3, n_atoms, 3)
