"""Several processes that train one model: joining them, and agreeing on things.

``torchrun`` (or `aimnet2mult.train.launch`, for a plain call) starts the processes. The outermost two contexts of a
program are ::

    with rank_errors():                    # one message for one failure, whichever process it happens in
        with process_group(device) as local_rank:
            ...

In between, what one process finds is told to the others: `any_rank`, `gather_objects`. Both, like every collective
operation, have to be called by all processes in the same order; a process that is alone just goes on. Do not call them
while an exception is on its way (in ``finally``): the others may be elsewhere.
"""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aimnet2mult.train.failures import launch_variable, rank_errors, world_size
from aimnet2mult.train.launch import check_gpus

__all__ = ["any_rank", "distribute", "gather_objects", "process_group", "rank_errors", "wait_for_all"]

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others within a step."""

LONG_WORK = timedelta(days=30)
"""How long processes wait where one of them may have long work to do, such as a cache of dispersion."""


# --------------------------------------------------------------------------------------------------
# one group of processes
# --------------------------------------------------------------------------------------------------


@contextmanager
def process_group(device: str) -> Iterator[int]:
    """Join the processes that were started together (NCCL on GPUs, Gloo on CPUs); alone, do nothing.

    At the end all wait for each other, and the group is taken apart. After an error it is left as it is: to take it
    apart might wait for those who will not come, and would show them a broken connection before the reason is known.

    Parameters
    ----------
    device : str
        The setting ``device``: auto, cpu or cuda.

    Yields
    ------
    int
        Number of this process on its machine.

    Raises
    ------
    ConfigError
        There are fewer GPUs than processes, or ``device`` is one GPU for several processes.
    """
    global _cpu_group
    if world_size() == 1:
        yield 0
        return
    local_rank = int(launch_variable("LOCAL_RANK"))
    _initialize(device, local_rank)
    yield local_rank
    wait_for_all()  # a process that ends early takes the others with it
    gc.collect()  # what still holds the group at exit aborts
    _cpu_group = None
    idist.finalize()


def _initialize(device: str, local_rank: int) -> None:
    global _cpu_group
    if device == "cpu" and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ignite moves what it reduces to a GPU if it sees one
    if device != "cpu" and torch.cuda.is_available():
        check_gpus(device, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
        gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)
        dist.init_process_group("nccl", timeout=STEP_TIMEOUT, device_id=gpu)
    else:
        dist.init_process_group("gloo", timeout=STEP_TIMEOUT)
    with _hidden("SLURM_JOB_ID"):
        idist.sync()
    _cpu_group = dist.new_group(backend="gloo", timeout=LONG_WORK)


@contextmanager
def _hidden(variable: str) -> Iterator[None]:
    """Take a variable out of the environment for a while.

    In a SLURM job Ignite takes the number of the SLURM task for that of the process, but torchrun is one task that
    starts many.
    """
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Share gradients among processes; heads of fidelities that a process does not meet in a batch are no problem.

    A head that no process meets gets no gradient, as with one process.
    """
    if idist.get_world_size() == 1:
        return model
    # Weights with a dimension of 1 may have other strides for the same memory.
    warnings.filterwarnings(
        "ignore", r"(?s)Grad strides do not match bucket view strides.*sizes\(\) = \[(1, |\d+, 1\])", UserWarning
    )
    # Newer versions of torch have another name for it, which older ones lack.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return DistributedDataParallel(
        _WithSpareWeight(model),
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=True,
        broadcast_buffers=False,  # constants, the same everywhere from the start
    )


class _WithSpareWeight(nn.Module):
    """A model with one weight more, which it never uses.

    Torch warns, past Python's filters, where it looks for unused weights and finds none, as in a batch with molecules
    of all fidelities.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.spare = nn.Parameter(torch.zeros_like(next(model.parameters()).flatten()[:1]))

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the model."""
        return self.model(*arguments, **keywords)


# --------------------------------------------------------------------------------------------------
# agreement
# --------------------------------------------------------------------------------------------------

_cpu_group: dist.ProcessGroup | None = None
"""All processes, for what is on the CPU, so that nobody waits for a GPU; nobody hurries here (`LONG_WORK`)."""


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is true in any process."""
    if idist.get_world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=_cpu_group)
    return tuple(bool(vote) for vote in votes.tolist())


def gather_objects(item: T) -> list[T]:
    """Return what each process passes (anything that pickles), in the order of their ranks."""
    if idist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * idist.get_world_size()
    dist.all_gather_object(items, item, group=_cpu_group)
    return items


def wait_for_all() -> None:
    """Wait until all processes are here, however long it takes."""
    gather_objects(None)
