"""The history of a training, ``metrics.jsonl``, as learning curves: errors of each fidelity by iteration."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimnet2mult.config.builder import ConfigError, load_yaml
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.utils.run_files import SETTINGS
from aimnet2mult.utils.units import scaled_unit

logger = logging.getLogger(__name__)

STAGES = {"train/loss": "training", "val/loss": "validation"}
"""Losses of a history, and what they are called."""

ALL = "all"
"""Name of the curve over all fidelities."""


@dataclass
class Panel:
    """Curves that belong into one pair of axes.

    Attributes
    ----------
    title : str
        What they show.
    unit : str
        Unit of the values; empty for a loss.
    curves : dict of str to list of (int, float)
        Name -> (iteration, value).
    """

    title: str
    unit: str
    curves: dict[str, list[tuple[int, float]]]


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a history.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            logger.warning("%s: its last line is not complete and is left out", path)
            lines.pop()
        records = [json.loads(line) for line in lines]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a metrics.jsonl of a training: {error}") from error
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: not a metrics.jsonl of a training: its lines are no records")
    return records


def metric_units(cfg: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Units of validation errors by the settings of the metric.

    Parameters
    ----------
    cfg : mapping
        ``metrics.kwargs.cfg`` of a training: property -> ``abbr``, ``scale`` (from eV, eV/Å, e to the unit of the
        error).

    Returns
    -------
    dict
        Name of the error without fidelity -> unit: ``{"E_mae": "kcal/mol"}``.
    """
    units = {}
    for key, options in cfg.items():
        unit = BATCH_KEYS[key].unit if key in BATCH_KEYS else "units of the data"
        unit = scaled_unit(unit, float(options.get("scale", 1.0)))
        abbr = options.get("abbr", key)
        units[f"{abbr}_mae"], units[f"{abbr}_per_atom_mae"] = unit, f"{unit}/atom"
    return units


def units_of_run(folder: Path) -> dict[str, str]:
    """Units of the errors in the ``metrics.jsonl`` of a folder, by the settings beside it; empty where there are none.

    Raises
    ------
    ConfigError
        Settings that are no YAML.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    settings = load_yaml(path)
    try:
        return metric_units(settings["metrics"]["kwargs"]["cfg"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the settings of a training: no metrics.kwargs.cfg") from error


def learning_curves(records: Sequence[Mapping[str, Any]], units: Mapping[str, str] | None = None) -> list[Panel]:
    """Losses and mean absolute errors of the validation against the iteration.

    Parameters
    ----------
    records : sequence of mapping
        Those of `read_history`.
    units : mapping, optional
        As `metric_units` gives them.

    Returns
    -------
    list of Panel
        First the losses, then a panel for each error: a curve for all molecules (where there is more than one
        fidelity) and one for each fidelity. Empty without validation.
    """
    names = list(dict.fromkeys(key for record in records for key in record))
    errors: dict[str, dict[str, str]] = {}
    for name in names:
        parts = name.split("/")
        if parts[0] == "val" and name.endswith("_mae") and len(parts) in (2, 3):
            fidelity = parts[1] if len(parts) == 3 else ALL
            errors.setdefault(parts[-1].removesuffix("_mae"), {})[fidelity] = name
    if not errors and "val/loss" not in names:
        return []
    losses = {title: _curve(records, key) for key, title in STAGES.items() if key in names}
    panels = [Panel("loss", "", losses)] if losses else []
    for error, curves in errors.items():
        if len(curves) == 2:
            curves = {fidelity: name for fidelity, name in curves.items() if fidelity != ALL}
        unit = (units or {}).get(f"{error}_mae", "units of the log")
        title = f"{error.replace('_per_atom', ' per atom')} MAE"
        panels.append(Panel(title, unit, {fidelity: _curve(records, name) for fidelity, name in curves.items()}))
    return panels


def _curve(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    points = ((record.get("iteration", i), record.get(key)) for i, record in enumerate(records))
    return [(int(i), float(value)) for i, value in points if isinstance(value, int | float) and math.isfinite(value)]
