"""How several processes fail together: one message for one failure, and nobody waits for those who are gone.

``rank_errors`` is the outermost context of a program whose processes may be several. The processes talk about failures
through the key-value store that their launcher (``torchrun``, or `aimnet2mult.train.launch`) keeps for them, which
works before they have joined a group and when the operations of the group hang.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple, NoReturn

import click
import torch.distributed as dist

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.utils.cli import USER_ERRORS, UserError, error_message

logger = logging.getLogger(__name__)

EXIT_DEFECT = 1
"""Exit status after an error that is not the user's."""

EXIT_LOST_CONTACT = 3
"""Exit status of a process that ends only because another one did."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C."""

GRACE = 2.0
"""How long a failed process waits to hear of the failures of others, seconds."""

LAST_WORD = 5.0
"""How long a process may go on after another one failed, or its launcher is gone, seconds."""

LAST_WISH = 60.0
"""How long it may then take to stop and save a checkpoint, if its launcher is gone, seconds."""

WATCH = 1.0
"""Interval between looks at whether another process failed, seconds."""

POLL = 0.05
"""Interval between looks at what failed processes have to say, seconds."""

CONNECT = timedelta(minutes=5)
"""How long a process tries to reach the store of the launcher."""


def world_size() -> int:
    """Return how many processes were started together, according to the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among all, from 0, according to the environment."""
    return int(os.environ.get("RANK", "0"))


def launch_variable(name: str) -> str:
    """Return what the launcher says in an environment variable.

    Raises
    ------
    ConfigError
        It does not.
    """
    if name not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()} in the environment, but {name} is not set; start several processes with "
            "torchrun or --processes, or remove WORLD_SIZE"
        )
    return os.environ[name]


def process_name() -> str:
    """Return what this process is called in messages; on several machines with the name of its machine."""
    several_machines = os.environ.get("LOCAL_WORLD_SIZE", str(world_size())) != str(world_size())
    return f"process {rank()} of {world_size()}" + (f" on {socket.gethostname()}" if several_machines else "")


# --------------------------------------------------------------------------------------------------
# what an exception means
# --------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """Why a process ends."""

    kind: str
    """``user`` (what the user can put right), ``defect``, ``lost`` (contact with another process) or ``interrupt``."""

    message: str
    status: int
    """Exit status."""


