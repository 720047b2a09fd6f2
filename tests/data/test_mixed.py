import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from aimnet2mult.data.base import LabelCount
from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sgdataset import DatasetError, SizeGroupedDataset, write_dataset
from aimnet2mult.nbops import decode_fidelity
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.utils.units import HARTREE_EV

TESTS = Path(__file__).parents[1]
TINY = {f: TESTS / "fixtures" / f"tiny_fid{f}.h5" for f in range(3)}
EXAMPLES = TESTS.parent / "examples" / "data"
ELEMENTS = (1, 6, 7, 8, 9, 14, 15, 16, 17, 35)
SAE = {f: {z: -(10.0 ** (3 - f)) * z**1.5 - 0.123456789 for z in ELEMENTS} for f in range(3)}


def water(n_molecules=4, **more):
    arrays = {
        "coord": np.tile(
            np.array([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]], np.float32), (n_molecules, 1, 1)
        ),
        "numbers": np.tile(np.array([8, 1, 1], np.int32), (n_molecules, 1)),
        "charge": np.zeros(n_molecules, np.float32),
        "energy": np.full(n_molecules, -2000.0),
    }
    return {3: {**arrays, **more}}


def write_water(path, **more):
    write_dataset(path, water(**more))
    return path


def rows(dataset):
    """Every molecule of a file, as stored."""
    for _, arrays in dataset.chunks(sorted(dataset.keys)):
        for i in range(len(arrays["energy"])):
            yield {key: values[i] for key, values in arrays.items()}


def test_every_molecule_with_its_fidelity_and_residual_energy():
    dataset = MixedFidelityDataset(TINY, SAE)
    stored = [(f, row) for f, path in TINY.items() for row in rows(SizeGroupedDataset(path))]
    assert len(dataset) == len(stored) == 560
    order = np.random.default_rng(0).permutation(len(dataset))
    for index, sample in zip(order, dataset.__getitems__(order.tolist()), strict=True):
        fidelity, row = stored[index]
        assert sample["_fidelities"] == fidelity == dataset.fidelities[index]
        assert len(row["numbers"]) == dataset.n_atoms[index]
        np.testing.assert_array_equal(sample["numbers"], row["numbers"] + 200 * fidelity)
        numbers, fidelities = decode_fidelity(sample["numbers"], 200)
        np.testing.assert_array_equal(numbers, row["numbers"])
        assert (fidelities == fidelity).all()
        np.testing.assert_array_equal(sample["coord"], row["coord"])
        assert sample["charge"] == row["charge"]
        assert sample["mult"] == row["mult"]
        for key in ("forces", "charges", "spin_charges"):
            if key in row:
                np.testing.assert_array_equal(sample[key], row[key])
            else:
                assert sample[key] is None
        sae = np.array([SAE[fidelity][z] for z in row["numbers"]])
        assert abs(sample["energy"] - (row["energy"] - sae.sum())) < 1e-10


@pytest.mark.parametrize("x", [("coord", "numbers", "charge", "mult"), ("coord", "numbers")])
def test_residual_without_terms_in_charge_and_spin(x):
    """Terms take charge and multiplicity from the file, also where the model does not get them."""
    reference = ReferenceEnergies(SAE[1], charge=4.75, spin=-1.5)
    with_terms = MixedFidelityDataset({0: TINY[1]}, {0: reference}, x=x)
    plain = MixedFidelityDataset({0: TINY[1]}, {0: SAE[1]})
    stored = list(rows(SizeGroupedDataset(TINY[1])))
    assert {row["charge"] for row in stored} == {-1.0, 0.0, 1.0}
    indices = list(range(len(plain)))
    for row, a, b in zip(stored, plain.__getitems__(indices), with_terms.__getitems__(indices), strict=True):
        terms = 4.75 * float(row["charge"]) - 1.5 * (float(row["mult"]) - 1.0)
        assert b["energy"] == pytest.approx(a["energy"] - terms, abs=1e-10)
        assert set(b) == {*x, "energy", "forces", "charges", "spin_charges", "_fidelities"}


def test_terms_refuse_a_charge_that_is_not_finite(tmp_path):
    """It is no label: the molecule must not just count as one without energy."""
    arrays = {
        "coord": np.zeros((2, 1, 3), np.float32),
        "numbers": np.ones((2, 1), np.int32),
        "charge": np.array([0.0, np.nan], np.float32),
        "energy": np.full(2, -13.6),
    }
    write_dataset(tmp_path / "nan.h5", {1: arrays})
    sae = {0: ReferenceEnergies({1: -13.6}, charge=1.0)}
    dataset = MixedFidelityDataset({0: tmp_path / "nan.h5"}, sae, x=("coord", "numbers"))
    assert dataset[0]["energy"] == 0.0
    with pytest.raises(DatasetError, match="row 1: charge is NaN or infinite"):
        dataset[1]


