"""Sums, samples and worst molecules of streams of errors."""

import numpy as np
import pytest

from aimnet2mult.evaluation.statistics import (
    SIZE_LIMITS,
    Molecules,
    PropertyErrors,
    Sample,
    count_elements,
    size_range,
    size_ranges,
    total,
)


def stream(rng, atomic, n_chunks=30):
    """Random molecules of one size per chunk, with labels and predictions; (molecules, label, predicted)."""
    first = 0
    for _ in range(n_chunks):
        k, n = rng.integers(1, 6), rng.integers(1, 40)
        shape = (k, n, 3) if atomic else (k,)
        molecules = Molecules(np.arange(first, first + k), rng.choice([1, 6, 8], (k, n)), np.zeros(k))
        yield molecules, rng.normal(size=shape), rng.normal(size=shape)
        first += k


@pytest.mark.parametrize("atomic", [False, True])
def test_sums_are_those_of_numpy_whichever_way_the_values_are_divided(atomic):
    chunks = list(stream(np.random.default_rng(1), atomic))
    errors = PropertyErrors(atomic, np.random.default_rng(0))
    for chunk in chunks:
        errors.add(*chunk)
    every = np.concatenate([(predicted - label).ravel() for _, label, predicted in chunks])
    for sums in (errors.total, total(size_ranges(errors.by_size)), total(errors.by_n_elements)):
        assert sums.count == every.size
        assert sums.mae == pytest.approx(np.abs(every).mean(), rel=1e-12)
        assert sums.rmse == pytest.approx(np.sqrt((every**2).mean()), rel=1e-12)
        assert sums.largest == np.abs(every).max()
    assert errors.molecules == sum(len(molecules.numbers) for molecules, *_ in chunks)
    if not atomic:
        assert not errors.by_element
        return
    oxygen = np.concatenate([(p - y)[molecules.numbers == 8].ravel() for molecules, y, p in chunks])
    assert total(errors.by_element).count == every.size
    assert errors.by_element[8].count == oxygen.size
    assert errors.by_element[8].mae == pytest.approx(np.abs(oxygen).mean(), rel=1e-12)


def test_ranges_of_sizes_follow_each_other():
    names = [size_range(n) for n in range(1, SIZE_LIMITS[-1] + 2)]
    assert names[:6] == ["1–5"] * 5 + ["6–10"]
    assert names[-2:] == ["101–200", "201 or more"]
    assert len(set(names)) == len(SIZE_LIMITS) + 1


def test_elements_of_molecules_are_counted():
    assert count_elements(np.array([[8, 1, 1, 6], [1, 1, 1, 1], [6, 1, 6, 1]])).tolist() == [3, 1, 2]


@pytest.mark.parametrize("atomic", [False, True])
def test_worst_molecules_are_those_of_a_full_sort(atomic):
    chunks = list(stream(np.random.default_rng(2), atomic, 60))
    errors = PropertyErrors(atomic, np.random.default_rng(0))
    for chunk in chunks:
        errors.add(*chunk)
    largest = np.concatenate([np.abs(p - y).reshape(len(y), -1).max(1) for _, y, p in chunks])
    found = errors.worst.sorted()
    assert [outlier.index for outlier in found] == np.argsort(-largest)[: len(found)].tolist()
    for outlier in found:
        assert abs(outlier.error) == pytest.approx(largest[outlier.index])
    if atomic:
        molecules, label, predicted = next(c for c in chunks if found[0].index in c[0].indices)
        row = found[0].index - molecules.indices[0]
        assert np.abs(predicted - label)[row, found[0].atom].max() == pytest.approx(abs(found[0].error))
        assert found[0].numbers == tuple(molecules.numbers[row])


def test_of_equally_wrong_molecules_the_first_are_kept():
    errors = PropertyErrors(False, np.random.default_rng(0))
    for first in (0, 50):
        molecules = Molecules(np.arange(first, first + 50), np.full((50, 2), 6), np.zeros(50))
        errors.add(molecules, np.zeros(50), np.ones(50))
    assert [outlier.index for outlier in errors.worst.sorted()] == list(range(20))


def test_missing_labels_count_nowhere_and_predictions_that_are_no_numbers_only_among_the_worst():
    errors = PropertyErrors(True, np.random.default_rng(0))
    label, predicted = np.zeros((3, 2, 3)), np.ones((3, 2, 3))
    label[0, 1, 2], predicted[1, 0, 0] = np.nan, np.inf
    errors.add(Molecules(np.arange(3), np.array([[1, 8]] * 3), np.zeros(3)), label, predicted)
    assert (errors.molecules, errors.not_finite) == (2, 1)
    assert (errors.total.count, errors.total.mae, errors.sample.seen) == (6, 1.0, 6)
    assert [outlier.index for outlier in errors.worst.sorted()] == [1, 2]


def test_sample_is_everything_while_it_is_little_and_uniform_when_it_is_much():
    few = Sample(100, np.random.default_rng(0))
    few.add(np.arange(60.0), -np.arange(60.0))
    assert sorted(few.label) == list(range(60))
    assert (few.label == -few.predicted).all()

    much = Sample(2000, np.random.default_rng(0))
    for first in range(0, 50_000, 500):
        values = np.arange(first, first + 500.0)
        much.add(values, values + 1)
    assert (len(much.label), much.seen) == (2000, 50_000)
    assert len(set(much.label)) == 2000
    assert (much.predicted == much.label + 1).all()
    # Each tenth of the stream gives 200 of them, with a standard deviation of 13.
    assert np.abs(np.histogram(much.label, 10, (0, 50_000))[0] - 200).max() < 60
