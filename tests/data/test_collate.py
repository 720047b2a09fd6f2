import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aimnet2mult.data.collate import collate

LABELS = {"energy": (), "forces": (3,), "charges": (), "dipole": (3,)}
PER_ATOM = ("forces", "charges")


def sample(rng, n_atoms, present):
    shapes = {key: ((n_atoms,) if key in PER_ATOM else ()) + trailing for key, trailing in LABELS.items()}
    return {
        "_fidelities": int(rng.integers(3)),
        "coord": rng.normal(size=(n_atoms, 3)).astype(np.float32),
        "numbers": rng.integers(1, 90, n_atoms) + 400,
        "charge": np.float32(rng.integers(-2, 3)),
        "mult": np.float32(rng.integers(1, 4)),
        **{key: rng.normal(size=shape) if key in present else None for key, shape in shapes.items()},
    }


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sets(st.sampled_from(list(LABELS)))), min_size=1, max_size=8),
    st.integers(0, 2**31),
)
def test_batch_holds_each_sample_and_nothing_else(molecules, seed):
    rng = np.random.default_rng(seed)
    samples = [sample(rng, n_atoms, present) for n_atoms, present in molecules]
    x, y = collate(samples)
    longest = max(n for n, _ in molecules)
    assert x["coord"].shape == (len(samples), longest, 3)
    for i, one in enumerate(samples):
        n_atoms = len(one["numbers"])
        for key in ("coord", "numbers"):
            np.testing.assert_array_equal(x[key][i, :n_atoms], one[key])
            assert not x[key][i, n_atoms:].any()
        for key in ("charge", "mult", "_fidelities"):
            assert x[key][i] == one[key]
        for key in LABELS:
            present = one[key] is not None
            assert y[f"{key}_mask"][i] == present
            if not present:
                assert not y[key][i].any()
            elif key in PER_ATOM:
                np.testing.assert_allclose(y[key][i, :n_atoms], one[key], rtol=1e-6)
                assert not y[key][i, n_atoms:].any()
            else:
                np.testing.assert_allclose(y[key][i], one[key], rtol=1e-6)


def test_types():
    x, y = collate([sample(np.random.default_rng(0), 4, LABELS)])
    assert {key: value.dtype for key, value in x.items()} == {
        "coord": torch.float32,
        "numbers": torch.int64,
        "charge": torch.float32,
        "mult": torch.float32,
        "_fidelities": torch.int64,
    }
    assert y["energy"].dtype == torch.float64
    assert y["forces"].dtype == torch.float32
    assert all(y[f"{key}_mask"].dtype == torch.bool for key in LABELS)


def test_energy_keeps_double_precision():
    one = sample(np.random.default_rng(0), 2, LABELS)
    one["energy"] = np.float64(-142215.123456789)
    assert collate([one])[1]["energy"].item() == -142215.123456789


@pytest.mark.parametrize("present", [set(), {"energy"}])
def test_labels_that_no_molecule_has_are_zero_with_false_masks(present):
    rng = np.random.default_rng(0)
    _, y = collate([sample(rng, 3, present), sample(rng, 5, present)])
    assert y["forces"].shape == (2, 5, 3)
    assert not y["forces"].any()
    assert not y["forces_mask"].any()
    assert y["energy_mask"].all() == ("energy" in present)
