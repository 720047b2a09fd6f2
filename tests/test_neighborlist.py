import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aimnet2mult.neighborlist import integer_grid, n_blocks, neighbor_matrix, pair_search, search_block

ase_neighborlist = pytest.importorskip("ase.neighborlist")

CELLS = {
    "cubic": np.eye(3) * 11.0,
    "smaller than the cutoff": np.diag([3.1, 4.0, 3.6]),
    "triclinic": np.array([[6.2, 0.0, 0.0], [3.6, 5.1, 0.0], [-2.4, 1.3, 7.0]]),
    "left-handed": np.array([[0.0, 7.0, 0.0], [6.0, 0.0, 0.0], [0.5, 0.2, 9.0]]),
    "very skew": np.array([[5.0, 0.0, 0.0], [14.0, 5.0, 0.0], [-9.0, 12.0, 6.0]]),
}
METHODS = {"whole molecules": 10**9, "bins": -(10**9)}
every_method = pytest.mark.parametrize("whole", METHODS.values(), ids=METHODS.keys())


@pytest.fixture(scope="module")
def scripted():
    return {f.__name__: torch.jit.script(f) for f in [neighbor_matrix, pair_search, n_blocks, search_block]}


def as_set(i, j, shifts):
    """Ordered pairs (i, j, *shifts) of tensors, none of them twice."""
    rows = torch.cat([i.unsqueeze(1), j.unsqueeze(1), shifts.round().long()], dim=1)
    pairs = set(map(tuple, rows.tolist()))
    assert len(pairs) == rows.shape[0]
    return pairs


def matrix_pairs(nbmat, shifts):
    """What a neighbour matrix holds, after checks of its padding."""
    n_atoms = nbmat.shape[0] - 1
    assert (nbmat[-1] == n_atoms).all()
    used = nbmat < n_atoms
    if n_atoms > 0:
        assert used.sum(1).max() == used.shape[1] or used.shape[1] == 1
    i, column = torch.nonzero(used, as_tuple=True)
    assert shifts is None or (shifts[~used] == 0).all()
    return as_set(i, nbmat[i, column], i.new_zeros(i.shape[0], 0) if shifts is None else shifts[i, column])


def block_pairs(coord, mol_idx, cutoff, cell=None, functions=None, **kwargs):
    """Ordered pairs (both directions) of all blocks, and each block's number of places."""
    f = functions or {g.__name__: g for g in [pair_search, n_blocks, search_block]}
    search = f["pair_search"](coord, mol_idx, cutoff, cell, **kwargs)
    pairs, sizes = set(), []
    for k in range(f["n_blocks"](search)):
        i, j, shifts, mask = f["search_block"](search, k)
        sizes.append(max(i.numel(), j.numel(), mask.numel()))
        if i.dim() == 2:
            assert (i.shape[1], j.shape[0]) == (1, 1)
            counts = mask & (mol_idx[i] == mol_idx[j]) & ((coord[i] - coord[j]).norm(dim=-1) < cutoff)
            i, j = i.expand(mask.shape)[counts], j.expand(mask.shape)[counts]
        else:
            assert mask.tolist() == [True]
        if cell is None:
            assert shifts.shape == (0, 3)
            shifts = coord.new_zeros(len(i), 0)
        for block in [as_set(i, j, shifts), as_set(j, i, -shifts)]:
            assert pairs.isdisjoint(block)
            pairs |= block
    return pairs, sizes


def ase_pairs(coord, cell, cutoff):
    i, j, shifts = ase_neighborlist.primitive_neighbor_list("ijS", [True] * 3, cell, coord, cutoff)
    return {(int(a), int(b), *map(int, s)) for a, b, s in zip(i, j, shifts, strict=True)}


def brute_force(coord, mol_idx, cutoff):
    same = mol_idx[:, None] == mol_idx[None]
    near = (torch.cdist(coord, coord) < cutoff) & same & ~torch.eye(len(coord), dtype=torch.bool)
    return set(map(tuple, torch.nonzero(near).tolist()))


