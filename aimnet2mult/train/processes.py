"""Several processes that train one model: joining them, and agreeing on things.

``torchrun`` (or `aimnet2mult.train.launch`, for a plain call) starts the processes. The outermost two contexts of a
program are ::

    with rank_errors():                    # one message for one failure, whichever process it happens in
        with process_group(device) as local_rank:
            ...

In between, what only one process does or finds is told to the others: `on_rank_zero`, `agreed`, `any_rank`. Each of
them, like every collective operation, has to be called by all processes in the same order; a process that is alone just
goes on. Do not call them while an exception is on its way (in ``finally``): the others may be elsewhere.
"""

import gc
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train.failures import guarded, launch_variable, rank_errors, share, world_size
from aimnet2mult.utils.cli import USER_ERRORS, error_message

__all__ = ["agreed", "any_rank", "distribute", "gather_objects", "on_rank_zero", "process_group", "rank_errors"]

T = TypeVar("T")

TIMEOUT_VARIABLE = "AIMNET2MULT_TIMEOUT_MINUTES"
"""Environment variable: how long a process waits for the others within a step, minutes."""

DEFAULT_TIMEOUT = 30.0
"""The same if the variable is not set, minutes."""

LONG_WORK = timedelta(days=30)
"""How long processes wait where one of them may have long work to do, such as a cache of dispersion."""


# --------------------------------------------------------------------------------------------------
# one group of processes
# --------------------------------------------------------------------------------------------------


@contextmanager
def process_group(device: str, timeout: timedelta | None = None) -> Iterator[int]:
    """Join the processes that were started together (NCCL on GPUs, Gloo on CPUs); alone, do nothing.

    At the end all wait for each other, and the group is taken apart. After an error nobody waits.

    Parameters
    ----------
    device : str
        The setting ``device``: auto, cpu or cuda.
    timeout : timedelta, optional
        How long a process waits for the others within a step; default `step_timeout`. `on_rank_zero`, `agreed`
        and the end of the group are not subject to it.

    Yields
    ------
    int
        Number of this process on its machine.

    Raises
    ------
    ConfigError
        There are fewer GPUs than processes, or ``device`` is one GPU for several processes.
    """
    if world_size() == 1:
        yield 0
        return
    local_rank = int(launch_variable("LOCAL_RANK"))
    _initialize(device, local_rank, step_timeout() if timeout is None else timeout)
    try:
        yield local_rank
        wait_for_all()  # a process that ends early takes the others with it
    except BaseException:
        # Taking the group apart may wait for those who will not come, and shows the others a broken connection before
        # the reason is known.
        if not guarded():
            _finalize()
        raise
    _finalize()


def _finalize() -> None:
    gc.collect()  # what still holds the group at exit aborts
    _groups.clear()
    idist.finalize()


def _initialize(device: str, local_rank: int, timeout: timedelta) -> None:
    if device == "cpu" and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ignite moves what it reduces to a GPU if it sees one
    if device != "cpu" and torch.cuda.is_available():
        check_gpus(device, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
        gpu = torch.device("cuda", local_rank)
        torch.cuda.set_device(gpu)
        dist.init_process_group("nccl", timeout=timeout, device_id=gpu)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    with _hidden("SLURM_JOB_ID"):
        idist.sync()
    for patient in (False, True):  # now, while the launcher is surely there
        _cpu_group(patient, timeout)


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


def check_gpus(device: str, processes: int) -> None:
    """Make sure that each process of this machine has a GPU of its own.

    Raises
    ------
    ConfigError
        It has not.
    """
    gpus = torch.cuda.device_count()
    if device.startswith("cuda:") and processes > 1:
        raise ConfigError(
            f"device: {device} is one GPU for {processes} processes; give cuda, and choose GPUs with the environment "
            "variable CUDA_VISIBLE_DEVICES"
        )
    if device != "cpu" and processes > gpus:
        raise ConfigError(f"device: {processes} processes need a GPU each, and this machine has {gpus}")


def step_timeout() -> timedelta:
    """Return how long a process waits for the others within a step: ``AIMNET2MULT_TIMEOUT_MINUTES``, else 30 minutes.

    Raises
    ------
    ConfigError
        The variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT))
    try:
        minutes = timedelta(minutes=float(text))
    except (ValueError, OverflowError):
        minutes = timedelta(0)
    if not timedelta(0) < minutes <= LONG_WORK:
        raise ConfigError(f"{TIMEOUT_VARIABLE}: {text!r} is not a positive number of minutes, 43200 at most")
    return minutes


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

_groups: dict[bool, dist.ProcessGroup] = {}
"""Groups of all processes for tensors on the CPU: patient ones (True), and others."""


def _cpu_group(patient: bool, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return a group of all processes that talks through Gloo, so that nobody waits for a GPU."""
    if patient not in _groups:
        timeout = LONG_WORK if patient else timeout or step_timeout()
        _groups[patient] = dist.new_group(backend="gloo", timeout=timeout)
    return _groups[patient]


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is true in any process."""
    if idist.get_world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=_cpu_group(patient=False))
    return tuple(bool(vote) for vote in votes.tolist())


def gather_objects(item: T) -> list[T]:
    """Return what each process passes (anything that pickles), in the order of their ranks."""
    return _gather(item, patient=False)


def wait_for_all() -> None:
    """Wait until all processes are here, however long it takes."""
    _gather(None, patient=True)


def _gather(item: T, patient: bool) -> list[T]:
    if idist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * idist.get_world_size()
    dist.all_gather_object(items, item, group=_cpu_group(patient))
    return items


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call a function in the first process only, and return its result (anything that pickles) in all of them.

    It may take as long as it wants. Its error is raised in all processes, and reported once by `rank_errors`.
    """
    if idist.get_world_size() == 1:
        return function()
    own: Exception | None = None
    outcome: list[Any] = [None, None]
    if idist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            own, outcome[1] = error, _portable(error)
    dist.broadcast_object_list(outcome, src=0, group=_cpu_group(patient=True))
    result, failure = outcome
    if failure is not None:
        raise share(own or failure, reporter=0, alike=True)
    return result


def agreed(function: Callable[[], T]) -> T:
    """Call a function in each process and return each one's own result; if it fails in one, it fails in all.

    It may take as long as it wants. All processes then raise the error of the first process that failed, and
    `rank_errors` reports it once.
    """
    if idist.get_world_size() == 1:
        return function()
    own: Exception | None = None
    try:
        result = function()
    except Exception as error:
        own = error
    failures = _gather(None if own is None else _portable(own), patient=True)
    failed = {r: failure for r, failure in enumerate(failures) if failure is not None}
    if not failed:
        return result
    first, failure = next(iter(failed.items()))
    alike = len(failed) == len(failures) and len({str(failure) for failure in failed.values()}) == 1
    raise share(own if own is not None and first == idist.get_rank() else failure, first, alike)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process: itself, or else one of a kind with the same message."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the methods of its class raise
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    if isinstance(error, USER_ERRORS):
        return ValueError(error_message(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
