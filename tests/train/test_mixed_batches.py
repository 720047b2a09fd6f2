"""A batch of molecules with different labels costs, and teaches, what its molecules do one by one.

The reference is made from single molecules without padding: for molecule m and label k the loss l_mk and its gradient
g_mk, by plain autograd. A batch with masks then has to give Σ_k w_k Σ_m mask_mk l_mk / Σ_m mask_mk, and its gradient
the same sum over g_mk; and so have several batches of one step, on one process or on several.
"""

import itertools
import math
from pathlib import Path
from unittest import mock

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.modules import Forces
from aimnet2mult.train import engine
from aimnet2mult.train.engine import batch_parts, make_evaluator, make_step, predict, size_groups
from aimnet2mult.train.loss import MTAdaWLoss, MTLoss
from aimnet2mult.train.metrics import RegMultiMetric

FIXTURES = Path(__file__).parents[1] / "fixtures"
LABELS = ("energy", "forces", "charges", "spin_charges")
WEIGHTS = {"energy": 1.0, "forces": 2.0, "charges": 4.0, "spin_charges": 3.0}
PER_ATOM = "aimnet2mult.train.loss.peratom_loss_fn"
COMPONENTS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": WEIGHTS["energy"]},
    **{
        key: {"fn": PER_ATOM, "weight": WEIGHTS[key], "kwargs": {"key_true": key, "key_pred": key}}
        for key in LABELS[1:]
    },
}
SIZES = {0: (3, 8), 1: (9, 4), 2: (5,)}
"""Numbers of atoms of the molecules, by fidelity."""
N_MOLECULES = 5
SPLIT, WHOLE = 1, 10**9
"""Values of ``MIN_ATOMS_APART``: always in two parts, never."""
TOLERANCE = 1e-10


# --------------------------------------------------------------------------------------------------
# model, molecules, and what each molecule gives alone
# --------------------------------------------------------------------------------------------------


def make_network() -> Forces:
    """A small model of three fidelities whose readouts differ, in float64."""
    torch.manual_seed(0)
    net = build_model(load_model_config(FIXTURES / "ref_mixed_model.yaml"), num_fidelities=3).double()
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
        net.afv.weight[0] = 0.0
    return Forces(net)


def make_samples() -> list[dict]:
    """Real molecules of three fidelities; every label is there, with numbers that mean nothing."""
    dataset = MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in SIZES})
    rng = np.random.default_rng(0)
    chosen = [
        int(rng.choice(np.flatnonzero((dataset.fidelities == f) & (dataset.n_atoms == size))))
        for f, sizes in SIZES.items()
        for size in sizes
    ]
    samples = dataset.__getitems__(chosen)
    for sample in samples:
        n_atoms = len(sample["numbers"])
        for key, shape in zip(LABELS, ((), (n_atoms, 3), (n_atoms,), (n_atoms,)), strict=True):
            sample[key] = rng.normal(size=shape).astype(np.float32)
    return samples


def double(part: dict) -> dict:
    return {key: value.double() if value.is_floating_point() else value for key, value in part.items()}


def make_batch(samples: list[dict], masks: np.ndarray, padding: int = 0, garbage: bool = False) -> tuple[dict, dict]:
    """Collate samples (B) with the labels of ``masks`` (B, 4); NaN in every label entry that must not matter."""
    kept = [
        {key: None if key in LABELS and not row[LABELS.index(key)] else value for key, value in sample.items()}
        for sample, row in zip(samples, masks, strict=True)
    ]
    x, y = map(double, collate(kept))
    for part in (x, y):
        for key in set(part) & {"coord", "numbers", "forces", "charges", "spin_charges"}:
            value = part[key]
            part[key] = torch.cat([value, value.new_zeros(len(value), padding, *value.shape[2:])], dim=1)
    if garbage:
        real = x["numbers"] > 0
        for key in LABELS:
            known = y[f"{key}_mask"] if key == "energy" else y[f"{key}_mask"].unsqueeze(1) & real
            y[key][~known] = math.nan
    return x, y


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Gradient of the trained weights as one vector; zero where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters() if p.requires_grad]
    )


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.fixture(scope="module")
def samples():
    return make_samples()


