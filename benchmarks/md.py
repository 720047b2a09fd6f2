"""What a step of molecular dynamics costs: ASE with our calculator, and with that of the `aimnet` package.

Velocity Verlet of hexane (20 atoms) and of a periodic box of water (1,000 molecules), with the same untrained network
(what it costs does not depend on the weights), in float32 on one thread. Each calculator has a process of its own that
takes some steps in its turn; the median over all turns of the CPU time per step is reported. Atoms start at 30 K and
move little, since an untrained network holds nothing together.

Where the time goes, measured by timing parts of a step alone, in turns, at the same geometry: the call of the compiled
model with tensors, the search for neighbours inside of it, and what is left to ASE and the calculator. The share of the
search is the most that could be gained by keeping the lists of neighbours for several steps.

    OMP_NUM_THREADS=1 python benchmarks/md.py --output benchmarks/results/md.json
"""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from compiled import COULOMB, SELF_ENERGY, SHORT, aimnet_calculator, model_config, take_turns, water_box
from report import check_output, processor, write_results

from aimnet2mult import nbops
from aimnet2mult.calculators import AIMNet2Calculator
from aimnet2mult.models.aimnet2 import AIMNet2
from aimnet2mult.models.base import build_model, versions
from aimnet2mult.models.compiled_file import save_jit_model
from aimnet2mult.models.jit_wrapper import DeployableModel
from aimnet2mult.modules import SelfAtomicEnergies
from aimnet2mult.utils.cli import user_errors

SPECIES = [1, 6, 8]
TIME_STEP = 0.5
"""fs."""

TEMPERATURE = 30.0
"""K, of the first velocities."""

OURS, AIMNET = "ours", "aimnet"
MOLECULE, BOX = "molecule", "box"
RANGES = {SHORT: "", COULOMB: "dsf"}
"""Model -> Coulomb method in a crystal."""

DSF_CUTOFF = 15.0
"""Å."""

# --------------------------------------------------------------------------------------------------
# systems and models
# --------------------------------------------------------------------------------------------------


def hexane() -> Atoms:
    """C6H14, all bonds between carbons trans."""
    half_step, half_height, c_h = 1.27, 0.43, 1.09
    carbons = np.array([[half_step * k, half_height * (-1) ** k, 0.0] for k in range(6)])
    hydrogens = []
    for k, carbon in enumerate(carbons):
        away = (-1) ** k
        hydrogens += [carbon + c_h * np.array([0.0, 0.58 * away, 0.81 * side]) for side in (1, -1)]
    for end, direction in ((0, -1), (5, 1)):
        hydrogens.append(carbons[end] + c_h * np.array([0.81 * direction, -0.58 * (-1) ** end, 0.0]))
    return Atoms("C6H14", np.concatenate([carbons, hydrogens]))


def system(name: str, n_waters: int, seed: int) -> Atoms:
    """Atoms with velocities."""
    if name == MOLECULE:
        atoms = hexane()
    else:
        numbers, coord, cell = water_box(3 * n_waters, seed)
        atoms = Atoms(numbers, coord, cell=cell, pbc=True)
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=np.random.default_rng(seed))
    return atoms


def network(small: bool, kind: str, seed: int) -> AIMNet2:
    """The untrained network of a kind."""
    torch.manual_seed(seed)
    return build_model(model_config(small, kind != SHORT))


def write_models(folder: Path, small: bool, seed: int) -> None:
    """Write a compiled model for each of `RANGES`."""
    for kind in RANGES:
        model = network(small, kind, seed)
        model.add_output("self_atomic_energies", SelfAtomicEnergies(dict.fromkeys(SPECIES, SELF_ENERGY)))
        metadata = {"species": SPECIES, "model_config": model_config(small, kind != SHORT)}
        save_jit_model(DeployableModel(model, SPECIES), folder / f"{kind}.jpt", metadata)


def our_calculator(folder: Path, kind: str, periodic: bool) -> AIMNet2Calculator:
    """Our calculator, as users make it."""
    calculator = AIMNet2Calculator(folder / f"{kind}.jpt")
    if periodic and RANGES[kind]:
        calculator.model.set_coulomb_method(RANGES[kind], DSF_CUTOFF)
    return calculator


def their_calculator(small: bool, kind: str, periodic: bool, seed: int) -> Any:
    """ASE calculator of the aimnet package, with the same weights."""
    from aimnet.calculators import AIMNet2ASE, AIMNet2Calculator

    # The weights are those of the network; they have no part in the Coulomb energy, which is a module beside it there.
    weights = network(small, SHORT, seed).state_dict()
    short = aimnet_calculator(model_config(small, coulomb=False), weights).model
    base = AIMNet2Calculator(short, device="cpu", needs_coulomb=kind == COULOMB)
    if kind == COULOMB:
        base.set_lrcoulomb_method(RANGES[kind] if periodic else "simple", DSF_CUTOFF)
    return AIMNet2ASE(base)


# --------------------------------------------------------------------------------------------------
# the simulation, in a process of its own
# --------------------------------------------------------------------------------------------------

