"""Which validation number a run follows."""

import io
import logging
import math

import pytest
import torch

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.metrics import LossMetric, RegMultiMetric
from aimnet2mult.train.monitor import EarlyStopping, Monitor, possible_metrics

METRICS = {"loss": 3.0, "energy_loss": 1.0, "E_mae": 2.0, "ccsd/F_mae": 4.0, "dft/F_mae": 8.0}
WHERE = "checkpoint.monitor"


@pytest.mark.parametrize(
    ("what", "value", "text"),
    [
        ("loss", 3.0, "loss"),
        ("val/loss", 3.0, "loss"),
        ("ccsd/F_mae", 4.0, "ccsd/F_mae"),
        ("val/ccsd/F_mae", 4.0, "ccsd/F_mae"),
        ({"ccsd/F_mae": 1}, 4.0, "ccsd/F_mae"),
        ({"val/ccsd/F_mae": 1.0, "dft/F_mae": 0.25}, 6.0, "1 ccsd/F_mae + 0.25 dft/F_mae"),
        ({"loss": 2.0}, 6.0, "2 loss"),
    ],
)
def test_metric_or_weighted_sum(what, value, text):
    monitor = Monitor(what, WHERE)
    assert monitor.value(METRICS) == value
    assert monitor.text == text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_value_that_is_not_finite_stays_so(value):
    monitor = Monitor({"loss": 1.0, "E_mae": 2.0}, WHERE)
    assert not math.isfinite(monitor.value({**METRICS, "E_mae": value}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, r"checkpoint\.monitor: expected a validation metric or \{metric: weight\}, found None"),
        ({}, r"expected a validation metric or \{metric: weight\}, found \{\}"),
        (["loss"], r"expected a validation metric or \{metric: weight\}, found \['loss'\]"),
        ("", r"checkpoint\.monitor: '' is not the name of a validation metric"),
        ("val/", r"checkpoint\.monitor: 'val/' is not the name"),
        ({"loss": 0.0}, r"checkpoint\.monitor\.loss: expected a positive weight, found 0\.0"),
        ({"loss": -1}, r"expected a positive weight, found -1"),
        ({"loss": math.nan}, r"expected a positive weight, found nan"),
        ({"loss": math.inf}, r"expected a positive weight, found inf"),
        ({"loss": True}, r"expected a positive weight, found True"),
        ({"loss": "1"}, r"expected a positive weight, found '1'"),
        ({"loss": 1.0, "val/loss": 1.0}, r"checkpoint\.monitor: loss is named twice"),
    ],
)
def test_nonsense_is_refused(what, message):
    with pytest.raises(ConfigError, match=message):
        Monitor(what, WHERE)


@pytest.mark.parametrize("call", ["check", "value"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("val/ccds/F_mae", r"^checkpoint\.monitor: ccds/F_mae is not a validation metric; did you mean ccsd/F_mae"),
        ({"loss": 1.0, "dft/F_mea": 1.0}, r"dft/F_mea is not a validation metric; did you mean dft/F_mae"),
        ("charges", r"charges is not a validation metric; known: loss, energy_loss, E_mae, ccsd/F_mae, dft/F_mae$"),
    ],
)
def test_metric_that_is_not_there_is_named_with_the_nearest(call, what, message):
    with pytest.raises(ConfigError, match=message):
        getattr(Monitor(what, WHERE), call)(METRICS)


