"""`Potential` as a Python object: pickled, called with unusual tensors, asked for second derivatives."""

import pickle

import pytest
import torch

from aimnet2mult.models.compiled_file import torchscript_deprecation_ignored
from aimnet2mult.models.jit_wrapper import load_jit_model
from aimnet2mult.models.potential import Potential


@pytest.fixture
def model(compiled):
    return load_jit_model(compiled)


@pytest.fixture
def one(molecules):
    data = molecules(torch.float32)
    return {"coord": data["coord"][:1, :3], "numbers": data["numbers"][:1, :3]}


def test_pickled_with_its_options(model, one):
    model.set_coulomb_method("dsf")
    model.module.compute_hessian = True
    copy = pickle.loads(pickle.dumps(model))
    assert copy.metadata == model.metadata
    assert copy.module.coulomb_method == "dsf"
    assert copy.module.compute_hessian
    assert torch.equal(copy(one)["energy"], model(one)["energy"])


def test_tensors_made_under_inference_mode(model, one):
    with torch.inference_mode():
        made = {key: value.clone() for key, value in one.items()}
    expected = model(one)["forces"]
    for call in (model, model.module):  # the latter as from plain torch.jit.load
        # Up to a few units in the last place of the largest force: they differ by one on some CPUs.
        torch.testing.assert_close(call(made)["forces"], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["autograd", "finite_difference"])
def test_hessian_of_a_file_that_computes_it_anyway(model, one, method):
    expected = model.hessian(one, method)
    model.module.compute_hessian = True
    differentiated_from = []
    run = model._run

    def spy(data):
        out = run(data)
        differentiated_from.append("hessian" in out)
        return out

    model._run = spy
    assert torch.equal(model.hessian(one, method), expected)
    assert not any(differentiated_from)  # third derivatives would be prepared: minutes for a small crystal
    assert model.module.compute_hessian


def test_vector_that_is_not_finite(model, one):
    vector = torch.zeros_like(one["coord"])
    vector[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="vector holds NaN or infinite values"):
        model.hessian_vector_product(one, vector)


def test_options_that_files_of_version_1_did_not_have():
    class Version1(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cutoff = 5.0

        def forward(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return data

    with torchscript_deprecation_ignored():
        model = Potential(torch.jit.script(Version1()), {})
    for call in (lambda: model.set_coulomb_method("dsf"), lambda: model.set_dispersion_cutoff(10.0)):
        with pytest.raises(ValueError, match=r"of an earlier version, without set_\w+: compile the model again"):
            call()


def test_second_derivatives_of_nothing(model):
    nothing = {"coord": torch.zeros(0, 3, 3), "numbers": torch.zeros(0, 3, dtype=torch.long)}
    assert model.hessian(nothing).shape == (0, 3, 3, 3, 3)
    assert model.hessian_vector_product(nothing, torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    with pytest.raises(ValueError, match=r"step 0\.0: expected a positive displacement"):
        model.hessian(nothing, "finite_difference", 0.0)
