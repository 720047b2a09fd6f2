"""One step of the optimiser, and one evaluation of a dataset. What happens between steps is the business of the loop.

A step takes a list of batches on each process and goes where the one batch would go that all of them make up
together. With n_bk molecules that have label k in batch b, W processes and L_bk the mean over the molecules of b,

    L_k = Σ_b n_bk L_bk / Σ_b n_bk                      over all batches of all processes

so each batch goes backward with its own L_bk times W n_bk / Σ n_bk: gradients add up over the batches of a process
and are averaged over processes.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from aimnet2mult.config.builder import nearest
from aimnet2mult.data.base import FIDELITY_KEY
from aimnet2mult.modules import BatchPart
from aimnet2mult.nbops import real_atoms
from aimnet2mult.train.loss import MTLoss, label_mask
from aimnet2mult.train.metrics import LossMetric, RegMultiMetric
from aimnet2mult.train.sharing import CLOSENESS, Closeness

Batch = dict[str, Tensor]

MIN_ATOMS_APART = {"cpu": 32, "gpu": 2048}
"""Atoms without force labels from which on a mixed batch is evaluated in two parts.

A force graph that nobody needs costs time per atom; a second evaluation costs a fixed time, that of a third more
operations per step. On a CPU the two were equal at 20 to 40 atoms, for the small and the full-size model. The number
for GPUs is an estimate: about 700 more kernels, 5 ms, against 2 µs per atom."""

PART_COST = {"cpu": 2500, "gpu": 250_000}
"""What one more evaluation costs, in pairs of places (n_places² for each molecule) that it may save.

Networks see real atoms only, but the convolutions and the basis all pairs of places. Measured on a CPU with the
full-size model: 15 ms for the operations of another evaluation, 6 µs for a pair. The number for GPUs is an estimate."""


BATCH_TYPES: dict[str, torch.dtype | None] = {"float32": None, "float64": torch.float64, "bf16": None}
"""Type of a batch's real numbers for each ``trainer.precision``; None leaves them as they are read."""


def batch_type(precision: str) -> torch.dtype | None:
    """Type of a batch's real numbers, a value of `BATCH_TYPES`.

    Raises
    ------
    ValueError
        An unknown ``precision``.
    """
    if precision not in BATCH_TYPES:
        raise ValueError(f"trainer.precision: unknown precision {precision}; {nearest(precision, list(BATCH_TYPES))}")
    return BATCH_TYPES[precision]


def prepare_batch(
    batch: tuple[Batch, Batch],
    device: str | torch.device,
    non_blocking: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Batch, Batch]:
    """Move inputs and labels of a batch to a device.

    Parameters
    ----------
    batch : tuple
        ``(x, y)`` as `data.collate` makes it.
    device : str or torch.device
        Where to.
    non_blocking : bool
        Do not wait for the copy (of pinned memory).
    dtype : torch.dtype, optional
        Type of all real numbers; default: each keeps its own.

    Returns
    -------
    tuple
        ``(x, y)``, new dictionaries.
    """

    def moved(value: Tensor) -> Tensor:
        new_type = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=new_type, non_blocking=non_blocking)

    x, y = batch
    return {key: moved(value) for key, value in x.items()}, {key: moved(value) for key, value in y.items()}


def select_molecules(batch: tuple[Batch, Batch], rows: Tensor) -> tuple[Batch, Batch]:
    """Return some molecules of a batch in dense layout, inputs and labels; ``rows`` (B,) bool."""
    x, y = batch
    return {key: value[rows] for key, value in x.items()}, {key: value[rows] for key, value in y.items()}


def without_fidelities(batch: tuple[Batch, Batch], fidelities: Collection[int]) -> tuple[Batch, Batch]:
    """Leave the molecules of fidelities out of a batch; where there are no others, one stays without its labels."""
    x, y = batch
    kept = ~torch.isin(x[FIDELITY_KEY], torch.tensor(sorted(fidelities)))
    if kept.any():
        return select_molecules(batch, kept)
    # Each process takes its part in each step.
    kept[0] = True
    x, y = select_molecules(batch, kept)
    return x, {key: torch.zeros_like(value) if key.endswith("_mask") else value for key, value in y.items()}


