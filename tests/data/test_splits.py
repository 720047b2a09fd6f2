import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset
from aimnet2mult.data.splits import (
    composition_hashes,
    key_hashes,
    load_split,
    mix64,
    save_split,
    split_indices,
    validation_counts,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
FILES = [EXAMPLES / f"{name}_train.h5" for name in ("fid0_dft", "fid1_gfn2", "fid2_gfn1")]
NAMES = {0: "dft", 1: "gfn2", 2: "gfn1"}


@pytest.fixture(scope="module")
def dataset():
    return MixedFidelityDataset({f: FIXTURES / f"tiny_fid{f}.h5" for f in range(3)})


@pytest.fixture(scope="module")
def real():
    return MixedFidelityDataset(dict(enumerate(FILES)))


def arrays_of(rng, formulas, **more):
    """Arrays of a group: a molecule per formula (atomic numbers), atoms in random order."""
    numbers = np.array([rng.permutation(formula) for formula in formulas])
    n, n_atoms = numbers.shape
    return {
        "coord": rng.normal(size=(n, n_atoms, 3)).astype(np.float32),
        "numbers": numbers,
        "charge": rng.integers(-1, 2, n),
        "energy": rng.normal(size=n),
        **more,
    }


def write(path, formulas, seed=0, **more):
    """Write a dataset with molecules of one size."""
    write_dataset(path, {len(formulas[0]): arrays_of(np.random.default_rng(seed), formulas, **more)})
    return path


def formulas_of(dataset):
    """Sorted atomic numbers of each molecule, plain."""
    return [tuple(sorted((sample["numbers"] % 200).tolist())) for sample in dataset.__getitems__(range(len(dataset)))]


def sides(dataset, values, val):
    """For each value the set of sides (True is validation) on which its molecules are."""
    found = {}
    for index, value in enumerate(values):
        found.setdefault(value, set()).add(index in val)
    return found


# --------------------------------------------------------------------------------------------------
# by molecule
# --------------------------------------------------------------------------------------------------


def test_split_is_a_partition_with_the_share_of_every_fidelity(dataset):
    train, val = split_indices(dataset, 0.1, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(560))
    assert np.bincount(dataset.fidelities[val]).tolist() == [16, 20, 20]
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    assert validation_counts(dataset, val) == {0: (16, 160), 1: (20, 200), 2: (20, 200)}


def test_split_follows_from_the_seed(dataset):
    first, again, other = (split_indices(dataset, 0.2, seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_tiny_fraction_still_validates_every_fidelity(dataset):
    _, val = split_indices(dataset, 1e-6, seed=0)
    assert dataset.fidelities[val].tolist() == [0, 1, 2]


def test_nearly_all_for_validation_leaves_a_training_molecule(dataset):
    train, _ = split_indices(dataset, 0.9999, seed=0)
    assert dataset.fidelities[train].tolist() == [0, 1, 2]


@pytest.mark.parametrize("by", ["molecule", "composition"])
def test_no_validation(dataset, by):
    train, val = split_indices(dataset, 0.0, seed=0, by=by)
    assert len(train) == 560
    assert len(val) == 0


@pytest.mark.parametrize("by", ["molecule", "composition"])
def test_single_molecule_is_for_training(tmp_path, by):
    alone = write(tmp_path / "alone.h5", [(1, 1, 8)])
    two = write(tmp_path / "two.h5", [(1, 1, 16), (6, 8, 8)])
    data = MixedFidelityDataset({0: alone, 1: two})
    for seed in range(20):
        train, val = split_indices(data, 0.5, seed, by)
        assert 0 in train
        assert len(val) == 1


@pytest.mark.parametrize("by", ["molecule", "composition"])
def test_fidelities_that_are_not_divided_are_for_training(real, by):
    train, val = split_indices(real, 0.3, 0, by, fidelities=[2])
    assert set(real.fidelities[val].tolist()) == {2}
    assert np.isin(np.flatnonzero(real.fidelities != 2), train).all()
    all_val = split_indices(real, 0.3, 0, by)[1]
    np.testing.assert_array_equal(val, all_val[real.fidelities[all_val] == 2])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fraction_out_of_range(dataset, fraction):
    with pytest.raises(ValueError, match=r"data.val_fraction: .* is not a share"):
        split_indices(dataset, fraction, seed=0)


# --------------------------------------------------------------------------------------------------
# by composition
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_composition_is_on_both_sides_in_any_fidelity(real, seed):
    train, val = split_indices(real, 0.2, seed, by="composition")
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(len(real)))
    found = sides(real, formulas_of(real), set(val.tolist()))
    assert len(found) > 20
    assert all(len(side) == 1 for side in found.values())
    assert all(0 < held_out < n for held_out, n in validation_counts(real, val).values())


def test_fraction_of_compositions_is_near_the_one_asked_for(real):
    """Of the compositions over many seeds; the share of the molecules follows it, with the spread of few groups."""
    formulas = formulas_of(real)
    n_groups, shares, of_molecules = len(set(formulas)), [], []
    for seed in range(30):
        _, val = split_indices(real, 0.2, seed, by="composition")
        shares.append(len({formulas[i] for i in val}) / n_groups)
        of_molecules.append(len(val) / len(real))
    assert np.mean(shares) == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / n_groups / 30))
    assert np.mean(of_molecules) == pytest.approx(0.2, abs=0.05)


