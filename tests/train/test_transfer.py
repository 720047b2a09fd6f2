"""Transfer of weights between models of different fidelities: predictions stay what they should be."""

import copy

import pytest
import torch
import yaml
from torch import Tensor

from aimnet2mult.models.base import build_model, load_checkpoint, save_checkpoint
from aimnet2mult.train.fidelity_specific_utils import (
    TransferRow,
    known_elements,
    layout_of_weights,
    new_species,
    transfer_weights,
)


@pytest.fixture(scope="module")
def config(request):
    with open(request.config.rootpath / "tests" / "fixtures" / "ref_mixed_model.yaml") as file:
        return yaml.safe_load(file)


@pytest.fixture(scope="module")
def single(request):
    return load_checkpoint(request.config.rootpath / "tests" / "fixtures" / "ref_single.pt")


@pytest.fixture(scope="module")
def mixed(request):
    """Three fidelities at an offset of 200, all blocks and readouts different."""
    return load_checkpoint(request.config.rootpath / "tests" / "fixtures" / "ref_mixed.pt")


def build(config: dict, num_fidelities: int, offset: int = 200, heads: bool = True, seed: int = 1):
    torch.manual_seed(seed)
    return build_model(copy.deepcopy(config), num_fidelities, offset, heads).eval()


def energies(model, fidelity: int, offset: int) -> Tensor:
    """Energies of formaldehyde and methyl chloride's heavy fragment CCl (padded) at a fidelity."""
    numbers = torch.tensor([[6, 8, 1, 1], [6, 17, 0, 0]])
    coord = torch.tensor(
        [[[0.0, 0, 0], [1.2, 0, 0], [-0.6, 0.9, 0], [-0.6, -0.9, 0.1]], [[0, 0, 0], [0, 1.8, 0], [0, 0, 0], [0, 0, 0]]]
    )
    batch = {
        "coord": coord,
        "numbers": numbers + (numbers > 0) * fidelity * offset,
        "charge": torch.zeros(2),
        "mult": torch.tensor([1.0, 2.0]),
        "_fidelities": torch.full((2,), fidelity),
    }
    with torch.no_grad():
        return model(batch)["energy"]


@pytest.fixture(scope="module")
def mixed_energies(config, mixed):
    """By loading all keys one by one, without the code under test."""
    model = build(config, 3)
    own = {k: v for k, v in mixed["model"].items() if not k.startswith(("outputs.", "shared_readout."))}
    model.load_state_dict(own)
    return {f: energies(model, f, 200) for f in range(3)}


@pytest.fixture(scope="module")
def single_energies(config, single):
    model = build(config, 1)
    model.load_state_dict(single["model"])
    return energies(model, 0, 200)


# --- fidelities come and go ---------------------------------------------------------------------


@pytest.mark.parametrize("num_fidelities", [1, 2, 3, 5])
@pytest.mark.parametrize("offset", [200, 150])
def test_fidelities_that_the_checkpoint_has_predict_the_same(config, mixed, mixed_energies, num_fidelities, offset):
    model = build(config, num_fidelities, offset)
    rows = transfer_weights(model, mixed, {f: 0 for f in range(3, num_fidelities)})
    for fidelity in range(num_fidelities):
        expected = mixed_energies[fidelity if fidelity < 3 else 0]
        assert torch.equal(energies(model, fidelity, offset), expected), fidelity
    into = "outputs.energy_mlp" if num_fidelities == 1 else "fidelity_readouts.{}.energy_mlp"
    for f in range(num_fidelities):
        origin = f"fidelity_readouts.{f if f < 3 else 0}.energy_mlp"
        assert TransferRow(into.format(f), origin, 1417, "loaded") in rows
    ignored = {row.origin: row.event for row in rows if row.into == "-"}
    for f in range(num_fidelities, 3):
        assert ignored.pop(f"afv, rows of fid{f}") == "ignored: nothing starts from it"
        assert ignored.pop(f"fidelity_readouts.{f}.energy_mlp") == "ignored: nothing starts from it"
        ignored.pop(f"fidelity_readouts.{f}.atomic_shift")
    assert ignored == {"outputs, shared_readout": "ignored: copies that a mixed model does not use"}
    # Nothing of the checkpoint is left unmentioned, except rows between the blocks and those of other heads.
    of_checkpoint = {row.origin.partition(",")[0] for row in rows}
    assert of_checkpoint >= {"aev", "afv", "conv_a", "conv_q", "mlps", "shared_readouts.lrcoulomb"}


