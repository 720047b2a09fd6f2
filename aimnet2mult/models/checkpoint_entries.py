"""Entries of a checkpoint as `aimnet2mult.models.base.save_checkpoint` writes them, checked before they are believed.

A checkpoint may come from anywhere, like an artifact (`aimnet2mult.models.artifact`), and is held to the same: classes
of a list, no files, sizes of the weights that are there.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from aimnet2mult.constants import FIDELITY_OFFSET, TYPES_PER_FIDELITY
from aimnet2mult.models.artifact import D3_KEYS, D3Parameters
from aimnet2mult.models.artifact_config import READOUTS, check_config, check_sizes, class_name, refuse, shown
from aimnet2mult.models.mixed_fidelity_aimnet2 import fidelity_slice, is_type_table
from aimnet2mult.models.safe_file import check_weights
from aimnet2mult.reference_energies import TERMS

OWN_READOUTS = (*READOUTS, "DFTD4", "AtomicScale", "ChargeCorrection")
"""Readouts that a checkpoint may name."""

MAX_FIDELITIES = 1000


def check_entries(checkpoint: Mapping[str, Any], version: int) -> None:
    """Refuse entries of other types than those that `save_checkpoint` writes; every entry but ``model`` may be absent.

    Parameters
    ----------
    checkpoint : mapping
        With the weights under ``model``.
    version : int
        Newest ``format_version`` that is known.

    Raises
    ------
    CheckpointError
        The first entry that is wrong.
    """
    weights = checkpoint["model"]
    check_weights(weights, "model")
    table = weights.get("afv.weight")
    if table is None:
        refuse("these are not the weights of an AIMNet2 model: there is no afv.weight")
    for key, value in weights.items():
        if is_type_table(key) and (value.dim() != 2 or len(value) < 2):
            refuse(f"model: {key} has the shape {tuple(value.shape)}, expected one row for each element type")
    given = checkpoint.get("format_version", version)
    if not _is_whole(given):
        refuse(f"format_version {shown(given)} is not a number")
    if given > version:
        refuse(f"checkpoint format {given} is newer than this package; update aimnet2mult")
    count, offset = checkpoint.get("num_fidelities", 1), checkpoint.get("fidelity_offset", FIDELITY_OFFSET)
    if not _is_whole(count) or not 1 <= count <= MAX_FIDELITIES:
        refuse(f"num_fidelities must be a number of fidelities, found {shown(count)}")
    if not _is_whole(offset) or not TYPES_PER_FIDELITY <= offset <= len(table) + 10**6:
        refuse(f"fidelity_offset must be at least {TYPES_PER_FIDELITY}, found {shown(offset)}")
    _check_tables(checkpoint)
    config = checkpoint.get("model_config")
    if config is not None:
        parsed = check_config(config, (), "model_config", OWN_READOUTS)
        heads = any(key.startswith("fidelity_readouts.") for key in weights)
        check_sizes(parsed, fidelity_slice(weights, 0, offset) if heads else weights)


def _check_tables(checkpoint: Mapping[str, Any]) -> None:
    """Entries that say something of each fidelity."""
    _check_mapping(checkpoint, "fidelity_names", _is_text, "text")
    _check_mapping(checkpoint, "fidelity_levels", _is_text, "text")
    _check_mapping(checkpoint, "sae", _is_reference, f"{{Z: energy in eV}}, finite, with {' or '.join(TERMS)}")
    _check_mapping(checkpoint, "species", _is_species, "a list of atomic numbers")
    _check_mapping(checkpoint, "dispersion", _is_ledger, "{labels, subtracted}")


def _check_mapping(checkpoint: Mapping[str, Any], key: str, fits: Callable[[Any], bool], what: str) -> None:
    entry = checkpoint.get(key)
    if entry is None:
        return
    if not isinstance(entry, Mapping) or not all(_is_whole(fidelity) for fidelity in entry):
        refuse(f"{key} must be a mapping {{fidelity: {what}}}, found {shown(entry)}")
    for fidelity, value in entry.items():
        if not fits(value):
            refuse(f"{key}.{fidelity} must be {what}, found {shown(value)}")


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_species(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_whole, value))


def _is_reference(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        (_is_whole(key) or key in TERMS) and _is_finite(energy) for key, energy in value.items()
    )


def _is_ledger(value: Any) -> bool:
    if not isinstance(value, Mapping) or type(value.get("subtracted")) is not bool:
        return False
    labels = value.get("labels")
    if not isinstance(labels, Mapping) or not _is_text(labels.get("method")):
        return False
    parameters = labels.get("parameters")
    numbers = isinstance(parameters, Mapping) and all(map(_is_finite, parameters.values()))
    return parameters is None or numbers


def subtracted_d3(checkpoint: Mapping[str, Any], fidelity: int) -> D3Parameters | None:
    """Parameters of the D3(BJ) energy that was subtracted from the labels of a fidelity; None if none was.

    Raises
    ------
    CheckpointError
        One was, but its parameters are not there.
    """
    entry = (checkpoint.get("dispersion") or {}).get(fidelity)
    if entry is None or not entry["subtracted"]:
        return None
    parameters = entry["labels"].get("parameters") or {}
    if missing := [key for key in D3_KEYS if key not in parameters]:
        refuse(f"dispersion.{fidelity}.labels.parameters: {', '.join(missing)} missing, which D3(BJ) needs")
    return D3Parameters(**{key: float(parameters[key]) for key in D3_KEYS})  # type: ignore[typeddict-item]


def without_files(config: Any) -> Any:
    """Configuration that names no files: what ``DispParam`` once read (``ptfile``) is among the weights."""
    outputs = config["kwargs"].get("outputs") if isinstance(config, Mapping) and _has_kwargs(config) else None
    if not isinstance(outputs, Mapping):
        return config
    config = copy.deepcopy(dict(config))
    for node in config["kwargs"]["outputs"].values():
        if isinstance(node, dict) and "class" in node and class_name(node) == "DispParam" and _has_kwargs(node):
            node["kwargs"].pop("ptfile", None)
    return config


def _has_kwargs(node: Mapping[str, Any]) -> bool:
    return isinstance(node.get("kwargs"), dict)
