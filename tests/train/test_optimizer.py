"""Which weights an optimiser trains, and in which groups."""

import pytest
import torch
from torch import nn

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import build_model, load_checkpoint, load_model_config, save_checkpoint
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import encode_fidelity
from aimnet2mult.tools.edit_fidelities import edit_fidelities
from aimnet2mult.train.ema import WeightAverage
from aimnet2mult.train.fidelity_specific_utils import transfer_weights
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


def test_a_group_without_weights_is_left_out_and_named(caplog):
    param_groups = {"a": {"re": "afv"}, "b": {"re": "heads"}, "c": {"re": r"heads\.0"}}
    config = optimizer_config(param_groups=param_groups, force_no_train=["afv"])
    assert [group["name"] for group in build_optimizer(config, Net()).param_groups] == ["b"]
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "optimizer.param_groups.a",
        "optimizer.param_groups.c",
    ]


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
# models of several fidelities
# --------------------------------------------------------------------------------------------------

NAMES = {0: "dft", 1: "ccsd", 2: "gfn2"}


@pytest.fixture
def mixed(fixtures_dir):
    """Function: an untrained model of three fidelities (of one: a plain AIMNet2), the shifts of atoms not zero."""

    def build(heads=True, num_fidelities=3):
        torch.manual_seed(4)
        model = build_model(load_model_config(fixtures_dir / "ref_single_model.yaml"), num_fidelities, 200, heads)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("shifts.weight"):
                    weight[1:] = torch.randn_like(weight[1:])
        return model

    return build


def batch(*fidelities):
    """Water and hydrogen cyanide at each of the fidelities."""
    numbers = torch.tensor([[8, 1, 1], [6, 7, 1]]).repeat(len(fidelities), 1)
    coord = torch.tensor([[[0.0, 0, 0], [0.9, 0.1, 0], [-0.3, 0.9, 0]], [[0, 0, 0], [1.15, 0, 0], [-1.06, 0.1, 0]]])
    which = torch.tensor(fidelities).repeat_interleave(2)
    return {
        "coord": coord.repeat(len(fidelities), 1, 1),
        "numbers": encode_fidelity(numbers, which.unsqueeze(1), 200),
        "charge": torch.zeros(len(which)),
        "mult": torch.ones(len(which)),
        "_fidelities": which,
    }


def energies(model, fidelity):
    with torch.no_grad():
        return model(batch(fidelity))["energy"]


def train(model, optimizer, fidelities, steps=3):
    """Some steps on energies and forces, clipped; the norm of the last gradient."""
    forces = Forces(model.train())
    for _ in range(steps):
        optimizer.zero_grad()
        out = forces(batch(*fidelities))
        ((out["energy"] - 3.0).square().mean() + out["forces"].square().mean()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    model.eval()
    return norm


OPTIMIZERS = {
    "torch.optim.SGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    "torch.optim.AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "torch.optim.RAdam": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "torch.optim.Adagrad": {"lr": 1e-2, "weight_decay": 0.1},
}


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_predictions_of_frozen_fidelities_stay_to_the_last_bit(mixed, optimizer_class):
    model = mixed()
    average = WeightAverage(model, 0.9)
    before = {f: energies(model, f) for f in NAMES}
    config = optimizer_config(
        class_=optimizer_class,
        kwargs=OPTIMIZERS[optimizer_class],
        freeze_backbone=True,
        freeze_fidelities=["dft", "gfn2"],
    )
    optimizer = build_optimizer(config, model, NAMES)
    for _ in range(3):
        train(model, optimizer, (0, 1, 2), steps=1)
        average.update(model)
    for network in (model, average.model):
        for f in (0, 2):
            assert torch.equal(energies(network, f), before[f])
        assert not torch.equal(energies(network, 1), before[1])
    assert not torch.equal(model.afv.weight[201], mixed().afv.weight[201])  # hydrogen of ccsd has learned


def test_weights_loaded_after_the_optimiser_was_built_are_kept_too(mixed):
    """As when a run is resumed: the rows to keep are those that were loaded."""
    model, loaded = mixed(), mixed()
    optimizer = build_optimizer(optimizer_config(freeze_backbone=True, freeze_fidelities=["dft"]), model, NAMES)
    with torch.no_grad():
        loaded.afv.weight[1:] += 1.0
    model.load_state_dict(loaded.state_dict())
    train(model, optimizer, (0, 1))
    assert torch.equal(energies(model, 0), energies(loaded.eval(), 0))


def test_gradient_norm_is_that_of_what_learns(mixed):
    """Rows that stay have no gradient by the time the norm is taken."""
    model = mixed()
    optimizer = build_optimizer(optimizer_config(freeze_backbone=True, freeze_fidelities=["ccsd"]), model, NAMES)
    norm_of_frozen = train(model, optimizer, (1,), steps=1)
    assert norm_of_frozen == 0.0
    assert train(model, optimizer, (0, 1), steps=1) > 0.0
    assert torch.count_nonzero(model.afv.weight.grad[201:329]) == 0
    assert torch.count_nonzero(model.afv.weight.grad[1:129]) > 0


def test_heads_only_training(mixed):
    model = mixed()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = build_optimizer(optimizer_config(freeze_backbone=True, force_no_train=["^afv"]), model, NAMES)
    train(model, optimizer, (0, 1, 2))
    moved = {
        name.partition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"fidelity_readouts"}


@pytest.mark.parametrize("key", ["energy", "forces"])
def test_a_batch_of_frozen_fidelities_alone_goes_backward(mixed, key):
    """Heads-only training of a third fidelity, with data of the others still there."""
    model = mixed()
    before, of_both = energies(model.eval(), 0), model(batch(0, 2))["energy"]
    config = optimizer_config(freeze_backbone=True, force_no_train=["^afv"], freeze_fidelities=["dft", "gfn2"])
    optimizer = build_optimizer(config, model, NAMES)
    out = Forces(model.train())(batch(0, 2), compute_forces=key == "forces")
    assert torch.equal(out["energy"], of_both)
    out[key].square().sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    train(model, optimizer, (0, 1, 2))
    assert torch.equal(energies(model, 0), before)


def test_force_train_takes_a_part_out_of_the_frozen_backbone(mixed):
    model = mixed()
    build_optimizer(optimizer_config(freeze_backbone=True, force_train=[r"^mlps\.2"]), model, NAMES)
    trained = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name in trained if name.startswith("mlps")} == {f"mlps.2.{layer}" for layer in (0, 2, 4, 6)}
    assert not {name for name in trained if name.startswith(("conv", "aev"))}


