"""A run that is killed and goes on ends as one that was not: in every bit of weights, state and metrics."""

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import load_checkpoint
from aimnet2mult.train import engine, loop, run_folder
from aimnet2mult.train.configuration import load_config
from aimnet2mult.train.resume import AUTO, check_settings, read_job
from aimnet2mult.train.runner import run_training
from aimnet2mult.train.schema import to_dict

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = FIXTURES / "ref_single_model.yaml"

EVERYTHING = (
    # Two levels with all that has a state: averages, adaptive loss, warm-up and plateau, accumulation, early stopping.
    "trainer.epochs=4",
    "trainer.accumulate=2",
    "trainer.early_stopping.patience=9",
    "loss.class=aimnet2mult.train.loss.MTAdaWLoss",
    "scheduler.warmup.iterations=7",
    "scheduler.kwargs.patience=1",
    "checkpoint.every_iterations=3",
    "log_frequency.train=2",
    "log_frequency.val=5",
)


@pytest.fixture(scope="module")
def common(tiny_fidelities):
    """Settings of a small run."""
    settings = ["device=cpu", "run_name=r", "optimizer.kwargs.lr=5e-3", "data.samplers.train.kwargs.batch_size=256"]
    settings += ["report=false"]  # takes longer than the training
    return [*settings, *tiny_fidelities(dft=0, gfn2=1)]


# --------------------------------------------------------------------------------------------------
# killing
# --------------------------------------------------------------------------------------------------


