"""What the sampler, the loaders and the trainer know of a dataset, whatever its molecules come from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import Dataset

INPUT_KEYS = ("coord", "numbers", "charge", "mult")
"""Keys of a sample that go into the model; its other keys are labels."""

FIDELITY_KEY = "_fidelities"
"""Key under which a sample and a batch hold the fidelity."""

Sample: TypeAlias = dict[str, Any]
"""One molecule: arrays without padding, ``coord`` (N, 3) float32 in Å, ``numbers`` (N,) int64 with fidelity encoded,
``charge`` and ``mult`` (), each label as in `aimnet2mult.nbops.BATCH_KEYS` or None where the molecule lacks it, and
``_fidelities``, an int. ``energy`` is what remains after the self-atomic energies have been subtracted, eV."""


class MultiFidelityDataset(Dataset[Sample], ABC):
    """Molecules of one or more fidelities under one numbering.

    Attributes
    ----------
    n_atoms : numpy.ndarray
        (n,) int, number of atoms of each molecule.
    fidelities : numpy.ndarray
        (n,) int, fidelity of each molecule.
    num_fidelities : int
        Number F of fidelities; they are 0 to F - 1.
    species : dict of int to list of int
        Sorted atomic numbers that occur in each fidelity.
    labels : dict of int to set of str
        Labels that at least one group of each fidelity's data has.
    """

    n_atoms: np.ndarray
    fidelities: np.ndarray
    num_fidelities: int
    species: dict[int, list[int]]
    labels: dict[int, set[str]]

    def __len__(self) -> int:
        return len(self.n_atoms)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the samples of the given molecules, in their order; this is what the loader calls."""
