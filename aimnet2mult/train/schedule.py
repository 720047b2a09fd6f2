"""The learning rate over a run.

A schedule is any scheduler of ``ignite.handlers`` or ``torch.optim.lr_scheduler``, with an optional growth of the rates
at the beginning. Warm-up and half a cosine over the whole run, a step after every iteration:

```yaml
scheduler:
  class: torch.optim.lr_scheduler.CosineAnnealingLR
  unit: iteration                              # torch's schedulers step after an epoch by themselves
  kwargs: {T_max: total, eta_min: 1.0e-6}      # total: all steps of the run, here its iterations
  warmup: {iterations: 1000, start: 0.01}      # from 1 % of the rate to all of it, times the cosine
```

A rate that stays constant after the warm-up is ``torch.optim.lr_scheduler.ConstantLR`` with ``{factor: 1.0}``.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ignite.handlers.param_scheduler import (
    BaseParamScheduler,
    ParamScheduler,
    ReduceLROnPlateauScheduler,
    create_lr_scheduler_with_warmup,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from aimnet2mult.config.builder import ConfigError, nearest, resolve
from aimnet2mult.train.monitor import Monitor
from aimnet2mult.train.optimizer import reference_optimizer
from aimnet2mult.train.utils import accepted_keywords

if TYPE_CHECKING:
    from aimnet2mult.train.schema import OptimizerConfig, SchedulerConfig, WarmupConfig

logger = logging.getLogger(__name__)

UNITS = ("iteration", "epoch", "validation")
"""What a schedule may step after."""

TOTAL = "total"
"""Value of a keyword that stands for all steps of the run, in the unit of the schedule."""

FUNCTIONS = ("lr_lambda", "scale_fn")
"""Keywords of torch's schedulers that are functions; settings give their dotted names."""


@dataclass(frozen=True)
class RunLength:
    """What a whole run consists of, in each unit that a schedule may have.

    Attributes
    ----------
    iteration, epoch, validation : int
        How many there are. `Schedule` reads the one of its unit for the word ``total``.
    """

    iteration: int
    epoch: int
    validation: int


def run_length(iterations: Sequence[int], validate_every: int | None = None) -> RunLength:
    """Return the length of a run.

    Parameters
    ----------
    iterations : sequence of int
        Steps of the optimiser in each epoch.
    validate_every : int, optional
        ``log_frequency.val``: iterations between validations, besides the one after each epoch. An epoch that ends
        with such an iteration is validated once.
    """
    ends = list(accumulate(iterations))
    total = ends[-1] if ends else 0
    between = 0
    if validate_every is not None:
        between = total // validate_every - sum(end % validate_every == 0 for end in ends)
    return RunLength(iteration=total, epoch=len(ends), validation=len(ends) + between)


UNKNOWN_LENGTH = RunLength(iteration=1_000_000, epoch=1_000, validation=1_000)
"""Stands for the length of a run while it is not known, so that settings can be checked before data are read."""


