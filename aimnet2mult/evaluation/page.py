"""A report as one HTML page: pictures inside, nothing loaded from elsewhere, no JavaScript."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from aimnet2mult.evaluation.compare import Comparison, headings
from aimnet2mult.evaluation.differences import Difference
from aimnet2mult.evaluation.properties import PROPERTIES, Units
from aimnet2mult.evaluation.statistics import SAMPLE_VALUES
from aimnet2mult.evaluation.tables import (
    BREAKDOWNS,
    DIFFERENCES,
    DIFFERENCES_HEAD,
    OVERALL,
    Breakdown,
    Row,
    all_notes,
    difference_cells,
    number,
    rows,
    worst_cells,
)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 0 auto; max-width: 1100px;
       padding: 1rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; margin: .6rem 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d5dce4; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
nav a { margin-right: 1rem; }
a { color: #0b5cad; }
p.about, td.small { color: #56636f; font-size: .87rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .3rem 0 .8rem; }
th, td { padding: .22rem .7rem; text-align: left; border-bottom: 1px solid #e6ebf0; white-space: nowrap; }
th { font-weight: 600; background: #f3f6f9; border-bottom: 1px solid #c9d2dc; }
td.n, th.n { text-align: right; }
tbody + tbody { border-top: 2px solid #c9d2dc; }
td.bar { min-width: 130px; }
td.bar div { background: #7aa6d1; height: .72rem; border-radius: 2px; }
details { margin: .4rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
img { max-width: 100%; height: auto; display: block; margin: .4rem 0; }
ul.notes { background: #fff7e0; border-left: 4px solid #e0a800; padding: .6rem 1rem .6rem 2rem; }
footer { margin-top: 3rem; color: #56636f; font-size: .87rem; }
"""


