"""Between networks as they are trained here, and format-2 artifacts: what is inside in one is outside in the other.

A trained network has its Coulomb energy beyond the short range inside (``LRCoulomb``), E(network) + E(full) - E(short),
its energies are relative to self-atomic energies, and its D3 energy, if it was subtracted from the labels, is in the
ledger of the checkpoint. An artifact holds E(network) - E(short) and the self-atomic energies, and says that full
Coulomb and D3 energies are to be added. The sum is the same.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aimnet2mult.constants import ATOMIC_MASSES, FIDELITY_OFFSET, element_names
from aimnet2mult.dispersion_ts import D3TS
from aimnet2mult.models.artifact import (
    ARTIFACT_VERSION,
    D3_KEYS,
    Artifact,
    D3Parameters,
    ModelMetadata,
    is_expected_extra,
)
from aimnet2mult.models.artifact_config import MODULES, READOUTS, class_name, find_outputs
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table
from aimnet2mult.models.safe_file import CheckpointError

PUBLISHED_ROWS = 64
"""Rows of the embedding in the published package: elements up to Eu (63)."""

SHORT_RANGE = "srcoulomb"
LONG_RANGE = "lrcoulomb"
LEARNED_DISPERSION = "d3ts"
SHIFTS = "atomic_shift"
"""Names of readouts by which the published package finds them."""


# --------------------------------------------------------------------------------------------------
# in
# --------------------------------------------------------------------------------------------------


def checkpoint_of_artifact(artifact: Artifact) -> dict[str, Any]:
    """Return an artifact as the checkpoint of a training with one fidelity.

    ``SRCoulomb`` becomes ``LRCoulomb``, D3 energies that are to be added become dispersion that was subtracted from the
    labels, and the atomic shifts become self-atomic energies: all of them, or those that the file tells of, the rest
    staying where it is.

    Returns
    -------
    dict
        Entries as in `aimnet2mult.models.base.save_checkpoint`. ``sae_with_shifts`` is true where the self-atomic
        energies contain what the network had learned on top of them.
    """
    metadata = artifact.metadata
    config = copy.deepcopy(artifact.config)
    weights = dict(artifact.weights)
    config["kwargs"]["outputs"] = _with_full_coulomb(artifact.outputs, metadata, weights)
    species = metadata["implemented_species"]
    sae, told = take_out_sae(weights, species, metadata.get("baked_sae"))
    level = metadata.get("level_of_theory")
    return {
        **single_checkpoint(weights, species, sae, metadata.get("d3_params")),
        "model_config": config,
        "fidelity_names": dict(metadata.get("fidelity_names") or {}),
        "fidelity_levels": {} if level is None else {0: level},
        "sae_with_shifts": not told,
        "supports_charged_systems": metadata.get("supports_charged_systems"),
    }


def single_checkpoint(
    weights: Mapping[str, Tensor],
    species: Sequence[int],
    sae: Mapping[int, float],
    d3_params: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Entries of a checkpoint of one fidelity; D3 energies become dispersion that was subtracted from the labels."""
    checkpoint: dict[str, Any] = {
        "format_version": 1,
        "model": dict(weights),
        "num_fidelities": 1,
        "fidelity_offset": FIDELITY_OFFSET,
        "use_fidelity_readouts": True,
        "sae": {0: dict(sae)},
        "species": {0: list(species)},
    }
    if d3_params is not None:
        labels = {"method": "d3bj", "functional": None, "parameters": dict(d3_params)}
        checkpoint["dispersion"] = {0: {"labels": labels, "subtracted": True}}
    return checkpoint


