"""Checks of one dataset after it, or a sample of it, has been read: `FIDELITY_CHECKS`, functions of `Examined`."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from aimnet2mult.constants import ELEMENT_SYMBOLS, element_names
from aimnet2mult.data.checks.dataset import Examined
from aimnet2mult.data.checks.findings import Finding
from aimnet2mult.data.checks.residuals import outlier_check
from aimnet2mult.data.checks.rows import Molecules, RowTallies, pieces
from aimnet2mult.data.checks.units import units_of_ratio

FORCE_SCALE = 12.0
"""eV/Å; the median over molecules of the root mean square force component is below this for any geometries of interest
(thermal ones have 0.5 to 3, relaxed ones next to nothing). Values in kcal/mol/Å or kJ/mol/Å are usually above."""

STIFFEST = 400.0
"""eV/Å²; forces between close geometries change by 5 to 100 eV/Å per Å displacement of the atoms, never by more."""

OFF_SLOPE = 0.3
"""The ratio of energy change to work is off by more than this where the unit of one of them is wrong."""

OFF_SAE = 5.0
"""eV per atom; self-atomic energies that miss the energies by more are those of another dataset."""

STATE_KEYS = ("numbers", "energy", "charge", "mult")
"""What outliers of the energy are found by."""


def check_rows(data: Examined) -> Iterator[Finding]:
    """What the checks of rows have marked."""
    yield from data.tallies.findings()


def check_length_unit(data: Examined) -> Iterator[Finding]:
    """Coordinates in Bohr, nm or pm."""
    unit, median = data.sample.length_guess or ("Å", 0.0)
    if unit != "Å":
        yield data.finding(
            "coord_unit",
            "warning",
            f"coordinates look like {unit}, not Å: atoms are {median:.3g} from their nearest neighbours (median). "
            f'Convert them, or set (or correct) the root attribute coord_unit = "{unit}" of the file.',
        )


def check_energy_unit(data: Examined) -> Iterator[Finding]:
    """Energies in Hartree, kcal/mol, kJ/mol or Rydberg."""
    guess = data.sample.energy_guess
    if guess is not None and guess.unit != "eV":
        yield data.finding(
            "energy_unit",
            "warning",
            f"energies look like {guess.unit}, not eV: in {guess.unit} they have the size of {guess.reference}. "
            f'Convert them, or set (or correct) the root attribute energy_unit = "{guess.unit}" of the file.',
        )


def check_force_scale(data: Examined) -> Iterator[Finding]:
    """Forces that are too large for eV/Å, or all zero."""
    typical = data.sample.typical_force
    if typical is None:
        return
    if typical > FORCE_SCALE:
        yield data.finding(
            "force_scale",
            "warning",
            "forces are very large for eV/Å: half of the molecules have root mean square components above "
            f"{typical:.0f}. kcal/mol/Å or kJ/mol (divide by 23.06 or 96.49), or violent geometries.",
        )
    elif typical == 0.0:
        yield data.finding(
            "zero_forces",
            "warning",
            "the forces of at least half of the molecules are exactly zero. Write NaN where forces are missing.",
        )


def check_types(data: Examined) -> Iterator[Finding]:
    """Arrays stored with too few digits."""
    largest = data.largest_energy
    if any(dtype.kind == "f" and dtype.itemsize < 8 for dtype in data.dtypes.get("energy", ())):
        lost = float(np.spacing(np.float32(largest)))
        yield data.finding(
            "energy_type",
            "warning" if lost > 1e-4 else "note",
            f"energy is stored as {data.summary.dtypes['energy']}: at {largest:.0f} eV neighbouring numbers are "
            f"{1e3 * lost:.2g} meV apart. Store float64.",
        )
    for key in ("coord", "forces", "charges"):
        if any(dtype.kind != "f" or dtype.itemsize < 4 for dtype in data.dtypes.get(key, ())):
            yield data.finding(
                f"{key}_type",
                "warning",
                f"{key} is stored as {data.summary.dtypes[key]}, which rounds it too much. Store float32 or float64.",
            )


def check_forces(data: Examined) -> Iterator[Finding]:
    """Forces that are not minus the gradient of the energies."""
    pairs, guess = data.summary.force_pairs, data.sample.energy_guess
    if pairs is None:
        return
    seen = (
        f"between {pairs.n_pairs} pairs of close geometries, energies change by {pairs.slope:.3g} times the work of "
        "the forces"
    )
    if not pairs.related:
        yield data.finding(
            "forces_unrelated",
            "warning",
            f"forces do not go with the energies ({seen}, but with no clear relation: r = {pairs.correlation:.2f}). "
            "Forces of other molecules, another order of atoms, another method, or very noisy ones.",
        )
        return
    if data.n_contrary:
        yield data.finding(
            "forces_of_some",
            "warning",
            f"in {data.n_contrary} of {pairs.n_pairs} pairs of close geometries energies do not go with the forces, as "
            "they do in the others. Some energies or forces have another sign or unit, or are of another molecule or "
            "electronic state. Have several files been joined?",
            examples=data.contrary[: data.limits.max_examples].tolist(),
        )
    if pairs.consistent:
        if pairs.stiffness > STIFFEST and guess is None:
            yield data.finding(
                "energy_and_forces_unit",
                "warning",
                "energies and forces go together, but neither is likely in units of eV: forces change by "
                f"{pairs.stiffness:.0f} eV/Å for each Å of displacement (bonds: 5 to 100). kcal/mol or kJ/mol?",
            )
        return
    positive = pairs.slope > 0.0
    if not positive:
        remedy = (
            "These are gradients; multiply them by -1."
            if guess is not None
            else "Either these are gradients, or the energies have the wrong sign (binding energies, positive for "
            "what is bound). Multiply one of the two by -1."
        )
        yield data.finding("forces_sign", "error", f"forces have the wrong sign: {seen}, where +1 is right. {remedy}")
    if abs(abs(pairs.slope) - 1.0) > OFF_SLOPE:
        length = data.sample.length_guess[0] if data.sample.length_guess else "Å"
        units = units_of_ratio(pairs.slope, length, None if guess is None else guess.unit)
        words = " or ".join(f"energies in {energy} with forces in {force}" for energy, force in units)
        yield data.finding(
            "forces_unit",
            "warning",
            f"forces are not minus the gradient of the energies: {seen}, where 1 is right. "
            + (f"That is the factor of {words}. " if words else "That is no usual factor between units. ")
            + "Convert them, or set (or correct) the root attributes energy_unit and forces_unit of the file.",
        )
    elif positive:
        yield data.finding(
            "forces_inexact",
            "warning",
            f"forces are roughly, but not exactly minus the gradient of the energies: {seen}, where 1 is right. "
            "Energies and forces of different settings (dispersion in only one of them, another basis)?",
        )


def check_sae(data: Examined) -> Iterator[Finding]:
    """Self-atomic energies that lack elements, or are not those of the energies."""
    if data.sae is None:
        return
    advice = "Fit them to this dataset (python -m aimnet2mult.train.calc_sae)."
    absent = sorted(data.elements.difference(data.sae))
    if absent:
        yield data.finding(
            "sae_elements", "error", f"{element_names(absent)} not among the self-atomic energies. {advice}"
        )
    if data.residuals is not None and abs(data.residuals.typical) > OFF_SAE:
        yield data.finding(
            "sae_mismatch",
            "warning",
            f"self-atomic energies leave {data.residuals.typical:.4g} eV per atom: they are of another method or unit. "
            f"{advice}",
        )


def check_outliers(data: Examined, molecules: Iterable[Molecules] | None = None) -> Iterator[Finding]:
    """Molecules (default: all) whose energies are far from the sum of their self-atomic energies."""
    if data.residuals is None:
        return
    tallies = RowTallies(data.name, data.source, data.limits, [outlier_check(data.residuals)])
    for piece in pieces(data.source, STATE_KEYS) if molecules is None else molecules:
        tallies.add(piece)
    yield from (finding for finding in tallies.findings() if finding.kind == "energy_outlier")


def check_coverage(data: Examined) -> Iterator[Finding]:
    """Labels that some molecules lack."""
    total = len(data.source)
    labels = data.summary.labels
    if not any(labels.values()):
        yield data.finding("no_labels", "error", "no molecule has any label. Every one is NaN.")
        return
    for key, count in labels.items():
        if not count:
            yield data.finding("missing_labels", "warning", f"the file has {key}, but it is NaN everywhere.")
        elif count < total:
            yield data.finding(
                "missing_labels",
                "note",
                f"{total - count} of {total} molecules lack {key}; training leaves them out of its loss.",
            )


QUICK_CHECKS: tuple[Callable[[Examined], Iterator[Finding]], ...] = (
    check_rows,
    check_length_unit,
    check_energy_unit,
    check_force_scale,
    check_forces,
)
"""Those that a sample is enough for."""

FIDELITY_CHECKS: tuple[Callable[[Examined], Iterator[Finding]], ...] = (
    check_rows,
    check_length_unit,
    check_energy_unit,
    check_force_scale,
    check_types,
    check_forces,
    check_sae,
    check_outliers,
    check_coverage,
)
"""All of them, for a dataset of which every molecule has been read."""


def check_elements(examined: Sequence[Examined]) -> Iterator[Finding]:
    """Elements that are rare in training, that a fidelity lacks, or that only the validation data hold."""
    trained = [data for data in examined if not data.part.only_validates]
    everywhere = set().union(*(data.elements for data in trained))
    for data in trained:
        absent = sorted(everywhere - data.elements)
        if absent:
            yield data.finding(
                "element_of_others",
                "note",
                f"has no {element_names(absent)}, which other fidelities have; its compiled model will refuse them.",
            )
        yield from _rare_elements(data)
    for data in examined:
        unknown = sorted(data.elements - everywhere)
        if data.part.only_validates and unknown and trained:
            yield data.finding(
                "element_only_in_validation",
                "warning",
                f"{element_names(unknown)} only in the validation data, so that nothing can be learnt about it.",
                count=sum(int(data.molecules[z]) for z in unknown),
                examples=[data.examples[z] for z in unknown],
            )


def _rare_elements(data: Examined) -> Iterator[Finding]:
    """Elements that too few molecules hold to learn them."""
    limit = min(data.limits.rare_element, len(data.source))
    rare = [z for z in sorted(data.elements) if data.molecules[z] < limit]
    if rare:
        listed = ", ".join(f"{ELEMENT_SYMBOLS[z]} ({data.molecules[z]})" for z in rare)
        yield data.finding(
            "rare_element",
            "note",
            f"elements in fewer than {limit} molecules: {listed}. Do not expect them to be learnt from this dataset.",
            examples=sorted({data.examples[z] for z in rare})[: data.limits.max_examples],
        )
