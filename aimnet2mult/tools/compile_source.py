"""From a checkpoint to a deployable model of one fidelity, and what is to be said about it.

What the checkpoint knows about itself needs no flag, and a flag that contradicts it is an error. `prepare` gives, for
one fidelity, the model as it is to be compiled and the metadata of the file; nothing is written here.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from aimnet2mult.constants import ELEMENT_SYMBOLS, FIDELITY_OFFSET, element_names
from aimnet2mult.data.sae import load_sae, reference_difference
from aimnet2mult.dispersion import RationalDispersion
from aimnet2mult.electrostatics import LRCoulomb
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import (
    CheckpointError,
    layout_of_weights,
    load_checkpoint,
    load_model_config,
    single_fidelity_model,
    versions,
)
from aimnet2mult.models.compiled_file import FORMAT_VERSION, LICENCE_NOT_STATED
from aimnet2mult.models.golden import QUANTITIES
from aimnet2mult.models.jit_wrapper import DeployableModel
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table
from aimnet2mult.modules import SelfAtomicEnergies
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.tools.compile_options import ALL, Coulomb, Dispersion, ModelOptions, dispersion_to_embed

logger = logging.getLogger(__name__)

SAE_TOLERANCE = 1e-6
"""eV; self-atomic energies on the command line and in the checkpoint may differ by so much."""

UNITS = {key: BATCH_KEYS[key].unit for key in ("coord", "cell", "charge", *QUANTITIES)}
"""Units of inputs and outputs of a compiled model."""


# --------------------------------------------------------------------------------------------------
# the checkpoint
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint, with what was said about it.

    Attributes
    ----------
    path : Path
        The file.
    checkpoint : mapping
        Its content.
    config : mapping
        ``class`` and ``kwargs`` of the single-fidelity model.
    num_fidelities, fidelity_offset : int
        How many fidelities; distance of their element types.
    sae : mapping of int to Path
        Files of self-atomic energies, by fidelity.
    """

    path: Path
    checkpoint: Mapping[str, Any]
    config: Mapping[str, Any]
    num_fidelities: int
    fidelity_offset: int
    sae: Mapping[int, Path]

    @property
    def names(self) -> dict[int, str]:
        """Names of the fidelities that have one."""
        return self.checkpoint.get("fidelity_names") or {}

    def title(self, fidelity: int) -> str:
        """What to call a fidelity in messages: ``fidelity 1 (xtb)``."""
        name = self.names.get(fidelity)
        return f"fidelity {fidelity}" + (f" ({name})" if name else "")


def open_source(
    weights: str | Path,
    *,
    model: str | Path | None = None,
    fidelity_offset: int | None = None,
    num_fidelities: int | None = None,
    use_fidelity_readouts: bool | None = None,
    sae: str | Path | Mapping[str, str | Path] | None = None,
    fidelity_level: int | str | None = None,
) -> Source:
    """Read a checkpoint, and check what is said about it against it.

    Parameters
    ----------
    weights, model, fidelity_offset, num_fidelities, use_fidelity_readouts
        As in `aimnet2mult.tools.compile_jit.compile_model`.
    sae : path or mapping, optional
        File with the self-atomic energies of the one fidelity to compile; of several, {number or name: file}.
    fidelity_level : int or str, optional
        The fidelity to compile, or ``all``; may be left out if there is one.

    Raises
    ------
    ValueError, FileNotFoundError
        Not a checkpoint, or what is said about it contradicts it; no such file.
    """
    checkpoint = load_checkpoint(weights)
    offset = _agree("--fidelity-offset", fidelity_offset, checkpoint.get("fidelity_offset"), FIDELITY_OFFSET)
    try:
        layout = layout_of_weights(checkpoint["model"], {**checkpoint, "fidelity_offset": offset}, offset)
    except CheckpointError as error:
        raise ValueError(f"--fidelity-offset {offset}: {error}") from error
    count = _agree("--num-fidelities", num_fidelities, layout.num_fidelities, 1)
    _agree("--use-fidelity-readouts", use_fidelity_readouts, layout.heads if count > 1 else None, layout.heads)
    config = _model_config(checkpoint, model)
    source = Source(Path(weights), checkpoint, config, count, offset, {})
    return Source(Path(weights), checkpoint, config, count, offset, _sae_files(source, sae, fidelity_level))


