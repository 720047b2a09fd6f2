"""Every fault is planted in a file of real molecules and must be found, with its kind, file, group and row."""

import json
import warnings

import numpy as np
import pytest

from aimnet2mult.data import checks
from aimnet2mult.data.checks import Finding, Place, Thresholds, check, leakage, quick_checks
from aimnet2mult.data.checks.geometry import (
    Fingerprints,
    distance_mismatch,
    geometry_averages,
    largest_gap,
    may_be_equal,
    molecule_keys,
    neighbour_pairs,
    pair_distances,
    sorting,
    superpose,
)
from aimnet2mult.data.checks.units import energy_unit, force_relation, length_unit, units_of_ratio
from aimnet2mult.data.sae import composition, fit_sae, sae_energy
from aimnet2mult.data.sgdataset import DatasetError, SizeGroupedDataset, open_dataset, write_dataset
from aimnet2mult.utils.units import BOHR_ANGSTROM, EV_KCAL_MOL, EV_KJ_MOL, HARTREE_EV

EXAMPLES = "examples/data"


@pytest.fixture
def groups(fixtures_dir):
    """Arrays of a fixture by number of atoms, to be changed by a test."""

    def read(name="tiny_fid0"):
        return read_groups(fixtures_dir / f"{name}.h5")

    return read


@pytest.fixture
def example(request):
    """Arrays of a file with enough molecules for pairs of close geometries."""
    return lambda name="fid0_dft_train": read_groups(request.config.rootpath / EXAMPLES / f"{name}.h5")


def read_groups(path):
    source = SizeGroupedDataset(path)
    return {arrays["numbers"].shape[1]: arrays for _, arrays in source.chunks(sorted(source.keys))}


def write(path, groups):
    write_dataset(path, groups)
    return open_dataset(path)


def kinds(findings, severity=None):
    return {finding.kind for finding in findings if severity in (None, finding.severity)}


def the(findings, kind):
    (found,) = [finding for finding in findings if finding.kind == kind]
    return found


# --------------------------------------------------------------------------------------------------
# clean data
# --------------------------------------------------------------------------------------------------


def test_clean_files_give_notes_only(fixtures_dir):
    sources = {f"fid{f}": open_dataset(fixtures_dir / f"tiny_fid{f}.h5") for f in range(3)}
    report = check(sources)
    assert kinds(report.findings) == {"rare_element", "shared_geometries"}
    assert kinds(report.findings, "note") == kinds(report.findings)
    rare = the([f for f in report.findings if f.fidelity == "fid0"], "rare_element")
    assert "Si (6), P (5), Br (7)" in rare.message
    assert all(quick_checks(source, name) == [] for name, source in sources.items())


@pytest.mark.parametrize("name", ["fid0_dft_train", "fid1_gfn2_train", "fid2_gfn1_train", "fid1_gfn2_test"])
def test_larger_clean_files(request, name):
    report = check({name: open_dataset(request.config.rootpath / EXAMPLES / f"{name}.h5")})
    assert kinds(report.findings) <= {"duplicates", "rare_element"}
    assert not report.count("error") + report.count("warning")
    summary = report.summaries[name]
    assert summary.energy_looks_like.startswith("eV, total energies")
    assert ("all electrons" in summary.energy_looks_like) == ("dft" in name)
    if "fid2" not in name:
        assert summary.force_pairs.slope == pytest.approx(1.0, abs=0.05)


def test_the_duplicates_in_the_example_data_are_true(request):
    source = open_dataset(request.config.rootpath / EXAMPLES / "fid1_gfn2_train.h5")
    found = the(check({"gfn2": source}).findings, "duplicates")
    assert found.count == 3
    groups = read_groups(source.files[0])
    for place in found.places:
        arrays, row = groups[int(place.group)], place.row
        assert (np.abs(np.delete(arrays["energy"], row) - arrays["energy"][row]) < 1e-3).any()


# --------------------------------------------------------------------------------------------------
# faults of single molecules
# --------------------------------------------------------------------------------------------------


def set_value(key, value, group=7, row=3):
    def plant(groups):
        groups[group][key][row] = value
        return group, row

    return plant


def set_part(key, value, group=7, row=3):
    def plant(groups):
        groups[group][key][row, 2] = value
        return group, row

    return plant


def move_atom(distance, group=6, row=4):
    """Put atom 1 at a distance from atom 0."""

    def plant(groups):
        coord = groups[group]["coord"]
        coord[row, 1] = coord[row, 0] + np.array([0.0, 0.0, distance])
        return group, row

    return plant


def pull_away(groups):
    groups[6]["coord"][4, 1] += 30.0
    return 6, 4


def shift_parity(groups):
    groups[7]["mult"][3] += 1
    groups[7]["spin_charges"][3] += 1 / 7
    return 7, 3


def too_many_unpaired(groups):
    groups[2]["mult"][0] += 100
    groups[2]["spin_charges"][0] += 50
    return 2, 0


def add_charge(key, amount):
    def plant(groups):
        groups[7][key][3] += amount / 7
        return 7, 3

    return plant


def drag(groups):
    groups[7]["forces"][3] += 1.0
    return 7, 3


def turn_forces(groups):
    """The forces of a bent molecule in another orientation."""
    forces = groups[5]["forces"][2]
    groups[5]["forces"][2] = forces[:, [1, 2, 0]]
    return 5, 2


