"""A run's folder: what is written survives a kill, a run goes on from it, and another run is refused."""

import csv
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from logging.handlers import MemoryHandler

import numpy as np
import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import CheckpointError
from aimnet2mult.train import run_folder
from aimnet2mult.train.run_folder import (
    Checkpoints,
    History,
    RunFolder,
    changed_data,
    find_resume,
    provenance,
    source_commit,
)
from aimnet2mult.utils.files import atomic_path, write_text_atomic

RECORDS = [
    {"iteration": 0, "epoch": 0, "val/loss": 0.1 + 0.2},
    {"iteration": 5, "epoch": 1, "train/loss": 1e-300, "val/loss": 2.0**-1074},
    {"iteration": 9, "epoch": 1, "train/loss": 1 / 3, "note": 'text, "quoted"'},
    {"iteration": 12, "epoch": 2, "train/loss": 123456789.123456789, "val/loss": -0.0},
]


@pytest.fixture(scope="module")
def processes():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


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


# --------------------------------------------------------------------------------------------------
# history
# --------------------------------------------------------------------------------------------------


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
        run_folder, "write_text_atomic", lambda path, text: (rewritten.append(path.name), write_text_atomic(path, text))
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


# --------------------------------------------------------------------------------------------------
# checkpoints
# --------------------------------------------------------------------------------------------------


def touch(path):
    with atomic_path(path) as temporary:
        temporary.write_text(path.name)


def test_best_checkpoints_are_kept_by_score(tmp_path):
    checkpoints = Checkpoints(tmp_path, "run", n_saved=2, keep_last=2)
    scores = [3.0, math.nan, 1.0, 1.0, 2.0, math.inf, 0.25, 5.0]
    kept = [checkpoints.keep_best(score, i + 1, 10 * (i + 1), touch) is not None for i, score in enumerate(scores)]
    assert kept == [True, False, True, True, False, False, True, False]
    assert [saved.score for saved in checkpoints.best] == [0.25, 1.0]
    assert files(tmp_path) == [
        "run_epoch_0003_iter_0000030_loss_1.000000.pt",
        "run_epoch_0007_iter_0000070_loss_0.250000.pt",
    ]
    assert checkpoints.best_path == tmp_path / "run_epoch_0007_iter_0000070_loss_0.250000.pt"


def test_names_hold_the_monitor_and_any_score(tmp_path):
    checkpoints = Checkpoints(tmp_path, "r", n_saved=3, keep_last=1, score_name="ccsd/F_mae")
    path = checkpoints.keep_best(-1e250, 1, 1, touch)
    assert path.name == "r_epoch_0001_iter_0000001_ccsd_F_mae_-1.000000e+250.pt"
    assert checkpoints.save_last(1, 12_345_678_901, touch).name == "r_last_iter_12345678901.pt"


def test_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, "run", n_saved=1, keep_last=2)
    for i in (5, 10, 15, 15):
        checkpoints.save_last(1, i, touch)
    assert files(tmp_path) == ["run_last_iter_000000010.pt", "run_last_iter_000000015.pt"]