def html_page(
    comparisons: Sequence[Comparison],
    units: Units,
    pictures: Mapping[str, bytes],
    title: str,
    about: Mapping[str, str],
    differences: Sequence[Difference] = (),
) -> str:
    """Return the page.

    Parameters
    ----------
    comparisons : sequence of Comparison
        The errors.
    units : Units
        Units to show them in.
    pictures : mapping
        Caption -> PNG.
    title : str
        Heading.
    about : mapping
        What was evaluated when and with what, for the head of the page.
    differences : sequence of Difference
        Differences between the fidelities of a model.
    """
    sections = {"Errors": _summary(comparisons, units)}
    if differences:
        sections[DIFFERENCES] = _differences(differences, units)
    if pictures:
        sections["Pictures"] = _pictures(pictures)
    for breakdown in BREAKDOWNS:
        content = _breakdown(comparisons, breakdown, units)
        if content:
            sections[breakdown.title] = content
    sections["Worst molecules"] = _worst(comparisons, units)
    links = " ".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in sections)
    lines = [f"<strong>{escape(key)}:</strong> {escape(value)}" for key, value in about.items()]
    body = "\n".join(
        f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>\n{content}</section>'
        for name, content in sections.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="about">{"<br>".join(lines)}</p>\n<nav>{links}</nav>\n{_notes(comparisons)}{body}\n'
        f"<footer>{_explanation()}</footer>\n</body>\n</html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _explanation() -> str:
    return escape(
        "Error: prediction minus label. MAE: mean of its absolute value; RMSE: square root of the mean of its square; "
        "largest: largest absolute value; values: how many numbers (an energy, one component of one force, one "
        "charge) went into the row. Errors of energies are the same with and without self-atomic energies (SAE); the "
        "energies themselves are shown relative to them. Labels that are missing count nowhere. Pictures show at most "
        f"{SAMPLE_VALUES:,} values of each property and dataset, drawn at random; tables are of all values."
    )


def _notes(comparisons: Sequence[Comparison]) -> str:
    notes = all_notes(comparisons)
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>\n"


def _pictures(pictures: Mapping[str, bytes]) -> str:
    parts = []
    for caption, png in pictures.items():
        source = base64.b64encode(png).decode("ascii")
        parts.append(f'<h3>{escape(caption)}</h3>\n<img alt="{escape(caption)}" src="data:image/png;base64,{source}">')
    return "\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------


def _table(head: Iterable[str], n_text: int, bodies: Iterable[Iterable[str]]) -> str:
    """A table whose first ``n_text`` columns are text and the others numbers; a body is a sequence of rows."""
    cells = "".join(
        f'<th class="n">{escape(text)}</th>' if i >= n_text else f"<th>{escape(text)}</th>"
        for i, text in enumerate(head)
    )
    content = "".join(f"<tbody>{''.join(lines)}</tbody>\n" for lines in bodies)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>\n{content}</table></div>\n'


def _cells(row: Row) -> str:
    values = (number(row.mae), number(row.rmse), number(row.largest), f"{row.count:,}")
    return "".join(f'<td class="n">{value}</td>' for value in values)


def _summary(comparisons: Sequence[Comparison], units: Units) -> str:
    bodies = []
    for comparison in comparisons:
        lines = []
        listed = list(rows(comparison, OVERALL, units))
        for i, row in enumerate(listed):
            head = ""
            if i == 0:
                of = f" of {comparison.available:,}" if comparison.molecules < comparison.available else ""
                molecules = f"{comparison.molecules:,}{of} molecules"
                head = (
                    f'<td rowspan="{len(listed)}"><strong>{escape(comparison.title)}</strong><br>'
                    f'<span class="small">{escape(comparison.model)}</span></td>'
                    f'<td rowspan="{len(listed)}">{escape(comparison.data)}<br>{molecules}</td>'
                )
            lines.append(f"<tr>{head}<td>{row.title}</td><td>{escape(row.unit)}</td>{_cells(row)}</tr>")
        if not listed:
            lines.append(
                f"<tr><td>{escape(comparison.title)}</td><td>{escape(comparison.data)}</td>"
                '<td colspan="6">no labels that the model predicts</td></tr>'
            )
        bodies.append(lines)
    return _table(["fidelity", "data", "property", "unit", "MAE", "RMSE", "largest", "values"], 4, bodies)


def _differences(differences: Sequence[Difference], units: Units) -> str:
    lines = []
    for cells in difference_cells(differences, units):
        text = "".join(f"<td>{escape(cell)}</td>" for cell in cells[:6])
        lines.append(f"<tr>{text}" + "".join(f'<td class="n">{cell}</td>' for cell in cells[6:]) + "</tr>")
    return _table(DIFFERENCES_HEAD, 6, [lines])


def _breakdown(comparisons: Sequence[Comparison], breakdown: Breakdown, units: Units) -> str:
    """A table for each comparison; the bars show the MAE relative to the largest one of the property."""
    parts = []
    for comparison, heading in zip(comparisons, headings(comparisons), strict=True):
        bodies = []
        for _, group in groupby(rows(comparison, breakdown, units), key=lambda row: row.key):
            listed = list(group)
            largest = max(row.mae for row in listed) or 1.0
            lines = []
            for i, row in enumerate(listed):
                head = ""
                if i == 0:
                    head = f'<td rowspan="{len(listed)}">{row.title}<br>{escape(row.unit)}</td>'
                bar = f'<td class="bar"><div style="width:{100 * row.mae / largest:.0f}%"></div></td>'
                lines.append(f"<tr>{head}<td>{escape(row.part)}</td>{bar}{_cells(row)}</tr>")
            bodies.append(lines)
        if bodies:
            columns = ["property, unit", breakdown.column, "MAE, relative", "MAE", "RMSE", "largest", "values"]
            parts.append(_folded(heading, _table(columns, 3, bodies), opened=True))
    return "\n".join(parts)


def _folded(heading: str, content: str, opened: bool) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(heading)}</summary>\n{content}</details>\n"


def _worst(comparisons: Sequence[Comparison], units: Units) -> str:
    head = ["#", "molecule", "atom", "group", "row", "file", "error", "label", "predicted"]
    parts = []
    for comparison, heading in zip(comparisons, headings(comparisons), strict=True):
        tables = []
        for key, molecules in comparison.worst.items():
            lines = []
            for i, molecule in enumerate(molecules):
                error, label, predicted, formula, atom, file, group, row = worst_cells(molecule, units.factor(key))
                text = "".join(f"<td>{escape(cell)}</td>" for cell in (str(i + 1), formula, atom, group, row))
                place = f'<td title="{escape(file)}">{escape(Path(file).name)}</td>'
                values = "".join(f'<td class="n">{cell}</td>' for cell in (error, label, predicted))
                lines.append(f"<tr>{text}{place}{values}</tr>")
            name = f"{PROPERTIES[key].axis}, {units.name(key)}"
            tables.append(f"<h3>{escape(name)}</h3>\n{_table(head, 6, [lines])}")
        if tables:
            parts.append(_folded(heading, "".join(tables), opened=False))
    return "\n".join(parts)
