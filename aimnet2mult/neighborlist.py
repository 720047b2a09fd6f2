"""Neighbour search in tensor operations: pairs within a cutoff, molecules or crystals, memory linear in the pairs.

Distances are computed for a block of rows at a time, so that no (A, A) array exists. Everything here is
scriptable and works on positions without a graph: which atoms are neighbours has no derivative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 4_000_000
"""Distances computed at a time."""


def _block_rows(n_columns: int, elements: int = BLOCK_ELEMENTS) -> int:
    return max(1, elements // max(1, n_columns))


def integer_grid(limits: Tensor) -> Tensor:
    """All triples of integers (n_1, n_2, n_3) with |n_k| <= ``limits[k]``: (K, 3) int64."""
    axes: list[Tensor] = []
    for k in range(3):
        n = int(limits[k].item())
        axes.append(torch.arange(-n, n + 1, device=limits.device))
    return torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).reshape(-1, 3)


def molecule_pairs(coord: Tensor, mol_idx: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """All ordered pairs of atoms of the same molecule closer than ``cutoff``.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å.
    mol_idx : Tensor
        (A,) int, sorted.
    cutoff : float
        Å; ``math.inf`` for all pairs.

    Returns
    -------
    i, j : Tensor
        (P,) int64 each, ordered by i.
    """
    n_atoms = coord.shape[0]
    starts = torch.searchsorted(mol_idx, mol_idx)
    ends = torch.searchsorted(mol_idx, mol_idx, right=True)
    i_parts = [torch.empty(0, dtype=torch.long, device=coord.device)]
    j_parts = [torch.empty(0, dtype=torch.long, device=coord.device)]
    longest = int((ends - starts).max().item()) if n_atoms > 0 else 0
    rows = _block_rows(longest)
    begin = 0
    while begin < n_atoms:
        end = min(n_atoms, begin + rows)
        first, last = int(starts[begin].item()), int(ends[end - 1].item())
        # A block that begins in one molecule and ends in another sees the atoms of all molecules between.
        while last - first > 2 * longest and end > begin + 1:
            end = begin + (end - begin) // 2
            last = int(ends[end - 1].item())
        near = mol_idx[begin:end].unsqueeze(1) == mol_idx[first:last].unsqueeze(0)
        if not math.isinf(cutoff):
            delta = coord[begin:end].unsqueeze(1) - coord[first:last].unsqueeze(0)
            near = near & (delta.pow(2).sum(-1) < cutoff * cutoff)
        pairs = torch.nonzero(near)
        i, j = pairs[:, 0] + begin, pairs[:, 1] + first
        other = i != j
        i_parts.append(i[other])
        j_parts.append(j[other])
        begin = end
    return torch.cat(i_parts), torch.cat(j_parts)


def periodic_pairs(coord: Tensor, cell: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """All ordered pairs (i, j, lattice translation) closer than ``cutoff`` in a crystal.

    The cell may have any shape and may be smaller than the cutoff: an atom then sees its own images.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å, inside the cell or not.
    cell : Tensor
        (3, 3), Å, rows are lattice vectors.
    cutoff : float
        Å, finite.

    Returns
    -------
    i, j : Tensor
        (P,) int64, ordered by i.
    shifts : Tensor
        (P, 3), the vector from i to j is ``coord[j] + shifts @ cell - coord[i]``; dtype of ``coord``.
    """
    inverse = torch.linalg.inv(cell)
    wraps = torch.floor(coord @ inverse)
    wrapped = coord - wraps @ cell
    # The distance between lattice planes is one over the length of a reciprocal vector (a column of the inverse).
    n_images = torch.ceil(cutoff * torch.linalg.vector_norm(inverse, dim=[0]))
    images = integer_grid(n_images).to(coord.dtype)

    n_atoms = coord.shape[0]
    ghosts = (wrapped.unsqueeze(0) + (images @ cell).unsqueeze(1)).reshape(-1, 3)
    low, high = wrapped.amin(dim=0) - cutoff, wrapped.amax(dim=0) + cutoff
    kept = torch.nonzero(((ghosts >= low) & (ghosts <= high)).all(dim=1)).squeeze(1)
    ghosts = ghosts[kept]
    ghost_atom = kept % n_atoms
    ghost_image = images[torch.div(kept, n_atoms, rounding_mode="floor")]
    at_home = (ghost_image == 0).all(dim=1)

    i_parts = [torch.empty(0, dtype=torch.long, device=coord.device)]
    ghost_parts = [torch.empty(0, dtype=torch.long, device=coord.device)]
    rows = _block_rows(ghosts.shape[0])
    for begin in range(0, n_atoms, rows):
        end = min(n_atoms, begin + rows)
        near = (wrapped[begin:end].unsqueeze(1) - ghosts.unsqueeze(0)).pow(2).sum(-1) < cutoff * cutoff
        own = torch.arange(begin, end, device=coord.device).unsqueeze(1) == ghost_atom.unsqueeze(0)
        pairs = torch.nonzero(near & ~(own & at_home.unsqueeze(0)))
        i_parts.append(pairs[:, 0] + begin)
        ghost_parts.append(pairs[:, 1])
    i, ghost = torch.cat(i_parts), torch.cat(ghost_parts)
    j = ghost_atom[ghost]
    return i, j, ghost_image[ghost] - wraps[j] + wraps[i]


def neighbor_matrix(
    coord: Tensor, mol_idx: Tensor, cutoff: float, cell: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Neighbours within ``cutoff`` as a matrix, for a batch to which one padding atom is appended.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å, without the padding atom.
    mol_idx : Tensor
        (A,) int, sorted.
    cutoff : float
        Å; ``math.inf`` (all atoms of the molecule) only without a cell.
    cell : Tensor, optional
        (3, 3) for all, or (B, 3, 3), Å.

    Returns
    -------
    nbmat : Tensor
        (A + 1, M) int64; unused places, and the last row, hold A, the index of the padding atom.
    shifts : Tensor or None
        (A + 1, M, 3) lattice translations, None without a cell.
    """
    coord = coord.detach()
    n_atoms = coord.shape[0]
    shifts = torch.empty(0)
    if cell is None:
        i, j = molecule_pairs(coord, mol_idx, cutoff)
    else:
        cell = cell.detach().to(coord.dtype)
        if math.isinf(cutoff):
            raise ValueError("a periodic system needs a finite long-range cutoff: use the Coulomb method dsf or ewald")
        i_parts = [torch.empty(0, dtype=torch.long, device=coord.device)]
        j_parts = [torch.empty(0, dtype=torch.long, device=coord.device)]
        s_parts = [torch.empty(0, 3, dtype=coord.dtype, device=coord.device)]
        sizes = torch.bincount(mol_idx)
        begin = 0
        for b in range(sizes.shape[0]):
            end = begin + int(sizes[b].item())
            cell_b = cell if cell.dim() == 2 else cell[b]
            i_b, j_b, s_b = periodic_pairs(coord[begin:end], cell_b, cutoff)
            i_parts.append(i_b + begin)
            j_parts.append(j_b + begin)
            s_parts.append(s_b)
            begin = end
        i, j, shifts = torch.cat(i_parts), torch.cat(j_parts), torch.cat(s_parts)

    counts = torch.bincount(i, minlength=n_atoms + 1)
    width = max(1, int(counts.max().item()))
    column = torch.arange(i.shape[0], device=i.device) - (torch.cumsum(counts, 0) - counts)[i]
    nbmat = torch.full([n_atoms + 1, width], n_atoms, dtype=torch.long, device=coord.device)
    nbmat[i, column] = j
    if cell is None:
        return nbmat, None
    matrix = torch.zeros([n_atoms + 1, width, 3], dtype=coord.dtype, device=coord.device)
    matrix[i, column] = shifts
    return nbmat, matrix


