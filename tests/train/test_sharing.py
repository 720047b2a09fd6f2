"""How fidelities share: starts that are equal or not, one embedding for all, a penalty that keeps them close."""

import copy
import math
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.base import build_model, load_checkpoint, load_model_config, load_weights
from aimnet2mult.models.mixed_fidelity_aimnet2 import embedding_blocks, fidelity_slice, has_shared_embedding
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import encode_fidelity
from aimnet2mult.train.acceleration import CompiledForces
from aimnet2mult.train.ema import WeightAverage
from aimnet2mult.train.engine import make_step
from aimnet2mult.train.fidelity_specific_utils import transfer_weights
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.optimizer import build_optimizer
from aimnet2mult.train.resume import read_job
from aimnet2mult.train.runner import run_training
from aimnet2mult.train.schema import ClosenessConfig, GradClipConfig, OptimizerConfig
from aimnet2mult.train.sharing import (
    Closeness,
    build_closeness,
    fidelity_weights,
    share_embedding,
    start_independently,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = {0: "dft", 1: "gfn2", 2: "gfn1"}
OPTIMIZERS = {
    "torch.optim.SGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    "torch.optim.AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "torch.optim.RAdam": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "torch.optim.Adagrad": {"lr": 1e-2, "weight_decay": 0.1},
}
COMPONENTS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    "forces": {
        "fn": "aimnet2mult.train.loss.peratom_loss_fn",
        "weight": 1.0,
        "kwargs": {"key_true": "forces", "key_pred": "forces"},
    },
}


def model_config():
    return load_model_config(FIXTURES / "ref_single_model.yaml")


def untrained(num_fidelities=3, heads=True, seed=4):
    torch.manual_seed(seed)
    return build_model(model_config(), num_fidelities, 200, heads)


def blocks(model):
    return embedding_blocks(model.afv.weight.detach(), model.num_fidelities, model.fidelity_offset)


