"""All fidelities in one call: the numbers of separate calls, one pass of the network, and what a fidelity lacks."""

import logging

import pytest
import torch

from aimnet2mult.models.all_fidelities import evaluate_all, load_all_fidelities
from aimnet2mult.models.base import load_checkpoint, load_model_config, save_checkpoint
from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.loading import load_potential
from aimnet2mult.models.mixed_fidelity_aimnet2 import has_shared_embedding
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import encode_fidelity
from aimnet2mult.tools.compile_jit import compile_model

F = 3
SAE = {f: {1: -13.5 - f, 6: -1029.0 + 300 * f, 7: -1485.2, 8: -2041.8, 9: -2715.3, 17: -12518.7} for f in range(F)}
del SAE[1][17]
D3_PARAMETERS = {"s6": 1.0, "s8": 1.9889, "a1": 0.3981, "a2": 4.4211}
D3 = {"labels": {"method": "d3bj", "functional": "b3lyp", "parameters": D3_PARAMETERS}, "subtracted": True}
NONE = {"labels": {"method": "none", "functional": None, "parameters": None}, "subtracted": False}
SAME = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module", params=["own rows", "shared rows"])
def checkpoint(request, tmp_path_factory, fixtures_dir):
    """Three fidelities in float64, of which the first has D3 and the second no chlorine; whether rows are shared."""
    shared = request.param == "shared rows"
    weights = {
        k: v.double() if v.is_floating_point() else v
        for k, v in load_checkpoint(fixtures_dir / "ref_mixed.pt")["model"].items()
    }
    if shared:
        table = weights["afv.weight"]
        for f in range(1, F):
            table[f * 200 : f * 200 + 129] = table[:129]
    path = tmp_path_factory.mktemp("all") / "model.pt"
    save_checkpoint(
        path,
        weights,
        model_config=load_model_config(fixtures_dir / "ref_mixed_model.yaml"),
        num_fidelities=F,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        fidelity_names={0: "dft", 1: "gfn2", 2: "gfn1"},
        sae=SAE,
        dispersion={0: D3, 1: NONE, 2: NONE},
    )
    return path, shared


@pytest.fixture(scope="module")
def model(checkpoint):
    loaded = load_all_fidelities(checkpoint[0])
    loaded.module.double()
    return loaded


@pytest.fixture(scope="module")
def compiled(checkpoint):
    path, _ = compile_model(checkpoint[0], checkpoint[0].parent / "m", combined=True)
    loaded = load_jit_model(path)
    loaded.module.double()
    return loaded


@pytest.fixture(scope="module")
def singles(checkpoint):
    found = [load_potential(checkpoint[0], fidelity=f) for f in range(F)]
    for single in found:
        single.module.double()
    return found


@pytest.fixture(params=["dense", "flat", "large"])
def batch(request, molecules, to_flat, model, compiled, singles):
    """Molecules without chlorine in a layout; large ones get lists of neighbours."""
    data = molecules()
    rows = ~(data["numbers"] == 17).any(1)
    data = {key: value[rows] for key, value in data.items()}
    for one in (model, compiled, *singles):
        one.nb_threshold = 0 if request.param == "large" else 120
    yield to_flat(data) if request.param == "flat" else data
    for one in (model, compiled, *singles):
        one.nb_threshold = 120


def separately(singles, data):
    out = [single(data) for single in singles]
    return {key: torch.stack([o[key] for o in out]) for key in ("energy", "forces")}


def passes(model, monkeypatch) -> list[int]:
    """Record calls of the first network of each fidelity."""
    calls: list[int] = []
    for f, part in enumerate(model.module.models):
        first = part.model.mlps[0]
        monkeypatch.setattr(first, "forward", lambda x, f=f, forward=first.forward: calls.append(f) or forward(x))
    return calls


