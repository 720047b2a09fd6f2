"""Transfer learning: weights of one model as the start of another with other fidelities.

Fidelity f of the model starts from fidelity s(f) of the checkpoint: the same number where the checkpoint has it, 0
where it does not (or what ``init_from`` says). Tables with a row per element type (embedding, atomic shifts) are taken
block by block, readouts of a fidelity one by one, and everything else (the passes, the convolutions) as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aimnet2mult.constants import FIDELITY_OFFSET, MAX_ATOMIC_NUMBER, element_names
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import HEAD_KEY, CheckpointError, Layout, layout_of_weights, unused_copies
from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table

READOUT_PREFIXES = ("outputs.", "shared_readouts.", "fidelity_readouts.")
"""Weights that a model may have and another not; all others must agree."""


def layout_of_model(model: nn.Module) -> Layout:
    """Return how the weights of a model are spread over fidelities."""
    weights = model.state_dict()
    return Layout(
        num_fidelities=int(getattr(model, "num_fidelities", 1)),
        offset=int(getattr(model, "fidelity_offset", FIDELITY_OFFSET)),
        heads=any(HEAD_KEY.fullmatch(key) for key in weights),
        rows=weights["afv.weight"].shape[0],
    )


def fidelity_sources(
    num_fidelities: int, num_in_checkpoint: int, init_from: Mapping[int, int] | None = None
) -> dict[int, int]:
    """Fidelity of the checkpoint from which each fidelity of the model starts.

    Parameters
    ----------
    num_fidelities, num_in_checkpoint : int
        Fidelities of the model and of the checkpoint.
    init_from : mapping, optional
        {fidelity of the model: fidelity of the checkpoint}, where it shall be another than the default: the same, or
        0 if the checkpoint does not have the same.

    Raises
    ------
    ValueError
        ``init_from`` names a fidelity that does not exist.
    """
    sources = {f: f if f < num_in_checkpoint else 0 for f in range(num_fidelities)}
    for fidelity, source in (init_from or {}).items():
        if fidelity not in sources:
            raise ValueError(f"init_from: the model has no fidelity {fidelity} (fidelities 0 to {num_fidelities - 1})")
        if not 0 <= source < num_in_checkpoint:
            raise ValueError(
                f"init_from.{fidelity}: the checkpoint has no fidelity {source} "
                f"(fidelities 0 to {num_in_checkpoint - 1})"
            )
        sources[fidelity] = source
    return sources


def sources_by_name(names: Mapping[int, str], checkpoint: Mapping[str, Any]) -> dict[int, int]:
    """Fidelity of the checkpoint for each fidelity of a model, where they have names in common.

    Parameters
    ----------
    names : mapping
        Name of each fidelity of the model.
    checkpoint : mapping
        As `models.base.load_checkpoint` returns it.

    Returns
    -------
    dict
        {fidelity of the model: fidelity of the checkpoint}, as ``init_from`` of `transfer_weights` takes it: equal
        names belong together, and a name that the checkpoint does not have starts from its fidelity 0. Empty if no
        name is common to both (numbers decide then).
    """
    known = {name: f for f, name in (checkpoint.get("fidelity_names") or {}).items()}
    if not set(names.values()) & set(known):
        return {}
    return {f: known.get(name, 0) for f, name in names.items()}


def log_of_names(names: Mapping[int, str], checkpoint: Mapping[str, Any], sources: Mapping[int, int]) -> list[str]:
    """Say what names decide about a transfer, one sentence each, for the log; ``sources`` as of `sources_by_name`."""
    known = checkpoint.get("fidelity_names") or {}
    if not known:
        return []
    if not sources:
        listed = ", ".join(known[f] for f in sorted(known))
        return [f"no name in common with the checkpoint ({listed}): its fidelities are taken by their numbers"]
    new = [names[f] for f in sorted(names) if names[f] not in known.values()]
    first = f"{known[0]} (fidelity 0 of the checkpoint)"
    return [f"{name} is new: its embedding and readouts start from {first}" for name in new]


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
    init_from: Mapping[int, int] | None = None,
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
    init_from : mapping, optional
        As in `transfer_weights`.

    Returns
    -------
    dict
        Fidelity -> atomic numbers, without fidelities where all elements are known.
    """
    own = layout_of_model(model)
    layout = layout_of_weights(checkpoint["model"], checkpoint, own.offset)
    sources = fidelity_sources(own.num_fidelities, layout.num_fidelities, init_from)
    result = {}
    for fidelity, numbers in species.items():
        known = set(known_elements(checkpoint, layout, sources[fidelity]))
        if unknown := sorted(set(numbers) - known):
            result[fidelity] = unknown
    return result


