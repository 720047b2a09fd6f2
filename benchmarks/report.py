"""What all benchmarks do with their results: check where they go, name the machine, write JSON and page."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import click

from aimnet2mult.models.base import versions
from aimnet2mult.utils.files import check_writable, write_text_atomic


def check_output(output: Path) -> None:
    """Raise an error unless ``--output`` is a JSON file that can be written."""
    check_writable(output)
    if output.suffix != ".json":
        raise ValueError(f"--output: {output} must end in .json")


def processor() -> str:
    """Name of the processor that computes."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> bool:
    """Tell whether a package is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of what a result depends on, and of those of the packages named that are there."""
    return versions() | {name: importlib.metadata.version(name) for name in packages if installed(name)}


def write_results(output: Path, result: dict[str, Any], page: str, *others: Path) -> None:
    """Write the result (JSON) and its page (Markdown, beside it), print the page and the paths of all that was written.

    ``others`` were written before, for instance pictures.
    """
    write_text_atomic(output, json.dumps(result, indent=1) + "\n")
    write_text_atomic(output.with_suffix(".md"), page)
    click.echo(page)
    for path in (*others, output, output.with_suffix(".md")):
        click.echo(path)
