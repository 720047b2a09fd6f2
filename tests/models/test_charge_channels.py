"""One charge channel becomes two: a closed-shell network as the start of one that resolves spin."""

import copy

import pytest
import torch

from aimnet2mult.models.base import load_checkpoint, single_fidelity_model
from aimnet2mult.models.charge_channels import n_channels, with_two_channels

OPEN_SHELL = [3, 4, 5, 6, 12]  # CH3, O2, CH2, H2O+, H among the reference molecules


@pytest.fixture(scope="module", params=["peer_v2_plain", "peer_v2_lr"])
def checkpoint(request, fixtures_dir):
    return load_checkpoint(fixtures_dir / f"{request.param}.pt")


def grown(checkpoint, weights):
    """Networks in double precision with one channel and with two."""
    config = copy.deepcopy(checkpoint["model_config"])
    config["kwargs"]["num_charge_channels"] = 2
    one = single_fidelity_model({**checkpoint, "model": weights}, checkpoint["model_config"], 0, 1, 200)
    two = single_fidelity_model({**checkpoint, "model": with_two_channels(weights)}, config, 0, 1, 200)
    return one.double().eval(), two.double().eval()


def test_closed_shells_are_the_same_where_halves_are_exact(checkpoint, molecules):
    weights = dict(checkpoint["model"])
    for kind in ("weight", "bias"):  # the second pass leaves the charges alone: GELU(0) = 0
        weights[f"mlps.1.4.{kind}"] = weights[f"mlps.1.4.{kind}"].clone()
        weights[f"mlps.1.4.{kind}"][0] = 0.0
    one, two = grown(checkpoint, weights)
    data = molecules()
    expected, found = one(data), two(data)
    closed = [i for i in range(len(data["charge"])) if i not in OPEN_SHELL]
    assert {float(q) for q in data["charge"][closed]} == {-1.0, 0.0, 1.0}
    # The ε of the charge equilibration counts twice: 1e-6 relative to Σf.
    torch.testing.assert_close(found["energy"][closed], expected["energy"][closed], rtol=0, atol=2e-6)
    torch.testing.assert_close(found["charges"][closed], expected["charges"][closed], rtol=0, atol=2e-6)


def test_closed_shells_change_little_and_have_no_spin_charges(checkpoint, molecules):
    one, two = grown(checkpoint, checkpoint["model"])
    data = molecules()
    expected, found = one(data), two(data)
    closed = [i for i in range(len(data["charge"])) if i not in OPEN_SHELL]
    assert found["spin_charges"][closed].abs().max() < 1e-12
    change = (found["energy"] - expected["energy"])[closed].abs().max()
    assert 0.0 < change < 0.01 * expected["energy"].abs().max()
    torch.testing.assert_close(found["charges"].sum(1), data["charge"], rtol=0, atol=1e-3)
    # With random weights Σf of few atoms is not large against the ε of the equilibration.
    torch.testing.assert_close(found["spin_charges"].sum(1), data["mult"] - 1.0, rtol=0, atol=1e-2)


def test_only_what_depends_on_the_channels_changes(checkpoint):
    weights = checkpoint["model"]
    new = with_two_channels(weights)
    assert new.keys() == weights.keys()
    assert (n_channels(weights), n_channels(new)) == (1, 2)
    changed = {key for key in weights if new[key].shape != weights[key].shape}
    assert changed == {
        "conv_q.agh",
        *(f"mlps.{p}.4.{kind}" for p in (0, 1) for kind in ("weight", "bias")),
        "mlps.1.0.weight",
        "mlps.2.0.weight",
    }
    same = [key for key in weights if key not in changed]
    # Embedding rows of elements that the file does not implement are NaN, which equals nothing.
    assert all(torch.equal(new[key].nan_to_num(9.0), weights[key].nan_to_num(9.0)) for key in same)
