"""Format-2 artifacts: the numbers stored beside the fixtures, what their metadata say, and the way there and back."""

import io
import logging
import re
import sys
import types
from typing import get_type_hints

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.models.artifact import ModelMetadata, parse_artifact, write_artifact
from aimnet2mult.models.base import load_checkpoint, load_model, single_fidelity_model
from aimnet2mult.models.interchange import artifact_of_network
from aimnet2mult.models.loading import load_potential
from aimnet2mult.models.safe_file import CheckpointError, load_tensors
from aimnet2mult.utils.units import COULOMB_EV_ANGSTROM

E_TOL, F_TOL, Q_TOL = 1e-5, 1e-4, 1e-5
"""Agreement with the published program in single precision: eV, eV/Å, e."""

FIXTURES = ("peer_v2_plain", "peer_v2_lr")
SPECIES = [1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 33, 34, 35, 53]


@pytest.fixture(params=FIXTURES)
def name(request):
    return request.param


@pytest.fixture
def content(fixtures_dir):
    """Content of the artifact with Coulomb and D3 energies, to be changed."""
    content = torch.load(fixtures_dir / "peer_v2_lr.pt", weights_only=True)
    content["state_dict"] = dict(content["state_dict"])
    return content


@pytest.fixture
def saved(tmp_path):
    def save(content, name="model.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def batch(values, dtype=torch.float32):
    return {
        key: torch.from_numpy(values[key].copy()).to(torch.int64 if key == "numbers" else dtype)
        for key in ("coord", "numbers", "charge", "mult")
    }


def crystal(values, dtype=torch.float32):
    data = {key: torch.from_numpy(values[f"water2_triclinic_{key}"].copy()) for key in ("numbers", "coord", "cell")}
    return {
        "numbers": data["numbers"],
        "coord": data["coord"].to(dtype),
        "cell": data["cell"].to(dtype),
        "charge": torch.zeros(1, dtype=dtype),
        "mult": torch.ones(1, dtype=dtype),
    }


def agrees(out, values, tag):
    """Compare with the published program."""
    for key, tolerance in (("energy", E_TOL), ("forces", F_TOL), ("charges", Q_TOL)):
        stored = torch.from_numpy(values[f"{key}_{tag}"]).double()
        torch.testing.assert_close(out[key].detach().double(), stored, atol=tolerance, rtol=0)


# --- the numbers stored beside the files ---


def test_potential_gives_the_stored_numbers(fixtures_dir, reference, name):
    values = reference(name)
    agrees(load_potential(fixtures_dir / f"{name}.pt")(batch(values)), values, "default")


def test_potential_with_damped_shifted_force(fixtures_dir, reference):
    values = reference("peer_v2_lr")
    potential = load_potential(fixtures_dir / "peer_v2_lr.pt")
    potential.set_lrcoulomb_method("dsf", cutoff=15.0, dsf_alpha=0.2)
    agrees(potential(batch(values)), values, "dsf")
    potential.set_lrcoulomb_method("simple")
    agrees(potential(batch(values)), values, "default")


def test_potential_without_dispersion(fixtures_dir, reference, content, saved):
    values = reference("peer_v2_lr")
    potential = load_potential(saved({**content, "needs_dispersion": False}))
    agrees(potential(batch(values)), values, "no_external_dispersion")


def test_network_alone_holds_minus_the_short_range(fixtures_dir, reference):
    """`load_model` gives E(network) - E(short range): the stored energies without Coulomb have only D3 besides."""
    values = reference("peer_v2_lr")
    model, metadata = load_model(fixtures_dir / "peer_v2_lr.pt")
    assert metadata["coulomb_mode"] == "sr_embedded"
    data = batch(values)
    out = model(data)
    d3 = torch.from_numpy(values["energy_default"] - values["energy_no_external_dispersion"])
    expected = torch.from_numpy(values["energy_no_external_coulomb"]) - d3
    torch.testing.assert_close(out["energy"], expected, atol=E_TOL, rtol=0)
    torch.testing.assert_close(
        out["charges"].double(), torch.from_numpy(values["charges_default"]).double(), atol=Q_TOL, rtol=0
    )
    # The rest is the Coulomb energy of all pairs.
    q, real = out["charges"].double(), data["numbers"] > 0
    d_ij = torch.cdist(data["coord"].double(), data["coord"].double())
    pairs = real.unsqueeze(1) & real.unsqueeze(2) & ~torch.eye(real.shape[1], dtype=torch.bool)
    inverse = torch.where(pairs, 1.0 / torch.where(pairs, d_ij, 1.0), 0.0)
    full = 0.5 * COULOMB_EV_ANGSTROM * torch.einsum("bi,bij,bj->b", q, inverse, q)
    torch.testing.assert_close(
        out["energy"] + full + d3, torch.from_numpy(values["energy_default"]), atol=E_TOL, rtol=0
    )


def test_network_without_long_range_is_complete(fixtures_dir, reference):
    values = reference("peer_v2_plain")
    model, metadata = load_model(fixtures_dir / "peer_v2_plain.pt")
    assert not metadata["needs_coulomb"]
    assert not metadata["needs_dispersion"]
    energy = model(batch(values))["energy"]
    torch.testing.assert_close(energy, torch.from_numpy(values["energy_default"]), atol=E_TOL, rtol=0)


@pytest.mark.parametrize(
    ("fixture", "tag", "method"),
    [
        ("peer_v2_plain", "none", None),
        ("peer_v2_lr", "dsf", {"method": "dsf", "cutoff": 15.0, "dsf_alpha": 0.2}),
        ("peer_v2_lr", "dsf_nodisp", {"method": "dsf", "cutoff": 15.0, "dsf_alpha": 0.2}),
        ("peer_v2_lr", "ewald", {"method": "ewald"}),
        ("peer_v2_lr", "ewald_nodisp", {"method": "ewald"}),
    ],
)
def test_crystal_gives_the_stored_numbers(reference, fixtures_dir, saved, fixture, tag, method):
    values = reference(fixture)
    content = torch.load(fixtures_dir / f"{fixture}.pt", weights_only=True)
    potential = load_potential(saved({**content, "needs_dispersion": tag in ("dsf", "ewald")}))
    potential.module.compute_stress = True
    if method is not None:
        potential.set_lrcoulomb_method(**method)
    out = potential(crystal(values))
    for key, tolerance in (("energy", E_TOL), ("forces", F_TOL), ("charges", Q_TOL), ("stress", 1e-7)):
        stored = torch.from_numpy(values[f"water2_triclinic_{tag}_{key}"]).double()
        torch.testing.assert_close(out[key].detach().double().reshape(stored.shape), stored, atol=tolerance, rtol=0)


def test_second_derivatives(fixtures_dir, reference, name):
    values = reference(name)
    data = {key: value[:1] for key, value in batch(values).items()}
    potential = load_potential(fixtures_dir / f"{name}.pt")
    stored = torch.from_numpy(values["hessian_molecule0"])
    size = stored.abs().max().item()
    hessian = potential.hessian({**data, "coord": data["coord"][:, :3], "numbers": data["numbers"][:, :3]})[0]
    torch.testing.assert_close(hessian.float(), stored, atol=1e-5 * size + 1e-3, rtol=0)


# --- metadata and weights ---


def test_metadata_have_the_documented_entries(fixtures_dir, name):
    model, metadata = load_model(fixtures_dir / f"{name}.pt")
    assert set(metadata) == set(get_type_hints(ModelMetadata))
    documented = set(re.findall(r"\w+", ModelMetadata.__doc__))
    assert set(metadata) <= documented
    long_range = name == "peer_v2_lr"
    d3 = {"s6": 1.0, "s8": 0.3908, "a1": 0.566, "a2": 3.128}
    assert metadata == {
        "format_version": 2,
        "cutoff": 5.0,
        "needs_coulomb": long_range,
        "needs_dispersion": long_range,
        "coulomb_mode": "sr_embedded" if long_range else "none",
        "coulomb_sr_rc": 4.6 if long_range else None,
        "coulomb_sr_envelope": "exp" if long_range else None,
        "d3_params": d3 if long_range else None,
        "implemented_species": SPECIES,
        "has_embedded_lr": long_range,
        "has_embedded_d3ts": False,
        "family": None,
        "supports_charged_systems": None,
        "model_file": "format-2 artifact",
        "num_charge_channels": 1,
        "num_fidelities": 1,
        "fidelity_offset": 0,
        "fidelity_names": {},
        "species": {0: SPECIES},
        "sae": {},
        "dispersion": {0: d3} if long_range else {},
        "baked_sae": None,
        "level_of_theory": None,
    }
    assert type(metadata["cutoff"]) is float
    assert model.cutoff == 5.0


def test_atomic_shifts_keep_their_precision(fixtures_dir, content):
    model, _ = load_model(fixtures_dir / "peer_v2_lr.pt")
    shifts = model.outputs["atomic_shift"].shifts.weight
    assert shifts.dtype == torch.float64
    assert torch.equal(shifts[SPECIES], content["state_dict"]["outputs.atomic_shift.shifts.weight"][SPECIES])
    assert not torch.equal(shifts[SPECIES], shifts[SPECIES].float().double())
    assert model.afv.weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_shifts_of_single_precision_become_double(content, saved):
    key = "outputs.atomic_shift.shifts.weight"
    content["state_dict"][key] = content["state_dict"][key].float()
    model, _ = load_model(saved(content))
    assert model.outputs["atomic_shift"].shifts.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(content, saved, reference, dtype):
    shifts = "outputs.atomic_shift.shifts.weight"
    content["state_dict"] = {
        key: value if key == shifts else value.to(dtype) for key, value in content["state_dict"].items()
    }
    values = reference("peer_v2_lr")
    path = saved(content)
    model, _ = load_model(path)
    assert {value.dtype for key, value in model.state_dict().items() if key != shifts} == {torch.float32}
    assert model.outputs["srcoulomb"].rc == torch.tensor(4.6)
    charges = load_potential(path)(batch(values))["charges"]
    torch.testing.assert_close(charges, torch.from_numpy(values["charges_default"]), atol=0.05, rtol=0)


# --- there and back ---


def same(a, b):
    """Whether two tensors have the same type and the same bits, NaN among them."""
    bits = torch.int64 if a.dtype == torch.float64 else torch.int32
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def test_written_artifact_is_the_artifact(fixtures_dir, tmp_path, name):
    content = load_tensors(fixtures_dir / f"{name}.pt")
    artifact = parse_artifact(content, "it")
    write_artifact(artifact, tmp_path / "again.pt")
    again = load_tensors(tmp_path / "again.pt")
    assert list(again["state_dict"]) == list(content["state_dict"])
    assert all(same(again["state_dict"][key], value) for key, value in content["state_dict"].items())
    for key in set(content) - {"state_dict", "model_yaml"}:
        assert again[key] == content[key], key
    assert parse_artifact(again, "it").config == artifact.config
    assert "aimnet.modules.Output" in again["model_yaml"]
    assert "aimnet2mult" not in again["model_yaml"]


def test_export_load_export_keeps_every_number(fixtures_dir, tmp_path, name):
    """An artifact as a checkpoint, and that as an artifact, twice: the second time, not a bit changes."""
    path, contents = fixtures_dir / f"{name}.pt", []
    for n in range(3):
        checkpoint = load_checkpoint(path)
        artifact = artifact_of_network(
            checkpoint["model_config"],
            checkpoint["model"],
            checkpoint["species"][0],
            checkpoint["sae"][0],
            d3_params=checkpoint["dispersion"][0]["labels"]["parameters"] if "dispersion" in checkpoint else None,
        )
        path = tmp_path / f"{n}.pt"
        write_artifact(artifact, path)
        contents.append(load_tensors(path))
    shifts = "outputs.atomic_shift.shifts.weight"
    for key, value in load_tensors(fixtures_dir / f"{name}.pt")["state_dict"].items():
        # Rows of elements that the model does not know are free.
        rows = SPECIES if key in ("afv.weight", shifts) else ...
        assert same(contents[0]["state_dict"][key][rows], value[rows]), key
    for again in contents[1:]:
        assert again.keys() == contents[0].keys()
        assert list(again["state_dict"]) == list(contents[0]["state_dict"])
        assert all(same(again["state_dict"][key], value) for key, value in contents[0]["state_dict"].items())
        for key in set(again) - {"state_dict"}:
            assert again[key] == contents[0][key], key


def test_checkpoint_of_an_artifact_gives_its_energies(fixtures_dir, reference):
    """Self-atomic energies outside, Coulomb energy inside: the sum is that of the file."""
    values = reference("peer_v2_lr")
    checkpoint = load_checkpoint(fixtures_dir / "peer_v2_lr.pt")
    assert checkpoint["sae_with_shifts"]
    assert checkpoint["species"] == {0: SPECIES}
    assert set(checkpoint["sae"][0]) == set(SPECIES)
    assert checkpoint["dispersion"][0]["subtracted"]
    network = single_fidelity_model(checkpoint, checkpoint["model_config"], 0, 1, checkpoint["fidelity_offset"])
    network.requires_grad_(False)
    data = batch(values)
    sae = torch.zeros(64, dtype=torch.float64)
    for z, energy in checkpoint["sae"][0].items():
        sae[z] = energy
    energy = network(data)["energy"] + sae[data["numbers"]].sum(dim=1)
    expected = torch.from_numpy(values["energy_no_external_dispersion"])
    torch.testing.assert_close(energy, expected, atol=E_TOL, rtol=0)


def test_unwritable_artifacts_leave_nothing_behind(fixtures_dir, tmp_path):
    artifact = parse_artifact(load_tensors(fixtures_dir / "peer_v2_lr.pt"), "it")
    artifact.weights["mlps.0.0.bias"][0] = torch.nan
    with pytest.raises(CheckpointError, match=r"format 2: state_dict: mlps\.0\.0\.bias holds NaN"):
        write_artifact(artifact, tmp_path / "out.pt")
    assert list(tmp_path.iterdir()) == []


# --- what may be there, and what may be missing ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("outputs.lrcoulomb.rc", torch.tensor(4.6)),
        ("outputs.dftd3.c6ab", torch.zeros(95, 95, 5, 5)),
        ("outputs.dftd3.rcov", torch.zeros(95)),
        ("outputs.d3bj.r4r2", torch.zeros(95)),
        ("outputs.dftd3.cnmax", torch.zeros(95, dtype=torch.int64)),
        ("outputs.dipole.mass", torch.zeros(87)),
    ],
)
def test_weights_that_nothing_reads(content, saved, reference, key, value):
    content["state_dict"][key] = value
    path = saved(content)
    model, _ = load_model(path)
    assert key not in model.state_dict()
    values = reference("peer_v2_lr")
    agrees(load_potential(path)(batch(values)), values, "default")
    assert key not in load_checkpoint(path)["model"] or key == "outputs.lrcoulomb.rc"


