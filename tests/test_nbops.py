import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aimnet2mult import nbops


@given(
    numbers=st.lists(st.integers(0, 118), min_size=1, max_size=20),
    fidelity=st.integers(0, 7),
    offset=st.integers(129, 400),
)
def test_fidelity_round_trip(numbers, fidelity, offset):
    for z in (np.array(numbers), torch.tensor(numbers)):
        types = nbops.encode_fidelity(z, fidelity, offset)
        back, f = nbops.decode_fidelity(types, offset)
        assert (back == z).all()
        assert (f[z > 0] == fidelity).all()
        assert (types[z == 0] == 0).all()


def test_pack_and_unpack_are_inverse(molecules):
    batch = nbops.internal_batch(molecules(), 5.0)
    x = nbops.mask_padding(torch.randn(*batch["numbers"].shape, 4), batch)
    packed = nbops.pack_atoms(x, batch)
    assert packed.shape == (int((batch["numbers"] > 0).sum()), 4)
    torch.testing.assert_close(nbops.unpack_atoms(packed, batch), x)


def test_mol_sum_is_the_same_in_both_layouts(molecules, to_flat):
    data = molecules()
    dense = nbops.mol_sum(nbops.mask_padding(data["coord"], data), data)
    torch.testing.assert_close(nbops.mol_sum(to_flat(data)["coord"], to_flat(data)), dense)


def test_pairs_are_computed_once_and_masked_ones_are_far(molecules):
    batch = nbops.internal_batch(molecules(), 5.0)
    d_ij, _, mask = nbops.pair_vectors(batch)
    assert nbops.pair_vectors(batch)[0] is d_ij
    assert (d_ij[~mask] == nbops.MASKED_DISTANCE).all()
    n_atoms = (batch["numbers"] > 0).sum(1)
    assert (mask.sum((1, 2)) == n_atoms * (n_atoms - 1)).all()


def test_input_is_left_as_it_is(molecules):
    data = molecules()
    before = {key: value.clone() for key, value in data.items()}
    nbops.pair_vectors(nbops.internal_batch(data, 5.0))
    assert data.keys() == before.keys()
    assert all(torch.equal(data[key], before[key]) for key in data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coord": torch.zeros(2, 3, 4)}, "must have shape"),
        ({"numbers": torch.ones(2, 4, dtype=torch.long)}, "one number per atom"),
        ({"coord": torch.zeros(2, 3, 3, dtype=torch.long)}, "floating-point"),
        ({"charge": torch.zeros(3)}, "charge has 3 entries for 2 molecules"),
        ({"nbmat": torch.zeros(6, 2, dtype=torch.long)}, "nbmat must have shape"),
        ({"nbmat": torch.zeros(2, 2, 2, dtype=torch.long)}, "nbmat must have shape"),
        ({"nbmat_lr": torch.zeros(2, 3, 2, dtype=torch.long)}, "need nbmat"),
        ({"cell": torch.eye(3).expand(3, 3, 3)}, "cell must have shape"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    data = {"coord": torch.rand(2, 3, 3), "numbers": torch.ones(2, 3, dtype=torch.long), **change}
    with pytest.raises(ValueError, match=message):
        nbops.internal_batch(data, 5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mol_idx": torch.zeros(3, 1, dtype=torch.long)}, "one per atom"),
        ({"cell": torch.eye(3).expand(2, 3, 3)}, "cell has 2 entries for 1 molecules"),
        ({"nbmat_lr": torch.zeros(2, 4, dtype=torch.long)}, "nbmat_lr must have shape"),
        ({"cell": torch.eye(3)}, "nbmat of a crystal needs cell and shifts"),
        ({"shifts": torch.zeros(3, 2, 3)}, "nbmat of a crystal needs cell and shifts"),
        ({"shifts_lr": torch.zeros(3, 4, 3)}, "shifts_lr needs nbmat_lr"),
        ({"cell": torch.eye(3), "shifts": torch.zeros(3, 4, 3)}, "shifts must have shape"),
    ],
)
def test_flat_shapes_that_do_not_fit(change, message):
    data = {
        "coord": torch.rand(3, 3),
        "numbers": torch.tensor([1, 1, 0]),
        "nbmat": torch.tensor([[1, 2], [0, 2], [2, 2]]),
    }
    if message.startswith("cell"):
        del data["nbmat"]
    with pytest.raises(ValueError, match=message):
        nbops.internal_batch({**data, **change}, 5.0)


@pytest.mark.parametrize("key", ["nbmat", "nbmat_lr"])
@pytest.mark.parametrize("place", [-1, 3])
def test_neighbours_that_there_are_not(key, place):
    nbmat = torch.tensor([[1, 2], [0, 2], [2, 2]])
    data = {"coord": torch.rand(3, 3), "numbers": torch.tensor([1, 1, 0]), "nbmat": nbmat, "nbmat_lr": nbmat}
    nbops.check_values(data)
    with pytest.raises(ValueError, match=f"^{key} must hold places of atoms, 0 to 2"):
        nbops.check_values({**data, key: torch.where(nbmat == 2, place, nbmat)})


def test_missing_keys():
    with pytest.raises(ValueError, match="coord and numbers"):
        nbops.internal_batch({"coord": torch.zeros(1, 1, 3)}, 5.0)
