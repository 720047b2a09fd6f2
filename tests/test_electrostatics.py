import copy
import itertools
import math

import numpy as np
import pytest
import torch
import yaml

from aimnet2mult import nbops
from aimnet2mult.electrostatics import LRCoulomb, SRCoulomb
from aimnet2mult.models.base import build_model, load_weights
from aimnet2mult.modules import DFTD3, Forces
from aimnet2mult.neighborlist import neighbor_matrix
from aimnet2mult.utils.units import COULOMB_EV_ANGSTROM

PERIODIC = ("dsf", "ewald")
SKEW = torch.tensor([[7.0, 0, 0], [2.0, 6.0, 0], [-1.0, 1.5, 8.0]], dtype=torch.float64)


def charged_batch(coord, charges, cell=None, mol_idx=None, n_mol=1, **keys):
    """An internal batch with given charges; flat if ``coord`` (A, 3) is."""
    data = {"coord": coord, "numbers": torch.ones(coord.shape[:-1], dtype=torch.long), **keys}
    if cell is not None:
        data["cell"] = cell
    if mol_idx is not None:
        data["mol_idx"], data["charge"] = mol_idx, torch.zeros(n_mol, dtype=coord.dtype)
    # A single molecule would become dense.
    batch = nbops.internal_batch(data, 5.0, dense_limit=0 if coord.dim() == 2 else 256)
    if batch["coord"].dim() == 2 and batch["coord"].shape[0] == len(charges) + 1:
        charges = torch.cat([charges, charges.new_zeros(1)])
    batch["charges"] = charges
    return batch


def random_system(n_atoms, cell=None, seed=0, size=8.0, neutral=False):
    """Atoms at least 0.8 Å apart, also from images, with charges."""
    generator = torch.Generator().manual_seed(seed)
    box = torch.eye(3, dtype=torch.float64) * size if cell is None else cell
    images = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)), dtype=torch.float64) @ box
    if cell is None:
        images = images[13:14]
    coord = torch.empty(0, 3, dtype=torch.float64)
    while len(coord) < n_atoms:
        new = torch.rand(1, 3, generator=generator, dtype=torch.float64) @ box
        if len(coord) == 0 or torch.cdist(new, (coord + images.unsqueeze(1)).reshape(-1, 3)).min() > 0.8:
            coord = torch.cat([coord, new])
    q = torch.randn(n_atoms, generator=generator, dtype=torch.float64) * 0.5
    return coord, q - q.mean() if neutral else q


def module(method="simple", **kwargs):
    out = LRCoulomb(method=method, **kwargs).double()
    out.rc.fill_(4.6)
    return out


def energy_of(method_module, *args, **kwargs):
    return method_module(charged_batch(*args, **kwargs))["energy"]


def whole_energy(method_module, batch):
    """Energy without the short-range part taken away, in units of e²/Å."""
    short = SRCoulomb(envelope=method_module.envelope).double()
    short.rc.fill_(4.6)
    minus_short = short(dict(batch))["energy"]
    return (method_module(dict(batch))["energy"] - minus_short) / COULOMB_EV_ANGSTROM


def envelope(d, rc=4.6):
    return np.where(d < rc, np.exp(1 - 1 / np.where(d < rc, 1 - (d / rc) ** 2, 1.0)), 0.0)


def first_order(batch):
    return {**batch, "_first_order": batch["charge"]}


def derivatives(method_module, batch):
    """Energies and their gradients by positions, charges and cell, without the padding atom of a flat batch."""
    keys = [key for key in ("coord", "charges", "cell") if key in batch]
    batch = dict(batch)
    for key in keys:
        batch[key] = batch[key].detach().clone().requires_grad_(True)
    energy = method_module(batch)["energy"]
    # An atom without neighbours has an energy that depends on nothing.
    total = energy.sum() + sum(0.0 * batch[key].sum() for key in keys)
    gradients = torch.autograd.grad(total, [batch[key] for key in keys])
    n_padding = 1 if batch["coord"].dim() == 2 else 0
    return [
        energy.detach(),
        *(g[: len(g) - n_padding] if k != "cell" else g for k, g in zip(keys, gradients, strict=True)),
    ]


