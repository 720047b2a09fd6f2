import numpy as np
import pytest
from click.testing import CliRunner

from aimnet2mult.data.sae import sae_energy
from aimnet2mult.data.sgdataset import SizeGroupedDataset
from aimnet2mult.tools.create_fake_data import (
    ELEMENTS,
    LABELS,
    create_fake_data,
    main,
    morse_labels,
    random_molecules,
    self_energies,
)

NUMBERS = np.array([1, 6, 7, 8, 17])


@pytest.fixture(scope="module")
def molecules():
    return random_molecules(np.random.default_rng(0), 40, 8, NUMBERS, ions=0.5)


def groups(path):
    return {
        arrays["numbers"].shape[1]: arrays
        for _, arrays in SizeGroupedDataset(path).chunks(("coord", "numbers", "charge", "mult", *LABELS))
    }


def distances(coord):
    return np.linalg.norm(coord[:, :, None] - coord[:, None], axis=-1)


def test_forces_are_minus_the_gradient(molecules):
    coord = molecules["coord"].astype(np.float64)
    forces = morse_labels(**molecules)["forces"]
    step = 1e-4
    for atom, axis in [(0, 0), (3, 1), (7, 2)]:
        moved = [coord.copy(), coord.copy()]
        moved[0][:, atom, axis] += step
        moved[1][:, atom, axis] -= step
        up, down = (morse_labels(**{**molecules, "coord": c})["energy"] for c in moved)
        np.testing.assert_allclose(forces[:, atom, axis], -(up - down) / (2 * step), rtol=1e-5, atol=1e-4)
    assert np.abs(forces.sum(axis=1)).max() < 1e-5
    assert np.abs(forces).max() > 0.5


def test_charges_and_spins_add_up(molecules):
    labels = morse_labels(**molecules)
    np.testing.assert_allclose(labels["charges"].sum(axis=1), molecules["charge"], atol=1e-5)
    np.testing.assert_allclose(labels["spin_charges"].sum(axis=1), molecules["mult"] - 1.0, atol=1e-5)
    assert np.abs(labels["charges"]).max() < 1.5
    assert set(molecules["charge"]) == {-1.0, 0.0, 1.0}


def test_multiplicity_fits_the_electrons(molecules):
    electrons = molecules["numbers"].sum(axis=1) - molecules["charge"]
    np.testing.assert_array_equal(electrons % 2, molecules["mult"] - 1)


def test_energy_is_self_energy_plus_binding(molecules):
    neutral = {**molecules, "charge": 0.0 * molecules["charge"]}
    energy = morse_labels(**neutral, sae_scale=0.3)["energy"]
    binding = energy - sae_energy(molecules["numbers"], self_energies(list(ELEMENTS), 0.3))
    bare = morse_labels(**neutral, sae_scale=0.0)["energy"]
    np.testing.assert_allclose(binding, bare, atol=1e-9)
    np.testing.assert_allclose(morse_labels(**neutral, sae_scale=0.0, well_scale=2.0)["energy"], 2.0 * bare)
    assert (bare < 0.0).all()


def test_atoms_keep_their_distance_and_are_bonded(molecules):
    d_ij = distances(molecules["coord"]) + 100.0 * np.eye(8)
    assert d_ij.min() > 0.5
    assert d_ij.min(axis=2).max() < 3.0


def test_dataset_is_as_asked(tmp_path):
    path = tmp_path / "fake.h5"
    create_fake_data(path, n_molecules=500, sizes=(3, 6), elements=("H", "C"), seed=1)
    dataset = SizeGroupedDataset(path)
    assert len(dataset) == 500
    assert set(dataset.sizes) == {3, 4, 5, 6}
    assert dataset.elements == [1, 6]
    assert set(LABELS) <= dataset.keys
    assert dataset._groups[3]["coord"].offset is not None  # can be mapped into memory


def test_other_level_for_the_same_molecules(tmp_path):
    create_fake_data(tmp_path / "a.h5", n_molecules=100, seed=2)
    create_fake_data(tmp_path / "b.h5", n_molecules=100, seed=2, labels=("energy",), sae_scale=0.01, well_scale=0.8)
    create_fake_data(tmp_path / "c.h5", n_molecules=100, seed=3)
    a, b, c = (groups(tmp_path / f"{name}.h5") for name in "abc")
    for n_atoms in a:
        np.testing.assert_array_equal(a[n_atoms]["coord"], b[n_atoms]["coord"])
        assert set(b[n_atoms]) == {"coord", "numbers", "charge", "mult", "energy"}
        assert (b[n_atoms]["energy"] > a[n_atoms]["energy"]).all()
    assert not np.array_equal(a[5]["coord"][:1], c[5]["coord"][:1])


def test_command(tmp_path):
    path = tmp_path / "fake.h5"
    arguments = [path, "--molecules", 50, "--sizes", 2, 4, "--elements", "H, O", "--labels", "energy,forces"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert str(path) in result.output
    assert SizeGroupedDataset(path).keys == {"coord", "numbers", "charge", "mult", "energy", "forces"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--elements", "H,Cc"], "elements: unknown 'Cc'"),
        (["--elements", ","], "elements: none given"),
        (["--labels", "force"], "labels: unknown 'force'; did you mean forces?"),
        (["--sizes", "4", "3"], "sizes: 4 to 3 atoms is no range"),
        (["--molecules", "0"], "molecules: 0 is not positive"),
        (["--ions", "1.5"], "ions: 1.5 is not a share"),
        (["--seed", "-1"], "seed: -1 is negative"),
    ],
)
def test_mistakes_end_with_status_2_and_write_nothing(tmp_path, options, message):
    result = CliRunner().invoke(main, [str(tmp_path / "fake.h5"), *options])
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_folder_that_does_not_exist(tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path / "nowhere" / "fake.h5")])
    assert result.exit_code == 2
    assert "nowhere does not exist" in result.output
