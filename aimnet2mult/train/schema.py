"""The settings of a training run: what there is to set, of which type, with which meaning.

The dataclasses are the schema: a key that is not here is refused, a value of another type too. Values come from the
packaged ``config/default_train_mixed_fidelity.yaml``, the user's file and the command line
(`aimnet2mult.train.configuration`); `aimnet2mult.train.config_checks` says what does not fit together.
"""

# ruff: noqa: RUF009 - `option` makes the field of a dataclass, as dataclasses.field does

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

# --------------------------------------------------------------------------------------------------
# schema
# --------------------------------------------------------------------------------------------------


def option(meaning: str, default: Any = MISSING) -> Any:
    """Field of the schema with a line on its meaning; without ``default`` the packaged file must hold one.

    Defaults stand here only in sections that may be absent (``wandb``, ``scheduler``).
    """
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class SAEFilesConfig:
    """Self-atomic energies (SAE) that are subtracted from the energies, for fidelities without names."""

    files: dict[int, Path] = option(
        "fidelity 0, 1, ... -> YAML file {Z: eV, charge: eV/e, spin: eV/electron}, the last two optional, made by "
        "aimnet2mult.train.calc_sae"
    )
    file: Path | None = option("the one SAE file of a run with one dataset; null: see files")
    mode: str = option(
        "how energies are referenced: linreg (minus the sum of the SAE of the atoms, and the terms of the file)"
    )


@dataclass
class SAEConfig:
    """SAE per property."""

    energy: SAEFilesConfig = field(default_factory=SAEFilesConfig)


@dataclass
class SamplerKwargsConfig:
    """How batches are drawn."""

    batch_size: int = option("largest batch of a process, in what batch_mode says; atoms count with padding")
    batch_mode: str = option("what batch_size counts: atoms or molecules")
    shuffle: bool = option(
        "draw at random, anew in every epoch; false: each molecule once per epoch, by size, whatever the strategy"
    )
    batches_per_epoch: int = option("batches of each process in an epoch; -1: as many as the draws of an epoch fill")
    sampling_strategy: str = option(
        "what an epoch consists of: weighted (weight x number of molecules of each fidelity), uniform (each molecule "
        "once), balanced (as many of each fidelity), or shares"
    )
    shares: dict[str, float] = option(
        "name of a fidelity -> its share of the drawn molecules, for all fidelities, sum 1; with sampling_strategy: "
        "shares only"
    )
    max_padding: float = option("largest share of padding among the atoms of an epoch's batches, in [0, 1)")


@dataclass
class SamplerConfig:
    """A sampler."""

    kwargs: SamplerKwargsConfig = field(default_factory=SamplerKwargsConfig)


@dataclass
class SamplersConfig:
    """Samplers of training and validation."""

    train: SamplerConfig = field(default_factory=SamplerConfig)
    val: SamplerConfig = field(default_factory=SamplerConfig)


@dataclass
class LoaderConfig:
    """How batches are read."""

    num_workers: int = option("reader processes of each process; 0: the training process reads by itself")
    pin_memory: bool = option("page-locked memory for faster copies to a GPU; without a GPU it has no effect")
    prefetch_factor: int | None = option("batches that each reader process prepares ahead; null: 2")
    persistent_workers: bool | None = option("keep the reader processes between epochs; null: yes, if there are any")


@dataclass
class LoadersConfig:
    """Loaders of training and validation."""

    train: LoaderConfig = field(default_factory=LoaderConfig)
    val: LoaderConfig = field(default_factory=LoaderConfig)


@dataclass
class FidelityConfig:
    """A fidelity with a name."""

    files: list[Path] = option("HDF5 files that are one dataset; one name, a list, patterns such as part_*.h5", [])
    val_files: list[Path] | None = option("the same for validation; null: a split of files, see val_fraction", None)
    weight: float = option("how often each of its molecules is drawn, relative to 1; 0: never", 1.0)
    sae: Path | None = option(
        "YAML file {Z: eV, charge: eV/e, spin: eV/electron}, the last two optional, made by "
        "aimnet2mult.train.calc_sae; needed unless data.sae is null",
        None,
    )
    dispersion: Any = option(
        "what dispersion the labels contain: none, {d3bj: functional or parameters}, {d4: functional}, vv10, unknown; "
        "null: unknown",
        None,
    )
    subtract_dispersion: bool = option("take that dispersion off energies and forces as they are read", False)
    level: str | None = option("level of theory in words, such as wB97M-D3BJ/def2-TZVPP; for people", None)


