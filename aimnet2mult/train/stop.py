"""Requests to stop, by signal: from the user (Ctrl-C) or from a scheduler that needs the machine."""

import signal
import threading
import time
from types import FrameType, TracebackType

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask for an end."""

ONE_PRESS = 1.0
"""SIGINT that come within this time are one and the same (from a terminal and from a launcher), seconds."""


class StopRequest:
    """Notes signals that ask for an end, so that the loop can end at the end of a step.

    ::

        with StopRequest() as stop:
            for batch in loader:
                step(batch)
                if any_rank(stop.requested is not None)[0]:
                    ...

    The second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, which alone gets signals, nothing is
    noted. The former handlers come back at the end.

    Attributes
    ----------
    requested : str or None
        Name of the first such signal, such as ``SIGTERM``.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupted: float | None = None  # time of the first SIGINT
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        """Start listening."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in REQUESTS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted > ONE_PRESS:
                raise KeyboardInterrupt


def ignore_requests(worker: int) -> None:
    """Leave requests to stop to the training process; the ``worker_init_fn`` of loaders.

    Ctrl-C, torchrun and SLURM send them to the readers as well, which would die of them, and the training of that.
    """
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