FAULTS = {
    "nan coordinate": ("bad_coord", "error", set_part("coord", np.nan)),
    "infinite coordinate": ("bad_coord", "error", set_part("coord", np.inf)),
    "nan charge": ("bad_charge", "error", set_value("charge", np.nan)),
    "infinite mult": ("bad_mult", "error", set_value("mult", np.inf)),
    "padding": ("bad_numbers", "error", set_part("numbers", 0)),
    "offset": ("bad_numbers", "error", set_part("numbers", 206)),
    "negative": ("bad_numbers", "error", set_part("numbers", -6)),
    "infinite energy": ("infinite_energy", "error", set_value("energy", -np.inf)),
    "infinite force": ("infinite_forces", "error", set_part("forces", np.inf)),
    "half of the forces": ("half_missing_forces", "warning", set_part("forces", np.nan)),
    "half of the charges": ("half_missing_charges", "warning", set_part("charges", np.nan)),
    "fractional charge": ("fractional_charge", "warning", set_value("charge", 0.5)),
    "mult 0": ("not_a_multiplicity", "error", set_value("mult", 0)),
    "mult 1.5": ("not_a_multiplicity", "error", set_value("mult", 1.5)),
    "parity": ("parity", "error", shift_parity),
    "unpaired": ("too_many_unpaired", "error", too_many_unpaired),
    "more charge than protons": ("no_electrons", "error", set_value("charge", 1000)),
    "one place": ("coinciding_atoms", "error", move_atom(0.0)),
    "close": ("close_atoms", "warning", move_atom(0.4)),
    "far": ("far_fragments", "note", pull_away),
    "charges of another state": ("charges_sum", "error", add_charge("charges", 1.0)),
    "rounded charges": ("charges_sum_rounded", "warning", add_charge("charges", 0.2)),
    "spins of another state": ("spin_charges_sum", "error", add_charge("spin_charges", 1.0)),
    "rounded spins": ("spin_charges_sum_rounded", "warning", add_charge("spin_charges", 0.2)),
    "net force": ("net_force", "warning", drag),
    "torque": ("torque", "warning", turn_forces),
    "outlier": ("energy_outlier", "warning", set_value("energy", -4000.0)),
    "energy of 0": ("energy_outlier", "warning", set_value("energy", 0.0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_molecule_is_named(fault, groups, tmp_path):
    kind, severity, plant = FAULTS[fault]
    arrays = groups()
    group, row = plant(arrays)
    source = write(tmp_path / "data.h5", arrays)
    for findings in (check({"dft": source}).findings, quick_checks(source, "dft")):
        found = the(findings, kind)
        assert (found.severity, found.fidelity, found.count) == (severity, "dft", 1)
        assert found.places == (Place(str(tmp_path / "data.h5"), f"{group:03d}", row),)
        others = kinds(findings) - {kind, "missing_labels", "rare_element"}
        # The molecule may well have further faults, but no other molecule has any.
        assert all(f.places == found.places for f in findings if f.kind in others), others


def test_the_first_rows_are_named_and_all_are_counted(groups, tmp_path):
    arrays = groups()
    arrays[6]["coord"][[1, 5]] = np.nan
    arrays[7]["coord"][3:10] = np.nan
    source = write(tmp_path / "data.h5", arrays)
    found = the(check({"dft": source}, limits=Thresholds(max_examples=4)).findings, "bad_coord")
    assert found.count == 9
    assert [(place.group, place.row) for place in found.places] == [("006", 1), ("006", 5), ("007", 3), ("007", 4)]
    assert "group 006: rows 1, 5; group 007: rows 3, 4; and 5 more" in str(found)
    assert "9 of 160 molecules" in found.message


def test_rows_of_several_files_as_one_dataset(groups, tmp_path):
    for name in ("a", "b"):
        arrays = groups("tiny_fid1")
        if name == "b":
            arrays[4]["charge"][2] = np.inf
        write_dataset(tmp_path / f"{name}.h5", arrays)
    findings = check({"gfn2": open_dataset(tmp_path / "*.h5")}).findings
    assert the(findings, "bad_charge").places == (Place(str(tmp_path / "b.h5"), "004", 2),)
    assert the(findings, "duplicates").severity == "warning"
    assert "joined with itself" in the(findings, "duplicates").message


def test_parity_without_mult(groups, tmp_path):
    arrays = groups("tiny_fid1")
    odd = sum(int(((a["mult"] % 2) == 0).sum()) for a in arrays.values())
    for values in arrays.values():
        del values["mult"]
    found = the(check({"gfn2": write(tmp_path / "data.h5", arrays)}).findings, "parity_without_mult")
    assert (found.severity, found.count) == ("warning", odd)


def test_missing_labels_are_counted(groups, tmp_path):
    arrays = groups()
    arrays[7]["forces"][:4] = np.nan
    arrays[8]["energy"][0] = np.nan
    for values in arrays.values():
        values["charges"][:] = np.nan
    report = check({"dft": write(tmp_path / "data.h5", arrays)})
    assert report.summaries["dft"].labels == {"energy": 159, "forces": 156, "charges": 0, "spin_charges": 160}
    missing = {f.message: f.severity for f in report.findings if f.kind == "missing_labels"}
    assert sorted(missing.values()) == ["note", "note", "warning"]
    assert any("4 of 160 molecules lack forces" in message for message in missing)


def test_no_labels_at_all(groups, tmp_path):
    arrays = groups("tiny_fid2")
    for values in arrays.values():
        values["energy"][:] = np.nan
    report = check({"gfn1": write(tmp_path / "data.h5", arrays)})
    assert the(report.findings, "no_labels").severity == "error"
    json.dumps(report.to_dict(), allow_nan=False)


def test_integer_and_unsigned_arrays(groups, tmp_path):
    arrays = groups("tiny_fid1")
    for values in arrays.values():
        values["numbers"] = values["numbers"].astype(np.uint8)
        values["charge"] = values["charge"].astype(np.int8)
        values["mult"] = values["mult"].astype(np.uint8)
    arrays[5]["mult"][1] = 0
    report = check({"gfn2": write(tmp_path / "data.h5", arrays)})
    assert kinds(report.findings, "error") == {"not_a_multiplicity"}


def test_single_atoms(tmp_path):
    arrays = {
        1: {
            "coord": np.zeros((3, 1, 3), np.float32),
            "numbers": np.array([[1], [1], [8]]),
            "charge": np.zeros(3),
            "mult": np.array([2, 2, 3]),
            "energy": np.array([-13.6, -13.6, -2041.0]),
            "forces": np.zeros((3, 1, 3), np.float32),
        }
    }
    report = check({"atoms": write(tmp_path / "atoms.h5", arrays)})
    assert kinds(report.findings) == {"duplicates", "rare_element"}
    assert the(report.findings, "duplicates").places[0].row == 1


def crystal(energies, lengths):
    """Copper with one atom in a cell."""
    count = len(lengths)
    return {
        "coord": np.zeros((count, 1, 3)),
        "numbers": np.full((count, 1), 29),
        "charge": np.zeros(count),
        "mult": np.full(count, 2),
        "energy": np.asarray(energies),
        "cell": np.asarray(lengths)[:, None, None] * np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]),
    }


def test_cells_are_part_of_the_geometry(tmp_path):
    """A scan of the volume: the atom is always at the origin."""
    source = write(tmp_path / "eos.h5", {1: crystal([-3.0, -3.5, -3.2, -3.5], [3.5, 3.6, 3.7, 3.6])})
    findings = check({"eos": source}).findings
    assert [place.row for place in the(findings, "duplicates").places] == [3]
    assert "contradictory_duplicates" not in kinds(findings)


def test_strained_cells_say_nothing_about_forces(example, tmp_path):
    """The energy changes by the stress, not by the forces."""
    arrays = example("fid1_gfn2_train")
    rng = np.random.default_rng(0)
    for values in arrays.values():
        length = rng.uniform(20.0, 21.0, len(values["energy"]))
        values["cell"] = length[:, None, None] * np.eye(3)
        values["energy"] += 100.0 * (length - 20.0)
    assert check({"npt": write(tmp_path / "npt.h5", arrays)}).summaries["npt"].force_pairs is None
    for values in arrays.values():
        values["energy"] -= 100.0 * (values["cell"][:, 0, 0] - 20.0)
        values["cell"][:] = 20.0 * np.eye(3)
    assert check({"nvt": write(tmp_path / "nvt.h5", arrays)}).summaries["nvt"].force_pairs.consistent


# --------------------------------------------------------------------------------------------------
# whole datasets: types, units, forces
# --------------------------------------------------------------------------------------------------


def change(groups, **factors):
    for arrays in groups.values():
        for key, factor in factors.items():
            arrays[key] = arrays[key] * factor
    return groups


def test_types_that_lose_digits(groups, tmp_path):
    arrays = groups()
    for values in arrays.values():
        values["energy"] = values["energy"].astype(np.float32)
        values["coord"] = values["coord"].astype(np.float16)
    findings = check({"dft": write(tmp_path / "data.h5", arrays)}).findings
    assert "float32" in the(findings, "energy_type").message
    assert "16 meV" in the(findings, "energy_type").message  # float32 has 24 bits: 2^-6 eV between 2^17 and 2^18 eV
    assert the(findings, "coord_type").severity == "warning"


@pytest.mark.parametrize("name", ["tiny_fid0", "tiny_fid1", "tiny_fid2"])
@pytest.mark.parametrize(
    ("unit", "factor"), [("Hartree", 1 / HARTREE_EV), ("kcal/mol", EV_KCAL_MOL), ("kJ/mol", EV_KJ_MOL)]
)
def test_energies_in_other_units(name, unit, factor, groups, tmp_path):
    source = write(tmp_path / "data.h5", change(groups(name), energy=factor))
    for findings in (check({"a": source}).findings, quick_checks(source, "a")):
        found = the(findings, "energy_unit")
        assert (found.severity, found.places) == ("warning", (Place(str(tmp_path / "data.h5")),))
        assert f"look like {unit}, not eV" in found.message


def test_energies_of_a_single_molecule_have_a_unit_too(tmp_path):
    """Where self-atomic energies cannot be told apart."""
    rng = np.random.default_rng(0)
    numbers = [np.tile([8, 6, 6, 1, 1, 1, 1, 1, 1], (100, 1))]
    total = -154.0 + 0.01 * rng.normal(size=100)
    assert energy_unit(numbers, [total]).unit == "Hartree"
    assert energy_unit(numbers, [total * HARTREE_EV]).unit == "eV"


def test_energies_without_a_telling_size(groups):
    """Residuals, formation energies: no claim is better than a wrong one."""
    arrays = groups().values()
    rng = np.random.default_rng(0)
    numbers = [a["numbers"] for a in arrays]
    for scale in (0.1, 1.0, 10.0):
        assert energy_unit(numbers, [scale * rng.normal(size=len(n)) for n in numbers]) is None


def test_atomisation_energies():
    """Experimental ones: H2O, CH4, NH3, benzene, CO2."""
    molecules = [[8, 1, 1], [6, 1, 1, 1, 1], [7, 1, 1, 1], [6] * 6 + [1] * 6, [6, 8, 8]]
    numbers = [np.array([n]) for n in molecules]
    energies = [np.array([e]) for e in (-10.1, -18.2, -12.9, -59.3, -16.9)]
    for unit, factor in (("eV", 1.0), ("Hartree", 1 / HARTREE_EV), ("kcal/mol", EV_KCAL_MOL), ("kJ/mol", EV_KJ_MOL)):
        guess = energy_unit(numbers, [factor * e for e in energies])
        assert guess is None or guess.unit == unit
    assert energy_unit(numbers, energies).reference == "energies relative to free atoms"


@pytest.mark.parametrize(("unit", "factor"), [("Bohr", 1 / BOHR_ANGSTROM), ("nm", 0.1), ("pm", 100.0)])
def test_coordinates_in_other_units(unit, factor, groups, tmp_path):
    source = write(tmp_path / "data.h5", change(groups(), coord=factor))
    for findings in (check({"a": source}).findings, quick_checks(source, "a")):
        found = the(findings, "coord_unit")
        assert found.severity == "warning"
        assert f"look like {unit}, not Å" in found.message
        assert not kinds(findings, "error")  # a guess refuses nothing


def two_atoms(symbol_numbers, distances, energies):
    count = len(distances)
    coord = np.zeros((count, 2, 3))
    coord[:, 1, 2] = distances
    return {
        "coord": coord,
        "numbers": np.tile(symbol_numbers, (count, 1)),
        "charge": np.zeros(count),
        "energy": np.asarray(energies),
    }


@pytest.mark.parametrize(("numbers", "distances"), [((1, 1), (0.5, 5.0)), ((1, 11), (1.75, 2.05))])
def test_stretched_and_ionic_bonds_are_not_in_bohr(numbers, distances, tmp_path):
    distances = np.linspace(*distances, 200)
    arrays = two_atoms(numbers, distances, -30.0 + 0.1 * distances)
    assert "coord_unit" not in kinds(check({"scan": write(tmp_path / "scan.h5", {2: arrays})}).findings)


def test_enthalpies_of_formation_are_no_atomisation_energies():
    """Those of methane to butane in eV have about the size of their atomisation energies in Hartree."""
    numbers = [np.array([[6] * n + [1] * (2 * n + 2)]) for n in (1, 2, 3, 4, 4)]
    energies = [np.array([e]) for e in (-0.77, -0.87, -1.08, -1.30, -1.39)]
    assert energy_unit(numbers, energies) is None


def test_length_unit_is_silent_without_enough_atoms():
    assert length_unit(np.ones(19, int), np.full(19, 2.0)) is None
    assert length_unit(np.full(100, 79), np.full(100, 2.9)) is None
    assert length_unit(np.ones(20, int), np.full(20, 1.09)) == ("Å", 1.09)


def test_units_in_the_file_are_respected(groups, tmp_path):
    path = tmp_path / "data.h5"
    write_dataset(path, change(groups(), energy=1 / HARTREE_EV), {"energy_unit": "Hartree"})
    assert not kinds(quick_checks(open_dataset(path), "a"))


def test_gradients_in_place_of_forces(example, tmp_path):
    report = check({"dft": write(tmp_path / "data.h5", change(example(), forces=-1.0))})
    assert report.summaries["dft"].force_pairs.slope == pytest.approx(-1.0, abs=0.05)
    assert the(report.findings, "forces_sign").severity == "error"
    assert "forces_unit" not in kinds(report.findings)
    assert "are gradients; multiply them by -1" in the(report.findings, "forces_sign").message


def test_binding_energies_are_not_taken_for_gradients(example, tmp_path):
    """Positive energies of molecules: the forces may be right."""
    source = write(tmp_path / "data.h5", change(example(), energy=-1.0))
    assert "or the energies have the wrong sign" in the(check({"dft": source}).findings, "forces_sign").message


def test_gradients_in_some_molecules(example, tmp_path):
    """As when one of several files holds gradients."""
    arrays = example("fid1_gfn2_train")
    for n_atoms in (8, 9):
        arrays[n_atoms]["forces"] *= -1.0
    found = the(check({"a": write(tmp_path / "data.h5", arrays)}).findings, "forces_of_some")
    assert found.severity == "warning"
    assert {place.group for place in found.places} <= {"008", "009"}
    assert len(found.places) == 5


def test_energies_of_one_size_in_hartree(example, tmp_path):
    """Many gross errors of one kind must not bend the self-atomic energies that they are judged by."""
    arrays = example("fid1_gfn2_train")
    arrays[9]["energy"] /= HARTREE_EV
    findings = check({"a": write(tmp_path / "data.h5", arrays)}, limits=Thresholds(max_examples=4000)).findings
    places = the(findings, "energy_outlier").places
    assert len(places) > 0.9 * len(arrays[9]["energy"])
    assert {place.group for place in places} == {"009"}


@pytest.mark.parametrize(("factor", "kind"), [(-1.0, "forces_sign"), (EV_KCAL_MOL, "forces_unit")])
def test_training_finds_wrong_forces_in_a_sample(factor, kind, example, tmp_path):
    source = write(tmp_path / "data.h5", change(example("fid1_gfn2_train"), forces=factor))
    assert kind in kinds(quick_checks(source, "a", limit=1000))


@pytest.mark.parametrize(
    ("forces", "energy", "words"),
    [
        (BOHR_ANGSTROM / HARTREE_EV, 1.0, "energies in eV with forces in Hartree/Bohr"),
        (BOHR_ANGSTROM / HARTREE_EV, 1 / HARTREE_EV, "energies in Hartree with forces in Hartree/Bohr"),
        (1.0, 1 / HARTREE_EV, "energies in Hartree with forces in eV/Å"),
        (EV_KCAL_MOL, 1.0, "energies in eV with forces in kcal/mol/Å"),
        (-EV_KCAL_MOL, 1.0, "energies in eV with forces in kcal/mol/Å"),
        (1.0, EV_KCAL_MOL, "energies in kcal/mol with forces in eV/Å"),
        (10 * EV_KJ_MOL, 1.0, "energies in eV with forces in kJ/mol/nm"),
    ],
)
def test_forces_in_other_units(forces, energy, words, example, tmp_path):
    source = write(tmp_path / "data.h5", change(example(), forces=forces, energy=energy))
    findings = check({"dft": source}).findings
    found = the(findings, "forces_unit")
    assert found.severity == "warning"
    assert words in found.message
    assert ("forces_sign" in kinds(findings)) == (forces < 0)


def test_forces_of_coordinates_in_bohr(example, tmp_path):
    """Everything in atomic units: energies follow the forces, and each quantity is named by its own evidence."""
    units = {"coord": 1 / BOHR_ANGSTROM, "energy": 1 / HARTREE_EV, "forces": BOHR_ANGSTROM / HARTREE_EV}
    findings = check({"dft": write(tmp_path / "data.h5", change(example(), **units))}).findings
    assert {"coord_unit", "energy_unit"} <= kinds(findings)
    assert "forces_sign" not in kinds(findings)
    assert units_of_ratio(BOHR_ANGSTROM, "Bohr", "Hartree")[0] == ("Hartree", "Hartree/Å")


def test_energies_without_reference_and_their_forces_in_kcal_mol(example, tmp_path):
    arrays = example("fid1_gfn2_train")
    numbers, energies = (np.concatenate([v[key].ravel() for v in arrays.values()]) for key in ("numbers", "energy"))
    elements = np.unique(numbers).tolist()
    fit = fit_sae(np.concatenate([composition(v["numbers"], elements) for v in arrays.values()]), energies, elements)
    for values in arrays.values():
        values["energy"] = values["energy"] - sae_energy(values["numbers"], fit.sae)
    assert not check({"a": write(tmp_path / "ev.h5", arrays)}).count("warning")
    report = check({"a": write(tmp_path / "kcal.h5", change(arrays, energy=EV_KCAL_MOL, forces=EV_KCAL_MOL))})
    assert kinds(report.findings, "warning") == {"force_scale", "energy_and_forces_unit"}


def test_forces_of_other_molecules(example, tmp_path):
    arrays = example()
    for values in arrays.values():
        values["forces"] = np.roll(values["forces"], 1, axis=0)
    assert "forces_unrelated" in kinds(check({"dft": write(tmp_path / "data.h5", arrays)}).findings)


def test_forces_of_another_order_of_atoms(example, tmp_path):
    arrays = example("fid1_gfn2_train")
    for values in arrays.values():
        values["forces"] = values["forces"][:, ::-1]
    findings = check({"gfn2": write(tmp_path / "data.h5", arrays)}).findings
    assert {"forces_unrelated", "torque"} <= kinds(findings)


def test_pairs_of_relaxed_geometries_say_nothing():
    """Work and energy change are both noise there."""
    rng = np.random.default_rng(0)
    work, energy, stiffness = 3e-4 * rng.normal(size=200), 5e-4 * rng.normal(size=200), np.full(200, 30.0)
    assert force_relation(work, energy, stiffness) is None
    relation = force_relation(100 * work, 100 * work + energy, stiffness)
    assert relation.consistent
    assert relation.related
    assert relation.slope == pytest.approx(1.0, abs=0.02)


def test_large_and_zero_forces_without_pairs(groups, tmp_path):
    findings = quick_checks(write(tmp_path / "kcal.h5", change(groups(), forces=EV_KCAL_MOL)), "dft")
    assert the(findings, "force_scale").severity == "warning"
    findings = quick_checks(write(tmp_path / "zero.h5", change(groups(), forces=0.0)), "dft")
    assert the(findings, "zero_forces").severity == "warning"


def test_turning_molecules_and_forces_together_changes_nothing(example, tmp_path):
    arrays = example()
    rng = np.random.default_rng(1)
    for values in arrays.values():
        turns = np.linalg.qr(rng.normal(size=(len(values["coord"]), 3, 3)))[0]
        turns[:, 0] *= np.sign(np.linalg.det(turns))[:, None]
        values["coord"] = values["coord"] @ turns + rng.normal(size=(len(turns), 1, 3))
        values["forces"] = values["forces"] @ turns
    report = check({"dft": write(tmp_path / "data.h5", arrays)})
    assert not report.count("error") + report.count("warning")
    assert report.summaries["dft"].force_pairs.slope == pytest.approx(1.0, abs=0.03)


# --------------------------------------------------------------------------------------------------
# self-atomic energies
# --------------------------------------------------------------------------------------------------


def test_self_atomic_energies_that_do_not_fit(groups, tmp_path):
    source = write(tmp_path / "data.h5", groups("tiny_fid1"))
    right = {1: -13.4, 6: -58.4, 7: -78.8, 8: -110.8, 9: -128.6, 14: -48, 15: -69.6, 16: -88.2, 17: -123.6, 35: -111}
    assert not check({"a": source}, sae={"a": right}).count("warning")
    wrong = {z: 10 * energy for z, energy in right.items()}
    assert the(check({"a": source}, sae={"a": wrong}).findings, "sae_mismatch").severity == "warning"
    del right[35]
    found = the(check({"a": source}, sae={"a": right}).findings, "sae_elements")
    assert found.severity == "error"
    assert "Br (35)" in found.message


def test_ions_and_radicals_are_no_outliers_but_a_wrong_ion_is(example, tmp_path):
    arrays = example()
    rows = {n: np.flatnonzero(values["charge"] == 1) for n, values in arrays.items()}
    size = next(n for n in sorted(rows, reverse=True) if len(rows[n]))
    arrays[size]["energy"][rows[size][0]] += 60.0
    found = the(check({"dft": write(tmp_path / "data.h5", arrays)}).findings, "energy_outlier")
    assert [(place.group, place.row) for place in found.places] == [(f"{size:03d}", rows[size][0])]


def test_outlier_among_molecules_of_its_composition(example, tmp_path):
    """Too small to be seen among all molecules, but not among its isomers."""
    arrays = example("fid1_gfn2_train")
    compositions, counts = np.unique(np.sort(arrays[15]["numbers"], axis=1), axis=0, return_counts=True)
    most = compositions[np.argmax(counts)]
    row = int(np.flatnonzero((np.sort(arrays[15]["numbers"], axis=1) == most).all(axis=1))[1])
    arrays[15]["energy"][row] += 20.0
    found = the(check({"gfn2": write(tmp_path / "data.h5", arrays)}).findings, "energy_outlier")
    assert found.places == (Place(str(tmp_path / "data.h5"), "015", row),)


def test_many_outliers_do_not_hide_one_another(example, tmp_path):
    arrays = example()
    for values in arrays.values():
        values["energy"][::25] /= HARTREE_EV  # 4 % of the rows left in Hartree
    expected = sum(len(values["energy"][::25]) for values in arrays.values())
    report = check({"dft": write(tmp_path / "data.h5", arrays)})
    assert the(report.findings, "energy_outlier").count == expected
    assert "energy_unit" not in kinds(report.findings)


# --------------------------------------------------------------------------------------------------
# between datasets
# --------------------------------------------------------------------------------------------------


def moved(coord, seed=0):
    """A molecule in another place and orientation, mirrored, in float32."""
    rng = np.random.default_rng(seed)
    return (coord @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + rng.normal(size=3)).astype(np.float32)


def copy_row(groups, size, row, energy=0.0):
    """Append a copy of a molecule, moved and with its atoms in another order; returns the new row."""
    order = np.random.default_rng(1).permutation(size)
    for key, values in groups[size].items():
        new = values[row]
        if key == "coord":
            new = moved(new)
        if new.ndim and len(new) == size:
            new = new[order]
        groups[size][key] = np.concatenate([values, new[None]])
    groups[size]["energy"][-1] += energy
    groups[size]["forces"][-1] = np.nan  # they were not turned along
    return len(groups[size]["energy"]) - 1


def test_duplicates_in_a_dataset(groups, tmp_path):
    arrays = groups()
    new = [copy_row(arrays, 7, 3), copy_row(arrays, 8, 11)]
    findings = check({"dft": write(tmp_path / "data.h5", arrays)}).findings
    found = the(findings, "duplicates")
    assert (found.count, [(p.group, p.row) for p in found.places]) == (2, [("007", new[0]), ("008", new[1])])
    assert "group 007: row 3" in found.message
    assert "contradictory_duplicates" not in kinds(findings)


def test_duplicates_with_another_energy(groups, tmp_path):
    arrays = groups()
    copy_row(arrays, 7, 3)
    row = copy_row(arrays, 8, 2, energy=0.01)
    findings = check({"dft": write(tmp_path / "data.h5", arrays)}).findings
    found = the(findings, "contradictory_duplicates")
    assert found.severity == "warning"
    assert found.places == (Place(str(tmp_path / "data.h5"), "008", row),)
    assert "0.01 eV" in found.message
    assert the(findings, "duplicates").count == 2


def test_energies_may_differ_as_much_as_nearly_equal_geometries_explain(groups, tmp_path):
    arrays = groups("tiny_fid1")
    row = {key: values[:1] for key, values in arrays[8].items()}
    row["coord"] = row["coord"] + np.array([[[3e-4, 0, 0]] + [[0.0] * 3] * 7])
    row["energy"] = row["energy"] + 5e-3
    for key, values in arrays[8].items():
        arrays[8][key] = np.concatenate([values, row[key]])
    found = kinds(check({"a": write(tmp_path / "data.h5", arrays)}).findings)
    assert "duplicates" in found
    assert "contradictory_duplicates" not in found


def test_other_charge_or_slightly_other_geometry_is_no_duplicate(groups, tmp_path):
    arrays = groups("tiny_fid1")
    for key, values in arrays[8].items():
        arrays[8][key] = np.concatenate([values, values[:2]])
    arrays[8]["charge"][-2] += 2
    arrays[8]["coord"][-1, 0] += 0.005
    assert "duplicates" not in kinds(check({"a": write(tmp_path / "data.h5", arrays)}).findings)


def test_geometries_rounded_to_four_digits_are_duplicates(groups, tmp_path):
    arrays = groups("tiny_fid2")
    total = 0
    for size, values in arrays.items():
        if size > 2:
            total += len(values["energy"])
            for key in values:
                copy = np.round(values[key], 4) if key == "coord" else values[key]
                values[key] = np.concatenate([values[key], copy])
    assert the(check({"a": write(tmp_path / "data.h5", arrays)}).findings, "duplicates").count == total


def test_the_same_file_for_two_fidelities(fixtures_dir):
    sources = {name: open_dataset(fixtures_dir / "tiny_fid1.h5") for name in ("a", "b")}
    found = the(check(sources).findings, "same_energies")
    assert (found.severity, found.fidelity, found.count) == ("error", "a, b", 200)


def test_shared_geometries_of_two_fidelities_are_a_note(fixtures_dir):
    sources = {f"fid{f}": open_dataset(fixtures_dir / f"tiny_fid{f}.h5") for f in (0, 2)}
    found = the(check(sources).findings, "shared_geometries")
    assert (found.severity, found.count) == ("note", 3)


def test_validation_file_that_is_trained_on(groups, tmp_path):
    train, val = groups(), {}
    for size in (7, 8):
        val[size] = {key: values[:4] for key, values in train[size].items()}
        train[size] = {key: values[(3 if size == 8 else 4) :] for key, values in train[size].items()}
    sources, validation = write(tmp_path / "train.h5", train), write(tmp_path / "val.h5", val)
    for findings in (
        check({"dft": sources}, {"dft": validation}).findings,
        leakage({"dft": sources}, {"dft": validation}),
    ):
        found = the(findings, "leak")
        assert (found.severity, found.count) == ("error", 1)
        assert found.places == (Place(str(tmp_path / "val.h5"), "008", 3),)
        assert "1 of 8 validation molecules" in found.message
        assert "train.h5: group 008: row 0" in found.message


def test_split_with_a_copy_on_the_other_side(groups, tmp_path):
    arrays = groups()
    row = copy_row(arrays, 7, 3)
    source = write(tmp_path / "data.h5", arrays)
    start = int(np.flatnonzero(source.n_atoms == 7)[0])
    held_out = {"dft": np.array([start + 3, start + 5])}
    found = the(leakage({"dft": source}, held_out=held_out), "leak")
    assert (found.count, found.places[0].row) == (1, 3)
    assert f"row {row}" in found.message
    assert leakage({"dft": source}, held_out={"dft": np.array([start + 5])}) == []
    assert leakage({"dft": source}) == []
    assert leakage({"dft": source}, held_out=held_out, max_molecules=10) == []


def test_leakage_of_data_that_is_wrong_in_other_ways(groups, tmp_path):
    arrays = groups()
    copy_row(arrays, 7, 3)
    arrays[7]["numbers"][0] = [0, -1, 200, 2**30, 1, 1, 1]
    arrays[7]["coord"][1] = np.nan
    source = write(tmp_path / "data.h5", arrays)
    start = int(np.flatnonzero(source.n_atoms == 7)[0])
    (found,) = leakage({"dft": source}, held_out={"dft": start + np.arange(5)})
    assert (found.count, found.places[0].row) == (1, 3)


def test_validation_geometry_of_another_fidelity(fixtures_dir):
    sources = {f"fid{f}": open_dataset(fixtures_dir / f"tiny_fid{f}.h5") for f in (0, 2)}
    validation = {"fid0": sources.pop("fid0")}
    found = the(leakage(sources, validation), "leak_across")
    assert (found.severity, found.count) == ("warning", 3)
    assert [(p.group, p.row) for p in found.places] == [("007", 12), ("008", 13), ("009", 2)]
    assert "fid2 (3)" in found.message


def test_elements_of_one_side_only(groups, tmp_path):
    with_bromine, without = groups(), groups("tiny_fid1")
    for values in without.values():
        kept = ~(values["numbers"] == 35).any(axis=1)
        values.update({key: array[kept] for key, array in values.items()})
    a, b = write(tmp_path / "a.h5", with_bromine), write(tmp_path / "b.h5", without)
    found = the(check({"a": a, "b": b}).findings, "element_of_others")
    assert (found.fidelity, found.severity) == ("b", "note")
    found = the(check({"b": b}, {"b": a}).findings, "element_only_in_validation")
    assert (found.severity, found.count, found.places[0].group) == ("warning", 7, "004")


def test_an_unreadable_dataset_leaves_the_others(groups, tmp_path, monkeypatch):
    good, bad = write(tmp_path / "good.h5", groups()), write(tmp_path / "bad.h5", groups("tiny_fid1"))

    def chunks(keys, max_rows):
        yield 0, next(bad.read(np.arange(3), keys))[1]
        raise DatasetError(f"{tmp_path}/bad.h5: group 003: forces is cut off. Copy the file anew.")

    monkeypatch.setattr(bad, "chunks", chunks)
    report = check({"bad": bad, "good": good})
    found = the(report.findings, "unreadable")
    assert found == Finding(
        "unreadable",
        "error",
        "bad",
        "forces is cut off. Copy the file anew.",
        None,
        (Place(f"{tmp_path}/bad.h5", "003"),),
    )
    assert set(report.summaries) == {"good"}
    assert report.count("error") == 1


def test_nothing_is_left_of_an_unreadable_dataset(example, tmp_path, monkeypatch):
    """Of the fingerprints, whose place the next dataset takes."""
    arrays = example()
    bad = write(tmp_path / "bad.h5", arrays)
    arrays[3]["coord"][:50] = np.nan
    good = write(tmp_path / "good.h5", arrays)
    chunks = bad.chunks

    def interrupted(keys, max_rows):
        for number, piece in enumerate(chunks(keys, max_rows)):
            if number == 4:
                raise DatasetError(f"{tmp_path}/bad.h5: group 006: forces is cut off. Copy the file anew.")
            yield piece

    monkeypatch.setattr(bad, "chunks", interrupted)
    alone, after = check({"good": good}), check({"bad": bad, "good": good})
    assert [finding for finding in after.findings if finding.fidelity == "good"] == alone.findings
    assert after.summaries["good"] == alone.summaries["good"]


# --------------------------------------------------------------------------------------------------
# geometry
# --------------------------------------------------------------------------------------------------


def test_averages_do_not_see_motion_and_order(groups):
    arrays = groups()[9]
    rng = np.random.default_rng(3)
    order = rng.permutation(9)
    coord, numbers = arrays["coord"], arrays["numbers"]
    other = np.stack([moved(x, seed) for seed, x in enumerate(coord)])[:, order]
    averages = geometry_averages(numbers, pair_distances(coord))
    assert geometry_averages(numbers[:, order], pair_distances(other)) == pytest.approx(averages, abs=2e-6)
    assert distance_mismatch(numbers, coord, numbers[:, order], other).max() < 1e-5
    keys = molecule_keys(numbers, arrays["charge"], arrays["mult"])
    assert (keys == molecule_keys(numbers[:, order], arrays["charge"], arrays["mult"])).all()
    assert not (keys == molecule_keys(numbers, arrays["charge"] + 1, arrays["mult"])).any()
    assert not (keys == molecule_keys(numbers, arrays["charge"], arrays["mult"] + 1)).any()


def test_averages_change_less_than_the_distances(groups):
    arrays = groups()[9]
    coord = arrays["coord"].astype(float)
    other = coord + np.random.default_rng(4).normal(scale=0.01, size=coord.shape)
    before, after = pair_distances(coord), pair_distances(other)
    change = np.abs(geometry_averages(arrays["numbers"], after) - geometry_averages(arrays["numbers"], before))
    assert (change <= np.abs(after - before).max(axis=0)[:, None]).all()
    assert (distance_mismatch(arrays["numbers"], coord, arrays["numbers"], other) > 1e-3).all()


def test_mismatch_tells_elements_apart():
    coord = np.array([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
    numbers, swapped = np.array([[1, 6, 8]]), np.array([[8, 6, 1]])
    assert distance_mismatch(numbers, coord, numbers, coord)[0] == 0.0
    assert distance_mismatch(numbers, coord, swapped, coord)[0] == pytest.approx(1.0)
    assert distance_mismatch(numbers, coord, np.array([[1, 6, 6]]), coord)[0] == np.inf


def test_radii_rule_out_only_what_distances_rule_out(groups):
    rng = np.random.default_rng(6)
    for arrays in groups().values():
        numbers, coord = arrays["numbers"], arrays["coord"].astype(float)
        for scale in (0.0, 1e-4, 3e-4, 1e-3, 0.03):
            other = np.stack([moved(x, seed) for seed, x in enumerate(coord + rng.normal(0, scale, coord.shape))])
            order = rng.permutation(numbers.shape[1])
            sides = (numbers, coord, numbers[:, order], other[:, order])
            likely = may_be_equal(*sides, tolerance=1e-3)
            assert likely[distance_mismatch(*sides) <= 1e-3].all()
            assert scale < 0.03 or numbers.shape[1] < 6 or likely.mean() < 0.1


def test_neighbours_never_match_nan():
    keys = np.array([5, 5, 5, 7], np.uint64)
    averages = np.array([[1.0, 1, 1], [np.nan] * 3, [1, 1, 1], [1, 1, 1]], np.float32)
    prints = Fingerprints(keys, averages)
    (pairs,) = neighbour_pairs(prints, sorting(prints), 1e-3, 8)
    assert pairs.tolist() == [[0, 2]]


def test_largest_gap_is_the_missing_link():
    line = np.zeros((1, 5, 3))
    line[0, :, 0] = [0.0, 20.0, 1.0, 21.5, 2.0]
    assert largest_gap(line)[0] == pytest.approx(18.0)


def test_superposing_turns_forces_along(groups):
    coord = groups()[8]["coord"].astype(float)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    moved_back, rotations = superpose(coord @ turn + 3.0, coord, np.zeros(len(coord), bool))
    assert moved_back == pytest.approx(coord, abs=1e-6)
    assert coord @ turn @ rotations == pytest.approx(coord, abs=1e-5)
    assert np.linalg.det(rotations) == pytest.approx(1.0)
    _, rotations = superpose(coord @ turn + 3.0, coord, np.ones(len(coord), bool))
    assert (rotations == np.eye(3)).all()


# --------------------------------------------------------------------------------------------------
# the whole
# --------------------------------------------------------------------------------------------------


def test_pieces_do_not_matter(example, tmp_path, monkeypatch):
    arrays = example()
    arrays[7]["coord"][5] = np.nan
    arrays[9]["charges"][::7] += 0.1
    source = write(tmp_path / "data.h5", arrays)
    whole = check({"dft": source})
    monkeypatch.setattr(checks.geometry, "PAIRS_PER_BLOCK", 100)
    monkeypatch.setattr(checks.rows, "CHUNK_ROWS", 17)
    in_pieces = check({"dft": source})
    assert in_pieces.findings == whole.findings
    assert in_pieces.summaries["dft"].charges == whole.summaries["dft"].charges


@pytest.mark.parametrize(("candidates", "neighbours", "at_least"), [(1000, 64, True), (100_000, 4, False)])
def test_copies_are_found_among_many_similar_geometries(
    candidates, neighbours, at_least, example, tmp_path, monkeypatch
):
    """A trajectory: too many geometries within the tolerance to compare all, but copies are closer still."""
    arrays = example()
    rng = np.random.default_rng(7)
    one = {key: np.repeat(values[:1], 400, axis=0) for key, values in arrays[12].items()}
    one["coord"] = (one["coord"] + rng.uniform(-1e-3, 1e-3, one["coord"].shape)).astype(np.float32)
    one["coord"][300] = moved(one["coord"][17])
    source = write(tmp_path / "data.h5", {12: one})
    monkeypatch.setattr(checks.pairs, "MAX_CANDIDATES", candidates)
    monkeypatch.setattr(checks.pairs, "MAX_NEIGHBOURS", neighbours)
    monkeypatch.setattr(checks.geometry, "MOLECULES_PER_BLOCK", 100)
    found = the(check({"md": source}, limits=Thresholds(max_examples=400)).findings, "duplicates")
    assert 300 in [place.row for place in found.places]
    assert ("at least" in found.message) == at_least


def test_large_molecules_are_compared_atom_by_atom_first(example, tmp_path, monkeypatch):
    """Averages over many distances are all alike in a trajectory of a large molecule."""
    rng = np.random.default_rng(8)
    count, grid = 60, 1.5 * np.stack(np.meshgrid(*[np.arange(5.0)] * 3), axis=-1).reshape(-1, 3)
    coord = grid + rng.normal(0, 0.05, (count, len(grid), 3))
    coord[40] = moved(coord[7])
    arrays = {
        "coord": coord.astype(np.float32),
        "numbers": np.tile([6, 1, 8, 7, 6], (count, len(grid) // 5)),
        "charge": np.zeros(count),
        "mult": np.ones(count),
        "energy": np.full(count, -125 * 500.0),
    }
    compared = []
    exactly = checks.geometry.distance_mismatch
    monkeypatch.setattr(
        checks.geometry, "distance_mismatch", lambda *sides: (compared.append(len(sides[0])), exactly(*sides))[1]
    )
    findings = check({"md": write(tmp_path / "md.h5", {len(grid): arrays})}).findings
    assert [place.row for place in the(findings, "duplicates").places] == [40]
    assert sum(compared) == 1


def test_sample_of_a_large_dataset(example, tmp_path, monkeypatch):
    """Findings that rest on a sample are the same as with all molecules."""
    arrays = change(example("fid1_gfn2_train"), energy=1 / HARTREE_EV)
    arrays[12]["energy"][40] = 0.0
    source = write(tmp_path / "data.h5", arrays)
    monkeypatch.setattr(checks.dataset, "SAMPLE_MOLECULES", 500)
    findings = check({"a": source}).findings
    assert "Hartree" in the(findings, "energy_unit").message
    assert the(findings, "energy_outlier").places == (Place(str(tmp_path / "data.h5"), "012", 40),)
    assert "energy_unit" in kinds(quick_checks(source, "a", limit=500))


def test_report_as_text_and_json(groups, tmp_path):
    arrays = groups()
    arrays[7]["coord"][3] = np.nan
    report = check({"dft": write(tmp_path / "data.h5", arrays)})
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["counts"]["error"] == 1
    assert content["findings"][0]["kind"] == "bad_coord"
    assert content["findings"][0]["places"] == [{"file": str(tmp_path / "data.h5"), "group": "007", "row": 3}]
    assert content["datasets"]["dft"]["molecules"] == sum(content["datasets"]["dft"]["sizes"].values()) == 160
    assert content["datasets"]["dft"]["sizes"]["9"] == 5
    assert content["datasets"]["dft"]["dtypes"]["numbers"] == "int32"
    assert content["datasets"]["dft"]["dtypes"]["energy"] == "float64"
    assert content["datasets"]["dft"]["elements"]["Br"]["molecules"] == 7
    text = report.text()
    assert "ERROR  dft: 1 of 160 molecules with NaN or infinite coordinates" in text
    assert "group 007: row 3" in text
    assert text.endswith("1 error, 0 warnings, 1 note")


def test_a_sample_without_a_usable_molecule(groups, tmp_path):
    arrays = groups()
    arrays[7]["charge"][:] = np.nan
    findings = quick_checks(write(tmp_path / "data.h5", arrays), "dft")
    assert the(findings, "bad_charge").count == len(arrays[7]["charge"])


@pytest.mark.parametrize("key", ["coord", "charge", "mult", "energy", "forces", "charges"])
def test_fill_values(key, groups, tmp_path):
    """What netCDF writes where nothing has been written."""
    arrays = groups()
    arrays[7][key][3] = 9.97e36
    source = write(tmp_path / "data.h5", arrays)
    for findings in (check({"dft": source}).findings, quick_checks(source, "dft")):
        found = [finding for finding in findings if Place(str(tmp_path / "data.h5"), "007", 3) in finding.places]
        assert kinds(found) - {"rare_element"}


def test_nothing_warns_about_its_own_arithmetic(groups, tmp_path):
    """All faults at once, with numpy's warnings as errors."""
    arrays = groups()
    for number, (_, _, plant) in enumerate(FAULTS.values()):
        if number % 2:
            plant(arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check({"dft": write(tmp_path / "data.h5", arrays)})
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.count("error")
