"""Losses: a batch costs the mean of what its labelled molecules cost alone."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from aimnet2mult.train.loss import (
    MTAdaWLoss,
    MTLoss,
    dipole_loss_fn,
    energy_loss_fn,
    mse_loss_fn,
    peratom_loss_fn,
    quadrupole_loss_fn,
)

forces_loss_fn = partial(peratom_loss_fn, key_pred="forces", key_true="forces")
charges_loss_fn = partial(mse_loss_fn, key_pred="charges", key_true="charges")
LOSSES = {
    "energy": energy_loss_fn,
    "forces": forces_loss_fn,
    "charges": charges_loss_fn,
    "dipole": dipole_loss_fn,
    "quadrupole": quadrupole_loss_fn,
    "robust energy": partial(energy_loss_fn, delta=0.3),
    "robust forces": partial(forces_loss_fn, delta=0.3),
    "robust charges": partial(charges_loss_fn, delta=0.3),
}
SIZES = [3, 1, 5]
COMPONENTS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    "forces": {
        "fn": "aimnet2mult.train.loss.peratom_loss_fn",
        "weight": 3.0,
        "kwargs": {"key_true": "forces", "key_pred": "forces"},
    },
}


def molecule(n_atoms: int, seed: int) -> tuple[dict, dict]:
    """A molecule alone: predictions (leaves that require grad) with inputs, and labels; float64."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    y_pred = {
        "coord": rand(1, n_atoms, 3),
        "numbers": torch.full((1, n_atoms), 6),
        "charge": torch.zeros(1),
        "energy": rand(1).requires_grad_(),
        "forces": rand(1, n_atoms, 3).requires_grad_(),
        "charges": rand(1, n_atoms).requires_grad_(),
    }
    y_true = {
        "energy": rand(1),
        "forces": rand(1, n_atoms, 3),
        "charges": rand(1, n_atoms),
        "dipole": rand(1, 3),
        "quadrupole": rand(1, 6),
    }
    return y_pred, y_true


def padded(values: list[torch.Tensor], n_max: int, atomic: bool, fill: float = 0.0) -> torch.Tensor:
    if not atomic:
        return torch.cat(values)
    rows = []
    for value in values:
        padding = value.new_full((1, n_max - value.shape[1], *value.shape[2:]), fill)
        rows.append(torch.cat([value, padding], dim=1))
    return torch.cat(rows)


def batch(molecules: list, mask: list[bool], garbage: float = 7.0) -> tuple[dict, dict]:
    """Pad molecules to one batch, with garbage in the padding of predictions and in labels that do not count."""
    n_max = max(y_pred["numbers"].shape[1] for y_pred, _ in molecules) + 2
    atomic = {"coord", "numbers", "forces", "charges"}
    y_pred = {
        key: padded([pred[key] for pred, _ in molecules], n_max, key in atomic, garbage if key != "numbers" else 0)
        for key in molecules[0][0]
    }
    y_true = {}
    for key in molecules[0][1]:
        y_true[key] = padded([true[key] for _, true in molecules], n_max, key in atomic)
        y_true[key][~torch.tensor(mask)] = math.nan
        y_true[f"{key}_mask"] = torch.tensor(mask)
    return y_pred, y_true


def flattened(y_pred: dict, y_true: dict) -> tuple[dict, dict]:
    """The same batch in flat layout."""
    real = y_pred["numbers"] > 0
    mol_idx = torch.arange(real.shape[0]).unsqueeze(1).expand(real.shape)[real]
    atomic = {"coord", "numbers", "forces", "charges"}
    flat_pred = {key: value[real] if key in atomic else value for key, value in y_pred.items()}
    flat_true = {key: value[real] if key in atomic else value for key, value in y_true.items()}
    return {**flat_pred, "mol_idx": mol_idx}, flat_true


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3)))
def test_batch_costs_the_mean_over_labelled_molecules_alone(name, flat, mask):
    loss_fn = LOSSES[name]
    molecules = [molecule(n, seed) for seed, n in enumerate(SIZES)]
    alone = [loss_fn(*m) for m, labelled in zip(molecules, mask, strict=True) if labelled]
    expected = sum(alone, torch.zeros(())) / max(len(alone), 1)
    leaves = [m[0][key] for m in molecules for key in ("energy", "forces", "charges")]
    wanted = torch.autograd.grad(expected, leaves, allow_unused=True) if alone else [None] * len(leaves)

    y_pred, y_true = batch(molecules, mask)
    if flat:
        y_pred, y_true = flattened(y_pred, y_true)
    loss = loss_fn(y_pred, y_true)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=0)
    assert loss.requires_grad
    for got, want in zip(torch.autograd.grad(loss, leaves, allow_unused=True), wanted, strict=True):
        want = torch.zeros(()) if want is None else want
        got = torch.zeros(()) if got is None else got
        torch.testing.assert_close(got, want.to(got).expand_as(got), rtol=1e-12, atol=1e-14)


