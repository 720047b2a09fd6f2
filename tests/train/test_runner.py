"""Training runs on the small three-fidelity dataset, from the settings to the saved model."""

import csv
import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from aimnet2mult.data.collate import collate
from aimnet2mult.data.ledger import D3Correction, parse_dispersion
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sae import load_sae
from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset
from aimnet2mult.data.splits import load_split, split_indices
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import build_model, load_checkpoint, load_model_config, load_weights
from aimnet2mult.models.mixed_fidelity_aimnet2 import MixedFidelityAIMNet2
from aimnet2mult.modules import Forces
from aimnet2mult.train import loop, runner
from aimnet2mult.train.build import build_loss, build_network
from aimnet2mult.train.calc_sae import calc_sae
from aimnet2mult.train.configuration import load_config
from aimnet2mult.train.data import build_data, build_loaders
from aimnet2mult.train.resume import Job
from aimnet2mult.train.runner import run_training

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = FIXTURES / "ref_mixed_model.yaml"
KCAL = 23.060548
EPOCHS = 12
END = 144  # steps in so many epochs


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """SAE file of each fidelity."""
    folder = tmp_path_factory.mktemp("sae")
    for f in range(3):
        calc_sae(FIXTURES / f"tiny_fid{f}.h5", folder / f"sae{f}.yaml")
    return [folder / f"sae{f}.yaml" for f in range(3)]


def settings(sae, folder, *overrides, fidelities=3):
    common = [f"data.fidelity_datasets.{f}={FIXTURES / f'tiny_fid{f}.h5'}" for f in range(fidelities)]
    common += [f"data.sae.energy.files.{f}={sae[f]}" for f in range(fidelities)]
    common += [
        "data.samplers.train.kwargs.batch_size=512",
        "optimizer.kwargs.lr=5e-3",
        "trainer.epochs=2",
        "device=cpu",
        "report=false",  # takes longer than the training
    ]
    return load_config(None, [*common, f"checkpoint.dirname={folder / 'run'}", "run_name=r", *overrides])


def train(sae, folder, *overrides, fidelities=3, load=None):
    job = Job(settings(sae, folder, *overrides, fidelities=fidelities), load_model_config(MODEL))
    return run_training(job, folder / "model.pt", load)


def validations(result):
    """Lines of the history that come from a validation."""
    return [record for record in result.records if any(key.startswith("val/") for key in record)]


def restored(path):
    """The model of a checkpoint, from what the checkpoint says alone."""
    content = load_checkpoint(path)
    model = build_model(
        content["model_config"], content["num_fidelities"], content["fidelity_offset"], content["use_fidelity_readouts"]
    )
    load_weights(model, content["model"])
    return content, model.eval()


@pytest.fixture(scope="module")
def mixed(sae, tmp_path_factory):
    """A run on three fidelities, of some hundred steps."""
    more = [f"trainer.epochs={EPOCHS}", "data.samplers.train.kwargs.batch_size=256", "optimizer.class=torch.optim.Adam"]
    return train(sae, tmp_path_factory.mktemp("mixed"), *more, "log_frequency.train=3", "report=true")


@pytest.fixture(scope="module")
def single(sae, tmp_path_factory):
    """A run on one dataset."""
    return train(sae, tmp_path_factory.mktemp("single"), fidelities=1)


# --------------------------------------------------------------------------------------------------
# what a run gives
# --------------------------------------------------------------------------------------------------


def test_errors_fall_for_every_fidelity(mixed):
    first = validations(mixed)[0]
    best = next(record for record in validations(mixed) if record["iteration"] == mixed.iteration)
    for f in range(3):
        key = f"val/fid{f}/E_rmse"
        assert best[key] < 0.75 * first[key], key
    assert best["val/F_rmse"] < 0.95 * first["val/F_rmse"]
    assert best["train_mean/loss"] < 0.5 * validations(mixed)[1]["train_mean/loss"]


def test_labels_that_a_fidelity_lacks_are_not_reported(mixed):
    names = set(validations(mixed)[0])
    assert "val/fid0/s_mae" in names
    assert not {"val/fid1/s_mae", "val/fid2/s_mae", "val/fid2/F_rmse", "val/fid2/q_mae"} & names