def test_frozen_parts_and_learning_rates_of_parts_go_together(mixed):
    model = mixed()
    config = optimizer_config(
        param_groups={"embedding": {"re": "^afv", "lr": 1e-4}, "heads": {"re": "readouts", "lr": 1e-3}},
        freeze_fidelities=["dft"],
    )
    optimizer = build_optimizer(config, model, NAMES)
    found = groups(optimizer, model)
    assert found["embedding"] == ["afv.weight"]
    assert {name.partition(".energy")[0].partition(".atomic")[0] for name in found["heads"]} == {
        "fidelity_readouts.1",
        "fidelity_readouts.2",
    }
    assert all(name.startswith(("mlps", "conv")) for name in found["default"])


def test_backbone_that_learns_under_frozen_fidelities_is_pointed_out(mixed, caplog):
    build_optimizer(optimizer_config(freeze_fidelities=["dft", "2"]), mixed(), NAMES)
    assert "predictions of dft, gfn2 change all the same, because the backbone learns" in caplog.text


def test_what_is_trained_and_what_is_fixed_is_a_table(mixed, caplog):
    caplog.set_level("INFO", logger="aimnet2mult")
    model = mixed()
    config = optimizer_config(
        freeze_backbone=True,
        freeze_fidelities=["dft"],
        force_no_train=["atomic_shift"],
        param_groups={"embedding": {"re": "^afv", "lr": 1e-4}},
    )
    build_optimizer(config, model, NAMES)
    lines = caplog.text.splitlines()[1:]
    head = 32 * 24 + 24 + 24 * 24 + 24 + 24 + 1
    table = {line[:46].strip(): line[46:].split() for line in lines}
    assert table["trained: group default"] == ["0.01", "12", f"{2 * head:,}"]
    assert table["trained: group embedding"] == ["0.0001", "1", f"{(529 - 128) * 96:,}"]
    assert table["fixed by the model"][1:] == ["3", "14"]  # the radial basis
    assert table["fixed by optimizer.force_no_train"][1:] == ["3", f"{3 * 529:,}"]
    assert table["fixed by optimizer.freeze_fidelities"][1:] == ["6", f"{head:,}"]
    assert table["fixed by optimizer.freeze_fidelities: rows of"] == ["afv.weight", "-", "-", f"{128 * 96:,}"]
    counted = sum(int(line.split()[-1].replace(",", "")) for line in lines[1:])
    assert counted == sum(weight.numel() for weight in model.parameters())


