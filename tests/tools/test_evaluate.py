"""The command line: models and datasets in the forms that the README gives, and what users get wrong."""

import json
import sys

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset
from aimnet2mult.models.base import load_model_config, save_checkpoint
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.tools.evaluate import Request, main, requests_in_order, split_data

ELEMENTS = (1, 6, 7, 8, 9, 17)
SAE = {z: -1000.0 * z for z in ELEMENTS}


def evaluate(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def errors_of(folder):
    """Comparisons of a report, by fidelity and name of the data."""
    content = json.loads((folder / "errors.json").read_text())
    return {(c["fidelity"], c["data"]): c["errors"] for c in content["comparisons"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, fixtures_dir):
    """Real molecules of the elements that the models know."""
    source = SizeGroupedDataset(fixtures_dir / "tiny_fid0.h5")
    groups = {}
    for _, arrays in source.read(np.arange(len(source)), sorted(source.keys)):
        known = np.isin(arrays["numbers"], ELEMENTS).all(1)
        if known.any():
            groups[arrays["numbers"].shape[1]] = {key: value[known] for key, value in arrays.items()}
    path = tmp_path_factory.mktemp("data") / "test.h5"
    write_dataset(path, groups)
    return path, groups


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, reference_model, fixtures_dir):
    """A checkpoint of the three fidelities dft, gfn2 and gfn1."""
    model = reference_model("ref_mixed", torch.float32)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_checkpoint(
        path,
        model,
        model_config=load_model_config(fixtures_dir / "ref_mixed_model.yaml"),
        num_fidelities=model.num_fidelities,
        fidelity_offset=model.fidelity_offset,
        use_fidelity_readouts=model.use_fidelity_readouts,
        fidelity_names={0: "dft", 1: "gfn2", 2: "gfn1"},
        sae=dict.fromkeys(range(3), SAE),
    )
    return path


@pytest.fixture
def without_pictures(monkeypatch):
    """Pictures take most of the time of a report."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("without_pictures")
def test_compiled_model_against_plain_numpy(compiled, dataset, tmp_path):
    path, groups = dataset
    model = load_jit_model(compiled)
    energy, forces = [], []
    for arrays in groups.values():
        out = model({key: torch.as_tensor(arrays[key]) for key in ("coord", "numbers", "charge", "mult")})
        energy.append(out["energy"].numpy() - arrays["energy"])
        forces.append((out["forces"].double().numpy() - arrays["forces"]).ravel())
    energy, forces = np.concatenate(energy), np.concatenate(forces)
    result = evaluate("--model", compiled, "--data", path, "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output
    ((key, errors),) = errors_of(tmp_path / "report").items()
    assert key == (1, "test.h5")
    assert errors["energy"]["mae"] == pytest.approx(np.abs(energy).mean(), rel=1e-6)
    assert errors["energy"]["count"] == len(energy)
    assert errors["forces"]["rmse"] == pytest.approx(np.sqrt((forces**2).mean()), rel=1e-4)
    assert set(errors) == {"energy", "energy_per_atom", "forces", "charges", "spin_charges"}


def test_report(compiled, dataset, tmp_path):
    pytest.importorskip("matplotlib")
    history = tmp_path / "metrics.jsonl"
    history.write_text(
        '{"iteration": 0, "val/E_mae": 2.0, "val/fid0/E_mae": 2.5}\n{"iteration": 5, "val/E_mae": 1.0}\n'
    )
    arguments = ["--model", compiled, "--data", dataset[0]] * 2
    result = evaluate(*arguments, "--output", tmp_path / "report", "--history", history)
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "report").iterdir()}
    pictures = {"parity.png", "error_histograms.png", "learning_curves.png"}
    assert written == {"errors.json", "errors.csv", "errors.md", "index.html"} | pictures
    assert result.output.endswith(f"{tmp_path / 'report' / 'index.html'}\n")
    table = next(line for line in result.output.splitlines() if "| forces |" in line)
    assert table in (tmp_path / "report" / "errors.md").read_text()
    assert "adds D3(BJ) of b3lyp" in result.output
    # A second report takes the place of the first one.
    result = evaluate("--model", compiled, "--data", dataset[0], "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "report").iterdir()} == written - {"learning_curves.png"}


@pytest.mark.usefixtures("without_pictures")
def test_fidelities_of_a_checkpoint_by_name_and_number(checkpoint, dataset, tmp_path):
    path, _ = dataset
    data = ["--data", f"dft={path}", "--data", f"1={path}", "--data", path, "--fidelity", "gfn1"]
    result = evaluate("--model", checkpoint, *data, "--output", tmp_path, "--unit", "meV", "--max-molecules", 10)
    assert result.exit_code == 0, result.output
    found = errors_of(tmp_path)
    assert [fidelity for fidelity, _ in found] == [0, 1, 2]
    assert len({errors["energy"]["mae"] for errors in found.values()}) == 3
    assert {errors["energy"]["count"] for errors in found.values()} == {10}
    assert {errors["forces"]["unit"] for errors in found.values()} == {"meV/Å"}
    assert "of the" in result.output


@pytest.mark.usefixtures("without_pictures")
def test_fidelities_of_a_combined_file(checkpoint, dataset, tmp_path):
    from aimnet2mult.tools.compile_jit import compile_model

    combined, _ = compile_model(checkpoint, tmp_path / "m", combined=True)
    path, _ = dataset
    found = {}
    for model in (checkpoint, combined):
        data = ["--data", f"dft={path}", "--data", f"gfn1={path}", "--max-molecules", 10]
        result = evaluate("--model", model, *data, "--output", tmp_path / model.name.partition(".")[0])
        assert result.exit_code == 0, result.output
        found[model] = errors_of(tmp_path / model.name.partition(".")[0])
    assert found[combined].keys() == found[checkpoint].keys()
    for key, errors in found[combined].items():
        assert errors["energy"]["mae"] == pytest.approx(found[checkpoint][key]["energy"]["mae"], rel=1e-6)
        assert errors["forces"]["mae"] == pytest.approx(found[checkpoint][key]["forces"]["mae"], rel=1e-5)
    result = evaluate("--model", combined, "--data", path, "--output", tmp_path / "x")
    assert result.exit_code == 2
    assert "say which one a dataset belongs to" in result.output


@pytest.mark.usefixtures("without_pictures")
def test_several_datasets_and_files_of_one_name(compiled, dataset, tmp_path):
    path, groups = dataset
    (tmp_path / "a").mkdir()
    write_dataset(tmp_path / "a" / "test.h5", groups)
    pattern = tmp_path / "a" / "*.h5"
    result = evaluate(
        *("--model", compiled, "--data", path, "--data", tmp_path / "a" / "test.h5", "--data", pattern),
        *("--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    found = errors_of(tmp_path / "out")
    assert [data for _, data in found] == [str(path), str(tmp_path / "a" / "test.h5"), str(pattern)]
    assert len({errors["energy"]["mae"] for errors in found.values()}) == 1


def test_each_dataset_belongs_to_the_model_before_it():
    order = ["models", "data", "data", "models", "data"]
    found = requests_in_order(order, ["a.pt", "b.jpt"], ["x", "y", "z"])
    assert [(str(request.model), request.data) for request in found] == [("a.pt", ("x", "y")), ("b.jpt", ("z",))]
    (only,) = requests_in_order(["data", "models", "data"], ["a.pt"], ["x", "y"])
    assert only.data == ("x", "y")
    with pytest.raises(ValueError, match=r"--data x: stands before the first --model"):
        requests_in_order(["data", "models", "models", "data"], ["a", "b"], ["x", "y"])


def test_a_folder_needs_no_data(tmp_path):
    (request,) = requests_in_order(["models"], [str(tmp_path)], [])
    assert request == Request(tmp_path, ())


def test_names_of_files_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_data("dft=a=b.h5") == ("dft", "a=b.h5")
    assert split_data("runs/lr=3/test.h5") == (None, "runs/lr=3/test.h5")
    (tmp_path / "a=b.h5").touch()
    assert split_data("a=b.h5") == (None, "a=b.h5")


def test_mistakes(compiled, checkpoint, dataset, tmp_path, fixtures_dir):
    path, groups = dataset
    bare = tmp_path / "bare.pt"
    torch.save({"model": torch.load(checkpoint, weights_only=True)["model"]}, bare)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "foreign.jpt")
    wordless = {n: {**arrays, "energy": arrays["energy"] * np.nan} for n, arrays in groups.items()}
    write_dataset(
        tmp_path / "unlabelled.h5",
        {n: {k: v for k, v in a.items() if k in ("coord", "numbers", "charge", "energy")} for n, a in wordless.items()},
    )
    write_dataset(tmp_path / "unit.h5", groups)
    with h5py.File(tmp_path / "unit.h5", "a") as file:
        file.attrs["energy_unit"] = "furlong"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    cases = [
        (["--model", compiled, "--data", tmp_path / "no.h5"], "no.h5: no such file"),
        (["--model", tmp_path / "no.jpt", "--data", path], "no.jpt: no such file"),
        (["--model", tmp_path / "no.pt", "--data", path], "no.pt: no such file"),
        (["--model", compiled, "--model", compiled, "--data", path], "no --data follows it"),
        (["--model", checkpoint], "no --data follows it"),
        (["--model", compiled, "--data", fixtures_dir / "tiny_fid1.h5"], "not among the elements"),
        (["--model", compiled, "--data", path, "--history", path], "not a metrics.jsonl"),
        (["--model", compiled, "--data", path, "--history", tmp_path / "metrics.jsonl"], "holds no validation errors"),
        (["--model", path, "--data", path], "not a checkpoint that can be loaded safely"),
        (["--model", tmp_path / "foreign.jpt", "--data", path], "not a model of tools.compile_jit"),
        (["--model", bare, "--data", path], "not the model's configuration and self-atomic energies. Compile it"),
        (["--model", checkpoint, "--data", path], "say which one a dataset belongs to"),
        (
            ["--model", checkpoint, "--data", f"dtf={path}"],
            "no fidelity 'dtf' (it has 0 (dft), 1 (gfn2), 2 (gfn1)); did you mean dft?",
        ),
        (["--model", checkpoint, "--data", f"3={path}"], "no fidelity '3'"),
        (["--model", compiled, "--data", f"0={path}"], "no fidelity '0'"),
        (["--model", compiled, "--data", tmp_path / "unlabelled.h5"], "no molecule has a label"),
        (["--model", compiled, "--data", tmp_path / "unit.h5"], "'furlong' is not a unit of energy"),
        (["--model", compiled, "--data", path, "--unit", "kcal"], "did you mean kcal/mol"),
        (["--model", compiled, "--data", path, "--device", "gpu"], "--device gpu: cannot be used"),
        (["--model", compiled, "--data", path, "--max-molecules", 0], "--max-molecules"),
        (["--model", tmp_path / "empty"], "no checkpoint of a training run"),
    ]
    for arguments, message in cases:
        result = evaluate(*arguments, "--output", tmp_path / "report")
        assert result.exit_code == 2, (arguments, result.output, result.exception)
        assert message in result.output.replace("\n", " "), (arguments, result.output)
        assert not (tmp_path / "report").exists()
    result = evaluate("--model", compiled, "--data", path, "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "is a file; the name of a folder is expected" in result.output
