import pytest
import torch

from aimnet2mult.models.combined import CombinedModel, share_equal_tensors
from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.tools.compile_jit import compile_model
from aimnet2mult.tools.compile_options import choose_dispersion

SAE = {
    0: "1: -13.587\n6: -1029.476\n7: -1485.234\n8: -2041.789\n9: -2715.3\n17: -12518.7\n",
    1: "1: -10.7\n6: -49.0\n7: -70.0\n8: -104.0\n9: -131.0\n",  # no Cl
    2: "1: -13.6\n6: -1030.0\n7: -1485.0\n8: -2042.0\n9: -2716.0\n17: -12519.0\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, fixtures_dir):
    """Three fidelities as a file each, and as one file."""
    folder = tmp_path_factory.mktemp("combined")
    sae = {}
    for f, text in SAE.items():
        sae[f] = folder / f"sae{f}.yaml"
        sae[f].write_text(text)
    options = {
        "model": fixtures_dir / "ref_mixed_model.yaml",
        "sae": sae,
        "dispersion": choose_dispersion("d3bj", "b3lyp"),
    }
    written = compile_model(fixtures_dir / "ref_mixed.pt", folder / "m", fidelity_level="all", **options)
    combined, _ = compile_model(fixtures_dir / "ref_mixed.pt", folder / "m", combined=True, **options)
    return [*written[::2], combined]


@pytest.fixture(scope="module")
def singles(files):
    return [load_jit_model(path) for path in files[:3]]


@pytest.fixture(scope="module")
def combined(files):
    return load_jit_model(files[3])


@pytest.fixture
def without_chlorine(molecules):
    data = molecules(torch.float32)
    rows = ~(data["numbers"] == 17).any(1)
    return {key: value[rows] for key, value in data.items()}


def rows_of(out, rows):
    return {key: value[rows] for key, value in out.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("layout", ["dense", "flat"])
def test_each_fidelity_gives_what_its_own_file_gives(combined, singles, without_chlorine, to_flat, layout):
    data = without_chlorine if layout == "dense" else to_flat(without_chlorine)
    n_mol = len(without_chlorine["numbers"])
    for f, single in enumerate(singles):
        expected = single(data)
        for fidelity in (torch.tensor(f), torch.tensor([f]), torch.full((n_mol,), f, dtype=torch.int32)):
            assert_same(combined({**data, "fidelity": fidelity}), expected)
    assert_same(combined(data), singles[0](data))


def test_difference_between_methods_in_one_call(combined, singles, without_chlorine):
    molecule = {key: value[3:4] for key, value in without_chlorine.items()}
    batch = {key: value.repeat_interleave(3, 0) for key, value in molecule.items()}
    out = combined({**batch, "fidelity": torch.tensor([2, 0, 1])})
    for row, f in enumerate([2, 0, 1]):
        assert_same(rows_of(out, slice(row, row + 1)), singles[f](molecule))
    assert len({float(energy) for energy in out["energy"]}) == 3


@pytest.mark.parametrize("layout", ["dense", "flat", "flat without charge"])
def test_molecules_of_a_batch_in_their_own_fidelities(combined, singles, without_chlorine, to_flat, layout, tolerance):
    n_mol = len(without_chlorine["numbers"])
    fidelity = torch.arange(n_mol) % 3
    data = without_chlorine
    if layout == "flat without charge":
        closed = [i for i in range(n_mol) if data["charge"][i] == 0 and data["mult"][i] == 1]
        data = {key: value[closed] for key, value in data.items()}
        fidelity = fidelity[closed]
    whole = data if layout == "dense" else to_flat(data)
    if layout == "flat without charge":
        whole = {key: value for key, value in whole.items() if key not in ("charge", "mult")}
    out = combined({**whole, "fidelity": fidelity})
    for f, single in enumerate(singles):
        chosen = fidelity == f
        part = {key: value[chosen] for key, value in data.items()}
        if layout == "dense":
            assert_same(rows_of(out, chosen), single(part))
            continue
        expected = single(to_flat(part))
        assert torch.equal(out["energy"][chosen], expected["energy"])
        assert torch.equal(out["forces"][chosen[whole["mol_idx"]]], expected["forces"])
    torch.testing.assert_close(
        out["energy"][fidelity == 1], singles[1](whole)["energy"][fidelity == 1], rtol=0, atol=1e-5
    )


def test_callers_neighbour_matrices(combined, singles, without_chlorine, to_flat):
    from aimnet2mult.neighborlist import neighbor_matrix

    data = {key: value[:4] for key, value in without_chlorine.items()}
    flat = to_flat(data)
    nbmat, _ = neighbor_matrix(flat["coord"], flat["mol_idx"], 5.0, None)
    nbmat_lr, _ = neighbor_matrix(flat["coord"], flat["mol_idx"], 1000.0, None)
    given = {
        **flat,
        "coord": torch.cat([flat["coord"], torch.zeros(1, 3)]),
        "numbers": torch.cat([flat["numbers"], torch.zeros(1, dtype=torch.long)]),
        "mol_idx": torch.cat([flat["mol_idx"], flat["mol_idx"][-1:]]),
        "nbmat": nbmat,
        "nbmat_lr": nbmat_lr,
    }
    fidelity = torch.tensor([1, 0, 1, 2])
    out = combined({**given, "fidelity": fidelity})
    expected = combined({**flat, "fidelity": fidelity})
    torch.testing.assert_close(out["energy"], expected["energy"], rtol=0, atol=1e-5)
    torch.testing.assert_close(out["forces"][:-1], expected["forces"], rtol=0, atol=1e-5)
    assert (out["forces"][-1] == 0).all()


def test_graph_goes_through_a_mixed_batch(files, without_chlorine):
    model = load_jit_model(files[3])
    model.module.double()
    data = {
        key: value[:3].double() if value.is_floating_point() else value[:3] for key, value in without_chlorine.items()
    }
    coord = data["coord"].clone().requires_grad_(True)
    for _ in range(3):
        out = model({**data, "coord": coord, "fidelity": torch.tensor([0, 1, 0])})
        (gradient,) = torch.autograd.grad(out["energy"].sum(), coord, retain_graph=True)
        torch.testing.assert_close(-gradient, out["forces"].detach(), atol=1e-10, rtol=0)
        (second,) = torch.autograd.grad(out["forces"].pow(2).sum(), coord)
        assert torch.isfinite(second).all()


def test_file_holds_what_fidelities_share_once(files):
    sizes = [path.stat().st_size for path in files]
    network_and_dispersion = sizes[0]
    # Beside them: embedding, readouts, energies and golden cases of two more fidelities, and three times the program.
    assert sizes[3] < 0.65 * sum(sizes[:3])
    assert sizes[3] < network_and_dispersion + 500_000


def test_first_calls_do_not_depend_on_the_number_of_fidelities(files):
    """Each fidelity is a graph of its own, which the executor sees when it is called."""
    graph = load_jit_model(files[3]).module.inlined_graph  # of a model that has not been called
    assert {node.s("name") for node in graph.findAllNodes("prim::CallMethod")} == {"forward", "set_options"}


def test_file_says_what_it_is(files, combined):
    with torchscript_deprecation_ignored():
        raw = torch.jit.load(str(files[3]))
    assert raw.fidelity_names == ["fid0", "fid1", "fid2"]
    assert raw.default_fidelity == 0
    assert raw.fidelity_species == [[1, 6, 7, 8, 9, 17], [1, 6, 7, 8, 9], [1, 6, 7, 8, 9, 17]]
    assert raw.species == [1, 6, 7, 8, 9, 17]
    assert raw.cutoff == 5.0
    assert raw.cutoff_lr == float("inf")
    metadata = combined.metadata
    assert metadata["fidelity_names"] == raw.fidelity_names
    assert [own["sae"][1] for own in metadata["fidelities"]] == [-13.587, -10.7, -13.6]
    assert "training" not in metadata["fidelities"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fidelity": torch.tensor(3)},
            r"fidelity 3 is unknown: the model has the fidelities 0 \(fid0\), 1 \(fid1\), 2",
        ),
        ({"fidelity": torch.tensor([0, -1])}, "fidelity -1 is unknown"),
        ({"fidelity": torch.tensor([0, 1, 1])}, "fidelity has 3 entries for 2 molecules"),
        ({"fidelity": torch.zeros(0, dtype=torch.long)}, "fidelity has 0 entries for 2 molecules"),
        ({"fidelity": torch.tensor([0.0, 1.0])}, "fidelity must hold whole numbers"),
        (
            {"fidelity": torch.tensor([0, 1]), "numbers": torch.tensor([[17, 1, 0], [17, 1, 0]])},
            r"Cl \(17\) is not among the elements of fidelity 1: H \(1\), C",
        ),
        ({"fidelity": torch.tensor([0, 1]), "coord": torch.zeros(2, 3, 2)}, "must have shape"),
        ({"fidelity": torch.tensor([0, 1]), "mult": torch.ones(3)}, "mult has 3 entries for 2 molecules"),
        ({"fidelity": torch.tensor([0, 1]), "charge": torch.zeros(3)}, "charge has 3 entries for 2 molecules"),
    ],
)
def test_bad_input_is_refused(combined, change, message):
    hydrogen = {"coord": torch.rand(2, 3, 3) + torch.arange(3).view(1, 3, 1), "numbers": torch.tensor([[1, 1, 0]] * 2)}
    with pytest.raises(ValueError, match=message):
        combined({**hydrogen, **change})
    assert torch.is_grad_enabled()


