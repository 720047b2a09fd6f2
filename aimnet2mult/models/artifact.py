"""Format-2 artifacts, the files in which the AIMNet2 ecosystem hands models round: read, checked, and written.

An artifact is one network in one dictionary: ``model_yaml`` (its configuration), ``state_dict``, and metadata
(`ModelMetadata`). Self-atomic energies are part of its atomic shifts, in float64; embedding rows of elements that it
was not trained on are NaN. A network trained with long-range Coulomb energy holds its negative short-range part
(``SRCoulomb``), so that whoever uses it adds the whole Coulomb energy in the way that suits the system, and the D3
energy likewise: ``needs_coulomb``, ``needs_dispersion``.

A file may come from anywhere. It can name only classes of the lists of `aimnet2mult.models.artifact_config`, it cannot
name files, its sizes must be those of the tensors that it really holds, and its numbers must be finite
(`parse_artifact`).
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
import yaml
from torch import Tensor

from aimnet2mult.constants import MAX_ATOMIC_NUMBER, TYPES_PER_FIDELITY, element_names
from aimnet2mult.dispersion import PUBLISHED_TABLES
from aimnet2mult.models.artifact_config import (
    check_sizes,
    class_name,
    find_outputs,
    parse_config,
    published_config,
    refuse,
    shown,
)
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table
from aimnet2mult.models.safe_file import CheckpointError, check_weights
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.utils.files import atomic_path
from aimnet2mult.utils.text import first_line

logger = logging.getLogger(__name__)

ARTIFACT_VERSION = 2
"""Format version of artifacts; 1 stands for TorchScript files."""

D3_KEYS = ("s6", "s8", "a1", "a2")
COULOMB_MODES = ("sr_embedded", "full_embedded", "none")
ENVELOPES = ("exp", "cosine")

EXPECTED_EXTRA = {
    "": ("lrcoulomb", "dftd3", "d3bj"),
    "Dipole": ("mass",),
    "Quadrupole": ("mass",),
    "DFTD3": PUBLISHED_TABLES,
    "D3TS": ("r4r2",),
}
"""Weights of readouts that may be there although nothing reads them. Of readouts that the configuration does not name:
Coulomb and dispersion energies that the file leaves to others. Of a class: tables that we have ourselves.

Expected to be missing is only the ``rc`` of Coulomb energies, which the configuration says, too."""

WRITTEN = (
    *("needs_coulomb", "needs_dispersion", "coulomb_mode", "coulomb_sr_rc", "coulomb_sr_envelope", "d3_params"),
    *("has_embedded_lr", "has_embedded_d3ts"),
)
"""Entries of metadata that are written as they are."""

EXTRA_ENTRY = "aimnet2mult"
"""Entry of an artifact in which we keep what the format has no place for."""

MAX_CUTOFF = 50.0
"""Å; the networks of the ecosystem reach 5 Å."""

LARGEST = 1e12
"""Largest number of metadata: sizes of energies, eV, and below."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights."""


class D3Parameters(TypedDict):
    """Damping parameters of D3(BJ); a2 in Bohr."""

    s6: float
    s8: float
    a1: float
    a2: float


