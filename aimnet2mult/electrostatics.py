"""Coulomb energy of the atomic charges, without the short-range part that the network learns.

Energies in eV, distances in Å, charges in e; sums in float64. The short-range part of a pair is
q_i q_j f(d)/d inside ``rc`` with a smooth envelope f, so that long range = full - short range.
"""

import math

import torch
from torch import Tensor, nn

from aimnet2mult import nbops, ops
from aimnet2mult.neighborlist import integer_grid
from aimnet2mult.utils.units import COULOMB_EV_ANGSTROM

METHODS = ("simple", "dsf", "ewald")
ENVELOPES = ("exp", "cosine")


def _pair_energy(
    kernel: Tensor, q: Tensor, mask: Tensor, data: dict[str, Tensor], suffix: str, factor: float
) -> Tensor:
    """½ factor Σ_i q_i Σ_j q_j K_ij per molecule: (B,) float64."""
    kernel = kernel.masked_fill(~mask, 0.0)
    potential = (kernel * nbops.neighbors(q, data, suffix)).sum(dim=-1, dtype=torch.float64)
    return 0.5 * factor * nbops.mol_sum(q.double() * potential, data)


def reciprocal_vectors(cell: Tensor, k_max: float) -> Tensor:
    """Half of the reciprocal lattice vectors with 0 < |k| <= ``k_max``, one of each pair ±k.

    Parameters
    ----------
    cell : Tensor
        (3, 3), Å, rows are lattice vectors.
    k_max : float
        1/Å.

    Returns
    -------
    Tensor
        (K, 3), 1/Å, including the factor 2π, with the graph of ``cell``.
    """
    basis = 2.0 * math.pi * torch.linalg.inv(cell).t()
    index = integer_grid(torch.floor(k_max * torch.linalg.vector_norm(cell, dim=[1]) / (2.0 * math.pi)))
    upper = (index[:, 0] > 0) | ((index[:, 0] == 0) & ((index[:, 1] > 0) | ((index[:, 1] == 0) & (index[:, 2] > 0))))
    k = index[upper].to(cell.dtype) @ basis
    return k[torch.linalg.vector_norm(k, dim=[1]) <= k_max]


def ewald_reciprocal_energy(coord: Tensor, q: Tensor, cell: Tensor, alpha: float, k_max: float) -> Tensor:
    """Reciprocal-space, self and background terms of the Ewald sum for Gaussian width ``alpha``, without e²/4πε₀.

    Σ_k 4π/V exp(-k²/4α²)/k² |Σ q exp(ik·r)|² over half of the vectors, -α/√π Σ q², -π Q²/(2 V α²); Frenkel and
    Smit, Understanding Molecular Simulation, chapter 12.

    Parameters
    ----------
    coord : Tensor
        (A, 3), Å.
    q : Tensor
        (A,), e.
    cell : Tensor
        (3, 3), Å.
    alpha, k_max : float
        1/Å.

    Returns
    -------
    Tensor
        Scalar, float64, e²/Å.
    """
    coord, q, cell = coord.double(), q.double(), cell.double()
    volume = torch.abs(torch.linalg.det(cell))
    k = reciprocal_vectors(cell, k_max)
    k_squared = k.pow(2).sum(dim=1)
    weight = 4.0 * math.pi / volume * torch.exp(-k_squared / (4.0 * alpha * alpha)) / k_squared
    phase = coord @ k.t()
    structure = (q @ torch.cos(phase)).pow(2) + (q @ torch.sin(phase)).pow(2)
    self_energy = alpha / math.sqrt(math.pi) * q.pow(2).sum()
    background = 0.5 * math.pi / (alpha * alpha) * q.sum().pow(2) / volume
    return (weight * structure).sum() - self_energy - background


