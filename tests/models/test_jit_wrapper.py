import subprocess
import sys

import numpy as np
import pytest
import torch

from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored
from aimnet2mult.models.jit_wrapper import load_jit_model

SAE = {1: -13.587, 6: -1029.476, 7: -1485.234, 8: -2041.789, 9: -2715.3, 17: -12518.7}


@pytest.fixture
def raw(compiled):
    """The file as a stranger loads it."""
    with torchscript_deprecation_ignored():
        return torch.jit.load(str(compiled))


@pytest.fixture
def expected_energy(reference, molecules):
    """Network of the fixture + SAE + D3(BJ), summed by hand in float64."""
    from aimnet2mult.dispersion_params import d3bj_parameters
    from aimnet2mult.modules import DFTD3
    from aimnet2mult.nbops import internal_batch

    data = molecules()
    network = torch.tensor(reference("ref_mixed")["energy_fid1_f64"])
    sae = torch.zeros(19, dtype=torch.float64)
    for z, energy in SAE.items():
        sae[z] = energy
    p = d3bj_parameters("b3lyp")
    d3 = DFTD3(s6=p.s6, s8=p.s8, a1=p.a1, a2=p.a2)(internal_batch(data, 5.0))["energy"]
    return network + sae[data["numbers"]].sum(1) + d3


def test_total_energy_is_network_and_sae_and_dispersion(raw, molecules, reference, expected_energy):
    out = raw(molecules(torch.float32))
    assert sorted(out) == ["charges", "coord", "energy", "forces", "spin_charges"]
    assert out["energy"].dtype == torch.float64
    torch.testing.assert_close(out["energy"], expected_energy, atol=2e-5, rtol=0)
    np.testing.assert_allclose(out["charges"], reference("ref_mixed")["charges_fid1_f64"], rtol=0, atol=1e-5)


def test_four_calls_in_a_row_in_every_layout(raw, molecules, to_flat, expected_energy):
    data = molecules(torch.float32)
    for batch in (data, to_flat(data)):
        for _ in range(4):
            with torch.no_grad():
                out = raw(batch)
            torch.testing.assert_close(out["energy"], expected_energy, atol=2e-5, rtol=0)
            assert not any(value.requires_grad for value in out.values())
    one = {"coord": data["coord"][0, :3], "numbers": data["numbers"][0, :3]}
    torch.testing.assert_close(raw(one)["energy"], expected_energy[:1], atol=2e-5, rtol=0)


def test_only_coord_and_numbers_are_needed(raw, molecules):
    data = molecules(torch.float32)
    closed_shell = [0, 7, 8, 9]
    short = {key: data[key][closed_shell] for key in ("coord", "numbers")}
    full = {key: value[closed_shell] for key, value in data.items()}
    torch.testing.assert_close(raw(short)["energy"], raw(full)["energy"], rtol=0, atol=0)


def test_the_callers_data_stays(raw, molecules):
    data = molecules(torch.float32)
    before = {key: value.clone() for key, value in data.items()}
    raw(data)
    assert data.keys() == before.keys()
    assert all(torch.equal(data[key], before[key]) for key in data)
    assert not data["coord"].requires_grad


def test_graph_is_kept_where_the_caller_wants_it(raw, molecules):
    data = molecules(torch.float32)
    coord = data["coord"].clone().requires_grad_(True)
    for _ in range(4):
        out = raw({**data, "coord": coord})
        (gradient,) = torch.autograd.grad(out["energy"].sum(), coord, retain_graph=True)
        torch.testing.assert_close(-gradient, out["forces"].detach(), atol=1e-5, rtol=1e-5)
        (second,) = torch.autograd.grad(out["forces"].pow(2).sum(), coord)
        assert torch.isfinite(second).all()
    with torch.no_grad():
        assert not raw({**data, "coord": coord})["energy"].requires_grad


