"""The program of ``examples/cpp``, built with the LibTorch of the installed wheel, against Python."""

import os
import shutil
import subprocess

import pytest
import torch

from aimnet2mult.constants import ELEMENT_SYMBOLS
from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored

EXAMPLE = "examples/cpp"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory, pytestconfig):
    build = tmp_path_factory.mktemp("cpp")
    environment = {**os.environ, "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path}
    # Optimisation is for users; the work is done inside LibTorch.
    configure = ["cmake", "-S", pytestconfig.rootpath / EXAMPLE, "-B", build, "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "energy"


@pytest.fixture
def run(program, compiled):
    def call(*arguments, model=compiled):
        return subprocess.run([program, model, *map(str, arguments)], capture_output=True, text=True, timeout=120)

    return call


def write_xyz(path, numbers, coord, comment=""):
    atoms = [
        f"{ELEMENT_SYMBOLS[z]} " + " ".join(f"{x:.17g}" for x in r)
        for z, r in zip(numbers.tolist(), coord.tolist(), strict=True)
    ]
    path.write_text("\n".join([str(len(atoms)), comment, *atoms]) + "\n")
    return path


def printed(text):
    """{name: rows} of the program's output."""
    tables = {}
    for line in text.splitlines():
        if line[0].isalpha():
            rows = tables.setdefault(line.split()[0], [])
        else:
            rows.append([float(word) for word in line.split()])
    return tables


@pytest.mark.parametrize("double", [True, False])
def test_same_numbers_as_python_to_the_last_digit(run, compiled, molecules, tmp_path, double):
    data = molecules(torch.float64 if double else torch.float32)
    with torchscript_deprecation_ignored():
        model = torch.jit.load(str(compiled))
    model = model.double() if double else model
    for b in (0, 5, 11):  # ions and radicals among them
        n_atoms = int((data["numbers"][b] > 0).sum())
        one = {"coord": data["coord"][b, :n_atoms], "numbers": data["numbers"][b, :n_atoms]}
        one |= {key: data[key][b : b + 1] for key in ("charge", "mult")}
        with torch.no_grad(), torch.jit.optimized_execution(False):
            expected = model(one)
        xyz = write_xyz(tmp_path / "molecule.xyz", one["numbers"], one["coord"])
        options = ["--charge", one["charge"].item(), "--mult", one["mult"].item()] + (["--double"] if double else [])
        done = run(xyz, *options)
        assert done.returncode == 0, done.stderr
        tables = printed(done.stdout)
        assert sorted(tables) == ["charges", "energy", "forces"]
        for key, rows in tables.items():
            assert torch.equal(
                torch.tensor(rows, dtype=torch.float64).reshape(expected[key].shape), expected[key].double()
            ), key


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("3\n\nBr 0 0 0\nH 0 0 1\nH 0 1 0\n", [], "Br (35) is not among the elements of fidelity 1: H (1), C (6)"),
        ("2\n\nH 0 0 0\nH 0 0 nan\n", [], "atom 2 of 2 must be a line with a symbol and three coordinates"),
        ("2\n\nH 0 0 0\n", [], "atom 2 of 2 must be a line"),
        ("2\n\nH 0 0 0\nQq 0 0 1\n", [], "'Qq' is not the symbol of an element"),
        ("water\n", [], "the first line must be the number of atoms"),
        ('1\nLattice="9 0 0 0 9"\nH 0 0 0\n', ["--mult", "2"], "Lattice must hold nine numbers"),
        ('1\nLattice="9 0 0 0 9 0 0 0 9"\nH 0 0 0\n', ["--mult", "2"], "dsf or ewald"),
        ("1\n\nH 0 0 0\n", ["--charge", "one"], "--charge: 'one' is not a number"),
        ("1\n\nH 0 0 0\n", ["--charges", "1"], "--charges is not one of --charge, --mult"),
        ("1\n\nH 0 0 0\n", ["--mult"], "--mult needs a number"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(run, tmp_path, text, options, message):
    path = tmp_path / "input.xyz"
    path.write_text(text)
    done = run(path, *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_files_that_are_not_there_or_no_models(run, tmp_path, compiled):
    xyz = tmp_path / "h.xyz"
    xyz.write_text("1\n\nH 0 0 0\n")
    for arguments, model, message in [
        ([tmp_path / "absent.xyz"], compiled, "absent.xyz: no such file"),
        ([xyz], tmp_path / "absent.jpt", "absent.jpt: no such file"),
        ([xyz], xyz, "h.xyz: not a compiled model ("),
    ]:
        done = run(*arguments, model=model)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
