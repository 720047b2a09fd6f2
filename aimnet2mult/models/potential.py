"""A model as a function in Python, whatever file it came from: batch in, energies and their derivatives out.

`Potential` wraps a compiled model, or one that was put together from weights (`aimnet2mult.models.loading`), and adds
second derivatives, errors of one line, and the choice of long-range methods at run time. It needs no ASE.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aimnet2mult import nbops
from aimnet2mult.models.artifact import ModelMetadata
from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored

Model = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Batch in, results out."""

ROWS_TIMES_ATOMS = 2048
"""Rows of a Hessian that are computed together, times atoms: more need more memory and gain nothing."""

D3_CUTOFF, D3_SMOOTHING = 15.0, 0.2
"""Å, and fraction of it: range of D3 energies that are added to a format-2 artifact, as in the published package."""


class Potential:
    """A model in Python: call it with a batch, ask it for second derivatives.

    Everything works under ``torch.no_grad()`` and ``torch.inference_mode()``.

    Parameters
    ----------
    module : nn.Module or torch.jit.ScriptModule
        The model; its options (`aimnet2mult.models.jit_wrapper.DeployableModel`) are attributes that may be set.
    metadata : mapping
        What a compiled file says about itself (`aimnet2mult.models.compiled_file`); `ModelMetadata` of other files.
    description : ModelMetadata, optional
        What the file says about itself, in the terms that all formats share.
    """

    def __init__(self, module: Any, metadata: Mapping[str, Any], description: ModelMetadata | None = None) -> None:
        self.module = module
        self.metadata = dict(metadata)
        self.description = ModelMetadata() if description is None else description
        self.cutoff = float(module.cutoff)
        self.species: list[int] = list(getattr(module, "species", []))

    @property
    def cutoff_lr(self) -> float:
        """Range of the long-range terms for molecules, Å."""
        return float(getattr(self.module, "cutoff_lr", self.cutoff))

    @property
    def spin_resolved(self) -> bool:
        """Whether there are spin charges, which depend on the multiplicity."""
        return self.description.get("num_charge_channels") == 2

    @property
    def nb_threshold(self) -> int:
        """Largest number of atoms that is evaluated in dense layout; larger systems get a list of neighbours."""
        return int(self.module.dense_limit)

    @nb_threshold.setter
    def nb_threshold(self, atoms: int) -> None:
        if isinstance(atoms, bool) or not isinstance(atoms, int) or atoms < 0:
            raise ValueError(f"nb_threshold must be a number of atoms, found {atoms!r}")
        if not hasattr(self.module, "dense_limit"):
            raise ValueError("this file is of an earlier version, without nb_threshold: compile the model again")
        self.module.dense_limit = atoms

    def __call__(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate a batch, as `DeployableModel.forward`; its errors come as a ValueError of one line."""
        return self._called(data)

    def all_fidelities(self, data: dict[str, Tensor], forces: bool = False) -> dict[str, Tensor]:
        """Energies, and on request forces, in all fidelities of a combined model (`CombinedModel.all_fidelities`).

        Raises
        ------
        ValueError
            As the method of the model; a file of one fidelity, or of an earlier version.
        """
        if not hasattr(self.module, "fidelity_names"):
            raise ValueError(
                "this model is of one fidelity: compile all of them into one file (compile_jit --combined)"
            )
        self._check_has("all_fidelities")
        return self._called(data, partial(self.module.all_fidelities, forces=forces))

    @property
    def fidelity_names(self) -> list[str]:
        """Names of the fidelities of a combined model; empty otherwise."""
        return list(getattr(self.module, "fidelity_names", []))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Pickle a compiled program as a file in memory, its options as they are set, for instance for processes."""
        if not isinstance(self.module, torch.jit.ScriptModule):
            return Potential, (self.module, self.metadata, self.description)
        program = io.BytesIO()
        with torchscript_deprecation_ignored():
            torch.jit.save(self.module, program)
        return _unpickled, (program.getvalue(), self.metadata, self.description)

    def _called(self, data: dict[str, Tensor], *function: Model) -> dict[str, Tensor]:
        if not torch.is_inference_mode_enabled():
            return self._run(data, *function)
        with torch.inference_mode(False), torch.no_grad():
            return self._run(data, *function)

    def _run(self, data: dict[str, Tensor], function: Model | None = None) -> dict[str, Tensor]:
        # Tensors made under inference mode cannot be differentiated by, their copies can.
        data = {key: value.clone() if value.is_inference() else value for key, value in data.items()}
        if self.description.get("supports_charged_systems") is False and bool(data.get("charge", torch.zeros(1)).any()):
            raise ValueError("this model was trained on neutral systems only: charge must be 0")
        with _errors_of_one_line():
            out = (function or self.module)(data)
        return {key: value for key, value in out.items() if key not in nbops.LAYOUT_KEYS}

    def set_coulomb_method(
        self, method: str, cutoff: float = 0.0, dsf_alpha: float = 0.2, ewald_accuracy: float = 1e-8
    ) -> None:
        """Choose how Coulomb energies are summed, see `set_coulomb_method` of the deployable model."""
        self._check_has("set_coulomb_method")
        with _errors_of_one_line():
            self.module.set_coulomb_method(method, cutoff, dsf_alpha, ewald_accuracy)

    def set_dispersion_cutoff(self, cutoff: float, smoothing_fraction: float = 0.2) -> None:
        """Set the range of D3 pairs, see `DeployableModel.set_dispersion_cutoff`."""
        self._check_has("set_dispersion_cutoff")
        with _errors_of_one_line():
            self.module.set_dispersion_cutoff(cutoff, smoothing_fraction)

    def set_lrcoulomb_method(
        self, method: str, cutoff: float = 0.0, dsf_alpha: float = 0.2, ewald_accuracy: float = 1e-8
    ) -> None:
        """Choose how Coulomb energies are summed, as calculators of the AIMNet2 ecosystem do.

        As `set_coulomb_method`, but of a TorchScript file, in which they are fixed (``full_embedded``), it changes
        nothing and warns.
        """
        if self._is_fixed("set_lrcoulomb_method", "Coulomb energy", "set_coulomb_method"):
            return
        self.set_coulomb_method(method, cutoff, dsf_alpha, ewald_accuracy)

    def set_dftd3_cutoff(self, cutoff: float = D3_CUTOFF, smoothing_fraction: float = D3_SMOOTHING) -> None:
        """Set the range of D3 pairs (Å), and the fraction of it over which they are switched off.

        As `set_dispersion_cutoff`, but of a TorchScript file it changes nothing and warns.
        """
        if self._is_fixed("set_dftd3_cutoff", "dispersion energy", "set_dispersion_cutoff"):
            return
        self.set_dispersion_cutoff(cutoff, smoothing_fraction)

    def _is_fixed(self, method: str, energy: str, own: str) -> bool:
        """Warn if an energy is part of a TorchScript file."""
        if self.description.get("format_version", 1) != 1:
            return False
        legacy = self.description.get("model_file") == "legacy TorchScript"
        remedy = "convert it (tools.convert)" if legacy else f"use {own} of the loaded file, or compile it otherwise"
        warnings.warn(
            f"{method}: the {energy} is inside this TorchScript file (full_embedded); nothing was changed. To change "
            f"it, {remedy}",
            stacklevel=3,
        )
        return True

    def _check_has(self, method: str) -> None:
        if not hasattr(self.module, method):
            raise ValueError(f"this file is of an earlier version, without {method}: compile the model again")

    def hessian(self, data: dict[str, Tensor], method: str = "autograd", step: float = 5e-3) -> Tensor:
        """Second derivatives of the energy.

        Parameters
        ----------
        data : dict
            A dense batch of molecules (B, N, 3), or one molecule or crystal in any layout. Neighbour matrices of the
            caller are not for second derivatives.
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
            Unknown method, a step that is not positive; a flat batch of several molecules, a batch of crystals.
        """
        _check_second_derivatives(data)
        if not step > 0.0:
            raise ValueError(f"step {step}: expected a positive displacement, Å")
        if data["numbers"].numel() == 0:
            shape = data["coord"].shape
            return data["coord"].new_zeros(*shape, *shape[-2:])
        if method == "autograd":
            hessian = self._hessian_autograd(data)
        elif method == "finite_difference":
            hessian = self._hessian_differences(data, step)
        else:
            raise ValueError(f"hessian method {method!r} is not one of autograd, finite_difference")
        if not bool(torch.isfinite(hessian).all()):
            raise ValueError("second derivatives are not finite; use the method finite_difference")
        axes = (3, 4, 1, 2) if hessian.dim() == 5 else (2, 3, 0, 1)
        return 0.5 * (hessian + hessian.permute(*range(hessian.dim() - 4), *axes))

    def hessian_vector_product(self, data: dict[str, Tensor], vector: Tensor) -> Tensor:
        """Product of the second derivatives of the energy with a vector, at the cost of a few evaluations.

        Parameters
        ----------
        data : dict
            A batch in any layout, without neighbour matrices of the caller's.
        vector : Tensor
            Shape of ``coord``, for instance displacements in Å.

        Returns
        -------
        Tensor
            Shape of ``coord``; eV/Å² times the unit of ``vector``.
        """
        if "nbmat" in data:
            raise ValueError("second derivatives are for batches without neighbour matrices (nbmat)")
        if vector.shape != data["coord"].shape:
            raise ValueError(f"vector has shape {list(vector.shape)}, coord {list(data['coord'].shape)}")
        if not torch.isfinite(vector).all():
            raise ValueError("vector holds NaN or infinite values")
        if data["coord"].numel() == 0:
            return torch.zeros_like(data["coord"])
        with torch.inference_mode(False), torch.enable_grad():
            coord, forces = self._forces_with_graph(data)
            (product,) = torch.autograd.grad(forces, coord, -vector.clone().to(forces))
        return product

    def _forces_with_graph(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        data = {key: value.detach().clone() for key, value in data.items()}
        coord = data["coord"].requires_grad_(True)
        with self._without_hessian():
            return coord, self._run(data)["forces"]

    @contextmanager
    def _without_hessian(self) -> Iterator[None]:
        """Switch the option ``compute_hessian`` off: with a graph, it would prepare third derivatives."""
        before = getattr(self.module, "compute_hessian", None)  # files of version 1 have no such option
        if before is None:
            yield
            return
        self.module.compute_hessian = False
        try:
            yield
        finally:
            self.module.compute_hessian = before

    def _hessian_autograd(self, data: dict[str, Tensor]) -> Tensor:
        n_atoms = data["coord"].shape[-2]
        with torch.inference_mode(False), torch.enable_grad():
            coord, forces = self._forces_with_graph(data)
            size = 3 * n_atoms
            unit = torch.eye(size, dtype=forces.dtype, device=forces.device).view(size, n_atoms, 3)
            rows = [
                torch.autograd.grad(forces, coord, -vectors, retain_graph=True, is_grads_batched=True)[0]
                for chunk in unit.split(max(1, ROWS_TIMES_ATOMS // n_atoms))
                for vectors in [chunk if coord.dim() == 2 else chunk.unsqueeze(1).expand(-1, *coord.shape)]
            ]
        # The first axis is the component that is differentiated: of all molecules of a batch at a time.
        hessian = torch.cat(rows).view(n_atoms, 3, *coord.shape)
        return hessian if coord.dim() == 2 else hessian.movedim(2, 0)

    def _hessian_differences(self, data: dict[str, Tensor], step: float) -> Tensor:
        n_atoms = data["coord"].shape[-2]
        rows = []
        for i in range(n_atoms):
            for k in range(3):
                forces = []
                for sign in (1.0, -1.0):
                    coord = data["coord"].detach().clone()
                    coord[..., i, k] += sign * step
                    with self._without_hessian():
                        forces.append(self({**data, "coord": coord})["forces"])
                rows.append((forces[1] - forces[0]) / (2.0 * step))
        hessian = torch.stack(rows, dim=-3)
        return hessian.view(*hessian.shape[:-3], n_atoms, 3, n_atoms, 3)


def _unpickled(program: bytes, metadata: dict[str, Any], description: ModelMetadata) -> Potential:
    with torchscript_deprecation_ignored():
        return Potential(torch.jit.load(io.BytesIO(program)), metadata, description)


def _check_second_derivatives(data: dict[str, Tensor]) -> None:
    nbops.check_batch(data)
    if "nbmat" in data:
        raise ValueError("second derivatives are for batches without neighbour matrices (nbmat)")
    if nbops.is_flat(data) and nbops.count_molecules(data) > 1:
        raise ValueError("hessian needs a dense batch (B, N, 3), or one molecule (N, 3)")
    if "cell" in data and nbops.count_molecules(data) > 1:
        raise ValueError("the Hessian of a crystal is computed for one at a time")


@contextmanager
def _errors_of_one_line() -> Iterator[None]:
    """Turn errors of TorchScript into those of Python, and do without its optimising executor.

    That one costs seconds in the first calls of a process (``benchmarks/first_calls.py``) and gains nothing later.
    """
    with torch.jit.optimized_execution(False):
        try:
            yield
        except torch.jit.Error as error:
            message = str(error).strip().split("\n")[-1]
            if "ValueError: " not in message:
                raise
            raise ValueError(message.partition("ValueError: ")[2]) from error