@pytest.mark.parametrize("num_fidelities", [1, 2, 4])
@pytest.mark.parametrize("heads", [True, False])
def test_every_fidelity_starts_from_a_single_fidelity_checkpoint(
    config, single, single_energies, num_fidelities, heads
):
    model = build(config, num_fidelities, heads=heads)
    rows = transfer_weights(model, single, names={f: f"level{f}" for f in range(num_fidelities)})
    for fidelity in range(num_fidelities):
        assert torch.equal(energies(model, fidelity, 200), single_energies)
        n_rows = 127
        assert TransferRow(f"afv, rows of level{fidelity}", "afv, rows of fid0", n_rows * 96, "loaded") in rows


@pytest.mark.parametrize("rows", [129, 64])
def test_tables_of_other_lengths(config, single, single_energies, rows):
    weights = dict(single["model"])
    for key in ("afv.weight", "outputs.atomic_shift.shifts.weight"):
        padded = torch.cat([weights[key], weights[key].new_ones(1, weights[key].shape[1])])
        weights[key] = padded[:rows]
    model = build(config, 2)
    initial = model.afv.weight.detach().clone()
    table = transfer_weights(model, {"model": weights})
    for fidelity in (0, 1):
        assert torch.equal(energies(model, fidelity, 200), single_energies)
    xenon = model.afv.weight[[79, 279]]
    assert torch.equal(xenon, initial[[79, 279]] if rows == 64 else weights["afv.weight"][[79, 79]])
    unknown = [row for row in table if row.event.startswith("initial values")]
    if rows == 129:
        assert not unknown
    else:
        event = "initial values: the checkpoint does not know Gd (64) to Og (118)"
        assert TransferRow("afv, rows of fid1", "-", 55 * 96, event) in unknown
        assert TransferRow("fidelity_readouts.0.atomic_shift, rows of fid0", "-", 55, event) in unknown


def test_common_readouts_become_one_per_fidelity(config, mixed):
    """From a mixed model without fidelity readouts to one with them, and back."""
    common = build(config, 3, heads=False, seed=3)
    with torch.no_grad():
        common.afv.weight += 0.1 * torch.randn_like(common.afv.weight)
        common.outputs["atomic_shift"].shifts.weight += torch.randn_like(common.outputs["atomic_shift"].shifts.weight)
    checkpoint = {"model": common.state_dict(), "num_fidelities": 3, "fidelity_offset": 200}
    split = build(config, 4)
    rows = transfer_weights(split, checkpoint, {3: 0})
    assert TransferRow("fidelity_readouts.2.energy_mlp", "outputs.energy_mlp", 1417, "loaded") in rows
    for fidelity in range(4):
        expected = energies(common, fidelity if fidelity < 3 else 0, 200)
        torch.testing.assert_close(energies(split, fidelity, 200), expected, rtol=1e-6, atol=1e-6)

    again = build(config, 3, heads=False, seed=5)
    rows = transfer_weights(again, {"model": split.state_dict()})
    for fidelity in range(3):
        expected = energies(common, fidelity, 200)
        torch.testing.assert_close(energies(again, fidelity, 200), expected, rtol=1e-6, atol=1e-6)
    assert TransferRow("outputs.energy_mlp", "fidelity_readouts.0.energy_mlp", 1417, "loaded") in rows
    assert TransferRow("-", "fidelity_readouts.1.energy_mlp", 1417, "ignored: not in the model") in rows
    origin = "fidelity_readouts.2.atomic_shift, rows of fid2"
    assert TransferRow("outputs.atomic_shift, rows of fid2", origin, 128, "loaded") in rows


def test_common_table_takes_the_rows_of_each_fidelitys_own_table(config, mixed):
    model = build(config, 3, heads=False)
    transfer_weights(model, mixed)
    shifts = model.outputs["atomic_shift"].shifts.weight
    for f in range(3):
        own = mixed["model"][f"fidelity_readouts.{f}.atomic_shift.shifts.weight"]
        assert torch.equal(shifts[f * 200 + 1 : f * 200 + 119], own[f * 200 + 1 : f * 200 + 119])


