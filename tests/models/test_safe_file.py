"""Files as such: damaged, renamed, built by hand to run code or to need memory."""

import copy
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from aimnet2mult.models.base import load_checkpoint, load_model
from aimnet2mult.models.loading import load_potential
from aimnet2mult.models.safe_file import CheckpointError, is_torchscript, load_tensors

LOADERS = (load_model, load_potential, load_checkpoint)


class Command:
    """What a pickle calls when it is loaded."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def refused(path, message=""):
    """Assert that every loader refuses a file, in one line that names it."""
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(str(path)) + 400


@pytest.fixture(scope="module")
def whole(fixtures_dir):
    return (fixtures_dir / "peer_v2_lr.pt").read_bytes()


def rewritten(data, edit):
    """An archive with entries changed by ``edit(name, bytes) -> bytes or None``."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            content = edit(entry.filename, source.read(entry.filename))
            if content is not None:
                target.writestr(entry.filename, content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"\0" * 10_000, "not a checkpoint"),
        (random.Random(1).randbytes(50_000), "not a checkpoint"),
        (b"PK\x03\x04" + random.Random(2).randbytes(5_000), "not a checkpoint"),
        (b"PK\x05\x06" + b"\0" * 18, "not a checkpoint"),
        (b"PK\x05\x06" + b"\xff" * 18, "damaged or truncated|not a checkpoint"),
        (b"class: aimnet.models.AIMNet2\nkwargs: {}\n", "not a checkpoint"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 1000, "not a checkpoint"),
    ],
    ids=["empty", "zeros", "random", "archive", "empty archive", "lying archive", "YAML", "HDF5"],
)
def test_files_of_another_kind(tmp_path, content, message):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refused(path, message)


def test_a_folder_is_no_file(tmp_path):
    for load in LOADERS:
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(tmp_path)


def test_contents_of_another_kind(tmp_path):
    path = tmp_path / "model.pt"
    for content in ([], {}, 3, "model", None, torch.zeros(3), {"a": 1}, {"model": 1}, [{"model_yaml": "x"}]):
        torch.save(content, path)
        refused(path, "holds no weights")


@pytest.mark.parametrize("new", [True, False], ids=["archive", "old format"])
@pytest.mark.parametrize(
    "command",
    [
        Command(os.system, "touch touched"),
        Command(subprocess.Popen, ["touch", "touched"]),
        Command(eval, "open('touched', 'w')"),
        Command(open, "touched", "w"),
        Command(torch.load, "touched"),
        Command(torch.hub.load, "touched", "x"),
        Command(getattr, os, "getcwd"),
    ],
    ids=["os.system", "Popen", "eval", "open", "torch.load", "torch.hub.load", "getattr"],
)
def test_pickled_code_is_not_run(tmp_path, monkeypatch, whole, command, new):
    if command.function is getattr:
        command.args = (dict, "fromkeys")
    monkeypatch.chdir(tmp_path)
    content = torch.load(io.BytesIO(whole), weights_only=True)
    path = tmp_path / "model.pt"
    for hostile in (command, {**content, "family": command}, {**content, command.function.__name__: [command]}):
        torch.save(hostile, path, _use_new_zipfile_serialization=new)
        refused(path, "cannot be loaded safely|not a checkpoint")
        # The first of a plain pickle, without anything of torch.
        path.write_bytes(pickle.dumps(hostile if isinstance(hostile, Command) else {"model_yaml": command}))
        refused(path, "not a checkpoint")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_message_names_what_the_pickle_asks_for(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model_yaml": Command(os.system, "true")}, path)
    with pytest.raises(CheckpointError, match=r"loaded safely: it asks for posix\.system$") as caught:
        load_tensors(path)
    assert "weights_only" not in str(caught.value)


def test_truncated_files(tmp_path, whole):
    path = tmp_path / "model.pt"
    numbers = random.Random(3)
    for length in [1, 4, 22, 100, len(whole) - 1, *(numbers.randrange(len(whole)) for _ in range(25))]:
        path.write_bytes(whole[:length])
        refused(path, "damaged or truncated|not a checkpoint")


def test_flipped_bits(tmp_path, whole):
    # The weights are most of the file; half of the flips are where its structure is.
    numbers = random.Random(4)
    structure = whole.index(b"data/0")
    places = [numbers.randrange(len(whole)) for _ in range(40)]
    places += [numbers.randrange(structure) for _ in range(40)]
    places += [numbers.randrange(len(whole) - 4000, len(whole)) for _ in range(40)]
    path = tmp_path / "model.pt"
    loaded, messages = 0, []
    for n, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << numbers.randrange(8)
        path.write_bytes(damaged)
        try:
            LOADERS[n % 3](path)
            loaded += 1
        except CheckpointError as error:
            messages.append(str(error))
    assert 0 < loaded < len(places)
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def test_archive_with_bytes_of_a_program_missing(tmp_path, whole):
    path = tmp_path / "model.pt"
    path.write_bytes(rewritten(whole, lambda name, data: None if name.endswith("data.pkl") else data))
    refused(path, "not a checkpoint")
    path.write_bytes(rewritten(whole, lambda name, data: None if name.endswith("data/3") else data))
    refused(path, "not a checkpoint")
    path.write_bytes(rewritten(whole, lambda name, data: data[:8] if name.endswith("data/6") else data))
    refused(path, "not a checkpoint")


def test_archive_that_is_compressed(tmp_path, whole):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"\0" * 50_000_000)
    assert path.stat().st_size < 100_000
    refused(path, "compressed inside, which torch.save never does")


