"""From a checkpoint to a ``.pt2``: one fidelity as a program of torch.export, or as machine code (AOTInductor).

``python -m aimnet2mult.tools.compile_pt2 --weights model.pt --output model --fidelity-level dft`` writes
``model_fid0.pt2`` and ``model_fid0_pt2_meta.yaml``. The ``.jpt`` of `aimnet2mult.tools.compile_jit` does more;
``docs/runtimes.md`` compares them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.tools import compile_jit
from aimnet2mult.tools.compile_options import ModelOptions, choose_coulomb, dispersion_of_flags
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aimnet2mult.tools.compile_options import Coulomb, Dispersion

logger = logging.getLogger(__name__)

NOT_EXPORTED = ("combined", "default_fidelity", "output", "stress", "hessian")
"""Options of `compile_jit` that have no meaning here, or another one."""

_SHARED = [option for option in compile_jit.main.params if option.name not in NOT_EXPORTED]

ENERGY_TOLERANCE = {"float32": 1e-4, "float64": 1e-8}
"""Largest difference, eV, between the total energies of the network and those of the file."""


def export_checkpoint(
    weights: str | Path,
    output: str | Path,
    *,
    fidelity_level: int | str | None = None,
    precision: str = "float32",
    aoti: bool = False,
    dispersion: Dispersion | Mapping[str, Dispersion] | None = None,
    coulomb: Coulomb | None = None,
    licence: str | None = None,
    comment: str | None = None,
    **source_options: Any,
) -> tuple[Path, Path]:
    """Export one fidelity of a checkpoint.

    Parameters
    ----------
    weights, fidelity_level, dispersion, coulomb, licence, comment
        As in `aimnet2mult.tools.compile_jit.compile_model`.
    output : str or Path
        Prefix of the files: ``<output>_fid<N>.pt2`` and ``<output>_fid<N>_pt2_meta.yaml``.
    precision : str
        ``float32`` or ``float64``; cannot be changed later.
    aoti : bool
        Machine code for this kind of processor, instead of a program.
    **source_options
        ``model, fidelity_offset, num_fidelities, use_fidelity_readouts, sae`` of `compile_model`.

    Returns
    -------
    tuple of Path
        The exported model and its metadata.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        As `compile_model`; a model that cannot be exported. Nothing is written then.
    """
    from aimnet2mult.models.compiled_file import metadata_text
    from aimnet2mult.models.exported import export_model, exported_keys, save_pt2
    from aimnet2mult.tools.compile_source import dispersion_by_fidelity, find_fidelity, open_source, prepare
    from aimnet2mult.utils.files import atomic_path, check_writable

    compile_jit.check_prefix(output)
    if fidelity_level == compile_jit.ALL:
        raise ValueError("--fidelity-level all: a .pt2 holds one fidelity; export them one by one")
    source = open_source(weights, fidelity_level=fidelity_level, **source_options)
    fidelity = find_fidelity(source, fidelity_level)
    pt2, meta = Path(f"{output}_fid{fidelity}.pt2"), Path(f"{output}_fid{fidelity}_pt2_meta.yaml")
    for path in (pt2, meta):
        check_writable(path)
    corrections = dispersion_by_fidelity(source, dispersion, [fidelity])
    options = ModelOptions(corrections, coulomb, False, False, licence, comment)
    prepared = prepare(source, fidelity, options)
    model = prepared.model.eval()
    metadata = {
        **prepared.metadata,
        "title": prepared.title,
        "kind": "AOTInductor package" if aoti else "torch.export program",
        "precision": precision,
        "periodic": False,
        "outputs": exported_keys(model),
    }
    logger.info("%s: tracing ...", prepared.title)
    program = export_model(model, precision)
    if aoti:
        logger.info("%s: compiling, this takes minutes ...", prepared.title)
    with atomic_path(meta) as temporary_meta, atomic_path(pt2) as temporary_pt2:
        save_pt2(program, temporary_pt2, metadata, aoti)
        temporary_meta.write_text(metadata_text(metadata), encoding="utf-8")
        _verify(temporary_pt2, model, precision)
    logger.info("%s exported; %s added", prepared.title, prepared.dispersion.text)
    return pt2, meta


def _verify(path: Path, model: Any, precision: str) -> None:
    """Compare a file with the model that it was made of, for batches unlike the one that was traced."""
    import torch

    from aimnet2mult.models.exported import load_pt2
    from aimnet2mult.models.golden import PRECISIONS

    exported = load_pt2(path)
    generator = torch.Generator().manual_seed(1)
    expected_model = model.to(PRECISIONS[precision])
    species = torch.tensor(exported.species)
    for n_molecules, n_atoms in ((1, 1), (1, 4), (3, 9)):
        numbers = species[torch.randint(len(species), (n_molecules, n_atoms), generator=generator)]
        # On a grid of 1.5 Å, so that no two atoms are too close, and a little off it.
        grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)[:n_atoms] * 1.5
        coord = grid + 0.2 * torch.rand(n_molecules, n_atoms, 3, generator=generator)
        mult = 1.0 + numbers.sum(1) % 2
        batch = {"coord": coord.to(PRECISIONS[precision]), "numbers": numbers, "mult": mult}
        energy, expected = exported(batch)["energy"], expected_model(batch)["energy"]
        if not torch.allclose(energy, expected, rtol=0.0, atol=ENERGY_TOLERANCE[precision]):
            raise ValueError(
                f"the exported model does not give what the model gives: {energy.tolist()} instead of "
                f"{expected.tolist()} eV. Nothing was written; please report this with the version of torch"
            )


@click.command(
    params=[
        *_SHARED,
        click.Option(
            ["--output"], required=True, type=click.Path(), help="Prefix of the files: PREFIX_fidN.pt2 and metadata."
        ),
        click.Option(
            ["--precision"],
            type=click.Choice(["float32", "float64"]),
            default="float32",
            help="Of weights, positions, forces and charges.",
        ),
        click.Option(
            ["--aoti"],
            is_flag=True,
            help="Compile to machine code with AOTInductor: takes minutes, needs a C++ compiler, for this processor.",
        ),
    ],
    context_settings={"show_default": True},
)
@user_errors
def main(
    weights: str,
    output: str,
    precision: str,
    aoti: bool,
    fidelity_level: str | None,
    coulomb: str | None,
    coulomb_cutoff: float | None,
    dsf_alpha: float | None,
    ewald_accuracy: float | None,
    licence: str | None,
    comment: str | None,
    sae: tuple[str, ...],
    **rest: Any,
) -> None:
    """Export a trained model with torch.export, total energies and dispersion included, for molecules on the CPU."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    dispersion = {key: rest.pop(key) for key in [*rest] if key.startswith("dispersion")}
    written = export_checkpoint(
        weights,
        output,
        fidelity_level=fidelity_level,
        precision=precision,
        aoti=aoti,
        dispersion=dispersion_of_flags(compile_jit.dispersion_flags(dispersion)),
        coulomb=choose_coulomb(coulomb, coulomb_cutoff, dsf_alpha, ewald_accuracy),
        licence=licence,
        comment=comment,
        sae=compile_jit.parse_sae_files(sae),
        **rest,
    )
    for path in written:
        click.echo(path)


if __name__ == "__main__":
    main()