def test_double_precision(raw, molecules, reference, expected_energy):
    out = raw.double()(molecules())
    torch.testing.assert_close(out["energy"], expected_energy, atol=1e-9, rtol=0)
    assert out["forces"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": torch.tensor([[35, 1, 1]])}, r"Br \(35\) is not among the elements of fidelity 1: H \(1\), C"),
        ({"numbers": torch.tensor([[35, 1, 53]], dtype=torch.int32)}, r"Br \(35\), I \(53\) are not among"),
        ({"numbers": torch.tensor([[201, 1, 8]])}, r"Z=201 is not among"),
        ({"numbers": torch.tensor([[-1, 1, 8]])}, r"Z=-1 is not among"),
        ({"coord": torch.full((1, 3, 3), torch.nan)}, "coord holds NaN"),
        ({"coord": torch.zeros(1, 3, 2)}, "must have shape"),
        ({"charge": torch.zeros(2)}, "charge has 2 entries for 1 molecules"),
        ({"mult": torch.ones(3)}, "mult has 3 entries for 1 molecules"),
        ({"nbmat": torch.zeros(1, 3, 2, dtype=torch.long)}, "must be padding: numbers = 0"),
        ({"cell": torch.eye(3)}, "cannot be used with a cell"),
    ],
)
def test_bad_input_is_refused_and_grad_mode_stays(compiled, raw, change, message):
    water = {"coord": torch.rand(1, 3, 3), "numbers": torch.tensor([[8, 1, 1]])}
    with torch.no_grad():
        with pytest.raises(torch.jit.Error, match=message):
            raw({**water, **change})
        assert not torch.is_grad_enabled()
    with pytest.raises(ValueError, match=message) as error:
        load_jit_model(compiled)({**water, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mol_idx": torch.tensor([0, 1, 0])}, "mol_idx must be sorted"),
        ({"mol_idx": torch.tensor([0, 0, 2_000_000_000])}, "mol_idx goes up to 2000000000 with 3 atoms"),
        ({"mol_idx": torch.tensor([0, 0, 1]), "charge": torch.zeros(1)}, "mol_idx must be between 0 and 0"),
        ({"mol_idx": torch.tensor([0, 0])}, "mol_idx has shape .2., coord .3, 3."),
    ],
)
def test_bad_flat_input_is_refused_and_grad_mode_stays(raw, change, message):
    water = {"coord": torch.rand(3, 3), "numbers": torch.tensor([8, 1, 1])}
    with torch.no_grad():
        with pytest.raises(torch.jit.Error, match=message):
            raw({**water, **change})
        assert not torch.is_grad_enabled()


def test_inference_mode_is_explained(raw):
    water = {"coord": torch.rand(1, 3, 3), "numbers": torch.tensor([[8, 1, 1]])}
    with torch.inference_mode(), pytest.raises(torch.jit.Error, match=r"use torch.no_grad\(\)"):
        raw(water)
    assert torch.is_grad_enabled()


def test_single_atom(raw):
    out = raw({"coord": torch.zeros(1, 1, 3), "numbers": torch.tensor([[1]]), "mult": torch.tensor([2.0])})
    assert torch.isfinite(out["energy"]).all()
    assert (out["forces"] == 0).all()


def test_hessian_by_both_methods(compiled, molecules, raw):
    model = load_jit_model(compiled)
    data = {key: value[:2] for key, value in molecules(torch.float32).items()}
    exact = model.hessian(data)
    assert exact.shape == (2, 13, 3, 13, 3)
    differences = model.hessian(data, method="finite_difference")
    torch.testing.assert_close(exact, differences, atol=5e-3, rtol=0)
    assert (exact[0, 3:] == 0).all()  # padding
    one = model.hessian({"coord": data["coord"][0, :3], "numbers": data["numbers"][0, :3]})
    torch.testing.assert_close(one, exact[0, :3, :, :3], atol=1e-5, rtol=0)
    # Moving the whole molecule costs nothing.
    assert one.sum(2).abs().max() < 1e-4
    with pytest.raises(ValueError, match="not one of autograd, finite_difference"):
        model.hessian(data, method="numeric")


def test_file_says_what_it_is(compiled):
    model = load_jit_model(compiled)
    assert model.cutoff == 5.0
    assert model.cutoff_lr == float("inf")
    assert model.species == sorted(SAE)
    assert model.metadata["dispersion"]["functional"] == "b3lyp"
    assert model.metadata["sae"] == SAE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(compiled):
    with pytest.raises(ValueError, match="finds no GPU here; use cpu"):
        load_jit_model(compiled, device="cuda")


@pytest.mark.parametrize("device", ["abacus", "xpu", "meta"])
def test_a_device_of_another_kind_that_is_not_there(compiled, device):
    with pytest.raises(ValueError, match=f"device {device}: .* finds no such device here; use cpu"):
        load_jit_model(compiled, device=device)


def test_files_that_are_not_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_jit_model(tmp_path / "absent.jpt")
    path = tmp_path / "text.jpt"
    path.write_text("no")
    with pytest.raises(ValueError, match="not a compiled model"):
        load_jit_model(path)


def test_runs_where_only_torch_is_installed(compiled):
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("aimnet2mult", "ase", "h5py", "yaml", "ignite", "omegaconf", "dftd3"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
model = torch.jit.load({str(compiled)!r})
with torch.no_grad():
    out = model({{"coord": torch.rand(1, 3, 3) * 2, "numbers": torch.tensor([[8, 1, 1]])}})
assert out["energy"].dtype == torch.float64 and out["forces"].shape == (1, 3, 3)
assert "aimnet2mult" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
