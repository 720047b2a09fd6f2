"""The history of a run on disk: ``metrics.jsonl``, the same as a table, and times.

Each checkpoint knows how far the history had come (`History.state`), so that `History.restore` drops what was written
later and a run that goes on from there writes it again.
"""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aimnet2mult.utils.files import sync_folder, write_text_atomic
from aimnet2mult.utils.run_files import METRICS, METRICS_TABLE, TIMING

logger = logging.getLogger(__name__)


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
