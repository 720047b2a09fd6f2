"""How far a run is and how fast: the lines and the bar that a user sees, and where the time goes.

`StepTimer` and `Means` gather, `Progress` shows. None of them waits for a GPU between two reports.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from aimnet2mult.train.utils import TerminalHandler

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes that make one unit of ``resource.getrusage(...).ru_maxrss``."""

GIB = 2**30


# --------------------------------------------------------------------------------------------------
# gathering
# --------------------------------------------------------------------------------------------------


class StepTimer:
    """Where the time of the training goes.

    Validation and whatever else is wrapped in `pause` does not count. On a GPU, steps are queued and run while the next
    batch is fetched: a wait for data is the time that the process waited, not that the GPU had nothing to do, and times
    are exact because a report, where `numbers` is called, comes after the losses were read from the GPU.

    Parameters
    ----------
    device : torch.device
        Where the model is.
    processes : int
        Processes that train together; each is taken to see as many molecules as this one.
    """

    def __init__(self, device: torch.device, processes: int = 1) -> None:
        self._device = device
        self._processes = processes
        self._tally = _Tally()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._tally.waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._tally.paused += time.perf_counter() - start

    def step(self, batches: Iterable[tuple[Mapping[str, Tensor], Any]]) -> None:
        """Count a step of the optimiser on these batches, best before they are on a GPU.

        Parameters
        ----------
        batches : iterable of (x, y)
            ``numbers`` (B, N) of x is looked at, where padding is zero.
        """
        self._tally.steps += 1
        for x, _ in batches:
            self._tally.molecules += len(x["numbers"]) * self._processes
            self._tally.atoms += int(torch.count_nonzero(x["numbers"])) * self._processes

    def numbers(self) -> dict[str, float]:
        """Return rates since the last call, and memory.

        Returns
        -------
        dict of str to float
            ``time/step`` in s, ``time/data_share`` in [0, 1], ``time/steps_per_s``, ``time/molecules_per_s``,
            ``time/atoms_per_s``; ``memory/peak_GiB`` of this process, ``memory/gpu_peak_GiB`` of tensors on its GPU.
            Without a step since then, memory alone.
        """
        tally, self._tally = self._tally, _Tally()
        return {**tally.rates(), **peak_memory(self._device)}