def batch_parts(x: Batch, y: Batch, min_atoms: int, part_cost: float) -> list[BatchPart] | None:
    """Divide a batch into molecules of similar size, with force labels or without; ask before it goes to the device.

    Parameters
    ----------
    x, y : dict
        The batch in dense layout, ``y`` with ``forces``.
    min_atoms : int
        Molecules without force labels that have fewer real atoms together stay with the others, if there are any.
    part_cost : float
        As `PART_COST`.

    Returns
    -------
    list of BatchPart or None
        What `modules.Forces` takes as ``parts``; None to evaluate the batch as it is, with the forces of all molecules.
    """
    labelled = label_mask(y, "forces")
    n_atoms = _places_up_to_the_last_atom(real_atoms(x["numbers"]))
    if bool(labelled.any()) and int((x["numbers"] > 0)[~labelled].sum()) < min_atoms:
        labelled = torch.ones_like(labelled)
    parts = [
        BatchPart(rows[group], int(n_atoms[rows[group]].max()), forces)
        for forces, rows in ((True, labelled.nonzero().squeeze(1)), (False, (~labelled).nonzero().squeeze(1)))
        for group in size_groups(n_atoms[rows].cpu().numpy(), part_cost)
    ]
    whole = len(parts) == 1 and parts[0].forces and parts[0].n_places == x["numbers"].shape[1]
    return None if whole else parts


def _places_up_to_the_last_atom(real: Tensor) -> Tensor:
    """(B, N) bool -> (B,) int64."""
    return (real * torch.arange(1, real.shape[1] + 1, device=real.device)).amax(dim=1)


def size_groups(n_atoms: np.ndarray, part_cost: float) -> list[np.ndarray]:
    """Divide molecules by size so that Σ (places² of the largest) over molecules, and a cost per group, is least.

    Parameters
    ----------
    n_atoms : numpy.ndarray
        Places that each molecule needs, (B,) int.
    part_cost : float
        Of each group, in pairs of places.

    Returns
    -------
    list of numpy.ndarray
        Molecules of each group, ascending; the groups by size. No molecules make no group.
    """
    sizes, counts = np.unique(n_atoms, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # least[k]: the k smallest sizes at their best; a last group begins after the first[k] smallest.
    least, first = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, dtype=int)
    for k in range(1, len(sizes) + 1):
        costs = least[:k] + part_cost + (below[k] - below[:k]) * float(sizes[k - 1]) ** 2
        first[k] = int(np.argmin(costs))
        least[k] = costs[first[k]]
    groups, k = [], len(sizes)
    while k > 0:
        chosen = (n_atoms <= sizes[k - 1]) & (n_atoms >= sizes[first[k]])
        groups.append(np.flatnonzero(chosen))
        k = first[k]
    return groups[::-1]


def predict(
    model: nn.Module,
    batch: tuple[Batch, Batch],
    forces_wanted: bool,
    device: str | torch.device,
    non_blocking: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Batch, Batch]:
    """Move a batch to a device and evaluate it there.

    Parameters
    ----------
    model : nn.Module
        `modules.Forces` around the model (or DDP around that).
    batch : tuple
        ``(x, y)`` as `data.collate` makes it, on the CPU.
    forces_wanted : bool
        Whether anyone uses forces; if so, they are computed for the molecules that have a force label, and the others
        (`batch_parts`) cost no more than their energy.
    device, non_blocking, dtype
        As in `prepare_batch`.

    Returns
    -------
    y_pred, y_true : dict
        Predictions together with the inputs; labels. Forces that were left out are zero.
    """
    x, y = batch
    compute_forces = forces_wanted and "forces" in y
    kind = "cpu" if torch.device(device).type == "cpu" else "gpu"
    parts = batch_parts(x, y, MIN_ATOMS_APART[kind], PART_COST[kind]) if compute_forces else None
    x, y = prepare_batch(batch, device, non_blocking, dtype)
    return {**x, **model(x, compute_forces=compute_forces, parts=parts)}, y


