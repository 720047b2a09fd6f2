import logging
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner

from aimnet2mult.data.ledger import parse_dispersion
from aimnet2mult.models.base import build_model, load_model_config, save_checkpoint
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.tools.compile_jit import compile_model, main
from aimnet2mult.tools.compile_options import choose_coulomb, choose_dispersion, dispersion_of_flags
from aimnet2mult.tools.compile_source import differing_key


@pytest.fixture
def run(tmp_path):
    """Call the command with an output prefix in an empty folder; returns (result, files written)."""

    def call(*args, output=None):
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        result = CliRunner().invoke(main, [*map(str, args), "--output", str(output or folder / "model")])
        return result, sorted(path.name for path in folder.iterdir())

    return call


@pytest.fixture
def mixed(fixtures_dir, sae_file):
    """Arguments for the reference checkpoint, which knows nothing about itself."""
    return [
        "--weights",
        fixtures_dir / "ref_mixed.pt",
        "--model",
        fixtures_dir / "ref_mixed_model.yaml",
        "--sae",
        sae_file,
    ]


def save_own_checkpoint(path, config, **ledger):
    torch.manual_seed(0)
    save_checkpoint(
        path,
        build_model(config, 2),
        model_config=config,
        num_fidelities=2,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        fidelity_names={0: "dft", 1: "xtb"},
        sae={0: {1: -13.6, 8: -2041.8}, 1: {1: -10.7, 6: -50.0, 8: -104.0}},
        species={0: [1, 8], 1: [1, 6, 8]},
        **ledger,
    )
    return path


@pytest.fixture
def own_config(fixtures_dir):
    return load_model_config(fixtures_dir / "ref_single_model.yaml")


@pytest.fixture
def own_checkpoint(tmp_path, own_config):
    return save_own_checkpoint(tmp_path / "own.pt", own_config)


@pytest.fixture
def with_ledger(tmp_path, own_config):
    """Function: checkpoint whose fidelity 0 (dft) had labels with this dispersion."""

    def save(dispersion, subtracted=False, config=own_config):
        labels = parse_dispersion(dispersion, "x").to_dict()
        other = parse_dispersion({"d4": "gfn2"}, "x").to_dict()
        return save_own_checkpoint(
            tmp_path / "ledger.pt",
            config,
            fidelity_levels={0: "B3LYP/def2-SVP"},
            dispersion={0: {"labels": labels, "subtracted": subtracted}, 1: {"labels": other, "subtracted": False}},
        )

    return save


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="aimnet2mult.tools")
    return caplog


def test_reference_checkpoint_with_all_flags(run, mixed):
    flags = ["--fidelity-level", 2, "--num-fidelities", 3, "--fidelity-offset", 200, "--use-fidelity-readouts", "true"]
    result, files = run(*mixed, *flags, "--dispersion", "d3bj", "--dispersion-functional", "wB97M")
    assert result.exit_code == 0, result.output
    assert files == ["model_fid2.jpt", "model_fid2_meta.yaml"]
    assert [line.rpartition("/")[2] for line in result.output.split()[-2:]] == files


def test_checkpoint_that_knows_itself_needs_no_flag(run, own_checkpoint, tmp_path):
    result, files = run("--weights", own_checkpoint, "--fidelity-level", 1)
    assert result.exit_code == 0, result.output
    meta = yaml.safe_load((tmp_path / "out" / files[1]).read_text())
    model = load_jit_model(tmp_path / "out" / files[0])
    assert model.metadata == meta
    assert meta["fidelity_name"] == "xtb"
    assert meta["elements"] == ["H", "C", "O"]
    with pytest.raises(
        ValueError, match=r"N \(7\) is not among the elements of fidelity 1 \(xtb\): H \(1\), C \(6\), O"
    ):
        model({"coord": torch.zeros(1, 1, 3), "numbers": torch.tensor([[7]])})


def test_each_fidelity_has_its_own_elements_and_energies(own_checkpoint, tmp_path):
    water = {"coord": torch.rand(1, 3, 3), "numbers": torch.tensor([[8, 1, 1]])}
    models = [load_jit_model(compile_model(own_checkpoint, tmp_path / "m", fidelity_level=f)[0]) for f in (0, 1)]
    # Fresh fidelities are equal, so only the self-atomic energies differ.
    difference = models[0](water)["energy"] - models[1](water)["energy"]
    expected = (-2041.8 + 104.0) + 2 * (-13.6 + 10.7)
    torch.testing.assert_close(difference, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-9)


def test_parameters_given_one_by_one(run, mixed):
    custom = ["--dispersion", "d3bj", "--dispersion-s8", 1.9889, "--dispersion-a1", 0.3981, "--dispersion-a2", 4.4211]
    result, _ = run(*mixed, "--fidelity-level", 0, *custom)
    assert result.exit_code == 0, result.output
    named = choose_dispersion("d3bj", "b3lyp").parameters
    assert choose_dispersion("d3bj", parameters={"s8": 1.9889, "a1": 0.3981, "a2": 4.4211}).parameters == named


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fidelity-level", 3], "--fidelity-level 3: the checkpoint has the fidelities 0..2"),
        ([], "choose one of 0..2"),
        (["--fidelity-level", 0, "--num-fidelities", 2], "--num-fidelities 2 contradicts the checkpoint, which says 3"),
        (["--fidelity-level", 0, "--use-fidelity-readouts", "false"], "--use-fidelity-readouts False contradicts"),
        (
            ["--fidelity-level", 0, "--fidelity-offset", 150],
            "--fidelity-offset 150: the embedding of the",
        ),
        (["--fidelity-level", 0, "--dispersion", "d4"], "--dispersion d4 needs --dispersion-functional"),
        (["--fidelity-level", 0, "--dispersion", "d3"], "--dispersion d3 is unknown; known: none, d3bj, d4"),
        (["--fidelity-level", 0, "--dispersion", "d3bj"], "needs --dispersion-functional, or its own parameters"),
        (
            ["--fidelity-level", 0, "--dispersion", "d3bj", "--dispersion-s8", 1],
            "--dispersion-a1, --dispersion-a2 missing",
        ),
        (["--fidelity-level", 0, "--dispersion", "d3bj", "--dispersion-functional", "b3lpy"], "b3lyp"),
        (["--fidelity-level", 0, "--dispersion-functional", "pbe"], "use --dispersion d3bj"),
        (
            ["--fidelity-level", 0, "--dispersion", "d3bj", "--dispersion-functional", "pbe", "--dispersion-s8", 1],
            "exclude each other",
        ),
    ],
)
def test_flags_that_do_not_fit(run, mixed, flags, message):
    result, files = run(*mixed, *flags)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().split("\n")) == 1
    assert files == []