def test_default_may_be_set_and_input_stays(files, singles, without_chlorine):
    model = load_jit_model(files[3])
    model.module.default_fidelity = 2
    data = {**without_chlorine, "fidelity": torch.zeros(len(without_chlorine["numbers"]), dtype=torch.long)}
    before = {key: value.clone() for key, value in data.items()}
    assert_same(model(data), singles[0](without_chlorine))
    assert data.keys() == before.keys()
    assert all(torch.equal(data[key], before[key]) for key in data)
    assert_same(model(without_chlorine), singles[2](without_chlorine))


def test_flat_molecules_that_cannot_be_told_apart(combined):
    atoms = {"coord": torch.eye(3), "numbers": torch.ones(3, dtype=torch.long), "fidelity": torch.tensor([0, 1])}
    for mol_idx, message in [([0, 1, 0], "mol_idx must be sorted"), ([0, 1, 2], "mol_idx must be between 0 and 1")]:
        with pytest.raises(ValueError, match=message):
            combined({**atoms, "mol_idx": torch.tensor(mol_idx), "charge": torch.zeros(2)})


def test_batch_without_molecules(combined):
    nothing = {"coord": torch.zeros(0, 3, 3), "numbers": torch.zeros(0, 3, dtype=torch.long)}
    assert combined({**nothing, "fidelity": torch.zeros(0, dtype=torch.long)})["energy"].shape == (0,)


