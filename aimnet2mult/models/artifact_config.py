"""Configuration of a network as a file brings it: which classes it may name, and how large it may be."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import yaml
from torch import Tensor, nn

from aimnet2mult.config.builder import nearest
from aimnet2mult.models.safe_file import CheckpointError

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

MAX_YAML = 100_000
MAX_NODES, MAX_DEPTH = 10_000, 12
MAX_INTEGER = 1_000_000
MAX_READOUTS = 32
"""Characters of ``model_yaml``; its mappings, lists and values, references to the same one counted each time, and how
deep they may be nested; its largest whole number; readouts of a network."""

KEPT_NAMES = {
    "lrcoulomb": ("LRCoulomb",),
    "dftd3": ("DFTD3", "D3TS"),
    "d3bj": ("DFTD3", "D3TS"),
    "self_atomic_energies": (),
}
"""Names of readouts that mean something to whoever puts a model together, and the classes that may have them."""


def refuse(message: str) -> NoReturn:
    """Raise `CheckpointError`."""
    raise CheckpointError(message)


def shown(value: Any) -> str:
    """Return a value of a file as a few characters of one line, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "...")
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"something of the type {type(value).__name__}"


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
        given = (node.get("kwargs") or {}) if isinstance(node, dict) else None
        if place in READOUT_PLACES[:-1] and name in READOUTS and isinstance(given, dict):
            own = dict(given)
            own.pop("requires_grad", None)
            if isinstance(own.get("mlp"), dict):
                own["mlp"] = {k: v for k, v in own["mlp"].items() if k != "weight_init_fn"}
            node = {**node, "class": f"{MODULES}.{name}", "kwargs": own}
        named[key] = node
    return {**config, "class": NETWORK, "kwargs": {**kwargs, "outputs": named}}


def find_outputs(outputs: Mapping[str, Any], *classes: str) -> list[str]:
    """Names of the readouts of certain classes."""
    return [name for name, node in outputs.items() if class_name(node) in classes]


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a network under the names of the published package."""
    kwargs = {key: value for key, value in config["kwargs"].items() if key not in ("num_types", "outputs")}
    outputs = {}
    for name, node in config["kwargs"]["outputs"].items():
        cls = class_name(node)
        own = {k: value for k, value in (node.get("kwargs") or {}).items() if k not in ("num_types", "zero_start")}
        outputs[name] = {"class": f"{PUBLISHED_PLACES.get(cls, READOUT_PLACES[0])}.{cls}", "kwargs": own}
    return {"class": NETWORK_NAMES[0], "kwargs": {**kwargs, "outputs": outputs}}


def parse_config(text: str, trusted: Collection[str] = ()) -> dict[str, Any]:
    """Configuration under our names, from the text of a file.

    Parameters
    ----------
    text : str
        YAML with ``class`` and ``kwargs`` of the network.
    trusted : collection of str
        Dotted names of further classes that it may name.

    Raises
    ------
    CheckpointError
        The first thing that is wrong.
    """
    if len(text) > MAX_YAML:
        refuse(f"model_yaml has {len(text):,} characters, more than any model needs")
    try:
        _check_events(text)
        nodes = yaml.safe_load(text)
    except CheckpointError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"model_yaml is not YAML of plain types: {reason:.300}") from error
    return check_config(nodes, trusted)


def check_config(
    nodes: Any, trusted: Collection[str] = (), where: str = "model_yaml", readouts: Sequence[str] = READOUTS
) -> dict[str, Any]:
    """Configuration under our names, from nested mappings, lists and plain values.

    Parameters
    ----------
    nodes : mapping
        ``class`` and ``kwargs`` of the network; left as it is.
    trusted : collection of str
        As in `parse_config`.
    where : str
        Place in the file, for messages.
    readouts : sequence of str
        Classes of readouts that it may name.

    Raises
    ------
    CheckpointError
        The first thing that is wrong.
    """
    nodes = _tree(nodes, MAX_DEPTH, [0])
    kwargs = _class_and_kwargs(nodes, where)
    if nodes["class"] not in NETWORK_NAMES and nodes["class"] not in trusted:
        refuse(f"{where}: class {shown(nodes['class'])} is not a network; known: {', '.join(NETWORK_NAMES[:2])}")
    outputs = kwargs.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        refuse(f"{where}: outputs must be a mapping of readouts {{name: {{class, kwargs}}}}")
    if len(outputs) > MAX_READOUTS:
        refuse(f"{where}: {len(outputs)} outputs, more than any model has ({MAX_READOUTS})")
    for key, value in kwargs.items():
        if key != "outputs":
            _check_values(value, f"{where}: {key}")
    parsed = {name: _parse_output(name, node, f"{where}: outputs", trusted, readouts) for name, node in outputs.items()}
    for cls in ("DFTD3", "D3TS"):
        if len(names := find_outputs(parsed, cls)) > 1:
            refuse(f"{where}: {cls} is among the outputs {len(names)} times ({', '.join(names[:3])})")
    network = nodes["class"] if nodes["class"] in trusted else NETWORK
    return {"class": network, "kwargs": {**kwargs, "outputs": parsed}}


def _check_events(text: str) -> None:
    """Refuse text that is deep, long or that multiplies itself, before anything is made of it."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or count > 2 * MAX_NODES:
            refuse("model_yaml is nested too deeply, or endlessly")
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<":
            refuse("model_yaml merges mappings (<<), which model files do not")


