"""The compiled file in a process that has PyTorch and nothing else: what a stranger does with it."""

import subprocess
import sys
import textwrap

import pytest
import torch

ONLY_TORCH = """
import sys

ABSENT = ("aimnet2mult", "numpy", "h5py", "yaml", "click", "tqdm", "ase", "ignite", "omegaconf", "dftd3", "dftd4")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in ABSENT:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")

import torch

torch.set_num_threads(1)
model = torch.jit.load(sys.argv[1])
batches = torch.load(sys.argv[2], weights_only=True)
"""


@pytest.fixture
def stranger(compiled, molecules, to_flat, tmp_path):
    """Run code after `ONLY_TORCH`, isolated (-I: no paths of the caller, no site of the user); returns its results."""
    data = {key: value[:4] for key, value in molecules(torch.float32).items()}
    torch.save({"dense": data, "flat": to_flat(data)}, tmp_path / "batches.pt")
    script = tmp_path / "stranger.py"

    def run(code):
        script.write_text(ONLY_TORCH + textwrap.dedent(code) + "\ntorch.save(results, sys.argv[3])\n")
        arguments = [compiled, tmp_path / "batches.pt", tmp_path / "results.pt"]
        # Far from the package, and with numpy blocked, whose absence torch announces by a warning.
        command = [sys.executable, "-I", "-W", "ignore", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / "results.pt", weights_only=True)

    return run


def test_each_layout_with_and_without_graph(stranger, compiled):
    results = stranger(
        """
        results = {}
        for name, batch in batches.items():
            for _ in range(3):  # the executor compiles during the first calls, and results must not change
                with torch.no_grad():
                    results[name] = model(batch)
            coord = batch["coord"].clone().requires_grad_(True)
            out = model({**batch, "coord": coord})
            (gradient,) = torch.autograd.grad(out["energy"].sum(), coord, create_graph=True)
            (second,) = torch.autograd.grad(out["forces"].square().sum(), coord)
            results[name + " gradient"] = {"coord": gradient.detach(), "second": second}
        """
    )
    dense, flat = results["dense"], results["flat"]
    real = dense["charges"] != 0
    torch.testing.assert_close(dense["energy"], flat["energy"], atol=1e-5, rtol=0)
    torch.testing.assert_close(dense["forces"][real], flat["forces"], atol=1e-5, rtol=0)
    for name in ("dense", "flat"):
        assert results[name]["energy"].dtype == torch.float64
        derivatives = results[name + " gradient"]
        torch.testing.assert_close(-derivatives["coord"], results[name]["forces"], atol=1e-5, rtol=1e-5)
        assert derivatives["second"].abs().max() > 0
        assert torch.isfinite(derivatives["second"]).all()


def test_same_numbers_as_here(stranger, compiled, molecules):
    from aimnet2mult.models.jit_wrapper import load_jit_model

    results = stranger("results = model(batches['dense'])")
    expected = load_jit_model(compiled)({key: value[:4] for key, value in molecules(torch.float32).items()})
    assert results.keys() == {*expected, "coord"}
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, atol=1e-6, rtol=1e-7)


def test_a_mistake_is_named(stranger):
    results = stranger(
        """
        try:
            model({"coord": torch.zeros(1, 3), "numbers": torch.tensor([53])})
        except torch.jit.Error as error:
            results = str(error)
        """
    )
    assert "I (53) is not among the elements of fidelity 1: H (1), C (6)" in results


def test_one_call_serves_strangers_in_threads(stranger):
    """The executor compiles once for all threads; none may see half of it."""
    results = stranger(
        """
        from concurrent.futures import ThreadPoolExecutor

        def call(_):
            with torch.no_grad():
                return model(batches["dense"])["energy"]

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(call, range(12)))
        """
    )
    for energy in results[1:]:
        torch.testing.assert_close(energy, results[0], atol=1e-6, rtol=0)
