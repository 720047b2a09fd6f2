"""Model files: configurations, weights, checkpoints. The one place that knows how a model is written and read."""

import copy
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aimnet2mult
from aimnet2mult.config.builder import MODEL_NAMESPACES, ConfigError, build_module, load_yaml, resolve
from aimnet2mult.constants import FIDELITY_OFFSET, TYPES_PER_FIDELITY
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.artifact import (
    ARTIFACT_VERSION,
    Artifact,
    ModelMetadata,
    is_artifact,
    parse_artifact,
)
from aimnet2mult.models.artifact_config import find_outputs, own_names
from aimnet2mult.models.checkpoint_entries import check_entries, subtracted_d3, without_files
from aimnet2mult.models.interchange import checkpoint_of_artifact
from aimnet2mult.models.legacy import (
    checkpoint_of_legacy,
    compiled_metadata,
    is_compiled_model,
    legacy_metadata,
    open_torchscript,
)
from aimnet2mult.models.mixed_fidelity_aimnet2 import MixedFidelityAIMNet2, fidelity_slice, is_type_table, num_types
from aimnet2mult.models.safe_file import CheckpointError, is_torchscript, load_tensors
from aimnet2mult.reference_energies import ReferenceEnergies
from aimnet2mult.utils.devices import chosen_device
from aimnet2mult.utils.files import atomic_path
from aimnet2mult.utils.text import first_line

DEFAULT_MODEL = Path(aimnet2mult.__file__).parent / "config" / "default_model.yaml"
"""The full-size model."""

CHECKPOINT_VERSION = 2
"""Newest version of the checkpoint format.

Version 2 has reference energies with terms in charge and spin, which programs that know version 1 only must not leave
out; they refuse it. Checkpoints without such terms are of version 1.
"""


def load_model_config(path: str | Path | None = None) -> dict[str, Any]:
    """Read a model YAML file; classes of the published package (``aimnet.*``) stand for ours.

    Parameters
    ----------
    path : str or Path, optional
        Default: the packaged full-size model.

    Returns
    -------
    dict
        ``class`` and ``kwargs``.

    Raises
    ------
    FileNotFoundError, ConfigError
        No such file; not a model file (the message names it).
    """
    path = DEFAULT_MODEL if path is None else Path(path)
    config = own_names(load_yaml(path))
    if not isinstance(config, dict) or "class" not in config:
        raise ConfigError(f"{path}: not a model file: it needs the keys class and kwargs")
    try:
        target = resolve(config["class"], MODEL_NAMESPACES)
    except ConfigError as error:
        raise ConfigError(f"{path}: class: {error}") from error
    if not (isinstance(target, type) and issubclass(target, AIMNet2)) or issubclass(target, MixedFidelityAIMNet2):
        raise ConfigError(
            f"{path}: class: expected aimnet2mult.models.aimnet2.AIMNet2, found {config['class']}; the number of "
            "fidelities comes from the data, not from the model file"
        )
    return config


def build_model(
    config: Mapping[str, Any],
    num_fidelities: int = 1,
    fidelity_offset: int = FIDELITY_OFFSET,
    use_fidelity_readouts: bool = True,
    trusted: Collection[str] = (),
) -> AIMNet2:
    """Build an untrained model.

    Parameters
    ----------
    config : mapping
        ``class`` and ``kwargs`` of the single-fidelity model (`load_model_config`).
    num_fidelities : int
        1 gives a plain `AIMNet2`, more a `MixedFidelityAIMNet2`.
    fidelity_offset, use_fidelity_readouts
        As in `MixedFidelityAIMNet2`.
    trusted : collection of str
        Dotted names of further classes that ``config`` may name.

    Raises
    ------
    ConfigError
        Names the part of the configuration that does not fit.
    """
    if trusted:
        config = _with_trusted(config, trusted)
    if num_fidelities == 1:
        model = build_module(config, (*MODEL_NAMESPACES, *trusted), "model")
    else:
        model = _build_mixed(config, num_fidelities, fidelity_offset, use_fidelity_readouts)
    assert isinstance(model, AIMNet2)
    return model


def _with_trusted(config: Mapping[str, Any], trusted: Collection[str]) -> dict[str, Any]:
    """Build readouts of trusted classes; all others stay nodes."""
    outputs = {
        name: build_module(node, tuple(trusted), f"outputs.{name}") if node["class"] in trusted else node
        for name, node in config["kwargs"]["outputs"].items()
    }
    return {**config, "kwargs": {**config["kwargs"], "outputs": outputs}}


