"""From geometry to features: the radial basis (AEVSV) and the convolution over it (ConvSV).

Anstine, Zubatyuk, Isayev, AIMNet2 (10.1039/D4SC08572H). Letters: F features, G radial functions, H combinations.

The basis is laid out for the convolution, which is one batched matrix product per molecule and radial function:

========  ==================  =================
key       dense               flat
========  ==================  =================
``_g_s``  (B, G, N, N)        (A, M, G)
``_g_v``  (B, G, 3, N, N)     (A, M, G, 3)
========  ==================  =================

These serve derivatives of any order. A large system of which only energy and forces are wanted is evaluated with the
basis (G, 4, P) of a list of its P pairs: scalar part and the three components of the vector part, in one array. The
sums over neighbours, `neighbor_sums`, are linear in the basis and in the features, and their two derivatives
(`neighbor_sums_adjoint`, `basis_gradient`) are written out, so that no array of pairs times features is ever made.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aimnet2mult import nbops, ops


class PairList(NamedTuple):
    """Pairs of the network in flat layout, ordered by i.

    Attributes
    ----------
    i, j
        (P,) int64 places of the atoms.
    starts
        (A,) int64, for each atom i the place of its first pair.
    shifts
        (P, 3) lattice translations of j in cells; (0, 3) without a cell.
    counted
        (A, M) bool, which entries of the neighbour matrix the pairs are.
    """

    i: Tensor
    j: Tensor
    starts: Tensor
    shifts: Tensor
    counted: Tensor


def pair_list(data: dict[str, Tensor]) -> PairList:
    """List the pairs of the neighbour matrix of a flat batch."""
    nbmat = data["nbmat"]
    real = nbops.real_atoms(data["numbers"])
    counted = real[nbmat] & real.unsqueeze(1)
    i, column = torch.nonzero(counted).unbind(dim=1)
    counts = counted.sum(dim=1)
    shifts = torch.empty([0, 3], dtype=data["coord"].dtype, device=nbmat.device)
    if "shifts" in data:
        shifts = data["shifts"][i, column].to(shifts.dtype)
    return PairList(i, nbmat[i, column], counts.cumsum(0) - counts, shifts, counted)


def list_vectors(pairs: PairList, first: int, last: int, data: dict[str, Tensor]) -> Tensor:
    """Vectors r_ij of the pairs ``first`` to ``last`` - 1: (3, P), Å, with the graph of ``coord`` and ``cell``."""
    components = data["coord"].t()
    i = pairs.i[first:last]
    r_ij = components[:, pairs.j[first:last]] - components[:, i]
    if pairs.shifts.shape[0] > 0:
        r_ij = r_ij + nbops.lattice_vectors(pairs.shifts[first:last], data["cell"], data["mol_idx"][i])
    return r_ij


def neighbor_sums(table: Tensor, basis: Tensor, pairs: PairList) -> Tensor:
    """Sum features of neighbours times the basis: S[g, k, i, f] = Σ_j basis[g, k, ij] table[g, j, f].

    One weighted embedding bag for each radial function and component: a row of features is read for every pair, and
    only sums are written.

    Parameters
    ----------
    table : Tensor
        (G, A, F) features of the atoms, without a graph.
    basis : Tensor
        (G, 4, P), without a graph.
    pairs : PairList
        The pairs.

    Returns
    -------
    Tensor
        (G, 4, A, F).
    """
    sums: list[Tensor] = []
    for g in range(basis.shape[0]):
        for k in range(4):
            sums.append(_weighted_sums(table[g], basis[g, k], pairs))
    return torch.stack(sums).view(basis.shape[0], 4, table.shape[1], -1)


def neighbor_sums_adjoint(gradient: Tensor, basis: Tensor, pairs: PairList) -> Tensor:
    """Derivative of `neighbor_sums` by ``table``: (G, 4, A, F) -> (G, A, F).

    Each pair is there in both orders with the same distance, so the sum over the atoms i that have j as a neighbour
    is a sum over the neighbours of j, in which the vector part changes its sign.
    """
    sums: list[Tensor] = []
    for g in range(basis.shape[0]):
        total = _weighted_sums(gradient[g, 0], basis[g, 0], pairs)
        for k in range(1, 4):
            total = total - _weighted_sums(gradient[g, k], basis[g, k], pairs)
        sums.append(total)
    return torch.stack(sums)


def _weighted_sums(table: Tensor, weight: Tensor, pairs: PairList) -> Tensor:
    """Σ_j weight[ij] table[j]: (A, F)."""
    return torch.embedding_bag(table, pairs.j, pairs.starts, False, 0, False, weight)[0]


def basis_gradient(
    table: Tensor, gradient: Tensor, pairs: PairList, nbmat: Tensor, first_row: int, last_row: int
) -> Tensor:
    """Derivative of `neighbor_sums` by ``basis``, of the pairs of some atoms i: (G, 4, P of these rows).

    Parameters
    ----------
    table : Tensor
        (G, A, F).
    gradient : Tensor
        Derivative by the sums, (G, 4, A, F).
    pairs : PairList
        The pairs.
    nbmat : Tensor
        (A, M) the neighbour matrix that they were listed from.
    first_row, last_row : int
        Which atoms i.
    """
    neighbors = nbmat[first_row:last_row]
    counted = pairs.counted[first_row:last_row]
    n_rows, width = neighbors.shape
    places = neighbors.reshape(-1)
    out: list[Tensor] = []
    for g in range(table.shape[0]):
        features = table[g].index_select(0, places).view(n_rows, width, -1)
        products = torch.bmm(features, gradient[g, :, first_row:last_row].permute(1, 2, 0))
        out.append(products[counted].t())
    return torch.stack(out)


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class AEVSV(nn.Module):
    """Radial basis of every pair, alone (scalar) and times the unit vector (vector).

    g_s = exp(-eta (d - shift)²)·f_c(d), g_v = g_s·r_ij/d, with f_c of `ops.cosine_cutoff`. Writes ``_g_s`` and
    ``_g_v``.

    Parameters
    ----------
    rmin : float
        First shift, Å.
    rc_s : float
        Cutoff, Å.
    nshifts_s : int
        Number of shifts, equidistant from ``rmin`` up to, not including, the cutoff.
    eta_s : float, optional
        1/Å²; default (nshifts/(rc - rmin))².
    shifts_s : list of float, optional
        Shifts given one by one, Å.
    rc_v, nshifts_v, eta_v, shifts_v : optional
        The same for the vector part; default: those of the scalar part.
    """

    rc_s: Tensor
    eta_s: Tensor
    shifts_s: Tensor
    rc_v: Tensor
    eta_v: Tensor
    shifts_v: Tensor

    def __init__(
        self,
        rmin: float = 0.8,
        rc_s: float = 5.0,
        nshifts_s: int = 16,
        eta_s: float | None = None,
        shifts_s: list[float] | None = None,
        rc_v: float | None = None,
        nshifts_v: int | None = None,
        eta_v: float | None = None,
        shifts_v: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.one_basis = rc_v is None and nshifts_v is None and eta_v is None and shifts_v is None
        self._set_basis("s", rmin, rc_s, nshifts_s, eta_s, shifts_s)
        if self.one_basis:
            self.rc_v, self.eta_v, self.shifts_v = self.rc_s, self.eta_s, self.shifts_s
        else:
            self._set_basis(
                "v",
                rmin,
                rc_s if rc_v is None else rc_v,
                nshifts_s if nshifts_v is None else nshifts_v,
                eta_v,
                shifts_v,
            )
        self.nshifts_s = len(self.shifts_s)
        self.nshifts_v = len(self.shifts_v)

    def _set_basis(
        self, part: str, rmin: float, rc: float, nshifts: int, eta: float | None, shifts: list[float] | None
    ) -> None:
        if rc <= rmin:
            raise ValueError(f"aev.rc_{part} = {rc} Å must be larger than rmin = {rmin} Å")
        if shifts is None:
            points = torch.linspace(rmin, rc, nshifts + 1)[:nshifts]
        else:
            points = torch.as_tensor(shifts, dtype=torch.get_default_dtype())
        if eta is None:
            eta = (len(points) / (rc - rmin)) ** 2
        self.register_parameter(f"rc_{part}", _fixed(torch.tensor(float(rc))))
        self.register_parameter(f"eta_{part}", _fixed(torch.tensor(float(eta))))
        self.register_parameter(f"shifts_{part}", _fixed(points))

    def _radial(self, d_ij: Tensor, rc: Tensor, eta: Tensor, shifts: Tensor) -> Tensor:
        """(B, N, N) -> (B, G, N, N), (A, M) -> (A, M, G), or (P,) -> (G, P)."""
        if d_ij.dim() == 3:
            d_ij, shifts = d_ij.unsqueeze(1), shifts.view(-1, 1, 1)
        elif d_ij.dim() == 2:
            d_ij = d_ij.unsqueeze(-1)
        else:
            shifts = shifts.unsqueeze(-1)
        return ops.gaussian_basis(d_ij, eta, shifts) * ops.cosine_cutoff(d_ij, rc)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``_g_s`` and ``_g_v`` for the pairs of the network."""
        d_ij, r_ij, _ = nbops.pair_vectors(data)
        # Differences are taken in the caller's precision, the basis in that of the network.
        unit = (r_ij / d_ij.unsqueeze(-1)).to(self.rc_s.dtype)
        d_ij = d_ij.to(self.rc_s.dtype)
        g_s = self._radial(d_ij, self.rc_s, self.eta_s, self.shifts_s)
        g_v = g_s
        if not self.one_basis:
            g_v = self._radial(d_ij, self.rc_v, self.eta_v, self.shifts_v)
        data["_g_s"] = g_s
        if d_ij.dim() == 3:
            data["_g_v"] = g_v.unsqueeze(2) * unit.permute(0, 3, 1, 2).contiguous().unsqueeze(1)
        else:
            data["_g_v"] = g_v.unsqueeze(-1) * unit.unsqueeze(-2)
        return data

    def pair_basis(self, r_ij: Tensor) -> Tensor:
        """Basis of a list of pairs: vectors (3, P), Å -> (G, 4, P), scalar part and components of the vector part."""
        d_ij = r_ij.square().sum(dim=0).sqrt()
        unit = (r_ij / d_ij).to(self.rc_s.dtype)
        d_ij = d_ij.to(self.rc_s.dtype)
        g_s = self._radial(d_ij, self.rc_s, self.eta_s, self.shifts_s)
        g_v = g_s
        if not self.one_basis:
            g_v = self._radial(d_ij, self.rc_v, self.eta_v, self.shifts_v)
        return torch.cat([g_s.unsqueeze(1), g_v.unsqueeze(1) * unit], dim=1)

    def pair_gradient(
        self, table: Tensor, d_sums: Tensor, pairs: PairList, data: dict[str, Tensor], rows_at_a_time: int = 256
    ) -> tuple[Tensor, Tensor]:
        """Derivative of the energy by positions and cells, through the basis of all pairs, some atoms at a time.

        Parameters
        ----------
        table, d_sums : Tensor
            Features (G, A, F) and the derivative by their sums over neighbours (G, 4, A, F).
        pairs : PairList
            The pairs.
        data : dict
            Flat internal batch.
        rows_at_a_time : int
            Atoms i whose pairs are differentiated together.

        Returns
        -------
        coord_gradient : Tensor
            (A, 3).
        cell_gradient : Tensor
            (B, 3, 3); (0, 3, 3) without a cell.
        """
        by = [nbops.leaf(data["coord"])]
        geometry = {"coord": by[0], "mol_idx": data["mol_idx"]}
        cell_gradient = torch.empty([0, 3, 3], dtype=by[0].dtype, device=by[0].device)
        if "cell" in data:
            by.append(nbops.leaf(data["cell"]))
            geometry["cell"] = by[1]
            cell_gradient = torch.zeros_like(by[1])
        coord_gradient = torch.zeros_like(by[0])
        n_atoms = coord_gradient.shape[0]
        firsts: list[int] = pairs.starts[::rows_at_a_time].tolist()
        firsts.append(pairs.i.shape[0])
        for k in range(len(firsts) - 1):
            rows = k * rows_at_a_time, min((k + 1) * rows_at_a_time, n_atoms)
            basis = self.pair_basis(list_vectors(pairs, firsts[k], firsts[k + 1], geometry))
            d_basis = basis_gradient(table, d_sums, pairs, data["nbmat"], rows[0], rows[1])
            gradient = nbops.gradients([basis], by, [d_basis])
            coord_gradient += gradient[0]
            if len(by) == 2:
                cell_gradient += gradient[1]
        return coord_gradient, cell_gradient


