"""One AIMNet2 for several fidelities: shared passes, element types and readouts of each fidelity's own.

The atom of element Z in fidelity f has the type Z + f·offset (`nbops.encode_fidelity`), so a batch mixes
fidelities freely and each molecule's result is what it would be alone.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.constants import FIDELITY_OFFSET, TYPES_PER_FIDELITY
from aimnet2mult.models.aimnet2 import AIMNet2


def num_types(num_fidelities: int, fidelity_offset: int = FIDELITY_OFFSET) -> int:
    """Rows of a table over the element types of all fidelities."""
    return (num_fidelities - 1) * fidelity_offset + TYPES_PER_FIDELITY


def is_type_table(key: str) -> bool:
    """Tell whether a state-dict key holds one row per element type (embedding, atomic shifts and scales)."""
    return key == "afv.weight" or key.endswith((".shifts.weight", ".scales.weight"))


def embedding_blocks(table: Tensor, num_fidelities: int, fidelity_offset: int) -> list[Tensor]:
    """Rows of each fidelity in an embedding table, without that of padding (Z = 0): views (128, F)."""
    firsts = [f * fidelity_offset for f in range(num_fidelities)]
    return [table[first + 1 : first + TYPES_PER_FIDELITY] for first in firsts]


class MixedFidelityAIMNet2(AIMNet2):
    """AIMNet2 whose element types, and readouts that learn, belong to a fidelity.

    All fidelities start from the same embedding rows and readouts: what they share is known from the first step,
    what differs is learned.

    Parameters
    ----------
    base_model_config : mapping
        ``{class, kwargs}`` or just the keyword arguments of `AIMNet2`.
    num_fidelities : int
        Number of fidelities F.
    fidelity_offset : int
        Distance of their element types, at least 129.
    use_fidelity_readouts : bool
        Readouts that learn exist once per fidelity (``fidelity_readouts.{f}.*``), the others once
        (``shared_readouts.*``); otherwise all are shared (``outputs.*``).
    """

    def __init__(
        self,
        base_model_config: Mapping[str, Any],
        num_fidelities: int,
        fidelity_offset: int = FIDELITY_OFFSET,
        use_fidelity_readouts: bool = True,
    ) -> None:
        if num_fidelities < 1:
            raise ValueError(f"num_fidelities must be at least 1, found {num_fidelities}")
        if fidelity_offset < TYPES_PER_FIDELITY:
            raise ValueError(f"fidelity_offset must be at least {TYPES_PER_FIDELITY}, found {fidelity_offset}")
        kwargs = dict(base_model_config.get("kwargs", base_model_config))
        kwargs["num_types"] = num_types(num_fidelities, fidelity_offset)
        super().__init__(**kwargs)
        self.num_fidelities = num_fidelities
        self.fidelity_offset = fidelity_offset
        self.use_fidelity_readouts = use_fidelity_readouts
        with torch.no_grad():
            first, *others = embedding_blocks(self.afv.weight, num_fidelities, fidelity_offset)
            for block in others:
                block.copy_(first)
        learning = {name for name, module in self.outputs.items() if any(p.requires_grad for p in module.parameters())}
        # Consecutive readouts of one kind, (do they learn, names), in the order of the file.
        self.stages = [
            (bool(kind), list(names)) for kind, names in itertools.groupby(self.outputs, learning.__contains__)
        ]
        if use_fidelity_readouts:
            outputs = dict(self.outputs.items())
            del self.outputs
            own = {name: module for name, module in outputs.items() if name in learning}
            self.fidelity_readouts = nn.ModuleList(nn.ModuleDict(copy.deepcopy(own)) for _ in range(num_fidelities))
            self.shared_readouts = nn.ModuleDict({n: m for n, m in outputs.items() if n not in learning})

    def readouts(self) -> list[nn.Module]:
        """Every readout module."""
        if "outputs" in self._modules:
            return list(self.outputs.values())
        heads = [module for head in self.fidelity_readouts for module in cast(nn.ModuleDict, head).values()]
        return [*self.shared_readouts.values(), *heads]

    def readout(self, data: dict[str, Tensor], places: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Run the readouts on an encoded batch: those that learn see element types, the others plain atomic numbers.

        With fidelity readouts, those that learn run on the atoms of their own fidelity.

        Parameters
        ----------
        data : dict
            The batch.
        places : sequence of Tensor, optional
            `atom_places` of the batch, where they cannot be found here because their number depends on the data;
            places of padding atoms may be among them.
        """
        types = data["numbers"]
        numbers, _ = nbops.decode_fidelity(types, self.fidelity_offset)
        shared = self.shared_readouts if self.use_fidelity_readouts else self.outputs
        for learning, names in self.stages:
            data["numbers"] = types if learning else numbers
            if learning and self.use_fidelity_readouts:
                data = self._fidelity_stage(data, self.atom_places(data) if places is None else places, names)
            else:
                for name in names:
                    data = shared[name](data)
        data["numbers"] = types
        return data

    def atom_places(self, data: dict[str, Tensor]) -> list[Tensor]:
        """For each fidelity the places of its real atoms among all places of the batch, int64."""
        _, fidelities = nbops.decode_fidelity(data["numbers"], self.fidelity_offset)
        real = data["_real_idx"]
        fidelity = fidelities.flatten()[real]
        return [real[fidelity == f] for f in range(self.num_fidelities)]

    def _fidelity_stage(self, data: dict[str, Tensor], places: Sequence[Tensor], names: list[str]) -> dict[str, Tensor]:
        """Run consecutive learning readouts, which act on atoms one by one, on the places of each fidelity."""
        n_axes = data["numbers"].dim()
        stages = [[cast(nn.ModuleDict, head)[name] for name in names] for head in self.fidelity_readouts]
        written = [str(module.key_out) for module in stages[0]]
        needed = [str(module.key_in) for module in stages[0]]
        read = [key for key in dict.fromkeys([*needed, "numbers", "coord"]) if key in data]

        rows: list[Tensor] = []
        results: dict[str, list[Tensor]] = {key: [] for key in written}
        for f, index in enumerate(places):
            if index.shape[0] == 0:
                continue
            part = {key: data[key].flatten(0, n_axes - 1).index_select(0, index) for key in read}
            part["_real_idx"] = torch.arange(index.shape[0], device=index.device)
            for module in stages[f]:
                part = module(part)
            rows.append(index)
            for key in results:
                results[key].append(part[key])
        place = torch.cat(rows)
        for key, values in results.items():
            value = torch.cat(values)
            full = torch.zeros([data["numbers"].numel(), *value.shape[1:]], dtype=value.dtype, device=value.device)
            full = full.index_copy(0, place, value).view([*data["numbers"].shape, *value.shape[1:]])
            data[key] = nbops.mask_padding(full, data)
        return data


