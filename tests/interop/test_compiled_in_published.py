"""Our compiled models (.jpt) in the calculators of the aimnet package, through their loaders of TorchScript files."""

import pytest
import torch

from aimnet2mult.models.loading import load_potential
from aimnet2mult.tools.compile_jit import compile_model
from aimnet2mult.tools.compile_options import choose_dispersion

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def compiled_without_d3(tmp_path_factory, fixtures_dir, sae_file):
    jpt, _ = compile_model(
        fixtures_dir / "ref_mixed.pt",
        tmp_path_factory.mktemp("compiled") / "model",
        model=fixtures_dir / "ref_mixed_model.yaml",
        fidelity_level=1,
        sae=sae_file,
        dispersion=choose_dispersion("none"),
    )
    return jpt


@pytest.mark.parametrize("program", ["published", "legacy_program"])
@pytest.mark.parametrize("d3", [False, True], ids=["", "d3"])
def test_molecules(program, d3, compiled, compiled_without_d3, systems, cluster, evaluated, agree, request):
    """The calculators give flat batches with an atom of padding, and positions that require a gradient."""
    file = compiled if d3 else compiled_without_d3
    found = request.getfixturevalue(program).evaluate(file, [*systems, cluster])
    agree(found, evaluated(load_potential(file), [*systems, cluster]))


def test_multiplicity_may_be_left_out(published, compiled, systems, evaluated, agree):
    closed_shell = [
        {key: value for key, value in system.items() if key != "mult"} for system in systems if system["mult"] == 1.0
    ]
    agree(published.evaluate(compiled, closed_shell), evaluated(load_potential(compiled), closed_shell))


def test_hessian(published, compiled, systems):
    found = published.evaluate(compiled, systems[:2], hessian=True)
    potential = load_potential(compiled)
    for system, result in zip(systems[:2], found, strict=True):
        data = {key: torch.as_tensor(value).unsqueeze(0) for key, value in system.items()}
        expected = potential.hessian(data)[0].numpy()
        assert abs(expected).max() > 0.1
        assert abs(result["hessian"] - expected).max() < 1e-4
