"""How many labels of the target alone would give the error that another protocol has.

The errors of the target alone against the number of its labels are interpolated on logarithmic scales between the
means of their replicates, where a mean that is not below that of fewer labels does not count, so that the curve falls.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000
"""Resamplings of the replicates."""

QUANTILES = (0.16, 0.84)
"""Limits of the uncertainty: that of one standard deviation, were it a normal distribution."""


class Equivalent(NamedTuple):
    """Number of target labels that would give the same error, and its uncertainty.

    A number is infinite where the error is below the whole curve, and zero where it is above. The limits are NaN where
    there are too few replicates to tell.
    """

    number: float
    low: float
    high: float


def equivalent(curve: Mapping[int, Sequence[float]], errors: Sequence[float], seed: int = 0) -> Equivalent:
    """Compare the errors of a protocol with the learning curve of the target alone.

    Parameters
    ----------
    curve : mapping of int to sequence of float
        Number of labels -> errors of the replicates of the target alone.
    errors : sequence of float
        Errors of the replicates of the protocol.
    seed : int
        Seed of the resampling: replicates are drawn with replacement, at each point by itself.
    """
    counts = np.array(sorted(curve), float)
    means = np.array([np.mean(curve[int(count)]) for count in counts])
    best = count_at(counts, means, float(np.mean(errors)))
    if len(errors) < 2 or not any(len(values) > 1 for values in curve.values()):
        return Equivalent(best, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    drawn_means = np.stack([_drawn_means(curve[int(count)], rng) for count in counts])
    drawn_errors = _drawn_means(errors, rng)
    drawn = [count_at(counts, column, error) for column, error in zip(drawn_means.T, drawn_errors, strict=True)]
    # Without interpolation between them: some may be infinite.
    low, high = np.quantile(drawn, QUANTILES, method="nearest")
    return Equivalent(best, float(low), float(high))


def _drawn_means(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Means of resampled values, (DRAWS,)."""
    return np.asarray(np.asarray(values)[rng.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1))


def count_at(counts: np.ndarray, errors: np.ndarray, error: float) -> float:
    """Return at which count a curve has an error: (k,) ascending, (k,) positive; infinite below it, zero above it."""
    least = np.minimum.accumulate(errors)
    falls = np.concatenate([[True], errors[1:] < least[:-1]])
    x, y = np.log(counts[falls]), np.log(errors[falls])
    if math.log(error) > y[0]:
        return 0.0
    if math.log(error) < y[-1]:
        return math.inf
    return float(np.exp(np.interp(math.log(error), y[::-1], x[::-1])))


def equivalent_text(found: Equivalent, counts: Sequence[int]) -> str:
    """Return an equivalent count for people: ``120 (90 to 160)``, ``≥ 900``."""
    text = count_text(found.number, counts)
    if math.isnan(found.low):
        return text
    low, high = (count_text(value, counts) for value in (found.low, found.high))
    return f"{text} ({low} to {high})" if low != high else text


def count_text(count: float, counts: Sequence[int]) -> str:
    """Return a count, or the limit that it is beyond."""
    if math.isinf(count):
        return f"≥ {max(counts)}"
    return f"{count:.0f}" if count else f"≤ {min(counts)}"
