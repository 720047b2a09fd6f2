"""From a checkpoint to a ``.jpt``: one fidelity, with its self-atomic energies and its dispersion, as TorchScript.

``python -m aimnet2mult.tools.compile_jit --weights model.pt --output model --fidelity-level 0`` writes
``model_fid0.jpt`` and ``model_fid0_meta.yaml``. What the checkpoint knows about itself needs no flag, and a flag
that contradicts it is an error.

That goes for dispersion, too: what training subtracted from the labels of the fidelity is what is embedded, with the
very same parameters. Another correction than that is embedded on request, with a warning, but never on top of labels
that contain dispersion.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.constants import ELEMENT_SYMBOLS, FIDELITY_OFFSET, element_names
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aimnet2mult.models.aimnet2 import AIMNet2

logger = logging.getLogger(__name__)

JPT_FORMAT_VERSION = 1
"""Version of the metadata of a compiled file."""

SUBTRACTED = "subtracted from the labels"
COMMAND_LINE = "command line"
"""Where an embedded correction comes from, in the metadata."""

SAE_TOLERANCE = 1e-6
"""eV; self-atomic energies on the command line and in the checkpoint may differ by so much."""


@dataclass(frozen=True)
class Dispersion:
    """The dispersion correction to embed: ``none``, or ``d3bj`` with its damping parameters."""

    method: str = "none"
    functional: str | None = None
    parameters: dict[str, float] | None = None

    @property
    def text(self) -> str:
        """For messages: ``D3(BJ) of b3lyp``."""
        if self.method == "none":
            return "no dispersion"
        return f"D3(BJ) of {self.functional}" if self.functional else f"D3(BJ) with the parameters {self.parameters}"


def choose_dispersion(
    method: str | None, functional: str | None = None, parameters: Mapping[str, float | None] | None = None
) -> Dispersion | None:
    """Check what was asked for: nothing (None), or a functional, or all of s6 (default 1), s8, a1, a2, not both.

    Raises
    ------
    ValueError
        Says which flag is missing, superfluous or unknown.
    """
    given = {key: float(value) for key, value in (parameters or {}).items() if value is not None}
    if method is None or method == "none":
        if functional is not None or given:
            raise ValueError("a functional or parameters without D3(BJ): use --dispersion d3bj, or leave them out")
        return None if method is None else Dispersion()
    if method == "d4":
        raise ValueError("--dispersion d4 is not available yet; use --dispersion d3bj or none")
    if method != "d3bj":
        raise ValueError(f"--dispersion {method} is unknown; known: none, d3bj")
    if functional is not None:
        if given:
            raise ValueError("--dispersion-functional and --dispersion-s6/-s8/-a1/-a2 exclude each other; give one")
        from aimnet2mult.dispersion_params import d3bj_parameters

        damping = d3bj_parameters(functional)
        return Dispersion("d3bj", functional, {key: float(getattr(damping, key)) for key in ("s6", "s8", "a1", "a2")})
    missing = [key for key in ("s8", "a1", "a2") if key not in given]
    if missing:
        flags = ", ".join(f"--dispersion-{key}" for key in missing)
        raise ValueError(f"--dispersion d3bj needs --dispersion-functional, or its own parameters: {flags} missing")
    return Dispersion("d3bj", None, {"s6": 1.0, **given})


def dispersion_to_embed(
    entry: Mapping[str, Any] | None, asked: Dispersion | None, fidelity: str
) -> tuple[Dispersion, str | None]:
    """The correction that belongs to a fidelity, by its ledger and what the user asks for.

    Parameters
    ----------
    entry : mapping or None
        ``labels`` and ``subtracted`` of the fidelity, as in checkpoints; None if the checkpoint does not say.
    asked : Dispersion or None
        What the user asks for; None for what belongs to the labels.
    fidelity : str
        What to call it in messages.

    Returns
    -------
    dispersion : Dispersion
        The correction.
    source : str or None
        Where it comes from, for the metadata.

    Raises
    ------
    ValueError
        A correction on top of labels that contain dispersion.
    """
    from aimnet2mult.data.ledger import DispersionLabel

    chosen = asked or Dispersion()
    source = None if chosen.method == "none" else COMMAND_LINE
    if entry is None:
        return chosen, source
    labels = DispersionLabel.from_dict(entry["labels"])
    if entry["subtracted"]:
        if asked is None or asked.parameters == labels.parameters:
            return Dispersion(labels.method, labels.functional, labels.parameters), SUBTRACTED
        logger.warning(
            f"{fidelity}: training subtracted {labels.text} from the labels, and this model gets {chosen.text}, as "
            "--dispersion says: its energies and forces are not those of the labels' level of theory"
        )
    elif chosen.method == "none":
        if asked is None and labels.method == "none":
            logger.info(
                f"{fidelity}: the labels contain no dispersion, and none is added. To add it: --dispersion d3bj "
                "--dispersion-functional NAME"
            )
    elif labels.method == "unknown":
        logger.warning(
            f"{fidelity}: it was not stated which dispersion the labels contain. If they contain any, this model "
            f"counts it twice with {chosen.text}"
        )
    elif labels.method != "none":
        remedy = ", or train with subtract_dispersion: true for this fidelity" if labels.method == "d3bj" else ""
        raise ValueError(
            f"--dispersion d3bj: the labels of {fidelity} contain {labels.text}, which the network has learned; with "
            f"{chosen.text} on top, dispersion would be counted twice. Leave the flag out{remedy}."
        )
    return chosen, source


def differing_key(a: Any, b: Any, path: str = "") -> str | None:
    """Dotted path of the first difference between two nested configurations, None if they agree."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                return f"{path}{key}"
            found = differing_key(a[key], b[key], f"{path}{key}.")
            if found:
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            found = differing_key(left, right, f"{path}{i}.")
            if found:
                return found
        return None
    return None if a == b else path.rstrip(".")