def test_residual_is_exact_on_heavy_molecules():
    """A sum in float32 would be off by several meV at 10⁵ eV."""
    path = EXAMPLES / "fid0_dft_train.h5"
    dataset = MixedFidelityDataset({0: path}, {0: SAE[0]})
    heavy = [i for i, row in enumerate(rows(SizeGroupedDataset(path))) if 35 in row["numbers"]]
    stored = list(rows(SizeGroupedDataset(path)))
    for i in heavy:
        expected = stored[i]["energy"] - sum(SAE[0][int(z)] for z in stored[i]["numbers"])
        assert abs(dataset[i]["energy"] - expected) <= 1e-10
        assert abs(stored[i]["energy"]) > 5e4


def test_one_dataset_keeps_plain_numbers_and_total_energies():
    dataset = MixedFidelityDataset({0: TINY[1]})
    row = next(rows(SizeGroupedDataset(TINY[1])))
    np.testing.assert_array_equal(dataset[0]["numbers"], row["numbers"])
    assert dataset[0]["energy"] == row["energy"]
    assert dataset.num_fidelities == 1


def test_what_it_says_about_the_data():
    dataset = MixedFidelityDataset(TINY, SAE, y=("energy", "forces", "spin_charges"))
    assert dataset.labels == {0: {"energy", "forces", "spin_charges"}, 1: {"energy", "forces"}, 2: {"energy"}}
    for f, path in TINY.items():
        assert dataset.species[f] == SizeGroupedDataset(path).elements
    assert np.bincount(dataset.fidelities).tolist() == [160, 200, 200]


def test_masks_of_labels_that_a_fidelity_lacks():
    dataset = MixedFidelityDataset(TINY, SAE)
    _, y = collate(dataset.__getitems__([0, 200, 500]))
    assert y["energy_mask"].tolist() == [True, True, True]
    assert y["forces_mask"].tolist() == [True, True, False]
    assert y["charges_mask"].tolist() == [True, True, False]
    assert y["spin_charges_mask"].tolist() == [True, False, False]


def test_nan_marks_a_missing_label(tmp_path):
    forces = np.ones((4, 3, 3), np.float32)
    forces[2, 1, 0] = np.nan
    dataset = MixedFidelityDataset({0: write_water(tmp_path / "a.h5", forces=forces)})
    _, y = collate(dataset.__getitems__(range(4)))
    assert y["forces_mask"].tolist() == [True, True, False, True]
    assert not y["forces"][2].any()
    assert y["forces"][[0, 1, 3]].eq(1.0).all()


def test_energy_may_be_missing_like_any_label(tmp_path):
    energy = np.full(4, -2000.0)
    energy[1] = np.nan
    dataset = MixedFidelityDataset(
        {0: write_water(tmp_path / "a.h5", energy=energy, forces=np.ones((4, 3, 3), np.float32))}, {0: SAE[0]}
    )
    _, y = collate(dataset.__getitems__(range(4)))
    assert y["energy_mask"].tolist() == [True, False, True, True]
    assert y["energy"][1] == 0.0
    assert y["forces_mask"].all()
    assert dataset.label_counts()[0]["energy"] == LabelCount(3, 1, exact=True)


def test_narrow_types_of_numbers(tmp_path):
    plain = MixedFidelityDataset({0: write_water(tmp_path / "a.h5")}, {0: SAE[0]})[0]
    for kind in (np.int8, np.uint8):
        numbers = np.tile(np.array([8, 1, 1], kind), (4, 1))
        dataset = MixedFidelityDataset(
            {f: write_water(tmp_path / f"{f}.h5", numbers=numbers) for f in range(2)}, {f: SAE[0] for f in range(2)}
        )
        assert dataset.species == {0: [1, 8], 1: [1, 8]}
        assert dataset[0]["energy"] == plain["energy"]
        assert dataset[7]["numbers"].tolist() == [208, 201, 201]


def test_several_files_of_a_fidelity_and_their_units(tmp_path):
    """The same molecules in eV, and in two files in Hartree, give the same samples."""
    energy, charges = -2000.0 + np.arange(4.0), np.zeros((4, 3), np.float32)
    one = write_water(tmp_path / "one.h5", energy=energy, charges=charges)
    for name, rows in (("b1", slice(0, 1)), ("b2", slice(1, 4))):
        groups = water(energy=energy / HARTREE_EV, charges=charges)
        part = {3: {key: values[rows] for key, values in groups[3].items()}}
        write_dataset(tmp_path / f"{name}.h5", part, {"energy_unit": "Hartree"})
    dataset = MixedFidelityDataset({0: one, 1: tmp_path / "b*.h5", 2: [tmp_path / "b2.h5", tmp_path / "b1.h5"]})
    assert np.bincount(dataset.fidelities).tolist() == [4, 4, 4]
    assert dataset.where(6) == f"{tmp_path / 'b2.h5'}: group 003: row 1"
    samples = dataset.__getitems__(range(12))
    for index in range(4):
        for f in (1, 2):
            assert samples[4 * f + index]["energy"] == pytest.approx(samples[index]["energy"], abs=1e-12)
    assert dataset.labels[1] == {"energy", "charges"}