def test_flags_that_contradict_our_checkpoint(run, own_checkpoint, tmp_path, fixtures_dir):
    other = tmp_path / "other.yaml"
    other.write_text((fixtures_dir / "ref_single_model.yaml").read_text().replace("ncomb_v: 6", "ncomb_v: 5"))
    result, files = run("--weights", own_checkpoint, "--fidelity-level", 0, "--model", other)
    assert result.exit_code == 2
    assert "kwargs.ncomb_v differs from the checkpoint" in result.output
    sae = tmp_path / "sae.yaml"
    sae.write_text("1: -13.6\n8: -2041.9\n")
    result, files = run("--weights", own_checkpoint, "--fidelity-level", 0, "--sae", sae)
    assert result.exit_code == 2
    assert "the energy of O (8) differs" in result.output
    assert files == []


def test_files_that_are_missing_or_wrong(run, fixtures_dir, tmp_path, sae_file):
    weights = fixtures_dir / "ref_mixed.pt"
    model = fixtures_dir / "ref_mixed_model.yaml"
    cases = [
        (["--weights", tmp_path / "no.pt"], "no.pt: no such file"),
        (["--weights", weights, "--fidelity-level", 0], "--model: the checkpoint does not hold"),
        (["--weights", weights, "--fidelity-level", 0, "--model", model], "--sae: the checkpoint holds no"),
        (
            ["--weights", weights, "--fidelity-level", 0, "--sae", sae_file, "--model", fixtures_dir / "no.yaml"],
            "no.yaml: no such file",
        ),
    ]
    for args, message in cases:
        result, files = run(*args)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert files == []


def test_weights_of_another_architecture(run, fixtures_dir, sae_file):
    from aimnet2mult.models.base import DEFAULT_MODEL

    result, files = run("--weights", fixtures_dir / "ref_single.pt", "--model", DEFAULT_MODEL, "--sae", sae_file)
    assert result.exit_code == 2
    assert "of another architecture than the model" in result.output
    assert files == []


def test_output_that_cannot_be_written(run, mixed, tmp_path):
    result, _ = run(*mixed, "--fidelity-level", 0, output=tmp_path / "absent" / "model")
    assert result.exit_code == 2
    assert "does not exist" in result.output
    result, files = run(*mixed, "--fidelity-level", 0, output=f"{tmp_path / 'out'}/")
    assert result.exit_code == 2
    assert "expected the beginning of the names of files, such as" in result.output
    assert files == []
    for nothing in (["--output", ""], ["--output="]):
        result = CliRunner().invoke(main, [*map(str, mixed), "--fidelity-level", "0", *nothing])
        assert result.exit_code == 2
        assert "--output '': expected the beginning of the names of files, such as model" in result.output


def test_single_fidelity_checkpoint(fixtures_dir, sae_file, tmp_path, reference, molecules):
    jpt, _ = compile_model(
        fixtures_dir / "ref_single.pt", tmp_path / "m", model=fixtures_dir / "ref_single_model.yaml", sae=sae_file
    )
    assert jpt.name == "m_fid0.jpt"
    data = molecules(torch.float32)
    out = load_jit_model(jpt)(data)
    torch.testing.assert_close(
        out["forces"].double(), torch.tensor(reference("ref_single")["forces_f64"]), rtol=0, atol=1e-5
    )


# --------------------------------------------------------------------------------------------------
# which fidelity
# --------------------------------------------------------------------------------------------------


def test_fidelity_by_name(run, own_checkpoint, tmp_path):
    result, files = run("--weights", own_checkpoint, "--fidelity-level", "xtb")
    assert result.exit_code == 0, result.output
    assert files == ["model_fid1.jpt", "model_fid1_meta.yaml"]
    assert compile_model(own_checkpoint, tmp_path / "m", fidelity_level="dft")[0].name == "m_fid0.jpt"


@pytest.mark.parametrize("level", ["xtbb", "2", "-1", "1.0"])
def test_unknown_fidelity_lists_the_known_ones(run, own_checkpoint, level):
    result, files = run("--weights", own_checkpoint, "--fidelity-level", level)
    assert result.exit_code == 2
    assert f"--fidelity-level {level}: the checkpoint has the fidelities 0 (dft), 1 (xtb)" in result.output
    assert files == []


