"""A training run from its settings to the saved model.

`run_training` is the table of contents. Each part is a function that can be called alone. Nothing is written before
data, model, optimiser and a first validation have turned out well.
"""

import csv
import gc
import io
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import yaml
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from aimnet2mult.config.builder import ConfigError, resolve
from aimnet2mult.constants import element_names
from aimnet2mult.data.loaders import make_loader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sae import load_sae
from aimnet2mult.data.splits import split_indices
from aimnet2mult.models.base import build_model, load_checkpoint, save_checkpoint
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.train.configuration import TrainConfig, to_dict
from aimnet2mult.train.engine import make_evaluator, make_trainer
from aimnet2mult.train.fidelity_specific_utils import new_species, transfer_weights
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.metrics import RegMultiMetric
from aimnet2mult.train.utils import (
    Schedule,
    build_optimizer,
    log_format,
    pick_device,
    seed_everything,
    start_wandb,
)
from aimnet2mult.utils.files import atomic_path, check_writable, write_text_atomic
from aimnet2mult.utils.units import EV_KCAL_MOL, EV_KJ_MOL

logger = logging.getLogger(__name__)

Loader = DataLoader[Any]


@dataclass
class Result:
    """What a run left behind.

    Attributes
    ----------
    path : Path
        The saved model.
    folder : Path
        Checkpoints, ``metrics.jsonl``, ``metrics.csv``, ``train.yaml``, ``train.log``.
    epoch, iteration : int
        Where the saved model comes from.
    records : list of dict
        The lines of ``metrics.jsonl``.
    """

    path: Path
    folder: Path
    epoch: int
    iteration: int
    records: list[dict[str, Any]]


def run_training(
    config: TrainConfig, model_config: Mapping[str, Any], save: str | Path, load: str | Path | None = None
) -> Result:
    """Train a model and save it.

    With ``checkpoint.save_best`` the saved model is that of the lowest validation loss, otherwise the last one.
    Under ``torchrun`` every process calls this; they train together and the first one writes.

    Parameters
    ----------
    config : TrainConfig
        The settings (`load_config`).
    model_config : mapping
        ``class`` and ``kwargs`` of the single-fidelity model (`load_model_config`).
    save : str or Path
        Where the model is written.
    load : str or Path, optional
        Checkpoint to start from.

    Returns
    -------
    Result
        Paths, and the history of the validation.

    Raises
    ------
    ValueError, OSError
        What is wrong with files or settings; nothing has been written then.
    KeyboardInterrupt
        After the best model so far (or the model as it stood) was saved.
    """
    with process_group(config.device) as local_rank, log_buffer() as log:
        return _train(config, model_config, save, load, local_rank, log)


def _train(
    config: TrainConfig,
    model_config: Mapping[str, Any],
    save: str | Path,
    load: str | Path | None,
    local_rank: int,
    log: MemoryHandler,
) -> Result:
    save, folder = check_outputs(config, save)
    device = pick_device(config.device, local_rank)
    seed_everything(config.seed)

    data = build_data(config)
    model = build_network(config, model_config, data.train, load).to(device)
    optimizer = build_optimizer(config.optimizer, model)
    schedule = None if config.scheduler is None else Schedule(config.scheduler, config.optimizer, optimizer)
    train_loader, val_loader = build_loaders(config, data, device)
    loss_fn = build_loss(config, data.train)

    step_model = distribute(Forces(model), device)
    trainer = make_trainer(
        step_model,
        optimizer,
        loss_fn,
        device,
        max_grad_norm=config.optimizer.grad_clip.max_norm,
        non_blocking=device.type == "cuda",
    )
    metric: RegMultiMetric = resolve(config.metrics.class_)(**config.metrics.kwargs)
    logger.info("errors are given as %s", error_units(metric))
    evaluator = make_evaluator(Forces(model), loss_fn, {"metrics": metric}, device, non_blocking=device.type == "cuda")

    run = Run(config, folder, model, model_config, data, optimizer, schedule)
    attach_epochs(trainer, train_loader)
    attach_training_log(trainer, run)
    attach_progress_bar(trainer, run)
    if val_loader is not None:
        attach_validation(trainer, evaluator, val_loader, run)
    else:
        attach_epoch_records(trainer, run)
    attach_schedule(trainer, run)

    first = validate(evaluator, val_loader) if val_loader is not None else {}
    if schedule is not None:
        schedule.check_metric(first)
    with run.started(log):
        run.record(0, 0, first)
        try:
            trainer.run(train_loader, max_epochs=config.trainer.epochs)
        except KeyboardInterrupt:
            logger.warning("interrupted in epoch %d; what there is, is saved", trainer.state.epoch)
            run.save_final(save, trainer)
            raise
        return run.save_final(save, trainer)