class Schedule:
    """Learning rates over the run.

    The scheduler runs on an optimiser of its own with one group at the base rate (`reference_optimizer`). Each group
    of the real optimiser follows in proportion: twice the base rate stays twice the base rate, whatever the
    schedule's formula (published schedulers differ in this: some set one absolute value for every group). A warm-up
    multiplies the rates of all groups, after step t of the optimiser by

        start + (1 - start) t / iterations        (1 from t = iterations on)

    whatever the unit of the schedule.

    The loop calls `iteration`, `epoch` and `validation` after each of them; those that are not the schedule's unit
    only count, and move the warm-up. Under ``total`` the schedule rests at its last value when a run turns out longer
    than planned.

    Parameters
    ----------
    config : SchedulerConfig
        Section ``scheduler`` of the settings.
    optimizer_config : OptimizerConfig
        Section ``optimizer``.
    optimizer : Optimizer, optional
        Its groups' rates are set from here on. Build the schedule before the optimiser's state is restored: the rates
        that the groups have now are those that are scaled.
    length : RunLength, optional
        What the word ``total`` stands for. Only where settings are checked, without an optimiser, it may be missing.

    Attributes
    ----------
    unit : str
        ``"iteration"``, ``"epoch"`` or ``"validation"``: what the schedule steps after.
    monitor : Monitor or None
        What a plateau schedule follows.
    counts : dict of str to int
        Iterations, epochs and validations so far.

    Raises
    ------
    ConfigError
        Arguments that the scheduler refuses.
    """

    def __init__(
        self,
        config: "SchedulerConfig",
        optimizer_config: "OptimizerConfig",
        optimizer: Optimizer | None = None,
        length: RunLength | None = None,
    ) -> None:
        self.reference = reference_optimizer(optimizer_config)
        self.initial = {key: value for key, value in self.reference.param_groups[0].items() if key != "params"}
        self.optimizer = optimizer
        self.changed = {"lr"}  # what the schedule has changed so far
        self.group_initial = [dict(group) for group in optimizer.param_groups] if optimizer is not None else []
        self.terminate_below = config.terminate_on_low_lr or 0.0
        self.warmup = _checked_warmup(config.warmup)
        own_unit = scheduler_unit(resolve(config.class_))
        self.unit = config.unit or own_unit
        if self.unit not in UNITS:
            raise ConfigError(f"scheduler.unit: {self.unit!r} is not a unit; {nearest(self.unit, UNITS)}")
        self.counts = dict.fromkeys(UNITS, 0)

        total = asdict(length or UNKNOWN_LENGTH)[self.unit]
        kwargs = _with_total(dict(config.kwargs), total)
        self.rests_after = total if kwargs != config.kwargs else None
        if self.rests_after is not None and optimizer is not None and length is None:
            raise ValueError(f"scheduler.kwargs: the word {TOTAL} needs the length of the run")
        base = {key: value for key, value in self.initial.items() if key in optimizer_config.kwargs}
        self.arguments = json.dumps([config.class_, kwargs, self.unit, base], default=str)
        plateau = own_unit == "validation"
        self.monitor = Monitor(kwargs.pop("metric_name", "loss"), "scheduler.kwargs.metric_name") if plateau else None
        self.name = config.class_
        try:
            self.scheduler = _make_scheduler(config.class_, kwargs, self.reference)
        except ConfigError:
            raise
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise ConfigError(f"scheduler: {config.class_}: {error}") from error
        if length is not None:
            self._check_end(total)
        self.reference.step()  # no gradient, no effect: torch warns about schedules ahead of their optimiser
        if isinstance(self.scheduler, ParamScheduler):
            self.scheduler(None)  # Ignite's schedulers set their first value when called, those of torch when built
        self.peak = self._scheduled_rate
        self.followed_values: list[float] = []
        self._follow()

    @property
    def rate(self) -> float:
        """Base learning rate now."""
        return self._scheduled_rate * self._warmup_factor

    @property
    def exhausted(self) -> bool:
        """Whether the scheduled rate has fallen below ``terminate_on_low_lr``.

        While a rate grows at the beginning, it was never above, and this is false.
        """
        return self._scheduled_rate < self.terminate_below <= self.peak

    @property
    def _scheduled_rate(self) -> float:
        """Base rate without warm-up."""
        return float(self.reference.param_groups[0]["lr"])

    @property
    def _warmup_factor(self) -> float:
        done = self.counts["iteration"]
        if self.warmup is None or done >= self.warmup.iterations:
            return 1.0
        return self.warmup.start + (1.0 - self.warmup.start) * done / self.warmup.iterations

    # --- what the loop calls ---

    def iteration(self) -> None:
        """Go on after a step of the optimiser."""
        self._count("iteration")

    def epoch(self, metrics: Mapping[str, float] | None = None) -> None:
        """Go on after an epoch; a plateau schedule with the unit epoch reads the ``metrics`` of its validation."""
        self._count("epoch", metrics)

    def validation(self, metrics: Mapping[str, float]) -> None:
        """Go on after a validation, be it at the end of an epoch or between.

        Raises
        ------
        ConfigError
            A metric that the schedule follows is not among ``metrics``.
        """
        self._count("validation", metrics)

    def step(self, metrics: Mapping[str, float] | None = None) -> None:
        """Go one unit on, whichever it is; a plateau schedule reads ``metrics``."""
        self._count(self.unit, metrics)

    @property
    def followed(self) -> list[str]:
        """Metrics that the schedule reads; none but for a plateau."""
        return [] if self.monitor is None else list(self.monitor.weights)

    def check_metric(self, metrics: Mapping[str, float]) -> None:
        """Raise ConfigError if the schedule follows a metric that is not among ``metrics``."""
        if self.monitor is not None:
            self.monitor.check(metrics)

    def _count(self, unit: str, metrics: Mapping[str, float] | None = None) -> None:
        self.counts[unit] += 1
        if unit == self.unit:
            if self.monitor is not None:
                self.followed_values.append(float(self.monitor.value(metrics or {})))
            if not self._rests(self.counts[unit]):
                self._advance(self.counts[unit])
        self._follow()

    def _rests(self, step: int) -> bool:
        return self.rests_after is not None and step >= self.rests_after

    def _check_end(self, total: int) -> None:
        """Refuse a cycle that is over before the run: torch raises then, perhaps after weeks."""
        if isinstance(self.scheduler, OneCycleLR) and self.scheduler.total_steps < total:
            raise ConfigError(
                f"scheduler.kwargs.total_steps: the cycle ends after {self.scheduler.total_steps} steps, the run has "
                f"{total} ({self.unit}s); use total_steps: {TOTAL}"
            )

    def _advance(self, step: int) -> None:
        """Take the scheduler's step of this number, counted from 1."""
        try:
            if self.monitor is not None:
                self.scheduler.step(self.followed_values[step - 1])
            elif isinstance(self.scheduler, ParamScheduler):
                self.scheduler(None)
            else:
                self.scheduler.step()
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"scheduler.kwargs: {self.name}: {error} (after {self.unit} {step})") from error
        self.peak = max(self.peak, self._scheduled_rate)

    def _follow(self) -> None:
        """Carry what the schedule changed over to the optimiser's groups, in proportion to their own values."""
        if self.optimizer is None:
            return
        now = self.reference.param_groups[0]
        self.changed |= {key for key, value in self.initial.items() if now[key] != value}
        for key in self.changed:
            for group, own in zip(self.optimizer.param_groups, self.group_initial, strict=True):
                scales = isinstance(now[key], int | float) and self.initial[key] != 0
                group[key] = own[key] * (now[key] / self.initial[key]) if scales else now[key]
                if key == "lr":
                    group[key] *= self._warmup_factor

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: texts, numbers, and lists and mappings of such."""
        return {"arguments": self.arguments, "counts": dict(self.counts), "followed": list(self.followed_values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, at rates that are bitwise the same; restore the optimiser before.

        The scheduler, just built, takes the steps again that it had taken (some microseconds each): no two kinds
        remember alike, and some tell only a part of what they remember. If the settings of the schedule have changed
        (also by ``total``, when epochs were added), this makes it as if they had been the new ones from the beginning,
        and the log says so.
        """
        if state["arguments"] != self.arguments:
            logger.warning(
                "the schedule is not that of the checkpoint; it goes on as if it had been from the beginning"
            )
        self.counts, self.followed_values = dict(state["counts"]), list(state["followed"])
        for step in range(1, self.counts[self.unit] + 1):
            if self._rests(step):
                break
            self._advance(step)
        self._follow()