# --------------------------------------------------------------------------------------------------
# the dispersion ledger
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--dispersion", "d3bj", "--dispersion-functional", "B3LYP"],
        ["--dispersion", "d3bj", "--dispersion-s8", 1.9889, "--dispersion-a1", 0.3981, "--dispersion-a2", 4.4211],
    ],
)
def test_what_was_subtracted_is_embedded(run, with_ledger, tmp_path, log, flags):
    result, files = run("--weights", with_ledger({"d3bj": "b3lyp"}, True), "--fidelity-level", "dft", *flags)
    assert result.exit_code == 0, result.output
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    text = (tmp_path / "out" / files[1]).read_text()
    meta = yaml.safe_load(text)
    assert "&id" not in text
    assert meta == load_jit_model(tmp_path / "out" / files[0]).metadata
    parameters = {"s6": 1.0, "s8": 1.9889, "a1": 0.3981, "a2": 4.4211}
    assert meta["dispersion"] == {
        "source": "subtracted from the labels",
        "method": "d3bj",
        "functional": "b3lyp",
        "parameters": parameters,
        "cutoff": None,
        "smoothing": None,
    }
    assert meta["labels_dispersion"] == {"method": "d3bj", "functional": "b3lyp", "parameters": parameters}
    assert meta["level_of_theory"] == "B3LYP/def2-SVP"


def test_the_embedded_correction_is_part_of_the_energy(with_ledger, tmp_path):
    water = {
        "coord": torch.tensor([[[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]]]),
        "numbers": torch.tensor([[8, 1, 1]]),
    }
    checkpoint = with_ledger({"d3bj": "b3lyp"}, True)
    energies = []
    for dispersion in (
        None,
        choose_dispersion("none"),
        choose_dispersion("d3bj", "b3lyp"),
        choose_dispersion("d3bj", "pbe"),
    ):
        jpt, _ = compile_model(checkpoint, tmp_path / "m", fidelity_level=0, dispersion=dispersion)
        energies.append(load_jit_model(jpt)(water)["energy"].item())
    assert energies[0] == energies[2]
    assert len(set(energies)) == 3


@pytest.mark.parametrize(
    ("flags", "chosen", "source"),
    [
        (["--dispersion", "none"], "no dispersion", None),
        (["--dispersion", "d3bj", "--dispersion-functional", "pbe"], "D3(BJ) of pbe", "command line"),
        (
            ["--dispersion", "d3bj", "--dispersion-s8", 1.0, "--dispersion-a1", 0.4, "--dispersion-a2", 4.4],
            "D3(BJ) with the parameters {'s6': 1.0, 's8': 1.0",
            "command line",
        ),
    ],
)
def test_another_correction_than_was_subtracted_is_obeyed_with_a_warning(
    run, with_ledger, tmp_path, log, flags, chosen, source
):
    result, files = run("--weights", with_ledger({"d3bj": "b3lyp"}, True), "--fidelity-level", 0, *flags)
    assert result.exit_code == 0, result.output
    (warning,) = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert warning.startswith("fidelity 0 (dft): training subtracted D3(BJ) of b3lyp from the labels, and this model")
    assert chosen in warning
    assert "not those of the labels' level of theory" in warning
    assert yaml.safe_load((tmp_path / "out" / files[1]).read_text())["dispersion"]["source"] == source


@pytest.mark.parametrize(
    ("labels", "text", "remedy"),
    [
        ({"d3bj": "pbe"}, "D3(BJ) of pbe", "or train with subtract_dispersion: true for this fidelity."),
        ({"d4": "gfn2"}, "D4 of gfn2", "(--dispersion NAME=d3bj)."),
        ("vv10", "VV10", "(--dispersion NAME=d3bj)."),
    ],
)
def test_dispersion_is_not_counted_twice(run, with_ledger, log, labels, text, remedy):
    checkpoint = with_ledger(labels)
    result, files = run(
        "--weights", checkpoint, "--fidelity-level", 0, "--dispersion", "d3bj", "--dispersion-functional", "pbe"
    )
    assert result.exit_code == 2
    assert f"the labels of fidelity 0 (dft) contain {text}, which the network has learned" in result.output
    assert "dispersion would be counted twice" in result.output
    assert remedy in result.output
    assert len(result.output.strip().split("\n")) == 1
    assert files == []
    for flags in ([], ["--dispersion", "none"]):
        result, files = run("--weights", checkpoint, "--fidelity-level", 0, *flags)
        assert result.exit_code == 0, result.output
        assert len(files) == 2
    assert not [record for record in log.records if record.levelno >= logging.WARNING]


def test_labels_without_dispersion(run, with_ledger, tmp_path, log):
    checkpoint = with_ledger("none")
    result, files = run("--weights", checkpoint, "--fidelity-level", 0)
    assert result.exit_code == 0, result.output
    assert "the labels contain no dispersion, and none is added. To add it: --dispersion d3bj" in log.text
    meta = yaml.safe_load((tmp_path / "out" / files[1]).read_text())
    assert meta["dispersion"].pop("method") == "none"
    assert set(meta["dispersion"].values()) == {None}
    assert meta["labels_dispersion"]["method"] == "none"
    log.clear()
    result, _ = run("--weights", checkpoint, "--fidelity-level", 0, "--dispersion", "none")
    assert "To add it" not in log.text
    result, _ = run(
        "--weights", checkpoint, "--fidelity-level", 0, "--dispersion", "d3bj", "--dispersion-functional", "pbe"
    )
    assert result.exit_code == 0, result.output
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    assert yaml.safe_load((tmp_path / "out" / files[1]).read_text())["dispersion"]["source"] == "command line"


def test_unknown_labels_may_be_corrected_with_a_warning(run, with_ledger, log):
    checkpoint = with_ledger("unknown")
    result, _ = run("--weights", checkpoint, "--fidelity-level", 0)
    assert result.exit_code == 0, result.output
    assert "twice" not in log.text
    result, _ = run(
        "--weights", checkpoint, "--fidelity-level", 0, "--dispersion", "d3bj", "--dispersion-functional", "pbe"
    )
    assert result.exit_code == 0, result.output
    assert "it was not stated which dispersion the labels contain. If they contain any, this model counts" in log.text


