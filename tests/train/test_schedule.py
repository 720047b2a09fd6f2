"""Learning rates over a run."""

import io
import json
import logging
import math
import random
import time

import pytest
import torch
from torch import nn

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.train.optimizer import build_optimizer
from aimnet2mult.train.schedule import RunLength, Schedule, run_length
from aimnet2mult.train.schema import GradClipConfig, OptimizerConfig, SchedulerConfig, WarmupConfig

TORCH = "torch.optim.lr_scheduler."
IGNITE = "ignite.handlers."
LENGTH = RunLength(iteration=40, epoch=10, validation=20)


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
        "param_groups": {"slow": {"re": "afv", "lr": 1e-3}},
        "force_train": [],
        "force_no_train": [],
        "freeze_backbone": False,
        "freeze_fidelities": [],
        "grad_clip": GradClipConfig(max_norm=None, max_value=None),
    }
    return OptimizerConfig(**{**settings, **changes})


def scheduled(name, kwargs, low=None, unit=None, warmup=None, length=LENGTH, lr=1e-2):
    """Two groups, the second at a tenth of the base rate, under a schedule."""
    config = optimizer_config(kwargs={"lr": lr, "weight_decay": 0.1})
    optimizer = build_optimizer(config, Net())
    warmup = None if warmup is None else WarmupConfig(*warmup)
    return optimizer, Schedule(SchedulerConfig(name, kwargs, low, unit, warmup), config, optimizer, length)


def node(name, **kwargs):
    return {"class": name, "kwargs": kwargs}


def halved(step):
    """For LambdaLR and CyclicLR: a factor that becomes half of itself in each step."""
    return 0.5**step


class CountedDecay:
    """For LambdaLR: a function with a memory."""

    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def __call__(self, step):
        self.calls += 1
        return self.factor**self.calls


HERE = f"{__name__}."

