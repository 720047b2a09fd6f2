"""Which devices can be used here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aimnet2mult.utils.text import first_line

if TYPE_CHECKING:
    import torch


def usable_device(device: str | torch.device, refusal: str) -> torch.device:
    """Return a device once a number has been put on it and read back.

    Parameters
    ----------
    device : str or torch.device
        For instance ``cuda:1``.
    refusal : str
        How the message begins if it cannot be used; PyTorch's reason follows.

    Raises
    ------
    ValueError
        It does not exist, or cannot be used.
    """
    import torch

    try:
        place = torch.zeros(1, device=device)
        place.item()
    # torch's ways to refuse: an unknown name or no such GPU, a build without CUDA, a device without kernels.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{refusal} ({first_line(error)})") from error
    return place.device


def chosen_device(device: str | torch.device) -> torch.device:
    """Return the device that a caller has chosen for a model.

    Raises
    ------
    ValueError
        It cannot be used here.
    """
    import torch

    kind = "GPU" if str(device).startswith("cuda") else "such device"
    return usable_device(device, f"device {device}: PyTorch {torch.__version__} finds no {kind} here; use cpu")
