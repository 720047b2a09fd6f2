"""A training run from its settings to the saved model.

`run_training` is the table of contents. Each part is a function that can be called alone. Nothing is written before
data, model, optimiser and a first validation have turned out well.
"""

import json
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import yaml
from torch import nn

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.loaders import Batch, MoleculeLoader
from aimnet2mult.data.sampler import MixedFidelityBatchSampler
from aimnet2mult.data.splits import save_split
from aimnet2mult.evaluation.report import training_report
from aimnet2mult.models.base import copy_model, load_checkpoint, load_weights, save_checkpoint
from aimnet2mult.modules import Forces
from aimnet2mult.train.acceleration import accelerated, deterministic, prepare_model
from aimnet2mult.train.build import build_loss, build_metric, build_network
from aimnet2mult.train.data import Data, build_data, build_loaders
from aimnet2mult.train.ema import WeightAverage
from aimnet2mult.train.engine import make_evaluator, make_step
from aimnet2mult.train.gradients import make_gradient_reporter
from aimnet2mult.train.loggers import start_loggers
from aimnet2mult.train.loop import CheckpointWriter, End, Training, evaluate
from aimnet2mult.train.monitor import EarlyStopping, FidelityStopping, Monitor
from aimnet2mult.train.optimizer import build_optimizer
from aimnet2mult.train.processes import distribute, process_group
from aimnet2mult.train.progress import Progress, StepTimer
from aimnet2mult.train.recorder import Recorder
from aimnet2mult.train.resume import Job, check_data
from aimnet2mult.train.run_folder import Checkpoints, History, Resume, RunFolder
from aimnet2mult.train.schedule import RunLength, Schedule, run_length
from aimnet2mult.train.schema import CheckpointConfig, TrainConfig, to_dict, to_yaml
from aimnet2mult.train.sharing import build_closeness, share_embedding
from aimnet2mult.train.stop import StopRequest
from aimnet2mult.train.utils import pick_device, seed_everything
from aimnet2mult.utils.cli import USER_ERRORS, error_message
from aimnet2mult.utils.files import check_writable, write_text_atomic
from aimnet2mult.utils.run_files import DATA, MODEL, MODEL_SETTINGS, SETTINGS, SPLIT

logger = logging.getLogger(__name__)

INTERRUPTED = "SIGINT"
"""How a run ends that the user interrupts with Ctrl-C."""


@dataclass
class Result:
    """What a run left behind.

    Attributes
    ----------
    path : Path
        The trained model.
    saved : bool
        Whether it has been written: not by a run that was asked to stop by SIGTERM or SIGUSR1.
    folder : Path
        Settings, log, metrics, checkpoints, report.
    end : End
        Whether the run is finished, and why it ended.
    epoch, iteration : int
        Where the saved model comes from, or where the run stands.
    records : list of dict
        The lines of ``metrics.jsonl``.
    """

    path: Path
    saved: bool
    folder: Path
    end: End
    epoch: int
    iteration: int
    records: list[dict[str, Any]]


def run_training(job: Job, save: str | Path | None = None, load: str | Path | None = None) -> Result:
    """Train a model and save it.

    With ``checkpoint.save_best`` the saved model is the best one by ``checkpoint.monitor``, otherwise the last one.
    Under ``torchrun`` every process calls this; they train together and the first one writes.

    Parameters
    ----------
    job : Job
        Settings, model, and the run to go on with, if there is one (`read_job`).
    save : str or Path, optional
        Where the model is written; default ``model.pt`` in the folder of the run.
    load : str or Path, optional
        Checkpoint whose weights a new run starts from.

    Returns
    -------
    Result
        Paths, why the run ended, and its history.

    Raises
    ------
    ValueError, OSError
        What is wrong with files or settings; nothing has been written then.
    NotFiniteError
        Losses or gradients stopped being finite.
    """
    config = job.config
    with log_buffer() as log, process_group(config.device) as local_rank, deterministic(config.trainer):
        first_process = idist.get_rank() == 0
        folder, save = check_places(job, save)
        training, data = build_training(job, pick_device(config.device, local_rank), load)
        first = None
        if job.resume is None:
            first = try_validation(training)
        else:
            go_on(training, job.resume)
        with (
            folder.begin(
                descriptions(job, data),
                log=log,
                overwrite=job.overwrite,
                resume=job.resume,
                processes=idist.get_world_size(),
            ),
            errors_into(log),
        ):
            end = train(training, job, first)
            result = save_model(training, save, folder.path, end)
            if end.finished and config.report and first_process:
                write_report(training, data, result)
    return result


