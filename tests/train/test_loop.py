"""The loop in cases that go wrong, stop early, or go on: numbers that are not finite, signals, clocks, patience."""

import itertools
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine

from aimnet2mult.models.base import load_checkpoint
from aimnet2mult.train import loop
from aimnet2mult.train.loop import NotFiniteError, StoppedError, Training, evaluate
from aimnet2mult.train.resume import read_job
from aimnet2mult.train.run_folder import Checkpoints
from aimnet2mult.train.runner import run_training
from aimnet2mult.train.stop import StopRequest

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = FIXTURES / "ref_single_model.yaml"
EPOCHS, STEPS_PER_EPOCH = 2, 8


@pytest.fixture(scope="module")
def common(tiny_fidelities):
    """Settings of a small run."""
    settings = ["device=cpu", "run_name=r", "report=false", "optimizer.kwargs.lr=5e-3", "scheduler=null"]
    settings += [f"trainer.epochs={EPOCHS}", "log_frequency.train=1", "data.samplers.train.kwargs.batch_size=256"]
    return [*settings, *tiny_fidelities(dft=0, gfn2=1)]


def train(common, folder, *overrides):
    return run_training(read_job(None, MODEL, [*common, f"checkpoint.dirname={folder}", *overrides]))


def go_on(folder, *overrides):
    return run_training(read_job(resume=folder, overrides=overrides))


@pytest.fixture(scope="module")
def plain(common, tmp_path_factory):
    """A run in which nothing happens."""
    return train(common, tmp_path_factory.mktemp("plain") / "run")


def history(result):
    return (result.folder / "metrics.jsonl").read_bytes()


def lowest(result, name):
    return min(record[name] for record in result.records if name in record)


# --------------------------------------------------------------------------------------------------
# numbers that are not finite
# --------------------------------------------------------------------------------------------------


def plant_nan(monkeypatch, *iterations):
    """Make a label NaN in the batches of some steps, counted from 1."""
    original = Training.next_batches

    def next_batches(self, batches):
        group = original(self, batches)
        if group and self.position.iteration + 1 in iterations:
            group[0][1]["energy"][0] = torch.nan
        return group

    monkeypatch.setattr(Training, "next_batches", next_batches)


ENERGIES = (
    # Quick steps that learn much.
    "data.y=[energy]",
    *(f"loss.kwargs.components.{name}=null" for name in ("forces", "charges", "spin_charges")),
    "optimizer.class=torch.optim.Adam",
    "data.samplers.train.kwargs.batch_size=128",
    "trainer.epochs=12",
)


def test_steps_with_nan_are_left_out_and_the_training_gets_as_far(common, tmp_path, monkeypatch):
    whole = train(common, tmp_path / "whole", *ENERGIES)
    plant_nan(monkeypatch, 1, 50, 51)
    result = train(common, tmp_path / "run", *ENERGIES)
    log = (result.folder / "train.log").read_text()
    for count, iteration in ((1, 1), (2, 50), (3, 51)):
        assert f"not finite, the step is skipped ({count} so far): iteration {iteration} (epoch" in log
    steps = {record["iteration"]: record for record in result.records if not any(k.startswith("val/") for k in record)}
    assert [steps[i]["train/skipped"] for i in (1, 49, 50, 51, len(steps))] == [1, 1, 2, 3, 3]
    assert "train/loss" not in steps[50]  # no mean is spoilt by it
    assert not any("train/skipped" in record for record in whole.records)
    before, after = whole.records[0]["val/E_rmse"], lowest(whole, "val/E_rmse")
    assert after < 0.8 * before
    assert lowest(result, "val/E_rmse") == pytest.approx(after, rel=0.05)


def test_too_many_steps_without_effect_end_the_run_where_it_can_go_on(common, tmp_path, monkeypatch):
    bad = range(6, 11)
    plant_nan(monkeypatch, *bad)
    folder = tmp_path / "run"
    with pytest.raises(NotFiniteError, match=r"trainer\.max_skipped: .* in 3 steps in a row; the last was iteration 8"):
        train(common, folder, "trainer.max_skipped=2", "checkpoint.every_iterations=5")
    good, stopped = (load_checkpoint(folder / f"r_last_iter_{i:09d}.pt") for i in (5, 8))
    assert all(torch.equal(good["model"][key], weight) for key, weight in stopped["model"].items())
    assert "ERROR the run ends: trainer.max_skipped" in (folder / "train.log").read_text()
    with pytest.raises(NotFiniteError, match=r"in 4 steps in a row; the last was iteration 9"):
        go_on(folder)
    result = go_on(folder, "trainer.max_skipped=9")
    assert result.end.finished
    whole = train(common, tmp_path / "whole", "trainer.max_skipped=9")
    assert history(result) == history(whole)


# --------------------------------------------------------------------------------------------------
# stopped, and going on
# --------------------------------------------------------------------------------------------------


