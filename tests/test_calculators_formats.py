"""ASE calculators for files of the AIMNet2 ecosystem: numbers of its own calculator, methods switched at run time."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("ase")
from ase import Atoms
from ase.units import Bohr

from aimnet2mult.calculators import AIMNet2Calculator, MultiFidelityCalculator
from aimnet2mult.models.base import save_checkpoint
from aimnet2mult.models.loading import load_potential
from aimnet2mult.tools.compile_jit import compile_model


@pytest.fixture(scope="module")
def published(fixtures_dir):
    return fixtures_dir / "peer_v2_lr.pt"


@pytest.fixture(scope="module")
def expected(reference):
    return reference("peer_v2_lr")


def molecule(expected, i):
    n = expected["natoms"][i]
    info = {"charge": int(expected["charge"][i]), "spin": int(expected["mult"][i])}
    return Atoms(expected["numbers"][i, :n], expected["coord"][i, :n], info=info)


def crystal(expected):
    name = "water2_triclinic"
    return Atoms(expected[f"{name}_numbers"], expected[f"{name}_coord"], cell=expected[f"{name}_cell"], pbc=True)


def assert_is(atoms, expected, tag, i):
    n = len(atoms)
    assert atoms.get_potential_energy() == pytest.approx(expected[f"energy_{tag}"][i], abs=1e-5)
    np.testing.assert_allclose(atoms.get_forces(), expected[f"forces_{tag}"][i, :n], rtol=0, atol=1e-4)
    np.testing.assert_allclose(atoms.get_charges(), expected[f"charges_{tag}"][i, :n], rtol=0, atol=1e-5)


def test_molecules_with_methods_switched_at_run_time(published, expected):
    calculator = AIMNet2Calculator(published)
    for i in range(len(expected["natoms"])):
        atoms = molecule(expected, i)
        atoms.calc = calculator
        assert_is(atoms, expected, "default", i)
    atoms = molecule(expected, 9)
    atoms.calc = calculator
    assert_is(atoms, expected, "default", 9)
    calculator.set_lrcoulomb_method("dsf", cutoff=15.0, dsf_alpha=0.2)
    assert_is(atoms, expected, "dsf", 9)  # the result of before is forgotten
    calculator.set_lrcoulomb_method("simple")
    assert_is(atoms, expected, "default", 9)


@pytest.mark.parametrize("method", ["dsf", "ewald"])
def test_crystal(published, expected, method):
    atoms = crystal(expected)
    atoms.calc = AIMNet2Calculator(published)
    with pytest.raises(ValueError, match="cannot be used with a cell; choose dsf or ewald"):
        atoms.get_potential_energy()
    atoms.calc.set_lrcoulomb_method(method)
    name = f"water2_triclinic_{method}"
    assert atoms.get_potential_energy() == pytest.approx(float(expected[f"{name}_energy"][0]), abs=1e-5)
    np.testing.assert_allclose(atoms.get_forces(), expected[f"{name}_forces"], rtol=0, atol=1e-4)
    stress = expected[f"{name}_stress"]
    np.testing.assert_allclose(atoms.get_stress(voigt=False), stress, rtol=0, atol=1e-5 * np.abs(stress).max() + 1e-6)


def test_range_of_dispersion(published, expected):
    atoms = molecule(expected, 9)  # water dimer
    atoms.calc = AIMNet2Calculator(published)
    default = atoms.get_potential_energy()
    atoms.calc.set_dftd3_cutoff(60.0 * Bohr, 0.0)
    assert atoms.get_potential_energy() == pytest.approx(default, abs=1e-6)  # all atoms within 12 Å
    atoms.calc.set_dftd3_cutoff(2.0, 0.2)
    short = atoms.get_potential_energy()
    assert short > default + 1e-3
    atoms.calc.set_dftd3_cutoff()
    assert atoms.get_potential_energy() == pytest.approx(default, abs=1e-9)
    with pytest.raises(ValueError, match="must be positive"):
        atoms.calc.set_dftd3_cutoff(-1.0)


def test_methods_that_are_fixed_in_a_file_warn_and_change_nothing(compiled):
    atoms = Atoms("H2O", [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]])
    atoms.calc = AIMNet2Calculator(compiled)
    before = atoms.get_potential_energy()
    for call in (
        lambda: atoms.calc.set_lrcoulomb_method("dsf", cutoff=3.0),
        lambda: atoms.calc.set_dftd3_cutoff(2.0),
    ):
        with pytest.warns(UserWarning, match=r"inside this TorchScript file \(full_embedded\); nothing was changed"):
            call()
        assert atoms.get_potential_energy() == before
    atoms.calc.model.set_coulomb_method("dsf", 3.0)  # what the message offers
    atoms.calc.reset()
    assert atoms.get_potential_energy() != before


def test_models_without_what_is_to_be_switched(fixtures_dir):
    calculator = AIMNet2Calculator(fixtures_dir / "peer_v2_plain.pt")
    with pytest.raises(ValueError, match="no Coulomb energy beyond the network"):
        calculator.set_lrcoulomb_method("dsf")
    with pytest.raises(ValueError, match="no D3 dispersion"):
        calculator.set_dftd3_cutoff(10.0)
    with pytest.raises(ValueError, match="'damped' is not one of simple, dsf, ewald"):
        AIMNet2Calculator(fixtures_dir / "peer_v2_lr.pt").set_lrcoulomb_method("damped")


def test_layout_does_not_matter(published, expected, compiled):
    for path in (published, compiled):
        energies = []
        for threshold in (0, 120):
            atoms = molecule(expected, 9)
            atoms.calc = AIMNet2Calculator(path, nb_threshold=threshold)
            assert atoms.calc.model.module.dense_limit == threshold
            energies.append(atoms.get_potential_energy())
        assert energies[0] == pytest.approx(energies[1], abs=1e-5)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="nb_threshold must be a number of atoms"):
            AIMNet2Calculator(published, nb_threshold=wrong)


def test_checkpoints_are_models_too(published, expected, tmp_path):
    """An artifact as a checkpoint: the same energies, D3 with its usual range."""
    from aimnet2mult.models.base import load_checkpoint

    entries = load_checkpoint(published)
    save_checkpoint(
        tmp_path / "own.pt",
        entries["model"],
        model_config=entries["model_config"],
        num_fidelities=1,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        sae=entries["sae"],
        species=entries["species"],
        dispersion=entries["dispersion"],
    )
    atoms = molecule(expected, 7)
    atoms.calc = AIMNet2Calculator(tmp_path / "own.pt")
    assert_is(atoms, expected, "default", 7)
    atoms.calc.set_lrcoulomb_method("dsf")
    assert_is(atoms, expected, "dsf", 7)


def test_fidelities_of_a_checkpoint_are_chosen(fixtures_dir, tmp_path, sae_file, molecules):
    import yaml

    from aimnet2mult.models.base import load_checkpoint, load_model, load_model_config

    sae = yaml.safe_load(sae_file.read_text())
    config = load_model_config(fixtures_dir / "ref_mixed_model.yaml")
    save_checkpoint(
        tmp_path / "mixed.pt",
        load_checkpoint(fixtures_dir / "ref_mixed.pt")["model"],
        model_config=config,
        num_fidelities=3,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        fidelity_names={0: "ccsd", 1: "dft", 2: "xtb"},
        fidelity_levels={1: "B3LYP"},
        sae=dict.fromkeys(range(3), sae),
        species={f: list(sae) for f in range(3)},
    )
    with pytest.raises(ValueError, match=r"choose one of its fidelities: 0 \(ccsd\), 1 \(dft\), 2 \(xtb\)"):
        AIMNet2Calculator(tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match="there is no fidelity mp2"):
        load_potential(tmp_path / "mixed.pt", fidelity="mp2")
    jpt, _ = compile_model(tmp_path / "mixed.pt", tmp_path / "model", fidelity_level="dft")
    potential = load_potential(tmp_path / "mixed.pt", fidelity="dft")
    data = molecules(torch.float32)
    torch.testing.assert_close(potential(data)["energy"], load_potential(jpt)(data)["energy"], rtol=0, atol=1e-5)
    AIMNet2Calculator(potential)

    model, metadata = load_model(tmp_path / "mixed.pt")
    assert (metadata["num_fidelities"], metadata["fidelity_names"][2]) == (3, "xtb")
    assert model.num_fidelities == 3
    single, about = load_model(tmp_path / "mixed.pt", fidelity=1)
    assert (about["num_fidelities"], about["level_of_theory"], about["sae"]) == (1, "B3LYP", {1: sae})
    network = potential(data)["energy"] - single(data)["energy"]
    assert network.tolist() == pytest.approx([sum(sae[z] for z in row.tolist() if z) for row in data["numbers"]])
    _, about = load_model(jpt)
    assert (about["model_file"], about["coulomb_mode"], about["implemented_species"]) == (
        "compiled model",
        "full_embedded",
        sorted(sae),
    )
    with pytest.raises(ValueError, match="fidelity 7"):
        load_model(tmp_path / "mixed.pt", fidelity=7)


def test_threshold_of_all_fidelities(compiled):
    calculator = MultiFidelityCalculator(compiled.parent, nb_threshold=7)
    assert [model.nb_threshold for model in calculator.models.values()] == [7]


def test_no_warnings_where_nothing_is_wrong(published):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AIMNet2Calculator(published).set_lrcoulomb_method("ewald", ewald_accuracy=1e-6)
