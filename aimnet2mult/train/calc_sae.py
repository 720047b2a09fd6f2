"""Fit the self-atomic energies of a dataset: ``python -m aimnet2mult.train.calc_sae dataset.h5 sae.yaml``."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np
from tqdm import tqdm

from aimnet2mult.constants import element_names
from aimnet2mult.data.sae import composition, fit_sae, load_sae, save_sae
from aimnet2mult.reference_energies import TERMS
from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from aimnet2mult.data.base import MoleculeSource
    from aimnet2mult.data.sae import SAEFit
    from aimnet2mult.train.sae_anchors import Anchor

logger = logging.getLogger(__name__)

MIN_MOLECULES = 50
"""Molecules with each element that a sample holds at least, if the file has as many."""


def calc_sae(
    dataset_path: str | Path | Sequence[str | Path],
    output: str | Path,
    samples: int | None = None,
    seed: int = 0,
    *,
    terms: Collection[str] = (),
    anchor: str | Path | Sequence[str | Path] | None = None,
    anchor_sae: str | Path | None = None,
    anchor_model: str | Path | None = None,
    anchor_fidelity: int | str | None = None,
) -> SAEFit:
    """Fit self-atomic energies to a dataset and write them to a YAML file.

    Parameters
    ----------
    dataset_path : str, Path or sequence of them
        Size-grouped HDF5 file with total energies, or several files and patterns (`open_dataset`).
    output : str or Path
        YAML file to write.
    samples : int, optional
        Fit to so many molecules drawn at random, and to a few more where an element would be missing or rare
        (`draw_sample`). Default: all. The elements are those of the whole dataset in any case.
    seed : int
        Seed of the draw.
    terms : collection of str
        Terms to fit beside the elements, of `aimnet2mult.reference_energies.TERMS`.
    anchor : str, Path or sequence of them, optional
        Data of another level of theory: what is fitted are the energies minus the residual energies of the same
        molecules there (`aimnet2mult.train.sae_anchors.anchor_on_dataset`).
    anchor_sae : str or Path, optional
        YAML file with the reference energies of that level; goes with ``anchor``.
    anchor_model : str or Path, optional
        Checkpoint of a trained model: what is fitted are the energies minus the residual energies that it predicts
        (`aimnet2mult.train.sae_anchors.anchor_on_model`).
    anchor_fidelity : int or str, optional
        Number or name of its fidelity; may be left out if it has one.

    Returns
    -------
    SAEFit
        Energies and report.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        The dataset or the anchor is missing or unusable, options that do not go together, an energy is infinite, no
        molecule (with some element) has an energy, or the output cannot be written.
    """
    # h5py and torch take seconds to import; --help does not wait for them.
    import h5py

    from aimnet2mult.data.sgdataset import DatasetError, open_dataset

    _check_options(terms, anchor, anchor_sae, anchor_model, anchor_fidelity)
    check_writable(output)
    if Path(output).is_file() and h5py.is_hdf5(output):
        raise DatasetError(f"{output}: is a dataset; the last name is that of the YAML file to write, such as sae.yaml")
    dataset = open_dataset(dataset_path)
    elements = dataset.elements
    sample = draw_sample(dataset, elements, samples, np.random.default_rng(seed), terms)
    absent = [z for z, atoms in zip(elements, sample.counts.sum(axis=0), strict=True) if atoms == 0]
    if absent:
        raise DatasetError(
            f"{dataset.name}: the energies of all molecules with {element_names(absent)} are NaN. "
            "Give some of them an energy, or remove them."
        )
    fitted = {name: values for name, values in sample.terms.items() if name in terms}
    anchored = _anchored(dataset, sample.indices, anchor, anchor_sae, anchor_model, anchor_fidelity)
    if anchored is None:
        fit = fit_sae(sample.counts, sample.energies, elements, fitted)
    else:
        energies = sample.energies - anchored.energies
        fit = fit_sae(sample.counts, energies, elements, fitted, anchored.weights, anchored.text)
    left_out = {name: int((np.abs(sample.terms[name]) > 0.0).sum()) for name in TERMS if name not in terms}
    fit = replace(fit, left_out=left_out)
    sampled = f" of {len(dataset)}" if len(sample.energies) < len(dataset) else ""
    more = f" and {len(dataset.files) - 1} more" if len(dataset.files) > 1 else ""
    comment = (
        f"Fitted to {fit.n_molecules}{sampled} molecules of {dataset.files[0].name}{more}, "
        f"standard deviation of the residuals {fit.residual_std:.4f} eV"
    )
    save_sae(output, fit.sae, "\n".join([comment, *([fit.anchor] if fit.anchor else [])]))
    return fit


def _check_options(
    terms: Collection[str],
    anchor: str | Path | Sequence[str | Path] | None,
    anchor_sae: str | Path | None,
    anchor_model: str | Path | None,
    anchor_fidelity: int | str | None,
) -> None:
    unknown = sorted(set(terms) - set(TERMS))
    if unknown:
        raise ValueError(f"terms: {', '.join(unknown)} unknown; there are {', '.join(TERMS)}")
    if anchor and anchor_model:
        raise ValueError("--anchor and --anchor-model: energies are anchored on one of them; leave the other out")
    if anchor and not anchor_sae:
        raise ValueError("--anchor-sae: is missing; give the SAE file of the data of --anchor")
    if anchor_sae and not anchor:
        raise ValueError("--anchor-sae: goes with --anchor, the data that it belongs to")
    if anchor_fidelity is not None and not anchor_model:
        raise ValueError("--anchor-fidelity: goes with --anchor-model, the checkpoint whose fidelity it names")


def _anchored(
    dataset: MoleculeSource,
    indices: np.ndarray,
    anchor: str | Path | Sequence[str | Path] | None,
    anchor_sae: str | Path | None,
    anchor_model: str | Path | None,
    anchor_fidelity: int | str | None,
) -> Anchor | None:
    """What the anchor, if there is one, says of some molecules."""
    if not anchor and not anchor_model:
        return None
    from aimnet2mult.data.sgdataset import open_dataset
    from aimnet2mult.train.sae_anchors import anchor_on_dataset, anchor_on_model

    if anchor and anchor_sae:
        return anchor_on_dataset(dataset, indices, open_dataset(anchor), load_sae(anchor_sae))
    assert anchor_model is not None
    return anchor_on_model(dataset, indices, anchor_model, anchor_fidelity)


class Molecules(NamedTuple):
    """Molecules drawn for a fit.

    Attributes
    ----------
    indices : numpy.ndarray
        (m,) int64, where they stand in the dataset.
    counts : numpy.ndarray
        (m, n_elements) int32, atoms of each element.
    energies : numpy.ndarray
        (m,) float64, eV.
    terms : dict of str to numpy.ndarray
        What each term multiplies, (m,) float64: total charge, e; number of unpaired electrons.
    """

    indices: np.ndarray
    counts: np.ndarray
    energies: np.ndarray
    terms: dict[str, np.ndarray]


def draw_sample(
    dataset: MoleculeSource,
    elements: list[int],
    samples: int | None,
    rng: np.random.Generator,
    terms: Collection[str] = (),
) -> Molecules:
    """Read compositions and energies of molecules drawn at random among those that have an energy.

    Each molecule gets a random key. The sample is the molecules with the smallest keys, and for each element the
    `MIN_MOLECULES` smallest among the molecules that hold it, so that rare elements are represented; with terms, ions
    and open shells likewise.

    Parameters
    ----------
    dataset : MoleculeSource
        The dataset.
    elements : list of int
        Atomic numbers to count.
    samples : int or None
        Molecules to draw; None or more than there are takes all.
    rng : numpy.random.Generator
        Source of the keys.
    terms : collection of str
        Terms that are to be fitted.

    Returns
    -------
    Molecules
        In the order of the dataset.

    Raises
    ------
    DatasetError
        No molecule has an energy.
    """
    from aimnet2mult.data.sgdataset import DatasetError

    n = len(dataset)
    known = np.concatenate([~np.isnan(arrays["energy"]) for _, arrays in dataset.chunks(("energy",))])
    n_known = int(np.count_nonzero(known))
    if n_known == 0:
        raise DatasetError(f"{dataset.name}: the energies of all {n} molecules are NaN. Give data with energies.")
    samples = n_known if samples is None else min(samples, n_known)
    keys = np.where(known, rng.random(n), np.inf)
    threshold = np.partition(keys, samples - 1)[samples - 1]

    asked = [column for column, name in enumerate(TERMS) if name in terms]
    parts: list[tuple[np.ndarray, ...]] = []
    first = 0
    with tqdm(total=n, unit="molecule", unit_scale=True, desc="reading", disable=None, leave=False) as progress:
        for _, arrays in dataset.chunks(("numbers", "energy", "charge", "mult")):
            rows = np.flatnonzero(known[first : first + len(arrays["energy"])])
            counts = composition(arrays["numbers"][rows], elements)
            factors = np.column_stack([_factor(arrays, name)[rows] for name in TERMS])
            key = keys[first + rows]
            drawn = (key <= threshold) | _smallest_of_each(np.hstack([counts, factors[:, asked] != 0.0]), key)
            energies = arrays["energy"][rows].astype(np.float64)
            parts.append(tuple(values[drawn] for values in (first + rows, counts, energies, factors, key)))
            first += len(arrays["energy"])
            progress.update(len(arrays["energy"]))
    indices, counts, energies, factors, key = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    drawn = (key <= threshold) | _smallest_of_each(np.hstack([counts, factors[:, asked] != 0.0]), key)
    columns = dict(zip(TERMS, factors[drawn].T, strict=True))
    return Molecules(indices[drawn], counts[drawn], energies[drawn], columns)


def _factor(arrays: Mapping[str, np.ndarray], term: str) -> np.ndarray:
    """What a term multiplies, (k,) float64; a molecule without multiplicity has no unpaired electrons."""
    if term == "charge":
        return arrays["charge"].astype(np.float64)
    return arrays["mult"].astype(np.float64) - 1.0 if "mult" in arrays else np.zeros(len(arrays["numbers"]))


def _smallest_of_each(columns: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Mask of the `MIN_MOLECULES` molecules with the smallest keys among those not zero in each column, (n,) bool."""
    chosen = np.zeros(len(columns), bool)
    for column in columns.T:
        rows = np.flatnonzero(column)
        if len(rows) > MIN_MOLECULES:
            rows = rows[np.argpartition(keys[rows], MIN_MOLECULES - 1)[:MIN_MOLECULES]]
        chosen[rows] = True
    return chosen