def check_places(job: Job, save: str | Path | None) -> tuple[RunFolder, Path]:
    """Check that the run can be written where it is to be; return its folder, and the place of the trained model.

    Raises
    ------
    ValueError, OSError
        A place that cannot be written, or that holds something else.
    """
    checkpoint = job.config.checkpoint
    folder = RunFolder(checkpoint.dirname, writes=idist.get_rank() == 0)
    check_empty(checkpoint)
    folder.check(job.overwrite, None if job.resume is None else job.resume.folder)
    return folder, folder.path / MODEL if save is None else check_writable(Path(save).absolute())


def check_empty(checkpoint: CheckpointConfig) -> None:
    """Refuse a folder with checkpoints if the settings say that there must be none, whatever else allows it."""
    pattern = f"{checkpoint.filename_prefix}_*.pt"
    if checkpoint.kwargs.require_empty and any(checkpoint.dirname.glob(pattern)):
        raise ConfigError(f"checkpoint.kwargs.require_empty: {checkpoint.dirname} holds checkpoints {pattern}")


def check_start(job: Job, load: str | Path | None) -> None:
    """Check what a new run starts from, before data are read; a run that goes on has done with it."""
    if load is not None and not Path(load).is_file():
        raise FileNotFoundError(f"--load: {load}: no such file")
    if job.config.init_from and load is None and job.resume is None:
        raise ConfigError("init_from: says where fidelities start in a loaded checkpoint; add --load, or remove it")


def build_training(job: Job, device: torch.device, load: str | Path | None = None) -> tuple[Training, Data]:
    """Put a run together: data, model, optimiser, schedule, loss, and what records it; nothing is written.

    Raises
    ------
    ValueError, OSError
        What is wrong with files or settings.
    """
    config, trainer = job.config, job.config.trainer
    check_start(job, load)
    seed_everything(config.seed)
    data = build_data(config)
    if job.resume is not None:
        check_data(job.resume.content, data)
    model = prepare_model(build_network(config, job.model_config, data, load), trainer).to(device)
    optimizer = build_optimizer(config.optimizer, model, data.names)
    if config.sharing.embedding == "shared":
        share_embedding(model, optimizer, data.names)
    closeness = build_closeness(config.sharing.closeness, model, data.train_counts, data.names)
    loader, val_loader = build_loaders(config, data, device)
    length = length_of_run(config, loader)
    schedule = None
    if config.scheduler is not None:
        schedule = Schedule(config.scheduler, config.optimizer, optimizer, length)
    loss_fn, metric = build_loss(config, data), build_metric(config, data)
    ema = None if trainer.ema is None else WeightAverage(model, trainer.ema.decay)
    moving: dict[str, Any] = {"non_blocking": device.type == "cuda", "precision": trainer.precision}
    clipping = config.optimizer.grad_clip
    step = make_step(
        distribute(accelerated(Forces(model), trainer), device),
        optimizer,
        loss_fn,
        device,
        max_grad_norm=clipping.max_norm,
        max_grad_value=clipping.max_value,
        closeness=closeness,
        **moving,
    )
    reporter = None
    if trainer.gradient_report is not None:
        reporter = make_gradient_reporter(model, loss_fn, list(data.names.values()), device, **moving)
    evaluated = Forces(model if ema is None else ema.model)
    writes = idist.get_rank() == 0
    folder = config.checkpoint.dirname
    monitor = Monitor(config.checkpoint.monitor, "checkpoint.monitor")
    training = Training(
        config=config,
        model=model,
        step=step,
        optimizer=optimizer,
        schedule=schedule,
        loss_fn=loss_fn,
        ema=ema,
        loader=loader,
        val_loader=val_loader,
        evaluator=make_evaluator(evaluated, loss_fn, {"metrics": metric}, device, **moving),
        monitor=monitor,
        early_stopping=build_early_stopping(config),
        fidelity_stopping=build_fidelity_stopping(config, data),
        gradient_reporter=reporter,
        recorder=Recorder(
            model,
            optimizer,
            History(folder, writes),
            Progress(length.iteration, trainer.epochs, enabled=writes),
            StepTimer(device, idist.get_world_size()),
            report_every=config.log_frequency.train,
            units=metric.units,
        ),
        checkpoints=Checkpoints(
            folder,
            config.checkpoint.filename_prefix,
            config.checkpoint.kwargs.n_saved,
            config.checkpoint.keep_last,
            writes,
            score_name=monitor.text if config.checkpoint.save_best else None,
        ),
        write=checkpoint_writer(job, data, model if ema is None else ema.model),
        stop=StopRequest(),
        device=device,
        closeness=closeness,
    )
    return training, data