def molecules(sizes, extent, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mol_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    return torch.rand(len(mol_idx), 3, generator=generator, dtype=dtype) * extent, mol_idx


def liquid(n_atoms, seed=0, dtype=torch.float32):
    """Atoms at the density of water (0.1 per Å³) and their cubic cell."""
    rng = np.random.default_rng(seed)
    per_axis, edge = math.ceil(n_atoms ** (1 / 3)), (n_atoms / 0.1) ** (1 / 3)
    sites = integer_grid(torch.tensor([per_axis] * 3)).numpy()
    sites = rng.permutation(sites[(sites >= 0).all(1) & (sites < per_axis).all(1)])[:n_atoms]
    coord = (sites + rng.uniform(-0.3, 0.3, sites.shape)) * edge / per_axis
    return torch.tensor(coord, dtype=dtype), torch.eye(3, dtype=dtype) * edge


@every_method
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
@pytest.mark.parametrize("cutoff", [2.5, 5.03])
def test_crystal_as_in_ase(cell, cutoff, whole):
    rng = np.random.default_rng(1)
    positions = rng.uniform(-1.5, 2.5, (9, 3)) @ cell  # inside the cell and outside
    expected = ase_pairs(positions, cell, cutoff)
    coord, mol_idx, cell = torch.tensor(positions), torch.zeros(9, dtype=torch.long), torch.tensor(cell)
    nbmat, shifts = neighbor_matrix(coord, mol_idx, cutoff, cell, whole=whole)
    assert matrix_pairs(nbmat, shifts) == expected
    assert block_pairs(coord, mol_idx, cutoff, cell, block_pairs=40, whole=whole)[0] == expected
    i, column = torch.nonzero(nbmat < 9, as_tuple=True)
    vectors = coord[nbmat[i, column]] + shifts[i, column] @ cell - coord[i]
    assert (vectors.norm(dim=1) < cutoff).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n_atoms=st.integers(1, 12),
    edge=st.floats(2.5, 12.0),
    cutoff=st.floats(0.5, 8.0),
    skew=st.floats(0.0, 1.5),
    handedness=st.sampled_from([1.0, -1.0]),
    whole=st.sampled_from(list(METHODS.values())),
)
def test_any_crystal_as_in_ase(seed, n_atoms, edge, cutoff, skew, handedness, whole):
    rng = np.random.default_rng(seed)
    cell = (
        edge
        * (np.eye(3) + skew * np.tril(rng.uniform(-1.0, 1.0, (3, 3)), -1))
        @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    )
    cell[0] *= handedness
    positions = rng.uniform(-2.0, 3.0, (n_atoms, 3)) @ cell
    # A pair exactly at the cutoff is in or out by rounding.
    assume(ase_pairs(positions, cell, cutoff - 1e-6) == ase_pairs(positions, cell, cutoff + 1e-6))
    expected = ase_pairs(positions, cell, cutoff)
    arguments = torch.tensor(positions), torch.zeros(n_atoms, dtype=torch.long), cutoff, torch.tensor(cell)
    assert matrix_pairs(*neighbor_matrix(*arguments, whole=whole)) == expected
    assert block_pairs(*arguments, block_pairs=100, whole=whole)[0] == expected


