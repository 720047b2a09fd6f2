"""Errors of models on datasets: tables, pictures, and a page that shows them.

``python -m aimnet2mult.tools.evaluate --model model.pt --data dft=dft.h5 --data gfn2=gfn2.h5 --output report``
evaluates two fidelities of a checkpoint. A compiled model has one, ``--model m_fid0.jpt --data test0.h5 --model
m_fid1.jpt --data test1.h5``, and a run knows its own validation molecules, ``--model runs/my_run``. The work is done by
`aimnet2mult.evaluation`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from aimnet2mult.utils.cli import OrderedCommand, user_errors
from aimnet2mult.utils.devices import usable_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch

    from aimnet2mult.data.base import MoleculeSource
    from aimnet2mult.evaluation.compare import Comparison
    from aimnet2mult.evaluation.differences import Difference
    from aimnet2mult.evaluation.models import Predictor, Together

logger = logging.getLogger(__name__)

FIDELITY_PREFIX = re.compile(r"(?P<fidelity>[\w+-]+)=(?P<files>.+)", re.DOTALL)
"""``NAME=FILE`` of ``--data``."""


@dataclass(frozen=True)
class Request:
    """A model and the datasets it is to be compared with.

    Attributes
    ----------
    model : Path
        Checkpoint, compiled model, or folder of a run.
    data : tuple of str
        Datasets as ``--data`` takes them; none for the validation molecules of a run.
    """

    model: Path
    data: tuple[str, ...]


class Task(NamedTuple):
    """A fidelity of a model and the molecules it is to be compared with."""

    predictor: Predictor
    source: MoleculeSource
    data: str
    indices: np.ndarray | None
    together: Together | None


def requests_in_order(order: Sequence[str], models: Sequence[str], data: Sequence[str]) -> list[Request]:
    """Give each dataset to the model before it on the command line; all of them to the only model.

    Parameters
    ----------
    order : sequence of str
        Names of the options as they came: ``"models"``, ``"data"``, and others.
    models, data : sequence of str
        Their values, each in its order.

    Raises
    ------
    ValueError
        A model without a dataset that is no folder, or a dataset before the first of several models.
    """
    given: list[list[str]] = [[] for _ in models]
    n_models, next_data = 0, iter(data)
    for name in order:
        n_models += name == "models"
        if name == "data":
            value = next(next_data)
            if n_models == 0 and len(models) > 1:
                raise ValueError(f"--data {value}: stands before the first --model; each dataset follows its model")
            given[max(n_models - 1, 0)].append(value)
    for model, datasets in zip(models, given, strict=True):
        if not datasets and not Path(model).is_dir():
            raise ValueError(f"--model {model}: no --data follows it; only the folder of a run knows its own molecules")
    return [Request(Path(model), tuple(datasets)) for model, datasets in zip(models, given, strict=True)]


def split_data(text: str) -> tuple[str | None, str]:
    """Fidelity (None where not given) and files of ``--data``; the name of a file may hold an equals sign."""
    match = FIDELITY_PREFIX.fullmatch(text)
    if match is None or Path(text).exists():
        return None, text
    return match["fidelity"], match["files"]


def evaluate(
    requests: Sequence[Request],
    output: str | Path,
    *,
    fidelity: str | None = None,
    device: str = "auto",
    history: str | Path | None = None,
    unit: str = "eV",
    max_molecules: int | None = None,
    atoms_per_call: int | None = None,
    all_fidelities: bool = False,
) -> tuple[list[Comparison], list[Difference], Path]:
    """Compare models with datasets and write a report.

    Everything is checked before the first molecule is evaluated.

    Parameters
    ----------
    requests : sequence of Request
        Models and datasets.
    output : str or Path
        Folder of the report; made if it does not exist.
    fidelity : str, optional
        Name or number of the fidelity of those datasets that do not say theirs.
    device : str
        Where to evaluate: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` ...
    history : str or Path, optional
        ``metrics.jsonl`` of the training, for learning curves; default that of the folder of a run.
    unit : str
        Unit of energy to show, one of `aimnet2mult.evaluation.properties.DISPLAY_UNITS`.
    max_molecules : int, optional
        Evaluate no more than this of each dataset, drawn at random.
    atoms_per_call : int, optional
        Atoms in one call of a model; default by device.
    all_fidelities : bool
        Evaluate all fidelities of each model on the molecules of its datasets, and how they differ.

    Returns
    -------
    comparisons : list of Comparison
        The errors.
    differences : list of Difference
        Of each other fidelity from that of the dataset; empty unless asked for.
    page : Path
        ``index.html``.

    Raises
    ------
    ValueError, OSError
        What is wrong with the arguments or the files; nothing has been written then.
    """
    from aimnet2mult.evaluation.compare import check_elements, compare
    from aimnet2mult.evaluation.differences import differences
    from aimnet2mult.evaluation.properties import Units
    from aimnet2mult.evaluation.report import Report, default_atoms_per_call

    units = Units(unit)
    output = Path(output)
    _check_folder(output)
    place = pick_device(device)
    records, record_units = _history(requests, history)
    model_names = short_names([str(request.model) for request in requests])
    data_names = short_names([split_data(text)[1] for request in requests for text in request.data])
    tasks = [
        task
        for request in requests
        for task in _tasks(request, fidelity, place, model_names, data_names, all_fidelities)
    ]
    for task in tasks:
        check_elements(task.predictor, task.source)
    amount: dict[str, Any] = {
        "max_molecules": max_molecules,
        "atoms_per_call": atoms_per_call or default_atoms_per_call(place),
    }
    comparisons = [compare(task.predictor, task.source, task.data, task.indices, **amount) for task in tasks]
    if not any(comparison.errors for comparison in comparisons):
        names = ", ".join(dict.fromkeys(task.source.name for task in tasks))
        raise ValueError(f"{names}: no molecule has a label that the model predicts")
    about = {
        "Models": ", ".join(str(request.model) for request in requests),
        "Data": ", ".join(dict.fromkeys(task.source.name for task in tasks)),
    }
    found, energies = [], []
    for task in tasks:
        if task.together is not None:
            level = task.predictor.fidelity
            between, table = differences(task.together, task.source, task.data, level, task.indices, **amount)
            found += between
            energies.append(table)
    title = "Errors of " + ", ".join(dict.fromkeys(comparison.model for comparison in comparisons))
    report = Report(title, comparisons, units, about, records, record_units, found, energies)
    return comparisons, found, report.write(output)


def _check_folder(output: Path) -> None:
    from aimnet2mult.utils.files import check_writable

    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: is a file; the name of a folder is expected")
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    check_writable(existing / f".{output.name}")


def pick_device(name: str) -> torch.device:
    """Return the device of a name.

    Raises
    ------
    ValueError
        It does not exist, or cannot be used.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(name, f"--device {name}: cannot be used")


def _history(requests: Sequence[Request], path: str | Path | None) -> tuple[list[dict[str, Any]], Mapping[str, str]]:
    """Records of the training and the units of their errors; empty without a history."""
    from aimnet2mult.evaluation.history import learning_curves, read_history, units_of_run
    from aimnet2mult.utils.run_files import METRICS

    if path is None:
        found = [request.model / METRICS for request in requests if (request.model / METRICS).is_file()]
        if not found:
            return [], {}
        return read_history(found[0]), units_of_run(found[0].parent)
    records = read_history(path)
    if not learning_curves(records):
        raise ValueError(f"{path}: holds no validation errors")
    return records, units_of_run(Path(path).parent)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return what to call files in a report: their names, or their paths where two would be called the same."""
    names = {path: Path(path).name for path in paths}
    return names if len(set(names.values())) == len(names) else {path: path for path in paths}


def _tasks(
    request: Request,
    fidelity: str | None,
    device: torch.device,
    model_names: Mapping[str, str],
    data_names: Mapping[str, str],
    all_fidelities: bool,
) -> list[Task]:
    """What is to be computed for a request: files opened, fidelities found."""
    from aimnet2mult.data.sgdataset import open_dataset
    from aimnet2mult.evaluation.models import open_model
    from aimnet2mult.evaluation.run_folder import checkpoint_of_run, validation_molecules

    path = request.model
    if path.is_dir():
        path = checkpoint_of_run(path)
        logger.info("%s: evaluating %s", request.model, path.name)
    model = open_model(path, device, model_names[str(request.model)])
    together = model.together() if all_fidelities else None
    predictors: dict[int, Predictor] = {}

    def predictor(asked: str | None) -> Predictor:
        f = model.choose(asked)
        if f not in predictors:
            predictors[f] = model.predictor(f)
        return predictors[f]

    if not request.data:
        validation = validation_molecules(request.model)
        if fidelity is not None:
            validation = [part for part in validation if model.choose(part.name) == model.choose(fidelity)]
            if not validation:
                raise ValueError(f"--fidelity {fidelity}: {request.model} has no validation molecules of it")
        return [Task(predictor(part.name), part.source, "validation", part.indices, together) for part in validation]
    tasks = []
    for text in request.data:
        asked, files = split_data(text)
        tasks.append(Task(predictor(asked or fidelity), open_dataset(files), data_names[files], None, together))
    return tasks


@click.command(cls=OrderedCommand, context_settings={"show_default": True})
@click.option(
    "--model",
    "models",
    required=True,
    multiple=True,
    type=click.Path(),
    help="Checkpoint (.pt), compiled model (.jpt), or folder of a run, of which its model.pt or its best checkpoint "
    "is taken. May be given several times.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="[FIDELITY=]FILE",
    help="Dataset (HDF5), or a pattern for files that are one, for the model before it; FIDELITY is a name or number. "
    "May be given several times, and left out for the folder of a run: then the molecules it validated with are taken.",
)
@click.option("--fidelity", help="Name or number of the fidelity of datasets that do not say theirs.")
@click.option("--output", required=True, type=click.Path(), help="Folder for index.html, tables and pictures.")
@click.option("--history", type=click.Path(), help="metrics.jsonl of the training, for learning curves.")
@click.option("--unit", default="eV", help="Unit of energy in which errors are shown: eV, meV, kcal/mol or kJ/mol.")
@click.option(
    "--device", default="auto", help="Device to evaluate on: auto (a GPU if there is one), cpu, cuda, cuda:N."
)
@click.option(
    "--max-molecules", type=click.IntRange(min=1), help="Evaluate at most so many of each dataset, drawn at random."
)
@click.option(
    "--atoms-per-call",
    type=click.IntRange(min=1),
    help="Atoms in one call of a model; fewer need less memory.  [default: 2000, on GPUs 20000]",
)
@click.option(
    "--all-fidelities",
    is_flag=True,
    help="Evaluate all fidelities of each model on the molecules, and tell how they differ from that of the dataset.",
)
@click.pass_obj
@user_errors
def main(
    given: list[str],
    models: tuple[str, ...],
    data: tuple[str, ...],
    fidelity: str | None,
    output: str,
    history: str | None,
    unit: str,
    device: str,
    max_molecules: int | None,
    atoms_per_call: int | None,
    all_fidelities: bool,
) -> None:
    """Compare models with the labels of datasets: errors of each property by fidelity, size and element."""
    from aimnet2mult.evaluation.properties import Units
    from aimnet2mult.evaluation.tables import markdown_differences, markdown_summary

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    comparisons, differences, page = evaluate(
        requests_in_order(given, models, data),
        output,
        fidelity=fidelity,
        device=device,
        history=history,
        unit=unit,
        max_molecules=max_molecules,
        atoms_per_call=atoms_per_call,
        all_fidelities=all_fidelities,
    )
    click.echo(markdown_summary(comparisons, Units(unit)))
    if differences:
        click.echo(markdown_differences(differences, Units(unit)))
    click.echo(page)


if __name__ == "__main__":
    main()