# --------------------------------------------------------------------------------------------------
# processes and files
# --------------------------------------------------------------------------------------------------


@contextmanager
def process_group(device: str) -> Iterator[int]:
    """Join the processes that ``torchrun`` started (NCCL on GPUs, Gloo on CPUs); alone, do nothing.

    Yields
    ------
    int
        Number of this process on its machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    gpus = device != "cpu" and torch.cuda.is_available()
    idist.initialize("nccl" if gpus else "gloo")
    try:
        yield idist.get_local_rank()
        # A process that ends early takes the others with it, and what still holds the group at exit aborts.
        idist.barrier()
    finally:
        gc.collect()
        idist.finalize()


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


def check_outputs(config: TrainConfig, save: str | Path) -> tuple[Path, Path]:
    """Make sure that the model and the run's folder can be written; return their absolute paths.

    Raises
    ------
    OSError
        They cannot.
    ValueError
        ``checkpoint.kwargs.require_empty``, and there are checkpoints already.
    """
    save = check_writable(Path(save).absolute())
    folder = config.checkpoint.dirname.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    check_writable(existing / f".{folder.name}")
    pattern = f"{config.checkpoint.filename_prefix}_*.pt"
    if config.checkpoint.kwargs.require_empty and any(folder.glob(pattern)):
        raise ConfigError(f"checkpoint.kwargs.require_empty: {folder} already holds checkpoints {pattern}")
    return save, folder


# --------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Molecules to train on and to validate with.

    Attributes
    ----------
    train, val : MixedFidelityDataset
        Datasets; the same one unless there are files for validation.
    train_indices, val_indices : numpy.ndarray
        Molecules of each.
    sae : dict or None
        Self-atomic energies, {f: {Z: eV}}.
    """

    train: MixedFidelityDataset
    val: MixedFidelityDataset
    train_indices: np.ndarray
    val_indices: np.ndarray
    sae: dict[int, dict[int, float]] | None


def build_data(config: TrainConfig) -> Data:
    """Open the datasets and part validation from training.

    A fidelity with a file in ``data.val_fidelity_datasets`` is validated with all of that file, the others with
    ``data.val_fraction`` of their molecules.

    Raises
    ------
    ValueError, FileNotFoundError
        A file that cannot be used, or an element without self-atomic energy.
    """
    settings = config.data
    sae = load_references(config)

    def dataset(files: Mapping[int, Any]) -> MixedFidelityDataset:
        return MixedFidelityDataset(files, sae, config.fidelity_offset, settings.x, settings.y)

    train = dataset(settings.fidelity_datasets)
    for f, part in train.datasets.items():
        labels = ", ".join(sorted(train.labels[f])) or "no labels"
        logger.info(
            "fidelity %d: %d molecules, %d elements, %s (%s)", f, len(part), len(part.elements), labels, part.name
        )
    indices, held_out = split_indices(train, settings.val_fraction, config.seed)
    files = settings.val_fidelity_datasets or {}
    val = dataset({**train.datasets, **files}) if files else train
    of_file = list(files)
    if settings.separate_val:
        every = np.arange(len(train))
        indices = np.union1d(indices, every[np.isin(train.fidelities, of_file)])
    else:
        indices = np.arange(len(train))
        logger.warning("data.separate_val is false: the validation molecules are trained on, errors are too small")
    shifts = _first_index(val) - _first_index(train)
    held_out = held_out[~np.isin(train.fidelities[held_out], of_file)]
    held_out = held_out + shifts[train.fidelities[held_out]]
    val_indices = np.union1d(held_out, np.flatnonzero(np.isin(val.fidelities, of_file)))
    logger.info("%d molecules for training, %d for validation", len(indices), len(val_indices))
    return Data(train, val, indices, val_indices.astype(np.int64), sae)


