"""Training and evaluation steps with a small AIMNet2."""

import copy
import math
import warnings
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.modules import Forces
from aimnet2mult.train.ema import WeightAverage
from aimnet2mult.train.engine import BATCH_TYPES, make_evaluator, make_step, prepare_batch
from aimnet2mult.train.loss import MTAdaWLoss, MTLoss
from aimnet2mult.train.metrics import RegMultiMetric

COMPONENTS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    "forces": {
        "fn": "aimnet2mult.train.loss.peratom_loss_fn",
        "weight": 1.0,
        "kwargs": {"key_true": "forces", "key_pred": "forces"},
    },
}
METRICS = {"energy": {"abbr": "E"}, "forces": {"abbr": "F"}}
MODEL = Path(__file__).parents[1] / "fixtures" / "ref_mixed_model.yaml"


def make_model() -> Forces:
    torch.manual_seed(0)
    return Forces(build_model(load_model_config(MODEL), num_fidelities=2))


@pytest.fixture
def model():
    return make_model()


def batch(seed: int = 0, forces: tuple[bool, ...] = (True, False)) -> tuple[dict, dict]:
    """Water of fidelity 0 and a padded H2 of fidelity 1."""
    generator = torch.Generator().manual_seed(seed)
    x = {
        "coord": torch.tensor([[[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], [[5.0, 0, 0], [5.74, 0, 0], [0, 0, 0]]]),
        "numbers": torch.tensor([[8, 1, 1], [201, 201, 0]]),
        "charge": torch.zeros(2),
        "mult": torch.ones(2),
        "_fidelities": torch.tensor([0, 1]),
    }
    x["coord"][:, :2] += 0.05 * torch.randn(2, 2, 3, generator=generator)
    y = {
        "energy": torch.tensor([-0.5, 0.3], dtype=torch.float64),
        "energy_mask": torch.tensor([True, True]),
        "forces": bond_stretching_forces(x["coord"]),
        "forces_mask": torch.tensor(forces),
    }
    return x, y


def bond_stretching_forces(coord: torch.Tensor) -> torch.Tensor:
    """Forces of 1 eV/Å along the bonds from atom 0 to the others: a potential can have them."""
    bonds = coord[:, 1:] - coord[:, :1]
    outward = bonds / bonds.norm(dim=-1, keepdim=True)
    return torch.cat([-outward.sum(dim=1, keepdim=True), outward], dim=1)


def with_nan() -> tuple[dict, dict]:
    """A batch with an energy that is not a number."""
    x, y = batch(1)
    y["energy"][0] = math.nan
    return x, y


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


def step_of(model: nn.Module, loss_fn: MTLoss | None = None, lr: float = 1e-3, **options):
    return make_step(model, adam(model, lr), loss_fn or MTLoss(COMPONENTS), "cpu", **options)


def watch_forces(model: Forces) -> list[bool]:
    """Record for each evaluation of the network whether its positions carry a graph for forces."""
    carried: list[bool] = []
    model.model.register_forward_pre_hook(lambda module, args: carried.append(args[0]["coord"].requires_grad))
    return carried


def test_training_lowers_energy_and_force_errors_of_both_fidelities(model):
    evaluator = make_evaluator(model, MTLoss(COMPONENTS), {"errors": RegMultiMetric(METRICS)}, "cpu")
    before = dict(evaluator.run([batch()]).metrics)
    step = step_of(model, lr=3e-3)
    for _ in range(150):
        step([batch()])
    after = dict(evaluator.run([batch()]).metrics)
    for name in ("loss", "energy_loss", "forces_loss", "fid0/E_rmse", "fid1/E_rmse", "fid0/F_rmse"):
        assert after[name] < 0.3 * before[name], name
    assert "fid1/F_rmse" not in after  # no force labels there


def test_step_does_what_a_few_lines_would(model):
    batches = [batch(0), batch(1, forces=(True, True))]
    loss_fn = MTLoss(COMPONENTS)
    by_hand = copy.deepcopy(model).train()
    optimizers = adam(by_hand), adam(model)
    step = make_step(model, optimizers[1], loss_fn, "cpu")
    for x, y in batches:
        optimizers[0].zero_grad()
        losses = loss_fn({**x, **by_hand(x)}, y)
        losses["loss"].backward()
        gradient = torch.cat([p.grad.flatten() for p in by_hand.parameters() if p.grad is not None])
        optimizers[0].step()
        result = step([(x, y)])
        assert result.applied
        assert set(result.losses) == {"loss", "energy", "forces"}
        for name, value in result.losses.items():
            assert value.item() == losses[name].item()
        assert result.grad_norm.item() == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert_same_state(state_of(model, optimizers[1]), state_of(by_hand, optimizers[0]))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, *others) -> dict:
    """Copies of everything that a step may change."""
    parts = (dict(model.named_parameters()), optimizer.state_dict(), *(other.state_dict() for other in others))
    return copy.deepcopy(dict(enumerate(parts)))


