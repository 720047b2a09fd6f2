"""Offsets of energies per element, between what a model predicts and what labels say.

Least squares of the differences on the numbers of atoms of each element: they do not tell how good a model is, and a
model that comes with other self-atomic energies than the data starts from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aimnet2mult.config.builder import ConfigError
from aimnet2mult.constants import element_names
from aimnet2mult.data.base import Sample
from aimnet2mult.data.collate import collate
from aimnet2mult.data.mixed import MixedFidelityDataset
from aimnet2mult.data.sae import composition
from aimnet2mult.nbops import decode_fidelity

ATOMS_PER_CALL = 1000
"""Places for atoms in one evaluation."""

FITTED_MOLECULES = 500
"""Molecules of a fidelity on which offsets of a start are fitted."""


def portions(samples: Sequence[Sample]) -> Iterable[list[Sample]]:
    """Divide samples, the small ones first, into portions of `ATOMS_PER_CALL` places."""
    portion: list[Sample] = []
    for sample in sorted(samples, key=lambda s: len(s["numbers"])):
        if portion and (len(portion) + 1) * len(sample["numbers"]) > ATOMS_PER_CALL:
            yield portion
            portion = []
        portion.append(sample)
    yield portion


class Offsets(NamedTuple):
    """Energies per element that fit some differences best.

    Attributes
    ----------
    by_element
        {Z: eV}.
    rank
        How many of them the molecules determine.
    rest
        What remains of the differences, (n,), eV.
    """

    by_element: dict[int, float]
    rank: int
    rest: np.ndarray


def fit_offsets(differences: np.ndarray, numbers: Sequence[np.ndarray]) -> Offsets:
    """Fit energies per element by least squares, the smallest where the molecules do not determine them.

    Parameters
    ----------
    differences : numpy.ndarray
        (n,), eV.
    numbers : sequence of numpy.ndarray
        Atomic numbers of the molecules in portions (k, N), 0 is padding; n molecules in all.
    """
    elements = sorted({int(z) for part in numbers for z in np.unique(part) if z > 0})
    counts = np.concatenate([composition(part, elements) for part in numbers]).astype(np.float64)
    offsets, _, rank, _ = np.linalg.lstsq(counts, differences, rcond=None)
    return Offsets(dict(zip(elements, offsets.tolist(), strict=True)), int(rank), differences - counts @ offsets)


def without_offsets(differences: np.ndarray, numbers: Sequence[np.ndarray], where: str) -> np.ndarray:
    """Differences minus the offsets that fit them best; an error if these explain any difference."""
    found = fit_offsets(differences, numbers)
    if len(differences) <= found.rank:
        raise ConfigError(
            f"{len(differences)} molecules with an energy are too few to measure which fidelity is closest to {where}"
        )
    return found.rest


def start_atomic_shifts(
    model: nn.Module, dataset: MixedFidelityDataset, indices: np.ndarray, names: Mapping[int, str]
) -> list[str]:
    """Fit the atomic shifts of each fidelity to what is missing between predictions and labels.

    For a network whose self-atomic energies were taken out together with what it had learned on top of them: they say
    nothing about the residual energies of the data, E - Σ SAE, which are measured here. On the CPU, without random
    numbers, so that each process finds the same.

    Parameters
    ----------
    model : nn.Module
        `AIMNet2` or `MixedFidelityAIMNet2`; its atomic shifts are changed.
    dataset, indices
        Data of the run, and which of its molecules are trained on, (n,) int.
    names : mapping
        Name of each fidelity.

    Returns
    -------
    list of str
        Lines for the log.
    """
    tables = {key: value for key, value in model.named_parameters() if key.endswith(".shifts.weight")}
    if not tables:
        return ["the model has no atomic shifts, which would take the difference of the energies per element"]
    training, lines = model.training, []
    model.eval()
    for f, name in sorted(names.items()):
        mine = indices[dataset.fidelities[indices] == f]
        places = np.linspace(0, len(mine) - 1, min(len(mine), FITTED_MOLECULES)).round().astype(int)
        samples = [s for s in dataset.__getitems__(mine[places].tolist()) if s.get("energy") is not None]
        if not samples:
            lines.append(f"{name}: no energy labels to fit offsets per element to; they start at zero")
            continue
        differences, numbers = _differences(model, samples, dataset.fidelity_offset)
        if not np.isfinite(differences).all():
            lines.append(f"{name}: predictions are not finite for elements that are new; offsets start at zero")
            continue
        found = fit_offsets(differences, numbers)
        own = [v for key, v in tables.items() if not key.startswith("fidelity_") or key.split(".")[1] == str(f)]
        with torch.no_grad():
            for table in own:
                for z, energy in found.by_element.items():
                    table[z + f * dataset.fidelity_offset, 0] += energy
        before, after = (float(np.sqrt(np.mean(x**2))) for x in (differences, found.rest))
        lines.append(
            f"{name}: offsets per element fitted to {len(samples)} molecules, RMSE of energies {before:.3g} -> "
            f"{after:.3g} eV" + (_undetermined(found) if found.rank < len(found.by_element) else "")
        )
    model.train(training)
    return lines


def _undetermined(found: Offsets) -> str:
    return f" (of {element_names(list(found.by_element))} they determine only {found.rank})"


def _differences(model: nn.Module, samples: Sequence[Sample], offset: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels minus predictions of energies (n,), eV, and plain atomic numbers of the portions."""
    differences: list[Tensor] = []
    numbers: list[np.ndarray] = []
    for part in portions(samples):
        x, y = collate(part)
        with torch.no_grad():
            differences.append(y["energy"].double() - model(x)["energy"].double())
        numbers.append(decode_fidelity(x["numbers"], offset)[0].numpy())
    return torch.cat(differences).numpy(), numbers
