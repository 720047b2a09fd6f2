"""The folder of a training run: what a run leaves on disk, and how it is taken up again.

============================== ===================================================================================
``train.yaml``, ``model.yaml`` settings and model, resolved
``data.json``, ``split.npz``   fingerprints of the data, molecules held out for validation
``run.json``                   the sessions of the run: when, where, with which versions and from what it was started
``train.log``                  what was logged; open (and locked) as long as the run lasts
``metrics.jsonl``              a record per line: losses, errors, learning rates; the same in a run that was resumed
``metrics.csv``                the same as a table
``timing.jsonl``               what the clock on the wall says; differs from run to run
``*_last_iter_*.pt``           the newest checkpoints, to resume from
``*_epoch_*_iter_*.pt``        the best checkpoints
``model.pt``                   the model that the run was for, unless it is saved elsewhere
``report/``, ``tensorboard/``  made by others (`aimnet2mult.tools.evaluate`, TensorBoard)
============================== ===================================================================================

A run may be killed at any moment: files are moved into place when they are whole, and those that grow are cut back to
where the checkpoint was written that the run goes on from (`aimnet2mult.train.history`,
`aimnet2mult.train.checkpoints`).
"""

import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train.checkpoints import Checkpoints, Resume, Writer, checkpoints_of, find_resume
from aimnet2mult.train.history import History
from aimnet2mult.train.provenance import provenance
from aimnet2mult.train.utils import log_format
from aimnet2mult.utils.cli import error_message
from aimnet2mult.utils.files import check_writable, remove_stale, sync_folder, write_text_atomic
from aimnet2mult.utils.run_files import (
    DATA,
    LOG,
    METRICS,
    METRICS_TABLE,
    MODEL,
    MODEL_SETTINGS,
    RUN_RECORD,
    SETTINGS,
    SPLIT,
    TIMING,
)

if sys.platform != "win32":
    import fcntl

__all__ = ["Checkpoints", "History", "Resume", "RunFolder", "changed_data", "find_resume", "provenance"]

logger = logging.getLogger(__name__)

OWN_FILES = (SETTINGS, MODEL_SETTINGS, DATA, SPLIT, RUN_RECORD, LOG, METRICS, METRICS_TABLE, TIMING, MODEL)
"""Files of a run, besides its checkpoints."""

MARKS = (RUN_RECORD, METRICS)
"""Files that only a run writes: a folder with one of them holds a run."""

REPORTS = (
    *(f"report/{name}" for name in ("index.html", "errors.json", "errors.csv", "errors.md")),
    *(f"report/{name}.png" for name in ("parity", "error_histograms", "learning_curves")),
    "tensorboard/events.out.tfevents.*",
)
"""Files that others make for a run, as patterns inside its folder."""


class RunFolder:
    """The folder of a run: guarded against another run, equipped with settings, log and a record of the sessions.

    Parameters
    ----------
    folder : Path
        The folder; it need not exist.
    writes : bool
        False for all processes but one; they write nothing.
    """

    def __init__(self, folder: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(folder).absolute(), writes

    def check(self, overwrite: bool = False, resume: Path | None = None) -> None:
        """Refuse a folder that cannot be written, or that holds another run; nothing is written.

        Parameters
        ----------
        overwrite : bool
            The run that is there is to be replaced.
        resume : Path, optional
            Folder of the run that goes on (`Resume.folder`).

        Raises
        ------
        OSError
            The folder cannot be made or written.
        ConfigError
            It holds another run, or one that is still going on. What to do is in the message.
        """
        existing = next(path for path in (self.path, *self.path.parents) if path.exists())
        check_writable(existing / f".{self.path.name}")
        if self.writes and (self.path / LOG).is_file():
            with open(self.path / LOG, "ab") as file:
                self._lock(file.fileno())
        self._refuse_others(overwrite, resume)

    @contextmanager
    def begin(
        self,
        files: Mapping[str, Writer],
        *,
        log: MemoryHandler | None = None,
        overwrite: bool = False,
        resume: Resume | None = None,
        processes: int = 1,
    ) -> Iterator[None]:
        """Make the folder, write what describes the run, and keep its log file open inside the ``with`` block.

        Parameters
        ----------
        files : mapping of str to function
            Names of `OWN_FILES` and functions that write them: ``{"train.yaml": lambda path: ...}``.
        log : MemoryHandler, optional
            What was logged so far; it goes into ``train.log``, and so does what comes.
        overwrite : bool
            Remove what an earlier run left: `OWN_FILES`, its checkpoints and the files of its ``report`` and
            ``tensorboard``; nothing else.
        resume : Resume, optional
            What the run goes on from; in its own folder, the log and the list of sessions are continued.
        processes : int
            Number of processes of this session.

        Raises
        ------
        OSError, ConfigError
            As `check`, should things have changed since.
        """
        assert set(files) <= set(OWN_FILES), set(files) - set(OWN_FILES)
        if not self.writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path.parent)
        with open(self.path / LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
            self._lock(file.fileno())
            self._refuse_others(overwrite, None if resume is None else resume.folder)
            if overwrite:
                self._remove_earlier_run()
                file.truncate(0)
            remove_stale(self.path)
            self._add_session(processes, resume)
            for name, write in files.items():
                write(self.path / name)
            with _logged_to(file, log):
                yield

    # ------------------------------------------------------------------------------------------------

    def _is_same(self, folder: Path) -> bool:
        return folder.exists() and self.path.exists() and os.path.samefile(folder, self.path)

    def _refuse_others(self, overwrite: bool, resume: Path | None) -> None:
        if overwrite and resume is not None:
            raise ConfigError("--overwrite and --resume exclude one another: a run goes on, or it is replaced")
        if not self.path.is_dir() or (resume is not None and self._is_same(resume)):
            return
        marks = [name for name in MARKS if (self.path / name).exists()]
        if marks and not overwrite:
            raise ConfigError(
                f"checkpoint.dirname: {self.path} holds another run ({', '.join(marks)}). Continue it with --resume "
                f"{shlex.quote(str(self.path))}, replace it with --overwrite, or choose another run_name or folder"
            )
        # A folder that somebody chose for files of the same names, such as that of train.yaml, is no run to replace.
        foreign = [name for name in OWN_FILES if name != LOG and (self.path / name).exists()]
        foreign += [path.name for path in checkpoints_of(self.path)]
        if foreign and not marks:
            raise ConfigError(
                f"checkpoint.dirname: {self.path} holds {foreign[0]}, but no run that it belongs to; choose another "
                "run_name or folder, so that it is not lost"
            )

    def _lock(self, descriptor: int) -> None:
        """Take the lock on ``train.log``, which lasts until it is closed or the process ends, however it does."""
        if sys.platform == "win32":  # nothing there tells that a run is going on
            return
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"checkpoint.dirname: {self.path} is in use: a run is going on in it{self._who()}. Wait for its "
                    "end, or stop it"
                ) from error
            logger.debug("%s: no locks on this file system (%s)", self.path, error.strerror)

    def _who(self) -> str:
        try:
            session = _read_sessions(self.path / RUN_RECORD)[-1]
            return f" (process {session['process']} on {session['host']} since {session['start']})"
        except (OSError, ValueError, LookupError, TypeError):  # only to help; a run that has just begun has none
            return ""

    def _remove_earlier_run(self) -> None:
        """Remove what an earlier run left, but for the log, which is open, and the record, which marks the folder."""
        for path in checkpoints_of(self.path):
            path.unlink()
        for name in OWN_FILES:
            if name not in (LOG, RUN_RECORD):
                (self.path / name).unlink(missing_ok=True)
        for pattern in REPORTS:
            for path in sorted(self.path.glob(pattern)):
                path.unlink()

    def _add_session(self, processes: int, resume: Resume | None) -> None:
        path = self.path / RUN_RECORD
        sessions: list[Any] = []
        source = None if resume is None else str(resume.path)
        if resume is not None and self._is_same(resume.folder):
            source = resume.path.name
            try:
                sessions = _read_sessions(path)
            except (FileNotFoundError, ValueError) as error:
                logger.warning("%s; the record of earlier sessions is lost", error_message(error))
        session = {**provenance(), "processes": processes, "resumed_from": source}
        write_text_atomic(path, json.dumps({"sessions": [*sessions, session]}, indent=1) + "\n")


