from pathlib import Path

import numpy as np
import pytest

from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.splits import split_indices

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def dataset():
    return MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)})


# --------------------------------------------------------------------------------------------------
# split
# --------------------------------------------------------------------------------------------------


def test_split_is_a_partition_with_the_share_of_every_fidelity(dataset):
    train, val = split_indices(dataset, 0.1, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(560))
    assert np.bincount(dataset.fidelities[val]).tolist() == [16, 20, 20]
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()


def test_split_follows_from_the_seed(dataset):
    first, again, other = (split_indices(dataset, 0.2, seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_tiny_fraction_still_validates_every_fidelity(dataset):
    _, val = split_indices(dataset, 1e-6, seed=0)
    assert dataset.fidelities[val].tolist() == [0, 1, 2]


def test_nearly_all_for_validation_leaves_a_training_molecule(dataset):
    train, _ = split_indices(dataset, 0.9999, seed=0)
    assert dataset.fidelities[train].tolist() == [0, 1, 2]


def test_no_validation(dataset):
    train, val = split_indices(dataset, 0.0, seed=0)
    assert len(train) == 560
    assert len(val) == 0


def test_single_molecule_is_for_training():
    class One:
        fidelities = np.array([0, 1, 1])
        num_fidelities = 2

        def __len__(self):
            return 3

    train, val = split_indices(One(), 0.5, seed=0)
    assert 0 in train
    assert len(val) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fraction_out_of_range(dataset, fraction):
    with pytest.raises(ValueError, match=r"data.val_fraction: .* is not a share"):
        split_indices(dataset, fraction, seed=0)