def test_the_documented_mask_example():
    molecules = [molecule(n, seed) for seed, n in enumerate(SIZES)]
    y_pred, y_true = batch(molecules, [True, False, True])
    values = [forces_loss_fn(*m).item() for m in molecules]
    assert forces_loss_fn(y_pred, y_true).item() == pytest.approx((values[0] + values[2]) / 2)


def test_formulas_by_hand():
    y_pred, y_true = molecule(4, 0)
    energy = (y_pred["energy"] - y_true["energy"]) ** 2 / 2.0  # sqrt(4 atoms)
    assert energy_loss_fn(y_pred, y_true).item() == pytest.approx(energy.item())
    forces = ((y_pred["forces"] - y_true["forces"]) ** 2).mean()
    assert forces_loss_fn(y_pred, y_true).item() == pytest.approx(forces.item())
    q, r = y_pred["charges"][0].detach(), y_pred["coord"][0]
    dipole = ((q @ r - y_true["dipole"][0]) ** 2).mean()
    assert dipole_loss_fn(y_pred, y_true).item() == pytest.approx(dipole.item())
    tensor = torch.einsum("i,ia,ib->ab", q, r, r)
    tensor = tensor - torch.eye(3) * tensor.trace() / 3
    expected = torch.stack([tensor[i, j] for i, j in [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)]])
    quadrupole = ((expected - y_true["quadrupole"][0]) ** 2).mean()
    assert quadrupole_loss_fn(y_pred, y_true).item() == pytest.approx(quadrupole.item())


def test_robust_losses_are_squares_of_small_errors_and_linear_in_large_ones():
    y_pred, y_true = molecule(4, 0)
    direction = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)

    def losses(size: float) -> tuple[float, float]:
        pred = {**y_pred, "energy": y_true["energy"] + size, "forces": y_true["forces"] + size * direction}
        return energy_loss_fn(pred, y_true, delta=0.1).item(), forces_loss_fn(pred, y_true, delta=0.1).item()

    small, large, larger = losses(1e-6), losses(1e4), losses(2e4)
    assert small == pytest.approx((1e-12 / 2.0, 1e-12 / 3.0), rel=1e-6)  # sqrt(4 atoms), three components
    assert larger[0] - large[0] == pytest.approx(2 * 0.1 * 1e4 / 4**0.25, rel=1e-6)
    assert larger[1] - large[1] == pytest.approx(2 * 0.1 * 1e4 / math.sqrt(3), rel=1e-6)


def test_robust_loss_of_forces_does_not_depend_on_the_axes():
    y_pred, y_true = molecule(4, 0)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    turned_pred = {**y_pred, "forces": y_pred["forces"] @ rotation}
    turned_true = {**y_true, "forces": y_true["forces"] @ rotation}
    turned = forces_loss_fn(turned_pred, turned_true, delta=0.3).item()
    assert turned == pytest.approx(forces_loss_fn(y_pred, y_true, delta=0.3).item(), rel=1e-12)


def test_gradient_of_a_robust_loss_is_zero_where_there_is_no_error():
    y_pred, y_true = molecule(4, 0)
    y_pred["energy"] = y_true["energy"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy_loss_fn(y_pred, y_true, delta=0.1), y_pred["energy"])
    assert gradient.item() == 0.0


@pytest.mark.parametrize("delta", [0.0, -1.0, math.inf, "0.1", True])
def test_delta_is_a_positive_number(delta):
    component = {"fn": energy_loss_fn, "weight": 1.0, "kwargs": {"delta": delta}}
    with pytest.raises(ValueError, match=r"loss\.components\.e\.kwargs\.delta: .* is not a positive number; null for"):
        MTLoss({"e": component})