@click.command()
@click.argument("datasets", metavar="DATASET...", nargs=-1, required=True)
@click.argument("output", metavar="SAE_YAML", type=click.Path(path_type=Path))
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Fit to about this many molecules, drawn at random so that every element is represented [default: all].",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draw.")
@click.option(
    "--charge-term/--no-charge-term",
    default=False,
    show_default=True,
    help="Fit a term linear in the total charge, too (eV per elementary charge).",
)
@click.option(
    "--spin-term/--no-spin-term",
    default=False,
    show_default=True,
    help="Fit a term linear in the number of unpaired electrons, too (eV per electron).",
)
@click.option(
    "--anchor",
    multiple=True,
    metavar="DATASET",
    help="Data of another level of theory; fit the energies minus the residual energies of the same molecules there.",
)
@click.option("--anchor-sae", metavar="FILE", type=click.Path(path_type=Path), help="SAE file of the data of --anchor.")
@click.option(
    "--anchor-model",
    metavar="CHECKPOINT",
    type=click.Path(path_type=Path),
    help="Trained model (.pt); fit the energies minus the residual energies that it predicts.",
)
@click.option("--anchor-fidelity", metavar="NAME", help="Name or number of the fidelity of --anchor-model.")
@user_errors
def main(
    datasets: tuple[str, ...],
    output: Path,
    samples: int | None,
    seed: int,
    charge_term: bool,
    spin_term: bool,
    anchor: tuple[str, ...],
    anchor_sae: Path | None,
    anchor_model: Path | None,
    anchor_fidelity: str | None,
) -> None:
    """Fit the self-atomic energies (eV) of the molecules in DATASET... (HDF5) and write them to SAE_YAML.

    Several files, or patterns in quotes, count as one dataset. Molecules whose energy is NaN are left out. The fit is
    by least squares on the total energies, repeated without the 2 % of molecules with the lowest and the 2 % with the
    highest residuals.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    fit = calc_sae(
        datasets,
        output,
        samples,
        seed,
        terms=[name for name, wanted in (("charge", charge_term), ("spin", spin_term)) if wanted],
        anchor=anchor or None,
        anchor_sae=anchor_sae,
        anchor_model=anchor_model,
        anchor_fidelity=int(anchor_fidelity) if anchor_fidelity and anchor_fidelity.isdecimal() else anchor_fidelity,
    )
    print(f"Self-atomic energies of {', '.join(datasets)}\n")
    print(fit.report())
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    main()
