"""The data of a run: datasets, the split into training and validation, batches, and what is known about them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.base import LabelCount, MoleculeSource
from aimnet2mult.data.checks import Finding, leakage, quick_checks
from aimnet2mult.data.ledger import DispersionLabel, parse_dispersion, prepare_caches, subtract_dispersion, subtraction
from aimnet2mult.data.loaders import MoleculeLoader, make_loader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sae import load_sae
from aimnet2mult.data.sampler import MixedFidelityBatchSampler
from aimnet2mult.data.sgdataset import fingerprint, open_dataset
from aimnet2mult.data.splits import split_indices
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.train.processes import wait_for_all
from aimnet2mult.train.schema import FidelityConfig, SamplerKwargsConfig, TrainConfig, named_fidelities
from aimnet2mult.train.stop import ignore_requests

logger = logging.getLogger(__name__)


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
        Reference energies of each fidelity.
    record : dict
        What the run's ``data.json`` says about all of this.
    """

    fidelities: dict[str, FidelityConfig]
    train: MixedFidelityDataset
    val: MixedFidelityDataset
    train_indices: np.ndarray
    val_indices: np.ndarray
    held_out: np.ndarray
    sae: dict[int, ReferenceEnergies] | None
    record: dict[str, Any]

    @property
    def names(self) -> dict[int, str]:
        """Name of each fidelity."""
        return dict(enumerate(self.fidelities))

    @property
    def train_counts(self) -> list[int]:
        """Number of molecules of each fidelity to train on."""
        found: list[int] = np.bincount(self.train.fidelities[self.train_indices], minlength=len(self.names)).tolist()
        return found

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
        wait_for_all()
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


def load_references(config: TrainConfig) -> dict[int, ReferenceEnergies] | None:
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


def build_loaders(
    config: TrainConfig, data: Data, device: torch.device
) -> tuple[MoleculeLoader, MoleculeLoader | None]:
    """Make the loaders of training and validation batches; the latter is None without validation molecules."""

    def loader(stage: str, dataset: MixedFidelityDataset, indices: np.ndarray) -> MoleculeLoader:
        options = getattr(config.data.loaders, stage)
        return make_loader(
            dataset,
            build_sampler(config, data, getattr(config.data.samplers, stage).kwargs, dataset, indices),
            num_workers=options.num_workers,
            pin_memory=options.pin_memory and device.type == "cuda",
            persistent_workers=options.persistent_workers,
            prefetch_factor=options.prefetch_factor,
            worker_init_fn=ignore_requests,
        )

    train = loader("train", data.train, data.train_indices)
    report = train.batch_sampler.report()  # type: ignore[union-attr]
    logger.info("training batches: %s", report)
    data.record["sampling"] = report.to_dict()
    if len(data.val_indices) == 0:
        return train, None
    val = loader("val", data.val, data.val_indices)
    if len(val) == 0:
        raise ConfigError(
            f"data.samplers.val.kwargs.batch_size: leaves no validation batch for process {idist.get_rank()} of "
            f"{idist.get_world_size()}; make it smaller"
        )
    return train, val