class ModelMetadata(TypedDict, total=False):
    """What a model file says about itself, whatever its format (`aimnet2mult.models.base.load_model`).

    The first group is that of format-2 artifacts. Energies are complete only once what is *needed* has been added.

    Attributes
    ----------
    format_version : int
        1: TorchScript. 2: format-2 artifact, or checkpoint of this package.
    cutoff : float
        Range of the network, Å.
    needs_coulomb : bool
        The Coulomb energy of the charges is to be added.
    needs_dispersion : bool
        The D3(BJ) energy with ``d3_params`` is to be added.
    coulomb_mode : str
        What the model holds: ``sr_embedded`` E(network) - E(short range), the full Coulomb energy is to be added;
        ``full_embedded`` all of it; ``none`` nothing.
    coulomb_sr_rc : float or None
        Range of the short-range part, Å, of ``sr_embedded``.
    coulomb_sr_envelope : str or None
        ``exp`` or ``cosine`` (`aimnet2mult.electrostatics.SRCoulomb`), of ``sr_embedded``.
    d3_params : dict or None
        s6, s8, a1, a2 (Bohr).
    implemented_species : list of int
        Atomic numbers that the model was trained on.
    has_embedded_lr, has_embedded_d3ts : bool
        The model holds terms that reach beyond the network, or learned dispersion (``D3TS``).
    family : str or None
        Name of a series of models.
    supports_charged_systems : bool or None
        False: trained on neutral systems only.

    model_file : str
        ``format-2 artifact``, ``checkpoint``, ``compiled model`` (ours) or ``legacy TorchScript``.
    num_charge_channels : int or None
        2 if the model resolves spin; None if the file does not tell.
    num_fidelities, fidelity_offset : int
        Fidelities of the model, and distance of their element types.
    fidelity_names : dict
        {fidelity: name}.
    species : dict
        {fidelity: atomic numbers}.
    sae : dict
        {fidelity: `ReferenceEnergies`} to be added to the energies of the model; empty where they are inside.
    dispersion : dict
        {fidelity: ``d3_params``} of the D3(BJ) energies to be added.
    baked_sae : dict or None
        {Z: eV} that the atomic shifts contain, where the file tells; the rest of the shifts was learned.
    level_of_theory : str or None
        In words.
    """

    format_version: int
    cutoff: float
    needs_coulomb: bool
    needs_dispersion: bool
    coulomb_mode: str
    coulomb_sr_rc: float | None
    coulomb_sr_envelope: str | None
    d3_params: D3Parameters | None
    implemented_species: list[int]
    has_embedded_lr: bool
    has_embedded_d3ts: bool
    family: str | None
    supports_charged_systems: bool | None

    model_file: str
    num_charge_channels: int | None
    num_fidelities: int
    fidelity_offset: int
    fidelity_names: dict[int, str]
    species: dict[int, list[int]]
    sae: dict[int, ReferenceEnergies]
    dispersion: dict[int, D3Parameters]
    baked_sae: dict[int, float] | None
    level_of_theory: str | None


