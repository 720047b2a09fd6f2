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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from aimnet2mult.config.builder import ConfigError, resolve
from aimnet2mult.constants import element_names
from aimnet2mult.data.base import LabelCount, MoleculeSource
from aimnet2mult.data.checks import Finding, leakage, quick_checks
from aimnet2mult.data.ledger import DispersionLabel, parse_dispersion, prepare_caches, subtract_dispersion, subtraction
from aimnet2mult.data.loaders import make_loader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sae import load_sae
from aimnet2mult.data.sampler import MixedFidelityBatchSampler
from aimnet2mult.data.sgdataset import fingerprint, open_dataset
from aimnet2mult.data.splits import save_split, split_indices
from aimnet2mult.dispersion import RationalDispersion
from aimnet2mult.models.base import build_model, load_checkpoint, save_checkpoint
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.train.engine import make_evaluator, make_trainer
from aimnet2mult.train.fidelity_specific_utils import log_of_names, new_species, sources_by_name, transfer_weights
from aimnet2mult.train.loggers import start_wandb
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.metrics import RegMultiMetric
from aimnet2mult.train.optimizer import build_optimizer
from aimnet2mult.train.schedule import Schedule
from aimnet2mult.train.schema import (
    FidelityConfig,
    SamplerKwargsConfig,
    TrainConfig,
    named_fidelities,
    to_dict,
    to_yaml,
)
from aimnet2mult.train.utils import accepted_keywords, log_format, pick_device, seed_everything
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
        Checkpoints, ``metrics.jsonl``, ``metrics.csv``, ``train.yaml``, ``train.log``, ``data.json``, ``split.npz``.
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
    model = build_network(config, model_config, data, load).to(device)
    optimizer = build_optimizer(config.optimizer, model)
    schedule = None if config.scheduler is None else Schedule(config.scheduler, config.optimizer, optimizer)
    train_loader, val_loader = build_loaders(config, data, device)
    loss_fn = build_loss(config, data)

    step_model = distribute(Forces(model), device)
    trainer = make_trainer(
        step_model,
        optimizer,
        loss_fn,
        device,
        max_grad_norm=config.optimizer.grad_clip.max_norm,
        non_blocking=device.type == "cuda",
    )
    metric = build_metric(config, data)
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
    fidelities : dict of str to FidelityConfig
        What the settings say about each fidelity, by name, in the order of their numbers.
    train, val : MixedFidelityDataset
        Datasets; the same one unless there are files for validation.
    train_indices, val_indices : numpy.ndarray
        Molecules of each.
    held_out : numpy.ndarray
        Molecules of ``train`` that a split chose for validation.
    sae : dict or None
        Self-atomic energies, {f: {Z: eV}}.
    record : dict
        What the run's ``data.json`` says about all of this.
    """

    fidelities: dict[str, FidelityConfig]
    train: MixedFidelityDataset
    val: MixedFidelityDataset
    train_indices: np.ndarray
    val_indices: np.ndarray
    held_out: np.ndarray
    sae: dict[int, dict[int, float]] | None
    record: dict[str, Any]

    @property
    def names(self) -> dict[int, str]:
        """Name of each fidelity."""
        return dict(enumerate(self.fidelities))

    @property
    def dispersion(self) -> dict[int, dict[str, Any]]:
        """What dispersion the labels of each fidelity contain, and whether it is subtracted from them."""
        return {f: known["dispersion"] for f, known in enumerate(self.record["fidelities"].values())}


def build_data(config: TrainConfig) -> Data:
    """Open the datasets and part validation from training.

    A fidelity with files for validation is validated with all of them, the others with ``data.val_fraction`` of their
    molecules.

    Raises
    ------
    ValueError, FileNotFoundError
        A file that cannot be used, or an element without self-atomic energy.
    """
    settings, fidelities = config.data, named_fidelities(config)
    sae = load_references(config)

    def dataset(sources: Mapping[int, MoleculeSource]) -> MixedFidelityDataset:
        return MixedFidelityDataset(sources, sae, config.fidelity_offset, settings.x, settings.y)

    raw = {f: open_dataset(fidelity.files) for f, fidelity in enumerate(fidelities.values())}
    files = {
        f: open_dataset(fidelity.val_files) for f, fidelity in enumerate(fidelities.values()) if fidelity.val_files
    }
    if idist.get_rank() == 0:
        for f, name in enumerate(fidelities):
            warn(quick_checks(raw[f], name, sae=None if sae is None else sae[f]))
    train = dataset(without_dispersion(config, raw))
    val = dataset({**train.datasets, **without_dispersion(config, files)}) if files else train
    names = dict(enumerate(fidelities))
    indices, held_out = split_indices(
        train,
        settings.val_fraction,
        config.seed,
        settings.val_split_by,
        fidelities=[f for f in train.datasets if f not in files],
        names=names,
    )
    if not settings.separate_val:
        indices = np.arange(len(train))
        logger.warning("data.separate_val is false: the validation molecules are trained on, errors are too small")
    shifts = val.starts - train.starts
    moved = held_out + shifts[train.fidelities[held_out]]
    val_indices = np.union1d(moved, np.flatnonzero(np.isin(val.fidelities, list(files)))).astype(np.int64)
    data = Data(fidelities, train, val, indices, val_indices, held_out, sae, {})
    data.record = data_record(config, data)
    if idist.get_rank() == 0:
        log_data(data)
        trained, validated = ({names[f]: source for f, source in part.items()} for part in (raw, files))
        apart = {names[f]: inside for f, inside in train.by_fidelity(held_out).items()}
        warn(leakage(trained, validated, apart if settings.separate_val else None))
    return data


def warn(findings: Sequence[Finding]) -> None:
    """Log what checks of the data found."""
    for finding in findings:
        logger.log(logging.INFO if finding.severity == "note" else logging.WARNING, "%s", finding)


def without_dispersion(config: TrainConfig, sources: Mapping[int, MoleculeSource]) -> dict[int, MoleculeSource]:
    """Take dispersion off the labels of those fidelities that ask for it; the others stay as they are."""
    fidelities = list(named_fidelities(config).items())
    corrected = dict(sources)
    for f, source in sources.items():
        name, fidelity = fidelities[f]
        if fidelity.subtract_dispersion:
            where = f"data.fidelities.{name}"
            label = parse_dispersion(fidelity.dispersion, f"{where}.dispersion")
            correction = subtraction(label, f"{where}.subtract_dispersion")
            corrected[f] = subtract_dispersion(source, correction, config.data.dispersion_cache)
    # First one process in all, then one on each other machine, whose disk may be its own and lack the caches.
    first, one_of_machine = idist.get_rank() == 0, idist.get_local_rank() == 0
    for turn in (first, one_of_machine and not first):
        if turn:
            for source in corrected.values():
                prepare_caches(source)
        idist.barrier()
    return corrected


def data_record(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Return what is known of the data of a run, for the log and for ``data.json``."""
    fidelities = {}
    for f, (name, fidelity) in enumerate(data.fidelities.items()):
        source = data.train.datasets[f]
        counts = source.label_counts(config.data.y)
        fidelities[name] = {
            "fidelity": f,
            "level": fidelity.level,
            "files": fingerprint(source),
            "val_files": fingerprint(data.val.datasets[f]) if fidelity.val_files else None,
            "molecules": len(source),
            "elements": source.elements,
            "labels": {key: asdict(count) for key, count in counts.items()},
            "dispersion": {
                "labels": parse_dispersion(fidelity.dispersion, name).to_dict(),
                "subtracted": fidelity.subtract_dispersion,
            },
            "weight": fidelity.weight,
            "train": int(np.count_nonzero(data.train.fidelities[data.train_indices] == f)),
            "validation": int(np.count_nonzero(data.val.fidelities[data.val_indices] == f)),
        }
    settings = config.data
    split = {"by": settings.val_split_by, "fraction": settings.val_fraction, "seed": config.seed}
    return {"fidelities": fidelities, "split": split}


