"""Optimiser groups, schedules, Weights & Biases without a network, devices."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aimnet2mult.train import utils
from aimnet2mult.train.configuration import (
    GradClipConfig,
    OptimizerConfig,
    SchedulerConfig,
    WandbConfig,
    WandbInitConfig,
)
from aimnet2mult.train.utils import Schedule, accepted_keywords, build_optimizer, pick_device, wandb_obstacle

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
        "grad_clip": GradClipConfig(max_norm=None),
    }
    return OptimizerConfig(**{**settings, **changes})


def groups(optimizer, net):
    """Group name -> names of its weights."""
    names = {id(weight): name for name, weight in net.named_parameters()}
    return {group["name"]: [names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups}


# --------------------------------------------------------------------------------------------------
# optimiser
# --------------------------------------------------------------------------------------------------


def test_each_weight_is_in_the_first_group_it_matches_and_in_no_other():
    net = Net()
    param_groups = {
        "embedding": {"re": "afv", "lr": 1e-3, "weight_decay": 0.0},
        "first": {"re": r"heads\.0"},
        "heads": {"re": r"^heads\.", "lr": 2e-2},
    }
    optimizer = build_optimizer(optimizer_config(param_groups=param_groups), net)
    assert groups(optimizer, net) == {
        "embedding": ["afv.weight"],
        "first": ["heads.0.weight", "heads.0.bias"],
        "heads": ["heads.1.weight", "heads.1.bias"],
    }
    assert isinstance(optimizer, torch.optim.RAdam)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2, 2e-2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1, 0.1]


def test_force_train_and_force_no_train_decide_what_moves():
    net = Net()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    optimizer = build_optimizer(optimizer_config(force_train=["eta_s"], force_no_train=[r"heads\.1", "afv"]), net)
    assert groups(optimizer, net) == {"default": ["aev.eta_s", "heads.0.weight", "heads.0.bias"]}
    (net(torch.tensor([1, 2])).sum() * net.aev.eta_s.sum()).backward()
    optimizer.step()
    moved = {name for name, weight in net.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"aev.eta_s", "heads.0.weight", "heads.0.bias"}


def test_a_group_whose_weights_are_all_fixed_is_left_out():
    config = optimizer_config(param_groups={"a": {"re": "afv"}}, force_no_train=["afv"])
    assert [group["name"] for group in build_optimizer(config, Net()).param_groups] == ["default"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"param_groups": {"a": {"re": "afw"}}},
            r"optimizer\.param_groups\.a\.re: 'afw' matches none of the 6 weights",
        ),
        ({"force_train": ["afw"]}, r"optimizer\.force_train: 'afw' matches none"),
        ({"force_no_train": ["x", "afv"]}, r"optimizer\.force_no_train: 'x' matches none"),
        ({"force_no_train": ["."]}, "no weight is left to train"),
        ({"force_train": ["afv"], "force_no_train": ["weight"]}, r"afv\.weight also matches optimizer\.force_no_train"),
        ({"kwargs": {"lr": -1.0}}, r"optimizer: torch\.optim\.RAdam: Invalid learning rate"),
    ],
)
def test_optimizer_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(optimizer_config(**changes), Net())


# --------------------------------------------------------------------------------------------------
# schedule
# --------------------------------------------------------------------------------------------------


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
        (TORCH + "LambdaLR", {"lr_lambda": "x"}, "scheduler: torch.optim.lr_scheduler.LambdaLR"),
        (TORCH + "CosineAnnealingLR", {}, "T_max"),
        (IGNITE + "CosineAnnealingScheduler", {"start_value": 1.0, "end_value": 0.0, "cycle_size": 1}, "cycle_size"),
        (IGNITE + "ConcatScheduler", {"schedulers": [{"class": "x.Y", "duration": 3}], "durations": []}, "duration"),
    ],
)
def test_scheduler_mistakes_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scheduled(name, kwargs)


def test_keywords_of_a_class_include_those_passed_on():
    assert {"start_value", "cycle_size", "monotonic"} <= set(
        accepted_keywords(utils.resolve(IGNITE + "LinearCyclicalScheduler"))
    )
    assert {"metric_name", "patience"} <= set(accepted_keywords(utils.ReduceLROnPlateauScheduler))
    assert accepted_keywords(lambda **anything: None) is None


# --------------------------------------------------------------------------------------------------
# Weights & Biases
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def settings(**init):
    wandb = WandbConfig(init=WandbInitConfig(**init))
    return SimpleNamespace(wandb=wandb, run_name="run", project_name="project")


def test_without_login_the_obstacle_is_named(no_login):
    assert "no login for api.wandb.ai" in wandb_obstacle()


def test_login_in_netrc_is_found_and_a_silent_server_is_named_at_once(no_login, monkeypatch):
    (no_login / "netrc").write_text("machine 127.0.0.1 login user password 0123\n")
    (no_login / "netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    assert "127.0.0.1 does not answer" in wandb_obstacle()
    assert time.monotonic() - start < utils.WANDB_TIMEOUT + 1


def test_disabled_or_absent_starts_nothing(tmp_path):
    assert utils.start_wandb(settings(mode="disabled"), tmp_path, {}) is None
    assert utils.start_wandb(SimpleNamespace(wandb=None), tmp_path, {}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")  # wandb starts threads and files of its own
def test_online_without_login_goes_on_offline(no_login, caplog):
    pytest.importorskip("wandb")
    folder = no_login / "run"
    folder.mkdir()
    with caplog.at_level(logging.INFO, logger="aimnet2mult"):
        run = utils.start_wandb(settings(mode="online"), folder, {"seed": 1})
    try:
        run.log({"val/loss": 1.0}, step=1)
    finally:
        run.finish()
    assert "logged offline" in caplog.text
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


# --------------------------------------------------------------------------------------------------
# device, log
# --------------------------------------------------------------------------------------------------


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="asks for GPU 0, this machine has 0"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto", local_rank=3) == torch.device("cuda", 3)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


def test_only_rank_zero_speaks(capsys):
    logger = logging.getLogger("aimnet2mult")
    before = (logger.handlers[:], logger.level)
    try:
        for rank in (0, 1):
            utils.setup_logging(verbose=False, rank=rank)
            logging.getLogger("aimnet2mult.train.x").info("from rank %d", rank)
            logging.getLogger("aimnet2mult.train.x").debug("detail")
        error = capsys.readouterr().err
        assert "from rank 0" in error
        assert "from rank 1" not in error
        assert "detail" not in error
    finally:
        logger.handlers[:], logger.level = before
