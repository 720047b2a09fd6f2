import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.tools.evaluate import compare, main

ELEMENTS = (1, 6, 7, 8, 9, 17)


@pytest.fixture
def dataset(tmp_path, fixtures_dir):
    """Real molecules of the elements that the compiled model knows."""
    source = SizeGroupedDataset(fixtures_dir / "tiny_fid0.h5")
    groups = {}
    for _, arrays in source.read(np.arange(len(source)), sorted(source.keys)):
        known = np.isin(arrays["numbers"], ELEMENTS).all(1)
        if known.any():
            groups[arrays["numbers"].shape[1]] = {key: value[known] for key, value in arrays.items()}
    path = tmp_path / "test.h5"
    write_dataset(path, groups)
    return path, groups


def test_errors_against_plain_numpy(compiled, dataset):
    path, groups = dataset
    model = load_jit_model(compiled)
    energy, forces = [], []
    for arrays in groups.values():
        out = model({key: torch.as_tensor(arrays[key]) for key in ("coord", "numbers", "charge", "mult")})
        energy.append(out["energy"].numpy() - arrays["energy"])
        forces.append((out["forces"].double().numpy() - arrays["forces"]).ravel())
    errors = compare(compiled, path).errors()
    energy, forces = np.concatenate(energy), np.concatenate(forces)
    assert errors["energy"]["mae"] == pytest.approx(np.abs(energy).mean(), rel=1e-6)
    assert errors["energy"]["count"] == len(energy)
    assert errors["forces"]["rmse"] == pytest.approx(np.sqrt((forces**2).mean()), rel=1e-4)
    assert set(errors) == {"energy", "energy_per_atom", "forces", "charges", "spin_charges"}


def test_labels_that_are_nan_are_left_out(compiled, dataset, tmp_path):
    path, groups = dataset
    n_atoms = next(iter(groups))
    groups[n_atoms]["forces"][0] = np.nan
    path = tmp_path / "nan.h5"
    write_dataset(path, groups)
    before = compare(compiled, dataset[0]).errors()["forces"]["count"]
    assert compare(compiled, path).errors()["forces"]["count"] == before - 3 * n_atoms


def test_report(compiled, dataset, tmp_path):
    pytest.importorskip("matplotlib")
    history = tmp_path / "metrics.jsonl"
    history.write_text(
        '{"iteration": 0, "val/E_mae": 2.0, "val/fid0/E_mae": 2.5}\n{"iteration": 5, "val/E_mae": 1.0}\n'
    )
    args = ["--model", compiled, "--data", dataset[0], "--output", tmp_path / "report", "--history", history]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"errors.json", "errors.md", "parity.png", "learning_curves.png"}
    content = json.loads((tmp_path / "report" / "errors.json").read_text())
    assert content[0]["errors"]["energy"]["mae"] > 0
    assert (tmp_path / "report" / "errors.md").read_text() in result.output


def test_mistakes(compiled, dataset, tmp_path, fixtures_dir):
    out = ["--output", str(tmp_path / "report")]
    cases = [
        (["--model", str(compiled), "--data", str(tmp_path / "no.h5")], "no.h5"),
        (["--model", str(tmp_path / "no.jpt"), "--data", str(dataset[0])], "no.jpt: no such file"),
        (
            ["--model", str(compiled), "--model", str(compiled), "--data", str(dataset[0])],
            "2 times --model and 1 times",
        ),
        (["--model", str(compiled), "--data", str(fixtures_dir / "tiny_fid1.h5")], "not among"),
        (["--model", str(compiled), "--data", str(dataset[0]), "--history", str(dataset[0])], "not a metrics.jsonl"),
    ]
    for args, message in cases:
        result = CliRunner().invoke(main, args + out)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert not (tmp_path / "report").exists()
