"""The checkpoints of a run: which are kept, and which one a run goes on from."""

import logging
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import CheckpointError, load_checkpoint
from aimnet2mult.utils.cli import error_message
from aimnet2mult.utils.run_files import BEST_NAME, LAST_NAME

logger = logging.getLogger(__name__)

Writer = Callable[[Path], None]
"""Writes a file whole or not at all, under the name that it is given."""

LONGEST_PREFIX, LONGEST_SCORE_NAME = 120, 50
"""Bytes of these parts of a name; file systems allow 255 in all."""


# --------------------------------------------------------------------------------------------------
# which are kept
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
    score_name : str or None
        What the score is called in the names of files; None: it is no error, and they do not tell it.

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
        score_name: str | None = "loss",
    ) -> None:
        if n_saved < 1:
            raise ConfigError(f"checkpoint.kwargs.n_saved: {n_saved}; keep one checkpoint or more")
        if keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last: {keep_last}; keep one checkpoint or more")
        if not re.fullmatch(r"[^./\\][^/\\]*|", prefix) or len(prefix.encode()) > LONGEST_PREFIX:
            raise ConfigError(
                f"checkpoint.filename_prefix: {prefix!r} cannot begin the name of a file: no / in it, no . in front, "
                f"{LONGEST_PREFIX} bytes at most"
            )
        self.folder, self.prefix, self.writes = Path(folder), prefix, writes
        self.n_saved, self.keep_last = n_saved, keep_last
        self.score_name = score_name and re.sub(r"[^A-Za-z0-9.+-]+", "_", score_name)[:LONGEST_SCORE_NAME]
        self.best: list[SavedCheckpoint] = []
        self.last: list[SavedCheckpoint] = []
        self._iteration = 0

    def keep_best(self, score: float, epoch: int, iteration: int, write: Writer) -> Path | None:
        """Write a checkpoint if it is among the best; return its path, or None.

        A score that is not finite is never among the best; of equal scores the earlier one is better.
        """
        score = float(score)
        others = [saved for saved in self.best if saved.iteration != iteration]
        text = f"{score:.6f}" if 1e-3 <= abs(score) < 1e9 or score == 0 else f"{score:.6e}"
        score_text = f"_{self.score_name}_{text}" if self.score_name else ""
        name = f"{self.prefix}_epoch_{epoch:04d}_iter_{iteration:07d}{score_text}.pt"
        new = SavedCheckpoint(name, epoch, iteration, score)
        best = sorted([*others, new], key=lambda saved: (saved.score, saved.iteration))[: self.n_saved]
        if not math.isfinite(score) or new not in best:
            return None
        return self._save(new, best, self.last, write)

    def save_last(self, epoch: int, iteration: int, write: Writer) -> Path:
        """Write a checkpoint to resume from, return its path, and keep only the newest ones of that kind."""
        new = SavedCheckpoint(f"{self.prefix}_last_iter_{iteration:09d}.pt", epoch, iteration)
        others = [saved for saved in self.last if saved.iteration != iteration]
        return self._save(new, self.best, [*others, new][-self.keep_last :], write)

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
        unknown = {}
        for name in sorted(present - self._names()):
            match = LAST_NAME.fullmatch(name) or BEST_NAME.fullmatch(name)
            if match is not None and match["prefix"] == self.prefix:
                unknown[name] = int(match["iteration"])
                (self.folder / name).unlink(missing_ok=True)
        if unknown:
            logger.log(
                logging.WARNING if max(unknown.values()) > self._iteration else logging.INFO,
                "%s: the run goes on from iteration %d; checkpoints that do not belong to it any more are removed: %s",
                *(self.folder, self._iteration, ", ".join(unknown)),
            )


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
    candidates = checkpoints_of(path)
    if not candidates:
        raise CheckpointError(
            f"{path}: holds no checkpoint to resume from (*_last_iter_*.pt). Give the folder of a run; one that was "
            "stopped before its first checkpoint is started again, with --overwrite"
        )
    problems = []
    for candidate in candidates:
        try:
            return Resume(candidate, _read_resumable(candidate), path)
        except (CheckpointError, OSError) as error:
            problems.append(error_message(error))
            logger.warning("not resumed from the newest checkpoint: %s. Trying the one before it", problems[-1])
    raise CheckpointError(f"{path}: holds no checkpoint that can be resumed from: {'; '.join(problems)}")


def checkpoints_of(folder: Path) -> list[Path]:
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
