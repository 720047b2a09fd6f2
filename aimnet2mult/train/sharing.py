"""How the fidelities of a run share: where they start, whether they have one embedding, what keeps them close.

A `MixedFidelityAIMNet2` shares its passes and convolutions. Embedding rows and readouts belong to a fidelity, in one
layout of weights whatever the settings here say: they act on the values, at the start (`start_independently`), after
each step (`share_embedding`), or through the gradient (`Closeness`).
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.constants import element_names
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import HEAD_KEY, build_model
from aimnet2mult.models.mixed_fidelity_aimnet2 import (
    MixedFidelityAIMNet2,
    embedding_blocks,
    has_shared_embedding,
    is_type_table,
)
from aimnet2mult.train.fidelity_specific_utils import fidelity_number, layout_of_model
from aimnet2mult.train.schema import ClosenessConfig

logger = logging.getLogger(__name__)

STARTS = ("equal", "independent")
EMBEDDINGS = ("own", "shared")
MEAN = "mean"
"""Words of ``sharing.start``, ``sharing.embedding`` and ``sharing.closeness.to``."""

CLOSENESS = "closeness"
"""Name of the penalty among the components of the loss."""


# --------------------------------------------------------------------------------------------------
# start
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_independently(model: AIMNet2, model_config: Mapping[str, Any], embedding: bool = True) -> None:
    """Give each fidelity but the first random embedding rows and readouts of its own.

    They are the next draws of torch's generator, so that the seed decides them.

    Parameters
    ----------
    model : AIMNet2
        An untrained model, changed in place; one of a single fidelity stays as it is.
    model_config : mapping
        ``class`` and ``kwargs`` of the single-fidelity model.
    embedding : bool
        The rows too, not the readouts alone.
    """
    if not isinstance(model, MixedFidelityAIMNet2):
        return
    config = {**model_config, "kwargs": {**model_config["kwargs"], "num_types": model.num_types}}
    blocks = _blocks(model.afv.weight, model)
    for f in range(1, model.num_fidelities):
        drawn = build_model(config)
        if embedding:
            blocks[f].copy_(_blocks(drawn.afv.weight, model)[f])
        if model.use_fidelity_readouts:
            for name, module in cast(nn.ModuleDict, model.fidelity_readouts[f]).items():
                module.load_state_dict(drawn.outputs[name].state_dict())


def _blocks(table: Tensor, model: MixedFidelityAIMNet2) -> list[Tensor]:
    return embedding_blocks(table, model.num_fidelities, model.fidelity_offset)


# --------------------------------------------------------------------------------------------------
# one embedding
# --------------------------------------------------------------------------------------------------


def share_embedding(model: AIMNet2, optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Let the rows of an element be the same in all fidelities, to the last bit, throughout a training.

    The rows of the first fidelity learn: their gradient is the sum over the fidelities, that of one row which all of
    them use, and it counts once in the norm of the gradient. The others have none, and a hook of the optimiser makes
    them equal after each step.

    Parameters
    ----------
    model : AIMNet2
        With the weights that the training starts from; one of a single fidelity needs nothing.
    optimizer : torch.optim.Optimizer
        What trains it.
    names : mapping
        Name of each fidelity, for messages.

    Raises
    ------
    ConfigError
        The rows differ, as in weights from a training without this.
    """
    if not isinstance(model, MixedFidelityAIMNet2):
        return
    if not has_shared_embedding(model):
        raise ConfigError(_differing_rows(model, names))
    table = model.afv.weight
    if not table.requires_grad:
        return

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        first, *others = _blocks(gradient, model)
        for block in others:
            first += block
            block.zero_()
        return gradient

    def make_equal(*_: Any) -> None:
        first, *others = _blocks(table.detach(), model)
        for block in others:
            block.copy_(first)

    table.register_hook(summed)
    optimizer.register_step_post_hook(make_equal)


def _differing_rows(model: MixedFidelityAIMNet2, names: Mapping[int, str]) -> str:
    first, *others = _blocks(model.afv.weight.detach(), model)
    differ = [~torch.isclose(block, first, rtol=0.0, atol=0.0, equal_nan=True).all(dim=1) for block in others]
    f = next(f for f, rows in enumerate(differ, start=1) if rows.any())
    numbers = (differ[f - 1].nonzero().flatten() + 1).tolist()
    elements = element_names(numbers[:5]) + (" ..." if len(numbers) > 5 else "")
    start = ", ".join(f"{name}: {names[0]}" for name in names.values())
    return (
        f"sharing.embedding: shared, but the run starts from weights in which {names[0]} and {names[f]} have other "
        f"rows of {elements}. Let all start from one fidelity of the checkpoint (init_from={{{start}}}, or another "
        "one), or set sharing.embedding=own"
    )


# --------------------------------------------------------------------------------------------------
# closeness
# --------------------------------------------------------------------------------------------------