def test_saved_model_is_the_best_one_and_its_errors_are_those_of_a_few_lines_of_numpy(mixed, sae):
    best = min(validations(mixed)[1:], key=lambda record: record["val/loss"])
    content, model = restored(mixed.path)
    assert isinstance(model, MixedFidelityAIMNet2)
    assert mixed.iteration == best["iteration"] == content["progress"]["iteration"]

    dataset = MixedFidelityDataset(
        {f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)}, dict(enumerate(map(load_sae, sae)))
    )
    _, held_out = split_indices(dataset, 0.1, seed=0)
    x, y = collate(dataset.__getitems__(held_out.tolist()))
    predicted = Forces(model).eval()(x)
    error = (predicted["energy"] - y["energy"]).detach().numpy() * KCAL
    for f in range(3):
        mine = error[dataset.fidelities[held_out] == f]
        assert np.abs(mine).mean() == pytest.approx(best[f"val/fid{f}/E_mae"], rel=1e-4)
        assert np.sqrt((mine**2).mean()) == pytest.approx(best[f"val/fid{f}/E_rmse"], rel=1e-4)
    has_forces = (y["forces_mask"][:, None] & (x["numbers"] > 0)).numpy()
    error = ((predicted["forces"] - y["forces"]).detach().numpy() * KCAL)[has_forces]
    assert np.abs(error).mean() == pytest.approx(best["val/F_mae"], rel=1e-4)


def test_checkpoint_says_what_it_was_trained_on(mixed, sae):
    content, _ = restored(mixed.path)
    assert content["num_fidelities"] == 3
    assert content["fidelity_names"] == {f: f"fid{f}" for f in range(3)}
    assert not content.get("dispersion")  # fidelities without names state nothing
    assert content["sae"] == {f: load_sae(sae[f]) for f in range(3)}
    assert content["species"][0] == [1, 6, 7, 8, 9, 14, 15, 16, 17, 35]
    assert content["train_config"]["optimizer"]["kwargs"]["lr"] == 5e-3


def test_folder_of_a_run(mixed):
    names = sorted(path.name for path in mixed.folder.iterdir())
    checkpoints = [name for name in names if name.endswith(".pt")]
    assert [name for name in names if name not in checkpoints] == [
        "data.json",
        "metrics.csv",
        "metrics.jsonl",
        "model.yaml",
        "report",
        "run.json",
        "split.npz",
        "timing.jsonl",
        "train.log",
        "train.yaml",
    ]
    assert [name for name in checkpoints if "_last_" in name] == [
        "r_last_iter_000000000.pt",
        f"r_last_iter_{END:09d}.pt",
    ]
    checkpoints = [name for name in checkpoints if "_loss_" in name]
    losses = sorted(record["val/loss"] for record in validations(mixed)[1:])[:3]
    assert sorted(float(name.removesuffix(".pt").split("_")[-1]) for name in checkpoints) == pytest.approx(
        losses, abs=1e-6
    )
    assert load_config(mixed.folder / "train.yaml").optimizer.kwargs["lr"] == 5e-3


