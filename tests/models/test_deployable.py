"""What the deployable model promises, whichever way it evaluates a batch: physics, layouts, options, errors."""

import itertools

import pytest
import torch

from aimnet2mult import nbops
from aimnet2mult.dftd4 import DFTD4
from aimnet2mult.dispersion_params import d3bj_parameters, d4_parameters
from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored
from aimnet2mult.models.jit_wrapper import DeployableModel
from aimnet2mult.models.potential import Potential
from aimnet2mult.modules import DFTD3, SelfAtomicEnergies
from aimnet2mult.neighborlist import neighbor_matrix

SAE = {1: -13.587, 6: -1029.476, 7: -1485.234, 8: -2041.789, 9: -2715.3, 17: -12518.7}
ALL_FLAT = 0
"""A dense limit that sends every molecule through the lists of neighbours."""


def deployable(reference_model, terms=("coulomb", "dispersion"), dtype=torch.float64):
    network = reference_model("ref_single", dtype)
    if "coulomb" not in terms:
        del network.outputs["lrcoulomb"]
    network.add_output("sae", SelfAtomicEnergies(SAE))
    if "dispersion" in terms:
        p = d3bj_parameters("b3lyp")
        network.add_output("dftd3", DFTD3(s8=p.s8, a1=p.a1, a2=p.a2, s6=p.s6, cutoff=9.0))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with torchscript_deprecation_ignored():
        return torch.jit.script(DeployableModel(network, sorted(SAE)))


@pytest.fixture(scope="module")
def model(reference_model):
    """Scripted, float64, with Coulomb energy and dispersion; options as they are by default before each test."""
    return deployable(reference_model)


@pytest.fixture(scope="module")
def short_ranged(reference_model):
    return deployable(reference_model, ())


@pytest.fixture(autouse=True)
def default_options(model, short_ranged):
    yield
    model.set_coulomb_method("simple")
    for module in (model, short_ranged):
        module.dense_limit = 120
        module.compute_stress = module.compute_hessian = False
        module.check_spin = True


def crystal(dtype=torch.float64):
    """Two waters and an ammonia in a skew cell that is shorter than the cutoff."""
    generator = torch.Generator().manual_seed(5)
    cell = torch.tensor([[4.6, 0.0, 0.0], [0.9, 5.0, 0.0], [-0.7, 0.6, 5.4]], dtype=dtype)
    water = torch.tensor([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]], dtype=dtype)
    ammonia = torch.tensor(
        [[0.0, 0.0, 0.12], [0.0, 0.94, -0.27], [0.81, -0.47, -0.27], [-0.81, -0.47, -0.27]], dtype=dtype
    )
    coord = torch.cat([water, water[:, [1, 2, 0]] + 2.5, ammonia + torch.tensor([2.4, 0.1, 2.6], dtype=dtype)])
    coord = coord + 0.05 * torch.randn(coord.shape, generator=generator, dtype=dtype)
    return {"coord": coord, "numbers": torch.tensor([8, 1, 1, 8, 1, 1, 7, 1, 1, 1]), "cell": cell}


def with_lists(data, cutoff, cutoff_lr):
    """A flat batch with neighbour matrices of the caller's."""
    coord, mol_idx = data["coord"], data["mol_idx"]
    out = {**data, "coord": torch.cat([coord, coord.new_zeros(1, 3)])}
    out["numbers"] = torch.cat([data["numbers"], data["numbers"].new_zeros(1)])
    out["mol_idx"] = torch.cat([mol_idx, mol_idx[-1:]])
    out["nbmat"], _ = neighbor_matrix(coord, mol_idx, cutoff)
    out["nbmat_lr"], _ = neighbor_matrix(coord, mol_idx, cutoff_lr)
    return out


def results_of(out):
    """What a scripted model returns, without what it hands back."""
    return {key: value for key, value in out.items() if key not in nbops.LAYOUT_KEYS}


def assert_same(found, expected, atol=1e-10):
    found, expected = results_of(found), results_of(expected)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(
            found[key], expected[key], atol=atol, rtol=1e-13, msg=lambda text, key=key: key + text
        )