def fidelity_weights(model: nn.Module, fidelity: int) -> dict[str, Tensor]:
    """Weights that a fidelity has for itself, with graph: its rows of tables, and its readouts.

    Returns
    -------
    dict
        Names that are the same for all fidelities -> weights of the same shape for all; rows begin at Z = 1.
    """
    rows = layout_of_model(model).block(fidelity)
    own: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        head = HEAD_KEY.fullmatch(name)
        if head is not None and int(head[1]) != fidelity:
            continue
        key = name if head is None else f"fidelity_readouts.{head[2]}"
        if is_type_table(name):
            own[key] = weight[rows.start : rows.stop]
        elif head is not None:
            own[key] = weight
    return own


class Closeness:
    """A penalty that draws the weights of each fidelity towards those of one of them, or towards their mean.

        P = ½ Σ_f (n_min / n_f) ‖θ_f - θ_target‖²          added to the loss with the factor w(t)

    θ_f are embedding rows and readouts (`fidelity_weights`), n_f the number of molecules on which f is trained, and
    n_min the smallest of these among the fidelities that are drawn: the scarcest one feels w, those with more data less
    of it. It is the L2-SP penalty of Li, Grandvalet and Davoine (arXiv 1802.01483) with another fidelity in the place
    of the starting point: w acts as a weight decay of this size towards the target. The target is taken as it stands,
    and does not feel the penalty. Rows of an element that a fidelity does not have among its molecules feel nothing
    else, and follow the target.

    Parameters
    ----------
    model : nn.Module
        The model that learns.
    counts : sequence of int
        Number of molecules on which each fidelity is trained.
    weight : float
        w at the beginning, in the unit of the loss.
    target : int, optional
        The fidelity that the others are drawn to; None: the mean of all, without weights.
    decay : int, optional
        Steps in which w falls to zero, linearly; None: it stays.
    """

    def __init__(
        self,
        model: nn.Module,
        counts: Sequence[int],
        weight: float,
        target: int | None = None,
        decay: int | None = None,
    ) -> None:
        self.target, self.decay, self.steps = target, decay, 0
        self._model, self._weight, self._num_fidelities = model, weight, len(counts)
        drawn = {f: max(count, 1) for f, count in enumerate(counts) if f != target}
        self.factors = {f: min(drawn.values()) / count for f, count in drawn.items()}

    @property
    def weight(self) -> float:
        """Factor w of the step that comes next."""
        return self._weight if self.decay is None else self._weight * max(0.0, 1.0 - self.steps / self.decay)

    def penalty(self) -> Tensor:
        """P without its factor, a float64 scalar with graph; exactly zero where all fidelities are equal."""
        own = [fidelity_weights(self._model, f) for f in range(self._num_fidelities)]
        total = torch.zeros((), dtype=torch.float64, device=next(self._model.parameters()).device)
        for name in own[0]:
            weights = [theta[name] for theta in own]
            fixed = [weight.detach() for weight in weights]
            target = _mean(fixed) if self.target is None else fixed[self.target]
            for f, factor in self.factors.items():
                total = total + 0.5 * factor * (weights[f] - target).double().pow(2).sum()
        return total

    def add_gradient(self) -> Tensor:
        """Add the gradient of w P to that in the weights, the same on every process; return P, detached.

        It is computed apart from that of the loss, since processes share the gradients of what the model was called
        for, and there a readout without molecules has none.
        """
        penalty = self.penalty()
        if self.weight > 0.0 and penalty.requires_grad:
            learning = [p for p in self._model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(self.weight * penalty, learning, allow_unused=True)
            for parameter, gradient in zip(learning, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return penalty.detach()

    def advance(self) -> None:
        """Take note of a step that was applied."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return how far the decay is."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.steps = int(state["steps"])


def _mean(weights: Sequence[Tensor]) -> Tensor:
    """Mean, taken from the first one, so that the mean of equal weights is what they are to the last bit."""
    return weights[0] + (torch.stack(list(weights)) - weights[0]).mean(dim=0)


def build_closeness(
    config: ClosenessConfig | None, model: nn.Module, counts: Sequence[int], names: Mapping[int, str]
) -> Closeness | None:
    """Build the penalty that ``sharing.closeness`` asks for; None without it, or with one fidelity.

    Parameters
    ----------
    config : ClosenessConfig or None
        The section.
    model : nn.Module
        The model that learns.
    counts : sequence of int
        Number of molecules on which each fidelity is trained.
    names : mapping
        Name of each fidelity.

    Raises
    ------
    ConfigError
        ``to`` names no fidelity.
    """
    if config is None or len(names) == 1:
        return None
    target = None if config.to == MEAN else fidelity_number(config.to, names, "sharing.closeness.to")
    closeness = Closeness(model, counts, config.weight, target, config.decay)
    factors = ", ".join(f"{names[f]} {factor:.3g}" for f, factor in closeness.factors.items())
    logger.info("sharing.closeness: towards %s with the weight %g, times: %s", config.to, config.weight, factors)
    return closeness