# ---- against sums written out ----


def numpy_pairs(coord, q, cell, cutoff):
    """Distances, charge products and weights ½ of all ordered pairs in a lattice, by brute force."""
    n = [int(cutoff * np.linalg.norm(row)) + 1 for row in np.linalg.inv(cell).T]
    d_all, qq_all = [], []
    for image in itertools.product(*(range(-k, k + 1) for k in n)):
        d = np.linalg.norm(coord[None] + np.array(image) @ cell - coord[:, None], axis=-1)
        counted = (d < cutoff) & (d > 0)
        d_all.append(d[counted])
        qq_all.append(np.outer(q, q)[counted])
    return np.concatenate(d_all), np.concatenate(qq_all)


def numpy_ewald(coord, q, cell, alpha, r_max, k_max):
    """Ewald sum without the short-range part, each term as in a textbook; eV."""
    d, qq = numpy_pairs(coord, q, cell, r_max)
    erfc = np.array([math.erfc(alpha * x) for x in d])
    real = 0.5 * np.sum(qq * (erfc - envelope(d)) / d)
    volume = abs(np.linalg.det(cell))
    basis = 2 * math.pi * np.linalg.inv(cell).T
    n = [int(k_max * np.linalg.norm(row) / (2 * math.pi)) + 1 for row in cell]
    reciprocal = 0.0
    for index in itertools.product(*(range(-k, k + 1) for k in n)):
        k = np.array(index) @ basis
        k2 = k @ k
        if 0 < k2 < k_max**2:
            structure = np.sum(q * np.exp(1j * coord @ k))
            reciprocal += 2 * math.pi / volume * math.exp(-k2 / (4 * alpha**2)) / k2 * abs(structure) ** 2
    self_energy = alpha / math.sqrt(math.pi) * np.sum(q**2)
    background = math.pi / (2 * volume * alpha**2) * q.sum() ** 2
    return COULOMB_EV_ANGSTROM * (real + reciprocal - self_energy - background)


def test_simple_is_the_sum_over_pairs_without_the_short_range():
    coord, q = random_system(12, seed=3)
    expected = 0.0
    for i in range(12):
        for j in range(i):
            d = float((coord[i] - coord[j]).norm())
            expected += COULOMB_EV_ANGSTROM * float(q[i] * q[j]) * (1 - float(envelope(d))) / d
    for batch in (charged_batch(coord[None], q[None]), charged_batch(coord, q), first_order(charged_batch(coord, q))):
        assert module()(batch)["energy"].item() == pytest.approx(expected, rel=1e-12)


def test_dsf_is_the_sum_over_images_inside_its_cutoff():
    coord, q = random_system(6, SKEW)
    cutoff, alpha = 9.0, 0.25
    d, qq = numpy_pairs(coord.numpy(), q.numpy(), SKEW.numpy(), cutoff)
    erfc = np.array([math.erfc(alpha * x) for x in d])
    at_cutoff = math.erfc(alpha * cutoff)
    gauss = 2 * alpha / math.sqrt(math.pi) * math.exp(-((alpha * cutoff) ** 2))
    kernel = erfc / d - at_cutoff / cutoff + (at_cutoff / cutoff**2 + gauss / cutoff) * (d - cutoff)
    expected = 0.5 * np.sum(qq * (kernel - envelope(d) / d))
    expected -= (at_cutoff / (2 * cutoff) + alpha / math.sqrt(math.pi)) * float(q @ q)
    energy = energy_of(module("dsf", dsf_rc=cutoff, dsf_alpha=alpha), coord, q, SKEW)
    assert energy.item() == pytest.approx(COULOMB_EV_ANGSTROM * expected, rel=1e-11)