def test_fraction_of_many_compositions(tmp_path):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "many.h5", rng.integers(1, 18, (20_000, 9)))
    data = MixedFidelityDataset({0: path})
    for fraction in (0.01, 0.1, 0.5):
        (held_out, n), *_ = validation_counts(data, split_indices(data, fraction, 1, "composition")[1]).values()
        assert held_out / n == pytest.approx(fraction, abs=4 * np.sqrt(fraction / n))


def test_a_larger_fraction_keeps_the_validation_molecules(real):
    smaller, larger = (split_indices(real, fraction, 4, "composition")[1] for fraction in (0.2, 0.4))
    assert len(larger) > len(smaller)
    assert np.isin(smaller, larger).all()


def test_adding_a_fidelity_leaves_the_others_as_they_were(real):
    fewer = MixedFidelityDataset({0: FILES[0], 1: FILES[1]})
    for seed in range(3):
        _, val = split_indices(fewer, 0.2, seed, "composition")
        _, val_all = split_indices(real, 0.2, seed, "composition")
        np.testing.assert_array_equal(val, val_all[val_all < len(fewer)])


def test_order_of_rows_and_fidelities_does_not_matter(real, tmp_path):
    """The same molecules validate when rows are permuted, files divided or joined, and fidelities numbered anew."""
    rng = np.random.default_rng(0)
    groups = {}
    with h5py.File(FILES[0]) as file:
        for name, group in file.items():
            order = rng.permutation(len(group["numbers"]))
            groups[int(name)] = {key: values[()][order] for key, values in group.items()}
    write_dataset(tmp_path / "permuted.h5", groups)
    permuted = MixedFidelityDataset({0: FILES[1], 1: FILES[2], 2: tmp_path / "permuted.h5"})

    def energies(data, fidelity):
        _, val = split_indices(data, 0.2, 2, "composition")
        mine = val[data.fidelities[val] == fidelity]
        return sorted(float(sample["energy"]) for sample in data.__getitems__(mine))

    assert len(energies(real, 0)) > 5
    assert energies(real, 0) == energies(permuted, 2)


def test_composition_ignores_the_order_of_atoms_and_the_charge(tmp_path):
    rng = np.random.default_rng(1)
    formulas = [(1, 1, 8, 6), (1, 1, 8, 8), (1, 6, 8, 6)]
    path = write(tmp_path / "a.h5", [formulas[i] for i in rng.integers(0, 3, 300)])
    source = SizeGroupedDataset(path)
    hashes = composition_hashes(source, 0)
    by_formula = {}
    for first, arrays in source.chunks(("numbers",)):
        for row, numbers in enumerate(arrays["numbers"]):
            by_formula.setdefault(tuple(sorted(numbers)), set()).add(int(hashes[first + row]))
    assert [len(found) for found in by_formula.values()] == [1, 1, 1]
    assert len(set.union(*by_formula.values())) == 3
    assert not set(composition_hashes(source, 1).tolist()) & set(hashes.tolist())


