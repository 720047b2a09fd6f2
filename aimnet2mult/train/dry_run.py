"""A rehearsal of a run: some steps of training, some of validation, and what the whole run would take."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch

from aimnet2mult.data.collate import collate
from aimnet2mult.data.loaders import Batch, MoleculeLoader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.train.acceleration import deterministic
from aimnet2mult.train.processes import process_group
from aimnet2mult.train.progress import duration, peak_memory
from aimnet2mult.train.resume import Job
from aimnet2mult.train.run_folder import RunFolder
from aimnet2mult.train.runner import build_training, go_on, length_of_run
from aimnet2mult.train.utils import pick_device

logger = logging.getLogger(__name__)

TRIED = 6
"""Batches of an epoch that are tried: the largest one, and others evenly spaced over the sizes."""


def rehearse(job: Job, load: str | Path | None = None) -> str:
    """Check the data, build everything, try some batches, and estimate memory and time; nothing is written.

    Parameters
    ----------
    job, load
        As `runner.run_training` takes them.

    Returns
    -------
    str
        The estimates, in words.

    Raises
    ------
    ValueError, OSError
        As `runner.run_training`.
    """
    config = job.config
    with process_group(config.device) as local_rank, deterministic(config.trainer):
        RunFolder(config.checkpoint.dirname, writes=False).check(
            job.overwrite, None if job.resume is None else job.resume.folder
        )
        device = pick_device(config.device, local_rank)
        training, _ = build_training(job, device, load)
        if job.resume is not None:
            go_on(training, job.resume)
        accumulate = config.trainer.accumulate
        largest, *others = ([batch] * accumulate for batch in sample_of_batches(training.loader))
        first = _seconds(partial(training.step, largest), device)
        step = float(np.mean([_seconds(partial(training.step, group), device) for group in [*others, largest]]))
        length = length_of_run(config, training.loader)
        total = step * length.iteration
        lines = [
            f"training: {length.iteration} steps in {length.epoch} epochs at {step:.3g} s ({first:.3g} s for the first "
            f"one, of the largest batch): {duration(total)}"
        ]
        if training.val_loader is not None:
            batches = sample_of_batches(training.val_loader)
            seconds = _seconds(partial(training.evaluator.run, batches), device) / len(batches)
            validation = seconds * len(training.val_loader)
            total += validation * length.validation
            lines.append(
                f"validation: {length.validation} times {len(training.val_loader)} batches at {seconds:.3g} s: "
                f"{duration(validation * length.validation)}"
            )
        memory = (
            f"{name.partition('/')[2].replace('_', ' ')} {value:.2f}" for name, value in peak_memory(device).items()
        )
        return "\n".join([*lines, f"memory of a process: {', '.join(memory)}", f"in all: {duration(total)}"])


def sample_of_batches(loader: MoleculeLoader) -> list[Batch]:
    """Return some of an epoch's batches of this process: the one of most atoms with padding, and others by size."""
    dataset, batches = loader.dataset, list(loader.batch_sampler)  # type: ignore[arg-type]
    assert isinstance(dataset, MixedFidelityDataset)
    atoms = [len(batch) * int(dataset.n_atoms[batch].max()) for batch in batches]
    by_size = np.argsort(atoms)[::-1]
    places = np.unique(np.linspace(0, len(batches) - 1, TRIED).round().astype(int))
    return [collate(dataset.__getitems__(batches[i])) for i in by_size[places]]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time that something takes, on all processes together."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return float(idist.all_reduce(time.perf_counter() - start, op="MAX"))