def _build_mixed(
    config: Mapping[str, Any], num_fidelities: int, fidelity_offset: int, use_fidelity_readouts: bool
) -> MixedFidelityAIMNet2:
    # Builds the plain model once, so that mistakes in the configuration are reported in its terms.
    build_module(config, MODEL_NAMESPACES, "model")
    return MixedFidelityAIMNet2(config, num_fidelities, fidelity_offset, use_fidelity_readouts)


def unused_copies(state_dict: Mapping[str, Tensor]) -> set[str]:
    """Keys of a reference checkpoint that its model never reads: ``outputs.*``, ``shared_readout.*`` beside heads."""
    if not any(key.startswith("fidelity_readouts.") for key in state_dict):
        return set()
    return {key for key in state_dict if key.startswith(("outputs.", "shared_readout."))}


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights, every key accounted for.

    The unused copies of the reference layout (`unused_copies`) are left out; anything else that is missing, left
    over or of another shape is an error.

    Raises
    ------
    CheckpointError
        Names the keys.
    """
    skipped = unused_copies(state_dict)
    given = {key: value for key, value in state_dict.items() if key not in skipped}
    own = model.state_dict()
    problems = [
        _key_list("missing", [key for key in own if key not in given]),
        _key_list("left over", [key for key in given if key not in own]),
        _key_list(
            "of another shape",
            [
                f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in given and given[key].shape != own[key].shape and not _is_table_of_file(key, given[key])
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(
            "the weights are of another architecture than the model: " + "; ".join(p for p in problems if p)
        )
    model.load_state_dict(given)
    if isinstance(model, AIMNet2):
        model.update_keys_and_cutoffs()


def _is_table_of_file(key: str, value: Tensor) -> bool:
    """Whether it is a table of ``DispParam``, which takes as many rows as there are."""
    return key.endswith(".disp_param0") and value.dim() == 2 and value.shape[1] == 2


def _key_list(what: str, keys: Sequence[str], shown: int = 4) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return f"{len(keys)} {what} ({', '.join(keys[:shown])}{more})"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "aimnet2mult": aimnet2mult.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def save_checkpoint(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    *,
    model_config: Mapping[str, Any] | None,
    num_fidelities: int,
    fidelity_offset: int,
    use_fidelity_readouts: bool,
    fidelity_names: Mapping[int, str] | None = None,
    fidelity_levels: Mapping[int, str] | None = None,
    sae: Mapping[int, Mapping[int, float]] | None = None,
    species: Mapping[int, Sequence[int]] | None = None,
    dispersion: Mapping[int, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a self-describing checkpoint, to a temporary name that is then moved into place.

    Parameters
    ----------
    path : str or Path
        The file.
    model : nn.Module or mapping
        Its state dict (or this one) is stored under ``model``, on the CPU.
    model_config : mapping or None
        ``class`` and ``kwargs`` of the single-fidelity model; None leaves the entry out.
    num_fidelities, fidelity_offset, use_fidelity_readouts
        As in `build_model`.
    fidelity_names : mapping, optional
        Name of each fidelity.
    fidelity_levels : mapping, optional
        Level of theory of each fidelity, in words.
    sae : mapping, optional
        Self-atomic energies of each fidelity, {f: {Z: eV}}, or its `ReferenceEnergies`.
    species : mapping, optional
        Elements in the training data of each fidelity, {f: [Z]}.
    dispersion : mapping, optional
        Ledger of each fidelity: ``labels``, what dispersion they contained (plain types, `DispersionLabel.to_dict` of
        `aimnet2mult.data.ledger`), and ``subtracted``, whether it was subtracted before training.
    extra : mapping, optional
        Further entries of plain Python types and tensors (state of the training).
    """
    weights = model.state_dict() if isinstance(model, nn.Module) else model
    references = {int(f): ReferenceEnergies.from_table(table) for f, table in (sae or {}).items()}
    checkpoint: dict[str, Any] = {
        "format_version": CHECKPOINT_VERSION if any(reference.terms for reference in references.values()) else 1,
        "model": {key: value.detach().cpu() for key, value in weights.items()},
        **({} if model_config is None else {"model_config": _plain(model_config)}),
        "num_fidelities": int(num_fidelities),
        "fidelity_offset": int(fidelity_offset),
        "use_fidelity_readouts": bool(use_fidelity_readouts),
        "fidelity_names": {int(f): str(name) for f, name in (fidelity_names or {}).items()},
        "fidelity_levels": {int(f): str(level) for f, level in (fidelity_levels or {}).items()},
        "sae": {f: reference.table() for f, reference in references.items()},
        "species": {int(f): [int(z) for z in numbers] for f, numbers in (species or {}).items()},
        "dispersion": {
            int(f): {"labels": _plain(entry["labels"]), "subtracted": bool(entry["subtracted"])}
            for f, entry in (dispersion or {}).items()
        },
        "versions": versions(),
    }
    for key, value in (extra or {}).items():
        assert key not in checkpoint, key
        checkpoint[key] = value
    _write(checkpoint, path)


