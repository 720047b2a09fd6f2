import json
import math
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aimnet2mult.data import extxyz, frames
from aimnet2mult.data.extxyz import StructureError, parse_comment, read_extxyz
from aimnet2mult.data.frames import FrameReader, FrameRules, Spool
from aimnet2mult.data.sgdataset import DatasetError, SizeGroupedDataset, write_dataset
from aimnet2mult.tools import convert_data
from aimnet2mult.tools.convert_data import convert, expand_inputs, main
from aimnet2mult.utils.units import unit_factor

FIXTURES = Path(__file__).parents[1] / "fixtures"
UNITS = {"coord_unit": "Å", "energy_unit": "eV", "forces_unit": "eV/Å"}
SUFFIXES = (".xyz", ".npz", ".db", ".h5")
SMILES = r"F/C=C\F"


def contents(path):
    """Arrays of each group, and the attributes of the file."""
    with h5py.File(path) as file:
        groups = {name: {key: file[name][key][:] for key in file[name]} for name in file}
        return groups, dict(file.attrs)


def assert_same_arrays(path, expected_path):
    """Groups, arrays, types and every bit."""
    found, expected = contents(path)[0], contents(expected_path)[0]
    assert found.keys() == expected.keys()
    for name, arrays in expected.items():
        assert found[name].keys() == arrays.keys()
        for key, values in arrays.items():
            assert found[name][key].dtype == values.dtype, (name, key)
            if values.dtype.kind == "O":
                assert found[name][key].tolist() == values.tolist(), (name, key)
            else:
                assert found[name][key].tobytes() == values.tobytes(), (name, key)


def round_trip(path, folder, suffix):
    middle, back = folder / f"middle{suffix}", folder / "back.h5"
    convert([path], middle, overwrite=True)
    convert([middle], back, overwrite=True)
    return back


def group(n, n_atoms, seed=0, real=np.float32):
    rng = np.random.default_rng([seed, n_atoms])
    numbers = rng.choice([1, 6, 8], (n, n_atoms)).astype(np.int32)
    return {
        "coord": rng.normal(size=(n, n_atoms, 3)).astype(real),
        "numbers": numbers,
        "charge": np.zeros(n, real),
        "mult": (1 + numbers.sum(1) % 2).astype(real),
        "energy": rng.normal(-1e5, 1.0, n),
    }


def water(energy=-76.0, unit=1.0, **info):
    atoms = molecule("H2O")
    forces = np.arange(9.0).reshape(3, 3) / 7.0
    atoms.calc = SinglePointCalculator(atoms, energy=energy * unit, forces=forces)
    atoms.info.update(info)
    return atoms


def write_xyz(path, *frames):
    """Frames given as (comment, atom lines)."""
    path.write_text("".join(f"{len(lines)}\n{comment}\n" + "\n".join(lines) + "\n" for comment, lines in frames))
    return path


H2 = ["H 0 0 0", "H 0 0 0.74"]
OH = ["O 0 0 0", "H 0 0 0.96"]


# --------------------------------------------------------------------------------------------------
# round trips
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("fidelity", [0, 1, 2])
def test_real_data_come_back_bit_for_bit(tmp_path, fidelity, suffix):
    source = FIXTURES / f"tiny_fid{fidelity}.h5"
    back = round_trip(source, tmp_path, suffix)
    assert_same_arrays(back, source)
    assert contents(back)[1].items() >= contents(source)[1].items()


def awkward_groups():
    """Every array of the layout, every type, and text that is hard to write."""
    rng = np.random.default_rng(5)
    first, second = group(6, 3, real=np.float64), group(3, 11)
    first["forces"] = rng.normal(size=(6, 3, 3)).astype(np.float16)
    first["forces"][2] = np.nan
    first["charges"] = np.full((6, 3), np.nan, np.float32)
    first["dipole"] = rng.normal(size=(6, 3)) * 10.0 ** rng.integers(-300, 300, (6, 1))
    first["energy"][4] = np.nan
    first["charge"] = np.array([0.0, -0.0, 1.0, -1.0, 0.0, 0.1])
    texts = ["", SMILES, 'say "x" \\', "007", "Å {a} [b] 'c' = d", "T"]
    first["name"] = np.array(texts, object)
    first["count"] = np.arange(6, dtype=np.int64) + 2**62
    first["flag"] = np.array([True, False] * 3)
    first["moments"] = rng.normal(size=(6, 2, 3)).astype(np.float32)
    second["cell"] = rng.normal(size=(3, 3, 3)).astype(np.float32)
    second["stress"] = rng.normal(size=(3, 3, 3))
    second["stress"][0] = second["stress"][0] + second["stress"][0].T
    second["quadrupole"] = rng.normal(size=(3, 6)).astype(np.float32)
    second["spin_charges"] = rng.normal(size=(3, 11)).astype(np.float32)
    return {3: first, 11: second, 250: group(1, 250)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_array_comes_back(tmp_path, suffix):
    write_dataset(tmp_path / "a.h5", awkward_groups(), {"level": "CCSD(T)/CBS", "note": 'a "b" \\c'})
    back = round_trip(tmp_path / "a.h5", tmp_path, suffix)
    assert_same_arrays(back, tmp_path / "a.h5")
    assert contents(back)[1].items() >= {"level": "CCSD(T)/CBS", "note": 'a "b" \\c'}.items()


def test_dataset_without_multiplicities_stays_so(tmp_path):
    arrays = group(4, 3)
    del arrays["mult"]
    write_dataset(tmp_path / "a.h5", {3: arrays})
    assert_same_arrays(round_trip(tmp_path / "a.h5", tmp_path, ".xyz"), tmp_path / "a.h5")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=6, max_size=6),
    single=st.floats(allow_nan=False, allow_infinity=False, width=32),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12),
)
def test_any_number_and_text_come_back_as_extxyz(tmp_path, values, single, name):
    arrays = {
        "coord": np.array(values).reshape(1, 2, 3),
        "numbers": np.array([[1, 1]], np.int32),
        "charge": np.array([single], np.float32),
        "mult": np.ones(1, np.float32),
        "energy": np.array(values[:1]),
        "name": np.array([name], object),
    }
    write_dataset(tmp_path / "a.h5", {2: arrays})
    assert_same_arrays(round_trip(tmp_path / "a.h5", tmp_path, ".xyz"), tmp_path / "a.h5")


