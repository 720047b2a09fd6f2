"""Training and evaluation steps with a small AIMNet2."""

import copy
import math

import pytest
import torch
from ignite.engine import Events
from torch import nn

from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.modules import Forces
from aimnet2mult.train.engine import NotFiniteError, make_evaluator, make_trainer, prepare_batch
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
OUTPUTS = {"loss", "energy", "forces", "grad_norm"}


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    config = load_model_config(request.config.rootpath / "tests" / "fixtures" / "ref_mixed_model.yaml")
    return Forces(build_model(config, num_fidelities=2))


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


def trainer_of(model: nn.Module, loss_fn: MTLoss | None = None, lr: float = 1e-3, **options):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    return make_trainer(model, optimizer, loss_fn or MTLoss(COMPONENTS), "cpu", **options)


def watch_forces(model: Forces) -> list[bool]:
    """Record for each evaluation of the network whether its positions carry a graph for forces."""
    carried: list[bool] = []
    model.model.register_forward_pre_hook(lambda module, args: carried.append(args[0]["coord"].requires_grad))
    return carried


def test_training_lowers_energy_and_force_errors_of_both_fidelities(model):
    evaluator = make_evaluator(model, MTLoss(COMPONENTS), {"errors": RegMultiMetric(METRICS)}, "cpu")
    before = dict(evaluator.run([batch()]).metrics)
    trainer = trainer_of(model, lr=3e-3)
    trainer.run([batch()], max_epochs=150)
    after = dict(evaluator.run([batch()]).metrics)
    for name in ("loss", "energy_loss", "forces_loss", "fid0/E_rmse", "fid1/E_rmse", "fid0/F_rmse"):
        assert after[name] < 0.3 * before[name], name
    assert "fid1/F_rmse" not in after  # no force labels there


def test_step_does_what_a_few_lines_would(model):
    x, y = batch()
    loss_fn = MTLoss(COMPONENTS)
    trainer = trainer_of(model)
    output = trainer.run([(x, y)]).output
    assert set(output) == OUTPUTS
    assert not any(value.requires_grad for value in output.values())

    # A second step by hand on the weights after the first one gives the same as the engine.
    twin = copy.deepcopy(model).train()
    out = {**x, **twin(x)}
    loss = loss_fn(out, y)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    second = trainer_of(model).run([(x, y)]).output
    assert second["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert second["grad_norm"].item() == pytest.approx(gradient.norm().item(), rel=1e-5)


@pytest.mark.parametrize(("forces", "asked_for"), [((True, False), True), ((False, False), False)])
def test_forces_are_computed_only_for_batches_that_have_them(model, forces, asked_for):
    asked = watch_forces(model)
    output = trainer_of(model).run([batch(forces=forces)]).output
    make_evaluator(model, MTLoss(COMPONENTS), {}, "cpu").run([batch(forces=forces)])
    assert asked == [asked_for] * 2
    assert (output["forces"].item() > 0) == asked_for


def test_forces_are_not_computed_for_nobody(model):
    energy = MTLoss({"energy": COMPONENTS["energy"]})
    asked = watch_forces(model)
    trainer_of(model, energy).run([batch()])
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
        trainer_of(model).run([(x, y)])


def test_gradient_is_clipped_by_norm(model):
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    trainer = make_trainer(model, sgd, MTLoss(COMPONENTS), "cpu", max_grad_norm=1e-3)
    output = trainer.run([batch()]).output
    moved = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), weights, strict=True)])
    assert output["grad_norm"].item() > 1e-3
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_gradient_is_clipped_by_value(model):
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    make_trainer(model, sgd, MTLoss(COMPONENTS), "cpu", max_grad_value=1e-4).run([batch()])
    moved = torch.cat([(p - w).flatten() for p, w in zip(model.parameters(), weights, strict=True)])
    assert moved.abs().max().item() == pytest.approx(1e-4, rel=1e-2)


def test_loss_that_is_not_finite_stops_before_the_weights_change(model):
    good, (x, y) = batch(), batch()
    y["energy"][0] = math.nan
    trainer = trainer_of(model)
    after_good = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def remember(engine) -> None:
        after_good.append([p.detach().clone() for p in model.parameters()])

    with pytest.raises(NotFiniteError, match=r"loss is not finite in iteration 2 \(epoch 1\): .*energy nan"):
        trainer.run([good, (x, y)])
    assert len(after_good) == 1
    for p, w in zip(model.parameters(), after_good[0], strict=True):
        assert torch.equal(p, w)


def test_gradient_that_is_not_finite_stops_too(model):
    class InfiniteSlope(nn.Module):
        """A finite loss whose gradient is infinite."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, data, compute_forces, parts):
            energy = self.inner(data, compute_forces=False)["energy"]
            return {"energy": energy.detach() + (energy - energy.detach()).abs().sqrt()}

    with pytest.raises(NotFiniteError, match="the gradient is not finite in iteration 1"):
        trainer_of(InfiniteSlope(), MTLoss({"energy": COMPONENTS["energy"]})).run([batch()])


def test_evaluation_leaves_weights_and_adaptive_factors_alone(model):
    loss_fn = MTAdaWLoss(COMPONENTS, eta=0.1)
    weights = [p.detach().clone() for p in model.parameters()]
    evaluator = make_evaluator(model, loss_fn, {}, "cpu")
    first = evaluator.run([batch()]).metrics["loss"]
    assert evaluator.run([batch()]).metrics["loss"] == first
    assert torch.equal(loss_fn.scales, loss_fn.initial_scales)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    trainer_of(model, loss_fn, lr=1e-9).run([batch()])
    assert not torch.equal(loss_fn.scales, loss_fn.initial_scales)


def test_batch_and_caller_keep_their_tensors(model):
    x, y = batch()
    copies = {key: value.clone() for key, value in (x | y).items()}
    trainer_of(model).run([(x, y)])
    make_evaluator(model, MTLoss(COMPONENTS), {}, "cpu").run([(x, y)])
    for key, value in (x | y).items():
        assert torch.equal(value, copies[key])
        assert not value.requires_grad


def test_prepare_batch_moves_everything():
    x, y = prepare_batch(batch(), "cpu")
    assert set(x) == {"coord", "numbers", "charge", "mult", "_fidelities"}
    assert set(y) == {"energy", "energy_mask", "forces", "forces_mask"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_gpu_are_those_on_the_cpu(model):
    on_cpu = trainer_of(model, lr=1e-9).run([batch()]).output
    model = model.to("cuda")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    on_gpu = make_trainer(model, optimizer, MTLoss(COMPONENTS), "cuda").run([batch()]).output
    for key, value in on_cpu.items():
        assert on_gpu[key].item() == pytest.approx(value.item(), rel=1e-3)
    evaluator = make_evaluator(model, MTLoss(COMPONENTS), {"errors": RegMultiMetric(METRICS)}, "cuda")
    assert evaluator.run([batch()]).metrics["loss"] == pytest.approx(on_cpu["loss"].item(), rel=1e-3)
