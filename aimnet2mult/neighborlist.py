"""Neighbour search in tensor operations: molecules or crystals, time and memory linear in the number of atoms.

Two products: `neighbor_matrix`, the neighbours of each atom within a short cutoff, and `pair_search`, all pairs of a
long-range term, handed out block by block so that they never are in memory together.

Both work on *points*: the atoms, and in a crystal those of their images that an atom can see. A *query* is a point
together with a contiguous range of points that may be its neighbours. In a small system the range is the whole
molecule. In a large one the points are sorted into bins (columns along z, cut finely), and the ranges are the pieces
of the columns around an atom that its cutoff sphere touches (a linked-cell list; Allen and Tildesley, Computer
Simulation of Liquids, 2nd ed., section 5.3.2). The molecule is the leading part of the bin number, so that a batch of
any number of molecules is one search. Then ranges are expanded and distances compared, a bounded number at a time.

Everything here is scriptable and works on positions without a graph: which atoms are neighbours has no derivative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_DENSITY = 5.0
"""Atoms per Å³ that no matter has: diamond has 0.18, hydrogen in the middle of Jupiter 2."""

MAX_IMAGES = 2e7
"""Images of atoms that a search may make, besides 30 of each atom; each takes some 200 bytes meanwhile."""


class PairSearch(NamedTuple):
    """The pairs of a system, to be found block by block; made by `pair_search`, read by `search_block`.

    Blocks are numbered with the rectangles first. G points, E queries.

    Attributes
    ----------
    cutoff
        Å; ``inf`` for all pairs of a molecule.
    mol_idx
        (A,) int64.
    atom
        (G,) int64, the atom of a point.
    translation
        (G, 3), lattice translation of a point, as whole numbers; (0, 3) without a cell.
    position
        (3, G), one row per axis, ``coord[atom] + translation @ cell``, Å.
    query, start, end
        (E,) int64: the candidates of point ``query`` are the points ``start .. end - 1``.
    bounds
        List block b has the queries ``bounds[b] .. bounds[b + 1] - 1``.
    n_candidates
        Candidates of each list block.
    rectangles
        For each rectangle three atoms: the first of its rows and columns, the end of its rows, the end of its columns.
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


class _Points(NamedTuple):
    """Atoms first, in their order, then images, in the order of their atoms."""

    atom: Tensor  # (G,) int64
    translation: Tensor  # (G, 3), or (0, 3) without a cell
    position: Tensor  # (G, 3), Å


class _Queries(NamedTuple):
    """Points, and queries whose candidates are contiguous ranges of them."""

    atom: Tensor  # (G,) int64
    translation: Tensor  # (G, 3), or (0, 3) without a cell
    position: Tensor  # (3, G), Å
    query: Tensor  # (E,) int64, a point
    start: Tensor  # (E,) int64
    end: Tensor  # (E,) int64


class _Grid(NamedTuple):
    """Bins of each molecule: columns along z, cut into short pieces."""

    low: Tensor  # (B, 3) float64, Å
    width: Tensor  # (B, 3) float64, Å
    shape: Tensor  # (B, 3) int64, bins along each axis
    first: Tensor  # (B,) int64, number of the first bin
    n_bins: int


def integer_grid(limits: Tensor) -> Tensor:
    """All triples of integers (n_1, n_2, n_3) with |n_k| <= ``limits[k]``: (K, 3) int64."""
    axes: list[Tensor] = []
    for k in range(3):
        n = int(limits[k].item())
        axes.append(torch.arange(-n, n + 1, device=limits.device))
    return torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).reshape(-1, 3)