def find_fidelity(source: Source, asked: int | str | None, flag: str = "--fidelity-level") -> int:
    """Number of the fidelity that a number or name stands for; may be left out if there is one.

    Raises
    ------
    ValueError
        There is no such fidelity, or several to choose from.
    """
    count, names = source.num_fidelities, source.names
    known = ", ".join(f"{f} ({names.get(f, 'no name')})" for f in range(count)) if names else f"0..{count - 1}"
    if asked is None:
        if count > 1:
            raise ValueError(f"{flag}: the checkpoint has {count} fidelities, choose one of {known}, or all")
        return 0
    by_name = {name: number for number, name in names.items()}
    if asked in by_name:
        return by_name[asked]
    if str(asked) not in map(str, range(count)):
        raise ValueError(f"{flag} {asked}: the checkpoint has the fidelities {known}")
    return int(asked)


def _agree(flag: str, given: Any, known: Any, default: Any) -> Any:
    """The checkpoint's value if it knows it, else the flag's, else the default; a contradiction is an error."""
    if known is None:
        return default if given is None else given
    if given is not None and given != known:
        raise ValueError(f"{flag} {given} contradicts the checkpoint, which says {known}; leave the flag out")
    return known


def differing_key(a: Any, b: Any, path: str = "") -> str | None:
    """Dotted path of the first difference between two nested configurations, None if they agree."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                return f"{path}{key}"
            found = differing_key(a[key], b[key], f"{path}{key}.")
            if found:
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            found = differing_key(left, right, f"{path}{i}.")
            if found:
                return found
        return None
    return None if a == b else path.rstrip(".")


def _model_config(checkpoint: Mapping[str, Any], path: str | Path | None) -> dict[str, Any]:
    known = checkpoint.get("model_config")
    if path is None:
        if known is None:
            raise ValueError("--model: the checkpoint does not hold its model configuration; give the YAML file")
        return known
    given = load_model_config(path)
    if known is not None:
        difference = differing_key(given, known)
        if difference:
            raise ValueError(f"--model {path}: {difference} differs from the checkpoint; leave the flag out")
    return given


def _sae_files(
    source: Source, sae: str | Path | Mapping[str, str | Path] | None, fidelity_level: int | str | None
) -> dict[int, Path]:
    """Files of self-atomic energies by fidelity."""
    if sae is None:
        return {}
    if isinstance(sae, Mapping):
        files: dict[int, Path] = {}
        for name, path in sae.items():
            fidelity = find_fidelity(source, name, "--sae")
            if fidelity in files:
                raise ValueError(f"--sae {name}={path}: a second file for {source.title(fidelity)}")
            if fidelity_level != ALL and fidelity != find_fidelity(source, fidelity_level):
                raise ValueError(f"--sae {name}={path}: {source.title(fidelity)} is not compiled; leave the file out")
            files[fidelity] = Path(path)
        return files
    if fidelity_level == ALL and source.num_fidelities > 1:
        raise ValueError(
            f"--sae {sae}: one file for {source.num_fidelities} fidelities; give one for each, as --sae NAME=FILE "
            "(NAME may be its number)"
        )
    return {0 if fidelity_level == ALL else find_fidelity(source, fidelity_level): Path(sae)}


def dispersion_by_fidelity(
    source: Source, asked: Dispersion | Mapping[str, Dispersion] | None, compiled: Sequence[int]
) -> dict[int, Dispersion]:
    """Corrections that are asked for, by the number of the fidelity.

    Parameters
    ----------
    source : Source
        The checkpoint.
    asked : Dispersion or mapping, optional
        For all fidelities, or {number or name: correction}, in which ``all`` stands for those that are not named.
    compiled : sequence of int
        The fidelities that are compiled.

    Raises
    ------
    ValueError
        A fidelity that there is not, that is not compiled, or that is named twice.
    """
    if asked is None or isinstance(asked, Dispersion):
        asked = {} if asked is None else {ALL: asked}
    chosen: dict[int, Dispersion] = {}
    for name, dispersion in asked.items():
        if name == ALL:
            continue
        fidelity = find_fidelity(source, name, "--dispersion")
        if fidelity in chosen:
            raise ValueError(f"--dispersion {name}={dispersion.method}: a second one for {source.title(fidelity)}")
        if fidelity not in compiled:
            raise ValueError(
                f"--dispersion {name}={dispersion.method}: {source.title(fidelity)} is not compiled; leave it out"
            )
        chosen[fidelity] = dispersion
    others = {fidelity: asked[ALL] for fidelity in compiled if fidelity not in chosen} if ALL in asked else {}
    return {**chosen, **others}


def self_atomic_energies(source: Source, fidelity: int) -> ReferenceEnergies:
    """Self-atomic energies of a fidelity, with their terms in charge and spin.

    Raises
    ------
    ValueError, FileNotFoundError
        None are known, or those on the command line differ from the checkpoint's; no such file.
    """
    known = ReferenceEnergies.from_table((source.checkpoint.get("sae") or {}).get(fidelity) or {})
    path = source.sae.get(fidelity)
    if path is None:
        if not known:
            raise ValueError(
                f"--sae: the checkpoint holds no self-atomic energies of {source.title(fidelity)}; give the YAML file "
                "of this fidelity"
            )
        return known
    given = load_sae(path)
    if known and (differing := reference_difference(given, known, SAE_TOLERANCE)):
        raise ValueError(
            f"--sae {path}: the {differing[0]} differs from the one that fidelity {fidelity} was trained with "
            f"({differing[1]}); leave the flag out"
        )
    return given


# --------------------------------------------------------------------------------------------------
# the network
# --------------------------------------------------------------------------------------------------


def check_finite(network: AIMNet2, species: list[int], title: str) -> None:
    """Refuse a network with ranges, parameters or tables that are not finite; rows of other elements do not count.

    Raises
    ------
    ValueError
        Names the tensors.
    """
    bad = [key for key, value in network.state_dict().items() if not _is_finite(key, value, species)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"{title}: NaN or infinite values among the weights ({', '.join(bad[:3])}{more}); the training diverged, "
            "or the file is damaged"
        )
    if not 0.0 < network.cutoff < math.inf:
        raise ValueError(f"{title}: the range of the network must be positive and finite, not {network.cutoff} Å")
    if math.isnan(network.cutoff_lr) or math.isnan(network.cutoff_lr_periodic):
        raise ValueError(f"{title}: the range of the long-range terms is not a number")


def _is_finite(key: str, value: Tensor, species: list[int]) -> bool:
    if not value.is_floating_point():
        return True
    return bool(torch.isfinite(value[[0, *species]] if is_type_table(key) else value).all())


def choose_coulomb_method(network: AIMNet2, coulomb: Coulomb | None, title: str) -> dict[str, Any] | None:
    """Set how the Coulomb energy is summed, and describe it; None for a network without Coulomb energy.

    Raises
    ------
    ValueError
        A method is asked for, and there is no Coulomb energy.
    """
    modules = [module for module in network.readouts() if isinstance(module, LRCoulomb)]
    if coulomb is not None:
        if not modules:
            raise ValueError(f"--coulomb {coulomb.method}: {title} has no Coulomb energy among its outputs")
        for module in modules:
            module.set_method(coulomb.method, **coulomb.given)
        network.update_keys_and_cutoffs()
    return _coulomb_settings(modules[0]) if modules else None


def _coulomb_settings(module: LRCoulomb) -> dict[str, Any]:
    """Describe how the Coulomb energy is summed; the cutoff of ``ewald`` is None if it is chosen for each system."""
    settings: dict[str, Any] = {
        "method": module.method,
        "short_range": round(float(module.rc), 6),
        "envelope": module.envelope,
    }
    if module.method == "dsf":
        settings |= {"cutoff": float(module.dsf_rc), "alpha": float(module.dsf_alpha)}
    elif module.method == "ewald":
        settings |= {"cutoff": float(module.ewald_rc) or None, "accuracy": float(module.ewald_accuracy)}
    return settings


def embed_dispersion(network: AIMNet2, dispersion: Dispersion, species: list[int]) -> None:
    """Add a dispersion correction to the outputs of a network.

    Raises
    ------
    ValueError
        The network has a dispersion energy already, or an element has no reference data.
    """
    module = dispersion.module()
    if module is None:
        return
    if any(isinstance(m, RationalDispersion) for m in network.readouts()):
        raise ValueError(
            f"{dispersion.text}: the model has a dispersion energy of its own among its outputs, and dispersion would "
            "be counted twice. Use --dispersion none."
        )
    without = [z for z in species if z not in module.elements]
    if without:
        raise ValueError(
            f"{dispersion.text}: no reference data for {element_names(without)}, which the model was trained on. Use "
            "--dispersion none."
        )
    network.add_output("dftd3" if dispersion.method == "d3bj" else "dftd4", module)


# --------------------------------------------------------------------------------------------------
# the deployable model and its metadata
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be compiled.

    Attributes
    ----------
    fidelity : int
        Its number.
    title : str
        What to call it in messages.
    model : DeployableModel
        The model, not yet scripted.
    dispersion : Dispersion
        The correction that is embedded.
    metadata : dict
        What the file will say about itself, plain types.
    """

    fidelity: int
    title: str
    model: DeployableModel
    dispersion: Dispersion
    metadata: dict[str, Any]


