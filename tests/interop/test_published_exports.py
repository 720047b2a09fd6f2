"""Files that ``aimnet export`` writes, in our loader and calculator: the numbers of the calculator of that package."""

import copy

import ase
import numpy as np
import pytest
import torch
import yaml

from aimnet2mult.calculators import AIMNet2Calculator
from aimnet2mult.models.base import build_model, load_checkpoint, load_model_config
from aimnet2mult.models.loading import load_potential

pytestmark = pytest.mark.interop

MULTIPOLES = {"dipole": 1e-4, "quadrupole": 1e-3}
"""Largest differences in e·Å and e·Å², of systems of 12 Å."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, fixtures_dir, sae_file, two_channels, published):
    """Files that the command of the package makes of the weights of fixtures and a configuration."""
    folder = tmp_path_factory.mktemp("published")

    def multipoles(config):
        for name, cls in (("dipole", "Dipole"), ("quadrupole", "Quadrupole")):
            config["kwargs"]["outputs"][name] = {"class": f"aimnet.modules.{cls}", "kwargs": {"center_coord": True}}

    def learned_dispersion(config):
        outputs = config["kwargs"]["outputs"]
        del outputs["dftd3"]
        mlp = {"activation_fn": "torch.nn.GELU", "last_linear": True, "hidden": [16]}
        kwargs = {"n_in": 32, "n_out": 2, "key_in": "aim", "key_out": "disp_param", "mlp": mlp}
        outputs["disp_mlp"] = {"class": "aimnet.modules.Output", "kwargs": kwargs}
        table = torch.rand(87, 2, generator=torch.Generator().manual_seed(3)) * 20.0 + 5.0
        torch.save(table, folder / "table.pt")
        kwargs = {"ptfile": str(folder / "table.pt")}
        outputs["disp_param"] = {"class": "aimnet.modules.lr.DispParam", "kwargs": kwargs}
        kwargs = {"a1": 0.49, "a2": 4.8, "s8": 0.8, "key_in": "disp_param"}
        outputs["d3ts"] = {"class": "aimnet.modules.D3TS", "kwargs": kwargs}

    def change(kind, config):
        outputs = config["kwargs"]["outputs"]
        if kind == "without_long_range":
            del outputs["lrcoulomb"], outputs["dftd3"]
        elif kind == "cosine":
            outputs["lrcoulomb"]["kwargs"] |= {"envelope": "cosine", "rc": 4.0}
        elif kind == "multipoles":
            multipoles(config)
        elif kind == "d3ts":
            learned_dispersion(config)

    def write(kind):
        output = folder / f"{kind}.pt"
        if output.exists():
            return output
        if kind == "two_channels":
            config, weights = two_channels
        else:
            config = yaml.safe_load((fixtures_dir / "peer_v2_lr_source_model.yaml").read_text())
            weights = load_checkpoint(fixtures_dir / "peer_v2_lr.pt")["model"]
            # They stand for those of a training, which have no NaN; an artifact has it for elements that it lacks.
            weights["afv.weight"] = weights["afv.weight"].nan_to_num()
        config, weights = copy.deepcopy(config), dict(weights)
        change(kind, config)
        files = {name: folder / f"{kind}.{name}" for name in ("yaml", "weights")}
        files["yaml"].write_text(yaml.safe_dump(config, sort_keys=False))
        torch.save(weights, files["weights"])
        if kind == "d3ts":
            # New weights for the new readout.
            torch.manual_seed(4)
            own = load_model_config(files["yaml"])
            own["kwargs"]["num_types"] = len(weights["afv.weight"])
            extra = build_model(own).state_dict()
            weights |= {key: value for key, value in extra.items() if key.startswith("outputs.disp_mlp.")}
            torch.save(weights, files["weights"])
        arguments = ["export", files["weights"], output, "--model", files["yaml"], "--sae", sae_file]
        published.call("aimnet.cli:cli", *arguments)
        return output

    return write


@pytest.mark.parametrize(
    ("kind", "coulomb"),
    [
        ("default", None),
        ("default", {"method": "dsf"}),
        ("default", {"method": "dsf", "cutoff": 7.0, "dsf_alpha": 0.25}),
        ("without_long_range", None),
        ("two_channels", None),
        ("two_channels", {"method": "dsf"}),
        ("cosine", None),
        ("cosine", {"method": "dsf"}),
        ("multipoles", None),
        ("d3ts", None),
    ],
)
def test_molecules(kind, coulomb, published, artifact, systems, evaluated, agree):
    file = artifact(kind)
    also = tuple(MULTIPOLES) if kind == "multipoles" else ()
    found = published.evaluate(file, systems, coulomb, also=also)
    potential = load_potential(file)
    if coulomb:
        potential.set_lrcoulomb_method(**coulomb)
    results = evaluated(potential, systems)
    agree(results, found)
    agree(results, found, also, MULTIPOLES)
    if kind == "two_channels":
        agree(results, found, ["spin_charges"])
        triplet = next(i for i, system in enumerate(systems) if system["mult"] == 3.0)
        assert np.isclose(results[triplet]["spin_charges"].sum(), 2.0, atol=1e-4)


@pytest.mark.parametrize("method", ["dsf", "ewald"])
@pytest.mark.parametrize("kind", ["default", "two_channels", "cosine"])
def test_crystals_with_stress(kind, method, published, artifact, crystals, evaluated, agree):
    accuracy = {"ewald_accuracy": 1e-8} if method == "ewald" else {}
    found = published.evaluate(artifact(kind), crystals, {"method": method, **accuracy}, stress=True)
    potential = load_potential(artifact(kind))
    potential.set_lrcoulomb_method(method)
    agree(evaluated(potential, crystals, stress=True), found, ("energy", "forces", "charges", "stress"))


def test_large_molecule(published, artifact, cluster, evaluated, agree):
    for kind in ("default", "d3ts"):
        agree(evaluated(load_potential(artifact(kind)), [cluster]), published.evaluate(artifact(kind), [cluster]))


@pytest.mark.parametrize("method", ["simple", "dsf", "ewald"])
def test_ase(method, published, artifact, systems, crystals, agree):
    """Through ASE: a molecule of each multiplicity, or crystals."""
    accuracy = {"ewald_accuracy": 1e-8} if method == "ewald" else {}
    chosen = systems[:5] if method == "simple" else crystals
    found = published.evaluate(
        artifact("two_channels"), chosen, {"method": method, **accuracy}, stress=method != "simple"
    )
    calculator = AIMNet2Calculator(artifact("two_channels"), device="cpu")
    calculator.set_lrcoulomb_method(method)
    for system, expected in zip(chosen, found, strict=True):
        atoms = ase.Atoms(system["numbers"], system["coord"], cell=system.get("cell"), pbc="cell" in system)
        atoms.info |= {"charge": int(system["charge"]), "spin": int(system["mult"])}
        atoms.calc = calculator
        result = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "charges": atoms.get_charges(),
            "spin_charges": calculator.get_spin_charges(atoms),
        }
        if "cell" in system:
            result["stress"] = atoms.get_stress(voigt=False)
        agree([result], [expected], list(result))