@pytest.mark.parametrize("key", ["outputs.dipole.weight", "outputs.srcoulomb.mass", "lrcoulomb.rc", "outputs.other.rc"])
def test_other_weights_are_refused_by_name(content, saved, key):
    content["state_dict"][key] = torch.zeros(1)
    path = saved(content)
    for load in (load_model, load_potential, load_checkpoint):
        with pytest.raises(CheckpointError, match=rf"1 left over \({key}\)"):
            load(path)


def test_the_range_of_the_coulomb_energy_may_be_missing(content, saved, reference):
    del content["state_dict"]["outputs.srcoulomb.rc"]
    values = reference("peer_v2_lr")
    agrees(load_potential(saved(content))(batch(values)), values, "default")
    model, _ = load_model(saved(content))
    assert model.outputs["srcoulomb"].rc == torch.tensor(4.6)


def test_early_files_without_a_version_and_optional_entries(fixtures_dir, saved, reference):
    content = torch.load(fixtures_dir / "peer_v2_plain.pt", weights_only=True)
    kept = {key: content[key] for key in ("model_yaml", "state_dict", "cutoff")}
    path = saved(kept)
    _, metadata = load_model(path)
    assert metadata["format_version"] == 2
    assert metadata["coulomb_mode"] == "none"
    # The rows without NaN.
    assert metadata["implemented_species"] == SPECIES
    values = reference("peer_v2_plain")
    agrees(load_potential(path)(batch(values)), values, "default")


