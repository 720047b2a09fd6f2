"""Triangles of D3 against the program s-dftd3, D3 of crystals, D3 in blocks with derivatives written out."""

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aimnet2mult import dispersion_atm, nbops
from aimnet2mult.dispersion import DFTD3
from aimnet2mult.utils.units import BOHR_ANGSTROM, HARTREE_EV

# Energies, gradients and virials of dftd3 1.7.0; the file's "note" says how they were made.
EXPECTED = json.loads((Path(__file__).parent / "fixtures" / "dftd3_expected.json").read_text())
SCALE = BOHR_ANGSTROM / EXPECTED["bohr_in_angstrom"]
PBE = EXPECTED["params"]["pbe"]

ENERGY_TOLERANCE = 1e-8  # Hartree
GRADIENT_TOLERANCE = 1e-7  # Hartree/Bohr
VIRIAL_TOLERANCE = 1e-7  # Hartree

# Atoms at fractional positions (some outside the cell), lattice vectors in Å. All cells are smaller than the cutoffs.
CRYSTALS = {
    "one atom": ([18], [[0.2, 0.1, 0.7]], [[4.0, 0.3, 0.0], [0.0, 4.2, 0.5], [0.2, 0.0, 4.5]]),
    "skewed": (
        [6, 1, 8, 17],
        [[0.1, 1.3, 0.4], [0.3, 0.2, -0.9], [0.8, 0.6, 0.1], [-0.5, 0.1, 0.7]],
        [[5.0, 0.0, 0.4], [-2.0, 5.5, 0.0], [0.3, 1.0, 6.0]],
    ),
    "rock salt": ([11, 17], [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]], [[0.0, 2.8, 2.8], [2.8, 0.0, 2.8], [2.8, 2.8, 0.0]]),
}


def batch(numbers, coord: Tensor, cell: Tensor | None = None, flat: bool = True) -> dict[str, Tensor]:
    """Internal batch of one molecule or crystal."""
    if not flat:
        data = {"coord": coord.unsqueeze(0), "numbers": torch.as_tensor(numbers).unsqueeze(0)}
        return nbops.internal_batch(data, 5.0)
    data = {"coord": coord, "numbers": torch.as_tensor(numbers)}
    return nbops.internal_batch(data if cell is None else {**data, "cell": cell}, 5.0, dense_limit=0)


def derivatives(model: torch.nn.Module, data: dict[str, Tensor], first_order: bool) -> dict[str, np.ndarray]:
    """Energies (Hartree), gradient (Hartree/Bohr) and virial (Hartree) of an internal batch."""
    inputs = [data["coord"].detach().clone().requires_grad_()]
    data = {**data, "coord": inputs[0]}
    if "cell" in data:
        inputs.append(data["cell"].detach().clone().requires_grad_())
        data["cell"] = inputs[1]
    if first_order:
        data["_first_order"] = torch.zeros(0)
    energy = model(data)["energy"]
    gradients = torch.autograd.grad(energy.sum(), inputs)
    result = {
        "energy": energy.detach().numpy() / HARTREE_EV,
        "gradient": gradients[0][data["numbers"] > 0].double().numpy() * BOHR_ANGSTROM / HARTREE_EV,
    }
    if "cell" in data:
        virial = nbops.mol_sum(inputs[0].unsqueeze(2) * gradients[0].unsqueeze(1), data)
        virial = virial + inputs[1].transpose(1, 2) @ gradients[1]
        result["virial"] = virial.detach().double().numpy() / HARTREE_EV
    return result


def assert_agrees(result: dict[str, np.ndarray], expected: dict) -> None:
    assert result["energy"].item() == pytest.approx(float(expected["energy"]), abs=ENERGY_TOLERANCE)
    np.testing.assert_allclose(result["gradient"], expected["gradient"], rtol=0, atol=GRADIENT_TOLERANCE)
    if "virial" in result:
        np.testing.assert_allclose(result["virial"][0], expected["virial"], rtol=0, atol=VIRIAL_TOLERANCE)