def test_checkpoint_without_a_ledger_does_as_it_is_told(run, own_checkpoint, tmp_path, log):
    result, files = run("--weights", own_checkpoint, "--fidelity-level", 0)
    assert result.exit_code == 0, result.output
    meta = yaml.safe_load((tmp_path / "out" / files[1]).read_text())
    assert (meta["labels_dispersion"], meta["dispersion"]["method"]) == (None, "none")
    flags = ["--dispersion", "d3bj", "--dispersion-functional", "pbe"]
    result, _ = run("--weights", own_checkpoint, "--fidelity-level", 0, *flags)
    assert result.exit_code == 0, result.output
    meta = yaml.safe_load((tmp_path / "out" / files[1]).read_text())
    assert (meta["dispersion"]["source"], meta["dispersion"]["functional"]) == ("command line", "pbe")
    assert not [record for record in log.records if record.levelno >= logging.WARNING]


def test_dispersion_among_the_outputs_of_the_model_is_not_doubled(run, with_ledger, own_config):
    own_config["kwargs"]["outputs"]["dftd3"] = {
        "class": "aimnet2mult.modules.DFTD3",
        "kwargs": {"s8": 0.3908, "a1": 0.566, "a2": 3.128},
    }
    checkpoint = with_ledger({"d3bj": "b3lyp"}, True, own_config)
    result, files = run("--weights", checkpoint, "--fidelity-level", 0)
    assert result.exit_code == 2
    assert "D3(BJ) of b3lyp: the model has a dispersion energy of its own among its outputs" in result.output
    assert files == []
    result, _ = run("--weights", checkpoint, "--fidelity-level", 1)
    assert result.exit_code == 0, result.output


def test_differing_key():
    assert differing_key({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b.1"
    assert differing_key({"a": 1}, {"a": 1, "c": 2}) == "c"
    assert differing_key({"a": [1, {"x": 2.0}]}, {"a": [1, {"x": 2.0}]}) is None


def test_help_is_quick_and_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, aimnet2mult.tools.compile_jit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --------------------------------------------------------------------------------------------------
# several fidelities
# --------------------------------------------------------------------------------------------------


def test_all_fidelities_each_with_its_own_dispersion(run, with_ledger, tmp_path):
    result, files = run("--weights", with_ledger({"d3bj": "b3lyp"}, True), "--fidelity-level", "all")
    assert result.exit_code == 0, result.output
    assert files == ["model_fid0.jpt", "model_fid0_meta.yaml", "model_fid1.jpt", "model_fid1_meta.yaml"]
    assert [line.rpartition("/")[2] for line in result.output.split()[-4:]] == files
    methods = [load_jit_model(tmp_path / "out" / name).metadata["dispersion"]["method"] for name in files[::2]]
    assert methods == ["d3bj", "none"]


def test_dispersion_of_one_fidelity_in_a_file_of_all(run, with_ledger, tmp_path, dimer):
    checkpoint = with_ledger("none")  # fidelity 1 has labels with D4
    flags = ["--dispersion", "dft=d3bj", "--dispersion-functional", "pbe"]
    result, files = run("--weights", checkpoint, "--combined", *flags)
    assert result.exit_code == 0, result.output
    path = tmp_path / "out" / files[0]
    about = load_jit_model(path).metadata["fidelities"]
    assert [entry["dispersion"]["functional"] for entry in about] == ["pbe", None]
    bare, _ = compile_model(checkpoint, tmp_path / "bare", combined=True)
    batch = {**{key: value.repeat_interleave(2, 0) for key, value in dimer.items()}, "fidelity": torch.tensor([0, 1])}
    added = energy(path, batch) - energy(bare, batch)
    assert added[0] < -1e-3
    assert added[1] == 0.0
    model = load_jit_model(path)
    model.module.double()
    model.set_dispersion_cutoff(0.5)  # shorter than any distance
    torch.testing.assert_close(model(batch)["energy"], energy(bare, batch), rtol=0, atol=1e-9)


def test_each_file_has_the_dispersion_that_was_asked_for(own_checkpoint, tmp_path):
    asked = {"all": choose_dispersion("d3bj", "pbe"), "xtb": choose_dispersion("d4", "pbe")}
    paths = compile_model(own_checkpoint, tmp_path / "m", fidelity_level="all", dispersion=asked)
    assert [load_jit_model(path).metadata["dispersion"]["method"] for path in paths[::2]] == ["d3bj", "d4"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {}),
        ({"method": [("all", "none")]}, {"all": choose_dispersion("none")}),
        (
            {"method": [("dft", "d3bj")], "functional": [("dft", "b3lyp")]},
            {"dft": choose_dispersion("d3bj", "b3lyp")},
        ),
        (
            {"method": [("all", "d3bj"), ("xtb", "none")], "functional": [("all", "b3lyp")]},
            {"all": choose_dispersion("d3bj", "b3lyp"), "xtb": choose_dispersion("none")},
        ),
        (
            {"method": [("all", "none"), ("dft", "d3bj")], "functional": [("all", "b3lyp")], "s9": [("dft", 1.0)]},
            {"all": choose_dispersion("none"), "dft": choose_dispersion("d3bj", "b3lyp", {"s9": 1.0})},
        ),
        (
            {"method": [("all", "d3bj")], "functional": [("a", "pbe"), ("all", "b3lyp")], "cutoff": [("a", 20.0)]},
            {"all": choose_dispersion("d3bj", "b3lyp"), "a": choose_dispersion("d3bj", "pbe", None, 20.0)},
        ),
        (
            {
                "method": [("a", "d3bj"), ("b", "d4")],
                "s8": [("all", 1.0), ("b", 2.0)],
                "a1": [("all", 0.4)],
                "a2": [("all", 4.0)],
            },
            {
                "a": choose_dispersion("d3bj", parameters={"s8": 1.0, "a1": 0.4, "a2": 4.0}),
                "b": choose_dispersion("d4", parameters={"s8": 2.0, "a1": 0.4, "a2": 4.0}),
            },
        ),
    ],
)
def test_dispersion_for_all_and_for_some(flags, expected):
    assert dispersion_of_flags(flags) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dispersion=d3bj"], "--dispersion d3bj needs --dispersion-functional"),
        (["--dispersion=dft=d3bj"], "dispersion of dft: --dispersion d3bj needs --dispersion-functional"),
        (["--dispersion=dft=d5"], "dispersion of dft: --dispersion d5 is unknown"),
        (["--dispersion=dft=none", "--dispersion-functional=b3lyp"], "a functional, parameters or a cutoff without"),
        (["--dispersion-functional=xtb=b3lyp"], "dispersion of xtb: a functional, parameters or a cutoff without"),
        (
            ["--dispersion=dft=d3bj", "--dispersion-functional=b3lyp", "--dispersion-cutoff=xtb=10"],
            "dispersion of xtb: a functional, parameters or a cutoff without",
        ),
        (["--dispersion=dft=d4", "--dispersion=dft=d3bj"], "--dispersion: two values for dft, d4 and d3bj"),
        (["--dispersion-s8=1", "--dispersion-s8=2"], "--dispersion-s8: two values for all, 1.0 and 2.0"),
        (["--dispersion=dft=none", "--dispersion=0=none"], "--dispersion 0=none: a second one for fidelity 0 (dft)"),
        (["--dispersion=ccsd=none"], "--dispersion ccsd: the checkpoint has the fidelities 0 (dft), 1 (xtb)"),
        (["--dispersion=xtb=none", "--fidelity-level=dft"], "xtb=none: fidelity 1 (xtb) is not compiled; leave it out"),
        (["--dispersion==none"], "'=none': expected VALUE, or the name of a fidelity before the sign: NAME=VALUE"),
        (["--dispersion-s8=dft=x"], "'x' is not a valid float"),
    ],
)
def test_dispersion_of_fidelities_that_does_not_fit(run, own_checkpoint, flags, message):
    how = [] if any("level" in flag for flag in flags) else ["--combined"]
    result, files = run("--weights", own_checkpoint, *how, *flags)
    assert result.exit_code == 2
    assert message in result.output
    assert files == []


