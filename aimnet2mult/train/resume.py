"""What a command asks for: a new run, or to go on with one.

A run goes on with the settings and the data that it began with; `FREE_SETTINGS` may be changed.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import load_checkpoint, load_model_config
from aimnet2mult.train.configuration import DEFAULT_CONFIG, load_config, read_yaml
from aimnet2mult.train.data import Data
from aimnet2mult.train.run_folder import MARKS, Resume, changed_data, find_resume
from aimnet2mult.train.schema import TrainConfig, to_dict, yaml_key

logger = logging.getLogger(__name__)

AUTO = "auto"
"""What stands for the run in ``checkpoint.dirname``, if there is one."""

FREE_SETTINGS = (
    "device",
    "report",
    "init_from",
    "data.fidelities.*.files",
    "data.fidelities.*.val_files",
    "data.fidelities.*.sae",
    "data.fidelities.*.level",
    "data.fidelity_datasets.*",
    "data.val_fidelity_datasets.*",
    "data.sae.energy.files.*",
    "data.sae.energy.file",
    "data.dispersion_cache",
    "data.ddp_load_full_dataset",
    "data.loaders",
    "data.samplers.val",
    "trainer.epochs",
    "trainer.max_skipped",
    "trainer.early_stopping.patience",
    "trainer.early_stopping.fidelities.*.patience",
    "trainer.gradient_report",
    "trainer.deterministic",
    "trainer.compile",
    "checkpoint.dirname",  # by moving the folder
    "checkpoint.every_iterations",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "checkpoint.kwargs",
    "log_frequency",
    "wandb",
    "tensorboard",
)
"""Settings that may differ when a run goes on; where files lie may, too, but what is in them is compared."""


@dataclass
class Job:
    """What to train.

    Attributes
    ----------
    config : TrainConfig
        The settings.
    model_config : dict
        ``class`` and ``kwargs`` of the single-fidelity model.
    resume : Resume, optional
        The run to go on with.
    overwrite : bool
        Replace an earlier run in the folder.
    """

    config: TrainConfig
    model_config: dict[str, Any]
    resume: Resume | None = None
    overwrite: bool = False


def read_job(
    config: str | Path | None = None,
    model: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: str | Path | None = None,
    overwrite: bool = False,
    load: str | Path | None = None,
) -> Job:
    """Read settings and model, of a new run or of one that goes on.

    Parameters
    ----------
    config : str or Path, optional
        File of settings; default: those of the run that goes on, for a new one the packaged ones.
    model : str or Path, optional
        File of the model; default: that of the run that goes on, for a new one that of ``load``, or the packaged one.
    overrides : sequence of str
        Settings as ``key=value``.
    resume : str or Path, optional
        Folder of a run or a checkpoint in it, or `AUTO`.
    overwrite : bool
        Replace an earlier run in the folder. `AUTO` does so with one that was killed before its first checkpoint.
    load : str or Path, optional
        Model file that a new run starts from.

    Raises
    ------
    ValueError, FileNotFoundError
        Settings, model or run that cannot be used, or settings that must not change while a run goes on.
    """
    if resume == AUTO:
        settings = load_config(config, overrides)
        resume = settings.checkpoint.dirname
        if _named_by_time(settings) and not resume.exists():
            raise ConfigError("--resume auto: finds its run by run_name or checkpoint.dirname; give one of them")
        if not any(resume.glob("*.pt")):
            return Job(settings, _new_model(model, load), None, overwrite=True)
    if resume is None:
        return Job(load_config(config, overrides), _new_model(model, load), None, overwrite)
    found = find_resume(resume)
    if found.path == Path(resume).absolute() and not any((found.folder / name).exists() for name in MARKS):
        raise ConfigError(
            f"{found.path}: lies in no folder of a run ({' and '.join(MARKS)} are missing). Put it back into its own, "
            "or begin a new run from its weights with --load"
        )
    before, model_config = found.content["train_config"], found.content["model_config"]
    settings = load_config(before if config is None else config, overrides)
    _keep_place(settings, before, found.folder, overrides)
    for change in check_settings(before, settings):
        logger.info("changed: %s", change)
    if model is not None and load_model_config(model) != model_config:
        raise ConfigError(f"--model: {model} is not the model of the run in {found.folder}; leave it out")
    return Job(settings, model_config, found)


def _new_model(model: str | Path | None, load: str | Path | None) -> dict[str, Any]:
    """Configuration of the model of a new run."""
    if model is None and load is not None:
        known = load_checkpoint(load).get("model_config")
        if known is not None:
            logger.info("model: as in %s", load)
            return known
    return load_model_config(model)


def check_settings(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Compare the settings with those of the run that goes on.

    Parameters
    ----------
    before : mapping
        Settings in its checkpoint (``train_config``); those that its version of the package did not have were what the
        packaged settings say.
    config : TrainConfig
        Settings now.

    Returns
    -------
    list of str
        What is another now, for the log.

    Raises
    ------
    ConfigError
        A setting differs that the state of the run depends on; all of them are named.
    """
    began = _with_later_settings(before, config, read_yaml(DEFAULT_CONFIG))
    changes = list(_differences(began, to_dict(config)))
    refused = [f"{key}: {old} when the run began, {new} now" for key, old, new in changes if not _is_free(key)]
    if refused:
        raise ConfigError(
            "\n".join(refused) + "\nGo on with the same settings, or begin a new run from the weights with --load"
        )
    return [f"{key}: {old} -> {new}" for key, old, new in changes]


