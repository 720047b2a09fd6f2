"""Checkpoints of a run: which are kept, and which one a run goes on from when files are damaged."""

import json
import logging
import math
import os
import random
import re

import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import CheckpointError
from aimnet2mult.train import checkpoints as module
from aimnet2mult.train.checkpoints import Checkpoints, find_resume
from aimnet2mult.utils.files import atomic_path


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------
# which are kept
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
    assert checkpoints.best[0].name == "run_epoch_0007_iter_0000070_loss_0.250000.pt"


def test_names_hold_the_monitor_and_any_score(tmp_path):
    checkpoints = Checkpoints(tmp_path, "r", n_saved=3, keep_last=1, score_name="ccsd/F_mae")
    names = [checkpoints.keep_best(score, 1, 1, touch).name for score in (0.0, 0.25, 1.5e-8, -1e250)]
    assert [name.removeprefix("r_epoch_0001_iter_0000001_ccsd_F_mae_") for name in names] == [
        "0.000000.pt",
        "0.250000.pt",
        "1.500000e-08.pt",
        "-1.000000e+250.pt",
    ]
    assert checkpoints.save_last(1, 12_345_678_901, touch).name == "r_last_iter_12345678901.pt"


def test_names_are_never_too_long(tmp_path):
    checkpoints = Checkpoints(tmp_path, "x" * 120, score_name="0.5 ccsd/E_mae + ü" * 20)
    assert checkpoints.keep_best(-1.25e-300, 12_345, 123_456_789, touch).exists()
    assert checkpoints.keep_best(999_999_999.0, 12_345, 123_456_790, touch).exists()


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
        ({"prefix": "ü" * 61}, r"checkpoint.filename_prefix: .* 120 bytes at most"),
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

    monkeypatch.setattr(module, "_check_sums", refuse)  # modes do not stop root
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
