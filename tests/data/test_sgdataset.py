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
from aimnet2mult.data.base import LabelCount
from aimnet2mult.data.sgdataset import (
    DatasetError,
    JoinedDataset,
    SizeGroupedDataset,
    dataset_writer,
    expand_files,
    fingerprint,
    open_dataset,
    write_dataset,
)
from aimnet2mult.utils.units import BOHR_ANGSTROM, DEBYE_E_ANGSTROM, HARTREE_EV

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
TINY = Path(__file__).parents[1] / "fixtures" / "tiny_fid0.h5"
KEYS = ("coord", "numbers", "charge", "energy", "forces")
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what a process uses is read from /proc")


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


def test_arrays_in_one_piece_are_read_from_their_place_and_others_by_hdf5(path):
    plain = SizeGroupedDataset(path)
    list(plain.read(np.arange(5), KEYS))
    assert plain._raw is not None
    assert plain._file is None
    compressed = SizeGroupedDataset(TINY)
    list(compressed.read(np.arange(5), KEYS))
    assert compressed._raw is None
    assert compressed._file is not None


@pytest.mark.parametrize("read_cost", [0, 1e9])  # each row by itself; all rows between the first and the last
def test_rows_near_and_far_are_read_the_same(path, groups, monkeypatch, read_cost):
    monkeypatch.setattr(sgdataset, "READ_COST_BYTES", read_cost)
    for indices in ([7, 7, 9], [40, 2, 41, 3], [57, 0, 49], list(range(58))):
        assert_molecules_equal(read_all(SizeGroupedDataset(path), indices), groups, indices)


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
        ("energy", 4, np.inf, "group 012: row 4: energy is inf.*NaN would mark a missing energy"),
        ("energy", 0, -np.inf, "group 012: row 0: energy is -inf"),
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
    arrays["energy"][69_000] = np.inf
    write_dataset(tmp_path / "a.h5", {1: arrays})
    with pytest.raises(DatasetError, match="row 69000: energy is inf"):
        _ = SizeGroupedDataset(tmp_path / "a.h5").elements


def test_single_precision_energies_are_noted_once(tmp_path, groups, caplog):
    write_dataset(tmp_path / "good.h5", groups)
    for n_atoms in groups:
        groups[n_atoms]["energy"] = groups[n_atoms]["energy"].astype(np.float32)
    write_dataset(tmp_path / "a.h5", groups)
    write_dataset(tmp_path / "b.h5", groups)
    open_dataset([tmp_path / "*.h5"])
    (record,) = caplog.records
    assert f"{tmp_path / 'a.h5'} and 1 more: energies are stored in single precision" in record.message


def test_nan_energy_is_a_missing_label(path):
    damage(path, lambda file: file["012/energy"].__setitem__(4, np.nan))
    assert SizeGroupedDataset(path).elements == [1, 6, 8]


def test_file_that_ends_before_its_data(path):
    """Here HDF5 is not asked, so that what it would notice on opening has to be noticed on reading."""
    dataset = SizeGroupedDataset(path)
    array = dataset._groups[12]["energy"]
    dataset._groups[12]["energy"] = array._replace(offset=path.stat().st_size - 8)
    with pytest.raises(DatasetError, match=r"data\.h5: the file ends before its data. Copy the file anew"):
        list(dataset.read(np.arange(51, 58), ("energy",)))


def test_disk_that_cannot_be_read_is_named(path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DatasetError, match=r"data\.h5: cannot be read \(.*Input/output error\)"):
        list(SizeGroupedDataset(path).read(np.arange(5), ("energy",)))


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_file_replaced_by_another_is_refused_not_misread(tmp_path, groups, compression):
    path = tmp_path / "data.h5"
    write_dataset(path, groups, compression=compression)
    dataset = SizeGroupedDataset(path)
    write_dataset(path, {12: group(9, 12, seed=1)}, compression=compression)
    with pytest.raises(DatasetError, match=r"data\.h5: the file has been replaced since it was opened"):
        list(dataset.read(np.arange(5), ("energy",)))


def test_file_replaced_while_it_is_read_keeps_its_content(path, groups):
    dataset = SizeGroupedDataset(path)
    list(dataset.read(np.arange(1), ("energy",)))
    write_dataset(path, {12: group(9, 12, seed=1)})
    assert_molecules_equal(read_all(dataset, np.arange(58)), groups, np.arange(58))


