"""From a study to its jobs: reference energies, pretraining, trials of learning rates, the points and their errors."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aimnet2mult.evaluation.history import read_history
from aimnet2mult.study.commands import ERRORS_FILE, RUN, SAE_FILE, Commands, Part, Stage, pretraining_key
from aimnet2mult.study.data import VALIDATION, StudyData, Subset
from aimnet2mult.study.jobs import Command, Job, StudyError
from aimnet2mult.study.settings import (
    ANCHORED,
    DELTA,
    DIFFERENCE,
    JOINT,
    MIXED,
    PRETRAINED,
    StudyConfig,
    pretraining_shares,
    pretraining_steps,
    shares_by_size,
)
from aimnet2mult.utils.run_files import METRICS, MODEL

RUNS = "runs"
"""Folder of all commands, in that of the study."""


@dataclass(frozen=True)
class Point:
    """A protocol at a number of target labels.

    Attributes
    ----------
    protocol : str
        Name of the protocol.
    fraction : float
        Share of the molecules of the pool.
    replicate : int
        Number of the replicate.
    order, seed : int
        Its order of the molecules, and its seed.
    """

    protocol: str
    fraction: float
    replicate: int
    order: int
    seed: int

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.protocol}, fraction {self.fraction:g}, replicate {self.replicate}"

    @property
    def folder(self) -> str:
        """Folder of its commands, one in it for each learning rate."""
        return f"{RUNS}/{self.protocol}/f{self.fraction:g}_r{self.replicate}"


class Plan:
    """The jobs of a study.

    Parameters
    ----------
    study : StudyConfig
        The study.
    folder : Path
        Its folder.
    data : StudyData
        The files that were written.

    Attributes
    ----------
    points : list of Point
        All points, those of the first replicates first.
    left_out : list of str
        Points that the data do not allow, and why.
    """

    def __init__(self, study: StudyConfig, folder: Path, data: StudyData) -> None:
        self.study, self.folder, self.data = study, folder, data
        self.commands = Commands(study, folder)
        self.points: list[Point] = []
        self.left_out: list[str] = []
        every = [
            Point(protocol, fraction, replicate, *choice)
            for protocol in study.protocols
            for fraction in study.fractions_of(protocol)
            for replicate, choice in enumerate(study.replicates(fraction))
        ]
        for point in sorted(every, key=lambda point: point.replicate):
            if larger := self._same_as_larger(point):
                self.left_out.append(f"{point.name}: the molecules of fraction {larger:g} are the fewest possible")
            elif missing := self.subset(point).missing:
                low = study.low(point.protocol)
                self.left_out.append(f"{point.name}: no {missing} among the geometries that {low} has, too")
            else:
                self.points.append(point)

    def _same_as_larger(self, point: Point) -> float | None:
        """The next larger fraction, if it has the same molecules."""
        fractions = self.study.fractions_of(point.protocol)
        larger = min((fraction for fraction in fractions if fraction > point.fraction), default=None)
        if larger is None or (larger, point.order) not in self.data.sizes:
            return None
        sizes = self.data.sizes
        return larger if sizes[larger, point.order] == sizes[point.fraction, point.order] else None

    def subset(self, point: Point) -> Subset:
        """What a point is trained on."""
        low = self.study.low(point.protocol) if self.study.kind(point.protocol) == DELTA else None
        return self.data.subset(point.fraction, point.order, low)

    # ------------------------------------------------------------------------------------------------
    # jobs
    # ------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """Return all jobs, in the order in which they are begun where none waits for another."""
        jobs = [*self._references(), *self._pretraining()]
        for protocol in self.study.protocols:
            jobs += self._trials(protocol)
        for point in self.points:
            jobs += self._point(point)
        return list({job.name: job for job in jobs}.values())

    def _references(self) -> Iterator[Job]:
        """Fits of the reference energies of the other fidelities."""
        for protocol, settings in self.study.protocols.items():
            if self.study.kind(protocol) in (MIXED, *PRETRAINED):
                for name in self.study.others:
                    yield Job(
                        f"reference energies of {_with(name, settings.terms)}", partial(self._low_sae, protocol, name)
                    )

    def _low_sae(self, protocol: str, name: str) -> Command:
        terms = self.study.protocols[protocol].terms
        return self.commands.reference(f"{RUNS}/sae/{_with(name, terms)}", self.commands.files[name], terms)

    def _pretraining(self) -> Iterator[Job]:
        """Models of the other fidelities: trials of learning rates with seed 0, then all seeds with the best."""
        for protocol in self.study.protocols:
            if self.study.kind(protocol) not in PRETRAINED:
                continue
            terms = self.study.protocols[protocol].terms
            needs = tuple(f"reference energies of {_with(name, terms)}" for name in self.study.others)
            steps = pretraining_steps(self.study, protocol)
            trials = tuple(
                Job(
                    f"pretraining {pretraining_key(self.study, protocol)}, learning rate {rate:g}",
                    partial(self._pretrain, protocol, 0, rate),
                    needs,
                    steps=steps,
                )
                for rate in _choices(self.study.learning_rates)
            )
            yield from trials
            for seed in sorted({0, *(point.seed for point in self.points if point.protocol == protocol)}):
                yield Job(
                    self._pretraining_name(protocol, seed),
                    partial(self.pretraining, protocol, seed),
                    needs,
                    tuple(job.name for job in trials),
                    0 if trials and seed == 0 else steps,
                )

    def _rates(self, protocol: str) -> list[float]:
        """Learning rates that are tried for a protocol after pretraining."""
        return _choices(self.study.rates_of(protocol))

    def _pretraining_name(self, protocol: str, seed: int) -> str:
        return f"pretraining {pretraining_key(self.study, protocol)}, seed {seed}"

    def _pretrain(self, protocol: str, seed: int, rate: float) -> Command:
        settings = self.study.protocols[protocol]
        parts = tuple(
            Part(name, self.commands.files[name], sae=f"{RUNS}/sae/{_with(name, settings.terms)}")
            for name in self.study.others
        )
        shares, steps = pretraining_shares(self.study, protocol), pretraining_steps(self.study, protocol)
        stage = Stage(parts, steps, rate, seed, shares, settings.pretraining_settings, model=settings.model)
        folder = f"{RUNS}/pretraining_{pretraining_key(self.study, protocol)}/seed{seed}/lr{rate:g}"
        return self.commands.train(folder, stage)

    def pretraining(self, protocol: str, seed: int) -> Command:
        """Pretrain with the learning rate that was best."""
        return self._pretrain(protocol, seed, self.pretraining_rate(protocol))

    def _trials(self, protocol: str) -> Iterator[Job]:
        """Trials of learning rates and their validation."""
        for fraction in self.tune_fractions(protocol):
            point = Point(protocol, fraction, 0, *self.study.replicates(fraction)[0])
            for rate in self._rates(protocol):
                name = f"{point.name}, learning rate {rate:g}"
                yield from self._before(point)
                yield Job(name, partial(self._train, point, rate), self._needs(point), steps=self.own_steps(point))
                yield Job(f"validation of {name}", partial(self._validate, point, rate), (name,))

    def _trial_names(self, protocol: str, fraction: float) -> tuple[str, ...]:
        point = Point(protocol, fraction, 0, *self.study.replicates(fraction)[0])
        return tuple(f"validation of {point.name}, learning rate {rate:g}" for rate in self._rates(protocol))

    def tune_fractions(self, protocol: str) -> list[float]:
        """Fractions at which the data allow trials, or the largest such one; of these, those whose rates are used."""
        usable = [
            fraction
            for fraction in self.study.all_fractions()
            if not self.subset(Point(protocol, fraction, 0, *self.study.replicates(fraction)[0])).missing
        ]
        tried = [fraction for fraction in self.study.tune_fractions if fraction in usable] or usable[-1:]
        used = {_nearest(fraction, tried) for fraction in self.study.fractions_of(protocol)}
        return [fraction for fraction in tried if fraction in used]

    def _before(self, point: Point) -> Iterator[Job]:
        """The fit of the target's reference energies."""
        name = f"reference energies of {point.name}"
        protocol = self.study.protocols[point.protocol]
        needs: tuple[str, ...] = ()
        if protocol.reference == ANCHORED:
            needs = self._needs(point)[1:]
        yield Job(name, partial(self.reference, point), needs)

    def _needs(self, point: Point) -> tuple[str, ...]:
        """Names of the jobs that the training of a point needs, the reference energies of the target first."""
        kind, terms = self.study.kind(point.protocol), self.study.protocols[point.protocol].terms
        needs = [f"reference energies of {point.name}"]
        if kind in (MIXED, JOINT):
            needs += [f"reference energies of {_with(name, terms)}" for name in self.study.others]
        if kind in PRETRAINED:
            needs.append(self._pretraining_name(point.protocol, point.seed))
        return tuple(needs)

    def _point(self, point: Point) -> Iterator[Job]:
        """A point, its validation and its test."""
        tuned = self._tune_fraction(point)
        found = bool(self._rates(point.protocol)) and point.replicate == 0 and point.fraction == tuned
        trials = self._trial_names(point.protocol, tuned)
        yield from self._before(point)
        steps = 0 if found else self.own_steps(point)
        yield Job(point.name, partial(self.training, point), self._needs(point), trials, steps)
        yield Job(f"validation of {point.name}", partial(self.validation, point), (point.name,))
        yield Job(f"test of {point.name}", partial(self.test, point), (point.name,))

    def _tune_fraction(self, point: Point) -> float:
        """The fraction whose learning rate a point takes."""
        return _nearest(point.fraction, self.tune_fractions(point.protocol))

    def own_steps(self, point: Point) -> int:
        """Steps of a point after pretraining."""
        before = pretraining_steps(self.study, point.protocol) if self._is_pretrained(point) else 0
        return self.study.steps - before

    def _is_pretrained(self, point: Point) -> bool:
        return self.study.kind(point.protocol) in PRETRAINED

    # ------------------------------------------------------------------------------------------------
    # commands of a point
    # ------------------------------------------------------------------------------------------------

    def reference(self, point: Point) -> Command:
        """Fit the reference energies of what a point is trained on."""
        protocol = self.study.protocols[point.protocol]
        anchor, reads = self._anchor(point) if protocol.reference == ANCHORED else ((), ())
        files = (self.subset(point).file,)
        return self.commands.reference(f"{point.folder}/sae", files, protocol.terms, anchor, reads)

    def _anchor(self, point: Point) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Arguments that anchor reference energies, and the folders that they read."""
        protocol = self.study.protocols[point.protocol]
        name = protocol.anchor or self.study.others[0]
        if self._is_pretrained(point):
            run = self.pretraining(point.protocol, point.seed).folder
            return ("--anchor-model", f"{run}/{RUN}/{MODEL}", "--anchor-fidelity", name), (run,)
        sae = f"{RUNS}/sae/{_with(name, protocol.terms)}"
        data = [word for file in self.commands.files[name] for word in ("--anchor", file)]
        return (*data, "--anchor-sae", f"{sae}/{SAE_FILE}"), (sae,)

    def _train(self, point: Point, rate: float) -> Command:
        protocol, kind = self.study.protocols[point.protocol], self.study.kind(point.protocol)
        subset = self.subset(point)
        parts = [
            Part(
                DIFFERENCE if kind == DELTA else self.study.target,
                (subset.file,),
                subset.validation,
                f"{point.folder}/sae",
            )
        ]
        shares: Mapping[str, float] = {}
        if kind in (MIXED, JOINT):
            parts += [
                Part(name, self.commands.files[name], sae=f"{RUNS}/sae/{_with(name, protocol.terms)}")
                for name in self.study.others
            ]
            structures = {**self.data.others, self.study.target: subset.structures}
            shares = protocol.shares or shares_by_size({name: structures[name] for name in self.study.fidelities})
        pretrained = self._is_pretrained(point) and kind != DELTA
        load = self.pretraining(point.protocol, point.seed).folder if pretrained else ""
        steps = self.own_steps(point)
        stage = Stage(tuple(parts), steps, rate, point.seed, shares, protocol.settings, load, protocol.model)
        return self.commands.train(f"{point.folder}/lr{rate:g}", stage)

    def _validate(self, point: Point, rate: float) -> Command:
        run = self._train(point, rate).folder
        return self.commands.errors(f"{point.folder}/lr{rate:g}_validation", self._models(point, run), (VALIDATION,))

    def _models(self, point: Point, run: str) -> list[tuple[str, str]]:
        """Fidelities and runs whose predictions add up to that of a point."""
        if self.study.kind(point.protocol) != DELTA:
            return [(self.study.target, run)]
        low = self.pretraining(point.protocol, point.seed).folder
        return [(self.study.low(point.protocol), low), (DIFFERENCE, run)]

    def training(self, point: Point) -> Command:
        """Train a point with the learning rate that was best."""
        return self._train(point, self.rate(point))

    def validation(self, point: Point) -> Command:
        """Errors of a point on the validation molecules."""
        return self._validate(point, self.rate(point))

    def test(self, point: Point) -> Command:
        """Errors of a point on the test molecules."""
        run, rate = self.training(point).folder, self.rate(point)
        return self.commands.errors(f"{point.folder}/lr{rate:g}_test", self._models(point, run), self.commands.test)

    def history(self, point: Point) -> list[Command]:
        """Return the commands that lead to the test errors of a point, without trials of learning rates."""
        kind = self.study.kind(point.protocol)
        commands = []
        if kind in (MIXED, *PRETRAINED):
            commands += [self._low_sae(point.protocol, name) for name in self.study.others]
        if kind in PRETRAINED:
            commands.append(self.pretraining(point.protocol, point.seed))
        last = (self.reference(point), self.training(point), self.validation(point), self.test(point))
        return [*commands, *last]

    # ------------------------------------------------------------------------------------------------
    # what the results say
    # ------------------------------------------------------------------------------------------------

    def rate(self, point: Point) -> float:
        """Learning rate of a point.

        Raises
        ------
        StudyError
            No trial has a result.
        """
        if not self._rates(point.protocol):
            return self.study.rates_of(point.protocol)[0]
        return _lowest(self.scores(point.protocol, self._tune_fraction(point)), point.name)

    def scores(self, protocol: str, fraction: float) -> dict[float, float]:
        """Validation score of each learning rate that was tried for a protocol at a fraction."""
        point = Point(protocol, fraction, 0, *self.study.replicates(fraction)[0])
        folders = {rate: f"{point.folder}/lr{rate:g}_validation" for rate in self._rates(protocol)}
        found = {rate: self.errors(folder) for rate, folder in folders.items()}
        return {rate: self.score(errors) for rate, errors in found.items() if errors}

    def score(self, errors: dict[str, Any]) -> float:
        """Weighted sum of the mean absolute errors of energy (eV) and forces (eV/Å)."""
        weights = {"energy": self.study.score.energy, "forces": self.study.score.forces}
        return sum(weight * errors[key]["mae"] for key, weight in weights.items() if weight and key in errors)

    def errors(self, folder: str) -> dict[str, Any]:
        """Errors that a command has written; empty: none."""
        path = self.folder / folder / ERRORS_FILE
        if not path.is_file():
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))["errors"]
        assert isinstance(found, dict)
        return found

    def pretraining_rate(self, protocol: str) -> float:
        """Learning rate of a pretraining: that of the lowest validation loss."""
        if not _choices(self.study.learning_rates):
            return self.study.learning_rates[0]
        return _lowest(self.pretraining_losses(protocol), f"pretraining of {protocol}")

    def pretraining_losses(self, protocol: str) -> dict[float, float]:
        """Lowest validation loss of each learning rate that was tried for a pretraining."""
        folders = {rate: self._pretrain(protocol, 0, rate).folder for rate in _choices(self.study.learning_rates)}
        found = {rate: _validation_losses(self.folder / folder / RUN) for rate, folder in folders.items()}
        return {rate: min(losses) for rate, losses in found.items() if losses}


def _choices(rates: list[float]) -> list[float]:
    """Learning rates that are tried; none where there is no choice."""
    return rates if len(rates) > 1 else []


def _with(name: str, terms: list[str]) -> str:
    """Name of a fidelity with the terms of its reference energies."""
    return "_".join([name, *sorted(terms)])


def _nearest(fraction: float, fractions: Sequence[float]) -> float:
    """The fraction that is nearest on a logarithmic scale."""
    return min(fractions, key=lambda other: abs(math.log(fraction / other)))


def _validation_losses(run: Path) -> list[float]:
    """Validation losses of a finished run; none of one that is not."""
    if not (run / MODEL).is_file():
        return []
    return [record["val/loss"] for record in read_history(run / METRICS) if "val/loss" in record]


def _lowest(scores: dict[float, float], name: str) -> float:
    finite = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise StudyError(f"{name}: no trial of a learning rate has ended with a result")
    return min(finite, key=finite.__getitem__)