def prepare(source: Source, fidelity: int, options: ModelOptions) -> Prepared:
    """Put a fidelity together: network, self-atomic energies, dispersion; and describe it.

    Raises
    ------
    ValueError, FileNotFoundError
        What does not fit together, see `aimnet2mult.tools.compile_jit.compile_model`.
    """
    checkpoint, title = source.checkpoint, source.title(fidelity)
    ledger = (checkpoint.get("dispersion") or {}).get(fidelity)
    dispersion, origin = dispersion_to_embed(ledger, options.dispersion.get(fidelity), title)
    energies = self_atomic_energies(source, fidelity)
    species = sorted((checkpoint.get("species") or {}).get(fidelity) or energies)
    without = [z for z in species if z not in energies]
    if without:
        raise ValueError(f"--sae: no self-atomic energy for {element_names(without)}, which the model was trained on")
    unknown = [z for z in species if not math.isfinite(energies[z])]
    if unknown:
        raise ValueError(f"--sae: the self-atomic energy of {element_names(unknown)} is not finite")

    network = single_fidelity_model(checkpoint, source.config, fidelity, source.num_fidelities, source.fidelity_offset)
    beyond = [z for z in species if z >= network.num_types]
    if beyond:
        raise ValueError(f"{element_names(beyond)}: the embedding ends at Z = {network.num_types - 1}")
    coulomb = choose_coulomb_method(network, options.coulomb, title)
    check_finite(network, species, title)
    network.add_output("self_atomic_energies", SelfAtomicEnergies(energies.restricted(species)))
    embed_dispersion(network, dispersion, species)

    model = DeployableModel(network, species, title)
    described = {"source": origin, **asdict(dispersion)}
    settings = {
        "compute_stress": options.stress,
        "compute_hessian": options.hessian,
        "options": _as_text(coulomb, described, options),
    }
    for key, value in settings.items():
        setattr(model, key, value)
    metadata = {
        **common_metadata(source, options),
        "fidelity_level": fidelity,
        "fidelity_name": source.names.get(fidelity),
        "level_of_theory": (checkpoint.get("fidelity_levels") or {}).get(fidelity),
        "species": species,
        "elements": [ELEMENT_SYMBOLS[z] for z in species],
        "spin_resolved": network.num_charge_channels == 2,
        "cutoff": model.cutoff,
        "cutoff_lr": model.cutoff_lr,
        "cutoff_lr_periodic": model.cutoff_lr_periodic,
        "periodic": not reasons_against_cells(model),
        "coulomb": coulomb,
        "sae": {z: energies[z] for z in species},
        **({"sae_terms": energies.terms} if energies.terms else {}),
        "labels_dispersion": None if ledger is None else dict(ledger["labels"]),
        "dispersion": described,
    }
    return Prepared(fidelity, title, model, dispersion, plain(metadata))


