"""What every model must obey, for each kind of model, layout and execution."""

import numpy as np
import pytest
import torch

from aimnet2mult import nbops
from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored
from aimnet2mult.modules import Forces

ATOL = 1e-10


def rotation(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r))
    return q if torch.linalg.det(q) > 0 else -q


class Scripted(torch.nn.Module):
    """Energies of a scripted model, forces by autograd outside."""

    def __init__(self, model):
        super().__init__()
        with torchscript_deprecation_ignored():
            self.model = torch.jit.script(model)

    def forward(self, data):
        return self.model(data)


@pytest.fixture(params=["single", "scripted", "mixed", "scripted corrected", "mixed corrected"])
def evaluate(request, reference_model, corrected_model):
    """Batch of plain atomic numbers -> results with forces, in float64; corrected: with `ChargeCorrection`, scales."""
    mixed = "mixed" in request.param
    build = corrected_model if "corrected" in request.param else reference_model
    model = build("ref_mixed" if mixed else "ref_single")
    model = Forces(Scripted(model) if "scripted" in request.param else model).eval()

    def run(data):
        if mixed:  # everything in fidelity 1
            data = {**data, "numbers": nbops.encode_fidelity(data["numbers"], 1, 200)}
        return {key: value.detach() for key, value in model(data).items()}

    return run


@pytest.fixture(params=["padded", "flat"])
def layout(request, to_flat):
    return to_flat if request.param == "flat" else (lambda data: data)


def test_translation_and_rotation(evaluate, molecules, layout):
    data = layout(molecules())
    before = evaluate(data)
    turn = rotation()
    after = evaluate({**data, "coord": data["coord"] @ turn + torch.tensor([3.0, -1.0, 7.0])})
    for key in ("energy", "charges", "spin_charges"):
        torch.testing.assert_close(after[key], before[key], atol=ATOL, rtol=0)
    real = data["numbers"] > 0
    torch.testing.assert_close(after["forces"][real], (before["forces"] @ turn)[real], atol=ATOL, rtol=0)


def test_permutation(evaluate, molecules):
    data = molecules()
    before = evaluate(data)
    order = torch.randperm(data["numbers"].shape[1], generator=torch.Generator().manual_seed(1))
    after = evaluate({**data, "coord": data["coord"][:, order], "numbers": data["numbers"][:, order]})
    torch.testing.assert_close(after["energy"], before["energy"], atol=ATOL, rtol=0)
    for key in ("forces", "charges", "spin_charges"):
        torch.testing.assert_close(after[key], before[key][:, order], atol=ATOL, rtol=0)


def test_alone_padded_and_flat_are_the_same(evaluate, molecules, to_flat):
    data = molecules()
    padded, flat = evaluate(data), evaluate(to_flat(data))
    real = data["numbers"] > 0
    torch.testing.assert_close(flat["energy"], padded["energy"], atol=ATOL, rtol=0)
    for key in ("forces", "charges", "spin_charges"):
        torch.testing.assert_close(flat[key], padded[key][real], atol=ATOL, rtol=0)
        assert (padded[key][~real] == 0).all()
    for i, atoms in enumerate(real):
        molecule = {
            "coord": data["coord"][i : i + 1, atoms],
            "numbers": data["numbers"][i : i + 1, atoms],
            "charge": data["charge"][i : i + 1],
            "mult": data["mult"][i : i + 1],
        }
        alone = evaluate(molecule)
        torch.testing.assert_close(alone["energy"][0], padded["energy"][i], atol=ATOL, rtol=0)
        torch.testing.assert_close(alone["forces"][0], padded["forces"][i][atoms], atol=ATOL, rtol=0)


def test_large_dense_molecules_are_the_same_as_flat(evaluate):
    # Beyond the dense limit the model works on a flat batch of its own.
    generator = torch.Generator().manual_seed(0)
    n_atoms = 300
    grid = torch.cartesian_prod(*[torch.arange(7.0, dtype=torch.float64)] * 3)[:n_atoms] * 1.7
    coord = grid + 0.2 * torch.randn(n_atoms, 3, generator=generator, dtype=torch.float64)
    numbers = torch.tensor([1, 6, 7, 8])[torch.randint(0, 4, (n_atoms,), generator=generator)]
    dense = evaluate({"coord": coord[None], "numbers": numbers[None]})
    flat = evaluate({"coord": coord, "numbers": numbers})
    torch.testing.assert_close(dense["energy"], flat["energy"], atol=1e-8, rtol=0)
    torch.testing.assert_close(dense["forces"][0], flat["forces"], atol=1e-8, rtol=0)
    assert dense["charges"].shape == (1, n_atoms)


def test_neighbour_matrix_per_molecule(evaluate, molecules):
    data = molecules()
    expected = evaluate(data)
    # One more place per molecule, so that the last atom of each is padding.
    coord = torch.nn.functional.pad(data["coord"], (0, 0, 0, 1))
    numbers = torch.nn.functional.pad(data["numbers"], (0, 1))
    n_atoms = numbers.shape[1]
    others = torch.arange(n_atoms).expand(len(numbers), n_atoms, n_atoms).clone()
    counts = (numbers > 0)[:, None, :] & (numbers > 0)[:, :, None] & ~torch.eye(n_atoms, dtype=torch.bool)
    others[~counts] = n_atoms - 1
    out = evaluate({**data, "coord": coord, "numbers": numbers, "nbmat": others, "nbmat_lr": others})
    torch.testing.assert_close(out["energy"], expected["energy"], atol=ATOL, rtol=0)
    torch.testing.assert_close(out["forces"][:, :-1], expected["forces"], atol=ATOL, rtol=0)


