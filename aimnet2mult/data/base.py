"""What the sampler, the loaders and the trainer know of a dataset, whatever its molecules come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
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


class MoleculeSource(ABC):
    """The molecules of one level of theory as arrays: plain atomic numbers, total energies in eV, lengths in Å.

    One file, several files as one (`aimnet2mult.data.sgdataset`), or another source with something done to its labels.

    Attributes
    ----------
    files : tuple of Path
        Where the molecules lie, absolute paths.
    keys : set of str
        Arrays that at least some of the molecules have.
    n_atoms : numpy.ndarray
        (n,) int32, number of atoms of each molecule.
    """

    files: tuple[Path, ...]
    keys: set[str]
    n_atoms: np.ndarray

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def name(self) -> str:
        """The file, or the first one and how many more, for messages."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"

    @property
    @abstractmethod
    def elements(self) -> list[int]:
        """Sorted atomic numbers of all molecules; the first call reads them all once."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return file, group and row of a molecule, for messages."""

    @abstractmethod
    def read(self, indices: np.ndarray, keys: Sequence[str]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yield the arrays of the given molecules, those of one array shape at a time.

        Parameters
        ----------
        indices : numpy.ndarray
            (m,) int, molecules in any order; repeats are allowed.
        keys : sequence of str
            Arrays to read. An array that these molecules do not have is absent from the dictionary.

        Yields
        ------
        positions : numpy.ndarray
            (k,) int, where in ``indices`` the molecules stand.
        arrays : dict of str to numpy.ndarray
            (k, ...) for each key, in the order of ``positions``; copies that the caller may change.
        """

    @abstractmethod
    def chunks(self, keys: Sequence[str], max_rows: int = 65536) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Stream all molecules in order.

        Parameters
        ----------
        keys : sequence of str
            As in `read`.
        max_rows : int
            Molecules per piece.

        Yields
        ------
        first : int
            Index of the first molecule of the piece; the others follow it.
        arrays : dict of str to numpy.ndarray
            (k, ...) for each key; copies that the caller may change.
        """


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
