"""Fidelities of a checkpoint: added, dropped, renamed, reordered, merged.

``python -m aimnet2mult.tools.edit_fidelities model.pt new.pt --add ccsd=dft --drop gfn2``

A checkpoint is taken apart into what its fidelities have in common and what is a fidelity's own: rows of the tables
over element types, readouts, self-atomic energies and what else describes it. Operations act on the list of
fidelities, one after the other, and the parts are put together again. Weights of a fidelity that stays are moved,
never calculated with, so its predictions are the same to the last bit. One fidelity alone is a plain AIMNet2, and a
plain AIMNet2 can be given a second one.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.config.builder import nearest
from aimnet2mult.constants import FIDELITY_NAME, FIDELITY_OFFSET, MAX_ATOMIC_NUMBER, TYPES_PER_FIDELITY, element_names
from aimnet2mult.reference_energies import TERMS, ReferenceEnergies
from aimnet2mult.utils.cli import OrderedCommand, user_errors
from aimnet2mult.utils.text import element_ranges, text_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from aimnet2mult.models.base import Layout

logger = logging.getLogger(__name__)

DESCRIPTIONS = ("sae", "species", "fidelity_levels", "dispersion")
"""Entries of a checkpoint that say something about each of its fidelities, if it is known.

Self-atomic energies {Z: eV}; elements of the training data; level of theory; dispersion in the labels.
"""

SAE_TOLERANCE = 1e-6
"""eV; self-atomic energies that differ by less are the same."""


# --------------------------------------------------------------------------------------------------
# a checkpoint taken apart
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fidelity:
    """What is a fidelity's own.

    Attributes
    ----------
    name, origin : str
        What it is called, and what its weights come from, for people.
    tables : dict of str to Tensor
        Its rows of each table that the fidelities have in common, that of Z = 0 first.
    readouts : dict of str to Tensor
        Weights of its own readouts by their names inside; of tables, its rows.
    known : dict
        What the checkpoint says about it under each of `DESCRIPTIONS`.
    sae_problem : str
        Why its self-atomic energies have to be given.
    """

    name: str
    origin: str
    tables: dict[str, Tensor]
    readouts: dict[str, Tensor]
    known: dict[str, Any]
    sae_problem: str = ""


@dataclass
class Parts:
    """A checkpoint taken apart.

    Attributes
    ----------
    common : dict of str to Tensor
        Weights that all fidelities share, under their names in a model with several fidelities.
    padding : dict of str to Tensor
        Row 0 of each table, that of padding.
    fidelities : list of Fidelity
        In the order of their numbers.
    offset : int
        Distance of element types.
    heads : bool
        Whether fidelities have readouts of their own.
    model_config : dict or None
        ``class`` and ``kwargs`` of the single-fidelity model, if known.
    readouts_known : bool
        Whether it is known which readouts learn, so that each fidelity can have its own.
    notes : list of str
        What was left out and what to know about the result.
    """

    common: dict[str, Tensor]
    padding: dict[str, Tensor]
    fidelities: list[Fidelity]
    offset: int
    heads: bool
    model_config: dict[str, Any] | None
    readouts_known: bool
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of the fidelities."""
        return [fidelity.name for fidelity in self.fidelities]

    def find(self, name: str, option: str) -> Fidelity:
        """Return a fidelity by name.

        Raises
        ------
        ValueError
            There is none of this name.
        """
        for fidelity in self.fidelities:
            if fidelity.name == name:
                return fidelity
        raise ValueError(f"{option}: there is no fidelity {name}; {nearest(name, self.names)}")


