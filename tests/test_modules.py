import pytest
import torch

from aimnet2mult import nbops, ops
from aimnet2mult.modules import MLP, AtomicShift, AtomicSum, Dipole, Embedding, Output, Quadrupole, SelfAtomicEnergies


@pytest.fixture
def batch(molecules):
    data = nbops.internal_batch(molecules(), 5.0)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(data["numbers"].shape, generator=generator, dtype=torch.float64)
    data["charges"] = q  # padding too: it must not count
    return data


def test_moments_against_plain_sums(batch):
    dipole = Dipole()(dict(batch))["dipole"]
    quadrupole = Quadrupole()(dict(batch))["quadrupole"]
    for i, numbers in enumerate(batch["numbers"]):
        real = numbers > 0
        q, r = batch["charges"][i, real], batch["coord"][i, real]
        torch.testing.assert_close(dipole[i], (q[:, None] * r).sum(0))
        tensor = torch.einsum("i,ij,ik->jk", q, r, r)
        tensor = tensor - torch.eye(3) * tensor.trace() / 3
        expected = torch.stack([tensor[j, k] for j, k in [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)]])
        torch.testing.assert_close(quadrupole[i], expected)


def test_moments_about_the_centre_of_mass_do_not_move(batch):
    moved = {**batch, "coord": batch["coord"] + 3.0}
    for module, key in ((Dipole(center_coord=True), "dipole"), (Quadrupole(center_coord=True), "quadrupole")):
        torch.testing.assert_close(module(dict(moved))[key], module(dict(batch))[key])
    assert not torch.allclose(Dipole()(dict(moved))["dipole"], Dipole()(dict(batch))["dipole"])


def test_moments_in_flat_layout(batch, molecules, to_flat):
    flat = to_flat(molecules())
    q = batch["charges"][batch["numbers"] > 0]
    torch.testing.assert_close(
        ops.point_charge_quadrupole(q, flat["coord"], flat), Quadrupole()(dict(batch))["quadrupole"]
    )


def test_mlp_ends_as_asked():
    assert isinstance(MLP(2, 1, [3], last_linear=True)[-1], torch.nn.Linear)
    assert isinstance(MLP(2, 1, [3], "torch.nn.SiLU", last_linear=False)[-1], torch.nn.SiLU)
    with pytest.raises(ValueError, match=r"may only name classes from torch\.nn"):
        MLP(2, 1, [3], "os.system")


def test_embedding_rows_are_orthogonal_and_repeated():
    weight = Embedding(5, 8, repeat=3).weight.detach().view(5, 8, 3)
    assert (weight == weight[..., :1]).all()
    gram = weight[1:, :, 0] @ weight[1:, :, 0].T
    torch.testing.assert_close(gram, torch.diag(torch.diagonal(gram)), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.diagonal(gram), torch.full((4,), 8.0))


def test_output_writes_nothing_for_padding(batch):
    batch["aim"] = torch.ones(*batch["numbers"].shape, 4)
    out = Output(4, 1, "aim", "energy", {"hidden": [3]})(batch)["energy"]
    assert (out[batch["numbers"] == 0] == 0).all()
    assert (out[batch["numbers"] > 0] != 0).all()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_sums_of_self_atomic_energies_are_exact_whatever_the_model_is_cast_to(batch, dtype):
    sae = {1: -13.587, 6: -1029.476, 7: -1485.234, 8: -2041.789, 9: -2715.3, 17: -12518.7}
    module = SelfAtomicEnergies(sae)
    energy = (module if dtype is None else module.to(dtype))(dict(batch))["energy"]
    for i, numbers in enumerate(batch["numbers"]):
        assert energy[i].item() == pytest.approx(sum(sae[int(z)] for z in numbers if z > 0), abs=1e-9)


def test_atomic_sum_is_in_double_precision():
    n_atoms = 1000
    data = {
        "coord": torch.zeros(1, n_atoms, 3),
        "numbers": torch.ones(1, n_atoms, dtype=torch.long),
        "charge": torch.zeros(1),
        "energy": torch.full((1, n_atoms), -1029.4761),
    }
    shift = AtomicShift("energy", "energy")
    out = AtomicSum("energy", "energy")(shift(data))["energy"]
    assert out.dtype == torch.float64
    assert out.item() == pytest.approx(n_atoms * float(torch.tensor(-1029.4761)), abs=1e-9)
