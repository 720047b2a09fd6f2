"""Hot paths do no more than they did: operations, matrix products, memory and waits are counted, not timed.

Times are noisy, counts are not: a bound that is exceeded means that somebody added work, and the message says how much
there was when the bound was set. Counts depend on the version of PyTorch a little, hence the margin. Whoever makes a
path leaner lowers its numbers here; whoever has a good reason to do more raises them, and says so.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.models.jit_wrapper import DeployableModel
from aimnet2mult.models.potential import Potential
from aimnet2mult.modules import DFTD3, Forces, SelfAtomicEnergies
from aimnet2mult.train.engine import make_step, predict
from aimnet2mult.train.loss import MTLoss

ELEMENTS = [1, 6, 7, 8]
SPACING = 1.6
"""Å between neighbours of the grid that atoms stand on."""

MARGIN = 1.08
"""What versions of PyTorch may differ by."""

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
LAYERS = {"aten::mm", "aten::addmm"}
"""Products with a matrix of weights: rows are atoms. Those of the convolutions are batched."""

WAITS = {"aten::_local_scalar_dense", "aten::nonzero"}
"""What makes the program wait for a GPU: a number becomes a number of Python, a shape depends on values."""

PER_ATOM = "aimnet2mult.train.loss.peratom_loss_fn"
LOSS = {
    "energy": {"fn": "aimnet2mult.train.loss.energy_loss_fn", "weight": 1.0},
    "forces": {"fn": PER_ATOM, "weight": 1.0, "kwargs": {"key_true": "forces", "key_pred": "forces"}},
    "charges": {"fn": PER_ATOM, "weight": 1.0, "kwargs": {"key_true": "charges", "key_pred": "charges"}},
}


class Counts(TorchDispatchMode):
    """Count what PyTorch is asked to do inside the context, views apart."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.flops = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().split(".")[0]
        given = {t.untyped_storage().data_ptr() for t in _tensors(args)}
        made = [t for t in _tensors(out) if t.untyped_storage().data_ptr() not in given]
        if made or name in WAITS or name.endswith("_"):
            self.calls[name] += 1
            self.bytes += sum(t.numel() * t.element_size() for t in made)
        if name in PRODUCTS:
            first, second = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.flops[name] += 2 * first.numel() * second.shape[-1]
        return out

    @property
    def operations(self):
        return self.calls.total()

    @property
    def products(self):
        return sum(self.calls[name] for name in PRODUCTS)

    @property
    def mflop(self):
        return self.flops.total() / 1e6

    @property
    def mib(self):
        return self.bytes / 2**20

    @property
    def layer_flops(self):
        return sum(self.flops[name] for name in LAYERS)

    @property
    def waits(self):
        return sum(self.calls[name] for name in WAITS)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def counted(call):
    """Counts of a call, once it has been warmed up."""
    call()
    with Counts() as counts:
        call()
    return counts


def check(counts, **measured):
    """At most the margin more than what was measured when the bound was set."""
    found = {name: getattr(counts, name) for name in measured}
    assert all(found[name] <= MARGIN * bound for name, bound in measured.items()), f"{found}, it was {measured}"


# --------------------------------------------------------------------------------------------------
# models and molecules
# --------------------------------------------------------------------------------------------------


def molecule(n_atoms, seed=0):
    """Atomic numbers and coordinates of atoms near the points of a grid."""
    rng = np.random.default_rng(seed)
    side = math.ceil(n_atoms ** (1 / 3))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n_atoms]
    numbers = rng.choice(ELEMENTS, n_atoms)
    numbers[0] = 1 if (numbers[1:].sum() % 2) else 6  # an even number of electrons
    return numbers, SPACING * grid + rng.normal(0, 0.05, (n_atoms, 3))


