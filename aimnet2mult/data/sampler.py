"""Which molecules are trained on together: exact shares of the fidelities, bounded padding, reproducible order.

An epoch is made in three steps, and depends on nothing but the seed and the number of the epoch.

1. *Draws.* Each fidelity has an endless sequence of its molecules: one random permutation after the other. An epoch
   takes the next piece of every sequence; how long the pieces are is what the strategy says. So shares are exact,
   and no molecule comes again before all others of its fidelity have come, across epochs, too.
2. *Batches.* The draws of all fidelities are put in the order of ln(number of atoms) + a random number from a narrow
   interval, and cut into pieces: molecules of similar, not always equal, size meet, and all fidelities mix. Where
   that alone leaves too much padding in an epoch, batches end before sizes that would pad them too much.
3. *Dealing.* The batches are shuffled and dealt out to the processes in turn. All epochs have the same number of
   batches, and all processes the same number of them: where the cut gave fewer, the largest batches are halved.
"""

import heapq
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from aimnet2mult.config.builder import nearest

logger = logging.getLogger(__name__)

STRATEGIES = ("weighted", "uniform", "balanced", "shares")
BATCH_MODES = ("molecules", "atoms")

MAX_PADDING = 0.1
"""Default bound on the share of padding among the atoms of an epoch."""

BATCH_PADDING = (1.0, 0.5, 0.3, 0.2, 0.15)
"""Bounds on the padding of a single batch that are tried in turn before `MAX_PADDING` itself. Padding of a few batches
of small molecules costs little; ending them early would leave batches of very few molecules."""

JITTER_PER_PADDING = 1.5
"""Width of the random interval in ln(number of atoms), in units of the padding bound. A batch of sizes spread evenly
over an interval w has a padding of about w/2, so that 1.5 leaves room for batches that span more."""

BLOCK_DRAWS = 65536
"""Draws for which permutations of a small fidelity are made at a time."""

SPARE = 0.01
"""Share of batches beyond those of epoch 0, for epochs whose draws happen to be larger molecules."""

SPARE_BATCHES = 2
"""Such batches in addition to `SPARE`."""

SPARE_SIGMAS = 3.0
"""Room for larger molecules where a number of batches in atoms is fixed, in standard deviations of an epoch's atoms."""

SHRINK = 0.995
"""Factor by which draws are taken back until a fixed number of batches holds them."""

SHARES_TOLERANCE = 1e-6
"""By how much the sum of given shares may differ from 1."""

DRAWS, SHUFFLE, JITTER, DEAL = range(4)
"""Purposes of random numbers; each has a generator of its own."""


@dataclass(frozen=True)
class SamplerReport:
    """What an epoch consists of, all processes together.

    Attributes
    ----------
    strategy : str
        ``weighted``, ``uniform``, ``balanced``, or ``in order`` (not shuffled).
    epoch : int
        Number of the epoch.
    molecules : dict of int to int
        Molecules that each fidelity has.
    asked : dict of int to float
        Share of the draws that each fidelity was to have.
    draws : dict of int to int
        Molecules drawn from each fidelity.
    batches : int
        Number of batches.
    atoms : int
        Atoms in all batches, without padding.
    padded_atoms : int
        Atoms in all batches, with padding.
    """

    strategy: str
    epoch: int
    molecules: dict[int, int]
    asked: dict[int, float]
    draws: dict[int, int]
    batches: int
    atoms: int
    padded_atoms: int

    @property
    def realised(self) -> dict[int, float]:
        """Share of the draws that each fidelity has."""
        total = sum(self.draws.values())
        return {f: n / total for f, n in self.draws.items()}

    @property
    def effective_epochs(self) -> dict[int, float]:
        """How many times the molecules of each fidelity are seen in this epoch, on average."""
        return {f: n / self.molecules[f] for f, n in self.draws.items()}

    @property
    def padding(self) -> float:
        """Share of padding among the atoms of all batches."""
        return 1.0 - self.atoms / self.padded_atoms

    def __str__(self) -> str:
        total = sum(self.draws.values())
        lines = [
            f"epoch {self.epoch}, {self.strategy}: {total} molecules in {self.batches} batches, "
            f"{total / self.batches:.1f} molecules per batch, {100 * self.padding:.1f} % padding"
        ]
        lines += [
            f"  fidelity {f}: {n} draws of {self.molecules[f]} molecules (each {self.effective_epochs[f]:.3g} times), "
            f"share {100 * self.realised[f]:.2f} %, asked for {100 * self.asked[f]:.2f} %"
            for f, n in self.draws.items()
        ]
        return "\n".join(lines)