def copy_model(source: str | Path, target: str | Path) -> None:
    """Write the model of a checkpoint without the state of its training.

    Raises
    ------
    OSError, CheckpointError
        As `load_checkpoint`; ``target`` cannot be written.
    """
    checkpoint = load_checkpoint(source)
    checkpoint.pop("training", None)
    _write(checkpoint, target)


def _write(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole or not at all.

    Raises
    ------
    OSError
        It cannot be written, as on a full disk, of which torch does not tell.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written; is the disk full, or a quota used up? ({error})") from error


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as dicts and lists, which load with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: ours, ``{"model": state_dict}`` or a bare state dict of earlier work, or a published model.

    Format-2 artifacts and legacy TorchScript models are returned as checkpoints of one fidelity, with their
    self-atomic energies taken out (`aimnet2mult.models.interchange`).

    Returns
    -------
    dict
        ``model`` always holds the weights; the other entries of `save_checkpoint` are there if the file has them,
        ``sae`` as {f: table}, from which `ReferenceEnergies.from_table` makes reference energies.

    Raises
    ------
    FileNotFoundError, CheckpointError
        No such file; not a file of weights (the message names it).
    """
    path = Path(path)
    if path.is_file() and is_torchscript(path):
        module, metadata = open_torchscript(path, device)
        if is_compiled_model(module, metadata):
            raise CheckpointError(
                f"{path}: a compiled TorchScript model, not a checkpoint; give the .pt of the training"
            )
        return checkpoint_of_legacy(module, path)
    content = load_tensors(path, device)
    if is_artifact(content):
        artifact, _ = read_artifact(content, path)
        return checkpoint_of_artifact(artifact)
    return checkpoint_content(content, path)


def checkpoint_content(content: Any, path: Path) -> dict[str, Any]:
    """Check the content of a checkpoint that this package, or earlier work, wrote."""
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        checkpoint = dict(content)
    elif isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        checkpoint = {"model": content}
    else:
        raise CheckpointError(f"{path}: holds no weights: expected a state dict, or one under the key model")
    if "model_config" in checkpoint:
        checkpoint["model_config"] = without_files(own_names(checkpoint["model_config"]))
    try:
        check_entries(checkpoint, CHECKPOINT_VERSION)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    fidelity: int | None = None,
    trusted: Collection[str] = (),
) -> tuple[nn.Module, ModelMetadata]:
    """Load a model in whatever format it is: format-2 artifact, TorchScript, or checkpoint of a training.

    The model computes what the file holds; what has to be added for total energies the metadata say
    (``needs_coulomb``, ``needs_dispersion``, ``sae``). `aimnet2mult.models.loading.load_potential` adds it.

    Parameters
    ----------
    path : str or Path
        The file; its content decides, not its name. TorchScript files are programs: load only what you trust.
    device : str or torch.device
        Where the model goes.
    fidelity : int, optional
        Of a checkpoint, take this fidelity alone, as a plain `AIMNet2`.
    trusted : collection of str
        Dotted names of classes of your own that an artifact may name, beside those of `aimnet2mult.models.artifact`.

    Returns
    -------
    model : nn.Module
        In evaluation mode, its parameters without gradients: `AIMNet2`, for a checkpoint of several fidelities
        `MixedFidelityAIMNet2`, or the TorchScript program.
    metadata : ModelMetadata
        What the file says about itself.

    Raises
    ------
    FileNotFoundError, CheckpointError, ValueError
        No such file; not a model, or not one that can be loaded safely (the message says what is wrong); a device that
        cannot be used; a fidelity that there is not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    place = chosen_device(device)
    metadata: ModelMetadata
    model: nn.Module
    if is_torchscript(path):
        _only_of_checkpoints(fidelity, path)
        module, about = open_torchscript(path, place)
        if is_compiled_model(module, about):
            return module, compiled_metadata(module, about)
        return module, legacy_metadata(module, path)
    content = load_tensors(path)
    if is_artifact(content):
        _only_of_checkpoints(fidelity, path)
        artifact, model = read_artifact(content, path, trusted)
        metadata = artifact.metadata
    else:
        model, metadata = _model_of_checkpoint(checkpoint_content(content, path), path, fidelity)
    return model.to(place).eval().requires_grad_(False), metadata


def _only_of_checkpoints(fidelity: int | None, path: Path) -> None:
    if fidelity is not None:
        raise ValueError(f"fidelity {fidelity}: {path} has no fidelities to choose from; leave it out")


def read_artifact(
    content: Mapping[str, Any], path: str | Path, trusted: Collection[str] = ()
) -> tuple[Artifact, AIMNet2]:
    """Check an artifact to the end: its entries (`parse_artifact`), and that they make a network.

    Raises
    ------
    CheckpointError
        What is wrong with it.
    """
    artifact = parse_artifact(content, path, trusted)
    return artifact, model_of_artifact(artifact, path, trusted)


def _build_described(
    config: Mapping[str, Any], layout: "Layout | None" = None, trusted: Collection[str] = ()
) -> AIMNet2:
    """Build the model that a file describes, as `build_model` from a configuration of the user's."""
    try:
        if layout is None:
            return build_model(config, trusted=trusted)
        return build_model(config, layout.num_fidelities, layout.offset, layout.heads)
    # Arguments that are of the wrong type, or out of range, come to light in the constructors.
    except (ConfigError, TypeError, ValueError, RuntimeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"the model cannot be built: {first_line(error)}") from error


def model_of_artifact(artifact: Artifact, path: str | Path = "the file", trusted: Collection[str] = ()) -> AIMNet2:
    """Build the network of an artifact, E(network) - E(short range) + self-atomic energies; its shifts are float64.

    Raises
    ------
    CheckpointError
        Configuration and weights do not belong together.
    """
    config = copy.deepcopy(artifact.config)
    config["kwargs"]["num_types"] = artifact.weights["afv.weight"].shape[0]
    try:
        model = _build_described(config, trusted=trusted)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    own = model.state_dict()
    for key in artifact.weights:
        if key.endswith(".shifts.weight") and key in own:
            model.get_submodule(key.rpartition(".")[0]).double()
    try:
        load_weights(model, artifact.weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model


def _model_of_checkpoint(
    checkpoint: Mapping[str, Any], path: Path, fidelity: int | None
) -> tuple[AIMNet2, ModelMetadata]:
    config = checkpoint.get("model_config")
    if config is None:
        raise CheckpointError(
            f"{path}: the checkpoint does not hold its model configuration; build it (load_model_config, build_model) "
            "and give it the weights (load_weights)"
        )
    layout = layout_of_weights(checkpoint["model"], checkpoint, FIDELITY_OFFSET)
    if fidelity is None and layout.num_fidelities > 1:
        model = _build_described(config, layout)
        load_weights(model, checkpoint["model"])
        chosen = list(range(layout.num_fidelities))
    else:
        chosen = [fidelity or 0]
        if chosen[0] not in range(layout.num_fidelities):
            raise ValueError(f"fidelity {fidelity}: {path} has the fidelities 0 to {layout.num_fidelities - 1}")
        model = single_fidelity_model(checkpoint, config, chosen[0], layout.num_fidelities, layout.offset)
    return model, describe_checkpoint(checkpoint, model, chosen)


def describe_checkpoint(checkpoint: Mapping[str, Any], model: AIMNet2, chosen: Sequence[int]) -> ModelMetadata:
    """Describe a model of some fidelities of a checkpoint that holds its configuration."""
    layout = layout_of_weights(checkpoint["model"], checkpoint, FIDELITY_OFFSET)
    names = names_in_checkpoint(checkpoint, layout.num_fidelities)
    sae = {f: ReferenceEnergies.from_table(table) for f, table in (checkpoint.get("sae") or {}).items()}
    species = checkpoint.get("species") or {f: list(table) for f, table in sae.items()}
    dispersion = {f: d3 for f in chosen if (d3 := subtracted_d3(checkpoint, f)) is not None}
    same = len(dispersion) == len(chosen) and all(d3 == dispersion[chosen[0]] for d3 in dispersion.values())
    levels = checkpoint.get("fidelity_levels") or {}
    outputs = checkpoint["model_config"]["kwargs"]["outputs"]
    return ModelMetadata(
        format_version=ARTIFACT_VERSION,
        cutoff=model.cutoff,
        needs_coulomb=False,
        needs_dispersion=bool(dispersion),
        coulomb_mode="full_embedded" if find_outputs(outputs, "LRCoulomb") else "none",
        coulomb_sr_rc=None,
        coulomb_sr_envelope=None,
        d3_params=dispersion[chosen[0]] if same else None,
        implemented_species=sorted(set().union(*(species.get(f, []) for f in chosen))),
        has_embedded_lr=model.cutoff_lr > 0.0,
        has_embedded_d3ts=bool(find_outputs(outputs, "D3TS")),
        model_file="checkpoint",
        num_charge_channels=model.num_charge_channels,
        num_fidelities=len(chosen),
        fidelity_offset=layout.offset,
        fidelity_names={f: names[f] for f in chosen},
        species={f: sorted(species[f]) for f in chosen if f in species},
        sae={f: sae[f] for f in chosen if f in sae},
        dispersion=dispersion,
        baked_sae=None,
        level_of_theory=levels.get(chosen[0]) if len(chosen) == 1 else None,
    )


def single_fidelity_model(
    checkpoint: Mapping[str, Any],
    config: Mapping[str, Any],
    fidelity: int,
    num_fidelities: int,
    fidelity_offset: int,
    trusted: Collection[str] = (),
) -> AIMNet2:
    """Plain AIMNet2 of one fidelity, from the weights of one or of several.

    Raises
    ------
    CheckpointError
        The weights are of another architecture.
    """
    weights = checkpoint["model"]
    if num_fidelities > 1:
        weights = fidelity_slice(weights, fidelity, fidelity_offset)
    else:
        skipped = unused_copies(weights)
        weights = {key: value for key, value in weights.items() if key not in skipped}
    rows = next(value.shape[0] for key, value in weights.items() if is_type_table(key))
    config = copy.deepcopy(dict(config))
    config["kwargs"]["num_types"] = rows
    model = _build_described(config, trusted=trusted)
    load_weights(model, weights)
    return model


def names_in_checkpoint(checkpoint: Mapping[str, Any], num_fidelities: int) -> dict[int, str]:
    """Name of each fidelity of a checkpoint, ``fid0``, ``fid1``, ... where it has none."""
    names = checkpoint.get("fidelity_names") or {}
    return {f: names.get(f, f"fid{f}") for f in range(num_fidelities)}


# --------------------------------------------------------------------------------------------------
# how weights are spread over fidelities
# --------------------------------------------------------------------------------------------------

HEAD_KEY = re.compile(r"fidelity_readouts\.(\d+)\.(.+)")
"""Weights of a fidelity's own readouts: fidelity, name inside."""


@dataclass(frozen=True)
class Layout:
    """How weights are spread over fidelities.

    Attributes
    ----------
    num_fidelities : int
        Number of fidelities F.
    offset : int
        Distance of their element types.
    heads : bool
        Whether each fidelity has readouts of its own.
    rows : int
        Rows of the embedding table.
    """

    num_fidelities: int
    offset: int
    heads: bool
    rows: int

    def block(self, fidelity: int) -> range:
        """Rows of a fidelity's element types, without that of padding (Z = 0)."""
        first = fidelity * self.offset
        return range(first + 1, min(first + TYPES_PER_FIDELITY, self.rows))


def layout_of_weights(weights: Mapping[str, Tensor], description: Mapping[str, Any], default_offset: int) -> Layout:
    """Find out how the weights of a checkpoint are spread over fidelities.

    Parameters
    ----------
    weights : mapping
        State dict.
    description : mapping
        The checkpoint; ``num_fidelities`` and ``fidelity_offset`` are believed where they are given.
    default_offset : int
        Offset to assume where neither the checkpoint nor the number of readouts tells.

    Raises
    ------
    CheckpointError
        The number of rows of the embedding fits no number of fidelities.
    """
    rows = weights["afv.weight"].shape[0]
    heads = {int(match[1]) for match in map(HEAD_KEY.fullmatch, weights) if match}
    offset = description.get("fidelity_offset")
    if "num_fidelities" in description:
        count = int(description["num_fidelities"])
    elif heads:
        count = max(heads) + 1
    elif rows <= TYPES_PER_FIDELITY:
        count = 1
    else:
        offsets = [offset] if offset is not None else list(dict.fromkeys([default_offset, FIDELITY_OFFSET]))
        fitting = [o for o in offsets if (rows - TYPES_PER_FIDELITY) % o == 0]
        if not fitting:
            raise CheckpointError(
                f"the embedding of the checkpoint has {rows} rows, which fits no number of fidelities at an offset of "
                f"{' or '.join(map(str, offsets))}; set fidelity_offset to that of the checkpoint"
            )
        offset = fitting[0]
        count = (rows - TYPES_PER_FIDELITY) // offset + 1
    if offset is None:
        offset = (rows - TYPES_PER_FIDELITY) // (count - 1) if count > 1 else default_offset
    if count > 1 and rows != num_types(count, offset):
        raise CheckpointError(
            f"the embedding of the checkpoint has {rows} rows, {count} fidelities at an offset of {offset} need "
            f"{num_types(count, offset)}"
        )
    return Layout(count, int(offset), bool(heads), rows)