def test_forces_are_minus_the_gradient(evaluate, molecules, layout):
    data = molecules()
    rows = [2, 3, 6]  # an anion, a radical, a radical cation
    data = layout({key: value[rows] for key, value in data.items()})
    forces = evaluate(data)["forces"]
    step = 1e-4
    worst = 0.0
    for atom in torch.nonzero(data["numbers"] > 0).tolist():
        for k in range(3):
            energies = []
            for shift in (-2, -1, 1, 2):
                coord = data["coord"].clone()
                coord[(*atom, k)] += shift * step
                energies.append(evaluate({**data, "coord": coord})["energy"].sum().item())
            slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
            worst = max(worst, abs(slope + forces[(*atom, k)].item()))
    assert worst < 1e-6 * max(1.0, forces.abs().max().item())


@pytest.mark.parametrize("seed", range(3))
def test_charges_sum_to_the_totals(fixtures_dir, molecules, layout, seed):
    torch.manual_seed(seed)
    data = layout(molecules(torch.float32))
    for config in (load_model_config(), load_model_config(fixtures_dir / "ref_single_model.yaml")):
        out = build_model(config)(data)
        charge, spin = nbops.mol_sum(out["charges"], data), nbops.mol_sum(out["spin_charges"], data)
        torch.testing.assert_close(charge, data["charge"], atol=1e-5, rtol=0)
        torch.testing.assert_close(spin, data["mult"] - 1, atol=1e-5, rtol=0)


def test_a_trained_model_may_only_lose_what_the_equation_loses(evaluate, molecules, layout):
    # The reference weights have tiny flexibilities; f/(Σf + ε) then leaves a part of the charge undistributed.
    data = layout(molecules())
    lost = (nbops.mol_sum(evaluate(data)["charges"], data) - data["charge"]).abs()
    assert lost.max() < 1e-3


def test_another_molecule_has_no_influence(evaluate, molecules, layout):
    data = molecules()
    before = evaluate(layout(data))
    moved = {**data, "coord": data["coord"].clone()}
    moved["coord"][0] += torch.randn(data["coord"].shape[1], 3, dtype=torch.float64) * (data["numbers"][0] > 0)[:, None]
    after = evaluate(layout(moved))
    assert torch.equal(after["energy"][1:], before["energy"][1:])
    assert after["energy"][0] != before["energy"][0]


def test_smooth_at_the_cutoff(evaluate):
    distances = 5.0 + torch.tensor([-1e-3, -1e-4, 1e-4, 1e-3], dtype=torch.float64)
    coord = torch.zeros(4, 2, 3, dtype=torch.float64)
    coord[:, 1, 0] = distances
    out = evaluate({"coord": coord, "numbers": torch.tensor([[8, 1]] * 4), "mult": torch.full((4,), 2.0)})
    forces = out["forces"][:, 1, 0]
    slopes = torch.diff(out["energy"]) / torch.diff(distances)
    torch.testing.assert_close(slopes, -0.5 * (forces[1:] + forces[:-1]), atol=1e-6, rtol=0)
    assert (torch.diff(forces).abs() < 1e-3).all()


def test_emitted_keys_are_those_of_the_table(evaluate, molecules, layout):
    data = layout(molecules())
    out = evaluate(data)
    for key, value in out.items():
        meaning = nbops.BATCH_KEYS[key]
        assert not key.startswith("_")
        first = {"atom": data["numbers"].shape, "molecule": data["charge"].shape}[meaning.kind]
        if meaning.trailing == (-1,):
            assert value.shape[:-1] == first
        else:
            assert value.shape == (*first, *meaning.trailing)
        if meaning.dtype == "float64":
            assert value.dtype == torch.float64


def test_fidelities_in_one_batch_do_not_mix(reference_model, molecules, to_flat):
    model = Forces(reference_model("ref_mixed")).eval()
    data = molecules()
    fidelities = torch.arange(len(data["numbers"])) % 3
    mixed = {**data, "numbers": nbops.encode_fidelity(data["numbers"], fidelities[:, None], 200)}
    together = model(mixed)
    flat = model(to_flat(mixed))
    torch.testing.assert_close(flat["energy"], together["energy"], atol=ATOL, rtol=0)
    for f in range(3):
        rows = fidelities == f
        alone = model({key: value[rows] for key, value in mixed.items()})
        torch.testing.assert_close(alone["energy"], together["energy"][rows], atol=ATOL, rtol=0)
        torch.testing.assert_close(alone["forces"], together["forces"][rows], atol=ATOL, rtol=0)


def test_second_derivatives_are_finite_and_right(reference_model, molecules):
    model = reference_model("ref_single")
    data = molecules()
    data = {key: value[[0, 3]] for key, value in data.items()}  # water and methyl, padded
    coord = data["coord"].clone().requires_grad_(True)

    def energies(x):
        return model({**data, "coord": x})["energy"]

    (gradient,) = torch.autograd.grad(energies(coord).sum(), coord, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 1, 0], coord)
    assert torch.isfinite(second).all()
    step = 1e-5
    moved = [coord.detach().clone(), coord.detach().clone()]
    moved[0][0, 1, 0] += step
    moved[1][0, 1, 0] -= step
    slopes = []
    for x in moved:
        x.requires_grad_(True)
        slopes.append(torch.autograd.grad(energies(x).sum(), x)[0])
    np.testing.assert_allclose(second, (slopes[0] - slopes[1]) / (2 * step), rtol=0, atol=1e-6)
