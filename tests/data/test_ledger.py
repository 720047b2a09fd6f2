"""The dispersion ledger: what users may state, what is subtracted, where it is kept, and that it all comes back."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from aimnet2mult.constants import ELEMENT_SYMBOLS
from aimnet2mult.data import ledger
from aimnet2mult.data.ledger import (
    CorrectedSource,
    D3Correction,
    DispersionLabel,
    parse_dispersion,
    prepare_caches,
    subtract_dispersion,
    subtraction,
)
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sgdataset import DatasetError, SizeGroupedDataset, expand_files, open_dataset, write_dataset
from aimnet2mult.dispersion_params import BUILTIN, d3bj_parameters
from aimnet2mult.tools.create_fake_data import ELEMENTS
from aimnet2mult.utils.units import BOHR_ANGSTROM, HARTREE_EV

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
FIXTURES = Path(__file__).parents[1] / "fixtures"
B3LYP = {"s6": 1.0, "s8": 1.9889, "a1": 0.3981, "a2": 4.4211}
LABELS = ("energy", "forces")


def d3(functional="b3lyp"):
    return subtraction(parse_dispersion({"d3bj": functional}, "here"), "there")


def dftd3_energy_and_forces(functional, coord, numbers):
    """Two-body D3(BJ) of one molecule by the program s-dftd3, eV and eV/Å."""
    interface = pytest.importorskip("dftd3.interface")
    p = d3bj_parameters(functional)
    damping = interface.RationalDampingParam(s6=p.s6, s8=p.s8, s9=0.0, a1=p.a1, a2=p.a2)
    model = interface.DispersionModel(np.array(numbers), np.array(coord, np.float64) / BOHR_ANGSTROM)
    result = model.get_dispersion(damping, grad=True)
    return float(result["energy"]) * HARTREE_EV, -result["gradient"] * HARTREE_EV / BOHR_ANGSTROM


def n_fragments(coord, numbers):
    """Molecules that a structure consists of: bonds are shorter than 1.4 times the sum of covalent radii."""
    radii = np.array([ELEMENTS[ELEMENT_SYMBOLS[z]].radius for z in numbers])
    distances = np.linalg.norm(coord[:, None] - coord[None], axis=-1)
    bonds = (distances < 1.4 * (radii[:, None] + radii)).astype(float)
    eigenvalues = np.linalg.eigvalsh(np.diag(bonds.sum(1)) - bonds)
    return int((np.abs(eigenvalues) < 1e-8).sum())


def molecules_of(source, keys=("coord", "numbers", "charge", "mult", *LABELS)):
    """Arrays of every molecule, in order."""
    molecules = []
    for first, arrays in source.chunks(keys):
        assert first == len(molecules)
        molecules += [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]
    return molecules


def read_in_order(source, indices, keys=LABELS):
    molecules = [None] * len(indices)
    for positions, arrays in source.read(np.asarray(indices), keys):
        for row, position in enumerate(positions):
            molecules[position] = {key: values[row] for key, values in arrays.items()}
    return molecules


@pytest.fixture(scope="module")
def dimers():
    """Function: the real dimers of an example file, in groups by size; ``change`` may alter each molecule."""

    def groups(name, change=lambda molecule: molecule):
        found = {}
        for molecule in molecules_of(SizeGroupedDataset(EXAMPLES / name)):
            if len(molecule["numbers"]) > 4 and n_fragments(molecule["coord"], molecule["numbers"]) == 2:
                found.setdefault(len(molecule["numbers"]), []).append(change(molecule))
        return {
            n: {key: np.array([molecule[key] for molecule in rows]) for key in rows[0]} for n, rows in found.items()
        }

    return groups


@pytest.fixture
def data_file(tmp_path):
    """A dataset with its arrays in one piece, which keeps its size when values are changed."""
    with h5py.File(FIXTURES / "tiny_fid0.h5") as file:
        write_dataset(tmp_path / "data.h5", {int(n): {key: file[n][key][:] for key in file[n]} for n in file})
    return tmp_path / "data.h5"


# --------------------------------------------------------------------------------------------------
# the statement
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "label", "text"),
    [
        (None, DispersionLabel("unknown"), "unknown dispersion"),
        ("unknown", DispersionLabel("unknown"), "unknown dispersion"),
        ("none", DispersionLabel("none"), "no dispersion"),
        ("vv10", DispersionLabel("vv10"), "VV10"),
        ("VV-10", DispersionLabel("vv10"), "VV10"),
        ("d4", DispersionLabel("d4"), "D4"),
        ({"d4": "gfn2"}, DispersionLabel("d4", "gfn2"), "D4 of gfn2"),
        ({"d4": {"s8": 1.5, "mbd": "atm"}}, DispersionLabel("d4", None, {"s8": 1.5, "mbd": "atm"}), "D4 (s8 1.5, mbd"),
        ({"d3bj": "B3LYP"}, DispersionLabel("d3bj", "B3LYP", B3LYP), "D3(BJ) of B3LYP"),
        ({"D3(BJ)": "b3lyp"}, DispersionLabel("d3bj", "b3lyp", B3LYP), "D3(BJ) of b3lyp"),
        (
            {"d3bj": {"s8": 2, "a1": 0.4, "a2": 4.5}},
            DispersionLabel("d3bj", None, {"s6": 1.0, "s8": 2.0, "a1": 0.4, "a2": 4.5}),
            "D3(BJ) (s6 1.0, s8 2.0",
        ),
        (
            {"d3bj": {"s8": 2, "a1": 0.4, "a2": 4.5, "s6": 0.5}},
            DispersionLabel("d3bj", None, {"s6": 0.5, "s8": 2.0, "a1": 0.4, "a2": 4.5}),
            "D3(BJ) (s6 0.5",
        ),
    ],
)
def test_what_can_be_stated(value, label, text, tmp_path):
    found = parse_dispersion(value, "data.fidelities.x.dispersion")
    assert found == label
    assert found.text.startswith(text)
    entry = found.to_dict()
    torch.save(entry, tmp_path / "entry.pt")
    kept = [
        torch.load(tmp_path / "entry.pt", weights_only=True),
        json.loads(json.dumps(entry)),
        yaml.safe_load(yaml.safe_dump(entry)),
    ]
    assert [DispersionLabel.from_dict(again) for again in kept] == [label] * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("d3bj", r"here\.d3bj: say with which functional's parameters, as \{d3bj: b3lyp\}"),
        ({"d3bj": None}, r"here\.d3bj: say with which functional"),
        ({"d3bj": "b3lpy"}, r"here\.d3bj: functional 'b3lpy' is not known: did you mean b3lyp"),
        ({"d3bj": {"s8": 1.0}}, r"here\.d3bj: a1, a2 missing"),
        ({"d3bj": {"s8": 1.0, "a1": 0.4, "a2": 4.0, "s9": 1.0}}, r"here\.d3bj\.s9: only the two-body energy"),
        ({"d3bj": {"s8": 1.0, "a1": 0.4, "a3": 4.0}}, r"here\.d3bj: unknown parameter 'a3'; known: s6, s8, a1, a2"),
        ({"d3bj": {"s8": "big", "a1": 0.4, "a2": 4.0}}, r"here\.d3bj\.s8: expected a number, found 'big'"),
        ({"d3bj": {"s8": float("nan"), "a1": 0.4, "a2": 4.0}}, r"here\.d3bj\.s8: expected a number, found nan"),
        ({"d3bj": {"s8": True, "a1": 0.4, "a2": 4.0}}, r"here\.d3bj\.s8: expected a number, found True"),
        ({"d3bj": "pbe", "d4": "pbe"}, r"here: expected one of none, d3bj"),
        (["d3bj"], r"here: expected one of none, d3bj"),
        (True, r"here: expected one of none, d3bj"),
        ("d3", r"here: dispersion 'd3' is not known: did you mean d3bj.*write unknown"),
        ({"mbd": "pbe"}, r"here: dispersion 'mbd' is not known.*write unknown for labels with any other"),
        ({"none": "pbe"}, r"here: none has no functional"),
        ({"d4": 3}, r"here\.d4: expected the name of a functional, or parameters, found 3"),
    ],
)
def test_statements_that_make_no_sense(value, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_dispersion(value, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none", "x.subtract_dispersion: the labels contain no dispersion, so there is nothing to subtract"),
        ("unknown", r"it is not stated which dispersion the labels contain. State it, such as dispersion: \{d3bj"),
        ("vv10", r"the labels contain VV10; only D3\(BJ\) can be subtracted"),
        ({"d4": "gfn2"}, r"the labels contain D4 of gfn2; only D3\(BJ\) can be subtracted"),
    ],
)
def test_what_cannot_be_subtracted(value, message):
    with pytest.raises(ValueError, match=message):
        subtraction(parse_dispersion(value, "x.dispersion"), "x.subtract_dispersion")


# --------------------------------------------------------------------------------------------------
# the correction
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("functional", ["b3lyp", "wb97x"])
def test_correction_of_real_molecules_agrees_with_dftd3(functional):
    correction = d3(functional)
    source = SizeGroupedDataset(EXAMPLES / "fid1_gfn2_test.h5")
    for _, arrays in source.chunks(("coord", "numbers")):
        energy, forces = correction.energy_and_forces(arrays["coord"], arrays["numbers"])
        np.testing.assert_allclose(correction.energy(arrays["coord"], arrays["numbers"]), energy, rtol=0, atol=1e-12)
        for row in range(0, len(energy), 5):
            expected = dftd3_energy_and_forces(functional, arrays["coord"][row], arrays["numbers"][row])
            assert energy[row] == pytest.approx(expected[0], abs=1e-7)
            np.testing.assert_allclose(forces[row], expected[1], rtol=0, atol=1e-6)


def test_molecules_are_independent_of_the_batch(monkeypatch):
    rng = np.random.default_rng(0)
    coord, numbers = rng.normal(size=(7, 6, 3)) * 2.0, rng.choice([1, 6, 8], (7, 6))
    whole = d3().energy_and_forces(coord, numbers)
    monkeypatch.setattr(ledger, "PAIRS_PER_CALL", 80)
    for ours, expected in zip(d3().energy_and_forces(coord, numbers), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-14)
    assert d3().energy(coord[:0], numbers[:0]).shape == (0,)


def test_large_molecule_agrees_with_dftd3():
    rng = np.random.default_rng(1)
    n_atoms = 300  # beyond what is evaluated in dense layout
    grid = np.stack(np.meshgrid(*[np.arange(7)] * 3), -1).reshape(-1, 3)[:n_atoms]
    coord, numbers = grid * 1.9 + rng.normal(size=(n_atoms, 3)) * 0.1, rng.choice([1, 6, 7, 8], n_atoms)
    energy, forces = d3().energy_and_forces(coord[None], numbers[None])
    expected = dftd3_energy_and_forces("b3lyp", coord, numbers)
    assert energy[0] == pytest.approx(expected[0], abs=1e-6)
    np.testing.assert_allclose(forces[0], expected[1], rtol=0, atol=1e-6)


def test_key_stands_for_parameters_and_arithmetic(monkeypatch):
    assert d3("b3lyp").key == d3("B3-LYP").key
    assert len({d3(functional).key for functional in BUILTIN}) == len(BUILTIN)
    before = d3().key
    monkeypatch.setattr(ledger, "CORRECTION_VERSION", 2)
    assert d3().key != before


# --------------------------------------------------------------------------------------------------
# molecules without it
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_labels_without_the_correction(data_file, cache):
    plain = SizeGroupedDataset(data_file)
    source = CorrectedSource(plain, d3(), cache)
    source.prepare()
    assert (len(source), source.keys, source.files) == (len(plain), plain.keys, plain.files)
    assert source.elements == plain.elements
    assert source.where(30) == plain.where(30)
    streamed, expected = molecules_of(source), molecules_of(plain)
    order = np.random.default_rng(0).permutation(len(plain))[:60]
    copy = pickle.loads(pickle.dumps(source))
    for index, read, again in zip(order, read_in_order(source, order), read_in_order(copy, order), strict=True):
        molecule = expected[index]
        energy, forces = d3().energy_and_forces(molecule["coord"][None], molecule["numbers"][None])
        assert streamed[index].keys() == molecule.keys()
        for result in (read, again, streamed[index]):
            assert result["forces"].dtype == np.float32
            assert result["energy"] == pytest.approx(molecule["energy"] - energy[0], abs=1e-10)
            np.testing.assert_allclose(result["forces"], molecule["forces"] - forces[0], rtol=0, atol=2e-6)
    assert abs(energy[0]) > 1e-3


def test_both_ways_give_the_same_forces(data_file):
    """The cache holds single precision: far below any label's noise, and below the rounding of most labels."""
    sources = [CorrectedSource(SizeGroupedDataset(data_file), d3(), cache) for cache in ("none", "disk")]
    sources[1].prepare()
    computed, cached = (molecules_of(source, ("forces",)) for source in sources)
    error = max(np.abs(a["forces"].astype(float) - b["forces"]).max() for a, b in zip(computed, cached, strict=True))
    assert error < 1e-6
    with h5py.File(sources[1].cache_path) as file:
        assert file["009/forces"].dtype == np.float32
        assert file["009/energy"].dtype == np.float64
        _, exact = d3().energy_and_forces(*(h5py.File(data_file)["009"][key][:] for key in ("coord", "numbers")))
        assert np.abs(file["009/forces"][:] - exact).max() < 1e-8


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_missing_labels_stay_missing(data_file, cache):
    with h5py.File(data_file, "r+") as file:
        file["005/energy"][3] = np.nan
        file["005/forces"][7] = np.nan
        del file["006/forces"]
    plain = SizeGroupedDataset(data_file)
    source = CorrectedSource(plain, d3(), cache)
    source.prepare()
    first = int(np.flatnonzero(plain.n_atoms == 5)[0])
    for number, molecule in enumerate(read_in_order(source, range(len(source)))):
        assert np.isnan(molecule["energy"]) == (number == first + 3)
        if plain.n_atoms[number] == 6:
            assert "forces" not in molecule
        else:
            assert np.isnan(molecule["forces"]).all() == (number == first + 7)
    assert source.label_counts(LABELS) == plain.label_counts(LABELS)


