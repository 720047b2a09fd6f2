import math

import numpy as np
import pytest
import torch

from aimnet2mult.neighborlist import integer_grid, molecule_pairs, neighbor_matrix, periodic_pairs

ase_neighborlist = pytest.importorskip("ase.neighborlist")

CELLS = {
    "cubic": np.eye(3) * 11.0,
    "smaller than the cutoff": np.diag([3.1, 4.0, 3.6]),
    "triclinic": np.array([[6.2, 0.0, 0.0], [3.6, 5.1, 0.0], [-2.4, 1.3, 7.0]]),
    "left-handed": np.array([[0.0, 7.0, 0.0], [6.0, 0.0, 0.0], [0.5, 0.2, 9.0]]),
    "very skew": np.array([[5.0, 0.0, 0.0], [14.0, 5.0, 0.0], [-9.0, 12.0, 6.0]]),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
@pytest.mark.parametrize("cutoff", [2.5, 5.0])
def test_crystal_as_in_ase(cell, cutoff):
    rng = np.random.default_rng(1)
    coord = rng.uniform(-1.5, 2.5, (9, 3)) @ cell  # inside the cell and outside
    i, j, shifts = periodic_pairs(torch.tensor(coord), torch.tensor(cell), cutoff)
    found = {
        (a, b, *s) for a, b, s in zip(i.tolist(), j.tolist(), shifts.long().tolist(), strict=True) for s in [tuple(s)]
    }
    expected = ase_neighborlist.primitive_neighbor_list("ijS", [True] * 3, cell, coord, cutoff)
    assert found == {(int(a), int(b), *map(int, s)) for a, b, s in zip(*expected, strict=True)}
    assert len(found) == len(i)
    vectors = torch.tensor(coord)[j] + shifts @ torch.tensor(cell) - torch.tensor(coord)[i]
    assert (vectors.norm(dim=1) < cutoff).all()


@pytest.mark.parametrize("cutoff", [3.0, math.inf])
def test_molecules_against_brute_force(cutoff, monkeypatch):
    import aimnet2mult.neighborlist as module

    # Small blocks, so that some begin in one molecule and end in another.
    monkeypatch.setattr(module, "_block_rows", lambda n_columns: 3)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 5, 2, 40, 1, 7]
    mol_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    coord = torch.rand(len(mol_idx), 3, generator=generator) * 6
    i, j = molecule_pairs(coord, mol_idx, cutoff)
    near = (torch.cdist(coord, coord) < cutoff) & (mol_idx[:, None] == mol_idx[None]) & ~torch.eye(len(coord)).bool()
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == set(map(tuple, torch.nonzero(near).tolist()))
    assert (i[1:] >= i[:-1]).all()


def test_matrix_holds_the_pairs_and_the_padding_row():
    generator = torch.Generator().manual_seed(0)
    coord = torch.rand(30, 3, generator=generator) * 5
    mol_idx = torch.repeat_interleave(torch.arange(3), 10)
    nbmat, shifts = neighbor_matrix(coord, mol_idx, 2.0)
    assert shifts is None
    i, j = molecule_pairs(coord, mol_idx, 2.0)
    rows, columns = torch.nonzero(nbmat < 30, as_tuple=True)
    assert (rows == i).all()
    assert (nbmat[rows, columns] == j).all()
    assert (nbmat[-1] == 30).all()


def test_each_molecule_of_a_batch_has_its_own_cell():
    coord = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    cells = torch.stack([torch.eye(3) * 3.0, torch.eye(3) * 4.0])
    nbmat, shifts = neighbor_matrix(coord, torch.tensor([0, 1]), 3.5, cells)
    assert ((nbmat[:2] < 2).sum(1) == torch.tensor([6, 0])).all()
    assert shifts is not None
    assert shifts.shape == (*nbmat.shape, 3)


def test_infinite_cutoff_needs_molecules():
    with pytest.raises(ValueError, match="finite long-range cutoff"):
        neighbor_matrix(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), math.inf, torch.eye(3))


def test_integer_grid():
    assert integer_grid(torch.tensor([1, 0, 2])).shape == (15, 3)


def test_isolated_atoms_have_no_neighbours():
    nbmat, _ = neighbor_matrix(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), 5.0)
    assert nbmat.tolist() == [[1], [1]]