@contextmanager
def _logged_to(file: TextIO, log: MemoryHandler | None) -> Iterator[None]:
    """Write what was collected to a file, and what comes too."""
    if log is None:
        yield
        return
    handler = logging.StreamHandler(file)
    handler.setFormatter(log_format())
    log.setTarget(handler)
    log.flushLevel = logging.NOTSET
    try:
        yield
    finally:
        log.flush()
        log.setTarget(None)


def _read_sessions(path: Path) -> list[Any]:
    """Read the sessions of a run.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a record of a run.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("sessions"), list):
        raise ValueError(f"{path}: not the record of a run: it has no sessions")
    return content["sessions"]


# --------------------------------------------------------------------------------------------------
# the same data
# --------------------------------------------------------------------------------------------------


def changed_data(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Compare the data of a run with those that it is to go on with.

    Parameters
    ----------
    stored, present : mapping
        Records of the data (``data.json``): ``fidelities`` by name, in each ``fidelity``, its number, and ``files``
        and ``val_files``, fingerprints by `aimnet2mult.data.sgdataset.fingerprint`.

    Returns
    -------
    list of str
        What is not the same: fidelities, and files with other content. Files that were moved, renamed, repacked or
        compressed are the same.
    """
    before, now = stored["fidelities"], present["fidelities"]
    messages = [f"data.fidelities: {name} is missing; the run was trained on it" for name in before if name not in now]
    messages += [f"data.fidelities: {name} is new; the run was not trained on it" for name in now if name not in before]
    for name in before:
        if name not in now:
            continue
        if before[name]["fidelity"] != now[name]["fidelity"]:
            messages.append(
                f"data.fidelities: {name} is fidelity {now[name]['fidelity']}, in the run it was fidelity "
                f"{before[name]['fidelity']}"
            )
        for key in ("files", "val_files"):
            messages += _changed_files(f"data.fidelities.{name}.{key}", before[name][key], now[name][key])
    return messages


def _changed_files(where: str, before: list[dict[str, Any]] | None, now: list[dict[str, Any]] | None) -> list[str]:
    before, now = before or [], now or []
    if len(before) != len(now):
        return [f"{where}: {len(now)} files, in the run there were {len(before)}"]
    known, found = [file["sha256"] for file in before], [file["sha256"] for file in now]
    if known != found and sorted(known) == sorted(found):
        order = ", ".join(Path(file["path"]).name for file in before)
        return [f"{where}: the files are the same, but in another order; in the run it was {order}"]
    messages = []
    for old, new in zip(before, now, strict=True):
        if old["sha256"] != new["sha256"]:
            what = "other values, arrays or units"
            if old["molecules"] != new["molecules"]:
                what = f"{new['molecules']} molecules instead of {old['molecules']}"
            messages.append(f"{where}: {new['path']} is not what the run was trained on ({old['path']}): {what}")
    return messages
