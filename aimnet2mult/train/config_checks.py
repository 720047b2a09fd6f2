"""What is wrong with the settings of a run, found before any data is read.

Each check is a small function that yields messages: the dotted key, what was found, what would be right.
"""

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError, nearest, resolve
from aimnet2mult.constants import FIDELITY_NAME, TYPES_PER_FIDELITY
from aimnet2mult.data.base import INPUT_KEYS
from aimnet2mult.data.ledger import CACHES, parse_dispersion, subtraction
from aimnet2mult.data.mixed import LABEL_KEYS
from aimnet2mult.data.sampler import BATCH_MODES, SHARES_TOLERANCE, STRATEGIES
from aimnet2mult.data.sgdataset import expand_files
from aimnet2mult.train.optimizer import reference_optimizer
from aimnet2mult.train.schedule import Schedule, scheduler_unit
from aimnet2mult.train.schema import (
    FidelityConfig,
    LoaderConfig,
    LossConfig,
    MetricsConfig,
    SamplerKwargsConfig,
    TrainConfig,
    named_fidelities,
)
from aimnet2mult.train.utils import accepted_keywords

SAE_MODES = ("linreg",)
WANDB_MODES = ("online", "offline", "disabled")
SCHEDULER_UNITS = ("iteration", "epoch", "validation")


def check_config(config: TrainConfig) -> list[str]:
    """Return what is wrong across the settings, one message a problem; nothing is read but the existence of files."""
    return [message for check in CHECKS for message in check(config)]


def _check_general(config: TrainConfig) -> Iterator[str]:
    if config.seed < 0:
        yield f"seed: expected 0 or more, found {config.seed}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        yield f"device: expected auto, cpu, cuda or cuda:N, found {config.device!r}"
    if len(named_fidelities(config)) > 1 and config.fidelity_offset < TYPES_PER_FIDELITY:
        yield f"fidelity_offset: must be at least {TYPES_PER_FIDELITY}, found {config.fidelity_offset}"
    if config.trainer.epochs < 1:
        yield f"trainer.epochs: expected 1 or more, found {config.trainer.epochs}"
    if config.log_frequency.train < 1:
        yield f"log_frequency.train: expected 1 or more iterations, found {config.log_frequency.train}"
    if config.log_frequency.val is not None and config.log_frequency.val < 1:
        yield f"log_frequency.val: expected 1 or more iterations or null, found {config.log_frequency.val}"


