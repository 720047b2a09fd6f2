"""How the fidelities of a step pull at the weights that they share: norms of their gradients, and cosines between them.

The loss of a step is a sum over molecules (`aimnet2mult.train.engine`), and so is its gradient. With g_f the part that
the molecules of fidelity f make of it, for the weights that all fidelities share,

    g = Σ_f g_f        |g_f|        cos(f, f') = g_f · g_f' / (|g_f| |g_f'|)

A cosine near 1 says that two fidelities teach the same, near 0 that they do not interfere, below 0 that one unlearns
what the other teaches. The norms say which fidelity rules the step, with all weights of loss, molecules and fidelities
as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ignite.distributed as idist
import torch
from torch import Tensor, nn

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.base import FIDELITY_KEY
from aimnet2mult.models.base import HEAD_KEY
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table
from aimnet2mult.modules import Forces
from aimnet2mult.train.engine import (
    Batch,
    batch_type,
    label_shares,
    predict,
    select_molecules,
    sum_over_processes,
)
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.utils.text import text_table


@dataclass(frozen=True)
class GradientReport:
    """Gradients of the fidelities of a step; the same on every process.

    Attributes
    ----------
    names : list of str
        Names of the F fidelities.
    molecules : Tensor
        Molecules of each fidelity in the step, over all processes; (F,) int64.
    products : Tensor
        Scalar products g_f · g_f', (F, F) float64.
    """

    names: list[str]
    molecules: Tensor
    products: Tensor

    @property
    def norms(self) -> Tensor:
        """|g_f|, (F,) float64."""
        return self.products.diagonal().sqrt()

    @property
    def cosines(self) -> Tensor:
        """Cosines between the gradients of two fidelities, (F, F) float64; NaN where one of them is zero."""
        norms = self.norms
        return self.products / (norms.unsqueeze(0) * norms.unsqueeze(1))

    def numbers(self) -> dict[str, float | int]:
        """Return the report by name, as a history keeps it.

        ``gradients/{f}_molecules``; ``gradients/{f}_norm`` where there are any; ``gradients/{f}_{f'}_cosine`` for each
        pair whose gradients are not zero.
        """
        norms, cosines = self.norms.tolist(), self.cosines.tolist()
        record: dict[str, float | int] = {}
        for name, count, norm in zip(self.names, self.molecules.tolist(), norms, strict=True):
            record[f"gradients/{name}_molecules"] = count
            if count:
                record[f"gradients/{name}_norm"] = norm
        for i, name in enumerate(self.names):
            for j in range(i + 1, len(self.names)):
                if norms[i] != 0.0 and norms[j] != 0.0:
                    record[f"gradients/{name}_{self.names[j]}_cosine"] = cosines[i][j]
        return record

    def table(self) -> list[str]:
        """Return the report as lines of text: molecules, norm, and cosines with the other fidelities."""
        rows = []
        for name, count, norm, row in zip(
            self.names, self.molecules.tolist(), self.norms.tolist(), self.cosines.tolist(), strict=True
        ):
            words = ["-" if math.isnan(cosine) else f"{cosine:.3f}" for cosine in row]
            rows.append((name, count, f"{norm:.4g}" if count else "-", *words))
        cosines = [f"cosine {name}" for name in self.names]
        return text_table(("gradient", "molecules", "norm", *cosines), rows)


GradientReporter = Callable[[Sequence[tuple[Batch, Batch]]], GradientReport]
"""Report on the batches of a step, which all processes make together, before the step is made."""


def shared_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that learn and that every fidelity uses: no embedding rows, and no readouts of one fidelity.

    Parameters
    ----------
    model : nn.Module
        The network, with what learns as `optimizer.build_optimizer` leaves it.
    """
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and not is_type_table(name) and not HEAD_KEY.fullmatch(name)
    }


def make_gradient_reporter(
    network: nn.Module,
    loss_fn: MTLoss,
    names: Sequence[str],
    device: str | torch.device,
    *,
    non_blocking: bool = False,
    precision: str = "float32",
) -> GradientReporter:
    """Make the function that reports the gradients of each fidelity.

    It evaluates each molecule once more, those of a fidelity together: somewhat more than the time of a step, and
    the memory of the largest part. Weights, their ``grad``, the state of optimiser and loss, and random states are
    left alone; network and loss are in training mode afterwards, as a step leaves them.

    Parameters
    ----------
    network : nn.Module
        The model that learns, neither compiled nor shared among processes by DDP, on ``device``.
    loss_fn : MTLoss
        The loss of the run.
    names : sequence of str
        Names of the fidelities, by number.
    device, non_blocking, precision
        As in `engine.make_step`.

    Returns
    -------
    GradientReporter
        Takes the batches that the step takes.

    Raises
    ------
    ConfigError
        The network has no weight that learns and that all fidelities share.
    """
    weights = list(shared_weights(network).values())
    if not weights:
        raise ConfigError(
            "trainer.gradient_report: no weight that all fidelities share is trained; set trainer.gradient_report=null"
        )
    model = Forces(network)
    dtype = batch_type(precision)
    forces_wanted = loss_fn.needs("forces")

    def gradient_of(batch: tuple[Batch, Batch], share: Tensor) -> Tensor:
        """Gradient of a batch's loss, its components times their shares (K,), by the shared weights; a vector."""
        y_pred, y_true = predict(model, batch, forces_wanted, device, non_blocking, dtype)
        loss = loss_fn(y_pred, y_true, share)["loss"]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def report(batches: Sequence[tuple[Batch, Batch]]) -> GradientReport:
        model.train()
        loss_fn.train()
        loss_fn.to(device)
        parts = [
            (f, select_molecules(batch, batch[0][FIDELITY_KEY] == f))
            for batch in batches
            for f in batch[0][FIDELITY_KEY].unique().tolist()
        ]
        shares = label_shares(loss_fn, [y for _, (_, y) in parts], device)
        molecules = torch.zeros(len(names), dtype=torch.float64, device=device)
        gradients = torch.zeros(len(names), sum(w.numel() for w in weights), dtype=weights[0].dtype, device=device)
        for (f, part), share in zip(parts, shares, strict=True):
            molecules[f] += len(part[0][FIDELITY_KEY])
            gradients[f] += gradient_of(part, share)
        molecules, gradients = sum_over_processes(molecules), sum_over_processes(gradients)
        # Shares are made for a mean over processes.
        gradients = gradients.double() / idist.get_world_size()
        return GradientReport(list(names), molecules.long().cpu(), (gradients @ gradients.T).cpu())

    return report