@dataclass(frozen=True)
class Artifact:
    """A format-2 artifact, checked.

    Attributes
    ----------
    config : dict
        ``class`` and ``kwargs`` of the network, under our names.
    weights : dict
        State dictionary that belongs to it; atomic shifts float64.
    metadata : ModelMetadata
        The rest.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    metadata: ModelMetadata

    @property
    def outputs(self) -> dict[str, Any]:
        """Readouts, {name: {class, kwargs}}."""
        return self.config["kwargs"]["outputs"]


def is_artifact(content: Any) -> bool:
    """Tell whether the content of a file is that of an artifact, good or bad."""
    return isinstance(content, Mapping) and "model_yaml" in content


# --------------------------------------------------------------------------------------------------
# reading
# --------------------------------------------------------------------------------------------------


def parse_artifact(content: Mapping[str, Any], path: str | Path, trusted: Collection[str] = ()) -> Artifact:
    """Check the content of a file, entry by entry.

    Parameters
    ----------
    content : mapping
        As `aimnet2mult.models.safe_file.load_tensors` returns it.
    path : str or Path
        For messages.
    trusted : collection of str
        Dotted names of further classes that it may name; whoever gives them vouches for them.

    Raises
    ------
    CheckpointError
        The first thing that is wrong, and what is expected instead.
    """
    try:
        version = content.get("format_version", ARTIFACT_VERSION)
        if type(version) is not int or version != ARTIFACT_VERSION:
            refuse(f"format_version {shown(version)} is not known; known: {ARTIFACT_VERSION}")
        config = parse_config(_entry(content, "model_yaml", str), trusted)
        weights = _parse_weights(_entry(content, "state_dict", Mapping), config)
        metadata = _parse_metadata(content, config, weights)
        check_sizes(config, weights)
        _check_finite(weights, metadata["implemented_species"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    known = {"model_yaml", "state_dict", EXTRA_ENTRY, *ModelMetadata.__annotations__}
    if unknown := sorted(shown(key) for key in content if key not in known):
        logger.warning(f"{path}: entries of an unknown meaning are left alone: {', '.join(unknown[:5])}")
    return Artifact(config, weights, metadata)


def _entry(content: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in content:
        refuse(f"the entry {key} is missing; a format-2 artifact needs model_yaml, state_dict and cutoff")
    if not isinstance(content[key], kind):
        refuse(f"{key} is of the type {type(content[key]).__name__}, expected {kind.__name__}")
    return content[key]


# --- weights ---


def _parse_weights(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that the configuration needs, atomic shifts in float64."""
    outputs = config["kwargs"]["outputs"]
    check_weights(weights, "state_dict")
    kept: dict[str, Tensor] = {}
    for key, value in weights.items():
        if is_expected_extra(key, outputs):
            continue
        if value.dtype not in FLOATS:
            refuse(f"state_dict: {key:.80} is not of floating-point numbers but {value.dtype}")
        value = value.detach()
        if key.endswith(".shifts.weight"):
            value = value.double()
        elif value.element_size() < 4:
            value = value.float()
        kept[key] = value
    table = kept.get("afv.weight")
    if table is None or table.dim() != 2:
        refuse("state_dict: afv.weight, the embedding of the elements, is missing or not a matrix")
    if not 2 <= len(table) <= TYPES_PER_FIDELITY:
        refuse(f"state_dict: afv.weight has {len(table)} rows, expected one for each element and the first for none")
    for key, value in kept.items():
        if is_type_table(key) and (value.dim() != 2 or len(value) != len(table)):
            refuse(
                f"state_dict: {key:.80} has the shape {tuple(value.shape)}, expected {len(table)} rows as afv.weight"
            )
    for name in find_outputs(outputs, "SRCoulomb", "LRCoulomb"):
        rc = _number(outputs[name]["kwargs"].get("rc", 4.6), f"model_yaml: outputs.{name}.rc", positive=True)
        stored = kept.get(f"outputs.{name}.rc", table.new_tensor(rc))
        if stored.shape != () or not _same_range(float(stored), rc):
            refuse(f"state_dict: outputs.{name}.rc is not the {rc:g} Å of model_yaml")
        kept[f"outputs.{name}.rc"] = table.new_tensor(rc)
    return kept


def _same_range(stored: float, said: float) -> bool:
    """Whether a range among the weights, which may have been rounded to half precision, is that of the metadata."""
    return abs(stored - said) <= 0.005 * said


def is_expected_extra(key: str, outputs: Mapping[str, Any]) -> bool:
    """Whether a weight is one that may be there although nothing reads it."""
    place, _, rest = key.partition(".")
    name, _, own = rest.partition(".")
    if place != "outputs":
        return False
    if name not in outputs:
        # The masses of multipoles stay behind when these are taken out of a configuration.
        return name in EXPECTED_EXTRA[""] or (name in ("dipole", "quadrupole") and own == "mass")
    return own in EXPECTED_EXTRA.get(class_name(outputs[name]), ())


def _check_finite(weights: Mapping[str, Tensor], species: Sequence[int]) -> None:
    """Refuse numbers that are not finite, except in rows of elements that the model does not know."""
    for key, value in weights.items():
        checked = value[[0, *species]] if is_type_table(key) else value
        if not bool(torch.isfinite(checked).all()):
            of = " in rows of implemented_species" if is_type_table(key) else ""
            refuse(f"state_dict: {key} holds NaN or infinite values{of}; the training diverged, or the file is damaged")
        if value is not checked and bool(torch.isinf(value).any()):
            refuse(f"state_dict: {key} holds infinite values")


# --- metadata ---


