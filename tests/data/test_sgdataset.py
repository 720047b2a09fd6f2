import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

from aimnet2mult.data import sgdataset
from aimnet2mult.data.sgdataset import DatasetError, SizeGroupedDataset, dataset_writer, write_dataset

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
TINY = Path(__file__).parents[1] / "fixtures" / "tiny_fid0.h5"
KEYS = ("coord", "numbers", "charge", "energy", "forces")


def group(n_molecules, n_atoms, seed=0):
    rng = np.random.default_rng([seed, n_atoms])
    return {
        "coord": rng.normal(size=(n_molecules, n_atoms, 3)).astype(np.float32),
        "numbers": rng.choice([1, 6, 8], (n_molecules, n_atoms)).astype(np.int32),
        "charge": rng.integers(-1, 2, n_molecules).astype(np.float32),
        "energy": rng.normal(-1e5, 1.0, n_molecules),
        "forces": rng.normal(size=(n_molecules, n_atoms, 3)).astype(np.float32),
    }


@pytest.fixture
def groups():
    return {12: group(7, 12), 3: group(50, 3), 5: group(1, 5)}


@pytest.fixture
def path(tmp_path, groups):
    write_dataset(tmp_path / "data.h5", groups)
    return tmp_path / "data.h5"


def read_all(dataset, indices):
    """Arrays of each molecule by position, through `read`."""
    molecules = [None] * len(indices)
    for positions, arrays in dataset.read(indices, KEYS):
        for row, position in enumerate(positions):
            assert molecules[position] is None
            molecules[position] = {key: values[row] for key, values in arrays.items()}
    return molecules


def assert_molecules_equal(molecules, groups, indices):
    expected = [(n, row) for n in sorted(groups) for row in range(len(groups[n]["energy"]))]
    for molecule, index in zip(molecules, indices, strict=True):
        n_atoms, row = expected[index]
        for key in KEYS:
            np.testing.assert_array_equal(molecule[key], groups[n_atoms][key][row])
            assert molecule[key].dtype == groups[n_atoms][key].dtype


# --------------------------------------------------------------------------------------------------
# reading and writing
# --------------------------------------------------------------------------------------------------


def test_round_trip_keeps_every_bit(path, groups):
    dataset = SizeGroupedDataset(path)
    assert len(dataset) == 58
    assert dataset.sizes == {3: 50, 5: 1, 12: 7}
    assert list(dataset.sizes) == [3, 5, 12]
    assert dataset.keys == set(KEYS)
    assert dataset.elements == [1, 6, 8]
    np.testing.assert_array_equal(dataset.n_atoms, [3] * 50 + [5] + [12] * 7)
    indices = np.random.default_rng(1).integers(58, size=200)  # any order, with repeats
    assert_molecules_equal(read_all(dataset, indices), groups, indices)


@pytest.mark.parametrize("cache_bytes", [0, sgdataset.CACHE_BYTES])
@pytest.mark.parametrize("options", [{"chunks": (4,)}, {"chunks": (4,), "compression": "gzip"}, {}])
def test_every_storage_reads_the_same(tmp_path, groups, options, cache_bytes):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        for n_atoms, arrays in groups.items():
            for key, values in arrays.items():
                stored = dict(options)
                if "chunks" in stored:
                    stored["chunks"] = (min(4, len(values)), *values.shape[1:])
                file.create_dataset(f"{n_atoms}/{key}", data=values, **stored)
    dataset = SizeGroupedDataset(path, cache_bytes=cache_bytes)
    indices = np.random.default_rng(2).integers(58, size=100)
    assert_molecules_equal(read_all(dataset, indices), groups, indices)
    expected = np.concatenate([groups[n_atoms]["energy"] for n_atoms in sorted(groups)])
    for first, arrays in dataset.chunks(("energy",), max_rows=8):
        np.testing.assert_array_equal(arrays["energy"], expected[first : first + len(arrays["energy"])])


