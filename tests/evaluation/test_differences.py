"""Differences between fidelities of a model on the molecules of a dataset: against plain numpy, and in the report."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aimnet2mult.evaluation.differences import Moments
from aimnet2mult.models.base import load_checkpoint
from aimnet2mult.models.loading import load_potential
from aimnet2mult.tools.compile_jit import compile_model
from aimnet2mult.tools.evaluate import main

NAMES = ["dft", "gfn2", "gfn1"]


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def evaluate(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_moments_of_parts_are_those_of_the_whole():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(100, 3))
    values[7, 1] = np.nan
    moments = Moments()
    for part in (values[:1], values[1:40], values[:0], values[40:]):
        moments.add(part)
    assert moments.count == 299
    assert moments.mean == pytest.approx(np.nanmean(values), rel=1e-12)
    assert moments.std == pytest.approx(np.nanstd(values), rel=1e-12)
    assert np.isnan(Moments().std)


def expected(checkpoint, groups, sae):
    """Energies less self-atomic ones, and forces, of each fidelity; total energies."""
    relative, forces, totals = [], [], []
    for f in range(3):
        model = load_potential(checkpoint, fidelity=f)
        model.module.check_spin = False
        out = []
        for arrays in groups.values():
            data = {key: torch.as_tensor(arrays[key]) for key in ("coord", "numbers", "charge", "mult")}
            data = {key: value.float() if value.is_floating_point() else value for key, value in data.items()}
            found = model(data)
            reference = np.vectorize(sae[f].get)(arrays["numbers"]).sum(1)
            energy = found["energy"].numpy()
            out.append((energy - reference, found["forces"].double().numpy().ravel(), energy))
        for kept, values in zip((relative, forces, totals), zip(*out, strict=True), strict=True):
            kept.append(np.concatenate(values))
    return np.array(relative), np.array(forces), np.array(totals)


@pytest.mark.parametrize("kind", ["checkpoint", "combined"])
def test_report_against_plain_numpy(checkpoint, datasets, groups, tmp_path, kind):
    model = checkpoint
    if kind == "combined":
        model, _ = compile_model(checkpoint, tmp_path / "m", combined=True)
    report = tmp_path / "report"
    data = ["--data", f"gfn2={datasets[1]}"]
    result = evaluate("--model", model, *data, "--output", report, "--unit", "meV", "--all-fidelities")
    assert result.exit_code == 0, result.output
    relative, forces, totals = expected(checkpoint, groups[1], load_checkpoint(checkpoint)["sae"])
    found = json.loads((report / "errors.json").read_text())["differences"]
    assert [(d["fidelity"], d["reference"], d["data"]) for d in found] == [
        ("dft", "gfn2", "fid1.h5"),
        ("gfn1", "gfn2", "fid1.h5"),
    ]
    for difference, f in zip(found, (0, 2), strict=True):
        assert difference["molecules"] == relative.shape[1]
        for key, values in (("energy", relative), ("forces", forces)):
            between = 1000.0 * (values[f] - values[1])
            assert difference[key]["count"] == between.size
            assert difference[key]["mean"] == pytest.approx(between.mean(), abs=0.05)
            assert difference[key]["std"] == pytest.approx(between.std(), rel=1e-4)
        assert difference["energy"]["std"] > 10.0
    with open(report / "all_fidelities.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * totals.shape[1]
    for f, name in enumerate(NAMES):
        mine = [float(line["energy_eV"]) for line in lines if line["fidelity"] == name]
        np.testing.assert_allclose(np.sort(mine), np.sort(totals[f]), rtol=0, atol=2e-3)
    assert [int(line["index"]) for line in lines[::3]] == list(range(totals.shape[1]))
    for name in ("errors.md", "index.html"):
        text = (report / name).read_text()
        assert "Differences between fidelities" in text
        assert "gfn1 - gfn2" in text
    assert "dft - gfn2" in result.output


def test_report_without_it_has_none(checkpoint, datasets, tmp_path):
    report = tmp_path / "report"
    data = ["--model", checkpoint, "--data", f"gfn2={datasets[1]}", "--output", report, "--max-molecules", 3]
    assert evaluate(*data, "--all-fidelities").exit_code == 0
    assert (report / "all_fidelities.csv").is_file()
    assert evaluate(*data).exit_code == 0
    assert not (report / "all_fidelities.csv").exists()
    assert json.loads((report / "errors.json").read_text())["differences"] == []
    assert "Differences between fidelities" not in (report / "index.html").read_text()


def test_elements_that_a_fidelity_lacks_are_left_out(save_model, datasets, groups, tmp_path):
    model = save_model(tmp_path / "m.pt", species={0: (1, 6, 7, 8, 9), 1: (1, 6, 7, 8, 9, 17), 2: (1, 6, 7, 8, 9, 17)})
    report = tmp_path / "report"
    result = evaluate("--model", model, "--data", f"gfn2={datasets[1]}", "--output", report, "--all-fidelities")
    assert result.exit_code == 0, result.output
    dft, gfn1 = json.loads((report / "errors.json").read_text())["differences"]
    chlorine = sum(int((arrays["numbers"] == 17).any(1).sum()) for arrays in groups[1].values())
    assert chlorine > 0
    assert gfn1["molecules"] - dft["molecules"] == chlorine
    assert dft["energy"]["count"] == dft["molecules"]


def test_models_of_one_fidelity_are_refused(checkpoint, datasets, tmp_path):
    path, _ = compile_model(checkpoint, tmp_path / "m", fidelity_level="gfn2")
    data = ["--data", datasets[1], "--output", tmp_path / "report", "--all-fidelities"]
    result = evaluate("--model", path, *data)
    assert result.exit_code == 2
    assert "--all-fidelities: " in result.output
    assert "m_fid1.jpt holds one fidelity; compile all with compile_jit --combined" in result.output
    assert not (tmp_path / "report").exists()
