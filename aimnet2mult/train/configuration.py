"""The settings of a training run: their types, where they come from, and what is refused.

Settings come from three places, each overriding the one before: the packaged
``config/default_train_mixed_fidelity.yaml`` (the one home of the defaults), the user's file, and ``key=value`` on the
command line. The dataclasses below are the schema: a key that is not here is refused, a value of another type too.
What belongs together is then checked by small functions that return messages; all messages come in one error, before
any data is read.

A file replaces the packaged settings key by key; what it says under ``kwargs`` (a loss's ``components``, the ``cfg``
of the metrics) replaces the packaged entry as a whole, so a file that lists two loss components trains on two. An
override on the command line changes the one value that it names. An entry of these mappings, or of
``optimizer.param_groups``, is removed by setting it to null.
"""

# ruff: noqa: RUF009 - `option` makes the field of a dataclass, as dataclasses.field does

import importlib.util
import inspect
import math
import re
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError, nearest, resolve
from aimnet2mult.constants import TYPES_PER_FIDELITY
from aimnet2mult.data.base import INPUT_KEYS
from aimnet2mult.data.ledger import CACHES, parse_dispersion, subtraction
from aimnet2mult.data.mixed import LABEL_KEYS
from aimnet2mult.data.sampler import BATCH_MODES, SHARES_TOLERANCE, STRATEGIES
from aimnet2mult.data.sgdataset import expand_files
from aimnet2mult.train.utils import Schedule, accepted_keywords, reference_optimizer, scheduler_unit

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "config" / "default_train_mixed_fidelity.yaml"
"""The packaged settings."""

SAE_MODES = ("linreg",)
WANDB_MODES = ("online", "offline", "disabled")
SCHEDULER_UNITS = ("iteration", "epoch", "validation")

FIDELITY_NAME = re.compile(r"[^\W\d][\w+-]*")
"""What a fidelity may be called: part of the names of metrics and of settings on the command line."""


# --------------------------------------------------------------------------------------------------
# schema
# --------------------------------------------------------------------------------------------------


def option(meaning: str, default: Any = MISSING) -> Any:
    """Field of the schema with a line on its meaning; without ``default`` the packaged file must hold one.

    Defaults stand here only in sections that may be absent (``wandb``, ``scheduler``).
    """
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class SAEFilesConfig:
    """Self-atomic energies that are subtracted from the energies."""

    files: dict[int, Path] = option("fidelity -> YAML file {Z: eV}, made by aimnet2mult.train.calc_sae")
    file: Path | None = option("the one SAE file of a run with one dataset")
    mode: str = option("how energies are referenced: linreg (minus the sum of the atoms' SAE)")


@dataclass
class SAEConfig:
    """SAE per property."""

    energy: SAEFilesConfig = field(default_factory=SAEFilesConfig)


@dataclass
class SamplerKwargsConfig:
    """How batches are drawn."""

    batch_size: int = option("molecules or atoms per batch (all processes together share an epoch), see batch_mode")
    batch_mode: str = option("what batch_size counts: molecules or atoms")
    shuffle: bool = option("new random batches in every epoch")
    batches_per_epoch: int = option("batches of each process in an epoch; -1: as many as the data gives")
    sampling_strategy: str = option("weighted (by the weights), uniform (every molecule alike), balanced or shares")
    shares: dict[str, float] = option("fidelity -> share of the drawn molecules, sum 1; for sampling_strategy: shares")
    max_padding: float = option("largest share of padding among the atoms of an epoch's batches, in [0, 1)")


@dataclass
class SamplerConfig:
    """A sampler."""

    kwargs: SamplerKwargsConfig = field(default_factory=SamplerKwargsConfig)


@dataclass
class SamplersConfig:
    """Samplers of training and validation."""

    train: SamplerConfig = field(default_factory=SamplerConfig)
    val: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass
class LoaderConfig:
    """How batches are read."""

    num_workers: int = option("reader processes; 0 reads in the training process")
    pin_memory: bool = option("page-locked memory for faster copies to a GPU; without one it has no effect")
    prefetch_factor: int | None = option("batches that each reader process prepares ahead; null: 2")
    persistent_workers: bool | None = option("keep the reader processes between epochs; null: yes")


@dataclass
class LoadersConfig:
    """Loaders of training and validation."""

    train: LoaderConfig = field(default_factory=LoaderConfig)
    val: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass
class FidelityConfig:
    """A fidelity with a name."""

    files: list[Path] = option("HDF5 files that are one dataset; one name, a list, patterns such as part_*.h5", [])
    val_files: list[Path] | None = option("the same for validation; null: a split of files", None)
    weight: float = option("how often its molecules are drawn, relative", 1.0)
    sae: Path | None = option("YAML file {Z: eV}, made by aimnet2mult.train.calc_sae", None)
    dispersion: Any = option(
        "what dispersion the labels contain: none, {d3bj: functional or parameters}, {d4: ...}, vv10, unknown", None
    )
    subtract_dispersion: bool = option("take that dispersion off energies and forces as they are read", False)
    level: str | None = option("level of theory in words, such as wB97M-D3BJ/def2-TZVPP", None)


