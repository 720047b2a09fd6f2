"""Which weights an optimiser trains, and in which groups."""

import pytest
import torch
from torch import nn

from aimnet2mult.train.optimizer import build_optimizer
from aimnet2mult.train.schema import GradClipConfig, OptimizerConfig


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


def groups(optimizer, net):
    """Group name -> names of its weights."""
    names = {id(weight): name for name, weight in net.named_parameters()}
    return {group["name"]: [names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups}


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
