"""Energies of molecules in all fidelities of a model, in one call, and their differences.

`load_all_fidelities` reads a checkpoint or a combined ``.jpt`` as a function of complete energies; `evaluate_all` calls
it, or a network that is in memory. Where the fidelities share their embedding, the network is evaluated once and the
readouts of each fidelity follow.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aimnet2mult import nbops
from aimnet2mult.constants import FIDELITY_OFFSET, element_names
from aimnet2mult.models.base import checkpoint_content, describe_checkpoint, layout_of_weights, names_in_checkpoint
from aimnet2mult.models.combined import CombinedModel
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.loading import deployable_model
from aimnet2mult.models.mixed_fidelity_aimnet2 import MixedFidelityAIMNet2, has_shared_embedding
from aimnet2mult.models.potential import Potential
from aimnet2mult.models.safe_file import is_torchscript, load_tensors
from aimnet2mult.utils.devices import chosen_device

logger = logging.getLogger(__name__)


def load_all_fidelities(path: str | Path, device: str | torch.device = "cpu") -> Potential:
    """Load all fidelities of a file as one model; the key ``fidelity`` of a batch selects, `evaluate_all` asks all.

    Energies are complete: each fidelity has its self-atomic energies and the dispersion that was subtracted from its
    labels.

    Parameters
    ----------
    path : str or Path
        A checkpoint, or a file of ``compile_jit --combined``. TorchScript files are programs: load only what you trust.
    device : str or torch.device
        Where the model goes.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; a compiled model of one fidelity; a checkpoint without configuration, or without self-atomic
        energies of one of its fidelities.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if is_torchscript(path):
        compiled = load_jit_model(path, device)
        if not compiled.fidelity_names:
            raise ValueError(
                f"{path}: a model of one fidelity: use AIMNet2Calculator or load_potential, or a file of compile_jit "
                "--combined"
            )
        return compiled
    checkpoint = checkpoint_content(load_tensors(path), path)
    count = layout_of_weights(checkpoint["model"], checkpoint, FIDELITY_OFFSET).num_fidelities
    parts = [deployable_model(checkpoint, f, path) for f in range(count)]
    model = CombinedModel(parts, list(names_in_checkpoint(checkpoint, count).values()))
    description = describe_checkpoint(checkpoint, parts[0].model, range(count))
    return Potential(model.to(chosen_device(device)).eval().requires_grad_(False), description, description)


def evaluate_all(
    model: Potential | MixedFidelityAIMNet2, data: Mapping[str, Tensor], forces: bool = False
) -> dict[str, Tensor]:
    """Energies of each molecule in all F fidelities, and on request the forces.

    Parameters
    ----------
    model : Potential or MixedFidelityAIMNet2
        Of `load_all_fidelities`, whose energies are total ones. Or a network in memory, whose energies are relative to
        the self-atomic energies of each fidelity, without dispersion; of which elements it was trained on it knows
        nothing. Without shared embedding, the network takes the batch F times at once, with F times the memory.
    data : mapping
        A batch with plain atomic numbers, in dense or flat layout (`aimnet2mult.nbops.BATCH_KEYS`); for a network
        without neighbour matrices.
    forces : bool
        Compute the forces, too.

    Returns
    -------
    dict
        ``energy`` (F, B) float64, eV; ``forces`` (F, B, N, 3) or (F, A, 3), eV/Å; of a `Potential` also ``known``
        (F, B) bool: where a fidelity does not know an element of a molecule, energy and forces are NaN, and a warning
        in the log names the elements.

    Raises
    ------
    ValueError
        As `CombinedModel.all_fidelities`; neighbour matrices for a network.

    Examples
    --------
    >>> model = load_all_fidelities("model.pt")  # doctest: +SKIP
    >>> energy = evaluate_all(model, data)["energy"]  # doctest: +SKIP
    >>> energy - energy[model.fidelity_names.index("dft")]  # differences from one of them  # doctest: +SKIP
    """
    if isinstance(model, MixedFidelityAIMNet2):
        return _of_network(model, dict(data), forces)
    out = model.all_fidelities(dict(data), forces)
    if not bool(out["known"].all()):
        logger.warning("energies are NaN: %s", _unknown_elements(model, data["numbers"]))
    return out


def _unknown_elements(model: Potential, numbers: Tensor) -> str:
    """``gfn2 does not know Cl (17)``, for each fidelity that lacks elements of a batch."""
    present = set(numbers.unique().tolist()) - {0}
    lacking = {
        name: sorted(present - set(species))
        for name, species in zip(model.fidelity_names, model.module.fidelity_species, strict=True)
    }
    return ", ".join(f"{name} does not know {element_names(zs)}" for name, zs in lacking.items() if zs)


def _of_network(model: MixedFidelityAIMNet2, data: dict[str, Tensor], forces: bool) -> dict[str, Tensor]:
    if "nbmat" in data:
        raise ValueError("all fidelities of a network are for batches without neighbour matrices (nbmat)")
    fidelities = range(model.num_fidelities)
    with torch.set_grad_enabled(forces):
        if has_shared_embedding(model):
            coord = nbops.leaf(data["coord"])
            batch = model.encode(nbops.internal_batch({**data, "coord": coord}, model.cutoff))
            types = [nbops.encode_fidelity(batch["numbers"], f, model.fidelity_offset) for f in fidelities]
            energies = [model.readout({**batch, "numbers": numbers})["energy"] for numbers in types]
            energy = torch.stack(energies)
            gradients = [torch.autograd.grad(e.sum(), coord, retain_graph=True)[0] for e in energies if forces]
        else:
            stacked = _stacked(model, data)
            stacked["coord"] = nbops.leaf(stacked["coord"])
            energy = model(stacked)["energy"].view(len(fidelities), -1)
            gradients = [torch.autograd.grad(energy.sum(), stacked["coord"])[0]] if forces else []
    out = {"energy": energy.detach()}
    if forces:
        out["forces"] = -torch.cat(gradients).view(len(fidelities), *data["coord"].shape)
    return out


def _stacked(model: MixedFidelityAIMNet2, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The molecules of a batch in each fidelity, one fidelity after the other."""
    n_mol, count = nbops.count_molecules(data), model.num_fidelities
    if "cell" in data:
        data["cell"] = data["cell"].expand(n_mol, 3, 3)
    if nbops.is_flat(data):
        data.setdefault("mol_idx", torch.zeros_like(data["numbers"]))
    stacked = {key: torch.cat([data[key]] * count) for key in nbops.INPUT_KEYS if key in data}
    types = [nbops.encode_fidelity(data["numbers"], f, model.fidelity_offset) for f in range(count)]
    stacked["numbers"] = torch.cat(types)
    if nbops.is_flat(data):
        stacked["mol_idx"] = torch.cat([data["mol_idx"] + f * n_mol for f in range(count)])
    return stacked