@pytest.mark.parametrize("how", [["--fidelity-level", "all"], ["--combined"]])
def test_all_are_checked_before_any_is_written(run, with_ledger, how):
    checkpoint = with_ledger("none")  # fidelity 1 has labels with D4
    result, files = run("--weights", checkpoint, *how, "--dispersion", "d3bj", "--dispersion-functional", "pbe")
    assert result.exit_code == 2
    assert "the labels of fidelity 1 (xtb) contain D4 of gfn2" in result.output
    assert "say for which other fidelity it is (--dispersion NAME=d3bj)." in result.output
    assert files == []


def test_combined_file(run, own_checkpoint, tmp_path):
    result, files = run("--weights", own_checkpoint, "--combined", "--default-fidelity", "xtb")
    assert result.exit_code == 0, result.output
    assert files == ["model_all.jpt", "model_all_meta.yaml"]
    model = load_jit_model(tmp_path / "out" / files[0])
    assert model.metadata == yaml.safe_load((tmp_path / "out" / files[1]).read_text())
    assert model.metadata["default_fidelity"] == model.module.default_fidelity == 1
    water = {
        "coord": torch.tensor([[[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]]]),
        "numbers": torch.tensor([[8, 1, 1]]),
    }
    twice = {key: value.expand(2, *value.shape[1:]) for key, value in water.items()}
    energies = model({**twice, "fidelity": torch.tensor([0, 1])})["energy"]
    assert model(water)["energy"] == energies[1]
    expected = (-2041.8 + 104.0) + 2 * (-13.6 + 10.7)
    assert float(energies[0] - energies[1]) == pytest.approx(expected, abs=1e-9)


def test_energies_of_several_fidelities_from_files(run, fixtures_dir, sae_file, tmp_path):
    weights = ["--weights", fixtures_dir / "ref_mixed.pt", "--model", fixtures_dir / "ref_mixed_model.yaml"]
    other = tmp_path / "other.yaml"
    other.write_text("1: -13.0\n")
    given = ["--sae", f"0={sae_file}", "--sae", f"1={other}", "--sae", f"2={sae_file}"]
    result, files = run(*weights, "--fidelity-level", "all", *given)
    assert result.exit_code == 0, result.output
    species = [load_jit_model(tmp_path / "out" / name).species for name in files[::2]]
    assert species == [[1, 6, 7, 8, 9, 17], [1], [1, 6, 7, 8, 9, 17]]
    for flags, message in [
        (["--sae", sae_file], "one file for 3 fidelities; give one for each, as --sae NAME=FILE"),
        (given[:2], "--sae: the checkpoint holds no self-atomic energies of fidelity 1"),
        ([*given, "--sae", f"3={sae_file}"], "--sae 3: the checkpoint has the fidelities 0..2"),
        ([*given, "--sae", f"0={sae_file}"], "a second file for 0"),
        (["--sae", f"0={sae_file}", "--sae", f"00={other}"], "--sae 00: the checkpoint has the fidelities"),
        (["--sae", sae_file, "--sae", other], "of several fidelities, give each file as NAME=FILE"),
    ]:
        result, _ = run(*weights, "--fidelity-level", "all", *flags)
        assert result.exit_code == 2
        assert message in result.output