def _first_index(dataset: MixedFidelityDataset) -> np.ndarray:
    """Return the index of the first molecule of each fidelity, (F,)."""
    counts = np.bincount(dataset.fidelities, minlength=dataset.num_fidelities)
    return np.cumsum(counts) - counts


def load_references(config: TrainConfig) -> dict[int, dict[int, float]] | None:
    """Read the SAE file of every fidelity; None without ``data.sae``."""
    if config.data.sae is None:
        logger.warning("data.sae is null: the model is trained on total energies")
        return None
    energy = config.data.sae.energy
    files = energy.files if energy.file is None else {0: energy.file}
    return {f: load_sae(path) for f, path in sorted(files.items())}


def build_loaders(config: TrainConfig, data: Data, device: torch.device) -> tuple[Loader, Loader | None]:
    """Make the loaders of training and validation batches; the latter is None without validation molecules."""

    def loader(stage: str, dataset: MixedFidelityDataset, indices: np.ndarray) -> Loader:
        sampler = getattr(config.data.samplers, stage).kwargs
        options = getattr(config.data.loaders, stage)
        return make_loader(
            dataset,
            indices,
            batch_size=sampler.batch_size,
            batch_mode=sampler.batch_mode,
            shuffle=sampler.shuffle,
            batches_per_epoch=sampler.batches_per_epoch,
            sampling_strategy=sampler.sampling_strategy,
            fidelity_weights=config.data.fidelity_weights,
            num_workers=options.num_workers,
            pin_memory=options.pin_memory and device.type == "cuda",
            seed=config.seed,
            rank=idist.get_rank(),
            world_size=idist.get_world_size(),
        )

    train = loader("train", data.train, data.train_indices)
    logger.info("training batches: %s", train.batch_sampler.report())  # type: ignore[union-attr]
    if len(data.val_indices) == 0:
        if config.checkpoint.save_best or (config.scheduler is not None and _needs_validation(config)):
            raise ConfigError(
                "data.val_fraction: leaves no molecule for validation; give more data or a larger fraction"
            )
        return train, None
    val = loader("val", data.val, data.val_indices)
    if len(val) == 0:
        raise ConfigError(
            f"data.samplers.val.kwargs.batch_size: leaves no validation batch for process {idist.get_rank()} of "
            f"{idist.get_world_size()}; make it smaller"
        )
    return train, val


def _needs_validation(config: TrainConfig) -> bool:
    assert config.scheduler is not None
    return Schedule(config.scheduler, config.optimizer).unit == "validation"


# --------------------------------------------------------------------------------------------------
# model and loss
# --------------------------------------------------------------------------------------------------


def build_network(
    config: TrainConfig, model_config: Mapping[str, Any], dataset: MixedFidelityDataset, load: str | Path | None
) -> nn.Module:
    """Build the model (a plain AIMNet2 for one fidelity) and start it from a checkpoint if there is one."""
    count = dataset.num_fidelities
    model = build_model(dict(model_config), count, config.fidelity_offset, config.use_fidelity_readouts)
    n_weights = sum(weight.numel() for weight in model.parameters())
    logger.info("model: %s, number of fidelities %d, number of weights %d", type(model).__name__, count, n_weights)
    if load is None:
        return model
    checkpoint = load_checkpoint(load)
    try:
        sentences = transfer_weights(model, checkpoint)
    except ValueError as error:
        raise ConfigError(f"{load}: {error}") from error
    logger.info("weights from %s", load)
    for sentence in sentences:
        logger.info("  %s", sentence)
    for f, numbers in new_species(model, checkpoint, dataset.species).items():
        logger.info("  fidelity %d learns elements that the checkpoint does not know: %s", f, element_names(numbers))
    return model