def label_shares(loss_fn: MTLoss, labels: Sequence[Batch], device: str | torch.device) -> Tensor:
    """Factors that make means over the molecules of batches add up to the mean over all molecules.

    Parameters
    ----------
    loss_fn : MTLoss
        The loss with K components.
    labels : sequence of dict
        Labels and masks of the M batches of this process, on the CPU.
    device : str or torch.device
        Where the result goes, and where processes exchange tensors.

    Returns
    -------
    Tensor
        W n_bk / Σ n_bk, (M, K) float64: labelled molecules of a batch, times the number of processes, over the
        labelled molecules of all batches of all processes. Zero where nobody has the label.
    """
    counts = torch.stack([loss_fn.counts(y) for y in labels]).to(device, non_blocking=True)
    return counts * idist.get_world_size() / sum_over_processes(counts.sum(dim=0)).clamp(min=1)


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, which call this together."""
    if idist.get_world_size() == 1:
        return values
    total = idist.all_reduce(values)
    assert isinstance(total, Tensor)
    return total


def _sharing_gradients(model: nn.Module, share: bool) -> AbstractContextManager[None]:
    """Context of a forward and backward pass whose gradients processes average, or each keeps for itself."""
    if share or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


@dataclass(frozen=True)
class StepResult:
    """What came of a step of the optimiser; the same on every process.

    Attributes
    ----------
    losses : dict
        ``loss`` and each component, over all batches of all processes; float64 scalars on the CPU. With a penalty of
        closeness that is among them, and its share in ``loss``.
    grad_norm : Tensor
        Norm of the gradient of all weights together, before clipping; float64 scalar on the CPU.
    applied : bool
        False: loss or gradient were infinite or NaN somewhere, and nothing was changed anywhere.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    applied: bool


Step = Callable[[Sequence[tuple[Batch, Batch]]], StepResult]
"""One step of the optimiser over batches ``(x, y)``, as many on one process as on another."""