def stop_after(monkeypatch, iteration):
    """Send SIGTERM to the run after a step."""
    original = Training.train_on

    def train_on(self, batches):
        original(self, batches)
        if self.position.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "train_on", train_on)


READERS = ["data.loaders.train.num_workers=2", "data.loaders.val.num_workers=2"]


@pytest.mark.parametrize("persistent", ["true", "false"])
def test_readers_who_are_ahead_lose_nothing(common, plain, tmp_path, monkeypatch, persistent):
    stop_after(monkeypatch, STEPS_PER_EPOCH + 3)  # in an epoch that the readers have begun before
    readers = [*READERS, f"data.loaders.train.persistent_workers={persistent}"]
    stopped = train(common, tmp_path / "run", *readers)
    assert stopped.end == (False, "SIGTERM")
    assert history(go_on(tmp_path / "run")) == history(plain)


def test_double_precision_without_average_goes_on(common, tmp_path, monkeypatch):
    options = ["trainer.precision=float64", "trainer.ema=null", "log_frequency.val=3"]
    options += ["loss.class=aimnet2mult.train.loss.MTAdaWLoss", "trainer.accumulate=3"]
    whole = train(common, tmp_path / "whole", *options)
    stop_after(monkeypatch, 4)
    assert not train(common, tmp_path / "run", *options).end.finished
    result = go_on(tmp_path / "run")
    assert history(result) == history(whole)
    weights, others = (load_checkpoint(r.path)["model"] for r in (result, whole))
    assert all(torch.equal(weights[key], others[key]) for key in others)
    assert weights["afv.weight"].dtype == torch.float64


def test_no_improvement_ends_the_run_and_more_patience_goes_on(common, tmp_path):
    impatient = ["trainer.epochs=9", "trainer.early_stopping.patience=2", "trainer.early_stopping.min_delta=1000"]
    result = train(common, tmp_path / "run", *impatient)
    assert result.end == (True, "no improvement of loss in 2 validations")
    assert result.records[-1]["epoch"] == 3
    again = go_on(tmp_path / "run")
    assert (again.end, again.records) == (result.end, result.records)
    longer = go_on(tmp_path / "run", "trainer.early_stopping.patience=3")
    assert longer.end == (True, "no improvement of loss in 3 validations")
    assert longer.records[-1]["epoch"] == 4


def test_checkpoints_by_the_clock(common, tmp_path, monkeypatch):
    minutes, saved = itertools.count(), []
    real = loop.time.monotonic
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: real() + 60.0 * next(minutes)))
    save = Checkpoints.save_last

    def save_last(self, epoch, iteration, write):
        saved.append(iteration)
        return save(self, epoch, iteration, write)

    monkeypatch.setattr(Checkpoints, "save_last", save_last)
    # The clock goes on by a minute whenever it is read: once after a step, once more for a checkpoint.
    train(common, tmp_path / "run", "checkpoint.every_minutes=2.5", "trainer.epochs=1")
    assert saved == [0, 3, 6, STEPS_PER_EPOCH]


def evaluate_unevenly(rank: int, folder: str) -> None:
    """Evaluate 5 batches in the first process and 3 in the second, with a request to stop somewhere."""
    torch.set_num_threads(1)
    outcomes = []
    for asked, batch in ((1, 2), (0, 5), (None, 0)):
        stop = StopRequest()

        def look(engine, data, asked=asked, batch=batch, stop=stop):
            if rank == asked and engine.state.iteration == batch:
                stop.requested = "SIGTERM"
            engine.state.metrics["loss"] = 1.0

        try:
            outcomes.append(evaluate(Engine(look), [0] * (5 if rank == 0 else 3), stop))
        except StoppedError:
            outcomes.append("stopped")
    torch.save(outcomes, f"{folder}/{rank}.pt")


def test_a_validation_of_uneven_numbers_of_batches_is_left_by_all_or_by_none(tmp_path):
    idist.spawn("gloo", evaluate_unevenly, args=(str(tmp_path),), nproc_per_node=2)
    for rank in range(2):
        # A request that comes when one process is at its end is met after the validation.
        assert torch.load(tmp_path / f"{rank}.pt") == ["stopped", {"loss": 1.0}, {"loss": 1.0}]


# --------------------------------------------------------------------------------------------------
# what is drawn
# --------------------------------------------------------------------------------------------------


def test_a_fidelity_of_weight_zero_is_validated_and_not_learned(common, tmp_path):
    result = train(common, tmp_path / "run", "data.fidelities.gfn2.weight=0", "trainer.epochs=1")
    assert {"val/dft/E_mae", "val/gfn2/E_mae"} <= set(result.records[-1])
    before, after = (load_checkpoint(path)["model"] for path in sorted(result.folder.glob("r_last_iter_*.pt")))
    moved = {f: not torch.equal(before[key], after[key]) for f, key in enumerate(shift_keys(before))}
    assert moved == {0: True, 1: False}


def shift_keys(weights):
    return [f"fidelity_readouts.{f}.atomic_shift.shifts.weight" for f in range(2)]