# --------------------------------------------------------------------------------------------------
# layouts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simple", "dsf"])
def test_every_way_of_evaluation_gives_the_same(model, molecules, to_flat, method):
    model.set_coulomb_method(method)
    data = molecules()
    real = data["numbers"] > 0
    expected = model(data)
    flat = {key: value[real] if value.dim() > 1 else value for key, value in expected.items()}
    for limit in (120, ALL_FLAT):
        model.dense_limit = limit
        for _ in range(4):  # the executor specialises after some calls
            with torch.no_grad():
                assert_same(model(data), expected)
                assert_same(model(to_flat(data)), flat)
    # With the graph kept, large systems take another way; so do a caller's neighbours.
    coord = data["coord"].clone().requires_grad_()
    assert_same({key: value.detach() for key, value in model({**data, "coord": coord}).items()}, expected)
    out = model(with_lists(to_flat(data), 5.0, 100.0))
    assert_same({key: value[:-1] if key != "energy" else value for key, value in out.items()}, flat)


@pytest.mark.parametrize("term", ["d3_with_triples", "d4"])
def test_three_body_terms_give_the_same_forces_with_and_without_graph(reference_model, molecules, term):
    """Without, triples are differentiated block by block, in dense layout, too."""
    network = reference_model("ref_single", torch.float64)
    p = d4_parameters("b3lyp")
    d4 = DFTD4(s8=p.s8, a1=p.a1, a2=p.a2, s6=p.s6, s9=p.s9)
    network.add_output("dispersion", d4 if term == "d4" else DFTD3(s8=1.9889, a1=0.3981, a2=4.4211, s9=1.0))
    model = DeployableModel(network, sorted(SAE))
    data = molecules(torch.float64)
    expected = model({**data, "coord": data["coord"].clone().requires_grad_()})
    assert expected["forces"].requires_grad
    out = model(data)
    torch.testing.assert_close(out["energy"], expected["energy"].detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(out["forces"], expected["forces"].detach(), rtol=0, atol=1e-10)


def test_one_flat_molecule(model, molecules):
    data = molecules()
    one = {"coord": data["coord"][7, :12], "numbers": data["numbers"][7, :12]}  # benzene
    dense = model({key: value.unsqueeze(0) for key, value in one.items()})
    for limit in (120, ALL_FLAT):
        model.dense_limit = limit
        out = model(one)
        assert out["energy"].shape == (1,)
        for key in ("forces", "charges", "spin_charges"):
            assert out[key].shape[0] == 12
            torch.testing.assert_close(out[key], dense[key][0], atol=1e-11, rtol=0)


def test_far_molecules_add_up_in_one_large_system(short_ranged, molecules):
    data = molecules()
    closed = {key: value[[0, 7, 8]] for key, value in data.items()}
    parts = short_ranged(closed)
    real = closed["numbers"] > 0
    far = closed["coord"] + torch.tensor([0.0, 40.0, 900.0], dtype=torch.float64).view(3, 1, 1)
    short_ranged.dense_limit = ALL_FLAT
    # Spread over the far parts, charge is only conserved over all of them, so compare the parts' geometry terms only:
    # the gradient of one does not know where the others are.
    whole = {"coord": far[real], "numbers": closed["numbers"][real]}
    moved = whole["coord"].clone()
    moved[: int(real[0].sum())] += 7.0
    torch.testing.assert_close(
        short_ranged({**whole, "coord": moved})["forces"], short_ranged(whole)["forces"], atol=1e-10, rtol=0
    )
    assert parts["forces"].abs().max() > 0.1


# --------------------------------------------------------------------------------------------------
# crystals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dsf", "ewald"])
def test_supercell_is_eight_cells(model, method):
    model.set_coulomb_method(method)
    model.compute_stress = True
    data = crystal()
    one = model(data)
    steps = [torch.tensor(n, dtype=torch.float64) @ data["cell"] for n in itertools.product((0, 1), repeat=3)]
    eight = model(
        {
            "coord": torch.cat([data["coord"] + step for step in steps]),
            "numbers": data["numbers"].repeat(8),
            "cell": 2.0 * data["cell"],
        }
    )
    # The equilibration of charges divides by the sum of flexibilities plus 1e-6, which is not quite size-consistent.
    torch.testing.assert_close(eight["charges"], one["charges"].repeat(8), atol=5e-5, rtol=0)
    torch.testing.assert_close(eight["energy"], 8.0 * one["energy"], atol=5e-5, rtol=0)
    torch.testing.assert_close(eight["forces"], one["forces"].repeat(8, 1), atol=2e-4, rtol=0)
    torch.testing.assert_close(eight["stress"], one["stress"], atol=1e-6, rtol=0)


def test_a_huge_box_is_no_box(short_ranged, molecules):
    data = molecules()
    one = {"coord": data["coord"][7, :12], "numbers": data["numbers"][7, :12]}
    box = short_ranged({**one, "cell": torch.eye(3, dtype=torch.float64) * 100.0})
    assert_same(box, short_ranged(one))


@pytest.mark.parametrize("method", ["dsf", "ewald"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_forces_and_stress_are_derivatives_of_the_energy(model, method, differentiable):
    model.set_coulomb_method(method)
    model.compute_stress = True
    data = crystal()
    cell = data["cell"]
    if differentiable:
        data["coord"].requires_grad_()
    out = {key: value.detach() for key, value in model(data).items()}
    data["coord"] = data["coord"].detach()
    assert out["stress"].shape == (3, 3)

    def energy(coord, cell):
        return model({**data, "coord": coord, "cell": cell})["energy"].item()

    step = 1e-4
    for i, k in ((0, 0), (4, 1), (6, 2)):
        shifted = [data["coord"].clone(), data["coord"].clone()]
        shifted[0][i, k] += step
        shifted[1][i, k] -= step
        slope = (energy(shifted[0], cell) - energy(shifted[1], cell)) / (2.0 * step)
        assert out["forces"][i, k].item() == pytest.approx(-slope, abs=1e-6)
    # Pairs enter the coordination numbers of D3 at 40 Bohr with a tiny jump, so a small step would measure jumps.
    step = 1e-3
    volume = torch.linalg.det(cell).item()
    for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0)):
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] += 0.5 * step
        strain[b, a] += 0.5 * step
        energies = []
        for n in (1, -1, 2, -2):
            deformation = torch.eye(3) + n * strain
            energies.append(energy(data["coord"] @ deformation, cell @ deformation))
        slope = (8.0 * (energies[0] - energies[1]) - (energies[2] - energies[3])) / (12.0 * step)
        assert out["stress"][a, b].item() == pytest.approx(slope / volume, abs=5e-7)