def test_histories_agree_and_log_tells_the_whole_run(mixed):
    lines = [json.loads(line) for line in (mixed.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == mixed.records
    assert [line["epoch"] for line in validations(mixed)] == list(range(EPOCHS + 1))
    assert [line["iteration"] for line in lines if "train/loss" in line] == list(range(3, END + 1, 3))
    with open(mixed.folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("val/loss", "train/loss"):
        assert [row[name] and float(row[name]) for row in rows] == [line.get(name, "") for line in lines]
    log = (mixed.folder / "train.log").read_text()
    for sentence in (
        "fid2: 200 molecules, 180 for training, 20 for validation",
        "labels: energy 200 of 200, forces 0 of 200, charges 0 of 200, spin_charges 0 of 200",
        "the labels contain unknown dispersion",
        "training batches",
        "kcal/mol/Å",
        f"iteration 3/{END}, loss",
        "model of epoch",
    ):
        assert sentence in log


def test_every_epoch_has_as_many_iterations_as_it_has_batches(mixed, sae, tmp_path):
    config = settings(sae, tmp_path, "data.samplers.train.kwargs.batch_size=256")
    data = build_data(config)
    loader, _ = build_loaders(config, data, torch.device("cpu"))
    ends = [0]
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        ends.append(ends[-1] + len(loader))
    assert [record["iteration"] for record in validations(mixed)] == ends


def test_one_dataset_trains_a_plain_model(single):
    content, model = restored(single.path)
    assert type(model) is AIMNet2
    assert content["num_fidelities"] == 1
    assert "afv.weight" in content["model"]
    assert not any(key.startswith("fidelity_readouts") for key in content["model"])
    assert set(content["sae"]) == {0}


def test_runs_repeat_bit_by_bit(single, sae, tmp_path):
    again = train(sae, tmp_path, fidelities=1)
    first, second = load_checkpoint(single.path)["model"], load_checkpoint(again.path)["model"]
    assert all(torch.equal(first[key], second[key]) for key in first)
    (tmp_path / "other").mkdir()
    other = load_checkpoint(train(sae, tmp_path / "other", "seed=1", fidelities=1).path)["model"]
    assert not torch.equal(first["afv.weight"], other["afv.weight"])


def test_load_starts_a_mixed_model_where_a_single_one_stood(single, sae, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="aimnet2mult"):
        result = train(sae, tmp_path, "trainer.epochs=1", load=single.path)
    best = min(record["val/E_rmse"] for record in validations(single)[1:] if record["iteration"] == single.iteration)
    assert validations(result)[0]["val/fid0/E_rmse"] == pytest.approx(best, rel=1e-5)
    assert "fid1 starts from fid0 (the only one of the checkpoint)" in caplog.text


# --------------------------------------------------------------------------------------------------
# fidelities with names
# --------------------------------------------------------------------------------------------------

B3LYP = {"d3bj": "b3lyp"}


def named_settings(sae, folder, *overrides, order=("dft", "gfn2"), **changes):
    """Settings of two named fidelities in the given order."""
    entries = {
        "dft": {"files": str(FIXTURES / "tiny_fid0.h5"), "sae": str(sae[0]), "weight": 2, "level": "B3LYP/def2-SVP"},
        "gfn2": {"files": str(FIXTURES / "tiny_fid1.h5"), "sae": str(sae[1]), "dispersion": {"d4": "gfn2"}},
    }
    folder.mkdir(exist_ok=True)
    fidelities = {name: {**entries.get(name, {}), **changes.get(name, {})} for name in order}
    (folder / "train.yaml").write_text(yaml.safe_dump({"data": {"fidelities": fidelities}}, sort_keys=False))
    common = ["trainer.epochs=1", "data.samplers.train.kwargs.batch_size=1024"]
    common += ["device=cpu", "run_name=r", "report=false"]
    return load_config(folder / "train.yaml", [*common, f"checkpoint.dirname={folder / 'run'}", *overrides])


def train_named(sae, folder, *overrides, load=None, **options):
    config = named_settings(sae, folder, *overrides, **options)
    return run_training(Job(config, load_model_config(MODEL)), folder / "model.pt", load)


@pytest.fixture(scope="module")
def named(sae, tmp_path_factory):
    """A run on two fidelities with names, validated by composition."""
    return train_named(sae, tmp_path_factory.mktemp("named"), "data.val_split_by=composition")


def test_names_are_in_metrics_log_and_checkpoint(named):
    assert {"val/dft/E_mae", "val/gfn2/F_rmse"} <= set(validations(named)[0])
    assert not any("fid0" in key for record in validations(named) for key in record)
    log = (named.folder / "train.log").read_text()
    assert "dft (B3LYP/def2-SVP): 160 molecules" in log
    assert "D4 of gfn2" in log
    content = load_checkpoint(named.path)
    assert content["fidelity_names"] == {0: "dft", 1: "gfn2"}
    assert content["fidelity_levels"] == {0: "B3LYP/def2-SVP"}
    assert content["dispersion"][1]["labels"]["method"] == "d4"


def test_data_of_a_run_are_written_with_it(named):
    record = json.loads((named.folder / "data.json").read_text())
    dft = record["fidelities"]["dft"]
    assert dft["molecules"] == 160
    assert dft["train"] + dft["validation"] == 160
    assert dft["files"][0]["molecules"] == 160
    assert dft["labels"]["forces"] == {"molecules": 160, "missing": 0, "exact": True}
    shares = record["sampling"]["fidelities"]
    assert shares["dft"]["draws"] == 2 * dft["train"]
    assert shares["gfn2"]["realised_share"] == pytest.approx(shares["gfn2"]["asked_share"], abs=1e-12)
    assert record["sampling"]["padding"] <= 0.1


def test_split_of_a_run_is_written_and_keeps_compositions_together(named, sae):
    dataset = MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(2)})
    train, val, record = load_split(named.folder / "split.npz", dataset, {0: "dft", 1: "gfn2"})
    assert record["by"] == "composition"
    np.testing.assert_array_equal(val, split_indices(dataset, 0.1, 0, "composition")[1])

    def formulas(indices):
        samples = dataset.__getitems__(indices.tolist())
        return {tuple(sorted(s["numbers"] % 200)) for s in samples}

    assert not formulas(train) & formulas(val)


def test_load_finds_fidelities_by_name_whatever_their_order(named, sae, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="aimnet2mult"):
        result = train_named(
            sae, tmp_path / "new", "data.val_split_by=composition", order=("gfn2", "dft"), load=named.path
        )
    best = next(record for record in validations(named) if record["iteration"] == named.iteration)
    for name in ("dft", "gfn2"):
        assert validations(result)[0][f"val/{name}/E_mae"] == pytest.approx(best[f"val/{name}/E_mae"], rel=1e-5)
    assert "gfn2 starts from gfn2 (the same name)" in caplog.text


def test_load_says_which_fidelity_is_new_and_when_no_name_is_common(named, sae, tmp_path, caplog):
    pm7 = {"files": str(FIXTURES / "tiny_fid2.h5"), "sae": str(sae[2])}
    data = build_data(named_settings(sae, tmp_path, order=("pm7", "gfn2", "dft"), pm7=pm7))
    checkpoint = load_checkpoint(named.path)

    def built(names):
        chosen = dataclasses.replace(data, fidelities=dict(zip(names, data.fidelities.values(), strict=True)))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="aimnet2mult"):
            return build_network(settings(sae, tmp_path), load_model_config(MODEL), chosen, named.path)

    model = built(["pm7", "gfn2", "dft"])
    for f, source in {0: 0, 1: 1, 2: 0}.items():
        rows = model.state_dict()["afv.weight"][200 * f + 1 : 200 * f + 10]
        assert torch.equal(rows, checkpoint["model"]["afv.weight"][200 * source + 1 : 200 * source + 10])
    assert "pm7 starts from " in caplog.text
    assert "dft starts from dft (the same name)" in caplog.text


