"""The command that fits self-atomic energies to a dataset file."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from aimnet2mult.data.sae import load_sae, sae_energy, save_sae
from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset
from aimnet2mult.models.base import load_checkpoint, load_model, load_model_config, save_checkpoint
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.train import calc_sae as module
from aimnet2mult.train.calc_sae import calc_sae, draw_sample, main
from aimnet2mult.train.sae_anchors import UNMATCHED_WEIGHT
from aimnet2mult.utils.units import HARTREE_EV

SAE = {1: -15.8, 6: -1036.2, 8: -2044.7, 35: -70038.7}


def write(path, numbers_by_size: dict[int, np.ndarray], energy=None) -> None:
    groups = {}
    for n_atoms, numbers in numbers_by_size.items():
        groups[n_atoms] = {
            "coord": np.zeros((len(numbers), n_atoms, 3), np.float32),
            "numbers": numbers.astype(np.int32),
            "charge": np.zeros(len(numbers), np.float32),
            "energy": sae_energy(numbers, SAE) if energy is None else energy[n_atoms],
        }
    write_dataset(path, groups)


@pytest.fixture
def dataset(tmp_path):
    """2000 molecules of H, C and O, and three with bromine."""
    rng = np.random.default_rng(0)
    four = rng.choice([1, 6, 8], size=(1000, 4))
    six = rng.choice([1, 6, 8], size=(1003, 6))
    six[[11, 500, 900], 0] = 35
    path = tmp_path / "data.h5"
    write(path, {4: four, 6: six})
    return path


@pytest.fixture
def fixtures(request):
    return request.config.rootpath / "tests" / "fixtures"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_command_writes_the_energies_and_prints_the_report(dataset, tmp_path):
    result = run(dataset, tmp_path / "sae.yaml")
    assert result.exit_code == 0, result.output
    assert load_sae(tmp_path / "sae.yaml") == pytest.approx(SAE, abs=1e-6)
    assert "Br (35)" in result.output
    assert "Fit to all 2003 molecules" in result.output
    assert result.output.splitlines()[-1] == f"written: {tmp_path / 'sae.yaml'}"
    assert "Fitted to 2003 molecules of data.h5" in (tmp_path / "sae.yaml").read_text()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sample_holds_every_element_of_the_file(dataset, tmp_path, seed):
    fit = calc_sae(dataset, tmp_path / "sae.yaml", samples=100, seed=seed)
    assert 100 <= fit.n_molecules <= 103
    assert fit.molecules[35] == 3
    assert fit.sae == pytest.approx(SAE, abs=1e-6)


def test_sample_is_drawn_evenly_and_by_the_seed(dataset, monkeypatch):
    monkeypatch.setattr(module, "MIN_MOLECULES", 0)
    data = SizeGroupedDataset(dataset)
    first, energies = draw_sample(data, [1, 6, 8, 35], 400, np.random.default_rng(5))[1:3]
    again = draw_sample(data, [1, 6, 8, 35], 400, np.random.default_rng(5)).counts
    other = draw_sample(data, [1, 6, 8, 35], 400, np.random.default_rng(6)).counts
    assert len(first) == len(energies) == 400
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 150 < (first.sum(axis=1) == 4).sum() < 250  # half of the molecules have four atoms


def test_sample_does_not_depend_on_how_the_file_is_read(dataset, monkeypatch):
    data = SizeGroupedDataset(dataset)
    whole = draw_sample(data, [1, 6, 8, 35], 30, np.random.default_rng(0)).counts
    chunks = data.chunks
    monkeypatch.setattr(data, "chunks", lambda keys: chunks(keys, max_rows=17))
    pieces = draw_sample(data, [1, 6, 8, 35], 30, np.random.default_rng(0)).counts
    np.testing.assert_array_equal(whole, pieces)


@pytest.mark.parametrize("samples", [None, 500])
def test_molecules_without_energy_are_left_out(dataset, tmp_path, samples):
    with h5py.File(dataset, "r+") as file:
        file["004/energy"][:900] = np.nan
    fit = calc_sae(dataset, tmp_path / "sae.yaml", samples=samples)
    assert fit.sae == pytest.approx(SAE, abs=1e-6)
    assert fit.n_molecules == 1103 if samples is None else 500 <= fit.n_molecules <= 503
    assert f"Fitted to {fit.n_molecules} of 2003 molecules" in (tmp_path / "sae.yaml").read_text()


def test_several_files_and_patterns_are_one_dataset(dataset, tmp_path):
    """The second file, in Hartree, holds the only molecule with fluorine."""
    numbers = np.array([[9, 1]])
    write(tmp_path / "more_hf.h5", {2: numbers}, energy={2: np.array([(-2713.0 - 15.8) / HARTREE_EV])})
    with h5py.File(tmp_path / "more_hf.h5", "r+") as file:
        file.attrs["energy_unit"] = "Hartree"
    result = run(dataset, tmp_path / "more_*.h5", tmp_path / "sae.yaml")
    assert result.exit_code == 0, result.output
    assert load_sae(tmp_path / "sae.yaml") == pytest.approx({**SAE, 9: -2713.0}, abs=1e-6)
    assert "Fitted to 2004 molecules of data.h5 and 1 more," in (tmp_path / "sae.yaml").read_text()
    assert calc_sae([dataset, tmp_path / "more_hf.h5"], tmp_path / "b.yaml").n_molecules == 2004


def test_pattern_that_matches_no_file(dataset, tmp_path):
    refused(run(dataset, tmp_path / "none*.h5", tmp_path / "sae.yaml"), tmp_path, "none*.h5: no file matches")


def test_samples_beyond_the_file_take_all(dataset, tmp_path):
    assert calc_sae(dataset, tmp_path / "sae.yaml", samples=10**6).n_molecules == 2003


@pytest.mark.parametrize("fidelity", [0, 1, 2])
def test_real_data_of_each_fidelity(fixtures, tmp_path, fidelity):
    """Residuals of molecules of up to nine atoms are of the order of their binding energies, not of their total."""
    path = fixtures / f"tiny_fid{fidelity}.h5"
    fit = calc_sae(path, tmp_path / "sae.yaml")
    with h5py.File(path) as file:
        residuals = np.concatenate([g["energy"][:] - sae_energy(g["numbers"][:], fit.sae) for g in file.values()])
    assert fit.residual_rms == pytest.approx(np.sqrt(np.mean(residuals**2)))
    assert fit.residual_std < 4.0
    assert fit.residual_std <= fit.residual_std_all
    assert set(fit.sae) == set(SizeGroupedDataset(path).elements)


def test_inseparable_elements_are_reported_not_refused(tmp_path):
    write(tmp_path / "water.h5", {3: np.tile([8, 1, 1], (10, 1))})
    result = run(tmp_path / "water.h5", tmp_path / "sae.yaml")
    assert result.exit_code == 0
    assert "cannot separate the energies of H (1), O (8)" in result.output
    sae = load_sae(tmp_path / "sae.yaml")
    assert 2 * sae[1] + sae[8] == pytest.approx(2 * SAE[1] + SAE[8])


# --- terms and anchors --------------------------------------------------------------------------

ELEMENTS = [1, 6, 8]
TARGET = ReferenceEnergies({1: -15.8, 6: -1036.2, 8: -2044.7}, charge=4.5, spin=-1.5)
OTHER = ReferenceEnergies({1: -13.5, 6: -58.1, 8: -110.3}, charge=9.0, spin=2.5)


def charged_groups(numbers, residuals, reference, seed):
    """Molecules with charges and multiplicities by their composition, and random geometries."""
    n, n_atoms = numbers.shape
    rng = np.random.default_rng(seed)
    charge = (numbers.sum(axis=1) % 3 - 1).astype(np.float32)
    mult = (1 + numbers.sum(axis=1) % 2).astype(np.float32)
    energy = sae_energy(numbers, reference, charge, mult) + residuals
    coord = rng.normal(scale=2.0, size=(n, n_atoms, 3)).astype(np.float32)
    return {n_atoms: {"coord": coord, "numbers": numbers, "charge": charge, "mult": mult, "energy": energy}}


@pytest.fixture
def two_levels(tmp_path):
    """Molecules at two levels whose residual energies, some eV, are the same, and a few that only the target has."""
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.choice(ELEMENTS, size=(60, 5)), axis=1)
    _, kind = np.unique(numbers, axis=0, return_inverse=True)
    residuals = 4.0 * rng.normal(size=kind.max() + 1)[kind.ravel()]
    write_dataset(tmp_path / "target.h5", charged_groups(numbers, residuals, TARGET, seed=1))
    write_dataset(tmp_path / "other.h5", charged_groups(numbers, residuals, OTHER, seed=2))
    save_sae(tmp_path / "other.yaml", OTHER)
    return tmp_path


def as_list(reference):
    return [*(reference[z] for z in ELEMENTS), reference.charge, reference.spin]


def test_terms_are_off_unless_asked_for(two_levels):
    for options, terms in (
        ([], set()),
        (["--charge-term"], {"charge"}),
        (["--charge-term", "--spin-term", "--no-charge-term"], {"spin"}),
        (["--spin-term", "--charge-term"], {"charge", "spin"}),
    ):
        result = run(two_levels / "target.h5", two_levels / "sae.yaml", *options)
        assert result.exit_code == 0, result.output
        assert set(load_sae(two_levels / "sae.yaml").terms) == terms
        assert ("molecules are charged. Where several" in result.output) == ("charge" not in terms)
        assert ("molecules are open-shell. Where several" in result.output) == ("spin" not in terms)


@pytest.mark.parametrize("reversed_order", [False, True])
def test_anchored_fit_recovers_the_shift_between_levels(two_levels, reversed_order):
    """Residual energies of some eV bend a fit of its own; their counterparts take them off, whatever the geometry."""
    if reversed_order:
        with h5py.File(two_levels / "other.h5", "r+") as file:
            for array in file["005"].values():
                array[:] = array[:][::-1]
    options = ["--charge-term", "--spin-term", "--anchor", two_levels / "other.h5"]
    options += ["--anchor-sae", two_levels / "other.yaml"]
    result = run(two_levels / "target.h5", two_levels / "sae.yaml", *options)
    assert result.exit_code == 0, result.output
    assert "60 of 60 molecules have a counterpart, 0 of these the same geometry" in result.output
    assert as_list(load_sae(two_levels / "sae.yaml")) == pytest.approx(as_list(TARGET), abs=1e-6)
    alone = calc_sae(two_levels / "target.h5", two_levels / "alone.yaml", terms=("charge", "spin"))
    assert np.abs(np.subtract(as_list(alone.sae), as_list(TARGET))).max() > 0.5
    assert "Anchored on" in (two_levels / "sae.yaml").read_text()


def test_same_geometry_counts_more_than_the_mean(two_levels):
    """Each molecule has a residual energy of its own, equal at both levels: geometries tell which, turned or not."""
    source = SizeGroupedDataset(two_levels / "target.h5")
    [(_, arrays)] = source.chunks(sorted(source.keys))
    own = np.random.default_rng(5).normal(size=60)
    terms = arrays["charge"], arrays["mult"]
    arrays["energy"] = sae_energy(arrays["numbers"], TARGET, *terms) + own
    write_dataset(two_levels / "target.h5", {5: arrays})
    turned = arrays["coord"][:, :, [1, 2, 0]] + np.float32(1.5)
    other = {**arrays, "coord": turned, "energy": sae_energy(arrays["numbers"], OTHER, *terms) + own}
    order = np.random.default_rng(6).permutation(60)
    write_dataset(two_levels / "other.h5", {5: {key: values[order] for key, values in other.items()}})
    anchor = {"anchor": two_levels / "other.h5", "anchor_sae": two_levels / "other.yaml"}
    fit = calc_sae(two_levels / "target.h5", two_levels / "sae.yaml", terms=("charge", "spin"), **anchor)
    assert "60 of these the same geometry" in fit.anchor
    assert as_list(fit.sae) == pytest.approx(as_list(TARGET), abs=1e-6)
    assert fit.residual_max < 1e-6


def test_molecules_without_counterpart_determine_what_only_they_hold(two_levels):
    """A tenth of them have bromine; the others keep what their counterparts say to a few hundredths of an eV."""
    rng = np.random.default_rng(3)
    source = SizeGroupedDataset(two_levels / "target.h5")
    [(_, arrays)] = source.chunks(sorted(source.keys))
    numbers = np.sort(rng.choice(ELEMENTS, size=(6, 4)), axis=1)
    numbers[:, 3] = 35
    with_bromine = ReferenceEnergies({**TARGET, 35: -70038.7}, TARGET.charge, TARGET.spin)
    unmatched = charged_groups(numbers, 4.0 * rng.normal(size=6), with_bromine, seed=4)
    write_dataset(two_levels / "target.h5", {5: arrays, **unmatched})
    anchor = {"anchor": two_levels / "other.h5", "anchor_sae": two_levels / "other.yaml"}
    fit = calc_sae(two_levels / "target.h5", two_levels / "sae.yaml", terms=("charge", "spin"), **anchor)
    assert "60 of 66 molecules have a counterpart" in fit.anchor
    assert fit.n_full_weight == pytest.approx(60 + 6 * UNMATCHED_WEIGHT**2)
    assert as_list(fit.sae) == pytest.approx(as_list(TARGET), abs=0.1)
    assert fit.sae[35] == pytest.approx(-70038.7, abs=8.0)
    assert fit.residual_rms < 0.1  # of the molecules with a counterpart


def test_anchored_on_a_model(fixtures, tmp_path):
    """Energies made of reference energies and what a fidelity of a network predicts: both are found again."""
    elements = [1, 6, 7, 8, 9]
    sae = {z: -10.0 * z for z in elements}
    checkpoint = tmp_path / "model.pt"
    save_checkpoint(
        checkpoint,
        load_checkpoint(fixtures / "ref_mixed.pt")["model"],
        model_config=load_model_config(fixtures / "ref_mixed_model.yaml"),
        num_fidelities=3,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        fidelity_names={0: "dft", 1: "gfn2", 2: "gfn1"},
        sae=dict.fromkeys(range(3), ReferenceEnergies(sae, charge=100.0)),
        species={f: elements for f in range(3)},
    )
    network, _ = load_model(checkpoint, fidelity=1)
    target = ReferenceEnergies({z: -100.0 * z for z in (*elements, 17)}, charge=4.5, spin=-1.5)
    source = SizeGroupedDataset(fixtures / "tiny_fid0.h5")
    groups = {}
    for _, arrays in source.chunks(("coord", "numbers", "charge", "mult")):
        arrays = {key: values[np.isin(arrays["numbers"], list(target)).all(axis=1)] for key, values in arrays.items()}
        batch = {key: torch.as_tensor(values) for key, values in arrays.items()}
        batch["numbers"] = batch["numbers"].long()
        predicted = network(batch)["energy"].numpy()
        predicted[(arrays["numbers"] == 17).any(axis=1)] = 0.0  # the fidelity does not know chlorine
        reference = sae_energy(arrays["numbers"], target, arrays["charge"], arrays["mult"])
        groups[arrays["numbers"].shape[1]] = {**arrays, "energy": reference + predicted}
    write_dataset(tmp_path / "data.h5", groups)
    options = ["--charge-term", "--spin-term", "--anchor-model", checkpoint]
    for asked in ("gfn2", "1"):
        result = run(tmp_path / "data.h5", tmp_path / "sae.yaml", *options, "--anchor-fidelity", asked)
        assert result.exit_code == 0, result.output
        found = load_sae(tmp_path / "sae.yaml")
        assert dict(found) == pytest.approx(dict(target), abs=1e-4)
        assert (found.charge, found.spin) == pytest.approx((4.5, -1.5), abs=1e-4)
        assert "model.pt (gfn2), which knows" in result.output
    run(tmp_path / "data.h5", tmp_path / "other.yaml", *options, "--anchor-fidelity", "gfn1")
    assert load_sae(tmp_path / "other.yaml").charge != pytest.approx(4.5, abs=1e-2)
    for path in tmp_path.glob("*.yaml"):
        path.unlink()
    result = run(tmp_path / "data.h5", tmp_path / "sae.yaml", *options)
    refused(result, tmp_path, "choose one of its fidelities: 0 (dft), 1 (gfn2), 2 (gfn1)")


def test_sample_holds_ions(tmp_path):
    """Five ions among 2000 molecules are in every sample where their term is fitted."""
    numbers = np.random.default_rng(0).choice([1, 6, 8], size=(2000, 4))
    write(tmp_path / "data.h5", {4: numbers})
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        file["004/charge"][:5] = 1.0
        file["004/energy"][:5] += 7.0
    for seed in range(3):
        fit = calc_sae(tmp_path / "data.h5", tmp_path / "sae.yaml", samples=60, seed=seed, terms=["charge"])
        assert fit.molecules["charge"] == 5
        assert fit.sae.charge == pytest.approx(7.0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--anchor", "ANCHOR"], "--anchor-sae: is missing"),
        (["--anchor-sae", "SAE"], "--anchor-sae: goes with --anchor"),
        (["--anchor-fidelity", "dft"], "--anchor-fidelity: goes with --anchor-model"),
        (["--anchor", "ANCHOR", "--anchor-sae", "SAE", "--anchor-model", "m.pt"], "leave the other out"),
        (["--anchor", "none.h5", "--anchor-sae", "SAE"], "none.h5: no such file"),
        (["--anchor-model", "none.pt"], "none.pt: no such file"),
    ],
)
def test_options_of_anchors_that_do_not_go_together(two_levels, options, message):
    files = {"ANCHOR": two_levels / "other.h5", "SAE": two_levels / "other.yaml"}
    result = run(two_levels / "target.h5", two_levels / "sae.yaml", *(files.get(option, option) for option in options))
    refused(result, two_levels, message)


def test_anchor_with_an_element_that_its_file_lacks(two_levels):
    save_sae(two_levels / "other.yaml", {1: -13.5, 6: -58.1})
    options = ["--anchor", two_levels / "other.h5", "--anchor-sae", two_levels / "other.yaml"]
    result = run(two_levels / "target.h5", two_levels / "sae.yaml", *options)
    refused(result, two_levels, "--anchor-sae: no self-atomic energy of O (8), which")


def test_molecules_of_the_anchor_without_energy_do_not_count(two_levels):
    with h5py.File(two_levels / "other.h5", "r+") as file:
        file["005/energy"][:] = np.where(np.arange(60) < 30, np.nan, file["005/energy"][:])
    anchor = {"anchor": two_levels / "other.h5", "anchor_sae": two_levels / "other.yaml"}
    fit = calc_sae(two_levels / "target.h5", two_levels / "sae.yaml", terms=("charge", "spin"), **anchor)
    assert 30 <= fit.n_full_weight < 60
    assert as_list(fit.sae) == pytest.approx(as_list(TARGET), abs=0.2)


def test_anchor_without_common_molecules(two_levels, tmp_path):
    write_dataset(tmp_path / "far.h5", charged_groups(np.full((3, 7), 6), np.zeros(3), OTHER, seed=1))
    options = ["--anchor", tmp_path / "far.h5", "--anchor-sae", two_levels / "other.yaml"]
    result = run(two_levels / "target.h5", two_levels / "sae.yaml", *options)
    refused(result, two_levels, "no molecule of the composition, charge and multiplicity of one in")


# --- mistakes -----------------------------------------------------------------------------------


def refused(result, tmp_path, *texts: str) -> None:
    """One line on the terminal, exit status 2, nothing left behind."""
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    for text in texts:
        assert text in result.output
    assert not list(tmp_path.glob("**/*sae.yaml*"))


def test_missing_dataset(tmp_path):
    refused(run(tmp_path / "none.h5", tmp_path / "sae.yaml"), tmp_path, "none.h5: no such file")


def test_file_that_is_not_hdf5(tmp_path):
    (tmp_path / "text.h5").write_text("words")
    refused(run(tmp_path / "text.h5", tmp_path / "sae.yaml"), tmp_path, "text.h5: not an HDF5 file")


def test_infinite_energy_is_named_by_file_group_and_row(tmp_path):
    energy = np.arange(5.0)
    energy[3] = np.inf
    write(tmp_path / "data.h5", {2: np.ones((5, 2), int)}, energy={2: energy})
    refused(run(tmp_path / "data.h5", tmp_path / "sae.yaml"), tmp_path, "data.h5: group 002: row 3: energy is inf")


def test_dataset_without_any_energy(tmp_path):
    write(tmp_path / "data.h5", {2: np.ones((5, 2), int)}, energy={2: np.full(5, np.nan)})
    refused(
        run(tmp_path / "data.h5", tmp_path / "sae.yaml"), tmp_path, "data.h5: the energies of all 5 molecules are NaN"
    )


def test_element_without_any_energy(tmp_path):
    write(tmp_path / "data.h5", {1: np.array([[1], [35], [1]])}, energy={1: np.array([-13.0, np.nan, -13.0])})
    refused(
        run(tmp_path / "data.h5", tmp_path / "sae.yaml"), tmp_path, "energies of all molecules with Br (35) are NaN"
    )


def test_dataset_as_the_last_name_is_not_overwritten(dataset, tmp_path):
    """As when the name of the output was forgotten, or a shell's pattern stood at the end."""
    other = tmp_path / "other.h5"
    other.write_bytes(dataset.read_bytes())
    refused(run(dataset, other), tmp_path, "other.h5: is a dataset; the last name is that of the YAML file to write")
    assert other.read_bytes() == dataset.read_bytes()