def test_labels_are_counted_for_each_fidelity():
    counts = MixedFidelityDataset(TINY, SAE, y=("energy", "forces")).label_counts()
    assert {f: count["energy"].molecules for f, count in counts.items()} == {0: 160, 1: 200, 2: 200}
    assert counts[2]["forces"] == LabelCount(0, 200, exact=True)


def test_label_that_some_sizes_lack(tmp_path):
    groups = water(forces=np.ones((4, 3, 3), np.float32))
    groups[1] = {key: values[:1, :1] if values.ndim > 1 else values[:1] for key, values in water()[3].items()}
    write_dataset(tmp_path / "a.h5", groups)
    _, y = collate(MixedFidelityDataset({0: tmp_path / "a.h5"}).__getitems__([0, 1]))
    assert y["forces_mask"].tolist() == [False, True]


def test_multiplicity_is_one_where_the_file_has_none(tmp_path):
    dataset = MixedFidelityDataset({0: write_water(tmp_path / "a.h5")})
    assert dataset[0]["mult"] == 1.0


def test_pickled_dataset_gives_the_same():
    dataset = MixedFidelityDataset(TINY, SAE)
    here = dataset[300]
    there = pickle.loads(pickle.dumps(dataset))[300]
    assert here.keys() == there.keys()
    assert here["energy"] == there["energy"]
    np.testing.assert_array_equal(here["forces"], there["forces"])


@pytest.mark.parametrize("index", [-1, 560])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match="0 to 559"):
        MixedFidelityDataset(TINY)[index]


# --------------------------------------------------------------------------------------------------
# what is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({}, "data.fidelity_datasets: no datasets"),
        ({0: TINY[0], 2: TINY[2]}, "fidelities must be 0 to 1, found 0, 2"),
        ({1: TINY[0]}, "fidelities must be 0 to 0, found 1"),
        ({"0": TINY[0]}, "fidelities must be integers, found '0'"),
    ],
)
def test_fidelities_must_be_numbered_from_zero(datasets, message):
    with pytest.raises(ValueError, match=message):
        MixedFidelityDataset(datasets)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"none\.h5"):
        MixedFidelityDataset({0: "none.h5"})


def test_element_without_self_atomic_energy():
    sae = {f: dict(SAE[f]) for f in range(3)}
    del sae[1][8]
    with pytest.raises(ValueError, match=r"O \(8\) in .*tiny_fid1\.h5 not among .* of fidelity 1: H \(1\), C \(6\)"):
        MixedFidelityDataset(TINY, sae)


def test_self_atomic_energies_for_other_fidelities():
    with pytest.raises(ValueError, match="found for fidelities 0, 1, but there are datasets for 0, 1, 2"):
        MixedFidelityDataset(TINY, {f: SAE[f] for f in (0, 1)})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"y": ("energy", "force")}, "data.y: unknown key 'force'; did you mean forces"),
        ({"y": ("energy", "charge")}, "data.y: unknown key 'charge'"),
        ({"x": ("coord", "numbers", "spin")}, "data.x: unknown key 'spin'"),
        ({"x": ("coord", "charge")}, "data.x: numbers is missing"),
    ],
)
def test_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        MixedFidelityDataset(TINY, **keys)


def test_offset_that_mixes_up_elements():
    with pytest.raises(ValueError, match=r"fidelity_offset: 50 makes element types .* coincide"):
        MixedFidelityDataset(TINY, fidelity_offset=50)
    MixedFidelityDataset({0: TINY[0]}, fidelity_offset=50)


def test_infinite_energy_is_found_at_construction(tmp_path):
    path = write_water(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["003/energy"][1] = np.inf
    with pytest.raises(DatasetError, match=r"a\.h5: group 003: row 1: energy is inf"):
        MixedFidelityDataset({0: path})


@pytest.mark.parametrize("key", ["coord", "charge"])
def test_input_that_is_not_finite_is_named(tmp_path, key):
    path = write_water(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["003"][key][2] = np.nan
    with pytest.raises(DatasetError, match=rf"group 003: row 2: {key} is NaN or infinite"):
        MixedFidelityDataset({0: path}).__getitems__([0, 3, 2])


def test_infinite_label_is_named(tmp_path):
    forces = np.zeros((4, 3, 3), np.float32)
    forces[1] = np.inf
    forces[0] = np.nan
    path = write_water(tmp_path / "a.h5", forces=forces)
    with pytest.raises(DatasetError, match="group 003: row 1: forces is infinite"):
        MixedFidelityDataset({0: path}).__getitems__(range(4))
