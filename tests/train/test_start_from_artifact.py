"""Training that starts from a model of the AIMNet2 ecosystem: its rows, its energies, its charge channels."""

import copy
import logging
import shutil

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.models.base import build_model, load_checkpoint, save_checkpoint
from aimnet2mult.models.loading import load_potential
from aimnet2mult.tools.export import export_model
from aimnet2mult.train import cli
from aimnet2mult.train.calc_sae import calc_sae
from aimnet2mult.train.energy_offsets import fit_offsets
from aimnet2mult.train.fidelity_specific_utils import start_from_checkpoint

NAMES = {0: "dft", 1: "gfn2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, fixtures_dir):
    """Data of two fidelities with self-atomic energies, and an artifact."""
    folder = tmp_path_factory.mktemp("start")
    for f in NAMES:
        shutil.copy(fixtures_dir / f"tiny_fid{f}.h5", folder / f"fid{f}.h5")
        calc_sae(folder / f"fid{f}.h5", folder / f"sae{f}.yaml")
    shutil.copy(fixtures_dir / "peer_v2_lr.pt", folder / "published.pt")
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    sae = {f: yaml.safe_load((folder / f"sae{f}.yaml").read_text()) for f in NAMES}
    return MixedFidelityDataset({f: folder / f"fid{f}.h5" for f in NAMES}, sae=sae)


@pytest.fixture(scope="module")
def published(folder):
    return load_checkpoint(folder / "published.pt")


def start(checkpoint, dataset, config=None, names=NAMES):
    """A model that was started, and the lines for the log."""
    config = checkpoint["model_config"] if config is None else config
    torch.manual_seed(3)
    model = build_model(copy.deepcopy(config), len(names))
    lines = start_from_checkpoint(model, checkpoint, config, dataset, np.arange(len(dataset)), names, {})
    return model.eval(), lines


def residual_errors(model, dataset, fidelity):
    """RMSE of residual energies, and that without offsets per element."""
    differences, numbers = [], []
    for i in np.flatnonzero(dataset.fidelities == fidelity):
        sample = dataset[int(i)]
        batch = {key: torch.as_tensor(sample[key])[None] for key in ("coord", "numbers", "charge", "mult")}
        batch["_fidelities"] = torch.tensor([fidelity])
        with torch.no_grad():
            differences.append(float(sample["energy"]) - float(model(batch)["energy"]))
        numbers.append(np.asarray(sample["numbers"])[None] - 200 * fidelity)
    differences = np.array(differences)
    return np.sqrt(np.mean(differences**2)), np.sqrt(np.mean(fit_offsets(differences, numbers).rest ** 2))


def test_rows_start_every_fidelity_and_energies_start_at_the_residuals(published, dataset):
    model, lines = start(published, dataset)
    rows = published["model"]["afv.weight"]
    for f in NAMES:
        for z in (1, 6, 7, 8, 17, 35):
            torch.testing.assert_close(model.afv.weight[z + 200 * f], rows[z], rtol=0, atol=0)
        error, best = residual_errors(model, dataset, f)
        # All molecules are among those that offsets were fitted to.
        assert error == pytest.approx(best, rel=1e-4)
        shifts = model.fidelity_readouts[f]["atomic_shift"].shifts.weight
        # Nothing is left of self-atomic energies, which are -1e3 eV and more for DFT.
        assert shifts.abs().max() < 50.0
    text = "\n".join(lines)
    assert "dft starts from fid0 (the only one of the checkpoint)" in text
    assert "shifts that were learned on top of them, are taken out" in text
    assert "gfn2: offsets per element fitted to 200 molecules, RMSE of energies" in text


def test_known_self_atomic_energies_are_taken_out_exactly(published, dataset, folder, tmp_path):
    weights = dict(published["model"])
    key = "outputs.atomic_shift.shifts.weight"
    weights[key] = torch.linspace(-1.0, 1.0, 64).unsqueeze(1)
    sae = {z: -1000.0 - z / 7.0 for z in published["species"][0]}
    save_checkpoint(
        tmp_path / "own.pt",
        weights,
        model_config=published["model_config"],
        num_fidelities=1,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        sae={0: sae},
        species=published["species"],
    )
    export_model(tmp_path / "own.pt", tmp_path / "own_v2.pt")
    again = load_checkpoint(tmp_path / "own_v2.pt")
    assert again["sae"] == {0: sae}
    for z in sae:
        assert torch.equal(again["model"][key][z], weights[key][z]), z
    model, lines = start(again, dataset)
    for f in NAMES:
        found = model.fidelity_readouts[f]["atomic_shift"].shifts.weight[6 + 200 * f]
        assert torch.equal(found, weights[key][6])
    assert not any("taken out" in line for line in lines)


def test_one_channel_grows_to_two(published, dataset):
    config = copy.deepcopy(published["model_config"])
    config["kwargs"]["num_charge_channels"] = 2
    model, lines = start(published, dataset, config)
    assert any("one charge channel becomes two" in line for line in lines)
    assert model.conv_q.agh.shape[0] == 2
    sample = dataset[0]
    batch = {key: torch.as_tensor(sample[key])[None] for key in ("coord", "numbers", "charge", "mult")}
    batch["mult"] = torch.ones(1)
    with torch.no_grad():
        out = model({**batch, "_fidelities": torch.tensor([0])})
    assert out["spin_charges"].abs().max() < 1e-6


def test_two_channels_do_not_shrink_to_one(dataset, fixtures_dir):
    checkpoint = load_checkpoint(fixtures_dir / "ref_single.pt")
    config = yaml.safe_load((fixtures_dir / "ref_single_model.yaml").read_text())
    config["kwargs"]["num_charge_channels"] = 1
    with pytest.raises(ValueError, match=r"conv_q.agh is \(2, 12, 6\) in the checkpoint and \(1, 12, 6\) in the model"):
        start(checkpoint, dataset, config)


def test_without_labels_or_shifts_it_says_so(published, dataset, folder, tmp_path):
    import h5py

    shutil.copy(folder / "fid1.h5", tmp_path / "fid1.h5")
    with h5py.File(tmp_path / "fid1.h5", "r+") as file:
        for group in file.values():
            group["energy"][:] = np.nan
    no_energies = MixedFidelityDataset({0: tmp_path / "fid1.h5"})
    model, lines = start(published, no_energies, names={0: "forces_only"})
    assert "forces_only: no energy labels to fit offsets per element to; they start at zero" in lines
    assert not model.outputs["atomic_shift"].shifts.weight.any()

    config = copy.deepcopy(published["model_config"])
    del config["kwargs"]["outputs"]["atomic_shift"]
    _, lines = start(published, dataset, config)
    assert any("the model has no atomic shifts" in line for line in lines)


@pytest.fixture
def working_folder(folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    package, ignite = logging.getLogger("aimnet2mult"), logging.getLogger("ignite")
    before = package.handlers[:], package.level, ignite.level
    yield tmp_path
    package.handlers[:] = before[0]
    package.setLevel(before[1])
    ignite.setLevel(before[2])


def test_a_run_takes_the_model_of_the_artifact(working_folder):
    result = CliRunner().invoke(
        cli.main,
        [
            *("--load", "published.pt", "--save", "model.pt"),
            *(f"data.fidelities.{name}.files=fid{f}.h5" for f, name in NAMES.items()),
            *(f"data.fidelities.{name}.sae=sae{f}.yaml" for f, name in NAMES.items()),
            *("trainer.epochs=1", "checkpoint.dirname=run", "data.samplers.train.kwargs.batches_per_epoch=2"),
            "loss.kwargs.components.spin_charges=null",
        ],
    )
    assert result.exit_code == 0, result.output
    trained = load_checkpoint("model.pt")
    assert trained["model_config"] == load_checkpoint("published.pt")["model_config"]
    assert "sae_with_shifts" not in trained
    log = next((working_folder / "run").glob("*.log")).read_text()
    assert "model: as in published.pt" in result.output
    assert "offsets per element fitted" in log
    # The new model is a potential of either level, and goes back to format 2.
    data = {"coord": torch.tensor([[[0.0, 0, 0], [0, 0, 1.1]]]), "numbers": torch.tensor([[6, 8]])}
    energy = load_potential("model.pt", fidelity="gfn2")(data)["energy"]
    export_model("model.pt", "gfn2.pt", fidelity_level="gfn2")
    torch.testing.assert_close(load_potential("gfn2.pt")(data)["energy"], energy, rtol=0, atol=1e-5)


def test_a_file_that_is_no_model_is_refused(working_folder):
    (working_folder / "text.pt").write_text("not a model")
    data = ["data.fidelities.dft.files=fid0.h5", "data.fidelities.dft.sae=sae0.yaml"]
    result = CliRunner().invoke(cli.main, ["--load", "text.pt", *data])
    assert result.exit_code == 2
    assert "text.pt: not a checkpoint that can be loaded safely" in result.output.replace("\n", " ")
    assert not (working_folder / "runs").exists()