def test_labels_without_a_mask_count_all():
    molecules = [molecule(n, seed) for seed, n in enumerate(SIZES)]
    y_pred, y_true = batch(molecules, [True] * 3)
    without = {key: value for key, value in y_true.items() if not key.endswith("_mask")}
    assert forces_loss_fn(y_pred, y_true).item() == forces_loss_fn(y_pred, without).item()


def test_dipole_that_the_model_computes():
    y_pred, y_true = molecule(3, 0)
    y_pred["dipole"] = y_true["dipole"] + 2.0
    assert dipole_loss_fn(y_pred, y_true, key_pred="dipole").item() == pytest.approx(4.0)


# --- what is missing ----------------------------------------------------------------------------


def test_prediction_left_out_costs_zero_with_a_graph_when_no_molecule_has_the_label():
    y_pred, y_true = batch([molecule(3, 0)], [True])
    y_true["forces_mask"][:] = False
    del y_pred["forces"]
    result = MTLoss(COMPONENTS)(y_pred, y_true)
    assert result["forces"].item() == 0.0
    assert result["loss"].item() == pytest.approx(result["energy"].item() / 4)
    loss = forces_loss_fn(y_pred, y_true)
    assert loss.requires_grad
    loss.backward()


def test_missing_prediction_that_a_label_needs_is_an_error():
    y_pred, y_true = batch([molecule(3, 0)], [True])
    del y_pred["forces"]
    with pytest.raises(ValueError, match=r"loss.components.forces: the model predicts no forces; it gives charge, "):
        MTLoss(COMPONENTS)(y_pred, y_true)


def test_missing_label_is_an_error_that_says_where_labels_come_from():
    y_pred, y_true = molecule(3, 0)
    del y_true["forces"]
    with pytest.raises(ValueError, match=r"no label forces; labels: energy, .* Add forces to data.y"):
        MTLoss(COMPONENTS)(y_pred, y_true)


def test_shapes_that_would_broadcast_are_refused():
    y_pred, y_true = molecule(3, 0)
    y_true["energy"] = y_true["energy"].unsqueeze(1)
    with pytest.raises(ValueError, match=r"energy: prediction of shape \(1,\), label of \(1, 1\)"):
        energy_loss_fn(y_pred, y_true)


# --- sums ---------------------------------------------------------------------------------------


def test_sum_has_normalised_weights_and_reports_its_parts():
    y_pred, y_true = batch([molecule(3, 0), molecule(2, 1)], [True, True])
    result = MTLoss(COMPONENTS)(y_pred, y_true)
    energy, forces = energy_loss_fn(y_pred, y_true), forces_loss_fn(y_pred, y_true)
    assert set(result) == {"loss", "energy", "forces"}
    assert result["loss"].item() == pytest.approx((0.25 * energy + 0.75 * forces).item())
    assert result["forces"].item() == pytest.approx(forces.item())
    assert result["loss"].requires_grad
    assert not result["energy"].requires_grad


def test_functions_may_be_given_themselves_and_say_what_they_need():
    loss = MTLoss({"energy": {"fn": energy_loss_fn, "weight": 2}})
    assert loss.needs("energy")
    assert not loss.needs("forces")
    assert MTLoss(COMPONENTS).needs("forces")
    assert MTLoss({"own": {"fn": lambda y_pred, y_true: y_pred["energy"].sum(), "weight": 1}}).needs("forces")


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({}, "at least one component"),
        ({"e": {"weight": 1.0}}, r"loss.components.e: fn is missing"),
        ({"e": {"fn": energy_loss_fn}}, r"loss.components.e: weight is missing"),
        ({"e": {"fn": energy_loss_fn, "weigth": 1.0}}, r"unknown option weigth; did you mean weight\?"),
        ({"e": {"fn": energy_loss_fn, "weight": -1.0}}, r"loss.components.e.weight: -1.0 is not a number of 0 or more"),
        ({"e": {"fn": energy_loss_fn, "weight": math.nan}}, r"loss.components.e.weight: nan"),
        ({"e": {"fn": energy_loss_fn, "weight": "1"}}, r"loss.components.e.weight: '1'"),
        ({"e": {"fn": energy_loss_fn, "weight": 0}}, "all weights are zero"),
        (
            {"e": {"fn": "aimnet2mult.train.loss.energy_los_fn", "weight": 1}},
            r"loss.components.e.fn: .* did you mean energy_loss_fn",
        ),
        ({"e": {"fn": 3, "weight": 1}}, r"loss.components.e.fn: 3 is not a function"),
        ({"e": {"fn": peratom_loss_fn, "weight": 1}}, r"loss.components.e.kwargs: key_pred is missing"),
        (
            {"e": {"fn": energy_loss_fn, "weight": 1, "kwargs": {"key": "energy"}}},
            r"loss.components.e.kwargs: unknown option key;",
        ),
        ({"loss": {"fn": energy_loss_fn, "weight": 1}}, "this name stands for the sum"),
        ({"e": "energy"}, "expected a mapping {fn, weight, kwargs}, found str"),
        (
            {"e": {"fn": energy_loss_fn, "weight": 1, "kwargs": {"molecule_weights": 2.0}}},
            r"loss.components.e.kwargs.molecule_weights: they come from loss.components.e.fidelity_weights",
        ),
    ],
)
def test_nonsense_is_refused_with_its_dotted_key(components, message):
    with pytest.raises(ValueError, match=message):
        MTLoss(components)