def test_stress_of_a_batch_of_crystals(model):
    model.set_coulomb_method("dsf")
    model.compute_stress = True
    data = crystal()
    both = {key: torch.stack([value, value * 1.02 if key != "numbers" else value]) for key, value in data.items()}
    out = model(both)
    assert out["stress"].shape == (2, 3, 3)
    for b in range(2):
        one = model({key: value[b] for key, value in both.items()})
        torch.testing.assert_close(out["stress"][b], one["stress"], atol=1e-12, rtol=0)
        torch.testing.assert_close(out["forces"][b], one["forces"], atol=1e-11, rtol=0)
    assert "stress" not in model({"coord": data["coord"], "numbers": data["numbers"]})


def test_the_simple_sum_is_not_for_crystals(model):
    with pytest.raises(torch.jit.Error, match="choose dsf or ewald"):
        model(crystal())
    assert model.coulomb_method == "simple"
    model.set_coulomb_method("ewald")
    assert model.coulomb_method == "ewald"
    assert torch.isfinite(model(crystal())["energy"]).all()
    with pytest.raises(torch.jit.Error, match="ewalt"):
        model.set_coulomb_method("ewalt")


def test_range_of_dispersion_can_be_set(model, molecules):
    data = molecules()
    before = model(data)["energy"]
    model.set_dispersion_cutoff(4.0, 0.3)
    shorter = model(data)["energy"]
    model.set_dispersion_cutoff(9.0, 0.2)
    assert (shorter - before).abs().max() > 1e-4
    assert torch.equal(model(data)["energy"], before)


def test_range_of_dispersion_that_there_is_not(short_ranged, reference_model):
    with_d4 = reference_model("ref_single", torch.float32)
    with_d4.add_output("dftd4", DFTD4(s6=1.0, s8=0.9595, a1=0.3857, a2=4.8069))
    for model in (short_ranged, DeployableModel(with_d4, sorted(SAE))):
        with pytest.raises((torch.jit.Error, ValueError), match="this model has no D3 dispersion"):
            model.set_dispersion_cutoff(10.0)


