"""A report on a model: a folder with a page, tables and pictures."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.evaluation import pictures
from aimnet2mult.evaluation.compare import ATOMS_PER_CALL, Comparison, compare
from aimnet2mult.evaluation.differences import AllEnergies, Difference, energies_csv
from aimnet2mult.evaluation.history import learning_curves
from aimnet2mult.evaluation.models import Predictor, predict_residuals
from aimnet2mult.evaluation.page import html_page
from aimnet2mult.evaluation.properties import Units
from aimnet2mult.evaluation.tables import csv_text, json_text, markdown_text
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import versions
from aimnet2mult.modules import Forces
from aimnet2mult.utils.files import atomic_path, write_text_atomic

logger = logging.getLogger(__name__)

PAGE = "index.html"

ENERGIES = "all_fidelities.csv"
"""Total energies of each molecule in all fidelities."""

PARITY, HISTOGRAMS, CURVES = "parity.png", "error_histograms.png", "learning_curves.png"

CAPTIONS = {
    PARITY: "Predictions against labels",
    HISTOGRAMS: "Distribution of the errors (logarithmic scale of counts)",
    CURVES: "Learning curves: losses and validation errors against the iteration",
}
"""Pictures of a report, in the order of the page."""

MAX_DRAWN = 30
"""Comparisons in one picture; more would take minutes to lay out."""

TRAINING_MOLECULES = 20_000
"""Molecules of each fidelity in the report at the end of a training, drawn at random where there are more."""


@dataclass
class Report:
    """What a report consists of.

    Attributes
    ----------
    title : str
        Heading of the page.
    comparisons : list of Comparison
        The errors.
    units : Units
        Units to show them in.
    about : dict of str to str
        What was evaluated with what.
    history : sequence of mapping
        Records of ``metrics.jsonl``; empty: no learning curves.
    history_units : mapping
        Units of the errors in them, `aimnet2mult.evaluation.history.metric_units`.
    differences : sequence of Difference
        Differences between the fidelities of a model.
    energies : sequence of AllEnergies
        Energies that they come from, for ``all_fidelities.csv``.
    """

    title: str
    comparisons: list[Comparison]
    units: Units
    about: dict[str, str] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    history_units: Mapping[str, str] = field(default_factory=dict)
    differences: Sequence[Difference] = ()
    energies: Sequence[AllEnergies] = ()

    def write(self, folder: Path) -> Path:
        """Write the report to a folder, which is made if it does not exist; return the path of the page.

        Files of an earlier report there are replaced, and pictures that this one lacks are removed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = {**self.about, "Made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
        about["Versions"] = ", ".join(f"{package} {version}" for package, version in versions().items())
        about["Unit of energies"] = self.units.energy
        drawn = self._pictures()
        for name in CAPTIONS:
            if name in drawn:
                with atomic_path(folder / name) as temporary:
                    temporary.write_bytes(drawn[name])
            else:
                (folder / name).unlink(missing_ok=True)
        write_text_atomic(folder / "errors.json", json_text(self.comparisons, self.units, about, self.differences))
        write_text_atomic(folder / "errors.csv", csv_text(self.comparisons, self.units))
        write_text_atomic(folder / "errors.md", markdown_text(self.comparisons, self.units, self.differences))
        if self.energies:
            write_text_atomic(folder / ENERGIES, energies_csv(self.energies))
        else:
            (folder / ENERGIES).unlink(missing_ok=True)
        captioned = {CAPTIONS[name]: png for name, png in drawn.items()}
        page = html_page(self.comparisons, self.units, captioned, self.title, about, self.differences)
        write_text_atomic(folder / PAGE, page)
        return folder / PAGE

    def _pictures(self) -> dict[str, bytes]:
        if not pictures.available():
            logger.warning('no pictures: matplotlib is not installed (pip install "aimnet2mult[report]")')
            return {}
        drawn = {}
        shown = [c for c in self.comparisons if any(errors.sample.seen for errors in c.errors.values())]
        if len(shown) > MAX_DRAWN:
            logger.warning("pictures show the first %d of %d comparisons", MAX_DRAWN, len(shown))
        if shown:
            drawn[PARITY] = pictures.parity_plots(shown[:MAX_DRAWN], self.units)
            drawn[HISTOGRAMS] = pictures.error_histograms(shown[:MAX_DRAWN], self.units)
        panels = learning_curves(self.history, self.history_units)
        if panels:
            drawn[CURVES] = pictures.curve_plots(panels)
        return drawn


def training_report(
    folder: str | Path,
    model: AIMNet2,
    dataset: MixedFidelityDataset,
    indices: np.ndarray,
    *,
    names: Mapping[int, str],
    history: Sequence[Mapping[str, Any]] = (),
    history_units: Mapping[str, str] | None = None,
    about: Mapping[str, str] | None = None,
    unit: str = "eV",
    max_molecules: int = TRAINING_MOLECULES,
) -> Path:
    """Evaluate a trained model on its validation molecules and write ``report/`` into the folder of the run.

    For one process, without a process group. Neither the random state nor the mode of the model is changed.

    Parameters
    ----------
    folder : str or Path
        The folder of the run.
    model : AIMNet2
        The model, of one fidelity or several, on the device where it is to be evaluated.
    dataset : MixedFidelityDataset
        The molecules, self-atomic energies and dispersion subtracted as in training.
    indices : ndarray
        (n,) those that are to be evaluated.
    names : mapping of int to str
        Name of each fidelity.
    history : sequence of mapping
        Records of ``metrics.jsonl`` for the learning curves.
    history_units : mapping, optional
        Unit of each error in them by its name without fidelity, ``{"E_mae": "kcal/mol"}``.
    about : mapping of str to str, optional
        Further lines for its head, such as the file of the model.
    unit : str
        Unit of energy to show, one of `aimnet2mult.evaluation.properties.DISPLAY_UNITS`.
    max_molecules : int
        Evaluate no more than this of each fidelity, drawn at random; the report says so.

    Returns
    -------
    Path
        The page, ``<folder>/report/index.html``.

    Raises
    ------
    ValueError
        No molecules, or data that cannot be evaluated.
    OSError
        The folder cannot be written.
    """
    units = Units(unit)
    if not len(indices):
        raise ValueError("no validation molecules to report on")
    device = next(model.parameters()).device
    comparisons = []
    with _evaluated(model) as forces:
        for f, inside in dataset.by_fidelity(np.asarray(indices)).items():
            if not len(inside):
                continue
            sae = {} if dataset.sae is None else dataset.sae[f]
            predict = predict_residuals(forces, f, dataset.fidelity_offset, dataset.x)
            predictor = Predictor("this run", f, names.get(f), sorted(dataset.species[f]), sae, predict)
            comparison = compare(
                predictor,
                dataset.datasets[f],
                "validation",
                inside,
                labels=dataset.y,
                max_molecules=max_molecules,
                atoms_per_call=default_atoms_per_call(device),
            )
            comparisons.append(comparison)
    report = Report("Validation", comparisons, units, dict(about or {}), history, history_units or {})
    return report.write(Path(folder) / "report")


@contextmanager
def _evaluated(model: AIMNet2) -> Iterator[Forces]:
    """The model with forces, in evaluation mode; afterwards it is in the mode that it was in."""
    training = model.training
    try:
        yield Forces(model).eval()
    finally:
        model.train(training)


def default_atoms_per_call(device: torch.device) -> int:
    """Return how many atoms go well into one call of a model on a device."""
    return ATOMS_PER_CALL.get(device.type, ATOMS_PER_CALL["cpu"])
