"""The entry points: all of some datasets, a sample of one, validation data among training data."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from aimnet2mult.data.base import INPUT_KEYS, MoleculeSource
from aimnet2mult.data.checks.dataset import Examined, Part
from aimnet2mult.data.checks.fidelity import (
    FIDELITY_CHECKS,
    QUICK_CHECKS,
    STATE_KEYS,
    check_elements,
    check_outliers,
)
from aimnet2mult.data.checks.findings import SEVERITIES, Finding, Place, Report, Thresholds, unreadable
from aimnet2mult.data.checks.geometry import Fingerprints
from aimnet2mult.data.checks.overlap import Overlap
from aimnet2mult.data.checks.pairs import evenly
from aimnet2mult.data.checks.rows import Molecules, pieces, read_pieces
from aimnet2mult.data.checks.sample import SAMPLE_BLOCK, SAMPLE_MOLECULES
from aimnet2mult.data.sgdataset import DatasetError

logger = logging.getLogger(__name__)

QUIETLY = np.errstate(invalid="ignore", over="ignore")
"""Without warnings of numpy: NaN, infinities and numbers such as 1e36 are what is looked for."""

QUICK_PAIRS = 2000
"""Pairs of close geometries that are read when training starts."""

LEAKAGE_MOLECULES = 200_000
"""More molecules are not searched for validation geometries when training starts."""


def make_parts(
    sources: Mapping[str, MoleculeSource],
    validation: Mapping[str, MoleculeSource] | None,
    held_out: Mapping[str, np.ndarray] | None,
) -> list[Part]:
    """Datasets and what their molecules are used for; arguments as in `check`."""
    parts = []
    for name, source in sources.items():
        validates = np.zeros(len(source), bool)
        validates[(held_out or {}).get(name, [])] = True
        parts.append(Part(name, source, validates))
    parts += [Part(name, source, np.ones(len(source), bool)) for name, source in (validation or {}).items()]
    return parts


@QUIETLY
def check(
    sources: Mapping[str, MoleculeSource],
    validation: Mapping[str, MoleculeSource] | None = None,
    held_out: Mapping[str, np.ndarray] | None = None,
    sae: Mapping[str, Mapping[int, float]] | None = None,
    limits: Thresholds | None = None,
) -> Report:
    """Read datasets completely and report what is wrong with them.

    Memory is that of a piece of a few thousand molecules, and about 60 bytes for each molecule.

    Parameters
    ----------
    sources : mapping of str to MoleculeSource
        Fidelity -> its dataset.
    validation : mapping of str to MoleculeSource, optional
        Fidelity -> its separate validation data.
    held_out : mapping of str to numpy.ndarray, optional
        Fidelity -> indices of the molecules in ``sources`` that are split off for validation.
    sae : mapping of str to mapping of int to float, optional
        Fidelity -> self-atomic energies that training will subtract, eV. Default: fitted to a sample.
    limits : Thresholds, optional
        From where on something is reported.

    Returns
    -------
    Report
        A dataset that turns out unreadable becomes a finding, and the others are checked.
    """
    limits = limits or Thresholds()
    parts = make_parts(sources, validation, held_out)
    prints = _empty_prints(sum(len(part.source) for part in parts))
    examined: list[Examined] = []
    findings: list[Finding] = []
    first = 0
    with tqdm(total=len(prints.keys), unit="molecule", unit_scale=True, disable=None, leave=False) as progress:
        for part in parts:
            data = Examined(part, limits, (sae or {}).get(part.fidelity))
            own = Fingerprints(*(array[first : first + len(part.source)] for array in prints))
            progress.set_description(part.name)
            try:
                data.read(own, progress)
                findings += _findings(data, FIDELITY_CHECKS)
            except DatasetError as error:
                findings.append(unreadable(part.name, error))
                own.averages[:] = np.nan  # the next dataset takes the place
                continue
            first += len(part.source)
            examined.append(data)
    if examined:
        prints = Fingerprints(prints.keys[:first], prints.averages[:first])
        overlap = Overlap([data.part for data in examined], prints, limits)
        findings += [*check_elements(examined), *overlap.leaks(), *overlap.repeats(), *overlap.shared()]
    return Report({data.name: data.summary for data in examined}, _worst_first(findings))


@QUIETLY
def quick_checks(
    source: MoleculeSource,
    name: str,
    limit: int = SAMPLE_MOLECULES,
    sae: Mapping[int, float] | None = None,
    limits: Thresholds | None = None,
) -> list[Finding]:
    """Check a sample of a dataset: what is wrong with single molecules, units, forces, outliers of the energy.

    Parameters
    ----------
    source : MoleculeSource
        The dataset, with the labels as they are in the file.
    name : str
        Name of the fidelity, for the findings.
    limit : int
        Molecules to look at, in evenly spaced blocks.
    sae : mapping of int to float, optional
        Self-atomic energies that training will subtract, eV. Default: fitted to the sample.
    limits : Thresholds, optional
        From where on something is reported.

    Returns
    -------
    list of Finding
        Worst first. Counts are those of the sample.

    Raises
    ------
    DatasetError
        The file cannot be read.
    """
    data = Examined(Part(name, source, np.zeros(len(source), bool)), limits or Thresholds(), sae)
    kept, prints = [], list[Fingerprints]()
    for molecules in read_pieces(source, evenly(np.arange(len(source)), limit, SAMPLE_BLOCK)):
        sound = data.look_at(molecules)
        data.sample.add(sound)
        kept.append(Molecules(sound.indices, {key: sound[key] for key in STATE_KEYS if key in sound}))
        prints.append(sound.fingerprints)
    indices = np.concatenate([molecules.indices for molecules in kept])
    data.compare_forces(Fingerprints(*map(np.concatenate, zip(*prints, strict=True))), indices, QUICK_PAIRS)
    return _worst_first([*_findings(data, QUICK_CHECKS), *check_outliers(data, kept)])


@QUIETLY
def leakage(
    sources: Mapping[str, MoleculeSource],
    validation: Mapping[str, MoleculeSource] | None = None,
    held_out: Mapping[str, np.ndarray] | None = None,
    limits: Thresholds | None = None,
    max_molecules: int = LEAKAGE_MOLECULES,
) -> list[Finding]:
    """Look for validation molecules whose geometry is trained on, in the same fidelity or another one.

    Parameters
    ----------
    sources, validation, held_out, limits
        As in `check`.
    max_molecules : int
        Larger data are not searched, which the log says at debug level.

    Returns
    -------
    list of Finding
        Kinds ``leak`` and ``leak_across``.

    Raises
    ------
    DatasetError
        A file cannot be read.
    """
    parts = make_parts(sources, validation, held_out)
    total = sum(len(part.source) for part in parts)
    if total > max_molecules:
        logger.debug(f"{total} molecules are too many to look for validation geometries among the training data")
        return []
    if not any(part.validates.any() for part in parts):
        return []
    prints = _empty_prints(total)
    first = 0
    for part in parts:
        for molecules in pieces(part.source, [key for key in INPUT_KEYS if key in part.source.keys]):
            rows = first + molecules.indices
            prints.keys[rows], prints.averages[rows] = molecules.fingerprints
        first += len(part.source)
    return _worst_first(Overlap(parts, prints, limits or Thresholds()).leaks())


def _findings(data: Examined, checks: Iterable[Callable[[Examined], Iterable[Finding]]]) -> list[Finding]:
    """What some checks find; findings about the dataset as a whole have its files as their places."""
    files = tuple(Place(str(file)) for file in data.source.files)
    found = [finding for function in checks for finding in function(data)]
    return [finding if finding.places else replace(finding, places=files) for finding in found]


def _empty_prints(n: int) -> Fingerprints:
    return Fingerprints(np.zeros(n, np.uint64), np.full((n, 3), np.nan, np.float32))


def _worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
