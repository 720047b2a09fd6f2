"""How the settings of a run come together.

Settings come from three places, each overriding the one before: the packaged
``config/default_train_mixed_fidelity.yaml`` (the one home of the defaults), the user's file, and ``key=value`` on the
command line. What may be set is in `aimnet2mult.train.schema`, what does not fit together is found by
`aimnet2mult.train.config_checks`; all problems come in one error, before any data is read.

A file replaces the packaged settings key by key; what it says under ``kwargs`` (a loss's ``components``, the ``cfg``
of the metrics) replaces the packaged entry as a whole, so a file that lists two loss components trains on two. An
override on the command line changes the one value that it names. An entry of these mappings, or of
``optimizer.param_groups``, is removed by setting it to null.
"""

import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aimnet2mult.config.builder import ConfigError, nearest, resolve
from aimnet2mult.train.config_checks import check_config
from aimnet2mult.train.schema import TrainConfig, yaml_key
from aimnet2mult.train.utils import accepted_keywords
from aimnet2mult.utils.text import first_line

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "config" / "default_train_mixed_fidelity.yaml"
"""The packaged settings."""

S = TypeVar("S")


def load_config(path: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read, merge and check the settings of a run.

    Parameters
    ----------
    path : str, Path or mapping, optional
        The user's YAML file, paths in it relative to its folder; or the settings that a checkpoint stores.
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
    names = _entry_names(config)
    if path is not None:
        source = _source(path)
        _apply_class_changes(config, source, packaged)
        _apply(config, source, problems)
        names = {key: [*dict.fromkeys([*names.get(key, ()), *now])] for key, now in _entry_names(config).items()}
    for override in overrides:
        key, _, text = override.partition("=")
        data = _parse_override(override, problems)
        source = _Source("command line", data, Path.cwd(), deep=True, literal=(key, text))
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
        raise ConfigError("\n".join([*problems, f"{where}{first_line(error)}"])) from error
    assert isinstance(resolved, TrainConfig)
    problems += _remove_null_entries(resolved, names)
    problems += _not_reported(check_config(resolved), problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return resolved


def read_settings(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read the settings of another command, which dataclasses describe as those of a run.

    Parameters
    ----------
    schema : type
        A dataclass whose fields are made by `aimnet2mult.train.schema.option`.
    path : str or Path
        The YAML file, paths in it relative to its folder.
    overrides : sequence of str
        ``dotted.key=value``, the value as in YAML. Paths are relative to the working directory.

    Returns
    -------
    object
        Of the class ``schema``, with absolute paths. How its values fit together has not been checked.

    Raises
    ------
    FileNotFoundError
        No file at ``path``.
    ValueError
        Unknown keys and values of another type, one a line; or an option without default that is missing.
    """
    problems: list[str] = []
    config = OmegaConf.structured(schema)
    source = _source(path)
    _apply_section(config, schema, source.data, "", source, problems)
    for override in overrides:
        data = _parse_override(override, problems)
        key, _, text = override.partition("=")
        source = _Source("command line", data, Path.cwd(), deep=True, literal=(key, text))
        _apply_section(config, schema, data, "", source, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError("\n".join(f"{key}: is missing ({path})" for key in missing))
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, schema)
    return settings


def _source(path: str | Path | Mapping[str, Any]) -> "_Source":
    if isinstance(path, Mapping):
        return _Source("checkpoint", dict(path), Path.cwd())
    path = Path(path)
    return _Source(str(path), read_yaml(path), path.absolute().parent)


def _not_reported(messages: Sequence[str], problems: Sequence[str]) -> list[str]:
    """Return the messages about keys where nothing was refused: what was refused is not "missing"."""
    refused = [f"{problem.partition(':')[0]}." for problem in problems]
    return [m for m in messages if not any(key.startswith(f"{m.partition(':')[0]}.") for key in refused)]


ENTRIES = ("loss.kwargs.components", "metrics.kwargs.cfg", "optimizer.param_groups")
"""Mappings whose entries are removed by setting them to null."""


def _entry_names(config: DictConfig) -> dict[str, list[str]]:
    """Return the names of the entries of `ENTRIES`."""
    mappings = {key: OmegaConf.select(config, key, throw_on_missing=False) for key in ENTRIES}
    return {key: list(map(str, entries or ())) for key, entries in mappings.items() if not isinstance(entries, str)}


def _remove_null_entries(config: TrainConfig, names: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Remove entries that were set to null; one that is not among ``names`` was never there, which is a message."""
    entries = (config.loss.kwargs.get("components"), config.metrics.kwargs.get("cfg"), config.optimizer.param_groups)
    for key, mapping in zip(ENTRIES, entries, strict=True):
        if not isinstance(mapping, dict):
            continue
        for name in [name for name, entry in mapping.items() if entry is None]:
            del mapping[name]
            known = names.get(key, ())
            if str(name) not in known:
                hint = f"; {nearest(str(name), known)}" if known else ""
                yield f"{key}.{name}: null removes an entry, but there is none of this name{hint}"


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
        raise FileNotFoundError(f"{path}: {'is a folder, not a file of settings' if path.is_dir() else 'no such file'}")
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
        problems.append(f"{key}: {text!r} is not a YAML value: {first_line(error)}")
        return {}
    assert isinstance(parsed, dict)
    value = parsed["value"]
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@dataclass
class _Source:
    """A mapping of settings, where it comes from, and the folder that its relative paths start from.

    With ``deep`` mappings under ``kwargs`` are merged entry by entry instead of replaced. ``literal`` is a dotted key
    with its value as it was typed: a text such as 2026_01 or 1e5, which YAML takes for a number.
    """

    where: str
    data: dict[Any, Any]
    folder: Path
    deep: bool = False
    literal: tuple[str, str] = ("", "")


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
        if kind is str and isinstance(value, int | float) and source.literal[0] == dotted:
            value = source.literal[1]
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