def test_forces_are_computed_only_where_they_are_asked_for(data_file, monkeypatch):
    def refuse(*_):
        raise AssertionError

    plain = SizeGroupedDataset(data_file)
    source = CorrectedSource(plain, d3(), "none")
    monkeypatch.setattr(D3Correction, "energy_and_forces", refuse)
    assert [set(arrays) for _, arrays in source.chunks(("energy",))] == [{"energy"}] * 8
    monkeypatch.setattr(D3Correction, "energy", refuse)
    assert molecules_of(source, ("charges",))[5]["charges"] == pytest.approx(
        molecules_of(plain, ("charges",))[5]["charges"]
    )
    energies_only = Path(shutil.copy(FIXTURES / "tiny_fid2.h5", data_file.with_name("energies.h5")))
    monkeypatch.undo()
    monkeypatch.setattr(D3Correction, "energy_and_forces", refuse)
    cached = CorrectedSource(SizeGroupedDataset(energies_only), d3(), "disk")
    cached.prepare()
    assert len(molecules_of(cached, LABELS)) == 200


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_correction_that_is_not_a_number_is_an_error_and_no_missing_label(data_file, cache):
    with h5py.File(data_file, "r+") as file:
        file["004/coord"][9, 1] = file["004/coord"][9, 0]
    source = CorrectedSource(SizeGroupedDataset(data_file), d3(), cache)
    action = source.prepare if cache == "disk" else lambda: molecules_of(source)
    with pytest.raises(DatasetError, match=r"data\.h5: group 004: row 9: the dispersion correction is not a number"):
        action()
    assert os.listdir(data_file.parent) == ["data.h5"]