def scheduler_unit(target: Any) -> str:
    """Return after what a scheduler steps by itself: Ignite's after an iteration, torch's after an epoch.

    Raises
    ------
    ValueError
        Not a scheduler of the learning rate.
    """
    if target is create_lr_scheduler_with_warmup:
        return "iteration"
    if isinstance(target, type) and issubclass(target, ReduceLROnPlateauScheduler | ReduceLROnPlateau):
        return "validation"
    if isinstance(target, type) and issubclass(target, ParamScheduler):
        return "iteration"
    if isinstance(target, type) and issubclass(target, LRScheduler):
        return "epoch"
    name = getattr(target, "__name__", str(target))
    raise ValueError(f"{name} is not a scheduler of ignite.handlers or torch.optim.lr_scheduler")


def _checked_warmup(warmup: "WarmupConfig | None") -> "WarmupConfig | None":
    if warmup is not None and warmup.iterations < 1:
        raise ConfigError(f"scheduler.warmup.iterations: expected 1 or more, found {warmup.iterations}")
    if warmup is not None and not 0 < warmup.start <= 1:
        raise ConfigError(f"scheduler.warmup.start: expected a share of the rate in (0, 1], found {warmup.start}")
    return warmup


def _with_total(value: Any, total: int) -> Any:
    """Return arguments with the number of steps in place of the word ``total``, however deep."""
    if isinstance(value, Mapping):
        return {key: _with_total(item, total) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_total(item, total) for item in value]
    return total if value == TOTAL else value


def _make_scheduler(name: str, kwargs: Mapping[str, Any], optimizer: Optimizer) -> Any:
    """Build a scheduler over ``optimizer``; nodes ``{class, kwargs}`` among its arguments are built before it."""
    try:
        target = resolve(name)
    except ConfigError as error:
        raise ConfigError(f"scheduler: class: {error}") from error
    arguments = {key: _make_nodes(value, optimizer) for key, value in kwargs.items()}
    for key in FUNCTIONS:
        if isinstance(arguments.get(key), str):
            arguments[key] = _function(arguments[key], f"scheduler.kwargs.{key}")
    if target is ReduceLROnPlateauScheduler:
        # Ignite's class reads the metric from an engine and ignores min_lr; what it wraps does the work here.
        target = ReduceLROnPlateau
    if isinstance(target, type) and issubclass(target, BaseParamScheduler):
        keywords = accepted_keywords(target) or []
        if "param_name" in keywords and "schedulers" not in arguments:
            arguments.setdefault("param_name", "lr")
    if "optimizer" in (accepted_keywords(target) or []):
        arguments["optimizer"] = optimizer
    return target(**arguments)


def _function(name: str, where: str) -> Any:
    try:
        function = resolve(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: expected the dotted name of a function: {error}") from error
    if not callable(function):
        raise ConfigError(f"{where}: {name} is not a function")
    return function


def _make_nodes(value: Any, optimizer: Optimizer) -> Any:
    if isinstance(value, list):
        # YAML has no tuples; lists inside lists stand for pairs.
        return [tuple(item) if isinstance(item, list) else _make_nodes(item, optimizer) for item in value]
    if isinstance(value, Mapping) and "class" in value:
        if unknown := set(value) - {"class", "kwargs"}:
            raise ConfigError(f"scheduler: unknown key {sorted(unknown)[0]} beside class and kwargs")
        return _make_scheduler(value["class"], value.get("kwargs") or {}, optimizer)
    return value