SCHEDULES = {
    "ignite cosine": (IGNITE + "CosineAnnealingScheduler", {"start_value": 1e-2, "end_value": 1e-4, "cycle_size": 10}),
    "ignite cosine, cycles": (
        IGNITE + "CosineAnnealingScheduler",
        {
            "start_value": 1e-2,
            "end_value": 1e-4,
            "cycle_size": 4,
            "cycle_mult": 1.5,
            "start_value_mult": 0.8,
            "warmup_duration": 2,
        },
    ),
    "ignite linear": (IGNITE + "LinearCyclicalScheduler", {"start_value": 1e-3, "end_value": 1e-2, "cycle_size": 6}),
    "ignite piecewise": (IGNITE + "PiecewiseLinear", {"milestones_values": [[0, 1e-2], [5, 1e-3], [12, 5e-3]]}),
    "ignite plateau": (
        IGNITE + "ReduceLROnPlateauScheduler",
        {"metric_name": "loss", "factor": 0.5, "patience": 1, "cooldown": 1},
    ),
    "ignite concat": (
        IGNITE + "ConcatScheduler",
        {
            "schedulers": [
                node(IGNITE + "LinearCyclicalScheduler", start_value=1e-4, end_value=1e-2, cycle_size=8),
                node(IGNITE + "CosineAnnealingScheduler", start_value=1e-2, end_value=1e-3, cycle_size=40),
                node(IGNITE + "PiecewiseLinear", milestones_values=[[0, 1e-3], [5, 1e-4]]),
            ],
            "durations": [4, 7],
        },
    ),
    "ignite concat of concat": (
        IGNITE + "ConcatScheduler",
        {
            "schedulers": [
                node(
                    IGNITE + "ConcatScheduler",
                    schedulers=[
                        node(IGNITE + "LinearCyclicalScheduler", start_value=1e-4, end_value=1e-2, cycle_size=8),
                        node(IGNITE + "CosineAnnealingScheduler", start_value=1e-2, end_value=1e-3, cycle_size=9),
                    ],
                    durations=[3],
                ),
                node(IGNITE + "LinearCyclicalScheduler", start_value=1e-3, end_value=1e-2, cycle_size=8),
            ],
            "durations": [9],
        },
    ),
    "ignite warm-up of ignite": (
        IGNITE + "create_lr_scheduler_with_warmup",
        {
            "lr_scheduler": node(
                IGNITE + "CosineAnnealingScheduler", start_value=1e-2, end_value=1e-3, cycle_size=30, param_name="lr"
            ),
            "warmup_start_value": 1e-4,
            "warmup_duration": 5,
        },
    ),
    "ignite warm-up of torch": (
        IGNITE + "create_lr_scheduler_with_warmup",
        {
            "lr_scheduler": node(TORCH + "ExponentialLR", gamma=0.9),
            "warmup_start_value": 1e-4,
            "warmup_duration": 5,
        },
    ),
    "ignite of torch": (IGNITE + "LRScheduler", {"lr_scheduler": node(TORCH + "StepLR", step_size=3, gamma=0.5)}),
    "ignite of torch restarts": (
        IGNITE + "LRScheduler",
        {"lr_scheduler": node(TORCH + "CosineAnnealingWarmRestarts", T_0=4, T_mult=2)},
    ),
    "ignite warm-up of torch restarts": (
        IGNITE + "create_lr_scheduler_with_warmup",
        {
            "lr_scheduler": node(TORCH + "CosineAnnealingWarmRestarts", T_0=4, T_mult=2),
            "warmup_start_value": 1e-4,
            "warmup_duration": 5,
        },
    ),
    "torch cosine": (TORCH + "CosineAnnealingLR", {"T_max": 7, "eta_min": 1e-5}),
    "torch step": (TORCH + "StepLR", {"step_size": 2, "gamma": 0.5}),
    "torch multistep": (TORCH + "MultiStepLR", {"milestones": [2, 5, 11], "gamma": 0.5}),
    "torch constant": (TORCH + "ConstantLR", {"factor": 0.25, "total_iters": 5}),
    "torch linear": (TORCH + "LinearLR", {"start_factor": 0.1, "total_iters": 9}),
    "torch exponential": (TORCH + "ExponentialLR", {"gamma": 0.9}),
    "torch polynomial": (TORCH + "PolynomialLR", {"total_iters": 12, "power": 1.5}),
    "torch restarts": (TORCH + "CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2}),
    "torch one cycle": (TORCH + "OneCycleLR", {"max_lr": 0.05, "total_steps": 20}),
    "torch cyclic": (TORCH + "CyclicLR", {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 4, "mode": "triangular2"}),
    "torch cyclic, function": (
        TORCH + "CyclicLR",
        {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 4, "scale_fn": HERE + "halved"},
    ),
    "torch lambda": (TORCH + "LambdaLR", {"lr_lambda": HERE + "halved"}),
    "torch lambda, object": (TORCH + "LambdaLR", {"lr_lambda": node(HERE + "CountedDecay", factor=0.9)}),
    "torch multiplicative": (TORCH + "MultiplicativeLR", {"lr_lambda": node(HERE + "CountedDecay", factor=0.99)}),
    "torch plateau": (TORCH + "ReduceLROnPlateau", {"factor": 0.5, "patience": 0, "min_lr": 1e-3}),
    "torch swa": ("torch.optim.swa_utils.SWALR", {"swa_lr": 1e-4, "anneal_epochs": 6}),
    "torch chained": (
        TORCH + "ChainedScheduler",
        {
            "schedulers": [
                node(TORCH + "ConstantLR", factor=0.1, total_iters=4),
                node(TORCH + "ExponentialLR", gamma=0.9),
            ]
        },
    ),
    "torch sequential": (
        TORCH + "SequentialLR",
        {
            "schedulers": [
                node(TORCH + "LinearLR", start_factor=0.1, total_iters=3),
                node(TORCH + "CosineAnnealingLR", T_max=10),
                node(TORCH + "ExponentialLR", gamma=0.5),
            ],
            "milestones": [3, 9],
        },
    ),
}
"""Every kind of schedule that settings can describe; each has to move within eight steps."""


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_groups_keep_their_ratio_under_every_schedule(kind):
    name, kwargs = SCHEDULES[kind]
    optimizer, schedule = scheduled(name, kwargs)
    assert schedule.unit == ("validation" if "plateau" in kind else "iteration" if "ignite" in kind else "epoch")
    seen = []
    for _ in range(8):
        base, slow = rates(optimizer)
        assert base == pytest.approx(schedule.rate)
        assert slow == pytest.approx(base / 10)
        seen.append(base)
        schedule.step({"loss": 1.0})
    assert len(set(seen)) >= 2


def test_ignite_cosine_begins_with_its_first_value_and_follows_the_formula():
    kwargs = {"start_value": 1e-2, "end_value": 0.0, "cycle_size": 4}
    optimizer, schedule = scheduled(IGNITE + "CosineAnnealingScheduler", kwargs)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert seen == pytest.approx([1e-2, 1e-2 * 0.8535533906, 5e-3, 1e-2 * 0.1464466094])


@pytest.mark.parametrize("name", [IGNITE + "ReduceLROnPlateauScheduler", TORCH + "ReduceLROnPlateau"])
def test_plateau_waits_for_its_patience_and_stops_at_min_lr(name):
    optimizer, schedule = scheduled(name, {"factor": 0.1, "patience": 1, "min_lr": 1e-4}, low=5e-3)
    seen = []
    for loss in (3.0, 2.0, math.nan, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        schedule.step({"loss": loss, "E_mae": 0.0})
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([1e-2] * 3 + [1e-3] * 3 + [1e-4] * 3)
    assert schedule.exhausted


def test_plateau_can_watch_another_metric_and_names_an_unknown_one():
    kwargs = {"metric_name": "val/fid0/E_mae", "factor": 0.1, "patience": 0}
    optimizer, schedule = scheduled(IGNITE + "ReduceLROnPlateauScheduler", kwargs)
    for value in (2.0, 2.0):
        schedule.step({"loss": -value, "fid0/E_mae": value})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    with pytest.raises(ConfigError, match=r"metric_name: fid0/E_mae is not a validation metric; known: loss"):
        schedule.check_metric({"loss": 1.0})
    with pytest.raises(ConfigError, match=r"metric_name: fid0/E_mae is not a validation metric; there are none"):
        schedule.step()


def test_plateau_can_follow_a_weighted_sum():
    kwargs = {"metric_name": {"val/a/F_mae": 1.0, "b/F_mae": 2.0}, "factor": 0.1, "patience": 0}
    optimizer, schedule = scheduled(IGNITE + "ReduceLROnPlateauScheduler", kwargs)
    assert schedule.followed == ["a/F_mae", "b/F_mae"]
    for a, b in ((1.0, 1.0), (2.0, 0.4), (0.1, 1.35)):  # 3, 2.8, 2.8
        assert optimizer.param_groups[0]["lr"] == 1e-2
        schedule.validation({"loss": 0.0, "a/F_mae": a, "b/F_mae": b})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_low_rate_ends_the_training_but_not_during_the_warm_up():
    kwargs = {"start_value": 1e-6, "end_value": 1e-2, "cycle_size": 8}
    _, schedule = scheduled(IGNITE + "LinearCyclicalScheduler", kwargs, low=1e-4)
    exhausted = []
    for _ in range(9):
        exhausted.append(schedule.exhausted)
        schedule.step()
    assert exhausted == [False] * 8 + [True]
    _, schedule = scheduled(TORCH + "ConstantLR", {"factor": 1.0}, low=5e-3, warmup=(100, 0.01))
    assert schedule.rate < 5e-3
    assert not schedule.exhausted


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


# --- units --------------------------------------------------------------------------------------


def test_schedule_steps_after_its_unit_alone():
    moved = {}
    for unit in ("iteration", "epoch", "validation"):
        optimizer, schedule = scheduled(TORCH + "ExponentialLR", {"gamma": 0.5}, unit=unit)
        moved[unit] = []
        for call in (schedule.iteration, schedule.epoch, lambda call=schedule.validation: call({"loss": 1.0})):
            before = optimizer.param_groups[0]["lr"]
            call()
            moved[unit].append(optimizer.param_groups[0]["lr"] / before)
        assert schedule.counts == {"iteration": 1, "epoch": 1, "validation": 1}
    assert moved == {"iteration": [0.5, 1, 1], "epoch": [1, 0.5, 1], "validation": [1, 1, 0.5]}


def test_plateau_may_count_epochs():
    optimizer, schedule = scheduled(TORCH + "ReduceLROnPlateau", {"factor": 0.1, "patience": 0}, unit="epoch")
    for loss in (1.0, 2.0, 3.0):
        schedule.validation({"loss": loss})
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for loss in (1.0, 1.0):
        schedule.epoch({"loss": loss})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 6, 3, 8], [1], [3] * 7])