def _range_of_each(x: Tensor, group: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest row of ``x`` (G, 3) in each group: (n_groups, 3) each, zero for empty groups."""
    index = group.unsqueeze(1).expand(x.shape[0], 3)
    zeros = torch.zeros([n_groups, 3], dtype=x.dtype, device=x.device)
    low = zeros.scatter_reduce(0, index, x, "amin", include_self=False)
    high = zeros.scatter_reduce(0, index, x, "amax", include_self=False)
    return low, high


def _rows_times_cells(rows: Tensor, cells: Tensor, group: Tensor) -> Tensor:
    """Each row (G, 3) times the matrix (B, 3, 3) of its group."""
    if cells.shape[0] == 1:
        return rows @ cells[0]
    return (rows.unsqueeze(1) @ cells[group]).squeeze(1)


def _check_coordinates(coord: Tensor, mol_idx: Tensor, cutoff: float) -> None:
    if not cutoff > 0.0:
        raise ValueError(f"the cutoff of a neighbour search is {cutoff} Å: it must be positive")
    finite = torch.isfinite(coord).all(dim=1)
    if not bool(finite.all().item()):
        atom = int(torch.nonzero(~finite)[0, 0].item())
        raise ValueError(f"coord of molecule {int(mol_idx[atom].item())} is not finite (atom {atom} of the batch)")


def _checked_cells(cell: Tensor, mol_idx: Tensor, n_mol: int, cutoff: float, densest: float = MAX_DENSITY) -> Tensor:
    """Cells (B, 3, 3) in float64; a ValueError names the first one that cannot hold its atoms."""
    if math.isinf(cutoff):
        raise ValueError("a periodic system needs a finite long-range cutoff: use the Coulomb method dsf or ewald")
    cells = cell.detach().double()
    if cells.dim() == 2:
        cells = cells.unsqueeze(0).expand(max(1, n_mol), 3, 3)
    if cells.shape[0] < n_mol:
        raise ValueError(f"cell has {cells.shape[0]} entries for {n_mol} molecules")
    volume = torch.linalg.det(cells).abs()
    sizes = torch.bincount(mol_idx, minlength=cells.shape[0])
    flat = volume < 1e-6 * torch.linalg.vector_norm(cells, dim=2).prod(dim=1)
    wrong = (~torch.isfinite(volume)) | flat | (volume * densest < sizes) | (volume == 0.0)
    if bool(wrong.any().item()):
        b = int(torch.nonzero(wrong)[0, 0].item())
        raise ValueError(
            f"the cell of molecule {b} has a volume of {float(volume[b].item())} Å³ for {int(sizes[b].item())} atoms: "
            "its three rows must be lattice vectors in Å that are not in one plane (did an optimisation let it "
            "collapse? are the lengths in nm?)"
        )
    return cells


def _points(
    coord: Tensor, mol_idx: Tensor, cutoff: float, cells: Tensor | None, half: bool, most: float = MAX_IMAGES
) -> _Points:
    """The atoms, moved into their cell, and the images that come within ``cutoff`` of any of them.

    With ``half`` only images whose translation (relative to the cell) is in the upper half-space are made: pairs of
    an atom at home with one of those are all the pairs that are not inside the cell, once each.
    """
    n_atoms = coord.shape[0]
    index = torch.arange(n_atoms, device=coord.device)
    if cells is None:
        return _Points(index, torch.zeros([0, 3], dtype=coord.dtype, device=coord.device), coord)
    inverse = torch.linalg.inv(cells)
    fractional = _rows_times_cells(coord.double(), inverse, mol_idx)
    wraps = torch.floor(fractional)
    fractional = fractional - wraps
    # The distance between lattice planes is one over the length of a reciprocal vector (a column of the inverse).
    reach = cutoff * torch.linalg.vector_norm(inverse, dim=1) * (1.0 + 1e-6) + 1e-9
    low, high = _range_of_each(fractional, mol_idx, cells.shape[0])
    lowest = torch.ceil((low - reach)[mol_idx] - fractional)
    highest = torch.floor((high + reach)[mol_idx] - fractional)
    if half:
        lowest = torch.cat([torch.zeros_like(lowest[:, :1]), lowest[:, 1:]], dim=1)
    per_axis = highest - lowest + 1.0
    needed = float(per_axis.prod(dim=1).sum().item())
    if needed > most + 30.0 * n_atoms:
        raise ValueError(
            f"a cutoff of {cutoff} Å needs {int(needed)} images of the atoms: lattice vectors are "
            "too short or the cell is too flat (take a less skewed cell of the same lattice; did it collapse?)"
        )
    per_axis = per_axis.long()
    per_atom = per_axis.prod(dim=1)
    atom = torch.repeat_interleave(index, per_atom, output_size=int(needed))
    place = torch.arange(atom.shape[0], device=coord.device) - (torch.cumsum(per_atom, 0) - per_atom)[atom]
    n_y, n_z = per_axis[:, 1][atom], per_axis[:, 2][atom]
    image = torch.stack(
        [
            torch.div(place, n_y * n_z, rounding_mode="floor"),
            torch.div(place, n_z, rounding_mode="floor") % n_y,
            place % n_z,
        ],
        dim=1,
    )
    image = image + lowest.long()[atom]
    x, y, z = image[:, 0], image[:, 1], image[:, 2]
    wanted = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
    if not half:
        wanted = (x != 0) | (y != 0) | (z != 0)
    kept = torch.nonzero(wanted).squeeze(1)
    atom = torch.cat([index, atom[kept]])
    translation = torch.cat([torch.zeros_like(wraps), image[kept].double()]) - wraps[atom]
    position = coord.double()[atom] + _rows_times_cells(translation, cells, mol_idx[atom])
    return _Points(atom, translation.to(coord.dtype), position.to(coord.dtype))


def _whole_molecules(mol_idx: Tensor, points: _Points, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries whose candidates are all points of the molecule: (query, start, end), (E,) each."""
    n_atoms = mol_idx.shape[0]
    index = torch.arange(n_atoms, device=mol_idx.device)
    start = index + 1 if half else torch.searchsorted(mol_idx, mol_idx)
    end = torch.searchsorted(mol_idx, mol_idx, right=True)
    if points.atom.shape[0] == n_atoms:
        return index, start, end
    image_of = mol_idx[points.atom[n_atoms:]]
    image_start = torch.searchsorted(image_of, mol_idx) + n_atoms
    image_end = torch.searchsorted(image_of, mol_idx, right=True) + n_atoms
    query = index.unsqueeze(1).expand(n_atoms, 2).reshape(-1)
    start, end = torch.stack([start, image_start], dim=1), torch.stack([end, image_end], dim=1)
    return query, start.reshape(-1), end.reshape(-1)


def _grid(position: Tensor, group: Tensor, n_groups: int, cutoff: float) -> _Grid:
    """Bins of half a cutoff along x and y and an eighth along z.

    They are wider where a molecule is so sparse that the numbers of the bins would not fit into 64 bits.
    """
    low, high = _range_of_each(position, group, n_groups)
    most = math.floor((4.0e18 / max(1, n_groups)) ** (1.0 / 3.0))
    finest = torch.tensor([cutoff / 2.0, cutoff / 2.0, cutoff / 8.0], dtype=torch.float64, device=position.device)
    width = torch.maximum(finest, (high - low) / (most - 1.0))
    shape = torch.floor((high - low) / width).long() + 1
    bins = shape.prod(dim=1)
    last = torch.cumsum(bins, 0)
    return _Grid(low, width, shape, last - bins, int(last[-1].item()))


def _first_places(numbers: Tensor, n_bins: int, wanted: Tensor) -> Tensor:
    """For each of the bins ``wanted``, how many of the sorted bin ``numbers`` are smaller."""
    if n_bins > 16 * numbers.shape[0] + 1024:
        return torch.searchsorted(numbers, wanted)
    table = torch.zeros(n_bins + 1, dtype=torch.long, device=numbers.device)
    table[1:] = torch.cumsum(torch.bincount(numbers, minlength=n_bins), 0)
    return table.index_select(0, wanted.reshape(-1)).reshape(wanted.shape)


def _bin_numbers(position: Tensor, group: Tensor, grid: _Grid) -> Tensor:
    """The bin of each position (G, 3) float64: (G,) int64."""
    place = torch.floor((position - grid.low[group]) / grid.width[group]).long()
    shape = grid.shape[group]
    place = torch.minimum(place.clamp(min=0), shape - 1)
    return grid.first[group] + (place[:, 0] * shape[:, 1] + place[:, 1]) * shape[:, 2] + place[:, 2]


def _column_ranges(
    query: Tensor, group: Tensor, numbers: Tensor, grid: _Grid, cutoff: float, upper: bool
) -> tuple[Tensor, Tensor]:
    """The pieces of the columns around each query that its cutoff sphere can touch.

    Parameters
    ----------
    query : Tensor
        (Q, 3) float64, Å.
    group : Tensor
        (Q,) int64, molecule of the query.
    numbers : Tensor
        (G,) int64, sorted bin numbers of the points.
    grid : _Grid
        The bins.
    cutoff : float
        Å.
    upper : bool
        Only the columns that come after the query's own one, so that each pair of columns is met once; the own
        column is the first of the result.

    Returns
    -------
    start, end : Tensor
        (Q, K) int64, ranges in ``numbers``.
    """
    reach: list[int] = (grid.shape.amax(dim=0) - 1).clamp(max=2).tolist()
    offsets = integer_grid(torch.tensor([reach[0], reach[1], 0], device=query.device))[:, :2]
    if upper:
        offsets = offsets[offsets.shape[0] // 2 :]
    # Distances of the filter are in the dtype of the points: rounding must not hide a bin.
    cutoff_sq = cutoff * cutoff * (1.0 + 1e-5)
    relative = query - grid.low[group]
    width, shape = grid.width[group], grid.shape[group]
    inside = torch.ones([query.shape[0], offsets.shape[0]], dtype=torch.bool, device=query.device)
    height_sq = torch.full([query.shape[0], offsets.shape[0]], cutoff_sq, dtype=query.dtype, device=query.device)
    column = torch.zeros([query.shape[0], offsets.shape[0]], dtype=torch.long, device=query.device)
    for axis in range(2):
        offset = offsets[:, axis]
        x, w = relative[:, axis : axis + 1], width[:, axis : axis + 1]
        place = torch.minimum(torch.floor(x / w).long().clamp(min=0), shape[:, axis : axis + 1] - 1) + offset
        # From the query to the slab of bins: to its lower face if it lies above, to its upper face if below.
        gap = torch.where(offset > 0, place * w - x, x - (place + 1) * w).clamp(min=0.0) * (offset != 0)
        height_sq = height_sq - gap * gap
        inside = inside & (place >= 0) & (place < shape[:, axis : axis + 1])
        column = column * shape[:, axis : axis + 1] + place
    inside = inside & (height_sq >= 0.0)
    height = torch.sqrt(height_sq.clamp(min=0.0))
    z, w, n_z = relative[:, 2:3], width[:, 2:3], shape[:, 2:3]
    bottom = torch.minimum(torch.floor((z - height) / w).long().clamp(min=0), n_z - 1)
    top = torch.minimum(torch.floor((z + height) / w).long().clamp(min=0), n_z - 1)
    column = torch.where(inside, grid.first[group].unsqueeze(1) + column * n_z, 0)
    start = _first_places(numbers, grid.n_bins, torch.where(inside, column + bottom, 0))
    end = _first_places(numbers, grid.n_bins, torch.where(inside, column + top + 1, 0))
    return start, end


def _queries(coord: Tensor, mol_idx: Tensor, cutoff: float, cell: Tensor | None, half: bool, whole: int) -> _Queries:
    """All queries of a system. With ``half`` each unordered pair is met once, else in both orders."""
    _check_coordinates(coord, mol_idx, cutoff)
    n_atoms = coord.shape[0]
    n_mol = int(mol_idx[-1].item()) + 1 if n_atoms > 0 else 0
    cells: Tensor | None = None
    if cell is not None:
        cells = _checked_cells(cell, mol_idx, n_mol, cutoff)
    points = _points(coord, mol_idx, cutoff, cells, half)
    query, start, end = _whole_molecules(mol_idx, points, half)
    n_candidates = int((end - start).sum().item())
    # Sorting, and ranges in 25 columns, cost an atom as much as about 120 distances do.
    if n_atoms == 0 or math.isinf(cutoff) or n_candidates <= 120 * n_atoms + whole:
        return _Queries(points.atom, points.translation, points.position.t().contiguous(), query, start, end)

    position = points.position.double()
    group = mol_idx[points.atom]
    grid = _grid(position, group, n_mol, cutoff)
    numbers = _bin_numbers(position, group, grid)
    if half:
        # Atoms and images are sorted apart: an atom meets the columns after its own, and all columns of images.
        numbers_home, order_home = torch.sort(numbers[:n_atoms])
        numbers_image, order_image = torch.sort(numbers[n_atoms:])
        order = torch.cat([order_home, order_image + n_atoms])
        query = torch.arange(n_atoms, device=coord.device)
        at, of = position[order_home], group[order_home]
        start, end = _column_ranges(at, of, numbers_home, grid, cutoff, True)
        start = torch.cat([torch.maximum(start[:, :1], query.unsqueeze(1) + 1), start[:, 1:]], dim=1)
        if cells is not None:
            start_image, end_image = _column_ranges(at, of, numbers_image, grid, cutoff, False)
            start = torch.cat([start, start_image + n_atoms], dim=1)
            end = torch.cat([end, end_image + n_atoms], dim=1)
    else:
        numbers, order = torch.sort(numbers)
        query = torch.nonzero(order < n_atoms).squeeze(1)
        at, of = position[order[query]], group[order[query]]
        start, end = _column_ranges(at, of, numbers, grid, cutoff, False)
    query = query.unsqueeze(1).expand(start.shape).reshape(-1)
    translation = points.translation if cells is None else points.translation[order]
    sorted_position = points.position[order].t().contiguous()
    return _Queries(points.atom[order], translation, sorted_position, query, start.reshape(-1), end.reshape(-1))


def _blocks(start: Tensor, end: Tensor, candidates: int) -> tuple[list[int], list[int]]:
    """Cut queries into blocks of about so many candidates: bounds of the blocks, and candidates of each."""
    total = torch.cumsum(end - start, 0)
    bounds: list[int] = [0]
    counts: list[int] = []
    n_total = int(total[-1].item()) if total.shape[0] > 0 else 0
    if n_total > 0:
        marks = torch.arange(candidates, n_total + candidates, candidates, device=total.device).clamp(max=n_total)
        last = torch.unique_consecutive(torch.searchsorted(total, marks))
        ends: list[int] = (last + 1).tolist()
        sums: list[int] = total[last].tolist()
        before = 0
        for k in range(len(ends)):
            bounds.append(ends[k])
            counts.append(sums[k] - before)
            before = sums[k]
    return bounds, counts


def _expanded(start: Tensor, end: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """All members of the ranges ``start .. end - 1``: number of the range and member, (total,) each."""
    count = end - start
    which = torch.repeat_interleave(torch.arange(start.shape[0], device=start.device), count, output_size=total)
    member = torch.arange(total, device=start.device) + (start - (torch.cumsum(count, 0) - count)).index_select(
        0, which
    )
    return which, member


def _near_points(queries: _Queries, begin: int, end: int, total: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """Pairs (query, candidate) of points closer than ``cutoff``, of the queries ``begin .. end - 1``."""
    which, other = _expanded(queries.start[begin:end], queries.end[begin:end], total)
    query = queries.query[begin:end].index_select(0, which)
    if math.isinf(cutoff):
        return query, other
    distance_sq = torch.zeros([total], dtype=queries.position.dtype, device=other.device)
    for axis in range(3):
        x = queries.position[axis]
        delta = x.index_select(0, other) - x.index_select(0, query)
        distance_sq += delta * delta
    near = torch.nonzero(distance_sq < cutoff * cutoff).squeeze(1)
    return query.index_select(0, near), other.index_select(0, near)


def _most_neighbors(cutoff: float, densest: float = MAX_DENSITY) -> float:
    """Number of neighbours within ``cutoff`` that no atom can have."""
    return 100.0 + densest * 4.0 / 3.0 * math.pi * cutoff**3


def _too_dense(most: float, cutoff: float) -> str:
    return (
        f"more than {int(most)} neighbours of an atom within {cutoff} Å, a density that no matter has: the atoms or "
        "the cell have collapsed, or lengths are not in Å"
    )


def neighbor_matrix(
    coord: Tensor,
    mol_idx: Tensor,
    cutoff: float,
    cell: Tensor | None = None,
    candidates: int = 262144,
    whole: int = 60000,
) -> tuple[Tensor, Tensor | None]:
    """Neighbours within ``cutoff`` as a matrix, for a batch to which one padding atom is appended.

    The cell may have any shape and may be smaller than the cutoff: an atom then sees its own images.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å, without the padding atom, inside the cell or not.
    mol_idx : Tensor
        (A,) int, sorted.
    cutoff : float
        Å; ``math.inf`` (all atoms of the molecule) only without a cell.
    cell : Tensor, optional
        (3, 3) for all, or (B, 3, 3), Å, rows are lattice vectors.
    candidates : int
        Distances computed at a time.
    whole : int
        Up to so many candidates, and 120 more per atom, molecules are searched as a whole: bins would cost more.

    Returns
    -------
    nbmat : Tensor
        (A + 1, M) int64; unused places, and the last row, hold A, the index of the padding atom.
    shifts : Tensor or None
        (A + 1, M, 3) lattice translations: the vector from i to j is ``coord[j] + shifts @ cell - coord[i]``.
        None without a cell.

    Raises
    ------
    ValueError
        Positions that are not finite, cells that cannot hold the atoms, a cell with an infinite cutoff, more
        neighbours than `MAX_DENSITY` allows.
    """
    coord, mol_idx = coord.detach(), mol_idx.long()
    n_atoms = coord.shape[0]
    queries = _queries(coord, mol_idx, cutoff, cell, False, whole)
    bounds, counts = _blocks(queries.start, queries.end, candidates)
    i_parts = [torch.empty([0], dtype=torch.long, device=coord.device)]
    j_parts = [torch.empty([0], dtype=torch.long, device=coord.device)]
    # A matrix of more would fill any memory, when a simulation has gone wrong.
    most = _most_neighbors(cutoff)
    n_found = 0
    for b in range(len(counts)):
        i, j = _near_points(queries, bounds[b], bounds[b + 1], counts[b], cutoff)
        n_found += i.shape[0]
        if n_found > (most + 1.0) * n_atoms:
            raise ValueError(_too_dense(most, cutoff))
        other = i != j
        i_parts.append(i[other])
        j_parts.append(j[other])
    i_point, j_point = torch.cat(i_parts), torch.cat(j_parts)
    i, j = queries.atom.index_select(0, i_point), queries.atom.index_select(0, j_point)

    # The pairs of an atom follow each other: the column of a pair is its distance from the first of them.
    found, n_of_each = torch.unique_consecutive(i, return_counts=True)
    width = max(1, int(n_of_each.max().item())) if found.shape[0] > 0 else 1
    if width > most:
        raise ValueError(_too_dense(most, cutoff))
    first = torch.repeat_interleave(torch.cumsum(n_of_each, 0) - n_of_each, n_of_each, output_size=i.shape[0])
    place = i * width + torch.arange(i.shape[0], device=i.device) - first
    nbmat = torch.full([(n_atoms + 1) * width], n_atoms, dtype=torch.long, device=coord.device)
    nbmat = nbmat.index_copy(0, place, j).reshape(n_atoms + 1, width)
    if cell is None:
        return nbmat, None
    translation = queries.translation.index_select(0, j_point) - queries.translation.index_select(0, i_point)
    shifts = torch.zeros([(n_atoms + 1) * width, 3], dtype=coord.dtype, device=coord.device)
    return nbmat, shifts.index_copy(0, place, translation).reshape(n_atoms + 1, width, 3)


def _rectangles(first: int, end: int, block_pairs: int, smallest: int) -> list[int]:
    """Rectangles that hold the pairs i < j of the atoms ``first .. end - 1``, three integers each.

    A rectangle has few rows for its columns, so that most of its elements have i < j, unless it is small.
    """
    out: list[int] = []
    while end - first > 1:
        columns = end - first
        rows = columns if columns * columns <= smallest else max(1, min(block_pairs // columns, columns // 4))
        out.extend([first, first + rows, end])
        first += rows
    return out


def pair_search(
    coord: Tensor,
    mol_idx: Tensor,
    cutoff: float,
    cell: Tensor | None = None,
    block_pairs: int = 262144,
    whole: int = 60000,
) -> PairSearch:
    """Prepare the search for all unordered pairs of atoms of the same molecule, in blocks of bounded size.

    A large molecule of which most pairs count becomes rectangles of atoms, everything else lists of pairs.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å, without the padding atom; its graph is not used.
    mol_idx : Tensor
        (A,) int, sorted.
    cutoff : float
        Å; ``math.inf`` (all pairs of a molecule) only without a cell.
    cell : Tensor, optional
        (3, 3) for all, or (B, 3, 3), Å, rows are lattice vectors.
    block_pairs : int
        About how many pairs a block may have.
    whole : int
        Up to so many candidates, and 120 more per atom, molecules are searched as a whole: bins would cost more.

    Returns
    -------
    PairSearch
        For `n_blocks` and `search_block`.

    Raises
    ------
    ValueError
        Positions that are not finite, cells that cannot hold the atoms, a cell with an infinite cutoff.
    """
    coord, mol_idx = coord.detach(), mol_idx.long()
    queries = _queries(coord, mol_idx, cutoff, cell, True, whole)
    start, end = queries.start, queries.end
    rectangles: list[int] = []
    if cell is None and coord.shape[0] >= 400:
        sizes = torch.bincount(mol_idx)
        of = mol_idx[queries.atom[queries.query]]
        candidates = torch.zeros_like(sizes).index_add(0, of, end - start)
        # A pair of a list costs 1.2 to 1.5 times as much as a place of a rectangle (energies with gradients, one core),
        # and columns have few atoms beyond the cutoff once they reach most of the molecule.
        full = (sizes >= 400) & (candidates >= 0.43 * sizes * (sizes - 1))
        last = torch.cumsum(sizes, 0)
        firsts: list[int] = (last - sizes)[full].tolist()
        lasts: list[int] = last[full].tolist()
        for k in range(len(firsts)):
            rectangles.extend(_rectangles(firsts[k], lasts[k], block_pairs, 16384))
        end = torch.where(full[of], start, end)
    candidates_per_block = block_pairs if math.isinf(cutoff) else 2 * block_pairs
    bounds, counts = _blocks(start, end, candidates_per_block)
    return PairSearch(
        cutoff,
        mol_idx,
        queries.atom,
        queries.translation,
        queries.position,
        queries.query,
        start,
        end,
        bounds,
        counts,
        rectangles,
    )


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
        rectangle (i < j, at any distance).
    """
    device = search.position.device
    n_rectangles = len(search.rectangles) // 3
    if k < n_rectangles:
        first, rows_end, columns_end = (
            search.rectangles[3 * k],
            search.rectangles[3 * k + 1],
            search.rectangles[3 * k + 2],
        )
        i = torch.arange(first, rows_end, device=device).unsqueeze(1)
        j = torch.arange(first, columns_end, device=device).unsqueeze(0)
        return i, j, search.translation[:0], i < j
    b = k - n_rectangles
    queries = _Queries(search.atom, search.translation, search.position, search.query, search.start, search.end)
    query, other = _near_points(queries, search.bounds[b], search.bounds[b + 1], search.n_candidates[b], search.cutoff)
    shifts = search.translation
    if shifts.shape[0] > 0:
        shifts = shifts.index_select(0, other) - shifts.index_select(0, query)
    everything = torch.ones([1], dtype=torch.bool, device=device)
    return search.atom.index_select(0, query), search.atom.index_select(0, other), shifts, everything
