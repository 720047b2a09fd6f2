import random
from pathlib import Path

import numpy as np
import pytest
import torch

from aimnet2mult.data.loaders import make_loader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.splits import split_indices

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def dataset():
    return MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)})


def assert_same_batches(one, other):
    for (x, y), (x_other, y_other) in zip(one, other, strict=True):
        for left, right in ((x, x_other), (y, y_other)):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("persistent_workers", [True, False])
def test_workers_give_the_same_batches(dataset, persistent_workers):
    options = {"batch_size": 40, "fidelity_weights": {0: 2.0, 2: 0.5}, "seed": 1}
    alone = make_loader(dataset, **options)
    helped = make_loader(dataset, **options, num_workers=2, persistent_workers=persistent_workers, prefetch_factor=3)
    for epoch in range(2):
        for loader in (alone, helped):
            loader.batch_sampler.set_epoch(epoch)
        assert_same_batches(alone, helped)


def test_options_reach_the_loader(dataset):
    loader = make_loader(dataset, batch_size=8, num_workers=1, prefetch_factor=5)
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (1, 5, True)
    assert not make_loader(dataset, batch_size=8).persistent_workers


def test_every_batch_is_what_the_sampler_says(dataset):
    train, _ = split_indices(dataset, 0.1, seed=0)
    loader = make_loader(dataset, train, batch_size=600, batch_mode="atoms")
    assert len(loader) == len(loader.batch_sampler)
    for indices, (x, y) in zip(loader.batch_sampler, loader, strict=True):
        assert x["numbers"].numel() <= 600
        np.testing.assert_array_equal(x["_fidelities"], dataset.fidelities[indices])
        np.testing.assert_array_equal((x["numbers"] > 0).sum(1), dataset.n_atoms[indices])
        assert y["energy_mask"].all()
        np.testing.assert_array_equal(y["forces_mask"], dataset.fidelities[indices] < 2)


def test_random_state_of_training_is_left_alone(dataset):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    next(iter(make_loader(dataset, batch_size=8)))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is memory to pin")
def test_pinning_without_a_gpu_does_nothing(dataset):
    x, _ = next(iter(make_loader(dataset, batch_size=8, pin_memory=True)))
    assert not x["coord"].is_pinned()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "num_workers: -1 is negative"),
        ({"prefetch_factor": 2}, "prefetch_factor: needs num_workers > 0"),
        ({"persistent_workers": True}, "persistent_workers: needs num_workers > 0"),
    ],
)
def test_options_that_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(dataset, batch_size=8, **options)
