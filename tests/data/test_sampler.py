import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimnet2mult.data.sampler import (
    MixedFidelityBatchSampler,
    apportion,
    cut_batches,
    padded_atoms,
    split_largest,
)

WEIGHTS = {0: 0.2, 1: 1.7, 2: 9.0}
SIZES = {0: 5000, 1: 503, 2: 50}  # a hundredfold


def population(counts=SIZES, low=2, high=30, seed=0):
    """Atom counts and fidelities of `counts` molecules per fidelity."""
    rng = np.random.default_rng(seed)
    n = sum(counts.values())
    return rng.integers(low, high + 1, n), np.repeat(list(counts), list(counts.values()))


def make(n_atoms, fidelities, **options):
    return MixedFidelityBatchSampler(n_atoms, fidelities, **{"batch_size": 32, **options})


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def draws(batches, fidelities):
    drawn = fidelities[list(itertools.chain(*batches))]
    return {f: int((drawn == f).sum()) for f in np.unique(fidelities).tolist()}


def padding(batches, n_atoms):
    padded = sum(len(batch) * n_atoms[batch].max() for batch in batches)
    return 1.0 - sum(n_atoms[batch].sum() for batch in batches) / padded


# --------------------------------------------------------------------------------------------------
# shares
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_mode", ["molecules", "atoms"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_numbers_of_draws(batch_mode, world_size):
    n_atoms, fidelities = population()
    ranks = [
        make(
            n_atoms,
            fidelities,
            batch_size=32 if batch_mode == "molecules" else 400,
            batch_mode=batch_mode,
            fidelity_weights=WEIGHTS,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for epoch in range(6):
        batches = list(itertools.chain(*(epoch_of(sampler, epoch) for sampler in ranks)))
        assert draws(batches, fidelities) == {0: 1000, 1: 855, 2: 450}


def test_missing_weight_is_one_and_zero_is_never():
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities, fidelity_weights={1: 0.0})
    assert draws(epoch_of(sampler, 0), fidelities) == {0: 5000, 1: 0, 2: 50}
    assert sorted(itertools.chain(*sampler)) == np.flatnonzero(fidelities != 1).tolist()


def test_small_weight_of_few_molecules_still_draws():
    n_atoms, fidelities = population({0: 100, 1: 2})
    assert draws(epoch_of(make(n_atoms, fidelities, fidelity_weights={1: 0.1}), 3), fidelities) == {0: 100, 1: 1}


def test_uniform_ignores_weights_and_says_so(caplog):
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities, sampling_strategy="uniform", fidelity_weights=WEIGHTS)
    assert sorted(itertools.chain(*epoch_of(sampler, 2))) == list(range(len(n_atoms)))
    assert "fidelity_weights are not used: sampling_strategy is uniform" in caplog.text


def test_balanced_draws_the_same_number_of_each():
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities, sampling_strategy="balanced")
    for epoch in range(3):
        assert draws(epoch_of(sampler, epoch), fidelities) == {0: 1851, 1: 1851, 2: 1851}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("n_batches", [1, 40, 700])