@pytest.fixture(scope="module")
def alone(network, samples):
    """Losses (B, 4) and gradients (B, 4, W) of each molecule and label."""
    losses = torch.zeros(len(samples), len(LABELS), dtype=torch.float64)
    gradients = []
    for m, sample in enumerate(samples):
        x = {
            "coord": torch.tensor(sample["coord"]).double().unsqueeze(0).requires_grad_(),
            "numbers": torch.tensor(sample["numbers"]).unsqueeze(0),
            "charge": torch.tensor([sample["charge"]]).double(),
            "mult": torch.tensor([sample["mult"]]).double(),
            "_fidelities": torch.tensor([sample["_fidelities"]]),
        }
        out = network.model(x)
        (slope,) = torch.autograd.grad(out["energy"].sum(), x["coord"], create_graph=True)
        error = {
            key: prediction[0] - torch.tensor(sample[key]).double()
            for key, prediction in {**{k: out[k] for k in LABELS if k != "forces"}, "forces": -slope}.items()
        }
        n_atoms = len(sample["numbers"])
        for k, key in enumerate(LABELS):
            loss = error[key] ** 2 / n_atoms**0.5 if key == "energy" else (error[key] ** 2).mean()
            network.zero_grad()
            loss.backward(retain_graph=True)
            losses[m, k] = loss.detach()
            gradients.append(flat_gradient(network))
    network.zero_grad()
    return losses, torch.stack(gradients).view(len(samples), len(LABELS), -1)


def expected(alone, masks: np.ndarray, order=None, weights=WEIGHTS, factors=None) -> tuple[float, torch.Tensor]:
    """Loss and gradient of molecules in a given order with ``masks`` (B, 4), from what they give alone.

    ``factors`` (B, 4) are those of the molecules' fidelities, by default one.
    """
    losses, gradients = alone
    order = list(range(len(losses))) if order is None else list(order)
    total = sum(weights.values())
    shares = torch.tensor([weights.get(k, 0.0) / total for k in LABELS], dtype=torch.float64)
    parts = torch.tensor(masks, dtype=torch.float64)
    parts = parts / parts.sum(0).clamp(min=1) * shares
    parts = parts if factors is None else parts * torch.tensor(factors)
    return (parts * losses[order]).sum().item(), torch.einsum("mk,mkw->w", parts, gradients[order])


def step(network, batch, loss_fn=None, min_atoms: int = SPLIT) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a training step over a batch, or over a list of them."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.0)
    with mock.patch.dict(engine.MIN_ATOMS_APART, cpu=min_atoms):
        take_step = make_step(network, optimizer, loss_fn or MTLoss(COMPONENTS), "cpu")
        result = take_step(batch if isinstance(batch, list) else [batch])
    assert result.applied
    assert result.grad_norm.item() == pytest.approx(flat_gradient(network).norm().item(), rel=1e-12)
    return result.losses["loss"].item(), flat_gradient(network)


def assert_same(found, wanted) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=TOLERANCE, abs=1e-14)
    assert (found[1] - wanted[1]).norm() <= TOLERANCE * wanted[1].norm()


def masks_of(forces=(True,) * N_MOLECULES) -> np.ndarray:
    """All labels but some forces, (B, 4)."""
    masks = np.ones((N_MOLECULES, len(LABELS)), bool)
    masks[:, LABELS.index("forces")] = forces
    return masks


# --------------------------------------------------------------------------------------------------
# loss and gradient
# --------------------------------------------------------------------------------------------------


def test_reference_is_not_trivial(alone):
    losses, gradients = alone
    assert (losses > 1e-3).all()
    assert (gradients.norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("min_atoms", [SPLIT, WHOLE])
def test_every_pattern_of_force_labels(network, samples, alone, min_atoms):
    for forces in itertools.product((False, True), repeat=N_MOLECULES):
        masks = masks_of(forces)
        assert_same(step(network, make_batch(samples, masks), min_atoms=min_atoms), expected(alone, masks))


def test_every_set_of_labels_for_all_molecules(network, samples, alone):
    for row in itertools.product((False, True), repeat=len(LABELS)):
        masks = np.tile(row, (N_MOLECULES, 1))
        assert_same(step(network, make_batch(samples, masks)), expected(alone, masks))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=N_MOLECULES, max_size=N_MOLECULES),
    st.lists(st.integers(0, N_MOLECULES - 1), min_size=1, max_size=N_MOLECULES, unique=True),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([SPLIT, 12, WHOLE]),
)
def test_any_masks_order_padding_and_garbage(network, samples, alone, masks, order, padding, garbage, min_atoms):
    masks = np.array(masks)[order]
    batch = make_batch([samples[m] for m in order], masks, padding, garbage)
    assert_same(step(network, batch, min_atoms=min_atoms), expected(alone, masks, order))


