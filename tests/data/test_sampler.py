import itertools
import json
import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimnet2mult.data.loaders import make_loader
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sampler import (
    MixedFidelityBatchSampler,
    apportion,
    cut_batches,
    padded_atoms,
    split_largest,
)

WEIGHTS = {0: 0.2, 1: 1.7, 2: 9.0}
SIZES = {0: 5000, 1: 503, 2: 50}  # a hundredfold
ASKED = {0: 1000.0, 1: 855.1, 2: 450.0}  # draws per epoch
NAMES = {0: "gfn2", 1: "wb97m", 2: "ccsd"}
FIXTURES = Path(__file__).parents[1] / "fixtures"


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
    total = Counter()
    for epoch in range(10):
        batches = list(itertools.chain(*(epoch_of(sampler, epoch) for sampler in ranks)))
        found = draws(batches, fidelities)
        assert found in ({0: 1000, 1: 855, 2: 450}, {0: 1000, 1: 856, 2: 450})
        total.update(found)
        for f in range(3):
            assert abs(total[f] - ASKED[f] * (epoch + 1)) <= 0.5
    assert total == {0: 10_000, 1: 8551, 2: 4500}


def test_missing_weight_is_one_and_zero_is_never():
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities, fidelity_weights={1: 0.0})
    assert draws(epoch_of(sampler, 0), fidelities) == {0: 5000, 1: 0, 2: 50}
    assert sorted(itertools.chain(*sampler)) == np.flatnonzero(fidelities != 1).tolist()


def test_a_fraction_of_a_draw_per_epoch_is_a_draw_now_and_then():
    """Weight 0.1 on two molecules: one draw in five epochs, each of the two once in ten."""
    n_atoms, fidelities = population({0: 100, 1: 2})
    sampler = make(n_atoms, fidelities, fidelity_weights={1: 0.1})
    rare = [m for epoch in range(20) for batch in epoch_of(sampler, epoch) for m in batch if m >= 100]
    assert len(rare) == 4
    assert set(rare[:2]) == set(rare[2:]) == {100, 101}
    assert [draws(epoch_of(sampler, epoch), fidelities)[0] for epoch in range(5)] == [100] * 5


def test_uniform_ignores_weights_and_says_so(caplog):
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities, sampling_strategy="uniform", fidelity_weights=WEIGHTS)
    assert sorted(itertools.chain(*epoch_of(sampler, 2))) == list(range(len(n_atoms)))
    assert "weights of the fidelities are not used: sampling_strategy is uniform" in caplog.text


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
    n_draws, total = n_batches * world_size * 32, Counter()
    for epoch in range(5):
        mine = [epoch_of(sampler, epoch) for sampler in ranks]
        assert [len(batches) for batches in mine] == [n_batches] * world_size
        found = draws(itertools.chain(*mine), fidelities)
        assert sum(found.values()) == n_draws
        total.update(found)
        for f, asked in ASKED.items():
            assert abs(found[f] - n_draws * asked / 2305.1) < 1.5
            assert abs(total[f] - (epoch + 1) * n_draws * asked / 2305.1) < 1.0


def test_batches_by_atoms_of_two_processes_keep_shares():
    n_atoms, fidelities = population()
    options = {"batch_size": 500, "batch_mode": "atoms", "fidelity_weights": WEIGHTS}
    alone = make(n_atoms, fidelities, batches_per_epoch=50, **options)
    ranks = [make(n_atoms, fidelities, batches_per_epoch=25, rank=r, world_size=2, **options) for r in range(2)]
    total = Counter()
    for epoch in range(5):
        mine = [epoch_of(sampler, epoch) for sampler in ranks]
        assert [len(batches) for batches in mine] == [25, 25]
        assert sorted(itertools.chain(*mine)) == sorted(epoch_of(alone, epoch))
        total.update(draws(itertools.chain(*mine), fidelities))
        for f, asked in ASKED.items():
            assert abs(total[f] - sum(total.values()) * asked / 2305.1) < 1.0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batches_per_epoch", [-1, 37])
