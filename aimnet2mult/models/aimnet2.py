"""AIMNet2: features from geometry and charges, refined in passes that keep the total charge.

Anstine, Zubatyuk, Isayev (10.1039/D4SC08572H); spin-resolved charges: Zubatyuk et al. (10.1038/s41467-021-24904-0).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aimnet2mult import nbops, ops
from aimnet2mult.aev import (
    AEVSV,
    ConvSV,
    PairList,
    list_vectors,
    neighbor_sums,
    neighbor_sums_adjoint,
    pair_list,
)
from aimnet2mult.config.builder import MODEL_NAMESPACES, build_module, check_kwargs
from aimnet2mult.interfaces import BatchModule, TensorModule
from aimnet2mult.modules import MLP, AtomicScale, AtomicShift, Embedding


def build_outputs(outputs: Mapping[str, Any], num_types: int) -> nn.ModuleDict:
    """Readouts in the order of the file, from nodes ``{class, kwargs}`` or modules.

    Tables over element types (`AtomicShift`, `AtomicScale`) get ``num_types`` rows.
    """
    modules: dict[str, nn.Module] = {}
    for name, node in outputs.items():
        if isinstance(node, nn.Module):
            modules[name] = node
            continue
        node = dict(node)
        if str(node.get("class")).rpartition(".")[2] in (AtomicShift.__name__, AtomicScale.__name__):
            node["kwargs"] = {"num_types": num_types, **(node.get("kwargs") or {})}
        modules[name] = build_module(node, MODEL_NAMESPACES, f"outputs.{name}")
    return nn.ModuleDict(modules)


class Passes(NamedTuple):
    """What the passes of a large batch leave behind for their derivatives.

    Attributes
    ----------
    basis
        (G, 4, P).
    tables
        Of each pass, the features whose sums over neighbours it takes, (G, A, F).
    inputs
        Of each pass, features, charges and sums over neighbours (G, 4, A, F).
    outputs
        Of each pass, features and charges; ``aim`` of the last.
    """

    basis: Tensor
    tables: list[Tensor]
    inputs: list[list[Tensor]]
    outputs: list[list[Tensor]]


class AIMNet2(nn.Module):
    """The network with its readouts: batch -> batch with energy, charges (and spin charges).

    Parameters
    ----------
    aev : mapping
        Arguments of `AEVSV`.
    nfeature : int
        Features F of an atom.
    d2features : bool
        One set of features per radial function.
    ncomb_v : int
        Combinations H of the vector part of the convolutions.
    hidden : sequence of sequence of int
        Hidden widths of the MLP of each pass.
    aim_size : int
        Features ``aim`` that the readouts see.
    outputs : mapping
        Readouts by name, run in order; nodes ``{class, kwargs}`` or modules.
    num_charge_channels : int
        1: charges. 2: alpha and beta, which give charges and spin charges.
    num_types : int
        Rows of the tables over element types.

    Attributes
    ----------
    cutoff : float
        Range of the network, Å.
    cutoff_lr, cutoff_lr_periodic : float
        Range of the long-range readouts for molecules and crystals, Å; 0 without any, ``inf`` for all pairs.
    one_length : bool
        Scalar and vector parts have as many radial functions, which `first_derivatives` needs.
    """

    def __init__(
        self,
        aev: Mapping[str, Any],
        nfeature: int,
        d2features: bool,
        ncomb_v: int,
        hidden: Sequence[Sequence[int]],
        aim_size: int,
        outputs: Mapping[str, Any],
        num_charge_channels: int = 1,
        num_types: int = 128,
    ) -> None:
        super().__init__()
        if num_charge_channels not in (1, 2):
            raise ValueError(
                f"num_charge_channels must be 1 (closed shell) or 2 (open shell), not {num_charge_channels}"
            )
        if len(hidden) < 2:
            raise ValueError(f"hidden needs the widths of at least two passes, found {len(hidden)}")
        check_kwargs(AEVSV, aev, "aev")
        self.num_charge_channels = num_charge_channels
        self.num_types = num_types
        self.d2features = d2features
        self.aev = AEVSV(**aev)
        nshifts = self.aev.nshifts_s
        self.feature_shape = [nfeature, nshifts] if d2features else [nfeature]
        n_flat = nfeature * nshifts if d2features else nfeature
        self.n_delta = n_flat

        self.afv = Embedding(num_types, nfeature, repeat=nshifts if d2features else 1)
        nshifts_v = self.aev.nshifts_v
        self.conv_a = ConvSV(nshifts, nfeature, d2features, nshifts_v, ncomb_v)
        self.conv_q = ConvSV(nshifts, num_charge_channels, False, nshifts_v, ncomb_v)

        n_in_a = n_flat + self.conv_a.output_size
        n_in_q = num_charge_channels + self.conv_q.output_size
        self.n_passes = len(hidden)
        mlps: list[nn.Module] = []
        for p, widths in enumerate(hidden):
            last = p == self.n_passes - 1
            n_out = aim_size if last else n_flat + 2 * num_charge_channels
            n_in = n_in_a if p == 0 else n_in_a + n_in_q
            mlp = MLP(n_in, n_out, widths, nn.GELU, last_linear=p == 0)
            if not last:
                # Start with equally flexible atoms: where Σf is not large against the ε of `ops.nse`, charge is lost.
                linear = [layer for layer in mlp if isinstance(layer, nn.Linear)][-1]
                nn.init.ones_(linear.bias[num_charge_channels : 2 * num_charge_channels])
            mlps.append(mlp)
        self.mlps = nn.ModuleList(mlps)
        self.outputs = build_outputs(outputs, num_types)
        self.one_length = nshifts_v == nshifts
        self.update_keys_and_cutoffs()

    @torch.jit.unused
    def readouts(self) -> list[nn.Module]:
        """Every readout module, in the order in which they run."""
        return list(self.outputs.values())

    @torch.jit.unused
    def update_keys_and_cutoffs(self) -> None:
        """Take the ranges from the parts; to be called after weights were loaded or a readout was added."""
        self.cutoff = float(torch.maximum(self.aev.rc_s, self.aev.rc_v))
        self.cutoff_lr = max([float(getattr(m, "cutoff_lr", 0.0)) for m in self.readouts()] or [0.0])
        self.cutoff_lr_periodic = max([float(getattr(m, "cutoff_lr_periodic", 0.0)) for m in self.readouts()] or [0.0])
        self._atom_keys = [name for name, key in nbops.BATCH_KEYS.items() if key.kind == "atom"]

    @torch.jit.unused
    def add_output(self, name: str, module: nn.Module) -> None:
        """Append a readout, for instance self-atomic energies or dispersion."""
        if name in self.outputs:
            raise ValueError(f"there is a readout with the name {name} already")
        self.outputs[name] = module
        self.update_keys_and_cutoffs()

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate a batch.

        Parameters
        ----------
        data : dict
            Any layout of `nbops.internal_batch`; left as it is.

        Returns
        -------
        dict
            The caller's keys, ``energy`` (B,) float64, ``charges``, ``spin_charges`` (2 channels), ``aim`` and what
            further readouts write, in the caller's layout.
        """
        batch = nbops.internal_batch(data, self.cutoff)
        batch = self.readout(self.encode(batch))
        return nbops.emitted_batch(batch, data, self._atom_keys)

    def encode(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``aim`` and ``charges`` (``spin_charges``) to an internal batch."""
        data = self.aev(data)
        a, q = self.initial_features(data)
        Q = self.channel_charges(data).to(a.dtype)
        for p in range(self.n_passes):
            mlp: TensorModule = self.mlps[p]  # type: ignore[assignment]
            x = [a.flatten(data["numbers"].dim()), self.conv_a(data, a)]
            if p > 0:
                x += [q, self.conv_q(data, q)]
            out = nbops.unpack_atoms(mlp.forward(nbops.pack_atoms(torch.cat(x, dim=-1), data)), data)
            if p == self.n_passes - 1:
                data["aim"] = out
            else:
                a, q = self.refined(a, q, out, Q, data)
        return self.with_charges(q, data)

    def initial_features(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features (..., F[, G]) and charges (..., C), all zero, of the atoms before the first pass."""
        numbers = data["numbers"]
        a = self.afv(numbers).view(list(numbers.shape) + self.feature_shape)
        q = torch.zeros(list(numbers.shape) + [self.num_charge_channels], dtype=a.dtype, device=a.device)
        return a, q

    def refined(self, a: Tensor, q: Tensor, out: Tensor, Q: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features and charges after a pass whose network gave ``out``; ``Q`` (B, C) are the total charges."""
        delta_q, f, delta_a = out.split([self.num_charge_channels, self.num_charge_channels, self.n_delta], dim=-1)
        # The first pass sets the charges: q is zero before it.
        q = ops.nse(Q, q + delta_q, f.pow(2), data)
        return a + delta_a.reshape(a.shape), q

    def with_charges(self, q: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write ``charges`` (and ``spin_charges``) from the charges of the channels (..., C)."""
        if self.num_charge_channels == 2:
            alpha, beta = q.unbind(dim=-1)
            data["charges"] = alpha + beta
            data["spin_charges"] = alpha - beta
        else:
            data["charges"] = q.squeeze(-1)
        return data

    def first_derivatives(self, data: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Evaluate a flat internal batch with the gradient of its energy, in memory linear in atoms and pairs.

        The same as differentiating ``readout(encode(data))``, one pass after the other. The neighbours of the network
        must be those of `nbops.internal_batch`, which come in both orders.

        Parameters
        ----------
        data : dict
            Flat internal batch.

        Returns
        -------
        results : dict
            The batch with results, whose values are to be used, not their graph.
        coord_gradient : Tensor
            (A, 3), eV/Å.
        cell_gradient : Tensor
            (B, 3, 3), eV/Å; (0, 3, 3) without a cell.
        """
        pairs = pair_list(data)
        passes = self._passes(data, pairs)

        energy_data = data.copy()
        energy_data["_first_order"] = data["charge"]
        aim, q = nbops.leaf(passes.outputs[-1][0]), nbops.leaf(passes.inputs[-1][1])
        energy_data["aim"] = aim
        by = [aim, q, nbops.leaf(data["coord"])]
        energy_data["coord"] = by[2]
        if "cell" in data:
            by.append(nbops.leaf(data["cell"]))
            energy_data["cell"] = by[3]
        results = self.readout(self.with_charges(q, energy_data))
        energy = results["energy"].sum()
        gradient = nbops.gradients([energy], by, [torch.ones_like(energy)])

        table, d_sums = self._backward(passes, gradient[0], gradient[1], pairs)
        coord_gradient, cell_gradient = self.aev.pair_gradient(table, d_sums, pairs, data)
        if "cell" in data:
            cell_gradient = cell_gradient + gradient[3]
        return results, coord_gradient + gradient[2], cell_gradient

    def _passes(self, data: dict[str, Tensor], pairs: PairList) -> Passes:
        """Run all passes, each with a graph of its own from its inputs to its outputs."""
        basis = self.aev.pair_basis(list_vectors(pairs, 0, pairs.i.shape[0], data)).detach()
        tables: list[Tensor] = []
        inputs: list[list[Tensor]] = []
        outputs: list[list[Tensor]] = []
        n_features = self.feature_shape[0]
        a, q = self.initial_features(data)
        Q = self.channel_charges(data).to(a.dtype)
        for p in range(self.n_passes):
            mlp: TensorModule = self.mlps[p]  # type: ignore[assignment]
            a, q = nbops.leaf(a), nbops.leaf(q)
            table = self._table(a.detach(), q.detach(), p > 0)
            sums = nbops.leaf(neighbor_sums(table, basis, pairs))
            x = [a.flatten(1), self.conv_a.from_sums(sums[..., :n_features])]
            if p > 0:
                x += [q, self.conv_q.from_sums(sums[..., n_features:])]
            tables.append(table)
            inputs.append([a, q, sums])
            out = nbops.unpack_atoms(mlp.forward(nbops.pack_atoms(torch.cat(x, dim=-1), data)), data)
            if p == self.n_passes - 1:
                outputs.append([out])
            else:
                a, q = self.refined(a, q, out, Q, data)
                outputs.append([a, q])
        return Passes(basis, tables, inputs, outputs)

    def _backward(self, passes: Passes, d_aim: Tensor, d_q: Tensor, pairs: PairList) -> tuple[Tensor, Tensor]:
        """Features of all passes (G, A, F) and derivatives of the energy by their sums (G, 4, A, F), for the geometry.

        ``d_aim`` and ``d_q`` are derivatives by the features and charges that the readouts see.
        """
        n_features = self.feature_shape[0]
        last = len(passes.inputs) - 1
        upstream = [d_aim]
        sums_gradients: list[Tensor] = []
        for p in range(last, -1, -1):
            gradient = nbops.gradients(passes.outputs[p], passes.inputs[p], upstream)
            d_a, d_sums = gradient[0], gradient[2]
            # The last pass leaves the charges as they are.
            d_q = d_q + gradient[1] if p == last else gradient[1]
            if p > 0:
                d_table = neighbor_sums_adjoint(d_sums, passes.basis, pairs)
                d_features = d_table[..., :n_features]
                d_a = d_a + (d_features.permute(1, 2, 0) if self.d2features else d_features.sum(dim=0))
                d_q = d_q + d_table[..., n_features:].sum(dim=0)
            upstream = [d_a, d_q]
            sums_gradients.append(d_sums)
        sums_gradients.reverse()
        return torch.cat(passes.tables, dim=-1), torch.cat(sums_gradients, dim=-1)

    def _table(self, a: Tensor, q: Tensor, with_charges: bool) -> Tensor:
        """Features of the atoms for each radial function, and their charges after them: (G, A, F [+ C])."""
        table = a.permute(2, 0, 1) if self.d2features else a.expand([self.aev.nshifts_s] + list(a.shape))
        if not with_charges:
            return table.contiguous()
        return torch.cat([table, q.expand([table.shape[0]] + list(q.shape))], dim=-1)

    def readout(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the readouts on an encoded batch."""
        names: list[str] = list(self.outputs.keys())
        for name in names:
            module: BatchModule = self.outputs[name]  # type: ignore[assignment]
            data = module.forward(data)
        return data

    def channel_charges(self, data: dict[str, Tensor]) -> Tensor:
        """Total charge of each channel (B, C): Q, or ½(Q ± (mult - 1)) for alpha and beta."""
        charge = data["charge"]
        if self.num_charge_channels == 1:
            return charge.unsqueeze(-1)
        unpaired = data["mult"] - 1.0
        return 0.5 * torch.stack([charge + unpaired, charge - unpaired], dim=-1)
