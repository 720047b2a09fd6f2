"""The rehearsal of a run: it finds what the run would find, and leaves nothing."""

import logging
from pathlib import Path

import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train import loop, runner
from aimnet2mult.train.dry_run import rehearse
from aimnet2mult.train.resume import read_job
from aimnet2mult.train.runner import run_training

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = FIXTURES / "ref_single_model.yaml"


@pytest.fixture
def settings(tiny_fidelities, tmp_path):
    """Settings of a run of 3 epochs with 7 steps each; dft has forces, pm7 has none."""
    options = ["device=cpu", "run_name=r", "report=false", "trainer.epochs=3"]
    options += ["data.samplers.train.kwargs.batch_size=512", f"checkpoint.dirname={tmp_path / 'run'}"]
    return [*options, *tiny_fidelities(dft=0, pm7=2)]


def rehearsal(settings, *more, **options):
    return rehearse(read_job(None, MODEL, [*settings, *more]), **options)


def test_estimates_of_a_new_run(settings, tmp_path):
    before = sorted(tmp_path.iterdir())
    training, validation, memory, total = rehearsal(settings).splitlines()
    assert training.startswith("training: 21 steps in 3 epochs at ")
    assert validation.startswith("validation: 3 times ")
    assert memory.startswith("memory of a process: peak GiB ")
    assert total.startswith("in all: ")
    assert sorted(tmp_path.iterdir()) == before


def test_estimates_of_what_is_left_of_a_run(settings, tmp_path):
    run_training(read_job(None, MODEL, [*settings, "trainer.epochs=1"]))
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    text = rehearse(read_job(resume=tmp_path / "run", overrides=["trainer.epochs=3"]))
    assert text.startswith("training: 14 of 21 steps in 3 epochs at ")
    assert "\nvalidation: 2 times " in text
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files


def test_without_validation_data_there_is_no_estimate_of_it(settings):
    text = rehearsal(settings, "data.val_fraction=0", "scheduler=null", "checkpoint.save_best=false")
    assert "validation" not in text


def test_what_the_run_would_refuse_after_reading_its_data(settings):
    with pytest.raises(ConfigError, match=r"checkpoint\.monitor: pm7/F_mae is not a validation metric"):
        rehearsal(settings, "checkpoint.monitor=pm7/F_mae")


def test_places_are_checked(settings, tmp_path):
    with pytest.raises(OSError, match="none"):
        rehearsal(settings, save=tmp_path / "none" / "model.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another run"):
        rehearsal(settings)


def test_an_error_that_the_tried_batches_lack_is_looked_for_in_all(settings, monkeypatch):
    """As that of a rare fidelity."""
    evaluated = []

    def evaluate(evaluator, batches, *arguments):
        evaluated.append(batches)
        metrics = loop.evaluate(evaluator, batches, *arguments)
        return {"loss": metrics["loss"]} if isinstance(batches, list) else metrics

    monkeypatch.setattr(runner, "evaluate", evaluate)
    assert "validation: 3 times " in rehearsal(settings, "checkpoint.monitor=dft/F_mae")
    assert len(evaluated) == 2


def test_steps_that_are_not_finite_are_pointed_out(settings, monkeypatch, caplog):
    def build_data(config):
        data = original(config)
        read = data.train.__class__.__getitems__

        def with_nan(self, indices):
            samples = read(self, indices)
            samples[0]["energy"] = torch.nan * samples[0]["energy"]
            return samples

        monkeypatch.setattr(data.train.__class__, "__getitems__", with_nan)
        return data

    original = runner.build_data
    monkeypatch.setattr(runner, "build_data", build_data)
    with caplog.at_level(logging.WARNING, logger="aimnet2mult"):
        rehearsal(settings, "checkpoint.monitor=dft/F_mae")
    assert "loss or gradient was not finite in " in caplog.text