class PairSearch(NamedTuple):
    """All unordered pairs within a cutoff, found block by block; made by `pair_search`, read by `search_block`.

    Attributes
    ----------
    cutoff
        Å; ``inf`` for all pairs of a molecule.
    mol_idx
        (A,) int64.
    atom, translation, position
        (G,) int64, (G, 3) and (G, 3) Å: points, that is atoms and their images; position = ``coord[atom] +
        translation @ cell``. The first A points are the atoms themselves. ``translation`` is (0, 3) without a cell.
    query, start, end
        (E,) int64: point ``query`` has the points ``start .. end - 1`` as candidates.
    bounds
        Block b of the list has the queries ``bounds[b] .. bounds[b + 1] - 1``.
    n_candidates
        Number of candidates of each block of the list.
    rectangles
        Three integers for each block that is a rectangle: rows begin, rows end = columns end of the rows' molecule.
    """

    cutoff: float
    mol_idx: Tensor
    atom: Tensor
    translation: Tensor
    position: Tensor
    query: Tensor
    start: Tensor
    end: Tensor
    bounds: list[int]
    n_candidates: list[int]
    rectangles: list[int]


def pair_search(
    coord: Tensor, mol_idx: Tensor, cutoff: float, cell: Tensor | None = None, block_pairs: int = 262144
) -> PairSearch:
    """Prepare the search for all unordered pairs of atoms of the same molecule, in blocks of bounded size.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å, without the padding atom; its graph is not used.
    mol_idx : Tensor
        (A,) int, sorted.
    cutoff : float
        Å; ``math.inf`` (all pairs of a molecule) only without a cell.
    cell : Tensor, optional
        (3, 3) for all, or (B, 3, 3), Å.
    block_pairs : int
        About how many pairs a block may have.

    Returns
    -------
    PairSearch
        For `n_blocks` and `search_block`.
    """
    coord = coord.detach()
    n_atoms = coord.shape[0]
    device = coord.device
    index = torch.arange(n_atoms, device=device)
    if cell is not None:
        nbmat, shifts = neighbor_matrix(coord, mol_idx, cutoff, cell)
        assert shifts is not None
        i = index.unsqueeze(1).expand(n_atoms, nbmat.shape[1])
        j = nbmat[:-1]
        s = shifts[:-1]
        upper = (s[..., 0] > 0) | ((s[..., 0] == 0) & ((s[..., 1] > 0) | ((s[..., 1] == 0) & (s[..., 2] > 0))))
        keep = (j < n_atoms) & ((i < j) | ((i == j) & upper))
        i, j, s = i[keep], j[keep], s[keep]
        # Each pair is a query (first atom) with one candidate.
        home = torch.zeros(n_atoms, 3, dtype=coord.dtype, device=device)
        places = torch.arange(j.shape[0], device=device) + n_atoms
        cells = (cell if cell.dim() == 2 else cell[mol_idx][j]).to(coord.dtype)
        moved = s @ cells if cell.dim() == 2 else (s.unsqueeze(1) @ cells).squeeze(1)
        atom, translation = torch.cat([index, j]), torch.cat([home, s])
        position = torch.cat([coord, coord[j] + moved])
        query, start, end = i, places, places + 1
    else:
        ends = torch.searchsorted(mol_idx, mol_idx, right=True)
        atom, position = index, coord
        translation = torch.zeros(0, 3, dtype=coord.dtype, device=device)
        query, start, end = index, index + 1, ends
    total = torch.cumsum(end - start, 0)
    bounds: list[int] = [0]
    n_candidates: list[int] = []
    if total.shape[0] > 0 and int(total[-1].item()) > 0:
        marks = torch.arange(block_pairs, int(total[-1].item()) + block_pairs, block_pairs, device=device)
        cuts = torch.unique(torch.searchsorted(total, marks).clamp(max=query.shape[0] - 1) + 1)
        found: list[int] = cuts.tolist()
        sums: list[int] = total[cuts - 1].tolist()
        before = 0
        for k in range(len(found)):
            bounds.append(found[k])
            n_candidates.append(sums[k] - before)
            before = sums[k]
    rectangles: list[int] = []
    return PairSearch(cutoff, mol_idx, atom, translation, position, query, start, end, bounds, n_candidates, rectangles)