@pytest.mark.parametrize("every", [None, 1, 2, 3, 5, 100])
def test_length_of_a_run_is_what_a_loop_counts(lengths, every):
    counted = {"iteration": 0, "epoch": 0, "validation": 0}
    for length in lengths:
        for i in range(length):
            counted["iteration"] += 1
            between = every is not None and counted["iteration"] % every == 0
            counted["validation"] += between or i == length - 1
        counted["epoch"] += 1
    assert run_length(lengths, every) == RunLength(**counted)


# --- warm-up and total --------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["iteration", "epoch"])
def test_warm_up_times_cosine(unit):
    """Both in closed form; the cosine of torch steps by a recursion, which agrees to round-off."""
    lr, low, start, warm, per_epoch = 1e-2, 1e-4, 0.1, 8, 4
    length = run_length([per_epoch] * 10)
    total = length.iteration if unit == "iteration" else length.epoch
    optimizer, schedule = scheduled(
        TORCH + "CosineAnnealingLR", {"T_max": "total", "eta_min": low}, unit=unit, warmup=(warm, start), length=length
    )
    for t in range(length.iteration):
        step = t if unit == "iteration" else t // per_epoch
        cosine = low + (lr - low) * (1 + math.cos(math.pi * step / total)) / 2
        factor = start + (1 - start) * t / warm if t < warm else 1.0
        assert rates(optimizer) == pytest.approx([cosine * factor, cosine * factor / 10], rel=1e-12)
        assert schedule.rate == pytest.approx(cosine * factor, rel=1e-12)
        schedule.iteration()
        if (t + 1) % per_epoch == 0:
            schedule.validation({"loss": 1.0})
            schedule.epoch()


