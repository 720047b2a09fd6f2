"""Building blocks of a model: networks, readouts, sums, and derivatives.

A readout reads documented keys of the batch (`aimnet2mult.nbops.BATCH_KEYS`), writes its own, and returns the
dictionary. YAML files name the classes as ``aimnet2mult.modules.<Class>``; electrostatics and dispersion have
files of their own and are found here under the same kind of name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aimnet2mult import nbops, ops
from aimnet2mult.config.builder import resolve
from aimnet2mult.constants import ATOMIC_MASSES, MAX_ATOMIC_NUMBER
from aimnet2mult.dftd4 import DFTD4
from aimnet2mult.dispersion import DFTD3
from aimnet2mult.dispersion_ts import D3TS, DispParam
from aimnet2mult.electrostatics import LRCoulomb, SRCoulomb
from aimnet2mult.reference_energies import ReferenceEnergies

__all__ = [
    "D3TS",
    "DFTD3",
    "DFTD4",
    "MLP",
    "AtomicScale",
    "AtomicShift",
    "AtomicSum",
    "BatchPart",
    "ChargeCorrection",
    "Dipole",
    "DispParam",
    "Embedding",
    "Forces",
    "LRCoulomb",
    "Output",
    "Quadrupole",
    "SRCoulomb",
    "SelfAtomicEnergies",
]


class MLP(nn.Sequential):
    """Linear layers with an activation after each: n_in -> hidden -> n_out.

    Parameters
    ----------
    n_in, n_out : int
        Input and output features.
    hidden : sequence of int
        Widths between.
    activation_fn : type or str
        Class of the activation, or its dotted name in ``torch.nn``.
    last_linear : bool
        No activation after the last layer.
    bias : bool
        Layers have a bias.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        hidden: Sequence[int] = (),
        activation_fn: type[nn.Module] | str = nn.GELU,
        last_linear: bool = True,
        bias: bool = True,
    ) -> None:
        activation = resolve(activation_fn, ["torch.nn"]) if isinstance(activation_fn, str) else activation_fn
        widths = [n_in, *hidden, n_out]
        layers: list[nn.Module] = []
        for i in range(len(widths) - 1):
            layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias))
            layers.append(activation())
        if last_linear:
            layers.pop()
        super().__init__(*layers)


class Embedding(nn.Embedding):
    """Features of each element type, rows as orthogonal as they can be; row 0 is padding and stays zero.

    Parameters
    ----------
    num_embeddings : int
        Rows, one per element type.
    embedding_dim : int
        Features.
    repeat : int
        Each feature is repeated so often in a row (one copy per radial function).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, repeat: int = 1) -> None:
        super().__init__(num_embeddings, embedding_dim * repeat, padding_idx=0)
        rows = torch.empty(num_embeddings, embedding_dim)
        nn.init.orthogonal_(rows)
        # Rows of a tall orthogonal matrix are short; bring them to unit mean square.
        rows = rows / rows.pow(2).mean(dim=1, keepdim=True).sqrt()
        with torch.no_grad():
            self.weight.copy_(rows.repeat_interleave(repeat, dim=1))
            self.weight[0] = 0.0


class Output(nn.Module):
    """Atomic quantity from atomic features by an MLP: ``key_in`` (…, n_in) -> ``key_out`` (…) or (…, n_out).

    Parameters
    ----------
    n_in, n_out : int
        Features in and out; an output of one feature has no axis for it.
    key_in, key_out : str
        Keys of the batch.
    mlp : mapping or nn.Module
        Further arguments of `MLP`, or a network.
    zero_start : bool
        An untrained network gives zero: its last layer starts at zero, and learns like any other.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        key_in: str,
        key_out: str,
        mlp: Mapping[str, Any] | nn.Module,
        zero_start: bool = False,
    ) -> None:
        super().__init__()
        self.key_in, self.key_out, self.n_out = key_in, key_out, n_out
        self.mlp = mlp if isinstance(mlp, nn.Module) else MLP(n_in=n_in, n_out=n_out, **mlp)
        if zero_start:
            last = [layer for layer in self.mlp.modules() if isinstance(layer, nn.Linear)][-1]
            for weight in last.parameters():
                nn.init.zeros_(weight)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``key_out``; rows of padding atoms are zero."""
        x = nbops.unpack_atoms(self.mlp(nbops.pack_atoms(data[self.key_in], data)), data)
        if self.n_out == 1:
            x = x.squeeze(-1)
        data[self.key_out] = x
        return data


class AtomicShift(nn.Module):
    """Add a learned constant per element type to an atomic quantity.

    Parameters
    ----------
    key_in, key_out : str
        Keys of the batch, (B, N) or (A,).
    num_types : int
        Rows of the table.
    """

    def __init__(self, key_in: str, key_out: str, num_types: int = 128) -> None:
        super().__init__()
        self.key_in, self.key_out = key_in, key_out
        self.shifts = nn.Embedding(num_types, 1, padding_idx=0)
        nn.init.zeros_(self.shifts.weight)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``key_out``; float64 if the table is."""
        data[self.key_out] = data[self.key_in] + self.shifts(data["numbers"]).squeeze(-1)
        return data


