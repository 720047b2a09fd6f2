"""How several processes fail together: one message for one failure, and nobody waits for those who are gone.

``rank_errors`` is the outermost context of a program whose processes may be several. The processes talk about failures
through the key-value store that their launcher (``torchrun``, or `aimnet2mult.train.launch`) keeps for them, which
works before they have joined a group and when the operations of the group hang.
"""

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
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NamedTuple, NoReturn

import click
import torch.distributed as dist

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train.stop import stop_requested
from aimnet2mult.utils.cli import USER_ERRORS, UserError, error_message

logger = logging.getLogger(__name__)

EXIT_DEFECT = 1
"""Exit status after an error that is not the user's."""

EXIT_LOST_CONTACT = 3
"""Exit status of a process that ends only because another one did."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C."""

GRACE = 2.0
"""How long a failed process waits to hear whether the others failed alike, seconds."""

LAST_WORD = 5.0
"""How long a process may go on after it is known that another one failed, seconds."""

LAST_WISH = 60.0
"""The same after the launcher ended by a signal that asked all processes to stop, seconds."""

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


@dataclass
class Failure:
    """Why a process ends.

    Attributes
    ----------
    rank : int
        The process.
    kind : str
        ``user`` (a mistake that the user can put right), ``defect``, ``lost`` (contact with another process),
        ``interrupt`` (Ctrl-C) or ``exit`` (asked for by the program).
    message : str
        What happened.
    text : str
        The same with the process it comes from.
    status : int
        Exit status.
    shared : bool
        All processes raise this error, and know that.
    reporter : int
        The process that reports it.
    """

    rank: int
    kind: str
    message: str
    text: str
    status: int
    shared: bool
    reporter: int


def share(error: Exception, reporter: int, alike: bool) -> Exception:
    """Note on an error that all processes raise it, which of them reports it, and whether all of them met it."""
    vars(error)["aimnet2mult_shared"] = (reporter, alike)
    return error


def describe(error: BaseException) -> Failure:
    """Return what an exception that ends this process means."""
    kind, message, status = "defect", f"{type(error).__name__}: {error}", EXIT_DEFECT
    if isinstance(error, KeyboardInterrupt):
        kind, message, status = "interrupt", "interrupted", EXIT_INTERRUPTED
    elif isinstance(error, SystemExit | click.exceptions.Exit):
        code = exit_status(error)
        kind, message, status = "exit", f"ended with exit status {code}", code
    elif isinstance(error, click.ClickException):
        kind, message, status = "user", error.format_message(), error.exit_code
    elif isinstance(error, USER_ERRORS):
        kind, message, status = "user", error_message(error), UserError.exit_code
    elif lost_contact(error):
        kind, status = "lost", EXIT_LOST_CONTACT
        reason = " ".join(str(error).partition(" This is typically")[0].split())
        message = f"lost contact with another process: {reason}"
    shared = vars(error).get("aimnet2mult_shared")
    reporter, alike = shared or (rank(), False)
    text = message if alike else f"{process_name()}: {message}"
    return Failure(rank(), kind, message, text, status, shared is not None, reporter)


