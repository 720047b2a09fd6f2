"""Histories of trainings as curves."""

import json

import pytest

from aimnet2mult.evaluation.history import learning_curves, metric_units, read_history, units_of_run
from aimnet2mult.evaluation.pictures import curve_plots

RECORDS = [
    {"iteration": 0, "val/loss": 2.0, "val/E_mae": 3.0, "val/dft/E_mae": 4.0, "val/gfn2/E_mae": 2.0, "lr/default": 1},
    {"iteration": 9, "train/loss": 1.0},
    {"iteration": 10, "val/loss": None, "val/E_mae": 1.0, "val/dft/E_mae": 2.0, "val/gfn2/E_mae": float("nan")},
]


def test_curves_by_fidelity_without_what_is_no_number():
    loss, energy = learning_curves(RECORDS, {"E_mae": "meV"})
    assert (loss.title, loss.curves) == ("loss", {"training": [(9, 1.0)], "validation": [(0, 2.0)]})
    assert (energy.title, energy.unit) == ("E MAE", "meV")
    assert energy.curves == {"all": [(0, 3.0), (10, 1.0)], "dft": [(0, 4.0), (10, 2.0)], "gfn2": [(0, 2.0)]}


def test_one_fidelity_has_one_curve():
    records = [{"iteration": 0, "val/F_mae": 1.0, "val/fid0/F_mae": 1.0}]
    (panel,) = learning_curves(records)
    assert list(panel.curves) == ["fid0"]
    assert panel.unit == "units of the log"


def test_history_without_validation_has_no_curves():
    assert learning_curves([{"iteration": 3, "train/loss": 1.0}]) == []
    assert learning_curves([]) == []


def test_curves_can_be_drawn_whatever_the_values():
    pytest.importorskip("matplotlib")
    wide = [{"iteration": i, "val/loss": 10.0**-i, "val/E_mae": -1.0, "val/F_mae": None} for i in range(40)]
    for records in (RECORDS, RECORDS[:1], wide):
        assert curve_plots(learning_curves(records)).startswith(b"\x89PNG")


def test_reading(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:2]) + '{"iteration": 1')
    assert read_history(path) == RECORDS[:2]
    assert "last line is not complete" in caplog.text
    for content in ("nonsense\n", "[1]\n", "3\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: not a metrics\.jsonl of a training"):
            read_history(path)
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl: no such file"):
        read_history(tmp_path / "no.jsonl")


def test_units_of_errors_by_the_settings(tmp_path):
    cfg = {
        "energy": {"abbr": "E", "scale": 23.060548},
        "forces": {"abbr": "F", "scale": 1000.0},
        "charges": {"abbr": "q"},
        "dipole": {"scale": 2.5},
    }
    units = metric_units(cfg)
    assert units["E_mae"] == "kcal/mol"
    assert units["E_per_atom_mae"] == "kcal/mol/atom"
    assert units["F_mae"] == "meV/Å"
    assert units["q_mae"] == "e"
    assert units["dipole_mae"] == "0.4 e·Å"
    assert units_of_run(tmp_path) == {}
    (tmp_path / "train.yaml").write_text("metrics: {kwargs: {cfg: {energy: {abbr: E}}}}\n")
    assert units_of_run(tmp_path)["E_mae"] == "eV"
    (tmp_path / "train.yaml").write_text("metrics: 3\n")
    with pytest.raises(ValueError, match=r"train\.yaml: not the settings"):
        units_of_run(tmp_path)
