"""Running average of the weights of a model in training.

    θ̄_t = d_t θ̄_{t-1} + (1 - d_t) θ_t          d_t = min(decay, (1 + t) / (10 + t)),  t = 1, 2, ...

with θ_t the weights after step t and θ̄_0 = θ_0 those before the first one. The average follows the weights closely in
the first steps, when it would otherwise hang on to random ones, and over the last 1 / (1 - decay) steps later.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """A copy of a model whose weights are the running average of those of the model.

    A weight that never changes is the same in both, bit by bit. Buffers are copied, not averaged. Unlike
    `torch.optim.swa_utils.AveragedModel`, an update does not wait for the device, and the average begins with the
    weights before the first step.

    Parameters
    ----------
    model : nn.Module
        The model before the first step.
    decay : float
        What a step keeps of the average, in [0, 1). With 0 it is the weights themselves.

    Attributes
    ----------
    model : nn.Module
        The model with the averaged weights, to evaluate and to save; its weights want no gradient.
    steps : int
        Number of updates so far.

    Raises
    ------
    ValueError
        ``decay`` out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"trainer.ema.decay: expected a number of at least 0 and below 1, found {decay}")
        self.decay = decay
        self.steps = 0
        self.model = deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let the average follow the model, after each step of the optimiser that was applied."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        # Not d θ̄ + (1 - d) θ, which rounding can make different from θ where θ̄ = θ.
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the averaged weights (the tensors themselves, no copies)."""
        return {"steps": self.steps, "weights": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; weights of another model are a RuntimeError."""
        self.model.load_state_dict(state["weights"])
        self.steps = int(state["steps"])
