"""The Ewald sum: Coulomb energy of point charges in a crystal, without a cutoff in effect.

The lattice sum Σ q_i q_j / r is split by a width α into a part that decays fast in real space, erfc(αr)/r, and one
that is smooth and decays fast in reciprocal space (Ewald, 10.1002/andp.19213690304; Frenkel and Smit, Understanding
Molecular Simulation, chapter 12). Here are the choice of α and everything but the real-space sum over pairs:

    E = Σ_k 4π/V exp(-k²/4α²)/k² |S(k)|² - α/√π Σ q² - π Q²/(2Vα²),   S(k) = Σ_i q_i exp(i k·r_i)

over half of the reciprocal lattice. The last term is the uniform background that neutralises a charged cell; tin-foil
boundary conditions (no dipole term).

A phase is a product of three, exp(i k·r) = Π_x exp(2πi h_x s_x) with s the fractional coordinates, so that the sum
over atoms for all h_3 at once is a matrix product. With α chosen by `ewald_alpha` the work grows as N^1.5; forces of
10,000 atoms of water take about a second on one core, so that there is no mesh (PME).
"""

import math

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**18
"""Complex numbers (atoms times columns of k vectors) in memory at a time, 16 bytes each."""


def ewald_width(accuracy: float) -> float:
    """The product w = α·r_c at which exp(-w²) is ``accuracy``, the relative size of the terms that are left out."""
    return math.sqrt(-math.log(accuracy))


def ewald_alpha(volume: Tensor, n_atoms: Tensor, cost_ratio: float = 0.01) -> Tensor:
    """Width α that makes the sum cheapest: √π (N/(τV²))^(1/6), after Perram et al. (10.1080/00268978800101471).

    With the cutoffs r_c = w/α and k_c = 2wα, real space has (2π/3) N²/V r_c³ pairs and reciprocal space
    N V k_c³/(12π²) terms. Where both cost the same, each is proportional to N^1.5.

    Parameters
    ----------
    volume, n_atoms : Tensor
        Å³ and number of atoms of each crystal, (B,).
    cost_ratio : float
        τ, time of a term in reciprocal space over that of a pair in real space.

    Returns
    -------
    Tensor
        (B,), 1/Å.
    """
    return math.sqrt(math.pi) * (n_atoms.clamp(min=1) / (cost_ratio * volume * volume)).pow(1.0 / 6.0)


