"""Ignite engines: one training step, one evaluation step. What happens between steps is attached by the runner."""

from collections.abc import Mapping

import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.optim import Optimizer

from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.metrics import LossMetric, RegMultiMetric

Batch = dict[str, Tensor]


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


def has_label(y: Mapping[str, Tensor], key: str) -> bool:
    """Tell whether a molecule of the batch has a label; ask before the batch goes to the device, or it waits."""
    if key not in y:
        return False
    mask = y.get(f"{key}_mask")
    return mask is None or bool(mask.any())


def predict(model: nn.Module, x: Batch, compute_forces: bool) -> Batch:
    """Evaluate a model wrapped in `modules.Forces`: its predictions together with the inputs."""
    return {**x, **model(x, compute_forces=compute_forces)}


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

    Forces, and the second derivatives that learning from them takes, are computed only for batches with a force
    label, and only if the loss uses forces.

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

    def step(engine: Engine, batch: tuple[Batch, Batch]) -> dict[str, Tensor]:
        model.train()
        loss_fn.train()
        compute_forces = loss_fn.needs("forces") and has_label(batch[1], "forces")
        x, y = prepare_batch(batch, device, non_blocking)
        optimizer.zero_grad(set_to_none=True)
        losses = loss_fn(predict(model, x, compute_forces), y)
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
        compute_forces = forces_wanted and has_label(batch[1], "forces")
        x, y = prepare_batch(batch, device, non_blocking)
        with torch.no_grad():
            y_pred = predict(model, x, compute_forces)
        return {key: value.detach() for key, value in y_pred.items()}, y

    evaluator = Engine(step)
    LossMetric(loss_fn).attach(evaluator, "loss")
    for name, metric in metrics.items():
        metric.attach(evaluator, name)
    return evaluator
