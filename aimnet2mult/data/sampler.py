"""Which molecules are trained on together: exact shares of the fidelities, bounded padding, reproducible order.

An epoch is made in three steps, and depends on nothing but the seed and the number of the epoch.

1. *Draws.* Each fidelity has an endless sequence of its molecules: one random permutation after the other. An epoch
   takes the next piece of every sequence; how long the pieces are is what the strategy says. So no molecule comes
   again before all others of its fidelity have come, across epochs, too. Where an epoch's draws of a fidelity are not
   a whole number, the epochs differ by one such that the shares stay exact over the whole training.
2. *Batches.* The draws of all fidelities are put in the order of ln(number of atoms) + a random number from a narrow
   interval, and cut into pieces: molecules of similar, not always equal, size meet, and all fidelities mix. Where
   that alone leaves too much padding in an epoch, batches end before sizes that would pad them too much.
3. *Dealing.* The batches are shuffled and dealt out to the processes in turn. All epochs have the same number of
   batches, and all processes the same number of them: where the cut gave fewer, the largest batches are halved.
"""

import hashlib
import heapq
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

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
"""Share of batches beyond those of epoch 0, for epochs that are cut less well."""

SPARE_BATCHES = 2
"""Such batches in addition to `SPARE`."""

SPARE_SIGMAS = 5.0
"""Room for epochs whose draws happen to be larger molecules, in standard deviations of an epoch's atoms: one epoch in
a few million has more."""

SHRINK = 0.995
"""Factor by which draws are taken back until the batches hold them."""

SHARES_TOLERANCE = 1e-6
"""By how much the sum of given shares may differ from 1."""

DRAWS, SHUFFLE, JITTER, DEAL = range(4)
"""Purposes of random numbers; each has a generator of its own."""

ORDER_VERSION = 2
"""Changed whenever the same settings give other batches than before, since a saved position has no meaning then."""


