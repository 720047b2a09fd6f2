"""What a study has found: a row for each point, and tables of means and spreads."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from aimnet2mult.evaluation.tables import number
from aimnet2mult.study.equivalents import equivalent, equivalent_text
from aimnet2mult.study.jobs import StudyError, Workshop
from aimnet2mult.study.plan import Plan, Point
from aimnet2mult.study.settings import PRETRAINED, TARGET_ONLY

QUANTITIES = {"energy": "eV", "forces": "eV/Å"}
"""What is shown, and its unit."""


@dataclass(frozen=True)
class Row:
    """Result of a point; errors in eV and eV/Å, NaN where there are no labels.

    Attributes
    ----------
    protocol : str
        Name of the protocol.
    fraction : float
        Share of the molecules of the pool.
    structures, molecules : int
        Labels of the target that were trained on, and the molecules they are of.
    replicate, subset, seed : int
        Number of the replicate, its order of the molecules and its seed.
    learning_rate : float
        That of the training after pretraining.
    steps : int
        Optimiser steps in all, pretraining included.
    seconds, cpu_seconds : float
        Time of the training on the clock and on all cores, pretraining included.
    validation_score : float
        What learning rates were chosen by.
    energy_mae, energy_rmse, forces_mae, forces_rmse : float
        Errors on the test molecules.
    """

    protocol: str
    fraction: float
    structures: int
    molecules: int
    replicate: int
    subset: int
    seed: int
    learning_rate: float
    steps: int
    seconds: float
    cpu_seconds: float
    validation_score: float
    energy_mae: float
    energy_rmse: float
    forces_mae: float
    forces_rmse: float


def collect(plan: Plan, workshop: Workshop) -> tuple[list[Row], list[Point]]:
    """Read the results of all points that are done with the settings as they are; the others are returned, too."""
    rows, lacking = [], []
    for point in plan.points:
        try:
            commands = (plan.training(point), plan.validation(point), plan.test(point))
            done = all(workshop.is_done(command) for command in commands)
        except StudyError:
            done = False
        if done:
            rows.append(_row(plan, workshop, point))
        else:
            lacking.append(point)
    order = {protocol: i for i, protocol in enumerate(plan.study.protocols)}
    return sorted(rows, key=lambda row: (order[row.protocol], row.fraction, row.replicate)), lacking


def _row(plan: Plan, workshop: Workshop, point: Point) -> Row:
    subset, errors = plan.subset(point), plan.errors(plan.test(point).folder)
    states = [workshop.state(plan.training(point).folder)]
    if plan.study.kind(point.protocol) in PRETRAINED:
        states.append(workshop.state(plan.pretraining(point.protocol, point.seed).folder))
    values = {
        f"{key}_{name}": errors.get(key, {}).get(name, math.nan) for key in QUANTITIES for name in ("mae", "rmse")
    }
    return Row(
        protocol=point.protocol,
        fraction=point.fraction,
        structures=subset.structures,
        molecules=subset.molecules,
        replicate=point.replicate,
        subset=point.order,
        seed=point.seed,
        learning_rate=plan.rate(point),
        steps=plan.study.steps,
        seconds=round(sum(state["seconds"] for state in states), 1),
        cpu_seconds=round(sum(state["cpu_seconds"] for state in states), 1),
        validation_score=plan.score(plan.errors(plan.validation(point).folder)),
        **values,
    )


def csv_text(rows: Sequence[Row]) -> str:
    """All points as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def curves(rows: Sequence[Row], quantity: str) -> dict[str, dict[int, list[float]]]:
    """Errors of each protocol: protocol -> number of target structures (mean over replicates) -> MAE of replicates.

    Fractions with the same number count as one.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for points in grouped(rows).values():
        errors = mean_absolute_errors(points, quantity)
        if errors:
            found.setdefault(points[0].protocol, {}).setdefault(mean_structures(points), []).extend(errors)
    return found


def mean_absolute_errors(points: Sequence[Row], quantity: str) -> list[float]:
    """MAE of replicates; none if one of them has no labels."""
    errors = [getattr(row, f"{quantity}_mae") for row in points]
    return [] if any(map(math.isnan, errors)) else errors


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """Rows of each protocol and fraction."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.protocol, row.fraction), []).append(row)
    return groups


def mean_structures(points: Sequence[Row]) -> int:
    """Number of target structures, the mean over replicates."""
    return round(float(np.mean([row.structures for row in points])))


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation: ``0.4312 ± 0.021``; without the latter for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return number(mean)
    spread = float(np.std(values, ddof=1))
    digits = 0 if spread == 0 or not math.isfinite(spread) else max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if spread else number(mean)


def markdown_table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def error_table(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over replicates of each protocol and fraction, in Markdown."""
    body = []
    for (protocol, fraction), points in grouped(rows).items():
        cells: list[object] = [protocol, f"{100 * fraction:g} %", mean_structures(points), len(points)]
        for quantity in QUANTITIES:
            for name in ("mae", "rmse"):
                cells.append(mean_and_spread([getattr(row, f"{quantity}_{name}") for row in points]))
        body.append(cells)
    errors = [f"{quantity} {name}, {unit}" for quantity, unit in QUANTITIES.items() for name in ("MAE", "RMSE")]
    return markdown_table(["protocol", "fraction", "target structures", "replicates", *errors], body)


def equivalent_table(rows: Sequence[Row], kind: Callable[[str], str]) -> str:
    """Equivalent numbers of target structures of each protocol and fraction, in Markdown; empty without target only.

    Parameters
    ----------
    rows : sequence of Row
        The results.
    kind : callable
        Kind of a protocol; the first one that trains on the target alone is what is compared with.
    """
    alone = next((row.protocol for row in rows if kind(row.protocol) == TARGET_ONLY), None)
    if alone is None:
        return ""
    by_quantity: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]] = {q: curves(rows, q) for q in QUANTITIES}
    body = []
    for (protocol, fraction), points in grouped(rows).items():
        if protocol == alone:
            continue
        cells: list[object] = [protocol, f"{100 * fraction:g} %", mean_structures(points)]
        for quantity, found in by_quantity.items():
            errors = mean_absolute_errors(points, quantity)
            cells.append(_equivalent_cell(found[alone], errors) if alone in found and errors else "")
        body.append(cells)
    head = ["protocol", "fraction", "target structures", *(f"equivalent by {quantity} MAE" for quantity in QUANTITIES)]
    return markdown_table(head, body)


def _equivalent_cell(curve: Mapping[int, Sequence[float]], errors: Sequence[float]) -> str:
    return equivalent_text(equivalent(curve, errors), list(curve))