def _agree(flag: str, given: Any, known: Any, default: Any) -> Any:
    """The checkpoint's value if it knows it, else the flag's, else the default; a contradiction is an error."""
    if known is None:
        return default if given is None else given
    if given is not None and given != known:
        raise ValueError(f"{flag} {given} contradicts the checkpoint, which says {known}; leave the flag out")
    return known


def _fidelity(asked: int | str | None, count: int, names: Mapping[int, str]) -> int:
    """Number of the fidelity that a number or name stands for; may be left out if there is one."""
    numbers = range(count)
    known = ", ".join(f"{f} ({names.get(f, 'no name')})" for f in numbers) if names else f"0..{count - 1}"
    if asked is None:
        if count > 1:
            raise ValueError(f"--fidelity-level: the checkpoint has {count} fidelities, choose one of {known}")
        return 0
    by_name = {name: number for number, name in names.items()}
    if asked in by_name:
        return by_name[asked]
    if str(asked) not in map(str, numbers):
        raise ValueError(f"--fidelity-level {asked}: the checkpoint has the fidelities {known}")
    return int(asked)


def _model_config(checkpoint: Mapping[str, Any], path: str | Path | None) -> dict[str, Any]:
    from aimnet2mult.models.base import load_model_config

    known = checkpoint.get("model_config")
    if path is None:
        if known is None:
            raise ValueError("--model: the checkpoint does not hold its model configuration; give the YAML file")
        return known
    given = load_model_config(path)
    if known is not None:
        difference = differing_key(given, known)
        if difference:
            raise ValueError(f"--model {path}: {difference} differs from the checkpoint; leave the flag out")
    return given


def _sae(checkpoint: Mapping[str, Any], fidelity: int, path: str | Path | None) -> dict[int, float]:
    from aimnet2mult.data.sae import load_sae

    known: dict[int, float] | None = (checkpoint.get("sae") or {}).get(fidelity)
    if path is None:
        if not known:
            raise ValueError("--sae: the checkpoint holds no self-atomic energies; give the YAML file of this fidelity")
        return known
    given = load_sae(path)
    if known:
        for z in sorted({*known, *given}):
            if z not in known or z not in given or abs(known[z] - given[z]) > SAE_TOLERANCE:
                raise ValueError(
                    f"--sae {path}: the energy of {element_names([z])} differs from the one that fidelity {fidelity} "
                    f"was trained with ({given.get(z, 'none')} against {known.get(z, 'none')} eV); leave the flag out"
                )
    return given


def load_single_fidelity(
    checkpoint: Mapping[str, Any],
    config: Mapping[str, Any],
    fidelity: int,
    num_fidelities: int,
    fidelity_offset: int,
) -> AIMNet2:
    """Plain AIMNet2 of one fidelity, from the weights of one or of several.

    Raises
    ------
    ValueError
        The weights are of another architecture.
    """
    import copy

    from aimnet2mult.models.aimnet2 import AIMNet2
    from aimnet2mult.models.base import build_model, load_weights, unused_copies
    from aimnet2mult.models.mixed_fidelity_aimnet2 import fidelity_slice, is_type_table

    weights = checkpoint["model"]
    if num_fidelities > 1:
        weights = fidelity_slice(weights, fidelity, fidelity_offset)
    else:
        skipped = unused_copies(weights)
        weights = {key: value for key, value in weights.items() if key not in skipped}
    rows = next(value.shape[0] for key, value in weights.items() if is_type_table(key))
    config = copy.deepcopy(dict(config))
    config["kwargs"]["num_types"] = rows
    model = build_model(config)
    assert isinstance(model, AIMNet2)
    load_weights(model, weights)
    return model


