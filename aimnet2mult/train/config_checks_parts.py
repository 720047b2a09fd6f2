"""What is wrong with the parts of a run that settings name by class: loss, optimiser, schedule, metrics.

Names are resolved and keywords compared with signatures; where these are right, the part is built on its own, so that
what it refuses is known before any data is read.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError, nearest, resolve
from aimnet2mult.data.mixed import LABEL_KEYS
from aimnet2mult.train.config_checks_data import validates
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.metrics import RegMultiMetric
from aimnet2mult.train.monitor import Monitor, possible_metrics
from aimnet2mult.train.optimizer import reference_optimizer
from aimnet2mult.train.schedule import TOTAL, UNITS, UNKNOWN_LENGTH, RunLength, Schedule, run_length, scheduler_unit
from aimnet2mult.train.schema import OptimizerConfig, SchedulerConfig, TrainConfig, named_fidelities
from aimnet2mult.train.utils import accepted_keywords

# --------------------------------------------------------------------------------------------------
# names and keywords
# --------------------------------------------------------------------------------------------------


def _check_class(key: str, name: str, kwargs: Any, word: str = "class", given: Sequence[str] = ()) -> Iterator[str]:
    """Check that a class or function exists and takes the keywords; ``given`` are those that the package sets."""
    try:
        target = resolve(name)
    except ConfigError as error:
        yield f"{key}.{word}: {error}"
        return
    if not callable(target):
        yield f"{key}.{word}: {name} is not a class or function"
        return
    if not isinstance(kwargs, Mapping):
        yield f"{key}.kwargs: expected a mapping, found {kwargs!r}"
        return
    accepted = accepted_keywords(target)
    if accepted is not None:
        known = [keyword for keyword in accepted if keyword not in given]
        for keyword in kwargs:
            if keyword not in known:
                yield f"{key}.kwargs.{keyword}: {name} has no such option; {nearest(str(keyword), known)}"


def _check_derived(key: str, name: str, base: type) -> Iterator[str]:
    """Check that a class is one that the training loop can use."""
    try:
        target = resolve(name)
    except ConfigError:  # reported by _check_class
        return
    if not (isinstance(target, type) and issubclass(target, base)):
        known = f"{base.__module__}.{base.__name__}"
        yield f"{key}.class: {name} is no {base.__name__}; name {known}, or a class derived from it"


def _check_construction(section: str, make: Callable[[], object]) -> Iterator[str]:
    """Check the values of arguments by building the object; its messages speak of ``kwargs`` as of ``section``."""
    try:
        make()
    except (TypeError, ValueError) as error:
        message, nested = str(error), f"{section}."
        if not message.startswith(f"{nested}kwargs."):
            message = f"{nested}kwargs" + (
                f".{message[len(nested) :]}" if message.startswith(nested) else f": {message}"
            )
        yield message


# --------------------------------------------------------------------------------------------------
# loss
# --------------------------------------------------------------------------------------------------


def _check_loss(config: TrainConfig) -> Iterator[str]:
    loss = config.loss
    problems = [*_check_derived("loss", loss.class_, MTLoss), *_check_class("loss", loss.class_, loss.kwargs)]
    problems += _check_components(config)
    yield from problems or _check_construction("loss", lambda: _build_loss(config))


def _build_loss(config: TrainConfig) -> MTLoss:
    """Build the loss of a run, with the numbers of fidelities in place of their names."""
    numbers = {name: f for f, name in enumerate(named_fidelities(config))}
    kwargs = dict(config.loss.kwargs)
    for name, component in kwargs.get("components", {}).items():
        weights = component.get("fidelity_weights") or {}
        by_number = {numbers[fidelity]: weight for fidelity, weight in weights.items()}
        kwargs["components"] = {**kwargs["components"], name: {**component, "fidelity_weights": by_number}}
    loss: MTLoss = resolve(config.loss.class_)(**kwargs)
    loss.check_fidelities(len(numbers))
    return loss


def _check_components(config: TrainConfig) -> Iterator[str]:
    """Check the components of the loss, each on its own."""
    loss = config.loss
    if "components" not in loss.kwargs:
        return
    components = loss.kwargs["components"]
    if not isinstance(components, Mapping) or not components:
        yield f"loss.kwargs.components: expected a mapping {{name: {{fn, weight, kwargs}}}}, found {components!r}"
        return
    options = _component_options(loss.class_)
    total = 0.0
    for name, component in components.items():
        key = f"loss.kwargs.components.{name}"
        if not isinstance(component, Mapping):
            yield f"{key}: expected a mapping {{fn, weight, kwargs}}, found {component!r}"
            continue
        for word in component:
            if word not in options:
                yield f"{key}.{word}: unknown key; {nearest(str(word), options)}"
        if "fn" not in component:
            others = [other for other in components if other != name]
            hint = f". If another is meant: {nearest(str(name), others)}" if others else ""
            yield f"{key}.fn: is missing; the name of a function such as aimnet2mult.train.loss.peratom_loss_fn{hint}"
            continue
        weight = component.get("weight")
        if not _is_number(weight) or not 0 <= weight < math.inf:
            yield f"{key}.weight: expected a number of 0 or more, found {weight!r}"
        total += weight if _is_number(weight) else 1.0
        yield from _check_component(key, component, config.data.y)
        yield from _check_fidelity_weights(f"{key}.fidelity_weights", component, list(named_fidelities(config)))
    if total == 0:
        yield "loss.kwargs.components: no component has a positive weight; give one of them one"


def _component_options(class_name: str) -> Sequence[str]:
    """Return what a component of the loss may say."""
    try:
        options: Sequence[str] = getattr(resolve(class_name), "component_options", MTLoss.component_options)
    except ConfigError:  # reported as loss.class
        options = (*MTLoss.component_options, "scale")
    return options


def _check_component(key: str, component: Mapping[str, Any], labels: Sequence[str]) -> Iterator[str]:
    """Check function, keywords and label of one component of the loss."""
    kwargs, given = component.get("kwargs") or {}, ("y_pred", "y_true", "molecule_weights")
    problems = list(_check_class(key, component["fn"], kwargs, "fn", given))
    if not any(problem.startswith(f"{key}.fn") for problem in problems):
        keywords = _keywords(resolve(component["fn"]))
        if not {"y_pred", "y_true"} <= keywords.keys():
            problems = [f"{key}.fn: {component['fn']} is no loss; a function of y_pred and y_true is needed"]
    yield from problems
    if problems:
        return
    label = kwargs.get("key_true", keywords.get("key_true"))
    if label is not None and label not in labels:
        yield (
            f"{key}: needs the label {label}, which data.y does not list ({', '.join(labels)}). "
            f"Add it there, or remove the component with {key}=null"
        )


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keywords of a function and their defaults, None where there is none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions without a signature
        return {}
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def _check_fidelity_weights(key: str, component: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Check the factors that a component of the loss gives to fidelities."""
    weights = component.get("fidelity_weights")
    if weights is None:
        return
    if not isinstance(weights, Mapping):
        yield f"{key}: expected a mapping {{fidelity: factor}}, found {weights!r}"
        return
    for name, weight in weights.items():
        if name not in names:
            yield f"{key}: there is no fidelity {name!r}; {nearest(str(name), names)}"
        if not _is_number(weight) or not 0 <= weight < math.inf:
            yield f"{key}.{name}: expected a factor of 0 or more, found {weight!r}"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --------------------------------------------------------------------------------------------------
