"""Errors of compiled models on datasets: a table, a JSON file and pictures.

``python -m aimnet2mult.tools.evaluate --model m_fid0.jpt --data test0.h5 --model m_fid1.jpt --data test1.h5 --output
report`` evaluates each model on the dataset that follows it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aimnet2mult.constants import element_names
from aimnet2mult.utils.cli import user_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

logger = logging.getLogger(__name__)

QUANTITIES = {"energy": "eV", "forces": "eV/Å", "charges": "e", "spin_charges": "e"}
"""Properties that are compared, and their units."""

ATOMS_PER_CALL = 2000
"""Atoms in one call of the model."""


@dataclass
class Comparison:
    """Predictions beside labels for one model and one dataset.

    Attributes
    ----------
    name : str
        What the model calls itself.
    data : str
        Name of the dataset's file.
    n_atoms : ndarray
        (n,) atoms of each molecule.
    values : dict
        property -> (labels, predictions), flat; energies relative to the self-atomic energies.
    """

    name: str
    data: str
    n_atoms: np.ndarray
    values: dict[str, tuple[np.ndarray, np.ndarray]]

    def errors(self) -> dict[str, dict[str, float]]:
        """MAE, RMSE and largest error of each property; energies also per atom."""
        import numpy as np

        table = {}
        for key, (label, predicted) in self.values.items():
            table[key] = _statistics(predicted - label)
        if "energy" in self.values:
            label, predicted = self.values["energy"]
            table["energy_per_atom"] = _statistics((predicted - label) / self.n_atoms)
        assert all(np.isfinite(row["mae"]) for row in table.values())
        return table


def _statistics(error: np.ndarray) -> dict[str, float]:
    import numpy as np

    size = np.abs(error)
    return {
        "mae": float(size.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "max": float(size.max()),
        "count": int(error.size),
    }


def compare(model_path: str | Path, data_path: str | Path, device: str = "cpu") -> Comparison:
    """Evaluate a compiled model on every molecule of a dataset.

    Labels that are absent, and NaN entries, are left out.

    Raises
    ------
    ValueError, FileNotFoundError
        Not a compiled model, not a dataset, elements that the model does not know.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from aimnet2mult.data.sae import sae_energy
    from aimnet2mult.data.sgdataset import open_dataset
    from aimnet2mult.models.jit_wrapper import load_jit_model

    model = load_jit_model(model_path, device)
    dataset = open_dataset(data_path)
    unknown = [z for z in dataset.elements if z not in model.species]
    if unknown:
        raise ValueError(
            f"{data_path}: holds {element_names(unknown)}, not among the elements of {model_path}: "
            f"{element_names(model.species)}"
        )
    sae = {int(z): float(e) for z, e in model.metadata["sae"].items()}
    labels: dict[str, list[np.ndarray]] = {key: [] for key in QUANTITIES}
    predictions: dict[str, list[np.ndarray]] = {key: [] for key in QUANTITIES}
    sizes: list[np.ndarray] = []
    progress = tqdm(total=len(dataset), desc=Path(data_path).name, unit="molecule", disable=None)
    keys = ["coord", "numbers", "charge", "mult", *QUANTITIES]
    for n_atoms in np.unique(dataset.n_atoms).tolist():
        rows = np.flatnonzero(dataset.n_atoms == n_atoms)
        step = max(1, ATOMS_PER_CALL // n_atoms)
        for start in range(0, len(rows), step):
            for _, arrays in dataset.read(rows[start : start + step], [key for key in keys if key in dataset.keys]):
                inputs = {k: torch.as_tensor(arrays[k]).to(device) for k in keys[:4] if k in arrays}
                out = {k: v.detach().cpu().double().numpy() for k, v in model(inputs).items()}
                n_molecules = len(arrays["numbers"])
                sizes.append(np.full(n_molecules, n_atoms))
                reference = sae_energy(arrays["numbers"], sae)
                for key in QUANTITIES:
                    if key in arrays and key in out:
                        shift = reference if key == "energy" else 0.0
                        labels[key].append((arrays[key].astype(np.float64) - shift).reshape(n_molecules, -1))
                        predictions[key].append((out[key] - shift).reshape(n_molecules, -1))
                progress.update(n_molecules)
    progress.close()
    n_atoms_all = np.concatenate(sizes)
    values = {}
    for key in QUANTITIES:
        if labels[key]:
            label = np.concatenate([x.ravel() for x in labels[key]])
            predicted = np.concatenate([x.ravel() for x in predictions[key]])
            known = np.isfinite(label)
            values[key] = (label[known], predicted[known])
            if key == "energy":
                n_atoms_all = n_atoms_all[known]
    level = model.metadata.get("fidelity_level", 0)
    name = model.metadata.get("fidelity_name")
    return Comparison(f"fidelity {level}" + (f" ({name})" if name else ""), Path(data_path).name, n_atoms_all, values)


def markdown_table(comparisons: Sequence[Comparison]) -> str:
    """The errors of all comparisons as a Markdown table."""
    lines = ["| model | data | property | unit | MAE | RMSE | largest | values |", "|---|---|---|---|---|---|---|---|"]
    for comparison in comparisons:
        for key, row in comparison.errors().items():
            unit = "eV/atom" if key == "energy_per_atom" else QUANTITIES[key]
            numbers = f"{row['mae']:.4f} | {row['rmse']:.4f} | {row['max']:.3f} | {row['count']}"
            lines.append(f"| {comparison.name} | {comparison.data} | {key.replace('_', ' ')} | {unit} | {numbers} |")
    return "\n".join(lines) + "\n"


def parity_plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Predictions against labels, a row per model, a column per property; needs matplotlib."""
    from matplotlib.figure import Figure

    columns = [key for key in QUANTITIES if any(key in c.values for c in comparisons)]
    figure = Figure(figsize=(3.4 * len(columns), 3.3 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), len(columns), squeeze=False)
    for row, comparison in zip(axes, comparisons, strict=True):
        for axis, key in zip(row, columns, strict=True):
            if key not in comparison.values:
                axis.axis("off")
                axis.text(0.5, 0.5, f"no {key.replace('_', ' ')}\nin the data", ha="center", va="center")
                continue
            label, predicted = comparison.values[key]
            mae = comparison.errors()[key]["mae"]
            axis.plot(label, predicted, ".", markersize=2, alpha=0.4, rasterized=True)
            ends = [min(label.min(), predicted.min()), max(label.max(), predicted.max())]
            axis.plot(ends, ends, "k-", linewidth=0.8)
            what = "energy - SAE" if key == "energy" else key.replace("_", " ")
            axis.set_title(f"{comparison.name}: {what}\nMAE {mae:.3f} {QUANTITIES[key]}", fontsize=9)
            axis.set_xlabel(f"label, {QUANTITIES[key]}", fontsize=8)
            axis.set_ylabel(f"predicted, {QUANTITIES[key]}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.set_aspect("equal", adjustable="datalim")
    figure.savefig(path, dpi=130)


def learning_curves(history: str | Path, path: Path) -> None:
    """Validation errors of each fidelity against the training iteration, from a ``metrics.jsonl``."""
    from matplotlib.figure import Figure

    records = read_history(history)
    names = list(
        dict.fromkeys(key for record in records for key in record if key.startswith("val/") and key.endswith("_mae"))
    )
    fidelities = list(dict.fromkeys(name.split("/")[1] for name in names if name.count("/") == 2))
    properties = [name for name in dict.fromkeys(name.rpartition("/")[2] for name in names) if "per_atom" not in name]
    figure = Figure(figsize=(4.0 * len(properties), 3.2), layout="constrained")
    axes = figure.subplots(1, len(properties), squeeze=False)[0]
    for axis, quantity in zip(axes, properties, strict=True):
        for name in names:
            if name.rpartition("/")[2] != quantity:
                continue
            points = [(r["iteration"], r[name]) for r in records if name in r]
            overall = name == f"val/{quantity}"
            label = "all" if overall else name.split("/")[1]
            style = "k--" if overall else f"C{fidelities.index(label)}-"
            axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, zorder=3 if overall else 2)
        axis.set_yscale("log")
        axis.set_xlabel("iteration")
        axis.set_ylabel("error, in the units of the log", fontsize=8)
        axis.set_title(f"validation {quantity.replace('_mae', ' MAE')}", fontsize=9)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a history of validation errors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a metrics.jsonl of a training: {error}") from error
    if not any(key.startswith("val/") for record in records for key in record):
        raise ValueError(f"{path}: holds no validation errors")
    return records


def evaluate(
    models: Sequence[str | Path],
    data: Sequence[str | Path],
    output: str | Path,
    device: str = "cpu",
    history: str | Path | None = None,
) -> str:
    """Compare each model with its dataset and write ``errors.json``, ``errors.md`` and pictures to a folder.

    Parameters
    ----------
    models, data : sequence of path
        Compiled models and as many datasets.
    output : str or Path
        The folder; made if it does not exist.
    device : str
        Where to evaluate.
    history : str or Path, optional
        ``metrics.jsonl`` of the training, for ``learning_curves.png`` beside ``parity.png``.

    Returns
    -------
    str
        The Markdown table.

    Raises
    ------
    ValueError, OSError
        Not as many models as datasets; files that cannot be read or written.
    """
    from aimnet2mult.utils.files import atomic_path, write_text_atomic

    if len(models) != len(data):
        raise ValueError(f"{len(models)} times --model and {len(data)} times --data: give one dataset for each model")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: is a file; the name of a folder is expected")
    if history is not None:
        read_history(history)
    comparisons = [compare(model, path, device) for model, path in zip(models, data, strict=True)]
    output.mkdir(parents=True, exist_ok=True)
    table = markdown_table(comparisons)
    content: list[dict[str, Any]] = [
        {"model": c.name, "data": c.data, "molecules": len(c.n_atoms), "errors": c.errors()} for c in comparisons
    ]
    write_text_atomic(output / "errors.json", json.dumps(content, indent=1) + "\n")
    write_text_atomic(output / "errors.md", table)
    try:
        import matplotlib  # noqa: F401 - only to see whether it is there
    except ModuleNotFoundError:
        logger.warning('no pictures: matplotlib is not installed (pip install "aimnet2mult[report]")')
    else:
        with atomic_path(output / "parity.png") as temporary:
            parity_plot(comparisons, temporary)
        if history is not None:
            with atomic_path(output / "learning_curves.png") as temporary:
                learning_curves(history, temporary)
    return table


@click.command(context_settings={"show_default": True})
@click.option("--model", "models", required=True, multiple=True, type=click.Path(), help="Compiled model (.jpt).")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(),
    help="Dataset (HDF5), or a pattern for files that are one, for the model before it.",
)
@click.option("--output", required=True, type=click.Path(), help="Folder for errors.json, errors.md and pictures.")
@click.option("--history", type=click.Path(), help="metrics.jsonl of the training, to draw learning_curves.png.")
@click.option("--device", default="cpu", help="Device to evaluate on.")
@user_errors
def main(models: tuple[str, ...], data: tuple[str, ...], output: str, history: str | None, device: str) -> None:
    """Compare compiled models with the labels of datasets: errors per property, table and pictures."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    click.echo(evaluate(models, data, output, device, history), nl=False)
    click.echo(output)


if __name__ == "__main__":
    main()
