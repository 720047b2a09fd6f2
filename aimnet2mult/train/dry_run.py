"""A rehearsal of a run: some steps of training, some of validation, and what the whole run would take."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import ignite.distributed as idist
import numpy as np
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.collate import collate
from aimnet2mult.data.loaders import Batch, MoleculeLoader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.train.acceleration import deterministic
from aimnet2mult.train.loop import Training
from aimnet2mult.train.processes import process_group
from aimnet2mult.train.progress import duration, peak_memory
from aimnet2mult.train.resume import Job
from aimnet2mult.train.runner import build_training, check_places, go_on, length_of_run, try_validation
from aimnet2mult.train.utils import pick_device

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIED = 6
"""Batches of an epoch that are tried: the largest one, and others evenly spaced over the sizes."""


def rehearse(job: Job, save: str | Path | None = None, load: str | Path | None = None) -> str:
    """Check the data, build everything, try some batches, and estimate memory and time; nothing is written.

    Parameters
    ----------
    job, save, load
        As `runner.run_training` takes them.

    Returns
    -------
    str
        The estimates, in words; for a run that goes on, of what is left of it.

    Raises
    ------
    ValueError, OSError
        As `runner.run_training`.
    """
    config = job.config
    with process_group(config.device) as local_rank, deterministic(config.trainer):
        check_places(job, save)
        device = pick_device(config.device, local_rank)
        training, _ = build_training(job, device, load)
        if job.resume is not None:
            go_on(training, job.resume)
        length = length_of_run(config, training.loader)
        left = max(length.iteration - training.position.iteration, 0)
        validations = round(length.validation * left / length.iteration)
        evaluating, per_validation = rehearse_validation(training)
        stepping, per_step = rehearse_steps(training)
        steps = f"{left} steps" if job.resume is None else f"{left} of {length.iteration} steps"
        lines = [f"training: {steps} in {length.epoch} epochs at {per_step}: {duration(left * stepping)}"]
        if training.val_loader is not None:
            lines.append(f"validation: {validations} times {per_validation}: {duration(validations * evaluating)}")
        memory = ", ".join(
            f"{name.partition('/')[2].replace('_', ' ')} {value:.2f}" for name, value in peak_memory(device).items()
        )
        total = duration(left * stepping + validations * evaluating)
        return "\n".join([*lines, f"memory of a process: {memory}", f"in all: {total}"])


def rehearse_steps(training: Training) -> tuple[float, str]:
    """Try some steps; return the mean time of one, in s, and the same in words."""
    accumulate = training.config.trainer.accumulate
    largest, *others = ([batch] * accumulate for batch in sample_of_batches(training.loader))
    tried = [_timed(partial(training.step, group), training.device) for group in (largest, *others, largest)]
    if skipped := sum(not result.applied for result, _ in tried):
        logger.warning("loss or gradient was not finite in %d of %d steps: look for wrong labels", skipped, len(tried))
    (_, first), *later = tried
    mean = float(np.mean([seconds for _, seconds in later]))
    return mean, f"{mean:.3g} s ({first:.3g} s for the first one, of the largest batch)"


def rehearse_validation(training: Training) -> tuple[float, str]:
    """Validate some batches; return the time of a whole validation, in s, and the same in words.

    Raises
    ------
    ConfigError
        The run follows an error that there is not, or needs validation data where there are none.
    """
    if training.val_loader is None:
        try_validation(training)
        return 0.0, ""
    batches = sample_of_batches(training.val_loader)
    try:
        _, seconds = _timed(partial(try_validation, training, batches), training.device)
        per_batch = seconds / len(batches)
    except ConfigError:  # such errors may be missing in these batches alone
        _, seconds = _timed(partial(try_validation, training), training.device)
        per_batch = seconds / len(training.val_loader)
    return per_batch * len(training.val_loader), f"{len(training.val_loader)} batches at {per_batch:.3g} s"


def sample_of_batches(loader: MoleculeLoader) -> list[Batch]:
    """Return some of an epoch's batches of this process: the one of most atoms with padding, and others by size."""
    dataset, batches = loader.dataset, list(loader.batch_sampler)  # type: ignore[arg-type]
    assert isinstance(dataset, MixedFidelityDataset)
    atoms = [len(batch) * int(dataset.n_atoms[batch].max()) for batch in batches]
    by_size = np.argsort(atoms)[::-1]
    places = np.unique(np.linspace(0, len(batches) - 1, TRIED).round().astype(int))
    return [collate(dataset.__getitems__(batches[i])) for i in by_size[places]]


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return a result and the time that it took, s, on the slowest of the processes."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, float(idist.all_reduce(time.perf_counter() - start, op="MAX"))
