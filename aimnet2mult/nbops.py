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

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aimnet2mult.neighborlist import PairSearch, n_blocks, neighbor_matrix, pair_search, search_block

MASKED_DISTANCE = 100.0
"""Å; masked pairs (an atom with itself, with padding) get this distance, so that every function of it is finite."""

BLOCK_PAIRS = 2**18
"""Pairs of a long-range term that are in memory at a time."""


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
    trailing: tuple[int, ...]
    dtype: str
    unit: str
    meaning: str


BATCH_KEYS: dict[str, Key] = {
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
    "quadrupole": Key("molecule", (6,), "float", "e·Å²", "traceless quadrupole: xx, yy, zz, xy, yz, xz"),
    "stress": Key("cell", (3, 3), "float", "eV/Å³", "stress tensor"),
    "hessian": Key("atom", (), "float", "eV/Å²", "second derivatives of the energy"),
    "aim": Key("atom", (-1,), "float", "", "atomic features that the readouts see"),
    "disp_param": Key("atom", (2,), "float", "", "atomic dispersion parameters (C6 in Eh·a0⁶, polarizability in a0³)"),
    "_fidelities": Key("molecule", (), "int", "", "fidelity of each molecule (mixed-fidelity training)"),
}
"""Every key of a batch: name -> kind, further axes, dtype, unit, meaning."""

INPUT_KEYS = ("coord", "numbers", "charge", "mult", "mol_idx", "cell", "nbmat", "nbmat_lr", "shifts", "shifts_lr")
"""Keys that a caller gives; only the first two must be there."""

RESULT_KEYS = ("energy", "forces", "charges", "spin_charges", "dipole", "quadrupole", "stress", "hessian")
"""Keys that a deployed model may return."""

LAYOUT_KEYS = ("coord", "nbmat", "cell")
"""Keys of the caller's that a compiled file hands back beside its results (the last two if they were given): by them,
calculators of the AIMNet2 ecosystem tell the layout."""


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


def decode_fidelity(types: Any, offset: int) -> tuple[Any, Any]:
    """Return (atomic numbers, fidelities) of element types, the inverse of `encode_fidelity`.

    Padding (0) comes back as atomic number 0, fidelity 0.
    """
    return types % offset, types // offset


# --------------------------------------------------------------------------------------------------
# layouts
# --------------------------------------------------------------------------------------------------


def is_flat(data: dict[str, Tensor]) -> bool:
    """Tell whether the batch is in flat layout, from the rank of ``coord`` alone."""
    return data["coord"].dim() == 2


def n_molecules(data: dict[str, Tensor]) -> int:
    """Return the number of molecules B, from the length of ``charge``."""
    return data["charge"].shape[0]


def real_atoms(numbers: Tensor) -> Tensor:
    """Mask of atoms that are not padding, shape of ``numbers``."""
    return numbers > 0


def mol_sum(x: Tensor, data: dict[str, Tensor]) -> Tensor:
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
    if not is_flat(data):
        return x.sum(dim=1)
    shape = [n_molecules(data)] + list(x.shape[1:])
    return torch.zeros(shape, dtype=x.dtype, device=x.device).index_add(0, data["mol_idx"], x)


