"""Golden cases: small systems of a model's own elements, with the results that a compiled file must reproduce.

They are made when a model is compiled and travel inside the file, so that anyone can find out whether it gives the
same numbers on another machine (`aimnet2mult.tools.verify`). A case has inputs, and outputs in single precision, as
the file runs, and in double precision (``model.double()``). Geometries are heaps of atoms at bonding distances: no
chemistry, but every element of the model, every layout, ions and open shells, and a crystal where the model allows it.

Inputs are representable in single precision, and numbers are written with all their digits, so both precisions see the
same system. Results on another machine, processor or version of PyTorch differ by the order in which it sums. How much
that is in single precision the file itself tells: about as much as its results in single precision differ from those in
double precision. `ROUND_OFF_FACTOR` times this is allowed, and never less than `SINGLE_FLOOR`.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aimnet2mult.nbops import BATCH_KEYS
from aimnet2mult.utils.text import text_table

GOLDEN_VERSION = 1
"""Version of the format of golden cases."""

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}

QUANTITIES = {key: BATCH_KEYS[key].unit for key in ("energy", "forces", "charges", "spin_charges", "stress", "hessian")}
"""Outputs that are kept and compared, with their units."""

ROUND_OFF_FACTOR = 10.0
"""What is allowed in single precision, in terms of the largest difference to double precision in the file."""

SINGLE_FLOOR = {
    "energy": 2e-5,
    "forces": 2e-5,
    "charges": 2e-6,
    "spin_charges": 2e-6,
    "stress": 2e-6,
    "hessian": 2e-3,
}
"""Smallest difference that is allowed in single precision."""

DOUBLE_FLOOR = 1e-8
"""Difference that is allowed in double precision, in the units of `QUANTITIES`, beside `DOUBLE_RELATIVE`."""

DOUBLE_RELATIVE = 1e-14
"""Relative difference that is allowed in double precision: total energies are -1e6 eV and more."""

MOLECULE_SIZES = (1, 3, 8)
CLUSTER_SIZES = (20, 5)
CRYSTAL_SIZE = 6
"""Atoms of the systems; more molecules of `LARGEST_MOLECULE` atoms follow until each element had its turn."""

LARGEST_MOLECULE = 12

PERIOD_ENDS = (2, 10, 18, 36, 54, 86)
PERIOD_RADII = (0.31, 0.72, 1.1, 1.25, 1.4, 1.5, 1.6)
"""Last element of each period, and a radius for the atoms of each period, Å: near enough to covalent radii."""

BOND, CONTACT = 1.08, 1.4
"""Distance of bonded atoms, and least distance of others, in sums of radii."""

GRID = 1.0 / 1024.0
"""Å; positions are multiples of it, which single precision holds exactly."""

Case = dict[str, Any]
"""``name``, ``inputs``: key -> nested lists, ``options``: attribute of the model -> value while it is evaluated, and
``outputs``: precision -> key -> nested lists."""

Model = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""A batch in, results out: `DeployableModel`, `CombinedModel`, or one of them loaded, `Potential`."""


# --------------------------------------------------------------------------------------------------
# systems
# --------------------------------------------------------------------------------------------------


def radius(z: int) -> float:
    """Rough covalent radius of an element, Å."""
    return PERIOD_RADII[sum(z > last for last in PERIOD_ENDS)]


def heap(numbers: Sequence[int], rng: random.Random) -> list[list[float]]:
    """Positions of atoms, Å, each one at a bonding distance from an earlier one and not too near to any other."""
    places: list[list[float]] = [[0.0, 0.0, 0.0]]
    for k in range(1, len(numbers)):
        best: list[float] = []
        best_margin = -math.inf
        while best_margin < 1.0:
            for _ in range(50):
                parent = rng.randrange(k)
                direction = [rng.gauss(0.0, 1.0) for _ in range(3)]
                scale = BOND * (radius(numbers[k]) + radius(numbers[parent])) / math.hypot(*direction)
                place = [round((x + scale * dx) / GRID) * GRID for x, dx in zip(places[parent], direction, strict=True)]
                margin = min(
                    [
                        math.dist(place, places[i]) / (CONTACT * (radius(numbers[k]) + radius(numbers[i])))
                        for i in range(k)
                        if i != parent
                    ]
                    or [math.inf]
                )
                if margin > best_margin:
                    best, best_margin = place, margin
        places.append(best)
    return places


def multiplicity(numbers: Sequence[int], charge: int) -> int:
    """Lowest spin multiplicity that the number of electrons allows."""
    return 1 + (sum(numbers) - charge) % 2


def take_turns(species: Sequence[int]) -> Callable[[int], list[int]]:
    """Return a function that deals out elements, n at a time, each one as often as the others."""
    dealt = 0

    def deal(n: int) -> list[int]:
        nonlocal dealt
        numbers = [species[(dealt + k) % len(species)] for k in range(n)]
        dealt += n
        return numbers

    return deal