@every_method
@pytest.mark.parametrize("cutoff", [3.0, math.inf])
@pytest.mark.parametrize("extent", [1e-3, 6.0, 30.0, 1e7], ids=["point", "dense", "dilute", "gas"])
def test_molecules_against_brute_force(cutoff, extent, whole):
    coord, mol_idx = molecules([1, 5, 2, 0, 40, 1, 7, 300, 12], extent)
    expected = brute_force(coord, mol_idx, cutoff)
    # Few candidates at a time, so that blocks begin in one molecule and end in another.
    nbmat, shifts = neighbor_matrix(coord, mol_idx, cutoff, candidates=2000, whole=whole)
    assert shifts is None
    assert matrix_pairs(nbmat, shifts) == expected
    pairs, sizes = block_pairs(coord, mol_idx, cutoff, block_pairs=2000, whole=whole)
    assert pairs == expected
    assert len(sizes) > 1 or len(pairs) < 2000


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 30), max_size=8),
    seed=st.integers(0, 10**6),
    extent=st.sampled_from([0.0, 3.0, 20.0, 1e5]),
    cutoff=st.floats(0.1, 12.0),
    whole=st.sampled_from(list(METHODS.values())),
)
def test_any_molecules_against_brute_force(sizes, seed, extent, cutoff, whole):
    coord, mol_idx = molecules(sizes, extent, seed)
    expected = brute_force(coord, mol_idx, cutoff)
    assert matrix_pairs(*neighbor_matrix(coord, mol_idx, cutoff, whole=whole)) == expected
    assert block_pairs(coord, mol_idx, cutoff, block_pairs=50, whole=whole)[0] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("periodic", [False, True])
def test_scripted_as_eager_without_an_option(periodic, dtype, scripted):
    coord, cell = liquid(700, dtype=dtype)
    coord, cell = coord * 1.001 - 5.0, (cell if periodic else None)
    mol_idx = torch.repeat_interleave(torch.arange(2), torch.tensor([20, 680]))
    expected = matrix_pairs(*neighbor_matrix(coord, mol_idx, 5.0, cell))
    assert matrix_pairs(*scripted["neighbor_matrix"](coord, mol_idx, 5.0, cell)) == expected
    assert block_pairs(coord, mol_idx, 5.0, cell)[0] == expected
    for _ in range(3):  # the executor changes its mind after the first calls
        assert block_pairs(coord, mol_idx, 5.0, cell, scripted, block_pairs=5000)[0] == expected
    if not periodic:
        assert expected == brute_force(coord, mol_idx, 5.0)


def test_large_crystal_as_in_ase():
    coord, cell = liquid(600, dtype=torch.float64)
    expected = ase_pairs(coord.numpy(), cell.numpy(), 5.0)
    mol_idx = torch.zeros(600, dtype=torch.long)
    assert matrix_pairs(*neighbor_matrix(coord, mol_idx, 5.0, cell)) == expected
    assert block_pairs(coord, mol_idx, 5.0, cell)[0] == expected


@every_method
def test_molecule_in_a_huge_cell_has_no_images(whole):
    coord, _ = liquid(200, dtype=torch.float64)
    mol_idx = torch.zeros(200, dtype=torch.long)
    inside = coord + 40.0  # centred, away from the faces
    nbmat, shifts = neighbor_matrix(inside, mol_idx, 5.0, torch.eye(3).double() * 100.0, whole=whole)
    assert (shifts == 0).all()
    assert matrix_pairs(nbmat, None) == brute_force(coord, mol_idx, 5.0)


@every_method
def test_each_molecule_of_a_batch_has_its_own_cell(whole):
    coord, mol_idx = molecules([4, 1, 0, 9], 6.0)
    cells = torch.tensor(np.stack([CELLS["triclinic"], np.eye(3) * 4.0, np.eye(3), CELLS["left-handed"]]))
    expected = set()
    for b in range(4):
        first = int((mol_idx < b).sum())
        pairs = ase_pairs(coord[mol_idx == b].numpy(), cells[b].numpy(), 5.0)
        expected |= {(i + first, j + first, *s) for i, j, *s in pairs}
    assert matrix_pairs(*neighbor_matrix(coord, mol_idx, 5.0, cells, whole=whole)) == expected
    assert block_pairs(coord, mol_idx, 5.0, cells, block_pairs=100, whole=whole)[0] == expected


def test_blocks_of_a_large_molecule_are_rectangles_that_waste_little():
    coord, mol_idx = liquid(1500)[0], torch.zeros(1500, dtype=torch.long)
    search = pair_search(coord, mol_idx, math.inf, block_pairs=2**16)
    places = useful = 0
    for k in range(n_blocks(search)):
        i, _, _, mask = search_block(search, k)
        assert i.dim() == 2
        assert mask.numel() <= 2**16
        places, useful = places + mask.numel(), useful + int(mask.sum())
    assert useful == 1500 * 1499 // 2
    assert places < 1.15 * useful


