"""Scales of atomic energies and corrections of charges that each fidelity learns: what they do, and in which files."""

import pytest
import torch

from aimnet2mult import nbops
from aimnet2mult.models.base import CheckpointError, build_model, load_checkpoint, load_model, save_checkpoint
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.mixed_fidelity_aimnet2 import fidelity_slice, is_type_table
from aimnet2mult.modules import AtomicScale, ChargeCorrection, Forces
from aimnet2mult.nbops import encode_fidelity
from aimnet2mult.tools.compile_jit import compile_model
from aimnet2mult.tools.edit_fidelities import edit_fidelities
from aimnet2mult.tools.export import export_model
from aimnet2mult.train.fidelity_specific_utils import transfer_weights

SPECIES = [1, 6, 7, 8, 9, 17]


def of_fidelity(data, fidelity):
    return {**data, "numbers": encode_fidelity(data["numbers"], fidelity, 200)}


@pytest.fixture
def checkpoint(tmp_path, corrected_model, corrected_config):
    """Three fidelities, each with scales and corrections of its own."""
    path = tmp_path / "model.pt"
    save_checkpoint(
        path,
        corrected_model("ref_mixed", torch.float32),
        model_config=corrected_config(),
        num_fidelities=3,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        fidelity_names={0: "dft", 1: "gfn2", 2: "gfn1"},
        sae={f: {z: -10.0 * z - f for z in SPECIES} for f in range(3)},
        species=dict.fromkeys(range(3), SPECIES),
    )
    return path


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_correction_against_a_few_lines(molecules, to_flat, layout):
    generator = torch.Generator().manual_seed(0)
    data = molecules()
    shape = data["numbers"].shape
    for key in ("charges", "spin_charges"):
        data[key] = torch.randn(shape, generator=generator, dtype=torch.float64)
    data["_charge_correction"] = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
    real = data["numbers"] > 0
    expected = {}
    for i, key in enumerate(("charges", "spin_charges")):
        rows = []
        for q, c, atoms in zip(data[key], data["_charge_correction"][..., i], real, strict=True):
            rows.append(q[atoms] + c[atoms] - c[atoms].mean())
        expected[key] = torch.cat(rows)
    batch = data
    if layout == "flat":
        per_atom = {key: data[key][real] for key in ("charges", "spin_charges", "_charge_correction")}
        batch = {**to_flat(data), **per_atom}
    out = ChargeCorrection()(dict(batch))
    for key, values in expected.items():
        found = out[key][real] if layout == "padded" else out[key]
        torch.testing.assert_close(found, values, atol=1e-13, rtol=0)
    if layout == "padded":
        assert torch.equal(out["charges"][~real], data["charges"][~real])


def test_corrections_of_charges_alone(molecules):
    data = molecules()
    shape = data["numbers"].shape
    data |= {key: torch.zeros(shape, dtype=torch.float64) for key in ("charges", "spin_charges")}
    data["_charge_correction"] = torch.arange(shape[1], dtype=torch.float64).expand(shape)
    out = ChargeCorrection()(data)
    assert out["charges"].abs().max() > 1
    assert (out["spin_charges"] == 0).all()