def test_chunked_and_foreign_files_are_repacked(tmp_path):
    source = FIXTURES / "tiny_fid0.h5"  # compressed
    convert([source], tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert all(file[name][key].chunks is None for name in file for key in file[name])
    convert([tmp_path / "a.h5"], tmp_path / "b.h5", compression="gzip")
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["003/coord"].compression == "gzip"
    assert_same_arrays(tmp_path / "b.h5", source)
    with h5py.File(source) as file, h5py.File(tmp_path / "c.h5", "w") as other:
        for key, values in file["003"].items():
            other[f"3/{key}"] = values[:].astype(values.dtype.newbyteorder(">"))
    convert([tmp_path / "c.h5"], tmp_path / "d.h5")
    for key, values in contents(source)[0]["003"].items():
        assert contents(tmp_path / "d.h5")[0]["003"][key].tobytes() == values.tobytes()


def test_ase_reads_what_is_written(tmp_path):
    source = FIXTURES / "tiny_fid0.h5"
    groups, _ = contents(source)
    convert([source], tmp_path / "a.xyz")
    convert([source], tmp_path / "a.db")
    images = ase.io.read(tmp_path / "a.xyz", ":")
    rows = list(connect(tmp_path / "a.db").select())
    index = 0
    for arrays in groups.values():
        for row in range(len(arrays["energy"])):
            for atoms in (images[index], rows[index].toatoms()):
                np.testing.assert_array_equal(atoms.numbers, arrays["numbers"][row])
                np.testing.assert_array_equal(atoms.positions.astype(np.float32), arrays["coord"][row])
                assert atoms.get_potential_energy() == arrays["energy"][row]
                np.testing.assert_array_equal(atoms.get_forces().astype(np.float32), arrays["forces"][row])
            assert images[index].info["charge"] == rows[index].total_charge == arrays["charge"][row]
            assert images[index].info["mult"] == rows[index].mult == arrays["mult"][row]
            index += 1
    assert index == len(images) == len(rows)
    assert images[0].info["level"] == "B3LYP/def2-SVP (no dispersion correction)"


def test_periodic_structures_keep_cell_and_stress(tmp_path):
    silicon = bulk("Si")
    stress = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # Voigt: xx, yy, zz, yz, xz, xy
    silicon.calc = SinglePointCalculator(silicon, energy=-1.0, stress=stress)
    for name in ("a.traj", "a.xyz"):
        ase.io.write(tmp_path / name, silicon)
        convert([tmp_path / name], tmp_path / "a.h5", overwrite=True)
        arrays = contents(tmp_path / "a.h5")[0]["002"]
        np.testing.assert_array_equal(arrays["cell"][0], silicon.cell.array)
        np.testing.assert_array_equal(arrays["stress"][0], [[1, 6, 5], [6, 2, 4], [5, 4, 3]])
    convert([tmp_path / "a.h5"], tmp_path / "b.xyz")
    back = ase.io.read(tmp_path / "b.xyz")
    assert back.pbc.all()
    np.testing.assert_array_equal(back.cell.array, silicon.cell.array)
    np.testing.assert_array_equal(back.get_stress(), stress)


# --------------------------------------------------------------------------------------------------
# reading structures
# --------------------------------------------------------------------------------------------------


def test_extxyz_is_read_as_ase_reads_it(tmp_path):
    images = [molecule(name) for name in ("H2O", "CH4", "C6H6", "LiF")]
    for seed, atoms in enumerate(images):
        atoms.rattle(0.1, seed=seed)
        results = {"energy": -3.0 * seed - 0.1, "forces": atoms.positions / 3.0, "dipole": [0.1, 0.2, 0.3]}
        atoms.calc = SinglePointCalculator(atoms, **results, charges=atoms.positions[:, 0])
        atoms.info.update(charge=seed - 1, mult=2 - seed % 2, words="two words", smiles=SMILES, vector=[1.5, 2.5])
        atoms.arrays["spin_charges"] = atoms.positions[:, 1].copy()
        atoms.arrays["flags"] = atoms.positions[:, 0] > 0.0
    ase.io.write(tmp_path / "a.xyz", images)
    for frame, atoms in zip(read_extxyz(tmp_path / "a.xyz"), ase.io.read(tmp_path / "a.xyz", ":"), strict=True):
        np.testing.assert_array_equal(frame.numbers, atoms.numbers)
        np.testing.assert_array_equal(frame.coord, atoms.positions)
        for key in ("forces", "charges"):
            np.testing.assert_array_equal(frame.arrays[key], atoms.calc.results[key])
        for key in ("spin_charges", "flags"):
            np.testing.assert_array_equal(frame.arrays[key], atoms.arrays[key])
        assert float(frame.info["energy"]) == atoms.get_potential_energy()
        np.testing.assert_array_equal(extxyz.reals(frame.info["vector"]), atoms.info["vector"])
        assert frame.info["words"] == "two words"
        assert frame.info["smiles"] == SMILES  # ASE itself loses the backslash
        assert frame.cell is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a=1 b=-2.5e-3", {"a": "1", "b": "-2.5e-3"}),
        ("a = 1  b= 2", {"a": "1", "b": "2"}),
        ('a="x y" b={1 2 3} c=[[1, 2], [3, 4]]', {"a": "x y", "b": "1 2 3", "c": "[1, 2], [3, 4]"}),
        (r'q="say \"x\" \\ \C" w=a\b', {"q": r'say "x" \ \C', "w": r"a\b"}),
        ("flag a='b c'", {"flag": "T", "a": "b c"}),
        ('url=http://a/b?c=d "odd key"=3', {"url": "http://a/b?c=d", "odd key": "3"}),
        ("", {}),
        ("the molecule's energy", {"the": "T", "molecule": "T", "s": "T", "energy": "T"}),
    ],
)
def test_comment_lines(line, expected):
    assert parse_comment(line) == expected


def test_columns_in_any_order_blank_lines_and_atomic_numbers(tmp_path):
    path = tmp_path / "a.xyz"
    comment = 'Properties=force:R:3:Z:I:1:pos:R:3 energy=1 charge=0 mult=1 Lattice="1 0 0 0 2 0 0 0 3" pbc="F F F"'
    path.write_text(f"\n1\n{comment}\n.1 .2 .3 2 4 5 6\n\n 1 \nenergy=2\nhe 0 0 1\n\n")
    convert([path], tmp_path / "a.h5", FrameRules(names={"forces": "force"}))
    arrays = contents(tmp_path / "a.h5")[0]["001"]
    np.testing.assert_array_equal(arrays["numbers"], [[2], [2]])
    np.testing.assert_array_equal(arrays["coord"], [[[4, 5, 6]], [[0, 0, 1]]])
    np.testing.assert_array_equal(arrays["forces"], [[[0.1, 0.2, 0.3]], [[np.nan] * 3]])
    assert "cell" not in arrays


@pytest.mark.parametrize("pbc", ['"T T T"', "T", '"1 1 1"', "[True, True, True]", '"true true true"'])
def test_spellings_of_periodicity(tmp_path, pbc):
    comment = f'energy=-1 charge=0 mult=1 Lattice="4 0 0 0 5 0 0 0 6" pbc={pbc}'
    (frame,) = read_extxyz(write_xyz(tmp_path / "a.xyz", (comment, H2)))
    np.testing.assert_array_equal(frame.cell, np.diag([4, 5, 6]))
    for no in ("F", "0", "False", "false"):
        path = write_xyz(tmp_path / "b.xyz", (comment.replace(pbc, f'"{no} {no} {no}"'), H2))
        assert next(read_extxyz(path)).cell is None


