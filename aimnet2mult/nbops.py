"""The batch: its keys, its layouts, and every operation that has to know what padding is.

A batch is one dictionary of tensors. Two layouts exist for the caller and inside the model:

dense
    ``coord`` (B, N, 3): molecules padded to a common length with ``numbers`` = 0; every atom sees every other one.
flat
    ``coord`` (A, 3) with ``mol_idx`` (A,): atoms of all molecules in a row; an atom sees the columns of a neighbour
    matrix ``nbmat`` (A, M). Inside the model the last row is a padding atom, and unused columns point to it.

`BATCH_KEYS` is the one table of keys; letters: B molecules, N atoms of the longest molecule, A atoms of a flat
batch, M neighbours. Keys that begin with ``_`` are internal to a model and never leave it.
"""

from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

MASKED_DISTANCE = 100.0
"""Distance in Å that masked pairs (an atom with itself, with padding) are given, so that every function of it is finite."""


class Key(NamedTuple):
    """What a key of the batch means.

    Attributes
    ----------
    kind
        ``"atom"``: first axes (B, N) or (A,). ``"molecule"``: (B,). ``"pair"``: (A, M) or (B, N, M).
        ``"cell"``: (B,) or nothing.
    trailing
        Further axes.
    dtype
        ``"float"`` (that of ``coord``), ``"float64"`` or ``"int"``.
    unit, meaning
        For people.
    """

    kind: str
    trailing: Tuple[int, ...]
    dtype: str
    unit: str
    meaning: str


BATCH_KEYS: Dict[str, Key] = {
    "coord": Key("atom", (3,), "float", "Å", "positions"),
    "numbers": Key("atom", (), "int", "", "atomic numbers, 0 = padding (+ fidelity x offset while training)"),
    "charge": Key("molecule", (), "float", "e", "total charge, default 0"),
    "mult": Key("molecule", (), "float", "", "spin multiplicity 2S+1, default 1"),
    "mol_idx": Key("atom", (), "int", "", "molecule of each atom, sorted (flat layout)"),
    "cell": Key("cell", (3, 3), "float", "Å", "lattice vectors in rows; absent = not periodic"),
    "nbmat": Key("pair", (), "int", "", "neighbours within the cutoff"),
    "nbmat_lr": Key("pair", (), "int", "", "neighbours of the long-range terms"),
    "shifts": Key("pair", (3,), "float", "", "lattice translations of nbmat, in cells"),
    "shifts_lr": Key("pair", (3,), "float", "", "lattice translations of nbmat_lr, in cells"),
    "energy": Key("molecule", (), "float64", "eV", "energy"),
    "forces": Key("atom", (3,), "float", "eV/Å", "minus the gradient of the energy"),
    "charges": Key("atom", (), "float", "e", "atomic charges, sum to charge"),
    "spin_charges": Key("atom", (), "float", "e", "alpha minus beta populations, sum to mult - 1"),
    "dipole": Key("molecule", (3,), "float", "e·Å", "dipole moment of the atomic charges"),
    "quadrupole": Key("molecule", (6,), "float", "e·Å²", "traceless quadrupole: xx, yy, zz, xy, xz, yz"),
    "stress": Key("cell", (3, 3), "float", "eV/Å³", "stress tensor"),
    "hessian": Key("atom", (), "float", "eV/Å²", "second derivatives of the energy"),
    "aim": Key("atom", (-1,), "float", "", "atomic features that the readouts see"),
    "disp_param": Key("atom", (2,), "float", "", "atomic dispersion parameters (C6 in Eh·a0⁶, polarizability in a0³)"),
    "_fidelities": Key("molecule", (), "int", "", "fidelity of each molecule (mixed-fidelity training)"),
}
"""Every key of a batch: name -> kind, further axes, dtype, unit, meaning."""


# --------------------------------------------------------------------------------------------------
# fidelity encoding
# --------------------------------------------------------------------------------------------------


def encode_fidelity(numbers: Any, fidelity: Any, offset: int) -> Any:
    """Element types Z + fidelity·offset; padding (0) stays 0.

    Parameters
    ----------
    numbers : Tensor or numpy.ndarray of int
        Atomic numbers, any shape.
    fidelity : int, Tensor or numpy.ndarray of int
        Fidelity, broadcast against ``numbers``.
    offset : int
        Distance between fidelities.

    Returns
    -------
    Tensor or numpy.ndarray
        Of the type and shape of ``numbers``.
    """
    return numbers + (numbers > 0) * (fidelity * offset)


def decode_fidelity(types: Any, offset: int) -> Tuple[Any, Any]:
    """Return (atomic numbers, fidelities) of element types, the inverse of `encode_fidelity`.

    Padding (0) comes back as atomic number 0, fidelity 0.
    """
    return types % offset, types // offset


# --------------------------------------------------------------------------------------------------
# layouts
# --------------------------------------------------------------------------------------------------


def is_flat(data: Dict[str, Tensor]) -> bool:
    """Tell whether the batch is in flat layout, from the rank of ``coord`` alone."""
    return data["coord"].dim() == 2


def n_molecules(data: Dict[str, Tensor]) -> int:
    """Return the number of molecules B, from the length of ``charge``."""
    return data["charge"].shape[0]


def real_atoms(numbers: Tensor) -> Tensor:
    """Mask of atoms that are not padding, shape of ``numbers``."""
    return numbers > 0


def mol_sum(x: Tensor, data: Dict[str, Tensor]) -> Tensor:
    """Sum an atomic quantity over each molecule; padding must already be zero.

    Parameters
    ----------
    x : Tensor
        (B, N, ...) or (A, ...).
    data : dict
        The batch; ``charge`` tells B, ``mol_idx`` the molecule of each atom of a flat batch.

    Returns
    -------
    Tensor
        (B, ...), dtype of ``x``.
    """
    if data["coord"].dim() == 3:
        return x.sum(dim=1)
    shape = [n_molecules(data)] + list(x.shape[1:])
    return torch.zeros(shape, dtype=x.dtype, device=x.device).index_add(0, data["mol_idx"], x)


