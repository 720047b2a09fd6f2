"""From a checkpoint to a ``.jpt``: one fidelity, with its self-atomic energies and its dispersion, as TorchScript.

``python -m aimnet2mult.tools.compile_jit --weights model.pt --output model --fidelity-level 0`` writes
``model_fid0.jpt`` and ``model_fid0_meta.yaml``; ``--fidelity-level all`` a pair of files for each fidelity, and
``--combined`` one pair for all of them, ``model_all.jpt``, in which the key ``fidelity`` of a batch selects. What the
checkpoint knows about itself needs no flag, and a flag that contradicts it is an error.

Every model is evaluated for a few systems of its own elements (`aimnet2mult.models.golden`) before it is compiled; the
compiled file is loaded back and must give the same, or nothing is written. The cases stay in the file, so that
`aimnet2mult.tools.verify` can repeat this elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from aimnet2mult.tools.compile_options import (
    ALL,
    Coulomb,
    Dispersion,
    ModelOptions,
    choose_coulomb,
    dispersion_of_flags,
)
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from aimnet2mult.tools.compile_source import Prepared, Source

logger = logging.getLogger(__name__)

F = TypeVar("F", bound="Callable[..., Any] | click.Command")


class CompiledModel(NamedTuple):
    """A model that is ready to be written.

    Attributes
    ----------
    suffix
        What the name of its file has after the prefix: ``fid0``, ``all``.
    model
        The model, not yet scripted.
    metadata
        What the file says about itself.
    golden
        Cases that it must reproduce.
    """

    suffix: str
    model: nn.Module
    metadata: dict[str, Any]
    golden: dict[str, Any]


def compile_model(
    weights: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    fidelity_level: int | str | None = None,
    fidelity_offset: int | None = None,
    num_fidelities: int | None = None,
    use_fidelity_readouts: bool | None = None,
    sae: str | Path | Mapping[str, str | Path] | None = None,
    dispersion: Dispersion | Mapping[str, Dispersion] | None = None,
    coulomb: Coulomb | None = None,
    stress: bool = False,
    hessian: bool = False,
    licence: str | None = None,
    comment: str | None = None,
    combined: bool = False,
    default_fidelity: int | str | None = None,
) -> tuple[Path, ...]:
    """Compile one fidelity of a checkpoint, or all of them.

    Parameters
    ----------
    weights : str or Path
        Checkpoint.
    output : str or Path
        Prefix of the files to write: ``<output>_fid<N>.jpt`` and ``<output>_fid<N>_meta.yaml``, N the number of the
        fidelity; ``<output>_all.jpt`` and ``<output>_all_meta.yaml`` if ``combined``.
    model : str or Path, optional
        Model YAML file; needed only if the checkpoint does not hold its configuration.
    fidelity_level : int or str, optional
        Number or name of the fidelity, or ``all``; may be left out if there is one.
    fidelity_offset, num_fidelities, use_fidelity_readouts : optional
        As in training; needed only for checkpoints that do not say.
    sae : str, Path or mapping, optional
        Self-atomic energies of the fidelity, or {number or name: file} of several; needed only if the checkpoint does
        not hold them.
    dispersion : Dispersion or mapping, optional
        For every fidelity that is compiled, or {number or name: correction}, in which ``all`` stands for those that are
        not named. Default: what was subtracted from the labels in training; none if nothing was, or if the checkpoint
        does not say (`aimnet2mult.tools.compile_options.dispersion_to_embed`).
    coulomb : Coulomb, optional
        How the Coulomb energy is summed; default: as trained.
    stress, hessian : bool
        The file computes stress (of periodic systems) and Hessians whenever it is called. Stress is refused if the
        file could never give it; such a loaded model may be switched to another Coulomb method, and then to stress.
    licence, comment : str, optional
        Lines for the metadata.
    combined : bool
        All fidelities in one file.
    default_fidelity : int or str, optional
        Number or name of the fidelity that a combined file uses where a batch does not say; default: the lowest.

    Returns
    -------
    tuple of Path
        Compiled models, each followed by its metadata file.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        Flags that contradict the checkpoint or each other, dispersion that would be counted twice, weights that are
        not finite, a compiled model that does not give what the model gave, files that are missing or cannot be
        written; nothing is written then.
    """
    from aimnet2mult.tools.compile_source import (
        check_stress,
        dispersion_by_fidelity,
        find_fidelity,
        open_source,
        prepare,
    )
    from aimnet2mult.utils.files import check_writable

    check_prefix(output)
    if combined:
        if fidelity_level not in (None, ALL):
            raise ValueError(f"--combined holds all fidelities; leave out --fidelity-level {fidelity_level}")
        fidelity_level = ALL
    elif default_fidelity is not None:
        raise ValueError("--default-fidelity is for --combined")
    source = open_source(
        weights,
        model=model,
        fidelity_offset=fidelity_offset,
        num_fidelities=num_fidelities,
        use_fidelity_readouts=use_fidelity_readouts,
        sae=sae,
        fidelity_level=fidelity_level,
    )
    chosen = range(source.num_fidelities) if fidelity_level == ALL else [find_fidelity(source, fidelity_level)]
    default = 0 if default_fidelity is None else find_fidelity(source, default_fidelity, "--default-fidelity")
    paths = [Path(f"{output}_{suffix}") for suffix in ([ALL] if combined else [f"fid{f}" for f in chosen])]
    for path in paths:
        check_writable(_jpt(path))
        check_writable(_meta(path))

    corrections = dispersion_by_fidelity(source, dispersion, chosen)
    options = ModelOptions(corrections, coulomb, stress, hessian, licence, comment)
    prepared = [prepare(source, f, options) for f in chosen]
    if stress:
        check_stress(prepared, combined)
    models = [join(source, prepared, default, options)] if combined else [single(part) for part in prepared]
    write(models, paths)
    for part in prepared:
        logger.info("%s compiled; %s added", part.title, part.dispersion.text)
    return tuple(file for path in paths for file in (_jpt(path), _meta(path)))


def check_prefix(output: str | Path) -> None:
    """Refuse a folder, or nothing, in place of the beginning of the names of files.

    Raises
    ------
    ValueError
        Says what is expected.
    """
    if not str(output) or str(output).endswith(("/", "\\")):
        raise ValueError(f"--output '{output}': expected the beginning of the names of files, such as {output}model")


def _jpt(path: Path) -> Path:
    return path.with_name(f"{path.name}.jpt")


def _meta(path: Path) -> Path:
    return path.with_name(f"{path.name}_meta.yaml")


# --------------------------------------------------------------------------------------------------
# models with their golden cases
# --------------------------------------------------------------------------------------------------


def single(part: Prepared) -> CompiledModel:
    """Model of one fidelity, with golden cases.

    Raises
    ------
    ValueError
        A result is not finite.
    """
    from aimnet2mult.models.golden import make_cases

    about = part.metadata
    cases = make_cases(about["species"], about["spin_resolved"], about["periodic"])
    return _with_golden(f"fid{part.fidelity}", part.model, about, cases)


def join(source: Source, parts: Sequence[Prepared], default: int, options: ModelOptions) -> CompiledModel:
    """Model of all fidelities, with golden cases of each one and of a batch of them all.

    Raises
    ------
    ValueError
        A result is not finite.
    """
    from aimnet2mult.models.base import names_in_checkpoint
    from aimnet2mult.models.combined import CombinedModel
    from aimnet2mult.models.golden import case_in_all_fidelities, make_cases
    from aimnet2mult.tools.compile_source import common_metadata

    names = list(names_in_checkpoint(source.checkpoint, source.num_fidelities).values())
    model = CombinedModel([part.model for part in parts], names, default)
    cases = []
    for name, part in zip(names, parts, strict=True):
        about = part.metadata
        for case in make_cases(about["species"], about["spin_resolved"], about["periodic"], name):
            cases.append({**case, "inputs": {**case["inputs"], "fidelity": part.fidelity}})
    cases += case_in_all_fidelities([part.metadata["species"] for part in parts])
    metadata = {**common_metadata(source, options), "fidelity_names": names, "default_fidelity": default}
    own = [{key: value for key, value in part.metadata.items() if key not in metadata} for part in parts]
    return _with_golden(ALL, model, {**metadata, "fidelities": own}, cases)


def _with_golden(
    suffix: str, model: nn.Module, metadata: dict[str, Any], cases: Sequence[dict[str, Any]]
) -> CompiledModel:
    from aimnet2mult.models.golden import golden, single_round_off

    model = model.eval()
    content = golden(cases, model, copy.deepcopy(model).double())
    return CompiledModel(suffix, model, {**metadata, "float32_round_off": single_round_off(content)}, content)


# --------------------------------------------------------------------------------------------------
# writing
# --------------------------------------------------------------------------------------------------


def write(models: Sequence[CompiledModel], paths: Sequence[Path]) -> None:
    """Write compiled models, ``<path>.jpt`` and ``<path>_meta.yaml``, once all of them have been verified.

    Raises
    ------
    ValueError
        A compiled model does not give what the model gave; nothing is written.
    """
    from aimnet2mult.models.compiled_file import metadata_text, save_jit_model
    from aimnet2mult.utils.files import atomic_path

    with contextlib.ExitStack() as files:
        for compiled, path in zip(models, paths, strict=True):
            temporary_jpt = files.enter_context(atomic_path(_jpt(path)))
            temporary_meta = files.enter_context(atomic_path(_meta(path)))
            save_jit_model(compiled.model, temporary_jpt, compiled.metadata, compiled.golden)
            temporary_meta.write_text(metadata_text(compiled.metadata), encoding="utf-8")
            verify_written(temporary_jpt, compiled)


def verify_written(path: Path, compiled: CompiledModel) -> None:
    """Load a file back, and compare what it says and gives with what it should.

    Raises
    ------
    ValueError
        It differs by more than round-off.
    """
    from aimnet2mult.models.compiled_file import read_compiled_file
    from aimnet2mult.models.golden import PRECISIONS, compare
    from aimnet2mult.models.jit_wrapper import load_jit_model

    content = read_compiled_file(path)
    if content.golden is None or content.metadata != compiled.metadata:
        raise ValueError(f"{compiled.suffix}: the compiled file does not hold what was written into it")
    model = load_jit_model(path)
    for precision in PRECISIONS:
        if precision == "float64":
            model.module.double()
        for difference in compare(content.golden, precision, model):
            if not difference.within:
                raise ValueError(
                    f"{compiled.suffix}: the compiled model does not give what the model gives: {difference.text}. "
                    "Nothing was written; please report this with the versions of aimnet2mult and torch"
                )


# --------------------------------------------------------------------------------------------------
# command line
# --------------------------------------------------------------------------------------------------


def parse_sae_files(values: Sequence[str]) -> str | dict[str, str] | None:
    """``FILE``, or ``NAME=FILE`` for each of several fidelities."""
    if not values:
        return None
    if len(values) == 1 and ("=" not in values[0] or Path(values[0]).exists()):
        return values[0]
    files: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals:
            raise ValueError(f"--sae {value}: of several fidelities, give each file as NAME=FILE")
        if name in files:
            raise ValueError(f"--sae {value}: a second file for {name}")
        files[name] = path
    return files


class PerFidelity(click.ParamType):
    """``VALUE`` for all fidelities, or ``NAME=VALUE`` for one: gives (fidelity or `ALL`, value)."""

    def __init__(self, kind: type) -> None:
        self.kind = click.types.convert_type(kind)
        self.name = self.kind.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Take the name of the fidelity off a value."""
        name, equals, text = value.rpartition("=")
        if equals and not name:
            self.fail(f"{value!r}: expected VALUE, or the name of a fidelity before the sign: NAME=VALUE", param, ctx)
        return name or ALL, self.kind.convert(text, param, ctx)