def test_one_call_is_separate_calls(model, compiled, singles, batch):
    expected = separately(singles, batch)
    assert (expected["energy"][0] - expected["energy"][1]).abs().min() > 0.1
    for one in (model, compiled):
        out = evaluate_all(one, batch, forces=True)
        assert set(out) == {"energy", "forces", "known"}
        assert out["energy"].dtype == torch.float64
        assert out["known"].all()
        for key in ("energy", "forces"):
            torch.testing.assert_close(out[key], expected[key], **SAME)
        energies = evaluate_all(one, batch)
        assert set(energies) == {"energy", "known"}
        torch.testing.assert_close(energies["energy"], expected["energy"], **SAME)


@pytest.mark.parametrize("forces", [False, True])
def test_the_network_is_evaluated_once_where_it_is_shared(checkpoint, model, molecules, monkeypatch, forces):
    calls = passes(model, monkeypatch)
    data = {key: value[:3] for key, value in molecules().items()}
    evaluate_all(model, data, forces)
    assert calls == ([0] if checkpoint[1] else [0, 1, 2])
    assert model.module.shared_backbone == checkpoint[1]


def test_compiled_file_knows_what_it_shares(checkpoint, compiled):
    with torchscript_deprecation_ignored():
        raw = torch.jit.load(str(checkpoint[0].parent / "m_all.jpt"))
    assert raw.shared_backbone == checkpoint[1]
    hydrogen = {"coord": torch.tensor([[[0.0, 0, 0], [0.74, 0, 0]]]), "numbers": torch.ones(1, 2, dtype=torch.long)}
    assert raw.all_fidelities(hydrogen)["energy"].shape == (F, 1)
    assert raw.all_fidelities(hydrogen, True)["forces"].shape == (F, 1, 2, 3)


@pytest.mark.parametrize("layout", ["dense", "flat"])
def test_a_fidelity_that_lacks_an_element_gives_nan(model, compiled, singles, molecules, to_flat, layout, caplog):
    data = molecules()
    chlorine = (data["numbers"] == 17).any(1)
    assert 0 < chlorine.sum() < len(chlorine)
    without = {key: value[~chlorine] for key, value in data.items()}
    expected = separately([singles[0], singles[2]], data)
    part = singles[1](without)
    given = data if layout == "dense" else to_flat(data)
    for one in (model, compiled):
        with caplog.at_level(logging.WARNING):
            out = evaluate_all(one, given, forces=True)
        assert caplog.messages[-1] == "energies are NaN: gfn2 does not know Cl (17)"
        assert out["known"].tolist() == [[True] * len(chlorine), (~chlorine).tolist(), [True] * len(chlorine)]
        torch.testing.assert_close(out["energy"][[0, 2]], expected["energy"], **SAME)
        torch.testing.assert_close(out["energy"][1, ~chlorine], part["energy"], **SAME)
        assert out["energy"][1, chlorine].isnan().all()
        forces = out["forces"][1]
        lost = chlorine if layout == "dense" else chlorine[given["mol_idx"]]
        assert forces[lost].isnan().all()
        wanted = part["forces"] if layout == "dense" else part["forces"][without["numbers"] > 0]
        torch.testing.assert_close(forces[~lost], wanted, **SAME)


def test_graph_is_kept_if_asked_for(model, singles, molecules):
    data = {key: value[:2] for key, value in molecules().items()}
    coord = data["coord"].clone().requires_grad_(True)
    out = model.all_fidelities({**data, "coord": coord})
    (gradient,) = torch.autograd.grad(out["energy"][2].sum(), coord)
    torch.testing.assert_close(-gradient, singles[2](data)["forces"], **SAME)
    with torch.no_grad():
        assert not model.all_fidelities({**data, "coord": coord}, forces=True)["forces"].requires_grad
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.isfinite(model.all_fidelities(data, forces=True)["forces"]).all()


def test_options_and_the_choice_of_a_fidelity_do_not_matter(compiled, molecules):
    data = {key: value[:2] for key, value in molecules().items()}
    expected = compiled.all_fidelities(data, forces=True)
    compiled.module.compute_hessian = True
    out = compiled.all_fidelities({**data, "fidelity": torch.tensor(1)}, forces=True)
    assert set(out) == {"energy", "known", "forces"}
    assert torch.equal(out["forces"], expected["forces"])
    assert "hessian" in compiled(data)
    compiled.module.compute_hessian = False


