"""Legacy TorchScript models: loaded, evaluated, converted, taken apart.

The file is made here: a network of ours with the interface and the weights' names of such files. It has the weights of
the fixture ``ref_single``, so that its numbers are known. Files of the program itself: ``tests/interop``.
"""

import pickle
import warnings

import numpy as np
import pytest
import torch

from aimnet2mult.calculators import AIMNet2Calculator
from aimnet2mult.data.sae import load_sae
from aimnet2mult.models.base import CheckpointError, load_checkpoint, load_model, load_model_config
from aimnet2mult.models.loading import deployable_model, load_potential
from aimnet2mult.models.potential import Potential
from aimnet2mult.tools.convert import convert_model

SPECIES = [1, 6, 7, 8, 9, 17]


def script(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(model.eval()).save(str(path))
    return path


@pytest.fixture(scope="module")
def config_file(fixtures_dir):
    return fixtures_dir / "ref_single_model.yaml"


@pytest.fixture(scope="module")
def legacy_file(tmp_path_factory, reference_model, sae_file):
    """Has ``cutoff`` and ``cutoff_lr``, self-atomic energies in the shifts (float64), NaN for unknown elements."""
    model = reference_model("ref_single", torch.float32).requires_grad_(False)
    shifts = model.outputs["atomic_shift"].double().shifts.weight
    for z, energy in load_sae(sae_file).items():
        shifts[z] += energy
    unknown = [z for z in range(1, len(shifts)) if z not in SPECIES]
    model.afv.weight[unknown] = torch.nan
    return script(model, tmp_path_factory.mktemp("legacy") / "model.jpt")


@pytest.fixture(scope="module")
def potential(legacy_file):
    return load_potential(legacy_file)


@pytest.fixture
def expected(reference, sae_file):
    """Energies, forces, charges and spin charges, made by an independent program in float64."""
    values, sae = reference("ref_single"), load_sae(sae_file)
    shift = [sum(sae[int(z)] for z in row if z > 0) for row in values["numbers"]]
    return {
        "energy": torch.from_numpy(values["energy_f64"] + shift),
        **{key: torch.from_numpy(values[f"{key}_f64"]) for key in ("forces", "charges", "spin_charges")},
    }


def assert_agrees(found, expected, energy=1e-5, other=1e-5):
    for key, value in expected.items():
        tolerance = energy if key == "energy" else other
        torch.testing.assert_close(
            found[key].double(), value.double(), atol=tolerance, rtol=0, msg=lambda t, k=key: k + t
        )


def test_metadata(legacy_file):
    module, metadata = load_model(legacy_file)
    assert isinstance(module, torch.jit.ScriptModule)
    assert metadata["format_version"] == 1
    assert metadata["model_file"] == "legacy TorchScript"
    assert metadata["coulomb_mode"] == "full_embedded"
    assert metadata["cutoff"] == pytest.approx(5.0)
    # From the rows of the embedding without NaN.
    assert metadata["implemented_species"] == SPECIES
    assert metadata["num_charge_channels"] == 2
    assert metadata["has_embedded_lr"]
    assert not any(metadata[key] for key in ("needs_coulomb", "needs_dispersion", "has_embedded_d3ts"))
    assert metadata["coulomb_sr_rc"] is None
    assert metadata["d3_params"] is None
    assert metadata["sae"] == {}


@pytest.mark.parametrize("nb_threshold", [0, 120])
def test_numbers(nb_threshold, legacy_file, molecules, expected, to_flat):
    """All at once, in flat layout, and each molecule alone."""
    potential = load_potential(legacy_file, nb_threshold=nb_threshold)
    data = molecules()
    assert_agrees(potential(data), expected)
    real = data["numbers"] > 0
    flat = {key: value if key == "energy" else value[real] for key, value in expected.items()}
    assert_agrees(potential(to_flat(data)), flat)
    for i, n in enumerate(real.sum(dim=1).tolist()):
        alone = {key: value[i : i + 1, :n] if value.dim() > 1 else value[i : i + 1] for key, value in data.items()}
        wanted = {k: v[i : i + 1, :n] if v.dim() > 1 else v[i : i + 1] for k, v in expected.items()}
        assert_agrees(potential(alone), wanted)


def test_forces_are_the_derivative_of_the_energy(potential, molecules):
    data = {key: value[8:9] for key, value in molecules().items()}
    forces, step = potential(data)["forces"][0], 5e-3
    for i in range(2):
        for k in range(3):
            energies = []
            for sign in (1.0, -1.0):
                coord = data["coord"].clone()
                coord[0, i, k] += sign * step
                energies.append(potential({**data, "coord": coord})["energy"][0])
            assert forces[i, k].item() == pytest.approx(-(energies[0] - energies[1]).item() / (2 * step), abs=1e-3)


def test_long_range_methods_are_fixed(legacy_file, molecules):
    potential, data = load_potential(legacy_file), molecules()
    before = potential(data)
    with pytest.warns(UserWarning, match="Coulomb energy is inside.*nothing was changed.*convert it"):
        potential.set_lrcoulomb_method("dsf", cutoff=4.0)
    with pytest.warns(UserWarning, match="dispersion energy is inside.*nothing was changed"):
        potential.set_dftd3_cutoff(5.0)
    torch.testing.assert_close(potential(data), before, atol=0, rtol=0)


def test_cell_is_refused(potential, molecules):
    data = {key: value[:1] for key, value in molecules().items()}
    with pytest.raises(ValueError, match=r"cannot be used with a cell.*convert.*tools\.convert"):
        potential({**data, "cell": 20.0 * torch.eye(3, dtype=torch.float64)[None]})


def test_unknown_element_is_refused(potential, molecules):
    data = {key: value[:1].clone() for key, value in molecules().items()}
    data["numbers"][0, 0] = 16
    with pytest.raises(ValueError, match=r"S \(16\) is not among the elements"):
        potential(data)


def test_hessian(legacy_file, reference_model, molecules, fixtures_dir, config_file, sae_file):
    potential = load_potential(legacy_file)
    data = {key: value[:1, :3] if value.dim() > 1 else value[:1] for key, value in molecules().items()}
    found = potential.hessian(data)
    checkpoint = load_checkpoint(fixtures_dir / "ref_single.pt")
    checkpoint |= {"model_config": load_model_config(config_file), "sae": {0: load_sae(sae_file)}}
    module = deployable_model(checkpoint, 0, "checkpoint").double().eval().requires_grad_(False)
    expected = Potential(module, {}).hessian(data)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    differences = potential.hessian(data, "finite_difference", step=1e-3)
    torch.testing.assert_close(differences.double(), expected, atol=2e-3, rtol=0)


def test_pickled(potential, molecules):
    copied = pickle.loads(pickle.dumps(potential))
    assert copied.description == potential.description
    assert copied.nb_threshold == potential.nb_threshold
    torch.testing.assert_close(copied(molecules()), potential(molecules()), atol=0, rtol=0)


def test_calculator(legacy_file, expected, molecules):
    ase = pytest.importorskip("ase")
    calculator = AIMNet2Calculator(legacy_file, device="cpu")
    data = molecules()
    for i in (0, 3, 4):
        real = data["numbers"][i] > 0
        atoms = ase.Atoms(data["numbers"][i, real].numpy(), data["coord"][i, real].numpy())
        atoms.info |= {"charge": int(data["charge"][i]), "spin": int(data["mult"][i])}
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(expected["energy"][i].item(), abs=1e-5)
        np.testing.assert_allclose(atoms.get_forces(), expected["forces"][i, real], atol=1e-5)
        np.testing.assert_allclose(calculator.get_spin_charges(atoms), expected["spin_charges"][i, real], atol=1e-5)


def test_converted(legacy_file, config_file, expected, molecules, tmp_path):
    artifact = convert_model(legacy_file, config_file, tmp_path / "model.pt")
    assert artifact.metadata["implemented_species"] == SPECIES
    assert artifact.metadata["coulomb_mode"] == "sr_embedded"
    potential = load_potential(tmp_path / "model.pt")
    assert_agrees(potential(molecules()), expected)
    # What is fixed in the program can be chosen now.
    before = potential(molecules())["energy"]
    potential.set_lrcoulomb_method("dsf", cutoff=5.0)
    assert (potential(molecules())["energy"] - before).abs().max() > 1e-3


def test_weights_and_self_atomic_energies_apart(
    legacy_file, config_file, expected, molecules, sae_file, reference_model
):
    checkpoint = load_checkpoint(legacy_file)
    assert checkpoint["species"] == {0: SPECIES}
    learned = reference_model("ref_single").outputs["atomic_shift"].shifts.weight[:, 0]
    for z, energy in load_sae(sae_file).items():
        assert checkpoint["sae"][0][z] == pytest.approx(energy + learned[z].item(), abs=1e-6)
    assert checkpoint["model"]["outputs.atomic_shift.shifts.weight"].abs().max() == 0.0
    checkpoint["model_config"] = load_model_config(config_file)
    module = deployable_model(checkpoint, 0, legacy_file).eval().requires_grad_(False)
    assert_agrees(Potential(module, {})(molecules()), expected)


def test_torchscript_of_another_program(tmp_path):
    path = script(torch.nn.Linear(2, 2), tmp_path / "other.jpt")
    for load in (load_model, load_potential, load_checkpoint):
        with pytest.raises(CheckpointError, match=r"other\.jpt: TorchScript, but not an AIMNet2 model"):
            load(path)


def test_compiled_model_is_no_legacy_model(compiled, config_file, tmp_path):
    with pytest.raises(CheckpointError, match="a compiled TorchScript model, not a checkpoint"):
        load_checkpoint(compiled)
    with pytest.raises(ValueError, match=r"a compiled model of this package; export"):
        convert_model(compiled, config_file, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_configuration_of_another_model(legacy_file, fixtures_dir, tmp_path):
    with pytest.raises(ValueError, match=r"has a D3 energy.*has none"):
        convert_model(legacy_file, fixtures_dir / "peer_v2_lr_source_model.yaml", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_compiled_model_without_metadata_is_still_one_of_ours(compiled, tmp_path):
    """As benchmarks write them, or whoever takes the extra files out of the archive."""
    from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored
    from aimnet2mult.models.jit_wrapper import load_jit_model

    with torchscript_deprecation_ignored():
        torch.jit.load(compiled).save(str(tmp_path / "bare.jpt"))
    data = {"coord": torch.tensor([[[0.0, 0, 0], [0, 0, 1.1]]]), "numbers": torch.tensor([[6, 8]])}
    energy = load_jit_model(compiled)(data)["energy"]
    assert torch.equal(load_jit_model(tmp_path / "bare.jpt")(data)["energy"], energy)
    assert torch.equal(load_potential(tmp_path / "bare.jpt")(data)["energy"], energy)
    assert load_model(tmp_path / "bare.jpt")[1]["model_file"] == "compiled model"
    with pytest.raises(ValueError, match="a compiled TorchScript model, not a checkpoint"):
        load_checkpoint(tmp_path / "bare.jpt")