def test_given_shares(world_size, batches_per_epoch):
    n_atoms, fidelities = population()
    ranks = [
        make(
            n_atoms,
            fidelities,
            batch_size=16,
            sampling_strategy="shares",
            fidelity_shares={0: 0.5, 1: 0.125, 2: 0.375},
            batches_per_epoch=batches_per_epoch,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    n_draws = 5553 if batches_per_epoch == -1 else 37 * 16 * world_size
    total = Counter()
    for epoch in range(8):
        found = draws(itertools.chain(*(epoch_of(sampler, epoch) for sampler in ranks)), fidelities)
        assert sum(found.values()) == n_draws
        assert all(abs(found[f] - share * n_draws) <= 1 for f, share in {0: 0.5, 1: 0.125, 2: 0.375}.items())
        total.update(found)
    assert total == {0: 4 * n_draws, 1: n_draws, 2: 3 * n_draws}


def test_a_share_of_zero_is_never_drawn_and_a_tiny_one_in_the_end():
    n_atoms, fidelities = population()
    sampler = make(
        n_atoms,
        fidelities,
        sampling_strategy="shares",
        fidelity_shares={0: 0.99995, 1: 0.00005, 2: 0.0},
        batches_per_epoch=10,
    )
    found = [draws(epoch_of(sampler, epoch), fidelities) for epoch in range(250)]
    assert sum(each[1] for each in found) == 4  # of 80 000
    assert max(each[1] for each in found) == 1
    assert not any(each[2] for each in found)


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


PARTS = st.lists(st.fractions(0, 100, max_denominator=1000), min_size=1, max_size=6).filter(any)


@given(st.integers(0, 10**6), PARTS)
def test_apportion_gives_the_exact_proportion_up_to_rounding(total, parts):
    found = apportion(total, dict(enumerate(parts)))
    assert sum(found.values()) == total
    for f, part in enumerate(parts):
        assert abs(found[f] - total * part / sum(parts)) <= Fraction(len(parts) + 1, 2)
        assert found[f] == 0 or part > 0


@given(st.integers(0, 10**6), st.integers(0, 200), PARTS)
def test_more_to_apportion_is_less_for_nobody(total, more, parts):
    first, second = (apportion(number, dict(enumerate(parts))) for number in (total, total + more))
    assert all(first[f] <= second[f] for f in first)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any), st.integers(1, 10**9))
def test_apportion_of_whole_numbers_is_exact(parts, times):
    found = apportion(times * sum(parts), {f: Fraction(part) for f, part in enumerate(parts)})
    assert list(found.values()) == [times * part for part in parts]


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


