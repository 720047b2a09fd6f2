"""Learning rates over a run."""

import pytest
import torch
from torch import nn

from aimnet2mult.train.optimizer import build_optimizer
from aimnet2mult.train.schedule import Schedule
from aimnet2mult.train.schema import GradClipConfig, OptimizerConfig, SchedulerConfig

TORCH = "torch.optim.lr_scheduler."
IGNITE = "ignite.handlers."


class Net(nn.Module):
    """Weights with the names of a small two-fidelity model."""

    def __init__(self):
        super().__init__()
        self.afv = nn.Embedding(5, 4)
        self.aev = nn.Module()
        self.aev.eta_s = nn.Parameter(torch.ones(3), requires_grad=False)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, numbers):
        return sum(head(self.afv(numbers)) for head in self.heads)


def optimizer_config(**changes):
    settings = {
        "class_": "torch.optim.RAdam",
        "kwargs": {"lr": 1e-2, "weight_decay": 0.1},
        "param_groups": {},
        "force_train": [],
        "force_no_train": [],
        "freeze_backbone": False,
        "freeze_fidelities": [],
        "grad_clip": GradClipConfig(max_norm=None, max_value=None),
    }
    return OptimizerConfig(**{**settings, **changes})


def scheduled(name, kwargs, low=None, unit=None):
    """Two groups, the second at a tenth of the base rate, under a schedule."""
    config = optimizer_config(param_groups={"slow": {"re": "afv", "lr": 1e-3}})
    optimizer = build_optimizer(config, Net())
    return optimizer, Schedule(SchedulerConfig(name, kwargs, low, unit), config, optimizer)


@pytest.mark.parametrize(
    ("name", "kwargs", "unit"),
    [
        (IGNITE + "CosineAnnealingScheduler", {"start_value": 1e-2, "end_value": 1e-4, "cycle_size": 10}, "iteration"),
        (IGNITE + "LinearCyclicalScheduler", {"start_value": 1e-3, "end_value": 1e-2, "cycle_size": 6}, "iteration"),
        (IGNITE + "PiecewiseLinear", {"milestones_values": [[0, 1e-2], [5, 1e-3]]}, "iteration"),
        (TORCH + "CosineAnnealingLR", {"T_max": 7, "eta_min": 1e-5}, "epoch"),
        (TORCH + "StepLR", {"step_size": 2, "gamma": 0.5}, "epoch"),
        (TORCH + "OneCycleLR", {"max_lr": 0.05, "total_steps": 20}, "epoch"),
        (TORCH + "ReduceLROnPlateau", {"factor": 0.5, "patience": 0, "min_lr": 1e-3}, "validation"),
        (IGNITE + "ReduceLROnPlateauScheduler", {"metric_name": "loss", "factor": 0.5, "patience": 0}, "validation"),
        (
            IGNITE + "ConcatScheduler",
            {
                "schedulers": [
                    {
                        "class": IGNITE + "LinearCyclicalScheduler",
                        "kwargs": {"start_value": 1e-4, "end_value": 1e-2, "cycle_size": 8},
                    },
                    {
                        "class": IGNITE + "CosineAnnealingScheduler",
                        "kwargs": {"start_value": 1e-2, "end_value": 1e-3, "cycle_size": 40},
                    },
                ],
                "durations": [4],
            },
            "iteration",
        ),
        (
            TORCH + "SequentialLR",
            {
                "schedulers": [
                    {"class": TORCH + "LinearLR", "kwargs": {"start_factor": 0.1, "total_iters": 3}},
                    {"class": TORCH + "ExponentialLR", "kwargs": {"gamma": 0.5}},
                ],
                "milestones": [3],
            },
            "epoch",
        ),
    ],
)
def test_groups_keep_their_ratio_under_every_schedule(name, kwargs, unit):
    optimizer, schedule = scheduled(name, kwargs)
    assert schedule.unit == unit
    rates = []
    for _ in range(8):
        base, slow = (group["lr"] for group in optimizer.param_groups)
        assert base == pytest.approx(schedule.rate)
        assert slow == pytest.approx(base / 10)
        rates.append(base)
        schedule.step({"loss": 1.0})
    assert len(set(rates)) > 2


def test_ignite_cosine_begins_with_its_first_value_and_follows_the_formula():
    kwargs = {"start_value": 1e-2, "end_value": 0.0, "cycle_size": 4}
    optimizer, schedule = scheduled(IGNITE + "CosineAnnealingScheduler", kwargs)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates == pytest.approx([1e-2, 1e-2 * 0.8535533906, 5e-3, 1e-2 * 0.1464466094])


@pytest.mark.parametrize("name", [IGNITE + "ReduceLROnPlateauScheduler", TORCH + "ReduceLROnPlateau"])
def test_plateau_waits_for_its_patience_and_stops_at_min_lr(name):
    optimizer, schedule = scheduled(name, {"factor": 0.1, "patience": 1, "min_lr": 1e-4}, low=5e-3)
    rates = []
    for loss in (3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        schedule.step({"loss": loss, "E_mae": 0.0})
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2] * 3 + [1e-3] * 3 + [1e-4] * 3)
    assert schedule.exhausted


def test_plateau_can_watch_another_metric_and_names_an_unknown_one():
    kwargs = {"metric_name": "val/fid0/E_mae", "factor": 0.1, "patience": 0}
    optimizer, schedule = scheduled(IGNITE + "ReduceLROnPlateauScheduler", kwargs)
    for value in (2.0, 2.0):
        schedule.step({"loss": -value, "fid0/E_mae": value})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    with pytest.raises(ValueError, match=r"metric_name: fid0/E_mae is not a validation metric; known: loss"):
        schedule.step({"loss": 1.0})


def test_low_rate_ends_the_training_but_not_during_the_warm_up():
    kwargs = {"start_value": 1e-6, "end_value": 1e-2, "cycle_size": 8}
    _, schedule = scheduled(IGNITE + "LinearCyclicalScheduler", kwargs, low=1e-4)
    exhausted = []
    for _ in range(9):
        exhausted.append(schedule.exhausted)
        schedule.step()
    assert exhausted == [False] * 8 + [True]


def test_schedule_of_another_parameter_scales_it():
    name, kwargs = (
        IGNITE + "LinearCyclicalScheduler",
        {"param_name": "weight_decay", "start_value": 0.1, "end_value": 0.2},
    )
    optimizer, schedule = scheduled(name, {**kwargs, "cycle_size": 4})
    optimizer.param_groups[1]["weight_decay"] = 0.1
    schedule.step()
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.15)
    assert optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (TORCH + "LambdaLR", {"lr_lambda": "x"}, "scheduler.kwargs.lr_lambda: expected the dotted name of a function"),
        (TORCH + "CosineAnnealingLR", {}, "T_max"),
        (IGNITE + "CosineAnnealingScheduler", {"start_value": 1.0, "end_value": 0.0, "cycle_size": 1}, "cycle_size"),
        (IGNITE + "ConcatScheduler", {"schedulers": [{"class": "x.Y", "duration": 3}], "durations": []}, "duration"),
    ],
)
def test_scheduler_mistakes_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scheduled(name, kwargs)