def test_windows_line_ends_and_files_of_other_packages(tmp_path):
    """As ASE reads them: keys of MACE, columns before the positions, a lattice but not periodic, no last line end."""
    comment = """Properties=REF_forces:R:3:species:S:1:pos:R:3:tag:I:1 REF_energy=-1.5e+01 config_type='two words' """
    comment += 'pbc="F F F" Lattice="9 0 0 0 9 0 0 0 9"'
    text = f"2\r\n{comment}\r\n1E-2 0 0 H 0 0 0 1\r\n-1e-2 0 0 H 0 0 .74 2"
    (tmp_path / "a.xyz").write_bytes(text.encode())
    names = {"energy": "REF_energy", "forces": "REF_forces"}
    convert([tmp_path / "a.xyz"], tmp_path / "a.h5", FrameRules(names=names, extras={"config_type": False}))
    arrays = contents(tmp_path / "a.h5")[0]["002"]
    atoms = ase.io.read(tmp_path / "a.xyz")
    np.testing.assert_array_equal(arrays["coord"][0], atoms.positions)
    np.testing.assert_array_equal(arrays["forces"][0], atoms.arrays["REF_forces"])
    assert arrays["energy"][0] == atoms.info["REF_energy"] == -15.0
    assert arrays["config_type"].tolist() == [b"two words"]
    assert "cell" not in arrays
    assert not atoms.pbc.any()


def test_other_formats_through_ase(tmp_path):
    images = [water(energy=-float(i), charge=0, spin=1, mol_id=f"w{i}") for i in range(4)]
    ase.io.write(tmp_path / "a.traj", images)
    ase.io.write(tmp_path / "a.xyz.gz", images, format="extxyz")
    for name in ("a.traj", "a.xyz.gz"):
        convert([tmp_path / name], tmp_path / "a.h5", FrameRules(extras={"mol_id": False}), overwrite=True)
        arrays = contents(tmp_path / "a.h5")[0]["003"]
        np.testing.assert_array_equal(arrays["energy"], [0, -1, -2, -3])
        np.testing.assert_allclose(arrays["coord"][2], molecule("H2O").positions, atol=1e-8)
        np.testing.assert_allclose(arrays["forces"][2], np.arange(9.0).reshape(3, 3) / 7.0, atol=1e-8)
        assert arrays["mol_id"].tolist() == [b"w0", b"w1", b"w2", b"w3"]
        assert {key: arrays[key].dtype for key in ("coord", "energy", "numbers")} == {
            "coord": np.float64,
            "energy": np.float64,
            "numbers": np.int32,
        }