@pytest.mark.parametrize("options", [{"batch_mode": "atoms", "batch_size": 400}, {"batches_per_epoch": 3}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_order_of_draws_with_a_fixed_number_of_batches(options, world_size):
    n_atoms, fidelities = population({0: 700, 1: 70, 2: 7})
    options = {"fidelity_weights": WEIGHTS, "batches_per_epoch": 4, **options, "world_size": world_size}
    ranks = [make(n_atoms, fidelities, rank=rank, **options) for rank in range(world_size)]
    seen = np.zeros(len(n_atoms), int)
    for epoch in range(60):
        for batch in itertools.chain(*(epoch_of(sampler, epoch) for sampler in ranks)):
            np.add.at(seen, batch, 1)
        assert all(np.ptp(seen[fidelities == f]) <= 1 for f in range(3))
    assert seen.min() >= 1


def test_more_batches_than_data():
    n_atoms, fidelities = population({0: 5, 1: 1})
    sampler = make(n_atoms, fidelities, batches_per_epoch=40, sampling_strategy="balanced")
    batches = epoch_of(sampler, 0)
    assert len(batches) == 40
    assert Counter(itertools.chain(*batches)) == {**dict.fromkeys(range(5), 128), 5: 640}


def test_one_molecule():
    sampler = make(np.array([7]), np.array([0]))
    assert [epoch_of(sampler, epoch) for epoch in range(3)] == [[[0]]] * 3
    assert epoch_of(make(np.array([7]), np.array([0]), batch_mode="atoms", batches_per_epoch=2), 5) == [[0] * 4] * 2


def test_a_late_epoch_is_as_quick_as_the_first():
    n_atoms, fidelities = population({0: 200_000, 1: 7})
    sampler = make(n_atoms, fidelities, fidelity_weights={0: 0.3, 1: 1.7})
    start = time.perf_counter()
    batches = epoch_of(sampler, 10**6)
    assert time.perf_counter() - start < 2.0
    found = draws(batches, fidelities)
    assert found[0] == 60_000
    assert found[1] in (11, 12)


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


def test_setting_the_same_epoch_keeps_its_beginning():
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities)
    whole = epoch_of(sampler, 2)
    sampler.set_epoch(2, first_batch=100)
    assert epoch_of(sampler, 2) == whole[100:]
    sampler.set_epoch(2, first_batch=0)
    assert list(sampler) == whole


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
    """What cannot be divided comes in the next epoch, so that none is left out for ever."""
    n_atoms, fidelities = population({0: 3})
    ranks = [make(n_atoms, fidelities, batch_size=1, rank=rank, world_size=2) for rank in range(2)]
    assert (
        "3 draws per epoch are made 2, so that all epochs and processes have the same number of batches" in caplog.text
    )
    seen = Counter()
    for epoch in range(9):
        mine = [epoch_of(sampler, epoch) for sampler in ranks]
        assert [len(batches) for batches in mine] == [1, 1]
        seen.update(itertools.chain(*itertools.chain(*mine)))
    assert seen == {0: 6, 1: 6, 2: 6}


def test_five_molecules_for_four_processes_are_all_drawn():
    n_atoms, fidelities = population({0: 5}, low=6, high=6)
    ranks = [make(n_atoms, fidelities, rank=rank, world_size=4) for rank in range(4)]
    mine = [epoch_of(sampler, 0) for sampler in ranks]
    assert [len(batches) for batches in mine] == [1] * 4
    assert sorted(itertools.chain(*itertools.chain(*mine))) == [0, 1, 2, 3, 4]


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


@st.composite
def uneven_molecules(draw):
    """Atom counts over three orders of magnitude, and fidelities."""
    exponents = draw(st.lists(st.floats(0.0, 6.5), min_size=4, max_size=120))
    n_atoms = np.exp(exponents).astype(int)
    fidelities = np.sort(draw(st.lists(st.integers(0, 2), min_size=len(n_atoms), max_size=len(n_atoms))))
    return n_atoms, np.array(fidelities)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    uneven_molecules(),
    st.sampled_from([("molecules", 4), ("molecules", 32), ("atoms", 50), ("atoms", 700)]),
    st.sampled_from(["weighted", "balanced", "uniform"]),
    st.sampled_from([1, 2]),
    st.integers(0, 10**6),
)
def test_padding_of_very_uneven_sizes(molecules, size, strategy, world_size, epoch):
    n_atoms, fidelities = molecules
    weights = {f: w for f, w in {0: 0.7, 1: 1.5, 2: 3.0}.items() if f in fidelities} if strategy == "weighted" else None
    ranks = [
        make(
            n_atoms,
            fidelities,
            batch_mode=size[0],
            batch_size=size[1],
            sampling_strategy=strategy,
            fidelity_weights=weights,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    batches = list(itertools.chain(*(epoch_of(sampler, epoch) for sampler in ranks)))
    report = ranks[0].report()
    assert padding(batches, n_atoms) == pytest.approx(report.padding)
    for batch in batches:
        filled = len(batch) if size[0] == "molecules" else len(batch) * n_atoms[batch].max()
        assert filled <= size[1] or len(batch) == 1
    assert report.padding <= 0.1 + 1e-9


def test_too_few_batches_to_bound_the_padding_are_reported(caplog):
    n_atoms, fidelities = np.array([2] * 50 + [100] * 50), np.zeros(100, int)
    sampler = make(n_atoms, fidelities, batches_per_epoch=1)
    assert sampler.report().padding > 0.3
    assert "1 batches are too few to separate the sizes" in caplog.text


# --------------------------------------------------------------------------------------------------
# saving and restoring the position
# --------------------------------------------------------------------------------------------------

RESTORABLE = {"fidelity_weights": WEIGHTS, "fidelity_names": NAMES, "seed": 3}


@pytest.mark.parametrize("world_size", [1, 2])
def test_restored_sampler_goes_on_where_the_saved_one_stood(world_size, tmp_path):
    n_atoms, fidelities = population()
    for rank in range(world_size):
        options = {**RESTORABLE, "rank": rank, "world_size": world_size}
        sampler = make(n_atoms, fidelities, **options)
        whole = epoch_of(sampler, 4)
        torch.save(sampler.state(17), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert json.loads(json.dumps(state)) == state

        other = make(n_atoms, fidelities, **options)
        other.restore(state)
        assert len(other) == len(whole) - 17
        assert list(other) == whole[17:]
        other.set_epoch(4)  # as a trainer does at the beginning of an epoch, the interrupted one, too
        assert list(other) == whole[17:]
        assert other.state(20)["batches_done"] == 20  # counted from the beginning of the epoch
        assert epoch_of(other, 5) == epoch_of(sampler, 5)


def test_state_at_the_end_of_an_epoch_is_the_beginning_of_the_next():
    n_atoms, fidelities = population()
    sampler = make(n_atoms, fidelities, **RESTORABLE)
    sampler.set_epoch(1)
    state = sampler.state(len(sampler))
    assert (state["epoch"], state["batches_done"]) == (2, 0)
    with pytest.raises(ValueError, match="batches_done: -1 of epoch 1, which has"):
        sampler.state(-1)
    with pytest.raises(ValueError, match="batches_done: 900 of epoch 1, which has"):
        sampler.state(900)


def test_state_of_one_process_serves_the_others():
    n_atoms, fidelities = population()
    ranks = [make(n_atoms, fidelities, **RESTORABLE, rank=rank, world_size=2) for rank in range(2)]
    whole = [epoch_of(sampler, 1) for sampler in ranks]
    state = ranks[0].state(5)
    for sampler, batches in zip(ranks, whole, strict=True):
        sampler.set_epoch(7)
        sampler.restore(state)
        assert list(sampler) == batches[5:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restoring_in_the_middle_of_a_loader_that_reads_ahead(num_workers):
    """The position is the trainer's count, not what the workers have been given already."""
    dataset = MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)})

    def new_loader():
        sampler = make(dataset.n_atoms, dataset.fidelities, batch_size=30, fidelity_weights={0: 1.5}, seed=2)
        return make_loader(dataset, sampler, num_workers=num_workers)

    loader = new_loader()
    loader.batch_sampler.set_epoch(3)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = loader.batch_sampler.state(4)
    rest = list(batches)
    assert len(rest) > 6

    again = new_loader()
    again.batch_sampler.restore(state)
    assert len(again) == len(rest)
    for (x, _), (x_again, _) in zip(rest, again, strict=True):
        assert torch.equal(x["coord"], x_again["coord"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"\(seed: 3, now 4\)"),
        ({"batch_size": 64}, r"\(batch_size: 32, now 64\)"),
        ({"world_size": 2}, r"\(world_size: 1, now 2\)"),
        ({"batch_mode": "atoms", "batch_size": 500}, "batch_size: 32, now 500; batch_mode: molecules, now atoms"),
        ({"max_padding": 0.2}, "max_padding: 0.1, now 0.2"),
        ({"batches_per_epoch": 10}, "batches_per_epoch: -1, now 10"),
        ({"sampling_strategy": "balanced"}, "sampling_strategy: weighted, now balanced"),
        ({"fidelity_weights": {**WEIGHTS, 2: 8.0}}, r"\(draws of ccsd per epoch: 450.0, now 400.0\)"),
        ({"indices": np.arange(5552)}, "molecules of ccsd: 50, now 49"),
        ({"fidelity_names": {**NAMES, 1: "b97"}}, "molecules of wb97m: 503, now none; .*molecules of b97: none, now"),
    ],
)
def test_state_of_other_settings_is_refused(change, message):
    n_atoms, fidelities = population()
    state = make(n_atoms, fidelities, **RESTORABLE).state(5)
    other = make(n_atoms, fidelities, **{**RESTORABLE, **change})
    with pytest.raises(ValueError, match=f"state of the sampler: saved with other data or settings.*{message}"):
        other.restore(state)


