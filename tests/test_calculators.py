import numpy as np
import pytest
import torch

pytest.importorskip("ase")
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.optimize import BFGS

from aimnet2mult.calculators import AIMNet2Calculator, MultiFidelityCalculator, check_parity
from aimnet2mult.data.sae import load_sae
from aimnet2mult.models.base import load_checkpoint, load_model_config, save_checkpoint
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.potential import Potential
from aimnet2mult.tools.compile_jit import compile_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, fixtures_dir, sae_file):
    folder = tmp_path_factory.mktemp("models")
    for f in range(3):
        compile_model(
            fixtures_dir / "ref_mixed.pt",
            folder / "model",
            model=fixtures_dir / "ref_mixed_model.yaml",
            fidelity_level=f,
            sae=sae_file,
        )
    return folder


def test_same_numbers_as_the_model(compiled):
    atoms = molecule("CH3Cl")
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    out = load_jit_model(compiled)(
        {"coord": torch.tensor(atoms.positions[None]), "numbers": torch.tensor(atoms.numbers[None])}
    )
    assert atoms.get_potential_energy() == out["energy"].item()
    assert atoms.get_potential_energy(force_consistent=True) == out["energy"].item()
    np.testing.assert_array_equal(atoms.get_forces(), out["forces"][0].double())
    np.testing.assert_array_equal(atoms.get_charges(), out["charges"][0].double())
    relative = atoms.positions - atoms.get_center_of_mass()
    np.testing.assert_allclose(atoms.get_dipole_moment(), atoms.get_charges() @ relative)


def test_forces_are_those_of_the_energy(compiled):
    from ase.calculators.fd import calculate_numerical_forces

    model = load_jit_model(compiled)
    model.module.double()
    atoms = molecule("CH3Cl")
    atoms.calc = AIMNet2Calculator(model, device="cpu")
    numerical = calculate_numerical_forces(atoms, eps=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numerical, atol=1e-5)


def test_charge_and_spin_from_info_are_noticed_and_arguments_win(compiled):
    atoms = molecule("CH3")
    atoms.info["spin"] = 2
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    radical = atoms.get_potential_energy()
    atoms.info.update(charge=1, spin=1)
    cation = atoms.get_potential_energy()
    assert cation != radical
    assert atoms.get_charges().sum() == pytest.approx(1.0, abs=1e-3)
    atoms.calc = AIMNet2Calculator(compiled, charge=0, mult=2, device="cpu")
    assert atoms.get_potential_energy() == pytest.approx(radical, abs=1e-9)
    np.testing.assert_allclose(atoms.calc.get_spin_charges().sum(), 1.0, atol=1e-3)


def test_impossible_multiplicity(compiled):
    atoms = molecule("CH3")
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    with pytest.raises(ValueError, match=r"9 electrons \(charge 0\) cannot have the multiplicity 1"):
        atoms.get_potential_energy()
    with pytest.raises(ValueError, match="needs 4 unpaired electrons, the molecule has 2"):
        check_parity(np.array([1, 1]), 0, 5)
    with pytest.raises(ValueError, match="at least 1"):
        check_parity(np.array([1, 1]), 0, 0)
    with pytest.raises(ValueError, match="whole number"):
        AIMNet2Calculator(compiled, charge=0.5)


@pytest.mark.parametrize("key", ["charge", "spin", "mult"])
@pytest.mark.parametrize("value", [None, float("nan"), "x", "1", 0.5, True, np.array([1, 1])], ids=str)
def test_charge_and_spin_that_are_no_whole_numbers(compiled, key, value):
    atoms = molecule("H2O")
    atoms.info[key] = value
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    with pytest.raises(ValueError, match=rf"^atoms.info\['{key}'\] must be a whole number, found "):
        atoms.get_potential_energy()
    if value is not None and key != "spin":
        with pytest.raises(ValueError, match=rf"^{key} must be a whole number, found "):
            AIMNet2Calculator(compiled, device="cpu", **{key: value})


def test_whole_numbers_of_numpy_and_of_files(compiled):
    atoms = molecule("CH3")
    calc = AIMNet2Calculator(compiled, device="cpu")
    for charge, spin in [(0, 2), (np.int64(0), np.float64(2.0)), (0.0, np.int8(2))]:
        atoms.info.update(charge=charge, spin=spin)
        assert calc.charge_and_mult(atoms) == (0, 2)


def test_empty_atoms_and_dummy_atoms(compiled):
    calc = AIMNet2Calculator(compiled, device="cpu")
    assert calc.get_potential_energy(Atoms()) == 0.0
    water = molecule("H2O")
    with_dummy = water + Atoms("X", [[0.0, 0.0, 0.7]])
    assert calc.get_potential_energy(with_dummy) == pytest.approx(calc.get_potential_energy(water), abs=1e-8)
    np.testing.assert_array_equal(calc.get_forces(with_dummy)[3], 0.0)