def test_fixed_number_of_batches_keeps_shares(n_batches, world_size):
    n_atoms, fidelities = population(low=20)
    ranks = [
        make(
            n_atoms,
            fidelities,
            fidelity_weights=WEIGHTS,
            batches_per_epoch=n_batches,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    expected = apportion(n_batches * world_size * 32, {0: 1000 / 2305.1, 1: 855.1 / 2305.1, 2: 450 / 2305.1})
    for epoch in range(3):
        mine = [epoch_of(sampler, epoch) for sampler in ranks]
        assert [len(batches) for batches in mine] == [n_batches] * world_size
        assert draws(itertools.chain(*mine), fidelities) == expected


def test_fixed_number_of_batches_by_atoms():
    n_atoms, fidelities = population()
    sampler = make(
        n_atoms, fidelities, batch_size=500, batch_mode="atoms", fidelity_weights=WEIGHTS, batches_per_epoch=50
    )
    for epoch in range(20):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) == 50
        assert max(len(batch) * n_atoms[batch].max() for batch in batches) <= 500
        found = draws(batches, fidelities)
        total = sum(found.values())
        assert total * n_atoms.mean() > 0.8 * 50 * 500
        for f, asked in sampler.report().asked.items():
            assert abs(found[f] - asked * total) < 1.0
    assert padding(batches, n_atoms) <= 0.1


@given(st.integers(0, 10**6), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_apportion_differs_from_exact_shares_by_less_than_one(total, parts):
    shares = {f: part / sum(parts) for f, part in enumerate(parts)}
    found = apportion(total, shares)
    assert sum(found.values()) == total
    assert all(abs(found[f] - total * share) < 1.0 for f, share in shares.items())


# --------------------------------------------------------------------------------------------------
# order of draws
# --------------------------------------------------------------------------------------------------


def test_no_molecule_again_before_all_others_of_its_fidelity():
    """After every epoch, the numbers of times that molecules of a fidelity have come differ by one at most."""
    n_atoms, fidelities = population({0: 700, 1: 70, 2: 7})
    sampler = make(n_atoms, fidelities, fidelity_weights=WEIGHTS)
    seen = np.zeros(len(n_atoms), int)
    for epoch in range(12):
        for batch in epoch_of(sampler, epoch):
            np.add.at(seen, batch, 1)
        for f in range(3):
            assert np.ptp(seen[fidelities == f]) <= 1
    assert seen[fidelities == 2].sum() == 12 * 63
    assert seen[fidelities == 0].sum() == 12 * 140


def test_sequence_of_a_large_fidelity_crosses_permutations():
    n_atoms, fidelities = population({0: 70_000})  # more than one block holds
    sampler = make(n_atoms, fidelities, fidelity_weights={0: 0.4})
    seen = Counter(itertools.chain(*(itertools.chain(*epoch_of(sampler, epoch)) for epoch in range(5))))
    assert len(seen) == 70_000
    assert set(seen.values()) == {2}


def test_epochs_differ_and_are_reproducible():
    n_atoms, fidelities = population()
    options = {"fidelity_weights": WEIGHTS, "seed": 5}
    first = make(n_atoms, fidelities, **options)
    epochs = [epoch_of(first, epoch) for epoch in range(4)]
    assert epochs[0] != epochs[1]
    assert sorted(itertools.chain(*epochs[0])) != sorted(itertools.chain(*epochs[1]))
    again = make(n_atoms, fidelities, **options)
    assert [epoch_of(again, epoch) for epoch in (3, 1)] == [epochs[3], epochs[1]]
    assert epoch_of(make(n_atoms, fidelities, **{**options, "seed": 6}), 0) != epochs[0]


def test_batches_of_equal_composition_hold_other_molecules_in_each_epoch():
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities)
    together = [{frozenset(batch) for batch in epoch_of(sampler, epoch)} for epoch in range(2)]
    assert not together[0] & together[1]


def test_going_on_in_the_middle_of_an_epoch():
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities)
    whole = epoch_of(sampler, 2)
    other = make(n_atoms, fidelities)
    other.set_epoch(2, first_batch=100)
    assert len(other) == len(whole) - 100
    assert list(other) == whole[100:]
    other.set_epoch(3)
    assert list(other) == epoch_of(sampler, 3)


def test_indices_restrict_the_draws():
    n_atoms, fidelities = population()
    chosen = np.arange(0, len(n_atoms), 7)
    sampler = make(n_atoms, fidelities, indices=chosen)
    assert sorted(itertools.chain(*sampler)) == chosen.tolist()


