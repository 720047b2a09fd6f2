"""Training in several processes from a plain call: how many there should be, and starting them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click
import torch
import torch.distributed as dist

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train.failures import EXIT_LOST_CONTACT, LAST_WORD

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
"""Signals that are passed on to the processes."""

POLL = 0.05
"""Interval between looks at the processes, seconds."""

PATIENCE = LAST_WORD + 10.0
"""How long the others may go on after one process failed, seconds."""


def launched() -> bool:
    """Whether this process was started by ``torchrun`` or `relaunch`, together with others."""
    return "WORLD_SIZE" in os.environ or "LOCAL_RANK" in os.environ


def wanted_processes(device: str, processes: int | None) -> int:
    """Return how many processes a call on this machine should become.

    One for each GPU if ``device`` is auto or cuda and there are several; otherwise one; ``processes`` overrides.
    Nothing is set up on the GPUs.

    Parameters
    ----------
    device : str
        The setting ``device``: auto, cpu, cuda or cuda:N.
    processes : int, optional
        The option ``--processes``.

    Raises
    ------
    ConfigError
        This machine has too few GPUs, or the process is already one of several.
    """
    if launched():
        if processes is not None:
            raise ConfigError("--processes: torchrun has started the processes already; use its --nproc-per-node")
        return 1
    if processes is None:
        return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1
    check_gpus(device, processes)
    return processes


def check_gpus(device: str, processes: int) -> None:
    """Make sure that each process of this machine has a GPU of its own, unless it is to do without.

    Raises
    ------
    ConfigError
        It has not.
    """
    if device.startswith("cuda:") and processes > 1:
        raise ConfigError(
            f"device: {device} is one GPU for {processes} processes; give cuda, and choose GPUs with the environment "
            "variable CUDA_VISIBLE_DEVICES"
        )
    gpus = torch.cuda.device_count()
    if processes > gpus and (device == "cuda" or (device == "auto" and gpus > 0)):
        raise ConfigError(
            f"device: {processes} processes need a GPU each, and this machine has {gpus}; give cpu to train without"
        )


def relaunch(processes: int, arguments: Sequence[str], module: str = "aimnet2mult.train.cli") -> int:
    """Run ``python -m module arguments`` in several processes on this machine, as ``torchrun --standalone`` would.

    Signals are passed on to all processes as they are, SIGUSR1 included, and the processes may take the time they need
    to save a checkpoint; torchrun kills them after 30 s. They do not get signals from the terminal themselves. On CPUs
    they share the cores, unless ``OMP_NUM_THREADS`` is set.

    Returns
    -------
    int
        Exit status: 0 if all of them ended well, else that of the process that failed first (128 + n if signal n
        ended it).
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    command = [sys.executable, "-m", module, *arguments]
    workers: list[subprocess.Popen[bytes]] = []
    with _received_signals() as received:
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # In a session of its own: Ctrl-C comes from here only, so that it comes once.
                workers.append(subprocess.Popen(command, env={**common, **own}, start_new_session=True))
            return _watch(workers, received)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect the signals that this process gets; those that it was told to ignore (by nohup) stay ignored."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in FORWARDED}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Pass signals on until all processes have ended; return the exit status."""
    ended: dict[int, int] = {}  # rank -> exit status of those that failed, in the order of their ends
    last_end = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < last_end:
        while received:
            number = received.pop(0)
            for worker in workers:
                worker.send_signal(number)
        _note_failures(workers, ended)
        if ended:
            last_end = min(last_end, time.monotonic() + PATIENCE)
        time.sleep(POLL)
    _note_failures(workers, ended)
    if not ended:
        return 0
    # A process that only lost contact to another one is not what it was about.
    rank, status = next((item for item in ended.items() if item[1] != EXIT_LOST_CONTACT), next(iter(ended.items())))
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    hint = "; is there too little memory?" if name == "SIGKILL" else ""
    click.echo(f"Error: process {rank} of {len(workers)} was ended by {name}{hint}", err=True)
    return 128 - status


def _note_failures(workers: Sequence[subprocess.Popen[bytes]], ended: dict[int, int]) -> None:
    for rank, worker in enumerate(workers):
        if worker.poll():
            ended.setdefault(rank, worker.returncode)