@dataclass
class DataConfig:
    """Datasets, their references and how batches are made of them."""

    fidelities: dict[str, FidelityConfig] = option("name -> fidelity; the order gives their numbers 0, 1, ...")
    fidelity_datasets: dict[int, list[Path]] = option("without names: fidelity 0, 1, ... -> HDF5 file or files")
    fidelity_weights: dict[int, float] = option("fidelity -> how often each of its molecules is drawn; default 1")
    val_fidelity_datasets: dict[int, list[Path]] | None = option(
        "fidelity -> file or files for validation; null, and for fidelities that are left out: a split"
    )
    sae: SAEConfig | None = option("self-atomic energies; null: the model learns total energies")
    val_fraction: float = option("share of the molecules of each fidelity without val_files that validate, in [0, 1)")
    val_split_by: str = option(
        "what a split keeps together: molecule (nothing), composition (equal formulas, in all fidelities), or an array "
        "of the files such as mol_id"
    )
    separate_val: bool = option("take the validation molecules out of the training data")
    dispersion_cache: str = option("dispersion to subtract: disk (computed once, beside the data) or none (when read)")
    ddp_load_full_dataset: bool = option("no effect: every process reads from disk what it draws")
    x: list[str] = option("inputs that are read: coord, numbers, and charge and mult, which are 0 and 1 if left out")
    y: list[str] = option("labels that are read; molecules that lack one are masked out of its loss and errors")
    samplers: SamplersConfig = field(default_factory=SamplersConfig)
    loaders: LoadersConfig = field(default_factory=LoadersConfig)


@dataclass
class ClosenessConfig:
    """A penalty that keeps the fidelities close where their data are few."""

    weight: float = option(
        "how strongly: a weight decay of this size towards the target for the fidelity with the fewest molecules, less "
        "for others in proportion to their numbers; 0 or more",
        0.01,
    )
    to: str = option("target: mean (of all fidelities), or the name of one, which does not feel the penalty", "mean")
    decay: int | None = option("steps in which the weight falls to zero, linearly; null: it stays", None)


@dataclass
class SharingConfig:
    """How the fidelities share."""

    start: str = option(
        "embedding rows and readouts of untrained fidelities: equal, or independent (random ones of its own for each); "
        "copies of trained ones: --load and init_from"
    )
    embedding: str = option(
        "own (each fidelity learns its own rows of each element), or shared (one row of an element for all: fidelities "
        "differ by their readouts only)"
    )
    closeness: ClosenessConfig | None = option("penalty that keeps fidelities close to each other; null: none")


@dataclass
class LossConfig:
    """The loss."""

    class_: str = option("dotted name of the loss: MTLoss, or MTAdaWLoss, which adapts the weights, or one of yours")
    kwargs: dict[str, Any] = option(
        "its arguments; components: {name: {fn, weight, kwargs, fidelity_weights: {fidelity: factor}}}, the weights "
        "relative to each other"
    )


@dataclass
class GradClipConfig:
    """Gradient clipping, by norm first and by value then."""

    max_norm: float | None = option("largest norm of the gradient of all weights together; null: no limit")
    max_value: float | None = option("largest absolute value of each component of the gradient; null: no limit")


@dataclass
class OptimizerConfig:
    """The optimiser and what it trains."""

    class_: str = option("dotted name of the optimiser")
    kwargs: dict[str, Any] = option("its arguments; lr is the base rate")
    param_groups: dict[str, Any] = option(
        "name -> {re: pattern of weight names, and arguments for these weights, such as lr}; the first match counts"
    )
    force_train: list[str] = option("patterns of weight names that are trained although the model keeps them fixed")
    force_no_train: list[str] = option("patterns of weight names that are kept fixed")
    freeze_backbone: bool = option("keep what all fidelities share fixed; their embedding rows and readouts learn")
    freeze_fidelities: list[str] = option("names of fidelities whose embedding rows and readouts are kept fixed")
    grad_clip: GradClipConfig = field(default_factory=GradClipConfig)


@dataclass
class WarmupConfig:
    """Learning rates that grow linearly at the beginning, under any schedule."""

    iterations: int = option("steps of the optimiser until the full rate is reached", 1000)
    start: float = option("share of the rate at the first step, in (0, 1]", 0.01)


