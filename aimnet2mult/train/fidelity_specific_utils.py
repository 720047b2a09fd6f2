"""Transfer learning: weights of one model as the start of another with other fidelities.

Fidelity f of the model starts from fidelity s(f) of the checkpoint: what ``init_from`` says, else the one of the same
name, else the closest one, by errors of its predictions on data of f. Tables with a row per element type (embedding,
atomic shifts) are taken block by block, readouts of a fidelity one by one, and everything else (the passes, the
convolutions) as it is (`transfer_weights`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aimnet2mult.config.builder import ConfigError, nearest
from aimnet2mult.constants import FIDELITY_OFFSET, MAX_ATOMIC_NUMBER, element_names
from aimnet2mult.data.base import FIDELITY_KEY, Sample
from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import (
    HEAD_KEY,
    CheckpointError,
    Layout,
    build_model,
    layout_of_weights,
    names_in_checkpoint,
    unused_copies,
)
from aimnet2mult.models.charge_channels import n_channels, with_two_channels
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table
from aimnet2mult.modules import Forces
from aimnet2mult.nbops import decode_fidelity, encode_fidelity
from aimnet2mult.train.energy_offsets import portions, start_atomic_shifts, without_offsets
from aimnet2mult.utils.text import element_ranges, text_table

READOUT_PREFIXES = ("outputs.", "shared_readouts.", "fidelity_readouts.")
"""Weights that a model may have and another not; all others must agree."""

MEASURED_MOLECULES = 200
"""Molecules of a new fidelity on which predictions of the old ones are compared."""


def layout_of_model(model: nn.Module) -> Layout:
    """Return how the weights of a model are spread over fidelities."""
    weights = model.state_dict()
    return Layout(
        num_fidelities=int(getattr(model, "num_fidelities", 1)),
        offset=int(getattr(model, "fidelity_offset", FIDELITY_OFFSET)),
        heads=any(HEAD_KEY.fullmatch(key) for key in weights),
        rows=weights["afv.weight"].shape[0],
    )


def fidelity_number(name: str, names: Mapping[int, str], where: str) -> int:
    """Return the number of a fidelity from its name, or from its number as text.

    Raises
    ------
    ConfigError
        There is no such fidelity; the message begins with ``where`` and offers the nearest names.
    """
    by_name = {known: f for f, known in names.items()}
    if name in by_name:
        return by_name[name]
    if name.isdecimal() and int(name) in names:
        return int(name)
    raise ConfigError(f"{where}: there is no fidelity {name}; {nearest(name, list(by_name))}")


# --------------------------------------------------------------------------------------------------
# where each fidelity starts
# --------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """From which fidelity of the checkpoint a fidelity of the model starts, and why, for the log."""

    source: int
    reason: str


def start_from_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    model_config: Mapping[str, Any],
    dataset: MixedFidelityDataset,
    indices: np.ndarray,
    names: Mapping[int, str],
    init_from: Mapping[str, str],
) -> list[str]:
    """Start the model of a run from a checkpoint.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    checkpoint : mapping
        As `models.base.load_checkpoint` returns it.
    model_config : mapping
        ``class`` and ``kwargs`` of the single-fidelity model.
    dataset, indices
        Data of the run, and which of its molecules are trained on, (n,) int.
    names : mapping
        Name of each fidelity of the model.
    init_from : mapping
        As in `named_sources`.

    Returns
    -------
    list of str
        Lines for the log: where each fidelity starts, the table of what was loaded, initialised and ignored, and
        elements that have to be learned from the start.

    Raises
    ------
    CheckpointError, ConfigError
        As `named_sources`, `closest_fidelities` and `transfer_weights`; the model is left as it was.
    """
    lines = []
    if n_channels(checkpoint["model"]) == 1 and getattr(model, "num_charge_channels", 1) == 2:
        checkpoint = {**checkpoint, "model": with_two_channels(checkpoint["model"])}
        lines.append(
            "one charge channel becomes two: alpha and beta start equal, each with half of the charges (updates after "
            "the first pass are halved approximately)"
        )
    known = names_in_checkpoint(checkpoint, _layout(checkpoint, dataset.fidelity_offset).num_fidelities)
    starts = named_sources(checkpoint, names, init_from, dataset.fidelity_offset)
    if new := {f: name for f, name in names.items() if f not in starts}:
        measured = closest_fidelities(checkpoint, model_config, dataset, indices, new)
        starts |= {f: Start(closest.source, closest.text(known)) for f, closest in measured.items()}
    sources = {f: start.source for f, start in starts.items()}
    rows = transfer_weights(model, checkpoint, sources, names)
    lines += [f"{names[f]} starts from {known[start.source]} ({start.reason})" for f, start in sorted(starts.items())]
    lines += text_table(TransferRow._fields, rows)
    for f, numbers in new_species(model, checkpoint, dataset.species, sources).items():
        lines.append(f"{names[f]} learns elements that the checkpoint does not know: {element_names(numbers)}")
    if checkpoint.get("sae_with_shifts"):
        lines.append("self-atomic energies, and shifts that were learned on top of them, are taken out of the weights")
        lines += start_atomic_shifts(model, dataset, indices, names)
    return lines


def named_sources(
    checkpoint: Mapping[str, Any],
    names: Mapping[int, str],
    init_from: Mapping[str, str],
    default_offset: int = FIDELITY_OFFSET,
) -> dict[int, Start]:
    """Where fidelities start that need no measurement, because the settings or their names say so.

    Parameters
    ----------
    checkpoint : mapping
        As `models.base.load_checkpoint` returns it.
    names : mapping
        Name of each fidelity of the model.
    init_from : mapping
        {fidelity of the model: fidelity of the checkpoint}, by names or by numbers as text.
    default_offset : int
        Distance of element types, for checkpoints that do not tell.

    Returns
    -------
    dict
        Without fidelities that are new and could start from more than one. Where the fidelities of the model or of
        the checkpoint have numbers instead of names (``fid0``, ``fid1``, ...), equal numbers belong together.

    Raises
    ------
    ConfigError
        ``init_from`` names a fidelity that does not exist, or one of the model twice.
    """
    known = names_in_checkpoint(checkpoint, _layout(checkpoint, default_offset).num_fidelities)
    starts: dict[int, Start] = {}
    for new, old in init_from.items():
        f = fidelity_number(new, names, "init_from")
        if f in starts:
            raise ConfigError(f"init_from.{new}: {names[f]} is there twice, by its name and by its number; remove one")
        starts[f] = Start(fidelity_number(old, known, f"init_from.{new}: in the checkpoint"), "init_from")
    by_number = _are_numbers(names) or _are_numbers(known)
    for f, name in names.items():
        if f in starts:
            continue
        same = [k for k, other in known.items() if other == name]
        if same:
            starts[f] = Start(same[0], "the same name")
        elif len(known) == 1:
            starts[f] = Start(0, "the only one of the checkpoint")
        elif by_number and f in known:
            starts[f] = Start(f, "the same number")
    return dict(sorted(starts.items()))


def _are_numbers(names: Mapping[int, str]) -> bool:
    """Tell whether fidelities have no names but the numbers that stand in for them."""
    return all(name == f"fid{f}" for f, name in names.items())


def _layout(checkpoint: Mapping[str, Any], default_offset: int) -> Layout:
    return layout_of_weights(checkpoint["model"], checkpoint, default_offset)


@dataclass(frozen=True)
class Closest:
    """Which fidelity of a checkpoint predicts the labels of a new one best.

    Attributes
    ----------
    source : int
        That fidelity.
    quantity, unit : str
        What was compared.
    errors : dict
        Fidelity of the checkpoint -> its error.
    n_molecules : int
        Number of molecules on which it was measured.
    """

    source: int
    quantity: str
    unit: str
    errors: dict[int, float]
    n_molecules: int

    def text(self, names: Mapping[int, str]) -> str:
        """Say what was measured: ``closest by force RMSE on 200 molecules: dft 0.12, gfn2 0.4 eV/Å``."""
        numbers = ", ".join(f"{names[f]} {error:.4g}" for f, error in self.errors.items())
        return f"closest by {self.quantity} on {self.n_molecules} molecules: {numbers} {self.unit}"


def closest_fidelities(
    checkpoint: Mapping[str, Any],
    model_config: Mapping[str, Any],
    dataset: MixedFidelityDataset,
    indices: np.ndarray,
    names: Mapping[int, str],
    max_molecules: int = MEASURED_MOLECULES,
) -> dict[int, Closest]:
    """Find out which fidelity of a checkpoint is the closest to each of some new ones.

    Each fidelity of the checkpoint predicts the same molecules of the new one, evenly spaced among those that are
    trained on. With force labels their RMSE counts, else that of the energies after removal of the offsets per
    element that fit best, so that another reference of the energies does not matter. Only molecules count whose
    elements all compared fidelities know. Everything happens on the CPU and without random numbers, so that each
    process finds the same.

    Parameters
    ----------
    checkpoint : mapping
        As `models.base.load_checkpoint` returns it.
    model_config : mapping
        ``class`` and ``kwargs`` of the single-fidelity model.
    dataset, indices
        Data of the run, and which of its molecules are trained on, (n,) int.
    names : mapping
        The new fidelities, those to be measured: number in ``dataset`` -> name.
    max_molecules : int
        Number of molecules to look at.

    Returns
    -------
    dict
        New fidelity -> `Closest`.

    Raises
    ------
    CheckpointError
        The checkpoint is of another architecture.
    ConfigError
        Nothing to measure by: no molecules, labels or common elements. The message asks for ``init_from``.
    """
    layout = _layout(checkpoint, dataset.fidelity_offset)
    with torch.random.fork_rng(devices=[]):  # the initial weights, all replaced, use up no random numbers of the run
        model = build_model(dict(model_config), layout.num_fidelities, layout.offset, layout.heads)
    transfer_weights(model, checkpoint)
    forces_model = Forces(model.eval())
    elements = {k: set(known_elements(checkpoint, layout, k)) for k in range(layout.num_fidelities)}
    result = {}
    for f, name in names.items():
        mine = indices[dataset.fidelities[indices] == f]
        places = np.linspace(0, len(mine) - 1, min(len(mine), max_molecules)).round().astype(int)
        samples = dataset.__getitems__(mine[places].tolist())
        plain = [{**s, "numbers": decode_fidelity(s["numbers"], dataset.fidelity_offset)[0]} for s in samples]
        result[f] = _closest(forces_model, layout, plain, elements, name)
    return result


def _closest(
    model: Forces, layout: Layout, samples: Sequence[Sample], elements: Mapping[int, set[int]], name: str
) -> Closest:
    """Compare the fidelities of a model on samples with plain atomic numbers."""
    remedy = f"say in init_from.{name} which fidelity of the checkpoint it starts from"
    label = next((key for key in ("forces", "energy") if any(s.get(key) is not None for s in samples)), None)
    if label is None:
        raise ConfigError(f"{name} has neither force nor energy labels to measure which one is closest; {remedy}")
    labelled = [s for s in samples if s.get(label) is not None]
    present = [set(s["numbers"].tolist()) for s in labelled]
    usable = {k: {i for i, found in enumerate(present) if found <= known} for k, known in elements.items()}
    # Those that know the fewest molecules drop out until there are molecules that all of the others know.
    candidates = sorted(usable, key=lambda k: (-len(usable[k]), k))
    while not (common := set.intersection(*(usable[k] for k in candidates))) and len(candidates) > 1:
        candidates.pop()
    chosen = [labelled[i] for i in sorted(common)]
    if not chosen:
        raise ConfigError(f"{name}: no fidelity of the checkpoint knows the elements of its molecules; {remedy}")
    errors = {k: _error(model, layout, chosen, k, label, f"{name}; {remedy}") for k in sorted(candidates)}
    finite = [k for k, error in errors.items() if np.isfinite(error)]
    if not finite:
        raise ConfigError(f"{name}: the predictions of the checkpoint are not finite; {remedy}")
    quantity, unit = ("force RMSE", "eV/Å") if label == "forces" else ("spread of energies", "eV")
    # Rounded, so that the last digits, in which processors differ, do not decide between equals.
    source = min(finite, key=lambda k: (float(f"{errors[k]:.6g}"), k))
    return Closest(source, quantity, unit, errors, len(chosen))


def _error(model: Forces, layout: Layout, samples: Sequence[Sample], fidelity: int, label: str, where: str) -> float:
    """RMSE of the predictions of a fidelity: of forces, or of energies without offsets per element."""
    differences, counts = [], []
    for part in portions(samples):
        x, y = collate(part)
        plain = x["numbers"]
        fidelities = torch.full_like(x[FIDELITY_KEY], fidelity)
        x = {**x, "numbers": encode_fidelity(plain, fidelity, layout.offset), FIDELITY_KEY: fidelities}
        with torch.no_grad():
            difference = model(x, compute_forces=label == "forces")[label].double() - y[label].double()
        differences.append(difference[plain > 0].flatten() if label == "forces" else difference)
        counts.append(plain.numpy())
    values = torch.cat(differences).numpy()
    if label == "energy" and np.isfinite(values).all():
        values = without_offsets(values, counts, where)
    return float(np.sqrt(np.mean(values**2)))


# --------------------------------------------------------------------------------------------------
# elements
# --------------------------------------------------------------------------------------------------


def known_elements(checkpoint: Mapping[str, Any], layout: Layout, fidelity: int) -> list[int]:
    """Elements that a fidelity of a checkpoint knows.

    These have a row in the embedding, one that is not NaN (the mark of unknown elements in AIMNet2 files), and are
    among the checkpoint's ``species`` if it lists them.

    Returns
    -------
    list of int
        Atomic numbers, ascending.
    """
    block = _block_of(checkpoint["model"]["afv.weight"], layout, fidelity)
    usable = [z for z in range(1, len(block) + 1) if z <= MAX_ATOMIC_NUMBER and not block[z - 1].isnan().any()]
    species = (checkpoint.get("species") or {}).get(fidelity)
    return usable if species is None else [z for z in usable if z in species]


def _block_of(table: Tensor, layout: Layout, fidelity: int) -> Tensor:
    """Rows of a table that belong to a fidelity, that of Z = 1 first."""
    rows = layout.block(fidelity)
    return table[rows.start : rows.stop]


def new_species(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    species: Mapping[int, Sequence[int]],
    sources: Mapping[int, int] | None = None,
) -> dict[int, list[int]]:
    """Elements of the data whose weights do not come from training: they have to be learned from the start.

    Parameters
    ----------
    model : nn.Module
        The model that `transfer_weights` fills.
    checkpoint : mapping
        What it is filled from.
    species : mapping
        Elements in the data of each fidelity.
    sources : mapping, optional
        As in `transfer_weights`.

    Returns
    -------
    dict
        Fidelity -> atomic numbers, without fidelities where all elements are known.
    """
    own = layout_of_model(model)
    layout = _layout(checkpoint, own.offset)
    starts = _complete(sources or {}, own.num_fidelities, layout.num_fidelities)
    unknown = {f: sorted(set(zs) - set(known_elements(checkpoint, layout, starts[f]))) for f, zs in species.items()}
    return {f: numbers for f, numbers in unknown.items() if numbers}


# --------------------------------------------------------------------------------------------------
# weights
# --------------------------------------------------------------------------------------------------


class TransferRow(NamedTuple):
    """A line of the table of what was loaded, initialised and ignored.

    Attributes
    ----------
    into, origin : str
        Module or table rows of the model, and of the checkpoint; ``-`` for none.
    weights : int
        How many numbers.
    event : str
        What happened.
    """

    into: str
    origin: str
    weights: int
    event: str


def transfer_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    sources: Mapping[int, int] | None = None,
    names: Mapping[int, str] | None = None,
) -> list[TransferRow]:
    """Start a model from the weights of a checkpoint that may have other fidelities.

    Weights that the checkpoint does not have keep the values of the model. Without an error the model is changed in
    place; with one it is left as it was.

    Parameters
    ----------
    model : nn.Module
        `AIMNet2` or `MixedFidelityAIMNet2`.
    checkpoint : mapping
        As `models.base.load_checkpoint` returns it; ``model`` holds the weights.
    sources : mapping, optional
        {fidelity of the model: fidelity of the checkpoint}; where it does not say, the one of the same number, or the
        only one.
    names : mapping, optional
        Name of each fidelity of the model, for the table; default ``fid0``, ``fid1``, ...

    Returns
    -------
    list of TransferRow
        What was loaded, initialised and ignored.

    Raises
    ------
    CheckpointError
        The checkpoint is of another architecture: a weight outside the readouts is missing, left over, or has
        another shape, or the radial basis is another. The message names the first few keys.
    ValueError
        ``sources`` names a fidelity that does not exist, or does not say where a new one starts.
    """
    transfer = _Transfer(model, checkpoint, sources or {}, names)
    model.load_state_dict(transfer.values())
    if isinstance(model, AIMNet2):
        model.update_keys_and_cutoffs()
    transfer.note_what_is_ignored()
    return [TransferRow(into, origin, count, event) for (into, origin, event), count in transfer.counts.items()]


def _complete(sources: Mapping[int, int], num_fidelities: int, num_in_checkpoint: int) -> dict[int, int]:
    """Check ``sources`` of `transfer_weights`, and add what they leave out."""
    for fidelity, source in sources.items():
        if not 0 <= fidelity < num_fidelities:
            raise ValueError(f"the model has no fidelity {fidelity} (fidelities 0 to {num_fidelities - 1})")
        if not 0 <= source < num_in_checkpoint:
            raise ValueError(f"the checkpoint has no fidelity {source} (fidelities 0 to {num_in_checkpoint - 1})")
    common = range(min(num_fidelities, num_in_checkpoint))
    complete = {**dict(zip(common, common, strict=True)), **sources}
    if num_in_checkpoint == 1:
        complete = dict.fromkeys(range(num_fidelities), 0)
    for f in range(num_fidelities):
        if f not in complete:
            raise ValueError(
                f"fidelity {f} is new: say from which one of the checkpoint it starts (0 to {num_in_checkpoint - 1})"
            )
    return dict(sorted(complete.items()))


class _Transfer:
    """The new values of a model's weights, and what happened to each of them; parameters as in `transfer_weights`."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Mapping[str, Any],
        sources: Mapping[int, int],
        names: Mapping[int, str] | None,
    ) -> None:
        self.own, self.own_layout = model.state_dict(), layout_of_model(model)
        self.own_names = names or {f: f"fid{f}" for f in range(self.own_layout.num_fidelities)}
        unused = unused_copies(checkpoint["model"])
        self.copies = {key: value for key, value in checkpoint["model"].items() if key in unused}
        self.weights = {key: value for key, value in checkpoint["model"].items() if key not in unused}
        self.layout = _layout(checkpoint, self.own_layout.offset)
        self.names = names_in_checkpoint(checkpoint, self.layout.num_fidelities)
        self.sources = _complete(sources, self.own_layout.num_fidelities, self.layout.num_fidelities)
        # Entries that come from the model file and are not learned: radial basis, cutoffs.
        self.settings = {key for key, _ in model.named_buffers()} | {key for key in self.own if key.startswith("aev.")}
        self.used: set[str] = set()
        self.counts: dict[tuple[str, str, str], int] = {}  # into, origin, event -> weights
        self.problems: list[str] = []

    def values(self) -> dict[str, Tensor]:
        """Return the new value of each weight; refuse a checkpoint of another architecture."""
        values = {key: (self._table if is_type_table(key) else self._weight)(key, v) for key, v in self.own.items()}
        for key in self.weights:
            if key not in self.used and not key.startswith(READOUT_PREFIXES):
                self.problems.append(f"{key} is not in the model")
        if self.problems:
            shown = "; ".join(self.problems[:4])
            more = f"; and {len(self.problems) - 4} more" if len(self.problems) > 4 else ""
            raise CheckpointError(
                f"the checkpoint is of another architecture: {shown}{more}. Use the model file of the checkpoint"
            )
        return values

    def note_what_is_ignored(self) -> None:
        """Note what of the checkpoint was not used."""
        left_out = sorted(set(range(self.layout.num_fidelities)) - set(self.sources.values()))
        for f in left_out:
            rows = _block_of(self.weights["afv.weight"], self.layout, f)
            self._note("-", f"afv, rows of {self.names[f]}", rows.numel(), NO_START)
        for key, value in self.weights.items():
            if key not in self.used:
                head = HEAD_KEY.fullmatch(key)
                of_left_out = head is not None and int(head[1]) in left_out
                self._note("-", _module(key), value.numel(), NO_START if of_left_out else "ignored: not in the model")
        prefixes = ", ".join(sorted({key.partition(".")[0] for key in self.copies}))
        for value in self.copies.values():
            self._note("-", prefixes, value.numel(), "ignored: copies that a mixed model does not use")

    def _note(self, into: str, origin: str, count: int, event: str) -> None:
        self.counts[into, origin, event] = self.counts.get((into, origin, event), 0) + count

    def _source_key(self, key: str, fidelity: int) -> str | None:
        """Name in the checkpoint of a weight of the model; None if the checkpoint does not have it.

        ``fidelity`` is that of the model for which a weight of readouts is asked for.
        """
        name = key
        if match := HEAD_KEY.fullmatch(key):
            name = match[2]
        elif key.startswith(READOUT_PREFIXES):
            name = key.split(".", 1)[1]
        else:
            return key if key in self.weights else None
        candidates = [f"outputs.{name}"]
        if self.layout.heads:
            candidates = [f"fidelity_readouts.{self.sources[fidelity]}.{name}", f"shared_readouts.{name}"]
        return next((candidate for candidate in candidates if candidate in self.weights), None)

    def _weight(self, key: str, value: Tensor) -> Tensor:
        """New value of a weight that is no table."""
        match = HEAD_KEY.fullmatch(key)
        source = self._source_key(key, int(match[1]) if match else 0)
        if source is None:
            if key.startswith(READOUT_PREFIXES):
                self._note(_module(key), "-", value.numel(), NOT_IN_CHECKPOINT)
            else:
                self.problems.append(f"{key} is not in the checkpoint")
            return value
        given = self.weights[source]
        self.used.add(source)
        if given.shape != value.shape:
            self._misfit(key, given, value)
            return value
        if key in self.settings:
            self._compare_setting(key, source, given, value)
            return value
        self._note(_module(key), _module(source), value.numel(), _loaded(given, value))
        return given.to(value)

    def _compare_setting(self, key: str, source: str, given: Tensor, value: Tensor) -> None:
        event = "as in the model file"
        if not torch.allclose(given.to(value), value, rtol=1e-4, atol=1e-6):
            if key.startswith("aev."):
                self.problems.append(f"{key} is {_numbers(given)} in the checkpoint and {_numbers(value)} in the model")
            name = key.rpartition(".")[2]
            event = f"differs: {name} stays {_numbers(value)} ({_numbers(given)} in the checkpoint)"
        self._note(_module(key), _module(source), value.numel(), event)

    def _table(self, key: str, value: Tensor) -> Tensor:
        """New value of a table: the rows of each fidelity from those of its source, where it has them.

        Of a table among the readouts of one fidelity, only the rows of that fidelity are ever read.
        """
        table = value.clone()
        match = HEAD_KEY.fullmatch(key)
        for fidelity in [int(match[1])] if match else self.sources:
            source = self._source_key(key, fidelity)
            target = _block_of(table, self.own_layout, fidelity)  # a view
            into = f"{_module(key)}, rows of {self.own_names[fidelity]}"
            if source is None:
                self._note(into, "-", target.numel(), NOT_IN_CHECKPOINT)
                continue
            given = self.weights[source]
            self.used.add(source)
            if given.shape[1:] != value.shape[1:]:
                self._misfit(key, given, value)
                return value
            old = self.sources[fidelity]
            rows = _block_of(given, self.layout, old)
            # Of elements that the checkpoint marks as unknown, the other tables hold nothing either.
            known = ~_block_of(self.weights["afv.weight"], self.layout, old).isnan().any(dim=1)
            n = min(len(rows), len(known), len(target))
            usable = known[:n] & ~rows[:n].isnan().any(dim=1)
            target[:n][usable] = rows[:n][usable].to(value)
            count = int(usable.sum()) * value[0].numel()
            self._note(into, f"{_module(source)}, rows of {self.names[old]}", count, _loaded(given, value))
            unknown = [z for z in range(1, min(len(target), MAX_ATOMIC_NUMBER) + 1) if z > n or not usable[z - 1]]
            if unknown:
                event = f"initial values: the checkpoint does not know {element_ranges(unknown)}"
                self._note(into, "-", len(unknown) * value[0].numel(), event)
        return table

    def _misfit(self, key: str, given: Tensor, value: Tensor) -> None:
        self.problems.append(f"{key} is {tuple(given.shape)} in the checkpoint and {tuple(value.shape)} in the model")


NOT_IN_CHECKPOINT = "initial values: not in the checkpoint"
NO_START = "ignored: nothing starts from it"
"""What happens to readouts that are new, and to a fidelity of the checkpoint that none of the model starts from."""


def _loaded(given: Tensor, value: Tensor) -> str:
    if given.dtype == value.dtype:
        return "loaded"
    return f"loaded, {given.dtype} to {value.dtype}".replace("torch.", "")


def _module(key: str) -> str:
    """Name of the module that a weight belongs to: ``mlps``, ``outputs.energy_mlp``."""
    depth = 3 if HEAD_KEY.fullmatch(key) else 2 if key.startswith(READOUT_PREFIXES) else 1
    return ".".join(key.split(".")[:depth])


def _numbers(x: Tensor) -> str:
    values = x.flatten().tolist()
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} ... {values[-1]:g}"