def has_shared_embedding(model: AIMNet2) -> bool:
    """Tell whether each element has the same embedding row in all fidelities.

    Then features, and the charges of the backbone, do not depend on the fidelity, and one pass of the backbone serves
    the readouts of all. A model of one fidelity has it.
    """
    if not isinstance(model, MixedFidelityAIMNet2):
        return True
    first, *others = embedding_blocks(model.afv.weight.detach(), model.num_fidelities, model.fidelity_offset)
    # Elements that are marked as unknown have NaN for a row.
    return all(torch.allclose(block, first, rtol=0.0, atol=0.0, equal_nan=True) for block in others)


def fidelity_slice(state_dict: Mapping[str, Tensor], fidelity: int, fidelity_offset: int) -> dict[str, Tensor]:
    """Weights of one fidelity, as those of a plain AIMNet2 with `TYPES_PER_FIDELITY` element types.

    Parameters
    ----------
    state_dict : mapping
        Weights of a `MixedFidelityAIMNet2`, with fidelity readouts or without.
    fidelity : int
        Which fidelity.
    fidelity_offset : int
        Distance of element types.

    Returns
    -------
    dict
        Keys of `AIMNet2`; table rows are copies.
    """
    heads = any(key.startswith("fidelity_readouts.") for key in state_dict)
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if heads:
            if key.startswith(("outputs.", "shared_readout.")):
                continue
            if key.startswith("fidelity_readouts."):
                if not key.startswith(f"fidelity_readouts.{fidelity}."):
                    continue
                key = "outputs." + key.split(".", 2)[2]
            elif key.startswith("shared_readouts."):
                key = "outputs." + key.split(".", 1)[1]
        if is_type_table(key):
            first = fidelity * fidelity_offset
            table = value[first : first + TYPES_PER_FIDELITY].clone()
            table[0] = value[0]
            value = table
        out[key] = value
    return out