def test_contiguous_arrays_are_mapped_and_others_are_not(path):
    mapped = SizeGroupedDataset(path)
    list(mapped.read(np.arange(5), KEYS))
    assert mapped._map is not None
    assert mapped._file is None
    compressed = SizeGroupedDataset(TINY)
    list(compressed.read(np.arange(5), KEYS))
    assert compressed._map is None
    assert compressed._file is not None


def test_user_block_and_foreign_byte_order_are_read(tmp_path, groups):
    path = tmp_path / "block.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, values in groups[3].items():
            file.create_dataset(f"003/{key}", data=values.astype(values.dtype.newbyteorder(">")))
    for _, arrays in SizeGroupedDataset(path).read(np.arange(50), KEYS):
        for key in KEYS:
            np.testing.assert_array_equal(arrays[key], groups[3][key])


def test_what_is_read_may_be_changed(path, groups):
    dataset = SizeGroupedDataset(path)
    for _, arrays in dataset.chunks(("coord",)):
        arrays["coord"] += 1.0
    for _, arrays in dataset.read(np.arange(58), ("coord",)):
        arrays["coord"] += 1.0
    assert_molecules_equal(read_all(dataset, np.arange(58)), groups, np.arange(58))


def test_chunks_cover_the_file_in_order(path, groups):
    pieces = list(SizeGroupedDataset(path).chunks(("numbers", "absent"), max_rows=20))
    assert [(first, a["numbers"].shape) for first, a in pieces] == [
        (0, (20, 3)),
        (20, (20, 3)),
        (40, (10, 3)),
        (50, (1, 5)),
        (51, (7, 12)),
    ]
    assert all(set(arrays) == {"numbers"} for _, arrays in pieces)


def test_array_that_a_group_lacks_is_absent(tmp_path, groups):
    del groups[5]["forces"]
    write_dataset(tmp_path / "part.h5", groups)
    dataset = SizeGroupedDataset(tmp_path / "part.h5")
    found = {first: "forces" in arrays for first, arrays in dataset.chunks(("forces",))}
    assert found == {0: True, 50: False, 51: True}
    assert "forces" in dataset.keys


def test_index_out_of_range_is_refused(path):
    for index in (-1, 58):
        with pytest.raises(IndexError, match="0 to 57"):
            list(SizeGroupedDataset(path).read(np.array([index]), KEYS))


def _mean_energy(dataset):
    return float(np.mean([arrays["energy"].mean() for _, arrays in dataset.chunks(("energy",))]))


@pytest.mark.parametrize("cache_bytes", [0, sgdataset.CACHE_BYTES])
def test_reads_in_a_forked_process_after_reading_here(cache_bytes):
    dataset = SizeGroupedDataset(TINY, cache_bytes=cache_bytes)
    here = _mean_energy(dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads, which the child does not use
        child = os.fork()
    if child == 0:
        os._exit(0 if _mean_energy(dataset) == here else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("cache_bytes", [0, sgdataset.CACHE_BYTES])
def test_reads_in_a_new_process_after_reading_here(tmp_path, cache_bytes):
    dataset = SizeGroupedDataset(TINY, cache_bytes=cache_bytes)
    here = _mean_energy(dataset)
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(dataset))
    code = (
        "import pickle, sys, numpy as np\n"
        "dataset = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(repr(float(np.mean([a['energy'].mean() for _, a in dataset.chunks(('energy',))]))))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dataset.pickle")]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert float(out.stdout) == here


def test_pickle_holds_no_data(path):
    dataset = SizeGroupedDataset(path)
    before = len(pickle.dumps(dataset))
    list(dataset.read(np.arange(58), KEYS))
    assert len(pickle.dumps(dataset)) == before


def test_attributes_are_stored(tmp_path, groups):
    write_dataset(tmp_path / "a.h5", groups, {"level": "HF/STO-3G"})
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["level"] == "HF/STO-3G"


# --------------------------------------------------------------------------------------------------
# writing fails cleanly
# --------------------------------------------------------------------------------------------------


