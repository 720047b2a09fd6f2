"""Where a run comes from: time, machine, command, versions, commit."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import aimnet2mult
from aimnet2mult.models.base import versions

PACKAGES = ("numpy", "h5py", "pytorch-ignite", "omegaconf", "PyYAML", "wandb", "tensorboard")
"""Packages whose versions are recorded besides those of `aimnet2mult.models.base.versions`."""

GIT_TIMEOUT = 5.0
"""Longest time that a question to git may take, s."""


def provenance() -> dict[str, Any]:
    """Return when, where, by which command and with which software this process runs, in types for JSON.

    Returns
    -------
    dict
        ``start``, ``command``, ``cwd``, ``host``, ``process``, ``platform``, ``threads``, ``gpus``, ``versions``,
        and ``git``: ``commit`` and ``dirty`` of the checkout that the package is in, None if there is no such.
    """
    return {
        "start": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "cwd": _working_folder(),
        "host": platform.node(),
        "process": os.getpid(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(_gpus_in_use())],
        "versions": {**versions(), **_package_versions()},
        "git": source_commit(Path(aimnet2mult.__file__).absolute().parents[1]),
    }


def _gpus_in_use() -> int:
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _package_versions() -> dict[str, str]:
    found = {"cuda": torch.version.cuda} if torch.version.cuda is not None else {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def source_commit(folder: Path) -> dict[str, Any] | None:
    """Return ``commit`` and ``dirty`` (whether tracked files were changed) of a git checkout.

    None for a folder that is not the top of a checkout (an installed package inside somebody's repository is no part of
    it), and where git is missing, fails or does not answer within `GIT_TIMEOUT`.
    """
    if not (folder / ".git").exists():
        return None
    try:
        commit = _ask_git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_ask_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _ask_git(folder: Path, *question: str) -> str:
    # Inside a hook of git its variables name another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *question]
    answer = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_TIMEOUT, env=environment, check=True
    )
    return answer.stdout.decode(errors="replace").strip()
