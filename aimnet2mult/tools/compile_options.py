"""What a user may choose when a model is compiled: dispersion, Coulomb method, and what else the file computes.

That goes for dispersion only within what the labels allow: what training subtracted from the labels of a fidelity is
what is embedded, with the very same parameters. Another correction than that is embedded on request, with a warning,
but never on top of labels that contain dispersion.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aimnet2mult.dftd4 import DFTD4
    from aimnet2mult.dispersion import DFTD3

logger = logging.getLogger(__name__)

ALL = "all"
"""Name for all fidelities, on the command line and in names of files."""

SUBTRACTED = "subtracted from the labels"
COMMAND_LINE = "command line"
"""Where an embedded correction comes from, in the metadata."""

METHODS = {"d3bj": "D3(BJ)", "d4": "D4"}
"""Dispersion corrections that can be embedded."""

DEFAULT_S9 = {"d3bj": 0.0, "d4": 1.0}
"""Scale of the three-body energy where nothing else is said: D3(BJ) is used without, D4 with it."""

DEFAULT_SMOOTHING = 0.2
"""Fraction of a cutoff, at its end, over which D3(BJ) pairs are switched off."""

COULOMB_METHODS = ("simple", "dsf", "ewald")


# --------------------------------------------------------------------------------------------------
# dispersion
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dispersion:
    """The dispersion correction to embed: ``none``, or one of `METHODS` with its parameters.

    Attributes
    ----------
    method : str
        ``none``, ``d3bj`` or ``d4``.
    functional : str, optional
        Whose parameters they are.
    parameters : dict, optional
        Arguments of `aimnet2mult.dispersion.DFTD3` (s6, s8, a1, a2 in Bohr; s9 if there is a three-body energy) or
        `aimnet2mult.dftd4.DFTD4` (s6, s8, s9, a1, a2; ga, gc where they are unusual).
    cutoff : float, optional
        Range of the pairs of D3(BJ), Å; None for 60 Bohr without a switch.
    smoothing : float, optional
        Fraction of ``cutoff`` over which pairs are switched off.
    """

    method: str = "none"
    functional: str | None = None
    parameters: dict[str, float] | None = None
    cutoff: float | None = None
    smoothing: float | None = None

    @property
    def text(self) -> str:
        """For messages: ``D3(BJ) of b3lyp``."""
        if self.method == "none":
            return "no dispersion"
        name = METHODS[self.method]
        text = f"{name} of {self.functional}" if self.functional else f"{name} with the parameters {self.parameters}"
        return text if self.cutoff is None else f"{text} within {self.cutoff} Å"

    def module(self) -> DFTD3 | DFTD4 | None:
        """Return the readout that adds the correction, None for ``none``."""
        if self.parameters is None:
            return None
        if self.method == "d4":
            from aimnet2mult.dftd4 import DFTD4

            return DFTD4(**self.parameters)  # type: ignore[arg-type]  # none of them is the key
        from aimnet2mult.dispersion import DFTD3

        module = DFTD3(**self.parameters)  # type: ignore[arg-type]  # none of them is the key
        if self.cutoff is not None:
            assert self.smoothing is not None
            module.set_cutoff(self.cutoff, self.smoothing)
        return module


def choose_dispersion(
    method: str | None,
    functional: str | None = None,
    parameters: Mapping[str, float | None] | None = None,
    cutoff: float | None = None,
    smoothing: float | None = None,
) -> Dispersion | None:
    """Check what was asked for.

    Parameters
    ----------
    method : str or None
        ``none``, ``d3bj``, ``d4``; None if nothing was asked for.
    functional : str, optional
        Functional whose parameters to take.
    parameters : mapping, optional
        Instead: s8, a1, a2 (Bohr), and s6 if not 1. In both cases s9, the scale of the three-body energy.
    cutoff, smoothing : float, optional
        As in `Dispersion`; for ``d3bj``.

    Raises
    ------
    ValueError
        Says which flag is missing, superfluous, unknown or no sensible number.
    """
    given = {key: float(value) for key, value in (parameters or {}).items() if value is not None}
    for key, value in given.items():
        if not math.isfinite(value):
            raise ValueError(f"--dispersion-{key} {value}: expected a number")
    if method is None or method == "none":
        if functional is not None or given or cutoff is not None or smoothing is not None:
            raise ValueError("a functional, parameters or a cutoff without a correction: use --dispersion d3bj or d4")
        return None if method is None else Dispersion()
    if method not in METHODS:
        raise ValueError(f"--dispersion {method} is unknown; known: none, {', '.join(METHODS)}")
    cutoff, smoothing = _ranges(method, cutoff, smoothing)
    own = {key: value for key, value in given.items() if key != "s9"}
    s9 = given.get("s9")
    if functional is not None:
        if own:
            raise ValueError("--dispersion-functional and --dispersion-s6/-s8/-a1/-a2 exclude each other; give one")
        return Dispersion(method, functional, _with_s9(method, _published(method, functional), s9), cutoff, smoothing)
    missing = [key for key in ("s8", "a1", "a2") if key not in own]
    if missing:
        flags = ", ".join(f"--dispersion-{key}" for key in missing)
        raise ValueError(f"--dispersion {method} needs --dispersion-functional, or its own parameters: {flags} missing")
    return Dispersion(method, None, _with_s9(method, {"s6": 1.0, **own}, s9), cutoff, smoothing)


def dispersion_of_flags(flags: Mapping[str, Sequence[tuple[str, Any]]]) -> dict[str, Dispersion]:
    """Check what was asked for, for each fidelity that was named, and for the others.

    What is said for all fidelities goes for each of them that gets a correction, unless it is named with another value:
    ``--dispersion d3bj --dispersion-functional b3lyp --dispersion xtb=none``.

    Parameters
    ----------
    flags : mapping
        Values of ``method, functional, cutoff, smoothing, s6, s8, s9, a1, a2``, each with the fidelity (number or name)
        that it is for, or `ALL`.

    Returns
    -------
    dict
        {fidelity, or `ALL` for those that are not named: correction}, where one was asked for.

    Raises
    ------
    ValueError
        As `choose_dispersion`; two values of a flag for a fidelity.
    """
    given: dict[str, dict[str, Any]] = {ALL: {}}
    for key, entries in flags.items():
        for name, value in entries:
            own = given.setdefault(name, {})
            if key in own:
                flag = "--dispersion" if key == "method" else f"--dispersion-{key}"
                raise ValueError(f"{flag}: two values for {name}, {own[key]} and {value}; give one")
            own[key] = value
    common = given[ALL]
    corrected = [name for name, own in given.items() if {**common, **own}.get("method", "none") != "none"]
    chosen: dict[str, Dispersion] = {}
    for name, own in given.items():
        values = {**common, **own}
        if corrected and name not in corrected:
            # Functional and parameters for all are about those that get a correction.
            values = {"method": common.get("method"), **({} if name == ALL else own)}
        parameters = {key: values.get(key) for key in ("s6", "s8", "s9", "a1", "a2")}
        ranges = values.get("cutoff"), values.get("smoothing")
        try:
            found = choose_dispersion(values.get("method"), values.get("functional"), parameters, *ranges)
        except ValueError as error:
            if name == ALL:
                raise
            raise ValueError(f"dispersion of {name}: {error}") from error
        if found is not None:
            chosen[name] = found
    return chosen


def _ranges(method: str, cutoff: float | None, smoothing: float | None) -> tuple[float | None, float | None]:
    """Range of the pairs, Å, and fraction of it for switching off, checked and filled up."""
    if method != "d3bj" and (cutoff is not None or smoothing is not None):
        raise ValueError("--dispersion-cutoff and --dispersion-smoothing are for --dispersion d3bj")
    if cutoff is None:
        if smoothing is not None:
            raise ValueError("--dispersion-smoothing is a fraction of --dispersion-cutoff; give that, too")
        return None, None
    if not 0.0 < cutoff < math.inf:
        raise ValueError(f"--dispersion-cutoff {cutoff}: expected a positive number, Å")
    smoothing = DEFAULT_SMOOTHING if smoothing is None else smoothing
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"--dispersion-smoothing {smoothing}: expected a number between 0 and 1")
    return cutoff, smoothing


def _published(method: str, functional: str) -> dict[str, float]:
    """Parameters of a functional; those of D4 that are the same for nearly all are left out where they are."""
    from aimnet2mult.dispersion_params import D4Parameters, d3bj_parameters, d4_parameters

    if method == "d3bj":
        return {key: float(getattr(d3bj_parameters(functional), key)) for key in ("s6", "s8", "a1", "a2")}
    usual = {"ga": D4Parameters.ga, "gc": D4Parameters.gc}
    found = {key: float(value) for key, value in asdict(d4_parameters(functional)).items()}
    return {key: value for key, value in found.items() if key not in usual or value != usual[key]}


def _with_s9(method: str, parameters: dict[str, float], s9: float | None) -> dict[str, float]:
    """Parameters with the scale of the three-body energy; D3(BJ) without such an energy has none."""
    if s9 is None:
        s9 = parameters.get("s9", DEFAULT_S9[method])
    parameters = {key: value for key, value in parameters.items() if key != "s9"}
    return parameters if method == "d3bj" and s9 == 0.0 else {**parameters, "s9": s9}


def dispersion_to_embed(
    entry: Mapping[str, Any] | None, asked: Dispersion | None, fidelity: str
) -> tuple[Dispersion, str | None]:
    """The correction that belongs to a fidelity, by its ledger and what the user asks for.

    Parameters
    ----------
    entry : mapping or None
        ``labels`` and ``subtracted`` of the fidelity, as in checkpoints; None if the checkpoint does not say.
    asked : Dispersion or None
        What the user asks for; None for what belongs to the labels.
    fidelity : str
        What to call it in messages.

    Returns
    -------
    dispersion : Dispersion
        The correction.
    source : str or None
        Where it comes from, for the metadata.

    Raises
    ------
    ValueError
        A correction on top of labels that contain dispersion.
    """
    from aimnet2mult.data.ledger import DispersionLabel

    chosen = asked or Dispersion()
    source = None if chosen.method == "none" else COMMAND_LINE
    if entry is None:
        return chosen, source
    labels = DispersionLabel.from_dict(entry["labels"])
    if entry["subtracted"]:
        subtracted = Dispersion(labels.method, labels.functional, labels.parameters)
        same = asked is not None and (asked.method, asked.parameters, asked.cutoff) == (
            *(subtracted.method, subtracted.parameters),
            None,
        )
        if asked is None or same:
            return subtracted, SUBTRACTED
        logger.warning(
            f"{fidelity}: training subtracted {labels.text} from the labels, and this model gets {chosen.text}, as "
            "--dispersion says: its energies and forces are not those of the labels' level of theory"
        )
    elif chosen.method == "none":
        if asked is None and labels.method == "none":
            logger.info(
                f"{fidelity}: the labels contain no dispersion, and none is added. To add it: --dispersion d3bj "
                "--dispersion-functional NAME"
            )
    elif labels.method == "unknown":
        logger.warning(
            f"{fidelity}: it was not stated which dispersion the labels contain. If they contain any, this model "
            f"counts it twice with {chosen.text}"
        )
    elif labels.method != "none":
        remedy = ", or train with subtract_dispersion: true for this fidelity" if labels.method == "d3bj" else ""
        raise ValueError(
            f"--dispersion {chosen.method}: the labels of {fidelity} contain {labels.text}, which the network has "
            f"learned; with {chosen.text} on top, dispersion would be counted twice. Leave the flag out, or "
            f"say for which other fidelity it is (--dispersion NAME={chosen.method}){remedy}."
        )
    return chosen, source


# --------------------------------------------------------------------------------------------------
# Coulomb energy
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coulomb:
    """How the Coulomb energy of a compiled model is summed; arguments of `LRCoulomb.set_method`.

    Attributes
    ----------
    method : str
        ``simple`` (every pair), ``dsf`` (damped shifted force) or ``ewald``.
    cutoff : float, optional
        Range of the pairs of ``dsf`` and ``ewald``, Å.
    dsf_alpha : float, optional
        Damping of ``dsf``, 1/Å.
    ewald_accuracy : float, optional
        Relative size of what ``ewald`` leaves out.
    """

    method: str
    cutoff: float | None = None
    dsf_alpha: float | None = None
    ewald_accuracy: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """What was said beside the method."""
        return {key: value for key, value in asdict(self).items() if key != "method" and value is not None}


def choose_coulomb(
    method: str | None,
    cutoff: float | None = None,
    dsf_alpha: float | None = None,
    ewald_accuracy: float | None = None,
) -> Coulomb | None:
    """Check what was asked for; None for the method that the model was trained with.

    Raises
    ------
    ValueError
        Says which flag is superfluous, unknown or no sensible number.
    """
    flags = {"--coulomb-cutoff": cutoff, "--dsf-alpha": dsf_alpha, "--ewald-accuracy": ewald_accuracy}
    for flag, value in flags.items():
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{flag} {value}: expected a positive number")
    if method is None:
        superfluous = [flag for flag, value in flags.items() if value is not None]
        if superfluous:
            raise ValueError(f"{superfluous[0]}: say for which method, --coulomb dsf or ewald")
        return None
    if method not in COULOMB_METHODS:
        raise ValueError(f"--coulomb {method} is unknown; known: {', '.join(COULOMB_METHODS)}")
    takers = {"--coulomb-cutoff": ("dsf", "ewald"), "--dsf-alpha": ("dsf",), "--ewald-accuracy": ("ewald",)}
    for flag, value in flags.items():
        if value is not None and method not in takers[flag]:
            raise ValueError(f"{flag} is for --coulomb {' and '.join(takers[flag])}, not for {method}")
    if ewald_accuracy is not None and ewald_accuracy >= 1.0:
        raise ValueError(f"--ewald-accuracy {ewald_accuracy}: expected a number below 1, such as 1e-8")
    return Coulomb(method, cutoff, dsf_alpha, ewald_accuracy)


@dataclass(frozen=True)
class ModelOptions:
    """Everything that is chosen for a file beside the fidelity.

    Attributes
    ----------
    dispersion : mapping of int to Dispersion
        By fidelity; default: what was subtracted from the labels (`dispersion_to_embed`).
    coulomb : Coulomb, optional
        Default: as trained.
    stress, hessian : bool, optional
        What the file computes whenever it is called (``compute_stress``, ``compute_hessian``); default: neither.
    licence, comment : str, optional
        Lines for the metadata.
    """

    dispersion: Mapping[int, Dispersion] = field(default_factory=dict)
    coulomb: Coulomb | None = None
    stress: bool = False
    hessian: bool = False
    licence: str | None = None
    comment: str | None = None
