"""Equivalent numbers of labels on curves whose answer is known."""

import math

import numpy as np
import pytest

from aimnet2mult.study.equivalents import Equivalent, count_at, equivalent, equivalent_text

COUNTS = [10, 30, 100, 300, 1000]


def law(count):
    """A learning curve: error 2 eV at 10 labels, falling with the square root of their number."""
    return 2.0 * math.sqrt(10.0 / count)


@pytest.mark.parametrize("count", [10, 17, 100, 452.3, 1000])
def test_a_power_law_is_inverted_exactly(count):
    errors = np.array([law(n) for n in COUNTS])
    assert count_at(np.array(COUNTS, float), errors, law(count)) == pytest.approx(count, rel=1e-9)


def test_beyond_the_curve():
    curve = {n: [law(n)] for n in COUNTS}
    better, worse = equivalent(curve, [0.5 * law(1000)]), equivalent(curve, [3.0])
    assert equivalent_text(better, COUNTS) == "≥ 1000"
    assert equivalent_text(worse, COUNTS) == "≤ 10"
    assert math.isnan(better.low)


def test_a_rise_of_the_curve_does_not_count():
    """At 100 labels the error is by chance larger than at 30: the curve goes straight from 30 to 1000."""
    counts, errors = np.array([10.0, 30.0, 100.0, 1000.0]), np.array([2.0, 1.0, 1.2, 0.5])
    expected = math.exp(np.interp(-math.log(0.8), -np.log([1.0, 0.5]), np.log([30.0, 1000.0])))
    assert count_at(counts, errors, 0.8) == pytest.approx(expected)
    assert count_at(counts, errors, 1.0) == pytest.approx(30.0)
    assert count_at(counts, np.array([2.0, 1.0, 0.5, 0.6]), 0.4) == math.inf


def test_the_uncertainty_is_that_of_the_replicates():
    """Errors that scatter by 10 % on a square-root law are 20 % in the count; exact ones have no uncertainty."""
    rng = np.random.default_rng(1)
    exact = {n: [law(n)] * 8 for n in COUNTS}
    certain = equivalent(exact, [law(100)] * 8)
    assert certain == pytest.approx((100, 100, 100))
    assert equivalent_text(certain, COUNTS) == "100"
    scattered = [law(100) * math.exp(0.1 * z) for z in rng.permutation(np.linspace(-1.5, 1.5, 8))]
    found = equivalent(exact, scattered)
    half_width = 0.2 * np.std(np.linspace(-1.5, 1.5, 8)) / math.sqrt(8)
    assert math.log(found.high / found.low) == pytest.approx(2 * half_width, rel=0.2)
    assert found.low < found.number < found.high


def test_text_of_limits():
    assert equivalent_text(Equivalent(120.4, 90.0, math.inf), COUNTS) == "120 (90 to ≥ 1000)"
    assert equivalent_text(Equivalent(0.0, 0.0, 0.0), COUNTS) == "≤ 10"


def test_the_same_every_time():
    curve = {n: [law(n), 1.1 * law(n), 0.9 * law(n)] for n in COUNTS}
    assert equivalent(curve, [0.5, 0.6]) == equivalent(curve, [0.5, 0.6])