def test_corrections_that_the_model_has_no_charges_for(molecules):
    data = molecules()
    data["charges"] = torch.zeros(data["numbers"].shape, dtype=torch.float64)
    data["_charge_correction"] = torch.zeros((*data["numbers"].shape, 2), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"_charge_correction holds 2 corrections .* num_charge_channels: 2"):
        ChargeCorrection()(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_stay_and_charges_differ_between_fidelities(corrected_model, reference_model, molecules, dtype):
    model, plain = corrected_model("ref_mixed", dtype), reference_model("ref_mixed", dtype)
    data = molecules(dtype)
    changes = []
    for f in range(3):
        out, before = model(of_fidelity(data, f)), plain(of_fidelity(data, f))
        changes.append(out["charges"] - before["charges"])
        assert changes[f].abs().max() > 0.01
        for key in ("charges", "spin_charges"):
            total, total_before = out[key].double().sum(dim=1), before[key].double().sum(dim=1)
            # Rounding of the charges themselves is all that may add up.
            torch.testing.assert_close(total, total_before, atol=30 * torch.finfo(dtype).eps, rtol=0)
            assert (out[key] - before[key]).abs().max() > 1e-3
    assert (changes[0] - changes[1]).abs().max() > 0.01


def test_coulomb_energy_is_that_of_the_corrected_charges(corrected_model, molecules):
    model = corrected_model("ref_single")
    data = molecules()
    with_coulomb = model(data)
    coulomb = model.outputs["lrcoulomb"]
    del model.outputs["lrcoulomb"]
    model.update_keys_and_cutoffs()
    without = model(data)
    batch = nbops.internal_batch({**data, "charges": with_coulomb["charges"]}, 5.0)
    batch["charges"], batch["energy"] = with_coulomb["charges"], torch.zeros(13, dtype=torch.float64)
    energy = coulomb(batch)["energy"]
    assert energy.abs().max() > 0.01
    torch.testing.assert_close(with_coulomb["energy"], without["energy"] + energy, atol=1e-10, rtol=0)


def test_scale_multiplies_by_element(molecules):
    module = AtomicScale("energy", "energy")
    data = molecules()
    energy = torch.randn(data["numbers"].shape, dtype=torch.float64)
    assert torch.equal(module({**data, "energy": energy})["energy"], energy)
    with torch.no_grad():
        module.scales.weight[[6, 8]] = torch.tensor([[2.0], [0.5]])
    factors = torch.where(data["numbers"] == 6, 2.0, torch.where(data["numbers"] == 8, 0.5, 1.0))
    assert torch.equal(module({**data, "energy": energy})["energy"], energy * factors)


# --- start ----------------------------------------------------------------------------------------


def test_they_start_neutral_on_weights_without_them(corrected_config, reference_model, fixtures_dir, molecules):
    model = build_model(corrected_config(), 3)
    rows = transfer_weights(model, load_checkpoint(fixtures_dir / "ref_mixed.pt"))
    new = {row.into for row in rows if row.event == "initial values: not in the checkpoint"}
    assert new >= {"fidelity_readouts.2.charge_mlp", "fidelity_readouts.2.atomic_scale, rows of fid2"}
    data, plain = molecules(torch.float32), reference_model("ref_mixed", torch.float32)
    for f in range(3):
        found, expected = (Forces(m).eval()(of_fidelity(data, f)) for m in (model, plain))
        for key in ("energy", "forces", "charges", "spin_charges"):
            assert torch.equal(found[key], expected[key]), key


def test_a_correction_of_zero_learns_what_the_other_fidelity_does_not_have(corrected_config, molecules):
    torch.manual_seed(0)
    model = build_model(corrected_config(), 2).double()
    heads = [head["charge_mlp"] for head in model.fidelity_readouts]
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=1e-2)
    data = {key: value[:4] for key, value in molecules().items()}
    first = model(of_fidelity(data, 0))["charges"].detach()
    z, real = data["numbers"].double(), data["numbers"] > 0
    difference = 0.1 * torch.where(real, z - z.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True), 0.0)
    for _ in range(60):
        optimizer.zero_grad()
        errors = [model(of_fidelity(data, f))["charges"] - first - f * difference for f in range(2)]
        sum(error.square().sum() for error in errors).backward()
        optimizer.step()
    assert errors[1].square().sum() < 0.05 * difference.square().sum()
    assert torch.equal(model(of_fidelity(data, 0))["charges"], first)


# --- files ----------------------------------------------------------------------------------------


def test_scales_are_a_table_of_element_types():
    assert is_type_table("fidelity_readouts.1.atomic_scale.scales.weight")
    assert not is_type_table("aev.shifts_s")