@pytest.mark.parametrize("min_atoms", [SPLIT, WHOLE])
def test_loss_without_forces(network, samples, alone, min_atoms):
    used = ("energy", "charges")
    loss_fn = MTLoss({key: COMPONENTS[key] for key in used})
    masks = masks_of((True, False, True, False, False))
    found = step(network, make_batch(samples, masks), loss_fn, min_atoms)
    assert_same(found, expected(alone, masks, weights={key: WEIGHTS[key] for key in used}))


@pytest.mark.parametrize("forces", [(True, False, False, True, False), (False,) * N_MOLECULES])
def test_loss_of_forces_alone(network, samples, alone, forces):
    masks = masks_of(forces)
    found = step(network, make_batch(samples, masks), MTLoss({"forces": COMPONENTS["forces"]}))
    assert_same(found, expected(alone, masks, weights={"forces": 1.0}))
    assert (found[0] > 0) == any(forces)


def test_adaptive_loss(network, samples, alone):
    masks = masks_of((False, True, False, False, True))
    scales = []
    for min_atoms in (SPLIT, WHOLE):
        loss_fn = MTAdaWLoss(COMPONENTS, eta=0.1)
        assert_same(step(network, make_batch(samples, masks), loss_fn, min_atoms), expected(alone, masks))
        scales.append(loss_fn.scales)
        assert not torch.equal(loss_fn.scales, loss_fn.initial_scales)
    torch.testing.assert_close(*scales, rtol=1e-12, atol=0)

    # Nobody has forces: their factor stays.
    loss_fn = MTAdaWLoss(COMPONENTS, eta=0.1)
    step(network, make_batch(samples, masks_of((False,) * N_MOLECULES)), loss_fn)
    assert loss_fn.scales[LABELS.index("forces")] == loss_fn.initial_scales[LABELS.index("forces")]


FACTORS = {"energy": {0: 3.0, 2: 0.5}, "forces": {1: 0.0}, "spin_charges": {0: 0.25, 1: 4.0, 2: 1.5}}
"""Factors of fidelities; those that are left out are one."""
WEIGHTED = {key: {**options, "fidelity_weights": FACTORS.get(key)} for key, options in COMPONENTS.items()}
FIDELITIES = [f for f, sizes in SIZES.items() for _ in sizes]


def factors_of(order=range(N_MOLECULES)) -> np.ndarray:
    """Factors of molecules, (B, 4)."""
    return np.array([[FACTORS.get(key, {}).get(FIDELITIES[m], 1.0) for key in LABELS] for m in order])


@pytest.mark.parametrize("min_atoms", [SPLIT, WHOLE])
@pytest.mark.parametrize("forces", [(True, False, False, True, True), (False,) * N_MOLECULES])
def test_factors_of_fidelities(network, samples, alone, forces, min_atoms):
    masks = masks_of(forces)
    found = step(network, make_batch(samples, masks), MTLoss(WEIGHTED), min_atoms)
    assert_same(found, expected(alone, masks, factors=factors_of()))


# --------------------------------------------------------------------------------------------------
# several batches of one step
# --------------------------------------------------------------------------------------------------


def divided(samples: list[dict], masks: np.ndarray, ends) -> list[tuple[dict, dict]]:
    """Batches of the molecules up to each of ``ends``; padding differs between them."""
    starts = [0, *ends[:-1]]
    return [make_batch(samples[a:b], masks[a:b], padding=a) for a, b in zip(starts, ends, strict=True)]


def test_one_batch_of_eight_is_two_of_four_is_four_of_two(network, samples, alone):
    order = [3, 0, 2, 4, 1, 0, 2, 3]  # fidelities 1 0 1 2 | 0 0 1 1
    masks = np.random.default_rng(1).random((8, len(LABELS))) < 0.5
    masks[2:4, LABELS.index("forces")] = False  # a batch without any
    masks[:, LABELS.index("charges")] = np.arange(8) == 6  # a label of one molecule
    masks[:, LABELS.index("spin_charges")] = False  # a label of none
    ordered = [samples[m] for m in order]
    loss_fn = MTLoss(WEIGHTED)
    whole = step(network, divided(ordered, masks, [8]), loss_fn)
    assert_same(whole, expected(alone, masks, order, factors=factors_of(order)))
    for ends in ([4, 8], [2, 4, 6, 8], [1, 8], range(1, 9)):
        found = step(network, divided(ordered, masks, list(ends)), loss_fn)
        assert found[0] == pytest.approx(whole[0], rel=1e-13)
        assert (found[1] - whole[1]).norm() <= 1e-12 * whole[1].norm()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=N_MOLECULES, max_size=N_MOLECULES),
    st.permutations(range(N_MOLECULES)),
    st.sets(st.integers(1, N_MOLECULES - 1)),
    st.sampled_from([SPLIT, 12, WHOLE]),
)
def test_any_division_into_batches(network, samples, alone, masks, order, cuts, min_atoms):
    masks = np.array(masks)[order]
    batches = divided([samples[m] for m in order], masks, [*sorted(cuts), N_MOLECULES])
    assert_same(step(network, batches, min_atoms=min_atoms), expected(alone, masks, order))