class AtomicScale(nn.Module):
    """Multiply an atomic quantity by a learned factor per element type, which starts at one.

    Parameters
    ----------
    key_in, key_out : str
        Keys of the batch, (B, N) or (A,).
    num_types : int
        Rows of the table.
    """

    def __init__(self, key_in: str, key_out: str, num_types: int = 128) -> None:
        super().__init__()
        self.key_in, self.key_out = key_in, key_out
        self.scales = nn.Embedding(num_types, 1, padding_idx=0)
        nn.init.ones_(self.scales.weight)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``key_out``; float64 if the table is."""
        data[self.key_out] = data[self.key_in] * self.scales(data["numbers"]).squeeze(-1)
        return data


class ChargeCorrection(nn.Module):
    """Add a correction per atom to the charges of the network, and keep the total charge (and spin) of each molecule.

        q_i <- q_i + c_i - (Σ_j c_j) / n        over the n real atoms of the molecule

    Charges of two methods differ: an `Output` before this module, of which each fidelity has its own, learns c from
    the atomic features. What the corrections add up to is taken off all atoms alike rather than by their flexibility,
    as `ops.nse` does: that needs no further learned quantity, loses no charge where the flexibilities are small, and a
    correction of zero leaves the charges as they are to the last bit. As after `ops.nse`, a charge depends on the
    whole molecule, however far apart its parts are.

    Parameters
    ----------
    key_in : str
        Corrections, e: (B, N) or (A,) of ``charges``; (B, N, 2) or (A, 2) of ``charges`` and ``spin_charges``. Keys
        that begin with ``_`` do not leave the model.
    """

    def __init__(self, key_in: str = "_charge_correction") -> None:
        super().__init__()
        self.key_in = key_in

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change ``charges``, and ``spin_charges`` if there are corrections of them.

        Raises
        ------
        ValueError
            Corrections of spin charges in a model with one charge channel, or of more than two kinds.
        """
        correction = data[self.key_in]
        if correction.dim() == data["numbers"].dim():
            correction = correction.unsqueeze(-1)
        n_kinds = correction.shape[-1]
        if n_kinds > (2 if "spin_charges" in data else 1):
            raise ValueError(
                f"{self.key_in} holds {n_kinds} corrections per atom; n_out of its readout must be 1 (charges), or 2 "
                "with num_charge_channels: 2 (charges and spin charges)"
            )
        correction = correction.double()
        total = nbops.mol_sum(nbops.mask_padding(correction, data), data)
        n_atoms = nbops.mol_sum(nbops.real_atoms(data["numbers"]).double(), data).clamp(min=1.0)
        mean = nbops.mol_expand(total / n_atoms.unsqueeze(-1), data)
        correction = nbops.mask_padding(correction - mean, data)
        for i, key in enumerate(["charges", "spin_charges"]):
            if i < n_kinds:
                data[key] = data[key] + correction[..., i].to(data[key].dtype)
        return data