def test_state_of_other_molecules_is_refused():
    n_atoms, fidelities = population()
    state = make(n_atoms, fidelities, **RESTORABLE).state(5)
    n_atoms[0] += 1
    with pytest.raises(ValueError, match=r"digest of the molecules' sizes and indices: .*, now "):
        make(n_atoms, fidelities, **RESTORABLE).restore(state)
    with pytest.raises(ValueError, match="state of the sampler: settings missing"):
        make(n_atoms, fidelities, **RESTORABLE).restore({"epoch": 1, "batches_done": 2})


@pytest.mark.parametrize("change", [{"epoch": -1}, {"batches_done": -3}])
def test_negative_position_is_refused(change):
    sampler = make(*population(), **RESTORABLE)
    with pytest.raises(ValueError, match="expected 0 or more"):
        sampler.restore({**sampler.state(5), **change})


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


def test_report_as_plain_objects():
    n_atoms, fidelities = population()
    shares = {0: 0.5, 1: 0.3, 2: 0.2}
    sampler = make(n_atoms, fidelities, sampling_strategy="shares", fidelity_shares=shares, fidelity_names=NAMES)
    content = json.loads(json.dumps(sampler.report().to_dict()))
    fidelities = content.pop("fidelities")
    assert content == {
        "strategy": "shares",
        "epoch": 0,
        "batches": len(sampler),
        "molecules_per_batch": 5553 / len(sampler),
        "padding": pytest.approx(padding(list(sampler), n_atoms)),
    }
    assert list(fidelities) == ["gfn2", "wb97m", "ccsd"]
    assert fidelities["ccsd"] == {
        "molecules": 50,
        "draws": 1111,
        "asked_share": 0.2,
        "realised_share": 1111 / 5553,
        "effective_epochs": 1111 / 50,
    }
    assert "\n  ccsd: 1111 draws of 50 molecules (each 22.2 times), share 20.01 %, asked for 20.00 %" in str(
        sampler.report()
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {2: 1.0},
            r"data.fidelity_weights: fidelity 2 has no dataset \(those with one: gfn2, wb97m\). Add a dataset",
        ),
        ({1: -0.5}, "data.fidelity_weights: wb97m has the weight -0.5"),
        ({1: float("nan")}, "wb97m has the weight nan"),
        ({0: float("inf")}, "gfn2 has the weight inf"),
        ({0: 0.0, 1: 0.0}, r"all weights are zero \(gfn2, wb97m\)"),
    ],
)
def test_weights_that_are_refused(weights, message):
    n_atoms, fidelities = population({0: 10, 1: 5})
    with pytest.raises(ValueError, match=message):
        make(n_atoms, fidelities, fidelity_weights=weights, fidelity_names=NAMES)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (None, "shares: no share for gfn2, wb97m; those given sum to 0. Give every fidelity a share"),
        ({0: 0.6}, "shares: no share for wb97m; those given sum to 0.6"),
        ({0: 0.6, 1: 0.3}, "shares: the shares sum to 0.9, expected 1"),
        ({0: 0.6, 1: 0.40001}, "the shares sum to 1.00001, expected 1"),
        ({0: 1.5, 1: -0.5}, "gfn2 has the share 1.5, expected a number from 0 to 1"),
        ({0: float("nan"), 1: 0.5}, "gfn2 has the share nan"),
        ({0: 0.5, 1: 0.25, 2: 0.25}, r"fidelity 2 has no dataset \(those with one: gfn2, wb97m\)"),
    ],
)
def test_shares_that_are_refused(shares, message):
    n_atoms, fidelities = population({0: 10, 1: 5})
    with pytest.raises(ValueError, match=message):
        make(n_atoms, fidelities, sampling_strategy="shares", fidelity_shares=shares, fidelity_names=NAMES)