def build_loss(config: TrainConfig, dataset: MixedFidelityDataset) -> MTLoss:
    """Build the loss; a component whose label no dataset has is pointed out."""
    loss_fn: MTLoss = resolve(config.loss.class_)(**config.loss.kwargs)
    present = set().union(*dataset.labels.values())
    for name, label in loss_fn.key_true.items():
        if label is not None and label not in present:
            logger.warning("loss component %s: no dataset has the label %s, it is always zero", name, label)
    return loss_fn


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Share gradients among processes; heads of fidelities that a process does not meet in a batch are no problem."""
    if idist.get_world_size() == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=True)


# --------------------------------------------------------------------------------------------------
# the run: what is written and said
# --------------------------------------------------------------------------------------------------


class Run:
    """The records of a run: history, checkpoints, log file, Weights & Biases. Only the first process writes.

    Parameters
    ----------
    config : TrainConfig
        The settings.
    folder : Path
        Where to write; it is made by `started`.
    model : nn.Module
        The model, for checkpoints.
    model_config : mapping
        Its configuration.
    data : Data
        For the description of the fidelities in checkpoints.
    optimizer : Optimizer
        For the learning rates.
    schedule : Schedule, optional
        The schedule.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        model: nn.Module,
        model_config: Mapping[str, Any],
        data: Data,
        optimizer: Optimizer,
        schedule: Schedule | None,
    ) -> None:
        self.config, self.folder, self.model, self.model_config = config, folder, model, model_config
        self.data, self.optimizer, self.schedule = data, optimizer, schedule
        self.writes = idist.get_rank() == 0
        self.records: list[dict[str, Any]] = []
        self.checkpoints: list[tuple[float, Path, int, int]] = []  # score (low is good), file, epoch, iteration
        self.train_means: dict[str, float] = {}
        self.wandb: Any | None = None
        self.start = time.monotonic()

    @contextmanager
    def started(self, log: MemoryHandler) -> Iterator[None]:
        """Make the folder, open log file and loggers, and close them at the end, whatever happens.

        Parameters
        ----------
        log : MemoryHandler
            What was logged so far; it goes into the file, and so does what comes.
        """
        if not self.writes:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "metrics.jsonl").exists():
            logger.warning("%s holds an earlier run; its metrics are replaced", self.folder)
            (self.folder / "metrics.jsonl").unlink()
        settings = to_dict(self.config)
        write_text_atomic(self.folder / "train.yaml", yaml.safe_dump(settings, sort_keys=False))
        file = logging.FileHandler(self.folder / "train.log", mode="w", encoding="utf-8")
        file.setFormatter(log_format())
        log.setTarget(file)
        log.flushLevel = logging.NOTSET
        try:
            self.wandb = start_wandb(self.config, self.folder, {**settings, "model": dict(self.model_config)})
            watch = self.config.wandb.watch_model if self.config.wandb is not None else None
            if self.wandb is not None and watch is not None:
                self.wandb.watch(self.model, log=watch.log, log_freq=watch.log_freq, log_graph=watch.log_graph)
            yield
        finally:
            if self.wandb is not None:
                self.wandb.finish()
            log.flush()
            log.setTarget(None)
            file.close()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group of weights."""
        return {f"lr/{group['name']}": float(group["lr"]) for group in self.optimizer.param_groups}

    def record(self, epoch: int, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write a line of the history: training losses since the last one, and the validation metrics."""
        record: dict[str, Any] = {
            "epoch": epoch,
            "iteration": iteration,
            "time": round(time.monotonic() - self.start, 3),
            **self.learning_rates,
            **{f"train/{name}": value for name, value in self.train_means.items()},
            **{f"val/{name}": value for name, value in metrics.items()},
        }
        self.records.append(record)
        if not self.writes:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        write_text_atomic(self.folder / "metrics.csv", csv_text(self.records))
        self.log_numbers(record, iteration)
        head = f"epoch {epoch}/{self.config.trainer.epochs}, iteration {iteration}, {record['time']:.0f} s"
        losses = [f"{stage} loss {record[key]:.5g}" for stage, key in STAGES if key in record]
        rate = f"learning rate {float(self.optimizer.param_groups[0]['lr']):.3g}"
        logger.info("%s: %s", head, ", ".join([*losses, rate]))
        if metrics:
            logger.info("validation errors\n%s", metrics_table(metrics))

    def log_numbers(self, numbers: Mapping[str, Any], iteration: int) -> None:
        """Send numbers to Weights & Biases."""
        if self.wandb is not None:
            self.wandb.log(dict(numbers), step=iteration)

    def keep_checkpoint(self, epoch: int, iteration: int, loss: float | None) -> None:
        """Write a checkpoint if it is among those to keep, and remove the one that it pushes out.

        Parameters
        ----------
        epoch, iteration : int
            Where the run is.
        loss : float or None
            Validation loss; None without validation.
        """
        settings = self.config.checkpoint
        score = float(loss) if settings.save_best and loss is not None else -float(iteration)
        full = len(self.checkpoints) >= settings.kwargs.n_saved
        if not math.isfinite(score) or (full and score >= self.checkpoints[-1][0]):
            return
        suffix = f"_loss_{loss:.6f}" if settings.save_best and loss is not None else ""
        path = self.folder / f"{settings.filename_prefix}_epoch_{epoch:04d}_iter_{iteration:07d}{suffix}.pt"
        if self.writes:
            self.write_model(path, epoch, iteration, loss)
        self.checkpoints = sorted([*self.checkpoints, (score, path, epoch, iteration)])
        for _, old, _, _ in self.checkpoints[settings.kwargs.n_saved :]:
            if self.writes:
                old.unlink(missing_ok=True)
        self.checkpoints = self.checkpoints[: settings.kwargs.n_saved]

    def write_model(self, path: Path, epoch: int, iteration: int, loss: float | None) -> None:
        """Write the model as it stands, with what it was trained on."""
        dataset = self.data.train
        save_checkpoint(
            path,
            self.model,
            model_config=self.model_config,
            num_fidelities=dataset.num_fidelities,
            fidelity_offset=self.config.fidelity_offset,
            use_fidelity_readouts=self.config.use_fidelity_readouts,
            fidelity_names={f: part.files[0].stem for f, part in dataset.datasets.items()},
            sae=self.data.sae,
            species=dataset.species,
            extra={
                "train_config": to_dict(self.config),
                "progress": {"epoch": epoch, "iteration": iteration, "val_loss": loss},
            },
        )

    def save_final(self, save: Path, trainer: Engine) -> Result:
        """Write the model that the run was for: the best one by validation loss, or the last one."""
        epoch, iteration, source = trainer.state.epoch, trainer.state.iteration, "last"
        if self.config.checkpoint.save_best and self.checkpoints:
            score, best, epoch, iteration = self.checkpoints[0]
            source = f"lowest validation loss, {score:.5g}"
            if self.writes:
                with atomic_path(save) as temporary:
                    shutil.copyfile(best, temporary)
        elif self.writes:
            self.write_model(save, epoch, iteration, None)
        logger.info("model of epoch %d, iteration %d (%s): %s", epoch, iteration, source, save)
        return Result(save, self.folder, epoch, iteration, self.records)


