"""The learning-curve command: a whole study of small files, killed and continued, and mistakes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import aimnet2mult
from aimnet2mult.data.sgdataset import open_dataset
from aimnet2mult.study.jobs import Workshop
from aimnet2mult.study.report import Report
from aimnet2mult.study.results import collect
from aimnet2mult.study.subsets import arrays_of, write_structures
from aimnet2mult.tools.learning_curve import main, planned

pytestmark = pytest.mark.timeout(900)  # a whole study is two minutes, but on a machine that others use, too

FIXTURES = Path(__file__).parents[1] / "fixtures"

TRAIN = """
data: {samplers: {train: {kwargs: {batch_size: 8, batch_mode: molecules}}}}
scheduler: null
log_frequency: {train: 5}
"""

STUDY = {
    "target": "dft",
    "model": "model.yaml",
    "train": "train.yaml",
    "fidelities": {
        "dft": {"files": "fid0.h5", "level": "B3LYP/def2-SVP", "dispersion": "none"},
        "gfn2": {"files": "fid1.h5", "dispersion": {"d4": "gfn2"}},
    },
    "test": "fid0.h5",
    "fractions": [0.2, 1.0],
    "seeds": 1,
    "steps": 4,
    "validate_every": 2,
    "learning_rates": [1.0e-3],
    "tune_fractions": [1.0],
    "protocols": {"target_only": {}, "fine_tune": {"pretraining": 0.5, "reference": "anchored", "terms": ["charge"]}},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Data, model and settings of a study."""
    folder = tmp_path_factory.mktemp("study")
    for f in range(2):
        shutil.copy(FIXTURES / f"tiny_fid{f}.h5", folder / f"fid{f}.h5")
    shutil.copy(FIXTURES / "ref_mixed_model.yaml", folder / "model.yaml")
    (folder / "train.yaml").write_text(TRAIN)
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return folder


def command(folder, *arguments):
    module = [sys.executable, "-m", "aimnet2mult.tools.learning_curve"]
    return [*module, "--config", str(folder / "study.yaml"), *map(str, arguments)]


@pytest.fixture(scope="module")
def output(sources):
    """The folder of a study that was run; two commands at a time."""
    output = sources / "out"
    done = subprocess.run(
        command(sources, "--output", output, "--jobs", 2), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output / "report.md")
    return output


@pytest.mark.slow
def test_a_whole_study(output):
    rows = list(csv.DictReader((output / "results.csv").read_text().splitlines()))
    assert [(row["protocol"], row["fraction"]) for row in rows] == [
        ("target_only", "0.2"),
        ("target_only", "1.0"),
        ("fine_tune", "0.2"),
        ("fine_tune", "1.0"),
    ]
    record = json.loads((output / "data" / "record.json").read_text())
    sizes = {subset["fraction"]: subset["structures"] for subset in record["subsets"]}
    for row in rows:
        assert int(row["structures"]) == sizes[float(row["fraction"])]
        assert row["steps"] == "4"
        assert all(float(row[key]) > 0 for key in ("energy_mae", "forces_rmse", "validation_score", "seconds"))
    report = (output / "report.md").read_text()
    for file in ("table.md", "equivalents.md"):
        assert (output / file).read_text().strip().splitlines()[0] in report
    assert "4 optimiser steps for each point" in report
    assert "What is missing" not in report
    assert (output / "learning_curves.svg").stat().st_size > 1000
    assert (output / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_pool_holds_no_composition_that_validates(output):
    def compositions(name):
        source = open_dataset(output / "data" / name)
        groups = arrays_of(source, np.arange(len(source)))
        return {tuple(sorted(row)) for arrays in groups.values() for row in arrays["numbers"].tolist()}

    assert not compositions("validation.h5") & compositions("f1_s0.h5")
    assert compositions("f0.2_s0.h5") < compositions("f1_s0.h5")


@pytest.mark.slow
def test_nothing_is_run_twice(output, sources):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("job.json")}
    done = subprocess.run(command(sources, "-o", output), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("job.json")} == before


def left_to_do(sources, output, *overrides):
    """Names of the points that a study with other settings would have to run again."""
    plan = planned(sources / "study.yaml", output, overrides)
    _, lacking = collect(plan, Workshop(plan.folder))
    return [point.name for point in lacking]


@pytest.mark.slow
def test_a_changed_setting_concerns_only_what_depends_on_it(output, sources):
    fine_tune = [f"fine_tune, fraction {fraction}, replicate 0" for fraction in ("0.2", "1")]
    every = [f"target_only, fraction {fraction}, replicate 0" for fraction in ("0.2", "1")] + fine_tune
    assert left_to_do(sources, output) == []
    settings = "protocols.fine_tune.settings={optimizer.kwargs.weight_decay: 1.0e-4}"
    assert left_to_do(sources, output, settings) == fine_tune
    assert left_to_do(sources, output, "protocols.fine_tune.pretraining_settings={seed: 5}") == fine_tune
    assert left_to_do(sources, output, "steps=8") == every
    assert left_to_do(sources, output, "fractions=[0.2, 0.5, 1.0]", "protocols.fine_tune=null") == [
        "target_only, fraction 0.5, replicate 0"
    ]


