"""Models beside datasets: the errors are those of a few lines of numpy, whatever kind of file the model is."""

import json
import sys

import numpy as np
import pytest
import torch

from aimnet2mult.constants import ELEMENT_SYMBOLS
from aimnet2mult.data.collate import collate
from aimnet2mult.data.ledger import D3Correction, subtract_dispersion
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sgdataset import DatasetError, open_dataset, write_dataset
from aimnet2mult.evaluation.compare import choose_molecules, compare
from aimnet2mult.evaluation.models import open_model
from aimnet2mult.evaluation.properties import PROPERTIES
from aimnet2mult.evaluation.report import training_report
from aimnet2mult.evaluation.statistics import Sums, total
from aimnet2mult.modules import Forces
from aimnet2mult.tools.compile_jit import compile_model
from aimnet2mult.tools.compile_options import choose_dispersion
from aimnet2mult.utils.units import HARTREE_EV

CPU = torch.device("cpu")
NAMES = {0: "dft", 1: "gfn2", 2: "gfn1"}


def predictor(path, fidelity=None):
    model = open_model(path, CPU)
    return model.predictor(model.choose(fidelity))


def without_dispersion(checkpoint, datasets, f):
    """Labels as training sees them: D3(BJ) is taken off those of fidelity 0."""
    source = open_dataset(datasets[f])
    if f == 0:
        content = torch.load(checkpoint, weights_only=True)
        source = subtract_dispersion(source, D3Correction(content["dispersion"][0]["labels"]["parameters"]))
    return source


@pytest.fixture(scope="module")
def training_data(checkpoint, datasets):
    content = torch.load(checkpoint, weights_only=True)
    return MixedFidelityDataset({f: without_dispersion(checkpoint, datasets, f) for f in NAMES}, content["sae"])


@pytest.fixture(scope="module")
def expected(network, training_data):
    """Errors of all fidelities from one padded batch: fidelity -> property -> values."""
    x, y = collate(training_data.__getitems__(range(len(training_data))))
    out = Forces(network).eval()(x)
    real = x["numbers"] > 0
    found = {}
    for f in NAMES:
        found[f] = {}
        for key in ("energy", "forces", "charges", "spin_charges"):
            mask = (x["_fidelities"] == f) & y[f"{key}_mask"]
            if not mask.any():
                continue
            error = (out[key].detach().double() - y[key].double())[mask]
            found[f][key] = (error if key == "energy" else error[real[mask]]).numpy()
            if key == "energy":
                found[f]["energy_per_atom"] = (error / real[mask].sum(1)).numpy()
    return found


def assert_equal_to_numpy(errors, expected):
    assert set(errors) == set(expected)
    for key, values in expected.items():
        sums = errors[key].total
        assert sums.count == values.size
        assert sums.mae == pytest.approx(np.abs(values).mean(), rel=1e-5), key
        assert sums.rmse == pytest.approx(np.sqrt((values**2).mean()), rel=1e-5), key
        assert sums.largest == pytest.approx(np.abs(values).max(), rel=1e-4), key


@pytest.mark.parametrize("f", NAMES)
def test_errors_of_a_checkpoint_equal_numpy_on_gathered_predictions(checkpoint, datasets, expected, f):
    comparison = compare(predictor(checkpoint, NAMES[f]), open_dataset(datasets[f]), "data")
    assert_equal_to_numpy(comparison.errors, expected[f])
    assert (comparison.title, comparison.fidelity) == (NAMES[f], f)
    assert comparison.molecules == comparison.available == len(open_dataset(datasets[f]))


@pytest.mark.parametrize("f", [0, 1])
def test_checkpoint_and_compiled_model_of_the_same_fidelity_agree(checkpoint, datasets, tmp_path, f):
    jpt, _ = compile_model(checkpoint, tmp_path / "model", fidelity_level=f)
    source = open_dataset(datasets[f])
    eager, compiled = compare(predictor(checkpoint, str(f)), source, ""), compare(predictor(jpt), source, "")
    for key, errors in eager.errors.items():
        assert compiled.errors[key].total.rmse == pytest.approx(errors.total.rmse, rel=1e-5)
        worst, other = eager.worst[key][0], compiled.worst[key][0]
        assert worst.place == other.place
    assert compiled.notes == eager.notes
    assert ("D3(BJ) of b3lyp" in " ".join(eager.notes)) == (f == 0)


