"""London dispersion: DFT-D3(BJ) with reference data, and its variant with C6 and polarizabilities from the network.

The two-body energy of both is

    E = -½ Σ_{i≠j} C6_ij [ s6 / (r⁶ + R0⁶) + s8 · 3 q_i q_j / (r⁸ + R0⁸) ],    R0 = a1 √(3 q_i q_j) + a2,

S. Grimme, S. Ehrlich, L. Goerigk, J. Comput. Chem. 32, 1456 (2011), doi:10.1002/jcc.21759, with
q_Z = √(½ √Z <r⁴>/<r²>). Functions take and give atomic units; the modules read Å and write eV. The three-body
term is not part of it. Parameters of functionals: `aimnet2mult.dispersion_params`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.utils.units import BOHR_ANGSTROM, HARTREE_EV

D3_DATA = Path(__file__).with_name("d3bj_data.pt")
"""Reference data of D3, made by ``scripts/make_d3bj_data.py``, which describes its keys."""

DECIMALS = 1e4
"""Tables of C6, coordination numbers and <r⁴>/<r²> are in units of 1/`DECIMALS`."""

COUNTING_STEEPNESS = 16.0
"""k1 of the D3 coordination number."""

WEIGHTING_FACTOR = 4.0
"""k3 of the D3 model: exponent of the Gaussian weights of the references."""

PAIR_CUTOFF_BOHR = 60.0
"""Range of the two-body energy in the program s-dftd3, Bohr."""

COUNTING_CUTOFF_BOHR = 40.0
"""Range of the coordination number in the program s-dftd3, Bohr; its tail, exp(-16) per atom, counts."""

# 4/3 times the covalent radii of Pyykkö and Atsumi (metals: minus 10 %). The table is in pm, and the programs that
# define D3 use it with the Bohr of CODATA 2018, so this factor is part of the model and not of our units.
COUNTING_RADIUS_BOHR_PER_PM = 4.0 / 3.0 * 0.01 / 0.529177210903
"""From the stored covalent radii to those of the counting function, Bohr."""

SMALLEST_TS_DENOMINATOR = 1e-4
"""Lower bound of the denominator in the Tkatchenko-Scheffler combination rule, that of the AIMNet2 models."""

PUBLISHED_TABLES = ("c6ab", "cn_ref", "cnmax", "r4r2", "rcov")
"""Names under which AIMNet2 checkpoints carry copies of the D3 tables."""


# --------------------------------------------------------------------------------------------------
# the model, in atomic units
# --------------------------------------------------------------------------------------------------


def counting_function(d_ij: Tensor, radius_ij: Tensor, steepness: float) -> Tensor:
    """Contribution of a neighbour to the coordination number: 1 / (1 + exp(-k1 (R_ij/d_ij - 1))).

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Bohr.
    radius_ij : Tensor
        Sums of the covalent radii of the pair (including 4/3), broadcast against ``d_ij``, Bohr.
    steepness : float
        k1.

    Returns
    -------
    Tensor
        Numbers in (0, 1), shape of ``d_ij``.
    """
    return torch.sigmoid(steepness * (radius_ij / d_ij - 1.0))


def reference_weights(cn: Tensor, reference_cn: Tensor, own: Tensor, exponent: float) -> Tensor:
    """Weight of each reference in an atom: exp(-k3 (CN - CN_ref)²), normalised over the references of its element.

    Normalising in log space (softmax) keeps the weights of an over-coordinated atom finite, where each Gaussian by
    itself is zero to machine precision.

    Parameters
    ----------
    cn : Tensor
        (..., 1) coordination numbers.
    reference_cn : Tensor
        (K,) coordination numbers of the references.
    own : Tensor
        (..., K) bool: the reference is one of the atom's element; at least one is.
    exponent : float
        k3.

    Returns
    -------
    Tensor
        (..., K), sums to one over K.
    """
    exponents = -exponent * (cn - reference_cn).square()
    return torch.softmax(exponents.masked_fill(~own, -math.inf), dim=-1)


def rational_damping_energy(
    d_ij: Tensor, c6_ij: Tensor, c8_ratio: Tensor, s6: float, s8: float, a1: float, a2: float
) -> Tensor:
    """Two-body dispersion energy of a pair with Becke-Johnson damping (equation in the module docstring).

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Bohr.
    c6_ij : Tensor
        C6 coefficients, Eh·a0⁶.
    c8_ratio : Tensor
        C8/C6 = 3 q_i q_j, a0².
    s6, s8, a1, a2 : float
        Damping parameters; a2 in Bohr.

    Returns
    -------
    Tensor
        Energies, shape of ``d_ij``, Hartree.
    """
    r2 = d_ij.square()
    r6 = r2 * r2 * r2
    r0_squared = (a1 * c8_ratio.sqrt() + a2).square()
    r0_6 = r0_squared * r0_squared * r0_squared
    sixth = s6 / (r6 + r0_6)
    eighth = s8 * c8_ratio / (r6 * r2 + r0_6 * r0_squared)
    return -c6_ij * (sixth + eighth)


def quintic_switch(d_ij: Tensor, start: float, end: float) -> Tensor:
    """One up to ``start``, zero from ``end``, 1 - 10t³ + 15t⁴ - 6t⁵ between them; two continuous derivatives."""
    t = ((d_ij - start) / (end - start)).clamp(0.0, 1.0)
    return 1.0 - t * t * t * (10.0 - 15.0 * t + 6.0 * t * t)


def tkatchenko_scheffler_c6(c6_i: Tensor, alpha_i: Tensor, c6_j: Tensor, alpha_j: Tensor, smallest: float) -> Tensor:
    """C6 of a pair from atomic values: 2 C6_i C6_j / (α_j/α_i C6_i + α_i/α_j C6_j).

    A. Tkatchenko, M. Scheffler, Phys. Rev. Lett. 102, 073005 (2009), doi:10.1103/PhysRevLett.102.073005.

    Parameters
    ----------
    c6_i, c6_j : Tensor
        Eh·a0⁶, broadcast against each other.
    alpha_i, alpha_j : Tensor
        Polarizabilities, a0³, not zero.
    smallest : float
        Lower bound of the denominator.

    Returns
    -------
    Tensor
        Eh·a0⁶.
    """
    ratio = alpha_j / alpha_i
    return 2.0 * c6_i * c6_j / (ratio * c6_i + c6_j / ratio).clamp(min=smallest)


# --------------------------------------------------------------------------------------------------
# modules
# --------------------------------------------------------------------------------------------------


class RationalDispersion(nn.Module):
    """What the two dispersion modules share: damping parameters, <r⁴>/<r²>, and adding up pair energies.

    The reference tables are integers (fixed decimals), so that casting the module to another floating-point type
    does not touch them; they are not part of state dictionaries, and copies of them in AIMNet2 checkpoints are
    passed over.

    Parameters
    ----------
    s8, a1, a2, s6 : float
        Damping parameters; a2 in Bohr.
    key_out : str
        Energy (per molecule) that the dispersion energy is added to.
    r4r2 : Tensor
        (Z + 1,) int32, <r⁴>/<r²> of each element in the reference data.
    """

    r4r2: Tensor

    def __init__(self, s8: float, a1: float, a2: float, s6: float, key_out: str, r4r2: Tensor) -> None:
        super().__init__()
        self.s6, self.s8, self.a1, self.a2 = float(s6), float(s8), float(a1), float(a2)
        self.key_out = key_out
        self.bohr = BOHR_ANGSTROM
        self.hartree = HARTREE_EV
        self.decimals = DECIMALS
        self.register_buffer("r4r2", r4r2, persistent=False)
        self.max_element = r4r2.shape[0] - 1
        self.elements = list(range(1, self.max_element + 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in PUBLISHED_TABLES:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def c8_ratio(self, data: dict[str, Tensor]) -> Tensor:
        """3 q_i q_j of the long-range pairs, a0², dtype of ``coord``."""
        r4r2 = self.r4r2.to(data["coord"].dtype) / self.decimals
        z = torch.arange(r4r2.shape[0], dtype=r4r2.dtype, device=r4r2.device)
        q = (0.5 * z.sqrt() * r4r2).sqrt()[data["numbers"]]
        return 3.0 * nbops.center(q, data) * nbops.neighbors(q, data, "_lr")

    def add_pair_energies(self, e_ij: Tensor, mask: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add half of the sum over ordered pairs, given in Hartree, to ``key_out``, in eV."""
        energy = 0.5 * self.hartree * nbops.mol_sum(nbops.neighbor_sum(e_ij, mask), data)
        if self.key_out in data:
            energy = data[self.key_out] + energy
        data[self.key_out] = energy
        return data


