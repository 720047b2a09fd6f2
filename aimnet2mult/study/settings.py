"""What a study of learning curves is told: its options, and what does not fit together."""

# ruff: noqa: RUF009 - `option` makes the field of a dataclass, as dataclasses.field does

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aimnet2mult.config.builder import ConfigError, nearest
from aimnet2mult.constants import FIDELITY_NAME
from aimnet2mult.data.sampler import SHARES_TOLERANCE
from aimnet2mult.data.sgdataset import expand_files
from aimnet2mult.train.configuration import read_settings, read_yaml
from aimnet2mult.train.schema import option

TARGET_ONLY, MIXED, FINE_TUNE, JOINT, DELTA = "target_only", "mixed", "fine_tune", "joint", "delta"
KINDS = (TARGET_ONLY, MIXED, FINE_TUNE, JOINT, DELTA)
"""Kinds of protocols."""

PRETRAINED = (FINE_TUNE, JOINT, DELTA)
"""Kinds that begin with a model of the other fidelities."""

OPTIONS_OF = {
    "shares": (MIXED, JOINT),
    "pretraining": PRETRAINED,
    "pretraining_shares": PRETRAINED,
    "pretraining_settings": PRETRAINED,
    "low": (DELTA,),
    "anchor": (MIXED, FINE_TUNE, JOINT),
}
"""Options that only some kinds of protocols have."""

PLAIN, ANCHORED = "plain", "anchored"
TERMS = ("charge", "spin")
"""Terms that reference energies can have beside those of the elements."""

SHARE_EXPONENT = 0.3
"""Where a protocol does not say, molecules are drawn in proportion to this power of the number of structures of a
fidelity, as languages are by Conneau et al. (2020), 10.18653/v1/2020.acl-main.747: scarce ones more often than they
occur, but not so often that they are learned by heart."""

PRETRAINING = 0.75
"""Share of the steps that pretraining takes where a protocol does not say."""

DIFFERENCE = "difference"
"""Fidelity of a model of the difference between two levels."""

DEFAULT = "default"
"""Key that stands for all other fractions."""


@dataclass
class StudyFidelityConfig:
    """A fidelity of a study."""

    files: list[Path] = option("HDF5 files that are one dataset; one name, a list, patterns such as part_*.h5")
    level: str | None = option("level of theory in words", None)
    dispersion: Any = option("what dispersion the labels contain, as in data.fidelities of a run", None)
    subtract_dispersion: bool = option("take that dispersion off energies and forces as they are read", False)


@dataclass
class ValidationConfig:
    """Molecules of the target on which checkpoints and learning rates are chosen."""

    fraction: float = option("about what share of the target's compositions validates, in (0, 1)", 0.15)
    seed: int = option("seed of the choice", 0)
    others: float = option("share of the compositions of the other fidelities on which pretraining validates", 0.05)


@dataclass
class ScoreConfig:
    """The validation score by which learning rates are chosen: a weighted sum of mean absolute errors."""

    energy: float = option("weight of the energy, per eV", 1.0)
    forces: float = option("weight of the forces, per eV/Å", 1.0)


@dataclass
class ProtocolConfig:
    """A way to train."""

    kind: str | None = option("target_only, mixed, fine_tune, joint or delta; null: the name of the protocol", None)
    model: Path | None = option("YAML file of its model; null: that of the study", None)
    fractions: list[float] = option("those of the study's fractions at which it is run; default: all", [])
    learning_rates: list[float] = option("learning rates to choose from after pretraining; default: the study's", [])
    shares: dict[str, float] = option(
        "fidelity -> share of the drawn molecules, sum 1; default: in proportion to (number of structures)^0.3", {}
    )
    pretraining: float | None = option("share of the steps that goes into pretraining, in (0, 1); null: 0.75", None)
    pretraining_shares: dict[str, float] = option("the same as shares, in pretraining; default: equal", {})
    low: str | None = option("fidelity that a delta protocol adds a difference to; null: the first one", None)
    reference: str = option(
        "energies that are subtracted from those of the target: plain, a fit to its subset; anchored, a fit of what "
        "differs from the pretrained model, or from another fidelity, see anchor",
        PLAIN,
    )
    anchor: str | None = option(
        "fidelity to which anchored reference energies refer; null: the first one beside the target", None
    )
    terms: list[str] = option("terms of the reference energies beside those of the elements: charge, spin", [])
    settings: dict[str, Any] = option("dotted key -> value, settings of the training runs of this protocol", {})
    pretraining_settings: dict[str, Any] = option("the same for pretraining", {})