# --------------------------------------------------------------------------------------------------
# second derivatives
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [120, ALL_FLAT])
def test_hessian_as_an_option(model, molecules, limit):
    model.dense_limit = limit
    data = {key: value[:1] for key, value in molecules().items()}  # water and padding
    expected = Potential(model, {}).hessian(data)
    assert expected.shape == (1, 13, 3, 13, 3)
    model.compute_hessian = True
    out = model(data)
    torch.testing.assert_close(out["hessian"], expected, atol=1e-10, rtol=0)
    assert not out["hessian"].requires_grad
    flat = model({"coord": data["coord"][0, :3], "numbers": data["numbers"][0, :3]})
    torch.testing.assert_close(flat["hessian"], expected[0, :3, :, :3], atol=1e-10, rtol=0)
    model.compute_hessian = False
    step = 2e-5
    moved = [data["coord"].clone(), data["coord"].clone()]
    moved[0][0, 1, 2] += step
    moved[1][0, 1, 2] -= step
    forces = [model({**data, "coord": coord})["forces"] for coord in moved]
    torch.testing.assert_close((forces[1] - forces[0]) / (2.0 * step), expected[:, 1, 2], atol=1e-6, rtol=0)


def test_hessian_of_a_crystal(model):
    model.set_coulomb_method("ewald")
    data = crystal()
    jit = Potential(model, {})
    exact = jit.hessian(data)
    torch.testing.assert_close(exact, jit.hessian(data, "finite_difference", step=1e-4), atol=1e-4, rtol=0)
    assert exact.sum(dim=2).abs().max() < 1e-8, "moving the whole crystal costs nothing"


