"""Damping parameters of DFT-D3(BJ) and DFT-D4 from the command line; the lookup is `aimnet2mult.dispersion_params`.

::

    python -m aimnet2mult.tools.dispersion_params                  # names of all functionals known with D3(BJ)
    python -m aimnet2mult.tools.dispersion_params pbe0             # D3(BJ) parameters of one
    python -m aimnet2mult.tools.dispersion_params --method d4 pbe0 # its D4 parameters
"""

import sys
from dataclasses import asdict

import click

from aimnet2mult.dispersion_params import (
    BUILTIN,
    BUILTIN_D4,
    INSTALL_HINT,
    INSTALL_HINT_D4,
    D3Parameters,
    D4Parameters,
    d3bj_parameters,
    d4_parameters,
    database_file,
    known_functionals,
)
from aimnet2mult.utils.cli import user_errors

__all__ = [
    "BUILTIN",
    "BUILTIN_D4",
    "D3Parameters",
    "D4Parameters",
    "d3bj_parameters",
    "d4_parameters",
    "known_functionals",
    "main",
]


@click.command()
@click.argument("functional", required=False)
@click.option(
    "--method",
    type=click.Choice(["d3bj", "d4"]),
    default="d3bj",
    show_default=True,
    help="Dispersion correction: D3 with Becke-Johnson damping, or D4 with EEQ charges and ATM.",
)
@user_errors
def main(functional: str | None, method: str) -> None:
    """Print the damping parameters of FUNCTIONAL (a2 in Bohr), or the names of all known functionals."""
    if functional is None:
        print("\n".join(known_functionals(method)))
        if database_file({"d3bj": "dftd3", "d4": "dftd4"}[method]) is None:
            print({"d3bj": INSTALL_HINT, "d4": INSTALL_HINT_D4}[method], file=sys.stderr)
        return
    parameters = d3bj_parameters(functional) if method == "d3bj" else d4_parameters(functional)
    for name, value in asdict(parameters).items():
        print(f"{name} {value:.10g}")


if __name__ == "__main__":
    main()
