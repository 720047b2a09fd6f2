"""The running average of weights, against its formula."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from aimnet2mult.models.base import build_model, load_model_config
from aimnet2mult.train.ema import WeightAverage


class Small(nn.Module):
    """A weight that is trained, one that is not, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.moving = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.fixed = nn.Parameter(torch.randn(1000, generator=generator), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))

    def move(self, t: int) -> None:
        with torch.no_grad():
            self.moving.add_(torch.randn(3, 4, generator=torch.Generator().manual_seed(t)))
            self.count += 1


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 0.999])
def test_average_follows_its_formula(decay):
    model = Small()
    average = WeightAverage(model, decay)
    expected = model.moving.detach().double().numpy().copy()
    for t in range(1, 31):
        model.move(t)
        average.update(model)
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * model.moving.detach().double().numpy()
        np.testing.assert_allclose(average.model.moving.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert average.steps == 30
    assert torch.equal(average.model.moving, model.moving) == (decay == 0.0)


def test_average_begins_with_the_weights_before_the_first_step():
    model = Small()
    average = WeightAverage(model, 0.999)
    before = model.moving.detach().clone()
    assert torch.equal(average.model.moving, before)
    model.move(1)
    average.update(model)
    torch.testing.assert_close(average.model.moving, before * 2 / 11 + model.moving.detach() * 9 / 11)


def test_weights_that_do_not_change_stay_as_they_are_to_the_bit():
    model = Small()
    average = WeightAverage(model, 0.99)
    fixed, moving = model.fixed.clone(), model.moving.detach().clone()
    for _ in range(200):  # trained, but not in these steps
        average.update(model)
    assert torch.equal(average.model.moving, moving)
    for t in range(200):
        model.move(t)
        average.update(model)
    assert torch.equal(average.model.fixed, fixed)
    assert not torch.equal(average.model.moving, moving)


def test_model_and_average_share_nothing():
    model = Small()
    average = WeightAverage(model, 0.9)
    model.move(1)
    assert not torch.equal(average.model.moving, model.moving)
    assert average.model.count == 0
    average.update(model)
    assert average.model.count == 1
    assert model.moving.requires_grad
    assert not any(weight.requires_grad for weight in average.model.parameters())
    assert model.training
    assert not average.model.training


def test_state_goes_through_a_file_and_the_average_goes_on_as_if_nothing_had_happened(tmp_path):
    model = Small()
    average = WeightAverage(model, 0.99)
    for t in range(5):
        model.move(t)
        average.update(model)
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Small()
    other.load_state_dict(saved["model"])
    resumed = WeightAverage(other, 0.99)
    resumed.load_state_dict(saved["average"])
    assert resumed.steps == 5
    for t in range(5, 10):
        for weights, one in ((model, average), (other, resumed)):
            weights.move(t)
            one.update(weights)
        for key, value in average.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[key], value)


def test_average_of_a_network_predicts_between_its_ends(fixtures_dir, molecules):
    torch.manual_seed(0)
    model = build_model(load_model_config(fixtures_dir / "ref_single_model.yaml"))
    average = WeightAverage(model, 0.5)
    start = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(1.001)
    average.update(model)
    batch = molecules(torch.float32)
    energies = [m(dict(batch))["energy"].detach() for m in (start, average.model, model)]
    low, high = torch.minimum(energies[0], energies[2]), torch.maximum(energies[0], energies[2])
    assert ((energies[1] > low) & (energies[1] < high)).all()
    assert average.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"trainer.ema.decay: expected a number of at least 0 and below 1"):
        WeightAverage(Small(), decay)


def test_weights_of_another_model_are_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        WeightAverage(Small(), 0.9).load_state_dict({"steps": 1, "weights": {}})