def test_energies_of_a_fidelity_that_is_not_compiled(run, own_checkpoint, sae_file):
    for flags, message in [
        (["--fidelity-level", 0, "--sae", f"xtb={sae_file}"], "fidelity 1 (xtb) is not compiled; leave the file out"),
        (["--combined", "--sae", f"xtb={sae_file}", "--sae", f"1={sae_file}"], "a second file for fidelity 1 (xtb)"),
    ]:
        result, files = run("--weights", own_checkpoint, *flags)
        assert result.exit_code == 2
        assert message in result.output
        assert files == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--combined", "--fidelity-level", "xtb"], "--combined holds all fidelities; leave out --fidelity-level xtb"),
        (["--combined", "--default-fidelity", "ccsd"], "--default-fidelity ccsd: the checkpoint has the fidelities 0"),
        (["--fidelity-level", 0, "--default-fidelity", 1], "--default-fidelity is for --combined"),
        (["--fidelity-level", 0, "--dispersion-cutoff", 12], "without a correction: use --dispersion d3bj or d4"),
        (["--fidelity-level", 0, "--coulomb", "pme"], "--coulomb pme is unknown; known: simple, dsf, ewald"),
        (["--fidelity-level", 0, "--coulomb-cutoff", 12], "--coulomb-cutoff: say for which method"),
        (["--fidelity-level", 0, "--coulomb", "simple", "--coulomb-cutoff", 12], "is for --coulomb dsf and ewald"),
        (["--fidelity-level", 0, "--coulomb", "ewald", "--dsf-alpha", 0.2], "--dsf-alpha is for --coulomb dsf, not"),
        (["--fidelity-level", 0, "--coulomb", "dsf", "--coulomb-cutoff", -1], "--coulomb-cutoff -1.0: expected a pos"),
        (["--fidelity-level", 0, "--coulomb", "ewald", "--ewald-accuracy", 2], "--ewald-accuracy"),
    ],
)
def test_options_that_do_not_fit(run, own_checkpoint, flags, message):
    result, files = run("--weights", own_checkpoint, *flags)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().split("\n")) == 1
    assert files == []


# --------------------------------------------------------------------------------------------------
# dispersion, Coulomb method, options
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def dimer():
    """Two water molecules, in double precision."""
    water = torch.tensor([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]], dtype=torch.float64)
    return {"coord": torch.cat([water, water + 3.0]).unsqueeze(0), "numbers": torch.tensor([[8, 1, 1, 8, 1, 1]])}


def energy(path, data):
    model = load_jit_model(path)
    model.module.double()
    return model(data)["energy"]


def test_d4_is_part_of_the_energy(own_checkpoint, tmp_path, dimer):
    from aimnet2mult.dftd4 import DFTD4
    from aimnet2mult.dispersion_params import d4_parameters
    from aimnet2mult.nbops import internal_batch

    p = d4_parameters("pbe")
    d4 = DFTD4(s6=p.s6, s8=p.s8, s9=p.s9, a1=p.a1, a2=p.a2)(internal_batch(dimer, 5.0))["energy"]
    assert d4 < -1e-3
    bare, _ = compile_model(own_checkpoint, tmp_path / "bare", fidelity_level=0)
    jpt, _ = compile_model(own_checkpoint, tmp_path / "d4", fidelity_level=0, dispersion=choose_dispersion("d4", "pbe"))
    torch.testing.assert_close(energy(jpt, dimer) - energy(bare, dimer), d4, rtol=0, atol=1e-8)
    metadata = load_jit_model(jpt).metadata
    parameters = {"s6": p.s6, "s8": p.s8, "s9": 1.0, "a1": p.a1, "a2": p.a2}
    assert metadata["dispersion"]["parameters"] == parameters
    assert metadata["dispersion"]["method"] == "d4"
    assert not metadata["periodic"]
    own = choose_dispersion("d4", parameters={key: parameters[key] for key in ("s8", "a1", "a2")})
    assert own.parameters == parameters


def test_three_body_energy_of_d3(own_checkpoint, tmp_path, dimer):
    from aimnet2mult.dispersion import DFTD3
    from aimnet2mult.nbops import internal_batch

    chosen = choose_dispersion("d3bj", "pbe", {"s9": 1.0})
    energies = [
        energy(compile_model(own_checkpoint, tmp_path / "m", fidelity_level=0, dispersion=dispersion)[0], dimer)
        for dispersion in (choose_dispersion("none"), choose_dispersion("d3bj", "pbe"), chosen)
    ]
    expected = DFTD3(**chosen.parameters)(internal_batch(dimer, 5.0))["energy"]
    torch.testing.assert_close(energies[2] - energies[0], expected, rtol=0, atol=1e-8)
    assert abs(energies[2] - energies[1]) > 1e-6


def test_d4_is_not_counted_twice(run, with_ledger):
    result, files = run(
        *("--weights", with_ledger("none"), "--fidelity-level", "xtb"),
        *("--dispersion", "d4", "--dispersion-functional", "pbe"),
    )
    assert result.exit_code == 2
    assert "--dispersion d4: the labels of fidelity 1 (xtb) contain D4 of gfn2" in result.output
    assert files == []


def test_range_of_dispersion(own_checkpoint, tmp_path, dimer):
    paths = [
        compile_model(own_checkpoint, tmp_path / "m", fidelity_level=0, dispersion=choose_dispersion(*args))[0].rename(
            tmp_path / f"{i}.jpt"
        )
        for i, args in enumerate(
            [("none",), ("d3bj", "pbe", None, 2.0, 0.0), ("d3bj", "pbe", None, 30.0), ("d3bj", "pbe")]
        )
    ]
    none, short, long, full = (float(energy(path, dimer)) for path in paths)
    assert full < short < none
    assert abs(full - long) < 1e-6
    dispersion = load_jit_model(paths[2]).metadata["dispersion"]
    assert (dispersion["cutoff"], dispersion["smoothing"]) == (30.0, 0.2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("d4", "pbe", None, 12.0), "--dispersion-cutoff and --dispersion-smoothing are for --dispersion d3bj"),
        (("d3bj", "pbe", None, None, 0.1), "is a fraction of --dispersion-cutoff"),
        (("d3bj", "pbe", None, float("inf")), "--dispersion-cutoff inf: expected a positive number"),
        (("d3bj", "pbe", None, 12.0, 1.5), "--dispersion-smoothing 1.5: expected a number between 0 and 1"),
        (("d3bj", None, {"s8": float("nan"), "a1": 1.0, "a2": 1.0}), "--dispersion-s8 nan: expected a number"),
        (("d4", "pbee"), "'pbee' is not known to D4"),
    ],
)
def test_dispersion_that_makes_no_sense(args, message):
    with pytest.raises(ValueError, match=message):
        choose_dispersion(*args)