def test_archive_whose_directory_lies(tmp_path, whole):
    # The size of an entry in the central directory: at byte 24 of its record, after the compressed one.
    at = whole.rindex(b"data/6") - len(whole[whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/6")) :][:0])
    record = whole.rindex(b"PK\x01\x02", 0, at)
    damaged = bytearray(whole)
    damaged[record + 20 : record + 28] = struct.pack("<II", 4_000_000_000, 4_000_000_000)
    path = tmp_path / "model.pt"
    path.write_bytes(damaged)
    refused(path, "claims to be larger than the file|damaged|not a checkpoint")


def test_archive_of_very_many_files(tmp_path, monkeypatch, whole):
    monkeypatch.setattr("aimnet2mult.models.safe_file.MAX_ENTRIES", 20)
    path = tmp_path / "model.pt"
    path.write_bytes(whole)
    refused(path, "files inside, more than any model has tensors")


def test_is_torchscript_by_content(tmp_path, whole, compiled):
    path = tmp_path / "model.jpt"
    path.write_bytes(whole)
    assert not is_torchscript(path)
    load_model(path)
    assert is_torchscript(compiled)
    path.write_bytes(compiled.read_bytes()[:-1000])
    refused(path, "not a checkpoint|damaged")


def test_memory_that_the_file_cannot_fill(tmp_path):
    """Files of less than 100 kB that ask for 10 GB: refused, and the memory is never taken."""
    small = io.BytesIO()
    torch.save({"model": {"afv.weight": torch.zeros(4)}}, small, _use_new_zipfile_serialization=False)
    old = small.getvalue()
    # Four elements become 2.5 billion: of the storage, and of the tensor.
    assert old.count(b"K\x04N") == 1
    assert old.count(b"K\x04\x85") == 1
    many = b"\x8a\x05" + struct.pack("<q", 2_500_000_000)[:5]
    files = {
        "storage": old.replace(b"K\x04N", many + b"N"),
        "tensor": old.replace(b"K\x04\x85", many + b"\x85"),
        "both": old.replace(b"K\x04N", many + b"N").replace(b"K\x04\x85", many + b"\x85"),
    }
    # Without the list of storages, nothing fills them.
    both = files["both"]
    keys = both.rindex(b"\x80\x02]")
    files["nothing filled"] = both[:keys] + b"\x80\x02]q\x00."
    expanded = io.BytesIO()
    torch.save({"model": {"afv.weight": torch.zeros(1).expand(50_000, 50_000)}}, expanded)
    files["expanded"] = expanded.getvalue()
    array = io.BytesIO()
    torch.save({"model_yaml": "x", "state_dict": {"a": Command(bytearray, 10**10)}}, array)
    files["array"] = array.getvalue()
    for name, data in files.items():
        assert len(data) < 100_000
        (tmp_path / f"{name}.pt").write_bytes(data)
    program = textwrap.dedent(
        """
        import resource, sys, time
        from pathlib import Path
        from aimnet2mult.models.base import load_checkpoint, load_model
        from aimnet2mult.models.loading import load_potential
        from aimnet2mult.models.safe_file import CheckpointError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(Path(sys.argv[1]).glob("*.pt")):
            for load in (load_model, load_potential, load_checkpoint):
                start = time.perf_counter()
                try:
                    load(path)
                    print(f"{path.name}: taken by {load.__name__}")
                except CheckpointError:
                    pass
                used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
                if used > 300 or time.perf_counter() - start > 2.0:
                    print(f"{path.name}: {used:.0f} MB, {time.perf_counter() - start:.1f} s")
        print("done")
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stdout + done.stderr


# --- checkpoints of this package ---


@pytest.fixture(scope="module")
def checkpoint(fixtures_dir):
    """Entries of a checkpoint that all loaders take."""
    return load_checkpoint(fixtures_dir / "peer_v2_lr.pt")


def _model_config(change):
    def edit(content):
        content["model_config"] = copy.deepcopy(content["model_config"])
        change(content["model_config"])

    return edit


def _output(name, cls, **kwargs):
    node = {"class": cls, "kwargs": kwargs}
    return _model_config(lambda config: config["kwargs"]["outputs"].update({name: node}))


def _size(**given):
    return _model_config(lambda config: config["kwargs"].update(given))


def _entry(key, value):
    return lambda content: content.update({key: value})


HOSTILE = {
    "function": (_output("x", "aimnet2mult.models.base.copy_model", source="a", target="touched"), "may name"),
    "function outside": (_output("x", "os.system", command="touch touched"), "class 'os.system' is not one that"),
    "module that reads": (_output("x", "aimnet2mult.models.legacy.LegacyNetwork"), "is not one that a model file may"),
    "layer of 40 GB": (_output("x", "torch.nn.Linear", in_features=10**5, out_features=10**5), "may name"),
    "network": (
        _model_config(lambda config: config.update({"class": "aimnet2mult.models.base.copy_model"})),
        "not a n",
    ),
    "arguments by place": (_model_config(lambda config: config.update(args=[1])), "the key 'args' is not allowed"),
    "size": (_size(nfeature=10**6), "describes a network of"),
    "size of text": (_size(nfeature="8"), "nfeature must be a positive whole number"),
    "size beyond": (_size(aim_size=10**12), "larger than any size of a model"),
    "path": (_size(num_types="/etc/passwd"), "looks like the name of a file"),
    "arguments a number": (
        _model_config(
            lambda config: (
                config.update({"class": "aimnet.models.AIMNet2"}),
                config["kwargs"]["outputs"].update(x={"class": "aimnet.modules.AtomicSum", "kwargs": 3}),
            )
        ),
        "outputs.x: kwargs must be a mapping, found int",
    ),
    "configuration a list": (_entry("model_config", [1]), "model_config: expected a mapping with the key class"),
    "configuration text": (
        _entry("model_config", "aimnet2mult"),
        "model_config: expected a mapping with the key class",
    ),
    "version of text": (_entry("format_version", "1"), "format_version '1' is not a number"),
    "version later": (_entry("format_version", 9), "checkpoint format 9 is newer than this package"),
    "fidelities of text": (_entry("num_fidelities", "3"), "num_fidelities must be a number of fidelities, found '3'"),
    "fidelities none": (_entry("num_fidelities", 0), "num_fidelities must be a number of fidelities, found 0"),
    "fidelities of 10^9": (_entry("num_fidelities", 10**9), "num_fidelities must be a number of fidelities"),
    "fidelities of 900": (_entry("num_fidelities", 900), "the embedding of the checkpoint has 64 rows"),
    "offset zero": (_entry("fidelity_offset", 0), "fidelity_offset must be at least 129, found 0"),
    "energies a list": (_entry("sae", [1.0]), "sae must be a mapping .*found something of the type list"),
    "energies of text": (_entry("sae", {0: {1: "x"}}), r"sae.0 must be \{Z: energy in eV\}, finite"),
    "energies NaN": (_entry("sae", {0: {1: float("nan")}}), "sae.0 must be"),
    "species of text": (_entry("species", {0: "HCNO"}), "species.0 must be a list of atomic numbers"),
    "names a list": (_entry("fidelity_names", ["a"]), "fidelity_names must be a mapping"),
    "levels of numbers": (_entry("fidelity_levels", {0: 1}), "fidelity_levels.0 must be text, found 1"),
    "dispersion of text": (_entry("dispersion", {0: "d3"}), "dispersion.0 must be"),
    "dispersion infinite": (
        _entry(
            "dispersion",
            {0: {"subtracted": True, "labels": {"method": "d3bj", "parameters": {"s8": float("inf")}}}},
        ),
        "dispersion.0 must be",
    ),
    "weights not tensors": (_entry("model", {"afv.weight": [1.0]}), "model: afv.weight is of the type list"),
    "weights none": (_entry("model", {}), "there is no afv.weight"),
    "weights of a number": (_entry("model", {"afv.weight": torch.tensor(1.0)}), "afv.weight has the shape"),
    "weights expanded": (
        _entry("model", {"afv.weight": torch.zeros(1).expand(129, 10**8)}),
        "the file holds fewer numbers for it",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_checkpoint_is_refused(tmp_path, monkeypatch, checkpoint, name):
    monkeypatch.chdir(tmp_path)
    change, message = HOSTILE[name]
    content = dict(checkpoint)
    change(content)
    path = tmp_path / "model.pt"
    torch.save(content, path)
    if name == "fidelities of 900":  # found when the weights are spread over fidelities
        with pytest.raises(CheckpointError, match=message):
            load_model(path)
        return
    refused(path, message)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_dispersion_of_a_checkpoint_without_parameters(tmp_path, checkpoint):
    path = tmp_path / "model.pt"
    labels = {"method": "d3bj", "parameters": {"a1": 0.5}}
    torch.save({**checkpoint, "dispersion": {0: {"labels": labels, "subtracted": True}}}, path)
    for load in (load_model, load_potential):
        with pytest.raises(CheckpointError, match=r"dispersion.0.labels.parameters: s6, s8, a2 missing"):
            load(path)


def test_checkpoint_without_a_change_is_taken(tmp_path, checkpoint):
    path = tmp_path / "model.pt"
    torch.save(checkpoint, path)
    for load in LOADERS:
        load(path)
    content = dict(checkpoint)
    _model_config(lambda config: config.update({"class": "aimnet.models.AIMNet2"}))(content)
    torch.save(content, path)
    for load in LOADERS:
        load(path)


def test_checkpoint_that_cannot_be_built(tmp_path, checkpoint):
    path = tmp_path / "model.pt"
    content = dict(checkpoint)
    _size(aev={"rc_s": "five", "nshifts_s": 12})(content)
    torch.save(content, path)
    for load in (load_model, load_potential):
        with pytest.raises(CheckpointError, match="the model cannot be built"):
            load(path)


def test_table_of_a_file_comes_from_the_weights(tmp_path, monkeypatch, checkpoint):
    """``ptfile`` in the configuration of a checkpoint is not read again: its table is among the weights."""
    content = dict(checkpoint)
    _output("disp", "aimnet2mult.modules.DispParam", ptfile=str(tmp_path / "table.pt"))(content)
    content["model"] = {**content["model"], "outputs.disp.disp_param0": torch.ones(20, 2)}
    path = tmp_path / "model.pt"
    torch.save(content, path)
    model, _ = load_model(path)
    assert torch.equal(model.outputs["disp"].disp_param0, torch.ones(20, 2))


def test_what_came_up_is_said_and_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "text.pt").write_text("not a model")
    with pytest.raises(CheckpointError, match=r"is it whole\? \(\w+\)$"):
        load_tensors(tmp_path / "text.pt")
    torch.save({"model": torch.ones(2)}, tmp_path / "fine.pt")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "fine.pt"))

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError):
        load_tensors(tmp_path / "fine.pt")
