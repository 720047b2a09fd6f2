"""Look at datasets before training: ``python -m aimnet2mult.tools.check_data file.h5 [...]``.

Everything that is found is named with file, group and row, as text and as JSON. The checks themselves are in
`aimnet2mult.data.checks`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.utils.cli import UserError, user_errors
from aimnet2mult.utils.files import check_writable, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np

    from aimnet2mult.data.base import MoleculeSource
    from aimnet2mult.data.checks import Finding, Report, Thresholds

logger = logging.getLogger(__name__)

EXIT_FOUND = 1
"""Exit status when there are errors (or, with ``--strict``, warnings)."""


@dataclass
class Inputs:
    """What is to be checked.

    Attributes
    ----------
    files, validation : dict of str to list of Path
        Fidelity -> files of its training and of its separate validation data.
    sae : dict of str to Path
        Fidelity -> file of its self-atomic energies.
    val_fraction : float
        Share of the molecules of ``files`` that training splits off for validation.
    seed : int
        Seed of that split.
    split_by : str
        What stays together in it (`aimnet2mult.data.splits.split_indices`).
    """

    files: dict[str, list[Path]] = field(default_factory=dict)
    validation: dict[str, list[Path]] = field(default_factory=dict)
    sae: dict[str, Path] = field(default_factory=dict)
    val_fraction: float = 0.0
    seed: int = 0
    split_by: str = "molecule"


def inputs_of_arguments(datasets: Sequence[str], validation: Sequence[str], sae: Sequence[str]) -> Inputs:
    """Understand ``file.h5``, ``name=file.h5`` and patterns.

    Raises
    ------
    ValueError, FileNotFoundError
        A file that does not exist, two files of one name, a name that is not among the fidelities.
    """
    from aimnet2mult.data.sgdataset import expand_files

    inputs = Inputs()
    named: dict[str, list[str]] = {}
    for argument in datasets:
        name, _, file = argument.partition("=")
        if file and not Path(argument).exists():
            if not name:
                raise ValueError(f"{argument}: the name before = is missing")
            named.setdefault(name, []).append(file)
            continue
        for path in expand_files(argument):
            if path.stem in inputs.files or path.stem in named:
                raise ValueError(f"{path}: another file is called {path.stem}, too. Name them: NAME={argument}")
            inputs.files[path.stem] = [path]
    for name, patterns in named.items():
        if name in inputs.files:
            raise ValueError(f"{name}={patterns[0]}: a file is called {name}, too. Choose another name.")
        inputs.files[name] = expand_files(patterns)
    for name, patterns in _named_files("--val", validation, inputs.files).items():
        inputs.validation[name] = expand_files(patterns)
    for name, files in _named_files("--sae", sae, inputs.files).items():
        if len(files) > 1:
            raise ValueError(f"--sae: {name} has {len(files)} files, one was expected")
        inputs.sae[name] = Path(files[0])
    return inputs


def _named_files(option: str, arguments: Iterable[str], known: Mapping[str, object]) -> dict[str, list[str]]:
    """``name=file`` arguments by name; a bare file belongs to the only fidelity there is."""
    result: dict[str, list[str]] = {}
    for argument in arguments:
        name, _, file = argument.partition("=")
        if not file:
            if len(known) != 1:
                raise ValueError(
                    f"{option} {argument}: which fidelity? Write NAME={argument}; known: {', '.join(known)}"
                )
            name, file = next(iter(known)), argument
        if name not in known:
            raise ValueError(f"{option} {argument}: {name} is not among the fidelities: {', '.join(known)}")
        result.setdefault(name, []).append(file)
    return result


def inputs_of_config(path: Path, overrides: Sequence[str]) -> Inputs:
    """Take files, self-atomic energies and the split from the settings of a training.

    Raises
    ------
    ValueError, FileNotFoundError
        As `aimnet2mult.train.configuration.load_config`; the packages of training are not installed.
    """
    try:
        from aimnet2mult.train.configuration import load_config
        from aimnet2mult.train.schema import named_fidelities
    except ModuleNotFoundError as error:
        raise ValueError(
            f'--config needs the package {error.name}, which is not installed: pip install "aimnet2mult[train]"'
        ) from error
    config = load_config(path, overrides)
    data, fidelities = config.data, named_fidelities(config)
    sae = {} if data.sae is None else {name: fidelity.sae for name, fidelity in fidelities.items() if fidelity.sae}
    return Inputs(
        {name: fidelity.files for name, fidelity in fidelities.items()},
        {name: fidelity.val_files for name, fidelity in fidelities.items() if fidelity.val_files},
        sae,
        data.val_fraction if data.separate_val else 0.0,
        config.seed,
        data.val_split_by,
    )


def check_inputs(inputs: Inputs, limits: Thresholds) -> Report:
    """Open and check everything; files that cannot be opened become findings.

    Raises
    ------
    ValueError, FileNotFoundError
        A file with self-atomic energies is missing or wrong.
    """
    from aimnet2mult.data.checks import Report, check
    from aimnet2mult.data.sae import load_sae

    sae = {name: load_sae(path) for name, path in inputs.sae.items()}
    findings: list[Finding] = []
    sources = _open(inputs.files, findings)
    validation = _open(inputs.validation, findings)
    report = check(sources, validation, _held_out(inputs, sources), sae, limits)
    return Report(report.summaries, findings + report.findings)


def _open(files: Mapping[str, list[Path]], findings: list[Finding]) -> dict[str, MoleculeSource]:
    from aimnet2mult.data.checks import unreadable
    from aimnet2mult.data.sgdataset import DatasetError, open_dataset

    sources = {}
    for name, paths in files.items():
        try:
            sources[name] = open_dataset(paths)
        except DatasetError as error:
            findings.append(unreadable(name, error))
    return sources


def _held_out(inputs: Inputs, sources: Mapping[str, MoleculeSource]) -> dict[str, np.ndarray]:
    """Molecules of each fidelity that training will split off, by their index in the fidelity."""
    from aimnet2mult.data.mixed import MixedFidelityDataset
    from aimnet2mult.data.sgdataset import DatasetError
    from aimnet2mult.data.splits import split_indices

    if not inputs.val_fraction:
        return {}
    if len(sources) < len(inputs.files):
        logger.warning("the split is not checked, since not all datasets can be opened")
        return {}
    try:
        dataset = MixedFidelityDataset(dict(enumerate(sources.values())))
    except DatasetError:  # the checks will say what is wrong
        logger.warning("the split is not checked, since training would refuse the data")
        return {}
    divided = [f for f, name in enumerate(sources) if name not in inputs.validation]
    names = dict(enumerate(sources))
    _, held_out = split_indices(dataset, inputs.val_fraction, inputs.seed, inputs.split_by, divided, names)
    return {names[f]: inside for f, inside in dataset.by_fidelity(held_out).items()}


@click.command(context_settings={"show_default": True})
@click.argument("datasets", nargs=-1, metavar="[NAME=]FILE...")
@click.option("--val", "validation", multiple=True, metavar="[NAME=]FILE", help="Separate validation data.")
@click.option("--config", type=click.Path(path_type=Path), help="Check what this training configuration uses.")
@click.option(
    "--sae",
    multiple=True,
    metavar="[NAME=]YAML",
    help="Self-atomic energies that training will subtract; default: fitted here.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write the report as JSON, too; - prints nothing but JSON.")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option("--max-examples", default=5, type=click.IntRange(min=1), help="Molecules named in each finding.")
@click.option("--close", default=0.5, type=click.FloatRange(min=0), help="Atoms closer than this are reported, Å.")
@click.option("--far", default=15.0, type=click.FloatRange(min=0), help="Gaps wider than this are reported, Å.")
@click.option(
    "--duplicate",
    default=1e-3,
    type=click.FloatRange(min=0, max=0.1),
    help="Geometries are the same when no distance differs by more, Å.",
)
@click.option(
    "--charge-sum", default=0.05, type=click.FloatRange(min=0), help="Sums of atomic charges may be off by this, e."
)
@click.option("--net-force", default=0.3, type=click.FloatRange(min=0), help="Forces may add up to this, eV/Å.")
@click.option(
    "--outlier",
    default=10.0,
    type=click.FloatRange(min=0),
    help="Energies this many usual deviations off are reported.",
)
@user_errors
def main(
    datasets: tuple[str, ...],
    validation: tuple[str, ...],
    config: Path | None,
    sae: tuple[str, ...],
    json_path: str | None,
    strict: bool,
    **limits: Any,
) -> None:
    """Check datasets (HDF5) before training on them, and say what is wrong, where, and what to do.

    Each FILE is a fidelity, called by its name without the ending; patterns work. NAME=FILE gives another name, and
    several FILEs of one NAME are one dataset. With --config, the arguments are key=value overrides of the
    configuration, as in training.

    Exit status: 0 without errors, 1 when errors were found, 2 for a mistake on the command line.
    """
    from aimnet2mult.data.checks import Thresholds

    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    logger.setLevel(logging.WARNING)
    json_file = None if json_path in (None, "-") else json_path
    if json_file is not None:
        check_writable(json_file)
    if config is not None:
        if validation or sae:
            raise UserError("--val and --sae do not go with --config, which names these files itself")
        inputs = inputs_of_config(config, datasets)
    elif datasets:
        inputs = inputs_of_arguments(datasets, validation, sae)
    else:
        raise UserError("no datasets given: name at least one file, or --config")
    report = check_inputs(inputs, Thresholds(**limits))
    content = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if json_path == "-":
        click.echo(content, nl=False)
    else:
        click.echo(report.text())
    if json_file is not None:
        write_text_atomic(json_file, content)
        click.echo(f"\nwritten: {json_file}")
    if report.count("error") or (strict and report.count("warning")):
        click.get_current_context().exit(EXIT_FOUND)


if __name__ == "__main__":
    main()