def test_many_small_molecules_share_blocks_without_waste():
    coord, mol_idx = molecules([20] * 2000, 6.0)
    search = pair_search(coord, mol_idx, math.inf, block_pairs=2**16)
    sizes = [search_block(search, k)[0].shape[0] for k in range(n_blocks(search))]
    assert sum(sizes) == 2000 * 190
    assert len(sizes) == math.ceil(sum(sizes) / 2**16)


@pytest.mark.parametrize("cutoff", [5.0, 12.0])
@pytest.mark.parametrize("periodic", [False, True])
def test_memory_is_linear(cutoff, periodic):
    """Blocks keep their size, and what is kept between them grows like the number of atoms (and their images)."""
    block = 2**15
    for n_atoms in [1000, 4000]:
        coord, cell = liquid(n_atoms)
        search = pair_search(coord, torch.zeros(n_atoms).long(), cutoff, cell if periodic else None, block)
        # Half of the shell of images around the cell, and up to 13 + 25 columns for an atom.
        edge = float(cell[0, 0])
        images = n_atoms * ((1 + 2 * cutoff / edge) ** 3 - 1) / 2 if periodic else 0
        assert search.position.shape[1] < 1.1 * (n_atoms + images) + 500
        assert search.query.shape[0] <= n_atoms * (38 if periodic else 13)
        assert max(search.n_candidates, default=0) < 2 * block + n_atoms
        lengths = [search_block(search, k) for k in range(min(4, n_blocks(search)))]
        assert all(max(mask.numel(), i.shape[0]) <= 1.5 * block for i, _, _, mask in lengths)


def test_candidates_are_few():
    """The cell list looks at fewer than three places for each pair that it finds."""
    coord, cell = liquid(3000)
    search = pair_search(coord, torch.zeros(3000).long(), 8.0, cell)
    found = sum(search_block(search, k)[0].shape[0] for k in range(n_blocks(search)))
    assert sum(search.n_candidates) < 3 * found


@every_method
@pytest.mark.parametrize("cell", [None, torch.eye(3) * 7.0])
def test_no_atoms_and_one_atom(cell, whole):
    none, one = torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    nbmat, _ = neighbor_matrix(torch.zeros(0, 3), none, 5.0, cell, whole=whole)
    assert nbmat.tolist() == [[0]]
    assert n_blocks(pair_search(torch.zeros(0, 3), none, 5.0, cell, whole=whole)) == 0
    nbmat, _ = neighbor_matrix(torch.zeros(1, 3), one, 5.0, cell, whole=whole)
    assert nbmat.tolist() == [[1], [1]]
    assert block_pairs(torch.zeros(1, 3), one, 5.0, cell, whole=whole)[0] == set()
    expected = 6 if cell is not None else 0
    assert len(block_pairs(torch.zeros(1, 3), one, 8.0, cell, whole=whole)[0]) == expected


@every_method
def test_atoms_at_one_place_are_neighbours(whole):
    nbmat, _ = neighbor_matrix(torch.ones(3, 3), torch.tensor([0, 0, 1]), 1.0, whole=whole)
    assert nbmat.tolist() == [[1], [0], [3], [3]]


def test_graph_and_input_are_left_alone():
    coord, cell = liquid(50)
    coord.requires_grad_(True)
    cell.requires_grad_(True)
    before = coord.detach().clone()
    mol_idx = torch.zeros(50, dtype=torch.int32)
    nbmat, shifts = neighbor_matrix(coord, mol_idx, 5.0, cell)
    assert nbmat.dtype == torch.int64
    assert shifts.dtype == coord.dtype
    assert not shifts.requires_grad
    search = pair_search(coord, mol_idx, 5.0, cell)
    assert not search_block(search, 0)[2].requires_grad
    assert torch.equal(coord.detach(), before)