def assert_same_state(found, wanted) -> None:
    """Equal, bit by bit, through dictionaries and lists."""
    assert type(found) is type(wanted)
    if isinstance(found, dict):
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            assert_same_state(value, wanted[key])
    elif isinstance(found, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same_state(one, other)
    elif isinstance(found, torch.Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


@pytest.mark.parametrize(("forces", "asked_for"), [((True, False), True), ((False, False), False)])
def test_forces_are_computed_only_for_batches_that_have_them(model, forces, asked_for):
    asked = watch_forces(model)
    losses = step_of(model)([batch(forces=forces)]).losses
    make_evaluator(model, MTLoss(COMPONENTS), {}, "cpu").run([batch(forces=forces)])
    assert asked == [asked_for] * 2
    assert (losses["forces"].item() > 0) == asked_for


def test_forces_are_not_computed_for_nobody(model):
    energy = MTLoss({"energy": COMPONENTS["energy"]})
    asked = watch_forces(model)
    step_of(model, energy)([batch()])
    make_evaluator(model, energy, {}, "cpu").run([batch()])
    make_evaluator(model, energy, {"errors": RegMultiMetric(METRICS)}, "cpu").run([batch()])
    assert asked == [False, False, True]


def test_metric_of_forces_does_without_where_data_are_read_without_them(model):
    x, y = batch()
    y = {key: value for key, value in y.items() if not key.startswith("forces")}
    energy = MTLoss({"energy": COMPONENTS["energy"]})
    asked = watch_forces(model)
    metrics = make_evaluator(model, energy, {"errors": RegMultiMetric(METRICS)}, "cpu").run([(x, y)]).metrics
    assert asked == [False]
    assert "E_mae" in metrics
    assert "F_mae" not in metrics
    with pytest.raises(ValueError, match=r"loss\.components\.forces: the batch has no label forces"):
        step_of(model)([(x, y)])


@pytest.mark.parametrize("n_batches", [1, 3])
def test_gradient_is_clipped_by_norm(model, n_batches):
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    step = make_step(model, sgd, MTLoss(COMPONENTS), "cpu", max_grad_norm=1e-3)
    result = step([batch(seed) for seed in range(n_batches)])
    moved = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), weights, strict=True)])
    assert result.grad_norm.item() > 1e-3
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_gradient_is_clipped_by_value(model):
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    result = make_step(model, sgd, MTLoss(COMPONENTS), "cpu", max_grad_value=1e-4)([batch()])
    moved = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), weights, strict=True)])
    assert moved.abs().max().item() == pytest.approx(1e-4, rel=1e-2)
    assert result.grad_norm.item() > moved.norm().item()


def test_small_gradients_are_not_clipped(model):
    results, moved = [], []
    for limits in ({}, {"max_grad_norm": 1e3, "max_grad_value": 1e3}):
        twin = copy.deepcopy(model)
        results.append(step_of(twin, **limits)([batch()]))
        moved.append([p.detach() for p in twin.parameters()])
    assert results[0].grad_norm == results[1].grad_norm
    assert_same_state(moved[0], moved[1])


def test_step_without_batches_is_refused(model):
    with pytest.raises(ValueError, match="one batch or more"):
        step_of(model)([])


# --- what is not finite -------------------------------------------------------------------------


class Run:
    """A model in training with everything that has a state."""

    def __init__(self) -> None:
        self.model = make_model()
        self.optimizer = adam(self.model, lr=3e-3)
        self.loss_fn = MTAdaWLoss(COMPONENTS, eta=0.1)
        self.average = WeightAverage(self.model, 0.99)
        self.step = make_step(self.model, self.optimizer, self.loss_fn, "cpu", max_grad_norm=10.0)

    def take(self, batches):
        """A step, and what a loop does after it."""
        result = self.step(batches)
        if result.applied:
            self.average.update(self.model)
        return result

    @property
    def state(self) -> dict:
        return state_of(self.model, self.optimizer, self.loss_fn, self.average)


