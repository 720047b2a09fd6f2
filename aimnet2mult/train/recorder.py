"""What a run says of itself: history on disk, loggers, console. Only the first process writes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from aimnet2mult.data.loaders import Batch
from aimnet2mult.train.engine import StepResult
from aimnet2mult.train.gradients import GradientReport
from aimnet2mult.train.loggers import Loggers
from aimnet2mult.train.metrics import metrics_table
from aimnet2mult.train.progress import Means, Progress, StepTimer
from aimnet2mult.train.run_folder import History

logger = logging.getLogger(__name__)

STAGES = (("training", "train_mean/loss"), ("validation", "val/loss"))
"""Losses in the log: their names, and their keys in the history."""


class Recorder:
    """Tells what happens in a run.

    ``metrics.jsonl`` gets a line every ``log_frequency.train`` iterations (``train/loss``, ``train/{component}_loss``,
    ``train/grad_norm``: means since the last such line; ``train/skipped``: steps without effect so far, if there are
    any), one for each validation (``val/...``, and ``train_mean/...``: means since the last validation) and one for
    each report on gradients (``gradients/...``, `GradientReport.numbers`). Every line has ``epoch``, ``iteration`` and
    the learning rate ``lr/{group}`` of each group of weights. Times go to ``timing.jsonl``, so that a run that was
    interrupted writes the same metrics as one that was not; the loggers get both.

    Parameters
    ----------
    model : nn.Module
        The model that learns, for histograms.
    optimizer : Optimizer
        For the learning rates.
    history : History
        The files.
    progress : Progress
        The console.
    timer : StepTimer
        Times of steps.
    report_every : int
        ``log_frequency.train``.
    units : mapping
        Unit of each error, for tables.

    Attributes
    ----------
    loggers : Loggers
        Weights & Biases, TensorBoard; none until somebody puts them here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        history: History,
        progress: Progress,
        timer: StepTimer,
        *,
        report_every: int,
        units: Mapping[str, str],
    ) -> None:
        self.model, self.optimizer, self.history = model, optimizer, history
        self.progress, self.timer = progress, timer
        self.report_every, self.units = report_every, dict(units)
        self.loggers = Loggers([], None, {})
        self.since_report, self.since_validation = Means(), Means()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group of weights."""
        return {f"lr/{group['name']}": float(group["lr"]) for group in self.optimizer.param_groups}

    def step(self, epoch: int, iteration: int, batches: Sequence[Batch], result: StepResult, skipped: int) -> None:
        """Take note of a step; report, when due.

        Parameters
        ----------
        epoch, iteration : int
            Where the run is, counted from 1.
        batches : sequence of (x, y)
            What the step saw, on the CPU.
        result : StepResult
            What came of it.
        skipped : int
            Steps without effect so far.
        """
        self.timer.step(batches)
        if result.applied:
            losses = {name if name == "loss" else f"{name}_loss": value for name, value in result.losses.items()}
            for means in (self.since_report, self.since_validation):
                means.add({**losses, "grad_norm": result.grad_norm})
        self.loggers.watch(self.model, iteration)
        self.progress.step(epoch, iteration)
        if iteration % self.report_every == 0:
            self.report(epoch, iteration, skipped)

    def report(self, epoch: int, iteration: int, skipped: int) -> None:
        """Write the means over the steps since the last report."""
        means = {f"train/{name}": value for name, value in self.since_report.read().items()}
        record = {"epoch": epoch, "iteration": iteration, **self.learning_rates, **means}
        if skipped:
            record["train/skipped"] = skipped
        times = self.timer.numbers()
        self.history.add(record)
        self.history.add_timing({"epoch": epoch, "iteration": iteration, **times})
        self.loggers.log({**record, **times}, iteration)
        self.progress.report(epoch, iteration, {**record, **times}, skipped)

    def gradients(self, epoch: int, iteration: int, report: GradientReport) -> None:
        """Write the gradients of the fidelities in the step of an iteration."""
        record = {"epoch": epoch, "iteration": iteration, **self.learning_rates, **report.numbers()}
        self.history.add(record)
        self.loggers.log(record, iteration)
        logger.info("gradients on the shared weights, iteration %d\n%s", iteration, "\n".join(report.table()))

    def validation(self, epoch: int, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write the results of a validation (none: the end of an epoch without one)."""
        record: dict[str, Any] = {
            "epoch": epoch,
            "iteration": iteration,
            **self.learning_rates,
            **{f"train_mean/{name}": value for name, value in self.since_validation.read().items()},
            **{f"val/{name}": value for name, value in metrics.items()},
        }
        self.history.add(record)
        self.loggers.log(record, iteration)
        losses = [f"{stage} loss {record[key]:.5g}" for stage, key in STAGES if key in record]
        if losses:
            logger.info("epoch %d, iteration %d: %s", epoch, iteration, ", ".join(losses))
        if metrics:
            logger.info("validation errors\n%s", metrics_table(metrics, self.units))

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Leave the time inside out of the times of steps, and say what takes it."""
        with self.timer.pause(), self.progress.doing("validation"):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs; the history is safe on disk when this returns."""
        return {
            "history": self.history.state(),
            "loggers": self.loggers.state_dict(),
            "since_report": self.since_report.state_dict(),
            "since_validation": self.since_validation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; lines that were written after it are taken back."""
        self.history.restore(state["history"])
        self.since_report.load_state_dict(state["since_report"], torch.device("cpu"))
        self.since_validation.load_state_dict(state["since_validation"], torch.device("cpu"))
