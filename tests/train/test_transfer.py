"""Transfer of weights between models of different fidelities: predictions stay what they should be."""

import copy
import re

import h5py
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.models.base import build_model, load_checkpoint, save_checkpoint
from aimnet2mult.modules import Forces
from aimnet2mult.train.fidelity_specific_utils import (
    TransferRow,
    closest_fidelities,
    known_elements,
    layout_of_weights,
    named_sources,
    new_species,
    start_from_checkpoint,
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
    assert {row.event for row in rows} == {"loaded", "as in the model file"}
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


# --- which fidelity of the checkpoint is the closest ----------------------------------------------


def molecules(rng, n_molecules, elements):
    """Coordinates (n, 4, 3) in Å and atomic numbers (n, 4) of distorted tetrahedra."""
    corners = np.array([[0.0, 0, 0], [1.1, 0, 0], [-0.4, 1.1, 0], [-0.4, -0.5, 1.0]])
    numbers = rng.choice(elements, (n_molecules, 4))
    return (corners + 0.1 * rng.normal(size=(n_molecules, 4, 3))).astype(np.float32), numbers


def predicted(model, coord, numbers, fidelity):
    """Energies and forces of a fidelity, as labels."""
    types = torch.from_numpy(numbers)
    data = {"coord": torch.from_numpy(coord), "numbers": types + fidelity * 200, "charge": torch.zeros(len(types))}
    data |= {"mult": torch.ones(len(types)), "_fidelities": torch.full((len(types),), fidelity)}
    out = Forces(model)(data)
    return {"energy": out["energy"].detach().double().numpy(), "forces": out["forces"].detach().numpy()}


@pytest.fixture
def new_data(config, mixed, tmp_path):
    """Function: a dataset whose fidelities have the labels that fidelities of the reference model predict."""

    def write(*specifications, offset=200, **options):
        model = build(config, 3)
        transfer_weights(model, mixed)
        files = {}
        for f, (fidelity, change) in enumerate(specifications):
            rng = np.random.default_rng(f)
            coord, numbers = molecules(rng, 30, options.get("elements", [1, 6, 8]))
            arrays = {"coord": coord, "numbers": numbers, "charge": np.zeros(30, np.float32)}
            arrays |= change(numbers, predicted(model, coord, numbers, fidelity))
            files[f] = tmp_path / f"new{f}.h5"
            with h5py.File(files[f], "w") as file:
                for key, value in arrays.items():
                    file[f"004/{key}"] = value
        return MixedFidelityDataset(files, fidelity_offset=offset, y=options.get("y", ("energy", "forces")))

    return write


def as_they_are(numbers, labels):
    return labels


def other_reference(numbers, labels):
    """Energies relative to other atoms, without forces."""
    offsets = np.zeros(119)
    offsets[[1, 6, 8]] = 3.0, -70.0, 11.0
    return {"energy": labels["energy"] + offsets[numbers].sum(axis=1)}


def without_labels(numbers, labels):
    return {"energy": np.full_like(labels["energy"], np.nan)}


def some_forces(numbers, labels):
    labels["forces"][::2] = np.nan
    return labels


@pytest.mark.parametrize("change", [as_they_are, other_reference, some_forces])
@pytest.mark.parametrize("offset", [200, 150])
def test_the_fidelity_whose_labels_the_data_has_is_the_closest(config, mixed, new_data, change, offset):
    dataset = new_data((1, change), (2, change), (0, change), offset=offset)
    names = {0: "a", 1: "b", 2: "c"}
    state = torch.random.get_rng_state()
    found = closest_fidelities(mixed, config, dataset, np.arange(len(dataset)), names)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {f: closest.source for f, closest in found.items()} == {0: 1, 1: 2, 2: 0}
    assert found[0].quantity == ("spread of energies" if change is other_reference else "force RMSE")
    assert found[0].n_molecules == (15 if change is some_forces else 30)
    assert found[0].errors[1] < 1e-4 < 1e-2 < min(found[0].errors[0], found[0].errors[2])


def test_errors_are_those_of_a_few_lines_of_numpy(config, mixed, new_data):
    dataset = new_data((1, as_they_are))
    chosen = np.arange(0, 30, 3)
    closest = closest_fidelities(mixed, config, dataset, chosen, {0: "a"})[0]
    model = build(config, 3)
    transfer_weights(model, mixed)
    coord, numbers = molecules(np.random.default_rng(0), 30, [1, 6, 8])
    forces = [predicted(model, coord[chosen], numbers[chosen], f)["forces"] for f in range(3)]
    for f in (0, 2):
        assert closest.errors[f] == pytest.approx(np.sqrt(np.mean((forces[f] - forces[1]) ** 2)), rel=1e-4)
    assert closest.n_molecules == 10
    limited = closest_fidelities(mixed, config, dataset, chosen, {0: "a"}, max_molecules=4)[0]
    assert limited.n_molecules == 4

    energies_only = new_data((1, lambda n, labels: {"energy": labels["energy"]}))
    closest = closest_fidelities(mixed, config, energies_only, np.arange(30), {0: "a"})[0]
    energy = [predicted(model, coord, numbers, f)["energy"] for f in range(3)]
    counts = np.stack([(numbers == z).sum(axis=1) for z in (1, 6, 8)], axis=1).astype(float)
    for f in (0, 2):
        difference = energy[f] - energy[1]
        difference -= counts @ np.linalg.solve(counts.T @ counts, counts.T @ difference)
        assert closest.errors[f] == pytest.approx(np.sqrt(np.mean(difference**2)), rel=1e-4)


def test_only_molecules_whose_elements_all_know_are_compared(config, mixed, new_data):
    dataset = new_data((2, as_they_are), elements=[1, 6, 17])
    with_species = {**mixed, "species": {0: [1, 6], 1: [6, 7, 8], 2: [1, 6, 17]}}
    closest = closest_fidelities(with_species, config, dataset, np.arange(30), {0: "a"})[0]
    _, numbers = molecules(np.random.default_rng(0), 30, [1, 6, 17])
    n_known = [int(np.isin(numbers, known).all(axis=1).sum()) for known in ([1, 6], [6])]
    assert n_known[1] == 0 < n_known[0]  # fidelity 1 knows none of them and drops out
    assert closest.source == 2
    assert closest.n_molecules == n_known[0]
    assert set(closest.errors) == {0, 2}


def test_weights_that_are_not_finite_are_never_the_closest(config, mixed, new_data):
    dataset = new_data((1, as_they_are))
    weights = dict(mixed["model"])
    weights["fidelity_readouts.1.energy_mlp.mlp.0.bias"] = torch.full((24,), torch.nan)
    closest = closest_fidelities({"model": weights}, config, dataset, np.arange(30), {0: "a"})[0]
    assert closest.source in (0, 2)
    assert np.isnan(closest.errors[1])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without_labels, {}, r"a has neither force nor energy labels .*; say in init_from\.a which fidelity"),
        (as_they_are, {"species": [35]}, r"a: no fidelity of the checkpoint knows the elements"),
        (other_reference, {"first": 3}, r"3 molecules with an energy are too few .* closest to a; say in init_from\.a"),
    ],
)
def test_what_cannot_be_measured_has_to_be_said(config, mixed, new_data, change, options, message):
    dataset = new_data((1, change))
    checkpoint = {**mixed, "species": {f: options["species"] for f in range(3)}} if "species" in options else mixed
    with pytest.raises(ConfigError, match=message):
        closest_fidelities(checkpoint, config, dataset, np.arange(30)[: options.get("first")], {0: "a"})