def test_fidelity_without_labels_is_pointed_out(sae, tmp_path, caplog):
    source = SizeGroupedDataset(FIXTURES / "tiny_fid2.h5")
    groups = {a["numbers"].shape[1]: a for _, a in source.chunks(("coord", "numbers", "charge", "energy"))}
    for arrays in groups.values():
        arrays["energy"][:] = np.nan
    write_dataset(tmp_path / "empty.h5", groups)
    config = settings(sae, tmp_path, f"data.fidelity_datasets.2={tmp_path / 'empty.h5'}")
    with caplog.at_level(logging.WARNING, logger="aimnet2mult"):
        build_loss(config, build_data(config))
    assert "fid2: no molecule has a label that the loss uses" in caplog.text
    assert "fid1: no molecule has a label" not in caplog.text


def test_loss_component_of_which_all_labels_are_nan_is_pointed_out(sae, tmp_path, caplog):
    source = SizeGroupedDataset(FIXTURES / "tiny_fid0.h5")
    groups = {a["numbers"].shape[1]: a for _, a in source.chunks(sorted(source.keys))}
    for arrays in groups.values():
        arrays["forces"][:] = np.nan
    write_dataset(tmp_path / "without_forces.h5", groups)
    config = settings(sae, tmp_path, f"data.fidelity_datasets.0={tmp_path / 'without_forces.h5'}", fidelities=1)
    with caplog.at_level(logging.WARNING, logger="aimnet2mult"):
        build_loss(config, build_data(config))
    assert "loss component forces: no dataset has the label forces, it is always zero" in caplog.text


