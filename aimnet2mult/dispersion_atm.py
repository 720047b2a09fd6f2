"""The three-body (Axilrod-Teller-Muto) energy of triangles of atoms, in blocks.

    E = Σ_{i<j<k} √(C6_ij C6_ik C6_jk) (1 + 3 cos θ_i cos θ_j cos θ_k) / (r_ij r_ik r_jk)³ · f,
    f = 1 / (1 + 6 (R_ij R_ik R_jk / (r_ij r_ik r_jk))^{16/3}),

with angles θ of the triangle and the damping of S. Grimme, J. Antony, S. Ehrlich, H. Krieg, J. Chem. Phys. 132,
154104 (2010), doi:10.1063/1.3382344, equations 9 to 11. Both factors but for the angles are products over the sides.

Triangles are found through their first corner: points (atoms and their images) are put in an order that does not
depend on where the crystal's origin is, so that each triangle has one corner before the other two, and is counted
once, with that corner at home. The neighbours after a corner are its *later* neighbours; triangles are the pairs of
them. Everything is in atomic units.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aimnet2mult import nbops


class Sides(NamedTuple):
    """Sides from each atom to its later neighbours, sorted by the atom. One place at the end is padding.

    Attributes
    ----------
    i, j
        (P + 1,) int64: atoms of the flattened batch.
    r_ij
        (3, P + 1) r_j - r_i, Bohr.
    first, number
        For each atom of the flattened batch, its first side and how many there are.
    """

    i: Tensor
    j: Tensor
    r_ij: Tensor
    first: list[int]
    number: list[int]


class Triangles(NamedTuple):
    """Some triangles: of C first corners i, each with J later neighbours j and K later neighbours k.

    Attributes
    ----------
    side_j, side_k
        (C, J) and (C, K) int64 places in `Sides`.
    exists
        (C, J, K) bool: there are such neighbours, and j comes before k.
    """

    side_j: Tensor
    side_k: Tensor
    exists: Tensor


class TripleSums(NamedTuple):
    """Derivatives of the energy of some triangles.

    Attributes
    ----------
    energy
        (C,) float64, by the first corner.
    of_j, of_k
        (3, C, J), (3, C, K): by the vectors from the first corner.
    h_ij, h_ik, h_jk
        (C, J), (C, K), (C, J, K): by the C6 of the sides.
    """

    energy: Tensor
    of_j: Tensor
    of_k: Tensor
    h_ij: Tensor
    h_ik: Tensor
    h_jk: Tensor


def later_sides(block: nbops.PairBlock, near: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a block as sides from an atom to a later neighbour: i (P,), j (P,), r_ij (3, P) in Å.

    An atom is before those of higher index and before its own images with a positive translation, in lexicographic
    order. Blocks that hold each pair in both orders lose one of the two, in others the vector may be turned round.
    """
    place = torch.nonzero(near.expand(block.d_ij.shape).flatten()).squeeze(1)
    i = block.i.expand(block.d_ij.shape).flatten()[place]
    j = block.j.expand(block.d_ij.shape).flatten()[place]
    r_ij = block.r_ij.flatten(1)[:, place]
    later = i < j
    if "cell" in data:
        # The vector between images of an atom is a lattice vector.
        inverse = torch.linalg.inv(data["cell"].detach().double())[data["mol_idx"][i]]
        steps = torch.bmm(r_ij.detach().double().t().unsqueeze(1), inverse).squeeze(1).round()
        sign = torch.where(steps[:, 0] != 0, steps[:, 0], torch.where(steps[:, 1] != 0, steps[:, 1], steps[:, 2]))
        later = later | ((i == j) & (sign > 0))
    if block.weight == 1.0:
        turn = torch.where(later, 1.0, -1.0).to(r_ij.dtype)
        return torch.where(later, i, j), torch.where(later, j, i), r_ij * turn
    return i[later], j[later], r_ij[:, later]


def sorted_sides(i: Tensor, j: Tensor, r_ij: Tensor, n_atoms: int, bohr: float) -> Sides:
    """Sort sides (r_ij in Å) by their first atom, and count them; the counts are read from the device."""
    order = torch.argsort(i, stable=True)
    count = torch.bincount(i, minlength=n_atoms)
    first: list[int] = (torch.cumsum(count, 0) - count).tolist()
    counts: list[int] = count.tolist()
    i, j = torch.nn.functional.pad(i[order], [0, 1]), torch.nn.functional.pad(j[order], [0, 1])
    # The padding side is long and not zero, so that every function of it is finite.
    return Sides(i, j, torch.nn.functional.pad(r_ij[:, order] / bohr, [0, 1], value=100.0), first, counts)