def test_unknown_entries_are_said_in_the_log(content, saved, caplog):
    path = saved({**content, "colour": "blue", "training_set": [1, 2], 3: None})
    with caplog.at_level(logging.WARNING, logger="aimnet2mult"):
        _, metadata = load_model(path)
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: entries of an unknown meaning are left alone: 'colour', 'training_set', 3"
    assert "colour" not in metadata
    caplog.clear()
    load_model(saved(content))
    assert not caplog.records


def test_own_entry_is_read(content, saved):
    own = {"sae": {z: -1.0 * z for z in SPECIES}, "level_of_theory": "B97-3c", "fidelity_name": "dft"}
    path = saved({**content, "aimnet2mult": own, "family": "series", "supports_charged_systems": True})
    _, metadata = load_model(path)
    assert metadata["baked_sae"] == own["sae"]
    assert metadata["level_of_theory"] == "B97-3c"
    assert metadata["fidelity_names"] == {0: "dft"}
    assert metadata["family"] == "series"
    assert metadata["supports_charged_systems"] is True
    checkpoint = load_checkpoint(path)
    assert checkpoint["sae"] == {0: own["sae"]}
    assert not checkpoint["sae_with_shifts"]
    shifts = checkpoint["model"]["outputs.atomic_shift.shifts.weight"]
    rest = content["state_dict"]["outputs.atomic_shift.shifts.weight"][6, 0] - own["sae"][6]
    assert shifts[6, 0] == rest.float()