STAGES = (("training", "train/loss"), ("validation", "val/loss"))
"""Losses in the log: their names, and their keys in the history."""


def csv_text(records: list[dict[str, Any]]) -> str:
    """Return records as a CSV table; a column that a record lacks is empty there."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Return validation metrics as a table: a column for each error, a row for all data and for each fidelity."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if not name.endswith("loss"):
            fidelity, _, error = name.rpartition("/")
            rows.setdefault(fidelity or "all", {})[error] = value
    errors = list(dict.fromkeys(error for row in rows.values() for error in row))
    widths = [max(len(error), 9) for error in errors]
    lines = ["        " + " ".join(f"{error:>{width}}" for error, width in zip(errors, widths, strict=True))]
    for fidelity, row in rows.items():
        cells = (f"{row[e]:>{w}.4g}" if e in row else "-".rjust(w) for e, w in zip(errors, widths, strict=True))
        lines.append(f"{fidelity:<8}" + " ".join(cells))
    return "\n".join(lines)


def error_units(metric: RegMultiMetric) -> str:
    """Return the units of the errors for the log: ``E in kcal/mol, F in kcal/mol/Å, q in e``."""
    units = []
    for key, options in metric.properties.items():
        unit = BATCH_KEYS[key].unit if key in BATCH_KEYS else "units of the data"
        name = next((name for name, factor in ENERGY_UNITS.items() if abs(options["scale"] / factor - 1) < 1e-3), None)
        if "eV" in unit and name is not None:
            unit = unit.replace("eV", name)
        elif options["scale"] != 1:
            unit = f"{unit} times {options['scale']:g}"
        units.append(f"{options['abbr']} in {unit}")
    return ", ".join(units)


ENERGY_UNITS = {"eV": 1.0, "meV": 1000.0, "kcal/mol": EV_KCAL_MOL, "kJ/mol": EV_KJ_MOL}
"""Units of energy that a metric's ``scale`` may stand for: how many make one eV."""


