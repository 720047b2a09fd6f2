"""Picture of learning curves. Needs matplotlib."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from aimnet2mult.evaluation.pictures import DPI
from aimnet2mult.study.results import QUANTITIES, Row, curves
from aimnet2mult.study.settings import ReferenceLineConfig

MARKERS = "osD^vP*X"


def learning_curves(rows: Sequence[Row], lines: Mapping[str, ReferenceLineConfig]) -> dict[str, bytes]:
    """Test errors against the number of target structures, mean and standard deviation: format -> file.

    Parameters
    ----------
    rows : sequence of Row
        The results.
    lines : mapping of str to ReferenceLineConfig
        Errors shown as horizontal lines.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    protocols = list(dict.fromkeys(row.protocol for row in rows))
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    axes = figure.subplots(1, len(QUANTITIES))
    for axis, (quantity, unit) in zip(axes, QUANTITIES.items(), strict=True):
        for protocol, points in curves(rows, quantity).items():
            i = protocols.index(protocol)
            counts = sorted(points)
            means = [np.mean(points[count]) for count in counts]
            spreads = [np.std(points[count], ddof=1) if len(points[count]) > 1 else 0.0 for count in counts]
            style = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "label": protocol}
            axis.errorbar(counts, means, yerr=spreads, markersize=4, linewidth=1.2, capsize=2, **style)
        for i, (name, line) in enumerate(lines.items()):
            value = getattr(line, f"{quantity}_mae")
            if value is not None:
                axis.axhline(value, color="0.4", linestyle=("--", ":", "-.")[i % 3], linewidth=1.0, label=name)
        axis.set(xscale="log", yscale="log")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter(NullFormatter())
        axis.set_title(f"{quantity}, test molecules", fontsize=9)
        axis.set_xlabel("structures of the target in training", fontsize=8)
        axis.set_ylabel(f"MAE, {unit}", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return {kind: _saved(figure, kind) for kind in ("png", "svg")}


def _saved(figure: object, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI)  # type: ignore[attr-defined]
    return buffer.getvalue()
