"""Damping parameters of DFT-D3(BJ) from the command line; the lookup itself is `aimnet2mult.dispersion_params`.

::

    python -m aimnet2mult.tools.dispersion_params          # names of all known functionals
    python -m aimnet2mult.tools.dispersion_params pbe0     # parameters of one
"""

import sys

import click

from aimnet2mult.dispersion_params import (
    BUILTIN,
    INSTALL_HINT,
    D3Parameters,
    d3bj_parameters,
    database_file,
    known_functionals,
)
from aimnet2mult.utils.cli import user_errors

__all__ = ["BUILTIN", "D3Parameters", "d3bj_parameters", "known_functionals", "main"]


@click.command()
@click.argument("functional", required=False)
@user_errors
def main(functional: str | None) -> None:
    """Print the D3(BJ) damping parameters of FUNCTIONAL (a2 in Bohr), or the names of all known functionals."""
    if functional is None:
        print("\n".join(known_functionals()))
        if database_file() is None:
            print(INSTALL_HINT, file=sys.stderr)
        return
    parameters = d3bj_parameters(functional)
    print(f"s6 {parameters.s6:g}\ns8 {parameters.s8:g}\na1 {parameters.a1:g}\na2 {parameters.a2:g}")


if __name__ == "__main__":
    main()
