"""What a training run is equipped with: optimiser, learning-rate schedule, Weights & Biases, log, seeds."""

import inspect
import logging
import netrc
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from ignite.handlers.param_scheduler import BaseParamScheduler, ParamScheduler, ReduceLROnPlateauScheduler
from ignite.utils import manual_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from aimnet2mult.config.builder import ConfigError, resolve

if TYPE_CHECKING:
    from aimnet2mult.train.configuration import OptimizerConfig, SchedulerConfig, TrainConfig

logger = logging.getLogger(__name__)

WANDB_URL = "https://api.wandb.ai"
"""Server of Weights & Biases unless the environment variable WANDB_BASE_URL names another."""

WANDB_TIMEOUT = 5.0
"""Seconds that a run waits for an answer of the server before it goes on offline."""


def accepted_keywords(target: Callable[..., Any]) -> list[str] | None:
    """Return the keywords that a class or function takes; None if it takes any.

    A class that passes ``**kwargs`` on to its parent takes the parent's keywords too.
    """
    if target is ReduceLROnPlateauScheduler:
        own = [name for name in inspect.signature(target).parameters if name != "scheduler_kwargs"]
        return own + [name for name in inspect.signature(ReduceLROnPlateau).parameters if name not in own]
    functions = [target]
    if isinstance(target, type):
        functions = [vars(cls)["__init__"] for cls in inspect.getmro(target) if "__init__" in vars(cls)]
    names: list[str] = []
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # built-in callables without a signature
            return None
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return [name for name in dict.fromkeys(names) if name != "self"]
    return None


# --------------------------------------------------------------------------------------------------
# optimiser
# --------------------------------------------------------------------------------------------------


def build_optimizer(config: "OptimizerConfig", model: nn.Module) -> Optimizer:
    """Build the optimiser and say which weights it trains.

    Patterns are searched in the weights' names (``afv.weight``, ``fidelity_readouts.0.energy_mlp.mlp.0.weight``).
    A weight belongs to the first group of ``param_groups`` whose pattern it matches, else to the group ``default``.

    Parameters
    ----------
    config : OptimizerConfig
        Section ``optimizer`` of the settings.
    model : nn.Module
        Its weights get ``requires_grad`` as ``force_train`` and ``force_no_train`` say.

    Returns
    -------
    Optimizer
        Each group carries its ``name``; empty groups are left out.

    Raises
    ------
    ConfigError
        A pattern that matches no weight, a weight both trained and kept fixed, nothing left to train, or arguments
        that the optimiser refuses.
    """
    weights = dict(model.named_parameters())
    trained = _matches(config.force_train, weights, "optimizer.force_train")
    fixed = _matches(config.force_no_train, weights, "optimizer.force_no_train")
    if both := sorted(trained & fixed):
        raise ConfigError(f"optimizer.force_train: {both[0]} also matches optimizer.force_no_train; keep one of them")
    for name, weight in weights.items():
        weight.requires_grad_((weight.requires_grad or name in trained) and name not in fixed)

    free = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not free:
        raise ConfigError("optimizer.force_no_train: no weight is left to train")
    groups: list[dict[str, Any]] = []
    for group_name, options in config.param_groups.items():
        matched = _matches([options["re"]], weights, f"optimizer.param_groups.{group_name}.re")
        mine = [name for name in free if name in matched]
        overrides = {key: value for key, value in options.items() if key != "re"}
        groups.append({"name": group_name, "params": [free.pop(name) for name in mine], **overrides})
    groups.insert(0, {"name": "default", "params": list(free.values())})
    groups = [group for group in groups if group["params"]]
    for group in groups:
        count = sum(weight.numel() for weight in group["params"])
        logger.info("optimizer group %s: %d tensors, %d weights", group["name"], len(group["params"]), count)
    return _make_optimizer(config, groups)


def reference_optimizer(config: "OptimizerConfig") -> Optimizer:
    """Return the same optimiser over one weight that nobody uses; its one group has the base learning rate."""
    return _make_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))]}])