def log_data(data: Data) -> None:
    """Say what the data are, and what a look at some of the molecules finds."""
    for f, (name, known) in enumerate(data.record["fidelities"].items()):
        level = f" ({known['level']})" if known["level"] else ""
        logger.info(
            "%s%s: %d molecules, %d for training, %d for validation, %d elements (%s)",
            *(name, level, known["molecules"], known["train"], known["validation"], len(known["elements"])),
            data.train.datasets[f].name,
        )
        logger.info("  labels: %s", ", ".join(f"{key} {LabelCount(**n)}" for key, n in known["labels"].items()))
        dispersion = DispersionLabel.from_dict(known["dispersion"]["labels"]).text
        subtracted = ", which is subtracted" if known["dispersion"]["subtracted"] else ""
        logger.info("  the labels contain %s%s", dispersion, subtracted)


def load_references(config: TrainConfig) -> dict[int, dict[int, float]] | None:
    """Read the SAE file of every fidelity; None without ``data.sae``."""
    if config.data.sae is None:
        logger.warning("data.sae is null: the model is trained on total energies")
        return None
    files = {f: fidelity.sae for f, fidelity in enumerate(named_fidelities(config).values())}
    return {f: load_sae(path) for f, path in files.items() if path is not None}


def build_sampler(
    config: TrainConfig,
    data: Data,
    settings: SamplerKwargsConfig,
    dataset: MixedFidelityDataset,
    indices: np.ndarray,
) -> MixedFidelityBatchSampler:
    """Make the sampler of the batches of this process."""
    numbers = {name: f for f, name in data.names.items()}
    return MixedFidelityBatchSampler(
        dataset.n_atoms,
        dataset.fidelities,
        indices,
        batch_size=settings.batch_size,
        batch_mode=settings.batch_mode,
        shuffle=settings.shuffle,
        batches_per_epoch=settings.batches_per_epoch,
        sampling_strategy=settings.sampling_strategy,
        fidelity_weights={numbers[name]: fidelity.weight for name, fidelity in data.fidelities.items()},
        fidelity_shares={numbers[name]: share for name, share in settings.shares.items()} or None,
        fidelity_names=data.names,
        seed=config.seed,
        rank=idist.get_rank(),
        world_size=idist.get_world_size(),
        max_padding=settings.max_padding,
    )


