"""The training command: quick help, one message and exit status 2 for a user's mistake, nothing left behind."""

import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from aimnet2mult.models.base import DEFAULT_MODEL, load_checkpoint
from aimnet2mult.train import cli, loop
from aimnet2mult.train.calc_sae import calc_sae

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = str(FIXTURES / "ref_mixed_model.yaml")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Datasets and SAE files of three fidelities, by name."""
    folder = tmp_path_factory.mktemp("sources")
    for f in range(3):
        shutil.copy(FIXTURES / f"tiny_fid{f}.h5", folder / f"fid{f}.h5")
        calc_sae(folder / f"fid{f}.h5", folder / f"sae{f}.yaml")
    return folder


@pytest.fixture
def folder(sources, tmp_path, monkeypatch):
    """Working folder with the files of ``sources``; the package's log is as before afterwards."""
    for path in sources.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    package, ignite = logging.getLogger("aimnet2mult"), logging.getLogger("ignite")
    before = package.handlers[:], package.level, ignite.level
    yield tmp_path
    package.handlers[:] = before[0]
    package.setLevel(before[1])
    ignite.setLevel(before[2])


def data(count=3):
    return [f"data.fidelity_datasets.{f}=fid{f}.h5" for f in range(count)] + [
        f"data.sae.energy.files.{f}=sae{f}.yaml" for f in range(count)
    ]


def call(*arguments):
    return CliRunner().invoke(cli.main, ["--save", "model.pt", *arguments])


def edit(name, change):
    """Apply ``change(file)`` to an HDF5 file."""
    with h5py.File(name, "r+") as file:
        change(file)


def test_help_is_quick_and_lists_the_options():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "aimnet2mult.train.cli", "--help"], capture_output=True, text=True)
    assert time.monotonic() - start < 1.0  # half a second, on a busy machine
    assert done.returncode == 0
    for word in ("--config", "--model", "--save", "--load", "--verbose", "KEY=VALUE"):
        assert word in done.stdout


def test_help_needs_neither_torch_nor_ignite():
    code = "import sys, aimnet2mult.train.cli; print([m for m in ('torch', 'ignite', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_run_from_a_file_and_overrides(folder):
    (folder / "train.yaml").write_text(
        "run_name: first\n"
        "data:\n"
        "  fidelity_datasets: {0: fid0.h5, 1: fid1.h5, 2: fid2.h5}\n"
        "  sae: {energy: {files: {0: sae0.yaml, 1: sae1.yaml, 2: sae2.yaml}}}\n"
        "trainer: {epochs: 5}\n"
    )
    result = call("--config", "train.yaml", "--model", MODEL, "trainer.epochs=1")
    assert result.exit_code == 0, result.output
    assert load_checkpoint("model.pt")["num_fidelities"] == 3
    assert str(folder / "model.pt") in result.stdout.splitlines()[-1]
    assert (folder / "runs" / "first" / "metrics.csv").is_file()
    again = call(
        "--config", "train.yaml", "--model", MODEL, "--load", "model.pt", "trainer.epochs=1", "run_name=second"
    )
    assert again.exit_code == 0, again.output
    log = (folder / "runs" / "second" / "train.log").read_text()
    assert "weights from model.pt" in log
    assert "rows of fid2" in log


def test_a_run_from_loaded_weights_goes_on(folder):
    """With what a job script that may be started again says, and by --resume alone."""
    common = [*data(2), "--model", MODEL, "report=false", "device=cpu"]
    assert call(*common, "run_name=first", "trainer.epochs=1").exit_code == 0
    start = ["--load", "model.pt", "init_from={fid1: fid0}", "run_name=second", *common]
    for epochs in (1, 2):
        result = call(*start, "--resume", "auto", f"trainer.epochs={epochs}")
        assert result.exit_code == 0, result.output
    result = call("--resume", "runs/second", "trainer.epochs=3")
    assert result.exit_code == 0, result.output
    log = (folder / "runs" / "second" / "train.log").read_text()
    assert log.count("fid1 starts from fid0 (init_from)") == 1
    assert log.count("going on after iteration") == 2
    assert call(*start, "--resume", "runs/second").exit_code == 2


def disagreeing_lengths(folder):
    def change(file):
        group = file["003"]
        energy = group["energy"][:-1]
        del group["energy"]
        group["energy"] = energy

    edit("fid1.h5", change)
    return []


def missing_energy(folder):
    edit("fid1.h5", lambda file: file["003"].pop("energy"))
    return []


def element_not_in_sae(folder):
    lines = (folder / "sae1.yaml").read_text().splitlines()
    (folder / "sae1.yaml").write_text("\n".join(line for line in lines if not line.startswith("35:")) + "\n")
    return []


def energy_is_infinite(folder):
    def change(file):
        file["003"]["energy"][1] = np.inf

    edit("fid0.h5", change)
    return []


def not_hdf5(folder):
    Path("fid1.h5").write_text("molecules")
    return []


def sae_is_a_list(folder):
    Path("sae1.yaml").write_text("- 1\n")
    return []