def test_unknown_element_and_periodicity(compiled):
    atoms = Atoms("BrH", positions=[[0, 0, 0], [1.4, 0, 0]], calculator=AIMNet2Calculator(compiled, device="cpu"))
    with pytest.raises(ValueError, match=r"Br \(35\) is not among the elements"):
        atoms.get_potential_energy()
    slab = Atoms("H2", positions=[[0, 0, 0], [0.7, 0, 0]], cell=[9, 9, 9], pbc=[True, True, False])
    slab.calc = AIMNet2Calculator(compiled, device="cpu")
    with pytest.raises(ValueError, match="periodic in some directions only"):
        slab.get_potential_energy()


def test_optimisation_goes_downhill(compiled):
    atoms = molecule("H2O")
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    start = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=10)
    assert atoms.get_potential_energy() < start


def test_results_can_be_written_by_ase(compiled, tmp_path):
    from ase.io import read, write

    atoms = molecule("H2O")
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    energy = atoms.get_potential_energy()
    write(tmp_path / "a.extxyz", atoms)
    assert read(tmp_path / "a.extxyz").get_potential_energy() == pytest.approx(energy)


def test_hessian(compiled):
    atoms = molecule("H2O")
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    hessian = atoms.calc.get_hessian(atoms)
    assert hessian.shape == (9, 9)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


def test_file_that_computes_hessians_does_not_so_in_every_step(compiled, combined, monkeypatch):
    keys = []
    run = Potential._run

    def spy(model, data, function=None):
        out = run(model, data, function)
        keys.append(set(out))
        return out

    monkeypatch.setattr(Potential, "_run", spy)
    atoms = molecule("H2O")
    calc = AIMNet2Calculator(compiled, device="cpu")
    calc.model.module.compute_hessian = True
    calc.get_forces(atoms)
    assert calc.get_hessian(atoms).shape == (9, 9)
    several = MultiFidelityCalculator(combined, device="cpu")
    several.model.module.compute_hessian = True
    several.energies(atoms)
    assert len(keys) == 3
    assert not any("hessian" in found for found in keys)


def test_fidelities_of_a_folder(model_dir):
    calc = MultiFidelityCalculator(model_dir, device="cpu")
    atoms = molecule("H2O")
    atoms.calc = calc
    energies = calc.energies(atoms)
    assert sorted(energies) == [0, 1, 2]
    assert len(set(energies.values())) == 3
    assert atoms.get_potential_energy() == energies[0]
    calc.set_fidelity(2)
    assert atoms.get_potential_energy() == energies[2]
    for wrong in (3, -1, 1.0, True, None, "1x"):
        with pytest.raises(ValueError, match=rf"^fidelity {wrong!r}: (known: 0, 1, 2|did you mean)"):
            calc.set_fidelity(wrong)
    assert calc.fidelity == 2
    calc.set_fidelity(np.int64(1))
    assert atoms.get_potential_energy() == energies[1]


