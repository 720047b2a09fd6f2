"""Coulomb energy of the atomic charges, without the short-range part that the network learns.

Energies in eV, distances in Å, charges in e; sums in float64. The short-range part of a pair is
q_i q_j f(d)/d inside ``rc`` with a smooth envelope f, so that long range = full - short range.

Pairs come in blocks (`nbops.pair_block`). Where only first derivatives are wanted (`nbops.first_order`), they are
summed along with the energy, E = Σ q_i q_j K(d_ij) with

    ∂E/∂q_i = Σ_j q_j K,   ∂E/∂r_j = Σ_i q_i q_j K' r_ij/d_ij,   W = Σ_ij q_i q_j K' r_ij⊗r_ij/d_ij,

and ∂E/∂cell follows from W = coordᵀ ∂E/∂coord + cellᵀ ∂E/∂cell, the derivative by a homogeneous strain.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aimnet2mult import nbops, ops
from aimnet2mult.ewald import ewald_alpha, ewald_width, reciprocal_energy
from aimnet2mult.interfaces import Pairs, PairSource
from aimnet2mult.nbops import PairBlock
from aimnet2mult.utils.units import COULOMB_EV_ANGSTROM

ENVELOPES = ("exp", "cosine")


class PairSums(NamedTuple):
    """Derivatives of an energy Σ q_i q_j K(d_ij), float64, e and Å.

    Attributes
    ----------
    potential
        ∂E/∂q, (A,).
    gradient
        ∂E/∂r, (3, A).
    virial
        Σ ∂E/∂r_ij ⊗ r_ij of each crystal, (B, 3, 3).
    """

    potential: Tensor
    gradient: Tensor
    virial: Tensor


def _values(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` of atomic values (A,), whose derivative is a sum over a list of atoms."""
    return x.index_select(0, index.flatten()).view(index.shape)


def _add_at(sums: Tensor, index: Tensor, x_ij: Tensor) -> None:
    """Add a pair quantity to ``sums`` (A,) at ``index``, the i or j of a block, summed where that has one row."""
    if index.dim() == 2 and index.shape[1] == 1:
        x_ij = x_ij.sum(dim=1)
    elif index.dim() == 2 and index.shape[0] == 1:
        x_ij = x_ij.sum(dim=0)
    sums.index_add_(0, index.flatten(), x_ij.flatten().to(sums.dtype))


