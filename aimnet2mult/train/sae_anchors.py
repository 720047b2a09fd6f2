"""Anchors for reference energies: what is known of molecules already, so that little is left to fit.

Reference energies of one level of theory, fitted to little data, bend with the molecules that happen to be there. An
anchor says what the residual energy of a molecule is at another level, whose reference energies are well determined.
The fit then describes E - E(anchor) by composition, charge and spin, which is what differs between levels of theory,
and leaves residual energies that are close to those of the anchor: molecules that a network knows from there, it knows
here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from aimnet2mult.constants import FIDELITY_OFFSET, element_names
from aimnet2mult.data.base import INPUT_KEYS, MoleculeSource
from aimnet2mult.data.checks.findings import Thresholds
from aimnet2mult.data.checks.geometry import Fingerprints
from aimnet2mult.data.checks.pairs import equal_geometries
from aimnet2mult.data.checks.rows import pieces
from aimnet2mult.data.sae import reference_energy
from aimnet2mult.data.sgdataset import DatasetError
from aimnet2mult.models.base import layout_of_weights, load_checkpoint, names_in_checkpoint, single_fidelity_model
from aimnet2mult.models.loading import chosen_fidelity
from aimnet2mult.nbops import BATCH_KEYS

UNMATCHED_WEIGHT = 0.05
"""Weight of molecules of which the anchor knows nothing, where the others have 1.

Their residual energies, some eV, are taken for zero, which would bend what the others determine to some 0.1 eV. With
this weight 400 of them count as one of the others (its square), and an element or a charge that only they have is still
determined.
"""

SAME_GEOMETRY = 1e-3
"""Å; molecules whose interatomic distances differ by less have the same geometry (of two atoms, by a tenth of it)."""

ATOMS_PER_CALL = 2000
"""Atoms in one evaluation of a model."""


class Anchor(NamedTuple):
    """What an anchor says of molecules.

    Attributes
    ----------
    energies : numpy.ndarray
        (m,) float64, residual energies, eV; 0 where it knows nothing.
    known : numpy.ndarray
        (m,) bool, where it knows something.
    text : str
        What it is, and how many molecules it knows.
    """

    energies: np.ndarray
    known: np.ndarray
    text: str

    @property
    def weights(self) -> np.ndarray:
        """Weights of the molecules in the fit, (m,)."""
        return np.where(self.known, 1.0, UNMATCHED_WEIGHT)


def anchor_on_dataset(
    dataset: MoleculeSource, indices: np.ndarray, anchor: MoleculeSource, sae: Mapping[int, float]
) -> Anchor:
    """Residual energies at another level of theory, from its data.

    A molecule gets the residual energy of the same geometry (`SAME_GEOMETRY`), however it is turned; else the mean of
    the molecules with its composition, charge and multiplicity.

    Parameters
    ----------
    dataset, indices
        Molecules, and which of them, (m,) int.
    anchor : MoleculeSource
        Data of the other level.
    sae : mapping
        Its reference energies.

    Raises
    ------
    ValueError
        An element of the anchor without self-atomic energy, or no molecule that the two have in common.
    """
    absent = [z for z in anchor.elements if z not in sae]
    if absent:
        raise DatasetError(f"--anchor-sae: no self-atomic energy of {element_names(absent)}, which {anchor.name} holds")
    n = len(dataset)
    prints = Fingerprints(np.zeros(n + len(anchor), np.uint64), np.full((n + len(anchor), 3), np.nan, np.float32))
    chosen = np.zeros(n, bool)
    chosen[indices] = True
    for molecules in pieces(dataset, [key for key in INPUT_KEYS if key in dataset.keys]):
        rows = molecules.indices
        prints.keys[rows] = molecules.keys
        prints.averages[rows[chosen[rows]]] = molecules.fingerprints.averages[chosen[rows]]
    residuals = np.full(len(anchor), np.nan)
    for molecules in pieces(anchor, [key for key in (*INPUT_KEYS, "energy") if key in anchor.keys]):
        rows = n + molecules.indices
        prints.keys[rows], averages = molecules.fingerprints
        residuals[molecules.indices] = molecules["energy"] - reference_energy(molecules.arrays, sae)
        labelled = np.isfinite(residuals[molecules.indices])
        prints.averages[rows[labelled]] = averages[labelled]

    energies = _means(prints.keys[indices], prints.keys[n:], residuals)
    pairs = equal_geometries([dataset, anchor], np.array([0, n]), prints, Thresholds(duplicate=SAME_GEOMETRY)).indices
    pairs = pairs[(pairs[:, 0] < n) & (pairs[:, 1] >= n)]
    exact = _means(indices.astype(np.uint64), pairs[:, 0].astype(np.uint64), residuals[pairs[:, 1] - n])
    energies = np.where(np.isnan(exact), energies, exact)
    known = ~np.isnan(energies)
    if not known.any():
        raise DatasetError(
            f"--anchor: {anchor.name} has no molecule of the composition, charge and multiplicity of one in "
            f"{dataset.name}. Choose data that share molecules, or --anchor-model"
        )
    text = (
        f"Anchored on {anchor.name}: {known.sum()} of {len(indices)} molecules have a counterpart, "
        f"{np.count_nonzero(~np.isnan(exact))} of these the same geometry"
    )
    return Anchor(np.where(known, energies, 0.0), known, text)


def _means(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of the finite ``values`` (k,) with each of the ``wanted`` keys (m,), NaN where there is none, (m,)."""
    keys, values = keys[np.isfinite(values)], values[np.isfinite(values)]
    if not len(keys):
        return np.full(len(wanted), np.nan)
    groups, group = np.unique(keys, return_inverse=True)
    means = np.bincount(group, values) / np.bincount(group)
    place = np.minimum(np.searchsorted(groups, wanted), len(groups) - 1)
    return np.where(groups[place] == wanted, means[place], np.nan)


