"""What is reported about a model: mean absolute and root mean square errors per property, overall and per fidelity.

    MAE = Σ|e| / n        RMSE = √(Σe² / n)        n = number of values that have a label

A value is one energy, one component of one force, one charge; padding and missing labels are no values. Sums are kept
in float64 and added up over processes before the division, so results do not depend on how molecules are spread over
batches and processes. A property without any label is absent from the result. While batches are added, nothing waits
for the device.

`error_names` and `loss_names` say what the numbers are called, `RegMultiMetric.units` in which units they are.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced
from torch import Tensor

from aimnet2mult.config.builder import nearest
from aimnet2mult.nbops import BATCH_KEYS, mask_padding, mol_sum
from aimnet2mult.train.loss import Batch, MTLoss, label_error, label_mask, n_atoms
from aimnet2mult.utils.units import scaled_unit

logger = logging.getLogger(__name__)

PROPERTY_OPTIONS = ("abbr", "scale", "peratom", "mult")
"""Options of a property of `RegMultiMetric`."""

PER_ATOM = "energy"
"""Property whose error divided by the number of atoms is reported, too."""

MEASURES = ("mae", "rmse")
"""What is reported of an error."""


class DictMetric(Metric):
    """A metric whose result is a dictionary of numbers, each stored in ``engine.state.metrics`` under its own name."""

    _stored: tuple[str, ...] = ()

    def completed(self, engine: Engine, name: str) -> None:
        """Compute the result at the end of a run of the engine and store it in place of the last one.

        ``name`` only tells metrics of one engine apart.
        """
        for key in self._stored:
            engine.state.metrics.pop(key, None)
        result: dict[str, float] = self.compute()
        engine.state.metrics.update(result)
        self._stored = tuple(result)


class RegMultiMetric(DictMetric):
    """Regression errors of several properties.

    It is updated with ``(y_pred, y_true)``: predictions together with the inputs ``numbers`` (padding) and
    ``_fidelities``, and labels with ``{key}_mask`` (B,).

    Parameters
    ----------
    cfg : mapping
        Property -> mapping with

        - ``abbr``: name in the results (default: the property),
        - ``scale``: factor from eV, eV/Å, e to the units of the results (default 1; 23.06 for kcal/mol),
        - ``peratom``: whether the property is atomic; must agree with `nbops.BATCH_KEYS` for properties in it, and
          is looked up there by default,
        - ``mult``: number of components, 3 for forces (default: what the label has; anything else is refused).
    fidelity_names : mapping, optional
        Fidelity -> prefix of its results (default ``fid0``, ``fid1`` ...).
    num_fidelities : int, optional
        Number of fidelities that may occur. Without it each batch is asked, which on a GPU waits for the batch.

    Raises
    ------
    ValueError
        An unknown option or one of the wrong type; two properties with the same ``abbr``.
    """

    def __init__(
        self,
        cfg: Mapping[str, Mapping[str, Any]],
        fidelity_names: Mapping[int, str] | None = None,
        num_fidelities: int | None = None,
    ) -> None:
        self.properties = {key: _property(key, options) for key, options in cfg.items()}
        names = [options["abbr"] for options in self.properties.values()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"metrics.cfg: two properties have the abbr {name}")
        self.fidelity_names = dict(fidelity_names or {})
        self.num_fidelities = num_fidelities
        self.rows = _error_rows(self.properties)
        self._said: set[str] = set()
        super().__init__()

    @property
    def units(self) -> dict[str, str]:
        """Unit of each number, by its name without fidelity: ``{"E_mae": "kcal/mol", "F_rmse": "kcal/mol/Å"}``."""
        return {f"{row.label}_{measure}": row.unit for row in self.rows for measure in MEASURES}

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget everything."""
        # (R, F, 3): for each kind of error and fidelity the number of values, sum of absolute errors, sum of squares
        self._sums = torch.zeros(len(self.rows), self.num_fidelities or 0, 3, dtype=torch.float64)
        # (P,): molecules with a label of a property that the model does not predict
        self._unpredicted = torch.zeros(len(self.properties), dtype=torch.float64)

    @reinit__is_reduced
    @torch.no_grad()
    def update(self, output: tuple[Batch, Batch]) -> None:
        """Add a batch ``(y_pred, y_true)``."""
        y_pred, y_true = output
        device = y_pred["numbers"].device
        self._sums, self._unpredicted = self._sums.to(device), self._unpredicted.to(device)
        for p, (key, options) in enumerate(self.properties.items()):
            if key not in y_true:
                continue
            if key in y_pred:
                self._add(key, self._property_sums(key, options, y_pred, y_true), y_pred)
            else:
                self._unpredicted[p] += label_mask(y_true, key).sum()

    def _property_sums(self, key: str, options: Mapping[str, Any], y_pred: Batch, y_true: Batch) -> Tensor:
        """Return number of values, Σ|e| and Σe² of each molecule, zero where it has no label; (B, 3) float64."""
        mask = label_mask(y_true, key)
        error = label_error(y_pred[key], y_true[key], mask, y_pred, options["peratom"], key)
        error = error.to(torch.float64)
        components = math.prod(error.shape[y_pred["numbers"].dim() if options["peratom"] else 1 :])
        if options["mult"] is not None and options["mult"] != components:
            raise ValueError(
                f"metrics.cfg.{key}.mult: {options['mult']:g} components expected, the label has {components}"
            )
        sums = torch.stack(per_molecule_sums(error, y_pred, options["peratom"]), dim=1)
        return sums.masked_fill(~mask.unsqueeze(1), 0.0)

    def _add(self, key: str, sums: Tensor, y_pred: Batch) -> None:
        """Add sums of each molecule (B, 3) to those of its fidelity, in each kind of error of the property."""
        fidelities = y_pred.get("_fidelities")
        if fidelities is None:
            fidelities = torch.zeros(len(sums), dtype=torch.long, device=sums.device)
        if self.num_fidelities is None and len(fidelities):
            self._sums = _grown(self._sums, int(fidelities.max()) + 1)
        for r, row in enumerate(self.rows):
            if row.key == key:
                values = sums / _powers(n_atoms(y_pred).clamp(min=1)) if row.per_atom else sums
                self._sums[r].index_add_(0, fidelities.long(), values)

    def compute(self) -> dict[str, float]:
        """Return MAE and RMSE: ``{abbr}_mae``, ``{abbr}_rmse`` and ``fid0/{abbr}_mae`` ..., over all processes.

        The energy has ``{abbr}_per_atom_mae`` and ``..._rmse`` besides.
        """
        sums, unpredicted = self._sums, self._unpredicted
        if idist.get_world_size() > 1:
            # A process may have met fewer fidelities than another.
            sums = _grown(sums, int(idist.all_reduce(sums.shape[1], op="MAX")))
            sums, unpredicted = _over_processes(sums), _over_processes(unpredicted)
        self._say_once(unpredicted)
        result = {}
        for row, parts in zip(self.rows, sums.cpu(), strict=True):
            result.update(_errors(parts.sum(dim=0), row))
            for fidelity, part in enumerate(parts):
                result.update(_errors(part, row, f"{self.fidelity_names.get(fidelity, f'fid{fidelity}')}/"))
        return result

    def _say_once(self, unpredicted: Tensor) -> None:
        for key, count in zip(self.properties, unpredicted.tolist(), strict=True):
            if count and key not in self._said:
                self._said.add(key)
                logger.warning("metrics: the data have labels for %s but the model does not predict it", key)


