"""From samples to a batch: padded tensors and masks of the labels that are there."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aimnet2mult.data.base import FIDELITY_KEY, INPUT_KEYS, Sample
from aimnet2mult.nbops import BATCH_KEYS, Key

TORCH_TYPES = {"float": torch.float32, "float64": torch.float64, "int": torch.int64}
"""Types of a batch, for the words of `aimnet2mult.nbops.BATCH_KEYS`."""


def collate(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put molecules together into a batch in dense layout.

    Parameters
    ----------
    samples : sequence of dict
        B molecules as `aimnet2mult.data.base.Sample` describes them, all with the same keys.

    Returns
    -------
    x : dict of str to Tensor
        ``coord`` (B, N, 3) float32 in Å, ``numbers`` (B, N) int64 with the fidelity encoded, ``charge`` and ``mult``
        (B,) float32, ``_fidelities`` (B,) int64; N atoms of the longest molecule, padding is zero.
    y : dict of str to Tensor
        For each label a tensor of the shape in `aimnet2mult.nbops.BATCH_KEYS`, ``energy`` (B,) float64 and the others
        float32, and ``{label}_mask`` (B,) bool. A molecule without the label has zeros and False.
    """
    n_atoms = np.array([len(sample["numbers"]) for sample in samples])
    x: dict[str, Tensor] = {}
    y: dict[str, Tensor] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        present = np.array([value is not None for value in values])
        padded = _pad(values, present, n_atoms, BATCH_KEYS[key])
        if key in INPUT_KEYS or key == FIDELITY_KEY:
            x[key] = padded
        else:
            y[key], y[f"{key}_mask"] = padded, torch.from_numpy(present)
    return x, y


def _pad(values: list, present: np.ndarray, n_atoms: np.ndarray, meaning: Key) -> Tensor:
    """Values of molecules, or of their atoms, in one tensor; zero where padding is and where a value is None."""
    per_atom = meaning.kind == "atom"
    shape = (len(values), n_atoms.max()) if per_atom else (len(values),)
    batch = torch.zeros((*shape, *meaning.trailing), dtype=TORCH_TYPES[meaning.dtype])
    if present.any():
        given = values if present.all() else [value for value in values if value is not None]
        if per_atom:
            places = present[:, None] & (np.arange(n_atoms.max()) < n_atoms[:, None])
            batch.numpy()[places] = np.concatenate(given)
        else:
            batch.numpy()[present] = np.array(given)
    return batch