class SelfAtomicEnergies(nn.Module):
    """Add the self-atomic energies (SAE) of the atoms to ``key_out``, in float64, whatever the model is cast to.

    And the terms of reference energies in ``charge`` and ``mult``, if there are any
    (`aimnet2mult.reference_energies`).

    Parameters
    ----------
    sae : mapping
        {atomic number: eV}, or `ReferenceEnergies`. Other elements give NaN; whoever calls the model refuses them
        first.
    key_out : str
        Energy of each molecule (B,), eV.
    """

    sae_bits: Tensor
    term_bits: Tensor

    def __init__(self, sae: Mapping[int, float], key_out: str = "energy") -> None:
        super().__init__()
        self.key_out = key_out
        reference = ReferenceEnergies.from_table(sae)
        self.with_terms = len(reference.terms) > 0
        table = torch.full((MAX_ATOMIC_NUMBER + 1,), torch.nan, dtype=torch.float64)
        table[0] = 0.0
        for z, energy in reference.items():
            table[z] = energy
        terms = torch.tensor([reference.charge, reference.spin], dtype=torch.float64)
        # The bits of the numbers as integers, so that casting the module does not touch them.
        self.register_buffer("sae_bits", table.view(torch.int64))
        self.register_buffer("term_bits", terms.view(torch.int64))

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add to ``key_out``, or set it."""
        sae = torch.view_copy(self.sae_bits, dtype=torch.float64)
        energy = nbops.mol_sum(sae[data["numbers"]], data)
        if self.with_terms:
            terms = torch.view_copy(self.term_bits, dtype=torch.float64)
            energy = energy + terms[0] * data["charge"].double() + terms[1] * (data["mult"].double() - 1.0)
        if self.key_out in data:
            energy = data[self.key_out] + energy
        data[self.key_out] = energy
        return data


class AtomicSum(nn.Module):
    """Sum an atomic quantity over each molecule, in float64: ``key_in`` (B, N) or (A,) -> ``key_out`` (B,)."""

    def __init__(self, key_in: str, key_out: str) -> None:
        super().__init__()
        self.key_in, self.key_out = key_in, key_out

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``key_out``."""
        data[self.key_out] = nbops.mol_sum(nbops.mask_padding(data[self.key_in].double(), data), data)
        return data


class _Multipole(nn.Module):
    """Positions relative to the origin, or to the centre of mass of each molecule."""

    masses: Tensor

    def __init__(self, key_in: str, key_out: str, center_coord: bool) -> None:
        super().__init__()
        self.key_in, self.key_out, self.center_coord = key_in, key_out, center_coord
        self.register_buffer("masses", torch.tensor(ATOMIC_MASSES, dtype=torch.float64), persistent=False)

    def positions(self, data: dict[str, Tensor]) -> Tensor:
        """(B, N, 3) or (A, 3), Å."""
        coord = data["coord"]
        if not self.center_coord:
            return coord
        mass = self.masses.to(coord.dtype)[data["numbers"]].unsqueeze(-1)
        mass_center = nbops.mol_sum(mass * coord, data) / nbops.mol_sum(mass, data)
        return coord - nbops.mol_expand(mass_center, data)


class Dipole(_Multipole):
    """Dipole moment of the atomic charges, Σ q r: ``key_out`` (B, 3), e·Å.

    Parameters
    ----------
    key_in, key_out : str
        Charges and result.
    center_coord : bool
        Take positions from the centre of mass (matters for charged molecules). ``numbers`` must be plain Z.
    """

    def __init__(self, key_in: str = "charges", key_out: str = "dipole", center_coord: bool = False) -> None:
        super().__init__(key_in, key_out, center_coord)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``key_out``."""
        data[self.key_out] = ops.point_charge_dipole(data[self.key_in], self.positions(data), data)
        return data


class Quadrupole(_Multipole):
    """Traceless quadrupole moment Σ q (r⊗r - r²/3): ``key_out`` (B, 6) as xx, yy, zz, xy, yz, xz, e·Å².

    Parameters
    ----------
    key_in, key_out : str
        Charges and result.
    center_coord : bool
        As in `Dipole`.
    """

    def __init__(self, key_in: str = "charges", key_out: str = "quadrupole", center_coord: bool = False) -> None:
        super().__init__(key_in, key_out, center_coord)

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``key_out``."""
        data[self.key_out] = ops.point_charge_quadrupole(data[self.key_in], self.positions(data), data)
        return data


class BatchPart(NamedTuple):
    """Some molecules of a dense batch.

    Attributes
    ----------
    rows : Tensor
        (k,) int64, which molecules.
    n_places : int
        Places up to the last atom of any of them; what lies beyond is padding.
    forces : bool
        Whether their forces are wanted.
    """

    rows: Tensor
    n_places: int
    forces: bool = True


