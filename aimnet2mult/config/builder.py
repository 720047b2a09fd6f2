"""From dotted names and YAML to objects.

A YAML node ``{class: dotted.name, args: [...], kwargs: {...}}`` becomes an instance of that class. Names in a
model file are resolved from an allow-list only (ours and ``torch.nn``): a file must not be able to name
``os.system``.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

MODEL_NAMESPACES = ("aimnet2mult.models", "aimnet2mult.modules", "aimnet2mult.aev", "torch.nn")
"""Modules from which a model file may name classes."""


class ConfigError(ValueError):
    """A configuration that names something that does not exist or does not fit."""


def nearest(name: str, known: Sequence[str], n: int = 3) -> str:
    """Return a clause for messages that names the known words nearest to ``name``, or lists all of them if few."""
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(known) <= 20:
        return f"known: {', '.join(known)}"
    return f"{len(known)} are known, none of them close"


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file with the safe loader.

    Raises
    ------
    FileNotFoundError
        No such file.
    ConfigError
        Not YAML; the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error


def resolve(name: str, namespaces: Sequence[str] | None = None) -> Any:
    """Return the object that a dotted name stands for.

    Parameters
    ----------
    name : str
        Such as ``aimnet2mult.modules.Output``.
    namespaces : sequence of str, optional
        Modules in which ``name`` must lie; None allows every importable one (for the user's own training file).

    Raises
    ------
    ConfigError
        The name is outside ``namespaces`` or does not resolve; the message offers the nearest name.
    """
    if not isinstance(name, str) or "." not in name:
        raise ConfigError(f"{name!r} is not a dotted class path such as aimnet2mult.modules.Output")
    if namespaces is not None and not any(name == space or name.startswith(space + ".") for space in namespaces):
        raise ConfigError(f"{name}: a model file may only name classes from {', '.join(namespaces)}")
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name != missing and not module_name.startswith(missing + "."):
            raise ConfigError(f"{name}: needs the package {missing}, which is not installed") from error
        raise ConfigError(f"{name}: there is no module {missing}") from error
    if not hasattr(module, attribute):
        public = [word for word in dir(module) if not word.startswith("_") and _is_own(getattr(module, word), module)]
        raise ConfigError(f"{name}: {module_name} has no {attribute}; {nearest(attribute, public)}")
    return getattr(module, attribute)


def _is_own(value: Any, module: ModuleType) -> bool:
    """Whether something that a module holds comes from the same package, and was not imported from another."""
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(home or module.__name__).partition(".")[0] == module.__name__.partition(".")[0]


def _is_module_class(target: Any) -> bool:
    from torch import nn

    return isinstance(target, type) and issubclass(target, nn.Module)


def check_kwargs(target: Callable[..., Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Refuse keywords that ``target`` does not take.

    Raises
    ------
    ConfigError
        Naming ``where``, the keyword and the nearest valid one.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # built-in callables without a signature
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in kwargs:
        if key not in parameters:
            raise ConfigError(f"{where}: unknown option {key}; {nearest(str(key), list(parameters))}")


def build_module(
    node: Mapping[str, Any] | str | Path, namespaces: Sequence[str] | None = MODEL_NAMESPACES, where: str = "config"
) -> Any:
    """Build the object that a ``{class, args, kwargs}`` node, or a YAML file that holds one, describes.

    The node is not changed and nothing in it is shared with the object: building twice gives two independent
    objects.

    Parameters
    ----------
    node : mapping, str or Path
        ``class``: dotted name; optional ``args`` (list) and ``kwargs`` (mapping). Or the name of a YAML file.
    namespaces : sequence of str, optional
        As in `resolve`; by default those that a model file may name.
    where : str
        Place of the node in its file, for messages.

    Raises
    ------
    ConfigError
        Unknown keys, a name that does not resolve, keywords that the class does not take.
    """
    if isinstance(node, str | Path):
        where, node = str(node), load_yaml(node)
    if not isinstance(node, Mapping) or "class" not in node:
        raise ConfigError(f"{where}: expected a mapping with the key class, found {type(node).__name__}")
    unknown = set(node) - {"class", "args", "kwargs"}
    if unknown:
        raise ConfigError(f"{where}: unknown key {sorted(map(str, unknown))[0]}; known: class, args, kwargs")
    try:
        target = resolve(node["class"], namespaces)
    except ConfigError as error:
        raise ConfigError(f"{where}.class: {error}") from error
    if not callable(target):
        raise ConfigError(f"{where}.class: {node['class']} is not a class or function")
    if namespaces is not None and not _is_module_class(target):
        # Functions may read and write files, which what a model file names must not.
        raise ConfigError(f"{where}.class: {node['class']} is not a module of a network (torch.nn.Module)")
    args, kwargs = node.get("args") or [], node.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"{where}.kwargs: expected a mapping, found {type(kwargs).__name__}")
    check_kwargs(target, kwargs, f"{where}.kwargs")
    return target(*args, **kwargs)
