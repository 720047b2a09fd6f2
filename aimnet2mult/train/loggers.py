"""Where the numbers of a run go besides its own files: Weights & Biases."""

import logging
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from aimnet2mult.train.schema import TrainConfig

logger = logging.getLogger(__name__)

WANDB_URL = "https://api.wandb.ai"
"""Server of Weights & Biases unless the environment variable WANDB_BASE_URL names another."""

WANDB_TIMEOUT = 5.0
"""Seconds that a run waits for an answer of the server before it goes on offline."""


def start_wandb(config: "TrainConfig", folder: Path, settings: Mapping[str, Any]) -> Any | None:
    """Start a run of Weights & Biases that never asks and never waits long.

    Without a login or without an answer from the server the run goes on offline, and the log says so.

    Parameters
    ----------
    config : TrainConfig
        Its section ``wandb``; null or mode ``disabled`` starts nothing.
    folder : Path
        For wandb's files unless ``wandb.init.dir`` names another.
    settings : mapping
        What the run's page shows as its configuration.

    Returns
    -------
    wandb run or None
        With the methods ``log`` and ``finish``.
    """
    if config.wandb is None or config.wandb.init.mode == "disabled":
        return None
    import wandb

    init = config.wandb.init
    mode: Any = init.mode
    if mode == "online" and (reason := wandb_obstacle()):
        logger.warning("wandb: %s; the run is logged offline (`wandb sync` uploads it later)", reason)
        mode = "offline"
    arguments: dict[str, Any] = {
        "name": init.name or config.run_name,
        "project": init.project or config.project_name,
        "entity": init.entity,
        "notes": init.notes,
        "group": init.group,
        "tags": init.tags or None,
        "dir": str(init.dir or folder),
        "config": dict(settings),
        "settings": wandb.Settings(silent=True, console="off"),
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except wandb.Error as error:
        if mode == "offline":
            raise
        logger.warning("wandb: %s; the run is logged offline", " ".join(str(error).split()))
        run = wandb.init(mode="offline", **arguments)
    logger.info("wandb: %s", run.url or f"offline run in {run.dir}")
    return run


def wandb_obstacle() -> str | None:
    """Return why a run cannot be logged online, or None: no login, or no answer from the server."""
    url = os.environ.get("WANDB_BASE_URL", WANDB_URL)
    host = urlsplit(url).hostname or url
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _netrc_knows(host)):
        return f"no login for {host} (`wandb login`, or the environment variable WANDB_API_KEY)"
    try:
        with urllib.request.urlopen(url, timeout=WANDB_TIMEOUT):
            return None
    except urllib.error.HTTPError:
        return None  # it answered
    except OSError as error:
        return f"{host} does not answer ({error})"


def _netrc_knows(host: str) -> bool:
    """Whether the file in which `wandb login` keeps keys has one for ``host``."""
    default = Path("~/_netrc" if os.name == "nt" else "~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC", default)).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