@dataclass
class DataConfig:
    """Datasets, their references and how batches are made of them."""

    fidelities: dict[str, FidelityConfig] = option("name -> fidelity, in the order of their numbers 0..F-1")
    fidelity_datasets: dict[int, list[Path]] = option("without names: fidelity 0..F-1 -> HDF5 file or files")
    fidelity_weights: dict[int, float] = option("fidelity -> how often its molecules are drawn, relative; default 1")
    val_fidelity_datasets: dict[int, list[Path]] | None = option("fidelity -> file for validation; null: split")
    sae: SAEConfig | None = option("SAE files; null trains on total energies")
    val_fraction: float = option("share of each fidelity's molecules used for validation, in [0, 1)")
    val_split_by: str = option(
        "what a split keeps together: molecule (nothing), composition (equal formulas, in all fidelities), or an array "
        "of the files such as mol_id"
    )
    separate_val: bool = option("take the validation molecules out of the training data")
    dispersion_cache: str = option("dispersion to subtract: disk (computed once, beside the data) or none (when read)")
    ddp_load_full_dataset: bool = option("no effect: every process reads from disk what it draws")
    x: list[str] = option("inputs of the model: coord, numbers, charge, mult")
    y: list[str] = option("labels that are read; those that a dataset lacks are masked")
    samplers: SamplersConfig = field(default_factory=SamplersConfig)
    loaders: LoadersConfig = field(default_factory=LoadersConfig)


@dataclass
class LossConfig:
    """The loss."""

    class_: str = option("dotted name of the loss")
    kwargs: dict[str, Any] = option("its arguments; components: {name: {fn, weight, kwargs}}")


@dataclass
class GradClipConfig:
    """Gradient clipping."""

    max_norm: float | None = option("largest norm of the gradient of all weights together; null: no clipping")


@dataclass
class OptimizerConfig:
    """The optimiser and what it trains."""

    class_: str = option("dotted name of the optimiser")
    kwargs: dict[str, Any] = option("its arguments; lr is the base rate")
    param_groups: dict[str, Any] = option("name -> {re: pattern of weight names, and arguments for these weights}")
    force_train: list[str] = option("patterns of weight names that are trained although their module says no")
    force_no_train: list[str] = option("patterns of weight names that are kept fixed")
    grad_clip: GradClipConfig = field(default_factory=GradClipConfig)


@dataclass
class SchedulerConfig:
    """The schedule of the learning rate."""

    class_: str = option("dotted name of an Ignite or PyTorch scheduler")
    kwargs: dict[str, Any] = option("its arguments, without the optimiser", {})
    terminate_on_low_lr: float | None = option("end the training when the base rate falls below this", None)
    unit: str | None = option("one step per iteration, epoch or validation; null: Ignite iteration, torch epoch", None)


@dataclass
class TrainerConfig:
    """The loop."""

    epochs: int = option("number of epochs")


@dataclass
class CheckpointKwargsConfig:
    """How checkpoints are kept."""

    n_saved: int = option("number of checkpoints kept")
    require_empty: bool = option("refuse a folder that already holds checkpoints of this prefix")


@dataclass
class CheckpointConfig:
    """Checkpoints during training."""

    dirname: Path = option("folder of checkpoints, metrics.jsonl and metrics.csv")
    filename_prefix: str = option("start of the checkpoints' names")
    save_best: bool = option("keep the checkpoints of lowest validation loss (else the latest)")
    kwargs: CheckpointKwargsConfig = field(default_factory=CheckpointKwargsConfig)


@dataclass
class LogFrequencyConfig:
    """How often numbers are logged."""

    train: int = option("iterations between reports of the training loss")
    val: int | None = option("iterations between validations, besides the one after each epoch; null: none")


@dataclass
class WandbInitConfig:
    """Arguments of ``wandb.init``."""

    name: str | None = option("name of the run; null: run_name", None)
    mode: str = option("online, offline or disabled", "online")
    entity: str | None = option("user or team", None)
    project: str | None = option("project; null: project_name", None)
    notes: str | None = option("free text", None)
    group: str | None = option("group of runs", None)
    tags: list[str] = option("labels of the run", [])
    dir: Path | None = option("folder for wandb's files; null: checkpoint.dirname", None)


@dataclass
class WatchModelConfig:
    """Arguments of ``wandb.watch``."""

    log: str = option("gradients, parameters or all", "gradients")
    log_freq: int = option("iterations between histograms", 1000)
    log_graph: bool = option("log the graph of modules", False)


@dataclass
class WandbConfig:
    """Logging to Weights & Biases."""

    init: WandbInitConfig = field(default_factory=WandbInitConfig)
    watch_model: WatchModelConfig | None = option("histograms of weights and gradients; null: none", None)


@dataclass
class MetricsConfig:
    """Validation metrics."""

    class_: str = option("dotted name of the metric")
    kwargs: dict[str, Any] = option("its arguments; cfg: {property: {abbr, scale, peratom, mult}}")


@dataclass
class TrainConfig:
    """Everything that a training run is told, apart from the model and the names of files on the command line."""

    run_name: str | None = option("name of the run; null: the time of its start")
    project_name: str | None = option("name of the project; null: the working folder")
    seed: int = option("seed of every random choice")
    device: str = option("auto (a GPU if there is one), cpu, cuda or cuda:N")
    fidelity_offset: int = option("element type = Z + fidelity x offset")
    use_fidelity_readouts: bool = option("readouts of their own for every fidelity (else shared)")
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig | None = option("schedule of the learning rate; null: constant rate")
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_frequency: LogFrequencyConfig = field(default_factory=LogFrequencyConfig)
    wandb: WandbConfig | None = option("logging to Weights & Biases; null: none")
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


