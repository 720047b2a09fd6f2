"""Pure tensor functions: cutoffs, the radial basis, charge equilibration, Coulomb kernels. No state, no keys."""

import math

import torch
from torch import Tensor

from aimnet2mult import nbops

NSE_EPSILON = 1e-6
"""Added to the summed flexibilities, so that a molecule without any is left as it is."""


def cosine_cutoff(d_ij: Tensor, rc: Tensor) -> Tensor:
    """Cutoff ½(cos(π d/rc) + 1) of Behler and Parrinello (10.1103/PhysRevLett.98.146401), zero beyond ``rc``.

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Å.
    rc : Tensor
        Cutoff radius, scalar, Å.

    Returns
    -------
    Tensor
        Weights in [0, 1], shape of ``d_ij``.
    """
    return 0.5 * (torch.cos(math.pi / rc * torch.minimum(d_ij, rc)) + 1.0)


def exp_cutoff(d_ij: Tensor, rc: Tensor) -> Tensor:
    """Smooth cutoff exp(1 - 1/(1 - (d/rc)²)): one at d = 0, zero from ``rc`` on, all derivatives continuous.

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Å.
    rc : Tensor
        Cutoff radius, scalar, Å.

    Returns
    -------
    Tensor
        Weights in [0, 1], shape of ``d_ij``.
    """
    # From 1 - (d/rc)² = 1/800 on, exp is zero even in float64; the bound keeps its derivatives finite.
    return torch.exp(1.0 - (1.0 - (d_ij / rc).square()).clamp(min=1.0 / 800.0).reciprocal())


def gaussian_basis(d_ij: Tensor, eta: Tensor, shifts: Tensor) -> Tensor:
    """Radial functions exp(-eta (d - shift)²), ``d_ij`` broadcast against ``shifts``; eta in Å⁻², the rest in Å.

    Values below e⁻⁴⁰ = 4e-18 (float64: e⁻¹⁶⁰ = 3e-70) stay there, nothing beside 1 in their precision: smaller ones
    make products denormal, which take processors many times as long.
    """
    largest = 160.0 if d_ij.dtype == torch.float64 else 40.0
    return torch.exp(-(eta * (d_ij - shifts) ** 2).clamp(max=largest))


def nse(Q: Tensor, q: Tensor, f: Tensor, data: dict[str, Tensor], epsilon: float = NSE_EPSILON) -> Tensor:
    """Neutral spin equilibration: spread the missing charge over the atoms by their flexibility.

    q_i + f_i / (Σf + ε) · (Q - Σq), per molecule and channel; Zubatyuk et al., 10.1038/s41467-021-24904-0.

    Parameters
    ----------
    Q : Tensor
        (B, C) total charge of each channel, e.
    q, f : Tensor
        (B, N, C) or (A, C) atomic charges and flexibilities (not negative), both zero for padding.
    data : dict
        The batch.
    epsilon : float
        Keeps the division finite.

    Returns
    -------
    Tensor
        Charges, shape of ``q``, that sum to ``Q``.
    """
    missing = Q - nbops.mol_sum(q, data)
    flexibility = nbops.mol_sum(f, data) + epsilon
    return q + f * nbops.mol_expand(missing / flexibility, data)


def coulomb_kernel_dsf(d_ij: Tensor, rc: float, alpha: float) -> Tensor:
    """Damped shifted force kernel of Fennell and Gezelter (10.1063/1.2206581), value and force zero at ``rc``.

    erfc(αd)/d - erfc(αR)/R + (erfc(αR)/R² + 2α/√π·exp(-α²R²)/R)·(d - R) inside R = ``rc``, zero beyond.

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Å, not zero.
    rc : float
        Cutoff, Å.
    alpha : float
        Damping, 1/Å.

    Returns
    -------
    Tensor
        1/Å, shape of ``d_ij``.
    """
    at_rc = math.erfc(alpha * rc) / rc
    slope = at_rc / rc + 2.0 * alpha / math.sqrt(math.pi) * math.exp(-((alpha * rc) ** 2)) / rc
    kernel = torch.erfc(alpha * d_ij) / d_ij + (slope * d_ij - (at_rc + slope * rc))
    return torch.where(d_ij < rc, kernel, torch.zeros_like(kernel))


def coulomb_kernel_ewald(d_ij: Tensor, alpha: Tensor, width: float) -> Tensor:
    """Real-space kernel of the Ewald sum, erfc(αd)/d inside d = w/α, zero beyond.

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Å, not zero.
    alpha : Tensor
        α, broadcasts against ``d_ij``, 1/Å.
    width : float
        w.

    Returns
    -------
    Tensor
        1/Å, shape of ``d_ij``.
    """
    x = alpha * d_ij
    return torch.where(x < width, torch.erfc(x) / d_ij, torch.zeros_like(d_ij))


def point_charge_dipole(q: Tensor, r: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Dipole moment Σ q r of each molecule.

    Parameters
    ----------
    q : Tensor
        (B, N) or (A,) charges, e.
    r : Tensor
        (B, N, 3) or (A, 3) positions from the origin of choice, Å.
    data : dict
        The batch.

    Returns
    -------
    Tensor
        (B, 3), e·Å.
    """
    return nbops.mol_sum(nbops.mask_padding(q, data).unsqueeze(-1) * r, data)


def point_charge_quadrupole(q: Tensor, r: Tensor, data: dict[str, Tensor]) -> Tensor:
    """Traceless quadrupole moment Σ q (r⊗r - r²/3) of each molecule; arguments as `point_charge_dipole`.

    Returns
    -------
    Tensor
        (B, 6) as xx, yy, zz, xy, yz, xz (the order of the published AIMNet2 code), e·Å².
    """
    squares = r.pow(2)
    products = torch.cat([squares - squares.mean(dim=-1, keepdim=True), r * r.roll(-1, dims=-1)], dim=-1)
    return nbops.mol_sum(nbops.mask_padding(q, data).unsqueeze(-1) * products, data)
