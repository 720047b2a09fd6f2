"""Make ``examples/data`` from the full reference datasets: two complete files, and seeded subsets of the other two.

The subsets are split into training and test files by molecular formula, as the complete files are.

    python scripts/make_example_data.py FOLDER [--output examples/data]

FOLDER holds fid0_dft_train.h5, fid0_dft_test.h5, fid1_gfn2.h5 and fid2_gfn1.h5.
"""

from pathlib import Path

import click
import h5py
import numpy as np

from aimnet2mult.data.sgdataset import SizeGroupedDataset, write_dataset

SEED = 20240501
COMPLETE = ("fid0_dft_train.h5", "fid0_dft_test.h5")
SUBSETS = ("fid1_gfn2", "fid2_gfn1")
N_TRAIN, N_TEST = 4000, 300
TEST_FORMULAS = 0.1
MAX_ATOMS = 16


def formulas(dataset: SizeGroupedDataset) -> np.ndarray:
    """Composition of every molecule as one word, (n,) of bytes."""
    words = np.empty(len(dataset), dtype="S64")
    for positions, arrays in dataset.read(np.arange(len(dataset)), ["numbers"]):
        words[positions] = [bytes(row.astype(np.uint8)) for row in np.sort(arrays["numbers"], axis=1)]
    return words


def split_by_formula(dataset: SizeGroupedDataset, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `N_TRAIN` training and `N_TEST` test molecules of at most `MAX_ATOMS` atoms; no formula is in both."""
    words = formulas(dataset)
    known = np.unique(words)
    held_out = np.isin(words, rng.choice(known, round(TEST_FORMULAS * len(known)), replace=False))
    small = dataset.n_atoms <= MAX_ATOMS
    train = rng.choice(np.flatnonzero(small & ~held_out), N_TRAIN, replace=False)
    test = rng.choice(np.flatnonzero(small & held_out), N_TEST, replace=False)
    return np.sort(train), np.sort(test)


def write_rows(source: Path, chosen: np.ndarray, target: Path) -> None:
    """Write the chosen molecules of ``source``, with its attributes, to ``target``."""
    dataset = SizeGroupedDataset(source)
    groups = {arrays["numbers"].shape[1]: arrays for _, arrays in dataset.read(chosen, sorted(dataset.keys))}
    with h5py.File(source, "r") as file:
        attributes = dict(file.attrs)
    write_dataset(target, groups, attributes, compression="gzip")


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("examples/data"))
def main(folder: Path, output: Path) -> None:
    """Write the example datasets from those in FOLDER."""
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    written = []
    for name in COMPLETE:
        write_rows(folder / name, np.arange(len(SizeGroupedDataset(folder / name))), output / name)
        written.append(output / name)
    for name in SUBSETS:
        source = folder / f"{name}.h5"
        for part, chosen in zip(("train", "test"), split_by_formula(SizeGroupedDataset(source), rng), strict=True):
            target = output / f"{name}_{part}.h5"
            write_rows(source, chosen, target)
            written.append(target)
    for path in written:
        click.echo(f"{path}: {len(SizeGroupedDataset(path))} structures, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
