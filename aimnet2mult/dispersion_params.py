"""Damping parameters of DFT-D3(BJ) and DFT-D4 by the name of a density functional, the one lookup of the package.

The usual functionals are built in; with the package ``dftd3`` or ``dftd4`` installed, every functional of its
database is known, and the database decides. Names match exactly after removing case, hyphens, underscores, spaces,
slashes and parentheses: B97-3c is ``b973c``, but revPBE is not PBE, and wB97M-V, which has a dispersion term of its
own, is nothing that D3 or D4 corrects. From the command line: `aimnet2mult.tools.dispersion_params`.
"""

import functools
import importlib.util
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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


@dataclass(frozen=True)
class D4Parameters:
    """Parameters of the DFT-D4 energy with three-body term; the fields are arguments of `aimnet2mult.dftd4.DFTD4`.

    Attributes
    ----------
    s6, s8, s9 : float
        Scale of the C6, the C8 and the three-body terms.
    a1, a2 : float
        Damping radius R0 = a1 √(C8/C6) + a2; a2 in Bohr.
    ga, gc : float
        Height and steepness of the charge scaling; only r²SCAN-3c has others than these.
    """

    s6: float
    s8: float
    s9: float
    a1: float
    a2: float
    ga: float = 3.0
    gc: float = 2.0


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

R2SCAN3C_CHARGE_SCALING = {"ga": 2.0, "gc": 1.0}
"""r²SCAN-3c scales by charge in its own way: S. Grimme et al., J. Chem. Phys. 154, 064103 (2021),
doi:10.1063/5.0040021; the database of ``dftd4`` does not hold these two."""

BUILTIN_D4: dict[str, D4Parameters] = {
    "b2plyp": D4Parameters(s6=0.64, s8=1.16888646, s9=1.0, a1=0.44154604, a2=4.73114642),
    "b3lyp": D4Parameters(s6=1.0, s8=2.02929367, s9=1.0, a1=0.40868035, a2=4.53807137),
    "b97d": D4Parameters(s6=1.0, s8=1.69460052, s9=1.0, a1=0.28904684, a2=4.13407323),
    "b97m": D4Parameters(s6=1.0, s8=0.6633, s9=1.0, a1=0.4288, a2=3.9935),
    "blyp": D4Parameters(s6=1.0, s8=2.34076671, s9=1.0, a1=0.44488865, a2=4.0933009),
    "bp86": D4Parameters(s6=1.0, s8=3.35497927, s9=1.0, a1=0.43645861, a2=4.92406854),
    "camb3lyp": D4Parameters(s6=1.0, s8=1.66041301, s9=1.0, a1=0.40267156, a2=5.17432195),
    "hf": D4Parameters(s6=1.0, s8=1.61679827, s9=1.0, a1=0.44959224, a2=3.35743605),
    "hse06": D4Parameters(s6=1.0, s8=1.19528249, s9=1.0, a1=0.38663183, a2=5.19133469),
    "m06": D4Parameters(s6=1.0, s8=0.16366729, s9=1.0, a1=0.53456413, a2=6.06192174),
    "m06l": D4Parameters(s6=1.0, s8=0.5949376, s9=1.0, a1=0.71422359, a2=6.35314182),
    "pbe": D4Parameters(s6=1.0, s8=0.95948085, s9=1.0, a1=0.38574991, a2=4.80688534),
    "pbe0": D4Parameters(s6=1.0, s8=1.20065498, s9=1.0, a1=0.40085597, a2=5.02928789),
    "pbesol": D4Parameters(s6=1.0, s8=1.71885698, s9=1.0, a1=0.47901421, a2=5.96771589),
    "pw6b95": D4Parameters(s6=1.0, s8=-0.31926054, s9=1.0, a1=0.04142919, a2=5.84655608),
    "r2scan": D4Parameters(s6=1.0, s8=0.6018749, s9=1.0, a1=0.51559235, a2=5.77342911),
    "r2scan3c": D4Parameters(s6=1.0, s8=0.0, s9=2.0, a1=0.42, a2=5.65, **R2SCAN3C_CHARGE_SCALING),
    "revpbe": D4Parameters(s6=1.0, s8=1.7467653, s9=1.0, a1=0.536349, a2=3.07261485),
    "rpbe": D4Parameters(s6=1.0, s8=1.31183787, s9=1.0, a1=0.46169493, a2=3.15711757),
    "scan": D4Parameters(s6=1.0, s8=1.46126056, s9=1.0, a1=0.62930855, a2=6.31284039),
    "tpss": D4Parameters(s6=1.0, s8=1.76596355, s9=1.0, a1=0.42822303, a2=4.54257102),
    "tpss0": D4Parameters(s6=1.0, s8=1.62438102, s9=1.0, a1=0.40329022, a2=4.80537871),
    "tpssh": D4Parameters(s6=1.0, s8=1.8589775, s9=1.0, a1=0.44286966, a2=4.60230534),
    "wb97m": D4Parameters(s6=1.0, s8=0.7761, s9=1.0, a1=0.7514, a2=2.7099),
    "wb97x": D4Parameters(s6=1.0, s8=0.5093, s9=1.0, a1=0.0662, a2=5.4487),
    "wb97x3c": D4Parameters(s6=1.0, s8=0.0, s9=1.0, a1=0.2464, a2=4.737),
}
"""Functionals that are known without ``dftd4``, values of its database: E. Caldeweyher et al., J. Chem. Phys. 150,
154122 (2019), doi:10.1063/1.5090222; wB97X, wB97M and B97M of A. Najibi, L. Goerigk, J. Comput. Chem. 41, 2562 (2020),
doi:10.1002/jcc.26411; r²SCAN of S. Ehlert et al., J. Chem. Phys. 154, 061101 (2021), doi:10.1063/5.0041008."""

