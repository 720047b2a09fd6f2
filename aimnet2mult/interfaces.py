"""Calls that TorchScript does not copy into their callers.

TorchScript copies functions and modules into whoever calls them, and its executor optimises the whole in the first
calls of a process, with all that is not used there: ten seconds for a network with Coulomb energy and D3. What is
called through an interface is compiled on its own, when it is called for the first time; Python knows no difference. A
module that is declared as an attribute (``pair_source: PairSource``) says so in each class, since annotations of base
classes do not count. TorchScript wants nothing but ``pass`` in the methods of an interface.
"""
# ruff: noqa: D102
# mypy: disable-error-code="empty-body"

import torch
from torch import Tensor, nn

from aimnet2mult import nbops
from aimnet2mult.nbops import LongRangePairs, PairBlock


@torch.jit.interface
class TensorModule(nn.Module):
    """A network of an atom: features -> features."""

    def forward(self, input: Tensor) -> Tensor:
        pass


@torch.jit.interface
class BatchModule(nn.Module):
    """A readout: batch -> batch."""

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        pass


@torch.jit.interface
class FidelityModel(nn.Module):
    """`aimnet2mult.models.jit_wrapper.DeployableModel`."""

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        pass

    def set_options(self, compute_stress: bool, compute_hessian: bool, check_spin: bool, dense_limit: int) -> None:
        pass

    def check_input(self, data: dict[str, Tensor]) -> None:
        pass

    def encoded(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        pass

    def energy_of(self, batch: dict[str, Tensor], first_order: bool) -> Tensor:
        pass

    def element_names(self, numbers: list[int]) -> str:
        pass


@torch.jit.interface
class PairSource(nn.Module):
    """`Pairs`."""

    def neighbors(self, data: dict[str, Tensor], cutoff: float) -> dict[str, Tensor]:
        pass

    def search(self, data: dict[str, Tensor], cutoff: float, block_pairs: int) -> LongRangePairs:
        pass

    def block(self, data: dict[str, Tensor], pairs: LongRangePairs, block: int) -> PairBlock:
        pass


class Pairs(PairSource):
    """The searches for pairs of `aimnet2mult.nbops`, for modules that are scripted."""

    @torch.jit.export
    def neighbors(self, data: dict[str, Tensor], cutoff: float) -> dict[str, Tensor]:
        """Add neighbour matrices (`nbops.with_neighbors`)."""
        return nbops.with_neighbors(data, cutoff)

    @torch.jit.export
    def search(self, data: dict[str, Tensor], cutoff: float, block_pairs: int) -> LongRangePairs:
        """Prepare pairs in blocks (`nbops.long_range_pairs`)."""
        return nbops.long_range_pairs(data, cutoff, block_pairs)

    @torch.jit.export
    def block(self, data: dict[str, Tensor], pairs: LongRangePairs, block: int) -> PairBlock:
        """Return the pairs of one block (`nbops.pair_block`)."""
        return nbops.pair_block(data, pairs, block)