def die_at(event, count):
    """End this process by SIGKILL at the ``count``-th event of a kind."""
    seen = 0

    def now():
        nonlocal seen
        seen += 1
        return seen == count

    def after(owner, name, condition=lambda *arguments: True):
        original = getattr(owner, name)

        def followed(*arguments, **options):
            result = original(*arguments, **options)
            if condition(*arguments) and now():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, followed)

    if event == "step":
        after(loop.Training, "train_on")
    elif event == "validation":  # between two of its batches
        after(engine, "predict", lambda model, *_: not model.training)
    elif event == "line":
        after(run_folder.History, "add")
    elif event == "checkpoint":
        after(run_folder.Checkpoints, "_save")
    elif event == "writing":
        save = torch.save

        def half(content, path):
            save(content, path)
            if now():
                os.truncate(path, Path(path).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half


def session(arguments, resume, event, count):
    """One life of a run, in a process of its own."""
    torch.set_num_threads(1)
    die_at(event, count)
    try:
        run_training(read_job(None, MODEL if resume in (None, AUTO) else None, arguments, resume))
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def live(arguments, resume=None, event=None, count=0):
    """Run a session; return the exit status, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aimnet2mult.train.runner"])
    process = context.Process(target=session, args=(list(arguments), resume, event, count))
    process.start()
    process.join(120)
    return process.exitcode


def contents_differ(a, b, where=""):
    """Yield places where two checkpoints differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from contents_differ(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from contents_differ(x, y, f"{where}.{i}")
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b):
        yield where


@pytest.fixture(scope="module")
def whole(common, tmp_path_factory):
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert live([*common, *EVERYTHING, f"checkpoint.dirname={folder}"]) == 0
    return folder


def assert_same(folder, whole):
    """Compare metrics and checkpoints, all but those of the way there to go on from.

    A run that goes on from the best checkpoint of an iteration does not write another one of that iteration.
    """
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    *_, last = sorted(whole.glob("*_last_*.pt"))
    names = {last.name, *(path.name for path in whole.glob("*.pt") if "_last_" not in path.name)}
    assert names <= {path.name for path in folder.glob("*.pt")}
    assert len(list(folder.glob("*.pt"))) == len(list(whole.glob("*.pt")))
    for name in names:
        differences = set(contents_differ(load_checkpoint(folder / name), load_checkpoint(whole / name)))
        # What the loggers show holds times.
        others = (".training.recorder.loggers.", ".training.checkpoints.last.")
        differences = {place for place in differences if not place.startswith(others)}
        assert differences <= {".train_config.checkpoint.dirname"}, name


KILLS = [("step", 5), ("validation", 9), ("writing", 6), ("line", 3), ("checkpoint", 1)]


def test_killed_five_times_and_still_the_same(common, whole, tmp_path):
    folder = tmp_path / "run"
    arguments = [*common, *EVERYTHING, f"checkpoint.dirname={folder}"]
    for life, (event, count) in enumerate(KILLS):
        assert live(arguments, folder if life else None, event, count) == -signal.SIGKILL, (event, count)
    assert live([], folder) == 0
    assert_same(folder, whole)
    sessions = json.loads((folder / "run.json").read_text())["sessions"]
    assert len(sessions) == len(KILLS) + 1
    assert not list(folder.glob(".*")), "temporary files of killed processes are removed"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_and_still_the_same(common, whole, tmp_path, seed):
    choose = random.Random(seed)
    folder = tmp_path / "run"
    arguments = [*common, *EVERYTHING, f"checkpoint.dirname={folder}"]
    ended = None
    for _ in range(8):
        event = choose.choice(["step", "validation", "writing", "line", "checkpoint"])
        ended = live(arguments, AUTO, event, choose.randint(1, 9))
        assert ended in (0, -signal.SIGKILL)
    if ended != 0:
        assert live([], folder) == 0
    assert_same(folder, whole)


def test_stopped_by_a_signal_in_a_validation_it_goes_on_with_that_validation(common, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(torch, "save", torch.save)
    calls = []

    def predict(model, *arguments, **options):
        if not model.training:
            calls.append(1)
            if len(calls) == 13:  # the second batch of the validation at iteration 10
                os.kill(os.getpid(), signal.SIGTERM)
        return original(model, *arguments, **options)

    original = engine.predict
    monkeypatch.setattr(engine, "predict", predict)
    result = run_training(read_job(None, MODEL, [*common, *EVERYTHING, f"checkpoint.dirname={folder}"]))
    assert result.end == (False, "SIGTERM")
    newest = run_folder.find_resume(folder)
    assert newest.content["training"]["position"]["unfinished"]
    monkeypatch.setattr(engine, "predict", original)
    assert run_training(read_job(resume=folder)).end.finished
    assert_same(folder, whole)


# --------------------------------------------------------------------------------------------------
# going on
# --------------------------------------------------------------------------------------------------


def test_more_epochs_after_the_end_are_those_of_a_longer_run(common, tmp_path):
    short = ["trainer.epochs=2", "scheduler=null", "log_frequency.train=2"]
    folder, longer = tmp_path / "run", tmp_path / "longer"
    run_training(read_job(None, MODEL, [*common, *short, f"checkpoint.dirname={folder}"]))
    again = run_training(read_job(resume=folder))
    assert again.end == (True, "2 epochs are complete")
    result = run_training(read_job(resume=folder, overrides=["trainer.epochs=3"]))
    assert result.end == (True, "3 epochs are complete")
    run_training(read_job(None, MODEL, [*common, *short, "trainer.epochs=3", f"checkpoint.dirname={longer}"]))
    assert (folder / "metrics.jsonl").read_bytes() == (longer / "metrics.jsonl").read_bytes()
    a, b = load_checkpoint(folder / "model.pt")["model"], load_checkpoint(longer / "model.pt")["model"]
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(common, tmp_path_factory):
    """A short run that is at its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_training(read_job(None, MODEL, [*common, "trainer.epochs=1", f"checkpoint.dirname={folder}"]))
    return folder


def test_a_moved_folder_goes_on_where_it_is(finished, tmp_path):
    moved = tmp_path / "elsewhere"
    finished.rename(moved)
    try:
        result = run_training(read_job(resume=moved, overrides=["trainer.epochs=2"]))
        assert result.folder == moved
        assert not finished.exists()
    finally:
        moved.rename(finished)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.kwargs.lr=1e-3", r"optimizer\.kwargs\.lr: 0\.005 when the run began, 0\.001 now"),
        ("seed=5", r"seed: 0 when the run began, 5 now"),
        ("trainer.ema=null", r"trainer\.ema: .* when the run began, None now"),
        ("data.fidelities.dft.weight=2", r"data\.fidelities\.dft\.weight: 1\.0 when the run began, 2\.0 now"),
        ("data.samplers.train.kwargs.batch_size=64", r"batch_size: 256 when the run began, 64 now"),
    ],
)
def test_settings_that_a_run_depends_on_stay(finished, override, message):
    with pytest.raises(ConfigError, match=message + r"(.|\n)*--load"):
        read_job(resume=finished, overrides=[override])


def test_settings_that_came_later_were_what_the_packaged_ones_say(finished):
    config = load_config(finished / "train.yaml", [])
    before = to_dict(config)
    del before["sharing"], before["trainer"]["gradient_report"]
    assert check_settings(before, config) == []
    config.sharing.embedding = "shared"
    with pytest.raises(ConfigError, match=r"sharing\.embedding: own when the run began, shared now"):
        check_settings(before, config)


def test_another_model_is_refused(finished, tmp_path):
    (tmp_path / "model.yaml").write_text(re.sub(r"ncomb_v: \d+", "ncomb_v: 3", MODEL.read_text()))
    with pytest.raises(ConfigError, match=r"--model: .* is not the model of the run"):
        read_job(resume=finished, model=tmp_path / "model.yaml")


def test_data_that_changed_are_refused(common, finished, tmp_path):
    other = FIXTURES / "tiny_fid2.h5"
    job = read_job(resume=finished, overrides=[f"data.fidelities.gfn2.files={other}"])
    with pytest.raises(ConfigError, match=r"data\.fidelities\.gfn2\.files(.|\n)*--load"):
        run_training(job)
    sae = next(entry.partition("=")[2] for entry in common if "dft.sae" in entry)
    (tmp_path / "sae.yaml").write_text(re.sub(r"(?m)^1: .*$", "1: -13.0", Path(sae).read_text()))
    job = read_job(resume=finished, overrides=[f"data.fidelities.dft.sae={tmp_path / 'sae.yaml'}"])
    with pytest.raises(ConfigError, match=r"self-atomic energies(.|\n)*--load"):
        run_training(job)


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("run_name=other", r"run_name: .* keeps its own, r; remove run_name"),
        ("checkpoint.dirname=other", r"checkpoint\.dirname: .* keeps its own, .*run; remove checkpoint\.dirname"),
        ("checkpoint.filename_prefix=other", r"checkpoint\.filename_prefix: .* keeps its own, r; remove"),
    ],
)
def test_a_run_keeps_its_names_and_its_place(finished, override, kept):
    with pytest.raises(ConfigError, match=kept):
        read_job(resume=finished, overrides=[override])
    job = read_job(resume=finished, overrides=["run_name=r", f"checkpoint.dirname={finished}"])
    assert job.config.checkpoint.dirname == finished


def test_a_checkpoint_apart_from_its_run_is_left_alone(finished, tmp_path):
    """Going on there would take the folder for that of a run, and remove other checkpoints in it."""
    for path in finished.glob("r_last_iter_*.pt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"lies in no folder of a run \(run\.json and metrics\.jsonl are missing\)"):
        read_job(resume=before[0])
    assert sorted(tmp_path.iterdir()) == before


def test_auto_needs_a_name(common, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nameless = [setting for setting in common if not setting.startswith("run_name")]
    with pytest.raises(ConfigError, match="--resume auto: finds its run by run_name"):
        read_job(None, MODEL, nameless, AUTO)
    assert read_job(None, MODEL, [*nameless, "checkpoint.dirname=here"], AUTO).resume is None


def test_a_saved_model_is_no_run(finished):
    with pytest.raises(ValueError, match=r"model\.pt.*--load"):
        read_job(resume=finished / "model.pt")