def test_common_readouts_stay_only_for_all(mixed):
    names = dict(NAMES)
    with pytest.raises(
        ConfigError, match=r"optimizer\.freeze_fidelities: the readouts are those of all .* of dft alone"
    ):
        build_optimizer(optimizer_config(freeze_backbone=True, freeze_fidelities=["dft"]), mixed(False), names)
    model = mixed(False)
    before = {f: energies(model, f) for f in NAMES}
    config = optimizer_config(freeze_backbone=True, freeze_fidelities=["dft"], force_no_train=["^outputs.energy_mlp"])
    optimizer = build_optimizer(config, model, names)
    train(model, optimizer, (0, 1, 2))
    assert torch.equal(energies(model, 0), before[0])
    assert not torch.equal(energies(model, 1), before[1])
    shifts = model.outputs["atomic_shift"].shifts.weight
    untrained = mixed(False).outputs["atomic_shift"].shifts.weight
    assert torch.equal(shifts[1:129], untrained[1:129])
    assert not torch.equal(shifts[201:329], untrained[201:329])


def test_the_only_fidelity_can_be_frozen_but_not_with_the_backbone(mixed):
    model = mixed(num_fidelities=1)
    build_optimizer(optimizer_config(freeze_fidelities=["fid0"]), model)
    trained = {name.partition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"mlps", "conv_a", "conv_q"}
    with pytest.raises(ConfigError, match=r"optimizer\.freeze_backbone, optimizer\.freeze_fidelities: no weight is"):
        build_optimizer(optimizer_config(freeze_fidelities=["0"], freeze_backbone=True), mixed(num_fidelities=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_fidelities": ["dtf"]}, r"optimizer\.freeze_fidelities: there is no fidelity dtf; did you mean dft"),
        ({"freeze_fidelities": ["3"]}, r"optimizer\.freeze_fidelities: there is no fidelity 3; known: dft, ccsd, gfn2"),
        (
            {"freeze_fidelities": ["dft", "ccsd", "gfn2"], "freeze_backbone": True},
            "optimizer.freeze_backbone, optimizer.freeze_fidelities: no weight is left to train",
        ),
        (
            {"freeze_fidelities": ["ccsd"], "force_train": [r"readouts\.1"]},
            r"optimizer\.force_train: fidelity_readouts\.1\.\S+ belongs to ccsd, which optimizer.freeze_fidelities",
        ),
        (
            {"freeze_backbone": True, "force_no_train": ["afv", "readouts"]},
            "optimizer.force_no_train, optimizer.freeze_backbone: no weight is left to train",
        ),
    ],
)
def test_impossible_freezing_is_refused(mixed, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(optimizer_config(**changes), mixed(), NAMES)


@pytest.mark.parametrize("heads", [True, False], ids=["own readouts", "common readouts"])
def test_a_third_fidelity_is_added_and_trained_without_a_change_to_the_others(mixed, fixtures_dir, tmp_path, heads):
    """The whole story: train two, add a third by the tool, transfer, train the third alone."""
    config = load_model_config(fixtures_dir / "ref_single_model.yaml")
    old = mixed(heads, 2)
    train(old, build_optimizer(optimizer_config(), old), (0, 1))
    before = {name: energies(old, f) for f, name in enumerate(("dft", "gfn2"))}
    options = {"model_config": config, "fidelity_offset": 200, "use_fidelity_readouts": heads}
    save_checkpoint(tmp_path / "two.pt", old, num_fidelities=2, fidelity_names={0: "dft", 1: "gfn2"}, **options)
    edit_fidelities(tmp_path / "two.pt", tmp_path / "three.pt", [("add", "ccsd=dft"), ("order", "ccsd,gfn2,dft")])

    names = {0: "ccsd", 1: "gfn2", 2: "dft"}
    model = build_model(config, 3, 200, heads)
    transfer_weights(model, load_checkpoint(tmp_path / "three.pt"), {0: 0, 1: 1, 2: 2}, names)
    model.eval()
    for f, source in {0: "dft", 1: "gfn2", 2: "dft"}.items():
        assert torch.equal(energies(model, f), before[source])
    fixed = [] if heads else ["^outputs.energy_mlp"]
    settings = optimizer_config(freeze_backbone=True, freeze_fidelities=["dft", "gfn2"], force_no_train=fixed)
    train(model, build_optimizer(settings, model, names), (0, 1, 2))
    assert torch.equal(energies(model, 1), before["gfn2"])
    assert torch.equal(energies(model, 2), before["dft"])
    assert not torch.equal(energies(model, 0), before["dft"])


def test_weights_are_updated_together_unless_something_else_is_chosen():
    def made(**kwargs):
        return build_optimizer(optimizer_config(**kwargs), Net())

    assert made().defaults["foreach"] is True
    assert made(kwargs={"lr": 1e-3, "foreach": False}).defaults["foreach"] is False
    fused = made(class_="torch.optim.AdamW", kwargs={"lr": 1e-3, "fused": True})
    assert (fused.defaults["foreach"], fused.defaults["fused"]) == (None, True)
    assert "foreach" not in made(class_="torch.optim.LBFGS", kwargs={"lr": 0.1}).defaults
