"""Which validation number a run follows: for the best checkpoint, for the plateau of the learning rate, for its end.

Everything here takes the metrics as the evaluator gives them, ``loss`` or ``ccsd/F_mae``. In the history and in the
loggers they stand as ``val/loss`` and ``val/ccsd/F_mae``; settings may use either name. Low is good.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from aimnet2mult.config.builder import ConfigError, nearest
from aimnet2mult.train.metrics import error_names, loss_names

logger = logging.getLogger(__name__)

VALIDATION = "val/"
"""What the names of validation metrics begin with in the history and in the loggers."""


def possible_metrics(
    fidelities: Iterable[str],
    metrics_cfg: Mapping[str, Any],
    loss_components: Iterable[str],
    labels: Iterable[str] | None = None,
) -> list[str]:
    """Return the names that validation metrics may have, before any data are read.

    They are those of `RegMultiMetric` and `LossMetric`; about another class of metrics nothing is known.

    Parameters
    ----------
    fidelities : iterable of str
        Names of the fidelities.
    metrics_cfg : mapping
        ``metrics.kwargs.cfg``: property -> options.
    loss_components : iterable of str
        Names of the components of the loss.
    labels : iterable of str, optional
        ``data.y``; a property that is not listed is not read, so that there is no error of it.

    Returns
    -------
    list of str
        Without ``val/``, in the order in which they are reported.
    """
    read = set(metrics_cfg) if labels is None else set(labels)
    errors = error_names({key: options for key, options in metrics_cfg.items() if key in read})
    return [*loss_names(loss_components), *errors, *(f"{name}/{error}" for name in fidelities for error in errors)]


class Monitor:
    """One number of each validation: a metric, or a weighted sum of several.

    Parameters
    ----------
    what : str or mapping
        Name of a metric, or name -> weight (positive). ``val/`` before a name may be left out.
    where : str
        Dotted key of the setting, for messages.

    Attributes
    ----------
    weights : dict of str to float
        Names, without ``val/``, and their weights.
    where : str
        As given.

    Raises
    ------
    ConfigError
        Neither of the two, an empty sum, a metric that is named twice, or a weight that is not a positive number.

    Examples
    --------
    >>> Monitor({"val/ccsd/F_mae": 1.0, "dft/F_mae": 0.5}, "checkpoint.monitor").value(
    ...     {"loss": 1.0, "ccsd/F_mae": 2.0, "dft/F_mae": 4.0}
    ... )
    4.0
    """

    def __init__(self, what: str | Mapping[str, float], where: str) -> None:
        self.where = where
        if isinstance(what, str):
            what = {what: 1.0}
        if not isinstance(what, Mapping) or not what:
            raise ConfigError(f"{where}: expected a validation metric or {{metric: weight}}, found {what!r}")
        self.weights: dict[str, float] = {}
        for given, weight in what.items():
            name = str(given).removeprefix(VALIDATION)
            if not name:
                raise ConfigError(f"{where}: {given!r} is not the name of a validation metric")
            if name in self.weights:
                raise ConfigError(f"{where}: {name} is named twice, with and without {VALIDATION}; keep one of them")
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight <= 0:
                raise ConfigError(f"{where}.{name}: expected a positive weight, found {weight!r}")
            self.weights[name] = float(weight)

    @property
    def text(self) -> str:
        """The number in words: ``ccsd/F_mae``, or ``1 ccsd/F_mae + 0.5 dft/F_mae``."""
        if list(self.weights.values()) == [1.0]:
            return next(iter(self.weights))
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the number for the metrics of a validation; it is not finite where one of them is not.

        Raises
        ------
        ConfigError
            As `check`.
        """
        self.check(metrics)
        return sum((weight * metrics[name] for name, weight in self.weights.items()), start=0.0)

    def check(self, metrics: Iterable[str]) -> None:
        """Make sure that the metrics are there.

        Parameters
        ----------
        metrics : iterable of str
            Names that there are: the metrics of a validation, or `possible_metrics`.

        Raises
        ------
        ConfigError
            One is not; the message names the nearest ones.
        """
        known = list(metrics)
        for name in self.weights:
            if name not in known:
                there = nearest(name, known) if known else "there are none"
                raise ConfigError(f"{self.where}: {name} is not a validation metric; {there}")


class EarlyStopping:
    """The end of a training that gets no better.

    Parameters
    ----------
    monitor : Monitor
        What to follow.
    patience : int
        Validations in a row without improvement after which the training ends.
    min_delta : float
        Smallest decrease that counts as improvement. It is measured from the value of the last improvement, so that
        many small steps in one direction count in the end.
    where : str
        Dotted key of the settings, for messages.

    Attributes
    ----------
    best : float
        Value at the last improvement.
    waited : int
        Validations since then.

    Raises
    ------
    ConfigError
        ``patience`` less than 1, or ``min_delta`` negative or not finite.
    """

    def __init__(
        self, monitor: Monitor, patience: int, min_delta: float = 0.0, where: str = "trainer.early_stopping"
    ) -> None:
        if patience < 1:
            raise ConfigError(f"{where}.patience: expected 1 or more validations, found {patience}")
        if not math.isfinite(min_delta) or min_delta < 0:
            raise ConfigError(f"{where}.min_delta: expected a number of 0 or more, found {min_delta}")
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.best = math.inf
        self.waited = 0

    def update(self, metrics: Mapping[str, float]) -> bool:
        """Take the metrics of a validation; return whether the training shall end.

        A value that is not finite is no improvement.

        Raises
        ------
        ConfigError
            A metric that the monitor follows is not there.
        """
        value = self.monitor.value(metrics)
        if math.isfinite(value) and value < self.best and self.best - value >= self.min_delta:
            self.best = value
            self.waited = 0
        else:
            self.waited += 1
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; numbers and texts only."""
        return {"monitor": self.monitor.text, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; if another number was followed then, begin anew and say so."""
        if state["monitor"] != self.monitor.text:
            logger.warning(
                "early stopping follows %s, the checkpoint followed %s: the patience begins anew",
                self.monitor.text,
                state["monitor"],
            )
            return
        self.best, self.waited = float(state["best"]), int(state["waited"])


class FidelityStopping:
    """The end of the training on fidelities that get no better, each by a rule of its own.

    Parameters
    ----------
    rules : mapping of str to EarlyStopping
        Name of a fidelity -> when it stops.
    """

    def __init__(self, rules: Mapping[str, EarlyStopping]) -> None:
        self.rules = dict(rules)

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Take the metrics of a validation; return the names of the fidelities that stop with it.

        Raises
        ------
        ConfigError
            A metric that a monitor follows is not there.
        """
        learning = {name: rule for name, rule in self.rules.items() if not rule.exhausted}
        return [name for name, rule in learning.items() if rule.update(metrics)]

    @property
    def stopped(self) -> list[str]:
        """Names of the fidelities whose patience is at its end."""
        return [name for name, rule in self.rules.items() if rule.exhausted]

    @property
    def exhausted(self) -> bool:
        """Whether all of them have stopped."""
        return len(self.stopped) == len(self.rules)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; numbers and texts only."""
        return {name: rule.state_dict() for name, rule in self.rules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, each rule as `EarlyStopping.load_state_dict`; a rule that is new begins."""
        for name, rule in self.rules.items():
            if name in state:
                rule.load_state_dict(state[name])