def named_fidelities(config: TrainConfig) -> dict[str, FidelityConfig]:
    """Return the fidelities of a run by name, in the order of their numbers, whichever form the settings have.

    Without ``data.fidelities`` the names are ``fid0``, ``fid1`` ...
    """
    data = config.data
    if data.fidelities:
        return data.fidelities
    sae = data.sae.energy if data.sae is not None else None
    files = {} if sae is None else sae.files if sae.file is None else {0: sae.file}
    return {
        f"fid{f}": FidelityConfig(
            files=data.fidelity_datasets[f],
            val_files=(data.val_fidelity_datasets or {}).get(f),
            weight=data.fidelity_weights.get(f, 1.0),
            sae=files.get(f),
        )
        for f in sorted(data.fidelity_datasets)
    }


def yaml_key(name: str) -> str:
    """Name of a field in YAML: ``class_`` stands for ``class``, which Python reserves."""
    return name.removesuffix("_")


def to_dict(config: Any) -> Any:
    """Return a configuration (or a part of it) as plain mappings, lists and values, as a YAML file would hold it."""
    if is_dataclass(config):
        return {yaml_key(f.name): to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: TrainConfig) -> str:
    """Return the settings as text that `load_config` reads as the same settings.

    PyYAML by itself writes the text 1e5 without quotes, which is read as a number.
    """
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


# --------------------------------------------------------------------------------------------------
# loading
# --------------------------------------------------------------------------------------------------


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read, merge and check the settings of a run.

    Parameters
    ----------
    path : str or Path, optional
        The user's YAML file. Paths in it are relative to its folder.
    overrides : sequence of str
        ``dotted.key=value``, the value as in YAML. Paths are relative to the working directory.

    Returns
    -------
    TrainConfig
        With absolute paths and integer fidelities.

    Raises
    ------
    FileNotFoundError
        No file at ``path``.
    ValueError
        Everything that is wrong, one problem a line.
    """
    problems: list[str] = []
    config = OmegaConf.structured(TrainConfig)
    _apply(config, _Source("packaged settings", read_yaml(DEFAULT_CONFIG), Path.cwd()), problems)
    assert not problems, problems
    packaged = {name: set(config[name].kwargs) for name in ("loss", "optimizer", "scheduler", "metrics")}
    packaged["scheduler"].add("terminate_on_low_lr")
    if path is not None:
        path = Path(path)
        _apply_class_changes(config, source := _Source(str(path), read_yaml(path), path.absolute().parent), packaged)
        _apply(config, source, problems)
    for override in overrides:
        source = _Source("command line", _parse_override(override, problems), Path.cwd(), deep=True)
        _apply_class_changes(config, source, packaged)
        _apply(config, source, problems)
    try:
        if config.run_name is None:
            config.run_name = time.strftime("run_%Y%m%d_%H%M%S")
        if config.project_name is None:
            config.project_name = Path.cwd().name or "aimnet2mult"
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError("\n".join([*problems, f"{where}{_first_line(error)}"])) from error
    assert isinstance(resolved, TrainConfig)
    _remove_null_entries(resolved)
    problems += _not_reported(check_config(resolved), problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return resolved


def _not_reported(messages: Sequence[str], problems: Sequence[str]) -> list[str]:
    """Return the messages about keys where nothing was refused: what was refused is not "missing"."""
    refused = [f"{problem.partition(':')[0]}." for problem in problems]
    return [m for m in messages if not any(key.startswith(f"{m.partition(':')[0]}.") for key in refused)]


def _remove_null_entries(config: TrainConfig) -> None:
    """Remove loss components, metrics and groups of weights that were set to null."""
    for mapping in (
        config.loss.kwargs.get("components"),
        config.metrics.kwargs.get("cfg"),
        config.optimizer.param_groups,
    ):
        if isinstance(mapping, dict):
            for name in [name for name, entry in mapping.items() if entry is None]:
                del mapping[name]


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a file of settings; numbers such as ``1e-4`` are numbers, ``${key}`` refers to another key.

    Raises
    ------
    FileNotFoundError
        No such file.
    ConfigError
        Not YAML, or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path}: not a YAML mapping of settings: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found a list")
    return data


def _parse_override(override: str, problems: list[str]) -> dict[Any, Any]:
    """Return ``a.b=value`` as ``{"a": {"b": value}}``."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        problems.append(f"{override}: expected key=value, such as trainer.epochs=100")
        return {}
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problems.append(f"{key}: {text!r} is not a YAML value: {_first_line(error)}")
        return {}
    assert isinstance(parsed, dict)
    value = parsed["value"]
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@dataclass
class _Source:
    """A mapping of settings, where it comes from, and the folder that its relative paths start from.

    With ``deep`` mappings under ``kwargs`` are merged entry by entry instead of replaced.
    """

    where: str
    data: dict[Any, Any]
    folder: Path
    deep: bool = False


def _apply(config: DictConfig, source: _Source, problems: list[str]) -> None:
    """Write the settings of ``source`` into ``config``; what does not fit becomes a message."""
    data = _lift_log_frequency(source.data, problems)
    _apply_section(config, TrainConfig, data, "", source, problems)


def _lift_log_frequency(data: dict[Any, Any], problems: list[str]) -> dict[Any, Any]:
    """Return the settings with ``wandb.log_frequency`` under its other name ``log_frequency``."""
    wandb = data.get("wandb")
    if not isinstance(wandb, dict) or "log_frequency" not in wandb:
        return data
    if data.get("log_frequency", wandb["log_frequency"]) != wandb["log_frequency"]:
        problems.append("wandb.log_frequency: contradicts log_frequency, which means the same; remove one of them")
    rest = {key: value for key, value in wandb.items() if key != "log_frequency"}
    lifted = {**data, "wandb": rest, "log_frequency": wandb["log_frequency"]}
    if not rest:
        del lifted["wandb"]
    return lifted