def transfer_weights(
    model: nn.Module, checkpoint: Mapping[str, Any], init_from: Mapping[int, int] | None = None
) -> list[str]:
    """Start a model from the weights of a checkpoint that may have other fidelities.

    Weights that the checkpoint does not have keep the values of the model. Without an error the model is changed in
    place; with one it is left as it was.

    Parameters
    ----------
    model : nn.Module
        `AIMNet2` or `MixedFidelityAIMNet2`.
    checkpoint : mapping
        As `models.base.load_checkpoint` returns it; ``model`` holds the weights.
    init_from : mapping, optional
        {fidelity of the model: fidelity of the checkpoint} where it is not the default (`fidelity_sources`).

    Returns
    -------
    list of str
        What was loaded, initialised and ignored, one sentence each, for the log.

    Raises
    ------
    CheckpointError
        The checkpoint is of another architecture: a weight outside the readouts is missing, left over, or has
        another shape, or the radial basis is another. The message names the first few keys.
    ValueError
        ``init_from`` names a fidelity that does not exist.
    """
    own = layout_of_model(model)
    copies = unused_copies(checkpoint["model"])
    weights = {key: value for key, value in checkpoint["model"].items() if key not in copies}
    layout = layout_of_weights(weights, checkpoint, own.offset)
    sources = fidelity_sources(own.num_fidelities, layout.num_fidelities, init_from)
    settings = {key for key, _ in model.named_buffers()} | {key for key in model.state_dict() if key.startswith("aev.")}
    transfer = _Transfer(model.state_dict(), own, weights, layout, sources, settings)
    transfer.collect()
    transfer.check()

    model.load_state_dict(transfer.values)
    if isinstance(model, AIMNet2):
        model.update_keys_and_cutoffs()
    log = transfer.log()
    if copies:
        log.append(f"ignored {len(copies)} copies of readouts that a mixed model of this layout does not use")
    return log


