"""London dispersion with C6 and polarizabilities from the network, and the damping of DFT-D3(BJ).

The equation is that of `aimnet2mult.dispersion`; C6 of a pair comes from those of its atoms.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.dispersion import (
    D3_DATA,
    PAIR_CUTOFF_BOHR,
    RationalDispersion,
    atom_values,
    rational_damping_energy,
)
from aimnet2mult.interfaces import PairSource
from aimnet2mult.utils.units import BOHR_ANGSTROM

SMALLEST_TS_DENOMINATOR = 1e-4
"""Lower bound of the denominator in the Tkatchenko-Scheffler combination rule, that of the AIMNet2 models."""


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

    pair_source: PairSource

    def __init__(
        self, a1: float, a2: float, s8: float, s6: float = 1.0, key_in: str = "disp_param", key_out: str = "energy"
    ) -> None:
        super().__init__(s8, a1, a2, s6, key_out, torch.load(D3_DATA, weights_only=True)["r4r2"])
        self.key_in = key_in
        self.cutoff_lr = math.inf
        self.cutoff_lr_periodic = PAIR_CUTOFF_BOHR * BOHR_ANGSTROM
        self.smallest = SMALLEST_TS_DENOMINATOR

    def block_energy(
        self, block: nbops.PairBlock, c6: Tensor, alpha: Tensor, q: Tensor, data: dict[str, Tensor]
    ) -> Tensor:
        """Energy of the pairs of a block, (B,), eV, from C6 and polarizabilities of the flattened batch."""
        c6_ij = tkatchenko_scheffler_c6(
            atom_values(c6, block.i),
            atom_values(alpha, block.i),
            atom_values(c6, block.j),
            atom_values(alpha, block.j),
            self.smallest,
        )
        ratio = 3.0 * atom_values(q, block.i) * atom_values(q, block.j)
        e_ij = rational_damping_energy(block.d_ij / self.bohr, c6_ij, ratio, self.s6, self.s8, self.a1, self.a2)
        return self.hartree * nbops.block_energy(e_ij, block, data)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the dispersion energy: ``key_out`` (B,) float64, eV."""
        pairs = self.search(data, self.cutoff_lr_periodic if "cell" in data else self.cutoff_lr)
        q = self.r4r2_charge().to(data["coord"].dtype)[data["numbers"].flatten()]
        # A dense batch has one block, with the vectors that the network made: nothing to save.
        if nbops.first_order(data) and nbops.is_flat(data):
            return self.add_energy(self.energy_with_first_derivatives(data, pairs, q), data)
        c6, alpha = self.atomic_values(data)
        energy = torch.zeros([nbops.n_molecules(data)], dtype=torch.float64, device=c6.device)
        for k in range(pairs.n_blocks):
            energy = energy + self.block_energy(self.pair_source.block(data, pairs, k), c6, alpha, q, data)
        return self.add_energy(energy, data)

    def atomic_values(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """C6 and polarizability of each atom of the flattened batch."""
        values = data[self.key_in].reshape(-1, 2)
        # Any polarizability does for padding, but zero, which would make the ratios of masked pairs infinite.
        padding = ~nbops.real_atoms(data["numbers"]).flatten()
        return values[:, 0].contiguous(), values[:, 1].masked_fill(padding, 1.0)

    def energy_with_first_derivatives(self, data: dict[str, Tensor], pairs: nbops.LongRangePairs, q: Tensor) -> Tensor:
        """Energy (B,), eV, differentiated block by block, with the derivatives attached."""
        inner: dict[str, Tensor] = {}
        for key, value in data.items():
            inner[key] = value
        inner["coord"], inner[self.key_in] = nbops.leaf(data["coord"]), nbops.leaf(data[self.key_in])
        inputs = [inner["coord"], inner[self.key_in]]
        with_cell = "cell" in data and data["cell"].requires_grad
        if with_cell:
            inner["cell"] = nbops.leaf(data["cell"])
            inputs.append(inner["cell"])
        sums = [torch.zeros_like(x, dtype=torch.float64) for x in inputs]
        energy = torch.zeros([nbops.n_molecules(data)], dtype=torch.float64, device=q.device)
        grad_mode = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        for k in range(pairs.n_blocks):
            c6, alpha = self.atomic_values(inner)
            part = self.block_energy(self.pair_source.block(inner, pairs, k), c6, alpha, q, inner)
            energy = energy + part.detach()
            found = nbops.gradients([part], inputs, [torch.ones_like(part)])
            sums = [total + x for total, x in zip(sums, found)]  # noqa: B905 - TorchScript has no strict
        torch.set_grad_enabled(grad_mode)
        energy = nbops.attach_gradient(energy, data["coord"], sums[0], data)
        energy = nbops.attach_gradient(energy, data[self.key_in], sums[1], data)
        if with_cell:
            energy = nbops.attach_cell_gradient(energy, data["cell"], sums[2])
        return energy


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
