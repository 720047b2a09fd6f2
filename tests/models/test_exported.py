"""Exported programs (``.pt2``) against the compiled model (``.jpt``) of the same checkpoint."""

import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner

from aimnet2mult.models.exported import MAX_PLACES, load_pt2
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.tools.compile_options import choose_dispersion
from aimnet2mult.tools.compile_pt2 import export_checkpoint, main

TOLERANCE = {"energy": {"atol": 0.0, "rtol": 1e-10}, "other": {"atol": 1e-9, "rtol": 1e-9}}


@pytest.fixture(scope="module")
def source(fixtures_dir, sae_file):
    return {
        "weights": fixtures_dir / "ref_mixed.pt",
        "model": fixtures_dir / "ref_mixed_model.yaml",
        "sae": sae_file,
        "fidelity_level": 1,
        "dispersion": choose_dispersion("d3bj", "b3lyp"),
    }


@pytest.fixture(scope="module")
def pt2(tmp_path_factory, source):
    """The same model as ``compiled``, in double precision."""
    return export_checkpoint(output=tmp_path_factory.mktemp("exported") / "model", precision="float64", **source)[0]


@pytest.fixture(scope="module")
def exported(pt2):
    return load_pt2(pt2)


@pytest.fixture(scope="module")
def jpt(compiled):
    model = load_jit_model(compiled)
    model.module.double()
    return model


def assert_same(out, expected):
    assert out.keys() == expected.keys()
    for key, value in expected.items():
        assert out[key].dtype == value.dtype
        torch.testing.assert_close(out[key], value, **TOLERANCE["energy" if key == "energy" else "other"])