def n_blocks(search: PairSearch) -> int:
    """Number of blocks of pairs."""
    return len(search.rectangles) // 3 + len(search.n_candidates)


def search_block(search: PairSearch, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of block ``k``; each unordered pair is in exactly one block, once.

    Returns
    -------
    i, j : Tensor
        int64: a list (P,) and (P,), or a rectangle (R, 1) and (1, C).
    shifts : Tensor
        (P, 3), the vector from i to j is ``coord[j] + shifts @ cell - coord[i]``; (0, 3) without a cell.
    mask : Tensor
        bool, which of the pairs count: (1,) true for a list (all are closer than the cutoff), (R, C) for a
        rectangle (i < j in the same molecule, at any distance).
    """
    n_rectangles = len(search.rectangles) // 3
    device = search.position.device
    if k < n_rectangles:
        first, rows_end, columns_end = (
            search.rectangles[3 * k],
            search.rectangles[3 * k + 1],
            search.rectangles[3 * k + 2],
        )
        i = torch.arange(first, rows_end, device=device).unsqueeze(1)
        j = torch.arange(first, columns_end, device=device).unsqueeze(0)
        mask = (i < j) & (search.mol_idx[i] == search.mol_idx[j])
        return i, j, search.translation[:0], mask
    k = k - n_rectangles
    begin, end = search.bounds[k], search.bounds[k + 1]
    start = search.start[begin:end]
    count = search.end[begin:end] - start
    total = search.n_candidates[k]
    entry = torch.repeat_interleave(torch.arange(end - begin, device=device), count, output_size=total)
    place = torch.arange(total, device=device) + (start - (torch.cumsum(count, 0) - count))[entry]
    query = search.query[begin:end][entry]
    if not math.isinf(search.cutoff):
        delta = search.position[place] - search.position[query]
        near = torch.nonzero(delta.pow(2).sum(-1) < search.cutoff * search.cutoff).squeeze(1)
        place, query = place[near], query[near]
    shifts = search.translation[:0]
    if search.translation.shape[0] > 0:
        shifts = search.translation[place] - search.translation[query]
    everything = torch.ones(1, dtype=torch.bool, device=device)
    return search.atom[query], search.atom[place], shifts, everything
