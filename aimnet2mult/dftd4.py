"""London dispersion with charges: the DFT-D4 model with three-body term, in molecules.

E. Caldeweyher, S. Ehlert, A. Hansen, H. Neugebauer, S. Spicher, C. Bannwarth, S. Grimme, J. Chem. Phys. 150, 154122
(2019), doi:10.1063/1.5090222 (the D4 paper), in this order:

1. Charges q by electronegativity equilibration (EEQ) of Gaussian charges of radius ρ,

       Σ_j A_ij q_j + λ = κ_i √CN_i - χ_i,   Σ_i q_i = Q,
       A_ii = η_i + √(2/π)/ρ_i,   A_ij = erf(r_ij / √(ρ_i² + ρ_j²)) / r_ij.

2. Coordination numbers, where R_ij is the sum of covalent radii and ε a Pauling electronegativity:
   CN_i = Σ_j ½ (1 + erf(-k (r_ij/R_ij - 1))), in D4 each term times k4 exp(-(|ε_i - ε_j| + k5)²/k6). That of EEQ is
   limited smoothly to 8.
3. Polarizabilities at imaginary frequencies, α_i(iω) = Σ_ref W_ref(CN_i) ζ(q_i, q_ref) α_ref(iω): Gaussian weights and
   the charge scaling ζ = exp(g_a (1 - exp(g_c η (1 - (q_ref + z)/(q + z))))), z the effective nuclear charge.
4. C6_ij = 3/π ∫ α_i(iω) α_j(iω) dω (Casimir, Polder), and the pair energy of D3 with Becke-Johnson damping.
5. The energy of Axilrod, Teller and Muto (ATM), with C6 of uncharged atoms (ζ at q = 0):

       E = s9 Σ_{i<j<k} f C9 (1 + 3 cosθ_i cosθ_j cosθ_k) / (r_ij r_jk r_ki)³,   C9 = √(C6_ij C6_jk C6_ki),
       f = 1/(1 + 6 (R0_ij R0_jk R0_ki / (r_ij r_jk r_ki))^{16/3}).

   (The minus sign of C9 and that of the energy cancel.)

Functions take and give atomic units; the module reads Å and writes eV. What is quadratic in the number of atoms is
computed in double precision, the triples in that of ``coord``. Parameters of functionals:
`aimnet2mult.dispersion_params.d4_parameters`; reference data: ``scripts/make_dftd4_data.py``.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.dispersion import COUNTING_RADIUS_BOHR_PER_PM, D3_DATA, DECIMALS, rational_damping_energy
from aimnet2mult.utils.units import BOHR_ANGSTROM, HARTREE_EV

D4_DATA = Path(__file__).with_name("dftd4_data.pt")
"""Reference data of D4, made by ``scripts/make_dftd4_data.py``, which describes its keys."""

COUNTING_STEEPNESS = 7.5
"""k of both coordination numbers."""

LARGEST_EEQ_CN = 8.0
"""Limit of the coordination number of EEQ."""

ELECTRONEGATIVITY_WEIGHT = (4.10451, 19.08857, 2.0 * 11.28174**2)
"""k4, k5, k6 of the D4 coordination number."""

WEIGHTING_FACTOR = 6.0
"""Exponent of the Gaussian weights of the references."""

ATM_EXPONENT = 16.0
"""Exponent of the damping of the three-body energy."""

PAIR_CUTOFF_BOHR = 60.0
"""Range of the two-body energy in the program dftd4, Bohr."""

TRIPLE_CUTOFF_BOHR = 40.0
"""Longest side of a triangle in the three-body energy of the program dftd4, Bohr."""

COUNTING_CUTOFF_BOHR = 30.0
"""Range of the coordination numbers in the program dftd4, Bohr."""

FREQUENCIES = (
    *(1e-6, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *(1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0),
)
"""Imaginary frequencies of the reference polarizabilities, Hartree."""

SMALLEST_CN = 1e-14
"""Keeps the derivative of √CN finite, as in the program multicharge, which solves EEQ for dftd4."""

SMALLEST_EFFECTIVE_CHARGE = 1e-3
"""Below it, e, the charge scaling has reached its limit exp(g_a) to the last digit."""

FIXED_POINT = 2.0**48
"""Tables are kept in units of 1/`FIXED_POINT`, which is finer than the last digit of each."""

BLOCK_TRIPLES = 2**17
"""Triples that are computed at once on a CPU, where they should stay in the cache; 64 times as many on a GPU."""

GROUP_PAIRS = 2**18
"""Molecules of a flat batch go together as long as their padded matrices have no more elements than this."""


# --------------------------------------------------------------------------------------------------
# the model, in atomic units
# --------------------------------------------------------------------------------------------------


def erf_count(d_ij: Tensor, radius_ij: Tensor, steepness: float) -> Tensor:
    """Contribution of a neighbour to a coordination number: ½ (1 + erf(-k (d/R - 1))).

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Bohr.
    radius_ij : Tensor
        Sums of covalent radii (including 4/3), broadcast against ``d_ij``, Bohr.
    steepness : float
        k.

    Returns
    -------
    Tensor
        Numbers in (0, 1), shape of ``d_ij``.
    """
    return 0.5 * torch.erfc(steepness * (d_ij / radius_ij - 1.0))


def limited_cn(cn: Tensor, largest: float) -> Tensor:
    """Coordination numbers that approach a limit smoothly: ln(1 + e^m) - ln(1 + e^(m - CN)).

    Written so that small numbers keep their digits.
    """
    return cn - torch.log1p(torch.expm1(cn) / (1.0 + math.exp(largest)))


def eeq_charges(
    d_ij: Tensor, pairs: Tensor, real: Tensor, cn: Tensor, total: Tensor, parameters: Tensor, smallest_cn: float
) -> Tensor:
    """Charges of electronegativity equilibration (equations in the module docstring).

    Parameters
    ----------
    d_ij : Tensor
        (B, N, N) distances, Bohr; any finite number where no pair is.
    pairs : Tensor
        (B, N, N) bool, the pairs of different atoms.
    real : Tensor
        (B, N) bool, the atoms that are not padding.
    cn : Tensor
        (B, N) coordination numbers.
    total : Tensor
        (B,) charges of the molecules, e.
    parameters : Tensor
        (B, N, 4) electronegativity χ, its dependence κ on the coordination number, hardness η, radius ρ.
    smallest_cn : float
        Added to the coordination number in the denominator of CN/√CN.

    Returns
    -------
    Tensor
        (B, N), e; zero for padding.
    """
    chi, kappa, eta, rho = parameters.unbind(-1)
    width = (rho.unsqueeze(2).square() + rho.unsqueeze(1).square()).sqrt()
    coulomb = (torch.erf(d_ij / width) / d_ij).masked_fill(~pairs, 0.0)
    coulomb = coulomb + torch.diag_embed(eta + math.sqrt(2.0 / math.pi) / rho)
    # Not positive definite (some hardnesses are negative), hence no Cholesky factors and no Schur complement: the
    # charge constraint is one more row. Rows of padding hold the diagonal alone, as does the constraint of no atoms.
    ones = real.to(cn.dtype)
    last = torch.cat([ones, (~real.any(dim=1, keepdim=True)).to(cn.dtype)], dim=1)
    matrix = torch.cat([torch.cat([coulomb, ones.unsqueeze(1)], dim=1), last.unsqueeze(2)], dim=2)
    right = (kappa * cn / (cn + smallest_cn).sqrt() - chi) * ones
    solution = torch.linalg.solve(matrix, torch.cat([right, total.unsqueeze(1)], dim=1))
    return solution[:, :-1]


def gaussian_weights(cn: Tensor, reference_cn: Tensor, n_gaussians: Tensor, exponent: float) -> Tensor:
    """Weight of each reference in an atom, Σ_m exp(-m w (CN - CN_ref)²), normalised over the references.

    Normalising in log space (softmax) keeps the weights of an over-coordinated atom finite, where each Gaussian by
    itself is zero to machine precision.

    Parameters
    ----------
    cn : Tensor
        (..., 1) coordination numbers.
    reference_cn : Tensor
        (..., K) coordination numbers of the references.
    n_gaussians : Tensor
        (..., K) terms of the sum over m: 1 or 3, or 0 for what is not a reference; at least one is.
    exponent : float
        w.

    Returns
    -------
    Tensor
        (..., K), sums to one over K.
    """
    x = exponent * (cn - reference_cn).square()
    further = torch.log1p(torch.exp(-x) + torch.exp(-2.0 * x)).masked_fill(n_gaussians < 2, 0.0)
    return torch.softmax((further - x).masked_fill(n_gaussians == 0, -math.inf), dim=-1)


def charge_scaling(q: Tensor, q_ref: Tensor, z: Tensor, ga: float, steepness: Tensor, smallest: float) -> Tensor:
    """Scaling of a polarizability from the charge of the reference to that of the atom: ζ of the module docstring.

    Parameters
    ----------
    q, q_ref : Tensor
        Charges of the atom and of the reference, broadcast against each other, e.
    z : Tensor
        Effective nuclear charge, e.
    ga : float
        Logarithm of the limit for negative charges.
    steepness : Tensor
        g_c times the chemical hardness.
    smallest : float
        Where q + z is below, e, the limit exp(g_a) has been reached.

    Returns
    -------
    Tensor
        One at q = q_ref, larger for more negative charges.
    """
    inside = q + z > smallest
    charge = torch.where(inside, q + z, torch.ones_like(q))
    scale = torch.exp(steepness * (1.0 - (q_ref + z) / charge))
    return torch.exp(ga * (1.0 - torch.where(inside, scale, torch.zeros_like(scale))))


def trapezoid_weights(x: Tensor) -> Tensor:
    """Weights of the points of an integral by the trapezoidal rule."""
    steps = 0.5 * x.diff()
    zero = steps.new_zeros(1)
    return torch.cat([steps, zero]) + torch.cat([zero, steps])


def casimir_polder_c6(alpha: Tensor, weights: Tensor) -> Tensor:
    """C6_ij = 3/π Σ_ω w_ω α_i(iω) α_j(iω): (B, N, F) -> (B, N, N), Eh·a0⁶."""
    return (3.0 / math.pi) * torch.matmul(alpha * weights, alpha.transpose(1, 2))


def triple_index(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices i < j < k of all triples of n atoms."""
    pairs = torch.triu_indices(n, n, 1, device=device)
    counts = pairs[0]
    row = torch.repeat_interleave(counts)
    i = torch.arange(row.shape[0], device=device) - (counts.cumsum(0) - counts)[row]
    return i, pairs[0][row], pairs[1][row]


