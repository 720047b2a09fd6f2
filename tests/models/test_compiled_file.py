import io
import json
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml

from aimnet2mult.models.compiled_file import (
    FORMAT_VERSION,
    GOLDEN_FILE,
    METADATA_FILE,
    metadata_text,
    parse_metadata,
    read_compiled_file,
    save_jit_model,
    torchscript_deprecation_ignored,
)
from aimnet2mult.models.jit_wrapper import load_jit_model


class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cutoff = 5.0
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * self.linear(x)


@pytest.fixture
def file(tmp_path):
    """A small program with metadata and golden cases."""
    path = tmp_path / "double.jpt"
    metadata = {"format_version": FORMAT_VERSION, "units": {"coord": "Å"}, "cutoff_lr": float("inf"), "sae": {1: -13.6}}
    save_jit_model(Double(), path, metadata, {"version": 1, "cases": [{"energy": [-1.0e6 - 1e-10]}]})
    return path


def rewritten(path, target, change):
    """Copy of an archive with entries changed by a function name, content -> content or None."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = change(name.split("/", 1)[1], source.read(name))
            if content is not None:
                archive.writestr(name, content)
    return target


def test_what_was_written_is_read(file):
    content = read_compiled_file(file)
    assert content.metadata == {
        "format_version": 2,
        "units": {"coord": "Å"},
        "cutoff_lr": float("inf"),
        "sae": {1: -13.6},
    }
    assert content.golden == {"version": 1, "cases": [{"energy": [-1.0e6 - 1e-10]}]}
    assert load_jit_model(file).metadata == content.metadata


def test_extra_files_are_those_of_torch(file):
    extra = {METADATA_FILE: "", GOLDEN_FILE: ""}
    with torchscript_deprecation_ignored():
        model = torch.jit.load(str(file), _extra_files=extra)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {key: type(value) for key, value in extra.items()} == {METADATA_FILE: bytes, GOLDEN_FILE: bytes}
    assert yaml.safe_load(extra[METADATA_FILE])["units"] == {"coord": "Å"}
    assert json.loads(extra[GOLDEN_FILE])["cases"]


def test_name_of_the_file_is_not_inside(file):
    with zipfile.ZipFile(file) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}


def test_file_may_be_renamed(file, tmp_path):
    other = tmp_path / "other name.jpt"
    other.write_bytes(file.read_bytes())
    assert read_compiled_file(other) == read_compiled_file(file)


def test_reading_needs_no_torch(file):
    code = f"""
import sys
sys.modules["torch"] = None
from aimnet2mult.models.compiled_file import read_compiled_file
assert read_compiled_file({str(file)!r}).metadata["format_version"] == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_files_of_version_1(file, tmp_path):
    def downgrade(name, content):
        if name == f"extra/{METADATA_FILE}":
            return yaml.safe_dump({"format_version": 1, "coulomb": "simple"})
        return None if name == f"extra/{GOLDEN_FILE}" else content

    old = rewritten(file, tmp_path / "old.jpt", downgrade)
    assert read_compiled_file(old) == ({"format_version": 1, "coulomb": "simple"}, None)
    assert load_jit_model(old).metadata == {"format_version": 1, "coulomb": "simple"}


def test_files_of_a_later_version_are_refused(file, tmp_path):
    later = rewritten(
        file, tmp_path / "later.jpt", lambda name, content: "format_version: 3" if "metadata" in name else content
    )
    for load in (read_compiled_file, load_jit_model):
        with pytest.raises(ValueError, match=r"later.jpt: format 3 of compiled models is newer than this package"):
            load(later)


def test_torchscript_of_other_programs(tmp_path):
    path = tmp_path / "foreign.jpt"
    with torchscript_deprecation_ignored():
        torch.jit.save(torch.jit.script(Double()), str(path))
    assert read_compiled_file(path) == ({}, None)


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.jpt: no such file"):
        read_compiled_file(tmp_path / "absent.jpt")
    text = tmp_path / "text.jpt"
    text.write_text("no")
    with pytest.raises(ValueError, match=r"text.jpt: not a compiled model"):
        read_compiled_file(text)
    checkpoint = tmp_path / "checkpoint.jpt"
    buffer = io.BytesIO()
    torch.save({"model": {}}, buffer)
    checkpoint.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="no TorchScript inside"):
        read_compiled_file(checkpoint)


@pytest.mark.parametrize("aoti", [False, True])
def test_exported_models_are_sent_to_their_metadata(tmp_path, aoti):
    path = tmp_path / "model_fid0.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/data/aotinductor/model/x.so" if aoti else "p/models/model.json", "")
    with pytest.raises(ValueError, match=r"model_fid0.pt2: an exported model \(.pt2\): .* _pt2_meta.yaml"):
        read_compiled_file(path)


def test_metadata_as_text():
    metadata = {"levels": {0: "ωB97M-D3", 1: None}, "sae": {1: -13.587_123_456_789}, "cutoff": float("inf")}
    text = metadata_text(metadata)
    assert "ωB97M-D3" in text
    assert parse_metadata(text, "x") == metadata
    assert parse_metadata("", "x") == {}
