"""What a model file is: ``python -m aimnet2mult.tools.info model_fid0.jpt``, a checkpoint or an artifact (``.pt``).

Of compiled models it reads the metadata and runs nothing, so it needs no PyTorch and is safe with files that are not
trusted.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.reference_energies import TERMS
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Line = tuple[str, str]
"""Heading and text."""

ARTIFACT = "format-2 artifact"

WIDTH = 110
"""Columns of the text."""

MANY_ELEMENTS = 12
"""From so many on, self-atomic energies are not listed."""


def is_checkpoint(path: Path) -> bool:
    """Tell whether a file is to be read as a checkpoint: by its name, since both are zip archives."""
    return path.suffix in (".pt", ".pth", ".ckpt")


def read_info(path: str | Path) -> dict[str, Any]:
    """Return what a compiled model, a checkpoint or a format-2 artifact says about itself.

    Returns
    -------
    dict
        ``kind``: ``compiled model``, ``checkpoint`` or ``format-2 artifact``; ``file``, ``bytes``, ``sha256``;
        ``golden_cases``, their number; ``metadata``: of a compiled model as it is in the file, of a checkpoint all but
        weights and state of the training, of an artifact `aimnet2mult.models.artifact.ModelMetadata`.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a file of either kind.
    """
    path = Path(path)
    golden = 0
    if is_checkpoint(path):
        from aimnet2mult.models.artifact import is_artifact
        from aimnet2mult.models.safe_file import load_tensors

        content = load_tensors(path)
        kind = ARTIFACT if is_artifact(content) else "checkpoint"
        metadata = _artifact_metadata(content, path) if kind == ARTIFACT else _checkpoint_metadata(content, path)
    else:
        from aimnet2mult.models.compiled_file import read_compiled_file

        compiled = read_compiled_file(path)
        kind, metadata = "compiled model", compiled.metadata
        if not metadata:
            raise ValueError(f"{path}: TorchScript, but not a model of tools.compile_jit: it holds no metadata")
        golden = len(compiled.golden["cases"]) if compiled.golden is not None else 0
    return {
        "kind": kind,
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "golden_cases": golden,
        "metadata": metadata,
    }


def _artifact_metadata(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    from aimnet2mult.models.base import read_artifact

    artifact, _ = read_artifact(content, path)
    return {**artifact.metadata, "parameters": sum(tensor.numel() for tensor in artifact.weights.values())}


def _checkpoint_metadata(content: Any, path: Path) -> dict[str, Any]:
    from aimnet2mult.constants import FIDELITY_OFFSET
    from aimnet2mult.models.base import checkpoint_content, layout_of_weights

    checkpoint = checkpoint_content(content, path)
    layout = layout_of_weights(checkpoint["model"], checkpoint, FIDELITY_OFFSET)
    kept = {key: value for key, value in checkpoint.items() if key not in ("model", "training")}
    described = {
        "num_fidelities": layout.num_fidelities,
        "fidelity_offset": layout.offset,
        "use_fidelity_readouts": layout.heads,
        "parameters": sum(tensor.numel() for tensor in checkpoint["model"].values()),
    }
    return {**described, **kept}


# --------------------------------------------------------------------------------------------------
# text
# --------------------------------------------------------------------------------------------------


def describe(info: Mapping[str, Any]) -> list[str]:
    """Return what `read_info` found as lines of text."""
    metadata = info["metadata"]
    version = f", format {metadata['format_version']}" if "format_version" in metadata else ""
    title = f"{info['file']}: {info['kind']}{version}, {info['bytes'] / 1e6:.2f} MB"
    if info["kind"] == ARTIFACT:
        lines = _artifact_lines(metadata)
    else:
        lines = _checkpoint_lines(metadata) if info["kind"] == "checkpoint" else _compiled_lines(metadata, info)
    lines.append(("sha256", info["sha256"]))
    width = max(len(heading) for heading, _ in lines) + 2
    text = [title]
    for heading, content in lines:
        indent = " " * width
        text += textwrap.wrap(
            content, WIDTH, initial_indent=heading.ljust(width), subsequent_indent=indent, break_on_hyphens=False
        )
    return text


def _compiled_lines(metadata: Mapping[str, Any], info: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = []
    if "fidelities" in metadata:
        default = metadata["default_fidelity"]
        names = [f"{f} ({name})" for f, name in enumerate(metadata["fidelity_names"])]
        lines.append(("fidelities", f"{', '.join(names)}; without the key fidelity: {names[default]}"))
        for f, own in enumerate(metadata["fidelities"]):
            lines += [(f"{names[f]} {heading}", text) for heading, text in _fidelity_lines(own)]
    else:
        level = metadata.get("fidelity_level", 0)
        name = metadata.get("fidelity_name")
        text = f"{level} ({name})" if name else str(level)
        lines.append(("fidelity", f"{text}, of {metadata.get('num_fidelities', 1)} in the training"))
        lines += _fidelity_lines(metadata)
    lines += _training_lines(metadata.get("training") or {})
    lines += _option_lines(metadata)
    weights = metadata.get("weights") or {}
    lines.append(("weights", f"{weights.get('file', '?')}, sha256 {weights.get('sha256', '?')}"))
    lines.append(("golden cases", f"{info['golden_cases']}" if info["golden_cases"] else "none"))
    if metadata.get("float32_round_off"):
        units = metadata["units"]
        sizes = [f"{key} {size:.0e} {units[key]}" for key, size in metadata["float32_round_off"].items()]
        lines.append(("round-off", f"of single precision in them: {', '.join(sizes)}"))
    lines.append(("compiled with", _versions(metadata.get("versions"))))
    lines.append(("licence", str(metadata.get("licence") or "not stated")))
    if metadata.get("comment"):
        lines.append(("comment", str(metadata["comment"])))
    return lines


def _fidelity_lines(metadata: Mapping[str, Any]) -> list[Line]:
    """What belongs to one fidelity of a compiled model."""
    from aimnet2mult.utils.text import element_ranges

    lines: list[Line] = []
    if metadata.get("level_of_theory"):
        lines.append(("level of theory", str(metadata["level_of_theory"])))
    lines.append(("elements", element_ranges(metadata["species"])))
    if "spin_resolved" in metadata:
        lines.append(("electrons", "open shells, with spin charges" if metadata["spin_resolved"] else "closed shells"))
    lines.append(("range", _ranges(metadata)))
    lines.append(("Coulomb", _coulomb(metadata.get("coulomb"))))
    lines.append(("dispersion", _dispersion(metadata.get("dispersion") or {})))
    lines.append(("atomic energies", _energies(metadata.get("sae") or {})))
    if metadata.get("sae_terms"):
        lines.append(("reference terms", f"{_terms(metadata['sae_terms'])}, included in the energy"))
    return lines


def _terms(terms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f} {TERMS[name]}" for name, value in terms.items())


def _ranges(metadata: Mapping[str, Any]) -> str:
    long_range = float(metadata.get("cutoff_lr", 0.0))
    text = f"network {metadata['cutoff']:g} Å, long-range terms "
    text += "all pairs of a molecule" if math.isinf(long_range) else f"{long_range:g} Å" if long_range else "none"
    if "periodic" not in metadata:
        return text
    return text + ("; crystals, too" if metadata["periodic"] else "; molecules only")


def _coulomb(settings: Any) -> str:
    if not settings:
        return "none"
    if isinstance(settings, str):  # files of version 1
        return settings
    numbers = [
        f"{key.replace('_', ' ')} {'chosen for each system' if value is None else value}"
        for key, value in settings.items()
        if key != "method"
    ]
    return f"{settings['method']} ({', '.join(numbers)})"


def _dispersion(entry: Mapping[str, Any]) -> str:
    method = entry.get("method", "none")
    if method == "none":
        return "none is added"
    from aimnet2mult.tools.compile_options import METHODS

    of = f" of {entry['functional']}" if entry.get("functional") else ""
    numbers = ", ".join(f"{key} {value:g}" for key, value in (entry.get("parameters") or {}).items())
    cutoff = f", within {entry['cutoff']:g} Å" if entry.get("cutoff") else ""
    return f"{METHODS.get(method, method)}{of} ({numbers}{cutoff}), {entry.get('source') or 'source not stated'}"


def _energies(sae: Mapping[int, float]) -> str:
    from aimnet2mult.constants import ELEMENT_SYMBOLS

    if len(sae) > MANY_ELEMENTS:
        return f"of {len(sae)} elements, included in the energy"
    return ", ".join(f"{ELEMENT_SYMBOLS[z]} {energy:.4f}" for z, energy in sae.items()) + " eV, included in the energy"


def _training_lines(training: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = []
    fidelities = (training.get("data") or {}).get("fidelities") or {}
    parts = []
    for name, about in fidelities.items():
        files = ", ".join(f"{Path(file['path']).name} {file['sha256'][:8]}" for file in about.get("files") or [])
        parts.append(f"{name}: {about.get('train', about.get('molecules', '?'))} molecules ({files})")
    if parts:
        lines.append(("trained on", "; ".join(parts)))
    progress = training.get("progress") or {}
    if progress:
        lines.append(("trained for", f"{progress['epoch']} epochs, {progress['iteration']} steps"))
    if training.get("versions"):
        lines.append(("trained with", _versions(training["versions"])))
    return lines


def _option_lines(metadata: Mapping[str, Any]) -> list[Line]:
    options = metadata.get("options")
    if options is None:
        return []
    words = {True: "yes", False: "no"}
    text = ", ".join(f"{key.removeprefix('compute_')} {words[bool(value)]}" for key, value in options.items())
    return [("in every call", f"energy, forces, charges; {text}")]


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items()) or "not stated"


def _artifact_lines(metadata: Mapping[str, Any]) -> list[Line]:
    from aimnet2mult.utils.text import element_ranges

    words = {"sr_embedded": "minus its short range inside", "full_embedded": "inside", "none": "not inside"}
    coulomb = words[metadata["coulomb_mode"]]
    if metadata["coulomb_mode"] == "sr_embedded":
        coulomb += f" ({metadata['coulomb_sr_rc']:g} Å, {metadata['coulomb_sr_envelope']})"
    coulomb += ", to be added" if metadata["needs_coulomb"] else ", none is to be added"
    d3 = ", ".join(f"{key} {value:g}" for key, value in (metadata["d3_params"] or {}).items())
    inside = "learned, inside" if metadata["has_embedded_d3ts"] else "none is to be added"
    channels = "open shells, with spin charges" if metadata["num_charge_channels"] == 2 else "closed shells"
    lines: list[Line] = [("parameters", f"{metadata['parameters']:,}")]
    if metadata["level_of_theory"]:
        lines.append(("level of theory", metadata["level_of_theory"]))
    lines.append(("elements", element_ranges(metadata["implemented_species"])))
    lines.append(("electrons", channels))
    lines.append(("range", f"network {metadata['cutoff']:g} Å"))
    lines.append(("Coulomb", coulomb))
    lines.append(("dispersion", f"D3(BJ) to be added ({d3})" if metadata["needs_dispersion"] else inside))
    lines.append(("atomic energies", "inside"))
    return lines


def _checkpoint_lines(metadata: Mapping[str, Any]) -> list[Line]:
    from aimnet2mult.utils.text import element_ranges

    count = metadata["num_fidelities"]
    names = metadata.get("fidelity_names") or {}
    own = "readouts of their own" if metadata["use_fidelity_readouts"] else "shared readouts"
    lines: list[Line] = [("parameters", f"{metadata['parameters']:,}")]
    lines.append(("fidelities", f"{count}, {own}" if count > 1 else "1"))
    for f in range(count):
        sae: Mapping[int | str, float] = (metadata.get("sae") or {}).get(f) or {}
        terms = {str(key): energy for key, energy in sae.items() if key in TERMS}
        species: Sequence[int] = (metadata.get("species") or {}).get(f) or [z for z in sae if isinstance(z, int)]
        level = (metadata.get("fidelity_levels") or {}).get(f)
        text = f"{level}; " if level else ""
        text += f"elements {element_ranges(sorted(species))}" if species else "elements are not stated"
        if not sae:
            text += "; no self-atomic energies"
        if terms:
            text += f"; reference terms {_terms(terms)}"
        lines.append((f"{f} ({names.get(f, 'no name')})", f"{text}; {_ledger(metadata, f)}"))
    lines += _training_lines(metadata)
    lines.append(("architecture", "inside" if metadata.get("model_config") else "not inside: --model is needed"))
    return lines


def _ledger(metadata: Mapping[str, Any], fidelity: int) -> str:
    entry = (metadata.get("dispersion") or {}).get(fidelity)
    if entry is None:
        return "dispersion of the labels not stated"
    labels = entry["labels"]
    of = f" of {labels['functional']}" if labels.get("functional") else ""
    what = "none" if labels["method"] == "none" else f"{labels['method']}{of}"
    return f"dispersion of the labels: {what}{', subtracted' if entry['subtracted'] else ''}"


def for_json(value: Any) -> Any:
    """Nested dictionaries and lists with infinite numbers as text, which JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print everything that the file says, as JSON.")
@user_errors
def main(model: str, as_json: bool) -> None:
    """Print what a MODEL is, compiled (.jpt), checkpoint or artifact (.pt): fidelity, elements, energies, origin."""
    info = read_info(model)
    if as_json:
        click.echo(json.dumps(for_json(info), indent=1, ensure_ascii=False, default=repr))
    else:
        click.echo("\n".join(describe(info)))


if __name__ == "__main__":
    main()