# --- factors of fidelities ----------------------------------------------------------------------

FIDELITIES = torch.tensor([1, 0, 2])
MASK = [True, True, False]


def weighted_batch() -> tuple[dict, dict]:
    """Molecules of fidelities 1, 0, 2; the last one has no labels."""
    y_pred, y_true = batch([molecule(n, seed) for seed, n in enumerate(SIZES)], MASK)
    return {**y_pred, "_fidelities": FIDELITIES}, y_true


def values_alone(name: str) -> np.ndarray:
    """Value of each molecule, (B,)."""
    return np.array([LOSSES[name](*molecule(n, seed)).item() for seed, n in enumerate(SIZES)])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("given", [{0: 2.0, 1: 0.25, 2: 7.0}, {1: 3}, {0: 0.0}, {5: 9.0}])
def test_factors_of_fidelities_weigh_molecules(name, flat, given):
    loss_fn = MTLoss({"k": {"fn": LOSSES[name], "weight": 1.0, "fidelity_weights": given}})
    y_pred, y_true = weighted_batch()
    if flat:
        y_pred, y_true = flattened(y_pred, y_true)
    factors = np.array([given.get(f, 1.0) for f in FIDELITIES.tolist()])
    wanted = (np.array(MASK) * factors * values_alone(name)).sum() / np.sum(MASK)
    assert loss_fn(y_pred, y_true)["loss"].item() == pytest.approx(wanted, rel=1e-12)


def test_each_component_has_factors_of_its_own_and_the_gradient_follows():
    components = {"energy": {**COMPONENTS["energy"], "fidelity_weights": {1: 4.0}}, "forces": COMPONENTS["forces"]}
    y_pred, y_true = weighted_batch()
    result = MTLoss(components)(y_pred, y_true)
    energies, forces = values_alone("energy"), values_alone("forces")
    assert result["energy"].item() == pytest.approx((4 * energies[0] + energies[1]) / 2, rel=1e-12)
    assert result["forces"].item() == pytest.approx((forces[0] + forces[1]) / 2, rel=1e-12)
    (plain,) = torch.autograd.grad(MTLoss(COMPONENTS)(y_pred, y_true)["loss"], y_pred["energy"], retain_graph=True)
    (weighted,) = torch.autograd.grad(result["loss"], y_pred["energy"])
    torch.testing.assert_close(weighted, plain * torch.tensor([4.0, 1.0, 1.0]), rtol=1e-12, atol=0)


def test_labels_with_factor_zero_do_not_matter_even_if_they_are_no_numbers():
    y_pred, y_true = weighted_batch()
    y_true["forces"][1] = math.nan
    components = {"forces": {**COMPONENTS["forces"], "fidelity_weights": {0: 0}}}
    loss = MTLoss(components)(y_pred, y_true)["loss"]
    assert loss.item() == pytest.approx(values_alone("forces")[0] / 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, y_pred["forces"])
    assert gradient[0].abs().sum() > 0
    assert torch.equal(gradient[1:], torch.zeros_like(gradient[1:]))