def batch_of(sizes, fidelities=1):
    """Padded batch of molecules of these sizes, with labels; fidelities take turns."""
    n_mol, n_places = len(sizes), max(sizes)
    coord, numbers = torch.zeros(n_mol, n_places, 3), torch.zeros(n_mol, n_places, dtype=torch.long)
    level = torch.arange(n_mol) % fidelities
    for k, size in enumerate(sizes):
        z, r = molecule(size, seed=k)
        coord[k, :size] = torch.tensor(r, dtype=torch.float32)
        numbers[k, :size] = torch.tensor(z) + 200 * level[k]
    x = {"coord": coord, "numbers": numbers, "charge": torch.zeros(n_mol), "mult": torch.ones(n_mol)}
    x["_fidelities"] = level
    y = {"energy": torch.zeros(n_mol, dtype=torch.float64), "forces": torch.zeros_like(coord)}
    y["charges"] = torch.zeros_like(coord[..., 0])
    return x, {**y, **{f"{key}_mask": torch.ones(n_mol, dtype=torch.bool) for key in y}}


def single(n_atoms, flat=False):
    """One molecule, without labels."""
    numbers, coord = molecule(n_atoms)
    data = {"coord": torch.tensor(coord, dtype=torch.float32), "numbers": torch.tensor(numbers)}
    return data if flat else {key: value.unsqueeze(0) for key, value in data.items()}


@pytest.fixture(scope="module")
def config(fixtures_dir):
    return load_model_config(fixtures_dir / "ref_mixed_model.yaml")


@pytest.fixture(scope="module")
def network(config):
    """Networks with forces by number of fidelities, in training mode."""

    def build(fidelities):
        torch.manual_seed(0)
        return Forces(build_model(config, num_fidelities=fidelities)).train()

    return build


@pytest.fixture(scope="module")
def deployable(config):
    """Models as they are compiled; in eager mode, which runs the same operations."""

    def build(coulomb=True, d3=False):
        torch.manual_seed(0)
        outputs = {k: v for k, v in config["kwargs"]["outputs"].items() if coulomb or k != "lrcoulomb"}
        model = build_model({**config, "kwargs": {**config["kwargs"], "outputs": outputs}})
        model.add_output("self_atomic_energies", SelfAtomicEnergies(dict.fromkeys(ELEMENTS, -100.0)))
        if d3:
            model.add_output("dftd3", DFTD3(s8=0.7875, a1=0.4289, a2=4.4407))
        return DeployableModel(model, ELEMENTS).eval()

    return build