def mol_expand(x: Tensor, data: Dict[str, Tensor]) -> Tensor:
    """Give each atom the value of its molecule: (B, ...) -> (B, 1, ...) (broadcasts) or (A, ...)."""
    if data["coord"].dim() == 3:
        return x.unsqueeze(1)
    return x.index_select(0, data["mol_idx"])


def mask_padding(x: Tensor, data: Dict[str, Tensor]) -> Tensor:
    """Return an atomic quantity (B, N, ...) or (A, ...) with the rows of padding atoms set to zero."""
    padding = ~real_atoms(data["numbers"])
    for _ in range(x.dim() - padding.dim()):
        padding = padding.unsqueeze(-1)
    return x.masked_fill(padding, 0.0)


def pack_atoms(x: Tensor, data: Dict[str, Tensor]) -> Tensor:
    """Collect the rows of real atoms: (B, N, F) or (A, F) -> (R, F), R = number of atoms that are not padding.

    Work per atom (the MLPs) is done on packed rows, so that padding costs nothing.
    """
    rows = x.flatten(0, data["numbers"].dim() - 1)
    index = data["_real_idx"]
    if index.shape[0] == rows.shape[0]:
        return rows
    return rows.index_select(0, index)


def unpack_atoms(x: Tensor, data: Dict[str, Tensor]) -> Tensor:
    """Put packed rows (R, F) back to (B, N, F) or (A, F); padding rows are zero. Inverse of `pack_atoms`."""
    numbers = data["numbers"]
    index = data["_real_idx"]
    shape = list(numbers.shape) + list(x.shape[1:])
    if index.shape[0] == numbers.numel():
        return x.reshape(shape)
    full = torch.zeros([numbers.numel()] + list(x.shape[1:]), dtype=x.dtype, device=x.device)
    return full.index_copy(0, index, x).reshape(shape)


# --------------------------------------------------------------------------------------------------
# pairs
# --------------------------------------------------------------------------------------------------


def neighbors(x: Tensor, data: Dict[str, Tensor], suffix: str) -> Tensor:
    """Values of the neighbours j of each atom i, to be combined with ``x.unsqueeze(-1 or 1)`` of atom i.

    Parameters
    ----------
    x : Tensor
        Atomic quantity, (B, N, ...) or (A, ...).
    data : dict
        The batch.
    suffix : str
        ``""`` for the neighbours of the network, ``"_lr"`` for those of the long-range terms.

    Returns
    -------
    Tensor
        Dense (B, 1, N, ...), which broadcasts over i; flat (A, M, ...).
    """
    if data["coord"].dim() == 3:
        return x.unsqueeze(1)
    return x[data["nbmat" + suffix]]


def center(x: Tensor, data: Dict[str, Tensor]) -> Tensor:
    """Values of atom i, to be combined with `neighbors`: (B, N, 1, ...) or (A, 1, ...)."""
    return x.unsqueeze(data["coord"].dim() - 1)


def pair_mask(data: Dict[str, Tensor], suffix: str) -> Tensor:
    """Tell which pairs count: both atoms real, and not an atom with itself.

    Returns
    -------
    Tensor
        bool, dense (B, N, N), flat (A, M). In flat layout a caller's neighbour matrix may hold an atom as its own
        neighbour only with a lattice shift, which is a pair like any other.
    """
    real = real_atoms(data["numbers"])
    mask = center(real, data) & neighbors(real, data, suffix)
    if data["coord"].dim() == 3:
        n_atoms = real.shape[1]
        mask = mask & ~torch.eye(n_atoms, dtype=torch.bool, device=mask.device)
    return mask


def pair_vectors(data: Dict[str, Tensor], suffix: str) -> Tuple[Tensor, Tensor, Tensor]:
    """Distances and vectors from each atom to its neighbours.

    Parameters
    ----------
    data : dict
        The batch.
    suffix : str
        As in `neighbors`.

    Returns
    -------
    d_ij : Tensor
        (B, N, N) or (A, M), Å. Masked pairs have `MASKED_DISTANCE`.
    r_ij : Tensor
        r_j - r_i (+ lattice translation), (B, N, N, 3) or (A, M, 3), Å.
    mask : Tensor
        bool, shape of ``d_ij``: pairs that count (`pair_mask`).
    """
    coord = data["coord"]
    mask = pair_mask(data, suffix)
    r_ij = neighbors(coord, data, suffix) - center(coord, data)
    shifts_key = "shifts" + suffix
    if "cell" in data and shifts_key in data and coord.dim() == 2:
        cell = data["cell"]
        shifts = data[shifts_key].to(coord.dtype)
        if cell.dim() == 3:
            r_ij = r_ij + torch.einsum("imk,ikd->imd", [shifts, cell[data["mol_idx"]]])
        else:
            r_ij = r_ij + shifts @ cell
    # Replace the vector, not the distance: the norm at zero has no second derivative, masked afterwards or not.
    outside = torch.tensor([MASKED_DISTANCE, 0.0, 0.0], dtype=coord.dtype, device=coord.device)
    r_ij = torch.where(mask.unsqueeze(-1), r_ij, outside)
    return r_ij.norm(dim=-1), r_ij, mask


def neighbor_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum a pair quantity (B, N, M) or (A, M) over the neighbours that ``mask`` lets count, in float64."""
    return x.masked_fill(~mask, 0.0).sum(dim=-1, dtype=torch.float64)