def _make_optimizer(config: "OptimizerConfig", groups: list[dict[str, Any]]) -> Optimizer:
    try:
        optimizer: Optimizer = resolve(config.class_)(groups, **config.kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {config.class_}: {error}") from error
    return optimizer


def _matches(patterns: Sequence[str], weights: Mapping[str, nn.Parameter], key: str) -> set[str]:
    """Return the names that match any of the patterns; a pattern without a match is an error."""
    names: set[str] = set()
    for pattern in patterns:
        matched = {name for name in weights if re.search(pattern, name)}
        if not matched:
            examples = ", ".join(list(weights)[:4])
            raise ConfigError(f"{key}: {pattern!r} matches none of the {len(weights)} weights ({examples}, ...)")
        names |= matched
    return names


# --------------------------------------------------------------------------------------------------
# schedule
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Weights & Biases
# --------------------------------------------------------------------------------------------------


def start_wandb(config: "TrainConfig", folder: Path, settings: Mapping[str, Any]) -> Any | None:
    """Start a run of Weights & Biases that never asks and never waits long.

    Without a login or without an answer from the server the run goes on offline, and the log says so.

    Parameters
    ----------
    config : TrainConfig
        Its section ``wandb``; null or mode ``disabled`` starts nothing.
    folder : Path
        For wandb's files unless ``wandb.init.dir`` names another.
    settings : mapping
        What the run's page shows as its configuration.

    Returns
    -------
    wandb run or None
        With the methods ``log`` and ``finish``.
    """
    if config.wandb is None or config.wandb.init.mode == "disabled":
        return None
    import wandb

    init = config.wandb.init
    mode: Any = init.mode
    if mode == "online" and (reason := wandb_obstacle()):
        logger.warning("wandb: %s; the run is logged offline (`wandb sync` uploads it later)", reason)
        mode = "offline"
    arguments: dict[str, Any] = {
        "name": init.name or config.run_name,
        "project": init.project or config.project_name,
        "entity": init.entity,
        "notes": init.notes,
        "group": init.group,
        "tags": init.tags or None,
        "dir": str(init.dir or folder),
        "config": dict(settings),
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except wandb.Error as error:
        if mode == "offline":
            raise
        logger.warning("wandb: %s; the run is logged offline", " ".join(str(error).split()))
        run = wandb.init(mode="offline", **arguments)
    logger.info("wandb: %s", run.url or f"offline run in {run.dir}")
    return run


def wandb_obstacle() -> str | None:
    """Return why a run cannot be logged online, or None: no login, or no answer from the server."""
    url = os.environ.get("WANDB_BASE_URL", WANDB_URL)
    host = urlsplit(url).hostname or url
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _netrc_knows(host)):
        return f"no login for {host} (`wandb login`, or the environment variable WANDB_API_KEY)"
    try:
        with urllib.request.urlopen(url, timeout=WANDB_TIMEOUT):
            return None
    except urllib.error.HTTPError:
        return None  # it answered
    except OSError as error:
        return f"{host} does not answer ({error})"


def _netrc_knows(host: str) -> bool:
    """Whether the file in which `wandb login` keeps keys has one for ``host``."""
    default = Path("~/_netrc" if os.name == "nt" else "~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC", default)).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# --------------------------------------------------------------------------------------------------
# log, seeds, device
# --------------------------------------------------------------------------------------------------


class TerminalHandler(logging.Handler):
    """Writes log lines to stderr above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(verbose: bool = False, rank: int = 0) -> None:
    """Send the package's log to stderr, of rank 0 only; ``verbose`` shows debug messages too."""
    package = logging.getLogger("aimnet2mult")
    for handler in [h for h in package.handlers if isinstance(h, TerminalHandler)]:
        package.removeHandler(handler)
    handler = TerminalHandler()
    handler.setFormatter(log_format())
    handler.addFilter(lambda record: rank == 0)
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # repeats the message of every exception it passes on


def log_format() -> logging.Formatter:
    """Return the format of log lines."""
    return logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    manual_seed(seed)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that the setting ``device`` stands for.

    Parameters
    ----------
    name : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    local_rank : int
        Number of this process on its machine; each takes a GPU of its own.

    Raises
    ------
    ConfigError
        A GPU that is not there.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and available == 0):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or local_rank)
    if index >= available:
        raise ConfigError(f"device: {name} asks for GPU {index}, this machine has {available}")
    return torch.device("cuda", index)