def test_reported_components_are_means_over_all_batches(network, samples, alone):
    masks = masks_of((True, False, False, True, False))
    masks[:, LABELS.index("charges")] = False
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.0)
    result = make_step(network, optimizer, MTLoss(COMPONENTS), "cpu")(divided(samples, masks, [1, 3, 5]))
    wanted = (alone[0].numpy() * masks).sum(0) / masks.sum(0).clip(min=1)
    assert list(result.losses) == ["loss", *LABELS]
    assert [result.losses[key].item() for key in LABELS] == pytest.approx(wanted.tolist(), rel=TOLERANCE, abs=0)
    assert result.losses["charges"].item() == 0.0
    for value in (*result.losses.values(), result.grad_norm):
        assert value.dtype == torch.float64
        assert not value.requires_grad


def test_adaptive_loss_adapts_once_per_step(network, samples):
    masks = masks_of((False, True, False, False, True))
    scales = []
    for ends in ([5], [2, 5], [1, 2, 3, 4, 5]):
        loss_fn = MTAdaWLoss(COMPONENTS, eta=0.1)
        for _ in range(3):
            step(network, divided(samples, masks, ends), loss_fn)
        scales.append(loss_fn.scales)
        assert not torch.equal(loss_fn.scales, loss_fn.initial_scales)
    for other in scales[1:]:
        torch.testing.assert_close(other, scales[0], rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------------
# validation
# --------------------------------------------------------------------------------------------------


def test_validation_loss_has_the_factors_of_fidelities(network, samples, alone):
    masks = masks_of((True, False, False, True, True))
    evaluator = make_evaluator(network, MTLoss(WEIGHTED), {}, "cpu")
    with mock.patch.dict(engine.MIN_ATOMS_APART, cpu=SPLIT):
        found = evaluator.run(divided(samples, masks, [2, 3, 5])).metrics["loss"]
    assert found == pytest.approx(expected(alone, masks, factors=factors_of())[0], rel=TOLERANCE)


def test_errors_of_validation_are_those_of_single_molecules(network, samples):
    masks = masks_of((False, True, True, False, True))
    masks[2, LABELS.index("charges")] = False
    batch = make_batch(samples, masks, garbage=True)
    metric = RegMultiMetric({key: {"abbr": key} for key in LABELS})
    with mock.patch.dict(engine.MIN_ATOMS_APART, cpu=SPLIT):
        found = make_evaluator(network, MTLoss(COMPONENTS), {"m": metric}, "cpu").run([batch]).metrics
    errors = {key: [] for key in LABELS}
    for sample, row in zip(samples, masks, strict=True):
        out = network(double(collate([sample])[0]))
        for key, present in zip(LABELS, row, strict=True):
            if present:
                errors[key].append((out[key].detach().numpy()[0] - sample[key]).ravel())
    for key in LABELS:
        error = np.concatenate(errors[key])
        assert found[f"{key}_mae"] == pytest.approx(np.abs(error).mean(), rel=TOLERANCE)
        assert found[f"{key}_rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=TOLERANCE)


# --------------------------------------------------------------------------------------------------
# no force graph where there is no label
# --------------------------------------------------------------------------------------------------


class Watch:
    """Record of what goes through the network, and through `torch.autograd.grad`, inside a block.

    Attributes
    ----------
    evaluated : list of (fidelities, places, with force graph)
        Evaluations of the network.
    differentiated : list of tuple
        Shapes of what derivatives were taken with respect to.
    """

    def __init__(self, network: Forces) -> None:
        self.network = network
        self.evaluated: list[tuple] = []
        self.differentiated: list[tuple] = []

    def __enter__(self):
        grad = torch.autograd.grad

        def recorded(outputs, inputs, *args, **kwargs):
            self.differentiated.append(tuple(inputs.shape))
            return grad(outputs, inputs, *args, **kwargs)

        def before(module, args):
            (x,) = args
            self.evaluated.append((x["_fidelities"].tolist(), x["coord"].shape[1], x["coord"].requires_grad))

        self.hook = self.network.model.register_forward_pre_hook(before)
        self.patch = mock.patch("torch.autograd.grad", recorded)
        self.patch.start()
        return self

    def __exit__(self, *error):
        self.patch.stop()
        self.hook.remove()


def run_both(network, batch):
    """A training step and a validation step, each watched."""
    watches = []
    for run in (
        lambda: step(network, batch),
        lambda: make_evaluator(network, MTLoss(COMPONENTS), {}, "cpu").run([batch]),
    ):
        with mock.patch.dict(engine.MIN_ATOMS_APART, cpu=SPLIT), Watch(network) as watch:
            run()
        watches.append(watch)
    return watches


def test_molecules_without_label_have_no_force_graph(network, samples):
    # Fidelities 0, 0, 1, 1, 2 of 3, 8, 9, 4, 5 atoms.
    batch = make_batch(samples, masks_of((True, False, False, True, False)))
    for watch in run_both(network, batch):
        assert watch.evaluated == [([0, 1], 4, True), ([0, 1, 2], 9, False)]
        assert watch.differentiated == [(2, 4, 3)]


def test_energy_only_batch_has_no_force_graph(network, samples):
    for watch in run_both(network, make_batch(samples, masks_of((False,) * N_MOLECULES))):
        assert watch.evaluated == [([0, 0, 1, 1, 2], 9, False)]
        assert watch.differentiated == []


def test_fully_labelled_batch_is_evaluated_once(network, samples):
    for watch in run_both(network, make_batch(samples, masks_of())):
        assert watch.evaluated == [([0, 0, 1, 1, 2], 9, True)]
        assert watch.differentiated == [(5, 9, 3)]


def test_predictions_come_back_in_the_order_of_the_batch(network, samples):
    forces = torch.tensor([False, True, False, True, False])
    x, y = make_batch(samples, masks_of(forces), padding=2)
    with mock.patch.dict(engine.MIN_ATOMS_APART, cpu=SPLIT):
        divided, labels = predict(network, (x, y), True, "cpu")
    whole = network(x)
    assert labels is not y
    assert set(divided) == set(whole)
    for key, value in whole.items():
        wanted = value * forces.view(-1, 1, 1) if key == "forces" else value
        assert divided[key].dtype == value.dtype
        torch.testing.assert_close(divided[key], wanted, rtol=1e-10, atol=1e-12, msg=key)
    for key in x:
        assert torch.equal(divided[key], x[key])


ONE_GROUP = 1e9
"""Part cost with which molecules of different size stay together."""


def test_few_atoms_without_label_stay_with_the_others(samples):
    x, y = make_batch(samples, masks_of((True, True, True, False, True)))  # 4 atoms have none
    assert batch_parts(x, y, 5, ONE_GROUP) is None
    with_forces, without = batch_parts(x, y, 4, ONE_GROUP)
    assert (with_forces.rows.tolist(), with_forces.n_places, with_forces.forces) == ([0, 1, 2, 4], 9, True)
    assert (without.rows.tolist(), without.n_places, without.forces) == ([3], 4, False)
    assert batch_parts(*make_batch(samples, masks_of()), 1, ONE_GROUP) is None
    # No label at all is no force graph, however small the batch.
    x, y = make_batch(samples[3:4], masks_of((False,) * N_MOLECULES)[:1])
    (without,) = batch_parts(x, y, 1000, ONE_GROUP)
    assert (without.rows.tolist(), without.forces) == ([0], False)


def test_parts_need_a_batch_that_can_be_divided(network, samples, to_flat):
    x, y = make_batch(samples, masks_of((True, False, True, False, True)))
    parts = batch_parts(x, y, 1, ONE_GROUP)
    with pytest.raises(ValueError, match=r"parts: coord must have shape \(B, N, 3\)"):
        network(to_flat(x), parts=parts)
    with pytest.raises(ValueError, match="parts: a batch with cell cannot be divided"):
        network({**x, "cell": torch.eye(3)}, parts=parts)


# --------------------------------------------------------------------------------------------------
# molecules of similar size together
# --------------------------------------------------------------------------------------------------


def cost(groups, n_atoms, part_cost):
    return sum(part_cost + len(group) * float(n_atoms[group].max()) ** 2 for group in groups)


@pytest.mark.parametrize("part_cost", [0.0, 10.0, 300.0, 1e9])
@pytest.mark.parametrize("seed", range(5))
def test_groups_by_size_are_the_cheapest(part_cost, seed):
    n_atoms = np.random.default_rng(seed).integers(2, 9, size=7)
    groups = size_groups(n_atoms, part_cost)
    assert sorted(np.concatenate(groups).tolist()) == list(range(7))
    # All ways to cut the sorted molecules.
    order = np.argsort(n_atoms, kind="stable")
    cheapest = min(
        cost(np.split(order, [i + 1 for i in range(6) if cuts >> i & 1]), n_atoms, part_cost) for cuts in range(2**6)
    )
    assert cost(groups, n_atoms, part_cost) == pytest.approx(cheapest)
    assert len(size_groups(n_atoms, 1e9)) == 1
    assert size_groups(n_atoms[:0], part_cost) == []


@pytest.mark.parametrize("forces", [(True,) * N_MOLECULES, (True, False, True, False, False), (False,) * N_MOLECULES])
def test_a_step_in_groups_by_size_is_that_of_the_whole_batch(network, samples, forces):
    batch = make_batch(samples, masks_of(forces), garbage=True)
    with mock.patch.dict(engine.PART_COST, cpu=ONE_GROUP):
        whole = step(network, batch)
    with mock.patch.dict(engine.PART_COST, cpu=0.0), Watch(network) as watch:
        groups = step(network, batch)
    # Molecules of 3, 8, 9, 4, 5 atoms, each in an evaluation of its own, without padding.
    assert sorted(places for _, places, _ in watch.evaluated) == [3, 4, 5, 8, 9]
    assert_same(groups, whole)


def test_an_uneven_batch_costs_pairs_of_its_own_molecules_only(network, samples):
    """Pairs of places that the basis is computed for: a count of operations instead of a time."""
    x, y = make_batch(samples, masks_of())
    with mock.patch.dict(engine.PART_COST, cpu=5.0), Watch(network) as watch:
        predict(network, (x, y), True, "cpu")
    pairs = sum(len(fidelities) * places**2 for fidelities, places, _ in watch.evaluated)
    sizes = (x["numbers"] > 0).sum(1)
    assert pairs <= int(sizes.square().sum()) + 5 * len(sizes)
    assert pairs < x["numbers"].shape[0] * x["numbers"].shape[1] ** 2 / 2


# --------------------------------------------------------------------------------------------------
# several processes
# --------------------------------------------------------------------------------------------------

ON_FIRST = (0, 2, 3)
"""Molecules of the first process; the second has the others. Each has a fidelity that the other lacks."""

PATTERNS = (
    (True, True, False, False, False),  # forces on both
    (False, True, False, False, True),  # none on the first, all on the second
    (False, False, False, True, False),  # some on the first, none on the second
    (False,) * N_MOLECULES,
    (True,) * N_MOLECULES,
)


CUTS = (((3,), (2,)), ((1, 3), (1, 2)), ((2, 3), (1, 2)))
"""Where each of the two processes divides its molecules into batches."""


def two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    samples, network = make_samples(), make_network()
    mine = [m for m in range(N_MOLECULES) if (m in ON_FIRST) == (rank == 0)]
    model = DistributedDataParallel(network, find_unused_parameters=True)
    found = []
    for forces in PATTERNS:
        for cuts in CUTS:
            loss_fn = MTAdaWLoss(WEIGHTED, eta=0.1)
            masks = masks_of(forces)[mine]
            values = step(model, divided([samples[m] for m in mine], masks, cuts[rank]), loss_fn)
            found.append((*values, loss_fn.scales))
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_take_the_step_of_one(network, samples, alone, tmp_path):
    idist.spawn("gloo", two_processes, args=(str(tmp_path),), nproc_per_node=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for (forces, _), one, other in zip(itertools.product(PATTERNS, CUTS), first, second, strict=True):
        masks = masks_of(forces)
        alone_loss = MTAdaWLoss(WEIGHTED, eta=0.1)
        step(network, make_batch(samples, masks), alone_loss)
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])
        assert_same(one, expected(alone, masks, factors=factors_of()))
        torch.testing.assert_close(one[2], alone_loss.scales, rtol=1e-12, atol=0)