def training_step(model, batch):
    """Counts of a step that leaves the weights as they are."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    step = make_step(model, optimizer, MTLoss(LOSS), "cpu", max_grad_norm=10.0)
    return counted(lambda: step([batch]))


def evaluation(model, sizes):
    """Counts of energies and forces in evaluation mode, without parts."""
    x, _ = batch_of(sizes)
    return counted(lambda: model(x))


# --------------------------------------------------------------------------------------------------
# training
# --------------------------------------------------------------------------------------------------

EQUAL = [10] * 6


def test_training_step_of_one_fidelity(network):
    check(training_step(network(1), batch_of(EQUAL)), operations=1367, products=191, mflop=55.38, mib=16.47)


def test_training_step_of_three_fidelities(network):
    counts = training_step(network(3), batch_of(EQUAL, 3))
    check(counts, operations=1542, products=225, mflop=55.38, mib=16.80)


def test_heads_add_few_operations_and_no_work(network):
    one, three = training_step(network(1), batch_of(EQUAL)), training_step(network(3), batch_of(EQUAL, 3))
    assert three.flops.total() == one.flops.total()
    assert three.operations <= 1.15 * one.operations, f"{three.operations} after {one.operations}, it was 1542 and 1367"
    assert three.bytes <= 1.04 * one.bytes, f"{three.mib:.2f} MiB after {one.mib:.2f} MiB, it was 16.80 and 16.47"


def test_layers_see_no_padding(network):
    model, sizes = network(1).eval(), (3, 5, 9, 12)
    alone = sum(evaluation(model, [size]).layer_flops for size in sizes)
    assert alone > 0
    assert evaluation(model, sizes).layer_flops == alone


def test_uneven_batch_costs_what_its_groups_cost(network):
    model = network(1)
    small, large = [5] * 20, [40]
    apart = [training_step(model, batch_of(sizes)).flops.total() for sizes in (small, large)]
    assert training_step(model, batch_of(small + large)).flops.total() == sum(apart)


@pytest.mark.parametrize(("fidelities", "sizes"), [(1, EQUAL), (3, EQUAL), (3, [10, 6, 8, 10, 5, 10])])
def test_forward_and_backward_wait_once_for_the_device(network, fidelities, sizes):
    model, loss = network(fidelities), MTLoss(LOSS)
    x, y = batch_of(sizes, fidelities)
    counts = counted(lambda: loss({**x, **model(x)}, y)["loss"].backward())
    assert counts.calls["aten::_local_scalar_dense"] == 0
    assert counts.calls["aten::nonzero"] <= 1, "only to find the real atoms"


def test_waits_of_a_whole_step(network):
    # Batches are divided on the CPU, where nobody waits: two nonzero, three numbers. The fourth is the report.
    counts = training_step(network(3), batch_of(EQUAL, 3))
    assert counts.calls["aten::_local_scalar_dense"] <= 4
    assert counts.calls["aten::nonzero"] <= 3


@pytest.mark.parametrize("training", [True, False])
def test_molecules_without_force_labels_have_no_gradient_by_positions(network, training):
    model = network(1).train(training)
    x, y = batch_of(EQUAL)
    y["forces_mask"] = torch.zeros_like(y["forces_mask"])
    with torch.set_grad_enabled(training):
        labels_say, told = (
            counted(lambda wanted=wanted: predict(model, (x, y), wanted, "cpu")) for wanted in (True, False)
        )
        out, _ = predict(model, (x, y), True, "cpu")
    assert labels_say.flops == told.flops
    check(labels_say, products=28)
    assert out["energy"].requires_grad == training
    assert not out["forces"].any()


# --------------------------------------------------------------------------------------------------
# inference
# --------------------------------------------------------------------------------------------------


def test_dense_call(deployable):
    model = deployable()
    short, long = (counted(lambda n=n: model(single(n))) for n in (20, 40))
    assert short.operations == long.operations
    check(short, operations=425, products=64, mflop=7.613, mib=2.355, waits=3)
    check(long, mflop=21.07, mib=7.33)


@pytest.mark.parametrize(
    ("terms", "bounds"),
    [
        ({"coulomb": False}, {"operations": 1355, "products": 84, "mflop": 467.8, "mib": 460.7, "waits": 15}),
        ({"coulomb": True}, {"operations": 2292, "products": 84, "mflop": 467.8, "mib": 537.3, "waits": 29}),
        (
            {"coulomb": False, "d3": True},
            {"operations": 2941, "products": 158, "mflop": 524.6, "mib": 552.8, "waits": 23},
        ),
    ],
    ids=["network", "coulomb", "d3"],
)
def test_flat_call(deployable, terms, bounds):
    model = deployable(**terms)
    check(counted(lambda: model(single(800, flat=True))), **bounds)


def test_flat_call_is_linear_in_atoms(deployable):
    # Neither operations nor memory per operation grow much: there is one more round for each block of bounded size.
    model = deployable(coulomb=False)
    small, large = (counted(lambda n=n: model(single(n, flat=True))) for n in (400, 1600))
    assert large.layer_flops == 4 * small.layer_flops
    assert large.bytes <= 4.8 * small.bytes, f"{large.mib:.0f} MiB after {small.mib:.0f} MiB, it was 964 and 216"
    assert large.operations <= 1.63 * small.operations, (
        f"{large.operations} after {small.operations}, it was 1716 and 1137"
    )


@pytest.mark.parametrize("n_atoms", [10, 20])
def test_hessian_vector_product(deployable, n_atoms):
    model, data = Potential(deployable(), {}, {}), single(n_atoms)
    counts = counted(lambda: model.hessian_vector_product(data, torch.ones_like(data["coord"])))
    check(counts, operations=1143, products=150, mflop={10: 6.73, 20: 17.53}[n_atoms], waits=4)