def compile_model(
    weights: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    fidelity_level: int | str | None = None,
    fidelity_offset: int | None = None,
    num_fidelities: int | None = None,
    use_fidelity_readouts: bool | None = None,
    sae: str | Path | None = None,
    dispersion: Dispersion | None = None,
) -> tuple[Path, Path]:
    """Compile one fidelity of a checkpoint.

    Parameters
    ----------
    weights : str or Path
        Checkpoint.
    output : str or Path
        Prefix of the files to write: ``<output>_fid<N>.jpt`` and ``<output>_fid<N>_meta.yaml``, N the number of the
        fidelity.
    model : str or Path, optional
        Model YAML file; needed only if the checkpoint does not hold its configuration.
    fidelity_level : int or str, optional
        Number or name of the fidelity; may be left out if there is one.
    fidelity_offset, num_fidelities, use_fidelity_readouts : optional
        As in training; needed only for checkpoints that do not say.
    sae : str or Path, optional
        Self-atomic energies of the fidelity; needed only if the checkpoint does not hold them.
    dispersion : Dispersion, optional
        Default: what was subtracted from the labels in training; none if nothing was, or if the checkpoint does not
        say (`dispersion_to_embed`).

    Returns
    -------
    tuple of Path
        The compiled model and its metadata file.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        Flags that contradict the checkpoint or each other, dispersion that would be counted twice, files that are
        missing or cannot be written; nothing is written then.
    """
    import torch

    from aimnet2mult.dispersion import RationalDispersion
    from aimnet2mult.models.base import CheckpointError, layout_of_weights, load_checkpoint, versions
    from aimnet2mult.models.compiled_file import metadata_text, save_jit_model
    from aimnet2mult.models.jit_wrapper import DeployableModel
    from aimnet2mult.modules import DFTD3, SelfAtomicEnergies
    from aimnet2mult.utils.files import atomic_path, check_writable

    checkpoint = load_checkpoint(weights)
    state = checkpoint["model"]
    offset = _agree("--fidelity-offset", fidelity_offset, checkpoint.get("fidelity_offset"), FIDELITY_OFFSET)
    try:
        layout = layout_of_weights(state, {**checkpoint, "fidelity_offset": offset}, offset)
    except CheckpointError as error:
        raise ValueError(f"--fidelity-offset {offset}: {error}") from error
    count, heads = _agree("--num-fidelities", num_fidelities, layout.num_fidelities, 1), layout.heads
    _agree("--use-fidelity-readouts", use_fidelity_readouts, heads if count > 1 else None, heads)
    names = checkpoint.get("fidelity_names") or {}
    fidelity = _fidelity(fidelity_level, count, names)
    name = names.get(fidelity)
    label = f"fidelity {fidelity}" + (f" ({name})" if name else "")
    ledger = (checkpoint.get("dispersion") or {}).get(fidelity)
    dispersion, source = dispersion_to_embed(ledger, dispersion, label)
    config = _model_config(checkpoint, model)
    energies = _sae(checkpoint, fidelity, sae)
    species = sorted((checkpoint.get("species") or {}).get(fidelity) or energies)
    without = [z for z in species if z not in energies]
    if without:
        raise ValueError(f"--sae: no self-atomic energy for {element_names(without)}, which the model was trained on")

    jpt = Path(f"{output}_fid{fidelity}.jpt")
    meta = Path(f"{output}_fid{fidelity}_meta.yaml")
    check_writable(jpt)
    check_writable(meta)

    network = load_single_fidelity(checkpoint, config, fidelity, count, offset)
    beyond = [z for z in species if z >= network.num_types]
    if beyond:
        raise ValueError(f"{element_names(beyond)}: the embedding ends at Z = {network.num_types - 1}")
    if dispersion.parameters is not None and any(isinstance(m, RationalDispersion) for m in network.readouts()):
        raise ValueError(
            f"{dispersion.text}: the model has a dispersion energy of its own among its outputs, and dispersion would "
            "be counted twice. Use --dispersion none."
        )
    network.add_output("self_atomic_energies", SelfAtomicEnergies({z: energies[z] for z in species}))
    if dispersion.parameters is not None:
        p = dispersion.parameters
        network.add_output("dftd3", DFTD3(s8=p["s8"], a1=p["a1"], a2=p["a2"], s6=p["s6"]))
    deployable = DeployableModel(network, species, label)

    metadata: dict[str, Any] = {
        "format_version": JPT_FORMAT_VERSION,
        "fidelity_level": fidelity,
        "fidelity_name": name,
        "level_of_theory": (checkpoint.get("fidelity_levels") or {}).get(fidelity),
        "num_fidelities": count,
        "units": {"energy": "eV", "forces": "eV/Å", "charges": "e", "coord": "Å"},
        "species": species,
        "elements": [ELEMENT_SYMBOLS[z] for z in species],
        "cutoff": deployable.cutoff,
        "cutoff_lr": deployable.cutoff_lr,
        "coulomb": next((str(m.method) for m in network.readouts() if hasattr(m, "method")), None),
        "sae": {z: energies[z] for z in species},
        "labels_dispersion": None if ledger is None else dict(ledger["labels"]),
        "dispersion": {
            "source": source,
            "method": dispersion.method,
            "functional": dispersion.functional,
            "parameters": dispersion.parameters,
        },
        "weights": {"file": Path(weights).name, "sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest()},
        "model_config": config,
        "versions": versions(),
    }
    with atomic_path(meta) as temporary_meta, atomic_path(jpt) as temporary_jpt:
        save_jit_model(deployable, temporary_jpt, metadata)
        temporary_meta.write_text(metadata_text(metadata), encoding="utf-8")
    logger.info("%s compiled with torch %s; %s added", label, torch.__version__, dispersion.text)
    return jpt, meta


@click.command(context_settings={"show_default": True})
@click.option("--weights", required=True, type=click.Path(), help="Checkpoint of the training (.pt).")
@click.option("--model", type=click.Path(), help="Model YAML file; only for checkpoints that do not hold it.")
@click.option("--output", required=True, type=click.Path(), help="Prefix of the files: PREFIX_fidN.jpt and _meta.yaml.")
@click.option("--fidelity-level", help="Number or name of the fidelity to compile; may be left out if there is one.")
@click.option("--fidelity-offset", type=int, help="Distance of the element types of two fidelities, as trained.")
@click.option("--num-fidelities", type=int, help="Number of fidelities, as trained.")
@click.option("--use-fidelity-readouts", type=bool, help="Readouts per fidelity, as trained (true or false).")
@click.option("--sae", type=click.Path(), help="Self-atomic energies (YAML); only for checkpoints without them.")
@click.option(
    "--dispersion",
    metavar="[none|d3bj]",
    help="Dispersion correction to embed.  [default: what training subtracted from the labels]",
)
@click.option("--dispersion-functional", help="Functional whose D3(BJ) parameters to use, for instance b3lyp.")
@click.option("--dispersion-s6", type=float, help="Own D3(BJ) parameter s6; 1 if left out.")
@click.option("--dispersion-s8", type=float, help="Own D3(BJ) parameter s8.")
@click.option("--dispersion-a1", type=float, help="Own D3(BJ) parameter a1.")
@click.option("--dispersion-a2", type=float, help="Own D3(BJ) parameter a2, Bohr.")
@user_errors
def main(
    weights: str,
    model: str | None,
    output: str,
    fidelity_level: str | None,
    fidelity_offset: int | None,
    num_fidelities: int | None,
    use_fidelity_readouts: bool | None,
    sae: str | None,
    dispersion: str | None,
    dispersion_functional: str | None,
    dispersion_s6: float | None,
    dispersion_s8: float | None,
    dispersion_a1: float | None,
    dispersion_a2: float | None,
) -> None:
    """Compile one fidelity of a trained model to TorchScript, total energies and dispersion included."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    own = {"s6": dispersion_s6, "s8": dispersion_s8, "a1": dispersion_a1, "a2": dispersion_a2}
    jpt, meta = compile_model(
        weights,
        output,
        model=model,
        fidelity_level=fidelity_level,
        fidelity_offset=fidelity_offset,
        num_fidelities=num_fidelities,
        use_fidelity_readouts=use_fidelity_readouts,
        sae=sae,
        dispersion=choose_dispersion(dispersion, dispersion_functional, own),
    )
    click.echo(jpt)
    click.echo(meta)


if __name__ == "__main__":
    main()