def heap(n_molecules, n_atoms, seed=0):
    """Atoms near the points of a grid; multiplicities that fit."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([1, 6, 7, 8])[torch.randint(4, (n_molecules, n_atoms), generator=generator)]
    grid = 1.5 * torch.cartesian_prod(*[torch.arange(5.0)] * 3)[:n_atoms].double()
    coord = grid + 0.2 * torch.rand(n_molecules, n_atoms, 3, generator=generator, dtype=torch.float64)
    return {"coord": coord, "numbers": numbers, "mult": 1.0 + numbers.sum(1) % 2}


def test_reference_molecules_padded_and_flat(exported, jpt, molecules, to_flat):
    data = molecules()
    assert_same(exported(data), jpt(data))
    flat = to_flat(data)
    assert_same(exported(flat), jpt(flat))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 40), (2, 2), (5, 7), (3, 3), (33, 5), (2, 100)])
def test_any_number_of_molecules_and_atoms(exported, jpt, shape):
    data = heap(*shape)
    assert_same(exported(data), jpt(data))


def test_padding_and_neighbours_in_the_batch_change_nothing(exported):
    data = heap(1, 6)
    alone = exported(data)
    both = {key: torch.cat([value, value[:, :6] if value.dim() > 1 else value]) for key, value in data.items()}
    both["coord"] = torch.nn.functional.pad(both["coord"], (0, 0, 0, 4))
    both["numbers"] = torch.nn.functional.pad(both["numbers"], (0, 4))
    out = exported(both)
    torch.testing.assert_close(out["energy"], alone["energy"].expand(2), rtol=1e-12, atol=0)
    torch.testing.assert_close(out["forces"][1:, :6], alone["forces"], rtol=0, atol=1e-11)
    assert (out["forces"][:, 6:] == 0).all()
    assert (out["charges"][:, 6:] == 0).all()


def test_total_energies_of_single_precision_files(tmp_path, source, jpt, molecules):
    """Self-atomic energies of tens of thousands of eV keep all their digits."""
    path, _ = export_checkpoint(output=tmp_path / "single", precision="float32", **source)
    expected = jpt(molecules(torch.float64))["energy"]
    assert expected.abs().max() > 1e4
    torch.testing.assert_close(load_pt2(path)(molecules(torch.float32))["energy"], expected, rtol=0, atol=2e-5)


def test_batches_without_atoms_or_molecules(exported):
    none = exported({"coord": torch.zeros(0, 3, 3), "numbers": torch.zeros(0, 3, dtype=torch.long)})
    assert none["energy"].shape == (0,)
    assert none["forces"].shape == (0, 3, 3)
    empty = exported({"coord": torch.zeros(2, 0, 3), "numbers": torch.zeros(2, 0, dtype=torch.long)})
    assert (empty["energy"] == 0).all()
    padding = exported(
        {
            "coord": torch.zeros(2, 3, 3),
            "numbers": torch.tensor([[1, 0, 0], [0, 0, 0]]),
            "charge": torch.tensor([1.0, 0.0]),
        }
    )
    assert padding["energy"][1] == 0
    assert torch.isfinite(padding["forces"]).all()
    flat = exported({"coord": torch.zeros(0, 3), "numbers": torch.zeros(0, dtype=torch.long)})
    assert flat["forces"].shape == (0, 3)


def test_forces_are_the_gradient_of_the_energy(exported):
    data = heap(1, 8, seed=3)
    forces, step = exported(data)["forces"], 1e-4
    for i, k in ((0, 0), (3, 1), (7, 2)):
        energies = []
        for sign in (1.0, -1.0):
            coord = data["coord"].clone()
            coord[0, i, k] += sign * step
            energies.append(exported({**data, "coord": coord})["energy"])
        torch.testing.assert_close(-(energies[0] - energies[1]) / (2 * step), forces[:, i, k], atol=1e-6, rtol=0)


def test_grad_modes_and_the_callers_data(exported, jpt):
    data = heap(2, 5)
    before = {key: value.clone() for key, value in data.items()}
    expected = jpt(data)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            out = exported(data)
        assert_same({key: value.clone() for key, value in out.items()}, expected)
        assert not any(value.requires_grad for value in out.values())
    assert all(torch.equal(data[key], before[key]) for key in before)
    leaf = {**data, "coord": data["coord"].clone().requires_grad_(True)}
    with pytest.raises(ValueError, match=r"coord requires grad: results of a .pt2 have no graph"):
        exported(leaf)
    with torch.no_grad():
        assert_same(exported(leaf), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coord": torch.rand(1, 3, 3).bfloat16()}, "coord must be float32 or float64"),
        ({"numbers": torch.tensor([[35, 1, 1]])}, r"Br \(35\) is not among the elements of fidelity 1: H \(1\), C"),
        ({"numbers": torch.tensor([[-1, 1, 8]])}, r"Z=-1 is not among"),
        ({"coord": torch.full((1, 3, 3), torch.nan)}, "coord holds NaN"),
        ({"coord": torch.zeros(1, 3, 2)}, "must have shape"),
        ({"coord": torch.zeros(1, 3, 3)}, "atoms are on top of each other"),
        ({"charge": torch.zeros(2)}, "charge has 2 entries for 1 molecules"),
        ({"charge": torch.full((1,), torch.nan)}, "charge holds NaN"),
        ({"mult": torch.tensor([2.0])}, "molecule 0: its multiplicity .* is impossible"),
        ({"cell": torch.eye(3)}, r"cell: a .pt2 evaluates molecules in dense or flat layout only; use the .jpt"),
        ({"nbmat": torch.zeros(1, 3, 2, dtype=torch.long)}, "nbmat: a .pt2"),
    ],
)
def test_what_it_cannot_do_is_refused(exported, change, message):
    water = {"coord": torch.rand(1, 3, 3) * 3, "numbers": torch.tensor([[8, 1, 1]])}
    with pytest.raises(ValueError, match=message) as error:
        exported({**water, **change})
    assert "\n" not in str(error.value)


def test_large_molecules_are_refused(exported):
    n_atoms = MAX_PLACES + 1
    data = {"coord": torch.rand(n_atoms, 3), "numbers": torch.full((n_atoms,), 8)}
    with pytest.raises(ValueError, match=f"molecules of {n_atoms} atoms: a .pt2 takes {MAX_PLACES} at most"):
        exported(data)


def test_the_file_says_what_it_is(pt2, exported, jpt):
    metadata = yaml.safe_load(pt2.with_name(f"{pt2.stem}_pt2_meta.yaml").read_text(encoding="utf-8"))
    assert exported.metadata == metadata
    assert metadata["kind"] == "torch.export program"
    assert metadata["outputs"] == ["energy", "forces", "charges", "spin_charges"]
    assert metadata["sae"] == jpt.metadata["sae"]
    assert metadata["dispersion"] == jpt.metadata["dispersion"]


def test_program_runs_with_torch_alone(pt2, exported, tmp_path):
    """What a stranger without this package calls: five tensors in, a list out."""
    data = heap(3, 5)
    numbers = torch.nn.functional.pad(data["numbers"], (0, 1))
    coord = torch.nn.functional.pad(data["coord"], (0, 0, 0, 1))
    real_idx = numbers.flatten().nonzero().squeeze(1)
    torch.save([coord, numbers, torch.zeros(3).double(), data["mult"].double(), real_idx], tmp_path / "inputs.pt")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("aimnet2mult", "h5py", "yaml", "click", "ase", "ignite", "omegaconf"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
model = torch.export.load({str(pt2)!r}).module()
torch.save(model(*torch.load({str(tmp_path / "inputs.pt")!r}))[0], {str(tmp_path / "energy.pt")!r})
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "energy.pt"), exported(data)["energy"], rtol=1e-13, atol=0)


def test_files_that_are_not_models(tmp_path, compiled):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pt2(tmp_path / "absent.pt2")
    path = tmp_path / "text.pt2"
    path.write_text("no")
    for file in (path, compiled):
        with pytest.raises(ValueError, match="not an exported model") as error:
            load_pt2(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fidelity-level", "all"], "a .pt2 holds one fidelity"),
        (["--fidelity-level", "9"], "the checkpoint has the fidelities 0..2"),
        (["--fidelity-level", "1", "--precision", "bf16"], "'bf16' is not one of"),
        (["--fidelity-level", "1", "--dispersion", "d4", "--dispersion-functional", "pbe"], "--dispersion-s9 0"),
        (["--fidelity-level", "1", "--dispersion", "0=none"], "--dispersion 0=none: fidelity 0 is not compiled"),
        (["--fidelity-level", "1", "--stress"], "No such option"),
        (["--fidelity-level", "1", "--output", ""], "expected the beginning of the names of files"),
    ],
)
def test_mistakes_of_the_command_line(tmp_path, source, flags, message):
    paths = [f"--{name}={source[name]}" for name in ("weights", "model", "sae")]
    result = CliRunner().invoke(main, [*paths, "--output", str(tmp_path / "model"), *flags])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_aoti_package(tmp_path, source, compiled):
    """Machine code in single precision, with the default dispersion."""
    pt2, _ = export_checkpoint(output=tmp_path / "model", aoti=True, **source)
    model, expected = load_pt2(pt2), load_jit_model(compiled)
    assert model.metadata["kind"] == "AOTInductor package"
    for shape in ((1, 1), (4, 6), (2, 30)):
        data = {key: value.float() if value.is_floating_point() else value for key, value in heap(*shape).items()}
        out, wanted = model(data), expected(data)
        torch.testing.assert_close(out["energy"], wanted["energy"], rtol=1e-7, atol=1e-4)
        torch.testing.assert_close(out["forces"], wanted["forces"], rtol=0, atol=1e-4)
