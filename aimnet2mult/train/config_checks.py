"""What is wrong with the settings of a run, found before any data is read.

Each check is a small function that yields messages: the dotted key, what was found, what would be right. Checks of the
section ``data`` are in `config_checks_data`, those of what is named by class (loss, optimiser, schedule, metrics) in
`config_checks_parts`, all others here. Where a part of the run has a rule of its own, the check asks that part.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aimnet2mult.config.builder import ConfigError, nearest
from aimnet2mult.constants import TYPES_PER_FIDELITY
from aimnet2mult.train import config_checks_data, config_checks_parts
from aimnet2mult.train.acceleration import check_acceleration
from aimnet2mult.train.checkpoints import Checkpoints
from aimnet2mult.train.config_checks_data import validates
from aimnet2mult.train.config_checks_parts import check_monitor
from aimnet2mult.train.ema import WeightAverage
from aimnet2mult.train.fidelity_specific_utils import fidelity_number
from aimnet2mult.train.loggers import check_loggers
from aimnet2mult.train.monitor import EarlyStopping, Monitor
from aimnet2mult.train.schema import ClosenessConfig, TrainConfig, named_fidelities
from aimnet2mult.train.sharing import CLOSENESS, EMBEDDINGS, MEAN, STARTS

LARGEST_SEED = 2**32 - 1
"""Numpy's global generator takes no larger one."""


def check_config(config: TrainConfig) -> list[str]:
    """Return what is wrong across the settings, one message a problem; nothing is read but the existence of files."""
    return [message for check in CHECKS for message in check(config)]


def _refusal(make: Callable[..., object], *arguments: Any, **keywords: Any) -> Iterator[str]:
    """Yield why something cannot be made, if it cannot."""
    try:
        make(*arguments, **keywords)
    except ValueError as error:
        yield str(error)


def _check_general(config: TrainConfig) -> Iterator[str]:
    if not 0 <= config.seed <= LARGEST_SEED:
        yield f"seed: expected a number from 0 to {LARGEST_SEED}, found {config.seed}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        yield f"device: expected auto, cpu, cuda or cuda:N, found {config.device!r}"
    if len(named_fidelities(config)) > 1 and config.fidelity_offset < TYPES_PER_FIDELITY:
        yield f"fidelity_offset: must be at least {TYPES_PER_FIDELITY}, found {config.fidelity_offset}"
    if config.log_frequency.train < 1:
        yield f"log_frequency.train: expected 1 or more iterations, found {config.log_frequency.train}"
    if config.log_frequency.val is not None and config.log_frequency.val < 1:
        yield f"log_frequency.val: expected 1 or more iterations or null, found {config.log_frequency.val}"
    elif config.log_frequency.val is not None and not validates(config):
        yield _without_validation("log_frequency.val", "log_frequency.val=null")


def _without_validation(key: str, remedy: str) -> str:
    """Return the message about a setting that needs validation data where there are none."""
    return (
        f"{key}: needs validation errors, but there is no validation data. "
        f"Set data.val_fraction or give files for validation, or {remedy}"
    )


# --------------------------------------------------------------------------------------------------
# fidelities
# --------------------------------------------------------------------------------------------------


def _check_init_from(config: TrainConfig) -> Iterator[str]:
    """Check where fidelities start; which ones a checkpoint has is not known here."""
    names = dict(enumerate(named_fidelities(config)))
    known: dict[int, str] = {}
    for new in config.init_from:
        try:
            f = fidelity_number(new, names, "init_from")
        except ConfigError as error:
            yield str(error)
            continue
        if f in known:
            yield f"init_from.{new}: is the same fidelity as {known[f]}; remove one of them"
        known[f] = new


