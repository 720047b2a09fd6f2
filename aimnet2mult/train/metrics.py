"""What is reported about a model: mean absolute and root mean square errors per property, overall and per fidelity.

    MAE = Σ|e| / n        RMSE = √(Σe² / n)        n = number of values that have a label

A value is one energy, one component of one force, one charge; padding and missing labels are no values. Sums are kept
in float64 and added up over processes before the division, so results do not depend on how molecules are spread over
batches and processes. A property without any label is absent from the result.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced
from torch import Tensor

from aimnet2mult.config.builder import nearest
from aimnet2mult.nbops import BATCH_KEYS, mask_padding, mol_sum
from aimnet2mult.train.loss import Batch, MTLoss, label_error, label_mask, n_atoms

logger = logging.getLogger(__name__)

PROPERTY_OPTIONS = ("abbr", "scale", "peratom", "mult")
"""Options of a property of `RegMultiMetric`."""

PER_ATOM = "energy"
"""Property whose error divided by the number of atoms is reported, too."""


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

    Raises
    ------
    ValueError
        An unknown option or one of the wrong type; two properties with the same ``abbr``.
    """

    def __init__(self, cfg: Mapping[str, Mapping[str, Any]], fidelity_names: Mapping[int, str] | None = None) -> None:
        self.properties = {key: _property(key, options) for key, options in cfg.items()}
        names = [options["abbr"] for options in self.properties.values()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"metrics.cfg: two properties have the abbr {name}")
        self.fidelity_names = dict(fidelity_names or {})
        self._said: set[str] = set()
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget everything."""
        # property -> (F, 3): number of values, sum of absolute errors, sum of squares, for each fidelity
        self._sums: dict[str, Tensor] = {}

    @reinit__is_reduced
    @torch.no_grad()
    def update(self, output: tuple[Batch, Batch]) -> None:
        """Add a batch ``(y_pred, y_true)``."""
        y_pred, y_true = output
        for key, options in self.properties.items():
            if key not in y_true:
                continue
            if key not in y_pred:
                self._say_once(key, label_mask(y_true, key))
                continue
            self._update_property(key, options, y_pred, y_true)

    def _say_once(self, key: str, mask: Tensor) -> None:
        if key not in self._said and bool(mask.any()):
            self._said.add(key)
            logger.warning("metrics: the data have labels for %s but the model does not predict it", key)

    def _update_property(self, key: str, options: Mapping[str, Any], y_pred: Batch, y_true: Batch) -> None:
        mask = label_mask(y_true, key)
        error = label_error(y_pred[key], y_true[key], mask, y_pred, options["peratom"], key)
        error = error.to(torch.float64)
        values, absolute, squares = per_molecule_sums(error, y_pred, options["peratom"])
        components = math.prod(error.shape[y_pred["numbers"].dim() if options["peratom"] else 1 :])
        if options["mult"] is not None and options["mult"] != components:
            raise ValueError(
                f"metrics.cfg.{key}.mult: {options['mult']:g} components expected, the label has {components}"
            )
        self._add(key, torch.stack([values, absolute, squares], dim=1).masked_fill(~mask.unsqueeze(1), 0.0), y_pred)
        if key == PER_ATOM:
            size = n_atoms(y_pred).clamp(min=1)
            rows = torch.stack([values, absolute / size, squares / size**2], dim=1)
            self._add(f"{key}/atom", rows.masked_fill(~mask.unsqueeze(1), 0.0), y_pred)

    def _add(self, name: str, rows: Tensor, y_pred: Batch) -> None:
        """Add sums of each molecule (B, 3) to those of its fidelity."""
        fidelities = y_pred.get("_fidelities")
        if fidelities is None:
            fidelities = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        n_fidelities = int(fidelities.max()) + 1 if len(fidelities) else 0
        sums = _grown(self._sums.get(name, rows.new_zeros(0, 3)), n_fidelities)
        self._sums[name] = sums.index_add(0, fidelities.long(), rows)

    def compute(self) -> dict[str, float]:
        """Return MAE and RMSE: ``{abbr}_mae``, ``{abbr}_rmse`` and ``fid0/{abbr}_mae`` ..., over all processes.

        The energy has ``{abbr}_per_atom_mae`` and ``..._rmse`` besides.
        """
        result = {}
        for key, options in self.properties.items():
            result.update(self._results(key, options["abbr"], options["scale"]))
            if key == PER_ATOM:
                result.update(self._results(f"{key}/atom", f"{options['abbr']}_per_atom", options["scale"]))
        return result

    def _results(self, name: str, label: str, scale: float) -> dict[str, float]:
        sums = self._sums.get(name, torch.zeros(0, 3, dtype=torch.float64))
        if idist.get_world_size() > 1:
            # A process may have met fewer fidelities than another.
            sums = _grown(sums, int(idist.all_reduce(len(sums), op="MAX")))
            if len(sums):
                reduced = idist.all_reduce(sums.clone())
                assert isinstance(reduced, Tensor)
                sums = reduced
        result = _errors(sums.sum(dim=0), label, scale)
        for fidelity, row in enumerate(sums):
            prefix = self.fidelity_names.get(fidelity, f"fid{fidelity}")
            result.update(_errors(row, f"{prefix}/{label}", scale))
        return result


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


def _grown(sums: Tensor, n_rows: int) -> Tensor:
    """Add rows of zeros until there are at least ``n_rows``."""
    missing = max(n_rows - len(sums), 0)
    return torch.cat([sums, sums.new_zeros(missing, 3)]) if missing else sums


def _errors(row: Tensor, label: str, scale: float) -> dict[str, float]:
    """MAE and RMSE of (count, Σ|e|, Σe²); nothing without a value."""
    count, absolute, squares = row.tolist()
    if count == 0:
        return {}
    return {f"{label}_mae": scale * absolute / count, f"{label}_rmse": scale * math.sqrt(squares / count)}


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
        sums = self._sums
        if idist.get_world_size() > 1:
            reduced = idist.all_reduce(sums.clone())
            assert isinstance(reduced, Tensor)
            sums = reduced
        total, counts = sums
        if not bool(counts.any()):
            return {}
        values = total / counts.clamp(min=1)
        result = {"loss": float(self.loss_fn.total(values))}
        for name, value, count in zip(self.loss_fn.functions, values.tolist(), counts.tolist(), strict=True):
            if count:
                result[f"{name}_loss"] = value
        return result