_dynamics: VelocityVerlet | None = None


def begin(program: str, folder: Path, name: str, kind: str, n_waters: int, small: bool, seed: int) -> None:
    """Prepare this process, and take the first steps."""
    global _dynamics
    torch.set_num_threads(1)
    atoms = system(name, n_waters, seed)
    periodic = bool(atoms.pbc.any())
    if program == OURS:
        atoms.calc = our_calculator(folder, kind, periodic)
    else:
        atoms.calc = their_calculator(small, kind, periodic, seed)
    _dynamics = VelocityVerlet(atoms, TIME_STEP * units.fs)
    _dynamics.run(2 if periodic else 10)


def take_steps(n_steps: int) -> float:
    """CPU time per step."""
    assert _dynamics is not None
    start = time.process_time()
    _dynamics.run(n_steps)
    return (time.process_time() - start) / n_steps


def state() -> dict[str, Any]:
    """Energy and forces of the present positions, calculated again; eV, eV/Å."""
    assert _dynamics is not None
    atoms = _dynamics.atoms
    atoms.calc.reset()
    return {"forces": atoms.get_forces(), "energy": atoms.get_potential_energy(), "positions": atoms.positions}


def measure_simulation(
    programs: list[str],
    folder: Path,
    name: str,
    kind: str,
    n_waters: int,
    small: bool,
    turns: int,
    steps: int,
    seed: int,
) -> dict:
    """CPU time per step of each program, in turns."""
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[float]] = {program: [] for program in programs}
    with ExitStack() as stack:
        arguments = (folder, name, kind, n_waters, small, seed)
        workers = {program: stack.enter_context(context.Pool(1)) for program in programs}
        for program, worker in workers.items():
            worker.apply(begin, (program, *arguments))
        for _ in range(turns):
            for program, worker in workers.items():
                times[program].append(worker.apply(take_steps, (steps,)))
        states = {program: worker.apply(state) for program, worker in workers.items()}
    n_atoms = len(states[OURS]["forces"])
    row: dict[str, Any] = {
        "system": name,
        "model": kind,
        "atoms": n_atoms,
        "seconds per step": {program: statistics.median(values) for program, values in times.items()},
        "relative spread": {p: statistics.pstdev(v) / statistics.median(v) for p, v in times.items()},
    }
    if AIMNET in programs:
        ours, theirs = states[OURS], states[AIMNET]
        row["largest difference"] = {
            "positions": float(np.abs(ours["positions"] - theirs["positions"]).max()),
            "forces": float(np.abs(ours["forces"] - theirs["forces"]).max()),
            "largest force": float(np.abs(ours["forces"]).max()),
        }
    return row


# --------------------------------------------------------------------------------------------------
# where the time of a step goes
# --------------------------------------------------------------------------------------------------


def network_search(data: dict[str, torch.Tensor], cutoff: float, dense_limit: int) -> None:
    """Find the neighbours within the range of the network."""
    nbops.with_neighbors(nbops.internal_layout(data, dense_limit), cutoff)


def long_range_search(data: dict[str, torch.Tensor], cutoff: float, dense_limit: int) -> None:
    """Find the pairs of the long-range term, as often as the model does: block by block."""
    pairs = nbops.long_range_pairs(nbops.internal_layout(data, dense_limit), cutoff)
    assert pairs.search is not None
    for k in range(pairs.n_blocks):
        nbops.search_block(pairs.search, k)


class _KnownForces:
    """Stands in for a calculator."""

    def __init__(self, forces: np.ndarray) -> None:
        self.forces = forces

    def get_forces(self, atoms: Atoms) -> np.ndarray:
        """Forces that were given, eV/Å."""
        return self.forces


def measure_parts(folder: Path, name: str, kind: str, n_waters: int, repeats: int, small: bool, seed: int) -> dict:
    """Median CPU time of a step and of its parts, of our calculator; in a process of its own."""
    begin(OURS, folder, name, kind, n_waters, small, seed)
    assert _dynamics is not None
    dynamics = _dynamics
    atoms = dynamics.atoms
    calculator = atoms.calc
    data = calculator.batch(atoms)
    cutoff, limit = calculator.model.cutoff, calculator.model.nb_threshold
    stand_in = _KnownForces(atoms.get_forces())

    def without_calculator() -> None:
        atoms.calc = stand_in
        dynamics.run(1)
        atoms.calc = calculator

    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: dynamics.run(1),
        "ASE without a calculator": without_calculator,
        "calculator": lambda: calculator.calculate(atoms, ["energy", "forces"], ["positions"]),
        "model": lambda: calculator.model(data),
    }
    if "cell" in data:  # the molecule is in dense layout, without any search
        calls["search of the network"] = lambda: network_search(data, cutoff, limit)
    if kind == COULOMB and "cell" in data:
        calls["search of the Coulomb energy"] = lambda: long_range_search(data, DSF_CUTOFF, limit)
    times = take_turns(calls, repeats, 0.0)
    return {
        "system": name,
        "model": kind,
        "atoms": len(atoms),
        "seconds": {key: statistics.median(values) for key, values in times.items()},
    }