def check_data(content: Mapping[str, Any], data: Data) -> None:
    """Compare the data with those of the run that goes on.

    Raises
    ------
    ConfigError
        Other fidelities, files with another content, or other self-atomic energies.
    """
    problems = changed_data(content["data"], data.record)
    if content.get("sae", {}) != {f: reference.table() for f, reference in (data.sae or {}).items()}:
        problems.append("self-atomic energies are others than when the run began")
    if problems:
        raise ConfigError(
            "\n".join(problems) + "\nGo on with the same data, or begin a new run from the weights with --load"
        )


def _named_by_time(config: TrainConfig) -> bool:
    """Whether the folder of a run has the name that one gets which was given none."""
    name = config.checkpoint.dirname.name
    return name == config.run_name and re.fullmatch(r"run_\d{8}_\d{6}", name) is not None


def _keep_place(config: TrainConfig, before: Mapping[str, Any], folder: Path, overrides: Sequence[str]) -> None:
    """Put the names of a run that goes on, and the folder that it lies in now, into its settings.

    Raises
    ------
    ConfigError
        The command line says otherwise.
    """
    kept = {
        "run_name": before["run_name"],
        "project_name": before["project_name"],
        "checkpoint.dirname": folder,
        "checkpoint.filename_prefix": before["checkpoint"]["filename_prefix"],
    }
    given = {override.partition("=")[0] for override in overrides}
    for key, value in kept.items():
        section, _, name = key.rpartition(".")
        owner = getattr(config, section) if section else config
        if key in given and getattr(owner, name) != value:
            raise ConfigError(f"{key}: a run that goes on keeps its own, {value}; remove {key} from the command line")
        setattr(owner, name, value)


def _with_later_settings(before: Mapping[str, Any], config: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Add the default values of the settings (of a section) that are not there."""
    complete = dict(before)
    for field in fields(config):
        key, part = yaml_key(field.name), getattr(config, field.name)
        if key not in complete and key in defaults:
            complete[key] = defaults[key]
        elif is_dataclass(part) and isinstance(complete.get(key), Mapping) and isinstance(defaults.get(key), Mapping):
            complete[key] = _with_later_settings(complete[key], part, defaults[key])
    return complete


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, old and new value of what differs between two nested mappings."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before != now:
            yield prefix, before, now
        return
    for key in dict.fromkeys([*before, *now]):
        dotted = f"{prefix}.{key}" if prefix else str(key)
        yield from _differences(before.get(key), now.get(key), dotted)


def _is_free(key: str) -> bool:
    """Whether a setting may differ: it, or a part that it belongs to, is among `FREE_SETTINGS`."""
    return any(_begins_with(key.split("."), pattern.split(".")) for pattern in FREE_SETTINGS)


def _begins_with(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if len(parts) < len(pattern):
        return False
    return all(p in ("*", part) for part, p in zip(parts[: len(pattern)], pattern, strict=True))
