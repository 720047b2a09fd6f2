import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset
from aimnet2mult.tools.check_data import main


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def faulty(tmp_path, fixtures_dir):
    """A file with a fault (error), one with another unit (warning)."""
    source = SizeGroupedDataset(fixtures_dir / "tiny_fid1.h5")
    groups = {a["numbers"].shape[1]: a for _, a in source.chunks(sorted(source.keys))}
    for arrays in groups.values():
        arrays["energy"] /= 27.211386
    write_dataset(tmp_path / "hartree.h5", groups)
    groups[6]["coord"][2] = np.nan
    write_dataset(tmp_path / "nan.h5", groups)
    return tmp_path


def test_clean_file(fixtures_dir):
    result = run(fixtures_dir / "tiny_fid0.h5")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("tiny_fid0: 160 molecules of 2 to 9 atoms in ")
    assert "eV, total energies with all electrons" in result.output
    assert result.output.endswith("0 errors, 0 warnings, 1 note\n")
    assert len(result.output.splitlines()) < 25  # fits on a screen


def test_exit_status(faulty):
    assert run(faulty / "hartree.h5").exit_code == 0
    assert run(faulty / "hartree.h5", "--strict").exit_code == 1
    result = run(faulty / "nan.h5")
    assert result.exit_code == 1
    assert "group 006: row 2" in result.output
    assert "look like Hartree" in result.output


def test_names_and_several_files(faulty, fixtures_dir):
    result = run(f"xtb={faulty}/*.h5", f"xtb={fixtures_dir}/tiny_fid1.h5", fixtures_dir / "tiny_fid0.h5")
    assert "xtb: 600 molecules" in result.output
    assert "tiny_fid0: 160 molecules" in result.output


def test_name_that_is_a_folder_with_an_equals_sign(tmp_path, fixtures_dir):
    folder = tmp_path / "a=b"
    folder.mkdir()
    (folder / "c.h5").write_bytes((fixtures_dir / "tiny_fid0.h5").read_bytes())
    assert run(folder / "c.h5").output.startswith("c: 160 molecules")


def test_json(faulty, tmp_path):
    path = tmp_path / "report.json"
    result = run(faulty / "nan.h5", "--json", path, "--max-examples", 1)
    assert result.output.endswith(f"written: {path}\n")
    content = json.loads(path.read_text())
    (found,) = [finding for finding in content["findings"] if finding["kind"] == "bad_coord"]
    assert found["places"] == [{"file": str(faulty / "nan.h5"), "group": "006", "row": 2}]
    assert found["count"] == 1
    printed = run(faulty / "nan.h5", "--json", "-", "--max-examples", 1)
    assert json.loads(printed.output) == content


def test_validation_file(fixtures_dir):
    file = fixtures_dir / "tiny_fid2.h5"
    result = run(f"gfn1={file}", "--val", file)
    assert result.exit_code == 1
    assert "gfn1 (validation)" in result.output
    assert "200 of 200 validation molecules" in result.output


def test_thresholds(fixtures_dir):
    assert "close_atoms" not in run(fixtures_dir / "tiny_fid0.h5").output
    assert "closer than 0.9 Å" in run(fixtures_dir / "tiny_fid0.h5", "--close", 0.9).output
    assert "far_fragments" in run(fixtures_dir / "tiny_fid0.h5", "--far", 2.0).output


def test_self_atomic_energies(tmp_path, fixtures_dir):
    path = tmp_path / "sae.yaml"
    path.write_text("1: -13.6\n6: -1030.0\n")
    result = run(fixtures_dir / "tiny_fid0.h5", "--sae", path)
    assert result.exit_code == 1
    assert "N (7), O (8), F (9), Si (14)" in result.output


def test_a_file_that_cannot_be_opened_is_a_finding(tmp_path, fixtures_dir):
    (tmp_path / "text.h5").write_text("no dataset")
    result = run(tmp_path / "text.h5", fixtures_dir / "tiny_fid0.h5")
    assert result.exit_code == 1
    assert "not an HDF5 file" in result.output
    assert "tiny_fid0: 160 molecules" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no datasets given"),
        (["missing.h5"], "missing.h5: no such file"),
        (["a=missing_*.h5"], "no file matches"),
        (["=DATA"], "the name before = is missing"),
        (["DATA", "DATA"], "another file is called tiny_fid0"),
        (["DATA", "tiny_fid0=DATA"], "Choose another name"),
        (["a=DATA", "b=DATA", "--val", "DATA"], "which fidelity"),
        (["a=DATA", "--val", "b=DATA"], "b is not among the fidelities: a"),
        (["DATA", "--sae", "missing.yaml"], "missing.yaml: no such file"),
        (["DATA", "--json", "missing/report.json"], "the folder missing does not exist"),
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--config", "missing.yaml", "--val", "DATA"], "do not go with --config"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, fixtures_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.replace("DATA", str(fixtures_dir / "tiny_fid0.h5")) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output


@pytest.fixture
def config(tmp_path, fixtures_dir):
    pytest.importorskip("omegaconf")
    path = tmp_path / "train.yaml"
    datasets = ", ".join(f"{f}: {fixtures_dir}/tiny_fid{f}.h5" for f in range(2))
    path.write_text(f"data: {{fidelity_datasets: {{{datasets}}}, sae: null, val_fraction: 0.1}}\n")
    return path


def test_configuration(config):
    result = run("--config", config)
    assert result.exit_code == 0, result.output
    assert "fid0: 160 molecules" in result.output
    assert "fid1: 200 molecules" in result.output


def test_configuration_with_overrides_and_validation_file(config, fixtures_dir):
    result = run("--config", config, f"data.val_fidelity_datasets.0={fixtures_dir}/tiny_fid0.h5")
    assert result.exit_code == 1
    assert "160 of 160 validation molecules" in result.output


def test_split_of_the_configuration(config, tmp_path, fixtures_dir):
    """Each molecule twice: nearly all validation molecules are trained on."""
    source = SizeGroupedDataset(fixtures_dir / "tiny_fid1.h5")
    arrays = next(a for _, a in source.chunks(sorted(source.keys)) if a["numbers"].shape[1] == 7)
    write_dataset(tmp_path / "twice.h5", {7: {key: np.repeat(values, 2, axis=0) for key, values in arrays.items()}})
    override = "data.fidelity_datasets.1=" + str(tmp_path / "twice.h5")
    result = run("--config", config, override)
    assert result.exit_code == 1
    assert "validation molecules of which the geometry is trained on (" in " ".join(result.output.split())
    assert "[leak]" not in run("--config", config, override, "data.val_fraction=0").output


def test_split_of_unusable_data_is_left_out(config, faulty, caplog):
    result = run("--config", config, f"data.fidelity_datasets.1={faulty}/nan.h5")
    assert result.exit_code == 1
    assert "[bad_coord]" in result.output


def test_without_the_packages_of_training(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    monkeypatch.delitem(sys.modules, "aimnet2mult.train.configuration", raising=False)
    result = run("--config", config)
    assert result.exit_code == 2
    assert 'pip install "aimnet2mult[train]"' in result.output
