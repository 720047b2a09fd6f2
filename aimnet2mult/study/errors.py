"""Errors of a model, or of a sum of models, on a dataset as one JSON file.

``python -m aimnet2mult.study.errors --model dft=model.pt --data test.h5 --output errors.json``; where ``--model`` is
given several times, the predicted energies and forces add up (delta learning).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.utils.cli import UserError, user_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy as np

    from aimnet2mult.evaluation.models import Predictor

SUMMED = ("energy", "forces")
"""What several models predict together."""


def sum_of(predictors: Sequence[Predictor]) -> Predictor:
    """Return a predictor whose energies and forces are the sums of those of others.

    It knows the elements that all of them know.
    """
    import numpy as np

    from aimnet2mult.evaluation.models import Predictor
    from aimnet2mult.reference_energies import ReferenceEnergies

    def predict(arrays: Mapping[str, np.ndarray], keys: Collection[str]) -> dict[str, np.ndarray]:
        parts = [predictor.predict(arrays, keys) for predictor in predictors]
        return {key: np.sum([part[key] for part in parts], axis=0) for key in SUMMED if key in parts[0]}

    species = set.intersection(*(set(predictor.species) for predictor in predictors))
    references = [ReferenceEnergies.from_table(predictor.sae) for predictor in predictors]
    sae = ReferenceEnergies(
        {z: sum(reference.get(z, 0.0) for reference in references) for z in species},
        charge=sum(reference.charge for reference in references),
        spin=sum(reference.spin for reference in references),
    )
    first = predictors[0]
    name = " + ".join(predictor.title for predictor in predictors)
    notes = [note for predictor in predictors for note in predictor.notes]
    return Predictor(first.model, first.fidelity, name, sorted(species), sae, predict, notes)


def errors(
    models: Sequence[tuple[str, str | Path]], data: str | Path | Sequence[str | Path], device: str = "auto"
) -> dict[str, Any]:
    """Compare the sum of models with the labels of a dataset.

    Parameters
    ----------
    models : sequence of (str, str or Path)
        Name or number of a fidelity, and the model file (checkpoint or compiled).
    data : str, Path or sequence of them
        The dataset (HDF5), several files that are one, or patterns.
    device : str
        ``auto``, ``cpu``, ``cuda`` ...

    Returns
    -------
    dict
        ``structures``, their number, and for each property with labels ``mae``, ``rmse`` (eV, eV/Å, e) and ``count``.

    Raises
    ------
    ValueError, OSError
        Files that cannot be used; an element that a model does not know.
    """
    from aimnet2mult.data.sgdataset import open_dataset
    from aimnet2mult.evaluation.compare import check_elements, compare
    from aimnet2mult.evaluation.models import open_model
    from aimnet2mult.evaluation.report import default_atoms_per_call
    from aimnet2mult.tools.evaluate import pick_device

    place = pick_device(device)
    predictors = []
    for fidelity, path in models:
        model = open_model(path, place)
        predictors.append(model.predictor(model.choose(fidelity)))
    predictor = predictors[0] if len(predictors) == 1 else sum_of(predictors)
    source = open_dataset(data)
    check_elements(predictor, source)
    comparison = compare(predictor, source, source.name, atoms_per_call=default_atoms_per_call(place))
    totals = {key: found.total for key, found in comparison.errors.items()}
    found = {key: {"mae": sums.mae, "rmse": sums.rmse, "count": sums.count} for key, sums in totals.items()}
    return {"structures": comparison.molecules, "errors": found}


@click.command(context_settings={"show_default": True})
@click.option(
    "--model",
    "models",
    required=True,
    multiple=True,
    metavar="FIDELITY=FILE",
    help="Checkpoint or compiled model and the name of its fidelity; predictions of several models add up.",
)
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="FILE",
    help="Dataset (HDF5) or a pattern; several count as one dataset.",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N.")
@user_errors
def main(models: tuple[str, ...], data: tuple[str, ...], output: Path, device: str) -> None:
    """Write the errors of a model, or of a sum of models, on a dataset."""
    from aimnet2mult.utils.files import check_writable, write_text_atomic

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    check_writable(output)
    pairs = [model.partition("=") for model in models]
    for fidelity, equals, path in pairs:
        if not (fidelity and equals and path):
            raise UserError(f"--model {fidelity}{equals}{path}: expected FIDELITY=FILE, such as dft=model.pt")
    result = errors([(fidelity, path) for fidelity, _, path in pairs], data, device)
    write_text_atomic(output, json.dumps(result, indent=1) + "\n")
    click.echo(output)


if __name__ == "__main__":
    main()
