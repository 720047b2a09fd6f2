"""From any model file to a function: `load_potential`. What the file leaves to others is added here.

The energies of a potential are complete: network, self-atomic energies, Coulomb energy, dispersion.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from aimnet2mult.constants import FIDELITY_OFFSET
from aimnet2mult.dispersion import DFTD3
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.artifact import is_artifact
from aimnet2mult.models.base import (
    CheckpointError,
    checkpoint_content,
    describe_checkpoint,
    layout_of_weights,
    names_in_checkpoint,
    read_artifact,
    single_fidelity_model,
)
from aimnet2mult.models.checkpoint_entries import subtracted_d3
from aimnet2mult.models.interchange import checkpoint_of_artifact
from aimnet2mult.models.jit_wrapper import DeployableModel
from aimnet2mult.models.legacy import (
    LegacyNetwork,
    compiled_metadata,
    is_compiled_model,
    legacy_metadata,
    open_torchscript,
)
from aimnet2mult.models.potential import D3_CUTOFF, D3_SMOOTHING, Potential
from aimnet2mult.models.safe_file import is_torchscript, load_tensors
from aimnet2mult.modules import SelfAtomicEnergies
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.utils.devices import chosen_device


def load_potential(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    fidelity: int | str | None = None,
    nb_threshold: int | None = None,
    trusted: Collection[str] = (),
) -> Potential:
    """Load a model file of any format as a function from batches to total energies, forces and charges.

    Format-2 artifacts get the full Coulomb energy (method ``simple``; crystals need `Potential.set_lrcoulomb_method`)
    and, where they need it, D3(BJ) within 15 Å, switched off over the last fifth, as in the published package.
    Checkpoints get their self-atomic energies and the dispersion that was subtracted from their labels. Compiled and
    legacy TorchScript files are complete as they are.

    Parameters
    ----------
    path : str or Path
        The file; its content decides, not its name. TorchScript files are programs: load only what you trust.
    device : str or torch.device
        Where the model goes.
    fidelity : int or str, optional
        Number or name of the fidelity of a checkpoint; may be left out if there is one.
    nb_threshold : int, optional
        Largest number of atoms that is evaluated in dense layout; default 120, and 0 for legacy TorchScript files,
        which have no second derivatives there.
    trusted : collection of str
        As in `aimnet2mult.models.base.load_model`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `aimnet2mult.models.base.load_model`; a checkpoint without configuration or self-atomic energies, or of
        several fidelities of which none was chosen.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    place = chosen_device(device)
    if is_torchscript(path):
        potential = _of_torchscript(path, place)
        if fidelity is not None:
            raise ValueError(
                f"fidelity {fidelity}: {path} is TorchScript, leave it out; batches of a combined file choose"
            )
    else:
        potential = _of_weights(path, fidelity, trusted)
        potential.module.to(place).eval().requires_grad_(False)
    if nb_threshold is not None:
        potential.nb_threshold = nb_threshold
    return potential


def _of_torchscript(path: Path, device: torch.device) -> Potential:
    module, about = open_torchscript(path, device)
    if is_compiled_model(module, about):
        return Potential(module, about, compiled_metadata(module, about))
    description = legacy_metadata(module, path)
    return Potential(deployable_legacy(module, path).to(device), description, description)


def deployable_legacy(module: Any, path: str | Path) -> DeployableModel:
    """Put a legacy program in the place of a network; forces and further derivatives come from outside."""
    network = LegacyNetwork(module, path)
    # It offers what a deployable model asks of a network.
    model = DeployableModel(cast(AIMNet2, network), network.species, "this model").eval()
    model.dense_limit = 0  # its second derivatives are NaN in dense layout
    return model


def _of_weights(path: Path, fidelity: int | str | None, trusted: Collection[str]) -> Potential:
    content = load_tensors(path)
    if not is_artifact(content):
        checkpoint = checkpoint_content(content, path)
        level = chosen_fidelity(checkpoint, fidelity, path)
        model = deployable_model(checkpoint, level, path)
        description = describe_checkpoint(checkpoint, model.model, [level])
        return Potential(model, description, description)
    if fidelity not in (None, 0):
        raise ValueError(f"fidelity {fidelity}: {path} has no fidelities to choose from; leave it out")
    artifact, _ = read_artifact(content, path, trusted)
    checkpoint = checkpoint_of_artifact(artifact)
    model = deployable_model(
        checkpoint, 0, path, trusted=trusted, d3_range=(D3_CUTOFF, D3_SMOOTHING), label="this model"
    )
    return Potential(model, artifact.metadata, artifact.metadata)


def chosen_fidelity(checkpoint: Mapping[str, Any], asked: int | str | None, path: Path) -> int:
    """Number of the fidelity of a checkpoint that a number or name stands for; may be left out if there is one.

    Raises
    ------
    ValueError
        There is no such fidelity, or several to choose from; names ``path``.
    """
    count = layout_of_weights(checkpoint["model"], checkpoint, FIDELITY_OFFSET).num_fidelities
    names = names_in_checkpoint(checkpoint, count)
    if asked is None and count == 1:
        return 0
    for level, name in names.items():
        if asked in (level, name):
            return level
    known = ", ".join(f"{level} ({name})" for level, name in names.items())
    what = "choose one of its fidelities" if asked is None else f"there is no fidelity {asked}"
    raise ValueError(f"{path}: {what}: {known}")


def deployable_model(
    checkpoint: Mapping[str, Any],
    fidelity: int,
    path: str | Path,
    *,
    trusted: Collection[str] = (),
    d3_range: tuple[float, float] | None = None,
    label: str | None = None,
) -> DeployableModel:
    """Put one fidelity of a checkpoint together: network, self-atomic energies, dispersion taken off its labels.

    Parameters
    ----------
    checkpoint : mapping
        As `aimnet2mult.models.base.load_checkpoint` returns it.
    fidelity : int
        Its number.
    path : str or Path
        For messages.
    trusted : collection of str
        As in `aimnet2mult.models.base.build_model`.
    d3_range : tuple of float, optional
        Range of D3 pairs, Å, and the fraction of it for switching them off; default: 60 Bohr without a switch.
    label : str, optional
        What to call the model in messages.

    Raises
    ------
    CheckpointError
        Something that is needed is not in the checkpoint.
    """
    config, table = checkpoint.get("model_config"), (checkpoint.get("sae") or {}).get(fidelity)
    absent = [what for value, what in ((config, "configuration"), (table, "self-atomic energies")) if not value]
    if absent or config is None or table is None:
        raise CheckpointError(
            f"{path}: holds weights but no {' and no '.join(absent)} of fidelity {fidelity}. Compile it "
            "(tools.compile_jit, with --model and --sae) and use the .jpt"
        )
    sae = ReferenceEnergies.from_table(table)
    layout = layout_of_weights(checkpoint["model"], checkpoint, FIDELITY_OFFSET)
    species = sorted((checkpoint.get("species") or {}).get(fidelity) or sae)
    network = single_fidelity_model(checkpoint, config, fidelity, layout.num_fidelities, layout.offset, trusted)
    network.add_output("self_atomic_energies", SelfAtomicEnergies(sae.restricted(species)))
    parameters = subtracted_d3(checkpoint, fidelity)
    if parameters is not None:
        d3 = DFTD3(**parameters)
        if d3_range is not None:
            d3.set_cutoff(*d3_range)
        network.add_output("dftd3", d3)
    if label is None:
        name = (checkpoint.get("fidelity_names") or {}).get(fidelity)
        label = f"fidelity {fidelity}" + (f" ({name})" if name else "")
    return DeployableModel(network, species, label)