MISTAKES = {
    "missing dataset": (
        ["data.fidelity_datasets.1=none.h5"],
        "data.fidelity_datasets.1: {folder}/none.h5: no such file",
    ),
    "not HDF5": (not_hdf5, "{folder}/fid1.h5: not an HDF5 file"),
    "lengths disagree": (disagreeing_lengths, "{folder}/fid1.h5: group 003: "),
    "missing energy": (missing_energy, "{folder}/fid1.h5: group 003: "),
    "infinite energy": (energy_is_infinite, "{folder}/fid0.h5: group 003: row 1: energy is inf"),
    "element absent from SAE": (element_not_in_sae, "Br (35)"),
    "SAE is not a mapping": (sae_is_a_list, "sae1.yaml: "),
    "missing SAE file": (
        ["data.sae.energy.files.1=none.yaml"],
        "data.sae.energy.files.1: {folder}/none.yaml: no such file",
    ),
    "gap in fidelities": (["data.fidelity_datasets.4=fid0.h5"], "data.fidelity_datasets: fidelities must be 0..3"),
    "weight without data": (["data.fidelity_weights.3=1"], "data.fidelity_weights: fidelity 3 has no dataset"),
    "negative weight": (["data.fidelity_weights.1=-1"], "data.fidelity_weights.1: expected a weight of 0 or more"),
    "misspelt key": (
        ["data.val_fractoin=0.1"],
        "data.val_fractoin: unknown key (command line); did you mean val_fraction",
    ),
    "wrong type": (["trainer.epochs=many"], "trainer.epochs: expected an integer, found 'many'"),
    "class": (["optimizer.class=torch.optim.RAdan"], "optimizer.class: torch.optim.RAdan: torch.optim has no RAdan"),
    "pattern": (["optimizer.force_no_train=[nothing]"], "optimizer.force_no_train: 'nothing' matches none of the"),
    "settings file": (["--config", "none.yaml"], "none.yaml: no such file"),
    "model file": (["--model", "none.yaml"], "none.yaml: no such file"),
    "checkpoint file": (["--load", "none.pt"], "none.pt: no such file"),
    "another architecture": (
        ["--model", str(DEFAULT_MODEL), "--load", str(FIXTURES / "ref_mixed.pt")],
        "of another architecture",
    ),
    "output folder": (["--save", "none/model.pt"], "{folder}/none/model.pt: cannot be written"),
    "output is a folder": (["--save", "."], "is a folder"),
    "run folder": (["checkpoint.dirname=fid0.h5"], "not a folder"),
    "metric of the plateau": (["scheduler.kwargs.metric_name=E_mse"], "scheduler.kwargs.metric_name: E_mse is not a"),
    "GPU": (["device=cuda:99"], "device: cuda:99 asks for GPU 99"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_leave_nothing(folder, name):
    mistake, message = MISTAKES[name]
    arguments = mistake(folder) if callable(mistake) else mistake
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    result = call(*([] if "--model" in arguments else ["--model", MODEL]), *data(), *arguments)
    assert result.exit_code == 2, result.output
    _, found, error = result.output.partition("Error: ")
    assert found
    assert message.format(folder=folder) in error
    assert "Traceback" not in result.output
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_print_config_prints_settings_that_load_again(folder):
    overrides = [
        "checkpoint.monitor={fid0/F_mae: 1.0, loss: 0.5}",
        "scheduler.class=torch.optim.lr_scheduler.CosineAnnealingLR",
        "scheduler.kwargs={T_max: total}",
        "loss.kwargs.components.spin_charges=null",
        "wandb.log_frequency.train=7",
        "run_name=1e5",
    ]
    before = sorted(folder.iterdir())
    first = CliRunner().invoke(cli.main, ["--print-config", *data(), *overrides])
    assert first.exit_code == 0, first.output
    assert first.stderr == ""
    assert sorted(folder.iterdir()) == before
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "train.yaml").write_text(first.stdout)
    again = CliRunner().invoke(cli.main, ["--print-config", "--config", "elsewhere/train.yaml"])
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    settings = yaml.safe_load(first.stdout)
    assert settings["data"]["fidelity_datasets"][1] == [str(folder / "fid1.h5")]
    assert settings["scheduler"]["kwargs"] == {"T_max": "total"}
    assert list(settings["loss"]["kwargs"]["components"]) == ["energy", "forces", "charges"]
    assert (settings["run_name"], settings["log_frequency"]["train"]) == ("1e5", 7)
    changed = CliRunner().invoke(cli.main, ["--print-config", "--config", "elsewhere/train.yaml", "trainer.epochs=3"])
    differing = [line for line in changed.stdout.splitlines() if line not in first.stdout.splitlines()]
    assert differing == ["  epochs: 3"]


def test_without_save_the_model_lies_in_the_folder_of_the_run(folder):
    result = CliRunner().invoke(
        cli.main, ["--model", MODEL, *data(1), "trainer.epochs=1", "run_name=r", "report=false"]
    )
    assert result.exit_code == 0, result.output
    assert load_checkpoint(folder / "runs" / "r" / "model.pt")["num_fidelities"] == 1


def test_interruption_saves_and_ends_with_status_130(folder, monkeypatch):
    validate, calls = loop.evaluate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return validate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    result = call("--model", MODEL, *data(1), "report=false")
    assert result.exit_code == 130, result.output
    assert load_checkpoint("model.pt")["progress"]["epoch"] in (1, 2)


def test_interruption_at_once_ends_with_status_130(folder, monkeypatch):
    """As the second Ctrl-C, or one before the training."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "run_epoch", interrupted)
    result = call("--model", MODEL, *data(1), "report=false")
    assert (result.exit_code, "Interrupted." in result.stderr) == (130, True)
    assert not Path("model.pt").exists()


def test_a_missing_package_is_named_with_the_remedy(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "aimnet2mult.train.runner", None)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "aimnet2mult.train.runner":
                raise ModuleNotFoundError("No module named 'ignite'", name="ignite")

    monkeypatch.delitem(sys.modules, "aimnet2mult.train.runner")
    monkeypatch.delattr(sys.modules["aimnet2mult.train"], "runner")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    result = call("--model", MODEL, *data(1))
    assert result.exit_code == 2
    assert 'needs the package ignite, which is not installed: pip install "aimnet2mult[train]"' in result.output
