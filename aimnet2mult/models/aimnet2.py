"""AIMNet2: features from geometry and charges, refined in passes that keep the total charge.

Anstine, Zubatyuk, Isayev (10.1039/D4SC08572H); spin-resolved charges: Zubatyuk et al. (10.1038/s41467-021-24904-0).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aimnet2mult import nbops, ops
from aimnet2mult.aev import AEVSV, ConvSV
from aimnet2mult.config.builder import MODEL_NAMESPACES, build_module, check_kwargs
from aimnet2mult.modules import MLP, AtomicShift, Embedding


def build_outputs(outputs: Mapping[str, Any], num_types: int) -> nn.ModuleDict:
    """Readouts in the order of the file, from nodes ``{class, kwargs}`` or modules.

    Tables over element types (`AtomicShift`) get ``num_types`` rows.
    """
    modules: dict[str, nn.Module] = {}
    for name, node in outputs.items():
        if isinstance(node, nn.Module):
            modules[name] = node
            continue
        node = dict(node)
        if str(node.get("class")).rpartition(".")[2] == AtomicShift.__name__:
            node["kwargs"] = {"num_types": num_types, **(node.get("kwargs") or {})}
        modules[name] = build_module(node, MODEL_NAMESPACES, f"outputs.{name}")
    return nn.ModuleDict(modules)


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
        n_passes = len(hidden)
        mlps: list[nn.Module] = []
        for p, widths in enumerate(hidden):
            last = p == n_passes - 1
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
        cutoff_lr = self.cutoff_lr_periodic if "cell" in data else self.cutoff_lr
        batch = nbops.internal_batch(data, self.cutoff, cutoff_lr)
        batch = self.readout(self.encode(batch))
        return nbops.emitted_batch(batch, data, self._atom_keys)

    def encode(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``aim`` and ``charges`` (``spin_charges``) to an internal batch."""
        data = self.aev(data)
        numbers = data["numbers"]
        a = self.afv(numbers).view(list(numbers.shape) + self.feature_shape)
        Q = self.channel_charges(data).to(a.dtype)
        q = torch.zeros(list(numbers.shape) + [self.num_charge_channels], dtype=a.dtype, device=a.device)
        n_passes = len(self.mlps)
        for p, mlp in enumerate(self.mlps):
            x = [a.flatten(numbers.dim()), self.conv_a(data, a)]
            if p > 0:
                x += [q, self.conv_q(data, q)]
            out = mlp(nbops.pack_atoms(torch.cat(x, dim=-1), data))
            out = nbops.unpack_atoms(out, data)
            if p == n_passes - 1:
                data["aim"] = out
            else:
                delta_q, f, delta_a = out.split(
                    [self.num_charge_channels, self.num_charge_channels, self.n_delta], dim=-1
                )
                # Pass 0 sets the charges: q is zero before it.
                q = ops.nse(Q, q + delta_q, f.pow(2), data)
                a = a + delta_a.reshape(a.shape)
        if self.num_charge_channels == 2:
            alpha, beta = q.unbind(dim=-1)
            data["charges"] = alpha + beta
            data["spin_charges"] = alpha - beta
        else:
            data["charges"] = q.squeeze(-1)
        return data

    def readout(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the readouts on an encoded batch."""
        for module in self.outputs.values():
            data = module(data)
        return data

    def channel_charges(self, data: dict[str, Tensor]) -> Tensor:
        """Total charge of each channel (B, C): Q, or ½(Q ± (mult - 1)) for alpha and beta."""
        charge = data["charge"]
        if self.num_charge_channels == 1:
            return charge.unsqueeze(-1)
        unpaired = data["mult"] - 1.0
        return 0.5 * torch.stack([charge + unpaired, charge - unpaired], dim=-1)