def test_output_is_checked_before_the_dataset_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "aimnet2mult.data.sgdataset.open_dataset", lambda files: pytest.fail("read before the output was checked")
    )
    result = run(tmp_path / "data.h5", tmp_path / "missing" / "sae.yaml")
    refused(result, tmp_path, "missing does not exist")
    refused(run(tmp_path / "data.h5", tmp_path), tmp_path, "is a folder")


def test_failed_fit_leaves_the_old_file(dataset, tmp_path, monkeypatch):
    (tmp_path / "old.yaml").write_text("1: -13.0\n")

    def fail(*args):
        raise ValueError("no fit today")

    monkeypatch.setattr(module, "fit_sae", fail)
    assert run(dataset, tmp_path / "old.yaml").exit_code == 2
    assert (tmp_path / "old.yaml").read_text() == "1: -13.0\n"


def test_wrong_options(dataset, tmp_path):
    assert run(dataset, tmp_path / "sae.yaml", "--samples", 0).exit_code == 2
    assert run(dataset, tmp_path / "sae.yaml", "--sample", 10).exit_code == 2
    assert run(dataset).exit_code == 2


def test_module_runs_as_a_command(dataset, tmp_path):
    command = [sys.executable, "-m", "aimnet2mult.train.calc_sae", str(dataset), str(tmp_path / "sae.yaml")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert load_sae(tmp_path / "sae.yaml") == pytest.approx(SAE, abs=1e-6)
