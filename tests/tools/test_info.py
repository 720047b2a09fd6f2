import json
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner

from aimnet2mult.data.ledger import parse_dispersion
from aimnet2mult.models.base import build_model, load_model_config, save_checkpoint
from aimnet2mult.models.compiled_file import save_jit_model, torchscript_deprecation_ignored
from aimnet2mult.tools.compile_jit import compile_model
from aimnet2mult.tools.compile_options import choose_coulomb, choose_dispersion
from aimnet2mult.tools.info import main, read_info


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


class Nothing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cutoff = 5.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def checkpoint(tmp_path, fixtures_dir):
    """Checkpoint of two fidelities that says all that training lets it say."""
    config = load_model_config(fixtures_dir / "ref_single_model.yaml")
    path = tmp_path / "own.pt"
    files = [{"path": "/home/somebody/dft.h5", "sha256": "ab" * 32, "molecules": 120, "bytes": 1}]
    save_checkpoint(
        path,
        build_model(config, 2),
        model_config=config,
        num_fidelities=2,
        fidelity_offset=200,
        use_fidelity_readouts=True,
        fidelity_names={0: "dft", 1: "xtb"},
        fidelity_levels={0: "B3LYP-D3/def2-SVP"},
        sae={0: {1: -13.6, 8: -2041.8}, 1: {1: -10.7, 6: -50.0, 8: -104.0}},
        species={0: [1, 8], 1: [1, 6, 8]},
        dispersion={
            0: {"labels": parse_dispersion({"d3bj": "b3lyp"}, "x").to_dict(), "subtracted": True},
            1: {"labels": parse_dispersion({"d4": "gfn2"}, "x").to_dict(), "subtracted": False},
        },
        extra={
            "train_config": {"run_name": "water", "data": {"fidelity_datasets": {0: "/home/somebody/dft.h5"}}},
            "data": {"fidelities": {"dft": {"fidelity": 0, "files": files, "train": 100, "validation": 20}}},
            "progress": {"epoch": 3, "iteration": 30, "metrics": {"val/E_rmse": 1.5}},
        },
    )
    return path


def test_compiled_model(checkpoint, tmp_path):
    options = {"licence": "CC-BY-4.0", "comment": "Water only."}
    jpt, meta = compile_model(
        checkpoint, tmp_path / "m", fidelity_level=0, coulomb=choose_coulomb("dsf", 12.0), stress=True, **options
    )
    result = run(jpt)
    assert result.exit_code == 0, result.output
    for text in (
        "m_fid0.jpt: compiled model, format 2",
        "0 (dft), of 2 in the training",
        "B3LYP-D3/def2-SVP",
        "H (1), O (8)",
        "open shells, with spin charges",
        "crystals, too",
        "dsf (short range 4.6, envelope exp, cutoff 12.0",
        "D3(BJ) of b3lyp (s6 1, s8 1.9889, a1 0.3981, a2 4.4211), subtracted from the labels",
        "H -13.6000, O -2041.8000 eV",
        "dft: 100 molecules (dft.h5 abababab)",
        "3 epochs, 30 steps",
        "stress yes, hessian no",
        "CC-BY-4.0",
        "Water only.",
    ):
        assert text in result.output, text
    assert len(result.output.splitlines()) < 30
    assert max(map(len, result.output.splitlines())) <= 120
    assert "somebody" not in result.output + meta.read_text()
    info = json.loads(run(jpt, "--json").output)
    assert info["golden_cases"] == 5
    assert info["metadata"]["training"]["config"]["data"]["fidelity_datasets"] == {"0": "dft.h5"}
    assert info["metadata"]["coulomb"]["cutoff"] == 12.0


def test_combined_model(checkpoint, tmp_path):
    jpt, _ = compile_model(checkpoint, tmp_path / "m", combined=True, default_fidelity="xtb")
    result = run(jpt)
    assert result.exit_code == 0, result.output
    assert "0 (dft), 1 (xtb); without the key fidelity: 1 (xtb)" in result.output
    assert "0 (dft) dispersion" in result.output
    assert "H (1), C (6), O (8)" in result.output
    assert json.loads(run(jpt, "--json").output)["metadata"]["fidelities"][1]["cutoff_lr"] == "inf"


def test_checkpoint(checkpoint, fixtures_dir):
    result = run(checkpoint)
    assert result.exit_code == 0, result.output
    assert "own.pt: checkpoint" in result.output
    assert (
        "B3LYP-D3/def2-SVP; elements H (1), O (8); dispersion of the labels: d3bj of b3lyp, subtracted" in result.output
    )
    assert "1 (xtb)" in result.output
    bare = run(fixtures_dir / "ref_mixed.pt")
    assert bare.exit_code == 0, bare.output
    assert "3, readouts of their own" in bare.output
    assert "not inside: --model is needed" in bare.output
    metadata = json.loads(run(checkpoint, "--json").output)["metadata"]
    assert metadata["num_fidelities"] == 2
    assert "model" not in metadata


def test_file_of_version_1(tmp_path):
    """As written before golden cases, by compile_jit of version 0.1.0."""
    metadata = """
format_version: 1
fidelity_level: 1
fidelity_name: null
num_fidelities: 3
species: [1, 6, 8]
cutoff: 5.0
cutoff_lr: .inf
coulomb: simple
sae: {1: -13.6, 6: -1029.5, 8: -2041.8}
dispersion: {method: none, functional: null, parameters: null}
weights: {file: model.pt, sha256: 2336}
versions: {aimnet2mult: 0.1.0}
"""
    path = tmp_path / "old.jpt"
    save_jit_model(Nothing(), path, yaml.safe_load(metadata))
    result = run(path)
    assert result.exit_code == 0, result.output
    for text in ("format 1", "1, of 3 in the training", "Coulomb", "simple", "golden cases     none", "not stated"):
        assert text in result.output


def test_many_elements_fit_a_screen(tmp_path):
    sae = {z: -float(z) for z in range(1, 87)}
    metadata = {
        "format_version": 2,
        "species": list(sae),
        "sae": sae,
        "cutoff": 5.0,
        "dispersion": {"source": "command line", **vars(choose_dispersion("d4", "pbe"))},
    }
    path = tmp_path / "many.jpt"
    save_jit_model(Nothing(), path, metadata)
    result = run(path)
    assert "H (1) to Rn (86)" in result.output
    assert "of 86 elements" in result.output
    assert "D4 of pbe (s6 1, s8 0.95948" in result.output
    assert len(result.output.splitlines()) < 20


def test_files_that_are_neither(tmp_path, fixtures_dir):
    foreign = tmp_path / "foreign.jpt"
    with torchscript_deprecation_ignored():
        torch.jit.save(torch.jit.script(Nothing()), str(foreign))
    text = tmp_path / "text.pt"
    text.write_text("no")
    for path, message in [
        (foreign, "holds no metadata"),
        (text, "not a checkpoint"),
        (tmp_path / "absent.jpt", "absent.jpt: no such file"),
        (fixtures_dir / "tiny_fid0.h5", "not a compiled model"),
    ]:
        result = run(path)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1


def test_compiled_model_is_described_without_torch(compiled):
    code = f"""
import sys
sys.modules["torch"] = None
from aimnet2mult.tools.info import describe, read_info
print("\\n".join(describe(read_info({str(compiled)!r}))))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60, text=True)
    assert "D3(BJ) of b3lyp" in done.stdout


def test_sha256_is_that_of_the_file(compiled):
    import hashlib

    assert read_info(compiled)["sha256"] == hashlib.sha256(compiled.read_bytes()).hexdigest()
