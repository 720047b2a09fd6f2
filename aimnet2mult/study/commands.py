"""The command lines of a study, with names of files relative to its folder."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.data.sgdataset import expand_files
from aimnet2mult.models.base import load_model_config
from aimnet2mult.study.data import UNSEEN
from aimnet2mult.study.jobs import Command
from aimnet2mult.study.settings import (
    DELTA,
    DIFFERENCE,
    FINE_TUNE,
    PRETRAINED,
    TARGET_ONLY,
    StudyConfig,
    equal_shares,
    pretraining_shares,
    pretraining_steps,
)
from aimnet2mult.train.configuration import load_config, read_yaml
from aimnet2mult.utils.run_files import MODEL

RUN = "run"
"""Folder of a training run, in that of its command."""

PLAIN_TEXT = re.compile(r"[\w./+-]+")
"""Text that needs no quotes."""

SAE_FILE, ERRORS_FILE = "sae.yaml", "errors.json"


@dataclass(frozen=True)
class Part:
    """A fidelity of a training run.

    Attributes
    ----------
    name : str
        The fidelity.
    files : tuple of str
        Its datasets.
    validation : str
        Dataset to validate with; empty: none of its own.
    sae : str
        Folder of the command that fits its reference energies.
    """

    name: str
    files: tuple[str, ...]
    validation: str = ""
    sae: str = ""


@dataclass(frozen=True)
class Stage:
    """A training run.

    Attributes
    ----------
    parts : tuple of Part
        Its fidelities.
    steps : int
        Optimiser steps.
    rate : float
        Learning rate.
    seed : int
        Seed of all random choices.
    shares : dict of str to float
        Fidelity -> share of the drawn molecules.
    settings : dict of str to Any
        Dotted key -> value, what the protocol says.
    load : str
        Folder of the run whose model it starts from; empty: from nothing.
    model : Path, optional
        YAML file of its model; default that of the study.
    """

    parts: tuple[Part, ...]
    steps: int
    rate: float
    seed: int
    shares: Mapping[str, float]
    settings: Mapping[str, Any]
    load: str = ""
    model: Path | None = None


class Commands:
    """Makes the command lines of a study.

    Parameters
    ----------
    study : StudyConfig
        The study.
    folder : Path
        Its folder.
    """

    def __init__(self, study: StudyConfig, folder: Path) -> None:
        self.study, self.folder = study, folder.absolute()
        self.settings = self._relative(study.train)
        self.files = {
            name: tuple(map(self._relative, expand_files(fidelity.files)))
            for name, fidelity in study.fidelities.items()
        }
        if study.unseen:
            self.files |= {name: (UNSEEN.format(name),) for name in study.others}
        self.test = tuple(map(self._relative, expand_files(study.test)))
        self.accumulate = (read_yaml(study.train).get("trainer") or {}).get("accumulate", 1)

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)

    # ------------------------------------------------------------------------------------------------
    # checks
    # ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check the settings of all training runs before the first one.

        Raises
        ------
        ValueError
            What is wrong with the model, the common settings or those of a protocol.
        """
        load_model_config(self.study.model)
        for name, protocol in self.study.protocols.items():
            if protocol.model is not None:
                load_model_config(protocol.model)
            kind = self.study.kind(name)
            self._check_stage(f"protocols.{name}", kind, protocol.settings)
            if kind in PRETRAINED:
                self._check_stage(f"protocols.{name}.pretraining", "", protocol.pretraining_settings)

    def _check_stage(self, where: str, kind: str, settings: Mapping[str, Any]) -> None:
        """Load the settings of a stage, with the original files in place of what will be written."""
        names = self.names(kind)
        paths = {name: self.study.fidelities.get(name, self.study.fidelities[self.study.target]) for name in names}
        parts = tuple(Part(name, tuple(map(str, expand_files(paths[name].files)))) for name in names)
        stage = Stage(parts, self.study.steps, 1e-3, 0, equal_shares(names), settings)
        try:
            load_config(self.study.train, [*self._overrides(stage, "unnamed"), "data.sae=null"])
        except ValueError as error:
            raise ConfigError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error

    def names(self, kind: str) -> list[str]:
        """Fidelities in the training runs of a kind of protocol; "" stands for pretraining."""
        if kind == "":
            return self.study.others
        if kind == DELTA:
            return [DIFFERENCE]
        return [self.study.target] if kind in (TARGET_ONLY, FINE_TUNE) else list(self.study.fidelities)

    # ------------------------------------------------------------------------------------------------
    # commands
    # ------------------------------------------------------------------------------------------------

    def train(self, folder: str, stage: Stage) -> Command:
        """Train a model."""
        overrides = self._overrides(stage, f"{folder}/{RUN}")
        load = ("--load", f"{stage.load}/{RUN}/{MODEL}") if stage.load else ()
        model = self._relative(stage.model or self.study.model)
        arguments = ("--config", self.settings, "--model", model, *load, "--resume", "auto", "--processes", "1")
        files = [file for part in stage.parts for file in (*part.files, part.validation) if file]
        reads = [*(part.sae for part in stage.parts), *([stage.load] if stage.load else [])]
        return Command(
            folder,
            "aimnet2mult.train.cli",
            (*arguments, *overrides),
            f"{RUN}/{MODEL}",
            (self.settings, model, *files),
            tuple(reads),
            "device=",
        )

    def _overrides(self, stage: Stage, folder: str) -> list[str]:
        """Settings of a stage as arguments; an epoch lasts from one validation to the next."""
        every = self.study.validate_every
        accumulate = stage.settings.get("trainer.accumulate", self.accumulate)
        shared = len(stage.parts) > 1
        sampler = {
            "batches_per_epoch": every * accumulate,
            "sampling_strategy": "shares" if shared else "uniform",
            **({"shares": dict(stage.shares)} if shared else {}),
        }
        own_validation = any(part.validation for part in stage.parts)
        data: dict[str, Any] = {"val_fraction": 0 if own_validation else self.study.validation.others}
        if not own_validation:
            data["val_split_by"] = "composition"
        return [
            *(argument for part in stage.parts for argument in self._fidelity(part)),
            *(text(f"data.{key}", value) for key, value in data.items()),
            *(text(f"data.samplers.train.kwargs.{key}", value) for key, value in sampler.items()),
            text("trainer.epochs", stage.steps // every),
            text("optimizer.kwargs.lr", stage.rate),
            text("seed", stage.seed),
            text("checkpoint.dirname", folder),
            text("run_name", "run"),
            "checkpoint.keep_last=1",
            "checkpoint.kwargs.n_saved=1",
            "report=false",
            *(text(key, value) for key, value in stage.settings.items()),
        ]

    def _fidelity(self, part: Part) -> list[str]:
        """Arguments on the data of a fidelity."""
        about = self.study.fidelities.get(part.name)
        entries: dict[str, Any] = {"files": part.files[0] if len(part.files) == 1 else list(part.files)}
        if part.validation:
            entries["val_files"] = part.validation
        if part.sae:
            entries["sae"] = f"{part.sae}/{SAE_FILE}"
        if about is not None:
            entries |= {"level": about.level, "dispersion": about.dispersion}
            entries["subtract_dispersion"] = about.subtract_dispersion or None
        return [text(f"data.fidelities.{part.name}.{k}", value) for k, value in entries.items() if value is not None]

    def reference(
        self,
        folder: str,
        files: Sequence[str],
        terms: Sequence[str] = (),
        anchor: Sequence[str] = (),
        reads: Sequence[str] = (),
    ) -> Command:
        """Fit reference energies; ``anchor`` are the arguments that say to what they refer."""
        options = [f"--{term}-term" for term in terms]
        arguments = (*files, f"{folder}/{SAE_FILE}", *options, *anchor)
        return Command(folder, "aimnet2mult.train.calc_sae", arguments, SAE_FILE, tuple(files), tuple(reads))

    def errors(self, folder: str, models: Sequence[tuple[str, str]], files: Sequence[str]) -> Command:
        """Compare a sum of models, pairs of a fidelity and the folder of a run, with labels."""
        chosen = [word for name, run in models for word in ("--model", f"{name}={run}/{RUN}/{MODEL}")]
        data = [word for file in files for word in ("--data", file)]
        arguments = (*chosen, *data, "--output", f"{folder}/{ERRORS_FILE}")
        reads = tuple(run for _, run in models)
        return Command(folder, "aimnet2mult.study.errors", arguments, ERRORS_FILE, tuple(files), reads, "--device=")


def text(key: str, value: Any) -> str:
    """Return a setting as ``key=value`` for a command line, the value as YAML."""
    plain = (
        isinstance(value, str)
        and PLAIN_TEXT.fullmatch(value) is not None
        and OmegaConf.from_dotlist([f"key={value}"])["key"] == value
    )
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


def pretraining_key(study: StudyConfig, name: str) -> str:
    """Name of the pretraining of a protocol: the same for protocols whose pretraining is the same."""
    protocol = study.protocols[name]
    shares = pretraining_shares(study, name)
    model = "" if protocol.model is None else os.path.relpath(protocol.model, study.model.parent)
    settings = dict(protocol.pretraining_settings)
    content = [pretraining_steps(study, name), shares, settings, sorted(protocol.terms), model]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]