@pytest.mark.slow
def test_the_command_lines_reproduce_a_point(output):
    lines = (output / "commands.sh").read_text()
    head, first, *_ = re.split(r"(?m)^(?=# (?:target_only|fine_tune),)", lines)
    assert first.startswith("# target_only, fraction 0.2, replicate 0\n")
    (output / "first.sh").write_text(head + first)
    package = str(Path(aimnet2mult.__file__).parents[1])
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": package, "RUNS": "again"}
    subprocess.run(["bash", str(output / "first.sh")], check=True, capture_output=True, timeout=200, env=environment)
    again, before = (output / name / "target_only" / "f0.2_r0" for name in ("again", "runs"))
    found, expected = (json.loads((path / "lr0.001_test" / "errors.json").read_text()) for path in (again, before))
    for key, values in expected["errors"].items():
        assert found["errors"][key] == pytest.approx(values, rel=1e-5)


@pytest.mark.slow
def test_a_training_run_that_was_stopped_goes_on(sources):
    output, run = sources / "stopped", sources / "stopped" / "runs" / "target_only" / "f1_r0" / "lr0.001"
    settings = ("--output", output, "fractions=[1.0]", "steps=300", "validate_every=5", "protocols={fine_tune: null}")
    process = subprocess.Popen(command(sources, *settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert "Interrupted; the same command goes on." in error
    assert json.loads((run / "job.json").read_text())["status"] == "stopped"
    assert "target_only, fraction 1, replicate 0: no result" in (output / "report.md").read_text()
    done = subprocess.run(command(sources, *settings), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((run / "run" / "run.json").read_text())["sessions"]
    assert first["resumed_from"] is None
    assert re.fullmatch(r".*_last_iter_\d+\.pt", second["resumed_from"])


@pytest.mark.slow
def test_points_without_a_result_are_named(sources):
    """With a learning rate of 1e30 no sensible number comes out; the message says where the log is."""
    output = sources / "failed"
    settings = ("fractions=[1.0]", "protocols={fine_tune: null}", "learning_rates=[1.0e+30]")
    done = subprocess.run(command(sources, "--output", output, *settings), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "1 points have no result" in done.stderr
    assert "target_only, fraction 1, replicate 0" in done.stderr
    assert re.search(r"see .*/lr1e\+30\w*/log\.txt", done.stderr)


def test_dry_run_says_what_it_would_cost(sources):
    output = sources / "dry"
    done = CliRunner().invoke(main, ["-c", str(sources / "study.yaml"), "-o", str(output), "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    for expected in (["pretraining", "1", "2"], ["target_only", "2", "8"], ["fine_tune", "2", "4"], ["all", "5", "14"]):
        assert expected in lines
    assert "points: 4" in done.output
    assert not (output / "runs").exists()


def test_a_protocol_with_fewer_fractions_is_tuned_only_there(sources, tmp_path):
    overrides = ["protocols.fine_tune.fractions=[0.2]", "tune_fractions=[0.2, 1.0]", "learning_rates=[1.0e-3, 2.0e-3]"]
    plan = planned(sources / "study.yaml", tmp_path / "out", overrides)
    assert plan.tune_fractions("target_only") == [0.2, 1.0]
    assert plan.tune_fractions("fine_tune") == [0.2]
    assert [(point.protocol, point.fraction) for point in plan.points] == [
        ("target_only", 0.2),
        ("target_only", 1.0),
        ("fine_tune", 0.2),
    ]


def test_a_protocol_with_other_learning_rates(sources, tmp_path):
    overrides = ["protocols.target_only.learning_rates=[0.5, 0.25]", "learning_rates=[1.0e-3, 2.0e-3]"]
    plan = planned(sources / "study.yaml", tmp_path / "out", overrides)
    names = [job.name for job in plan.jobs() if job.steps]
    assert [name for name in names if ", fraction 1," in name and "rate" in name] == [
        "target_only, fraction 1, replicate 0, learning rate 0.5",
        "target_only, fraction 1, replicate 0, learning rate 0.25",
        "fine_tune, fraction 1, replicate 0, learning rate 0.001",
        "fine_tune, fraction 1, replicate 0, learning rate 0.002",
    ]
    assert len([name for name in names if name.startswith("pretraining") and "rate" in name]) == 2
    page = Report(plan, [], plan.points).write().read_text()
    assert "| protocol | fraction | score at 0.001 | score at 0.002 | score at 0.25 | score at 0.5 |" in page
    assert "| pretraining of fine_tune (loss) |  |  |  |  |  |" in page


def test_data_are_the_same_every_time(sources):
    found = []
    for name in ("first", "second"):
        plan = planned(sources / "study.yaml", sources / name)
        source = open_dataset(plan.folder / plan.data.subset(0.2, 0).file)
        found.append(arrays_of(source, np.arange(len(source))))
    assert found[0].keys() == found[1].keys()
    for n_atoms, arrays in found[0].items():
        for key, values in arrays.items():
            np.testing.assert_array_equal(values, found[1][n_atoms][key])


def test_a_mistake_ends_with_status_2_and_leaves_nothing(sources):
    output = sources / "refused"
    for override, message in (("step=3", "did you mean steps"), ("protocols.fine_tune.settings={seeed: 1}", "seed")):
        done = CliRunner().invoke(main, ["-c", str(sources / "study.yaml"), "-o", str(output), override])
        assert done.exit_code == 2
        assert message in done.output
    assert not output.exists()


def test_a_folder_with_other_files_is_left_alone(sources, tmp_path):
    (tmp_path / "thesis.txt").touch()
    done = CliRunner().invoke(main, ["-c", str(sources / "study.yaml"), "-o", str(tmp_path), "--dry-run"])
    assert done.exit_code == 2
    assert f"{tmp_path}: holds files, but no study; --output needs a new or an empty folder" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_data_that_were_not_written_to_the_end_are_written_again(sources, monkeypatch):
    output = sources / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr("aimnet2mult.study.data.write_structures", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            planned(sources / "study.yaml", output)
    plan = planned(sources / "study.yaml", output)
    assert len(open_dataset(output / plan.data.subset(1.0, 0).file)) > 0


def test_the_report_says_which_protocol_has_another_model(sources, tmp_path):
    shutil.copy(FIXTURES / "ref_single_model.yaml", tmp_path / "other.yaml")
    plan = planned(sources / "study.yaml", tmp_path / "out", [f"protocols.target_only.model={tmp_path / 'other.yaml'}"])
    page = Report(plan, [], plan.points).write().read_text()
    assert "- target_only: target_only; model other.yaml; learning rate 0.001; reference energies plain" in page
    assert page.count("model other.yaml") == 1


def test_other_fidelities_without_the_compositions_of_test_and_validation(sources, tmp_path):
    def compositions(*files):
        source = open_dataset(files)
        groups = arrays_of(source, np.arange(len(source)))
        return {tuple(sorted(row)) for arrays in groups.values() for row in arrays["numbers"].tolist()}

    source = open_dataset([FIXTURES / "tiny_fid0.h5"])
    write_structures(tmp_path / "test.h5", source, np.arange(0, len(source), 6))
    overrides = [f"test={tmp_path / 'test.h5'}", "unseen=true"]
    plan = planned(sources / "study.yaml", tmp_path / "out", overrides)
    (file,) = plan.commands.files["gfn2"]
    left = compositions(plan.folder / file)
    all_of_them = compositions(FIXTURES / "tiny_fid1.h5")
    held_out = compositions(tmp_path / "test.h5") | compositions(plan.folder / "data" / "validation.h5")
    assert all_of_them & held_out
    assert left == all_of_them - held_out
    assert plan.data.others == {"gfn2": len(open_dataset([plan.folder / file]))}
    assert planned(sources / "study.yaml", tmp_path / "out", overrides).data == plan.data
    assert "no molecules of the compositions of validation and test" in Report(plan, [], []).write().read_text()
    (plan.folder / file).unlink()
    planned(sources / "study.yaml", tmp_path / "out", overrides)
    assert (plan.folder / file).is_file()

    with pytest.raises(ValueError, match="unseen: all compositions of gfn2 are among those of test and validation"):
        planned(sources / "study.yaml", tmp_path / "other", [f"test={FIXTURES / 'tiny_fid1.h5'}", "unseen=true"])


def test_delta_without_common_geometries_is_refused(sources, tmp_path):
    import h5py

    shutil.copy(FIXTURES / "tiny_fid1.h5", tmp_path / "moved.h5")
    with h5py.File(tmp_path / "moved.h5", "r+") as file:
        for group in file.values():
            group["coord"][...] += 1.0
    overrides = ["protocols.delta={pretraining: 0.5}", f"fidelities.gfn2.files={tmp_path / 'moved.h5'}"]
    done = CliRunner().invoke(main, ["-c", str(sources / "study.yaml"), "-o", str(tmp_path / "out"), *overrides])
    assert done.exit_code == 2
    assert "dft and gfn2 have no geometries in common" in done.output


def test_test_molecules_with_an_unknown_element_are_refused(sources, tmp_path):
    import h5py

    shutil.copy(FIXTURES / "tiny_fid0.h5", tmp_path / "test.h5")
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        numbers = next(iter(file.values()))["numbers"]
        numbers[0] = 54
    overrides = [f"test={tmp_path / 'test.h5'}"]
    done = CliRunner().invoke(main, ["-c", str(sources / "study.yaml"), "-o", str(tmp_path / "out"), *overrides])
    assert done.exit_code == 2
    assert "have Xe (54), which no molecule to train on has" in done.output