def test_first_step_has_the_starting_share_and_full_rates_are_exact():
    optimizer, schedule = scheduled(TORCH + "ConstantLR", {"factor": 1.0}, warmup=(3, 0.25))
    seen = []
    for _ in range(5):
        seen.append(rates(optimizer))
        schedule.iteration()
    assert [base for base, _ in seen] == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2])
    assert seen[3:] == [[1e-2, 1e-3]] * 2


def test_total_stands_for_all_steps_however_deep():
    _, schedule = scheduled(
        IGNITE + "ConcatScheduler",
        {
            "schedulers": [
                node(IGNITE + "PiecewiseLinear", milestones_values=[[0, 1e-2], ["total", 0.0]]),
                node(IGNITE + "CosineAnnealingScheduler", start_value=1e-2, end_value=0.0, cycle_size="total"),
            ],
            "durations": ["total"],
        },
    )
    assert schedule.scheduler.durations == [40]
    assert schedule.scheduler.schedulers[0].milestones == [0, 40]
    assert schedule.scheduler.schedulers[1].cycle_size == 40
    for unit, expected in (("epoch", 10), ("validation", 20), ("iteration", 40)):
        _, schedule = scheduled(TORCH + "CosineAnnealingLR", {"T_max": "total"}, unit=unit)
        assert schedule.scheduler.T_max == expected


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (IGNITE + "CosineAnnealingScheduler", {"start_value": 1e-2, "end_value": 1e-4, "cycle_size": "total"}),
        (TORCH + "OneCycleLR", {"max_lr": 1e-2, "total_steps": "total"}),
        (TORCH + "CosineAnnealingLR", {"T_max": "total"}),
    ],
)
def test_schedule_rests_when_a_run_is_longer_than_planned(name, kwargs):
    """Alone, Ignite's begins its next cycle, torch's cosine goes up again and OneCycleLR raises."""
    optimizer, schedule = scheduled(name, kwargs, unit="iteration")
    for _ in range(LENGTH.iteration - 1):
        schedule.iteration()
    last = rates(optimizer)
    assert last[0] < 2e-4
    for _ in range(50):
        schedule.iteration()
        assert rates(optimizer) == last


