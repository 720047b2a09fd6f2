"""Damping parameters of DFT-D3(BJ) by the name of a density functional, the one lookup of the package.

Nine functionals are built in; with the package ``dftd3`` installed, every functional of its database is known, and
the database decides. Names match exactly after removing case, hyphens, underscores, spaces, slashes and
parentheses: B97-3c is ``b973c``, but revPBE is not PBE, and wB97M-V, which has a dispersion term of its own, is
nothing that D3 corrects. From the command line: `aimnet2mult.tools.dispersion_params`.
"""

import functools
import importlib.util
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimnet2mult.config.builder import nearest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class D3Parameters:
    """Damping parameters of the two-body D3(BJ) energy.

    Attributes
    ----------
    s6, s8 : float
        Scale of the C6 and C8 terms.
    a1, a2 : float
        Damping radius R0 = a1 √(C8/C6) + a2; a2 in Bohr.
    """

    s6: float
    s8: float
    a1: float
    a2: float


M062X = D3Parameters(s6=1.0, s8=0.0, a1=0.0, a2=5.058)
"""M06-2X is published with zero damping only; with these values earlier models of this kind were exported."""

BUILTIN: dict[str, D3Parameters] = {
    "b3lyp": D3Parameters(s6=1.0, s8=1.9889, a1=0.3981, a2=4.4211),
    "pbe": D3Parameters(s6=1.0, s8=0.7875, a1=0.4289, a2=4.4407),
    "pbe0": D3Parameters(s6=1.0, s8=1.2177, a1=0.4145, a2=4.8593),
    "wb97x": D3Parameters(s6=1.0, s8=0.2641, a1=0.0, a2=5.4959),
    "wb97m": D3Parameters(s6=1.0, s8=0.3908, a1=0.566, a2=3.128),
    "tpss": D3Parameters(s6=1.0, s8=1.9435, a1=0.4535, a2=4.4752),
    "bp86": D3Parameters(s6=1.0, s8=3.2822, a1=0.3946, a2=4.8516),
    "m062x": M062X,
    "b973c": D3Parameters(s6=1.0, s8=1.5, a1=0.37, a2=4.1),
}
"""Functionals that are known without ``dftd3``; values of its database, but for M06-2X."""

ALIASES = {
    "bp86": "bp",
    "b1p86": "b1p",
    "b3p86": "b3p",
    "bhandhlyp": "bhlyp",
    "mpw1pw91": "mpw1pw",
    "mpwpw91": "mpwpw",
}
"""Usual names of functionals that the database of ``dftd3`` lists under another name."""

INSTALL_HINT = 'installing dftd3 (pip install "aimnet2mult[dispersion]") adds the functionals of its database'


def normalized(name: str) -> str:
    """Return a functional's name in small letters, without hyphens, underscores, spaces, slashes, parentheses."""
    return name.lower().replace("ω", "w").translate(str.maketrans("", "", "-_ /()"))


def database_file() -> Path | None:
    """Return the parameter file of the installed package ``dftd3``, None without the package.

    Raises
    ------
    FileNotFoundError
        The package is there, its parameter file is not.
    """
    spec = importlib.util.find_spec("dftd3")
    if spec is None or spec.origin is None:
        return None
    # Beside the package in the wheels; conda puts it among the shared files of the environment.
    places = [Path(spec.origin).parent, *(Path(sys.prefix, *parts, "share", "s-dftd3") for parts in ((), ("Library",)))]
    for place in places:
        if (place / "parameters.toml").is_file():
            return place / "parameters.toml"
    raise FileNotFoundError(f"{places[0] / 'parameters.toml'}: no such file; the installation of dftd3 is incomplete")


def read_database(path: Path) -> dict[str, D3Parameters | None]:
    """Read the parameter file of ``dftd3``: parameters by normalised name, None for functionals without D3(BJ)."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    defaults: dict[str, Any] = tables["default"]["parameter"]["d3"]["bj"]
    database: dict[str, D3Parameters | None] = {}
    for name, entry in tables["parameter"].items():
        damping = entry.get("d3", {}).get("bj")
        if damping is None:
            database[normalized(name)] = None
        else:
            values = {**defaults, **damping}
            database[normalized(name)] = D3Parameters(**{key: float(values[key]) for key in ("s6", "s8", "a1", "a2")})
    for alias, name in ALIASES.items():
        if name in database:
            database.setdefault(alias, database[name])
    return database


@functools.cache
def _database() -> dict[str, D3Parameters | None]:
    path = database_file()
    return {} if path is None else read_database(path)


def known_functionals() -> list[str]:
    """Return the normalised names of all functionals that `d3bj_parameters` knows here, sorted."""
    database = {name for name, parameters in _database().items() if parameters is not None}
    return sorted(database | set(BUILTIN))


def d3bj_parameters(functional: str) -> D3Parameters:
    """Return the D3(BJ) parameters of a density functional.

    Parameters
    ----------
    functional : str
        Such as ``wB97M``, ``PBE0``, ``B97-3c``.

    Returns
    -------
    D3Parameters
        From the database of ``dftd3`` where it is installed and knows the functional, else from `BUILTIN`.

    Raises
    ------
    ValueError
        The functional is not known, or not with D3(BJ); the message names the nearest ones.
    """
    name = normalized(functional)
    parameters = _database().get(name) or BUILTIN.get(name)
    if parameters is None:
        what = "has zero damping only, not D3(BJ)" if name in _database() else "is not known"
        hint = "" if _database() else f"; {INSTALL_HINT}"
        raise ValueError(f"functional {functional!r} {what}: {nearest(name, known_functionals())}{hint}")
    if parameters is M062X:
        logger.warning(
            "%s has no published D3(BJ) parameters; using s6 %g, s8 %g, a1 %g, a2 %g Bohr",
            *(functional, M062X.s6, M062X.s8, M062X.a1, M062X.a2),
        )
    return parameters