def test_share_of_a_fidelity_without_training_molecules():
    n_atoms, fidelities = population({0: 10, 1: 5})
    options = {"indices": np.arange(10), "sampling_strategy": "shares", "fidelity_names": NAMES}
    with pytest.raises(ValueError, match=r"wb97m has the share 0.5, but no molecules to draw from"):
        make(n_atoms, fidelities, fidelity_shares={0: 0.5, 1: 0.5}, **options)
    assert sorted(itertools.chain(*make(n_atoms, fidelities, fidelity_shares={0: 1.0, 1: 0.0}, **options))) == [
        *range(10)
    ]


def test_shares_contradict_other_strategies():
    n_atoms, fidelities = population({0: 10, 1: 5})
    with pytest.raises(ValueError, match=r"shares: given, but sampling_strategy is weighted"):
        make(n_atoms, fidelities, fidelity_shares={0: 0.5, 1: 0.5})
    in_order = make(n_atoms, fidelities, fidelity_shares={0: 0.5, 1: 0.5}, shuffle=False)
    assert draws(in_order, fidelities) == {0: 10, 1: 5}


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
    next(iter(make(n_atoms, fidelities, batch_size=64, fidelity_weights={0: 10.0})))
    assert time.perf_counter() - start < 10.0  # half a second on a free core


def test_an_epoch_takes_forty_bytes_per_molecule():
    n_atoms, fidelities = population({0: 4_000, 1: 396_000}, low=5, high=60)
    n_atoms, fidelities = n_atoms.astype(np.int32), fidelities.astype(np.int16)
    tracemalloc.start()
    try:
        next(iter(make(n_atoms, fidelities, batch_size=64, fidelity_weights={0: 10.0})))
        assert tracemalloc.get_traced_memory()[1] < 40 * len(n_atoms)
    finally:
        tracemalloc.stop()
