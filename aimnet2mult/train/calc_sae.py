"""Fit the self-atomic energies of a dataset: ``python -m aimnet2mult.train.calc_sae dataset.h5 sae.yaml``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from tqdm import tqdm

from aimnet2mult.constants import element_names
from aimnet2mult.data.sae import composition, fit_sae, save_sae
from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aimnet2mult.data.base import MoleculeSource
    from aimnet2mult.data.sae import SAEFit

logger = logging.getLogger(__name__)

MIN_MOLECULES = 50
"""Molecules with each element that a sample holds at least, if the file has as many."""


def calc_sae(
    dataset_path: str | Path | Sequence[str | Path], output: str | Path, samples: int | None = None, seed: int = 0
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

    Returns
    -------
    SAEFit
        Energies and report.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        The dataset is missing or unusable, an energy is infinite, no molecule (with some element) has an energy, or
        the output cannot be written.
    """
    # h5py and torch take seconds to import; --help does not wait for them.
    import h5py

    from aimnet2mult.data.sgdataset import DatasetError, open_dataset

    check_writable(output)
    if Path(output).is_file() and h5py.is_hdf5(output):
        raise DatasetError(f"{output}: is a dataset; the last name is that of the YAML file to write, such as sae.yaml")
    dataset = open_dataset(dataset_path)
    elements = dataset.elements
    counts, energies = draw_sample(dataset, elements, samples, np.random.default_rng(seed))
    absent = [z for z, atoms in zip(elements, counts.sum(axis=0), strict=True) if atoms == 0]
    if absent:
        raise DatasetError(
            f"{dataset.name}: the energies of all molecules with {element_names(absent)} are NaN. "
            "Give some of them an energy, or remove them."
        )
    fit = fit_sae(counts, energies, elements)
    sampled = f" of {len(dataset)}" if len(energies) < len(dataset) else ""
    more = f" and {len(dataset.files) - 1} more" if len(dataset.files) > 1 else ""
    save_sae(
        output,
        fit.sae,
        comment=f"Fitted to {fit.n_molecules}{sampled} molecules of {dataset.files[0].name}{more}, "
        f"standard deviation of the residuals {fit.residual_std:.4f} eV",
    )
    return fit


def draw_sample(
    dataset: MoleculeSource, elements: list[int], samples: int | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Read compositions and energies of molecules drawn at random among those that have an energy.

    Each molecule gets a random key. The sample is the molecules with the smallest keys, and for each element the
    `MIN_MOLECULES` smallest among the molecules that hold it, so that rare elements are represented.

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

    Returns
    -------
    counts : numpy.ndarray
        (m, n_elements) int32, atoms of each element.
    energies : numpy.ndarray
        (m,) float64, eV.

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

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    first = 0
    with tqdm(total=n, unit="molecule", unit_scale=True, desc="reading", disable=None, leave=False) as progress:
        for _, arrays in dataset.chunks(("numbers", "energy")):
            rows = len(arrays["energy"])
            has_energy = known[first : first + rows]
            counts = composition(arrays["numbers"][has_energy], elements)
            key = keys[first : first + rows][has_energy]
            drawn = (key <= threshold) | _smallest_of_each_element(counts, key)
            parts.append((counts[drawn], arrays["energy"][has_energy][drawn].astype(np.float64), key[drawn]))
            first += rows
            progress.update(rows)
    counts, energies, key = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    drawn = (key <= threshold) | _smallest_of_each_element(counts, key)
    return counts[drawn], energies[drawn]


def _smallest_of_each_element(counts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Mask of the `MIN_MOLECULES` molecules with the smallest keys for each column of ``counts``, (n,) bool."""
    chosen = np.zeros(len(counts), bool)
    for column in range(counts.shape[1]):
        rows = np.flatnonzero(counts[:, column])
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
@user_errors
def main(datasets: tuple[str, ...], output: Path, samples: int | None, seed: int) -> None:
    """Fit the self-atomic energies (eV) of the molecules in DATASET... (HDF5) and write them to SAE_YAML.

    Several files, or patterns in quotes, count as one dataset. Molecules whose energy is NaN are left out. The fit is
    by least squares on the total energies, repeated without the 2 % of molecules with the lowest and the 2 % with the
    highest residuals.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    fit = calc_sae(datasets, output, samples, seed)
    print(f"Self-atomic energies of {', '.join(datasets)}\n")
    print(fit.report())
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    main()