def _apply_section(
    node: DictConfig, schema: type, data: Mapping[Any, Any], prefix: str, source: _Source, problems: list[str]
) -> None:
    """Write a mapping into the node of a dataclass, key by key."""
    hints = {yaml_key(name): (name, hint) for name, hint in typing.get_type_hints(schema).items()}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            suggestion = nearest(str(key), list(hints))
            problems.append(f"{dotted}: unknown key ({source.where}); {suggestion}")
            continue
        name, hint = hints[key]
        if isinstance(value, str) and value == "???":  # the mark for "to be given later" in files of settings
            continue
        _apply_value(node, name, hint, value, dotted, source, problems)


def _apply_value(
    node: DictConfig, name: Any, hint: Any, value: Any, dotted: str, source: _Source, problems: list[str]
) -> None:
    """Write one value, of whatever kind its type hint says, into ``node[name]``."""
    inner = _without_none(hint)
    if value is None and inner is not hint:
        node.merge_with({name: None})
    elif is_dataclass(inner):
        if not isinstance(value, Mapping):
            problems.append(f"{dotted}: expected a mapping, found {value!r} ({source.where})")
            return
        if OmegaConf.is_missing(node, name) or node[name] is None:
            node[name] = OmegaConf.structured(inner)
        assert isinstance(inner, type)
        _apply_section(node[name], inner, value, f"{dotted}.", source, problems)
    elif typing.get_origin(inner) is dict:
        _apply_mapping(node, name, inner, value, dotted, source, problems)
    else:
        if inner is Any:
            node[name] = None  # a mapping replaces the one that was there
        _set(node, name, _with_paths(value, inner, source), inner, dotted, source, problems)


def _apply_mapping(
    node: DictConfig, name: str, hint: Any, value: Any, dotted: str, source: _Source, problems: list[str]
) -> None:
    """Write a mapping with free keys (fidelities, names, keyword arguments)."""
    if not isinstance(value, Mapping):
        problems.append(f"{dotted}: expected a mapping, found {value!r} ({source.where})")
        return
    if OmegaConf.is_missing(node, name) or node[name] is None:
        node[name] = {}
    key_type, value_type = typing.get_args(hint)
    for key, entry in value.items():
        if key_type is int and not isinstance(key, int):
            if not str(key).isdecimal():
                problems.append(
                    f"{dotted}: fidelities are the numbers 0, 1, ..., found {key!r} ({source.where}). "
                    "Fidelities with names stand under data.fidelities"
                )
                continue
            key = int(key)
        elif key_type is str:
            key = str(key)
        if is_dataclass(value_type):
            _apply_entry(node[name], key, value_type, entry, f"{dotted}.{key}", source, problems)
            continue
        if not source.deep:
            node[name].pop(key, None)
        entry = _with_paths(entry, value_type, source)
        _set(node[name], key, entry, value_type, f"{dotted}.{key}", source, problems)


def _apply_entry(
    node: DictConfig, name: str, schema: Any, value: Any, dotted: str, source: _Source, problems: list[str]
) -> None:
    """Write an entry of a mapping of dataclasses; null removes it."""
    if value is None and name in node:
        del node[name]
    elif value is None:
        known = f"; {nearest(name, list(node))}" if len(node) else ""
        problems.append(f"{dotted}: null removes an entry, but there is none of this name ({source.where}){known}")
    elif not isinstance(value, Mapping):
        problems.append(f"{dotted}: expected a mapping, found {value!r} ({source.where})")
    else:
        if name not in node:
            node[name] = OmegaConf.structured(schema)
        _apply_section(node[name], schema, value, f"{dotted}.", source, problems)


def _set(node: DictConfig, name: Any, value: Any, kind: Any, dotted: str, source: _Source, problems: list[str]) -> None:
    """Set one value, or merge a mapping; a value of another type becomes a message."""
    try:
        if kind == list[Path] and not all(isinstance(entry, str) for entry in value):
            raise TypeError  # lists in lists would be noticed only when all is converted, without their key
        node.merge_with({name: value})
    except (OmegaConfBaseException, TypeError):
        expected = KIND_NAMES.get(kind) or KIND_NAMES.get(typing.get_origin(kind), str(kind))
        problems.append(f"{dotted}: expected {expected}, found {value!r} ({source.where})")


def _with_paths(value: Any, kind: Any, source: _Source) -> Any:
    """Return a value with absolute paths where its type says that it holds paths; one name may stand for a list."""
    if kind is Path:
        return _absolute(value, source)
    if kind == list[Path]:
        values = [value] if isinstance(value, str) else value
        return [_absolute(entry, source) for entry in values] if isinstance(values, list) else value
    return value


KIND_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a file's name",
    list: "a list",
    list[Path]: "a list of files' names",
}
"""Types of the schema in the words of messages."""


def _absolute(value: Any, source: _Source) -> Any:
    """Return a file's name as an absolute path; one that begins with a reference (``${...}``) is left alone."""
    if not isinstance(value, str) or value.startswith("${"):
        return value
    path = source.folder / Path(value).expanduser()
    return str(path.parent.resolve() / path.name)  # a link keeps its own name


