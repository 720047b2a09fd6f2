"""The history of a run: what is written is read back bit for bit, and goes on from where a checkpoint was."""

import csv
import json
import logging
import math

import numpy as np
import pytest
import torch

from aimnet2mult.train import history as module
from aimnet2mult.train.history import History
from aimnet2mult.utils.files import write_text_atomic

RECORDS = [
    {"iteration": 0, "epoch": 0, "val/loss": 0.1 + 0.2},
    {"iteration": 5, "epoch": 1, "train/loss": 1e-300, "val/loss": 2.0**-1074},
    {"iteration": 9, "epoch": 1, "train/loss": 1 / 3, "note": 'text, "quoted"'},
    {"iteration": 12, "epoch": 2, "train/loss": 123456789.123456789, "val/loss": -0.0},
]


def lines(path):
    return path.read_text().splitlines()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def filled(folder, records=RECORDS, timings=(0, 5, 8, 12, 14)):
    history = History(folder)
    for record in records:
        history.add(record)
    for iteration in timings:
        history.add_timing({"iteration": iteration, "seconds": 1.5})
    return history


def test_metrics_are_read_back_bit_for_bit(tmp_path):
    history = filled(tmp_path)
    read = [json.loads(line) for line in lines(tmp_path / "metrics.jsonl")]
    assert read == history.records == RECORDS
    assert [list(record) for record in read] == [list(record) for record in RECORDS]
    assert math.copysign(1, read[3]["val/loss"]) == -1
    assert [json.loads(line)["iteration"] for line in lines(tmp_path / "timing.jsonl")] == [0, 5, 8, 12, 14]


def test_scalars_become_plain_and_what_is_not_finite_becomes_null(tmp_path):
    history = History(tmp_path)
    values = {"a": np.float32(0.1), "b": torch.tensor(0.1), "c": np.int64(3), "d": True, "e": None}
    history.add({"iteration": np.int64(1), **values, "x": math.nan, "y": -math.inf, "z": torch.tensor(math.inf)})

    def refuse(text):
        raise AssertionError(text)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    expected = {"iteration": 1, "a": float(np.float32(0.1)), "b": float(np.float32(0.1)), "c": 3, "d": True, "e": None}
    assert record == history.records[0] == {**expected, "x": None, "y": None, "z": None}
    assert lines(tmp_path / "metrics.csv")[1].endswith(",,,")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"loss": 1.0}, "iteration: a record needs one"),
        ({"iteration": 1.0}, "iteration: a record needs one"),
        ({"iteration": 1, "loss": [1.0]}, "loss: list is not a number"),
    ],
)
def test_records_that_are_none_are_refused_before_anything_is_written(tmp_path, record, message):
    with pytest.raises(TypeError, match=message):
        History(tmp_path).add(record)
    assert files(tmp_path) == []


def test_table_holds_the_records_whatever_columns_they_have(tmp_path):
    filled(tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["iteration", "epoch", "val/loss", "train/loss", "note"]
    for row, record in zip(rows, RECORDS, strict=True):
        assert {key: value for key, value in row.items() if value} == {key: str(v) for key, v in record.items()}


def test_table_is_appended_to_while_its_columns_stay(tmp_path, monkeypatch):
    rewritten = []
    monkeypatch.setattr(
        module, "write_text_atomic", lambda path, text: (rewritten.append(path.name), write_text_atomic(path, text))
    )
    history = History(tmp_path)
    for i in range(50):
        history.add({"iteration": i, "loss": i / 3, **({"val/loss": 1.0} if i >= 20 and i % 10 == 0 else {})})
    assert rewritten == ["metrics.csv"] * 2
    assert len(lines(tmp_path / "metrics.csv")) == 51


def test_another_history_is_not_continued_by_accident(tmp_path):
    filled(tmp_path)
    with pytest.raises(FileExistsError):
        History(tmp_path).add(RECORDS[0])


def test_other_processes_keep_the_records_and_write_nothing(tmp_path):
    history = History(tmp_path, writes=False)
    writing = tmp_path / "rank0"
    writing.mkdir()
    for record in RECORDS:
        history.add(record)
    history.add_timing({"iteration": 3})
    assert history.records == RECORDS
    assert files(tmp_path) == ["rank0"]
    assert history.state() == filled(writing, timings=()).state()


def restored(folder, state, caplog):
    caplog.clear()
    history = History(folder)
    with caplog.at_level(logging.WARNING, "aimnet2mult"):
        history.restore(state)
    return history, [record.getMessage() for record in caplog.records]


def test_what_came_after_the_state_is_dropped_and_written_again(tmp_path, caplog):
    history = filled(tmp_path, RECORDS[:2], timings=(0, 5))
    state = history.state()
    assert state == {"bytes": (tmp_path / "metrics.jsonl").stat().st_size, "lines": 2, "iteration": 5}
    table = (tmp_path / "metrics.csv").read_text()
    for record in RECORDS[2:]:
        history.add(record)
    history.add_timing({"iteration": 8})
    whole = [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")]

    history, warnings = restored(tmp_path, state, caplog)
    assert warnings == []
    assert history.records == RECORDS[:2]
    assert (tmp_path / "metrics.csv").read_text() == table
    assert [json.loads(line)["iteration"] for line in lines(tmp_path / "timing.jsonl")] == [0, 5]
    assert history.state() == state
    for record in RECORDS[2:]:
        history.add(record)
    history.add_timing({"iteration": 8})
    assert [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")] == whole
    assert len(lines(tmp_path / "timing.jsonl")) == 3


def test_state_of_a_history_without_records(tmp_path, caplog):
    state = History(tmp_path).state()
    assert state == {"bytes": 0, "lines": 0, "iteration": 0}
    filled(tmp_path)
    history, warnings = restored(tmp_path, state, caplog)
    assert warnings == []
    assert history.records == []
    history.add(RECORDS[0])
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_restore_from_a_file_cut_anywhere(tmp_path, caplog):
    state = filled(tmp_path, RECORDS[:3]).state()
    path = tmp_path / "metrics.jsonl"
    later = b'{"iteration": 17, "epoch": 3}\n{"iteration": 18, "epo'
    content = path.read_bytes() + later
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in sorted({*range(0, len(content), 7), *ends, *(end - 1 for end in ends), len(content)}):
        path.write_bytes(content[:size])
        history, warnings = restored(tmp_path, state, caplog)
        whole = min(sum(end <= size for end in ends), 3)
        assert history.records == RECORDS[:whole]
        assert path.read_bytes() == content[: ends[whole - 1] if whole else 0]
        if size >= state["bytes"]:
            assert warnings == []
        else:
            assert len(warnings) == 1
            assert f"has become shorter since the checkpoint: {whole} of 3 records up to iteration 14" in warnings[0]


def test_restore_without_the_file_and_with_one_that_was_edited(tmp_path, caplog):
    state = filled(tmp_path, RECORDS[:3]).state()
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.unlink()
    history, warnings = restored(tmp_path, state, caplog)
    assert history.records == []
    assert "has become shorter since the checkpoint: 0 of 3" in warnings[0]
    assert (tmp_path / "metrics.csv").read_text().strip() == ""
    history.add(RECORDS[0])
    assert history.records == [json.loads(line) for line in lines(path)] == RECORDS[:1]

    path.write_bytes(b"\xff\x00garbage\n[1]\nnull\n" + content + b'{"iteration": 99}\n')
    history, warnings = restored(tmp_path, state, caplog)
    assert history.records == RECORDS[:3]
    assert path.read_bytes() == content
    assert "was changed since the checkpoint: 3 of 3" in warnings[0]
