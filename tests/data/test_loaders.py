import multiprocessing
import random
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from aimnet2mult.data import loaders
from aimnet2mult.data.loaders import make_loader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sampler import MixedFidelityBatchSampler
from aimnet2mult.data.sgdataset import DatasetError
from aimnet2mult.data.splits import split_indices

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def dataset():
    return MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)})


def loader_of(dataset, indices=None, **options):
    """A loader with a sampler of its own; options of both."""
    reading = {"num_workers", "pin_memory", "persistent_workers", "prefetch_factor"} & options.keys()
    reading = {name: options.pop(name) for name in reading}
    sampler = MixedFidelityBatchSampler(dataset.n_atoms, dataset.fidelities, indices, **options)
    return make_loader(dataset, sampler, **reading)


def assert_same_batches(one, other):
    for (x, y), (x_other, y_other) in zip(one, other, strict=True):
        for left, right in ((x, x_other), (y, y_other)):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("persistent_workers", [True, False])
def test_workers_give_the_same_batches(dataset, persistent_workers):
    options = {"batch_size": 40, "fidelity_weights": {0: 2.0, 2: 0.5}, "seed": 1}
    alone = loader_of(dataset, **options)
    helped = loader_of(dataset, **options, num_workers=2, persistent_workers=persistent_workers, prefetch_factor=3)
    for epoch in range(2):
        for loader in (alone, helped):
            loader.batch_sampler.set_epoch(epoch)
        assert_same_batches(alone, helped)


def test_options_reach_the_loader(dataset):
    loader = loader_of(dataset, batch_size=8, num_workers=1, prefetch_factor=5)
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (1, 5, True)
    assert not loader_of(dataset, batch_size=8).persistent_workers


def test_every_batch_is_what_the_sampler_says(dataset):
    train, _ = split_indices(dataset, 0.1, seed=0)
    loader = loader_of(dataset, train, batch_size=600, batch_mode="atoms")
    assert len(loader) == len(loader.batch_sampler)
    for indices, (x, y) in zip(loader.batch_sampler, loader, strict=True):
        assert x["numbers"].numel() <= 600
        np.testing.assert_array_equal(x["_fidelities"], dataset.fidelities[indices])
        np.testing.assert_array_equal((x["numbers"] > 0).sum(1), dataset.n_atoms[indices])
        assert y["energy_mask"].all()
        np.testing.assert_array_equal(y["forces_mask"], dataset.fidelities[indices] < 2)


def test_random_state_of_training_is_left_alone(dataset):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    next(iter(loader_of(dataset, batch_size=8)))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is memory to pin")
def test_pinning_without_a_gpu_does_nothing(dataset):
    x, _ = next(iter(loader_of(dataset, batch_size=8, pin_memory=True)))
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
        loader_of(dataset, batch_size=8, **options)


# --------------------------------------------------------------------------------------------------
# workers
# --------------------------------------------------------------------------------------------------


class Watched(MixedFidelityDataset):
    """Counts the batches that have been read, by all processes, and notes which processes read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches_read = multiprocessing.Value("i", 0)

    def __getitems__(self, indices):
        with self.batches_read.get_lock():
            self.batches_read.value += 1
        return super().__getitems__(indices)


@pytest.fixture
def watched():
    return Watched({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)})


def worker_ids():
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_number_of_workers(watched, num_workers):
    before = worker_ids()
    batches = iter(loader_of(watched, batch_size=20, num_workers=num_workers))
    next(batches)
    assert len(worker_ids() - before) == num_workers


@pytest.mark.parametrize("persistent_workers", [True, False, None])
def test_persistent_workers_live_through_epochs(watched, persistent_workers):
    loader = loader_of(watched, batch_size=200, num_workers=2, persistent_workers=persistent_workers)
    before, seen = worker_ids(), []
    for _ in range(3):
        for _ in loader:
            workers = worker_ids() - before
        seen.append(workers)
        assert bool(worker_ids() - before) == (persistent_workers is not False)
    assert all(len(workers) == 2 for workers in seen)
    assert (seen[0] == seen[1] == seen[2]) == (persistent_workers is not False)


@pytest.mark.parametrize(("prefetch_factor", "ahead"), [(1, 1), (4, 4), (None, 2)])
def test_workers_read_so_many_batches_ahead(watched, prefetch_factor, ahead):
    batches = iter(loader_of(watched, batch_size=10, num_workers=2, prefetch_factor=prefetch_factor))
    for taken in (1, 2, 3):
        next(batches)
        expected = taken + 2 * ahead
        for _ in range(200):
            if watched.batches_read.value >= expected:
                break
            time.sleep(0.02)
        time.sleep(0.05)  # no more than that
        assert watched.batches_read.value == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fault_in_the_data_is_reported_in_the_same_words(tmp_path, num_workers):
    path = tmp_path / "a.h5"
    path.write_bytes((FIXTURES / "tiny_fid0.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        name = list(file)[-1]
        file[name]["coord"][2, 0, 0] = np.nan
    loader = loader_of(MixedFidelityDataset({0: path}), batch_size=16, num_workers=num_workers)
    with pytest.raises(DatasetError) as error:
        list(loader)
    assert str(error.value) == (
        f"{path}: group {name}: row 2: coord is NaN or infinite. Remove the molecule or repair the file."
    )
    if num_workers:
        assert "__getitems__" in str(error.value.__cause__)  # the traceback of the worker, for developers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("pin_memory", [True, False])
def test_batches_lie_in_pinned_memory(dataset, pin_memory, num_workers):
    x, y = next(iter(loader_of(dataset, batch_size=8, pin_memory=pin_memory, num_workers=num_workers)))
    assert all(tensor.is_pinned() == pin_memory for tensor in (*x.values(), *y.values()))


def test_workers_use_no_shared_memory(watched):
    """Tensors sent through torch's queues would fill /dev/shm, which containers keep small, and take far longer."""
    for x, y in loader_of(watched, batch_size=100, num_workers=1):
        for tensor in (*x.values(), *y.values()):
            assert isinstance(tensor, torch.Tensor)
            assert not tensor.is_shared()
            tensor.zero_()  # as writable as a batch that was made here


def test_batches_of_workers_are_pinned_by_the_loader(dataset, monkeypatch):
    """What the thread of torch's loader that pins does, without a GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    samples = dataset.__getitems__([0, 300])
    x, y = torch.utils.data._utils.pin_memory.pin_memory(loaders._Parcel(samples))
    expected_x, expected_y = loaders.collate(samples)
    assert torch.equal(x["coord"], expected_x["coord"] + 1)
    assert torch.equal(y["forces"], expected_y["forces"] + 1)
