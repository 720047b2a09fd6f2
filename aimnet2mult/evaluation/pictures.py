"""Pictures of a report: parity plots, histograms of errors, learning curves. Needs matplotlib."""

import importlib.util
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from aimnet2mult.evaluation.compare import Comparison, headings
from aimnet2mult.evaluation.history import ALL, Panel
from aimnet2mult.evaluation.properties import ENERGY_PER_ATOM, PROPERTIES, Units
from aimnet2mult.evaluation.statistics import PropertyErrors
from aimnet2mult.evaluation.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120

HISTOGRAM_BINS = 61
"""Odd, so that one bin is centred at zero."""

SHOWN_SHARE = 0.995
"""Share of the errors within the range of a histogram; the rest is counted in its title."""

TITLE_WIDTH = 36
"""Characters in a line above a picture."""

CURVES_PER_ROW = 3

LOG_RATIO = 3.0
"""Learning curves whose values differ by more than this factor have a logarithmic axis."""


def available() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def parity_plots(comparisons: Sequence[Comparison], units: Units) -> bytes:
    """Predictions against labels as PNG: a row per comparison, a column per property."""
    return _grid(comparisons, [key for key in PROPERTIES if key != ENERGY_PER_ATOM], units, _parity)


def error_histograms(comparisons: Sequence[Comparison], units: Units) -> bytes:
    """Distributions of the signed errors as PNG: a row per comparison, a column per property."""
    return _grid(comparisons, list(PROPERTIES), units, _histogram)


def _grid(
    comparisons: Sequence[Comparison],
    keys: list[str],
    units: Units,
    draw: Callable[["Axes", str, PropertyErrors, Units, str], None],
) -> bytes:
    from matplotlib.figure import Figure

    columns = [key for key in keys if any(key in c.errors for c in comparisons)]
    figure = Figure(figsize=(3.1 * len(columns), 2.9 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), len(columns), squeeze=False)
    for i, (row, comparison, title) in enumerate(zip(axes, comparisons, headings(comparisons), strict=True)):
        for axis, key in zip(row, columns, strict=True):
            if key in comparison.errors and comparison.errors[key].sample.seen:
                axis.set_title(f"{_wrapped(title)}: {PROPERTIES[key].title}", fontsize=9)
                axis.tick_params(labelsize=7, which="both")
                draw(axis, key, comparison.errors[key], units, f"C{i % 10}")
            else:
                axis.axis("off")
                text = f"{_wrapped(title)}:\nno {PROPERTIES[key].title}"
                axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=8)
    return _png(figure)


def _wrapped(title: str) -> str:
    return textwrap.fill(title.replace("$", r"\$"), TITLE_WIDTH)  # a dollar sign would begin a formula


def _parity(axis: "Axes", key: str, errors: PropertyErrors, units: Units, color: str) -> None:
    factor, unit = units.factor(key), units.name(key)
    label, predicted = errors.sample.label * factor, errors.sample.predicted * factor
    low, high = min(label.min(), predicted.min()), max(label.max(), predicted.max())
    axis.plot([low, high], [low, high], "-", color="0.6", linewidth=0.8, zorder=1)
    axis.plot(label, predicted, ".", color=color, markersize=2, alpha=0.35, rasterized=True)
    margin = 0.05 * (high - low) or 1.0
    axis.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
    axis.set_xlabel(f"label: {PROPERTIES[key].axis}, {unit}", fontsize=8)
    axis.set_ylabel(f"predicted, {unit}", fontsize=8)
    total = errors.total
    text = f"MAE {number(factor * total.mae)}\nRMSE {number(factor * total.rmse)} {unit}"
    axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=7)


def _histogram(axis: "Axes", key: str, errors: PropertyErrors, units: Units, color: str) -> None:
    error = (errors.sample.predicted - errors.sample.label) * units.factor(key)
    limit = float(np.quantile(np.abs(error), SHOWN_SHARE)) or 1.0
    inside = error[np.abs(error) <= limit]
    axis.locator_params(axis="x", nbins=5)
    axis.hist(inside, bins=HISTOGRAM_BINS, range=(-limit, limit), color=color, alpha=0.8, log=True)
    axis.axvline(0.0, color="0.3", linewidth=0.8)
    axis.set_xlabel(f"predicted − label, {units.name(key)}", fontsize=8)
    axis.set_ylabel("values", fontsize=8)
    beyond = len(error) - len(inside)
    decimals = max(0, 3 - math.floor(math.log10(limit)))
    mean = f"mean {round(float(error.mean()), decimals) + 0.0:.{decimals}f}"  # + 0.0 makes -0 a 0
    text = f"{mean}\n{beyond} of {len(error)} beyond" if beyond else mean
    axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=7)


def curve_plots(panels: Sequence[Panel]) -> bytes:
    """Learning curves as PNG; a fidelity has one colour in all panels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    n_columns = min(len(panels), CURVES_PER_ROW)
    n_rows = math.ceil(len(panels) / n_columns)
    figure = Figure(figsize=(4.0 * n_columns, 2.9 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    fidelities = list(dict.fromkeys(name for panel in panels if panel.unit for name in panel.curves if name != ALL))
    for axis, panel in zip(axes[: len(panels)], panels, strict=True):
        for i, (name, points) in enumerate(panel.curves.items()):
            if not points:
                continue
            color = f"C{fidelities.index(name) % 10}" if name in fidelities else ("k", "0.6")[i % 2]
            style = "--" if name == ALL else "-"
            marker = "." if len(points) < 30 else ""
            axis.plot(*zip(*points, strict=True), style, color=color, marker=marker, label=name, linewidth=1.2)
        values = [value for points in panel.curves.values() for _, value in points]
        if values and 0 < LOG_RATIO * min(values) < max(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel("iteration", fontsize=8)
        axis.set_ylabel(panel.unit or "loss", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3)
        if any(panel.curves.values()):
            axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    return _png(figure)
