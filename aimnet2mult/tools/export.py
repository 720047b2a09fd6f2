"""From a checkpoint to a format-2 artifact, the file that calculators of the AIMNet2 ecosystem take.

``python -m aimnet2mult.tools.export weights.pt model.pt --model config.yaml --sae sae.yaml --fidelity-level 0`` takes
one fidelity, puts its self-atomic energies into the atomic shifts (float64), replaces the long-range Coulomb energy by
minus its short-range part, leaves D3 to the calculator, and marks elements that the fidelity does not know. What the
checkpoint knows about itself needs no flag. The file is loaded back and must give what the model gives, or nothing is
written.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.reference_energies import TERMS
from aimnet2mult.tools.compile_options import choose_dispersion, dispersion_to_embed
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aimnet2mult.models.artifact import Artifact
    from aimnet2mult.models.golden import Difference
    from aimnet2mult.tools.compile_options import Dispersion
    from aimnet2mult.tools.compile_source import Source

logger = logging.getLogger(__name__)


def export_model(
    weights: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    sae: str | Path | None = None,
    fidelity_level: int | str | None = None,
    needs_coulomb: bool | None = None,
    needs_dispersion: bool | None = None,
    dispersion_functional: str | None = None,
) -> Artifact:
    """Write one fidelity of a checkpoint as a format-2 artifact.

    Parameters
    ----------
    weights : str or Path
        Checkpoint.
    output : str or Path
        The file to write.
    model : str or Path, optional
        Model YAML file; needed only if the checkpoint does not hold its configuration.
    sae : str or Path, optional
        Self-atomic energies of the fidelity; needed only if the checkpoint does not hold them.
    fidelity_level : int or str, optional
        Number or name of the fidelity; may be left out if there is one.
    needs_coulomb : bool, optional
        Have the Coulomb energy added, or not; default: whether the model has a long-range Coulomb energy.
    needs_dispersion : bool, optional
        Have D3(BJ) added, or not; default: whether it was subtracted from the labels, or is among the model's outputs.
    dispersion_functional : str, optional
        Functional of the D3(BJ) parameters, where neither the model nor the checkpoint has any.

    Returns
    -------
    Artifact
        What was written.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        Flags that contradict the checkpoint, dispersion that would be counted twice, what format 2 has no place for
        (such as reference energies with terms in charge or spin), a file that does not give what the model gives,
        files that are missing or cannot be written; nothing is written then.
    """
    from aimnet2mult.models.artifact import write_artifact
    from aimnet2mult.models.base import single_fidelity_model
    from aimnet2mult.models.interchange import artifact_of_network
    from aimnet2mult.tools.compile_source import check_finite, find_fidelity, open_source, self_atomic_energies
    from aimnet2mult.utils.files import atomic_path, check_writable

    check_writable(output)
    source = open_source(weights, model=model, sae=sae, fidelity_level=fidelity_level)
    fidelity = find_fidelity(source, fidelity_level)
    title = source.title(fidelity)
    dispersion = _dispersion(source, fidelity, needs_dispersion, dispersion_functional)
    energies = self_atomic_energies(source, fidelity)
    if energies.terms:
        terms = " and ".join(f"{name} ({value:g} {TERMS[name]})" for name, value in energies.terms.items())
        raise ValueError(
            f"{title} has reference energies with terms in {terms}, for which format 2 has no place: its atomic shifts "
            "know the elements only. Compile it (tools.compile_jit), or train with self-atomic energies alone"
        )
    species = sorted((source.checkpoint.get("species") or {}).get(fidelity) or energies)
    if without := [z for z in species if z not in energies]:
        from aimnet2mult.constants import element_names

        raise ValueError(f"--sae: no self-atomic energy for {element_names(without)}, which the model was trained on")
    network = single_fidelity_model(
        source.checkpoint, source.config, fidelity, source.num_fidelities, source.fidelity_offset
    )
    check_finite(network, species, title)
    artifact = artifact_of_network(
        source.config,
        network.state_dict(),
        species,
        {z: energies[z] for z in species},
        sae_with_shifts=bool(source.checkpoint.get("sae_with_shifts")),
        d3_params=dispersion.parameters,
        needs_coulomb=needs_coulomb,
        needs_dispersion=needs_dispersion,
        fidelity_name=source.names.get(fidelity),
        level_of_theory=(source.checkpoint.get("fidelity_levels") or {}).get(fidelity),
    )
    with atomic_path(output) as temporary:
        write_artifact(artifact, temporary)
        refuse_differences(compare_with_source(temporary, source, fidelity, energies, artifact), output)
    return artifact


def _dispersion(source: Source, fidelity: int, needed: bool | None, functional: str | None) -> Dispersion:
    """D3(BJ) energy that is to be added to a fidelity, by its ledger and the flags."""
    if functional is not None and needed is False:
        raise ValueError("--no-dispersion and --dispersion-functional contradict each other; leave one out")
    asked = None
    if functional is not None:
        asked = choose_dispersion("d3bj", functional)
    elif needed is False:
        asked = choose_dispersion("none")
    ledger = (source.checkpoint.get("dispersion") or {}).get(fidelity)
    dispersion, _ = dispersion_to_embed(ledger, asked, source.title(fidelity))
    if needed and dispersion.method == "none" and ledger is not None and ledger["labels"]["method"] == "d3bj":
        raise ValueError(
            f"--needs-dispersion: the labels of {source.title(fidelity)} contain D3(BJ), which the network has "
            "learned; it would be counted twice"
        )
    return dispersion


def compare_with_source(
    path: str | Path, source: Source, fidelity: int, energies: Mapping[int, float], artifact: Artifact
) -> list[Difference]:
    """Evaluate a written artifact, and the model that it was made of, for a few systems in double precision.

    Both get what the artifact says is needed; D3 without a range.
    """
    from aimnet2mult.electrostatics import LRCoulomb
    from aimnet2mult.models.base import load_checkpoint
    from aimnet2mult.models.golden import compare, golden, make_cases
    from aimnet2mult.models.loading import deployable_model

    about = artifact.metadata
    d3 = about["d3_params"]
    outputs = source.config["kwargs"]["outputs"]
    original: dict[str, Any] = {
        **source.checkpoint,
        "model_config": source.config,
        "fidelity_offset": source.fidelity_offset,
        "num_fidelities": source.num_fidelities,
        "sae": {fidelity: dict(energies)},
        "species": {fidelity: about["implemented_species"]},
        "dispersion": {},
    }
    if d3 is not None and not any(str(node["class"]).endswith(".DFTD3") for node in outputs.values()):
        labels = {"method": "d3bj", "functional": None, "parameters": dict(d3)}
        original["dispersion"] = {fidelity: {"labels": labels, "subtracted": True}}
    single = deployable_model(original, fidelity, source.path).eval()
    if about["needs_coulomb"] and about["coulomb_mode"] == "none":  # as --needs-coulomb says
        single.model.add_output("lrcoulomb", LRCoulomb())
        single.update_ranges()
    double = copy.deepcopy(single).double()
    cases = make_cases(about["implemented_species"], about["num_charge_channels"] == 2, periodic=False)
    content = golden(cases, single, double)
    written = deployable_model(load_checkpoint(path), 0, path).eval().double()
    return compare(content, "float64", written)


def refuse_differences(differences: list[Difference], output: str | Path) -> None:
    """Raise a ValueError if a written file does not give what it should."""
    for difference in differences:
        if not difference.within:
            raise ValueError(
                f"{output}: the file does not give what the model gives: {difference.text}. Nothing was written; "
                "please report this with the versions of aimnet2mult and torch"
            )


def summary(artifact: Artifact) -> list[str]:
    """Lines about an artifact for people."""
    from aimnet2mult.constants import ELEMENT_SYMBOLS

    about = artifact.metadata
    coulomb = about["coulomb_mode"]
    if about["coulomb_sr_rc"] is not None:
        coulomb += f", short range {about['coulomb_sr_rc']:g} Å ({about['coulomb_sr_envelope']})"
    if about["needs_coulomb"]:
        coulomb += "; the calculator adds the full energy"
    d3 = about["d3_params"]
    text = (
        "none" if d3 is None else "D3(BJ), added by the calculator: " + ", ".join(f"{k} {v:g}" for k, v in d3.items())
    )
    if about["has_embedded_d3ts"]:
        text = "learned (D3TS), inside"
    return [
        f"elements    {' '.join(ELEMENT_SYMBOLS[z] for z in about['implemented_species'])}",
        f"cutoff      {about['cutoff']:g} Å",
        f"Coulomb     {coulomb}",
        f"dispersion  {text}",
    ]


@click.command(context_settings={"show_default": True})
@click.argument("weights", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--model", "-m", type=click.Path(), help="Model YAML file; only for checkpoints that do not hold it.")
@click.option("--sae", "-s", type=click.Path(), help="Self-atomic energies (YAML); only for checkpoints without them.")
@click.option("--fidelity-level", help="Number or name of the fidelity; may be left out if there is one.")
@click.option(
    "--needs-coulomb/--no-coulomb",
    default=None,
    help="Have the calculator add the Coulomb energy.  [default: if the model has a long-range Coulomb energy]",
)
@click.option(
    "--needs-dispersion/--no-dispersion",
    default=None,
    help="Have the calculator add D3(BJ).  [default: if it was subtracted from the labels, or is in the model]",
)
@click.option("--dispersion-functional", help="Functional of the D3(BJ) parameters, for instance b3lyp.")
@user_errors
def main(
    weights: str,
    output: str,
    model: str | None,
    sae: str | None,
    fidelity_level: str | None,
    needs_coulomb: bool | None,
    needs_dispersion: bool | None,
    dispersion_functional: str | None,
) -> None:
    """Export one fidelity of the checkpoint WEIGHTS to the format-2 file OUTPUT of the AIMNet2 ecosystem."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    artifact = export_model(
        weights,
        output,
        model=model,
        sae=sae,
        fidelity_level=fidelity_level,
        needs_coulomb=needs_coulomb,
        needs_dispersion=needs_dispersion,
        dispersion_functional=dispersion_functional,
    )
    click.echo("\n".join([output, *summary(artifact)]))


if __name__ == "__main__":
    main()