def make_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: MTLoss,
    device: str | torch.device,
    *,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    non_blocking: bool = False,
    precision: str = "float32",
    closeness: Closeness | None = None,
) -> Step:
    """Make the function that takes one step of the optimiser.

    Forces, and the second derivatives that learning from them takes, are computed only for the molecules that have a
    force label (`predict`), and only if the loss uses forces.

    A step whose loss or gradient is not finite on one process is left out on all of them: weights, state of the
    optimiser and factors of the loss are afterwards what they were before, bit by bit.

    Parameters
    ----------
    model : nn.Module
        `modules.Forces` around the model (or DDP around that), on ``device``.
    optimizer : torch.optim.Optimizer
        Of the model's parameters.
    loss_fn : MTLoss
        The loss.
    device : str or torch.device
        Where batches go.
    max_grad_norm : float, optional
        Scale the gradient down to this norm (over all parameters).
    max_grad_value : float, optional
        Clip each component of the gradient to this absolute value, after the norm.
    non_blocking : bool
        As in `prepare_batch`.
    precision : str
        ``trainer.precision``, a key of `BATCH_TYPES`; the model is already what it says.
    closeness : Closeness, optional
        Penalty between the weights of the fidelities, added once per step.

    Returns
    -------
    Step
        Takes a list of one or more batches as `data.collate` makes them, returns a `StepResult`.

    Raises
    ------
    ValueError
        An unknown ``precision``. From the step: no batches, or one without a label or prediction that the loss needs.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dtype = batch_type(precision)
    loss_fn.to(device)
    forces_wanted = loss_fn.needs("forces")

    def backward(batches: Sequence[tuple[Batch, Batch]]) -> Tensor:
        """Leave the gradient of all batches in the weights; return this process's part of the components, (K,)."""
        shares = label_shares(loss_fn, [y for _, y in batches], device)
        values = torch.zeros_like(shares[0])
        for i, batch in enumerate(batches, start=1):
            with _sharing_gradients(model, i == len(batches)):
                y_pred, y_true = predict(model, batch, forces_wanted, device, non_blocking, dtype)
                losses = loss_fn(y_pred, y_true, shares[i - 1])
                losses["loss"].backward()
            values = values + torch.stack([losses[name] for name in loss_fn.functions])
        return values

    def step(batches: Sequence[tuple[Batch, Batch]]) -> StepResult:
        if not batches:
            raise ValueError("a step needs one batch or more")
        model.train()
        loss_fn.train()
        optimizer.zero_grad(set_to_none=True)
        values = backward(batches)
        penalty = None if closeness is None else closeness.add_gradient()
        # With an infinite limit the norm is measured and nothing is clipped.
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
        values, finite = _agreed(values, norm)
        loss, parts = loss_fn.combine(values), dict(zip(loss_fn.functions, values, strict=True))
        if closeness is not None and penalty is not None:
            loss = loss + closeness.weight * penalty
            parts[CLOSENESS] = penalty
        # The one wait for the device in a step; the whole of it is queued by now.
        report = torch.stack([finite, norm.to(values), loss, *parts.values()]).cpu()
        applied = bool(report[0])
        if applied:
            if max_grad_value is not None:
                nn.utils.clip_grad_value_(parameters, max_grad_value)
            optimizer.step()
            loss_fn.adapt(values)
            if closeness is not None:
                closeness.advance()
        return StepResult(dict(zip(("loss", *parts), report[2:], strict=True)), report[1], applied)

    return step


def _agreed(values: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Components (K,) over all processes, and 1 if they and the gradient are finite on all processes, else 0.

    The gradient alone, which processes share, does not tell: a value may be NaN where its gradient is zero.
    """
    bad = ~(torch.isfinite(values).all() & torch.isfinite(grad_norm))
    everywhere = sum_over_processes(torch.cat([values, bad.to(values).unsqueeze(0)])) / idist.get_world_size()
    return everywhere[:-1], (everywhere[-1] == 0).to(values)


def make_evaluator(
    model: nn.Module,
    loss_fn: MTLoss,
    metrics: Mapping[str, Metric],
    device: str | torch.device,
    *,
    non_blocking: bool = False,
    precision: str = "float32",
) -> Engine:
    """Make the engine that evaluates a dataset and leaves the results in ``engine.state.metrics``.

    Parameters
    ----------
    model : nn.Module
        As in `make_step`; it is put in evaluation mode, and weights are left alone.
    loss_fn : MTLoss
        The loss, whose value over the dataset becomes ``loss`` and ``{component}_loss`` (`LossMetric`).
    metrics : mapping
        Further metrics, updated with ``(y_pred, y_true)``.
    device : str or torch.device
        Where batches go.
    non_blocking, precision
        As in `make_step`.

    Returns
    -------
    Engine
        Its output is ``(y_pred, y_true)``; ``y_pred`` holds the inputs too.
    """
    dtype = batch_type(precision)
    loss_fn.to(device)
    forces_wanted = loss_fn.needs("forces") or any(
        isinstance(metric, RegMultiMetric) and "forces" in metric.properties for metric in metrics.values()
    )

    def step(engine: Engine, batch: tuple[Batch, Batch]) -> tuple[Batch, Batch]:
        model.eval()
        with torch.no_grad():
            y_pred, y_true = predict(model, batch, forces_wanted, device, non_blocking, dtype)
        return {key: value.detach() for key, value in y_pred.items()}, y_true

    evaluator = Engine(step)
    LossMetric(loss_fn).attach(evaluator, "loss")
    for name, metric in metrics.items():
        metric.attach(evaluator, name)
    return evaluator
