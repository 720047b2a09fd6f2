"""Random states of a training run, in types that a checkpoint may hold.

Global generators only (Python, numpy, torch on the CPU and on the GPU in use). What draws batches has a generator of
its own, seeded by the epoch, and saves its position by itself.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from torch import Tensor

from aimnet2mult.train.processes import gather_objects

logger = logging.getLogger(__name__)


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the states of the random generators of this process.

    Parameters
    ----------
    device : torch.device, optional
        The GPU that this process computes on; without one, or with a CPU, only CPU generators.

    Returns
    -------
    dict
        ``python``, ``numpy``, ``torch``, and with a GPU ``cuda``: tensors and numbers, which load with
        ``weights_only=True``.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put the random generators of this process into a state of `random_state`.

    A state from a CPU leaves the generator of a GPU as it is, and the other way round.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    key = numpy["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _numpy_state() -> dict[str, Any]:
    state: Any = np.random.get_state()
    _, key, pos, has_gauss, gauss = state
    return {
        "key": torch.from_numpy(key.astype(np.int64)),
        "pos": int(pos),
        "has_gauss": int(has_gauss),
        "gauss": float(gauss),
    }


def _bytes(state: Tensor) -> Tensor:
    return state.to(device="cpu", dtype=torch.uint8)


def random_states(device: torch.device | None = None) -> list[dict[str, Any]]:
    """Return `random_state` of every process, by rank. All processes call this together."""
    return gather_objects(random_state(device))


def set_random_states(states: Sequence[Mapping[str, Any]], device: torch.device | None = None) -> None:
    """Put the generators of this process into the state that its rank had in `random_states`.

    With more processes than there were, those that are new keep the state they have, and a warning says so.
    """
    rank, processes = idist.get_rank(), idist.get_world_size()
    if len(states) != processes and rank == 0:
        logger.warning(
            "the random states are those of %d process%s, this run has %d: it does not repeat the random choices of "
            "the one that it goes on with",
            *(len(states), "" if len(states) == 1 else "es", processes),
        )
    if rank < len(states):
        set_random_state(states[rank], device)