class SRCoulomb(nn.Module):
    """Subtract the short-range Coulomb energy from ``key_out``: ½ e²/4πε₀ Σ_{i≠j} q_i q_j f(d)/d inside ``rc``.

    Parameters
    ----------
    rc : float
        Å, at most the cutoff of the network, whose pairs are used.
    key_in, key_out : str
        Charges (per atom) and energy (per molecule).
    envelope : str
        f(d): ``exp`` (`ops.exp_cutoff`) or ``cosine`` (`ops.cosine_cutoff`).
    """

    rc: Tensor

    def __init__(
        self, rc: float = 4.6, key_in: str = "charges", key_out: str = "energy", envelope: str = "exp"
    ) -> None:
        super().__init__()
        if envelope not in ENVELOPES:
            raise ValueError(f"envelope {envelope!r} is not one of {', '.join(ENVELOPES)}")
        self.key_in, self.key_out, self.envelope = key_in, key_out, envelope
        self.register_buffer("rc", torch.tensor(float(rc)))
        self.factor = COULOMB_EV_ANGSTROM

    def envelope_weight(self, d_ij: Tensor) -> Tensor:
        """f(d), shape of ``d_ij``."""
        rc = self.rc.to(d_ij.dtype)
        if self.envelope == "exp":
            return ops.exp_cutoff(d_ij, rc)
        return ops.cosine_cutoff(d_ij, rc)

    def short_range(self, data: dict[str, Tensor], suffix: str) -> Tensor:
        """Short-range energy of each molecule, (B,) float64, eV."""
        d_ij, _, mask = nbops.pair_vectors(data, suffix)
        kernel = self.envelope_weight(d_ij) / d_ij
        return _pair_energy(kernel, data[self.key_in], mask, data, suffix, self.factor)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Subtract from ``key_out``, or set it to minus the short-range energy."""
        energy = -self.short_range(data, "")
        if self.key_out in data:
            energy = data[self.key_out] + energy
        data[self.key_out] = energy
        return data


class LRCoulomb(SRCoulomb):
    """Add the Coulomb energy of the charges beyond the short range of the network.

    ``simple``
        Every pair of the molecule: ½ e²/4πε₀ Σ_{i≠j} q_i q_j (1 - f(d))/d. Not for periodic systems.
    ``dsf``
        Damped shifted force inside ``dsf_rc`` (`ops.coulomb_kernel_dsf`) with its self term
        -(erfc(αR)/2R + α/√π) Σ q², minus the short-range part.
    ``ewald``
        The Ewald sum, minus the short-range part. Without a cell it is the sum over all pairs, that is ``simple``.

    Parameters
    ----------
    rc : float
        Range of the short-range part, Å.
    key_in, key_out : str
        Charges (per atom) and energy (per molecule).
    method : str
        ``simple``, ``dsf`` or ``ewald``.
    dsf_alpha, dsf_rc : float
        Damping (1/Å) and cutoff (Å) of ``dsf``.
    ewald_accuracy : float
        Relative size of the terms that ``ewald`` leaves out.
    ewald_rc : float
        Cutoff of its real-space sum, Å; with the accuracy it fixes the width and the reciprocal cutoff.
    envelope : str
        As in `SRCoulomb`.

    Attributes
    ----------
    cutoff_lr, cutoff_lr_periodic : float
        Largest distance of a pair that the method needs, Å, for molecules and for crystals.
    """

    def __init__(
        self,
        rc: float = 4.6,
        key_in: str = "charges",
        key_out: str = "energy",
        method: str = "simple",
        dsf_alpha: float = 0.2,
        dsf_rc: float = 15.0,
        ewald_accuracy: float = 1e-8,
        ewald_rc: float = 10.0,
        envelope: str = "exp",
    ) -> None:
        super().__init__(rc, key_in, key_out, envelope)
        if method not in METHODS:
            raise ValueError(f"Coulomb method {method!r} is not one of {', '.join(METHODS)}")
        self.method = method
        self.dsf_alpha, self.dsf_rc = dsf_alpha, dsf_rc
        self.dsf_self = math.erfc(dsf_alpha * dsf_rc) / (2.0 * dsf_rc) + dsf_alpha / math.sqrt(math.pi)
        self.ewald_rc = ewald_rc
        width = math.sqrt(-math.log(ewald_accuracy))
        self.ewald_alpha = width / ewald_rc
        self.ewald_k_max = 2.0 * width * self.ewald_alpha
        self.cutoff_lr = dsf_rc if method == "dsf" else math.inf
        self.cutoff_lr_periodic = {"simple": math.inf, "dsf": dsf_rc, "ewald": ewald_rc}[method]

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add to ``key_out`` (per molecule, float64)."""
        q = data[self.key_in]
        d_ij, _, mask = nbops.pair_vectors(data, "_lr")
        if self.method == "dsf":
            kernel = ops.coulomb_kernel_dsf(d_ij, self.dsf_rc, self.dsf_alpha)
        elif self.method == "ewald" and "cell" in data:
            kernel = torch.erfc(self.ewald_alpha * d_ij) / d_ij * (d_ij < self.ewald_rc)
        else:
            kernel = 1.0 / d_ij
        kernel = kernel - self.envelope_weight(d_ij) / d_ij
        energy = _pair_energy(kernel, q, mask, data, "_lr", self.factor)
        if self.method == "dsf":
            energy = energy - self.factor * self.dsf_self * nbops.mol_sum(q.double().pow(2), data)
        elif self.method == "ewald" and "cell" in data:
            energy = energy + self.factor * self._reciprocal(q, data)
        if self.key_out in data:
            energy = data[self.key_out] + energy
        data[self.key_out] = energy
        return data

    def _reciprocal(self, q: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Reciprocal-space energies of a flat periodic batch, (B,) float64, e²/Å."""
        energies: list[Tensor] = []
        for b in range(nbops.n_molecules(data)):
            atoms = torch.nonzero((data["mol_idx"] == b) & nbops.real_atoms(data["numbers"])).squeeze(1)
            cell = data["cell"] if data["cell"].dim() == 2 else data["cell"][b]
            energies.append(
                ewald_reciprocal_energy(data["coord"][atoms], q[atoms], cell, self.ewald_alpha, self.ewald_k_max)
            )
        return torch.stack(energies)