@pytest.mark.parametrize("limit", [120, ALL_FLAT])
def test_hessian_vector_product(model, molecules, limit):
    model.dense_limit = limit
    data = {key: value[:4] for key, value in molecules().items()}
    vector = torch.randn(data["coord"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jit = Potential(model, {})
    expected = torch.einsum("bikjl,bik->bjl", jit.hessian(data), vector)
    with torch.inference_mode():
        product = jit.hessian_vector_product(data, vector)
    torch.testing.assert_close(product, expected, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="vector has shape"):
        jit.hessian_vector_product(data, vector[0])


def test_inference_mode_through_the_loaded_model(model, molecules):
    data = molecules()
    expected = model(data)
    with torch.inference_mode():
        inner = {key: value.clone() for key, value in data.items()}
        with pytest.raises(torch.jit.Error, match="inference_mode"):
            model(inner)
        assert_same(Potential(model, {})(inner), expected)
        assert Potential(model, {}).hessian({key: value[:1] for key, value in inner.items()}).shape[0] == 1


def test_graph_is_kept_for_the_cell_alone(short_ranged):
    data = crystal()
    cell = data["cell"].clone().requires_grad_()
    out = short_ranged({**data, "cell": cell})
    (gradient,) = torch.autograd.grad(out["energy"].sum(), cell)
    short_ranged.compute_stress = True
    out = short_ranged(data)
    # Lattice vectors alone: the stress without the part of the atoms.
    strain = cell.detach().T @ gradient - data["coord"].T @ out["forces"]
    expected = 0.5 * (strain + strain.T) / torch.linalg.det(data["cell"])
    torch.testing.assert_close(out["stress"], expected, atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------
# precision and what can go wrong
# --------------------------------------------------------------------------------------------------


def test_total_energies_near_a_million_electronvolt_keep_their_differences(reference_model):
    # 30 CCl4 molecules in one system, SAE -1.53e6 eV: the part of the SAE must not show in differences.
    single, double = (deployable(reference_model, (), dtype) for dtype in (torch.float32, torch.float64))
    generator = torch.Generator().manual_seed(0)
    tetrahedron = torch.tensor([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 1.02
    places = torch.cartesian_prod(torch.arange(5.0), torch.arange(3.0), torch.arange(2.0)) * 6.0
    coord = (places.unsqueeze(1) + tetrahedron).reshape(1, -1, 3)
    data = {"coord": coord, "numbers": torch.tensor([[6, 17, 17, 17, 17] * 30])}
    sae = 30 * (SAE[6] + 4 * SAE[17])
    assert sae < -1.5e6
    moved = {**data, "coord": coord + 0.01 * torch.randn(coord.shape, generator=generator)}
    for module in (single, double):
        module.dense_limit = ALL_FLAT
    network = {}
    for key, batch in (("a", data), ("b", moved)):
        wide = {**batch, "coord": batch["coord"].double()}
        network[key] = double(wide)["energy"].item() - sae
        # Narrow arithmetic of the network costs what its own energy costs, not what the sum costs.
        assert single(batch)["energy"].dtype == torch.float64
        assert single(batch)["energy"].item() - sae == pytest.approx(network[key], abs=1e-5 * abs(network[key]) + 1e-4)
    assert abs(network["a"] - network["b"]) > 1e-3
    # The float64 sum itself: 1e-6 eV and better.
    step = {**data, "coord": data["coord"].double()}
    step["coord"] = step["coord"].clone()
    step["coord"][0, 0, 0] += 1e-6
    force = double({**data, "coord": data["coord"].double()})["forces"][0, 0, 0].item()
    change = double(step)["energy"].item() - double({**data, "coord": data["coord"].double()})["energy"].item()
    assert change == pytest.approx(-force * 1e-6, abs=2e-9)


def water(**change):
    coord = torch.tensor([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]], dtype=torch.float64)
    return {"coord": coord, "numbers": torch.tensor([8, 1, 1]), **change}


@pytest.mark.parametrize("limit", [120, ALL_FLAT])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coord": torch.zeros(3, 3)}, "molecule 0: atoms 0 and 1 .from 0. are on top of each other"),
        ({"coord": torch.full((3, 3), torch.inf)}, "coord holds NaN or infinite"),
        ({"charge": torch.tensor([torch.nan])}, "charge holds NaN"),
        ({"charge": torch.tensor([1.0])}, "molecule 0: its multiplicity"),
        ({"mult": torch.tensor([2.0])}, "impossible for its number of electrons"),
        ({"mult": torch.tensor([0.0])}, "impossible for its number of electrons"),
        ({"mult": torch.tensor([13.0])}, "impossible for its number of electrons"),
        ({"coord": water()["coord"].bfloat16()}, "coord must be float32 or float64"),
        ({"coord": water()["coord"].half()}, "coord must be float32 or float64"),
        ({"numbers": torch.tensor([8.0, 1.0, 1.0])}, "numbers must be a tensor of whole numbers"),
        ({"numbers": torch.tensor([8, 1])}, "one number per atom"),
        ({"numbers": torch.tensor([8, 1, 35])}, r"Br \(35\) is not among"),
        ({"cell": torch.zeros(3, 3)}, "volume"),
        ({"cell": torch.ones(3, 3)}, "volume"),
        ({"cell": torch.full((3, 3), torch.nan)}, "cell holds NaN"),
        ({"cell": torch.eye(2)}, r"cell must have shape \(3, 3\)"),
    ],
)
def test_wrong_input_is_an_error_and_never_nan(short_ranged, change, message, limit):
    short_ranged.dense_limit = limit
    with torch.no_grad():
        with pytest.raises(torch.jit.Error, match=message):
            short_ranged(water(**change))
        assert not torch.is_grad_enabled()
    coord = change.get("coord", water()["coord"]).clone().requires_grad_()
    with pytest.raises(torch.jit.Error, match=message):
        short_ranged(water(**{**change, "coord": coord}))
    assert torch.is_grad_enabled()


def test_precision_of_positions_and_weights_may_differ(short_ranged, reference_model):
    single = deployable(reference_model, (), torch.float32)
    expected = short_ranged(water())["forces"]
    found = single(water())["forces"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    found = short_ranged(water(coord=water()["coord"].float()))["forces"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def test_spin_may_be_left_unchecked(short_ranged):
    short_ranged.check_spin = False
    assert torch.isfinite(short_ranged(water(mult=torch.tensor([2.0])))["energy"]).all()


def test_charges_that_are_not_whole_are_not_counted(short_ranged):
    out = short_ranged(water(charge=torch.tensor([0.5], dtype=torch.float64)))
    assert out["charges"].sum().item() == pytest.approx(0.5, abs=1e-2)


def test_first_calls_optimise_only_what_they_use(reference_model):
    """The executor copies what is called directly into one graph, and takes seconds for ten thousand nodes."""
    model = deployable(reference_model)  # one that has not been called
    assert 500 < nodes(model.inlined_graph) < 4000
    for name in ("lrcoulomb", "dftd3"):
        assert nodes(getattr(model.model.outputs, name).inlined_graph) < 5000


def nodes(graph):
    return sum(1 + sum(map(nodes, node.blocks())) for node in graph.nodes())


@pytest.mark.parametrize("limit", [120, ALL_FLAT])
def test_nothing_single_atoms_and_no_neighbours(model, limit):
    model.dense_limit = limit
    empty = model({"coord": torch.zeros(0, 7, 3), "numbers": torch.zeros(0, 7, dtype=torch.long)})
    assert {key: list(value.shape) for key, value in results_of(empty).items()} == {
        "energy": [0],
        "forces": [0, 7, 3],
        "charges": [0, 7],
        "spin_charges": [0, 7],
    }
    atom = model(
        {"coord": torch.ones(1, 3, dtype=torch.float64), "numbers": torch.tensor([1]), "mult": torch.ones(1) * 2}
    )
    assert torch.isfinite(atom["energy"]).all()
    assert (atom["forces"] == 0).all()
    assert atom["charges"].item() == pytest.approx(0.0, abs=1e-3)
    # Two atoms that do not see each other, and a place without a molecule.
    far = {"coord": torch.zeros(2, 2, 3, dtype=torch.float64), "numbers": torch.tensor([[2 * 4, 8], [0, 0]])}
    far["coord"][0, 1, 0] = 60.0
    out = model(far)
    assert torch.isfinite(out["energy"]).all()
    assert out["energy"][1] == 0.0
    assert torch.isfinite(out["forces"]).all()


@pytest.mark.parametrize(
    ("shape", "cell", "stress"),
    [
        ((2, 0, 3), (2, 3, 3), (2, 3, 3)),
        ((0, 7, 3), (3, 3), (0, 3, 3)),
        ((1, 0, 3), (3, 3), (3, 3)),
        ((0, 3), (3, 3), (3, 3)),
    ],
)
def test_stress_and_hessian_of_nothing(short_ranged, shape, cell, stress):
    nothing = {"coord": torch.zeros(shape), "numbers": torch.zeros(shape[:-1], dtype=torch.long)}
    short_ranged.compute_stress = True
    assert short_ranged({**nothing, "cell": torch.ones(cell)})["stress"].shape == stress
    short_ranged.compute_hessian = True
    out = short_ranged(nothing)
    assert "stress" not in out
    assert out["hessian"].shape == (*shape, *shape[-2:])


def test_nothing_internal_leaks_and_nothing_of_the_caller_changes(model):
    data = crystal()
    data["note"] = torch.arange(3)
    before = {key: value.clone() for key, value in data.items()}
    model.set_coulomb_method("ewald")
    model.compute_stress = model.compute_hessian = True
    out = model(data)
    assert sorted(results_of(out)) == ["charges", "energy", "forces", "hessian", "spin_charges", "stress"]
    assert not any(value.requires_grad for value in out.values())
    assert data.keys() == before.keys()
    assert all(torch.equal(data[key], before[key]) for key in before)
    assert all(key in nbops.BATCH_KEYS for key in out)


def test_a_scripted_model_hands_back_what_tells_the_layout(model, molecules, to_flat):
    """As calculators of the AIMNet2 ecosystem expect of TorchScript files; in Python, `Potential` leaves it out."""
    dense, lists, periodic = molecules(), with_lists(to_flat(molecules()), 5.0, 100.0), crystal()
    nothing = {"coord": torch.zeros(0, 3), "numbers": torch.zeros(0, dtype=torch.long)}
    model.set_coulomb_method("dsf")
    for data, keys in ((dense, {"coord"}), (lists, {"coord", "nbmat"}), (periodic, {"coord", "cell"})):
        out = model(data)
        assert out.keys() - results_of(out).keys() == keys
        assert all(torch.equal(out[key], data[key]) for key in keys)
        assert not Potential(model, {})(data).keys() & set(nbops.LAYOUT_KEYS)
    assert "coord" in model(nothing)


def test_long_range_terms_of_a_large_system_hold_no_square_array(model):
    # 1500 atoms, all pairs are 2.25 million: no tensor of a first-order evaluation has so many elements.
    generator = torch.Generator().manual_seed(2)
    grid = torch.cartesian_prod(*[torch.arange(8.0)] * 3)[:500] * 3.1
    waters = water()["coord"].float() + grid.unsqueeze(1) + 0.1 * torch.randn(500, 1, 3, generator=generator)
    data = {"coord": waters.reshape(-1, 3), "numbers": torch.tensor([8, 1, 1]).repeat(500)}
    single = model.float()
    try:
        single(data)
        with torch.profiler.profile(record_shapes=True) as profile:
            single(data)
    finally:
        model.double()
    largest = 0
    for event in profile.events():
        for shape in event.input_shapes or []:
            if shape and all(isinstance(n, int) for n in shape) and 1500 in shape and shape.count(1500) > 1:
                largest = max(largest, 1500)
    assert largest == 0