def test_caches_of_dispersion_are_looked_at_once(sae, tmp_path, caplog):
    shutil.copy(FIXTURES / "tiny_fid0.h5", tmp_path / "data.h5")
    options = {"files": str(tmp_path / "data.h5"), "dispersion": B3LYP, "subtract_dispersion": True}
    with caplog.at_level(logging.INFO, logger="aimnet2mult.data.ledger"):
        build_data(named_settings(sae, tmp_path, dft=options))
        build_data(named_settings(sae, tmp_path, dft=options))
    assert caplog.text.count("computing the dispersion") == 1
    assert caplog.text.count("dispersion from") == 1


def test_shares_by_name_are_what_is_drawn(sae, tmp_path):
    key = "data.samplers.train.kwargs"
    shares = [f"{key}.sampling_strategy=shares", f"{key}.shares={{gfn2: 0.2, dft: 0.8}}", "data.val_fraction=0.1"]
    config = named_settings(sae, tmp_path, *shares, dft={"weight": 1})
    data = build_data(config)
    loader, _ = build_loaders(config, data, torch.device("cpu"))
    drawn = np.bincount([f for x, _ in loader for f in x["_fidelities"].tolist()])
    assert drawn.tolist() == [259, 65]  # of 144 + 180 molecules
    assert data.record["sampling"]["fidelities"]["dft"]["draws"] == 259


def test_several_files_are_one_fidelity(sae, tmp_path):
    source = SizeGroupedDataset(FIXTURES / "tiny_fid0.h5")
    for part in range(2):
        groups = {}
        for _, arrays in source.chunks(sorted(source.keys)):
            if rows := len(arrays["energy"][part::2]):
                groups[arrays["numbers"].shape[1]] = {key: values[part::2] for key, values in arrays.items()}
                assert rows
        write_dataset(tmp_path / f"part{part}.h5", groups)
    parts = build_data(named_settings(sae, tmp_path, dft={"files": "part*.h5"}))
    whole = build_data(named_settings(sae, tmp_path))
    assert len(parts.train) == len(whole.train)
    assert parts.train.species == whole.train.species
    assert len(parts.record["fidelities"]["dft"]["files"]) == 2


def test_dispersion_is_subtracted_where_that_is_asked(sae, tmp_path):
    options = {"dispersion": B3LYP, "subtract_dispersion": True, "val_files": str(FIXTURES / "tiny_fid0.h5")}
    corrected = build_data(named_settings(sae, tmp_path, "data.dispersion_cache=none", dft=options))
    plain = build_data(named_settings(sae, tmp_path, dft={"val_files": str(FIXTURES / "tiny_fid0.h5")}))
    correction = D3Correction(parse_dispersion(B3LYP, "x").parameters)
    for a, b in ((corrected.train, plain.train), (corrected.val, plain.val)):
        for index in (0, 50, 159):
            without, with_d3 = a[index], b[index]
            energy, forces = correction.energy_and_forces(with_d3["coord"][None], with_d3["numbers"][None])
            assert energy[0] < 0
            assert without["energy"] == pytest.approx(with_d3["energy"] - energy[0], abs=1e-9)
            np.testing.assert_allclose(without["forces"], with_d3["forces"] - forces[0], atol=2e-6)
        np.testing.assert_array_equal(a[200]["forces"], b[200]["forces"])


def test_cheap_checks_speak_before_training(sae, tmp_path, caplog):
    source = SizeGroupedDataset(FIXTURES / "tiny_fid0.h5")
    groups = {a["numbers"].shape[1]: a for _, a in source.chunks(sorted(source.keys))}
    groups[9]["mult"][3] += 1
    write_dataset(tmp_path / "odd.h5", groups)
    with caplog.at_level(logging.WARNING, logger="aimnet2mult"):
        build_data(named_settings(sae, tmp_path, dft={"files": "odd.h5"}))
    assert "odd.h5: group 009: row 3" in caplog.text


# --------------------------------------------------------------------------------------------------
# settings that change the course of a run
# --------------------------------------------------------------------------------------------------


