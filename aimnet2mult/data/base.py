"""What the sampler, the loaders and the trainer know of a dataset, whatever its molecules come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import Dataset

from aimnet2mult.nbops import BATCH_KEYS

INPUT_KEYS = ("coord", "numbers", "charge", "mult")
"""Keys of a sample that go into the model; its other keys are labels."""

FIDELITY_KEY = "_fidelities"
"""Key under which a sample and a batch hold the fidelity."""

Sample: TypeAlias = dict[str, Any]
"""One molecule: arrays without padding, ``coord`` (N, 3) float32 in Å, ``numbers`` (N,) int64 with fidelity encoded,
``charge`` and ``mult`` (), each label as in `aimnet2mult.nbops.BATCH_KEYS` or None where the molecule lacks it, and
``_fidelities``, an int. ``energy`` is what remains after the self-atomic energies have been subtracted, eV."""


LABEL_COUNT_BYTES = 2**30
"""Labels are counted one by one up to this size in memory, and from a sample beyond it."""

SAMPLE_BLOCKS = 16
"""Evenly spaced blocks of molecules that are looked at, of each number of atoms, where labels are counted from a
sample."""

SAMPLE_ROWS = 256
"""Molecules in such a block."""


@dataclass(frozen=True)
class LabelCount:
    """How many molecules of a dataset have a label.

    Attributes
    ----------
    molecules : int
        Those that have it.
    missing : int
        Those that lack it: their group has no such array, or the array is NaN in the row of the molecule.
    exact : bool
        Counted one by one; False: extrapolated from a sample.
    """

    molecules: int
    missing: int
    exact: bool

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        return f"{about}{self.molecules} of {self.molecules + self.missing}"


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

    @abstractmethod
    def close(self) -> None:
        """Close the files until they are read again."""

    def label_bytes(self, keys: Sequence[str]) -> int:
        """Estimate the size in memory of labels in single precision."""
        numbers_per_atom, numbers_per_molecule = 0, 0
        for key in self.keys.intersection(keys).intersection(BATCH_KEYS):
            meaning = BATCH_KEYS[key]
            n_numbers = int(np.prod(meaning.trailing, dtype=np.int64))
            if meaning.kind == "atom":
                numbers_per_atom += n_numbers
            else:
                numbers_per_molecule += n_numbers
        return 4 * (numbers_per_atom * int(self.n_atoms.sum(dtype=np.int64)) + numbers_per_molecule * len(self))

    def label_counts(self, keys: Sequence[str], max_bytes: int = LABEL_COUNT_BYTES) -> dict[str, LabelCount]:
        """Count the molecules that have each label.

        Parameters
        ----------
        keys : sequence of str
            The labels.
        max_bytes : int
            Read all labels if they take up to this size in memory. Beyond it, look at evenly spaced blocks of the
            molecules of each number of atoms and extrapolate.

        Returns
        -------
        dict of str to LabelCount
            For each of ``keys``.
        """
        if self.label_bytes(keys) <= max_bytes:
            counts = dict.fromkeys(keys, 0)
            for _, arrays in self.chunks(keys):
                for key, values in arrays.items():
                    counts[key] += _count_present(values)
            return {key: LabelCount(count, len(self) - count, exact=True) for key, count in counts.items()}
        estimates, exact = dict.fromkeys(keys, 0.0), dict.fromkeys(keys, True)
        starts = np.flatnonzero(np.diff(self.n_atoms, prepend=-1))
        for first, last in zip(starts.tolist(), [*starts[1:].tolist(), len(self)], strict=True):
            sample = _evenly_spaced_blocks(first, last)
            for _, arrays in self.read(sample, keys):
                for key, values in arrays.items():
                    estimates[key] += _count_present(values) * (last - first) / len(sample)
                    exact[key] = exact[key] and len(sample) == last - first
        return {key: LabelCount(round(count), len(self) - round(count), exact[key]) for key, count in estimates.items()}


def _count_present(values: np.ndarray) -> int:
    """Rows of (k, ...) without NaN."""
    if values.dtype.kind != "f":
        return len(values)
    return int(np.count_nonzero(~np.isnan(values).reshape(len(values), -1).any(axis=1)))


def _evenly_spaced_blocks(first: int, last: int) -> np.ndarray:
    """Indices in ``first`` to before ``last``: all, or `SAMPLE_BLOCKS` blocks that include both ends."""
    if last - first <= SAMPLE_BLOCKS * SAMPLE_ROWS:
        return np.arange(first, last)
    starts = np.linspace(first, last - SAMPLE_ROWS, SAMPLE_BLOCKS).astype(np.int64)
    return (starts[:, None] + np.arange(SAMPLE_ROWS)).ravel()


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
