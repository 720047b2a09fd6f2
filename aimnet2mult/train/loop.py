"""The training loop: steps, validations, checkpoints, and where a run stands between them.

    for each epoch:
        for each list of batches:  step  ->  report, when due  ->  validation, when due  ->  checkpoint, when due

One iteration is one step of the optimiser. `Training.state_dict` holds all that the future of a run depends on; a run
that goes on from it (`Training.load_state_dict`) has the same weights and the same ``metrics.jsonl``, bit for bit, as
one that was never interrupted.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch.optim import Optimizer

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.loaders import Batch, MoleculeLoader
from aimnet2mult.data.sampler import MixedFidelityBatchSampler
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.train.ema import WeightAverage
from aimnet2mult.train.engine import Step, StepResult, without_fidelities
from aimnet2mult.train.gradients import GradientReporter
from aimnet2mult.train.loss import MTLoss
from aimnet2mult.train.monitor import EarlyStopping, FidelityStopping, Monitor
from aimnet2mult.train.processes import any_rank, gather_objects
from aimnet2mult.train.recorder import Recorder
from aimnet2mult.train.run_folder import Checkpoints
from aimnet2mult.train.schedule import Schedule
from aimnet2mult.train.schema import TrainConfig, named_fidelities
from aimnet2mult.train.sharing import Closeness
from aimnet2mult.train.state import random_states, set_random_states
from aimnet2mult.train.stop import StopRequest

logger = logging.getLogger(__name__)

STATE_VERSION = 1
"""Version of what `Training.state_dict` returns."""


CheckpointWriter = Callable[[Path, int, int, Mapping[str, float], Mapping[str, Any]], None]
"""Writes a checkpoint: file, epoch, iteration, validation metrics (if it has been validated), state of the run."""


class NotFiniteError(ValueError):
    """Too many steps in a row whose loss or gradient was infinite or NaN."""


class StoppedError(Exception):
    """Somebody asked the run to stop in the middle of a validation."""


@dataclass
class Position:
    """Where a run stands, in plain numbers.

    Attributes
    ----------
    epoch : int
        Epochs that are complete.
    batches : int
        Batches of each process that were trained on in the epoch after these.
    iteration : int
        Steps of the optimiser, those that were skipped included.
    unfinished : bool
        The last step was made, but not all that follows it: a validation was interrupted.
    skipped, skipped_in_a_row : int
        Steps without effect because loss or gradient was not finite: in all, and without any other since.
    """

    epoch: int = 0
    batches: int = 0
    iteration: int = 0
    unfinished: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0


class End(NamedTuple):
    """Why a run ended."""

    finished: bool  # False: somebody asked it to stop, and it can go on
    reason: str


@dataclass
class Training:
    """A run: what it consists of, and where it stands.

    Attributes
    ----------
    config : TrainConfig
        The settings.
    model : AIMNet2
        The model that learns.
    step : Step
        Makes one step of the optimiser.
    optimizer, schedule, loss_fn, ema
        Optimiser, learning rates (None: constant), loss, running average of the weights (None: none).
    loader, val_loader : MoleculeLoader
        Batches of this process; None without validation data.
    evaluator : Engine
        Evaluates what is saved: the averaged weights, or those of ``model``.
    monitor : Monitor
        The number by which the best model is found.
    early_stopping : EarlyStopping, optional
        Ends a run that gets no better.
    fidelity_stopping : FidelityStopping, optional
        Leaves fidelities out of the training that get no better.
    gradient_reporter : GradientReporter, optional
        Reports on the gradients of the fidelities.
    recorder : Recorder
        Tells what happens.
    checkpoints : Checkpoints
        Which files are kept.
    write : callable
        ``write(path, epoch, iteration, metrics, state)`` writes a checkpoint with the state of the run in it.
    device : torch.device
        Where the run computes.
    stop : StopRequest
        Whether somebody asked the run to stop.
    closeness : Closeness, optional
        Penalty between the weights of the fidelities, which ``step`` adds.
    """

    config: TrainConfig
    model: AIMNet2
    step: Step
    optimizer: Optimizer
    schedule: Schedule | None
    loss_fn: MTLoss
    ema: WeightAverage | None
    loader: MoleculeLoader
    val_loader: MoleculeLoader | None
    evaluator: Engine
    monitor: Monitor
    early_stopping: EarlyStopping | None
    fidelity_stopping: FidelityStopping | None
    gradient_reporter: GradientReporter | None
    recorder: Recorder
    checkpoints: Checkpoints
    write: CheckpointWriter
    device: torch.device
    stop: StopRequest
    closeness: Closeness | None = None
    position: Position = field(default_factory=Position)
    saved: float = field(default_factory=time.monotonic)

    # ----------------------------------------------------------------------------------------------
    # the loop
    # ----------------------------------------------------------------------------------------------

    def run(self) -> End:
        """Train until the end, or until somebody asks to stop; leave a checkpoint of that moment.

        Raises
        ------
        NotFiniteError
            More than ``trainer.max_skipped`` steps in a row had no finite loss or gradient. They changed nothing, so
            that the checkpoint of this moment, too, is one to go on from.
        """
        at = self.position
        self.recorder.progress.start(at.iteration)
        try:
            with self.recorder.progress:
                end = self.finish_iteration() if at.unfinished else self.ending()
                while end is None:
                    end = self.run_epoch()
        except NotFiniteError:
            self.save()
            raise
        self.save()
        return end

    def run_epoch(self) -> End | None:
        """Train on what is left of an epoch."""
        at = self.position
        self.sampler.set_epoch(at.epoch, at.batches)
        batches = iter(self.loader)
        while group := self.next_batches(batches):
            self.train_on(group)
            if (end := self.finish_iteration()) is not None:
                return end
        return None

    def next_batches(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return the batches of the next step; none at the end of an epoch."""
        with self.recorder.timer.waiting():
            return list(islice(batches, self.config.trainer.accumulate))

    def train_on(self, batches: list[Batch]) -> None:
        """Make one step and take note of it.

        Raises
        ------
        NotFiniteError
            It was one too many without a finite loss or gradient.
        """
        at = self.position
        batches = self.learned_from(batches)
        self.report_gradients(batches)
        result = self.step(batches)
        at.iteration += 1
        at.batches += len(batches)
        at.unfinished = True
        if result.applied and self.ema is not None:
            self.ema.update(self.model)
        if self.schedule is not None:
            self.schedule.iteration()
        self.count_skipped(result)
        self.recorder.step(at.epoch + 1, at.iteration, batches, result, at.skipped)
        if at.skipped_in_a_row > self.config.trainer.max_skipped:
            raise NotFiniteError(
                f"trainer.max_skipped: loss or gradient was not finite in {at.skipped_in_a_row} steps in a row; the "
                f"last was {self.describe(result)}. Look for wrong labels in the data, or begin a new run with a lower "
                "learning rate from the weights of this one (--load). With a larger trainer.max_skipped it goes on "
                "(--resume)"
            )

    def learned_from(self, batches: list[Batch]) -> list[Batch]:
        """Return batches without the molecules of fidelities that have stopped."""
        stopped = [] if self.fidelity_stopping is None else self.fidelity_stopping.stopped
        if not stopped:
            return batches
        names = list(named_fidelities(self.config))
        return [without_fidelities(batch, [names.index(name) for name in stopped]) for batch in batches]

    def report_gradients(self, batches: list[Batch]) -> None:
        """Report on the gradients of the fidelities in the step that is to be made, when due."""
        settings, iteration = self.config.trainer.gradient_report, self.position.iteration + 1
        if settings is None or self.gradient_reporter is None or iteration % settings.every:
            return
        with self.recorder.timer.pause():
            report = self.gradient_reporter(batches)
        self.recorder.gradients(self.position.epoch + 1, iteration, report)

    def count_skipped(self, result: StepResult) -> None:
        """Count steps without effect."""
        at = self.position
        if result.applied:
            at.skipped_in_a_row = 0
            return
        at.skipped += 1
        at.skipped_in_a_row += 1
        what = self.describe(result)
        logger.warning("loss or gradient is not finite, the step is skipped (%d so far): %s", at.skipped, what)

    def describe(self, result: StepResult) -> str:
        """Return where the run stands and what came of its last step, in words."""
        at = self.position
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in result.losses.items())
        return f"iteration {at.iteration} (epoch {at.epoch + 1}): {values}, gradient norm {float(result.grad_norm):.4g}"

    def finish_iteration(self) -> End | None:
        """Do what follows a step: validation, end of the epoch, checkpoint; return why the run ends, if it does."""
        at, every = self.position, self.config.log_frequency.val
        epoch_ends = at.batches >= self.sampler.batches_per_epoch
        epoch = at.epoch + 1
        metrics = None
        if epoch_ends or (every is not None and at.iteration % every == 0):
            try:
                metrics = self.validate(epoch)
            except StoppedError:
                return self.asked_end()
        if epoch_ends:
            if self.schedule is not None:
                self.schedule.epoch(metrics)
            at.epoch, at.batches = epoch, 0
        at.unfinished = False
        if metrics is not None:
            self.keep(epoch, metrics)
        if (end := self.ending()) is not None:
            return end
        stop, due = any_rank(self.stop.requested is not None, self.checkpoint_due)
        if stop:
            return self.asked_end()
        if due:
            self.save()
        return None

    def ending(self) -> End | None:
        """Return why there is nothing left to do, or None."""
        if self.schedule is not None and self.schedule.exhausted:
            rate = f"{self.schedule.rate:.3g}"
            return End(True, f"the learning rate fell to {rate}, below scheduler.terminate_on_low_lr")
        stopping = self.early_stopping
        if stopping is not None and stopping.exhausted:
            return End(True, f"no improvement of {stopping.monitor.text} in {stopping.waited} validations")
        if self.fidelity_stopping is not None and self.fidelity_stopping.exhausted:
            return End(True, f"no improvement of any of {', '.join(self.fidelity_stopping.stopped)}")
        if self.position.epoch >= self.config.trainer.epochs:
            return End(True, f"{self.position.epoch} epochs are complete")
        return None

    def asked_end(self) -> End:
        """Return the end that some process was asked for by a signal."""
        name = next(name for name in gather_objects(self.stop.requested) if name is not None)
        self.stop.accept()
        return End(False, name)

    @property
    def sampler(self) -> MixedFidelityBatchSampler:
        """Sampler of the training batches."""
        sampler = self.loader.batch_sampler
        assert isinstance(sampler, MixedFidelityBatchSampler)
        return sampler

    # ----------------------------------------------------------------------------------------------
    # validation
    # ----------------------------------------------------------------------------------------------

    def validate(self, epoch: int) -> dict[str, float]:
        """Validate and take note of the errors; without validation data there are none.

        Raises
        ------
        StoppedError
            Somebody asked to stop; nothing has changed.
        """
        metrics: dict[str, float] = {}
        if self.val_loader is not None:
            with self.recorder.validating():
                metrics = evaluate(self.evaluator, self.val_loader, self.stop)
        self.recorder.validation(epoch, self.position.iteration, metrics)
        if metrics and self.schedule is not None:
            self.schedule.validation(metrics)
        if metrics and self.early_stopping is not None:
            self.early_stopping.update(metrics)
        if metrics and self.fidelity_stopping is not None:
            for name in self.fidelity_stopping.update(metrics):
                rule = self.fidelity_stopping.rules[name]
                what = f"no improvement of {rule.monitor.text} in {rule.waited} validations"
                logger.info("%s stops: %s; its molecules teach nothing from here on", name, what)
        return metrics

    # ----------------------------------------------------------------------------------------------
    # checkpoints
    # ----------------------------------------------------------------------------------------------

    def keep(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Keep the model if it is among the best (or, where these are not asked for, the latest)."""
        iteration = self.position.iteration
        best = metrics and self.config.checkpoint.save_best
        score = self.monitor.value(metrics) if best else -float(iteration)
        self.checkpoints.keep_best(score, epoch, iteration, self.writer(epoch, metrics))

    def save(self) -> None:
        """Write a checkpoint to go on from."""
        at = self.position
        epoch = at.epoch + (at.batches > 0)
        self.checkpoints.save_last(epoch, at.iteration, self.writer(epoch, {}))
        self.saved = time.monotonic()

    def writer(self, epoch: int, metrics: Mapping[str, float]) -> Callable[[Path], None]:
        """Return the function that writes a checkpoint; all processes ask for it, the first one calls it."""
        random = random_states(self.device)
        iteration = self.position.iteration
        return lambda path: self.write(path, epoch, iteration, metrics, {**self.state_dict(), "random": random})

    @property
    def checkpoint_due(self) -> bool:
        """Whether it is time for a checkpoint to go on from, by the steps or by the clock of this process."""
        settings = self.config.checkpoint
        by_steps = settings.every_iterations is not None and self.position.iteration % settings.every_iterations == 0
        minutes = (time.monotonic() - self.saved) / 60.0
        return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the future of the run depends on, apart from the random states of the processes."""
        return {
            "version": STATE_VERSION,
            "position": asdict(self.position),
            # Averaged weights are what a checkpoint holds as its model; these are the ones that learn.
            "model": None if self.ema is None else {k: v.detach().cpu() for k, v in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "loss": self.loss_fn.state_dict(),
            "closeness": None if self.closeness is None else self.closeness.state_dict(),
            "early_stopping": None if self.early_stopping is None else self.early_stopping.state_dict(),
            "fidelity_stopping": None if self.fidelity_stopping is None else self.fidelity_stopping.state_dict(),
            "sampler": self.sampler.state(self.position.batches),
            "checkpoints": self.checkpoints.state_dict(),
            "recorder": self.recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned; no file is touched (`restore_files`).

        Parameters
        ----------
        state : mapping
            The state.
        weights : mapping
            State dict of the model in the same checkpoint.

        Raises
        ------
        ConfigError
            Data or settings are others than those of the state.
        """
        if state["version"] != STATE_VERSION:
            raise ConfigError(
                f"the state of the run is of version {state['version']}, this package reads {STATE_VERSION}. Go on "
                "with the version of aimnet2mult that wrote it, or begin a new run from the weights with --load"
            )
        self.sampler.restore(state["sampler"])
        self.position = Position(**state["position"])
        self.model.load_state_dict(weights if state["model"] is None else state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_fn.load_state_dict(state["loss"])
        for name in ("schedule", "ema", "early_stopping", "fidelity_stopping", "closeness"):
            part, saved = getattr(self, name), state.get(name)  # earlier versions have neither of the last two
            if part is not None and saved is not None:
                part.load_state_dict(saved)
        set_random_states(state["random"], self.device)

    def restore_files(self, state: Mapping[str, Any]) -> None:
        """Take back what the run wrote after a state: lines of the history, checkpoints."""
        self.recorder.load_state_dict(state["recorder"])
        self.checkpoints.load_state_dict(state["checkpoints"])


def evaluate(
    evaluator: Engine, loader: MoleculeLoader | Sequence[Batch], stop: StopRequest | None = None
) -> dict[str, float]:
    """Evaluate the validation molecules, in batches of this process; return loss and metrics by name.

    Raises
    ------
    StoppedError
        Somebody asked to stop meanwhile.
    ConfigError
        No molecule among them has a label that the loss uses.
    """
    in_all_processes = int(idist.all_reduce(len(loader), op="MIN"))

    def look(engine: Engine) -> None:
        if stop is not None and engine.state.iteration <= in_all_processes and any_rank(stop.requested is not None)[0]:
            raise StoppedError

    with evaluator.add_event_handler(Events.ITERATION_COMPLETED, look):
        evaluator.run(loader)
    metrics = {name: float(value) for name, value in evaluator.state.metrics.items() if np.ndim(value) == 0}
    if "loss" not in metrics:
        raise ConfigError("data: no validation molecule has a label that the loss uses; see loss.kwargs.components")
    return metrics
