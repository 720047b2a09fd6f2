"""The folder of a training run: what a run leaves on disk, and how it is taken up again.

============================== ===================================================================================
``train.yaml``, ``model.yaml`` settings and model, resolved
``data.json``, ``split.npz``   fingerprints of the data, molecules held out for validation
``run.json``                   a list of sessions: when, where, with which versions and from what the run was started
``train.log``                  what was logged; open (and locked) as long as the run lasts
``metrics.jsonl``              a record per line: losses, errors, learning rates; the same in a run that was resumed
``metrics.csv``                the same as a table
``timing.jsonl``               what the clock on the wall says; differs from run to run
``*_last_iter_*.pt``           the newest checkpoints, to resume from
``*_epoch_*_iter_*.pt``        the best checkpoints
``report/``, ``tensorboard/``  made by others (`aimnet2mult.tools.evaluate`, TensorBoard)
============================== ===================================================================================

A run may be killed at any moment. Checkpoints are moved into place when they are whole. ``metrics.jsonl`` grows by
lines, and each checkpoint knows how far it had come (`History.state`), so that `History.restore` drops what was
written later and a run that goes on from there writes it again.
"""

import csv
import errno
import io
import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

import aimnet2mult
from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import CheckpointError, load_checkpoint, versions
from aimnet2mult.train.utils import log_format
from aimnet2mult.utils.cli import error_message
from aimnet2mult.utils.files import check_writable, remove_stale, sync_folder, write_text_atomic

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Writes a file whole or not at all, under the name that it is given."""

METRICS, METRICS_TABLE, TIMING = "metrics.jsonl", "metrics.csv", "timing.jsonl"
RUN_RECORD, DATA_RECORD, LOG, SETTINGS = "run.json", "data.json", "train.log", "train.yaml"

OWN_FILES = (SETTINGS, "model.yaml", DATA_RECORD, "split.npz", RUN_RECORD, LOG, METRICS, METRICS_TABLE, TIMING)
"""Files of a run, besides its checkpoints."""

LAST_NAME = re.compile(r"(?P<prefix>[^.].*|)_last_iter_(?P<iteration>\d{9,})\.pt", re.DOTALL)
BEST_NAME = re.compile(r"(?P<prefix>[^.].*|)_epoch_(?P<epoch>\d{4,})_iter_(?P<iteration>\d{7,})(_.*)?\.pt", re.DOTALL)
"""Names of checkpoints; that of a temporary file begins with a dot and is neither."""


# --------------------------------------------------------------------------------------------------
# history
# --------------------------------------------------------------------------------------------------


class History:
    """The numbers of a run: ``metrics.jsonl``, the same as ``metrics.csv``, and ``timing.jsonl``.

    A record is a flat mapping with an integer ``iteration``. Its values are numbers, texts, truth values or None;
    numpy and torch scalars become plain ones. Numbers are written so that reading them gives the same bits. JSON has no
    NaN and no infinity: these are written as null, in the table as an empty cell, and `records` holds None.

    Parameters
    ----------
    folder : Path
        The run's folder; it must exist when the first record comes.
    writes : bool
        False for all processes but one; they keep `records` and write nothing.

    Attributes
    ----------
    records : list of dict
        The lines of ``metrics.jsonl``.
    """

    def __init__(self, folder: str | Path, writes: bool = True) -> None:
        self.folder, self.writes = Path(folder), writes
        self.records: list[dict[str, Any]] = []
        self._bytes = 0  # of metrics.jsonl
        self._iteration = 0  # the largest one so far
        self._columns: dict[str, None] = {}  # in the order of their appearance
        self._begun: set[str] = set()  # files that this history owns

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record; it must be the same in a run that is repeated, so it holds no times."""
        plain = _plain_record(record)
        line = _json_line(plain)
        new = plain.keys() - self._columns
        if self.writes:
            self._append(METRICS, line)
        self.records.append(plain)
        self._columns |= dict.fromkeys(plain)
        self._bytes += len(line)
        self._iteration = max(self._iteration, plain["iteration"])
        if not self.writes:
            return
        if new:
            self._write_table()
        else:
            self._append(METRICS_TABLE, csv_text([plain], list(self._columns), header=False).encode())

    def add_timing(self, record: Mapping[str, Any]) -> None:
        """Append a record of times and rates, which differ from run to run, to ``timing.jsonl``."""
        plain = _plain_record(record)
        self._iteration = max(self._iteration, plain["iteration"])
        if self.writes:
            self._append(TIMING, _json_line(plain))

    def state(self) -> dict[str, int]:
        """Make sure that all records are on disk and say how far they go, for the checkpoint that comes next.

        Returns
        -------
        dict
            ``bytes`` and ``lines`` of ``metrics.jsonl``, and the last ``iteration``.
        """
        if self.writes:
            for name in (METRICS, TIMING):
                if name in self._begun and (self.folder / name).exists():
                    _sync_file(self.folder / name)
            if self._begun:
                sync_folder(self.folder)
        return {"bytes": self._bytes, "lines": len(self.records), "iteration": self._iteration}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go back to where the history was at a `state`: what was written later is dropped, and `records` read again.

        A ``metrics.jsonl`` that does not hold what it did (missing, cut, edited) is not made up for: a warning says
        what is missing, and the history goes on with the whole records up to that iteration.
        """
        path = self.folder / METRICS
        content = path.read_bytes() if path.is_file() else b""
        records = _whole_records(content[: state["bytes"]])
        if len(records) != state["lines"] or sum(len(line) for line, _ in records) != state["bytes"]:
            records = [item for item in _whole_records(content) if item[1]["iteration"] <= state["iteration"]]
            if self.writes:
                logger.warning(
                    "%s: %s since the checkpoint: %d of %d records up to iteration %d are there, and the history goes "
                    "on with these",
                    path,
                    "has become shorter" if len(content) < state["bytes"] else "was changed",
                    *(len(records), state["lines"], state["iteration"]),
                )
        self.records = [record for _, record in records]
        self._columns = dict.fromkeys(key for record in self.records for key in record)
        self._bytes = sum(len(line) for line, _ in records)
        self._iteration = state["iteration"]
        self._begun = {METRICS, TIMING}
        if not self.writes:
            return
        _rewrite(path, content, [line for line, _ in records])
        self._write_table()
        timing = self.folder / TIMING
        content = timing.read_bytes() if timing.is_file() else b""
        kept = [line for line, record in _whole_records(content) if record["iteration"] <= self._iteration]
        _rewrite(timing, content, kept)

    def _append(self, name: str, line: bytes) -> None:
        # The first record of a run finds no file: another run's history is not continued by accident.
        with open(self.folder / name, "ab" if name in self._begun or name == METRICS_TABLE else "xb") as file:
            file.write(line)
        self._begun.add(name)

    def _write_table(self) -> None:
        write_text_atomic(self.folder / METRICS_TABLE, csv_text(self.records, list(self._columns)))


def csv_text(records: Sequence[Mapping[str, Any]], columns: Sequence[str], header: bool = True) -> str:
    """Return records as the rows of a CSV table; a column that a record lacks is empty there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _plain_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them; numbers that are not finite are None."""
    plain = {}
    for key, value in record.items():
        if isinstance(value, Tensor | np.generic):
            value = value.item()
        if value is not None and not isinstance(value, bool | int | float | str):
            raise TypeError(f"{key}: {type(value).__name__} is not a number, text or truth value")
        plain[str(key)] = None if isinstance(value, float) and not math.isfinite(value) else value
    if type(plain.get("iteration")) is not int:
        raise TypeError(f"iteration: a record needs one, an integer; found {plain.get('iteration')!r}")
    return plain


def _json_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _whole_records(content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines that are complete records, each with what it says; torn and foreign ones are left out."""
    records = []
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line.decode()) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):  # no JSON, or no text at all
            continue
        if isinstance(record, dict) and type(record.get("iteration")) is int:
            records.append((line, record))
    return records