def test_old_checkpoints_go_when_the_new_one_is_there_and_stay_when_it_fails(tmp_path):
    checkpoints = Checkpoints(tmp_path, "run", n_saved=1, keep_last=1)
    checkpoints.save_last(1, 5, touch)
    checkpoints.keep_best(1.0, 1, 5, touch)
    state, before = checkpoints.state_dict(), files(tmp_path)
    seen = []

    def fail(path):
        seen.append((files(tmp_path), checkpoints.state_dict()))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.save_last(1, 10, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoints.keep_best(0.5, 1, 10, fail)
    assert checkpoints.state_dict() == state
    assert files(tmp_path) == before
    assert all(names == before for names, _ in seen)
    assert [saved["iteration"] for saved in seen[0][1]["last"]] == [10]  # a checkpoint knows of itself
    assert [saved["score"] for saved in seen[1][1]["best"]] == [0.5]


def test_other_processes_decide_the_same_without_files(tmp_path):
    pair = [Checkpoints(tmp_path, "run", 2, 1, writes) for writes in (True, False)]
    for i, score in enumerate([3.0, 1.0, 2.0]):
        for checkpoints in pair:
            checkpoints.keep_best(score, i, i, touch if checkpoints.writes else pytest.fail)
            checkpoints.save_last(i, i, touch if checkpoints.writes else pytest.fail)
    assert pair[0].state_dict() == pair[1].state_dict()


def test_restored_checkpoints_agree_with_a_folder_that_was_moved(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoints = Checkpoints(folder, "r", n_saved=2, keep_last=2)
    for i, score in ((1, 3.0), (2, 2.0)):
        checkpoints.keep_best(score, 1, i, touch)
        checkpoints.save_last(1, i, touch)
    state = json.loads(json.dumps(checkpoints.state_dict()))
    early = files(folder)
    for i, score in ((3, 2.5), (4, 9.0)):
        checkpoints.keep_best(score, 1, i, touch)
        checkpoints.save_last(1, i, touch)
    others = ["model.pt", "notes.txt", "other_last_iter_000000009.pt", "r_epoch_1.pt"]
    for name in others:
        (folder / name).touch()
    moved = folder.rename(tmp_path / "elsewhere")

    again = Checkpoints(moved, "r", n_saved=2, keep_last=2)
    with caplog.at_level(logging.INFO, "aimnet2mult"):
        again.load_state_dict(state)
    assert files(moved) == sorted([*others, "r_epoch_0001_iter_0000002_loss_2.000000.pt"])
    forgotten, removed = (record.getMessage() for record in caplog.records)
    assert sorted(re.findall(r"r_\w+?\d(?:\.\d+)?\.pt", forgotten)) == sorted(set(early) - set(files(moved)))
    assert "r_epoch_0001_iter_0000003_loss_2.500000.pt, r_last_iter_000000003.pt, r_last_iter_000000004.pt" in removed
    assert again.state_dict() == {"best": [state["best"][0]], "last": [], "iteration": 2}


def test_fewer_checkpoints_are_kept_after_a_resume_that_asks_for_fewer(tmp_path):
    checkpoints = Checkpoints(tmp_path, "r", n_saved=3, keep_last=3)
    for i in range(3):
        checkpoints.keep_best(float(i), 1, i, touch)
        checkpoints.save_last(1, i, touch)
    again = Checkpoints(tmp_path, "r", n_saved=1, keep_last=1)
    again.load_state_dict(checkpoints.state_dict())
    assert again.keep_best(1.5, 1, 5, touch) is None
    assert again.keep_best(-1.0, 1, 5, touch) is not None
    again.save_last(1, 5, touch)
    assert files(tmp_path) == ["r_epoch_0001_iter_0000005_loss_-1.000000.pt", "r_last_iter_000000005.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": "r", "n_saved": 0}, r"checkpoint.kwargs.n_saved: 0"),
        ({"prefix": "r", "keep_last": 0}, r"checkpoint.keep_last: 0"),
        ({"prefix": "a/b"}, r"checkpoint.filename_prefix: 'a/b'"),
        ({"prefix": ".a"}, r"checkpoint.filename_prefix: '.a'"),
    ],
)
def test_settings_of_checkpoints_that_make_no_sense(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        Checkpoints(tmp_path, **arguments)


# --------------------------------------------------------------------------------------------------
# what to resume from
# --------------------------------------------------------------------------------------------------


def save(path, iteration, **entries):
    content = {"model": {"afv.weight": torch.full((100, 30), float(iteration))}, "training": {"iteration": iteration}}
    with atomic_path(path) as temporary:
        torch.save({**content, **entries}, temporary)
    return path


@pytest.fixture
def run(tmp_path):
    """A folder with four checkpoints to resume from and one that is none."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("r_last_iter_000000010", "r_last_iter_000000020", "r_epoch_0001_iter_0000020_loss_1.000000"):
        save(folder / f"{name}.pt", int(re.search(r"iter_(\d+)", name)[1]))
    save(folder / "r_epoch_0002_iter_0000030_loss_0.500000.pt", 30)
    save(folder / "model.pt", 99)
    (folder / ".r_last_iter_000000040.0badcafe-1-abcdef.pt").write_bytes(b"half")
    return folder


def test_newest_checkpoint_is_found(run, caplog):
    names = []
    for _ in range(4):
        resume = find_resume(run)
        assert resume.folder == run
        assert resume.content["training"]["iteration"] == resume.content["model"]["afv.weight"][0, 0]
        names.append(resume.path.name)
        resume.path.unlink()
    assert names == [
        "r_epoch_0002_iter_0000030_loss_0.500000.pt",
        "r_last_iter_000000020.pt",
        "r_epoch_0001_iter_0000020_loss_1.000000.pt",
        "r_last_iter_000000010.pt",
    ]
    assert caplog.records == []
    with pytest.raises(ValueError, match=r"run: holds no checkpoint to resume from .*--overwrite"):
        find_resume(run)


def test_checkpoint_is_taken_as_named(run, monkeypatch):
    monkeypatch.chdir(run)
    resume = find_resume("r_last_iter_000000010.pt")
    assert (resume.path, resume.folder) == (run / "r_last_iter_000000010.pt", run)
    assert resume.content["training"] == {"iteration": 10}


def fallback(run, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "aimnet2mult"):
        resume = find_resume(run)
    assert len(caplog.records) == 1
    assert "r_epoch_0002_iter_0000030_loss_0.500000.pt" in caplog.records[0].getMessage()
    return resume.path.name


def test_truncated_newest_checkpoint_falls_back_to_the_one_before(run, caplog):
    newest = run / "r_epoch_0002_iter_0000030_loss_0.500000.pt"
    content = newest.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(content), 499), *range(len(content) - 120, len(content), 9)]:
        newest.write_bytes(content[:size])
        assert fallback(run, caplog) == "r_last_iter_000000020.pt"
        with pytest.raises(CheckpointError, match=r"r_epoch_0002_iter_0000030_loss_0.500000.pt: damaged"):
            find_resume(newest)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(run, caplog):
    newest = run / "r_epoch_0002_iter_0000030_loss_0.500000.pt"
    content = newest.read_bytes()
    weights = torch.full((100, 30), 30.0).numpy().tobytes()
    inside = content.index(weights)
    spoiled = bytearray(content)
    spoiled[inside + 5000] ^= 1  # a bit of a weight, which torch.load takes as it is
    generator = random.Random(0)
    for bad in [
        bytes(spoiled),
        content[:inside] + bytes(len(weights)) + content[inside + len(weights) :],
        bytes(len(content)),
        b"\x80\x02" + generator.randbytes(50),
        *(generator.randbytes(generator.randrange(300)) for _ in range(40)),
    ]:
        newest.write_bytes(bad)
        assert fallback(run, caplog) == "r_last_iter_000000020.pt"


def test_any_byte_may_be_wrong(run, caplog):
    newest = run / "r_epoch_0002_iter_0000030_loss_0.500000.pt"
    content, generator = newest.read_bytes(), random.Random(1)
    for _ in range(200):
        spoiled = bytearray(content)
        spoiled[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        newest.write_bytes(spoiled)
        resume = find_resume(run)
        assert torch.equal(
            resume.content["model"]["afv.weight"], torch.full((100, 30), float(resume.content["training"]["iteration"]))
        )


def test_finished_models_and_earlier_checkpoints_are_not_resumed(run, caplog):
    model = run / "model.pt"
    torch.save({"model": {"afv.weight": torch.ones(2, 2)}, "progress": {"epoch": 1}}, model)
    with pytest.raises(CheckpointError, match=r"model.pt: holds weights but no state of a training.*--load .*model.pt"):
        find_resume(model)
    os.replace(model, run / "r_epoch_0002_iter_0000030_loss_0.500000.pt")
    assert fallback(run, caplog) == "r_last_iter_000000020.pt"


def test_unreadable_file_falls_back_to_the_one_before(run, caplog, monkeypatch):
    def refuse(path):
        if "0000030" in path.name:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(run_folder, "_check_sums", refuse)  # modes do not stop root
    assert fallback(run, caplog) == "r_last_iter_000000020.pt"


def test_nothing_usable_lists_what_was_tried(run):
    names = [name for name in files(run) if name.startswith("r_")]
    for name in names:
        (run / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be resumed from") as caught:
        find_resume(run)
    assert all(name in str(caught.value) for name in names)
    with pytest.raises(FileNotFoundError, match=r"missing: no such file or folder; give the folder of a run"):
        find_resume(run / "missing")


# --------------------------------------------------------------------------------------------------
# the folder
# --------------------------------------------------------------------------------------------------

OTHER_FILES = ["my_model.pt", "notes.txt", "report/notes.md", "sub/metrics.jsonl", "wandb/run.wandb"]


def begin(folder, **options):
    files = {name: lambda path: write_text_atomic(path, path.name) for name in ("train.yaml", "data.json", "split.npz")}
    return RunFolder(folder).begin(files, **options)


@pytest.fixture
def finished(tmp_path):
    """The folder of a run, with files that somebody else put there."""
    folder = tmp_path / "runs" / "first"
    with begin(folder, processes=3):
        filled(folder)
        save(folder / "r_last_iter_000000020.pt", 20)
        save(folder / "other_epoch_0001_iter_0000010_loss_1.000000.pt", 10)
    for name in [*OTHER_FILES, "tensorboard/events.out.tfevents.1.host"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def sessions(folder):
    return json.loads((folder / "run.json").read_text())["sessions"]


def test_begin_writes_what_describes_the_run(finished):
    assert (finished / "train.yaml").read_text() == "train.yaml"
    (session,) = sessions(finished)
    assert session["processes"] == 3
    assert session["resumed_from"] is None
    assert session["process"] == os.getpid()


def test_folder_of_another_run_is_refused_with_what_to_do(finished):
    with pytest.raises(
        ConfigError, match=r"first holds another run \(run.json, metrics.jsonl\). Continue it with --resume"
    ):
        RunFolder(finished).check()
    with pytest.raises(ConfigError, match="holds another run"), begin(finished):
        pytest.fail("begun")
    with pytest.raises(ConfigError, match="exclude one another"):
        RunFolder(finished).check(overwrite=True, resume=finished)
    with pytest.raises(ConfigError, match="holds another run"):
        RunFolder(finished).check(resume=finished.parent)
    RunFolder(finished).check(overwrite=True)
    RunFolder(finished).check(resume=finished)
    RunFolder(finished.parent / "second").check(resume=finished)
    assert len(sessions(finished)) == 1


def test_overwrite_removes_what_a_run_left_and_nothing_else(finished):
    with begin(finished, overwrite=True):
        History(finished).add(RECORDS[0])
    own = ["data.json", "metrics.csv", "metrics.jsonl", "run.json", "split.npz", "train.log", "train.yaml"]
    everything = sorted(str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file())
    assert everything == sorted(own + OTHER_FILES)
    assert all((finished / name).read_text() == "mine" for name in OTHER_FILES)
    assert len(sessions(finished)) == 1


@pytest.mark.parametrize("name", ["train.yaml", "model.yaml", "data.json", "r_last_iter_000000001.pt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_somebody_else_are_not_replaced(tmp_path, name, overwrite):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds {name}, but no run that it belongs to"):
        RunFolder(tmp_path).check(overwrite=overwrite)
    with pytest.raises(ConfigError, match="but no run"), begin(tmp_path, overwrite=overwrite):
        pytest.fail("begun")
    assert (tmp_path / name).read_text() == "mine"


def test_resumed_run_continues_log_and_sessions(finished):
    (finished / "train.log").write_text("first session\n")
    stale = finished / f".r_last_iter_000000030.{'0' * 8}-1-abcdef.pt"
    stale.touch()
    os.utime(stale, (0, 0))
    package = logging.getLogger("aimnet2mult.test")
    log = MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    package.addHandler(log)
    try:
        package.warning("before the folder")
        resume = find_resume(finished)
        RunFolder(finished).check(resume=resume.folder)
        with begin(finished, resume=resume, log=log):
            package.warning("a name \udcff that is no text")
            assert "before the folder" in (finished / "train.log").read_text()
        package.warning("after the end")
    finally:
        package.removeHandler(log)
    text = (finished / "train.log").read_text()
    assert text.startswith("first session\n")
    assert "a name \\udcff that is no text" in text
    assert "after the end" not in text
    assert [session["resumed_from"] for session in sessions(finished)] == [None, "r_last_iter_000000020.pt"]
    assert not stale.exists()


def test_run_resumed_in_another_folder_starts_its_own_records(finished, tmp_path):
    with begin(tmp_path / "second", resume=find_resume(finished)):
        pass
    assert [session["resumed_from"] for session in sessions(tmp_path / "second")] == [
        str(finished / "r_last_iter_000000020.pt")
    ]
    assert len(sessions(finished)) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b'{"sessions": 1}', b"\xff", b"[" * 10000])
def test_record_of_the_run_that_was_damaged_is_begun_anew(finished, caplog, content):
    (finished / "run.json").write_bytes(content)
    with begin(finished, resume=find_resume(finished)):
        pass
    assert "run.json" in caplog.text
    assert "the record of earlier sessions is lost" in caplog.text
    assert len(sessions(finished)) == 1


def test_failure_inside_the_run_closes_the_log(finished):
    with pytest.raises(RuntimeError, match="stop"), begin(finished, overwrite=True):
        raise RuntimeError("stop")
    RunFolder(finished).check(overwrite=True)


def hold(folder, connection):
    """Be a run that goes on in a folder."""
    with RunFolder(folder).begin({}, resume=find_resume(folder)):
        connection.send("begun")
        time.sleep(300)


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(processes, finished):
    ours, theirs = processes.Pipe()
    holder = processes.Process(target=hold, args=(finished, theirs))
    holder.start()
    try:
        assert ours.recv() == "begun"
        message = rf"first is in use: a run is going on in it \(process {holder.pid} on .* since 20"
        for options in ({"overwrite": True}, {"resume": finished}):
            with pytest.raises(ConfigError, match=message):
                RunFolder(finished).check(**options)
        with pytest.raises(ConfigError, match=message), begin(finished, overwrite=True):
            pytest.fail("begun")
        assert (finished / "r_last_iter_000000020.pt").exists()
    finally:
        holder.kill()
        holder.join()
    RunFolder(finished).check(overwrite=True)


def test_other_processes_write_nothing(tmp_path):
    with RunFolder(tmp_path / "run", writes=False).begin({"train.yaml": pytest.fail}):
        pass
    assert files(tmp_path) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        RunFolder(tmp_path / "file" / "run").check()
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        RunFolder(tmp_path / "file").check()
    RunFolder(tmp_path / "a" / "b").check()
    assert files(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody may write")
def test_folder_in_which_nobody_may_write():
    with pytest.raises(PermissionError, match="cannot be written"):
        RunFolder("/proc/self/run").check()


def test_stored_data_are_read_or_refused(finished):
    folder = RunFolder(finished)
    with pytest.raises(ValueError, match=r"data.json: not JSON"):
        folder.stored_data()
    (finished / "data.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data.json: not written by a run: it has no fidelities"):
        folder.stored_data()
    (finished / "data.json").write_text('{"fidelities": {}}')
    assert folder.stored_data() == {"fidelities": {}}
    (finished / "data.json").unlink()
    assert folder.stored_data() is None


# --------------------------------------------------------------------------------------------------
# where a run comes from
# --------------------------------------------------------------------------------------------------


def git(folder, *command):
    subprocess.run(
        ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", str(folder), *command],
        check=True,
        capture_output=True,
    )


def test_provenance_is_json_and_names_the_software():
    record = provenance()
    assert json.loads(json.dumps(record)) == record
    assert {"aimnet2mult", "torch", "python", "numpy", "h5py", "pytorch-ignite", "omegaconf"} <= set(record["versions"])
    assert record["versions"]["numpy"] == np.__version__
    assert "pytest" in record["command"]


def test_commit_of_a_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "package").mkdir(parents=True)
    git(tmp_path, "init", "-q", "checkout")
    assert source_commit(checkout) is None  # no commit yet
    (checkout / "package" / "a.py").write_text("a = 1\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first")
    record = source_commit(checkout)
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    (checkout / "package" / "untracked.py").touch()
    assert record["dirty"] is source_commit(checkout)["dirty"] is False
    (checkout / "package" / "a.py").write_text("a = 2\n")
    assert source_commit(checkout) == {"commit": record["commit"], "dirty": True}
    assert source_commit(checkout / "package") is None  # inside somebody's checkout


def test_git_that_is_missing_fails_or_hangs(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    assert source_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert source_commit(tmp_path) is None
    (tmp_path / "git").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setattr(run_folder, "GIT_TIMEOUT", 0.2)
    start = time.monotonic()
    assert source_commit(tmp_path) is None
    assert time.monotonic() - start < 5


def test_provenance_without_a_working_folder(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert provenance()["cwd"] is None


# --------------------------------------------------------------------------------------------------
# the same data
# --------------------------------------------------------------------------------------------------


def print_of(name, sha, molecules=10):
    return {"path": name, "bytes": 1, "molecules": molecules, "sha256": sha}


def data(**fidelities):
    return {"fidelities": {name: {"fidelity": f, **files} for f, (name, files) in enumerate(fidelities.items())}}


STORED = data(
    dft={"files": [print_of("/old/a.h5", "a"), print_of("/old/b.h5", "b")], "val_files": None},
    cc={"files": [print_of("/old/c.h5", "c")], "val_files": [print_of("/old/v.h5", "v")]},
)


def dft(*files):
    return data(dft={"files": list(files), "val_files": None}, cc={**STORED["fidelities"]["cc"]})


@pytest.mark.parametrize(
    ("present", "messages"),
    [
        (STORED, []),
        (dft(print_of("/new/x.h5", "a"), {**print_of("/new/y.h5", "b"), "bytes": 7}), []),
        (
            dft(print_of("a.h5", "a"), print_of("b.h5", "X", 12)),
            [r"data.fidelities.dft.files: b.h5 is not what .* \(/old/b.h5\): 12 molecules instead of 10"],
        ),
        (dft(print_of("a.h5", "X"), print_of("b.h5", "b")), [r"dft.files: a.h5 .* other values, arrays or units"]),
        (dft(print_of("b.h5", "b"), print_of("a.h5", "a")), [r"dft.files: .* another order; in the run .* a.h5, b.h5"]),
        (dft(print_of("a.h5", "a")), [r"data.fidelities.dft.files: 1 files, in the run there were 2"]),
        (
            data(cc=STORED["fidelities"]["cc"], xtb=STORED["fidelities"]["dft"]),
            [r"dft is missing", r"xtb is new", r"cc is fidelity 0, in the run it was fidelity 1"],
        ),
        (
            data(dft=STORED["fidelities"]["dft"], cc={**STORED["fidelities"]["cc"], "val_files": None}),
            [r"cc.val_files: 0 files, in the run there were 1"],
        ),
    ],
)
def test_changed_data_are_named(present, messages):
    present = {"fidelities": {name: {**known} for name, known in present["fidelities"].items()}}
    for f, known in enumerate(present["fidelities"].values()):
        known["fidelity"] = f
    found = changed_data(STORED, present)
    assert len(found) == len(messages)
    for message, expected in zip(found, messages, strict=True):
        assert re.search(expected, message), message


# --------------------------------------------------------------------------------------------------
# runs that are killed
# --------------------------------------------------------------------------------------------------

STEPS = 13


def toy_run(folder, kill_at=None):
    """A run of `STEPS` steps that goes on from what it finds; with ``kill_at`` killed before that use of a file."""
    torch.set_num_threads(1)
    if kill_at is not None:
        kill_before(str(folder), kill_at)
    place = RunFolder(folder)
    history, checkpoints = History(folder), Checkpoints(folder, "r", n_saved=2, keep_last=2)
    resume = find_resume(folder) if any(folder.glob("r_*.pt")) else None
    weights, step = torch.arange(200_000, dtype=torch.float32), 0

    def write(path):
        state = {"step": step, "history": history.state(), "checkpoints": checkpoints.state_dict()}
        with atomic_path(path) as temporary:
            torch.save({"model": {"afv.weight": weights}, "training": state}, temporary)

    record = {"train.yaml": lambda path: write_text_atomic(path, "epochs: 1\n")}
    with place.begin(record, overwrite=resume is None and (folder / "run.json").exists(), resume=resume):
        if resume is not None:
            state = resume.content["training"]
            weights, step = resume.content["model"]["afv.weight"], state["step"]
            history.restore(state["history"])
            checkpoints.load_state_dict(state["checkpoints"])
        while step < STEPS:
            step += 1
            weights = torch.sin(weights + step)
            loss = weights.abs().mean().item()
            history.add({"iteration": step, "train/loss": loss, **({"val/loss": loss} if step % 4 == 0 else {})})
            history.add_timing({"iteration": step, "time": time.time()})
            if step % 4 == 0:
                checkpoints.keep_best(loss, 1, step, write)
            if step % 3 == 0 or step == STEPS:
                checkpoints.save_last(1, step, write)


def kill_before(folder, number):
    """End this process as SIGKILL does, before the file operation of that number in a folder."""
    left = [number]

    def count(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.listdir", "os.scandir")


def in_process(processes, *arguments, kill_after=None):
    """Run `toy_run` in a process of its own; return its exit status."""
    process = processes.Process(target=toy_run, args=arguments)
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode


def outcome(folder):
    """All of a finished toy run that must be the same however often it was killed."""
    contents = {}
    for path in folder.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        contents[path.name] = (content["model"]["afv.weight"].numpy().tobytes(), content["training"])
    names = {path.name for path in folder.iterdir()}
    return contents, names, *((folder / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv"))


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert in_process(processes, folder) == 0
    result = outcome(folder)
    assert len(result[0]) == 4
    return result


def check(folder, uninterrupted, n_sessions):
    assert outcome(folder) == uninterrupted
    timing = [json.loads(line)["iteration"] for line in lines(folder / "timing.jsonl")]
    assert timing == list(range(1, STEPS + 1))
    assert 1 <= len(sessions(folder)) <= n_sessions


def test_run_killed_before_any_file_operation_ends_the_same(processes, uninterrupted, tmp_path):
    kill_at = 2
    while True:
        folder = tmp_path / f"{kill_at}" / "run"
        folder.parent.mkdir()
        if in_process(processes, folder, kill_at) == 0:
            break
        assert in_process(processes, folder) == 0
        check(folder, uninterrupted, 2)
        kill_at += 11  # 1 holds as well, and takes a minute
    assert kill_at > 100


def test_run_killed_again_and_again_ends_the_same(processes, uninterrupted, tmp_path):
    generator, folder, n_killed, status = random.Random(0), tmp_path / "run", 0, None
    while status != 0:
        # Less and less often, so that there is an end even where everything is slow.
        n_killed += 1
        pause = generator.uniform(0.02, 0.15) * 1.1**n_killed
        status = in_process(processes, folder, kill_after=pause)
    assert n_killed > 3
    check(folder, uninterrupted, n_killed)