def reasons_against_cells(model: DeployableModel) -> list[str]:
    """Why a model cannot be used with a cell, and which options would help; nothing if it can."""
    reasons = []
    if math.isinf(model.cutoff_lr_periodic):
        reasons.append("its Coulomb sum has no cutoff (--coulomb dsf or ewald has one)")
    if model.molecules_only:
        reasons.append(f"{model.molecules_only} is for molecules (--dispersion d3bj is for crystals, too)")
    return reasons


def check_stress(parts: Sequence[Prepared], combined: bool) -> None:
    """Refuse a file that is to compute stress, and never can.

    Raises
    ------
    ValueError
        Says which fidelity cannot be used with a cell; of a combined file, none of them can.
    """
    without = [part for part in parts if reasons_against_cells(part.model)]
    if without and (not combined or len(without) == len(parts)):
        reasons = " and ".join(reasons_against_cells(without[0].model))
        raise ValueError(f"--stress: {without[0].title} cannot be used with a cell: {reasons}")


def common_metadata(source: Source, options: ModelOptions) -> dict[str, Any]:
    """What is the same for all fidelities of a checkpoint, plain types."""
    return plain(
        {
            "format_version": FORMAT_VERSION,
            "num_fidelities": source.num_fidelities,
            "licence": options.licence or LICENCE_NOT_STATED,
            "comment": options.comment,
            "units": UNITS,
            "options": {"compute_stress": options.stress, "compute_hessian": options.hessian},
            "weights": {
                "file": source.path.name,
                "sha256": hashlib.sha256(source.path.read_bytes()).hexdigest(),
                "format_version": source.checkpoint.get("format_version"),
            },
            "training": describe_training(source.checkpoint),
            "model_config": source.config,
            "versions": versions(),
        }
    )


