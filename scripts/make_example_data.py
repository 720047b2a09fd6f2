"""Make ``examples/data`` from the full reference datasets: two complete files and two seeded random subsets.

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
SUBSETS = {"fid1_gfn2.h5": 4000, "fid2_gfn1.h5": 4000}
MAX_ATOMS = 16


def write_subset(source: Path, target: Path, n_molecules: int | None, rng: np.random.Generator) -> None:
    """Write ``n_molecules`` random molecules of at most `MAX_ATOMS` atoms (None: all molecules) to ``target``."""
    dataset = SizeGroupedDataset(source)
    chosen = np.arange(len(dataset))
    if n_molecules is not None:
        chosen = np.sort(rng.choice(np.flatnonzero(dataset.n_atoms <= MAX_ATOMS), n_molecules, replace=False))
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
    for name in COMPLETE:
        write_subset(folder / name, output / name, None, rng)
    for name, n_molecules in SUBSETS.items():
        write_subset(folder / name, output / name, n_molecules, rng)
    for name in (*COMPLETE, *SUBSETS):
        path = output / name
        click.echo(f"{path}: {len(SizeGroupedDataset(path))} structures, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