def test_where_names_file_group_and_row(path):
    assert SizeGroupedDataset(path).where(52).endswith("data.h5: group 012: row 1")


# --------------------------------------------------------------------------------------------------
# memory
# --------------------------------------------------------------------------------------------------


@linux
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Streaming all of a file of 130 MB, and reading a third of its molecules at random, takes less than 40 MB."""
    path, n_molecules = tmp_path / "big.h5", 200_000
    with dataset_writer(path, {40: n_molecules}) as writer:
        arrays = {key: values for key, values in group(10_000, 40).items() if key != "forces"}
        for first in range(0, n_molecules, 10_000):
            writer.write(40, first, arrays)
    code = (
        "import sys, numpy as np\n"
        "from aimnet2mult.data.sgdataset import SizeGroupedDataset\n"
        "def resident():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) // 1024\n"
        "dataset = SizeGroupedDataset(sys.argv[1])\n"
        "list(dataset.read(np.arange(100), ('coord', 'numbers', 'energy')))\n"
        "before = resident()\n"
        "for _ in dataset.chunks(('coord', 'numbers', 'energy'), max_rows=8192): pass\n"
        "rng = np.random.default_rng(0)\n"
        "for _ in range(700):\n"
        "    list(dataset.read(rng.integers(len(dataset), size=100), ('coord', 'numbers', 'energy')))\n"
        "print(resident() - before)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True, timeout=120
    )
    assert path.stat().st_size > 120e6
    assert int(out.stdout) < 40


def test_wide_arrays_are_streamed_in_small_pieces(tmp_path, groups, monkeypatch):
    monkeypatch.setattr(sgdataset, "PIECE_BYTES", 12 * 12 * 2)
    write_dataset(tmp_path / "a.h5", {12: groups[12]})
    pieces = [len(arrays["coord"]) for _, arrays in SizeGroupedDataset(tmp_path / "a.h5").chunks(("coord", "energy"))]
    assert pieces == [2, 2, 2, 1]


def test_cache_is_shared_by_the_files_of_a_dataset(tmp_path, groups, caplog):
    for name in ("a", "b", "c"):
        write_dataset(tmp_path / f"{name}.h5", groups, compression="gzip")
    size = SizeGroupedDataset(tmp_path / "a.h5").packed_bytes
    assert size == sum(values.nbytes for arrays in groups.values() for values in arrays.values())
    dataset = open_dataset(tmp_path / "*.h5", cache_bytes=2 * size)
    list(dataset.read(np.arange(len(dataset)), KEYS))
    in_memory = [sum(values.nbytes for values in part._cache.values()) for part in dataset.parts]
    assert in_memory == [size, size, 0]
    (record,) = caplog.records
    assert f"{tmp_path / 'c.h5'}: 0.0 GiB of chunked or compressed arrays" in record.message
    assert "python -m aimnet2mult.tools.convert_data c.h5" in record.message


# --------------------------------------------------------------------------------------------------
# units
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def atomic_units(tmp_path):
    arrays = group(4, 3)
    arrays["coord"] = arrays["coord"].astype(np.float64)
    arrays["dipole"] = np.ones((4, 3), np.float32)
    write_dataset(
        tmp_path / "au.h5",
        {3: arrays},
        {
            "level": "HF",
            "coord_unit": "bohr",
            "energy_unit": "Hartree",
            "forces_unit": "Eh/a0",
            "dipole_unit": "D",
            "charge_unit": "e",
        },
    )
    return tmp_path / "au.h5", arrays


def test_units_of_the_file_become_those_of_the_package(atomic_units):
    path, stored = atomic_units
    dataset = SizeGroupedDataset(path)
    expected = {
        "coord": stored["coord"] * BOHR_ANGSTROM,
        "energy": stored["energy"] * HARTREE_EV,
        "forces": (stored["forces"].astype(float) * (HARTREE_EV / BOHR_ANGSTROM)).astype(np.float32),
        "dipole": (stored["dipole"].astype(float) * DEBYE_E_ANGSTROM).astype(np.float32),
        "charge": stored["charge"],
        "numbers": stored["numbers"],
    }
    ((_, chunk),) = dataset.chunks(tuple(expected))
    ((_, rows),) = dataset.read(np.arange(4), tuple(expected))
    for key, values in expected.items():
        for arrays in (chunk, rows):
            np.testing.assert_array_equal(arrays[key], values)
            assert arrays[key].dtype == values.dtype


def test_energies_are_converted_in_double_precision(tmp_path):
    """-2574.1 Hartree (bromobenzene) in float32 would be off by more than 2 meV in eV."""
    arrays = {**group(2, 3), "energy": np.full(2, -2574.125, np.float32)}
    write_dataset(tmp_path / "a.h5", {3: arrays}, {"energy_unit": "Hartree"})
    ((_, converted),) = SizeGroupedDataset(tmp_path / "a.h5").chunks(("energy",))
    assert converted["energy"].dtype == np.float64
    np.testing.assert_array_equal(converted["energy"], -2574.125 * HARTREE_EV)


def test_integer_coordinates_are_converted_to_real_ones(tmp_path):
    arrays = {**group(2, 3), "coord": np.ones((2, 3, 3), np.int32)}
    write_dataset(tmp_path / "a.h5", {3: arrays}, {"coord_unit": "nm"})
    ((_, converted),) = SizeGroupedDataset(tmp_path / "a.h5").read(np.arange(2), ("coord",))
    np.testing.assert_array_equal(converted["coord"], np.full((2, 3, 3), 10.0))


@pytest.mark.parametrize(
    ("name", "unit", "message"),
    [
        ("energy_unit", "Hartre", r"a\.h5: attribute energy_unit: 'Hartre' is not a unit of energy; known: eV, meV"),
        ("energy_unit", 3, "attribute energy_unit: '3' is not a unit of energy"),
        ("force_unit", "eV/Bohr", "attribute force_unit: there is no such quantity; did you mean forces_unit"),
        ("charges_unit", "milli e", "attribute charges_unit: 'milli e' cannot be converted. Store charges in e."),
    ],
)
def test_units_that_are_refused(tmp_path, groups, name, unit, message):
    path = tmp_path / "a.h5"
    with pytest.raises(DatasetError, match=message):
        write_dataset(path, groups, {name: unit})
    assert not path.exists()
    write_dataset(path, groups)
    damage(path, lambda file: file.attrs.__setitem__(name, unit))
    with pytest.raises(DatasetError, match=message):
        SizeGroupedDataset(path)


def test_unit_as_bytes_is_read(path, groups):
    damage(path, lambda file: file.attrs.__setitem__("energy_unit", np.bytes_("kcal/mol")))
    first = next(SizeGroupedDataset(path).chunks(("energy",)))[1]
    np.testing.assert_allclose(first["energy"], groups[3]["energy"] / 23.060548012069493, rtol=1e-14)


# --------------------------------------------------------------------------------------------------
# several files
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def three_files(tmp_path):
    """Files of which the second holds no forces, the third a further label and energies in Hartree."""
    contents = {name: {3: group(5, 3, seed), 12: group(4, 12, seed)} for seed, name in enumerate("abc")}
    for arrays in contents["b"].values():
        del arrays["forces"]
    contents["c"][7] = {**group(3, 7), "mult": np.ones(3)}
    for name, groups in contents.items():
        write_dataset(tmp_path / f"{name}.h5", groups, {"energy_unit": "Hartree"} if name == "c" else None)
    return tmp_path, contents


def test_several_files_are_one_dataset(three_files):
    folder, _ = three_files
    dataset = open_dataset(folder / "*.h5")
    assert isinstance(dataset, JoinedDataset)
    parts = [SizeGroupedDataset(folder / f"{name}.h5") for name in "abc"]
    assert len(dataset) == 30
    assert dataset.files == tuple(folder / f"{name}.h5" for name in "abc")
    assert dataset.keys == {*KEYS, "mult"}
    assert dataset.elements == [1, 6, 8]
    assert dataset.name == f"{folder / 'a.h5'} and 2 more"
    np.testing.assert_array_equal(
        dataset.n_atoms, [3] * 5 + [12] * 4 + [3] * 5 + [12] * 4 + [3] * 5 + [7] * 3 + [12] * 4
    )
    expected = [molecule for part in parts for molecule in read_all(part, np.arange(len(part)))]
    indices = np.random.default_rng(0).integers(30, size=100)
    for molecule, index in zip(read_all(dataset, indices), indices, strict=True):
        assert molecule.keys() == expected[index].keys()
        for key, values in molecule.items():
            np.testing.assert_array_equal(values, expected[index][key])


def test_chunks_of_several_files_are_in_order(three_files):
    folder, _ = three_files
    dataset = open_dataset([folder / "b.h5", folder / "a.h5"])  # sorted, whatever the order
    pieces = list(dataset.chunks(("energy", "forces"), max_rows=4))
    assert [first for first, _ in pieces] == [0, 4, 5, 9, 13, 14]
    assert ["forces" in arrays for _, arrays in pieces] == [True] * 3 + [False] * 3
    energies = np.concatenate([arrays["energy"] for _, arrays in pieces])
    for index, molecule in enumerate(read_all(dataset, np.arange(18))):
        assert molecule["energy"] == energies[index]


def test_where_names_the_right_file(three_files):
    folder, _ = three_files
    dataset = open_dataset(folder / "*.h5")
    assert dataset.where(8) == f"{folder / 'a.h5'}: group 012: row 3"
    assert dataset.where(9) == f"{folder / 'b.h5'}: group 003: row 0"
    assert dataset.where(29) == f"{folder / 'c.h5'}: group 012: row 3"


def test_fault_in_one_of_several_files_is_named(three_files):
    folder, _ = three_files
    damage(folder / "b.h5", lambda file: file["012/energy"].__setitem__(2, np.inf))
    with pytest.raises(DatasetError, match=r"b\.h5: group 012: row 2: energy is inf"):
        _ = open_dataset(folder / "*.h5").elements


def test_several_files_can_be_pickled(three_files):
    folder, _ = three_files
    dataset = open_dataset(folder / "*.h5")
    list(dataset.read(np.arange(30), KEYS))
    copied = pickle.loads(pickle.dumps(dataset))
    for here, there in zip(read_all(dataset, np.arange(30)), read_all(copied, np.arange(30)), strict=True):
        assert here["energy"] == there["energy"]


def test_index_beyond_the_last_file(three_files):
    folder, _ = three_files
    for index in (-1, 30):
        with pytest.raises(IndexError, match="0 to 29"):
            list(open_dataset(folder / "*.h5").read(np.array([index]), KEYS))


@linux
def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sgdataset, "MAX_OPEN_FILES", 3)
    for i in range(12):
        write_dataset(tmp_path / f"{i:02d}.h5", {2: group(2, 2, seed=i)}, compression="gzip" if i % 2 else None)
    before = len(os.listdir("/proc/self/fd"))
    dataset = open_dataset(tmp_path / "*.h5", cache_bytes=0)
    for _ in range(2):
        molecules = read_all(dataset, np.arange(24)[::-1])
        for index, molecule in zip(range(23, -1, -1), molecules, strict=True):
            assert molecule["energy"] == group(2, 2, seed=index // 2)["energy"][index % 2]
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_and_patterns_of_files(tmp_path, monkeypatch):
    for name in ("b.h5", "a.h5", "c[1].h5", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub.h5").mkdir()
    (tmp_path / "sub.h5" / "e.h5").touch()
    found = [tmp_path / name for name in ("a.h5", "b.h5", "c[1].h5")]
    assert expand_files(tmp_path / "*.h5") == found
    assert expand_files([str(tmp_path / "b.h5"), tmp_path / "[ab].h5", tmp_path / "a.h5"]) == found[:2]
    assert expand_files(tmp_path / "c[1].h5") == found[2:]
    assert expand_files(str(tmp_path / "**" / "e.h5")) == [tmp_path / "sub.h5" / "e.h5"]
    monkeypatch.chdir(tmp_path)
    assert expand_files(["a.h5", "./a.h5", str(tmp_path / "a.h5")]) == found[:1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["{}/a.h5", "{}/x*.h5"], r"x\*\.h5: no file matches"),
        ("{}/none.h5", r"none\.h5: no such file"),
        ("{}", r"is a folder. Name the files in it, such as .*\*\.h5"),
        ([], "no dataset files given"),
    ],
)
def test_names_that_stand_for_no_file(tmp_path, groups, files, message):
    write_dataset(tmp_path / "a.h5", groups)
    given = files.format(tmp_path) if isinstance(files, str) else [name.format(tmp_path) for name in files]
    with pytest.raises((FileNotFoundError, DatasetError), match=message):
        open_dataset(given)


# --------------------------------------------------------------------------------------------------
# counts of labels, fingerprints
# --------------------------------------------------------------------------------------------------


LABELS = ("energy", "forces", "charges")


@pytest.fixture
def gaps(tmp_path):
    """30 000 molecules: forces of 1000 are NaN in one number, 10 000 have no array of forces; no charges at all."""
    first, second = group(20_000, 2), group(10_000, 1)
    del second["forces"]
    first["forces"][::20, 1, 2] = np.nan
    first["energy"][7] = np.nan
    write_dataset(tmp_path / "gaps.h5", {2: first, 1: second})
    return SizeGroupedDataset(tmp_path / "gaps.h5")


def test_labels_are_counted(gaps):
    assert gaps.label_counts(LABELS) == {
        "energy": LabelCount(29_999, 1, exact=True),
        "forces": LabelCount(19_000, 11_000, exact=True),
        "charges": LabelCount(0, 30_000, exact=True),
    }


def test_labels_of_large_data_are_counted_in_a_sample(gaps):
    assert gaps.label_bytes(LABELS) == 30_000 * 4 + 50_000 * 3 * 4
    counts = gaps.label_counts(LABELS, max_bytes=gaps.label_bytes(LABELS) - 1)
    assert counts["forces"].molecules + counts["forces"].missing == 30_000
    assert counts["forces"].molecules == pytest.approx(19_000, abs=50)
    assert not counts["forces"].exact
    assert str(counts["forces"]) == f"about {counts['forces'].molecules} of 30000"
    assert counts["charges"] == LabelCount(0, 30_000, exact=True)  # there is no such array: nothing to extrapolate


def test_small_groups_are_counted_exactly_whatever_the_limit(path):
    assert SizeGroupedDataset(path).label_counts(("forces",), 0) == {"forces": LabelCount(58, 0, exact=True)}


def test_labels_of_several_files_are_counted(three_files):
    folder, _ = three_files
    damage(folder / "c.h5", lambda file: file["003/energy"].__setitem__(slice(0, 2), np.nan))
    counts = open_dataset(folder / "*.h5").label_counts(("energy", "forces"))
    assert counts == {"energy": LabelCount(28, 2, True), "forces": LabelCount(21, 9, True)}
    assert str(counts["energy"]) == "28 of 30"


def test_limit_of_counting_is_for_all_files_together(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / f"{name}.h5", {1: group(5000, 1)})
    dataset = open_dataset(tmp_path / "*.h5")
    assert dataset.label_counts(("forces",), max_bytes=10_000 * 12)["forces"] == LabelCount(10_000, 0, exact=True)
    assert dataset.label_counts(("forces",), max_bytes=9_999 * 12)["forces"] == LabelCount(10_000, 0, exact=False)


def test_fingerprint_tells_files_apart_by_their_content(tmp_path, groups):
    def sha(name, changed=groups, attributes=None, **options):
        write_dataset(tmp_path / name, changed, attributes, **options)
        (entry,) = fingerprint(open_dataset(tmp_path / name))
        assert entry["path"] == str(tmp_path / name)
        assert entry["bytes"] == (tmp_path / name).stat().st_size
        assert entry["molecules"] == sum(len(arrays["energy"]) for arrays in changed.values())
        return entry["sha256"]

    original = sha("a.h5")
    assert sha("b.h5") == original
    assert sha("c.h5", compression="gzip") == original
    assert sha("d.h5", attributes={"energy_unit": "Hartree"}) != original
    other = {n_atoms: dict(arrays) for n_atoms, arrays in groups.items()}
    other[5]["energy"] = other[5]["energy"] + 1e-9
    assert sha("e.h5", other) != original
    del other[5]
    assert sha("f.h5", other) != original
    assert [entry["sha256"] for entry in fingerprint(open_dataset(tmp_path / "[abe].h5"))][:2] == [original] * 2


def test_fingerprint_of_text_arrays(tmp_path, groups):
    for name, text in (("a", "methane"), ("b", "ethane")):
        groups[5]["label"] = np.array([text], object)
        write_dataset(tmp_path / f"{name}.h5", groups)
    first, second = fingerprint(open_dataset([tmp_path / "a.h5", tmp_path / "b.h5"]))
    assert first["sha256"] != second["sha256"]


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