def _add_block(sums: PairSums, kernel: Tensor, slope: Tensor, q: Tensor, block: PairBlock, mol_idx: Tensor) -> None:
    """Add what the pairs of a block give; ``slope`` is K', both in the shape of ``block.d_ij``, ``q`` (A,)."""
    q_i, q_j = _values(q, block.i), _values(q, block.j)
    kernel = (block.weight * kernel).masked_fill(~block.mask, 0.0)
    # Products in the dtype of the positions, potentials (which give the energy) summed in float64.
    _add_at(sums.potential, block.i, (kernel * q_j).double())
    _add_at(sums.potential, block.j, (kernel * q_i).double())

    along = (block.weight * q_i * q_j * slope / block.d_ij).masked_fill(~block.mask, 0.0)
    n_cells = sums.virial.shape[0]
    of = mol_idx[block.i].expand(along.shape).flatten() if n_cells > 1 else mol_idx[:0]
    r_ij = block.r_ij.flatten(1).double() if n_cells > 0 else sums.gradient[:, :0]
    for a in range(3):
        pull = along * block.r_ij[a]
        _add_at(sums.gradient[a], block.i, -pull)
        _add_at(sums.gradient[a], block.j, pull)
        if n_cells == 1:
            sums.virial[0, a] += r_ij @ pull.flatten().double()
        elif n_cells > 1:
            work = r_ij * pull.flatten()
            for b in range(3):
                sums.virial[:, a, b].index_add_(0, of, work[b])


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

    def neighbor_energy(self, kernel: Tensor, mask: Tensor, data: dict[str, Tensor]) -> Tensor:
        """½ Σ_i q_i Σ_j q_j K_ij over the pairs of the network (`nbops.pair_vectors`): (B,) float64, e²/Å."""
        q = data[self.key_in]
        potential = nbops.neighbor_sum(kernel * nbops.neighbors(q, data), mask)
        return 0.5 * nbops.mol_sum(q.double() * potential, data)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Subtract from ``key_out``, or set it to minus the short-range energy."""
        d_ij, _, mask = nbops.pair_vectors(data)
        kernel = self.envelope_weight(d_ij) / d_ij
        energy = -self.factor * self.neighbor_energy(kernel, mask, data)
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
        The Ewald sum (`aimnet2mult.ewald`), minus the short-range part. Without a cell it is ``simple``.

    Parameters
    ----------
    rc : float
        Range of the short-range part, Å.
    key_in, key_out : str
        Charges (per atom) and energy (per molecule).
    method : str
        ``simple``, ``dsf`` or ``ewald``; `set_method` changes it.
    dsf_alpha, dsf_rc : float
        Damping (1/Å) and cutoff (Å) of ``dsf``.
    ewald_accuracy : float
        Relative size of the terms that ``ewald`` leaves out.
    ewald_rc : float
        Cutoff of its real-space sum, Å, which with the accuracy fixes the reciprocal cutoff. 0: what is cheapest for
        the size of each crystal (`ewald_alpha`), or 10 Å with a caller's neighbour matrices.
    envelope : str
        As in `SRCoulomb`.

    Attributes
    ----------
    cutoff_lr, cutoff_lr_periodic : float
        Largest distance of a pair that the method needs from a caller's neighbour matrix, Å, for molecules and for
        crystals.
    """

    pair_source: PairSource

    def __init__(
        self,
        rc: float = 4.6,
        key_in: str = "charges",
        key_out: str = "energy",
        method: str = "simple",
        dsf_alpha: float = 0.2,
        dsf_rc: float = 15.0,
        ewald_accuracy: float = 1e-8,
        ewald_rc: float = 0.0,
        envelope: str = "exp",
    ) -> None:
        super().__init__(rc, key_in, key_out, envelope)
        self.pair_source = Pairs()
        self.block_pairs = nbops.BLOCK_PAIRS
        self.method = "simple"
        self.dsf_alpha, self.dsf_rc, self.dsf_self = 0.2, 15.0, 0.0
        self.ewald_rc, self.ewald_accuracy, self.ewald_width = 0.0, 1e-8, 1.0
        self.cutoff_lr, self.cutoff_lr_periodic = math.inf, math.inf
        self.set_method(method, ewald_rc if method == "ewald" else dsf_rc, dsf_alpha, ewald_accuracy)

    @torch.jit.export
    def set_method(
        self, method: str, cutoff: float = 0.0, dsf_alpha: float = 0.2, ewald_accuracy: float = 1e-8
    ) -> None:
        """Change how the energy is summed, of a scripted module, too.

        Parameters
        ----------
        method : str
            ``simple``, ``dsf`` or ``ewald``.
        cutoff : float
            Å, of ``dsf`` or of the real-space part of ``ewald``; 0 for 15 Å or the cheapest. ``simple`` has none.
        dsf_alpha : float
            Damping of ``dsf``, 1/Å.
        ewald_accuracy : float
            Relative size of the terms that ``ewald`` leaves out.

        Raises
        ------
        ValueError
            An unknown method, a cutoff, damping or accuracy out of range. Nothing is changed then.
        """
        if method not in ["simple", "dsf", "ewald"]:
            raise ValueError(f"Coulomb method '{method}' is not one of simple, dsf, ewald")
        if not (cutoff >= 0.0 and cutoff < math.inf):
            raise ValueError(f"the cutoff of the Coulomb method {method} must be finite and not negative, not {cutoff}")
        if not (dsf_alpha >= 0.0 and dsf_alpha < math.inf):
            raise ValueError(f"dsf_alpha must be finite and not negative, not {dsf_alpha}")
        if not (ewald_accuracy >= 1e-15 and ewald_accuracy <= 1e-2):
            raise ValueError(f"ewald_accuracy must be between 1e-15 and 1e-2, not {ewald_accuracy}")
        self.method = method
        self.cutoff_lr = math.inf
        self.cutoff_lr_periodic = math.inf
        if method == "dsf":
            self.dsf_alpha = dsf_alpha
            self.dsf_rc = cutoff if cutoff > 0.0 else 15.0
            self.dsf_self = math.erfc(dsf_alpha * self.dsf_rc) / (2.0 * self.dsf_rc) + dsf_alpha / math.sqrt(math.pi)
            self.cutoff_lr = self.dsf_rc
            self.cutoff_lr_periodic = self.dsf_rc
        elif method == "ewald":
            self.ewald_rc = cutoff
            self.ewald_accuracy = ewald_accuracy
            self.ewald_width = ewald_width(ewald_accuracy)
            self.cutoff_lr_periodic = cutoff if cutoff > 0.0 else 10.0

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add to ``key_out`` (per molecule, float64).

        Raises
        ------
        ValueError
            A cell with the method ``simple``.
        """
        if "cell" in data and self.method == "simple":
            raise ValueError("the Coulomb method simple cannot be used with a cell: choose dsf or ewald")
        q = data[self.key_in]
        if self.method == "ewald" and "cell" in data:
            energy = self.ewald(q, data)
        elif self.method == "dsf":
            energy = self.pair_energy(q, data, "dsf", self.dsf_rc, q[:0])
            energy = energy - self.dsf_self * nbops.mol_sum(q.double().square(), data)
        else:
            energy = self.pair_energy(q, data, "simple", math.inf, q[:0])
        if nbops.is_flat(data):
            # Few pairs are so near: they have a search of their own. In dense layout the kernel has them already.
            energy = energy - self.pair_energy(q, data, "short", float(self.rc.item()), q[:0])
        energy = self.factor * energy
        if self.key_out in data:
            energy = data[self.key_out] + energy
        data[self.key_out] = energy
        return data

    def kernel(self, d_ij: Tensor, term: str, alpha: Tensor) -> Tensor:
        """K(d) of a term (``simple``, ``dsf``, ``ewald``, ``short``), 1/Å, shape of ``d_ij``."""
        if term == "dsf":
            return ops.coulomb_kernel_dsf(d_ij, self.dsf_rc, self.dsf_alpha)
        if term == "ewald":
            return ops.coulomb_kernel_ewald(d_ij, alpha, self.ewald_width)
        if term == "short":
            return self.envelope_weight(d_ij) / d_ij
        return d_ij.reciprocal()

    def pair_energy(self, q: Tensor, data: dict[str, Tensor], term: str, cutoff: float, alpha: Tensor) -> Tensor:
        """Σ q_i q_j K(d_ij) over the pairs closer than ``cutoff``: (B,) float64, e²/Å.

        In dense layout the kernel is without the short range.

        Parameters
        ----------
        q : Tensor
            Charges, (B, N) or (A,), e.
        data : dict
            Internal batch.
        term : str
            As in `kernel`.
        cutoff : float
            Å.
        alpha : Tensor
            Width of the Ewald sum of each crystal (B,), 1/Å; of other terms empty.
        """
        if not nbops.is_flat(data):
            d_ij, _, mask = nbops.pair_vectors(data)
            if term == "simple":
                kernel = (1.0 - self.envelope_weight(d_ij)) / d_ij
            else:
                kernel = self.kernel(d_ij, term, alpha) - self.envelope_weight(d_ij) / d_ij
            return self.neighbor_energy(kernel, mask, data)
        pairs = self.pair_source.search(data, cutoff, self.block_pairs)
        if nbops.first_order(data):
            return self._pair_energy_first_order(q, data, pairs, term, alpha)
        energy = torch.zeros([nbops.n_molecules(data)], dtype=torch.float64, device=q.device)
        for k in range(pairs.n_blocks):
            block = self.pair_source.block(data, pairs, k)
            kernel = self.kernel(block.d_ij, term, self._alpha_of_pairs(alpha, block, data))
            e_ij = _values(q, block.i) * _values(q, block.j) * kernel
            energy = energy + nbops.block_energy(e_ij, block, data)
        return energy

    def _pair_energy_first_order(
        self, q: Tensor, data: dict[str, Tensor], pairs: nbops.LongRangePairs, term: str, alpha: Tensor
    ) -> Tensor:
        """`pair_energy` with its first derivatives attached, in memory that does not grow with the pairs."""
        coord, charges = data["coord"], q.detach()
        inner = data.copy()
        inner["coord"] = coord.detach()
        n_cells = 0
        if "cell" in data:
            inner["cell"] = data["cell"].detach()
            if data["cell"].requires_grad:
                n_cells = nbops.n_molecules(data)
        zeros = torch.zeros([4, q.shape[0]], dtype=torch.float64, device=q.device)
        virial = torch.zeros([n_cells, 3, 3], dtype=torch.float64, device=q.device)
        sums = PairSums(zeros[0], zeros[1:], virial)
        grad_mode = torch.is_grad_enabled()
        for k in range(pairs.n_blocks):
            block = self.pair_source.block(inner, pairs, k)
            torch.set_grad_enabled(True)
            d_ij = nbops.leaf(block.d_ij)
            kernel = self.kernel(d_ij, term, self._alpha_of_pairs(alpha, block, data))
            slope = torch.autograd.grad([kernel.sum()], [d_ij])[0]
            torch.set_grad_enabled(grad_mode)
            assert slope is not None
            _add_block(sums, kernel.detach(), slope, charges, block, data["mol_idx"])
        gradient = sums.gradient.t()
        # E is a quadratic form in the charges: half of Σ q ∂E/∂q.
        energy = 0.5 * nbops.mol_sum(charges.double() * sums.potential, data)
        energy = nbops.attach_gradient(energy, q, sums.potential, data)
        energy = nbops.attach_gradient(energy, coord, gradient, data)
        if n_cells > 0:
            moment = nbops.mol_sum(inner["coord"].double().unsqueeze(2) * gradient.unsqueeze(1), data)
            cell_gradient = torch.linalg.solve(inner["cell"].double().mT, sums.virial - moment)
            energy = nbops.attach_cell_gradient(energy, data["cell"], cell_gradient)
        return energy

    def _alpha_of_pairs(self, alpha: Tensor, block: PairBlock, data: dict[str, Tensor]) -> Tensor:
        """Widths (B,) of the crystals, broadcast against the pairs of a block."""
        if alpha.shape[0] <= 1:
            return alpha
        return alpha[data["mol_idx"][block.i]]

    def ewald(self, q: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Ewald sum of each crystal of a flat batch, short range included: (B,) float64, e²/Å."""
        cell = data["cell"].double()
        volume = torch.abs(torch.linalg.det(cell))
        alpha = self.crystal_alpha(volume.detach(), data)
        # One wait for the device: the sums over pairs and over k need their limits.
        widths: list[float] = alpha.tolist()
        if len(widths) == 0:
            return volume
        energy = self.pair_energy(q, data, "ewald", self.ewald_width / min(widths), alpha.to(q.dtype))

        charges = q.double()
        self_energy = alpha / math.sqrt(math.pi) * nbops.mol_sum(charges.square(), data)
        background = 0.5 * math.pi / alpha.square() * nbops.mol_sum(charges, data).square() / volume
        reciprocal: list[Tensor] = []
        for b in range(len(widths)):
            atoms = torch.nonzero((data["mol_idx"] == b) & nbops.real_atoms(data["numbers"])).squeeze(1)
            k_max = 2.0 * self.ewald_width * widths[b]
            coord, q_b = data["coord"].index_select(0, atoms), q.index_select(0, atoms)
            reciprocal.append(reciprocal_energy(coord, q_b, cell[b], widths[b], k_max, nbops.first_order(data)))
        return energy + torch.stack(reciprocal) - self_energy - background

    def crystal_alpha(self, volume: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Width α of each crystal (B,) of volume (B,), float64, 1/Å: chosen alone, whatever else is in the batch."""
        if self.ewald_rc > 0.0 or "nbmat_lr" in data:
            return torch.full_like(volume, self.ewald_width / self.cutoff_lr_periodic)
        return ewald_alpha(volume, nbops.mol_sum(nbops.real_atoms(data["numbers"]).double(), data))
