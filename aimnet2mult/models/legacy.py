"""Legacy TorchScript models of the AIMNet2 ecosystem (``.jpt``, format 1): evaluated as they are, or taken apart.

Such a file is a program with weights. It knows energies and charges; self-atomic energies, Coulomb and D3 energies are
inside and fixed. It says ``cutoff``, and ``cutoff_lr`` (infinite) if it has long-range terms; elements that it does not
know have NaN in the embedding. TorchScript files are code: load only what you trust.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.constants import MAX_ATOMIC_NUMBER
from aimnet2mult.dispersion import PUBLISHED_TABLES
from aimnet2mult.models.artifact import D3_KEYS, D3Parameters, ModelMetadata
from aimnet2mult.models.compiled_file import METADATA_FILE, parse_metadata, torchscript_deprecation_ignored
from aimnet2mult.models.interchange import single_checkpoint, take_out_sae
from aimnet2mult.models.safe_file import CheckpointError
from aimnet2mult.neighborlist import neighbor_matrix
from aimnet2mult.utils.text import first_line

LEGACY_VERSION = 1
"""Format version of TorchScript files in the AIMNet2 ecosystem."""

SPECIES_BUFFERS = ("impemented_species", "implemented_species")
"""Lists of elements in legacy files; the first is how the published program spells it."""


def open_torchscript(path: str | Path, device: str | torch.device = "cpu") -> tuple[Any, dict[str, Any]]:
    """Load a TorchScript file, ours or another's.

    Returns
    -------
    module : torch.jit.ScriptModule
        The program.
    metadata : dict
        What `aimnet2mult.tools.compile_jit` wrote into it; empty for files of other programs.

    Raises
    ------
    ValueError
        Not a TorchScript file, or one of a later version of this package.
    """
    extra = {METADATA_FILE: ""}
    try:
        with torchscript_deprecation_ignored():
            module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a compiled model (.jpt of tools.compile_jit): {first_line(error)}") from error
    return module, parse_metadata(extra[METADATA_FILE], path)


def is_compiled_model(module: Any, metadata: Mapping[str, Any]) -> bool:
    """Tell whether a TorchScript program is one of ours: by what its file says, or by the interface of the program."""
    return bool(metadata) or hasattr(module, "species")


class LegacyNetwork(nn.Module):
    """A legacy program in the place of `aimnet2mult.models.aimnet2.AIMNet2` in a deployable model.

    It computes in float32, whatever it is given; neighbours beyond the network are a matrix of all pairs, so memory
    grows with the square of the number of atoms.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The program.
    path : str or Path
        For messages.

    Raises
    ------
    CheckpointError
        TorchScript, but not of an AIMNet2 model.
    """

    def __init__(self, module: Any, path: str | Path = "the file") -> None:
        super().__init__()
        weights = module.state_dict()
        if not isinstance(getattr(module, "cutoff", None), float) or "afv.weight" not in weights:
            raise CheckpointError(f"{path}: TorchScript, but not an AIMNet2 model: it has no cutoff or no afv.weight")
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.module = module.eval()
        self.cutoff = float(module.cutoff)
        self.cutoff_lr = float(getattr(module, "cutoff_lr", 0.0))
        coulomb = legacy_output(module, "lrcoulomb")
        self.coulomb_method = "none" if coulomb is None else str(getattr(coulomb, "method", "simple"))
        if self.coulomb_method == "dsf":
            self.cutoff_lr = float(coulomb.dsf_rc)
        self.cutoff_lr_periodic = self.cutoff_lr
        self.num_charge_channels = int(weights["conv_q.agh"].shape[0])
        self.species = legacy_species(weights)
        # What a deployable model asks of a network of ours.
        self.one_length = False
        self.outputs = nn.ModuleDict()

    def readouts(self) -> list[nn.Module]:
        """Return no readouts: they are inside the program."""
        return []

    def encode(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``energy`` and ``charges`` (``spin_charges``) to an internal batch."""
        inputs = {key: data[key] for key in nbops.INPUT_KEYS if key in data}
        inputs["coord"] = data["coord"].float()
        if nbops.is_flat(data) and self.cutoff_lr > 0.0 and "nbmat_lr" not in data:
            coord, mol_idx = data["coord"].detach()[:-1], data["mol_idx"][:-1]
            inputs["nbmat_lr"], shifts = neighbor_matrix(coord, mol_idx, self.cutoff_lr, data.get("cell"))
            if shifts is not None:
                inputs["shifts_lr"] = shifts
        if nbops.is_flat(data) and "cell" in data:
            if len(data["cell"]) > 1:
                raise ValueError("legacy TorchScript models evaluate one crystal at a time")
            inputs["cell"] = data["cell"][0]
        # The optimising executor costs seconds and, after masking in place, fails in the second call.
        with torch.jit.optimized_execution(False):
            results = self.module(inputs)
        for key in ("energy", "charges", "spin_charges"):
            if key in results:
                data[key] = results[key].double() if key == "energy" else results[key].to(data["coord"].dtype)
        return data

    def readout(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch: everything is done in `encode`."""
        return data

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        """Pickle the program as a file in memory."""
        program = io.BytesIO()
        with torchscript_deprecation_ignored():
            torch.jit.save(self.module, program)
        return _unpickled, (program.getvalue(),)


def _unpickled(program: bytes) -> LegacyNetwork:
    with torchscript_deprecation_ignored():
        return LegacyNetwork(torch.jit.load(io.BytesIO(program)))


def legacy_output(module: Any, *names: str) -> Any:
    """Return the readout of a legacy program that has one of the names; None if there is none."""
    outputs = dict(module.named_children()).get("outputs")
    found = {} if outputs is None else dict(outputs.named_children())
    return next((found[name] for name in names if name in found), None)


def legacy_species(weights: Mapping[str, Tensor]) -> list[int]:
    """Elements that a legacy model knows: rows of its embedding without NaN, and in its list if it has one."""
    table = weights["afv.weight"]
    known = [z for z in range(1, min(len(table), MAX_ATOMIC_NUMBER + 1)) if not bool(table[z].isnan().any())]
    listed = next((set(weights[key].tolist()) for key in SPECIES_BUFFERS if key in weights), set(known))
    return [z for z in known if z in listed]


def legacy_d3_params(module: Any) -> D3Parameters | None:
    """Damping parameters of the D3(BJ) energy inside a legacy program; None without one.

    Learned dispersion (``D3TS``), which may have the same name, has no table of C6 coefficients.
    """
    d3 = legacy_output(module, "dftd3", "d3bj")
    if d3 is None or "c6ab" not in dict(d3.named_buffers()):
        return None
    return D3Parameters(**{key: float(getattr(d3, key, 1.0)) for key in D3_KEYS})  # type: ignore[typeddict-item]


def legacy_metadata(module: Any, path: str | Path = "the file") -> ModelMetadata:
    """Describe a legacy program, all of whose energies are inside."""
    network = LegacyNetwork(module, path)
    learned = legacy_output(module, "dftd3", "d3bj", "d3ts") is not None and legacy_d3_params(module) is None
    return ModelMetadata(
        format_version=LEGACY_VERSION,
        cutoff=network.cutoff,
        needs_coulomb=False,
        needs_dispersion=False,
        coulomb_mode="none" if network.coulomb_method == "none" else "full_embedded",
        coulomb_sr_rc=None,
        coulomb_sr_envelope=None,
        d3_params=legacy_d3_params(module),
        implemented_species=network.species,
        has_embedded_lr=network.cutoff_lr > 0.0,
        has_embedded_d3ts=learned,
        model_file="legacy TorchScript",
        num_charge_channels=network.num_charge_channels,
        num_fidelities=1,
        fidelity_offset=0,
        fidelity_names={},
        species={0: network.species},
        sae={},
        dispersion={},
        baked_sae=None,
        level_of_theory=None,
    )


def compiled_metadata(module: Any, about: Mapping[str, Any]) -> ModelMetadata:
    """Describe a compiled model of ours from what its file says; energies are complete."""
    parts = about.get("fidelities") or [about]
    first = int(about.get("fidelity_level", 0))
    names = about.get("fidelity_names") or ([about["fidelity_name"]] if about.get("fidelity_name") else [])
    species = {first + f: sorted(part.get("species", [])) for f, part in enumerate(parts)}
    coulomb = str(getattr(module, "coulomb_method", "none"))
    levels = [part.get("level_of_theory") for part in parts]
    channels = (about.get("model_config") or {}).get("kwargs", {}).get("num_charge_channels")
    return ModelMetadata(
        format_version=LEGACY_VERSION,
        cutoff=float(module.cutoff),
        needs_coulomb=False,
        needs_dispersion=False,
        coulomb_mode="none" if coulomb == "none" else "full_embedded",
        coulomb_sr_rc=None,
        coulomb_sr_envelope=None,
        d3_params=None,
        implemented_species=sorted(set().union(*species.values())),
        has_embedded_lr=float(getattr(module, "cutoff_lr", 0.0)) > 0.0,
        has_embedded_d3ts=False,
        model_file="compiled model",
        num_charge_channels=None if channels is None else int(channels),
        num_fidelities=len(parts),
        fidelity_offset=0,
        fidelity_names={first + f: str(name) for f, name in enumerate(names)},
        species=species,
        sae={},
        dispersion={},
        baked_sae=None,
        level_of_theory=levels[0] if len(levels) == 1 else None,
    )


def checkpoint_of_legacy(module: Any, path: str | Path) -> dict[str, Any]:
    """Return the weights of a legacy program as the checkpoint of a training with one fidelity.

    Its configuration is not in the file, and the atomic shifts become self-atomic energies.
    """
    species = LegacyNetwork(module, path).species
    skipped = (
        *SPECIES_BUFFERS,
        *(f"outputs.{name}.{table}" for name in ("dftd3", "d3bj") for table in PUBLISHED_TABLES),
    )
    weights = {key: value.detach().clone() for key, value in module.state_dict().items() if key not in skipped}
    sae, _ = take_out_sae(weights, species, None)
    checkpoint = single_checkpoint(weights, species, sae, legacy_d3_params(module))
    return {**checkpoint, "sae_with_shifts": True}
