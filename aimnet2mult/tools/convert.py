"""From a legacy TorchScript model of the AIMNet2 ecosystem to a format-2 artifact, which can be changed and trained.

``python -m aimnet2mult.tools.convert model.jpt config.yaml model.pt`` takes weights, elements and cutoff from the
program, the architecture from the configuration that it was made with. Coulomb and D3 energies, which are fixed inside
the program, are left to the calculator. The new file must give what the program gives, or nothing is written.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aimnet2mult.tools.export import refuse_differences, summary
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from aimnet2mult.models.artifact import Artifact
    from aimnet2mult.models.golden import Difference

logger = logging.getLogger(__name__)

D3_NOTICE = 1e-5
"""eV; differences of D3 energies from which on they are reported."""


def convert_model(source: str | Path, config: str | Path, output: str | Path) -> Artifact:
    """Write a legacy TorchScript model as a format-2 artifact.

    Parameters
    ----------
    source : str or Path
        The ``.jpt`` file. TorchScript files are programs: convert only what you trust.
    config : str or Path
        Model YAML file, ours or of the published package.
    output : str or Path
        The file to write.

    Returns
    -------
    Artifact
        What was written.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        Not a legacy model, a configuration of another architecture, a file that does not give what the program gives,
        files that are missing or cannot be written; nothing is written then.
    """
    from aimnet2mult.models.artifact import find_outputs, write_artifact
    from aimnet2mult.models.base import load_model_config
    from aimnet2mult.models.golden import table
    from aimnet2mult.models.interchange import artifact_of_network
    from aimnet2mult.models.legacy import (
        SPECIES_BUFFERS,
        LegacyNetwork,
        is_compiled_model,
        legacy_d3_params,
        legacy_metadata,
        open_torchscript,
    )
    from aimnet2mult.models.safe_file import is_torchscript
    from aimnet2mult.utils.files import atomic_path, check_writable

    check_writable(output)
    model_config = load_model_config(config)
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file")
    if not is_torchscript(source):
        raise ValueError(f"{source}: not a TorchScript file; checkpoints are exported (tools.export)")
    module, about = open_torchscript(source)
    if is_compiled_model(module, about):
        raise ValueError(
            f"{source}: a compiled model of this package; export the checkpoint it was made of (tools.export)"
        )
    network = LegacyNetwork(module, source)
    outputs = model_config["kwargs"]["outputs"]
    for inside, named, what in (
        (network.coulomb_method != "none", bool(find_outputs(outputs, "LRCoulomb")), "long-range Coulomb energy"),
        (legacy_d3_params(module) is not None, bool(find_outputs(outputs, "DFTD3")), "D3 energy"),
        (
            legacy_metadata(module, source)["has_embedded_d3ts"],
            bool(find_outputs(outputs, "D3TS")),
            "learned dispersion",
        ),
    ):
        if inside != named:
            has, other = (source, config) if inside else (config, source)
            raise ValueError(f"{has} has a {what}, {other} has none; use the model file that the program was made with")
    weights = {key: value for key, value in module.state_dict().items() if key not in SPECIES_BUFFERS}
    try:
        artifact = artifact_of_network(model_config, weights, network.species, None, d3_params=legacy_d3_params(module))
        if abs(artifact.metadata["cutoff"] - network.cutoff) > 1e-4:
            raise ValueError(
                f"its cutoff is {network.cutoff:g} Å, but its network reaches {artifact.metadata['cutoff']:g} Å"
            )
        taken = artifact.weights.keys() & weights.keys()
        logger.debug(f"{len(taken)} tensors taken, {sum(weights[key].numel() for key in taken)} numbers")
        logger.debug(f"left out, as others add it or have it: {', '.join(sorted(weights.keys() - taken)) or 'nothing'}")
        logger.debug(f"added: {', '.join(sorted(artifact.weights.keys() - taken)) or 'nothing'}")
        with atomic_path(output) as temporary:
            write_artifact(artifact, temporary)
            differences = compare_with_program(temporary, source)
            refuse_differences(differences, output)
        logger.debug("differences to the program\n%s", "\n".join(table(differences)))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return artifact


def compare_with_program(path: str | Path, source: str | Path) -> list[Difference]:
    """Evaluate a written artifact and the program that it was made of for a few systems, without D3.

    D3 energies are compared apart: the program may limit coordination numbers, or take another table.
    """
    from aimnet2mult.models.base import load_checkpoint
    from aimnet2mult.models.golden import compare, golden, make_cases
    from aimnet2mult.models.legacy import legacy_output, open_torchscript
    from aimnet2mult.models.loading import deployable_legacy, deployable_model

    checkpoint = load_checkpoint(path)
    bare = {**checkpoint, "dispersion": {}}
    single = deployable_model(bare, 0, path).eval()
    double = deployable_model(bare, 0, path).eval().double()
    cases = make_cases(single.species, single.spin_resolved, periodic=False)
    cases = [case for case in cases if not case["options"].get("compute_hessian")]
    content = golden(cases, single, double)

    module, _ = open_torchscript(source)
    d3 = legacy_output(module, "dftd3", "d3bj")
    with_d3 = checkpoint.get("dispersion")
    if with_d3 and d3 is not None:
        whole = golden(
            cases, deployable_model(checkpoint, 0, path).eval(), deployable_model(checkpoint, 0, path).eval().double()
        )
        found = max(
            d.found for d in compare(whole, "float32", deployable_legacy(module, source)) if d.quantity == "energy"
        )
        if found > D3_NOTICE:
            logger.info(
                f"with D3 the energies differ by up to {found:.1e} eV: the program computes it otherwise (this package "
                "agrees with s-dftd3)"
            )
        d3.s6, d3.s8 = 0.0, 0.0
    return compare(content, "float32", deployable_legacy(module, source))


@click.command(context_settings={"show_default": True})
@click.argument("source", type=click.Path())
@click.argument("config", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--verbose", "-v", is_flag=True, help="Say what was taken and left out, and what differs.")
@user_errors
def main(source: str, config: str, output: str, verbose: bool) -> None:
    """Convert the legacy TorchScript model SOURCE (.jpt), made with CONFIG (.yaml), to the format-2 file OUTPUT."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="%(levelname)s: %(message)s")
    artifact = convert_model(source, config, output)
    click.echo("\n".join([output, *summary(artifact)]))


if __name__ == "__main__":
    main()