def build_loaders(config: TrainConfig, data: Data, device: torch.device) -> tuple[Loader, Loader | None]:
    """Make the loaders of training and validation batches; the latter is None without validation molecules."""

    def loader(stage: str, dataset: MixedFidelityDataset, indices: np.ndarray) -> Loader:
        options = getattr(config.data.loaders, stage)
        return make_loader(
            dataset,
            build_sampler(config, data, getattr(config.data.samplers, stage).kwargs, dataset, indices),
            num_workers=options.num_workers,
            pin_memory=options.pin_memory and device.type == "cuda",
            persistent_workers=options.persistent_workers,
            prefetch_factor=options.prefetch_factor,
        )

    train = loader("train", data.train, data.train_indices)
    report = train.batch_sampler.report()  # type: ignore[union-attr]
    logger.info("training batches: %s", report)
    data.record["sampling"] = report.to_dict()
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
    config: TrainConfig, model_config: Mapping[str, Any], data: Data, load: str | Path | None
) -> nn.Module:
    """Build the model (a plain AIMNet2 for one fidelity) and start it from a checkpoint if there is one."""
    count = data.train.num_fidelities
    model = build_model(dict(model_config), count, config.fidelity_offset, config.use_fidelity_readouts)
    n_weights = sum(weight.numel() for weight in model.parameters())
    logger.info("model: %s, number of fidelities %d, number of weights %d", type(model).__name__, count, n_weights)
    if any(isinstance(module, RationalDispersion) for module in model.modules()):
        for name, fidelity in data.fidelities.items():
            if fidelity.subtract_dispersion:
                raise ConfigError(
                    f"data.fidelities.{name}.subtract_dispersion: the model has a dispersion energy among its outputs, "
                    "which would then be added to labels without dispersion. Remove one of the two"
                )
    if load is None:
        return model
    checkpoint = load_checkpoint(load)
    sources = sources_by_name(data.names, checkpoint)
    try:
        sentences = transfer_weights(model, checkpoint, sources)
    except ValueError as error:
        raise ConfigError(f"{load}: {error}") from error
    logger.info("weights from %s", load)
    for sentence in [*log_of_names(data.names, checkpoint, sources), *sentences]:
        logger.info("  %s", sentence)
    for f, numbers in new_species(model, checkpoint, data.train.species, sources).items():
        logger.info("  %s learns elements that the checkpoint does not know: %s", data.names[f], element_names(numbers))
    return model


def build_metric(config: TrainConfig, data: Data) -> RegMultiMetric:
    """Build the metric of the validation; errors of each fidelity stand under its name."""
    kwargs = dict(config.metrics.kwargs)
    metric_class = resolve(config.metrics.class_)
    accepted = accepted_keywords(metric_class)
    if accepted is None or "fidelity_names" in accepted:
        kwargs.setdefault("fidelity_names", data.names)
    metric: RegMultiMetric = metric_class(**kwargs)
    return metric


def build_loss(config: TrainConfig, data: Data) -> MTLoss:
    """Build the loss; a component without labels, and a fidelity without labels for it, are pointed out."""
    loss_fn: MTLoss = resolve(config.loss.class_)(**config.loss.kwargs)
    labels = {
        name: {label for label, count in known["labels"].items() if count["molecules"]}
        for name, known in data.record["fidelities"].items()
    }
    for component, label in loss_fn.key_true.items():
        if label is not None and not any(label in present for present in labels.values()):
            logger.warning("loss component %s: no dataset has the label %s, it is always zero", component, label)
    used = set(loss_fn.key_true.values())
    for name, present in labels.items():
        if None not in used and not present & used:
            logger.warning("%s: no molecule has a label that the loss uses; nothing is learned from it", name)
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
        write_text_atomic(self.folder / "train.yaml", to_yaml(self.config))
        write_text_atomic(self.folder / "data.json", json.dumps(self.data.record, indent=1, ensure_ascii=False) + "\n")
        save_split(
            self.folder / "split.npz",
            self.data.train,
            self.data.held_out,
            val_fraction=self.config.data.val_fraction,
            seed=self.config.seed,
            by=self.config.data.val_split_by,
            names=self.data.names,
        )
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
            fidelity_names=self.data.names,
            fidelity_levels={f: known.level for f, known in enumerate(self.data.fidelities.values()) if known.level},
            dispersion=self.data.dispersion if self.config.data.fidelities else None,
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
    names = max(8, *(len(fidelity) + 1 for fidelity in rows)) if rows else 8
    lines = [" " * names + " ".join(f"{error:>{width}}" for error, width in zip(errors, widths, strict=True))]
    for fidelity, row in rows.items():
        cells = (f"{row[e]:>{w}.4g}" if e in row else "-".rjust(w) for e, w in zip(errors, widths, strict=True))
        lines.append(f"{fidelity:<{names}}" + " ".join(cells))
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
        loader.batch_sampler.set_epoch(engine.state.epoch - 1)  # type: ignore[union-attr]
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