def test_data_that_cannot_be_corrected(tmp_path):
    arrays = {
        "coord": np.array([[[0, 0, 0], [0, 0, 1.0]]]),
        "numbers": np.array([[1, 104]]),
        "charge": np.zeros(1),
        "energy": np.zeros(1),
    }
    write_dataset(tmp_path / "heavy.h5", {2: arrays})
    with pytest.raises(DatasetError, match=r"heavy\.h5: no D3 reference data for Rf \(104\)"):
        CorrectedSource(SizeGroupedDataset(tmp_path / "heavy.h5"), d3(), "none").prepare()
    write_dataset(tmp_path / "crystal.h5", {2: {**arrays, "cell": np.eye(3)[None]}})
    with pytest.raises(ValueError, match=r"crystal\.h5: has cell; dispersion can be subtracted from .* of molecules"):
        CorrectedSource(SizeGroupedDataset(tmp_path / "crystal.h5"), d3())
    with pytest.raises(ValueError, match=r"data\.dispersion_cache: 'memory' is not one of disk, none"):
        CorrectedSource(SizeGroupedDataset(tmp_path / "heavy.h5"), d3(), "memory")


def test_units_of_the_file_are_respected(tmp_path):
    dataset = SizeGroupedDataset(FIXTURES / "tiny_fid0.h5")
    groups = {}
    for _, arrays in dataset.chunks(("coord", "numbers", "charge", "energy", "forces")):
        arrays["energy"] = arrays["energy"] / HARTREE_EV
        groups[arrays["numbers"].shape[1]] = arrays
    write_dataset(tmp_path / "hartree.h5", groups, {"energy_unit": "Hartree"})
    expected = molecules_of(CorrectedSource(dataset, d3()), ("energy",))
    found = molecules_of(CorrectedSource(SizeGroupedDataset(tmp_path / "hartree.h5"), d3()), ("energy",))
    np.testing.assert_allclose([m["energy"] for m in found], [m["energy"] for m in expected], rtol=0, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# the cache on disk
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Number of molecules whose correction has been computed."""
    count = [0]
    original = D3Correction.energy_and_forces

    def counting(self, coord, numbers):
        count[0] += len(coord)
        return original(self, coord, numbers)

    monkeypatch.setattr(D3Correction, "energy_and_forces", counting)
    return count


def cached_source(path, correction=None):
    return CorrectedSource(SizeGroupedDataset(path), correction or d3(), "disk")


def test_cache_is_made_once(data_file, computed, caplog):
    caplog.set_level(logging.INFO)
    source = cached_source(data_file)
    source.prepare()
    assert computed[0] == len(source) == 160
    assert sorted(os.listdir(data_file.parent)) == ["data.h5", source.cache_path.name]
    assert source.cache_path.name == f"data.h5.{d3().key}.cache"
    before = source.cache_path.stat().st_mtime_ns
    again = cached_source(data_file)
    again.prepare()
    molecules_of(again)
    assert computed[0] == 160
    assert source.cache_path.stat().st_mtime_ns == before
    assert "computing the dispersion of 160 molecules (cache: none yet)" in caplog.text
    other = cached_source(data_file, d3("pbe"))
    other.prepare()
    assert computed[0] == 320
    assert other.cache_path != source.cache_path


def change_structure(path, keep_time=False):
    status = path.stat()
    with h5py.File(path, "r+") as file:
        file["002/coord"][0] += [[0.0, 0.0, 0.0], [0.0, 0.0, 0.1]]
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (0 if keep_time else 10**9)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path, cache: change_structure(path), "data_mtime_ns differs"),
        (lambda path, cache: change_structure(path, keep_time=True), "data_sample_sha256 differs"),
        (lambda path, cache: shutil.copy(FIXTURES / "tiny_fid1.h5", path), "molecules differs"),
        (lambda path, cache: cache.write_bytes(b"not HDF5"), "damaged"),
        (lambda path, cache: cache.write_bytes(cache.read_bytes()[:9000]), "damaged"),
        (lambda path, cache: shutil.copy(path, cache), "correction differs"),
    ],
)
def test_cache_that_does_not_belong_to_the_data_is_made_anew(data_file, computed, caplog, change, reason):
    caplog.set_level(logging.INFO)
    source = cached_source(data_file)
    source.prepare()
    source.close()
    change(data_file, source.cache_path)
    stale = cached_source(data_file)
    with pytest.raises(DatasetError, match=r"Call prepare\(\) in one process"):
        molecules_of(stale)
    caplog.clear()
    computed[0] = 0
    stale.prepare()
    assert reason in caplog.text
    assert computed[0] == len(stale)
    direct = molecules_of(CorrectedSource(SizeGroupedDataset(data_file), d3(), "none"))
    for ours, expected in zip(molecules_of(stale), direct, strict=True):
        assert ours["energy"] == pytest.approx(expected["energy"], abs=1e-10)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_write_leaves_nothing(data_file, monkeypatch, error):
    original = D3Correction.energy_and_forces

    def interrupt(self, coord, numbers):
        if coord.shape[1] == 7:
            raise error
        return original(self, coord, numbers)

    monkeypatch.setattr(D3Correction, "energy_and_forces", interrupt)
    with pytest.raises(error):
        cached_source(data_file).prepare()
    assert os.listdir(data_file.parent) == ["data.h5"]


def test_folder_that_cannot_be_written(data_file, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"cannot be written \(Read-only.*Set data\.dispersion_cache: none"):
        cached_source(data_file).prepare()


def test_full_disk_is_found_before_the_work(data_file, monkeypatch, computed):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"needs 0 MiB, 0 MiB are free\. Set data\.dispersion_cache: none"):
        cached_source(data_file).prepare()
    assert computed == [0]


def test_cache_of_another_process_is_read_after_it_has_been_made(data_file):
    source = cached_source(data_file)
    with pytest.raises(DatasetError, match=r"cache: none yet. Call prepare\(\)"):
        molecules_of(source)
    cached_source(data_file).prepare()
    assert len(molecules_of(source)) == 160


def test_two_processes_at_once(data_file, tmp_path_factory):
    code = (
        "import pathlib, sys; from aimnet2mult.data.ledger import *; from aimnet2mult.data.sgdataset import *\n"
        "correction = D3Correction(dict(s6=1, s8=1, a1=1, a2=1))\n"
        "source = CorrectedSource(open_dataset(sys.argv[1]), correction, 'disk')\n"
        "ready = pathlib.Path(sys.argv[2]); (ready / sys.argv[3]).touch()\n"
        "while len(list(ready.iterdir())) < 2: pass\n"
        "source.prepare(); print(sum(a['energy'].sum() for _, a in source.chunks(('energy',))))"
    )
    ready = tmp_path_factory.mktemp("ready")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(data_file), str(ready), str(number)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            text=True,
        )
        for number in range(2)
    ]
    sums = [float(process.communicate(timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sums[0] == sums[1]
    assert len(os.listdir(data_file.parent)) == 2


def test_several_files_have_a_cache_each(tmp_path, computed):
    for number in range(2):
        shutil.copy(FIXTURES / f"tiny_fid{number}.h5", tmp_path / f"part{number}.h5")
    pattern = tmp_path / "*.h5"
    source = subtract_dispersion(open_dataset(pattern), d3(), "disk")
    prepare_caches(source)
    assert len(source) == computed[0] == 360
    assert len(list(tmp_path.glob("*.cache"))) == 2
    assert expand_files(pattern) == [tmp_path / "part0.h5", tmp_path / "part1.h5"]
    shutil.copy(FIXTURES / "tiny_fid1.h5", tmp_path / "part2.h5")
    more = subtract_dispersion(open_dataset(pattern), d3(), "disk")
    prepare_caches(more)
    assert computed[0] == 560
    plain = read_in_order(open_dataset(pattern), [0, 200, 559])
    for ours, label in zip(read_in_order(more, [0, 200, 559]), plain, strict=True):
        assert -1.0 < label["energy"] - ours["energy"] < -1e-4


# --------------------------------------------------------------------------------------------------
# subtract, predict zero, add back
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def zero_checkpoint(tmp_path, fixtures_dir):
    """Function: checkpoint of a network that predicts zero, with self-atomic energies and a ledger."""
    from aimnet2mult.models.base import build_model, load_model_config, save_checkpoint

    def save(sae, dispersion, species):
        config = load_model_config(fixtures_dir / "ref_single_model.yaml")
        model = build_model(config, len(sae))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("aev."):
                    parameter.zero_()
        save_checkpoint(
            tmp_path / "zero.pt",
            model,
            model_config=config,
            num_fidelities=len(sae),
            fidelity_offset=200,
            use_fidelity_readouts=True,
            fidelity_names={f: f"level{f}" for f in sae},
            sae=sae,
            species=species,
            dispersion={f: {"labels": label.to_dict(), "subtracted": True} for f, label in dispersion.items()},
        )
        return tmp_path / "zero.pt"

    return save


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_round_trip_of_two_fidelities_on_real_dimers(dimers, zero_checkpoint, tmp_path, cache):
    """Labels with the D3 of another program: subtract ours, predict zero, compile, add back."""
    from aimnet2mult.models.jit_wrapper import load_jit_model
    from aimnet2mult.tools.compile_jit import compile_model

    functionals, names = {0: "b3lyp", 1: "wb97m"}, {0: "fid0_dft_test.h5", 1: "fid1_gfn2_test.h5"}
    originals, sources, sae = {}, {}, {}
    for f, functional in functionals.items():
        originals[f] = []

        def with_d3(molecule, f=f, functional=functional):
            originals[f].append({key: molecule[key] for key in LABELS})
            energy, forces = dftd3_energy_and_forces(functional, molecule["coord"], molecule["numbers"])
            return {
                **molecule,
                "energy": molecule["energy"] + energy,
                "forces": molecule["forces"].astype(np.float64) + forces,
            }

        write_dataset(tmp_path / f"labels{f}.h5", dimers(names[f], with_d3))
        dataset = open_dataset(tmp_path / f"labels{f}.h5")
        sources[f] = subtract_dispersion(dataset, d3(functional), cache)
        prepare_caches(sources[f])
        sae[f] = {z: -10.0 * z - f for z in dataset.elements}
    labels = {f: parse_dispersion({"d3bj": functional}, "x") for f, functional in functionals.items()}
    checkpoint = zero_checkpoint(sae, labels, {f: list(table) for f, table in sae.items()})
    mixed = MixedFidelityDataset(sources, sae, y=LABELS)
    assert len(mixed) == 39

    position = 0
    for f in functionals:
        model = load_jit_model(compile_model(checkpoint, tmp_path / "zero", fidelity_level=f"level{f}")[0])
        double = load_jit_model(tmp_path / f"zero_fid{f}.jpt")
        double.module.double()
        model.module.check_spin = double.module.check_spin = False  # the dimers are ions
        assert model.metadata["dispersion"]["source"] == "subtracted from the labels"
        label_molecules = molecules_of(open_dataset(tmp_path / f"labels{f}.h5"))
        corrected = molecules_of(sources[f])
        for label, original, molecule in zip(label_molecules, originals[f], corrected, strict=True):
            # What is left is the label of the level without D3 ...
            assert molecule["energy"] == pytest.approx(original["energy"], abs=1e-6)
            np.testing.assert_allclose(molecule["forces"], original["forces"], rtol=0, atol=1e-6)
            # ... and the network (zero) is trained on this less the self-atomic energies.
            sample = mixed[position]
            position += 1
            for compiled, dtype, force_tolerance in ((model, torch.float32, 1e-5), (double, torch.float64, 1e-6)):
                coord = torch.from_numpy(label["coord"]).to(dtype)[None]
                out = compiled({"coord": coord, "numbers": torch.from_numpy(label["numbers"])[None]})
                assert sample["energy"] + out["energy"].item() == pytest.approx(label["energy"], abs=1e-6)
                added = molecule["forces"] + out["forces"][0].numpy()
                np.testing.assert_allclose(added, label["forces"], rtol=0, atol=force_tolerance)
                assert np.abs(out["forces"].numpy()).max() > 1e-3
    assert position == len(mixed)