def exit_status(error: SystemExit | click.exceptions.Exit) -> int:
    """Return the exit status that an exception asks for."""
    code = error.exit_code if isinstance(error, click.exceptions.Exit) else error.code
    return code if isinstance(code, int) else 0 if code is None else EXIT_DEFECT


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
    process that met it first. Processes that end only because that one did say no more than a line. None goes on for
    more than some seconds after another one failed, even if it hangs in an operation on a GPU. A process that fails
    ends inside this context. torchrun's own report has the message at its end.
    """
    if world_size() == 1:
        yield
        return
    global _guarded
    board = Board(_store())
    board.watch()
    _guarded = True
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit | click.exceptions.Exit) and exit_status(error) == 0:
            raise
        board.end(error)
    finally:
        _guarded = False
        board.close()


_guarded = False


def guarded() -> bool:
    """Whether this process is inside `rank_errors`, and ends there if it fails."""
    return _guarded


class Verdict(NamedTuple):
    """Who reports what, said by the process that failed first."""

    speaker: int
    text: str


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
        while not self._closed.wait(WATCH):
            launcher_gone = False
            try:
                failed = self._store.check(["failures"])
            except RuntimeError:  # as its store is
                failed = launcher_gone = True
            if failed:
                ended = self._closed.wait(LAST_WORD)
                if not ended and launcher_gone and stop_requested() is not None:
                    # By the same signal, to all of us: the checkpoint may still be on its way.
                    ended = self._closed.wait(LAST_WISH)
                if not ended:
                    self._leave(launcher_gone)
                return

    def _leave(self, launcher_gone: bool) -> NoReturn:
        if launcher_gone:
            _say(f"Error: {process_name()}: the program that started it is gone")
        with suppress(RuntimeError):
            if not launcher_gone and self._store.check(["verdict"]):
                _write_error_file(Verdict(*json.loads(self._store.get("verdict"))).text)
        _exit(EXIT_LOST_CONTACT)

    def end(self, error: BaseException) -> NoReturn:
        """Report the failure of this process, unless another one does, and end it."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # the launcher's reply to the first failure
                signal.signal(number, signal.SIG_IGN)
        failure = describe(error)
        self.close()
        limit = threading.Timer(6 * GRACE, _exit, (failure.status,))  # should the store not answer
        limit.daemon = True
        limit.start()
        try:
            verdict = self._verdict(failure)
        except RuntimeError:  # without a store everybody speaks for themselves
            verdict = Verdict(failure.rank, failure.text)
        _write_error_file(verdict.text)
        if verdict.speaker == failure.rank:
            _say(_report(failure, verdict.text, error))
        elif failure.kind in ("user", "defect") and failure.message not in verdict.text:
            _say(f"{process_name()} failed, too: {failure.message}")
        with suppress(RuntimeError):
            self._leave_in_order(verdict, failure)
        _exit(failure.status)

    def _verdict(self, failure: Failure) -> Verdict:
        """Make the failure known; decide who reports if it is the first one, else hear who does."""
        if failure.reporter == failure.rank:
            order = self._store.add("failures", 1)
            self._store.set(f"failure/{order}", json.dumps(asdict(failure)))
            if order == 1:
                self._store.set("verdict", json.dumps(self._decide(failure)))
        if _wait_until(lambda: self._store.check(["verdict"]), 2 * GRACE):
            return Verdict(*json.loads(self._store.get("verdict")))
        return Verdict(failure.rank, failure.text)

    def _decide(self, first: Failure) -> Verdict:
        if first.shared or first.kind not in ("user", "lost"):
            return Verdict(first.rank, first.text)
        failures: list[Failure] = []
        _wait_until(lambda: self._collect(failures) == world_size(), GRACE)
        if first.kind == "lost":
            causes = [failure for failure in failures if failure.kind != "lost"]
            return Verdict(causes[0].rank, causes[0].text) if causes else Verdict(first.rank, first.text)
        alike = len(failures) == world_size() and all(failure.message == first.message for failure in failures)
        return Verdict(0, first.message) if alike else Verdict(first.rank, first.text)

    def _collect(self, failures: list[Failure]) -> int:
        """Append the failures that became known since the last time; return how many there are."""
        while self._store.check([f"failure/{len(failures) + 1}"]):
            failures.append(Failure(**json.loads(self._store.get(f"failure/{len(failures) + 1}"))))
        return len(failures)

    def _leave_in_order(self, verdict: Verdict, failure: Failure) -> None:
        """Let the process that has reported end first: its end is what the launcher tells of."""
        if verdict.speaker == failure.rank:
            self._store.set("said", "")
        elif _wait_until(lambda: self._store.check(["said"]), 2 * GRACE):
            time.sleep(0.5)


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
    lines = "".join(traceback.format_exception(error))
    if failure.kind == "defect":
        return f"{lines}Error: {text}"
    if logger.isEnabledFor(logging.DEBUG):
        return f"{lines}Error: {text}"
    return {"interrupt": "Interrupted.", "exit": ""}.get(failure.kind, f"Error: {text}")


def _say(text: str) -> None:
    if text:
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
    limit = threading.Timer(1.0, os._exit, (status,))  # should another thread hold the locks of these files
    limit.daemon = True
    limit.start()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