def batch(*fidelities, seed=0, dtype=torch.float32):
    """Water, and hydrogen cyanide, at each of the fidelities, with energies and forces that differ between these."""
    numbers = torch.tensor([[8, 1, 1], [6, 7, 1]]).repeat(len(fidelities), 1)
    coord = torch.tensor(
        [[[0.0, 0, 0], [0.9, 0.1, 0], [-0.3, 0.9, 0]], [[0, 0, 0], [1.15, 0, 0], [-1.06, 0.1, 0]]], dtype=dtype
    )
    coord = coord.repeat(len(fidelities), 1, 1)
    coord += 0.05 * torch.randn(coord.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    which = torch.tensor(fidelities).repeat_interleave(2)
    x = {
        "coord": coord,
        "numbers": encode_fidelity(numbers, which.unsqueeze(1), 200),
        "charge": torch.zeros(len(which), dtype=dtype),
        "mult": torch.ones(len(which), dtype=dtype),
        "_fidelities": which,
    }
    return x, {"energy": 1.0 + which.double(), "forces": (1.0 + which.view(-1, 1, 1)) * coord.sin()}


def optimizer_config(class_="torch.optim.RAdam", **changes):
    settings = {
        "kwargs": OPTIMIZERS[class_],
        "param_groups": {},
        "force_train": [],
        "force_no_train": [],
        "freeze_backbone": False,
        "freeze_fidelities": [],
        "grad_clip": GradClipConfig(max_norm=None, max_value=None),
    }
    return OptimizerConfig(class_=class_, **{**settings, **changes})


# --------------------------------------------------------------------------------------------------
# start
# --------------------------------------------------------------------------------------------------


def test_independent_fidelities_differ_and_the_first_is_as_with_equal_ones():
    again = untrained()
    start_independently(again, model_config())
    equal, model = untrained(), untrained()
    start_independently(model, model_config())
    for first, second in ((0, 1), (0, 2), (1, 2)):
        rows = (blocks(model)[first] - blocks(model)[second]).abs().amax(dim=1)
        assert (rows > 0.01).all()
        heads = [fidelity_slice(model.state_dict(), f, 200) for f in (first, second)]
        assert not torch.equal(*(head["outputs.energy_mlp.mlp.0.weight"] for head in heads))
        # Tables start alike: there is nothing random about them.
        assert torch.equal(*(head["outputs.atomic_shift.shifts.weight"] for head in heads))
    for key, value in fidelity_slice(equal.state_dict(), 0, 200).items():
        assert torch.equal(fidelity_slice(model.state_dict(), 0, 200)[key], value)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    load_weights(untrained(), model.state_dict())
    scale = blocks(model)[1].square().mean(dim=1)
    torch.testing.assert_close(scale, torch.ones_like(scale), atol=1e-5, rtol=0)  # rows like those of the first


def test_independent_heads_on_one_embedding():
    model = untrained()
    start_independently(model, model_config(), embedding=False)
    assert has_shared_embedding(model)
    x, _ = batch(0, 1, 2)
    energies = model(x)["energy"].view(3, 2)
    assert (energies[0] - energies[1]).abs().min() > 1e-4


def test_independent_rows_with_common_readouts_and_a_single_fidelity():
    model = untrained(heads=False)
    outputs = {key: value.clone() for key, value in model.outputs.state_dict().items()}
    start_independently(model, model_config())
    assert not has_shared_embedding(model)
    assert all(torch.equal(value, outputs[key]) for key, value in model.outputs.state_dict().items())
    single = untrained(1)
    before = copy.deepcopy(single.state_dict())
    start_independently(single, model_config())
    assert all(torch.equal(value, before[key]) for key, value in single.state_dict().items())


# --------------------------------------------------------------------------------------------------
# one embedding
# --------------------------------------------------------------------------------------------------


class OneBlock(nn.Module):
    """A table made of the rows of one fidelity, for all: what sharing stands for."""

    def __init__(self, n_rows):
        super().__init__()
        self.n_rows = n_rows

    def forward(self, rows):
        table = rows.new_zeros(self.n_rows, rows.shape[1])
        for first in range(1, self.n_rows, 200):
            table[first : first + 128] = rows
        return table

    def right_inverse(self, table):
        return table[1:129].clone()


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_training_is_that_of_one_row_for_all(optimizer_class):
    model = untrained().double()
    single = copy.deepcopy(model)
    parametrize.register_parametrization(single.afv, "weight", OneBlock(len(model.afv.weight)), unsafe=True)
    average = WeightAverage(model, 0.9)
    first = model.afv.weight.detach().clone()
    steps = []
    for trained in (model, single):
        optimizer = build_optimizer(optimizer_config(optimizer_class), trained)
        if trained is model:
            share_embedding(trained, optimizer, NAMES)
        steps.append(make_step(Forces(trained), optimizer, MTLoss(COMPONENTS), "cpu", max_grad_norm=0.5))
    for seed in range(4):
        batches = [batch(0, 1, seed=seed, dtype=torch.float64), batch(0, seed=9 + seed, dtype=torch.float64)]
        found, expected = (step(batches) for step in steps)
        average.update(model)
        assert found.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-9)
        assert found.grad_norm > 0.5  # so that clipping does something
        assert has_shared_embedding(model)
        assert has_shared_embedding(average.model)
    torch.testing.assert_close(blocks(model)[2], single.afv.weight[401:529].detach(), atol=1e-9, rtol=0)
    assert (model.afv.weight[400 + 7] - first[400 + 7]).abs().max() > 1e-3  # no nitrogen of fidelity 2 was seen
    for key, value in model.state_dict().items():
        if key != "afv.weight":
            torch.testing.assert_close(value, single.state_dict()[key], atol=1e-9, rtol=0)


def test_rows_that_differ_are_refused_and_init_from_makes_them_one():
    model = untrained()
    optimizer = build_optimizer(optimizer_config(), model)
    other = load_checkpoint(FIXTURES / "ref_mixed.pt")
    transfer_weights(model, other)
    message = (
        r"sharing\.embedding: shared, but .* dft and gfn2 have other rows of H \(1\), He \(2\), .*\. Let all start "
        r"from one fidelity of the checkpoint \(init_from=\{dft: dft, gfn2: dft, gfn1: dft\}"
    )
    with pytest.raises(ConfigError, match=message):
        share_embedding(model, optimizer, NAMES)
    transfer_weights(model, other, {0: 1, 1: 1, 2: 1})
    share_embedding(model, optimizer, NAMES)
    assert not torch.equal(blocks(model)[0], blocks(untrained())[0])