def _with_full_coulomb(
    outputs: Mapping[str, Any], metadata: ModelMetadata, weights: dict[str, Tensor]
) -> dict[str, Any]:
    """Readouts that add all of the Coulomb energy that is needed; the key of its range follows in ``weights``."""
    if not metadata["needs_coulomb"]:
        return copy.deepcopy(dict(outputs))
    result: dict[str, Any] = {}
    rc = metadata.get("coulomb_sr_rc") or 4.6
    kwargs = {"rc": rc, "envelope": metadata.get("coulomb_sr_envelope") or "exp", "method": "simple"}
    for name, node in outputs.items():
        if class_name(node) == "SRCoulomb":
            weights.pop(f"outputs.{name}.rc")
            kwargs |= {key: value for key, value in node["kwargs"].items() if key in ("key_in", "key_out")}
        else:
            result[name] = copy.deepcopy(node)
    result[LONG_RANGE] = {"class": f"{MODULES}.LRCoulomb", "kwargs": kwargs}
    weights[f"outputs.{LONG_RANGE}.rc"] = torch.tensor(float(rc))
    return result


def take_out_sae(
    weights: dict[str, Tensor], species: Sequence[int], told: Mapping[int, float] | None
) -> tuple[dict[int, float], bool]:
    """Take self-atomic energies out of the atomic shifts, in place.

    Parameters
    ----------
    weights : dict
        State dictionary; its shifts are float32 afterwards.
    species : sequence of int
        Elements.
    told : mapping or None
        Self-atomic energies that the shifts contain, if it is known; otherwise all of the shifts is taken out.

    Returns
    -------
    sae : dict
        {Z: eV}.
    known : bool
        Whether it is what was ``told``.

    Raises
    ------
    CheckpointError
        Several tables of shifts, of which it is not known what they mean.
    """
    tables = [key for key in weights if is_type_table(key) and key.startswith("outputs.")]
    if len(tables) > 1:
        raise CheckpointError(f"several atomic shifts, where one is expected: {', '.join(tables)}")
    if not tables:
        return dict.fromkeys(species, 0.0), True
    shifts = weights[tables[0]].double()
    known = told is not None and all(z in told for z in species)
    sae = {z: float(told[z] if known and told is not None else shifts[z, 0]) for z in species}
    rest = torch.zeros_like(shifts)
    for z in species:
        rest[z] = shifts[z] - sae[z]
    weights[tables[0]] = rest.float()
    return sae, known


# --------------------------------------------------------------------------------------------------
# out
# --------------------------------------------------------------------------------------------------


def artifact_of_network(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    species: Sequence[int],
    sae: Mapping[int, float] | None,
    *,
    sae_with_shifts: bool = False,
    d3_params: Mapping[str, Any] | None = None,
    needs_coulomb: bool | None = None,
    needs_dispersion: bool | None = None,
    fidelity_name: str | None = None,
    level_of_theory: str | None = None,
) -> Artifact:
    """Turn a network of one fidelity into an artifact.

    Parameters
    ----------
    config : mapping
        ``class`` and ``kwargs``.
    weights : mapping
        Its state dictionary.
    species : sequence of int
        Elements that it was trained on; embedding rows of others become NaN.
    sae : mapping or None
        Self-atomic energies {Z: eV}, which go into the atomic shifts; None if they are there already.
    sae_with_shifts : bool
        They contain what was learned on top of self-atomic energies, as after `checkpoint_of_artifact`; then the file
        does not tell them.
    d3_params : mapping, optional
        s6, s8, a1, a2 of a D3(BJ) energy that is to be added.
    needs_coulomb, needs_dispersion : bool, optional
        Say that these energies are to be added, or not, whatever the configuration holds.
    fidelity_name, level_of_theory : str, optional
        Go into the metadata.

    Raises
    ------
    CheckpointError
        What the format, or the published package, has no place for.
    """
    species = sorted(species)
    outputs, d3_inside = _without_long_range(config["kwargs"]["outputs"])
    d3_params = d3_params or d3_inside
    coulomb = find_outputs(config["kwargs"]["outputs"], "LRCoulomb", "SRCoulomb")
    rc, envelope = _short_range(config["kwargs"]["outputs"], coulomb, weights)
    if coulomb:
        outputs[SHORT_RANGE] = {
            "class": f"{MODULES}.SRCoulomb",
            "kwargs": {"rc": rc, "key_in": "charges", "key_out": "energy", "envelope": envelope},
        }
    own = _own_weights(config, weights, outputs)
    own |= {f"outputs.{SHORT_RANGE}.rc": torch.tensor(rc)} if coulomb else {}
    _fit_tables(own, species)
    _bake(own, outputs, species, sae)
    cutoff = float(max(own[key] for key in ("aev.rc_s", "aev.rc_v")))
    if coulomb and rc > cutoff + 1e-6:
        raise CheckpointError(
            f"the short range of the Coulomb energy ({rc} Å) is beyond the cutoff of the network ({cutoff:.6g} Å); "
            "format 2 takes it from the pairs of the network and has no place for such a model"
        )
    return Artifact(
        config={"class": config["class"], "kwargs": {**config["kwargs"], "outputs": outputs}},
        weights=own,
        metadata=ModelMetadata(
            format_version=ARTIFACT_VERSION,
            cutoff=round(cutoff, 6),
            needs_coulomb=_needed("coulomb", needs_coulomb, bool(coulomb)),
            needs_dispersion=_needed("dispersion", needs_dispersion, d3_params is not None),
            coulomb_mode="sr_embedded" if coulomb else "none",
            coulomb_sr_rc=rc if coulomb else None,
            coulomb_sr_envelope=envelope if coulomb else None,
            d3_params=_d3_params(d3_params, needs_dispersion, outputs),
            implemented_species=species,
            has_embedded_lr=bool(coulomb) or LEARNED_DISPERSION in outputs,
            has_embedded_d3ts=LEARNED_DISPERSION in outputs,
            num_charge_channels=int(config["kwargs"].get("num_charge_channels", 1)),
            fidelity_names={} if fidelity_name is None else {0: fidelity_name},
            baked_sae=None if sae is None or sae_with_shifts else {z: float(sae[z]) for z in species},
            level_of_theory=level_of_theory,
        ),
    )


