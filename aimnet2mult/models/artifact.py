"""Format-2 artifacts, the files in which the AIMNet2 ecosystem hands models round: read, checked, and written.

An artifact is one network in one dictionary: ``model_yaml`` (its configuration), ``state_dict``, and metadata
(`ModelMetadata`). Self-atomic energies are part of its atomic shifts, in float64; embedding rows of elements that it
was not trained on are NaN. A network trained with long-range Coulomb energy holds its negative short-range part
(``SRCoulomb``), so that whoever uses it adds the whole Coulomb energy in the way that suits the system, and the D3
energy likewise: ``needs_coulomb``, ``needs_dispersion``.

A file may come from anywhere. It can name only classes of the lists below, it cannot name files, its sizes must be
those of the tensors that it really holds, and its numbers must be finite (`parse_artifact`).
"""

import itertools
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import torch
import yaml
from torch import Tensor

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import MAX_ATOMIC_NUMBER, TYPES_PER_FIDELITY, element_names
from aimnet2mult.dispersion import PUBLISHED_TABLES
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table
from aimnet2mult.models.safe_file import CheckpointError
from aimnet2mult.utils.files import atomic_path
from aimnet2mult.utils.text import first_line

logger = logging.getLogger(__name__)

ARTIFACT_VERSION = 2
"""Format version of artifacts; 1 stands for TorchScript files."""

D3_KEYS = ("s6", "s8", "a1", "a2")
COULOMB_MODES = ("sr_embedded", "full_embedded", "none")
ENVELOPES = ("exp", "cosine")

NETWORK = "aimnet2mult.models.aimnet2.AIMNet2"
MODULES = "aimnet2mult.modules"
"""Our names of the network and of the place of its readouts."""

READOUTS = (
    *("Output", "AtomicShift", "AtomicSum", "Dipole", "Quadrupole"),
    *("SRCoulomb", "LRCoulomb", "DFTD3", "D3TS", "DispParam"),
)
"""Readouts that an artifact may name."""

NETWORK_NAMES = (
    *("aimnet.models.AIMNet2", "aimnet.models.aimnet2.AIMNet2"),
    *("aimnet2mult.models.AIMNet2", NETWORK),
)
READOUT_PLACES = ("aimnet.modules", "aimnet.modules.core", "aimnet.modules.lr", MODULES)
"""Where the network and its readouts may be said to come from; all of them stand for ours."""

PUBLISHED_PLACES = {"DispParam": "aimnet.modules.lr"}
"""Modules of published names that are not ``aimnet.modules``."""

ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity", "LeakyReLU"),
    *("LogSigmoid", "Mish", "ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softplus", "Softshrink", "Softsign"),
    *("Tanh", "Tanhshrink"),
)
"""Classes of ``torch.nn`` that may stand between the layers of a network."""

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

MAX_YAML = 1_000_000
MAX_NODES, MAX_DEPTH = 10_000, 12
MAX_INTEGER = 1_000_000
"""Characters of ``model_yaml``; its mappings, lists and values, references to the same one counted each time, and how
deep they may be nested; its largest whole number."""


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
        {fidelity: {Z: eV}} to be added to the energies of the model; empty where they are inside.
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
    sae: dict[int, dict[int, float]]
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


def class_name(node: Mapping[str, Any]) -> str:
    """Name of the class of a configuration node, without its module."""
    return str(node["class"]).rpartition(".")[2]


def own_names(config: Any) -> Any:
    """Model configuration with classes of the published package replaced by ours, and without how weights start.

    Anything else is left as it is, right or wrong.
    """
    if not isinstance(config, dict) or config.get("class") not in NETWORK_NAMES:
        return config
    kwargs = config.get("kwargs")
    if not isinstance(kwargs, dict) or not isinstance(kwargs.get("outputs"), dict):
        return {**config, "class": NETWORK}
    named = {}
    for key, node in kwargs["outputs"].items():
        place, _, name = str(node.get("class") if isinstance(node, dict) else "").rpartition(".")
        if place in READOUT_PLACES[:-1] and name in READOUTS:
            own = dict(node.get("kwargs") or {})
            own.pop("requires_grad", None)
            if isinstance(own.get("mlp"), dict):
                own["mlp"] = {k: v for k, v in own["mlp"].items() if k != "weight_init_fn"}
            node = {**node, "class": f"{MODULES}.{name}", "kwargs": own}
        named[key] = node
    return {**config, "class": NETWORK, "kwargs": {**kwargs, "outputs": named}}