def own_loss_fn(y_pred, y_true, key_true="energy"):
    return y_pred["energy"].pow(2).mean()


def own_weighted_loss_fn(y_pred, y_true, molecule_weights):
    return (molecule_weights * y_pred["energy"].pow(2)).mean()


def test_own_function_gets_the_factors_if_it_takes_them():
    y_pred, y_true = weighted_batch()
    component = {"fn": own_weighted_loss_fn, "weight": 1.0}
    loss = MTLoss({"own": {**component, "fidelity_weights": {2: 3.0}}})(y_pred, y_true)["loss"]
    assert loss.item() == pytest.approx((torch.tensor([1.0, 1.0, 3.0]) * y_pred["energy"] ** 2).mean().item())
    with pytest.raises(ValueError, match=r"loss.components.own.kwargs: molecule_weights is missing"):
        MTLoss({"own": component})
    assert MTLoss({"own": {"fn": own_loss_fn, "weight": 1.0, "fidelity_weights": {}}}).fidelity_weights == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({0: -1.0}, r"loss.components.e.fidelity_weights.0: -1.0 is not a number of 0 or more"),
        ({0: math.nan}, r"loss.components.e.fidelity_weights.0: nan"),
        ({0: math.inf}, r"loss.components.e.fidelity_weights.0: inf"),
        ({0: "2"}, r"loss.components.e.fidelity_weights.0: '2'"),
        ({0: True}, r"loss.components.e.fidelity_weights.0: True"),
        ({"dft": 1.0}, r"loss.components.e.fidelity_weights: 'dft' is not the number of a fidelity"),
        ({-1: 1.0}, r"loss.components.e.fidelity_weights: -1 is not the number of a fidelity"),
        (2.0, r"loss.components.e.fidelity_weights: expected a mapping \{fidelity: factor\}, found 2.0"),
    ],
)
def test_factors_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        MTLoss({"e": {"fn": energy_loss_fn, "weight": 1.0, "fidelity_weights": given}})


def test_factors_for_a_function_that_takes_none_are_refused():
    with pytest.raises(
        ValueError, match=r"loss.components.own.fidelity_weights: .* takes no argument molecule_weights"
    ):
        MTLoss({"own": {"fn": own_loss_fn, "weight": 1.0, "fidelity_weights": {0: 2.0}}})


def test_factors_need_a_batch_that_tells_fidelities():
    loss_fn = MTLoss({"e": {"fn": energy_loss_fn, "weight": 1.0, "fidelity_weights": {0: 2.0}}})
    with pytest.raises(ValueError, match=r"loss.components.e: fidelity_weights need a batch .*_fidelities"):
        loss_fn(*molecule(3, 0))


def test_factors_must_fit_the_fidelities_of_the_run():
    def loss_fn(given):
        return MTLoss({"e": {"fn": energy_loss_fn, "weight": 1.0, "fidelity_weights": given}})

    loss_fn({1: 0.0}).check_fidelities(2)
    loss_fn({0: 0.0, 1: 0.0}).check_fidelities(3)
    with pytest.raises(ValueError, match=r"loss.components.e.fidelity_weights: all are zero"):
        loss_fn({0: 0.0, 1: 0.0}).check_fidelities(2)
    with pytest.raises(
        ValueError, match=r"loss.components.e.fidelity_weights: there is no fidelity 2; there are 0 to 1"
    ):
        loss_fn({2: 1.0}).check_fidelities(2)


# --- batches that make up a mean ----------------------------------------------------------------


