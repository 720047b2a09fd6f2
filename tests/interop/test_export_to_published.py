"""Our exports in the calculator of the aimnet package: the same energies, forces, charges and stress."""

import dataclasses

import pytest
from click.testing import CliRunner

from aimnet2mult.data.sae import load_sae
from aimnet2mult.dispersion_params import d3bj_parameters
from aimnet2mult.models.base import load_checkpoint, load_model_config
from aimnet2mult.models.loading import deployable_model, load_potential
from aimnet2mult.models.potential import D3_CUTOFF, D3_SMOOTHING, Potential
from aimnet2mult.tools.export import main

pytestmark = pytest.mark.interop

MODELS = {"single": ("ref_single", 0), **{f"fid{f}": ("ref_mixed", f) for f in range(3)}}
"""Fixture and fidelity."""

CHECKED = ("energy", "forces", "charges", "spin_charges")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, fixtures_dir, sae_file):
    """Files of `MODELS`, with and without D3(wB97M), written by the command line."""
    folder = tmp_path_factory.mktemp("exported")

    def export(name, d3):
        fixture, fidelity = MODELS[name]
        output = folder / f"{name}_{d3}.pt"
        if not output.exists():
            arguments = [fixtures_dir / f"{fixture}.pt", output, "--model", fixtures_dir / f"{fixture}_model.yaml"]
            arguments += ["--sae", sae_file, "--fidelity-level", fidelity]
            arguments += ["--needs-dispersion", "--dispersion-functional", "wb97m"] if d3 else []
            result = CliRunner().invoke(main, [str(a) for a in arguments])
            assert result.exit_code == 0, result.output
        return output

    return export


@pytest.fixture(scope="module")
def original(fixtures_dir, sae_file):
    """The models that are exported, put together from the checkpoint: no artifact is involved."""

    def build(name, d3):
        fixture, fidelity = MODELS[name]
        checkpoint = load_checkpoint(fixtures_dir / f"{fixture}.pt")
        labels = {"method": "d3bj", "functional": "wb97m", "parameters": dataclasses.asdict(d3bj_parameters("wb97m"))}
        checkpoint |= {
            "model_config": load_model_config(fixtures_dir / f"{fixture}_model.yaml"),
            "fidelity_offset": 200,
            "sae": {fidelity: load_sae(sae_file)},
            "dispersion": {fidelity: {"labels": labels, "subtracted": True}} if d3 else {},
        }
        module = deployable_model(checkpoint, fidelity, fixture, d3_range=(D3_CUTOFF, D3_SMOOTHING))
        return Potential(module.eval().requires_grad_(False), {})

    return build


@pytest.mark.parametrize("name", MODELS)
def test_energies_are_those_of_the_fixture(name, published, exported, systems, reference, sae_file):
    """Numbers of an independent program, made in double precision from the same weights."""
    fixture, fidelity = MODELS[name]
    values, tag = reference(fixture), "f64" if name == "single" else f"fid{fidelity}_f64"
    found = published.evaluate(exported(name, d3=False), systems)
    sae = load_sae(sae_file)
    for i, (system, result) in enumerate(zip(systems, found, strict=True)):
        n = len(system["numbers"])
        shift = sum(sae[int(z)] for z in system["numbers"])
        assert abs(result["energy"][0] - shift - values[f"energy_{tag}"][i]) < 1e-5
        assert abs(result["forces"] - values[f"forces_{tag}"][i, :n]).max() < 1e-4
        assert abs(result["charges"] - values[f"charges_{tag}"][i, :n]).max() < 1e-5


@pytest.mark.parametrize(
    "coulomb",
    [None, {"method": "dsf"}, {"method": "dsf", "cutoff": 7.0, "dsf_alpha": 0.25}],
    ids=["simple", "dsf", "dsf7"],
)
@pytest.mark.parametrize("d3", [False, True], ids=["", "d3"])
@pytest.mark.parametrize("name", MODELS)
def test_molecules(name, d3, coulomb, published, exported, original, systems, evaluated, agree):
    file = exported(name, d3)
    found = published.evaluate(file, systems, coulomb)
    for potential in (original(name, d3), load_potential(file)):
        if coulomb:
            potential.set_coulomb_method(**coulomb)
        agree(found, evaluated(potential, systems), CHECKED)


@pytest.mark.parametrize("method", ["dsf", "ewald"])
@pytest.mark.parametrize("d3", [False, True], ids=["", "d3"])
@pytest.mark.parametrize("name", ["single", "fid2"])
def test_crystals_with_stress(name, d3, method, published, exported, original, crystals, evaluated, agree):
    file = exported(name, d3)
    accuracy = {"ewald_accuracy": 1e-8} if method == "ewald" else {}
    found = published.evaluate(file, crystals, {"method": method, **accuracy}, stress=True)
    assert min(abs(result["stress"]).max() for result in found) > 1e-4
    for potential in (original(name, d3), load_potential(file)):
        potential.set_coulomb_method(method)
        agree(found, evaluated(potential, crystals, stress=True), (*CHECKED, "stress"))


def test_large_molecule_and_range_of_d3(published, exported, original, cluster, evaluated, agree):
    file = exported("fid1", True)
    found = published.evaluate(file, [cluster])
    short = published.evaluate(file, [cluster], dftd3={"cutoff": 7.0, "smoothing_fraction": 0.4})
    assert abs(found[0]["energy"] - short[0]["energy"]) > 1e-2
    for potential in (original("fid1", True), load_potential(file)):
        agree(found, evaluated(potential, [cluster]), CHECKED)
        potential.set_dispersion_cutoff(7.0, 0.4)
        agree(short, evaluated(potential, [cluster]), CHECKED)


def test_element_that_the_fidelity_does_not_know(published, exported, systems):
    bromine = {**systems[0], "numbers": systems[0]["numbers"].copy()}
    bromine["numbers"][0] = 35
    with pytest.raises(RuntimeError, match="ValueError"):
        published.evaluate(exported("fid1", True), [bromine])