ALIASES = {
    "bp86": "bp",
    "b1p86": "b1p",
    "b3p86": "b3p",
    "bhandhlyp": "bhlyp",
    "mpw1pw91": "mpw1pw",
    "mpwpw91": "mpwpw",
}
"""Usual names of functionals that the database of ``dftd3`` lists under another name."""

ALIASES_D4 = {
    "bp86": "bp",
    "b1p86": "b1p",
    "b3p86": "b3p",
    "b1pw91": "b1pw",
    "b3pw91": "b3pw",
    "mpw1pw91": "mpw1pw",
    "mpwpw91": "mpwpw",
}
"""Usual names of functionals that the database of ``dftd4`` lists under another name."""

INSTALL_HINT = 'installing dftd3 (pip install "aimnet2mult[dispersion]") adds the functionals of its database'
INSTALL_HINT_D4 = INSTALL_HINT.replace("dftd3", "dftd4")


def normalized(name: str) -> str:
    """Return a functional's name in small letters, without hyphens, underscores, spaces, slashes, parentheses."""
    return name.lower().replace("ω", "w").translate(str.maketrans("", "", "-_ /()"))


def database_file(package: str = "dftd3") -> Path | None:
    """Return the parameter file of an installed package, ``dftd3`` or ``dftd4``, None without the package.

    Raises
    ------
    FileNotFoundError
        The package is there, its parameter file is not.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    # Beside the package in the wheels; conda puts it among the shared files of the environment.
    shared = {"dftd3": "s-dftd3", "dftd4": "dftd4"}[package]
    places = [Path(spec.origin).parent, *(Path(sys.prefix, *parts, "share", shared) for parts in ((), ("Library",)))]
    for place in places:
        if (place / "parameters.toml").is_file():
            return place / "parameters.toml"
    raise FileNotFoundError(
        f"{places[0] / 'parameters.toml'}: no such file; the installation of {package} is incomplete"
    )


def _tables(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_database(path: Path) -> dict[str, D3Parameters | None]:
    """Read the parameter file of ``dftd3``: parameters by normalised name, None for functionals without D3(BJ)."""
    tables = _tables(path)
    defaults: dict[str, Any] = tables["default"]["parameter"]["d3"]["bj"]
    database: dict[str, D3Parameters | None] = {}
    for name, entry in tables["parameter"].items():
        damping = entry.get("d3", {}).get("bj")
        if damping is None:
            database[normalized(name)] = None
        else:
            values = {**defaults, **damping}
            database[normalized(name)] = D3Parameters(**{key: float(values[key]) for key in ("s6", "s8", "a1", "a2")})
    return _with_aliases(database, ALIASES)


def read_d4_database(path: Path) -> dict[str, D4Parameters | None]:
    """Read the parameter file of ``dftd4``, the variant with EEQ charges and ATM; None for functionals without it."""
    tables = _tables(path)
    defaults: dict[str, Any] = tables["default"]["parameter"]["d4"]["bj-eeq-atm"]
    database: dict[str, D4Parameters | None] = {}
    for name, entry in tables["parameter"].items():
        damping = entry.get("d4", {}).get("bj-eeq-atm")
        if damping is None:
            database[normalized(name)] = None
        else:
            values = {**defaults, **damping}
            parameters = {key: float(values[key]) for key in ("s6", "s8", "s9", "a1", "a2")}
            scaling = R2SCAN3C_CHARGE_SCALING if normalized(name) == "r2scan3c" else {}
            database[normalized(name)] = D4Parameters(**parameters, **scaling)
    return _with_aliases(database, ALIASES_D4)


Parameters = TypeVar("Parameters")


def _with_aliases(database: dict[str, Parameters], aliases: dict[str, str]) -> dict[str, Parameters]:
    return {alias: database[name] for alias, name in aliases.items() if name in database} | database


@functools.cache
def _database() -> dict[str, D3Parameters | None]:
    path = database_file("dftd3")
    return {} if path is None else read_database(path)


@functools.cache
def _d4_database() -> dict[str, D4Parameters | None]:
    path = database_file("dftd4")
    return {} if path is None else read_d4_database(path)


def known_functionals(method: str = "d3bj") -> list[str]:
    """Return the normalised names of all functionals that are known here with a method, d3bj or d4, sorted."""
    tables: dict[str, tuple[Mapping[str, object], Mapping[str, object]]] = {
        "d3bj": (_database(), BUILTIN),
        "d4": (_d4_database(), BUILTIN_D4),
    }
    database, builtin = tables[method]
    return sorted({name for name, parameters in database.items() if parameters is not None} | set(builtin))


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


def d4_parameters(functional: str) -> D4Parameters:
    """Return the D4 parameters (BJ damping, EEQ charges, ATM) of a density functional.

    Parameters
    ----------
    functional : str
        Such as ``wB97M``, ``PBE0``, ``r2SCAN``.

    Returns
    -------
    D4Parameters
        From the database of ``dftd4`` where it is installed and knows the functional, else from `BUILTIN_D4`.

    Raises
    ------
    ValueError
        The functional is not known, or not with D4; the message names the nearest ones.
    """
    name = normalized(functional)
    parameters = _d4_database().get(name) or BUILTIN_D4.get(name)
    if parameters is None:
        what = "has no D4 parameters with ATM" if name in _d4_database() else "is not known to D4"
        hint = "" if _d4_database() else f"; {INSTALL_HINT_D4}"
        raise ValueError(f"functional {functional!r} {what}: {nearest(name, known_functionals('d4'))}{hint}")
    return parameters
