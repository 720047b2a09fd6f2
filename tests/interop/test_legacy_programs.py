"""TorchScript files of the aimnet package that wrote them, in our loader; converted, in ours and the present package.

Numbers are those of that program's own calculator.
"""

import copy

import ase
import numpy as np
import pytest
import torch
import yaml

from aimnet2mult.calculators import AIMNet2Calculator
from aimnet2mult.data.sae import load_sae
from aimnet2mult.models.base import load_checkpoint, load_model, load_model_config
from aimnet2mult.models.loading import deployable_model, load_potential
from aimnet2mult.models.potential import Potential
from aimnet2mult.tools.convert import convert_model

pytestmark = pytest.mark.interop

KINDS = ("coulomb_and_d3", "without_long_range", "two_channels")


@pytest.fixture(scope="module")
def legacy_file(tmp_path_factory, fixtures_dir, sae_file, two_channels, legacy_program):
    """TorchScript files that the command of the old package makes, with the configuration of each."""
    folder = tmp_path_factory.mktemp("legacy")

    def write(kind):
        output, config_file, weights_file = (folder / f"{kind}.{end}" for end in ("jpt", "yaml", "weights"))
        if output.exists():
            return output, config_file
        config, weights = copy.deepcopy(two_channels)
        if kind != "two_channels":
            config = yaml.safe_load((fixtures_dir / "peer_v2_lr_source_model.yaml").read_text())
            weights = load_checkpoint(fixtures_dir / "peer_v2_lr.pt")["model"]
        if kind == "without_long_range":
            del config["kwargs"]["outputs"]["lrcoulomb"], config["kwargs"]["outputs"]["dftd3"]
        config_file.write_text(yaml.safe_dump(config, sort_keys=False))
        torch.save(weights, weights_file)
        options = ["--no-lr"] if kind == "without_long_range" else []
        command = "aimnet.train.pt2jpt:jitcompile"
        legacy_program.call(command, weights_file, output, "--model", config_file, "--sae", sae_file, *options)
        return output, config_file

    return write


@pytest.fixture(scope="module")
def expected(legacy_file, legacy_program, systems, cluster):
    """What the old calculator gives: the molecules, and the large one."""
    results = {}

    def evaluate(kind):
        if kind not in results:
            # Without long-range terms it looks for a range that the file does not have.
            attributes = {"lr": True, "cutoff_lr": 5.0} if kind == "without_long_range" else {}
            file, _ = legacy_file(kind)
            results[kind] = legacy_program.evaluate(file, [*systems, cluster], attributes=attributes)
        return results[kind]

    return evaluate


@pytest.mark.parametrize("kind", KINDS)
def test_legacy_file(kind, legacy_file, expected, systems, cluster, evaluated, agree, sae_file):
    file, _ = legacy_file(kind)
    agree(evaluated(load_potential(file), [*systems, cluster]), expected(kind))
    _, metadata = load_model(file)
    long_range = kind != "without_long_range"
    assert metadata["format_version"] == 1
    assert metadata["model_file"] == "legacy TorchScript"
    assert metadata["implemented_species"] == sorted(load_sae(sae_file))
    assert metadata["cutoff"] == pytest.approx(5.0)
    assert metadata["coulomb_mode"] == ("full_embedded" if long_range else "none")
    assert metadata["num_charge_channels"] == (2 if kind == "two_channels" else 1)
    assert (metadata["d3_params"] is not None) == (kind == "coulomb_and_d3")


@pytest.mark.parametrize("kind", ["coulomb_and_d3", "two_channels"])
def test_ase(kind, legacy_file, expected, systems, agree):
    file, _ = legacy_file(kind)
    calculator = AIMNet2Calculator(file, device="cpu")
    results = []
    for system in systems[:5]:
        atoms = ase.Atoms(system["numbers"], system["coord"])
        atoms.info |= {"charge": int(system["charge"]), "spin": int(system["mult"])}
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        results.append({"energy": energy, "forces": forces, "charges": atoms.get_charges()})
    agree(results, expected(kind)[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_converted(kind, legacy_file, expected, published, systems, cluster, evaluated, agree, tmp_path):
    """All of it by our converter, our loader, and the calculator of the present package."""
    file, config = legacy_file(kind)
    convert_model(file, config, tmp_path / "model.pt")
    potential = load_potential(tmp_path / "model.pt")
    if kind == "coulomb_and_d3":
        # The old program has no range of D3 pairs.
        potential.set_dispersion_cutoff(50.0, 0.1)
    agree(evaluated(potential, [*systems, cluster]), expected(kind))
    range_of_d3 = {"cutoff": 50.0, "smoothing_fraction": 0.1} if kind == "coulomb_and_d3" else None
    found = published.evaluate(tmp_path / "model.pt", [*systems, cluster], dftd3=range_of_d3)
    agree(found, expected(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_legacy_file(kind, legacy_file, expected, systems, evaluated, agree):
    """Weights, self-atomic energies and D3 parameters apart, as a training starts from them: the same model."""
    file, config = legacy_file(kind)
    checkpoint = {**load_checkpoint(file), "model_config": load_model_config(config)}
    checkpoint["model_config"]["kwargs"]["outputs"].pop("dftd3", None)
    module = deployable_model(checkpoint, 0, file)
    agree(evaluated(Potential(module.eval().requires_grad_(False), {}), systems), expected(kind)[: len(systems)])
    assert np.isclose(checkpoint["sae"][0][8], -2041.789, atol=5.0)