def test_validation_file_of_one_fidelity_and_split_of_the_others(sae, tmp_path):
    config = settings(sae, tmp_path, f"data.val_fidelity_datasets.1={FIXTURES / 'tiny_fid1.h5'}")
    data = build_data(config)
    counts = [
        np.bincount(d.fidelities[i]).tolist()
        for d, i in ((data.train, data.train_indices), (data.val, data.val_indices))
    ]
    assert counts == [[144, 200, 180], [16, 200, 20]]
    without = build_data(settings(sae, tmp_path))
    chosen = without.val_indices[without.train.fidelities[without.val_indices] == 2]
    mine = data.val_indices[data.val.fidelities[data.val_indices] == 2]
    for a, b in zip(without.val.__getitems__(chosen.tolist()), data.val.__getitems__(mine.tolist()), strict=True):
        np.testing.assert_array_equal(a["coord"], b["coord"])


def test_validation_molecules_are_not_trained_on_unless_asked(sae, tmp_path, caplog):
    data = build_data(settings(sae, tmp_path))
    assert len(np.intersect1d(data.train_indices, data.val_indices)) == 0
    assert len(data.train_indices) + len(data.val_indices) == len(data.train)
    shared = build_data(settings(sae, tmp_path, "data.separate_val=false"))
    assert len(shared.train_indices) == len(shared.train)
    np.testing.assert_array_equal(shared.val_indices, data.val_indices)
    assert "validation molecules are trained on" in caplog.text


def test_without_validation_the_last_model_is_saved(sae, tmp_path):
    off = ["data.val_fraction=0", "scheduler=null", "checkpoint.save_best=false", "checkpoint.kwargs.n_saved=1"]
    result = train(sae, tmp_path, *off, fidelities=1)
    assert result.epoch == 2
    assert [record["epoch"] for record in result.records] == [0, 1, 2]
    assert result.records[-1]["train_mean/loss"] > 0
    steps = result.records[-1]["iteration"]
    assert [path.name for path in result.folder.glob("r_epoch_*.pt")] == [f"r_epoch_0002_iter_{steps:07d}.pt"]
    *_, last = sorted(result.folder.glob("r_last_iter_*.pt"))
    content, saved = load_checkpoint(last), load_checkpoint(result.path)
    assert all(torch.equal(content["model"][key], saved["model"][key]) for key in saved["model"])
    assert "training" in content
    assert "training" not in saved


def test_validation_between_epochs(sae, tmp_path):
    result = train(sae, tmp_path, "log_frequency.val=2", "trainer.epochs=1", fidelities=1)
    iterations = [record["iteration"] for record in validations(result)]
    assert iterations == sorted(set(iterations))
    assert {0, 2} < set(iterations)
    assert all("val/loss" in record for record in validations(result))


def test_plateau_lowers_the_rate_of_every_group_and_a_low_rate_ends_the_training(sae, tmp_path):
    result = train(
        sae,
        tmp_path,
        "scheduler.kwargs={patience: 0, factor: 0.1, threshold: 1000, threshold_mode: abs}",
        "scheduler.terminate_on_low_lr=1e-4",
        "trainer.epochs=9",
        "optimizer.param_groups.shifts={re: atomic_shift, lr: 5e-4}",
        fidelities=1,
    )
    assert [record["lr/default"] for record in validations(result)] == pytest.approx([5e-3, 5e-3, 5e-3, 5e-4])
    for record in validations(result):
        assert record["lr/shifts"] == pytest.approx(record["lr/default"] / 10)


def test_an_unknown_metric_of_the_plateau_is_named(sae, tmp_path):
    with pytest.raises(
        ValueError, match=r"scheduler\.kwargs\.metric_name: E_mse is not a validation metric; did you mean .*E_rmse"
    ):
        train(sae, tmp_path, "scheduler.kwargs.metric_name=E_mse", fidelities=1)
    assert not (tmp_path / "run").exists()