# --------------------------------------------------------------------------------------------------
# what happens between the steps
# --------------------------------------------------------------------------------------------------


def attach_epochs(trainer: Engine, loader: Loader) -> None:
    """Draw new batches in each epoch, whose number may differ from epoch to epoch."""

    @trainer.on(Events.EPOCH_STARTED)
    def draw(engine: Engine) -> None:
        loader.batch_sampler.set_epoch(engine.state.epoch)  # type: ignore[union-attr]
        engine.set_data(loader)
        engine.state.epoch_length = len(loader)

    @trainer.on(Events.EPOCH_COMPLETED)
    def forget_length(engine: Engine) -> None:
        # Ignite also ends a run at max_epochs times the length of the current epoch, which may be too early.
        engine.state.epoch_length = None


def attach_training_log(trainer: Engine, run: Run) -> None:
    """Report the loss of the training batches, averaged since the last report, and over the epoch for the history."""
    sums: dict[str, Tensor] = {}
    report: dict[str, Tensor] = {}
    counts = {"epoch": 0, "report": 0}

    @trainer.on(Events.EPOCH_STARTED)
    def reset() -> None:
        sums.clear()
        counts["epoch"] = 0

    @trainer.on(Events.ITERATION_COMPLETED)
    def add(engine: Engine) -> None:
        output: Any = engine.state.output
        for name, value in output.items():
            name = name if name in ("loss", "grad_norm") else f"{name}_loss"
            sums[name] = sums.get(name, 0.0) + value.double()
            report[name] = report.get(name, 0.0) + value.double()
        counts["epoch"] += 1
        counts["report"] += 1

    @trainer.on(Events.ITERATION_COMPLETED(every=run.config.log_frequency.train))
    def speak(engine: Engine) -> None:
        means = {f"train/{name}": float(total) / counts["report"] for name, total in report.items()}
        report.clear()
        counts["report"] = 0
        run.log_numbers({**means, **run.learning_rates}, engine.state.iteration)
        level = logging.DEBUG if _shows_bar() else logging.INFO
        logger.log(
            level,
            "epoch %d, iteration %d: training loss %.5g, gradient norm %.3g",
            engine.state.epoch,
            engine.state.iteration,
            means["train/loss"],
            means["train/grad_norm"],
        )

    def average(engine: Engine) -> None:
        means = {name: total / counts["epoch"] for name, total in sums.items()}
        run.train_means = {name: float(_mean_over_processes(mean)) for name, mean in means.items()}

    trainer.add_event_handler(Events.EPOCH_COMPLETED, average)
    if run.config.log_frequency.val is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=run.config.log_frequency.val), average)