def test_checkpoint_slice_and_compiled_file_give_what_the_model_gives(
    checkpoint, corrected_model, corrected_config, molecules, to_flat, tmp_path, tolerance
):
    model, data = corrected_model("ref_mixed", torch.float32), molecules(torch.float32)
    loaded, _ = load_model(checkpoint)
    expected = Forces(model).eval()(of_fidelity(data, 1))
    assert torch.equal(loaded(of_fidelity(data, 1))["energy"], expected["energy"])

    alone = build_model({**corrected_config(), "kwargs": {**corrected_config()["kwargs"], "num_types": 129}}).eval()
    alone.load_state_dict(fidelity_slice(model.state_dict(), 1, 200))
    assert torch.equal(alone(data)["energy"], expected["energy"])

    jpt, _ = compile_model(checkpoint, tmp_path / "compiled", fidelity_level=1)
    sae = torch.where(data["numbers"] > 0, -10.0 * data["numbers"].double() - 1.0, 0.0).sum(dim=1)
    compiled = load_jit_model(jpt)
    real = data["numbers"] > 0
    for batch, pick in ((data, lambda x: x[real]), (to_flat(data), lambda x: x)):
        out = compiled(batch)  # the flat one by `first_derivatives`
        torch.testing.assert_close(out["energy"], expected["energy"] + sae, atol=1e-4, rtol=1e-7)
        for key in ("forces", "charges", "spin_charges"):
            torch.testing.assert_close(pick(out[key]), expected[key][real].detach(), atol=1e-4, rtol=1e-5)
        assert set(out) <= {"energy", "forces", "charges", "spin_charges", "coord"}


def test_first_derivatives_are_those_of_the_whole_graph(corrected_model, molecules, to_flat):
    model, data = corrected_model("ref_single"), to_flat(molecules())
    expected = Forces(model).eval()(data)
    batch = nbops.internal_batch(data, model.cutoff)
    results, coord_gradient, _ = model.first_derivatives(batch)
    torch.testing.assert_close(-nbops.restored(coord_gradient, batch, data), expected["forces"], atol=1e-10, rtol=0)
    torch.testing.assert_close(results["energy"], expected["energy"], atol=1e-10, rtol=0)
    charges = nbops.restored(results["charges"], batch, data)
    torch.testing.assert_close(charges, expected["charges"], atol=1e-12, rtol=0)


def test_fidelities_come_and_go(checkpoint, tmp_path, molecules):
    before, _ = load_model(checkpoint)
    edit_fidelities(checkpoint, tmp_path / "out.pt", [("add", "ccsd=gfn2"), ("drop", "dft")])
    after, metadata = load_model(tmp_path / "out.pt")
    assert metadata["fidelity_names"] == {0: "gfn2", 1: "gfn1", 2: "ccsd"}
    data = molecules(torch.float32)
    for new, old in ((0, 1), (1, 2), (2, 1)):
        found, expected = after(of_fidelity(data, new)), before(of_fidelity(data, old))
        assert torch.equal(found["energy"], expected["energy"])
        assert torch.equal(found["charges"], expected["charges"])


@pytest.mark.parametrize("num_fidelities", [1, 2])
def test_common_readouts_may_be_scaled_and_corrected_too(corrected_config, molecules, num_fidelities):
    torch.manual_seed(0)
    model = build_model(corrected_config(zero_start=False), num_fidelities, use_fidelity_readouts=False)
    assert len(model.outputs["atomic_scale"].scales.weight) == len(model.afv.weight)
    data = molecules(torch.float32)
    last = num_fidelities - 1
    before = model(of_fidelity(data, last))["energy"]
    with torch.no_grad():
        model.outputs["atomic_scale"].scales.weight[last * 200 + 6] = 3.0
    changed = model(of_fidelity(data, last))["energy"] != before
    assert torch.equal(changed, (data["numbers"] == 6).any(dim=1))


def test_how_a_network_began_does_not_go_into_format_2(corrected_config, tmp_path):
    config = corrected_config()
    for name in ("atomic_scale", "charge_mlp", "charge_correction"):
        del config["kwargs"]["outputs"][name]
    config["kwargs"]["outputs"]["energy_mlp"]["kwargs"]["zero_start"] = True
    torch.manual_seed(0)
    save_checkpoint(
        tmp_path / "model.pt",
        build_model(config),
        model_config=config,
        num_fidelities=1,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        sae={0: {1: -13.6, 8: -2041.8}},
        species={0: [1, 8]},
    )
    export_model(tmp_path / "model.pt", tmp_path / "out.pt")
    assert "zero_start" not in torch.load(tmp_path / "out.pt", weights_only=True)["model_yaml"]


def test_format_2_has_no_place_for_them(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"outputs\.atomic_scale: format 2 has no place for AtomicScale"):
        export_model(checkpoint, tmp_path / "out.pt", fidelity_level="dft")
    assert not (tmp_path / "out.pt").exists()