def take_apart(
    checkpoint: Mapping[str, Any], model_config: Mapping[str, Any] | None, default_offset: int = FIDELITY_OFFSET
) -> Parts:
    """Take a checkpoint apart.

    Parameters
    ----------
    checkpoint : mapping
        As `models.base.load_checkpoint` returns it.
    model_config : mapping or None
        ``class`` and ``kwargs`` of the single-fidelity model; None if not known.
    default_offset : int
        Distance of element types, for checkpoints that do not tell.

    Raises
    ------
    CheckpointError
        The embedding fits no number of fidelities.
    """
    from aimnet2mult.models.base import HEAD_KEY, layout_of_weights, names_in_checkpoint, unused_copies
    from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table

    copies = unused_copies(checkpoint["model"])
    weights = {key: value for key, value in checkpoint["model"].items() if key not in copies}
    layout = layout_of_weights(weights, checkpoint, default_offset)
    heads = layout.heads if layout.num_fidelities > 1 else bool(checkpoint.get("use_fidelity_readouts", True))
    only = heads and layout.num_fidelities == 1  # a plain model, whose readouts may become those of a fidelity
    own_readouts = _own_readouts(model_config) if only and model_config is not None else None

    common: dict[str, Tensor] = {}
    padding: dict[str, Tensor] = {}
    tables: list[dict[str, Tensor]] = [{} for _ in range(layout.num_fidelities)]
    readouts: list[dict[str, Tensor]] = [{} for _ in range(layout.num_fidelities)]
    for key, value in weights.items():
        match = HEAD_KEY.fullmatch(key)
        owner, name = (int(match[1]), match[2]) if match else (None, key)
        if only and key.startswith("outputs."):
            name = key.partition(".")[2]
            if own_readouts is None or name.partition(".")[0] in own_readouts:
                owner = 0
            else:
                name = f"shared_readouts.{name}"
        if owner is not None:
            readouts[owner][name] = _rows(value, layout, owner) if is_type_table(key) else value
        elif is_type_table(key):
            padding[key] = value[:1]
            for f in range(layout.num_fidelities):
                tables[f][key] = _rows(value, layout, f)
        else:
            common[name] = value

    fidelities = []
    for f, name in names_in_checkpoint(checkpoint, layout.num_fidelities).items():
        about = {key: checkpoint[key][f] for key in DESCRIPTIONS if f in (checkpoint.get(key) or {})}
        fidelities.append(Fidelity(name, f"{name} ({f})", tables[f], readouts[f], about))
    config = None if model_config is None else copy.deepcopy(dict(model_config))
    known = own_readouts is not None or not only
    parts = Parts(common, padding, fidelities, layout.offset, heads, config, known)
    if copies:
        parts.notes.append(f"{len(copies)} copies of readouts, which the model does not use, are left out")
    return parts


def _rows(table: Tensor, layout: Layout, fidelity: int) -> Tensor:
    """Rows of a table from Z = 0 of a fidelity to before the next one."""
    if layout.num_fidelities == 1:
        return table
    first = fidelity * layout.offset
    return table[first : first + layout.offset]


def _own_readouts(model_config: Mapping[str, Any]) -> set[str]:
    """Names of the readouts that a fidelity may have for itself: those that learn."""
    from aimnet2mult.models.base import build_model
    from aimnet2mult.models.mixed_fidelity_aimnet2 import MixedFidelityAIMNet2

    model = build_model(model_config, 2)
    assert isinstance(model, MixedFidelityAIMNet2)
    return {name for learns, names in model.stages if learns for name in names}


# --------------------------------------------------------------------------------------------------
# operations
# --------------------------------------------------------------------------------------------------


def add(parts: Parts, text: str) -> None:
    """``new=old``: a copy of a fidelity under another name, after the others."""
    new, old = _two(text, "--add", "NEW=OLD")
    source = parts.find(old, "--add")
    _check_new(new, parts.names, "--add")
    if not parts.readouts_known:
        raise ValueError("--model: the checkpoint does not hold its model configuration; give the YAML file")
    parts.fidelities.append(replace(source, name=new, origin=f"copy of {source.origin}"))
    parts.notes.append(
        f"{new} predicts what {old} does until it is trained; self-atomic energies, elements, level and dispersion are "
        f"copied from {old}"
    )


def drop(parts: Parts, text: str) -> None:
    """``name``: remove a fidelity."""
    fidelity = parts.find(text, "--drop")
    if len(parts.fidelities) == 1:
        raise ValueError(f"--drop: {text} is the only fidelity; a model needs one")
    parts.fidelities.remove(fidelity)


