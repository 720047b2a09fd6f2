"""DFT-D4 against the program dftd4, and what every energy term owes: invariance, derivatives, layouts."""

import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aimnet2mult.dftd4 import (
    DFTD4,
    FREQUENCIES,
    atm_energy,
    atm_energy_and_derivatives,
    charge_scaling,
    gaussian_weights,
    limited_cn,
    trapezoid_weights,
    triple_index,
)
from aimnet2mult.dispersion_params import d4_parameters
from aimnet2mult.utils.units import BOHR_ANGSTROM, HARTREE_EV

# Energies and gradients of dftd4 4.3.1; the file's "note" says how they were made.
EXPECTED = json.loads((Path(__file__).parent / "fixtures" / "dftd4_expected.json").read_text())
BOHR_EXPECTED = EXPECTED["bohr_in_angstrom"]

ENERGY_TOLERANCE = 1e-10  # Hartree
GRADIENT_TOLERANCE = 5e-9  # Hartree/Bohr; uranium differs by 2e-9, no other element by more than 1e-11
FUNCTIONALS = ("pbe", "b3lyp", "pbe0", "wb97x", "wb97m", "tpss", "r2scan-3c", "wb97x-2008", "revdsd-pbep86")


def d4(functional: str = "pbe", **options) -> DFTD4:
    return DFTD4(**asdict(d4_parameters(functional)), **options)


def molecule(numbers: list[int], coord, charge: float = 0.0) -> dict[str, Tensor]:
    """Dense batch of one molecule in double precision."""
    return {
        "coord": torch.as_tensor(np.asarray(coord), dtype=torch.float64).unsqueeze(0),
        "numbers": torch.tensor(numbers).unsqueeze(0),
        "charge": torch.tensor([charge], dtype=torch.float64),
    }


def padded(molecules: list[dict[str, Tensor]], extra: int = 0) -> dict[str, Tensor]:
    n_atoms = max(m["numbers"].shape[1] for m in molecules) + extra
    pads = [n_atoms - m["numbers"].shape[1] for m in molecules]
    functional = torch.nn.functional
    return {
        "coord": torch.cat([functional.pad(m["coord"], (0, 0, 0, p)) for m, p in zip(molecules, pads, strict=True)]),
        "numbers": torch.cat([functional.pad(m["numbers"], (0, p)) for m, p in zip(molecules, pads, strict=True)]),
        "charge": torch.cat([m["charge"] for m in molecules]),
    }


def flat(molecules: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flat batch with a padding atom at the end."""
    sizes = [m["numbers"].shape[1] for m in molecules]
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return {
        "coord": torch.cat([m["coord"][0] for m in molecules] + [torch.zeros(1, 3, dtype=torch.float64)]),
        "numbers": torch.cat([m["numbers"][0] for m in molecules] + [torch.zeros(1, dtype=torch.long)]),
        "charge": torch.cat([m["charge"] for m in molecules]),
        "mol_idx": torch.cat([index, index[-1:]]),
    }


def first_order(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**data, "_first_order": data["charge"]}


def energy_and_gradient(model: torch.nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Energies (B,), Hartree, and gradient, Hartree/Bohr."""
    coord = data["coord"].clone().requires_grad_()
    energy = model({**data, "coord": coord})["energy"]
    (gradient,) = torch.autograd.grad(energy.sum(), coord)
    return energy.detach() / HARTREE_EV, gradient * BOHR_ANGSTROM / HARTREE_EV


def assert_agrees_with_dftd4(functional: str, molecules: list[dict[str, Tensor]]) -> None:
    """Energies and gradients of a padded batch and one by one in the program, with our Bohr."""
    interface = pytest.importorskip("dftd4.interface")
    p = d4_parameters(functional)
    damping = interface.DampingParam(s6=p.s6, s8=p.s8, s9=p.s9, a1=p.a1, a2=p.a2)
    energy, gradient = energy_and_gradient(d4(functional), padded(molecules))
    for m, e, g in zip(molecules, energy.tolist(), gradient.numpy(), strict=True):
        numbers, coord = m["numbers"][0].numpy(), m["coord"][0].numpy() / BOHR_ANGSTROM
        program = interface.DispersionModel(numbers, coord, float(m["charge"]), ga=p.ga, gc=p.gc)
        result = program.get_dispersion(damping, grad=True)
        assert e == pytest.approx(float(result["energy"]), abs=ENERGY_TOLERANCE), numbers
        np.testing.assert_allclose(g[: len(numbers)], result["gradient"], rtol=0, atol=GRADIENT_TOLERANCE)


def cluster(numbers: list[int], seed: int, charge: float = 0.0, spacing: float = 1.6) -> dict[str, Tensor]:
    """Atoms on a distorted grid, in Å, at least ``spacing``/2 apart."""
    generator = torch.Generator().manual_seed(seed)
    side = math.ceil(len(numbers) ** (1 / 3))
    grid = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 3)[: len(numbers)]
    noise = torch.rand(grid.shape, generator=generator, dtype=torch.float64) - 0.5
    return molecule(numbers, spacing * (grid + 0.5 * noise), charge)


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Tensor]]:
    """Molecules of different size, composition and charge."""
    systems = {s["name"]: s for s in EXPECTED["systems"]}
    names = ("g2/H2O", "heavy/AuCH3", "s22/Ethene-ethyne_complex", "ion/PdCl4(2-)")
    chosen = [systems[name] for name in names]
    return [molecule(s["numbers"], s["positions_angstrom"], s["charge"]) for s in chosen]