@pytest.mark.parametrize("suffix", [".db", ".json"])
def test_databases_of_others(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(convert_data, "DATABASE_ROWS", 2)
    with connect(tmp_path / f"a{suffix}") as database:
        for i in range(5):
            database.write(
                water(energy=-float(i)), charge=2 * (i % 2) - 2, mult=3, ref=0.5 * i, data={"dipole": [1, 2, i]}
            )
    convert([tmp_path / f"a{suffix}"], tmp_path / "a.h5", FrameRules(extras={"ref": False}))
    arrays = contents(tmp_path / "a.h5")[0]["003"]
    np.testing.assert_array_equal(arrays["energy"], -np.arange(5.0))
    np.testing.assert_array_equal(arrays["charge"], [-2, 0, -2, 0, -2])  # ASE's row.charge would be 0
    np.testing.assert_array_equal(arrays["mult"], np.full(5, 3))
    np.testing.assert_array_equal(arrays["dipole"][3], [1, 2, 3])
    np.testing.assert_array_equal(arrays["ref"], 0.5 * np.arange(5))


def test_calculators_go_before_info_and_must_agree(tmp_path):
    atoms = water(energy=-5.0, energy_note="x")
    ase.io.write(tmp_path / "a.traj", atoms)
    atoms.info["energy"] = -6.0
    with pytest.raises(StructureError, match="here: energy of the calculator and energy in info differ"):
        convert_data.atoms_frame("here", atoms)
    atoms.info["energy"] = -5.0
    assert convert_data.atoms_frame("here", atoms).info["energy"] == -5.0


def test_free_energy_is_not_the_energy(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", ("free_energy=1 charge=0 mult=1", H2))
    with pytest.raises(StructureError, match=r"no energy under 'energy' \(info has: free_energy, charge, mult\)"):
        convert([path], tmp_path / "a.h5")


# --------------------------------------------------------------------------------------------------
# units
# --------------------------------------------------------------------------------------------------


def test_units_of_structures_against_ase(tmp_path):
    atoms = water(energy=-76.25, charge=0, mult=1, dipole=[0.0, 0.0, 1.85])
    ase.io.write(tmp_path / "a.traj", atoms)
    rules = FrameRules(units={"energy": "Hartree", "forces": "kcal/mol/Bohr", "coord": "nm", "dipole": "Debye"})
    lines = convert([tmp_path / "a.traj"], tmp_path / "a.h5", rules)
    groups, attributes = contents(tmp_path / "a.h5")
    arrays = groups["003"]
    np.testing.assert_allclose(arrays["energy"], -76.25 * units.Hartree, rtol=1e-14)
    np.testing.assert_allclose(
        arrays["forces"][0], atoms.get_forces() * (units.kcal / units.mol) / units.Bohr, rtol=1e-14
    )
    np.testing.assert_allclose(arrays["coord"][0], atoms.positions * units.nm, rtol=1e-14)
    np.testing.assert_allclose(arrays["dipole"][0], [0, 0, 1.85 * units.Debye], rtol=1e-14)
    assert attributes == {**UNITS, "dipole_unit": "e·Å"}
    assert any("energy x 27.211386" in line for line in lines)


@pytest.mark.parametrize("suffix", [".h5", ".npz"])
def test_units_of_arrays(tmp_path, suffix):
    arrays = {**group(3, 4), "forces": np.ones((3, 4, 3), np.float32)}
    write_dataset(tmp_path / "a.h5", {4: arrays}, {"energy_unit": "Ha", "forces_unit": "eV/Å", "units": "Hartree"})
    if suffix == ".npz":
        attributes = np.array(json.dumps({"energy_unit": "Ha", "forces_unit": "eV/Å", "units": "Hartree"}))
        np.savez(tmp_path / "a.npz", attributes=attributes, **{f"4/{key}": values for key, values in arrays.items()})
    convert([tmp_path / f"a{suffix}"], tmp_path / "b.h5")
    groups, attributes = contents(tmp_path / "b.h5")
    assert attributes == UNITS  # the words "units: Hartree" are no longer true
    np.testing.assert_array_equal(groups["004"]["energy"], arrays["energy"] * unit_factor("energy", "Hartree"))
    np.testing.assert_array_equal(groups["004"]["forces"], arrays["forces"])
    with pytest.raises(DatasetError, match="energy_unit is Hartree, the command line says eV"):
        convert([tmp_path / f"a{suffix}"], tmp_path / "c.h5", FrameRules(units={"energy": "eV"}))
    rows = next(SizeGroupedDataset(tmp_path / "b.h5").chunks(("energy",)))[1]
    np.testing.assert_array_equal(rows["energy"], groups["004"]["energy"])


def test_units_that_arrays_do_not_state(tmp_path):
    arrays = {**group(3, 4), "forces": np.ones((3, 4, 3), np.float32)}
    write_dataset(tmp_path / "a.h5", {4: arrays})
    with pytest.raises(DatasetError, match=r"energy is in kcal/mol, but the unit of the forces .* Give --force-unit"):
        convert([tmp_path / "a.h5"], tmp_path / "b.h5", FrameRules(units={"energy": "kcal/mol"}))
    rules = FrameRules(units={"energy": "kcal/mol", "forces": "kcal/mol/Å"})
    convert([tmp_path / "a.h5"], tmp_path / "b.h5", rules)
    found = contents(tmp_path / "b.h5")[0]["004"]
    np.testing.assert_allclose(found["energy"], arrays["energy"] * units.kcal / units.mol, rtol=1e-14)
    np.testing.assert_allclose(found["forces"], units.kcal / units.mol, rtol=1e-7)
    assert found["forces"].dtype == np.float32


def test_whole_numbers_are_not_cut_off_by_a_conversion(tmp_path):
    coord = np.arange(18).reshape(2, 3, 3)
    write_dataset(tmp_path / "a.h5", {3: {**group(2, 3), "coord": coord}})
    convert([tmp_path / "a.h5"], tmp_path / "b.h5", FrameRules(units={"coord": "Bohr"}))
    np.testing.assert_allclose(contents(tmp_path / "b.h5")[0]["003"]["coord"], coord * units.Bohr, rtol=1e-14)


def test_units_that_a_frame_states(tmp_path):
    path = write_xyz(
        tmp_path / "a.xyz",
        ("energy=1 charge=0 mult=1 energy_unit=Hartree", H2),
        ("energy=1 charge=0 mult=1", H2),
    )
    convert([path], tmp_path / "a.h5")
    np.testing.assert_array_equal(contents(tmp_path / "a.h5")[0]["002"]["energy"], [units.Hartree, 1.0])
    with pytest.raises(StructureError, match=r"frame 0: energy_unit is Hartree, the command line says eV"):
        convert([path], tmp_path / "b.h5", FrameRules(units={"energy": "eV"}))


def test_length_unit_holds_for_cells_and_stress_is_refused(tmp_path):
    silicon = bulk("Si")
    silicon.calc = SinglePointCalculator(silicon, energy=-1.0, stress=np.zeros(6))
    ase.io.write(tmp_path / "a.xyz", silicon)
    given = [str(tmp_path / "a.xyz"), str(tmp_path / "a.h5"), "--length-unit", "Bohr"]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 2
    assert "coord is in Bohr; stress cannot be converted. Leave it out with --drop stress." in result.output
    assert CliRunner().invoke(main, [*given, "--drop", "stress"]).exit_code == 0
    groups, attributes = contents(tmp_path / "a.h5")
    np.testing.assert_allclose(groups["002"]["cell"][0], silicon.cell.array * units.Bohr, rtol=1e-14)
    assert attributes["cell_unit"] == "Å"
    assert "stress" not in groups["002"]


# --------------------------------------------------------------------------------------------------
# labels, charges, multiplicities, further values
# --------------------------------------------------------------------------------------------------


def test_keys_are_mapped(tmp_path):
    lines = ["O 0 0 0 1 2 3 -0.5", "H 0 0 0.96 4 5 6 0.5"]
    comment = "Properties=species:S:1:pos:R:3:REF_forces:R:3:q:R:1 REF_energy=-2 Q=-1 M=1 energy=7"
    path = write_xyz(tmp_path / "a.xyz", (comment, lines))
    names = {"energy": "REF_energy", "forces": "REF_forces", "charges": "q", "charge": "Q", "mult": "M"}
    lines = convert([path], tmp_path / "a.h5", FrameRules(names=names))
    arrays = contents(tmp_path / "a.h5")[0]["002"]
    assert {key: values[0].tolist() for key, values in arrays.items()} == {
        "coord": [[0, 0, 0], [0, 0, 0.96]],
        "numbers": [8, 1],
        "energy": -2,
        "forces": [[1, 2, 3], [4, 5, 6]],
        "charges": [-0.5, 0.5],
        "charge": -1,
        "mult": 1,
    }
    assert any("left out" in line and "energy (1)" in line for line in lines)


def test_gradients_become_forces(tmp_path):
    lines = ["O 0 0 0 1 2 3", "H 0 0 0.96 4 5 6"]
    comment = "Properties=species:S:1:pos:R:3:dft_gradient:R:3 energy=-2 mult=2"
    path = write_xyz(tmp_path / "a.xyz", (comment, lines))
    rules = FrameRules(names={"forces": "-dft_gradient"}, units={"forces": "Hartree/Bohr"})
    convert([path], tmp_path / "a.h5", rules)
    forces = contents(tmp_path / "a.h5")[0]["002"]["forces"][0]
    np.testing.assert_allclose(forces, -units.Hartree / units.Bohr * np.array([[1, 2, 3], [4, 5, 6]]))
    with pytest.raises(ValueError, match=r"forces are minus the gradient\. Give --key forces=-dft_gradient"):
        FrameRules(names={"forces": "dft_gradient"})


def test_missing_labels_become_nan_only_where_others_have_them(tmp_path):
    forces = "Properties=species:S:1:pos:R:3:forces:R:3"
    with_forces = [f"{line} 1 2 3" for line in H2]
    frame = "charge=0 mult=1"
    path = write_xyz(
        tmp_path / "a.xyz",
        (f"energy=1 {frame}", H2),
        (f"{forces} energy=nan {frame}", with_forces),
        (f'dipole="1 2 3" {frame}', H2),
        (f"energy=4 {frame}", ["He 0 0 0"]),
    )
    with pytest.raises(StructureError, match=r"a\.xyz: frame 1: no energy .* or --allow-missing-energy"):
        convert([path], tmp_path / "a.h5")
    lines = convert([path], tmp_path / "a.h5", FrameRules(energy_optional=True))
    groups = contents(tmp_path / "a.h5")[0]
    np.testing.assert_array_equal(groups["002"]["energy"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(np.isnan(groups["002"]["forces"]).all(axis=(1, 2)), [True, False, True])
    np.testing.assert_array_equal(groups["002"]["dipole"], [[np.nan] * 3, [np.nan] * 3, [1, 2, 3]])
    assert set(groups["001"]) == {"coord", "numbers", "charge", "mult", "energy"}
    assert lines[0] == "structures: 4, of 1 to 2 atoms; labels: energy 2, forces 1, dipole 1"


def test_labels_may_come_and_go_between_flushes(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "BUFFER_ATOMS", 4)  # two molecules
    images = []
    for i in range(11):
        atoms = water(energy=-float(i), charge=0, mult=1)
        atoms.calc.results = {"energy": -float(i)} | ({"forces": np.full((3, 3), i)} if i in (3, 4, 8) else {})
        images.append(atoms)
        if i > 5:
            atoms.info["name"] = f"n{i}"
    ase.io.write(tmp_path / "a.traj", images)
    convert([tmp_path / "a.traj"], tmp_path / "a.h5", FrameRules(extras={"name": False}))
    arrays = contents(tmp_path / "a.h5")[0]["003"]
    np.testing.assert_array_equal(arrays["energy"], -np.arange(11.0))
    np.testing.assert_array_equal(arrays["forces"][:, 1, 1], [np.nan] * 3 + [3, 4] + [np.nan] * 3 + [8] + [np.nan] * 2)
    assert arrays["name"].tolist() == [b""] * 6 + [b"n6", b"n7", b"n8", b"n9", b"n10"]


@pytest.mark.parametrize(
    ("comment", "atoms", "charge", "mult"),
    [
        ("charge=-1 mult=3", OH, -1, 3),
        ("total_charge=1 multiplicity=1", OH, 1, 1),
        ("charge=0 spin=2", OH, 0, 2),
        ("charge=1.0 spin=1.0", OH, 1, 1),
        ("charge=1 total_charge=1.0 mult=1 spin=1", OH, 1, 1),
        ("", H2, 0, 1),
    ],
)
def test_charge_and_multiplicity(tmp_path, comment, atoms, charge, mult):
    path = write_xyz(tmp_path / "a.xyz", (f"energy=1 {comment}", atoms))
    convert([path], tmp_path / "a.h5")
    arrays = contents(tmp_path / "a.h5")[0]["002"]
    assert (arrays["charge"].tolist(), arrays["mult"].tolist()) == ([charge], [mult])


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("", "no multiplicity, and 9 electrons cannot be a singlet.*--default-mult lowest"),
        ("spin=1", "spin is 1, which is not a multiplicity 2S.1 of 9 electrons. Give --key mult=spin"),
        ("spin=0", "spin is 0; expected the multiplicity 2S.1"),
        ("spin=2 mult=4", "mult is 4 and spin is 2; which is meant"),
        ("charge=none mult=2", "charge should be numbers, found 'none'"),
        ("charge=nan mult=2", "charge is nan"),
    ],
)
def test_charge_and_multiplicity_are_never_guessed(tmp_path, comment, message):
    path = write_xyz(tmp_path / "a.xyz", (f"energy=1 {comment}", OH))
    with pytest.raises(StructureError, match=rf"a\.xyz: frame 0: {message}"):
        convert([path], tmp_path / "a.h5")


def test_default_multiplicity(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", ("energy=1", OH), ("energy=1 charge=1", OH), ("energy=1 mult=4", OH))
    lines = convert([path], tmp_path / "a.h5", FrameRules(default_mult="lowest"))
    np.testing.assert_array_equal(contents(tmp_path / "a.h5")[0]["002"]["mult"], [2, 1, 4])
    assert "mult: not stated by 2 of 3 structures; lowest was taken" in lines
    with pytest.raises(StructureError, match="frame 1: 8 electrons cannot have --default-mult 2"):
        convert([path], tmp_path / "b.h5", FrameRules(default_mult="2"))


def test_initial_charges_and_moments_need_a_word(tmp_path):
    atoms = molecule("O2")  # has initial magnetic moments of 1 on each atom
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    ase.io.write(tmp_path / "a.traj", atoms)
    with pytest.raises(StructureError, match=r"initial_magmoms sum to 2\. Give --key mult=initial_magmoms"):
        convert([tmp_path / "a.traj"], tmp_path / "a.h5")
    atoms.set_initial_charges([1.0, 1.0])
    atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    ase.io.write(tmp_path / "a.traj", atoms)
    with pytest.raises(StructureError, match=r"initial_charges sum to 2\. Give --key charge=initial_charges"):
        convert([tmp_path / "a.traj"], tmp_path / "a.h5")
    names = {"charge": "initial_charges", "mult": "initial_magmoms"}
    convert([tmp_path / "a.traj"], tmp_path / "a.h5", FrameRules(names=names))
    arrays = contents(tmp_path / "a.h5")[0]["002"]
    assert (arrays["charge"].tolist(), arrays["mult"].tolist()) == ([2], [3])
    convert([tmp_path / "a.traj"], tmp_path / "b.h5", FrameRules(default_charge=0.0, default_mult="3"))
    arrays = contents(tmp_path / "b.h5")[0]["002"]
    assert (arrays["charge"].tolist(), arrays["mult"].tolist()) == ([0], [3])


def test_further_values(tmp_path):
    frame = "energy=1 charge=0 mult=1"
    path = write_xyz(
        tmp_path / "a.xyz",
        (f'{frame} id=007 n=3 x=1 v="1 2" b=T t="a b" only=5', H2),
        (f'{frame} id=12_3 n=4 x=2.5 v="3 4" b=F t=c only=6', H2),
    )
    extras = {"id": False, "n": False, "x": False, "v": False, "b": False, "t": False, "only": True}
    convert([path], tmp_path / "a.h5", FrameRules(extras=extras))
    arrays = contents(tmp_path / "a.h5")[0]["002"]
    assert arrays["id"].tolist() == [b"007", b"12_3"]
    assert (arrays["n"].tolist(), arrays["n"].dtype) == ([3, 4], np.int64)
    assert (arrays["x"].tolist(), arrays["x"].dtype) == ([1, 2.5], np.float64)
    assert arrays["v"].tolist() == [[1, 2], [3, 4]]
    assert (arrays["b"].tolist(), arrays["b"].dtype) == ([True, False], np.bool_)
    assert arrays["t"].tolist() == [b"a b", b"c"]
    assert arrays["only"].tolist() == [b"5", b"6"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("k=1", "k=a", "frame 0: k is a number in some structures and text in others.*--extra k:text"),
        ("k=1", "", "frame 1: no k, but .*frame 0 has it. Whole numbers cannot be missing"),
        ('k="1 2"', 'k="1 2 3"', r"frame 1: k has shape \(3,\), in .*\(2,\)"),
    ],
)
@pytest.mark.parametrize("buffer", [1, 1000])
def test_further_values_that_do_not_fit(tmp_path, monkeypatch, first, second, message, buffer):
    monkeypatch.setattr(frames, "BUFFER_ATOMS", buffer)
    path = write_xyz(tmp_path / "a.xyz", (f"energy=1 {first}", H2), (f"energy=1 {second}", H2))
    message = message.replace("frame 0: k is", "frame [01]: k is")  # whichever is met first
    with pytest.raises(StructureError, match=message):
        convert([path], tmp_path / "a.h5", FrameRules(extras={"k": False}))


def test_numbers_widen_when_they_must(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "BUFFER_ATOMS", 1)
    path = write_xyz(tmp_path / "a.xyz", *[(f"energy=1 k={k}", H2) for k in ("3", "4", "0.5", "7")])
    convert([path], tmp_path / "a.h5", FrameRules(extras={"k": False}))
    assert contents(tmp_path / "a.h5")[0]["002"]["k"].tolist() == [3, 4, 0.5, 7]


# --------------------------------------------------------------------------------------------------
# several inputs
# --------------------------------------------------------------------------------------------------


def test_inputs_of_all_kinds_are_joined_in_their_order(tmp_path):
    arrays = {**group(2, 3), "forces": np.ones((2, 3, 3), np.float32)}
    write_dataset(tmp_path / "a.h5", {3: arrays, 5: group(2, 5)}, {"level": "x", "program": "p"})
    bare = group(2, 3, seed=1)
    np.savez(tmp_path / "b.npz", **{f"003/{key}": values for key, values in bare.items() if key != "mult"})
    image = water(energy=-1.0, charge=0, mult=1)
    image.calc.results.pop("forces")
    ase.io.write(tmp_path / "c.xyz", image)
    inputs = [tmp_path / name for name in ("c.xyz", "b.npz", "a.h5", "c.xyz")]
    rules = FrameRules(default_mult="lowest")
    lines = convert(inputs, tmp_path / "o.h5", rules, attributes={"level": "y"})
    assert "mult: not stated by 2 of 7 structures; lowest was taken" in lines
    groups, attributes = contents(tmp_path / "o.h5")
    np.testing.assert_array_equal(groups["003"]["energy"], [-1.0, *bare["energy"], *arrays["energy"]])
    np.testing.assert_array_equal(groups["003"]["mult"], [1, *bare["mult"], *arrays["mult"]])
    np.testing.assert_array_equal(groups["003"]["forces"][:, 0, 0], [np.nan, np.nan, np.nan, 1, 1])
    assert groups["003"]["coord"].dtype == np.float64
    assert groups["005"]["coord"].dtype == np.float32
    assert attributes == {**UNITS, "level": "y"}
    assert "attributes that differ between files are left out: program" in lines


def test_folders_and_patterns(tmp_path):
    for name in ("b/2.xyz", "b/1.xyz", "b/c/3.xyz", "a.xyz", "b/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_xyz(tmp_path / name, ("energy=1", H2))
    found = expand_inputs([tmp_path / "b", tmp_path / "a.xyz", str(tmp_path / "*.xyz")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/1.xyz", "b/2.xyz", "b/c/3.xyz", "a.xyz"]
    assert expand_inputs([str(tmp_path / "**/*.xyz")])[0] == tmp_path / "a.xyz"
    with pytest.raises(FileNotFoundError, match="no such file"):
        expand_inputs([str(tmp_path / "*.npz")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no files in this folder"):
        expand_inputs([tmp_path / "empty"])
    (tmp_path / "b" / "notes.md").write_text("# notes")
    with pytest.raises(StructureError, match=r"notes\.md: (ASE cannot read it|holds no structures)"):
        convert([tmp_path / "b"], tmp_path / "o.h5")


def test_parts_that_do_not_fit_are_refused(tmp_path):
    odd = {**group(2, 3), "numbers": np.array([[1, 1, 1], [8, 1, 1]], np.int32)}
    del odd["mult"]
    write_dataset(tmp_path / "odd.h5", {3: odd})
    write_dataset(tmp_path / "plain.h5", {3: group(2, 3)})
    with pytest.raises(DatasetError, match=r"odd\.h5: group 003: row 0: no multiplicity, and 3 electrons"):
        convert([tmp_path / "plain.h5", tmp_path / "odd.h5"], tmp_path / "o.h5")
    write_dataset(tmp_path / "cell.h5", {3: {**group(2, 3), "cell": np.ones((2, 3, 3))}})
    with pytest.raises(DatasetError, match=r"cell\.h5: group 003: cell is there, but not in .*plain\.h5"):
        convert([tmp_path / "plain.h5", tmp_path / "cell.h5"], tmp_path / "o.h5")
    write_dataset(tmp_path / "k1.h5", {3: {**group(2, 3), "k": np.arange(2)}})
    write_dataset(tmp_path / "k2.h5", {3: {**group(2, 3), "k": np.array(["a", "b"], object)}})
    with pytest.raises(DatasetError, match=r"k1\.h5: group 003: k .* does not fit that of .*k2\.h5.*--drop k"):
        convert([tmp_path / "k1.h5", tmp_path / "k2.h5"], tmp_path / "o.h5")
    with pytest.raises(DatasetError, match=r"k1\.h5: group 003: k is there.*int64 cannot be missing.*--drop k"):
        convert([tmp_path / "k1.h5", tmp_path / "plain.h5"], tmp_path / "o.h5")
    convert([tmp_path / "k1.h5", tmp_path / "plain.h5"], tmp_path / "o.h5", FrameRules(drop=frozenset(["k"])))
    assert "k" not in contents(tmp_path / "o.h5")[0]["003"]


def test_single_precision_on_request(tmp_path):
    write_dataset(tmp_path / "a.h5", {3: {**group(2, 3, real=np.float64), "x": np.ones(2)}})
    convert([tmp_path / "a.h5"], tmp_path / "b.h5", dtype="float32")
    arrays = contents(tmp_path / "b.h5")[0]["003"]
    names = {key: values.dtype.name for key, values in arrays.items()}
    assert names == {
        "coord": "float32",
        "numbers": "int32",
        "charge": "float32",
        "mult": "float32",
        "energy": "float64",
        "x": "float64",
    }


def test_pieces_join_without_seams(tmp_path, monkeypatch):
    monkeypatch.setattr("aimnet2mult.data.convert.PIECE_ATOMS", 7)  # two molecules of three atoms
    write_dataset(tmp_path / "a.h5", {3: group(7, 3), 9: group(3, 9)})
    for suffix in SUFFIXES:
        assert_same_arrays(round_trip(tmp_path / "a.h5", tmp_path, suffix), tmp_path / "a.h5")


# --------------------------------------------------------------------------------------------------
# size
# --------------------------------------------------------------------------------------------------


def test_frames_are_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "BUFFER_ATOMS", 30)
    write_xyz(tmp_path / "a.xyz", *[(f"energy={i} charge=0 mult=1", H2) for i in range(300)])
    alive = [0]
    most_rows, most_alive = [], []

    def add(self, where, row, original=Spool.add):
        alive[0] += 1
        weakref.finalize(row["coord"], lambda: alive.__setitem__(0, alive[0] - 1))
        original(self, where, row)
        most_rows.append(sum(map(len, self._rows.values())))
        most_alive.append(alive[0])

    monkeypatch.setattr(Spool, "add", add)
    convert([tmp_path / "a.xyz"], tmp_path / "a.h5")
    assert len(most_rows) == 300
    assert max(most_rows) < 16
    assert max(most_alive) < 32
    np.testing.assert_array_equal(contents(tmp_path / "a.h5")[0]["002"]["energy"], np.arange(300.0))


# --------------------------------------------------------------------------------------------------
# mistakes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.xyz: holds no structures"),
        ("two\nx\n", r"frame 0: line 1 should be the number of atoms, found 'two'"),
        ("0\n\n", r"frame 0: has 0 atoms"),
        ("2\nenergy=1\nH 0 0 0\n", r"frame 0: the file ends after 1 of 2 atoms"),
        ("1\nenergy=1\nHe 0 0 0\n1\nenergy=1\nH 0 0\n", r"frame 1: line 6: has 3 words"),
        ("1\nenergy=1\nH 0 0 0 1 2 3\n", "frame 0: line 3: has 7 words, but Properties names 4 columns"),
        ("1\nenergy=1\nQq 0 0 0\n", r"frame 0: line 3: species: 'Qq' is not an element"),
        ("2\nenergy=1\nH 0 0 0\nH 0 x 0\n", r"frame 0: line 4: pos: could not convert string to float: 'x'"),
        ("1\nProperties=species:S:1 energy=1\nHe\n", r"frame 0: line 2: Properties=species:S:1 names no pos"),
        ("1\nProperties=species:S:1:pos:R energy=1\nHe 0 0 0\n", "is not a list of name:type:columns"),
        ("1\nenergy=1 pbc=T\nHe 0 0 0\n", "needs a Lattice of 9 numbers"),
        ('1\nenergy=1 pbc="T F T" Lattice="1 0 0 0 1 0 0 0 1"\nHe 0 0 0\n', "pbc is T F T; only structures"),
        ("1\nenergy=inf\nHe 0 0 0\n", "energy is infinite"),
        ("1\nenergy=low\nHe 0 0 0\n", "energy should be numbers, found 'low'"),
        ("1\nenergy=1\nHe 0 nan 0\n", "position of atom 0 is NaN"),
        ("1\nforces=1 energy=1\nHe 0 0 0\n", r"forces has 1 numbers, expected 3"),
    ],
)
def test_broken_text_is_named(tmp_path, text, message):
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(StructureError, match=message):
        convert([tmp_path / "a.xyz"], tmp_path / "a.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.xyz"]


def test_periodic_and_other_structures_of_one_size(tmp_path):
    periodic = ('energy=1 Lattice="9 0 0 0 9 0 0 0 9"', H2)
    path = write_xyz(tmp_path / "a.xyz", ("energy=1", H2), periodic)
    with pytest.raises(StructureError, match=r"frame 0: is not periodic, but .*frame 1 is"):
        convert([path], tmp_path / "a.h5")
    path = write_xyz(tmp_path / "a.xyz", ("energy=1", ["He 0 0 0"]), periodic)
    convert([path], tmp_path / "a.h5")
    groups = contents(tmp_path / "a.h5")[0]
    assert "cell" in groups["002"]
    assert "cell" not in groups["001"]


@pytest.mark.parametrize("fault", ["name", "object", "rows", "shape", "text", "cut", "missing"])
def test_broken_npz_is_named(tmp_path, fault):
    arrays = {f"003/{key}": values for key, values in group(4, 3).items()}
    path = tmp_path / "a.npz"
    if fault == "name":
        arrays["energy"] = np.zeros(4)
    if fault == "object":
        arrays["003/x"] = np.array([None, 1, 2, 3], object)
    if fault == "rows":
        arrays["003/energy"] = np.zeros(3)
    if fault == "shape":
        arrays["003/forces"] = np.zeros((4, 2, 3))
    if fault == "missing":
        del arrays["003/energy"]
    np.savez(path, **arrays)
    if fault == "text":
        path.write_text("no archive")
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    messages = {
        "name": r"a\.npz: energy: expected names such as 003/coord",
        "object": r"a\.npz: 003/x\.npy: object \(4,\) cannot be read",
        "rows": r"a\.npz: group 003: energy has 3 rows, numbers 4",
        "shape": r"a\.npz: group 003: forces has shape \(4, 2, 3\)",
        "text": r"a\.npz: not an NPZ file",
        "cut": r"a\.npz: not an NPZ file",
        "missing": r"a\.npz: group 003: energy missing",
    }
    with pytest.raises(DatasetError, match=messages[fault]):
        convert([path], tmp_path / "a.h5")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("coord", np.nan, "row 2: coord is NaN"), ("numbers", 201, "row 2: numbers must be 1 to 118")],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bad_values_in_datasets_leave_nothing(tmp_path, key, value, message, suffix):
    arrays = group(4, 3)
    arrays[key][2, 1] = value
    write_dataset(tmp_path / "a.h5", {3: arrays})
    (tmp_path / f"o{suffix}").write_text("precious")
    with pytest.raises(DatasetError, match=rf"a\.h5: group 003: {message}"):
        convert([tmp_path / "a.h5"], tmp_path / f"o{suffix}", overwrite=True)
    assert (tmp_path / f"o{suffix}").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", f"o{suffix}"]


def test_text_that_a_format_cannot_hold(tmp_path):
    write_dataset(tmp_path / "a.h5", {3: {**group(2, 3), "k": np.array(["a", "b\nc"], object)}})
    with pytest.raises(StructureError, match=r"group 003: row 1: k has a line break.*--drop k"):
        convert([tmp_path / "a.h5"], tmp_path / "a.xyz")
    assert_same_arrays(round_trip(tmp_path / "a.h5", tmp_path, ".db"), tmp_path / "a.h5")
    assert_same_arrays(round_trip(tmp_path / "a.h5", tmp_path, ".npz"), tmp_path / "a.h5")
    write_dataset(tmp_path / "b.h5", {3: {**group(2, 3), "my k": np.zeros(2)}})
    with pytest.raises(ValueError, match="'my k' cannot be the name of an array"):
        convert([tmp_path / "b.h5"], tmp_path / "b.xyz")


def test_attributes_that_text_cannot_hold_are_named(tmp_path, caplog):
    attributes = {"a note": "x", "long": "two\nlines", "level": "y"}
    write_dataset(tmp_path / "a.h5", {3: group(2, 3)}, attributes)
    convert([tmp_path / "a.h5"], tmp_path / "a.xyz")
    assert "attribute 'a note' is not written" in caplog.text
    assert "attribute long is not written: it has a line break" in caplog.text
    convert([tmp_path / "a.xyz"], tmp_path / "b.h5")
    units_of_file = {key: unit for key, unit in UNITS.items() if key != "forces_unit"}
    assert contents(tmp_path / "b.h5")[1] == {**units_of_file, "level": "y"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.xyz", "old.h5"], "old.h5: exists. Give --overwrite"),
        (["in.xyz", "in.xyz"], "in.xyz: is among the inputs"),
        (["in.xyz", "o.txt"], "the extension of the output must be one of .h5, .hdf5, .npz, .xyz, .extxyz, .db"),
        (["no.xyz", "o.h5"], "no.xyz: no such file"),
        (["in.xyz", "none/o.h5"], "the folder none does not exist"),
        (["in.xyz", "o.h5", "--key", "energy"], "--key energy: expected NAME=VALUE"),
        (["in.xyz", "o.h5", "--key", "enrgy=E"], "did you mean energy?"),
        (
            ["in.xyz", "o.h5", "--key", "forces=F"],
            "--key forces=F: no structure has F (in.xyz: frame 0: info has: energy;",
        ),
        (["in.xyz", "o.h5", "--key", "forces=-grad"], "--key forces=-grad: no structure has grad (in.xyz: frame 0"),
        (["in.xyz", "o.h5", "--energy-unit", "Hartre"], "'Hartre' is not a unit of energy; known: eV"),
        (["in.xyz", "o.h5", "--default-mult", "high"], "--default-mult high: expected lowest or a whole number"),
        (["in.xyz", "o.h5", "--extra", "id"], "--extra id: no structure has id"),
        (["in.xyz", "o.h5", "--extra", "id:int"], "--extra id:int: expected NAME or NAME:text"),
        (["in.xyz", "o.h5", "--extra", "energy"], "energy is a key of the layout; use --key energy=NAME"),
        (["in.xyz", "o.h5", "--drop", "energy"], "every dataset needs coord, numbers, charge, energy"),
        (["in.xyz", "o.h5", "--drop", "stres"], "--drop stres: no input has it"),
        (["in.xyz", "o.h5", "--dtype", "float16"], "--dtype float16"),
        (["in.xyz", "o.h5", "--attribute", "energy_unit=Ha"], "attribute energy_unit: is set by the conversion"),
        (["in.xyz", "o.h5", "--compression", "zip"], "did you mean gzip?"),
        (["in.xyz", "o.xyz", "--compression", "gzip"], "only .h5 files can be compressed"),
        (["old.h5", "o.xyz", "--key", "energy=E"], "--key: has no effect on .h5 and .npz files"),
    ],
)
def test_mistakes_end_with_status_2_and_write_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_xyz(Path("in.xyz"), ("energy=1", H2))
    write_dataset("old.h5", {3: group(1, 3)})
    before = Path("old.h5").read_bytes()
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["in.xyz", "old.h5"]
    assert Path("old.h5").read_bytes() == before


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_xyz(Path("in.xyz"), ("E=1 id=7 Q=1 f=2", ["He 0 0 0"]))
    arguments = [
        "in.xyz",
        "o.h5",
        "--key",
        "energy=E",
        "--key",
        "charge=Q",
        "--energy-unit",
        "Hartree",
        "--extra",
        "id:text",
    ]
    arguments += ["--level", "HF/STO-3G", "--attribute", "program=x y", "--default-mult", "2", "--dtype", "float32"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["o.h5"]
    assert "left out (structures): f (1)" in result.stderr
    groups, attributes = contents("o.h5")
    assert attributes == {"level": "HF/STO-3G", "program": "x y", "energy_unit": "eV", "coord_unit": "Å"}
    assert groups["001"]["energy"].tolist() == [units.Hartree]
    assert groups["001"]["id"].tolist() == [b"7"]
    assert groups["001"]["charge"].tolist() == [1]
    assert groups["001"]["coord"].dtype == np.float32
    assert SizeGroupedDataset("o.h5").elements == [2]
    assert CliRunner().invoke(main, ["o.h5", "in.xyz", "o.h5", "--overwrite"]).exit_code == 2


def test_without_ase(tmp_path, monkeypatch):
    write_xyz(tmp_path / "in.xyz", ("energy=1", H2))
    for name in [name for name in sys.modules if name == "ase" or name.startswith("ase.")]:
        monkeypatch.setitem(sys.modules, name, None)
    convert([tmp_path / "in.xyz"], tmp_path / "a.h5")
    convert([tmp_path / "a.h5"], tmp_path / "b.xyz")
    (tmp_path / "c.traj").write_bytes(b"")
    for inputs, output in (("a.h5", "d.db"), ("c.traj", "d.h5")):
        with pytest.raises(
            ValueError, match=r'ASE, which is not installed: pip install "aimnet2mult\[ase\]"'
        ) as caught:
            convert([tmp_path / inputs], tmp_path / output)
        assert "cannot read it" not in str(caught.value)


def test_ase_is_not_blamed_for_a_defect_of_ours(tmp_path, monkeypatch):
    ase.io.write(tmp_path / "in.traj", molecule("H2"))
    monkeypatch.setattr(convert_data, "atoms_frame", lambda where, atoms, info: len(atoms.none))
    with pytest.raises(AttributeError, match="none"):
        convert([tmp_path / "in.traj"], tmp_path / "o.h5")


def test_help_is_quick():
    script = (
        "import sys; import aimnet2mult.tools.convert_data; print({'torch', 'ase', 'h5py', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_reader_reports_what_it_assumed():
    reader = FrameReader(FrameRules())
    frame = convert_data.atoms_frame("here", Atoms("He", info={"energy": 1.0, "note": "x"}))
    assert math.isclose(reader.row(frame)["energy"], 1.0)
    assert reader.defaults == {"charge": 1, "mult": 1}
    assert reader.left_out == {"note": 1}


def test_hint_says_which_values_of_atoms_cannot_be_extras(tmp_path):
    comment = "Properties=species:S:1:pos:R:3:tags:I:1 energy=1 note=x"
    write_xyz(tmp_path / "in.xyz", (comment, ["H 0 0 0 1", "H 0 0 1 2"]))
    assert "each atom (tags) with --key only" in convert([tmp_path / "in.xyz"], tmp_path / "a.h5")[-1]
    write_xyz(tmp_path / "in.xyz", ("energy=1 note=x", H2))
    assert convert([tmp_path / "in.xyz"], tmp_path / "b.h5")[-1].endswith("note (1). Take them with --key or --extra.")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("suffix", [".h5", ".db"])
def test_interrupted_process_leaves_no_temporary_file(tmp_path, number, status, suffix):
    write_xyz(tmp_path / "in.xyz", ("energy=1", H2), ("energy=2", [*H2, *H2]))
    script = f"""
import os, signal
from aimnet2mult.data.convert import Merger
from aimnet2mult.tools.convert_data import main

def interrupted(merger, n_atoms, keys=None):
    if n_atoms == 4:  # two atoms are written
        print([name for name in os.listdir() if name != "in.xyz"], flush=True)
        os.kill(os.getpid(), {int(number)})
    yield from pieces(merger, n_atoms, keys)

pieces, Merger.pieces = Merger.pieces, interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    command = [sys.executable, "-c", script, "in.xyz", f"out{suffix}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    assert result.stdout.count(".out.") >= 2  # the folder of the input and the output were there
    assert [path.name for path in tmp_path.iterdir()] == ["in.xyz"]