def length_of_run(config: TrainConfig, loader: MoleculeLoader) -> RunLength:
    """Return how many steps, epochs and validations the run has."""
    sampler = loader.batch_sampler
    assert isinstance(sampler, MixedFidelityBatchSampler)
    steps = math.ceil(sampler.batches_per_epoch / config.trainer.accumulate)
    return run_length([steps] * config.trainer.epochs, config.log_frequency.val)


def build_early_stopping(config: TrainConfig) -> EarlyStopping | None:
    """Return what ends a run that gets no better, if the settings ask for it."""
    settings = config.trainer.early_stopping
    if settings is None or settings.patience is None:
        return None
    followed = config.checkpoint.monitor if settings.monitor is None else settings.monitor
    return EarlyStopping(Monitor(followed, "trainer.early_stopping.monitor"), settings.patience, settings.min_delta)


def build_fidelity_stopping(config: TrainConfig, data: Data) -> FidelityStopping | None:
    """Return what leaves fidelities out of the training that get no better, if the settings ask for it."""
    settings = config.trainer.early_stopping
    if settings is None or not settings.fidelities:
        return None
    rules = {}
    for name, rule in settings.fidelities.items():
        where = f"trainer.early_stopping.fidelities.{name}"
        followed = own_error(config, data, name) if rule.monitor is None else rule.monitor
        rules[name] = EarlyStopping(Monitor(followed, f"{where}.monitor"), rule.patience, rule.min_delta, where)
    return FidelityStopping(rules)


def own_error(config: TrainConfig, data: Data, name: str) -> str:
    """Return the metric that tells how good a fidelity is: the error of its forces, or of its energies without any.

    Raises
    ------
    ConfigError
        There is none.
    """
    labels, measured = data.record["fidelities"][name]["labels"], config.metrics.kwargs.get("cfg", {})
    for key in ("forces", "energy"):
        if key in measured and key in labels and labels[key]["molecules"] > 0:
            return f"{name}/{measured[key].get('abbr', key)}_mae"
    raise ConfigError(
        f"trainer.early_stopping.fidelities.{name}.monitor: null, but metrics.kwargs.cfg measures no labels of its "
        "forces or energies; name a validation metric"
    )


def checkpoint_writer(job: Job, data: Data, model: nn.Module) -> CheckpointWriter:
    """Return the function that writes the model as it stands, with what it was trained on and the state of the run."""
    config = job.config
    levels = {f: known.level for f, known in enumerate(data.fidelities.values()) if known.level}

    def write(path: Path, epoch: int, iteration: int, metrics: Mapping[str, float], state: Mapping[str, Any]) -> None:
        save_checkpoint(
            path,
            model,
            model_config=job.model_config,
            num_fidelities=data.train.num_fidelities,
            fidelity_offset=config.fidelity_offset,
            use_fidelity_readouts=config.use_fidelity_readouts,
            fidelity_names=data.names,
            fidelity_levels=levels,
            dispersion=data.dispersion if config.data.fidelities else None,
            sae=data.sae,
            species=data.train.species,
            extra={
                "train_config": to_dict(config),
                "progress": {"epoch": epoch, "iteration": iteration, "metrics": dict(metrics)},
                "data": data.record,
                "training": state,
            },
        )

    return write


# --------------------------------------------------------------------------------------------------
# beginning, going on, ending
# --------------------------------------------------------------------------------------------------


def try_validation(training: Training, batches: Sequence[Batch] | None = None) -> dict[str, float]:
    """Validate before the first step, and check that what the run follows is there; without validation data: empty.

    Parameters
    ----------
    training : Training
        The run.
    batches : sequence of (x, y), optional
        Batches of this process; default: all validation molecules.

    Raises
    ------
    ConfigError
        A setting follows a metric that there is not.
    """
    config, metrics = training.config, {}
    if training.val_loader is not None:
        metrics = evaluate(training.evaluator, training.val_loader if batches is None else batches)
    elif (
        config.checkpoint.save_best
        or config.trainer.early_stopping
        or (training.schedule and training.schedule.followed)
    ):
        raise ConfigError("data.val_fraction: leaves no molecule for validation; give more data or a larger fraction")
    if config.checkpoint.save_best:
        training.monitor.check(metrics)
    if training.early_stopping is not None:
        training.early_stopping.monitor.check(metrics)
    if training.fidelity_stopping is not None:
        for rule in training.fidelity_stopping.rules.values():
            rule.monitor.check(metrics)
    if training.schedule is not None:
        training.schedule.check_metric(metrics)
    return metrics