def _without_none(hint: Any) -> Any:
    """Return ``X`` for the type ``X | None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


def _apply_class_changes(config: DictConfig, source: _Source, packaged: dict[str, set[str]]) -> None:
    """Where a source names another class: drop the packaged keyword arguments that the new class does not take.

    ``packaged`` holds, for each section, the keyword arguments that are still as packaged.
    """
    for name, untouched in packaged.items():
        section = source.data.get(name)
        if not isinstance(section, Mapping) or config[name] is None:
            continue
        class_name = section.get("class")
        if class_name and class_name != config[name].class_:
            try:
                accepted = accepted_keywords(resolve(class_name))
            except (ConfigError, TypeError):
                accepted = None  # reported by check_config
            for key in [key for key in untouched if accepted is not None and key not in accepted]:
                config[name].kwargs.pop(key, None)
            if "terminate_on_low_lr" in untouched:
                config.scheduler.terminate_on_low_lr = None  # was meant for the packaged schedule
        given = section.get("kwargs")
        untouched.difference_update(section, given if isinstance(given, Mapping) else ())


# --------------------------------------------------------------------------------------------------
# checks
# --------------------------------------------------------------------------------------------------


def check_config(config: TrainConfig) -> list[str]:
    """Return what is wrong across the settings, one message a problem; nothing is read but the existence of files."""
    return [message for check in CHECKS for message in check(config)]


def _check_general(config: TrainConfig) -> Iterator[str]:
    if config.seed < 0:
        yield f"seed: expected 0 or more, found {config.seed}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        yield f"device: expected auto, cpu, cuda or cuda:N, found {config.device!r}"
    if len(named_fidelities(config)) > 1 and config.fidelity_offset < TYPES_PER_FIDELITY:
        yield f"fidelity_offset: must be at least {TYPES_PER_FIDELITY}, found {config.fidelity_offset}"
    if config.trainer.epochs < 1:
        yield f"trainer.epochs: expected 1 or more, found {config.trainer.epochs}"
    if config.log_frequency.train < 1:
        yield f"log_frequency.train: expected 1 or more iterations, found {config.log_frequency.train}"
    if config.log_frequency.val is not None and config.log_frequency.val < 1:
        yield f"log_frequency.val: expected 1 or more iterations or null, found {config.log_frequency.val}"


def _check_datasets(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if not 0 <= data.val_fraction < 1:
        yield f"data.val_fraction: expected a fraction in [0, 1), found {data.val_fraction}"
    if data.dispersion_cache not in CACHES:
        known = nearest(data.dispersion_cache, CACHES)
        yield f"data.dispersion_cache: {data.dispersion_cache!r} is not known; {known}"
    if data.fidelities:
        yield from _check_named(config)
    else:
        yield from _check_numbered(config)


def _check_named(config: TrainConfig) -> Iterator[str]:
    """Check fidelities with names."""
    data = config.data
    for key in ("fidelity_datasets", "fidelity_weights", "val_fidelity_datasets"):
        if getattr(data, key):
            word = {"fidelity_datasets": "files", "fidelity_weights": "weight"}.get(key, "val_files")
            yield f"data.{key}: given together with data.fidelities; use data.fidelities.<name>.{word}"
    for number, (name, fidelity) in enumerate(data.fidelities.items()):
        key = f"data.fidelities.{name}"
        if not FIDELITY_NAME.fullmatch(name):
            yield (
                f"{key}: a name consists of letters, digits, _, + and -, and does not begin with a digit; "
                f"found {name!r}"
            )
        if name == "all":
            yield f"{key}: stands for all data in the tables of errors; give it another name"
        if (match := re.fullmatch(r"fid(\d+)", name)) and match[1] != str(number):
            yield f"{key}: is the name of fidelity {match[1]} where none is given, and this one is number {number}"
        if not fidelity.files:
            others = [other for other in data.fidelities if other != name]
            hint = f". If another is meant: {nearest(name, others)}" if others else ""
            yield f"{key}.files: is missing; the HDF5 file of this fidelity, a list of files, or a pattern{hint}"
        yield from _check_patterns_of_files(f"{key}.files", fidelity.files)
        yield from _check_patterns_of_files(f"{key}.val_files", fidelity.val_files or [])
        yield from _check_weight(f"{key}.weight", fidelity.weight)
        yield from _check_dispersion(key, fidelity)
    if _draws_by_weight(config) and not any(fidelity.weight for fidelity in data.fidelities.values()):
        yield "data.fidelities: all weights are 0, no molecule would be drawn"


def _check_numbered(config: TrainConfig) -> Iterator[str]:
    """Check fidelities without names."""
    data = config.data
    found = sorted(data.fidelity_datasets)
    listed = ", ".join(map(str, found))
    if not found:
        yield (
            "data.fidelities: no dataset given. Add data.fidelities.<name>.files=<file.h5>, "
            "or without a name data.fidelity_datasets.0=<file.h5>"
        )
    elif found != list(range(len(found))):
        yield f"data.fidelity_datasets: fidelities must be 0..{len(found) - 1} without gaps, found {listed}"
    for key, datasets in (
        ("data.fidelity_datasets", data.fidelity_datasets),
        ("data.val_fidelity_datasets", data.val_fidelity_datasets or {}),
    ):
        for f, files in sorted(datasets.items()):
            yield from _check_patterns_of_files(f"{key}.{f}", files)
    for f in sorted(set(data.val_fidelity_datasets or {}) - set(found)):
        yield f"data.val_fidelity_datasets: fidelity {f} has no dataset (datasets: {listed})"
    for f, weight in sorted(data.fidelity_weights.items()):
        if f not in found:
            yield (
                f"data.fidelity_weights: fidelity {f} has no dataset (datasets: {listed}). "
                f"Add data.fidelity_datasets.{f} or remove the weight"
            )
        yield from _check_weight(f"data.fidelity_weights.{f}", weight)
    if _draws_by_weight(config) and found and not any(data.fidelity_weights.get(f, 1.0) for f in found):
        yield "data.fidelity_weights: all weights are 0, no molecule would be drawn"


def _draws_by_weight(config: TrainConfig) -> bool:
    """Whether the weights of the fidelities decide what an epoch consists of."""
    sampler = config.data.samplers.train.kwargs
    return sampler.shuffle and sampler.sampling_strategy == "weighted"


def _check_weight(key: str, weight: float) -> Iterator[str]:
    if not math.isfinite(weight) or weight < 0:
        yield f"{key}: expected a weight of 0 or more, found {weight}"


def _check_patterns_of_files(key: str, files: Sequence[Path]) -> Iterator[str]:
    """Check that each name or pattern stands for files that exist."""
    try:
        if files:
            expand_files(files)
    except (FileNotFoundError, ValueError) as error:
        yield f"{key}: {error}"


def _check_dispersion(key: str, fidelity: FidelityConfig) -> Iterator[str]:
    """Check what is said about the dispersion in the labels of a fidelity."""
    try:
        label = parse_dispersion(fidelity.dispersion, f"{key}.dispersion")
        if fidelity.subtract_dispersion:
            subtraction(label, f"{key}.subtract_dispersion")
    except ValueError as error:
        yield str(error)


def _check_file(key: str, path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"{key}: {path}: {'is a folder' if path.is_dir() else 'no such file'}"


def _check_sae(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if data.sae is None:
        return
    sae = data.sae.energy
    if sae.mode not in SAE_MODES:
        yield f"data.sae.energy.mode: {sae.mode!r} is not a mode; {nearest(sae.mode, SAE_MODES)}"
    if data.fidelities:
        if sae.files or sae.file is not None:
            yield "data.sae.energy: files are given together with data.fidelities; use data.fidelities.<name>.sae"
        for name, fidelity in data.fidelities.items():
            key = f"data.fidelities.{name}.sae"
            if fidelity.sae is None:
                yield f"{key}: is missing. {_sae_remedy(fidelity.files, name)} and add {key}, or set data.sae=null"
            else:
                yield from _check_file(key, fidelity.sae)
        return
    datasets = data.fidelity_datasets
    if sae.file is not None:
        yield from _check_file("data.sae.energy.file", sae.file)
        if sae.files:
            yield "data.sae.energy.file: given together with data.sae.energy.files; remove one of them"
        elif len(datasets) > 1:
            yield "data.sae.energy.file: is for one dataset; name one file per fidelity in data.sae.energy.files"
        return
    for f, path in sorted(sae.files.items()):
        yield from _check_file(f"data.sae.energy.files.{f}", path)
    for f in sorted(set(sae.files) - set(datasets)):
        yield f"data.sae.energy.files: fidelity {f} has no dataset; add data.fidelity_datasets.{f} or remove the file"
    for f in sorted(set(datasets) - set(sae.files)):
        yield (
            f"data.sae.energy.files: fidelity {f} has no SAE file. {_sae_remedy(datasets[f], f'fid{f}')} and add "
            f"data.sae.energy.files.{f}, or set data.sae=null to train on total energies"
        )


def _sae_remedy(files: Sequence[Path], name: str) -> str:
    listed = " ".join(map(str, files)) or "<files>"
    return f"Make one with `python -m aimnet2mult.train.calc_sae {listed} sae_{name}.yaml`"


def _check_batches(config: TrainConfig) -> Iterator[str]:
    data = config.data
    for key, names, known in (("data.x", data.x, INPUT_KEYS), ("data.y", data.y, LABEL_KEYS)):
        for name in names:
            if name not in known:
                yield f"{key}: {name!r} is not known; {nearest(name, known)}"
        if len(set(names)) != len(names):
            yield f"{key}: a name is listed twice"
    for name in ("coord", "numbers"):
        if name not in data.x:
            yield f"data.x: {name} is missing"
    if "energy" not in data.y:
        yield "data.y: energy is missing"
    for stage in ("train", "val"):
        sampler = getattr(data.samplers, stage).kwargs
        key = f"data.samplers.{stage}.kwargs"
        if sampler.batch_size < 1:
            yield f"{key}.batch_size: expected 1 or more, found {sampler.batch_size}"
        if sampler.batches_per_epoch < 1 and sampler.batches_per_epoch != -1:
            yield f"{key}.batches_per_epoch: expected 1 or more, or -1 for all, found {sampler.batches_per_epoch}"
        if sampler.batch_mode not in BATCH_MODES:
            yield f"{key}.batch_mode: {sampler.batch_mode!r} is not a mode; {nearest(sampler.batch_mode, BATCH_MODES)}"
        if sampler.sampling_strategy not in STRATEGIES:
            known_strategies = nearest(sampler.sampling_strategy, STRATEGIES)
            yield f"{key}.sampling_strategy: {sampler.sampling_strategy!r} is not a strategy; {known_strategies}"
        if not 0 <= sampler.max_padding < 1:
            yield f"{key}.max_padding: expected a share in [0, 1), found {sampler.max_padding}"
        yield from _check_shares(f"{key}", sampler, list(named_fidelities(config)))
        yield from _check_loader(f"data.loaders.{stage}", getattr(data.loaders, stage))


def _check_shares(key: str, sampler: SamplerKwargsConfig, names: list[str]) -> Iterator[str]:
    """Check the shares of the fidelities."""
    shares = sampler.shares
    if (sampler.sampling_strategy == "shares") != bool(shares):
        yield (
            f"{key}.shares: go with sampling_strategy: shares, found {shares} and "
            f"{sampler.sampling_strategy}. Give both or neither"
        )
        return
    for name in shares:
        if name not in names:
            yield f"{key}.shares: there is no fidelity {name!r}; {nearest(name, names)}"
    for name in names:
        if name not in shares and shares:
            yield f"{key}.shares: {name} is missing; give each fidelity its share (0 for none)"
    if any(not math.isfinite(share) or share < 0 for share in shares.values()):
        yield f"{key}.shares: expected shares of 0 or more, found {shares}"
    elif shares and abs(sum(shares.values()) - 1.0) > SHARES_TOLERANCE:
        yield f"{key}.shares: sum to {sum(shares.values()):g}, expected 1"


def _check_loader(key: str, loader: LoaderConfig) -> Iterator[str]:
    if loader.num_workers < 0:
        yield f"{key}.num_workers: expected 0 or more, found {loader.num_workers}"
    if loader.prefetch_factor is not None and loader.prefetch_factor < 1:
        yield f"{key}.prefetch_factor: expected 1 or more, found {loader.prefetch_factor}"
    for name in ("prefetch_factor", "persistent_workers"):
        if getattr(loader, name) and loader.num_workers == 0:
            yield f"{key}.{name}: needs reader processes; set {key}.num_workers or leave it out"


def _check_loss(config: TrainConfig) -> Iterator[str]:
    loss = config.loss
    problems = [*_check_class("loss", loss.class_, loss.kwargs), *_check_components(config)]
    yield from problems or _check_construction("loss", loss)


def _check_components(config: TrainConfig) -> Iterator[str]:
    """Check the components of the loss, each on its own."""
    loss = config.loss
    if "components" not in loss.kwargs:
        return
    components = loss.kwargs["components"]
    options = _component_options(loss.class_)
    if not isinstance(components, Mapping) or not components:
        yield f"loss.kwargs.components: expected a mapping {{name: {{fn, weight, kwargs}}}}, found {components!r}"
        return
    total = 0.0
    for name, component in components.items():
        key = f"loss.kwargs.components.{name}"
        if not isinstance(component, Mapping):
            yield f"{key}: expected a mapping {{fn, weight, kwargs}}, found {component!r}"
            continue
        for word in component:
            if word not in options:
                yield f"{key}.{word}: unknown key; {nearest(str(word), options)}"
        weight = component.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            yield f"{key}.weight: expected a number of 0 or more, found {weight!r}"
        else:
            total += weight
        yield from _check_component(key, component, config.data.y)
    if total == 0:
        yield "loss.kwargs.components: no component has a positive weight"


def _component_options(class_name: str) -> Sequence[str]:
    """Return what a component of the loss may say."""
    try:
        return getattr(resolve(class_name), "component_options", ("fn", "weight", "kwargs"))
    except ConfigError:  # reported as loss.class
        return ("fn", "weight", "kwargs", "scale")


def _check_component(key: str, component: Mapping[str, Any], labels: Sequence[str]) -> Iterator[str]:
    """Check function, keywords and label of one component of the loss."""
    kwargs = component.get("kwargs") or {}
    if "fn" not in component:
        yield f"{key}.fn: is missing; the name of a function such as aimnet2mult.train.loss.peratom_loss_fn"
        return
    problems = list(_check_class(key, component["fn"], kwargs, "fn", ("y_pred", "y_true")))
    yield from problems
    if problems:
        return
    label = kwargs.get("key_true", _default(resolve(component["fn"]), "key_true"))
    if label is not None and label not in labels:
        yield (
            f"{key}: needs the label {label}, which data.y does not list ({', '.join(labels)}). "
            f"Add it there, or remove the component with {key}=null"
        )


def _check_optimizer(config: TrainConfig) -> Iterator[str]:
    optimizer = config.optimizer
    problems = list(_check_class("optimizer", optimizer.class_, optimizer.kwargs, given=("params",)))
    yield from problems
    if problems:
        return
    target = resolve(optimizer.class_)
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        yield f"optimizer.class: {optimizer.class_} is not an optimizer"
        return
    accepted = accepted_keywords(target)
    yield from _check_rate("optimizer.kwargs.lr", optimizer.kwargs.get("lr"))
    for name, group in optimizer.param_groups.items():
        key = f"optimizer.param_groups.{name}"
        if not isinstance(group, Mapping) or not isinstance(group.get("re"), str):
            yield f"{key}: expected a mapping with the pattern re, found {group!r}"
            continue
        yield from _check_patterns(f"{key}.re", [group["re"]])
        for word in set(group) - {"re"}:
            if accepted is not None and word not in accepted:
                yield f"{key}.{word}: unknown option; {nearest(str(word), ['re', *accepted])}"
        if "lr" in group:
            yield from _check_rate(f"{key}.lr", group["lr"])
    yield from _check_patterns("optimizer.force_train", optimizer.force_train)
    yield from _check_patterns("optimizer.force_no_train", optimizer.force_no_train)
    max_norm = optimizer.grad_clip.max_norm
    if max_norm is not None and not max_norm > 0:
        yield f"optimizer.grad_clip.max_norm: expected a positive number or null, found {max_norm}"
    try:
        reference_optimizer(optimizer)
    except ConfigError as error:
        yield str(error)


def _check_rate(key: str, rate: Any) -> Iterator[str]:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        yield f"{key}: expected a positive learning rate, found {rate!r}"


def _check_patterns(key: str, patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{key}: {pattern!r} is not a regular expression: {error}"


def _check_scheduler(config: TrainConfig) -> Iterator[str]:
    scheduler = config.scheduler
    if scheduler is None:
        return
    problems = list(_check_class("scheduler", scheduler.class_, scheduler.kwargs, given=("optimizer", "param_name")))
    yield from problems
    low = scheduler.terminate_on_low_lr
    rate = config.optimizer.kwargs.get("lr")
    if low is not None and isinstance(rate, int | float) and not 0 <= low < rate:
        yield f"scheduler.terminate_on_low_lr: expected a rate between 0 and optimizer.kwargs.lr ({rate}), found {low}"
    if scheduler.unit is not None and scheduler.unit not in SCHEDULER_UNITS:
        yield f"scheduler.unit: {scheduler.unit!r} is not a unit; {nearest(scheduler.unit, SCHEDULER_UNITS)}"
    elif not problems:
        try:
            own_unit = scheduler_unit(resolve(scheduler.class_))
        except ValueError as error:
            yield f"scheduler.class: {error}"
        else:
            if own_unit == "validation" and scheduler.unit == "iteration":
                yield f"scheduler.unit: {scheduler.class_} needs a validation for each step; set it to null"
            if "validation" in (scheduler.unit, own_unit) and not _validates(config):
                yield (
                    "scheduler: needs the validation loss, but there is no validation data. "
                    "Set data.val_fraction or give files for validation, or scheduler=null"
                )
            yield from _check_schedule(config)


def _check_schedule(config: TrainConfig) -> Iterator[str]:
    """Check the values of the scheduler's arguments by building it and going one step."""
    assert config.scheduler is not None
    try:
        reference_optimizer(config.optimizer)
    except ConfigError:
        return  # reported as a problem of the optimizer
    try:
        schedule = Schedule(config.scheduler, config.optimizer)
        schedule.step({schedule.metric_name: 1.0})
    except ConfigError as error:
        yield str(error)
    except ArithmeticError as error:
        yield f"scheduler.kwargs: {config.scheduler.class_}: {error}"


