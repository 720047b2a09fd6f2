"""Command lines that depend on one another, run side by side, each once.

A job is done when its folder says so for the same command and the same inputs; so a study that was interrupted goes on
where it was, and a changed setting runs again what depends on it, and nothing else. What a command writes lies in its
folder, with ``job.json``, its state, and ``log.txt``, what it printed.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aimnet2mult
from aimnet2mult.data.sgdataset import fingerprint, open_dataset
from aimnet2mult.utils.files import write_text_atomic

logger = logging.getLogger(__name__)

STATE, OUTPUT, LOCK = "job.json", "log.txt", ".lock"
RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"

PACKAGE_ROOT = Path(aimnet2mult.__file__).resolve().parents[1]
"""Folder that the package lies in."""

POLL_SECONDS = 0.1
"""Time between looks at the running commands."""

STOP_SECONDS = 60.0
"""Time that commands have to write a checkpoint when the study is stopped."""


class StudyError(RuntimeError):
    """A job that cannot be run; the message says why."""


@dataclass(frozen=True)
class Command:
    """A command line of the package.

    Attributes
    ----------
    folder : str
        Where its results go, relative to the folder of the study, in which it is run.
    module : str
        What ``python -m`` runs.
    arguments : tuple of str
        Its arguments.
    result : str
        File in ``folder`` that it writes when all is well.
    inputs : tuple of str
        Files whose content it depends on, relative to the folder of the study.
    reads : tuple of str
        Folders of commands whose results it reads.
    device_option : str
        Beginning of the argument that says on which device to work, such as ``--device=``; empty: it has none.
    """

    folder: str
    module: str
    arguments: tuple[str, ...]
    result: str
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    device_option: str = ""


@dataclass(frozen=True)
class Job:
    """A command that can be made once others have been run.

    Attributes
    ----------
    name : str
        What it is called in messages.
    make : callable
        Returns the command, from the results of the jobs before it; may raise `StudyError`.
    needs : tuple of str
        Names of jobs without which it cannot run.
    after : tuple of str
        Names of jobs whose end, good or bad, it waits for.
    steps : int
        Optimiser steps, for the estimate of the time.
    """

    name: str
    make: Callable[[], Command]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    steps: int = 0


@dataclass
class _Process:
    """A command that is running."""

    job: Job
    command: Command
    process: subprocess.Popen[bytes]
    start: float = field(default_factory=time.monotonic)


class Workshop:
    """Runs jobs in the folder of a study.

    Parameters
    ----------
    folder : Path
        The folder.
    workers : int
        Commands that run at a time.
    threads : int
        Threads of each.
    device : str, optional
        Device for the commands that take one.

    Attributes
    ----------
    failures : dict of str to str
        Name of a job that could not be done -> why.
    """

    def __init__(self, folder: Path, workers: int = 1, threads: int = 1, device: str | None = None) -> None:
        self.folder, self.workers, self.threads, self.device = folder, workers, threads, device
        self.failures: dict[str, str] = {}
        self._finished: set[str] = set()
        self._running: list[_Process] = []
        self._lock: int | None = None
        self._signals = 0

    # ------------------------------------------------------------------------------------------------
    # what is known of a command
    # ------------------------------------------------------------------------------------------------

    def key(self, command: Command) -> str:
        """Digest of a command line, the content of its inputs, and the commands whose results it reads."""
        inputs = {name: content_digest(self.folder / name) for name in command.inputs}
        before = {name: self.state(name).get("key") for name in command.reads}
        text = json.dumps([command.module, command.arguments, inputs, before], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def state(self, folder: str) -> dict[str, Any]:
        """What a folder says of its command: ``key``, ``status``, ``seconds``, ``cpu_seconds``; empty: nothing."""
        path = self.folder / folder / STATE
        if not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content

    def is_done(self, command: Command) -> bool:
        """Whether a command has been run with its inputs as they are now."""
        state = self.state(command.folder)
        return self._is_complete(command) and state.get("status") == DONE and state["key"] == self.key(command)

    # ------------------------------------------------------------------------------------------------
    # running
    # ------------------------------------------------------------------------------------------------

    def run(self, jobs: Sequence[Job]) -> None:
        """Run jobs, in their order as far as what they need is there.

        A job that fails leaves a message in ``failures``, and so do those that need it. SIGINT (Ctrl-C) and SIGTERM
        stop the running commands, which have `STOP_SECONDS` to write a checkpoint.

        Raises
        ------
        StudyError
            The folder is in use.
        KeyboardInterrupt
            The jobs were stopped.
        """
        with self._locked(), self._signals_counted():
            waiting = list(jobs)
            clock = _Clock(waiting)
            try:
                while waiting or self._running:
                    if self._signals:
                        raise KeyboardInterrupt
                    if not self._start_next(waiting, clock) and not self._collect(clock):
                        time.sleep(POLL_SECONDS)
            finally:
                self._stop()

    def _start_next(self, waiting: list[Job], clock: "_Clock") -> bool:
        """Start, or settle without starting, the first job that can be; False if there is none now."""
        for job in waiting:
            if any(name in self.failures for name in job.needs):
                missing = next(name for name in job.needs if name in self.failures)
                self._settle(job, waiting, f"needs {missing}, which failed")
                logger.debug("%s: %s", job.name, self.failures[job.name])
                return True
            if len(self._running) >= self.workers or not self._finished.issuperset((*job.needs, *job.after)):
                continue
            try:
                command = job.make()
            except StudyError as error:
                self._settle(job, waiting, str(error))
                logger.error("%s: %s", job.name, error)
                return True
            if any(other.command.folder == command.folder for other in self._running):
                continue  # the same run, wanted by two jobs
            if self.is_done(command):
                self._settle(job, waiting)
                clock.found(job)
            else:
                waiting.remove(job)
                self._running.append(self._started(job, command))
            return True
        return False

    def _settle(self, job: Job, waiting: list[Job], failure: str | None = None) -> None:
        waiting.remove(job)
        self._finish(job, failure)

    def _finish(self, job: Job, failure: str | None = None) -> None:
        self._finished.add(job.name)
        if failure is not None:
            self.failures[job.name] = failure

    def _started(self, job: Job, command: Command) -> _Process:
        folder, state = self.folder / command.folder, self.state(command.folder)
        key = self.key(command)
        if folder.exists() and state.get("key") != key:
            shutil.rmtree(folder)
            state = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._write_state(command, {**state, "key": key, "status": RUNNING})
        arguments = [sys.executable, "-m", command.module, *command.arguments]
        if self.device is not None and command.device_option:
            arguments.append(command.device_option + self.device)
        # A session of its own: Ctrl-C on the terminal is for the study, which then ends its commands itself.
        with open(folder / OUTPUT, "ab") as output:
            process = subprocess.Popen(
                arguments,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[] if self._lock is None else [self._lock],
            )
        return _Process(job, command, process)

    def _environment(self) -> dict[str, str]:
        """Environment of a command: it runs the package that the study itself runs, wherever that lies."""
        path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self.threads)}

    def _collect(self, clock: "_Clock") -> bool:
        """Settle a command that has ended; False if there is none."""
        for running in self._running:
            code = self._reap(running, FAILED)
            if code is None:
                continue
            log = self.folder / running.command.folder / OUTPUT
            good = code == 0 and self._is_complete(running.command)
            failure = None if good else f"failed (status {code}): {_last_line(log)}; see {log}"
            self._finish(running.job, failure)
            if failure is not None:
                logger.error("%s: %s", running.job.name, failure)
            clock.done(running.job, good)
            return True
        return False

    def _reap(self, running: _Process, otherwise: str) -> int | None:
        """Note how a command has ended, done or ``otherwise``, and return its exit status; None if it still runs."""
        pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
        if pid == 0:
            return None
        code = running.process.returncode = os.waitstatus_to_exitcode(status)
        good = code == 0 and self._is_complete(running.command)
        self._close(running, DONE if good else otherwise, usage.ru_utime + usage.ru_stime)
        self._running.remove(running)
        return code

    def _is_complete(self, command: Command) -> bool:
        return (self.folder / command.folder / command.result).is_file()

    def _close(self, running: _Process, status: str, cpu_seconds: float) -> None:
        """Note how a command ended, and add its time to that of earlier attempts which it went on from."""
        state = self.state(running.command.folder)
        seconds = state.get("seconds", 0.0) + time.monotonic() - running.start
        cpu = state.get("cpu_seconds", 0.0) + cpu_seconds
        self._write_state(running.command, {**state, "status": status, "seconds": seconds, "cpu_seconds": cpu})

    def _write_state(self, command: Command, state: Mapping[str, Any]) -> None:
        line = [command.module, *command.arguments]
        write_text_atomic(self.folder / command.folder / STATE, json.dumps({"command": line, **state}, indent=1) + "\n")

    def _stop(self) -> None:
        """End the running commands; training runs write a checkpoint. A second Ctrl-C ends them at once."""
        if not self._running:
            return
        logger.info("stopping %d commands", len(self._running))
        deadline = time.monotonic() + STOP_SECONDS
        self._signal(signal.SIGTERM)
        while self._running and self._signals < 2 and time.monotonic() < deadline:
            self._reap_all()
        self._signal(signal.SIGKILL)
        while self._running:
            self._reap_all()

    @contextlib.contextmanager
    def _signals_counted(self) -> Iterator[None]:
        """Count SIGINT and SIGTERM instead of being interrupted by them, in the middle of whatever is being noted."""
        self._signals = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def count(number: int, frame: object) -> None:
            self._signals += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signal(self, number: signal.Signals) -> None:
        for running in self._running:
            running.process.send_signal(number)

    def _reap_all(self) -> None:
        for running in list(self._running):
            self._reap(running, STOPPED)
        time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other studies out of the folder, as long as this one or a command that it has started runs."""
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StudyError(
                    f"{self.folder}: is in use by another study, or by commands that a killed one has left behind. "
                    "Wait for their end, or stop them"
                ) from error
            yield
        finally:
            os.close(self._lock)
            self._lock = None


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def content_digest(path: Path) -> str:
    """Digest of a file; of a dataset, that of its structure and of molecules spread over it."""
    status = path.stat()
    return _content_digest(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _content_digest(path: Path, size: int, changed: int) -> str:
    if path.suffix in (".h5", ".hdf5"):
        return str(fingerprint(open_dataset(path))[0]["sha256"])
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Clock:
    """Says how far the jobs are and how long they may still take."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.total, self.finished = len(jobs), 0
        self.steps_left = sum(job.steps for job in jobs)
        self.steps_made, self.start = 0, time.monotonic()

    def found(self, job: Job) -> None:
        """Note a job that had been done before."""
        self.finished += 1
        self.steps_left -= job.steps

    def done(self, job: Job, good: bool) -> None:
        """Note a job that has been run."""
        self.finished += 1
        self.steps_left -= job.steps
        self.steps_made += job.steps
        seconds = time.monotonic() - self.start
        left = f", about {_duration(seconds * self.steps_left / self.steps_made)} left" if self.steps_made else ""
        if good:
            logger.info("[%d/%d] %s%s", self.finished, self.total, job.name, left)


def _duration(seconds: float) -> str:
    """Return a time for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
