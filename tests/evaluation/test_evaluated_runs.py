"""The folder of a run: its best checkpoint and the molecules it validated with."""

import json
import shutil

import numpy as np
import pytest

from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sgdataset import fingerprint, open_dataset
from aimnet2mult.data.splits import save_split, split_indices
from aimnet2mult.evaluation.run_folder import checkpoint_of_run, validation_molecules

NAMES = {0: "dft", 1: "gfn2", 2: "gfn1"}


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (
            [
                "r_epoch_0003_iter_0000300_loss_0.400000.pt",
                "r_epoch_0012_iter_0001200_loss_0.100000.pt",
                "r_epoch_0013_iter_0001300_loss_0.200000.pt",
                "r_last_iter_000001310.pt",
                ".r_epoch_0013_iter_0001300_loss_0.010000.1-a.pt",
                "other.pt",
            ],
            1,
        ),
        (["r_epoch_0001_iter_0000001_dft_E_mae_-1.5e-03.pt", "r_epoch_0001_iter_0000002_dft_E_mae_0.1.pt"], 0),
        (["r_epoch_0001_iter_0000100.pt", "r_epoch_0002_iter_0000200.pt", "r_last_iter_000000150.pt"], 1),
        (["r_epoch_0001_iter_0000100_dft_e.pt", "r_epoch_0002_iter_0000200_-.pt"], 1),  # no scores in these
        (["r_last_iter_000000150.pt", "_last_iter_000000250.pt"], 1),
    ],
)
def test_checkpoint_of_run(tmp_path, names, best):
    for name in names:
        (tmp_path / name).touch()
    assert checkpoint_of_run(tmp_path).name == names[best]


def test_model_that_the_run_saved_comes_first(tmp_path):
    for name in ("model.pt", "r_epoch_0003_iter_0000300_loss_0.400000.pt"):
        (tmp_path / name).touch()
    assert checkpoint_of_run(tmp_path).name == "model.pt"


def test_folder_without_checkpoints(tmp_path):
    (tmp_path / "other.pt").touch()
    with pytest.raises(FileNotFoundError, match="no checkpoint of a training run"):
        checkpoint_of_run(tmp_path)


@pytest.fixture
def run(tmp_path, datasets):
    """What a run writes about its data; gfn2 has a file of its own for validation."""
    files = {f: tmp_path / path.name for f, path in enumerate(datasets)}
    for f, path in files.items():
        shutil.copy(datasets[f], path)
    sources = {f: open_dataset(path) for f, path in files.items()}
    dataset = MixedFidelityDataset(sources)
    _, held_out = split_indices(dataset, 0.2, 0, fidelities=[0, 2])
    folder = tmp_path / "run"
    folder.mkdir()
    save_split(folder / "split.npz", dataset, held_out, val_fraction=0.2, seed=0, names=NAMES)
    record = {
        name: {
            "fidelity": f,
            "files": fingerprint(sources[f]),
            "val_files": fingerprint(sources[1]) if f == 1 else None,
        }
        for f, name in NAMES.items()
    }
    (folder / "data.json").write_text(json.dumps({"fidelities": dict(reversed(record.items()))}))
    return folder, dataset, held_out


def test_validation_molecules(run):
    folder, dataset, held_out = run
    found = validation_molecules(folder)
    assert [part.name for part in found] == ["dft", "gfn2", "gfn1"]
    apart = dataset.by_fidelity(held_out)
    for f in (0, 2):
        assert found[f].indices.tolist() == apart[f].tolist()
        assert len(found[f].indices) > 0
    assert found[1].indices.tolist() == list(range(len(dataset.datasets[1])))


def test_data_that_are_others_now_are_refused(run, datasets):
    folder, dataset, _ = run
    file = dataset.datasets[2].files[0]
    shutil.copy(datasets[1], file)
    with pytest.raises(
        ValueError, match=r"fid2\.h5: not the data of the run .* any more; name the datasets with --data"
    ):
        validation_molecules(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"fid2\.h5: no such file, but the run"):
        validation_molecules(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"fidelities": {"dft": 3}}', '{"fidelities": {"dft": {"fidelity": 0}}}']
)
def test_damaged_record(run, content):
    folder, *_ = run
    (folder / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json: not the record of a run's data"):
        validation_molecules(folder)


def test_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.json: no such file; .*--data"):
        validation_molecules(tmp_path)


def test_run_without_validation(run):
    folder, dataset, _ = run
    save_split(folder / "split.npz", dataset, np.array([], int), val_fraction=0.0, seed=0, names=NAMES)
    record = json.loads((folder / "data.json").read_text())
    record["fidelities"]["gfn2"]["val_files"] = None
    (folder / "data.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="had no validation molecules"):
        validation_molecules(folder)