def test_models_of_neutral_systems_refuse_charges(content, saved, reference):
    potential = load_potential(saved({**content, "supports_charged_systems": False}))
    data = batch(reference("peer_v2_lr"))
    water = {key: value[:1] for key, value in data.items()}
    assert potential(water)["energy"].isfinite().all()
    with pytest.raises(ValueError, match="trained on neutral systems only: charge must be 0"):
        potential({**water, "charge": torch.ones(1)})


def test_elements_that_the_model_does_not_know_are_refused(fixtures_dir):
    potential = load_potential(fixtures_dir / "peer_v2_lr.pt")
    with pytest.raises(ValueError, match=r"He \(2\) is not among the elements of this model: H \(1\), B"):
        potential(
            {
                "coord": torch.zeros(1, 1, 3),
                "numbers": torch.tensor([[2]]),
                "charge": torch.zeros(1),
                "mult": torch.ones(1),
            }
        )


# --- classes of the caller's own ---


class Doubled(nn.Module):
    """A readout of this test: twice the energy."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        data["energy"] = self.factor * data["energy"]
        return data


@pytest.fixture
def own_readout(monkeypatch, fixtures_dir, saved):
    module = types.ModuleType("laboratory")
    module.Doubled = Doubled
    module.function = print
    monkeypatch.setitem(sys.modules, "laboratory", module)
    content = torch.load(fixtures_dir / "peer_v2_plain.pt", weights_only=True)

    def save(name="laboratory.Doubled"):
        readout = f"    doubled:\n      class: {name}\n      kwargs: {{factor: 2.0}}\n"
        return saved({**content, "model_yaml": content["model_yaml"] + readout})

    return save


def test_trusted_classes(own_readout, reference):
    path = own_readout()
    values = reference("peer_v2_plain")
    model, _ = load_model(path, trusted=["laboratory.Doubled"])
    expected = 2.0 * torch.from_numpy(values["energy_default"])
    torch.testing.assert_close(model(batch(values))["energy"], expected, atol=2 * E_TOL, rtol=0)
    for load in (load_model, load_potential, load_checkpoint):
        with pytest.raises(CheckpointError, match=r"'laboratory\.Doubled' is not one that a model file may name, nor"):
            load(path)
    with pytest.raises(CheckpointError, match="nor was it given as trusted"):
        load_model(path, trusted=["laboratory.Other"])


def test_trusted_names_stand_for_modules_only(own_readout):
    with pytest.raises((CheckpointError, ConfigError), match="is not a module of a network"):
        load_model(own_readout("laboratory.function"), trusted=["laboratory.function"])


# --- tools ---


def test_compiled_artifact_gives_the_same_numbers(fixtures_dir, tmp_path, reference, name):
    from aimnet2mult.tools.compile_jit import main

    values = reference(name)
    arguments = ["--weights", str(fixtures_dir / f"{name}.pt"), "--output", str(tmp_path / "compiled")]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    potential = load_potential(tmp_path / "compiled_fid0.jpt")
    # Compiled files have D3 pairs within 60 Bohr, the published program within 15 Å, which is 4e-6 eV here.
    agrees(potential(batch(values)), values, "default")
    assert potential.description["model_file"] == "compiled model"
    assert potential.species == SPECIES


def test_info_of_an_artifact(fixtures_dir, name, tmp_path):
    from aimnet2mult.tools.info import main, read_info

    path = fixtures_dir / f"{name}.pt"
    result = CliRunner().invoke(main, [str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"{name}.pt: format-2 artifact, format 2" in result.output
    assert "elements         H (1), B (5) to F (9), Si (14) to Cl (17)" in result.output
    if name == "peer_v2_lr":
        assert "Coulomb          minus its short range inside (4.6 Å, exp), to be added" in result.output
        assert "dispersion       D3(BJ) to be added (s6 1, s8 0.3908, a1 0.566, a2 3.128)" in result.output
    else:
        assert "Coulomb          not inside, none is to be added" in result.output
        assert "dispersion       none is to be added" in result.output
    assert read_info(path)["metadata"]["cutoff"] == 5.0
    assert CliRunner().invoke(main, [str(path), "--json"], catch_exceptions=False).exit_code == 0
    broken = tmp_path / "broken.pt"
    torch.save({"model_yaml": "x", "state_dict": {}}, broken)
    result = CliRunner().invoke(main, [str(broken)])
    assert result.exit_code == 2
    assert "expected a mapping with the key class" in result.output


def test_evaluation_of_an_artifact(fixtures_dir, tmp_path):
    from aimnet2mult.tools.evaluate import main

    arguments = ["--model", fixtures_dir / "peer_v2_lr.pt", "--data", fixtures_dir / "tiny_fid0.h5"]
    arguments += ["--output", tmp_path / "page", "--max-molecules", 20, "--device", "cpu"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert "| peer_v2_lr.pt | fidelity 0 | tiny_fid0.h5 | energy | eV |" in result.output
    assert "D3(BJ) (s6 1.0, s8 0.3908, a1 0.566, a2 3.128)" in result.output


def test_artifact_from_memory_is_not_shared(fixtures_dir):
    """Loading does not change what the file held."""
    content = load_tensors(fixtures_dir / "peer_v2_lr.pt")
    before = io.BytesIO()
    torch.save(content, before)
    parse_artifact(content, "it")
    after = io.BytesIO()
    torch.save(content, after)
    assert before.getvalue() == after.getvalue()