@pytest.mark.parametrize("cell", [SKEW, SKEW[[1, 2, 0]] * 0.6, torch.diag(torch.tensor([3.0, 5.0, 14.0])).double()])
def test_ewald_is_the_textbook_sum(cell):
    coord, q = random_system(4, cell, seed=1)
    wraps = torch.tensor([[3.0, -2.0, 5.0]], dtype=torch.float64) * torch.arange(4).unsqueeze(1)
    energy = energy_of(module("ewald", ewald_accuracy=1e-12), coord + wraps @ cell, q, cell)
    expected = numpy_ewald(coord.numpy(), q.numpy(), cell.numpy(), 0.5, 12.0, 6.0)
    assert energy.item() == pytest.approx(expected, abs=1e-8)


# ---- crystals with known constants ----

FCC = torch.tensor([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], dtype=torch.float64)
CUBE = torch.eye(3, dtype=torch.float64)
SHEAR = torch.tensor([[1, 0, 0], [2, 1, 0], [-1, 3, 1]], dtype=torch.float64)  # same lattice, other vectors


@pytest.mark.parametrize("shape", ["primitive", "skew", "supercell"])
@pytest.mark.parametrize(
    ("lattice", "anion", "nearest", "madelung"),
    [
        (FCC, [0.5, 0.5, 0.5], 0.5, 1.747564594633182),
        (CUBE, [0.5, 0.5, 0.5], math.sqrt(0.75), 1.762674773070985),
        (FCC, [0.25, 0.25, 0.25], math.sqrt(3) / 4, 1.638055053388789),
    ],
    ids=["NaCl", "CsCl", "ZnS"],
)
def test_madelung_constants(lattice, anion, nearest, madelung, shape):
    a = 5.64
    cell = lattice * a
    coord = torch.tensor([[0.0, 0, 0], anion], dtype=torch.float64) * a
    q = torch.tensor([1.0, -1.0], dtype=torch.float64)
    if shape == "skew":
        cell = SHEAR @ cell
    elif shape == "supercell":
        images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64) @ cell
        coord, q, cell = (coord + images.unsqueeze(1)).reshape(-1, 3), q.repeat(8), cell * 2
    whole = whole_energy(module("ewald", ewald_accuracy=1e-12), charged_batch(coord, q, cell))
    assert -whole.item() / (len(q) / 2) * nearest * a == pytest.approx(madelung, abs=1e-9)


def test_a_lone_charge_in_a_box_has_the_energy_of_a_wigner_lattice():
    # Nijboer and Ruijgrok, 10.1007/BF01012868: -2.837297/(2L) for the simple cubic lattice with its background.
    batch = charged_batch(torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64), CUBE * 9.0)
    assert whole_energy(module("ewald", ewald_accuracy=1e-12), batch).item() == pytest.approx(-2.8372974795 / 18)


# ---- accuracy and size ----


@pytest.mark.parametrize("accuracy", [1e-3, 1e-5, 1e-7, 1e-9, 1e-11])
def test_ewald_is_as_accurate_as_it_says(accuracy):
    for cell, n_atoms in ((SKEW, 10), (SKEW * 0.5, 2), (torch.diag(torch.tensor([4.0, 9.0, 20.0])).double(), 20)):
        coord, q = random_system(n_atoms, cell, seed=2)
        batch = charged_batch(coord, q, cell)
        exact = derivatives(module("ewald", ewald_accuracy=1e-15), batch)
        found = derivatives(module("ewald", ewald_accuracy=accuracy), batch)
        scale = COULOMB_EV_ANGSTROM * float(q @ q)
        assert abs(found[0] - exact[0]).item() < accuracy * scale
        assert (found[1] - exact[1]).abs().max().item() < 10 * accuracy * scale