def test_folders_without_models(tmp_path, model_dir):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        MultiFidelityCalculator(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no compiled models"):
        MultiFidelityCalculator(tmp_path)


@pytest.fixture(scope="module")
def combined(tmp_path_factory, fixtures_dir, sae_file):
    (jpt, _) = compile_model(
        fixtures_dir / "ref_mixed.pt",
        tmp_path_factory.mktemp("combined") / "model",
        model=fixtures_dir / "ref_mixed_model.yaml",
        fidelity_level="all",
        combined=True,
        sae=dict.fromkeys(range(3), sae_file),
        default_fidelity=1,
    )
    return jpt


def test_one_file_of_all_fidelities(combined, model_dir, compiled):
    calc = MultiFidelityCalculator(combined, device="cpu")
    atoms = molecule("H2O")
    atoms.calc = calc
    separate = MultiFidelityCalculator(model_dir, device="cpu").energies(atoms)
    assert calc.energies(atoms) == separate
    assert calc.fidelity == 1
    assert atoms.get_potential_energy() == separate[1]
    calc.set_fidelity(2)
    assert atoms.get_potential_energy() == separate[2]
    with pytest.raises(ValueError, match="a model of one fidelity: use AIMNet2Calculator"):
        MultiFidelityCalculator(compiled)


def test_energies_and_their_differences(combined, model_dir, tmp_path, fixtures_dir, sae_file):
    atoms = molecule("CH3OH")
    weights = load_checkpoint(fixtures_dir / "ref_mixed.pt")["model"]
    table = weights["afv.weight"]
    table[200:329] = table[400:529] = table[:129]
    layout = {"num_fidelities": 3, "fidelity_offset": 200, "use_fidelity_readouts": True}
    known = {"sae": dict.fromkeys(range(3), load_sae(sae_file)), "fidelity_names": {0: "dft", 1: "gfn2", 2: "gfn1"}}
    config = load_model_config(fixtures_dir / "ref_mixed_model.yaml")
    save_checkpoint(tmp_path / "shared.pt", weights, model_config=config, **layout, **known)
    for source in (combined, model_dir, tmp_path / "shared.pt"):
        calc = MultiFidelityCalculator(source, device="cpu")
        atoms.calc = calc
        active, forces = atoms.get_potential_energy(), atoms.get_forces()
        results = dict(calc.results)
        energies = calc.energies(atoms)
        assert energies[calc.fidelity] == pytest.approx(active, abs=1e-6)
        assert energies == pytest.approx({f: _energy(source, f, atoms) for f in range(3)}, abs=1e-6)
        from_active = calc.energy_differences(atoms)
        assert from_active == {f: energy - energies[calc.fidelity] for f, energy in energies.items()}
        assert calc.energy_differences(atoms, 2)[2] == 0.0
        assert calc.energy_differences(atoms, calc.names[2]) == calc.energy_differences(atoms, 2)
        assert abs(calc.energy_differences(atoms, 2)[0]) > 1e-3
        with pytest.raises(ValueError, match=r"fidelity 'dfft': "):
            calc.energy_differences(atoms, "dfft")
        # The active fidelity, and what ASE holds of it, are what they were.
        assert calc.results == results
        assert calc.calculation_required(atoms, ["energy", "forces"]) is False
        assert np.array_equal(atoms.get_forces(), forces)
    assert MultiFidelityCalculator(tmp_path / "shared.pt", device="cpu").model.module.shared_backbone


def _energy(source, fidelity, atoms):
    atoms = atoms.copy()
    atoms.calc = MultiFidelityCalculator(source, fidelity, device="cpu")
    return atoms.get_potential_energy()


def test_energies_where_a_fidelity_lacks_an_element(tmp_path, fixtures_dir, sae_file):
    without = tmp_path / "without.yaml"
    without.write_text(sae_file.read_text().replace("17: -12518.7\n", ""))
    options = {
        "model": fixtures_dir / "ref_mixed_model.yaml",
        "fidelity_level": "all",
        "sae": {0: sae_file, 1: without, 2: sae_file},
    }
    compile_model(fixtures_dir / "ref_mixed.pt", tmp_path / "m", **options)
    compile_model(fixtures_dir / "ref_mixed.pt", tmp_path / "m", combined=True, **options)
    for source in (tmp_path, tmp_path / "m_all.jpt"):
        calc = MultiFidelityCalculator(source, device="cpu")
        energies = calc.energies(molecule("CH3Cl"))
        assert [np.isnan(energies[f]) for f in range(3)] == [False, True, False]
        assert np.isnan(calc.energy_differences(molecule("CH3Cl"))[1])
        with pytest.raises(ValueError, match=r"Si \(14\) is not among the elements of (fidelity 0|any fidelity)"):
            calc.energies(molecule("SiH4"))


def crystal():
    atoms = molecule("H2O")
    atoms.set_cell([[4.1, 0.0, 0.0], [0.6, 4.4, 0.0], [-0.3, 0.5, 4.7]])
    atoms.set_pbc(True)
    return atoms


def test_stress_of_a_crystal_is_that_of_ase(compiled):
    from ase.calculators.fd import calculate_numerical_stress

    model = load_jit_model(compiled)
    model.module.double()
    model.set_coulomb_method("ewald")
    atoms = crystal()
    atoms.calc = AIMNet2Calculator(model, device="cpu")
    stress = atoms.get_stress()
    assert stress.shape == (6,)
    np.testing.assert_allclose(stress, calculate_numerical_stress(atoms, eps=1e-4), atol=2e-5, rtol=0)
    assert np.abs(stress).max() > 1e-4


def test_molecules_have_no_stress(compiled):
    atoms = molecule("H2O")
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    with pytest.raises(PropertyNotImplementedError, match="without a cell"):
        atoms.get_stress()


def test_crystals_need_another_coulomb_method(compiled):
    atoms = crystal()
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    with pytest.raises(ValueError, match="choose dsf or ewald"):
        atoms.get_potential_energy()


def test_stress_that_a_file_does_not_give_leaves_no_results(compiled, monkeypatch):
    """As files of format 1 do."""
    from aimnet2mult import calculators

    complete = calculators._results
    without = lambda *arguments: {k: v for k, v in complete(*arguments).items() if k != "stress"}  # noqa: E731
    monkeypatch.setattr(calculators, "_results", without)
    atoms = molecule("H2O", cell=[8.0, 8.0, 8.0], pbc=True)
    atoms.calc = AIMNet2Calculator(compiled, device="cpu")
    atoms.calc.model.set_coulomb_method("dsf")
    with pytest.raises(PropertyNotImplementedError, match="earlier version, without stress: compile the model again"):
        atoms.get_stress()
    assert atoms.calc.results == {}
    assert np.isfinite(atoms.get_potential_energy())