def _check_datasets(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if not 0 <= data.val_fraction < 1:
        yield f"data.val_fraction: expected a fraction in [0, 1), found {data.val_fraction}"
    if data.dispersion_cache not in CACHES:
        known = nearest(data.dispersion_cache, CACHES)
        yield f"data.dispersion_cache: {data.dispersion_cache!r} is not known; {known}"
    if data.fidelities:
        yield from _check_named(config)
    else:
        yield from _check_numbered(config)


def _check_named(config: TrainConfig) -> Iterator[str]:
    """Check fidelities with names."""
    data = config.data
    for key in ("fidelity_datasets", "fidelity_weights", "val_fidelity_datasets"):
        if getattr(data, key):
            word = {"fidelity_datasets": "files", "fidelity_weights": "weight"}.get(key, "val_files")
            yield f"data.{key}: given together with data.fidelities; use data.fidelities.<name>.{word}"
    for number, (name, fidelity) in enumerate(data.fidelities.items()):
        key = f"data.fidelities.{name}"
        if not FIDELITY_NAME.fullmatch(name):
            yield (
                f"{key}: a name consists of letters, digits, _, + and -, and does not begin with a digit; "
                f"found {name!r}"
            )
        if name == "all":
            yield f"{key}: stands for all data in the tables of errors; give it another name"
        if (match := re.fullmatch(r"fid(\d+)", name)) and match[1] != str(number):
            yield f"{key}: is the name of fidelity {match[1]} where none is given, and this one is number {number}"
        if not fidelity.files:
            others = [other for other in data.fidelities if other != name]
            hint = f". If another is meant: {nearest(name, others)}" if others else ""
            yield f"{key}.files: is missing; the HDF5 file of this fidelity, a list of files, or a pattern{hint}"
        yield from _check_patterns_of_files(f"{key}.files", fidelity.files)
        yield from _check_patterns_of_files(f"{key}.val_files", fidelity.val_files or [])
        yield from _check_weight(f"{key}.weight", fidelity.weight)
        yield from _check_dispersion(key, fidelity)
    if _draws_by_weight(config) and not any(fidelity.weight for fidelity in data.fidelities.values()):
        yield "data.fidelities: all weights are 0, no molecule would be drawn"


def _check_numbered(config: TrainConfig) -> Iterator[str]:
    """Check fidelities without names."""
    data = config.data
    found = sorted(data.fidelity_datasets)
    listed = ", ".join(map(str, found))
    if not found:
        yield (
            "data.fidelities: no dataset given. Add data.fidelities.<name>.files=<file.h5>, "
            "or without a name data.fidelity_datasets.0=<file.h5>"
        )
    elif found != list(range(len(found))):
        yield f"data.fidelity_datasets: fidelities must be 0..{len(found) - 1} without gaps, found {listed}"
    for key, datasets in (
        ("data.fidelity_datasets", data.fidelity_datasets),
        ("data.val_fidelity_datasets", data.val_fidelity_datasets or {}),
    ):
        for f, files in sorted(datasets.items()):
            yield from _check_patterns_of_files(f"{key}.{f}", files)
    for f in sorted(set(data.val_fidelity_datasets or {}) - set(found)):
        yield f"data.val_fidelity_datasets: fidelity {f} has no dataset (datasets: {listed})"
    for f, weight in sorted(data.fidelity_weights.items()):
        if f not in found:
            yield (
                f"data.fidelity_weights: fidelity {f} has no dataset (datasets: {listed}). "
                f"Add data.fidelity_datasets.{f} or remove the weight"
            )
        yield from _check_weight(f"data.fidelity_weights.{f}", weight)
    if _draws_by_weight(config) and found and not any(data.fidelity_weights.get(f, 1.0) for f in found):
        yield "data.fidelity_weights: all weights are 0, no molecule would be drawn"


def _draws_by_weight(config: TrainConfig) -> bool:
    """Whether the weights of the fidelities decide what an epoch consists of."""
    sampler = config.data.samplers.train.kwargs
    return sampler.shuffle and sampler.sampling_strategy == "weighted"


def _check_weight(key: str, weight: float) -> Iterator[str]:
    if not math.isfinite(weight) or weight < 0:
        yield f"{key}: expected a weight of 0 or more, found {weight}"


def _check_patterns_of_files(key: str, files: Sequence[Path]) -> Iterator[str]:
    """Check that each name or pattern stands for files that exist."""
    try:
        if files:
            expand_files(files)
    except (FileNotFoundError, ValueError) as error:
        yield f"{key}: {error}"


def _check_dispersion(key: str, fidelity: FidelityConfig) -> Iterator[str]:
    """Check what is said about the dispersion in the labels of a fidelity."""
    try:
        label = parse_dispersion(fidelity.dispersion, f"{key}.dispersion")
        if fidelity.subtract_dispersion:
            subtraction(label, f"{key}.subtract_dispersion")
    except ValueError as error:
        yield str(error)


def _check_file(key: str, path: Path) -> Iterator[str]:
    if not path.is_file():
        yield f"{key}: {path}: {'is a folder' if path.is_dir() else 'no such file'}"


def _check_sae(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if data.sae is None:
        return
    sae = data.sae.energy
    if sae.mode not in SAE_MODES:
        yield f"data.sae.energy.mode: {sae.mode!r} is not a mode; {nearest(sae.mode, SAE_MODES)}"
    if data.fidelities:
        if sae.files or sae.file is not None:
            yield "data.sae.energy: files are given together with data.fidelities; use data.fidelities.<name>.sae"
        for name, fidelity in data.fidelities.items():
            key = f"data.fidelities.{name}.sae"
            if fidelity.sae is None:
                yield f"{key}: is missing. {_sae_remedy(fidelity.files, name)} and add {key}, or set data.sae=null"
            else:
                yield from _check_file(key, fidelity.sae)
        return
    datasets = data.fidelity_datasets
    if sae.file is not None:
        yield from _check_file("data.sae.energy.file", sae.file)
        if sae.files:
            yield "data.sae.energy.file: given together with data.sae.energy.files; remove one of them"
        elif len(datasets) > 1:
            yield "data.sae.energy.file: is for one dataset; name one file per fidelity in data.sae.energy.files"
        return
    for f, path in sorted(sae.files.items()):
        yield from _check_file(f"data.sae.energy.files.{f}", path)
    for f in sorted(set(sae.files) - set(datasets)):
        yield f"data.sae.energy.files: fidelity {f} has no dataset; add data.fidelity_datasets.{f} or remove the file"
    for f in sorted(set(datasets) - set(sae.files)):
        yield (
            f"data.sae.energy.files: fidelity {f} has no SAE file. {_sae_remedy(datasets[f], f'fid{f}')} and add "
            f"data.sae.energy.files.{f}, or set data.sae=null to train on total energies"
        )


def _sae_remedy(files: Sequence[Path], name: str) -> str:
    listed = " ".join(map(str, files)) or "<files>"
    return f"Make one with `python -m aimnet2mult.train.calc_sae {listed} sae_{name}.yaml`"


def _check_batches(config: TrainConfig) -> Iterator[str]:
    data = config.data
    for key, names, known in (("data.x", data.x, INPUT_KEYS), ("data.y", data.y, LABEL_KEYS)):
        for name in names:
            if name not in known:
                yield f"{key}: {name!r} is not known; {nearest(name, known)}"
        if len(set(names)) != len(names):
            yield f"{key}: a name is listed twice"
    for name in ("coord", "numbers"):
        if name not in data.x:
            yield f"data.x: {name} is missing"
    if "energy" not in data.y:
        yield "data.y: energy is missing"
    for stage in ("train", "val"):
        sampler = getattr(data.samplers, stage).kwargs
        key = f"data.samplers.{stage}.kwargs"
        if sampler.batch_size < 1:
            yield f"{key}.batch_size: expected 1 or more, found {sampler.batch_size}"
        if sampler.batches_per_epoch < 1 and sampler.batches_per_epoch != -1:
            yield f"{key}.batches_per_epoch: expected 1 or more, or -1 for all, found {sampler.batches_per_epoch}"
        if sampler.batch_mode not in BATCH_MODES:
            yield f"{key}.batch_mode: {sampler.batch_mode!r} is not a mode; {nearest(sampler.batch_mode, BATCH_MODES)}"
        if sampler.sampling_strategy not in STRATEGIES:
            known_strategies = nearest(sampler.sampling_strategy, STRATEGIES)
            yield f"{key}.sampling_strategy: {sampler.sampling_strategy!r} is not a strategy; {known_strategies}"
        if not 0 <= sampler.max_padding < 1:
            yield f"{key}.max_padding: expected a share in [0, 1), found {sampler.max_padding}"
        yield from _check_shares(f"{key}", sampler, list(named_fidelities(config)))
        yield from _check_loader(f"data.loaders.{stage}", getattr(data.loaders, stage))


def _check_shares(key: str, sampler: SamplerKwargsConfig, names: list[str]) -> Iterator[str]:
    """Check the shares of the fidelities."""
    shares = sampler.shares
    if (sampler.sampling_strategy == "shares") != bool(shares):
        yield (
            f"{key}.shares: go with sampling_strategy: shares, found {shares} and "
            f"{sampler.sampling_strategy}. Give both or neither"
        )
        return
    for name in shares:
        if name not in names:
            yield f"{key}.shares: there is no fidelity {name!r}; {nearest(name, names)}"
    for name in names:
        if name not in shares and shares:
            yield f"{key}.shares: {name} is missing; give each fidelity its share (0 for none)"
    if any(not math.isfinite(share) or share < 0 for share in shares.values()):
        yield f"{key}.shares: expected shares of 0 or more, found {shares}"
    elif shares and abs(sum(shares.values()) - 1.0) > SHARES_TOLERANCE:
        yield f"{key}.shares: sum to {sum(shares.values()):g}, expected 1"


def _check_loader(key: str, loader: LoaderConfig) -> Iterator[str]:
    if loader.num_workers < 0:
        yield f"{key}.num_workers: expected 0 or more, found {loader.num_workers}"
    if loader.prefetch_factor is not None and loader.prefetch_factor < 1:
        yield f"{key}.prefetch_factor: expected 1 or more, found {loader.prefetch_factor}"
    for name in ("prefetch_factor", "persistent_workers"):
        if getattr(loader, name) and loader.num_workers == 0:
            yield f"{key}.{name}: needs reader processes; set {key}.num_workers or leave it out"


def _check_loss(config: TrainConfig) -> Iterator[str]:
    loss = config.loss
    problems = [*_check_class("loss", loss.class_, loss.kwargs), *_check_components(config)]
    yield from problems or _check_construction("loss", loss)


def _check_components(config: TrainConfig) -> Iterator[str]:
    """Check the components of the loss, each on its own."""
    loss = config.loss
    if "components" not in loss.kwargs:
        return
    components = loss.kwargs["components"]
    options = _component_options(loss.class_)
    if not isinstance(components, Mapping) or not components:
        yield f"loss.kwargs.components: expected a mapping {{name: {{fn, weight, kwargs}}}}, found {components!r}"
        return
    total = 0.0
    for name, component in components.items():
        key = f"loss.kwargs.components.{name}"
        if not isinstance(component, Mapping):
            yield f"{key}: expected a mapping {{fn, weight, kwargs}}, found {component!r}"
            continue
        for word in component:
            if word not in options:
                yield f"{key}.{word}: unknown key; {nearest(str(word), options)}"
        weight = component.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            yield f"{key}.weight: expected a number of 0 or more, found {weight!r}"
        else:
            total += weight
        yield from _check_component(key, component, config.data.y)
    if total == 0:
        yield "loss.kwargs.components: no component has a positive weight"


def _component_options(class_name: str) -> Sequence[str]:
    """Return what a component of the loss may say."""
    try:
        return getattr(resolve(class_name), "component_options", ("fn", "weight", "kwargs"))
    except ConfigError:  # reported as loss.class
        return ("fn", "weight", "kwargs", "scale")


def _check_component(key: str, component: Mapping[str, Any], labels: Sequence[str]) -> Iterator[str]:
    """Check function, keywords and label of one component of the loss."""
    kwargs = component.get("kwargs") or {}
    if "fn" not in component:
        yield f"{key}.fn: is missing; the name of a function such as aimnet2mult.train.loss.peratom_loss_fn"
        return
    problems = list(_check_class(key, component["fn"], kwargs, "fn", ("y_pred", "y_true")))
    yield from problems
    if problems:
        return
    label = kwargs.get("key_true", _default(resolve(component["fn"]), "key_true"))
    if label is not None and label not in labels:
        yield (
            f"{key}: needs the label {label}, which data.y does not list ({', '.join(labels)}). "
            f"Add it there, or remove the component with {key}=null"
        )


def _check_optimizer(config: TrainConfig) -> Iterator[str]:
    optimizer = config.optimizer
    problems = list(_check_class("optimizer", optimizer.class_, optimizer.kwargs, given=("params",)))
    yield from problems
    if problems:
        return
    target = resolve(optimizer.class_)
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        yield f"optimizer.class: {optimizer.class_} is not an optimizer"
        return
    accepted = accepted_keywords(target)
    yield from _check_rate("optimizer.kwargs.lr", optimizer.kwargs.get("lr"))
    for name, group in optimizer.param_groups.items():
        key = f"optimizer.param_groups.{name}"
        if not isinstance(group, Mapping) or not isinstance(group.get("re"), str):
            yield f"{key}: expected a mapping with the pattern re, found {group!r}"
            continue
        yield from _check_patterns(f"{key}.re", [group["re"]])
        for word in set(group) - {"re"}:
            if accepted is not None and word not in accepted:
                yield f"{key}.{word}: unknown option; {nearest(str(word), ['re', *accepted])}"
        if "lr" in group:
            yield from _check_rate(f"{key}.lr", group["lr"])
    yield from _check_patterns("optimizer.force_train", optimizer.force_train)
    yield from _check_patterns("optimizer.force_no_train", optimizer.force_no_train)
    max_norm = optimizer.grad_clip.max_norm
    if max_norm is not None and not max_norm > 0:
        yield f"optimizer.grad_clip.max_norm: expected a positive number or null, found {max_norm}"
    try:
        reference_optimizer(optimizer)
    except ConfigError as error:
        yield str(error)


def _check_rate(key: str, rate: Any) -> Iterator[str]:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        yield f"{key}: expected a positive learning rate, found {rate!r}"


def _check_patterns(key: str, patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{key}: {pattern!r} is not a regular expression: {error}"


def _check_scheduler(config: TrainConfig) -> Iterator[str]:
    scheduler = config.scheduler
    if scheduler is None:
        return
    problems = list(_check_class("scheduler", scheduler.class_, scheduler.kwargs, given=("optimizer", "param_name")))
    yield from problems
    low = scheduler.terminate_on_low_lr
    rate = config.optimizer.kwargs.get("lr")
    if low is not None and isinstance(rate, int | float) and not 0 <= low < rate:
        yield f"scheduler.terminate_on_low_lr: expected a rate between 0 and optimizer.kwargs.lr ({rate}), found {low}"
    if scheduler.unit is not None and scheduler.unit not in SCHEDULER_UNITS:
        yield f"scheduler.unit: {scheduler.unit!r} is not a unit; {nearest(scheduler.unit, SCHEDULER_UNITS)}"
    elif not problems:
        try:
            own_unit = scheduler_unit(resolve(scheduler.class_))
        except ValueError as error:
            yield f"scheduler.class: {error}"
        else:
            if own_unit == "validation" and scheduler.unit == "iteration":
                yield f"scheduler.unit: {scheduler.class_} needs a validation for each step; set it to null"
            if "validation" in (scheduler.unit, own_unit) and not _validates(config):
                yield (
                    "scheduler: needs the validation loss, but there is no validation data. "
                    "Set data.val_fraction or give files for validation, or scheduler=null"
                )
            yield from _check_schedule(config)


def _check_schedule(config: TrainConfig) -> Iterator[str]:
    """Check the values of the scheduler's arguments by building it and going one step."""
    assert config.scheduler is not None
    try:
        reference_optimizer(config.optimizer)
    except ConfigError:
        return  # reported as a problem of the optimizer
    try:
        schedule = Schedule(config.scheduler, config.optimizer)
        schedule.step(dict.fromkeys(schedule.followed, 1.0))
    except ConfigError as error:
        yield str(error)
    except ArithmeticError as error:
        yield f"scheduler.kwargs: {config.scheduler.class_}: {error}"


def _validates(config: TrainConfig) -> bool:
    """Whether the run has validation data."""
    files = any(fidelity.val_files for fidelity in named_fidelities(config).values())
    return files or config.data.val_fraction > 0


def _check_checkpoint(config: TrainConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.kwargs.n_saved < 1:
        yield f"checkpoint.kwargs.n_saved: expected 1 or more, found {checkpoint.kwargs.n_saved}"
    if not checkpoint.filename_prefix or "/" in checkpoint.filename_prefix:
        yield f"checkpoint.filename_prefix: expected the start of a file name, found {checkpoint.filename_prefix!r}"
    if checkpoint.save_best and not _validates(config):
        yield (
            "checkpoint.save_best: needs the validation loss, but there is no validation data. "
            "Set data.val_fraction or give files for validation, or checkpoint.save_best=false"
        )


def _check_wandb(config: TrainConfig) -> Iterator[str]:
    if config.wandb is None:
        return
    mode = config.wandb.init.mode
    if mode not in WANDB_MODES:
        yield f"wandb.init.mode: {mode!r} is not a mode; {nearest(mode, WANDB_MODES)}"
    elif mode != "disabled" and importlib.util.find_spec("wandb") is None:
        yield (
            'wandb: the package wandb is not installed; `pip install "aimnet2mult[train]"`, '
            "or set wandb=null or wandb.init.mode=disabled"
        )
    watch = config.wandb.watch_model
    if watch is not None and watch.log not in ("gradients", "parameters", "all"):
        yield f"wandb.watch_model.log: expected gradients, parameters or all, found {watch.log!r}"
    if watch is not None and watch.log_freq < 1:
        yield f"wandb.watch_model.log_freq: expected 1 or more iterations, found {watch.log_freq}"


def _check_metrics(config: TrainConfig) -> Iterator[str]:
    metrics = config.metrics
    problems = list(_check_class("metrics", metrics.class_, metrics.kwargs))
    yield from problems or _check_construction("metrics", metrics)


def _check_construction(section: str, config: LossConfig | MetricsConfig) -> Iterator[str]:
    """Check the values of arguments by building the object; its messages speak of ``kwargs`` as of ``section``."""
    try:
        resolve(config.class_)(**config.kwargs)
    except (TypeError, ValueError) as error:
        message = str(error)
        nested = f"{section}."
        yield f"{nested}kwargs.{message[len(nested) :]}" if message.startswith(nested) else f"{nested}kwargs: {message}"


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
            if keyword not in accepted:
                yield f"{key}.kwargs.{keyword}: {name} has no such option; {nearest(str(keyword), known)}"


def _default(target: Callable[..., Any], keyword: str) -> Any:
    """Return the default value of a function's keyword, or None."""
    parameter = inspect.signature(target).parameters.get(keyword)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


CHECKS: tuple[Callable[[TrainConfig], Iterator[str]], ...] = (
    _check_general,
    _check_datasets,
    _check_sae,
    _check_batches,
    _check_loss,
    _check_optimizer,
    _check_scheduler,
    _check_checkpoint,
    _check_wandb,
    _check_metrics,
)
"""Checks across the settings, in the order of their messages."""