def test_three_body_energy_beside_a_functional():
    assert "s9" not in choose_dispersion("d3bj", "pbe", {"s9": 0.0}).parameters
    assert choose_dispersion("d3bj", "pbe", {"s9": 1.0}).parameters["s9"] == 1.0
    assert choose_dispersion("d4", "pbe", {"s9": 0.5}).parameters["s9"] == 0.5


def test_coulomb_method(run, own_checkpoint, tmp_path, dimer):
    result, files = run("--weights", own_checkpoint, "--fidelity-level", 0, "--coulomb", "dsf", "--coulomb-cutoff", 12)
    assert result.exit_code == 0, result.output
    model = load_jit_model(tmp_path / "out" / files[0])
    assert model.metadata["coulomb"]["method"] == "dsf"
    assert model.metadata["coulomb"]["cutoff"] == 12.0
    assert model.metadata["periodic"]
    assert model.cutoff_lr == 12.0
    assert model.module.options["coulomb_method"] == "dsf"
    crystal = {**dimer, "cell": 10.0 * torch.eye(3, dtype=torch.float64)}
    assert torch.isfinite(
        model({key: v.float() if v.is_floating_point() else v for key, v in crystal.items()})["energy"]
    )


def test_coulomb_method_of_a_model_without_coulomb_energy(run, tmp_path, own_config):
    del own_config["kwargs"]["outputs"]["lrcoulomb"]
    checkpoint = save_own_checkpoint(tmp_path / "bare.pt", own_config)
    result, _ = run("--weights", checkpoint, "--fidelity-level", 0, "--coulomb", "dsf")
    assert result.exit_code == 2
    assert "--coulomb dsf: fidelity 0 (dft) has no Coulomb energy among its outputs" in result.output
    result, files = run("--weights", checkpoint, "--fidelity-level", 0)
    assert result.exit_code == 0, result.output
    assert load_jit_model(tmp_path / "out" / files[0]).metadata["coulomb"] is None


def test_what_the_file_computes_in_every_call(own_checkpoint, tmp_path, dimer):
    jpt, _ = compile_model(
        own_checkpoint, tmp_path / "m", fidelity_level=0, coulomb=choose_coulomb("ewald"), stress=True, hessian=True
    )
    model = load_jit_model(jpt)
    assert model.module.compute_stress
    assert model.module.compute_hessian
    model.module.double()
    out = model({**dimer, "cell": 10.0 * torch.eye(3, dtype=torch.float64)})
    assert out["stress"].shape == (3, 3)
    assert out["hessian"].shape == (1, 6, 3, 6, 3)
    assert model.module.options["compute_stress"] == "true"
    plain = load_jit_model(compile_model(own_checkpoint, tmp_path / "p", fidelity_level=0)[0])
    assert not plain.module.compute_stress
    assert sorted(plain({key: v.float() if v.is_floating_point() else v for key, v in dimer.items()})) == [
        *("charges", "energy", "forces", "spin_charges")
    ]


COULOMB_ADVICE = "its Coulomb sum has no cutoff (--coulomb dsf or ewald has one)"
D4_ADVICE = "DFTD4 is for molecules (--dispersion d3bj is for crystals, too)"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--fidelity-level", 0], COULOMB_ADVICE),
        (["--combined"], COULOMB_ADVICE),
        (["--fidelity-level", 0, "--coulomb", "dsf", "--dispersion", "d4"], D4_ADVICE),
        (["--fidelity-level", "all", "--coulomb", "dsf", "--dispersion", "dft=d4"], D4_ADVICE),
        (["--fidelity-level", 0, "--dispersion", "d4"], f"{COULOMB_ADVICE} and {D4_ADVICE}"),
    ],
)
def test_stress_that_could_never_be_computed(run, own_checkpoint, flags, reason):
    functional = ["--dispersion-functional", "pbe"] if "--dispersion" in flags else []
    result, files = run("--weights", own_checkpoint, "--stress", *flags, *functional)
    assert result.exit_code == 2
    assert f"--stress: fidelity 0 (dft) cannot be used with a cell: {reason}" in result.output
    assert files == []


def test_stress_of_some_fidelities_of_a_file(run, own_checkpoint, tmp_path, dimer):
    d4 = ["--dispersion", "dft=d4", "--dispersion-functional", "pbe"]
    result, files = run("--weights", own_checkpoint, "--stress", "--combined", "--coulomb", "dsf", *d4)
    assert result.exit_code == 0, result.output
    model = load_jit_model(tmp_path / "out" / files[0])
    crystal = {**dimer, "cell": 10.0 * torch.eye(3, dtype=torch.float64)}
    assert model({**crystal, "fidelity": torch.tensor(1)})["stress"].shape == (3, 3)
    with pytest.raises(ValueError, match="DFTD4 is for molecules"):
        model(crystal)