def _rewrite(path: Path, content: bytes, lines: Sequence[bytes]) -> None:
    """Write lines in place of the content of a file, if that differs."""
    kept = b"".join(lines)
    if kept != content:
        write_text_atomic(path, kept.decode())


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


# --------------------------------------------------------------------------------------------------
# checkpoints
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint in the folder.

    Attributes
    ----------
    name : str
        Name of the file in the run's folder.
    epoch, iteration : int
        Where the run was.
    score : float or None
        What the best ones are chosen by, low is good; None for one that was kept to resume from.
    """

    name: str
    epoch: int
    iteration: int
    score: float | None = None


class Checkpoints:
    """Which checkpoints are kept: the best ones by a score, and the newest ones to resume from.

    The functions ``write(path)`` that are passed in write a file whole or not at all (as
    `aimnet2mult.models.base.save_checkpoint` does). They are called when `state_dict` counts the new checkpoint in, so
    that a checkpoint knows of itself; those that it pushes out are removed when it is on disk.

    Parameters
    ----------
    folder : Path
        The run's folder.
    prefix : str
        Beginning of the names.
    n_saved : int
        Number of best checkpoints, 1 or more.
    keep_last : int
        Number of newest checkpoints, 1 or more.
    writes : bool
        False for all processes but one: they decide the same, but neither call ``write`` nor look at files.
    score_name : str
        What the score is called in the names of files.

    Attributes
    ----------
    best : list of SavedCheckpoint
        Best one first.
    last : list of SavedCheckpoint
        Newest one last.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str,
        n_saved: int = 3,
        keep_last: int = 2,
        writes: bool = True,
        score_name: str = "loss",
    ) -> None:
        if n_saved < 1:
            raise ConfigError(f"checkpoint.kwargs.n_saved: {n_saved}; keep one checkpoint or more")
        if not re.fullmatch(r"[^./\\][^/\\]*|", prefix):
            raise ConfigError(
                f"checkpoint.filename_prefix: {prefix!r} cannot begin the name of a file; leave out / and ."
            )
        if keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last: {keep_last}; keep one checkpoint or more")
        self.folder, self.prefix, self.writes = Path(folder), prefix, writes
        self.n_saved, self.keep_last = n_saved, keep_last
        self.score_name = re.sub(r"[^\w.+-]+", "_", score_name)
        self.best: list[SavedCheckpoint] = []
        self.last: list[SavedCheckpoint] = []
        self._iteration = 0

    def keep_best(self, score: float, epoch: int, iteration: int, write: Writer) -> Path | None:
        """Write a checkpoint if it is among the best; return its path, or None.

        A score that is not finite is never among the best; of equal scores the earlier one is better.
        """
        score = float(score)
        others = [saved for saved in self.best if saved.iteration != iteration]
        scores = sorted(saved.score for saved in others if saved.score is not None)
        if not math.isfinite(score) or (len(scores) >= self.n_saved and score >= scores[self.n_saved - 1]):
            return None
        text = f"{score:.6f}" if abs(score) < 1e9 else f"{score:.6e}"
        name = f"{self.prefix}_epoch_{epoch:04d}_iter_{iteration:07d}_{self.score_name}_{text}.pt"
        new = SavedCheckpoint(name, epoch, iteration, score)
        best = sorted([*others, new], key=lambda saved: (saved.score, saved.iteration))[: self.n_saved]
        return self._save(new, best, self.last, write)

    def save_last(self, epoch: int, iteration: int, write: Writer) -> Path:
        """Write a checkpoint to resume from, return its path, and keep only the newest ones of that kind."""
        new = SavedCheckpoint(f"{self.prefix}_last_iter_{iteration:09d}.pt", epoch, iteration)
        others = [saved for saved in self.last if saved.iteration != iteration]
        return self._save(new, self.best, [*others, new][-self.keep_last :], write)

    @property
    def best_path(self) -> Path | None:
        """The best checkpoint, if there is one."""
        return self.folder / self.best[0].name if self.best else None

    def _save(
        self, new: SavedCheckpoint, best: list[SavedCheckpoint], last: list[SavedCheckpoint], write: Writer
    ) -> Path:
        before = self.best, self.last, self._iteration
        self.best, self.last, self._iteration = best, last, new.iteration
        path = self.folder / new.name
        if not self.writes:
            return path
        try:
            write(path)
        except BaseException:
            self.best, self.last, self._iteration = before
            raise
        kept = self._names()
        for saved in (*before[0], *before[1]):
            if saved.name not in kept:
                (self.folder / saved.name).unlink(missing_ok=True)
        return path

    def _names(self) -> set[str]:
        return {saved.name for saved in (*self.best, *self.last)}

    def state_dict(self) -> dict[str, Any]:
        """Return which checkpoints there are, by name, for a checkpoint."""
        return {
            "best": [asdict(saved) for saved in self.best],
            "last": [asdict(saved) for saved in self.last],
            "iteration": self._iteration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to the checkpoints that there were, and make the folder agree.

        Checkpoints that are missing are forgotten, with a warning. Those of this prefix that the state does not know
        of (written after it, or about to be removed when the run was killed) are removed: call this when nothing else
        can go wrong.
        """
        self.best = [SavedCheckpoint(**saved) for saved in state["best"]]
        self.last = [SavedCheckpoint(**saved) for saved in state["last"]]
        self._iteration = state["iteration"]
        if not self.writes:
            return
        present = {path.name for path in self.folder.iterdir() if path.is_file()} if self.folder.is_dir() else set()
        missing = sorted(self._names() - present)
        if missing:
            logger.warning("%s: checkpoints that the run knew of are gone: %s", self.folder, ", ".join(missing))
        self.best = [saved for saved in self.best if saved.name in present]
        self.last = [saved for saved in self.last if saved.name in present]
        unknown = sorted(name for name in present - self._names() if _prefix(name) == self.prefix)
        for name in unknown:
            (self.folder / name).unlink(missing_ok=True)
        if unknown:
            logger.info(
                "%s: the run goes on from iteration %d; checkpoints that do not belong to it any more are removed: %s",
                *(self.folder, self._iteration, ", ".join(unknown)),
            )


def _prefix(name: str) -> str | None:
    """Prefix of the name of a checkpoint; None for other files."""
    match = LAST_NAME.fullmatch(name) or BEST_NAME.fullmatch(name)
    return None if match is None else match["prefix"]


# --------------------------------------------------------------------------------------------------
# what to resume from
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resume:
    """A checkpoint from which a training goes on.

    Attributes
    ----------
    path : Path
        The file.
    content : dict
        What it holds (`aimnet2mult.models.base.load_checkpoint`); the state of the training is under ``training``.
    folder : Path
        The run's folder.
    """

    path: Path
    content: dict[str, Any]
    folder: Path


def find_resume(path: str | Path) -> Resume:
    """Find and read the checkpoint to resume from.

    Parameters
    ----------
    path : str or Path
        The folder of a run, whose newest checkpoint is taken, or a checkpoint. In a folder, a file that is damaged or
        no state of a training is named in a warning, and the one before it is tried.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder.
    ValueError
        There is nothing to resume from; the message says what was tried.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give the folder of a run, or one of its checkpoints")
    if not path.is_dir():
        return Resume(path, _read_resumable(path), path.parent)
    candidates = _checkpoints_of(path)
    if not candidates:
        raise CheckpointError(
            f"{path}: holds no checkpoint to resume from (*_last_iter_*.pt); start the run again, with --overwrite"
        )
    problems = []
    for candidate in candidates:
        try:
            return Resume(candidate, _read_resumable(candidate), path)
        except (CheckpointError, OSError) as error:
            problems.append(error_message(error))
            logger.warning("not resumed from the newest checkpoint: %s. Trying the one before it", problems[-1])
    raise CheckpointError(f"{path}: holds no checkpoint that can be resumed from: {'; '.join(problems)}")


def _checkpoints_of(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first; at the same iteration the one that was written to resume from."""
    found = []
    for path in folder.iterdir():
        for newest, pattern in ((True, LAST_NAME), (False, BEST_NAME)):
            match = pattern.fullmatch(path.name)
            if match is not None and path.is_file():
                found.append((int(match["iteration"]), newest, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _read_resumable(path: Path) -> dict[str, Any]:
    _check_sums(path)
    content = load_checkpoint(path)
    if not isinstance(content.get("training"), Mapping):
        raise CheckpointError(
            f"{path}: holds weights but no state of a training: it is a finished model, or from an earlier version. "
            f"Start from its weights with --load {path}"
        )
    return content


def _check_sums(path: Path) -> None:
    """Make sure that a checkpoint is as it was written; torch itself does not look at the check sums."""
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
        # A damaged archive can fail anywhere in its reader: UnicodeDecodeError, NotImplementedError, struct.error ...
        except Exception as error:
            raise CheckpointError(f"{path}: damaged, or not a checkpoint ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the check sum of {damaged} is wrong")


# --------------------------------------------------------------------------------------------------
# the folder
# --------------------------------------------------------------------------------------------------


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

    def stored_data(self) -> dict[str, Any] | None:
        """Return the record of the data of the run that is there (``data.json``); None if it has none.

        Raises
        ------
        ValueError
            The file is there, but is not such a record.
        """
        path = self.path / DATA_RECORD
        if not path.is_file():
            return None
        return _read_json(path, "fidelities", dict)

    # ------------------------------------------------------------------------------------------------

    def _is_same(self, folder: Path) -> bool:
        return folder.exists() and self.path.exists() and os.path.samefile(folder, self.path)

    def _refuse_others(self, overwrite: bool, resume: Path | None) -> None:
        if overwrite and resume is not None:
            raise ConfigError("--overwrite and --resume exclude one another: a run goes on, or it is replaced")
        if not self.path.is_dir() or (resume is not None and self._is_same(resume)):
            return
        marks = [name for name in (RUN_RECORD, METRICS) if (self.path / name).exists()]
        if marks and not overwrite:
            raise ConfigError(
                f"checkpoint.dirname: {self.path} holds another run ({', '.join(marks)}). Continue it with --resume "
                f"{shlex.quote(str(self.path))}, replace it with --overwrite, or choose another run_name or folder"
            )
        # A folder that somebody chose for files of the same names, such as that of train.yaml, is no run to replace.
        foreign = [name for name in OWN_FILES if name != LOG and (self.path / name).exists()]
        foreign += [path.name for path in _checkpoints_of(self.path)]
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
            session = _read_json(self.path / RUN_RECORD, "sessions", list)["sessions"][-1]
            return f" (process {session['process']} on {session['host']} since {session['start']})"
        except (OSError, ValueError, LookupError, TypeError):  # only to help; a run that has just begun has none
            return ""

    def _remove_earlier_run(self) -> None:
        """Remove what an earlier run left. The log is open, and the record of the run is replaced: both stay."""
        for path in _checkpoints_of(self.path):
            path.unlink()
        for name in OWN_FILES:
            if name not in (LOG, RUN_RECORD):
                (self.path / name).unlink(missing_ok=True)
        for folder, pattern in REPORTS.items():
            for path in sorted((self.path / folder).glob(pattern)):
                path.unlink()

    def _add_session(self, processes: int, resume: Resume | None) -> None:
        path = self.path / RUN_RECORD
        sessions: list[Any] = []
        source = None if resume is None else str(resume.path)
        if resume is not None and self._is_same(resume.folder):
            source = resume.path.name
            try:
                sessions = _read_json(path, "sessions", list)["sessions"]
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


REPORTS = {"tensorboard": "events.out.tfevents.*"}
"""Files that others make for a run: pattern by folder in the run's folder."""


def _read_json(path: Path, key: str, kind: type) -> dict[str, Any]:
    """Read a JSON file whose entry ``key`` is of a kind."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), kind):
        raise ValueError(f"{path}: not written by a run: it has no {key}")
    return content


# --------------------------------------------------------------------------------------------------
# where a run comes from
# --------------------------------------------------------------------------------------------------

PACKAGES = ("numpy", "h5py", "pytorch-ignite", "omegaconf", "PyYAML", "wandb", "tensorboard")
"""Packages whose versions are recorded besides those of `aimnet2mult.models.base.versions`."""

GIT_TIMEOUT = 5.0
"""Longest time that a question to git may take, s."""


def provenance() -> dict[str, Any]:
    """Return when, where, by which command and with which software this process runs, in types for JSON.

    Returns
    -------
    dict
        ``start``, ``command``, ``cwd``, ``host``, ``process``, ``platform``, ``threads``, ``gpus``, ``versions``,
        and ``git``: ``commit`` and ``dirty`` of the checkout that the package is in, None if there is no such.
    """
    return {
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "cwd": _working_folder(),
        "host": platform.node(),
        "process": os.getpid(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(_gpus_in_use())],
        "versions": {**versions(), **_package_versions()},
        "git": source_commit(Path(aimnet2mult.__file__).absolute().parents[1]),
    }


def _gpus_in_use() -> int:
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _package_versions() -> dict[str, str]:
    found = {"cuda": torch.version.cuda} if torch.version.cuda is not None else {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_commit(folder: Path) -> dict[str, Any] | None:
    """Return ``commit`` and ``dirty`` (whether tracked files were changed) of a git checkout.

    Only a folder that is the top of a checkout counts: an installed package inside somebody's repository is no part of
    it. None for other folders, and where git is missing, fails or does not answer within `GIT_TIMEOUT`; ``dirty`` alone
    is None where only the comparison does.
    """
    if not (folder / ".git").exists():
        return None
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _ask_git(folder: Path, *question: str) -> str | None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        answer = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *question],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("git %s: %s", " ".join(question), error)
        return None
    return answer.stdout.decode(errors="replace").strip()


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