def rename(parts: Parts, text: str) -> None:
    """``old=new``: give a fidelity another name."""
    old, new = _two(text, "--rename", "OLD=NEW")
    fidelity = parts.find(old, "--rename")
    _check_new(new, parts.names, "--rename")
    parts.fidelities[parts.fidelities.index(fidelity)] = replace(fidelity, name=new)


def order(parts: Parts, text: str) -> None:
    """``a,b,c``: give the fidelities new numbers."""
    names = text.split(",")
    chosen = [parts.find(name, "--order") for name in names]
    if sorted(names) != sorted(parts.names):
        raise ValueError(f"--order: expected each of {', '.join(parts.names)} once, found {', '.join(names)}")
    parts.fidelities = chosen


def merge(parts: Parts, text: str) -> None:
    """``new=a,b`` or ``new=a:2,b:1``: the weighted mean of fidelities, in the place of the first of them.

    Rows of an element are averaged over those fidelities that were trained on it. Networks are not linear, so
    predictions are close to the mean of predictions only where the fidelities are alike; training then continues.
    """
    new, joined = _two(text, "--merge", "NEW=A,B or NEW=A:2,B:1")
    shares: dict[str, float] = {}
    for member in joined.split(","):
        name, colon, weight = member.partition(":")
        if name in shares:
            raise ValueError(f"--merge: {name} is there twice")
        parts.find(name, "--merge")
        shares[name] = _positive(weight, name) if colon else 1.0
    if len(shares) < 2:
        raise ValueError(f"--merge: needs two fidelities or more, found {joined}; --rename gives one another name")
    members = [fidelity for fidelity in parts.fidelities if fidelity.name in shares]
    rest = [fidelity for fidelity in parts.fidelities if fidelity.name not in shares]
    _check_new(new, [fidelity.name for fidelity in rest], "--merge")
    total = sum(shares.values())
    merged = _mean(new, members, [shares[member.name] / total for member in members], parts.notes)
    place = parts.fidelities.index(members[0])
    parts.fidelities = [*rest[:place], merged, *rest[place:]]
    if not parts.heads:
        parts.notes.append(f"{new}: the readouts are those of all fidelities and stay; embedding rows are averaged")


def _two(text: str, option: str, form: str) -> tuple[str, str]:
    first, equals, second = text.partition("=")
    if not (first and equals and second):
        raise ValueError(f"{option}: expected {form}, found {text!r}")
    return first, second


