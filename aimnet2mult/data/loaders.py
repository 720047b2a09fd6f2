"""From a dataset to batches: the split into training and validation, and the loader."""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader

from aimnet2mult.data.base import MultiFidelityDataset, Sample
from aimnet2mult.data.collate import collate
from aimnet2mult.data.sampler import MAX_PADDING, MixedFidelityBatchSampler

logger = logging.getLogger(__name__)


def split_indices(dataset: MultiFidelityDataset, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the molecules into training and validation at random, each fidelity by itself.

    The split depends on the number of molecules of each fidelity and on the seed alone, so it is the same in every
    process and after a restart.

    Parameters
    ----------
    dataset : MultiFidelityDataset
        The molecules.
    val_fraction : float
        Share of validation molecules, 0 to below 1. Above 0, every fidelity that has at least two molecules has at
        least one for validation and one for training; a single molecule is for training.
    seed : int
        Seed of the split.

    Returns
    -------
    train, val : numpy.ndarray
        Ascending indices of molecules, int64.

    Raises
    ------
    ValueError
        ``val_fraction`` is out of range.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"data.val_fraction: {val_fraction} is not a share from 0 to below 1, such as 0.1.")
    validates = np.zeros(len(dataset), bool)
    for f in range(dataset.num_fidelities):
        members = np.flatnonzero(dataset.fidelities == f)
        n_val = round(val_fraction * len(members))
        if val_fraction > 0.0:
            n_val = min(max(n_val, 1), len(members) - 1)
        chosen = np.random.default_rng([seed, f]).permutation(len(members))[:n_val]
        validates[members[chosen]] = True
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def make_loader(
    dataset: MultiFidelityDataset,
    indices: np.ndarray | None = None,
    *,
    batch_size: int,
    batch_mode: str = "molecules",
    shuffle: bool = True,
    batches_per_epoch: int = -1,
    sampling_strategy: str = "weighted",
    fidelity_weights: Mapping[int, float] | None = None,
    max_padding: float = MAX_PADDING,
    num_workers: int = 0,
    pin_memory: bool = False,
    persistent_workers: bool | None = None,
    prefetch_factor: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Sample]:
    """Make a loader of batches ``(x, y)`` as `aimnet2mult.data.collate.collate` describes them.

    Its ``batch_sampler`` is a `MixedFidelityBatchSampler`; call ``loader.batch_sampler.set_epoch(epoch)`` before each
    epoch.

    Parameters
    ----------
    dataset : MultiFidelityDataset
        The molecules.
    indices : numpy.ndarray, optional
        Those to use; default all.
    batch_size, batch_mode, shuffle, batches_per_epoch, sampling_strategy, fidelity_weights, max_padding
        As in `MixedFidelityBatchSampler`.
    num_workers : int
        Processes that read; 0 reads in this one, which is faster for files whose arrays lie in one piece.
    pin_memory : bool
        Put batches into page-locked memory, from which they are copied to a GPU faster. Without a GPU there is none,
        and the option does nothing (logged).
    persistent_workers : bool, optional
        Keep the workers between epochs; default True if there are any.
    prefetch_factor : int, optional
        Batches that each worker prepares ahead; default 2.
    seed, rank, world_size
        As in `MixedFidelityBatchSampler`.

    Raises
    ------
    ValueError
        An option out of range, or one that needs workers when there are none.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers: {num_workers} is negative. Give the number of reading processes, or 0.")
    if num_workers == 0 and prefetch_factor is not None:
        raise ValueError("prefetch_factor: needs num_workers > 0. Remove it, or set num_workers.")
    if num_workers == 0 and persistent_workers:
        raise ValueError("persistent_workers: needs num_workers > 0. Remove it, or set num_workers.")
    if pin_memory and not torch.cuda.is_available():
        logger.info("pin_memory has no effect without a GPU.")
        pin_memory = False
    sampler = MixedFidelityBatchSampler(
        dataset.n_atoms,
        dataset.fidelities,
        indices,
        batch_size=batch_size,
        batch_mode=batch_mode,
        shuffle=shuffle,
        batches_per_epoch=batches_per_epoch,
        sampling_strategy=sampling_strategy,
        fidelity_weights=fidelity_weights,
        seed=seed,
        rank=rank,
        world_size=world_size,
        max_padding=max_padding,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0 if persistent_workers is None else persistent_workers,
        prefetch_factor=prefetch_factor,
        # A loader draws a seed for its workers: from here, not from the generator that training uses.
        generator=torch.Generator().manual_seed(seed),
    )
