"""Model files: configurations, weights, checkpoints. The one place that knows how a model is written and read."""

import pickle
import platform
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aimnet2mult
from aimnet2mult.config.builder import MODEL_NAMESPACES, ConfigError, build_module, load_yaml, resolve
from aimnet2mult.constants import FIDELITY_OFFSET, TYPES_PER_FIDELITY
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.mixed_fidelity_aimnet2 import MixedFidelityAIMNet2, num_types
from aimnet2mult.utils.files import atomic_path
from aimnet2mult.utils.text import first_line

DEFAULT_MODEL = Path(aimnet2mult.__file__).parent / "config" / "default_model.yaml"
"""The full-size model."""

CHECKPOINT_VERSION = 1
"""Version of the checkpoint format."""


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or one that does not fit the model."""


def load_model_config(path: str | Path | None = None) -> dict[str, Any]:
    """Read a model YAML file.

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
    config = load_yaml(path)
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

    Raises
    ------
    ConfigError
        Names the part of the configuration that does not fit.
    """
    if num_fidelities == 1:
        model = build_module(config, MODEL_NAMESPACES, "model")
    else:
        model = _build_mixed(config, num_fidelities, fidelity_offset, use_fidelity_readouts)
    assert isinstance(model, AIMNet2)
    return model


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
                if key in given and given[key].shape != own[key].shape
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
        Self-atomic energies of each fidelity, {f: {Z: eV}}.
    species : mapping, optional
        Elements in the training data of each fidelity, {f: [Z]}.
    dispersion : mapping, optional
        Ledger of each fidelity: ``labels``, what dispersion they contained (plain types, `DispersionLabel.to_dict` of
        `aimnet2mult.data.ledger`), and ``subtracted``, whether it was subtracted before training.
    extra : mapping, optional
        Further entries of plain Python types and tensors (state of the training).
    """
    weights = model.state_dict() if isinstance(model, nn.Module) else model
    checkpoint: dict[str, Any] = {
        "format_version": CHECKPOINT_VERSION,
        "model": {key: value.detach().cpu() for key, value in weights.items()},
        **({} if model_config is None else {"model_config": _plain(model_config)}),
        "num_fidelities": int(num_fidelities),
        "fidelity_offset": int(fidelity_offset),
        "use_fidelity_readouts": bool(use_fidelity_readouts),
        "fidelity_names": {int(f): str(name) for f, name in (fidelity_names or {}).items()},
        "fidelity_levels": {int(f): str(level) for f, level in (fidelity_levels or {}).items()},
        "sae": {int(f): {int(z): float(e) for z, e in table.items()} for f, table in (sae or {}).items()},
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


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: ours, ``{"model": state_dict}`` of earlier work, or a bare state dict.

    Returns
    -------
    dict
        ``model`` always holds the weights; the other entries of `save_checkpoint` are there if the file has them.

    Raises
    ------
    FileNotFoundError, CheckpointError
        No such file; not a file of weights (the message names it).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if _is_torchscript(path):
        raise CheckpointError(f"{path}: a compiled TorchScript model, not a checkpoint; give the .pt of the training")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        # Of files that are no pickles at all, the unpickler says things like KeyError(105).
        reason = f" ({first_line(error)})" if isinstance(error, pickle.UnpicklingError) and str(error) else ""
        raise CheckpointError(f"{path}: not a checkpoint that can be loaded safely{reason}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        checkpoint = dict(content)
    elif isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        checkpoint = {"model": content}
    else:
        raise CheckpointError(f"{path}: holds no weights: expected a state dict, or one under the key model")
    weights = checkpoint["model"]
    if "afv.weight" not in weights:
        raise CheckpointError(f"{path}: these are not the weights of an AIMNet2 model: there is no afv.weight")
    version = checkpoint.get("format_version", CHECKPOINT_VERSION)
    if version > CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {version} is newer than this package; update aimnet2mult")
    return checkpoint


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