def test_licence_and_comment(run, own_checkpoint, tmp_path):
    flags = ["--fidelity-level", 0, "--licence", "CC-BY-4.0", "--comment", "Für Wasser"]
    _, files = run("--weights", own_checkpoint, *flags)
    metadata = load_jit_model(tmp_path / "out" / files[0]).metadata
    assert (metadata["licence"], metadata["comment"]) == ("CC-BY-4.0", "Für Wasser")
    _, files = run("--weights", own_checkpoint, "--fidelity-level", 0)
    assert load_jit_model(tmp_path / "out" / files[0]).metadata["licence"].startswith("not stated")


def test_attributes_for_those_who_have_only_torch(own_checkpoint, tmp_path):
    from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored

    jpt, _ = compile_model(own_checkpoint, tmp_path / "m", fidelity_level=1)
    with torchscript_deprecation_ignored():
        model = torch.jit.load(str(jpt))
    assert (model.cutoff, model.cutoff_lr, model.species) == (5.0, float("inf"), [1, 6, 8])
    assert model.options["coulomb_method"] == "simple"
    assert model.options["dispersion_method"] == "none"
    assert model.options["compute_stress"] == "false"


# --------------------------------------------------------------------------------------------------
# models that must not be compiled
# --------------------------------------------------------------------------------------------------


def with_weight(checkpoint, path, key, row, value):
    content = torch.load(checkpoint, weights_only=True)
    content["model"][key][row] = value
    torch.save(content, path)
    return path


def test_weights_that_are_not_finite(run, own_checkpoint, tmp_path):
    bad = with_weight(own_checkpoint, tmp_path / "bad.pt", "mlps.1.0.weight", 0, float("nan"))
    result, files = run("--weights", bad, "--fidelity-level", "all")
    assert result.exit_code == 2
    assert "fidelity 0 (dft): NaN or infinite values among the weights (mlps.1.0.weight)" in result.output
    assert files == []
    # Element 9 of fidelity 0 is not among those that it was trained on: nobody will look at its row.
    unused = with_weight(own_checkpoint, tmp_path / "unused.pt", "afv.weight", 9, float("nan"))
    result, _ = run("--weights", unused, "--fidelity-level", 0)
    assert result.exit_code == 0, result.output
    used = with_weight(own_checkpoint, tmp_path / "used.pt", "afv.weight", 8, float("inf"))
    result, _ = run("--weights", used, "--fidelity-level", 0)
    assert "among the weights (afv.weight)" in result.output
    far = with_weight(own_checkpoint, tmp_path / "far.pt", "aev.rc_s", (), float("inf"))
    result, _ = run("--weights", far, "--fidelity-level", 0)
    assert result.exit_code == 2


@pytest.mark.parametrize(("method", "name"), [("d3bj", r"D3\(BJ\)"), ("d4", "D4")])
def test_elements_without_dispersion_data(own_checkpoint, tmp_path, method, name):
    sae = tmp_path / "sae.yaml"
    sae.write_text("1: -13.6\n104: -900.0\n")
    content = torch.load(own_checkpoint, weights_only=True)
    del content["sae"], content["species"]
    torch.save(content, tmp_path / "heavy.pt")
    with pytest.raises(ValueError, match=rf"{name} of pbe: no reference data for Rf \(104\)"):
        compile_model(
            tmp_path / "heavy.pt",
            tmp_path / "m",
            fidelity_level=0,
            sae=sae,
            dispersion=choose_dispersion(method, "pbe"),
        )
    jpt, _ = compile_model(tmp_path / "heavy.pt", tmp_path / "m", fidelity_level=0, sae=sae)
    assert load_jit_model(jpt).species == [1, 104]


def test_model_that_cannot_be_verified_is_not_written(run, own_checkpoint, monkeypatch):
    from aimnet2mult.models import golden

    honest = golden.golden

    def other_energy(cases, single, double):
        content = honest(cases, single, double)
        content["cases"][1]["outputs"]["float64"]["energy"][0] += 1e-6
        return content

    monkeypatch.setattr(golden, "golden", other_energy)
    result, files = run("--weights", own_checkpoint, "--fidelity-level", "all")
    assert result.exit_code == 2
    assert "fid0: the compiled model does not give what the model gives: energy of ions in float64 by 1.0e-06 eV" in (
        result.output
    )
    assert files == []


def test_file_that_was_there_survives_a_failure(run, own_checkpoint, tmp_path):
    _, files = run("--weights", own_checkpoint, "--fidelity-level", 0)
    before = (tmp_path / "out" / files[0]).read_bytes()
    bad = with_weight(own_checkpoint, tmp_path / "bad.pt", "mlps.1.0.weight", 0, float("nan"))
    result, _ = run("--weights", bad, "--fidelity-level", 0)
    assert result.exit_code == 2
    assert (tmp_path / "out" / files[0]).read_bytes() == before


def test_training_is_described(own_checkpoint, tmp_path):
    content = torch.load(own_checkpoint, weights_only=True)
    content["train_config"] = {"data": {"fidelity_datasets": {0: "/home/me/dft.h5", 1: "C:\\me\\xtb.h5"}}, "seed": 3}
    content["data"] = {"fidelities": {"dft": {"files": [{"path": "/home/me/dft.h5", "sha256": "ab"}]}}}
    torch.save(content, tmp_path / "trained.pt")
    metadata = load_jit_model(compile_model(tmp_path / "trained.pt", tmp_path / "m", fidelity_level=0)[0]).metadata
    training = metadata["training"]
    assert training["config"] == {"data": {"fidelity_datasets": {0: "dft.h5", 1: "xtb.h5"}}, "seed": 3}
    assert training["data"]["fidelities"]["dft"]["files"] == [{"path": "dft.h5", "sha256": "ab"}]
    assert training["versions"]["torch"] == torch.__version__


def test_help_is_quick():
    code = """
import sys
from click.testing import CliRunner
from aimnet2mult.tools import compile_jit, info, verify
for tool in (compile_jit, info, verify):
    assert CliRunner().invoke(tool.main, ["--help"]).exit_code == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
