"""From one charge channel to two: the network of closed shells as the start of one that resolves spin."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

PASS_LAYER = re.compile(r"mlps\.(\d+)\.(\d+)\.weight")
"""Linear layers of the passes: pass, place in it."""


def n_channels(weights: Mapping[str, Tensor]) -> int:
    """Number of charge channels of a network."""
    return weights["conv_q.agh"].shape[0]


def with_two_channels(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network with channels for alpha and beta electrons that begins as one with a single channel.

    Both channels start equal, each with half of the charges, so that closed shells have no spin charges. Inputs that
    are linear in the charges take the old weights for both halves; squares take twice the old weights, since
    (v/2)² + (v/2)² = v²/2. The update of the first pass is linear, and halved. Those of later passes end with the
    activation, which has no exact half: GELU(x/2) stands for GELU(x)/2, right for small updates. Everything else is
    exactly the old network for closed shells.

    Parameters
    ----------
    weights : mapping
        State dictionary of an `aimnet2mult.models.aimnet2.AIMNet2` with one charge channel; not changed.

    Returns
    -------
    dict
        State dictionary of one with two channels.
    """
    assert n_channels(weights) == 1
    n_radial = weights["aev.shifts_s"].numel()
    n_squares = weights["conv_q.agh"].shape[2]
    layers: dict[int, list[int]] = {}
    for match in map(PASS_LAYER.fullmatch, weights):
        if match:
            layers.setdefault(int(match[1]), []).append(int(match[2]))
    last_pass = max(layers)
    new = dict(weights)
    new["conv_q.agh"] = weights["conv_q.agh"].repeat(2, 1, 1)
    for p, places in layers.items():
        if p > 0:
            key = f"mlps.{p}.{min(places)}.weight"
            new[key] = _split_inputs(new[key], n_radial, n_squares)
        if p < last_pass:
            for kind in ("weight", "bias"):
                key = f"mlps.{p}.{max(places)}.{kind}"
                new[key] = _split_outputs(new[key])
    return new


def _split_inputs(weight: Tensor, n_radial: int, n_squares: int) -> Tensor:
    """Weights of a first layer, whose last columns see charges, their sums over neighbours, and squares of these."""
    n_old = 1 + n_radial + n_squares
    features, (charge, sums, squares) = weight[:, :-n_old], weight[:, -n_old:].split([1, n_radial, n_squares], dim=1)
    return torch.cat([features, charge, charge, sums, sums, 2.0 * squares, 2.0 * squares], dim=1)


def _split_outputs(x: Tensor) -> Tensor:
    """Weights or biases of a last layer, whose first rows give the update of the charge, and f."""
    charge, f, features = x[:1], x[1:2], x[2:]
    return torch.cat([0.5 * charge, 0.5 * charge, f, f, features])