def describe(error: BaseException) -> Failure:
    """Return what an exception that ends this process means."""
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupt", "interrupted", EXIT_INTERRUPTED)
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else EXIT_DEFECT
        return Failure("user", f"ended with exit status {error.code}", status)
    if isinstance(error, click.ClickException):
        return Failure("user", error.format_message(), error.exit_code)
    if isinstance(error, USER_ERRORS):
        return Failure("user", error_message(error), UserError.exit_code)
    if lost_contact(error):
        reason = " ".join(str(error).partition(" This is typically")[0].split())
        return Failure("lost", f"lost contact with another process: {reason}", EXIT_LOST_CONTACT)
    return Failure("defect", f"{type(error).__name__}: {error}", EXIT_DEFECT)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process is gone, and nothing more."""
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


# --------------------------------------------------------------------------------------------------
# failing together
# --------------------------------------------------------------------------------------------------


@contextmanager
def rank_errors() -> Iterator[None]:
    """End all processes when one fails, with the message of that one; alone, do nothing.

    A user's mistake (`USER_ERRORS` and click's exceptions) is reported as ``Error: process 3 of 8: message`` with exit
    status 2, and once, without naming a process, if all of them found it; any other error with the traceback of the
    process that met it first. Processes that end only because that one did say nothing. None goes on for more than some
    seconds after another one failed, even if it hangs in an operation on a GPU. A process that fails ends inside this
    context. torchrun's own report has the message at its end.

    If the launcher is gone, the processes get SIGTERM from themselves: a run saves a checkpoint and stops.
    """
    if world_size() == 1:
        yield
        return
    board = Board(_store())
    board.watch()
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        board.end(error)
    finally:
        board.close()


class Board:
    """Where processes tell each other that they failed.

    Parameters
    ----------
    store : torch.distributed.Store
        Keys and values that all of them see.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._closed = threading.Event()

    def watch(self) -> None:
        """Have a thread end this process if another one failed and it does not notice by itself."""
        threading.Thread(target=self._watch, name="other processes", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        failed = launcher_gone = False
        while not failed:
            if self._closed.wait(WATCH):
                return
            try:
                failed = self._store.check(["cause"])
            except RuntimeError:  # as its store is
                failed = launcher_gone = True
        ended = self._closed.wait(LAST_WORD)
        if launcher_gone and not ended:
            _say(f"{process_name()}: the program that started it is gone; it stops, too")
            os.kill(os.getpid(), signal.SIGTERM)
            ended = self._closed.wait(LAST_WISH)
        if not ended:
            with suppress(RuntimeError):
                _write_error_file(self._store.get("cause").decode())
            _exit(EXIT_LOST_CONTACT)

    def end(self, error: BaseException) -> NoReturn:
        """Report the failure of this process, unless another one is to blame, and end it."""
        self.close()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # the launcher's reply to the first failure
                signal.signal(number, signal.SIG_IGN)
        failure = describe(error)
        _end_after(6 * GRACE, failure.status)  # should the store not answer
        own = f"{process_name()}: {failure.message}"
        cause, found_by_all = own, False
        with suppress(RuntimeError):  # without a store everybody speaks for themselves
            cause = self._cause(failure, own)
            found_by_all = cause == own and failure.kind == "user" and self._found_by_all(failure)
        _write_error_file(cause)
        if cause == own:
            _say(_report(failure, failure.message if found_by_all else own, error))
        elif failure.kind in ("user", "defect") and failure.message not in cause:
            _say(f"{process_name()} failed, too: {failure.message}")
        _exit(failure.status)

    def _cause(self, failure: Failure, own: str) -> str:
        """Make a failure known; return the message of the process that failed first and did not only lose contact."""
        self._store.add(_key(failure), 1)
        if failure.kind == "lost":
            _wait_until(lambda: self._store.check(["cause"]), GRACE)
        return self._store.compare_set("cause", "", own).decode()

    def _found_by_all(self, failure: Failure) -> bool:
        """Whether all processes fail with the same message, as they do where they read the same settings."""
        return _wait_until(lambda: self._store.add(_key(failure), 0) == world_size(), GRACE)


def _key(failure: Failure) -> str:
    """Name of the number of processes that failed with the same message; names in a store are short."""
    return f"failures/{hashlib.sha256(failure.message.encode()).hexdigest()}"


def _store() -> dist.Store:
    """Connect to the store of the launcher; without one, the first process keeps it."""
    for name in ("RANK", "LOCAL_RANK"):
        launch_variable(name)
    address, port = launch_variable("MASTER_ADDR"), int(launch_variable("MASTER_PORT"))
    kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = rank() == 0 and not kept_by_launcher
    store = dist.TCPStore(address, port, is_master=keeper, timeout=CONNECT, wait_for_workers=False)
    # The group, too, then finds a store at this address.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    attempt = os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"aimnet2mult/{attempt}", store)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition for a while; return whether it came true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


def _report(failure: Failure, text: str, error: BaseException) -> str:
    if failure.kind == "interrupt":
        return "Interrupted."
    with_traceback = failure.kind == "defect" or logger.isEnabledFor(logging.DEBUG)
    return ("".join(traceback.format_exception(error)) if with_traceback else "") + f"Error: {text}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")  # in one piece, among the lines of other processes


def _write_error_file(text: str) -> None:
    """Leave the message where torchrun looks for what to show in its report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": details}}, file)


def _exit(status: int) -> NoReturn:
    """End this process and its readers at once, without taking apart groups whose members may be gone."""
    for reader in multiprocessing.active_children():
        reader.kill()
    _end_after(1.0, status)  # should another thread hold the locks of these files
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _end_after(seconds: float, status: int) -> None:
    """Have this process end then, whatever it waits for."""
    limit = threading.Timer(seconds, os._exit, (status,))
    limit.daemon = True
    limit.start()
