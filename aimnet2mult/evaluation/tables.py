"""The numbers of a report as rows, JSON, CSV and Markdown."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aimnet2mult.constants import ELEMENT_SYMBOLS
from aimnet2mult.evaluation.compare import Comparison, WorstMolecule, headings
from aimnet2mult.evaluation.differences import Difference, numbers
from aimnet2mult.evaluation.properties import PROPERTIES, Units
from aimnet2mult.evaluation.statistics import PropertyErrors, Sums, size_ranges

FORMAT_VERSION = 1
"""Version of ``errors.json``."""

SHOWN_WORST = 5
"""Worst molecules of each property in Markdown; JSON and the page have all."""


@dataclass(frozen=True)
class Row:
    """Errors of one property over some of the values, in the units of the report.

    Attributes
    ----------
    key : str
        Key of `PROPERTIES`.
    unit : str
        Unit of the errors.
    part : str
        Which values: a range of sizes, a number of different elements, an element; empty for all.
    mae, rmse, largest : float
        The errors.
    count : int
        Number of values.
    """

    key: str
    unit: str
    part: str
    mae: float
    rmse: float
    largest: float
    count: int

    @property
    def title(self) -> str:
        """Name of the property."""
        return PROPERTIES[self.key].title


class Breakdown(NamedTuple):
    """A way to divide the values.

    Attributes
    ----------
    key
        Its name in JSON and CSV.
    title
        Heading of the table.
    column
        Heading of the column that names the parts.
    parts
        Errors of a property -> sums of each part.
    """

    key: str
    title: str
    column: str
    parts: Callable[[PropertyErrors], Mapping[str, Sums]]


OVERALL = Breakdown("all", "All molecules", "", lambda errors: {"": errors.total} if errors.by_size else {})

BREAKDOWNS = (
    Breakdown("atoms", "By number of atoms", "atoms in the molecule", lambda errors: size_ranges(errors.by_size)),
    Breakdown(
        "n_elements",
        "By number of different elements",
        "elements in the molecule",
        lambda errors: {str(n): sums for n, sums in sorted(errors.by_n_elements.items())},
    ),
    Breakdown(
        "element",
        "By element",
        "element of the atom",
        lambda errors: {ELEMENT_SYMBOLS[z]: sums for z, sums in sorted(errors.by_element.items())},
    ),
)
"""How errors are divided. The last one concerns atomic properties only."""


def rows(comparison: Comparison, breakdown: Breakdown, units: Units) -> Iterator[Row]:
    """Errors of a comparison, property after property."""
    for key, errors in comparison.errors.items():
        factor = units.factor(key)
        for part, sums in breakdown.parts(errors).items():
            values = (factor * sums.mae, factor * sums.rmse, factor * sums.largest)
            yield Row(key, units.name(key), part, *values, sums.count)


def number(value: float) -> str:
    """Four significant digits, without an exponent where the number is of ordinary size."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent <= 8:
        return f"{value:.3e}"
    return f"{value:.{max(0, 3 - exponent)}f}"


# --------------------------------------------------------------------------------------------------
# JSON and CSV
# --------------------------------------------------------------------------------------------------