def test_sources_say_where_a_new_fidelity_starts(config, mixed, mixed_energies):
    model = build(config, 4)
    rows = transfer_weights(model, mixed, {3: 2, 1: 0})
    for fidelity, source in {0: 0, 1: 0, 2: 2, 3: 2}.items():
        assert torch.equal(energies(model, fidelity, 200), mixed_energies[source])
    assert TransferRow("afv, rows of fid3", "afv, rows of fid2", 128 * 96, "loaded") in rows
    assert TransferRow("-", "afv, rows of fid1", 128 * 96, "ignored: nothing starts from it") in rows


def test_new_fidelity_then_learns_by_itself(config, mixed, mixed_energies):
    """Rows and readouts of a new fidelity are copies: changing them leaves fidelity 0 alone."""
    model = build(config, 4)
    transfer_weights(model, mixed, {3: 0})
    with torch.no_grad():
        model.afv.weight[601:].zero_()
        for p in model.fidelity_readouts[3].parameters():
            p.zero_()
    assert torch.equal(energies(model, 0, 200), mixed_energies[0])
    assert not torch.equal(energies(model, 3, 200), mixed_energies[0])


def test_own_checkpoint_keeps_its_description(config, mixed, tmp_path, mixed_energies):
    """An offset that the rows alone would not tell, without fidelity readouts."""
    model = build(config, 2, offset=150, heads=False, seed=7)
    save_checkpoint(
        tmp_path / "model.pt",
        model,
        model_config=config,
        num_fidelities=2,
        fidelity_offset=150,
        use_fidelity_readouts=False,
        species={0: [1, 6], 1: [1]},
    )
    bigger = build(config, 3, offset=200, heads=False)
    transfer_weights(bigger, load_checkpoint(tmp_path / "model.pt"), {2: 1})
    for fidelity in (0, 1):
        assert torch.equal(energies(bigger, fidelity, 200), energies(model, fidelity, 150))


def test_unknown_elements_marked_by_nan_keep_the_initial_rows(config, single, single_energies):
    weights = dict(single["model"])
    weights["afv.weight"] = weights["afv.weight"].clone()
    unknown = [z for z in range(1, 128) if z not in (1, 6, 8, 17)]
    weights["afv.weight"][unknown] = torch.nan
    weights["outputs.atomic_shift.shifts.weight"] = weights["outputs.atomic_shift.shifts.weight"].double()
    model = build(config, 2)
    initial = copy.deepcopy(model.state_dict())
    rows = transfer_weights(model, {"model": weights})
    assert torch.equal(energies(model, 1, 200), single_energies)
    after = model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    shifts = "fidelity_readouts.1.atomic_shift.shifts.weight"
    assert torch.equal(after["afv.weight"][207], initial["afv.weight"][207])  # nitrogen of fidelity 1
    assert torch.equal(after[shifts][207], initial[shifts][207])
    event = "loaded, float64 to float32"
    assert TransferRow(f"{shifts.rpartition('.shifts')[0]}, rows of fid1", SHIFTS, 4, event) in rows
    elements = "He (2) to B (5), N (7), F (9) to S (16), Ar (18) to Og (118)"
    event = f"initial values: the checkpoint does not know {elements}"
    assert TransferRow("afv, rows of fid0", "-", 114 * 96, event) in rows


SHIFTS = "outputs.atomic_shift, rows of fid0"


# --- what does not fit --------------------------------------------------------------------------


