"""The entry points: all of some datasets, a sample of one, validation data among training data."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from aimnet2mult.constants import element_names
from aimnet2mult.data.base import INPUT_KEYS, MoleculeSource
from aimnet2mult.data.checks.dataset import (
    FIDELITY_CHECKS,
    STATE_KEYS,
    Examined,
    check_forces,
    check_outliers,
    check_rare_elements,
    check_rows,
    check_sample,
)
from aimnet2mult.data.checks.findings import SEVERITIES, Finding, Place, Report, Summary, Thresholds, locate
from aimnet2mult.data.checks.geometry import Fingerprints
from aimnet2mult.data.checks.overlap import Overlap, Part
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


def check_elements(parts: Sequence[Part], examined: Sequence[Examined]) -> Iterator[Finding]:
    """Elements that are rare in training, that a fidelity lacks, or that only the validation data hold."""
    both = list(zip(parts, examined, strict=True))
    trained = [(part, data) for part, data in both if not part.validates.all()]
    everywhere = set().union(*(data.elements for _, data in trained))
    for part, data in trained:
        absent = sorted(everywhere - data.elements)
        if absent:
            yield Finding(
                "element_of_others",
                "note",
                part.name,
                f"has no {element_names(absent)}, which other fidelities have; its compiled model will refuse them.",
            )
        yield from check_rare_elements(data)
    for part, data in both:
        unknown = sorted(data.elements - everywhere)
        if part.validates.all() and unknown and trained:
            yield Finding(
                "element_only_in_validation",
                "warning",
                part.name,
                f"{element_names(unknown)} only in the validation data, so that nothing can be learnt about it.",
                sum(int(data.molecules[z]) for z in unknown),
                tuple(locate(part.source, index) for z in unknown for index in data.examples[z][:1]),
            )


JOINT_CHECKS: tuple[Callable[[Sequence[Part], Sequence[Examined], Overlap], Iterator[Finding]], ...] = (
    lambda parts, examined, _: check_elements(parts, examined),
    lambda _parts, _examined, overlap: overlap.leaks(),
    lambda _parts, _examined, overlap: overlap.repeats(),
    lambda _parts, _examined, overlap: overlap.shared(),
)
"""Functions of all datasets that give findings."""


def make_parts(
    sources: Mapping[str, MoleculeSource],
    validation: Mapping[str, MoleculeSource] | None,
    held_out: Mapping[str, np.ndarray] | None,
) -> list[Part]:
    """Datasets and what their molecules are used for; arguments as in `check`."""
    parts = []
    for name, source in sources.items():
        validates = np.zeros(len(source), bool)
        validates[(held_out or {}).get(name, np.zeros(0, np.int64))] = True
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
    parts, read, examined = make_parts(sources, validation, held_out), list[Part](), list[Examined]()
    prints = _empty_prints(sum(len(part.source) for part in parts))
    findings: list[Finding] = []
    first = 0
    with tqdm(total=len(prints.keys), unit="molecule", unit_scale=True, disable=None, leave=False) as progress:
        for part in parts:
            data = Examined(part.name, part.source, limits, (sae or {}).get(part.fidelity))
            own = Fingerprints(*(array[first : first + len(part.source)] for array in prints))
            progress.set_description(part.name)
            try:
                data.read(own, progress)
                findings += _with_files(part.source, (f for function in FIDELITY_CHECKS for f in function(data)))
            except DatasetError as error:
                findings.append(unreadable(part.name, error))
                own.averages[:] = np.nan  # the next dataset takes the place
                continue
            first += len(part.source)
            read.append(part)
            examined.append(data)
    if read:
        overlap = Overlap(read, Fingerprints(prints.keys[:first], prints.averages[:first]), limits)
        findings += [finding for function in JOINT_CHECKS for finding in function(read, examined, overlap)]
    summaries: dict[str, Summary] = {data.name: data.summary for data in examined}
    return Report(summaries, _worst_first(findings))


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
    data = Examined(name, source, limits or Thresholds(), sae)
    kept, prints = [], list[Fingerprints]()
    for molecules in read_pieces(source, evenly(np.arange(len(source)), limit, SAMPLE_BLOCK)):
        sound = data.look_at(molecules)
        data.sample.add(sound)
        kept.append(Molecules(sound.indices, {key: sound[key] for key in STATE_KEYS if key in sound}))
        prints.append(sound.fingerprints)
    indices = np.concatenate([molecules.indices for molecules in kept])
    data.compare_forces(Fingerprints(*map(np.concatenate, zip(*prints, strict=True))), indices, QUICK_PAIRS)
    findings = [*check_rows(data), *check_sample(data), *check_forces(data)]
    if data.residuals is not None:
        findings += check_outliers(data, iter(kept))
    return _worst_first(_with_files(source, findings))


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


def unreadable(name: str, error: DatasetError) -> Finding:
    """Finding for a dataset that cannot be opened or read."""
    pattern = r"(?P<file>.+?)(: group (?P<group>[^\s:]+))?(: row (?P<row>\d+))?: (?P<rest>.*)"
    match = re.fullmatch(pattern, str(error), re.DOTALL)
    if match is None:
        return Finding("unreadable", "error", name, str(error))
    place = Place(match["file"], match["group"], None if match["row"] is None else int(match["row"]))
    return Finding("unreadable", "error", name, match["rest"], None, (place,))


def _with_files(source: MoleculeSource, findings: Iterable[Finding]) -> list[Finding]:
    """Findings about a dataset as a whole with its files as their places."""
    files = tuple(Place(str(file)) for file in source.files)
    return [finding if finding.places else replace(finding, places=files) for finding in findings]


def _empty_prints(n: int) -> Fingerprints:
    return Fingerprints(np.zeros(n, np.uint64), np.full((n, 3), np.nan, np.float32))


def _worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
