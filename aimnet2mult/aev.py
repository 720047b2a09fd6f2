"""From geometry to features: the radial basis (AEVSV) and the convolution over it (ConvSV).

Anstine, Zubatyuk, Isayev, AIMNet2 (10.1039/D4SC08572H). Letters: F features, G radial functions, H combinations.

The basis is laid out for the convolution, which is one batched matrix product per molecule and radial function:

========  ==================  =================
key       dense               flat
========  ==================  =================
``_g_s``  (B, G, N, N)        (A, M, G)
``_g_v``  (B, G, 3, N, N)     (A, M, G, 3)
========  ==================  =================
"""

import torch
from torch import Tensor, nn

from aimnet2mult import nbops, ops


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
        """(B, N, N) -> (B, G, N, N), or (A, M) -> (A, M, G)."""
        if d_ij.dim() == 3:
            d_ij, shifts = d_ij.unsqueeze(1), shifts.view(-1, 1, 1)
        else:
            d_ij = d_ij.unsqueeze(-1)
        return ops.gaussian_basis(d_ij, eta, shifts) * ops.cosine_cutoff(d_ij, rc)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``_g_s`` and ``_g_v`` for the pairs of the network."""
        d_ij, r_ij, _ = nbops.pair_vectors(data, "")
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
            s, v = self._sums_flat(data["_g_s"], data["_g_v"], nbops.neighbors(a, data, ""))
        n_channels, n_rows = v.shape[0], v.shape[1]
        v = torch.bmm(v.reshape(n_channels, n_rows * 3, -1), self.agh).view(n_channels, n_rows, 3, -1)
        squares = v.pow(2).sum(dim=2).transpose(0, 1).flatten(1)
        return torch.cat([s, squares], dim=-1).view(list(data["numbers"].shape) + [-1])

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