def _validates(config: TrainConfig) -> bool:
    """Whether the run has validation data."""
    files = any(fidelity.val_files for fidelity in named_fidelities(config).values())
    return files or config.data.val_fraction > 0


def _check_checkpoint(config: TrainConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.kwargs.n_saved < 1:
        yield f"checkpoint.kwargs.n_saved: expected 1 or more, found {checkpoint.kwargs.n_saved}"
    if not checkpoint.filename_prefix or "/" in checkpoint.filename_prefix:
        yield f"checkpoint.filename_prefix: expected the start of a file name, found {checkpoint.filename_prefix!r}"
    if checkpoint.save_best and not _validates(config):
        yield (
            "checkpoint.save_best: needs the validation loss, but there is no validation data. "
            "Set data.val_fraction or give files for validation, or checkpoint.save_best=false"
        )


def _check_wandb(config: TrainConfig) -> Iterator[str]:
    if config.wandb is None:
        return
    mode = config.wandb.init.mode
    if mode not in WANDB_MODES:
        yield f"wandb.init.mode: {mode!r} is not a mode; {nearest(mode, WANDB_MODES)}"
    elif mode != "disabled" and importlib.util.find_spec("wandb") is None:
        yield (
            'wandb: the package wandb is not installed; `pip install "aimnet2mult[train]"`, '
            "or set wandb=null or wandb.init.mode=disabled"
        )
    watch = config.wandb.watch_model
    if watch is not None and watch.log not in ("gradients", "parameters", "all"):
        yield f"wandb.watch_model.log: expected gradients, parameters or all, found {watch.log!r}"
    if watch is not None and watch.log_freq < 1:
        yield f"wandb.watch_model.log_freq: expected 1 or more iterations, found {watch.log_freq}"


def _check_metrics(config: TrainConfig) -> Iterator[str]:
    metrics = config.metrics
    problems = list(_check_class("metrics", metrics.class_, metrics.kwargs))
    yield from problems or _check_construction("metrics", metrics)


def _check_construction(section: str, config: LossConfig | MetricsConfig) -> Iterator[str]:
    """Check the values of arguments by building the object; its messages speak of ``kwargs`` as of ``section``."""
    try:
        resolve(config.class_)(**config.kwargs)
    except (TypeError, ValueError) as error:
        message = str(error)
        nested = f"{section}."
        yield f"{nested}kwargs.{message[len(nested) :]}" if message.startswith(nested) else f"{nested}kwargs: {message}"


def _check_class(key: str, name: str, kwargs: Any, word: str = "class", given: Sequence[str] = ()) -> Iterator[str]:
    """Check that a class or function exists and takes the keywords; ``given`` are those that the package sets."""
    try:
        target = resolve(name)
    except ConfigError as error:
        yield f"{key}.{word}: {error}"
        return
    if not callable(target):
        yield f"{key}.{word}: {name} is not a class or function"
        return
    if not isinstance(kwargs, Mapping):
        yield f"{key}.kwargs: expected a mapping, found {kwargs!r}"
        return
    accepted = accepted_keywords(target)
    if accepted is not None:
        known = [keyword for keyword in accepted if keyword not in given]
        for keyword in kwargs:
            if keyword not in accepted:
                yield f"{key}.kwargs.{keyword}: {name} has no such option; {nearest(str(keyword), known)}"


def _default(target: Callable[..., Any], keyword: str) -> Any:
    """Return the default value of a function's keyword, or None."""
    parameter = inspect.signature(target).parameters.get(keyword)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


CHECKS: tuple[Callable[[TrainConfig], Iterator[str]], ...] = (
    _check_general,
    _check_datasets,
    _check_sae,
    _check_batches,
    _check_loss,
    _check_optimizer,
    _check_scheduler,
    _check_checkpoint,
    _check_wandb,
    _check_metrics,
)
"""Checks across the settings, in the order of their messages."""