def atm_energy(r2: Tensor, strength: Tensor, damping: Tensor) -> Tensor:
    """Three-body energies from pair quantities, a term at a time, all derivatives by automatic differentiation.

    Parameters
    ----------
    r2 : Tensor
        (B, N, N) squares of distances, Bohr².
    strength : Tensor
        (B, N, N) √C6 / r³, zero for pairs that do not count.
    damping : Tensor
        (B, N, N) (R0/r)^{16/3}.

    Returns
    -------
    Tensor
        (B,) Hartree, float64, for s9 = 1.
    """
    n = r2.shape[1]
    i, j, k = triple_index(n, r2.device)
    ij, jk, ik = i * n + j, j * n + k, i * n + k
    r2, strength, damping = r2.flatten(1), strength.flatten(1), damping.flatten(1)
    a, b, c = r2[:, ij], r2[:, ik], r2[:, jk]
    product = strength[:, ij] * strength[:, ik] * strength[:, jk]
    damped = product / (1.0 + 6.0 * damping[:, ij] * damping[:, ik] * damping[:, jk])
    cosines = 0.375 * (a + b - c) * (a - b + c) * (b + c - a) / (a * b * c)
    return (damped * (1.0 + cosines)).sum(dim=1, dtype=torch.float64)


def atm_energy_and_derivatives(
    r2: Tensor, strength: Tensor, damping: Tensor, block_triples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `atm_energy`, in blocks and with first derivatives written out; nothing of the size of N³ is kept.

    For a pair ij with a = r_ij², and with b = r_ik², c = r_jk², y = a² - (b - c)², z = b + c - a, the cosines of a
    triangle are 3/8 y z / (a b c), so that each sum over k below is one of f, y and z with the strengths of ik and jk.

    Parameters
    ----------
    r2, strength, damping : Tensor
        As in `atm_energy`.
    block_triples : int
        Size of a block.

    Returns
    -------
    energy : Tensor
        (B,) Hartree, float64, for s9 = 1.
    d_r2, d_log_strength, d_log_damping : Tensor
        (B, N, N) derivatives of the energy by ``r2`` and the logarithms of the others, for i < j (zero elsewhere).
    """
    n_mol, n = r2.shape[0], r2.shape[1]
    energy = torch.zeros(n_mol, dtype=torch.float64, device=r2.device)
    d_r2, d_strength, d_damping = torch.zeros_like(r2), torch.zeros_like(r2), torch.zeros_like(r2)
    reduced = strength / r2
    above = torch.ones(n, n, dtype=torch.bool, device=r2.device).triu(1)
    step = max(1, block_triples // max(1, n_mol * n * n))
    for first in range(0, n, step):
        rows = min(first + step, n)
        # Axes of the triples: molecule, i, j from the first of i on, k.
        a = r2[:, first:rows, first:]
        b, c = r2[:, first:rows].unsqueeze(2), r2[:, first:].unsqueeze(1)
        g = strength[:, first:rows, first:] * above[first:rows, first:]
        f = damping[:, first:rows].unsqueeze(2) * damping[:, first:].unsqueeze(1)
        f = f.mul_(6.0 * damping[:, first:rows, first:].unsqueeze(3)).add_(1.0).reciprocal_()
        uniform = (strength[:, first:rows].unsqueeze(2) * strength[:, first:].unsqueeze(1)).mul_(f)
        angular = (reduced[:, first:rows].unsqueeze(2) * reduced[:, first:].unsqueeze(1)).mul_(f)
        y = (b - c).square_().neg_().add_(a.square().unsqueeze(3))
        z = (b + c).sub_(a.unsqueeze(3))
        hy = (angular * y).sum(3)
        hz = angular.mul_(z)
        sum_hz = hz.sum(3)
        hyz = hz.mul_(y)
        sum_hyz = hyz.sum(3)
        sum_all = uniform.sum(3) + 0.375 * sum_hyz / a
        sum_damped = uniform.mul_(f).sum(3) + 0.375 * hyz.mul_(f).sum(3) / a
        pair_energy = g * sum_all
        # Each triple is found from each of its three pairs.
        energy = energy + pair_energy.sum(dim=[1, 2], dtype=torch.float64) / 3.0
        d_strength[:, first:rows, first:] = pair_energy
        d_damping[:, first:rows, first:] = g * (sum_damped - sum_all)
        d_r2[:, first:rows, first:] = (0.375 * g) * (2.0 * sum_hz - hy / a - sum_hyz / a.square())
    return energy, d_r2, d_strength, d_damping


# --------------------------------------------------------------------------------------------------
# module
# --------------------------------------------------------------------------------------------------


def _integers(x: Tensor) -> Tensor:
    """Tables as integers, which casting a module to another floating-point type leaves alone."""
    assert float(x.abs().max()) * FIXED_POINT < 2**63
    return (x * FIXED_POINT).round().long()


class DFTD4(nn.Module):
    """Add the DFT-D4 energy to ``key_out``: dispersion that knows the charges of the atoms, and three-body terms.

    Charges come from electronegativity equilibration within each molecule, from the geometry and ``charge`` alone.
    As all atoms of a molecule share one linear system, memory is quadratic in its size, time cubic, as for the
    three-body energy: with forces, on one core, 200 atoms take 0.05 s, 1000 atoms 3 s and 1.2 GB, 2000 atoms half a
    minute and 2 GB, and beyond that D3 is the better choice. Pairs come from the molecules; a caller's neighbour matrix
    is not read. Crystals are not offered.

    With `nbops.first_order`, or where ``coord`` needs no gradient, triples are summed in blocks and nothing cubic is
    stored; otherwise all derivatives are right, and the graph holds every triple.

    Parameters
    ----------
    s8, a1, a2, s6, s9 : float
        Parameters of the functional (`aimnet2mult.dispersion_params.d4_parameters`); a2 in Bohr, s9 scales the
        three-body energy.
    key_out : str
        Energy (per molecule) that the dispersion energy is added to.
    ga, gc : float
        Height and steepness of the charge scaling.

    Attributes
    ----------
    cutoff_lr, cutoff_lr_periodic : float
        Range of the pair energy, Å.
    elements : list of int
        Atomic numbers with reference data, 1 to 103.

    Examples
    --------
    >>> parameters = dataclasses.asdict(d4_parameters("pbe"))
    >>> DFTD4(**parameters)({"coord": coord, "numbers": numbers, "charge": charge})["energy"]
    """

    element_table: Tensor
    reference_table: Tensor
    alpha_table: Tensor
    frequency_weights: Tensor

    def __init__(
        self,
        s8: float,
        a1: float,
        a2: float,
        s6: float = 1.0,
        s9: float = 1.0,
        key_out: str = "energy",
        ga: float = 3.0,
        gc: float = 2.0,
    ) -> None:
        super().__init__()
        self.s6, self.s8, self.s9 = float(s6), float(s8), float(s9)
        self.a1, self.a2 = float(a1), float(a2)
        self.ga, self.gc = float(ga), float(gc)
        self.key_out = key_out

        self.bohr = BOHR_ANGSTROM
        self.hartree = HARTREE_EV
        self.steepness = COUNTING_STEEPNESS
        self.largest_cn = LARGEST_EEQ_CN
        self.k4, self.k5, self.k6 = ELECTRONEGATIVITY_WEIGHT
        self.exponent = WEIGHTING_FACTOR
        self.atm_power = ATM_EXPONENT / 3.0
        self.pair_cutoff = PAIR_CUTOFF_BOHR
        self.triple_cutoff = TRIPLE_CUTOFF_BOHR
        self.counting_cutoff = COUNTING_CUTOFF_BOHR
        self.smallest_cn = SMALLEST_CN
        self.smallest_charge = SMALLEST_EFFECTIVE_CHARGE
        self.fixed_point = FIXED_POINT
        self.block_triples = BLOCK_TRIPLES
        self.group_pairs = GROUP_PAIRS
        self.masked_distance = nbops.MASKED_DISTANCE
        self.cutoff_lr = PAIR_CUTOFF_BOHR * BOHR_ANGSTROM
        self.molecules_only = True
        self.cutoff_lr_periodic = self.cutoff_lr

        data, d3 = torch.load(D4_DATA, weights_only=True), torch.load(D3_DATA, weights_only=True)
        self.max_element = data["hardness"].shape[0] - 1
        self.elements = list(range(1, self.max_element + 1))
        tables = (element_table(data, d3), *reference_tables(data, self.ga, self.gc))
        for name, table in zip(("element_table", "reference_table", "alpha_table"), tables, strict=True):
            self.register_buffer(name, _integers(table), persistent=False)
        frequencies = torch.tensor(FREQUENCIES, dtype=torch.float64)
        self.register_buffer("frequency_weights", _integers(trapezoid_weights(frequencies)), persistent=False)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add to ``key_out``, or set it.

        Raises
        ------
        ValueError
            A cell, or an element without reference data.
        """
        if "cell" in data:
            raise ValueError(
                "DFT-D4 is offered for molecules only, the batch has a cell: leave it out, or compile the model with D3"
            )
        self.check_elements(data["numbers"])
        coord, numbers, charge = data["coord"], data["numbers"], data["charge"]
        if nbops.is_flat(data):
            energy = self.flat_energy(coord, numbers, charge, data["mol_idx"], nbops.first_order(data))
        else:
            energy = self.energy(coord, numbers, charge, nbops.first_order(data))
        energy = self.hartree * energy
        if self.key_out in data:
            energy = data[self.key_out] + energy
        data[self.key_out] = energy
        return data

    def check_elements(self, numbers: Tensor) -> None:
        """Raise a ValueError for an element without reference data. Waits for the device, once."""
        if numbers.numel() > 0:
            wrong = (numbers < 0) | (numbers > self.max_element)
            largest = int(torch.where(wrong, numbers, torch.zeros_like(numbers)).abs().max().item())
            if largest > 0:
                raise ValueError(
                    f"DFT-D4 has reference data for the elements 1 to {self.max_element}, not for {largest}"
                )

    def flat_energy(self, coord: Tensor, numbers: Tensor, charge: Tensor, mol_idx: Tensor, first_order: bool) -> Tensor:
        """Energies (B,) of a flat batch, Hartree: consecutive molecules together as a padded batch.

        The sizes of the molecules are read from the device here, once per call.
        """
        n_mol = charge.shape[0]
        counts = torch.bincount(mol_idx, minlength=n_mol)
        first_row = counts.cumsum(0) - counts
        sizes: list[int] = counts.tolist()
        energies: list[Tensor] = []
        first = 0
        while first < n_mol:
            n_places, last = sizes[first], first + 1
            while last < n_mol and (last + 1 - first) * max(n_places, sizes[last]) ** 2 <= self.group_pairs:
                n_places = max(n_places, sizes[last])
                last += 1
            places = torch.arange(n_places, device=coord.device)
            inside = places < counts[first:last].unsqueeze(1)
            rows = (first_row[first:last].unsqueeze(1) + places).clamp(max=max(coord.shape[0] - 1, 0))
            group_numbers = numbers[rows].masked_fill(~inside, 0)
            energies.append(self.energy(coord[rows], group_numbers, charge[first:last], first_order))
            first = last
        return torch.cat(energies) if n_mol > 0 else torch.zeros_like(charge).double()

    def energy(self, coord: Tensor, numbers: Tensor, charge: Tensor, first_order: bool = False) -> Tensor:
        """Energies of a padded batch of molecules.

        Parameters
        ----------
        coord : Tensor
            (B, N, 3) Å.
        numbers : Tensor
            (B, N) atomic numbers, 0 for padding.
        charge : Tensor
            (B,) total charges, e.
        first_order : bool
            First derivatives by ``coord`` are all that will be taken.

        Returns
        -------
        Tensor
            (B,) Hartree, float64.
        """
        real = numbers > 0
        n_atoms = real.shape[1]
        pairs = real.unsqueeze(2) & real.unsqueeze(1)
        pairs = pairs & ~torch.eye(n_atoms, dtype=torch.bool, device=pairs.device)
        r_ij = coord.double().unsqueeze(1) - coord.double().unsqueeze(2)
        # Replace the vector, not the distance: the norm at zero has no second derivative, masked afterwards or not.
        outside = torch.tensor([self.masked_distance, 0.0, 0.0], dtype=r_ij.dtype, device=r_ij.device)
        r2 = torch.where(pairs.unsqueeze(3), r_ij, outside).square().sum(dim=3) / self.bohr**2
        d_ij = r2.sqrt()

        atoms = self.element_table[numbers].double() / self.fixed_point
        cn, cn_eeq = self.coordination_numbers(d_ij, pairs, atoms)
        q = eeq_charges(d_ij, pairs, real, cn_eeq, charge.double(), atoms[:, :, 5:], self.smallest_cn)
        c6, c6_uncharged = self.c6_coefficients(numbers, atoms, cn, q)
        root_q = atoms[:, :, 2]
        c8_ratio = 3.0 * root_q.unsqueeze(2) * root_q.unsqueeze(1)

        e_ij = rational_damping_energy(d_ij, c6, c8_ratio, self.s6, self.s8, self.a1, self.a2)
        energy = 0.5 * e_ij.masked_fill(~pairs | (d_ij > self.pair_cutoff), 0.0).sum(dim=[1, 2])
        if self.s9 == 0.0:
            return energy
        triangle_sides = pairs & (d_ij <= self.triple_cutoff)
        radius = self.a1 * c8_ratio.sqrt() + self.a2
        dtype = coord.dtype
        if first_order or not coord.requires_grad:
            e_atm = self.first_order_atm(r2, c6_uncharged, radius, triangle_sides, dtype)
        else:
            strength, damping = self.triangle_factors(r2, c6_uncharged, radius, triangle_sides)
            e_atm = atm_energy(r2.to(dtype), strength.to(dtype), damping.to(dtype))
        return energy + self.s9 * e_atm

    def coordination_numbers(self, d_ij: Tensor, pairs: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Coordination numbers of D4 and of EEQ, (B, N) each, from distances (Bohr) and rows of the element table."""
        radius, electronegativity = atoms[:, :, 0], atoms[:, :, 1]
        count = erf_count(d_ij, radius.unsqueeze(2) + radius.unsqueeze(1), self.steepness)
        count = count.masked_fill(~pairs | (d_ij > self.counting_cutoff), 0.0)
        difference = (electronegativity.unsqueeze(2) - electronegativity.unsqueeze(1)).abs()
        weight = self.k4 * torch.exp(-(difference + self.k5).square() / self.k6)
        return (weight * count).sum(dim=2), limited_cn(count.sum(dim=2), self.largest_cn)

    def c6_coefficients(self, numbers: Tensor, atoms: Tensor, cn: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """C6 of all pairs with the charges q, and without charges, (B, N, N) each, Eh·a0⁶."""
        references = self.reference_table[numbers].double() / self.fixed_point
        alpha = self.alpha_table[numbers].double() / self.fixed_point
        frequency_weights = self.frequency_weights.double() / self.fixed_point
        reference_cn, n_gaussians, q_ref = references.unbind(-1)
        weights = gaussian_weights(cn.unsqueeze(-1), reference_cn, n_gaussians, self.exponent)
        z, steepness = atoms[:, :, 3:4], self.gc * atoms[:, :, 4:5]
        c6: list[Tensor] = []
        for charges in [q, torch.zeros_like(q)]:
            zeta = charge_scaling(charges.unsqueeze(-1), q_ref, z, self.ga, steepness, self.smallest_charge)
            polarizability = torch.matmul((weights * zeta).unsqueeze(2), alpha).squeeze(2)
            c6.append(casimir_polder_c6(polarizability, frequency_weights))
        return c6[0], c6[1]

    def triangle_factors(self, r2: Tensor, c6: Tensor, radius: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """What a side contributes to a triangle: √C6 / r³, zero where it is none, and (R0/r)^{16/3}."""
        root_c6 = torch.where(sides, c6, torch.ones_like(c6)).sqrt().masked_fill(~sides, 0.0)
        return root_c6 * r2.pow(-1.5), (radius.square() / r2).pow(0.5 * self.atm_power)

    def first_order_atm(self, r2: Tensor, c6: Tensor, radius: Tensor, sides: Tensor, dtype: torch.dtype) -> Tensor:
        """Three-body energies (B,), Hartree, whose first derivatives by ``r2`` and ``c6`` are right."""
        r2_, c6_ = r2.detach(), c6.detach()
        strength, damping = self.triangle_factors(r2_, c6_, radius, sides)
        block = self.block_triples * (64 if r2.is_cuda else 1)
        energy, d_r2, d_strength, d_damping = atm_energy_and_derivatives(
            r2_.to(dtype), strength.to(dtype), damping.to(dtype), block
        )
        if not r2.requires_grad:
            return energy
        # ln strength = ½ ln C6 - 3/2 ln r², ln damping = const - ½·16/3 ln r²
        d_r2 = d_r2.double() - (1.5 * d_strength.double() + 0.5 * self.atm_power * d_damping.double()) / r2_
        d_c6 = 0.5 * d_strength.double() / torch.where(sides, c6_, torch.ones_like(c6_))
        return energy + ((r2 - r2_) * d_r2 + (c6 - c6_) * d_c6).sum(dim=[1, 2])


# --------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------


def element_table(data: dict[str, Tensor], d3: dict[str, Tensor]) -> Tensor:
    """Collect what the model knows of each element, a row each.

    Parameters
    ----------
    data, d3 : dict
        Contents of the data files of D4 and D3.

    Returns
    -------
    Tensor
        (Z + 1, 9) float64: covalent radius (Bohr, with its factor 4/3), electronegativity, √(½ √Z <r⁴>/<r²>),
        effective nuclear charge, hardness, and the four parameters of EEQ. Row 0, for padding, holds ones, which keep
        every function finite.
    """
    z = torch.arange(data["hardness"].shape[0], dtype=torch.float64)
    columns = [
        d3["radius"].double() * COUNTING_RADIUS_BOHR_PER_PM,
        data["electronegativity"],
        (0.5 * z.sqrt() * d3["r4r2"].double() / DECIMALS).sqrt(),
        data["effective_charge"].double(),
        data["hardness"],
        *data["eeq"].unbind(1),
    ]
    table = torch.stack(columns, dim=1)
    table[0] = 1.0
    return table


def reference_tables(data: dict[str, Tensor], ga: float, gc: float) -> tuple[Tensor, Tensor]:
    """Arrange the references by element, and take out of their polarizabilities what belongs to other atoms.

    α_ref = share · (α_molecule - n · α_partner · ζ(q_partner, 0)), not less than zero: Eq. 7 of E. Caldeweyher,
    C. Bannwarth, S. Grimme, J. Chem. Phys. 147, 034112 (2017), doi:10.1063/1.4993215.

    Parameters
    ----------
    data : dict
        Content of the data file of D4.
    ga, gc : float
        Parameters of the charge scaling.

    Returns
    -------
    references : Tensor
        (Z + 1, K, 3) float64, K references of each element: coordination number, number of Gaussians (0 for an
        unused place), charge. Padding has one reference.
    alpha : Tensor
        (Z + 1, K, F) float64, polarizabilities at F frequencies, a0³.
    """
    element, partner = data["element"].long(), data["partner"].long()
    zeta = charge_scaling(
        data["partner_charge"],
        torch.zeros_like(data["partner_charge"]),
        data["effective_charge"].double()[partner],
        ga,
        gc * data["hardness"][partner],
        SMALLEST_EFFECTIVE_CHARGE,
    )
    of_partners = (data["n_partners"] * zeta).unsqueeze(1) * data["partner_alpha"][partner]
    rows = (data["share"].unsqueeze(1) * (data["alpha"] - of_partners)).clamp(min=0.0)

    counts = torch.bincount(element, minlength=data["hardness"].shape[0])
    place = torch.arange(element.shape[0]) - (counts.cumsum(0) - counts)[element]
    shape = (counts.shape[0], int(counts.max()))
    references, alpha = torch.zeros(*shape, 3).double(), torch.zeros(*shape, rows.shape[1]).double()
    references[element, place] = torch.stack([data["cn"], data["n_gaussians"].double(), data["charge"]], dim=1)
    alpha[element, place] = rows
    references[0, 0, 1] = 1.0
    return references, alpha