def crystal(name: str) -> tuple[list[int], Tensor, Tensor]:
    numbers, fractional, cell = CRYSTALS[name]
    cell = torch.tensor(cell, dtype=torch.float64)
    return numbers, torch.tensor(fractional, dtype=torch.float64) @ cell, cell


def random_cluster(n_atoms: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Atoms of four elements on a distorted lattice: numbers, and coordinates in Å."""
    generator = torch.Generator().manual_seed(seed)
    edge = math.ceil(n_atoms ** (1 / 3))
    grid = torch.tensor(list(itertools.product(range(edge), repeat=3))[:n_atoms], dtype=torch.float64)
    shake = torch.rand(n_atoms, 3, generator=generator, dtype=torch.float64)
    return torch.tensor([6, 1, 8, 17])[torch.arange(n_atoms) % 4], 2.1 * grid + shake


# --------------------------------------------------------------------------------------------------
# against s-dftd3
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "flat", "first order"])
@pytest.mark.parametrize("s9", [0.0, 1.0])
@pytest.mark.parametrize("system", EXPECTED["systems"], ids=lambda s: s["name"])
def test_molecules_agree_with_stored_energies_and_gradients(system, s9, layout):
    coord = torch.tensor(system["positions_angstrom"], dtype=torch.float64) * SCALE
    data = batch(system["numbers"], coord, flat=layout != "dense")
    for functional, parameters in EXPECTED["params"].items():
        result = derivatives(DFTD3(**parameters, s9=s9), data, layout == "first order")
        assert_agrees(result, system["results"][functional][f"s9={s9:.0f}"])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("s9", [0.0, 1.0])
@pytest.mark.parametrize("system", EXPECTED["periodic_systems"], ids=lambda s: s["name"])
def test_crystal_agrees_with_stored_energy_gradient_and_virial(system, s9, first_order):
    coord = torch.tensor(system["positions_angstrom"], dtype=torch.float64) * SCALE
    cell = torch.tensor(system["cell_angstrom"], dtype=torch.float64) * SCALE
    result = derivatives(DFTD3(**PBE, s9=s9), batch(system["numbers"], coord, cell), first_order)
    assert_agrees(result, system["results"]["pbe"][f"s9={s9:.0f}"])


@pytest.mark.parametrize("s9", [0.0, 1.0])
@pytest.mark.parametrize("name", CRYSTALS)
def test_crystals_of_any_shape_agree_with_dftd3(name, s9):
    interface = pytest.importorskip("dftd3.interface")
    numbers, coord, cell = crystal(name)
    model = interface.DispersionModel(
        np.array(numbers), coord.numpy() / BOHR_ANGSTROM, cell.numpy() / BOHR_ANGSTROM, np.ones(3, dtype=bool)
    )
    expected = model.get_dispersion(interface.RationalDampingParam(s6=1.0, s9=s9, **PBE), grad=True)
    assert abs(expected["energy"]) > 1e-4
    for first_order in (False, True):
        assert_agrees(derivatives(DFTD3(**PBE, s9=s9), batch(numbers, coord, cell), first_order), expected)


# Md is left out for the reason given in test_dispersion.py.
@pytest.mark.parametrize("z", sorted(set(range(1, 104)) - {101}))
def test_three_body_energy_of_every_element_agrees_with_dftd3(z):
    interface = pytest.importorskip("dftd3.interface")
    coord = torch.tensor([[0, 0, 0], [2.6, 0, 0.2], [0, 2.9, 0], [-2.2, -1.2, 1.9], [0, 0, 5.0]], dtype=torch.float64)
    numbers = [z, 1, 8, z, z]
    model = interface.DispersionModel(np.array(numbers), coord.numpy() / BOHR_ANGSTROM)
    expected = model.get_dispersion(interface.RationalDampingParam(s6=1.0, s9=1.0, **PBE), grad=True)
    without = model.get_dispersion(interface.RationalDampingParam(s6=1.0, s9=0.0, **PBE), grad=False)
    assert abs(expected["energy"] - without["energy"]) > 10 * ENERGY_TOLERANCE
    assert_agrees(derivatives(DFTD3(**PBE, s9=1.0), batch(numbers, coord), True), expected)


@pytest.mark.parametrize("s9", [0.0, 1.0])
def test_cluster_of_rectangles_and_lists_agrees_with_dftd3(s9):
    # Longer than the cutoffs; blocks of few pairs, so that there are many.
    interface = pytest.importorskip("dftd3.interface")
    numbers, coord = random_cluster(410 if s9 == 0.0 else 60)
    coord = coord * torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    model = interface.DispersionModel(numbers.numpy(), coord.numpy() / BOHR_ANGSTROM)
    expected = model.get_dispersion(interface.RationalDampingParam(s6=1.0, s9=s9, **PBE), grad=True)
    ours = DFTD3(**PBE, s9=s9)
    ours.block_pairs = 1000
    data = batch(numbers, coord)
    assert s9 == 1.0 or ours.search(data, ours.cutoff_lr).n_blocks > 10
    for kept_pairs in (0, 2**22):
        ours.kept_pairs = kept_pairs
        assert_agrees(derivatives(ours, data, True), expected)
        assert_agrees(derivatives(ours, data, False), expected)


# --------------------------------------------------------------------------------------------------
# triangles
# --------------------------------------------------------------------------------------------------


def test_triangles_are_those_of_three_nested_loops():
    numbers, coord = random_cluster(30)
    data = batch(numbers, coord)
    model = DFTD3(**PBE, s9=1.0)
    model.triple_cutoff = 6.0
    pairs = model.search(data, model.cutoff_lr)
    sides = model.triangle_sides(data, pairs, [])
    r = torch.cdist(coord, coord)
    expected = {
        (i, j, k)
        for i, j, k in itertools.combinations(range(30), 3)
        if max(r[i, j], r[i, k], r[j, k]) < model.triple_cutoff
    }
    for most in (1, 10, 50, 10**6):
        found = []
        for block in dispersion_atm.triangle_blocks(sides, most):
            t = dispersion_atm.triangles(sides, block)
            j, k = sides.j[t.side_j].unsqueeze(2), sides.j[t.side_k].unsqueeze(1)
            i = torch.arange(block[0], block[1]).view(-1, 1, 1)
            near = t.exists & (torch.linalg.vector_norm(coord[j.clamp(max=29)] - coord[k.clamp(max=29)], dim=-1) < 6.0)
            found += torch.stack(torch.broadcast_tensors(i, j, k), -1)[near].tolist()
        assert len(found) == len(expected)
        assert {tuple(sorted(t)) for t in found} == expected


def test_three_argon_atoms():
    # Equilateral triangle: all cosines ½; right angle: one is zero.
    model, without = DFTD3(**PBE, s9=1.0), DFTD3(**PBE)
    for coord, angles in (
        ([[0.0, 0, 0], [4.0, 0, 0], [2.0, 2 * math.sqrt(3), 0]], 1 + 3 / 8),
        ([[0.0, 0, 0], [4.0, 0, 0], [0, 4.0, 0]], 1.0),
    ):
        x = torch.tensor(coord, dtype=torch.float64)
        data = batch([18] * 3, x)
        c6 = 64.6462  # Eh·a0⁶, D3 value of the argon atom
        r = torch.pdist(x) / BOHR_ANGSTROM
        radius = 4 / 3 * 2.9148 / BOHR_ANGSTROM
        damping = 1 / (1 + 6 * (radius**3 / r.prod()) ** (16 / 3))
        expected = c6**1.5 * angles / r.prod() ** 3 * damping
        energy = (model(dict(data))["energy"] - without(dict(data))["energy"]).item() / HARTREE_EV
        assert energy == pytest.approx(expected.item(), rel=2e-3)


def test_supercell_has_eight_times_the_energy():
    numbers, coord, cell = crystal("skewed")
    shifts = torch.tensor(list(itertools.product(range(2), repeat=3)), dtype=torch.float64) @ cell
    data = batch(numbers, coord, cell)
    larger = batch(numbers * 8, (coord + shifts.unsqueeze(1)).reshape(-1, 3), 2 * cell)
    for model in (DFTD3(**PBE), DFTD3(**PBE, s9=1.0, cutoff=8.0)):
        model.triple_cutoff = 6.0
        one, eight = derivatives(model, data, True), derivatives(model, larger, True)
        assert eight["energy"] == pytest.approx(8 * one["energy"], rel=1e-12)
        np.testing.assert_allclose(eight["virial"], 8 * one["virial"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(eight["gradient"], np.tile(one["gradient"], (8, 1)), rtol=0, atol=1e-13)


# --------------------------------------------------------------------------------------------------
# derivatives written out and those of autograd
# --------------------------------------------------------------------------------------------------


def many() -> dict[str, Tensor]:
    """Flat batch of molecules of 1 to 24 atoms."""
    systems = [EXPECTED["systems"][k] for k in (0, 2, 9, 15, 18)]
    coord = [torch.tensor(s["positions_angstrom"], dtype=torch.float64) for s in systems] + [torch.zeros(1, 3).double()]
    numbers = [torch.tensor(s["numbers"]) for s in systems] + [torch.tensor([2])]
    sizes = torch.tensor([len(z) for z in numbers])
    data = {
        "coord": torch.cat(coord),
        "numbers": torch.cat(numbers),
        "mol_idx": torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        "charge": torch.zeros(len(sizes)),
    }
    return nbops.internal_batch(data, 5.0)


def two_crystals() -> dict[str, Tensor]:
    (z_1, x_1, cell_1), (z_2, x_2, cell_2) = crystal("one atom"), crystal("skewed")
    data = {
        "coord": torch.cat([x_1, x_2]),
        "numbers": torch.tensor(z_1 + z_2),
        "mol_idx": torch.tensor([0, 1, 1, 1, 1]),
        "charge": torch.zeros(2),
        "cell": torch.stack([cell_1, cell_2]),
    }
    return nbops.internal_batch(data, 3.0)


def callers_matrix() -> dict[str, Tensor]:
    """A crystal with a neighbour matrix, every pair in both orders."""
    numbers, coord, cell = crystal("skewed")
    plain = batch(numbers, coord, cell)
    search = nbops.neighbor_matrix(coord, torch.zeros(4, dtype=torch.long), 12.0, cell)
    return {**plain, "nbmat_lr": search[0], "shifts_lr": search[1]}


BATCHES = {
    "molecules": many,
    "crystals": two_crystals,
    "caller's matrix": callers_matrix,
    "cluster": lambda: batch(*random_cluster(405)),
}


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("s9", [0.0, 0.7])
@pytest.mark.parametrize("name", BATCHES)
def test_derivatives_written_out_are_those_of_autograd(name, s9, switched):
    model = DFTD3(**PBE, s9=s9, cutoff=9.0 if switched else None, smoothing_fraction=0.5)
    model.triple_cutoff = 5.0
    data = BATCHES[name]()
    model.block_pairs = 500 if name != "cluster" else 20000
    by_autograd, written_out = derivatives(model, data, False), derivatives(model, data, True)
    assert np.abs(by_autograd["gradient"]).max() > 1e-6
    for key, value in by_autograd.items():
        np.testing.assert_allclose(written_out[key], value, rtol=0, atol=2e-13)


def test_first_and_second_derivatives_with_triangles():
    model = DFTD3(**PBE, s9=1.0)
    numbers, coord = random_cluster(5)
    data = batch(numbers, coord, flat=False)

    def energy(x: Tensor) -> Tensor:
        return model({key: value for key, value in {**data, "coord": x}.items() if key[:3] != "_d_"})["energy"]

    x = data["coord"].clone().requires_grad_()
    assert torch.autograd.gradcheck(energy, x, eps=1e-5, atol=1e-9, rtol=1e-6)
    assert torch.autograd.gradgradcheck(energy, x, eps=1e-5, atol=1e-7, rtol=1e-5)


def test_padding_does_not_change_triangles():
    molecules = [EXPECTED["systems"][k] for k in (0, 2)]
    n_atoms = max(len(m["numbers"]) for m in molecules) + 2
    data = {
        "coord": torch.zeros(2, n_atoms, 3, dtype=torch.float64),
        "numbers": torch.zeros(2, n_atoms, dtype=torch.long),
    }
    for k, m in enumerate(molecules):
        data["coord"][k, : len(m["numbers"])] = torch.tensor(m["positions_angstrom"], dtype=torch.float64) * SCALE
        data["numbers"][k, : len(m["numbers"])] = torch.tensor(m["numbers"])
    dense = nbops.internal_batch(data, 5.0)
    result = derivatives(DFTD3(**PBE, s9=1.0), dense, False)
    expected = [m["results"]["pbe"]["s9=1"] for m in molecules]
    assert result["energy"] == pytest.approx([e["energy"] for e in expected], abs=ENERGY_TOLERANCE)
    gradient = np.concatenate([e["gradient"] for e in expected])
    np.testing.assert_allclose(result["gradient"], gradient, rtol=0, atol=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("n_atoms", [1, 2])
def test_too_few_atoms_for_a_triangle(n_atoms):
    data = batch([10] * n_atoms, torch.tensor([[0.0, 0, 0], [3.0, 0, 0]], dtype=torch.float64)[:n_atoms])
    one, other = (derivatives(DFTD3(**PBE, s9=s9), data, True) for s9 in (0.0, 1.0))
    assert one["energy"] == other["energy"] == pytest.approx(DFTD3(**PBE, s9=1.0)(data)["energy"].item() / HARTREE_EV)
    assert np.array_equal(one["gradient"], other["gradient"])
    assert (one["energy"] < 0) == (n_atoms > 1)


@pytest.mark.parametrize("shape", [(0, 3), (0, 5), (2, 0), (2, 3)])
def test_empty_batches_and_molecules_of_padding(shape):
    data = {"coord": torch.zeros(*shape, 3, dtype=torch.float64), "numbers": torch.zeros(shape, dtype=torch.long)}
    for s9 in (0.0, 1.0):
        energy = DFTD3(**PBE, s9=s9)(nbops.internal_batch(data, 5.0))["energy"]
        assert energy.dtype == torch.float64
        assert energy.tolist() == [0.0] * shape[0]


# --------------------------------------------------------------------------------------------------
# precision, memory, species, scripts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["molecules", "crystals", "cluster"])
def test_single_precision_is_double_precision_to_its_rounding(name):
    data = BATCHES[name]()
    # Positions that single precision holds, so that only the arithmetic differs.
    data["coord"] = data["coord"].float().double()
    model = DFTD3(**PBE, s9=1.0)
    model.triple_cutoff = 6.0
    if "cell" in data:
        data["cell"] = data["cell"].float().double()
    single = {key: value.float() if value.is_floating_point() else value for key, value in data.items()}
    for first_order in (False, True):
        expected, result = derivatives(model, data, first_order), derivatives(model, single, first_order)
        np.testing.assert_allclose(result["energy"], expected["energy"], rtol=3e-6, atol=1e-9)
        scale = np.abs(expected["gradient"]).max()
        np.testing.assert_allclose(result["gradient"], expected["gradient"], rtol=0, atol=2e-5 * scale)
        if "cell" in data:
            scale = np.abs(expected["virial"]).max()
            np.testing.assert_allclose(result["virial"], expected["virial"], rtol=0, atol=2e-5 * scale)


def test_graph_holds_the_triangles_that_count_only():
    # 50 corners of up to 49 later neighbours: 19,600 triangles in 50·49·49 places, about a thousand of them small.
    numbers, coord = random_cluster(50)
    data = {key: value for key, value in batch(numbers, coord, flat=False).items() if key[:3] != "_d_"}
    d_ij = torch.cdist(data["coord"][0], data["coord"][0])
    model = DFTD3(**PBE, s9=1.0)
    model.triple_cutoff = float(d_ij[d_ij > 0].quantile(0.3))
    near = (d_ij < model.triple_cutoff) & (d_ij > 0)
    n_triangles = int(torch.einsum("ij,jk,ki->", *[near.double()] * 3)) // 6
    assert 200 < n_triangles < 3000
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    data["coord"] = data["coord"].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        energy = model(data)["energy"]
    assert max(kept) < 10 * 50 * 50
    assert energy.requires_grad


def test_memory_of_first_derivatives_does_not_grow_with_the_pairs():
    # An atom has 32,000 pairs here; what autograd keeps of one block is what may be alive at the end.
    numbers, coord = random_cluster(405)
    data = batch(numbers, coord)
    model = DFTD3(**PBE)
    model.block_pairs, model.kept_pairs = 4000, 0
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        derivatives(model, data, True)
    assert max(kept, default=0) <= 3 * 406


@pytest.mark.parametrize("name", ["molecules", "crystals"])
def test_fixed_species_change_nothing_and_read_nothing(name, monkeypatch):
    data = BATCHES[name]()
    expected = derivatives(DFTD3(**PBE, s9=1.0, cutoff=8.0), data, True)
    model = DFTD3(**PBE, s9=1.0, cutoff=8.0)
    model.set_species([79, 8, 6, 1, 46, 2, 53, 18, 17, 35, 6])
    assert model.elements == [1, 2, 6, 8, 17, 18, 35, 46, 53, 79]
    scripted = torch.jit.script(model)
    monkeypatch.setattr(torch, "unique", None)
    for m in (model, scripted):
        result = derivatives(m, data, True)
        for key, value in expected.items():
            np.testing.assert_allclose(result[key], value, rtol=0, atol=1e-13)


def test_other_elements_than_the_fixed_ones_have_no_number():
    model = DFTD3(**PBE)
    model.set_species([1, 8])
    coord = torch.tensor([[0.0, 0, 0], [1.5, 0, 0], [0, 3.0, 0]])
    assert model(batch([1, 8, 1], coord, flat=False))["energy"].isfinite().all()
    assert model(batch([1, 7, 1], coord, flat=False))["energy"].isnan().all()
    assert DFTD3(**PBE)(batch([1, 7, 1], coord, flat=False))["energy"].isfinite().all()


@pytest.mark.parametrize(("species", "wrong"), [([], "at least one"), ([0, 1], "from 1 on"), ([1, 104], "not for 104")])
def test_impossible_species_are_refused(species, wrong):
    with pytest.raises(ValueError, match=wrong):
        DFTD3(**PBE).set_species(species)


def test_scripted_is_eager_with_triangles_and_its_range_can_be_set():
    model = DFTD3(**PBE, s9=1.0)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for cutoff in (None, 7.0):
        if cutoff is not None:
            model.set_cutoff(cutoff, 0.3)
            scripted.set_cutoff(cutoff, 0.3)
            assert scripted.cutoff_lr == cutoff
        for name in ("molecules", "crystals"):
            data = BATCHES[name]()
            expected = derivatives(model, data, True)
            for call in range(4):
                result = derivatives(scripted, data, call % 2 == 0)
                for key, value in expected.items():
                    np.testing.assert_allclose(result[key], value, rtol=0, atol=1e-12)
    with pytest.raises(torch.jit.Error, match="cutoff of the dispersion energy must be positive"):
        scripted.set_cutoff(-1.0)


def test_energy_and_forces_of_a_crystal_with_a_switch():
    model = DFTD3(**PBE, s9=1.0, cutoff=8.0)
    data = two_crystals()
    expected = derivatives(model, data, False)
    with torch.no_grad():
        energy, forces = model.energy_and_forces(data)
    np.testing.assert_allclose(energy / HARTREE_EV, expected["energy"], rtol=0, atol=1e-14)
    forces = forces[data["numbers"] > 0].numpy() * BOHR_ANGSTROM / HARTREE_EV
    np.testing.assert_allclose(forces, -expected["gradient"], rtol=0, atol=1e-14)