def _check_freezing(config: TrainConfig) -> Iterator[str]:
    """Check which fidelities are kept fixed; patterns of weight names are compared with the model later."""
    optimizer, names = config.optimizer, dict(enumerate(named_fidelities(config)))
    frozen: set[int] = set()
    for name in optimizer.freeze_fidelities:
        try:
            frozen.add(fidelity_number(name, names, "optimizer.freeze_fidelities"))
        except ConfigError as error:
            yield str(error)
    if not frozen:
        return
    if frozen == names.keys() and optimizer.freeze_backbone and not optimizer.force_train:
        yield (
            "optimizer.freeze_fidelities: names all fidelities, and optimizer.freeze_backbone keeps the rest fixed, so "
            "nothing would learn; remove one of them"
        )
    shared = not config.use_fidelity_readouts and frozen < names.keys()
    if shared and not optimizer.force_no_train:
        said = ", ".join(names[f] for f in sorted(frozen))
        yield (
            f"optimizer.freeze_fidelities: {said} has no readouts of its own (use_fidelity_readouts: false). Fix the "
            "readouts of all with optimizer.force_no_train=['^outputs'], or set use_fidelity_readouts=true"
        )


def _check_sharing(config: TrainConfig) -> Iterator[str]:
    """Check how the fidelities share; which rows a checkpoint has is not known here."""
    sharing, optimizer, names = config.sharing, config.optimizer, dict(enumerate(named_fidelities(config)))
    for key, words in (("start", STARTS), ("embedding", EMBEDDINGS)):
        if (word := getattr(sharing, key)) not in words:
            yield f"sharing.{key}: {word!r} is not a choice; {nearest(word, words)}"
    if sharing.embedding == "shared" and len(names) > 1:
        if not config.use_fidelity_readouts:
            yield (
                "sharing.embedding: shared, and with use_fidelity_readouts: false the readouts too, so that nothing "
                "would tell the fidelities apart. Change one of the two"
            )
        frozen = [name for f, name in names.items() if {name, str(f)} & set(optimizer.freeze_fidelities)]
        if frozen and len(frozen) < len(names) and not _matches(optimizer.force_no_train, "afv.weight"):
            yield (
                f"optimizer.freeze_fidelities: {', '.join(frozen)} has the embedding rows of all (sharing."
                "embedding: shared). Fix them for all with optimizer.force_no_train=['^afv'], or set "
                "sharing.embedding=own"
            )
    if sharing.closeness is not None:
        yield from _check_closeness(sharing.closeness, names)
        if CLOSENESS in config.loss.kwargs.get("components", {}):
            yield f"loss.kwargs.components.{CLOSENESS}: is the name of the penalty of sharing.closeness; choose another"


def _check_closeness(closeness: ClosenessConfig, names: dict[int, str]) -> Iterator[str]:
    if not (math.isfinite(closeness.weight) and closeness.weight >= 0):
        yield f"sharing.closeness.weight: expected a number of 0 or more, found {closeness.weight}"
    if closeness.decay is not None and closeness.decay < 1:
        yield f"sharing.closeness.decay: expected 1 or more steps or null, found {closeness.decay}"
    if closeness.to != MEAN:
        yield from _refusal(fidelity_number, closeness.to, names, "sharing.closeness.to")


def _matches(patterns: list[str], weight: str) -> bool:
    """Whether any of the patterns finds a weight; one that is no regular expression is reported elsewhere."""
    try:
        return any(re.search(pattern, weight) for pattern in patterns)
    except re.error:
        return True


# --------------------------------------------------------------------------------------------------
# loop
# --------------------------------------------------------------------------------------------------


def _check_trainer(config: TrainConfig) -> Iterator[str]:
    trainer = config.trainer
    for name in ("epochs", "accumulate"):
        if getattr(trainer, name) < 1:
            yield f"trainer.{name}: expected 1 or more, found {getattr(trainer, name)}"
    if trainer.ema is not None:
        yield from _refusal(WeightAverage, torch.nn.Identity(), trainer.ema.decay)
    if trainer.max_skipped < 0:
        yield f"trainer.max_skipped: expected 0 or more, found {trainer.max_skipped}"
    if trainer.gradient_report is not None and trainer.gradient_report.every < 1:
        yield f"trainer.gradient_report.every: expected 1 or more iterations, found {trainer.gradient_report.every}"
    # What depends on the GPU is asked when it is there: a GPU that is looked at here would be held by this process.
    yield from check_acceleration(config, torch.device("cpu"))