# --------------------------------------------------------------------------------------------------
# batches
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_molecules", [300, 20_000])
@pytest.mark.parametrize(("batch_mode", "batch_size"), [("molecules", 32), ("atoms", 500)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_bounds_of_batches(n_molecules, batch_mode, batch_size, shuffle):
    n_atoms, fidelities = population({0: n_molecules, 1: n_molecules // 10}, low=2, high=60)
    sampler = make(n_atoms, fidelities, batch_mode=batch_mode, batch_size=batch_size, shuffle=shuffle)
    for epoch in range(2):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler)
        assert sorted(itertools.chain(*batches)) == list(range(len(n_atoms)))  # the largest are there, too
        filled = [len(b) if batch_mode == "molecules" else len(b) * n_atoms[b].max() for b in batches]
        assert max(filled) <= batch_size
        assert np.mean(filled) > 0.8 * batch_size
        assert padding(batches, n_atoms) <= 0.1


def test_no_padding_means_one_size_per_batch():
    n_atoms, fidelities = population()
    for batch in epoch_of(make(n_atoms, fidelities, max_padding=0.0), 1):
        assert len(set(n_atoms[batch])) == 1


def test_skewed_sizes_stay_within_the_bound():
    """Most molecules are tiny and a few are large, so that a batch of both would be nearly all padding."""
    n_atoms = np.array([2] * 1000 + [100] * 10 + [7] * 50)
    fidelities = np.zeros(1060, int)
    assert padding(epoch_of(make(n_atoms, fidelities), 0), n_atoms) <= 0.1


def test_batches_mix_fidelities_and_sizes():
    n_atoms, fidelities = population({0: 4000, 1: 4000, 2: 4000}, low=10, high=40)
    batches = epoch_of(make(n_atoms, fidelities), 0)
    assert np.mean([len(set(fidelities[batch])) == 3 for batch in batches]) > 0.95
    assert np.mean([len(set(n_atoms[batch])) >= 2 for batch in batches]) > 0.95
    share = np.mean([(fidelities[batch] == 0).mean() for batch in batches])
    assert abs(share - 1 / 3) < 0.01


def test_sizes_are_not_trained_in_order():
    n_atoms, fidelities = population({0: 4000})
    mean_size = [n_atoms[batch].mean() for batch in epoch_of(make(n_atoms, fidelities), 0)]
    assert abs(np.corrcoef(mean_size, np.arange(len(mean_size)))[0, 1]) < 0.3


def test_molecule_larger_than_a_batch_is_alone(caplog):
    n_atoms, fidelities = np.array([5] * 20 + [300]), np.zeros(21, int)
    batches = epoch_of(make(n_atoms, fidelities, batch_mode="atoms", batch_size=100), 0)
    assert [20] in batches
    assert sorted(map(len, batches)) == [1, 20]
    assert caplog.text.count("1 molecules have more atoms than batch_size (100 atoms)") == 1


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80),
    st.integers(1, 60),
    st.booleans(),
    st.floats(0.0, 0.9),
)
def test_cut_batches_against_the_definition(sizes, capacity, by_atoms, max_padding):
    """Each batch fits, and no longer one from the same start does."""
    sizes = np.array(sizes)

    def fits(begin, end):
        window = sizes[begin:end]
        padded = len(window) * window.max()
        full = padded if by_atoms else len(window)
        return len(window) == 1 or (full <= capacity and window.sum() >= (1.0 - max_padding - 1e-9) * padded)

    bounds = cut_batches(sizes, capacity, by_atoms, max_padding)
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    for begin, end in itertools.pairwise(bounds):
        assert begin < end
        assert fits(begin, end)
        assert not any(fits(begin, longer) for longer in range(end + 1, len(sizes) + 1))
    padded = [len(sizes[a:b]) * sizes[a:b].max() for a, b in itertools.pairwise(bounds)]
    np.testing.assert_array_equal(padded_atoms(sizes, bounds), padded)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.data())
def test_split_largest_only_adds_boundaries(lengths, data):
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    wanted = data.draw(st.integers(0, int(bounds[-1])))
    split = split_largest(bounds, wanted)
    assert len(split) - 1 == max(wanted, len(lengths))
    assert set(bounds) <= set(split)
    assert (np.diff(split) > 0).all()