@pytest.mark.parametrize("function", [neighbor_matrix, pair_search])
def test_errors_name_the_molecule(function):
    coord, mol_idx = molecules([3, 3], 4.0)
    good, flat = torch.eye(3).double() * 8.0, torch.eye(3).double() * 8.0
    flat[2] = flat[1]
    for wrong in [flat, flat * math.nan, flat * 0.0, good * 1e-3, torch.diag(torch.tensor([8.0, 8.0, 1e-9])).double()]:
        with pytest.raises(ValueError, match=r"the cell of molecule 1 has a volume of .* lattice vectors in Å"):
            function(coord, mol_idx, 3.0, torch.stack([good, wrong]))
    with pytest.raises(ValueError, match="finite long-range cutoff"):
        function(coord, mol_idx, math.inf, good)
    with pytest.raises(ValueError, match="cell has 1 entries for 2 molecules"):
        function(coord, mol_idx, 3.0, good.unsqueeze(0))
    with pytest.raises(ValueError, match="must be positive"):
        function(coord, mol_idx, 0.0)
    with pytest.raises(ValueError, match="images of the atoms"):
        function(coord, mol_idx, 1e5, good)
    coord[4, 1] = math.nan
    with pytest.raises(ValueError, match=r"coord of molecule 1 is not finite \(atom 4 of the batch\)"):
        function(coord, mol_idx, 3.0)


@pytest.mark.parametrize("where", ["molecule", "one molecule of two", "crystal"])
def test_collapsed_matter_is_refused_before_it_fills_the_memory(where):
    ball = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)).double() * 0.5
    mol_idx, cell = torch.zeros(3000, dtype=torch.long), None
    if where == "one molecule of two":
        sparse = torch.cartesian_prod(*[torch.arange(16.0).double()] * 3) * 4.0
        ball, mol_idx = torch.cat([ball, sparse]), torch.cat([mol_idx, torch.ones(len(sparse), dtype=torch.long)])
    elif where == "crystal":
        cell = torch.eye(3).double() * 20.0
    with pytest.raises(ValueError, match=r"more than 2717 neighbours of an atom within 5.0 Å.* have collapsed"):
        neighbor_matrix(ball, mol_idx, 5.0, cell)


@pytest.mark.parametrize("edge", [0.01, 0.1, 0.5])
def test_collapsed_cells_are_refused_whatever_the_cutoff(edge):
    atom, mol_idx = torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
    for lengths in [(edge, edge, edge), (edge, 1.0, 0.1 / edge)]:
        with pytest.raises(ValueError, match=r"volume of .* for 1 atoms: .* let it collapse"):
            pair_search(atom, mol_idx, 31.75, torch.diag(torch.tensor(lengths)))
    # The densest that is allowed, 0.2 Å³ for an atom, and layers of it that are close: as many images as are needed.
    for lengths in [(0.6, 0.6, 0.6), (0.05, 2.0, 2.1)]:
        found = pair_search(atom, mol_idx, 10.0, torch.diag(torch.tensor(lengths)))
        assert sum(search_block(found, k)[0].shape[0] for k in range(n_blocks(found))) > 9000


def test_integer_grid():
    assert integer_grid(torch.tensor([1, 0, 2])).shape == (15, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_method
@pytest.mark.parametrize("periodic", [False, True])
def test_cuda_as_cpu(periodic, whole):
    coord, cell = liquid(700, dtype=torch.float64)
    mol_idx = torch.repeat_interleave(torch.arange(2), torch.tensor([50, 650]))
    cell = cell if periodic else None
    expected = matrix_pairs(*neighbor_matrix(coord, mol_idx, 5.0, cell, whole=whole))
    moved = coord.cuda(), mol_idx.cuda(), 5.0, cell.cuda() if cell is not None else None
    assert matrix_pairs(*neighbor_matrix(*moved, whole=whole)) == expected
    assert block_pairs(*moved, block_pairs=5000, whole=whole)[0] == expected