def test_possible_metrics_are_those_that_are_reported():
    """Names made before data are read, against those of a validation in which every label is there."""
    cfg = {"energy": {"abbr": "E", "scale": 23.06}, "forces": {"abbr": "F", "mult": 3}, "charges": {}}
    components = {
        "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
        "f": {
            "fn": "aimnet2mult.train.loss.peratom_loss_fn",
            "weight": 1.0,
            "kwargs": {"key_true": "forces", "key_pred": "forces"},
        },
    }
    y_true = {"energy": torch.zeros(2), "forces": torch.zeros(2, 3, 3), "charges": torch.zeros(2, 3)}
    y_pred = {key: value + 1.0 for key, value in y_true.items()}
    y_pred |= {"numbers": torch.ones(2, 3, dtype=torch.long), "coord": torch.zeros(2, 3, 3)}
    y_pred["_fidelities"] = torch.tensor([0, 1])
    reported = {}
    for metric in (LossMetric(MTLoss(components)), RegMultiMetric(cfg, {0: "dft", 1: "ccsd"})):
        metric.update((y_pred, y_true))
        reported.update(metric.compute())
    possible = possible_metrics(["dft", "ccsd"], cfg, components)
    assert len(possible) == len(set(possible))
    assert set(possible) == set(reported)
    assert set(possible_metrics(["dft"], cfg, components, labels=["energy", "dipole"])) == {
        "loss",
        "energy_loss",
        "f_loss",
        *(
            f"{prefix}E{kind}"
            for prefix in ("", "dft/")
            for kind in ("_mae", "_rmse", "_per_atom_mae", "_per_atom_rmse")
        ),
    }
    for name in possible:
        Monitor(f"val/{name}", WHERE).check(possible)


# --- early stopping -----------------------------------------------------------------------------


def stopping(patience=2, min_delta=0.0, what="loss"):
    return EarlyStopping(Monitor(what, "trainer.early_stopping.monitor"), patience, min_delta)


@pytest.mark.parametrize(
    ("values", "options", "ends"),
    [
        ([3.0, 2.0, 1.0, 0.5], {}, None),
        ([3.0, 3.0, 3.0], {}, 2),
        ([3.0, 4.0, 2.0, 2.0, 1.9, 2.0, 1.9], {}, 6),
        ([1.0, 2.0], {"patience": 1}, 1),
        ([math.nan, math.nan], {}, 1),
        ([3.0, math.nan, 2.0, -math.inf, math.inf], {}, 4),
        ([3.0, 2.75, 2.5], {"min_delta": 0.5}, None),
        ([3.0, 2.75, 2.6], {"min_delta": 0.5}, 2),
        ([3.0, 2.75, 2.5, 2.25, 2.0], {"min_delta": 0.5}, None),
    ],
)
def test_training_ends_after_the_patience(values, options, ends):
    early = stopping(**options)
    answers = [early.update({"loss": value}) for value in values]
    assert answers == [number == ends for number in range(len(values))]


def test_early_stopping_goes_on_from_its_state():
    values = [3.0, 4.0, 2.0, 2.5, 1.9, 2.0, 2.0, 2.0]
    for stop in range(len(values)):
        whole = stopping(patience=3)
        for value in values[:stop]:
            whole.update({"loss": value})
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        file.seek(0)
        resumed = stopping(patience=3)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        rest = [[early.update({"loss": value}) for value in values[stop:]] for early in (whole, resumed)]
        assert rest[0] == rest[1]
        assert whole.exhausted == resumed.exhausted == rest[0][-1]
        assert whole.state_dict() == resumed.state_dict()


def test_another_monitor_begins_anew_and_says_so(caplog):
    old = stopping()
    old.update({"loss": 0.1})
    new = stopping(what="E_mae")
    with caplog.at_level(logging.WARNING):
        new.load_state_dict(old.state_dict())
    assert "early stopping follows E_mae, the checkpoint followed loss: the patience begins anew" in caplog.text
    assert (new.best, new.waited) == (math.inf, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "trainer.early_stopping.patience: expected 1 or more validations, found 0"),
        ({"min_delta": -0.1}, "trainer.early_stopping.min_delta: expected a number of 0 or more, found -0.1"),
        ({"min_delta": math.nan}, "trainer.early_stopping.min_delta: expected a number of 0 or more, found nan"),
    ],
)
def test_nonsense_in_early_stopping_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        stopping(**options)


def test_missing_metric_is_named():
    with pytest.raises(ConfigError, match=r"trainer\.early_stopping\.monitor: E_mae is not a validation metric; known"):
        stopping(what="E_mae").update({"loss": 1.0})