def test_failed_writing_leaves_the_old_file(path, groups):
    before = path.read_bytes()
    groups[5]["forces"] = groups[5]["forces"][:, :4]
    with pytest.raises(DatasetError, match=r"group 005: forces has shape \(1, 4, 3\), expected \(1, 5, 3\)"):
        write_dataset(path, groups)
    del groups[5]["energy"]
    with pytest.raises(DatasetError, match="group 005: energy missing"):
        write_dataset(path, groups)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["data.h5"]


def test_groups_without_numbers_are_refused(tmp_path, groups):
    del groups[3]["numbers"]
    with pytest.raises(DatasetError, match="group 003: numbers missing"):
        write_dataset(tmp_path / "a.h5", groups)
    with pytest.raises(DatasetError, match="no molecules"):
        write_dataset(tmp_path / "a.h5", {})
    assert list(tmp_path.iterdir()) == []


def test_incomplete_writing_leaves_nothing(tmp_path, groups):
    with (
        pytest.raises(DatasetError, match="group 003: charge has 50 of 51 rows"),
        dataset_writer(tmp_path / "a.h5", {3: 51}) as writer,
    ):
        writer.write(3, 0, groups[3])
    with (
        pytest.raises(DatasetError, match="group 004: charge has 0 of 2 rows"),
        dataset_writer(tmp_path / "a.h5", {3: 50, 4: 2}) as writer,
    ):
        writer.write(3, 0, groups[3])
    with pytest.raises(KeyboardInterrupt), dataset_writer(tmp_path / "a.h5", {3: 50}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folder_that_does_not_exist(tmp_path, groups):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_dataset(tmp_path / "nowhere" / "a.h5", groups)


# --------------------------------------------------------------------------------------------------
# files that cannot be used
# --------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5: no such file"):
        SizeGroupedDataset(tmp_path / "none.h5")


def test_not_hdf5(tmp_path):
    (tmp_path / "a.h5").write_text("energies: 1")
    for path in (tmp_path / "a.h5", tmp_path):
        with pytest.raises(DatasetError, match="not an HDF5 file"):
            SizeGroupedDataset(path)


def test_truncated_file(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"data\.h5: cannot be read as HDF5 .*Copy the file anew"):
        SizeGroupedDataset(path)


def damage(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def _replace(name, values):
    def change(file):
        del file[name]
        file[name] = values

    return change


STRUCTURE_FAULTS = {
    "name is no atom count": (lambda f: f.move("003", "water"), r"group water: the name is not a number of atoms"),
    "zero atoms": (lambda f: f.move("003", "000"), r"group 000: the name is not a number of atoms"),
    "same size twice": (lambda f: f.copy("003", "3"), r"group 3: group 003 is for 3 atoms, too"),
    "array outside of groups": (lambda f: f.create_dataset("energy", data=np.zeros(3)), r"energy is not a group"),
    "group inside a group": (lambda f: f.create_group("003/forces2"), r"group 003: forces2 is not an array"),
    "no energy": (lambda f: f.__delitem__("012/energy"), r"group 012: energy missing.*Every group needs"),
    "no coord and charge": (
        lambda f: [f.__delitem__(f"003/{k}") for k in ("coord", "charge")],
        r"group 003: coord, charge missing",
    ),
    "length of energy": (
        _replace("003/energy", np.zeros(49)),
        r"group 003: energy has shape \(49,\), expected \(50,\)",
    ),
    "length of an unknown array": (
        lambda f: f.create_dataset("003/label", data=np.zeros(4)),
        r"group 003: label has shape \(4,\), expected 50 rows",
    ),
    "energy is a column": (_replace("003/energy", np.zeros((50, 1))), r"energy has shape \(50, 1\), expected \(50,\)"),
    "atoms of coord": (
        _replace("003/coord", np.zeros((50, 4, 3))),
        r"group 003: coord has shape \(50, 4, 3\), expected \(50, 3, 3\) for 50 molecules .* of 3 atoms",
    ),
    "atoms of numbers": (_replace("003/numbers", np.ones((50, 4), int)), r"numbers has shape \(50, 4\)"),
    "numbers are real": (_replace("003/numbers", np.ones((50, 3))), r"numbers holds float64, expected integers"),
    "charge is text": (_replace("003/charge", np.array([b"0"] * 50)), r"charge holds \|S1, expected real numbers"),
    "empty": (lambda f: [f.__delitem__(name) for name in list(f)], r"no molecules in the file"),
}


@pytest.mark.parametrize("fault", STRUCTURE_FAULTS)
def test_fault_in_structure_is_named_on_opening(path, fault):
    change, message = STRUCTURE_FAULTS[fault]
    damage(path, change)
    with pytest.raises(DatasetError, match=message) as error:
        SizeGroupedDataset(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "row", "value", "message"),
    [
        ("energy", 4, np.nan, "group 012: row 4: energy is nan"),
        ("energy", 0, np.inf, "group 012: row 0: energy is inf"),
        ("numbers", (3, 11), 0, "group 012: row 3: numbers has 0, expected atomic numbers from 1 to 118"),
        ("numbers", (6, 0), 206, "group 012: row 6: numbers has 206.*no fidelity offset"),
        ("numbers", (6, 0), -1, "group 012: row 6: numbers has -1"),
    ],
)
def test_fault_in_values_is_named_when_streamed(path, key, row, value, message):
    def change(file):
        file["012"][key][row] = value

    damage(path, change)
    dataset = SizeGroupedDataset(path)
    with pytest.raises(DatasetError, match=message):
        _ = dataset.elements


def test_row_of_a_fault_beyond_the_first_piece(tmp_path):
    arrays = group(70_000, 1)
    arrays["energy"][69_000] = np.nan
    write_dataset(tmp_path / "a.h5", {1: arrays})
    with pytest.raises(DatasetError, match="row 69000: energy is nan"):
        _ = SizeGroupedDataset(tmp_path / "a.h5").elements


def test_single_precision_energies_are_noted(tmp_path, groups, caplog):
    groups[3]["energy"] = groups[3]["energy"].astype(np.float32)
    write_dataset(tmp_path / "a.h5", groups)
    SizeGroupedDataset(tmp_path / "a.h5")
    assert "group 003: energy is stored as float32" in caplog.text


def test_where_names_file_group_and_row(path):
    assert SizeGroupedDataset(path).where(52).endswith("data.h5: group 012: row 1")


# --------------------------------------------------------------------------------------------------
# the example data
# --------------------------------------------------------------------------------------------------


def _formulas(name):
    return {
        tuple(sorted(Counter(row.tolist()).items()))
        for _, arrays in SizeGroupedDataset(EXAMPLES / name).chunks(("numbers",))
        for row in arrays["numbers"]
    }


LEVELS = {"fid0_dft": (1104, 201), "fid1_gfn2": (4000, 300), "fid2_gfn1": (4000, 300)}


@pytest.mark.parametrize("level", LEVELS)
def test_example_files_have_the_structures_of_their_readme(level):
    for part, n_molecules in zip(("train", "test"), LEVELS[level], strict=True):
        assert len(SizeGroupedDataset(EXAMPLES / f"{level}_{part}.h5")) == n_molecules
    assert not _formulas(f"{level}_train.h5") & _formulas(f"{level}_test.h5")


def test_example_files_have_the_labels_of_their_readme():
    labels = {"forces", "charges", "spin_charges"}
    found = {level: labels & SizeGroupedDataset(EXAMPLES / f"{level}_train.h5").keys for level in LEVELS}
    assert found == {"fid0_dft": labels, "fid1_gfn2": {"forces", "charges"}, "fid2_gfn1": set()}


def test_example_data_are_small():
    assert sum(file.stat().st_size for file in EXAMPLES.iterdir()) < 3.5e6
