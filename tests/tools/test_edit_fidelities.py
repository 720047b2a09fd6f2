"""Fidelities of a checkpoint come and go; the others predict the same to the last bit."""

import copy

import pytest
import torch
from click.testing import CliRunner

from aimnet2mult.models.base import build_model, load_checkpoint, load_model_config, load_weights, save_checkpoint
from aimnet2mult.tools.edit_fidelities import edit_fidelities, main
from aimnet2mult.train.fidelity_specific_utils import transfer_weights

NAMES = ("dft", "ccsd", "gfn2")
SAE = {f: {1: -13.5 - f, 6: -1029.4, 8: -2041.8 + f} for f in range(3)}


@pytest.fixture(scope="module")
def config(request):
    return load_model_config(request.config.rootpath / "tests" / "fixtures" / "ref_single_model.yaml")


def trained_model(config, heads, num_fidelities=3, offset=200):
    """A model all of whose used weights differ between fidelities, as after training."""
    torch.manual_seed(3)
    model = build_model(copy.deepcopy(config), num_fidelities, offset, heads).eval()
    with torch.no_grad():
        for f in range(num_fidelities):
            rows = slice(f * offset + 1, f * offset + 119)
            model.afv.weight[rows] += 0.1 * torch.randn_like(model.afv.weight[rows])
            for name, weight in model.named_parameters():
                if name.endswith("shifts.weight") and f"readouts.{f}." in name.replace("outputs.", f"readouts.{f}."):
                    weight[rows] = torch.randn_like(weight[rows])
                elif name.startswith(f"fidelity_readouts.{f}."):
                    weight += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture(params=[True, False], ids=["own readouts", "common readouts"])
def heads(request):
    return request.param


@pytest.fixture
def checkpoint(tmp_path, config, heads):
    """Three fidelities, with all that a checkpoint may hold."""
    path = tmp_path / "in.pt"
    label = {"method": "none", "functional": None, "parameters": None}
    save_checkpoint(
        path,
        trained_model(config, heads),
        model_config=config,
        num_fidelities=3,
        fidelity_offset=200,
        use_fidelity_readouts=heads,
        fidelity_names=dict(enumerate(NAMES)),
        fidelity_levels={0: "B3LYP", 2: "GFN2-xTB"},
        sae=SAE,
        species={0: [1, 6, 8], 1: [1, 8], 2: [1, 6, 8]},
        dispersion={f: {"labels": label, "subtracted": False} for f in range(3)},
        extra={"train_config": {"seed": 1}, "training": {"epoch": 3}, "remark": "of another program"},
    )
    return path


def model_of(path):
    """The model that a checkpoint describes, every weight accounted for."""
    content = load_checkpoint(path)
    model = build_model(
        content["model_config"],
        content["num_fidelities"],
        content["fidelity_offset"],
        content["use_fidelity_readouts"],
    )
    load_weights(model, content["model"])
    return model.eval()


def energies(model, fidelity, elements=(6, 8)):
    """Energies of two molecules, one padded, at a fidelity."""
    first, second = elements
    numbers = torch.tensor([[first, second, 1, 1], [second, 1, 1, 0]])
    coord = torch.tensor(
        [[[0.0, 0, 0], [1.2, 0, 0], [-0.6, 0.9, 0], [-0.6, -0.9, 0.1]], [[0, 0, 0], [0.9, 0, 0], [0, 0.9, 0], [0] * 3]]
    )
    offset = getattr(model, "fidelity_offset", 200)
    batch = {
        "coord": coord,
        "numbers": numbers + (numbers > 0) * fidelity * offset,
        "charge": torch.zeros(2),
        "mult": torch.ones(2),
        "_fidelities": torch.full((2,), fidelity),
    }
    with torch.no_grad():
        return model(batch)["energy"]