def test_ewald_does_not_depend_on_how_it_is_split():
    coord, q = random_system(10, SKEW)  # charged: the background counts
    energies = [
        energy_of(module("ewald", ewald_rc=rc, ewald_accuracy=1e-12), coord, q, SKEW) for rc in (0.0, 7.0, 14.0)
    ]
    torch.testing.assert_close(energies[1], energies[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(energies[2], energies[0], atol=1e-9, rtol=0)


def test_width_balances_both_sums():
    lr = module("ewald")
    small, large = (
        lr.crystal_alpha(torch.tensor([v], dtype=torch.float64), charged_batch(*random_system(n, SKEW), SKEW))
        for v, n in ((500.0, 5), (2000.0, 20))
    )
    # At constant density the cutoff grows as N^(1/6).
    assert (small / large).item() == pytest.approx(4 ** (1 / 6))


@pytest.mark.parametrize("method", PERIODIC)
def test_supercell_is_a_multiple(method):
    coord, q = random_system(6, SKEW, seed=1)
    lr = module(method, ewald_accuracy=1e-12)
    one = derivatives(lr, charged_batch(coord, q, SKEW))
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64) @ SKEW
    eight = derivatives(lr, charged_batch((coord + images.unsqueeze(1)).reshape(-1, 3), q.repeat(8), 2 * SKEW))
    torch.testing.assert_close(eight[0], 8 * one[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(eight[1], one[1].repeat(8, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(eight[2], one[2].repeat(8), rtol=0, atol=1e-9)
    # Stress times volume: coordᵀ dE/dcoord + cellᵀ dE/dcell.
    torch.testing.assert_close(_virial(eight, 2 * SKEW, 8), 8 * _virial(one, SKEW, 1), rtol=0, atol=1e-8)


def _virial(result, cell, copies):
    """Only the part from the cell and the sum of forces over equal atoms differ between cells: compare the whole."""
    coord, _ = random_system(6, SKEW, seed=1)
    images = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64) @ SKEW
    coord = (coord + images[:copies].unsqueeze(1)).reshape(-1, 3)
    return coord.T @ result[1] + cell.T @ result[3][0]


def test_a_molecule_in_a_growing_box_becomes_a_molecule():
    coord, q = random_system(6, seed=5, size=4.0, neutral=True)
    free = energy_of(module(), coord[None], q[None]).item()
    dipole = (q.unsqueeze(1) * coord).sum(0)
    for size in (15.0, 30.0, 60.0):
        boxed = energy_of(module("ewald", ewald_accuracy=1e-12), coord, q, CUBE * size).item()
        # Tin-foil Ewald of a dipole: -2π p²/3V (Makov and Payne, 10.1103/PhysRevB.51.4014), the rest falls off as L⁻⁵.
        image = -2 * math.pi / 3 * float(dipole @ dipole) / size**3 * COULOMB_EV_ANGSTROM
        assert boxed - free == pytest.approx(image, abs=2e3 / size**5)
        assert abs(boxed - free) > 0.5 * abs(image)
    long_cutoff = module("dsf", dsf_rc=60.0, dsf_alpha=0.0)
    molecule = energy_of(long_cutoff, coord[None], q[None])
    torch.testing.assert_close(energy_of(long_cutoff, coord, q, CUBE * 200.0), molecule, rtol=0, atol=1e-10)


def test_short_and_long_range_make_the_whole():
    coord = torch.tensor([[[0.0, 0, 0], [1.1, 0, 0], [0, 3.0, 0]]], dtype=torch.float64)
    q = torch.tensor([[0.3, -0.5, 0.2]], dtype=torch.float64)
    d = torch.cdist(coord[0], coord[0])
    whole = sum(q[0, i] * q[0, j] / d[i, j] for i in range(3) for j in range(i))
    for name in ("exp", "cosine"):
        for batch in (charged_batch(coord, q), charged_batch(coord[0], q[0])):
            torch.testing.assert_close(whole_energy(module(envelope=name), batch), whole.view(1))


# ---- layouts and derivatives ----


def three_molecules():
    systems = [random_system(n, seed=n, size=9.0) for n in (9, 4, 7)]
    coord, q = torch.zeros(3, 9, 3, dtype=torch.float64), torch.zeros(3, 9, dtype=torch.float64)
    numbers = torch.zeros(3, 9, dtype=torch.long)
    for b, (x, charges) in enumerate(systems):
        coord[b, : len(x)], q[b, : len(x)], numbers[b, : len(x)] = x, charges, 1
    return coord, q, numbers


@pytest.mark.parametrize("method", ["simple", "dsf", "ewald"])
@pytest.mark.parametrize("block_pairs", [2**18, 20])
def test_layouts_of_molecules_agree(method, block_pairs):
    coord, q, numbers = three_molecules()
    lr = module(method, **({"dsf_rc": 6.0} if method == "dsf" else {}))
    lr.block_pairs = block_pairs
    dense = nbops.internal_batch({"coord": coord, "numbers": numbers}, 5.0)
    expected = derivatives(lr, {**dense, "charges": q})
    real = numbers > 0
    mol_idx = torch.arange(3).unsqueeze(1).expand(3, 9)[real]
    flat = charged_batch(coord[real], q[real], mol_idx=mol_idx, n_mol=3)
    nbmat, _ = neighbor_matrix(coord[real], mol_idx, lr.cutoff_lr if method == "dsf" else 1000.0)
    own = {**flat, "nbmat_lr": nbmat}
    for batch in (flat, first_order(flat), own, first_order(own)):
        energy, coord_gradient, q_gradient = derivatives(lr, batch)
        torch.testing.assert_close(energy, expected[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(coord_gradient, expected[1][real], rtol=0, atol=1e-11)
        torch.testing.assert_close(q_gradient, expected[2][real], rtol=0, atol=1e-11)


def two_crystals():
    cells = torch.stack([SKEW * 0.7, torch.diag(torch.tensor([6.0, 9.0, 5.0])).double()])
    parts = [random_system(n, cell, seed=n) for n, cell in zip((3, 8), cells, strict=True)]
    coord, q = (torch.cat(x) for x in zip(*parts, strict=True))
    return coord, q, cells, torch.tensor([0] * 3 + [1] * 8)


@pytest.mark.parametrize("method", PERIODIC)
@pytest.mark.parametrize("block_pairs", [2**18, 300])
def test_crystals_alone_together_and_with_given_neighbours(method, block_pairs):
    coord, q, cells, mol_idx = two_crystals()
    lr = module(method, dsf_rc=9.0, ewald_accuracy=1e-12)
    lr.block_pairs = block_pairs
    batch = charged_batch(coord, q, cells, mol_idx, 2)
    nbmat, shifts = neighbor_matrix(coord, mol_idx, lr.cutoff_lr_periodic, cells)
    own = {**batch, "nbmat_lr": nbmat, "shifts_lr": shifts}
    alone = [derivatives(lr, charged_batch(coord[mol_idx == b], q[mol_idx == b], cells[b])) for b in range(2)]
    expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    together = derivatives(lr, batch)
    for found, wanted in zip(together, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    for other, tolerance in ((first_order(batch), 1e-12), (own, 1e-8), (first_order(own), 1e-8)):
        for found, wanted in zip(derivatives(lr, other), together, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=tolerance)


@pytest.mark.parametrize(
    ("method", "periodic"), [("simple", False), *itertools.product(PERIODIC, [False, True])]
)  # the simple sum is not for crystals
def test_first_and_second_derivatives(method, periodic):
    cell = SKEW * 0.7
    coord, q = random_system(3, cell if periodic else None, size=5.0)
    lr = module(method, dsf_rc=6.0, ewald_accuracy=1e-12)
    batch = charged_batch(coord, q, cell if periodic else None)
    keys = ["coord", "charges"] + (["cell"] if periodic else [])

    def energy(*values):
        given = dict(zip(keys, values, strict=True))
        given["charges"] = torch.cat([given["charges"], q.new_zeros(1)])
        return lr({**batch, **given})["energy"]

    inputs = [(q if key == "charges" else batch[key]).clone().requires_grad_(True) for key in keys]
    assert torch.autograd.gradcheck(energy, inputs)
    assert torch.autograd.gradgradcheck(energy, inputs)


@pytest.mark.parametrize("method", PERIODIC)
def test_strain_derivative_is_that_of_the_energy(method):
    coord, q, cells, mol_idx = two_crystals()
    lr = module(method, dsf_rc=9.0, ewald_accuracy=1e-12)
    _, coord_gradient, _, cell_gradient = derivatives(lr, first_order(charged_batch(coord, q, cells, mol_idx, 2)))
    # Derivative of the second crystal's energy by the strain that changes x with y.
    analytic = (coord[3:].T @ coord_gradient[3:] + cells[1].T @ cell_gradient[1])[1, 0]
    energies = []
    for step in (1e-5, -1e-5):
        strain = torch.eye(3, dtype=torch.float64)
        strain[1, 0] += step
        energies.append(energy_of(lr, coord[3:] @ strain, q[3:], cells[1] @ strain).item())
    assert analytic.item() == pytest.approx((energies[0] - energies[1]) / 2e-5, abs=1e-6)


def test_memory_of_large_molecules_stays_linear():
    coord, q = random_system(300, size=60.0)
    sizes = []
    take = nbops.pair_block

    def counted(*args):
        block = take(*args)
        sizes.append(block.d_ij.numel())
        assert not block.d_ij.requires_grad
        return block

    batch = first_order(
        charged_batch(coord.repeat(5, 1) + torch.arange(5).repeat_interleave(300)[:, None] * 0.37, q.repeat(5))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbops, "pair_block", counted)
        derivatives(module(), batch)
    assert sum(sizes) > 1500 * 1499 / 2
    assert max(sizes) < 2 * nbops.BLOCK_PAIRS


# ---- the module ----


def test_method_is_switched_on_a_scripted_module():
    coord, q = random_system(5, SKEW)
    scripted = torch.jit.script(module())
    free, crystal = charged_batch(coord[None], q[None]), charged_batch(coord, q, SKEW)
    for method, cutoff, kwargs in (
        ("dsf", 7.0, {"dsf_rc": 7.0, "dsf_alpha": 0.3}),
        ("ewald", 0.0, {"ewald_accuracy": 1e-6}),
        ("ewald", 9.0, {"ewald_rc": 9.0, "ewald_accuracy": 1e-6}),
        ("simple", 0.0, {}),
    ):
        scripted.set_method(method, cutoff, 0.3, 1e-6)
        eager = module(method, **kwargs)
        for attribute in ("method", "cutoff_lr", "cutoff_lr_periodic"):
            assert getattr(scripted, attribute) == getattr(eager, attribute)
        for batch in (free, crystal) if method != "simple" else (free,):
            for mode in (batch, first_order(batch)) if "cell" in batch else (batch,):
                for _ in range(4):  # the profiling executor compiles anew after the second call
                    for found, wanted in zip(derivatives(scripted, mode), derivatives(eager, mode), strict=True):
                        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_mistakes():
    with pytest.raises(ValueError, match="method 'ewalt' is not one of simple, dsf, ewald"):
        LRCoulomb(method="ewalt")
    with pytest.raises(ValueError, match="envelope 'sine' is not one of"):
        SRCoulomb(envelope="sine")
    lr = LRCoulomb(method="dsf", dsf_rc=11.0)
    for arguments, message in (
        (("dsf", -1.0), "cutoff of the Coulomb method dsf must be finite and not negative, not -1.0"),
        (("dsf", math.inf), "must be finite"),
        (("ewald", math.nan), "must be finite"),
        (("dsf", 15.0, -0.2), "dsf_alpha must be finite and not negative"),
        (("ewald", 0.0, 0.2, 0.0), "ewald_accuracy must be between 1e-15 and 1e-2"),
        (("ewald", 0.0, 0.2, 1.0), "ewald_accuracy must be between 1e-15 and 1e-2"),
    ):
        with pytest.raises(ValueError, match=message):
            lr.set_method(*arguments)
        assert (lr.method, lr.dsf_rc, lr.cutoff_lr) == ("dsf", 11.0, 11.0)
    with pytest.raises(ValueError, match="simple cannot be used with a cell: choose dsf or ewald"):
        energy_of(LRCoulomb(), torch.zeros(1, 3), torch.zeros(1), torch.eye(3) * 5)


@pytest.mark.parametrize("method", ["simple", "dsf", "ewald"])
def test_one_atom_and_far_atoms(method):
    for coord in (torch.zeros(1, 3), torch.tensor([[0.0, 0, 0], [500.0, 0, 0]])):
        q = torch.tensor([0.5, 0.25])[: len(coord)]
        expected = derivatives(module(method).float(), charged_batch(coord[None], q[None]))
        for batch in (charged_batch(coord, q), first_order(charged_batch(coord, q))):
            found = derivatives(module(method).float(), batch)
            assert all(torch.isfinite(x).all() for x in found)
            torch.testing.assert_close(found[0], expected[0])


@pytest.fixture(scope="module")
def artifact(fixtures_dir):
    return torch.load(fixtures_dir / "peer_v2_lr.pt", weights_only=True)


class TestAgainstThePublishedPackage:
    """Numbers of the calculator of `aimnet` 0.2.5 for a model of random weights."""

    def model(self, artifact, method, dispersion):
        text = artifact["model_yaml"].replace("aimnet.models.AIMNet2", "aimnet2mult.models.aimnet2.AIMNet2")
        config = copy.deepcopy(yaml.safe_load(text.replace("aimnet.modules", "aimnet2mult.modules")))
        weights = dict(artifact["state_dict"])
        config["kwargs"]["num_types"] = weights["afv.weight"].shape[0]
        if method is not None:
            del config["kwargs"]["outputs"]["srcoulomb"], weights["outputs.srcoulomb.rc"]
        model = build_model(config)
        load_weights(model, weights)
        model.outputs["atomic_shift"].shifts.weight.data = weights["outputs.atomic_shift.shifts.weight"]
        if method is not None:
            model.add_output("lrcoulomb", LRCoulomb(method=method))
        if dispersion:
            model.add_output("dftd3", DFTD3(**artifact["d3_params"], cutoff=15.0, smoothing_fraction=0.2))
        return Forces(model).eval()

    @pytest.mark.parametrize(
        ("tag", "method", "dispersion"),
        [
            ("default", "simple", True),
            ("dsf", "dsf", True),
            ("no_external_dispersion", "simple", False),
            ("no_external_coulomb", None, True),
        ],
    )
    def test_molecules(self, artifact, reference, molecules, tag, method, dispersion):
        expected = reference("peer_v2_lr")
        out = self.model(artifact, method, dispersion)(molecules(torch.float32))
        np.testing.assert_allclose(out["energy"].detach(), expected[f"energy_{tag}"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(out["forces"], expected[f"forces_{tag}"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(out["charges"].detach(), expected[f"charges_{tag}"], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("method", PERIODIC)
    def test_stress(self, artifact, reference, method):
        expected = reference("peer_v2_lr")
        data = {k: torch.tensor(expected[f"water2_triclinic_{k}"]) for k in ("coord", "numbers", "cell")}
        coord, cell = data["coord"].requires_grad_(True), data["cell"].requires_grad_(True)
        energy = self.model(artifact, method, False).model(data)["energy"]
        by_coord, by_cell = torch.autograd.grad(energy.sum(), [coord, cell])
        stress = (coord.T @ by_coord + cell.T @ by_cell).detach() / torch.linalg.det(cell).detach().abs()
        wanted = expected[f"water2_triclinic_{method}_nodisp_stress"]
        np.testing.assert_allclose(stress, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max() + 1e-6)

    @pytest.mark.parametrize(("tag", "method"), [("dsf", "dsf"), ("ewald", "ewald")])
    @pytest.mark.parametrize("dispersion", [True, False])
    def test_crystal(self, artifact, reference, tag, method, dispersion):
        expected = reference("peer_v2_lr")
        name = f"water2_triclinic_{tag}" + ("" if dispersion else "_nodisp")
        data = {k: torch.tensor(expected[f"water2_triclinic_{k}"]) for k in ("coord", "numbers", "cell")}
        out = self.model(artifact, method, dispersion)(data)
        np.testing.assert_allclose(out["energy"].detach(), expected[f"{name}_energy"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(out["forces"], expected[f"{name}_forces"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(out["charges"].detach(), expected[f"{name}_charges"], rtol=0, atol=1e-5)
