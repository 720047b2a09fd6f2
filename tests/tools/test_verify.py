import zipfile

import pytest
import torch
from click.testing import CliRunner

from aimnet2mult.models.compiled_file import GOLDEN_FILE, METADATA_FILE, torchscript_deprecation_ignored
from aimnet2mult.tools.verify import main, verify


@pytest.fixture
def damaged(compiled, tmp_path):
    """Function: copy of the compiled model with one weight changed by a factor."""

    def save(factor):
        extra = {METADATA_FILE: "", GOLDEN_FILE: ""}
        with torchscript_deprecation_ignored():
            module = torch.jit.load(str(compiled), _extra_files=extra)
            weight = next(p for name, p in module.named_parameters() if name.endswith("energy_mlp.mlp.0.weight"))
            weight.data[0, 0] *= factor
            torch.jit.save(module, str(tmp_path / "damaged.jpt"), _extra_files=extra)
        return tmp_path / "damaged.jpt"

    return save


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_compiled_model_is_verified(compiled):
    result = run(compiled)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "compiled with torch" in lines[0]
    assert lines[2].split("  ")[0] == "case"
    assert sum(line.startswith(("molecules", "ions", "clusters", "Hessian")) for line in lines) == 8
    assert lines[-1].startswith("verified: all")


def test_other_weights_are_found(damaged):
    path = damaged(2.0)
    result = run(path)
    assert result.exit_code == 1
    assert "NOT VERIFIED" in result.output
    assert "Do not trust this model on this machine" in result.output
    assert " !" in result.output
    beyond = [difference for difference in verify(path) if not difference.within]
    assert {d.precision for d in beyond} == {"float32", "float64"}
    assert {"energy", "forces"} <= {d.quantity for d in beyond}


def test_double_precision_sees_what_single_cannot(damaged):
    path = damaged(1.0 + 1e-4)
    beyond = [difference for difference in verify(path) if not difference.within]
    assert {d.precision for d in beyond} == {"float64"}
    assert run(path, "--tolerance-double", 1e-3).exit_code == 0


def test_tolerances(compiled):
    assert run(compiled, "--tolerance", 1e-3, "--tolerance-double", 1e-7).exit_code == 0
    assert {d.allowed for d in verify(compiled, tolerance=0.5, tolerance_double=0.25)} == {0.5, 0.25}


def test_file_of_version_1_cannot_be_verified(compiled, tmp_path):
    old = tmp_path / "old.jpt"
    with zipfile.ZipFile(compiled) as source, zipfile.ZipFile(old, "w") as archive:
        for name in source.namelist():
            if name.endswith(METADATA_FILE):
                archive.writestr(name, "format_version: 1")
            elif not name.endswith(GOLDEN_FILE):
                archive.writestr(name, source.read(name))
    result = run(old)
    assert result.exit_code == 2
    assert "holds no golden cases (format version 1); compile it anew" in result.output


def test_mistakes(compiled, tmp_path):
    text = tmp_path / "text.jpt"
    text.write_text("no")
    for args, message in [
        ([tmp_path / "absent.jpt"], "absent.jpt: no such file"),
        ([text], "text.jpt: not a compiled model"),
        ([compiled, "--device", "abacus"], "--device abacus: not available here"),
        ([compiled, "--device", "meta"], "--device meta: not available here"),
        ([compiled, "--tolerance", "nan"], "--tolerance nan: expected a number that is not negative"),
        ([compiled, "--tolerance-double", -1], "--tolerance-double -1.0: expected"),
    ]:
        result = run(*args)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_what_the_cpu_gave(compiled):
    assert run(compiled, "--device", "cuda").exit_code == 0
