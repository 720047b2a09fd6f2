"""What a report consists of: the page, its tables and pictures."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from aimnet2mult.data.checks.findings import Place
from aimnet2mult.evaluation.compare import Comparison, WorstMolecule, headings
from aimnet2mult.evaluation.page import html_page
from aimnet2mult.evaluation.properties import PROPERTIES, Units
from aimnet2mult.evaluation.report import Report
from aimnet2mult.evaluation.statistics import Molecules, Outlier, PropertyErrors
from aimnet2mult.evaluation.tables import csv_text, json_text, markdown_text, number

VOID = {"meta", "img", "br"}
PNG = b"\x89PNG\r\n\x1a\n"


def comparison(name="dft", data="test.h5", keys=("energy", "energy_per_atom", "forces"), scale=1.0, note=None):
    """Errors of made-up molecules of two to thirty atoms."""
    rng = np.random.default_rng(3)
    errors = {key: PropertyErrors(PROPERTIES[key].atomic, rng) for key in keys}
    for n in (2, 7, 30):
        molecules = Molecules(np.arange(10 * n, 10 * n + 6), rng.choice([1, 6, 8], (6, n)), np.full(6, -1.0))
        for key in keys:
            label = rng.normal(size=(6, n, 3) if PROPERTIES[key].atomic else 6)
            errors[key].add(molecules, label, label + scale * rng.normal(size=label.shape))
    worst = {
        key: [WorstMolecule(outlier, Place(f"/data/{data}", "002", 5)) for outlier in errors[key].worst.sorted()]
        for key in keys
    }
    notes = [] if note is None else [note]
    return Comparison("model.pt", 0, name, data, 18, 18, errors, worst, notes)


class Page(HTMLParser):
    """Tags in their nesting, the rows of all tables, and everything that is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.rows, self.attributes, self.text, self.anchors, self.links = [], [], [], [], set(), set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a":
            self.links.add(attrs["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_page_is_well_formed_and_complete_in_itself(tmp_path):
    pytest.importorskip("matplotlib")
    history = [{"iteration": i, "val/E_mae": 2.0 / (i + 1), "val/loss": 1.0} for i in range(5)]
    report = Report("A title", [comparison(), comparison("gfn2")], Units("meV"), {"Models": "m"}, history)
    text = report.write(tmp_path / "report").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, *_ in page.attributes}
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    sources = [value for _, key, value in page.attributes if key in ("src", "srcset", "data")]
    assert len(sources) == 3
    for source, name in zip(sources, ("parity", "error_histograms", "learning_curves"), strict=True):
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert content == (tmp_path / "report" / f"{name}.png").read_bytes()
        assert content.startswith(PNG)
    assert {link.removeprefix("#") for link in page.links} <= page.anchors
    assert all(link.startswith("#") for link in page.links)


def test_numbers_of_the_page_are_those_of_the_errors():
    one = comparison()
    page = Page(html_page([one], Units("kcal/mol"), {}, "t", {}))
    total = one.errors["forces"].total
    factor = 23.060548012069493
    expected = ["forces", "kcal/mol/Å", number(factor * total.mae), number(factor * total.rmse)]
    assert any(row[-6:-2] == expected for row in page.rows)
    worst = one.errors["forces"].worst.sorted()[0]
    assert any(
        row[0] == "1" and row[6:] == [number(factor * x) for x in (worst.error, worst.label, worst.predicted)]
        for row in page.rows
    )


def test_text_from_files_is_not_taken_for_markup():
    page = Page(html_page([comparison("<b>x</b>", "a&b<i>.h5", note="<u>")], Units(), {}, "<s>", {"<q>": '"<q>"'}))
    assert not {"b", "i", "u", "s", "q"} & {tag for tag, *_ in page.attributes}
    assert "<b>x</b>" in "".join(page.text)


def test_json_is_strict_and_states_its_units():
    one = comparison()
    lost = Outlier(3, 1.0, np.nan, (1, 8), 0.0, None)
    one.worst["energy"].insert(0, WorstMolecule(lost, Place("f.h5", "002", 0)))
    content = json.loads(json_text([one], Units("meV"), {}), parse_constant=pytest.fail)
    (entry,) = content["comparisons"]
    assert content["units"]["forces"] == "meV/Å"
    assert entry["errors"]["energy"]["mae"] == pytest.approx(1000 * one.errors["energy"].total.mae)
    assert entry["worst"]["energy"][0] == {
        "error": None,
        "label": 1000.0,
        "predicted": None,
        "formula": "HO",
        "charge": 0.0,
        "atoms": 2,
        "atom": None,
        "index": 3,
        "file": "f.h5",
        "group": "002",
        "row": 0,
    }
    for part in ("by_atoms", "by_n_elements"):
        for key, row in entry["errors"].items():
            assert sum(other["count"] for other in entry[part][key].values()) == row["count"]
    assert set(entry["by_element"]) == {"forces"}


def test_csv_has_every_number_once():
    rows = list(csv.DictReader(io.StringIO(csv_text([comparison(), comparison("gfn2")], Units()))))
    for fidelity in ("dft", "gfn2"):
        for by in ("all", "atoms", "n_elements", "element"):
            counted = [
                int(row["count"])
                for row in rows
                if (row["fidelity_name"], row["by"], row["property"]) == (fidelity, by, "forces")
            ]
            assert sum(counted) == 6 * 39 * 3
    assert len({(row["fidelity_name"], row["property"], row["by"], row["part"]) for row in rows}) == len(rows)


def test_markdown_tables_are_rectangular():
    text = markdown_text([comparison(data="a|b.h5")], Units())
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "1−" in text  # the charge of the ions


def test_without_matplotlib_there_are_tables_and_a_page(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "parity.png").write_bytes(PNG)
    Report("t", [comparison()], Units()).write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.csv", "errors.json", "errors.md", "index.html"]
    assert "matplotlib is not installed" in caplog.text
    assert Page((tmp_path / "index.html").read_text(encoding="utf-8")).rows


def test_comparisons_without_any_error_have_a_page_all_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    empty = Comparison("m", 0, None, "d", 3, 3, {}, {})
    Report("t", [empty], Units()).write(tmp_path)
    assert "no labels that the model predicts" in (tmp_path / "index.html").read_text(encoding="utf-8")
    Report("t", [empty, comparison(scale=0.0)], Units()).write(tmp_path)  # errors that are all zero can be drawn
    assert (tmp_path / "error_histograms.png").read_bytes().startswith(PNG)


def test_comparisons_are_told_apart_by_what_differs():
    dft, gfn2 = comparison("dft"), comparison("gfn2")
    assert headings([dft, gfn2]) == ["dft", "gfn2"]
    assert headings([dft, comparison("dft", "b.h5")]) == ["dft, test.h5", "dft, b.h5"]
    gfn2.model = "new.pt"
    assert headings([dft, gfn2]) == ["dft, model.pt", "gfn2, new.pt"]


def test_unknown_units_are_refused():
    with pytest.raises(ValueError, match="unit 'kcal' is not one for errors: did you mean kcal/mol"):
        Units("kcal")


def test_evaluation_needs_neither_the_training_nor_matplotlib():
    code = "import sys, aimnet2mult.evaluation.report, aimnet2mult.tools.evaluate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "aimnet2mult.evaluation.pictures" in loaded
    assert not [name for name in loaded if re.match(r"aimnet2mult\.train|ignite|wandb|matplotlib|omegaconf", name)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.23456, "1.235"), (-12345.6, "-12346"), (0.000123456, "0.0001235"), (1e-7, "1.000e-07")],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text