def anchor_on_model(
    dataset: MoleculeSource, indices: np.ndarray, checkpoint_path: str | Path, fidelity: int | str | None = None
) -> Anchor:
    """Residual energies that a trained network predicts in one of its fidelities, without that fidelity's SAE.

    Parameters
    ----------
    dataset, indices
        As in `anchor_on_dataset`.
    checkpoint_path : str or Path
        Checkpoint of the model.
    fidelity : int or str, optional
        Number or name of the fidelity; may be left out if there is one.

    Raises
    ------
    ValueError, FileNotFoundError
        Not a checkpoint with its model configuration, no such fidelity, or it knows none of the molecules.
    """
    path = Path(checkpoint_path)
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("model_config")
    if config is None:
        raise ValueError(f"--anchor-model: {path} does not hold its model configuration; give a checkpoint that does")
    level = chosen_fidelity(checkpoint, fidelity, path)
    layout = layout_of_weights(checkpoint["model"], checkpoint, FIDELITY_OFFSET)
    network = single_fidelity_model(checkpoint, config, level, layout.num_fidelities, layout.offset).eval()
    table = (checkpoint.get("sae") or {}).get(level) or {}
    species = (checkpoint.get("species") or {}).get(level) or [z for z in table if isinstance(z, int)]
    if not species:
        raise ValueError(f"--anchor-model: {path} does not say which elements it was trained on")

    energies, known = np.zeros(len(indices)), np.zeros(len(indices), bool)
    blocks = np.array_split(indices, max(1, int(dataset.n_atoms[indices].sum(dtype=np.int64)) // ATOMS_PER_CALL))
    first = 0
    for block in tqdm(blocks, desc="predicting", disable=None, leave=False):
        for positions, arrays in dataset.read(block, [key for key in INPUT_KEYS if key in dataset.keys]):
            inside = np.isin(arrays["numbers"], species).all(axis=1)
            if inside.any():
                rows = first + positions[inside]
                known[rows] = True
                energies[rows] = _predicted(network, {key: values[inside] for key, values in arrays.items()})
        first += len(block)
    if not np.isfinite(energies).all():
        where = dataset.where(int(indices[np.argmin(np.isfinite(energies))]))
        raise ValueError(f"--anchor-model: the prediction of {path} for {where} is not finite")
    name = names_in_checkpoint(checkpoint, layout.num_fidelities)[level]
    if not known.any():
        raise ValueError(f"--anchor-model: no molecule of {dataset.name} consists of elements that {name} knows")
    text = f"Anchored on predictions of {path} ({name}), which knows {known.sum()} of {len(indices)} molecules"
    return Anchor(energies, known, text)


def _predicted(network: nn.Module, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Residual energies (k,) of molecules of one size, eV."""
    floats = next(network.parameters()).dtype
    batch = {
        key: torch.as_tensor(values).to(torch.int64 if BATCH_KEYS[key].dtype == "int" else floats)
        for key, values in arrays.items()
    }
    with torch.no_grad():
        return np.asarray(network(batch)["energy"].double().numpy())