def test_total_without_a_length_is_for_checks_only():
    name, kwargs = TORCH + "CosineAnnealingLR", {"T_max": "total"}
    Schedule(SchedulerConfig(name, kwargs), optimizer_config()).step()
    with pytest.raises(ValueError, match="total needs the length of the run"):
        scheduled(name, kwargs, length=None)


# --- resuming -----------------------------------------------------------------------------------


def stored(state):
    """Through a file that loads with plain types only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def go_on(optimizer, schedule, losses):
    """Three iterations and a validation an epoch; return everything that the groups hold after each call."""
    seen = []
    for loss in losses:
        for call in (*[schedule.iteration] * 3, lambda loss=loss: schedule.validation({"loss": loss}), schedule.epoch):
            call()
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            seen.append((groups, schedule.rate, schedule.exhausted, dict(schedule.counts)))
    return seen


@pytest.mark.parametrize("warmup", [None, (7, 0.1)])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_resumed_schedule_goes_on_bitwise(kind, warmup, caplog):
    name, kwargs = SCHEDULES[kind]
    random_number = random.Random(f"{kind}{warmup}")
    losses = [random_number.random() for _ in range(14)]
    for stop in (0, random_number.randrange(1, 5), random_number.randrange(5, 13)):
        optimizer, schedule = scheduled(name, kwargs, low=2e-4, warmup=warmup)
        go_on(optimizer, schedule, losses[:stop])
        saved = stored({"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()})
        expected = go_on(optimizer, schedule, losses[stop:])

        resumed_optimizer, resumed = scheduled(name, kwargs, low=2e-4, warmup=warmup)
        resumed_optimizer.load_state_dict(saved["optimizer"])
        resumed.load_state_dict(saved["schedule"])
        assert go_on(resumed_optimizer, resumed, losses[stop:]) == expected
        assert resumed.state_dict() == schedule.state_dict()
        assert saved["schedule"] != schedule.state_dict(), "the state must not share what moves on"
    assert not caplog.records


def test_longer_run_goes_on_as_if_it_had_been_planned(caplog):
    name, kwargs = TORCH + "CosineAnnealingLR", {"T_max": "total"}
    _, short = scheduled(name, kwargs, unit="iteration", warmup=(3, 0.1), length=run_length([10]))
    optimizer, long = scheduled(name, kwargs, unit="iteration", warmup=(3, 0.1), length=run_length([10, 10]))
    for _ in range(10):
        short.iteration()
        long.iteration()
    expected = rates(optimizer)
    optimizer, resumed = scheduled(name, kwargs, unit="iteration", warmup=(3, 0.1), length=run_length([10, 10]))
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(stored(short.state_dict()))
    assert "the schedule is not that of the checkpoint" in caplog.text
    assert rates(optimizer) == expected
    assert resumed.counts == long.counts


@pytest.mark.parametrize("epochs", [0, 1])
def test_other_base_rate_takes_effect(epochs):
    name, kwargs = TORCH + "ExponentialLR", {"gamma": 0.5}
    optimizer, schedule = scheduled(name, kwargs)
    for _ in range(epochs):
        schedule.epoch()
    saved = stored([optimizer.state_dict(), schedule.state_dict()])
    optimizer, resumed = scheduled(name, kwargs, lr=4e-2)
    optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert rates(optimizer) == pytest.approx([4e-2 * 0.5**epochs, 1e-3 * 0.5**epochs])


def test_plateau_with_other_settings_is_what_it_would_have_been(caplog):
    name = TORCH + "ReduceLROnPlateau"
    _, schedule = scheduled(name, {"factor": 0.5, "patience": 0})
    for _ in range(3):
        schedule.validation({"loss": 1.0})
    optimizer, resumed = scheduled(name, {"factor": 0.1, "patience": 1})
    resumed.load_state_dict(stored(schedule.state_dict()))
    assert rates(optimizer) == pytest.approx([1e-3, 1e-4])
    assert "the schedule is not that of the checkpoint" in caplog.text


def test_state_of_a_long_schedule_is_short_and_soon_restored():
    steps = 100_000
    kwargs = {"T_max": "total"}, None, "iteration", (1000, 0.1), RunLength(2 * steps, 1, 1)
    optimizer, schedule = scheduled(TORCH + "CosineAnnealingLR", *kwargs)
    for _ in range(steps):
        schedule.iteration()
    state, (resumed_optimizer, resumed) = schedule.state_dict(), scheduled(TORCH + "CosineAnnealingLR", *kwargs)
    start = time.perf_counter()
    resumed.load_state_dict(state)
    assert time.perf_counter() - start < 5
    assert rates(resumed_optimizer) == rates(optimizer)
    assert len(json.dumps(state)) < 1000


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (TORCH + "LambdaLR", {"lr_lambda": "x"}, "scheduler.kwargs.lr_lambda: expected the dotted name of a function"),
        (TORCH + "LambdaLR", {"lr_lambda": "math.sqr"}, "scheduler.kwargs.lr_lambda: .* did you mean sqrt"),
        (TORCH + "LambdaLR", {"lr_lambda": "math.pi"}, "scheduler.kwargs.lr_lambda: math.pi is not a function"),
        (TORCH + "CosineAnnealingLR", {}, "T_max"),
        (TORCH + "CosineAnnealingLR", {"T_max": 3, "metric_name": "loss"}, "metric_name"),
        (TORCH + "OneCycleLR", {"max_lr": 1.0, "total_steps": 9}, r"ends after 9 steps, the run has 10 \(epochs\)"),
        (TORCH + "ReduceLROnPlateau", {"metric_name": {"loss": 0}}, "metric_name.loss: expected a positive weight"),
        (IGNITE + "CosineAnnealingScheduler", {"start_value": 1.0, "end_value": 0.0, "cycle_size": 1}, "cycle_size"),
        (IGNITE + "ConcatScheduler", {"schedulers": [{"class": "x.Y", "duration": 3}], "durations": []}, "duration"),
        (
            IGNITE + "LRScheduler",
            {"lr_scheduler": node(TORCH + "StepLRs", step_size=3)},
            r"scheduler: class: torch.optim.lr_scheduler.StepLRs: .* did you mean StepLR",
        ),
        ("ignite.handlers.Checkpoint", {}, "Checkpoint is not a scheduler of ignite.handlers or torch"),
    ],
)
def test_scheduler_mistakes_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scheduled(name, kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": (0, 0.1)}, "scheduler.warmup.iterations: expected 1 or more, found 0"),
        ({"warmup": (5, 0.0)}, r"scheduler.warmup.start: expected a share of the rate in \(0, 1\], found 0.0"),
        ({"warmup": (5, math.nan)}, "scheduler.warmup.start"),
        ({"unit": "epochs"}, r"scheduler.unit: 'epochs' is not a unit; did you mean epoch\?"),
    ],
)
def test_mistakes_around_the_scheduler_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        scheduled(TORCH + "ConstantLR", {"factor": 1.0}, **options)


def test_step_that_fails_is_named():
    _, schedule = scheduled(TORCH + "CosineAnnealingLR", {"T_max": "totals"})
    with pytest.raises(ConfigError, match=r"scheduler\.kwargs: .*CosineAnnealingLR: unsupported operand"):
        schedule.epoch()
    _, schedule = scheduled(TORCH + "OneCycleLR", {"max_lr": 1e-2, "total_steps": 3}, length=None)
    for _ in range(3):
        schedule.epoch()
    with pytest.raises(ConfigError, match=r"scheduler\.kwargs: .*OneCycleLR: Tried to step 4 times.*\(after epoch 4\)"):
        schedule.epoch()
