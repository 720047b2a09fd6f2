"""Export to format 2: what is in the file, that it gives the numbers of the model, and what cannot be exported."""

import copy

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from aimnet2mult.models.base import build_model, load_checkpoint, load_model, load_model_config, save_checkpoint
from aimnet2mult.models.loading import load_potential
from aimnet2mult.modules import DFTD3
from aimnet2mult.tools.export import export_model, main

SAE = {1: -13.587, 6: -1029.476, 7: -1485.234, 8: -2041.789, 9: -2715.3, 17: -12518.7}
B3LYP = {"s6": 1.0, "s8": 1.9889, "a1": 0.3981, "a2": 4.4211}


@pytest.fixture(scope="module")
def config(fixtures_dir):
    return load_model_config(fixtures_dir / "ref_single_model.yaml")


def sae_sum(numbers):
    table = torch.zeros(120, dtype=torch.float64)
    for z, energy in SAE.items():
        table[z] = energy
    return table[numbers].sum(-1)


def own_checkpoint(path, config, species=tuple(SAE), **entries):
    """A checkpoint with random weights and everything that is needed."""
    torch.manual_seed(7)
    model = build_model(copy.deepcopy(config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("shifts.weight"):
                weight.uniform_(-1.0, 1.0)
    sae = entries.pop("sae", {z: -50.0 * z for z in species})
    save_checkpoint(
        path,
        model,
        model_config=config,
        num_fidelities=1,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        sae={0: sae},
        species={0: list(species)},
        **entries,
    )
    return path


def ledger(method, subtracted):
    labels = {"method": method, "functional": "b3lyp", "parameters": B3LYP if method == "d3bj" else None}
    return {"dispersion": {0: {"labels": labels, "subtracted": subtracted}}}


# --- numbers --------------------------------------------------------------------------------------


def test_single_fidelity_gives_the_reference_numbers(fixtures_dir, tmp_path, sae_file, reference, molecules):
    expected = reference("ref_single")
    output = tmp_path / "model.pt"
    model = fixtures_dir / "ref_single_model.yaml"
    export_model(fixtures_dir / "ref_single.pt", output, model=model, sae=sae_file)
    potential = load_potential(output)
    potential.module.double()
    data = molecules()
    out = potential(data)
    energy = expected["energy_f64"] + sae_sum(data["numbers"]).numpy()
    np.testing.assert_allclose(out["energy"], energy, rtol=0, atol=1e-7)
    np.testing.assert_allclose(out["forces"], expected["forces_f64"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(out["charges"], expected["charges_f64"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(out["spin_charges"], expected["spin_charges_f64"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("fidelity", [0, 1, 2])
def test_each_fidelity_gives_the_reference_numbers(fixtures_dir, tmp_path, sae_file, reference, molecules, fidelity):
    expected = reference("ref_mixed")
    artifact = export_model(
        fixtures_dir / "ref_mixed.pt",
        tmp_path / "model.pt",
        model=fixtures_dir / "ref_mixed_model.yaml",
        sae=sae_file,
        fidelity_level=fidelity,
    )
    data = molecules(torch.float32)
    out = load_potential(tmp_path / "model.pt")(data)
    energy = expected[f"energy_fid{fidelity}_f64"] + sae_sum(data["numbers"]).numpy()
    np.testing.assert_allclose(out["energy"], energy, rtol=0, atol=2e-5)
    np.testing.assert_allclose(out["forces"], expected[f"forces_fid{fidelity}_f64"], rtol=0, atol=1e-4)
    assert artifact.metadata["implemented_species"] == sorted(SAE)


def test_the_file_is_what_the_ecosystem_expects(fixtures_dir, tmp_path, sae_file):
    arguments = [fixtures_dir / "ref_mixed.pt", tmp_path / "model.pt", "--model", fixtures_dir / "ref_mixed_model.yaml"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--sae", str(sae_file), "--fidelity-level", "2"])
    assert result.exit_code == 0, result.output
    assert "H C N O F Cl" in result.output
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(content) == [
        *("format_version", "model_yaml", "cutoff", "needs_coulomb", "needs_dispersion", "coulomb_mode"),
        *("coulomb_sr_rc", "coulomb_sr_envelope", "d3_params", "has_embedded_lr", "has_embedded_d3ts"),
        *("implemented_species", "aimnet2mult", "state_dict"),
    ]
    kept = {key: content[key] for key in content if key not in ("model_yaml", "state_dict", "aimnet2mult")}
    assert kept == {
        "format_version": 2,
        "cutoff": 5.0,
        "needs_coulomb": True,
        "needs_dispersion": False,
        "coulomb_mode": "sr_embedded",
        "coulomb_sr_rc": 4.6,
        "coulomb_sr_envelope": "exp",
        "d3_params": None,
        "has_embedded_lr": True,
        "has_embedded_d3ts": False,
        "implemented_species": sorted(SAE),
    }
    config = yaml.safe_load(content["model_yaml"])
    assert config["class"] == "aimnet.models.AIMNet2"
    classes = {name: node["class"] for name, node in config["kwargs"]["outputs"].items()}
    assert classes == {
        "energy_mlp": "aimnet.modules.Output",
        "atomic_shift": "aimnet.modules.AtomicShift",
        "atomic_sum": "aimnet.modules.AtomicSum",
        "srcoulomb": "aimnet.modules.SRCoulomb",
    }
    weights = content["state_dict"]
    shifts = weights["outputs.atomic_shift.shifts.weight"]
    own = load_checkpoint(fixtures_dir / "ref_mixed.pt")["model"]["fidelity_readouts.2.atomic_shift.shifts.weight"]
    assert shifts.dtype == torch.float64
    assert shifts.shape == (64, 1)
    for z, energy in SAE.items():
        assert float(shifts[z]) == float(own[400 + z].double()) + energy
    unknown = torch.tensor([z for z in range(1, 64) if z not in SAE])
    assert weights["afv.weight"].shape[0] == 64
    assert weights["afv.weight"][unknown].isnan().all()
    assert weights["afv.weight"][[0, *SAE]].isfinite().all()
    assert not any(key.startswith(("outputs.lrcoulomb", "fidelity_", "shared_")) for key in weights)


def test_short_range_is_inside_and_full_coulomb_outside(fixtures_dir, tmp_path, sae_file, molecules):
    """E(model) + E(full Coulomb of its charges) = E(potential), without any of our Coulomb code."""
    model = fixtures_dir / "ref_single_model.yaml"
    export_model(fixtures_dir / "ref_single.pt", tmp_path / "model.pt", model=model, sae=sae_file)
    data = molecules()
    network, metadata = load_model(tmp_path / "model.pt")
    out = network.double()(data)
    full = []
    for i, numbers in enumerate(data["numbers"]):
        n = int((numbers > 0).sum())
        coord, q = data["coord"][i, :n], out["charges"][i, :n]
        distance = torch.cdist(coord, coord, compute_mode="donot_use_mm_for_euclid_dist") + torch.eye(n)
        pairs = (q[:, None] * q[None] / distance).fill_diagonal_(0.0)
        full.append(0.5 * 14.399645 * pairs.sum())
    potential = load_potential(tmp_path / "model.pt")
    potential.module.double()
    assert metadata["needs_coulomb"]
    torch.testing.assert_close(out["energy"] + torch.stack(full), potential(data)["energy"], rtol=0, atol=1e-6)


def same_file(first, second):
    """Whether two artifacts hold the same, numbers bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    weights, others = a.pop("state_dict"), b.pop("state_dict")
    a["model_yaml"], b["model_yaml"] = yaml.safe_load(a["model_yaml"]), yaml.safe_load(b["model_yaml"])
    assert a == b
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        other = others[key]
        assert value.dtype == other.dtype
        if key.endswith(".shifts.weight"):  # rows of other elements are never read
            value, other = value[a["implemented_species"]], other[a["implemented_species"]]
        assert value.numpy().tobytes() == other.numpy().tobytes(), key


def test_an_artifact_is_exported_again_as_it_was(fixtures_dir, tmp_path, sae_file):
    # Of this package, which tells its self-atomic energies, and of the published one, which does not.
    model = fixtures_dir / "ref_single_model.yaml"
    export_model(fixtures_dir / "ref_single.pt", tmp_path / "ours.pt", model=model, sae=sae_file)
    export_model(tmp_path / "ours.pt", tmp_path / "ours_again.pt")
    same_file(tmp_path / "ours.pt", tmp_path / "ours_again.pt")
    for name in ("peer_v2_lr.pt", "peer_v2_plain.pt"):
        export_model(fixtures_dir / name, tmp_path / name)
        same_file(fixtures_dir / name, tmp_path / name)


# --- dispersion -----------------------------------------------------------------------------------


def d3_energy(data, parameters, cutoff=15.0):
    d3 = DFTD3(**parameters)
    d3.set_cutoff(cutoff, 0.2)
    batch = {key: data[key] for key in ("coord", "numbers", "charge", "mult")}
    batch["_real_idx"] = torch.nonzero((data["numbers"] > 0).flatten()).squeeze(1)
    return d3(batch)["energy"]


def test_dispersion_that_training_subtracted_is_needed(config, tmp_path, molecules):
    own_checkpoint(tmp_path / "own.pt", config, **ledger("d3bj", True))
    artifact = export_model(tmp_path / "own.pt", tmp_path / "with.pt")
    assert artifact.metadata["needs_dispersion"]
    assert artifact.metadata["d3_params"] == B3LYP
    without = export_model(tmp_path / "own.pt", tmp_path / "without.pt", needs_dispersion=False)
    assert without.metadata["d3_params"] is None
    data = molecules(torch.float64)
    energies = []
    for name in ("with.pt", "without.pt"):
        potential = load_potential(tmp_path / name)
        potential.module.double()
        energies.append(potential(data)["energy"])
    torch.testing.assert_close(energies[0] - energies[1], d3_energy(data, B3LYP), rtol=0, atol=1e-8)


def test_a_functional_is_named_where_nothing_is_known(config, tmp_path):
    own_checkpoint(tmp_path / "own.pt", config)
    with pytest.raises(
        ValueError, match=r"--needs-dispersion: neither .* has D3\(BJ\) parameters; name the functional"
    ):
        export_model(tmp_path / "own.pt", tmp_path / "out.pt", needs_dispersion=True)
    artifact = export_model(tmp_path / "own.pt", tmp_path / "out.pt", dispersion_functional="b3lyp")
    assert artifact.metadata["d3_params"] == pytest.approx(B3LYP)


def test_dispersion_is_not_counted_twice(config, tmp_path):
    own_checkpoint(tmp_path / "own.pt", config, **ledger("d3bj", False))
    for flags in ({"dispersion_functional": "b3lyp"}, {"needs_dispersion": True}):
        with pytest.raises(ValueError, match="counted twice"):
            export_model(tmp_path / "own.pt", tmp_path / "out.pt", **flags)
    assert not (tmp_path / "out.pt").exists()


def test_d3_among_the_outputs_moves_outside(config, tmp_path, molecules):
    config = copy.deepcopy(config)
    config["kwargs"]["outputs"]["dftd3"] = {"class": "aimnet2mult.modules.DFTD3", "kwargs": {**B3LYP}}
    own_checkpoint(tmp_path / "own.pt", config)
    artifact = export_model(tmp_path / "own.pt", tmp_path / "out.pt")
    assert artifact.metadata["d3_params"] == B3LYP
    assert "dftd3" not in artifact.outputs
    inside, outside = load_potential(tmp_path / "own.pt"), load_potential(tmp_path / "out.pt")
    data = molecules(torch.float32)
    torch.testing.assert_close(outside(data)["energy"], inside(data)["energy"], rtol=0, atol=2e-4)  # range of 15 Å


# --- further readouts -----------------------------------------------------------------------------


def with_learned_dispersion(config):
    config = copy.deepcopy(config)
    outputs = config["kwargs"]["outputs"]
    aim = outputs["energy_mlp"]["kwargs"]["n_in"]
    mlp = {"activation_fn": "torch.nn.SiLU", "last_linear": True, "hidden": [8]}
    outputs["disp"] = {
        "class": "aimnet2mult.modules.Output",
        "kwargs": {"n_in": aim, "n_out": 2, "key_in": "aim", "key_out": "disp_param", "mlp": mlp},
    }
    reference = {"ref_c6": {1: 6.5, 6: 46.6, 8: 15.6}, "ref_alpha": {1: 4.5, 6: 12.0, 8: 5.4}}
    outputs["disp_param"] = {"class": "aimnet2mult.modules.DispParam", "kwargs": reference}
    outputs["learned"] = {"class": "aimnet2mult.modules.D3TS", "kwargs": {"a1": 0.4, "a2": 4.0, "s8": 0.8}}
    return config


def test_learned_dispersion_stays_inside(config, tmp_path):
    own_checkpoint(tmp_path / "own.pt", with_learned_dispersion(config), species=(1, 6, 8))
    artifact = export_model(tmp_path / "own.pt", tmp_path / "out.pt")
    assert list(artifact.outputs)[-2:] == ["d3ts", "srcoulomb"]
    assert artifact.metadata["has_embedded_d3ts"]
    assert artifact.weights["outputs.d3ts.r4r2"].shape == (119,)
    data = {
        "coord": torch.tensor([[[0.0, 0, 0], [0, 0, 1.2], [3.0, 0, 0], [3.0, 0.7, 0.6]]]),
        "numbers": torch.tensor([[6, 8, 1, 1]]),
    }
    before, after = load_potential(tmp_path / "own.pt")(data), load_potential(tmp_path / "out.pt")(data)
    torch.testing.assert_close(after["energy"], before["energy"], rtol=0, atol=1e-5)
    torch.testing.assert_close(after["forces"], before["forces"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"learned dispersion \(D3TS\), and D3 would count dispersion twice"):
        export_model(tmp_path / "own.pt", tmp_path / "again.pt", dispersion_functional="b3lyp")


def test_multipoles_bring_the_masses_of_the_published_package(config, tmp_path):
    config = copy.deepcopy(config)
    for name, cls in (("dipole", "Dipole"), ("quadrupole", "Quadrupole")):
        node = {"class": f"aimnet2mult.modules.{cls}", "kwargs": {"key_in": "charges", "key_out": name}}
        config["kwargs"]["outputs"][name] = node
    own_checkpoint(tmp_path / "own.pt", config)
    artifact = export_model(tmp_path / "own.pt", tmp_path / "out.pt")
    assert artifact.weights["outputs.dipole.mass"].shape == (119,)
    data = {"coord": torch.tensor([[[0.0, 0, 0], [0, 0, 1.2]]]), "numbers": torch.tensor([[6, 8]])}
    out = load_potential(tmp_path / "out.pt")(data)
    expected = (out["charges"].unsqueeze(-1) * data["coord"]).sum(1)
    torch.testing.assert_close(out["dipole"], expected, rtol=0, atol=1e-5)


def test_a_network_without_atomic_shifts_gets_some(config, tmp_path, molecules):
    config = copy.deepcopy(config)
    del config["kwargs"]["outputs"]["atomic_shift"]
    own_checkpoint(tmp_path / "own.pt", config)
    artifact = export_model(tmp_path / "own.pt", tmp_path / "out.pt")
    assert list(artifact.outputs) == ["energy_mlp", "atomic_shift", "atomic_sum", "srcoulomb"]
    before, after = load_potential(tmp_path / "own.pt"), load_potential(tmp_path / "out.pt")
    data = molecules(torch.float32)
    torch.testing.assert_close(after(data)["energy"], before(data)["energy"], rtol=0, atol=1e-5)


def test_a_network_without_coulomb_energy(config, tmp_path, molecules):
    config = copy.deepcopy(config)
    del config["kwargs"]["outputs"]["lrcoulomb"]
    own_checkpoint(tmp_path / "own.pt", config)
    plain = export_model(tmp_path / "own.pt", tmp_path / "plain.pt")
    assert (plain.metadata["coulomb_mode"], plain.metadata["needs_coulomb"]) == ("none", False)
    with pytest.raises(ValueError, match="no Coulomb energy beyond the network"):
        load_potential(tmp_path / "plain.pt").set_lrcoulomb_method("dsf")
    added = export_model(tmp_path / "own.pt", tmp_path / "added.pt", needs_coulomb=True)
    assert (added.metadata["coulomb_mode"], added.metadata["needs_coulomb"]) == ("none", True)
    data = molecules(torch.float32)
    difference = (
        load_potential(tmp_path / "added.pt")(data)["energy"] - load_potential(tmp_path / "plain.pt")(data)["energy"]
    )
    # Of HF and pyridine, 12 Å apart, all is beyond the short range.
    assert difference.abs().max() > 1e-3


# --- what cannot be exported ----------------------------------------------------------------------


def changed_outputs(config, **nodes):
    config = copy.deepcopy(config)
    for name, node in nodes.items():
        config["kwargs"]["outputs"][name] = node
    return config


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({}, {"needs_coulomb": False}, "--no-coulomb: the model was trained with Coulomb energy"),
        ({}, {"fidelity_level": 1}, "--fidelity-level 1: the checkpoint has the fidelities 0"),
        ({}, {"dispersion_functional": "b3lpy"}, "b3lpy"),
        (
            {},
            {"dispersion_functional": "b3lyp", "needs_dispersion": False},
            "--no-dispersion and --dispersion-functional contradict",
        ),
        (
            {"lrcoulomb": {"class": "aimnet2mult.modules.LRCoulomb", "kwargs": {"key_out": "energy", "rc": 5.5}}},
            {},
            r"short range of the Coulomb energy \(5.5 Å\) is beyond the cutoff",
        ),
        (
            {"dftd4": {"class": "aimnet2mult.modules.DFTD4", "kwargs": {"s6": 1.0, "s8": 1.0, "a1": 0.4, "a2": 5.0}}},
            {},
            "outputs.dftd4: format 2 has no place for DFTD4",
        ),
        (
            {"dftd3": {"class": "aimnet2mult.modules.DFTD3", "kwargs": {**B3LYP, "s9": 1.0}}},
            {},
            "format 2 has no three-body dispersion",
        ),
    ],
)
def test_refused_with_nothing_written(config, tmp_path, change, flags, message):
    own_checkpoint(tmp_path / "own.pt", changed_outputs(config, **change))
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "own.pt", tmp_path / "out.pt", **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["own.pt"]


def test_elements_beyond_the_published_embedding(config, tmp_path):
    own_checkpoint(tmp_path / "own.pt", config, species=(1, 6, 79))
    model = build_model({**config, "kwargs": {**config["kwargs"], "num_types": 129}})
    save_checkpoint(
        tmp_path / "own.pt",
        model,
        model_config=config,
        num_fidelities=1,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        sae={0: {1: -13.0, 6: -1000.0, 79: -500.0}},
    )
    with pytest.raises(ValueError, match=r"Au \(79\): the embedding of the published package ends at Z = 63"):
        export_model(tmp_path / "own.pt", tmp_path / "out.pt")


def test_mistakes_on_the_command_line_end_with_status_2(fixtures_dir, tmp_path, sae_file):
    weights, model = str(fixtures_dir / "ref_single.pt"), str(fixtures_dir / "ref_single_model.yaml")
    output = str(tmp_path / "out.pt")
    for arguments, message in (
        ([weights, output, "--model", model], "--sae: the checkpoint holds no self-atomic energies"),
        ([weights, output, "--sae", str(sae_file)], "--model: the checkpoint does not hold its model configuration"),
        (["nowhere.pt", output], "nowhere.pt: no such file"),
        ([model, output], "not a checkpoint that can be loaded safely"),
        ([weights, str(tmp_path / "no" / "out.pt"), "--model", model], "the folder"),
        ([weights, str(tmp_path), "--model", model], "is a folder"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split()), (arguments, result.output)
    assert not list(tmp_path.iterdir())