def dense(molecules: Sequence[tuple[list[int], int, int]], rng: random.Random) -> dict[str, Any]:
    """Padded batch of molecules (atomic numbers, charge, multiplicity)."""
    size = max(len(numbers) for numbers, _, _ in molecules)
    return {
        "coord": [heap(z, rng) + [[0.0, 0.0, 0.0]] * (size - len(z)) for z, _, _ in molecules],
        "numbers": [z + [0] * (size - len(z)) for z, _, _ in molecules],
        "charge": [charge for _, charge, _ in molecules],
        "mult": [mult for _, _, mult in molecules],
    }


def flat(molecules: Sequence[tuple[list[int], int, int]], rng: random.Random) -> dict[str, Any]:
    """Flat batch of molecules (atomic numbers, charge, multiplicity)."""
    return {
        "coord": [place for z, _, _ in molecules for place in heap(z, rng)],
        "numbers": [number for z, _, _ in molecules for number in z],
        "mol_idx": [m for m, (z, _, _) in enumerate(molecules) for _ in z],
        "charge": [charge for _, charge, _ in molecules],
        "mult": [mult for _, _, mult in molecules],
    }


def crystal(numbers: list[int], rng: random.Random) -> dict[str, Any]:
    """One heap of atoms in an oblique cell that leaves little room around it."""
    places = heap(numbers, rng)
    gap = 2.0 * CONTACT * max(radius(z) for z in numbers)
    lengths = [math.ceil(max(p[k] for p in places) - min(p[k] for p in places) + gap) for k in range(3)]
    a, b, c = lengths
    return {
        "coord": places,
        "numbers": numbers,
        "charge": [0],
        "mult": [multiplicity(numbers, 0)],
        "cell": [[float(a), 0.0, 0.0], [0.25 * a, float(b), 0.0], [-0.125 * a, 0.25 * b, float(c)]],
    }


def make_cases(species: Sequence[int], open_shell: bool, periodic: bool, title: str = "") -> list[Case]:
    """Inputs for a model, the same whenever they are made.

    Parameters
    ----------
    species : sequence of int
        Its elements; each one occurs.
    open_shell : bool
        It tells spin multiplicities apart; then some are higher than they must be.
    periodic : bool
        It takes a cell.
    title : str
        What the names of the cases begin with.

    Returns
    -------
    list of dict
        Cases without outputs: molecules (a padded batch), ions (the same with charges), clusters (flat layout), a
        crystal (with stress) and a molecule with its Hessian.
    """
    rng = random.Random(0)
    deal = take_turns(sorted(species))
    molecules = [deal(n) for n in MOLECULE_SIZES]
    while sum(map(len, molecules)) < len(species):
        molecules.append(deal(LARGEST_MOLECULE))
    neutral = [(z, 0, multiplicity(z, 0)) for z in molecules]
    extra = 2 if open_shell else 0
    ions = [(z, q, multiplicity(z, q) + extra) for q, z in zip((1, -1), molecules[1:3], strict=True)]
    clusters = [(z, q, multiplicity(z, q)) for z, q in zip((deal(n) for n in CLUSTER_SIZES), (0, -1), strict=True)]
    inputs = {
        "molecules": dense(neutral, rng),
        "ions": dense(ions, rng),
        "clusters": flat(clusters, rng),
        "Hessian": dense(neutral[1:2], rng),
    }
    if periodic:
        inputs["crystal"] = crystal(deal(CRYSTAL_SIZE), rng)
    prefix = f"{title} " if title else ""
    return [{"name": prefix + name, "inputs": values, "options": _options(name)} for name, values in inputs.items()]


def _options(name: str) -> dict[str, bool]:
    return {"compute_stress": name == "crystal", "compute_hessian": name == "Hessian"}


def case_in_all_fidelities(species: Sequence[Sequence[int]]) -> list[Case]:
    """Batch of one molecule, once in each fidelity, for a model of several; empty if they have no element in common.

    Parameters
    ----------
    species : sequence of sequence of int
        Elements of each fidelity.
    """
    common = sorted(set.intersection(*map(set, species)))
    if not common:
        return []
    numbers = take_turns(common)(MOLECULE_SIZES[-1])
    one = dense([(numbers, 0, multiplicity(numbers, 0))], random.Random(1))
    repeated = {key: value * len(species) for key, value in one.items()}
    inputs = {**repeated, "fidelity": list(range(len(species)))}
    return [{"name": "all fidelities", "inputs": inputs, "options": _options("")}]


# --------------------------------------------------------------------------------------------------
# results
# --------------------------------------------------------------------------------------------------


