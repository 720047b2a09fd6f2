"""Find out whether a compiled model gives here what it gave where it was compiled.

``python -m aimnet2mult.tools.verify model_fid0.jpt`` evaluates the golden cases inside the file
(`aimnet2mult.models.golden`) on the machine at hand, in single and in double precision, and prints the differences.
The exit status is 0 if they are round-off, 1 if they are not, and 2 for a file that cannot be verified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from aimnet2mult.utils.cli import user_errors
from aimnet2mult.utils.devices import usable_device

if TYPE_CHECKING:
    from pathlib import Path

    from aimnet2mult.models.golden import Difference


def verify(
    path: str | Path, device: str = "cpu", tolerance: float | None = None, tolerance_double: float | None = None
) -> list[Difference]:
    """Evaluate the golden cases of a compiled model.

    Parameters
    ----------
    path : str or Path
        A ``.jpt`` file. TorchScript files are programs: verify only what you trust.
    device : str
        Where to evaluate, for instance ``cuda``.
    tolerance, tolerance_double : float, optional
        Largest differences to accept in single and in double precision, in eV, eV/Å and e; by default what round-off
        explains (`aimnet2mult.models.golden`).

    Returns
    -------
    list of Difference
        One for each case, precision and quantity.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; not a compiled model, or one without golden cases; no such device; a tolerance that is no number.
    """
    from aimnet2mult.models.compiled_file import read_compiled_file
    from aimnet2mult.models.golden import compare
    from aimnet2mult.models.jit_wrapper import load_jit_model

    tolerances = {"--tolerance": tolerance, "--tolerance-double": tolerance_double}
    for flag, value in tolerances.items():
        if value is not None and not value >= 0.0:
            raise ValueError(f"{flag} {value}: expected a number that is not negative")
    content = read_compiled_file(path)
    if content.golden is None:
        version = content.metadata.get("format_version", "unknown")
        raise ValueError(f"{path}: holds no golden cases (format version {version}); compile it anew to have them")
    usable_device(device, f"--device {device}: not available here")
    model = load_jit_model(path, device)
    found = compare(content.golden, "float32", model, device, tolerance)
    if device.startswith("mps"):  # which has no double precision
        return found
    model.module.double()
    return found + compare(content.golden, "float64", model, device, tolerance_double)


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path())
@click.option("--device", default="cpu", help="Where to evaluate, for instance cuda.")
@click.option(
    "--tolerance",
    type=float,
    help="Largest difference to accept in single precision, in eV, eV/Å and e.  [default: what round-off explains]",
)
@click.option(
    "--tolerance-double", type=float, help="The same in double precision.  [default: 1e-8 and relative 1e-14]"
)
@user_errors
def main(model: str, device: str, tolerance: float | None, tolerance_double: float | None) -> None:
    """Compare what a compiled MODEL (.jpt) gives on this machine with what it gave where it was compiled."""
    found = verify(model, device, tolerance, tolerance_double)
    from aimnet2mult.models.base import versions
    from aimnet2mult.models.compiled_file import read_compiled_file
    from aimnet2mult.models.golden import table

    made = read_compiled_file(model).metadata.get("versions", {})
    here = versions()
    click.echo(f"{model} on {device}: compiled with torch {made.get('torch', '?')}, here torch {here['torch']}")
    click.echo("largest differences from the golden cases in the file:")
    click.echo("\n".join(table(found)))
    beyond = [difference for difference in found if not difference.within]
    if beyond:
        worst = max(beyond, key=lambda difference: difference.found / max(difference.allowed, 1e-300))
        click.echo(
            f"NOT VERIFIED: {len(beyond)} of {len(found)} differences are more than round-off, the worst the "
            f"{worst.text}. Do not trust this model on this machine."
        )
        raise SystemExit(1)
    click.echo(f"verified: all {len(found)} differences are round-off")


if __name__ == "__main__":
    main()