# --------------------------------------------------------------------------------------------------
# against dftd4
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("functional", EXPECTED["params"])
def test_agrees_with_stored_energies_and_gradients(functional):
    p = {key: value for key, value in EXPECTED["params"][functional].items() if key != "alp"}
    model = DFTD4(**p)
    scale = BOHR_ANGSTROM / BOHR_EXPECTED
    for system in EXPECTED["systems"]:
        coord = scale * np.array(system["positions_angstrom"])
        data = molecule(system["numbers"], coord, system["charge"])
        expected = system["results"][functional]
        for batch in (data, first_order(data)):
            energy, gradient = energy_and_gradient(model, batch)
            assert energy.item() == pytest.approx(expected["energy"], abs=ENERGY_TOLERANCE), system["name"]
            np.testing.assert_allclose(gradient[0], expected["gradient"], rtol=0, atol=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("functional", FUNCTIONALS)
def test_agrees_with_dftd4_for_every_element(functional):
    # Each element with neighbours of all kinds, neutral or charged.
    partners = [[1, 1, 1], [6, 1, 8], [9, 17, 1], [8, 8, 7, 1], [16, 1], [15, 35, 6, 6]]
    molecules = [cluster([z, *partners[z % 6]], seed=z, charge=float(z % 3 - 1)) for z in d4().elements]
    assert len(molecules) == 103
    assert_agrees_with_dftd4(functional, molecules)


def test_agrees_with_dftd4_for_molecules_of_a_test_set():
    collections = pytest.importorskip("ase.collections")
    molecules = [
        molecule(atoms.numbers.tolist(), atoms.positions, float(k % 3 - 1) if len(atoms) > 1 else 0.0)
        for k, atoms in enumerate(collections.g2)
    ]
    assert len(molecules) > 150
    assert_agrees_with_dftd4("b3lyp", molecules)


def test_agrees_with_dftd4_where_atoms_are_crowded():
    # Coordination numbers far above those of the references, and atoms in each other's cores.
    molecules = [cluster([26, 6, 8, 1, 79, 17] * 4, seed=seed, spacing=1.0 + 0.1 * seed) for seed in range(5)]
    assert_agrees_with_dftd4("pbe", molecules)


def test_agrees_with_dftd4_in_a_long_chain():
    # Pairs (60 Bohr) and triangles (40 Bohr) are cut off, both of which matter.
    generator = torch.Generator().manual_seed(3)
    coord = torch.rand(80, 3, generator=generator, dtype=torch.float64)
    coord[:, 0] += 1.5 * torch.arange(80)
    chain = molecule([6, 1, 8, 17] * 20, coord, 1.0)
    assert_agrees_with_dftd4("wb97m", [chain])
    expected, _ = energy_and_gradient(d4("wb97m"), chain)
    for cutoff in ("pair_cutoff", "triple_cutoff"):
        unlimited = d4("wb97m")
        setattr(unlimited, cutoff, math.inf)
        assert abs(energy_and_gradient(unlimited, chain)[0] - expected) > ENERGY_TOLERANCE


@pytest.mark.parametrize("system", EXPECTED["systems"], ids=lambda s: s["name"])
def test_charges_and_c6_are_those_of_dftd4(system):
    model = d4()
    coord = torch.tensor(system["positions_angstrom"], dtype=torch.float64) / BOHR_EXPECTED
    numbers = torch.tensor(system["numbers"]).unsqueeze(0)
    # Seen through the steps of the model.
    seen = {}
    original = model.c6_coefficients

    def spy(numbers: Tensor, atoms: Tensor, cn: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        c6 = original(numbers, atoms, cn, q)
        seen.update(cn=cn[0], q=q[0], c6=c6[0][0])
        return c6

    model.c6_coefficients = spy
    charge = torch.tensor([float(system["charge"])])
    model.energy(coord.unsqueeze(0) * BOHR_ANGSTROM, numbers, charge)
    np.testing.assert_allclose(seen["q"], system["eeq_charges"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(seen["cn"], system["coordination_numbers"], rtol=0, atol=1e-9)
    if system["c6_coefficients"] is not None:
        np.testing.assert_allclose(seen["c6"], system["c6_coefficients"], rtol=0, atol=1e-8)
    assert seen["q"].sum().item() == pytest.approx(system["charge"], abs=1e-12)


# --------------------------------------------------------------------------------------------------
# pieces
# --------------------------------------------------------------------------------------------------


def test_limited_coordination_number():
    cn = torch.tensor([1e-18, 1e-9, 0.5, 4.0, 7.9, 20.0], dtype=torch.float64)
    published = math.log(1 + math.exp(8.0)) - torch.log(1 + torch.exp(8.0 - cn))
    torch.testing.assert_close(limited_cn(cn, 8.0), published, rtol=0, atol=1e-14)
    assert limited_cn(cn, 8.0)[0] == pytest.approx(1e-18 * math.exp(8.0) / (1 + math.exp(8.0)), rel=1e-12)


def test_charge_scaling():
    q = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    steepness = torch.tensor(0.945)
    scale = charge_scaling(q, torch.tensor(0.2), torch.tensor(1.0), 3.0, steepness, 1e-3)
    assert scale[4].item() == pytest.approx(1.0)
    assert torch.all(scale.diff() <= 0)
    assert scale[0].item() == scale[1].item() == pytest.approx(math.exp(3.0))
    (slope,) = torch.autograd.grad(scale.sum(), q)
    assert torch.isfinite(slope).all()


def test_weights_of_an_overcoordinated_atom_stay_normalised():
    cn, reference_cn = torch.tensor([[40.0]]), torch.tensor([0.0, 1.0, 4.0, 5.0])
    weights = gaussian_weights(cn, reference_cn, torch.tensor([3.0, 1.0, 3.0, 0.0]), 6.0)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    x = 6.0 * (torch.tensor([0.3, 0.4], dtype=torch.float64)).square()
    sums = torch.stack([sum(torch.exp(-m * x[0]) for m in (1, 2, 3)), torch.exp(-x[1])])
    weights = gaussian_weights(torch.zeros(1, 1).double(), torch.tensor([0.3, 0.4]).double(), torch.tensor([3, 1]), 6.0)
    torch.testing.assert_close(weights[0], sums / sums.sum(), rtol=1e-7, atol=0)


def test_integral_over_frequencies():
    # London's model, α(iω) = α₀ / (1 + (ω/ω₀)²), has C6 = ¾ α₀² ω₀; the grid is good to some percent.
    omega = torch.tensor(FREQUENCIES, dtype=torch.float64)
    alpha = 10.0 / (1.0 + (omega / 0.5) ** 2)
    c6 = 3.0 / math.pi * (trapezoid_weights(omega) * alpha**2).sum().item()
    assert c6 == pytest.approx(0.75 * 10.0**2 * 0.5, rel=0.02)


def test_triples():
    i, j, k = triple_index(7, torch.device("cpu"))
    found = set(zip(i.tolist(), j.tolist(), k.tolist(), strict=True))
    assert len(i) == len(found) == math.comb(7, 3)
    assert all(a < b < c for a, b, c in found)


def test_three_body_energy_of_a_triangle_and_of_a_line():
    # 3 cos³ 60° + 1 = 11/8; three in a row: 3 · 1 · 1 · (-1) + 1 = -2.
    r2 = torch.full((2, 3, 3), 4.0, dtype=torch.float64)
    r2[1, 0, 2] = r2[1, 2, 0] = 16.0
    strength = 5.0**0.5 * r2.pow(-1.5)
    damping = torch.full_like(r2, 0.1)
    f = 1 / (1 + 6 * 0.1**3)
    expected = [f * 5.0**1.5 * (11 / 8) / 8.0**3, f * 5.0**1.5 * -2.0 / (8.0 * 8.0 * 64.0)]
    torch.testing.assert_close(atm_energy(r2, strength, damping), torch.tensor(expected).double(), rtol=1e-6, atol=0)
    strength.diagonal(dim1=1, dim2=2).zero_()
    blocks = atm_energy_and_derivatives(r2, strength, damping, 9)[0]
    torch.testing.assert_close(blocks, atm_energy(r2, strength, damping), rtol=1e-12, atol=0)


@pytest.mark.parametrize("block", [1, 200, 10**6])
def test_three_body_derivatives_written_out_are_those_of_autograd(block):
    generator = torch.Generator().manual_seed(0)
    factors = [torch.rand(3, 9, 9, generator=generator, dtype=torch.float64) + 0.5 for _ in range(3)]
    r2, log_strength, log_damping = [(x + x.transpose(1, 2)).requires_grad_() for x in factors]
    diagonal = torch.eye(9, dtype=torch.bool)
    strength = log_strength.exp().masked_fill(diagonal, 0.0)
    expected = atm_energy(r2, strength, log_damping.exp())
    gradients = torch.autograd.grad(expected.sum(), (r2, log_strength, log_damping))
    with torch.no_grad():
        energy, *derivatives = atm_energy_and_derivatives(r2, strength, log_damping.exp(), block)
    torch.testing.assert_close(energy, expected.detach(), rtol=1e-12, atol=0)
    for derivative, gradient in zip(derivatives, gradients, strict=True):
        torch.testing.assert_close(derivative, gradient, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# layouts, symmetries, derivatives
# --------------------------------------------------------------------------------------------------


def test_padding_and_layout_do_not_change_a_result(samples):
    model = d4("wb97m")
    alone = [energy_and_gradient(model, m) for m in samples]
    energies, gradients = torch.cat([e for e, _ in alone]), torch.cat([g[0] for _, g in alone])
    assert energies.dtype == torch.float64
    small_groups = d4("wb97m")
    small_groups.group_pairs = 1
    small_blocks = d4("wb97m")
    small_blocks.block_triples = 50
    inner_padding = flat(samples)
    inner_padding["numbers"] = torch.cat([m["numbers"][0] for m in padded_each(samples)] + [torch.zeros(1).long()])
    inner_padding["coord"] = torch.cat([m["coord"][0] for m in padded_each(samples)] + [torch.zeros(1, 3).double()])
    sizes = torch.tensor([m["numbers"].shape[1] + 2 for m in samples])
    index = torch.repeat_interleave(torch.arange(len(samples)), sizes)
    inner_padding["mol_idx"] = torch.cat([index, index[-1:]])
    for m in (model, small_groups, small_blocks):
        for data in (padded(samples), padded(samples, 5), flat(samples), inner_padding):
            for batch in (data, first_order(data)):
                energy, gradient = energy_and_gradient(m, batch)
                torch.testing.assert_close(energy, energies, rtol=1e-11, atol=1e-15)
                real = data["numbers"] > 0
                assert torch.all(gradient[~real] == 0)
                torch.testing.assert_close(gradient[real], gradients, rtol=1e-9, atol=1e-15)


def padded_each(molecules: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [padded([m], 2) for m in molecules]


def test_energy_without_gradient_is_the_same(samples):
    data = padded(samples)
    expected, _ = energy_and_gradient(d4(), data)
    with torch.no_grad():
        energy = d4()(dict(data))["energy"] / HARTREE_EV
    torch.testing.assert_close(energy, expected, rtol=1e-12, atol=0)


def test_molecules_far_apart_add_up_but_for_the_transfer_of_charge(samples):
    # EEQ gives two molecules one chemical potential, so that they must be equal to be independent.
    water = samples[0]
    pair = molecule([8, 1, 1] * 2, torch.cat([water["coord"][0], water["coord"][0] + torch.tensor([500.0, 0, 0])]))
    twice = 2 * energy_and_gradient(d4(), water)[0]
    assert energy_and_gradient(d4(), pair)[0].item() == pytest.approx(twice.item(), rel=1e-9)


def test_rotation_translation_and_order_of_atoms(samples):
    model, data = d4(), samples[3]
    energy, gradient = energy_and_gradient(model, data)
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    order = torch.randperm(data["numbers"].shape[1], generator=generator)
    moved = {
        "coord": (data["coord"] @ rotation.T + torch.tensor([3.0, -7.0, 11.0]))[:, order],
        "numbers": data["numbers"][:, order],
        "charge": data["charge"],
    }
    moved_energy, moved_gradient = energy_and_gradient(model, moved)
    torch.testing.assert_close(moved_energy, energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved_gradient, (gradient @ rotation.T)[:, order], rtol=0, atol=1e-14)


def test_the_charge_of_the_molecule_matters(samples):
    charges = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    data = padded([samples[2]] * 3) | {"charge": charges}
    energy, _ = energy_and_gradient(d4(), data)
    # An anion is more polarizable.
    assert energy[0] < energy[1] < energy[2]


@pytest.mark.parametrize("layout", [padded, flat])
def test_first_and_second_derivatives(samples, layout):
    model = d4()
    data = layout([samples[0], cluster([9, 1, 6, 1], seed=2, charge=-1.0), molecule([2], [[0.0, 0.0, 0.0]])])

    def energy(coord: Tensor, charge: Tensor) -> Tensor:
        return model({**data, "coord": coord, "charge": charge})["energy"]

    inputs = (data["coord"].clone().requires_grad_(), data["charge"].clone().requires_grad_())
    assert torch.autograd.gradcheck(energy, inputs, eps=1e-5, atol=1e-8, rtol=1e-6)
    assert torch.autograd.gradgradcheck(energy, inputs, eps=1e-5, atol=1e-7, rtol=1e-5)


def test_hessian_is_finite_with_padding_and_in_flat_layout(samples):
    for data in (padded(samples, 2), flat(samples)):
        hessian = torch.autograd.functional.hessian(
            lambda coord, data=data: d4()({**data, "coord": coord})["energy"].sum(), data["coord"]
        )
        assert torch.isfinite(hessian).all()
        assert hessian.abs().max() > 1e-3


@pytest.mark.parametrize("charge", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("z", [0, 1, 79])
def test_a_single_atom_has_no_dispersion(z, charge):
    # The effective nuclear charge of H is 1: that of the hydride is zero.
    data = molecule([z], [[1.0, 2.0, 3.0]], charge)
    for batch in (data, first_order(data), flat([data])):
        energy, gradient = energy_and_gradient(d4(), batch)
        assert energy.item() == 0.0
        assert torch.all(gradient == 0)


def test_atoms_without_neighbours_have_finite_derivatives():
    # Coordination numbers of exactly zero, whose square root EEQ takes.
    data = molecule([1, 9], [[0.0, 0.0, 0.0], [0.0, 0.0, 12.0]], -2.0)
    hessian = torch.autograd.functional.hessian(
        lambda coord: d4()({**data, "coord": coord})["energy"].sum(), data["coord"]
    )
    assert torch.isfinite(hessian).all()
    assert hessian.abs().max() > 0


def test_empty_batches():
    dense = {"coord": torch.zeros(0, 5, 3), "numbers": torch.zeros(0, 5).long(), "charge": torch.zeros(0)}
    assert d4()(dense)["energy"].shape == (0,)
    no_atoms = {"coord": torch.zeros(2, 0, 3), "numbers": torch.zeros(2, 0).long(), "charge": torch.zeros(2)}
    assert d4()(no_atoms)["energy"].tolist() == [0.0, 0.0]
    padding = {"coord": torch.zeros(1, 3), "numbers": torch.zeros(1).long(), "mol_idx": torch.zeros(1).long()}
    assert d4()({**padding, "charge": torch.zeros(0)})["energy"].shape == (0,)
    assert d4()({**padding, "charge": torch.zeros(3)})["energy"].tolist() == [0.0] * 3


def test_energy_is_added_to_what_is_there(samples):
    data = dict(samples[0])
    alone = d4()(dict(data))["energy"]
    data["energy"] = torch.tensor([-2079.0], dtype=torch.float64)
    assert torch.equal(d4()(data)["energy"], alone - 2079.0)
    assert torch.equal(d4(key_out="e_disp")(dict(samples[0]))["e_disp"], alone)


def test_without_three_body_energy(samples):
    p = asdict(d4_parameters("pbe"))
    with_, without = DFTD4(**p), DFTD4(**{**p, "s9": 0.0})
    assert abs(with_(dict(samples[2]))["energy"] - without(dict(samples[2]))["energy"]) > 1e-6
    half = DFTD4(**{**p, "s9": 0.5})(dict(samples[2]))["energy"]
    expected = 0.5 * (with_(dict(samples[2]))["energy"] + without(dict(samples[2]))["energy"])
    torch.testing.assert_close(half, expected, rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------------
# what is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [104, 206, -3])
def test_element_without_data_is_refused(z):
    with pytest.raises(ValueError, match=rf"elements 1 to 103, not for {abs(z)}|not for {z}"):
        d4()(molecule([1, z], [[0, 0, 0], [0, 0, 2.0]]))


def test_crystal_is_refused(samples):
    data = flat(samples[:1]) | {"cell": 20.0 * torch.eye(3, dtype=torch.float64).unsqueeze(0)}
    with pytest.raises(ValueError, match="for molecules only, the batch has a cell"):
        d4()(data)


# --------------------------------------------------------------------------------------------------
# as a module
# --------------------------------------------------------------------------------------------------


def test_scripted_is_eager_in_every_layout_call_after_call(samples):
    model = d4()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for data in (padded(samples), first_order(padded(samples)), flat(samples), first_order(flat(samples * 3))):
        expected, expected_gradient = energy_and_gradient(model, data)
        for call in range(5):
            if call == 3:
                with torch.no_grad():
                    energy = scripted(dict(data))["energy"] / HARTREE_EV
            else:
                energy, gradient = energy_and_gradient(scripted, data)
                torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(energy, expected, rtol=1e-12, atol=1e-15)


def test_casting_the_module_does_not_change_a_result(samples):
    data = padded(samples)
    expected = d4()(dict(data))["energy"]
    assert torch.equal(d4().half().float()(dict(data))["energy"], expected)
    assert not d4().state_dict()


@pytest.mark.parametrize("mark", [dict, first_order])
def test_single_precision(samples, mark):
    data = mark(padded(samples))
    single = {**data, "coord": data["coord"].float(), "charge": data["charge"].float()}
    widened = {**single, "coord": single["coord"].double()}
    energy, gradient = energy_and_gradient(d4(), single)
    expected, expected_gradient = energy_and_gradient(d4(), widened)
    assert energy.dtype == torch.float64
    torch.testing.assert_close(energy, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [padded, flat])
def test_results_on_a_gpu(samples, layout):
    molecules = [*samples, cluster([6, 1, 8, 1] * 20, seed=1)]
    expected, expected_gradient = energy_and_gradient(d4(), layout(molecules))
    for data in (layout(molecules), first_order(layout(molecules))):
        on_gpu = {key: value.cuda() for key, value in data.items()}
        energy, gradient = energy_and_gradient(d4().cuda(), on_gpu)
        torch.testing.assert_close(energy.cpu(), expected, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-8, atol=1e-13)