def test_hashes_are_those_of_the_published_generator():
    """First numbers of splitmix64 with the seed 1234567, https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""
    steps = np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1234567)
    assert mix64(steps).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


WATER, CO2, HCN, NO2, SO2, OCS = (1, 1, 8), (6, 8, 8), (1, 6, 7), (7, 8, 8), (8, 8, 16), (6, 8, 16)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_every_fidelity_with_two_compositions_gets_both_sides(tmp_path, fraction, caplog):
    caplog.set_level(logging.INFO)
    members = {0: [WATER] * 5 + [CO2], 1: [CO2, HCN], 2: [NO2] * 3, 3: [NO2, SO2, OCS], 4: [HCN, WATER, OCS]}
    data = MixedFidelityDataset({f: write(tmp_path / f"{f}.h5", formulas) for f, formulas in members.items()})
    for seed in range(20):
        _, val = split_indices(data, fraction, seed, "composition")
        assert all(len(side) == 1 for side in sides(data, formulas_of(data), set(val.tolist())).values())
        counts = validation_counts(data, val)
        assert counts.pop(2) == (0, 3)  # its only composition is for training
        assert all(0 < held_out < n for held_out, n in counts.values())
    assert "groups that changed sides, so that each fidelity has both: " in caplog.text
    assert "too few" not in caplog.text


def test_groups_that_cannot_be_divided_are_pointed_out(tmp_path, caplog):
    """Three fidelities with two compositions each, every two of them with one in common."""
    members = {0: [WATER, CO2], 1: [CO2, HCN], 2: [HCN, WATER]}
    data = MixedFidelityDataset({f: write(tmp_path / f"{f}.h5", formulas) for f, formulas in members.items()})
    _, val = split_indices(data, 0.5, 0, "composition", names={0: "a", 1: "b", 2: "c"})
    assert 0 < len(val) < 6
    assert "split by composition: too few groups to have training and validation molecules of" in caplog.text


# --------------------------------------------------------------------------------------------------
# by an array of the files
# --------------------------------------------------------------------------------------------------


def with_keys(folder, dtype, seeds=(0, 1), n=400):
    """Two fidelities with molecules of random values of ``mol_id``."""
    data = {}
    for f, seed in enumerate(seeds):
        values = np.random.default_rng(seed).integers(0, 60, n)
        mol_id = [f"C{value}" for value in values] if dtype in ("U", "O", "S") else values
        if dtype == "O":
            mol_id = np.array(mol_id, object)
        elif dtype == "S":
            mol_id = np.array(mol_id, "S5")
        elif dtype == "U":
            mol_id = np.array(mol_id)
        else:
            mol_id = mol_id.astype(dtype)
        path = folder / f"{f}{dtype}.h5"
        arrays = arrays_of(np.random.default_rng(seed + 10), [WATER] * n)
        with h5py.File(path, "w") as file:
            for key, array in {**arrays, "mol_id": mol_id}.items():
                kind = h5py.string_dtype() if key == "mol_id" and dtype in ("U", "O") else None
                file.create_dataset(f"003/{key}", data=array.tolist() if kind else array, dtype=kind)
        data[f] = path
    return MixedFidelityDataset(data)


def ids(data):
    return [value for source in data.datasets.values() for _, a in source.chunks(("mol_id",)) for value in a["mol_id"]]


@pytest.mark.parametrize("dtype", ["i4", "u8", "S", "O"])
def test_equal_values_of_a_key_stay_together(tmp_path, dtype):
    data = with_keys(tmp_path, dtype)
    train, val = split_indices(data, 0.25, 5, by="mol_id")
    assert len(train) + len(val) == 800
    found = sides(data, ids(data), set(val.tolist()))
    assert len(found) > 50
    assert all(len(side) == 1 for side in found.values())
    assert all(0.05 < held_out / n < 0.5 for held_out, n in validation_counts(data, val).values())


@pytest.mark.parametrize("dtypes", [("i4", "u8"), ("S", "O")])
def test_split_by_key_does_not_depend_on_how_it_is_stored(tmp_path, dtypes):
    first, second = (split_indices(with_keys(tmp_path, dtype), 0.25, 5, by="mol_id")[1] for dtype in dtypes)
    np.testing.assert_array_equal(first, second)


def test_negative_and_large_integers():
    class Source:
        name = "a"

        def __init__(self, values):
            self.values = values

        def __len__(self):
            return len(self.values)

        def where(self, index):
            return f"row {index}"

        def chunks(self, keys, max_rows):
            yield 0, {"mol_id": self.values}

    values = [-1, 0, 1, 2**31 - 1, -(2**31)]
    narrow, wide = (key_hashes(Source(np.array(values, dtype)), "mol_id", 0)[0] for dtype in ("i4", "i8"))
    np.testing.assert_array_equal(narrow, wide)
    assert len(set(narrow.tolist())) == 5


def test_key_that_files_lack(real, tmp_path):
    data = MixedFidelityDataset({0: with_keys(tmp_path, "i4").datasets[0], 1: FILES[1]})
    with pytest.raises(ValueError, match=r"no array mol_id in the files of gfn2 \(.*h5\); they have .*numbers"):
        split_indices(data, 0.1, 0, "mol_id", names=NAMES)
    with pytest.raises(ValueError, match="Name one of these, or molecule or composition"):
        split_indices(real, 0.1, 0, "compositon", names=NAMES)


def test_key_that_a_group_lacks(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.h5"
    write_dataset(
        path,
        {3: arrays_of(rng, [WATER] * 4, mol_id=np.arange(4)), 4: arrays_of(rng, [(1, 1, 8, 8)] * 4)},
    )
    with pytest.raises(ValueError, match=r"a.h5: group 004: row 0: no array mol_id"):
        split_indices(MixedFidelityDataset({0: path}), 0.1, 0, "mol_id")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "energy",
            r"group 003: row 0: energy holds float64 values in an array of shape \(6,\); .* one integer or string",
        ),
        ("numbers", r"numbers holds int64 values in an array of shape \(6, 3\)"),
    ],
)
def test_key_that_is_not_a_name(tmp_path, key, message):
    data = MixedFidelityDataset({0: write(tmp_path / "a.h5", [WATER] * 6)})
    with pytest.raises(ValueError, match=message):
        split_indices(data, 0.1, 0, key)


def test_integers_in_one_fidelity_and_strings_in_another(tmp_path):
    sources = {0: with_keys(tmp_path, "i4").datasets[0], 1: with_keys(tmp_path, "O").datasets[1]}
    with pytest.raises(ValueError, match="mol_id holds integers for dft, strings for gfn2"):
        split_indices(MixedFidelityDataset(sources), 0.1, 0, "mol_id", names=NAMES)


# --------------------------------------------------------------------------------------------------
# the record
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(real, tmp_path):
    train, val = split_indices(real, 0.2, 7, "composition")
    save_split(tmp_path / "split.npz", real, val, val_fraction=0.2, seed=7, by="composition", names=NAMES)
    return tmp_path / "split.npz", train, val


def test_saved_split_is_loaded(real, saved):
    path, train, val = saved
    assert [file.name for file in path.parent.iterdir()] == ["split.npz"]
    train_again, val_again, record = load_split(path, real, NAMES)
    np.testing.assert_array_equal(train_again, train)
    np.testing.assert_array_equal(val_again, val)
    assert (record["by"], record["val_fraction"], record["seed"]) == ("composition", 0.2, 7)
    counts = validation_counts(real, val)
    assert {name: (r["validation"], r["molecules"]) for name, r in record["fidelities"].items()} == {
        NAMES[f]: counts[f] for f in range(3)
    }
    assert json.loads(json.dumps(record)) == record


def test_saved_split_can_be_read_with_numpy_alone(saved):
    with np.load(saved[0], allow_pickle=False) as file:
        assert set(file.files) == {"val/dft", "val/gfn2", "val/gfn1", "record"}
        assert file["val/dft"].dtype == np.int64


def test_split_of_fidelities_in_another_order(real, saved):
    other = MixedFidelityDataset({0: FILES[2], 1: FILES[0], 2: FILES[1]})
    _, val, _ = load_split(saved[0], other, {0: "gfn1", 1: "dft", 2: "gfn2"})
    counts, others = validation_counts(real, saved[2]), validation_counts(other, val)
    assert [others[1], others[2], others[0]] == list(counts.values())


def test_split_without_validation_molecules(real, tmp_path):
    save_split(tmp_path / "a", real, np.empty(0, np.int64), val_fraction=0.0, seed=0)
    train, val, _ = load_split(tmp_path / "a", real)
    assert (len(train), len(val)) == (len(real), 0)


def test_split_of_other_data_is_refused(saved, tmp_path):
    path = saved[0]
    with pytest.raises(
        ValueError, match=r"split.npz: gfn1 had \d+ molecules when it was divided, now \d+ \(.*test.h5\)"
    ):
        load_split(path, MixedFidelityDataset({**dict(enumerate(FILES)), 2: EXAMPLES / "fid2_gfn1_test.h5"}), NAMES)
    with pytest.raises(ValueError, match=r"split.npz: the split has gfn1, which the data have not: dft, gfn2\."):
        load_split(path, MixedFidelityDataset(dict(enumerate(FILES[:2]))), {0: "dft", 1: "gfn2"})
    more = {**NAMES, 3: "ccsd"}
    with pytest.raises(ValueError, match=r"split.npz: no split of ccsd \(there is one of dft, gfn2, gfn1\)"):
        load_split(path, MixedFidelityDataset(dict(enumerate([*FILES, FILES[0]]))), more)


def test_split_of_files_in_another_order_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    orders = []
    for sizes in ((3, 4), (4, 3)):
        groups = {3: arrays_of(rng, [WATER] * sizes[0]), 4: arrays_of(rng, [(1, 1, 8, 8)] * sizes[1])}
        write_dataset(tmp_path / f"{sizes[0]}.h5", groups)
        orders.append(MixedFidelityDataset({0: tmp_path / f"{sizes[0]}.h5"}))
    save_split(tmp_path / "split.npz", orders[0], np.array([1]), val_fraction=0.1, seed=0)
    with pytest.raises(ValueError, match="the molecules of fidelity 0 had other sizes or another order"):
        load_split(tmp_path / "split.npz", orders[1])


def test_files_that_are_no_split(real, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.npz: no such file"):
        load_split(tmp_path / "nothing.npz", real)
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "half.npz").write_bytes(saved[0].read_bytes()[:300])
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    np.savez(tmp_path / "pickled.npz", record=np.array({"a": 1}, object))
    np.savez(tmp_path / "list.npz", record=np.array("[]"))
    content = bytearray(saved[0].read_bytes())
    content[60:90] = bytes(30)
    (tmp_path / "damaged.npz").write_bytes(content)
    for name in ("text", "empty", "half", "other", "pickled", "list", "damaged"):
        with pytest.raises(ValueError, match=f"{name}.npz: not a split of molecules"):
            load_split(tmp_path / f"{name}.npz", real)


def test_changed_bytes_are_refused_or_without_effect(saved, real):
    """An archive has bytes without meaning; all others are protected by checksums."""
    path, _, val = saved
    content, refused = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 200):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
        try:
            np.testing.assert_array_equal(load_split(path, real, NAMES)[1], val)
        except ValueError:
            refused += 1
    assert refused > 50


def test_split_is_the_same_in_another_process(real, tmp_path):
    """Neither depends on the hash seed of Python."""
    code = (
        "from aimnet2mult.data.mixed import MixedFidelityDataset; from aimnet2mult.data.splits import split_indices; "
        f"d = MixedFidelityDataset(dict(enumerate({[str(file) for file in FILES]}))); "
        "print([split_indices(d, 0.2, 7, by)[1].tolist() for by in ('molecule', 'composition')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = [split_indices(real, 0.2, 7, by)[1].tolist() for by in ("molecule", "composition")]
    assert run.stdout.strip().splitlines()[-1] == str(expected)


def test_pairs_of_fidelities_share_no_composition_across_the_split(real):
    """What one fidelity validates with, no other is trained on."""
    _, val = split_indices(real, 0.2, 11, "composition")
    formulas = formulas_of(real)
    held_out = set(val.tolist())
    for a, b in itertools.permutations(range(3), 2):
        validated = {formulas[i] for i in held_out if real.fidelities[i] == a}
        trained = {formulas[i] for i in range(len(real)) if i not in held_out and real.fidelities[i] == b}
        assert not validated & trained