def go_on(training: Training, resume: Resume) -> None:
    """Put a run where the checkpoint stands that it goes on from.

    Raises
    ------
    ConfigError
        Data or settings are others than those of the checkpoint.
    """
    try:
        training.load_state_dict(resume.content["training"], resume.content["model"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{resume.path}: cannot go on: {error}") from error
    at = training.position
    epoch = at.epoch + (at.batches > 0)
    logger.info("going on after iteration %d, epoch %d: %s", at.iteration, epoch, resume.path)


def train(training: Training, job: Job, first: Mapping[str, float] | None) -> End:
    """Train until the end, or until somebody asks to stop.

    Parameters
    ----------
    training : Training
        The run.
    job : Job
        What was asked for.
    first : mapping or None
        Errors before the first step; None for a run that goes on.
    """
    recorder = training.recorder
    state = None
    if job.resume is not None:
        state = job.resume.content["training"]
        training.restore_files(state)
    settings = {**to_dict(job.config), "model": job.model_config}
    loggers = start_loggers(
        job.config,
        job.config.checkpoint.dirname,
        settings,
        None if state is None else state["recorder"]["loggers"],
    )
    with loggers, training.stop:
        recorder.loggers = loggers
        if first is not None:
            recorder.validation(0, 0, first)
            training.save()
        return training.run()


def save_model(training: Training, save: Path, folder: Path, end: End) -> Result:
    """Write the model that the run was for: the best one, or the last one.

    Nothing is written where a scheduler asked the run to stop (SIGTERM, SIGUSR1): it is to go on.
    """
    at = training.position
    saved, epoch, iteration = False, at.epoch + (at.batches > 0), at.iteration
    logger.info("%s: %s", "the end" if end.finished else "asked to stop", end.reason)
    if not end.finished:
        logger.info("this run goes on with --resume %s", folder)
    if end.finished or end.reason == INTERRUPTED:
        chosen, why = training.checkpoints.last[-1], "the last one"
        if training.config.checkpoint.save_best and training.checkpoints.best:
            chosen = training.checkpoints.best[0]
            why = f"lowest {training.monitor.text}, {chosen.score:.5g}"
        if idist.get_rank() == 0:
            copy_model(folder / chosen.name, save)
        saved, epoch, iteration = True, chosen.epoch, chosen.iteration
        logger.info("model of epoch %d, iteration %d (%s): %s", epoch, iteration, why, save)
    return Result(save, saved, folder, end, epoch, iteration, training.recorder.history.records)


def write_report(training: Training, data: Data, result: Result) -> None:
    """Evaluate the saved model on the validation molecules and write ``report/`` into the folder of the run."""
    if len(data.val_indices) == 0:
        logger.info("no report: there are no validation molecules")
        return
    load_weights(training.model, load_checkpoint(result.path)["model"])
    page = training_report(
        result.folder,
        training.model,
        data.val,
        data.val_indices,
        names=data.names,
        history=result.records,
        history_units=training.recorder.units,
        about={"model": f"{result.path}, epoch {result.epoch}, iteration {result.iteration}"},
    )
    logger.info("report: %s", page)


def descriptions(job: Job, data: Data) -> dict[str, Callable[[Path], None]]:
    """Return the files that describe a run, and what writes them."""
    config = job.config
    return {
        SETTINGS: lambda path: write_text_atomic(path, to_yaml(config)),
        MODEL_SETTINGS: lambda path: write_text_atomic(path, yaml.safe_dump(job.model_config, sort_keys=False)),
        DATA: lambda path: write_text_atomic(path, json.dumps(data.record, indent=1, ensure_ascii=False) + "\n"),
        SPLIT: lambda path: save_split(
            path,
            data.train,
            data.held_out,
            val_fraction=config.data.val_fraction,
            seed=config.seed,
            by=config.data.val_split_by,
            names=data.names,
        ),
    }


@contextmanager
def errors_into(log: MemoryHandler) -> Iterator[None]:
    """Write an error that ends the run to its log file, too: the console may be gone when somebody asks for it."""
    try:
        yield
    except BaseException as error:
        expected = isinstance(error, (*USER_ERRORS, KeyboardInterrupt))
        what = error_message(error) if expected else traceback.format_exception_only(error)[-1].strip()
        trace = None if expected else (type(error), error, error.__traceback__)
        log.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "the run ends: %s", (what,), trace))
        raise


@contextmanager
def log_buffer() -> Iterator[MemoryHandler]:
    """Collect what is logged before there is a file for it; the file, once open, becomes the ``target``."""
    package = logging.getLogger("aimnet2mult")
    level = package.level
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    buffer = MemoryHandler(capacity=1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    package.addHandler(buffer)
    try:
        yield buffer
    finally:
        package.removeHandler(buffer)
        package.setLevel(level)
        buffer.close()