def test_dispersion_from_the_command_line_of_compile_jit_is_pointed_out(save_model, datasets, tmp_path):
    stated = save_model(tmp_path / "model.pt", dispersion={})
    jpt, _ = compile_model(stated, tmp_path / "m", fidelity_level=1, dispersion=choose_dispersion("d3bj", "b3lyp"))
    (note,) = predictor(jpt).notes
    assert "m_fid1.jpt adds D3(BJ) of b3lyp" in note


@pytest.fixture
def without_pictures(monkeypatch):
    """Pictures take most of the time of a report."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("without_pictures")
def test_report_of_a_training_has_the_errors_of_the_checkpoint(network, training_data, expected, tmp_path):
    network.train()
    before = torch.get_rng_state()
    page = training_report(tmp_path, network, training_data, np.arange(len(training_data)), names=NAMES)
    assert network.training
    network.eval()
    assert torch.equal(before, torch.get_rng_state())
    assert page == tmp_path / "report" / "index.html"
    content = json.loads((tmp_path / "report" / "errors.json").read_text())
    for comparison in content["comparisons"]:
        values = expected[comparison["fidelity"]]
        assert set(comparison["errors"]) == set(values)
        for key, row in comparison["errors"].items():
            assert row["mae"] == pytest.approx(np.abs(values[key]).mean(), rel=1e-5)
            assert row["unit"] == PROPERTIES[key].unit
    assert [c["fidelity_name"] for c in content["comparisons"]] == list(NAMES.values())


@pytest.mark.usefixtures("without_pictures")
def test_report_of_a_training_takes_a_stated_number_of_the_molecules_asked_for(network, training_data, tmp_path):
    indices = np.arange(0, len(training_data), 2)
    training_report(tmp_path, network, training_data, indices, names=NAMES, max_molecules=5, unit="kcal/mol")
    content = json.loads((tmp_path / "report" / "errors.json").read_text())
    for f, comparison in enumerate(content["comparisons"]):
        assert comparison["molecules"] == comparison["errors"]["energy"]["count"] == 5
        assert comparison["molecules_available"] == len(training_data.by_fidelity(indices)[f])
        assert "drawn at random (seed 0)" in comparison["notes"][-1]
        worst = {molecule["index"] for molecule in comparison["worst"]["energy"]}
        assert worst <= set(training_data.by_fidelity(indices)[f].tolist())
        assert comparison["errors"]["forces" if f < 2 else "energy"]["unit"].startswith("kcal/mol")


def test_ranges_and_elements_add_up(checkpoint, datasets):
    for errors in compare(predictor(checkpoint, "0"), open_dataset(datasets[0]), "").errors.values():
        for groups in (errors.by_size, errors.by_n_elements, *([errors.by_element] if errors.atomic else [])):
            summed = total(groups)
            assert isinstance(summed, Sums)
            assert summed.count == errors.total.count
            assert summed.absolute == pytest.approx(errors.total.absolute)
            assert summed.largest == errors.total.largest


def test_result_does_not_depend_on_the_batches(checkpoint, datasets):
    single = compare(predictor(checkpoint, "1"), open_dataset(datasets[1]), "", atoms_per_call=1)
    many = compare(predictor(checkpoint, "1"), open_dataset(datasets[1]), "", atoms_per_call=10**6)
    for key, errors in single.errors.items():
        assert errors.total.rmse == pytest.approx(many.errors[key].total.rmse, rel=1e-6)


def changed(groups, tmp_path, change, attributes=None):
    """A dataset with something changed in its arrays."""
    copied = {n: {key: value.copy() for key, value in arrays.items()} for n, arrays in groups.items()}
    change(copied)
    write_dataset(tmp_path / "changed.h5", copied, attributes)
    return open_dataset(tmp_path / "changed.h5")


def test_the_worst_molecule_is_the_one_that_was_spoilt(checkpoint, groups, tmp_path):
    n_atoms = sorted(groups[0])[1]

    def spoil(arrays):
        arrays[n_atoms]["energy"][2] += 500.0
        arrays[n_atoms]["forces"][1, 2, 0] -= 300.0

    comparison = compare(predictor(checkpoint, "dft"), changed(groups[0], tmp_path, spoil), "")
    energy, forces = comparison.worst["energy"][0], comparison.worst["forces"][0]
    assert (energy.place.file, energy.place.row) == (str(tmp_path / "changed.h5"), 2)
    assert int(energy.place.group) == n_atoms
    assert energy.outlier.error == pytest.approx(-500, abs=20)
    assert energy.atom == ""
    assert forces.place.row == 1
    assert forces.outlier.error == pytest.approx(300, abs=20)
    assert forces.outlier.atom == 2
    assert forces.atom == f"{ELEMENT_SYMBOLS[groups[0][n_atoms]['numbers'][1, 2]]}3"


def test_labels_that_are_nan_are_left_out(checkpoint, groups, datasets, tmp_path):
    n_atoms = min(groups[0])

    def blank(arrays):
        arrays[n_atoms]["forces"][0, 0, 0] = np.nan
        arrays[n_atoms]["energy"][1] = np.nan

    before = compare(predictor(checkpoint, "dft"), open_dataset(datasets[0]), "").errors
    after = compare(predictor(checkpoint, "dft"), changed(groups[0], tmp_path, blank), "").errors
    assert after["forces"].total.count == before["forces"].total.count - 3 * n_atoms
    assert after["energy"].total.count == after["energy_per_atom"].total.count == before["energy"].total.count - 1
    assert after["charges"].total == before["charges"].total


def test_data_without_labels_have_no_errors_and_are_not_evaluated(checkpoint, groups, tmp_path):
    def blank(arrays):
        for group in arrays.values():
            group["energy"][:] = np.nan

    model = predictor(checkpoint, "gfn1")
    model.predict = None  # whoever calls it fails
    comparison = compare(model, changed(groups[2], tmp_path, blank), "x.h5")
    assert comparison.errors == {}
    assert comparison.notes == ["gfn1: no molecule of x.h5 has a label that model.pt predicts."]


def test_labels_that_the_model_does_not_predict_are_pointed_out(checkpoint, groups, tmp_path):
    def add_dipoles(arrays):
        for group in arrays.values():
            group["dipole"] = np.zeros((len(group["energy"]), 3), np.float32)

    comparison = compare(predictor(checkpoint, "gfn1"), changed(groups[2], tmp_path, add_dipoles), "x.h5")
    assert "gfn1: x.h5 has labels for dipole, which the model does not predict." in comparison.notes


def test_units_of_a_file_are_respected(checkpoint, groups, datasets, tmp_path):
    def convert(arrays):
        for group in arrays.values():
            group["energy"] /= HARTREE_EV

    hartree = changed(groups[2], tmp_path, convert, {"energy_unit": "Hartree"})
    expected = compare(predictor(checkpoint, "gfn1"), open_dataset(datasets[2]), "").errors["energy"].total
    assert compare(predictor(checkpoint, "gfn1"), hartree, "").errors["energy"].total.mae == pytest.approx(expected.mae)


@pytest.mark.parametrize(("key", "value"), [("coord", np.nan), ("charge", np.inf), ("energy", np.inf)])
def test_what_is_no_number_is_refused_with_its_place(checkpoint, groups, tmp_path, key, value):
    n_atoms = max(groups[2])

    def spoil(arrays):
        arrays[n_atoms][key][0] = value

    with pytest.raises(DatasetError, match=rf"changed.h5: group {n_atoms:03d}: row 0: {key} is"):
        compare(predictor(checkpoint, "gfn1"), changed(groups[2], tmp_path, spoil), "")


def test_predictions_that_are_no_numbers_are_counted_and_pointed_out(checkpoint, datasets):
    model = predictor(checkpoint, "gfn1")
    predict = model.predict

    def sick(arrays, keys):
        out = predict(arrays, keys)
        out["energy"][0] = np.nan
        return out

    model.predict = sick
    comparison = compare(model, open_dataset(datasets[2]), "x.h5", atoms_per_call=10**6)
    lost = comparison.errors["energy"].not_finite
    assert lost > 0
    assert comparison.errors["energy"].total.count == comparison.molecules - lost
    assert f"gfn1: the predicted energy of {lost} molecules of x.h5 is NaN or infinite" in comparison.notes[0]


def test_molecules_are_drawn_reproducibly():
    molecules = np.arange(100, 200)
    assert choose_molecules(molecules, 100, 0).tolist() == choose_molecules(molecules, None, 0).tolist()
    drawn = choose_molecules(molecules, 10, 0)
    assert len(set(drawn.tolist())) == 10
    assert (np.diff(drawn) > 0).all()
    assert drawn.tolist() == choose_molecules(molecules, 10, 0).tolist() != choose_molecules(molecules, 10, 1).tolist()