@dataclass(frozen=True)
class SamplerReport:
    """What an epoch consists of, all processes together.

    Attributes
    ----------
    strategy : str
        ``weighted``, ``uniform``, ``balanced``, ``shares``, or ``in order`` (not shuffled).
    epoch : int
        Number of the epoch.
    names : dict of int to str
        Name of each fidelity.
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
    names: dict[int, str]
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

    @property
    def molecules_per_batch(self) -> float:
        """Mean number of molecules of a batch."""
        return sum(self.draws.values()) / self.batches

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain Python objects, to be written as JSON or YAML; fidelities by name."""
        fidelities = {
            self.names[f]: {
                "molecules": self.molecules[f],
                "draws": draws,
                "asked_share": self.asked[f],
                "realised_share": self.realised[f],
                "effective_epochs": self.effective_epochs[f],
            }
            for f, draws in self.draws.items()
        }
        return {
            "strategy": self.strategy,
            "epoch": self.epoch,
            "batches": self.batches,
            "molecules_per_batch": self.molecules_per_batch,
            "padding": self.padding,
            "fidelities": fidelities,
        }

    def __str__(self) -> str:
        lines = [
            f"epoch {self.epoch}, {self.strategy}: {sum(self.draws.values())} molecules in {self.batches} batches, "
            f"{self.molecules_per_batch:.1f} molecules per batch, {100 * self.padding:.1f} % padding"
        ]
        lines += [
            f"  {self.names[f]}: {n} draws of {self.molecules[f]} molecules (each {self.effective_epochs[f]:.3g} "
            f"times), share {100 * self.realised[f]:.2f} %, asked for {100 * self.asked[f]:.2f} %"
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
        ``"weighted"``: weight x number of molecules draws of each fidelity per epoch. ``"uniform"``: each molecule
        once. ``"balanced"``: as many draws as there are molecules, the same number for every fidelity. ``"shares"``:
        as many draws as there are molecules, in the shares of ``fidelity_shares``.
    fidelity_weights : mapping of int to float, optional
        Weight of each fidelity, default 1; only ``"weighted"`` uses them.
    fidelity_shares : mapping of int to float, optional
        Share of the draws of each fidelity that has molecules, 0 to 1, together 1; for the strategy ``"shares"`` only.
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
        An option out of range, a weight that is negative, not finite, or for a fidelity that has no data, shares that
        do not sum to 1, lack a fidelity, or are given for another strategy.

    Notes
    -----
    `set_epoch` chooses the epoch; without it every pass gives the same batches. `state` and `restore` go on in the
    middle of an epoch.

    With ``batch_mode="atoms"`` all epochs have as many batches, and yet molecules of random sizes: there is room for
    all but one epoch in a few million. In such an epoch some draws are left out, the same share of each fidelity
    (logged).
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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes; expected 0 to {world_size - 1}")
        self._n_atoms = np.asarray(n_atoms, np.int32)
        self._fidelities = np.asarray(fidelities)
        known = np.unique(self._fidelities).tolist()
        self._members = _molecules_by_fidelity(self._fidelities, known, indices)
        if not self._members:
            raise ValueError("data: no molecules to draw from. Give more data or a smaller data.val_fraction.")
        self._names = {f: (fidelity_names or {}).get(f, f"fidelity {f}") for f in known}
        self.batch_size, self.by_atoms = batch_size, batch_mode == "atoms"
        self.shuffle, self.strategy, self.seed = shuffle, sampling_strategy if shuffle else "in order", seed
        self.rank, self.world_size, self.max_padding = rank, world_size, max_padding
        self._fixed = batches_per_epoch * world_size if batches_per_epoch > 0 else None
        self._built: _Epoch | None = None
        self._cut_first: _Epoch | None = None
        self._epoch, self._first_batch = 0, 0
        self._digest = ""
        self._note_oversized()
        self._demand = {f: Fraction(len(members)) for f, members in self._members.items()}
        if shuffle:
            self._demand = self._asked_draws(fidelity_weights or {}, fidelity_shares or {})
            self._n_batches = self._batches_per_epoch()
        if self._fixed is not None and (padding := self.report().padding) > max_padding:
            logger.warning(
                f"{100 * padding:.0f} % of the atoms in the batches are padding, more than max_padding "
                f"({100 * max_padding:.0f} %): {self._fixed} batches are too few to separate the sizes."
            )

    # ----------------------------------------------------------------------------------------------
    # the epoch as seen from outside
    # ----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int, first_batch: int | None = None) -> None:
        """Choose the epoch, and the batch of this process to begin with.

        Without ``first_batch`` an epoch begins with its first batch; the epoch that is set already keeps its beginning,
        so that a trainer may set the epoch after `restore`, too.
        """
        if epoch != self._epoch:
            self._built = None
            self._first_batch = 0
        self._epoch = epoch
        if first_batch is not None:
            self._first_batch = first_batch

    def state(self, batches_done: int) -> dict[str, Any]:
        """Describe where training stands, in plain numbers and words.

        The count comes from the trainer, since worker processes of a loader take batches before they are needed. It is
        the same in all processes, so that one state serves all of them.

        Parameters
        ----------
        batches_done : int
            Batches of the current epoch that this process has trained on, from the beginning of the epoch (those before
            an interruption included).

        Returns
        -------
        dict
            ``epoch``, ``batches_done`` and ``settings``, all that the draws depend on. After the last batch of an epoch
            it says: the next epoch, no batches.
        """
        count = len(self._own_batches())
        if not 0 <= batches_done <= count:
            raise ValueError(f"batches_done: {batches_done} of epoch {self._epoch}, which has {count} batches")
        epoch, done = (self._epoch + 1, 0) if batches_done == count else (self._epoch, batches_done)
        return {"epoch": epoch, "batches_done": done, "settings": self._settings()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a sampler of the same data and settings stood: the remaining batches of its epoch come next.

        Parameters
        ----------
        state : mapping
            What `state` returned.

        Raises
        ------
        ValueError
            Not such a state, or one of other data or settings; the message names them.
        """
        if missing := [key for key in ("epoch", "batches_done", "settings") if key not in state]:
            raise ValueError(f"state of the sampler: {', '.join(missing)} missing. Give what `state` returned.")
        saved, now = state["settings"], self._settings()
        keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
        if keys:
            differences = "; ".join(f"{key}: {saved.get(key, 'none')}, now {now.get(key, 'none')}" for key in keys)
            raise ValueError(
                f"state of the sampler: saved with other data or settings ({differences}). "
                "Go on with the same ones, or begin a new run from the saved weights."
            )
        epoch, done = state["epoch"], state["batches_done"]
        if epoch < 0 or done < 0:
            raise ValueError(f"state of the sampler: epoch {epoch}, batches_done {done}; expected 0 or more.")
        self.set_epoch(epoch, done)

    def _settings(self) -> dict[str, Any]:
        """All that the batches of this process's epochs depend on, by names for messages."""
        if not self._digest:
            content = hashlib.blake2b(digest_size=8)
            for array in (self._n_atoms, *self._members.values()):
                content.update(np.ascontiguousarray(array).data)
            self._digest = content.hexdigest()
        settings = {
            "version of the order": ORDER_VERSION,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "sampling_strategy": self.strategy,
            "batch_size": self.batch_size,
            "batch_mode": "atoms" if self.by_atoms else "molecules",
            "batches_per_epoch": -1 if self._fixed is None else self._fixed // self.world_size,
            "max_padding": self.max_padding,
            "world_size": self.world_size,
        }
        for f, members in self._members.items():
            settings[f"molecules of {self._names[f]}"] = len(members)
            settings[f"draws of {self._names[f]} per epoch"] = float(self._demand[f])
        return {**settings, "digest of the molecules' sizes and indices": self._digest}

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this process in the whole of the current epoch."""
        return len(self._own_batches())

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
        kept = epoch.molecules if used.all() else epoch.molecules[np.repeat(used, np.diff(epoch.bounds))]
        fidelities = self._fidelities[kept]
        demand = sum(self._demand.values())
        return SamplerReport(
            strategy=self.strategy,
            epoch=self._epoch,
            names={f: self._names[f] for f in self._members},
            molecules={f: len(members) for f, members in self._members.items()},
            asked={f: float(part / demand) for f, part in self._demand.items()},
            draws={f: int(np.count_nonzero(fidelities == f)) for f in self._members},
            batches=int(used.sum()),
            atoms=int(self._n_atoms[kept].sum(dtype=np.int64)),
            padded_atoms=int(padded[used].sum()),
        )

    def _own_batches(self) -> np.ndarray:
        return self._current().dealt[self.rank :: self.world_size]

    def _current(self) -> _Epoch:
        if self._built is None:
            self._built = self._shuffled_epoch() if self.shuffle else self._ordered_epoch()
        return self._built

    # ----------------------------------------------------------------------------------------------
    # how many draws of which fidelity
    # ----------------------------------------------------------------------------------------------

    def _asked_draws(self, weights: Mapping[int, float], shares: Mapping[int, float]) -> dict[int, Fraction]:
        """Draws of each fidelity in an epoch, not rounded."""
        _check_weights(weights, self._names)
        _check_shares(shares, self.strategy, self._names, self._members)
        counts = {f: len(members) for f, members in self._members.items()}
        if self.strategy != "weighted" and any(weight != 1.0 for weight in weights.values()):
            logger.warning(
                f"the weights of the fidelities are not used: sampling_strategy is {self.strategy}, not weighted."
            )
        if self.strategy == "weighted":
            demand = {f: _fraction(weights.get(f, 1.0)) * n for f, n in counts.items()}
        elif self.strategy == "uniform":
            demand = {f: Fraction(n) for f, n in counts.items()}
        elif self.strategy == "balanced":
            demand = scaled(dict.fromkeys(counts, Fraction(1)), sum(counts.values()))
        else:
            demand = scaled({f: _fraction(shares[f]) for f in counts}, sum(counts.values()))
        if not any(demand.values()):
            raise ValueError(
                f"data.fidelity_weights: all weights are zero ({_listed(self._names)}). "
                "Give at least one fidelity a positive weight."
            )
        if self._fixed is None:
            return demand
        return scaled(demand, self._draws_for_batches(self._fixed, demand))

    def _draws_of_epoch(self, epoch: int, demand: Mapping[int, Fraction]) -> dict[int, tuple[int, int]]:
        """First and last (excluded) position of an epoch in the sequence of each fidelity."""
        per_epoch = sum(demand.values())
        begin, end = (apportion(round(number * per_epoch), demand) for number in (epoch, epoch + 1))
        return {f: (begin[f], end[f]) for f in demand}

    def _draws_for_batches(self, n_batches: int, demand: Mapping[int, Fraction]) -> int:
        """Number of draws that fill a fixed number of batches in every epoch.

        Where these count atoms, it is found by trying on epoch 0, and at least what holds for the largest molecules.
        """
        if not self.by_atoms:
            return n_batches * self.batch_size
        largest = max(int(self._n_atoms[self._members[f]].max()) for f, part in demand.items() if part)
        always = n_batches * max(1, self.batch_size // largest)
        mean = self._mean_atoms(demand)
        padding = 0.5 * JITTER_PER_PADDING * self.max_padding  # what mixing of sizes takes
        upper = max(always, int((1.0 - padding) * n_batches * self.batch_size / mean))
        cut = self._cut_draws(0, scaled(demand, upper), n_batches)
        n_draws = self._n_atoms[cut.molecules].sum(dtype=np.int64) / mean
        room = SPARE + SPARE_SIGMAS * self._sigma_atoms(scaled(demand, int(n_draws))) / (n_draws * mean)
        return max(always, int((1.0 - room) * n_draws))

    def _mean_atoms(self, demand: Mapping[int, Fraction]) -> float:
        """Atoms of a drawn molecule, on average."""
        atoms = sum(float(n) * float(self._n_atoms[self._members[f]].mean()) for f, n in demand.items())
        return atoms / float(sum(demand.values()))

    def _sigma_atoms(self, demand: Mapping[int, Fraction]) -> float:
        """Standard deviation (upper bound) of the number of atoms in an epoch.

        n draws from a random order of m molecules have the variance n (1 - n/m) times that of the sizes; whole orders
        have none. An epoch has the end of one order and the beginning of another, at worst as many of each.
        """
        variance = 0.0
        for f, exact in demand.items():
            m, n = len(self._members[f]), float(exact)
            if n % m:
                sizes = self._n_atoms[self._members[f]]
                mean_square = float(np.einsum("i,i->", sizes, sizes, dtype=np.float64)) / m  # no copies
                spread = n - n * n / (2.0 * m) if n < m else 0.5 * m
                variance += spread * max(0.0, mean_square - float(sizes.mean()) ** 2)
        return math.sqrt(variance)

    def _batches_per_epoch(self) -> int:
        """Batches of all processes in every epoch, a multiple of the number of processes."""
        if self._fixed is not None:
            return self._fixed
        total = sum(self._demand.values())
        most = math.floor(total) - math.floor(total) % self.world_size  # each a single molecule
        if most == 0:
            raise ValueError(
                f"data: {math.floor(total)} draws per epoch are not enough for {self.world_size} processes. "
                "Use fewer processes or more data."
            )
        self._cut_first = cut = self._cut_draws(0, self._demand, None)
        needed = len(cut.bounds) - 1
        if total.denominator > 1:
            needed += 1  # for the epochs that have one draw more
        if needed > most:
            logger.warning(
                f"data: {float(total):g} draws per epoch are made {most}, so that all epochs and processes have the "
                "same number of batches; shares stay the same."
            )
            self._demand, self._cut_first = scaled(self._demand, most), None
            return most
        # Epochs that hold whole permutations only have the same sizes, and need the same number of batches.
        if any(n % len(self._members[f]) for f, n in self._demand.items()):
            room = SPARE
            if self.by_atoms:
                atoms = float(total) * self._mean_atoms(self._demand) + SPARE_SIGMAS * self._sigma_atoms(self._demand)
                room += max(0.0, atoms / self._n_atoms[cut.molecules].sum(dtype=np.int64) - 1.0)
            needed += math.ceil(room * needed) + SPARE_BATCHES
        return min(math.ceil(needed / self.world_size) * self.world_size, most)

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
            del cut
            cut = self._cut_draws(self._epoch, self._demand, self._n_batches)
        left_out = sum(end - begin for begin, end in self._draws_of_epoch(self._epoch, self._demand).values())
        left_out -= len(cut.molecules)
        if left_out:
            logger.warning(f"epoch {self._epoch}: {left_out} draws left out, so that the others fit into the batches.")
        bounds = split_largest(cut.bounds, self._n_batches)
        return _Epoch(cut.molecules, bounds, self._generator(DEAL, self._epoch).permutation(self._n_batches))

    def _cut_draws(self, epoch: int, demand: Mapping[int, Fraction], n_batches: int | None) -> _Epoch:
        """Draw the molecules of an epoch and cut them into at most ``n_batches`` batches.

        Where they need more, draws are taken back from the end of every fidelity's piece, shares kept.
        """
        places = self._draws_of_epoch(epoch, demand)
        counts = {f: end - begin for f, (begin, end) in places.items()}
        while True:
            molecules = np.concatenate([self._sequence(f, places[f][0], n) for f, n in counts.items()])
            self._generator(SHUFFLE, epoch).shuffle(molecules)
            # Largest first: what is left over at the end is a batch of small molecules, which costs least.
            molecules = molecules[np.argsort(-self._n_atoms[molecules], kind="stable")]
            packed = self._packed(molecules, n_batches, widths=(JITTER_PER_PADDING * self.max_padding, 0.0))
            if packed is not None:
                return packed
            assert n_batches is not None
            fewer = max(n_batches, int(SHRINK * len(molecules)))
            counts = apportion(fewer, {f: Fraction(end - begin) for f, (begin, end) in places.items()})

    def _packed(self, molecules: np.ndarray, n_batches: int | None, widths: Sequence[float]) -> _Epoch | None:
        """Cut molecules, sorted by size, into batches whose padding is within the bound, as loosely as possible.

        ``widths`` are those of the random interval to be tried. If ``n_batches`` leaves no way to keep to the bound,
        the way of least padding is taken; None if no way needs so few batches.
        """
        best, least = None, np.inf
        n_real = self._n_atoms[molecules].sum(dtype=np.int64)
        orders: dict[float, np.ndarray] = {}
        for bound, width in itertools.product((*BATCH_PADDING, self.max_padding), widths):
            if bound < self.max_padding:
                continue
            if width not in orders:
                orders[width] = self._scattered(molecules, width)
            tried = orders[width]
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
        place = self._generator(JITTER).random(len(molecules), np.float32)
        place *= width
        place += np.log(self._n_atoms[molecules], dtype=np.float32)
        return molecules[np.argsort(np.negative(place, out=place), kind="stable")]

    def _sequence(self, fidelity: int, first: int, count: int) -> np.ndarray:
        """Draws ``first`` to ``first + count`` of the endless sequence of permutations of a fidelity's molecules."""
        members = self._members[fidelity]
        per_block = max(1, BLOCK_DRAWS // len(members)) * len(members)
        pieces = []
        for block in range(first // per_block, -(-(first + count) // per_block)):
            rng = self._generator(DRAWS, fidelity, block)
            orders = np.tile(members, (per_block // len(members), 1))
            rng.permuted(orders, axis=1, out=orders)
            begin = block * per_block
            pieces.append(orders.ravel()[max(first - begin, 0) : first + count - begin])
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


def apportion(total: int, parts: Mapping[int, Fraction]) -> dict[int, int]:
    """Divide ``total`` into whole numbers in proportion to ``parts`` (Webster's method).

    Parts that are proportional to whole numbers of this total get exactly these; all others are within
    (number of parts + 1) / 2 of the exact proportion, nearly always within one. A larger total never gives any part
    less, so that differences between totals are whole numbers of draws.
    """
    scale = total / sum(parts.values())
    seats = {key: math.floor(scale * part + Fraction(1, 2)) for key, part in parts.items()}
    order = {key: number for number, key in enumerate(parts)}  # decides between equals
    for _ in range(sum(seats.values()), total):
        key = min((k for k in parts if parts[k]), key=lambda k: ((seats[k] + Fraction(1, 2)) / parts[k], order[k]))
        seats[key] += 1
    for _ in range(total, sum(seats.values())):
        key = max((k for k in parts if seats[k]), key=lambda k: ((seats[k] - Fraction(1, 2)) / parts[k], order[k]))
        seats[key] -= 1
    return seats


def scaled(parts: Mapping[int, Fraction], total: int) -> dict[int, Fraction]:
    """Return the parts times one factor, so that they sum to ``total``."""
    factor = Fraction(total) / sum(parts.values())
    return {key: part * factor for key, part in parts.items()}


def _fraction(number: float) -> Fraction:
    """Return the decimal number that a user wrote: 0.2 is one fifth."""
    return Fraction(str(float(number)))


def _molecules_by_fidelity(
    fidelities: np.ndarray, known: Sequence[int], indices: np.ndarray | None
) -> dict[int, np.ndarray]:
    """Indices of the molecules of each fidelity that has any, in as little memory as they fit into."""
    dtype = np.int32 if len(fidelities) <= np.iinfo(np.int32).max else np.int64
    if indices is None:
        members = {f: np.flatnonzero(fidelities == f).astype(dtype) for f in known}
    else:
        indices = np.asarray(indices).astype(dtype, copy=False)
        of_index = fidelities[indices]
        members = {f: indices[of_index == f] for f in known}
    return {f: molecules for f, molecules in members.items() if len(molecules)}


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
    total = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=total[1:])
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


def _listed(names: Mapping[int, str]) -> str:
    """Fidelities for messages."""
    return ", ".join(names.values())


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


def _check_weights(weights: Mapping[int, float], names: Mapping[int, str]) -> None:
    for f, weight in weights.items():
        if f not in names:
            raise ValueError(
                f"data.fidelity_weights: fidelity {f} has no dataset (those with one: {_listed(names)}). "
                "Add a dataset or remove the weight."
            )
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(
                f"data.fidelity_weights: {names[f]} has the weight {weight}. "
                "Give zero or a positive number; 1 draws each molecule once per epoch."
            )


def _check_shares(
    shares: Mapping[int, float], strategy: str, names: Mapping[int, str], members: Mapping[int, np.ndarray]
) -> None:
    if strategy != "shares":
        if shares:
            raise ValueError(
                f"shares: given, but sampling_strategy is {strategy}, which does not use them. "
                "Set sampling_strategy to shares, or remove the shares."
            )
        return
    for f, share in shares.items():
        if f not in names:
            raise ValueError(
                f"shares: fidelity {f} has no dataset (those with one: {_listed(names)}). "
                "Add a dataset or remove the share."
            )
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"shares: {names[f]} has the share {share}, expected a number from 0 to 1.")
        if share > 0.0 and f not in members:
            raise ValueError(f"shares: {names[f]} has the share {share}, but no molecules to draw from.")
    total = sum(shares.values())
    if missing := [names[f] for f in members if f not in shares]:
        raise ValueError(
            f"shares: no share for {', '.join(missing)}; those given sum to {total:g}. "
            "Give every fidelity a share, and 0 to one that is not to be drawn."
        )
    if abs(total - 1.0) > SHARES_TOLERANCE:
        raise ValueError(f"shares: the shares sum to {total:.7g}, expected 1.")
