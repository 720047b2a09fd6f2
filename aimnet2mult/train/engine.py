"""Ignite engines: one training step, one evaluation step. What happens between steps is attached by the runner."""

from collections.abc import Mapping

import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.optim import Optimizer

from aimnet2mult.modules import BatchPart
from aimnet2mult.nbops import real_atoms
from aimnet2mult.train.loss import MTLoss, label_mask
from aimnet2mult.train.metrics import LossMetric, RegMultiMetric

Batch = dict[str, Tensor]

MIN_ATOMS_APART = {"cpu": 32, "gpu": 2048}
"""Atoms without force labels from which on a mixed batch is evaluated in two parts.

A force graph that nobody needs costs time per atom; a second evaluation costs a fixed time, that of a third more
operations per step. On a CPU the two were equal at 20 to 40 atoms, for the small and the full-size model. The number
for GPUs is an estimate: about 700 more kernels, 5 ms, against 2 µs per atom."""


class NotFiniteError(ValueError):
    """A training step whose loss or gradient is infinite or NaN."""


def prepare_batch(
    batch: tuple[Batch, Batch], device: str | torch.device, non_blocking: bool = False
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

    Returns
    -------
    tuple
        ``(x, y)``, new dictionaries.
    """
    x, y = batch
    return (
        {key: value.to(device, non_blocking=non_blocking) for key, value in x.items()},
        {key: value.to(device, non_blocking=non_blocking) for key, value in y.items()},
    )


def force_parts(x: Batch, y: Batch, min_atoms: int = 1) -> tuple[BatchPart, BatchPart] | None:
    """Divide a batch into the molecules with force labels and the others; ask before the batch goes to the device.

    Parameters
    ----------
    x, y : dict
        The batch in dense layout, ``y`` with ``forces``.
    min_atoms : int
        Do not divide a batch that has force labels if fewer real atoms than this belong to molecules without.

    Returns
    -------
    tuple of BatchPart or None
        What `modules.Forces` takes as ``parts``; None to compute the forces of all molecules.
    """
    labelled = label_mask(y, "forces")
    real = real_atoms(x["numbers"])
    if bool(labelled.any()) and int(real[~labelled].sum()) < min_atoms:
        return None
    return _part(real, labelled), _part(real, ~labelled)


def _part(real: Tensor, chosen: Tensor) -> BatchPart:
    """Molecules of a mask (B,), from the mask of real atoms (B, N)."""
    places = real[chosen].any(dim=0).nonzero()
    return BatchPart(chosen.nonzero().squeeze(1), int(places[-1]) + 1 if len(places) else 0)


def predict(
    model: nn.Module,
    batch: tuple[Batch, Batch],
    forces_wanted: bool,
    device: str | torch.device,
    non_blocking: bool = False,
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
        (`force_parts`) cost no more than their energy.
    device, non_blocking
        As in `prepare_batch`.

    Returns
    -------
    y_pred, y_true : dict
        Predictions together with the inputs; labels. Forces that were left out are zero.
    """
    x, y = batch
    compute_forces = forces_wanted and "forces" in y
    kind = "cpu" if torch.device(device).type == "cpu" else "gpu"
    parts = force_parts(x, y, MIN_ATOMS_APART[kind]) if compute_forces else None
    x, y = prepare_batch(batch, device, non_blocking)
    return {**x, **model(x, compute_forces=compute_forces, parts=parts)}, y


def make_trainer(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: MTLoss,
    device: str | torch.device,
    *,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    non_blocking: bool = False,
) -> Engine:
    """Make the engine whose iteration is one step of the optimiser.

    Forces, and the second derivatives that learning from them takes, are computed only for the molecules that have a
    force label (`predict`), and only if the loss uses forces.

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

    Returns
    -------
    Engine
        Its output is the dictionary of the loss (``loss`` and each component) and ``grad_norm`` (before clipping),
        as detached scalars on the device.

    Raises
    ------
    NotFiniteError
        In a step whose loss or gradient is not finite, before the weights are changed. The message names iteration,
        epoch and the parts of the loss.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss_fn.to(device)
    forces_wanted = loss_fn.needs("forces")

    def step(engine: Engine, batch: tuple[Batch, Batch]) -> dict[str, Tensor]:
        model.train()
        loss_fn.train()
        optimizer.zero_grad(set_to_none=True)
        y_pred, y_true = predict(model, batch, forces_wanted, device, non_blocking)
        losses = loss_fn(y_pred, y_true)
        losses["loss"].backward()
        # With an infinite limit the norm is measured and nothing is clipped.
        norm = nn.utils.clip_grad_norm_(parameters, float("inf") if max_grad_norm is None else max_grad_norm)
        output = {**{key: value.detach() for key, value in losses.items()}, "grad_norm": norm.detach()}
        # The one wait for the device in a step; the whole of it is queued by now.
        if not bool(torch.isfinite(output["loss"]) & torch.isfinite(norm)):
            raise NotFiniteError(_not_finite(engine, output))
        if max_grad_value is not None:
            nn.utils.clip_grad_value_(parameters, max_grad_value)
        optimizer.step()
        return output

    return Engine(step)


def _not_finite(engine: Engine, output: Mapping[str, Tensor]) -> str:
    what = "gradient" if bool(torch.isfinite(output["loss"])) else "loss"
    values = ", ".join(f"{key} {value.item():.4g}" for key, value in output.items())
    return (
        f"the {what} is not finite in iteration {engine.state.iteration} (epoch {engine.state.epoch}): {values}. "
        "Look for wrong labels in the data, or lower the learning rate."
    )


def make_evaluator(
    model: nn.Module,
    loss_fn: MTLoss,
    metrics: Mapping[str, Metric],
    device: str | torch.device,
    *,
    non_blocking: bool = False,
) -> Engine:
    """Make the engine that evaluates a dataset and leaves the results in ``engine.state.metrics``.

    Parameters
    ----------
    model : nn.Module
        As in `make_trainer`; it is put in evaluation mode, and weights are left alone.
    loss_fn : MTLoss
        The loss, whose value over the dataset becomes ``loss`` and ``{component}_loss`` (`LossMetric`).
    metrics : mapping
        Further metrics, updated with ``(y_pred, y_true)``.
    device : str or torch.device
        Where batches go.
    non_blocking : bool
        As in `prepare_batch`.

    Returns
    -------
    Engine
        Its output is ``(y_pred, y_true)``; ``y_pred`` holds the inputs too.
    """
    loss_fn.to(device)
    forces_wanted = loss_fn.needs("forces") or any(
        isinstance(metric, RegMultiMetric) and "forces" in metric.properties for metric in metrics.values()
    )

    def step(engine: Engine, batch: tuple[Batch, Batch]) -> tuple[Batch, Batch]:
        model.eval()
        with torch.no_grad():
            y_pred, y_true = predict(model, batch, forces_wanted, device, non_blocking)
        return {key: value.detach() for key, value in y_pred.items()}, y_true

    evaluator = Engine(step)
    LossMetric(loss_fn).attach(evaluator, "loss")
    for name, metric in metrics.items():
        metric.attach(evaluator, name)
    return evaluator