# --------------------------------------------------------------------------------------------------
# several processes, and validation
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_processes_share_what_one_would_draw(world_size, weights):
    n_atoms, fidelities = population()
    alone = make(n_atoms, fidelities, fidelity_weights=weights)
    ranks = [
        make(n_atoms, fidelities, fidelity_weights=weights, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        mine = [epoch_of(sampler, epoch) for sampler in ranks]
        assert len({len(batches) for batches in mine}) == 1
        assert len(mine[0]) == len(ranks[0])
        together = Counter(itertools.chain(*itertools.chain(*mine)))
        assert together == Counter(itertools.chain(*epoch_of(alone, epoch)))
    if weights is None:
        assert max(together.values()) == 1  # so that the processes draw disjoint sets


def test_number_of_batches_is_that_of_every_epoch():
    n_atoms, fidelities = population({0: 900, 1: 90, 2: 9}, low=2, high=60)
    for options in ({}, {"batch_mode": "atoms", "batch_size": 700}):
        sampler = make(n_atoms, fidelities, fidelity_weights=WEIGHTS, **options)
        assert len({len(epoch_of(sampler, epoch)) for epoch in range(50)}) == 1


def test_fewer_molecules_than_processes_is_refused():
    n_atoms, fidelities = population({0: 2})
    with pytest.raises(ValueError, match="2 draws per epoch are not enough for 3 processes"):
        make(n_atoms, fidelities, world_size=3)


def test_three_molecules_for_two_processes(caplog):
    n_atoms, fidelities = population({0: 3})
    ranks = [make(n_atoms, fidelities, batch_size=1, rank=rank, world_size=2) for rank in range(2)]
    assert [len(list(sampler)) for sampler in ranks] == [1, 1]
    assert "1 draws left out" in caplog.text


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_covers_every_molecule_once_in_fixed_order(world_size):
    n_atoms, fidelities = population()
    ranks = [
        make(n_atoms, fidelities, shuffle=False, fidelity_weights=WEIGHTS, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    mine = [epoch_of(sampler, 0) for sampler in ranks]
    assert sorted(itertools.chain(*itertools.chain(*mine))) == list(range(len(n_atoms)))
    assert [len(sampler) for sampler in ranks] == [len(batches) for batches in mine]
    assert [epoch_of(sampler, 4) for sampler in ranks] == mine


def test_validation_with_few_batches_sees_all_sizes():
    n_atoms, fidelities = population()
    batches = epoch_of(make(n_atoms, fidelities, shuffle=False, batches_per_epoch=5), 0)
    assert len(batches) == 5
    assert n_atoms[batches[0]].min() == 2
    assert n_atoms[batches[-1]].max() == 30


# --------------------------------------------------------------------------------------------------
# report and errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_report_counts_what_is_drawn(world_size):
    n_atoms, fidelities = population()
    ranks = [
        make(n_atoms, fidelities, fidelity_weights=WEIGHTS, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = list(itertools.chain(*(epoch_of(sampler, 1) for sampler in ranks)))
    report = ranks[-1].report()
    assert report.draws == draws(batches, fidelities)
    assert report.batches == len(batches)
    assert report.padding == pytest.approx(padding(batches, n_atoms))
    assert report.molecules == SIZES
    assert report.effective_epochs == pytest.approx({0: 0.2, 1: 1.7, 2: 9.0}, abs=1e-3)
    assert report.realised == pytest.approx(report.asked, abs=1e-4)
    assert report.asked == pytest.approx({0: 1000 / 2305.1, 1: 855.1 / 2305.1, 2: 450 / 2305.1})
    text = str(report)
    assert text.startswith("epoch 1, weighted: 2305 molecules in ")
    assert "fidelity 2: 450 draws of 50 molecules (each 9 times), share 19.52 %, asked for 19.52 %" in text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {2: 1.0},
            r"data.fidelity_weights: fidelity 2 has no dataset \(datasets: 0, 1\). Add data.fidelity_datasets.2",
        ),
        ({1: -0.5}, "data.fidelity_weights: fidelity 1 has the weight -0.5"),
        ({1: float("nan")}, "fidelity 1 has the weight nan"),
        ({0: float("inf")}, "fidelity 0 has the weight inf"),
        ({0: 0.0, 1: 0.0}, r"all weights are zero \(fidelities: 0, 1\)"),
    ],
)
def test_weights_that_are_refused(weights, message):
    n_atoms, fidelities = population({0: 10, 1: 5})
    with pytest.raises(ValueError, match=message):
        make(n_atoms, fidelities, fidelity_weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is not positive"),
        ({"batch_mode": "atom"}, "batch_mode: unknown mode 'atom'; did you mean atoms"),
        ({"sampling_strategy": "weigthed"}, "did you mean weighted"),
        ({"batches_per_epoch": 0}, "batches_per_epoch: 0 is not positive. Give -1"),
        ({"max_padding": 1.0}, "max_padding: 1.0 is not a share"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2 processes"),
        ({"indices": np.array([], int)}, "no molecules to draw from"),
    ],
)
def test_options_that_are_refused(options, message):
    n_atoms, fidelities = population({0: 10, 1: 5})
    with pytest.raises(ValueError, match=message):
        make(n_atoms, fidelities, **options)


def test_an_epoch_of_two_million_molecules_is_made_in_seconds():
    n_atoms, fidelities = population({0: 20_000, 1: 1_980_000}, low=5, high=60)
    start = time.perf_counter()
    sampler = make(n_atoms, fidelities, batch_size=64, fidelity_weights={0: 10.0})
    next(iter(sampler))
    assert time.perf_counter() - start < 15.0  # about one on a free core