class Forces(nn.Module):
    """A model with forces: minus the gradient of the summed energies with respect to ``coord``.

    Grad mode is switched on inside, so it works under ``torch.no_grad()``. In training mode the graph of the
    forces is kept for the second backward.

    Parameters
    ----------
    model : nn.Module
        Batch -> batch with ``key_in``.
    key_in, key_out : str
        Energy (B,), eV, and forces (shape of ``coord``), eV/Å.
    """

    def __init__(self, model: nn.Module, key_in: str = "energy", key_out: str = "forces") -> None:
        super().__init__()
        self.model = model
        self.key_in, self.key_out = key_in, key_out

    def forward(
        self,
        data: dict[str, Tensor],
        compute_forces: bool = True,
        parts: Sequence[BatchPart] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate the model; ``compute_forces=False`` leaves the forces, and their cost, out.

        Parameters
        ----------
        data : dict
            The batch, left as it is.
        compute_forces : bool
            Add ``key_out``.
        parts : sequence of BatchPart, optional
            Molecules that go through the model together, each in one part, of a dense batch of quantities per atom and
            per molecule: those of similar size, so that there is little padding, and those without forces apart, which
            have no graph of forces, and zeros for forces. It is one call because the gradients that processes share
            (DDP) belong to one call.

        Returns
        -------
        dict
            What the model returns, and the forces.

        Raises
        ------
        ValueError
            ``parts`` of a flat batch, or of one with a cell or neighbour matrices.
        """
        if not compute_forces:
            return self._without_forces(data)
        if parts is None:
            return self._with_forces(data)
        _check_divisible(data)
        results = [(self._with_forces if part.forces else self._with_zeros)(_part_of(data, part)) for part in parts]
        return _joined(data, parts, results)

    def _with_forces(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.enable_grad():
            coord = data["coord"].detach().requires_grad_(True)
            out = self.model({**data, "coord": coord})
            (gradient,) = torch.autograd.grad(out[self.key_in].sum(), coord, create_graph=self.training)
        out[self.key_out] = -gradient
        out["coord"] = data["coord"]
        return out

    def _without_forces(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model(data)

    def _with_zeros(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self._without_forces(data)
        # They hang on the graph, so that a loss of forces alone can go backward.
        out[self.key_out] = torch.zeros_like(data["coord"]) + out[self.key_in][:0].sum().to(data["coord"].dtype)
        return out


def _is_atomic(key: str) -> bool:
    return key in nbops.BATCH_KEYS and nbops.BATCH_KEYS[key].kind == "atom"


def _check_divisible(data: dict[str, Tensor]) -> None:
    if nbops.is_flat(data):
        raise ValueError(f"parts: coord must have shape (B, N, 3), found {list(data['coord'].shape)}")
    for key in data:
        if key in nbops.BATCH_KEYS and nbops.BATCH_KEYS[key].kind not in ("atom", "molecule"):
            raise ValueError(f"parts: a batch with {key} cannot be divided; evaluate all molecules with forces")


def _part_of(data: dict[str, Tensor], part: BatchPart) -> dict[str, Tensor]:
    """Inputs of some molecules of a dense batch, cut to the longest of them."""
    rows = part.rows.to(data["coord"].device, non_blocking=True)
    taken = {key: value.index_select(0, rows) for key, value in data.items()}
    return {key: value[:, : part.n_places] if _is_atomic(key) else value for key, value in taken.items()}


def _joined(
    data: dict[str, Tensor], parts: Sequence[BatchPart], results: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The batch with the results of its parts, each molecule in its place; inverse of `_part_of`."""
    n_places = data["numbers"].shape[1]
    place = torch.cat([part.rows for part in parts]).argsort().to(data["coord"].device, non_blocking=True)
    out = dict(data)
    for key in [key for key in results[0] if key not in data]:
        values = [result[key] for result in results]
        if _is_atomic(key):
            values = [_with_places(value, n_places) for value in values]
        out[key] = torch.cat(values).index_select(0, place)
    return out


def _with_places(value: Tensor, n_places: int) -> Tensor:
    """A quantity per atom (B, N, ...) with further places of zeros."""
    trailing = value.dim() - 2
    return nn.functional.pad(value, (0, 0) * trailing + (0, n_places - value.shape[1]))