@pytest.fixture
def before(checkpoint):
    """Energies of each fidelity before any change, by name; all different."""
    model = model_of(checkpoint)
    result = {name: energies(model, f) for f, name in enumerate(NAMES)}
    assert len({values[0].item() for values in result.values()}) == 3
    return result


@pytest.fixture
def run(checkpoint, tmp_path):
    """Call the command on the checkpoint; returns (result, path of the output)."""

    def call(*args, source=checkpoint, output=tmp_path / "out.pt"):
        return CliRunner().invoke(main, [str(source), str(output), *map(str, args)]), output

    return call


# --- what stays, stays --------------------------------------------------------------------------

OPERATIONS = {
    "add": (["--add", "new=ccsd"], {0: "dft", 1: "ccsd", 2: "gfn2", 3: "ccsd"}),
    "drop the first": (["--drop", "dft"], {0: "ccsd", 1: "gfn2"}),
    "drop the last": (["--drop", "gfn2"], {0: "dft", 1: "ccsd"}),
    "rename": (["--rename", "dft=b3lyp"], {0: "dft", 1: "ccsd", 2: "gfn2"}),
    "order": (["--order", "gfn2,dft,ccsd"], {0: "gfn2", 1: "dft", 2: "ccsd"}),
    "one is left": (["--drop", "dft", "--drop", "gfn2"], {0: "ccsd"}),
    "merge": (["--merge", "x=ccsd,dft", "--sae", "x=SAE"], {1: "gfn2"}),
    "merge in the place of the first": (["--merge", "x=gfn2,ccsd", "--sae", "x=SAE"], {0: "dft"}),
    "names change hands": (
        ["--rename", "dft=x", "--rename", "ccsd=dft", "--rename", "x=ccsd", "--order", "gfn2,ccsd,dft"],
        {0: "gfn2", 1: "dft", 2: "ccsd"},
    ),
    "all at once": (
        ["--add", "a=gfn2", "--drop", "gfn2", "--rename", "a=gfn2", "--order", "gfn2,ccsd,dft"],
        {0: "gfn2", 1: "ccsd", 2: "dft"},
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_predictions_stay_the_same_to_the_last_bit(run, before, sae_file, name):
    arguments, origins = OPERATIONS[name]
    result, output = run(*(argument.replace("SAE", str(sae_file)) for argument in arguments))
    assert result.exit_code == 0, result.output
    model = model_of(output)
    for fidelity, origin in origins.items():
        assert torch.equal(energies(model, fidelity), before[origin]), origin
    assert result.output.splitlines()[-1] == str(output)


def test_descriptions_move_with_their_fidelities(run, checkpoint):
    _, output = run("--drop", "dft", "--add", "new=gfn2", "--rename", "gfn2=xtb")
    content = load_checkpoint(output)
    assert content["fidelity_names"] == {0: "ccsd", 1: "xtb", 2: "new"}
    assert content["sae"] == {0: SAE[1], 1: SAE[2], 2: SAE[2]}
    assert content["species"] == {0: [1, 8], 1: [1, 6, 8], 2: [1, 6, 8]}
    assert content["fidelity_levels"] == {1: "GFN2-xTB", 2: "GFN2-xTB"}
    assert set(content["dispersion"]) == {0, 1, 2}
    assert content["edits"] == ["--drop dft", "--add new=gfn2", "--rename gfn2=xtb"]
    assert content["model_config"] == load_checkpoint(checkpoint)["model_config"]


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_what_is_left_out_is_said(run):
    result, output = run("--rename", "dft=b3lyp")
    assert "note: left out: the state of its training" in result.output
    assert "note: left out: the settings of its training" in result.output
    assert "note: left out: the entry remark" in result.output
    assert result.output.count("left out") == 3
    assert not {"training", "train_config", "remark"} & set(load_checkpoint(output))


@pytest.mark.parametrize(
    ("there", "back"),
    [
        (["--add", "new=dft"], ["--drop", "new"]),
        (["--rename", "dft=x"], ["--rename", "x=dft"]),
        (["--order", "ccsd,gfn2,dft"], ["--order", "dft,ccsd,gfn2"]),
    ],
)
def test_there_and_back_is_the_same_checkpoint(run, checkpoint, tmp_path, there, back):
    result, middle = run(*there)
    assert result.exit_code == 0, result.output
    result, end = run(*back, source=middle, output=tmp_path / "back.pt")
    assert result.exit_code == 0, result.output
    first, last = load_checkpoint(checkpoint), load_checkpoint(end)
    used = {f * 200 + z for f in range(3) for z in range(1, 119)} | {0}
    for key, value in first["model"].items():
        rows = sorted(used) if key.endswith(("afv.weight", "shifts.weight")) else ...
        assert torch.equal(last["model"][key][rows], value[rows]), key
    assert first["model"].keys() == last["model"].keys()
    for key in ("model_config", "num_fidelities", "fidelity_names", "sae", "species", "fidelity_levels", "dispersion"):
        assert first[key] == last[key], key


def test_adding_and_dropping_leaves_every_row_alone(run, checkpoint, tmp_path):
    """Rows between the blocks of fidelities, which nothing reads, too."""
    _, middle = run("--add", "new=dft")
    _, end = run("--drop", "new", source=middle, output=tmp_path / "back.pt")
    first, last = load_checkpoint(checkpoint)["model"], load_checkpoint(end)["model"]
    assert all(torch.equal(last[key], value) for key, value in first.items())


# --- one and several ----------------------------------------------------------------------------


def test_one_fidelity_is_a_plain_aimnet2_and_may_get_a_second(run, config, before, tmp_path):
    result, plain = run("--drop", "dft", "--drop", "ccsd")
    assert "a plain AIMNet2" in result.output
    content = load_checkpoint(plain)
    assert content["num_fidelities"] == 1
    model = build_model(config)
    load_weights(model, content["model"])
    assert torch.equal(energies(model.eval(), 0), before["gfn2"])

    result, two = run("--add", "new=gfn2", source=plain, output=tmp_path / "two.pt")
    assert result.exit_code == 0, result.output
    both = model_of(two)
    for fidelity in (0, 1):
        assert torch.equal(energies(both, fidelity), before["gfn2"])
    result, again = run("--drop", "new", source=two, output=tmp_path / "again.pt")
    assert all(torch.equal(load_checkpoint(again)["model"][key], value) for key, value in content["model"].items())


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_bare_weights_of_one_fidelity_get_a_second(run, fixtures_dir, reference_model):
    single = reference_model("ref_single", torch.float32)
    arguments = ["--add", "ccsd=fid0", "--rename", "fid0=dft", "--model", fixtures_dir / "ref_single_model.yaml"]
    result, output = run(*arguments, source=fixtures_dir / "ref_single.pt")
    assert result.exit_code == 0, result.output
    model = model_of(output)
    assert load_checkpoint(output)["fidelity_names"] == {0: "dft", 1: "ccsd"}
    for fidelity in (0, 1):
        assert torch.equal(energies(model, fidelity), energies(single, 0))


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_weights_without_a_model_file_can_be_edited_too(run, fixtures_dir, reference_model, tmp_path):
    mixed = reference_model("ref_mixed", torch.float32)
    result, output = run("--drop", "fid0", "--add", "new=fid2", source=fixtures_dir / "ref_mixed.pt")
    assert result.exit_code == 0, result.output
    assert "16 copies of readouts, which the model does not use, are left out" in result.output
    content = load_checkpoint(output)
    assert "model_config" not in content
    model = build_model(load_model_config(fixtures_dir / "ref_mixed_model.yaml"), 3).eval()
    load_weights(model, content["model"])
    for fidelity, origin in {0: 1, 1: 2, 2: 2}.items():
        assert torch.equal(energies(model, fidelity), energies(mixed, origin))
    result, one = run("--drop", "fid1", "--drop", "new", source=output, output=tmp_path / "one.pt")
    assert result.exit_code == 0, result.output
    plain = copy.deepcopy(load_model_config(fixtures_dir / "ref_single_model.yaml"))
    plain["kwargs"]["num_types"] = 129
    model = build_model(plain).eval()
    load_weights(model, load_checkpoint(one)["model"])
    assert torch.equal(energies(model, 0), energies(mixed, 2))


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_elements_that_a_short_embedding_lacks_are_marked_as_unknown(tmp_path, config, run):
    """As of published AIMNet2 models, whose tables end at Z = 63."""
    short = copy.deepcopy(config)
    short["kwargs"]["num_types"] = 64
    torch.manual_seed(1)
    model = build_model(short).eval()
    path = tmp_path / "short.pt"
    options = {"num_fidelities": 1, "fidelity_offset": 200, "use_fidelity_readouts": True}
    save_checkpoint(path, model, model_config=short, **options)
    result, output = run("--add", "new=fid0", source=path)
    assert result.exit_code == 0, result.output
    both = model_of(output)
    for f in (0, 1):
        assert torch.equal(energies(both, f), energies(model, 0))
        rows = both.afv.weight[f * 200 + 1 : f * 200 + 119]
        assert rows[63:].isnan().all()
        assert not rows[:63].isnan().any()
    into = build_model(config, 2).eval()  # training from it: unknown elements keep initial rows
    transfer_weights(into, load_checkpoint(output))
    assert torch.isfinite(into.afv.weight).all()
    assert torch.equal(energies(into, 1), energies(model, 0))
    _, back = run("--drop", "new", source=output, output=tmp_path / "back.pt")
    assert all(torch.equal(load_checkpoint(back)["model"][k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_one_of_several_keeps_the_elements_that_a_short_model_file_has_no_rows_for(tmp_path, config, run):
    short = copy.deepcopy(config)
    short["kwargs"]["num_types"] = 10
    path = tmp_path / "mixed.pt"
    model = trained_model(short, True, 2)
    options = {"num_fidelities": 2, "fidelity_offset": 200, "use_fidelity_readouts": True}
    save_checkpoint(path, model, model_config=short, **options)
    result, output = run("--drop", "fid0", source=path)
    assert "note: model configuration: num_types is 129 now" in result.output
    assert torch.equal(energies(model_of(output), 0, (17, 35)), energies(model, 1, (17, 35)))


@pytest.mark.parametrize("num_left", [1, 2])
def test_result_compiles_and_starts_a_training(run, before, config, tmp_path, sae_file, num_left):
    from aimnet2mult.models.jit_wrapper import load_jit_model
    from aimnet2mult.tools.compile_jit import compile_model

    drops = ["--drop", "dft", "--drop", "ccsd"][: 2 * (3 - num_left)]
    _, output = run(*drops, "--sae", f"gfn2={sae_file}")
    jpt, _ = compile_model(output, tmp_path / "compiled", fidelity_level="gfn2")
    molecule = {"coord": torch.tensor([[[0.0, 0, 0], [0.9, 0, 0], [0, 0.9, 0]]]), "numbers": torch.tensor([[8, 1, 1]])}
    energy = load_jit_model(jpt)(molecule)["energy"]
    residual = energy - (-2041.789 - 2 * 13.587)
    assert residual.item() == pytest.approx(before["gfn2"][1].item(), abs=1e-4)

    model = build_model(config, 3, 150).eval()
    last = num_left - 1
    transfer_weights(model, load_checkpoint(output), {0: last, 1: last, 2: last})
    assert torch.equal(energies(model, 2), before["gfn2"])


# --- merging ------------------------------------------------------------------------------------


def test_merged_weights_are_weighted_means_of_what_was_trained(run, checkpoint, sae_file, heads):
    result, output = run("--merge", "both=dft:3,ccsd:1", "--sae", f"both={sae_file}")
    assert result.exit_code == 0, result.output
    old, new = load_checkpoint(checkpoint)["model"], load_checkpoint(output)["model"]

    def mean(a, b):
        return (0.75 * a.double() + 0.25 * b.double()).float()

    table = old["afv.weight"]
    assert torch.equal(new["afv.weight"][1], mean(table[1], table[201]))
    assert torch.equal(new["afv.weight"][6], table[6])  # ccsd was not trained on carbon
    assert torch.equal(new["afv.weight"][7], mean(table[7], table[207]))  # nobody on nitrogen
    key = "{}energy_mlp.mlp.0.weight"
    if heads:
        parts = [old[key.format(f"fidelity_readouts.{f}.")] for f in (0, 1)]
        assert torch.equal(new[key.format("fidelity_readouts.0.")], mean(*parts))
        shifts = [old[f"fidelity_readouts.{f}.atomic_shift.shifts.weight"] for f in (0, 1)]
        assert torch.equal(
            new["fidelity_readouts.0.atomic_shift.shifts.weight"][[1, 6]],
            torch.stack([mean(shifts[0][1], shifts[1][201]), shifts[0][6]]),
        )
    else:
        assert torch.equal(new[key.format("outputs.")], old[key.format("outputs.")])
    content = load_checkpoint(output)
    assert content["species"][0] == [1, 6, 8]
    assert content["sae"][0][6] == pytest.approx(-1029.476)
    assert 0 not in content["fidelity_levels"]
    assert "both: the level of theory is left out" in result.output


def test_equal_fidelities_merge_into_themselves(run, before, tmp_path):
    _, two = run("--add", "twin=dft")
    result, output = run("--merge", "dft=dft,twin", source=two, output=tmp_path / "merged.pt")
    assert result.exit_code == 0, result.output
    assert torch.equal(energies(model_of(output), 0), before["dft"])
    assert load_checkpoint(output)["sae"] == SAE
    assert load_checkpoint(output)["fidelity_levels"][0] == "B3LYP"


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_different_dispersion_does_not_merge(run, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["dispersion"][0]["subtracted"] = True
    torch.save(content, checkpoint)
    result, output = run("--merge", "x=dft,ccsd")
    assert result.exit_code == 2
    assert "--merge: the fidelities for x do not have the same dispersion subtracted" in result.output
    assert not output.exists()


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_info_shows_and_writes_nothing(checkpoint, tmp_path):
    result = CliRunner().invoke(main, [str(checkpoint), "--info"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[1].split()[:2] == ["0", "dft"]
    assert "H (1), O (8)" in lines[2]
    assert "GFN2-xTB" in lines[3]
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_input_is_replaced_only_on_request(run, checkpoint):
    old = checkpoint.read_bytes()
    result, _ = run("--drop", "dft", output=checkpoint)
    assert result.exit_code == 2
    assert f"{checkpoint}: exists; choose another name, or --overwrite" in result.output
    assert checkpoint.read_bytes() == old
    result, _ = run("--drop", "dft", "--overwrite", output=checkpoint)
    assert result.exit_code == 0
    assert load_checkpoint(checkpoint)["num_fidelities"] == 2


@pytest.mark.parametrize("heads", [True], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop", "dtf"], "--drop: there is no fidelity dtf; did you mean dft?"),
        (["--add", "new=xyz"], "--add: there is no fidelity xyz; known: dft, ccsd, gfn2"),
        (["--add", "new"], "--add: expected NEW=OLD, found 'new'"),
        (["--add", "dft=ccsd"], "--add: there is a fidelity dft already"),
        (["--add", "2nd=ccsd"], "--add: '2nd' is not a name for a fidelity"),
        (["--rename", "dft=ccsd"], "--rename: there is a fidelity ccsd already"),
        (["--rename", "0=x"], "--rename: there is no fidelity 0; known: dft"),
        (["--order", "dft,ccsd"], "--order: expected each of dft, ccsd, gfn2 once, found dft, ccsd"),
        (["--order", "dft,ccsd,ccsd"], "--order: expected each of dft, ccsd, gfn2 once"),
        (["--merge", "x=dft"], "--merge: needs two fidelities or more, found dft"),
        (["--merge", "x=dft,dft"], "--merge: dft is there twice"),
        (["--merge", "x=dft:0,ccsd"], "--merge: the weight of dft is '0'; expected a positive number"),
        (["--merge", "gfn2=dft,ccsd"], "--merge: there is a fidelity gfn2 already"),
        (
            ["--merge", "x=dft,ccsd"],
            "--sae: the self-atomic energies of H (1) of the fidelities merged into x differ: -13.5 and -14.5 eV; give "
            "those of the result with --sae x=FILE",
        ),
        (["--drop", "dft", "--drop", "ccsd", "--drop", "gfn2"], "--drop: gfn2 is the only fidelity"),
        (["--drop", "dft", "--add", "x=dft"], "--add: there is no fidelity dft; known: ccsd, gfn2"),
        (["--sae", "dtf=x.yaml"], "--sae: there is no fidelity dtf; did you mean dft?"),
        (["--sae", "dft=x.yaml"], "x.yaml: no such file"),
        (["--drop", "dft", "--fidelity-offset", "150"], "--fidelity-offset 150: the checkpoint says 200"),
        (["--drop", "dft", "--fidelity-offset", "0"], "--fidelity-offset 0: the checkpoint says 200"),
        (["--info"], "--info: only shows IN.pt"),
        ([], "nothing to do"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(run, arguments, message):
    result, output = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not output.exists()


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_sae_without_an_element_of_the_fidelity(run, tmp_path):
    (tmp_path / "sae.yaml").write_text("1: -13.6\n8: -2041.0\n")
    result, _ = run("--sae", f"dft={tmp_path / 'sae.yaml'}")
    assert result.exit_code == 2
    assert "has no energy of C (6), which dft was trained on" in result.output


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_model_file_that_is_not_the_checkpoints(run, fixtures_dir, tmp_path):
    other = (fixtures_dir / "ref_mixed_model.yaml").read_text().replace("aim_size: 32", "aim_size: 16")
    (tmp_path / "other.yaml").write_text(other.replace("n_in: 32", "n_in: 16"))
    result, _ = run("--drop", "dft", "--model", tmp_path / "other.yaml")
    assert "differs from the configuration in the checkpoint" in result.output
    bare = fixtures_dir / "ref_mixed.pt"
    result, _ = run("--drop", "fid0", "--model", tmp_path / "other.yaml", source=bare)
    assert result.exit_code == 2
    assert "the weights are of another architecture than the model" in result.output


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_weights_of_one_fidelity_need_a_model_file_to_get_a_second(run, fixtures_dir):
    result, _ = run("--rename", "fid0=x", "--fidelity-offset", 0, source=fixtures_dir / "ref_single.pt")
    assert "--fidelity-offset: must be at least 129, found 0" in result.output
    result, output = run("--add", "x=fid0", source=fixtures_dir / "ref_single.pt")
    assert result.exit_code == 2
    assert "--model: the checkpoint does not hold its model configuration; give the YAML file" in result.output
    assert not output.exists()


@pytest.mark.parametrize("heads", [True], indirect=True)
def test_operations_happen_in_the_order_given(checkpoint, tmp_path):
    parts = edit_fidelities(checkpoint, tmp_path / "o.pt", [("add", "x=dft"), ("drop", "dft"), ("rename", "x=dft")])
    assert parts.names == ["ccsd", "gfn2", "dft"]
    with pytest.raises(ValueError, match="there is a fidelity dft already"):
        edit_fidelities(checkpoint, tmp_path / "p.pt", [("add", "x=dft"), ("rename", "x=dft"), ("drop", "dft")])
