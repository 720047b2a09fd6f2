"""Errors of models and of sums of models against a few lines of numpy."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from aimnet2mult.data.sgdataset import open_dataset, write_dataset
from aimnet2mult.evaluation.models import Predictor
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.study.errors import main, sum_of


def constant(energy, force, sae, species):
    """A model whose residual energies and forces are the same for all."""

    def predict(arrays, keys):
        numbers = arrays["numbers"]
        return {"energy": np.full(len(numbers), energy), "forces": np.full((*numbers.shape, 3), force)}

    return Predictor("model", 0, "level", species, sae, predict)


def test_predictions_and_references_add_up():
    low = constant(1.0, 0.5, ReferenceEnergies({1: -10.0, 8: -100.0}, charge=2.0), [1, 8])
    difference = constant(0.25, -0.2, ReferenceEnergies({1: -1.0, 6: -5.0, 8: -7.0}, charge=-0.5, spin=3.0), [1, 6, 8])
    both = sum_of([low, difference])
    assert both.species == [1, 8]
    arrays = {"numbers": np.array([[8, 1, 1]]), "charge": np.array([1.0]), "mult": np.array([2.0])}
    found = both.predict(arrays, ["energy", "forces"])
    assert found["energy"].tolist() == [1.25]
    np.testing.assert_allclose(found["forces"], 0.3)
    assert both.reference(arrays).tolist() == [-100.0 - 7.0 - 22.0 + 2.0 - 0.5 + 3.0]


def test_errors_of_a_checkpoint(tmp_path, fixtures_dir, reference_model):
    """The model's own predictions, shifted by 0.5 eV and 0.1 eV/Å, as labels."""
    from aimnet2mult.models.base import load_model_config, save_checkpoint
    from aimnet2mult.study.errors import errors

    network = reference_model("ref_single")
    sae = {z: -1.0 * z for z in (1, 6, 7, 8)}
    config = load_model_config(fixtures_dir / "ref_single_model.yaml")
    model = tmp_path / "model.pt"
    layout = {"num_fidelities": 1, "fidelity_offset": 200, "use_fidelity_readouts": True, "model_config": config}
    known = {"sae": {0: sae}, "species": {0: list(sae)}, "fidelity_names": {0: "dft"}}
    save_checkpoint(model, network, **layout, **known)
    source = open_dataset(fixtures_dir / "tiny_fid0.h5")
    groups = {}
    for _, arrays in source.read(np.arange(len(source)), sorted(source.keys)):
        arrays = {key: values for key, values in arrays.items() if key not in ("charges", "spin_charges")}
        known = np.isin(arrays["numbers"], list(sae)).all(axis=1)
        if arrays["numbers"].shape[1] in (3, 4) and known.any():
            groups[arrays["numbers"].shape[1]] = {key: values[known] for key, values in arrays.items()}
    write_dataset(tmp_path / "data.h5", groups)
    found = predictions(model, tmp_path / "data.h5")
    for n_atoms, (energy, forces) in found.items():
        groups[n_atoms]["energy"] = energy + 0.5
        groups[n_atoms]["forces"] = forces + 0.1
    write_dataset(tmp_path / "labels.h5", groups)
    result = errors([("dft", model)], tmp_path / "labels.h5", "cpu")
    assert result["structures"] == sum(len(arrays["energy"]) for arrays in groups.values())
    for key, value in (("energy", 0.5), ("forces", 0.1)):
        assert result["errors"][key]["mae"] == pytest.approx(value, abs=1e-5)
        assert result["errors"][key]["rmse"] == pytest.approx(value, abs=1e-5)

    output = tmp_path / "errors.json"
    arguments = ["--model", f"dft={model}", "--data", str(tmp_path / "labels.h5"), "--output", str(output)]
    done = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert json.loads(output.read_text()) == result


def predictions(model, data):
    """Total energies and forces of a checkpoint: number of atoms -> arrays."""
    import torch

    from aimnet2mult.evaluation.models import open_model

    predictor = open_model(model, torch.device("cpu")).predictor(0)
    source = open_dataset(data)
    found = {}
    for _, arrays in source.read(np.arange(len(source)), ["coord", "numbers", "charge", "mult"]):
        out = predictor.predict(arrays, ["energy", "forces"])
        found[arrays["numbers"].shape[1]] = (out["energy"] + predictor.reference(arrays), out["forces"])
    return found


def test_a_model_without_a_fidelity_is_refused(tmp_path):
    done = CliRunner().invoke(main, ["--model", "model.pt", "--data", "x.h5", "--output", str(tmp_path / "e.json")])
    assert done.exit_code == 2
    assert "expected FIDELITY=FILE" in done.output
    assert not (tmp_path / "e.json").exists()