def reciprocal_weights(cell: Tensor, alpha: float, k_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights 4π/V exp(-k²/4α²)/k² of the reciprocal lattice, one of each pair ±k, zero beyond ``k_max``.

    Parameters
    ----------
    cell : Tensor
        (3, 3), Å, rows are lattice vectors, float64.
    alpha, k_max : float
        1/Å.

    Returns
    -------
    columns : Tensor
        (M, 2) int64, the first two indices of the vectors.
    h_3 : Tensor
        (L,) int64, the third index, the same for all.
    weights : Tensor
        (M, L), Å, with the graph of ``cell``.
    """
    device = cell.device
    limits = torch.floor(k_max * torch.linalg.vector_norm(cell.detach(), dim=1) / (2.0 * math.pi))
    n: list[int] = limits.long().tolist()
    h_1 = torch.arange(0, n[0] + 1, device=device)
    h_2 = torch.arange(-n[1], n[1] + 1, device=device)
    h_3 = torch.arange(-n[2], n[2] + 1, device=device)
    columns = torch.cartesian_prod(h_1, h_2)
    columns = columns[(columns[:, 0] > 0) | (columns[:, 1] >= 0)]

    basis = 2.0 * math.pi * torch.linalg.inv(cell).t()
    k = (columns.to(cell.dtype) @ basis[:2]).unsqueeze(1) + h_3.to(cell.dtype).unsqueeze(1) * basis[2]
    k_squared = k.square().sum(dim=-1)
    first = (columns == 0).all(dim=1, keepdim=True)
    counted = (k_squared <= k_max * k_max) & (~first | (h_3 > 0))
    kept = torch.nonzero(counted.any(dim=1)).squeeze(1)
    columns, counted = columns[kept], counted[kept]
    # Replace the argument, not the result: 1/k² at k = 0 has no derivative, masked afterwards or not.
    k_squared = torch.where(counted, k_squared[kept], torch.ones_like(k_squared[kept]))
    weights = torch.exp(-k_squared / (4.0 * alpha * alpha)) / k_squared
    volume = torch.abs(torch.linalg.det(cell))
    return columns, h_3, torch.where(counted, 4.0 * math.pi / volume * weights, torch.zeros_like(weights))


def _phases(angle: Tensor, h: Tensor) -> Tensor:
    """Complex exp(i h θ), (A, H), of angles (A,) and indices (H,)."""
    x = angle.unsqueeze(1) * h.to(angle.dtype)
    return torch.complex(torch.cos(x), torch.sin(x))


def reciprocal_energy(
    coord: Tensor,
    q: Tensor,
    cell: Tensor,
    alpha: float,
    k_max: float,
    first_order: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Reciprocal part of the Ewald sum of one crystal, without self and background terms.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å.
    q : Tensor
        (A,), e.
    cell : Tensor
        (3, 3), Å, rows are lattice vectors.
    alpha, k_max : float
        1/Å.
    first_order : bool
        Only first derivatives are wanted: they are computed chunk by chunk, so that memory stays linear.
    chunk_elements : int
        Complex numbers (atoms times columns of k vectors) in memory at a time.

    Returns
    -------
    Tensor
        Scalar, float64, e²/Å.
    """
    cell, q = cell.double(), q.double()
    fractional = coord.double() @ torch.linalg.inv(cell)
    columns, h_3, weights = reciprocal_weights(cell, alpha, k_max)
    charge, place = q, fractional
    if first_order:
        charge, place = q.detach(), fractional.detach()
    angle = 2.0 * math.pi * place
    # Tables over 0 .. h_max and -h_max .. h_max, looked up by column; their length has to be known on the host.
    h_2_max = int(columns[:, 1].abs().max().item()) if columns.shape[0] > 0 else 0
    h_1_max = int(columns[:, 0].max().item()) if columns.shape[0] > 0 else 0
    phases_1 = _phases(angle[:, 0], torch.arange(h_1_max + 1, device=q.device))
    phases_2 = _phases(angle[:, 1], torch.arange(-h_2_max, h_2_max + 1, device=q.device))
    phases_3 = _phases(angle[:, 2], h_3)
    complex_charge = torch.complex(charge, torch.zeros_like(charge)).unsqueeze(1)
    phases_3_slope = phases_3 * h_3

    energy = torch.zeros([], dtype=torch.float64, device=q.device)
    potential = torch.zeros_like(q.detach())
    gradient = torch.zeros_like(fractional.detach())
    size = max(1, chunk_elements // max(1, coord.shape[0]))
    for begin in range(0, columns.shape[0], size):
        h = columns[begin : begin + size]
        weight = weights[begin : begin + size]
        phases_12 = phases_1.index_select(1, h[:, 0]) * phases_2.index_select(1, h[:, 1] + h_2_max)
        structure = (complex_charge * phases_12).t() @ phases_3
        energy = energy + (weight * (structure.real.square() + structure.imag.square())).sum()
        if first_order:
            conjugate = torch.complex(structure.real, -structure.imag)
            field = (conjugate * weight.detach()).t()
            terms = phases_12 * (phases_3 @ field)
            potential += 2.0 * terms.real.sum(dim=1)
            gradient[:, :2] += terms.imag @ h.to(charge.dtype)
            gradient[:, 2] += (phases_12 * (phases_3_slope @ field)).imag.sum(dim=1)
    if first_order:
        gradient = gradient * (-4.0 * math.pi * charge).unsqueeze(1)
        energy = energy + ((q - charge) * potential).sum() + ((fractional - place) * gradient).sum()
    return energy