class _Epoch(NamedTuple):
    """Molecules in the order of batches, and where batches begin; the last boundary is the number of draws."""

    molecules: np.ndarray  # (n,) indices of molecules
    bounds: np.ndarray  # (batches + 1,)
    dealt: np.ndarray  # batches of all processes, in the order of use


class MixedFidelityBatchSampler(Sampler[list[int]]):
    """Batches of molecules of several fidelities.

    Parameters
    ----------
    n_atoms : numpy.ndarray
        (n,) int, number of atoms of each molecule of the dataset.
    fidelities : numpy.ndarray
        (n,) int, fidelity of each molecule.
    indices : numpy.ndarray, optional
        Molecules to draw from; default all.
    batch_size : int
        Largest batch, in molecules or in atoms (with padding). A molecule with more atoms is a batch of its own.
    batch_mode : str
        ``"molecules"`` or ``"atoms"``.
    shuffle : bool
        Draw at random. False: each molecule once, in fixed order, whatever strategy and weights say.
    batches_per_epoch : int
        Batches of each process in an epoch; -1 for as many as the draws of the strategy need. Shares are the same in
        both cases. Without ``shuffle`` at most so many batches in all, evenly spaced over the sizes.
    sampling_strategy : str
        ``"weighted"``: round(weight x number of molecules) draws of each fidelity per epoch, at least one unless the
        weight is zero. ``"uniform"``: each molecule once. ``"balanced"``: as many draws as there are molecules, the
        same number for every fidelity. ``"shares"``: as many draws as there are molecules, in the shares of
        ``fidelity_shares``.
    fidelity_weights : mapping of int to float, optional
        Weight of each fidelity, default 1; only ``"weighted"`` uses them.
    fidelity_shares : mapping of int to float, optional
        Share of the draws of each fidelity, 0 to 1, together 1; for the strategy ``"shares"`` only.
    fidelity_names : mapping of int to str, optional
        Names of the fidelities for messages and reports; default "fidelity 0", "fidelity 1" ...
    seed : int
        Seed of everything random.
    rank, world_size : int
        This process and the number of processes. Together they draw what one process would. With ``shuffle`` all of
        them have the same number of batches.
    max_padding : float
        Largest share of padding among the atoms of an epoch. A fixed number of batches that is too small to separate
        the sizes may need more (logged).

    Raises
    ------
    ValueError
        An option out of range, or a weight that is negative, not finite, or for a fidelity that has no data.

    Notes
    -----
    `set_epoch` chooses the epoch; without it every pass gives the same batches. Only if the molecules of an epoch turn
    out so much larger than those of epoch 0 that the number of batches does not hold them, some draws are left out,
    the same share of each fidelity (logged).
    """

    def __init__(
        self,
        n_atoms: np.ndarray,
        fidelities: np.ndarray,
        indices: np.ndarray | None = None,
        *,
        batch_size: int,
        batch_mode: str = "molecules",
        shuffle: bool = True,
        batches_per_epoch: int = -1,
        sampling_strategy: str = "weighted",
        fidelity_weights: Mapping[int, float] | None = None,
        fidelity_shares: Mapping[int, float] | None = None,
        fidelity_names: Mapping[int, str] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_padding: float = MAX_PADDING,
    ) -> None:
        _check_options(batch_size, batch_mode, batches_per_epoch, sampling_strategy, max_padding)
        if shuffle:
            _check_weights(fidelity_weights or {}, np.unique(fidelities).tolist())
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes; expected 0 to {world_size - 1}")
        self._n_atoms = np.asarray(n_atoms, np.int32)
        indices = np.arange(len(n_atoms)) if indices is None else np.asarray(indices, np.int64)
        if len(indices) == 0:
            raise ValueError("data: no molecules to draw from. Give more data or a smaller data.val_fraction.")
        of_index = np.asarray(fidelities)[indices]
        self._members = {f: indices[of_index == f] for f in np.unique(of_index).tolist()}
        self.batch_size, self.by_atoms = batch_size, batch_mode == "atoms"
        self.shuffle, self.strategy, self.seed = shuffle, sampling_strategy, seed
        self.rank, self.world_size, self.max_padding = rank, world_size, max_padding
        self._fixed = batches_per_epoch * world_size if batches_per_epoch > 0 else None
        self._names = {f: (fidelity_names or {}).get(f, f"fidelity {f}") for f in self._members}
        if shuffle:
            _check_shares(fidelity_shares, sampling_strategy, self._names)
        self._shares = self._asked_shares(fidelity_weights or {}, fidelity_shares or {})
        self._built: _Epoch | None = None
        self._cut_first: _Epoch | None = None
        self._epoch, self._first_batch = 0, 0
        self._note_oversized()
        if shuffle:
            self._draws = self._draws_per_epoch(fidelity_weights or {})
            self._n_batches = self._batches_per_epoch()
        if self._fixed is not None and (padding := self.report().padding) > max_padding:
            logger.warning(
                f"{100 * padding:.0f} % of the atoms in the batches are padding, more than max_padding "
                f"({100 * max_padding:.0f} %): {self._fixed} batches are too few to separate the sizes."
            )

    # ----------------------------------------------------------------------------------------------
    # the epoch as seen from outside
    # ----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch of this process to begin with (to go on in the middle of an epoch)."""
        if epoch != self._epoch:
            self._built = None
        self._epoch, self._first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Return the number of batches that this process has in the current epoch, from ``first_batch`` on."""
        return max(0, len(self._own_batches()) - self._first_batch)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self._current()
        for batch in self._own_batches()[self._first_batch :]:
            yield epoch.molecules[epoch.bounds[batch] : epoch.bounds[batch + 1]].tolist()

    def report(self) -> SamplerReport:
        """Count what the current epoch consists of, over all processes."""
        epoch = self._current()
        used = np.zeros(len(epoch.bounds) - 1, bool)
        used[epoch.dealt] = True
        padded = padded_atoms(self._n_atoms[epoch.molecules], epoch.bounds)
        kept = epoch.molecules[np.repeat(used, np.diff(epoch.bounds))]
        return SamplerReport(
            strategy=self.strategy if self.shuffle else "in order",
            epoch=self._epoch,
            molecules={f: len(members) for f, members in self._members.items()},
            asked=self._shares,
            draws=self._count_by_fidelity(kept),
            batches=int(used.sum()),
            atoms=int(self._n_atoms[kept].sum(dtype=np.int64)),
            padded_atoms=int(padded[used].sum()),
        )

    def _count_by_fidelity(self, molecules: np.ndarray) -> dict[int, int]:
        fidelity_of = np.full(len(self._n_atoms), -1, np.int16)
        for f, members in self._members.items():
            fidelity_of[members] = f
        drawn = fidelity_of[molecules]
        return {f: int(np.count_nonzero(drawn == f)) for f in self._members}

    def _own_batches(self) -> np.ndarray:
        return self._current().dealt[self.rank :: self.world_size]

    def _current(self) -> _Epoch:
        if self._built is None:
            self._built = self._shuffled_epoch() if self.shuffle else self._ordered_epoch()
        return self._built

    # ----------------------------------------------------------------------------------------------
    # how many draws of which fidelity
    # ----------------------------------------------------------------------------------------------

    def _asked_shares(self, weights: Mapping[int, float], shares: Mapping[int, float]) -> dict[int, float]:
        """Share of the draws that each fidelity is to have."""
        if self.shuffle and self.strategy == "shares":
            demand = {f: shares[f] for f in self._members}
        elif self.shuffle and self.strategy == "balanced":
            demand = dict.fromkeys(self._members, 1.0)
        elif self.shuffle and self.strategy == "weighted":
            demand = {f: weights.get(f, 1.0) * len(members) for f, members in self._members.items()}
        else:
            demand = {f: float(len(members)) for f, members in self._members.items()}
        total = sum(demand.values())
        if total == 0.0:
            raise ValueError(
                f"data.fidelity_weights: all weights are zero (fidelities: {_listed(self._members)}). "
                "Give at least one fidelity a positive weight."
            )
        if self.shuffle and self.strategy != "weighted" and any(w != 1.0 for w in weights.values()):
            logger.warning(f"data.fidelity_weights are not used: sampling_strategy is {self.strategy}, not weighted.")
        return {f: part / total for f, part in demand.items()}

    def _draws_per_epoch(self, weights: Mapping[int, float]) -> dict[int, int]:
        """Draws of each fidelity in every epoch, so that its place in a fidelity's sequence follows from its number."""
        counts = {f: len(members) for f, members in self._members.items()}
        if self._fixed is not None:
            return self._draws_for_batches(self._fixed)
        if self.strategy == "weighted":
            wanted = {f: weights.get(f, 1.0) * n for f, n in counts.items()}
            return {f: max(1, round(n)) if n > 0.0 else 0 for f, n in wanted.items()}
        return apportion(sum(counts.values()), self._shares)

    def _draws_for_batches(self, n_batches: int) -> dict[int, int]:
        """Draws that fill a fixed number of batches, found by trying on epoch 0."""
        if not self.by_atoms:
            return apportion(n_batches * self.batch_size, self._shares)
        sizes = {f: self._n_atoms[members] for f, members in self._members.items()}
        mean = sum(share * float(sizes[f].mean()) for f, share in self._shares.items())
        variance = sum(share * float(((sizes[f] - mean) ** 2).mean()) for f, share in self._shares.items())
        padding = 0.5 * JITTER_PER_PADDING * self.max_padding  # what mixing of sizes takes
        upper = max(n_batches, int((1.0 - padding) * n_batches * self.batch_size / mean))
        found = len(self._cut_draws(0, apportion(upper, self._shares), n_batches).molecules)
        room = SPARE + SPARE_SIGMAS * math.sqrt(variance / found) / mean
        return apportion(max(n_batches, int((1.0 - room) * found)), self._shares)

    def _batches_per_epoch(self) -> int:
        """Batches of all processes in every epoch, a multiple of the number of processes if there are enough draws."""
        total = sum(self._draws.values())
        if total < self.world_size:
            raise ValueError(
                f"data: {total} draws per epoch are not enough for {self.world_size} processes. "
                "Use fewer processes or more data."
            )
        n_batches = self._fixed
        if n_batches is None:
            self._cut_first = self._cut_draws(0, self._draws, None)
            n_batches = len(self._cut_first.bounds) - 1
            # Epochs that hold whole permutations only have the same sizes, and need the same number of batches.
            if any(n % len(self._members[f]) for f, n in self._draws.items()):
                n_batches += math.ceil(SPARE * n_batches) + SPARE_BATCHES
            n_batches = math.ceil(n_batches / self.world_size) * self.world_size
        # Fewer draws than that: batches of one molecule, and what cannot be divided is left out.
        return min(n_batches, total - total % self.world_size)

    # ----------------------------------------------------------------------------------------------
    # building an epoch
    # ----------------------------------------------------------------------------------------------

    def _ordered_epoch(self) -> _Epoch:
        """Every molecule once, by size, then by index."""
        molecules = np.sort(np.concatenate(list(self._members.values())))
        molecules = molecules[np.argsort(self._n_atoms[molecules], kind="stable")]
        packed = self._packed(molecules, None, widths=(0.0,))
        assert packed is not None
        if self._fixed is None or self._fixed >= len(packed.dealt):
            return packed
        spaced = np.linspace(0, len(packed.dealt) - 1, self._fixed).round().astype(np.int64)
        return packed._replace(dealt=spaced)

    def _shuffled_epoch(self) -> _Epoch:
        """Draws of the current epoch in `_n_batches` batches."""
        cut, self._cut_first = self._cut_first, None
        if cut is None or self._epoch != 0 or len(cut.bounds) - 1 > self._n_batches:
            cut = self._cut_draws(self._epoch, self._draws, self._n_batches)
        left_out = sum(self._draws.values()) - len(cut.molecules)
        if left_out:
            logger.warning(f"epoch {self._epoch}: {left_out} draws left out, so that the others fit into the batches.")
        bounds = split_largest(cut.bounds, self._n_batches)
        return _Epoch(cut.molecules, bounds, self._generator(DEAL, self._epoch).permutation(self._n_batches))

    def _cut_draws(self, epoch: int, draws: Mapping[int, int], n_batches: int | None) -> _Epoch:
        """Draw the molecules of an epoch and cut them into at most ``n_batches`` batches.

        Where they need more, draws are taken back from the end of every fidelity's piece, shares kept.
        """
        used = dict(draws)
        while True:
            pieces = [self._sequence(f, epoch * draws[f], n) for f, n in used.items()]
            molecules = np.concatenate(pieces)
            molecules = molecules[self._generator(SHUFFLE, epoch).permutation(len(molecules))]
            # Largest first: what is left over at the end is a batch of small molecules, which costs least.
            molecules = molecules[np.argsort(-self._n_atoms[molecules], kind="stable")]
            packed = self._packed(molecules, n_batches, widths=(JITTER_PER_PADDING * self.max_padding, 0.0))
            if packed is not None:
                return packed
            assert n_batches is not None
            used = apportion(max(n_batches, int(SHRINK * len(molecules))), self._shares)

    def _packed(self, molecules: np.ndarray, n_batches: int | None, widths: Sequence[float]) -> _Epoch | None:
        """Cut molecules, sorted by size, into batches whose padding is within the bound, as loosely as possible.

        ``widths`` are those of the random interval to be tried. If ``n_batches`` leaves no way to keep to the bound,
        the way of least padding is taken; None if no way needs so few batches.
        """
        best, least = None, np.inf
        n_real = self._n_atoms[molecules].sum(dtype=np.int64)
        for bound, width in itertools.product((*BATCH_PADDING, self.max_padding), widths):
            if bound < self.max_padding:
                continue
            tried = self._scattered(molecules, width)
            sizes = self._n_atoms[tried]
            bounds = cut_batches(sizes, self.batch_size, self.by_atoms, bound)
            padding = 1.0 - n_real / padded_atoms(sizes, bounds).sum()
            if padding < least and (n_batches is None or len(bounds) - 1 <= n_batches):
                best, least = _Epoch(tried, bounds, np.arange(len(bounds) - 1)), padding
            if least <= self.max_padding:
                break
        return best

    def _scattered(self, molecules: np.ndarray, width: float) -> np.ndarray:
        """Molecules, sorted by size, moved by random amounts up to ``width`` in ln(number of atoms), largest first.

        The random numbers belong to the places in the list and are the same for all epochs, so that epochs of the same
        sizes are cut in the same way, whichever molecules they hold.
        """
        if width == 0.0:
            return molecules
        amounts = width * self._generator(JITTER).random(len(molecules), np.float32)
        place = np.log(self._n_atoms[molecules], dtype=np.float32) + amounts
        return molecules[np.argsort(-place, kind="stable")]

    def _sequence(self, fidelity: int, first: int, count: int) -> np.ndarray:
        """Draws ``first`` to ``first + count`` of the endless sequence of permutations of a fidelity's molecules."""
        members = self._members[fidelity]
        per_block = max(1, BLOCK_DRAWS // len(members)) * len(members)
        pieces = []
        for block in range(first // per_block, -(-(first + count) // per_block)):
            rng = self._generator(DRAWS, fidelity, block)
            order = np.tile(np.arange(len(members)), (per_block // len(members), 1))
            order = rng.permuted(order, axis=1).ravel()
            begin = block * per_block
            pieces.append(members[order[max(first - begin, 0) : first + count - begin]])
        return np.concatenate(pieces) if pieces else members[:0]

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])

    def _note_oversized(self) -> None:
        if not self.by_atoms:
            return
        oversized = sum(int((self._n_atoms[members] > self.batch_size).sum()) for members in self._members.values())
        if oversized:
            logger.warning(
                f"{oversized} molecules have more atoms than batch_size ({self.batch_size} atoms); "
                "each is a batch of its own."
            )


# --------------------------------------------------------------------------------------------------
# arithmetic
# --------------------------------------------------------------------------------------------------


def apportion(total: int, shares: Mapping[int, float]) -> dict[int, int]:
    """Divide ``total`` into whole numbers in given shares (which sum to 1), by largest remainders."""
    exact = {key: total * share for key, share in shares.items()}
    parts = {key: math.floor(value) for key, value in exact.items()}
    by_remainder = sorted(shares, key=lambda key: parts[key] - exact[key])
    for key in by_remainder[: total - sum(parts.values())]:
        parts[key] += 1
    return parts


def cut_batches(sizes: np.ndarray, capacity: int, by_atoms: bool, max_padding: float) -> np.ndarray:
    """Cut a sequence of molecules into consecutive batches, each as long as its bounds allow.

    Parameters
    ----------
    sizes : numpy.ndarray
        (n,) int, number of atoms of each molecule.
    capacity : int
        Largest number of molecules, or of atoms with padding, in a batch.
    by_atoms : bool
        What ``capacity`` counts.
    max_padding : float
        Largest share of padding in a batch.

    Returns
    -------
    numpy.ndarray
        (batches + 1,) int, where batches begin, and n.
    """
    sizes = np.asarray(sizes, np.int64)
    total = np.concatenate(([0], np.cumsum(sizes)))
    counts = np.arange(1, capacity + 1)
    filled = 1.0 - max_padding - 1e-9  # round-off must not cut at a padding of exactly the bound
    bounds, begin = [0], 0
    while begin < len(sizes):
        limit = max(1, capacity // int(sizes[begin])) if by_atoms else capacity
        window = sizes[begin : begin + limit]
        length, largest = len(window), int(window.max())
        padded = length * largest
        fits = not by_atoms or padded <= capacity
        if not (fits and total[begin + length] - total[begin] >= filled * padded):
            paddeds = counts[:length] * np.maximum.accumulate(window)
            good = total[begin + 1 : begin + length + 1] - total[begin] >= filled * paddeds
            if by_atoms:
                good &= paddeds <= capacity
            good[0] = True  # a molecule alone has no padding, and may exceed the capacity
            length -= int(np.argmax(good[::-1]))
        begin += length
        bounds.append(begin)
    return np.array(bounds)


def padded_atoms(sizes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Atoms of each batch with padding: molecules times atoms of the largest; boundaries as `cut_batches` gives."""
    return np.diff(bounds) * np.maximum.reduceat(sizes, bounds[:-1]).astype(np.int64)


def split_largest(bounds: np.ndarray, n_batches: int) -> np.ndarray:
    """Halve the batch with most molecules until there are ``n_batches``, which must not exceed their molecules."""
    if n_batches <= len(bounds) - 1:
        return bounds
    heap = [(int(begin - end), int(begin), int(end)) for begin, end in itertools.pairwise(bounds)]
    heapq.heapify(heap)
    while len(heap) < n_batches:
        _, begin, end = heapq.heappop(heap)
        middle = (begin + end) // 2
        heapq.heappush(heap, (begin - middle, begin, middle))
        heapq.heappush(heap, (middle - end, middle, end))
    return np.array(sorted(begin for _, begin, _ in heap) + [bounds[-1]])


# --------------------------------------------------------------------------------------------------
# checks
# --------------------------------------------------------------------------------------------------


def _listed(fidelities: Sequence[int] | Mapping[int, object]) -> str:
    return ", ".join(map(str, sorted(fidelities)))


def _check_options(batch_size: int, batch_mode: str, batches_per_epoch: int, strategy: str, max_padding: float) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is not positive. Give the number of {batch_mode} in a batch.")
    if batch_mode not in BATCH_MODES:
        raise ValueError(f"batch_mode: unknown mode {batch_mode!r}; {nearest(str(batch_mode), BATCH_MODES)}")
    if strategy not in STRATEGIES:
        raise ValueError(f"sampling_strategy: unknown strategy {strategy!r}; {nearest(str(strategy), STRATEGIES)}")
    if batches_per_epoch != -1 and batches_per_epoch < 1:
        raise ValueError(f"batches_per_epoch: {batches_per_epoch} is not positive. Give -1 for all data.")
    if not 0.0 <= max_padding < 1.0:
        raise ValueError(f"max_padding: {max_padding} is not a share from 0 to below 1, such as {MAX_PADDING}.")


def _check_weights(weights: Mapping[int, float], fidelities: list[int]) -> None:
    for f, weight in weights.items():
        if f not in fidelities:
            raise ValueError(
                f"data.fidelity_weights: fidelity {f} has no dataset (datasets: {_listed(fidelities)}). "
                f"Add data.fidelity_datasets.{f} or remove the weight."
            )
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(
                f"data.fidelity_weights: fidelity {f} has the weight {weight}. "
                "Give zero or a positive number; 1 draws each molecule once per epoch."
            )


def _check_shares(shares: Mapping[int, float] | None, strategy: str, names: Mapping[int, str]) -> None:
    if strategy != "shares":
        if shares:
            raise ValueError(
                f"data.fidelity_shares: given, but sampling_strategy is {strategy}. Set sampling_strategy: shares, or "
                "remove the shares."
            )
        return
    shares = shares or {}
    if unknown := sorted(set(shares) - set(names)):
        known = ", ".join(names.values())
        raise ValueError(f"data.fidelity_shares: no molecules to draw from for fidelity {unknown[0]} (known: {known}).")
    total = sum(shares.values())
    if missing := [name for f, name in names.items() if f not in shares]:
        raise ValueError(
            f"data.fidelity_shares: no share for {', '.join(missing)} (those given sum to {total:g}). "
            "Give every fidelity a share, 0 for one that is not to be drawn."
        )
    for f, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"data.fidelity_shares: {names[f]} has the share {share}, expected 0 to 1.")
    if abs(total - 1.0) > SHARES_TOLERANCE:
        raise ValueError(f"data.fidelity_shares: the shares sum to {total:.7g}, expected 1.")
