"""London dispersion: DFT-D3(BJ). The variant with values from the network is in `aimnet2mult.dispersion_ts`.

The two-body energy of both is

    E = -½ Σ_{i≠j} C6_ij [ s6 / (r⁶ + R0⁶) + s8 · 3 q_i q_j / (r⁸ + R0⁸) ],    R0 = a1 √(3 q_i q_j) + a2,

S. Grimme, S. Ehrlich, L. Goerigk, J. Comput. Chem. 32, 1456 (2011), doi:10.1002/jcc.21759, with
q_Z = √(½ √Z <r⁴>/<r²>). Functions take and give atomic units; the modules read Å and write eV. The three-body
term that DFT-D3 can have is in `aimnet2mult.dispersion_atm`, parameters of functionals in
`aimnet2mult.dispersion_params`.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aimnet2mult import dispersion_atm as atm
from aimnet2mult import nbops
from aimnet2mult.interfaces import Pairs, PairSource
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

TRIPLE_CUTOFF_BOHR = 40.0
"""Longest side of a triangle in the three-body energy of the program s-dftd3, Bohr."""

VDW_SCALE = 4.0 / 3.0
"""Van der Waals radii in the damping of the three-body energy are multiplied by this."""

TRIPLE_DAMPING_EXPONENT = 16.0 / 3.0
"""Power of R/r in the damping of the three-body energy: a third of α = 14, plus 2 as in the program s-dftd3."""

RADIUS_BOHR_PER_ANGSTROM = 1.0 / 0.529177210903
"""Tables of radii are in Å, and the programs that define D3 read them with the Bohr of CODATA 2018."""

# 4/3 times the covalent radii of Pyykkö and Atsumi (metals: minus 10 %). The table is in pm.
COUNTING_RADIUS_BOHR_PER_PM = 4.0 / 3.0 * 0.01 * RADIUS_BOHR_PER_ANGSTROM
"""From the stored covalent radii to those of the counting function, Bohr."""

BLOCK_PAIRS = 2**16
"""Pairs in a block on a CPU: the arrays of a block stay in its cache."""

BLOCK_PAIRS_GPU = 2**22
"""Pairs in a block on a GPU, which wants few and large operations."""

KEPT_PAIRS = 2**23
"""Up to so many pairs, their distances are kept between sweeps over the pairs instead of computed again."""

NO_REFERENCE = 1000.0
"""Coordination number in the place of a reference that there is not: its weight is zero in any precision."""

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


def reference_weights(cn: Tensor, reference_cn: Tensor, exponent: float) -> Tensor:
    """Weight of each reference in an atom: exp(-k3 (CN - CN_ref)²), normalised over the references of its element.

    Normalising in log space (softmax) keeps the weights of an over-coordinated atom finite, where each Gaussian by
    itself is zero to machine precision.

    Parameters
    ----------
    cn : Tensor
        (..., 1) coordination numbers.
    reference_cn : Tensor
        (..., S) coordination numbers of the references; `NO_REFERENCE` where there is none, at least one is.
    exponent : float
        k3.

    Returns
    -------
    Tensor
        (..., S), sums to one over S.
    """
    return torch.softmax(-exponent * (cn - reference_cn).square(), dim=-1)


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
    r0_squared = (a1 * c8_ratio.sqrt() + a2).square()
    r0_6 = r0_squared * r0_squared * r0_squared
    return -c6_ij * rational_damping(d_ij, r0_6, r0_6 * r0_squared, s6, s8 * c8_ratio)


def rational_damping(d_ij: Tensor, r0_6: Tensor, r0_8: Tensor, s6: float, s8_ratio: Tensor) -> Tensor:
    """The bracket of the module docstring, with what does not depend on the distance worked out before.

    Parameters
    ----------
    d_ij : Tensor
        Distances, any shape, Bohr.
    r0_6, r0_8 : Tensor
        R0⁶ and R0⁸, a0⁶ and a0⁸.
    s6 : float
        s6.
    s8_ratio : Tensor
        s8 times C8/C6, a0².

    Returns
    -------
    Tensor
        Shape of ``d_ij``, a0⁻⁶.
    """
    r2 = d_ij.square()
    r4 = r2.square()
    return s6 / (r4 * r2 + r0_6) + s8_ratio / (r4.square() + r0_8)


def rational_damping_derivative(
    d_ij: Tensor, r0_6: Tensor, r0_8: Tensor, s6: float, s8_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """`rational_damping` and its derivative by the distance, over the distance (a0⁻⁸). Keeps no graph.

    Arrays made here are written into: most of the time goes into moving them.
    """
    r2 = d_ij.square()
    r4 = r2.square()
    sixth = torch.addcmul(r0_6, r4, r2).reciprocal_()
    eighth = torch.addcmul(r0_8, r4, r4).reciprocal_()
    scaled = s8_ratio * eighth
    bracket = torch.add(scaled, sixth, alpha=s6)
    slope = sixth.square_().mul_(-6.0 * s6)
    return bracket, slope.addcmul_(scaled.mul_(eighth), r2, value=-8.0).mul_(r4)


def quintic_switch(d_ij: Tensor, start: float, end: float) -> Tensor:
    """One up to ``start``, zero from ``end``, 1 - 10t³ + 15t⁴ - 6t⁵ between them; two continuous derivatives."""
    t = ((d_ij - start) / (end - start)).clamp(0.0, 1.0)
    return 1.0 - t * t * t * (10.0 - 15.0 * t + 6.0 * t * t)


def quintic_switch_derivative(d_ij: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """`quintic_switch` and its derivative by the distance."""
    t = ((d_ij - start) / (end - start)).clamp(0.0, 1.0)
    slope = -30.0 / (end - start) * (t * (1.0 - t)).square()
    return 1.0 - t * t * t * (10.0 - 15.0 * t + 6.0 * t * t), slope


# --------------------------------------------------------------------------------------------------
# pairs in blocks
# --------------------------------------------------------------------------------------------------


def atom_values(x: Tensor, index: Tensor) -> Tensor:
    """Values of atoms (n,) at the places ``index`` of any shape."""
    return x.index_select(0, index.flatten()).view(index.shape)


def is_rectangle(block: nbops.PairBlock) -> bool:
    """Tell whether all rows of the block meet all of its columns, each pair of atoms once and in one order."""
    return block.i.dim() == 2 and block.weight == 1.0


def mask_within(block: nbops.PairBlock, cutoff: float, searched: float) -> Tensor:
    """One for the pairs closer than ``cutoff``, of those closer than ``searched`` (Å), else zero, dtype of ``d_ij``.

    A factor costs a quarter of what filling by a mask does, and the functions here are finite for masked pairs.
    """
    mask = block.mask & (block.d_ij < cutoff) if cutoff < searched else block.mask
    return mask.to(block.d_ij.dtype)


def sum_over_j(x_ij: Tensor, block: nbops.PairBlock, n_atoms: int) -> Tensor:
    """Sum for each atom i of a block, (n_atoms,) float64; ``x_ij`` must be zero where there is no pair."""
    rows = x_ij.sum(dim=-1, dtype=torch.float64) if x_ij.dim() > 1 else x_ij.double()
    if x_ij.dim() == 3:
        return rows.flatten()
    return torch.zeros([n_atoms], dtype=torch.float64, device=x_ij.device).index_add(0, block.i.flatten(), rows)


def sum_over_i(x_ij: Tensor, block: nbops.PairBlock, n_atoms: int) -> Tensor:
    """Sum for each atom j of a rectangle or a list, as `sum_over_j`."""
    columns = x_ij.sum(dim=0, dtype=torch.float64) if x_ij.dim() == 2 else x_ij.double()
    return torch.zeros([n_atoms], dtype=torch.float64, device=x_ij.device).index_add(0, block.j.flatten(), columns)


def pair_gradient(along: Tensor, block: nbops.PairBlock, coord: Tensor) -> Tensor:
    """Derivative by the positions of the sum of a function of the distances.

    Parameters
    ----------
    along : Tensor
        Derivative of the function over the distance; zero where there is no pair.
    block : PairBlock
        The pairs.
    coord : Tensor
        (n, 3) positions.

    Returns
    -------
    Tensor
        (n, 3) float64.
    """
    total = torch.zeros_like(coord, dtype=torch.float64)
    if is_rectangle(block):
        # Σ_j t_ij (x_j - x_i) as matrix products, with the origin in the middle of the rows to lose no digits.
        x_i, x_j = coord.index_select(0, block.i.flatten()), coord.index_select(0, block.j.flatten())
        origin = x_i.mean(dim=0, keepdim=True)
        x_i, x_j = x_i - origin, x_j - origin
        of_i = x_i * along.sum(dim=1, keepdim=True) - along @ x_j
        of_j = x_j * along.sum(dim=0).unsqueeze(1) - along.t() @ x_i
        return total.index_add(0, block.i.flatten(), of_i.double()).index_add(0, block.j.flatten(), of_j.double())
    vector = along * block.r_ij
    if block.i.dim() == 1:
        # By axes, and without the argument alpha: other ways take several times as long.
        vector, by_axis = vector.double(), total.t().contiguous()
        return (by_axis.index_add(1, block.j, vector) - by_axis.index_add(1, block.i, vector)).t()
    of_i = -vector.sum(dim=-1, dtype=torch.float64).flatten(1).t()
    return of_i if block.i.dim() == 3 else total.index_add(0, block.i.flatten(), of_i)


def pair_virial(along: Tensor, block: nbops.PairBlock, data: dict[str, Tensor]) -> Tensor:
    """Σ r_ij (dE/dr_ij)ᵀ of the pairs of a flat batch, (B, 3, 3) float64; see `pair_gradient`."""
    n_mol = nbops.n_molecules(data)
    r_ij = block.r_ij.flatten(1)
    weighted = block.weight * (along * block.r_ij).flatten(1)
    if n_mol == 1:
        return (weighted.double() @ r_ij.double().t()).unsqueeze(0)
    molecule = data["mol_idx"].index_select(0, block.i.flatten()).view(block.i.shape)
    molecule = molecule.expand(along.shape).flatten()
    products = (weighted.unsqueeze(1) * r_ij.unsqueeze(0)).double().flatten(0, 1)
    total = torch.zeros([9, n_mol], dtype=torch.float64, device=along.device).index_add(1, molecule, products)
    return total.t().view(n_mol, 3, 3)


# --------------------------------------------------------------------------------------------------
# modules
# --------------------------------------------------------------------------------------------------


class RationalDispersion(nn.Module):
    """What the two dispersion modules share: damping parameters, <r⁴>/<r²>, and adding up energies.

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
    pair_source: PairSource

    def __init__(self, s8: float, a1: float, a2: float, s6: float, key_out: str, r4r2: Tensor) -> None:
        super().__init__()
        self.pair_source = Pairs()
        self.s6, self.s8, self.a1, self.a2 = float(s6), float(s8), float(a1), float(a2)
        self.key_out = key_out
        self.bohr = BOHR_ANGSTROM
        self.hartree = HARTREE_EV
        self.decimals = DECIMALS
        self.block_pairs, self.block_pairs_gpu = BLOCK_PAIRS, BLOCK_PAIRS_GPU
        self.register_buffer("r4r2", r4r2, persistent=False)
        self.max_element = r4r2.shape[0] - 1
        self.elements = list(range(1, self.max_element + 1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in PUBLISHED_TABLES:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def pairs_in_block(self, data: dict[str, Tensor]) -> int:
        """Pairs, or triangles, in a block: what suits the cache of a CPU, or a GPU."""
        return self.block_pairs_gpu if data["coord"].is_cuda else self.block_pairs

    def search(self, data: dict[str, Tensor], cutoff: float) -> nbops.LongRangePairs:
        """Prepare the pairs closer than ``cutoff`` (Å) in blocks."""
        return self.pair_source.search(data, cutoff, self.pairs_in_block(data))

    def r4r2_charge(self) -> Tensor:
        """Return q of each atomic number, (Z + 1,) float64, a0: C8/C6 of a pair is 3 q_i q_j."""
        r4r2 = self.r4r2.double() / self.decimals
        z = torch.arange(r4r2.shape[0], dtype=r4r2.dtype, device=r4r2.device)
        return (0.5 * z.sqrt() * r4r2).sqrt()

    def add_energy(self, energy: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add an energy (B,), eV, to ``key_out``."""
        data[self.key_out] = data[self.key_out] + energy if self.key_out in data else energy
        return data


class ElementTables(NamedTuple):
    """What the model needs of some elements, float64 where not said otherwise.

    The references of the elements stand in one row of K columns, sorted by element. The last column belongs to no
    reference; its C6 are zero. With it, each element has the same number S of columns. The first of the E elements is
    padding (Z = 0), the reference of which has no dispersion; the last stands for all that are not known, and its
    radius and coordination numbers are NaN.

    Attributes
    ----------
    place
        (Z + 1,) int64: place of an element among the E.
    columns
        (E, S) int64: columns of the references of an element.
    cn
        (E, S): their coordination numbers; `NO_REFERENCE` in columns without one.
    c6
        (K, K): C6 of two references, Eh·a0⁶.
    radius
        (E,): covalent radius in the counting function, Å.
    damping
        (4, E, E): R0⁶, R0⁸ and s8 times C8/C6 of a pair, and R^{16/3} of the side of a triangle; powers of a0.
    """

    place: Tensor
    columns: Tensor
    cn: Tensor
    c6: Tensor
    radius: Tensor
    damping: Tensor


class PairConstants(NamedTuple):
    """What the damping of pairs is made of, by elements.

    Attributes
    ----------
    tables
        (4, E, E): see `ElementTables`.
    place
        (n,) int64: element of each atom of the flattened batch, as a place among the E.
    member
        (n, E): one where the atom is of the element, else zero.
    """

    tables: Tensor
    place: Tensor
    member: Tensor


class AtomWeights(NamedTuple):
    """What C6 = W C6_ref Wᵀ is made of, for the n atoms of a flattened batch; or the same with other numbers for W.

    Attributes
    ----------
    place
        (n,) int64: element, as a place among the E.
    own
        (S, n): weights of the references of the atom's element.
    row
        (n, K): the weights, in the columns where they belong.
    averaged
        (n, K): C6 of the atom with each reference, the average over its own, Eh·a0⁶.
    grouped
        (S, n·E): the same by elements; column n·E + e belongs to atom n and element e. Only where lists of
        pairs need it.
    """

    place: Tensor
    own: Tensor
    row: Tensor
    averaged: Tensor
    grouped: Tensor


class Derivatives(NamedTuple):
    """Energy of a batch and its first derivatives, all float64.

    Attributes
    ----------
    energy
        (B,) eV.
    coord
        (n, 3) derivative by the positions of the flattened batch, eV/Å.
    virial
        (B, 3, 3) Σ over pairs of r_ij (dE/dr_ij)ᵀ, eV; (0, 3, 3) if nobody asked for it.
    """

    energy: Tensor
    coord: Tensor
    virial: Tensor


def element_pairs(x: PairConstants, block: nbops.PairBlock) -> tuple[Tensor, Tensor, Tensor]:
    """R0⁶, R0⁸ and s8 times C8/C6 of the pairs of a block."""
    tables = x.tables[:3]
    if block.i.dim() < 3 and not is_rectangle(block):
        pair = atom_values(x.place, block.i) * x.member.shape[1] + atom_values(x.place, block.j)
        r0_6, r0_8, s8_ratio = tables.flatten(1).unbind(0)
        return atom_values(r0_6, pair), atom_values(r0_8, pair), atom_values(s8_ratio, pair)
    # A matrix product with zeros and ones is quicker than look-ups.
    of_i = tables[:, atom_values(x.place, block.i.squeeze(-1))]
    r0_6, r0_8, s8_ratio = (of_i @ x.member[block.j.squeeze(-2)].transpose(-1, -2)).unbind(0)
    return r0_6, r0_8, s8_ratio


def pair_products(x: AtomWeights, y: AtomWeights, block: nbops.PairBlock, back: bool) -> Tensor:
    """x_i C6_ref y_jᵀ of the pairs of a block; with ``back`` (rectangles and lists) x_j C6_ref y_iᵀ."""
    if block.i.dim() == 3:
        shape = [block.i.shape[0], block.i.shape[1], x.row.shape[1]]
        return x.averaged.view(shape) @ y.row.view(shape).transpose(1, 2)
    if is_rectangle(block):
        i, j = block.i.flatten(), block.j.flatten()
        if back:
            return y.row.index_select(0, i) @ x.averaged.index_select(0, j).t()
        return x.averaged.index_select(0, i) @ y.row.index_select(0, j).t()
    a, b = (block.j, block.i) if back else (block.i, block.j)
    n_elements = x.grouped.shape[1] // max(1, x.place.shape[0])
    column = a * n_elements + atom_values(y.place, b)
    total = atom_values(x.grouped[0], column) * atom_values(y.own[0], b)
    for s in range(1, y.own.shape[0]):
        total = torch.addcmul(total, atom_values(x.grouped[s], column), atom_values(y.own[s], b))
    return total


class TripleDerivatives(NamedTuple):
    """Three-body energy of a batch and its derivatives, float64, Hartree and Å.

    Attributes
    ----------
    energy
        (n,) by the first corner.
    sides
        (3, P + 1) by the sides from the first corner, at fixed coordination numbers.
    cn
        (n,) by the coordination numbers.
    """

    energy: Tensor
    sides: Tensor
    cn: Tensor


class DFTD3(RationalDispersion):
    """Add the DFT-D3(BJ) energy to ``key_out``, without or with the three-body term.

    S. Grimme, J. Antony, S. Ehrlich, H. Krieg, J. Chem. Phys. 132, 154104 (2010), doi:10.1063/1.3382344: C6 of a
    pair is the average of the C6 of its references, weighted by how near their coordination numbers are. The
    weights are products of one factor per atom, so with the references of all elements of the batch as columns,
    C6 = W C6_ref Wᵀ, two matrix products instead of a sum over 49 terms for each pair.

    Arithmetic is in the dtype of ``coord``, sums over blocks of pairs and over atoms in float64. In flat layout no
    more than a block of pairs is in memory where first derivatives are enough (`nbops.first_order`).

    Parameters
    ----------
    s8, a1, a2, s6 : float
        Damping parameters; a2 in Bohr.
    s9 : float
        Factor of the three-body energy (`aimnet2mult.dispersion_atm`), usually 1 if it is wanted. Its time grows with
        the cube of the number of atoms, up to the range of 40 Bohr; memory with the number of pairs in that range.
    key_out : str
        Energy (per molecule).
    cutoff : float, optional
        Range of the pairs, Å. By default 60 Bohr without a switch, which is what the program s-dftd3 does.
    smoothing_fraction : float
        With a ``cutoff``, the energy of a pair is switched off over this fraction of it, before it. Triangles are
        not concerned.

    Attributes
    ----------
    cutoff_lr, cutoff_lr_periodic : float
        Range of the pairs, Å.
    smoothing_on : float
        Distance at which switching begins, Å; not less than ``cutoff_lr`` for none.
    elements : list of int
        Atomic numbers with reference data, 1 to 103, or those given to `set_species`.
    """

    pair_source: PairSource
    c6: Tensor
    cn: Tensor
    element: Tensor
    radius: Tensor
    vdw: Tensor
    fixed_place: Tensor
    fixed_columns: Tensor
    fixed_cn: Tensor
    fixed_c6: Tensor
    fixed_radius: Tensor
    fixed_damping: Tensor
    first_reference: list[int]

    def __init__(
        self,
        s8: float,
        a1: float,
        a2: float,
        s6: float = 1.0,
        s9: float = 0.0,
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
        vdw = torch.zeros(self.max_element + 1, self.max_element + 1, dtype=torch.int32)
        rows, columns = torch.tril_indices(self.max_element, self.max_element).unbind(0)
        vdw[rows + 1, columns + 1] = tables["vdw"]
        vdw[columns + 1, rows + 1] = tables["vdw"]
        self.register_buffer("vdw", vdw, persistent=False)
        counts = torch.bincount(self.element, minlength=self.max_element + 1)
        self.first_reference = [0, *counts.cumsum(0).tolist()]
        self.has_species = False
        for name in ElementTables._fields:
            self.register_buffer(f"fixed_{name}", torch.zeros(0, dtype=torch.int64), persistent=False)

        self.s9 = float(s9)
        self.no_reference = NO_REFERENCE
        self.triple_cutoff = TRIPLE_CUTOFF_BOHR * BOHR_ANGSTROM
        self.vdw_unit = VDW_SCALE * RADIUS_BOHR_PER_ANGSTROM / DECIMALS
        self.triple_exponent = TRIPLE_DAMPING_EXPONENT

        self.steepness = COUNTING_STEEPNESS
        self.exponent = WEIGHTING_FACTOR
        self.radius_unit = COUNTING_RADIUS_BOHR_PER_PM
        self.counting_cutoff = COUNTING_CUTOFF_BOHR * BOHR_ANGSTROM
        self.kept_pairs = KEPT_PAIRS
        if cutoff is None:
            self.set_cutoff(PAIR_CUTOFF_BOHR * BOHR_ANGSTROM, 0.0)
        else:
            self.set_cutoff(cutoff, smoothing_fraction)

    @torch.jit.export
    def set_cutoff(self, cutoff: float, smoothing_fraction: float = 0.2) -> None:
        """Set the range of the pairs (Å) and the fraction of it, at its end, over which they are switched off.

        Pairs are searched for up to 40 Bohr (21.2 Å) all the same, for the coordination numbers: a range of 21 Å
        takes a fifth of the time of the default, a shorter one saves nothing more.

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

    @torch.jit.unused
    def set_species(self, species: list[int]) -> None:
        """Fix the elements that will come, so that `forward` need not read which ones there are.

        Any other element then has the dispersion energy NaN: whoever knows the elements of the model refuses it first.

        Parameters
        ----------
        species : list of int
            Atomic numbers, in any order.

        Raises
        ------
        ValueError
            No element at all, or one without reference data.
        """
        elements = sorted(set(species))
        if not elements or elements[0] < 1:
            raise ValueError(f"species must be atomic numbers from 1 on, at least one, not {species}")
        # The bits of floating-point numbers as integers, so that casting the module does not touch them.
        for name, table in self.tables_of([0, *elements])._asdict().items():
            setattr(self, f"fixed_{name}", table.view(torch.int64))
        self.elements = elements
        self.has_species = True

    def tables_of(self, elements: list[int]) -> ElementTables:
        """Tables of these elements, sorted and with 0 (padding) among them.

        Raises
        ------
        ValueError
            An element without reference data.
        """
        index: list[int] = []
        width = 0
        for z in elements:
            if z < 0 or z > self.max_element:
                raise ValueError(f"DFT-D3 has reference data for the elements 1 to {self.max_element}, not for {z}")
            first, end = self.first_reference[z], self.first_reference[z + 1]
            width = max(width, end - first)
            index.extend(list(range(first, end)))
        place: list[int] = []
        for _ in range(self.max_element + 1):
            place.append(len(elements))
        columns: list[int] = []
        n_columns = 0
        for k, z in enumerate(elements):
            place[z] = k
            count = self.first_reference[z + 1] - self.first_reference[z]
            for s in range(width):
                columns.append(n_columns + s if s < count else len(index))
            n_columns += count
        for _ in range(width):
            columns.append(len(index))

        device = self.c6.device
        kept = torch.tensor(index, dtype=torch.long, device=device)
        chosen = torch.tensor(elements, dtype=torch.long, device=device)
        columns_of = torch.tensor(columns, dtype=torch.long, device=device).view(-1, width)
        pad = torch.nn.functional.pad
        cn = pad(self.cn[kept].double() / self.decimals, [0, 1], value=self.no_reference)[columns_of]
        cn[-1] = math.nan
        q = self.r4r2_charge()[chosen]
        ratio = 3.0 * q.unsqueeze(1) * q
        r0 = self.a1 * ratio.sqrt() + self.a2
        side = (self.vdw[chosen][:, chosen].double() * self.vdw_unit).pow(self.triple_exponent)
        return ElementTables(
            torch.tensor(place, dtype=torch.long, device=device),
            columns_of,
            cn,
            pad(self.c6[kept][:, kept].double() / self.decimals, [0, 1, 0, 1]),
            pad(self.radius[chosen].double() * (self.radius_unit * self.bohr), [0, 1], value=math.nan),
            pad(torch.stack([r0**6, r0**8, self.s8 * ratio, side]), [0, 1, 0, 1]),
        )

    def tables_for(self, numbers: Tensor) -> ElementTables:
        """Tables of the elements in a batch, which are read from the device here, unless they are fixed."""
        if self.has_species:
            return ElementTables(
                self.fixed_place,
                self.fixed_columns,
                torch.view_copy(self.fixed_cn, dtype=torch.float64),
                torch.view_copy(self.fixed_c6, dtype=torch.float64),
                torch.view_copy(self.fixed_radius, dtype=torch.float64),
                torch.view_copy(self.fixed_damping, dtype=torch.float64),
            )
        elements: list[int] = torch.unique(torch.nn.functional.pad(numbers.flatten(), [0, 1])).tolist()
        return self.tables_of(elements)

    def pair_constants(self, place: Tensor, tables: ElementTables, dtype: torch.dtype) -> PairConstants:
        """What the damping of the pairs needs, for atoms whose elements stand at ``place``."""
        member = torch.eye(tables.radius.shape[0], dtype=dtype, device=place.device).index_select(0, place)
        return PairConstants(tables.damping.to(dtype), place, member)

    def kept_blocks(self, data: dict[str, Tensor], pairs: nbops.LongRangePairs) -> list[nbops.PairBlock]:
        """All blocks if they have no more than ``kept_pairs`` pairs together, else none."""
        blocks: list[nbops.PairBlock] = []
        if pairs.n_blocks * self.pairs_in_block(data) <= self.kept_pairs or pairs.n_blocks == 1:
            for k in range(pairs.n_blocks):
                blocks.append(self.pair_source.block(data, pairs, k))
        return blocks

    def block(
        self, data: dict[str, Tensor], pairs: nbops.LongRangePairs, kept: list[nbops.PairBlock], k: int
    ) -> nbops.PairBlock:
        """Pairs of a block, which may have been kept."""
        return kept[k] if len(kept) > 0 else self.pair_source.block(data, pairs, k)

    def counts(self, block: nbops.PairBlock, radius: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
        """What the pairs of a block add to coordination numbers, the sums of their radii (Å), and which count."""
        radius_ij = atom_values(radius, block.i) + atom_values(radius, block.j)
        count = counting_function(block.d_ij, radius_ij, self.steepness)
        return count, radius_ij, mask_within(block, self.counting_cutoff, cutoff)

    def coordination_numbers(
        self, data: dict[str, Tensor], pairs: nbops.LongRangePairs, kept: list[nbops.PairBlock], radius: Tensor
    ) -> Tensor:
        """Coordination number of each atom of the flattened batch, float64, from covalent radii, Å."""
        cn = torch.zeros([data["numbers"].numel()], dtype=torch.float64, device=radius.device)
        for k in range(pairs.n_blocks):
            block = self.block(data, pairs, kept, k)
            count, _, counted = self.counts(block, radius, pairs.cutoff)
            count = count * counted
            cn = cn + sum_over_j(count, block, cn.shape[0])
            if block.weight == 1.0:
                cn = cn + sum_over_i(count, block, cn.shape[0])
        return cn

    def in_columns(self, own: Tensor, place: Tensor, tables: ElementTables, by_element: bool) -> AtomWeights:
        """Weights (n, S), or their derivatives, with what is made of them."""
        n_atoms, n_columns = own.shape[0], tables.c6.shape[0]
        own_columns = tables.columns.index_select(0, place)
        row = torch.zeros([n_atoms, n_columns], dtype=own.dtype, device=own.device).scatter(1, own_columns, own)
        averaged = row @ tables.c6.to(own.dtype)
        grouped = averaged
        if by_element:
            grouped = averaged.index_select(1, tables.columns.t().flatten())
            grouped = grouped.view(n_atoms, own.shape[1], tables.columns.shape[0]).transpose(0, 1).flatten(1)
        return AtomWeights(place, own.t().contiguous(), row, averaged, grouped)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the dispersion energy.

        Parameters
        ----------
        data : dict
            Internal batch; ``numbers`` are plain atomic numbers.

        Returns
        -------
        dict
            ``data`` with ``key_out`` (B,) float64, eV.
        """
        if nbops.first_order(data):
            return self.add_energy(self.energy_with_first_derivatives(data), data)
        tables = self.tables_for(data["numbers"])
        dtype, place = data["coord"].dtype, tables.place.index_select(0, data["numbers"].flatten())
        radius = tables.radius.to(dtype).index_select(0, place)
        pairs = self.search(data, max(self.cutoff_lr, self.counting_cutoff))
        kept = self.kept_blocks(data, pairs)
        cn = self.coordination_numbers(data, pairs, kept, radius)
        reference_cn = tables.cn.to(dtype).index_select(0, place)
        own = reference_weights(cn.to(dtype).unsqueeze(1), reference_cn, self.exponent)
        atoms = self.in_columns(own, place, tables, nbops.is_flat(data) or self.s9 != 0.0)
        constants = self.pair_constants(place, tables, dtype)
        energy = torch.zeros_like(cn)
        for k in range(pairs.n_blocks):
            block = self.block(data, pairs, kept, k)
            r0_6, r0_8, s8_ratio = element_pairs(constants, block)
            bracket = rational_damping(block.d_ij / self.bohr, r0_6, r0_8, self.s6, s8_ratio)
            e_ij = -pair_products(atoms, atoms, block, False) * bracket
            if self.smoothing_on < self.cutoff_lr:
                e_ij = e_ij * quintic_switch(block.d_ij, self.smoothing_on, self.cutoff_lr)
            within = mask_within(block, self.cutoff_lr, pairs.cutoff)
            energy = energy + block.weight * sum_over_j(e_ij * within, block, cn.shape[0])
        if self.s9 != 0.0 and place.shape[0] > 0:
            sides = self.triangle_sides(data, pairs, kept)
            energy = energy + self.triple_energies(sides, atoms, constants)
        return self.add_energy(self.hartree * nbops.mol_sum(energy.view(data["numbers"].shape), data), data)

    def energy_with_first_derivatives(self, data: dict[str, Tensor]) -> Tensor:
        """Energy (B,), eV, with its derivatives by ``coord`` and ``cell`` attached."""
        result = self.derivatives(data)
        gradient = result.coord.view(data["coord"].shape)
        energy = nbops.attach_gradient(result.energy, data["coord"], gradient, data)
        if result.virial.shape[0] > 0:
            # Σ r_ij (dE/dr_ij)ᵀ = coordᵀ dE/dcoord + cellᵀ dE/dcell
            moments = data["coord"].detach().double().unsqueeze(2) * result.coord.unsqueeze(1)
            of_cell = result.virial - nbops.mol_sum(moments, data)
            cell_gradient = torch.linalg.solve(data["cell"].detach().double().transpose(1, 2), of_cell)
            energy = nbops.attach_cell_gradient(energy, data["cell"], cell_gradient)
        return energy

    @torch.jit.unused
    def energy_and_forces(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Energy of this term alone and its forces, by the derivatives written out.

        For worker processes that read data: one that was forked from a process that trains on a GPU cannot
        differentiate automatically.

        Parameters
        ----------
        data : dict
            Internal batch, as for `forward`.

        Returns
        -------
        energy : Tensor
            (B,) float64, eV.
        forces : Tensor
            (B, N, 3) or (A, 3), eV/Å, dtype of ``coord``.
        """
        result = self.derivatives(data)
        return result.energy, -result.coord.view(data["coord"].shape).to(data["coord"].dtype)

    def derivatives(self, data: dict[str, Tensor]) -> Derivatives:
        """Energy and first derivatives, written out, with no more than a block of pairs in memory.

        With g_ij the bracket of the module docstring (times the switch), w_i the row of weights of an atom, w'_i its
        derivative by the coordination number, and f the counting function,

            G_i = ∂E/∂CN_i = -Σ_j g_ij (w'_i C6_ref w_jᵀ),    ∂E/∂r_ij = -C6_ij dg_ij/dr + (G_i + G_j) df_ij/dr.

        Three sweeps over the pairs: coordination numbers, then energy, G and the first part, then the second part.
        """
        inner: dict[str, Tensor] = {}
        for key, value in data.items():
            inner[key] = value.detach()
        with_virial = "cell" in data and data["cell"].requires_grad
        coord = inner["coord"].reshape(-1, 3)
        tables = self.tables_for(inner["numbers"])
        pairs = self.search(inner, max(self.cutoff_lr, self.counting_cutoff))
        kept = self.kept_blocks(inner, pairs)
        place = tables.place.index_select(0, inner["numbers"].flatten())
        radius = tables.radius.to(coord.dtype).index_select(0, place)
        cn = self.coordination_numbers(inner, pairs, kept, radius)
        distance = cn.to(coord.dtype).unsqueeze(1) - tables.cn.to(coord.dtype).index_select(0, place)
        own = reference_weights(distance, torch.zeros_like(distance), self.exponent)
        own_slope = -2.0 * self.exponent * own * (distance - (own * distance).sum(dim=1, keepdim=True))
        by_element = nbops.is_flat(data) or self.s9 != 0.0
        weights = self.in_columns(own, place, tables, by_element)
        slopes = self.in_columns(own_slope, place, tables, by_element)
        constants = self.pair_constants(place, tables, coord.dtype)

        n_atoms = coord.shape[0]
        energy, cn_slope = torch.zeros_like(cn), torch.zeros_like(cn)
        gradient = torch.zeros([n_atoms, 3], dtype=torch.float64, device=cn.device)
        virial = torch.zeros([nbops.n_molecules(data) if with_virial else 0, 3, 3], dtype=cn.dtype, device=cn.device)
        for k in range(pairs.n_blocks):
            block = self.block(inner, pairs, kept, k)
            bracket, slope = self.damped(block, constants, pairs.cutoff)
            c6 = pair_products(weights, weights, block, False)
            energy = energy - block.weight * sum_over_j(c6 * bracket, block, n_atoms)
            cn_slope = cn_slope - sum_over_j(pair_products(slopes, weights, block, False) * bracket, block, n_atoms)
            if block.weight == 1.0:
                cn_slope = cn_slope - sum_over_i(pair_products(slopes, weights, block, True) * bracket, block, n_atoms)
            along = slope * c6
            gradient = gradient - pair_gradient(along, block, coord)
            if with_virial:
                virial = virial - pair_virial(along, block, inner)

        if self.s9 != 0.0 and place.shape[0] > 0:
            sides = self.triangle_sides(inner, pairs, kept)
            triples = self.triple_derivatives(sides, weights, slopes, constants)
            energy, cn_slope = energy + triples.energy, cn_slope + triples.cn
            gradient = gradient.index_add(0, sides.j, triples.sides.t()) - torch.zeros_like(gradient).index_add(
                0, sides.i, triples.sides.t()
            )
            if with_virial:
                virial = virial + self.triple_virial(sides, triples.sides, inner)
        cn_slopes = cn_slope.to(coord.dtype)
        for k in range(pairs.n_blocks):
            block = self.block(inner, pairs, kept, k)
            count, radius_ij, counted = self.counts(block, radius, pairs.cutoff)
            # df/dr = -k1 R/r² f (1 - f), and it is wanted over r.
            along = (count - 1.0) * count * (self.steepness * radius_ij) / (block.d_ij * block.d_ij * block.d_ij)
            along = along * counted
            along = along * (atom_values(cn_slopes, block.i) + atom_values(cn_slopes, block.j))
            gradient = gradient + pair_gradient(along, block, coord)
            if with_virial:
                virial = virial + pair_virial(along, block, inner)
        energy = nbops.mol_sum(energy.view(data["numbers"].shape), data)
        return Derivatives(self.hartree * energy, self.hartree * gradient, self.hartree * virial)

    def damped(self, block: nbops.PairBlock, constants: PairConstants, cutoff: float) -> tuple[Tensor, Tensor]:
        """The bracket g of the module docstring times the switch, and dg/dr / r, 1/Å²; zero for pairs that are none."""
        within = mask_within(block, self.cutoff_lr, cutoff)
        r0_6, r0_8, s8_ratio = element_pairs(constants, block)
        bracket, slope = rational_damping_derivative(block.d_ij / self.bohr, r0_6, r0_8, self.s6, s8_ratio)
        slope = slope * (within / self.bohr**2)
        if self.smoothing_on < self.cutoff_lr:
            switch, switch_slope = quintic_switch_derivative(block.d_ij, self.smoothing_on, self.cutoff_lr)
            slope = slope * switch + bracket * within * switch_slope / block.d_ij
            bracket = bracket * switch
        return bracket * within, slope

    # three-body energy

    def triangle_sides(
        self, data: dict[str, Tensor], pairs: nbops.LongRangePairs, kept: list[nbops.PairBlock]
    ) -> atm.Sides:
        """All pairs that can be the side of a triangle."""
        i, j, r_ij = [], [], []
        for k in range(pairs.n_blocks):
            block = self.block(data, pairs, kept, k)
            found = atm.later_sides(block, block.mask & (block.d_ij < self.triple_cutoff), data)
            i.append(found[0])
            j.append(found[1])
            r_ij.append(found[2])
        if len(i) == 0:
            none = torch.zeros([0], dtype=torch.long, device=data["numbers"].device)
            return atm.sorted_sides(none, none, data["coord"].new_zeros([3, 0]), data["numbers"].numel(), self.bohr)
        return atm.sorted_sides(torch.cat(i), torch.cat(j), torch.cat(r_ij, 1), data["numbers"].numel(), self.bohr)

    def triple_energies(self, sides: atm.Sides, atoms: AtomWeights, constants: PairConstants) -> Tensor:
        """Three-body energies (n,), Hartree, float64, by the first corner."""
        n_atoms = atoms.place.shape[0]
        energy = torch.zeros([n_atoms], dtype=torch.float64, device=sides.r_ij.device)
        table, member = constants.tables[3], constants.member
        c6, radius = self.of_sides(sides, atoms, table)
        cutoff_sq = (self.triple_cutoff / self.bohr) ** 2
        sides_sq = sides.r_ij.square().sum(dim=0)
        for block in atm.triangle_blocks(sides, self.block_pairs_gpu if sides.i.is_cuda else self.block_pairs):
            t = atm.triangles(sides, block)
            with torch.no_grad():
                r_j, r_k = atm.side_values(sides.r_ij, t.side_j), atm.side_values(sides.r_ij, t.side_k)
                z = atm.squared_sides(r_j, r_k, t.exists)[2]
                place = torch.nonzero((t.exists & (z < cutoff_sq)).flatten()).squeeze(1)
            # Of every place a graph of 30 numbers would be kept: of those that count only, about a quarter.
            j, k = atom_values(sides.j, t.side_j), atom_values(sides.j, t.side_k)
            c6_jk = (atoms.averaged[j] @ atoms.row[k].transpose(1, 2)).flatten().index_select(0, place)
            radius_jk = (table[atoms.place[j]] @ member[k].transpose(1, 2)).flatten().index_select(0, place)
            side_j = t.side_j.unsqueeze(2).expand(t.exists.shape).flatten().index_select(0, place)
            side_k = t.side_k.unsqueeze(1).expand(t.exists.shape).flatten().index_select(0, place)
            x, y = sides_sq.index_select(0, side_j), sides_sq.index_select(0, side_k)
            z = (sides.r_ij.index_select(1, side_k) - sides.r_ij.index_select(1, side_j)).square().sum(dim=0)
            product = c6.index_select(0, side_j) * c6.index_select(0, side_k) * c6_jk
            damping = radius.index_select(0, side_j) * radius.index_select(0, side_k) * radius_jk
            e = atm.triple_energy(x, y, z, product, damping)
            energy = energy.index_add(0, sides.i.index_select(0, side_j), e.double())
        return self.s9 * energy

    def of_sides(self, sides: atm.Sides, atoms: AtomWeights, table: Tensor) -> tuple[Tensor, Tensor]:
        """C6 and R^{16/3} of the sides from the first corner, (P + 1,) each."""
        radius = atom_values(table.flatten(), atoms.place[sides.i] * table.shape[0] + atoms.place[sides.j])
        return pair_products(atoms, atoms, self.as_block(sides), False), radius

    def as_block(self, sides: atm.Sides) -> nbops.PairBlock:
        """Sides as a list of pairs; distances are not needed."""
        return nbops.PairBlock(sides.i, sides.j, sides.r_ij[0], sides.r_ij, sides.i >= 0, 1.0)

    def triple_derivatives(
        self, sides: atm.Sides, atoms: AtomWeights, slopes: AtomWeights, constants: PairConstants
    ) -> TripleDerivatives:
        """Three-body energy and its first derivatives, written out."""
        dtype, device, n_atoms = sides.r_ij.dtype, sides.r_ij.device, atoms.place.shape[0]
        table, member = constants.tables[3], constants.member
        c6, radius = self.of_sides(sides, atoms, table)
        n_sides = sides.i.shape[0]
        energy = torch.zeros([n_atoms], dtype=torch.float64, device=device)
        of_sides = torch.zeros([3, n_sides], dtype=torch.float64, device=device)
        h_sides, cn_j = torch.zeros_like(of_sides[0]), torch.zeros_like(of_sides[0])
        for block in atm.triangle_blocks(sides, self.block_pairs_gpu if sides.i.is_cuda else self.block_pairs):
            t = atm.triangles(sides, block)
            j, k = atom_values(sides.j, t.side_j), atom_values(sides.j, t.side_k)
            r_j, r_k = atm.side_values(sides.r_ij, t.side_j), atm.side_values(sides.r_ij, t.side_k)
            x, y, z = atm.squared_sides(r_j, r_k, t.exists)
            row_j, row_k = atoms.row[j], atoms.row[k]
            c6_ij, c6_ik = atom_values(c6, t.side_j).unsqueeze(2), atom_values(c6, t.side_k).unsqueeze(1)
            c6_jk = atoms.averaged[j] @ row_k.transpose(1, 2)
            damping = table[atoms.place[j]] @ member[k].transpose(1, 2)
            damping = damping * atom_values(radius, t.side_j).unsqueeze(2) * atom_values(radius, t.side_k).unsqueeze(1)
            counted = (t.exists & (z < (self.triple_cutoff / self.bohr) ** 2)).to(dtype)
            sums = atm.triple_derivatives(r_j, r_k, counted, (c6_ij, c6_ik, c6_jk), damping, (x, y, z))
            energy[block[0] : block[1]] += sums.energy
            side_j, side_k = t.side_j.flatten(), t.side_k.flatten()
            of_sides.index_add_(1, side_j, sums.of_j.flatten(1).double())
            of_sides.index_add_(1, side_k, sums.of_k.flatten(1).double())
            h_sides.index_add_(0, side_j, sums.h_ij.flatten().double())
            h_sides.index_add_(0, side_k, sums.h_ik.flatten().double())
            of_cn = (slopes.averaged[j] * (sums.h_jk @ row_k)).sum(dim=2)
            cn_j.index_add_(0, side_j, of_cn.flatten().double())
            of_cn = (slopes.averaged[k] * (sums.h_jk.transpose(1, 2) @ row_j)).sum(dim=2)
            cn_j.index_add_(0, side_k, of_cn.flatten().double())
        pairs = self.as_block(sides)
        cn_i = h_sides * pair_products(slopes, atoms, pairs, False)
        cn_j = cn_j + h_sides * pair_products(slopes, atoms, pairs, True)
        cn = sum_over_j(cn_i, pairs, n_atoms) + sum_over_i(cn_j, pairs, n_atoms)
        return TripleDerivatives(self.s9 * energy, self.s9 / self.bohr * of_sides, self.s9 * cn)

    def triple_virial(self, sides: atm.Sides, of_sides: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Σ r_ij (dE/dr_ij)ᵀ of the sides, (B, 3, 3) float64."""
        products = (self.bohr * sides.r_ij).double().t().unsqueeze(2) * of_sides.t().unsqueeze(1)
        total = torch.zeros([nbops.n_molecules(data), 3, 3], dtype=torch.float64, device=of_sides.device)
        return total.index_add(0, data["mol_idx"][sides.i], products)
