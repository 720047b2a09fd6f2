"""From a dataset to batches: the loader."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aimnet2mult.data.base import MultiFidelityDataset, Sample
from aimnet2mult.data.collate import collate
from aimnet2mult.data.sampler import MixedFidelityBatchSampler

logger = logging.getLogger(__name__)


Batch = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What `collate` makes: inputs and labels."""


class MoleculeLoader(DataLoader[Sample]):
    """A loader whose batches, and whose messages about faults in the data, are the same with and without workers."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch promises a class of its own
        batches = super().__iter__()
        return batches if self.num_workers == 0 else _unpacked(batches)


class _Parcel:
    """A batch on its way from a worker.

    Arrays pass through a pipe in a tenth of the time that torch needs to put each tensor of a batch into shared memory
    and to map it again, and they need no room in ``/dev/shm``.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.parts = [{key: tensor.numpy() for key, tensor in part.items()} for part in collate(samples)]

    def unpacked(self) -> Batch:
        x, y = ({key: torch.from_numpy(array) for key, array in part.items()} for part in self.parts)
        return x, y

    def pin_memory(self) -> Batch:
        """Called by the thread of the loader that pins."""
        x, y = ({key: tensor.pin_memory() for key, tensor in part.items()} for part in self.unpacked())
        return x, y


def _unpacked(batches: Iterator[Any]) -> Iterator[Batch]:
    """Batches from workers; the message of an error is freed from the traceback that torch puts before it."""
    try:
        for batch in batches:
            yield batch.unpacked() if isinstance(batch, _Parcel) else batch
    except (ValueError, OSError) as error:
        *traceback, last = str(error).strip().splitlines()
        if not traceback:
            raise
        raise type(error)(last.partition(": ")[2]) from error


def make_loader(
    dataset: MultiFidelityDataset,
    sampler: MixedFidelityBatchSampler,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    persistent_workers: bool | None = None,
    prefetch_factor: int | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
) -> MoleculeLoader:
    """Make a loader of batches ``(x, y)`` as `aimnet2mult.data.collate.collate` describes them.

    Parameters
    ----------
    dataset : MultiFidelityDataset
        The molecules.
    sampler : MixedFidelityBatchSampler
        Says which of them come together; it is the loader's ``batch_sampler``, whose ``set_epoch`` is to be called
        before each epoch.
    num_workers : int
        Processes that read while this one computes; 0 reads in this one, between its steps. Either way a process gives
        some 30 thousand molecules per second (``benchmarks/data_scale.py``), so that more than one or two only help
        with chunked or compressed files too large to be kept in memory.
    pin_memory : bool
        Put batches into page-locked memory, from which they are copied to a GPU faster. Without a GPU there is none,
        and the option does nothing (logged).
    persistent_workers : bool, optional
        Keep the workers between epochs; default True if there are any.
    prefetch_factor : int, optional
        Batches that each worker prepares ahead; default 2.
    worker_init_fn : callable, optional
        Called in each worker with its number, before it reads.

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
    return MoleculeLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_Parcel if num_workers else collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0 if persistent_workers is None else persistent_workers,
        prefetch_factor=prefetch_factor,
        worker_init_fn=worker_init_fn,
        # A loader draws a seed for its workers: from here, not from the generator that training uses.
        generator=torch.Generator().manual_seed(sampler.seed),
    )