def _tree(value: Any, depth: int, count: list[int]) -> Any:
    """Copy nested mappings, lists and values, so that no two places share one; refuse what is endless."""
    count[0] += 1
    if depth == 0 or count[0] > MAX_NODES:
        refuse("the configuration is nested too deeply, or endlessly")
    if isinstance(value, dict):
        return {_key(key): _tree(item, depth - 1, count) for key, item in value.items()}
    if isinstance(value, list):
        return [_tree(item, depth - 1, count) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            refuse(f"the configuration: {shown(value)} is larger than any size of a model")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            refuse(f"the configuration: {value} is not a finite number")
        return value
    if isinstance(value, str):
        return value
    return refuse(f"the configuration: a value of the type {type(value).__name__}, expected numbers and text")


def _key(key: Any) -> Any:
    if isinstance(key, bool) or not isinstance(key, str | int):
        refuse(f"the configuration: {shown(key)} cannot be a key")
    return key


def _class_and_kwargs(node: Any, where: str) -> dict[str, Any]:
    """Arguments of a ``{class, kwargs}`` node."""
    if not isinstance(node, dict) or not isinstance(node.get("class"), str):
        refuse(f"{where}: expected a mapping with the key class")
    for key in node:
        if key not in ("class", "kwargs"):
            refuse(f"{where}: the key {shown(key)} is not allowed, only class and kwargs (arguments by name)")
    kwargs = node.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        refuse(f"{where}: kwargs must be a mapping, found {type(kwargs).__name__}")
    return kwargs


def _parse_output(key: Any, node: Any, where: str, trusted: Collection[str], readouts: Sequence[str]) -> dict[str, Any]:
    # Names become those of modules.
    if not isinstance(key, str) or not key.isidentifier() or key.startswith("_") or hasattr(nn.ModuleDict(), key):
        refuse(f"{where}: {shown(key)} cannot be the name of a readout")
    where = f"{where}.{key:.60}"
    kwargs = dict(_class_and_kwargs(node, where))
    place, _, name = node["class"].rpartition(".")
    if name not in KEPT_NAMES.get(key, (name,)):
        refuse(f"{where}: the name is kept for {' or '.join(KEPT_NAMES[key]) or 'self-atomic energies'}")
    if node["class"] in trusted:
        return {"class": node["class"], "kwargs": kwargs}
    if place not in READOUT_PLACES or name not in readouts:
        refuse(
            f"{where}: class {shown(node['class'])} is not one that a model file may name, nor was it given as "
            f"trusted; of {READOUT_PLACES[0]}, {nearest(name[:60], readouts)}"
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
        refuse(f"{where}: ptfile names a file on disk, which a model file must not; the table belongs to its weights")
    for option, value in kwargs.items():
        if str(option).startswith("key_") and not isinstance(value, str):
            refuse(f"{where}.{option}: expected the name of a key of the batch, found {shown(value)}")
        if option != "mlp":
            _check_values(value, f"{where}.{option}")
    return {"class": f"{MODULES}.{name}", "kwargs": kwargs}


def _parse_mlp(mlp: Any, where: str) -> dict[str, Any]:
    """Arguments of a network of a readout; how its weights once started does not matter any more."""
    if not isinstance(mlp, dict):
        refuse(f"{where}: expected a mapping, found {type(mlp).__name__}")
    mlp = dict(mlp)
    start = mlp.pop("weight_init_fn", None)
    if start is not None and not str(start).startswith("torch.nn.init."):
        refuse(f"{where}: weight_init_fn {shown(start)} is not one of torch.nn.init")
    if mlp.pop("activation_kwargs", None):
        refuse(f"{where}: activation_kwargs: activations with arguments are not supported")
    place, _, name = str(mlp.get("activation_fn", "torch.nn.GELU")).rpartition(".")
    if place not in ("torch.nn", "torch.nn.modules.activation") or name not in ACTIVATIONS:
        refuse(
            f"{where}: activation_fn {shown(mlp['activation_fn'])} is not one of torch.nn: "
            f"{nearest(name[:60], ACTIVATIONS)}"
        )
    mlp["activation_fn"] = f"torch.nn.{name}"
    _check_values(mlp, where)
    hidden = mlp.get("hidden") or []
    if not isinstance(hidden, list):
        refuse(f"{where}.hidden: expected a list of widths, found {shown(hidden)}")
    mlp["hidden"] = [width for width in hidden if width]
    return mlp


def _only_default(kwargs: dict[str, Any], key: str, default: Any, where: str) -> None:
    """Take an argument away that we do not have, provided that it says what we do."""
    if kwargs.pop(key, default) != default:
        refuse(f"{where}: {key} other than {str(default).lower()} is not supported")


def _check_values(value: Any, where: str) -> None:
    """Refuse text that could name a file, and classes where none belong."""
    if isinstance(value, dict):
        if "class" in value:
            refuse(f"{where}: no class may be named here")
        for item in value.values():
            _check_values(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, where)
    elif isinstance(value, str) and any(sign in value for sign in "/\\~$"):
        refuse(f"{where}: {shown(value)} looks like the name of a file, which a model file must not name")


def check_sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Compare the number of weights that a configuration asks for with those there are, before anything is built.

    Parameters
    ----------
    config : mapping
        As `parse_config` returns it.
    weights : mapping
        State dictionary.

    Raises
    ------
    CheckpointError
        The numbers differ, or a size is not one.
    """
    kwargs = config["kwargs"]
    wanted = _count_weights(kwargs)
    names = tuple(f"outputs.{name}.mlp." for name in find_outputs(kwargs["outputs"], "Output"))
    held = sum(v.numel() for key, v in weights.items() if key.startswith(("conv_a.", "conv_q.", "mlps.", *names)))
    if wanted != held:
        refuse(f"the configuration describes a network of {wanted:,} weights, state_dict holds {held:,}")


def _count_weights(kwargs: Mapping[str, Any]) -> int:
    """Number of weights of convolutions and networks (equations: `aimnet2mult.models.aimnet2`)."""
    aev = kwargs.get("aev")
    if not isinstance(aev, dict):
        refuse("the configuration: aev must be a mapping")
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
        refuse("the configuration: hidden must be a list of lists, the widths of each pass")
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
        widths = [_size(width, f"{where}.mlp.hidden") for width in given["mlp"]["hidden"]]
        ends = _size(given.get("n_in"), f"{where}.n_in"), _size(given.get("n_out"), f"{where}.n_out")
        total += _count_mlp([ends[0], *widths, ends[1]], bool(given["mlp"].get("bias", True)))
    return total


def _count_mlp(widths: Sequence[int], bias: bool) -> int:
    return sum((a + bias) * b for a, b in itertools.pairwise(widths))


def _size(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse(f"the configuration: {where} must be a positive whole number, found {shown(value)}")
    return value