def _positive(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ValueError(f"--merge: the weight of {name} is {text!r}; expected a positive number")
    return value


def _check_new(name: str, taken: Sequence[str], option: str) -> None:
    if not FIDELITY_NAME.fullmatch(name):
        raise ValueError(f"{option}: {name!r} is not a name for a fidelity: a letter, then letters, digits, _ + -")
    if name in taken:
        raise ValueError(f"{option}: there is a fidelity {name} already")


def _mean(name: str, members: Sequence[Fidelity], shares: Sequence[float], notes: list[str]) -> Fidelity:
    """Weighted mean of fidelities; what they are described by is kept where they agree."""
    from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table

    trained = [member.known.get("species") for member in members]
    tables = {
        key: _mean_of_rows([member.tables[key] for member in members], shares, trained) for key in members[0].tables
    }
    readouts = {}
    for key in members[0].readouts:
        values = [member.readouts[key] for member in members]
        readouts[key] = _mean_of_rows(values, shares, trained) if is_type_table(key) else _mean_of(values, shares)
    levels = {member.known.get("fidelity_levels") for member in members}
    if len(levels) > 1:
        notes.append(f"{name}: the level of theory is left out, the merged fidelities have different ones")
    sae, problem = _common_sae(name, members)
    if sae is None and not problem:
        notes.append(f"{name}: without self-atomic energies, since not all of the merged fidelities have them")
    known = {
        "sae": sae,
        "species": None if None in trained else sorted({z for numbers in trained for z in numbers or ()}),
        "fidelity_levels": levels.pop() if len(levels) == 1 else None,
        "dispersion": _common_dispersion(name, members, notes),
    }
    origin = " + ".join(f"{share:.3g} {member.origin}" for share, member in zip(shares, members, strict=True))
    stated = {key: value for key, value in known.items() if value is not None}
    return Fidelity(name, origin, tables, readouts, stated, problem)


def _mean_of(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = sum(share * value.double() for share, value in zip(shares, values, strict=True))
    return total.to(values[0].dtype)  # type: ignore[union-attr]


def _mean_of_rows(values: Sequence[Tensor], shares: Sequence[float], trained: Sequence[Sequence[int] | None]) -> Tensor:
    """Mean of the rows of each element over the fidelities that were trained on it, or over all if none was."""
    import torch

    n_rows = max(len(value) for value in values)
    rows = torch.full((len(values), n_rows, *values[0].shape[1:]), torch.nan, dtype=torch.float64)
    learned = torch.zeros(len(values), n_rows, 1, dtype=torch.bool)
    for i, (value, numbers) in enumerate(zip(values, trained, strict=True)):
        rows[i, : len(value)] = value
        learned[i, [z for z in (range(n_rows) if numbers is None else numbers) if z < n_rows]] = True
    known = ~rows.isnan().any(dim=2, keepdim=True)
    share = torch.tensor(shares, dtype=torch.float64).view(-1, 1, 1) * known
    weights = torch.where((share * learned).sum(dim=0) == 0, share, share * learned)
    mean = (weights * torch.where(known, rows, 0.0)).sum(dim=0) / weights.sum(dim=0)  # NaN where nobody knows it
    return mean.to(values[0].dtype)


def _common_sae(name: str, members: Sequence[Fidelity]) -> tuple[dict[int | str, float] | None, str]:
    """Self-atomic energies, and terms, that all members agree on, or why there are none."""
    result: dict[int | str, float] = {}
    for member in members:
        if member.sae_problem:
            return None, member.sae_problem
        if "sae" not in member.known:
            return None, ""
        absent = {name: 0.0 for name in TERMS if name not in member.known["sae"]}
        for key, energy in {**member.known["sae"], **absent}.items():
            if abs(result.setdefault(key, energy) - energy) > SAE_TOLERANCE:
                what = f"{key} terms" if isinstance(key, str) else f"self-atomic energies of {element_names([key])}"
                return None, (
                    f"the {what} of the fidelities merged into {name} differ: {result[key]:g} and {energy:g} eV"
                )
    return ReferenceEnergies.from_table(result).table(), ""


def _common_dispersion(name: str, members: Sequence[Fidelity], notes: list[str]) -> dict[str, Any] | None:
    """What dispersion the labels of all members contain."""
    entries: list[dict[str, Any] | None] = [member.known.get("dispersion") for member in members]
    if all(entry == entries[0] for entry in entries):
        return entries[0]
    if any(entry is not None and entry["subtracted"] for entry in entries):
        raise ValueError(
            f"--merge: the fidelities for {name} do not have the same dispersion subtracted from their labels, so "
            "their energies are not of one kind (see --info)"
        )
    notes.append(f"{name}: which dispersion the labels contain is left open, the merged fidelities differ")
    return None


# --------------------------------------------------------------------------------------------------
# putting together
# --------------------------------------------------------------------------------------------------


def put_together(parts: Parts) -> dict[str, Tensor]:
    """Return the state dict of the edited model; ``model_config`` is adapted where it has too few element types."""
    from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table

    count = len(parts.fidelities)
    n_rows = _table_length(parts)
    weights: dict[str, Tensor] = {}
    for key, value in parts.common.items():
        in_outputs = count == 1 and key.startswith("shared_readouts.")
        weights[f"outputs.{key.partition('.')[2]}" if in_outputs else key] = value
    for key, padding in parts.padding.items():
        blocks = {f: fidelity.tables[key] for f, fidelity in enumerate(parts.fidelities)}
        weights[key] = _table(blocks, n_rows, parts.offset, unknown=float("nan") if key == "afv.weight" else 0.0)
        weights[key][:1] = padding
    for f, fidelity in enumerate(parts.fidelities):
        prefix = "outputs" if count == 1 else f"fidelity_readouts.{f}"
        for name, value in fidelity.readouts.items():
            table = is_type_table(f"{prefix}.{name}")
            weights[f"{prefix}.{name}"] = _table({f: value}, n_rows, parts.offset) if table else value.clone()
    return weights


def _table(blocks: Mapping[int, Tensor], n_rows: int, offset: int, unknown: float = 0.0) -> Tensor:
    """Put the rows of fidelities into a table; elements for which there is no row get ``unknown``, other rows 0."""
    first = next(iter(blocks.values()))
    table = first.new_zeros(n_rows, *first.shape[1:])
    for f, rows in blocks.items():
        target = table[f * offset : (f + 1) * offset]  # a view, shorter for the last fidelity
        n = min(len(rows), len(target))
        target[:n] = rows[:n]
        target[n : MAX_ATOMIC_NUMBER + 1] = unknown
    return table


def _table_length(parts: Parts) -> int:
    """Rows of the tables; for one fidelity those of the model file, or more if it has rows for more elements."""
    from aimnet2mult.models.base import build_model
    from aimnet2mult.models.mixed_fidelity_aimnet2 import num_types

    if len(parts.fidelities) > 1:
        return num_types(len(parts.fidelities), parts.offset)
    rows = parts.fidelities[0].tables["afv.weight"]
    if parts.model_config is None:
        return min(len(rows), TYPES_PER_FIDELITY)
    known = ~rows[: MAX_ATOMIC_NUMBER + 1].isnan().any(dim=1)
    needed = int(known.nonzero().max()) + 1
    own = build_model(parts.model_config).num_types
    if own < needed:
        own = parts.model_config["kwargs"]["num_types"] = TYPES_PER_FIDELITY
        parts.notes.append(f"model configuration: num_types is {own} now, for all elements that the embedding has")
    return own


# --------------------------------------------------------------------------------------------------
# the command
# --------------------------------------------------------------------------------------------------

ACTIONS = {"add": add, "drop": drop, "rename": rename, "order": order, "merge": merge}
"""What can be done to the list of fidelities."""

LEFT_OUT = {
    "training": "the state of its training (optimiser, schedule, ...), which fits the old weights only",
    "train_config": "the settings of its training, which speak of the old fidelities",
    "progress": "where in its training it was written",
    "data": "the record of the data that it was trained on",
}
"""Entries of a checkpoint that an edited one does not have, in words."""


def edit_fidelities(
    checkpoint: str | Path,
    output: str | Path,
    operations: Sequence[tuple[str, str]],
    *,
    sae: Mapping[str, str | Path] | None = None,
    model: str | Path | None = None,
    fidelity_offset: int | None = None,
    overwrite: bool = False,
) -> Parts:
    """Write a checkpoint with other fidelities.

    Parameters
    ----------
    checkpoint, output : str or Path
        What is read, and what is written; may be the same with ``overwrite``.
    operations : sequence of (str, str)
        Name of an operation, one of `ACTIONS`, and its argument, carried out in this order.
    sae : mapping, optional
        {name of a fidelity of the result: YAML file with its self-atomic energies}.
    model : str or Path, optional
        Model YAML file; only for checkpoints that do not hold its configuration.
    fidelity_offset : int, optional
        As trained; only for checkpoints that do not tell.
    overwrite : bool
        Replace ``output`` if it exists.

    Returns
    -------
    Parts
        The result, and notes about it.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        Operations that are not possible, weights that do not fit the model file, files that are missing or cannot be
        written; nothing is written then.
    """
    from aimnet2mult.models.base import build_model, load_checkpoint, load_weights, save_checkpoint
    from aimnet2mult.utils.files import check_writable

    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"{output}: exists; choose another name, or --overwrite to replace it")
    check_writable(output)
    content = load_checkpoint(checkpoint)
    parts = take_apart(content, _model_config(content, model), _offset(content, fidelity_offset))
    for name, argument in operations:
        ACTIONS[name](parts, argument)
    _give_sae(parts, sae or {})
    weights = put_together(parts)
    if parts.model_config is not None:
        load_weights(build_model(parts.model_config, len(parts.fidelities), parts.offset, parts.heads), weights)
    edits = [*content.get("edits", []), *(f"--{name} {argument}" for name, argument in operations)]
    numbered = dict(enumerate(parts.fidelities))
    save_checkpoint(
        output,
        weights,
        model_config=parts.model_config,
        num_fidelities=len(numbered),
        fidelity_offset=parts.offset,
        use_fidelity_readouts=parts.heads,
        fidelity_names={f: fidelity.name for f, fidelity in numbered.items()},
        extra={"edits": edits},
        **{key: {f: about.known[key] for f, about in numbered.items() if key in about.known} for key in DESCRIPTIONS},
    )
    gone = content.keys() - load_checkpoint(output).keys()
    parts.notes += [f"left out: {LEFT_OUT.get(key, f'the entry {key}')}" for key in content if key in gone]
    return parts


def _model_config(checkpoint: Mapping[str, Any], path: str | Path | None) -> dict[str, Any] | None:
    from aimnet2mult.models.base import load_model_config

    known = checkpoint.get("model_config")
    if path is None:
        return known
    given = load_model_config(path)
    if known is not None and given != known:
        raise ValueError(f"--model {path}: differs from the configuration in the checkpoint; leave the option out")
    return given


def _offset(checkpoint: Mapping[str, Any], given: int | None) -> int:
    known = checkpoint.get("fidelity_offset")
    if given is not None and known is not None and given != known:
        raise ValueError(f"--fidelity-offset {given}: the checkpoint says {known}; leave the option out")
    if given is not None and given < TYPES_PER_FIDELITY:
        raise ValueError(f"--fidelity-offset: must be at least {TYPES_PER_FIDELITY}, found {given}")
    return int(given or known or FIDELITY_OFFSET)


def _give_sae(parts: Parts, files: Mapping[str, str | Path]) -> None:
    """Give fidelities of the result self-atomic energies from files; some may need them."""
    from aimnet2mult.data.sae import load_sae

    for name, path in files.items():
        fidelity = parts.find(name, "--sae")
        energies = load_sae(path).table()
        if absent := [z for z in fidelity.known.get("species", []) if z not in energies]:
            raise ValueError(f"--sae: {path} has no energy of {element_names(absent)}, which {name} was trained on")
        parts.fidelities[parts.fidelities.index(fidelity)] = replace(
            fidelity, known={**fidelity.known, "sae": energies}, sae_problem=""
        )
        parts.notes.append(f"{name}: self-atomic energies from {path}")
    for fidelity in parts.fidelities:
        if fidelity.sae_problem:
            raise ValueError(f"--sae: {fidelity.sae_problem}; give those of the result with --sae {fidelity.name}=FILE")


def report(parts: Parts) -> str:
    """Return a table of the fidelities with what they come from, and the notes, as text."""
    from aimnet2mult.models.mixed_fidelity_aimnet2 import is_type_table

    count = len(parts.fidelities)
    rows: list[tuple[str | int, ...]] = []
    for f, fidelity in enumerate(parts.fidelities):
        own = (v[1:TYPES_PER_FIDELITY] if is_type_table(key) else v for key, v in fidelity.readouts.items())
        known = fidelity.known
        elements = element_ranges(known["species"]) if "species" in known else "not known"
        dispersion = _dispersion_text(known["dispersion"]) if "dispersion" in known else "not known"
        terms = "".join(f" + {name}" for name in TERMS if name in known.get("sae", {}))
        about = elements, f"yes{terms}" if "sae" in known else "no", known.get("fidelity_levels", "-"), dispersion
        n_rows = fidelity.tables["afv.weight"][1:TYPES_PER_FIDELITY].numel()
        rows.append((str(f), fidelity.name, fidelity.origin, n_rows, sum(v.numel() for v in own), *about))
    header = ("", "name", "from", "embedding", "own readouts", "elements", "SAE", "level", "dispersion in labels")
    kind = f"{count} fidelities, readouts {'of each' if parts.heads else 'for all'}"
    common = sum(value.numel() for value in parts.common.values())
    lines = [*text_table(header, rows), f"{'a plain AIMNet2' if count == 1 else kind}; {common:,} other weights"]
    return "\n".join([*lines, *(f"note: {note}" for note in parts.notes)])


def _dispersion_text(entry: Mapping[str, Any]) -> str:
    from aimnet2mult.data.ledger import DispersionLabel

    text = DispersionLabel.from_dict(entry["labels"]).text
    return f"{text}, subtracted" if entry["subtracted"] else text


@click.command(cls=OrderedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", metavar="IN.pt", type=click.Path())
@click.argument("output", metavar="[OUT.pt]", required=False, type=click.Path())
@click.option("--add", multiple=True, metavar="NEW=OLD", help="A new fidelity, the last one, that is a copy of OLD.")
@click.option("--drop", multiple=True, metavar="NAME", help="Remove a fidelity.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Give a fidelity another name.")
@click.option("--order", multiple=True, metavar="A,B,C", help="All fidelities in the order of their new numbers.")
@click.option(
    "--merge",
    multiple=True,
    metavar="NEW=A,B",
    help="The mean of embedding rows and readouts, in the place of the first; with weights: NEW=A:2,B:1. A start for "
    "further training, not a mean of predictions.",
)
@click.option("--sae", multiple=True, metavar="NAME=FILE", help="Self-atomic energies (YAML, eV) of a fidelity.")
@click.option("--info", is_flag=True, help="Only show the fidelities of IN.pt.")
@click.option("--model", type=click.Path(), help="Model YAML file; only for checkpoints that do not hold it.")
@click.option("--fidelity-offset", type=int, help="Distance of element types, only for checkpoints that do not tell.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.pt, which may be IN.pt.")
@click.pass_obj
@user_errors
def main(
    given: list[str],
    checkpoint: str,
    output: str | None,
    sae: tuple[str, ...],
    info: bool,
    model: str | None,
    fidelity_offset: int | None,
    overwrite: bool,
    **arguments: tuple[str, ...],
) -> None:
    """Add, drop, rename, reorder and merge the fidelities of a checkpoint.

    Operations are carried out in the order in which they are given. Fidelities that stay predict the same to the last
    bit. One remaining fidelity gives a plain AIMNet2; adding one to a plain AIMNet2 gives a model of two. Fidelities
    without names are fid0, fid1, ... The result can be compiled, evaluated, and trained on with --load.

    \b
      python -m aimnet2mult.tools.edit_fidelities model.pt new.pt --add ccsd=dft --drop gfn2
    """  # noqa: D301 - click wants the control character itself
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    waiting = {name: iter(values) for name, values in arguments.items()}
    operations = [(name, next(waiting[name])) for name in given if name in ACTIONS]
    if info:
        if operations or output is not None:
            raise ValueError("--info: only shows IN.pt; leave out OUT.pt and operations")
        from aimnet2mult.models.base import load_checkpoint

        content = load_checkpoint(checkpoint)
        parts = take_apart(content, _model_config(content, model), _offset(content, fidelity_offset))
        click.echo(report(parts))
        return
    if not operations and not sae:
        raise ValueError("nothing to do: give --add, --drop, --rename, --order, --merge or --sae, or --info")
    if output is None:
        raise ValueError("OUT.pt: the name of the file to write is missing")
    files = dict(_two(text, "--sae", "NAME=FILE") for text in sae)
    parts = edit_fidelities(
        checkpoint,
        output,
        operations,
        sae=files,
        model=model,
        fidelity_offset=fidelity_offset,
        overwrite=overwrite,
    )
    click.echo(report(parts))
    click.echo(output)


if __name__ == "__main__":
    main()