def _mean_over_processes(value: Tensor) -> Tensor:
    if idist.get_world_size() == 1:
        return value
    total = idist.all_reduce(value)
    assert isinstance(total, Tensor)
    return total / idist.get_world_size()


def validate(evaluator: Engine, loader: Loader) -> dict[str, float]:
    """Evaluate the validation molecules; return loss and metrics by name.

    Raises
    ------
    ConfigError
        No molecule among them has a label that the loss uses.
    """
    evaluator.run(loader)
    metrics = {name: float(value) for name, value in evaluator.state.metrics.items() if np.ndim(value) == 0}
    if "loss" not in metrics:
        raise ConfigError("data: no validation molecule has a label that the loss uses; see loss.kwargs.components")
    return metrics


def attach_validation(trainer: Engine, evaluator: Engine, loader: Loader, run: Run) -> None:
    """Validate after each epoch, and every ``log_frequency.val`` iterations if that is set; keep good models."""

    def check(engine: Engine) -> None:
        if run.records[-1]["iteration"] == engine.state.iteration:  # an epoch that ends with such an iteration
            return
        engine.state.metrics = validate(evaluator, loader)
        run.record(engine.state.epoch, engine.state.iteration, engine.state.metrics)
        run.keep_checkpoint(engine.state.epoch, engine.state.iteration, engine.state.metrics["loss"])

    every = run.config.log_frequency.val
    if every is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=every), check)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, check)


def attach_epoch_records(trainer: Engine, run: Run) -> None:
    """Without validation, record each epoch and keep its model."""

    @trainer.on(Events.EPOCH_COMPLETED)
    def keep(engine: Engine) -> None:
        run.record(engine.state.epoch, engine.state.iteration, {})
        run.keep_checkpoint(engine.state.epoch, engine.state.iteration, None)


def attach_schedule(trainer: Engine, run: Run) -> None:
    """Step the schedule after each of its units, and end the training when the rate is exhausted.

    A validation between epochs is no step: a plateau's patience counts epochs.
    """
    schedule = run.schedule
    if schedule is None:
        return
    event = Events.ITERATION_COMPLETED if schedule.unit == "iteration" else Events.EPOCH_COMPLETED

    @trainer.on(event)
    def step(engine: Engine) -> None:
        schedule.step(engine.state.metrics)
        if schedule.exhausted:
            logger.info("the learning rate fell to %.3g, below scheduler.terminate_on_low_lr: the end", schedule.rate)
            engine.terminate()


def attach_progress_bar(trainer: Engine, run: Run) -> None:
    """Show a progress bar for each epoch on a terminal; in a file the log speaks alone."""
    if not (run.writes and _shows_bar()):
        return
    bars: list[tqdm[Any]] = []

    @trainer.on(Events.EPOCH_STARTED)
    def show(engine: Engine) -> None:
        name = f"epoch {engine.state.epoch}/{run.config.trainer.epochs}"
        bars.append(tqdm(total=engine.state.epoch_length, desc=name, leave=False, dynamic_ncols=True))

    @trainer.on(Events.ITERATION_COMPLETED)
    def advance(engine: Engine) -> None:
        output: Any = engine.state.output
        bars[-1].set_postfix(loss=f"{float(output['loss']):.4g}", refresh=False)
        bars[-1].update()

    @trainer.on(Events.EPOCH_COMPLETED)
    def remove() -> None:
        bars.pop().close()


def _shows_bar() -> bool:
    return sys.stderr.isatty()