def test_default_that_there_is_not(files, without_chlorine):
    model = load_jit_model(files[3])
    model.module.default_fidelity = 3
    with pytest.raises(ValueError, match="fidelity 3 is unknown"):
        model(without_chlorine)


def test_options_hold_for_all_fidelities(files, without_chlorine):
    model = load_jit_model(files[3])
    model.module.compute_hessian = True
    data = {key: value[:2] for key, value in without_chlorine.items()}
    mixed = model({**data, "fidelity": torch.tensor([1, 0])})
    for row, f in enumerate([1, 0]):
        alone = model({**{key: value[row : row + 1] for key, value in data.items()}, "fidelity": torch.tensor(f)})
        assert torch.equal(mixed["hessian"][row], alone["hessian"][0])
    model.module.compute_hessian = False
    assert "hessian" not in model(data)


def test_coulomb_method_of_all_fidelities(files):
    model = load_jit_model(files[3])
    model.module.set_coulomb_method("dsf", 12.0)
    cell = torch.eye(3) * 30.0
    water = torch.tensor([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])
    data = {
        "coord": torch.stack([water, water]),
        "numbers": torch.tensor([[8, 1, 1]] * 2),
        "cell": cell,
        "fidelity": torch.tensor([0, 2]),
    }
    model.module.compute_stress = True
    both = model(data)
    assert both["stress"].shape == (2, 3, 3)
    for row, f in enumerate([0, 2]):
        alone = model({"coord": water, "numbers": data["numbers"][0], "cell": cell, "fidelity": torch.tensor(f)})
        torch.testing.assert_close(both["energy"][row], alone["energy"][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(both["stress"][row], alone["stress"], rtol=0, atol=1e-8)
    assert model.module.cutoff_lr_periodic < float("inf")


def test_range_of_dispersion_in_those_that_have_it(files, without_chlorine, fixtures_dir, tmp_path):
    model = load_jit_model(files[3])
    before = model(without_chlorine)["energy"]
    model.set_dispersion_cutoff(4.0)
    assert (model(without_chlorine)["energy"] - before).abs().max() > 1e-4
    sae = {f: files[0].parent / f"sae{f}.yaml" for f in SAE}
    options = {"model": fixtures_dir / "ref_mixed_model.yaml", "sae": sae}
    path, _ = compile_model(fixtures_dir / "ref_mixed.pt", tmp_path / "m", combined=True, **options)
    with pytest.raises(ValueError, match="this model has no D3 dispersion"):
        load_jit_model(path).set_dispersion_cutoff(4.0)


def test_equal_tensors_become_one():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.load_state_dict(first.state_dict())
    second.register_buffer("table", torch.ones(3))
    first.register_buffer("table", torch.full((3,), 2.0))
    assert share_equal_tensors([first, second]) == 2
    assert first.weight is second.weight
    assert first.table is not second.table


def test_names_and_models_must_match():
    with pytest.raises(ValueError, match="need as many names"):
        CombinedModel([], [])