def triangle_blocks(sides: Sides, most: int) -> list[list[int]]:
    """Cut the triangles into blocks of at most about ``most``: first and end of the corners, of the places of j.

    A corner with many neighbours is cut by j, corners with few are taken together.
    """
    blocks: list[list[int]] = []
    corner, n_corners = 0, len(sides.number)
    while corner < n_corners:
        width = sides.number[corner]
        if width * width > most:
            rows = max(1, most // width)
            for begin in range(0, width - 1, rows):
                blocks.append([corner, corner + 1, begin, min(begin + rows, width)])
            corner += 1
            continue
        end = corner + 1
        while end < n_corners:
            wider = max(width, sides.number[end])
            if wider * wider * (end + 1 - corner) > most:
                break
            width = wider
            end += 1
        if width > 1:
            blocks.append([corner, end, 0, width])
        corner = end
    return blocks


def triangles(sides: Sides, block: list[int]) -> Triangles:
    """Triangles of a block made by `triangle_blocks`."""
    device = sides.i.device
    first = torch.tensor(sides.first[block[0] : block[1]], dtype=torch.long, device=device).unsqueeze(1)
    count = torch.tensor(sides.number[block[0] : block[1]], dtype=torch.long, device=device).unsqueeze(1)
    longest = max(sides.number[block[0] : block[1]])
    padding = sides.i.shape[0] - 1
    j = torch.arange(block[2], block[3], device=device)
    k = torch.arange(block[2], longest, device=device)
    side_j = torch.where(j < count, first + j, padding)
    side_k = torch.where(k < count, first + k, padding)
    exists = (j.unsqueeze(1) < k).unsqueeze(0) & (k < count).unsqueeze(1)
    return Triangles(side_j, side_k, exists)


def side_values(x: Tensor, places: Tensor) -> Tensor:
    """Columns of (..., P) at the places (C, J): (..., C, J)."""
    return x.index_select(-1, places.flatten()).view(x.shape[:-1] + places.shape)


def squared_sides(r_j: Tensor, r_k: Tensor, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squares of the sides ij (C, J, 1), ik (C, 1, K) and jk (C, J, K) of triangles with corners at r_j, r_k and 0.

    Where there is no triangle, jk is longer by 1, so that it is not zero.
    """
    r_jk = r_k.unsqueeze(2) - r_j.unsqueeze(3)
    z = r_jk.square().sum(dim=0) + (~exists).to(r_j.dtype)
    return r_j.square().sum(dim=0).unsqueeze(2), r_k.square().sum(dim=0).unsqueeze(1), z


def triple_energy(x: Tensor, y: Tensor, z: Tensor, c6: Tensor, damping: Tensor) -> Tensor:
    """Energies of triangles (equation in the module docstring).

    Parameters
    ----------
    x, y, z : Tensor
        Squares of the sides, broadcast against each other, a0².
    c6 : Tensor
        Product of the C6 of the three sides, Eh³·a0¹⁸.
    damping : Tensor
        Product of R^{16/3} of the three sides, a0¹⁶.

    Returns
    -------
    Tensor
        Hartree.
    """
    product = x * y * z
    angles = 1.0 + 0.375 * (x + z - y) * (x + y - z) * (y + z - x) / product
    return c6.sqrt() * product.pow(-1.5) * angles / (1.0 + 6.0 * damping * product.pow(-8.0 / 3.0))


def triple_derivatives(
    r_j: Tensor,
    r_k: Tensor,
    counted: Tensor,
    c6: tuple[Tensor, Tensor, Tensor],
    damping: Tensor,
    squares: tuple[Tensor, Tensor, Tensor],
    smallest: float = 1e-30,
) -> TripleSums:
    """Energy of triangles and its first derivatives, written out. Keeps no graph.

    With A the factor of the angles and p q s the product of its three brackets, x ∂A/∂x = 3/8 (x (q s + p s - p q) -
    p q s) / (x y z), where s is the bracket with -x; the damping has x ∂ln f/∂x = 8/3 (1 - f), the rest -3/2.

    Parameters
    ----------
    r_j, r_k : Tensor
        (3, C, J), (3, C, K): from the first corner, Bohr.
    counted : Tensor
        (C, J, K) one for triangles, else zero.
    c6 : tuple of Tensor
        C6 of the sides, shapes (C, J, 1), (C, 1, K), (C, J, K), Eh·a0⁶.
    damping : Tensor
        (C, J, K) as in `triple_energy`.
    squares : tuple of Tensor
        Squares of the sides, shapes as ``c6``, a0².
    smallest : float
        Added to C6 before it divides.

    Returns
    -------
    TripleSums
        In Hartree and Bohr.
    """
    x, y, z = squares
    product = (x * y) * z
    log = product.log()
    f = torch.exp(log * (-8.0 / 3.0)).mul_(6.0 * damping).add_(1.0).reciprocal_()
    strength = ((c6[0] * c6[1]) * c6[2]).sqrt_().mul_(torch.exp(log.mul_(-1.5))).mul_(f).mul_(counted)
    p, q, s = x + z - y, x + y - z, y + z - x
    pq, ps, qs = p * q, p * s, q * s
    pqs = pq * s
    unit = strength * 0.375 / product
    energy = strength + unit * pqs
    # What the sides have in common, then each.
    common = energy * (7.0 / 6.0 - 8.0 / 3.0 * f) - unit * pqs
    of_x = common + unit * x * (qs + ps - pq)
    of_y = common + unit * y * (pq + ps - qs)
    of_z = common + unit * z * (qs + pq - ps)

    along = of_z.mul_(2.0).div_(z)
    along_j, along_k = 2.0 * of_x.sum(dim=2) / x.squeeze(2), 2.0 * of_y.sum(dim=1) / y.squeeze(1)
    j, k = r_j.permute(1, 2, 0), r_k.permute(1, 2, 0)
    of_j = r_j * (along_j + along.sum(dim=2)) - (along @ k).permute(2, 0, 1)
    of_k = r_k * (along_k + along.sum(dim=1)) - (along.transpose(1, 2) @ j).permute(2, 0, 1)
    half = 0.5 * energy
    # C6 of padding is zero; so is the energy.
    h_ij = half.sum(dim=2) / (c6[0].squeeze(2) + smallest)
    h_ik = half.sum(dim=1) / (c6[1].squeeze(1) + smallest)
    return TripleSums(energy.sum(dim=[1, 2], dtype=torch.float64), of_j, of_k, h_ij, h_ik, half / (c6[2] + smallest))