@dataclass
class SchedulerConfig:
    """The schedule of the learning rate; it scales the rate of each group of weights alike."""

    class_: str = option("dotted name of an Ignite or PyTorch scheduler")
    kwargs: dict[str, Any] = option(
        "its arguments, without the optimiser; the word total stands for all steps of the run, in its unit; "
        "metric_name of a plateau is a validation metric or {metric: weight}",
        {},
    )
    terminate_on_low_lr: float | None = option(
        "end the training when the base rate, warm-up apart, falls below this; null: never", None
    )
    unit: str | None = option(
        "what a step of the schedule follows: iteration, epoch or validation; null: iteration for Ignite's, epoch for "
        "PyTorch's, validation for a plateau",
        None,
    )
    warmup: WarmupConfig | None = option("growth of the rates at the beginning; null: none", None)


@dataclass
class EMAConfig:
    """Running average of the weights, which is what is validated and saved."""

    decay: float = option("what a step keeps of the average, in [0, 1); less during the first steps", 0.999)


@dataclass
class FidelityStoppingConfig:
    """The end of the training on a fidelity that gets no better."""

    patience: int = option("validations in a row without improvement before the fidelity is left out", 10)
    min_delta: float = option("smallest decrease that counts as improvement, in the unit of the metric", 0.0)
    monitor: Any = option(
        "validation metric or {metric: weight}, low is good; null: error of its forces, or of its energies without any",
        None,
    )


@dataclass
class EarlyStoppingConfig:
    """The end of a training that gets no better."""

    patience: int | None = option(
        "validations in a row without improvement before the end; null: only fidelities stop", 20
    )
    min_delta: float = option("smallest decrease that counts as improvement, in the unit of the metric", 0.0)
    monitor: Any = option("validation metric or {metric: weight}, low is good; null: checkpoint.monitor", None)
    fidelities: dict[str, FidelityStoppingConfig] = option(
        "name -> when its molecules are left out of the training; when all that are named are, the training ends", {}
    )


@dataclass
class GradientReportConfig:
    """Norms of the fidelities' gradients on the weights that they share, and cosines between them."""

    every: int = option("iterations between reports; one takes somewhat longer than a step", 100)


@dataclass
class TrainerConfig:
    """The loop; an iteration is a step of the optimiser."""

    epochs: int = option("number of epochs")
    accumulate: int = option("batches of each process that make one step of the optimiser")
    precision: str = option("float32, float64, or bf16 (matrix products of the networks in bfloat16 while training)")
    ema: EMAConfig | None = option("running average of the weights; null: none, the weights themselves are saved")
    compile: bool = option("compile the evaluation of energies and forces in training with torch.compile")
    deterministic: bool = option("refuse operations whose result may differ from run to run (on GPUs)")
    max_skipped: int = option("steps in a row that may be skipped because loss or gradient is not finite; 0: none")
    early_stopping: EarlyStoppingConfig | None = option("end when validation gets no better; null: never")
    gradient_report: GradientReportConfig | None = option(
        "norms of the fidelities' gradients on the weights that they share, and cosines between them; null: none"
    )


@dataclass
class CheckpointKwargsConfig:
    """How checkpoints are kept."""

    n_saved: int = option("number of best checkpoints that are kept (of latest validated ones without save_best)")
    require_empty: bool = option("refuse a folder that holds checkpoints of this prefix, even with --overwrite")


@dataclass
class CheckpointConfig:
    """Checkpoints during training; a run goes on from any of them."""

    dirname: Path = option("folder of the run: settings, log, metrics, checkpoints, report")
    filename_prefix: str = option("start of the checkpoints' names")
    save_best: bool = option("keep and save the model that is best by monitor; false: the last one")
    monitor: Any = option("validation metric such as loss or ccsd/F_mae, or {metric: weight}; low is good")
    every_iterations: int | None = option("iterations between checkpoints to resume from; null: by time alone")
    every_minutes: float | None = option(
        "minutes between checkpoints to resume from; null: by iterations alone (not both)"
    )
    keep_last: int = option("number of checkpoints to resume from that are kept, 1 or more")
    kwargs: CheckpointKwargsConfig = field(default_factory=CheckpointKwargsConfig)