class _Transfer:
    """The new values of a model's weights, and the notes for messages that arise on the way.

    Parameters
    ----------
    own : mapping
        State dict of the model.
    own_layout, layout : Layout
        Of the model and of the checkpoint.
    weights : mapping
        State dict of the checkpoint, without unused copies.
    sources : mapping
        Fidelity of the model -> fidelity of the checkpoint.
    settings : set of str
        Entries that come from the model file and are not learned (radial basis, cutoffs).
    """

    def __init__(
        self,
        own: Mapping[str, Tensor],
        own_layout: Layout,
        weights: Mapping[str, Tensor],
        layout: Layout,
        sources: Mapping[int, int],
        settings: set[str],
    ) -> None:
        self.own, self.own_layout = own, own_layout
        self.weights, self.layout = weights, layout
        self.sources, self.settings = sources, settings
        self.values: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.initialised: list[str] = []
        self.kept: list[str] = []
        self.converted: set[str] = set()
        self.problems: list[str] = []

    def collect(self) -> None:
        """Find the new value of each weight."""
        for key, value in self.own.items():
            self.values[key] = self._table(key, value) if is_type_table(key) else self._weight(key, value)

    def check(self) -> None:
        """Refuse a checkpoint of another architecture."""
        for key in self.weights:
            if key not in self.used and not key.startswith(READOUT_PREFIXES):
                self.problems.append(f"{key} is not in the model")
        if self.problems:
            shown = "; ".join(self.problems[:4])
            more = f"; and {len(self.problems) - 4} more" if len(self.problems) > 4 else ""
            raise CheckpointError(
                f"the checkpoint is of another architecture: {shown}{more}. Use the model file of the checkpoint"
            )

    def log(self) -> list[str]:
        """Return a sentence for everything that a user should know about the transfer."""
        n_own, n_given = self.own_layout.num_fidelities, self.layout.num_fidelities
        log = [f"loaded weights of {_fidelities(range(n_given))} into a model of {_fidelities(range(n_own))}"]
        if self.own_layout.rows != self.layout.rows:
            verb = "grows" if self.own_layout.rows > self.layout.rows else "shrinks"
            log.append(f"the table of element types {verb} from {self.layout.rows} to {self.own_layout.rows} rows")
        for fidelity, source in self.sources.items():
            if fidelity != source:
                log.append(f"fidelity {fidelity} starts from fidelity {source} of the checkpoint")
        log += self._log_readouts()
        left_out = sorted(set(range(n_given)) - set(self.sources.values()))
        if left_out:
            log.append(f"ignored {_fidelities(left_out)} of the checkpoint")
        for fidelity, source in self.sources.items():
            known = known_elements({"model": self.weights}, self.layout, source)
            if len(known) < MAX_ATOMIC_NUMBER:
                log.append(
                    f"fidelity {fidelity}: the checkpoint has embeddings of {_element_ranges(known)} only; the other "
                    "elements keep the initial ones of the model"
                )
        if self.converted:
            log.append(f"converted to the precision of the model: {', '.join(sorted(self.converted))}")
        if self.initialised:
            log.append(f"not in the checkpoint, initialised anew: {_modules(self.initialised)}")
        if self.kept:
            log.append(f"differs from the checkpoint, the model's value is kept: {', '.join(self.kept)}")
        ignored = [k for k in self.weights if k not in self.used and not self._of_ignored_fidelity(k)]
        if ignored:
            log.append(f"not in the model, ignored: {_modules(ignored)}")
        return log

    def _log_readouts(self) -> list[str]:
        if self.own_layout.heads and not self.layout.heads and self.layout.num_fidelities > 1:
            return ["the readouts of each fidelity start from the common ones of the checkpoint"]
        if self.layout.heads and not self.own_layout.heads and self.own_layout.num_fidelities > 1:
            return [f"the common readouts start from those of fidelity {self.sources[0]}"]
        return []

    def _of_ignored_fidelity(self, key: str) -> bool:
        match = HEAD_KEY.fullmatch(key)
        return match is not None and int(match[1]) not in self.sources.values()

    def _source_key(self, key: str, block: int) -> str | None:
        """Name in the checkpoint of a weight of the model; None if the checkpoint does not have it.

        ``block`` is the fidelity of the model whose rows of a table are asked for; it decides about tables of
        readouts that the fidelities of the model have in common.
        """
        name, fidelity = key, block
        if match := HEAD_KEY.fullmatch(key):
            fidelity, name = int(match[1]), match[2]
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
        source = self._source_key(key, block=0)
        if source is None:
            if key.startswith(READOUT_PREFIXES):
                self.initialised.append(key)
            else:
                self.problems.append(f"{key} is not in the checkpoint")
            return value
        given = self.weights[source]
        self.used.add(source)
        if given.shape != value.shape:
            self._misfit(key, given, value)
            return value
        if key in self.settings:
            self._compare_setting(key, given, value)
            return value
        return self._converted(key, given, value)

    def _compare_setting(self, key: str, given: Tensor, value: Tensor) -> None:
        if torch.allclose(given.to(value), value, rtol=1e-4, atol=1e-6):
            return
        if key.startswith("aev."):
            self.problems.append(f"{key} is {_numbers(given)} in the checkpoint and {_numbers(value)} in the model")
        else:
            self.kept.append(f"{key} ({_numbers(value)} instead of {_numbers(given)})")

    def _table(self, key: str, value: Tensor) -> Tensor:
        """New value of a table: the rows of each fidelity from those of its source, where it has them."""
        table = value.clone()
        for fidelity, source_fidelity in self.sources.items():
            source = self._source_key(key, fidelity)
            if source is None:
                if key not in self.initialised:
                    self.initialised.append(key)
                continue
            given = self.weights[source]
            self.used.add(source)
            if given.shape[1:] != value.shape[1:]:
                self._misfit(key, given, value)
                return value
            rows = _block_of(given, self.layout, source_fidelity)
            # Of elements that the checkpoint marks as unknown, the other tables hold nothing either.
            known = ~_block_of(self.weights["afv.weight"], self.layout, source_fidelity).isnan().any(dim=1)
            target = _block_of(table, self.own_layout, fidelity)  # a view
            n = min(len(rows), len(known), len(target))
            usable = known[:n] & ~rows[:n].isnan().any(dim=1)
            target[:n][usable] = self._converted(key, rows[:n][usable], value)
        return table

    def _converted(self, key: str, given: Tensor, value: Tensor) -> Tensor:
        if given.dtype != value.dtype:
            self.converted.add(f"{key} ({given.dtype} to {value.dtype})".replace("torch.", ""))
        return given.to(value)

    def _misfit(self, key: str, given: Tensor, value: Tensor) -> None:
        self.problems.append(f"{key} is {tuple(given.shape)} in the checkpoint and {tuple(value.shape)} in the model")


def _fidelities(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"fidelity {numbers[0]}"
    return f"fidelities {', '.join(map(str, numbers))}"


def _element_ranges(numbers: Sequence[int]) -> str:
    """Names of elements, runs of neighbours in short: ``H (1) to Ne (10), Br (35)``."""
    runs: list[list[int]] = []
    for z in numbers:
        if runs and z == runs[-1][-1] + 1:
            runs[-1].append(z)
        else:
            runs.append([z])
    return ", ".join(
        f"{element_names(run[:1])} to {element_names(run[-1:])}" if len(run) > 2 else element_names(run) for run in runs
    )


def _modules(keys: Sequence[str]) -> str:
    """Names of the modules that keys belong to, instead of each weight: ``outputs.energy_mlp``."""
    names = []
    for key in keys:
        depth = 3 if HEAD_KEY.fullmatch(key) else 2
        names.append(".".join(key.split(".")[:depth]))
    return ", ".join(dict.fromkeys(names))


def _numbers(x: Tensor) -> str:
    values = x.flatten().tolist()
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} ... {values[-1]:g}"