class _Tally:
    """What happened since some moment."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = self.paused = 0.0
        self.steps = self.molecules = self.atoms = 0

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start - self.paused
        if self.steps == 0 or seconds <= 0:
            return {}
        return {
            "time/step": seconds / self.steps,
            "time/data_share": self.waited / seconds,
            "time/steps_per_s": self.steps / seconds,
            "time/molecules_per_s": self.molecules / seconds,
            "time/atoms_per_s": self.atoms / seconds,
        }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the largest memory that this process has had, and that of its tensors on a GPU, in GiB."""
    peak = {}
    if sys.platform != "win32":
        peak["memory/peak_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB
    if device.type == "cuda":
        peak["memory/gpu_peak_GiB"] = torch.cuda.max_memory_allocated(device) / GIB
    return peak


class Means:
    """Means of numbers that may be on a GPU, where they are summed up until somebody asks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add scalars by name; does not wait for the device."""
        for name, value in numbers.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Return the means since the last call; waits for the device once."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts, so that means after resuming are the same to the last bit."""
        return {"sums": {name: total.cpu() for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a state, with sums on ``device``."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._counts = dict(state["counts"])


# --------------------------------------------------------------------------------------------------
# showing
# --------------------------------------------------------------------------------------------------


class Progress:
    """Shows how far a run is: a bar on a terminal, lines elsewhere and in the log file.

    Parameters
    ----------
    iterations : int
        Steps of the whole run, as far as known.
    epochs : int
        Epochs of the whole run.
    enabled : bool
        False on all ranks but the first: nothing is shown.
    terminal : bool, optional
        Show a bar, and keep the lines from the terminal; by default as `on_terminal` says.
    """

    def __init__(self, iterations: int, epochs: int, enabled: bool = True, terminal: bool | None = None) -> None:
        self._iterations = iterations
        self._epochs = epochs
        self._enabled = enabled
        self._terminal = on_terminal() if terminal is None else terminal
        self._bar: tqdm[NoReturn] | None = None
        self._began = time.perf_counter()
        self._first = 0

    def start(self, iteration: int = 0) -> None:
        """Begin after so many steps."""
        self._began, self._first = time.perf_counter(), iteration
        if self._enabled and self._terminal:
            self._bar = tqdm(
                total=self._iterations,
                initial=iteration,
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
                smoothing=0,  # the time left is from the mean since the start, validation included
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n}/{total}, ETA {remaining}{postfix}",
            )
            for handler in _terminal_handlers():
                handler.addFilter(_is_no_report)

    def step(self, epoch: int, iteration: int) -> None:
        """Say that a step of epoch ``epoch`` (from 1) is done, the run's step number ``iteration`` (from 1)."""
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {epoch}/{self._epochs}", refresh=False)
            self._bar.total = max(self._iterations, iteration)
            self._bar.update(iteration - self._bar.n)

    def report(self, epoch: int, iteration: int, numbers: Mapping[str, float], skipped: int = 0) -> None:
        """Log a line, and show the same numbers on the bar.

        Parameters
        ----------
        epoch, iteration : int
            As for `step`.
        numbers : mapping
            What the loggers get too: ``train/loss``, ``train/{component}_loss``, ``train/grad_norm``, ``lr/{group}``
            and those of `StepTimer.numbers`. Those that are missing are not shown.
        skipped : int
            Steps skipped so far because loss or gradient was not finite.
        """
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(describe(numbers, skipped, brief=True)))
        head = [f"epoch {epoch}/{self._epochs}", f"iteration {iteration}/{self._iterations}"]
        left = self.seconds_left(iteration)
        tail = [] if left is None else [f"ETA {duration(left)}"]
        logger.info("%s", ", ".join([*head, *describe(numbers, skipped), *tail]), extra={"is_report": True})

    def seconds_left(self, iteration: int) -> float | None:
        """Return the time that the rest of the run takes at its speed so far, validation included; None: unknown."""
        done = iteration - self._first
        if done <= 0:
            return None
        return max(self._iterations - iteration, 0) * (time.perf_counter() - self._began) / done

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show on the bar what takes its time between two steps, such as ``validation``."""
        if self._bar is None:
            yield
            return
        before = self._bar.desc
        self._bar.set_description_str(what)
        try:
            yield
        finally:
            self._bar.set_description_str(before)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            for handler in _terminal_handlers():
                handler.removeFilter(_is_no_report)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def on_terminal() -> bool:
    """Whether stderr is a terminal with room for a bar; in containers and batch jobs there are some without a size."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def describe(numbers: Mapping[str, float], skipped: int = 0, brief: bool = False) -> list[str]:
    """Return what is known of the last steps in words: losses, gradient, learning rates, speed.

    Only what fits beside a bar if ``brief``.
    """
    facts = []
    if "train/loss" in numbers:
        facts.append(f"loss {numbers['train/loss']:.4g}" + ("" if brief else _components(numbers)))
    if "train/grad_norm" in numbers and not brief:
        facts.append(f"gradient norm {numbers['train/grad_norm']:.3g}")
    facts += _learning_rates({name.removeprefix("lr/"): r for name, r in numbers.items() if name.startswith("lr/")})
    if skipped:
        facts.append(f"{skipped} {'step' if skipped == 1 else 'steps'} skipped")
    if "time/step" in numbers:
        facts.append(f"{numbers['time/steps_per_s']:.3g} steps/s")
    if "time/step" in numbers and not brief:
        facts.append(f"{numbers['time/molecules_per_s']:.0f} molecules/s")
        facts.append(f"waiting for data {100 * numbers['time/data_share']:.0f} %")
    return facts


def _components(numbers: Mapping[str, float]) -> str:
    losses = [
        f"{name.removeprefix('train/').removesuffix('_loss')} {value:.4g}"
        for name, value in numbers.items()
        if name.startswith("train/") and name.endswith("_loss")
    ]
    return f" ({', '.join(losses)})" if losses else ""


def _learning_rates(rates: Mapping[str, float]) -> list[str]:
    """Return the learning rate, or those of the groups where they differ."""
    if len(set(rates.values())) <= 1:
        return [f"learning rate {rate:.3g}" for rate in set(rates.values())]
    return ["learning rates " + " ".join(f"{name} {rate:.3g}" for name, rate in rates.items())]


def duration(seconds: float) -> str:
    """Return a time in words, by its two largest units: ``45 s``, ``12 min``, ``1 h 12 min``, ``3 d 4 h``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def _terminal_handlers() -> list[TerminalHandler]:
    return [h for h in logging.getLogger("aimnet2mult").handlers if isinstance(h, TerminalHandler)]


def _is_no_report(record: logging.LogRecord) -> bool:
    """Whether a log line says something that the bar does not."""
    return not getattr(record, "is_report", False)