def changed(config: dict, **kwargs) -> dict:
    result = copy.deepcopy(config)
    result["kwargs"].update(kwargs)
    return result


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"hidden": [[64, 40], [48, 32], [48, 32, 32]]},
            r"mlps.0.0.weight is \(48, 240\) in the checkpoint and \(64, 240\) in the model; .*; and 1 more\.",
        ),
        ({"hidden": [[48, 32], [48, 32]]}, r"mlps.2.0.weight is not in the model"),
        ({"nfeature": 16}, r"afv.weight is \(128, 96\) in the checkpoint and \(128, 192\) in the model"),
        ({"aev": {"rc_s": 6.0, "nshifts_s": 12}}, r"aev.rc_s is 5 in the checkpoint and 6 in the model"),
    ],
)
def test_other_architecture_is_refused_and_the_model_left_alone(config, single, kwargs, message):
    model = build(changed(config, **kwargs), 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        transfer_weights(model, single)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_weight_of_the_backbone_is_refused(config, single):
    weights = {k: v for k, v in single["model"].items() if k != "conv_a.agh"}
    with pytest.raises(ValueError, match=r"conv_a.agh is not in the checkpoint"):
        transfer_weights(build(config, 1), {"model": weights})


def test_readouts_that_one_of_the_two_lacks_are_named(config, single):
    weights = dict(single["model"])
    weights["outputs.volume_mlp.mlp.0.weight"] = torch.zeros(3, 3)
    with_charge_readout = copy.deepcopy(config)
    outputs = with_charge_readout["kwargs"]["outputs"]
    outputs["extra_mlp"] = copy.deepcopy(outputs["energy_mlp"])
    outputs["extra_mlp"]["kwargs"]["key_out"] = "extra"
    model = build(with_charge_readout, 1)
    initial = model.outputs["extra_mlp"].mlp[0].weight.detach().clone()
    rows = transfer_weights(model, {"model": weights})
    assert TransferRow("outputs.extra_mlp", "-", 1417, "initial values: not in the checkpoint") in rows
    assert TransferRow("-", "outputs.volume_mlp", 9, "ignored: not in the model") in rows
    assert torch.equal(model.outputs["extra_mlp"].mlp[0].weight, initial)


def test_other_cutoff_of_a_readout_is_kept_and_said(config, single):
    other = copy.deepcopy(config)
    other["kwargs"]["outputs"]["lrcoulomb"]["kwargs"]["rc"] = 5.5
    model = build(other, 1)
    rows = transfer_weights(model, single)
    event = "differs: rc stays 5.5 (4.6 in the checkpoint)"
    assert TransferRow("outputs.lrcoulomb", "outputs.lrcoulomb", 1, event) in rows
    assert model.state_dict()["outputs.lrcoulomb.rc"].item() == pytest.approx(5.5)


def test_a_checkpoint_that_fits_is_loaded_as_it_is(config, single):
    model = build(config, 1)
    rows = transfer_weights(model, single)
    assert {row.event for row in rows} == {"loaded", "the same in the model file"}
    assert all(row.into == row.origin for row in rows)
    padding = 96 + 1  # row 0 of the two tables
    assert sum(row.weights for row in rows) == sum(value.numel() for value in single["model"].values()) - padding
    for key, value in model.state_dict().items():
        assert torch.equal(value, single["model"][key]), key


@pytest.mark.parametrize("description", [{"num_fidelities": 2, "fidelity_offset": 200}, {}])
def test_rows_that_fit_no_number_of_fidelities(config, single, description):
    weights = {**single["model"], "afv.weight": torch.zeros(300, 96)}
    with pytest.raises(ValueError, match="embedding of the checkpoint has 300 rows"):
        transfer_weights(build(config, 2), {"model": weights, **description})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({3: 0}, "the model has no fidelity 3"),
        ({1: 4}, r"the checkpoint has no fidelity 4 \(fidelities 0 to 2\)"),
        ({-1: 0}, "the model has no fidelity -1"),
    ],
)
def test_sources_that_do_not_exist(config, mixed, sources, message):
    with pytest.raises(ValueError, match=message):
        transfer_weights(build(config, 3), mixed, sources)


def test_new_fidelity_without_a_source_is_refused(config, mixed):
    with pytest.raises(ValueError, match=r"fidelity 3 is new: say from which one .* \(0 to 2\)"):
        transfer_weights(build(config, 4), mixed)


# --- elements -----------------------------------------------------------------------------------


def test_new_species_are_those_without_trained_weights(config, single):
    weights = dict(single["model"])
    weights["afv.weight"] = weights["afv.weight"].clone()
    weights["afv.weight"][7] = torch.nan
    checkpoint = {"model": weights, "species": {0: [1, 6, 7, 8]}}
    layout = layout_of_weights(weights, checkpoint, 200)
    assert known_elements(checkpoint, layout, 0) == [1, 6, 8]
    model = build(config, 2)
    assert new_species(model, checkpoint, {0: [1, 6, 7], 1: [1, 17]}) == {0: [7], 1: [17]}
    assert new_species(model, checkpoint, {0: [1, 6], 1: [8]}) == {}
    assert new_species(model, {"model": weights}, {0: [1, 7], 1: [17]}) == {0: [7]}