def test_nothing(compiled):
    nothing = {"coord": torch.zeros(0, 3, 3), "numbers": torch.zeros(0, 3, dtype=torch.long)}
    out = compiled.all_fidelities(nothing, forces=True)
    assert out["energy"].shape == (F, 0)
    assert out["forces"].shape == (F, 0, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": torch.tensor([[35, 1]])}, r"^Br \(35\) is not among the elements of any fidelity: H \(1\), C"),
        ({"numbers": torch.tensor([[1, 300]])}, r"^Z=300 is not among the elements of any fidelity"),
        ({"coord": torch.zeros(1, 2, 3)}, "atoms 0 and 1 .* are on top of each other"),
        ({"coord": torch.full((1, 2, 3), torch.nan)}, "coord holds NaN"),
        ({"coord": torch.zeros(1, 2, 2)}, "coord must have shape"),
        ({"mult": torch.ones(2)}, "mult has 2 entries for 1 molecules"),
    ],
)
def test_bad_input_is_refused(model, compiled, change, message):
    hydrogen = {"coord": torch.tensor([[[0.0, 0, 0], [0.74, 0, 0]]]), "numbers": torch.ones(1, 2, dtype=torch.long)}
    for one in (model, compiled):
        for forces in (False, True):
            with pytest.raises(ValueError, match=message):
                one.all_fidelities({**hydrogen, **change}, forces)
    assert torch.is_grad_enabled()


def test_files_of_one_fidelity_are_refused(checkpoint, tmp_path):
    path, _ = compile_model(checkpoint[0], tmp_path / "m", fidelity_level="gfn1")
    with pytest.raises(ValueError, match=r"m_fid2\.jpt: a model of one fidelity: use AIMNet2Calculator"):
        load_all_fidelities(path)
    with pytest.raises(ValueError, match="this model is of one fidelity"):
        load_jit_model(path).all_fidelities({})
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_all_fidelities(tmp_path / "x.pt")
    torch.save({**load_checkpoint(checkpoint[0]), "sae": {}}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="no self-atomic energies of fidelity 0"):
        load_all_fidelities(tmp_path / "bare.pt")


# --------------------------------------------------------------------------------------------------
# a network in memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "flat", "one flat molecule"])
@pytest.mark.parametrize("shared", [False, True])
def test_network_in_memory(reference_model, molecules, to_flat, layout, shared, monkeypatch):
    network, data = reference_model("ref_mixed"), molecules()
    if shared:
        with torch.no_grad():
            for f in range(1, F):
                network.afv.weight[f * 200 + 1 : f * 200 + 129] = network.afv.weight[1:129]
    assert has_shared_embedding(network) == shared
    if layout == "flat":
        data = to_flat(data)
    elif layout != "dense":
        data = {key: value[3][data["numbers"][3] > 0] for key, value in data.items() if key in ("coord", "numbers")}
    alone = [Forces(network)({**data, "numbers": encode_fidelity(data["numbers"], f, 200)}) for f in range(F)]
    calls: list[int] = []
    first = network.mlps[0]
    monkeypatch.setattr(first, "forward", lambda x, forward=first.forward: calls.append(len(x)) or forward(x))
    for forces in (False, True):
        calls.clear()
        out = evaluate_all(network, data, forces)
        n_atoms = int((data["numbers"] > 0).sum())
        assert calls == [n_atoms if shared else F * n_atoms]
        for f in range(F):
            torch.testing.assert_close(out["energy"][f], alone[f]["energy"].detach(), **SAME)
            if forces:
                torch.testing.assert_close(out["forces"][f], alone[f]["forces"].detach(), **SAME)
    assert not out["energy"].requires_grad
    with pytest.raises(ValueError, match="without neighbour matrices"):
        evaluate_all(network, {**data, "nbmat": data["numbers"]})