def _check_early_stopping(config: TrainConfig) -> Iterator[str]:
    stopping = config.trainer.early_stopping
    if stopping is None:
        return
    any_metric = Monitor("loss", "")
    if stopping.patience is not None:
        yield from _refusal(EarlyStopping, any_metric, stopping.patience)
    elif not stopping.fidelities:
        yield (
            "trainer.early_stopping.patience: null, and no trainer.early_stopping.fidelities, so nothing would stop; "
            "give one of them, or set trainer.early_stopping=null"
        )
    yield from _refusal(EarlyStopping, any_metric, 1, stopping.min_delta)
    if stopping.monitor is not None:
        yield from check_monitor(config, stopping.monitor, "trainer.early_stopping.monitor")
    if not validates(config):
        yield _without_validation("trainer.early_stopping", "trainer.early_stopping=null")
    names = list(named_fidelities(config))
    for name, rule in stopping.fidelities.items():
        where = f"trainer.early_stopping.fidelities.{name}"
        if name not in names:
            yield f"{where}: there is no fidelity {name}; {nearest(name, names)}"
            continue
        yield from _refusal(EarlyStopping, any_metric, rule.patience, where=where)
        yield from _refusal(EarlyStopping, any_metric, 1, rule.min_delta, where)
        if rule.monitor is not None:
            yield from check_monitor(config, rule.monitor, f"{where}.monitor")
        elif validates(config) and not validates(config, name):
            yield f"{where}: {name} has no validation data. Give files for its validation, or set data.val_fraction"


# --------------------------------------------------------------------------------------------------
# what a run writes
# --------------------------------------------------------------------------------------------------


def _check_checkpoint(config: TrainConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    folder, prefix = checkpoint.dirname, checkpoint.filename_prefix
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        yield f"checkpoint.dirname: {existing} is not a folder; name another place for the run"
    if prefix == "":
        yield "checkpoint.filename_prefix: is empty; give the beginning of the checkpoints' names, such as run_name"
    yield from _refusal(Checkpoints, folder, prefix, writes=False)
    yield from _refusal(Checkpoints, folder, "", n_saved=checkpoint.kwargs.n_saved, writes=False)
    yield from _refusal(Checkpoints, folder, "", keep_last=checkpoint.keep_last, writes=False)
    iterations, minutes = checkpoint.every_iterations, checkpoint.every_minutes
    if iterations is not None and iterations < 1:
        yield f"checkpoint.every_iterations: expected 1 or more iterations or null, found {iterations}"
    if minutes is not None and not minutes > 0:
        yield f"checkpoint.every_minutes: expected a positive number of minutes or null, found {minutes}"
    if iterations is None and minutes is None:
        yield (
            "checkpoint.every_minutes: null, and checkpoint.every_iterations too, so there would be nothing to resume "
            "from; give one of them"
        )
    yield from check_monitor(config, checkpoint.monitor, "checkpoint.monitor")
    if checkpoint.save_best and not validates(config):
        yield _without_validation("checkpoint.save_best", "checkpoint.save_best=false")


CHECKS: tuple[Callable[[TrainConfig], Iterator[str] | list[str]], ...] = (
    _check_general,
    *config_checks_data.CHECKS,
    _check_init_from,
    *config_checks_parts.CHECKS,
    _check_freezing,
    _check_sharing,
    _check_trainer,
    _check_early_stopping,
    _check_checkpoint,
    check_loggers,
)
"""Checks across the settings, in the order of their messages."""
