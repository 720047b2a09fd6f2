import pytest
import torch
import yaml
from click.testing import CliRunner

from aimnet2mult.models.base import build_model, load_model_config, save_checkpoint
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.tools.compile_jit import choose_dispersion, compile_model, differing_key, main


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


@pytest.fixture
def own_checkpoint(tmp_path, fixtures_dir):
    config = load_model_config(fixtures_dir / "ref_single_model.yaml")
    path = tmp_path / "own.pt"
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
    )
    return path


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
        (["--fidelity-level", 0, "--fidelity-offset", 150], "--fidelity-offset 150: 3 fidelities then have 429"),
        (["--fidelity-level", 0, "--dispersion", "d4"], "d4 is not available yet"),
        (["--fidelity-level", 0, "--dispersion", "d3"], "--dispersion d3 is unknown; known: none, d3bj"),
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


def test_differing_key():
    assert differing_key({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b.1"
    assert differing_key({"a": 1}, {"a": 1, "c": 2}) == "c"
    assert differing_key({"a": [1, {"x": 2.0}]}, {"a": [1, {"x": 2.0}]}) is None


def test_help_is_quick_and_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, aimnet2mult.tools.compile_jit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