def find_outputs(outputs: Mapping[str, Any], *classes: str) -> list[str]:
    """Names of the readouts of certain classes."""
    return [name for name, node in outputs.items() if class_name(node) in classes]


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
            _refuse(f"format_version {version!r} is not known; known: {ARTIFACT_VERSION}")
        config = _parse_config(_entry(content, "model_yaml", str), trusted)
        weights = _parse_weights(_entry(content, "state_dict", Mapping), config)
        metadata = _parse_metadata(content, config, weights)
        _check_sizes(config["kwargs"], weights)
        _check_finite(weights, metadata["implemented_species"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    unknown = set(content) - {"model_yaml", "state_dict", EXTRA_ENTRY, *ModelMetadata.__annotations__}
    if unknown:
        logger.warning(f"{path}: entries of an unknown meaning are left alone: {', '.join(sorted(map(str, unknown)))}")
    return Artifact(config, weights, metadata)


def _refuse(message: str) -> NoReturn:
    raise CheckpointError(message)


def _entry(content: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in content:
        _refuse(f"the entry {key} is missing; a format-2 artifact needs model_yaml, state_dict and cutoff")
    if not isinstance(content[key], kind):
        _refuse(f"{key} is of the type {type(content[key]).__name__}, expected {kind.__name__}")
    return content[key]


# --- configuration ---


def _parse_config(text: str, trusted: Collection[str]) -> dict[str, Any]:
    """Configuration under our names, from that of the file."""
    if len(text) > MAX_YAML:
        _refuse(f"model_yaml has {len(text)} characters, more than any model needs")
    try:
        nodes = _tree(yaml.safe_load(text), MAX_DEPTH, [0])
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"model_yaml is not YAML of plain types: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise CheckpointError("model_yaml is nested too deeply") from error
    kwargs = _class_and_kwargs(nodes, "model_yaml")
    if nodes["class"] not in NETWORK_NAMES and nodes["class"] not in trusted:
        _refuse(f"model_yaml: class {nodes['class']!r} is not a network; known: {', '.join(NETWORK_NAMES[:2])}")
    outputs = kwargs.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        _refuse("model_yaml: outputs must be a mapping of readouts {name: {class, kwargs}}")
    for key, value in kwargs.items():
        if key != "outputs":
            _check_values(value, f"model_yaml: {key}")
    for name in outputs:
        # Names become those of modules.
        if not isinstance(name, str) or not name.isidentifier():
            _refuse(f"model_yaml: outputs: {name!r} cannot be the name of a readout")
        outputs[name] = _parse_output(outputs[name], f"model_yaml: outputs.{name}", trusted)
    network = nodes["class"] if nodes["class"] in trusted else NETWORK
    return {"class": network, "kwargs": {**kwargs, "outputs": outputs}}


def _tree(value: Any, depth: int, count: list[int]) -> Any:
    """Copy nested mappings, lists and values, so that no two places share one; refuse what is endless."""
    count[0] += 1
    if depth == 0 or count[0] > MAX_NODES:
        _refuse("model_yaml is nested too deeply, or endlessly")
    if isinstance(value, dict):
        return {_key(key): _tree(item, depth - 1, count) for key, item in value.items()}
    if isinstance(value, list):
        return [_tree(item, depth - 1, count) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            _refuse(f"model_yaml: {value:.3g} is larger than any size of a model")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            _refuse(f"model_yaml: {value} is not a finite number")
        return value
    if isinstance(value, str):
        return value
    return _refuse(f"model_yaml: a value of the type {type(value).__name__}, expected numbers and text")


def _key(key: Any) -> Any:
    if isinstance(key, bool) or not isinstance(key, str | int):
        _refuse(f"model_yaml: {key!r} cannot be a key")
    return key


def _class_and_kwargs(node: Any, where: str) -> dict[str, Any]:
    """Arguments of a ``{class, kwargs}`` node."""
    if not isinstance(node, dict) or not isinstance(node.get("class"), str):
        _refuse(f"{where}: expected a mapping with the key class")
    for key in node:
        if key not in ("class", "kwargs"):
            _refuse(f"{where}: the key {key!r} is not allowed, only class and kwargs (arguments by name)")
    kwargs = node.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        _refuse(f"{where}: kwargs must be a mapping, found {type(kwargs).__name__}")
    return kwargs


def _parse_output(node: Any, where: str, trusted: Collection[str]) -> dict[str, Any]:
    kwargs = dict(_class_and_kwargs(node, where))
    place, _, name = node["class"].rpartition(".")
    if node["class"] in trusted:
        return {"class": node["class"], "kwargs": kwargs}
    if place not in READOUT_PLACES or name not in READOUTS:
        _refuse(
            f"{where}: class {node['class']!r} is not one that a model file may name; known: "
            f"{READOUT_PLACES[0]}.{{{', '.join(READOUTS)}}}. A class of your own must be given as trusted"
        )
    if name == "Output":
        kwargs["mlp"] = _parse_mlp(kwargs.get("mlp"), f"{where}.mlp")
    elif name == "AtomicShift":
        kwargs.pop("num_types", None)
        kwargs.pop("requires_grad", None)
        _only_default(kwargs, "reduce_sum", False, where)
    elif name == "LRCoulomb":
        _only_default(kwargs, "subtract_sr", True, where)
    elif name == "DispParam" and kwargs.get("ptfile") is not None:
        _refuse(f"{where}: ptfile names a file on disk, which a model file must not; the table belongs to its weights")
    for key, value in kwargs.items():
        if key != "mlp":
            _check_values(value, f"{where}.{key}")
    return {"class": f"{MODULES}.{name}", "kwargs": kwargs}


def _parse_mlp(mlp: Any, where: str) -> dict[str, Any]:
    """Arguments of a network of a readout; how its weights once started does not matter any more."""
    if not isinstance(mlp, dict):
        _refuse(f"{where}: expected a mapping, found {type(mlp).__name__}")
    mlp = dict(mlp)
    start = mlp.pop("weight_init_fn", None)
    if start is not None and not str(start).startswith("torch.nn.init."):
        _refuse(f"{where}: weight_init_fn {start!r} is not one of torch.nn.init")
    if mlp.pop("activation_kwargs", None):
        _refuse(f"{where}: activation_kwargs: activations with arguments are not supported")
    place, _, name = str(mlp.get("activation_fn", "torch.nn.GELU")).rpartition(".")
    if place not in ("torch.nn", "torch.nn.modules.activation") or name not in ACTIVATIONS:
        _refuse(f"{where}: activation_fn {mlp['activation_fn']!r} is not one of torch.nn: {nearest(name, ACTIVATIONS)}")
    mlp["activation_fn"] = f"torch.nn.{name}"
    for key, value in mlp.items():
        _check_values(value, f"{where}.{key}")
    if isinstance(mlp.get("hidden"), list):
        mlp["hidden"] = [width for width in mlp["hidden"] if width]
    return mlp


def _only_default(kwargs: dict[str, Any], key: str, default: Any, where: str) -> None:
    """Take an argument away that we do not have, provided that it says what we do."""
    if kwargs.pop(key, default) != default:
        _refuse(f"{where}: {key} other than {str(default).lower()} is not supported")


def _check_values(value: Any, where: str) -> None:
    """Refuse text that could name a file, and classes where none belong."""
    if isinstance(value, dict):
        if "class" in value:
            _refuse(f"{where}: no class may be named here")
        for item in value.values():
            _check_values(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, where)
    elif isinstance(value, str) and any(sign in value for sign in "/\\~$"):
        _refuse(f"{where}: {value[:60]!r} looks like the name of a file, which a model file must not name")


# --- weights ---


def _parse_weights(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors that the configuration needs, atomic shifts in float64."""
    outputs = config["kwargs"]["outputs"]
    kept: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not isinstance(key, str):
            _refuse(f"state_dict: {key!r} is not the name of a weight")
        if not isinstance(value, Tensor):
            _refuse(f"state_dict: {key} is of the type {type(value).__name__}, expected a tensor")
        if is_expected_extra(key, outputs):
            continue
        if value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
            _refuse(f"state_dict: {key} is not a plain tensor of floating-point numbers but {_kind(value)}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            _refuse(f"state_dict: {key} has the shape {tuple(value.shape)}, but the file holds fewer numbers for it")
        value = value.detach()
        if key.endswith(".shifts.weight"):
            value = value.double()
        elif value.element_size() < 4:
            value = value.float()
        kept[key] = value
    table = kept.get("afv.weight")
    if table is None or table.dim() != 2:
        _refuse("state_dict: afv.weight, the embedding of the elements, is missing or not a matrix")
    if not 2 <= len(table) <= TYPES_PER_FIDELITY:
        _refuse(f"state_dict: afv.weight has {len(table)} rows, expected one for each element and the first for none")
    for name in find_outputs(outputs, "SRCoulomb", "LRCoulomb"):
        kept.setdefault(f"outputs.{name}.rc", torch.tensor(float(outputs[name]["kwargs"].get("rc", 4.6))))
    return kept


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


def _kind(value: Tensor) -> str:
    return f"{value.dtype}, {value.layout}, {value.device.type}".replace("torch.", "")


def _check_sizes(kwargs: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Compare the number of weights that the configuration asks for with that of the file, before anything is built."""
    wanted = _count_weights(kwargs)
    names = tuple(f"outputs.{name}.mlp." for name in find_outputs(kwargs["outputs"], "Output"))
    held = sum(v.numel() for key, v in weights.items() if key.startswith(("conv_a.", "conv_q.", "mlps.", *names)))
    if wanted != held:
        _refuse(f"model_yaml describes a network of {wanted:,} weights, state_dict holds {held:,}")


def _count_weights(kwargs: Mapping[str, Any]) -> int:
    """Number of weights of convolutions and networks (equations: `aimnet2mult.models.aimnet2`)."""
    aev = kwargs.get("aev")
    if not isinstance(aev, dict):
        _refuse("model_yaml: aev must be a mapping")
    n_s, n_v = (
        len(shifts) if isinstance(shifts := aev.get(f"shifts_{part}"), list) else aev.get(f"nshifts_{part}")
        for part in "sv"
    )
    n_s = _size(16 if n_s is None else n_s, "aev.nshifts_s")
    n_v = n_s if n_v is None else _size(n_v, "aev.nshifts_v")
    n_feature, n_comb = _size(kwargs.get("nfeature"), "nfeature"), _size(kwargs.get("ncomb_v"), "ncomb_v")
    aim, channels = _size(kwargs.get("aim_size"), "aim_size"), kwargs.get("num_charge_channels", 1)
    channels = _size(channels, "num_charge_channels")
    hidden = kwargs.get("hidden")
    if not isinstance(hidden, list) or not all(isinstance(widths, list) for widths in hidden):
        _refuse("model_yaml: hidden must be a list of lists, the widths of each pass")
    flat = n_feature * (n_s if kwargs.get("d2features") else 1)
    a_in = flat + n_feature * (n_s + n_comb)
    q_in = channels + channels * (n_s + n_comb)
    total = (n_feature + channels) * n_v * n_comb
    for p, inner in enumerate(hidden):
        widths = [_size(width, f"hidden.{p}") for width in inner]
        last = p == len(hidden) - 1
        total += _count_mlp([a_in + (q_in if p else 0), *widths, aim if last else flat + 2 * channels], True)
    for name in find_outputs(kwargs["outputs"], "Output"):
        given = kwargs["outputs"][name]["kwargs"]
        where = f"outputs.{name}"
        widths = [_size(width, f"{where}.mlp.hidden") for width in given["mlp"].get("hidden") or []]
        ends = _size(given.get("n_in"), f"{where}.n_in"), _size(given.get("n_out"), f"{where}.n_out")
        total += _count_mlp([ends[0], *widths, ends[1]], bool(given["mlp"].get("bias", True)))
    return total


def _count_mlp(widths: Sequence[int], bias: bool) -> int:
    return sum((a + bias) * b for a, b in itertools.pairwise(widths))


def _size(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(f"model_yaml: {where} must be a positive whole number, found {value!r}")
    return value


def _check_finite(weights: Mapping[str, Tensor], species: Sequence[int]) -> None:
    """Refuse numbers that are not finite, except in rows of elements that the model does not know."""
    for key, value in weights.items():
        checked = value[[0, *species]] if is_type_table(key) and value.dim() == 2 else value
        if not bool(torch.isfinite(checked).all()):
            of = " in rows of implemented_species" if is_type_table(key) else ""
            _refuse(
                f"state_dict: {key} holds NaN or infinite values{of}; the training diverged, or the file is damaged"
            )
        if value is not checked and bool(torch.isinf(value).any()):
            _refuse(f"state_dict: {key} holds infinite values")


# --- metadata ---


def _parse_metadata(
    content: Mapping[str, Any], config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> ModelMetadata:
    kwargs = config["kwargs"]
    outputs = kwargs["outputs"]
    cutoff = _number(_entry(content, "cutoff", object), "cutoff", positive=True)
    ranges = [float(weights[key]) for key in ("aev.rc_s", "aev.rc_v") if key in weights and weights[key].numel() == 1]
    if ranges and abs(max(ranges) - cutoff) > 1e-4:
        _refuse(f"cutoff is {cutoff} Å, but the network reaches {max(ranges):.6g} Å")
    flags = {
        key: _flag(content, key)
        for key in ("needs_coulomb", "needs_dispersion", "has_embedded_lr", "has_embedded_d3ts")
    }
    mode, rc, envelope = _parse_coulomb(content, outputs, cutoff, flags["needs_coulomb"])
    d3_params = _parse_d3(content, outputs, flags["needs_dispersion"])
    for key, kind in (("family", str), ("supports_charged_systems", bool)):
        if content.get(key) is not None and not isinstance(content[key], kind):
            _refuse(f"{key} must be of the type {kind.__name__} or absent, found {content[key]!r}")
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
    if mode not in COULOMB_MODES:
        _refuse(f"coulomb_mode {mode!r} is not one of {', '.join(COULOMB_MODES)}")
    short, full = find_outputs(outputs, "SRCoulomb"), find_outputs(outputs, "LRCoulomb")
    held = {"sr_embedded": (1, 0), "full_embedded": (0, 1), "none": (0, 0)}[mode]
    if (len(short), len(full)) != held:
        found = ", ".join(f"{class_name(outputs[name])} ({name})" for name in [*short, *full]) or "no Coulomb energy"
        _refuse(f"coulomb_mode is {mode}, but model_yaml has {found} among its outputs")
    if mode != "sr_embedded":
        if needed and mode == "full_embedded":
            _refuse("needs_coulomb is set, but coulomb_mode full_embedded says that the model has all of it")
        return mode, None, None
    if not needed:
        _refuse("coulomb_mode sr_embedded needs the full Coulomb energy from outside, but needs_coulomb is not set")
    rc = _number(content.get("coulomb_sr_rc"), "coulomb_sr_rc", positive=True)
    envelope = content.get("coulomb_sr_envelope")
    if envelope not in ENVELOPES:
        _refuse(f"coulomb_sr_envelope {envelope!r} is not one of {', '.join(ENVELOPES)}")
    if rc > cutoff + 1e-6:
        _refuse(f"coulomb_sr_rc is {rc} Å, beyond the cutoff of the network ({cutoff} Å), whose pairs it uses")
    kwargs = outputs[short[0]]["kwargs"]
    if kwargs.get("rc", 4.6) != rc or kwargs.get("envelope", "exp") != envelope:
        _refuse(f"coulomb_sr_rc and coulomb_sr_envelope are {rc} Å, {envelope}, but model_yaml has {kwargs}")
    return mode, rc, str(envelope)


def _parse_d3(content: Mapping[str, Any], outputs: Mapping[str, Any], needed: bool) -> D3Parameters | None:
    learned = find_outputs(outputs, "D3TS")
    if bool(content.get("has_embedded_d3ts", bool(learned))) != bool(learned):
        _refuse("has_embedded_d3ts contradicts model_yaml")
    given = content.get("d3_params")
    if not needed:
        return None
    if embedded := [*learned, *find_outputs(outputs, "DFTD3")]:
        _refuse(f"needs_dispersion is set, but the model has a dispersion energy of its own ({embedded[0]})")
    if not isinstance(given, Mapping):
        _refuse("needs_dispersion is set, but d3_params is missing: s8, a1, a2 (and s6)")
    values = {key: _number(given.get(key, 1.0 if key == "s6" else None), f"d3_params.{key}") for key in D3_KEYS}
    if values["a1"] < 0.0 or values["a2"] < 0.0:
        _refuse(f"d3_params: a1 and a2 must not be negative, found {values['a1']} and {values['a2']}")
    return D3Parameters(**values)  # type: ignore[typeddict-item]


def _parse_species(content: Mapping[str, Any], table: Tensor) -> list[int]:
    known = [z for z in range(1, len(table)) if not bool(table[z].isnan().any())]
    given = content.get("implemented_species")
    if given is None:
        given = [z for z in known if z <= MAX_ATOMIC_NUMBER]
    if not isinstance(given, list) or not given or any(type(z) is not int for z in given):
        _refuse(f"implemented_species must be a list of atomic numbers, found {given!r:.80}")
    without = sorted(z for z in set(given) if z not in known or z > MAX_ATOMIC_NUMBER)
    if without:
        _refuse(f"implemented_species has {element_names(without)}, which the embedding (afv.weight) does not know")
    return sorted(set(given))


def _parse_extra(extra: Any) -> tuple[dict[int, float] | None, str | None, str | None]:
    """Self-atomic energies inside the shifts, level of theory and name, if this package wrote the file."""
    if not isinstance(extra, Mapping):
        _refuse(f"{EXTRA_ENTRY} must be a mapping, found {type(extra).__name__}")
    sae = extra.get("sae")
    if sae is not None:
        if not isinstance(sae, Mapping) or any(type(z) is not int for z in sae):
            _refuse(f"{EXTRA_ENTRY}.sae must be a mapping of atomic numbers to energies, eV")
        sae = {z: _number(energy, f"{EXTRA_ENTRY}.sae.{z}") for z, energy in sae.items()}
    for key in ("level_of_theory", "fidelity_name"):
        if extra.get(key) is not None and not isinstance(extra[key], str):
            _refuse(f"{EXTRA_ENTRY}.{key} must be text")
    return sae, extra.get("level_of_theory"), extra.get("fidelity_name")


def _flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if type(value) is not bool:
        _refuse(f"{key} must be true or false, found {value!r}")
    return value


def _number(value: Any, where: str, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(f"{where} must be a finite number, found {value!r}")
    if positive and not value > 0.0:
        _refuse(f"{where} must be positive, found {value}")
    return float(value)


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a network under the names of the published package."""
    kwargs = {key: value for key, value in config["kwargs"].items() if key not in ("num_types", "outputs")}
    outputs = {}
    for name, node in config["kwargs"]["outputs"].items():
        cls = class_name(node)
        own = {key: value for key, value in (node.get("kwargs") or {}).items() if key != "num_types"}
        outputs[name] = {"class": f"{PUBLISHED_PLACES.get(cls, READOUT_PLACES[0])}.{cls}", "kwargs": own}
    return {"class": NETWORK_NAMES[0], "kwargs": {**kwargs, "outputs": outputs}}


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
    parse_artifact(content, path)
    with atomic_path(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written; is the disk full? ({first_line(error)})") from error