def _parse_metadata(
    content: Mapping[str, Any], config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> ModelMetadata:
    kwargs = config["kwargs"]
    outputs = kwargs["outputs"]
    cutoff = _number(_entry(content, "cutoff", object), "cutoff", positive=True)
    if cutoff > MAX_CUTOFF:
        refuse(f"cutoff is {cutoff:g} Å, more than any network reaches ({MAX_CUTOFF:g} Å)")
    ranges = [float(weights[key]) for key in ("aev.rc_s", "aev.rc_v") if key in weights and weights[key].numel() == 1]
    if ranges and not _same_range(max(ranges), cutoff):
        refuse(f"cutoff is {cutoff} Å, but the network reaches {max(ranges):.6g} Å")
    flags = {
        key: _flag(content, key)
        for key in ("needs_coulomb", "needs_dispersion", "has_embedded_lr", "has_embedded_d3ts")
    }
    mode, rc, envelope = _parse_coulomb(content, outputs, cutoff, flags["needs_coulomb"])
    d3_params = _parse_d3(content, outputs, flags["needs_dispersion"])
    for key, kind in (("family", str), ("supports_charged_systems", bool)):
        if content.get(key) is not None and not isinstance(content[key], kind):
            refuse(f"{key} must be of the type {kind.__name__} or absent, found {shown(content[key])}")
    extra = content.get(EXTRA_ENTRY)
    baked, level, name = _parse_extra({} if extra is None else extra)
    species = _parse_species(content, weights["afv.weight"])
    return ModelMetadata(
        format_version=ARTIFACT_VERSION,
        cutoff=cutoff,
        **flags,  # type: ignore[typeddict-item]  # four keys of the type
        coulomb_mode=mode,
        coulomb_sr_rc=rc,
        coulomb_sr_envelope=envelope,
        d3_params=d3_params,
        implemented_species=species,
        family=content.get("family"),
        supports_charged_systems=content.get("supports_charged_systems"),
        model_file="format-2 artifact",
        num_charge_channels=kwargs.get("num_charge_channels", 1),
        num_fidelities=1,
        fidelity_offset=0,
        fidelity_names={} if name is None else {0: name},
        species={0: species},
        sae={},
        dispersion={} if d3_params is None else {0: d3_params},
        baked_sae=baked,
        level_of_theory=level,
    )


def _parse_coulomb(
    content: Mapping[str, Any], outputs: Mapping[str, Any], cutoff: float, needed: bool
) -> tuple[str, float | None, str | None]:
    mode = content.get("coulomb_mode", "none")
    if not isinstance(mode, str) or mode not in COULOMB_MODES:
        refuse(f"coulomb_mode {shown(mode)} is not one of {', '.join(COULOMB_MODES)}")
    short, full = find_outputs(outputs, "SRCoulomb"), find_outputs(outputs, "LRCoulomb")
    held = {"sr_embedded": (1, 0), "full_embedded": (0, 1), "none": (0, 0)}[mode]
    if (len(short), len(full)) != held:
        found = ", ".join(f"{class_name(outputs[name])} ({name})" for name in [*short, *full]) or "no Coulomb energy"
        refuse(f"coulomb_mode is {mode}, but model_yaml has {found} among its outputs")
    if mode != "sr_embedded":
        if needed and mode == "full_embedded":
            refuse("needs_coulomb is set, but coulomb_mode full_embedded says that the model has all of it")
        return mode, None, None
    if not needed:
        refuse("coulomb_mode sr_embedded needs the full Coulomb energy from outside, but needs_coulomb is not set")
    rc = _number(content.get("coulomb_sr_rc"), "coulomb_sr_rc", positive=True)
    envelope = content.get("coulomb_sr_envelope")
    if not isinstance(envelope, str) or envelope not in ENVELOPES:
        refuse(f"coulomb_sr_envelope {shown(envelope)} is not one of {', '.join(ENVELOPES)}")
    if rc > cutoff + 1e-6:
        refuse(f"coulomb_sr_rc is {rc} Å, beyond the cutoff of the network ({cutoff} Å), whose pairs it uses")
    kwargs = outputs[short[0]]["kwargs"]
    if kwargs.get("rc", 4.6) != rc or kwargs.get("envelope", "exp") != envelope:
        refuse(f"coulomb_sr_rc and coulomb_sr_envelope are {rc} Å, {envelope}, but model_yaml has {kwargs}")
    return mode, rc, str(envelope)


def _parse_d3(content: Mapping[str, Any], outputs: Mapping[str, Any], needed: bool) -> D3Parameters | None:
    learned = find_outputs(outputs, "D3TS")
    if bool(content.get("has_embedded_d3ts", bool(learned))) != bool(learned):
        refuse("has_embedded_d3ts contradicts model_yaml")
    given = content.get("d3_params")
    if not needed:
        return None
    if embedded := [*learned, *find_outputs(outputs, "DFTD3")]:
        refuse(f"needs_dispersion is set, but the model has a dispersion energy of its own ({embedded[0]})")
    if not isinstance(given, Mapping):
        refuse("needs_dispersion is set, but d3_params is missing: s8, a1, a2 (and s6)")
    values = {key: _number(given.get(key, 1.0 if key == "s6" else None), f"d3_params.{key}") for key in D3_KEYS}
    if values["a1"] < 0.0 or values["a2"] < 0.0:
        refuse(f"d3_params: a1 and a2 must not be negative, found {values['a1']} and {values['a2']}")
    return D3Parameters(**values)  # type: ignore[typeddict-item]


def _parse_species(content: Mapping[str, Any], table: Tensor) -> list[int]:
    known = [z for z in range(1, len(table)) if not bool(table[z].isnan().any())]
    given = content.get("implemented_species")
    if given is None:
        given = [z for z in known if z <= MAX_ATOMIC_NUMBER]
    if not isinstance(given, list) or not given or any(type(z) is not int for z in given):
        refuse(f"implemented_species must be a list of atomic numbers, found {shown(given)}")
    without = sorted(z for z in set(given) if z not in known or z > MAX_ATOMIC_NUMBER)
    if without:
        refuse(f"implemented_species has {element_names(without)}, which the embedding (afv.weight) does not know")
    return sorted(set(given))


def _parse_extra(extra: Any) -> tuple[dict[int, float] | None, str | None, str | None]:
    """Self-atomic energies inside the shifts, level of theory and name, if this package wrote the file."""
    if not isinstance(extra, Mapping):
        refuse(f"{EXTRA_ENTRY} must be a mapping, found {type(extra).__name__}")
    sae = extra.get("sae")
    if sae is not None:
        if not isinstance(sae, Mapping) or any(type(z) is not int for z in sae):
            refuse(f"{EXTRA_ENTRY}.sae must be a mapping of atomic numbers to energies, eV")
        sae = {z: _number(energy, f"{EXTRA_ENTRY}.sae.{z}") for z, energy in sae.items()}
    for key in ("level_of_theory", "fidelity_name"):
        if extra.get(key) is not None and not isinstance(extra[key], str):
            refuse(f"{EXTRA_ENTRY}.{key} must be text")
    return sae, extra.get("level_of_theory"), extra.get("fidelity_name")


def _flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if type(value) is not bool:
        refuse(f"{key} must be true or false, found {shown(value)}")
    return value


def _number(value: Any, where: str, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        refuse(f"{where} must be a finite number, found {shown(value)}")
    if positive and not value > 0.0:
        refuse(f"{where} must be positive, found {value}")
    return float(value)


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------


def write_artifact(artifact: Artifact, path: str | Path) -> None:
    """Write an artifact, whole or not at all.

    Raises
    ------
    CheckpointError
        It would not pass `parse_artifact`; nothing is written.
    OSError
        It cannot be written.
    """
    metadata = artifact.metadata
    extra = {
        "sae": metadata.get("baked_sae"),
        "level_of_theory": metadata.get("level_of_theory"),
        "fidelity_name": (metadata.get("fidelity_names") or {}).get(0),
    }
    extra = {key: value for key, value in extra.items() if value is not None}
    content: dict[str, Any] = {
        "format_version": ARTIFACT_VERSION,
        "model_yaml": yaml.safe_dump(published_config(artifact.config), sort_keys=False),
        "cutoff": metadata["cutoff"],
        **{key: metadata[key] for key in WRITTEN},  # type: ignore[literal-required]
        **{key: metadata[key] for key in ("family", "supports_charged_systems") if metadata.get(key) is not None},
        "implemented_species": list(metadata["implemented_species"]),
        **({EXTRA_ENTRY: extra} if extra else {}),
        "state_dict": {key: value.detach().cpu().contiguous() for key, value in artifact.weights.items()},
    }
    parse_artifact(content, "format 2")  # the name of the file may be a temporary one
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written; is the disk full? ({first_line(error)})") from error