def _as_text(coulomb: Mapping[str, Any] | None, dispersion: Mapping[str, Any], options: ModelOptions) -> dict[str, str]:
    """Return the choices as text, for the attribute ``options`` of the compiled model."""
    entries: dict[str, Any] = {f"coulomb_{key}": value for key, value in (coulomb or {"method": "none"}).items()}
    for key, value in dispersion.items():
        if isinstance(value, Mapping):
            entries |= {f"dispersion_{name}": number for name, number in value.items()}
        elif value is not None:
            entries[f"dispersion_{key}"] = value
    entries |= {"compute_stress": options.stress, "compute_hessian": options.hessian}
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in entries.items()}


def describe_training(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a checkpoint tells about its training: settings, data, progress, versions; None if nothing.

    Files are named without their folders, which are nobody's business where the model is used; the fingerprints of the
    data tell which they were.
    """
    found = {
        "config": checkpoint.get("train_config"),
        "data": checkpoint.get("data"),
        "progress": checkpoint.get("progress"),
        "edits": checkpoint.get("edits"),
        "versions": checkpoint.get("versions"),
    }
    kept = {key: without_folders(value) for key, value in found.items() if value}
    return kept or None


def without_folders(value: Any) -> Any:
    """Nested dictionaries and lists in which absolute paths are reduced to the names of the files."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value


def plain(value: Any) -> Any:
    """Nested dictionaries, lists and numbers, each container a new one, as YAML and JSON can tell them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