# --------------------------------------------------------------------------------------------------
# the page
# --------------------------------------------------------------------------------------------------


def searches(row: dict) -> float:
    """CPU time of all searches of a step, s."""
    return sum(value for key, value in row["seconds"].items() if key.startswith("search"))


def markdown(result: dict) -> str:
    """The result as a page."""
    arguments, machine = result["arguments"], result["machine"]
    size = "small" if arguments["small"] else "full-size"
    lines = [
        "# Molecular dynamics with ASE",
        "",
        "Made by `benchmarks/md.py`, which says how.",
        "",
        f"- {size} model, untrained, float32; velocity Verlet, steps of {TIME_STEP} fs, {TEMPERATURE:.0f} K at first",
        "- median CPU time per step; steps/s is its inverse",
        f"- {machine['device']}, {machine['threads']} thread",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        "",
        "| system | atoms | model | ours, ms | ours, steps/s | aimnet, ms | aimnet, steps/s | ours / aimnet |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["steps"]:
        ours, theirs = row["seconds per step"][OURS], row["seconds per step"].get(AIMNET)
        peer = ["", "", ""] if theirs is None else [f"{1e3 * theirs:.1f}", f"{1 / theirs:.2f}", f"{ours / theirs:.2f}"]
        cells = [row["system"], str(row["atoms"]), row["model"], f"{1e3 * ours:.1f}", f"{1 / ours:.2f}", *peer]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Models: `{SHORT}`, the network; `{COULOMB}`, with Coulomb energy: all pairs of the molecule, dsf"]
    lines += [f"within {DSF_CUTOFF:.0f} Å in the box."]
    if "skipped" in result:
        lines += ["", result["skipped"]]
    else:
        worst = max(row["largest difference"]["forces"] for row in result["steps"])
        lines += ["", f"After the run, forces of both differ by at most {worst:.0e} eV/Å."]
    lines += [
        "",
        "## Where the time of our step goes",
        "",
        "Parts timed alone, as shares of the step. The calculator contains the model, the model the searches; what is",
        "left beside calculator and ASE is ASE's comparison of the atoms with those of the last calculation.",
        "",
        "| system | model | step, ms | ASE without a calculator | calculator | model | searches |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["parts"]:
        seconds = row["seconds"]
        step = seconds["step"]
        shares = [seconds["ASE without a calculator"], seconds["calculator"], seconds["model"], searches(row)]
        cells = [row["system"], row["model"], f"{1e3 * step:.1f}", *(f"{share / step:.1%}" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The share of the searches is the most that keeping lists of neighbours for several steps (a skin) could save;",
        "the distances of all pairs, and those of the skin, would still have to be computed in each step.",
    ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------
# command line
# --------------------------------------------------------------------------------------------------


def measure(kinds: list[str], n_waters: int, turns: int, small: bool, seed: int) -> dict:
    """Steps of all programs, and the parts of ours."""
    result: dict[str, Any] = {"steps": [], "parts": []}
    programs = [OURS, AIMNET]
    if importlib.util.find_spec("aimnet") is None:
        programs = [OURS]
        result["skipped"] = "The package aimnet is not installed: not compared."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, small, seed)
        for which, steps, repeats in ((MOLECULE, 20, 10 * turns), (BOX, 1, turns)):
            for kind in kinds:
                row = measure_simulation(programs, folder, which, kind, n_waters, small, turns, steps, seed)
                click.echo(f"{which}, {kind}: {row['seconds per step']} s per step", err=True)
                result["steps"].append(row)
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    parts = (folder, which, kind, n_waters, repeats, small, seed)
                    result["parts"].append(pool.apply(measure_parts, parts))
    return result


@click.command(context_settings={"show_default": True})
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON file; a .md is written beside it.")
@click.option("--waters", "n_waters", type=click.IntRange(8), default=1000, help="Molecules of the box, about.")
@click.option("--turns", type=click.IntRange(2), default=9, help="Turns of each calculator.")
@click.option("--only", "kinds", multiple=True, type=click.Choice(list(RANGES)), help="Model; repeatable. [both]")
@click.option("--small", is_flag=True, help="The small example model, 64 waters, three turns: a minute.")
@click.option("--seed", type=int, default=0, help="Of weights, positions and velocities.")
@user_errors
def main(output: Path, n_waters: int, turns: int, kinds: tuple[str, ...], small: bool, seed: int) -> None:
    """Time molecular dynamics with ASE, against the aimnet package."""
    check_output(output)
    if small:
        n_waters, turns = 64, 3
    chosen = list(kinds) or list(RANGES)
    torch.set_num_threads(1)
    result = measure(chosen, n_waters, turns, small, seed)
    packages = ["ase"] + (["aimnet"] if "skipped" not in result else [])
    result |= {
        "machine": {"device": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {**versions(), **{package: importlib.metadata.version(package) for package in packages}},
        "arguments": {"models": chosen, "waters": n_waters, "turns": turns, "small": small, "seed": seed},
    }
    write_results(output, result, markdown(result))


if __name__ == "__main__":
    main()