@dataclass
class ReferenceLineConfig:
    """Errors to compare with, measured elsewhere."""

    energy_mae: float | None = option("eV", None)
    forces_mae: float | None = option("eV/Å", None)


@dataclass
class StudyConfig:
    """A study."""

    target: str = option("the fidelity whose error is studied")
    model: Path = option("YAML file of the model")
    train: Path = option("YAML file of settings that all training runs share, without those of the data files")
    fidelities: dict[str, StudyFidelityConfig] = option("name -> fidelity; files of the target: pool and validation")
    test: list[Path] = option("HDF5 files of the target on which final models are tested, for the report only")
    protocols: dict[str, ProtocolConfig] = option("name -> protocol")
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    unseen: bool = option(
        "leave the compositions of the test and validation molecules out of the other fidelities, too", False
    )
    fractions: list[float] = option(
        "shares of the molecules of the pool, ascending, each in (0, 1]", [0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.8, 1.0]
    )
    subsets: Any = option("number of orders of the molecules, or {default: number, fraction: number}", 1)
    seeds: Any = option("number of seeds, or {default: number, fraction: number}", 3)
    steps: int = option("optimiser steps of each point in all, pretraining included", 4000)
    validate_every: int = option("steps between validations; divides steps", 200)
    learning_rates: list[float] = option("learning rates to choose from, in pretraining too", [1.0e-3, 2.0e-3, 4.0e-3])
    tune_fractions: list[float] = option(
        "fractions at which learning rates are tried; others take the nearest", [0.1, 1.0]
    )
    score: ScoreConfig = field(default_factory=ScoreConfig)
    reference_lines: dict[str, ReferenceLineConfig] = option("name -> errors shown as horizontal lines", {})

    @property
    def others(self) -> list[str]:
        """Names of the fidelities beside the target."""
        return [name for name in self.fidelities if name != self.target]

    def kind(self, protocol: str) -> str:
        """Kind of a protocol."""
        return self.protocols[protocol].kind or protocol

    def low(self, protocol: str) -> str:
        """Fidelity that a protocol adds a difference to."""
        return self.protocols[protocol].low or self.others[0]

    def fractions_of(self, protocol: str) -> list[float]:
        """Fractions at which a protocol is run."""
        return self.protocols[protocol].fractions or self.fractions

    def rates_of(self, protocol: str) -> list[float]:
        """Learning rates to choose from for a protocol after pretraining."""
        return self.protocols[protocol].learning_rates or self.learning_rates

    def replicates(self, fraction: float) -> list[tuple[int, int]]:
        """Order of the molecules and seed of each replicate.

        Replicate k has the k-th order and seed k; where there are fewer orders or seeds, they begin again.
        """
        subsets = 1 if fraction == 1.0 else count_at(self.subsets, fraction)
        seeds = count_at(self.seeds, fraction)
        return [(k % subsets, k % seeds) for k in range(max(subsets, seeds))]

    def all_fractions(self) -> list[float]:
        """Fractions of points and of trials, ascending."""
        return sorted({*self.fractions, *self.tune_fractions})