def mol_expand(x: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Give each atom the value of its molecule: (B, ...) -> (B, 1, ...) (broadcasts) or (A, ...)."""
    if not is_flat(data):
        return x.unsqueeze(1)
    return x.index_select(0, data["mol_idx"])


def mask_padding(x: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Return an atomic quantity (B, N, ...) or (A, ...) with the rows of padding atoms set to zero."""
    padding = ~real_atoms(data["numbers"])
    for _ in range(x.dim() - padding.dim()):
        padding = padding.unsqueeze(-1)
    return x.masked_fill(padding, 0.0)


def pack_atoms(x: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Collect the rows of real atoms: (B, N, F) or (A, F) -> (R, F), R = number of atoms that are not padding.

    Work per atom (the MLPs) is done on packed rows, so that padding costs nothing.
    """
    rows = x.flatten(0, data["numbers"].dim() - 1)
    index = data["_real_idx"]
    if index.shape[0] == rows.shape[0]:
        return rows
    return rows.index_select(0, index)


def unpack_atoms(x: Tensor, data: dict[str, Tensor]) -> Tensor:
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


def neighbors(x: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Values of the neighbours j of each atom i, to be combined with ``x.unsqueeze(-1 or 1)`` of atom i.

    Parameters
    ----------
    x : Tensor
        Atomic quantity, (B, N, ...) or (A, ...).
    data : dict
        The batch.

    Returns
    -------
    Tensor
        Dense (B, 1, N, ...), which broadcasts over i; flat (A, M, ...).
    """
    if not is_flat(data):
        return x.unsqueeze(1)
    return x[data["nbmat"]]


def center(x: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Values of atom i, to be combined with `neighbors`: (B, N, 1, ...) or (A, 1, ...)."""
    return x.unsqueeze(data["coord"].dim() - 1)


def pair_mask(data: dict[str, Tensor]) -> Tensor:
    """Tell which pairs count: both atoms real, and not an atom with itself.

    Returns
    -------
    Tensor
        bool, dense (B, N, N), flat (A, M). In flat layout a caller's neighbour matrix may hold an atom as its own
        neighbour only with a lattice shift, which is a pair like any other.
    """
    real = real_atoms(data["numbers"])
    mask = center(real, data) & neighbors(real, data)
    if not is_flat(data):
        n_atoms = real.shape[1]
        mask = mask & ~torch.eye(n_atoms, dtype=torch.bool, device=mask.device)
    return mask


def pair_vectors(data: dict[str, Tensor], masked_distance: float = MASKED_DISTANCE) -> tuple[Tensor, Tensor, Tensor]:
    """Distances and vectors from each atom to its neighbours, computed once per batch and kept in it.

    Parameters
    ----------
    data : dict
        Internal batch. The result is stored under ``_d_ij, _r_ij, _mask_ij``.
    masked_distance : float
        Distance of pairs that do not count, Å.

    Returns
    -------
    d_ij : Tensor
        (B, N, N) or (A, M), Å.
    r_ij : Tensor
        r_j - r_i (+ lattice translation), (B, N, N, 3) or (A, M, 3), Å.
    mask : Tensor
        bool, shape of ``d_ij``: pairs that count (`pair_mask`).
    """
    coord = data["coord"]
    if "_d_ij" in data:
        return data["_d_ij"], data["_r_ij"], data["_mask_ij"]
    mask = pair_mask(data)
    r_ij = neighbors(coord, data) - center(coord, data)
    if "cell" in data and "shifts" in data:
        mol_idx = data["mol_idx"].unsqueeze(1)
        r_ij = r_ij + lattice_vectors(data["shifts"].to(coord.dtype), data["cell"], mol_idx).movedim(0, -1)
    # Replace the vector, not the distance: the norm at zero has no second derivative, masked afterwards or not.
    outside = torch.tensor([masked_distance, 0.0, 0.0], dtype=coord.dtype, device=coord.device)
    r_ij = torch.where(mask.unsqueeze(-1), r_ij, outside)
    d_ij = torch.linalg.vector_norm(r_ij, dim=[-1])
    data["_d_ij"] = d_ij
    data["_r_ij"] = r_ij
    data["_mask_ij"] = mask
    return d_ij, r_ij, mask


def neighbor_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum a pair quantity (B, N, M) or (A, M) over the neighbours that ``mask`` lets count, in float64."""
    return x.masked_fill(~mask, 0.0).sum(dim=-1, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------
# long-range pairs, block by block
# --------------------------------------------------------------------------------------------------


class PairBlock(NamedTuple):
    """Some of the pairs of a long-range term; all blocks together hold every pair of the batch.

    The indices broadcast against each other, so that a formula over pairs is written once: dense layout gives
    (B, N, 1) and (B, 1, N), a large molecule rectangles (R, 1) and (1, C), a crystal lists (P,) and (P,), a caller's
    neighbour matrix (R, 1) and (R, M). Values of atoms are taken as ``x.flatten()[block.i]``.

    Attributes
    ----------
    i, j
        int64 places in the flattened atoms of the batch.
    d_ij
        Distances, the shape that ``i`` and ``j`` broadcast to, Å; `MASKED_DISTANCE` where there is no pair at all.
    r_ij
        r_j - r_i (+ lattice translation), (3, ...), Å.
    mask
        bool, broadcasts to the shape of ``d_ij``: the pairs that count, all closer than the cutoff.
    weight
        1 where each unordered pair comes once, ½ where it comes in both orders.
    """

    i: Tensor
    j: Tensor
    d_ij: Tensor
    r_ij: Tensor
    mask: Tensor
    weight: float


class LongRangePairs(NamedTuple):
    """Where the pairs of a long-range term come from; made by `long_range_pairs`.

    Attributes
    ----------
    n_blocks
        Number of blocks.
    cutoff
        Å.
    rows
        Rows of the caller's matrix in a block; 0 if the pairs are not the caller's.
    search
        The search in flat layout.
    """

    n_blocks: int
    cutoff: float
    rows: int
    search: PairSearch | None


def long_range_pairs(data: dict[str, Tensor], cutoff: float, block_pairs: int = BLOCK_PAIRS) -> LongRangePairs:
    """Prepare the pairs closer than ``cutoff`` of an internal batch, to be taken block by block with `pair_block`.

    Parameters
    ----------
    data : dict
        Internal batch. Dense: all pairs of each molecule, one block. Flat: the caller's ``nbmat_lr`` where there is
        one, else a search.
    cutoff : float
        Å; ``math.inf`` for all pairs of a molecule, not for crystals.
    block_pairs : int
        Pairs of a block, about; the memory of a term grows with it.

    Returns
    -------
    LongRangePairs
        Holds no array that grows faster than the number of atoms.
    """
    if not is_flat(data):
        return LongRangePairs(1, cutoff, 0, None)
    if "nbmat_lr" in data:
        n_atoms, width = data["nbmat_lr"].shape
        rows = max(1, block_pairs // max(1, width))
        return LongRangePairs((n_atoms + rows - 1) // rows, cutoff, rows, None)
    cell: Tensor | None = None
    if "cell" in data:
        cell = data["cell"]
    real = data["_real_idx"]
    search = pair_search(data["coord"][real], data["mol_idx"][real], cutoff, cell, block_pairs)
    return LongRangePairs(n_blocks(search), cutoff, 0, search)


def pair_block(
    data: dict[str, Tensor], pairs: LongRangePairs, block: int, masked_distance: float = MASKED_DISTANCE
) -> PairBlock:
    """Return the pairs of one block, with the graph of ``coord`` and ``cell``.

    Parameters
    ----------
    data : dict
        Internal batch; of a flat one ``coord`` and ``cell`` may be other tensors (leaves) of the same values as in the
        search. Of a dense one the vectors are those of `pair_vectors`, with the graph that they were made with.
    pairs : LongRangePairs
        Made for this batch.
    block : int
        0 to ``pairs.n_blocks`` - 1.
    masked_distance : float
        Distance of pairs that are none, Å.
    """
    coord = data["coord"]
    device = coord.device
    if not is_flat(data):
        d_ij, r_ij, mask = pair_vectors(data)
        if not math.isinf(pairs.cutoff):
            mask = mask & (d_ij < pairs.cutoff)
        places = torch.arange(data["numbers"].numel(), device=device).view(data["numbers"].shape)
        return PairBlock(places.unsqueeze(2), places.unsqueeze(1), d_ij, r_ij.permute(3, 0, 1, 2), mask, 0.5)
    weight = 1.0
    search = pairs.search
    if search is None:
        weight = 0.5
        first, last = block * pairs.rows, min((block + 1) * pairs.rows, coord.shape[0])
        i = torch.arange(first, last, device=device).unsqueeze(1)
        j = data["nbmat_lr"][first:last]
        shifts = torch.empty([0, 3], dtype=coord.dtype, device=device)
        if "shifts_lr" in data:
            shifts = data["shifts_lr"][first:last].to(coord.dtype)
        real = real_atoms(data["numbers"])
        mask = real[i] & real[j]
    else:
        i, j, shifts, mask = search_block(search, block)
        i, j = data["_real_idx"][i], data["_real_idx"][j]
    components = coord.t()
    r_ij = components[:, j] - components[:, i]
    if "cell" in data and shifts.shape[0] > 0:
        r_ij = r_ij + lattice_vectors(shifts, data["cell"], data["mol_idx"][i])
    if mask.dim() > 1 or mask.shape[0] > 1:
        # Replace the vector, not the distance: the norm at zero has no second derivative, masked afterwards or not.
        outside = torch.full_like(r_ij[:1], masked_distance)
        r_ij = torch.where(mask, r_ij, torch.cat([outside, torch.zeros_like(r_ij[1:])]))
    d_ij = r_ij.square().sum(dim=0).sqrt()
    return PairBlock(i, j, d_ij, r_ij, mask & (d_ij < pairs.cutoff), weight)


def lattice_vectors(shifts: Tensor, cell: Tensor, mol_idx: Tensor) -> Tensor:
    """Translations (..., 3), in cells, as vectors (3, ...), Å; ``cell`` (B, 3, 3)."""
    if cell.shape[0] == 1:
        return (shifts @ cell[0]).movedim(-1, 0)
    return torch.einsum("...k,...kd->d...", [shifts, cell[mol_idx]])


def block_energy(e_ij: Tensor, block: PairBlock, data: dict[str, Tensor]) -> Tensor:
    """Energy of the pairs of a block, per molecule: (B,) float64, each pair counted once.

    Parameters
    ----------
    e_ij : Tensor
        Energies of the pairs (finite where they do not count, too), shape of ``block.d_ij``.
    block : PairBlock
        The pairs.
    data : dict
        Internal batch.
    """
    e_ij = e_ij.masked_fill(~block.mask, 0.0)
    if not is_flat(data):
        return block.weight * e_ij.sum(dim=[1, 2], dtype=torch.float64)
    if n_molecules(data) == 1:
        return block.weight * e_ij.sum(dtype=torch.float64).reshape(1)
    rows = e_ij.sum(dim=1, dtype=torch.float64) if e_ij.dim() == 2 else e_ij.double()
    energy = torch.zeros([n_molecules(data)], dtype=torch.float64, device=e_ij.device)
    return block.weight * energy.index_add(0, data["mol_idx"][block.i.flatten()], rows)


def first_order(data: dict[str, Tensor]) -> bool:
    """Tell whether first derivatives of the energy are all that will be taken, so that memory can stay linear.

    The key ``_first_order`` says so. A term whose pairs or triples are many then differentiates block by block and
    hands the derivative over with `attach_gradient`.
    """
    return "_first_order" in data


def leaf(x: Tensor) -> Tensor:
    """The same values, detached, to be differentiated by."""
    return x.detach().requires_grad_(True)


def gradients(outputs: list[Tensor], inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Derivatives by ``inputs``, given those by ``outputs``; zeros where nothing depends on an input. No graph."""
    grad_outputs: list[Tensor | None] = []
    for d in upstream:
        grad_outputs.append(d)
    found = torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True)
    out: list[Tensor] = []
    for gradient, x in zip(found, inputs):  # noqa: B905 - TorchScript has no strict
        out.append(torch.zeros_like(x) if gradient is None else gradient)
    return out


def stress(coord_gradient: Tensor, cell_gradient: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Derivative of the energy by a homogeneous strain, divided by the volume.

    Positions and lattice vectors follow a strain alike, r -> r (1 + ε), so dE/dε = Σ r⊗∂E/∂r + Σ h⊗∂E/∂h over atoms
    and lattice vectors. The sign is that of ASE: positive where the crystal wants to shrink.

    Parameters
    ----------
    coord_gradient : Tensor
        (A, 3), eV/Å.
    cell_gradient : Tensor
        (B, 3, 3), eV/Å.
    data : dict
        Flat internal batch with ``cell``.

    Returns
    -------
    Tensor
        (B, 3, 3), symmetric, eV/Å³.
    """
    cell = data["cell"]
    products = data["coord"].double().unsqueeze(2) * coord_gradient.double().unsqueeze(1)
    strain = mol_sum(products, data) + cell.double().transpose(1, 2) @ cell_gradient.double()
    strain = strain / torch.linalg.det(cell.double()).abs().view(-1, 1, 1)
    return (0.5 * (strain + strain.transpose(1, 2))).to(cell.dtype)


def second_derivatives(gradient: Tensor, coord: Tensor, keep_graph: bool) -> Tensor:
    """Differentiate the gradient of the energy once more, one row after the other.

    Parameters
    ----------
    gradient, coord : Tensor
        (B, N, 3), or (A, 3) of one molecule; the gradient has a graph.
    keep_graph : bool
        The result has one, too.

    Returns
    -------
    Tensor
        (B, N, 3, N, 3), or (1, A, 3, A, 3), symmetric, eV/Å².
    """
    gradient = gradient.view([-1] + list(coord.shape[-2:]))
    n_mol, n_atoms = gradient.shape[0], gradient.shape[1]
    rows: list[Tensor] = []
    for i in range(n_atoms):
        for k in range(3):
            row = torch.autograd.grad([gradient[:, i, k].sum()], [coord], retain_graph=True, create_graph=keep_graph)[0]
            assert row is not None
            rows.append(row.reshape(n_mol, n_atoms, 3))
    hessian = torch.stack(rows, dim=1).view(n_mol, n_atoms, 3, n_atoms, 3)
    return 0.5 * (hessian + hessian.permute(0, 3, 4, 1, 2))


def attach_gradient(energy: Tensor, x: Tensor, gradient: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Give energies a derivative that was computed apart: E + Σ (x - x₀)·∂E/∂x at x = x₀.

    Values do not change, first derivatives by ``x`` are ``gradient``; second ones are lost.

    Parameters
    ----------
    energy : Tensor
        (B,) float64.
    x : Tensor
        Atomic quantity, (A, ...) or (B, N, ...).
    gradient : Tensor
        Derivative of the sum of ``energy``, shape of ``x``.
    data : dict
        Internal batch.
    """
    terms = (x - x.detach()) * gradient.to(x.dtype)
    n_axes = data["numbers"].dim()
    if terms.dim() > n_axes:
        terms = terms.flatten(n_axes).sum(dim=-1)
    return energy + mol_sum(terms, data).to(energy.dtype)


def attach_cell_gradient(energy: Tensor, cell: Tensor, gradient: Tensor) -> Tensor:
    """As `attach_gradient`, for cells (B, 3, 3)."""
    return energy + ((cell - cell.detach()) * gradient.to(cell.dtype)).sum(dim=[1, 2]).to(energy.dtype)


# --------------------------------------------------------------------------------------------------
# from the caller's layout to the model's and back
# --------------------------------------------------------------------------------------------------


def check_batch(data: dict[str, Tensor]) -> None:
    """Raise a ValueError that says what is wrong if keys are missing or shapes do not fit together."""
    if "coord" not in data or "numbers" not in data:
        raise ValueError("the input needs the keys coord and numbers")
    coord, numbers = data["coord"], data["numbers"]
    if coord.dim() not in (2, 3) or coord.shape[-1] != 3:
        raise ValueError(f"coord must have shape (B, N, 3) or (A, 3), found {list(coord.shape)}")
    if list(numbers.shape) != list(coord.shape[:-1]):
        raise ValueError(f"numbers has shape {list(numbers.shape)}, coord {list(coord.shape)}: one number per atom")
    if not coord.is_floating_point():
        raise ValueError("coord must be a tensor of floating-point numbers")
    if coord.dtype != torch.float32 and coord.dtype != torch.float64:
        raise ValueError("coord must be float32 or float64: positions of lower precision give wrong forces")
    if numbers.is_floating_point():
        raise ValueError("numbers must be a tensor of whole numbers: atomic numbers")
    if "cell" in data:
        cell = data["cell"]
        fits = cell.dim() == 2 or (cell.dim() == 3 and not is_flat(data) and cell.shape[0] in [1, coord.shape[0]])
        fits = fits or (cell.dim() == 3 and is_flat(data))
        if not fits or cell.shape[-1] != 3 or cell.shape[-2] != 3:
            raise ValueError(f"cell must have shape (3, 3) or (B, 3, 3), found {list(cell.shape)}")
    if is_flat(data) and "mol_idx" in data and list(data["mol_idx"].shape) != [coord.shape[0]]:
        raise ValueError(f"mol_idx has shape {list(data['mol_idx'].shape)}, coord {list(coord.shape)}: one per atom")
    _check_neighbors(data)


def _check_neighbors(data: dict[str, Tensor]) -> None:
    """Raise a ValueError for a caller's neighbour matrices that do not fit the atoms, each other or the cell."""
    if "nbmat" not in data and ("nbmat_lr" in data or "shifts" in data or "shifts_lr" in data):
        raise ValueError("nbmat_lr, shifts and shifts_lr need nbmat, the neighbours within the cutoff of the network")
    for name, shifts_name in [("nbmat", "shifts"), ("nbmat_lr", "shifts_lr")]:
        if name in data:
            found = list(data[name].shape)
            if found[:-1] != list(data["numbers"].shape):
                raise ValueError(
                    f"{name} must have shape (A, M) with coord (A, 3), or (B, N, M) with coord (B, N, 3); "
                    f"found {found} with {list(data['coord'].shape)}"
                )
            if shifts_name in data and list(data[shifts_name].shape) != found + [3]:
                raise ValueError(f"{shifts_name} must have shape {found + [3]}, found {list(data[shifts_name].shape)}")
            if (shifts_name in data) != ("cell" in data):
                raise ValueError(f"{name} of a crystal needs cell and {shifts_name}, of a molecule neither")
        elif shifts_name in data:
            raise ValueError(f"{shifts_name} needs {name}")


def count_molecules(data: dict[str, Tensor]) -> int:
    """Number of molecules B of a caller's batch: from shapes, or from ``mol_idx`` where nothing else tells."""
    if not is_flat(data):
        return data["coord"].shape[0]
    if "mol_idx" not in data:
        return 1
    for key in ["charge", "mult"]:
        if key in data and data[key].dim() == 1:
            return data[key].shape[0]
    return int(data["mol_idx"].max().item()) + 1 if data["mol_idx"].shape[0] > 0 else 0


def check_values(data: dict[str, Tensor]) -> None:
    """Raise a ValueError where a batch of fitting shapes (`check_batch`) cannot be right. Waits for the device.

    ``charge`` and ``mult`` have one entry per molecule, ``mol_idx`` is sorted and within range, and a caller's
    neighbour matrix comes with the padding atom that its unused columns point to.
    """
    n_mol = count_molecules(data)
    for key in ["charge", "mult"]:
        if key in data and data[key].numel() != n_mol:
            raise ValueError(f"{key} has {data[key].numel()} entries for {n_mol} molecules")
    if "mol_idx" in data and is_flat(data) and data["mol_idx"].shape[0] > 0:
        mol_idx = data["mol_idx"]
        if n_mol > mol_idx.shape[0] and not ("charge" in data or "mult" in data):
            raise ValueError(
                f"mol_idx goes up to {n_mol - 1} with {mol_idx.shape[0]} atoms: if there are molecules without atoms, "
                "charge or mult must say how many molecules there are"
            )
        if bool((mol_idx[1:] < mol_idx[:-1]).any().item()):
            raise ValueError("mol_idx must be sorted: the atoms of a molecule follow each other")
        if int(mol_idx[0].item()) < 0 or int(mol_idx[-1].item()) >= n_mol:
            raise ValueError(f"mol_idx must be between 0 and {n_mol - 1}, the number of molecules less one")
    if "nbmat" in data and bool((data["numbers"][..., -1] != 0).any().item()):
        raise ValueError("with nbmat, the last atom (of each molecule) must be padding: numbers = 0")
    n_places = data["numbers"].shape[-1]
    for key in ["nbmat", "nbmat_lr"]:
        if key in data and bool(((data[key] < 0) | (data[key] >= n_places)).any().item()):
            raise ValueError(f"{key} must hold places of atoms, 0 to {n_places - 1}, the last one where there is none")


def possible_multiplicities(data: dict[str, Tensor]) -> Tensor:
    """Tell for each molecule of a caller's batch whether its multiplicity fits its number of electrons: (B,) bool.

    An even number of electrons needs an odd multiplicity and the other way round, and there are no more unpaired
    electrons than electrons. Charges and multiplicities that are not whole numbers are left alone.
    """
    n_mol = count_molecules(data)
    numbers = data["numbers"].long()
    nuclear = torch.zeros([n_mol], dtype=torch.long, device=numbers.device)
    if not is_flat(data):
        nuclear = numbers.sum(dim=1)
    elif "mol_idx" in data:
        nuclear = nuclear.index_add(0, data["mol_idx"].long(), numbers)
    else:
        nuclear = nuclear + numbers.sum()
    electrons = nuclear - _molecule_values(data, "charge", 0.0, n_mol).double()
    unpaired = _molecule_values(data, "mult", 1.0, n_mol).double() - 1.0
    whole = (electrons == electrons.round()) & (unpaired == unpaired.round())
    fits = (unpaired >= 0) & (unpaired <= electrons) & (torch.remainder(electrons - unpaired, 2.0) == 0)
    # Places without atoms are no molecules.
    return fits | ~whole | (nuclear == 0)


def _molecule_values(data: dict[str, Tensor], key: str, default: float, n_mol: int) -> Tensor:
    """A value per molecule (B,), the default where the caller gives none, dtype and device of ``coord``."""
    coord = data["coord"]
    if key not in data:
        return torch.full([n_mol], default, dtype=coord.dtype, device=coord.device)
    value = data[key].to(device=coord.device, dtype=coord.dtype).reshape(-1)
    if value.shape[0] != n_mol:
        raise ValueError(f"{key} has {value.shape[0]} entries for {n_mol} molecules")
    return value


def internal_batch(data: dict[str, Tensor], cutoff: float, dense_limit: int = 256) -> dict[str, Tensor]:
    """Make the batch that the parts of a model work on: `internal_layout`, and neighbours of the network.

    Parameters
    ----------
    data, dense_limit
        As in `internal_layout`.
    cutoff : float
        Cutoff of the network, Å.

    Returns
    -------
    dict
        As of `internal_layout`, in flat layout with ``nbmat`` (``shifts``).

    Raises
    ------
    ValueError
        Shapes that do not fit, missing keys, a singular cell.
    """
    batch = internal_layout(data, dense_limit)
    if is_flat(batch) and "nbmat" not in batch:
        batch = with_neighbors(batch, cutoff)
    return batch


def internal_layout(data: dict[str, Tensor], dense_limit: int = 256) -> dict[str, Tensor]:
    """Copy the documented inputs of a batch into a new dictionary, in one of the two layouts that the model works in.

    Molecules that are not periodic, bring no neighbour matrix and have at most ``dense_limit`` places are in dense
    layout if they came so, or if there is one alone; everything else becomes flat with a padding atom at the end.

    Parameters
    ----------
    data : dict
        The caller's batch, left as it is. Layouts: dense (B, N, 3); dense with ``nbmat`` (B, N, M), the last atom
        of each molecule being padding; flat (A, 3) with ``mol_idx`` (absent: one molecule), without or with
        ``nbmat`` (A, M), then the last atom is padding.
    dense_limit : int
        See above.

    Returns
    -------
    dict
        ``coord, numbers, charge, mult`` (+ ``mol_idx, nbmat, nbmat_lr, shifts, shifts_lr, cell`` (B, 3, 3) in flat
        layout, matrices where the caller gave them), ``_real_idx`` (places of the atoms that are not padding) and,
        where the layout was changed, ``_restore_idx`` (for each of the caller's atoms its row).

    Raises
    ------
    ValueError
        Shapes that do not fit, missing keys.
    """
    check_batch(data)
    coord, numbers = data["coord"], data["numbers"].long()
    n_mol = count_molecules(data)
    out = _molecule_inputs(data, n_mol)
    can_be_dense = "nbmat" not in data and "cell" not in data and coord.shape[-2] <= dense_limit
    if can_be_dense and not is_flat(data):
        out["coord"], out["numbers"] = coord, numbers
        out["_real_idx"] = torch.nonzero(real_atoms(numbers).reshape(-1)).squeeze(1)
        return out
    if can_be_dense and n_mol == 1:
        out["coord"], out["numbers"] = coord.unsqueeze(0), numbers.unsqueeze(0)
        out["_restore_idx"] = torch.arange(numbers.shape[0], device=coord.device)
        out["_real_idx"] = torch.nonzero(real_atoms(numbers)).squeeze(1)
        return out

    if not is_flat(data):
        mol_idx = torch.arange(n_mol, device=coord.device).unsqueeze(1).expand(numbers.shape).reshape(-1)
    elif "mol_idx" in data:
        mol_idx = data["mol_idx"].long()
    else:
        mol_idx = torch.zeros(numbers.shape[0], dtype=torch.long, device=coord.device)
    if "nbmat" in data:
        _add_atoms_with_neighbors(out, data, mol_idx)
    else:
        _add_atoms(out, coord, numbers, mol_idx)
    return out


def _molecule_inputs(data: dict[str, Tensor], n_mol: int) -> dict[str, Tensor]:
    """What an internal batch has of each molecule: charge, multiplicity, cell (B, 3, 3) where there are cells."""
    out: dict[str, Tensor] = {}
    if "cell" in data:
        cell = data["cell"]
        if cell.dim() == 3 and cell.shape[0] != 1 and cell.shape[0] != n_mol:
            raise ValueError(f"cell has {cell.shape[0]} entries for {n_mol} molecules")
        out["cell"] = cell.to(data["coord"].dtype).expand(n_mol, 3, 3)
    out["charge"] = _molecule_values(data, "charge", 0.0, n_mol)
    out["mult"] = _molecule_values(data, "mult", 1.0, n_mol)
    if "_fidelities" in data:
        out["_fidelities"] = data["_fidelities"]
    return out


def _add_atoms_with_neighbors(out: dict[str, Tensor], data: dict[str, Tensor], mol_idx: Tensor) -> None:
    """Add the atoms, as the rows that a caller's neighbour matrices number, and these matrices to ``out``."""
    dense = not is_flat(data)
    for key in ["coord", "numbers", "nbmat", "nbmat_lr", "shifts", "shifts_lr"]:
        if key in data:
            value = data[key]
            if key in ["numbers", "nbmat", "nbmat_lr"]:
                value = value.long()
            if dense and key in ["nbmat", "nbmat_lr"]:
                n_mol, n_places = value.shape[0], value.shape[1]
                value = value + (torch.arange(n_mol, device=value.device) * n_places).view(-1, 1, 1)
            out[key] = value.flatten(0, 1) if dense else value
    out["mol_idx"] = mol_idx
    out["_real_idx"] = torch.nonzero(real_atoms(out["numbers"])).squeeze(1)
    if dense:
        out["_restore_idx"] = torch.arange(mol_idx.shape[0], device=mol_idx.device)


def _add_atoms(out: dict[str, Tensor], coord: Tensor, numbers: Tensor, mol_idx: Tensor) -> None:
    """Add the atoms that are not padding, in a row with one padding atom at the end, to ``out``.

    ``coord`` and ``numbers`` are of either layout, ``mol_idx`` is of all their places.
    """
    kept = torch.nonzero(real_atoms(numbers).reshape(-1)).squeeze(1)
    n_atoms = kept.shape[0]
    out["_real_idx"] = torch.arange(n_atoms, device=coord.device)
    restore = torch.full([numbers.numel()], n_atoms, dtype=torch.long, device=coord.device)
    out["_restore_idx"] = restore.index_copy(0, kept, out["_real_idx"])
    mol_idx = mol_idx[kept]
    last = mol_idx[-1:] if n_atoms > 0 else mol_idx.new_zeros([1])
    out["coord"] = torch.cat([coord.reshape(-1, 3)[kept], coord.new_zeros([1, 3])])
    out["numbers"] = torch.cat([numbers.reshape(-1)[kept], numbers.new_zeros([1])])
    out["mol_idx"] = torch.cat([mol_idx, last])


def with_neighbors(batch: dict[str, Tensor], cutoff: float) -> dict[str, Tensor]:
    """Add ``nbmat`` (``shifts``) of the pairs closer than ``cutoff``, Å, to a flat internal batch."""
    cell: Tensor | None = None
    if "cell" in batch:
        cell = batch["cell"]
    batch["nbmat"], shifts = neighbor_matrix(batch["coord"][:-1], batch["mol_idx"][:-1], cutoff, cell)
    if shifts is not None:
        batch["shifts"] = shifts
    return batch


def emitted_batch(batch: dict[str, Tensor], data: dict[str, Tensor], atom_keys: list[str]) -> dict[str, Tensor]:
    """What a model returns: the caller's keys and the results, in the caller's layout, without internal keys.

    Parameters
    ----------
    batch : dict
        Made by `internal_batch`, with results added.
    data : dict
        The caller's batch.
    atom_keys : list of str
        Keys that hold one value per atom.

    Returns
    -------
    dict
        Keys and shapes of `BATCH_KEYS`.
    """
    out: dict[str, Tensor] = {}
    for key, value in data.items():
        out[key] = value
    for key, value in batch.items():
        inner = key.startswith("_") or key.startswith("nbmat") or key.startswith("shifts") or key == "cell"
        if inner or key in ["coord", "numbers", "mol_idx"]:
            continue
        out[key] = restored(value, batch, data) if key in atom_keys else value
    return out


def restored(value: Tensor, batch: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    """Return a quantity per atom of an internal batch in the layout of the caller's ``data`` it was made from."""
    if "_restore_idx" not in batch:
        return value
    rows = value.flatten(0, batch["numbers"].dim() - 1)[batch["_restore_idx"]]
    return rows.reshape(list(data["numbers"].shape) + list(rows.shape[1:]))