class _ErrorRow(NamedTuple):
    """A kind of error: what is reported about a property, or about it divided by the number of atoms."""

    key: str
    label: str
    scale: float
    unit: str
    per_atom: bool


def _error_rows(properties: Mapping[str, Mapping[str, Any]]) -> list[_ErrorRow]:
    rows = []
    for key, options in properties.items():
        label, scale = options["abbr"], options["scale"]
        unit = _unit(key, scale)
        rows.append(_ErrorRow(key, label, scale, unit, False))
        if key == PER_ATOM:
            rows.append(_ErrorRow(key, f"{label}_per_atom", scale, f"{unit}/atom", True))
    return rows


def _unit(key: str, scale: float) -> str:
    """Return the unit of a property's errors, which are those of the batch times ``scale``."""
    return scaled_unit(BATCH_KEYS[key].unit if key in BATCH_KEYS else "units of the data", scale)


def error_names(cfg: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the errors over all fidelities that `RegMultiMetric` reports: ``E_mae``, ``F_rmse``.

    Parameters
    ----------
    cfg : mapping
        As for `RegMultiMetric`.

    Raises
    ------
    ValueError
        As `RegMultiMetric`.
    """
    return list(RegMultiMetric(cfg).units)


def metrics_table(metrics: Mapping[str, float], units: Mapping[str, str] | None = None) -> str:
    """Return validation metrics as a table: a column for each error, a row for all data and for each fidelity.

    Parameters
    ----------
    metrics : mapping
        Name -> value; losses are left out.
    units : mapping, optional
        Name without fidelity -> unit (`RegMultiMetric.units`), shown beneath the names.
    """
    rows: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        if not name.endswith("loss"):
            fidelity, _, error = name.rpartition("/")
            rows.setdefault(fidelity or "all", {})[error] = f"{value:.4g}"
    errors = list(dict.fromkeys(error for row in rows.values() for error in row))
    if units is not None:
        rows = {"": {error: units.get(error, "") for error in errors}, **rows}
    widths = [max(9, len(error), *(len(row.get(error, "")) for row in rows.values())) for error in errors]
    names = max([8, *(len(fidelity) + 1 for fidelity in rows)])
    lines = [" " * names + " ".join(f"{error:>{width}}" for error, width in zip(errors, widths, strict=True))]
    for fidelity, row in rows.items():
        cells = (row.get(error, "-").rjust(width) for error, width in zip(errors, widths, strict=True))
        lines.append(f"{fidelity:<{names}}" + " ".join(cells))
    return "\n".join(lines)


def per_molecule_sums(error: Tensor, y_pred: Batch, atomic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Count of values, sum of absolute values and sum of squares of an error in each molecule.

    Parameters
    ----------
    error : Tensor
        (B, ...) or, if ``atomic``, (B, N, ...) or (A, ...).
    y_pred : mapping
        The batch; ``numbers`` tells padding from atoms.
    atomic : bool
        Whether the error is that of an atomic property.

    Returns
    -------
    tuple of Tensor
        Three times (B,), dtype of ``error``.
    """
    if not atomic:
        rows = error.reshape(len(error), -1)
        counts = torch.full_like(rows[:, 0], rows.shape[1])
        return counts, rows.abs().sum(dim=1), rows.pow(2).sum(dim=1)
    batch = dict(y_pred)
    per_atom = mask_padding(error, batch)
    per_atom = per_atom.reshape(*y_pred["numbers"].shape, -1)
    counts = n_atoms(y_pred).to(error.dtype) * per_atom.shape[-1]
    return counts, mol_sum(per_atom.abs().sum(-1), batch), mol_sum(per_atom.pow(2).sum(-1), batch)


def _powers(size: Tensor) -> Tensor:
    """Divisors (1, n, n²) of (count, Σ|e|, Σe²) that make errors per atom of errors per molecule; (B, 3) float64."""
    return size.to(torch.float64).unsqueeze(1) ** torch.arange(3, device=size.device)


def _grown(sums: Tensor, n_fidelities: int) -> Tensor:
    """Add zeros until the second axis has at least ``n_fidelities`` entries."""
    missing = max(n_fidelities - sums.shape[1], 0)
    return torch.cat([sums, sums.new_zeros(sums.shape[0], missing, 3)], dim=1) if missing else sums


def _over_processes(sums: Tensor) -> Tensor:
    """Return the sum over processes."""
    total = idist.all_reduce(sums.clone())
    assert isinstance(total, Tensor)
    return total


def _errors(sums: Tensor, row: _ErrorRow, prefix: str = "") -> dict[str, float]:
    """MAE and RMSE of (count, Σ|e|, Σe²); nothing without a value."""
    count, absolute, squares = sums.tolist()
    if count == 0:
        return {}
    values = (row.scale * absolute / count, row.scale * math.sqrt(squares / count))
    return {f"{prefix}{row.label}_{measure}": value for measure, value in zip(MEASURES, values, strict=True)}


def _property(key: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of a property and fill in what is missing."""
    where = f"metrics.cfg.{key}"
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: expected a mapping with {', '.join(PROPERTY_OPTIONS)}")
    for name in options:
        if name not in PROPERTY_OPTIONS:
            raise ValueError(f"{where}: unknown option {name}; {nearest(str(name), PROPERTY_OPTIONS)}")
    abbr, scale = options.get("abbr", key), options.get("scale", 1.0)
    mult, peratom = options.get("mult"), options.get("peratom")
    if not isinstance(abbr, str) or not abbr:
        raise ValueError(f"{where}.abbr: {abbr!r} is not a name")
    for name, value in (("scale", scale), ("mult", 1.0 if mult is None else mult)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{where}.{name}: {value!r} is not a positive number")
    if peratom is not None and not isinstance(peratom, bool):
        raise ValueError(f"{where}.peratom: {peratom!r} is not true or false")
    if key in BATCH_KEYS:
        kind = BATCH_KEYS[key].kind
        if peratom is not None and peratom != (kind == "atom"):
            is_atomic = "an atomic" if kind == "atom" else "a molecular"
            raise ValueError(f"{where}.peratom: {key} is {is_atomic} property; set it to {str(kind == 'atom').lower()}")
        peratom = kind == "atom"
    return {"abbr": abbr, "scale": float(scale), "peratom": bool(peratom), "mult": mult}


class LossMetric(DictMetric):
    """The loss over all molecules of a run, ``loss``, and its components, ``{name}_loss``.

    Means over molecules are put together from the batches by the number of labelled molecules in each, so that the
    result is that of one big batch.

    Parameters
    ----------
    loss_fn : MTLoss
        The loss; it is used in evaluation mode.
    """

    def __init__(self, loss_fn: MTLoss) -> None:
        self.loss_fn = loss_fn
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget everything."""
        # (2, K): Σ_batches L_k · labelled molecules, Σ_batches labelled molecules
        self._sums = torch.zeros(2, len(self.loss_fn.functions), dtype=torch.float64)

    @reinit__is_reduced
    @torch.no_grad()
    def update(self, output: tuple[Batch, Batch]) -> None:
        """Add a batch ``(y_pred, y_true)``."""
        y_pred, y_true = output
        components = self.loss_fn.components(y_pred, y_true)
        counts = self.loss_fn.counts(y_true)
        values = torch.stack([value.to(torch.float64) for value in components.values()])
        self._sums = self._sums.to(values.device) + torch.stack([values * counts, counts])

    def compute(self) -> dict[str, float]:
        """Return the loss and its components over all processes; components without a label are absent."""
        sums = _over_processes(self._sums) if idist.get_world_size() > 1 else self._sums
        total, counts = sums.cpu()
        if not bool(counts.any()):
            return {}
        values = total / counts.clamp(min=1)
        numbers = [float(self.loss_fn.total(values)), *values.tolist()]
        found = [1, *counts.tolist()]
        names = loss_names(self.loss_fn.functions)
        return {name: number for name, number, count in zip(names, numbers, found, strict=True) if count}


def loss_names(components: Iterable[str]) -> list[str]:
    """Return the names of the loss and its components as `LossMetric` reports them."""
    return ["loss", *(f"{name}_loss" for name in components)]