def test_fixed_weights_stay_and_energies_alone_can_be_trained_on(single, sae, tmp_path):
    result = train(
        sae,
        tmp_path,
        "data.y=[energy]",
        *(f"loss.kwargs.components.{name}=null" for name in ("forces", "charges", "spin_charges")),
        "optimizer.force_no_train=[afv, conv, mlps]",
        fidelities=1,
        load=single.path,
    )
    before, after = load_checkpoint(single.path)["model"], load_checkpoint(result.path)["model"]
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"outputs"}
    assert "val/F_mae" not in validations(result)[-1]


def test_reading_processes_change_nothing(single, sae, tmp_path):
    result = train(sae, tmp_path, "data.loaders.train.num_workers=1", "data.loaders.val.num_workers=1", fidelities=1)
    first, second = load_checkpoint(single.path)["model"], load_checkpoint(result.path)["model"]
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("number", "saved"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGUSR1, False)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(sae, tmp_path, monkeypatch, number, saved):
    def train_on(self, batches):
        step(self, batches)
        if self.position.iteration == 8:
            os.kill(os.getpid(), number)

    step = loop.Training.train_on
    monkeypatch.setattr(loop.Training, "train_on", train_on)
    result = train(sae, tmp_path, "data.samplers.train.kwargs.batch_size=128", fidelities=1)
    assert result.end == (False, number.name)
    assert load_checkpoint(tmp_path / "run" / "r_last_iter_000000008.pt")["training"]["position"]["iteration"] == 8
    assert result.saved == saved == (tmp_path / "model.pt").exists()
    assert "this run goes on with --resume" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.filterwarnings("default")  # wandb starts threads and files of its own
def test_wandb_online_without_a_login_logs_offline(sae, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    result = train(
        sae, tmp_path, "wandb.init.mode=online", "wandb.watch_model.log=all", "trainer.epochs=1", fidelities=1
    )
    assert list(result.folder.glob("wandb/offline-run-*/*.wandb"))
    assert "the run is logged offline" in (result.folder / "train.log").read_text()
    assert result.path.is_file()


# --------------------------------------------------------------------------------------------------
# refusals that need more than the settings
# --------------------------------------------------------------------------------------------------


def test_folder_that_must_be_empty(sae, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "r_epoch_0001.pt").touch()
    job = Job(settings(sae, tmp_path, "checkpoint.kwargs.require_empty=true"), load_model_config(MODEL), overwrite=True)
    with pytest.raises(ValueError, match=r"checkpoint\.kwargs\.require_empty: .* holds checkpoints r_\*\.pt"):
        run_training(job)


def test_weights_of_another_architecture(sae, tmp_path):
    config = settings(sae, tmp_path, fidelities=1)
    with pytest.raises(ValueError, match=r"ref_single\.pt: the checkpoint is of another architecture"):
        run_training(Job(config, load_model_config()), tmp_path / "model.pt", FIXTURES / "ref_single.pt")
    assert list(tmp_path.iterdir()) == []


def test_start_is_checked_before_data_are_read(sae, tmp_path, monkeypatch):
    monkeypatch.delattr(runner, "build_data")
    with pytest.raises(ValueError, match=r"init_from: says where .*; add --load"):
        train(sae, tmp_path, "init_from={fid1: fid0}")
    with pytest.raises(FileNotFoundError, match=r"--load: no\.pt: no such file"):
        train(sae, tmp_path, load="no.pt")


# --------------------------------------------------------------------------------------------------
# several processes
# --------------------------------------------------------------------------------------------------


def test_torchrun_trains_and_only_one_process_writes(sae, tmp_path):
    arguments = [f"data.fidelity_datasets.{f}={FIXTURES / f'tiny_fid{f}.h5'}" for f in range(3)]
    arguments += [f"data.sae.energy.files.{f}={sae[f]}" for f in range(3)]
    arguments += ["trainer.epochs=2", "report=false", f"checkpoint.dirname={tmp_path / 'run'}"]
    arguments += ["data.samplers.val.kwargs.batch_size=64"]  # other numbers of batches for one than for the other
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "aimnet2mult.train.cli", "--model", str(MODEL), "--save", str(tmp_path / "m.pt"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(runner.__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 epochs are complete") == 1
    assert done.stdout.count("model of epoch") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]
    assert load_checkpoint(tmp_path / "m.pt")["num_fidelities"] == 3