def count_at(counts: int | Mapping[Any, int], fraction: float) -> int:
    """Return how many there are at a fraction: a number, or ``{default: number, fraction: number}``."""
    if isinstance(counts, int):
        return counts
    exact = {float(key): count for key, count in counts.items() if key != DEFAULT}
    return exact.get(fraction, counts.get(DEFAULT, 1))


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read and check the settings of a study.

    Parameters
    ----------
    path : str or Path
        YAML file, paths in it relative to its folder.
    overrides : sequence of str
        ``dotted.key=value``, the value as in YAML.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Everything that is wrong, one problem a line.
    """
    study = read_settings(StudyConfig, path, overrides)
    problems = list(_problems(study))
    if problems:
        raise ConfigError("\n".join(problems))
    return study


def _problems(study: StudyConfig) -> Iterator[str]:
    yield from _fidelity_problems(study)
    yield from _file_problems(study)
    yield from _number_problems(study)
    for key in ("subsets", "seeds"):
        yield from _count_problems(key, getattr(study, key), study.all_fractions())
    if not study.protocols:
        yield f"protocols: none given; name some of {', '.join(KINDS)}, such as protocols: {{target_only: {{}}}}"
    for name in study.protocols:
        yield from _protocol_problems(study, name)


def _fidelity_problems(study: StudyConfig) -> Iterator[str]:
    names = list(study.fidelities)
    if study.target not in names or len(names) == 1:
        yield f"target: there is no fidelity {study.target!r}; {nearest(study.target, names)}"
    for name in names:
        if not FIDELITY_NAME.fullmatch(name) or name in (DIFFERENCE, "all"):
            yield f"fidelities.{name}: not a name for a fidelity; use letters, digits, _, + and -, and another word"


def _file_problems(study: StudyConfig) -> Iterator[str]:
    models = {f"protocols.{name}.model": protocol.model for name, protocol in study.protocols.items()}
    for key, path in {"model": study.model, "train": study.train, **models}.items():
        if path is not None and not path.is_file():
            yield f"{key}: {path}: no such file"
    lists = {f"fidelities.{name}.files": fidelity.files for name, fidelity in study.fidelities.items()}
    for key, files in {**lists, "test": study.test}.items():
        if not files:
            yield f"{key}: no file given"
        try:
            expand_files(files)
        except (OSError, ValueError) as error:
            yield f"{key}: {error}"
    if study.train.is_file():
        given = read_yaml(study.train).get("data") or {}
        for key in ("fidelities", "fidelity_datasets", "val_fidelity_datasets", "fidelity_weights", "sae"):
            if isinstance(given, Mapping) and key in given:
                yield f"train: {study.train} sets data.{key}, which the study does; remove it there"


def _number_problems(study: StudyConfig) -> Iterator[str]:
    for key, values in (("fractions", study.fractions), ("tune_fractions", study.tune_fractions)):
        if not values or any(not 0 < value <= 1 for value in values) or sorted(set(values)) != list(values):
            yield f"{key}: expected ascending shares in (0, 1], found {list(values)}"
    yield from _rate_problems("learning_rates", study.learning_rates)
    if not 0 < study.validation.fraction < 1:
        yield f"validation.fraction: expected a share in (0, 1), found {study.validation.fraction}"
    if not 0 < study.validation.others < 1:
        yield f"validation.others: expected a share in (0, 1), found {study.validation.others}"
    if study.validation.seed < 0:
        yield f"validation.seed: expected 0 or more, found {study.validation.seed}"
    if study.validate_every < 1 or study.steps < 1 or study.steps % study.validate_every:
        yield f"steps: {study.steps} is not a multiple of validate_every ({study.validate_every})"
    weights = (study.score.energy, study.score.forces)
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        yield f"score: expected weights of 0 or more, at least one above, found {weights[0]} and {weights[1]}"


def _rate_problems(key: str, rates: Sequence[float]) -> Iterator[str]:
    if not rates or any(not (math.isfinite(rate) and rate > 0) for rate in rates) or len(set(rates)) < len(rates):
        yield f"{key}: expected different positive numbers, found {list(rates)}"


def _count_problems(key: str, counts: Any, fractions: Sequence[float]) -> Iterator[str]:
    """Check a number, or a number for each fraction."""
    entries = counts.items() if isinstance(counts, Mapping) else [(DEFAULT, counts)]
    for name, count in entries:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            yield f"{key}: expected 1 or more, or {{default: number, fraction: number}}, found {count!r}"
        if name != DEFAULT and _as_float(name) not in fractions:
            yield f"{key}.{name}: is not among the fractions; {nearest(str(name), [DEFAULT, *map(str, fractions)])}"


def _as_float(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _protocol_problems(study: StudyConfig, name: str) -> Iterator[str]:
    key, protocol, kind = f"protocols.{name}", study.protocols[name], study.kind(name)
    if not FIDELITY_NAME.fullmatch(name):
        yield f"{key}: a name consists of letters, digits, _, + and -, and does not begin with a digit"
    if kind not in KINDS:
        yield f"{key}.kind: {kind!r} is not known; {nearest(kind, KINDS)}"
        return
    for option_name, kinds in OPTIONS_OF.items():
        if getattr(protocol, option_name) not in (None, {}) and kind not in kinds:
            yield f"{key}.{option_name}: a protocol of the kind {kind} has no such option ({', '.join(kinds)} have)"
    if protocol.learning_rates:
        yield from _rate_problems(f"{key}.learning_rates", protocol.learning_rates)
    if any(fraction not in study.fractions for fraction in protocol.fractions):
        yield f"{key}.fractions: expected some of the study's {study.fractions}, found {protocol.fractions}"
    if kind != TARGET_ONLY and not study.others:
        yield f"{key}: needs a fidelity beside {study.target}; add one under fidelities"
        return
    yield from _shares_problems(f"{key}.shares", protocol.shares, list(study.fidelities))
    yield from _shares_problems(f"{key}.pretraining_shares", protocol.pretraining_shares, study.others)
    if protocol.pretraining is not None and not 0 < protocol.pretraining < 1:
        yield f"{key}.pretraining: expected a share in (0, 1), found {protocol.pretraining}"
    elif kind in PRETRAINED and not 0 < pretraining_steps(study, name) < study.steps:
        yield f"{key}.pretraining: leaves no steps before or after pretraining; lower validate_every"
    for option_name in ("low", "anchor"):
        value = getattr(protocol, option_name)
        if value is not None and value not in study.others:
            yield f"{key}.{option_name}: {value!r} is not a fidelity beside the target; {nearest(value, study.others)}"
    if protocol.reference not in (PLAIN, ANCHORED):
        yield f"{key}.reference: {protocol.reference!r} is not known; {nearest(protocol.reference, (PLAIN, ANCHORED))}"
    elif protocol.reference == ANCHORED and kind in (TARGET_ONLY, DELTA):
        yield f"{key}.reference: a protocol of the kind {kind} has nothing to anchor on; use {PLAIN}"
    for term in protocol.terms:
        if term not in TERMS:
            yield f"{key}.terms: {term!r} is not known; {nearest(term, TERMS)}"


def _shares_problems(key: str, shares: Mapping[str, float], names: Sequence[str]) -> Iterator[str]:
    if not shares:
        return
    if sorted(shares) != sorted(names):
        yield f"{key}: expected a share for each of {', '.join(names)}, found {', '.join(shares)}"
    elif min(shares.values()) <= 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=SHARES_TOLERANCE):
        yield f"{key}: expected positive shares of sum 1, found {dict(shares)}"


def pretraining_steps(study: StudyConfig, protocol: str) -> int:
    """Return the steps that pretraining takes, a multiple of ``validate_every``."""
    share = study.protocols[protocol].pretraining or PRETRAINING
    return round(share * study.steps / study.validate_every) * study.validate_every


def pretraining_shares(study: StudyConfig, protocol: str) -> dict[str, float]:
    """Return the shares in which pretraining draws the fidelities beside the target."""
    return dict(study.protocols[protocol].pretraining_shares) or equal_shares(study.others)


def equal_shares(names: Sequence[str]) -> dict[str, float]:
    """Return equal shares of fidelities in the drawn molecules."""
    return dict.fromkeys(names, 1.0 / len(names))


def shares_by_size(structures: Mapping[str, int]) -> dict[str, float]:
    """Return the shares in which fidelities are drawn, from their numbers of structures; with three decimals."""
    weights = {name: count**SHARE_EXPONENT for name, count in structures.items()}
    shares = {name: round(weight / sum(weights.values()), 3) for name, weight in weights.items()}
    largest = max(shares, key=shares.__getitem__)
    return {**shares, largest: round(shares[largest] + 1.0 - sum(shares.values()), 3)}