# optimiser
# --------------------------------------------------------------------------------------------------


def _check_optimizer(config: TrainConfig) -> Iterator[str]:
    optimizer = config.optimizer
    yield from _check_patterns("optimizer.force_train", optimizer.force_train)
    yield from _check_patterns("optimizer.force_no_train", optimizer.force_no_train)
    for name in ("max_norm", "max_value"):
        limit = getattr(optimizer.grad_clip, name)
        if limit is not None and not limit > 0:
            yield f"optimizer.grad_clip.{name}: expected a positive number or null, found {limit}"
    problems = list(_optimizer_problems(optimizer))
    yield from problems
    for name, group in optimizer.param_groups.items():
        yield from _check_group(f"optimizer.param_groups.{name}", group, optimizer, not problems)


def _optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """Check class and arguments, in the end by building the optimiser; the first kind of problem hides the others."""
    yield from (problems := list(_check_class("optimizer", optimizer.class_, optimizer.kwargs, given=("params",))))
    if problems:
        return
    target = resolve(optimizer.class_)
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        yield f"optimizer.class: {optimizer.class_} is not an optimizer; name one such as torch.optim.RAdam"
        return
    closure = inspect.signature(target.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        yield f"optimizer.class: {optimizer.class_} evaluates the loss several times in a step; name another one"
        return
    yield from (problems := list(_check_rate("optimizer.kwargs.lr", optimizer.kwargs.get("lr"))))
    if not problems:
        yield from _refused_arguments(optimizer)


def _refused_arguments(optimizer: OptimizerConfig) -> Iterator[str]:
    """Build the optimiser; yield what it refuses."""
    try:
        reference_optimizer(optimizer)
    except ConfigError as error:
        yield str(error)


def _check_group(key: str, group: Any, optimizer: OptimizerConfig, usable: bool) -> Iterator[str]:
    """Check a group of weights; where the optimiser itself is ``usable``, by building it with the group's arguments."""
    if not isinstance(group, Mapping) or not isinstance(group.get("re"), str):
        yield f"{key}: expected a mapping with the pattern re, found {group!r}"
        return
    yield from _check_patterns(f"{key}.re", [group["re"]])
    if key == "optimizer.param_groups.default":
        yield f"{key}: is what the group of all other weights is called; give it another name"
    if not usable:
        return
    arguments = {str(word): value for word, value in group.items() if word != "re"}
    accepted = [word for word in accepted_keywords(resolve(optimizer.class_)) or arguments if word != "params"]
    problems = [
        f"{key}.{word}: unknown option; {nearest(word, ['re', *accepted])}"
        for word in arguments
        if word not in accepted
    ]
    if "lr" in arguments:
        problems += _check_rate(f"{key}.lr", arguments["lr"])
    yield from problems
    if not problems:
        changed = replace(optimizer, kwargs={**optimizer.kwargs, **arguments})
        yield from (f"{key}: {message.partition(': ')[2]}" for message in _refused_arguments(changed))


def _check_rate(key: str, rate: Any) -> Iterator[str]:
    if not _is_number(rate) or not 0 < rate < math.inf:
        yield f"{key}: expected a positive learning rate, found {rate!r}"


def _check_patterns(key: str, patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{key}: {pattern!r} is not a regular expression: {error}"


# --------------------------------------------------------------------------------------------------
# schedule
# --------------------------------------------------------------------------------------------------


def _check_scheduler(config: TrainConfig) -> Iterator[str]:
    scheduler = config.scheduler
    if scheduler is None:
        return
    problems = list(_check_class("scheduler", scheduler.class_, scheduler.kwargs, given=("optimizer", "param_name")))
    yield from problems
    low = scheduler.terminate_on_low_lr
    rate = config.optimizer.kwargs.get("lr")
    if low is not None and _is_number(rate) and not 0 <= low < rate:
        yield f"scheduler.terminate_on_low_lr: expected a rate between 0 and optimizer.kwargs.lr ({rate}), found {low}"
    if scheduler.unit is not None and scheduler.unit not in UNITS:
        yield f"scheduler.unit: {scheduler.unit!r} is not a unit; {nearest(scheduler.unit, UNITS)}"
        return
    if problems:
        return
    try:
        own_unit = scheduler_unit(resolve(scheduler.class_))
    except ValueError as error:
        yield f"scheduler.class: {error}"
        return
    if own_unit == "validation" and scheduler.unit == "iteration":
        yield f"scheduler.unit: {scheduler.class_} needs a validation for each step; set it to null"
    if "validation" in (scheduler.unit, own_unit) and not validates(config):
        yield (
            "scheduler: needs validation errors, but there is no validation data. "
            "Set data.val_fraction or give files for validation, or scheduler=null"
        )
    length = known_length(config, "iteration")
    if scheduler.warmup is not None and length is not None and length.iteration < scheduler.warmup.iterations:
        yield (
            f"scheduler.warmup.iterations: {scheduler.warmup.iterations} are more than the run has "
            f"({length.iteration}); give less, or train for longer"
        )
    if own_unit == "validation":
        kwargs = dict(scheduler.kwargs)
        yield from check_monitor(config, kwargs.pop("metric_name", "loss"), "scheduler.kwargs.metric_name")
        scheduler = replace(scheduler, kwargs=kwargs)
    misspelt = [word for word, value in scheduler.kwargs.items() if _means_total(value)]
    for word in misspelt:
        yield f"scheduler.kwargs.{word}: {scheduler.kwargs[word]!r} is not a number; {nearest(TOTAL, [TOTAL])}"
    if misspelt:
        return
    yield from _check_schedule(config, scheduler, scheduler.unit or own_unit)


def _check_schedule(config: TrainConfig, scheduler: SchedulerConfig, unit: str) -> Iterator[str]:
    """Check the values of the schedule's arguments by building it and going one step."""
    if any(_optimizer_problems(config.optimizer)):
        return  # reported as a problem of the optimiser
    try:
        schedule = Schedule(scheduler, config.optimizer, length=known_length(config, unit))
        schedule.step(dict.fromkeys(schedule.followed, 1.0))
    except ConfigError as error:
        yield str(error)
    except ArithmeticError as error:
        yield f"scheduler.kwargs: {scheduler.class_}: {error}"


def _means_total(value: Any) -> bool:
    """Whether a value is the word for all steps of the run, misspelt."""
    return isinstance(value, str) and value != TOTAL and bool(difflib.get_close_matches(value, [TOTAL], cutoff=0.7))


def known_length(config: TrainConfig, unit: str) -> RunLength | None:
    """Return the length of the run where the settings alone tell it in ``unit``; it is right in that unit only."""
    epochs, accumulate = config.trainer.epochs, config.trainer.accumulate
    sampler, every = config.data.samplers.train.kwargs, config.log_frequency.val
    if epochs < 1 or accumulate < 1 or (every is not None and every < 1):
        return None  # reported elsewhere
    if sampler.shuffle and sampler.batches_per_epoch > 0:
        return run_length([math.ceil(sampler.batches_per_epoch / accumulate)] * epochs, every)
    if unit == "epoch" or (unit == "validation" and every is None):
        return replace(UNKNOWN_LENGTH, epoch=epochs, validation=epochs)
    return None


# --------------------------------------------------------------------------------------------------
# metrics
# --------------------------------------------------------------------------------------------------


def _check_metrics(config: TrainConfig) -> Iterator[str]:
    metrics = config.metrics
    problems = [
        *_check_derived("metrics", metrics.class_, RegMultiMetric),
        *_check_class("metrics", metrics.class_, metrics.kwargs),
        *_check_properties(config),
    ]
    yield from problems or _check_construction("metrics", lambda: resolve(metrics.class_)(**metrics.kwargs))


def _check_properties(config: TrainConfig) -> Iterator[str]:
    """Check of which properties errors are reported."""
    if "cfg" not in config.metrics.kwargs:
        return
    cfg = config.metrics.kwargs["cfg"]
    if not isinstance(cfg, Mapping):
        yield f"metrics.kwargs.cfg: expected a mapping {{property: {{abbr, scale, peratom, mult}}}}, found {cfg!r}"
        return
    for name in cfg:
        if name not in LABEL_KEYS:
            yield f"metrics.kwargs.cfg.{name}: is not a property with labels; {nearest(str(name), LABEL_KEYS)}"


def metric_names(config: TrainConfig) -> list[str] | None:
    """Return the names that validation metrics may have; None where the settings do not tell, or are wrong."""
    try:
        if resolve(config.metrics.class_) is not RegMultiMetric:
            return None
    except ConfigError:
        return None
    cfg, components = config.metrics.kwargs.get("cfg"), config.loss.kwargs.get("components")
    if list(_check_metrics(config)) or not isinstance(cfg, Mapping) or not isinstance(components, Mapping):
        return None
    return possible_metrics(named_fidelities(config), cfg, components, config.data.y)


def check_monitor(config: TrainConfig, what: Any, key: str) -> Iterator[str]:
    """Check what a setting follows: a validation metric, or a weighted sum of several.

    Parameters
    ----------
    config : TrainConfig
        The settings.
    what
        Name of a metric, or name -> weight.
    key : str
        Dotted key of the setting.
    """
    try:
        monitor = Monitor(what, key)
    except ConfigError as error:
        yield str(error)
        return
    known = metric_names(config)
    for name in monitor.weights:
        fidelity = name.rpartition("/")[0]
        if known is not None and name not in known:
            yield f"{key}: {name} is not a validation metric; {nearest(name, known)}"
        elif fidelity in named_fidelities(config) and validates(config) and not validates(config, fidelity):
            yield (
                f"{key}: {name}: {fidelity} has no validation data. Give files for its validation, or set "
                "data.val_fraction"
            )


CHECKS = (_check_loss, _check_optimizer, _check_scheduler, _check_metrics)
"""Checks of the parts, in the order of their messages."""