# --- where fidelities start -----------------------------------------------------------------------

NAMED = {0: "dft", 1: "ccsd", 2: "gfn2"}


@pytest.mark.parametrize(
    ("names", "known", "init_from", "expected"),
    [
        ({0: "gfn2", 1: "dft"}, NAMED, {}, {0: 2, 1: 0}),
        ({0: "gfn2", 1: "new"}, NAMED, {}, {0: 2}),
        ({0: "gfn2", 1: "new"}, NAMED, {"new": "ccsd"}, {0: 2, 1: 1}),
        ({0: "gfn2", 1: "new"}, NAMED, {"gfn2": "0", "1": "gfn2"}, {0: 0, 1: 2}),
        ({0: "new"}, NAMED, {}, {}),
        ({0: "fid0", 1: "fid1"}, NAMED, {}, {0: 0, 1: 1}),
        ({0: "a", 1: "b"}, {}, {}, {0: 0, 1: 1}),
        ({0: "fid0", 1: "fid1", 2: "fid2", 3: "fid3"}, {}, {}, {0: 0, 1: 1, 2: 2}),
    ],
)
def test_names_and_settings_say_where_fidelities_start(mixed, names, known, init_from, expected):
    starts = named_sources({**mixed, "fidelity_names": known}, names, init_from)
    assert {f: start.source for f, start in starts.items()} == expected


def test_all_fidelities_start_from_the_only_one(single):
    starts = named_sources(single, {0: "a", 1: "b"}, {})
    assert {f: start.source for f, start in starts.items()} == {0: 0, 1: 0}


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        ({"newer": "dft"}, r"init_from: there is no fidelity newer; did you mean new\?"),
        ({"new": "dtf"}, r"init_from\.new: in the checkpoint: there is no fidelity dtf; did you mean dft\?"),
        ({"new": "3"}, r"init_from\.new: in the checkpoint: there is no fidelity 3; known: dft, ccsd, gfn2"),
        ({"new": "dft", "1": "dft"}, r"init_from\.1: new is there twice, by its name and by its number"),
    ],
)
def test_mistakes_in_init_from_are_named(mixed, init_from, message):
    with pytest.raises(ConfigError, match=message):
        named_sources({**mixed, "fidelity_names": NAMED}, {0: "dft", 1: "new"}, init_from)


def test_start_of_a_run_tells_it_all(config, mixed, new_data, mixed_energies):
    """A known fidelity by name, a new one by measurement, and the table."""
    dataset = new_data((1, as_they_are), (2, as_they_are), elements=[1, 6, 8, 17])
    checkpoint = {**mixed, "fidelity_names": NAMED, "species": {f: [1, 6, 8] for f in range(3)}}
    model = build(config, 2)
    names = {0: "new", 1: "gfn2"}
    lines = start_from_checkpoint(model, checkpoint, config, dataset, np.arange(len(dataset)), names, {})
    assert lines[0].startswith("new starts from ccsd (closest by force RMSE on ")
    assert lines[0].endswith(" eV/Å)")
    assert lines[1] == "gfn2 starts from gfn2 (the same name)"
    assert lines[2].split() == ["into", "origin", "weights", "event"]
    assert any(re.fullmatch(r"afv, rows of new +afv, rows of ccsd +12,288 +loaded", line) for line in lines)
    assert lines[-1] == "gfn2 learns elements that the checkpoint does not know: Cl (17)"
    assert torch.equal(energies(model, 0, 200), mixed_energies[1])
    assert torch.equal(energies(model, 1, 200), mixed_energies[2])
