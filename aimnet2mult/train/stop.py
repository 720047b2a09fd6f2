"""Requests to stop, by signal: from the user (Ctrl-C), or from a scheduler that needs the machine.

What reaches the training processes, as measured with PyTorch 2.13:

======================  ==================================================  =======================================
sent                    to a plain call (also with several processes)       to ``torchrun``
======================  ==================================================  =======================================
SIGTERM, SIGINT         passed on; they take the time they need; exit       passed on; after 30 s SIGKILL, unless
                        status 0                                            TORCH_ELASTIC_SHUTDOWN_TIMEOUT gives
                                                                            another time in s; exit status 1
SIGUSR1                 the same                                            not passed on: torchrun dies of it, unless
                                                                            called with ``--signals-to-handle
                                                                            SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1``
Ctrl-C in a terminal    once to each process                                once to each process
======================  ==================================================  =======================================

One training process that gets a signal is enough for all to stop, since they ask each other after each step
(`aimnet2mult.train.processes.any_rank`). If the launcher is gone (SIGKILL, or SIGUSR1 to torchrun), they stop within
some seconds as if they had got SIGTERM.

docs/training.md has job scripts for SLURM. Its signals go to what ``srun`` starts, not to the script itself; without
``srun``, write ``#SBATCH --signal=B:USR1@120`` and ``exec python -m aimnet2mult.train.cli ...`` as the last line, so
that Python takes the place of the shell, which would not pass the signal on.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask for an end."""

ONE_REQUEST = 1.0
"""Signals that come within this time are one request, which came by several ways, seconds."""


class StopRequest:
    """Notes signals that ask for an end, so that the loop can end after its step.

    ::

        with StopRequest() as stop:
            for batch in loader:
                step(batch)
                if any_rank(stop.requested is not None)[0]:
                    stop.accept()
                    break
            ...                            # write what has to be written

    A second Ctrl-C raises KeyboardInterrupt at once. The former handlers come back at the end. Outside the main thread,
    which alone gets signals, nothing is noted.

    Attributes
    ----------
    requested : str or None
        Name of the first such signal, such as ``SIGTERM``; ``another process`` if only that one got a signal.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._when = float("-inf")  # time of that
        self._interrupted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Start listening."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in REQUESTS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        recent = time.monotonic() - self._when < ONE_REQUEST
        for number, handler in self._before.items():
            signal.signal(number, self._repeated if recent else handler)  # type: ignore[arg-type]  # as it came

    def accept(self) -> None:
        """Stop, since this process or another one was asked to: the same signal may still be on its way to this one."""
        self._set("another process")

    def _set(self, requested: str) -> None:
        if self.requested is None:
            self.requested, self._when = requested, time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._set(signal.Signals(number).name)
        if number == signal.SIGINT:
            if self._interrupted and time.monotonic() - self._when > ONE_REQUEST:
                raise KeyboardInterrupt
            self._interrupted = True

    def _repeated(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal after the end: the request that was met comes by another way, or it is a new one."""
        if time.monotonic() - self._when > ONE_REQUEST:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]  # as it came
            os.kill(os.getpid(), number)


def ignore_requests(worker: int) -> None:
    """Leave requests to stop to the training process; the ``worker_init_fn`` of loaders.

    Ctrl-C, torchrun and SLURM send them to the readers as well, which would die of them, and the training of that.
    """
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
