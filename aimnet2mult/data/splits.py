"""Which molecules are trained on and which validate."""

import numpy as np

from aimnet2mult.data.base import MultiFidelityDataset


def split_indices(dataset: MultiFidelityDataset, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the molecules into training and validation at random, each fidelity by itself.

    The split depends on the number of molecules of each fidelity and on the seed alone, so it is the same in every
    process and after a restart.

    Parameters
    ----------
    dataset : MultiFidelityDataset
        The molecules.
    val_fraction : float
        Share of validation molecules, 0 to below 1. Above 0, every fidelity that has at least two molecules has at
        least one for validation and one for training; a single molecule is for training.
    seed : int
        Seed of the split.

    Returns
    -------
    train, val : numpy.ndarray
        Ascending indices of molecules, int64.

    Raises
    ------
    ValueError
        ``val_fraction`` is out of range.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"data.val_fraction: {val_fraction} is not a share from 0 to below 1, such as 0.1.")
    validates = np.zeros(len(dataset), bool)
    for f in range(dataset.num_fidelities):
        members = np.flatnonzero(dataset.fidelities == f)
        n_val = round(val_fraction * len(members))
        if val_fraction > 0.0:
            n_val = min(max(n_val, 1), len(members) - 1)
        chosen = np.random.default_rng([seed, f]).permutation(len(members))[:n_val]
        validates[members[chosen]] = True
    return np.flatnonzero(~validates), np.flatnonzero(validates)