class ConvSV(nn.Module):
    """Invariants of each atom's neighbourhood, from the neighbours' features and the basis.

    s[a,g] = Σ_j a_j[a,g] g_s[j,g]; v[a,h,d] = Σ_j Σ_g a_j[a,g] g_v[j,g,d] agh[a,g,h];
    result concat(flatten s, flatten Σ_d v²).

    Parameters
    ----------
    nshifts_s, nshifts_v : int
        Radial functions of the two parts.
    nchannel : int
        Features F.
    d2features : bool
        Features come per radial function, a[F, G], instead of a[F].
    ncomb_v : int, optional
        Combinations H of the vector part; default ``nshifts_v``.
    """

    def __init__(
        self,
        nshifts_s: int,
        nchannel: int,
        d2features: bool = False,
        nshifts_v: int | None = None,
        ncomb_v: int | None = None,
    ) -> None:
        super().__init__()
        nshifts_v = nshifts_s if nshifts_v is None else nshifts_v
        ncomb_v = nshifts_v if ncomb_v is None else ncomb_v
        if d2features and nshifts_v != nshifts_s:
            raise ValueError(f"d2features needs nshifts_v = nshifts_s, found {nshifts_v} and {nshifts_s}")
        self.d2features = d2features
        self.output_size = nchannel * (nshifts_s + ncomb_v)
        # Directions in the space of radial functions, as different from each other as they can be.
        agh = torch.empty(nchannel, nshifts_v, ncomb_v)
        for a in range(nchannel):
            nn.init.orthogonal_(agh[a])
        self.agh = nn.Parameter(agh)

    def forward(self, data: dict[str, Tensor], a: Tensor) -> Tensor:
        """Convolve features with the basis.

        Parameters
        ----------
        data : dict
            The batch with ``_g_s`` and ``_g_v``.
        a : Tensor
            Features, (B, N, F[, G]) or (A, F[, G]).

        Returns
        -------
        Tensor
            (B, N, F·G + F·H) or (A, F·G + F·H).
        """
        if data["_g_s"].dim() == 4:
            s, v = self._sums_dense(data["_g_s"], data["_g_v"], a)
        else:
            s, v = self._sums_flat(data["_g_s"], data["_g_v"], nbops.neighbors(a, data))
        return self._invariants(s, v).view(list(data["numbers"].shape) + [-1])

    def from_sums(self, sums: Tensor) -> Tensor:
        """Invariants (A, F·G + F·H) from the sums over neighbours (G, 4, A, F) that `neighbor_sums` gives."""
        s = sums[:, 0].permute(1, 2, 0).flatten(1)
        return self._invariants(s, sums[:, 1:].permute(3, 2, 1, 0))

    def _invariants(self, s: Tensor, v: Tensor) -> Tensor:
        """Concatenate s (R, F·G) and the squared lengths of the combinations of v (F, R, 3, G): (R, F·G + F·H)."""
        n_channels, n_rows = v.shape[0], v.shape[1]
        v = torch.bmm(v.reshape(n_channels, n_rows * 3, -1), self.agh).view(n_channels, n_rows, 3, -1)
        squares = v.pow(2).sum(dim=2).transpose(0, 1).flatten(1)
        return torch.cat([s, squares], dim=-1)

    def _sums_dense(self, g_s: Tensor, g_v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over j: s (B·N, F·G) and v (F, B·N, 3, G)."""
        n_mol, n_g, n_atoms = g_s.shape[0], g_s.shape[1], g_s.shape[2]
        n_gv = g_v.shape[1]
        if self.d2features:
            a_j = a.permute(0, 3, 1, 2).reshape(n_mol * n_g, n_atoms, -1)
            s = torch.bmm(g_s.view(n_mol * n_g, n_atoms, n_atoms), a_j)
            v = torch.bmm(g_v.view(n_mol * n_gv, 3 * n_atoms, n_atoms), a_j)
        else:
            s = torch.bmm(g_s.view(n_mol, n_g * n_atoms, n_atoms), a)
            v = torch.bmm(g_v.view(n_mol, n_gv * 3 * n_atoms, n_atoms), a)
        s = s.view(n_mol, n_g, n_atoms, -1).permute(0, 2, 3, 1).reshape(n_mol * n_atoms, -1)
        v = v.view(n_mol, n_gv, 3, n_atoms, -1).permute(4, 0, 3, 2, 1)
        return s, v.flatten(1, 2)

    def _sums_flat(self, g_s: Tensor, g_v: Tensor, a_j: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over j: s (A, F·G) and v (F, A, 3, G)."""
        if self.d2features:
            s = torch.einsum("imfg,img->ifg", [a_j, g_s])
            v = torch.einsum("imfg,imgd->fidg", [a_j, g_v])
        else:
            s = torch.einsum("imf,img->ifg", [a_j, g_s])
            v = torch.einsum("imf,imgd->fidg", [a_j, g_v])
        return s.flatten(1), v
