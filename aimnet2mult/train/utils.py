"""What a training run is equipped with: log, seeds, device."""

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from ignite.handlers.param_scheduler import ReduceLROnPlateauScheduler
from ignite.utils import manual_seed
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from aimnet2mult.config.builder import ConfigError


def accepted_keywords(target: Callable[..., Any]) -> list[str] | None:
    """Return the keywords that a class or function takes; None if it takes any.

    A class that passes ``**kwargs`` on to its parent takes the parent's keywords too. For a plateau, Ignite's or
    torch's, they are those of settings: torch's, and ``metric_name``.
    """
    if target in (ReduceLROnPlateauScheduler, ReduceLROnPlateau):
        return ["metric_name", *inspect.signature(ReduceLROnPlateau).parameters]
    functions = [target]
    if isinstance(target, type):
        functions = [vars(cls)["__init__"] for cls in inspect.getmro(target) if "__init__" in vars(cls)]
    names: list[str] = []
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # built-in callables without a signature
            return None
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return [name for name in dict.fromkeys(names) if name != "self"]
    return None


class TerminalHandler(logging.Handler):
    """Writes log lines to stderr above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(verbose: bool = False, rank: int = 0) -> None:
    """Send the package's log to stderr, of rank 0 only; ``verbose`` shows debug messages too."""
    package = logging.getLogger("aimnet2mult")
    for handler in [h for h in package.handlers if isinstance(h, TerminalHandler)]:
        package.removeHandler(handler)
    handler = TerminalHandler()
    handler.setFormatter(log_format())
    handler.addFilter(lambda record: rank == 0)
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # repeats the message of every exception it passes on


def log_format() -> logging.Formatter:
    """Return the format of log lines."""
    return logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    manual_seed(seed)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that the setting ``device`` stands for.

    Parameters
    ----------
    name : str
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    local_rank : int
        Number of this process on its machine; each takes a GPU of its own.

    Raises
    ------
    ConfigError
        A GPU that is not there.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and available == 0):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or local_rank)
    if index >= available:
        raise ConfigError(f"device: {name} asks for GPU {index}, this machine has {available}")
    return torch.device("cuda", index)