@dataclass
class LogFrequencyConfig:
    """How often numbers are logged."""

    train: int = option("iterations between reports of training loss, learning rate and speed")
    val: int | None = option("iterations between validations, besides the one after each epoch; null: no others")


@dataclass
class WandbInitConfig:
    """Arguments of ``wandb.init``."""

    name: str | None = option("name of the run; null: run_name", None)
    mode: str = option("online (offline where there is no login or no network), offline or disabled", "online")
    entity: str | None = option("user or team; null: the default one of the account", None)
    project: str | None = option("project; null: project_name", None)
    notes: str | None = option("free text", None)
    group: str | None = option("group of runs", None)
    tags: list[str] = option("labels of the run", [])
    dir: Path | None = option("folder for wandb's files; null: checkpoint.dirname", None)


@dataclass
class WatchModelConfig:
    """Histograms of weights and gradients, as ``wandb.watch`` makes them."""

    log: str = option("gradients, parameters or all", "gradients")
    log_freq: int = option("iterations between histograms", 1000)
    log_graph: bool = option("log the graph of modules", False)


@dataclass
class WandbConfig:
    """Logging to Weights & Biases; it never asks and never holds up a run."""

    init: WandbInitConfig = field(default_factory=WandbInitConfig)
    watch_model: WatchModelConfig | None = option("histograms of weights and gradients; null: none", None)


@dataclass
class TensorBoardConfig:
    """Logging to TensorBoard."""

    dir: Path | None = option("folder for its files; null: tensorboard in the folder of the run", None)


@dataclass
class MetricsConfig:
    """Validation metrics."""

    class_: str = option("dotted name of the metric: RegMultiMetric, or a class derived from it")
    kwargs: dict[str, Any] = option(
        "its arguments; cfg: {property: {abbr (name in metrics), scale (factor from eV, Å, e), peratom, mult}}"
    )


@dataclass
class TrainConfig:
    """Everything that a training run is told, apart from the model and the names of files on the command line."""

    run_name: str | None = option("name of the run; null: run_ and the time of its start")
    project_name: str | None = option("name of the project in Weights & Biases; null: the name of the working folder")
    seed: int = option("seed of every random choice: initial weights, split, draws; 0 or more")
    device: str = option("auto (a GPU if there is one), cpu, cuda or cuda:N")
    fidelity_offset: int = option("element type = Z + fidelity x offset; 129 or more")
    use_fidelity_readouts: bool = option("each fidelity has readouts of its own; false: all share them")
    init_from: dict[str, str] = option(
        "fidelity -> fidelity of the checkpoint of --load that it starts from; others: same name, else the closest"
    )
    sharing: SharingConfig = field(default_factory=SharingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig | None = option("schedule of the learning rate; null: constant rate, no warm-up")
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_frequency: LogFrequencyConfig = field(default_factory=LogFrequencyConfig)
    wandb: WandbConfig | None = option("logging to Weights & Biases; null: none")
    tensorboard: TensorBoardConfig | None = option("logging to TensorBoard; null: none")
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    report: bool = option("evaluate the saved model on the validation data at the end and write report/")


def named_fidelities(config: TrainConfig) -> dict[str, FidelityConfig]:
    """Return the fidelities of a run by name, in the order of their numbers, whichever form the settings have.

    Without ``data.fidelities`` the names are ``fid0``, ``fid1`` ...
    """
    data = config.data
    if data.fidelities:
        return data.fidelities
    sae = data.sae.energy if data.sae is not None else None
    files = {} if sae is None else sae.files if sae.file is None else {0: sae.file}
    return {
        f"fid{f}": FidelityConfig(
            files=data.fidelity_datasets[f],
            val_files=(data.val_fidelity_datasets or {}).get(f),
            weight=data.fidelity_weights.get(f, 1.0),
            sae=files.get(f),
        )
        for f in sorted(data.fidelity_datasets)
    }


def yaml_key(name: str) -> str:
    """Name of a field in YAML: ``class_`` stands for ``class``, which Python reserves."""
    return name.removesuffix("_")


def to_dict(config: Any) -> Any:
    """Return a configuration (or a part of it) as plain mappings, lists and values, as a YAML file would hold it."""
    if is_dataclass(config):
        return {yaml_key(f.name): to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: TrainConfig) -> str:
    """Return the settings as text that `load_config` reads as the same settings.

    PyYAML by itself writes the text 1e5 without quotes, which is read as a number.
    """
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