def json_text(
    comparisons: Sequence[Comparison], units: Units, about: Mapping[str, Any], differences: Sequence[Difference] = ()
) -> str:
    """Everything as JSON, numbers in the units of the report; NaN and infinity are null."""
    factors = {key: units.factor(key) for key in PROPERTIES}
    content = {
        "format_version": FORMAT_VERSION,
        "about": dict(about),
        "units": {key: units.name(key) for key in PROPERTIES},
        "comparisons": [_plain(comparison, units) for comparison in comparisons],
        "differences": [
            {
                "model": d.model,
                "data": d.data,
                "fidelity": d.fidelity,
                "reference": d.reference,
                "molecules": d.molecules,
                **numbers(d, factors),
            }
            for d in differences
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(comparison: Comparison, units: Units) -> dict[str, Any]:
    content: dict[str, Any] = {
        "model": comparison.model,
        "fidelity": comparison.fidelity,
        "fidelity_name": comparison.name,
        "data": comparison.data,
        "molecules": comparison.molecules,
        "molecules_available": comparison.available,
        "notes": comparison.notes,
        "errors": {row.key: _numbers(row) for row in rows(comparison, OVERALL, units)},
    }
    for breakdown in BREAKDOWNS:
        table: dict[str, dict[str, Any]] = {}
        for row in rows(comparison, breakdown, units):
            table.setdefault(row.key, {})[row.part] = _numbers(row)
        content[f"by_{breakdown.key}"] = table
    content["not_finite"] = {key: errors.not_finite for key, errors in comparison.errors.items()}
    content["worst"] = {
        key: [_plain_molecule(molecule, units.factor(key)) for molecule in molecules]
        for key, molecules in comparison.worst.items()
    }
    return content


def _numbers(row: Row) -> dict[str, Any]:
    return {"unit": row.unit, "mae": row.mae, "rmse": row.rmse, "max": row.largest, "count": row.count}


def _plain_molecule(molecule: WorstMolecule, factor: float) -> dict[str, Any]:
    outlier, place = molecule.outlier, molecule.place
    return {
        "error": _finite(factor * outlier.error),
        "label": _finite(factor * outlier.label),
        "predicted": _finite(factor * outlier.predicted),
        "formula": molecule.formula,
        "charge": outlier.charge,
        "atoms": len(outlier.numbers),
        "atom": outlier.atom,
        "index": outlier.index,
        "file": place.file,
        "group": place.group,
        "row": place.row,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def csv_text(comparisons: Sequence[Comparison], units: Units) -> str:
    """All errors as one CSV table; ``by`` and ``part`` say over which values a row goes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["model", "fidelity", "fidelity_name", "data", "property", "unit", "by", "part", "mae", "rmse", "max", "count"]
    )
    for comparison in comparisons:
        head = [comparison.model, comparison.fidelity, comparison.name or "", comparison.data]
        for breakdown in (OVERALL, *BREAKDOWNS):
            for row in rows(comparison, breakdown, units):
                tail = [breakdown.key, row.part, row.mae, row.rmse, row.largest, row.count]
                writer.writerow([*head, row.key, row.unit, *tail])
    return text.getvalue()


# --------------------------------------------------------------------------------------------------
# Markdown
# --------------------------------------------------------------------------------------------------


def markdown_summary(comparisons: Sequence[Comparison], units: Units) -> str:
    """Errors of all comparisons as one Markdown table, and the notes below it."""
    lines = _markdown_table(
        ["model", "fidelity", "data", "property", "unit", "MAE", "RMSE", "largest", "values"],
        (
            [c.model, c.title, c.data, row.title, row.unit, *_cells(row)]
            for c in comparisons
            for row in rows(c, OVERALL, units)
        ),
    )
    notes = [f"- {note}" for note in all_notes(comparisons)]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


DIFFERENCES = "Differences between fidelities"

DIFFERENCES_HEAD = ("model", "data", "fidelities", "molecules", "property", "unit", "mean", "standard deviation")


def difference_cells(differences: Sequence[Difference], units: Units) -> list[list[str]]:
    """Rows of the table of `DIFFERENCES_HEAD` as text."""
    return [
        [
            *(d.model, d.data, d.title, str(d.molecules), PROPERTIES[key].axis, units.name(key)),
            *(number(units.factor(key) * value) if moments.count else "-" for value in (moments.mean, moments.std)),
        ]
        for d in differences
        for key, moments in d.moments.items()
    ]


def markdown_differences(differences: Sequence[Difference], units: Units) -> str:
    """Differences between fidelities as a Markdown table."""
    return "\n".join(_markdown_table(DIFFERENCES_HEAD, difference_cells(differences, units))) + "\n"


def markdown_text(comparisons: Sequence[Comparison], units: Units, differences: Sequence[Difference] = ()) -> str:
    """Everything as Markdown."""
    parts = ["# Errors of models", markdown_summary(comparisons, units)]
    if differences:
        parts += [f"## {DIFFERENCES}", markdown_differences(differences, units)]
    for breakdown in BREAKDOWNS:
        body = [
            [heading, row.title, row.unit, row.part, *_cells(row)]
            for c, heading in zip(comparisons, headings(comparisons), strict=True)
            for row in rows(c, breakdown, units)
        ]
        if body:
            head = ["fidelity", "property", "unit", breakdown.column, "MAE", "RMSE", "largest", "values"]
            parts += [f"## {breakdown.title}", "\n".join(_markdown_table(head, body)) + "\n"]
    parts += ["## Worst molecules", "\n".join(_worst_lines(comparisons, units)) + "\n"]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _worst_lines(comparisons: Sequence[Comparison], units: Units) -> list[str]:
    head = ["fidelity", "property", "unit", "error", "label", "predicted", "molecule", "atom", "file", "group", "row"]
    body = []
    for c, heading in zip(comparisons, headings(comparisons), strict=True):
        for key, molecules in c.worst.items():
            for molecule in molecules[:SHOWN_WORST]:
                cells = [heading, PROPERTIES[key].title, units.name(key), *worst_cells(molecule, units.factor(key))]
                body.append(cells)
    return _markdown_table(head, body)


def worst_cells(molecule: WorstMolecule, factor: float) -> list[str]:
    """Error, label, predicted, formula, atom, file, group and row of a molecule as text."""
    outlier, place = molecule.outlier, molecule.place
    values = [number(factor * value) for value in (outlier.error, outlier.label, outlier.predicted)]
    return [
        *values,
        molecule.formula,
        molecule.atom,
        place.file,
        place.group or "",
        "" if place.row is None else str(place.row),
    ]


def all_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """The notes of all comparisons, none twice."""
    return list(dict.fromkeys(note for comparison in comparisons for note in comparison.notes))


def _cells(row: Row) -> list[str]:
    return [number(row.mae), number(row.rmse), number(row.largest), str(row.count)]


def _markdown_table(head: Sequence[str], body: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
