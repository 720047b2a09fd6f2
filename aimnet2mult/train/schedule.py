"""The learning rate over a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ignite.handlers.param_scheduler import BaseParamScheduler, ParamScheduler, ReduceLROnPlateauScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from aimnet2mult.config.builder import ConfigError, resolve
from aimnet2mult.train.optimizer import reference_optimizer
from aimnet2mult.train.utils import accepted_keywords

if TYPE_CHECKING:
    from aimnet2mult.train.schema import OptimizerConfig, SchedulerConfig


class Schedule:
    """Learning rates over the run.

    The scheduler runs on an optimiser of its own with one group at the base rate (`reference_optimizer`). Each group
    of the real optimiser follows in proportion: twice the base rate stays twice the base rate, whatever the
    schedule's formula (published schedulers differ in this: some set one absolute value for every group).

    Parameters
    ----------
    config : SchedulerConfig
        Section ``scheduler`` of the settings.
    optimizer_config : OptimizerConfig
        Section ``optimizer``.
    optimizer : Optimizer
        Its groups' rates are set from here on.

    Attributes
    ----------
    unit : str
        ``"iteration"``, ``"epoch"`` or ``"validation"``: after which `step` has to be called.
    metric_name : str
        The validation metric that a plateau schedule watches.

    Raises
    ------
    ConfigError
        Arguments that the scheduler refuses.
    """

    def __init__(
        self, config: "SchedulerConfig", optimizer_config: "OptimizerConfig", optimizer: Optimizer | None = None
    ) -> None:
        self.reference = reference_optimizer(optimizer_config)
        self.initial = {key: value for key, value in self.reference.param_groups[0].items() if key != "params"}
        self.optimizer = optimizer
        self.changed: set[str] = set()
        self.group_initial = [dict(group) for group in optimizer.param_groups] if optimizer is not None else []
        self.terminate_below = config.terminate_on_low_lr or 0.0
        self.unit = config.unit or scheduler_unit(resolve(config.class_))
        kwargs = dict(config.kwargs)
        self.metric_name = str(kwargs.pop("metric_name", "loss")).removeprefix("val/")
        try:
            self.scheduler = _make_scheduler(config.class_, kwargs, self.reference)
        except ConfigError:
            raise
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise ConfigError(f"scheduler: {config.class_}: {error}") from error
        if isinstance(self.scheduler, ParamScheduler):
            self.scheduler(None)  # Ignite's schedulers set their first value when called, those of torch when built
        self.peak = self.rate
        self._follow()

    @property
    def rate(self) -> float:
        """Base learning rate now."""
        return float(self.reference.param_groups[0]["lr"])

    @property
    def exhausted(self) -> bool:
        """Whether the base rate has fallen below ``terminate_on_low_lr`` (during a warm-up it was never above)."""
        return self.rate < self.terminate_below <= self.peak

    def step(self, metrics: Mapping[str, float] | None = None) -> None:
        """Go one unit on; a plateau schedule reads its metric from ``metrics``.

        Raises
        ------
        ConfigError
            The metric that the schedule watches is not among ``metrics``.
        """
        self.reference.step()  # no gradient, no effect: torch warns about schedules ahead of their optimiser
        self.check_metric(metrics or {})
        if isinstance(self.scheduler, ReduceLROnPlateau):
            assert metrics is not None
            self.scheduler.step(metrics[self.metric_name])
        elif isinstance(self.scheduler, ParamScheduler):
            self.scheduler(None)
        else:
            self.scheduler.step()
        self.peak = max(self.peak, self.rate)
        self._follow()

    def check_metric(self, metrics: Mapping[str, float]) -> None:
        """Raise ConfigError if the schedule watches a metric that is not among ``metrics``."""
        if isinstance(self.scheduler, ReduceLROnPlateau) and self.metric_name not in metrics:
            raise ConfigError(
                f"scheduler.kwargs.metric_name: {self.metric_name} is not a validation metric; known: "
                f"{', '.join(metrics)}"
            )

    def _follow(self) -> None:
        """Carry what the schedule changed over to the optimiser's groups, in proportion to their own values."""
        if self.optimizer is None:
            return
        for key, value in self.reference.param_groups[0].items():
            if key in self.initial and value != self.initial[key]:
                self.changed.add(key)
        for key in self.changed:
            value = self.reference.param_groups[0][key]
            for group, own in zip(self.optimizer.param_groups, self.group_initial, strict=True):
                scales = isinstance(value, float) and self.initial[key] != 0
                group[key] = own[key] * (value / self.initial[key]) if scales else value


def scheduler_unit(target: Any) -> str:
    """Return after what a scheduler steps by itself: Ignite's after an iteration, torch's after an epoch.

    Raises
    ------
    ValueError
        Not a scheduler of the learning rate.
    """
    if isinstance(target, type) and issubclass(target, ReduceLROnPlateauScheduler | ReduceLROnPlateau):
        return "validation"
    if isinstance(target, type) and issubclass(target, ParamScheduler):
        return "iteration"
    if isinstance(target, type) and issubclass(target, LRScheduler):
        return "epoch"
    name = getattr(target, "__name__", str(target))
    raise ValueError(f"{name} is not a scheduler of ignite.handlers or torch.optim.lr_scheduler")


def _make_scheduler(name: str, kwargs: Mapping[str, Any], optimizer: Optimizer) -> Any:
    """Build a scheduler over ``optimizer``; nodes ``{class, kwargs}`` among its arguments are built before it."""
    target = resolve(name)
    arguments = {key: _make_nodes(value, optimizer) for key, value in kwargs.items()}
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


def _make_nodes(value: Any, optimizer: Optimizer) -> Any:
    if isinstance(value, list):
        # YAML has no tuples; lists inside lists stand for pairs.
        return [tuple(item) if isinstance(item, list) else _make_nodes(item, optimizer) for item in value]
    if isinstance(value, Mapping) and "class" in value:
        if unknown := set(value) - {"class", "kwargs"}:
            raise ConfigError(f"scheduler: unknown key {sorted(unknown)[0]} beside class and kwargs")
        return _make_scheduler(value["class"], value.get("kwargs") or {}, optimizer)
    return value