def batch(inputs: Mapping[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Inputs of a case as a batch of tensors."""
    kinds = {"numbers": torch.int64, "mol_idx": torch.int64, "fidelity": torch.int64}
    return {key: torch.tensor(value, dtype=kinds.get(key, dtype), device=device) for key, value in inputs.items()}


def evaluate(model: Model, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Results of a model for a case, float64 on the CPU, those of `QUANTITIES` that it has.

    Options of the model are left as they were.
    """
    module = getattr(model, "module", model)
    before = {key: getattr(module, key) for key in case["options"]}
    try:
        for key, value in case["options"].items():
            setattr(module, key, value)
        with torch.no_grad():
            out = model(batch(case["inputs"], dtype, device))
    finally:
        for key, value in before.items():
            setattr(module, key, value)
    return {key: out[key].to("cpu", torch.float64) for key in QUANTITIES if key in out}


def golden(cases: Sequence[Case], single: Model, double: Model) -> dict[str, Any]:
    """Cases with the results of a model, ready to be written as JSON.

    Parameters
    ----------
    cases : sequence of dict
        Made by `make_cases`.
    single, double : callable
        The model in single and in double precision.

    Raises
    ------
    ValueError
        A result is not finite.
    """
    models = {"float32": single, "float64": double}
    done = []
    for case in cases:
        outputs = {name: evaluate(models[name], case, dtype) for name, dtype in PRECISIONS.items()}
        for name, results in outputs.items():
            for key, value in results.items():
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"golden case {case['name']}: {key} in {name} holds NaN or infinite values")
        plain = {name: {key: x.tolist() for key, x in results.items()} for name, results in outputs.items()}
        done.append({**case, "outputs": plain})
    return {"version": GOLDEN_VERSION, "cases": done}


# --------------------------------------------------------------------------------------------------
# comparison
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Largest difference of a quantity between a golden case and what a model gives.

    Attributes
    ----------
    case, precision, quantity : str
        Which.
    found, allowed : float
        In the unit of the quantity (`QUANTITIES`). A quantity that is missing, not finite or of another shape differs
        by infinity.
    """

    case: str
    precision: str
    quantity: str
    found: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether it is within round-off."""
        return self.found <= self.allowed

    @property
    def text(self) -> str:
        """For messages: ``energy of molecules in float32 by 1.2e-01 eV (2.0e-05 allowed)``."""
        unit = QUANTITIES[self.quantity]
        size = f"{self.found:.1e} {unit} ({self.allowed:.1e} allowed)"
        return f"{self.quantity} of {self.case} in {self.precision} by {size}"


def _expected(case: Case, precision: str) -> dict[str, Tensor]:
    return {key: torch.tensor(x, dtype=torch.float64) for key, x in case["outputs"][precision].items()}


def _distance(a: Tensor, b: Tensor | None) -> float:
    if b is None or a.shape != b.shape or not bool(torch.isfinite(b).all()):
        return math.inf
    return float((a - b).abs().max()) if a.numel() else 0.0


def single_round_off(content: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference between results in single and in double precision in golden cases, by quantity."""
    largest: dict[str, float] = {}
    for case in content["cases"]:
        single, double = (_expected(case, name) for name in PRECISIONS)
        for key, value in single.items():
            largest[key] = max(largest.get(key, 0.0), _distance(value, double.get(key)))
    return largest


def compare(
    content: Mapping[str, Any],
    precision: str,
    model: Model,
    device: str | torch.device = "cpu",
    tolerance: float | None = None,
) -> list[Difference]:
    """Evaluate golden cases and compare.

    Parameters
    ----------
    content : mapping
        Made by `golden`.
    precision : str
        ``float32`` or ``float64``.
    model : callable
        The model in that precision.
    device : str or torch.device
        Where it is.
    tolerance : float, optional
        Largest difference to accept, for all quantities in their units; default as the module says.

    Raises
    ------
    ValueError
        Cases of a later version of this package.
    """
    if content["version"] > GOLDEN_VERSION:
        raise ValueError(
            f"golden cases of version {content['version']} are newer than this package; update aimnet2mult"
        )
    round_off = single_round_off(content)
    found = []
    for case in content["cases"]:
        expected = _expected(case, precision)
        results = evaluate(model, case, PRECISIONS[precision], device)
        for key, value in expected.items():
            difference = _distance(value, results.get(key))
            if tolerance is not None:
                allowed = tolerance
            elif precision == "float32":
                allowed = max(SINGLE_FLOOR[key], ROUND_OFF_FACTOR * round_off[key])
            else:
                allowed = DOUBLE_FLOOR + DOUBLE_RELATIVE * float(value.abs().max())
            found.append(Difference(case["name"], precision, key, difference, allowed))
    return found


def table(differences: Sequence[Difference]) -> list[str]:
    """Differences as a table, a line for each case and precision; what is beyond round-off is marked with ``!``."""
    quantities = [key for key in QUANTITIES if any(d.quantity == key for d in differences)]
    cells = {(d.case, d.precision, d.quantity): f"{d.found:.1e}{'' if d.within else ' !'}" for d in differences}
    rows = [
        [case, precision, *(cells.get((case, precision, key), "") for key in quantities)]
        for case, precision in dict.fromkeys((d.case, d.precision) for d in differences)
    ]
    limits: dict[tuple[str, str], float] = {}
    for d in differences:
        limits[d.precision, d.quantity] = max(limits.get((d.precision, d.quantity), 0.0), d.allowed)
    for precision in dict.fromkeys(d.precision for d in differences):
        rows.append(["allowed", precision, *(f"{limits[precision, key]:.1e}" for key in quantities)])
    header = ["case", "precision", *(f"{key.replace('_', ' ')}, {QUANTITIES[key]}" for key in quantities)]
    return text_table(header, rows)