@pytest.mark.parametrize("bad", [[with_nan()], [batch(3), with_nan()], [with_nan(), batch(3)]])
@pytest.mark.parametrize("first", [True, False])
def test_step_that_is_not_finite_leaves_no_trace(bad, first):
    with_bad, without = Run(), Run()
    for batches in [] if first else [[batch(0)], [batch(1), batch(2)]]:
        assert with_bad.take(batches).applied
        without.take(batches)
    before = with_bad.state
    result = with_bad.take(bad)
    assert not result.applied
    assert math.isnan(result.losses["energy"])
    assert math.isnan(result.losses["loss"])
    assert_same_state(with_bad.state, before)
    for batches in ([batch(4)], [batch(5), batch(6)]):
        assert with_bad.take(batches).losses == without.take(batches).losses
        assert_same_state(with_bad.state, without.state)


class InfiniteSlope(nn.Module):
    """A finite loss whose gradient is infinite."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, data, compute_forces, parts):
        energy = self.inner(data, compute_forces=False)["energy"]
        return {"energy": energy.detach() + (energy - energy.detach()).abs().sqrt()}


def test_gradient_that_is_not_finite_is_left_out_too(model):
    before = copy.deepcopy(list(model.parameters()))
    result = step_of(InfiniteSlope(model), MTLoss({"energy": COMPONENTS["energy"]}))([batch()])
    assert math.isfinite(result.losses["loss"])
    assert not math.isfinite(result.grad_norm)
    assert not result.applied
    assert_same_state(list(model.parameters()), before)


def nan_without_slope(y_pred, y_true):
    """NaN where a molecule has charge 1, zero elsewhere; without gradient."""
    return (0.0 * y_pred["energy"]).sum() + torch.where(y_pred["charge"] == 1, math.nan, 0.0).sum()


def nan_on_one(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    model = make_model()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = adam(model)
    loss_fn = MTAdaWLoss({**COMPONENTS, "own": {"fn": nan_without_slope, "weight": 1.0}}, eta=0.1)
    step = make_step(parallel, optimizer, loss_fn, "cpu")
    x, y = batch(rank)
    charged = {**x, "charge": torch.tensor([1.0, 0.0])}
    good, nan_slope, nan_value = [(x, y), batch(7)], [with_nan(), (x, y)], [(x, y), (charged, y)]
    found = []
    for bad, bad_rank in ((nan_slope, 0), (nan_slope, 1), (nan_value, 0), (nan_value, 1)):
        step(good)
        before = state_of(model, optimizer, loss_fn)
        result = step(bad if rank == bad_rank else good)
        same = state_of(model, optimizer, loss_fn)
        assert_same_state(same, before)
        found.append((result.applied, math.isfinite(result.losses["loss"]), math.isfinite(result.grad_norm)))
    found.append(step(good).losses["loss"].item())
    torch.save([found, state_of(model, optimizer, loss_fn)], f"{folder}/{rank}.pt")


def good_only(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    model = make_model()
    optimizer = adam(model)
    loss_fn = MTAdaWLoss({**COMPONENTS, "own": {"fn": nan_without_slope, "weight": 1.0}}, eta=0.1)
    step = make_step(DistributedDataParallel(model, find_unused_parameters=True), optimizer, loss_fn, "cpu")
    for _ in range(5):
        loss = step([batch(rank), batch(7)]).losses["loss"].item()
    torch.save([loss, state_of(model, optimizer, loss_fn)], f"{folder}/good{rank}.pt")


def count_exchanges(rank: int, folder: str) -> None:
    """Count how often gradients go from process to process, in steps of one batch and of three."""
    model = make_model()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    sizes: list[int] = []

    def exchange(state, bucket):
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    parallel.register_comm_hook(None, exchange)
    step = make_step(parallel, adam(model), MTLoss(COMPONENTS), "cpu")
    counts = []
    for n_batches in (1, 1, 3):
        step([batch(seed, forces=(True, seed == rank)) for seed in range(n_batches)])
        counts.append(sum(sizes))
        sizes.clear()
    torch.save(counts, f"{folder}/exchanges{rank}.pt")


def several_processes(rank: int, folder: str) -> None:
    nan_on_one(rank, folder)
    good_only(rank, folder)
    count_exchanges(rank, folder)


def test_processes_agree_to_leave_a_step_out_and_exchange_gradients_once(tmp_path):
    idist.spawn("gloo", several_processes, args=(str(tmp_path),), nproc_per_node=2)
    (first, one), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    # A NaN that has a gradient reaches all through it; one that has none is known to its process alone.
    assert first[:-1] == [(False, False, False)] * 2 + [(False, False, True)] * 2
    assert_same_state(one, other)
    loss, state = torch.load(tmp_path / "good0.pt")
    assert first[-1] == loss
    assert_same_state(one, state)
    n_weights = sum(p.numel() for p in make_model().parameters() if p.requires_grad)
    assert torch.load(tmp_path / "exchanges0.pt") == [n_weights] * 3


# --- precision ----------------------------------------------------------------------------------


def test_float64_takes_batches_as_they_are_read(model):
    model = model.double()
    x, y = batch()
    double = [{k: v.double() if v.is_floating_point() else v for k, v in part.items()} for part in (x, y)]
    losses = [
        step_of(copy.deepcopy(model), precision="float64")([(x, y)]).losses,
        step_of(copy.deepcopy(model))([tuple(double)]).losses,
    ]
    assert losses[0] == losses[1]
    metrics = make_evaluator(model, MTLoss(COMPONENTS), {}, "cpu", precision="float64").run([(x, y)]).metrics
    assert metrics["loss"] == pytest.approx(losses[0]["loss"].item(), rel=1e-12)
    assert x["coord"].dtype == torch.float32


def test_unknown_precision_is_refused(model):
    with pytest.raises(ValueError, match=r"trainer.precision: unknown precision float16; did you mean float"):
        step_of(model, precision="float16")
    assert set(BATCH_TYPES) == {"float32", "float64", "bf16"}


# --- what stays as it is ------------------------------------------------------------------------


def test_evaluation_leaves_weights_and_adaptive_factors_alone(model):
    loss_fn = MTAdaWLoss(COMPONENTS, eta=0.1)
    weights = [p.detach().clone() for p in model.parameters()]
    evaluator = make_evaluator(model, loss_fn, {}, "cpu")
    first = evaluator.run([batch()]).metrics["loss"]
    assert evaluator.run([batch()]).metrics["loss"] == first
    assert torch.equal(loss_fn.scales, loss_fn.initial_scales)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    step_of(model, loss_fn, lr=1e-9)([batch()])
    assert not torch.equal(loss_fn.scales, loss_fn.initial_scales)


def test_batch_and_caller_keep_their_tensors(model):
    x, y = batch()
    copies = {key: value.clone() for key, value in (x | y).items()}
    step_of(model)([(x, y)])
    make_evaluator(model, MTLoss(COMPONENTS), {}, "cpu").run([(x, y)])
    for key, value in (x | y).items():
        assert torch.equal(value, copies[key])
        assert not value.requires_grad


def test_prepare_batch_moves_everything():
    x, y = prepare_batch(batch(), "cpu")
    assert set(x) == {"coord", "numbers", "charge", "mult", "_fidelities"}
    assert set(y) == {"energy", "energy_mask", "forces", "forces_mask"}
    assert (x["coord"].dtype, y["energy"].dtype, y["forces_mask"].dtype) == (torch.float32, torch.float64, torch.bool)
    x, y = prepare_batch(batch(), "cpu", dtype=torch.float64)
    assert x["coord"].dtype == y["forces"].dtype == torch.float64
    assert (x["numbers"].dtype, y["forces_mask"].dtype) == (torch.int64, torch.bool)


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu_are_those_on_the_cpu(model):
    batches = [batch(0), batch(1)]
    on_cpu = step_of(model, lr=1e-9)(batches)
    model = model.to("cuda")
    on_gpu = make_step(model, adam(model, lr=1e-9), MTLoss(COMPONENTS), "cuda")(batches)
    for key, value in on_cpu.losses.items():
        assert on_gpu.losses[key].item() == pytest.approx(value.item(), rel=1e-3)
    assert on_gpu.grad_norm.item() == pytest.approx(on_cpu.grad_norm.item(), rel=1e-3)
    evaluator = make_evaluator(model, MTLoss(COMPONENTS), {"errors": RegMultiMetric(METRICS)}, "cuda")
    assert evaluator.run([batches[0]]).metrics["loss"] > 0


class Springs(nn.Module):
    """Energies and forces without anything that waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Embedding(300, 1)

    def forward(self, data, compute_forces=True, parts=None):
        strength = self.strength(data["numbers"])
        energy = 0.5 * (strength * data["coord"] ** 2).sum(dim=(1, 2)).double()
        return {"energy": energy, "forces": -strength * data["coord"]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_the_gpu_once():
    model = Springs().to("cuda")
    components = {**COMPONENTS, "energy": {**COMPONENTS["energy"], "fidelity_weights": {1: 2.0}}}
    loss_fn = MTAdaWLoss(components, eta=0.1)
    step = make_step(model, adam(model), loss_fn, "cuda", max_grad_norm=1.0, max_grad_value=1.0, non_blocking=True)
    batches = [tuple({k: v.pin_memory() for k, v in part.items()} for part in batch(seed)) for seed in range(2)]
    average = WeightAverage(model, 0.9)
    assert step(batches).applied
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step(batches)
            average.update(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [f"{wait.filename}:{wait.lineno}: {wait.message}" for wait in waits]