def _without_long_range(outputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Readouts that stay inside, and the parameters of a D3 energy that does not."""
    kept: dict[str, Any] = {}
    d3: dict[str, float] | None = None
    for name, node in outputs.items():
        cls, kwargs = class_name(node), dict(node.get("kwargs") or {})
        if cls not in READOUTS:
            raise CheckpointError(f"outputs.{name}: format 2 has no place for {cls}; it knows {', '.join(READOUTS)}")
        if cls in ("LRCoulomb", "SRCoulomb"):
            continue
        if cls == "DFTD3":
            if kwargs.get("s9"):
                raise CheckpointError(f"outputs.{name}: format 2 has no three-body dispersion (s9 = {kwargs['s9']})")
            d3 = {"s6": 1.0, **{key: float(kwargs[key]) for key in D3_KEYS if key in kwargs}}
            continue
        kwargs.pop("ptfile", None)  # its table is among the weights
        # The published package finds learned dispersion by this name.
        kept[LEARNED_DISPERSION if cls == "D3TS" else name] = {"class": f"{MODULES}.{cls}", "kwargs": kwargs}
    if d3 is not None and LEARNED_DISPERSION in kept:
        raise CheckpointError("the model has both D3 and learned dispersion (D3TS), which counts dispersion twice")
    return kept, d3


def _short_range(outputs: Mapping[str, Any], names: Sequence[str], weights: Mapping[str, Tensor]) -> tuple[float, str]:
    """Range (Å) and envelope of the short-range Coulomb energy."""
    if len(names) > 1:
        raise CheckpointError(f"format 2 has one Coulomb energy, the model has {len(names)}: {', '.join(names)}")
    if not names:
        return 4.6, "exp"
    kwargs = outputs[names[0]].get("kwargs") or {}
    for key, expected in (("key_in", "charges"), ("key_out", "energy")):
        if kwargs.get(key, expected) != expected:
            raise CheckpointError(
                f"outputs.{names[0]}.{key} is {kwargs[key]}; the Coulomb energy of format 2 needs {expected}"
            )
    stored = weights.get(f"outputs.{names[0]}.rc")
    rc = float(kwargs.get("rc", 4.6)) if stored is None else round(float(stored), 6)
    return rc, str(kwargs.get("envelope", "exp"))


def _own_weights(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], outputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Weights of what stays inside, with the tables that the published package expects among them."""
    # These hold nothing but tables and ranges.
    without = find_outputs(config["kwargs"]["outputs"], "D3TS", "DFTD3", "LRCoulomb", "SRCoulomb")
    own: dict[str, Tensor] = {}
    for key, value in weights.items():
        place, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if place != "outputs" or (name in outputs and name not in without):
            own[key] = value.detach().clone()
        elif name not in without and not is_expected_extra(key, config["kwargs"]["outputs"]):
            raise CheckpointError(
                f"{key} belongs to no readout of the model file; use the one that it was trained with"
            )
    for name in find_outputs(outputs, "Dipole", "Quadrupole"):
        own[f"outputs.{name}.mass"] = torch.tensor(ATOMIC_MASSES)
    if LEARNED_DISPERSION in outputs:
        table = D3TS(0.0, 0.0, 0.0).r4r2_charge().float()
        own[f"outputs.{LEARNED_DISPERSION}.r4r2"] = torch.nn.functional.pad(table, (0, len(ATOMIC_MASSES) - len(table)))
    return own


def _fit_tables(weights: dict[str, Tensor], species: Sequence[int]) -> None:
    """Bring tables over the elements to the published number of rows; mark elements that the network does not know."""
    beyond = [z for z in species if z >= PUBLISHED_ROWS]
    if beyond:
        raise CheckpointError(
            f"{element_names(beyond)}: the embedding of the published package ends at Z = {PUBLISHED_ROWS - 1}"
        )
    unknown = [z for z in range(1, PUBLISHED_ROWS) if z not in species]
    for key, value in weights.items():
        if is_type_table(key):
            table = value.new_zeros(PUBLISHED_ROWS, *value.shape[1:])
            rows = min(PUBLISHED_ROWS, len(value))
            table[:rows] = value[:rows]
            table[unknown] = torch.nan if key == "afv.weight" else 0.0
            weights[key] = table


def _bake(
    weights: dict[str, Tensor], outputs: dict[str, Any], species: Sequence[int], sae: Mapping[int, float] | None
) -> None:
    """Put self-atomic energies into the atomic shifts, in float64; a network without shifts gets some."""
    names = find_outputs(outputs, "AtomicShift")
    if names and names != [SHIFTS]:
        raise CheckpointError(f"the atomic shifts must be one readout with the name {SHIFTS}, found {', '.join(names)}")
    key = f"outputs.{SHIFTS}.shifts.weight"
    if not names:
        sums = find_outputs(outputs, "AtomicSum")
        if not sums:
            raise CheckpointError("the network has neither atomic shifts nor a sum over atoms among its outputs")
        shift = {"class": f"{MODULES}.AtomicShift", "kwargs": {"key_in": "energy", "key_out": "energy"}}
        items = list(outputs.items())
        items.insert(list(outputs).index(sums[0]), (SHIFTS, shift))
        outputs.clear()
        outputs.update(items)
        weights[key] = torch.zeros(PUBLISHED_ROWS, 1)
    table = weights[key].double()
    for z, energy in (sae or {}).items():
        if z in species:
            table[z] += energy
    weights[key] = table


def _needed(what: str, asked: bool | None, found: bool) -> bool:
    if asked is False and found and what == "coulomb":
        raise CheckpointError(
            "--no-coulomb: the model was trained with Coulomb energy beyond its short range, which has to be added"
        )
    return found if asked is None else asked


def _d3_params(given: Mapping[str, Any] | None, asked: bool | None, outputs: Mapping[str, Any]) -> D3Parameters | None:
    if not (given is not None if asked is None else asked):
        return None
    if given is None:
        raise CheckpointError(
            "--needs-dispersion: neither the model file nor the checkpoint has D3(BJ) parameters; name the functional "
            "(--dispersion-functional)"
        )
    if LEARNED_DISPERSION in outputs:
        raise CheckpointError("the model has learned dispersion (D3TS), and D3 would count dispersion twice")
    missing = [key for key in D3_KEYS if key not in given]
    if missing:
        raise CheckpointError(f"D3(BJ) parameters without {', '.join(missing)}")
    return D3Parameters(**{key: float(given[key]) for key in D3_KEYS})  # type: ignore[typeddict-item]