def test_shares_multiply_components():
    y_pred, y_true = batch([molecule(3, 0), molecule(2, 1)], [True, True])
    plain = MTLoss(COMPONENTS)(y_pred, y_true)
    shared = MTLoss(COMPONENTS)(y_pred, y_true, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert shared["energy"].item() == 0.5 * plain["energy"].item()
    assert shared["forces"].item() == 2.0 * plain["forces"].item()
    assert shared["loss"].item() == pytest.approx((0.125 * plain["energy"] + 1.5 * plain["forces"]).item(), rel=1e-14)


# --- adaptive -----------------------------------------------------------------------------------


def values_of(loss: MTLoss, y_pred: dict, y_true: dict) -> torch.Tensor:
    return torch.stack([value.double() for value in loss.components(y_pred, y_true).values()]).detach()


def parts_of(loss: MTAdaWLoss, y_pred: dict, y_true: dict) -> torch.Tensor:
    values = values_of(loss, y_pred, y_true)
    return loss.scales * values / (loss.scales * values).sum()


def test_adaptive_factors_lead_to_the_shares_asked_for():
    y_pred, y_true = batch([molecule(3, 0), molecule(2, 1)], [True, True])
    loss = MTAdaWLoss(COMPONENTS, eta=0.02)
    assert parts_of(loss, y_pred, y_true).tolist() != pytest.approx([0.25, 0.75], abs=0.02)
    for _ in range(400):
        loss.adapt(values_of(loss, y_pred, y_true))
    assert parts_of(loss, y_pred, y_true).tolist() == pytest.approx([0.25, 0.75], abs=0.02)
    assert loss.scales[0] == 0.25


def test_adaptive_loss_begins_as_the_fixed_one_and_stays_so_in_evaluation():
    y_pred, y_true = batch([molecule(3, 0), molecule(2, 1)], [True, True])
    fixed = MTLoss(COMPONENTS)(y_pred, y_true)["loss"].item()
    loss = MTAdaWLoss(COMPONENTS, eta=0.1)
    assert loss(y_pred, y_true)["loss"].item() == pytest.approx(fixed)
    assert loss(y_pred, y_true)["loss"].item() == pytest.approx(fixed)  # a loss computes a loss
    loss.adapt(values_of(loss, y_pred, y_true))
    assert loss(y_pred, y_true)["loss"].item() != pytest.approx(fixed)
    assert loss.eval()(y_pred, y_true)["loss"].item() == pytest.approx(fixed)


def test_fixed_weights_learn_nothing():
    y_pred, y_true = batch([molecule(3, 0)], [True])
    loss = MTLoss(COMPONENTS)
    before = loss.weights.clone()
    loss.adapt(values_of(loss, y_pred, y_true))
    assert torch.equal(loss.weights, before)


def test_adaptive_factors_ignore_steps_without_the_label_and_stay_in_bounds():
    y_pred, y_true = batch([molecule(3, 0)], [True])
    y_true["forces_mask"][:] = False
    loss = MTAdaWLoss(COMPONENTS, eta=0.5, max_change=4.0)
    loss.adapt(values_of(loss, y_pred, y_true))
    assert loss.scales.tolist() == [0.25, 0.75]
    loss.adapt(torch.zeros(2, dtype=torch.float64))
    assert loss.scales.tolist() == [0.25, 0.75]
    y_true["forces_mask"][:] = True
    y_pred["forces"] = y_true["forces"] + 1e-9
    for _ in range(20):
        loss.adapt(values_of(loss, y_pred, y_true))
    assert loss.scales.tolist() == pytest.approx([0.25, 3.0])


def test_adaptive_factors_survive_a_state_dict():
    y_pred, y_true = batch([molecule(3, 0), molecule(2, 1)], [True, True])
    loss = MTAdaWLoss(COMPONENTS, eta=0.1)
    for _ in range(3):
        loss.adapt(values_of(loss, y_pred, y_true))
    again = MTAdaWLoss(COMPONENTS, eta=0.1)
    again.load_state_dict(loss.state_dict())
    for one in (loss, again):
        one.adapt(values_of(one, y_pred, y_true))
    assert torch.equal(again.scales, loss.scales)
    assert not torch.equal(loss.scales, loss.initial_scales)


def test_adaptive_loss_starts_from_given_factors():
    components = {
        "energy": {**COMPONENTS["energy"], "scale": 2.0},
        "forces": {**COMPONENTS["forces"], "scale": 0.5, "fidelity_weights": {1: 2.0}},
    }
    y_pred, y_true = weighted_batch()
    result = MTAdaWLoss(components)(y_pred, y_true)
    assert result["loss"].item() == pytest.approx((2.0 * result["energy"] + 0.5 * result["forces"]).item())
    forces = values_alone("forces")
    assert result["forces"].item() == pytest.approx((2 * forces[0] + forces[1]) / 2)


@pytest.mark.parametrize("kwargs", [{"eta": 0.0}, {"eta": 1.0}, {"max_change": 0.5}])
def test_adaptive_options_out_of_range(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        MTAdaWLoss(COMPONENTS, **kwargs)