def _dispersion_option(suffix: str, kind: type, values: str, text: str) -> Callable[[F], F]:
    return click.option(
        f"--dispersion{suffix}", type=PerFidelity(kind), multiple=True, metavar=f"[NAME=]{values}", help=text
    )


def dispersion_flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the ``--dispersion`` options among those of a command, as `dispersion_of_flags` takes them."""
    prefix = "dispersion_"
    found = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    return {"method": options["dispersion"], **found}


@click.command(context_settings={"show_default": True})
@click.option("--weights", required=True, type=click.Path(), help="Checkpoint of the training (.pt).")
@click.option("--model", type=click.Path(), help="Model YAML file; only for checkpoints that do not hold it.")
@click.option("--output", required=True, type=click.Path(), help="Prefix of the files: PREFIX_fidN.jpt and _meta.yaml.")
@click.option(
    "--fidelity-level", help="Number or name of the fidelity to compile, or all; may be left out if there is one."
)
@click.option("--combined", is_flag=True, help="All fidelities in one file, PREFIX_all.jpt; fidelity=N selects.")
@click.option("--default-fidelity", help="Of a combined file, used where a batch does not say.  [default: the lowest]")
@click.option("--fidelity-offset", type=int, help="Distance of the element types of two fidelities, as trained.")
@click.option("--num-fidelities", type=int, help="Number of fidelities, as trained.")
@click.option("--use-fidelity-readouts", type=bool, help="Readouts per fidelity, as trained (true or false).")
@click.option(
    "--sae",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Self-atomic energies (YAML); only for checkpoints without them. Of several fidelities, one for each.",
)
@_dispersion_option(
    "",
    str,
    "[none|d3bj|d4]",
    "Dispersion correction to embed, for every fidelity that is compiled, or for the one that is named (dft=d3bj), as "
    "with all --dispersion options.  [default: what training subtracted from the labels]",
)
@_dispersion_option("-functional", str, "TEXT", "Functional whose D3(BJ) or D4 parameters to use, for instance b3lyp.")
@_dispersion_option("-s6", float, "FLOAT", "Own parameter s6; 1 if left out.")
@_dispersion_option("-s8", float, "FLOAT", "Own parameter s8.")
@_dispersion_option("-s9", float, "FLOAT", "Scale of the three-body energy.  [default: 0 for d3bj, 1 for d4]")
@_dispersion_option("-a1", float, "FLOAT", "Own parameter a1.")
@_dispersion_option("-a2", float, "FLOAT", "Own parameter a2, Bohr.")
@_dispersion_option("-cutoff", float, "FLOAT", "Range of D3(BJ) pairs, Å.  [default: 60 Bohr]")
@_dispersion_option(
    "-smoothing",
    float,
    "FLOAT",
    "Fraction of --dispersion-cutoff, at its end, over which pairs are switched off.  [default: 0.2]",
)
@click.option(
    "--coulomb", metavar="[simple|dsf|ewald]", help="How the Coulomb energy is summed.  [default: as trained]"
)
@click.option("--coulomb-cutoff", type=float, help="Range of the pairs of dsf and ewald, Å.")
@click.option("--dsf-alpha", type=float, help="Damping of dsf, 1/Å.")
@click.option("--ewald-accuracy", type=float, help="Relative size of what ewald leaves out.")
@click.option("--stress/--no-stress", default=False, help="Compute the stress of periodic systems in every call.")
@click.option("--hessian/--no-hessian", default=False, help="Compute the Hessian in every call.")
@click.option("--licence", "--license", help="Licence of the model, for instance CC-BY-4.0; part of the metadata.")
@click.option("--comment", help="What else users of the file should read; part of the metadata.")
@user_errors
def main(
    weights: str,
    model: str | None,
    output: str,
    fidelity_level: str | None,
    combined: bool,
    default_fidelity: str | None,
    fidelity_offset: int | None,
    num_fidelities: int | None,
    use_fidelity_readouts: bool | None,
    sae: tuple[str, ...],
    coulomb: str | None,
    coulomb_cutoff: float | None,
    dsf_alpha: float | None,
    ewald_accuracy: float | None,
    stress: bool,
    hessian: bool,
    licence: str | None,
    comment: str | None,
    **dispersion: Any,
) -> None:
    """Compile a trained model to TorchScript, total energies and dispersion included."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    written = compile_model(
        weights,
        output,
        model=model,
        fidelity_level=fidelity_level,
        fidelity_offset=fidelity_offset,
        num_fidelities=num_fidelities,
        use_fidelity_readouts=use_fidelity_readouts,
        sae=parse_sae_files(sae),
        dispersion=dispersion_of_flags(dispersion_flags(dispersion)),
        coulomb=choose_coulomb(coulomb, coulomb_cutoff, dsf_alpha, ewald_accuracy),
        stress=stress,
        hessian=hessian,
        licence=licence,
        comment=comment,
        combined=combined,
        default_fidelity=default_fidelity,
    )
    for path in written:
        click.echo(path)


if __name__ == "__main__":
    main()