class DFTD3(RationalDispersion):
    """Add the two-body DFT-D3(BJ) energy to ``key_out``.

    S. Grimme, J. Antony, S. Ehrlich, H. Krieg, J. Chem. Phys. 132, 154104 (2010), doi:10.1063/1.3382344: C6 of a
    pair is the average of the C6 of its references, weighted by how near their coordination numbers are. The
    weights are products of one factor per atom, so with the references of all elements of the batch as columns,
    C6 = W C6_ref Wᵀ, two matrix products instead of a sum over 49 terms for each pair.

    Arithmetic is in the dtype of ``coord``, sums over pairs and atoms in float64.

    Parameters
    ----------
    s8, a1, a2, s6 : float
        Damping parameters; a2 in Bohr.
    key_out : str
        Energy (per molecule).
    cutoff : float, optional
        Range of the pairs, Å. By default 60 Bohr without a switch, which is what the program s-dftd3 does.
    smoothing_fraction : float
        With a ``cutoff``, the energy of a pair is switched off over this fraction of it, before it.

    Attributes
    ----------
    cutoff_lr, cutoff_lr_periodic : float
        Range of the pairs, Å.
    smoothing_on : float
        Distance at which switching begins, Å; not less than ``cutoff_lr`` for none.
    elements : list of int
        Atomic numbers with reference data, 1 to 103.
    """

    c6: Tensor
    cn: Tensor
    element: Tensor
    radius: Tensor
    first_reference: list[int]

    def __init__(
        self,
        s8: float,
        a1: float,
        a2: float,
        s6: float = 1.0,
        key_out: str = "energy",
        cutoff: float | None = None,
        smoothing_fraction: float = 0.2,
    ) -> None:
        tables = torch.load(D3_DATA, weights_only=True)
        super().__init__(s8, a1, a2, s6, key_out, tables["r4r2"])
        n_ref = tables["cn"].shape[0]
        rows, columns = torch.tril_indices(n_ref, n_ref).unbind(0)
        c6 = torch.zeros(n_ref, n_ref, dtype=torch.int32)
        c6[rows, columns] = tables["c6"]
        c6[columns, rows] = tables["c6"]
        self.register_buffer("c6", c6, persistent=False)
        self.register_buffer("cn", tables["cn"], persistent=False)
        self.register_buffer("element", tables["element"].long(), persistent=False)
        self.register_buffer("radius", tables["radius"], persistent=False)
        counts = torch.bincount(self.element, minlength=self.max_element + 1)
        self.first_reference = [0, *counts.cumsum(0).tolist()]

        self.steepness = COUNTING_STEEPNESS
        self.exponent = WEIGHTING_FACTOR
        self.radius_unit = COUNTING_RADIUS_BOHR_PER_PM
        self.counting_cutoff = COUNTING_CUTOFF_BOHR * BOHR_ANGSTROM
        if cutoff is None:
            self.set_cutoff(PAIR_CUTOFF_BOHR * BOHR_ANGSTROM, 0.0)
        else:
            self.set_cutoff(cutoff, smoothing_fraction)

    @torch.jit.unused
    def set_cutoff(self, cutoff: float, smoothing_fraction: float = 0.2) -> None:
        """Set the range of the pairs (Å) and the fraction of it, at its end, over which they are switched off.

        Raises
        ------
        ValueError
            A range that is not positive, or a fraction outside [0, 1].
        """
        if not cutoff > 0.0:
            raise ValueError(f"cutoff of the dispersion energy must be positive, not {cutoff} Å")
        if not 0.0 <= smoothing_fraction <= 1.0:
            raise ValueError(f"smoothing_fraction must lie between 0 and 1, not {smoothing_fraction}")
        self.cutoff_lr = float(cutoff)
        self.cutoff_lr_periodic = float(cutoff)
        self.smoothing_on = float(cutoff) * (1.0 - smoothing_fraction)

    def references(self, numbers: Tensor) -> Tensor:
        """Indices (K,) of the references of the elements in ``numbers``; padding has one of its own.

        The elements are read from the device here, once per call.

        Raises
        ------
        ValueError
            An element without reference data.
        """
        present: list[int] = torch.unique(numbers).tolist()
        references: list[int] = []
        for z in present:
            if z < 0 or z > self.max_element:
                raise ValueError(f"DFT-D3 has reference data for the elements 1 to {self.max_element}, not for {z}")
            for k in range(self.first_reference[z], self.first_reference[z + 1]):
                references.append(k)
        return torch.tensor(references, dtype=torch.long, device=numbers.device)

    def counting_terms(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What each neighbour adds to the coordination number, the sum of covalent radii (Bohr), and who counts."""
        d_ij, _, mask = nbops.pair_vectors(data, "_lr")
        radius = (self.radius.to(d_ij.dtype) * self.radius_unit)[data["numbers"]]
        radius_ij = nbops.center(radius, data) + nbops.neighbors(radius, data, "_lr")
        count = counting_function(d_ij / self.bohr, radius_ij, self.steepness)
        return count, radius_ij, mask & (d_ij < self.counting_cutoff)

    def coordination_numbers(self, data: dict[str, Tensor]) -> Tensor:
        """Coordination number of each atom, (B, N) or (A,), dtype of ``coord``."""
        count, _, counted = self.counting_terms(data)
        return nbops.neighbor_sum(count, counted).to(count.dtype)

    def atomic_weights(self, data: dict[str, Tensor], index: Tensor, cn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the K references in each atom, and the tables that belong to the references.

        Parameters
        ----------
        data : dict
            Internal batch.
        index : Tensor
            (K,) the references (`references`).
        cn : Tensor
            Coordination numbers, (B, N) or (A,).

        Returns
        -------
        weights : Tensor
            (B, N, K) or (A, K).
        reference_cn : Tensor
            (K,) coordination numbers of the references.
        reference_c6 : Tensor
            (K, K), Eh·a0⁶.
        """
        own = self.element[index] == data["numbers"].unsqueeze(-1)
        reference_cn = self.cn[index].to(cn.dtype) / self.decimals
        weights = reference_weights(cn.unsqueeze(-1), reference_cn, own, self.exponent)
        return weights, reference_cn, self.c6[index][:, index].to(cn.dtype) / self.decimals

    def pair_products(self, averaged: Tensor, weights: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Σ_k averaged_ik weights_jk of the long-range pairs: (B, N, K) -> (B, N, N), or (A, K) -> (A, M)."""
        if not nbops.is_flat(data):
            return averaged @ weights.transpose(-1, -2)
        nbmat = data["nbmat_lr"]
        if nbmat.shape[0] <= nbmat.shape[1] * weights.shape[1]:
            # All atoms with all is the smaller array when most of them are neighbours.
            return (averaged @ weights.t()).gather(1, nbmat)
        return torch.bmm(weights[nbmat], averaged.unsqueeze(-1)).squeeze(-1)

    def c6_coefficients(self, data: dict[str, Tensor]) -> Tensor:
        """C6 of the long-range pairs, (B, N, N) or (A, M), Eh·a0⁶, dtype of ``coord``."""
        index = self.references(data["numbers"])
        weights, _, reference_c6 = self.atomic_weights(data, index, self.coordination_numbers(data))
        return self.pair_products(weights @ reference_c6, weights, data)

    @torch.jit.unused
    def energy_and_forces(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Energy of this term alone and its forces, by the derivatives written out.

        For worker processes that read data: one that was forked from a process that trains on a GPU cannot
        differentiate automatically. With w'_i the derivative of the weights by CN_i, and
        G_i = ∂E/∂CN_i = -Σ_j (w'_i C6_ref w_jᵀ) g_ij, where g_ij is the bracket in the module docstring,

            F_i = Σ_j [ -C6_ij dg_ij/dr + (G_i + G_j) df_ij/dr ] r_ij/d_ij,

        f being the counting function. There is no switch at the cutoff.

        Parameters
        ----------
        data : dict
            Internal batch, as for `forward`; no cell.

        Returns
        -------
        energy : Tensor
            (B,) float64, eV.
        forces : Tensor
            (B, N, 3) or (A, 3), eV/Å, dtype of ``coord``.
        """
        assert self.smoothing_on >= self.cutoff_lr
        index = self.references(data["numbers"])
        d_ij, r_ij, mask = nbops.pair_vectors(data, "_lr")
        within = mask & (d_ij < self.cutoff_lr)
        r = d_ij / self.bohr

        count, radius_ij, counted = self.counting_terms(data)
        count_slope = (-self.steepness * radius_ij / r.square() * count * (1.0 - count)).masked_fill(~counted, 0.0)
        cn = nbops.neighbor_sum(count, counted).to(r.dtype)
        weights, reference_cn, reference_c6 = self.atomic_weights(data, index, cn)
        exponent_slope = -2.0 * self.exponent * (cn.unsqueeze(-1) - reference_cn)
        weight_slope = weights * (exponent_slope - (weights * exponent_slope).sum(-1, keepdim=True))
        c6_ij = self.pair_products(weights @ reference_c6, weights, data)
        c6_slope = self.pair_products(weight_slope @ reference_c6, weights, data)

        c8_ratio = self.c8_ratio(data)
        r0_squared = (self.a1 * c8_ratio.sqrt() + self.a2).square()
        r6, r0_6 = r**6, r0_squared**3
        sixth, eighth = 1.0 / (r6 + r0_6), c8_ratio / (r6 * r.square() + r0_6 * r0_squared)
        bracket = (self.s6 * sixth + self.s8 * eighth).masked_fill(~within, 0.0)
        slope = -6.0 * self.s6 * r**5 * sixth.square() - 8.0 * self.s8 * r**7 * eighth.square() / c8_ratio
        slope = slope.masked_fill(~within, 0.0)

        energy = -0.5 * self.hartree * nbops.mol_sum(nbops.neighbor_sum(c6_ij * bracket, within), data)
        cn_slope = -(c6_slope * bracket).sum(-1)
        cn_slopes = nbops.center(cn_slope, data) + nbops.neighbors(cn_slope, data, "_lr")
        along_pair = cn_slopes * count_slope - c6_ij * slope
        forces = (along_pair.unsqueeze(-1) * (r_ij / d_ij.unsqueeze(-1))).sum(-2)
        return energy, self.hartree / self.bohr * forces

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the dispersion energy.

        Parameters
        ----------
        data : dict
            Internal batch; ``numbers`` are plain atomic numbers, pairs those of ``nbmat_lr`` or of the molecule.

        Returns
        -------
        dict
            ``data`` with ``key_out`` (B,) float64, eV.
        """
        d_ij, _, mask = nbops.pair_vectors(data, "_lr")
        c6_ij = self.c6_coefficients(data)
        e_ij = rational_damping_energy(d_ij / self.bohr, c6_ij, self.c8_ratio(data), self.s6, self.s8, self.a1, self.a2)
        if self.smoothing_on < self.cutoff_lr:
            e_ij = e_ij * quintic_switch(d_ij, self.smoothing_on, self.cutoff_lr)
        return self.add_pair_energies(e_ij, mask & (d_ij < self.cutoff_lr), data)


class D3TS(RationalDispersion):
    """Add the dispersion energy of atomic C6 and polarizabilities, paired by the Tkatchenko-Scheffler rule.

    Parameters
    ----------
    a1, a2, s8, s6 : float
        Damping parameters; a2 in Bohr.
    key_in : str
        Atomic C6 (Eh·a0⁶) and polarizability (a0³), written by `DispParam`: (B, N, 2) or (A, 2).
    key_out : str
        Energy (per molecule).

    Attributes
    ----------
    cutoff_lr, cutoff_lr_periodic : float
        Range of the pairs, Å: every pair of a molecule, in a crystal those within 60 Bohr.
    """

    def __init__(
        self, a1: float, a2: float, s8: float, s6: float = 1.0, key_in: str = "disp_param", key_out: str = "energy"
    ) -> None:
        super().__init__(s8, a1, a2, s6, key_out, torch.load(D3_DATA, weights_only=True)["r4r2"])
        self.key_in = key_in
        self.cutoff_lr = math.inf
        self.cutoff_lr_periodic = PAIR_CUTOFF_BOHR * BOHR_ANGSTROM
        self.smallest = SMALLEST_TS_DENOMINATOR

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the dispersion energy: ``key_out`` (B,) float64, eV."""
        d_ij, _, mask = nbops.pair_vectors(data, "_lr")
        c6, alpha = data[self.key_in].unbind(-1)
        # Any polarizability does for padding, but zero, which would make the ratios of masked pairs infinite.
        alpha = alpha.masked_fill(~nbops.real_atoms(data["numbers"]), 1.0)
        c6_ij = tkatchenko_scheffler_c6(
            nbops.center(c6, data),
            nbops.center(alpha, data),
            nbops.neighbors(c6, data, "_lr"),
            nbops.neighbors(alpha, data, "_lr"),
            self.smallest,
        )
        e_ij = rational_damping_energy(d_ij / self.bohr, c6_ij, self.c8_ratio(data), self.s6, self.s8, self.a1, self.a2)
        return self.add_pair_energies(e_ij, mask, data)


class DispParam(nn.Module):
    """Atomic C6 and polarizability: reference values of the element times exp of two numbers from the network.

    (C6, α)_i = (C6, α)_ref(Z_i) · exp(x_i), with x limited to [-4, 4].

    Parameters
    ----------
    ref_c6, ref_alpha : mapping of int to float, or Tensor, optional
        Reference values by atomic number, Eh·a0⁶ and a0³; a tensor is indexed by atomic number.
    ptfile : path, optional
        File of a tensor (elements, 2) with both, instead of them. Without any of the three, the values are zero
        until a checkpoint brings them.
    key_in : str
        Outputs of the network, (B, N, 2) or (A, 2).
    key_out : str
        C6 and polarizability, same shape.

    Attributes
    ----------
    disp_param0 : Tensor
        (elements, 2) reference values, part of the state dictionary; row 0 (padding) is (0, 1).

    Raises
    ------
    ValueError
        Both ``ptfile`` and reference values, or a file that does not hold a tensor of two columns.
    """

    disp_param0: Tensor

    def __init__(
        self,
        ref_c6: Mapping[int, float] | Tensor | None = None,
        ref_alpha: Mapping[int, float] | Tensor | None = None,
        ptfile: str | None = None,
        key_in: str = "disp_param",
        key_out: str = "disp_param",
    ) -> None:
        super().__init__()
        if ptfile is not None:
            if ref_c6 is not None or ref_alpha is not None:
                raise ValueError("DispParam: give either ptfile or ref_c6 and ref_alpha, not both")
            table = torch.load(ptfile, map_location="cpu", weights_only=True)
            if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[1] != 2:
                raise ValueError(f"{ptfile}: expected a tensor of shape (elements, 2) with C6 and polarizability")
            table = table.clone()
        else:
            table = _element_table(ref_c6, ref_alpha)
        table[0] = torch.tensor([0.0, 1.0])
        self.register_buffer("disp_param0", table)
        self.key_in, self.key_out = key_in, key_out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "disp_param0")
        if stored is not None and stored.dim() == 2 and stored.shape[1] == 2:
            self.disp_param0 = self.disp_param0.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``key_out``."""
        factor = data[self.key_in].clamp(min=-4.0, max=4.0).exp()
        data[self.key_out] = self.disp_param0.to(factor.dtype)[data["numbers"]] * factor
        return data


def _element_table(
    ref_c6: Mapping[int, float] | Tensor | None, ref_alpha: Mapping[int, float] | Tensor | None
) -> Tensor:
    """Reference values as a tensor (elements, 2) with at least the rows up to Rn (86)."""
    columns: list[dict[int, float]] = []
    for values in (ref_c6, ref_alpha):
        items = enumerate(values.tolist()) if isinstance(values, Tensor) else (values or {}).items()
        columns.append({int(z): float(value) for z, value in items})
    table = torch.zeros(max([86, *columns[0], *columns[1]]) + 1, 2)
    for k, column in enumerate(columns):
        for z, value in column.items():
            table[z, k] = value
    return table