def test_a_new_head_learns_on_an_embedding_that_stays():
    model = untrained()
    before = copy.deepcopy(model.state_dict())
    config = optimizer_config(freeze_backbone=True, freeze_fidelities=["dft", "gfn1"], force_no_train=["^afv"])
    optimizer = build_optimizer(config, model, NAMES)
    share_embedding(model, optimizer, NAMES)
    make_step(Forces(model), optimizer, MTLoss(COMPONENTS), "cpu")([batch(0, 1, 2)])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("fidelity_readouts.1.") for key in changed)


def test_one_fidelity_needs_nothing():
    model = untrained(1)
    optimizer = build_optimizer(optimizer_config(), model)
    share_embedding(model, optimizer, {0: "dft"})
    assert not model.afv.weight._backward_hooks
    assert build_closeness(ClosenessConfig(), model, [3], {0: "dft"}) is None


# --------------------------------------------------------------------------------------------------
# closeness
# --------------------------------------------------------------------------------------------------


def apart(model):
    """Make the fidelities differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for f in range(model.num_fidelities):
            for weight in fidelity_weights(model, f).values():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def flat(model, fidelity):
    weights = fidelity_weights(model, fidelity)
    return torch.cat([weights[name].detach().double().flatten() for name in sorted(weights)])


@pytest.mark.parametrize("heads", [True, False])
def test_weights_of_a_fidelity_are_those_of_its_slice(heads):
    model = apart(untrained(heads=heads))
    for f in range(3):
        alone = fidelity_slice(model.state_dict(), f, 200)
        for name, weight in fidelity_weights(model, f).items():
            value = alone[name.replace("fidelity_readouts.", "outputs.")]
            table = "afv" in name or "shifts" in name
            assert torch.equal(weight, value[1:] if table else value), name
    assert len(fidelity_weights(model, 0)) == (8 if heads else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [None, 0, 2])
def test_equal_fidelities_cost_nothing(dtype, target):
    model = untrained().to(dtype)
    closeness = Closeness(model, [5, 50, 7], weight=2.0, target=target)
    assert closeness.add_gradient().item() == 0.0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_penalty_and_gradient_against_a_few_lines():
    model = apart(untrained())
    theta = [flat(model, f) for f in range(3)]
    counts = [10, 40, 1000]
    for target, factors in ((2, {0: 1.0, 1: 0.25}), (None, {0: 1.0, 1: 0.25, 2: 0.01})):
        centre = sum(theta) / 3 if target is None else theta[target]
        closeness = Closeness(model, counts, weight=0.7, target=target)
        assert closeness.factors == pytest.approx(factors)
        model.zero_grad()
        penalty = closeness.add_gradient()
        expected = sum(0.5 * factor * (theta[f] - centre).square().sum() for f, factor in factors.items())
        assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
        for f in range(3):
            # A weight decay of 0.7, and less where there are more molecules; none of what others are drawn to.
            wanted = 0.7 * factors.get(f, 0.0) * (theta[f] - centre)
            row = model.afv.weight.grad[f * 200 + 8].double()
            at = sorted(fidelity_weights(model, f)).index("afv.weight")
            assert at == 0
            torch.testing.assert_close(row, wanted[: 128 * len(row)].view(128, -1)[7], atol=1e-6, rtol=1e-5)
            head = model.fidelity_readouts[f]["energy_mlp"].mlp[0].weight.grad
            found = torch.zeros(1) if head is None else head
            assert found.norm().item() == pytest.approx(0.7 * factors.get(f, 0.0) * _distance(model, f, target), 1e-4)
        others = [p.grad for name, p in model.named_parameters() if not name.startswith(("afv", "fidelity_"))]
        assert all(grad is None for grad in others)


def _distance(model, f, target):
    weights = [model.fidelity_readouts[k]["energy_mlp"].mlp[0].weight.detach() for k in range(3)]
    centre = sum(weights) / 3 if target is None else weights[target]
    return (weights[f] - centre).norm().item()


def test_it_is_added_once_to_a_step_and_logged():
    results = []
    for weight in (0.0, 0.3):
        model = apart(untrained()).double()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        closeness = Closeness(model, [2, 4, 8], weight, target=2)
        step = make_step(Forces(model), optimizer, MTLoss(COMPONENTS), "cpu", closeness=closeness)
        before, target = flat(model, 0), flat(model, 2)
        result = step([batch(0, 1, seed=1, dtype=torch.float64), batch(0, seed=2, dtype=torch.float64)])
        results.append((result, flat(model, 0) - before, before - target))
    (without, free, _), (found, drawn, distance) = results
    assert list(found.losses) == ["loss", "energy", "forces", "closeness"]
    penalty = found.losses["closeness"]
    assert penalty > 0
    assert without.losses["closeness"] == penalty
    assert (found.losses["loss"] - without.losses["loss"]).item() == pytest.approx(0.3 * penalty.item())
    assert found.losses["energy"] == without.losses["energy"]
    torch.testing.assert_close(drawn - free, -1e-3 * 0.3 * distance, atol=1e-12, rtol=1e-9)


def test_decay_counts_steps_that_were_applied_and_is_remembered():
    model = apart(untrained())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    closeness = Closeness(model, [1, 1, 1], 1.0, decay=4)
    step = make_step(Forces(model), optimizer, MTLoss(COMPONENTS), "cpu", closeness=closeness)
    weights = []
    for _ in range(6):
        weights.append(closeness.weight)
        assert step([batch(0, 1, 2)]).applied
    assert weights == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    x, y = batch(0)
    assert not step([(x, {**y, "energy": y["energy"] * math.nan})]).applied
    assert closeness.state_dict() == {"steps": 6}
    again = Closeness(model, [1, 1, 1], 1.0, decay=8)
    again.load_state_dict(closeness.state_dict())
    assert again.weight == 0.25


def test_frozen_fidelities_are_not_drawn():
    model = apart(untrained())
    before = [flat(model, f) for f in range(3)]
    config = optimizer_config("torch.optim.AdamW", freeze_fidelities=["dft"], freeze_backbone=True)
    optimizer = build_optimizer(config, model, NAMES)
    closeness = Closeness(model, [1, 1, 1], 0.1)
    penalty = make_step(Forces(model), optimizer, MTLoss(COMPONENTS), "cpu", closeness=closeness)([batch(0)])
    assert torch.equal(flat(model, 0), before[0])
    assert model.afv.weight.grad[1:129].abs().max() == 0
    assert all(not torch.equal(flat(model, f), before[f]) for f in (1, 2))  # although no molecule is theirs
    assert penalty.applied


def test_an_element_that_a_fidelity_lacks_follows_the_others():
    distances = {}
    for weight in (0.0, 3.0):
        model = untrained()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        closeness = Closeness(model, [2, 20, 20], weight, target=1)
        step = make_step(Forces(model), optimizer, MTLoss(COMPONENTS), "cpu", closeness=closeness)
        only_water = {key: value[:1] for key, value in batch(0)[0].items()}, {k: v[:1] for k, v in batch(0)[1].items()}
        for seed in range(30):
            step([batch(1, 2, seed=seed), only_water])
        nitrogen = [block[7 - 1] for block in blocks(model)]
        moved = (nitrogen[1] - blocks(untrained())[1][7 - 1]).norm()
        distances[weight] = ((nitrogen[0] - nitrogen[1]).norm() / moved).item()
    assert distances[0.0] == pytest.approx(1.0)
    assert distances[3.0] < 0.3


@pytest.mark.parametrize(("to", "target"), [("mean", None), ("gfn2", 1), ("2", 2)])
def test_settings_name_the_target(to, target):
    closeness = build_closeness(ClosenessConfig(weight=0.5, to=to, decay=10), untrained(), [4, 2, 8], NAMES)
    assert (closeness.target, closeness.weight, closeness.decay) == (target, 0.5, 10)
    with pytest.raises(ConfigError, match=r"sharing\.closeness\.to: there is no fidelity gfn; did you mean gfn"):
        build_closeness(ClosenessConfig(weight=0.5, to="gfn"), untrained(), [4, 2, 8], NAMES)


# --------------------------------------------------------------------------------------------------
# with other ways of training
# --------------------------------------------------------------------------------------------------


def test_compiled_steps_are_the_same():
    config, gradients = model_config(), []
    config["kwargs"]["hidden"] = [[8], [8]]  # half of the time of tracing
    del config["kwargs"]["outputs"]["lrcoulomb"]
    for wrap in (lambda forces: forces, lambda forces: CompiledForces(forces, backend="eager")):
        torch.manual_seed(4)
        model = build_model(config, 3)
        start_independently(model, config, embedding=False)
        model = model.double()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        share_embedding(model, optimizer, NAMES)
        closeness = Closeness(model, [1, 2, 3], 0.1, target=0)
        step = make_step(wrap(Forces(model)), optimizer, MTLoss(COMPONENTS), "cpu", closeness=closeness)
        result = step([batch(0, 1, dtype=torch.float64)])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        gradients[-1]["norm"] = result.grad_norm
        assert has_shared_embedding(model)
    torch.compiler.reset()
    eager, compiled = gradients
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-10, rtol=1e-8)


def sharing_steps(model, wrap, groups):
    """Some steps with one embedding and a penalty; batches of each step."""
    optimizer = build_optimizer(optimizer_config(), model)
    share_embedding(model, optimizer, NAMES)
    closeness = Closeness(model, [1, 2, 3], 0.2, target=0, decay=5)
    step = make_step(wrap(Forces(model)), optimizer, MTLoss(COMPONENTS), "cpu", closeness=closeness)
    for group in groups:
        step(group)
    assert has_shared_embedding(model)
    return model.state_dict()


def double_start():
    model = untrained()
    start_independently(model, model_config(), embedding=False)
    return model.double()


def two_processes(rank, folder):
    torch.set_num_threads(1)
    # Nobody has molecules of the third fidelity, and the second process none of the second.
    groups = [[batch(*((0, 1), (0,))[rank], seed=2 * i + rank, dtype=torch.float64)] for i in range(3)]
    state = sharing_steps(double_start(), lambda m: DistributedDataParallel(m, find_unused_parameters=True), groups)
    torch.save(state, f"{folder}/{rank}.pt")


def test_two_processes_share_as_one_does(tmp_path):
    idist.spawn("gloo", two_processes, args=(str(tmp_path),), nproc_per_node=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    groups = [
        [batch(0, 1, seed=2 * i, dtype=torch.float64), batch(0, seed=2 * i + 1, dtype=torch.float64)] for i in range(3)
    ]
    expected = sharing_steps(double_start(), lambda m: m, groups)
    for key, value in expected.items():
        assert torch.equal(one[key], other[key])
        torch.testing.assert_close(one[key], value, atol=1e-10, rtol=1e-8)


def test_a_run_that_goes_on_shares_as_before(tiny_fidelities, tmp_path):
    settings = ["device=cpu", "run_name=r", "report=false", "scheduler=null", "log_frequency.train=1"]
    settings += ["optimizer.kwargs={lr: 5e-3, weight_decay: 1e-2}", "data.samplers.train.kwargs.batch_size=256"]
    settings += ["sharing={start: independent, embedding: shared, closeness: {weight: 0.01, to: gfn2, decay: 9}}"]
    settings += tiny_fidelities(dft=0, gfn2=1)
    model, runs = FIXTURES / "ref_single_model.yaml", [tmp_path / "run", tmp_path / "whole"]
    run_training(read_job(None, model, [*settings, "trainer.epochs=1", f"checkpoint.dirname={runs[0]}"]))
    run_training(read_job(resume=runs[0], overrides=["trainer.epochs=2"]))
    result = run_training(read_job(None, model, [*settings, "trainer.epochs=2", f"checkpoint.dirname={runs[1]}"]))
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
    logged = [record["train/closeness_loss"] for record in result.records if "train/closeness_loss" in record]
    assert len(logged) == 16
    assert logged == sorted(logged, reverse=True)  # heads that started far apart come closer
    contents = [load_checkpoint(path / "model.pt") for path in runs]
    weights = [content["model"] for content in contents]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    trained = build_model(model_config(), 2)
    load_weights(trained, weights[0])
    assert has_shared_embedding(trained)
